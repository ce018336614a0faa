"""Documents to read, in two parts: some to learn from, some held out.

The embedded corpus is the source text of the running Python's own standard library, real text that every machine has. The
user's own files come through `from_paths`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.10
_TESTS_AND_CACHES = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
_APPLICATIONS = {"idlelib", "lib2to3", "turtledemo"}
# Written by programs, and so much alike (code pages) or so large (pydoc's topics are one string of 0.75 MB) that a few of them
# held out would be most of what is measured.
_GENERATED = {"encodings", "pydoc_data"}
_LEFT_OUT = _TESTS_AND_CACHES | _APPLICATIONS | _GENERATED


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
    """The text of Python's own standard library: every `.py` file but tests, caches, bundled applications, installed packages
    and what programs generated.

    The split is by file and the same on every run and machine: a file is held out by a hash of its path below the library.
    A text that stands in two files counts once, for the first of them.

    root: the library's folder; None: the running Python's.

    Raises CorpusError where there are no sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    train: list[Document] = []
    heldout: list[Document] = []
    seen: set[str] = set()
    for name in _walk(root, lambda part: part in _LEFT_OUT or part.startswith(("test_", "config-", "_sysconfigdata"))):
        if not name.endswith(".py"):
            continue
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few old sources state another encoding
        if not text.strip() or text in seen:
            continue
        seen.add(text)
        (heldout if _held_out(name) else train).append(Document(name, text))
    if not train or not heldout:
        raise CorpusError(
            f"the standard library at {root} has no Python sources to read (some installations ship it compiled only): "
            "give your own text with --data"
        )
    return Corpus(tuple(train), tuple(heldout))


def read_documents(paths: Sequence[str | Path], *, field: str = "text") -> tuple[Document, ...]:
    """The user's own files and folders as documents, in order.

    A folder is read recursively in sorted order, hidden files left out. Files: UTF-8 text, `.jsonl` (one JSON object a line, the
    text in `field`), and either with `.gz`. A repeated text counts once; blank ones do not count.

    Raises CorpusError, naming the file, for anything that cannot be read.
    """
    if not paths:
        raise CorpusError("no data was given: name at least one file or folder")
    documents: dict[str, Document] = {}  # by text
    for path in _files(paths):
        for document in _read(path, field):
            if document.text.strip():
                documents.setdefault(document.text, document)
    if not documents:
        raise CorpusError(f"no text was found in {', '.join(map(str, paths))}: the files are empty or hold only blanks")
    return tuple(documents.values())


def from_paths(paths: Sequence[str | Path], *, field: str = "text") -> Corpus:
    """`read_documents`, split: documents are held out by a hash of their text, at least one; a single document is cut, its last
    tenth held out.

    Raises CorpusError, naming the file, for anything that cannot be read or split.
    """
    documents = read_documents(paths, field=field)
    if len(documents) == 1:
        (only,) = documents
        at = len(only.text) - max(1, len(only.text) // 10)
        if at < 1:
            raise CorpusError(f"{only.name} holds a single character: nothing is left to learn from. Give more text")
        return Corpus((Document(only.name, only.text[:at]),), (Document(f"{only.name} (last tenth)", only.text[at:]),))
    by_hash = sorted(documents, key=lambda d: _hash(d.text))
    count = max(1, sum(_held_out(d.text) for d in documents))  # the smallest hashes are those held out
    chosen = set(by_hash[: min(count, len(documents) - 1)])
    return Corpus(tuple(d for d in documents if d not in chosen), tuple(d for d in documents if d in chosen))


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _held_out(key: str) -> bool:
    return int.from_bytes(_hash(key)[:4], "big") < HELD_OUT_SHARE * 2**32


def _walk(root: Path, left_out: Callable[[str], bool]) -> list[str]:
    """Paths of all files below `root`, relative, with `/`, sorted; what has a name that is `left_out` is not entered."""

    def refuse(error: OSError) -> None:
        raise CorpusError(
            f"{error.filename} cannot be read ({error.strerror}): allow reading it or leave it out"
        ) from error

    found: list[str] = []
    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not left_out(name)]
        below = Path(folder).relative_to(root)
        found += [(below / name).as_posix() for name in files if not left_out(name)]
    return sorted(found)


def _files(paths: Sequence[str | Path]) -> Iterator[Path]:
    for given in map(Path, [paths] if isinstance(paths, str) else paths):
        if os.path.isdir(given):
            found = [
                path for name in _walk(given, lambda part: part.startswith(".")) if (path := given / name).is_file()
            ]
            if not found:
                raise CorpusError(f"{given} is a folder without files: give a folder with text in it")
            yield from found
        elif os.path.isfile(given):
            yield given
        elif os.path.exists(given):
            raise CorpusError(f"{given} is neither a file nor a folder: save its text to a file and give that")
        else:
            raise CorpusError(f"{given} does not exist, or its folder may not be entered: check the path given as data")


def _read(path: Path, field: str) -> Iterator[Document]:
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{path} is not a whole gzip file ({error}): unpack it by hand or fetch it again") from error
    except OSError as error:
        raise CorpusError(
            f"{path} cannot be read ({error.strerror or error}): allow reading it or leave it out"
        ) from error
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}): "
            "convert it to UTF-8, or leave it out if it is no text"
        ) from error
    if "\0" in text:
        raise CorpusError(
            f"{path} holds zero bytes (the first at character {text.index(chr(0))}): it is not text, leave it out"
        )
    if Path(path.name.lower().removesuffix(".gz")).suffix == ".jsonl":
        yield from _json_lines(path, text, field)
    else:
        yield Document(str(path), text)


_KINDS = {
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    dict: "an object",
    str: "text",
}
"""What JSON reads as, in words."""


def _json_lines(path: Path, text: str, field: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # also numbers of too many digits, lists too deep
            raise CorpusError(f"{path}, line {number}, is not JSON ({error}): mend the line or take it out") from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            if isinstance(record, dict) and field in record:
                raise CorpusError(
                    f"{path}, line {number}: the field {field!r} is {_KINDS[type(record[field])]}, but expected text: "
                    "write it in quotes, or take the line out"
                )
            found = ", ".join(sorted(record)) if isinstance(record, dict) else _KINDS[type(record)]
            raise CorpusError(
                f"{path}, line {number}, has no text in a field {field!r} (found: {found}): rename the field that holds the text"
            )
        yield Document(f"{path}:{number}", record[field])
