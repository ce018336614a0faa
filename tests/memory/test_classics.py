"""Rows of Miras' Table 1 that decay by channel or step implicitly, each against a loop written from its equation."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling.memory import (
    L2,
    MLP,
    Decay,
    DeltaGradient,
    Full,
    Gates,
    Gradient,
    Implicit,
    Matrix,
    MemorySpec,
    Momentum,
    Omega,
)

from .cases import in_pieces

D, T = 4, 23


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(
    name: str, gates: dict[str, Tensor], seed: int = 0, **options: object
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """One lane and head: outputs, initial weights and q, k, v `[time, dim]`; keys not of unit norm."""
    q, k, v, w = normal(seed, T, D), normal(seed + 1, T, D), normal(seed + 2, T, D), normal(seed + 3, D, D)
    spec = nl.memory.named(name, key_dim=D, **options)
    given = Gates(**{n: g[None, None] for n, g in gates.items()})
    y, _ = spec.scan([w[None]], q[None, None], k[None, None], v[None, None], given)
    return y[0, 0], w, (q, k, v)


def rates(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """η, β, a scalar α and a channel α."""
    eta, beta, alpha = (normal(seed + n, T).sigmoid() for n in range(3))
    return 0.3 * eta, 0.2 * beta, alpha, normal(seed + 3, T, D).sigmoid()


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_rows_of_the_table_are_their_equations_at_every_chunk(chunk: int) -> None:
    eta, beta, alpha, channel = rates(10)

    def outer(k: Tensor, v: Tensor) -> Tensor:
        return torch.outer(k, v)

    rows = {
        "mamba2_like": (
            {"lr": eta, "retention": alpha},
            lambda w, k, v, t: alpha[t] * w + eta[t] * outer(k, v),
        ),
        "gla": ({"retention": channel}, lambda w, k, v, t: torch.diag(channel[t]) @ w + outer(k, v)),
        "longhorn": (
            {"lr": eta},
            lambda w, k, v, t: w - eta[t] / (1 + eta[t] * k @ k) * outer(k, k @ w - v),
        ),
        "rwkv7_like": (
            {"lr": eta, "delta": beta, "retention": channel},
            lambda w, k, v, t: torch.diag(channel[t]) @ w - beta[t] * outer(k, k) @ w + eta[t] * outer(k, v),
        ),
        "comba_like": (
            {"lr": eta, "delta": beta, "retention": alpha},
            lambda w, k, v, t: alpha[t] * w - beta[t] * outer(k, k) @ w + eta[t] * outer(k, v),
        ),
    }
    for name, (gates, update) in rows.items():
        y, w, (q, k, v) = run(name, gates, chunk=chunk)
        for t in range(T):
            w = update(w, k[t], v[t], t)
            torch.testing.assert_close(y[t], q[t] @ w, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_longhorn_minimizes_what_its_equation_says() -> None:
    """W_t is the stationary point of ½‖kW − v‖² + ‖W − W_{t−1}‖²/2η, for a step as long as one likes."""
    k, v, w = normal(0, 1, 1, 1, D), normal(1, 1, 1, 1, D), normal(2, 1, D, D)
    spec = nl.memory.named("longhorn", key_dim=D)
    for eta in (0.1, 3.0, 1e6):
        _, state = spec.scan([w], k, k, v, Gates(lr=torch.full((1, 1, 1), eta, dtype=torch.float64)))
        after = state.weights[0][0].requires_grad_()
        loss = 0.5 * (k[0, 0] @ after[0] - v[0, 0]).square().sum() + (after - w).square().sum() / (2 * eta)
        (slope,) = torch.autograd.grad(loss, after)
        assert float(slope.abs().max()) < 1e-9
        assert float((after - w).detach().abs().max()) > 1e-2


def test_an_implicit_step_stays_bounded_where_an_explicit_one_does_not() -> None:
    eta = torch.full((T,), 4.0, dtype=torch.float64)
    implicit, *_ = run("longhorn", {"lr": eta})
    explicit, *_ = run("deltanet", {"lr": eta})
    assert float(implicit.abs().max()) < 100
    assert float(explicit.abs().max()) > 1e6


@pytest.mark.parametrize(("channels", "scalar"), [("gla", "retnet"), ("rwkv7_like", "comba_like")])
def test_channels_that_all_keep_the_same_are_the_scalar_decay(channels: str, scalar: str) -> None:
    eta, _, alpha, channel = rates(20)
    one, *_ = run(channels, {"lr": eta, "retention": alpha[:, None].expand(T, D).contiguous()})
    other, *_ = run(scalar, {"lr": eta, "retention": alpha})
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    apart, *_ = run(channels, {"lr": eta, "retention": channel})
    assert float((apart - other).abs().max()) > 1e-3


def test_gates_that_say_nothing_leave_linear_attention() -> None:
    plain, *_ = run("linear_attention", {})
    for name in ("gla", "mamba2_like"):
        torch.testing.assert_close(run(name, {})[0], plain)
    ones = torch.ones(T, D, dtype=torch.float64)
    torch.testing.assert_close(run("gla", {"retention": ones})[0], plain)


@pytest.mark.parametrize("name", ["mamba2_like", "gla", "rwkv7_like", "comba_like"])
def test_a_baseline_whose_paper_is_no_source_of_ours_says_so(name: str) -> None:
    assert re.match(r"Like [\w-]+: our source is not its paper\.", nl.memory.describe(name)["notes"])


def test_channel_decays_neither_overflow_nor_vanish() -> None:
    """Channels that forget by e^{-60} a token beside ones that keep all: 1/γ would overflow within a tile, in float32."""
    spec = nl.memory.named("gla", key_dim=D)
    q, k, v = (normal(n, 1, 1, 64, D).float() for n in range(3))
    log = torch.tensor([-60.0, -1e-4, 0.0, -3.0]).expand(1, 1, 64, D)
    w0 = [normal(3, 1, D, D).float()]
    y, state = spec.scan(w0, q, k, v, Gates(log_retention=log))
    z, _ = spec.scan(
        [w.double() for w in w0],
        q.double(),
        k.double(),
        v.double(),
        Gates(log_retention=log.double()),
        engine="reference",
    )
    assert state.faults.tolist() == [0]
    torch.testing.assert_close(y.double(), z, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(
        spec.scan(w0, q.requires_grad_(), k.requires_grad_(), v, Gates(log_retention=log))[0].square().sum(), (q, k)
    )
    assert all(bool(torch.isfinite(g).all()) for g in grads)


@pytest.mark.parametrize(
    ("bias", "rule", "network"),
    [
        (L2(), Momentum(), Matrix()),
        (L2(), Gradient(), MLP(depth=1)),
        (Omega(L2(), length=3), Momentum(), Matrix()),
        (Omega(L2(), length=3), Gradient(), Matrix()),
        (L2(), DeltaGradient("after_decay", with_momentum=True), Matrix()),
        (L2(), DeltaGradient("with_decay"), MLP(depth=1)),
        (nl.memory.DotProduct(), DeltaGradient("after_decay"), Matrix()),
        (nl.memory.DotProduct(), Implicit(), Matrix()),
    ],
    ids=str,
)
@pytest.mark.parametrize("read", ["after", "before"])
def test_channel_decay_with_every_rule(bias: nl.memory.Bias, rule: nl.memory.Rule, network: Matrix, read: str) -> None:
    """Mixtures nobody named: the engine is the reference in outputs, state and gradients; and so is one token at a time."""
    spec = MemorySpec(D, D, network, bias, Decay(per_channel=True), rule, chunk=5, read=read)
    w0 = [normal(5, 2, *s).requires_grad_() for s in spec.shapes]
    q, k, v, gates = spec.example(torch.Generator().manual_seed(6), time=T, dtype=torch.float64)
    assert gates.retention is not None
    gates.retention[0, 1, 9, 2] = 0.0
    inputs = [x.requires_grad_() for x in (q, k, v, *(g for _, g in gates.items()))]
    reset, valid = torch.zeros(2, T, dtype=torch.bool), torch.ones(2, T, dtype=torch.bool)
    reset[1, 8], valid[0, 3] = True, False
    runs = []
    for engine, cuts in (("reference", [0, T]), ("chunked", [0, T]), ("chunked", range(T + 1))):
        y, state = in_pieces(spec, w0, (q, k, v, gates), cuts, reset=reset, valid=valid, engine=engine)
        total = y.square().sum() + sum(w.square().sum() for w in (*state.weights, *state.momentum))
        gradients = torch.autograd.grad(total, (*w0, *inputs), allow_unused=True)
        runs.append((y, *state.weights, *state.momentum, *gradients))
    for fast in runs[1:]:
        for a, b in zip(fast, runs[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", [n for n in nl.memory.names() if n != "self_modifying"])  # which makes its own
def test_a_memory_layer_gives_every_system_its_gates(name: str) -> None:
    """Each gate that the system reads, of the right shape, moved by the layer's own parameters."""
    torch.manual_seed(0)
    short = {"global_chunk": 4} if name == "tnt" else {}
    layer = nl.layers.Memory(dim=8, heads=2, spec=nl.memory.named(name, key_dim=4, chunk=4, **short))
    x = torch.randn(2, 9, 8)
    y, state = layer(x)
    assert torch.isfinite(y).all()
    assert state.memory.faults.tolist() == [0, 0]
    assert layer.gates is not None
    (grad,) = torch.autograd.grad(y.square().sum(), layer.gates.weight)
    assert bool((grad.view(2, -1, 8).abs().amax((0, 2)) > 0).all())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MemorySpec(4, 4, MLP(), retention=Decay(per_channel=True)), "one layer"),
        (lambda: MemorySpec(4, 4, retention=Decay(per_channel=True), rule=nl.memory.Muon()), "one layer"),
        (lambda: nl.memory.SelfModifying(4, 4, retention=Decay(per_channel=True)), "does not fit"),
        (lambda: nl.memory.SelfModifying(4, 4, bias=nl.memory.Huber()), "does not fit"),
        (lambda: nl.memory.SelfModifying(4, 4, rule=Implicit()), "linear in its gates"),
        (
            lambda: MemorySpec(4, 4, Matrix(), L2(), rule=Implicit(), chunk=1),
            r"L2\(\).*choose DotProduct\(\) and Matrix",
        ),
        (lambda: nl.memory.named("longhorn", key_dim=4, bias=nl.memory.Lp(3)), r"Lp\(.*choose DotProduct"),
        (lambda: nl.memory.named("longhorn", key_dim=4, bias=Omega(L2())), r"Omega\(.*choose DotProduct"),
        (
            lambda: nl.memory.named("longhorn", key_dim=4, bias=Omega(nl.memory.DotProduct())),
            r"Omega\(.*choose DotProduct",
        ),
        (lambda: nl.memory.named("longhorn", key_dim=4, network=MLP()), r"MLP\(.*choose DotProduct\(\) and Matrix"),
    ],
)
def test_mixtures_that_cannot_be_are_refused_in_words(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_a_report_of_channel_decay_is_the_channels_average() -> None:
    spec = nl.memory.named("gla", key_dim=D)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(0), time=5)
    report = nl.Report()
    spec.scan(spec.init(2), q, k, v, gates, report=report.scope("memory"))
    assert gates.retention is not None
    torch.testing.assert_close(report["memory"]["retention"], gates.retention.mean(-1))


def test_a_scalar_gate_where_channels_are_wanted_is_refused() -> None:
    spec = nl.memory.named("gla", key_dim=D)
    q, k, v, _ = spec.example(torch.Generator().manual_seed(0), time=5)
    with pytest.raises(ValueError, match=r"retention has shape .* channel\]"):
        spec.scan(spec.init(2), q, k, v, Gates(retention=torch.ones(2, 2, 5)))
    assert isinstance(nl.memory.named("longhorn").retention, Full)
