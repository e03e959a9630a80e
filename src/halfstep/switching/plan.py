"""A recipe on a device: which dtype flows, what is native, what is emulated, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from halfstep.errors import SwitchError
from halfstep.format import Accumulator
from halfstep.recipe import Recipe, Update
from halfstep.switching.edits import check_edits

__all__ = ["Executor", "Kind", "Plan", "PlanRow", "make_plan"]


class Executor(Enum):
    """Who computes a kind of operation."""

    NATIVE = "native"
    EMULATED = "emulated"
    OFF = "off"


class Kind(Enum):
    """The kinds of operations that a plan tells apart."""

    MATMUL = "matrix products (linear, matmul, einsum)"
    CONVOLUTION = "convolutions"
    ATTENTION = "attention"
    RECURRENT = "recurrent layers"
    WIDE = "reductions, normalisations, softmax, exp, log, pow"
    POINTWISE = "point-wise"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One line of ``switch.explain()``."""

    kind: str
    executor: Executor
    reads: str
    accumulates: str
    writes: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the switch will do on one device.

    ``low`` is the dtype of working copies and of 16-bit tensors in the region; FP32 for the identity.
    ``emulate_dots``: dot products are FP32 kernels on rounded operands.
    ``reads_by_role``: operands are rounded by role first, but in what the recipe keeps.
    ``wide_operations``: the FP32 class of the policy computes in FP32; off in plain 16-bit programs.
    ``narrow_writes``: the FP32 class writes the store format (policy ``paper``).
    """

    recipe: Recipe
    device: str
    low: torch.dtype
    emulate_dots: bool
    reads_by_role: bool
    wide_operations: bool
    narrow_writes: bool
    rows: tuple[PlanRow, ...]

    @property
    def active(self) -> bool:
        """False where the region changes nothing."""
        return self.low != torch.float32 or self.reads_by_role

    @property
    def accumulator(self) -> Accumulator:
        """What dot products are added up in, for operands of this recipe."""
        recipe = self.recipe
        return (
            recipe.accumulate
            if recipe.adds_in_fp32
            else recipe.accumulate.of(recipe.store, recipe.store)
        )


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DEVICES = ("cpu", "cuda")


def make_plan(recipe: Recipe, device: str) -> Plan:
    """The plan of ``recipe`` on ``device`` ("cpu" or "cuda").

    Raises:
        SwitchError: the device or one of the recipe's formats has no executor.
        RecipeError: its op policy names what is no operation of this torch.
    """
    if device not in _DEVICES:
        raise SwitchError(
            f"the model's parameters are on {device!r}; "
            f"halfstep switches models on {', '.join(_DEVICES)}"
        )
    low = _dtype(recipe, "store")
    check_edits(recipe.policy)
    if not recipe.adds_in_fp32:
        if low == torch.float32 and not recipe.reads_by_role:
            raise SwitchError(
                f"recipe {recipe}: accumulate={recipe.accumulate} has no executor with store=fp32; "
                "fp32, or store and operands in fp16 or bf16"
            )
        recipe.accumulate.of(recipe.store, recipe.store)  # raises for a unit that cannot
    _check_kept(recipe)
    # What a recipe by role keeps in bf16 is emulated, too: FP32's speed on every CPU, where native bf16 is
    # three times faster on some and ten times slower on others.
    emulate = device == "cpu" and (low == torch.float16 or recipe.reads_by_role)
    emulate = low != torch.float32 and (emulate or not recipe.adds_in_fp32)
    plain = recipe.optimizer.name != "fp32"  # a plain 16-bit program has no FP32 islands
    return Plan(
        recipe=recipe,
        device=device,
        low=low,
        emulate_dots=emulate,
        reads_by_role=recipe.reads_by_role,
        wide_operations=not plain and low != torch.float32,
        narrow_writes=recipe.policy.store_all,
        rows=_rows(recipe, device, emulate, plain),
    )


def _check_kept(recipe: Recipe) -> None:
    """Raise `SwitchError` where what the optimizer's side should do has no executor, or would do nothing."""
    master, optimizer, store = recipe.master.name, recipe.optimizer.name, recipe.store.name
    if optimizer != "fp32" and (optimizer != store or master != store):
        raise SwitchError(
            f"recipe {recipe}: optimizer={optimizer} has no executor with store={store} and "
            f"master={master}; fp32, or all three fp16 or all three bf16 (a plain 16-bit program)"
        )
    if optimizer != "fp32" and str(recipe.moments) != "fp32":
        raise SwitchError(
            f"recipe {recipe}: moments={recipe.moments} with optimizer={optimizer}, whose state is in "
            f"{optimizer} already; moments=fp32 leaves it so"
        )
    if recipe.update is not Update.NEAREST and (optimizer != "fp32" or master == "fp32"):
        raise SwitchError(
            f"recipe {recipe}: update={recipe.update.value} needs an FP32 optimizer and weights in less "
            f"than FP32; here optimizer={optimizer} and master={master}. Say master=bf16, or update=nearest"
        )


def _dtype(recipe: Recipe, role: str) -> torch.dtype:
    name = getattr(recipe, role).name
    if name not in _DTYPES:
        raise SwitchError(
            f"recipe {recipe}: {role}={name} has no executor yet; the switch runs {', '.join(_DTYPES)}"
        )
    return _DTYPES[name]


def _rows(recipe: Recipe, device: str, emulate: bool, plain: bool) -> tuple[PlanRow, ...]:
    store, wide = recipe.store.name, "fp32"
    if recipe.is_identity:
        return (
            PlanRow(
                kind="every operation",
                executor=Executor.NATIVE,
                reads=wide,
                accumulates=wide,
                writes=wide,
                why="the recipe is FP32: nothing is changed",
            ),
        )
    accumulate = str(recipe.accumulate)
    reads, why = store, _why_dots(recipe, device, emulate)
    if recipe.reads_by_role:
        reads = (
            f"weight {recipe.weight}, activation {recipe.activation}, gradient {recipe.gradient}"
        )
    emulated = emulate or recipe.reads_by_role
    more = {
        Kind.ATTENTION: "; scores and softmax in FP32, probabilities rounded" if emulated else "",
        Kind.RECURRENT: "; step by step over time, gates rounded once a step" if emulated else "",
    }
    dots = [
        PlanRow(
            kind=kind.value,
            executor=Executor.EMULATED if emulated else Executor.NATIVE,
            reads=reads,
            accumulates=accumulate,
            writes=store,
            why=why + more.get(kind, ""),
        )
        for kind in (Kind.MATMUL, Kind.CONVOLUTION, Kind.ATTENTION, Kind.RECURRENT)
    ]
    fp32_class = PlanRow(
        kind=Kind.WIDE.value,
        executor=Executor.OFF if plain else Executor.NATIVE,
        reads=store,
        accumulates=wide,
        writes=store if plain or recipe.policy.store_all else wide,
        why="a plain 16-bit program has no FP32 islands"
        if plain
        else "computed in FP32, as in torch's CUDA autocast lists, on every device",
    )
    pointwise = PlanRow(
        kind=Kind.POINTWISE.value,
        executor=Executor.NATIVE,
        reads=store,
        accumulates=wide,
        writes=store,
        why=f"torch's own {store} kernels; FP32 inside one operation",
    )
    optimizer = PlanRow(
        kind="optimizer",
        executor=Executor.NATIVE,
        reads=recipe.master.name,
        accumulates=recipe.optimizer.name,
        writes=recipe.master.name,
        why=_why_optimizer(recipe),
    )
    return *dots, fp32_class, pointwise, optimizer


def _why_dots(recipe: Recipe, device: str, emulate: bool) -> str:
    store = recipe.store.name
    if recipe.reads_by_role:
        sums = (
            "FP32 kernels, products exact"
            if recipe.adds_in_fp32
            else f"sums in {recipe.accumulate}"
        )
        return (
            f"operands rounded by role along the summed axis, carried in FP32: {sums}; {store} where the "
            f"recipe keeps it: {recipe.keep}"
        )
    if not recipe.adds_in_fp32:
        return f"no {device} kernel adds in {recipe.accumulate}: each sum is rounded after every addition"
    if emulate:
        return f"{_half_on_cpu()}: FP32 kernels on operands rounded to fp16, products exact"
    native = f"torch's {store} kernels multiply in {store} and add in FP32"
    if device == "cpu" and not _has_bf16():
        return f"{native}; this CPU has no bf16 instructions (AVX512-BF16, AMX)"
    return native


def _half_on_cpu() -> str:
    if torch.cpu._is_amx_fp16_supported():
        return "few CPUs have a half GEMM, and fp16 is the same on all"
    return "this CPU has no half GEMM"


def _has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _why_optimizer(recipe: Recipe) -> str:
    state = f"; its state kept in {recipe.moments}" if str(recipe.moments) != "fp32" else ""
    if recipe.master.name == "fp32":
        return f"your optimizer on FP32 master weights{state}"
    how = f" (update: {recipe.update.value})" if recipe.update is not Update.NEAREST else ""
    return f"your optimizer; weights kept in {recipe.master.name}{how}, no FP32 master copy{state}"
