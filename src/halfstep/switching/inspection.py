"""Each operation of a forward and a backward looked at: which was the first to make inf or NaN."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from halfstep.switching.structure import tensors_in

__all__ = ["Finding", "Inspection", "first_bad_row", "is_finite"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Where something stopped being finite.

    ``phase``: ``weights``, ``data``, ``forward``, ``loss``, ``backward``, or ``unknown``. ``module``: path in
    the model, empty for the model itself. ``operation``: as torch calls it. ``operand``: ``input``,
    ``weight``, ``bias`` or ``grad``, the largest that went in where all are finite. ``index``: the first
    place in the batch that is concerned, -1 where it cannot be told. ``remedies``: what would have been
    finite.
    """

    phase: str
    module: str
    operation: str
    operand: str
    index: int = -1
    detail: str = ""
    batch: tuple[int, int] = (0, 1)
    remedies: Mapping[str, bool] = field(default_factory=dict)

    @classmethod
    def none(cls) -> Finding:
        """Nothing could be looked at."""
        return cls.nothing("")

    @classmethod
    def nothing(cls, why: str) -> Finding:
        """Nothing was found, for a reason."""
        return cls(phase="unknown", module="", operation="", operand="", detail=why)

    @classmethod
    def all_finite(cls) -> Finding:
        """Run again, everything is finite."""
        return cls.nothing(
            "run again, forward and backward are finite: the gradient was changed after the backward "
            "(a hook, a clipping, a write to p.grad)"
        )

    @classmethod
    def of_loss(cls) -> Finding:
        """Run again, everything is finite, and the loss is not."""
        return cls(
            phase="loss",
            module="",
            operation="",
            operand="",
            detail="the model's outputs are finite, and the loss function made what is not of them",
        )

    def of_batch(self, k: int, count: int) -> Finding:
        """In the forward number ``k`` of ``count``."""
        return replace(self, batch=(k, count))

    def with_remedies(self, remedies: Mapping[str, bool]) -> Finding:
        """With what would have been finite."""
        return replace(self, remedies=remedies)

    def __str__(self) -> str:
        where = []
        if self.operation:
            where.append(f"{self.phase} of {self.module or 'the model'}: {self.operation}")
        elif self.module:
            where.append(f"{self.phase}: {self.module}")
        elif self.phase != "unknown":
            where.append(self.phase)
        if self.operand:
            where.append(f"operand {self.operand}")
        if self.index >= 0:
            where.append(f"batch index {self.index}")
        if self.batch[1] > 1 and self.phase != "unknown":
            where.append(f"micro-batch {self.batch[0] + 1} of {self.batch[1]}")
        text = ", ".join(where)
        text = f"{text}. {self.detail}" if text and self.detail else text or self.detail
        if self.remedies:
            fits = [name for name, finite in self.remedies.items() if finite]
            fails = [name for name, finite in self.remedies.items() if not finite]
            said = [f"with {' or '.join(fits)} it is finite"] if fits else []
            said += [f"with {' or '.join(fails)} it is not"] if fails else []
            text += f". Run again: {', '.join(said)}"
        return text


def is_finite(t: Tensor) -> bool:
    """True where no value is inf or NaN; of sparse tensors, those that are held; True for integers."""
    if t.is_sparse:
        t = t._values()
    return not (t.is_floating_point() or t.is_complex()) or bool(torch.isfinite(t).all())


def first_bad_row(t: Tensor, batch: int) -> int:
    """The first place in the batch with a value that is not finite; rows may be folded into ``batch``."""
    if t.is_sparse or not t.dim() or batch < 1 or t.size(0) % batch:
        return -1
    bad = ~torch.isfinite(t.detach()).reshape(t.size(0), -1).all(1)
    return int(bad.nonzero()[0]) // (t.size(0) // batch) if bool(bad.any()) else -1


# What hands its first argument on, in another shape or dtype.
_SHAPES = (
    "t",
    "transpose",
    "permute",
    "view",
    "_unsafe_view",
    "reshape",
    "expand",
    "alias",
    "detach",
)
_PARTS = ("unsqueeze", "squeeze", "slice", "select", "as_strided", "narrow", "split", "chunk")
_SAME = frozenset((*_SHAPES, *_PARTS, "_to_copy", "clone"))
# What makes infinities because it is asked to: masks.
_MEANT = frozenset(
    ("masked_fill", "full", "full_like", "scalar_tensor", "where", "fill", "new_full")
)
# What hands back logarithms of probabilities behind its result, -inf where there is no path.
_LOGARITHMS = frozenset(("_ctc_loss", "_cudnn_ctc_loss"))
_WRITES = frozenset(("copy", "index_put", "_index_put_impl", "index_fill", "scatter"))
# Where a tensor of one number is from that the program wrote down.
_CONSTANT = ((), ("lift_fresh",))
_EMPTY = frozenset(("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"))
_DOTS = frozenset(("linear", "mm", "bmm", "addmm", "baddbmm", "convolution", "matmul"))
_ALIASES = {"_linear_pointwise": "linear"}
_NAMES = {"_RowsBackward": "linear", "_LeaveBackward": "entering", "_EnterBackward": "leaving"}


class Inspection(TorchDispatchMode):
    """Looks at each operation while on; ``finding`` is the first that made inf or NaN of finite numbers.

    Operations whose input was not finite already pass it on: they are not the producers. ``suspect`` is the
    first that made NaN of infinities that were meant (a softmax of a row that is all masked) or was told to
    (a fill with NaN): what it makes may be thrown away, so it counts where nothing else is found.
    """

    def __init__(self, model: nn.Module, batch: int) -> None:
        super().__init__()
        self.finding: Finding | None = None
        self.suspect: Finding | None = None
        self._batch = batch
        self._names = {m: name for name, m in model.named_modules()}
        self._stack: list[str] = []
        # (number of the graph node from which on, module path): the nodes of a forward in order.
        self._marks: list[tuple[int, str]] = []
        self._backward = False
        self._roles: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for name, p in model.named_parameters():
            self._roles[p] = "bias" if name.rpartition(".")[2].startswith("bias") else "weight"
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles = [
            modules.register_module_forward_pre_hook(self._entered),
            modules.register_module_forward_hook(self._left, always_call=True),
        ]
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for handle in self._handles:
            handle.remove()

    def backward(self) -> None:
        """From now on it is the backward."""
        self._backward = True

    def _entered(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._names.get(module, self._stack[-1] if self._stack else ""))
        self._mark()

    def _left(self, module: nn.Module, args: Any, out: Any) -> None:
        if self._stack:
            self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        number: int = torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]
        self._marks.append((number, self._stack[-1] if self._stack else ""))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name: str = func._schema.name.rpartition("::")[2].removesuffix("_")
        name = _ALIASES.get(name, name)
        # An operation in place overwrites what it was given: look before.
        given = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
        finite = self.finding is None and name not in _MEANT and all(is_finite(t) for t in given)
        numbers = self.finding is None and not any(
            bool(t.isnan().any()) for t in given if t.dim() or self._origin(t)[:1] not in _CONSTANT
        )
        largest = self._largest(given) if finite and given else ""
        out = func(*args, **kwargs)
        made = [t for t in tensors_in(out) if t.is_floating_point()]
        # The bias that is added to a dot product in place belongs to it.
        bias = name == "add" and bool(made) and made[0] is given[0]
        bias = bias and bool(_DOTS.intersection(self._origin(made[0])))
        same = name in _SAME or name == "copy" or bias
        for t in made:
            if same and given:
                role = self._roles.get(given[-1] if name == "copy" else given[0])
                if role is not None:
                    self._roles[t] = role
            self._made[t] = (same and given and self._origin(given[0])) or (name, largest)
        if finite and made and name not in _EMPTY:
            looked_at = made[:1] if name in _LOGARITHMS else made
            bad = next((t for t in looked_at if not is_finite(t)), None)
            if bad is not None:
                self.finding = self._found(name, bad, largest, "finite numbers")
        elif numbers and name not in _EMPTY and name != "lift_fresh":
            self._suspect(name, made)
        elif self.suspect is not None and self.suspect.index < 0:
            self._place(made)
        return out

    def _suspect(self, name: str, made: list[Tensor]) -> None:
        """Note the first NaN that was made of infinities, or because the program said so."""
        bad = next((t for t in made if bool(t.isnan().any())), None)
        if bad is None or self.suspect is not None or name in _LOGARITHMS:
            return
        of = "what it was told to write" if name in _MEANT or name in _WRITES else "infinities"
        found = self._found(name, bad, "", of)
        whole = bad.dim() > 1  # else it may be a part that was written to
        self.suspect = replace(
            found, operand=found.operand or "input", index=found.index if whole else -1
        )

    def _place(self, made: list[Tensor]) -> None:
        """The place in the batch of a suspect that did not show it: a part of a tensor was written to."""
        rows = [first_bad_row(t, self._batch) for t in made if t.dim() > 1]
        if self.suspect is not None and rows:
            self.suspect = replace(self.suspect, index=max(rows))

    def counts(self, outcome: Iterable[Tensor]) -> Finding | None:
        """What was found, the suspect where ``outcome`` has NaN; it is forgotten where that is finite."""
        if self.finding is None and any(bool(t.isnan().any()) for t in outcome):
            self.finding = self.suspect
        self.suspect = None
        return self.finding

    def _largest(self, given: list[Tensor]) -> str:
        """The role of the operand with the largest magnitude."""
        sizes = [float(t.detach().abs().max()) if t.numel() else 0.0 for t in given]
        t = given[max(range(len(sizes)), key=sizes.__getitem__)]
        return self._roles.get(t) or ("grad" if self._backward else "input")

    def _origin(self, t: Tensor) -> Any:
        """The operation that made ``t``'s numbers and its largest operand; nothing for what came in."""
        return self._made.get(t) or ()

    def _found(self, name: str, bad: Tensor, largest: str, of: str) -> Finding:
        # A rounding to 16 bits that overflows is of the operation that made the number.
        operation, operand = self._origin(bad) or (name, largest)
        module = self._stack[-1] if self._stack else ""
        if self._backward:
            operand = "grad"
            node = torch._C._current_autograd_node()  # pyright: ignore[reportAttributeAccessIssue]
            if node is not None:
                kind = node.name()
                operation = _NAMES.get(
                    kind, kind.removesuffix("0").removesuffix("Backward")
                ).lower()
                k = bisect_right(self._marks, (node._sequence_nr(), "\U0010ffff")) - 1
                module = self._marks[k][1] if k >= 0 else ""
        kind = "NaN" if bool(bad.isnan().any()) else "inf"
        dtype = str(bad.dtype).removeprefix("torch.")
        return Finding(
            phase="backward" if self._backward else "forward",
            module=module,
            operation=operation,
            operand=operand,
            index=first_bad_row(bad, self._batch),
            detail=f"It made {kind} in {dtype} of {of}",
        )
