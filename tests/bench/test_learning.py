"""What the learning bench asks is what it says it asks, and its runs can be repeated."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

import nestling as nl
from nestling.bench import formal, learning, sequences
from nestling.bench import learning_lab as lab
from nestling.cli import run
from nestling.memory.networks import Matrix


def test_words_of_parity_are_of_the_language_distinct_and_as_long_as_asked():
    made = formal.words(formal.LANGUAGES["parity"], 0, train=400, test=100)
    assert (len(made.train), *map(len, made.bins)) == (400, 100, 100)
    assert len({*made.train, *made.bins[0], *made.bins[1]}) == 600, "a test word was among the training words"
    for chosen, (least, most) in ((made.train, (2, 50)), (made.bins[0], (2, 50)), (made.bins[1], (52, 100))):
        assert all(least <= len(word) <= most and sum(word) % 2 == 0 for word in chosen)
        assert max(map(len, chosen)) > 0.9 * most
    for word in made.train[:50]:
        assert list(made.language.labels(word)) == [int(word[: n + 1].count(1) % 2 == 0) for n in range(len(word))]
    assert made == formal.words(formal.LANGUAGES["parity"], 0, train=400, test=100)
    assert made.train != formal.words(formal.LANGUAGES["parity"], 1, train=400, test=100).train


def test_all_even_words_are_few():
    made = formal.words(formal.LANGUAGES["aa"], 0)
    assert sorted(map(len, made.train)) == sorted(map(len, made.bins[0])) == list(range(2, 51, 2))
    assert sorted(map(len, made.bins[1])) == list(range(52, 101, 2))
    assert {symbol for word in made.train for symbol in word} == {0}
    assert list(made.language.labels(made.train[0]))[:4] == [0, 1, 0, 1][: len(made.train[0])]


def test_batches_hold_words_of_similar_length_and_targets_end_with_them():
    language = formal.LANGUAGES["parity"]
    made = formal.words(language, 0, train=400, test=10)
    reading = formal.batches(language, made.train, 8, 3)
    spreads = []
    for _ in range(16):
        tokens, targets = next(reading)
        lengths = (targets != formal.UNSCORED).sum(1)
        assert tokens.shape == targets.shape == (8, int(lengths.max()))
        spreads.append(int(lengths.max() - lengths.min()))
        for row, length in zip(range(8), lengths.tolist(), strict=True):
            word = tuple(tokens[row, :length].tolist())
            assert word in made.train
            assert targets[row, :length].tolist() == language.labels(word)
            assert not tokens[row, length:].any()
    assert sum(spreads) / len(spreads) < 25, "as long as words drawn evenly differ"


class Knows(nn.Module):
    """Says the parity, or with `wrong` the opposite at one place."""

    def __init__(self, wrong: int | None = None):
        super().__init__()
        self.wrong = wrong

    def forward(self, tokens):
        even = 1 - tokens.cumsum(1) % 2
        if self.wrong is not None:
            even[:, self.wrong] = 1 - even[:, self.wrong]
        return nn.functional.one_hot(even, 4).float(), None


def test_a_word_is_right_if_all_of_it_is():
    language = formal.LANGUAGES["parity"]
    chosen = formal.words(language, 0, train=20, test=60).bins[0]
    assert formal.share_right(Knows(), language, chosen, at_once=7) == 1
    longer = sum(len(word) > 9 for word in chosen) / len(chosen)
    assert 0 < longer < 1
    assert formal.share_right(Knows(wrong=9), language, chosen, at_once=7) == pytest.approx(1 - longer)


def test_recall_asks_for_values_of_keys_that_were_seen():
    tokens, targets, asked = sequences.recall(50, torch.Generator().manual_seed(0), vocabulary=12, length=20)
    assert tokens.shape == targets.shape == asked.shape == (50, 19)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    for row in range(50):
        pairs = [*tokens[row].tolist(), int(targets[row, -1])]
        known = {}
        for place in range(0, 20, 2):
            key, value = pairs[place], pairs[place + 1]
            assert key < 6 <= value < 12
            assert bool(asked[row, place]) == (key in known)
            assert known.setdefault(key, value) == value
            assert place == 18 or not asked[row, place + 1]
        assert asked[row, -1]


def test_copying_asks_for_the_content_in_order():
    tokens, targets, asked = sequences.copying(50, torch.Generator().manual_seed(0), vocabulary=9, length=30, content=5)
    assert tokens.shape == (50, 30)
    assert torch.equal(asked, (torch.arange(30) >= 25).expand(50, -1))
    assert (tokens[:, 24] == 8).all()
    assert (tokens[:, 25:] == 7).all()
    places = set()
    for row in range(50):
        content = [t for t in tokens[row, :24].tolist() if t < 7]
        assert content == targets[row, 25:].tolist()
        assert len(content) == 5
        places |= {n for n in range(24) if tokens[row, n] < 7}
    assert places == set(range(24))


def test_accuracy_counts_every_token_alike():
    targets = torch.tensor([[1, 1, 1, 2, 3]])
    answers = torch.tensor([[1, 1, 0, 2, 0]])
    asked = torch.tensor([[True, True, True, True, False]])
    assert sequences.macro_accuracy(answers, targets, asked) == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.parametrize("lr_max", [0.5, 0.75, 1.0])
def test_a_step_size_of_one_turns_the_sign_of_what_is_stored(lr_max):
    """At chunk 1, α = 1 and without a target each token multiplies what stands at its key by 1 − 2η (derived)."""
    spec = nl.memory.named(
        "self_modifying", key_dim=4, chunk=1, lr_max=lr_max, network=Matrix(identity=True), others=Matrix(identity=True)
    )
    w0 = {n: w.double() for n, w in zip(spec.names, spec.init(1), strict=True)}
    for gate in ("lr", "retention"):
        w0[f"{gate}.weight"].zero_()
        w0[f"{gate}.bias"].fill_(50.0)
    x = torch.tensor([0.6, 0.0, 0.8, 0.0], dtype=torch.float64).expand(1, 1, 6, 4)
    y, _ = spec.scan(tuple(w0.values()), x, x, torch.zeros_like(x))
    powers = (1 - 2 * lr_max) ** torch.arange(6, dtype=torch.float64)
    torch.testing.assert_close(y[0, 0], powers[:, None] * x[0, 0], rtol=1e-9, atol=1e-9)


def test_a_token_multiplies_all_memories_by_the_same_matrix():
    """At chunk 1 by αI − ηkᵀ(2k − v), whose eigenvalue along the key is α − η(2 − ⟨k, v⟩) (derived)."""
    matrix = Matrix(init_scale=0.3, identity=True)
    spec = nl.memory.named("self_modifying", key_dim=4, chunk=1, lr_max=1.0, network=matrix, others=matrix)
    w0 = tuple(w.double() for w in spec.init(1, torch.Generator().manual_seed(0)))
    q, a, b = (
        torch.randn(1, 1, 1, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (1, 2, 3)
    )
    named = dict(zip(spec.names, (w[0] for w in w0), strict=True))
    k, v = nn.functional.normalize(a[0, 0] @ named["k.0"], dim=-1), b[0, 0] @ named["v.0"]
    gate = {
        g: torch.sigmoid(a[0, 0] @ named[f"{g}.0"] @ named[f"{g}.weight"] + named[f"{g}.bias"])
        for g in ("lr", "retention")
    }
    factor = gate["retention"] * torch.eye(4, dtype=torch.float64) - gate["lr"] * k.T @ (2 * k - v)
    after = spec.split(spec.scan(w0, q, a, b)[1].weights)
    for name, (weights,) in after.items():
        torch.testing.assert_close(weights[0, 0], factor @ named[f"{name}.0"], rtol=1e-9, atol=1e-9)
    along = gate["retention"] - gate["lr"] * (2 - k @ v.T)
    torch.testing.assert_close((2 * k - v) @ factor, along * (2 * k - v), rtol=1e-9, atol=1e-9)


def test_of_words_ever_more_counts():
    trial, seen = learning.language("parity", 0, growing=25, quick=True), []

    class Watches(Knows):
        def forward(self, tokens):
            seen.append(tokens.shape[1])
            return super().forward(tokens)

    for _ in range(40):
        trial.loss(Watches())
    assert seen[:3] == [4, 4, 6]
    assert all(width <= max(4, 2 * step) for step, width in enumerate(seen, 1))
    assert max(seen) > 40


@pytest.mark.parametrize("task", ["parity", "aa"])
def test_hope_begins_formal_languages_where_symbols_turn_signs(task):
    """Values of 0, nothing forgotten; the step sizes of some heads differ by much between symbols."""
    torch.manual_seed(0)
    model = learning.tasks()[task].entries["hope"](4)
    (mixer,) = model.mixers()
    spec = mixer.spec
    assert (spec.chunk, spec.chunk_others, spec.lr_max, spec.retention.decays) == (1, None, 1.0, False)
    initial = dict(zip(spec.names, mixer.initial, strict=True))
    assert not initial["v.0"].any()
    x = torch.nn.functional.normalize(torch.randn(100, 1, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    lr = torch.sigmoid(x[:, None] @ initial["lr.weight"] + initial["lr.bias"]).detach()
    assert lr.min() < 0.1 < 0.9 < lr.max()


@torch.no_grad()
def test_hope_recalls_in_context_before_anybody_has_trained_it():
    """Its continuum learns key → value from the model's own loss, window by window; the first window is chance."""
    torch.manual_seed(0)
    model = learning.tasks()["recall"].entries["hope"](16)
    tokens, targets, asked = sequences.recall(64, torch.Generator().manual_seed(5))
    right = model(tokens)[0].argmax(-1) == targets
    first, last = (float(right[:, s][asked[:, s]].double().mean()) for s in (slice(0, 16), slice(48, 63)))
    assert first < 0.25 < 0.35 < last


def test_a_run_can_be_repeated_and_solving_ends_it():
    task = learning.tasks(quick=True)["aa"]
    one, again = (lab.once("aa", task, "transformer", 1e-2, 0) for _ in range(2))
    assert (one.losses, one.scores, one.looks) == (again.losses, again.scores, again.looks)
    assert len(one.losses) == one.steps == task.steps
    assert [step for step, _ in one.looks] == [2]
    easy = dataclasses.replace(
        task,
        make=lambda seed: dataclasses.replace(task.make(seed), look=lambda m: {"x": 1.0}, score=lambda m: {"x": 1.0}),
    )
    ended = lab.once("aa", easy, "transformer", 1e-2, 0)
    assert (ended.steps, ended.scores, lab.solved(easy, ended.scores)) == (2, {"x": 1.0}, True)
    runs = lab.measure({"aa": easy}, ["transformer"])["aa"]["transformer"]
    assert len(runs) == 1, "a rate that solves the task ends the search"


def test_what_diverges_scores_nothing_and_the_best_rate_is_by_the_last_score(tmp_path):
    task = learning.tasks(quick=True)["aa"]
    wild = lab.once("aa", task, "transformer", 1e30, 0)
    assert all(map(math.isnan, wild.scores.values()))
    good, better = (dataclasses.replace(wild, scores={"bin 0": a, "bin 1": b}) for a, b in ((0.9, 0.1), (0.5, 0.2)))
    assert lab.best(task, [wild, good, better]) is better
    assert lab.best(dataclasses.replace(task, higher=False), [wild, good, better]) is good
    lab.save({"aa": {"transformer": (wild,)}}, tmp_path / "x.json", about={})
    told = json.loads((tmp_path / "x.json").read_text())["results"]["aa"]["transformer"][0]
    assert told["scores"] == {"bin 0": None, "bin 1": None}


def test_text_is_measured_by_position_and_lanes_are_carried():
    trial = learning.tasks(quick=True)["text"].make(0)
    torch.manual_seed(0)
    model = nl.models.build("gated_deltanet", "tiny", vocab_size=257)
    scores = trial.score(model)
    assert list(scores) == ["0–8", "8–16", "16–32", "32–64", "64–128", "128–256", "± last"]
    assert 7 < scores["0–8"] < 9
    with torch.no_grad():
        first = float(trial.loss(model))
        carried = float(trial.loss(model))
        fresh = learning.tasks(quick=True)["text"].make(0)
        assert float(fresh.loss(model)) == first
    assert carried != first


def test_the_command_trains_prints_and_writes(tmp_path, capsys):
    words = ["bench", "learning", "--quick", "--tasks", "aa", "text", "--models", "transformer", "hope"]
    assert run([*words, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "(aa)*: share of words right" in out
    assert "128–256" in out
    told = json.loads((tmp_path / "out" / "learning.json").read_text())
    assert {task: set(row) for task, row in told["results"].items()} == {
        "aa": {"hope", "transformer"},
        "text": {"hope", "transformer"},
    }
    assert told["about"]["quick"] is True
    assert (tmp_path / "out" / "learning.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tasks", "paritty"], "tasks: there is none named 'paritty'. Did you mean 'parity'"),
        (["--models", "hop"], "models: there is none named 'hop'. Did you mean 'hope'"),
        (["--tasks", "aa", "--models", "titans_lmm"], "models: titans_lmm have no part in aa"),
        (["--threads", "0"], "threads: got 0, but expected a number from 1 to"),
    ],
)
def test_what_cannot_be_is_said(argv, words, capsys):
    assert run(["bench", "learning", *argv]) == 2
    assert words in capsys.readouterr().err
