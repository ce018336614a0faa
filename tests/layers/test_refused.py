"""Layers that keep tokens: one that is not finite is as if it were not valid, is answered with NaN, and counts as a fault."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nestling as nl
from nestling.layers import Attention, Layer, Memory, MemoryAsContext, SelfModifying, SlidingAttention
from nestling.layers.lstm import LSTM
from nestling.learn.learner import count_faults
from nestling.testing import assert_close, assert_same

DIM, TIME, BAD = 8, 14, 5
LAYERS = {
    "attention": lambda: Attention(DIM, 2),
    "sliding attention": lambda: SlidingAttention(DIM, 2, 5),
    "lstm": lambda: LSTM(DIM),
    "memory as context": lambda: MemoryAsContext(
        DIM, 2, nl.memory.named("titans", key_dim=4, chunk=4), segment=4, persistent=2
    ),
    **{
        name: lambda name=name: Memory(DIM, 2, nl.memory.named(name, key_dim=4, chunk=4))
        for name in ("titans", "omeganet", "deep_transformer", "trellis", "tnt")
    },
    "retnet": lambda: Memory(DIM, 2, nl.memory.named("retnet", key_dim=4), width=3),
    "self-modifying": lambda: SelfModifying(
        DIM, 2, nl.memory.named("self_modifying", key_dim=4, chunk=4, unit_values=True)
    ),
}


def counted(state: Any) -> Any:
    """The part of a layer's state that has position and faults."""
    return state if hasattr(state, "faults") else state.memory


def without_faults(state: Any) -> Any:
    own = counted(state)._replace(faults=torch.zeros(2, dtype=torch.int64))
    return own if hasattr(state, "faults") else state._replace(memory=own)


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
        assert counted(new).faults.tolist() == [1, 0]
        assert_same(without_faults(new), without_faults(end))


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
    assert counted(state).faults.tolist() == [2, 0]
    first = nl.state.take(state, [0])
    if last:
        end = layer.start(1)
    assert counted(first).position.tolist() == counted(end).position.tolist()
    probe = torch.randn(1, 3, DIM, dtype=torch.float64)
    assert_close(layer(probe, first)[0], layer(probe, end)[0], "what follows")


@pytest.mark.parametrize("name", [name for name, make in LAYERS.items() if isinstance(make(), Memory | LSTM)])
def test_gradients_beside_such_a_token_are_those_without_it(name: str) -> None:
    layer, x = build(name)
    valid = torch.ones(2, TIME, dtype=torch.bool)
    valid[0, BAD] = False
    broken = x.clone()
    broken[0, BAD] = float("nan")
    found = []
    for y in (layer(x, valid=valid)[0], layer(broken)[0]):
        found.append(torch.autograd.grad(y[valid].square().sum(), list(layer.parameters()), allow_unused=True))
    for expected, gradient in zip(*found, strict=True):
        if expected is not None:
            assert_close(gradient, expected, "gradient")


@pytest.mark.parametrize("name", nl.models.names())
@torch.no_grad()
def test_a_model_goes_on_behind_such_a_token(name: str) -> None:
    """An embedding that overflows: the answers behind it are finite, and the learner is told."""
    torch.manual_seed(0)
    model = nl.models.build(name, dim=16, vocab_size=31, ffn=16)
    tokens = torch.randint(30, (2, 20))
    tokens[0, 7] = 30
    model.embedding.weight[30] = float("inf")
    logits, state = model(tokens)
    more, state = model(tokens[:, :3], state)
    assert logits[0, 7].isnan().all()
    assert torch.isfinite(logits[0, :7]).all()
    assert torch.isfinite(logits[0, 8:]).all()
    assert torch.isfinite(logits[1]).all()
    assert torch.isfinite(more).all()
    assert count_faults(state) > 0
