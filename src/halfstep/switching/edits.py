"""Whether this torch has the operations that an edited op policy names."""

from __future__ import annotations

import difflib
import functools

import torch

from halfstep.errors import RecipeError
from halfstep.recipe import OpPolicy, policies

__all__ = ["check_edits", "edited", "is_composite", "overload", "overloads"]


def overload(name: str) -> torch._ops.OpOverload | None:
    """The aten overload called ``name`` (``"softmax.int"``), or None where this torch has not got it."""
    packet, _, over = name.partition(".")
    found = getattr(torch.ops.aten, packet, None)
    return None if found is None else getattr(found, over or "default", None)


def overloads(name: str) -> list[str]:
    """``name`` itself, or, where it has no overload of its own, all that give a new tensor."""
    if name in _dispatched():
        return [name]
    found = [each for each in _dispatched() if each.partition(".")[0] == name]
    return [each for each in found if name.endswith("_") or not _writes(each)]


def _writes(name: str) -> bool:
    op = overload(name)
    return op is not None and op._schema.is_mutable


@functools.cache
def _dispatched() -> tuple[str, ...]:
    """torch's overloads; ``torch.ops.aten`` has TorchScript's own, of numbers, besides."""
    names = torch._C._dispatch_get_all_op_names()
    return tuple(sorted(n.removeprefix("aten::") for n in names if n.startswith("aten::")))


def is_composite(name: str) -> bool:
    """True where torch takes ``name`` apart above autograd."""
    return any(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{each}", "CompositeImplicitAutograd")
        for each in overloads(name)
    )


def edited(policy: OpPolicy) -> list[str]:
    """The operations that are in another class than in the policy that this one is a variant of."""
    return list(policies()[policy.base].differences(policy))


def check_edits(policy: OpPolicy) -> None:
    """Raise `RecipeError` where ``policy`` changes the class of what is no operation of this torch."""
    known = {name for name, _ in policies()["amp"].classes}
    for name in edited(policy):
        if name not in known and not overloads(name):
            near = difflib.get_close_matches(
                name, {n.partition(".")[0] for n in _dispatched()}, n=2
            )
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else "see `halfstep recipes --policy amp`"
            )
            raise RecipeError(f"op policy {policy}: torch has no operation {name!r}; {hint}")
