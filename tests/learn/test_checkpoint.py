"""Checkpoints are whole or absent, come back bit for bit, and say what is wrong when they are damaged."""

import json
import os
import shutil

import pytest
import torch
from torch import nn

from nestling.learn import checkpoint
from nestling.learn.checkpoint import Checkpoint, CheckpointError
from nestling.memory.state import MemoryState

STATE = (
    MemoryState(
        (torch.ones(2, 1, 3, 3),), (torch.rand(2, 1, 3, 3),), (), None, torch.tensor([3, 5]), torch.tensor([0, 1])
    ),
    {"cache": [torch.tensor([[float("nan")], [1.0]])]},
)


class Tied(nn.Module):
    """Two names for one weight, and a buffer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.arange(4))


def contents(step=3, numbers=None):
    torch.manual_seed(step)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.95), fused=True)
    model.head(model.embedding(torch.tensor([1, 2]))).sum().backward()
    optimizer.step()
    fast = STATE if step else None
    numbers = {"cursor": {"lane": [1, 2]}, "rng": checkpoint.random_state(torch.device("cpu"))} | (numbers or {})
    return model, optimizer, Checkpoint(step, checkpoint.model_tensors(model), optimizer.state_dict(), fast, numbers)


def assert_equal(a, b):
    assert a.step == b.step
    assert json.dumps(a.numbers) == json.dumps(b.numbers)
    assert a.model.keys() == b.model.keys()
    for name in a.model:
        assert torch.equal(a.model[name], b.model[name])
    for one, other in zip(checkpoint.fast.leaves(a.fast), checkpoint.fast.leaves(b.fast), strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    assert type(a.fast) is type(b.fast)
    assert a.optimizer["param_groups"] == b.optimizer["param_groups"]
    assert a.optimizer["state"].keys() == b.optimizer["state"].keys()
    for key, entry in a.optimizer["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, b.optimizer["state"][key][name])


@pytest.mark.parametrize("step", [0, 3])
def test_everything_comes_back_bit_for_bit(tmp_path, step):
    model, optimizer, written = contents(step)
    path = checkpoint.save(tmp_path, written)
    assert path == checkpoint.latest(tmp_path)
    found = checkpoint.load(path)
    assert_equal(written, found)

    other = Tied()
    checkpoint.load_model(other, found.model, path)
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other.head.weight, model.head.weight)
    fresh = torch.optim.AdamW(other.parameters(), fused=True)
    fresh.load_state_dict(found.optimizer)
    assert fresh.param_groups[0]["betas"] == (0.9, 0.95)
    for network, adam in ((model, optimizer), (other, fresh)):
        adam.zero_grad()
        network.head(network.embedding(torch.tensor([1, 2]))).sum().backward()
        adam.step()
    assert torch.equal(other.head.weight, model.head.weight)


def test_random_generators_come_back():
    device = torch.device("cpu")
    state = json.loads(json.dumps(checkpoint.random_state(device)))
    first = torch.rand(3)
    checkpoint.set_random_state(state, device)
    assert torch.equal(torch.rand(3), first)


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 100_000_000):
        checkpoint.save(tmp_path, contents(step)[2], keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003", "step-100000000"]
    assert checkpoint.latest(tmp_path).name == "step-100000000"


class Crash(BaseException):
    """Stands for the process dying: nothing after it is run, no handler for errors either."""


def calls_of(monkeypatch, die_at):
    """Let the process die at its `die_at`-th call that touches the disk (None: never); returns the list of calls."""
    calls = []

    def watch(module, name):
        original = getattr(module, name)

        def wrapper(*arguments, **keywords):
            calls.append(name)
            if len(calls) == die_at:
                raise Crash
            return original(*arguments, **keywords)

        monkeypatch.setattr(module, name, wrapper)

    watch(os, "fsync")
    watch(os, "rename")
    watch(os, "replace")
    watch(checkpoint, "save_file")
    watch(checkpoint.fast, "save")
    watch(shutil, "rmtree")
    return calls


def test_a_crash_between_any_two_operations_leaves_the_old_or_the_new(tmp_path):
    one, two, three = (contents(step)[2] for step in (1, 2, 3))
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path / "count"
        checkpoint.save(folder, one, keep=2)
        checkpoint.save(folder, two, keep=2)
        calls = calls_of(patch, None)
        checkpoint.save(folder, three, keep=2)
        total = len(calls)
    assert total > 12

    seen = set()
    for die_at in range(1, total + 1):
        folder = tmp_path / str(die_at)
        checkpoint.save(folder, one, keep=2)
        checkpoint.save(folder, two, keep=2)
        with pytest.MonkeyPatch.context() as patch:
            calls_of(patch, die_at)
            with pytest.raises(Crash):
                checkpoint.save(folder, three, keep=2)
        checkpoint.clean(folder)
        found = checkpoint.load(checkpoint.latest(folder))
        assert_equal(found, two if found.step == 2 else three)
        seen.add(found.step)
        # What the crash left behind is gone, and the run can go on from here, also over the same step.
        assert all(path.name == "latest" or path.name.startswith("step-") for path in folder.iterdir())
        checkpoint.save(folder, three, keep=2)
        assert_equal(checkpoint.load(checkpoint.latest(folder)), three)
    assert seen == {2, 3}


def test_a_full_disk_is_told_and_harms_nothing(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, contents(1)[2])

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*MB are free.*--resume"):
        checkpoint.save(tmp_path, contents(2)[2])
    assert [path.name for path in tmp_path.iterdir() if path.name != "latest"] == ["step-00000001"]
    assert checkpoint.load(checkpoint.latest(tmp_path)).step == 1


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_damage_is_found_and_the_way_out_named(tmp_path, name, how):
    checkpoint.save(tmp_path, contents(1)[2])
    path = checkpoint.save(tmp_path, contents(2)[2])
    file = path / name
    raw = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    else:
        middle = len(raw) // 2
        raw[middle] ^= 1
        file.write_bytes(raw if how == "flip" else raw[:middle])
    with pytest.raises(
        CheckpointError, match="no checkpoint here" if (name, how) == ("checkpoint.json", "gone") else "damaged"
    ):
        checkpoint.load(path)
    if how == "flip":
        with pytest.raises(CheckpointError, match="Remove that folder to go on from step-00000001"):
            checkpoint.load(path)
    shutil.rmtree(path)
    assert checkpoint.load(checkpoint.latest(tmp_path)).step == 1


def test_another_model_is_refused(tmp_path):
    found = checkpoint.load(checkpoint.save(tmp_path, contents(1)[2]))
    with pytest.raises(CheckpointError, match=r"does not fit this model \(missing \['bias'"):
        checkpoint.load_model(nn.Linear(2, 2), found.model, "here")
    wider = Tied()
    wider.head.bias = nn.Parameter(torch.zeros(6))
    with pytest.raises(
        CheckpointError, match=r"head\.bias is torch\.float32 \[5\], but the model has torch\.float32 \[6\]"
    ):
        checkpoint.load_model(wider, found.model, "here")


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    path = checkpoint.save(tmp_path, contents(1)[2])
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 99, but this version of Nestling reads format 1"):
        checkpoint.load(path)
