"""What the outer loop sees of the levels' updates: the full gradient is the derivative of what the model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestling as nl

LEARNING = ["hope", "hope_attention", "hope_swa", "ttt_e2e"]
VOCAB = 31


def build(name: str, rate: float = 1.0, **settings: Any) -> nl.models.LanguageModel:
    """A tiny float64 model whose levels take large steps."""
    torch.manual_seed(0)
    model = nl.models.build(name, dim=16, vocab_size=VOCAB, ffn=16, **settings).double()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if path.endswith("rate"):
                weight.fill_(rate)
            elif weight.dim() == 2:
                weight.mul_(6)
    return model


def text(seed: int, time: int) -> Tensor:
    return torch.randint(VOCAB, (2, time), generator=torch.Generator().manual_seed(seed))


def loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize(
    ("name", "rate", "settings"),
    [
        *((name, 1.0, {}) for name in LEARNING),
        ("hope_swa", 1.0, {"rule": "momentum"}),
        ("hope_swa", 1.0, {"rule": "dgd"}),
        ("hope_swa", -3.0, {"rule": "adam"}),
        ("hope_swa", -3.0, {"rule": "m3"}),
        ("hope_swa", 1.0, {"rank": 2}),
        ("hope_swa", 1.0, {"rank": 5}),
        ("ttt_e2e", 1.0, {"rank": 2, "arrangement": "nested", "periods": [4, 8]}),
    ],
)
def test_the_full_gradient_is_the_derivative(name: str, rate: float, settings: dict[str, Any]) -> None:
    """Along a random direction of all slow weights, by central differences; what is of first order only is not it."""
    tokens = text(0, 17)
    generator = torch.Generator().manual_seed(1)
    model = build(name, rate, outer="full", **settings)
    parameters = list(model.parameters())
    way = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def along(outer: str) -> float:
        read = build(name, rate, outer=outer, **settings)
        loss(read(tokens)[0], tokens).backward()
        return float(sum((p.grad * w).sum() for p, w in zip(read.parameters(), way, strict=True)))

    @torch.no_grad()
    def moved(by: float) -> float:
        for p, w in zip(parameters, way, strict=True):
            p.add_(by * w)
        value = float(loss(model(tokens)[0], tokens))
        for p, w in zip(parameters, way, strict=True):
            p.sub_(by * w)
        return value

    step = 1e-6
    difference = (moved(step) - moved(-step)) / (2 * step)
    assert along("full") == pytest.approx(difference, rel=1e-4)
    assert along("first_order") != pytest.approx(difference, rel=0.002)


@pytest.mark.parametrize("outer", ["full", 2])
def test_splits_and_ragged_lanes_change_no_gradient(outer: str | int) -> None:
    tokens = text(2, 21)
    masks = {"reset": torch.zeros(2, 21, dtype=torch.bool), "valid": torch.ones(2, 21, dtype=torch.bool)}
    masks["reset"][1, 9], masks["valid"][0, 2:5] = True, False
    found = []
    for bounds in ([0, 21], [0, 3, 5, 14, 21]):
        model = build("hope_swa", outer=outer)
        state, parts = None, []
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):  # noqa: RUF007
            now = {n: m[:, first:last] for n, m in masks.items()}
            logits, state = model(tokens[:, first:last], state, **now)
            parts.append(logits)
        torch.cat(parts, 1)[masks["valid"]].square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-7, atol=1e-8 * float(whole.abs().max()))


@pytest.mark.parametrize("outer", ["full", 2])
def test_what_the_outer_loop_sees_changes_nothing_that_is_computed(outer: str | int) -> None:
    tokens = text(3, 19)
    expected, end = build("hope", arrangement="nested")(tokens)
    model = build("hope", arrangement="nested", outer=outer)
    logits, state = model(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(nl.state.leaves(state), nl.state.leaves(end), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            again, kept = model(tokens)
        assert torch.equal(again, logits.detach())
        assert not any(leaf.requires_grad for leaf in nl.state.leaves(kept))


def test_no_gradient_passes_the_end_of_a_truncated_stretch() -> None:
    """With n = 2 and one level of 4 tokens, tokens 9 to 12 read a constant; with n = 3 they do not."""

    def rate_gradient(outer: int, first: int, last: int) -> float:
        model, tokens = build("hope_swa", periods=[4], layers=1, outer=outer), text(4, 12)
        logits, _ = model(tokens)
        (found,) = torch.autograd.grad(logits[:, first:last].square().sum(), [model.continuum(0).levels_[0].rate])
        return float(found.abs().max())

    assert rate_gradient(2, 4, 8) > 0
    assert rate_gradient(2, 8, 12) == 0
    assert rate_gradient(3, 8, 12) > 0


def test_a_gradient_of_zero_has_a_finite_gradient() -> None:
    model, tokens = build("hope_swa", outer="full"), text(5, 9)
    with torch.no_grad():
        model.head.weight.zero_()  # all logits are equal, whatever the levels do
    logits, _ = model(tokens)
    loss(logits, tokens).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
