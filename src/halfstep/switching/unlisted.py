"""Operations that no list knows: computed in FP32, and named once, at the end.

The op policy names torch's own operations. A library's (``mylib::op``) are in no list: torch's autocast gives
them what comes, 16 bits. Here each gets a kernel of its own at the Autocast key, which nothing else passes::

    operands to FP32, the operation with autocast shut out, its result as one of the FP32 class
    where it takes no FP32, or writes into its operands: as it is given

Composite ones are made of listed ones; those whose library registered an autocast kernel are its own matter.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from halfstep.switching.met import Handling
from halfstep.switching.overrides import KEYS, NARROW, Below, cast_all, widen
from halfstep.switching.plan import Plan
from halfstep.switching.region import Region, current
from halfstep.switching.tracing import left_alone

__all__ = ["install", "look"]

# torch's, and ours: the policy says what is done with their operations, or they do no arithmetic.
_NAMESPACES = """
    aten prim prims halfstep c10d _c10d_functional _c10d_functional_autograd symm_mem fsdp _dtensor profiler
    inductor inductor_prims debugprims rngprims quantized _quantized quantization onednn mkldnn mkl
    mkldnn_prepacked prepacked xnnpack sparse static_runtime export debug_mode_ops higher_order _test _native
"""
_LISTED = frozenset(_NAMESPACES.split())

_lock = threading.Lock()
_users: dict[str, int] = {}
# device -> operation -> the library of its kernel; None for those that need none
_kernels: dict[str, dict[str, Library | None]] = {}
_seen: tuple[int, ...] = ()


def install(plan: Plan) -> Callable[[], None]:
    """Put kernels at the Autocast key of the plan's device; returns what takes them away."""
    if not plan.active:
        return _nothing
    device = plan.device
    with _lock:
        _users[device] = _users.get(device, 0) + 1
        _kernels.setdefault(device, {})
        _scan()

    def uninstall() -> None:
        with _lock:
            _users[device] -= 1
            if not _users[device]:
                del _users[device]
                for library in _kernels.pop(device).values():
                    if library is not None:
                        library._destroy()

    return uninstall


def look() -> None:
    """Take in operations that were registered since: by an import, ``load_library``, a definition."""
    if _registered() != _seen:
        with _lock:
            _scan()


def _registered() -> tuple[int, ...]:
    return len(sys.modules), len(torch.library._defs), len(torch.ops.loaded_libraries)


def _scan() -> None:
    global _seen
    _seen = _registered()
    there = {
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.partition("::")[0] not in _LISTED
    }
    for device, kernels in _kernels.items():
        for gone in kernels.keys() - there:
            library = kernels.pop(gone)
            if library is not None:
                library._destroy()
        new = there - kernels.keys()
        if new:
            theirs = frozenset(torch._C._dispatch_get_registrations_for_dispatch_key(KEYS[device]))
            kernels |= {name: _register(name, KEYS[device], theirs) for name in new}


def _register(name: str, key: str, theirs: frozenset[str]) -> Library | None:
    if name in theirs or torch._C._dispatch_has_kernel_for_dispatch_key(
        name, "CompositeImplicitAutograd"
    ):
        return None
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    op = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    arguments = op._schema.arguments
    takes = any("Tensor" in str(a.type) for a in arguments)
    gives = any("Tensor" in str(r.type) for r in op._schema.returns)
    aliases = [a.alias_info for a in arguments if a.alias_info is not None]
    writes = any(alias.is_write for alias in aliases)
    if not takes or not (gives or writes) or (aliases and not writes):  # the last: a view
        return None
    library = Library(namespace, "IMPL")
    library.impl(rest, _kernel(name, Below(op, key, theirs), writes), key, with_keyset=True)
    return library


def _kernel(name: str, below: Below, writes: bool) -> Callable[..., Any]:
    takes_fp32 = not writes

    @left_alone
    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal takes_fp32
        region = current()
        if region is None:
            return below.as_torch(keys, args, kwargs)
        narrow = _has_narrow(args, kwargs)
        if not region.plan.wide_operations:
            region.met.note(name, Handling.PLAIN if narrow else Handling.WIDE)
            return below.as_torch(keys, args, kwargs)
        if not narrow:
            region.met.note(name, Handling.WIDE)
            return below.whole(args, kwargs)
        if takes_fp32:
            try:
                out = below.whole(*cast_all(args, kwargs, widen))
            except (
                Exception
            ):  # whatever its author raises: tried as it was given, which may raise again
                out = below.whole(args, kwargs)
                takes_fp32 = False
            else:
                region.met.note(name, Handling.WIDE)
                return _written(region, out)
        else:
            out = below.whole(args, kwargs)
        region.met.note(name, Handling.GIVEN)
        return out

    return kernel


def _has_narrow(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    seen: list[Tensor] = []
    cast_all(args, kwargs, lambda t: seen.append(t) or t)
    return any(t.dtype in NARROW for t in seen)


def _written(region: Region, out: Any) -> Any:
    """The results in the dtype that the policy has the FP32 class write."""
    if not region.plan.narrow_writes:
        return out
    if isinstance(out, (tuple, list)):
        return type(out)(_written(region, t) for t in out)
    low = isinstance(out, Tensor) and out.dtype == torch.float32 and out.dim()
    return out.to(region.plan.low) if low else out


def _nothing() -> None:
    return None
