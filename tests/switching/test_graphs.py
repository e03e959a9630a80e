"""The inside of a region under torch.compile: one graph, the bits of the eager region, and its limits."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfstep
from compiled_models import MODELS, Attention, Counted, check_bits, graph_breaks, mlp, same, train
from halfstep.errors import NonFiniteError, SwitchError
from halfstep.study.benchmarks.models import Recurrent
from halfstep.switching.region import LazyParameters

# torch's compiler warns of its own doings, and those of whoever reads a .grad between two graphs.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize(
    ("name", "recipe"), [("transformer", "bf16"), ("cnn", "fp16"), ("several", "fp16")]
)
def test_the_bits_are_those_of_the_eager_region_and_the_inside_is_one_graph(name, recipe):
    check_bits(name, recipe)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["bf16", "fp16", "fp32", "fp16:policy=paper", "bf16:policy=paper", "bf16-pure"]
)
@pytest.mark.parametrize("name", ["transformer", "cnn", "attention", "several"])
def test_the_bits_of_every_model_in_every_recipe(name, recipe):
    check_bits(name, recipe)


def test_large_products_are_the_eager_regions_too():
    def losses(compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 256))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        halfstep.switch(model, optimizer, "fp16")
        called = torch.compile(model, backend="aot_eager") if compiled else model
        x = torch.randn(64, 256)  # 2^21 multiplications: oneDNN's
        (called(x) - x).square().mean().backward()
        return [p.grad for p in model.parameters()]

    assert same([losses(True)], [losses(False)])


@pytest.mark.parametrize(
    ("name", "recipe"), [("mlp", "fp16-acc16-chunk64"), ("attention", "fp16-acc16")]
)
def test_narrow_accumulators_are_in_graphs(name, recipe):
    found = train(name, recipe, lambda m: torch.compile(m, backend="aot_eager"), (4, 4))
    assert same(found, train(name, recipe, None, (4, 4)))


@pytest.mark.parametrize("recipe", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_batches_of_many_sizes_make_two_graphs(recipe):
    counted = Counted()
    sizes = (8, 5, 3, 12, 7, 9)
    found = train("attention", recipe, lambda m: torch.compile(m, backend=counted), sizes)
    assert same(found, train("attention", recipe, None, sizes))
    assert len(counted.graphs) == 3  # the first size, any size, and evaluation


def in_place(model, **options):
    model.compile(**options)
    return model


@pytest.mark.parametrize(("name", "compiled"), [("attention", torch.compile), ("mlp", in_place)])
def test_fullgraph(name, compiled):
    found = train(name, "bf16", lambda m: compiled(m, backend="aot_eager", fullgraph=True))
    assert same(found, train(name, "bf16"))


def test_fullgraph_of_what_goes_past_the_border_is_an_error_that_says_so():
    model = mlp()
    halfstep.switch(model, recipe="bf16")
    whole = torch.compile(lambda x: model(x).sum(), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="border of a region of halfstep"):
        whole(torch.randn(2, 16))


@pytest.mark.parametrize("recipe", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_parts_and_whole_steps_may_be_compiled(recipe):
    def part(model):
        model[0].compile(backend="aot_eager")
        model[1] = torch.compile(model[1], backend="aot_eager")
        return model

    def step(model):
        return torch.compile(lambda x: model(x) * 1.0, backend="aot_eager")

    wanted = train("mlp", recipe)
    assert same(train("mlp", recipe, part), wanted)
    assert same(train("mlp", recipe, step), wanted)


def test_a_graph_is_of_one_recipe():
    """Both have autocast in bf16: nothing that torch guards tells them apart."""
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(4, 7, 32) * 8
    called = torch.compile(model, backend="aot_eager")
    outs = {}
    for recipe in ("bf16", "bf16:policy=paper", "bf16-pure", "bf16"):
        switch = halfstep.switch(model, recipe=recipe)
        wanted = model(x)
        outs[recipe] = called(x)
        assert torch.equal(outs[recipe], wanted), recipe
        switch.off()
    assert torch.equal(called(x), model(x))
    assert not torch.equal(outs["bf16"], outs["bf16:policy=paper"])


def test_compiled_before_the_switch_and_after_it_is_off():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(4, 7, 32)
    counted = Counted()
    model.compile(backend=counted)
    before = model(x)
    switch = halfstep.switch(model, recipe="bf16")
    inside = model(x)
    switch.off()
    assert torch.equal(model(x), before)
    assert not torch.equal(inside, before)
    assert len(counted.graphs) == 2
    switch = halfstep.switch(model, recipe="bf16")
    model.compile(backend=counted)
    switch.off()
    assert torch.equal(model(x), before)  # compiled while it was switched


class Island(nn.Module):
    """As published models keep a router or a norm in FP32: autocast off, operands cast by hand."""

    def __init__(self, *, reads):
        super().__init__()
        self.a, self.router, self.b = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.reads = reads

    def forward(self, x):
        h = F.relu(self.a(x))
        with torch.autocast("cpu", enabled=False):
            w = h.float() @ self.router.weight.float() if self.reads else h.float().cos()
        return self.b(h * w)


@pytest.mark.parametrize("recipe", ["bf16", "fp16"])
def test_a_parameter_read_where_autocast_is_off_leaves_the_region_eager(recipe):
    MODELS["island"] = (lambda: Island(reads=True), lambda n: torch.randn(n, 16))
    counted = Counted()
    with pytest.warns(
        RuntimeWarning, match=r"leaves Island to run eagerly: .*router\.weight where"
    ) as caught:
        found = train("island", recipe, lambda m: torch.compile(m, backend=counted))
    assert sum("leaves Island" in str(w.message) for w in caught) == 1
    assert counted.graphs == []
    assert same(found, train("island", recipe))


def test_autocast_off_for_activations_stays_in_the_graph():
    MODELS["cosine"] = (lambda: Island(reads=False), lambda n: torch.randn(n, 16))
    counted = Counted()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = train("cosine", "fp16", lambda m: torch.compile(m, backend=counted))
    assert len(counted.graphs) == 2
    assert same(found, train("cosine", "fp16"))


def test_a_torch_that_keeps_its_compiler_otherwise_leaves_the_region_eager(monkeypatch):
    def moved(*_):
        raise AttributeError("no attribute 'hooks'")

    monkeypatch.setattr("halfstep.switching.graphs._Ours.__init__", moved)
    with pytest.warns(RuntimeWarning, match="keeps its compiler otherwise .no attribute 'hooks'"):
        found = train("mlp", "bf16", lambda m: torch.compile(m, backend="aot_eager"))
    assert same(found, train("mlp", "bf16"))


@pytest.mark.parametrize("recipe", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_recurrent_layers_run_eagerly_inside_and_keep_their_weights(recipe):
    MODELS["lstm"] = (lambda: Recurrent(layers=1, width=16), lambda n: torch.randint(1000, (n, 5)))
    kept = []

    def compiled(model):
        kept.append(model)
        return torch.compile(model, backend="aot_eager")

    assert same(train("lstm", recipe, compiled), train("lstm", recipe))
    lstm = kept[-1].lstm
    assert all(a is b for a, b in zip(lstm._flat_weights, lstm.parameters(), strict=True))
    copy.deepcopy(kept[-1])


def test_modules_are_dressed_again_whatever_leaves_forward():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.fail = nn.Linear(4, 4), True

        def forward(self, x):
            y = self.inner(x)
            if self.fail:
                raise KeyError("mine")
            return y

    model = Failing()
    halfstep.switch(model, recipe="bf16")
    called = torch.compile(model, backend="aot_eager")
    with pytest.raises(Exception, match="mine"):
        called(torch.randn(2, 4))
    assert isinstance(model.inner._parameters, LazyParameters)
    assert model.inner.weight.is_leaf
    model.fail = False
    assert torch.equal(called(torch.ones(2, 4)), model(torch.ones(2, 4)))


def test_a_write_to_a_working_copy_is_an_error_as_in_the_eager_region():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                self.inner.weight.mul_(0.5)
            return self.inner(x)

    model = Writing()
    halfstep.switch(model, torch.optim.SGD(model.parameters(), lr=0.1), "fp16")
    called = torch.compile(model, backend="aot_eager")
    with pytest.raises(
        SwitchError, match=r"parameter inner\.weight was changed in place inside forward"
    ):
        called(torch.randn(2, 4))


def test_a_parameter_set_in_forward_stays_set():
    class Setting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            torch._dynamo.graph_break()
            self.inner.weight = nn.Parameter(torch.ones(4, 4))
            return self.inner(x)

    model = Setting()
    halfstep.switch(model, recipe="bf16")
    torch.compile(model, backend="aot_eager")(torch.randn(2, 4))
    assert torch.equal(model.inner.weight, torch.ones(4, 4))
    assert isinstance(model.inner._parameters, LazyParameters)


@pytest.mark.parametrize("kind", ["forward", "backward", "inner backward"])
def test_hooks_see_what_they_see_in_the_eager_region(kind):
    def run(compiled):
        torch.manual_seed(0)
        model, seen = mlp(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        halfstep.switch(model, optimizer, "fp16")
        if kind == "forward":
            model.register_forward_hook(lambda m, given, out: seen.append(out.detach()) or out * 2)
        else:
            hooked = model if kind == "backward" else model[3]
            hooked.register_full_backward_hook(lambda m, into, out: seen.append(out[0].clone()))
        called = torch.compile(model, backend="aot_eager") if compiled else model
        for _ in range(2):
            called(torch.randn(4, 16)).square().mean().backward()
        return seen, [p.grad for p in model.parameters()]

    found, wanted = run(True), run(False)
    assert len(found[0]) == 2
    assert same(found, wanted)


def test_threads_take_turns_in_a_compiled_model():
    torch.manual_seed(0)
    model, xs = mlp(), [torch.randn(8, 16) for _ in range(8)]
    halfstep.switch(model, recipe="bf16")
    called = torch.compile(model, backend="aot_eager")
    wanted = [called(x).detach() for x in xs]
    found = [None] * len(xs)

    def work(k):
        for _ in range(20):
            found[k] = (called if k % 2 else model)(xs[k]).detach()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same([found], [wanted])


def test_an_overflow_is_skipped_and_the_replay_names_it():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = halfstep.switch(model, optimizer, "fp16")
    called = torch.compile(model, backend="aot_eager")
    (called(torch.randn(4, 16)).sum() * 1e6).backward()
    optimizer.step()
    assert not switch.last_step.applied
    optimizer.zero_grad()
    called(torch.full((4, 16), float("nan"))).sum().backward()
    with pytest.raises(NonFiniteError, match="input"):
        optimizer.step()


def test_dropout_draws_the_eager_numbers():
    """Its backward is torch's compiled one: mask times 1 / (1 - p), in another order of two products."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.3), nn.Linear(32, 4)),
        torch.randn(8, 16),
    )
    halfstep.switch(model, recipe="bf16")
    outs = []
    for called in (model, torch.compile(model, backend="aot_eager")):
        torch.manual_seed(1)
        outs.append(called(x))
    assert torch.equal(*outs)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["transformer", "cnn", "attention"])
def test_inductor_rounds_where_the_rule_says(name, recipe):
    """Between operations that it fuses too: losses have the eager region's bits but for its own sums."""
    found = train(name, recipe, torch.compile)
    wanted = train(name, recipe)
    if name == "cnn":  # batch normalisation's gradient is added in another order
        unit = 2.0**-8 if recipe == "bf16" else 2.0**-11
        assert found[0][0] == wanted[0][0]
        assert all(abs(a - b) <= unit * b for a, b in zip(found[0], wanted[0], strict=True))
    else:
        assert found[0] == wanted[0]
    assert graph_breaks() == []


class Exponential(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.layer(x).exp()


@pytest.mark.slow
def test_inductors_cache_on_disk_knows_the_recipe(tmp_path, monkeypatch):
    """torch's cache is asked before the policy is in a graph: a second recipe must not get the first's."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model, x = Exponential(), torch.randn(4, 16) * 4
    exact = torch.zeros(())
    for recipe in ("bf16", "bf16:policy=amp/exp-own"):  # inputs, autocast and code are the same
        torch.compiler.reset()
        switch = halfstep.switch(model, recipe=recipe)
        out = torch.compile(model)(x)
        out.sum().backward()  # then it is written to the disk
        assert out.dtype == torch.float32
        exact = model(x).double() if recipe == "bf16" else exact
        off = ((out.double() - exact).abs() / exact).max()
        assert (off < 2.0**-12) == (recipe == "bf16"), (recipe, off)
        switch.off()
