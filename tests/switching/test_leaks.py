"""No gradient leaves the region scaled, none enters unscaled: each way past is right or an error."""

import pytest
import torch
from torch import nn

import halfstep
from against_fp32 import PER_LAYER, assert_close, batch, both, gradients, mlp, sgd
from halfstep.errors import ScaledGradientError

X, Y = batch()
RECIPE = "fp16:initial=8192"


class Net(nn.Module):
    """A switched model with room for mischief."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x)


def mse(out):
    return (out - Y).square().mean()


def step(model, optimizer, switch):
    mse(model(X)).backward()
    return gradients(model)


def fails(make, text, program=step, recipe=RECIPE, optimizer=sgd):
    with pytest.raises(ScaledGradientError, match=text):
        both(program, recipe, make, optimizer)
    wanted, got = both(program, "bf16", make, optimizer)  # at scale 1 there is nothing to leak
    assert_close(got, wanted, "bf16", 6 * PER_LAYER)


def holds(make, program=step, roundings=3 * PER_LAYER):
    for recipe in ("bf16", RECIPE):
        wanted, got = both(program, recipe, make)
        assert_close(got, wanted, recipe, roundings)


# -- parameters that are no parameters of the model ---------------------------------------------------


class InList(Net):
    def __init__(self):
        super().__init__()
        self.hidden = [nn.Parameter(torch.ones(4))]

    def forward(self, x):
        return self.net(x) * self.hidden[0]


class InDict(Net):
    def __init__(self):
        super().__init__()
        self.hidden = {"gain": nn.Parameter(torch.ones(4))}

    def forward(self, x):
        return self.net(x) * self.hidden["gain"]


class ModuleInList(Net):
    def __init__(self):
        super().__init__()
        self.extra = [nn.Linear(4, 4)]

    def forward(self, x):
        return self.extra[0](self.net(x))


class Holder:
    def __init__(self):
        self.weight = nn.Parameter(torch.ones(4))


class InObject(Net):
    def __init__(self):
        super().__init__()
        self.holder = Holder()

    def forward(self, x):
        return self.net(x) + self.holder.weight


def in_closure():
    weight = nn.Parameter(torch.ones(4))

    class Closed(Net):
        def forward(self, x):
            return self.net(x) * weight

    return Closed()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (InList, r"^InList: forward used hidden\[0\] \(4,\), which is no parameter of a module"),
        (InDict, r"^InDict: forward used hidden\['gain'\] \(4,\), which is no parameter"),
        (ModuleInList, r"^ModuleInList: forward used extra\[0\]\.(weight|bias) \(4"),
        (InObject, r"^InObject: forward used holder\.weight \(4,\), which is no parameter"),
        (in_closure, r"^Closed: forward used a leaf tensor of shape \(4,\) that requires grad"),
    ],
)
def test_a_parameter_out_of_the_tree_is_an_error_that_says_where(make, text):
    fails(make, text)


def test_a_parameter_that_only_the_optimizer_knows_is_named_by_its_place_there():
    weight = nn.Parameter(torch.ones(4))

    class Closed(Net):
        def forward(self, x):
            return self.net(x) * weight

    model = Closed()
    optimizer = torch.optim.AdamW([{"params": model.parameters()}, {"params": [weight]}])
    halfstep.switch(model, optimizer, RECIPE)
    with pytest.raises(ScaledGradientError, match=r"parameter 0 \(4,\) of group 1 of AdamW"):
        model(X)


@pytest.mark.parametrize("wrap", [nn.ParameterList, lambda p: nn.ParameterDict({"a": p[0]})])
def test_parameters_in_torchs_own_containers_are_in_the_tree(wrap):
    class Contained(Net):
        def __init__(self):
            super().__init__()
            self.gains = wrap([nn.Parameter(torch.ones(4))])

        def forward(self, x):
            gains = self.gains
            return self.net(x) * (gains[0] if isinstance(gains, nn.ParameterList) else gains["a"])

    holds(Contained)


def test_the_error_says_what_to_do():
    with pytest.raises(ScaledGradientError) as error:
        both(step, RECIPE, InList)
    text = str(error.value)
    assert "its gradient would leave multiplied by the loss scale" in text
    assert "Make it a parameter of a module that is part of the switched model" in text


# -- what is computed outside and used inside ----------------------------------------------------------


class Offset(Net):
    offset = None

    def forward(self, x):
        return self.net(x) + self.offset


def test_a_tensor_computed_outside_and_used_inside_is_an_error_that_names_the_operation():
    def program(model, optimizer, switch):
        free = torch.ones(4, requires_grad=True)
        model.offset = free.exp()
        mse(model(X)).backward()
        return {"free": free.grad, **gradients(model)}

    fails(Offset, r"a tensor computed outside the region \(the result of ExpBackward0\)", program)


def test_an_output_of_an_earlier_forward_used_inside_is_an_error():
    """It has left the region: its gradient would be multiplied by the scale twice."""

    def program(model, optimizer, switch):
        model.offset = torch.zeros(4)
        model.offset = model(X).exp()
        mse(model(X)).backward()
        return gradients(model)

    fails(Offset, r"computed outside the region \(the result of ExpBackward0\)", program)

    def exact(model, optimizer, switch):
        model.offset = torch.zeros(4)
        model.offset = model(X)
        mse(model(X)).backward()
        return gradients(model)

    fails(Offset, r"that has left the region: an output of an earlier forward", exact)


class Memory(Net):
    state = None

    def forward(self, x):
        h = self.net[:4](x)
        if self.state is not None:
            h = h + self.state
        self.state = h
        return self.net[4](h)


def test_a_state_kept_from_one_forward_to_the_next_is_right():
    def program(model, optimizer, switch):
        sum(mse(model(k * X)) for k in range(1, 4)).backward()
        return gradients(model)

    holds(Memory, program, 6 * PER_LAYER)
