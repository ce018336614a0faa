"""Every named model trains, on a text whose next token depends on the last."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestling as nl

NAMES = nl.models.names()


def chains(steps: int, lanes: int, time: int, vocab: int) -> Iterator[Tensor]:
    """Stretches of chains with two equally likely successors: ln 2 is the least loss, ln vocab that of the best unigram."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (lanes, 1), generator=generator)
    for _ in range(steps):
        for _ in range(time):
            fork = torch.randint(2, (lanes,), generator=generator)
            tokens = torch.cat([tokens, ((5 * tokens[:, -1] + 3 + 7 * fork) % vocab)[:, None]], 1)
        yield tokens[:, -time - 1 :]


def trained(model: nl.models.LanguageModel, stretches: Any, lr: float) -> list[float]:
    """Losses of a run whose lanes carry their state from step to step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    state, losses = None, []
    for tokens in stretches:
        logits, state = model(tokens[:, :-1], state)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert torch.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        state = nl.state.detach(state)
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(leaf).all() for leaf in nl.state.leaves(state))
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_a_model_trains(name: str) -> None:
    """Eighteen steps halve the loss of the best unigram. That every slow parameter has a gradient, the contracts test."""
    torch.manual_seed(0)
    settings = {"chunk": 8, "window": 8, "periods": (8,)}
    own = {k: v for k, v in settings.items() if k in nl.models.settings(name)}
    model = nl.models.build(name, vocab_size=16, dim=16, ffn=32, **own)
    losses = trained(model, chains(18, 8, 16, 16), lr=3e-2)
    unigram = torch.tensor(16.0).log()
    assert abs(losses[0] - unigram) < 0.1, "an untrained model knows nothing"
    assert sum(losses[-3:]) / 3 < unigram / 2


def test_the_gradient_does_not_grow_along_a_carried_lane_with_the_steps_of_orthogonalized_momentum() -> None:
    """They are of one size, whatever was read: where weights fade each turns them ever more, and a lane of some thousand tokens
    multiplied the gradient by a billion."""
    torch.manual_seed(0)
    model, state = nl.models.build("atlas"), None
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    for first in range(0, 2048, 256):
        tokens = torch.stack([text[lane + first : lane + first + 257] for lane in (0, 30_000)])
        with torch.set_grad_enabled(first == 1792):
            logits, state = model(tokens[:, :-1], state)
        state = nl.state.detach(state)
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) < 1000
