"""Every option of every choice, found in its folder: known to the public, told apart, and right in its numerical derivatives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling.memory import (
    L2,
    Decay,
    DotProduct,
    EpsilonInsensitive,
    Full,
    Gates,
    Implicit,
    Leader,
    Matrix,
    MemorySpec,
    Momentum,
    Network,
    Omega,
    Sketch,
)

from .cases import BASES, normal, options, variants

CHOICE = {"networks": "network", "biases": "bias", "retentions": "retention", "rules": "rule", "features": "features"}
EVERY = [(axis, option) for axis in BASES for option in variants(axis)]
DIM, TIME = 3, 5  # of two numbers a layer norm leaves but a sign, whose derivatives are all 0


@pytest.mark.parametrize("axis", BASES)
def test_every_option_of_a_folder_is_public_and_told_apart(axis: str) -> None:
    assert len(options(axis)) > 3
    for option in options(axis):
        assert getattr(nl.memory, option.__name__) is option
        assert option.__name__ in nl.memory.__all__
    words = [str(option) for option in variants(axis)]
    assert len(set(words)) == len(words), "two options are described alike"


def spec_of(axis: str, option: Any) -> MemorySpec:
    """A matrix memory with momentum, decay and the squared error, but for this choice."""
    if isinstance(option, Sketch):
        option = replace(option, size=3)
    if isinstance(option, Omega):
        option = replace(option, length=3)
    if isinstance(option, EpsilonInsensitive):
        option = replace(option, epsilon=0.5)
    if hasattr(option, "expansion"):
        option = replace(option, expansion=1.5)
    choices = {"network": Matrix(init_scale=1.0), "bias": L2(), "retention": Decay(), "rule": Momentum()}
    choices[CHOICE[axis]] = option
    if isinstance(option, Leader):
        choices["retention"] = Full()
    if isinstance(option, Implicit):  # its squared error is its own
        choices["bias"] = DotProduct()
    return MemorySpec(DIM, DIM, chunk=2, name=f"{axis}: {option}", **choices)


@pytest.mark.parametrize(("axis", "option"), EVERY, ids=[f"{axis}: {option!r}" for axis, option in EVERY])
def test_derivatives_of_every_option_in_a_memory_are_numerical_ones(axis: str, option: Any) -> None:
    """Of outputs and weights, to q, k, v, every gate, the initial weights and a map's own parameters, over chunk borders."""
    spec = spec_of(axis, option)
    w0 = [0.7 * normal(1, *shape, seed=n) for n, shape in enumerate(spec.shapes)]
    if isinstance(option, nl.memory.Divergence | nl.memory.SoftmaxLag):  # which start on the simplex
        w0 = [w.softmax(-2) for w in w0]
    example = spec.example(torch.Generator().manual_seed(5), lanes=1, heads=1, time=TIME, dtype=torch.float64)
    q, k, v, gates = example
    names = [name for name, _ in gates.items()]
    given = [x.detach().requires_grad_() for x in (q, k, v, *(gate for _, gate in gates.items()), *w0)]

    def read(*x: Tensor) -> tuple[Tensor, ...]:
        own = Gates(**dict(zip(names, x[3:], strict=False)))
        y, state = spec.scan(x[3 + len(names) :], *x[:3], own)
        return y, *state.weights

    assert torch.autograd.gradcheck(read, given, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)
    before = read(*given)[0].detach()
    for gate in names:  # none of the gates that it says it reads is without effect
        other = [x.detach().clone() for x in given]
        other[3 + names.index(gate)] *= 0.9
        assert (read(*other)[0] - before).abs().max() > 1e-4, gate


@pytest.mark.parametrize("network", variants("networks"), ids=repr)
def test_errors_of_every_network_are_numerical_derivatives_of_its_map(network: Network) -> None:
    """x_lᵀδ_l against central differences of ⟨M(k), e⟩, every entry of every weight."""
    width = 6 if getattr(network, "leading", False) else 4
    w = [0.5 * normal(1, *shape, seed=n) for n, shape in enumerate(network.shapes(width, 4))]
    k, e = normal(1, 3, width, seed=7), normal(1, 3, 4, seed=8)

    def score(weights: list[Tensor]) -> Tensor:
        return (network.apply(lambda layer, h: h @ weights[layer], k) * e).sum()

    trace = network.trace(w, k)
    torch.testing.assert_close(trace.prediction, network.apply(lambda layer, h: h @ w[layer], k))
    h = 1e-6
    for layer, (x, delta) in enumerate(zip(trace.inputs, network.errors(w, trace, e), strict=True)):
        numerical = torch.empty_like(w[layer])
        for place in range(w[layer].numel()):
            bump = torch.zeros_like(w[layer]).view(-1)
            bump[place] = h
            up, down = ([x if n != layer else x + sign * bump.view_as(x) for n, x in enumerate(w)] for sign in (1, -1))
            numerical.view(-1)[place] = (score(up) - score(down)) / (2 * h)
        torch.testing.assert_close(x.mT @ delta, numerical, rtol=1e-6, atol=1e-8)
