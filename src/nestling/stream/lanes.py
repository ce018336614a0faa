"""Ordered lanes: every lane reads whole documents, in order, one after the other; nothing is shuffled inside.

A memory that learns while it reads needs contiguous text and knows where a document starts. In each pass the documents are put
in a new seeded order and dealt out; a lane that finishes its document takes the next undealt one. Every document opens with
`<bos>`, so each of its tokens is predicted, the first one included; `<bos>` itself is never a target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nestling.stream.corpus import Document
from nestling.stream.tokenizer import Tokenizer

Reset = Literal["document", "segment", "never"]


class StreamError(ValueError):
    """A stream that cannot be made or restored; the message says why."""


@dataclass(frozen=True)
class Batch:
    """Tokens of all lanes, each `[lane, time]`.

    tokens     int64
    targets    int64, the token that follows
    reset      bool, the lane starts afresh before this token
    valid      bool, there is a token (always, unless documents are aligned)
    loss_mask  bool, the target is to be predicted: not the next document's `<bos>`
    """

    tokens: Tensor
    targets: Tensor
    reset: Tensor
    valid: Tensor
    loss_mask: Tensor


class Lanes:
    """An endless stream of batches: `next(lanes)`.

    Args:
        documents: what to read.
        tokenizer: encodes them, once, here.
        lanes, length: shape of a batch.
        reset: "document": at every `<bos>`; "segment": also every `segment` tokens, counted from the document's start; "never":
            only at the very first token of each lane.
        seed: of the orders of documents.
        segment: see reset.
        max_document: longer documents are cut into several of at most so many tokens, `<bos>` included.
        align: documents start at a multiple of so many tokens in a batch, which divides length; the gap before is not valid.
            Lanes whose memories act every `align` tokens then do so side by side, which is much faster.

    Raises StreamError for impossible settings.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        lanes: int,
        length: int,
        *,
        reset: Reset = "document",
        seed: int = 0,
        segment: int | None = None,
        max_document: int | None = None,
        align: int = 1,
    ) -> None:
        for name, number, least in (
            ("lanes", lanes, 1), ("length", length, 1), ("segment", segment, 1), ("max_document", max_document, 2),
            ("align", align, 1),
        ):  # fmt: skip
            if number is not None and number < least:
                raise StreamError(f"{name} is {number}; expected at least {least}")
        if length % align:
            raise StreamError(f"align is {align} and length {length}; expected a length that is a multiple of align")
        if segment is not None and segment % align:
            raise StreamError(f"align is {align} and segment {segment}; expected a segment that is a multiple of align")
        if reset not in ("document", "segment", "never"):
            raise StreamError(f"reset is {reset!r}; expected 'document', 'segment' or 'never'")
        if (reset == "segment") != (segment is not None):
            raise StreamError(
                f"reset is {reset!r} and segment is {segment}: give a segment length with reset='segment' only"
            )
        kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
        pieces: list[NDArray[Any]] = []
        for document in documents:
            tokens = tokenizer.encode(document.text).astype(kind)
            step = len(tokens) if max_document is None else max_document - 1
            pieces.extend(tokens[at : at + step] for at in range(0, len(tokens), max(step, 1)))
        if not pieces:
            raise StreamError("there is no text to stream: all documents are empty")
        self.lanes, self.length, self.reset, self.seed, self.segment = lanes, length, reset, seed, segment
        self.align = align
        self.bos = tokenizer.bos
        sizes = np.array([len(piece) + 1 for piece in pieces])
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self._tokens = np.empty(int(self._ends[-1]), dtype=kind)
        for start, piece in zip(self._starts, pieces, strict=True):
            self._tokens[start] = self.bos
            self._tokens[start + 1 : start + 1 + len(piece)] = piece
        settings = repr((lanes, length, reset, seed, segment, align, tokenizer.digest()))
        self._digest = hashlib.sha256(settings.encode() + sizes.tobytes() + self._tokens.tobytes()).hexdigest()
        self._pass, self._dealt = 0, 0
        self._order = self._shuffle(0)
        self._document = [-1] * lanes
        self._offset = [0] * lanes
        self._read = 0
        for lane in range(lanes):
            self._deal(lane)

    @property
    def tokens_per_pass(self) -> int:
        """Tokens of all documents once, `<bos>` included."""
        return len(self._tokens)

    def __iter__(self) -> Lanes:
        return self

    def __next__(self) -> Batch:
        tokens = np.full((self.lanes, self.length + 1), self.bos, dtype=np.int64)
        within = np.full((self.lanes, self.length), -1, dtype=np.int64)  # place inside the document, −1 in a gap
        for lane in range(self.lanes):
            filled = 0
            while filled < self.length:
                document, offset = self._document[lane], self._offset[lane]
                first, last = int(self._starts[document]) + offset, int(self._ends[document])
                count = min(self.length - filled, last - first)
                tokens[lane, filled : filled + count] = self._tokens[first : first + count]
                within[lane, filled : filled + count] = np.arange(offset, offset + count)
                filled += count
                self._offset[lane] += count
                if first + count == last:
                    self._deal(lane)
                    filled += -filled % self.align
            # What follows the last token is known already: the same document, or the <bos> of the next.
            tokens[lane, self.length] = self._tokens[self._starts[self._document[lane]] + self._offset[lane]]
        reset = within == 0
        if self.reset == "segment":
            assert self.segment is not None
            reset = (within >= 0) & (within % self.segment == 0)
        elif self.reset == "never":
            reset = np.zeros_like(reset)
            reset[:, 0] = self._read == 0
        self._read += 1
        whole = torch.from_numpy(tokens)
        targets = whole[:, 1:].contiguous()
        return Batch(
            tokens=whole[:, :-1].contiguous(),
            targets=targets,
            reset=torch.from_numpy(reset),
            valid=torch.from_numpy(within >= 0),
            loss_mask=targets != self.bos,
        )

    def state_dict(self) -> dict[str, Any]:
        """The cursor, as JSON values."""
        return {
            "digest": self._digest,
            "pass": self._pass,
            "dealt": self._dealt,
            "document": list(self._document),
            "offset": list(self._offset),
            "read": self._read,
        }

    def load_state_dict(self, cursor: Mapping[str, Any]) -> None:
        """Go to a saved cursor. Raises StreamError where it belongs to other text or settings, or is damaged."""
        if cursor.get("digest") != self._digest:
            raise StreamError(
                "the saved place in the text belongs to other text or other stream settings (lanes, length, reset, seed, "
                "tokenizer): resume with the data and settings that the run started with"
            )
        try:
            number, dealt, read = (int(cursor[name]) for name in ("pass", "dealt", "read"))
            documents, offsets = ([int(x) for x in cursor[name]] for name in ("document", "offset"))
        except (KeyError, TypeError, ValueError) as error:
            raise StreamError(f"the saved place in the text is damaged: {error!r}") from error
        sizes = self._ends - self._starts
        fits = len(documents) == len(offsets) == self.lanes and 0 <= dealt <= len(sizes) and number >= 0 and read >= 0
        if not fits or any(
            not (0 <= d < len(sizes) and 0 <= o < sizes[d]) for d, o in zip(documents, offsets, strict=True)
        ):
            raise StreamError("the saved place in the text is damaged: it points outside the text")
        self._pass, self._dealt, self._read = number, dealt, read
        self._order = self._shuffle(number)
        self._document, self._offset = documents, offsets

    def _shuffle(self, number: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed & (2**63 - 1), number]).permutation(len(self._ends))

    def _deal(self, lane: int) -> None:
        if self._dealt == len(self._order):
            self._pass, self._dealt = self._pass + 1, 0
            self._order = self._shuffle(self._pass)
        self._document[lane], self._offset[lane] = int(self._order[self._dealt]), 0
        self._dealt += 1
