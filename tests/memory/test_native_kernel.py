"""The C code of memories over exponential features against their definition: values, state, every gradient; what it leaves to
the framework."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nestling as nl
from nestling import testing
from nestling.memory import L2, MLP, Decay, DotProduct, Exponential, Full, KernelMemory, Lp, Matrix, Omega
from nestling.native import without

from .test_native import NEEDS, assert_close, example
from .test_native_channel import assert_left, differentiated

CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "deep transformer": ("deep_transformer", {}),
    "deep transformer, decays, read before": ("deep_transformer", {"retention": Decay(), "read": "before"}),
    "deep transformer, window, three layers": (
        "deep_transformer",
        {"bias": Omega(DotProduct(), length=3), "network": MLP(depth=3, expansion=1.5, activation="silu")},
    ),
    "dot": ("dot", {}),
    "dot, normalized, nothing forgotten": ("dot", {"normalized": True, "retention": Full(), "bias": L2()}),
    "dot, plain kernel, neither norm nor residual": (
        "dot",
        {"kernel": Exponential(0.5, unit_peak=False), "network": MLP(norm=False, residual=False)},
    ),
    "dot, Lp, read before": ("dot", {"bias": Omega(Lp(3.0), length=4), "read": "before"}),
    "span": ("swdt", {"span": 5}),
    "span, one token, read before": ("swdt", {"span": 1, "read": "before"}),
    "span, L2, no sum of kernels": ("swdt", {"span": 9, "bias": L2(), "normalized": False}),
}


def made(cell: str, **choices: object) -> KernelMemory:
    name, own = CELLS[cell]
    found = nl.memory.named(name, **{"key_dim": 8, "chunk": 6, **own, **choices})
    assert isinstance(found, KernelMemory)
    return found


@NEEDS
@pytest.mark.parametrize("cell", CELLS)
@given(
    sizes=st.sampled_from([(3, 3), (8, 8), (5, 20), (19, 4)]),
    chunk=st.sampled_from([1, 5, 8, 70]),
    time=st.integers(2, 16),
    seed=st.integers(0, 10_000),
)
def test_equals_the_definition(cell: str, sizes: tuple[int, int], chunk: int, time: int, seed: int) -> None:
    """Any sizes and length, cut anywhere into calls, in tiles of any size."""
    network = CELLS[cell][1].get("network", MLP())
    wide = sizes[0] >= sizes[1]
    network = replace(network, residual=network.residual and wide, leading=network.residual and sizes[0] > sizes[1])
    spec = made(cell, key_dim=sizes[0], value_dim=sizes[1], chunk=chunk, network=network)
    w0, streams, gates = example(spec, time, seed, torch.float64)
    cut = int(torch.randint(time + 1, (), generator=torch.Generator().manual_seed(seed)))
    expected = differentiated(spec, w0, streams, gates, [0, time], engine="reference")
    for bounds, options in (([0, time], {}), ([0, cut, time], {"tile": 3})):
        with testing.poisoned():
            found = differentiated(spec, w0, streams, gates, bounds, **options)
        assert_close(found, expected, 1e-8)


@NEEDS
@pytest.mark.parametrize("cell", CELLS)
def test_reads_what_is_not_whole_chunks(cell: str, calls: list[int]) -> None:
    """By the C code: calls that begin and end inside a chunk, one of a single token, and chunks of several tiles."""
    spec = made(cell, chunk=150)
    w0, streams, gates = example(spec, 150, 3, torch.float64)
    with without():
        expected = differentiated(spec, w0, streams, gates, [0, 150])
    assert not calls
    found = differentiated(spec, w0, streams, gates, [0, 10, 11, 97, 150])
    assert len(calls) == 4
    assert_close(found, expected, 1e-9)


@NEEDS
@pytest.mark.parametrize("cell", ["deep transformer, decays, read before", "dot", "span"])
def test_single_precision_over_many_kept_weights(cell: str, calls: list[int]) -> None:
    """As good as the framework's; the backward pass takes as many stretches as the text needs."""
    spec = made(cell, key_dim=16)
    everything = [differentiated(spec, *example(spec, 100, 5, torch.float32), [0, 100])]
    assert len(calls) == 1
    with without():
        for dtype in (torch.float32, torch.float64):
            everything.append(differentiated(spec, *example(spec, 100, 5, dtype), [0, 100]))
    errors, usual = [], []
    for a, b, c in zip(*everything, strict=True):
        size = max(1.0, float(c.abs().max()))
        errors.append(float((a.double() - c).abs().max()) / size)
        usual.append(float((b.double() - c).abs().max()) / size)
    assert max(errors) <= max(4 * max(usual), 1e-5)


@NEEDS
@pytest.mark.parametrize("cell", ["deep transformer", "dot", "span"])
@pytest.mark.parametrize("bad", [float("nan"), 3e38])
def test_refused_tokens_are_answered_and_write_nothing(cell: str, bad: float, calls: list[int]) -> None:
    """3e38 is a number, but its square in single precision is none. In the window of the next call it has its place."""
    spec = made(cell)
    w0, streams, gates = example(spec, 32, 13, torch.float64 if bad != 3e38 else torch.float32)
    q, k, v = (x.detach().clone() for x in streams)
    k[0, 1, 11] = k[1, 0, 30] = bad
    given = [x.requires_grad_() for x in (q, k, v)]
    found = differentiated(spec, w0, given, gates, [0, 13, 32])
    assert len(calls) == 2
    assert all(bool(torch.isfinite(x).all()) for x in found)
    expected = differentiated(spec, w0, given, gates, [0, 13, 32], engine="reference")
    assert_close(found, expected, 1e-8 if bad != 3e38 else 1e-4)
    assert nl.memory.scan(spec, w0, *given, gates)[1].faults.tolist() == [1, 1]


@NEEDS
@pytest.mark.parametrize("cell", ["deep transformer, decays, read before", "dot", "span"])
def test_second_derivatives(cell: str, calls: list[int]) -> None:
    spec = made(cell, key_dim=4, chunk=3)

    def twice() -> list[Tensor]:
        w0, streams, gates = example(spec, 9, 19, torch.float64)
        inputs = [*w0, *streams, *(gate for _, gate in gates.items())]
        y, state = nl.memory.scan(spec, w0, *(x[:, :, :5] for x in streams), gates[:5])
        z, _ = nl.memory.scan(spec, w0, *(x[:, :, 5:] for x in streams), gates[5:], state)
        first = torch.autograd.grad(y.square().sum() + z.square().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))

    found = twice()
    assert len(calls) == 2
    with without():
        assert_close(found, twice(), 1e-8)


@NEEDS
def test_a_span_is_read_with_resets_and_lanes_out_of_step(calls: list[int]) -> None:
    """Nothing older than the span is handed on, so that there is nothing to number."""
    spec = made("span")
    w0, streams, gates = example(spec, 45, 3, torch.float64)
    reset = torch.zeros(2, 45, dtype=torch.bool)
    reset[0, 4] = reset[1, 22] = reset[1, 23] = True
    valid = torch.arange(45) < torch.tensor([[45], [31]])
    masks = {"reset": reset, "valid": valid}
    expected = differentiated(spec, w0, streams, gates, [0, 45], engine="reference", **masks)
    found = differentiated(spec, w0, streams, gates, [0, 10, 27, 45], **masks)
    assert len(calls) == 3
    assert_close(found, expected, 1e-8)


@NEEDS
def test_what_overflows_is_left_to_the_guards() -> None:
    spec = made("dot")
    w0, (q, k, v), gates = example(spec, 40, 15, torch.float32)
    lr, v = gates.lr.detach().clone(), v.detach().clone()
    lr[1, 0, 3], v[1, 0, 3] = 1e30, 1e15
    changed = replace(gates, lr=lr)
    with torch.no_grad():
        y, state = nl.memory.scan(spec, w0, q, k, v, changed)
        with without():
            z, other = nl.memory.scan(spec, w0, q, k, v, changed)
    assert state.faults.tolist() == other.faults.tolist()
    assert state.faults[1] > 0
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4, equal_nan=True)


@NEEDS
def test_what_it_leaves_to_the_framework(calls: list[int]) -> None:
    """Networks without a layer behind the first, reading at a chunk's start, shares of exactly 0, lanes out of step, reports."""
    start = torch.zeros(2, 12, dtype=torch.bool)
    start[0, 3] = True
    for cell, choices, options in (
        ("deep transformer", {"network": Matrix()}, {}),
        ("dot", {"read": "boundary"}, {}),
        ("span", {"read": "boundary"}, {}),
        ("span", {"network": Matrix()}, {}),
        ("dot", {}, {"reset": start}),
        ("dot", {}, {"valid": ~start}),
        ("dot", {}, {"report": nl.Report()}),
    ):
        spec = made(cell, **choices)
        assert_left(spec, example(spec, 12, 21, torch.float64), calls, **options)
    w0, streams, gates = example(made("dot"), 12, 21, torch.float64)
    with torch.no_grad():
        assert gates.retention is not None
        gates.retention[0, 1, 5] = 0.0
        nl.memory.scan(made("dot"), w0, *streams, gates)
    assert not calls
