"""Operations in no list: FP32, and named once, at the end."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import halfstep
from halfstep.switching import unlisted
from halfstep.switching.met import Handling

RECIPES = ["bf16", "fp16", "fp16-acc16"]


class Calls(nn.Module):
    """A layer, and then an operation of somebody's library."""

    def __init__(self, operation):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.operation = operation

    def forward(self, x):
        return self.operation(self.layer(x))


@pytest.fixture
def library():
    """Operations of a library that halfstep knows nothing of; those of a test are gone after it."""
    made = torch.library.Library("of_nobody", "FRAGMENT")
    yield made
    made._destroy()


def define(library, name, function, schema="(Tensor x) -> Tensor"):
    """``torch.ops.of_nobody.<name>``, differentiable as the torch operations that it is made of."""
    seen = []

    def noted(x):
        seen.append(x.dtype)
        return function(x)

    library.define(name + schema)
    library.impl(name, noted, "CompositeExplicitAutograd")
    library.impl(name, noted, "Autograd")
    return getattr(torch.ops.of_nobody, name), seen


def switched(operation, recipe):
    torch.manual_seed(0)
    model = Calls(operation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, halfstep.switch(model, optimizer, recipe)


def train(model, optimizer):
    out = model(torch.ones(2, 4))
    out.square().mean().backward()
    optimizer.step()
    return out


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_computes_in_fp32_and_is_named_once_at_the_end(library, recipe):
    name = f"square_{recipe.replace('-', '_')}"
    operation, seen = define(library, name, lambda x: x * x)
    model, optimizer, switch = switched(operation, recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not once a call
        for _ in range(3):
            train(model, optimizer)
    assert seen == [torch.float32] * 3
    assert switch.met.found == {f"of_nobody::{name}": Handling.WIDE}
    row = switch.explain().rows[-1]
    assert (row.kind, row.accumulates, row.writes) == (
        f"in no list: of_nobody::{name}",
        "fp32",
        "fp32",
    )
    with pytest.warns(RuntimeWarning, match=f"in no list: of_nobody::{name}: computed in FP32"):
        switch.off()
    model, optimizer, switch = switched(operation, recipe)
    train(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        switch.off()


def test_its_gradients_are_true(library):
    operation, _ = define(library, "cube", lambda x: x**3)
    gradients = []
    for call in (lambda x: x.float() ** 3, operation):
        model, optimizer, switch = switched(call, "fp16:initial=8192")
        train(model, optimizer)
        gradients.append(model.layer.weight.grad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            switch.off()
    assert torch.equal(*gradients)


def test_what_takes_no_fp32_is_given_16_bits(library):
    def only_narrow(x):
        if x.dtype == torch.float32:
            raise RuntimeError("only fp16 and bf16")
        return x * 2

    operation, seen = define(library, "only_narrow", only_narrow)
    model, optimizer, switch = switched(operation, "bf16")
    train(model, optimizer)
    train(model, optimizer)
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]
    with pytest.warns(RuntimeWarning, match="only_narrow: computed in the dtype that it was given"):
        switch.off()


def test_an_error_of_its_own_is_raised_as_it_is(library):
    def broken(x):
        raise ValueError("broken whatever it is given")

    operation, _ = define(library, "broken", broken)
    model, optimizer, switch = switched(operation, "bf16")
    with pytest.raises(ValueError, match="broken whatever"):
        train(model, optimizer)
    assert not switch.met.found


def test_what_writes_into_its_operand_is_given_it(library):
    def double(x):
        x.mul_(2)

    operation, seen = define(library, "double_", double, "(Tensor(a!) x) -> ()")

    def call(x):
        y = x.clone()
        operation(y)
        return y

    model, optimizer, switch = switched(call, "bf16")
    out = train(model, optimizer)
    plain = model.layer.weight.new_ones(2, 4)
    assert seen == [torch.bfloat16] and out.shape == plain.shape
    assert switch.met.found == {"of_nobody::double_": Handling.GIVEN}
    with pytest.warns(RuntimeWarning, match="double_"):
        switch.off()


def test_paper_writes_16_bits_and_a_plain_16_bit_program_is_plain(library):
    operation, seen = define(library, "same", lambda x: x + 0)
    outs = []

    def call(x):
        outs.append(operation(x))
        return outs[-1]

    for recipe in ("fp16:policy=paper", "fp16-naive"):
        model, optimizer, switch = switched(call, recipe)
        train(model, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            switch.off()
    assert seen == [torch.float32, torch.float16]
    assert [out.dtype for out in outs] == [torch.float16] * 2


def test_what_is_registered_after_the_switch_is_seen(library):
    late = []
    model, optimizer, switch = switched(lambda x: late[0](x) if late else x, "bf16")
    train(model, optimizer)
    operation, seen = define(library, "late", lambda x: x + 1)
    late.append(operation)
    train(model, optimizer)
    assert seen == [torch.float32]
    with pytest.warns(RuntimeWarning, match="of_nobody::late"):
        switch.off()


def test_outside_of_a_region_and_after_off_nothing_is_changed(library):
    operation, seen = define(library, "outside", lambda x: x + 1)
    _, _, switch = switched(operation, "bf16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        operation(torch.ones(2, dtype=torch.bfloat16))
    switch.off()
    assert not unlisted._kernels
    operation(torch.ones(2, dtype=torch.bfloat16))
    assert seen == [torch.bfloat16] * 2 and not switch.met.found


def test_a_kernel_that_its_library_has_for_autocast_is_left_to_it(library):
    library.define("own_autocast(Tensor x) -> Tensor")
    seen = []

    def kernel(x):
        seen.append(x.dtype)
        return x + 0

    def of_autocast(x):
        with torch._C._ExcludeDispatchKeyGuard(
            torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
        ):
            return torch.ops.of_nobody.own_autocast(x)

    library.impl("own_autocast", kernel, "CompositeExplicitAutograd")
    library.impl("own_autocast", kernel, "Autograd")
    library.impl("own_autocast", of_autocast, "AutocastCPU")
    model, optimizer, switch = switched(torch.ops.of_nobody.own_autocast, "bf16")
    train(model, optimizer)
    assert seen == [torch.bfloat16] and not switch.met.found


def test_custom_op_of_torch_library():
    @torch.library.custom_op("of_nobody::halved", mutates_args=())
    def halved(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.dtype)
        return x / 2

    seen = []
    halved.register_autograd(lambda ctx, g: g / 2)
    model, optimizer, switch = switched(halved, "fp16")
    train(model, optimizer)
    assert seen == [torch.float32]
    assert model.layer.weight.grad.isfinite().all()
    with pytest.warns(RuntimeWarning, match="of_nobody::halved"):
        switch.off()


PROGRAM = """
import torch, halfstep
library = torch.library.Library("of_nobody", "FRAGMENT")
library.define("square(Tensor x) -> Tensor")
library.impl("square", lambda x: x * x, "CompositeExplicitAutograd")
library.impl("square", lambda x: x * x, "Autograd")

class Calls(torch.nn.Linear):
    def forward(self, x):
        return torch.ops.of_nobody.square(super().forward(x))

model = Calls(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
{switch}
for _ in range(3):
    model(torch.ones(2, 4)).mean().backward()
    optimizer.step()
print("trained")
"""


def run(tmp_path, switch, *command):
    script = tmp_path / "train.py"
    script.write_text(PROGRAM.format(switch=switch))
    ended = subprocess.run(
        [sys.executable, *command, str(script)], capture_output=True, text=True, check=True
    )
    assert ended.stdout == "trained\n"
    return ended.stderr


def test_a_program_that_never_switches_off_names_them_as_it_ends(tmp_path):
    said = run(tmp_path, 'switch = halfstep.switch(model, optimizer, "bf16")')
    assert said.count("of_nobody::square: computed in FP32") == 1


def test_halfstep_run_names_them_in_its_summary(tmp_path):
    record = tmp_path / "run.json"
    command = ["-m", "halfstep", "run", "--recipe", "bf16", "--json", str(record)]
    said = run(tmp_path, "", *command)
    assert said.count("of_nobody::square") == 1
    assert "halfstep: in no list: of_nobody::square: computed in FP32" in said
    assert '"of_nobody::square": "computed in FP32"' in record.read_text()
