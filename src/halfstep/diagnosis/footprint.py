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
    model: nn.Module, optimizer: Optimizer, forward: Callable[[], Tensor]
) -> Footprint:
    """The :class:`Footprint` of one step whose loss ``forward()`` computes; after a first step.

    Working copies are what the modules find in place of their parameters while ``forward()`` runs:
    under a switch, rounded copies; in plain PyTorch, the parameters themselves, and so none.
    Leaves gradients as a backward of that loss leaves them.
    """
    owned = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
    copies: dict[int, int] = {}
    saved: dict[int, int] = {}

    def look(module: nn.Module, inputs: object) -> None:
        for name, _ in module.named_parameters(recurse=False):
            found = getattr(module, name)
            if _address(found) not in owned:
                copies[_address(found)] = found.untyped_storage().nbytes()

    def note(tensor: Tensor) -> Tensor:
        saved[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    handles = [module.register_forward_pre_hook(look) for module in model.modules()]
    try:
        with saved_tensors_hooks(note, lambda tensor: tensor):
            loss = forward()
    finally:
        for handle in handles:
            handle.remove()
    loss.backward()
    return Footprint(
        weights=_bytes(model.parameters()),
        working=sum(copies.values()),
        activations=sum(size for at, size in saved.items() if at not in owned and at not in copies),
        gradients=_bytes(p.grad for p in model.parameters() if p.grad is not None),
        optimizer=_bytes(
            value
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ),
    )


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
