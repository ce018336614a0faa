"""Measuring equals reading every document by itself in a plain loop, however many lanes and segments share the work."""

import math

import pytest
import torch
import torch.nn.functional as F

from nestling import models, stream
from nestling import state as fast
from nestling.commands.eval import summarize
from nestling.learn import (
    LearningError,
    Passage,
    Score,
    bits_per_byte,
    by_position,
    evaluate,
    mean_and_error,
    passages,
    read,
)
from nestling.learn.evaluation import finite, token_nats

NAMES = ["gated_deltanet", "titans_lmm"]
SIZES = (70, 1, 33, 16, 17, 5, 64)


def model_of(name):
    torch.manual_seed(1)
    model = models.build(name, "tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)  # so that what a memory holds shows in the logits
    return model


def documents():
    draw = torch.Generator().manual_seed(0)
    return [
        Passage(
            f"{size}", torch.cat([torch.tensor([256]), torch.randint(97, 110, (size - 1,), generator=draw)]), size - 1
        )
        for size in SIZES
    ]


@torch.no_grad()
def plain(model, passage, erase_every=None, readings=1, start=None):
    """One document, one lane, nothing masked: nats `[reading, n − 1]`."""
    text, state, rows = passage.tokens[None], start, []
    for _ in range(readings):
        parts = []
        for begin in range(0, text.shape[1], erase_every or text.shape[1]):
            state = state if erase_every is None else None
            logits, state = model(text[:, begin : begin + (erase_every or text.shape[1])], state)
            parts.append(logits)
        chances = torch.cat(parts, 1)[0, :-1].double().log_softmax(-1)
        rows.append(-chances.gather(1, text[0, 1:, None])[:, 0])
    return torch.stack(rows)


def assert_equals_plain(model, given, expected, **settings):
    scores = list(evaluate(model, given, **settings))
    assert sorted(score.index for score in scores) == list(range(len(given)))
    for score in scores:
        passage = given[score.index]
        assert (score.name, score.size) == (passage.name, passage.size)
        assert score.nats.dtype == torch.float64
        torch.testing.assert_close(score.nats, expected[score.index], rtol=1e-4, atol=2e-5, msg=score.name)
    return scores


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("lanes", "segment"), [(1, 512), (3, 16), (10, 7), (2, 64)])
def test_lanes_and_segments_change_nothing(name, lanes, segment):
    model, given = model_of(name), documents()
    assert_equals_plain(model, given, [plain(model, passage) for passage in given], lanes=lanes, segment=segment)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("segment", [16, 11])
def test_erasing_equals_reading_pieces_afresh(name, segment):
    model, given = model_of(name), documents()
    expected = [plain(model, passage, erase_every=8) for passage in given]
    assert_equals_plain(model, given, expected, lanes=3, segment=segment, erase_every=8)
    twice = [rows.expand(2, -1) for rows in expected]
    assert_equals_plain(model, given, twice, lanes=3, segment=segment, erase_every=8, readings=2)
    running = plain(model, given[0])
    torch.testing.assert_close(running[0, :7], expected[0][0, :7], rtol=1e-5, atol=1e-5)
    assert (running - expected[0])[0, 8:].abs().max() > 1e-3, "the memory is good for something here"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("lanes", "segment"), [(1, 512), (3, 16)])
def test_a_second_reading_goes_on_with_the_memory_of_the_first(name, lanes, segment):
    model, given = model_of(name), documents()
    expected = [plain(model, passage, readings=2) for passage in given]
    scores = assert_equals_plain(model, given, expected, lanes=lanes, segment=segment, readings=2)
    assert (expected[0][0] - expected[0][1]).abs().max() > 1e-3
    first = next(score for score in scores if score.index == 0)
    assert first.bits_per_byte(1) == pytest.approx(float(expected[0][1].sum()) / math.log(2) / 69, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("lanes", "segment", "readings"), [(1, 512, 1), (3, 16, 1), (2, 9, 2), (10, 16, 1)])
def test_every_document_begins_in_the_given_state(name, lanes, segment, readings):
    model, given = model_of(name), documents()
    start = read(model, [256, *range(97, 120)], segment=5)
    kept = fast.clone(start)
    expected = [plain(model, passage, start=start, readings=readings) for passage in given]
    assert_equals_plain(model, given, expected, lanes=lanes, segment=segment, start=start, readings=readings)
    assert (expected[0] - plain(model, given[0], readings=readings)).abs().max() > 1e-3
    alike = [given[2]] * 5  # lanes that get free at the same time
    assert_equals_plain(model, alike, [expected[2]] * 5, lanes=lanes, segment=segment, start=start, readings=readings)
    assert all(torch.equal(a, b) for a, b in zip(fast.leaves(start), fast.leaves(kept), strict=True))


def test_reading_in_segments_ends_in_the_same_state():
    model = model_of("titans_lmm")
    tokens = documents()[0].tokens
    whole = read(model, tokens)
    for a, b in zip(fast.leaves(whole), fast.leaves(read(model, tokens, segment=9)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    half = read(model, tokens[20:], read(model, tokens[:20].tolist()))
    for a, b in zip(fast.leaves(whole), fast.leaves(half), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_measuring_changes_no_weight_and_takes_documents_one_by_one():
    model = model_of("gated_deltanet")
    before = [p.detach().clone() for p in model.parameters()]
    taken = []

    def stream_of():
        for passage in documents():
            taken.append(passage.name)
            yield passage

    scores = evaluate(model, stream_of(), lanes=2, segment=16)
    first = next(scores)
    assert first.name == "1", "the shortest of the first two"
    assert taken == ["70", "1"]
    assert len(list(scores)) == len(SIZES) - 1
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))


def test_impossible_settings_are_refused():
    model, given = model_of("gated_deltanet"), documents()
    for bad in ({"lanes": 0}, {"segment": 0}, {"readings": 0}, {"erase_every": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
            next(evaluate(model, given, **bad))
    with pytest.raises(ValueError, match="exclude each other"):
        next(evaluate(model, given, start=model.start(1), erase_every=4))
    with pytest.raises(ValueError, match="at least <bos>"):
        next(evaluate(model, [Passage("nothing", torch.zeros(0, dtype=torch.int64), 0)]))


def test_bytes_and_not_characters_are_counted():
    given = [stream.Document("a", "grün — ☃"), stream.Document("b", "abc"), stream.Document("c", "")]
    ready = list(passages(given, stream.ByteTokenizer()))
    assert [passage.size for passage in ready] == [13, 3, 0]
    assert [len(passage.tokens) for passage in ready] == [14, 4, 1]

    model = model_of("gated_deltanet")
    scores = sorted(evaluate(model, ready, lanes=2), key=lambda score: score.index)
    nats = [float(plain(model, passage).sum()) for passage in ready[:2]]
    assert scores[0].bits_per_byte() == pytest.approx(nats[0] / math.log(2) / 13, rel=1e-5)
    assert bits_per_byte(scores) == pytest.approx(sum(nats) / math.log(2) / 16, rel=1e-5)
    assert math.isnan(scores[2].bits_per_byte())
    assert math.isnan(bits_per_byte(scores[2:]))
    assert math.isnan(bits_per_byte([]))


def test_a_limit_cuts_between_characters():
    document = stream.Document("a", "aü☃b")  # 1 + 2 + 3 + 1 bytes
    texts = []
    for limit in range(9):
        (passage,) = passages([document], stream.ByteTokenizer(), limit)
        assert passage.size == len(passage.tokens) - 1 <= limit
        texts.append(stream.ByteTokenizer().decode(passage.tokens[1:].tolist()))
    assert texts == ["", "a", "a", "aü", "aü", "aü", "aü☃", "aü☃b", "aü☃b"]


def test_positions_by_hand():
    ln2 = math.log(2)
    one = Score(0, "one", torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]).double() * ln2, 6)
    two = Score(1, "two", torch.tensor([[2.0, 4.0, 6.0], [0.0, 1.0, 8.0]]).double() * ln2, 6)  # two bytes a token
    table = by_position([one, two], [0, 2, 3, 6, 8])
    expected = torch.tensor([[1.5, 3.0, 5.0, math.nan], [1.5, 3.0, math.nan, math.nan]]).double()
    torch.testing.assert_close(table, expected, equal_nan=True)
    second = by_position([two], [0, 1, 3], reading=1)
    torch.testing.assert_close(second, torch.tensor([[0.0, 2.25]]).double())


def test_a_document_cut_before_a_character_counts_in_the_last_bin():
    given = [stream.Document("a", "abcdefg☃hij"), stream.Document("b", "abcdefghijk"), stream.Document("c", "abcdef")]
    ready = list(passages(given, stream.ByteTokenizer(), 8))
    assert [passage.size for passage in ready] == [7, 8, 6]  # the snowman has three bytes, of which one would fit
    scores = [
        Score(n, x.name, torch.arange(1.0, x.size + 1).double()[None] * math.log(2), x.size)
        for n, x in enumerate(ready)
    ]
    nan = math.nan
    expected = torch.tensor([[2.5, 6.0], [2.5, 6.5], [2.5, nan]]).double()
    torch.testing.assert_close(by_position(scores, [0, 4, 8], slack=1), expected, equal_nan=True)
    assert by_position(scores, [0, 4, 8])[:, 1].isnan().tolist() == [True, False, True]
    assert summarize(scores, 8)["readings"][0]["by_position"]["documents"] == [3]


def test_mean_and_error_by_hand():
    nan = math.nan
    table = torch.tensor([[1.0, 2.0, nan, nan], [2.0, nan, 5.0, nan], [6.0, 4.0, nan, nan]]).double()
    mean, error, count = mean_and_error(table)
    torch.testing.assert_close(mean, torch.tensor([3.0, 3.0, 5.0, nan]).double(), equal_nan=True)
    by_hand = [math.sqrt((4 + 1 + 9) / 2 / 3), math.sqrt((1 + 1) / 1 / 2), nan, nan]
    torch.testing.assert_close(error, torch.tensor(by_hand).double(), equal_nan=True)
    assert count.tolist() == [3, 2, 1, 0]


def test_token_nats_ignores_what_is_not_predicted_and_works_in_float32():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=draw).bfloat16()
    targets = torch.tensor([[0, -100, 4], [2, 1, -100]])
    nats = token_nats(logits, targets)
    assert nats.dtype == torch.float32
    for lane in range(2):
        for place in range(3):
            target = int(targets[lane, place])
            expected = 0.0 if target < 0 else -float(F.log_softmax(logits[lane, place].float(), -1)[target])
            assert float(nats[lane, place]) == pytest.approx(expected, rel=1e-6)


def test_costs_that_are_not_finite_are_told_and_no_means_are_made_without_them():
    fine, lost = (Score(n, name, torch.ones(1, 5).double(), 5) for n, name in enumerate(("a.py", "b.py")))
    lost.nats[0, 2:4] = torch.tensor([math.nan, math.inf])
    assert finite([fine]) == [fine]
    with pytest.raises(LearningError, match=r"2 costs in 1 of 2 documents are not finite, first in b\.py"):
        finite([fine, lost])
