"""What the benchmarks share."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nestling as nl
from nestling import native, processor
from nestling.memory import pieces
from nestling.memory.cost import FLOPS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark as a module, with what the benchmarks share; both are gone after the test."""
    for part in ("common", name):
        found = importlib.util.spec_from_file_location(part, BENCHMARKS / f"{part}.py")
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        monkeypatch.setitem(sys.modules, part, module)  # others import it there, and its dataclasses look there
        found.loader.exec_module(module)
    return module


TINY: dict[str, dict[str, Any]] = {
    "memory_speed": {
        "systems": ("omeganet_plain", "deltanet", "dot"),
        "lengths": (8, 16),
        "chunks": (4,),
        "dim": 8,
        "heads": 2,
        "seconds": 0.01,
    },
    "model_speed": {
        "models": ("hope", "retnet"),
        "shapes": ("1x64", "2x32"),
        "periods": (32, 64),
        "dim": 64,
        "layers": 1,
        "heads": 8,
        "seconds": 0.01,
    },
    "decode_speed": {
        "systems": ("titans",),
        "models": ("hope",),
        "size": "tiny",
        "early": 4,
        "late": 8,
        "cache": (4, 8),
        "dim": 8,
        "heads": 2,
        "chunk": 4,
        "rounds": 2,
    },
}


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From its settings to its table, file and plot, in all its modes."""
    module = load(name, monkeypatch)
    if hasattr(module, "matmul_rate"):
        monkeypatch.setattr(module, "matmul_rate", partial(module.matmul_rate, 64))
    with processor.training():  # which undoes what a benchmark sets for good
        module.main(module.Settings(**TINY[name], threads=1, out=tmp_path))
    rows = json.loads((tmp_path / f"{name}.json").read_text())
    assert rows
    assert name == "decode_speed" or list(tmp_path.glob("*.png"))


# All of them take seven minutes.
TRAINED = nl.models.names() if os.environ.get("NESTLING_DEEP") == "1" else ["gated_deltanet"]


@pytest.mark.parametrize("name", TRAINED)
def test_two_hundred_steps_on_text_fall_well_below_unigrams(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every loss, gradient, weight and state is finite, every slow parameter has a gradient, and no guard steps in."""
    module = load("model_training", monkeypatch)
    with processor.training(1):
        row = module.train(name, nl.stream.standard_library(), module.Settings())
    assert row["passed"], {key: row[key] for key in ("finite", "without_gradient", "share")}
    assert row["faults"] == 0


@pytest.mark.parametrize("name", ["hope", "titans_mag", "tnt", "transformer", "hope_attention", "dot"])
def test_steps_of_long_texts_are_counted_from_short_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, with levels, attention's window, persistent tokens and shards, and where the state grows with the text."""
    module = load("model_speed", monkeypatch)
    settings = module.Settings(dim=64, layers=1, heads=8, chunk=64, window=64, periods=(64, 128))
    language = module.model(name, settings, 768)
    tokens = torch.randint(257, (2, 769))  # six stretches of 128
    assert module.step_flops(language, tokens) == 2 * module.flops(module.step(language, tokens[:1]))


def test_flops_count_nothing_that_a_checkpoint_makes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound is what a layer's equations cost, whatever the engine makes twice to save memory."""
    common = load("common", monkeypatch)
    layer = nl.layers.Memory(8, 1, nl.memory.named("titans", key_dim=8, chunk=40))
    x = torch.randn(1, 400, 8)  # long enough for the layer to make its inputs again

    def run() -> None:
        layer(x)[0].sum().backward()

    with native.without(), pieces.whole(), FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        run()
    once = common.flops(run)
    assert 0 < once < counter.get_total_flops()
    x = torch.cat([x, x], 1)
    assert abs(common.flops(run) / once - 2) < 0.05  # and it grows as the text does
