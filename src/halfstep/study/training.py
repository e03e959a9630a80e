"""The recogniser's training: batches, an ordinary PyTorch step, evaluation."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer

from halfstep.study.corpus import Corpus, Sentence
from halfstep.study.driving import Pace, Tell, Trainee, drive
from halfstep.study.recognizer import Recognizer, RecognizerShape, best_path, encode, error_rate
from halfstep.study.runs import Example, Experiment, Run

__all__ = ["Batch", "Loop", "Plan", "batches", "evaluate", "train_recognizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Hyper-parameters, chosen for FP32 on the development part and kept for every recipe.

    ``join`` is the chance that a sentence is followed by another in the same example; ``gain`` and
    ``noise`` are the deviations of what is added to normalised features, once a sentence and once
    a value; ``points`` of the learning curve are taken over the run.
    """

    steps: int
    batch: int = 16
    rate: float = 4e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    warm_up: float = 0.1
    clip: float = 5.0
    join: float = 0.5
    gain: float = 0.3
    noise: float = 0.1
    channels: int = 160
    stride: int = 3
    dropout: float = 0.2
    points: int = 8
    probe_every: int = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Features float32 (batch, frames, bands), their lengths, and the texts as one row
    of classes.
    """

    features: Tensor
    lengths: Tensor
    targets: Tensor
    target_lengths: Tensor


def batches(corpus: Corpus, plan: Plan, seed: int) -> Iterator[Batch]:
    """Batches without end, the same for the same seed: sentences of like length together, altered
    at random.
    """
    choose = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    while True:
        sentences = list(corpus.train)
        choose.shuffle(sentences)
        examples = []
        while sentences:
            first = sentences.pop()
            features, text = choose.choice(first.versions), first.text
            while sentences and choose.random() < plan.join and len(features) < 400:
                following = sentences.pop()
                features = torch.cat([features, choose.choice(following.versions)])
                text = (
                    f"{text} {following.text}" if " " in corpus.alphabet else text + following.text
                )
            examples.append((features, text))
        examples.sort(key=lambda example: len(example[0]) * choose.uniform(0.9, 1.1))
        groups = [examples[i : i + plan.batch] for i in range(0, len(examples), plan.batch)]
        choose.shuffle(groups)
        for group in groups:
            altered = [_altered(features, plan, noise) for features, _ in group]
            yield _collate(altered, [text for _, text in group], corpus.alphabet)


def _altered(features: Tensor, plan: Plan, draw: torch.Generator) -> Tensor:
    """``features`` a little louder or softer, with a little noise."""
    gain = plan.gain * torch.randn(1, generator=draw)
    return features + gain + plan.noise * torch.randn(features.shape, generator=draw)


def _collate(features: Sequence[Tensor], texts: Sequence[str], alphabet: str) -> Batch:
    return Batch(
        features=pad_sequence(list(features), batch_first=True),
        lengths=torch.tensor([len(one) for one in features]),
        targets=torch.cat([encode(text, alphabet) for text in texts]),
        target_lengths=torch.tensor([len(text) for text in texts]),
    )


def evaluate(
    model: Recognizer, sentences: Sequence[Sentence], alphabet: str
) -> tuple[float, list[Example]]:
    """Character error rate in percent over ``sentences``, and what was read, in their order."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i].versions[0]))
    texts = [""] * len(sentences)
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), 32):
            chosen = order[start : start + 32]
            features = [sentences[i].versions[0] for i in chosen]
            scores = model(pad_sequence(features, batch_first=True)).float()
            steps = model.steps(torch.tensor([len(one) for one in features]))
            for i, row, count in zip(chosen, scores, steps.tolist(), strict=True):
                texts[i] = best_path(row[:count], alphabet)
    model.train()
    examples = [
        Example(reference=sentence.text, recognised=text)
        for sentence, text in zip(sentences, texts, strict=True)
    ]
    return error_rate([e.reference for e in examples], [e.recognised for e in examples]), examples


class Loop:
    """An ordinary training step: CTC, clipping, optimizer, schedule. Nothing in it knows the
    recipe.
    """

    def __init__(self, model: Recognizer, plan: Plan) -> None:
        self.model = model
        self.optimizer: Optimizer = torch.optim.Adam(
            model.parameters(), lr=plan.rate, betas=plan.betas, eps=plan.eps
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _triangle(plan))
        self._clip = plan.clip

    def loss(self, batch: Batch) -> Tensor:
        """Mean over the batch of the negative log-likelihood of its texts, a scalar."""
        scores = self.model(batch.features).float().log_softmax(dim=2)
        likelihood = nn.functional.ctc_loss(
            scores.transpose(0, 1),
            batch.targets,
            self.model.steps(batch.lengths),
            batch.target_lengths,
            reduction="sum",
            zero_infinity=True,
        )
        return likelihood / len(batch.lengths)

    def step(self, batch: Batch) -> float:
        """One update; the loss before it."""
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def _triangle(plan: Plan) -> Callable[[int], float]:
    """The factor of the learning rate at a step: up over the warm-up, then straight
    down to zero.
    """
    rise = max(1, round(plan.warm_up * plan.steps))

    def factor(step: int) -> float:
        return min((step + 1) / rise, (plan.steps - step) / max(1, plan.steps - rise))

    return factor


def train_recognizer(experiment: Experiment, corpus: Corpus, plan: Plan, tell: Tell) -> Run:
    """Train a recogniser on ``corpus`` as ``experiment`` says (see :func:`drive`).

    The curve is taken on the development part; the test part is read once, at the end.
    """
    torch.manual_seed(experiment.seed)
    plan = dataclasses.replace(plan, **experiment.options)
    shape = RecognizerShape(
        bands=corpus.bands,
        classes=len(corpus.alphabet) + 1,
        channels=plan.channels,
        stride=plan.stride,
        dropout=plan.dropout,
    )
    model = Recognizer(shape)
    loop = Loop(model, plan)
    source = batches(corpus, plan, experiment.seed)
    ruler = next(batches(corpus, plan, seed=0))
    trainee = Trainee(
        model=model,
        optimizer=loop.optimizer,
        step=lambda: loop.step(next(source)),
        check=lambda: evaluate(model, corpus.development, corpus.alphabet)[0],
        score=lambda: evaluate(model, corpus.test, corpus.alphabet),
        ruler=lambda: loop.loss(ruler),
    )
    pace = Pace(steps=plan.steps, points=plan.points, probe_every=plan.probe_every)
    return drive(experiment, trainee, pace, tell)
