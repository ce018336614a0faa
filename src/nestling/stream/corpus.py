"""Documents to read, in two parts: some to learn from, some held out.

The embedded corpus is the source text of the running Python's own standard library, real text that every machine has. The
user's own files come through `from_paths`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.06
_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


class CorpusError(ValueError):
    """Text that cannot be read; the message says which file, what is wrong and what to do."""


@dataclass(frozen=True)
class Document:
    """One text with a name for messages and plots."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to learn from and documents held out; no text stands in both."""

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]

    def digest(self) -> str:
        """Changes with any name, text, order or split."""
        total = hashlib.sha256()
        for part in (self.train, self.heldout):
            total.update(b"part")
            for document in part:
                for field in (document.name, document.text):
                    data = field.encode("utf-8", "surrogatepass")
                    total.update(len(data).to_bytes(8, "little") + data)
        return total.hexdigest()


def standard_library(root: Path | None = None) -> Corpus:
    """The text of Python's own standard library: every `.py` file, tests, caches and installed packages left out.

    The split is by file and the same on every run: a file is held out by a hash of its path below the library.

    root: the library's folder; None: the running Python's.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    train: list[Document] = []
    heldout: list[Document] = []
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        below = path.relative_to(root)
        if _LEFT_OUT.intersection(below.parts[:-1]) or below.name.startswith("test_"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a few old sources state another encoding
        if not text.strip() or text in seen:
            continue
        seen.add(text)
        document = Document(below.as_posix(), text)
        (heldout if _held_out(document.name) else train).append(document)
    if not train or not heldout:
        raise CorpusError(
            f"the standard library at {root} has no Python sources to read (some installations ship it compiled only): "
            "give your own text with --data"
        )
    return Corpus(tuple(train), tuple(heldout))


def _held_out(key: str) -> bool:
    return (
        int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:4], "big")
        < HELD_OUT_SHARE * 2**32
    )


def from_paths(paths: Sequence[str | Path], *, field: str = "text") -> Corpus:
    """Read the user's own files and folders.

    A folder is read recursively in sorted order, hidden files left out. Files: UTF-8 text, `.jsonl` (one JSON object a line, the
    text in `field`), and either with `.gz`. A repeated text counts once. Documents are held out by a hash of their text, at least
    one; a single document is cut, its last tenth held out.

    Raises CorpusError, naming the file, for anything that cannot be read.
    """
    if not paths:
        raise CorpusError("no data was given: name at least one file or folder")
    documents: list[Document] = []
    seen: set[str] = set()
    for path in _files(paths):
        for document in _read(path, field):
            if document.text.strip() and document.text not in seen:
                seen.add(document.text)
                documents.append(document)
    if not documents:
        raise CorpusError(f"no text was found in {', '.join(map(str, paths))}: the files are empty or hold only blanks")
    if len(documents) == 1:
        (only,) = documents
        at = len(only.text) - max(1, len(only.text) // 10)
        if at < 1:
            raise CorpusError(f"{only.name} holds a single character: nothing is left to learn from. Give more text")
        return Corpus((Document(only.name, only.text[:at]),), (Document(f"{only.name} (last tenth)", only.text[at:]),))
    by_hash = sorted(documents, key=lambda d: hashlib.sha256(d.text.encode("utf-8", "surrogatepass")).digest())
    count = max(1, sum(_held_out(d.text) for d in documents))  # the smallest hashes are those held out
    chosen = {d.name for d in by_hash[: min(count, len(documents) - 1)]}
    return Corpus(tuple(d for d in documents if d.name not in chosen), tuple(d for d in documents if d.name in chosen))


def _files(paths: Iterable[str | Path]) -> Iterator[Path]:
    for given in map(Path, paths):
        if given.is_dir():
            found = sorted(
                p
                for p in given.rglob("*")
                if p.is_file() and not any(x.startswith(".") for x in p.relative_to(given).parts)
            )
            if not found:
                raise CorpusError(f"{given} is a folder without files: give a folder with text in it")
            yield from found
        elif given.is_file():
            yield given
        else:
            raise CorpusError(f"{given} does not exist: check the path given as data")


def _read(path: Path, field: str) -> Iterator[Document]:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{path} is not a whole gzip file ({error}): unpack it by hand or fetch it again") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}): "
            "convert it to UTF-8, or leave it out if it is no text"
        ) from error
    if "\0" in text:
        raise CorpusError(
            f"{path} holds zero bytes (the first at character {text.index(chr(0))}): it is not text, leave it out"
        )
    if ".jsonl" in path.suffixes[-2:]:
        yield from _json_lines(path, text, field)
    else:
        yield Document(str(path), text)


def _json_lines(path: Path, text: str, field: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{path}, line {number}, is not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            found = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
            raise CorpusError(
                f"{path}, line {number}, has no text field {field!r} (found: {found}): name the right field"
            )
        yield Document(f"{path}:{number}", record[field])
