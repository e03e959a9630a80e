"""The op policy in torch's dispatcher: kernels at the Autocast keys, installed while a switch is on.

torch lets an operator library put a Python kernel at a dispatch key. At ``AutocastCPU`` and
``AutocastCUDA`` it sees every call of forward, those made inside torch's C++ included, above autograd:
what it does (cast, FP32 kernel, cast) is differentiated by torch itself, twice if need be. Outside a
region each kernel does what torch's own would; with the last switch off they are gone.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingModuleSource]
    peek_interpreter_stack,
)
from torch.library import Library

from halfstep.errors import SwitchError
from halfstep.recipe import OpClass, OpPolicy, policies
from halfstep.recipe.policies import LOSSES
from halfstep.switching.by_role import dot_by_role
from halfstep.switching.edits import overload, overloads
from halfstep.switching.emulated import Carriers, attention, dot
from halfstep.switching.plan import Plan
from halfstep.switching.recurrent import recurrent_layers
from halfstep.switching.region import Region, autocast_set, current
from halfstep.switching.tracing import left_alone

__all__ = ["KEYS", "NARROW", "Below", "autocast", "cast_all", "install", "widen"]

KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
NARROW = (torch.float16, torch.bfloat16)
# All else (FP64, complex numbers, integers) goes its own way, as in torch.autocast.
_CASTABLE = (*NARROW, torch.float32)

# Those of the FP32 class whose own 16-bit kernels compute in FP32: nothing to cast where 16 bits are written.
_WIDE_INSIDE = frozenset(("layer_norm", "group_norm", "softmax", "log_softmax"))
# Of class "own", but torch has no FP16 kernel for CPUs.
_NO_HALF = frozenset(("rrelu",))
_ATTENTION = "scaled_dot_product_attention"

_lock = threading.Lock()
# (device, layer of overrides, or one operation) -> how many switches need it, and the library of its kernels
_installed: dict[tuple[str, str], tuple[int, Library]] = {}


def install(plan: Plan) -> Callable[[], None]:
    """Put the kernels that ``plan`` needs at its device's Autocast key; returns what takes them away."""
    layers = []
    if plan.active:
        layers.append("base")
        layers += policies()["amp"].differences(plan.recipe.policy)
    if plan.emulate_dots or plan.reads_by_role:
        layers.append("emulated")
    keys = [(plan.device, layer) for layer in layers]
    with _lock:
        for key in keys:
            count, library = _installed.get(key, (0, None))
            if library is None:
                library = _register(*key)
            _installed[key] = (count + 1, library)

    def uninstall() -> None:
        with _lock:
            for key in keys:
                count, library = _installed.pop(key)
                if count > 1:
                    _installed[key] = (count - 1, library)
                else:
                    library._destroy()

    return uninstall


@contextlib.contextmanager
def autocast(plan: Plan) -> Iterator[None]:
    """The plan's device under autocast in its store dtype; torch's own has no FP32, which tf32 stores."""
    if plan.low != torch.float32:
        with torch.autocast(plan.device, dtype=plan.low, cache_enabled=False):
            yield
        return
    with autocast_set(plan.device, plan.active, torch.float32):
        yield


def _register(device: str, layer: str) -> Library:
    library = Library("aten", "IMPL")
    key = KEYS[device]
    theirs = frozenset(torch._C._dispatch_get_registrations_for_dispatch_key(key))
    for name in _names_of(layer, theirs):
        op = overload(name)
        if op is None:
            continue
        below = Below(op, key, theirs)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch says once that a kernel is replaced: it is meant
            kernel = _by_class(name, below)
            library.impl(_schema_name(op), kernel, key, with_keyset=True, allow_override=True)
    return library


def _schema_name(op: torch._ops.OpOverload) -> str:
    name = op._schema.name.removeprefix("aten::")
    return f"{name}.{op._overloadname}" if op._overloadname != "default" else name


def _names_of(layer: str, theirs: frozenset[str]) -> list[str]:
    amp = policies()["amp"]
    dots = [name for name in amp.names(OpClass.DOT) if name != _ATTENTION]
    if layer == "emulated":  # torch lowers these itself; only an emulating plan needs them back
        return [*[name for name in dots if f"aten::{name}" in theirs], _ATTENTION]
    if layer != "base":
        return overloads(layer)

    def missing(names: Iterable[str]) -> list[str]:
        return [name for name in names if f"aten::{name}" not in theirs]

    return [
        *[name for name in amp.names(OpClass.WIDE) if name not in LOSSES],
        *missing(dots),
        *amp.names(OpClass.DOTS),
        *amp.names(OpClass.MIXED),
        *amp.names(OpClass.INTO),
        *missing(amp.names(OpClass.WIDEST)),
        *amp.names(OpClass.RECURRENT),
        *_NO_HALF,
    ]


_Kernel = Callable[..., Any]


def _by_class(name: str, below: Below) -> _Kernel:
    """A kernel that does what the open region's policy says of the operation; torch's own outside."""
    makers = _MAKERS | {OpClass.DOT: _attention} if name == _ATTENTION else _MAKERS
    latest: tuple[OpPolicy | None, _Kernel] = (None, _own(below))

    @left_alone
    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal latest
        region = current()
        if region is None:
            return below.as_torch(keys, args, kwargs)
        policy, does = latest
        if policy is not region.plan.recipe.policy:
            policy = region.plan.recipe.policy
            does = makers[policy.class_of(name)](below)
            latest = (policy, does)  # one object: another thread sees the old pair or the new one
        return does(region, keys, args, kwargs)

    return kernel


class Below:
    """How a call goes on below the Autocast key: as torch itself would, or with autocast shut out."""

    __slots__ = ("_after", "_key_set", "_torch_kernel", "op")

    def __init__(self, op: torch._ops.OpOverload, key: str, theirs: frozenset[str]) -> None:
        self.op = op
        dispatch_key = getattr(torch._C.DispatchKey, key)
        self._key_set = torch._C.DispatchKeySet(dispatch_key)
        self._after = torch._C._dispatch_keyset_full_after(dispatch_key)
        name = op._schema.name + ("" if op._overloadname == "default" else f".{op._overloadname}")
        registered = name in theirs
        self._torch_kernel = torch.library.get_kernel(name, key) if registered else None

    def as_torch(self, keys: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call as if halfstep were not there."""
        if self._torch_kernel is not None:
            return self._torch_kernel.call_boxed(keys, *args, **kwargs)
        return self.op.redispatch(keys & self._after, *args, **kwargs)

    def parts(self, keys: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call below autocast; what it is made of comes by autocast again."""
        return self.op.redispatch(keys & self._after, *args, **kwargs)

    def shut(self) -> Any:
        """A context in which autocast is shut out."""
        return torch._C._ExcludeDispatchKeyGuard(self._key_set)

    def whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call with autocast shut out of it and of all that it is made of."""
        with self.shut():
            return self.op(*args, **kwargs)


def _cast(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is list and value and isinstance(value[0], Tensor):
        return [change(v) for v in value]
    return value


def cast_all(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with ``change`` done to the tensors, those in lists too."""
    args = tuple([_cast(a, change) for a in args])
    return args, ({k: _cast(v, change) for k, v in kwargs.items()} if kwargs else kwargs)


def widen(t: Tensor) -> Tensor:
    """FP32 for 16 bits; others as they are."""
    return t.float() if t.dtype in NARROW else t


def _wide(below: Below) -> _Kernel:
    computes_wide = below.op._schema.name.removeprefix("aten::") in _WIDE_INSIDE

    def kernel(region: Region, keys: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not region.plan.wide_operations:
            return below.as_torch(keys, args, kwargs)
        low = region.plan.low
        narrow = region.plan.narrow_writes and isinstance(args[0], Tensor) and args[0].dtype == low
        if narrow and computes_wide:
            return below.whole(args, kwargs)
        args, kwargs = cast_all(args, kwargs, widen)
        # A dtype that the program asks for: some kernels refuse to narrow.
        asked = kwargs.get("dtype")
        if asked in NARROW and asked is not None:
            return below.whole(args, kwargs | {"dtype": torch.float32}).to(asked)
        out = below.whole(args, kwargs)
        if narrow and isinstance(out, Tensor) and out.dim() and out.dtype == torch.float32:
            return out.to(low)
        return out

    return kernel


def _is_ours(t: object) -> bool:
    return isinstance(t, Tensor) and t.dtype in _CASTABLE


def _dot(below: Below) -> _Kernel:
    def kernel(region: Region, keys: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        emulator = region.emulator
        if any(isinstance(t, Tensor) and t.layout is not torch.strided for t in args):
            args, kwargs = cast_all(args, kwargs, emulator.operand)
            return emulator.store(below.whole(args, kwargs))
        emulates = region.plan.emulate_dots or region.roled is not None
        if emulates and peek_interpreter_stack() is not None:
            return _transformed(region, below, args, kwargs)
        if region.roled is not None and not region.keeps(*args) and _is_ours(args[0]):
            with below.shut():
                return dot_by_role(region.roled, below.op, args, kwargs)
        if not region.plan.emulate_dots:
            args, kwargs = cast_all(args, kwargs, emulator.lowered)
            return below.whole(args, kwargs)
        if not _is_ours(args[0]):
            return below.whole(args, kwargs)

        def carried() -> Tensor:
            carriers = Carriers(emulator)
            wide_args, wide_kwargs = cast_all(args, kwargs, carriers.of)
            with carriers.kept_low():
                return below.op(*wide_args, **wide_kwargs)

        with below.shut():
            return dot(emulator, below.op, args, kwargs, carried)

    return kernel


def _transformed(
    region: Region, below: Below, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A dot product under torch.vmap, torch.func.grad and the like: casts and torch's kernel."""
    recipe = region.plan.recipe
    if recipe.reads_by_role or not recipe.adds_in_fp32:
        raise SwitchError(
            f"{below.op} under a transform of torch.func (vmap, grad, jacrev) in recipe {recipe}: "
            "only operands in the store format, and sums in FP32, are known there; use bf16 or fp16"
        )
    args, kwargs = cast_all(args, kwargs, region.emulator.operand)
    return region.emulator.store(below.whole(args, kwargs))


def _mixed(below: Below) -> _Kernel:
    def kernel(region: Region, keys: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not region.plan.wide_operations:
            return below.as_torch(keys, args, kwargs)
        rest, kwargs = cast_all(args[1:], kwargs, widen)
        return below.parts(keys, (args[0], *rest), kwargs)

    return kernel


def _into(below: Below) -> _Kernel:
    def kernel(region: Region, keys: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        dtype = args[0].dtype
        if not (dtype in NARROW or dtype == torch.float32):
            return below.as_torch(keys, args, kwargs)

        def fitting(t: Tensor) -> Tensor:
            return t.to(dtype) if t.dtype in NARROW or t.dtype == torch.float32 else t

        rest, kwargs = cast_all(args[1:], kwargs, fitting)
        return below.parts(keys, (args[0], *rest), kwargs)

    return kernel


def _parts(below: Below) -> _Kernel:
    def kernel(region: Region, keys: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = cast_all(args, kwargs, region.emulator.lowered)
        return below.parts(keys, args, kwargs)

    return kernel


def _promoted(below: Below) -> _Kernel:
    # Made of a matrix product, which is to follow the policy; inside the others nothing is.
    is_made_of_products = below.op._schema.name == "aten::tensordot"

    def kernel(region: Region, keys: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen: list[Tensor] = []
        cast_all(args, kwargs, lambda t: seen.append(t) or t)
        if any(t.dtype == torch.float32 for t in seen):
            args, kwargs = cast_all(args, kwargs, widen)
            return below.whole(args, kwargs)
        if is_made_of_products:
            return below.parts(keys, args, kwargs)
        return below.whole(args, kwargs)

    return kernel


def _attention(below: Below) -> _Kernel:
    def kernel(region: Region, keys: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        by_role = region.roled is not None and not region.keeps()
        if not (by_role or region.plan.emulate_dots):
            args, kwargs = cast_all(args, kwargs, region.emulator.lowered)
            return below.as_torch(keys, args, kwargs)
        with below.shut():
            return attention((by_role and region.roled) or region.emulator, *args, **kwargs)

    return kernel


def _recurrent(below: Below) -> _Kernel:
    def kernel(region: Region, keys: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        params = args[3] if below.op._overloadname == "data" else args[2]
        by_role = region.roled is not None and not region.keeps(*params)
        if not (by_role or region.plan.emulate_dots):
            args, kwargs = cast_all(args, kwargs, region.emulator.lowered)
            return below.parts(keys, args, kwargs)
        emulator = (by_role and region.roled) or region.emulator
        with below.shut():
            return recurrent_layers(emulator, below.op, *args, **kwargs)

    return kernel


def _own(below: Below) -> _Kernel:
    by_way_of_fp32 = below.op._schema.name.removeprefix("aten::") in _NO_HALF

    def kernel(region: Region, keys: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if by_way_of_fp32 and args[0].dtype == torch.float16:
            return below.whole((args[0].float(), *args[1:]), kwargs).to(torch.float16)
        return below.whole(args, kwargs)

    return kernel


_MAKERS: dict[OpClass, Callable[[Below], _Kernel]] = {
    OpClass.DOT: _dot,
    OpClass.DOTS: _parts,
    OpClass.RECURRENT: _recurrent,
    OpClass.WIDE: _wide,
    OpClass.MIXED: _mixed,
    OpClass.INTO: _into,
    OpClass.WIDEST: _promoted,
    OpClass.OWN: _own,
}
