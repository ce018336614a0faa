"""Constant cost: a token costs the same at position 1 k and 100 k, and a compiled step is compiled once."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nestling as nl
from nestling import native


def count(name: str, position: int) -> tuple[int, int]:
    """FLOPs of one decode step and bytes of state for lanes that stand at `position`."""
    spec = nl.memory.named(name, key_dim=8, chunk=16)
    w0 = spec.init(2, torch.Generator().manual_seed(0))
    q, k, v, gates = spec.example(torch.Generator().manual_seed(1), time=1)
    state = spec.start(w0, 2)._replace(position=torch.full((2,), position))
    with torch.no_grad(), native.without(), FlopCounterMode(display=False) as counter:
        _, state = nl.memory.scan(spec, w0, q, k, v, gates, state)
    return counter.get_total_flops(), nl.state.nbytes(state)


LINEAR = {"deep_transformer", "dot"}  # the set is pinned (C5)


@pytest.mark.parametrize("name", nl.memory.names())
def test_growth_is_what_is_declared(name: str) -> None:
    spec = nl.memory.named(name, key_dim=8, chunk=16)
    assert (spec.growth == "linear") == (name in LINEAR)
    w0 = spec.init(2, torch.Generator().manual_seed(0))
    sizes = []
    for time in (16, 32, 48):
        _, state = nl.memory.scan(spec, w0, *spec.example(torch.Generator().manual_seed(1), time=time))
        sizes.append(nl.state.nbytes(state))
    assert (sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0) if name in LINEAR else len(set(sizes)) == 1


@pytest.mark.parametrize("name", sorted(set(nl.memory.names()) - LINEAR))
def test_decode_costs_the_same_at_1k_and_100k(name: str) -> None:
    early, late = count(name, 1_000), count(name, 100_000)
    assert early == late
    assert early[0] > 0


@pytest.mark.parametrize("name", nl.memory.names())
def test_scan_work_grows_linearly_with_length(name: str) -> None:
    """A token costs the same in a text twice as long; a memory whose state grows says so."""
    spec = nl.memory.named(name, key_dim=8, chunk=16)
    short, long = (nl.memory.cost(spec, time) for time in (128, 256))
    if spec.growth == "linear":
        assert long.flops > short.flops
        assert long.state > short.state
    else:
        assert long.flops == short.flops
        assert long.state == short.state


# One of each kind of step; the others, with NESTLING_DEEP=1, are made of the same.
COMPILED = ["titans", "omeganet", "atlas", "self_modifying", "moneta", "rwkv7_like", "tnt", "lattice_decode"]
ALIKE = ["gated_deltanet", "longhorn", "swla", "trellis", "yaad"]


@pytest.mark.parametrize("name", COMPILED + (ALIKE if os.environ.get("NESTLING_DEEP") == "1" else []))
def test_a_compiled_decode_step_is_one_graph_for_a_thousand_positions(name: str) -> None:
    short = {"shard": 48, "global_chunk": 40} if name == "tnt" else {}
    spec = nl.memory.named(name, key_dim=4, chunk=16, **short)
    w0 = spec.init(2, torch.Generator().manual_seed(0))
    q, k, v, gates = spec.example(torch.Generator().manual_seed(1), time=8)
    graphs = 0
    torch._dynamo.reset()  # what other systems compiled from this function counts against its limit

    def counting(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return module.forward

    @torch.compile(fullgraph=True, backend=counting)
    def step(
        at: tuple[torch.Tensor, ...], gates: dict[str, torch.Tensor], state: nl.memory.MemoryState
    ) -> tuple[torch.Tensor, nl.memory.MemoryState]:
        return nl.memory.scan(spec, w0, *at, nl.memory.Gates(**gates), state)

    compiled = eager = nl.state.clone(spec.start(w0, 2))
    with torch.no_grad():
        for position in range(1000):
            t = slice(position % 8, position % 8 + 1)
            inputs = tuple(x[:, :, t].clone() for x in (q, k, v))
            now = {n: g.clone() for n, g in gates[t].items()}
            y, compiled = step(inputs, now, compiled)
            if position < 56:
                z, eager = nl.memory.scan(spec, w0, *inputs, nl.memory.Gates(**now), eager)
                torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)  # C4 in float32
    assert graphs == 1
    assert compiled.position.tolist() == [1000, 1000]
