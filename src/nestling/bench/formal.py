"""Formal languages: a model reads a word and says at every symbol whether what it has read belongs to the language.

After the construction of Irie, Csordás and Schmidhuber (2023), which *Nested Learning* (Table 5) follows: only words of the
language occur, and a word counts as right only if the answers at all its symbols are. Training words and bin 0 have up to 50
symbols, bin 1 has longer ones, so that nothing but the rule itself helps there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SHORT, LONG = (2, 50), (52, 100)
"""Fewest and most symbols of a word in training and bin 0, and in bin 1."""
UNSCORED = -100
"""Where a target asks for nothing."""

Word = tuple[int, ...]


@dataclass(frozen=True)
class Language:
    """A regular language.

    draw    a word of at least and at most so many symbols, or None where the draw came out shorter or longer
    labels  of the prefixes of a word, each 0 or 1
    size    how many words of at least and at most so many symbols there are, as far as it matters
    """

    title: str
    draw: Callable[[torch.Generator, int, int], Word | None]
    labels: Callable[[Word], Sequence[int]]
    size: Callable[[int, int], float]


def _parity(generator: torch.Generator, least: int, most: int) -> Word | None:
    """0 and 1 with probability p each, the end with 1 − 2p, p = L/(2(1 + L)) with L in the middle of the lengths; a 1 more makes
    an odd number of them even.
    """
    middle = (least + most) / 2
    length = 0
    while float(torch.rand((), generator=generator)) < middle / (1 + middle):
        length += 1
    word = torch.randint(2, (length,), generator=generator).tolist()
    word += [1] * (sum(word) % 2)
    return tuple(word) if least <= len(word) <= most else None


def _even(generator: torch.Generator, least: int, most: int) -> Word:
    """As many a (0), an even number."""
    first, last = -(-least // 2), most // 2
    return (0,) * (2 * int(torch.randint(first, last + 1, (), generator=generator)))


def _parities(word: Word) -> list[int]:
    return (1 - torch.tensor(word).cumsum(0) % 2).tolist()


LANGUAGES = {
    "parity": Language("Parity", _parity, _parities, lambda least, most: math.inf),
    "aa": Language(
        "(aa)*",
        _even,
        lambda word: [n % 2 for n in range(len(word))],
        lambda least, most: most // 2 - -(-least // 2) + 1,
    ),
}
"""By the name on the command line."""


@dataclass(frozen=True)
class Words:
    """What one run trains and is tested on: training words, bin 0, bin 1."""

    language: Language
    train: tuple[Word, ...]
    bins: tuple[tuple[Word, ...], tuple[Word, ...]]


def words(language: Language, seed: int, *, train: int = 10_000, test: int = 2_000) -> Words:
    """Distinct words, those of bin 0 not among the training words, as long as the language has enough of them; where it has
    not (all (aa)* of up to 50 symbols are 25) both are all there are.
    """
    generator = torch.Generator().manual_seed(seed)

    def distinct(count: int, least: int, most: int) -> list[Word]:
        found: dict[Word, None] = {}
        while len(found) < min(count, language.size(least, most)):
            if (word := language.draw(generator, least, most)) is not None:
                found[word] = None
        return list(found)

    short, long = distinct(train + test, *SHORT), distinct(test, *LONG)
    enough = len(short) == train + test
    return Words(language, tuple(short[:train]), (tuple(short[train:] if enough else short), tuple(long)))


def batch(language: Language, chosen: Sequence[Word]) -> tuple[Tensor, Tensor]:
    """Tokens and targets `[word, symbol]`, filled up at the end: tokens with 0, targets with `UNSCORED`."""
    shape = len(chosen), max(map(len, chosen))
    tokens, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, UNSCORED)
    for row, word in enumerate(chosen):
        tokens[row, : len(word)] = torch.tensor(word)
        targets[row, : len(word)] = torch.tensor(language.labels(word))
    return tokens, targets


def batches(language: Language, chosen: Sequence[Word], size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training words drawn evenly, without end, those of similar length together: of every 8 · size words drawn the
    shortest make a batch, then the next, and the batches come in any order.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = [chosen[n] for n in torch.randint(len(chosen), (8 * size,), generator=generator).tolist()]
        drawn.sort(key=len)
        for n in torch.randperm(8, generator=generator).tolist():
            yield batch(language, drawn[n * size : (n + 1) * size])


@torch.no_grad()
def share_right(model: nn.Module, language: Language, chosen: Sequence[Word], *, at_once: int = 500) -> float:
    """Share of the words at all whose symbols the model's likelier label, 0 or 1, is the right one."""
    right = 0
    for first in range(0, len(chosen), at_once):
        tokens, targets = batch(language, chosen[first : first + at_once])
        logits, _ = model(tokens)
        answers = logits[..., :2].argmax(-1)
        right += int(((answers == targets) | (targets == UNSCORED)).all(1).sum())
    return right / len(chosen)
