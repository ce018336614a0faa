"""A compiled decode step of a memory layer, at every position of a long stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nestling as nl


@pytest.mark.parametrize("name", ["titans", "gated_deltanet", "self_modifying"])
@torch.no_grad()
def test_a_layer_decodes_in_one_graph_for_a_thousand_positions(name: str) -> None:
    torch.manual_seed(0)
    kind = nl.layers.SelfModifying if name == "self_modifying" else nl.layers.Memory
    layer = kind(8, 2, nl.memory.named(name, key_dim=4, chunk=16))
    x = torch.randn(2, 1000, 8)
    graphs = 0

    def counting(module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return module.forward

    step = torch.compile(layer, fullgraph=True, backend=counting)
    compiled = eager = nl.state.clone(layer.start(2))
    for position in range(1000):
        y, compiled = step(x[:, position : position + 1].clone(), compiled)
        if position < 40:
            z, eager = layer(x[:, position : position + 1], eager)
            torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
    assert graphs == 1
    assert compiled.memory.position.tolist() == [1000, 1000]


@torch.no_grad()
def test_a_compiled_layer_refuses_a_token_that_is_not_finite() -> None:
    torch.manual_seed(0)
    layer = nl.layers.Memory(8, 2, nl.memory.named("titans", key_dim=4, chunk=16))
    x = torch.randn(2, 6, 8)
    x[0, 2, 3] = torch.nan
    step = torch.compile(layer, fullgraph=True, backend="eager")
    state, before = layer.start(2), None
    for position in range(6):
        before = state.memory.weights
        y, state = step(x[:, position : position + 1].clone(), state)
        assert bool(y[0].isnan().all()) == (position == 2)
        assert torch.isfinite(y[1]).all()
        if position == 2:
            for old, new in zip(before, state.memory.weights, strict=True):
                assert torch.equal(old[0], new[0]), "it writes nothing"
    assert state.memory.faults.tolist() == [1, 0]
    assert all(torch.isfinite(leaf).all() for leaf in nl.state.leaves(state))
