"""The C code of memories of slots against their definition: values, state, every gradient; what it leaves to the framework."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nestling as nl
from nestling.memory import Gates
from nestling.native import status, without

from .test_native import HEADS, assert_close, everything, example
from .test_native_channel import assert_defined, assert_split_anywhere, differentiated

NEEDS = pytest.mark.skipif(not status().startswith("on"), reason=f"the C code is not used here: {status()}")

CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "decode": ("lattice_decode", {}),
    "encode": ("lattice_encode", {}),
    "similarity": ("lattice_similarity", {}),
    "decode, read before": ("lattice_decode", {"read": "before"}),
    "encode, decays, read before": ("lattice_encode", {"norm": "decay", "read": "before"}),
    "decode, decays": ("lattice_decode", {"norm": "decay"}),
    "similarity, norms grow": ("lattice_similarity", {"norm": "free", "code": "softmax"}),
    "encode, decays, the chunk's norms": ("lattice_encode", {"norm": "decay", "read_norm": "chunk"}),
    "decode, read with norms": ("lattice_decode", {"norm": "decay", "read_norm": "none", "read": "before"}),
    "trellis": ("trellis", {}),
    "trellis, two sets of gates, read before": ("trellis", {"gating": "separate", "read": "before"}),
    "trellis, linear": ("trellis", {"phi": "identity", "between": "identity"}),
    "trellis, unit norm between": ("trellis", {"between": "l2_silu", "value_read_phi": False, "code": "rms"}),
    "trellis, nothing predicted": ("trellis", {"objective": "dot", "initial": "random"}),
    "trellis, linear, nothing predicted": ("trellis", {"objective": "dot", "phi": "identity", "gating": "separate"}),
}


def made(cell: str, **choices: object) -> Any:
    name, own = CELLS[cell]
    return nl.memory.named(name, **{"key_dim": 8, "slots": 5, "chunk": 6, **own, **choices})


@NEEDS
@pytest.mark.parametrize("cell", CELLS)
@given(
    sizes=st.sampled_from([(3, 3, 2), (8, 8, 8), (5, 20, 7), (19, 4, 33), (8, 40, 16)]),
    chunk=st.sampled_from([1, 5, 8, 20, 70]),
    time=st.integers(2, 90),
    seed=st.integers(0, 10_000),
)
def test_equals_the_definition(cell: str, sizes: tuple[int, int, int], chunk: int, time: int, seed: int) -> None:
    """Any sizes and length, with resets anywhere, cut anywhere into calls; tokens missing at the end of a lane."""
    spec = made(cell, key_dim=sizes[0], value_dim=sizes[1], slots=sizes[2], chunk=chunk)
    g = torch.Generator().manual_seed(seed)
    valid = torch.arange(time) < torch.randint(1, time + 1, (2, 1), generator=g)
    assert_defined(spec, example(spec, time, seed, torch.float64), valid, g)


@NEEDS
@pytest.mark.parametrize("cell", CELLS)
def test_reads_what_is_not_whole_chunks(cell: str, calls: list[int]) -> None:
    """By the C code: calls that begin and end inside a chunk, lanes at different positions, resets inside a call."""
    spec = made(cell)
    w0, streams, gates = example(spec, 45, 3, torch.float64)
    reset = torch.zeros(2, 45, dtype=torch.bool)
    reset[0, 4] = reset[1, 22] = reset[1, 23] = True
    expected = differentiated(spec, w0, streams, gates, [0, 45], engine="reference", reset=reset)
    found = differentiated(spec, w0, streams, gates, [0, 10, 27, 45], reset=reset)
    assert len(calls) == 3
    assert_close(found, expected, 1e-8)


@NEEDS
@pytest.mark.parametrize("cell", ["decode", "encode, decays, read before", "trellis, two sets of gates, read before"])
def test_every_split_gives_the_same(cell: str) -> None:
    assert_split_anywhere(made(cell), 31, 2)


@NEEDS
@pytest.mark.parametrize("cell", CELLS)
def test_single_precision_over_many_kept_weights(cell: str, calls: list[int]) -> None:
    """As good as the framework's; the backward pass takes as many stretches as the text needs."""
    spec = made(cell, key_dim=16, value_dim=24, slots=17)
    found = everything(spec, 300, 5, torch.float32)
    assert calls == [50]
    with without():
        same = everything(spec, 300, 5, torch.float32)
        expected = everything(spec, 300, 5, torch.float64)
    for a, b, c in zip(found, same, expected, strict=True):
        size = max(1.0, float(c.abs().max()))
        error, usual = (float((x.double() - c).abs().max()) / size for x in (a, b))
        assert error <= max(4 * usual, 1e-5)


@NEEDS
@pytest.mark.parametrize("cell", ["decode", "encode, decays, read before", "trellis"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_refused_tokens_are_answered_and_write_nothing(cell: str, bad: float, calls: list[int]) -> None:
    """3e38 is a number, but its square in single precision is none."""
    spec = made(cell)
    w0, streams, gates = example(spec, 32, 13, torch.float64 if bad != 3e38 else torch.float32)
    q, k, v = (x.detach().clone() for x in streams)
    k[0, 1, 11] = k[1, 0, 30] = bad
    with torch.no_grad():
        if bad != 3e38:
            v[1, 0, 3] = bad
            gates.lr[0, 1, 5] = bad
    given = [x.requires_grad_() for x in (q, k, v)]
    found = differentiated(spec, w0, given, gates, [0, 32])
    assert calls == [6]
    assert all(bool(torch.isfinite(x).all()) for x in found)
    expected = differentiated(spec, w0, given, gates, [0, 32], engine="reference")
    assert_close(found, expected, 1e-8 if bad != 3e38 else 1e-4)
    _, state = nl.memory.scan(spec, w0, *given, gates)
    assert state.faults.tolist() == ([1, 1] if bad == 3e38 else [2, 2])


@NEEDS
@pytest.mark.parametrize("cell", ["decode", "similarity", "decode, decays", "trellis, linear"])
def test_what_overflows_is_left_to_the_guards(cell: str, calls: list[int]) -> None:
    """Steps beyond all numbers, in a chunk's middle and before a reset; the other lane is still read by the C code."""
    spec = made(cell)
    w0, (q, k, v), gates = example(spec, 40, 15, torch.float32)
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[1, 30] = True
    lr, v = gates.lr.detach().clone(), v.detach().clone()
    lr[1, 0, 3], v[1, 0, 3] = 1e30, 1e15
    changed = replace(gates, lr=lr)
    with torch.no_grad():
        y, state = nl.memory.scan(spec, w0, q, k, v, changed, reset=reset)
        assert calls
        with without():
            z, other = nl.memory.scan(spec, w0, q, k, v, changed, reset=reset)
    assert state.faults.tolist() == other.faults.tolist()
    assert state.faults[1] > 0
    assert all(bool(torch.isfinite(w).all()) for w in state.weights)
    for one, same in zip([y, *state.weights], [z, *other.weights], strict=True):
        torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-4, equal_nan=True)


@NEEDS
@pytest.mark.parametrize("cell", ["decode", "encode, decays, read before", "trellis, two sets of gates, read before"])
def test_second_derivatives(cell: str, calls: list[int]) -> None:
    spec = made(cell, key_dim=4, chunk=3)

    def twice() -> list[torch.Tensor]:
        w0, streams, gates = example(spec, 9, 19, torch.float64)
        inputs = [*w0, *streams, *(gate for _, gate in gates.items())]
        y, _ = nl.memory.scan(spec, w0, *streams, gates)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))

    found = twice()
    assert calls == [3]
    with without():
        assert_close(found, twice(), 1e-8)


@NEEDS
@pytest.mark.parametrize("cell", ["decode", "encode, decays, read before", "trellis"])
def test_gradients_of_answers_or_of_the_state_alone(cell: str, calls: list[int]) -> None:
    """Nothing comes from what is not differentiated; answers are wider than the slots are many."""
    spec = made(cell, value_dim=40)
    w0, (q, k, v), gates = example(spec, 33, 25, torch.float64)

    def found(engine: str) -> list[torch.Tensor]:
        y, state = nl.memory.scan(spec, w0, q, k, v, gates, engine=engine)
        of_state = sum(w.square().sum() for w in state.weights)
        return [
            *torch.autograd.grad(of_state, [*w0[: spec.states], k, v, gates.lr], retain_graph=True),
            *torch.autograd.grad(y.square().sum(), [q, v, gates.lr]),
        ]

    first, expected = found("chunked"), found("reference")
    assert calls == [6]
    assert_close(first, expected, 1e-8)


@NEEDS
def test_slots_without_a_direction_are_left_to_the_framework(calls: list[int]) -> None:
    """Of norm 0 they have no unit slot: their norm is held at its least."""
    spec = made("decode, decays")
    w0, streams, gates = example(spec, 12, 21, torch.float64)
    with torch.no_grad():
        w0[0][1, 2] = 0.0
        y, state = nl.memory.scan(spec, w0, *streams, gates)
    assert not calls
    with torch.no_grad(), without():
        z, other = nl.memory.scan(spec, w0, *streams, gates)
    assert_close([y, *state.weights], [z, *other.weights], 1e-12)


@NEEDS
def test_what_it_leaves_to_the_framework(calls: list[int]) -> None:
    """Other choices of Lattice and Trellis, reading at a chunk's start, shares of exactly 0, gaps in a tile, and reports."""
    plain = {"phi": "identity", "norm": "free", "read_norm": "none"}
    whole = torch.ones(2, 12, dtype=torch.bool)
    holed = whole.clone()
    holed[0, 3] = False
    options: dict[str, Any]
    for cell, choices, options in (
        ("decode", plain, {}),
        ("decode", {"form": "gate"}, {}),
        ("decode", {"read": "boundary"}, {}),
        ("trellis", {"read": "boundary"}, {}),
        ("trellis", {"phi": "tanh"}, {}),
        ("trellis", {"between": "softmax"}, {}),
        ("trellis", {"gating": "slots"}, {}),
        ("decode", {}, {"valid": holed}),
        ("decode", {}, {"report": nl.Report()}),
        ("decode, decays", {}, {"zero": True}),
        ("decode, decays", {}, {}),
    ):
        spec = made(cell, **choices)
        w0, streams, gates = example(spec, 12, 23, torch.float64)
        if options.pop("zero", False):
            gates = Gates(lr=gates.lr, retention=torch.where(torch.arange(12) == 4, 0.0, gates.retention))
        nl.memory.scan(spec, w0, *streams, gates, **options)
    assert calls == [2], "the last alone"


@NEEDS
@pytest.mark.parametrize("cell", ["decode", "trellis"])
def test_threads_share_the_memories(cell: str) -> None:
    spec = made(cell, key_dim=20)
    alone = everything(spec, 50, 17, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(HEADS + 1)
        together = everything(spec, 50, 17, torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
