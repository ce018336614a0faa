"""What DGD sees of a model: inputs of every kind of layer, over every way to call them, and what it refuses."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nestling import optim
from nestling.optim.capture import tokens

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9)),
    (nn.Conv1d(4, 6, 2, stride=2, dilation=3, padding="valid", bias=False), (2, 4, 9)),
    (nn.Conv1d(3, 3, 3, padding="same", padding_mode="circular"), (3, 7)),
    (nn.Conv2d(3, 4, (3, 2), padding=(1, 0), stride=(2, 1)), (2, 3, 5, 6)),
    (nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"), (1, 4, 5, 5)),
    (nn.Conv3d(2, 3, 2, padding=1), (1, 2, 3, 3, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda x: str(x)[:60])
@pytest.mark.parametrize("form", ["normalized", "exact", "neurips"])
def test_a_convolution_is_erased_along_its_patches(layer, shape, form):
    layer = copy.deepcopy(layer).double()
    x, lr = normal(*shape), 0.3
    optimizer = optim.DGD(layer, lr, form=form)
    (layer(x) ** 3).mean().backward()
    g, w = layer.weight.grad.flatten(1), layer.weight.detach().flatten(1).clone()
    patches, groups = tokens(layer, x)
    y = F.linear(patches[0], w[: len(w) // groups])  # the patches are those that the layer saw
    bias = 0 if layer.bias is None else layer.bias[: len(w) // groups]
    made = layer(x if x.dim() == len(layer.kernel_size) + 2 else x[None]).flatten(2)[:, : len(w) // groups]
    torch.testing.assert_close(made.mT.flatten(0, 1), y + bias)
    optimizer.step()

    expected = []
    for part, grad, seen in zip(w.chunk(groups), g.chunk(groups), patches, strict=True):
        n = len(seen)
        if form == "exact":
            gram = seen.T @ seen / n
            expected.append((part - lr * grad) @ torch.linalg.inv(torch.eye(gram.shape[0], dtype=F64) + lr * gram))
        elif form == "normalized":
            hat = seen / seen.norm(dim=1, keepdim=True)
            expected.append(part - lr / (1 + lr) * (grad + part @ hat.T @ hat / n))
        else:
            expected.append(part - part @ seen.T @ seen / n - lr * grad)
    torch.testing.assert_close(layer.weight.flatten(1), torch.cat(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["normalized", "exact", "neurips"])
def test_an_embedding_is_a_linear_map_of_one_hot_inputs(form):
    table, lr = nn.Embedding(5, 3, dtype=F64), 0.3
    dense = nn.Linear(5, 3, bias=False, dtype=F64)
    dense.weight = nn.Parameter(table.weight.detach().T.clone())
    x = torch.tensor([[0, 1, 1], [3, 0, 0]])
    for layer, made in ((table, table), (dense, lambda x: dense(F.one_hot(x, 5).to(F64)))):
        optimizer = optim.DGD(layer, lr, form=form)
        made(x).pow(3).mean().backward()
        optimizer.step()
    torch.testing.assert_close(table.weight, dense.weight.T)


def test_padding_of_an_embedding_is_no_input():
    table = nn.Embedding(5, 3, padding_idx=0, dtype=F64)
    table.weight.data[0] = 1.0
    optimizer = optim.DGD(table, 0.5)
    table(torch.tensor([0, 0, 1])).sum().backward()
    optimizer.step()
    assert torch.equal(table.weight[0], torch.ones(3, dtype=F64))


def step_of(make_loss, form="normalized", seed=0, **settings):
    torch.manual_seed(seed)
    layer = nn.Linear(5, 4, dtype=F64)
    optimizer = optim.DGD(layer, 0.3, form=form, **settings)
    make_loss(layer, optimizer)
    optimizer.step()
    return torch.cat([layer.weight.flatten(), layer.bias]).detach()


@pytest.mark.parametrize("form", ["normalized", "exact"])
def test_micro_batches_are_one_batch(form):
    x = normal(6, 5)

    def whole(layer, optimizer):
        layer(x).square().sum(1).mean().backward()

    def parts(layer, optimizer):
        for part in (x[:2], x[2:4], x[4:]):
            (layer(part).square().sum(1).mean() / 3).backward()

    def called_often(layer, optimizer):
        torch.cat([layer(x[:1]), layer(x[1:])]).square().sum(1).mean().backward()

    def with_the_rest_of_life(layer, optimizer):
        (2 * layer(normal(3, 5, seed=9)).sum()).backward()  # thrown away
        optimizer.zero_grad()
        with torch.no_grad():
            layer(normal(3, 5, seed=8))
        layer(normal(3, 5, seed=7))  # no gradient flows back
        layer(x.reshape(2, 3, 5)).square().sum(2).mean().backward()

    expected = step_of(whole, form)
    for other in (parts, called_often, with_the_rest_of_life):
        torch.testing.assert_close(step_of(other, form), expected)


def test_a_closure_evaluates_and_captures_anew():
    x = normal(6, 5)

    def whole(layer, optimizer):
        layer(x).square().mean().backward()

    torch.manual_seed(0)
    layer = nn.Linear(5, 4, dtype=F64)
    optimizer = optim.DGD(layer, 0.3)

    def closure():
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(torch.cat([layer.weight.flatten(), layer.bias]).detach(), step_of(whole))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3, dtype=F64)
        self.head = nn.Linear(3, 5, bias=False, dtype=F64)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.tanh(self.table(x)))


def test_a_weight_with_two_uses_is_erased_along_both():
    torch.manual_seed(0)
    model, x, lr = Tied(), torch.tensor([0, 1, 1]), 0.3
    optimizer = optim.DGD(model, lr)
    model(x).square().mean().backward()
    w, g = model.table.weight.detach().clone(), model.table.weight.grad.clone()
    hidden = F.normalize(torch.tanh(w[x]), dim=1)
    erased = w @ hidden.T @ hidden / 3 + torch.tensor([1, 2, 0, 0, 0], dtype=F64)[:, None] / 3 * w
    optimizer.step()
    torch.testing.assert_close(model.table.weight, w - lr / (1 + lr) * (g + erased), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"table\.weight is both an embedding and an output layer.*normalized"):
        optim.DGD(Tied(), form="exact")


def test_a_list_of_parameters_is_refused_with_the_reason():
    layer = nn.Linear(3, 2)
    for given in (layer.parameters(), list(layer.parameters()), [{"params": list(layer.parameters())}]):
        with pytest.raises(TypeError, match=r"expected the nn\.Module.*inputs.*it would be SGD"):
            optim.DGD(given)


def test_a_weight_used_behind_its_layer_is_refused_unless_sgd_is_asked_for():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3, 2))
    before = layer[0].weight.detach().clone()
    optimizer = optim.DGD(layer, 0.1)
    F.linear(torch.ones(1, 3), layer[0].weight).sum().backward()
    with pytest.raises(RuntimeError, match=r"0\.weight has a gradient, but its layer was not called.*strict=False"):
        optimizer.step()
    optimizer = optim.DGD(layer, 0.1, strict=False)
    optimizer.step()
    torch.testing.assert_close(layer[0].weight, before - 0.1)


def test_only_a_part_of_a_module_may_be_trained_in_groups_of_its_own():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    kept = model[0].weight.detach().clone()
    groups = [{"params": model[1].parameters(), "lr": 0.5}]
    optimizer = optim.DGD(model, params=groups)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, kept)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_low_precision_products_are_made_anew_from_the_weights():
    """Under autocast a layer's output has lost digits of W x, which are not to be missing from W."""
    x = normal(6, 5).float()
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = nn.Linear(5, 4)
        optimizer = optim.DGD(layer, 0.3)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer(x)
        (y.float() * 0).sum().backward()  # the erasing alone
        optimizer.step()
        made.append(layer.weight.detach())
    torch.testing.assert_close(*made)


def made_by(model, x, **settings):
    """Weights after a step of DGD on a small network, whatever way its layers are called."""
    optimizer = optim.DGD(model, 0.3, **settings)
    model(x).square().sum(-1).mean().backward()
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Way(nn.Module):
    """Two layers, called in a way of one's own."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.way = nn.Linear(5, 4, dtype=F64), nn.Linear(4, 3, dtype=F64), way

    def forward(self, x):
        return self.way(self, x)


WAYS = {
    "activation in place": lambda m, x: m.two(F.relu_(m.one(x))),
    "input by name": lambda m, x: m.two(input=F.relu(m.one(input=x))),
    "recomputed": lambda m, x: checkpoint(lambda y: m.two(F.relu(m.one(y))), x, use_reentrant=False),
    "recomputed, reentrant": lambda m, x: checkpoint(
        lambda y: m.two(F.relu(m.one(y))), x.clone().requires_grad_(), use_reentrant=True
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["normalized", "exact", "neurips"])
def test_how_a_layer_is_called_changes_nothing(way, form):
    x = normal(6, 5)
    plain = made_by(Way(lambda m, x: m.two(F.relu(m.one(x)))), x, form=form)
    torch.testing.assert_close(made_by(Way(WAYS[way]), x, form=form), plain)


def test_a_layer_that_is_trained_later_is_erased_too():
    x, models = normal(6, 5), [Way(lambda m, x: m.two(m.one(x))) for _ in range(2)]
    models[0].one.weight.requires_grad_(False)
    optimizers = [optim.DGD(m, 0.3, params=m.parameters()) for m in models]
    models[0].one.weight.requires_grad_(True)
    models[0].three = nn.Linear(3, 3, dtype=F64)
    models[1].three = copy.deepcopy(models[0].three)
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.add_param_group({"params": [model.three.weight]})
        optimizer.zero_grad()
        model.three(model(x)).square().mean().backward()
        optimizer.step()
        assert set(optimizer.capture.names) == {model.one.weight, model.two.weight, model.three.weight}
    torch.testing.assert_close(models[0].one.weight, models[1].one.weight)


def test_what_would_be_sgd_is_refused_unless_it_is_asked_for():
    with pytest.raises(ValueError, match=r"none of the parameters is the weight of a linear.*strict=False for SGD"):
        optim.DGD(nn.LayerNorm(3))
    made = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"weight is made from other parameters.*strict=False for SGD"):
        optim.DGD(made)
    assert len(made._forward_hooks) == 0
    optimizer = optim.DGD(made, strict=False)
    before = [p.detach().clone() for p in made.parameters()]
    made(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for p, q in zip(made.parameters(), before, strict=True):
        torch.testing.assert_close(p, q - 1e-2 * p.grad)
    with pytest.raises(ValueError, match=r"a parameter \(4, 4\) is none of the module's"):
        optim.DGD(nn.Linear(3, 2), params=nn.Linear(4, 4).parameters())


@pytest.mark.parametrize("lr", [1e2, 1e5])
def test_the_exact_step_is_stable_at_every_rate_in_float32(lr):
    """W x → u, where rounding of I + ηC is larger than the 1 and C has no full rank."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4, bias=False), 100 * torch.randn(3, 8).repeat(50, 1)
    target = layer(x).detach()
    optimizer = optim.DGD(layer, lr, form="exact", reduction="sum")
    (layer(x) * -target).sum().backward()  # u = the target itself, which W x is
    optimizer.step()
    assert layer.weight.isfinite().all()
    found = (
        x.double() @ layer.weight.detach().double().T
    )  # across the inputs, g's own rounding has moved it by η times that
    assert (found - target).norm() < 0.05 * target.norm()


@pytest.mark.parametrize("form", ["normalized", "exact", "neurips"])
def test_inputs_that_are_not_finite_spoil_their_own_weight_alone(form):
    model = Way(lambda m, x: (m.one(x[:, :5]), m.two(x[:, 5:])))
    optimizer = optim.DGD(model, 0.3, form=form)
    x = normal(6, 9)
    x[0, 0] = torch.nan
    one, two = model(x)
    (one.sum() + two.sum()).backward()
    optimizer.step()
    assert not model.one.weight.isfinite().all()
    assert model.two.weight.isfinite().all()


def test_a_copied_model_is_not_watched_and_the_optimizer_cannot_be_copied():
    model = Way(lambda m, x: m.two(m.one(x)))
    optimizer = optim.DGD(model)
    other = copy.deepcopy(model)
    other(normal(6, 5)).sum().backward()
    assert not optimizer.capture.seen
    with pytest.raises(TypeError, match=r"DGD cannot be copied.*load_state_dict"):
        copy.deepcopy(optimizer)


def test_hooks_go_with_the_optimizer():
    layer = nn.Linear(3, 2)
    optimizer = optim.DGD(layer)
    optimizer.remove()
    assert not layer._forward_hooks
    optimizer = optim.DGD(layer)
    capture = optimizer.capture
    layer(torch.ones(1, 3)).sum().backward()
    assert capture.seen[layer.weight].count == 1
    optimizer.zero_grad()
    assert not capture.seen
    del optimizer, capture
    gc.collect()
    layer(torch.ones(1, 3)).sum().backward()  # a hook without an optimizer does nothing


@pytest.mark.parametrize("settings", [{"form": "left"}, {"reduction": "none"}, {"coupling": 1.5}, {"momentum": -0.1}])
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        optim.DGD(nn.Linear(2, 2), **settings)
