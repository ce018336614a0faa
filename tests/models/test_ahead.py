"""Blocks before the first that learns read many windows at once: against reading them window by window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling.models import windows

VOCAB = 19


def build() -> nl.models.LanguageModel:
    torch.manual_seed(0)
    model = nl.models.build(
        "ttt_e2e", dim=8, heads=2, layers=4, ffn=8, vocab_size=VOCAB, window=7, periods=[4, 8]
    ).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)
            if name.endswith("rate"):
                weight.fill_(0.5)
    assert model.still == 3
    return model


def read(model: nl.models.LanguageModel, cuts: list[int], lanes: int, **masks: Tensor) -> tuple[Tensor, Any]:
    tokens = torch.randint(VOCAB, (lanes, cuts[-1]), generator=torch.Generator().manual_seed(1))
    state, parts, first = None, [], 0
    for last in cuts:
        logits, state = model(tokens[:, first:last], state, **{name: u[:, first:last] for name, u in masks.items()})
        parts.append(logits)
        first = last
    return torch.cat(parts, 1), state


def everything(model: nl.models.LanguageModel, cuts: list[int]) -> list[Tensor]:
    """Logits, the state they leave, and the gradients of a loss on both."""
    model.zero_grad()
    logits, state = read(model, cuts, 2)
    found = [logits, *(x for x in nl.state.leaves(state) if x.is_floating_point())]
    generator = torch.Generator().manual_seed(2)
    loss = sum((u * torch.randn(u.shape, generator=generator, dtype=u.dtype)).sum() for u in found)
    assert isinstance(loss, Tensor)
    loss.backward()
    return [
        *(u.detach() for u in found),
        *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()),
    ]


@pytest.mark.parametrize("most", [2, 9, 99])
@pytest.mark.parametrize("cuts", [[25], [2, 22, 23], [4, 12, 27, 40], [3, 6, 30]])
def test_reading_ahead_changes_nothing(cuts: list[int], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole windows behind what an earlier call began, and before what the next one ends; with every gradient."""
    monkeypatch.setattr(windows, "AHEAD", most)
    model, counts = build(), []
    real = windows._read_ahead

    def counted(*given: Any) -> Any:
        hidden, state = real(*given)
        counts.append(len(hidden))
        return hidden, state

    monkeypatch.setattr(windows, "_read_ahead", counted)
    found = everything(model, cuts)
    assert sum(counts) >= 4
    assert max(counts) <= max(1, most // 4)
    monkeypatch.setattr(windows, "_whole_windows", lambda *_: range(0))
    wanted = everything(model, cuts)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-9, atol=1e-10 * max(1.0, float(w.abs().max())))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_every_mode(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    wanted, end = read(model, [2, 22, 29], 2)
    with mode():
        found, state = read(model, [2, 22, 29], 2)
        assert not found.requires_grad
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-10, atol=1e-10)
    for f, w in zip(nl.state.leaves(state), nl.state.leaves(end), strict=True):
        torch.testing.assert_close(f.clone(), w.detach(), rtol=1e-10, atol=1e-10)


def test_lanes_apart_resets_and_missing_tokens_are_read_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr(windows, "_read_ahead", None)
    with torch.no_grad():
        for name in ("reset", "valid"):
            mask = torch.ones(2, 24, dtype=torch.bool) if name == "valid" else torch.zeros(2, 24, dtype=torch.bool)
            mask[1, 9] = name == "reset"
            _, state = read(model, [24], 2, **{name: mask})
        model(torch.ones(2, 17, dtype=torch.int64), state)


def test_windows_are_differentiated_behind_what_was_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd would walk through all of it for every window, otherwise."""
    model, given = build(), []
    real = windows._leaves
    monkeypatch.setattr(windows, "_leaves", lambda weights, since: given.append(since) or real(weights, since))
    read(model, [24], 1)
    shapes = [tuple(x.shape) for since in given for x in nl.state.leaves(tuple(since))[-1:] if x.grad_fn is not None]
    assert shapes == [(1, 4, 8)] * 6
