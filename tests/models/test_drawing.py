"""The nested system: what levels weigh, and the picture of the nest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nestling as nl
from nestling import cli
from nestling.models import drawing, nest


def test_levels_say_what_they_weigh() -> None:
    model = nl.models.build("hope", dim=16, heads=2, ffn=16, layers=1, periods=[4, 8])
    found = {level.name: level for level in nl.models.levels(model)}
    assert found["blocks.0.ffn.level0"].weights == 3 * 16 * 16
    assert found["blocks.0.ffn.level1"].weights == 2 * 3 * 16 * 16, "and the sum of its gradients"
    assert found["slow weights"].slow == sum(p.numel() for p in model.parameters())
    (attention, *_) = nl.models.levels(nl.models.build("transformer"))
    assert (attention.weights, attention.period.frequency) == (None, float("inf"))


@pytest.mark.parametrize("name", nl.models.names())
def test_sizes_are_known_without_weights(name: str) -> None:
    with torch.device("meta"):
        empty = nl.models.build(name)
    assert nl.models.levels(empty) == nl.models.levels(nl.models.build(name))


def test_an_optimizer_through_the_same_lens() -> None:
    layer = torch.nn.Linear(3, 2)
    memory, weights = nest.of_optimizer(torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9))
    assert (memory.flow, memory.transfer, weights.slow) == ("gradients", "generation", 8)
    assert len(nest.of_optimizer(torch.optim.SGD(layer.parameters(), lr=0.1))) == 1


def test_the_picture_has_every_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert cli.run(["levels", "--model", "hope", "--draw", str(tmp_path / "hope.svg")]) == 0
    text = (tmp_path / "hope.svg").read_text("utf-8")
    for words in (
        "hope tiny",
        "mixer.generators",
        "ffn.level1",
        "every 8 tokens",
        "frequency 1/4",
        "AdamW",
        "initialization:",
    ):
        assert words in text, words
    model = nl.models.build("lstm")
    drawing.draw(nl.models.levels(model), tmp_path / "lstm.png")
    assert (tmp_path / "lstm.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    assert cli.run(["levels", "--draw", str(tmp_path / "hope.gif")]) == 2
    assert "expected a file that ends in .svg" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no levels"):
        drawing.draw([], tmp_path / "none.svg")
