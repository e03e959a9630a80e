"""Every optimizer there is, switched: it does what it does by hand with the same gradients, bit for bit.

All of ``torch.optim`` (found by looking, so that a new one is not forgotten), torch-optimi and schedulefree
where they are installed, and classes of a user. Each with every flag that torch itself takes on a CPU.
"""

import copy
import inspect
import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import halfstep

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
    pytest.mark.filterwarnings("ignore:.*foreach.* is deprecated"),
]
# What torch's own refuses on a CPU is found out by trying; these it is known to take.
FLAGS = [
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"capturable": True},
    {"maximize": True},
    {"lr": torch.tensor(0.05)},
    {"amsgrad": True},
    {"momentum": 0.9},
    {"centered": True},
    {"decoupled_weight_decay": True},
    {"line_search_fn": "strong_wolfe"},
]
KNOWN = {
    *(
        f"torch.optim.{name}"
        for name in ("SGD", "Adam", "AdamW", "LBFGS", "SparseAdam", "Adafactor", "Rprop")
    ),
    *(f"torch.optim.{name}(foreach=True)" for name in ("SGD", "AdamW", "RMSprop", "NAdam")),
    *(f"torch.optim.{name}(fused=True)" for name in ("SGD", "Adam", "AdamW", "Adagrad")),
    *(f"torch.optim.{name}(maximize=True)" for name in ("SGD", "Adamax", "SparseAdam")),
}
STEPS = 5
OVERFLOWS = (0, 2)
"""Steps whose gradients overflow, from 0."""
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
ROWS = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [8, 0], [1, 2], [3, 4], [5, 6]])


class Dense(nn.Module):
    """Weights of two axes only, which is what Muon takes."""

    def __init__(self, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = (
            nn.EmbeddingBag(9, 8, mode="sum", sparse=True)
            if sparse
            else nn.Linear(6, 8, bias=False)
        )
        if not sparse:
            self.second = nn.Linear(8, 4, bias=False)
        self.given = ROWS if sparse else X

    def forward(self):
        hidden = self.first(self.given).tanh()
        return hidden[:, :4] if self.given is ROWS else self.second(hidden)


def sparse():
    return Dense(sparse=True)


def accepted(kind, flags, model):
    """True where the optimizer itself takes these, unswitched."""
    plain = model()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = make(kind, flags, plain)
            evaluate(plain)()
            optimizer.step(evaluate(plain)) if takes_closure(optimizer) else optimizer.step()
    except (TypeError, ValueError, RuntimeError, AssertionError, NotImplementedError):
        return False
    return True


def make(kind, flags, model):
    given = inspect.signature(kind).parameters
    lr = {} if given["lr"].default is not inspect.Parameter.empty or "lr" in flags else {"lr": 0.01}
    short = {"max_iter": 3} if "max_iter" in given else {}
    # Which otherwise does nothing in its first steps.
    loud = {"silent_sgd_phase": False} if "silent_sgd_phase" in given else {}
    # optimi's kernels are for GPUs; in Triton's interpreter, where other tests run, they do not compile.
    plain = {"triton": False} if "triton" in given else {}
    optimizer = kind(model.parameters(), **{**lr, **short, **loud, **plain, **copy.deepcopy(flags)})
    in_mode(optimizer, "train")
    return optimizer


def in_mode(optimizer, mode):
    """schedulefree's optimizers are told whether it is training or evaluation that comes."""
    if hasattr(optimizer, mode):
        getattr(optimizer, mode)()


def takes_closure(optimizer):
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def label(kind, flags):
    said = ",".join(
        f"{k}={v.item() if isinstance(v, torch.Tensor) else v}" for k, v in flags.items()
    )
    package = (
        "torch.optim" if kind.__module__.startswith("torch.") else kind.__module__.partition(".")[0]
    )
    return f"{package}.{kind.__name__}" + (f"({said})" if said else "")


def of_package(package):
    kinds = [
        kind
        for name, kind in sorted(vars(package).items())
        if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
    ]
    for kind in kinds:
        model = sparse if kind is torch.optim.SparseAdam else Dense
        for flags in [{}, *FLAGS]:
            if set(flags) <= set(inspect.signature(kind).parameters):
                yield kind, flags, model


class PerParameter(Optimizer):
    """A user's: a running sum and a count for each parameter, a list of parameters beside the groups."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.mine = [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.mine:
            if p.grad is None:
                continue
            state = self.state[p]
            state["sum"] = state.get("sum", torch.zeros_like(p)) * 0.5 + p.grad
            state["count"] = state.get("count", 0) + 1
            p.add_(state["sum"] / state["count"], alpha=-self.param_groups[0]["lr"])


class Doubled(torch.optim.Adam):
    """A user's subclass whose step is its parent's, and more."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(0.999)
        return loss


# -- the run and its reference --------------------------------------------------------------------------


def evaluate(model):
    def closure():
        model.zero_grad()
        loss = (model() - Y).square().mean()
        loss.backward()
        return loss

    return closure


def dense_bits(t):
    t = t.detach().to_dense().contiguous()
    return t.view(torch.int32) if t.dtype == torch.float32 else t


def same(a, b):
    """Bit for bit, in whatever they are nested."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and torch.equal(dense_bits(a), dense_bits(b))
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(v, w) for v, w in zip(a, b, strict=True))
    return a == b


def everything(model, optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    for of_one in state["state"].values():
        for key, value in of_one.items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
                of_one[key] = (
                    value.float()
                )  # as torch's own load_state_dict turns optimi's placeholder
    return {"model": copy.deepcopy(model.state_dict()), "optimizer": state}


class Switched:
    """A model and its optimizer in fp16, one step of which overflows; keeps the gradients of the others."""

    def __init__(self, kind, flags, model):
        self.model = model()
        self.optimizer = make(kind, flags, self.model)
        self.switch = halfstep.switch(self.model, self.optimizer, "fp16:initial=1024,floor=1")
        self.fed = []
        self.overflow = False

    def closure(self):
        loss = evaluate(self.model)()
        grads = [p.grad.clone() for p in self.model.parameters()]
        if self.overflow:
            self.overflow = False
            first = next(self.model.parameters())
            first.grad = first.grad * math.inf
        else:
            self.fed.append((loss.detach(), grads))
        return loss

    def step(self):
        if takes_closure(self.optimizer):
            self.optimizer.step(self.closure)
        else:
            self.closure()
            self.optimizer.step()

    def train(self, steps, overflows=()):
        for k in range(steps):
            self.overflow = k in overflows
            if not self.overflow or takes_closure(self.optimizer):
                self.step()
                continue
            before = everything(self.model, self.optimizer)
            self.step()
            assert not self.switch.last_step.applied
            assert same(everything(self.model, self.optimizer), before), (
                "a skipped step changed something"
            )
        assert self.switch.last_step.applied
        return everything(self.model, self.optimizer)


def by_hand(kind, flags, model, fed):
    """The optimizer on a plain FP32 model, given those gradients."""
    plain = model()
    optimizer = make(kind, flags, plain)
    fed = iter(fed)

    def closure():
        loss, grads = next(fed)
        for p, grad in zip(plain.parameters(), grads, strict=True):
            p.grad = grad.clone()
        return loss

    for _ in range(STEPS - (0 if takes_closure(optimizer) else len(OVERFLOWS))):
        if takes_closure(optimizer):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert next(fed, None) is None
    return everything(plain, optimizer)


def check(kind, flags, model):
    run = Switched(kind, flags, model)
    start = everything(run.model, run.optimizer)["model"]
    end = run.train(STEPS, OVERFLOWS)
    assert run.switch.skipped_steps == len(OVERFLOWS)
    assert run.switch.loss_scale == 256
    assert not same(end["model"], start)
    assert same(end, by_hand(kind, flags, model, run.fed))
    # A run that is resumed goes on as this one does.
    state = copy.deepcopy(run.switch.state_dict())
    again = Switched(kind, flags, model)
    again.model.load_state_dict(end["model"])
    again.optimizer.load_state_dict(end["optimizer"])
    again.switch.load_state_dict(state)
    for one in (run, again):
        one.switch.audit()
    assert same(again.train(2), run.train(2))
    # Evaluation and back.
    for one in (run, again):
        in_mode(one.optimizer, "eval")
        with torch.no_grad():
            one.model()
        in_mode(one.optimizer, "train")
    assert same(again.train(1), run.train(1))


# -- the cases ------------------------------------------------------------------------------------------

CASES = [
    *of_package(torch.optim),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, sparse),
    (torch.optim.Adagrad, {}, sparse),
    (PerParameter, {}, Dense),
    (Doubled, {}, Dense),
]
CASES = [case for case in CASES if accepted(*case)]
IDS = [label(kind, flags) + ("-sparse" if model is sparse else "") for kind, flags, model in CASES]


def test_the_list_is_of_all_optimizers():
    missing = {i.removesuffix("-sparse") for i in KNOWN} - {i.removesuffix("-sparse") for i in IDS}
    assert not missing
    every = {
        name
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
    }
    assert every == {kind.__name__ for kind, _, _ in CASES if kind.__module__.startswith("torch.")}


@pytest.mark.parametrize(("kind", "flags", "model"), CASES, ids=IDS)
def test_it_does_what_it_does_by_hand(kind, flags, model):
    check(kind, flags, model)


@pytest.mark.parametrize("package", ["optimi", "schedulefree"])
def test_so_do_those_of_other_packages(package, capsys):
    package = pytest.importorskip(package)
    cases = [
        case
        for case in of_package(package)
        if "foreach" not in case[1] or package.__name__ != "optimi"
    ]
    assert len({kind for kind, _, _ in cases}) >= 8
    for kind, flags, model in cases:
        if accepted(kind, flags, model):
            try:
                check(kind, flags, model)
            except Exception as error:
                error.add_note(label(kind, flags))
                raise
