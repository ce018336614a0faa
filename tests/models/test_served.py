"""The gradient of θ₀ that Δ carries through a call against that of every θ₀ + Δ by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling.models import served

VOCAB, DIM = 19, 8


def gradients(model: nl.models.LanguageModel, masks: dict[str, Tensor], masked: bool) -> list[Tensor]:
    """Of a loss on what two calls with one graph answer and on what they leave, by all that there is to learn."""
    model.zero_grad()
    tokens = torch.randint(VOCAB, (3, 23), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    start = model.start(3)
    leaves = [
        torch.randn(x.shape, generator=generator, dtype=x.dtype).mul_(0.1).requires_grad_()
        for x in nl.state.leaves(start.continuum[0].delta)
    ]
    given = iter(leaves)
    delta = nl.state.tree_map(lambda _: next(given), start.continuum[0].delta)
    state = start._replace(continuum=(start.continuum[0]._replace(delta=delta), *start.continuum[1:]))
    total = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 10), slice(10, 23)):
        chosen = {name: mask[:, part] for name, mask in masks.items()} if masked else {}
        logits, state = model(tokens[:, part], state, **chosen)
        total = total + (logits * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)).sum()
    for x in nl.state.leaves(tuple(c.delta for c in state.continuum)):
        total = total + (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum()
    total.backward()
    asked = [*model.parameters(), *leaves]
    return [torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in asked]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"arrangement": "independent", "periods": [2, 6, 4]},
        {"rule": "dgd"},
        {"rule": "adam"},
        {"rule": "m3"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_what_arrives_at_the_start_is_the_gradient_of_the_slow_weights(
    settings: dict[str, Any], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    settings = {"periods": [4, 8]} | settings
    model = nl.models.build(
        "hope_swa", dim=DIM, heads=2, layers=2, ffn=8, vocab_size=VOCAB, window=5, **settings
    ).double()
    generator = torch.Generator().manual_seed(2)
    masks = {
        "reset": torch.rand(3, 23, generator=generator) < 0.1,
        "valid": torch.rand(3, 23, generator=generator) < 0.8,
    }
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)
            if name.endswith("rate"):
                weight.fill_(0.5)
    assert all(served.carried(model, number) for number in model.learning)
    found = gradients(model, masks, masked)
    monkeypatch.setattr(served, "carried", lambda *_: False)
    wanted = gradients(model, masks, masked)
    assert all(w.any() for w in wanted)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-8, atol=1e-9 * float(w.abs().max()))


@pytest.mark.parametrize("settings", [{"outer": "full"}, {"rank": 1}, {"arrangement": "nested"}])
def test_where_an_update_is_more_every_sum_counts_by_itself(settings: dict[str, Any]) -> None:
    model = nl.models.build("hope_swa", dim=DIM, heads=2, layers=1, ffn=8, vocab_size=VOCAB, periods=[4, 8], **settings)
    assert not served.carried(model, 0)


@pytest.mark.parametrize("name", ["hope", "hope_attention", "hope_swa"])
@pytest.mark.parametrize("read", [1, 2, 5])
def test_a_state_of_another_mode_is_read_in_inference_mode(name: str, read: int) -> None:
    """A call that begins inside of a window looks up θ₀ + Δ in inference mode; the next window is differentiated."""
    torch.manual_seed(0)
    model = nl.models.build(name, "tiny", periods=[4, 8])
    tokens = torch.randint(257, (1, 24))
    with torch.no_grad():
        _, state = model(tokens[:, :read])
        for more in range(1, 24 - read):
            expected = model(tokens[:, read : read + more], state)
            with torch.inference_mode():
                found = model(tokens[:, read : read + more], state)
            for a, b in zip(nl.state.leaves(expected), nl.state.leaves(found), strict=True):
                assert torch.equal(a, b)
