"""Writing: sample one token after another while the memory goes on learning from what is read and written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class GenerationError(RuntimeError):
    """Writing cannot go on; the message says why."""


def generate(
    model: nn.Module,
    prompt: Sequence[int],
    state: Any = None,
    *,
    count: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    banned: Sequence[int] = (),
    generator: torch.Generator | None = None,
    segment: int = 512,
) -> Iterator[tuple[int, Any]]:
    """Read `prompt` (at least one token) from `state` on, in one lane, then yield `count` pairs (token, state).

    The state that comes with a token has read everything *before* that token, and not yet the token itself: to
    go on later, start with `prompt=[token]` and that state.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: sample among the fewest tokens whose probabilities reach this sum.
        banned: tokens that are never sampled (such as `<bos>`, which no model is trained to predict).
        generator: on the CPU; the same seed gives the same text on one machine.

    Raises `GenerationError` behind a token that the model answers with what is not finite, as one that it refuses.
    """
    if not prompt:
        raise ValueError(
            "generate: the prompt is empty, but expected at least one token (a document starts with <bos>)."
        )
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"generate: temperature {temperature} must be finite and ≥ 0, and top_p {top_p} in (0, 1].")
    device = next(model.parameters()).device
    text = torch.as_tensor(prompt, dtype=torch.int64)[None]
    with torch.no_grad():
        for begin in range(0, text.shape[1], segment):
            logits, state = model(text[:, begin : begin + segment].to(device), state)
    token = int(text[0, -1])
    for left in range(count, 0, -1):
        answer = logits[0, -1].cpu()
        if bool((answer.isnan() | (answer == math.inf)).any()) or not bool(answer.isfinite().any()):
            raise GenerationError(
                f"generate: the model's answer to token {token} is not finite: its weights, or the state that it reads with, "
                "are damaged. Take another checkpoint, or begin with a fresh state."
            )
        token = pick(answer, temperature, top_p, banned, generator)
        yield token, state
        if left > 1:
            with torch.no_grad():
                logits, state = model(torch.tensor([[token]], device=device), state)


def pick(
    logits: Tensor, temperature: float, top_p: float, banned: Sequence[int], generator: torch.Generator | None
) -> int:
    """One token from the logits `[vocab]`; the arguments are those of `generate`."""
    logits = logits.double().clone()
    logits[list(banned)] = -math.inf
    if temperature == 0:
        return int(logits.argmax())
    # The largest first taken off, so that a tiny temperature makes no infinities.
    chances, tokens = torch.softmax((logits - logits.max()) / temperature, 0).sort(descending=True)
    # Keep a token while those before it have not reached top_p: the likeliest always stays.
    chances = torch.where(chances.cumsum(0) - chances < top_p, chances, 0.0)
    return int(tokens[torch.multinomial(chances, 1, generator=generator)])
