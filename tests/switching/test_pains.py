"""What users of mixed precision complain of most, one test each; test_pains_of_torch.py shows
the same where torch has them.

In the order of the list they were taken from: 1 scale collapses, 2 step not told, 3 silent skips, 4 which
operation, 5 masters absent, 6 accumulation in 16 bits, 7 clipping while scaled, 8 activations overflow,
9 silent underflow, 10 resume, 11 metadata in checkpoints, 12 torch.compile, 13 stale casts,
14 custom functions, 15 nobody can say why.
"""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import halfstep
from against_fp32 import assert_close, batch, both, gradients, mlp, sgd
from halfstep.diagnosis.probe import Probe
from halfstep.diagnosis.statistics import reach
from halfstep.errors import NonFiniteError
from halfstep.switching import log_to
from pained import Branched, Fused

X, Y = batch()


def mse(model, factor=1.0):
    return factor * (model(X) - Y).square().mean()


def overflow(model):
    next(model.parameters()).grad[0] = math.inf


# -- 1. the scale collapses to zero and training dies in silence --------------------------------------


def test_1_the_scale_has_a_floor_and_says_when_it_is_there():
    model = mlp()
    optimizer = sgd(model)
    switch = halfstep.switch(model, optimizer, "fp16")
    with pytest.raises(NonFiniteError, match="loss scale 1, which is as low as it goes"):
        for _ in range(200):
            optimizer.zero_grad()
            mse(model).backward()
            overflow(model)
            optimizer.step()
    assert switch.loss_scale == 1.0
    optimizer.zero_grad()
    mse(model).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


# -- 2, 3. whether the step ran ------------------------------------------------------------------------


def test_2_the_step_says_whether_it_ran_and_why_not():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    switch = halfstep.switch(model, optimizer, "fp16")
    for bad in (False, True):
        optimizer.zero_grad()
        mse(model).backward()
        if bad:
            overflow(model)
        optimizer.step()
        assert switch.was_step_applied() == (not bad)
    assert switch.last_step.nonfinite == {"0.weight": 6}


def test_3_skips_are_counted_logged_and_no_schedule_runs_on():
    model = mlp()
    optimizer = sgd(model, lr=1.0)
    switch = halfstep.switch(model, optimizer, "fp16")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    switch.pace(scheduler)
    rows = []
    switch.on_step(log_to(lambda values, step: rows.append(values["amp/skipped_steps"])))
    for _ in range(3):
        optimizer.zero_grad()
        mse(model).backward()
        overflow(model)
        optimizer.step()
        scheduler.step()
    assert rows == [1, 2, 3]
    assert switch.skipped_steps == 3
    assert scheduler.get_last_lr() == [1.0]


# -- 4. which operation made it ------------------------------------------------------------------------


def test_4_the_operation_is_named():
    model = mlp()
    with torch.no_grad():
        model[2].weight.fill_(30000.0)
        model[0].weight.fill_(5.0)
    optimizer = sgd(model)
    halfstep.switch(model, optimizer, "fp16")
    mse(model).nan_to_num(0.0).backward()
    model(X).log().sum().backward()
    with pytest.raises(NonFiniteError) as caught:
        optimizer.step()
    finding = caught.value.finding
    assert (finding.phase, finding.module, finding.operand) == ("forward", "2", "weight")
    assert finding.operation in str(caught.value) and finding.index >= 0


# -- 5, 6. masters and accumulation in FP32 ------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["fp16", "bf16"])
def test_5_masters_are_proved(recipe):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    halfstep.switch(model, optimizer, recipe)
    mse(model).backward()
    optimizer.step()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {v.dtype for s in optimizer.state.values() for v in s.values()} == {torch.float32}


def test_5_updates_below_16_bits_are_kept():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-13)
    halfstep.switch(model, optimizer, "bf16")
    for _ in range(64):
        optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
    assert model.weight.item() == pytest.approx(1.0 - 64 * 2.0**-13, abs=2.0**-20)


@pytest.mark.parametrize("recipe", ["fp16:initial=1", "bf16"])
def test_6_gradients_accumulate_in_fp32(recipe):
    model = nn.Linear(1, 1, bias=False)
    optimizer = sgd(model)
    halfstep.switch(model, optimizer, recipe)
    for k in range(4097):
        model(torch.full((1, 1), 1.0 if k else 4096.0)).sum().backward()
    assert model.weight.grad.dtype == torch.float32
    assert model.weight.grad == 8192.0  # in fp16, whose spacing here is 4, it would stay at 4096


# -- 7. clipping, scaling, accumulation in any order ---------------------------------------------------


def test_7_clipping_sees_true_gradients_whatever_the_order():
    def program(model, optimizer, switch):
        for _ in range(3):
            mse(model, 1 / 3).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        return {"norm": norm, **{k: g.clone() for k, g in gradients(model).items()}}

    wanted, got = both(program, "fp16")
    assert_close(got, wanted, "fp16", roundings=6 * 48)


# -- 8. activations overflow ---------------------------------------------------------------------------


def test_8_an_activation_that_overflows_is_no_affair_of_the_scale():
    """As a model trained in bf16 has it in fp16: a hidden layer leaves the range, whatever the scale."""
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(1e8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = sgd(model)
    switch = halfstep.switch(model, optimizer, "fp16")
    mse(model).backward()
    with pytest.raises(NonFiniteError, match="forward of 2") as caught:
        optimizer.step()
    assert caught.value.finding.remedies == {
        "fp32": True,
        "bf16": True,
        "a loss scale of 64": False,
    }
    assert switch.loss_scale == 65536.0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    switch.off()
    optimizer.zero_grad()
    switch = halfstep.switch(model, optimizer, "bf16")  # what the message advises
    mse(model).backward()
    optimizer.step()
    assert switch.last_step.applied


# -- 9. silent underflow -------------------------------------------------------------------------------


def test_9_small_gradients_survive_without_a_word():
    def program(model, optimizer, switch):
        mse(model, 2.0**-20).backward()
        return gradients(model)

    wanted, got = both(program, "fp16")
    assert_close(got, wanted, "fp16")


# -- 10. resume ----------------------------------------------------------------------------------------


def test_10_a_run_that_was_saved_and_loaded_goes_on_to_the_bit(tmp_path):
    def start():
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, halfstep.switch(model, optimizer, "fp16:interval=3")

    def go_on(model, optimizer, switch, steps):
        seen = []
        for k in steps:
            optimizer.zero_grad()
            loss = mse(model)
            loss.backward()
            if k in (1, 6):
                overflow(model)
            optimizer.step()
            seen.append((loss.item(), switch.loss_scale, switch.skipped_steps))
        return seen

    wanted = go_on(*start(), range(10))
    run = start()
    found = go_on(*run, range(5))
    torch.save([part.state_dict() for part in run], tmp_path / "run.pt")
    again = start()
    for part, state in zip(again, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    assert found + go_on(*again, range(5, 10)) == wanted
    assert {scale for _, scale, _ in wanted} == {65536.0, 32768.0}, "down, up, and down again"
    assert {v.dtype for v in run[0].state_dict().values()} == {torch.float32}


# -- 11. metadata of low precision in checkpoints -----------------------------------------------------


@pytest.mark.parametrize("recipe", ["fp8", "fp8-delayed", "mxfp8"])
def test_11_a_checkpoint_of_an_fp8_model_is_a_plain_one(recipe, tmp_path):
    model = mlp()
    keys = list(model.state_dict())
    optimizer = sgd(model)
    switch = halfstep.switch(model, optimizer, recipe)
    for _ in range(2):
        optimizer.zero_grad()
        mse(model).backward()
        optimizer.step()
    assert list(model.state_dict()) == keys
    assert {type(v) for v in model.state_dict().values()} == {torch.Tensor}
    torch.save({"model": model.state_dict(), "switch": switch.state_dict()}, tmp_path / "run.pt")
    loaded = torch.load(tmp_path / "run.pt", weights_only=True)  # no code, no class of ours
    plain = mlp(seed=1)
    plain.load_state_dict(loaded["model"], strict=True)
    again = halfstep.switch(plain, sgd(plain), recipe)
    again.load_state_dict(loaded["switch"])
    assert torch.equal(plain(X), model(X))
    # One without the history of another recipe, or of none, loads too.
    other = mlp()
    halfstep.switch(other, sgd(other), "bf16")
    other.load_state_dict(loaded["model"], strict=True)


# -- 12. torch.compile changes the numerics -----------------------------------------------------------


def test_12_a_compiled_model_is_the_eager_one_bit_for_bit():
    def losses(compiled):
        model = mlp()
        optimizer = sgd(model)
        halfstep.switch(model, optimizer, "fp16")
        called = torch.compile(model, backend="aot_eager") if compiled else model
        for _ in range(3):
            optimizer.zero_grad()
            (called(X) - Y).square().mean().backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    for a, b in zip(losses(True), losses(False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("recipe", ["bf16", "fp16"])
def test_12_inductor_rounds_where_the_eager_region_does(recipe):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Fused()
    halfstep.switch(model, sgd(model), recipe)
    results = []
    for called in (model, torch.compile(model)):
        model.zero_grad()
        out = called(X)
        (out - Y).square().mean().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_12_a_users_own_option_of_inductors_stays():
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Fused()
    halfstep.switch(model, recipe="bf16")
    own = torch.compile(model, options={"emulate_precision_casts": False})
    assert not torch.equal(own(X), model(X))


# -- 13. stale casts ------------------------------------------------------------------------------------


def test_13_a_changed_weight_is_read_anew():
    model = nn.Linear(2, 2, bias=False)
    halfstep.switch(model, sgd(model), "bf16")
    before = model(torch.ones(1, 2))
    with torch.no_grad():
        model.weight.add_(1.0)
    assert not torch.equal(model(torch.ones(1, 2)), before)
    with halfstep.autocast("cpu", dtype=torch.float16):
        weight = nn.Parameter(torch.ones(2, 2))
        before = torch.ones(1, 2) @ weight
        with torch.no_grad():
            weight.add_(1.0)
        assert not torch.equal(torch.ones(1, 2) @ weight, before)


def test_13_no_grad_before_grad_loses_no_gradient():
    model = mlp()
    halfstep.switch(model, sgd(model), "fp16")
    with torch.no_grad():
        model(X)
    mse(model).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recipe", ["fp16", "bf16"])
def test_13_what_is_recomputed_has_the_dtypes_it_had(recipe, reentrant):
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

        def block(self, h):
            out = self.second(h)
            seen.append((h.dtype, self.second.weight.dtype, out.dtype, out.detach().clone()))
            return out.tanh()  # before whose end a recomputation stops

        def forward(self, x):
            return checkpoint(self.block, self.first(x), use_reentrant=reentrant)

    model = Model()
    halfstep.switch(model, sgd(model), recipe)
    out = model(X)
    model.zero_grad()
    (out - Y).square().mean().backward()
    (*first, once), (*second, again) = seen
    assert first == second == [torch.float16 if recipe == "fp16" else torch.bfloat16] * 3
    assert torch.equal(once, again)


# -- 14. custom functions ------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """Written with setup_context, as torch's documentation has it."""

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, grad):
        assert grad.dtype == ctx.dtype
        return grad * 2


class Decorated(torch.autograd.Function):
    """The same, made safe for autocast as torch's documentation has it."""

    forward = staticmethod(torch.amp.custom_fwd(Doubled.forward, device_type="cpu"))
    setup_context = Doubled.setup_context
    backward = staticmethod(torch.amp.custom_bwd(Doubled.backward, device_type="cpu"))


def test_14_a_function_with_setup_context():
    class Model(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.inner, self.function = mlp(), function

        def forward(self, x):
            return self.function.apply(self.inner(x))

    def program(model, optimizer, switch):
        mse(model).backward()
        return gradients(model)

    wanted, got = both(program, "fp16", make=lambda: Model(Doubled))
    assert_close(got, wanted, "fp16")
    model = Model(Decorated)
    optimizer = sgd(model)
    switch = halfstep.switch(model, optimizer, "fp16")
    decorated = program(model, optimizer, switch)
    assert all(torch.equal(decorated[k], g) for k, g in got.items())


# -- 15. it converges worse, and nobody can say why, or whether it is noise ----------------------------


def test_15_the_same_run_twice_is_the_same_so_that_a_difference_is_the_recipes():
    def trained():
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        halfstep.switch(model, optimizer, "bf16-sr")
        for _ in range(5):
            optimizer.zero_grad()
            mse(model).backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    torch.manual_seed(3)
    first = trained()
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, trained(), strict=True))


def learnt(recipe, lr, size=1.0):
    """How far a weight of 1 has gone after 64 steps, of the 64 * lr * size that it is to go."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    halfstep.switch(model, optimizer, recipe)
    for _ in range(64):
        optimizer.zero_grad()
        (model(torch.ones(1, 1)).sum() * size).backward()
        optimizer.step()
    return (1.0 - model.weight.item()) / (64 * lr * size)


def test_15_ablations_say_which_protection_a_task_needs_on_any_machine():
    """Each protection taken away by itself: the run that fails names the cause, before hardware is bought."""
    recipes = ("fp16:initial=1024", "fp16-noscale", "fp16-nomaster:initial=1024")
    whole, noscale, nomaster = (learnt(r, lr=2.0**-13) for r in recipes)
    assert whole == noscale == 1.0
    assert nomaster == 0.0, "updates below half of fp16's spacing"
    whole, noscale, nomaster = (learnt(r, lr=2.0**20, size=2.0**-26) for r in recipes)
    assert whole == nomaster == 1.0
    assert noscale == 0.0, "gradients below fp16's smallest number"


def test_15_the_layer_that_fp16_would_lose_is_named_before_the_run():
    model = Branched()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-20)
    with Probe(model, optimizer, every=1) as probe:
        for _ in range(3):
            optimizer.zero_grad()
            mse(model).backward()
            optimizer.step()
    layers = {layer.name: layer.weight_gradients for layer in probe.evidence().layers}

    def lost(dtype):
        shares = {k: g.lost_share(reach(dtype), scale=16) for k, g in layers.items()}
        return {name for name, share in shares.items() if share > 0.5}

    assert lost(torch.float16) == {"side"}
    assert lost(torch.bfloat16) == set()


@pytest.mark.parametrize(("recipe", "learns"), [("fp16", False), ("bf16", True), ("fp32", True)])
def test_15_and_the_run_bears_it_out(recipe, learns):
    model = Branched()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-20)
    switch = halfstep.switch(model, optimizer, recipe)
    for _ in range(3):
        optimizer.zero_grad()
        mse(model).backward()
        optimizer.step()
    assert switch.skipped_steps == 0
    moved = {k: not torch.equal(v, before[k]) for k, v in model.state_dict().items()}
    assert moved["main.weight"]
    assert moved["side.weight"] == learns
