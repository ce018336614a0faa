"""Measuring on documents: what every token cost, in nats, while the model read on with its memory running.

Several documents are read at once, a lane each; a lane whose document ends takes the next one, so the memory
needed does not depend on how many documents there are or how long they are (for models whose state is
constant). Every document starts from a fresh state (or from `start`); padding is masked with `valid` and
changes nothing. The inner loop runs as always; slow weights do not change.

    bits per byte = (sum of nats / ln 2) / (number of bytes the predicted tokens stand for)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling import state as fast
from nestling.stream import Document, Tokenizer


@dataclass(frozen=True)
class Passage:
    """One text to measure on: tokens int64 `[n]`, `<bos>` first, and the bytes of text that the other n − 1
    stand for.
    """

    name: str
    tokens: Tensor
    size: int


@dataclass(frozen=True)
class Score:
    """One passage as the model read it. Token 0 (`<bos>`) is never predicted, so n tokens have n − 1 entries.

    nats: `[reading, n − 1]` float64 on the CPU; nats[r, t] is the cost of token t + 1 in reading r.
    """

    index: int
    name: str
    nats: Tensor
    size: int

    def bits_per_byte(self, reading: int = 0) -> float:
        """nan for a passage without text."""
        return _ratio(float(self.nats[reading].sum()), self.size)


@dataclass
class _Reader:
    """What one lane is doing: which passage, and how far."""

    index: int
    passage: Passage
    nats: Tensor
    place: int = 0
    """Tokens fed so far, over all readings."""


def passages(documents: Iterable[Document], tokenizer: Tokenizer, limit: int | None = None) -> Iterator[Passage]:
    """Documents made ready for `evaluate`; of each at most the first `limit` bytes, cut between characters."""
    for document in documents:
        text = document.text
        data = text.encode("utf-8", "surrogatepass")
        if limit is not None and len(data) > limit:
            end = limit
            while end > 0 and data[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
            data = data[:end]
            text = data.decode("utf-8", "surrogatepass")
        tokens = torch.cat([torch.tensor([tokenizer.bos]), torch.from_numpy(tokenizer.encode(text))])
        yield Passage(document.name, tokens, len(data))


def finite(scores: Sequence[Score]) -> Sequence[Score]:
    """The same scores. Raises `LearningError` where a cost is not finite: means without it would say too little."""
    from nestling.learn.learner import LearningError  # which measures, too

    lost = [(score, int((~score.nats.isfinite()).sum())) for score in scores]
    lost = [(score, count) for score, count in lost if count]
    if lost:
        raise LearningError(
            f"evaluate: {sum(count for _, count in lost):,} costs in {len(lost)} of {len(scores)} documents are not finite, "
            f"first in {lost[0][0].name}: the model refuses tokens there, or its weights are damaged. Take another checkpoint."
        )
    return scores


def evaluate(
    model: nn.Module,
    documents: Iterable[Passage],
    *,
    lanes: int = 8,
    segment: int = 512,
    erase_every: int | None = None,
    readings: int = 1,
    start: Any = None,
) -> Iterator[Score]:
    """Read every document and yield its score as soon as it is finished (so not always in order; see `Score.index`).

    Args:
        model: on its device; C1. Nothing about it is changed.
        documents: taken one by one as lanes get free; see `passages`.
        lanes: documents read at once.
        segment: tokens per call; by C2 it changes no value, only speed and memory.
        erase_every: forget everything (a reset) before every so many tokens of a document; None: never.
        readings: how many times in a row a document is read, with the state carried from one reading to the next.
        start: a state of one lane in which every document is begun, instead of the start state.
    """
    for name, value in (
        ("lanes", lanes),
        ("segment", segment),
        ("erase_every", erase_every or 1),
        ("readings", readings),
    ):
        if value < 1:
            raise ValueError(f"evaluate: {name} is {value}, but expected 1 or more.")
    if start is not None and erase_every is not None:
        raise ValueError("evaluate: start and erase_every exclude each other, erasing would throw `start` away.")
    device = next(model.parameters()).device
    queue = enumerate(documents)
    readers: list[_Reader | None] = [None] * lanes
    state: Any = None
    while True:
        fresh = []
        for lane, reader in enumerate(readers):
            if reader is None and (item := next(queue, None)) is not None:
                readers[lane] = _open(*item, readings)
                fresh.append(lane)
        if all(reader is None for reader in readers):
            return
        if start is not None and fresh:
            state = _enter(state, start, fresh, lanes)

        tokens = torch.zeros(lanes, segment, dtype=torch.int64)
        targets = torch.full((lanes, segment), -100)
        reset = torch.zeros(lanes, segment, dtype=torch.bool)
        valid = torch.zeros(lanes, segment, dtype=torch.bool)
        spans = []
        for lane, reader in enumerate(readers):
            if reader is None:
                continue
            text = reader.passage.tokens
            n = len(text)
            place = torch.arange(reader.place, min(reader.place + segment, n * readings))
            size = len(place)
            tokens[lane, :size] = text[place % n]
            has_next = place % n < n - 1
            targets[lane, :size] = torch.where(has_next, text[(place + 1) % n], -100)
            if erase_every is not None:
                reset[lane, :size] = place % n % erase_every == 0
            reset[lane, 0] |= reader.place == 0 and start is None
            valid[lane, :size] = True
            spans.append((lane, reader, place, has_next))

        with torch.no_grad():
            logits, state = model(tokens.to(device), state, **masks(reset, valid, device))
            nats = token_nats(logits, targets.to(device)).double().cpu()
        for lane, reader, place, has_next in spans:
            n = len(reader.passage.tokens)
            reader.nats[place[has_next] // n, place[has_next] % n] = nats[lane, : len(place)][has_next]
            reader.place += len(place)
            if reader.place == n * readings:
                yield Score(reader.index, reader.passage.name, reader.nats, reader.passage.size)
                readers[lane] = None


def read(model: nn.Module, tokens: Tensor | Sequence[int], state: Any = None, *, segment: int = 512) -> Any:
    """The state after reading `tokens` in one lane, from `state` (None: the start state) on; in constant
    memory, segment by segment.
    """
    device = next(model.parameters()).device
    text = torch.as_tensor(tokens, dtype=torch.int64)[None]
    with torch.no_grad():
        for begin in range(0, max(text.shape[1], 1), segment):
            _, state = model(text[:, begin : begin + segment].to(device), state)
    return state


def masks(reset: Tensor, valid: Tensor, device: torch.device) -> dict[str, Tensor | None]:
    """The arguments `reset` and `valid` of a model, from masks on the CPU; None where they say nothing, which
    is faster.
    """
    return {
        "reset": reset.to(device) if bool(reset.any()) else None,
        "valid": None if bool(valid.all()) else valid.to(device),
    }


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """−ln p(target) `[lane, time]`, in at least float32, 0 where the target is −100. logits `[lane, time, vocab]`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return flat.view_as(targets)


def bits_per_byte(scores: Iterable[Score], reading: int = 0) -> float:
    """Over all bytes of all documents (long documents weigh more); nan if there are none."""
    pairs = [(float(score.nats[reading].sum()), score.size) for score in scores]
    return _ratio(sum(nats for nats, _ in pairs), sum(size for _, size in pairs))


def by_position(scores: Sequence[Score], edges: Sequence[int], reading: int = 0, *, slack: int = 0) -> Tensor:
    """Bits per byte by position in the document: float64 `[document, len(edges) − 1]`, one row a score, in the
    order given.

    Bin b holds the predicted tokens edges[b] … edges[b + 1] − 1 (0 is the first after `<bos>`); with the byte
    tokenizer these are bytes, with others a token counts for the document's bytes per token. A document that
    ends inside a bin is nan there, so that every row of a bin speaks of the same stretch and two runs can be
    compared document by document; but the last bin may lack up to `slack` tokens, as a document that is cut
    at so many bytes is cut between characters.
    """
    table = torch.full((len(scores), len(edges) - 1), math.nan, dtype=torch.float64)
    for row, score in enumerate(scores):
        nats = score.nats[reading]
        for b, (begin, end) in enumerate(itertools.pairwise(edges)):
            if b == len(edges) - 2 and end - slack <= len(nats):
                end = min(end, len(nats))
            if 0 <= begin < end <= len(nats):
                table[row, b] = float(nats[begin:end].mean()) * len(nats) / math.log(2) / score.size
    return table


def mean_and_error(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over documents, its standard error, and the number of documents, per column; nan entries are left out.

    The error is s/√n with the n − 1 sample deviation (nan for n < 2).
    """
    count = (~table.isnan()).sum(0)
    mean = table.nanmean(0)
    squares = (table - mean).square().nansum(0)
    error = (squares / (count - 1).clamp(min=1) / count.clamp(min=1)).sqrt()
    return mean, torch.where(count > 1, error, math.nan), count


def _open(index: int, passage: Passage, readings: int) -> _Reader:
    tokens = passage.tokens
    if tokens.ndim != 1 or len(tokens) == 0:
        raise ValueError(
            f"evaluate: {passage.name} has tokens {list(tokens.shape)}, but expected [n] with at least <bos>."
        )
    return _Reader(index, passage, torch.zeros(readings, len(tokens) - 1, dtype=torch.float64))


def _enter(state: Any, start: Any, fresh: list[int], lanes: int) -> Any:
    """`state` with the lanes in `fresh` replaced by `start`."""
    if state is None:
        return fast.repeat(start, lanes)
    parts = list(fast.split(state))
    for lane in fresh:
        parts[lane] = start
    return fast.stack(parts)


def _ratio(nats: float, size: int) -> float:
    return nats / math.log(2) / size if size else math.nan
