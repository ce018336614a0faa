"""The optimizer laboratory: equal tuning, its record, its problems, and what the command writes."""

import json
import math
import re

import pytest
import torch

from nestling.bench import optimizer_lab as lab
from nestling.bench.optimizer_report import smoothed
from nestling.bench.optimizers import RATES, WIDE, banana, landscape, problems, tasks, valley
from nestling.cli import run

QUICK = problems(quick=True)


def test_how_far_momentum_reaches():
    """The figures of the literature count the index (6 and 43); in terms they are one more. A period multiplies them."""
    found = lab.reaches()
    assert found["momentum 0.9"] == (7, 44)
    half, most = found["momentum 0.9, every 4 steps"]
    assert 4 * 6 < half <= 4 * 7
    assert 4 * 43 < most <= 4 * 44


def test_the_landscape_is_its_formula_and_starts_where_it_should():
    module = landscape(0).module
    with torch.no_grad():
        module.at.copy_(torch.tensor([0.5, 2.0]))
    expected = 0.25 + 10 * (0.5 - 2.0 + math.sin(2.5)) ** 2
    assert float(module().detach()) == pytest.approx(expected, rel=1e-6)
    minima = ((valley, (0.0, 0.0)), (banana, (1.0, 1.0)))
    for value, at in minima:
        x = torch.tensor(at, requires_grad=True)
        lowest = value(*x)
        assert float(lowest.detach()) == 0
        assert torch.autograd.grad(lowest, x)[0].tolist() == [0, 0]
    assert float(banana(torch.tensor(2.0), torch.tensor(1.0))) == 1 + 100 * 9
    starts = torch.stack([landscape(seed).module.at.detach() for seed in range(20)])
    assert (starts.mean(0) - torch.tensor([-3.5, 2.0])).abs().max() < 0.1
    assert not torch.equal(starts[0], starts[1])


def test_tasks_have_gradients_of_their_own_and_all_of_them_count():
    trial = tasks(0, steps=100)
    directions = []
    for step in (0, 25, 45, 65):  # one in each of the four long stretches of 20 steps
        trial.module.zero_grad()
        trial.loss(step).backward()
        directions.append(torch.nn.functional.normalize(trial.module[0].weight.grad.flatten(), dim=0))
    alike = torch.stack(directions) @ torch.stack(directions).T
    assert (alike - torch.eye(4)).abs().max() < 1e-4  # subspaces that are orthogonal
    before = trial.score()
    with torch.no_grad():
        trial.module[2].weight.zero_()
    assert trial.score() != before


def test_every_optimizer_has_the_same_budget_and_the_search_decides():
    chosen = {"landscape": QUICK["landscape"], "tasks": QUICK["tasks"]}
    names = ["SGD", "AdamW", "M3"]
    found = lab.measure(chosen, names, seeds=2, rates=(0.1, 1.0, 1e6))
    assert list(found["landscape"]) == ["SGD", "AdamW"]  # it has no matrices
    assert list(found["tasks"]) == names
    for row in found.values():
        for result in row.values():
            assert len(result.search) == 3 * len(lab.TUNING_SEEDS)
            assert {r.seed for r in result.search} == set(lab.TUNING_SEEDS)
            assert [r.seed for r in result.runs] == [0, 1]
            tried = sorted({r.lr for r in result.search})
            mean = {lr: sum(r.score for r in result.search if r.lr == lr) for lr in tried}
            assert {r.lr for r in result.runs} == {min(mean, key=mean.get)} == {result.lr}
            assert result.at_edge == (result.lr != tried[1])
            assert result.score[0] == pytest.approx(sum(r.score for r in result.runs) / 2)


def test_a_run_can_be_repeated_and_one_that_diverges_scores_infinity(tmp_path):
    task = QUICK["tasks"]
    one, again = (lab.once("M3", "tasks", task, 1e-3, 5) for _ in range(2))
    assert (one.losses, one.score) == (again.losses, again.score)
    assert len(one.losses) == task.steps
    wild = lab.once("SGD", "tasks", task, 1e30, 5)
    assert wild.score == math.inf
    assert len(wild.losses) < task.steps
    lab.save({"tasks": {"SGD": lab.Result((wild,), (wild,))}}, tmp_path / "x.json", about={})
    told = json.loads((tmp_path / "x.json").read_text())["results"]["tasks"]["SGD"]
    assert told["search"][0]["score"] is None
    assert told["search"][0]["lr"] == 1e30


def test_rates_are_the_problems_own_and_results_are_kept_as_they_come():
    assert set(RATES) < set(WIDE)
    seen = []
    chosen = {"banana": problems(steps=3)["banana"]}
    found = lab.measure(chosen, ["SGD", "AdamW"], seeds=1, kept=lambda found: seen.append([*found["banana"]]))
    assert seen == [["SGD"], ["SGD", "AdamW"]]
    for result in found["banana"].values():
        own, whole = result.seconds
        assert 0 < own < whole
    assert len(found["banana"]["SGD"].search) == len(WIDE) * len(lab.TUNING_SEEDS)


def test_what_was_measured_with_the_same_settings_stands(tmp_path, monkeypatch):
    chosen, about = {"banana": problems(steps=3)["banana"]}, {"steps": 3, "seeds": 2}
    first = lab.measure(chosen, ["SGD"], seeds=2, rates=(1.0, 1e9))
    assert math.isinf(first["banana"]["SGD"].search[-1].score)
    lab.save(first, tmp_path / "found.json", about=about)
    before = lab.load(tmp_path / "found.json", about=about)
    assert before["banana"]["SGD"].runs == first["banana"]["SGD"].runs
    assert [(r.lr, r.score) for r in before["banana"]["SGD"].search] == [
        (r.lr, r.score) for r in first["banana"]["SGD"].search
    ]
    told = []
    both = lab.measure(chosen, ["SGD", "AdamW"], seeds=2, rates=(1.0,), before=before, told=told.append)
    assert told == ["banana: AdamW"]
    assert both["banana"]["SGD"] is before["banana"]["SGD"]
    assert set(both["banana"]) == {"SGD", "AdamW"}
    with pytest.raises(ValueError, match="was measured with seeds 2, but now it is 3"):
        lab.load(tmp_path / "found.json", about={**about, "seeds": 3})


@pytest.mark.parametrize("name", ["Muon", "AdaMuon-like", "M3"])
def test_heads_and_patches_are_left_to_adam(name):
    trial = QUICK["digits"].make(0)
    optimizer = lab.make(lab.ENTRIES[name], trial, 1e-3)
    matrices = {id(p) for group in optimizer.param_groups if group["matrix"] is None for p in group["params"]}
    assert {n for n, p in trial.module.named_parameters() if id(p) in matrices} == {
        f"blocks.{n}.{w}.weight" for n in range(2) for w in ("down", "out", "qkv", "up")
    }


def test_a_curve_is_smoothed_by_means_of_what_came_before():
    assert smoothed(torch.tensor([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [1, 2, 4, 6]


def test_the_command_measures_prints_and_writes(tmp_path, capsys, monkeypatch):
    plain = lab.measure
    monkeypatch.setattr(lab, "measure", lambda *given, **more: plain(*given, **more, rates=(0.3, 1.0)))
    words = [
        "bench",
        "optimizers",
        "--quick",
        "--problems",
        "landscape",
        "digits",
        "--optimizers",
        "SGD",
        "AdaMuon-like",
    ]
    assert run([*words, "--seeds", "2", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "digits, small vision transformer" in out
    assert "AdaMuon-like" in out
    told = json.loads((tmp_path / "out" / "optimizers.json").read_text())
    assert set(told["results"]["digits"]) == {"SGD", "AdaMuon-like"}
    assert told["about"]["quick"] is True
    assert told["reach"]["momentum 0.9"] == [7, 44]
    assert (tmp_path / "out" / "optimizers.png").stat().st_size > 10_000
    again = [*words[:3], "--problems", "landscape", "--optimizers", "AdamW", "--resume", "--out", str(tmp_path / "out")]
    assert run([*again, "--seeds", "2"]) == 0
    told = json.loads((tmp_path / "out" / "optimizers.json").read_text())
    assert set(told["results"]["landscape"]) == {"SGD", "AdamW"}
    assert set(told["results"]["digits"]) == {"SGD", "AdaMuon-like"}
    capsys.readouterr()
    assert run([*again, "--seeds", "1"]) != 0
    assert "measured with seeds 2, but now it is 1" in capsys.readouterr().err


def test_text_is_measured_in_bits_per_byte():
    trial = QUICK["text"].make(0)
    assert 7 < trial.score() < 9
    assert float(trial.loss(0).detach()) == pytest.approx(math.log(257), abs=0.2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--problems", "digit"], "problems: there is none named 'digit'"),
        (["--optimizers", "Adam"], "optimizers: there is none named 'Adam'.*AdamW"),
        (["--seeds", "0"], "seeds is 0"),
        (["--steps", "0"], "steps is 0"),
        (["--pixels", "30"], "pixels is 30.*multiple of 4"),
        (["--problems", "images"], "images: expected --data"),
        (["--data", "nowhere/at/all"], "nowhere/at/all is no folder"),
    ],
)
def test_what_cannot_be_is_one_message(words, message, capsys):
    assert run(["bench", "optimizers", *words]) == 2

    assert re.search(message, capsys.readouterr().err)


def test_without_scikit_learn_the_digits_are_left_out_and_said_to_be(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("nestling.bench.optimizers.find_spec", lambda name: None)
    assert run(["bench", "optimizers", "--problems", "digits"]) == 2
    assert "pip install 'nestling[bench]'" in capsys.readouterr().err
    monkeypatch.setattr(lab, "measure", lambda chosen, *given, **more: {})
    monkeypatch.setattr("nestling.bench.optimizer_report.draw", lambda *given, **more: None)
    assert run(["bench", "optimizers", "--out", str(tmp_path)]) == 0
    assert "left out: the digits come with scikit-learn" in capsys.readouterr().out.replace("\n", " ")


def test_a_verb_of_two_words_asks_for_its_second(capsys):
    assert run(["bench"]) == 0
    assert "bench optimizers" in capsys.readouterr().out
    assert run(["bench", "optimizer"]) == 2
    assert "optimizers" in capsys.readouterr().err
