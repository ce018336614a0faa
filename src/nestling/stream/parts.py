"""A changing stream: several corpora, read one after the other; what was read does not come back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.stream.corpus import Corpus, CorpusError, Document, from_paths, standard_library
from nestling.stream.lanes import Batch, Lanes, StreamError

EMBEDDED = 4  # packages of the standard library that make a stream


@dataclass(frozen=True)
class Part:
    """One stretch of a changing stream, with documents held out of it."""

    name: str
    corpus: Corpus


def parts_of(paths: Sequence[str | Path], count: int = EMBEDDED) -> tuple[Part, ...]:
    """Every path as a part, in the order given; none: the `count` largest packages of the standard library that have held-out
    files. Raises CorpusError for what cannot be read, for fewer than two parts, and for one that is given twice.
    """
    places = [Path(path).expanduser().resolve() for path in paths]
    for at, place in enumerate(places):
        if place in places[:at]:
            raise CorpusError(
                f"data: got {paths[at]} twice, but every part of a changing stream is read once: name each path once"
            )
    given = tuple(Part(str(path), from_paths([path])) for path in paths)
    found = given if paths else _packages(standard_library(), count)
    if len(found) < 2:
        raise CorpusError(
            f"a changing stream has at least two parts, but there is {len(found)}: give two paths or more"
        )
    return found


def joined(parts: Sequence[Part]) -> Corpus:
    """All parts as one corpus."""
    return Corpus(
        tuple(document for part in parts for document in part.corpus.train),
        tuple(document for part in parts for document in part.corpus.heldout),
    )


class Parts:
    """A stream that reads one part's lanes until it is told to `turn` to another.

    lanes: of every part, alike in shape.
    """

    def __init__(self, lanes: Sequence[Lanes]) -> None:
        self.streams = tuple(lanes)
        self.part = 0

    def turn(self, part: int) -> None:
        """Go on with another part, from where it was left."""
        if not 0 <= part < len(self.streams):
            raise StreamError(f"part {part} is not there; expected 0 to {len(self.streams) - 1}")
        self.part = part

    def __iter__(self) -> Parts:
        return self

    def __next__(self) -> Batch:
        return next(self.streams[self.part])

    def state_dict(self) -> dict[str, Any]:
        """The cursor, as JSON values."""
        return {"part": self.part, "streams": [lanes.state_dict() for lanes in self.streams]}

    def load_state_dict(self, cursor: Mapping[str, Any]) -> None:
        """Go to a saved cursor. Raises StreamError where it belongs to other text or settings."""
        saved = cursor.get("streams", [])
        if len(saved) != len(self.streams):
            raise StreamError(
                f"the saved place in the text has {len(saved)} parts, but the stream has {len(self.streams)}: resume with the "
                "data that the run started with"
            )
        for lanes, place in zip(self.streams, saved, strict=True):
            lanes.load_state_dict(place)
        self.turn(int(cursor["part"]))


def _packages(corpus: Corpus, count: int) -> tuple[Part, ...]:
    train: dict[str, list[Document]] = defaultdict(list)
    heldout: dict[str, list[Document]] = defaultdict(list)
    for documents, into in ((corpus.train, train), (corpus.heldout, heldout)):
        for document in documents:
            package, slash, _ = document.name.partition("/")
            if slash:
                into[package].append(document)
    ready = sorted((name for name in train if name in heldout), key=lambda n: (-sum(len(d.text) for d in train[n]), n))
    return tuple(Part(name, Corpus(tuple(train[name]), tuple(heldout[name]))) for name in ready[:count])
