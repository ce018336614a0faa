"""Constant cost: a token costs the same at position 1 k and 100 k, and a compiled step is compiled once."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nestling as nl


def count(name: str, position: int) -> tuple[int, int]:
    """FLOPs of one decode step and bytes of state for lanes that stand at `position`."""
    spec = nl.memory.named(name, key_dim=8, chunk=16)
    w0 = spec.init(2, torch.Generator().manual_seed(0))
    q, k, v, gates = spec.example(torch.Generator().manual_seed(1), time=1)
    state = spec.start(w0, 2)._replace(position=torch.full((2,), position))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, state = nl.memory.scan(spec, w0, q, k, v, gates, state)
    tail = () if state.tail is None else state.tail
    tensors = (*state.anchor, *state.weights, *state.momentum, *tail, state.position, state.faults)
    return counter.get_total_flops(), sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("name", nl.memory.names())
def test_decode_costs_the_same_at_1k_and_100k(name: str) -> None:
    early, late = count(name, 1_000), count(name, 100_000)
    assert early == late
    assert early[0] > 0


@pytest.mark.parametrize("time", [64, 128])
def test_scan_work_grows_linearly_with_length(time: int) -> None:
    def flops(length: int) -> int:
        spec = nl.memory.named("titans", key_dim=8, chunk=16)
        w0 = spec.init(2, torch.Generator().manual_seed(0))
        example = spec.example(torch.Generator().manual_seed(1), time=length)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            nl.memory.scan(spec, w0, *example)
        return counter.get_total_flops()

    assert flops(2 * time) == 2 * flops(time)
