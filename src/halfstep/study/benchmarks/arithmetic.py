"""What the arithmetic costs: rounding against ``copy_``, products against ``torch.mm`` in FP32.

Each case is timed beside what it is compared with, all taking turns in one process; peers that are
installed are rows of their own. ``copy_`` writes into a tensor that exists, as our kernels do with
``out=``: a clone is bound by page faults, which would flatter anything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfstep.ops import matmul, quantize_blocks, round_blocks, round_to
from halfstep.study.benchmarks.groups import Group
from halfstep.study.benchmarks.harness import (
    Clock,
    Ratio,
    Row,
    Sense,
    Target,
    interleave,
    ratio,
)
from halfstep.study.benchmarks.memory import beyond_operands, can_measure
from halfstep.study.benchmarks.peers import BLOCKS, ROUNDERS, Peer, present

__all__ = ["FULL", "Sizes", "rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the operands are."""

    elements: int
    """Of a tensor that is rounded, and no less than a thousand."""
    side: int
    """Of the square matrices."""
    depth: int
    """The longest K of a thin product."""
    batch: int
    """Products of 64 x 64 matrices at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A product, and which share of the throughput of ``torch.mm`` in FP32 it must reach."""

    name: str
    keywords: Mapping[str, Any]
    at_least: float


FULL = Sizes(elements=2**24, side=1024, depth=65536, batch=256)
_FORMATS = ("fp16", "bf16", "e5m2", "e4m3fn", "e6m9")
_BLOCK_FORMATS = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4")
# There and back through packed codes are two passes: half of what each must reach.
_BLOCK_WORK = {
    "round_blocks": 0.5,
    "quantize_blocks": 0.5,
    "dequantize": 0.5,
    "quantize_blocks and dequantize": 0.25,
}
_ROUNDINGS = {"nearest": 0.9, "stochastic": 0.8}
_PEER_ELEMENTS = 2**20
_MOST_MIB = Target(sense=Sense.AT_MOST, bound=64.0)
_COPY, _MM = "copy_", "torch.mm float32"
_SLOW, _SLOW_ROUNDS = 20.0, 2  # so many times slower than what it is compared with


def _case(name: str, at_least: float, accumulate: str, operands: str = "fp16") -> Case:
    keywords = {"operands": operands, "accumulate": accumulate}
    return Case(name=name, keywords=keywords, at_least=at_least)


STEPWISE = _case("fp16, product and sum rounded", 0.33, "fp16/products-rounded")
EXACT_FMA = _case("fp16, exact FMA", 0.22, "fp16")
ANY_FORMAT = _case("e6m9, exact FMA", 0.22, "e6m9")
STOCHASTIC = _case("fp16, stochastic", 0.10, "fp16/stochastic")
UNIT = _case("H100 unit", 0.03, "h100")
CASES = (
    _case("fp32", 0.9, "fp32"),
    STEPWISE,
    EXACT_FMA,
    ANY_FORMAT,
    _case("bf16, exact FMA", 0.22, "bf16"),
    *(
        _case(
            f"{name} in chunks of 64, fp32 between", 0.30, f"{sums}/chunk64/between-fp32", operands
        )
        for name, sums, operands in (
            ("fp16, product and sum rounded,", "fp16/products-rounded", "fp16"),
            # as Wang et al. (2018) train in FP8: arXiv 1812.08011
            ("e6m9 of e5m2, exact FMA,", "e6m9", "e5m2"),
            ("fp16, exact FMA,", "fp16", "fp16"),
        )
    ),
    STOCHASTIC,
    _case("V100 unit", 0.03, "v100"),
    _case("A100 unit", 0.03, "a100"),
    UNIT,
)
_THIN = (STEPWISE, EXACT_FMA, ANY_FORMAT, STOCHASTIC)


def rows(
    *,
    sizes: Sizes = FULL,
    only: Sequence[Group] = tuple(Group),
    rounds: int = 15,
    clock: Clock = Clock.WALL,
) -> Iterator[Row]:
    """The rows of the table, each group as soon as it is measured."""
    race = _Race(rounds=rounds, clock=clock)
    parts: dict[Group, Callable[[], Iterator[Row]]] = {
        Group.ROUNDING: lambda: _rounding(sizes, race),
        Group.BLOCKS: lambda: _blocks(sizes, race),
        Group.MATMUL: lambda: _square(sizes, race),
        Group.SHAPES: lambda: _shapes(sizes, race),
        Group.MEMORY: lambda: _memory(sizes),
    }
    for group, part in parts.items():
        if group in only:
            yield from part()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Race:
    rounds: int
    clock: Clock

    def against(
        self,
        baseline: tuple[str, Callable[[], object]],
        contestants: Mapping[str, Callable[[], object]],
        targets: Mapping[str, float],
        *,
        what: str,
    ) -> Iterator[Row]:
        """A row for each contestant: the baseline's time over its time."""
        name, run = baseline
        all_runs = {name: run, **contestants}
        first = {each: self._seconds(call) for each, call in all_runs.items()}
        limits = {each: _SLOW_ROUNDS for each, took in first.items() if took > _SLOW * first[name]}
        limits = {each: min(few, self.rounds) for each, few in limits.items() if each != name}
        seconds = interleave(
            {each: _plain(call) for each, call in all_runs.items()},
            rounds=self.rounds,
            warmup=1,
            limits=limits,
            clock=self.clock.read,
        )
        for each in contestants:
            yield Row(
                case=each,
                against=f"{name}, {what}",
                figure=ratio(seconds[name], seconds[each]),
                target=Target(sense=Sense.AT_LEAST, bound=targets[each]),
                details={
                    "seconds": statistics.median(seconds[each]),
                    "against_seconds": statistics.median(seconds[name]),
                },
            )

    def _seconds(self, call: Callable[[], object]) -> float:
        call()
        start = self.clock.read()
        call()
        return max(self.clock.read() - start, time.get_clock_info("perf_counter").resolution)


def _plain(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        call()

    return run


def _rounding(sizes: Sizes, race: _Race) -> Iterator[Row]:
    x = _normal(sizes.elements)
    out = torch.empty_like(x)
    contestants: dict[str, Callable[[], object]] = {}
    targets: dict[str, float] = {}
    for format in _FORMATS:
        for rounding, bound in _ROUNDINGS.items():
            name = f"round_to {format}, {rounding}, {sizes.elements} elements"
            contestants[name] = lambda f=format, r=rounding: round_to(x, f, r, out=out)
            targets[name] = bound
    copy = (_COPY, lambda: out.copy_(x))
    yield from race.against(copy, contestants, targets, what="throughput")
    yield from _beside(ROUNDERS, x, race)


def _blocks(sizes: Sizes, race: _Race) -> Iterator[Row]:
    x = _normal(sizes.elements).view(-1, 1024)
    out = torch.empty_like(x)
    copy = (_COPY, lambda: out.copy_(x))
    for what, bound in _BLOCK_WORK.items():
        contestants = {
            f"{what} {format}, {sizes.elements} elements": _block_work(what, format, x, out)
            for format in _BLOCK_FORMATS
        }
        yield from race.against(
            copy, contestants, dict.fromkeys(contestants, bound), what="throughput"
        )
    yield from _beside(BLOCKS, x.flatten(), race)


def _block_work(what: str, format: str, x: Tensor, out: Tensor) -> Callable[[], object]:
    """Numbers to numbers in one pass, to packed codes, back from them, and there and back."""
    if what == "round_blocks":
        return lambda: round_blocks(x, format, out=out)
    if what == "quantize_blocks":
        return lambda: quantize_blocks(x, format)
    stored = quantize_blocks(x, format)
    if what == "dequantize":
        return lambda: stored.dequantize(out=out)
    return lambda: quantize_blocks(x, format).dequantize(out=out)


def _beside(peers: Sequence[Peer], x: Tensor, race: _Race) -> Iterator[Row]:
    """Rows of the peers that are here, on no more elements than the slow ones can take."""
    few = x[:_PEER_ELEMENTS]
    for peer in peers:
        theirs = present(peer, few)
        if theirs is not None:
            name = f"{peer.case}, {len(few)} elements"
            against = (f"{peer.package} {peer.function}", theirs)
            contestants = {name: peer.ours(few)}
            yield from race.against(
                against, contestants, {name: peer.at_least}, what="times faster"
            )


def _square(sizes: Sizes, race: _Race) -> Iterator[Row]:
    shape = (sizes.side, sizes.side)
    yield from _products(CASES, shape, shape, race, slack=1.0)
    yield from _integers(sizes, race)


def _integers(sizes: Sizes, race: _Race) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    side = (sizes.side, sizes.side)
    a, b = (torch.randint(-128, 128, side, generator=generator).to(torch.int8) for _ in range(2))
    name = f"int8 added in int32, {sizes.side}x{sizes.side} by {sizes.side}x{sizes.side}"
    few = _Race(rounds=min(_SLOW_ROUNDS, race.rounds), clock=race.clock)  # torch's may take seconds
    multiply = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
    theirs = ("torch._int_mm", lambda: multiply(a, b))
    ours = {name: lambda: matmul(a, b, "int8", "int32")}
    yield from few.against(theirs, ours, {name: 0.9}, what="throughput")


def _shapes(sizes: Sizes, race: _Race) -> Iterator[Row]:
    """Thin and small products may reach half of what square ones must."""
    side, depth = sizes.side, sizes.depth
    middle = max(side, depth // 16)
    for a, b in (
        ((1, middle), (middle, side)),
        ((side, middle), (middle, 1)),
        ((32, middle), (middle, side)),
        ((side, middle), (middle, 32)),
        ((32, depth), (depth, 32)),
        ((1, depth), (depth, 64)),
        ((sizes.batch, 64, 64), (sizes.batch, 64, 64)),
    ):
        yield from _products(_THIN, a, b, race, slack=2.0)


def _products(
    cases: Sequence[Case],
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    race: _Race,
    *,
    slack: float,
) -> Iterator[Row]:
    a, b = _normal(*a_shape), _normal(*b_shape, seed=1)
    where = f"{'x'.join(map(str, a_shape))} by {'x'.join(map(str, b_shape))}"
    names = {f"{case.name}, {where}": case for case in cases}
    contestants = {
        name: (lambda keywords=case.keywords: matmul(a, b, **keywords))
        for name, case in names.items()
    }
    targets = {name: case.at_least / slack for name, case in names.items()}
    baseline = (_MM, lambda: torch.matmul(a, b))
    yield from race.against(baseline, contestants, targets, what="throughput")


def _memory(sizes: Sizes) -> Iterator[Row]:
    if not can_measure():
        return
    square = (sizes.side, sizes.side)
    for case, a, b in (
        *((case, square, square) for case in (*_THIN, UNIT)),
        (EXACT_FMA, (32, sizes.depth), (sizes.depth, 32)),
        (EXACT_FMA, (sizes.batch, 64, 64), (sizes.batch, 64, 64)),
        (EXACT_FMA, (sizes.depth, sizes.side), (sizes.side, 64)),
    ):
        mib = beyond_operands(a, b, dict(case.keywords))
        yield Row(
            case=f"{case.name}, {'x'.join(map(str, a))} by {'x'.join(map(str, b))}",
            against="MiB beyond operands and result",
            figure=Ratio(median=mib, low=mib, high=mib, rounds=1),
            target=_MOST_MIB,
        )


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
