"""Text to numbers and back. The default reads bytes: no vocabulary to train, nothing out of vocabulary, exact bits per byte."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Tokenizer(Protocol):
    """What the stream asks of a tokenizer. `bos` opens every document and is never part of an encoded text."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos(self) -> int: ...

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token numbers of a text, without `bos`."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token numbers; `bos` is left out, incomplete characters become U+FFFD."""
        ...

    def digest(self) -> str:
        """Changes whenever a text could be encoded differently."""
        ...


class ByteTokenizer:
    """UTF-8 bytes 0 … 255, `<bos>` = 256."""

    vocab_size = 257
    bos = 256

    def encode(self, text: str) -> NDArray[np.int64]:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in map(int, tokens) if t < 256).decode("utf-8", "replace")

    def digest(self) -> str:
        return "bytes-1"


class TokenizerFile:
    """A `tokenizers` JSON file, with one more token for `<bos>` unless the file names one.

    Args:
        path: the tokenizer.json.
        bos: the file's own token that opens a document ("<s>", "<|endoftext|>", …); None adds a new last one.

    Raises ValueError for a file that is no tokenizer or has no such token, FileNotFoundError where there is none.
    """

    def __init__(self, path: str | Path, bos: str | None = None) -> None:
        import tokenizers

        content = Path(path).read_bytes()
        try:
            self._inner = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer file of the tokenizers library: {error}") from error
        size = 1 + max(self._inner.get_vocab().values(), default=-1)  # numbers may have gaps
        number = size if bos is None else self._inner.token_to_id(bos)
        if number is None:
            raise ValueError(f"{path} has no token {bos!r}: name one of its tokens, or None to add one")
        self.bos: int = number
        self.vocab_size: int = max(size, number + 1)
        self._digest = hashlib.sha256(content + str(number).encode()).hexdigest()

    def encode(self, text: str) -> NDArray[np.int64]:
        return np.asarray(self._inner.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._inner.decode([t for t in map(int, tokens) if t != self.bos], skip_special_tokens=False))

    def digest(self) -> str:
        return self._digest
