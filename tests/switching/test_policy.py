"""The op policy against torch: its registrations for CUDA autocast, and the lists it tests them with."""

import sys
import types

import pytest
import torch
from torch import nn

import halfstep
from halfstep.errors import RecipeError, SwitchError
from halfstep.recipe import OpClass, policies
from halfstep.recipe.policies import LOSSES
from halfstep.switching.edits import overload
from halfstep.switching.region import current
from twins import on

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}

# What torch registers for CUDA autocast and the tables do not name, and why.
NOT_IN_THE_TABLES = {
    "cudnn_convolution": "a CUDA kernel's own name: torch registers it where it exists",
    "cudnn_convolution_transpose": "likewise",
    "_thnn_fused_lstm_cell": "likewise",
    "_thnn_fused_gru_cell": "likewise",
    "_scaled_dot_product_flash_attention": "likewise",
    "prelu": "torch's CPU autocast lowers it too",
    "grid_sampler": "promoted by CUDA autocast, FP32 in CPU autocast",
    "binary_cross_entropy": "CUDA autocast refuses it, CPU autocast computes it in FP32, which is safe",
}
# Cases of torch's lists that cannot run here, and why.
CANNOT_RUN = {
    "cudnn_convolution": "CUDA only",
    "cudnn_convolution_transpose": "CUDA only",
}


def registered(key):
    return {
        name.removeprefix("aten::")
        for name in torch._C._dispatch_get_registrations_for_dispatch_key(key)
    }


AMP = policies()["amp"]


@pytest.mark.parametrize("kind", OpClass)
def test_every_name_is_an_operation_of_this_torch(kind):
    assert [name for name in AMP.names(kind) if overload(name) is None] == []


def test_the_table_covers_cuda_autocast():
    """An operation that a new torch adds to its lists must be put into a class, or its absence explained."""
    missing = registered("AutocastCUDA") - {name for name, _ in AMP.classes}
    assert missing == set(NOT_IN_THE_TABLES)


def test_what_the_tables_leave_to_torch_it_does_on_both_devices():
    for name in [*LOSSES, "prelu", "grid_sampler"]:
        assert name in registered("AutocastCUDA"), name


def torch_lists():
    """torch's own test lists; the module wants a package for golden files that is not installed here."""
    stub = types.ModuleType("expecttest")
    stub.TestCase = object  # type: ignore[attr-defined]
    known = sys.modules.get("expecttest")
    sys.modules.setdefault("expecttest", stub)
    try:
        from torch.testing._internal.autocast_test_lists import AutocastTestLists
    finally:
        if known is None:
            del sys.modules["expecttest"]
    torch.manual_seed(0)
    return AutocastTestLists("cpu")


LISTS = torch_lists()
WANTED = {
    "torch_fp16": "low",
    "nn_fp16": "low",
    "linalg_fp16": "low",
    "methods_fp16": "low",
    "torch_fp32": "fp32",
    "nn_fp32": "fp32",
    "methods_fp32": "fp32",
    "torch_need_autocast_promote": "fp32",  # their operands are one of each
    "torch_expect_builtin_promote": "own",
    "methods_expect_builtin_promote": "own",
}
CASES = [
    pytest.param(kind, case, id=f"{kind}-{case[0]}")
    for kind in WANTED
    for case in getattr(LISTS, kind)
    if case[0] not in CANNOT_RUN
]


def callee(kind, name, first):
    if kind.startswith("methods"):
        return lambda *rest, **kw: getattr(first, name)(*rest[1:], **kw)
    for place in (torch, torch._C._nn, torch.linalg, torch.Tensor):
        found = getattr(
            place, name.removeprefix("linalg_") if place is torch.linalg else name, None
        )
        if found is not None:
            return found
    raise AssertionError(name)


def with_low(value, low):
    if isinstance(value, torch.Tensor):
        return value.to(low) if value.dtype == torch.float16 else value
    if isinstance(value, (tuple, list)):
        return type(value)(with_low(v, low) for v in value)
    return value


class InRegion(nn.Module):
    """Runs a function in its forward, and gives what it gave by the back door: outputs leave in FP32."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, function):
        assert current() is not None
        self.found = function()


def in_region(recipe, function):
    model = InRegion()
    on(model, recipe)
    model(function)
    return model.found


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
@pytest.mark.filterwarnings("ignore:Using torch.cross without specifying the dim")
@pytest.mark.parametrize("recipe", LOW)
@pytest.mark.parametrize("kind, case", CASES)
def test_each_operation_of_torchs_lists_gives_the_dtype_it_should(recipe, kind, case):
    low = LOW[recipe]
    name, args = case[0], with_low(case[1], low)
    more = case[2] if len(case) > 2 and isinstance(case[2], dict) else {}
    if (
        name == "einsum"
    ):  # the equation stands among the operands in torch's list, which never ran it
        args = ("bk,kq->bq", torch.randn(8, 8), torch.randn(8, 8))
    wanted = {"low": low, "fp32": torch.float32, "own": case[2] if len(case) > 2 else None}
    out = in_region(recipe, lambda: callee(kind, name, args[0])(*args, **more))
    out = out[0] if isinstance(out, (tuple, list)) else out
    if isinstance(out, bool):  # torch.equal
        return
    assert out.dtype == wanted[WANTED[kind]]


@pytest.mark.parametrize("recipe", LOW)
@pytest.mark.parametrize("operands", ["both 16 bits", "both fp32"])
def test_promoted_operations_keep_operands_of_one_dtype(recipe, operands):
    dtype = LOW[recipe] if operands == "both 16 bits" else torch.float32
    a, b = torch.randn(6).to(dtype), torch.randn(6).to(dtype)
    for function in (torch.dot, torch.vdot, torch.atan2):
        assert in_region(recipe, lambda f=function: f(a, b)).dtype == dtype


@pytest.mark.parametrize("recipe", LOW)
def test_wide_operations_compute_in_fp32(recipe):
    """Not only is the result FP32: nothing inside was rounded to 16 bits."""
    low = LOW[recipe]
    x = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(low)
    wide = x.float()
    for function in (
        torch.exp,
        torch.sum,
        torch.logsumexp,
        torch.cumsum,
        torch.softmax,
        torch.norm,
        torch.rsqrt,
    ):
        axis = (0,) if function in (torch.logsumexp, torch.cumsum, torch.softmax) else ()
        low_in = x.abs() if function is torch.rsqrt else x
        wide_in = wide.abs() if function is torch.rsqrt else wide
        expected = function(wide_in, *axis)
        assert torch.equal(
            in_region(recipe, lambda f=function, a=axis, v=low_in: f(v, *a)), expected
        )


@pytest.mark.parametrize("recipe", LOW)
def test_layer_norm_and_batch_norm(recipe):
    low = LOW[recipe]
    x = torch.randn(4, 8).to(low)
    one, zero = torch.ones(8), torch.zeros(8)
    norm = torch.nn.functional.layer_norm
    assert (
        in_region(recipe, lambda: norm(x, (8,), one.to(low), zero.to(low))).dtype == torch.float32
    )
    batch = torch.nn.functional.batch_norm
    found = in_region(
        recipe, lambda: batch(x, zero.clone(), one.clone(), one.to(low), zero.to(low), True)
    )
    assert found.dtype == low


def test_an_edited_policy_is_what_runs():
    """softplus out of the FP32 class, tanh into it, a product in FP32; torch's own again afterwards."""
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(3)).half()
    functions = {
        "softplus": torch.nn.functional.softplus,
        "tanh": torch.tanh,
        "mm": lambda t: torch.mm(t, t),
    }
    edited = "fp16:policy=amp/mm-fp32/softplus-own/tanh-fp32"
    for recipe, wanted in (
        ("fp16", (torch.float32, torch.float16, torch.float16)),
        (edited, (torch.float16, torch.float32, torch.float32)),
        ("fp16", (torch.float32, torch.float16, torch.float16)),
    ):
        for function, dtype in zip(functions.values(), wanted, strict=True):
            assert in_region(recipe, lambda f=function: f(x)).dtype == dtype
    assert torch.equal(in_region(edited, lambda: torch.mm(x, x)), x.float() @ x.float())


def test_a_name_without_overload_is_all_of_its_overloads():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(3)).half()
    assert in_region("fp16", lambda: x.softmax(-1)).dtype == torch.float32
    assert in_region("fp16:policy=amp/softmax-own", lambda: x.softmax(-1)).dtype == torch.float16
    for function in (lambda: x * x, lambda: x * 3):
        assert in_region("fp16", function).dtype == torch.float16
        assert in_region("fp16:policy=amp/mul-fp32", function).dtype == torch.float32
    assert in_region("fp16:policy=amp/mul-fp32", lambda: x + x).dtype == torch.float16


@pytest.mark.parametrize("start", [halfstep.emulate, lambda recipe: on(InRegion(), recipe)])
def test_an_edit_of_what_is_no_operation_is_an_error(start):
    with pytest.raises(RecipeError, match="no operation 'softpluss'; did you mean softplus"):
        start("fp16:policy=amp/softpluss-fp32")


def test_emulation_refuses_edits_of_what_it_sees_in_parts():
    with pytest.raises(SwitchError, match="emulate sees what linear is made of"):
        halfstep.emulate("fp16:policy=amp/linear-fp32")
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    with halfstep.emulate("fp16:policy=amp/addmm-fp32/softmax-own") as _:
        y = torch.nn.functional.linear(x, x, x[0])
        z = torch.relu(x @ x).softmax(-1)
    assert not torch.equal(y, y.half().float())
    assert torch.equal(z, z.half().float())


def test_two_policies_side_by_side():
    x = torch.randn(8).half()
    plain, edited = InRegion(), InRegion()
    on(plain, "fp16")
    on(edited, "fp16:policy=amp/exp-own")
    for _ in range(2):
        plain(lambda: torch.exp(x))
        edited(lambda: torch.exp(x))
        assert plain.found.dtype == torch.float32
        assert edited.found.dtype == torch.float16


def test_what_is_left_to_torch_can_be_edited_too():
    x, y = torch.randn(8).half(), torch.randn(8).half()
    loss = torch.nn.functional.mse_loss
    assert in_region("fp16", lambda: loss(x, y)).dtype == torch.float32
    assert in_region("fp16:policy=amp/mse_loss-own", lambda: loss(x, y)).dtype == torch.float16


# Operations of which torch has no 16-bit kernels, or that refuse to narrow.
FP32_ONLY = {
    "pinv": torch.linalg.pinv,
    "matrix_rank": lambda h: h * torch.linalg.matrix_rank(h),
    "vander": lambda h: torch.linalg.vander(h[0]),
    "complex": lambda h: torch.complex(h, h).abs(),
    "erfcx": torch.special.erfcx,
    "i1": torch.special.i1,
    "zeta": lambda h: h * torch.special.zeta(h.detach().abs() + 2.0, 1.5),
    "hermite": lambda h: h * torch.special.hermite_polynomial_h(h.detach(), 2),
    "hfft2": torch.fft.hfft2,
    "rrelu": lambda h: torch.nn.functional.rrelu(h, training=True),
    "vector_norm": lambda h: torch.linalg.vector_norm(h, dim=1, dtype=h.dtype),
    "norm": lambda h: torch.norm(h, dim=1, dtype=h.dtype),
    "logcumsumexp": lambda h: h.logcumsumexp(1),
    "sparse": lambda h: torch.sparse.mm(torch.eye(4).to_sparse(), h),
    "sparse @": lambda h: torch.eye(4).to_sparse() @ h,
    "csr": lambda h: torch.sparse.mm(torch.eye(4).to_sparse_csr(), h),
    "no sum": lambda h: h.sum(1, keepdim=True) + h[:, :0] @ h[:, :0].t(),
}


class Through(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.first(x))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("recipe", ["fp16", "bf16", "fp8"])
@pytest.mark.parametrize("name", FP32_ONLY)
def test_what_16_bits_have_no_kernel_for_is_computed_in_fp32(name, recipe):
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    found = []
    for switched in (False, True):
        model = Through(FP32_ONLY[name])
        if switched:
            on(model, recipe)
        torch.manual_seed(5)
        out = model(x).float()
        (out * 1e-3).mean().backward()
        found.append((out.detach(), model.first.weight.grad))
    for wide, low in zip(*found, strict=True):
        assert torch.nn.functional.cosine_similarity(wide.flatten(), low.flatten(), 0) > 0.97


@pytest.mark.parametrize("recipe", ["fp16", "bf16"])
def test_transforms_of_torch_func_inside_a_model(recipe):
    def per_row(model, h):
        return torch.vmap(lambda row: torch.tanh(model.first(row)))(h)

    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    plain, switched = Through(None), Through(None)
    switched.function = lambda h: per_row(switched, h)
    on(switched, recipe)
    switched(x).square().mean().backward()
    per_row(plain, plain.first(x)).square().mean().backward()
    mine, other = switched.first.weight.grad, plain.first.weight.grad
    assert (mine - other).norm() < 0.02 * other.norm()


def test_transforms_of_torch_func_are_refused_where_operands_are_rounded_by_role():
    model = Through(lambda h: torch.func.jacrev(lambda t: t @ t)(h))
    on(model, "fp8")
    with pytest.raises(SwitchError, match="under a transform of"):
        model(torch.ones(4, 4))


@pytest.mark.parametrize("recipe", ["fp16", "fp8", "mxfp8"])
def test_an_empty_batch_goes_through(recipe):
    model = Through(torch.nn.Identity())
    on(model, recipe)
    model(torch.zeros(0, 4)).sum().backward()
    assert model.first.weight.grad.count_nonzero() == 0
