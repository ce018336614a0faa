"""Nesterov, the leader, and Newton–Schulz at every r-th token: loops from their equations, and every engine against the other."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling.memory import (
    L2,
    MLP,
    Bias,
    Decay,
    DotProduct,
    Full,
    Gates,
    Gradient,
    Leader,
    Matrix,
    MemorySpec,
    Momentum,
    Muon,
    Nesterov,
    Omega,
    Rule,
    newton_schulz,
)

from .cases import gate_between, normal, one_lane

D, T = 4, 18


def data(seed: int, time: int = T) -> tuple[Tensor, Tensor, Tensor]:
    return one_lane(seed, D, time)


def gate(low: float, high: float, seed: int) -> Tensor:
    return gate_between(low, high, seed, T)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_nesterov_is_the_classical_sequence_looked_ahead() -> None:
    """S_t = μS_{t−1} − η∇ℓ_t(V_{t−1} + μS_{t−1}), V_t = V_{t−1} + S_t; what is read is V_t + μS_t."""
    q, k, v = data(0)
    eta, mu = torch.full((1, 1, T), 0.2, dtype=torch.float64), torch.full((1, 1, T), 0.7, dtype=torch.float64)
    point = normal(D, D, seed=1)
    spec = MemorySpec(D, D, Matrix(), L2(), Full(), Nesterov(), chunk=1)
    y, _ = spec.scan([point[None]], q, k, v, Gates(lr=eta, momentum=mu))
    s = torch.zeros_like(point)
    for t in range(T):
        ahead, key = point + 0.7 * s, k[0, 0, t]
        s = 0.7 * s - 0.2 * torch.outer(key, key @ ahead - v[0, 0, t])
        point = point + s
        close(y[0, 0, t], q[0, 0, t] @ (point + 0.7 * s))
    plain = MemorySpec(D, D, Matrix(), L2(), Full(), Momentum(), chunk=1)
    other, _ = plain.scan([normal(D, D, seed=1)[None]], q, k, v, Gates(lr=eta, momentum=mu))
    assert (y - other).abs().max() > 1e-2


def test_nesterov_without_momentum_is_descent() -> None:
    q, k, v = data(1)
    gates, w0 = Gates(lr=gate(0.1, 0.5, 1), retention=gate(0.8, 1, 2)), [normal(1, D, D, seed=3)]
    runs = [
        MemorySpec(D, D, Matrix(), L2(), Decay(), r, chunk=3).scan(w0, q, k, v, gates)[0]
        for r in (Nesterov(), Gradient())
    ]
    close(*runs)


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("network", [Matrix(init_scale=1.0), MLP()], ids=["matrix", "mlp"])
def test_gradient_descent_is_a_proximal_step_is_a_leader_while_the_step_is_constant(
    network: Matrix | MLP, chunk: int
) -> None:
    """Miras, eq. 5 and 7; Nested Learning, eq. 1–3."""
    q, k, v = data(2)
    runs = []
    for rule in (Gradient(), Leader()):
        spec = MemorySpec(D, D, network, L2(), Full(), rule, chunk=chunk)
        w0 = [w.double() for w in spec.init(1, torch.Generator().manual_seed(0))]
        runs.append(spec.scan(w0, q, k, v, Gates(lr=torch.full((1, 1, T), 0.1, dtype=torch.float64))))
    close(runs[0][0], runs[1][0])
    for a, b in zip(runs[0][1].weights, runs[1][1].weights, strict=True):
        close(a, b)
    # the proximal form: the minimizer of ⟨∇, W⟩ + ‖W − W_{t−1}‖²/2η, by its stationary point
    spec = MemorySpec(D, D, Matrix(), L2(), Full(), Gradient(), chunk=1)
    before = normal(1, D, D, seed=5)
    one = (x[:, :, :1] for x in (q, k, v))
    _, state = spec.scan([before], *one, Gates(lr=torch.full((1, 1, 1), 0.3, dtype=torch.float64)))
    key = k[0, 0, 0]
    gradient = torch.outer(key, key @ before[0] - v[0, 0, 0])
    close(gradient + (state.weights[0][0, 0] - before[0]) / 0.3, torch.zeros(D, D).double())


def test_a_leader_minimizes_all_its_losses_for_any_steps_and_differs_from_descent() -> None:
    """Stationary point of Σ⟨G_i, W⟩ + ‖W − W_0‖²/2η_t at every token; a step of 0 reads W_0, the next has all back."""
    q, k, v = data(3)
    eta = gate(0.1, 0.6, 4)
    eta[..., 7] = 0.0
    start = normal(D, D, seed=6)
    spec = MemorySpec(D, D, Matrix(), L2(), Full(), Leader(), chunk=1)
    y, _ = spec.scan([start[None]], q, k, v, Gates(lr=eta))
    w, total = start, torch.zeros_like(start)
    for t in range(T):
        key = k[0, 0, t]
        total = total + torch.outer(key, key @ w - v[0, 0, t])
        leaf = w.clone().requires_grad_()
        if eta[0, 0, t] > 0:
            objective = (total * leaf).sum() + (leaf - start).square().sum() / (2 * eta[0, 0, t])
            (slope,) = torch.autograd.grad(objective, leaf)
            w = leaf.detach() - eta[0, 0, t] * slope  # one Newton step of a quadratic ends at its minimum
        else:
            w = start
        close(y[0, 0, t], q[0, 0, t] @ w)
    descent = MemorySpec(D, D, Matrix(), L2(), Full(), Gradient(), chunk=1)
    assert (descent.scan([start[None]], q, k, v, Gates(lr=eta))[0] - y).abs().max() > 1e-2


@pytest.mark.parametrize(("chunk", "stride"), [(6, 2), (6, 3), (4, 4)])
def test_newton_schulz_at_every_rth_token_is_its_loop(chunk: int, stride: int) -> None:
    """Gradients at the chunk's anchor, S at every token, NS at every r-th, decay between them (Atlas, eq. 32–33)."""
    q, k, v = data(4)
    eta, mu, alpha = gate(0.05, 0.3, 1), gate(0.2, 0.9, 2), gate(0.8, 1, 3)
    spec = MemorySpec(D, D, Matrix(), L2(), Decay(), Muon(stride), chunk=chunk)
    w = anchor = normal(D, D, seed=7)
    y, _ = spec.scan([w[None]], q, k, v, Gates(lr=eta, momentum=mu, retention=alpha))
    s = torch.zeros_like(w)
    for t in range(T):
        key = k[0, 0, t]
        s = mu[0, 0, t] * s + torch.outer(key, key @ anchor - v[0, 0, t])
        w = alpha[0, 0, t] * w
        if (t + 1) % stride == 0:
            w = w - eta[0, 0, t] * newton_schulz(s)
        close(y[0, 0, t], q[0, 0, t] @ w)
        anchor = w if (t + 1) % chunk == 0 else anchor


def test_a_stride_of_a_whole_chunk_is_per_chunk_and_shorter_ones_are_neither() -> None:
    q, k, v = data(5)
    gates = Gates(lr=gate(0.05, 0.3, 1), momentum=gate(0.2, 0.9, 2), retention=gate(0.8, 1, 3))
    runs = {}
    for per in ("chunk", 6, 2, "token"):
        spec = MemorySpec(D, D, MLP(), L2(), Decay(), Muon(per), chunk=6)
        w0 = [w.double() for w in spec.init(1, torch.Generator().manual_seed(4))]
        runs[per] = spec.scan(w0, q, k, v, gates)[0]
    close(runs["chunk"], runs[6])
    for a, b in itertools.combinations(("chunk", 2, "token"), 2):
        assert (runs[a] - runs[b]).abs().max() > 1e-3


@pytest.mark.parametrize("rule", [Nesterov(), Leader(), Muon(2)], ids=str)
@pytest.mark.parametrize("read", ["after", "before", "boundary"])
@pytest.mark.parametrize(
    ("network", "bias"),
    [(MLP(), L2()), (Matrix(init_scale=1.0), DotProduct()), (MLP(), Omega(L2(), length=3))],
    ids=str,
)
def test_every_engine_and_every_cut_agree(rule: Rule, read: str, network: Matrix | MLP, bias: Bias) -> None:
    """Chunked, reference and one token at a time; with resets, invalid and faulty tokens and lanes out of step."""
    retention = Full() if isinstance(rule, Leader) else Decay()
    spec = MemorySpec(D, D, network, bias, retention, rule, chunk=6, read=read)
    generator = torch.Generator().manual_seed(11)
    w0 = [normal(2, *shape, seed=3) for shape in spec.shapes]
    q, k, v, gates = spec.example(generator, lanes=3, time=17, dtype=torch.float64)
    v[2, 0, 9] = float("nan")
    reset, valid = torch.rand(3, 17, generator=generator) < 0.1, torch.rand(3, 17, generator=generator) < 0.8
    valid[2, 9] = True
    inputs = [*w0, q, k, v, *(g for _, g in gates.items())]
    for x in inputs:
        x.requires_grad_()

    def run(bounds: list[int], **options: object) -> list[Tensor]:
        state, outputs = None, []
        for first, last in itertools.pairwise(bounds):
            at = slice(first, last)
            masks = {"reset": reset[:, at], "valid": valid[:, at]}
            part = (x[:, :, at] for x in (q, k, v))
            y, state = nl.memory.scan(spec, w0, *part, gates[at], state, **masks, **options)
            outputs.append(y)
        assert state is not None
        found = [torch.cat(outputs, 2), *state.weights, *state.momentum]
        total = sum((x * normal(*x.shape, seed=n)).sum() for n, x in enumerate(found))
        assert isinstance(total, Tensor)
        gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        zeros = (torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True))
        return [*found, state.faults, *zeros]

    expected = run([0, 17], engine="reference")
    for found in (run([0, 17]), run([0, 17], tile=4), run([0, 7, 17]), run(list(range(18)))):
        for a, b in zip(found, expected, strict=True):
            assert float((a - b).detach().abs().max()) <= 1e-8 * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MemorySpec(4, 4, rule=Leader(), retention=Decay()), "choose Full"),
        (lambda: MemorySpec(4, 4, rule=Muon(3), retention=Full(), chunk=8), "do not divide chunk 8"),
        (lambda: Muon(1), "at least 2"),
        (lambda: MemorySpec(4, 4, rule=Nesterov(), retention=Decay(per_channel=True)), "do not fit"),
        (lambda: nl.memory.named("self_modifying", key_dim=4, rule=Nesterov()), "looks ahead"),
    ],
)
def test_what_they_cannot_do_is_refused_in_words(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
