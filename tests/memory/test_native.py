"""The C code against the framework's operations and the reference: values, state, every gradient; what it leaves to them."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import nestling as nl
import nestling.native
from nestling.memory import (
    L2,
    MLP,
    DeltaGradient,
    DotProduct,
    Full,
    Gates,
    Gradient,
    Huber,
    Identity,
    Lp,
    Lq,
    Matrix,
    MemorySpec,
    Momentum,
    Omega,
    Polynomial,
    native,
)
from nestling.memory.native import fields
from nestling.native import library, status, without

NEEDS = pytest.mark.skipif(not status().startswith("on"), reason=f"the C code is not used here: {status()}")
HEADS = 2
PLAIN = {"features": Identity(), "network": MLP()}

CELLS = {
    "titans": ("titans", {}),
    "titans, read before": ("titans", {"read": "before"}),
    "titans, matrix": ("titans", {"network": Matrix()}),
    "titans, three layers": ("titans", {"network": MLP(depth=3, expansion=1.5, activation="silu")}),
    "titans, neither norm nor residual": ("titans", {"network": MLP(norm=False, residual=False)}),
    "titans, dot product": ("titans", {"bias": DotProduct()}),
    "titans, dot product, no norm": ("titans", {"bias": DotProduct(), "network": MLP(norm=False)}),
    "titans, nothing forgotten": ("titans", {"retention": Full(), "network": MLP(activation="gelu_tanh")}),
    "decay without momentum": ("titans", {"rule": Gradient()}),
    "momentum of a dot product": ("linear_attention", {"rule": Momentum()}),
    "erases, deep": ("titans", {"rule": DeltaGradient("with_decay")}),
    "decays, then erases, deep": (
        "titans",
        {"rule": DeltaGradient("after_decay"), "network": MLP(depth=3, norm=False)},
    ),
    "error to the power 2.5": ("titans", {"bias": Lp(2.5), "rule": DeltaGradient("with_decay")}),
    "error to the power 2.5, capped": ("titans", {"bias": Lp(2.5, cap=0.8)}),
    "error to the power 3, capped": ("moneta", {"bias": Lp(3.0, cap=0.8)}),
    "smooth sign, no norm": ("titans", {"bias": Lp(1.0, slope=3.0), "network": MLP(norm=False)}),
    "Huber by coordinates": ("yaad", {"bias": Huber("coordinate"), "rule": Momentum()}),
    "Huber of the norm, matrix": ("yaad", {"bias": Huber("norm"), "network": Matrix()}),
    "polynomials": ("dla", {"network": MLP(leading=True, expansion=1.5), "features": Polynomial(2, reduce=3)}),
    "polynomials, erased": ("gated_deltanet", {"features": Polynomial(2)}),
    "polynomials, norm to the power 4": ("moneta", {"features": Polynomial(1), "network": MLP(leading=True)}),
    "polynomials made before, softmax": ("memora", {"features": Polynomial(2), "network": MLP(leading=True)}),
    "softmax, read before": ("memora", {"read": "before", "network": MLP(depth=3, norm=False)}),
    "norm to the power 3, read before": ("moneta", {"read": "before", "retention": Lq(3.0), "bias": L2()}),
    "norm of a matrix": ("moneta", {"network": Matrix(), "retention": Lq(4.0, floor=2.0)}),
    "a window": ("omeganet", PLAIN),
    "a window with momentum": ("omeganet", {**PLAIN, "rule": Momentum()}),
    "a window, dot product": ("omeganet", {**PLAIN, "bias": Omega(DotProduct(), 3), "read": "before"}),
    "a window of polynomials": ("omeganet", {"rule": Momentum(), "features": Polynomial(3, reduce=2)}),
    "read at the boundary": ("titans", {"read": "boundary"}),
    "a deep network erased, read at the boundary": (
        "titans",
        {"rule": DeltaGradient("with_decay"), "network": MLP(depth=3, norm=False), "read": "boundary"},
    ),
    "momentum of a matrix, read at the boundary": ("linear_attention", {"rule": Momentum(), "read": "boundary"}),
    "a window, read at the boundary": ("omeganet", {**PLAIN, "rule": Momentum(), "read": "boundary"}),
    "polynomials, read at the boundary": (
        "dla",
        {"network": MLP(leading=True, residual=False), "features": Polynomial(2, reduce=3), "read": "boundary"},
    ),
    "a window, Huber": ("omeganet", {**PLAIN, "bias": Omega(Huber(), 3)}),
    "channels, read before": ("gla", {"read": "before"}),
    "channels decay, then are erased": ("gla", {"rule": DeltaGradient("after_decay")}),
    "channels are erased, read before": ("rwkv7_like", {"read": "before"}),
    **{
        name: (name, {})
        for name in (
            "memora",
            "moneta",
            "yaad",
            "swla",
            "ttt_linear",
            "ttt_mlp",
            "linear_attention",
            "retnet",
            "mamba2_like",
            "deltanet",
            "gated_deltanet",
            "comba_like",
            "longhorn",
            "gla",
            "rwkv7_like",
        )
    },
}


def cell_of(name: str, **sizes: int) -> Any:
    """The memory of a cell, or of a system's own name."""
    system, choices = CELLS.get(name, (name, {}))
    return nl.memory.named(system, **{**sizes, **choices})


def example(spec: MemorySpec, time: int, seed: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Gates]:
    """Initial weights, q, k, v and gates, the same numbers in every precision, all to be differentiated."""
    g = torch.Generator().manual_seed(seed)
    q, k, v, gates = spec.example(g, heads=HEADS, time=time)
    w0 = [w + 0.2 * torch.randn(w.shape, generator=g) for w in spec.init(HEADS, g)]
    return (
        [w.to(dtype).requires_grad_() for w in w0],
        [x.to(dtype).requires_grad_() for x in (q, k, v)],
        gates.map(lambda gate: gate.to(dtype).requires_grad_()),
    )


def everything(spec: MemorySpec, time: int, seed: int, dtype: torch.dtype, **options: object) -> list[Tensor]:
    """Outputs, final weights and momentum, and the gradients of a random sum of them to every input."""
    w0, streams, gates = example(spec, time, seed, dtype)
    y, state = nl.memory.scan(spec, w0, *streams, gates, **options)
    outputs = [y, *state.weights, *state.momentum]
    g = torch.Generator().manual_seed(seed + 1)
    total = sum((x * torch.randn(x.shape, generator=g).to(dtype)).sum() for x in outputs)
    inputs = [*w0, *streams, *(gate for _, gate in gates.items())]
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    zeros = (torch.zeros_like(x) for x in inputs)
    return [*(x.detach() for x in outputs), *(z if x is None else x for x, z in zip(found, zeros, strict=True))]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, number
        error = float((a.double() - b.double()).abs().max())
        assert error <= tolerance * max(1.0, float(b.abs().max())), f"{number}: off by {error:.1e}"


@NEEDS
@pytest.mark.parametrize("cell", CELLS)
@given(dim=st.sampled_from([3, 8, 16, 20]), chunk=st.sampled_from([1, 5, 8, 13]), seed=st.integers(0, 10_000))
def test_equals_the_definition(cell: str, dim: int, chunk: int, seed: int) -> None:
    """In double precision, to 1e-8; in single precision the same code has but its roundings of its own."""
    spec = cell_of(cell, key_dim=dim, chunk=chunk)
    assert native.serves(native.Cell.of(spec, spec.network), torch.zeros(1))
    time = (3 if spec.reads_weights else 2) * spec.period
    expected = everything(spec, time, seed, torch.float64, engine="reference")
    assert_close(everything(spec, time, seed, torch.float64), expected, 1e-8)


@NEEDS
@pytest.mark.parametrize("cell", CELLS)
def test_single_precision_is_as_good_as_the_framework_s(cell: str) -> None:
    spec = cell_of(cell, key_dim=16, chunk=16)
    expected = everything(spec, 2 * spec.period, 1, torch.float64)
    found = everything(spec, 2 * spec.period, 1, torch.float32)
    with without():
        others = everything(spec, 2 * spec.period, 1, torch.float32)
    for a, b, true in zip(found, others, expected, strict=True):
        size = max(1.0, float(true.abs().max()))
        error, other = (float((x.double() - true).abs().max()) / size for x in (a, b))
        assert error <= max(1e-6, 4 * other)


@NEEDS
@pytest.mark.parametrize("name", ["omeganet", "dla", "swla", "polynomials, erased"])
def test_features_are_made_tile_by_tile(name: str, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As wide as they are, they are never there for all tokens; but of those that the next call's window needs."""
    made: list[int] = []
    apply = Polynomial.apply

    def counting(self: Polynomial, x: Tensor, own: Sequence[Tensor]) -> Tensor:
        made.append(x.shape[2])
        return apply(self, x, own)

    monkeypatch.setattr(Polynomial, "apply", counting)
    spec = cell_of(name, key_dim=20, chunk=8)
    everything(spec, 2 * spec.period + 3, 1, torch.float32)
    assert len(calls) == 1
    assert made == ([spec.bias.window - 1] if spec.bias.window > 1 else [])


SELF = {
    "as it is": {},
    "momentum": {"rule": Momentum(), "adaptive_q": True},
    "momentum as a sum": {"rule": Momentum(), "average": False},
    "gradient, nothing forgotten": {"rule": Gradient(), "retention": Full()},
    "decays, then erases": {"rule": DeltaGradient("after_decay"), "read": "after", "unit_values": True},
    "after_decay without decay": {"rule": DeltaGradient("after_decay"), "retention": Full()},
    "generators faster": {"chunk_others": 3, "adaptive_q": True},
    "generators slower": {"chunk_others": 24, "rule": Momentum()},
    "matrices": {"network": Matrix(identity=True), "others": Matrix(identity=True), "bias": DotProduct()},
    "deeper, with norm": {
        "network": MLP(depth=3, last_std=0.1, norm=False),
        "others": MLP(expansion=2.0, last_std=0.1, activation="silu"),
    },
}


@NEEDS
@pytest.mark.parametrize("choices", SELF.values(), ids=SELF)
@given(dim=st.sampled_from([3, 8, 16]), seed=st.integers(0, 10_000))
def test_the_self_modifying_memory_equals_its_definition(choices: dict, dim: int, seed: int) -> None:
    spec = nl.memory.named("self_modifying", key_dim=dim, chunk=8, **choices)
    assert all(native.serves(cell, torch.zeros(1)) for cell in native.cells(spec))
    expected = everything(spec, 29, seed, torch.float64, engine="reference")
    assert_close(everything(spec, 29, seed, torch.float64), expected, 1e-8)


RAGGED = {**CELLS, **{f"self_modifying, {name}": ("self_modifying", choices) for name, choices in SELF.items()}}


@NEEDS
@pytest.mark.parametrize("cell", RAGGED)
def test_reads_what_is_not_whole_chunks(cell: str, calls: list[int]) -> None:
    """Lanes at different positions, resets inside a call, tokens that are not there at its end, calls that end in a chunk."""
    name, choices = RAGGED[cell]
    spec = nl.memory.named(name, key_dim=8, **{"chunk": 8, **choices})
    valid, reset = torch.ones(2, 45, dtype=torch.bool), torch.zeros(2, 45, dtype=torch.bool)
    valid[0, 40:], valid[1, :3] = False, False
    reset[0, 13], reset[0, 16], reset[1, 30] = True, True, True

    def read(engine: str) -> list[Tensor]:
        w0, streams, gates = example(spec, 45, 29, torch.float64)
        state, outputs = None, []
        for first, last in ((0, 5), (5, 31), (31, 45)):
            here = slice(first, last)
            part = [x[:, :, here] for x in streams]
            masks = {"valid": valid[:, here], "reset": reset[:, here]}
            y, state = nl.memory.scan(spec, w0, *part, gates[here], state, engine=engine, **masks)
            outputs.append(y)
        assert state is not None
        found = [torch.cat(outputs, 2), *state.anchor, *state.weights, *state.momentum]
        g = torch.Generator().manual_seed(31)
        total = sum((x * torch.randn(x.shape, generator=g).double()).sum() for x in found)
        inputs = [*w0, *streams, *(gate for _, gate in gates.items())]
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
        return [*(x.detach() for x in found), *(g for g in grads if g is not None)]

    found = read("chunked")
    assert len(calls) >= 3  # features are made in pieces
    assert_close(found, read("reference"), 1e-8)


@NEEDS
def test_holes_are_left_to_the_other_path(calls: list[int]) -> None:
    """A tile whose tokens do not follow one another; tokens that are not there may hold anything."""
    spec = nl.memory.named("titans", key_dim=8, chunk=8)
    w0, (q, k, v), gates = example(spec, 24, 33, torch.float64)
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[1, 20:] = False
    k = torch.where(valid[:, None, :, None], k, torch.nan)
    with torch.no_grad():
        y, _ = nl.memory.scan(spec, w0, q, k, v, gates, valid=valid)
        assert calls == [3]
        assert torch.isfinite(y).all()
        valid[0, 3] = False
        nl.memory.scan(spec, w0, q, k, v, gates, valid=valid)
        assert calls == [3]


@NEEDS
def test_all_modes_and_any_number_of_threads_give_the_same(calls: list[int]) -> None:
    spec = nl.memory.named("titans", key_dim=8, chunk=8)
    w0, streams, gates = example(spec, 32, 7, torch.float32)
    y, state = nl.memory.scan(spec, w0, *streams, gates)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            z, other = nl.memory.scan(spec, w0, *streams, gates)
        assert all(torch.equal(a, b) for a, b in zip([y, *state.weights], [z, *other.weights], strict=True))
    alone = everything(spec, 32, 7, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = everything(spec, 32, 7, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert len(calls) == 5


@NEEDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize(
    "name", ["titans", "gated_deltanet", "a window", "a window of polynomials", "rwkv7_like", "self_modifying"]
)
def test_skips_the_tokens_that_the_guard_refuses(name: str, bad: float, calls: list[int]) -> None:
    spec = cell_of(name, key_dim=8, chunk=8)
    w0, streams, gates = example(spec, 32, 9, torch.float32)
    q, k, v = (x.detach().clone() for x in streams)
    k[0, 1, 11], v[1, 0, 3] = bad, bad
    with torch.no_grad():
        y, state = nl.memory.scan(spec, w0, q, k, v, gates)
        z, other = nl.memory.scan(spec, w0, q, k, v, gates, engine="reference")
    assert len(calls) == 1
    assert torch.isfinite(y).all()
    assert state.faults.tolist() == other.faults.tolist() == [1, 1]
    assert_close([y, *state.weights, *state.momentum], [z, *other.weights, *other.momentum])


@NEEDS
@pytest.mark.parametrize("bad", [(5,), (4,), (3, 5), (3, 4, 5)])
def test_a_refused_token_keeps_its_place_in_the_window_of_the_next_call(bad: tuple[int, ...], calls: list[int]) -> None:
    """Where it is not the first of those that the next call's window reads."""
    spec = cell_of("a window", key_dim=4, chunk=4, bias=Omega(L2(), 4))
    w0, streams, gates = example(spec, 12, 41, torch.float64)
    q, k, v = (x.detach().clone() for x in streams)
    k[0, 1, list(bad)] = torch.nan

    def read(engine: str) -> list[Tensor]:
        state, outputs = None, []
        for here in (slice(0, 6), slice(6, 12)):
            y, state = nl.memory.scan(
                spec, w0, q[:, :, here], k[:, :, here], v[:, :, here], gates[here], state, engine=engine
            )
            outputs.append(y)
        assert state is not None
        found = [torch.cat(outputs, 2), *state.weights]
        inputs = [*w0, gates.lr, gates.window]
        return [*(x.detach() for x in found), *torch.autograd.grad(sum(x.square().sum() for x in found), inputs)]

    found = read("chunked")
    assert len(calls) == 2
    assert_close(found, read("reference"), 1e-8)


@NEEDS
@pytest.mark.parametrize("name", ["titans", "gla", "self_modifying"])
def test_reads_gradients_that_are_views_with_another_sign(name: str) -> None:
    """As a complex number's conjugate leaves them."""
    spec = cell_of(name, key_dim=4, chunk=4)
    w0, (q, k, v), gates = example(spec, 8, 43, torch.float64)
    y, _ = nl.memory.scan(spec, w0, q, k, v, gates)
    ones = torch.ones_like(y)
    (found,) = torch.autograd.grad(y, v, ones._neg_view(), retain_graph=True)
    (expected,) = torch.autograd.grad(y, v, -ones)
    assert torch.equal(found, expected)


@NEEDS
def test_guards_step_in_as_ever(calls: list[int]) -> None:
    """Values that overflow on the way, which the inputs do not show: the other lane is still read by the C code."""
    spec = nl.memory.named("titans", key_dim=8, chunk=8)
    w0, (q, k, v), gates = example(spec, 32, 9, torch.float32)
    with torch.no_grad():
        clean, _ = nl.memory.scan(spec, w0, q, k, v, gates)
        calls.clear()
        v, lr = v.clone(), gates.lr.clone()
        v[1, 0, 3], lr[1, 0, 3] = 1e18, 1e16
        gates = dataclasses.replace(gates, lr=lr)
        y, state = nl.memory.scan(spec, w0, q, k, v, gates)
        assert calls
        with without():
            z, other = nl.memory.scan(spec, w0, q, k, v, gates)
    assert state.faults.tolist() == other.faults.tolist()
    assert state.faults[0] == 0 < state.faults[1]
    assert all(bool(torch.isfinite(w).all()) for w in (*state.anchor, *state.weights, *state.momentum))
    assert torch.equal(y[0], clean[0])
    assert_close([y[1, :, :3]], [z[1, :, :3]])
    torch.testing.assert_close(y[1], z[1], rtol=1e-3, atol=1e-3, equal_nan=True)


@NEEDS
@pytest.mark.parametrize("read", ["after", "before"])
def test_logits_that_leap(read: str, calls: list[int]) -> None:
    """The exponentials of a token are taken around the largest logits before it, which a large step leaves far behind."""
    spec = nl.memory.named("memora", key_dim=8, chunk=8, read=read)

    def read_all(engine: str, dtype: torch.dtype) -> list[Tensor]:
        w0, streams, gates = example(spec, 24, 35, dtype)
        leaps = torch.tensor([1.0, 3e3, 1.0], dtype=dtype).repeat(8)
        y, state = nl.memory.scan(spec, w0, *streams, dataclasses.replace(gates, lr=gates.lr * leaps), engine=engine)
        assert max(float(w.detach().abs().max()) for w in state.weights) > 100
        total = y.square().sum() + sum(w.square().mean() for w in state.weights)
        grads = torch.autograd.grad(total, [*w0, *streams, gates.lr, gates.retention])
        return [y.detach(), *(w.detach() for w in state.weights), *grads]

    expected = read_all("reference", torch.float64)
    assert_close(read_all("chunked", torch.float64), expected, 1e-8)
    assert_close(read_all("chunked", torch.float32), expected, 1e-2)
    assert len(calls) == 2


@NEEDS
@pytest.mark.parametrize("place", ["k", "q"])
def test_a_layer_norm_whose_variance_overflows_is_no_number(place: str) -> None:
    """Of keys and weights that are large and finite: not a norm of 0, with which a memory would answer and learn on."""
    spec = nl.memory.named("titans", key_dim=8, chunk=8)
    w0, (q, k, v), gates = example(spec, 32, 9, torch.float32)
    with torch.no_grad():
        given = {"q": q.clone(), "k": k.clone()}
        given[place][1, 0, 3] = 1e12
        w0 = [1e6 * w for w in w0]
        _, state = nl.memory.scan(spec, w0, given["q"], given["k"], v, gates)
        with without():
            _, other = nl.memory.scan(spec, w0, given["q"], given["k"], v, gates)
    assert state.faults.tolist() == other.faults.tolist() == [0, 1]


@NEEDS
def test_a_state_that_was_changed_by_hand_is_read_as_it_is(calls: list[int]) -> None:
    """Where the weights are not the anchor though a chunk begins."""
    spec = nl.memory.named("titans", key_dim=8, chunk=8)
    w0, streams, gates = example(spec, 16, 11, torch.float32)
    with torch.no_grad():
        start = spec.start(w0, 2)
        changed = start._replace(weights=tuple(2 * w for w in start.weights))
        y, _ = nl.memory.scan(spec, w0, *streams, gates, changed)
        expected, _ = nl.memory.scan(spec, w0, *streams, gates, changed, engine="reference")
    assert calls == [2]
    assert_close([y], [expected])


def assert_second_derivatives(spec: Any, time: int, calls: list[int]) -> None:
    """Those of a call that the C code reads are the framework's."""

    def twice() -> list[Tensor]:
        w0, streams, gates = example(spec, time, 13, torch.float64)
        y, _ = nl.memory.scan(spec, w0, *streams, gates)
        inputs = [*w0, *streams, *(gate for _, gate in gates.items())]
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True, allow_unused=True)
        total = sum(g.square().sum() for g in first if g is not None)
        return [x for x in torch.autograd.grad(total, inputs, allow_unused=True) if x is not None]

    found = twice()
    assert calls
    with without():
        assert_close(found, twice(), 1e-8)


@NEEDS
@pytest.mark.parametrize(
    "name", ["titans", "gated_deltanet", "a window", "a window of polynomials", "rwkv7_like", "self_modifying"]
)
def test_second_derivatives(name: str, calls: list[int]) -> None:
    spec = cell_of(name, key_dim=4, chunk=4)

    assert_second_derivatives(spec, 2 * spec.period, calls)


@pytest.mark.parametrize("name", ["self_modifying", "titans", "gated_deltanet", "a window", "rwkv7_like"])
@pytest.mark.parametrize("in_c", [False, pytest.param(True, marks=NEEDS)])
def test_a_gradient_to_be_differentiated_is_the_gradient(name: str, in_c: bool) -> None:
    """Also where inputs of a step were made from one another, as keys from the weights that they then change."""
    spec = cell_of(name, key_dim=4, chunk=4)
    g = torch.Generator().manual_seed(19)
    w0 = [w.double().requires_grad_() for w in spec.init(HEADS, g)]
    q, k, v, gates = spec.example(g, heads=HEADS, time=2 * spec.period)
    k = k.double() @ w0[0] if w0[0].shape[-2:] == (4, 4) else k.double() @ w0[0] @ w0[0].mT
    with contextlib.nullcontext() if in_c else without():
        y, state = nl.memory.scan(spec, w0, q.double(), k, v.double(), gates.map(lambda gate: gate.double()))
        total = y.square().sum() + sum(w.square().sum() for w in state.weights)
        plain = torch.autograd.grad(total, w0, retain_graph=True)
        again = torch.autograd.grad(total, w0, create_graph=True)
    assert_close([x.detach() for x in again], list(plain), 1e-10)


@NEEDS
def test_backward_goes_the_way_that_forward_went() -> None:
    spec = nl.memory.named("titans", key_dim=8, chunk=8)
    w0, streams, gates = example(spec, 16, 21, torch.float32)
    y, _ = nl.memory.scan(spec, w0, *streams, gates)
    expected = torch.autograd.grad(y.sum(), w0, retain_graph=True)
    with without():
        found = torch.autograd.grad(y.sum(), w0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@NEEDS
def test_a_backward_pass_that_goes_another_way_is_told_and_corrupts_nothing() -> None:
    """What is computed again for it, without the C code, keeps other tensors than those it had in the forward pass."""
    spec = nl.memory.named("titans", key_dim=8, chunk=4)
    w0 = [w.requires_grad_() for w in spec.init(2, torch.Generator().manual_seed(0))]
    q, k, v, gates = spec.example(torch.Generator().manual_seed(0), time=24)

    def twice(*w0: Tensor) -> Tensor:
        y, state = nl.memory.scan(spec, w0, q, k, v, gates)
        return nl.memory.scan(spec, w0, q, k, y, gates, state)[0].sum()

    def read() -> Any:
        return checkpoint(twice, *w0, use_reentrant=False, determinism_check="none")

    for _ in range(3):
        y = read()
        with pytest.raises(RuntimeError, match=r"went another way|[Cc]heckpoint"), without():
            torch.autograd.grad(y, w0)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(read(), w0))


@NEEDS
@pytest.mark.parametrize("dim", [17, 31, 33])
def test_odd_widths_in_single_precision(dim: int) -> None:
    """Around the widths of the vector registers and panels, keys and values of different widths."""
    spec = nl.memory.named("titans", key_dim=dim, value_dim=dim + 2, chunk=9, network=Matrix())
    assert_close(everything(spec, 27, 23, torch.float32), everything(spec, 27, 23, torch.float64), 1e-5)


@NEEDS
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_activations(mean: float) -> None:
    """σ, σ' and σ'' are correct to single precision far out as well, where they go to 0, 1 and x."""
    for activation in ("gelu", "gelu_tanh", "silu"):
        network = MLP(depth=2, expansion=1.0, activation=activation, norm=False, residual=False)
        spec = nl.memory.named("titans", key_dim=16, chunk=16, network=network, rule=Gradient())
        runs = []
        for dtype in (torch.float32, torch.float64):
            g = torch.Generator().manual_seed(17)
            w = [mean * torch.eye(16) + torch.randn(HEADS, 16, 16, generator=g), torch.eye(16).expand(HEADS, -1, -1)]
            w0 = [x.to(dtype).requires_grad_() for x in w]
            q, k, v = (torch.randn(1, HEADS, 16, 16, generator=g).to(dtype) for _ in range(3))
            lr = torch.full((1, HEADS, 16), 1e-3, dtype=dtype)
            y, state = nl.memory.scan(spec, w0, q, k, v, Gates(lr=lr))
            total = y.sum() + sum(x.square().sum() for x in state.weights)
            runs.append([y.detach(), *torch.autograd.grad(total, w0)])
        assert_close(runs[0], runs[1], 1e-5)


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Reads as a process would that has loaded nothing yet, and says what became of the C code."""

    def read(**environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(nestling.native, "_load", cache(nestling.native._load.__wrapped__))
        spec = nl.memory.named("titans", key_dim=4, chunk=4)
        y, _ = nl.memory.scan(spec, spec.init(2), *spec.example(torch.Generator().manual_seed(0), time=8))
        assert torch.isfinite(y).all()
        return status()

    return read


def test_does_without(anew: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Switched off, without a compiler, with one that fails, and where nothing can be written: it still reads."""
    assert anew(NESTLING_NATIVE="0") == "off (NESTLING_NATIVE=0)"
    monkeypatch.delenv("NESTLING_NATIVE")
    path = os.environ["PATH"]
    assert "no C compiler" in anew(PATH=str(tmp_path))
    fails = tmp_path / "cc"
    fails.write_text("#!/bin/sh\necho 'no such thing' >&2\nexit 1\n")
    fails.chmod(0o755)
    assert "could not build it (no such thing)" in anew(
        PATH=f"{tmp_path}:/usr/bin:/bin", XDG_CACHE_HOME=str(tmp_path / "one")
    )
    shared = tmp_path / "shared" / "nestling"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    assert "is not this user's alone" in anew(PATH=path, XDG_CACHE_HOME=str(tmp_path / "shared"))
    (tmp_path / "file").write_text("")
    assert anew(XDG_CACHE_HOME=str(tmp_path / "file")).startswith("off: ")


@NEEDS
def test_is_built_once_and_anew_where_it_was_cut_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As by a crash: to load what is left would end the process with a bus error."""
    source = tmp_path / "probe.c"
    source.write_text(PROBE)
    monkeypatch.setattr(nestling.native, "SCAN", source)  # which builds in no time
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def load() -> Path:
        monkeypatch.setattr(nestling.native, "_load", cache(nestling.native._load.__wrapped__))
        assert status().startswith("on")
        (built,) = (tmp_path / "nestling").iterdir()
        return built

    built = load()
    before, content = built.stat().st_mtime_ns, built.read_bytes()
    assert load() == built
    assert built.stat().st_mtime_ns == before
    built.unlink()  # not in place: this process has it mapped
    built.write_bytes(content[:5000])
    built.chmod(0o700)
    assert load() == built
    assert len(built.read_bytes()) == len(content)


@NEEDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_part_is_built(dtype: torch.dtype) -> None:
    """One that is not leaves its work to the framework, and nobody would notice but by the speed."""
    sources = sorted(Path(nl.__file__).parent.rglob("*.c"))
    assert len(sources) >= 5
    for source in sources:
        code = library(source, dtype)
        assert code is not None, source
        assert code.size > 0, source


PROBE = """
#include "share.h"

typedef struct {
    int cells;
    real *seen;
} Probe;

static void look(const void *given, int part, real *space) {
    const Probe *p = given;
    memcpy(p->seen + part * p->cells, space, p->cells * sizeof(real));
    for (int i = 0; i < p->cells; i++) space[i] = 1;
}

int probe(int parts, int threads, int cells, real *seen) {
    Probe p = {cells, seen};
    return spread(&p, look, parts, threads, cells);
}
"""


@NEEDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scratch_is_full_of_nan_where_it_is_poisoned(dtype: torch.dtype, tmp_path: Path, monkeypatch) -> None:
    """In every part, also behind one that wrote there, of a library that was loaded before or is loaded meanwhile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sources = [tmp_path / f"{when}.c" for when in ("before", "meanwhile")]
    for source in sources:
        source.write_text(PROBE)

    def seen(source: Path, threads: int) -> Tensor:
        code, cells = library(source, dtype), torch.zeros(6, 37, dtype=dtype)
        assert code is not None
        assert code.probe(6, threads, 37, ctypes.c_void_p(cells.data_ptr())) == 0
        return cells

    assert seen(sources[0], 1)[1:].eq(1).all(), "a thread's parts share a space"
    with nl.testing.poisoned():
        for source in sources:
            for threads in (1, 3):
                assert seen(source, threads).isnan().all()
    for source in sources:
        assert seen(source, 1)[1:].eq(1).all(), "it is left on"


@NEEDS
def test_a_structure_that_the_code_was_not_built_for_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where files are exchanged under a process: Python has read its own, and the compiler builds the new ones."""

    spec = nl.memory.named("titans", key_dim=4, chunk=4)
    given = spec.init(2), *spec.example(torch.Generator().manual_seed(0), time=8)
    longer = type("Longer", (fields.Scan,), {"_fields_": [("more", ctypes.c_int)]})
    monkeypatch.setattr(fields, "Scan", longer)
    with pytest.raises(RuntimeError, match=r"nestling_scan: the C code reads a structure of \d+ bytes.*Start it again"):
        nl.memory.scan(spec, *given)
    with without():
        nl.memory.scan(spec, *given)


def test_what_does_not_load_is_not_kept(anew: Callable[..., str], tmp_path: Path) -> None:
    """A compiler that says yes and makes nothing, and one that dies without a word."""
    compiler = tmp_path / "cc"
    for ends, words in (("exit 0", "off: "), ("kill -9 $$", "could not build it (exit status -9)")):
        compiler.write_text(f"#!/bin/sh\n{ends}\n")
        compiler.chmod(0o755)
        assert words in anew(PATH=f"{tmp_path}:/usr/bin:/bin", XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert not list((tmp_path / "cache" / "nestling").iterdir())
