"""The demo's measuring core against plain loops, on tiny untrained models."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import nestling as nl
from nestling.bench.adaptation import Adaptation, draw, measure, pool, tell
from nestling.stream import ByteTokenizer, Document


def documents() -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    return [
        Document(str(i), bytes(torch.randint(97, 123, (size,), generator=generator).tolist()).decode())
        for i, size in enumerate((70, 64, 20))
    ]


@torch.no_grad()
def test_rows_equal_loops_over_the_documents(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, baseline = nl.models.build("titans_lmm"), nl.models.build("transformer")
    result = measure(model, baseline, documents(), ByteTokenizer(), segment=16, length=64, lanes=2)
    assert result.edges == (0, 4, 8, 16, 32, 64)
    assert result.names == ("0", "1"), "the third document is too short"
    for row, document in enumerate(documents()[:2]):
        tokens = torch.cat([torch.tensor([256]), torch.from_numpy(ByteTokenizer().encode(document.text))])[None]

        def bits(logits: torch.Tensor, first: int, last: int, tokens: torch.Tensor = tokens) -> float:
            nats = F.cross_entropy(logits[0, first:last], tokens[0, first + 1 : last + 1])
            return float(nats) / math.log(2)

        whole, state = model(tokens[:, :69])
        again, _ = model(tokens[:, :69], state)
        assert abs(bits(whole, 32, 64) - float(result.rows["running"][row, -1])) < 1e-4
        pieces = torch.cat([model(tokens[:, at : at + 16])[0] for at in range(0, 64, 16)], 1)
        assert abs(bits(pieces, 32, 64) - float(result.rows["erased"][row, -1])) < 1e-4
        pieces = torch.cat([baseline(tokens[:, at : at + 16])[0] for at in range(0, 64, 16)], 1)
        assert abs(bits(pieces, 32, 64) - float(result.rows["transformer"][row, -1])) < 1e-4
        if len(document.text) < 69:  # read whole, so the second reading starts where the first ended
            assert abs(bits(again, 32, 64) - float(result.rows["second"][row, -1])) < 1e-4
    gain, error = result.gain("running", "erased")
    assert gain.shape == error.shape == (5,)
    assert gain[0] == 0, "inside the first segment nothing has been erased"
    draw(result, tmp_path / "plot.png", title="test", segment=16)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_documents_that_are_all_too_short_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter length"):
        measure(nl.models.build("deltanet"), None, documents(), ByteTokenizer(), segment=16, length=500)


def result(offset: float) -> Adaptation:
    rows = {
        "running": torch.tensor([[4.0, 3.0], [4.0, 2.0]]) + offset,
        "erased": torch.tensor([[4.0, 3.5], [4.0, 3.5]]) + offset,
        "second": torch.tensor([[3.0, 2.0], [3.0, 1.0]]) + offset,
    }
    return Adaptation((0, 4, 8), ("a", "b"), {name: row.double() for name, row in rows.items()})


def test_saved_numbers_come_back_and_runs_are_pooled_document_by_document(tmp_path: Path) -> None:
    result(0).save(tmp_path / "numbers.json")
    again = Adaptation.load(tmp_path / "numbers.json")
    assert (again.edges, again.names) == ((0, 4, 8), ("a", "b"))
    assert all(torch.equal(again.rows[name], row) for name, row in result(0).rows.items())
    pooled = pool([result(0), result(1)])
    assert torch.equal(pooled.rows["running"], result(0.5).rows["running"])
    with pytest.raises(ValueError, match="different documents"):
        pool([result(0), replace(result(0), names=("a", "c"))])


def test_the_table_says_what_was_measured() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    tell(result(0), console)
    text = console.export_text()
    assert "2.500 ± 0.500" in text
    assert "the running memory costs 1.000 ± 0.500 bits per byte less (paired by document) than erasing" in text, (
        "paired: 0.5 and 1.5"
    )
    assert "transformer" not in text
    assert "same document costs 1.000 ± 0.000 bits per byte less" in text


def test_over_all_positions_a_position_counts_as_often_as_it_is_there() -> None:
    rows = {"running": torch.tensor([[4.0, 3.0], [4.0, 5.0]]), "second": torch.tensor([[3.0, 1.0], [3.0, 1.0]])}
    found = Adaptation((0, 2, 8), ("a", "b"), {name: row.double() for name, row in rows.items()})
    mean, error = found.total("second", "running")
    assert float(mean) == pytest.approx((2 * 1 + 6 * 3) / 8), "a third of the documents' bytes are not half"
    assert float(error) == pytest.approx(0.75), "(2 + 12) / 8 and (2 + 24) / 8: 1.75 and 3.25"
