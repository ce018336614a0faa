"""What the benchmarks share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nestling as nl
from nestling import native
from nestling.memory import pieces
from nestling.memory.cost import FLOPS

COMMON = Path(__file__).parents[1] / "benchmarks" / "common.py"


def test_flops_count_nothing_that_a_checkpoint_makes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound is what a layer's equations cost, whatever the engine makes twice to save memory."""
    found = importlib.util.spec_from_file_location("common", COMMON)
    assert found is not None
    assert found.loader is not None
    common = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "common", common)  # its dataclasses look there
    found.loader.exec_module(common)
    layer = nl.layers.Memory(8, 1, nl.memory.named("titans", key_dim=8, chunk=8))
    x = torch.randn(1, 400, 8)  # long enough for the layer to make its inputs again

    def run() -> None:
        layer(x)[0].sum().backward()

    with native.without(), pieces.whole(), FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        run()
    once = common.flops(run)
    assert 0 < once < counter.get_total_flops()
    x = torch.cat([x, x], 1)
    assert abs(common.flops(run) / once - 2) < 0.05  # and it grows as the text does
