"""The two op policies: which class each operation is of. torch's CUDA autocast lists, for every device.

torch's CPU autocast leaves 34 of these operations in 16 bits; here one table holds on every device, and
``tests/switching/test_policy.py`` holds it against the lists that ship with torch. Names are aten overloads
(``softmax.int``); what is in no class keeps the dtype that it is given.

Source: https://docs.pytorch.org/docs/stable/amp.html (operation-specific behaviour), ATen/autocast_mode.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from halfstep.recipe.op_policy import OpClass, OpPolicy

__all__ = ["AMP", "LOSSES", "PAPER", "policies"]

_WIDE = """
    acos asin cosh erfinv exp expm1 log log10 log1p log2 reciprocal rsqrt sinh tan
    pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor softplus
    layer_norm native_layer_norm group_norm rms_norm cosine_similarity
    cumprod cumsum logcumsumexp dist pdist cdist renorm logsumexp softmax.int log_softmax.int
    sum sum.dim_IntList prod prod.dim_int
    norm.Scalar norm.ScalarOpt_dim nuclear_norm nuclear_norm.dim frobenius_norm.dim
    linalg_vector_norm linalg_matrix_norm linalg_matrix_norm.str_ord
    upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa
"""

# Few devices have 16-bit kernels for these, and torch's CPU lists have them.
_WIDE_ALGEBRA = """
    cholesky cholesky_inverse cholesky_solve det inverse logdet lu_solve matrix_exp orgqr ormqr pinverse
    polar qr slogdet stft stft.center svd trace triangular_solve view_as_complex
    linalg_cholesky linalg_cholesky_ex linalg_cond linalg_det linalg_eig linalg_eigh linalg_eigvals
    linalg_eigvalsh linalg_householder_product linalg_inv linalg_inv_ex linalg_lstsq linalg_lu
    linalg_lu_factor linalg_lu_solve linalg_matrix_exp linalg_matrix_rank linalg_pinv linalg_qr
    linalg_slogdet linalg_solve linalg_solve_triangular linalg_svd linalg_svdvals linalg_tensorinv
    linalg_tensorsolve
    linalg_pinv.atol_rtol_float linalg_pinv.atol_rtol_tensor linalg_pinv.rcond_tensor
    linalg_matrix_rank.atol_rtol_float linalg_matrix_rank.atol_rtol_tensor linalg_matrix_rank.tol_tensor
    linalg_ldl_factor linalg_ldl_factor_ex linalg_ldl_solve linalg_lu_factor_ex linalg_solve_ex linalg_vander
    complex fft_hfft2 fft_hfftn fft_ihfft2 fft_ihfftn
    _sparse_mm _sparse_mm.reduce sparse_sampled_addmm
    fft_fft fft_fft2 fft_fftn fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ihfft fft_irfft fft_irfft2
    fft_irfftn fft_rfft fft_rfft2 fft_rfftn
"""

# No 16-bit kernels on any device, forward or backward.
_SPECIAL = """
    airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 erfcx i1 i1e log_ndtr modified_bessel_i0
    modified_bessel_i1 modified_bessel_k0 modified_bessel_k1 ndtri scaled_modified_bessel_k0
    scaled_modified_bessel_k1 spherical_bessel_j0 zeta zeta.self_scalar zeta.other_scalar
"""
_POLYNOMIALS = """
    chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w
    shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v
    shifted_chebyshev_polynomial_w hermite_polynomial_h hermite_polynomial_he laguerre_polynomial_l
    legendre_polynomial_p
"""
_SPECIAL_FUNCTIONS = " ".join(
    f"special_{name}"
    for name in (
        *_SPECIAL.split(),
        *(f"{p}{n}" for p in _POLYNOMIALS.split() for n in ("", ".x_scalar", ".n_scalar")),
    )
)

# As above, where torch does it itself on every device.
_LOSSES = """
    binary_cross_entropy_with_logits cosine_embedding_loss hinge_embedding_loss huber_loss kl_div l1_loss
    margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss nll_loss nll_loss2d
    poisson_nll_loss smooth_l1_loss soft_margin_loss triplet_margin_loss
"""
LOSSES = tuple(_LOSSES.split())

_INTO = """
    index_copy_ index_add_ index_put_ scatter_.src scatter_add_ masked_scatter_ lerp_.Scalar lerp_.Tensor
"""

_DOTS = """
    linear matmul mm bmm addmm addbmm baddbmm mv addmv addr linalg_vecdot
    conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding conv_tbc
    conv_transpose1d conv_transpose2d.input conv_transpose3d.input
    convolution _convolution _convolution.deprecated
    scaled_dot_product_attention
"""

_COMPOSITE_DOTS = """
    einsum chain_matmul linalg_multi_dot lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
"""

_RECURRENT = """
    lstm.input lstm.data gru.input gru.data
    rnn_tanh.input rnn_tanh.data rnn_relu.input rnn_relu.data
"""

_PROMOTED = """
    addcdiv addcmul atan2 bilinear cross dot vdot index_put scatter_add tensordot
    embedding_bag embedding_bag.padding_idx
"""

_TABLE = {
    OpClass.DOT: _DOTS,
    OpClass.DOTS: _COMPOSITE_DOTS,
    OpClass.RECURRENT: _RECURRENT,
    OpClass.WIDE: _WIDE + _WIDE_ALGEBRA + _SPECIAL_FUNCTIONS + _LOSSES,
    OpClass.MIXED: "batch_norm instance_norm",
    OpClass.INTO: _INTO,
    OpClass.WIDEST: _PROMOTED,
}

AMP = OpPolicy(
    base="amp",
    classes=tuple(sorted((op, kind) for kind, text in _TABLE.items() for op in text.split())),
    store_all=False,
    summary="FP32 operations write FP32, as torch's CUDA autocast does",
    source="torch.amp, CUDA op-specific behaviour; the default: docs/decisions/0031",
)

PAPER = AMP.replace(
    base="paper",
    store_all=True,
    summary="every tensor of the region is written in the store format",
    source="Micikevicius et al., Mixed Precision Training, arXiv 1710.03740, section 3",
)

_POLICIES: Mapping[str, OpPolicy] = MappingProxyType({"amp": AMP, "paper": PAPER})


def policies() -> Mapping[str, OpPolicy]:
    """The built-in op policies by name.

    >>> [str(policy) for policy in policies().values()]
    ['amp', 'paper']
    """
    return _POLICIES
