"""Memories over exponential features: attention where the papers say so, finite features where the series ends, by hand else."""

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
    Exponential,
    Full,
    GatedMLP,
    Gates,
    Huber,
    KernelMemory,
    Matrix,
    MemorySpec,
    Omega,
    Polynomial,
)
from nestling.memory.protocol import Read
from nestling.native import without

from .cases import normal

D, T = 4, 17
PLAIN = Exponential(1.0, unit_peak=False)  # exp(q·k)


def data(seed: int, dim: int = D, time: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """q, k of unit norm and v, two lanes and heads."""
    q, k, v = normal(3, 2, 2, time, dim, seed=seed)
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def empty(theta: float = 0.0, dim: int = D) -> list[Tensor]:
    """Initial weights of a matrix memory that has learned nothing, and log s."""
    return [torch.zeros(2, dim, dim).double(), torch.full((2, 1, 1), theta, dtype=torch.float64)]


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_a_normalized_matrix_memory_is_softmax_attention(chunk: int, scale: float) -> None:
    """And the same without a norm of keys, where exponents are large."""
    q, k, v = data(0)
    spec = nl.memory.named("deep_transformer", key_dim=D, network=Matrix(), chunk=chunk)
    theta = float(torch.tensor(scale, dtype=torch.float64).log())
    for size, engine in ((1.0, "chunked"), (20.0, "chunked"), (20.0, "reference")):
        y, _ = spec.scan(empty(theta), q, size * k, v, engine=engine)
        close(y, F.scaled_dot_product_attention(q, size * k, v, is_causal=True, scale=scale))


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_an_unnormalized_matrix_memory_is_equation_26(chunk: int) -> None:
    """y_t = Σ_{i≤t} exp(q_t·k_i) v_i."""
    q, k, v = data(1)
    spec = nl.memory.named("deep_transformer", key_dim=D, network=Matrix(), normalized=False, kernel=PLAIN, chunk=chunk)
    close(spec.scan(empty(), q, k, v)[0], (q @ k.mT).exp().tril() @ v)


@pytest.mark.parametrize("span", [1, 3, 32])
@pytest.mark.parametrize("read", ["after", "before", "boundary"])
def test_a_spanned_matrix_memory_is_sliding_window_attention(span: int, read: str) -> None:
    q, k, v = data(2)
    spec = nl.memory.named("swdt", key_dim=D, network=Matrix(), span=span, chunk=4, read=read)
    y, _ = spec.scan(empty(), q, k, v)
    t = torch.arange(T)
    end = {"after": t, "before": t - 1, "boundary": t // 4 * 4 - 1}[read]  # the last token a read knows
    behind = end[:, None] - t
    mask = (behind >= 0) & (behind < span)
    some = mask.any(-1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~some[:, None], scale=1.0)
    close(y, torch.where(some[:, None], expected, 0.0))


def test_attention_answers_with_the_minimizer_of_its_weighted_error() -> None:
    """argmin_z Σ_i exp(s q·k_i)‖v_i − z‖², by a solver (Nadaraya–Watson; Atlas, eq. 17–18; Miras; Nested Learning, eq. 62)."""
    q, k, v = data(3)
    spans: tuple[int | None, ...] = (None, 5)
    for span in spans:
        spec = KernelMemory(D, D, network=Matrix(), span=span)
        y, _ = spec.scan(empty(0.5), q, k, v)
        first = 0 if span is None else T - span
        share = (torch.tensor(0.5).double().exp() * (q[0, 0, -1] @ k[0, 0, first:].T)).exp().sqrt()[:, None]
        close(torch.linalg.lstsq(share, share * v[0, 0, first:]).solution[0], y[0, 0, -1])


@pytest.mark.parametrize("c", [1, 3])
def test_dot_is_its_coefficients_by_hand(c: int) -> None:
    """c_i ← c_i − γ_i (Σ_j c_j κ(k_j, k_i) − v_i), all predictions before the step; α on all (Atlas, eq. 27 and 30–31)."""
    q, k, v = data(4)
    spec = nl.memory.named("dot", key_dim=D, network=Matrix(), kernel=PLAIN, bias=Omega(L2(), length=c), chunk=1)
    eta = 0.1 + 0.1 * torch.rand(2, 2, T, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha = 1 - 0.2 * torch.rand(2, 2, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gamma = torch.rand(2, 2, T, c, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gates = Gates(lr=eta, retention=alpha, window=gamma if c > 1 else None)
    gamma = gamma if c > 1 else torch.ones_like(gamma)
    y, _ = spec.scan(empty(), q, k, v, gates)
    for lane, head in ((0, 0), (1, 1)):
        keys, held = k[lane, head], torch.zeros(T, D).double()
        for t in range(T):
            window = range(max(0, t - c + 1), t + 1)
            errors = {i: (keys @ keys[i]).exp() @ held - v[lane, head, i] for i in window}
            held = alpha[lane, head, t] * held
            for i in window:
                held[i] = held[i] - eta[lane, head, t] * gamma[lane, head, t, t - i] * errors[i]
            close(y[lane, head, t], (keys @ q[lane, head, t]).exp() @ held)


@pytest.mark.parametrize("read", ["after", "before", "boundary"])
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("bias", [DotProduct(), L2(), Omega(L2(), length=3)], ids=str)
@pytest.mark.parametrize("network", ["matrix", "mlp"])
def test_it_is_a_memory_over_features_where_the_series_is_cut(network: str, bias: Bias, chunk: int, read: str) -> None:
    """Against finite features up to degree 12 in the primal, weights and all: what is left out is below 1e-9 for unit keys."""
    dim = 3
    q, k, v = data(5, dim, 11)
    deep = network == "mlp"
    kernel = KernelMemory(
        dim, dim, PLAIN, MLP() if deep else Matrix(), bias, Decay(), normalized=False, chunk=chunk, read=read
    )
    finite = MemorySpec(
        dim,
        dim,
        MLP(leading=True) if deep else Matrix(),
        bias,
        Decay(),
        chunk=chunk,
        read=read,
        features=Polynomial(12),
    )
    assert finite.width == 455
    w0 = [normal(2, *shape, seed=6) for shape in kernel.fast_shapes]
    lifted = [torch.cat([w0[0], w0[0].new_zeros(2, finite.width - dim, w0[0].shape[-1])], 1), *w0[1:]]
    *_, gates = finite.example(torch.Generator().manual_seed(0), time=11, dtype=torch.float64)
    gates = Gates(**{n: 0.2 * g if n == "lr" else g for n, g in gates.items()})
    y, state = kernel.scan([*w0, torch.zeros(2, 1, 1).double()], q, k, v, gates)
    z, primal = finite.scan([*lifted, torch.zeros(2, 1, 13).double()], q, k, v, gates)
    close(y, z, 1e-8)
    for a, b in zip(state.weights[1:], primal.weights[1:], strict=True):
        close(a, b, 1e-8)
    assert state.pairs is not None
    phi = finite.features.apply(state.pairs.key.transpose(1, 2), [torch.zeros(2, 1, 13).double()])
    share = gates.retention.prod(-1)[..., None, None]
    rebuilt = share * lifted[0] + (
        state.pairs.weight.transpose(1, 2)[..., None] * phi
    ).mT @ state.pairs.write.transpose(1, 2)
    close(rebuilt, primal.weights[0], 1e-8)


def test_dot_corrects_what_deep_transformer_adds_up() -> None:
    """One key again and again: the delta rule over φ* ends at the value, the Hebbian one grows (κ = 1 for a unit key itself)."""
    k, v = (
        F.normalize(normal(2, 2, 1, D, seed=7), dim=-1).expand(2, 2, 40, D),
        normal(2, 2, 1, D, seed=8).expand(2, 2, 40, D),
    )
    half = Gates(lr=torch.full((2, 2, 40), 0.5, dtype=torch.float64))
    dot = nl.memory.named("dot", key_dim=D, network=Matrix(), bias=L2(), chunk=1)
    y, _ = dot.scan([w.double() for w in dot.init(2)], k, k, v, half)
    close(y[:, :, -1], v[:, :, -1])
    hebbian = nl.memory.named("deep_transformer", key_dim=D, network=Matrix(), normalized=False)
    z, _ = hebbian.scan([w.double() for w in hebbian.init(2)], k, k, v, half)
    close(z[:, :, -1], 20 * v[:, :, -1])


def test_a_span_forgets_all_that_lies_before_it_and_dot_nothing() -> None:
    for name, reaches in (("swdt", False), ("dot", True), ("deep_transformer", True)):
        choices = {"span": 6} if name == "swdt" else {}
        spec = nl.memory.named(name, key_dim=D, chunk=4, **choices)
        q, k, v, gates = spec.example(torch.Generator().manual_seed(0), time=T, dtype=torch.float64)
        w0 = [w.double() for w in spec.init(2, torch.Generator().manual_seed(1))]
        y, _ = spec.scan(w0, q, k, v, gates)
        other = v.clone()
        other[:, :, T - 7] += 1
        z, _ = spec.scan(w0, q, k, other, gates)
        assert torch.equal(y[:, :, -1], z[:, :, -1]) != reaches
        assert not torch.equal(y[:, :, -2], z[:, :, -2])


def test_as_many_pairs_as_tokens_and_those_of_windows_across_borders() -> None:
    for name, chunk, per_chunk in (("deep_transformer", 4, 4), ("dot", 8, 8 + 7)):
        spec = nl.memory.named(name, key_dim=D, chunk=chunk)
        _, state = spec.scan(spec.init(2), *spec.example(torch.Generator().manual_seed(0), time=2 * chunk + 1))
        count = 2 * per_chunk + 1 + (per_chunk - chunk)
        assert state.pairs.key.shape == (2, count, 2, D)
        assert spec.count(2 * chunk + 1) == count


@pytest.mark.parametrize("name", ["deep_transformer", "dot"])
def test_pairs_that_overflow_go_back_to_the_chunks_start(name: str) -> None:
    """A retention of 1e30 a token overflows float32; the other lane never notices."""
    spec = nl.memory.named(name, key_dim=D, chunk=4, retention=Decay())
    w0 = spec.init(2, torch.Generator().manual_seed(0))
    q, k, v, _ = spec.example(torch.Generator().manual_seed(1), time=8)
    wild = torch.ones(2, 2, 8)
    wild[0, :, 4:] = 1e30
    gates = Gates(retention=wild, lr=torch.full((2, 2, 8), 0.1))
    _, half = spec.scan(w0, q[:, :, :4], k[:, :, :4], v[:, :, :4], gates[slice(0, 4)])
    for engine in ("chunked", "reference"):
        _, state = spec.scan(w0, q, k, v, gates, engine=engine)
        assert state.faults[0] > 0
        assert state.faults[1] == 0
        assert all(bool(torch.isfinite(x).all()) for x in nl.state.leaves(state) if x.is_floating_point())
        count = half.pairs.weight.shape[1]
        assert torch.equal(state.pairs.weight[0, :count], half.pairs.weight[0])
        assert not state.pairs.weight[0, count:].any()


@pytest.mark.parametrize("name", ["deep_transformer", "swdt", "dot"])
def test_reports_and_words(name: str) -> None:
    spec = nl.memory.named(name, key_dim=D, chunk=4)
    w0, example = spec.init(2), spec.example(torch.Generator().manual_seed(0), time=9)
    report = nl.Report()
    y, _ = spec.scan(w0, *example, report=report.scope("memory"))
    with without():  # a report is made on the framework's way
        assert torch.equal(y, spec.scan(w0, *example)[0])
    assert report["memory"]["surprise"].shape == report["memory"]["update"].shape == (2, 2, 9)
    assert "exponential" in spec.describe()["features"]


@pytest.mark.parametrize("name", ["deep_transformer", "swdt", "dot"])
def test_a_layer_declares_its_growth_and_splits(name: str) -> None:
    torch.manual_seed(0)
    layer = nl.layers.Memory(8, 2, nl.memory.named(name, key_dim=4, chunk=4)).double()
    x = torch.randn(3, 21, 8, dtype=torch.float64)
    valid = torch.ones(3, 21, dtype=torch.bool)
    valid[0, :5] = valid[2, 9:12] = False
    with torch.no_grad():
        whole, end = layer(x, valid=valid)
        state, parts = None, []
        for first, last in ((0, 6), (6, 7), (7, 21)):
            y, state = layer(x[:, first:last], state, valid=valid[:, first:last])
            parts.append(y)
    close(torch.cat(parts, 1)[valid], whole[valid])
    for a, b in zip(nl.state.leaves(state), nl.state.leaves(end), strict=True):
        close(a.double(), b.double())
    assert layer.growth == ("constant" if name == "swdt" else "linear")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Exponential(0.0), "scale is 0.0"),
        (lambda: MemorySpec(4, 4, features=Exponential()), "KernelMemory"),
        (lambda: KernelMemory(4, 4, network=GatedMLP()), "first layer is one"),
        (lambda: KernelMemory(4, 4, retention=Decay(per_channel=True)), "which scale pairs"),
        (lambda: KernelMemory(4, 4, bias=Huber()), "without a threshold"),
        (lambda: KernelMemory(4, 4, span=0), "span is 0"),
        (lambda: KernelMemory(4, 4, span=4, bias=Omega(L2())), "nothing before it is kept"),
        (lambda: KernelMemory(4, 4, read="later"), "read is 'later'"),
        (lambda: KernelMemory(4, 4, chunk=0), "chunk is 0"),
    ],
)
def test_impossible_choices_are_refused_in_words(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
    assert Full() == KernelMemory(4, 4).retention


@pytest.mark.parametrize("name", ["swdt", "dot"])
@pytest.mark.parametrize("read", ["after", "boundary"])
def test_a_chunk_has_the_effect_that_is_said(name: str, read: Read) -> None:
    """Read at the boundary, it has one also on a matrix with the dot product, and with a span."""
    own = {"network": Matrix(), "bias": DotProduct(), "read": read}
    made = [nl.memory.named(name, key_dim=D, chunk=chunk, **own) for chunk in (2, 5)]
    inputs = made[0].example(torch.Generator().manual_seed(0), time=11)
    few, many = (spec.scan(spec.init(2, torch.Generator().manual_seed(1)), *inputs)[0] for spec in made)
    has = not torch.allclose(few, many)
    assert has == (read == "boundary")
    for spec, chunk in zip(made, (2, 5), strict=True):
        assert spec.reads_chunk == has
        assert spec.update_period == (chunk if has else 1)
        assert spec.describe()["period"] == (f"{chunk} tokens" if has else "every token (chunk has no effect)")


def test_a_state_of_another_memory_is_refused_in_words() -> None:
    dot, other = (nl.memory.named(name, key_dim=D) for name in ("dot", "deep_transformer"))
    example = dot.example(torch.Generator().manual_seed(0), time=3)
    _, state = dot.scan(dot.init(2), *example)
    with pytest.raises(ValueError, match="another memory"):
        other.scan(other.init(2), *example[:3], None, state)
