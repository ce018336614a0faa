"""Memories that answer from their chunk's start, written by the C code and read apart, against their definition; TNT with
them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling.memory import MLP, DeltaGradient, DotProduct, Gradient, Matrix, Omega, tnt_chunked
from nestling.memory.native import stale
from nestling.native import without

from .test_native import NEEDS, assert_close, example
from .test_native_channel import assert_left, differentiated

CELLS: dict[str, dict[str, Any]] = {
    "titans": {},
    "matrix, no momentum": {"network": Matrix(), "rule": Gradient(), "bias": DotProduct()},
    "erases": {"rule": DeltaGradient("with_decay"), "network": MLP(expansion=2.0, norm=False)},
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and calls count as long ones from a few tokens on."""
    monkeypatch.setattr(stale, "LONG", 5)
    monkeypatch.setattr(tnt_chunked, "LONG", 5)


@NEEDS
@pytest.mark.parametrize("cell", CELLS)
def test_equals_the_definition(cell: str, calls: list[int]) -> None:
    """Chunks that close inside calls, and calls that begin and end inside a chunk."""
    spec = nl.memory.named("titans", **{"key_dim": 6, "chunk": 7, "read": "boundary", **CELLS[cell]})
    given = example(spec, 25, 3, torch.float64)
    expected = differentiated(spec, *given, [0, 25], engine="reference")
    assert_close(differentiated(spec, *given, [0, 25]), expected, 1e-8)
    assert len(calls) == 4
    assert_close(differentiated(spec, *given, [0, 3, 12, 14, 25]), expected, 1e-8)
    assert len(calls) == 4 + 6


@NEEDS
def test_refused_tokens_write_nothing_and_what_overflows_goes_to_the_guards(calls: list[int]) -> None:
    spec = nl.memory.named("titans", key_dim=6, chunk=7, read="boundary")
    w0, (q, k, v), gates = example(spec, 25, 3, torch.float64)
    k = k.detach().clone()
    k[0, 1, 11] = torch.nan
    with torch.no_grad():
        y, end = nl.memory.scan(spec, w0, q, k, v, gates)
        z, other = nl.memory.scan(spec, w0, q, k, v, gates, engine="reference")
        assert calls
        assert_close([y, *end.weights], [z, *other.weights], 1e-8)
        assert end.faults.tolist() == [1, 0]
        v = v.detach().clone()
        v[1, 0, 3] = 1e308
        y, end = nl.memory.scan(spec, w0, q, k, v, gates)
        with without():
            z, other = nl.memory.scan(spec, w0, q, k, v, gates)
    assert torch.isfinite(y).all()
    assert end.faults.tolist() == other.faults.tolist()
    assert_close([y, *end.weights], [z, *other.weights], 1e-8)


@NEEDS
@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives(cell: str) -> None:
    spec = nl.memory.named("titans", **{"key_dim": 4, "chunk": 5, "read": "boundary", **CELLS[cell]})

    def twice() -> list[Tensor]:
        w0, streams, gates = example(spec, 12, 19, torch.float64)
        inputs = [*w0, *streams, *(gate for _, gate in gates.items())]
        y, state = nl.memory.scan(spec, w0, *streams, gates)
        total = y.square().sum() + sum(w.square().sum() for w in state.weights)
        first = torch.autograd.grad(total, inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))

    found = twice()
    with without():
        assert_close(found, twice(), 1e-8)


@NEEDS
def test_what_it_leaves_to_the_framework(calls: list[int]) -> None:
    """Short chunks, windows, lanes that begin anew, and reports."""
    reset = torch.zeros(2, 25, dtype=torch.bool)
    reset[0, 9] = True
    for choices, options in (
        ({"chunk": 4}, {}),
        ({"bias": Omega(DotProduct(), length=3)}, {}),
        ({}, {"reset": reset}),
        ({}, {"report": nl.Report()}),
    ):
        spec = nl.memory.named("titans", **{"key_dim": 6, "chunk": 7, "read": "boundary", **choices})
        assert_left(spec, example(spec, 25, 3, torch.float64), calls, **options)


@NEEDS
@pytest.mark.parametrize("shard", [8, 100])
@pytest.mark.parametrize("projection", ["normalized", "none"])
def test_tnt_is_read_in_c_whole(shard: int, projection: str, calls: list[int]) -> None:
    """The global memory and the local one; projections are made again in the backward pass."""
    spec = nl.memory.named("tnt", key_dim=6, chunk=4, shard=shard, global_chunk=9, projection=projection)
    given = example(spec, 25, 3, torch.float64)
    expected = differentiated(spec, *given, [0, 25], engine="reference")
    assert_close(differentiated(spec, *given, [0, 25]), expected, 1e-8)
    assert len(calls) == 3 + 1
    assert_close(differentiated(spec, *given, [0, 11, 25]), expected, 1e-8)
