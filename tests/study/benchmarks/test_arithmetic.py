"""The table of the arithmetic on tiny sizes: which rows there are, and which way a ratio points."""

from __future__ import annotations

import time

import pytest
import torch

from halfstep.study.benchmarks import arithmetic, peers
from halfstep.study.benchmarks.arithmetic import CASES, Sizes, rows
from halfstep.study.benchmarks.groups import Group
from halfstep.study.benchmarks.harness import Clock
from halfstep.study.benchmarks.memory import beyond_operands, can_measure
from halfstep.study.benchmarks.peers import Peer, present

TINY = Sizes(elements=2**12, side=32, depth=64, batch=2)


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "ROUNDERS", ())
    monkeypatch.setattr(arithmetic, "BLOCKS", ())


def table(group: Group) -> list[tuple[str, str, str]]:
    measured = rows(sizes=TINY, only=[group], rounds=2)
    return [(row.case, row.against, str(row.target)) for row in measured]


@pytest.mark.usefixtures("no_peers")
def test_rounding_is_compared_with_copy():
    found = table(Group.ROUNDING)
    assert len(found) == 10
    assert found[0] == ("round_to fp16, nearest, 4096 elements", "copy_, throughput", ">= 0.90")
    assert found[1] == ("round_to fp16, stochastic, 4096 elements", "copy_, throughput", ">= 0.80")


@pytest.mark.usefixtures("no_peers")
def test_blocks_are_compared_with_copy():
    found = table(Group.BLOCKS)
    assert [(case.rpartition(", ")[0], target) for case, _, target in found] == [
        (f"{what} {format}", f">= {bound:.2f}")
        for what, bound in arithmetic._BLOCK_WORK.items()
        for format in arithmetic._BLOCK_FORMATS
    ]
    assert {against for _, against, _ in found} == {"copy_, throughput"}


def test_products_are_compared_with_torchs():
    found = {case.partition(", 32x32")[0]: target for case, _, target in table(Group.MATMUL)}
    assert found == {
        "fp32": ">= 0.90",
        "fp16, product and sum rounded": ">= 0.33",
        "fp16, exact FMA": ">= 0.22",
        "e6m9, exact FMA": ">= 0.22",
        "bf16, exact FMA": ">= 0.22",
        "fp16, product and sum rounded, in chunks of 64, fp32 between": ">= 0.30",
        "e6m9 of e5m2, exact FMA, in chunks of 64, fp32 between": ">= 0.30",
        "fp16, exact FMA, in chunks of 64, fp32 between": ">= 0.30",
        "fp16, stochastic": ">= 0.10",
        "V100 unit": ">= 0.03",
        "A100 unit": ">= 0.03",
        "H100 unit": ">= 0.03",
        "int8 added in int32": ">= 0.90",
    }


def test_thin_and_small_shapes_may_reach_half():
    found = table(Group.SHAPES)
    shapes = {case.rpartition(", ")[2] for case, _, _ in found}
    assert "32x64 by 64x32" in shapes and "2x64x64 by 2x64x64" in shapes
    assert len(found) == 4 * 7
    assert found[0][2] == ">= 0.17"  # half of 0.33, in two digits


def test_the_cases_are_what_their_names_say():
    assert [str(case.keywords["accumulate"]) for case in CASES] == [
        "fp32",
        "fp16/products-rounded",
        "fp16",
        "e6m9",
        "bf16",
        "fp16/products-rounded/chunk64/between-fp32",
        "e6m9/chunk64/between-fp32",
        "fp16/chunk64/between-fp32",
        "fp16/stochastic",
        "v100",
        "a100",
        "h100",
    ]


def test_a_ratio_is_the_others_time_over_ours_and_the_slow_take_few_turns():
    calls: list[str] = []

    def wait(name: str, seconds: float):
        calls.append(name)
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    race = arithmetic._Race(rounds=6, clock=Clock.CPU)
    found = list(
        race.against(
            ("base", lambda: wait("base", 0.001)),
            {"half": lambda: wait("half", 0.002), "slow": lambda: wait("slow", 0.05)},
            {"half": 0.4, "slow": 0.9},
            what="throughput",
        )
    )
    half, slow = (row.figure for row in found)
    assert 0.25 < half.median < 1 > 10 * slow.median
    assert (half.rounds, slow.rounds) == (6, 2)
    assert calls.count("slow") == 2 + 2  # the first two are how it is known to be slow
    assert [row.met for row in found] == [half.median >= 0.4, False]


def peer(package: str, theirs) -> Peer:
    return Peer(
        package=package,
        case="round_to fp16",
        function="f",
        theirs=theirs,
        ours=peers._rounding("fp16"),
    )


def test_a_peer_that_is_not_there_or_does_not_load_has_no_row():
    x = torch.ones(1024)

    def broken(_: torch.Tensor):
        raise ImportError("no such library")

    assert present(peer("no-such-package", lambda x: x.clone), x) is None
    assert present(peer("torch", broken), x) is None
    assert present(peer("torch", lambda x: x.clone), x) is not None


@pytest.mark.parametrize("each", [*peers.ROUNDERS, *peers.BLOCKS], ids=lambda p: p.case)
def test_our_side_of_each_peer_runs(each: Peer):
    each.ours(torch.randn(1024))()


def test_peers_that_are_here_have_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arithmetic, "ROUNDERS", (peers.ROUNDERS[0],))  # torch itself
    row = list(rows(sizes=TINY, only=[Group.ROUNDING], rounds=2))[-1]
    assert row.case == "round_to e5m2, 4096 elements"
    assert row.against == "torch to(float8_e5m2).float(), times faster"
    assert str(row.target) == ">= 1.00"


@pytest.mark.skipif(not can_measure(), reason="no /proc/self/clear_refs")
def test_memory_counts_what_a_call_takes_beyond_its_result():
    # A matrix unit's operands are copied to be rounded: 4 MiB of the one, 0.06 of the other. Those of other
    # float32 sums are rounded on the way.
    shapes = (1024, 1024), (1024, 16)
    mib = beyond_operands(*shapes, {"operands": "bf16", "accumulate": "h100"})
    assert 3.5 <= mib < 64
    assert beyond_operands(*shapes, {"operands": "bf16", "accumulate": "fp16"}) < 3.5
