"""What a row of the catalogue is.

A row is a class of `transformers` or `diffusers`, a configuration small enough for a CPU, and what a batch
is. Nothing is downloaded: weights are drawn as the library draws them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Generator, Tensor, nn

from halfstep.study.architectures.batches import Batch

__all__ = ["Architecture", "Kind"]


class Kind(StrEnum):
    """What a model is for: the column by which the table is read."""

    ENCODER = "encoder"
    DECODER = "decoder"
    ENCODER_DECODER = "encoder-decoder"
    EXPERTS = "mixture of experts"
    STATE_SPACE = "state space"
    RECURRENT = "recurrent"
    VISION = "vision"
    SEGMENTATION = "segmentation"
    DETECTION = "detection"
    IMAGE_TEXT = "image and text"
    SPEECH = "speech"
    SOUND = "sound"
    DIFFUSION = "diffusion"
    SERIES = "time series"
    PROTEIN = "protein"
    CONTROL = "control"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A published architecture, small.

    Args:
        name: by which the command line asks for it.
        kind: what it is for.
        model: its class in ``library``.
        config: its configuration class there; the name of the class itself where it takes its
            arguments itself, as in diffusers.
        options: what the configuration is given.
        batch: draws a batch; its keys are the arguments of the model, ``target`` apart.
        answer: the output that is compared with a batch's target, of models without a loss of their own.
        rate: AdamW's.
        nested: options that are configurations themselves: class and options of each.
    """

    name: str
    kind: Kind
    model: str
    config: str
    options: Mapping[str, Any]
    batch: Callable[[Generator], Batch]
    library: str = "transformers"
    answer: str = "sample"
    rate: float = 1e-3
    nested: Mapping[str, tuple[str, Mapping[str, Any]]] = field(
        default_factory=dict[str, tuple[str, Mapping[str, Any]]]
    )

    def build(self) -> nn.Module:
        """The model in training mode, its weights drawn from torch's generator."""
        library = importlib.import_module(self.library)
        cls = getattr(library, self.model)
        options = dict(self.options)
        for option, (config, inner) in self.nested.items():
            options[option] = getattr(library, config)(**inner)
        if self.config == self.model:
            return cls(**options).train()
        return cls(getattr(library, self.config)(**options)).train()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's own loss; where it has none, the mean squared error of its answer."""
        arguments = dict(batch)
        target = arguments.pop("target", None)
        outputs = model(**arguments)
        if target is None:
            return outputs.loss
        return nn.functional.mse_loss(getattr(outputs, self.answer).float(), target)
