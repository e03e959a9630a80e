"""The processes that train one model together, and what they have to agree on.

A verdict that one rank comes to alone is the worst that a distributed run can have: one skips a step or
raises, the others wait for it in the next collective. What is found out here is the same on all ranks.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "Ranks",
    "active_ddp",
    "is_fully_sharded",
    "is_part_of",
    "is_sharded",
    "local",
    "ranks_of",
    "sharded_like",
    "shards",
    "whole",
]


_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Process groups that span all who train one model: one, or one a dimension of a device mesh.

    Without groups a process is by itself. Every method with "all ranks" is a collective: called on all ranks
    of the groups, in the same order.
    """

    groups: tuple[Any, ...] = ()
    ddp: tuple[DistributedDataParallel, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.groups)

    def __or__(self, other: Ranks) -> Ranks:
        groups = self.groups + tuple(g for g in other.groups if g not in self.groups)
        return Ranks(groups=groups, ddp=self.ddp + other.ddp)

    def now(self) -> Ranks:
        """These; none within DistributedDataParallel.join(): ranks out of data take no steps."""
        joining = any(getattr(getattr(d, "_join_config", None), "enable", False) for d in self.ddp)
        return Ranks() if joining else self

    @property
    def is_first(self) -> bool:
        """True on the rank that writes files, and on a process by itself."""
        return all(dist.get_rank(group) == 0 for group in self.groups)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return math.prod(dist.get_world_size(group) for group in self.groups)

    def first_with(self, flags: Sequence[bool]) -> list[int | None]:
        """All ranks: for each flag, the lowest rank on which it is true; None where it is on none."""
        if not self.groups:
            return [0 if flag else None for flag in flags]
        none = 1 << 40
        mine = dist.get_rank()
        found = self._reduced([mine if flag else none for flag in flags], dist.ReduceOp.MIN)
        return [None if rank == none else rank for rank in found]

    def sums(self, numbers: Sequence[int]) -> list[int]:
        """All ranks: the sum of each number over them."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def largest(self, number: float) -> float:
        """All ranks: the largest of them; inf where one is NaN."""
        if not self.groups:
            return number
        return self._reduced([math.inf if math.isnan(number) else number], dist.ReduceOp.MAX)[0]

    def gathered(self, value: Any) -> dict[int, Any]:
        """All ranks: rank -> its value."""
        found = {dist.get_rank() if self.groups else 0: value}
        for group in self.groups:
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, found, group=group)
            found = {rank: v for part in parts for rank, v in part.items()}
        return found

    def _reduced(self, numbers: Sequence[_Number], how: Any) -> list[_Number]:
        dtype = torch.float64 if isinstance(numbers[0], float) else torch.int64
        for group in self.groups:
            kinds = {device.type for device in getattr(group, "_device_types", ())}
            device = "cpu" if "cpu" in kinds or not kinds else kinds.pop()
            tensor = torch.tensor(list(numbers), dtype=dtype, device=device)
            dist.all_reduce(tensor, how, group=group)
            numbers = tensor.tolist()
        return list(numbers)


def ranks_of(model: nn.Module, around: DistributedDataParallel | None = None) -> Ranks:
    """Those who train ``model``: of its DistributedDataParallel or that around it, of its sharded parts."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    wrapped = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    if around is not None:
        wrapped.append(around)
    groups: list[Any] = [ddp.process_group for ddp in wrapped]
    for parameter in model.parameters():
        if is_sharded(parameter):
            groups.extend(parameter.device_mesh.get_all_groups())  # pyright: ignore[reportAttributeAccessIssue]
    found: list[Any] = []
    for group in groups:
        if group not in found and dist.get_world_size(group) > 1:
            found.append(group)
    return Ranks(groups=tuple(found), ddp=tuple(wrapped))


def active_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward is running, or None."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def _dtensor() -> Any:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there is no DTensor
    return getattr(module, "DTensor", None)


def is_fully_sharded(module: nn.Module) -> bool:
    """True for a module that fully_shard was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def is_part_of(optimizer: Any, outer: Any) -> bool:
    """True for the optimizer that a ZeroRedundancyOptimizer runs on its part of the parameters."""
    return hasattr(outer, "consolidate_state_dict") and getattr(outer, "optim", None) is optimizer


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor, which is spread over a device mesh."""
    kind = _dtensor()
    return kind is not None and isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this rank: of a DTensor its shard, without communication."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def whole(tensor: Tensor) -> Tensor:
    """All ranks: a tensor in one piece."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, whole on every rank, spread as ``like`` is; no communication."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(like.device),
        like.device_mesh,  # pyright: ignore[reportAttributeAccessIssue]
        like.placements,  # pyright: ignore[reportAttributeAccessIssue]
        src_data_rank=None,
    )


def shards(tensor: Tensor) -> int:
    """Into how many different parts a tensor is cut."""
    if not is_sharded(tensor):
        return 1
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    return math.prod(size for placement, size in sizes if placement.is_shard())


def shard_of(part: Tensor, like: Tensor) -> Tensor:
    """This rank's ``part`` as a tensor spread as ``like`` is; itself if that is not. No communication."""
    if not is_sharded(like):
        return part
    return _dtensor().from_local(
        part,
        like.device_mesh,  # pyright: ignore[reportAttributeAccessIssue]
        like.placements,  # pyright: ignore[reportAttributeAccessIssue]
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def without_memory(tensor: Tensor) -> Tensor:
    """A sharded tensor on the meta device, spread alike."""
    return shard_of(local(tensor).to("meta"), tensor)


def shard_number(tensor: Tensor) -> int:
    """Which part of a tensor this rank has, alike on ranks that have the same; 0 where it has all."""
    number = 0
    if is_sharded(tensor):
        mesh, placements = tensor.device_mesh, tensor.placements  # pyright: ignore[reportAttributeAccessIssue]
        for size, place, placement in zip(
            mesh.shape, mesh.get_coordinate() or (), placements, strict=True
        ):
            if not placement.is_replicate():
                number = number * size + place
    return number
