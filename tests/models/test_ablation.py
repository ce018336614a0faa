"""The paper's ablation of Hope by settings alone (Nested Learning, Table 6), and the other settings of its memories."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestling as nl
from nestling.memory import Decay, DeltaGradient, Full, Gradient, Matrix, Momentum
from nestling.models.zoo.hope import ABLATION

OTHERS: dict[str, dict[str, Any]] = {
    "matrices, two chunks": {"network": "matrix", "chunk": 6, "chunk_others": 4},
    "everything off": {"dgd": False, "decay": False, "adaptive": [], "periods": []},
}
ROWS = ABLATION | OTHERS


def build(row: str) -> nl.models.LanguageModel:
    torch.manual_seed(0)
    model = nl.models.build("hope", dim=16, layers=1, heads=2, vocab_size=31, ffn=16, **ROWS[row]).double()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(6)
    return model


def text(seed: int, lanes: int, time: int) -> Tensor:
    return torch.randint(31, (lanes, time), generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("row", ABLATION)
def test_every_row_is_built_as_large_as_the_others(row: str) -> None:
    with torch.device("meta"):
        for size in ("tiny", "small"):
            model, target = nl.models.build("hope", size, **ABLATION[row]), nl.models.build("transformer", size)
            count, wanted = (sum(p.numel() for p in m.parameters()) for m in (model, target))
            assert abs(count / wanted - 1) < 0.02


def test_rows_differ_in_the_one_thing_that_they_name() -> None:
    found = {}
    for row, settings in ABLATION.items():
        block = nl.models.build("hope", ffn=32, **settings).blocks[0]
        spec = block.mixer.spec
        found[row] = {
            "rule": spec.rule,
            "retention": spec.retention,
            "static": spec.static,
            "adaptive_q": spec.adaptive_q,
            "periods": block.ffn.periods,
        }
    full = {
        "rule": DeltaGradient(with_momentum=True),
        "retention": Decay(),
        "static": (),
        "adaptive_q": True,
        "periods": (4, 8),
    }
    changes = {
        "Hope": {},
        "without DGD": {"rule": Momentum()},
        "without momentum": {"rule": DeltaGradient()},
        "without weight decay": {"retention": Full()},
        "without CMS": {"periods": (None,)},
        "without inner projection k": {"static": ("k",)},
        "without inner projection v": {"static": ("v",)},
        "without inner projection q": {"adaptive_q": False},
    }
    assert found == {row: full | change for row, change in changes.items()}


def test_the_table_in_the_guide_is_the_one_that_is_built() -> None:
    page = Path(__file__).parents[2] / "docs" / "ablation.md"
    rows = re.findall(r"^\| ([^|]+) \| `(\{.*\})` \|$", page.read_text(), re.MULTILINE)
    assert {row: json.loads(settings) for row, settings in rows} == ABLATION


def test_the_default_is_the_papers_model_and_other_settings_are_what_they_say() -> None:
    spec = nl.models.build("hope", ffn=32).blocks[0].mixer.spec
    assert (spec.rule, spec.retention, spec.adaptive_q, spec.static) == (DeltaGradient(), Decay(), False, ())
    assert [bank.chunk for bank in spec.banks] == [4, 4]
    model = nl.models.build("hope", ffn=32, **OTHERS["matrices, two chunks"])
    assert [bank.chunk for bank in model.blocks[0].mixer.spec.banks] == [4, 6]
    assert all(isinstance(bank.network, Matrix) for bank in model.blocks[0].mixer.spec.banks)
    periods = {level.name: str(level.period) for level in nl.models.levels(model)}
    assert periods["blocks.0.mixer.generators"] == "4 tokens"
    assert periods["blocks.0.mixer.memory"] == "6 tokens"
    plain = nl.models.build("hope", ffn=32, **OTHERS["everything off"])
    assert plain.blocks[0].mixer.spec.rule == Gradient()
    assert plain.window is None


@pytest.mark.parametrize("row", ROWS)
@torch.no_grad()
def test_splits_ragged_lanes_and_resets_inside_a_call(row: str) -> None:
    model, tokens, generator = build(row), text(1, 2, 15), torch.Generator().manual_seed(2)
    reset, valid = (torch.rand(2, 15, generator=generator) < p for p in (0.12, 0.8))
    whole, end = model(tokens, reset=reset, valid=valid)
    for bounds in ([0, 6, 15], list(range(16))):
        state, parts = None, []
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):  # noqa: RUF007
            now = {"reset": reset[:, first:last], "valid": valid[:, first:last]}
            logits, state = model(tokens[:, first:last], state, **now)
            parts.append(logits)
        close(torch.cat(parts, 1)[valid], whole[valid])
        for a, b in zip(nl.state.leaves(state), nl.state.leaves(end), strict=True):
            close(a, b)


@pytest.mark.parametrize("row", ROWS)
def test_gradients_reach_every_slow_parameter(row: str) -> None:
    model, state = build(row), None
    for seed in range(2):
        model.zero_grad()
        tokens, reset = text(seed, 2, 14), torch.zeros(2, 14, dtype=torch.bool)
        reset[0, 5] = True
        logits, state = model(tokens, state, reset=reset)
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        state = nl.state.detach(state)
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            assert torch.isfinite(weight.grad).all(), name
            assert weight.grad.abs().max() > 0, name


def extremes(average: bool, lr_max: float | None = None, **settings: Any) -> tuple[float, float, int]:
    """The largest weights of a layer after 12 chunks, at gates that are nearly 0 or 1, by the largest at first; the largest
    answer; and faults. Heads have each combination of gates; lanes read one input again and again, and inputs by chance.
    """
    torch.manual_seed(0)
    layer = nl.models.build("hope", dim=32, layers=1, heads=8, ffn=16, chunk=16, **settings).blocks[0].mixer
    layer.spec = replace(layer.spec, average=average, lr_max=lr_max)
    signs = 10.0 * torch.tensor(list(itertools.product([-1, 1], repeat=3)))
    with torch.no_grad():
        for name, w in zip(layer.spec.names, layer.initial, strict=True):
            gate, _, kind = name.rpartition(".")
            if kind == "weight":
                w.zero_()
            elif kind == "bias":
                w.copy_(signs[:, ["lr", "retention"].index(gate), None, None])
        if layer.gates is not None:
            layer.gates.weight.zero_()
            layer.gates.bias.copy_(signs[:, 2])
        x = torch.randn(2, 192, 32)
        x[0] = x[0, 0]
        first = max(w.abs().max() for w in layer.start(1).memory.weights)
        y, state = layer(x)
        largest = max(w.abs().max() for w in (*state.memory.weights, *state.memory.momentum))
    return float(largest / first), float(y.abs().max()), int(state.memory.faults.sum())


@pytest.mark.parametrize("row", ABLATION | {"default": {}, "gradient": {}, "momentum": {}})
def test_gates_at_their_extremes_leave_memories_bounded(row: str) -> None:
    """At an anchor the steps of a chunk add up, and momentum repeats each of them: what a training run found."""
    own: dict[str, dict[str, Any]] = {"default": {}, "gradient": {"dgd": False}, "momentum": {"momentum": True}}
    settings = (ABLATION | own)[row]
    growth, answer, faults = extremes(True, **settings)
    assert growth < 5
    assert answer < 1
    assert faults == 0


def test_momentum_as_a_sum_of_steps_leaves_its_region() -> None:
    growth, _, faults = extremes(False, momentum=True)
    assert growth > 1e6
    assert faults > 0


def test_impossible_settings_are_refused_in_words() -> None:
    for settings, words in (
        ({"network": "tree"}, "network is 'tree'; expected mlp or matrix"),
        ({"momentum": 0.9}, "momentum is 0.9; expected false or true"),
        ({"dgd": 1}, "dgd is 1; expected true or false"),
        ({"adaptive": ["k", "lr"]}, "expected a list of some of k, v, q"),
        ({"adaptive": "kv"}, "expected a list of some of k, v, q"),
        ({"chunk_others": 0}, "chunk_others is 0; expected a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            nl.models.build("hope", **settings)
