"""The region: what lies between entering the outermost forward of a switched model and leaving it.

While a region is open on a thread, reading a parameter of an adopted module gives its rounded working
copy (`LazyParameters`), made once a forward. The masters never move: ``parameters()``, ``state_dict()``
and an exception in the middle of a forward see FP32 masters at any time.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import (  # pyright: ignore[reportMissingModuleSource]
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from halfstep.errors import SwitchError
from halfstep.recipe import Recipe
from halfstep.switching import fast_path
from halfstep.switching.boundary import Gate, lower_many
from halfstep.switching.emulated import Emulator
from halfstep.switching.met import Met
from halfstep.switching.plan import Plan
from halfstep.switching.ranks import is_sharded
from halfstep.switching.roles import Roles
from halfstep.switching.structure import tensors_in

__all__ = [
    "LazyParameters",
    "Region",
    "autocast_set",
    "current",
    "graph_shape",
    "keeps_fp32",
    "loose_region",
    "reopening",
]

# Called with what a region gave, the region, and what it was given; True where gradients leave past its end.
GraphMender = Callable[[Any, "Region", Any], bool]

_local = threading.local()
_NARROW = (torch.float16, torch.bfloat16)
# Elements that share one graph node: a node a parameter would cost more than the cast of a small one.
_BUCKET = 1 << 21
# Where a cast of its own costs no more than a place in a bucket.
SMALL = 1 << 14


def current() -> Region | None:
    """The region open on this thread, or None."""
    return getattr(_local, "region", None)


class LazyParameters(dict):
    """A module's ``_parameters``: hands out working copies while a region is open, masters otherwise.

    Only reading one by key is lazy; ``items()`` and ``values()``, which ``parameters()`` and
    ``state_dict()`` use, give masters. Copies and pickles are plain dicts: a copied model is unswitched.
    """

    __slots__ = ("fp32", "fully_sharded", "sparse", "writes")

    def __init__(self, parameters: dict[str, Any], fp32: frozenset[str]) -> None:
        super().__init__(parameters)
        self.fp32 = fp32
        self.fully_sharded = False
        """Within fully_shard: what is sharded is for its own machinery; forward reads what it puts here."""
        self.sparse = False
        """Gradients may be sparse: an embedding's that is told so. torch's own cast has none for those."""
        self.writes = 0
        """How often a parameter was added, replaced or removed."""

    def __getitem__(self, key: str) -> Any:
        value = dict.__getitem__(self, key)
        region = getattr(_local, "region", None)
        if region is None or value is None or (self.fully_sharded and is_sharded(value)):
            return value
        return region.lower(value, self, key)

    def __setitem__(self, key: str, value: Any) -> None:
        region = getattr(_local, "region", None)
        if region is not None and isinstance(value, Tensor):
            value = region.master_of(value)
        if dict.get(self, key) is not value and not (self.fully_sharded and key in self):
            self.writes += 1
        dict.__setitem__(self, key, value)

    def __delitem__(self, key: str) -> None:
        self.writes += 1
        dict.__delitem__(self, key)

    def plain(self) -> dict[str, Any]:
        """A plain dict of the masters."""
        return dict(self.items())

    def __copy__(self) -> dict[str, Any]:
        return self.plain()

    def copy(self) -> dict[str, Any]:
        """A plain dict of the masters."""
        return self.plain()

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        import copy

        return copy.deepcopy(self.plain(), memo)

    def __reduce__(self) -> Any:
        return dict, (self.plain(),)


_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.utils.parametrize.ParametrizationList,
)


def keeps_fp32(module: nn.Module, name: str) -> bool:
    """True for parameters that FP32-class operations read: norms, parametrizations, weight_norm's pair."""
    return isinstance(module, _NORMS) or name.endswith(("weight_g", "weight_v", "_orig"))


class Region:
    """One open region: its plan, its gate, and the working copies made so far."""

    __slots__ = (
        "_autocast_device",
        "_copies",
        "_frozen_copies",
        "_low",
        "_masters",
        "buckets",
        "emulator",
        "first_node",
        "gate",
        "last_node",
        "loose",
        "lowers_through_boundary",
        "mend_graph",
        "met",
        "plan",
        "roled",
        "roles",
        "thread",
        "weights",
    )

    def __init__(
        self,
        plan: Plan,
        gate: Gate,
        scaled: bool,
        buckets: Buckets,
        mend_graph: GraphMender,
        roles: Roles,
        met: Met,
        *,
        loose: bool = False,
    ) -> None:
        self.plan = plan
        self.loose = loose
        """Of no model: a switched one that is called in it opens a region of its own."""
        self.met = met
        self.gate = gate
        self.mend_graph = mend_graph
        # At scale 1 a plain cast is a boundary: torch's own node turns the gradient to FP32.
        self.lowers_through_boundary = scaled
        self.buckets = buckets
        self.emulator = Emulator(plan.low, plan.accumulator)
        self._low = plan.low
        self._autocast_device = plan.device
        self._copies: dict[tuple[int, torch.dtype], Tensor] = {}
        self._frozen_copies: dict[tuple[int, torch.dtype, bool], Tensor] = {}
        self._masters: dict[int, tuple[Tensor, Tensor]] = {}
        self.roles = roles
        # Storage of a working copy -> its master: views of a weight are weights. Alive as long as the region.
        self.weights: dict[int, Tensor] = {}
        self.roled = roles.emulator(self.weight_name) if plan.reads_by_role else None
        self.thread = threading.get_ident()
        self.first_node = torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]
        self.last_node: int | None = None

    def lower(self, master: Tensor, owner: LazyParameters, key: str) -> Tensor:
        """The working copy of ``master``; the same one for every reader in this region."""
        dtype = self._low
        if master.dtype != torch.float32:
            if master.dtype in _NARROW and master.is_leaf and self.plan.wide_operations:
                raise SwitchError(
                    f"parameter {key} {tuple(master.shape)} is {master.dtype}: the masters are FP32. It was "
                    "turned to 16 bits while switched; the switch does that itself: leave the model in FP32"
                )
            dtype = master.dtype  # FP64 and complex ones go their own way, as in torch.autocast
        elif key in owner.fp32 or not torch.is_autocast_enabled(self._autocast_device):
            dtype = torch.float32  # an FP32 operation's parameter, or an FP32 island of the user's
        index = (id(master), dtype)
        copy = self._copies.get(index)
        if copy is not None:
            return copy
        if peek_interpreter_stack() is not None and not is_functorch_wrapped_tensor(master):
            with (
                temporarily_clear_interpreter_stack()
            ):  # first read inside of a torch.vmap: made outside of it
                return self.lower(master, owner, key)
        if not (torch.is_grad_enabled() and master.requires_grad):
            # Made without a graph: never to be handed to a reader that wants a gradient; and one made
            # in inference mode never to a reader outside of it.
            kind = (*index, torch.is_inference_mode_enabled())
            copy = self._frozen_copies.get(kind)
            if copy is None:
                copy = master.to(dtype)
                self._frozen_copies[kind] = copy
                self._remember(copy, master)
            return copy
        if master.grad_fn is not None and master.grad_fn._sequence_nr() >= self.first_node:
            # A weight computed in here, put in a parameter's place by torch.func.functional_call.
            copy = self._copies[index] = master.to(dtype)
            self._remember(copy, master)
            return copy
        bucket = self.buckets.of(master, dtype)
        if len(bucket) == 1 and not self.lowers_through_boundary and not owner.sparse:
            # At scale 1 torch's own cast is all the boundary there is; made where the weight is read, it
            # leaves the copy in the cache.
            copy = self._copies[index] = master.to(dtype)
            self._remember(copy, master)
            return copy
        copies = lower_many([m for m, _ in bucket], self.gate, tuple(d for _, d in bucket))
        for (m, d), c in zip(bucket, copies, strict=True):
            self._copies.setdefault((id(m), d), c)
            self._remember(c, m)
        return self._copies[index]

    def weight_name(self, t: Tensor) -> str:
        """The name of the parameter whose working copy ``t`` is, or a view of one; "" for others."""
        master = self.master_under(t)
        return "" if master is None else self.roles.name_of(master)

    def master_under(self, t: Tensor) -> Tensor | None:
        """The master whose working copy ``t`` is, or a view of one."""
        master = self.weights.get(t.untyped_storage()._cdata)
        return t if master is None and isinstance(t, nn.Parameter) else master

    def keeps(self, *tensors: Any) -> bool:
        """True for a dot product of these whose operands stay in the store format."""
        if self.roled is None:
            return True
        masters = [
            m for t in tensors if isinstance(t, Tensor) and (m := self.master_under(t)) is not None
        ]
        if masters:
            return any(id(m) in self.roles.kept for m in masters)
        return self.plan.recipe.keep.products

    def _remember(self, copy: Tensor, master: Tensor) -> None:
        if self.roled is not None:
            self.weights[copy.untyped_storage()._cdata] = master
        if copy is not master:
            self._masters[id(copy)] = (copy, master)

    def master_of(self, tensor: Tensor) -> Tensor:
        """The master whose working copy ``tensor`` is, or ``tensor`` itself."""
        known = self._masters.get(id(tensor))
        return tensor if known is None else known[1]

    def changed_copy(self) -> Tensor | None:
        """The master of a working copy that was written to in place, or None."""
        for copy, master in self._masters.values():
            # A fresh copy is at version 0; a view of its master counts the master's writes.
            if not copy.is_inference() and copy._version and not copy._is_view():
                return master
        return None

    def clear(self) -> None:
        """Drop the working copies; the graph keeps those that backward needs."""
        self._copies.clear()
        self._frozen_copies.clear()
        self._masters.clear()
        self.weights.clear()
        if self.roled is not None:
            self.roled.weights.close()
        self.last_node = torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open on this thread until the block is left, whatever leaves it.

        Raises:
            SwitchError: within `halfstep.emulate`.
        """
        if torch._C._len_torch_dispatch_stack():  # pyright: ignore[reportAttributeAccessIssue]
            _refuse_emulation(self.plan.recipe)
        before = getattr(_local, "region", None)
        fast_path.forbid()
        _local.region = self
        try:
            yield
        finally:
            _local.region = before
            fast_path.allow()

    def again(self) -> Region:
        """A region like this one for a recomputation: same plan and gate, working copies made anew."""
        return Region(
            self.plan,
            self.gate,
            self.lowers_through_boundary,
            SINGLES,
            self.mend_graph,
            self.roles,
            self.met,
            loose=self.loose,
        )


class Buckets:
    """Parameters in groups that are lowered together, in the order of ``parameters()``.

    One graph node a bucket costs less than one a parameter; a bucket that is not too large lets the
    optimizer's side of a backward start before the last gradient is there.
    """

    __slots__ = ("_of",)

    def __init__(self, masters: list[tuple[Tensor, torch.dtype]]) -> None:
        self._of: dict[int, tuple[weakref.ref[Tensor], list[tuple[Tensor, torch.dtype]]]] = {}
        bucket: list[tuple[Tensor, torch.dtype]] = []
        size = 0
        for master, dtype in masters:
            if master.dtype != torch.float32:
                continue
            if size + master.numel() > _BUCKET and bucket:
                bucket, size = [], 0
            bucket.append((master, dtype))
            size += master.numel()
            self._of[id(master)] = (weakref.ref(master), bucket)

    def of(self, master: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, torch.dtype]]:
        """All that is lowered together with ``master``; just itself where it is in no bucket.

        A parameter with gradient hooks is lowered by itself: torch calls the hooks of all that share a
        node, with None for a parameter that forward did not use.
        """
        known = self._of.get(id(master))
        if known is None or known[0]() is not master:
            return [(master, dtype)]
        members = [
            (p, d)
            for p, d in known[1]
            if p.requires_grad and not p._backward_hooks and (p is not master or d == dtype)
        ]
        # Read in another dtype than usual (an FP32 island of the user's): by itself.
        return members if any(p is master for p, _ in members) else [(master, dtype)]


SINGLES = Buckets([])


def loose_region(plan: Plan, met: Met) -> Region:
    """A region of no model, without a boundary: nothing is scaled in it, gradients come out as they are."""
    roles = Roles(plan, nn.Module())
    return Region(plan, Gate(1.0), False, SINGLES, _nothing_to_mend, roles, met, loose=True)


def _nothing_to_mend(out: Any, region: Region, given: Any) -> bool:
    """After a recomputation in a region that scales nothing."""
    return False


@contextlib.contextmanager
def autocast_set(device: str, enabled: bool, dtype: torch.dtype) -> Iterator[None]:
    """As ``torch.autocast``, with any dtype: torch's own turns itself off for FP32."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def reopening(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for activation checkpointing: run again in a backward, it runs in its region again."""
    region = current()
    if region is None:
        return function
    device = region.plan.device
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def run(*args: Any, **kwargs: Any) -> Any:
        if current() is not None:
            return function(*args, **kwargs)
        again = region.again()
        try:
            with again.opened(), autocast_set(device, *autocast):
                out = function(*args, **kwargs)
        finally:
            again.clear()
        if torch.is_grad_enabled() and again.lowers_through_boundary:
            again.mend_graph(out, again, (args, kwargs))
        return out

    return run


def check_unwritten(region: Region, name_of: Callable[[Tensor], str]) -> None:
    """Raise `SwitchError` where forward wrote to a working copy: the write would be lost."""
    master = region.changed_copy()
    if master is not None:
        raise SwitchError(
            f"parameter {name_of(master)} was changed in place inside forward; there it is a rounded working "
            "copy and the change would be lost. Change the parameter after forward, or keep what forward "
            "updates in a buffer"
        )


def graph_shape(region: Region, out: Any) -> object:
    """What tells a region's graph from another: how many nodes, and what they come to."""
    nodes = (region.last_node or region.first_node) - region.first_node
    return nodes, *(t.dtype for t in tensors_in(out))


def _refuse_emulation(recipe: Recipe) -> None:
    """Raise `SwitchError` where a dispatch mode of this thread is an emulation that changes something."""
    # An emulation has layers of a region's kind: import at the call.
    from halfstep.switching.emulation.mode import EmulationMode

    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, EmulationMode) and not mode.recipe.is_identity:
            raise SwitchError(
                f"a model that is switched to {recipe} was called inside halfstep.emulate({mode.recipe}): "
                "its operations would be rounded twice, its gradients scaled twice. One of the two: call "
                "switch.off(), or call the model outside of emulate"
            )
