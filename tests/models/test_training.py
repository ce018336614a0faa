"""Every named model trains, on a text whose next token depends on the last, and, in the deep profile, on real text."""

from __future__ import annotations

import os
from collections.abc import Iterator
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


def real_text(steps: int, lanes: int, time: int) -> tuple[Tensor, float]:
    """Stretches `[step, lane, time + 1]` of the embedded corpus, and the entropy of their bytes in nats."""
    text = "".join(document.text for document in nl.stream.corpus.standard_library().train[:40]).encode()
    rows = torch.frombuffer(bytearray(text[: lanes * (len(text) // lanes)]), dtype=torch.uint8).view(lanes, -1).long()
    stretches = rows[:, : steps * time + 1].unfold(1, time + 1, time).transpose(0, 1)
    share = torch.bincount(stretches.flatten()).double() / stretches.numel()
    return stretches, float(-torch.xlogy(share, share).sum())


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


@pytest.mark.skipif(os.environ.get("NESTLING_DEEP") != "1", reason="long: runs in the deep profile")
@pytest.mark.parametrize("name", NAMES)
def test_a_model_trains_on_real_text(name: str) -> None:
    """200 steps of 8 lanes of 64 bytes of Python's standard library."""
    torch.manual_seed(0)
    stretches, unigram = real_text(200, 8, 64)
    losses = trained(nl.models.build(name, "tiny"), stretches, lr=1e-2)
    final = sum(losses[-20:]) / 20
    print(f"{name}: {final:.3f} nats a byte, unigram {unigram:.3f}")
    assert final < unigram - 0.3
