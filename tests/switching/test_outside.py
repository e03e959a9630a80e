"""Outside of a region nothing changes: others' autocast with a switch on, and everything once it is off."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as checkpointing
from torch import nn

from halfstep.recipe import OpClass, policies
from twins import RECIPES, all_off, on

pytestmark = pytest.mark.parametrize("recipe", RECIPES)
KEYS = ("AutocastCPU", "AutocastCUDA")


def registrations():
    return {key: sorted(torch._C._dispatch_get_registrations_for_dispatch_key(key)) for key in KEYS}


def live_switch(recipe):
    """A switch on a model that has been used, elsewhere in the process."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    switch = on(model, recipe)
    model(torch.ones(2, 4))[0].sum().backward()
    return switch


def test_off_leaves_nothing_behind(recipe):
    before = registrations()
    engine = torch.autograd._engine_run_backward
    reentrant = checkpointing.CheckpointFunction.forward
    generator = checkpointing._checkpoint_without_reentrant_generator
    hook = nn.modules.module.BackwardHook
    first, second = live_switch(recipe), live_switch(recipe)
    assert registrations() != before
    assert torch.autograd._engine_run_backward is not engine
    first.off()
    assert registrations() != before
    assert torch.autograd._engine_run_backward is not engine
    second.off()
    second.off()  # twice is once
    assert registrations() == before
    assert torch.autograd._engine_run_backward is engine
    assert checkpointing.CheckpointFunction.forward is reentrant
    assert checkpointing._checkpoint_without_reentrant_generator is generator
    assert nn.modules.module.BackwardHook is hook


def test_switches_of_two_recipes_share_the_kernels(recipe):
    before = registrations()
    switches = [live_switch("bf16"), live_switch("fp16"), live_switch("bf16")]
    for switch in switches[::-1] if recipe == "bf16" else switches:
        switch.off()
    assert registrations() == before


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    return {
        "x": torch.randn(6, 8).to(dtype),
        "y": torch.randn(6, 8),
        "w": torch.randn(8, 8),
        "b": torch.randn(8),
        "image": torch.randn(2, 4, 8, 8).to(dtype),
        "kernel": torch.randn(4, 4, 3, 3),
        "positive": torch.rand(6, 8).add(0.5).to(dtype),
    }


OPERATIONS = {
    "linear": lambda t: F.linear(t["x"], t["w"], t["b"]),
    "matmul": lambda t: t["x"] @ t["w"],
    "bmm": lambda t: torch.bmm(t["image"][:, 0], t["image"][:, 1]),
    "addmm": lambda t: torch.addmm(t["b"], t["x"], t["w"]),
    "mv": lambda t: torch.mv(t["w"], t["b"]),
    "einsum": lambda t: torch.einsum("ij,jk->ik", t["x"], t["w"]),
    "multi_dot": lambda t: torch.linalg.multi_dot([t["x"], t["w"], t["w"]]),
    "conv2d": lambda t: F.conv2d(t["image"], t["kernel"]),
    "conv same": lambda t: F.conv2d(t["image"], t["kernel"], padding="same"),
    "conv transposed": lambda t: F.conv_transpose2d(t["image"], t["kernel"]),
    "softmax": lambda t: F.softmax(t["x"], -1),
    "log_softmax": lambda t: F.log_softmax(t["x"], -1),
    "exp": lambda t: t["x"].exp(),
    "pow": lambda t: t["x"] ** 2,
    "rsqrt": lambda t: t["positive"].rsqrt(),
    "log": lambda t: t["positive"].log(),
    "sum": lambda t: t["x"].sum(),
    "sum over a dimension": lambda t: t["x"].sum(-1),
    "prod": lambda t: t["positive"].prod(),
    "cumsum": lambda t: t["x"].cumsum(0),
    "norm": lambda t: t["x"].norm(),
    "mean": lambda t: t["x"].mean(),
    "layer_norm": lambda t: F.layer_norm(t["x"], (8,)),
    "group_norm": lambda t: F.group_norm(t["image"], 2),
    "rms_norm": lambda t: F.rms_norm(t["x"], (8,)),
    "batch_norm": lambda t: F.batch_norm(t["image"], None, None, training=True),
    "instance_norm": lambda t: F.instance_norm(t["image"]),
    "interpolate": lambda t: F.interpolate(t["image"], scale_factor=2.0, mode="bilinear"),
    "cdist": lambda t: torch.cdist(t["x"], t["y"]),
    "addcmul": lambda t: torch.addcmul(t["y"], t["y"], t["y"]),
    "dot": lambda t: torch.dot(t["b"], t["b"]),
    "tensordot": lambda t: torch.tensordot(t["x"], t["w"], 1),
    "bilinear": lambda t: F.bilinear(t["y"], t["y"], torch.ones(2, 8, 8)),
    "scatter_add": lambda t: t["y"].scatter_add(0, torch.zeros(6, 8, dtype=torch.long), t["y"]),
    "index_put": lambda t: t["y"].index_put((torch.tensor([1]),), torch.zeros(8)),
    "cat": lambda t: torch.cat([t["x"], t["y"]]),
    "attention": lambda t: F.scaled_dot_product_attention(t["image"], t["image"], t["image"]),
    "inverse": lambda t: torch.linalg.inv(t["w"]),
    "fft": lambda t: torch.fft.rfft(t["x"].float()).abs(),
    "mse": lambda t: F.mse_loss(t["x"], t["y"]),
    "cross entropy": lambda t: F.cross_entropy(t["x"], torch.arange(6)),
    "gelu": lambda t: F.gelu(t["x"]),
}
LAYERS = {
    "lstm": lambda: nn.LSTM(8, 8),
    "gru": lambda: nn.GRU(8, 8),
    "rnn": lambda: nn.RNN(8, 8, nonlinearity="relu"),
    "lstm cell": lambda: nn.LSTMCell(8, 8),
    "gru cell": lambda: nn.GRUCell(8, 8),
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0),
}


def results(function, device_dtype, input_dtype):
    """What ``function`` gives under an autocast (or none), and the gradient of its float inputs."""
    given = {k: v.requires_grad_() for k, v in tensors(input_dtype).items()}
    if device_dtype is None:
        out = function(given)
    else:
        with torch.autocast("cpu", dtype=device_dtype):
            out = function(given)
    out.float().square().mean().backward()
    return [out.detach(), *[v.grad for v in given.values() if v.grad is not None]]


def layer_results(name, autocast):
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(5, 8)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        out = layer(x)
    out = out[0] if isinstance(out, tuple) else out
    out.float().square().mean().backward()
    return [out.detach(), *[p.grad for p in layer.parameters()]]


def everything(autocast):
    """All of the above: name and dtype of the input -> results, or the error that torch raises."""
    found = {}
    for name, function in OPERATIONS.items():
        for dtype in {torch.float32, autocast or torch.float32}:
            try:
                found[name, dtype] = results(function, autocast, dtype)
            except RuntimeError as error:  # there is no kernel for it
                found[name, dtype] = str(error)
    for name in LAYERS if autocast is not torch.float16 else ():
        try:
            found[name] = layer_results(name, autocast)
        except RuntimeError as error:  # oneDNN has BF16 LSTMs for some processors only
            found[name] = str(error)
    return found


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_others_results_are_bit_identical(recipe, autocast):
    before = everything(autocast)
    live_switch(recipe)
    during = everything(autocast)
    all_off()
    for other in (during, everything(autocast)):
        assert other.keys() == before.keys()
        for name, expected in before.items():
            if isinstance(expected, str):
                assert other[name] == expected, name
                continue
            assert [t.dtype for t in other[name]] == [t.dtype for t in expected], name
            assert all(torch.equal(a, b) for a, b in zip(other[name], expected, strict=True)), name


def test_every_overridden_operation_is_in_the_list_above(recipe):
    """A class of operations that nothing here runs would be one that may change unseen."""
    sample = {"wide": "exp", "mixed": "batch_norm", "dots": "linear", "composite": "einsum"}
    amp = policies()["amp"]
    assert amp.class_of(sample["wide"]) is OpClass.WIDE
    assert amp.class_of(sample["mixed"]) is OpClass.MIXED
    assert amp.class_of(sample["dots"]) is OpClass.DOT
    assert amp.class_of(sample["composite"]) is OpClass.DOTS
    assert set(sample.values()) <= OPERATIONS.keys()
