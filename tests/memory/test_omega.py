"""The Omega rule against loops written from its equation (Atlas, eq. 8–13): windows of every length, and momentum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestling as nl
from nestling.memory import (
    L2,
    MLP,
    Decay,
    Full,
    GatedMLP,
    Gates,
    Gradient,
    Matrix,
    MemorySpec,
    Momentum,
    Network,
    Omega,
    Rule,
)
from nestling.memory.networks.base import at

D, T = 4, 14


def inputs(c: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Gates]:
    """q, unit-norm k and v of one lane and head, with every gate."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 1, T, D, generator=g, dtype=torch.float64)
    alpha, mu, eta = torch.rand(3, 1, 1, T, generator=g, dtype=torch.float64)
    window = torch.rand(1, 1, T, c, generator=g, dtype=torch.float64)
    gates = Gates(lr=0.3 * eta / c, momentum=0.8 * mu, retention=0.8 + 0.2 * alpha, window=window)
    return q, F.normalize(k, dim=-1), v, gates


def only(gates: Gates, *names: str) -> Gates:
    return Gates(**{n: g for n, g in gates.items() if n in names})


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def weights(spec: MemorySpec) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [0.5 * torch.randn(1, *shape, generator=g, dtype=torch.float64) for shape in spec.shapes]


def loop(spec: MemorySpec, w0: list[Tensor], q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> Tensor:
    """S_t = μS − η Σ_i γ_i ∇ℓ_i at the weights of the chunk's start, W_t = αW + S_t; every gradient by autograd."""
    network, c = spec.network, spec.bias.window
    w = anchor = [x[0] for x in w0]
    s, out = [torch.zeros_like(x) for x in w], []
    for t in range(T):
        leaves = [x.detach().requires_grad_() for x in anchor]
        loss = torch.zeros(()).double()
        for i in range(max(0, t - c + 1), t + 1):
            error = network.apply(at(leaves), k[0, 0, i : i + 1]) - v[0, 0, i]
            loss = loss + gates.window[0, 0, t, t - i] * error.square().sum() / 2
        found = torch.autograd.grad(loss, leaves)
        mu = gates.momentum[0, 0, t] if spec.rule.momentum else 0.0
        s = [mu * a - gates.lr[0, 0, t] * b for a, b in zip(s, found, strict=True)]
        w = [gates.retention[0, 0, t] * a + b for a, b in zip(w, s, strict=True)]
        out.append(network.apply(at(w), q[0, 0, t : t + 1])[0])
        anchor = w if (t + 1) % spec.chunk == 0 else anchor
    return torch.stack(out)


@pytest.mark.parametrize("rule", [Gradient(), Momentum()])
@pytest.mark.parametrize("c", [1, 2, 4, 7, T + 2])
@pytest.mark.parametrize("network", [Matrix(), MLP(), MLP(norm=False), GatedMLP()])
def test_any_window_is_the_printed_sum(network: Network, c: int, rule: Rule) -> None:
    """Chunks of 4: a window of one, shorter, as long, longer (a halo across a border) and the whole past; a short last chunk."""
    spec = MemorySpec(D, D, network, Omega(L2(), length=c), Decay(), rule, chunk=4)
    q, k, v, gates = inputs(c)
    w0 = weights(spec)
    expected = loop(spec, w0, q, k, v, gates)
    given = gates if rule.momentum else only(gates, "lr", "retention", "window")
    if c == 1:
        given = Gates(
            **{n: g for n, g in given.items() if n not in ("window", "lr")}, lr=gates.lr * gates.window[..., 0]
        )
    close(nl.memory.scan(spec, w0, q, k, v, given)[0][0, 0], expected)


def test_of_one_token_with_momentum_it_is_titans() -> None:
    """Atlas, eq. 12–13."""
    q, k, v, gates = inputs(1)
    titans = nl.memory.named("titans", key_dim=D, chunk=4)
    omega = MemorySpec(D, D, MLP(), Omega(L2(), length=1), Decay(), Momentum(), chunk=4)
    given = only(gates, "lr", "momentum", "retention")
    w0 = weights(titans)
    close(nl.memory.scan(omega, w0, q, k, v, given)[0], nl.memory.scan(titans, w0, q, k, v, given)[0])


@pytest.mark.parametrize("name", ["omeganet", "swla", "atlas"])
def test_tokens_that_are_all_pruned_leave_pure_decay(name: str) -> None:
    """γ ≡ 0: the sum is empty, S stays 0, and Newton–Schulz makes nothing of it."""
    spec = nl.memory.named(name, key_dim=D, chunk=4)
    q, k, v, gates = inputs(8)
    pruned = Gates(lr=gates.lr, retention=gates.retention, window=torch.zeros_like(gates.window))
    w0 = weights(spec)
    _, state = nl.memory.scan(spec, w0, q, k, v, pruned)
    for w, start in zip(state.weights, w0, strict=False):
        close(w[0], gates.retention.prod() * start)


def test_a_window_over_everything_fits_what_can_be_fitted() -> None:
    """Full-batch descent on the sum: as many orthogonal pairs as key dimensions are stored (Atlas, prop. 1)."""
    keys, values = torch.eye(D).double()[None, None], torch.randn(1, 1, D, D, dtype=torch.float64)
    spec = MemorySpec(D, D, Matrix(), Omega(L2(), length=D), Full(), Gradient(), chunk=1)
    _, state = nl.memory.scan(spec, [torch.zeros(1, D, D).double()], keys, keys, values)
    close(keys @ state.weights[0], values)


@pytest.mark.parametrize("pairs", [1, 3, D, D + 1, 2 * D])
def test_full_batch_descent_fits_as_many_random_pairs_as_a_key_has_dimensions(pairs: int) -> None:
    """To V K⁺ from an empty memory, by steps below 2/λ: exactly up to D pairs, and beyond not (Atlas, prop. 1)."""
    steps = 300
    g = torch.Generator().manual_seed(20)
    keys, values = torch.randn(2, pairs, D, generator=g, dtype=torch.float64)
    largest = float(torch.linalg.eigvalsh(keys.mT @ keys).max())
    spec = MemorySpec(D, D, Matrix(), Omega(L2(), length=pairs), Full(), Gradient(), chunk=1)
    turns = [x[torch.arange(pairs - 1 + steps) % pairs][None, None] for x in (keys, values)]

    def left(step: float) -> tuple[Tensor, float]:
        lr = torch.full((1, 1, pairs - 1 + steps), step / largest, dtype=torch.float64)
        lr[..., : pairs - 1] = 0.0  # until the window holds every pair
        _, state = nl.memory.scan(spec, [torch.zeros(1, D, D).double()], turns[0], *turns, Gates(lr=lr))
        w = state.weights[0][0, 0]
        return w, float((keys @ w - values).square().sum())

    best = torch.linalg.pinv(keys) @ values
    w, error = left(1.9)
    torch.testing.assert_close(w, best, rtol=1e-6, atol=1e-6)
    least = float((keys @ best - values).square().sum())
    assert error == pytest.approx(least, abs=1e-9)
    assert error < 1e-9 if pairs <= D else error > 0.1
    assert left(2.05)[1] > 100 * float(values.square().sum()), "a step beyond 2/λ goes astray"
