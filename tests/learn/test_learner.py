"""Learning from ordered lanes: what is carried, reset, skipped and counted, and runs that go on bit for bit after any end."""

import io
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from nestling import cli, models, stream
from nestling import state as fast
from nestling.learn import Learner, LearningError, TrainConfig, adamw, checkpoint, load_run, train
from nestling.learn.learner import count_faults
from nestling.learn.run import build_model, describe

WORDS = ("nest", "bird", "egg", "slow", "fast", "reads", "the", "a", "and", "of", "grün", "—")


def text(seed, words=300):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def lanes_of(texts, lanes=2, length=16, seed=0):
    documents = [stream.Document(str(number), item) for number, item in enumerate(texts)]
    return stream.Lanes(documents, stream.ByteTokenizer(), lanes, length, seed=seed)


def learner_of(name="titans_lmm", texts=None, lanes=2, length=16, lr=1e-2, **settings):
    torch.manual_seed(0)
    model = models.build(name, "tiny")
    batches = lanes_of(texts or [text(seed) for seed in range(4)], lanes, length)
    return Learner(model, adamw(model, lr=lr), batches, **settings)


def watch(learner):
    """Record the masks and the state of every call of the learner's model."""
    calls = []
    forward = learner.model.forward

    def recorded(tokens, state=None, *, reset=None, valid=None):
        reset = torch.zeros_like(tokens, dtype=torch.bool) if reset is None else reset
        calls.append((tokens, state, reset))
        return forward(tokens, state, reset=reset, valid=valid)

    learner.model.forward = recorded
    return calls


@pytest.mark.parametrize("name", ["gated_deltanet", "titans_lmm"])
def test_steps_equal_a_plain_loop_over_the_stream(name):
    """The state is carried and cut from the graph: what a carried segment learns does not reach back over its border."""
    learner = learner_of(name, schedule=lambda tokens: 1 / (1 + tokens), clip=0.5)
    results = [learner.step() for _ in range(4)]

    torch.manual_seed(0)
    model = models.build(name, "tiny")
    optimizer = adamw(model, lr=1e-2)
    batches = lanes_of([text(seed) for seed in range(4)])
    state, tokens = None, 0
    for result in results:
        batch = next(batches)
        logits, state = model(batch.tokens, state, reset=batch.reset if batch.reset.any() else None)
        loss = nn.functional.cross_entropy(logits[batch.loss_mask], batch.targets[batch.loss_mask])
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + tokens)
        optimizer.step()
        state = fast.detach(state)
        tokens += batch.tokens.numel()
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert result.lr == 1e-2 / (1 + tokens - 32)
        assert result.bits_per_byte == pytest.approx(result.loss / math.log(2))
    assert [result.step for result in results] == [1, 2, 3, 4]
    assert learner.progress.tokens == tokens == 128
    for (label, one), other in zip(learner.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=label)


def test_initial_memories_learn_where_a_lane_starts_and_not_on_a_carried_segment():
    learner = learner_of("titans_lmm", carry=3, lanes=1)
    seen = []
    step = learner.optimizer.step

    def looked_at():
        grads = {name: p.grad for name, p in learner.model.named_parameters()}
        initial = [grad for name, grad in grads.items() if ".initial." in name]
        seen.append(sum(0.0 if grad is None else float(grad.abs().sum()) for grad in initial) > 0)
        assert all(grads[f"blocks.{block}.mixer.layer.qkv.weight"].abs().sum() > 0 for block in (0, 1))
        step()

    learner.optimizer.step = looked_at
    for _ in range(7):
        learner.step()
    assert seen == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("settings", [{}, {"error": "local"}], ids=str)
def test_all_levels_learn_their_weights_and_step_sizes_on_carried_segments_of_one_period(settings):
    """The slow level moves with the last token of a segment, if at all: its step size learns from the segments behind."""
    torch.manual_seed(0)
    model = models.build("hope", "tiny", periods=[4, 8, 32], **settings)
    learner = Learner(model, adamw(model, lr=1e-2), lanes_of([text(0, 2000)], lanes=1, length=8))
    levels = [(f"blocks.{b}.ffn.levels_.{n}", period) for b in (0, 1) for n, period in enumerate((4, 8, 32))]
    seen = []
    step = learner.optimizer.step

    def looked_at():
        grads = {name: p.grad for name, p in learner.model.named_parameters()}
        seen.append({name for name, g in grads.items() if g is not None and bool(g.abs().sum() > 0)})
        step()

    learner.optimizer.step = looked_at
    for _ in range(6):
        learner.step()
    for level, period in levels:
        assert all(f"{level}.mlp.up.weight" in found for found in seen), level
        moved = [f"{level}.rate" in found for found in seen]
        assert moved == [number * 8 >= period or period < 8 for number in range(6)], level


def test_step_sizes_are_trained_through_a_module_around_the_model():
    class Around(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *given, **masks):
            return self.module(*given, **masks)

    found = []
    for wrap in (lambda model: model, Around):
        learner = learner_of("hope", [text(0, 2000)], lanes=1, length=8)
        learner.model = wrap(learner.model)
        for _ in range(4):
            learner.step()
        found.append([p.item() for name, p in learner.model.named_parameters() if name.endswith(".rate")])
    assert found[0] == found[1]


def test_a_module_of_two_models_carries_what_it_returned():
    """Whose state it is only the module knows."""

    class Both(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.one, self.other = model, models.build("hope", "tiny", periods=[4])

        def forward(self, tokens, state=None, **masks):
            state = (None, None) if state is None else state
            (a, first), (b, second) = self.one(tokens, state[0], **masks), self.other(tokens, state[1], **masks)
            return a + b, (first, second)

    learner = learner_of("hope", [text(0, 2000)], lanes=1, length=8)
    learner.model = Both(learner.model)
    assert all(math.isfinite(learner.step().loss) for _ in range(3))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"carry": 1}, "a period of 32 tokens stays as it is, as lanes start afresh after --length 16 times --carry 1"),
        ({"overrides": {"periods": [4, 32], "outer": 2}}, "32 tokens stays as it is, as with outer=2 no update"),
        (
            {"overrides": {"periods": [4, 32], "arrangement": "nested", "rank": 2}},
            "as with arrangement=nested and rank=2",
        ),
        ({}, None),
    ],
    ids=str,
)
def test_a_run_says_which_step_sizes_it_cannot_train(settings, words):
    settings = {"overrides": {"periods": [4, 32]}, **settings}
    config = TrainConfig(model="hope", size="tiny", length=16, **settings)
    console = quiet()
    describe(config, build_model(config), stream.Corpus([], []), console)
    said = console.file.getvalue()
    assert words in said if words else "stays as it is" not in said


@pytest.mark.parametrize(("length", "periods"), [(4, "4, 8"), (8, "8"), (12, None)])
def test_a_run_says_which_gains_of_local_losses_it_hardly_trains(length, periods):
    settings = {"periods": [4, 8], "error": "local"}
    config = TrainConfig(model="hope_swa", size="tiny", length=length, overrides=settings)
    console = quiet()
    describe(config, model := build_model(config), stream.Corpus([], []), console)
    said = console.file.getvalue()
    assert f"gains (value) of levels with a period of {periods} tokens" in said if periods else "gains" not in said
    learner = learner_of("hope_swa", [text(0, 2000)], lanes=1, length=length)
    learner.model = model
    for _ in range(3):
        learner.step()
    for level, period in zip(model.continuum(0).levels_, (4, 8), strict=True):
        moved = level.value.grad is not None and bool(level.value.grad.any())
        assert moved == (period < length), "the note says what is so"


@pytest.mark.parametrize("carry", [1, 3, 4])
def test_lanes_start_afresh_after_carry_steps_and_not_all_at_once(carry):
    learner = learner_of("gated_deltanet", [text(seed, 2000) for seed in range(6)], lanes=4, length=4, carry=carry)
    calls = watch(learner)
    for _ in range(3 * carry + 1):
        learner.step()
    forced = [[step for step, (_, _, reset) in enumerate(calls) if reset[lane, 0]] for lane in range(4)]
    for lane, steps in enumerate(forced):
        assert steps[0] == 0, "every lane opens with a document"
        assert steps[1] == carry - lane * carry // 4, "staggered"
        assert all(b - a == carry for a, b in itertools.pairwise(steps[1:]))
    assert not any(reset[:, 1:].any() for _, _, reset in calls), "no document ends here"


def test_a_new_document_starts_a_lane_afresh_and_its_count():
    learner = learner_of("gated_deltanet", ["abcdefghi", "qrstuvwxy"], lanes=1, length=4, carry=3)
    calls = watch(learner)
    for _ in range(15):
        learner.step()
    tokens = torch.cat([call[0] for call in calls], 1)[0]
    reset = torch.cat([call[2] for call in calls], 1)[0]
    assert torch.equal(reset, tokens == 256), "documents of ten tokens end before three steps of four are over"

    never = learner_of("gated_deltanet", ["a" * 60], lanes=1, length=4, carry=None)
    calls = watch(never)
    for _ in range(14):
        never.step()
    assert [bool(reset.any()) for _, _, reset in calls] == [True] + [False] * 13


def test_the_state_is_carried_detached_and_reset_lanes_forget():
    learner = learner_of("gated_deltanet", carry=None)
    calls = watch(learner)
    for _ in range(3):
        learner.step()
    assert calls[0][1] is None
    for _, state, _ in calls[1:]:
        assert all(not leaf.requires_grad for leaf in fast.leaves(state))
    assert calls[2][1].position.tolist() == [32, 32]


def test_a_step_that_is_not_finite_changes_no_weight_and_ends_the_state():
    learner = learner_of(patience=3)
    for _ in range(2):
        learner.step()
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    moments = {key: entry["exp_avg"].clone() for key, entry in learner.optimizer.state.items()}
    assert learner.state is not None

    def poison(module, inputs, output):
        return output * math.nan

    handle = learner.model.head.register_forward_hook(poison)
    result = learner.step()
    assert result.skipped
    assert math.isnan(result.loss)
    handle.remove()
    assert all(torch.equal(before[name], p) for name, p in learner.model.named_parameters())
    assert all(torch.equal(moments[key], entry["exp_avg"]) for key, entry in learner.optimizer.state.items())
    assert learner.state is None
    assert (learner.progress.step, learner.progress.skipped, learner.progress.skipped_in_a_row) == (3, 1, 1)

    result = learner.step()
    assert not result.skipped
    assert math.isfinite(result.loss)
    assert learner.progress.skipped_in_a_row == 0
    assert not torch.equal(before["head.weight"], learner.model.head.weight)


@pytest.mark.parametrize("name", ["transformer", "hope_attention", "hope_swa", "titans_lmm"])
def test_what_is_not_finite_between_layers_makes_a_step_skipped_and_the_next_goes_on(name):
    """Its derivatives are no numbers, and nothing of them reaches weights or optimizer."""
    learner = learner_of(name)
    learner.step()
    before = [p.detach().clone() for p in learner.model.parameters()]
    moments = {key: entry["exp_avg"].clone() for key, entry in learner.optimizer.state.items()}

    def spoil(module, given):
        return (given[0].index_fill(1, torch.tensor(0), math.inf), *given[1:])

    with learner.model.blocks[-1].register_forward_pre_hook(spoil):
        assert learner.step().skipped
    assert all(torch.equal(one, two) for one, two in zip(before, learner.model.parameters(), strict=True))
    assert all(torch.equal(moments[key], entry["exp_avg"]) for key, entry in learner.optimizer.state.items())
    result = learner.step()
    assert not result.skipped
    assert result.faults == 0


def test_a_gradient_that_is_not_finite_is_skipped_too():
    learner = learner_of()
    learner.model.embedding.weight.register_hook(lambda grad: grad * math.inf)
    before = learner.model.head.weight.detach().clone()
    result = learner.step()
    assert result.skipped
    assert math.isfinite(result.loss)
    assert torch.equal(before, learner.model.head.weight)


def test_patience_ends_a_run_that_no_longer_learns():
    learner = learner_of(patience=3)
    learner.model.head.register_forward_hook(lambda module, inputs, output: output * math.nan)
    assert learner.step().skipped
    assert learner.step().skipped
    with pytest.raises(LearningError, match=r"step 3: .* not finite 3 times in a row\. Try a lower lr"):
        learner.step()


class Without:
    """A stream in which a token is not valid."""

    def __init__(self, lanes, token):
        self.lanes, self.token = lanes, token

    def __next__(self):
        batch = next(self.lanes)
        there = batch.tokens != self.token
        tokens = batch.tokens.masked_fill(~there, 0)
        return replace(batch, tokens=tokens, valid=batch.valid & there, loss_mask=batch.loss_mask & there)


@pytest.mark.parametrize("name", ["transformer", "swa_transformer", "titans_mag", "hope"])
def test_a_token_that_the_model_refuses_costs_its_own_prediction_alone(name):
    """Every step is the one without it, and says so."""
    bad = ord("e")
    learner, other = learner_of(name), learner_of(name)
    other.stream = Without(other.stream, bad)
    with torch.no_grad():
        learner.model.embedding.weight[bad, ::2] = math.nan
    batches, expected = lanes_of([text(seed) for seed in range(4)]), 0
    for _ in range(3):
        result, wanted = learner.step(), other.step()
        count = int((next(batches).tokens == bad).sum())
        expected += count
        assert not result.skipped
        assert result.faults == count
        assert (result.loss, result.grad_norm) == pytest.approx((wanted.loss, wanted.grad_norm), rel=1e-5)
    assert expected > 5
    assert learner.progress.faults == expected
    assert learner.state.position.tolist() == other.state.position.tolist()
    for (label, one), two in zip(learner.model.named_parameters(), other.model.parameters(), strict=True):
        if label == "embedding.weight":
            keep = torch.arange(len(one)) != bad
            one, two = one[keep], two[keep]
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=label)


def test_where_the_model_refuses_all_there_is_no_step():
    learner = learner_of("transformer")
    before = learner.model.head.weight.detach().clone()
    with torch.no_grad():
        learner.model.embedding.weight.fill_(math.inf)
    assert learner.step().skipped
    assert torch.equal(learner.model.head.weight, before)


def test_a_cost_that_is_infinite_is_not_passed_over():
    learner = learner_of("transformer")
    learner.model.head.register_forward_hook(
        lambda module, inputs, output: output.index_fill(2, torch.tensor(101), -math.inf)
    )
    result = learner.step()
    assert result.loss == math.inf
    assert result.skipped


def test_refused_writes_are_counted_once():
    learner = learner_of("gated_deltanet", carry=None)
    learner.step()
    block = learner.state.blocks[0]
    faults = torch.tensor([2, 3])
    memory = block.memory._replace(faults=faults)
    learner.state = learner.state._replace(blocks=(block._replace(memory=memory), *learner.state.blocks[1:]))
    assert int(count_faults(learner.state)) == 5
    assert count_faults({"faults": torch.tensor([1, 1]), "other": [None, (torch.ones(2),)]}) == 2
    assert learner.step().faults == 5
    assert learner.step().faults == 0
    assert learner.progress.faults == 5


@pytest.mark.parametrize(("name", "length"), [("gated_deltanet", 16), ("titans_lmm", 16), ("hope", 10)])
def test_a_learner_restored_from_a_file_goes_on_bit_for_bit(tmp_path, name, length):
    """Hope's levels learn from windows, and the file is written inside of one of each."""
    one = learner_of(name, length=length, carry=4)
    for _ in range(5):
        one.step()
    if name == "hope":
        assert all((one.state.position % period).all() for period in one.model.config.periods)
    path = checkpoint.save(tmp_path, one.checkpoint({}))
    expected = [one.step() for _ in range(5)]

    other = learner_of(name, length=length, carry=4)
    for parameter in other.model.parameters():
        parameter.data.zero_()
    other.restore(checkpoint.load(path))
    assert [other.step() for _ in range(5)] == expected
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(fast.leaves(one.state), fast.leaves(other.state), strict=True):
        assert torch.equal(a, b)


STEPS = 60
SETTINGS = {
    "model": "gated_deltanet",
    "size": "tiny",
    "tokens": STEPS * 2 * 16,
    "lanes": 2,
    "length": 16,
    "carry": 5,
    "lr": 1e-2,
    "warmup": 2,
    "threads": 1,
    "eval_documents": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for seed in range(5):
        (folder / f"{seed}.txt").write_text(text(seed, 120), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(TrainConfig(**SETTINGS, data=(data,), out=out, checkpoint_every=1000), quiet())
    return out


def quiet():
    return Console(file=io.StringIO())


def curve(out):
    """The lines of metrics.jsonl without what a clock wrote."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_run(out, whole):
    assert [line["step"] for line in curve(whole)] == list(range(1, STEPS + 1))
    assert curve(out) == curve(whole)
    one, other = (checkpoint.load(checkpoint.latest(run / "checkpoints")) for run in (out, whole))
    assert one.step == other.step == STEPS
    for name, tensor in other.model.items():
        assert torch.equal(one.model[name], tensor), name
    for a, b in zip(fast.leaves(one.fast), fast.leaves(other.fast), strict=True):
        assert torch.equal(a, b)
    results = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in (out, whole)]
    assert results[0]["held_out_bits_per_byte"] == results[1]["held_out_bits_per_byte"]


@pytest.mark.parametrize("stop", [1, 42])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, data, whole, monkeypatch, stop):
    """Stopped by an error after `stop` steps, some of them after the last checkpoint; these are dropped and come again."""
    config = TrainConfig(**SETTINGS, data=(data,), out=tmp_path / "run", checkpoint_every=4)
    step = Learner.step

    def failing(learner):
        if learner.progress.step == stop:
            raise OSError("the disk is gone")
        return step(learner)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", failing)
        with pytest.raises(OSError, match="the disk is gone"):
            train(config, quiet())
    assert len(curve(config.out)) == stop
    assert checkpoint.load(checkpoint.latest(config.out / "checkpoints")).step == stop - stop % 4
    torch.manual_seed(stop)
    result = train(TrainConfig(**SETTINGS, data=(data,), out=config.out, checkpoint_every=4, resume=True), quiet())
    assert (result.step, result.interrupted) == (STEPS, None)
    assert_same_run(config.out, whole)
    assert not torch.equal(load_run(config.out).model.head.weight, models.build("gated_deltanet").head.weight)


def test_a_run_says_what_it_left_out(tmp_path, data, monkeypatch):
    step, console = Learner.step, quiet()

    def damaged(learner):
        if learner.progress.step == 1:
            with torch.no_grad():
                learner.model.embedding.weight[ord("e")] = math.nan
        if learner.progress.step != 2:
            return step(learner)
        with learner.model.blocks[1].register_forward_pre_hook(lambda module, given: (given[0] * math.inf, *given[1:])):
            return step(learner)

    monkeypatch.setattr(Learner, "step", damaged)
    settings = SETTINGS | {"tokens": 4 * 2 * 16}
    train(TrainConfig(**settings, data=(data,), out=tmp_path / "run"), console)
    said = console.file.getvalue()
    assert re.search(r"step 2: \d+ tokens or writes to memories were not finite, and left out", said)
    assert "step 3: loss or gradient not finite, nothing learned from it (1 so far)" in said
    assert "and not every token of the held-out documents has a finite cost. Everything is in" in said.replace(
        "\n", " "
    )
    lines = curve(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [False, False, True, False]
    assert [line["faults"] > 0 for line in lines] == [False, True, True, True]
    weights = load_run(tmp_path / "run").model.state_dict()
    weights["embedding.weight"][ord("e")] = 0
    assert all(w.isfinite().all() for w in weights.values())


def command(*arguments):
    """`nestling` in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    code = "from nestling.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=environment
    )


def train_command(data, out):
    settings = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", value)]
    return ["train", *settings, "--checkpoint-every", 2, "--data", data, "--out", out]


def wait_until(process, happened):
    """Until `happened()`; fails if the process ends before."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def has_step(out, step):
    metrics = out / "metrics.jsonl"
    return metrics.exists() and metrics.read_bytes().count(b"\n") >= step


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path, data, whole, capsys):
    """Every other kill falls into the writing of a checkpoint."""
    draw = random.Random(7)
    out = tmp_path / "run"
    arguments = train_command(data, out)
    reached = 0
    for kill in range(4):
        process = command(*arguments)
        step = reached + draw.randint(1, 4)
        wait_until(process, lambda step=step: has_step(out, step))
        if kill % 2:
            wait_until(process, lambda: any((out / "checkpoints").glob(".writing-step-*")))
        time.sleep(draw.uniform(0, 0.002 if kill % 2 else 0.02))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"kill {kill} came too late: {process.stderr.read()}"
        process.stderr.close()
        reached = checkpoint.load(checkpoint.latest(out / "checkpoints")).step
        assert not (out / "summary.json").exists()
        arguments = ["train", "--resume", out]
    assert reached > 0
    assert cli.run(["train", "--resume", str(out)]) == 0
    assert "bits per byte on held-out documents" in capsys.readouterr().err
    assert_same_run(out, whole)
    left = {path.name for path in (out / "checkpoints").iterdir()}
    assert left == {"latest", f"step-{STEPS:08}", f"step-{STEPS - 2:08}"}


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(tmp_path, data, whole):
    out = tmp_path / "a run [b]"
    process = command(*train_command(data, out))
    wait_until(process, lambda: has_step(out, 3))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    step = int(re.search(r"Stopped after step (\d+)", said)[1])
    assert 3 <= step < STEPS
    assert checkpoint.load(checkpoint.latest(out / "checkpoints")).step == step == len(curve(out))
    assert not (out / "summary.json").exists()
    assert (out / "loss.png").exists()
    line = next(line for line in said.splitlines() if line.startswith("  nestling train --resume"))
    assert shlex.split(line) == ["nestling", "train", "--resume", str(out)]

    assert cli.run(shlex.split(line)[1:]) == 0
    assert_same_run(out, whole)


def test_two_processes_never_train_in_one_folder(tmp_path, data, whole):
    from nestling.learn.folder import owned

    config = TrainConfig(**SETTINGS, data=(data,), out=whole, checkpoint_every=1000, resume=True)
    before = (whole / "metrics.jsonl").read_bytes()
    with owned(whole), pytest.raises(checkpoint.CheckpointError, match="another process is training"):
        train(config, quiet())
    assert (whole / "metrics.jsonl").read_bytes() == before
