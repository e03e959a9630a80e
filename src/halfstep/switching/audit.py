"""Whether what a recipe promises is so: the tensors themselves are looked at, not what made them.

Mixed precision has a quiet way to fail: the FP32 master weights are not there. The optimizer was built before
the parameters were replaced, or on copies; ``model.half()`` came after; a ``.data`` was swapped; a state was
loaded into weights that were in 16 bits then. Nothing says so, training only gets worse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halfstep import ops
from halfstep.errors import SwitchError
from halfstep.format import BlockFormat, Format
from halfstep.ops import BlockTensor
from halfstep.recipe import Recipe
from halfstep.switching import overrides
from halfstep.switching.audit_table import Audit, AuditRow, BrokenPromise, Held
from halfstep.switching.between_steps import STORED, ShardInBlocks
from halfstep.switching.guard import Guard, Owner
from halfstep.switching.naming import place_of
from halfstep.switching.plan import Executor, Plan
from halfstep.switching.ranks import local
from halfstep.switching.region import LazyParameters, Region, current, keeps_fp32

__all__ = ["Audited", "rounded_partial_sums"]

_FP32 = Format.parse("fp32")
_NARROW = (torch.float16, torch.bfloat16)
_AS_IT_WAS = "Give the model back as it was (model.float(), switch.off()) and switch it anew"


class Audited(Owner, Protocol):
    """A switch as its audit sees it, and the method that it gets from here."""

    model: nn.Module
    recipe: Recipe
    plan: Plan

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """Those that step the model's parameters."""
        ...

    @property
    def loss_scale(self) -> float:
        """That of the next backward."""
        ...

    def take_in(self) -> None:
        """Have modules and parameters that are new in the model take part."""
        ...

    def new_region(self, module: nn.Module) -> Region:
        """One for a call of ``module``, not open yet."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """With the carries of Kahan's sums."""
        ...

    def audit(self) -> Audit:
        """How every parameter, working copy, gradient and moment is held, and what sums are added up in.

        Working copies are read as a forward reads them; a gradient or state that is not there yet is left
        out. The promises, by the recipe:

        - weights are FP32, on the grid of ``master`` where that is narrower; in a plain 16-bit program 16-bit
        - the region reads them in ``store`` (FP32 for norms), bit for bit the weight as it is now
        - gradients are held as the weights are
        - optimizer state is FP32, or kept in ``moments``; the optimizers hold the very tensors that are the
          model's parameters, and every one that requires a gradient; their steps are looked at
        - where dot products add in FP32, no setting of torch has them add in less

        FP64 and integer parameters go their own way. Call it between steps; it takes a cast of each weight.

        Raises:
            BrokenPromiseError: one is not kept: parameter, what was found, what was promised, what to do.
                ``error.audit`` is the whole table.
            SwitchError: called inside a forward, or after `off`.

        >>> import torch, halfstep
        >>> model = torch.nn.Linear(4, 2)
        >>> s = halfstep.switch(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe="bf16")
        >>> print(s.audit().rows[0].weight, s.audit().rows[0].working)
        fp32 bf16
        >>> model = model.half()
        >>> s.audit()
        Traceback (most recent call last):
        halfstep.errors.BrokenPromiseError: recipe bf16 is not kept: weight of weight is fp16; promised: ...
        """
        if current() is not None:
            raise SwitchError("switch.audit() was called inside forward; call it between steps")
        self.take_in()
        return _Auditor(self).result().check()


class _Auditor:
    """One audit in the making."""

    def __init__(self, switch: Audited) -> None:
        self.switch = switch
        self.recipe = switch.recipe
        self.plan = switch.plan
        self.plain = self.recipe.optimizer.name != "fp32"
        self.master = self.plan.low if self.plain else torch.float32
        self.carries: Mapping[str, Tensor] = (
            switch.state_dict().get("between_steps", {}).get("carries", {})
        )
        self.names: dict[int, list[str]] = {}
        self.parameters: dict[int, nn.Parameter] = {}
        for name, p in switch.model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(p), []).append(name)
            self.parameters[id(p)] = p
        self.optimizers = _labels(switch.optimizers)
        self.broken: list[BrokenPromise] = []

    def result(self) -> Audit:
        """All that there is to say."""
        working = self._working()
        rows = [self._row(p, working.get(id(p), Held())) for p in self.parameters.values()]
        foreign = [text for text, _ in self._foreign()]
        self._check_settings()
        for label, optimizer in self.optimizers:
            if Guard.is_over(optimizer, self.switch):
                continue
            self._breach(
                f"optimizer {label}",
                "without the hooks that keep gradients that are not finite from it",
                "a step that overflows is skipped",
                "Something has cleared its step hooks: switch.off(), and switch anew",
            )
        return Audit(
            recipe=str(self.recipe),
            device=self.plan.device,
            loss_scale=self.switch.loss_scale,
            optimizers=tuple(label for label, _ in self.optimizers),
            rows=tuple(rows),
            computing=self.plan.rows,
            foreign=tuple(foreign),
            broken=tuple(self.broken),
            notes=rounded_partial_sums(self.plan),
        )

    def _breach(self, what: str, found: object, promised: object, remedy: str) -> None:
        self.broken.append(
            BrokenPromise(what=what, found=str(found), promised=str(promised), remedy=remedy)
        )

    # -- parameters ---------------------------------------------------------------------------------

    def _row(self, p: nn.Parameter, working: Held) -> AuditRow:
        name, *also = self.names[id(p)]
        return AuditRow(
            parameter=name,
            also=tuple(also),
            shape=tuple(p.shape),
            trained=p.requires_grad,
            weight=self._weight(p, name),
            working=working,
            gradient=self._gradient(p, name),
            optimizers=self._holders(p, name),
            state=self._state(p, name),
        )

    def _goes_its_own_way(self, p: Tensor) -> bool:
        return p.dtype not in (torch.float32, *_NARROW)

    def _weight(self, p: nn.Parameter, name: str) -> Held:
        held, format = Held.of(p.dtype), self.recipe.master
        if self._goes_its_own_way(p):
            return held
        if p.dtype != self.master:
            self._breach(
                f"weight of {name}",
                held,
                f"{Held.of(self.master)} master weights",
                "It was turned after the switch: model.half(), .to(dtype), .data = ...; what its bits lost "
                f"stays lost. {_AS_IT_WAS}",
            )
        elif not self.plain and format != _FP32:
            if _is_on_grid(local(p.detach()), format):
                return Held.of(p.dtype, format)
            self._breach(
                f"weight of {name}",
                f"{held} with numbers that are not of {format}",
                f"weights kept in {format} between steps",
                "It was written to from outside of the optimizer. Round it, "
                f'halfstep.round_to(p, "{format}"), or let a step do so',
            )
        return held

    def _gradient(self, p: nn.Parameter, name: str) -> Held:
        if p.grad is None:
            return Held()
        held = Held.of(p.grad.dtype)
        if not self._goes_its_own_way(p) and p.grad.dtype != self.master:
            self._breach(
                f"gradient of {name}",
                held,
                f"{Held.of(self.master)}, true and added up so",
                "It was made while the parameter was in another dtype. Set it to None (zero_grad), with the "
                "parameter in its own dtype again",
            )
        return held

    def _working(self) -> dict[int, Held]:
        """What a forward reads each parameter as; read in a region of its own."""
        found: dict[int, Held] = {}
        if not self.plan.active:
            return {key: Held.of(p.dtype) for key, p in self.parameters.items()}
        region = self.switch.new_region(self.switch.model)
        with region.opened(), overrides.autocast(self.plan), torch.enable_grad():
            for path, module in self.switch.model.named_modules():
                for name, p in module._parameters.items():
                    if p is not None and p.dtype in (self.master, torch.float64):
                        place = f"{path}.{name}" if path else name
                        found[id(p)] = self._read(module, name, p, place)
        region.clear()
        return found

    def _read(self, module: nn.Module, name: str, p: Tensor, place: str) -> Held:
        if not isinstance(module._parameters, LazyParameters):
            if p.requires_grad:
                self._breach(
                    f"working copy of {place}",
                    f"the {Held.of(p.dtype)} weight itself: {type(module).__name__} takes no part",
                    f"a copy in {self.recipe.store}",
                    "TorchScript modules cannot be reached: use the module that it was made of",
                )
            return Held.of(p.dtype)
        with torch.no_grad():
            copy = module._parameters[name]
        copy, dtype = copy.detach(), self.plan.low
        if p.dtype != torch.float32 or keeps_fp32(module, name):
            dtype = p.dtype
        held = Held.of(copy.dtype)
        sharded = copy is p or module._parameters.fully_sharded
        if not sharded and (copy.dtype != dtype or not _same(copy, p.detach().to(dtype))):
            self._breach(
                f"working copy of {place}",
                f"{held}, and not its weight rounded",
                f"the weight as it is now, in {Held.of(dtype)}",
                "This is a fault of halfstep: please report it",
            )
        return held

    # -- the optimizer's side -----------------------------------------------------------------------

    def _holders(self, p: nn.Parameter, name: str) -> tuple[str, ...]:
        holders = []
        for label, optimizer in self.optimizers:
            for g, group in enumerate(optimizer.param_groups):
                if any(q is p for q in group["params"]):
                    several = len(optimizer.param_groups) > 1
                    holders.append(f"{label} group {g}" if several else label)
        if p.requires_grad and self.optimizers and not holders:
            alike = [text for text, t in self._foreign() if t.shape == p.shape]
            why = f"; {alike[0]} has its shape and is not it" if alike else ""
            self._breach(
                f"parameter {name}",
                f"trained, and held by no optimizer of the switch{why}",
                "the optimizer updates the model's own parameters",
                "Build the optimizer after the parameter was replaced, on model.parameters(), and give it to "
                "halfstep.switch; freeze what is not to be trained: requires_grad_(False)",
            )
        return tuple(holders)

    def _foreign(self) -> Iterator[tuple[str, Tensor]]:
        """What the optimizers hold and the model does not."""
        for _, optimizer in self.optimizers:
            for g, group in enumerate(optimizer.param_groups):
                for k, t in enumerate(group["params"]):
                    if id(t) not in self.parameters:
                        shape = "x".join(map(str, t.shape)) or "()"
                        yield f"{place_of(optimizer, g, k)}, {shape} {Held.of(t.dtype)}", t

    def _state(self, p: nn.Parameter, name: str) -> dict[str, Held]:
        found: dict[str, Held] = {}
        for _, optimizer in self.optimizers:
            for key, value in optimizer.state.get(p, {}).items():
                tensors = value if isinstance(value, (list, tuple)) else [value]
                for t in tensors:
                    if isinstance(t, ShardInBlocks):
                        t = t.blocks
                    if isinstance(t, BlockTensor) or (isinstance(t, Tensor) and t.dim()):
                        lists = tensors is value
                        found[str(key)] = self._moment(p, t, f"{key} of {name}", lists)
        if name in self.carries:
            found["carry"] = Held.of(self.carries[name].dtype)
        return found

    def _moment(self, p: Tensor, t: Tensor | BlockTensor, what: str, in_list: bool) -> Held:
        format = self.recipe.moments
        if isinstance(t, BlockTensor):
            held = Held.of(t.values.dtype, t.format)
            if t.format != format:
                self._breach_moment(what, held)
            return held
        held = Held.of(t.dtype)
        known = (torch.float32, *STORED.values())
        if in_list or t.dtype not in known or self._goes_its_own_way(p):
            return held
        if self.plain or format == _FP32:
            if t.dtype != self.master:
                self._breach_moment(what, held)
        elif t.dtype == torch.float32:  # as it was loaded; or torch has no dtype for the format
            if isinstance(format, BlockFormat):
                return held
            if _is_on_grid(local(t), format):
                return Held.of(t.dtype, format)
            self._breach_moment(what, f"{held} with numbers that are not of {format}")
        elif t.dtype != STORED.get(str(format)):
            self._breach_moment(what, held)
        return held

    def _breach_moment(self, what: str, found: object) -> None:
        format = Held.of(self.master) if self.plain else self.recipe.moments
        self._breach(
            f"optimizer state {what}",
            found,
            f"{format}",
            "It was loaded into weights of another dtype, or is of another recipe: load it again with the "
            "model switched. If the optimizer keeps it so by design, say so in the recipe: moments=bf16",
        )

    # -- sums ---------------------------------------------------------------------------------------

    def _check_settings(self) -> None:
        """Settings of torch that have its kernels multiply or add in less than the recipe says."""
        if not self.recipe.adds_in_fp32 or self.recipe.is_identity:
            return
        dots = self.plan.rows[0]
        precision = torch.get_float32_matmul_precision()
        if dots.executor is Executor.EMULATED and precision != "highest":
            self._breach(
                "the FP32 kernel behind emulated dot products",
                f'at torch.set_float32_matmul_precision("{precision}")',
                "exact products of rounded operands, added in fp32",
                'Say torch.set_float32_matmul_precision("highest")',
            )
        if self.plan.device == "cuda" and torch.backends.cuda.matmul.allow_fp16_accumulation:
            self._breach(
                "the accumulator of dot products",
                "fp16: torch.backends.cuda.matmul.allow_fp16_accumulation is True",
                "fp32",
                "Set it to False, or say what is meant: fp16:accumulate=fp16",
            )


def rounded_partial_sums(plan: Plan) -> tuple[str, ...]:
    """A line where cuBLAS may add less than FP32: torch's default, so it is a note and no breach.

    Source: PyTorch, "Numerical accuracy", reduced precision reduction for FP16 and BF16 GEMMs.
    """
    store = plan.recipe.store.name
    settings = torch.backends.cuda.matmul
    flag = {
        "fp16": "allow_fp16_reduced_precision_reduction",
        "bf16": "allow_bf16_reduced_precision_reduction",
    }.get(store, "")
    native = plan.rows[0].executor is Executor.NATIVE and plan.recipe.adds_in_fp32
    if plan.device != "cuda" or not native or not flag or not getattr(settings, flag):
        return ()
    note = (
        f"torch.backends.cuda.matmul.{flag} is True, torch's default: a product whose long sums cuBLAS "
        f"splits may have the parts rounded to {store} before they are added. False: all in fp32"
    )
    return (note,)


def _labels(optimizers: tuple[Optimizer, ...]) -> list[tuple[str, Optimizer]]:
    """Each with its class, and a number where there are several of a class."""
    kinds = [type(o).__name__ for o in optimizers]
    return [
        (f"{kind} {kinds[:k].count(kind) + 1}" if kinds.count(kind) > 1 else kind, o)
        for k, (kind, o) in enumerate(zip(kinds, optimizers, strict=True))
    ]


def _is_on_grid(t: Tensor, format: Format) -> bool:
    return _same(t, ops.round_to(t, format))


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))
