"""How a module is made to take part: its parameters read lazily, its calls open the region."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from halfstep.errors import SwitchError
from halfstep.recipe import Recipe
from halfstep.switching import graphs
from halfstep.switching.module_hooks import Forward
from halfstep.switching.ranks import is_fully_sharded
from halfstep.switching.region import LazyParameters, current, keeps_fp32
from halfstep.switching.tracing import set_compiler, skipped

__all__ = ["Runner", "Shape", "adopt", "check_not_switched", "release", "working_dtypes"]


class Runner(Protocol):
    """What a call needs of its switch: to run a module as the outermost one of a region."""

    model: nn.Module
    recipe: Recipe

    def run(
        self,
        module: nn.Module,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """``call(*args, **kwargs)`` inside a region of its own."""
        ...


_BORDER = (
    "the border of a region of halfstep; its inside is compiled apart. With fullgraph=True, compile the "
    "module itself, in place: module.compile(fullgraph=True)"
)


class _Call:
    """Stands at a module's ``_call_impl``: opens a region where none is open. A copied module has none."""

    __slots__ = ("compiled", "inner", "insides", "lock", "module", "owners", "recurrent")
    # By this and `__code__` torch.compile takes it for a module's call.
    __name__ = "_call_impl"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inner = type(module)._call_impl.__get__(module)
        # What model.compile() made before the switch: it would go past this call.
        self.compiled = module.__dict__.pop("_compiled_call_impl", None)
        if self.compiled is not None:
            ours = graphs.with_their_options(self.compiled, self)
            if ours is not None:
                module.__dict__["_compiled_call_impl"] = ours
        self.insides: dict[int, graphs.Inside] = {}
        self.lock = threading.RLock()
        self.owners: list[Runner] = []
        self.recurrent = isinstance(module, nn.RNNBase)

    @functools.partial(skipped, why=_BORDER)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # At once: a compiler at work looks at each function that is called.
        theirs = set_compiler(None)
        try:
            call = self._with_flat_weights if self.recurrent else self.inner
            region = current()
            if not self.owners or (theirs is None and region is not None and not region.loose):
                set_compiler(theirs)
                return call(*args, **kwargs)
            before = graphs.enter(theirs if callable(theirs) else None)
            try:
                if region is not None and not region.loose:
                    return graphs.call(region, self.module, call, args, kwargs)
                if self.insides:  # what another thread runs compiled is laid bare meanwhile
                    with self.lock:
                        return self.owners[0].run(self.module, call, args, kwargs)
                return self.owners[0].run(self.module, call, args, kwargs)
            finally:
                graphs.enter(before)
        finally:
            set_compiler(theirs)

    __code__ = __call__.__code__

    def _with_flat_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Recurrent layers keep a list of weights beside ``_parameters``: working copies go there too."""
        state = self.module.__dict__
        copies = graphs.flat_weights(self.module)
        kept = {name: state[name] for name in copies if name in state}
        state.update(copies)
        try:
            return self.inner(*args, **kwargs)
        finally:
            state.update(kept)

    def __reduce__(self) -> Any:
        # What a copied or unpickled module gets: its own class's method. The file names no halfstep.
        return getattr, (self.module, "_call_impl")


def adopt(root: nn.Module, runner: Runner) -> list[nn.Module]:
    """Make every module of ``root`` take part for ``runner``; returns those that did not yet."""
    new = []
    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        state = module.__dict__
        call = state.get("_call_impl")
        if not isinstance(call, _Call):
            call = state["_call_impl"] = _Call(module)
        if runner not in call.owners:
            call.owners.append(runner)
            new.append(module)
        if not isinstance(state["_parameters"], LazyParameters):
            names = frozenset(n for n in state["_parameters"] if keeps_fp32(module, n))
            lazy = state["_parameters"] = LazyParameters(state["_parameters"], names)
            # a module of the user's own may call F.embedding(sparse=True)
            own = not type(module).__module__.startswith("torch.nn.")
            lazy.sparse = own or bool(getattr(module, "sparse", False))
    for module in root.modules():
        if is_fully_sharded(module):
            for part in module.modules():
                if isinstance(lazy := part.__dict__["_parameters"], LazyParameters):
                    lazy.fully_sharded = True
    return new


def release(module: nn.Module, runner: Runner) -> None:
    """Undo `adopt` for one module; the last runner leaves it as it was."""
    call = module.__dict__.get("_call_impl")
    if not isinstance(call, _Call) or runner not in call.owners:
        return
    call.owners.remove(runner)
    if not call.owners:
        del module.__dict__["_call_impl"]
        if call.compiled is not None:
            module.__dict__["_compiled_call_impl"] = call.compiled
        forward = module.__dict__.get("forward")
        if isinstance(forward, Forward):
            forward.remove()
        lazy = module.__dict__["_parameters"]
        if isinstance(lazy, LazyParameters):
            module.__dict__["_parameters"] = lazy.plain()


def check_not_switched(model: nn.Module) -> None:
    """Raise `SwitchError` where ``model`` is switched as a whole; its parts may be."""
    call = model.__dict__.get("_call_impl")
    for owner in call.owners if isinstance(call, _Call) else ():
        if owner.model is model:
            raise SwitchError(
                f"this {type(model).__name__} is switched already, to {owner.recipe}; "
                "call off() on that switch first"
            )


class Shape:
    """The modules and parameters below a root; `holds` until one is added, replaced or removed."""

    __slots__ = ("_seen",)

    def __init__(self, root: nn.Module) -> None:
        # (a module's attributes, its parameters, how often they were written, its children)
        self._seen: list[tuple[dict[str, Any], dict[str, Any], int, tuple[Any, ...]]] = []
        for module in root.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            state = module.__dict__
            parameters = state["_parameters"]
            children = tuple(state["_modules"].values())
            self._seen.append((state, parameters, getattr(parameters, "writes", 0), children))

    def holds(self, root: nn.Module) -> bool:
        """True where it is ``root``'s and nothing has changed. Looked at before every forward."""
        if not self._seen or self._seen[0][0] is not root.__dict__:
            return False
        for state, parameters, writes, children in self._seen:
            if state["_parameters"] is not parameters:
                return False
            if getattr(parameters, "writes", 0) != writes:
                return False
            now = state["_modules"]
            if (now and tuple(now.values()) != children) or len(now) != len(children):
                return False
        return True


def working_dtypes(root: nn.Module, low: torch.dtype) -> list[tuple[Tensor, torch.dtype]]:
    """Each parameter once, in order, with the dtype that the region reads it in."""
    seen: set[int] = set()
    found = []
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((parameter, torch.float32 if keeps_fp32(module, name) else low))
    return found
