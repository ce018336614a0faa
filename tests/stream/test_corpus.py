"""The embedded corpus is real and splits the same everywhere; the user's files are read or refused in words."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nestling.stream import CorpusError, from_paths, standard_library


def test_the_standard_library_is_large_split_by_file_and_the_same_on_every_run() -> None:
    corpus = standard_library()
    names = [d.name for d in (*corpus.train, *corpus.heldout)]
    texts = [d.text for d in (*corpus.train, *corpus.heldout)]
    total, held = sum(map(len, texts)), sum(len(d.text) for d in corpus.heldout)
    assert total > 5_000_000
    assert 0.02 < held / total < 0.15
    assert len(set(names)) == len(names)
    assert len(set(texts)) == len(texts), "no text may stand in both parts"
    assert not any("test" in name.split("/")[:-1] or "site-packages" in name for name in names)
    assert standard_library().digest() == corpus.digest()
    # By path alone: these stand where the hash of their path puts them, on any machine.
    assert {"argparse.py", "json/decoder.py"} <= {d.name for d in corpus.train}
    assert {"copyreg.py", "email/contentmanager.py"} <= {d.name for d in corpus.heldout}


def test_an_installation_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="--data"):
        standard_library(tmp_path)


def test_text_gz_jsonl_and_folders(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("first\r\n", encoding="utf-8", newline="")
    (tmp_path / "deep" / "b.txt.gz").write_bytes(gzip.compress("zweiter Text: ä".encode()))
    lines = "\n".join(json.dumps({"text": f"line {i}", "other": 1}) for i in range(20))
    (tmp_path / "deep" / "er" / "c.jsonl").write_text(lines + "\n\n")
    (tmp_path / "deep" / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    (tmp_path / ".hidden").write_bytes(b"\xff\xff")
    (tmp_path / "copy.txt").write_text("first\r\n", newline="")
    corpus = from_paths([tmp_path])
    texts = [d.text for d in (*corpus.train, *corpus.heldout)]
    assert sorted(texts) == sorted(["first\r\n", "zweiter Text: ä", "packed", *(f"line {i}" for i in range(20))])
    assert corpus.heldout
    assert corpus.train
    assert from_paths([tmp_path]).digest() == corpus.digest()


def test_one_document_is_cut_and_nothing_of_it_lost(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("0123456789" * 10)
    corpus = from_paths([tmp_path / "one.txt"])
    assert corpus.train[0].text + corpus.heldout[0].text == "0123456789" * 10
    assert len(corpus.heldout[0].text) == 10


def test_two_documents_always_leave_one_for_each_part(tmp_path: Path) -> None:
    for i in range(30):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "a").write_text(f"text a {i}")
        (folder / "b").write_text(f"text b {i}")
        corpus = from_paths([folder])
        assert len(corpus.train) == len(corpus.heldout) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"good \xff bad", "byte 5 is 0xff"),
        ("a.txt", b"zero \0 byte", "zero bytes"),
        ("a.txt", b"  \n", "only blanks"),
        ("a.txt", b"", "empty"),
        ("a.gz", b"not gzip", "not a whole gzip file"),
        ("a.gz", gzip.compress(b"x" * 1000, mtime=0)[:-12], "not a whole gzip file"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2, is not JSON"),
        ("a.jsonl", b'{"body": "x"}', "found: body"),
        ("a.jsonl", b"[1]", "found: a list"),
        ("a.txt", b"x", "single character"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=words) as caught:
        from_paths([tmp_path / name])
    assert name in str(caught.value)


def test_missing_paths_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist"):
        from_paths([tmp_path / "nowhere"])
    with pytest.raises(CorpusError, match="without files"):
        from_paths([tmp_path])
    with pytest.raises(CorpusError, match="no data"):
        from_paths([])
