"""What overflows inside a call: no token is damaged by a later one, no lane by another, and nothing of it is silent."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling.memory import Gates, Memory
from nestling.native import without
from nestling.testing import assert_close, assert_same

NAMES = nl.memory.names()
ERASING = ("deltanet", "gated_deltanet", "comba_like", "rwkv7_like")
TIME, FIRST, LAST = 24, 9, 17  # tokens of a call, and of those the ones that are wild
SHORT = {"tnt": {"global_chunk": 7, "shard": 10}}


def example(name: str, time: int = TIME, seed: int = 0, **choices: object) -> tuple[Memory, list[Tensor], list]:
    spec = nl.memory.named(name, key_dim=4, **{"chunk": 8, **SHORT.get(name, {}), **choices})
    generator = torch.Generator().manual_seed(31)
    w0 = [w.float() for w in spec.init(2, generator)]
    w0 = [w if w.any() else 0.3 * torch.randn(w.shape, generator=generator) for w in w0]
    return spec, w0, list(spec.example(torch.Generator().manual_seed(seed), lanes=2, time=time))


def wild(x: Tensor, size: float) -> Tensor:
    """Some tokens of the first lane made large."""
    x = x.clone()
    x[0, :, FIRST:LAST] *= size
    return x


def finite(state: object) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in nl.state.leaves(state) if x.is_floating_point())


def one_by_one(spec: Memory, w0: list[Tensor], q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> tuple[Tensor, object]:
    state, outputs = None, []
    for t in range(q.shape[2]):
        here = slice(t, t + 1)
        y, state = nl.memory.scan(spec, w0, q[:, :, here], k[:, :, here], v[:, :, here], gates[here], state)
        outputs.append(y)
    return torch.cat(outputs, 2), state


@pytest.mark.parametrize("code", ["native", "framework"])
@pytest.mark.parametrize("name", NAMES)
def test_no_token_is_damaged_by_a_later_one(name: str, code: str) -> None:
    spec, w0, (q, k, v, gates) = example(name)
    with without() if code == "framework" else contextlib.nullcontext():
        clean, untouched = nl.memory.scan(spec, w0, q, k, v, gates)
        for part, size in (("k", 1e10), ("v", 1e16), ("qkv", 1e18)):
            given = [wild(x, size) if at in part else x for at, x in zip("qkv", (q, k, v), strict=True)]
            y, state = nl.memory.scan(spec, w0, *given, gates)
            assert_close(y[0, :, :FIRST], clean[0, :, :FIRST], f"answers before {part} · {size:g}", 1e-5)
            assert finite(state), (part, size)
            # Bit for bit, unless the C code left a call to the framework, which rounds otherwise, for a lane of huge numbers.
            allowed = 1e-5 if code == "native" else 0.0
            assert_close(y[1], clean[1], f"the other lane, {part} · {size:g}", allowed)
            for a, b in zip(nl.state.leaves(state), nl.state.leaves(untouched), strict=True):
                if a.shape == b.shape and a.is_floating_point():
                    assert_close(a[1], b[1], f"the other lane's state, {part} · {size:g}", allowed)
            silent = not torch.isfinite(y).all() and state.faults[0] == 0
            assert not silent, (part, size)


@pytest.mark.parametrize("size", [1e4, 1e9])
@pytest.mark.parametrize("name", ERASING)
def test_erasing_that_overflows_is_the_definition(name: str, size: float) -> None:
    """β‖k‖² far above 2: each such token multiplies the error along its key, until float32 ends."""
    spec, w0, (q, k, v, gates) = example(name, chunk=64)
    k, runs = wild(k, size), []
    for engine in ("reference", "chunked", "step"):
        given = [x.clone().requires_grad_() for x in (*w0, q, k, v)]
        start, inputs = given[: len(w0)], given[len(w0) :]
        if engine == "step":
            y, state = one_by_one(spec, start, *inputs, gates)
        else:
            y, state = nl.memory.scan(spec, start, *inputs, gates, engine=engine)
        probe = (y / y.detach().abs().clamp_min(1.0)).sum()
        runs.append((y.detach(), nl.state.detach(state), torch.autograd.grad(probe, given)))
    for y, state, gradients in runs:
        assert torch.isfinite(y).all()
        assert finite(state)
        assert state.faults[0] > 0
        assert state.faults.tolist() == runs[0][1].faults.tolist()
        for a, b in zip(gradients, runs[0][2], strict=True):
            assert torch.isfinite(a).all()
            assert_close(a, b, "gradient", 1e-4)
        for t in range(TIME):  # each at its own size
            assert_close(y[:, :, t], runs[0][0][:, :, t], f"answer {t}", 1e-4)
        assert_same(state, runs[0][1], 1e-4)


@pytest.mark.parametrize("name", ["gated_deltanet", "titans", "omeganet", "lattice_encode", "self_modifying", "dot"])
def test_a_report_and_masks_come_through(name: str) -> None:
    """Damaged lanes are read in parts; what they report, and whose tokens are missing or begin anew, is put together again."""
    spec, w0, (q, k, v, gates) = example(name)
    reset, valid = torch.zeros(2, TIME, dtype=torch.bool), torch.ones(2, TIME, dtype=torch.bool)
    reset[:, 11], valid[:, 3:5] = True, False
    masks = {"reset": reset, "valid": valid}
    given = wild(q, 1e18), wild(k, 1e18), wild(v, 1e18), gates
    report, clean = nl.Report(), nl.Report()
    y, state = nl.memory.scan(spec, w0, *given, report=report, **masks)
    expected, end = nl.memory.scan(spec, w0, *given, engine="reference", **masks)
    nl.memory.scan(spec, w0, q, k, v, gates, report=clean, **masks)
    assert state.faults[0] > 0
    assert report[""]["faults"].tolist() == (state.faults).tolist()
    assert state.position.tolist() == end.position.tolist() == [13, 13]
    assert not y[:, :, 3:5].any()
    assert_close(y[0, :, :FIRST], expected[0, :, :FIRST], "answers before", 1e-4)
    for series, values in clean[""].items():
        assert report[""][series].shape == values.shape
        assert torch.equal(report[""][series][1], values[1]), series


@pytest.mark.parametrize("engine", ["chunked", "reference", "step"])
def test_what_overflows_inside_a_chunk_goes_back_at_once(engine: str) -> None:
    """α of 1e30 at two tokens: at the second all goes back to the anchor, and the rest of the chunk is written from there."""
    spec, w0, (q, k, v, gates) = example("titans", time=8, network=nl.memory.Matrix())
    retention = gates.retention.clone()
    retention[0, :, 2:4] = 1e30
    gates = Gates(lr=gates.lr, momentum=gates.momentum, retention=retention)
    if engine == "step":
        y, state = one_by_one(spec, w0, q, k, v, gates)
    else:
        y, state = nl.memory.scan(spec, w0, q, k, v, gates, engine=engine)
    assert state.faults.tolist() == [1, 0]
    rest, end = nl.memory.scan(spec, w0, *(x[:, :, 4:] for x in (q, k, v)), gates[4:])
    assert_close(y[0, :, 4:], rest[0], "answers behind", 1e-4)
    for a, b in zip(state.weights, end.weights, strict=True):
        assert_close(a[0], b[0], "weights", 1e-4)


@pytest.mark.parametrize("engine", ["chunked", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_an_answer_that_is_no_number_is_a_fault_and_has_no_derivative(engine: str, bad: float) -> None:
    spec, w0, (q, k, v, gates) = example("linear_attention")
    q = q.clone()
    q[0, 1, FIRST] = bad
    given = [x.requires_grad_() for x in (*w0, q, k, 100 * v)]
    y, state = nl.memory.scan(spec, given[:1], *given[1:], gates, engine=engine)
    broken = ~torch.isfinite(y.detach()).all(-1)
    assert broken.nonzero().tolist() == [[0, 1, FIRST]]
    assert state.faults.tolist() == [1, 0]
    if engine == "chunked":
        for gradient in torch.autograd.grad(torch.where(torch.isfinite(y), y, 0.0).sum(), given):
            assert torch.isfinite(gradient).all()
    with torch.no_grad():
        _, kept = nl.memory.scan(spec, given[:1], q, k, 100 * v, gates)
    assert_same(kept, nl.state.detach(state), 1e-5)
