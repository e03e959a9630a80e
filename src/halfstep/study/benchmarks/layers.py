"""Emulated layers that others have, where they are installed, against the same model in halfstep.

A step of four linear layers of 1024 on 512 rows, with SGD: what each library can emulate whole.
"""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

import halfstep
from halfstep.study.benchmarks.harness import Clock, Row, Sense, Target, interleave, ratio
from halfstep.study.benchmarks.models import Workload
from halfstep.study.benchmarks.peers import quiet
from halfstep.study.benchmarks.switch import FP32, Step

__all__ = ["PEERS", "LayersPeer", "rows"]

_WIDTH = 1024
_ROWS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersPeer:
    """A package that emulates layers, and the recipe that says the same to halfstep."""

    package: str
    layers: str
    recipe: str
    theirs: Callable[[Workload], Step]
    ours: Callable[[Workload], Step]


def _perceptron(*after_each: Callable[[], nn.Module]) -> Workload:
    torch.manual_seed(0)
    parts = [
        part
        for _ in range(4)
        for part in (nn.Linear(_WIDTH, _WIDTH), *(make() for make in after_each), nn.ReLU())
    ]
    return Workload(
        name="perceptron",
        description=f"4 linear layers of {_WIDTH}, {_ROWS} rows, SGD",
        model=nn.Sequential(*parts),
        inputs=torch.randn(_ROWS, _WIDTH),
        targets=torch.randint(_WIDTH, (_ROWS,)),
    )


def _step(workload: Workload, optimizer: torch.optim.Optimizer) -> Step:
    def step() -> None:
        workload.loss(workload.model(workload.inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def _fp32(workload: Workload) -> Step:
    return _step(workload, _sgd(workload.model))


def _switched(recipe: str) -> Callable[[Workload], Step]:
    def ours(workload: Workload) -> Step:
        optimizer = _sgd(workload.model)
        halfstep.switch(workload.model, optimizer, recipe=recipe)
        return _step(workload, optimizer)

    return ours


def _emulated(recipe: str) -> Callable[[Workload], Step]:
    def ours(workload: Workload) -> Step:
        plain = _fp32(workload)

        def step() -> None:
            with halfstep.emulate(recipe):
                plain()

        return step

    return ours


def _torchao(workload: Workload) -> Step:
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    config = Float8LinearConfig(emulate=True)
    return _fp32(workload.with_model(convert_to_float8_training(workload.model, config=config)))


def _qtorch(workload: Workload) -> Step:
    from qtorch import FloatingPoint  # pyright: ignore[reportMissingImports]
    from qtorch.optim import OptimLP  # pyright: ignore[reportMissingImports]
    from qtorch.quant import Quantizer, quantizer  # pyright: ignore[reportMissingImports]

    number = FloatingPoint(exp=6, man=9)

    def rounded() -> nn.Module:
        return Quantizer(
            forward_number=number,
            backward_number=number,
            forward_rounding="nearest",
            backward_rounding="nearest",
        )

    model = _perceptron(rounded).model
    weights = quantizer(forward_number=number, forward_rounding="nearest")
    return _step(workload.with_model(model), OptimLP(_sgd(model), weight_quant=weights))


PEERS = (
    LayersPeer(
        package="torchao",
        layers="Float8Linear(emulate=True)",
        recipe="fp8",
        theirs=_torchao,
        ours=_switched("fp8"),
    ),
    LayersPeer(
        package="qtorch",
        layers="Quantizer, OptimLP",
        recipe="fp16-naive in e6m9",
        theirs=_qtorch,
        ours=_emulated("fp16-naive:operands=e6m9,store=e6m9,master=e6m9,accumulate=fp32"),
    ),
)


def rows(*, rounds: int, clock: Clock) -> Iterator[Row]:
    """A row for each that is installed: our step over theirs."""
    for peer in PEERS:
        workload = _perceptron()
        theirs = _present(peer, workload)
        if theirs is None:
            continue
        ours, reference = peer.ours(workload.to("cpu")), _fp32(workload.to("cpu"))
        steps = {FP32: reference, peer.package: theirs, peer.recipe: ours}
        seconds = interleave(steps, rounds=rounds, warmup=1, clock=clock.read)
        yield Row(
            case=f"{peer.recipe} step, {workload.name}",
            against=f"{peer.package} {peer.layers}, time ratio",
            figure=ratio(seconds[peer.recipe], seconds[peer.package]),
            target=Target(sense=Sense.AT_MOST, bound=1.0),
            details={
                "workload": workload.description,
                "version": importlib.metadata.version(peer.package),
                "seconds": {name: statistics.median(seconds[name]) for name in steps},
            },
        )


def _present(peer: LayersPeer, workload: Workload) -> Step | None:
    """Its step, taken once; None where the package is not installed or does not load."""
    try:
        importlib.metadata.version(peer.package)
        with quiet():
            step = peer.theirs(workload.to("cpu"))
            step()
    except (importlib.metadata.PackageNotFoundError, ImportError, OSError, RuntimeError):
        return None
    return step
