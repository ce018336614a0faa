"""Delta momentum that erases token by token: beside its equation, over every kind of layer, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nestling import optim
from nestling.optim.capture import tokens

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rule(module, **settings):
    return optim.DeltaMomentum(module.parameters(), 0.1, 0.9, 0.6, form="tokens", module=module, **settings)


def momentum_of(layer, passes, **settings):
    """What is remembered of a layer's weight after steps of several backward passes each."""
    optimizer = rule(layer, **settings)
    for parts in passes:
        optimizer.zero_grad()
        for loss in parts:
            loss(layer).backward()
        optimizer.step()
    return optimizer.state[layer.weight]["momentum"]


def cubed(x, scale=1.0):
    return lambda layer: scale * layer(x).pow(3).sum()


def test_it_is_its_equation():
    """m ← m(αI − η_d Σ g_tᵀg_t / Σ‖g_t‖²) + Σ g_t, every g_t by autograd."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, dtype=F64)
    optimizer, m = rule(layer), torch.zeros(4, 5, dtype=F64)
    for step in range(4):
        x = normal(6, 5, seed=step)
        each = [torch.autograd.grad(layer(row).pow(3).sum(), layer.weight)[0] for row in x]
        stacked = torch.cat(each)
        m = m @ (0.9 * torch.eye(5, dtype=F64) - 0.6 * stacked.T @ stacked / stacked.square().sum()) + sum(each)
        optimizer.zero_grad()
        cubed(x)(layer).backward()
        optimizer.step()
        torch.testing.assert_close(optimizer.state[layer.weight]["momentum"], m)


def test_one_token_is_the_form_of_matrices_and_so_are_vectors():
    layer = nn.Linear(5, 4, dtype=F64)
    other = copy.deepcopy(layer)
    one, two = rule(layer), optim.DeltaMomentum(other.parameters(), 0.1, 0.9, 0.6)
    for step in range(4):
        for net, optimizer in ((layer, one), (other, two)):
            optimizer.zero_grad()
            cubed(normal(1, 5, seed=step))(net).backward()
            optimizer.step()
    torch.testing.assert_close(layer.weight, other.weight)
    torch.testing.assert_close(layer.bias, other.bias)


def test_micro_batches_are_one_batch_whatever_their_scales():
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 4, dtype=F64), normal(6, 5)
    big, small = cubed(x[:2], 1e3), cubed(x[2:], 1e-3)
    whole = momentum_of(copy.deepcopy(layer), 2 * [[lambda net: big(net) + small(net)]])
    for order in ([big, small], [small, big]):
        torch.testing.assert_close(momentum_of(copy.deepcopy(layer), 2 * [order]), whole)


def test_a_token_without_an_error_erases_nothing():
    torch.manual_seed(0)
    layer, x, more = nn.Linear(5, 4, dtype=F64), normal(6, 5), normal(3, 5, seed=1)
    some = momentum_of(copy.deepcopy(layer), 3 * [[cubed(x)]])
    also = momentum_of(
        copy.deepcopy(layer),
        3 * [[lambda net: net(torch.cat([x, more])).pow(3).sum(1)[:6].sum() + 0 * net(more).sum()]],
    )
    torch.testing.assert_close(also, some)


def test_an_embedding_is_a_linear_map_of_one_hot_inputs():
    table, dense = nn.Embedding(5, 3, dtype=F64), nn.Linear(5, 3, bias=False, dtype=F64)
    dense.weight = nn.Parameter(table.weight.detach().T.clone())
    x = [torch.tensor([[0, 1, 1], [3, 0, 0]]), torch.tensor([[1, 4, 2]])]
    one = momentum_of(table, [[cubed(t)] for t in x])
    two = momentum_of(dense, [[lambda net, t=t: net(F.one_hot(t, 5).to(F64)).pow(3).sum()] for t in x])
    torch.testing.assert_close(one, two.T)


def test_a_convolution_is_a_linear_map_of_its_patches():
    torch.manual_seed(0)
    layer = nn.Conv1d(4, 6, 3, padding=1, bias=False, dtype=F64)
    dense = nn.Linear(12, 6, bias=False, dtype=F64)
    dense.weight = nn.Parameter(layer.weight.detach().flatten(1).clone())
    inputs = [normal(2, 4, 7, seed=n) for n in range(3)]
    one = momentum_of(layer, [[cubed(x)] for x in inputs])
    two = momentum_of(dense, [[cubed(tokens(layer, x)[0][0])] for x in inputs])
    torch.testing.assert_close(one.flatten(1), two)


def test_groups_of_a_convolution_are_erased_by_their_own_tokens():
    torch.manual_seed(0)
    layer = nn.Conv1d(4, 6, 2, groups=2, bias=False, dtype=F64)
    optimizer, m = rule(layer), torch.zeros(2, 3, 4, dtype=F64)
    for step in range(3):
        x = normal(2, 4, 5, seed=step)
        y = layer(x)
        y.retain_grad()
        optimizer.zero_grad()
        y.pow(3).sum().backward()
        seen = tokens(layer, x)[0]
        errors = y.grad.view(2, 2, 3, 4).permute(1, 0, 3, 2).reshape(2, 8, 3)
        each = errors[..., None] * seen[:, :, None]  # [group, token, out, in]
        gram = torch.einsum("gtoi,gtoj->gij", each, each) / each.square().sum()
        m = m @ (0.9 * torch.eye(4, dtype=F64) - 0.6 * gram) + each.sum(1)
        optimizer.step()
        torch.testing.assert_close(optimizer.state[layer.weight]["momentum"].view(2, 3, 4), m)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_errors_of_any_size_count_alike(scale):
    layer, x = nn.Linear(5, 4), normal(6, 5).float()
    start = normal(4, 5, seed=3).float()

    def made(size):
        net = copy.deepcopy(layer)
        optimizer = rule(net)
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.state[net.weight]["momentum"].copy_(start)
        optimizer.zero_grad()
        (net(x) * size).sum().backward()
        net.weight.grad.zero_()
        optimizer.step()
        return optimizer.state[net.weight]["momentum"]

    torch.testing.assert_close(made(scale), made(1.0))


def test_what_cannot_be_is_refused():
    layer = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"form 'tokens' needs module.*a gradient is a sum"):
        optim.DeltaMomentum(layer.parameters(), form="tokens")
    with pytest.raises(ValueError, match=r"module is given, but form is 'matrix'"):
        optim.DeltaMomentum(layer.parameters(), module=layer)
    optimizer = rule(layer)
    layer.weight.grad = torch.ones(2, 3)
    with pytest.raises(
        RuntimeError, match=r"weight has a gradient, but its layer was not called.*strict=False for form 'matrix'"
    ):
        optimizer.step()
    other = copy.deepcopy(layer)
    for net, made in (
        (layer, rule(layer, strict=False)),
        (other, optim.DeltaMomentum(other.parameters(), 0.1, 0.9, 0.6)),
    ):
        for n in range(3):
            net.weight.grad = normal(2, 3, seed=n).float()
            made.step()
    assert torch.equal(layer.weight, other.weight)
