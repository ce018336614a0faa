"""Lanes give back every document whole, and a restored cursor goes on bit for bit."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestling.stream import Batch, ByteTokenizer, Document, Lanes, StreamError

BOS = ByteTokenizer.bos


def documents(sizes: list[int]) -> list[Document]:
    rng = np.random.default_rng(0)
    return [Document(str(i), "".join(chr(65 + x) for x in rng.integers(0, 26, size))) for i, size in enumerate(sizes)]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "targets", "reset", "valid", "loss_mask"))


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    lanes=st.integers(1, 4),
    length=st.integers(1, 17),
    seed=st.integers(0, 9),
)
def test_every_document_is_read_whole_and_in_order(sizes: list[int], lanes: int, length: int, seed: int) -> None:
    texts = documents(sizes)
    stream = Lanes(texts, ByteTokenizer(), lanes, length, seed=seed)
    assert stream.tokens_per_pass == sum(sizes) + len(sizes)
    batches = [next(stream) for _ in range(2 * stream.tokens_per_pass // length + 3)]
    known = sorted(d.text for d in texts)
    for lane in range(lanes):
        tokens = torch.cat([b.tokens[lane] for b in batches])
        targets = torch.cat([b.targets[lane] for b in batches])
        reset = torch.cat([b.reset[lane] for b in batches])
        mask = torch.cat([b.loss_mask[lane] for b in batches])
        assert tokens[0] == BOS
        assert torch.equal(targets[:-1], tokens[1:])
        assert torch.equal(reset, tokens == BOS)
        assert torch.equal(mask, targets != BOS)
        starts = [*torch.nonzero(tokens == BOS).flatten().tolist(), len(tokens)]
        read = ["".join(map(chr, tokens[a + 1 : b].tolist())) for a, b in pairwise(starts[:-1])]
        assert set(read) <= set(known)
    if lanes == 1:  # a pass is a permutation: each document once before any comes again
        assert sorted(read[: len(texts)]) == known


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    lanes=st.integers(1, 3),
    align=st.integers(1, 5),
    times=st.integers(1, 4),
)
def test_aligned_documents_start_in_step_and_are_read_whole(
    sizes: list[int], lanes: int, align: int, times: int
) -> None:
    stream = Lanes(documents(sizes), ByteTokenizer(), lanes, align * times, align=align)
    plain = Lanes(documents(sizes), ByteTokenizer(), lanes, align * times)
    for batch in (next(stream) for _ in range(9)):
        assert not batch.reset[:, [t for t in range(align * times) if t % align]].any()
        assert torch.equal(batch.reset, (batch.tokens == BOS) & batch.valid)
        assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
        assert not (batch.loss_mask & ~batch.valid).any()
    first = next(Lanes(documents(sizes[:1]), ByteTokenizer(), 1, 40 * align, align=align))
    assert "".join(map(chr, first.tokens[first.valid][1 : sizes[0] + 1].tolist())) == documents(sizes)[0].text
    if align > 1:
        with pytest.raises(StreamError, match="other stream settings"):
            plain.load_state_dict(stream.state_dict())
        with pytest.raises(StreamError, match="multiple of align"):
            Lanes(documents(sizes), ByteTokenizer(), lanes, align + 1, align=align)


@given(
    before=st.integers(0, 9),
    reset=st.sampled_from(["document", "segment", "never"]),
    seed=st.integers(0, 99),
    limit=st.sampled_from([None, 5]),
)
def test_a_restored_cursor_goes_on_bit_for_bit(before: int, reset: str, seed: int, limit: int | None) -> None:
    def make() -> Lanes:
        return Lanes(
            documents([3, 11, 7, 1, 40]),
            ByteTokenizer(),
            3,
            8,
            reset=reset,
            seed=seed,
            segment=4 if reset == "segment" else None,
            max_document=limit,
        )

    one, other = make(), make()
    for _ in range(before):
        next(one)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert all(same(next(one), next(other)) for _ in range(12))


def test_reset_policies() -> None:
    texts = documents([9, 9])
    by_segment = next(Lanes(texts, ByteTokenizer(), 1, 20, reset="segment", segment=4))
    assert torch.nonzero(by_segment.reset[0]).flatten().tolist() == [0, 4, 8, 10, 14, 18]
    never = Lanes(texts, ByteTokenizer(), 2, 20, reset="never")
    assert next(never).reset.sum() == 2
    assert next(never).reset.sum() == 0


def test_long_documents_are_cut_so_that_each_piece_opens_with_bos() -> None:
    stream = Lanes(documents([23]), ByteTokenizer(), 1, 26, max_document=10)
    tokens = next(stream).tokens[0]
    starts = torch.nonzero(tokens == BOS).flatten().tolist()
    assert len(starts) == 3
    assert max(b - a for a, b in pairwise([*starts, 26])) == 10
    assert stream.tokens_per_pass == 23 + 3


def test_other_seeds_read_in_another_order_and_passes_differ() -> None:
    def order(seed: int) -> list[int]:
        stream = Lanes(documents([5] * 12), ByteTokenizer(), 1, 72, seed=seed)
        return [*next(stream).tokens[0].tolist(), *next(stream).tokens[0].tolist()]

    assert order(0) == order(0) != order(1)
    assert order(0)[:72] != order(0)[72:]


def test_impossible_settings_and_foreign_cursors_are_refused_in_words() -> None:
    texts = documents([5, 6])
    for options, words in (
        ({"lanes": 0}, "lanes is 0"),
        ({"length": 0}, "length is 0"),
        ({"reset": "daily"}, "reset is 'daily'"),
        ({"reset": "segment"}, "give a segment length"),
        ({"segment": 4}, "give a segment length"),
        ({"max_document": 1}, "max_document is 1"),
        ({"documents": [Document("empty", "")]}, "no text"),
    ):
        settings = {"documents": texts, "tokenizer": ByteTokenizer(), "lanes": 2, "length": 4, **options}
        with pytest.raises(StreamError, match=words):
            Lanes(**settings)
    cursor = Lanes(texts, ByteTokenizer(), 2, 4).state_dict()
    with pytest.raises(StreamError, match="other text"):
        Lanes(texts, ByteTokenizer(), 2, 5).load_state_dict(cursor)
    stream = Lanes(texts, ByteTokenizer(), 2, 4)
    for damage in ({"offset": [99, 0]}, {"document": [0]}, {"pass": "x"}):
        with pytest.raises(StreamError, match="damaged"):
            stream.load_state_dict({**cursor, **damage})
