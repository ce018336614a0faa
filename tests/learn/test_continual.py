"""A changing stream: its parts in turn, what is measured after each, and going on after an interruption anywhere."""

import dataclasses
import json
import math
import os

import pytest
import torch

import nestling.learn.run as run
from nestling import stream
from nestling.learn import TrainConfig, train
from nestling.learn.continual import Retained
from nestling.learn.optimizer import CONTINUAL_PERIOD, from_config
from nestling.stream import CorpusError, Parts, StreamError, parts_of


@pytest.fixture
def paths(tmp_path):
    """Two languages of one word each, and an alphabet."""
    texts = {"a": "abab", "b": "cdcd", "c": "xyzw"}
    for name, word in texts.items():
        folder = tmp_path / name
        folder.mkdir()
        for n in range(6):
            (folder / f"{n}.txt").write_text(word * (50 + n), encoding="utf-8")
    return tuple(str(tmp_path / name) for name in texts)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Curves take longer to draw than these runs to learn."""
    monkeypatch.setattr(run, "draw_curve", lambda *arguments: None)


def settings(paths, tmp_path, **more):
    return TrainConfig(
        **{
            "model": "deltanet", "tokens": 1500, "lanes": 2, "length": 32, "lr": 1e-2, "schedule": "constant", "warmup": 0,
            "continual": True, "data": paths, "out": tmp_path / "run", "eval_documents": 2, "checkpoint_every": 1000, **more,
        }
    )  # fmt: skip


def test_forgetting_is_its_formula():
    found = Retained(("a", "b", "c"))
    found.add([2.0, 7.0, 8.0])
    assert math.isnan(found.forgetting)
    found.add([2.5, 3.0, 8.0])
    assert (found.forgetting, found.learned, found.kept) == (0.5, 2.5, 2.75)
    found.add([1.5, 4.0, 3.0])
    assert found.forgetting == 0.5  # of a nothing, as it is known best now; of b 1
    assert found.summary()["kept"] == pytest.approx(8.5 / 3)
    with pytest.raises(ValueError, match="does not fit 3 parts"):
        found.add([1.0, 1.0, 1.0])


def test_the_parts_are_read_in_turn_and_measured_after_each(paths, tmp_path):
    result = train(settings(paths, tmp_path))
    told = json.loads((result.out / "continual.json").read_text())
    rows = torch.tensor(told["bits_per_byte"])
    assert told["parts"] == list(paths)
    assert rows.shape == (3, 3)
    # Each part is known best once it has been read, and not before.
    assert (rows.diagonal() < rows[0]).tolist() == [False, True, True]
    assert rows[0, 0] < rows[0, 1:].min() - 1
    assert told["forgetting"] == pytest.approx(
        sum((rows[2, j] - rows[j:, j].min()).item() for j in range(2)) / 2, abs=1e-6
    )


def test_an_interrupted_run_goes_on_to_the_same_end(paths, tmp_path, monkeypatch):
    """Stopped in the middle of a part, at a border before it is measured, and while it is measured."""
    config = settings(paths[:2], tmp_path, tokens=384)  # two parts of three steps
    straight = train(dataclasses.replace(config, out=tmp_path / "straight"))

    class Stopping(run.Interrupt):
        """Asks to stop when `when` has been reached."""

        when = None

        @property
        def requested(self):
            return 2 if self.when is not None and self.when() else None

        @requested.setter
        def requested(self, value):
            pass

    steps, measured = [], []
    step, measure = run.Learner.step, run._measure
    monkeypatch.setattr(run.Learner, "step", lambda self: (steps.append(1), step(self))[1])

    def watched(*arguments):
        measured.append(1)
        return measure(*arguments)

    monkeypatch.setattr(run, "_measure", watched)
    monkeypatch.setattr(run, "Interrupt", Stopping)
    for number, when in enumerate((lambda: len(steps) >= 2, lambda: len(steps) >= 3, lambda: len(measured) >= 2)):
        steps.clear()
        measured.clear()
        out = tmp_path / f"stopped{number}"
        Stopping.when = staticmethod(when)
        first = train(dataclasses.replace(config, out=out))
        assert first.interrupted == 2
        assert not (out / "continual.json").exists()
        Stopping.when = None
        last = train(dataclasses.replace(config, out=out, resume=True))
        assert last.interrupted is None
        assert (out / "continual.json").read_text() == (straight.out / "continual.json").read_text()
        assert last.bits_per_byte == straight.bits_per_byte


def test_slow_weights_move_at_a_slow_period_unless_another_is_given(paths, tmp_path):
    config = settings(paths, tmp_path)
    model = run.build_model(config)
    assert {g["every"] for g in from_config(config, model).param_groups} == {CONTINUAL_PERIOD}
    asked = dataclasses.replace(config, every={"head.weight": 2})
    assert {g["every"] for g in from_config(asked, model).param_groups} == {1, 2}


def test_a_stream_of_parts_goes_on_from_its_cursor(paths):
    def start():
        tokenizer = stream.ByteTokenizer()
        return Parts([stream.Lanes(p.corpus.train, tokenizer, 2, 16) for p in parts_of(paths)])

    one = start()
    next(one), one.turn(1), next(one), one.turn(0)
    saved = json.loads(json.dumps(one.state_dict()))
    expected = [next(one).tokens, (one.turn(1), next(one).tokens)[1]]
    other = start()
    other.load_state_dict(saved)
    assert torch.equal(next(other).tokens, expected[0])
    other.turn(1)
    assert torch.equal(next(other).tokens, expected[1])
    with pytest.raises(StreamError, match="part 3 is not there"):
        one.turn(3)
    with pytest.raises(StreamError, match="has 2 parts, but the stream has 3"):
        other.load_state_dict({**saved, "streams": saved["streams"][:2]})


def test_parts_of_the_embedded_corpus_are_packages_with_held_out_files():
    found = parts_of(())
    assert len(found) == 4
    assert all(p.corpus.heldout and all(d.name.startswith(f"{p.name}/") for d in p.corpus.train) for p in found)
    joined = stream.joined(found)
    assert len(joined.train) == sum(len(p.corpus.train) for p in found)


def test_a_part_is_not_given_twice(paths):
    again = f"{paths[0]}/../{os.path.basename(paths[0])}"
    with pytest.raises(CorpusError, match=r"data: got .* twice, but every part of a changing stream is read once"):
        parts_of([*paths, again])


def test_one_part_is_no_changing_stream(paths):
    with pytest.raises(CorpusError, match="at least two parts, but there is 1"):
        parts_of(paths[:1])
