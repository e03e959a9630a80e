"""A probe: looks on at an ordinary training loop through PyTorch's own hooks, every few steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from halfstep.diagnosis.culprit import Breakdown, explain_breakdown, nonfinite_counts
from halfstep.diagnosis.statistics import (
    Exponents,
    Updates,
    count_exponents,
    count_updates,
    total,
)

__all__ = ["Evidence", "LayerEvidence", "Probe", "Sample"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one step showed, over all layers; ``step`` counts from 1."""

    step: int
    weight_gradients: Exponents
    activation_gradients: Exponents
    updates: Updates


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEvidence:
    """What one layer showed, over all sampled steps."""

    name: str
    weight_gradients: Exponents
    activation_gradients: Exponents
    updates: Updates


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All a :class:`Probe` saw. ``breakdown`` is None if every weight stayed finite."""

    samples: tuple[Sample, ...] = ()
    layers: tuple[LayerEvidence, ...] = ()
    breakdown: Breakdown | None = None

    @property
    def weight_gradients(self) -> Exponents:
        """Over all sampled steps and layers."""
        return total(sample.weight_gradients for sample in self.samples)

    @property
    def activation_gradients(self) -> Exponents:
        """Over all sampled steps and layers."""
        return total(sample.activation_gradients for sample in self.samples)

    def updates(self, last: float = 1.0) -> Updates:
        """Over the ``last`` share of the sampled steps, at least one of them."""
        count = max(1, round(last * len(self.samples)))
        return sum((sample.updates for sample in self.samples[-count:]), start=Updates())


class Probe:
    """Samples gradients and updates of ``model`` under ``optimizer`` every ``every`` steps.

    ::

        with Probe(model, optimizer, every=25) as probe:
            ...                     # the loop, as it is
        probe.evidence()

    Attach it after a switch, so that it sees the weights the optimizer sees. Every step costs one
    norm over the weights, to notice the step at which they stop being finite; a sampled step costs
    one pass over gradients and weights more. Gradients of activations are those of the outputs of
    modules without children (the first output, where there are several), as they are: under a
    recipe with a loss scale they are still multiplied by it.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, every: int = 25) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self._model = model
        self._optimizer = optimizer
        self._every = every
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._order = [name for name, _ in model.named_modules()]
        self._handles: list[RemovableHandle] = []
        self._step = 0
        self._before: dict[nn.Parameter, Tensor] = {}
        self._seen: dict[str, _Tally] = {}
        self._layers: dict[str, _Tally] = {}
        self._samples: list[Sample] = []
        self._breakdown: Breakdown | None = None

    def __enter__(self) -> Self:
        for name, module in self._model.named_modules():
            if not any(True for _ in module.children()):
                self._handles.append(module.register_forward_hook(self._watch_output(name)))
        self._handles.append(self._optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(self._optimizer.register_step_post_hook(self._after_step))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def breakdown(self) -> Breakdown | None:
        """The first step whose weights were not finite, or None so far."""
        return self._breakdown

    def evidence(self) -> Evidence:
        """All that was seen up to now."""
        return Evidence(
            samples=tuple(self._samples),
            layers=tuple(
                LayerEvidence(
                    name=name,
                    weight_gradients=tally.weight_gradients,
                    activation_gradients=tally.activation_gradients,
                    updates=tally.updates,
                )
                for name in self._order
                if (tally := self._layers.get(name)) is not None
            ),
            breakdown=self._breakdown,
        )

    def _sampling(self) -> bool:
        return self._step % self._every == 0 and self._breakdown is None

    def _watch_output(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(gradient: Tensor) -> None:
            tally = self._seen.setdefault(name, _Tally())
            tally.activation_gradients += count_exponents(gradient)

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if self._sampling() and isinstance(first, Tensor) and first.requires_grad:
                first.register_hook(record)

        return hook

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._sampling():
            self._before = {
                parameter: parameter.detach().clone()
                for parameter in self._names
                if parameter.grad is not None
            }

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, before in self._before.items():
            if parameter.grad is not None:
                layer = self._names[parameter].rpartition(".")[0]
                tally = self._seen.setdefault(layer, _Tally())
                tally.weight_gradients += count_exponents(parameter.grad)
                tally.updates += count_updates(before, parameter, parameter.grad)
        if self._before:
            self._close_sample()
        self._step += 1
        if self._breakdown is None:
            norm = get_total_norm([parameter.detach() for parameter in self._names])
            if not bool(torch.isfinite(norm)) and nonfinite_counts(self._model.named_parameters()):
                self._breakdown = explain_breakdown(self._model, self._optimizer, self._step)

    def _close_sample(self) -> None:
        tallies = self._seen.values()
        self._samples.append(
            Sample(
                step=self._step + 1,
                weight_gradients=total(tally.weight_gradients for tally in tallies),
                activation_gradients=total(tally.activation_gradients for tally in tallies),
                updates=sum((tally.updates for tally in tallies), start=Updates()),
            )
        )
        for name, tally in self._seen.items():
            self._layers.setdefault(name, _Tally()).add(tally)
        self._before, self._seen = {}, {}


class _Tally:
    """What one layer showed so far."""

    def __init__(self) -> None:
        self.weight_gradients = Exponents()
        self.activation_gradients = Exponents()
        self.updates = Updates()

    def add(self, other: _Tally) -> None:
        self.weight_gradients += other.weight_gradients
        self.activation_gradients += other.activation_gradients
        self.updates += other.updates
