"""``torch.compile`` inside a region: a switched model's forward in graphs of its own, the policy in them.

The border stays outside of every graph: working copies are made, inputs and outputs pass the boundary, and the
loss scale is multiplied in, eagerly. What lies between is compiled by whatever compiles around it::

    theirs = the compiler at work on this thread        its backend, mode, dynamic shapes, fullgraph
    the region is opened with no compiler at work
    modules are laid bare: plain dicts of working copies in place of LazyParameters, torch's own call
    theirs, with a backend of ours around its own, compiles and runs forward
    modules are as they were; the region is left

Casts are made by the kernels at the Autocast key (`overrides`). They run while a graph is made, and leave casts
in it. torch's guards know nothing of a recipe, so the backend around theirs is an object of one root of one
switch: torch compares it before it takes a graph.
"""

from __future__ import annotations

import threading
import types
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from halfstep.errors import SwitchError
from halfstep.switching.region import LazyParameters, Region

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

__all__ = ["Compiler", "Inside", "call", "enter", "is_making", "skipped", "with_their_options"]

Compiler = Callable[..., Any]
_eval_frame: Any = torch._C._dynamo.eval_frame  # pyright: ignore[reportAttributeAccessIssue]
_set_eval_frame: Callable[[Any], Any] = _eval_frame.set_eval_frame


class _Local(threading.local):
    pending: Compiler | None = None
    making = False
    bare: _Bare | None = None


_local = _Local()


def is_making() -> bool:
    """True while a graph of a region is made on this thread: its tensors have no numbers and no address."""
    return _local.making


# -- coming in from what torch.compile runs ------------------------------------------------------------


def skipped(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, itself in no graph; the compiler stays at work for what it calls.

    As ``torch._dynamo.skip``, without taking torch's compiler in: that takes over a second.
    """
    skip = _eval_frame._FrameExecStrategy(
        _eval_frame._FrameAction.SKIP, _eval_frame._FrameAction.DEFAULT
    )
    _eval_frame.set_code_exec_strategy(function.__code__, skip)
    # what the compiler looks for where it meets a call of it
    function._torchdynamo_disable = True  # pyright: ignore[reportFunctionMemberAccess]
    function._torchdynamo_disable_msg = (  # pyright: ignore[reportFunctionMemberAccess]
        "the border of a region of halfstep; what is inside of it is a graph of its own"
    )
    return function


def enter(compiler: Compiler | None) -> Compiler | None:
    """Have ``compiler`` wait for the inside of a region; returns what waited before.

    None: a region that is opened now is run eagerly.
    """
    before, _local.pending = _local.pending, compiler
    return before


def with_their_options(compiled: Any, call: Callable[..., Any]) -> Callable[..., Any] | None:
    """``call`` as ``module.compile(...)`` compiled the module's own; None where torch does not say how."""
    for cell in getattr(compiled, "__closure__", None) or ():
        context = cell.cell_contents
        if hasattr(context, "compiler_config") and callable(getattr(context, "callback", None)):
            return context(call)
    return None


# -- inside --------------------------------------------------------------------------------------------


def call(
    region: Region,
    module: nn.Module,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """``function(*args, **kwargs)``, a call of ``module`` inside ``region``, by the compiler that waits."""
    theirs = enter(None)
    if theirs is None:
        return function(*args, **kwargs)
    if isinstance(theirs, _Ours):
        theirs = theirs.theirs
    return _inside(region, module).call(theirs, region, function, args, kwargs)


def _inside(region: Region, module: nn.Module) -> Inside:
    insides: dict[int, Inside] = module.__dict__["_call_impl"].insides
    inside = insides.get(id(region.plan))
    if inside is None:
        inside = insides[id(region.plan)] = Inside(module, region)
    return inside


class Inside:
    """What is between the borders of one module in the regions of one switch, and how it is compiled."""

    __slots__ = ("_compilers", "_lock", "_module", "_plan", "_run", "why_eager")

    def __init__(self, module: nn.Module, region: Region) -> None:
        self._module = module
        self._plan = region.plan  # kept alive: it is known by its address
        self.why_eager = ""
        """Why it is run eagerly; "" where it need not be."""
        self._compilers: dict[int, _Ours] = {}
        # torch keeps its graphs with the code of a function: one that no other module shares.
        self._run = types.FunctionType(_run.__code__.replace(co_name="inside"), globals())
        self._lock = threading.RLock()
        if region.roled is not None:
            self.fall_back(
                f"recipe {region.plan.recipe} rounds operands by their role, and while a graph is made a "
                "weight is not told from an activation"
            )

    def call(
        self,
        theirs: Compiler,
        region: Region,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """``function(*args, **kwargs)`` compiled by ``theirs``; eagerly where that cannot be."""
        if self.why_eager:
            return function(*args, **kwargs)
        ours = self._compilers.get(id(theirs))
        if ours is None:
            ours = self._compilers[id(theirs)] = _Ours(theirs, self)
        with self._lock:
            bare = _Bare(self._module, region)
            before, _local.bare = _local.bare, bare
            _set_eval_frame(ours)
            try:
                return self._run(function, args, kwargs)
            finally:
                _set_eval_frame(None)
                _local.bare = before
                bare.dress()

    def fall_back(self, why: str) -> None:
        """Run the rest of this call, and all others, eagerly; say so once."""
        if not self.why_eager:
            self.why_eager = why
            warnings.warn(
                f"halfstep: torch.compile leaves {type(self._module).__name__} to run eagerly: {why}",
                RuntimeWarning,
                stacklevel=2,
            )
        if _local.bare is not None:
            _local.bare.dress()


def _run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first function that the compiler sees: torch makes no graph of one in torch.nn itself."""
    return function(*args, **kwargs)


class _Bare:
    """Modules with working copies for parameters and torch's own call, as a compiler can read them."""

    __slots__ = ("_kept",)

    def __init__(self, root: nn.Module, region: Region) -> None:
        # (a module's attributes, its LazyParameters, the copies put there, its call)
        self._kept: list[tuple[dict[str, Any], LazyParameters, dict[str, Any], Any]] = []
        with torch.enable_grad():  # under no_grad too: forward may enable it again
            for module in root.modules():
                state = module.__dict__
                lazy = state["_parameters"]
                if not isinstance(lazy, LazyParameters):
                    continue
                copies = {
                    key: None if master is None else region.lower(master, lazy, key)
                    for key, master in lazy.items()
                }
                self._kept.append((state, lazy, copies, state.pop("_call_impl", None)))
                state["_parameters"] = dict(copies)

    def dress(self) -> None:
        """Put back what was there; parameters that forward set, replaced or deleted are so for good."""
        while self._kept:
            state, lazy, copies, call = self._kept.pop()
            now = state["_parameters"]
            state["_parameters"] = lazy
            if call is not None:
                state["_call_impl"] = call
            for key in copies.keys() - now.keys():
                del lazy[key]
            for key, value in now.items():
                if value is not copies.get(key):
                    lazy[key] = value


class _Ours:
    """Called by torch for each function that runs inside: has the user's compiler make a graph of it."""

    def __init__(self, theirs: Any, inside: Inside) -> None:
        from torch._dynamo.convert_frame import CatchErrorsWrapper

        convert = theirs._torchdynamo_orig_backend
        backend = _Backend(convert._torchdynamo_orig_backend)
        self._convert = CatchErrorsWrapper(convert._clone_with_backend(backend), theirs.hooks)
        self._inside = inside
        self.theirs = theirs
        # torch follows these to the backend that it compares
        self._torchdynamo_orig_backend = self._convert

    def __call__(self, *frame: Any) -> Any:
        _local.making = True
        try:
            with warnings.catch_warnings():
                # torch's compiler reads .grad of whatever a module has in a parameter's place
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
                return self._convert(*frame)
        finally:
            _local.making = False


class _Backend:
    """The user's backend, with what is traced in a region traced as it is run."""

    __name__ = "halfstep"

    def __init__(self, theirs: Callable[..., Any]) -> None:
        self._theirs = theirs

    def __call__(self, graph: GraphModule, inputs: list[Any], **options: Any) -> Any:
        import torch._functorch.config as config

        # The backward is outside of autocast. torch's cache on disk knows a graph by what it calls, before
        # the policy is in it.
        with config.patch(backward_pass_autocast="off", enable_autograd_cache=False):
            return self._theirs(graph, inputs, **options)
