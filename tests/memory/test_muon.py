"""Muon as a memory's optimizer: its identities (Atlas, eq. 32–33, 39–41 and 57–58), and its two granularities in every engine."""

from __future__ import annotations

from dataclasses import dataclass

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
    Matrix,
    MemorySpec,
    Momentum,
    Muon,
    Omega,
    Softmax,
    newton_schulz,
)

from .cases import gate_between, in_pieces, normal, one_lane

D, T = 5, 19
PER = pytest.mark.parametrize("per", ["chunk", "token"])


def data(seed: int, time: int = T) -> tuple[Tensor, Tensor, Tensor]:
    return one_lane(seed, D, time)


def gate(low: float, high: float, seed: int) -> Tensor:
    return gate_between(low, high, seed, T)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@dataclass(frozen=True)
class Undirected(Muon):
    """Muon with its map taken out."""

    def direction(self, s: Tensor) -> Tensor:
        return s


@pytest.mark.parametrize("engine", ["chunked", "reference"])
@pytest.mark.parametrize("read", ["after", "before", "boundary"])
def test_without_its_map_the_rule_is_omega_with_momentum(engine: str, read: str) -> None:
    """For a constant step size, which may stand inside or outside the sum."""
    bias, c = Omega(L2(), length=3), 3
    q, k, v = data(0)
    gates = Gates(
        lr=torch.full((1, 1, T), 0.1).double(),
        momentum=gate(0.2, 0.8, 1),
        retention=gate(0.8, 1, 2),
        window=torch.rand(1, 1, T, c, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
    )
    runs = []
    for rule in (Momentum(), Undirected("token")):
        spec = MemorySpec(D, D, MLP(), bias, Decay(), rule, chunk=4, read=read)
        w0 = [w.double() for w in spec.init(1, torch.Generator().manual_seed(4))]
        runs.append(nl.memory.scan(spec, w0, q, k, v, gates, engine=engine))
    close(runs[0][0], runs[1][0])
    close(runs[0][1].weights[0], runs[1][1].weights[0])


@PER
@pytest.mark.parametrize("chunk", [1, 4])
def test_it_is_the_printed_recurrence(per: str, chunk: int) -> None:
    """A loop over eq. 33 and 32 with a linear memory, gradients at the anchor; per chunk the map acts at borders alone."""
    q, k, v = data(5)
    eta, mu, alpha = gate(0.05, 0.3, 1), gate(0.2, 0.9, 2), gate(0.8, 1, 3)
    spec = MemorySpec(D, D, Matrix(), L2(), Decay(), Muon(per), chunk=chunk)
    w0 = normal(1, D, D, seed=7)
    anchor, s, out = w0[0], torch.zeros(D, D).double(), []
    w = w0[0]
    for t in range(T):
        key, value = k[0, 0, t], v[0, 0, t]
        s = mu[0, 0, t] * s + torch.outer(key, key @ anchor - value)
        w = alpha[0, 0, t] * w
        border = (t + 1) % chunk == 0
        if border or per == "token":
            w = w - eta[0, 0, t] * newton_schulz(s)
        out.append(q[0, 0, t] @ w)
        anchor = w if border else anchor
    y, state = nl.memory.scan(spec, [w0], q, k, v, Gates(lr=eta, momentum=mu, retention=alpha))
    close(y[0, 0], torch.stack(out))
    close(state.momentum[0][0, 0], -s)


def test_both_granularities_are_one_at_chunk_1_and_differ_beyond() -> None:
    q, k, v = data(6)
    gates = Gates(lr=gate(0.05, 0.3, 1), momentum=gate(0.2, 0.9, 2), retention=gate(0.8, 1, 3))
    for chunk in (1, 4):
        runs = []
        for per in ("chunk", "token"):
            spec = MemorySpec(D, D, MLP(), L2(), Decay(), Muon(per), chunk=chunk)
            w0 = [w.double() for w in spec.init(1, torch.Generator().manual_seed(4))]
            runs.append(nl.memory.scan(spec, w0, q, k, v, gates)[0])
        if chunk == 1:
            close(*runs)
        else:
            assert (runs[0] - runs[1]).abs().max() > 1e-3


def test_of_one_token_without_momentum_it_is_the_normalized_delta_rule() -> None:
    """S = φᵀe is of rank one, so that the converged map leaves φ̂ᵀê: only the direction of an error counts."""
    q, k, v = data(8)
    k, eta, alpha = 3 * k, gate(0.05, 0.3, 1), gate(0.8, 1, 3)
    spec = MemorySpec(D, D, Matrix(), L2(), Decay(), Muon("token", steps=30, iteration="cubic"), chunk=1)
    w0 = normal(1, D, D, seed=7)
    w, out = w0[0], []
    for t in range(T):
        key, error = k[0, 0, t], k[0, 0, t] @ w - v[0, 0, t]
        w = alpha[0, 0, t] * w - eta[0, 0, t] * torch.outer(key / key.norm(), error / error.norm())
        out.append(q[0, 0, t] @ w)
    close(nl.memory.scan(spec, [w0], q, k, v, Gates(lr=eta, retention=alpha))[0][0, 0], torch.stack(out))


@PER
def test_a_common_factor_of_the_window_has_no_effect_and_the_step_size_has(per: str) -> None:
    bias = Omega(L2(), length=3)
    spec = MemorySpec(D, D, MLP(), bias, Decay(), Muon(per), chunk=4)
    w0 = [w.double() for w in spec.init(1, torch.Generator().manual_seed(4))]
    q, k, v = data(9)
    window = torch.rand(1, 1, T, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    lr = gate(0.05, 0.3, 1)

    def run(window: Tensor, lr: Tensor) -> Tensor:
        return nl.memory.scan(spec, w0, q, k, v, Gates(lr=lr, window=window, momentum=0.5 * torch.ones_like(lr)))[0]

    close(run(window, lr), run(1e-3 * window, lr))
    assert (run(window, lr) - run(window, 2 * lr)).abs().max() > 1e-3


@PER
@pytest.mark.parametrize("network", [Matrix(init_scale=1.0), MLP(), MLP(depth=3, norm=False)])
def test_a_small_step_lowers_the_windowed_loss(per: str, network: Matrix | MLP) -> None:
    """Guards the sign, which the paper prints in two ways."""
    c, time = 4, 4
    spec = MemorySpec(D, D, network, Omega(L2(), length=c), Full(), Muon(per), chunk=4)
    w0 = [w.double() for w in spec.init(1, torch.Generator().manual_seed(4))]
    q, k, v = data(10, time)
    lr = torch.zeros(1, 1, time).double()
    lr[..., -1] = 1e-3
    _, state = nl.memory.scan(spec, w0, q, k, v, Gates(lr=lr))

    def loss(weights: tuple[Tensor, ...]) -> float:
        prediction = network.apply(lambda layer, h: h @ weights[layer], k)
        return float(L2().loss(prediction, v).sum())

    assert loss(state.weights) < loss(tuple(w[None] for w in w0)) - 1e-6


@PER
@pytest.mark.parametrize("read", ["after", "before", "boundary"])
@pytest.mark.parametrize(
    ("network", "bias"),
    [(MLP(), L2()), (Matrix(), DotProduct()), (MLP(depth=3, norm=False), Omega(L2(), length=3))],
)
def test_every_engine_and_every_cut_agree(per: str, read: str, network: Matrix | MLP, bias: Bias) -> None:
    """Chunked, reference and one token at a time; with resets, invalid and faulty tokens and lanes out of step."""
    spec = MemorySpec(4, 4, network, bias, Decay(), Muon(per), chunk=5, read=read)
    generator = torch.Generator().manual_seed(11)
    w0 = [normal(2, *shape, seed=3) for shape in spec.shapes]
    q, k, v, gates = spec.example(generator, lanes=3, time=23, dtype=torch.float64)
    v[2, 0, 9] = float("nan")
    assert gates.retention is not None
    gates.retention[0, 0, 8] = 0.0
    reset, valid = torch.rand(3, 23, generator=generator) < 0.1, torch.rand(3, 23, generator=generator) < 0.8
    valid[2, 9] = True
    inputs = [*w0, q, k, v, *(g for _, g in gates.items())]
    for x in inputs:
        x.requires_grad_()

    def run(bounds: list[int], **options: object) -> list[Tensor]:
        y, state = in_pieces(spec, w0, (q, k, v, gates), bounds, reset=reset, valid=valid, **options)
        found = [y, *state.weights, *state.momentum]
        total = sum((x * normal(*x.shape, seed=n)).sum() for n, x in enumerate(found))
        assert isinstance(total, Tensor)
        gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        return [
            *found,
            state.faults,
            *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)),
        ]

    expected = run([0, 23], engine="reference")
    assert expected[len(w0) * 2 + 1].sum() >= 1
    for found in (
        run([0, 23]),
        run([0, 23], tile=2),
        run([0, 7, 23]),
        run(list(range(24))),
    ):
        for a, b in zip(found, expected, strict=True):
            scale = max(1.0, float(b.detach().abs().max()))
            assert float((a - b).detach().abs().max()) <= 1e-8 * scale


@pytest.mark.parametrize("per", [2, "chunk", "token"])
def test_a_token_changes_no_output_before_it(per: int | str) -> None:
    """To the last bit, wherever it stands in its stride and chunk; and every token is heard of later."""
    time = 8
    spec = MemorySpec(D, D, MLP(), Omega(L2(), length=3), Decay(), Muon(per), chunk=4)
    w0 = [w.double() for w in spec.init(1, torch.Generator().manual_seed(4))]
    q, k, v = data(12, time)
    gates = Gates(lr=torch.full((1, 1, time), 0.1).double(), momentum=torch.full((1, 1, time), 0.5).double())

    def run() -> Tensor:
        return nl.memory.scan(spec, w0, q, k, v, gates)[0]

    expected, (_, other_k, other_v) = run(), data(13, time)
    for t in range(time):
        own = [x[:, :, t].clone() for x in (q, k, v)]
        q[:, :, t], k[:, :, t], v[:, :, t] = own[0] + 1, other_k[:, :, t], other_v[:, :, t]
        y = run()
        assert torch.equal(y[:, :, :t], expected[:, :, :t]), t
        q[:, :, t] = own[0]
        assert (run()[:, :, t:] - expected[:, :, t:]).abs().max() > 1e-3, t
        k[:, :, t], v[:, :, t] = own[1:]


def test_what_it_cannot_do_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="dual variable"):
        MemorySpec(4, 4, MLP(), retention=Softmax(), rule=Muon())
    with pytest.raises(ValueError, match="per is 'layer'"):
        Muon("layer")
    with pytest.raises(ValueError, match="steps is -1"):
        Muon(steps=-1)
    with pytest.raises(ValueError, match="quintic"):
        Muon(iteration="quartic")
    with pytest.raises(ValueError, match="Muon"):
        nl.memory.named("self_modifying", key_dim=4, rule=Muon())
