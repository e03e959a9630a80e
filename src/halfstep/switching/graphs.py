"""``torch.compile`` inside a region: a switched model's forward in graphs of its own, the policy in them.

The border stays outside of every graph: working copies are made, inputs and outputs pass the boundary, and
the loss scale is multiplied in, eagerly. What lies between is compiled by whatever compiles around it::

    theirs = the compiler at work on this thread        its backend, mode, dynamic shapes, fullgraph
    the region is opened with no compiler at work
    modules are laid bare: plain dicts of working copies for LazyParameters, torch's own call
    theirs, with a backend of ours around its own, compiles and runs forward
    modules are as they were; the region is left

Casts are made by the kernels at the Autocast key (`overrides`). They run while a graph is made, and leave
casts in it. torch's guards know nothing of a recipe, so the backend around theirs is an object of one module
in one switch: torch compares it before it takes a graph.
"""

from __future__ import annotations

import contextlib
import re
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halfstep.errors import SwitchError
from halfstep.switching.ranks import is_sharded
from halfstep.switching.region import LazyParameters, Region, current
from halfstep.switching.tracing import set_compiler, tracing

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

__all__ = ["Compiler", "Inside", "call", "enter", "flat_weights", "with_their_options"]

Compiler = Callable[..., Any]
_PART = re.compile(r"\._(?:modules|parameters)\['([^']*)'\]")
_eval_frame: Any = torch._C._dynamo.eval_frame  # pyright: ignore[reportAttributeAccessIssue]


class _Local(threading.local):
    pending: Compiler | None = None
    bare: _Bare | None = None
    traced: _Traced | None = None


_local = _Local()


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

    __slots__ = ("_compilers", "_module", "_plan", "_run", "why_eager")

    def __init__(self, module: nn.Module, region: Region) -> None:
        self._module = module
        self._plan = region.plan  # kept alive: it is known by its address
        self.why_eager = ""
        """Why it is run eagerly; "" where it need not be."""
        self._compilers: dict[int, _Ours] = {}
        # torch keeps its graphs with the code of a function: one that no other module shares.
        self._run = types.FunctionType(_run.__code__.replace(co_name="inside"), globals())
        if any(is_sharded(p) for p in module.parameters()):
            self.fall_back("its parameters are sharded over processes (DTensor)")
        elif region.roled is not None and region.roled.operands.histories.window:
            self.fall_back(f"recipe {region.plan.recipe} keeps a history of its scales")

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
            try:
                ours = self._compilers[id(theirs)] = _Ours(theirs, self)
            except (AttributeError, ImportError, TypeError) as error:  # private parts of torch
                self.fall_back(f"torch {torch.__version__} keeps its compiler otherwise ({error})")
                return function(*args, **kwargs)
        bare = _Bare(self._module, region)
        before, _local.bare = _local.bare, bare
        set_compiler(ours)
        try:
            return self._run(function, args, kwargs)
        finally:
            set_compiler(None)
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
        # (a module's attributes, its LazyParameters, the copies put there, what else was there before)
        self._kept: list[tuple[dict[str, Any], LazyParameters, dict[str, Any], dict[str, Any]]] = []
        try:
            with torch.enable_grad():  # under no_grad too: forward may enable it again
                for module in root.modules():
                    if isinstance(module.__dict__["_parameters"], LazyParameters):
                        self._undress(module, region, is_root=module is root)
        except BaseException:
            self.dress()
            raise

    def _undress(self, module: nn.Module, region: Region, *, is_root: bool) -> None:
        state = module.__dict__
        lazy: LazyParameters = state["_parameters"]
        copies = {
            key: None if master is None else region.lower(master, lazy, key)
            for key, master in lazy.items()
        }
        kept: dict[str, Any] = {}
        self._kept.append((state, lazy, copies, kept))
        state["_parameters"] = dict(copies)
        if not is_root and "_call_impl" in state:  # the root's is where other threads wait
            kept["_call_impl"] = state["_call_impl"]
            state["_call_impl"] = state["_call_impl"].inner
        if isinstance(module, nn.RNNBase):
            flat = flat_weights(module)
            kept |= {name: state[name] for name in flat if name in state}
            state.update(flat)

    def dress(self) -> None:
        """Put back what was there; parameters that forward set, replaced or deleted are so for good."""
        while self._kept:
            state, lazy, copies, kept = self._kept.pop()
            now = state["_parameters"]
            state["_parameters"] = lazy
            state.update(kept)
            for key in copies.keys() - now.keys():
                del lazy[key]
            for key, value in now.items():
                if key not in copies or value is not copies[key]:
                    lazy[key] = value


def flat_weights(module: Any) -> dict[str, Any]:
    """Recurrent layers keep a list of weights beside ``_parameters``: working copies go there too."""
    copies = [getattr(module, name, None) for name in module._flat_weights_names]
    refs = [None if c is None else weakref.ref(c) for c in copies]
    return {"_flat_weights": copies, "_flat_weight_refs": refs}


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
        with tracing(), warnings.catch_warnings():
            # torch's compiler reads .grad of whatever a module has in a parameter's place
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
            found: object = self._inside.why_eager
            if not found:
                try:
                    return self._convert(*frame)
                except Exception as error:
                    found = _untraceable_in(error)
                    if found is None:
                        raise
            self._inside.fall_back(str(found))
            return _eagerly()


class _Backend:
    """The user's backend, with what is traced in a region traced as it is run."""

    __name__ = "halfstep"

    def __init__(self, theirs: Callable[..., Any]) -> None:
        self._theirs = theirs

    def __call__(self, graph: GraphModule, inputs: list[Any], **options: Any) -> Any:
        import torch._functorch.config as config

        _check_islands(graph)
        # The backward is outside of autocast. torch's cache on disk knows a graph by what it calls, before
        # the policy is in it.
        off = config.patch(backward_pass_autocast="off", enable_autograd_cache=False)
        with off, _weights_known(graph, inputs):
            return self._theirs(graph, inputs, **options, **_inductors_options(self._theirs))


def _inductors_options(backend: Any) -> dict[str, Any]:
    """Has Inductor round between operations that it fuses, as rule 3 says; a user's own option stays.

    Given to the backend, for it makes a backward's code when that backward runs.
    """
    backend = getattr(backend, "_torchdynamo_orig_backend", backend)
    is_inductor = getattr(backend, "compiler_name", "") == "inductor"
    if not is_inductor or "emulate_precision_casts" in getattr(backend, "config", {}):
        return {}
    return {"config_patches": {"emulate_precision_casts": True}}


# -- roles in a graph ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _weights_known(graph: GraphModule, inputs: list[Any]) -> Iterator[None]:
    """Have ``graph`` tell its region which of its inputs are weights, while it is traced.

    A tensor's role is known by its storage, and a traced tensor has another than the working copy that it
    stands for. A node at the graph's start hands each on, and has the region note what it sees.
    """
    region = current()
    if region is None or region.roled is None:
        yield
        return
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    masters: list[Tensor] = []
    for node, given in zip(nodes, inputs, strict=True):
        master = region.master_under(given) if isinstance(given, Tensor) else None
        if master is None:
            continue
        if not _parameter_name(node):
            raise _UntraceableError(
                f"forward hands a weight, {node.name}, to a part that is compiled by itself, and recipe "
                f"{region.plan.recipe} rounds operands by their role"
            )
        with graph.graph.inserting_after(nodes[-1]):
            known = graph.graph.call_function(_known, (node, len(masters)))
        node.replace_all_uses_with(
            known, delete_user_cb=lambda user, known=known: user is not known
        )
        known.meta = {key: value for key, value in node.meta.items() if key != "grapharg"}
        masters.append(master)
    graph.recompile()
    before, outer = dict(region.weights), _local.traced
    _local.traced = _Traced(region, masters)
    try:
        yield
    finally:
        _local.traced = outer
        region.weights.clear()
        region.weights.update(before)


class _Traced:
    """The weights of a graph that is being traced."""

    __slots__ = ("_kept", "_masters", "_region")

    def __init__(self, region: Region, masters: list[Tensor]) -> None:
        self._region = region
        self._masters = masters
        self._kept: list[Any] = []  # alive, so that no other tensor of this tracing has their place

    def note(self, t: Tensor, number: int) -> None:
        storage = t.untyped_storage()
        self._kept.append(storage)
        self._region.weights[storage._cdata] = self._masters[number]


def _known(t: Tensor, number: int) -> Tensor:
    """``t``, a weight; while a graph is traced, its region is told of which master."""
    if _local.traced is not None:
        _local.traced.note(t, number)
    return t


# -- what is in no graph -------------------------------------------------------------------------------


class _UntraceableError(SwitchError):
    """Raised while a graph is made, where only the eager region does what the rule says."""


def _untraceable_in(error: BaseException | None) -> _UntraceableError | None:
    """The `_UntraceableError` that torch's compiler has wrapped in errors of its own."""
    while error is not None and not isinstance(error, _UntraceableError):
        error = error.__cause__ or error.__context__ or getattr(error, "inner_exception", None)
    return error


def _eagerly() -> Any:
    """What torch is told to have the frame at hand, and all that it calls, run as it is this time."""
    from torch._dynamo.types import ConvertFrameReturn

    skip = _eval_frame._FrameAction.SKIP
    return ConvertFrameReturn(
        frame_exec_strategy=_eval_frame._FrameExecStrategy(skip, skip),
        apply_to_code=False,
        skip_reason="left to eager by halfstep",
    )


def _check_islands(graph: GraphModule) -> None:
    """Raise `_UntraceableError` where a parameter is read with autocast off: there it is to be FP32.

    A region looks at autocast when a parameter is read; in a graph it has been read.
    """
    for module in graph.modules():
        nodes = getattr(getattr(module, "graph", None), "nodes", ())
        off: list[Node] = []  # where autocast was turned off, and is so still
        for node in nodes:
            if (
                node.op == "call_function"
                and node.target is torch.amp.autocast_mode._enter_autocast
            ):
                if not node.args[2]:
                    off.append(node)
            elif (
                node.op == "call_function" and node.target is torch.amp.autocast_mode._exit_autocast
            ):
                off = [entered for entered in off if entered is not node.args[0]]
            elif off:
                for given in node.all_input_nodes:
                    name = _parameter_name(given)
                    if name:
                        raise _UntraceableError(
                            f"its forward reads {name} where it has turned autocast off: it is FP32 there, "
                            "and in a graph already rounded"
                        )


def _parameter_name(node: Node) -> str:
    """Where forward read a parameter that a graph is given; "" for other nodes."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = "" if node.op != "placeholder" or source is None else str(source.name)
    return ".".join(_PART.findall(name)) if "._parameters[" in name else ""
