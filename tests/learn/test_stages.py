"""Training in stages: a run that begins with the slow weights of another, and reads them with other chunks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from nestling import cli
from nestling.learn import TrainConfig, load_run, train
from nestling.learn.checkpoint import load
from nestling.learn.config import SettingError

SHORT = ["--tokens", "128", "--eval-documents", "1"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name in ("nest", "egg", "bird"):
        (folder / f"{name}.txt").write_text(" ".join(f"{name} {number}" for number in range(60)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A first stage of two steps."""
    out = tmp_path_factory.mktemp("runs") / "first"
    settings = ["--model", "tnt", "--lanes", "2", "--length", "32", "--set", "shard=16", "--data", str(texts)]
    assert cli.run(["train", *settings, *SHORT, "--out", str(out)]) == 0
    return out


def test_a_second_stage_begins_with_the_weights_and_settings_of_the_first(first: Path, tmp_path: Path) -> None:
    out = tmp_path / "second"
    argv = ["train", "--from", str(first), "--set", "refined=[1]", "--lr", "1e-4", *SHORT, "--out", str(out)]
    assert cli.run(argv) == 0
    weights = load(first / "checkpoints" / "step-00000002").model
    start, end = (load(out / "checkpoints" / f"step-0000000{step}") for step in (0, 2))
    assert all(torch.equal(start.model[name], weight) for name, weight in weights.items())
    assert not start.optimizer["state"], "the optimizer begins anew"
    assert any(not torch.equal(end.model[name], weight) for name, weight in weights.items())
    settings = json.loads((out / "config.json").read_text())
    assert settings["overrides"] == {"shard": 16, "refined": [1]}
    assert (settings["lanes"], settings["length"], settings["lr"], settings["tokens"]) == (2, 32, 1e-4, 128)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["from"], summary["settings"]) == (str(first), settings["overrides"])
    assert [m.chunk for m in load_run(out).model.mixers()[0].spec.memories] == [8, 1]  # type: ignore[union-attr]


def test_a_run_that_began_from_another_goes_on_without_it(first: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "first", tmp_path / "second"
    shutil.copytree(first, source)
    checkpoint = source / "checkpoints" / "step-00000002"
    assert cli.run(["train", "--from", str(checkpoint), *SHORT, "--out", str(out)]) == 0
    shutil.rmtree(source)
    before = load(out / "checkpoints" / "step-00000002").model
    assert cli.run(["train", "--resume", str(out)]) == 0
    after = load_run(out).model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize(
    ("argv", "rate", "own"),
    [
        ([], 5e-4, {"beta1": 0.8}),
        (["--lr", "1e-4"], 1e-4, {"beta1": 0.8}),
        (["--lr", "None"], None, {"beta1": 0.8}),
        (["--optimizer", "adamw"], 5e-4, {"beta1": 0.8}),
        (["--optimizer", "sgd"], None, {}),
        (["--optimizer", "sgd", "--lr", "0.3", "--optimizer-set", "momentum=0.5"], 0.3, {"momentum": 0.5}),
    ],
)
def test_the_learning_rate_is_the_first_runs_unless_said_otherwise(
    first: Path, tmp_path: Path, argv: list[str], rate: float | None, own: dict[str, float]
) -> None:
    """And where the optimizer is another, its own."""
    source = tmp_path / "first"
    shutil.copytree(first, source)
    stored = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(stored | {"lr": 5e-4, "optimizer_set": {"beta1": 0.8}}))
    found = cli.parse("train", ["--from", str(source), *argv])
    assert (found.lr, found.optimizer_set) == (rate, own)


def test_a_settings_file_may_name_the_run_to_begin_from(first: Path, tmp_path: Path) -> None:
    file = tmp_path / "stage2.json"
    file.write_text(json.dumps({"from": str(first), "set": {"refined": [2]}, "tokens": 64, "lr": 1e-4}))
    config = cli.parse("train", ["--config", str(file), "--lr", "2e-4"])
    assert (config.source, config.model, config.lanes, config.lr) == (first, "tnt", 2, 2e-4)
    assert config.overrides == {"refined": [2]}
    assert (config.tokens, config.minutes, config.out) == (64, None, None)


def test_a_model_can_be_measured_with_other_chunks_than_it_was_trained_with(
    first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for extra in ([], ["--set", "refined=[4]"], ["--set", "refined=[1]"]):
        capsys.readouterr()
        assert cli.run(["eval", str(first), "--json", "--limit", "200", *extra]) == 0
        found.append(json.loads(capsys.readouterr().out)["readings"][0]["bits_per_byte"])
    assert found[1] == found[0], "the chunk that it has already"
    assert abs(found[2] - found[0]) > 1e-7


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "hope"], "is tnt tiny, but model and size are hope tiny"),
        (["--set", "locals=[2,4]"], "does not fit this model"),
        (["--set", "refined=[2,4]"], "refined to 2 chunks"),
        (["--set", "refined=2"], "refined is 2; expected a list of whole numbers"),
    ],
)
def test_a_stage_that_cannot_follow_is_refused_in_words(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert cli.run(["train", "--from", str(first), *argv, *SHORT, "--out", str(tmp_path / "new")]) in (1, 2)
    message = capsys.readouterr().err.splitlines()[-1]
    assert words in message
    assert not (tmp_path / "new").exists(), "settings that cannot be leave no trace"


def test_a_run_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "--from", str(tmp_path / "none"), *SHORT]) == 1
    assert "there is no run here" in capsys.readouterr().err


def test_in_python_too_the_model_has_to_be_the_same(first: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="is tnt tiny, but model and size are hope tiny"):
        train(TrainConfig(source=first, tokens=64, out=tmp_path / "new"))


def test_segments_too_short_to_train_the_global_memory_are_noted(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--from", str(first), *SHORT, "--eval-documents", "0", "--tokens", "16"]
    assert cli.run([*argv, "--length", "8", "--out", str(tmp_path / "short")]) == 0
    assert "their gates stay as they are" in capsys.readouterr().err
    assert cli.run([*argv, "--length", "9", "--out", str(tmp_path / "long")]) == 0
    assert "their gates stay as they are" not in capsys.readouterr().err
