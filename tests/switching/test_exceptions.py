"""An exception out of forward, of whatever kind, leaves everything closed and the next call right."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from halfstep.switching.region import current
from twins import RECIPES, on

pytestmark = pytest.mark.parametrize("recipe", RECIPES)


class Bomb(nn.Module):
    def __init__(self):
        super().__init__()
        self.armed = None

    def forward(self, x):
        if self.armed is not None:
            raise self.armed
        return x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 4)
        self.attend = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
        self.bomb = Bomb()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.bomb(self.attend(self.rnn(x)[0])))


class Aborted(BaseException):
    pass


KINDS = [ValueError("x"), KeyboardInterrupt(), SystemExit(1), Aborted(), StopIteration()]


def assert_closed(model):
    assert current() is None
    assert not torch.is_autocast_enabled("cpu")
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()
    for module in model.modules():
        for name, p in module._parameters.items():
            assert p is None or (getattr(module, name) is p and p.dtype == torch.float32)
            assert p is None or p.is_leaf
    rnn = model.rnn
    assert all(
        w is getattr(rnn, n)
        for w, n in zip(rnn._flat_weights, rnn._flat_weights_names, strict=True)
    )


@pytest.mark.parametrize("error", KINDS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("grad", [True, False])
def test_everything_is_closed_and_the_next_call_works(recipe, error, grad):
    torch.manual_seed(0)
    model = Net()
    x = torch.randn(3, 2, 4)
    expected = copy.deepcopy(model)
    on(expected, recipe)
    on(model, recipe)
    model.bomb.armed = error
    with pytest.raises(type(error)) as caught, torch.set_grad_enabled(grad):
        model(x)
    assert caught.value is error
    assert_closed(model)
    model.bomb.armed = None
    out = model(x)
    assert torch.equal(out, expected(x))
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert_closed(model)


def test_an_error_of_a_layer_itself(recipe):
    model = Net()
    on(model, recipe)
    for wrong in (torch.randn(3, 2, 5), torch.ones(2, dtype=torch.int64)):
        with pytest.raises((RuntimeError, ValueError)):
            model(wrong)
        assert_closed(model)


def test_an_exception_inside_a_recurrent_layer(recipe):
    """Its list of weights is put back too."""
    model = Net()
    on(model, recipe)
    with pytest.raises(RuntimeError):
        model.rnn(torch.randn(3, 2, 4), (torch.zeros(1, 2, 7), torch.zeros(1, 2, 7)))
    assert_closed(model)


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
def test_an_exception_in_a_hook(recipe, error):
    def fails(*_):
        raise error

    model = Net()
    on(model, recipe)
    for register in (
        model.register_forward_hook,
        model.register_forward_pre_hook,
        model.head.register_forward_hook,
        model.head.register_forward_pre_hook,
    ):
        handle = register(fails)
        with pytest.raises(type(error)):
            model(torch.randn(3, 2, 4))
        handle.remove()
        assert_closed(model)
    model(torch.randn(3, 2, 4)).sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_exception_inside_a_checkpoint(recipe, reentrant):
    class Outer(Net):
        def forward(self, x):
            h = self.rnn(x)[0]
            return self.head(
                checkpoint(lambda h: self.bomb(self.attend(h)), h, use_reentrant=reentrant)
            )

    model = Outer()
    on(model, recipe)
    model.bomb.armed = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(3, 2, 4))
    assert_closed(model)
    model.bomb.armed = None
    model(torch.randn(3, 2, 4)).sum().backward()
    assert_closed(model)


def test_caught_inside_forward_the_region_stays_open(recipe):
    class Catches(Net):
        def forward(self, x):
            try:
                self.attend(self.bomb(self.rnn(x)[0]))
            except ValueError:
                return self.head(self.rnn(x)[0]), self.head.weight.dtype
            raise AssertionError

    model = Catches()
    on(model, recipe)
    model.bomb.armed = ValueError("caught")
    out, dtype = model(torch.randn(3, 2, 4))
    assert dtype == (torch.bfloat16 if recipe == "bf16" else torch.float16)
    assert out.dtype == torch.float32
    assert_closed(model)


def test_off_inside_forward_is_refused(recipe):
    from halfstep.errors import SwitchError

    class Off(Net):
        def forward(self, x):
            self.switch.off()
            return x

    model = Off()
    model.switch = on(model, recipe)
    with pytest.raises(SwitchError, match="inside forward; call it between steps"):
        model(torch.randn(3, 2, 4))
    assert_closed(model)


def test_a_generator_left_in_the_middle(recipe):
    """A model whose forward hands out a generator: what runs after forward is outside of the region."""

    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x):
            return (self.head(part) for part in x)

    model = Stream()
    on(model, recipe)
    parts = model(torch.randn(3, 4))
    first = next(parts)
    assert first.dtype == torch.float32
    assert current() is None
    parts.close()
    assert current() is None
