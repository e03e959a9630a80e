"""The cause, isolated in seconds: plain SGD at a small step on real digits.

Micikevicius et al. 2017, section 3.1: an update much smaller than its weight is lost when added
to it in FP16. Nothing but SGD and a two-layer network is here, so nothing else can be the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfstep.study.datasets import mnist_5k
from halfstep.study.driving import Pace, Tell, Trainee, drive
from halfstep.study.runs import Experiment, Run

__all__ = ["Digits", "DigitsPlan", "load_digits", "train_digits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitsPlan:
    """Hyper-parameters: a small step and many of them, as in the last phase of a long training."""

    steps: int = 5000
    batch: int = 100
    rate: float = 1e-3
    hidden: int = 64
    points: int = 8
    probe_every: int = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Real digits: images float32 (n, 784), labels int64 (n,); nine tenths train, one
    tenth tests.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """MNIST's 5,000 digits of :func:`mnist_5k`, 4,000 to train and 1,000 to test, shuffled once."""
    images, labels = mnist_5k()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2017))
    flat, classes = torch.from_numpy(images).flatten(1)[order], torch.from_numpy(labels)[order]
    return Digits(
        train_images=flat[1000:],
        train_labels=classes[1000:],
        test_images=flat[:1000],
        test_labels=classes[:1000],
    )


def train_digits(experiment: Experiment, digits: Digits, plan: DigitsPlan, tell: Tell) -> Run:
    """Train a two-layer network as ``experiment`` says (see :func:`drive`); errors are in percent of
    the test digits.

    Nothing is chosen by it, so there is no development part: the curve is of the test part.
    """
    torch.manual_seed(experiment.seed)
    model = nn.Sequential(nn.Linear(784, plan.hidden), nn.ReLU(), nn.Linear(plan.hidden, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=plan.rate)
    draw = torch.Generator().manual_seed(experiment.seed)

    def loss_of(chosen: Tensor) -> Tensor:
        scores = model(digits.train_images[chosen]).float()
        return nn.functional.cross_entropy(scores, digits.train_labels[chosen])

    def step() -> float:
        loss = loss_of(torch.randint(len(digits.train_labels), (plan.batch,), generator=draw))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def error() -> float:
        with torch.no_grad():
            guesses = model(digits.test_images).argmax(dim=1)
        return 100 * float((guesses != digits.test_labels).float().mean())

    trainee = Trainee(
        model=model,
        optimizer=optimizer,
        step=step,
        check=error,
        score=lambda: (error(), ()),
        ruler=lambda: loss_of(torch.arange(plan.batch)),
    )
    pace = Pace(steps=plan.steps, points=plan.points, probe_every=plan.probe_every)
    return drive(experiment, trainee, pace, tell)
