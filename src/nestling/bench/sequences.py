"""Synthetic sequences that ask for recall and for selection, after MAD (Poli et al. 2024).

Every function returns (tokens, targets, asked), each `[sequence, time]`: what is read, what follows it or is to be said there,
and where the answer is scored. Sequences are drawn afresh for every batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Sequences = tuple[Tensor, Tensor, Tensor]
Draw = Callable[[int, torch.Generator], Sequences]


def recall(count: int, generator: torch.Generator, *, vocabulary: int = 16, length: int = 64) -> Sequences:
    """Multi-query associative recall: length / 2 pairs of a key (lower half of the vocabulary) and its value (upper half), keys
    drawn evenly, each key with one value of its own in a sequence; the last key has been seen before.

    Targets are all next tokens, as in training there; asked is the value of a key that was seen before.
    """
    half, pairs = vocabulary // 2, length // 2
    values = torch.randint(half, vocabulary, (count, half), generator=generator)
    keys = torch.randint(half, (count, pairs), generator=generator)
    again = torch.randint(pairs - 1, (count, 1), generator=generator)
    keys[:, -1:] = keys.gather(1, again)
    text = torch.stack([keys, values.gather(1, keys)], 2).flatten(1)
    seen = (keys[:, :, None] == keys[:, None, :]).tril(-1).any(2)
    asked = torch.stack([seen, torch.zeros_like(seen)], 2).flatten(1)
    return text[:, :-1], text[:, 1:], asked[:, :-1]


def copying(
    count: int, generator: torch.Generator, *, vocabulary: int = 16, length: int = 64, content: int = 8
) -> Sequences:
    """Selective copying: `content` tokens among blanks at random places, the copy token, then as many blanks, at which the
    content is to be said in order. The last two of the vocabulary are blank and copy.

    Targets say blank where nothing is asked.
    """
    blank, copy = vocabulary - 2, vocabulary - 1
    room = length - content - 1
    said = torch.randint(blank, (count, content), generator=generator)
    places = torch.rand(count, room, generator=generator).argsort(1)[:, :content].sort(1).values
    tokens = torch.full((count, length), blank)
    tokens.scatter_(1, places, said)
    tokens[:, room] = copy
    targets = torch.full_like(tokens, blank)
    targets[:, room + 1 :] = said
    asked = torch.zeros_like(tokens, dtype=torch.bool)
    asked[:, room + 1 :] = True
    return tokens, targets, asked


def macro_accuracy(answers: Tensor, targets: Tensor, asked: Tensor) -> float:
    """Share of right answers for each token that is asked for, averaged over these tokens, as MAD scores."""
    right, wanted = (answers == targets)[asked].double(), targets[asked]
    shares = [float(right[wanted == token].mean()) for token in set(wanted.tolist())]
    return sum(shares) / len(shares)
