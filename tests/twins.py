"""One program run in FP32 and under a recipe, from the same seed, and how far apart the two may be.

Every value of the region is rounded to the format once where it is written, with a relative error of at
most its unit (2**-8 for bf16, 2**-11 for fp16). A chain of k operations errs by k units to first order, in
norm; so do its gradients, which are such chains too. Each test says its k.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

import halfstep
from halfstep.switching import Switch

RECIPES = ("bf16", "fp16")
UNIT = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11}
# Not 1, so that a gradient that leaves scaled is wrong; small enough that nothing in these tests overflows.
SCALE = 256.0
_live: list[Switch] = []


def on(model: nn.Module, recipe: str, optimizer: Any = None) -> Switch:
    """``model`` switched to ``recipe``, at loss scale `SCALE` where the recipe has one."""
    if optimizer is None and any(True for _ in model.parameters()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = halfstep.switch(model, optimizer, recipe=recipe)
    _live.append(switch)
    if recipe == "fp16" and optimizer is not None:
        switch.load_state_dict(switch.state_dict() | {"scale": SCALE})
    return switch


def all_off() -> None:
    """Undo every switch that `on` made."""
    while _live:
        _live.pop().off()


def tensors(value: Any) -> list[Tensor]:
    """All floating and complex tensors in nested containers, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() or value.is_complex() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value):
        value = [getattr(value, f.name) for f in fields(value)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    return []


def objective(out: Any) -> Tensor:
    """A loss that depends on every element of every output, with gradients of order one."""
    generator = torch.Generator().manual_seed(99)
    total = torch.zeros(())
    for t in tensors(out):
        for part in [t.real, t.imag] if t.is_complex() else [t]:
            weights = torch.randn(part.shape, generator=generator)
            total = total + (part.float() * weights).sum() + 0.5 * part.float().square().mean()
    return total


@dataclass
class Run:
    """What one run gave."""

    model: nn.Module
    outputs: list[Tensor]
    grads: dict[str, Tensor]
    switch: Switch


def run(
    make: Callable[[], nn.Module],
    inputs: Callable[[], Any],
    recipe: str,
    call: Callable[..., Any] = lambda model, *inputs: model(*inputs),
    loss: Callable[[Any], Tensor] = objective,
    backward: bool = True,
) -> Run:
    """One forward and backward; the model stays switched. Inputs that require grad count as parameters."""
    torch.manual_seed(7)
    model = make()
    arguments = inputs()
    if not isinstance(arguments, tuple):
        arguments = (arguments,)
    switch = on(model, recipe)
    out = call(model, *arguments)
    if backward:
        loss(out).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for k, t in enumerate(tensors(arguments)):
        if t.grad is not None:
            grads[f"input {k}"] = t.grad
    return Run(model, [t.detach().clone() for t in tensors(out)], grads, switch)


def assert_near(low: Tensor, exact: Tensor, bound: float, what: str, floor: float = 0.0) -> None:
    """The relative error in norm is at most ``bound``; ``floor``: a norm that errors may be measured by."""
    low, exact = low.detach(), exact.detach()
    assert low.shape == exact.shape, what
    assert low.dtype == exact.dtype, f"{what}: {low.dtype} instead of {exact.dtype}"
    if low.is_sparse:
        low, exact = low.to_dense(), exact.to_dense()
    wide = torch.complex128 if low.is_complex() else torch.float64
    error = (low.to(wide) - exact.to(wide)).norm().item()
    size = max(exact.to(wide).norm().item(), floor)
    assert error <= bound * size, f"{what}: off by {error / (size or 1.0):.2e}, allowed {bound:.2e}"


def compare(low: Run, exact: Run, recipe: str, k: int, rounds: bool = True) -> None:
    """``low`` is ``exact`` within ``k`` roundings, outputs and gradients; ``rounds``: and is not the same."""
    bound = k * UNIT[recipe]
    assert len(low.outputs) == len(exact.outputs)
    for n, (a, b) in enumerate(zip(low.outputs, exact.outputs, strict=True)):
        assert_near(a, b, bound, f"output {n}")
    if rounds:
        assert any(not torch.equal(a, b) for a, b in zip(low.outputs, exact.outputs, strict=True))
    assert low.grads.keys() == exact.grads.keys()
    if not exact.grads:
        return
    # A gradient whose terms cancel errs by the size of its terms: by that of the mean gradient.
    dense = {name: g.to_dense() if g.is_sparse else g for name, g in exact.grads.items()}
    mean = (
        sum(g.abs().square().sum().item() for g in dense.values())
        / sum(g.numel() for g in dense.values())
    ) ** 0.5
    for name, g in exact.grads.items():
        floor = mean * g.numel() ** 0.5
        assert_near(low.grads[name], g, bound, f"gradient of {name}", floor)


def check(
    make: Callable[[], nn.Module],
    inputs: Callable[[], Any],
    recipe: str,
    k: int,
    rounds: bool = True,
    **how: Any,
) -> tuple[Run, Run]:
    """Run both and compare; returns the run under the recipe, still on, and the one in FP32."""
    exact = run(make, inputs, "fp32", **how)
    low = run(make, inputs, recipe, **how)
    for t in low.outputs:
        assert t.dtype not in (torch.float16, torch.bfloat16), "an output left in 16 bits"
    compare(low, exact, recipe, k, rounds)
    return low, exact
