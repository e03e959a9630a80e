"""A recipe on a device: which dtype flows, what is native, what is emulated, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from halfstep.errors import SwitchError
from halfstep.format import Accumulator
from halfstep.recipe import Recipe, Update

__all__ = ["Executor", "Plan", "PlanRow", "make_plan"]


class Executor(Enum):
    """Who computes a kind of operation."""

    NATIVE = "native"
    EMULATED = "emulated"
    OFF = "off"


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
    """
    if device not in _DEVICES:
        raise SwitchError(
            f"the model's parameters are on {device!r}; "
            f"halfstep switches models on {', '.join(_DEVICES)}"
        )
    low = _dtype(recipe, "store")
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
    if not recipe.adds_in_fp32:
        why = f"no {device} kernel adds in {accumulate}: each sum is rounded after every addition"
    elif emulate:
        why = "this device has no fast fp16 GEMM: FP32 kernels on operands rounded to fp16, products exact"
    else:
        why = f"torch's {store} kernels on {device} multiply in {store} and add in FP32"
    reads = store
    if recipe.reads_by_role:
        reads = (
            f"weight {recipe.weight}, activation {recipe.activation}, gradient {recipe.gradient}"
        )
        why = "operands rounded by role along the summed axis, carried in FP32: " + (
            f"FP32 kernels, products exact; {store} where the recipe keeps it: {recipe.keep}"
            if recipe.adds_in_fp32
            else f"sums in {accumulate}; {store} where the recipe keeps it: {recipe.keep}"
        )
    executor = Executor.EMULATED if emulate or recipe.reads_by_role else Executor.NATIVE
    dots = PlanRow(
        kind="dot products (linear, matmul, convolution, attention)",
        executor=executor,
        reads=reads,
        accumulates=accumulate,
        writes=store,
        why=why,
    )
    recurrent = PlanRow(
        kind="recurrent layers",
        executor=executor,
        reads=reads,
        accumulates=accumulate,
        writes=store,
        why="step by step over time, gates rounded once a step"
        if emulate or recipe.reads_by_role
        else "torch's fused kernels",
    )
    fp32_class = PlanRow(
        kind="reductions, normalisations, softmax, exp, log, pow",
        executor=Executor.OFF if plain else Executor.NATIVE,
        reads=store,
        accumulates=wide,
        writes=store if plain or recipe.policy.store_all else wide,
        why="a plain 16-bit program has no FP32 islands"
        if plain
        else "computed in FP32, as in torch's CUDA autocast lists, on every device",
    )
    pointwise = PlanRow(
        kind="point-wise",
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
    return dots, recurrent, fp32_class, pointwise, optimizer


def _why_optimizer(recipe: Recipe) -> str:
    state = f"; its state kept in {recipe.moments}" if str(recipe.moments) != "fp32" else ""
    if recipe.master.name == "fp32":
        return f"your optimizer on FP32 master weights{state}"
    how = f" (update: {recipe.update.value})" if recipe.update is not Update.NEAREST else ""
    return f"your optimizer; weights kept in {recipe.master.name}{how}, no FP32 master copy{state}"
