"""One call of one operation: which of its operands are rounded, how it is run, what its results are."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfstep.switching.emulation.numbers import (
    ACTIVATION,
    CARRIERS,
    GRADIENT,
    LOW,
    ROLES,
    WEIGHT,
    WIDE,
    to,
)
from halfstep.switching.emulation.operations import Operation

if TYPE_CHECKING:
    from halfstep.switching.emulation.mode import EmulationMode

__all__ = ["NO_KERNEL", "Call"]

NO_KERNEL: Any = object()
_ADD = torch.ops.aten.add.Tensor
_SCALARS = (int, float, bool, type(None))
_NOTHING: tuple[int, ...] = ()


class Call:
    """The operands of one call as the emulator sees them.

    ``node`` is the graph node whose backward it is a part of, None in a forward.
    """

    __slots__ = (
        "all_low",
        "all_marked",
        "args",
        "floats",
        "has_numbers",
        "is_left_alone",
        "it",
        "known",
        "kwargs",
        "mode",
        "node",
        "role",
        "scale",
        "singles",
        "zero_dim",
    )

    def __init__(
        self,
        mode: EmulationMode,
        it: Operation,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        node: Any,
    ) -> None:
        self.mode, self.it, self.args, self.kwargs, self.node = mode, it, args, kwargs, node
        self.floats: list[Tensor] = []
        """Carriers that have dimensions."""
        self.known: dict[int, int] = {}
        """Their marks, by id."""
        self.zero_dim = False
        """A carrier is a single number."""
        self.singles: list[Tensor] = []
        """Those that are."""
        self.has_numbers = False
        """A Python float is among the arguments."""
        sparse = False
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, Tensor):
                if value.dtype in CARRIERS:
                    if value.layout is not torch.strided:
                        sparse = True
                    elif value.dim():
                        self.floats.append(value)
                    else:
                        self.zero_dim = True
                        self.singles.append(value)
            elif type(value) is list and value and type(value[0]) is not int:
                for t in value:
                    if isinstance(t, Tensor) and t.dtype in CARRIERS:
                        if t.layout is not torch.strided:
                            sparse = True
                        elif t.dim():
                            self.floats.append(t)
                        else:
                            self.zero_dim = True
                            self.singles.append(t)
            elif type(value) is float:
                self.has_numbers = self.has_numbers or value != 0.0
            elif type(value) is int and not isinstance(value, bool):
                self.has_numbers = self.has_numbers or abs(value) > 1
        self.is_left_alone = sparse or not self.floats
        if not self.is_left_alone:
            self._look()

    def _look(self) -> None:
        """Marks of all carriers: what role the results have, and whether they are of the store format."""
        mode = self.mode
        backward = self.node is not None
        known = self.known
        role = WEIGHT
        low, marked, others = True, True, False
        for t in self.floats:
            known[id(t)] = marks = mode.seen(t, backward)
            if marks & GRADIENT:
                role = GRADIENT
            elif marks & ACTIVATION and role is not GRADIENT:
                role = ACTIVATION
            if not marks & LOW:
                marked = False
            if marks & WEIGHT and mode.masters_wide:
                continue
            others = True
            low = low and self._is_low(marks)
            if not (backward or mode.stores_all):
                mode.remember(t, marks)
        if not backward:
            for t in self.singles:
                mode.marks.note_single(t)
        elif self.singles and not all(mode.marks.is_of_forward(t) for t in self.singles):
            role = GRADIENT
        if backward:
            low = mode.is_low_node(self.node)
            if self.it.op is _ADD and len(self.floats) == 2 and not mode.stores_all:
                low = marked  # gradients that meet at a tensor with several readers
        elif not others:
            # Weights alone: copied as they are, computed with as a model does.
            low = torch.is_grad_enabled() and not self.it.moves
        elif self.it.writes and self.args and isinstance(self.args[0], Tensor):
            low = self.is_low(self.args[0])  # what is written into decides
        if role == WEIGHT and not self.it.moves:
            role = ACTIVATION  # made of weights, and no copy of one
        low = low or self.it.is_dot
        self.role, self.all_low, self.all_marked = role, low, marked
        self.scale = mode.scale() if role == GRADIENT and low else 1.0

    def marks_of(self, t: Tensor) -> int:
        """The marks of a carrier with dimensions."""
        marks = self.known.get(id(t))
        return self.mode.marks.of(t) if marks is None else marks

    def _is_low(self, marks: int) -> bool:
        return not marks & WIDE and (self.mode.stores_all or bool(marks & LOW))

    def is_low(self, t: Tensor) -> bool:
        """True for numbers of the store format; false for a single one, and for FP32 masters."""
        if not t.dim() or t.dtype not in CARRIERS:
            return False
        return self._is_written_low(self.marks_of(t))

    def _is_written_low(self, marks: int) -> bool:
        if marks & WEIGHT and self.mode.masters_wide:
            return bool(marks & LOW)
        return self._is_low(marks)

    def pass_on(self, out: Any) -> None:
        """What is made of single numbers of the forward alone is one, too."""
        if not isinstance(out, Tensor) or out.dim() or out.dtype not in CARRIERS:
            return
        marks = self.mode.marks
        if self.node is None or all(map(marks.is_of_forward, self.singles)):
            marks.note_single(out)

    # -- operands -----------------------------------------------------------------------------------

    def rounded(self, t: Tensor) -> Tensor:
        """``t`` on the grid, where the call is of the store format and ``t`` is not on it."""
        if not t.dim() or not isinstance(t, Tensor) or t.dtype not in CARRIERS:
            return t
        marks = self.marks_of(t)
        if marks & (LOW | WIDE):
            return t
        if marks & WEIGHT and self.it.is_wide and self.mode.masters_wide:
            return t  # FP32 operations read the masters
        follows = marks & WEIGHT or self.node is not None or self.it.is_dot
        low = self.all_low if follows else self._is_low(marks)
        if not low:
            return t
        return self.mode.numbers.stored(t, self.scale if marks & GRADIENT else 1.0)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with ``change`` done to the carriers that are only read."""
        writes = self.it.writes

        def value_of(value: Any) -> Any:
            if type(value) in _SCALARS:
                return value
            if isinstance(value, Tensor):
                return change(value) if value.dtype in CARRIERS else value
            if type(value) is list and value and isinstance(value[0], (Tensor, type(None))):
                return [value_of(v) for v in value]
            return value

        args = tuple(
            [a if writes and k in writes else value_of(a) for k, a in enumerate(self.args)]
        )
        outs = self.it.outs
        kwargs = {k: v if k in outs else value_of(v) for k, v in self.kwargs.items()}
        return args, kwargs

    def saturated(self, limit: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with finite numbers, and single ones in tensors, held within the format."""

        def number(value: Any) -> Any:
            if type(value) is float and abs(value) != float("inf"):
                return max(-limit, min(limit, value))
            if isinstance(value, Tensor) and not value.dim() and value.dtype in CARRIERS:
                finite = value.clamp(-limit, limit)
                return torch.where(value.isinf(), value, finite)
            return value

        args = tuple([number(a) for a in self.args])
        return args, {k: number(v) for k, v in self.kwargs.items()}

    # -- running ------------------------------------------------------------------------------------

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation itself, in the carriers' dtype."""
        return self.it.run(*args, **kwargs)

    @property
    def has_double(self) -> bool:
        """True where a carrier is FP64, and so the result."""
        return torch.float64 in [t.dtype for t in self.floats]

    @property
    def is_linear(self) -> bool:
        """True where its results are linear in its one gradient, the first argument: scaled as it is."""
        if not self.it.name.endswith("backward"):
            return False
        return not any(self.marks_of(t) & GRADIENT for t in self.floats if t is not self.args[0])

    def native(self) -> Any:
        """The operation in torch's kernel of the store format's dtype, or `NO_KERNEL`."""
        it, mode = self.it, self.mode
        low = mode.numbers.dtype
        double = False
        scale, gradient = self.scale, self.args[0] if self.args else None

        def cast(t: Tensor) -> Tensor:
            nonlocal double
            if not t.dim() or self.marks_of(t) & WIDE:
                return t
            double = double or t.dtype is torch.float64
            return to(t if scale == 1.0 or t is not gradient else t * scale, low)

        args, kwargs = self.mapped(cast)
        copies = []
        if it.writes:
            changed = list(args)
            for k in it.writes:
                if k < len(args) and isinstance(args[k], Tensor) and args[k].dtype in CARRIERS:
                    changed[k] = cast(args[k])
                    copies.append((args[k], changed[k]))
            args = tuple(changed)
        for name in it.outs:
            carrier = kwargs.get(name)
            if isinstance(carrier, Tensor) and carrier.dtype in CARRIERS:
                kwargs[name] = torch.empty_like(carrier, dtype=low)
                copies.append((carrier, kwargs[name]))
        try:
            out = it.run(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            it.no_kernel = "not implemented for" in str(error)
            return NO_KERNEL
        for carrier, copy in copies:
            if carrier.shape != copy.shape:
                carrier.resize_(copy.shape)
            carrier.copy_(copy)
            mode.set_marks(carrier, (mode.marks.of(carrier) & ROLES) | LOW)
        wide = torch.float64 if double else torch.float32

        def back(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return [back(v) for v in t] if isinstance(t, (list, tuple)) else t
            for carrier, copy in copies:
                if t is copy:
                    return carrier
            if t.dtype is low:
                t = to(t, wide)
                t = t if scale == 1.0 else t.div_(scale)
                mode.set_marks(t, self.role | LOW)
            elif t.dtype in CARRIERS:
                mode.set_marks(t, self.role)
            return t

        result = back(out)
        return tuple(result) if isinstance(out, tuple) else result

    # -- results ------------------------------------------------------------------------------------

    def results(
        self,
        out: Any,
        *,
        low: bool = True,
        rounds: bool = True,
        wide: Container[int] = _NOTHING,
        keeps: bool = False,
        wanted: torch.dtype | None = None,
    ) -> Any:
        """The results, rounded where they are ``low``, and marked.

        ``wide``: those that stay wide; ``keeps``: and are never rounded where they are read.
        """
        it = self.it
        if it.writes or it.outs:
            self._write_back(low, rounds)
            if not it.writes_beside:
                return out
        if isinstance(out, Tensor):
            return self._result(out, low, rounds, False, wanted)
        if isinstance(out, (tuple, list)):
            kind = type(out)
            each = [
                self._result(t, low and k not in wide, rounds, keeps and k in wide, wanted)
                for k, t in enumerate(out)
            ]
            return kind(each) if kind in (tuple, list) else tuple(each)
        return out

    def _result(
        self, t: Any, low: bool, rounds: bool, keeps: bool, wanted: torch.dtype | None
    ) -> Any:
        if not isinstance(t, Tensor) or t.dtype not in CARRIERS:
            return t
        if not t.dim() or t.layout is not torch.strided:
            if self.role != GRADIENT:
                self.mode.marks.note_single(t)
            return t if wanted is None else to(t, wanted)
        if low and rounds:
            t = self.mode.numbers.stored(t, self.scale)
        if wanted is not None and t.dtype is not wanted:
            t = to(t, wanted)
        mark = LOW if low else (WIDE if keeps and self.mode.stores_all else 0)
        self.mode.marks.set(t, self.role | mark)
        return t

    def _write_back(self, low: bool, rounds: bool) -> None:
        """Round what was written into, where its numbers are of the store format."""
        it, mode = self.it, self.mode
        targets: list[Any] = [self.args[k] for k in it.writes if k < len(self.args)]
        targets += [self.kwargs.get(name) for name in it.outs]
        for target in targets:
            for t in target if isinstance(target, list) else (target,):
                if not isinstance(t, Tensor) or t.dtype not in CARRIERS or not t.dim():
                    continue
                if t.layout is not torch.strided:
                    continue
                marks = mode.marks.of(t)
                into_low = low if it.outs else self._is_written_low(marks)
                if not into_low:
                    if marks & LOW:
                        mode.marks.set(t, marks & ~LOW)
                    continue
                if rounds or not marks & LOW:
                    scale = self.scale if marks & GRADIENT else 1.0
                    t.copy_(mode.numbers.stored(t, scale))
                mode.marks.set(t, (marks & ROLES or self.role) | LOW)
