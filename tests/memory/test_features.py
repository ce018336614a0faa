"""Feature maps against the kernels they stand for, in every engine; the systems built on them against their equations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestling as nl
from nestling.memory import (
    L2,
    MLP,
    Decay,
    DotProduct,
    Features,
    GatedMLP,
    Gates,
    Identity,
    Matrix,
    MemorySpec,
    Momentum,
    Muon,
    Network,
    Omega,
    Polynomial,
    Powers,
    Sketch,
    Unit,
)
from nestling.memory.norm import l2_norm

from .cases import in_pieces, normal

T = 19


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def features(phi: Features, x: Tensor, seed: int = 0) -> Tensor:
    """φ(x) of vectors `[n, dim]` with the initial parameters."""
    own = [w.double() for w in phi.init(x.shape[-1], 1, torch.Generator().manual_seed(seed))]
    return phi.apply(x[None], own)[0]


@pytest.mark.parametrize(("dim", "degree", "width"), [(4, 3, 35), (5, 2, 21), (3, 4, 35), (4, 1, 5), (1, 3, 4)])
def test_polynomial_kernel_for_any_coefficients(dim: int, degree: int, width: int) -> None:
    phi = Polynomial(degree)
    q, k = normal(2, 1, 7, dim)
    logs = normal(1, 1, degree + 1, seed=1)
    found = (phi.apply(q, [logs]) * phi.apply(k, [logs])).sum(-1)
    a = [float(logs[0, 0, i].exp()) / math.factorial(i) for i in range(degree + 1)]
    close(found, torch.stack([a[i] * (q * k).sum(-1) ** i for i in range(degree + 1)]).sum(0), 1e-14)
    assert phi.width(dim) == phi.apply(q, [logs]).shape[-1] == width == math.comb(dim + degree, degree)


def test_polynomials_begin_as_the_truncated_exponential() -> None:
    """Off by less than the first term left out times e^|q·k| (Atlas, eq. 5; Taylor)."""
    q, k = F.normalize(normal(2, 50, 3), dim=-1)
    product = (q * k).sum(-1)
    for degree in (2, 5, 8):
        found = (features(Polynomial(degree), q) * features(Polynomial(degree), k)).sum(-1)
        bound = product.abs() ** (degree + 1) / math.factorial(degree + 1) * product.abs().exp()
        assert ((found - product.exp()).abs() <= bound + 1e-14).all()


def test_reduced_keys_enter_products_alone() -> None:
    phi, q, k = Polynomial(3, reduce=2), *normal(2, 7, 6)
    logs, projection = (w.double() for w in phi.init(6, 1, torch.Generator().manual_seed(0)))
    close(projection[0].mT @ projection[0], 3 * torch.eye(2).double(), 1e-6)  # orthogonal, of scale √(6/2)
    found = (phi.apply(q[None], [logs, projection]) * phi.apply(k[None], [logs, projection])).sum(-1)[0]
    whole, part = (q * k).sum(-1), (q @ projection[0] * (k @ projection[0])).sum(-1)
    close(found, 1 + whole + part**2 / 2 + part**3 / 6)
    assert phi.width(6) == 6 + 1 + 3 + 4
    assert Polynomial(2, reduce=16).shapes(64) == ((1, 3), (64, 16))
    assert Polynomial(2, reduce=16).width(64) == 201
    assert Polynomial(2).width(64) == 2145
    close(features(Polynomial(2, reduce=6), q), features(Polynomial(2), q))  # nothing to reduce


def test_capacity_of_features() -> None:
    """As many pairs as features can be stored exactly, and no more (Atlas, prop. 1 and 2); cheap variants have fewer features."""
    dim = 4
    for phi, rank in ((Identity(), 4), (Powers(2), 8), (Polynomial(2), 15), (Polynomial(3), 35)):
        keys = features(phi, normal(rank + 3, dim))
        assert phi.width(dim) == rank == int(torch.linalg.matrix_rank(keys))
        values = normal(rank, 3, seed=1)
        close(keys[:rank] @ torch.linalg.lstsq(keys[:rank], values).solution, values, 1e-5)


@pytest.mark.parametrize(("dim", "degree"), [(2, 2), (3, 2), (2, 3)])
def test_no_matrix_of_features_holds_more_pairs_than_features(dim: int, degree: int) -> None:
    """C(d + p, p) pairs are stored exactly by some weights, one more by none, for targets in general (Atlas, prop. 2).

    Of the identity as target, the best weights leave one square over for each pair too many.
    """
    size = math.comb(dim + degree, degree)
    for pairs in (size, size + 1, size + 3):
        spec = MemorySpec(dim, pairs, Matrix(), L2(), features=Polynomial(degree))
        w0 = [w.double() for w in spec.init(1)]
        k = normal(1, 1, pairs, dim, seed=2)
        lifted = spec.features.apply(k, w0[1:])[0, 0]
        assert lifted.shape == (pairs, size)
        for target, over in ((torch.eye(pairs).double(), pairs - size), (normal(pairs, pairs, seed=3), None)):
            best = torch.linalg.pinv(lifted) @ target
            error = float((spec.recall(w0, [best[None, None]], k)[0, 0] - target).square().sum())
            if pairs == size:
                assert error < 1e-12
            elif over is None:
                assert error > 0.1
            else:
                assert error == pytest.approx(over, abs=1e-9)


def test_powers_are_the_entries_alone() -> None:
    q, k = normal(2, 7, 5)
    found = (features(Powers(3), q) * features(Powers(3), k)).sum(-1)
    close(found, sum((q * k) ** i for i in (1, 2, 3)).sum(-1))


@pytest.mark.parametrize("degree", [2, 3])
def test_sketches_have_the_polynomial_kernel_in_the_mean(degree: int) -> None:
    q, k = F.normalize(normal(2, 1, 4), dim=-1)
    size, draws = 64, 400
    found = torch.stack(
        [
            (features(Sketch(degree, size), q, seed) * features(Sketch(degree, size), k, seed)).sum()
            for seed in range(draws)
        ]
    )
    expected = (features(Polynomial(degree), q) * features(Polynomial(degree), k)).sum()
    assert abs(float(found.mean() - expected)) < 4 * float(found.std()) / math.sqrt(draws)
    assert float(found.std()) < 3 / math.sqrt(size)
    assert Sketch(degree, size).width(4) == features(Sketch(degree, size), q).shape[-1]


def test_unit_features_forget_the_norm() -> None:
    x = normal(7, 5)
    for inner in (Identity(), Polynomial(2), Powers(2)):
        close(features(Unit(inner), 3 * x), features(Unit(inner), x))
        close(features(Unit(inner), x), features(inner, l2_norm(x)))
        assert Unit(inner).width(5) == inner.width(5)


@pytest.mark.parametrize("phi", [Polynomial(2), Polynomial(3, reduce=2), Powers(3), Sketch(3, 6), Unit(Polynomial(2))])
@pytest.mark.parametrize(
    ("network", "rule"), [(MLP(leading=True), Muon()), (GatedMLP(leading=True), Momentum()), (Matrix(), Muon("token"))]
)
def test_every_engine_agrees_on_every_map_and_its_parameters(
    phi: Features, network: Network, rule: Momentum | Muon
) -> None:
    """Outputs, state and gradients, those of the map's own parameters too; whole, cut and one token at a time."""
    spec = MemorySpec(4, 4, network, Omega(L2(), length=3), Decay(), rule, chunk=5, features=phi)
    generator = torch.Generator().manual_seed(11)
    w0 = [w.double() for w in spec.init(2, generator)]
    own = len(w0) - network.depth
    w0 = [w if w.any() else normal(*w.shape, seed=3) for w in w0]
    q, k, v, gates = spec.example(generator, lanes=2, time=13, dtype=torch.float64)
    inputs = [*w0, q, k, v]
    for x in inputs:
        x.requires_grad_()
    reset, valid = torch.rand(2, 13, generator=generator) < 0.1, torch.rand(2, 13, generator=generator) < 0.8

    def run(bounds: list[int], engine: str = "chunked") -> list[Tensor]:
        y, state = in_pieces(spec, w0, (q, k, v, gates), bounds, reset=reset, valid=valid, engine=engine)
        assert len(state.weights) == network.depth
        found = [y, *state.weights, *state.momentum]
        total = sum((x * normal(*x.shape, seed=n)).sum() for n, x in enumerate(found))
        assert isinstance(total, Tensor)
        return [*found, *torch.autograd.grad(total, inputs)]

    expected = run([0, 13], "reference")
    assert all(g.any() for g in expected[-3 - own : -3]), "every parameter of the map has a gradient"
    for found in (run([0, 13]), run([0, 4, 13]), run(list(range(14)))):
        for a, b in zip(found, expected, strict=True):
            assert float((a - b).detach().abs().max()) <= 1e-8 * max(1.0, float(b.detach().abs().max()))


def test_features_of_half_precision_keys_are_made_in_float32() -> None:
    """At d = 64 and p = 3 products of entries are far below what float16 tells from 0 (C7)."""
    spec = MemorySpec(32, 4, Matrix(), DotProduct(), features=Polynomial(3))
    w0 = spec.init(1)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(0), lanes=1, heads=1, time=6)
    low = [x.half() for x in (q, k, v)]
    _, state = nl.memory.scan(spec, w0, *low, gates)
    _, same = nl.memory.scan(spec, w0, *(x.float() for x in low), gates)
    assert state.weights[0].dtype == torch.float32
    assert torch.equal(state.weights[0], same.weights[0])
    smallest = spec.features.apply(low[1].float(), w0[1:]).abs()
    assert float(smallest[smallest > 0].min()) < 6e-8


@pytest.mark.parametrize("network", [GatedMLP(), GatedMLP(activation="silu", norm=False), MLP(leading=True)])
def test_closed_form_gradients_of_networks_over_features(network: GatedMLP | MLP) -> None:
    """x_lᵀδ_l against autograd of the written loss; a leading residual adds the first value_dim inputs alone."""
    g = torch.Generator().manual_seed(0)
    width = 7 if network.leading else 4
    w = [torch.randn(1, *s, generator=g, dtype=torch.float64).requires_grad_() for s in network.shapes(width, 4)]
    k, v = normal(1, 3, width), normal(1, 3, 4, seed=1)
    prediction = network.apply(lambda layer, h: h @ w[layer], k)
    if network.leading:
        close(network.apply(lambda layer, h: 0 * (h @ w[layer]), k), k[..., :4])
    expected = torch.autograd.grad(L2().loss(prediction, v).sum(), w)
    trace = network.trace(w, k)
    close(trace.prediction, prediction)
    for x, product, weight in zip(trace.inputs, trace.products, w, strict=True):
        close(product, x @ weight)
    errors = network.errors(w, trace, L2().error(trace.prediction, v))
    for x, delta, gradient in zip(trace.inputs, errors, expected, strict=True):
        close(x.mT @ delta, gradient)


def linear_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v = normal(3, 1, 1, T, 4)
    alpha, eta = torch.rand(2, 1, 1, T, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return q, k, v, 0.8 + 0.2 * alpha, eta


def test_swla_writes_every_token_c_times() -> None:
    """W_T = Σ min(c, T − i + 1) k_iᵀv_i with γ = α = η = 1 (Atlas, eq. 20; derived)."""
    q, k, v, *_ = linear_inputs()
    spec = nl.memory.named("swla", key_dim=4, features=Identity(), bias=Omega(DotProduct(), length=3))
    _, state = nl.memory.scan(spec, [torch.zeros(1, 4, 4).double()], q, k, v)
    times = torch.tensor([min(3, T - i) for i in range(T)]).double()
    close(state.weights[0][0, 0], torch.einsum("t,ta,tb->ab", times, k[0, 0], v[0, 0]))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_swla_is_its_printed_recurrence_for_any_chunk(chunk: int) -> None:
    """W ← αW + η Σ γ_i φ(k_i)ᵀv_i (Atlas, eq. 20), with polynomial features."""
    q, k, v, alpha, eta = linear_inputs()
    gamma = torch.rand(1, 1, T, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    spec = nl.memory.named("swla", key_dim=4, chunk=chunk)
    w0 = [w.double() for w in spec.init(1)]
    phi_q, phi_k = (spec.features.apply(x, w0[1:])[0, 0] for x in (q, k))
    w, out = w0[0][0], []
    for t in range(T):
        w = alpha[0, 0, t] * w
        for lag in range(min(8, t + 1)):
            w = w + eta[0, 0, t] * gamma[0, 0, t, lag] * torch.outer(phi_k[t - lag], v[0, 0, t - lag])
        out.append(phi_q[t] @ w)
    y, _ = nl.memory.scan(spec, w0, q, k, v, Gates(lr=eta, retention=alpha, window=gamma))
    close(y[0, 0], torch.stack(out))


def test_the_linear_family_without_features_or_window_is_retnet() -> None:
    """Window 1 and φ = id, or a_1 as the only coefficient: (gated) linear attention (Atlas, eq. 20 and 26)."""
    q, k, v, alpha, eta = linear_inputs()
    gates, zero = Gates(lr=eta, retention=alpha), torch.zeros(1, 4, 4).double()
    expected, _ = nl.memory.scan(nl.memory.named("retnet", key_dim=4), [zero], q, k, v, gates)
    plain = nl.memory.named("dla", key_dim=4, features=Identity(), network=Matrix())
    close(nl.memory.scan(plain, [zero], q, k, v, gates)[0], expected)
    window = nl.memory.named("swla", key_dim=4, features=Identity(), bias=Omega(DotProduct(), length=1))
    close(nl.memory.scan(window, [zero], q, k, v, gates)[0], expected)
    only = nl.memory.named("dla", key_dim=4, features=Polynomial(2), network=Matrix())
    w0 = [w.double() for w in only.init(1)]
    w0[1] = torch.tensor([-torch.inf, 0, -torch.inf]).double().expand(1, 1, 3)
    close(nl.memory.scan(only, w0, q, k, v, gates)[0], expected)
    w0[1] = torch.zeros(1, 1, 3).double()
    assert (nl.memory.scan(only, w0, q, k, v, gates)[0] - expected).abs().max() > 1e-2


def test_atlas_plus_is_atlas_with_a_gated_network() -> None:
    atlas, plus = (nl.memory.named(name, key_dim=8) for name in ("atlas", "atlas_plus"))
    for choice in ("features", "bias", "retention", "rule", "chunk", "read"):
        assert getattr(atlas, choice) == getattr(plus, choice)
    gate = nl.memory.named("atlas", key_dim=8, network=GatedMLP(leading=True))
    inputs = plus.example(torch.Generator().manual_seed(0))
    w0 = plus.init(2, torch.Generator().manual_seed(1))
    assert torch.equal(nl.memory.scan(gate, w0, *inputs)[0], nl.memory.scan(plus, w0, *inputs)[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Polynomial(0), "degree is 0"),
        (lambda: Polynomial(2, reduce=0), "reduce is 0"),
        (lambda: Powers(0), "degree is 0"),
        (lambda: Sketch(1), "degree is 1"),
        (lambda: Sketch(2, 0), "size is 0"),
        (lambda: MemorySpec(4, 4, MLP(), features=Polynomial()), "leading"),
        (lambda: MemorySpec(4, 6, MLP(leading=True), features=Polynomial()), "value_dim"),
        (lambda: GatedMLP(activation="tanh"), "silu"),
    ],
)
def test_impossible_settings_are_refused_in_words(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
