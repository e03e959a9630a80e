"""Bytes a training step holds: weights, working copies, activations, gradients, optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

__all__ = ["Footprint", "measure_footprint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes held while one training step runs.

    ``weights`` are those the optimizer updates; ``working`` the rounded copies the forward reads,
    where there are any; ``activations`` what autograd keeps for the backward, each storage once.
    """

    weights: int
    working: int
    activations: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.working + self.activations + self.gradients + self.optimizer


def measure_footprint(
    model: nn.Module, optimizer: Optimizer, forward: Callable[[], Tensor], *, working: int = 0
) -> Footprint:
    """The :class:`Footprint` of one step whose loss ``forward()`` computes; after a first step.

    ``working`` is what the recipe's copies of the weights take. Leaves gradients as a backward of
    that loss leaves them.
    """
    owned = {tensor.untyped_storage().data_ptr() for tensor in _tensors(model)}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    loss.backward()
    return Footprint(
        weights=_bytes(model.parameters()),
        working=working,
        activations=sum(kept.values()),
        gradients=_bytes(p.grad for p in model.parameters() if p.grad is not None),
        optimizer=_bytes(
            value
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ),
    )


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
