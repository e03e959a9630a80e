"""No gradient leaves the region scaled, none enters unscaled: each way past is right."""

import types

import pytest
import torch
from torch import nn

from against_fp32 import PER_LAYER, assert_close, batch, both, gradients, mlp
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
        def weight(self):
            return weight

        def forward(self, x):
            return self.net(x) * weight

    return Closed()


def everything(model, optimizer, switch):
    """Gradients of the leaves that are not in the tree, too."""
    if isinstance(getattr(model, "weight", None), types.MethodType):
        model.weight().grad = None  # a closure's: both models have the same one
    mse(model(X)).backward()
    return {**hidden(model), **gradients(model)}


def hidden(model):
    leaves = {
        InList: lambda m: m.hidden,
        InDict: lambda m: m.hidden.values(),
        ModuleInList: lambda m: m.extra[0].parameters(),
        InObject: lambda m: [m.holder.weight],
    }.get(type(model), lambda m: [m.weight()])(model)
    return {str(k): leaf.grad.clone() for k, leaf in enumerate(leaves)}


@pytest.mark.parametrize("make", [InList, InDict, ModuleInList, InObject, in_closure])
def test_a_parameter_out_of_the_tree_has_the_true_gradient(make):
    holds(make, everything, 4 * PER_LAYER)


def test_it_has_in_every_later_step_and_with_a_scale_that_changes():
    def program(model, optimizer, switch):
        for k in range(6):
            optimizer.zero_grad()
            model.hidden[0].grad = None
            loss = mse(model(X))
            if switch._scaled:
                switch._gate.scale = 2.0 ** (8 + k)  # between forward and backward
            loss.backward()
        return {**hidden(model), **gradients(model)}

    holds(InList, program, 4 * PER_LAYER)


def test_a_second_derivative_there_is_an_error_that_says_what_to_do():
    def program(model, optimizer, switch):
        x = X.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        g.square().mean().backward()
        return gradients(model)

    with pytest.raises(
        ScaledGradientError, match=r"InList: a second derivative .* Make it a param"
    ):
        both(program, RECIPE, InList)


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


# -- what is computed outside and used inside ----------------------------------------------------------


class Offset(Net):
    offset = None

    def forward(self, x):
        return self.net(x) + self.offset


def test_a_tensor_computed_outside_and_used_inside_has_the_true_gradient():
    def program(model, optimizer, switch):
        free = torch.ones(4, requires_grad=True)
        model.offset = free.exp()
        mse(model(X)).backward()
        return {"free": free.grad, **gradients(model)}

    holds(Offset, program)


@pytest.mark.parametrize("change", [torch.exp, lambda out: out], ids=["exp", "as it is"])
def test_an_output_of_an_earlier_forward_used_inside_is_right(change):
    """It has left the region: its gradient is divided by the scale there, and multiplied as it comes in."""

    def program(model, optimizer, switch):
        model.offset = torch.zeros(4)
        model.offset = change(model(X))
        mse(model(X)).backward()
        return gradients(model)

    holds(Offset, program, 6 * PER_LAYER)


def test_a_solvers_adjoint_is_given_the_parameters_themselves():
    """As torchdiffeq's odeint_adjoint: a function of all parameters, whose backward runs the layer again."""

    class Adjoint(torch.autograd.Function):
        @staticmethod
        def forward(ctx, layer, x, *parameters):
            ctx.layer = layer
            ctx.save_for_backward(x, *parameters)
            with torch.no_grad():
                return x + layer(x)

        @staticmethod
        def backward(ctx, grad):
            x, *parameters = ctx.saved_tensors
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y = x + ctx.layer(x)
                return None, *torch.autograd.grad(y, (x, *parameters), grad)

    class Solver(Net):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return Adjoint.apply(self.layer, self.net(x), *self.layer.parameters())

    holds(Solver, roundings=6 * PER_LAYER)


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
