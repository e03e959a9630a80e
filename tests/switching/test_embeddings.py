"""Embeddings and embedding bags: padding, sparse gradients, maximum norm, and steps of a sparse optimizer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import halfstep
from twins import RECIPES, UNIT, check, on

pytestmark = pytest.mark.parametrize("recipe", RECIPES)
INDEX = torch.tensor([[1, 2, 0, 2], [3, 0, 2, 9]])


class Table(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.table = nn.Embedding(10, 6, **how)
        self.head = nn.Linear(6, 3)

    def forward(self, index):
        return self.head(self.table(index))


FORMS = {
    "plain": {},
    "padding": {"padding_idx": 2},
    "sparse": {"sparse": True},
    "sparse with padding": {"sparse": True, "padding_idx": 0},
    "scaled by frequency": {"scale_grad_by_freq": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_embeddings(recipe, form):
    low, exact = check(lambda: Table(**FORMS[form]), lambda: INDEX, recipe, k=6)
    grad = low.grads["table.weight"]
    assert grad.is_sparse == exact.grads["table.weight"].is_sparse
    assert grad.dtype == torch.float32
    if "padding_idx" in FORMS[form]:
        assert not grad.to_dense()[FORMS[form]["padding_idx"]].any()


def test_the_embedding_alone(recipe):
    """Its output leaves the model at once: rounded, and its gradient true."""
    check(lambda: nn.Embedding(10, 6), lambda: INDEX, recipe, k=3)


@pytest.mark.parametrize("sparse", [False, True])
def test_steps_on_an_embedding(recipe, sparse):
    def trained(which):
        torch.manual_seed(0)
        model = Table(sparse=sparse)
        if sparse:
            optimizers = [
                torch.optim.SparseAdam([model.table.weight], lr=0.01),
                torch.optim.SGD(model.head.parameters(), lr=0.1),
            ]
        else:
            optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
        switch = on(model, which, optimizers)
        for _ in range(3):
            for o in optimizers:
                o.zero_grad()
            model(INDEX).square().mean().backward()
            for o in optimizers:
                o.step()
            assert which == "fp32" or switch.last_step.applied
        return model.table.weight.detach()

    low, exact = trained(recipe), trained("fp32")
    assert (low - exact).norm() <= 12 * UNIT[recipe] * exact.norm()
    untouched = [4, 5, 6, 7, 8]
    assert torch.equal(low[untouched], exact[untouched])


@pytest.mark.parametrize("sparse", [False, True])
def test_an_overflow_in_a_sparse_gradient_is_caught(recipe, sparse):
    torch.manual_seed(0)
    model = Table(sparse=sparse)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = on(model, recipe, optimizer)
    before = model.table.weight.detach().clone()
    model(INDEX).mean().backward()
    grad = model.table.weight.grad
    (grad._values() if sparse else grad)[0] = float("inf")
    if recipe == "fp16":
        optimizer.step()
        assert not switch.last_step.applied
        assert "table.weight" in switch.last_step.nonfinite
    else:
        with pytest.raises(Exception, match=r"table\.weight"):
            optimizer.step()
    assert torch.equal(model.table.weight, before)


class Bag(nn.Module):
    def __init__(self, weighted=False, **how):
        super().__init__()
        self.bag = nn.EmbeddingBag(10, 6, **how)
        self.head = nn.Linear(6, 3)
        self.weighted = weighted
        self.own = nn.Parameter(torch.rand(2, 4))

    def forward(self, index):
        if self.weighted:
            return self.head(self.bag(index, per_sample_weights=self.own))
        return self.head(self.bag(index)) + self.own.sum()


BAGS = {
    "mean": {"mode": "mean"},
    "sum": {"mode": "sum"},
    "maximum": {"mode": "max"},
    "padding": {"mode": "sum", "padding_idx": 2},
    "sparse": {"mode": "sum", "sparse": True},
    "weighted": {"mode": "sum", "weighted": True},
}


@pytest.mark.parametrize("form", BAGS)
def test_embedding_bags(recipe, form):
    check(lambda: Bag(**BAGS[form]), lambda: INDEX, recipe, k=8)


def test_a_bag_weighted_by_an_fp32_input(recipe):
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(10, 6, mode="sum")

        def forward(self, index, weights):
            return self.bag(index, per_sample_weights=weights)

    check(Given, lambda: (INDEX, torch.rand(2, 4)), recipe, k=6)


def test_the_functional_form_and_one_hot(recipe):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(10, 6))

        def forward(self, index):
            hot = F.one_hot(index, 10).float() @ self.weight
            return F.embedding(index, self.weight) + hot + self.weight[index]

    check(Own, lambda: INDEX, recipe, k=6)


def test_maximum_norm_is_refused_or_kept(recipe):
    """It renormalises the weight in place inside forward: on a working copy that would be lost."""
    from halfstep.errors import SwitchError

    model = nn.Embedding(10, 6, max_norm=1.0)
    on(model, recipe)
    with pytest.raises(SwitchError, match="weight was changed in place inside forward"):
        model(INDEX)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("rows", [17, 5000])
def test_an_embedding_by_itself_has_sparse_gradients(recipe, kind, rows):
    """Small and large, with nothing beside it: at scale 1 its copy is a cast; torch's own has none."""
    model = kind(rows, 10, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.01)
    switch = halfstep.switch(model, optimizer, recipe)
    before = model.weight.detach().clone()
    (0.01 * model(torch.tensor([[1, 2, 3], [3, 4, 5]])).square().sum()).backward()
    assert model.weight.grad.is_sparse
    assert model.weight.grad.dtype == torch.float32
    optimizer.step()
    assert switch.last_step.applied
    moved = (model.weight != before).any(1).nonzero().flatten().tolist()
    assert moved == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("rows", [17, 70000])
def test_an_own_parameter_has_sparse_gradients(recipe, rows):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(rows, 64))

        def forward(self, index):
            return F.embedding(index, self.table, sparse=True)

    model = Own()
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.01)
    switch = halfstep.switch(model, optimizer, recipe)
    (0.01 * model(torch.tensor([1, 2, 2])).square().sum()).backward()
    assert model.table.grad.is_sparse
    optimizer.step()
    assert switch.last_step.applied
    assert (model.table != 1.0).any(1).nonzero().flatten().tolist() == [1, 2]
