"""The C code of rules whose steps go along Newton–Schulz of the momentum against their definition, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nestling as nl
from nestling.memory import (
    L2,
    MLP,
    DotProduct,
    Full,
    GatedMLP,
    Huber,
    Identity,
    Matrix,
    MemorySpec,
    Muon,
    Omega,
    Polynomial,
    native,
)
from nestling.native import status, without

from .test_native import assert_close, assert_second_derivatives, everything, example
from .test_native_channel import assert_defined, assert_split_anywhere

NEEDS = pytest.mark.skipif(not status().startswith("on"), reason=f"the C code is not used here: {status()}")

PLAIN = {"features": Identity(), "network": MLP()}
CELLS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "polynomials": {"features": Polynomial(2, reduce=3)},
    "read before": {**PLAIN, "read": "before"},
    "a matrix, no window": {**PLAIN, "network": Matrix(), "bias": L2()},
    "a matrix, dot product": {**PLAIN, "network": Matrix(), "bias": Omega(DotProduct(), 3)},
    "three layers, nothing forgotten": {**PLAIN, "network": MLP(depth=3, norm=False), "retention": Full()},
    "gated, polynomials": {"network": GatedMLP(leading=True), "features": Polynomial(2, reduce=3)},
    "gated, dot product, read before": {
        "network": GatedMLP(expansion=0.7, norm=False, residual=False, activation="silu"),
        "features": Identity(),
        "bias": Omega(DotProduct(), 3),
        "read": "before",
    },
    "Huber": {**PLAIN, "bias": Omega(Huber(), 3)},
    "cubic": {**PLAIN, "rule": Muon(steps=3, iteration="cubic")},
    "normalized alone": {**PLAIN, "rule": Muon(steps=0)},
    "at every third token": {**PLAIN, "rule": Muon(3), "read": "after"},
    "at every third token, read before": {**PLAIN, "rule": Muon(3), "read": "before"},
}


def made(cell: str, **choices: object) -> MemorySpec:
    return nl.memory.named("atlas", **{"key_dim": 8, "chunk": 6, **CELLS[cell], **choices})


@NEEDS
@pytest.mark.parametrize("cell", CELLS)
@given(
    dim=st.sampled_from([3, 8, 18]),
    chunk=st.sampled_from([1, 5, 12]),
    time=st.integers(2, 26),
    seed=st.integers(0, 10_000),
)
def test_equals_the_definition(cell: str, dim: int, chunk: int, time: int, seed: int) -> None:
    """Any sizes and length, with resets anywhere, cut anywhere into calls; tokens missing at the end of a lane."""
    strided = made(cell).directed.stride is not None
    spec = made(cell, key_dim=dim, chunk=3 * chunk if strided else chunk)
    assert native.serves(native.Cell.of(spec, spec.network), torch.zeros(1))
    g = torch.Generator().manual_seed(seed)
    valid = torch.arange(time) < torch.randint(1, time + 1, (2, 1), generator=g)
    assert_defined(spec, example(spec, time, seed, torch.float64), valid, g)


@NEEDS
@pytest.mark.parametrize("cell", ["gated, polynomials", "at every third token"])
def test_every_split_gives_the_same(cell: str) -> None:
    assert_split_anywhere(made(cell, key_dim=4), 26, 3)


@NEEDS
@pytest.mark.parametrize(("chunk", "time"), [(150, 320), (4, 210)])
def test_chunks_longer_than_a_tile_and_texts_of_many_groups(chunk: int, time: int, calls: list[int]) -> None:
    """Where the weights that are read go on decaying while the anchor stands; where weights are kept in between."""
    spec = made("polynomials" if chunk > time // 4 else "gated, polynomials", chunk=chunk)
    found = everything(spec, time, 3, torch.float64)
    assert len(calls) == 1
    with without():
        assert_close(found, everything(spec, time, 3, torch.float64), 1e-8)


@NEEDS
@pytest.mark.parametrize("cell", ["polynomials", "gated, polynomials", "at every third token, read before"])
def test_single_precision_is_as_good_as_the_framework_s(cell: str) -> None:
    spec = made(cell, key_dim=16, chunk=15)
    expected = everything(spec, 30, 1, torch.float64)
    found = everything(spec, 30, 1, torch.float32)
    with without():
        others = everything(spec, 30, 1, torch.float32)
    for a, b, true in zip(found, others, expected, strict=True):
        size = max(1.0, float(true.abs().max()))
        error, other = (float((x.double() - true).abs().max()) / size for x in (a, b))
        assert error <= max(1e-6, 4 * other)


@NEEDS
@pytest.mark.parametrize("scale", [0.0, 1e-16, 1e-9, 1e9, 1e15])
def test_the_scale_of_the_momentum_has_no_effect_unless_there_is_none(scale: float, calls: list[int]) -> None:
    """In single precision, where squares of such numbers are not there; what is smaller than the least that counts is nothing."""
    spec = made("a matrix, dot product", retention=Full())
    w0, (q, k, v), gates = example(spec, 18, 5, torch.float32)

    def read(factor: float) -> list[Tensor]:
        target = (factor * v).detach().requires_grad_()
        y, state = nl.memory.scan(spec, w0, q, k, target, gates)
        grads = torch.autograd.grad(y.square().sum(), [*w0, q, target, gates.lr])
        return [y.detach(), *(w.detach() for w in state.weights), *grads[:2], factor * grads[2], grads[3]]

    found = read(scale)
    assert calls
    with without():
        assert_close(found, read(scale))
    if scale > 1e-12:
        assert_close(found, read(1.0))
    else:
        assert all(torch.equal(found[1], w.expand_as(found[1])) for w in w0)


@NEEDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_skips_the_tokens_that_the_guard_refuses(bad: float, calls: list[int]) -> None:
    """One in the middle of a chunk, and one that is a chunk's last: its step is not taken, but what was decayed is read."""
    spec = made("polynomials")
    w0, streams, gates = example(spec, 20, 9, torch.float64)
    q, k, v = (x.detach().clone() for x in streams)
    k[0, 1, 8], v[1, 0, 11] = bad, bad
    inputs = [*w0, *(gate for _, gate in gates.items())]

    def read(engine: str) -> list[Tensor]:
        y, state = nl.memory.scan(spec, w0, q, k, v, gates, engine=engine)
        found = [y, *state.weights, *state.momentum]
        grads = torch.autograd.grad(sum(x.square().sum() for x in found), inputs, allow_unused=True)
        return [state.faults.double(), *(x.detach() for x in found), *(g for g in grads if g is not None)]

    found = read("chunked")
    assert len(calls) == 1
    assert found[0].tolist() == [1, 1]
    assert_close(found, read("reference"), 1e-8)


@NEEDS
def test_guards_step_in_as_ever(calls: list[int]) -> None:
    """A momentum that overflows on the way, which the inputs do not show."""
    spec = made("plain", bias=L2())
    w0, (q, k, v), gates = example(spec, 18, 9, torch.float32)
    with torch.no_grad():
        v = v.clone()
        v[1, 0, 2:5] = 2e38
        y, state = nl.memory.scan(spec, w0, q, k, v, gates)
        assert calls
        with without():
            z, other = nl.memory.scan(spec, w0, q, k, v, gates)
    assert state.faults.tolist() == other.faults.tolist()
    assert state.faults[0] == 0 < state.faults[1]
    torch.testing.assert_close(y, z, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert all(bool(torch.isfinite(w).all()) for w in (*state.anchor, *state.weights, *state.momentum))


@NEEDS
def test_second_derivatives(calls: list[int]) -> None:
    spec = made("polynomials", key_dim=4, chunk=4)
    assert_second_derivatives(spec, 8, calls)


@NEEDS
def test_per_token_and_reading_the_anchor_are_left_to_the_other_path(calls: list[int]) -> None:
    for choices in ({"rule": Muon("token")}, {"read": "boundary"}):
        spec = made("plain", **choices)
        assert not native.serves(native.Cell.of(spec, spec.network), torch.zeros(1))
        everything(spec, 7, 1, torch.float32)
    assert not calls
