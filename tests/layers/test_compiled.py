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
