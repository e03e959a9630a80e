"""``switch.audit()`` says how everything is held, and raises where the recipe is not kept."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

import halfstep
from against_fp32 import batch, mlp
from halfstep.errors import BrokenPromiseError, SwitchError
from halfstep.recipe import Recipe
from halfstep.switching import Audit
from halfstep.switching.audit import rounded_partial_sums
from halfstep.switching.plan import make_plan

X, Y = batch()
# Every kind of promise: masters, narrow weights, carries, moments, blocks, plain programs, roles, nothing.
RECIPES = [
    "fp32",
    "fp16",
    "bf16",
    "bf16-sr",
    "bf16-kahan",
    "bf16-pure",
    "fp16-naive",
    "fp16-nomaster",
    "fp16-acc16",
    "fp8",
    "fp8-chunk64",
    "mxfp8",
    "bf16:moments=mxfp8_e4m3",
    "fp16:master=e6m9",
]


def step(model, optimizer):
    optimizer.zero_grad()
    (model(X) - Y).square().mean().backward()
    optimizer.step()


def switched(recipe="fp16", steps=1):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    switch = halfstep.switch(model, optimizer, recipe)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer, switch


def broken(switch):
    with pytest.raises(BrokenPromiseError) as caught:
        switch.audit()
    assert isinstance(caught.value.audit, Audit)
    return caught.value


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_switched_model_keeps_its_promises_before_and_after_steps(recipe):
    _, _, switch = switched(recipe, steps=0)
    assert {row.gradient.dtype for row in switch.audit().rows} == {""}
    model, optimizer = switch.model, switch.optimizers[0]
    for _ in range(3):
        step(model, optimizer)
    audit = switch.audit()
    assert [row.parameter for row in audit.rows] == [name for name, _ in model.named_parameters()]
    for row, p in zip(audit.rows, model.parameters(), strict=True):
        assert row.weight.dtype == str(p.dtype).removeprefix("torch.")
        assert row.gradient.dtype == str(p.grad.dtype).removeprefix("torch.")
        assert row.optimizers == ("AdamW",)
        assert {"exp_avg", "exp_avg_sq"} <= set(row.state)
    assert json.loads(json.dumps(audit.as_dict()))["recipe"] == str(switch.recipe)
    assert str(audit).endswith("every promise of the recipe is kept")
    step(model, optimizer)  # an audit leaves nothing behind
    assert switch.last_step.step == 4


@pytest.mark.parametrize(
    ("recipe", "weight", "working", "state"),
    [
        ("fp16", "fp32", "fp16", {"fp32"}),
        ("bf16-kahan", "fp32 (bf16 numbers)", "bf16", {"bf16"}),
        ("bf16-pure", "bf16", "bf16", {"bf16"}),
        ("fp16:master=e6m9", "fp32 (e6m9 numbers)", "fp16", {"fp32"}),
        ("bf16:moments=mxfp8_e4m3", "fp32", "bf16", {"e4m3fn (mxfp8_e4m3 numbers)"}),
    ],
)
def test_dtype_and_format_are_told_apart(recipe, weight, working, state):
    _, _, switch = switched(recipe, steps=2)
    row = switch.audit().rows[0]
    assert (str(row.weight), str(row.working)) == (weight, working)
    assert {str(held) for held in row.state.values()} == state
    if recipe == "bf16-kahan":
        assert "carry" in row.state


def test_the_table():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
    model[2].weight.requires_grad_(False)
    switch = halfstep.switch(model, torch.optim.SGD([*model[:2].parameters()]), "fp16")
    assert str(switch.audit()).splitlines()[:6] == [
        "recipe fp16 on cpu, SGD, loss scale 65536",
        "parameter  shape  weight  working copy  gradient  optimizer  state",
        "0.weight   4x6    fp32    fp16          -         SGD        -",
        "0.bias     4      fp32    fp16          -         SGD        -",
        "1.weight   4      fp32    fp32          -         SGD        -",
        "1.bias     4      fp32    fp32          -         SGD        -",
    ]
    lines = str(switch.audit()).splitlines()
    assert lines[6] == "2.weight   4x4    fp32    fp16          -         (frozen)   -"
    assert "add in fp32, write fp16 (emulated" in lines[7]


def test_tied_weights_are_one_row_and_other_dtypes_go_their_own_way():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 6)
            self.head = nn.Linear(6, 5, bias=False)
            self.head.weight = self.embedding.weight
            self.exact = nn.Parameter(torch.ones(2, dtype=torch.float64))

    model = Tied()
    switch = halfstep.switch(model, torch.optim.SGD(model.parameters()), "bf16")
    rows = {row.parameter: row for row in switch.audit().rows}
    assert rows["embedding.weight"].also == ("head.weight",)
    assert str(rows["exact"].weight) == str(rows["exact"].working) == "fp64"
    assert "embedding.weight = head.weight" in str(switch.audit())


# -- what breaks a promise ------------------------------------------------------------------------------


def test_half_after_the_switch():
    model, _, switch = switched()
    model.half()
    error = broken(switch)
    assert str(error).startswith(
        "recipe fp16 is not kept: weight of 0.weight is fp16; promised: fp32 master weights. It was turned "
        "after the switch: model.half(), .to(dtype), .data = ...; what its bits lost stays lost."
    )
    assert "more, in error.audit.broken" in str(error)
    assert {it.what for it in error.audit.broken} == {
        f"{kind} of {name}"
        for name, _ in model.named_parameters()
        for kind in ("weight", "gradient")
    }
    assert "BROKEN: weight of 0.weight is fp16" in str(error.audit)


def test_float_after_a_switch_to_16_bits():
    model, _, switch = switched("bf16-pure")
    model.float()
    assert "weight of 0.weight is fp32; promised: bf16 master weights" in str(broken(switch))


def test_an_optimizer_built_on_copies():
    model = mlp()
    halves = [p.detach().half().requires_grad_() for p in model.parameters()]
    switch = halfstep.switch(model, torch.optim.SGD(halves, lr=0.1), "fp16")
    error = broken(switch)
    assert (
        "parameter 0.weight is trained, and held by no optimizer of the switch; parameter 0 of group 0 of "
        "SGD, 16x6 fp16 has its shape and is not it; promised: the optimizer updates the model's own"
    ) in str(error)
    assert len(error.audit.broken) == len(error.audit.foreign) == 6
    assert "not the model's: parameter 0 of group 0 of SGD, 16x6 fp16" in str(error.audit)


def test_a_parameter_replaced_after_the_optimizer_was_built():
    model, _, switch = switched()
    model[2].weight = nn.Parameter(torch.zeros(16, 16))
    error = broken(switch)
    assert [it.what for it in error.audit.broken] == ["parameter 2.weight"]
    assert "parameter 2 of group 0 of AdamW, 16x16 fp32 has its shape" in str(error)
    row = next(row for row in error.audit.rows if row.parameter == "2.weight")
    assert str(row.working) == "fp16", "it takes part from the next forward on"


def test_a_parameter_that_no_optimizer_was_given():
    model = mlp()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    switch = halfstep.switch(model, optimizer, "bf16")
    assert [it.what for it in broken(switch).audit.broken] == [
        f"parameter {name}" for name, _ in model.named_parameters() if name[0] != "0"
    ]
    for p in [*model[2].parameters(), *model[4].parameters()]:
        p.requires_grad_(False)
    assert switch.audit().rows[2].optimizers == ()


def test_a_loss_with_weights_of_its_own_is_no_breach():
    model, own = mlp(), nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([*model.parameters(), own], lr=0.1)
    switch = halfstep.switch(model, optimizer, "bf16")
    assert switch.audit().foreign == ("parameter 6 of group 0 of SGD, () fp32",)


def test_state_loaded_while_the_model_was_in_16_bits():
    model, optimizer, switch = switched()
    state = copy.deepcopy(optimizer.state_dict())
    model.half()
    optimizer.load_state_dict(state)  # torch turns it to the weights' dtype
    model.float()
    error = broken(switch)
    assert "optimizer state exp_avg of 0.weight is fp16; promised: fp32. It was loaded into" in str(
        error
    )
    assert {it.what.split()[2] for it in error.audit.broken} == {"exp_avg", "exp_avg_sq"}


def test_state_of_another_run_is_not_on_the_grid():
    _, other, _ = switched("bf16", steps=2)
    model, optimizer, switch = switched("bf16:moments=bf16", steps=2)
    kept = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(kept)
    switch.audit()  # its own: FP32 tensors now, and bf16 numbers still
    optimizer.load_state_dict(other.state_dict())
    assert "fp32 with numbers that are not of bf16; promised: bf16" in str(broken(switch))
    step(model, optimizer)
    switch.audit()


def test_data_swapped_for_16_bits():
    model, _, switch = switched("bf16")
    model[0].bias.grad = None
    model[0].bias.data = model[0].bias.data.half()
    assert [it.what for it in broken(switch).audit.broken] == ["weight of 0.bias"]


def test_data_swapped_for_other_numbers():
    model, optimizer, switch = switched("bf16-sr")
    model[0].bias.data = torch.full((16,), 1.0 + 2.0**-20)
    error = broken(switch)
    assert "weight of 0.bias is fp32 with numbers that are not of bf16" in str(error)
    step(model, optimizer)
    switch.audit()
    plain, _, of_plain = switched("bf16")
    plain[0].bias.data = torch.full((16,), 1.0 + 2.0**-20)
    of_plain.audit()  # any FP32 number is a master


def test_hooks_cleared():
    _, optimizer, switch = switched()
    optimizer._optimizer_step_pre_hooks.clear()
    assert "optimizer AdamW is without the hooks" in str(broken(switch))


def test_kernels_that_multiply_in_less():
    _, _, switch = switched("fp16")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert 'Say torch.set_float32_matmul_precision("highest")' in str(broken(switch))
    finally:
        torch.set_float32_matmul_precision(before)
    switch.audit()


def test_torchscript_reads_its_own_weights():
    model = nn.Sequential(nn.Linear(6, 4), mlp(4))
    with pytest.warns(DeprecationWarning):
        model[0] = torch.jit.trace(model[0], X)
    switch = halfstep.switch(model, torch.optim.SGD(model.parameters()), "bf16")
    step(model, switch.optimizers[0])  # where there is no loss scale it trains all the same
    assert switch.last_step.applied
    found = [it.what for it in broken(switch).audit.broken]
    assert found == ["working copy of 0.weight", "working copy of 0.bias"]


def test_it_is_asked_between_steps_and_while_on():
    model, _, switch = switched()
    model[0].register_forward_hook(lambda *_: switch.audit() and None)
    with pytest.raises(SwitchError, match=r"audit\(\) was called inside forward; call it between"):
        model(X)
    switch.off()
    with pytest.raises(SwitchError, match="the switch is off: there is nothing that it promises"):
        switch.audit()


def test_without_an_optimizer_nothing_is_asked_of_one():
    switch = halfstep.switch(mlp(), recipe="fp16")
    assert str(switch.audit()).startswith("recipe fp16 on cpu, no optimizer, loss scale 1\n")


def test_two_optimizers_and_groups_are_told_apart():
    model = mlp()
    first = torch.optim.SGD(
        [{"params": model[0].weight}, {"params": model[0].bias, "lr": 0.2}], lr=0.1
    )
    second = torch.optim.SGD([*model[2:].parameters()], lr=0.1)
    switch = halfstep.switch(model, [first, second], "bf16")
    assert [row.optimizers for row in switch.audit().rows[:3]] == [
        ("SGD 1 group 0",),
        ("SGD 1 group 1",),
        ("SGD 2",),
    ]


@pytest.mark.comparison
def test_torchs_way_trains_16_bit_weights_and_says_nothing():
    """The masters are silently absent: autocast and GradScaler take a model in bfloat16 as it is."""
    model = mlp().bfloat16()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(50):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(X).float() - Y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(SwitchError, match=r"is torch.bfloat16: the masters are FP32"):
        halfstep.switch(model, optimizer, "bf16")


@pytest.mark.parametrize("store", ["fp16", "bf16"])
def test_partial_sums_that_cuda_may_round_are_noted(store):
    """A setting of torch, on by default; a plan for CUDA is made without a GPU, too."""
    flag = f"allow_{store}_reduced_precision_reduction"
    settings = torch.backends.cuda.matmul
    before = getattr(settings, flag)
    plan = make_plan(Recipe.parse(store), "cuda")
    try:
        setattr(settings, flag, True)
        (note,) = rounded_partial_sums(plan)
        assert flag in note
        assert f"rounded to {store} before they are added" in note
        assert rounded_partial_sums(make_plan(Recipe.parse(store), "cpu")) == ()
        assert rounded_partial_sums(make_plan(Recipe.parse("fp16-acc16"), "cuda")) == ()
        setattr(settings, flag, False)
        assert rounded_partial_sums(plan) == ()
    finally:
        setattr(settings, flag, before)
    audit = halfstep.switch(mlp(), recipe="bf16").audit()
    assert audit.notes == ()
    assert "note: less" in str(dataclasses.replace(audit, notes=("less",)))
