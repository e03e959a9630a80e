"""Point-wise operations under emulation give what torch's own 16-bit kernels give, bit for bit.

torch's table of operations (op_db) supplies them with sample inputs; each is run on these, on numbers
from all over the format, and on its edges, forward and backward.
"""

import itertools
import sys
import types

import pytest
import torch

import halfstep

LOW = {"fp16": torch.float16, "bf16": torch.bfloat16}

# Operations whose results differ, and why.
EXCEPTIONS = {
    "ldexp": "torch makes FP32 powers of two of integers, which no operand of 16 bits has met",
    "float_power": "gives FP64 by definition; here it is of the format, as every tensor of `paper` is",
    "signbit": "of NaN: torch's conversion to 16 bits drops a NaN's sign",
}
# Operations of which no sample can be compared: single numbers are wide here, or torch has no such kernel.
NOT_COMPARED = {
    "equal",
    "max.reduction_no_dim",
    "min.reduction_no_dim",
    "special.i1",
    "special.i1e",
}


def op_db():
    """torch's table; the module wants a package for golden files that is not installed here."""
    stub = types.ModuleType("expecttest")
    stub.TestCase = object
    known = sys.modules.get("expecttest")
    sys.modules.setdefault("expecttest", stub)
    try:
        from torch.testing._internal.common_methods_invocations import op_db as table
    finally:
        if known is None:
            del sys.modules["expecttest"]
    return table


def is_pointwise(info):
    packet = getattr(torch.ops.aten, info.aten_name or info.name, None)
    if packet is None:
        return False
    return any(torch.Tag.pointwise in getattr(packet, name).tags for name in packet.overloads())


POINTWISE = {}
for info in op_db():
    if is_pointwise(info) and {torch.float16, torch.bfloat16} & info.supported_dtypes("cpu"):
        POINTWISE[f"{info.name}.{info.variant_test_name}".rstrip(".")] = info


def edges(shape, low, seed):
    """Numbers of the format from all over it: tiny, huge, zeros of both signs, infinite, NaN."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int32)
    return bits.to(torch.int16).view(low)


def variants(info, low, count):
    """Sample inputs of the format, then the same shapes with edges in their first tensor."""
    samples = []
    given = info.sample_inputs("cpu", low, requires_grad=False)
    sized = (s for s in given if not isinstance(s.input, torch.Tensor) or s.input.dim())
    for k, sample in enumerate(itertools.islice(sized, count)):
        samples.append(sample)
        if isinstance(sample.input, torch.Tensor) and sample.input.dtype == low:
            changed = sample.transform(lambda t: t)
            changed.input = edges(sample.input.shape, low, k)
            samples.append(changed)
    return samples


def outcome(info, sample, carrier, low, grad):
    """Results and gradients of one call, carried in FP32."""

    def carried(t):
        if isinstance(t, torch.Tensor) and t.dtype in LOW.values():
            t = t.to(carrier).detach()
            if grad:
                t.requires_grad_()
            leaves.append(t)
        return t

    leaves = []
    sample = sample.transform(carried)
    out = info(sample.input, *sample.args, **sample.kwargs)
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    found = [t.detach() if isinstance(t, torch.Tensor) else t for t in outs]
    if grad:
        roots = [t for t in outs if isinstance(t, torch.Tensor) and t.requires_grad and t.dim()]
        if roots:
            seeds = [edges(t.shape, low, 7).nan_to_num(1.0, 1.0, 1.0) for t in roots]
            seeds = [s.to(t.dtype) for s, t in zip(seeds, roots, strict=True)]
            found += torch.autograd.grad(roots, leaves, seeds, allow_unused=True)
    return [
        t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in found
    ]


def compare(name, recipe, count, grad):
    """On how many results the two differ, and how many there were; single numbers are wide here."""
    info, low = POINTWISE[name], LOW[recipe]
    text = f"{recipe}-naive" if recipe == "fp16" else "bf16:policy=paper,master=bf16,optimizer=bf16"
    different = compared = 0
    for sample in variants(info, low, count):
        try:
            with torch.random.fork_rng():
                wanted = outcome(info, sample, low, low, grad)
        except (RuntimeError, NotImplementedError):
            continue  # torch has no such kernel
        with halfstep.emulate(text), torch.random.fork_rng():
            got = outcome(info, sample, torch.float32, low, grad)
        for a, b in zip(wanted, got, strict=True):
            if not isinstance(a, torch.Tensor) or not a.dim() or a.is_complex():
                continue
            compared += 1
            if not torch.equal(torch.nan_to_num(a, 3.0), torch.nan_to_num(b, 3.0)):
                different += 1
    return different, compared


def check(name, recipe, count):
    total = 0
    for grad in (False, True) if POINTWISE[name].supports_autograd else (False,):
        different, compared = compare(name, recipe, count, grad)
        assert different == 0 or name in EXCEPTIONS, f"{different} of {compared} differ"
        total += compared
    assert total or name in NOT_COMPARED


SOME = ["add", "div.no_rounding_mode", "sqrt", "sigmoid", "where", "clamp", "atan2"]


@pytest.mark.parametrize("recipe", LOW)
@pytest.mark.parametrize("name", SOME)
@pytest.mark.filterwarnings("ignore")  # torch's own, on odd inputs
def test_some_pointwise_operations_are_torchs_own(name, recipe):
    check(name, recipe, 1)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", LOW)
@pytest.mark.parametrize("name", sorted(POINTWISE))
@pytest.mark.filterwarnings("ignore")
def test_all_pointwise_operations_are_torchs_own(name, recipe):
    check(name, recipe, 4)


def test_the_table_is_there():
    assert len(POINTWISE) > 120 and POINTWISE.keys() >= EXCEPTIONS.keys() | NOT_COMPARED


@pytest.mark.parametrize("recipe", ["fp16-naive", "bf16-pure"])
def test_results_written_into_a_given_tensor_are_the_same(recipe):
    low = LOW[recipe.partition("-")[0]]
    a, b = edges((64,), low, 1), edges((64,), low, 2)
    with halfstep.emulate(recipe):
        x, y = a.float(), b.float()
        found = torch.add(x, y, alpha=0.3, out=torch.empty_like(x))
        grown = torch.sub(x, y, alpha=0.3, out=torch.empty_like(x[:0]))
    for out, wanted in ((found, torch.add(a, b, alpha=0.3)), (grown, torch.sub(a, b, alpha=0.3))):
        assert torch.equal(out.nan_to_num(7.0), wanted.float().nan_to_num(7.0))


def test_what_writes_noise_beside_its_result_is_rounded():
    with halfstep.emulate("fp16-naive"):
        x = -torch.linspace(1.0, 999.0, 31).mul(1.0)
        found = [torch.nn.functional.rrelu(x, 0.1, 0.3, training) for training in (False, True)]
    for y in found:
        assert torch.equal(y, y.half().float())
