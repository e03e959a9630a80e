"""The pains of test_pains.py in torch: what torch.amp, and for 11 torchao, does with the same program."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from against_fp32 import batch, gradients, mlp
from pained import Branched, Fused

pytestmark = pytest.mark.comparison
X, Y = batch()


def train(model, optimizer, scaler, steps):
    """The loop of torch.amp's documentation, in fp16."""
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            out = model(X)
        scaler.scale((out.float() - Y).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()


def test_1_torchs_reaches_zero_and_the_next_clean_batch_kills_the_weights():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for k in range(167):
        optimizer.zero_grad()
        scaler.scale(weight.sum()).backward()
        if k < 166:
            weight.grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    assert weight.isnan().all()


def test_2_torchs_returns_none_in_both_cases():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for bad in (False, True):
        scaler.scale(weight.sum()).backward()
        if bad:
            weight.grad[0] = math.inf
        assert scaler.step(optimizer) is None
        scaler.update()


def test_5_a_bfloat16_model_never_moves():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=2.0**-13)
    for _ in range(64):
        optimizer.zero_grad()
        weight.sum().backward()
        optimizer.step()
    assert weight == 1.0


def test_7_torchs_clips_what_is_scaled_and_says_nothing():
    weight = nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(weight.sum()).backward()
    nn.utils.clip_grad_norm_([weight], 1.0)
    scaler.step(optimizer)
    assert (1.0 - weight).norm() < 1e-4, "a step of norm 1 was meant"


def test_9_torchs_fp16_autocast_loses_them_without_a_word():
    model = mlp()
    with torch.autocast("cpu", dtype=torch.float16):
        out = model(X)
    ((out.float() - Y).square().mean() * 2.0**-20).backward()
    lost = sum(int((g == 0).sum()) for g in gradients(model).values())
    assert lost > 0.5 * sum(g.numel() for g in gradients(model).values())


def test_13_torchs_cast_cache_is_stale():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = nn.Parameter(torch.ones(2, 2))
        before = torch.ones(1, 2) @ weight
        with torch.no_grad():
            weight.add_(1.0)
        assert torch.equal(torch.ones(1, 2) @ weight, before)


def test_3_a_schedule_runs_on_while_no_step_is_made_and_nobody_says_so(recwarn, caplog):
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale((weight * 0.0).sum()).backward()
        if step:
            weight.grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    assert not recwarn.list and not caplog.records
    assert scheduler.get_last_lr() == [1.0 / 64], "five of the six steps were skipped"


def test_4_anomaly_detection_lets_infinity_pass():
    """It looks for NaN alone: the product that overflows goes unnamed."""
    weight = nn.Parameter(torch.full((2,), 300.0))
    with torch.autograd.set_detect_anomaly(True), torch.autocast("cpu", torch.float16):
        large = weight[None] @ weight[:, None]
        (large * weight).sum().backward()
    assert large.isinf()
    assert weight.grad.isinf().any()


def test_6_a_bfloat16_model_accumulates_nothing_more():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    for k in range(4097):
        model(torch.full((1, 1), 1.0 if k else 4096.0, dtype=torch.bfloat16)).sum().backward()
    assert model.weight.grad == 4096.0, "8192 was meant"


def test_8_an_activation_that_overflows_lowers_the_scale_for_ever():
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(1e8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    train(model, optimizer, scaler, 30)
    assert scaler.get_scale() == 65536 / 2**30, "no scale helps, and none is as good as another"


def test_10_model_and_optimizer_know_nothing_of_the_scale():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(8):
        scaler.scale(weight.sum()).backward()
        weight.grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 256.0
    resumed = torch.amp.GradScaler("cpu")
    torch.optim.SGD([weight], lr=0.1).load_state_dict(optimizer.state_dict())
    assert resumed.get_scale() == 65536.0, (
        "the run goes on with the first scale, and skips its way down"
    )


class Doubled(torch.autograd.Function):
    """With setup_context, as torch's documentation has it, and made safe for autocast, as it says too."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        return grad * 2


def test_14_custom_fwd_does_not_know_setup_context():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(AttributeError):
        Doubled.apply(torch.ones(2, requires_grad=True)).sum().backward()


def test_11_a_checkpoint_of_torchaos_float8_model_needs_torchao(tmp_path):
    """Weights that are gathered in float8 are of a class of its own, and so is what they carry."""
    float8 = pytest.importorskip("torchao.float8")
    model = mlp(inputs=16, outputs=16)
    config = float8.Float8LinearConfig(emulate=True, enable_fsdp_float8_all_gather=True)
    float8.convert_to_float8_training(model, config=config)
    state = model.state_dict()
    assert {type(v) for k, v in state.items() if k.endswith("weight")} != {torch.Tensor}
    torch.save(state, tmp_path / "model.pt")
    program = "import sys, torch; torch.load(sys.argv[1], weights_only=True)"
    loaded = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.pt")], capture_output=True, text=True
    )
    assert loaded.returncode == 1
    assert "UnpicklingError" in loaded.stderr and "torchao.float8" in loaded.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_12_inductor_leaves_roundings_out_under_autocast():
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Fused()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, compiled = model(X), torch.compile(model)(X)
    assert eager.dtype == compiled.dtype == torch.bfloat16
    off = (eager.float() - compiled.float()).abs().max()
    assert off > 16 * 2.0**-8 * eager.abs().max()


def test_15_torchs_loses_a_layer_and_reports_nothing_of_it(recwarn, caplog):
    model = Branched()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-20)
    scaler = torch.amp.GradScaler("cpu")
    train(model, optimizer, scaler, 3)
    assert scaler.get_scale() == 65536.0, "no step was skipped"
    assert not recwarn.list and not caplog.records
    moved = {k: not torch.equal(v, before[k]) for k, v in model.state_dict().items()}
    assert moved["main.weight"] and not moved["side.weight"]
