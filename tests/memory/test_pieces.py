"""Calls in pieces: the definition's outputs, states and gradients, with little kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling import testing
from nestling.memory import MLP, Gates, Memory, Sketch, pieces
from nestling.memory.pieces import Size
from nestling.native import without

NAMES = ("atlas", "atlas_plus", "dla", "swla", "swdt", "dot", "deep_transformer", "moneta", "rwkv7_like", "tnt")
# Features that the C code does not make by itself: what it makes, it makes again by itself.
SKETCH = {"features": Sketch(size=6)}
SHORT = {"tnt": {"global_chunk": 7, "shard": 10}, "dla": SKETCH, "swla": SKETCH, "atlas": SKETCH, "atlas_plus": SKETCH}


def small(name: str, **more: object) -> Memory:
    spec: Memory = nl.memory.named(name, key_dim=4, **SHORT.get(name, {}), **more)
    return spec


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [Size(1, 1, 5), Size(2, 1, 16)])
def test_pieces_are_the_reference(name: str, size: Size) -> None:
    with pieces.of(size):
        case = testing.Case(
            time=19, chunk=size.tokens, tile=None, read="after", seed=size.tokens, masks=size.lanes == 1
        )
        testing.chunked_equals_reference(small(name), case)


def ends(spec: Memory, change: Callable[..., None] | None = None, time: int = 23) -> tuple[Tensor, ...]:
    """Output, last weights and faults of a call; `change` alters its inputs in place."""
    w0, inputs, gates = given(spec, change, time)
    y, state = spec.scan(w0, *inputs, gates)
    return y, *state.weights, state.faults


def scanned(spec: Memory, change: Callable[..., None] | None = None, time: int = 23) -> tuple[Tensor, ...]:
    """The same, and gradients."""
    w0, inputs, gates = given(spec, change, time)
    for x in (*w0, *inputs):
        x.requires_grad_()
    y, state = spec.scan(w0, *inputs, gates)
    loss = y.square().sum() + sum(w.sum() for w in state.weights)
    return y, *state.weights, state.faults, *torch.autograd.grad(loss, [*w0, *inputs])


def given(spec: Memory, change: Callable[..., None] | None, time: int) -> tuple[list[Tensor], list[Tensor], Gates]:
    """Initial weights, streams and gates of two heads."""
    generator = torch.Generator().manual_seed(0)
    w0 = [w.double() for w in spec.init(2, generator)]
    *streams, gates = spec.example(generator, lanes=2, heads=2, time=time, dtype=torch.float64)
    if change is not None:
        change(*streams)
    return w0, streams, gates


def alike(work: Callable[[], tuple[Tensor, ...]], size: Size) -> tuple[Tensor, ...]:
    """What `work` finds, which must be the same in pieces."""
    with pieces.whole():
        expected = work()
    with pieces.of(size):
        found = work()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10, equal_nan=True)
    return expected


def test_a_guard_in_one_head_is_felt_in_the_others() -> None:
    spec = small("dla", chunk=5)

    def overflow(q: Tensor, k: Tensor, v: Tensor) -> None:
        v[1, 0, 7] = 1e200  # its square is not finite: a token that is not written in any head

    expected = alike(lambda: scanned(spec, overflow), Size(1, 1, 10))
    assert expected[3].tolist() == [0, 1]
    assert all(bool(torch.isfinite(x).all()) for x in expected)


def test_an_update_that_overflows_in_one_head_puts_all_heads_back() -> None:
    spec = small("dla", chunk=5, network=MLP(leading=True, norm=False))

    def overflow(q: Tensor, k: Tensor, v: Tensor) -> None:
        v[0, 1] = 1e153  # layers multiply what they learn of it, from chunk to chunk

    with torch.no_grad():
        expected = alike(lambda: ends(spec, overflow), Size(1, 1, 10))
    assert expected[3][0] > 0
    assert expected[3][1] == 0
    assert all(bool(torch.isfinite(w).all()) for w in expected[1:3]), "an answer may overflow, the weights may not"


def test_a_second_derivative_goes_through_pieces() -> None:
    spec = small("swdt", chunk=5)

    def second() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        w0 = [w.double().requires_grad_() for w in spec.init(2, generator)]
        q, k, v, gates = spec.example(generator, lanes=2, heads=2, time=12, dtype=torch.float64)
        y, _ = spec.scan(w0, q.requires_grad_(), k.requires_grad_(), v, gates)
        first = torch.autograd.grad(y.square().sum(), [*w0, q, k], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [*w0, q, k])

    assert all(bool(torch.isfinite(x).all()) for x in alike(second, Size(1, 1, 5)))


@pytest.mark.parametrize("name", ["atlas", "swla"])
def test_little_is_kept(name: str) -> None:
    spec = small(name, chunk=4)

    def kept() -> int:
        total = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            generator = torch.Generator().manual_seed(0)
            w0 = [w.requires_grad_() for w in spec.init(2, generator)]
            spec.scan(w0, *spec.example(generator, lanes=2, heads=2, time=64))
        return total

    with pieces.whole():
        expected = kept()
    with pieces.of(Size(1, 1, 32)):
        assert kept() < expected / 2


def test_the_last_state_alone_has_gradients_too() -> None:
    spec = small("atlas", chunk=4)
    generator = torch.Generator().manual_seed(0)
    w0 = [w.double().requires_grad_() for w in spec.init(2, generator)]
    q, k, v, gates = spec.example(generator, lanes=2, heads=2, time=16, dtype=torch.float64)

    def gradients() -> tuple[Tensor, ...]:
        _, state = spec.scan(w0, q, k.requires_grad_(), v, gates)
        return torch.autograd.grad(state.weights[0].square().sum(), [*w0[:2], k])

    assert all(bool(torch.isfinite(x).all()) for x in alike(gradients, Size(1, 2, 4)))


def test_gates_without_gradients_need_none() -> None:
    spec = small("swla")
    generator = torch.Generator().manual_seed(0)
    w0 = spec.init(2, generator)
    q, k, v, gates = spec.example(generator, lanes=1, heads=2, time=12)
    fixed = Gates(lr=gates.lr, retention=gates.retention, window=gates.window)
    with pieces.of(Size(1, 2, 4)):
        y, _ = spec.scan(w0, q.requires_grad_(), k, v, fixed)
    (d_q,) = torch.autograd.grad(y.sum(), q)
    assert bool(torch.isfinite(d_q).all())


def test_pairs_are_kept_once() -> None:
    """Those of a state between pieces are a part of the last state's, so that what is kept grows with the text alone."""
    spec = nl.memory.named("deep_transformer", key_dim=4, chunk=4)
    generator = torch.Generator().manual_seed(0)
    w0 = [w.requires_grad_() for w in spec.init(2, generator)]
    held: set[int] = set()

    def pack(x: Tensor) -> Tensor:
        if x.shape[2:] == (1, 16):  # what one head wrote
            held.add(x.untyped_storage().data_ptr())
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with without(), hooks, pieces.of(Size(1, 1, 4)):  # the C code has no pieces
        y, state = spec.scan(w0, *spec.example(generator, lanes=2, heads=2, time=16))
    assert held == {state.pairs.write.untyped_storage().data_ptr()}
    assert bool(torch.isfinite(torch.autograd.grad(y.sum(), w0[0])[0]).all())
