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
    assert found["slow weights"].moved == sum(p.numel() for p in model.parameters())
    level = model.continuum(0).levels_[0]
    assert found["blocks.0.ffn.level0"].slow == sum(p.numel() for p in level.parameters())
    assert found["blocks.0.ffn.level0"].moved == 0
    (attention, *_) = nl.models.levels(nl.models.build("transformer"))
    assert (attention.weights, attention.period.frequency) == (None, float("inf"))


def ends(level: nl.layers.Level) -> set[str]:
    """Parameters by what follows the block's part."""
    return {name.split(".", 3)[3] for name in level.params}


def test_every_memory_is_made_of_its_own_slow_parameters() -> None:
    built = {name: nl.models.build(name, layers=1) for name in ("hope", "tnt", "titans_mag", "titans_mac", "ttt_e2e")}
    built["local"] = nl.models.build("hope_swa", layers=1, error="local", arrangement="independent")
    found = {name: {level.name: level for level in nl.models.levels(model)} for name, model in built.items()}
    hope = found["hope"]
    main, others = hope["blocks.0.mixer.memory"], hope["blocks.0.mixer.generators"]
    assert {"qkv.weight", "out.weight", "gate.weight", "norm.weight"} < ends(main)
    spec = built["hope"].blocks[0].mixer.spec
    names = [f"initial.{n}" for n in range(len(spec.names))]
    assert {x for x in ends(main) if x in names} == {names[n] for n in range(len(names)) if spec.names[n][:4] == "main"}
    assert ends(others) == {x for x in names if x not in ends(main)}
    assert hope["blocks.0.ffn.level1"].params == tuple(
        f"blocks.0.ffn.levels_.1.{x}" for x in ("rate", "norm.weight", "mlp.up.weight", "mlp.down.weight")
    )
    tnt = found["tnt"]
    assert all(x.startswith("initial.") for x in ends(tnt["blocks.0.mixer.global"]))
    assert {"qkv.weight", "gates.weight"} < ends(tnt["blocks.0.mixer.local"])
    mag, mac = found["titans_mag"], found["titans_mac"]
    assert {"memory.tokens", "memory.layer.initial.0", "memory_norm.weight"} < {
        x.removeprefix("blocks.0.mixer.") for x in mag["blocks.0.mixer.memory"].params
    }
    assert {"recall_norm.weight", "memory.initial.0"} < {
        x.removeprefix("blocks.0.mixer.") for x in mac["blocks.0.mixer.memory"].params
    }
    assert "blocks.0.ffn.levels_.0.value" in found["local"]["blocks.0.ffn.level0"].params
    assert {x for x in found["local"]["slow weights"].params if "ffn" in x} == {"blocks.0.ffn.share"}
    still = {x for x in found["ttt_e2e"]["slow weights"].params if "ffn" in x}  # the network beside the level
    assert still == {x for x, _ in built["ttt_e2e"].named_parameters() if ".ffn.levels_.1." in x}


@pytest.mark.parametrize("name", nl.models.names())
def test_slow_parameters_of_all_levels_are_the_models(name: str) -> None:
    model = nl.models.build(name)
    levels = nl.models.levels(model, nl.optim.from_levels(model))
    count = sum(p.numel() for p in model.parameters())
    assert sum(level.slow for level in levels) == count
    assert [level.moved for level in levels if level.moves] == [count]
    learned = [level for level in levels if level.period.unit == "token"]
    assert all(level.slow > 0 for level in learned)


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
        "of which make no other level",
        "made of",
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
