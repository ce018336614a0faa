"""What is planned is what is measured on real weights, and large models need none."""

from __future__ import annotations

import json
import os
from unittest import mock

import pytest
import torch

from nestling import cli, models
from nestling import state as fast
from nestling.learn import planning
from nestling.learn.planning import Counts, Machine, Plan, bounds, count, plan

CLOSE = 0.05


def kept(model: models.LanguageModel, length: int) -> float:
    """Activations where nobody looks whether all tokens are fine before they are made so: on a GPU, and in a plan."""
    with mock.patch("nestling.memory.inputs.surely", return_value=False):
        return count(model, length).activations


# Attention; alternating blocks and windows; fast weights; learning from the model's loss. And lengths that are no multiple of
# a chunk, a segment or a window, as nothing is scaled in length.
SOME = [
    *((name, 8) for name in ("transformer", "samba_like", "ttt_e2e")),
    ("swa_transformer", 45),
    ("gated_deltanet", 21),
]
ALL = [(name, 21) for name in models.names()]  # minutes


@pytest.mark.parametrize(("name", "length"), SOME + (ALL if os.environ.get("NESTLING_DEEP") == "1" else [("lstm", 21)]))
def test_counts_are_those_of_a_real_model(name: str, length: int) -> None:
    planned = plan(name, "tiny", length)
    model = models.build(name)
    real = count(model, length)
    assert planned.slow == sum(p.numel() for p in model.parameters())
    for field in ("forward", "backward", "decode"):
        assert getattr(planned.counts, field) == pytest.approx(getattr(real, field), rel=CLOSE), field
    if name != "lstm":  # the CPU's code keeps twice what PyTorch's fused one does, which is what is planned
        assert planned.counts.activations == pytest.approx(kept(model, length), rel=CLOSE)
    _, state = model(torch.zeros(1, length, dtype=torch.int64))
    assert planned.counts.state == fast.nbytes(state)


@pytest.mark.parametrize(("name", "layers", "unit"), [("transformer", 4, 1), ("samba_like", 8, 2)])
def test_blocks_that_were_not_traced_cost_what_they_cost(name: str, layers: int, unit: int) -> None:
    planned = plan(name, "tiny", 8, layers=layers)
    assert planned.traced == (unit, 2 * unit)
    model = models.build(name, layers=layers)
    real = count(model, 8)._replace(activations=kept(model, 8))
    for field in Counts._fields:
        assert getattr(planned.counts, field) == pytest.approx(getattr(real, field), rel=CLOSE), field


def test_a_mix_of_blocks_that_no_part_has_is_traced_whole() -> None:
    assert plan("samba_like", "tiny", 4, layers=3).traced == (3,)


def test_a_recurrent_network_costs_what_its_matrices_cost() -> None:
    """PyTorch's LSTM is one operation, which its own counter does not know."""
    model = models.build("lstm")
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and name != "embedding.weight")
    for counts in (plan("lstm", "tiny", 21).counts, count(model, 21)):
        assert counts.forward == 21 * 2 * matrices
        assert counts.backward == 2 * counts.forward
        assert counts.decode == 2 * matrices


@pytest.mark.parametrize("size", ["340M", "760M", "1.3B"])
def test_sizes_of_the_papers(size: str) -> None:
    found = plan("transformer", size, 64)
    given = models.SIZES[size]
    wide = 8 * round(given.dim / 3)
    body = given.layers * (4 * given.dim**2 + 3 * given.dim * wide)  # by hand: four square matrices and three of ffn
    assert found.slow == pytest.approx(body, rel=0.01)
    products = 64 * 2 * (body + found.embedding)
    attention = given.layers * 2 * 64 * 64 * given.dim
    assert found.counts.forward == pytest.approx(products + attention, rel=0.01)
    assert found.counts.state == 2 * 8 + given.layers * (2 * 4 * 64 * given.dim + 16)


def test_bounds_by_hand() -> None:
    counts = Counts(forward=100.0, backward=200.0, decode=10.0, activations=1000.0, state=50.0)
    found = bounds(Plan(120, 0, 20, 4, counts, (1,)), Machine(3000.0, 6800.0, 1000.0), lanes=2, devices=3)
    assert found.train_compute == 3 * 3000 * 4 / 300
    assert found.train_bandwidth == 3 * 6800 * 8 / (10 * 4 * 120 + 2 * 2 * 1000)
    assert found.decode_compute == 3 * 3000 / 10
    assert found.decode_bandwidth == 3 * 6800 * 2 / (4 * 100 + 2 * 2 * 50)
    assert found.sessions == (1000 - 480) // 50
    assert bounds(Plan(120, 0, 20, 4, counts, (1,)), Machine(1.0, 1.0, 100.0), 1).sessions == 0


@pytest.mark.parametrize(("name", "length"), [("ttt_e2e", 13), ("gated_deltanet", 21), ("samba_like", 7)])
@pytest.mark.parametrize("small", [planning.SMALL, 0])
def test_without_training_the_rest_is_the_same(name: str, length: int, small: int) -> None:
    whole = plan(name, "tiny", length)
    with mock.patch.object(planning, "SMALL", small):
        found = plan(name, "tiny", length, training=False)
    assert found.counts == whole.counts._replace(backward=0, activations=0)
    assert found._replace(counts=whole.counts) == whole


def test_half_precision_halves_what_attention_caches() -> None:
    single, half = (plan("transformer", "tiny", 16, d).counts for d in (torch.float32, torch.bfloat16))
    assert half.forward == single.forward
    assert half.state < 0.6 * single.state


def test_peaks_are_measured() -> None:
    flops, bandwidth = planning.measured(torch.device("cpu"), torch.float32, seconds=0.01)
    assert flops > 1e8
    assert bandwidth > 1e7


PEAKS = ["--flops", "1", "--bandwidth", "100", "--memory", "16"]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--model", "gated_deltanet", "--length", "8", "--devices", "2", *PEAKS]
    assert cli.run(argv) == 0
    table = capsys.readouterr().out
    for words in ("parameters", "decode FLOPs per token", "sessions per device", "1 TFLOP/s", "100 GB/s"):
        assert words in table
    assert cli.run([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = plan("gated_deltanet", "tiny", 8)
    best = bounds(found, Machine(1e12, 1e11, 1.6e10), lanes=8, devices=2)
    assert told["parameters"] == found.slow
    assert told["forward_flops_per_token"] == found.counts.forward / 8
    assert told["train_tokens_per_second_by_compute"] == best.train_compute
    assert told["sessions_per_device"] == best.sessions


def test_the_command_plans_another_vocabulary(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--model", "transformer", "--length", "8", "--json", *PEAKS]
    told = {}
    for size in (257, 1000):
        assert cli.run([*argv, "--vocab-size", str(size)]) == 0
        told[size] = json.loads(capsys.readouterr().out)
        assert told[size]["vocab_size"] == size
    assert cli.run(argv) == 0
    assert json.loads(capsys.readouterr().out) == told[257], "the default"
    assert told[1000]["parameters"] == plan("transformer", "tiny", 8, vocab_size=1000).slow
    assert told[1000]["parameters"] - told[257]["parameters"] == 2 * 32 * (1000 - 257)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "hop"], "model: there is none named 'hop'"),
        (["--size", "340"], "size: there is none named '340'"),
        (["--vocab-size", "0"], "vocab-size: got 0, but expected a number from 1 on"),
        (["--set", "vocab_size=32000"], "set: got vocab_size, which is an option of its own here: --vocab-size 32000"),
        (["--length", "0"], "length: got 0, but expected a number from 1 on"),
        (["--flops", "-1"], "flops: got -1.0, but expected a number above 0"),
        (["--device", "abacus"], "device: got 'abacus'"),
    ],
)
def test_what_cannot_be_is_said(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", *argv]) == 2
    assert words in capsys.readouterr().err
