"""A converted run is a run like any other: measured, used, trained on, begun from."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from nestling import cli
from nestling.learn import load_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    rng = random.Random(0)
    (folder / "data").mkdir()
    for number in range(4):
        words = " ".join(rng.choice(("nest", "level", "fast", "slow")) for _ in range(150))
        (folder / "data" / f"{number}.txt").write_text(words)
    small = ["--model", "transformer", "--set", "dim=16", "layers=1", "ffn=16", "--lanes", "2", "--length", "16"]
    rest = ["--tokens", "320", "--data", str(folder / "data"), "--out", str(folder / "run"), "--threads", "1"]
    assert cli.run(["train", *small, *rest]) == 0
    return folder / "run"


def test_a_converted_run_is_a_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, source = tmp_path / "grown", str(trained)
    asked = ["--to", "hope_attention", "--set", "periods=[4,16]", "--out", str(out)]
    assert cli.run(["convert", source, *asked]) == 0
    said = capsys.readouterr().out
    for words in (
        "every 4 tokens: weights of level 0 (moved by no token)",
        "every 16 tokens: new, adds nothing at first",
        f"nestling train --resume {out}",
    ):
        assert words in said
    old, new = load_run(trained), load_run(out)
    assert (new.config.model, new.model.config.periods, new.model.config.ffn) == ("hope_attention", (4, 16), 16)
    tokens = torch.randint(256, (1, 20))
    with torch.no_grad():
        want, got = (r.model.read(tokens, r.model.start(1).blocks)[0] for r in (old, new))
    assert torch.equal(want, got)
    record = json.loads((new.checkpoint / "checkpoint.json").read_text())
    assert record["step"] == 0
    assert record["numbers"]["converted"]["model"] == "transformer"

    assert cli.run(["eval", str(out), "--limit", "64", "--documents", "1"]) == 0
    assert cli.run(["generate", str(out), "--prompt", "nest", "--count", "3"]) == 0
    more = tmp_path / "more"
    assert cli.run(["train", "--from", str(out), "--tokens", "64", "--out", str(more)]) == 0
    assert load_run(more).model.config.periods == (4, 16)
    assert cli.run(["train", "--resume", str(out)]) == 0
    after = load_run(out).model
    assert any(not torch.equal(a, b) for a, b in zip(after.parameters(), new.model.parameters(), strict=True))
    # and once more: other periods of what it has become, to be trained more gently
    again = tmp_path / "again"
    asked = ["--set", "periods=[8]", "--origins", "1", "--lr", "3e-5", "--out", str(again)]
    assert cli.run(["convert", str(out), *asked]) == 0
    assert (load_run(again).config.lr, new.config.lr) == (3e-5, old.config.lr)
    assert "removed: level 0 (every 4 tokens); what it knew is gone" in capsys.readouterr().out
    down = load_run(again).model.continuum(0).levels_[0].mlp.down.weight
    assert torch.equal(down, after.continuum(0).levels_[1].mlp.down.weight)

    # and back to a transformer, with the weights of the level that is named
    back = tmp_path / "back"
    assert cli.run(["convert", str(out), "--to", "transformer", "--out", str(back)]) == 2
    assert "give one number as origins (origins 0 for that of period 4; origins 1" in capsys.readouterr().err
    assert cli.run(["convert", str(out), "--to", "transformer", "--origins", "1", "--out", str(back)]) == 0
    said = capsys.readouterr().out
    assert "moved by no token: weights of level 1 (every 16 tokens)" in said
    assert "removed: level 0" in said
    down = load_run(back).model.continuum(0).levels_[0].mlp.down.weight
    assert torch.equal(down, after.continuum(0).levels_[1].mlp.down.weight)
    # another rule begins at its own step size, unless one is given
    for number, (rate, want) in enumerate((((), 3e-3), (("--rate", "0.01"), 0.01))):
        ruled = tmp_path / f"ruled{number}"
        assert cli.run(["convert", str(out), "--set", "rule=adam", *rate, "--out", str(ruled)]) == 0
        own = [torch.nn.functional.softplus(x.rate).item() for x in load_run(ruled).model.continuum(0).levels_]
        assert own == pytest.approx([want, want])


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--to", "hope_atention"], 2, "to: there is no model named 'hope_atention'. Did you mean 'hope_attention'"),
        (["--to", "hope_swa"], 2, "expected the same sequence layer"),
        (["--to", "hope_attention", "--origins", "one"], 2, "origins: got 'one', but expected the number of a level"),
        (["--to", "hope_attention", "--set", "periods=4"], 2, "periods is 4; expected a list"),
        (["--to", "hope_attention", "--set", "dim=8"], 2, "dim cannot change"),
        (["--to", "hope_attention", "--lr", "0"], 2, "lr: got 0.0, but expected a number above 0"),
        (["--to", "hope_attention", "--out", "RUN"], 2, "there is a run in"),
    ],
)
def test_what_cannot_be_is_told_and_leaves_no_trace(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, words: str
) -> None:
    argv = [str(trained) if word == "RUN" else word for word in argv]
    out = [] if "--out" in argv else ["--out", str(tmp_path / "new")]
    assert cli.run(["convert", str(trained), *argv, *out]) == code
    said = capsys.readouterr().err
    assert said.startswith("nestling: ")
    assert said.count("\n") == 1
    assert words in said
    assert not (tmp_path / "new").exists()


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["convert", str(tmp_path / "nowhere"), "--out", str(tmp_path / "new")]) == 1
    assert "there is no run here" in capsys.readouterr().err
