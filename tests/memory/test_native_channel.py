"""What the C code of memories that decay by channel does besides what every C code does (`test_native`): any token may be
missing, a gate may be 0, and whole lanes go token by token."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import nestling as nl
from nestling import testing
from nestling.memory import L2, DeltaGradient, Gates, Implicit, MemorySpec, native
from nestling.memory.layout import layout
from nestling.memory.native.channel import Scan
from nestling.memory.native.fields import CLOSES, FRESH
from nestling.memory.native.runs import tokens
from nestling.native import status, without
from nestling.state import leaves

from .test_native import HEADS, assert_close, everything, example

NEEDS = pytest.mark.skipif(not status().startswith("on"), reason=f"the C code is not used here: {status()}")

RULES = {
    "gla": ("gla", {}),
    "rwkv7_like": ("rwkv7_like", {}),
    "decays, then erases": ("gla", {"rule": DeltaGradient("after_decay")}),
    "implicit": ("gla", {"rule": Implicit()}),
}


def made(kind: str, **choices: object) -> MemorySpec:
    name, own = RULES[kind]
    return nl.memory.named(name, **{"key_dim": 8, **own, **choices})


def differentiated(
    spec: Any, w0: list[Tensor], streams: list[Tensor], gates: Gates, bounds: list[int], **options: Any
) -> list[Tensor]:
    """Outputs, all of the state and every gradient of an example read call after call, from each of the bounds to the next."""
    state, outputs = None, []
    for first, last in itertools.pairwise(bounds):
        here = slice(first, last)
        masks = {name: options[name][:, here] for name in ("reset", "valid") if name in options}
        part = [x[:, :, here] for x in streams]
        y, state = nl.memory.scan(spec, w0, *part, gates[here], state, **{**options, **masks})
        outputs.append(y)
    found = [torch.cat(outputs, 2), *(x for x in leaves(state) if x.is_floating_point())]
    g = torch.Generator().manual_seed(41)
    total = sum((x * torch.randn(x.shape, generator=g).to(x.dtype)).sum() for x in found)
    inputs = [*w0, *streams, *(gate for _, gate in gates.items())]
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    zeros = (torch.zeros_like(x) for x in inputs)
    return [*(x.detach() for x in found), *(z if x is None else x for x, z in zip(grads, zeros, strict=True))]


Example = tuple[list[Tensor], list[Tensor], Gates]


def assert_defined(spec: MemorySpec, given: Example, valid: Tensor, generator: torch.Generator) -> None:
    """An example with these tokens there and resets anywhere, in one call and cut anywhere into two, equals the definition."""
    time = valid.shape[1]
    masks = {"reset": torch.rand(2, time, generator=generator) < 0.05, "valid": valid}
    cut = int(torch.randint(time + 1, (), generator=generator))
    expected = differentiated(spec, *given, [0, time], engine="reference", **masks)
    for bounds in ([0, time], [0, cut, time]):
        with testing.poisoned():
            found = differentiated(spec, *given, bounds, **masks)
        assert_close(found, expected, 1e-8)


def assert_split_anywhere(spec: MemorySpec, time: int, step: int) -> None:
    """One call, two with every step-th place between them, and token by token."""
    given = example(spec, time, 3, torch.float64)
    whole = differentiated(spec, *given, [0, time])
    for bounds in (*([0, at, time] for at in range(1, time, step)), list(range(time + 1))):
        assert_close(differentiated(spec, *given, bounds), whole, 1e-10)


def assert_left(spec: Any, given: Example, calls: list[int], **options: Any) -> None:
    """The C code is not asked for this, and the framework's way equals the definition."""
    w0, streams, gates = given
    with torch.no_grad():
        y, _ = nl.memory.scan(spec, w0, *streams, gates, **options)
        assert not calls, (spec, options)
        plain = {name: x for name, x in options.items() if name != "report"}
        z, _ = nl.memory.scan(spec, w0, *streams, gates, engine="reference", **plain)
    assert_close([y], [z], 1e-8)


@NEEDS
@pytest.mark.parametrize("rule", RULES)
@given(
    widths=st.sampled_from([(3, 3), (8, 8), (5, 20), (19, 4), (8, 40), (16, 72)]),
    time=st.integers(2, 90),
    read=st.sampled_from(["after", "before"]),
    seed=st.integers(0, 10_000),
)
def test_equals_the_definition_whatever_is_missing(
    rule: str, widths: tuple[int, int], time: int, read: str, seed: int
) -> None:
    """Any length and widths, resets and missing tokens anywhere, shares of exactly 0, cut anywhere into calls."""
    spec = made(rule, key_dim=widths[0], value_dim=widths[1], read=read)
    w0, streams, gates = example(spec, time, seed, torch.float64)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gates.retention[torch.rand(gates.retention.shape, generator=g) < 0.03] = 0.0
    assert_defined(spec, (w0, streams, gates), torch.rand(2, time, generator=g) < 0.7, g)


@NEEDS
@pytest.mark.parametrize("rule", RULES)
def test_every_split_gives_the_same(rule: str) -> None:
    """Also inside the stretches between two weights that are kept for the backward pass, and token by token."""
    assert_split_anywhere(made(rule, key_dim=4), 70, 4)


@NEEDS
@pytest.mark.parametrize("masked", [False, True])
def test_long_texts_pass_many_kept_weights(masked: bool, calls: list[int]) -> None:
    """The backward pass takes as many stretches as the text needs, the last one not whole."""
    spec = made("rwkv7_like", key_dim=5)
    w0, streams, gates = example(spec, 333, 5, torch.float64)
    masks = {}
    if masked:
        g = torch.Generator().manual_seed(6)
        masks = {"valid": torch.rand(2, 333, generator=g) < 0.6, "reset": torch.rand(2, 333, generator=g) < 0.01}
    found = differentiated(spec, w0, streams, gates, [0, 333], **masks)
    assert calls == [int(masks["valid"].sum(1).max())] if masked else [333]
    with without():
        assert_close(found, differentiated(spec, w0, streams, gates, [0, 333], **masks), 1e-8)


@NEEDS
@pytest.mark.parametrize("stretch", [8, 64])
def test_the_stretch_between_kept_weights_changes_nothing(stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = made("rwkv7_like", key_dim=5)
    before = everything(spec, 100, 7, torch.float64)
    monkeypatch.setattr(Scan, "group", lambda self, stand: stretch)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(spec, 100, 7, torch.float64), strict=True))


@NEEDS
@pytest.mark.parametrize("rule", RULES)
def test_logarithms_and_shares_are_the_same_gate(rule: str, calls: list[int]) -> None:
    spec = made(rule)
    w0, streams, gates = example(spec, 40, 9, torch.float64)
    found = differentiated(spec, w0, streams, gates, [0, 40])
    with_logs = replace(gates, retention=None, log_retention=gates.retention.detach().log().requires_grad_())
    others = differentiated(spec, w0, streams, with_logs, [0, 40])
    assert len(calls) == 2
    at = len(found) - len(gates.items()) + [name for name, _ in gates.items()].index("retention")
    names = [name for name, _ in with_logs.items()]
    of_log = others.pop(len(others) - len(names) + names.index("log_retention"))
    of_share = found.pop(at)
    assert_close(found, others, 1e-10)
    assert_close([of_log], [of_share * gates.retention.detach()], 1e-10)


@NEEDS
def test_second_derivatives_of_logarithms(calls: list[int]) -> None:
    """Those of shares: `test_native`."""
    spec = made("rwkv7_like", key_dim=4)

    def twice() -> list[Tensor]:
        w0, streams, gates = example(spec, 20, 19, torch.float64)
        logs = gates.retention.detach().log().requires_grad_()
        y, _ = nl.memory.scan(spec, w0, *streams, replace(gates, retention=None, log_retention=logs))
        first = torch.autograd.grad(y.square().sum(), [*w0, *streams, logs], create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), [*w0, *streams, logs]))

    found = twice()
    assert calls
    with without():
        assert_close(found, twice(), 1e-8)


@NEEDS
@pytest.mark.parametrize("rule", RULES)
def test_without_the_gate_all_is_kept(rule: str, calls: list[int]) -> None:
    spec = made(rule)
    w0, streams, gates = example(spec, 40, 11, torch.float64)
    found = differentiated(spec, w0, streams, replace(gates, retention=None), [0, 40])
    ones = replace(gates, retention=torch.ones_like(gates.retention).requires_grad_())
    expected = differentiated(spec, w0, streams, ones, [0, 40], engine="reference")
    names = [name for name, _ in ones.items()]
    expected.pop(len(expected) - len(names) + names.index("retention"))
    assert len(calls) == 1
    assert_close(found, expected, 1e-8)


@NEEDS
@pytest.mark.parametrize("rule", ["gla", "rwkv7_like"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refused_tokens_are_answered_and_write_nothing(rule: str, bad: float, calls: list[int]) -> None:
    """Their gradients are 0, but for the query's; tokens that are not there may hold anything."""
    spec = made(rule)
    w0, streams, gates = example(spec, 32, 13, torch.float64)
    valid = torch.ones(2, 32, dtype=torch.bool)
    valid[0, 20] = False
    q, k, v = (x.detach().clone() for x in streams)
    k[0, 1, 11], v[1, 0, 3], v[0, 0, 20], k[0, 0, 20] = bad, bad, bad, bad
    with torch.no_grad():
        gates.lr[0, 1, 5] = bad
        gates.retention[1, 1, 7, 2] = -0.5
    given = [x.requires_grad_() for x in (q, k, v)]
    found = differentiated(spec, w0, given, gates, [0, 32], valid=valid)
    assert len(calls) == 1
    assert all(bool(torch.isfinite(x).all()) for x in found)
    assert_close(found, differentiated(spec, w0, given, gates, [0, 32], valid=valid, engine="reference"), 1e-8)
    _, state = nl.memory.scan(spec, w0, *given, gates, valid=valid)
    assert state.faults.tolist() == [2, 2]


@NEEDS
@pytest.mark.parametrize("fresh", [False, True])
def test_what_overflows_is_left_to_the_guards(fresh: bool, calls: list[int]) -> None:
    """Weights that leave the range, also where a reset takes them away before the call's end; shares above all numbers."""
    spec = made("gla")
    w0, (q, k, v), gates = example(spec, 80, 15, torch.float32)
    reset = torch.zeros(2, 80, dtype=torch.bool)
    reset[1, 70] = fresh
    lr = gates.lr.detach().clone()
    lr[1, 0, 3] = 1e30
    v = v.detach().clone()
    v[1, 0, 3] = 1e15
    grown = gates.retention.detach().log()
    grown[0, 0, 66] = 200.0
    with torch.no_grad():
        for changed in (Gates(lr=lr, retention=gates.retention), Gates(lr=gates.lr, log_retention=grown)):
            y, state = nl.memory.scan(spec, w0, q, k, v, changed, reset=reset)
            assert max(calls) == 80, "the other lane is still read by the C code"
            with without():
                z, other = nl.memory.scan(spec, w0, q, k, v, changed, reset=reset)
            assert state.faults.tolist() == other.faults.tolist()
            assert state.faults.sum() == 1
            assert all(bool(torch.isfinite(w).all()) for w in state.weights)
            for one, same in zip([y, *state.weights], [z, *other.weights], strict=True):
                torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_what_it_leaves_to_the_framework() -> None:
    """Momentum, gradients that read the weights, and reading at a chunk's start."""
    served = made("gla")
    assert native.serves(native.Cell.of(served, served.network), torch.zeros(1)) == status().startswith("on")
    for choices in (
        {"rule": DeltaGradient(with_momentum=True)},
        {"bias": L2()},
        {"read": "boundary"},
    ):
        spec = made("gla", **choices)
        assert not native.serves(native.Cell.of(spec, spec.network), torch.zeros(1))


def test_a_run_for_every_token() -> None:
    """First token, length and marks of each, lane by lane, with those that are not there left out."""
    position = torch.tensor([2, 0])
    reset, valid = torch.zeros(2, 7, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    valid[0, 2] = valid[1, 5] = valid[1, 6] = False
    reset[1, 3] = True
    cut = layout(position, 7, reset, valid, period=4, tile=3, halo=0)
    found = tokens(cut, 7)
    assert found.table[0].tolist() == [
        [0, 0, 1, 0], [1, 0, 1, CLOSES], [3, 0, 1, 0], [4, 0, 1, 0], [5, 0, 1, 0], [6, 0, 1, CLOSES],
    ]  # fmt: skip
    assert found.table[1].tolist() == [
        [0, 0, 1, 0], [1, 0, 1, 0], [2, 0, 1, 0], [3, 0, 1, FRESH], [4, 0, 1, 0], [0, 0, 0, 0],
    ]  # fmt: skip
    assert (found.longest, found.whole, found.full, found.fresh) == (1, False, False, True)
    every = tokens(layout(torch.zeros(3, dtype=torch.int64), 5, None, None, period=1, tile=3, halo=0), 5)
    assert (every.longest, every.whole, every.full, every.fresh) == (1, True, True, False)
    assert every.table[..., 0].tolist() == [list(range(5))] * 3


@NEEDS
def test_threads_share_the_memories() -> None:
    spec = made("rwkv7_like", key_dim=20)
    alone = everything(spec, 50, 17, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(HEADS + 1)
        together = everything(spec, 50, 17, torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
