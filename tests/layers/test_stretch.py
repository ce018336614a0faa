"""Attention inside a stretch, where keys and values lie in one place, against the same calls outside of one."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import nestling as nl
from nestling import native
from nestling.layers import Attention, SlidingAttention, attention_back, stretch
from nestling.models import windows

Layer = Attention | SlidingAttention
NAMES = {"hope_attention": {}, "hope_swa": {"window": 7}, "ttt_e2e": {"window": 9, "periods": [4]}}
VOCAB = 31


def layer(window: int | None) -> Layer:
    torch.manual_seed(0)
    made = Attention(8, 2) if window is None else SlidingAttention(8, 2, window)
    return made.double()


def read(own: Layer, x: Tensor, cuts: list[int], state: Any, inside: bool) -> tuple[Tensor, Any]:
    parts = []
    with stretch.stretch(x.shape[1]) if inside else nullcontext() as kept:
        for first, last in itertools.pairwise(cuts):
            y, state = own(x[:, first:last], state)
            parts.append(y)
        return torch.cat(parts, 1), state if kept is None else kept.published(state)


def equal(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("carried", [0, 2, 11])
@pytest.mark.parametrize("window", [None, 1, 4, 5, 9, 40])
def test_calls_in_a_stretch_are_calls_with_every_gradient(
    window: int | None, carried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of the state at its start and from the state at its end; the way back in tiles that end anywhere."""
    monkeypatch.setattr(attention_back, "TILE", 3)
    own, rooms = layer(window), []
    monkeypatch.setattr(stretch, "Room", lambda *given: rooms.append(stretch_room(*given)) or rooms[-1])
    x = torch.randn(2, 24, 8, dtype=torch.float64, requires_grad=True)
    _, since = own(torch.randn(2, carried, 8, dtype=torch.float64))
    since = since._replace(key=since.key.detach().requires_grad_(), value=since.value.detach().requires_grad_())
    results = []
    for inside in range(3):  # out of one; in one, with the C code and without
        with native.without() if inside == 2 else nullcontext():
            y, state = read(own, x, [0, 4, 8, 9, 13, 17, 20, 24], since, inside > 0)
        generator = torch.Generator().manual_seed(1)
        outputs = [y, state.key, state.value]
        loss = sum((u * torch.randn(u.shape, generator=generator, dtype=u.dtype)).sum() for u in outputs)
        assert isinstance(loss, Tensor)
        asked = [x, since.key, since.value, *own.parameters()]
        with native.without() if inside == 2 else nullcontext():
            found = torch.autograd.grad(loss, asked, retain_graph=True, allow_unused=window == 1)
            again = torch.autograd.grad(loss, asked, allow_unused=window == 1)
        assert len(rooms) == inside, "keys and values lie in one place from the first call on"
        gradients = [g for g in found if g is not None]
        equal([g for g in again if g is not None], gradients)
        results.append([*outputs, state.position, *gradients])
    equal(results[1], results[0])
    equal(results[2], results[0])


stretch_room = stretch.Room


@pytest.mark.parametrize("window", [None, 6])
def test_a_state_that_goes_two_ways_goes_each_of_them(window: int | None) -> None:
    own = layer(window)
    x, other = (torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    results = []
    for inside in (False, True):
        with stretch.stretch(12) if inside else nullcontext():
            _, fork = own(x)
            y, left = own(x, fork)
            z, right = own(other, fork)
            first, last = own(x, left)[0], own(x, right)[0]
            gradients = torch.autograd.grad((first * last * y * z).sum(), [x, other])
        results.append([first, last, *gradients])
    equal(results[1], results[0])


@pytest.mark.parametrize("window", [None, 6])
def test_a_gradient_that_stops_at_a_tokens_own_call_goes_no_further(window: int | None) -> None:
    """What a window asks for: the history of the cache is there, and nobody waits for it."""
    own = layer(window)
    x = torch.randn(1, 12, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for inside in (False, True):
        with stretch.stretch(12) if inside else nullcontext():
            _, state = own(x[:, :8])
            last = x[:, 8:].detach().requires_grad_()
            y, _ = own(last, state)
            results.append([*torch.autograd.grad(y.square().sum(), [last], retain_graph=True)])
            results[-1] += torch.autograd.grad(y.square().sum(), [last, x])
    equal(results[1], results[0])


def test_what_is_left_of_a_stretch_is_no_view_of_it() -> None:
    for window in (None, 6, 1):
        _, state = read(layer(window), torch.randn(1, 12, 8, dtype=torch.float64), [0, 4, 8, 12], None, inside=True)
        for leaf in (state.key, state.value):
            assert leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size()


def build(name: str, **settings: Any) -> nl.models.LanguageModel:
    """A tiny float64 model whose levels take large steps."""
    torch.manual_seed(0)
    model = nl.models.build(name, dim=16, vocab_size=VOCAB, ffn=16, layers=2, **NAMES[name], **settings).double()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if path.endswith("rate"):
                weight.fill_(1.0)
            elif weight.dim() == 2:
                weight.mul_(6)
    return model


def everything(model: nl.models.LanguageModel, tokens: Tensor, cuts: list[int], **masks: Tensor) -> list[Tensor]:
    """Logits, the end state, and the gradients of a loss of both."""
    state, parts = None, []
    for first, last in itertools.pairwise(cuts):
        logits, state = model(tokens[:, first:last], state, **{k: m[:, first:last] for k, m in masks.items()})
        parts.append(logits)
    leaves = [leaf for leaf in nl.state.leaves(state) if leaf.is_floating_point()]
    generator = torch.Generator().manual_seed(2)
    outputs = [torch.cat(parts, 1), *leaves]
    if "valid" in masks:
        outputs[0] = torch.where(masks["valid"][..., None], outputs[0], 0.0)
    loss = sum((u * torch.randn(u.shape, generator=generator, dtype=u.dtype)).sum() for u in outputs if u.requires_grad)
    assert isinstance(loss, Tensor)
    return [*outputs, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_models_learn_alike_wherever_keys_lie(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any pieces, and with lanes that stand at other places."""
    model = build(name)
    tokens = torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(3))
    masks = {}
    if masked:
        masks = {
            "reset": torch.zeros_like(tokens, dtype=torch.bool),
            "valid": torch.ones_like(tokens, dtype=torch.bool),
        }
        masks["reset"][0, 6] = True
        masks["valid"][1, 9:11] = False
    for cuts in ([0, 30], [0, 3, 25, 30]):
        got = everything(model, tokens, cuts, **masks)
        with monkeypatch.context() as outside:
            outside.setattr(windows, "stretch", lambda _: nullcontext())
            want = everything(model, tokens, cuts, **masks)
        equal(got, want)


def test_attention_by_its_formula_is_differentiated_twice_in_a_stretch_too() -> None:
    own, x = layer(None), torch.randn(1, 8, 8, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH), stretch.stretch(8):
        _, state = own(x[:, :4])
        y, _ = own(x[:, 4:], state)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_refused_in_words(name: str) -> None:
    model = nl.models.build(name, dim=8, heads=2, layers=1, ffn=8, vocab_size=VOCAB, **NAMES[name])
    logits, _ = model(torch.randint(VOCAB, (1, 14), generator=torch.Generator().manual_seed(0)))
    gain = model.blocks[0].mixer_norm.weight
    (first,) = torch.autograd.grad(logits.square().sum(), gain, create_graph=True)
    with pytest.raises(RuntimeError, match="SDPBackend"):
        torch.autograd.grad(first.square().sum(), list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_may_be_checkpointed(name: str) -> None:
    """A block that is read again outside of the stretch gives the gradients that it gives inside."""
    torch.manual_seed(0)
    model = nl.models.build(name, dim=8, heads=2, layers=2, ffn=8, vocab_size=VOCAB, **NAMES[name]).double()
    tokens, found = torch.randint(VOCAB, (2, 21)), []
    for block in (None, *model.blocks):
        if block is not None:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            if block is not model.blocks[-1]:
                continue
        model.zero_grad()
        model(tokens)[0].square().sum().backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_sums_of_gradients_end_with_the_way_back() -> None:
    """Each text within a call has a room of its own: what they would hold on to grows with their number times the call."""
    own, x = layer(None), torch.randn(1, 24, 8, dtype=torch.float64, requires_grad=True)
    with stretch.stretch(24) as kept:
        assert kept is not None
        answers, state = [], own.start(1)
        for first in range(0, 24, 4):
            y, state = own(x[:, first : first + 4], own.start(1) if first % 8 == 0 else state)
            answers.append(y)
        torch.cat(answers, 1).square().sum().backward()
        assert len(kept._rooms) == 3
        assert all(room._sums is None for room in kept._rooms.values())
