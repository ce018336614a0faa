"""Shards side by side, and the projection of queries onto a shard's keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import nestling as nl
from nestling import native
from nestling.memory import shards
from nestling.memory.projection import memory, state, step, steps

CASE = st.fixed_dictionaries(
    {
        "time": st.integers(1, 60),
        "shard": st.integers(1, 20),
        "begins": st.floats(0, 0.6),
        "valid": st.sampled_from([None, 0.3, 0.9]),
        "seed": st.integers(0, 10_000),
    }
)


def shard_starts(case: dict, lanes: int = 3) -> tuple[Tensor, Tensor | None, Tensor]:
    """Which tokens begin a shard, given random resets, invalid tokens and lanes anywhere; which are there; tokens read before."""
    g = torch.Generator().manual_seed(case["seed"])
    time, shard = case["time"], case["shard"]
    valid = None if case["valid"] is None else torch.rand(lanes, time, generator=g) < case["valid"]
    reset = torch.rand(lanes, time, generator=g) < 0.3 * case["begins"]
    position = torch.randint(0, 3 * shard, (lanes,), generator=g)
    begins = torch.zeros(lanes, time, dtype=torch.bool)
    for lane in range(lanes):
        at = int(position[lane])
        for t in range(time):
            if valid is None or valid[lane, t]:
                at = 0 if reset[lane, t] else at
                begins[lane, t] = at % shard == 0
                at += 1
    return begins, valid, position % shard


def project(p: Tensor, q: Tensor, k: Tensor, begins: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """q_t P_t of every token, and the last P."""
    w0 = [torch.zeros(p.shape[1:], dtype=p.dtype)]
    y, end = memory(q.shape[-1]).scan(w0, q, k, k, steps(k), state(p), reset=begins, valid=valid)
    return y, end.weights[0]


@given(case=CASE)
def test_every_token_has_one_place_and_every_part_of_a_shard_one_row(case: dict) -> None:
    begins, valid, _ = shard_starts(case)
    lanes, time = begins.shape
    there = torch.ones_like(begins) if valid is None else valid
    found = shards.pack(begins, valid, case["shard"])
    if found is None:  # a row for each lane at most
        assert int(there.sum(1).max()) <= case["shard"] or not begins[:, 1:].any()
        return
    assert found.size <= case["shard"]
    tokens = torch.arange(1, time + 1).expand(lanes, time)
    rows = found.put((tokens * there)[:, None, :, None])[:, 0, :, 0]
    filled = torch.ones_like(rows, dtype=torch.bool) if found.valid is None else found.valid
    rows = rows.masked_fill(~filled, 0).view(lanes, found.rows, found.size)
    resets = torch.zeros_like(filled) if found.reset is None else found.reset
    resets = resets.view(rows.shape)
    for lane in range(lanes):
        part = torch.where(
            there[lane], begins[lane].long().cumsum(0), -1
        )  # which part of which shard a token belongs to
        seen = sorted(t for t in rows[lane].flatten().tolist() if t)
        assert seen == (torch.nonzero(there[lane])[:, 0] + 1).tolist()
        for number, row in enumerate(rows[lane]):
            run = row[row > 0] - 1
            assert bool((row[: len(run)] > 0).all()), "filled from the front"
            own = part[run]
            new = torch.cat([torch.ones(1, dtype=torch.bool), own[1:] != own[:-1]])[: len(run)]
            for p in own.unique():
                assert run[own == p].tolist() == torch.nonzero(part == p)[:, 0].tolist(), "whole and in order"
            assert resets[lane, number, : len(run)].tolist() == [bool(x) and n > 0 for n, x in enumerate(new.tolist())]
            if 0 in own.tolist():
                assert number == 0, "what goes on from the state is in the row that has it"
                assert int(own[0]) == 0
            if len(run) and int(part.max()) in own.tolist():
                assert int(found.ends[lane]) == number
                assert int(own[-1]) == int(part.max()), "the row ends with the lane's last token"
    back = found.back(found.put(tokens[:, None, :, None].double()))[:, 0, :, 0]
    assert torch.equal(back, tokens * there)


@pytest.mark.parametrize("phase", [0, 3, 15])
def test_a_call_as_long_as_whole_shards_leaves_no_place_empty(phase: int) -> None:
    """Wherever lanes stand: what the call begins with and what it ends with make a shard together."""
    begins = (torch.arange(64) + phase) % 16 == 0
    found = shards.pack(begins[None], None, 16)
    assert found is not None
    assert (found.rows, found.size, found.valid) == (4, 16, None)
    assert (found.token is None) == (phase == 0)


@given(case=CASE, projection=st.sampled_from(["normalized", "none"]))
def test_packed_and_unpacked_reading_agree(case: dict, projection: str) -> None:
    """Outputs, state and gradients, from states that have read something."""
    spec = nl.memory.named("tnt", key_dim=4, chunk=3, shard=case["shard"], global_=None, projection=projection)
    g = torch.Generator().manual_seed(case["seed"])
    w0 = [torch.randn(2, *s, generator=g, dtype=torch.float64).requires_grad_() for s in spec.shapes]
    time, lanes = case["time"], 3
    before = spec.example(g, lanes=lanes, time=12, dtype=torch.float64)
    state = spec.scan(w0, *before, valid=torch.rand(lanes, 12, generator=g) < 0.5)[1]
    inputs = spec.example(g, lanes=lanes, time=time, dtype=torch.float64)
    masks = {
        "reset": torch.rand(lanes, time, generator=g) < 0.3 * case["begins"],
        "valid": None if case["valid"] is None else torch.rand(lanes, time, generator=g) < case["valid"],
    }
    runs = []
    for packed in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nestling.memory.tnt_chunked.in_a_row", lambda *_, row=not packed: row)
            y, new = spec.scan(w0, *inputs, state, **masks)
        total = y.square().sum() + sum(x.square().sum() for x in nl.state.leaves(new) if x.requires_grad)
        runs.append((y, *nl.state.leaves(new), *torch.autograd.grad(total, w0, retain_graph=True)))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_long_call_takes_as_many_steps_as_a_shard_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes TNT quick: the local memory reads the call's shards at once, also when lanes are out of step; but the C code,
    which has no steps to save, where lanes and heads are work enough for all cores."""
    spec = nl.memory.named("tnt", key_dim=4, chunk=4, shard=16, global_chunk=32)
    calls, states = [], []
    scan = nl.memory.MemorySpec.scan

    def noting(self: nl.memory.MemorySpec, w0: object, q: Tensor, *rest: object, **options: object) -> object:
        calls.append((self.read, tuple(q.shape[::2])))
        states.append(rest[-1])
        return scan(self, w0, q, *rest, **options)

    monkeypatch.setattr(nl.memory.MemorySpec, "scan", noting)
    monkeypatch.setattr("nestling.memory.tnt_chunked.CORES", 4)
    w0 = spec.init(2)
    example = spec.example(torch.Generator().manual_seed(0), lanes=2, time=128)
    _, state = spec.scan(w0, *example, valid=torch.arange(128) < torch.tensor([[5], [11]]))
    calls.clear()
    projection = local = ("after", (2 * 8, 16))
    with native.without():
        spec.scan(w0, *example, state)
    assert calls == [projection, ("boundary", (2, 128)), local]
    if native.status().startswith("on"):
        calls.clear()
        spec.scan(w0, *example, state)
        assert calls == [("after", (2, 128)), ("boundary", (2, 128)), ("after", (2, 128))]
        calls.clear()
        *streams, gates = example
        forgets = gates.map(lambda gate: gate.clone())
        assert forgets.retention is not None
        forgets.retention[0, 0, 70, 1] = 0  # which the C code leaves to the framework
        spec.scan(w0, *streams, forgets, state)
        assert calls == [("after", (2, 128)), ("boundary", (2, 128)), ("after", (2, 128)), local]
        calls.clear()
        monkeypatch.setattr("nestling.memory.tnt_chunked.CORES", 5)
        spec.scan(w0, *example, state)
        assert calls == [projection, ("boundary", (2, 128)), local]
    monkeypatch.setattr("nestling.memory.tnt_chunked.in_a_row", lambda *_: False)
    spec.scan(w0, *example)
    assert states[-1].anchor[0] is states[-1].weights[0], (
        "as in a fresh state, by which the engine knows a chunk's start"
    )


def test_orthonormal_keys_project_on_their_span_and_at_last_change_nothing() -> None:
    g = torch.Generator().manual_seed(1)
    k = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))[0].view(1, 1, 6, 6)
    q = torch.randn(1, 1, 6, 6, generator=g, dtype=torch.float64)
    y, p = project(torch.zeros(1, 1, 6, 6, dtype=torch.float64), q, 3 * k, None, None)
    for t in range(6):
        span = k[0, 0, : t + 1]
        torch.testing.assert_close(y[0, 0, t], q[0, 0, t] @ span.mT @ span)
    torch.testing.assert_close(y[0, 0, 5], q[0, 0, 5])
    torch.testing.assert_close(p[0, 0], torch.eye(6).double())


@given(case=CASE)
def test_read_as_a_memory_it_is_the_running_sum(case: dict) -> None:
    """Also over tiles, with shards, resets and tokens that do not count; symmetric, positive, blind to the keys' scale."""
    case = case | {"time": 3 * case["time"]}
    begins, valid, _ = shard_starts(case)
    lanes, time = begins.shape
    g = torch.Generator().manual_seed(case["seed"])
    q, k = (torch.randn(lanes, 2, time, 4, generator=g, dtype=torch.float64) for _ in range(2))
    half = torch.randn(lanes, 2, 4, 4, generator=g, dtype=torch.float64)
    p = start = half @ half.mT
    y, end = project(start, q, k, begins, valid)
    scaled, _ = project(start, q, k * torch.linspace(0.1, 9, time)[:, None], begins, valid)
    torch.testing.assert_close(scaled, y, rtol=1e-8, atol=1e-8)  # but for the norm's ε
    there = torch.ones_like(begins) if valid is None else valid
    for t in range(time):
        p = step(p, k[:, :, t], begins[:, t], there[:, t])
        read = torch.where(there[:, t, None, None], (q[:, :, t, None] @ p)[:, :, 0], 0.0)
        torch.testing.assert_close(y[:, :, t], read, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(end, p, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(end, end.mT)
    assert torch.linalg.eigvalsh(end).min() > -1e-9


def test_the_projection_is_the_sum_of_projectors_and_grows_with_the_shard() -> None:
    """For n unit keys the trace is n: why the read input is normalized."""
    k = F.normalize(torch.randn(1, 1, 500, 4, generator=torch.Generator().manual_seed(2)), dim=-1).double()
    y, p = project(torch.zeros(1, 1, 4, 4, dtype=torch.float64), k, k, None, None)
    assert float(p.diagonal(0, -2, -1).sum()) == pytest.approx(500, rel=1e-6)
    assert float(y[..., -1, :].norm()) > 50 * float(y[..., 0, :].norm())


def test_a_query_of_half_precision_meets_a_projection_of_single_precision() -> None:
    spec = nl.memory.named("tnt", key_dim=4, chunk=4, shard=4096, global_=None)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(3), time=300)
    low = [x.bfloat16() for x in (q, k, v)]
    y, state = spec.scan(spec.init(2, torch.Generator().manual_seed(4)), *low, gates)
    assert y.dtype == torch.bfloat16
    (p,) = state.projection
    assert p.dtype == torch.float32
    unit = F.normalize(low[1].double(), dim=-1)
    torch.testing.assert_close(p.double(), unit.mT @ unit, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("there", [8, 16, 13])
def test_lanes_that_are_padded_at_the_end(there: int) -> None:
    """Also where what is there fills whole shards."""
    spec = nl.memory.named("tnt", key_dim=4, chunk=4, shard=8, global_chunk=8)
    g = torch.Generator().manual_seed(5)
    w0, example = [w.double() for w in spec.init(2, g)], spec.example(g, time=20, dtype=torch.float64)
    y, end = spec.scan(w0, *example, valid=(torch.arange(20) < there).expand(2, 20))
    *streams, gates = example
    z, alone = spec.scan(w0, *(x[:, :, :there] for x in streams), gates[:there])
    torch.testing.assert_close(y[:, :, :there], z)
    assert not y[:, :, there:].any()
    for a, b in zip(nl.state.leaves(end), nl.state.leaves(alone), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [1e-3, 1e12])
def test_keys_of_any_length_have_their_gradients(size: float) -> None:
    k = torch.randn(1, 1, 6, 4, generator=torch.Generator().manual_seed(6)) * size
    q = torch.randn(1, 1, 6, 4, generator=torch.Generator().manual_seed(7))
    found = []
    for dtype in (torch.float32, torch.float64):
        key = k.to(dtype).requires_grad_()
        y, _ = project(torch.zeros(1, 1, 4, 4, dtype=dtype), q.to(dtype), key, None, None)
        found.append(torch.autograd.grad(y.sin().sum(), key)[0].double() * size)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1e19, 1.5e19])
def test_a_token_that_the_hierarchy_takes_is_in_the_projection(size: float) -> None:
    """Twice the square of the second's norm is no number."""
    spec = nl.memory.named("tnt", key_dim=4, chunk=4, shard=8, global_=None, projection="literal")
    q, k, v, gates = spec.example(torch.Generator().manual_seed(8), lanes=1, heads=1, time=8)
    k[0, 0, 3] *= size / k[0, 0, 3].norm()
    v[0, 0, 3] = 0
    _, state = spec.scan(spec.init(1), q, k, v, gates.map(lambda gate: gate * 0 if gate is gates.lr else gate))
    taken = 8 - int(state.faults)
    assert taken == (8 if size == 1e19 else 7)
    assert float(state.projection[0].diagonal(0, -2, -1).sum()) == pytest.approx(taken, rel=1e-4)


def test_what_a_checkpoint_makes_again_goes_the_same_way_whatever_the_threads() -> None:
    spec = nl.memory.named("tnt", key_dim=4, chunk=4, shard=16, global_chunk=32)
    w0 = [w.requires_grad_() for w in spec.init(2)]
    q, k, v, gates = spec.example(torch.Generator().manual_seed(9), lanes=1, time=96)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(1)
            y = checkpoint(lambda *w: spec.scan(w, q, k, v, gates)[0], *w0, use_reentrant=False)
            torch.set_num_threads(threads)
            found.append(torch.autograd.grad(y.sum(), w0))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
