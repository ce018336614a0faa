"""Memories that answer from their chunk's start by the C code, against their definition; TNT with them."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nestling as nl
from nestling.memory import MLP, DeltaGradient, DotProduct, Gradient, Lq, Matrix, Muon, Omega, Softmax
from nestling.memory.layout import layout
from nestling.memory.native.lanes import Again, stand
from nestling.memory.native.runs import runs
from nestling.memory.native.scan import Cell, Scan
from nestling.native import without

from .test_native import NEEDS, assert_close, example
from .test_native_channel import assert_left, differentiated

CELLS: dict[str, dict[str, Any]] = {
    "titans": {},
    "matrix, no momentum": {"network": Matrix(), "rule": Gradient(), "bias": DotProduct()},
    "erases": {"rule": DeltaGradient("with_decay"), "network": MLP(expansion=2.0, norm=False)},
    "window": {"bias": Omega(DotProduct(), length=3)},
}


@NEEDS
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("chunk", [4, 7])
def test_equals_the_definition(cell: str, chunk: int, tile: int | None, calls: list[int]) -> None:
    """Chunks that close inside calls, calls that begin and end inside a chunk, tiles that end inside one."""
    spec = nl.memory.named("titans", **{"key_dim": 6, "chunk": chunk, "read": "boundary", **CELLS[cell]})
    inputs = example(spec, 25, 3, torch.float64)
    expected = differentiated(spec, *inputs, [0, 25], engine="reference")
    assert_close(differentiated(spec, *inputs, [0, 25], tile=tile), expected, 1e-8)
    assert len(calls) == 1
    assert_close(differentiated(spec, *inputs, [0, 3, 12, 14, 25], tile=tile), expected, 1e-8)
    assert len(calls) == 1 + 4


@NEEDS
@pytest.mark.parametrize("cell", CELLS)
@given(chunk=st.sampled_from([1, 4, 5, 50]), tile=st.sampled_from([None, 2, 3]), seed=st.integers(0, 10_000))
def test_lanes_out_of_step_that_begin_anew(cell: str, chunk: int, tile: int | None, seed: int) -> None:
    spec = nl.memory.named("titans", **{"key_dim": 6, "chunk": chunk, "read": "boundary", **CELLS[cell]})
    inputs, g = example(spec, 25, seed, torch.float64), torch.Generator().manual_seed(seed)
    valid, reset = torch.ones(2, 25, dtype=torch.bool), torch.rand(2, 25, generator=g) < 0.15
    valid[0, :4], valid[1, 22:] = False, False
    masks = {"valid": valid, "reset": reset}
    expected = differentiated(spec, *inputs, [0, 25], engine="reference", **masks)
    assert_close(differentiated(spec, *inputs, [0, 25], tile=tile, **masks), expected, 1e-8)
    assert_close(differentiated(spec, *inputs, [0, 10, 25], tile=tile, **masks), expected, 1e-8)


@NEEDS
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("length", [5, 7, 17])
def test_what_nobody_reads_has_no_gradient(cell: str, length: int) -> None:
    """Answers alone are differentiated: nothing comes back to the last writes, and nobody asks for the initial weights'."""
    spec = nl.memory.named("titans", **{"key_dim": 6, "chunk": 7, "read": "boundary", **CELLS[cell]})

    def gradients(engine: str) -> list[Tensor]:
        w0, streams, gates = example(spec, length, 23, torch.float64)
        y, _ = nl.memory.scan(spec, [w.detach() for w in w0], *streams, gates, engine=engine)
        inputs = [*streams, *(gate for _, gate in gates.items())]
        return list(torch.autograd.grad(y.square().sum(), inputs, allow_unused=True, materialize_grads=True))

    assert_close(gradients("chunked"), gradients("reference"), 1e-8)


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


@pytest.mark.parametrize("chunk", [1, 16, 128])
def test_what_a_thread_has_in_hand_takes_no_more_room_than_what_is_kept(chunk: int) -> None:
    """Weights stand before each tile of a group: in chunks of one token these are most of it."""
    spec = nl.memory.named("titans", key_dim=64, chunk=chunk, read="boundary")
    state = spec.start(spec.init(4), 1)
    cut = layout(state.position, 1024, None, None, period=spec.periods, tile=128, halo=0)
    found = runs(cut, 1024)
    assert found is not None
    at, nobody = stand(state, state, found), cast(Again, None)  # as nothing is read
    one = Scan(Cell.of(spec, spec.network), spec.features, found, None, nobody)
    group, tiles = one.group(at), found.table.shape[1]
    assert group * one.keeps(at) // 4 <= 2 * (-(-tiles // group)) * one.keeps(at)


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
    """Links, steps along a map of the momentum, and reports."""
    for choices, options in (
        ({"retention": Softmax(), "rule": Gradient()}, {}),
        ({"retention": Lq(3.0), "rule": Gradient()}, {}),
        ({"rule": Muon()}, {}),
        ({}, {"report": nl.Report()}),
    ):
        spec = nl.memory.named("titans", **{"key_dim": 6, "chunk": 7, "read": "boundary", **choices})
        assert_left(spec, example(spec, 25, 3, torch.float64), calls, **options)


@NEEDS
@pytest.mark.parametrize("shard", [8, 100])
@pytest.mark.parametrize("projection", ["normalized", "literal", "none"])
def test_tnt_is_read_in_c_whole(shard: int, projection: str, calls: list[int]) -> None:
    """The global memory, the local one and the projection, which is a memory too."""
    spec = nl.memory.named("tnt", key_dim=6, chunk=4, shard=shard, global_chunk=9, projection=projection)
    inputs = example(spec, 25, 3, torch.float64)
    expected = differentiated(spec, *inputs, [0, 25], engine="reference")
    assert_close(differentiated(spec, *inputs, [0, 25]), expected, 1e-8)
    assert len(calls) == (2 if projection == "none" else 3)
    assert_close(differentiated(spec, *inputs, [0, 11, 12, 25]), expected, 1e-8)


@NEEDS
def test_tokens_and_queries_that_are_no_numbers_and_keys_of_zero(calls: list[int]) -> None:
    """A projection is without them, and so are all gradients; of keys of 0 they are finite."""
    spec = nl.memory.named("tnt", key_dim=6, chunk=4, shard=8, global_chunk=9)

    def gradients(engine: str) -> list[Tensor]:
        w0, (q, k, v), gates = example(spec, 25, 3, torch.float64)
        with torch.no_grad():
            k[0, 1, 11], q[1, 0, 5], k[1, :, 14] = torch.nan, torch.inf, 0
        y, state = nl.memory.scan(spec, w0, q, k, v, gates, engine=engine)
        assert y[1, 0, 5].isnan().all()
        answers = y.nan_to_num()
        kept = [x for x in nl.state.leaves(state) if x.requires_grad]
        found = torch.autograd.grad(
            answers.square().sum() + sum(x.square().sum() for x in kept), [*w0, q, k, v, *(g for _, g in gates.items())]
        )
        return [answers.detach(), *(x.detach() for x in kept), *found]

    found = gradients("chunked")
    assert len(calls) == 3
    assert all(bool(x.isfinite().all()) for x in found)
    assert_close(found, gradients("reference"), 1e-8)
