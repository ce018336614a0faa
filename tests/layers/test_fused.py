"""Hand-written gradients against autograd of the formula they stand for, the first and the second."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from nestling import native
from nestling.layers import fused, l2_norm
from nestling.layers.mlp import SwiGLU


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def convolve(x: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
    (y,) = fused.convolve(x, tail, weight)
    return y


def convolution(x: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
    stream, halo = torch.cat([tail, x], 1), tail.shape[1]
    return F.silu(sum(stream[:, halo - j : halo - j + x.shape[1]] * weight[j] for j in range(halo + 1)))


def parts(*sources: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Parts of a convolution that read these parts of x, side by side, each weighted by its place; and the same of the copies."""

    def fast(x: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
        found = fused.convolve(x, tail, weight, sources)
        return torch.cat([(n + 1) * y for n, y in enumerate(found)], -1)

    def formula(x: Tensor, tail: Tensor, weight: Tensor) -> Tensor:
        read = x.chunk(max(sources) + 1, -1)
        y = convolution(torch.cat([read[source] for source in sources], -1), tail, weight)
        return torch.cat([(n + 1) * part for n, part in enumerate(y.chunk(len(sources), -1))], -1)

    return fast, formula


def gated_norm(y: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    return F.rms_norm(y, y.shape[-1:], weight, fused.EPS).transpose(1, 2).flatten(2) * F.silu(gate)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return fused.rms_norm(x, weight, 0.1)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "convolution": (convolve, convolution, ((2, 7, 3), (2, 3, 3), (4, 3))),
    "convolution, shorter than its window": (convolve, convolution, ((2, 2, 3), (2, 3, 3), (4, 3))),
    "parts of a convolution": (*parts(0, 1, 2), ((2, 7, 9), (2, 3, 9), (4, 9))),
    "parts that read the same": (*parts(0, 1, 1), ((2, 7, 6), (2, 3, 9), (4, 9))),
    "parts that read the same, short": (*parts(1, 0, 1), ((2, 2, 6), (2, 3, 9), (4, 9))),
    "heads": (fused.unit_heads, lambda x: l2_norm(x).transpose(1, 2), ((2, 5, 3, 4),)),
    "gated norm": (fused.gated_norm, gated_norm, ((2, 3, 5, 4), (4,), (2, 5, 12))),
    "RMSNorm": (rms_norm, lambda x, weight: F.rms_norm(x, weight.shape, weight, 0.1), ((2, 3, 4), (4,))),
}


@pytest.fixture(params=["in C", "framework"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways, where there are two."""
    if request.param == "framework":
        with native.without():
            yield
    else:
        if not native.status().startswith("on"):
            pytest.skip(f"the C code is not used here: {native.status()}")
        yield


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("case", [case for case in CASES if case != "heads"])
def test_one_gradient_alone_is_as_among_all(case: str) -> None:
    torch.manual_seed(0)
    fast, _, shapes = CASES[case]
    inputs = tuple(normal(*shape) for shape in shapes)
    y = fast(*(x * 1 for x in inputs)).square().sum()
    for x, of_x in zip(inputs, torch.autograd.grad(y, inputs, retain_graph=True), strict=True):
        (alone,) = torch.autograd.grad(y, [x], retain_graph=True)
        assert torch.equal(alone, of_x)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_formula(case: str) -> None:
    torch.manual_seed(0)
    fast, formula, shapes = CASES[case]
    inputs = tuple(normal(*shape) for shape in shapes)
    torch.testing.assert_close(fast(*inputs), formula(*inputs))
    assert torch.autograd.gradcheck(fast, inputs)
    assert torch.autograd.gradgradcheck(fast, inputs)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("time", [fused.BLOCK, fused.BLOCK + 1, 2 * fused.BLOCK + 17])
def test_convolution_goes_on_over_its_blocks(time: int) -> None:
    torch.manual_seed(0)
    inputs = normal(2, time, 3), normal(2, 3, 3), normal(4, 3)
    grad = torch.randn(2, time, 3, dtype=torch.float64)
    found, expected = (torch.autograd.grad(f(*inputs), inputs, grad) for f in (convolve, convolution))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("time", [1, 64, 65, 147])
def test_norms_go_on_over_their_blocks_and_threads(time: int) -> None:
    """In single precision, rows of no whole registers; heads of a tensor that holds more than them."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    wide = torch.randn(2, time, 100, requires_grad=True)
    y, weight = torch.randn(2, 3, time, 21, requires_grad=True), torch.rand(21, requires_grad=True)
    gate = torch.randn(2, time, 63, requires_grad=True)

    def heads(way: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda x: way(x[..., 7:91].unflatten(-1, (4, -1)))

    for fast, formula, inputs in (
        (heads(fused.unit_heads), heads(lambda x: l2_norm(x).transpose(1, 2)), (wide,)),
        (fused.gated_norm, gated_norm, (y, weight, gate)),
        (rms_norm, lambda x, weight: F.rms_norm(x, weight.shape, weight, 0.1), (y, weight)),
    ):
        try:
            torch.set_num_threads(3)
            found = fast(*inputs)
            grad = torch.randn_like(found)
            grads = torch.autograd.grad(found, inputs, grad)
        finally:
            torch.set_num_threads(threads)
        expected = formula(*inputs)
        torch.testing.assert_close(found, expected)
        for a, b in zip(grads, torch.autograd.grad(expected, inputs, grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_wide_convolutions_by_threads_and_in_single_precision() -> None:
    """More channels than the C code takes at a time, one lane over several threads."""
    torch.manual_seed(0)
    x, tail, weight = (torch.randn(*shape, requires_grad=True) for shape in ((1, 9, 1100), (1, 3, 1100), (4, 1100)))
    grad = torch.randn(1, 9, 1100)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        y = convolve(x, tail, weight)
        found = torch.autograd.grad(y, (x, tail, weight), grad)
    finally:
        torch.set_num_threads(threads)
    expected = convolution(x, tail, weight)
    torch.testing.assert_close(y, expected)
    for a, b in zip(found, torch.autograd.grad(expected, (x, tail, weight), grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("way")
def test_a_part_that_nobody_reads_gets_no_gradient() -> None:
    x, tail, weight = (normal(*shape).requires_grad_() for shape in ((2, 150, 6), (2, 3, 9), (4, 9)))
    for unread in range(3):
        found, expected = [], []
        for made, outputs in (
            (fused.convolve(x, tail, weight, (0, 1, 1)), found),
            (convolution(torch.cat([x, x[..., 3:]], -1), tail, weight).chunk(3, -1), expected),
        ):
            loss = sum(y.square().sum() for n, y in enumerate(made) if n != unread)
            outputs.extend(torch.autograd.grad(loss, (x, tail, weight)))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", ["in C"], indirect=True)
@pytest.mark.usefixtures("way")
def test_the_gradient_of_heads_lies_as_they_do() -> None:
    """So that nothing is moved on the way back."""
    wide = normal(2, 5, 12).requires_grad_()
    heads = wide.view(2, 5, 3, 4)
    heads.register_hook(lambda grad: seen.append(grad.is_contiguous()))
    seen: list[bool] = []
    fused.unit_heads(heads).square().sum().backward()
    assert seen == [True]


def test_under_transforms_the_framework_does_it_all() -> None:
    """Who looks at every operation sees tensors that have no memory of their own, or must not."""
    torch.manual_seed(0)
    x, weight = normal(2, 5, 4), normal(4)
    mlp = SwiGLU(4, 6).double()
    parameters = {name: p.detach() for name, p in mlp.named_parameters()}
    for function, given in (
        (lambda u: rms_norm(x, u).square().sum(), weight.detach()),
        (lambda u: torch.func.functional_call(mlp, u, (x,)).square().sum(), parameters),
    ):
        found = torch.func.grad(function)(given)
        leaves = [u.clone().requires_grad_() for u in (given.values() if isinstance(given, dict) else [given])]
        again = dict(zip(given, leaves, strict=True)) if isinstance(given, dict) else leaves[0]
        wanted = torch.autograd.grad(function(again), leaves)
        for a, b in zip(found.values() if isinstance(found, dict) else [found], wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    mode = FakeTensorMode()
    shadows = mode.from_tensor(x.detach()), mode.from_tensor(weight.detach())
    with mode:
        y = rms_norm(*shadows)
        assert isinstance(y, FakeTensor)
        assert y.shape == x.shape
