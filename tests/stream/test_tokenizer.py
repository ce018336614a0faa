"""Bytes there and back, and a tokenizers file in the place of bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from nestling.stream import ByteTokenizer, TokenizerFile


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert len(tokens) == len(text.encode())
    assert all(0 <= t < 256 for t in tokens)


def test_incomplete_characters_and_bos_do_not_break_decoding() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([256, *"é".encode()[:1], 65]) == "�A"


def test_a_tokenizers_file(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<s>": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    inner.save(str(path))
    own, added = TokenizerFile(path, bos="<s>"), TokenizerFile(path)
    assert own.encode("a b z").tolist() == [0, 1, 3]
    assert (own.bos, own.vocab_size, added.bos, added.vocab_size) == (2, 4, 4, 5)
    assert own.decode([2, 0, 1]) == "a b"
    assert own.digest() != added.digest()
    with pytest.raises(ValueError, match="no token '<x>'"):
        TokenizerFile(path, bos="<x>")
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer file"):
        TokenizerFile(path)
