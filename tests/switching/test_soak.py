"""A long run with every fault there is ends with the masters of a simulation that knows no switch."""

import math
import os
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import halfstep
from halfstep.errors import NonFiniteError

RATE, MOMENTUM, INTERVAL = 1e-3, 0.9, 25
RECIPE = f"fp16:initial=1024,interval={INTERVAL}"
FAULTS = ("inf", "nan", "overflow", "forward", "backward", "optimizer", "scale")
OFTEN, RARELY = 0.1, 0.002


class Stop(Exception):  # noqa: N818 - not an error of the program
    """What is raised in the middle of things."""


class Optimizer(torch.optim.SGD):
    fails = False

    def step(self, closure=None):
        if self.fails:
            raise Stop
        return super().step(closure)


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))


def faults(seed):
    draw = random.Random(seed)
    while True:
        if draw.random() < RARELY:
            yield "off"
        else:
            yield draw.choice(FAULTS) if draw.random() < OFTEN else "none"


def batches(seed):
    g = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(4, 8, generator=g)
        yield x, x[:, :3].sin()


def spoilt(x, fault):
    if fault in ("inf", "nan"):
        x = x.clone()
        x[1, 2] = float(fault)
    return x


def stop(*args):
    raise Stop


class Switched:
    """The program under test: a loop that goes on after whatever is raised."""

    def __init__(self):
        self.model = make()
        self.optimizer = Optimizer(self.model.parameters(), lr=RATE, momentum=MOMENTUM)
        self.switch = halfstep.switch(self.model, self.optimizer, RECIPE)

    def step(self, x, y, fault):
        if fault == "off":
            state = self.switch.state_dict()
            self.switch.off()
            assert type(self.model[0]._parameters) is dict, "not as it was"
            self.switch = halfstep.switch(self.model, self.optimizer, RECIPE)
            self.switch.load_state_dict(state)
        if fault == "scale":
            state = self.switch.state_dict()
            self.switch.load_state_dict({**state, "scale": state["scale"] * 2})
        self.optimizer.zero_grad()
        self.optimizer.fails = fault == "optimizer"
        hook = self.model[1].register_forward_hook(stop) if fault == "forward" else None
        try:
            out = self.model(spoilt(x, fault))
            loss = (out - y).square().mean()
            if fault == "backward":
                out.register_hook(stop)
            (loss * (1e9 if fault == "overflow" else 1.0)).backward()
            self.optimizer.step()
        except Stop:
            assert fault in ("forward", "backward", "optimizer")
        except NonFiniteError:
            assert fault in ("inf", "nan")
        else:
            assert fault not in ("forward", "backward", "optimizer", "inf", "nan")
        finally:
            if hook is not None:
                hook.remove()

    def masters(self):
        return [p.detach() for p in self.model.parameters()]

    def scale(self):
        return self.switch.loss_scale


class Simulated:
    """The same by the rule, written out: casts, a scale, momentum. Nothing here is halfstep's."""

    def __init__(self):
        self.weights = [p.detach().clone() for p in make().parameters()]
        self.momenta = [None] * len(self.weights)
        self.s, self.clean = 1024.0, 0

    def step(self, x, y, fault):
        if fault == "scale":
            self.s *= 2
        if fault in ("inf", "nan", "forward", "backward", "optimizer"):
            return
        gradients = self.gradients(x, y, 1e9 if fault == "overflow" else 1.0)
        if not all(g.isfinite().all() for g in gradients):
            self.s, self.clean = max(self.s / 2, 1.0), 0
            return
        for k, (w, g) in enumerate(zip(self.weights, gradients, strict=True)):
            m = self.momenta[k]
            self.momenta[k] = g.clone() if m is None else m.mul_(MOMENTUM).add_(g)
            w.add_(self.momenta[k], alpha=-RATE)
        self.clean += 1
        if self.clean == INTERVAL:
            self.s, self.clean = self.s * 2, 0

    def gradients(self, x, y, factor):
        low = [w.half().requires_grad_() for w in self.weights]
        w1, b1, w2, b2 = (c.float() for c in low)
        hidden = F.linear(x.half().float(), w1, b1).half().relu()
        inside = F.linear(hidden.float(), w2, b2).half()
        out = inside.detach().float().requires_grad_()
        (g,) = torch.autograd.grad((out - y).square().mean() * factor, out)
        return [
            g16.float() / self.s for g16 in torch.autograd.grad(inside, low, (g * self.s).half())
        ]

    def masters(self):
        return self.weights

    def scale(self):
        return self.s


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def memory():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def soak(steps, seed, settled=None):
    """Both side by side; the growth of memory since step ``settled``, and how often each fault came."""
    switched, simulated = Switched(), Simulated()
    counts, scales, before = {}, set(), math.nan
    for step, fault, (x, y) in zip(range(steps), faults(seed), batches(seed), strict=False):
        switched.step(x, y, fault)
        simulated.step(x, y, fault)
        counts[fault] = counts.get(fault, 0) + 1
        scales.add(simulated.scale())
        assert switched.scale() == simulated.scale(), f"step {step}, after {fault}"
        if step % 100 == 0 or step == steps - 1:
            same = map(torch.equal, switched.masters(), simulated.masters())
            assert all(same), f"step {step}, after {fault}"
        if step == settled:
            before = memory()
    assert set(counts) == {"none", "off", *FAULTS}
    assert len(scales) > 4
    switched.switch.off()
    return memory() / before - 1


def test_five_hundred_steps_with_faults():
    soak(500, seed=1)


@pytest.mark.slow
def test_twenty_thousand_steps_with_faults_and_no_growth_of_memory():
    growth = soak(20_000, seed=0, settled=2_000)
    print(f"memory grew by {growth:.2%} from step 2,000 to 20,000")
    assert growth <= 0.02
