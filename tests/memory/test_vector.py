"""The vector memory: channel by channel, or without a key; in the engine with any bias, rule and retention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling.memory import (
    Decay,
    DeltaGradient,
    DotProduct,
    Gates,
    Huber,
    Implicit,
    MemorySpec,
    Momentum,
    Muon,
    Omega,
    Softmax,
    Vector,
)
from nestling.memory.biases import L2

from .cases import normal

D = 4


MIXTURES = [
    {},
    {"rule": Momentum(), "retention": Decay()},
    {"bias": Omega(L2(), length=3), "retention": Decay()},
    {"bias": Huber(), "rule": Momentum()},
    {"rule": Muon(), "retention": Decay()},
    {"bias": DotProduct(), "retention": Softmax()},
]


@pytest.mark.parametrize("read", ["after", "before", "boundary"])
@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("mixture", range(len(MIXTURES)))
def test_every_mixture_equals_its_definition_in_outputs_state_and_gradients(
    mixture: int, keyed: bool, read: str
) -> None:
    spec = MemorySpec(D, D, Vector(keyed=keyed), chunk=5, read=read, **MIXTURES[mixture])
    generator = torch.Generator().manual_seed(mixture)
    w0 = [normal(*w.shape, seed=3) for w in spec.init(2, generator)]
    q, k, v, gates = spec.example(generator, time=17, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (*w0, q, k, v, *(g for _, g in gates.items()))]
    reset = torch.rand(2, 17, generator=generator) < 0.1
    valid = torch.rand(2, 17, generator=generator) < 0.8
    runs = []
    for options in ({"engine": "reference"}, {"tile": None}, {"tile": 3}):
        y, state = spec.scan(w0, q, k, v, gates, reset=reset, valid=valid, **options)
        total = (y * normal(*y.shape, seed=9)).sum() + (
            state.weights[0] * normal(*state.weights[0].shape, seed=8)
        ).sum()
        gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
        runs.append((y, *state.weights, *state.momentum, *gradients))
    for fast in runs[1:]:
        for a, b in zip(fast, runs[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("chunk", [1, 4])
def test_it_is_as_many_matrix_memories_of_one_number(chunk: int) -> None:
    choices = {"rule": Momentum(), "retention": Decay(), "chunk": chunk}
    vector = MemorySpec(D, D, Vector(), **choices)
    q, k, v, gates = vector.example(torch.Generator().manual_seed(0), heads=1, time=15, dtype=torch.float64)
    w = normal(1, 1, D)
    y, state = vector.scan([w], q, k, v, gates)

    def apart(x: Tensor) -> Tensor:
        return x.squeeze(1).mT.unsqueeze(-1)  # every channel a head

    single = MemorySpec(1, 1, **choices)
    every = gates.map(lambda gate: gate.expand(-1, D, -1))
    z, other = single.scan([apart(w[None])[0]], apart(q), apart(k), apart(v), every)
    torch.testing.assert_close(apart(y), z, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(apart(state.weights[0]), other.weights[0], rtol=1e-11, atol=1e-11)


def test_without_a_key_it_is_momentum_of_its_values_and_with_l2_their_moving_average() -> None:
    q, k, v = (normal(1, 1, 12, D, seed=n) for n in range(3))
    eta, mu = normal(1, 1, 12, seed=4).sigmoid(), normal(1, 1, 12, seed=5).sigmoid()
    summing = MemorySpec(D, D, Vector(keyed=False), DotProduct(), Decay())
    averaging = MemorySpec(D, D, Vector(keyed=False), chunk=1)
    erasing = MemorySpec(D, D, Vector(keyed=False), DotProduct(), rule=DeltaGradient())
    zero = [torch.zeros(1, 1, D, dtype=torch.float64)]
    y, _ = summing.scan(zero, q, k, v, Gates(lr=eta, retention=mu))
    average, _ = averaging.scan(zero, q, k, v, Gates(lr=eta))
    erased, _ = erasing.scan(zero, q, k, v, Gates(lr=eta))
    s = a = torch.zeros(D, dtype=torch.float64)
    for t in range(12):
        s = mu[0, 0, t] * s + eta[0, 0, t] * v[0, 0, t]
        a = (1 - eta[0, 0, t]) * a + eta[0, 0, t] * v[0, 0, t]
        torch.testing.assert_close(y[0, 0, t], s, rtol=0, atol=1e-12)
        torch.testing.assert_close(average[0, 0, t], a, rtol=0, atol=1e-12)
        torch.testing.assert_close(erased[0, 0, t], a, rtol=0, atol=1e-12)


def test_it_works_inside_a_layer() -> None:
    layer = nl.layers.Memory(8, 2, MemorySpec(4, 4, Vector(init_scale=1.0), retention=Decay(), rule=Momentum()))
    y, state = layer(torch.randn(2, 9, 8))
    assert torch.isfinite(y).all()
    assert state.memory.weights[0].shape == (2, 2, 1, 4)
    assert state.memory.weights[0].std() > 0.1


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"value_dim": 3}, "keyed=False"),
        ({"retention": Decay(per_channel=True)}, "acts along the key"),
        ({"bias": DotProduct(), "rule": DeltaGradient()}, "acts along the key"),
        ({"network": Vector(keyed=False), "bias": DotProduct(), "rule": Implicit()}, "acts along the key"),
    ],
)
def test_what_cannot_be_is_refused_in_words(choices: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MemorySpec(**{"key_dim": D, "value_dim": D, "network": Vector(), **choices})
