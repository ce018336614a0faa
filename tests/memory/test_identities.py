"""More identities that the specs of Titans, Miras and Atlas state, beside those of `test_equivalences` and `test_classics`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestling as nl
from nestling.memory import (
    L2,
    MLP,
    Bias,
    Decay,
    DotProduct,
    Gates,
    Gradient,
    Identity,
    Lp,
    Matrix,
    MemorySpec,
    Momentum,
    Omega,
    Retention,
    Softmax,
)
from nestling.memory.networks.base import at

D, T = 4, 13


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(seed: int, time: int = T) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, unit-norm k, v, a retention and a step size; one lane and head."""
    q, k, v = (normal(seed + n, 1, 1, time, D) for n in range(3))
    alpha, eta = (normal(seed + 3 + n, 1, 1, time).sigmoid() for n in range(2))
    return q, F.normalize(k, dim=-1), v, 0.7 + 0.3 * alpha, 0.1 + 0.5 * eta


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def titans(**choices: object) -> MemorySpec:
    return nl.memory.named("titans", key_dim=D, **{"network": Matrix(), "chunk": 1, **choices})


def test_titans_without_momentum_is_a_decay_and_an_erasing_write() -> None:
    """W((1 − α)I − θkkᵀ) + θvkᵀ: the scalar form of RWKV-7's row (Titans, appendix C; Atlas, Table 1)."""
    q, k, v, alpha, eta = data(0)
    w0, gates = [normal(9, 1, D, D)], Gates(lr=eta, retention=alpha)
    comba = nl.memory.named("comba_like", key_dim=D)
    close(titans().scan(w0, q, k, v, gates)[0], comba.scan(w0, q, k, v, gates)[0])


def test_titans_with_a_damped_step_is_longhorn() -> None:
    """θ_t = θ/(1 + θ k·k) (Titans, eq. 35), for keys of any norm."""
    q, k, v, _, eta = data(1)
    k, w0 = 2 * k, [normal(9, 1, D, D)]
    damped = eta / (1 + eta * k.square().sum(-1))
    longhorn = nl.memory.named("longhorn", key_dim=D)
    close(titans().scan(w0, q, k, v, Gates(lr=damped))[0], longhorn.scan(w0, q, k, v, Gates(lr=eta))[0])


def test_a_cold_start_still_measures_against_what_it_forgets() -> None:
    """All let go at once: Titans keeps θ kᵀ(v − kW), Gated DeltaNet β kᵀv (Miras, footnote 2)."""
    q, k, v, _, eta = (x[:, :, :1] for x in data(2))
    w0 = normal(9, 1, D, D)
    gates = Gates(lr=eta, retention=torch.zeros_like(eta))
    for name, target in (("titans", v[0, 0, 0] - k[0, 0, 0] @ w0[0]), ("gated_deltanet", v[0, 0, 0])):
        spec = titans() if name == "titans" else nl.memory.named(name, key_dim=D)
        _, state = spec.scan([w0], q, k, v, gates)
        close(state.weights[0][0, 0], eta[0, 0, 0] * torch.outer(k[0, 0, 0], target))


@pytest.mark.parametrize("network", [Matrix(), MLP()], ids=["matrix", "mlp"])
def test_without_steps_there_is_pure_decay(network: Matrix | MLP) -> None:
    q, k, v, alpha, eta = data(3)
    spec = titans(network=network, chunk=4)
    w0 = [normal(9 + n, 1, *shape) for n, shape in enumerate(spec.shapes)]
    _, state = spec.scan(w0, q, k, v, Gates(lr=torch.zeros_like(eta), retention=alpha, momentum=eta))
    for w, start in zip(state.weights, w0, strict=True):
        close(w[0], alpha.prod() * start)


def test_momentum_near_1_keeps_moving_after_the_loss_is_0() -> None:
    """η → 1, no decay: W goes on by S though nothing is left to learn. With θ = 1 token 1 is stored exactly."""
    key, value = torch.eye(D).double()[:1], normal(4, 1, D)
    k, v = key.expand(1, 1, 3, D), value.expand(1, 1, 3, D)
    mu = torch.ones(1, 1, 3).double()
    lr = torch.tensor([[[1.0, 0.0, 0.0]]]).double()
    y, state = titans().scan([torch.zeros(1, D, D).double()], k, k, v, Gates(lr=lr, momentum=mu))
    for t in range(3):
        close(y[0, 0, t], (t + 1) * value[0])
    close(state.momentum[0][0, 0], torch.outer(key[0], value[0]))


def test_chunks_differ_from_the_recurrence_by_the_step() -> None:
    """The anchored update is off by O(bθ) of itself: a tenth of the step is a tenth of the gap."""
    q, k, v, *_ = data(5, time=8)
    w0, gaps = [normal(9, 1, D, D)], []
    for step in (1e-1, 1e-2, 1e-3):
        lr = torch.full((1, 1, 8), step, dtype=torch.float64)
        ends = [titans(chunk=b).scan(w0, q, k, v, Gates(lr=lr))[1].weights[0] - w0[0] for b in (1, 8)]
        gaps.append(float((ends[1] - ends[0]).norm() / ends[0].norm()))
    assert gaps[0] > gaps[1] > gaps[2]
    assert 7 < gaps[0] / gaps[1] < 13
    assert 9 < gaps[1] / gaps[2] < 11


@pytest.mark.parametrize("network", [Matrix(), MLP(), MLP(depth=3), MLP(depth=3, norm=False)], ids=str)
def test_the_chunk_form_carries_any_momentum(network: Matrix | MLP) -> None:
    """From a state with S_0 ≠ 0 in the middle of nothing, against a loop with anchored gradients; a short last chunk."""
    q, k, v, alpha, eta = data(6)
    spec = titans(network=network, chunk=5)
    w0 = [0.5 * normal(9 + n, 1, *shape) for n, shape in enumerate(spec.shapes)]
    s = [0.1 * normal(19 + n, *shape) for n, shape in enumerate(spec.shapes)]
    state = spec.start(w0, 1)._replace(momentum=tuple(x[None, None] for x in s))
    y, _ = spec.scan(w0, q, k, v, Gates(lr=0.2 * eta, momentum=0.9 * alpha, retention=alpha), state)
    w = anchor = [x[0] for x in w0]
    for t in range(T):
        leaves = [x.detach().requires_grad_() for x in anchor]
        loss = 0.5 * (network.apply(at(leaves), k[0, 0, t : t + 1]) - v[0, 0, t]).square().sum()
        found = torch.autograd.grad(loss, leaves)
        s = [0.9 * alpha[0, 0, t] * a - 0.2 * eta[0, 0, t] * g for a, g in zip(s, found, strict=True)]
        w = [alpha[0, 0, t] * a + b for a, b in zip(w, s, strict=True)]
        close(y[0, 0, t], network.apply(at(w), q[0, 0, t : t + 1])[0])
        anchor = w if (t + 1) % 5 == 0 else anchor


@pytest.mark.parametrize("name", ["titans", "gated_deltanet", "omeganet", "memora", "deep_transformer", "dot"])
def test_outer_gradients_are_numerical_ones(name: str) -> None:
    """Through q, k, v, every gate and the initial weights, over a chunk's border. (A layer norm of 2 numbers has no slope.)"""
    spec = nl.memory.named(
        name, key_dim=3, chunk=3, **({"bias": Omega(L2(), length=2)} if name in ("omeganet", "dot") else {})
    )
    w0 = [0.5 * normal(3 + n, 1, *shape) for n, shape in enumerate(spec.shapes)]
    q, k, v, gates = spec.example(torch.Generator().manual_seed(0), lanes=1, heads=1, time=5, dtype=torch.float64)
    names = [n for n, _ in gates.items()]
    inputs = [x.detach().requires_grad_() for x in (q, k, v, *(g for _, g in gates.items()), *w0)]

    def outputs(*x: Tensor) -> Tensor:
        made = Gates(**dict(zip(names, x[3:], strict=False)))
        return spec.scan(x[3 + len(names) :], *x[:3], made)[0]

    assert torch.autograd.gradcheck(outputs, inputs, eps=1e-6, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize(("bias", "factor"), [(L2(), 1.0), (Lp(2.0, slope=None), 2.0)], ids=["½", "without ½"])
def test_omega_of_one_token_is_deltanet(bias: Bias, factor: float) -> None:
    """c = 1, γ = 1, φ = id, linear, α = 1: β = η with the ½ in the loss, β = 2η without (Atlas, §3.2)."""
    q, k, v, _, eta = data(7)
    w0 = [normal(9, 1, D, D)]
    choices = {"features": Identity(), "network": Matrix(), "bias": Omega(bias, length=1)}
    omega = nl.memory.named("omeganet", key_dim=D, chunk=1, **choices)
    close(
        omega.scan(w0, q, k, v, Gates(lr=eta))[0],
        nl.memory.named("deltanet", key_dim=D).scan(w0, q, k, v, Gates(lr=factor * eta))[0],
    )


def test_several_delta_steps_a_token_are_deltaproduct() -> None:
    """α Π(I − β_i kᵢkᵢᵀ) and its writes: n tokens of which the first alone decays (Miras, Table 1)."""
    steps, tokens = 3, 5
    q, k, v, alpha, eta = data(8, steps * tokens)
    first = torch.arange(steps * tokens) % steps == 0
    gates = Gates(lr=eta, retention=torch.where(first, alpha, 1.0))
    w = normal(9, 1, D, D)
    y, _ = nl.memory.named("gated_deltanet", key_dim=D, chunk=7).scan([w], q, k, v, gates)
    held, unit = w[0], torch.eye(D).double()
    for token in range(tokens):
        held = alpha[0, 0, token * steps] * held
        for n in range(token * steps, (token + 1) * steps):
            key, beta = k[0, 0, n], eta[0, 0, n]
            held = (unit - beta * torch.outer(key, key)) @ held + beta * torch.outer(key, v[0, 0, n])
        close(y[0, 0, (token + 1) * steps - 1], q[0, 0, (token + 1) * steps - 1] @ held)


def test_hgrn2_is_channel_decay_that_writes_what_it_lets_go() -> None:
    """M = Diag(α)M + v(1 − α)ᵀ (Miras, Table 1): GLA with the key 1 − α. Dot-product bias: a table row names L1 for it."""
    q, _, v, *_ = data(9)
    alpha = normal(5, 1, 1, T, D).sigmoid()
    w = normal(9, 1, D, D)
    y, _ = nl.memory.named("gla", key_dim=D).scan([w], q, 1 - alpha, v, Gates(retention=alpha))
    held = w[0]
    for t in range(T):
        held = torch.diag(alpha[0, 0, t]) @ held + torch.outer(1 - alpha[0, 0, t], v[0, 0, t])
        close(y[0, 0, t], q[0, 0, t] @ held)


def test_data_dependent_forgetting_along_both_sides_is_gla_of_rescaled_values() -> None:
    """M = (βαᵀ) ∘ M + vkᵀ (DFW; Miras, Table 1): GLA's channels are the key's, and the value's own decays go onto the values."""
    q, k, v, *_ = data(12)
    alpha, beta = (0.5 + 0.5 * normal(n, 1, 1, T, D).sigmoid() for n in (5, 6))
    w = normal(9, 1, D, D)
    total = beta.cumprod(2)
    y, _ = nl.memory.named("gla", key_dim=D).scan([w], q, k, v / total, Gates(retention=alpha))
    held = w[0].T
    for t in range(T):
        held = torch.outer(beta[0, 0, t], alpha[0, 0, t]) * held + torch.outer(v[0, 0, t], k[0, 0, t])
        close(total[0, 0, t] * y[0, 0, t], held @ q[0, 0, t])


def test_erasing_before_a_channel_decay_as_printed_is_a_step_that_erases_and_one_that_writes() -> None:
    """M = diag(α)(I − βkkᵀ)M + βvkᵀ (RWKV-7 in Miras, Table 1): rwkv7_like, two steps a token."""
    q, k, v, _, beta = data(13)
    alpha = 0.5 + 0.5 * normal(5, 1, 1, T, D).sigmoid()
    w = normal(9, 1, D, D)

    def twice(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 2)

    erases = torch.arange(2 * T) % 2 == 0
    gates = Gates(
        lr=torch.where(erases, 0.0, twice(beta)),
        delta=torch.where(erases, twice(beta), 0.0),
        retention=torch.where(erases[:, None], 1.0, twice(alpha)),
    )
    y, _ = nl.memory.named("rwkv7_like", key_dim=D).scan([w], twice(q), twice(k), twice(v), gates)
    held, unit = w[0], torch.eye(D).double()
    for t in range(T):
        key, b = k[0, 0, t], beta[0, 0, t]
        held = alpha[0, 0, t].diag() @ (unit - b * torch.outer(key, key)) @ held + b * torch.outer(key, v[0, 0, t])
        close(y[0, 0, 2 * t + 1], q[0, 0, t] @ held)


def test_titans_with_the_dot_product_is_linear_attention_retnet_and_at_any_chunk() -> None:
    """No momentum; a constant decay, and one of each token (Titans, §6; the rows of Mamba-2 and GLA in their scalar form)."""
    q, k, v, alpha, _ = data(14)
    w0 = [normal(9, 1, D, D)]
    for chunk in (1, 5):
        hebbian = titans(bias=DotProduct(), chunk=chunk)
        close(hebbian.scan(w0, q, k, v)[0], nl.memory.named("linear_attention", key_dim=D).scan(w0, q, k, v)[0])
        for gate in (torch.full_like(alpha, 0.9), alpha):
            given = Gates(retention=gate)
            close(hebbian.scan(w0, q, k, v, given)[0], nl.memory.named("retnet", key_dim=D).scan(w0, q, k, v, given)[0])


@pytest.mark.parametrize("engine", ["chunked", "reference"])
def test_bregman_of_half_a_square_is_gradient_descent(engine: str) -> None:
    """F = τ²/2, whose mirror map is the identity: read through a link, the dual is the weights (Miras, §5.2)."""

    class Square(Retention):
        def link(self, dual: Tensor) -> Tensor:
            return 1.0 * dual

    assert not Square().linear
    q, k, v, alpha, eta = data(15)
    gates = Gates(lr=eta, retention=alpha, momentum=0.5 * alpha)
    for network in (Matrix(), MLP()):
        runs = []
        for retention in (Square(), Decay()):
            spec = MemorySpec(D, D, network, L2(), retention, Momentum(), chunk=4)
            w0 = [normal(9 + n, 1, *shape) for n, shape in enumerate(spec.shapes)]
            runs.append(spec.scan(w0, q, k, v, gates, engine=engine)[0])
        close(*runs)


def test_the_kl_step_is_stationary_and_its_ends_are_what_they_should_be() -> None:
    """⟨g, W⟩ + (1/η)Σ W log(W/W') + (1/a)Σ W log W on the simplex, λ and η' as derived (Miras, eq. 19–21)."""
    step, entropy = 0.6, 1.7
    share = (1 / entropy) / (1 / entropy + 1 / step)
    rate = 1 / (1 / entropy + 1 / step)
    spec = MemorySpec(D, D, Matrix(), L2(), Softmax(), Gradient(), chunk=1)
    logits = normal(3, 1, D, D)
    _, k, v, *_ = (x[:, :, :1] for x in data(10))
    before = logits[0].softmax(0)

    def after(kept: float, lr: float) -> Tensor:
        own = {"lr": lr, "retention": kept}
        gates = Gates(**{n: torch.full((1, 1, 1), x, dtype=torch.float64) for n, x in own.items()})
        return spec.retention.link(spec.scan([logits], k, k, v, gates)[1].weights[0])[0, 0]

    w = after(1 - share, rate)
    g = torch.outer(k[0, 0, 0], k[0, 0, 0] @ before - v[0, 0, 0])
    slope = g + ((w / before).log() + 1) / step + (w.log() + 1) / entropy
    torch.testing.assert_close(slope, slope[:1].expand_as(slope), rtol=1e-6, atol=1e-6)
    assert bool((w > 0).all())
    close(w.sum(0), torch.ones(D).double())
    close(after(0.0, 0.0), torch.full((D, D), 1 / D).double())  # λ → 1, η' → 0: the uniform slice
    close(after(1.0, 0.0), before)  # λ → 0, no gradient


def test_a_gradient_with_momentum_of_0_is_plain() -> None:
    q, k, v, alpha, eta = data(11)
    w0 = [normal(9, 1, D, D)]
    plain, moving = (MemorySpec(D, D, Matrix(), L2(), Decay(), rule, chunk=3) for rule in (Gradient(), Momentum()))
    gates = Gates(lr=eta, retention=alpha)
    close(plain.scan(w0, q, k, v, gates)[0], moving.scan(w0, q, k, v, gates)[0])
