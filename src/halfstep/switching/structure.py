"""Tensors inside what a model takes and gives: tuples, dicts, named tuples, dataclasses, nested."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["map_tensors", "tensors_in"]


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``change`` applied to each tensor in it; containers keep their type.

    A container in which nothing changes is returned itself. Objects of other kinds are left alone.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (str, bytes, int, float, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        new = [map_tensors(v, change) for v in value]
        if all(a is b for a, b in zip(new, value, strict=True)):
            return value
        if isinstance(value, tuple):
            return type(value)(*new) if hasattr(value, "_fields") else _rebuilt(type(value), new)
        return new if type(value) is list else _replaced(value, enumerate(new))
    if isinstance(value, Mapping):
        changed = {k: map_tensors(v, change) for k, v in value.items()}
        if all(changed[k] is value[k] for k in changed):
            return value
        return changed if type(value) is dict else _replaced(value, changed.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        changed = {k: map_tensors(v, change) for k, v in fields.items()}
        if all(changed[k] is fields[k] for k in fields):
            return value
        new = copy.copy(value)
        for k, v in changed.items():
            object.__setattr__(new, k, v)  # frozen ones too: the copy is ours
        return new
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a structure, in order."""
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(value, note)
    return found


def _rebuilt(kind: type, items: list[Any]) -> Any:
    return tuple(items) if kind is tuple else kind(items)


def _replaced(container: Any, items: Any) -> Any:
    new = copy.copy(container)
    for key, item in items:
        new[key] = item
    return new


def has_graph(value: Any) -> bool:
    """True where a tensor in ``value`` was computed from one that requires a gradient."""
    return any(t.grad_fn is not None for t in tensors_in(value))
