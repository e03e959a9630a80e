"""What a switch knows of its model's weights for dot products by role: names, kept layers, histories."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from halfstep.switching.operands import Operands
from halfstep.switching.plan import Plan
from halfstep.switching.roled import RoledEmulator, Weights

__all__ = ["Roles", "layers"]

_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)


class Roles:
    """Of one switch; lives as long as it is on."""

    __slots__ = ("_names", "_plan", "_shared", "kept", "operands")

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        self._plan = plan
        self.operands = Operands(plan.recipe)
        self._shared: set[Any] = set()
        self._names: dict[int, str] = {}
        self.kept: frozenset[int] = frozenset()
        """Masters (by id) whose layers keep the store format."""
        if plan.reads_by_role:
            self.look(model)

    def look(self, model: nn.Module) -> None:
        """Take in the model's parameters as they are now."""
        self._names = {id(p): name for name, p in model.named_parameters()}
        found = layers(model)
        kept = self._plan.recipe.keep.layers(len(found))
        self.kept = frozenset(id(p) for k in kept for p in found[k].parameters(recurse=False))

    def name_of(self, master: Tensor) -> str:
        """The parameter's name; one made of its shape where it is not the model's."""
        return self._names.get(id(master)) or f"weight {tuple(master.shape)}"

    def emulator(self, weight_name: Callable[[Tensor], str]) -> RoledEmulator:
        """The emulator of one region."""
        plan = self._plan
        weights = Weights(self._shared)
        return RoledEmulator(plan.low, plan.accumulator, self.operands, weights, weight_name)

    def begin_step(self) -> None:
        """A forward with a graph begins: what was seen in the last one becomes history."""
        if self.operands.histories.window:
            self.operands.histories.roll()

    def state_dict(self) -> dict[str, Any]:
        """The histories, where the recipe has any."""
        histories = self.operands.histories
        return {"amax_history": histories.state_dict()} if histories.window else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``; what the state lacks stays as it is."""
        if self.operands.histories.window and "amax_history" in state:
            self.operands.histories.load_state_dict(state["amax_history"])


def layers(model: nn.Module) -> list[nn.Module]:
    """Modules that own a weight of two or more axes, embeddings left out, in the order of ``modules()``."""
    return [
        module
        for module in model.modules()
        if not isinstance(module, _LOOKUPS)
        and any(p.dim() >= 2 for p in module.parameters(recurse=False))
    ]
