"""Numerical pitfalls that the specs list: half precision, long decays, saturated logits, kinks, large exponents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling.memory import L2, MLP, Bias, Decay, Exponential, Gates, Huber, Lp, Matrix, MemorySpec, Robust


def assert_finite(state: object, *more: Tensor) -> None:
    for x in (*nl.state.leaves(state), *more):
        assert bool(torch.isfinite(x.double()).all())


@pytest.mark.parametrize("p", [3.0, 4.0])
def test_errors_whose_power_overflows_half_precision_are_taken_in_float32(p: float) -> None:
    """|e| = 300 at p = 3 is 9e4 > 65504, and ε = 1e-6 is subnormal in float16. Inputs are half, also under autocast."""
    spec = nl.memory.named("moneta", key_dim=4, network=Matrix(init_scale=1.0), bias=Lp(p))
    w0 = spec.init(1, torch.Generator().manual_seed(0))
    q, k, v, _ = (x for x in spec.example(torch.Generator().manual_seed(1), lanes=1, heads=1, time=8))
    small = Gates(lr=torch.full((1, 1, 8), 1e-7))
    low = [x.half() for x in (q, k, 300 * v.sign())]
    expected, same = spec.scan(w0, *(x.float() for x in low), small)
    for mode in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=mode):
            y, state = spec.scan(w0, *low, small)
        assert_finite(state, y)
        assert state.faults.tolist() == [0]
        assert torch.equal(y, expected.half())
        assert torch.equal(state.weights[0], same.weights[0])
    assert not torch.isfinite(low[2][0, 0, 0].abs() ** (p - 1)).all(), "half precision itself cannot"


def recalled(cap: float | None, scale: float) -> float:
    """The share of 32 random values, four times stored at η = 0.002, that is nearest to what their keys read."""
    g = torch.Generator().manual_seed(0)
    spec = nl.memory.named("moneta", key_dim=32, chunk=1, bias=Lp(3.0, cap=cap))
    k = torch.nn.functional.normalize(torch.randn(1, 1, 32, 32, generator=g), dim=-1)
    v = scale * torch.randn(1, 1, 32, 32, generator=g)
    often = [x.repeat(1, 1, 4, 1) for x in (k, k, v)]
    step, kept = torch.full((1, 1, 128), 0.002), torch.full((1, 1, 128), 0.9997)
    _, state = spec.scan(spec.init(1, g), *often, Gates(lr=step, retention=kept))
    y, _ = spec.scan(spec.init(1, g), k, k, v, Gates(lr=torch.zeros(1, 1, 32), retention=torch.ones(1, 1, 32)), state)
    near = torch.cosine_similarity(y[0, 0, :, None], v[0, 0], dim=-1).argmax(-1)
    return float((near == torch.arange(32)).float().mean())


def test_steps_that_grow_with_the_square_of_an_error_are_held_by_a_cap() -> None:
    """Values of three and ten times the unit scale cannot be answered (the norm stands before the answer), so that every step is
    long, and wipes out what was there."""
    for scale in (3.0, 10.0):
        assert recalled(None, scale) < 0.6
        assert recalled(2.0, scale) > 0.8
    assert recalled(2.0, 1.0) > 0.9


@pytest.mark.parametrize("name", ["retnet", "gated_deltanet", "titans"])
@pytest.mark.parametrize("share", [0.1, 1e-30])
def test_products_of_decays_neither_vanish_nor_divide(name: str, share: float) -> None:
    """0.1^64 is 0 in float32, and β_t/β_s then 0/0: products are differences of logs. Values and gradients, against float64."""
    choices = {"network": Matrix()} if name == "titans" else {}
    spec = nl.memory.named(name, key_dim=4, **choices)
    q, k, v, _ = spec.example(torch.Generator().manual_seed(0), lanes=1, heads=1, time=64)
    runs = []
    for dtype in (torch.float32, torch.float64):
        retention = torch.full((1, 1, 64), share, dtype=dtype).requires_grad_()
        lr = torch.full((1, 1, 64), 0.5, dtype=dtype)
        w0 = torch.ones(1, 4, 4, dtype=dtype).requires_grad_()
        y, state = spec.scan([w0], *(x.to(dtype) for x in (q, k, v)), Gates(lr=lr, retention=retention))
        runs.append((y.detach(), *torch.autograd.grad(y.square().sum(), (w0, retention))))
        assert_finite(nl.state.detach(state), *runs[-1])
    for low, exact in zip(*runs, strict=True):
        torch.testing.assert_close(low.double(), exact, rtol=1e-4, atol=1e-4)


def test_logits_of_memora_saturate_and_come_back() -> None:
    """Steps of a thousand put a softmax at exactly 0 and 1 in float32, whose log is −∞; the logits are what is carried."""
    spec = nl.memory.named("memora", key_dim=4, network=Matrix(), bias=nl.memory.DotProduct())
    k = torch.eye(4)[:1].expand(1, 1, 2, 4)
    v = torch.tensor([1.0, -1.0])[None, None, :, None].expand(1, 1, 2, 4)
    w0 = spec.init(1)
    y, state = spec.scan(w0, k, k, v, Gates(lr=torch.full((1, 1, 2), 1e3)))
    assert y[0, 0, 0].tolist() == [1.0] * 4
    assert spec.retention.link(state.weights[0]).log().isfinite().all()
    torch.testing.assert_close(y[0, 0, 1], torch.full((4,), 0.25))
    assert_finite(state, y)
    deep = nl.memory.named("memora", key_dim=4, chunk=4)
    example = deep.example(torch.Generator().manual_seed(0), time=40)
    y, state = deep.scan(
        deep.init(2, torch.Generator().manual_seed(1)), *example[:3], Gates(lr=torch.full((2, 2, 40), 1e4))
    )
    assert_finite(state, y)
    for w in state.weights:
        torch.testing.assert_close(deep.retention.link(w).sum(-2), torch.ones_like(w[..., 0, :]))


@pytest.mark.parametrize("engine", ["chunked", "reference"])
@pytest.mark.parametrize(
    "bias",
    [Huber("norm"), Huber("mixture"), Robust(), *(Lp(p, slope=a) for p in (1.0, 1.5, 3.0) for a in (10.0, None))],
    ids=repr,
)
def test_an_error_of_0_has_finite_slopes(bias: Bias, engine: str) -> None:
    """e/‖e‖ and |e|^{p−1} where the prediction is the value already; also one order on, for the outer loop."""
    spec = MemorySpec(4, 4, Matrix(), bias, Decay(), chunk=2)
    w0 = torch.zeros(1, 4, 4).requires_grad_()
    k = torch.eye(4)[None, None].clone().requires_grad_()
    v = torch.zeros(1, 1, 4, 4).requires_grad_()
    y, state = spec.scan([w0], k, k, v, Gates(lr=torch.full((1, 1, 4), 0.1)), engine=engine)
    gradients = torch.autograd.grad(y.sum() + y.square().sum(), (w0, k, v), allow_unused=True)
    assert_finite(nl.state.detach(state), y.detach(), *(g for g in gradients if g is not None))
    assert state.faults.tolist() == [0]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("name", ["deep_transformer", "swdt", "dot"])
def test_exponents_of_any_size_stay_finite(name: str, normalized: bool) -> None:
    """Keys of norm 100: exp(10 000) is no number. Normalized, the largest divides out; else the exponent has a cap."""
    spec = nl.memory.named(name, key_dim=4, normalized=normalized, kernel=Exponential(1.0, unit_peak=False), chunk=4)
    w0 = spec.init(2, torch.Generator().manual_seed(0))
    q, k, v, gates = spec.example(torch.Generator().manual_seed(1), time=12)
    y, state = spec.scan(w0, 100 * q, 100 * k, v, gates)
    assert_finite(state, y)


def test_half_precision_in_a_layer_under_either_autocast() -> None:
    """A layer of half weights: fast weights, momentum and features in float32 (C7), outputs finite."""
    for name in ("moneta", "memora", "atlas", "dot"):
        for dtype in (torch.float16, torch.bfloat16):
            torch.manual_seed(0)
            layer = nl.layers.Memory(8, 2, nl.memory.named(name, key_dim=4, chunk=4)).to(dtype)
            with torch.autocast("cpu", dtype=dtype):
                y, state = layer(torch.randn(2, 20, 8))
            assert y.dtype == dtype
            assert all(x.dtype == torch.float32 for x in nl.state.leaves(state.memory) if x.is_floating_point())
            assert_finite(state.memory, y)
    assert MLP().norm
    assert L2().reads_prediction
