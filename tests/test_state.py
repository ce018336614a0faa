"""The verbs on state: lanes go in and come out whole, files come back equal or are refused in words."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor

import nestling as nl
from nestling import state as verbs


@partial(verbs.register, grows={"cache": 1})
class Growing(NamedTuple):
    """A cache whose second dimension grows."""

    cache: Tensor
    position: Tensor


class Unknown(NamedTuple):
    """Never registered."""

    x: Tensor


def memory_state(name: str = "omeganet", lanes: int = 3, time: int = 5) -> nl.memory.MemoryState:
    spec = nl.memory.named(name, key_dim=4, chunk=4)
    generator = torch.Generator().manual_seed(0)
    w0 = spec.init(2, generator)
    return nl.memory.scan(spec, w0, *spec.example(generator, lanes=lanes, time=time))[1]


def assert_equal(a: object, b: object) -> None:
    assert type(a) is type(b)
    for x, y in zip(verbs.leaves(a), verbs.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", nl.memory.names())
def test_split_stack_take_and_files_give_a_state_back(name: str, tmp_path: Path) -> None:
    state = {"layers": (memory_state(name), [None, ()])}
    assert_equal(verbs.stack(verbs.split(state)), state)
    assert_equal(verbs.take(state, [2, 0]), verbs.stack([verbs.take(state, [2]), verbs.take(state, [0])]))
    verbs.save(tmp_path / "s", state, digests={"model": "abc"})
    loaded = verbs.load(tmp_path / "s", expect={"model": "abc"})
    assert_equal(loaded, state)
    assert loaded["layers"][1] == [None, ()]
    assert list(tmp_path.iterdir()) == [tmp_path / "s"], "no leftovers"


def test_a_restored_memory_goes_on_bit_for_bit(tmp_path: Path) -> None:
    spec = nl.memory.named("titans", key_dim=4, chunk=4)
    generator = torch.Generator().manual_seed(0)
    w0 = spec.init(2, generator)
    first, second = (spec.example(generator, time=7) for _ in range(2))
    _, state = nl.memory.scan(spec, w0, *first)
    verbs.save(tmp_path / "s", state)
    for a, b in [(state, verbs.load(tmp_path / "s"))]:
        y, end = nl.memory.scan(spec, w0, *second, a)
        z, other = nl.memory.scan(spec, w0, *second, b)
        assert torch.equal(y, z)
        assert_equal(end, other)


def test_repeat_clone_detach_and_size() -> None:
    state = memory_state("titans")
    forked = verbs.repeat(state, 2)
    assert forked.position.tolist() == [5] * 6
    assert torch.equal(forked.weights[0][1], state.weights[0][0])
    copy = verbs.clone(state)
    copy.weights[0].zero_()
    assert state.weights[0].any()
    state.weights[0].requires_grad_()
    assert not any(x.requires_grad for x in verbs.leaves(verbs.detach(state)))
    per_head = 3 * 2 * 4 * 16  # anchor, weights, momentum of two 4 × 16 matrices
    assert verbs.nbytes(state) == 3 * (2 * per_head * 4 + 8 + 8)


def test_where_selects_lane_by_lane() -> None:
    a, b = memory_state(time=5), memory_state(time=9)
    mixed = verbs.where(torch.tensor([True, False, True]), a, b)
    assert mixed.position.tolist() == [5, 9, 5]
    assert torch.equal(mixed.weights[0][1], b.weights[0][1])


def test_growing_caches_are_padded_to_the_longest_and_cut_behind_it() -> None:
    short = Growing(torch.ones(1, 2, 3), torch.tensor([2]))
    long = Growing(torch.ones(2, 5, 3), torch.tensor([5, 4]))
    both = verbs.stack([short, long])
    assert both.cache.shape == (3, 5, 3)
    assert both.cache[0].sum() == 6
    lane = verbs.take(long, [1])
    assert verbs.where(torch.tensor([False]), short, lane).cache.shape == (1, 4, 3)
    assert verbs.where(torch.tensor([True]), short, lane).cache.shape == (1, 2, 3)
    assert verbs.where(torch.tensor([True]), {"inner": short}, {"inner": lane})["inner"].cache.shape == (1, 2, 3)


def test_positions_stay_on_the_cpu() -> None:
    moved = verbs.to(memory_state(), "meta")
    assert moved.position.device.type == "cpu"
    assert moved.weights[0].device.type == "meta"


def test_misuse_is_refused_in_words(tmp_path: Path) -> None:
    state = memory_state()
    with pytest.raises(verbs.StateError, match="differ in structure"):
        verbs.stack([state, memory_state("deltanet")])
    with pytest.raises(verbs.StateError, match="numbers from 0 to 2"):
        verbs.take(state, [3])
    with pytest.raises(verbs.StateError, match="at least one"):
        verbs.stack([])
    with pytest.raises(verbs.StateError, match="times is 0"):
        verbs.repeat(state, 0)
    with pytest.raises(verbs.StateError, match="number of lanes"):
        verbs.lanes((torch.ones(2), torch.ones(3)))
    with pytest.raises(verbs.StateError, match="not registered"):
        verbs.save(tmp_path / "s", Unknown(torch.ones(1)))
    with pytest.raises(verbs.StateError, match="holds str"):
        verbs.save(tmp_path / "s", ("text",))


def test_bad_files_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(FileNotFoundError):
        verbs.load(path)
    verbs.save(path, memory_state(), digests={"tokenizer": "a"})
    with pytest.raises(verbs.StateError, match="another tokenizer"):
        verbs.load(path, expect={"tokenizer": "b"})
    whole = path.read_bytes()
    for size in (0, 5, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(verbs.StateError, match="not a readable state"):
            verbs.load(path)
    state = memory_state()
    state.weights[0][0, 0, 0, 0] = torch.nan
    verbs.save(path, state)
    with pytest.raises(verbs.StateError, match="NaN or Inf"):
        verbs.load(path)
    assert verbs.load(path, check_finite=False).weights[0].isnan().any()
    for header, words in (
        ({"format": 99, "structure": {}, "digests": {}}, "format 99"),
        ({"format": 1, "structure": {"class": "os.system", "parts": {}}, "digests": {}}, "unknown"),
        ({"format": 1, "structure": {"tensor": "7"}, "digests": {}}, "does not describe"),
    ):
        path.write_bytes(safetensors.torch.save({"0": torch.ones(1)}, {"nestling": json.dumps(header)}))
        with pytest.raises(verbs.StateError, match=words):
            verbs.load(path)
