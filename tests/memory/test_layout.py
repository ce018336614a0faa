"""Masks that say little do not cost the even cut: the same answers as lane by lane, in as many tiles."""

from __future__ import annotations

import pytest
import torch

import nestling as nl
from nestling.memory.layout import layout


@pytest.mark.parametrize("lanes", [[True, True], [True, False], [False, False]])
def test_a_reset_at_the_start_keeps_lanes_in_step(lanes: list[bool]) -> None:
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[:, 0] = torch.tensor(lanes)
    cut = layout(torch.tensor([16, 32]), 40, reset, torch.ones_like(reset), period=16, tile=16, halo=0)
    assert cut.ok is not None  # 40 tokens are no whole number of tiles
    assert cut.tokens.shape == (2, 3, 16)
    cut = layout(torch.tensor([16, 32]), 32, reset[:, :32], None, period=16, tile=16, halo=0)
    assert cut.ok is None
    assert cut.position.tolist() == [32 if fresh else 32 + place for fresh, place in zip(lanes, (16, 32), strict=True)]
    assert cut.reset is None if not any(lanes) else cut.reset[0].tolist() == lanes and not cut.reset[1:].any()


def test_shifted_chunks_close_later_in_lanes_in_and_out_of_step() -> None:
    """A chunk's first token alone, then the others: borders at multiples of 4, and one token behind them."""
    for places in ([0, 4], [0, 2]):
        cut = layout(torch.tensor(places), 9, None, None, period=(4, 4), tile=4, halo=0, shifts=(0, 1))
        for lane, place in enumerate(places):
            filled = cut.ok[lane] if cut.ok is not None else torch.ones_like(cut.tokens[lane], dtype=torch.bool)
            lengths = [n for n in filled.sum(-1).tolist() if n]
            ends = [place + sum(lengths[: n + 1]) for n in range(len(lengths))]
            assert ends == [n for n in range(place + 1, place + 10) if n % 4 in (0, 1) or n == place + 9]
            for number, shift in enumerate((0, 1)):
                assert cut.borders[number, : len(ends), lane].tolist() == [(end - shift) % 4 == 0 for end in ends]
        assert cut.shared is None


@pytest.mark.parametrize("name", ["titans", "omeganet", "gated_deltanet"])
@pytest.mark.parametrize("lanes", [[True, True], [True, False], [False, False]])
def test_resets_at_the_start_equal_the_reference(name: str, lanes: list[bool]) -> None:
    spec = nl.memory.named(name, key_dim=4, chunk=4)
    w0 = [w.double() for w in spec.init(2, torch.Generator().manual_seed(0))]
    first = spec.example(torch.Generator().manual_seed(1), time=8, dtype=torch.float64)
    more = spec.example(torch.Generator().manual_seed(2), time=12, dtype=torch.float64)
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[:, 0] = torch.tensor(lanes)
    found = []
    for engine in ("chunked", "reference"):
        _, state = nl.memory.scan(spec, w0, *first, engine=engine)
        y, state = spec.scan(w0, *more, state, engine=engine, reset=reset, valid=torch.ones_like(reset))
        found.append((y, *state.weights, state.position))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
