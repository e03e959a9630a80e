"""Switches in Lightning, Accelerate, Hugging Face's Trainer and tensorboard: the packages themselves."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import halfstep
from halfstep.errors import OperandError, SwitchError
from halfstep.switching import log_to

EXAMPLES = Path(__file__).parents[3] / "examples" / "frameworks"
# So large that gradients overflow at it, and after some halvings do not.
TOO_LARGE = 2.0**24
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))


def data():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("framework", ["accelerate", "lightning", "transformers"])
def test_the_example_runs_and_is_short(framework, tmp_path, monkeypatch):
    pytest.importorskip(framework)
    monkeypatch.chdir(tmp_path)
    example = EXAMPLES / f"with_{framework}.py"
    assert len(example.read_text().splitlines()) <= 40
    runpy.run_path(str(example))


# -- Lightning ------------------------------------------------------------------------------------------


def lightning_run(recipe, steps, checkpoint=None, scale=None, folder=None, clip=None, loader=None):
    """A training of some steps; returns the module, the trainer, reports and the learning rates they saw."""
    import lightning

    from halfstep.switching.frameworks.lightning import HalfstepPrecision

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.rates, self.reports, self.largest = [], [], []

        def on_train_start(self):
            if scale is not None:
                plugin.switch.load_state_dict({"scale": scale})
            plugin.switch.on_step(self.reports.append)

        def training_step(self, batch, index):
            self.rates.append(self.optimizers().param_groups[0]["lr"])
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        def on_before_optimizer_step(self, optimizer):
            grads = [p.grad.norm() for p in self.parameters()]
            self.largest.append(torch.stack(grads).norm().item())

    plugin = HalfstepPrecision(recipe)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        gradient_clip_val=clip,
        plugins=[plugin],
    )
    lit = Lit()
    loader = loader or torch.utils.data.DataLoader(data(), 16)
    lit.on_train_end = lambda: trainer.save_checkpoint(Path(folder) / "last.ckpt")
    trainer.fit(lit, loader, ckpt_path=checkpoint)
    assert plugin.switch is None
    return lit


def test_lightning_skips_without_moving_the_schedule(tmp_path):
    pytest.importorskip("lightning")
    lit = lightning_run("fp16", 30, scale=TOO_LARGE, folder=tmp_path)
    applied = [r.applied for r in lit.reports]
    assert len(applied) == 30
    assert not applied[0] and applied[-1], (
        "the scale is to be too large at first and found in the end"
    )
    expected = [1e-2 * 0.5 ** sum(applied[:k]) for k in range(30)]
    assert lit.rates == pytest.approx(expected, rel=1e-12)


def test_lightning_clips_true_gradients(tmp_path):
    """Lightning's own 16-mixed once clipped what was scaled (PR 9606): here hooks see FP32's norms."""
    pytest.importorskip("lightning")
    low = lightning_run("fp16", 4, folder=tmp_path, clip=1e-3)
    exact = lightning_run("fp32", 4, folder=tmp_path, clip=1e-3)
    # the first step's: 2 layers, at most 32 roundings; clipped later ones go apart with the weights
    assert low.largest[0] == pytest.approx(exact.largest[0], rel=32 * 2.0**-11)


def test_lightning_resumes_at_its_scale(tmp_path):
    pytest.importorskip("lightning")
    whole = lightning_run("fp16", 12, scale=TOO_LARGE, folder=tmp_path)
    lightning_run("fp16", 4, scale=TOO_LARGE, folder=tmp_path)  # one epoch
    resumed = lightning_run("fp16", 12, checkpoint=tmp_path / "last.ckpt", folder=tmp_path)
    assert [r.loss_scale for r in resumed.reports] == [r.loss_scale for r in whole.reports[4:]]


class Stateful:
    """A loader that goes on where it was; torch's own begins an epoch anew when a run resumes.

    It has a length: of one without, Lightning fetches a batch ahead, and its place is saved one too far.
    """

    def __init__(self):
        self.at = 0

    def __len__(self):
        return 12

    def __iter__(self):
        while self.at < len(self):
            x, y = data()[(rows := torch.arange(16) + 16 * (self.at % 4))]
            self.at += 1
            yield x, y, rows

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("stop", [4, 6])
def test_lightning_resumes_bit_for_bit_with_a_loader_that_does(tmp_path, stop):
    """Without halfstep, too, a plain DataLoader's batches begin anew: weights then differ by the data."""
    pytest.importorskip("lightning")
    whole = lightning_run("fp16", 12, scale=TOO_LARGE, folder=tmp_path, loader=Stateful())
    lightning_run("fp16", stop, scale=TOO_LARGE, folder=tmp_path, loader=Stateful())
    last = tmp_path / "last.ckpt"
    resumed = lightning_run("fp16", 12, checkpoint=last, folder=tmp_path, loader=Stateful())
    assert [r.loss_scale for r in resumed.reports] == [r.loss_scale for r in whole.reports[stop:]]
    assert same(weights(resumed), weights(whole))


# -- Accelerate -----------------------------------------------------------------------------------------


def prepared(scale=TOO_LARGE, fused=False):
    from accelerate import Accelerator

    from halfstep.switching.frameworks.accelerate import follow

    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    switch = halfstep.switch(model, optimizer, recipe="fp16")
    switch.load_state_dict({"scale": scale})
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    accelerator = Accelerator(cpu=True)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    follow(accelerator, switch)
    return accelerator, model, optimizer, schedule, switch


def accelerated_steps(run, count):
    accelerator, model, optimizer, schedule, switch = run
    x, y = data().tensors
    told = []
    for _ in range(count):
        accelerator.backward(cross_entropy(model(x), y))
        optimizer.step()
        told.append((optimizer.step_was_skipped, accelerator.optimizer_step_was_skipped))
        schedule.step()
        optimizer.zero_grad()
        assert told[-1] == (not switch.last_step.applied,) * 2
    return [skipped for skipped, _ in told]


@pytest.mark.parametrize("fused", [False, True])
def test_accelerate_knows_what_was_skipped(fused):
    """Its guess from the scale is wrong with fused AdamW (its thread 4242)."""
    pytest.importorskip("accelerate")
    run = prepared(fused=fused)
    skipped = accelerated_steps(run, 30)
    assert skipped[0] and not skipped[-1]
    rate = run[2].param_groups[0]["lr"]
    assert rate == pytest.approx(1e-2 * 0.5 ** skipped.count(False), rel=1e-12)


def test_accelerate_resumes_bit_for_bit(tmp_path):
    pytest.importorskip("accelerate")
    first = prepared()
    accelerated_steps(first, 3)
    first[0].save_state(str(tmp_path))
    accelerated_steps(first, 9)
    second = prepared(scale=4.0)
    second[0].load_state(str(tmp_path))
    accelerated_steps(second, 9)
    assert second[-1].last_step == first[-1].last_step
    assert same(weights(second[1]), weights(first[1]))


def test_accelerate_has_one_mixed_precision():
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    from halfstep.switching.frameworks.accelerate import follow, tell_skipped

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = halfstep.switch(model, optimizer, recipe="fp16")
    accelerator = Accelerator(cpu=True)
    with pytest.raises(SwitchError, match=r"first, then accelerator\.prepare, then follow"):
        follow(accelerator, switch)
    with pytest.raises(OperandError, match="that Accelerate has prepared, not a SGD"):
        tell_skipped(optimizer, switch)
    accelerator.state._mixed_precision = "bf16"
    try:
        with pytest.raises(SwitchError, match=r"mixed_precision='bf16'.*one of the two"):
            follow(accelerator, switch)
    finally:
        accelerator.state._mixed_precision = "no"


# -- Hugging Face's Trainer -----------------------------------------------------------------------------


def trained(folder, steps, resume=None, scale=None):
    import transformers

    from halfstep.switching.frameworks.transformers import HalfstepCallback

    class Scale(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if scale is not None:
                callback.switch.load_state_dict({"scale": scale})
            callback.switch.on_step(reports.append)

    reports = []
    callback = HalfstepCallback("fp16")
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    tokens = [(torch.arange(16) + start) % 64 for start in range(32)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=steps,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        use_cpu=True,
        logging_steps=1,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        transformers.GPT2LMHeadModel(config),
        arguments,
        train_dataset=[{"input_ids": t, "labels": t} for t in tokens],
        callbacks=[callback, Scale()],
    )
    trainer.train(resume_from_checkpoint=resume)
    assert callback.switch is None
    return trainer, reports


def test_the_trainer_skips_logs_and_resumes_bit_for_bit(tmp_path):
    """Its own resume began at scale 65536 instead of 256 (transformers' thread 34053)."""
    pytest.importorskip("transformers")
    whole, reports = trained(tmp_path / "a", 8, scale=2.0**21)
    logs = [log for log in whole.state.log_history if "loss" in log]
    assert [log["amp/skipped_steps"] for log in logs] == [r.skipped_steps for r in reports]
    assert not reports[0].applied and reports[-1].applied
    applied = sum(r.applied for r in reports)
    assert whole.lr_scheduler.get_last_lr()[0] == pytest.approx(5e-5 * applied / 10, rel=1e-12)
    resumed, later = trained(tmp_path / "a", 8, resume=str(tmp_path / "a" / "checkpoint-4"))
    assert [r.loss_scale for r in later] == [r.loss_scale for r in reports[4:]]
    assert [r.step for r in later] == [5, 6, 7, 8]
    assert same(weights(resumed.model), weights(whole.model))


def test_the_trainer_has_one_mixed_precision(tmp_path):
    pytest.importorskip("transformers")
    import transformers

    from halfstep.switching.frameworks.transformers import HalfstepCallback

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, bf16=True, report_to=[]
    )
    trainer = transformers.Trainer(
        net(), arguments, train_dataset=[0], callbacks=[HalfstepCallback("fp16")]
    )
    with pytest.raises(SwitchError, match="bf16=True and HalfstepCallback was given fp16"):
        trainer.train()


# -- tensorboard ----------------------------------------------------------------------------------------


def test_tensorboard_has_the_scale_of_each_step(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = halfstep.switch(model, optimizer, recipe="fp16")
    switch.load_state_dict({"scale": TOO_LARGE})
    reports = []
    x, y = data().tensors
    with SummaryWriter(str(tmp_path)) as writer:
        switch.on_step(log_to(writer))
        switch.on_step(reports.append)
        for _ in range(12):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    events = EventAccumulator(str(tmp_path)).Reload()
    found = events.Scalars("amp/loss_scale")
    assert [(e.step, e.value) for e in found] == [(r.step, r.loss_scale) for r in reports]
    assert len({e.value for e in found}) > 1


def test_frameworks_are_imported_by_their_users_only():
    for name in ("lightning", "accelerate", "transformers"):
        code = f"import halfstep.switching, sys; sys.exit({name!r} in sys.modules)"
        import subprocess

        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
