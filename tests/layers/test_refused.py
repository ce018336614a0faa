"""Layers that keep tokens: one that is not finite is as if it were not valid, is answered with NaN, and counts as a fault."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nestling as nl
from nestling.layers import (
    Attention,
    Layer,
    Memory,
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
    SelfModifying,
    SlidingAttention,
)
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
    **{
        name: lambda layer=layer: layer(DIM, 2, nl.memory.named("titans", key_dim=4, chunk=4), window=5, persistent=2)
        for name, layer in (("memory as gate", MemoryAsGate), ("memory as layer", MemoryAsLayer))
    },
    "self-modifying": lambda: SelfModifying(
        DIM, 2, nl.memory.named("self_modifying", key_dim=4, chunk=4, unit_values=True)
    ),
}


def counted(state: Any) -> Any:
    """The part of a layer's state that has position and faults."""
    return state if hasattr(state, "faults") else getattr(state, "attention", state.memory)


def without_faults(state: Any) -> Any:
    own = counted(state)._replace(faults=torch.zeros(2, dtype=torch.int64))
    if hasattr(state, "faults"):
        return own
    return state._replace(attention=own) if hasattr(state, "attention") else state._replace(memory=own)


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_beside_such_a_token_are_those_without_it(name: str, bad: float) -> None:
    """Also where the caller has left it out already."""
    layer, x = build(name)
    valid = torch.ones(2, TIME, dtype=torch.bool)
    valid[0, BAD] = False
    broken = x.clone()
    broken[0, BAD] = bad
    found = []
    for given, mask in ((x, valid), (broken, None), (broken, valid)):
        given = given.clone().requires_grad_()
        y = layer(given, valid=mask)[0]
        own = torch.autograd.grad(y[valid].square().sum(), [given, *layer.parameters()], allow_unused=True)
        found.append(own)
    expected, *others = found
    assert any(gradient is not None and gradient.any() for gradient in expected[1:])
    for gradients in others:
        assert not gradients[0][0, BAD].any()
        for wanted, gradient in zip(expected, gradients, strict=True):
            if wanted is not None:
                assert_close(gradient, wanted, "gradient")


def model_of(name: str) -> tuple[nl.models.LanguageModel, torch.Tensor]:
    """A model, and text with two tokens whose embedding overflows, the first behind a lane's start."""
    torch.manual_seed(0)
    model = nl.models.build(name, dim=16, vocab_size=31, ffn=16).double()
    tokens = torch.randint(30, (3, 14))
    tokens[0, 7] = tokens[0, 10] = tokens[2, 0] = 30
    with torch.no_grad():
        model.embedding.weight[30] = torch.tensor([float("inf"), float("nan")]).repeat(8)
    return model, tokens


@pytest.mark.parametrize("name", nl.models.names())
def test_a_model_reads_as_if_such_a_token_were_missing(name: str) -> None:
    """Answers, state and gradients, also where levels learn from windows; the learner is told."""
    model, tokens = model_of(name)
    valid = tokens != 30
    found = []
    for text, mask in ((tokens.masked_fill(~valid, 3), valid), (tokens, None), (tokens, valid)):
        logits, state = model(text, valid=mask)
        loss = logits[valid].log_softmax(-1)[:, 3].mean()
        found.append((logits, state, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    (expected, end, gradients), *others = found
    assert all(g is None or g.isfinite().all() for g in gradients)
    for refused, (logits, state, others_gradients) in zip(([2, 0, 1], [0, 0, 0]), others, strict=True):
        assert_close(logits[valid], expected[valid], "answers")
        assert logits[~valid].isnan().all() or not any(refused)
        assert state.refused.tolist() == refused
        assert count_faults(state) == sum(refused)
        assert_same(state._replace(refused=end.refused), end)
        for mine, other in zip(others_gradients, gradients, strict=True):
            if other is not None:
                assert_close(mine, other, "gradient")
    with torch.no_grad():
        state, outputs = None, []
        for part in torch.split(tokens, [1, 7, 6], 1):
            y, state = model(part, state)
            outputs.append(y)
    assert_close(torch.cat(outputs, 1)[valid], expected[valid], "answers in pieces")
    assert state.refused.tolist() == [2, 0, 1]
    assert_same(state._replace(refused=end.refused), end)


@pytest.mark.parametrize("name", ["hope", "titans_mal", "swa_transformer"])
@torch.no_grad()
def test_a_reset_at_a_token_that_a_model_refuses(name: str) -> None:
    model, tokens = model_of(name)
    reset = torch.zeros_like(tokens, dtype=torch.bool)
    reset[0, 7] = True
    logits, state = model(tokens, reset=reset)
    alone, end = model(tokens[:1, 8:])
    assert_close(logits[0, 8:][tokens[0, 8:] != 30], alone[0][tokens[0, 8:] != 30], "answers")
    assert state.refused.tolist() == [2, 0, 1]
    assert_same(nl.state.take(state, [0])._replace(refused=end.refused), end)

    _, ended = model(tokens[:, :8], reset=reset[:, :8])
    first = nl.state.take(ended, [0])
    assert first.refused.tolist() == [1]
    assert_same(first._replace(refused=torch.zeros(1, dtype=torch.int64)), model.start(1))

    report = nl.Report()
    logits, state = model(tokens[:, 7:8], ended._replace(refused=None), report=report)
    assert logits[0].isnan().all()
    assert state.refused.tolist() == [1, 0, 0], "a state from a file of before goes on"
    assert report["embedding"]["faults"].tolist() == [1, 0, 0]
    only, state = model(tokens[:1, 7:8])
    assert only.isnan().all()
    assert_same(state._replace(refused=torch.zeros(1, dtype=torch.int64)), model.start(1))


@pytest.mark.parametrize("name", ["hope", "hope_attention", "hope_swa", "ttt_e2e"])
@torch.no_grad()
def test_what_overflows_between_layers_costs_its_lane_one_window_of_learning_and_no_other_answer(name: str) -> None:
    """The layers below have read the token, so that it is part of its window."""
    model, _ = model_of(name)
    assert model.window is not None
    first, second, third = torch.split(torch.randint(30, (2, 3 * model.window)), model.window, 1)
    _, before = model(first)
    expected, calm = model(second, before)

    def spoil(_: Any, given: Any) -> Any:
        x = given[0].clone()
        x[0, 1, 3] = float("inf")
        return (x, *given[1:])

    with model.each()[-1].register_forward_pre_hook(spoil):
        logits, state = model(second, before)
    assert logits[0, 1].isnan().all()
    assert_close(logits[0, 0], expected[0, 0], "the token before")
    assert logits[0, 2:].isfinite().all()
    assert_close(logits[1], expected[1], "the other lane")
    for number, old, new, other in zip(model.learning, before.continuum, state.continuum, calm.continuum, strict=True):
        periods = model.continuum(number).periods
        assert new.faults.tolist() == [len([period for period in periods if period is not None]), 0]
        fast = periods.index(model.window)  # a slower one moves by what it has summed up before
        assert_same(*(nl.state.take(c.delta[fast], [0]) for c in (new, old)))
        assert (other.delta[fast][0][0] != old.delta[fast][0][0]).any()
        assert_same(*(nl.state.take(c, [1]) for c in (new, other)))
    assert state.refused.tolist() == [0, 0]
    logits, last = model(third, state)
    assert logits.isfinite().all()
    assert any(
        (a[0] != b[0]).any() for a, b in zip(*map(nl.state.leaves, (last.continuum, state.continuum)), strict=True)
    )
