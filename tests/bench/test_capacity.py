"""The capacity laboratory measures what it says, and says of a claim what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from nestling import cli
from nestling.bench import capacity, capacity_lab
from nestling.bench.capacity import Curve, Trial, crossing, measure
from nestling.bench.capacity_claims import Claim, claims, more, nearer, rises
from nestling.memory import Decay, Gradient, Implicit, Polynomial

HEBB = capacity_lab.matrix(32, 8, Gradient())


def curve(recall: list[float], error: list[float] | None = None) -> Curve:
    """Four seeds, a little apart, over n = 4, 8, 16."""
    apart = 1 + 0.01 * torch.arange(4.0)[:, None]
    values = [torch.tensor(x) * apart for x in (recall, error or recall)]
    return Curve("made", (4, 8, 16), *values, 1.0)


def test_a_hebbian_memory_errs_as_its_formula_says() -> None:
    """Σ‖M(k) − v‖²/Σ‖v‖² with M(k) = ηΣ(k·k_i)v_i is in the mean (1 − η)² + η²(n − 1)/d for random unit keys."""
    found = measure(Trial("", HEBB, rates=(0.5,)), (16, 64), seeds=200)
    expected = torch.tensor([0.25 + 0.25 * (n - 1) / 32 for n in (16, 64)])
    torch.testing.assert_close(found.error.mean(0), expected, rtol=0.03, atol=0.0)
    assert found.recall.shape == (200, 2)


@pytest.mark.parametrize("rewrite", [False, True])
def test_a_seed_is_the_same_alone_as_beside_others(rewrite: bool) -> None:
    spec = capacity_lab.matrix(8, 8, Implicit(), Polynomial(2, reduce=4))
    trial = Trial("", spec, passes=2, rates=(0.1, 1.0), rewrite=rewrite)
    both = measure(trial, (4, 12), seeds=3, seed=5)
    alone = [measure(trial, (4, 12), seeds=1, seed=seed) for seed in (5, 6, 7)]
    assert {one.rate for one in alone} == {both.rate}
    torch.testing.assert_close(torch.cat([one.error for one in alone]), both.error)
    assert torch.equal(torch.cat([one.recall for one in alone]), both.recall)
    assert len(set(both.error[:, 1].tolist())) == 3, "seeds differ"


def test_pairs_shown_in_pieces_or_at_once_are_the_same() -> None:
    """A read on the way changes nothing, and where it rounds nothing a lower precision's loop over tokens is float32's scan."""
    both = measure(Trial("", HEBB), (8, 16), seeds=2)
    last = measure(Trial("", HEBB), (16,), seeds=2)
    torch.testing.assert_close(both.error[:, 1], last.error[:, 0])
    pairs = torch.eye(4).view(1, 1, 4, 4)
    spec = capacity_lab.matrix(4, 4, Implicit())
    w0, lr = spec.init(1), torch.ones(1, 1, 1)
    low, full = (
        capacity.write(Trial("", spec, precision=p), spec, w0, pairs, pairs, lr) for p in ("bfloat16", "float32")
    )
    torch.testing.assert_close(low.weights, full.weights)  # halves are exact in both


def test_weights_and_features_are_rounded_after_every_token() -> None:
    trial = Trial(
        "",
        capacity_lab.matrix(4, 4, Gradient(), Polynomial(2), retention=Decay()),
        precision="bfloat16",
        retention=0.999,
    )
    spec = capacity._at_precision(trial)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 1, 9, 4, generator=generator).unbind(0)
    w0 = spec.init(1, generator)
    state = capacity.write(trial, spec, w0, keys, values, torch.ones(1, 1, 1))
    assert torch.equal(state.weights[0], state.weights[0].bfloat16().float())
    features = spec.features.apply(keys, w0[1:])
    assert torch.equal(features, features.bfloat16().float())
    kept = capacity.write(trial, spec, w0, keys[:, :, :1], values[:, :, :1], torch.ones(1, 1, 1))
    gone = capacity.write(
        replace(trial, retention=0.5), spec, w0, keys[:, :, :2], 0 * values[:, :, :2], torch.ones(1, 1, 1), kept
    )
    torch.testing.assert_close(gone.weights[0], kept.weights[0] / 4)


def test_bound_anew_asks_for_the_new_values() -> None:
    erases = measure(Trial("", capacity_lab.matrix(8, 8, Implicit()), rates=(1e6,), rewrite=True), (1,), seeds=3)
    adds = measure(Trial("", capacity_lab.matrix(8, 8, Gradient()), rewrite=True), (1,), seeds=3)
    assert erases.error.max() < 1e-6
    assert adds.error.min() > 0.1, "the old value stays in the answer"


def test_least_squares_stores_as_many_pairs_as_there_are_features() -> None:
    """Of unit keys: on the sphere the squares add up to the constant feature, so that one of them is no feature of its own."""
    features = Polynomial(2)
    count = features.width(3) - 1
    found = measure(
        Trial("", capacity_lab.matrix(3, 4, Implicit(), features), solved=True), (count, count + 6), seeds=3
    )
    assert found.error[:, 0].max() < 1e-4
    assert found.error[:, 1].min() > 1e-2


def test_the_step_size_is_chosen_and_only_the_last_are_asked_for() -> None:
    assert measure(Trial("", HEBB, rates=(1e-6, 0.5, 30.0)), (8,), seeds=3).rate == 0.5
    decayed = Trial("", capacity_lab.matrix(16, 8, Gradient(), retention=Decay()), retention=0.5)
    some, every = (measure(replace(decayed, asked=n), (64,), seeds=4).recall.mean() for n in (1, None))
    assert some == 1, "of one value any answer is nearest to it"
    assert every < 0.2


def test_answers_that_are_not_finite_recall_nothing() -> None:
    values = torch.randn(1, 2, 5, 3)
    recall, error = capacity._score(torch.full_like(values, torch.nan), values)
    assert not recall.any()
    assert torch.isinf(error).all()
    recall, error = capacity._score(values, values)
    assert recall.tolist() == [1, 1]
    assert not error.any()


@pytest.mark.parametrize(
    ("scores", "n"),
    [
        ([1.0, 0.9, 0.8], 8),
        ([1.0, 1.0, 0.8], 8 * 2**0.5),
        ([0.5, 0.4, 0.3], 4),
        ([1.0, 1.0, 0.95], 16),
        ([1.0, 0.95, float("nan")], 8),
        ([0.5, 0.9, 0.2], 8),
    ],
)
def test_capacity_is_the_largest_n_with_recall_of_nine_in_ten(scores: list[float], n: float) -> None:
    assert crossing((4, 8, 16), torch.tensor([scores]), 0.9).item() == pytest.approx(n)


def test_a_claim_is_held_against_the_figures() -> None:
    high, low = curve([1.0, 1.0, 0.8]), curve([1.0, 0.7, 0.1])
    assert [more("", *pair).verdict for pair in ((high, low), (low, high), (low, low))] == [
        "holds",
        "refuted",
        "not seen",
    ]
    assert re.fullmatch(r"11\.8 against 5\.2 pairs, 2\.\d\d × \[2\.\d\d–2\.\d\d\]", more("", high, low).figures)
    near, far = curve([1.0, 1, 1], [0.01, 0.02, 0.2]), curve([1.0, 1, 1], [0.1, 0.3, 0.9])
    assert nearer("", near, far, 16).holds is True
    assert nearer("", far, near, 16).holds is False
    assert rises("", (8, 16), [low, high], 0.5).holds is True
    assert rises("", (8, 16), [low, low], 0.5).holds is False
    alone = Curve("one", (4, 8), torch.tensor([[1.0, 0.5]]), torch.tensor([[0.0, 1.0]]), 1.0)
    assert more("", alone, alone).holds is None, "one seed decides nothing"
    full = curve([1.0, 1.0, 1.0])
    assert more("", full, full) == Claim("", None, "both hold all 16: more were not asked for")


def test_the_command_measures_prints_and_writes(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.run(["bench", "capacity", "--quick", "--seeds", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Hebbian, bound anew" in out
    content = json.loads((tmp_path / "capacity.json").read_text("utf-8"))
    assert list(content["experiments"]) == list(capacity_lab.experiments(quick=True))
    assert content["about"]["seeds"] == 2
    verdicts = {c["claim"]: c["verdict"] for c in content["claims"]}
    assert verdicts["float32 stores a few pairs more exactly than bfloat16, degree 1"] == "holds"
    assert all(v in ("holds", "refuted", "not seen") for v in verdicts.values())
    assert (tmp_path / "capacity.png").read_bytes().startswith(b"\x89PNG")
    code = cli.run(
        ["bench", "capacity", "--quick", "--seeds", "1", "--experiments", "rule", "--out", str(tmp_path / "one")]
    )
    assert code == 0
    assert list(json.loads((tmp_path / "one" / "capacity.json").read_text("utf-8"))["experiments"]) == ["rule"]


def test_every_claim_has_its_experiment() -> None:
    """At full size nothing is left out: labels of trials and those that claims ask for are the same."""
    chosen = capacity_lab.experiments()
    assert len({t.label for e in chosen.values() for s in e.series for t in s.trials}) > 60
    made = {
        name: {
            t.label: Curve(
                t.label, e.ns, torch.linspace(1, 0.2, len(e.ns)).repeat(2, 1), torch.full((2, len(e.ns)), 0.5), 1.0
            )
            for s in e.series
            for t in s.trials
        }
        for name, e in chosen.items()
    }
    texts = [claim.text for claim in claims(made)]
    for part in (
        "bound anew",
        "stores more pairs exactly",
        "gated MLP",
        "degree 4",
        "least squares",
        "float16, degree 3",
        "window of 16",
    ):
        assert any(part in text for text in texts), part
    assert len(texts) == len(set(texts)) > 40
