"""Which operation belongs to which class of the rule: torch's CUDA autocast lists, for every device.

torch's CPU autocast leaves 34 of these operations in 16 bits. The tables below say what is added to it so
that one policy holds on every device; ``tests/switching/test_policy.py`` holds them against the lists that
ship with torch. Names are aten overloads; a name that the installed torch has not is left out.

Source: https://docs.pytorch.org/docs/stable/amp.html (operation-specific behaviour), ATen/autocast_mode.h.
"""

from __future__ import annotations

import torch

__all__ = [
    "COMPOSITE_DOTS",
    "DOTS",
    "MIXED",
    "PROMOTE",
    "RECURRENT",
    "WIDE",
    "WIDE_INSIDE",
    "overload",
]


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Computed in FP32, written in FP32 (rule 2).
WIDE = _names("""
    acos asin cosh erfinv exp expm1 log log10 log1p log2 reciprocal rsqrt sinh tan
    pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor softplus
    layer_norm native_layer_norm group_norm rms_norm cosine_similarity
    cumprod cumsum dist pdist cdist renorm logsumexp softmax.int log_softmax.int
    sum sum.dim_IntList prod prod.dim_int
    norm.Scalar norm.ScalarOpt_dim nuclear_norm nuclear_norm.dim frobenius_norm.dim
    linalg_vector_norm linalg_matrix_norm linalg_matrix_norm.str_ord
    upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa
""") + _names("""
    cholesky cholesky_inverse cholesky_solve det inverse logdet lu_solve matrix_exp orgqr ormqr pinverse
    polar qr slogdet stft stft.center svd trace triangular_solve view_as_complex
    linalg_cholesky linalg_cholesky_ex linalg_cond linalg_det linalg_eig linalg_eigh linalg_eigvals
    linalg_eigvalsh linalg_householder_product linalg_inv linalg_inv_ex linalg_lstsq linalg_lu
    linalg_lu_factor linalg_lu_solve linalg_matrix_exp linalg_matrix_rank linalg_pinv linalg_qr
    linalg_slogdet linalg_solve linalg_solve_triangular linalg_svd linalg_svdvals linalg_tensorinv
    linalg_tensorsolve
    fft_fft fft_fft2 fft_fftn fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ihfft fft_irfft fft_irfft2
    fft_irfftn fft_rfft fft_rfft2 fft_rfftn
""")  # the second group: few devices have 16-bit kernels for these, and torch's CPU lists have them

# Those of them whose own 16-bit kernels compute in FP32 inside: nothing to cast where 16 bits are written.
WIDE_INSIDE = frozenset(_names("layer_norm group_norm softmax log_softmax"))

# Normalisations that read the activation in its own dtype and all else (affine pair, statistics) in FP32.
MIXED = _names("batch_norm instance_norm")

# Writes into a tensor that is there already, a buffer mostly: what is written takes its dtype.
INTO = _names("""
    index_copy_ index_add_ index_put_ scatter_.src scatter_add_ masked_scatter_ lerp_.Scalar lerp_.Tensor
""")

# Dot products (rule 1): operands read in the low format, FP32 accumulator, one rounding at the end.
DOTS = _names("""
    linear matmul mm bmm addmm addbmm baddbmm mv addmv addr linalg_vecdot
    conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding conv_tbc
    conv_transpose1d conv_transpose2d.input conv_transpose3d.input
    convolution _convolution _convolution.deprecated
""")

# Made of dot products: operands are lowered here, the parts follow the policy one by one.
COMPOSITE_DOTS = _names("""
    einsum chain_matmul linalg_multi_dot lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
""")

# Recurrent layers: one fused operation to the dispatcher, a chain of dot products over time to us.
RECURRENT = _names("""
    lstm.input lstm.data gru.input gru.data
    rnn_tanh.input rnn_tanh.data rnn_relu.input rnn_relu.data
""")

# Operands of several dtypes: the widest wins.
PROMOTE = _names("""
    addcdiv addcmul atan2 bilinear cross dot vdot index_put scatter_add tensordot
    embedding_bag embedding_bag.padding_idx
""")


def overload(name: str) -> torch._ops.OpOverload | None:
    """The aten overload called ``name`` (``"softmax.int"``), or None where this torch has not got it."""
    packet, _, over = name.partition(".")
    found = getattr(torch.ops.aten, packet, None)
    return None if found is None else getattr(found, over or "default", None)
