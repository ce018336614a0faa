"""Which gradients a backward pass is asked for, and that the C code's passes answer these alone as they answer all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nestling as nl
from nestling.memory.wanted import wanted


class _Note(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, number: int, *inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack(inputs).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        seen.append(wanted(ctx))
        return None, *[grad] * (len(ctx.needs_input_grad) - 1)


seen: list[tuple[bool, ...]] = []


def test_what_is_wanted() -> None:
    leaf, weight, still = (torch.ones(2) for _ in range(3))
    leaf.requires_grad_()
    weight.requires_grad_()
    inner = leaf * 1
    for ask, expected in (
        (lambda y: y.backward(retain_graph=True), (False, True, False, True, True)),
        (lambda y: torch.autograd.grad(y, [inner], retain_graph=True), (False, True, False, False, False)),
        (lambda y: torch.autograd.grad(y, [weight], retain_graph=True), (False, False, False, True, False)),
        (lambda y: torch.autograd.grad(y, [leaf, weight], retain_graph=True), (False, True, False, True, True)),
    ):
        seen.clear()
        ask(_Note.apply(3, inner, still, weight, leaf * 2).sum())  # type: ignore[no-untyped-call]
        assert seen == [expected]


@pytest.mark.parametrize("name", ["titans", "self_modifying", "gla", "memora", "omeganet_plain"])
@pytest.mark.parametrize("time", [14, 2])
def test_some_gradients_are_those_of_all(name: str, time: int) -> None:
    """Asked for the tokens' gradients alone, or for the start's, of the answers alone or of the end alone."""
    plain = {"features": nl.memory.features.Identity(), "network": nl.memory.MLP()} if name == "omeganet_plain" else {}
    named = "omeganet" if plain else name
    spec = nl.memory.named(named, key_dim=4, value_dim=4, chunk=3, **plain)
    generator = torch.Generator().manual_seed(1)
    q, k, v, gates = spec.example(generator, lanes=2, heads=2, time=time)
    w0 = tuple(w.double().requires_grad_() for w in spec.init(2, generator))
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    gates = gates.map(lambda x: x.double())
    _, begun = nl.memory.scan(spec, w0, q, k, v, gates)  # ends inside a chunk, so that the next goes over its end
    y, state = nl.memory.scan(spec, w0, q * 1, k * 1, v * 1, gates, begun)
    ends = [x for x in nl.state.leaves(state) if x.requires_grad]
    given = [q, k, v, *w0]

    def found(of: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
        return list(torch.autograd.grad(of, inputs, retain_graph=True, allow_unused=True))

    of_end = sum(((n + 1) * x.square().sum() for n, x in enumerate(ends)), torch.zeros((), dtype=torch.float64))
    of_y = y.square().sum()
    both = found(of_y + of_end, given)
    for mine, first, second in zip(both, found(of_y, given), found(of_end, given), strict=True):
        parts = [x for x in (first, second) if x is not None]
        assert mine is not None
        assert torch.allclose(mine, torch.stack(parts).sum(0), rtol=1e-10, atol=1e-12)
    for mine, alone in zip(both, (found(of_y + of_end, [x])[0] for x in given), strict=True):
        assert alone is not None
        assert mine is not None
        assert torch.equal(mine, alone)
