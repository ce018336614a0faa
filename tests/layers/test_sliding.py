"""Sliding-window attention against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestling.layers import Attention, SlidingAttention
from nestling.layers.rotary import rotate


def turned(u: Tensor, position: int) -> Tensor:
    """u `[head, 4]` rotated to a position."""
    angle = position * 10_000.0 ** (-torch.arange(2).double() / 2)
    z = torch.complex(u[:, :2], u[:, 2:]) * torch.polar(torch.ones(2).double(), angle)
    return torch.cat([z.real, z.imag], -1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("window", [1, 3, 5, 40])
def test_every_token_sees_the_last_tokens_of_its_segment_and_the_prefix(
    window: int, prefixed: bool, masked: bool
) -> None:
    torch.manual_seed(window)
    layer = SlidingAttention(8, 2, window).double()
    x = torch.randn(3, 23, 8, dtype=torch.float64)
    prefix = torch.randn(1, 2, 8, dtype=torch.float64) if prefixed else None
    generator = torch.Generator().manual_seed(7)
    reset, valid = torch.rand(3, 23, generator=generator) < 0.1, torch.rand(3, 23, generator=generator) < 0.8
    if not masked:
        reset, valid = torch.zeros_like(reset), torch.ones_like(valid)
    state = None
    for first, last in ((0, 2), (2, 17), (17, 23)):
        y, state = layer(x[:, first:last], state, prefix=prefix, reset=reset[:, first:last], valid=valid[:, first:last])
        if first == 0:
            parts = [y]
        else:
            parts.append(y)
    got = torch.cat(parts, 1)
    q, k, v = layer.qkv(x).view(3, 23, 3, 2, 4).unbind(2)
    fixed = [] if prefix is None else list(zip(*layer.qkv(prefix).view(2, 3, 2, 4).unbind(1)[1:], strict=True))
    for lane in range(3):
        past: list[int] = []
        for t in range(23):
            if not valid[lane, t]:
                continue
            past = [t] if reset[lane, t] else [*past, t]
            place = len(past) - 1
            pairs = [(turned(key, n - len(fixed)), value) for n, (key, value) in enumerate(fixed)]
            pairs += [(turned(k[lane, s], past.index(s)), v[lane, s]) for s in past[-window:]]
            asked = turned(q[lane, t], place)
            weights = torch.stack([(asked * key).sum(-1) for key, _ in pairs]).div(2).softmax(0)
            mixed = (weights[..., None] * torch.stack([value for _, value in pairs])).sum(0)
            torch.testing.assert_close(got[lane, t], layer.out(mixed.flatten()))
        kept = [k[lane, s] for s in past[-window:]] if window > 1 else []
        assert state.key.shape == (3, window - 1, 2, 4)
        assert state.position[lane] == len(past)
        filled = state.key[lane].abs().sum((1, 2)) > 0
        assert filled.sum() == min(len(past), window - 1) <= max(len(kept), 1)


@torch.no_grad()
def test_a_window_as_long_as_the_text_is_attention() -> None:
    torch.manual_seed(0)
    full, sliding = Attention(8, 2).double(), SlidingAttention(8, 2, 30).double()
    sliding.load_state_dict(full.state_dict())
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    torch.testing.assert_close(sliding(x)[0], full(x)[0])


@torch.no_grad()
@pytest.mark.parametrize("behind", [0, 30, 90])
def test_long_calls_in_fine_blocks_are_the_band(behind: int) -> None:
    torch.manual_seed(1)
    layer = SlidingAttention(8, 2, 80).double()
    x = torch.randn(1, 300, 8, dtype=torch.float64)
    _, state = layer(x[:, :behind])
    y, _ = layer(x[:, behind:], state)
    q, k, v = layer.qkv(x).view(1, 300, 3, 2, 4).unbind(2)
    q, k = (rotate(u, torch.arange(300)[None], layer.base).transpose(1, 2) for u in (q, k))
    t, s = torch.arange(300)[:, None], torch.arange(300)
    mask = (s <= t) & (s > t - 80)
    dense = (q @ k.mT / 2).masked_fill(~mask, -torch.inf).softmax(-1) @ v.transpose(1, 2)
    torch.testing.assert_close(y, layer.out(dense.transpose(1, 2).flatten(2))[:, behind:])


def test_no_lanes_at_all() -> None:
    layer = SlidingAttention(8, 2, 4)
    y, state = layer(torch.zeros(0, 40, 8))
    assert y.shape == (0, 40, 8)
    assert layer(torch.zeros(0, 1, 8), state)[0].shape == (0, 1, 8)


def test_the_state_keeps_nothing_of_the_call_alive() -> None:
    layer = SlidingAttention(8, 2, 4)
    _, state = layer(torch.randn(1, 500, 8))
    assert state.key.untyped_storage().nbytes() == state.key.nbytes


@pytest.mark.parametrize(
    ("make", "words"),
    [(lambda: SlidingAttention(10, 3, 4), "heads"), (lambda: SlidingAttention(8, 2, 0), "window is 0")],
)
def test_impossible_windows_are_refused_in_words(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
