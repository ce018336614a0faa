"""Retentions that map the weights at the end of chunks: Miras, eq. 18 and 22, against searches and loops from the equations."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling import testing
from nestling.memory import (
    L2,
    MLP,
    Decay,
    Divergence,
    ElasticStep,
    Gates,
    Matrix,
    MemorySpec,
    Momentum,
    Settled,
    Softmax,
    SoftmaxLag,
)
from nestling.memory.retentions import ElasticNet

from .cases import in_pieces, variants

KINDS = ["kl", "hellinger", "softplus"]
EVERY = [r for r in variants("retentions") if isinstance(r, Settled)]
RETENTIONS = [replace(r, threshold=0.05) if isinstance(r, ElasticStep) else r for r in EVERY]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def simplex(seed: int, *shape: int) -> Tensor:
    return normal(seed, *shape).softmax(-2)


@pytest.mark.parametrize("retention", RETENTIONS, ids=str)
def test_maps_have_the_derivatives_that_autograd_takes(retention: Settled) -> None:
    """Also through the multiplier that is searched for."""
    anchor = simplex(0, 2, 4, 3).requires_grad_()
    weights = (anchor.detach() + 0.3 * normal(1, 2, 4, 3)).requires_grad_()
    assert torch.autograd.gradcheck(retention.settle, (weights, anchor), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("f", KINDS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_the_multiplier_keeps_slices_on_the_simplex_for_steps_of_any_size(f: str, size: float) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        anchor = simplex(2, 3, 6, 5).to(dtype)
        w = Divergence(f).settle(anchor + (size * normal(3, 3, 6, 5)).to(dtype), anchor)
        assert bool((w >= 0).all())
        assert float((w.sum(-2) - 1).abs().max()) < tolerance


@pytest.mark.parametrize("f", ["kl", "hellinger"])
def test_a_step_is_the_minimum_of_its_objective(f: str) -> None:
    """The gradient of ⟨g, W⟩ + Σ W' f(W/W') is one number per slice there (the multiplier), and no feasible point is lower."""
    before, g = simplex(4, 6, 5), normal(5, 6, 5)
    after = Divergence(f).settle(before - g, before).requires_grad_()

    def objective(w: Tensor) -> Tensor:
        ratio = w / before
        value = ratio * ratio.log() if f == "kl" else (ratio.sqrt() - 1).square()
        return (g * w).sum() + (before * value).sum()

    (slope,) = torch.autograd.grad(objective(after), after)
    torch.testing.assert_close(slope, slope[:1].expand_as(slope), rtol=1e-8, atol=1e-8)
    least = objective(after.detach())
    for seed, share in itertools.product(range(50), (1e-3, 0.1)):
        other = (1 - share) * after.detach() + share * simplex(100 + seed, 6, 5)
        assert objective(other) > least


def test_kl_divergence_is_softmax_without_a_decay() -> None:
    """W ∘ exp(−ζ − ηg) = Softmax(log W − ηg) at chunk 1; not a step of zero, which changes nothing."""
    q, k, v, gates = MemorySpec(4, 4, Matrix(), L2()).example(
        torch.Generator().manual_seed(0), time=12, dtype=torch.float64
    )
    z = normal(6, 2, 4, 4)
    chosen = Gates(lr=gates.lr)
    a, _ = MemorySpec(4, 4, Matrix(), L2(), Divergence("kl"), chunk=1).scan([z.softmax(-2)], q, k, v, chosen)
    b, _ = MemorySpec(4, 4, Matrix(), L2(), Softmax(), chunk=1).scan([z], q, k, v, chosen)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    w = simplex(7, 5, 4)
    for f in KINDS:
        torch.testing.assert_close(Divergence(f).settle(w, w), w)


@pytest.mark.parametrize("f", KINDS)
@pytest.mark.parametrize("chunk", [1, 4])
def test_the_recurrence_multiplies_at_the_end_of_chunks(f: str, chunk: int) -> None:
    """Eq. 18 token by token at chunk 1; in longer ones steps at the anchor add up and are taken at once."""
    spec = MemorySpec(4, 4, Matrix(), L2(), Divergence(f), chunk=chunk)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(1), lanes=1, heads=1, time=11, dtype=torch.float64)
    w = anchor = simplex(8, 4, 4)
    y, _ = spec.scan([w[None]], q, k, v, gates)
    g = {"kl": torch.exp, "hellinger": lambda u: (1 - u) ** -2, "softplus": torch.nn.functional.softplus}[f]
    for t in range(11):
        key = k[0, 0, t]
        w = w - gates.lr[0, 0, t] * torch.outer(key, key @ anchor - v[0, 0, t])
        if (t + 1) % chunk == 0:
            columns = []
            for step, base in zip((w - anchor).T, anchor.T, strict=True):  # each slice by its own search
                low, high = step.min() - 1, step.max() + 1
                if f == "hellinger":
                    low = step.max() - 1 + 1e-9
                for _ in range(100):
                    middle = (low + high) / 2
                    low, high = (middle, high) if (base * g(step - middle)).sum() > 1 else (low, middle)
                columns.append(base * g(step - low))
            w = anchor = torch.stack(columns, 1)
        torch.testing.assert_close(y[0, 0, t], q[0, 0, t] @ w, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("chunk", [1, 4])
def test_an_elastic_step_is_equation_22(chunk: int) -> None:
    spec = MemorySpec(4, 4, Matrix(), L2(), ElasticStep(0.1), chunk=chunk)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(2), lanes=1, heads=1, time=11, dtype=torch.float64)
    w = anchor = normal(9, 4, 4)
    y, state = spec.scan([w[None]], q, k, v, gates)
    for t in range(11):
        key = k[0, 0, t]
        w = gates.retention[0, 0, t] * w - gates.lr[0, 0, t] * torch.outer(key, key @ anchor - v[0, 0, t])
        if (t + 1) % chunk == 0:
            w = anchor = w.sign() * (w.abs() - 0.1).clamp_min(0)
        torch.testing.assert_close(y[0, 0, t], q[0, 0, t] @ w, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.weights[0][0, 0], w)


def test_an_elastic_step_minimizes_its_objective_and_its_limits_are_gradient_steps() -> None:
    """η⟨g, W⟩ + ½‖W − W'‖² + (η/2β)‖W‖² + (η/α)‖W‖₁ is least at S_γ(λW' − ζg) with the paper's λ, ζ and γ (Miras, §5.2)."""
    before, g, eta, alpha, beta = normal(10, 5, 4), normal(11, 5, 4), 0.3, 0.8, 2.0
    share = beta / (beta + eta)
    gamma = eta * beta / (alpha * (eta + beta))
    linear = share * before - eta * share * g
    w = ElasticStep(gamma).settle(linear, before)

    def objective(w: Tensor) -> float:
        near = 0.5 * (w - before).square().sum() + eta / (2 * beta) * w.square().sum()
        return float(eta * (g * w).sum() + near + eta / alpha * w.abs().sum())

    assert 0 < int((w == 0).sum()) < w.numel()
    for seed, size in itertools.product(range(100), (1e-3, 0.1, 1.0)):
        assert objective(w + size * normal(200 + seed, 5, 4)) > objective(w)
    torch.testing.assert_close(ElasticStep(1e-12).settle(linear, before), linear)  # α → ∞: no threshold


def test_what_an_elastic_step_cuts_is_gone_and_what_the_leader_cuts_comes_back() -> None:
    """The same ten small writes to one place: each is cut in eq. 22, their sum passes the threshold in eq. 23."""
    k = torch.eye(4)[:1].expand(1, 1, 10, 4)
    small, values = torch.full((1, 1, 10), 0.1), torch.ones(1, 1, 10, 4)
    for retention, read in ((ElasticStep(0.5), 0.0), (ElasticNet(0.5), 0.5)):
        spec = MemorySpec(4, 4, Matrix(), nl.memory.DotProduct(), retention, chunk=1)
        y, _ = spec.scan(spec.init(1), k, k, values, Gates(lr=small))
        torch.testing.assert_close(y[0, 0, -1], torch.full((4,), read))


def lagging(chunk: int, network: nl.memory.Network | None = None, **choices: object) -> MemorySpec:
    return MemorySpec(4, 4, network or Matrix(), L2(), SoftmaxLag(), chunk=chunk, **choices)


@pytest.mark.parametrize("engine", ["reference", "chunked"])
@pytest.mark.parametrize("read", ["after", "before", "boundary"])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_lag_token_then_a_chunk_in_the_weights_is_equation_30_to_32(chunk: int, read: str, engine: str) -> None:
    """By hand; steps are so long that weights turn negative inside a chunk and the floor is met behind it."""
    spec = lagging(chunk, read=read)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(1), lanes=1, heads=1, time=23, dtype=torch.float64)
    lr, alpha = gates.lr[0, 0], gates.retention[0, 0]
    w = anchor = simplex(8, 4, 4)
    y, state = spec.scan([w[None]], q, k, v, gates, engine=engine)
    lowest, sums = 1.0, list[float]()
    for t in range(23):
        key, value = k[0, 0, t], v[0, 0, t]
        before, stood = w, anchor
        gradient = torch.outer(key, key @ anchor - value)
        if t % chunk == 0:
            w = anchor = (alpha[t] * anchor.log() - lr[t] * gradient).softmax(0)
            assert torch.allclose(w.sum(0), torch.ones(4, dtype=torch.float64))
        else:
            w = alpha[t] * w - lr[t] * gradient
            sums.append(float(w.sum(0).max()))
        lowest = min(lowest, float(w.min()))
        if (t + 1) % chunk == 0:
            w = w.clamp_min(0.01 / 4)
            w = anchor = w / w.sum(0)
        served = {"after": w, "before": before, "boundary": stood}[read]
        torch.testing.assert_close(y[0, 0, t], q[0, 0, t] @ served, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.weights[0][0, 0], w, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.anchor[0][0, 0], anchor, rtol=1e-10, atol=1e-10)
    assert (lowest < 0) == (chunk > 1)
    assert chunk == 1 or max(abs(total - 1) for total in sums) > 0.1


def test_in_chunks_of_one_token_the_lag_is_softmax_retention() -> None:
    """Eq. 27 at every token, in weights and in logits: short steps, whose weights stay above the floor."""
    spec = lagging(1)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(0), time=12, dtype=torch.float64)
    gates = replace(gates, lr=0.2 * gates.lr)
    z = 0.3 * normal(6, 2, 4, 4)
    a, state = spec.scan([z.softmax(-2)], q, k, v, gates)
    b, same = MemorySpec(4, 4, Matrix(), L2(), Softmax(), chunk=1).scan([z], q, k, v, gates)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.weights[0], same.weights[0].softmax(-2), rtol=1e-10, atol=1e-10)
    assert state.weights[0].min() > 0.01 / 4
    longer, _ = lagging(4).scan([z.softmax(-2)], q, k, v, gates)
    assert (longer - a).abs().max() > 1e-3


def test_a_floored_weight_comes_back_and_a_lag_token_that_is_refused_changes_nothing() -> None:
    retention, linear = SoftmaxLag(0.04), torch.tensor([[1.0], [-3.0], [0.5], [0.0]]).double()
    start = retention.settle(linear, linear)
    torch.testing.assert_close(start, torch.tensor([[1.0], [0.01], [0.5], [0.01]]).double() / 1.52)
    one, none = torch.ones(1, 1).double(), torch.zeros(4, 1).double()
    torch.testing.assert_close(retention.first(none, start, one), start, rtol=0, atol=1e-15)
    up = torch.tensor([[0.0], [6.0], [0.0], [0.0]]).double()
    assert float(retention.first(up, start, one)[1, 0]) > 0.5
    spec = lagging(4)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(3), time=5, dtype=torch.float64)
    w0 = [w.double() for w in spec.init(2, torch.Generator().manual_seed(0))]
    assert float(w0[0].min()) > 0
    k[:, :, 0] = torch.nan
    for engine in ("reference", "chunked"):
        _, state = spec.scan(w0, q[:, :, :1], k[:, :, :1], v[:, :, :1], gates[:1], engine=engine)
        torch.testing.assert_close(state.weights[0][0], w0[0], rtol=0, atol=1e-15)
        assert state.faults.tolist() == [1, 1]
        assert state.position.tolist() == [1, 1]


@pytest.mark.parametrize("network", [Matrix(), MLP()], ids=str)
def test_a_lag_token_keeps_every_contract(network: nl.memory.Network) -> None:
    testing.check(lagging(5, network))
    testing.check(lagging(5, network, rule=Momentum()))


def test_a_decode_step_with_a_lag_token_compiles() -> None:
    spec = lagging(3)
    w0 = spec.init(2)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(3), time=8)
    step = torch.compile(
        lambda q, k, v, gates, state: spec.scan(w0, q, k, v, Gates(**gates), state), fullgraph=True, backend="eager"
    )
    compiled = eager = nl.state.clone(spec.start(w0, 2))
    for t in range(8):
        part = [x[:, :, t : t + 1] for x in (q, k, v)]
        now = {name: gate.clone() for name, gate in gates[t : t + 1].items()}
        y, compiled = step(*part, now, compiled)
        z, eager = spec.scan(w0, *part, Gates(**now), eager)
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("retention", RETENTIONS, ids=str)
@pytest.mark.parametrize("read", ["after", "before"])
def test_every_engine_and_every_cut_agree(retention: Settled, read: str) -> None:
    """Chunked, reference and one token at a time; a deep memory with momentum, resets, invalid tokens, gradients of all."""
    spec = MemorySpec(4, 4, MLP(), L2(), retention, Momentum(), chunk=4, read=read)
    w0 = [w.double().requires_grad_() for w in spec.init(2, torch.Generator().manual_seed(0))]
    q, k, v, gates = spec.example(torch.Generator().manual_seed(1), time=14, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, *(g for _, g in gates.items()))]
    reset, valid = torch.zeros(2, 14, dtype=torch.bool), torch.ones(2, 14, dtype=torch.bool)
    reset[1, 6], valid[0, 3] = True, False
    runs = []
    for cuts, engine in (([0, 14], "reference"), ([0, 14], "chunked"), (list(range(15)), "chunked")):
        y, state = in_pieces(spec, w0, (q, k, v, gates), cuts, reset=reset, valid=valid, engine=engine)
        total = y.square().sum() + sum(w.square().sum() for w in (*state.weights, *state.momentum))
        gradients = torch.autograd.grad(total, (*w0, *inputs), allow_unused=True)
        runs.append((y, *state.weights, *state.momentum, *(torch.zeros(()) if g is None else g for g in gradients)))
    for fast in runs[1:]:
        for a, b in zip(fast, runs[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ElasticStep(0.0), "threshold is 0.0"),
        (lambda: Divergence("chi"), "Divergence.f is 'chi'"),
        (lambda: SoftmaxLag(0.0), "floor is 0.0"),
        (lambda: MemorySpec(4, 4, retention=SoftmaxLag(), rule=nl.memory.Muon()), "maps the weights"),
        (lambda: MemorySpec(4, 4, retention=Divergence(), rule=nl.memory.Muon()), "maps the weights"),
        (lambda: nl.memory.SelfModifying(4, 4, retention=ElasticStep()), "does not fit"),
    ],
)
def test_impossible_choices_are_refused_in_words(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
    assert Decay().linear
