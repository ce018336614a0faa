"""The weight matrix that modifies itself by the C code, against its definition token by token; see `test_baselines`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import nestling as nl
from nestling import testing
from nestling.layers import SelfReferential, SelfReferentialState, self_referential_in_c
from nestling.layers.self_referential_in_c import TILE, Scan
from nestling.native import status, without

NEEDS = pytest.mark.skipif(not status().startswith("on"), reason=f"the C code is not used here: {status()}")
LANES = 2

Masks = dict[str, Tensor]


def example(width: int, time: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[SelfReferential, Tensor]:
    """A layer of two heads and what it reads, the same numbers in every precision, all to be differentiated."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = SelfReferential(2 * width, 2).to(dtype)
    x = 3 * torch.randn(LANES, time, 2 * width, generator=generator)
    return layer, x.to(dtype).requires_grad_()


def masks(time: int, seed: int) -> Masks:
    """Resets and missing tokens anywhere."""
    generator = torch.Generator().manual_seed(seed)
    reset, valid = (torch.rand(LANES, time, generator=generator) < share for share in (0.06, 0.8))
    return {"reset": reset, "valid": valid}


def everything(layer: SelfReferential, x: Tensor, bounds: Sequence[int] = (), **given: Tensor) -> list[Tensor]:
    """Outputs, weights behind them and every gradient, of calls from each of the bounds to the next one and then to the end."""
    time, generator = x.shape[1], torch.Generator().manual_seed(41)
    first = layer.start(LANES).weights.detach() + 0.1 * torch.randn(layer.initial.shape, generator=generator).to(x)
    state = SelfReferentialState(first.requires_grad_(), torch.zeros(LANES, dtype=torch.int64))
    weights, outputs = state.weights, []
    with testing.poisoned():
        for begin, end in itertools.pairwise((0, *bounds, time)):
            here = slice(begin, end)
            y, state = layer(x[:, here], state, **{name: mask[:, here] for name, mask in given.items()})
            outputs.append(y)
        found = [torch.cat(outputs, 1), state.weights]
        total = sum((u * torch.randn(u.shape, generator=generator).to(u)).sum() for u in found)
        inputs = [x, weights, *layer.parameters()]
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
    zeros = (torch.zeros_like(u) for u in inputs)
    return [*(u.detach() for u in found), *(z if g is None else g for g, z in zip(grads, zeros, strict=True))]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-8) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, number
        error = float((a.double() - b.double()).abs().max())
        assert error <= tolerance * max(1.0, float(b.abs().max())), f"{number}: off by {error:.1e}"


@NEEDS
@given(width=st.sampled_from([1, 3, 8, 20, 33]), time=st.integers(2, 90), seed=st.integers(0, 10_000))
def test_equals_the_definition_whatever_is_missing(width: int, time: int, seed: int) -> None:
    """Any length and width, resets and missing tokens anywhere, cut anywhere into calls."""
    layer, x = example(width, time, seed)
    given = masks(time, seed)
    with without():
        expected = everything(layer, x, **given)
    assert_close(everything(layer, x, **given), expected)
    assert_close(everything(layer, x, [seed % (time + 1)], **given), expected)


@NEEDS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("time", [2, TILE - 1, TILE, TILE + 1, 256, 257, 333])
def test_lengths_around_tiles_and_kept_weights(time: int, masked: bool, calls: list[int]) -> None:
    """The backward pass takes as many stretches as the text needs, the last one not whole."""
    layer, x = example(3, time, 5)
    given = masks(time, 6) if masked else {}
    found = everything(layer, x, **given)
    assert len(calls) == 1
    assert calls[0] >= -(-time // TILE) if masked else calls[0] == -(-time // TILE)
    with without():
        assert_close(found, everything(layer, x, **given))


@NEEDS
@pytest.mark.parametrize("masked", [False, True])
def test_every_split_gives_the_same(masked: bool) -> None:
    """Also inside tiles, and token by token."""
    time = 2 * TILE + 5
    layer, x = example(4, time, 3)
    given = masks(time, 4) if masked else {}
    whole = everything(layer, x, **given)
    for bounds in (*([at] for at in range(1, time)), range(1, time)):
        assert_close(everything(layer, x, bounds, **given), whole, 1e-10)


@NEEDS
@pytest.mark.parametrize("width", [5, 17, 31, 64])
def test_single_precision_is_as_good_as_the_framework_s(width: int) -> None:
    """Around the widths of the vector registers and panels."""
    runs = []
    for dtype in (torch.float64, torch.float32):
        layer, x = example(width, 70, 7, torch.float32)
        runs.append(everything(layer.to(dtype), x.detach().to(dtype).requires_grad_(), **masks(70, 8)))
    with without():
        layer, x = example(width, 70, 7, torch.float32)
        others = everything(layer, x, **masks(70, 8))
    for true, a, b in zip(*runs, others, strict=True):
        size = max(1.0, float(true.abs().max()))
        error, other = (float((u.double() - true).abs().max()) / size for u in (a, b))
        assert error <= max(1e-6, 4 * other)


@NEEDS
def test_how_it_is_cut_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = example(5, 100, 9)
    given = masks(100, 10)
    before = everything(layer, x, **given)
    for group in (1, 3):
        monkeypatch.setattr(Scan, "group", lambda self, stand, group=group: group)
        assert all(torch.equal(a, b) for a, b in zip(before, everything(layer, x, **given), strict=True))
    for tile in (1, 7, 64):
        monkeypatch.setattr(self_referential_in_c, "TILE", tile)
        assert_close(everything(layer, x, **given), before, 1e-10)


@NEEDS
def test_all_modes_and_any_number_of_threads_give_the_same(calls: list[int]) -> None:
    layer, x = example(20, 50, 11, torch.float32)
    alone = everything(layer, x)
    with torch.no_grad():
        y, state = layer(x)
    with torch.inference_mode():
        z, other = layer(x)
    assert torch.equal(y, z)
    assert torch.equal(state.weights, other.weights)
    assert state.weights.is_contiguous()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = everything(layer, x)
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 4
    assert torch.equal(alone[1], together[1])
    assert_close(together, alone, 1e-6)  # the framework's own products are cut by threads


@NEEDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_tokens_that_are_not_finite_write_nothing(bad: float, calls: list[int]) -> None:
    layer, x = example(4, 40, 13)
    with torch.no_grad():
        x[0, 7, 3] = x[1, 20, 0] = bad
    found = everything(layer, x)
    assert calls
    assert all(bool(torch.isfinite(u).all()) for u in found)
    assert layer(x)[1].faults.tolist() == [1, 1]
    with without():
        assert_close(found, everything(layer, x))


@NEEDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("fresh", [False, True])
def test_what_overflows_is_left_to_the_definition(bad: float, fresh: bool, calls: list[int]) -> None:
    """Weights that are no numbers or leave their range, also where a reset takes them away before the call's end."""
    layer, x = example(4, 40, 15, torch.float32)
    state = nl.state.clone(layer.start(LANES))
    with torch.no_grad():
        state.weights[1, 0, :, 2] = bad
        state.weights[1, 0, 0, 9] = bad
        reset = torch.zeros(LANES, 40, dtype=torch.bool)
        reset[1, 30] = fresh
        y, end = layer(x, state, reset=reset)
        assert not calls
        with without():
            z, other = layer(x, state, reset=reset)
    assert torch.isfinite(y[0]).all()
    assert bool(torch.isfinite(end.weights).all()) == (fresh or bad == 3e38)
    for a, b in ((y, z), (end.weights, other.weights)):
        assert torch.equal(a.isfinite(), b.isfinite())
        torch.testing.assert_close(a, b, equal_nan=True)


def test_one_token_alone_is_left_to_the_framework(calls: list[int]) -> None:
    layer, x = example(4, 1, 25)
    assert len(everything(layer, x)) == 2 + 4
    assert not calls


@NEEDS
def test_second_derivatives(calls: list[int]) -> None:
    """Those of a call that the C code reads are the framework's; a gradient to be differentiated is the gradient."""
    layer, x = example(3, TILE + 4, 17)
    given, inputs = masks(TILE + 4, 18), [x, *layer.parameters()]

    def twice() -> list[Tensor]:
        y, state = layer(x, **given)
        total = y.square().sum() + state.weights.square().sum()
        plain = torch.autograd.grad(total, inputs, retain_graph=True)
        first = torch.autograd.grad(total, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [*plain, *(g.detach() for g in first), *second]

    found = twice()
    assert calls
    assert_close(found[:3], found[3:6], 1e-10)
    with without():
        assert_close(found, twice())


@NEEDS
def test_a_checkpoint_makes_it_again(calls: list[int]) -> None:
    layer, x = example(4, 40, 19)
    expected = torch.autograd.grad(layer(x)[0].square().sum(), [x, *layer.parameters()])
    y = checkpoint(lambda u: layer(u)[0], x, use_reentrant=False, determinism_check="none")
    found = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the framework's own, in forward mode
def test_transforms_and_compilers_see_every_operation(calls: list[int]) -> None:
    layer, x = example(4, 9, 21)
    x, direction = x.detach(), torch.randn(x.shape, dtype=x.dtype)
    (expected,) = torch.autograd.grad(layer(u := x.clone().requires_grad_())[0].square().sum(), u)
    calls.clear()
    found = torch.func.grad(lambda u: layer(u)[0].square().sum())(x)
    _, along = torch.func.jvp(lambda u: layer(u)[0].square().sum(), (x,), (direction,))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")(x)[0]
    assert not calls
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(along, (expected * direction).sum())
    torch.testing.assert_close(compiled, layer(x)[0])


def test_half_precision_is_read_in_single(calls: list[int]) -> None:
    """Weights and what they answer are in float32 at least, whichever way."""
    layer, x = example(8, 40, 23, torch.bfloat16)
    found = layer(x)
    with without():
        expected = layer(x)
    assert found[0].dtype == torch.bfloat16
    assert found[1].weights.dtype == torch.float32
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1].weights, expected[1].weights)
