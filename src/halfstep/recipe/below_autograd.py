"""The op policy for what a program is made of below autograd: forward, backward and optimizer.

A policy names operations as a program calls them (``softmax.int``, ``layer_norm``). Below autograd they have
other names (``_softmax``, ``native_layer_norm_backward``, ``_foreach_add_``); here is which of the policy's
operations each is a part of, and what moves numbers without computing any. What torch says of its operations
itself (it is point-wise, a view, a reduction, it draws random numbers) comes as `Traits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache

from halfstep.recipe.op_policy import OpClass, OpPolicy

__all__ = ["SEEN_BY_PARTS", "WIDE_OUTPUTS", "Traits", "Treatment", "is_wide_node", "treatment"]


class Treatment(Enum):
    """What an emulator does with an operation; finer than `OpClass`, since it sees every one."""

    VIEW = "view"
    FREE = "exact"
    MOVE = "move"
    MAKE = "make"
    CAST = "cast"
    RANDOM = "random"
    DOT = "dot"
    LOOK_UP = "look up"
    NORM = "normalisation"
    WIDE = "fp32"
    SUM = "reduction"
    OWN = "own"
    UNKNOWN = "unknown"

    @property
    def why(self) -> str:
        """What is done, in one line."""
        return _WHY[self]


_WHY = {
    Treatment.VIEW: "another look at the same numbers",
    Treatment.FREE: "reads numbers and writes none",
    Treatment.MOVE: "copies numbers; finite ones that are filled in saturate",
    Treatment.MAKE: "makes a tensor of numbers; rounded where it is read",
    Treatment.CAST: "a change of dtype that the program asks for",
    Treatment.RANDOM: "drawn in FP32, then rounded",
    Treatment.DOT: "operands rounded to their roles' formats, one sum, one rounding",
    Treatment.LOOK_UP: "rows of a table, rounded as the table is",
    Treatment.NORM: "statistics and affine pair in FP32, the result rounded",
    Treatment.WIDE: "computed in FP32; written as the policy says",
    Treatment.SUM: "added in FP32, rounded once; a single number stays wide",
    Treatment.OWN: "computed in the format of its operands, FP32 inside, rounded once",
    Treatment.UNKNOWN: "in no list: computed in FP32, rounded once",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What torch's own schema and tags say of an operation."""

    view: bool
    pointwise: bool
    reduction: bool
    random: bool
    makes: bool
    """It gives a tensor and takes none."""
    gives_tensors: bool


# Reads numbers, or is bookkeeping: there is nothing to round.
_FREE = """
    _local_scalar_dense item is_nonzero equal record_stream size stride numel
    _amp_foreach_non_finite_check_and_unscale _amp_update_scale _assert_async _functional_assert_async
    allclose is_same_size _nested_tensor_size _pin_memory pin_memory _resize_output resize
    resize_as set set_data _version requires_grad retain_grad rename _fw_primal _make_dual
    _sparse_coo_tensor_with_dims_and_tensors _sparse_coo_tensor_with_dims _indices _values _coalesced
    _coalesce coalesce _nnz sparse_dim dense_dim sparse_mask crow_indices
    argmax argmin argsort nonzero bucketize searchsorted multinomial bincount count_nonzero histc
    isnan isinf isfinite isclose any all unique_dim _unique _unique2 unique_consecutive
    _standard_gamma_grad _dirichlet_grad isin hash_tensor nonzero_static _is_all_true _is_any_true
"""

# Copies of numbers that are there, and constants; comparisons are point-wise and give no numbers.
_MOVES = """
    clone copy _to_dense contiguous cat _cat stack _stack index index_select gather take take_along_dim
    masked_select flip roll rot90 repeat repeat_interleave constant_pad_nd tril triu diag diag_embed
    block_diag
    sort topk kthvalue cummax cummin max min amax amin aminmax median nanmedian mode
    slice_scatter select_scatter diagonal_scatter as_strided_scatter slice_backward select_backward
    diagonal_backward index_copy index_put _index_put_impl index_fill scatter masked_scatter masked_fill
    where fill zero put set_ _unsafe_index _unsafe_index_put
    max_pool1d max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d mkldnn_max_pool3d
    adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d max_unpool2d
    max_unpool3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d pixel_shuffle pixel_unshuffle channel_shuffle im2col unsafe_split
    unsafe_split_with_sizes _lazy_clone lift positive relu neg complex real imag _conj_physical
    _pack_padded_sequence _copy_from _copy_from_and_resize _chunk_cat _to_sparse lu_unpack
    abs sign _aminmax _cummax_helper _cummin_helper
"""

# Several tables of numbers, to be read by number.
_LOOK_UPS = "embedding"

_DOTS = """
    mm addmm bmm baddbmm addbmm mv addmv addr ger dot vdot linear matmul _addmm_activation
    convolution _convolution convolution_overrideable mkldnn_convolution cudnn_convolution
    cudnn_convolution_transpose miopen_convolution _slow_conv2d_forward _conv_depthwise2d conv_depthwise3d
    slow_conv3d_forward slow_conv_dilated2d slow_conv_dilated3d slow_conv_transpose2d slow_conv_transpose3d
    conv_tbc convolution_backward linear_backward matmul_backward mkldnn_linear mkldnn_linear_backward
    mkldnn_linear_backward_input mkldnn_linear_backward_weights _grouped_mm _trilinear linalg_vecdot
    bilinear einsum tensordot
"""

_NORMS = """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update
    _batch_norm_no_update native_batch_norm_backward batch_norm_backward cudnn_batch_norm
    cudnn_batch_norm_backward miopen_batch_norm miopen_batch_norm_backward _batch_norm_with_update_functional
    _native_batch_norm_legit_functional batch_norm_elemt batch_norm_stats batch_norm_gather_stats
    batch_norm_gather_stats_with_counts batch_norm_backward_reduce batch_norm_backward_elemt
    batch_norm_update_stats
"""

# Parts of the policy's operations that are called otherwise.
_PART_OF = {
    "_softmax": "softmax.int",
    "_safe_softmax": "softmax.int",
    "_log_softmax": "log_softmax.int",
    "_softmax_backward_data": "softmax.int",
    "_log_softmax_backward_data": "log_softmax.int",
    "_masked_softmax": "softmax.int",
    "_fused_rms_norm": "rms_norm",
    "_fused_rms_norm_backward": "rms_norm",
    "native_layer_norm_backward": "layer_norm",
    "native_group_norm": "group_norm",
    "native_group_norm_backward": "group_norm",
    "_weight_norm_interface": "layer_norm",
    "_weight_norm_interface_backward": "layer_norm",
    "_ctc_loss": "nll_loss",
    "_ctc_loss_backward": "nll_loss",
    "nll_loss_forward": "nll_loss",
    "nll_loss_backward": "nll_loss",
    "nll_loss2d_forward": "nll_loss",
    "nll_loss2d_backward": "nll_loss",
    "binary_cross_entropy": "nll_loss",
    "binary_cross_entropy_backward": "nll_loss",
    "multilabel_margin_loss_forward": "multilabel_margin_loss",
    "_logcumsumexp": "logcumsumexp",
    "_cdist_forward": "cdist",
    "_euclidean_dist": "cdist",
    "_trilinear": "bilinear",
    "_pdist_forward": "pdist",
    "_pdist_backward": "pdist",
    "_cdist_backward": "cdist",
    "linalg_vector_norm": "linalg_vector_norm",
    "grid_sampler_2d": "nll_loss",
    "grid_sampler_3d": "nll_loss",
    "grid_sampler_2d_backward": "nll_loss",
    "grid_sampler_3d_backward": "nll_loss",
    "norm": "norm.Scalar",
    "_linalg_det": "linalg_det",
    "_linalg_slogdet": "linalg_slogdet",
    "_linalg_eigh": "linalg_eigh",
    "_linalg_eigvals": "linalg_eigvals",
    "_linalg_solve_ex": "linalg_solve",
    "_linalg_svd": "linalg_svd",
    "_cholesky_solve_helper": "cholesky_solve",
    "geqrf": "linalg_qr",
    "linalg_lu_factor_ex": "linalg_lu_factor",
    "linalg_ldl_factor_ex": "linalg_lu_factor",
    "linalg_ldl_solve": "linalg_solve",
    "_fft_r2c": "fft_fft",
    "_fft_c2r": "fft_fft",
    "_fft_c2c": "fft_fft",
    "log_sigmoid_forward": "",
    "log_sigmoid_backward": "",
}

# Operations of a policy that are known below autograd by their parts.
SEEN_BY_PARTS = frozenset(_PART_OF.values())

# Computed in the format of their operands, as point-wise operations are.
_OWN = """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d mkldnn_adaptive_avg_pool2d
    avg_pool2d_backward avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward
    max_pool2d_with_indices_backward max_pool3d_with_indices_backward mkldnn_max_pool2d_backward
    adaptive_max_pool2d_backward adaptive_max_pool3d_backward adaptive_avg_pool3d_backward
    embedding_dense_backward _embedding_bag _embedding_bag_forward_only _embedding_bag_backward
    _embedding_bag_dense_backward _embedding_bag_per_sample_weights_backward embedding_renorm
    reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward
    replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward
    index_add scatter_add scatter_reduce index_reduce col2im unfold_backward masked_scatter_backward
    native_dropout_backward _masked_scale _fused_dropout _prelu_kernel _prelu_kernel_backward
    _thnn_fused_lstm_cell _thnn_fused_lstm_cell_backward_impl _thnn_fused_gru_cell
    _thnn_fused_gru_cell_backward rrelu_with_noise_backward glu_jvp glu_backward_jvp
    _unsafe_masked_index _unsafe_masked_index_put_accumulate segment_reduce _segment_reduce_backward
    affine_grid_generator histogram dist polar view_as_complex view_as_real _fused_sgd _fused_adam
    _fused_adamw _fused_adagrad _add_relu cross linalg_cross
    threshold_backward gelu_backward elu_backward hardtanh_backward softplus_backward leaky_relu_backward
    hardswish_backward hardsigmoid_backward softshrink_backward hardshrink_backward glu glu_backward
    silu_backward mish_backward sigmoid_backward tanh_backward logit_backward
    add sub rsub mul div floor_divide remainder xlogy hardswish hardsigmoid hardtanh gelu elu celu mish
    leaky_relu threshold softshrink hardshrink max_pool2d_backward fractional_max_pool2d_backward
    fractional_max_pool3d_backward _histogramdd_bin_edges _histogramdd_from_bin_cts
    _histogramdd_from_bin_tensors
"""

# From numbers of a program, which may be single ones in tensors.
_MAKERS = frozenset(("scalar_tensor", "linspace", "logspace"))

_SUMS = (
    "mean nansum var var_mean std std_mean trace logsumexp norm native_norm sum prod cumsum cumprod"
)

# Statistics that a backward reads: FP32 as every GPU kernel keeps them, whatever the policy writes.
WIDE_OUTPUTS = {
    "native_layer_norm": (1, 2),
    "native_group_norm": (1, 2),
    "_fused_rms_norm": (1,),
    "nll_loss_forward": (1,),
    "nll_loss2d_forward": (1,),
}

_CASTS = "_to_copy _autocast_to_reduced_precision _autocast_to_full_precision to _conj_physical_"

_LISTS = {
    Treatment.FREE: _FREE,
    Treatment.LOOK_UP: _LOOK_UPS,
    Treatment.DOT: _DOTS,
    Treatment.NORM: _NORMS,
    Treatment.CAST: _CASTS,
    Treatment.MOVE: _MOVES,
    Treatment.OWN: _OWN,
    Treatment.SUM: _SUMS,
}
_KNOWN = {name: kind for kind, text in _LISTS.items() for name in text.split()}


def treatment(policy: OpPolicy, name: str, overload: str, traits: Traits) -> Treatment:
    """What ``policy`` has an emulator do with the aten operation ``name.overload``.

    >>> from halfstep.recipe import policies
    >>> plain = Traits(view=False, pointwise=False, reduction=False, random=False, makes=False,
    ...                gives_tensors=True)
    >>> [treatment(policies()["amp"], name, "default", plain).value
    ...  for name in ("convolution_backward", "_softmax", "native_layer_norm_backward", "news")]
    ['dot', 'fp32', 'fp32', 'unknown']
    """
    if traits.view or name in ("_unsafe_view", "_reshape_alias", "lift_fresh", "detach_"):
        return Treatment.VIEW
    if not traits.gives_tensors:
        return Treatment.FREE
    base = name.removeprefix("_foreach_")
    base = base if base.endswith("__") else base.removesuffix("_")
    known = _KNOWN.get(base)
    edited = _class_of(policy, base, overload)
    if edited is OpClass.WIDE or (edited is not None and known is None):
        return _BY_CLASS[edited]
    if known is Treatment.DOT and edited in (OpClass.OWN, OpClass.WIDEST):
        return Treatment.OWN
    if traits.random:
        return Treatment.RANDOM
    if traits.makes or base.startswith("new_") or base.endswith("_like") or base in _MAKERS:
        return Treatment.MAKE
    if known is not None:
        return known
    if base.endswith("_copy"):  # of a view: ``slice_copy`` and the like
        return Treatment.MOVE
    if traits.reduction:
        return Treatment.SUM
    if traits.pointwise or edited is OpClass.OWN or base != name.removesuffix("_"):
        return Treatment.OWN
    return Treatment.UNKNOWN


def is_wide_node(policy: OpPolicy, name: str) -> bool:
    """True for the autograd node (``LinalgInvExBackward0``) of what ``policy`` computes in FP32."""
    camel = name.partition("Backward")[0]
    base = "".join(f"_{c.lower()}" if c.isupper() else c for c in camel).removeprefix("_")
    return _class_of(policy, base, "default") is OpClass.WIDE


_BY_CLASS = {
    OpClass.DOT: Treatment.DOT,
    OpClass.DOTS: Treatment.DOT,
    OpClass.RECURRENT: Treatment.UNKNOWN,
    OpClass.WIDE: Treatment.WIDE,
    OpClass.MIXED: Treatment.NORM,
    OpClass.INTO: Treatment.OWN,
    OpClass.WIDEST: Treatment.OWN,
    OpClass.OWN: Treatment.OWN,
}


def _class_of(policy: OpPolicy, base: str, overload: str) -> OpClass | None:
    """The policy's class of the operation that this one is a part of; None where it names none."""
    part = _PART_OF.get(base)
    if part is not None:
        return policy.class_of(part) if part else OpClass.OWN
    table = _by_packet(policy)
    exact = dict(policy.classes).get(base if overload == "default" else f"{base}.{overload}")
    if exact is not None:
        return exact
    forward = base.removesuffix("_data").removesuffix("_backward").removesuffix("_forward")
    return table.get(base) or table.get(forward)


@cache
def _by_packet(policy: OpPolicy) -> dict[str, OpClass]:
    """Classes by name without overload: below autograd an operation has overloads of its own."""
    return {op.partition(".")[0].removesuffix("_"): kind for op, kind in policy.classes}
