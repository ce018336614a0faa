"""Layers that keep tokens: one that is not finite is as if it were not valid, is answered with NaN, and counts as a fault."""

from __future__ import annotations

import pytest
import torch

import nestling as nl
from nestling.layers import Attention, Layer, MemoryAsContext, SlidingAttention
from nestling.layers.lstm import LSTM
from nestling.testing import assert_close, assert_same

DIM, TIME, BAD = 8, 14, 5
LAYERS = {
    "attention": lambda: Attention(DIM, 2),
    "sliding attention": lambda: SlidingAttention(DIM, 2, 5),
    "lstm": lambda: LSTM(DIM),
    "memory as context": lambda: MemoryAsContext(
        DIM, 2, nl.memory.named("titans", key_dim=4, chunk=4), segment=4, persistent=2
    ),
}


def build(name: str) -> tuple[Layer, torch.Tensor]:
    torch.manual_seed(0)
    return LAYERS[name]().double(), torch.randn(2, TIME, DIM, dtype=torch.float64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e200])
@pytest.mark.parametrize("name", LAYERS)
def test_a_token_that_is_not_finite_is_as_if_not_valid(name: str, bad: float) -> None:
    layer, x = build(name)
    valid = torch.ones(2, TIME, dtype=torch.bool)
    valid[0, BAD] = False
    expected, end = layer(x, valid=valid)
    broken = x.clone()
    broken[0, BAD, 3] = bad
    state, outputs = None, []
    for part in torch.split(broken, [BAD - 1, 3, TIME - BAD - 2], 1):
        y, state = layer(part, state)
        outputs.append(y)
    for y, new in (layer(broken), (torch.cat(outputs, 1), state)):
        assert y[0, BAD].isnan().all()
        assert_close(y[valid], expected[valid], "answers")
        assert new.faults.tolist() == [1, 0]
        assert_same(new._replace(faults=end.faults), end)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("last", [False, True])
def test_a_reset_at_such_a_token_goes_to_the_next_one(name: str, last: bool) -> None:
    layer, x = build(name)
    time = BAD + 1 if last else TIME
    x = x[:, :time]
    x[0, BAD - 1 : BAD + 1] = float("nan")
    reset, valid = torch.zeros(2, time, dtype=torch.bool), torch.ones(2, time, dtype=torch.bool)
    reset[0, 2] = reset[0, BAD - 1] = True
    valid[1, 3] = False
    y, state = layer(x, reset=reset, valid=valid)
    alone, end = layer(x[:1, BAD + 1 :])
    assert_close(y[:1, BAD + 1 :], alone, "answers")
    assert state.faults.tolist() == [2, 0]
    first = nl.state.take(state, [0])
    if last:
        end = layer.start(1)
    assert first.position.tolist() == end.position.tolist()
    if not last:
        assert_close(layer(x[:1, -3:], first)[0], layer(x[:1, -3:], end)[0], "what follows")


def test_a_model_goes_on_behind_such_a_token() -> None:
    """An embedding that overflows: the answers behind it are finite, and the learner is told."""
    torch.manual_seed(0)
    model = nl.models.build("transformer", "tiny")
    tokens = torch.randint(200, (2, 20))
    tokens[0, 7] = 250
    with torch.no_grad():
        model.embedding.weight[250] = float("inf")
        logits, state = model(tokens)
        more, state = model(tokens[:, :3], state)
    assert logits[0, 7].isnan().all()
    assert torch.isfinite(logits[0, 8:]).all()
    assert torch.isfinite(logits[1]).all()
    assert torch.isfinite(more).all()
    faults = [leaf for block in state.blocks for leaf in block.faults.tolist()]
    assert sum(faults) > 0
