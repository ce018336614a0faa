"""How many weights the C code keeps for its backward pass."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import nestling as nl
from nestling.memory import Matrix
from nestling.memory.native.lanes import Lanes, Stand
from nestling.memory.native.runs import Runs

from .test_native import NEEDS

FEW, ROOM, LESS = 4, 10, 22  # measured, see `lanes`: with others, training takes more than was promised, or more time


class Sizes(Lanes):
    """One that has a size, and no code."""

    def structure(self, *_: object) -> Any: ...
    def stores(self, *_: object) -> Any: ...


def kept(tiles: int, group: int) -> int:
    """Places that weights are kept at: before every group but the first."""
    return -(-tiles // group) - 1


def of_size(tiles: int, longest: int, shape: tuple[int, ...], momentum: bool, apart: bool) -> tuple[Lanes, Stand]:
    w = (torch.empty(shape, device="meta"),)
    cut = Runs(torch.empty(shape[0], tiles, 4, dtype=torch.int32, device="meta"), longest, True, True, False)
    lanes = Sizes("sizes", cut, None, lambda *_: pytest.fail("there is no other way"))
    return lanes, Stand(w, w * momentum, w * apart, ())


def test_what_is_kept_stays_in_proportion_to_the_answers_or_to_the_length_s_root() -> None:
    seen = set()
    for tiles, longest, (key, value), momentum, apart in product(
        (1, 2, 3, 4, 5, 7, 16, 33, 64, 128, 500, 512, 2000), (1, 8, 16, 64), ((64, 64), (16, 48)), (0, 1), (0, 1)
    ):
        lanes, stand = of_size(tiles, longest, (2, 3, key, value), bool(momentum), bool(apart))
        group, root, apiece = lanes.group(stand), lanes.cut.group, 6 * key * value * (1 + momentum + apart)
        answers = 6 * value * tiles * longest
        assert min(FEW, root) <= group <= root
        allowed = ROOM * answers - LESS * apiece
        if group < root:
            assert kept(tiles, group) * apiece <= max(0, allowed), "more than the answers allow"
        if group > min(FEW, root):
            assert kept(tiles, group - 1) * apiece > allowed, "shorter groups are allowed, too"
        seen.add("root" if group == root else "few" if group == FEW else "between")
    assert seen == {"root", "few", "between"}


@NEEDS
def test_that_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of short calls as the root of the length has it, of long ones as the answers allow, nothing where nothing is learned."""
    seen: list[tuple[int, int]] = []
    forward = Lanes.forward

    def noting(self: Lanes, given: Any, keep: bool) -> Any:
        outputs, made = forward(self, given, keep)
        seen.append((sum(x.numel() for x in made), outputs[0].numel()))
        return outputs, made

    monkeypatch.setattr(Lanes, "forward", noting)
    spec = nl.memory.named("titans", key_dim=64, chunk=4, network=Matrix())
    apiece = 2 * 2 * 64 * 64  # weights and momentum of two heads
    for tiles, places in ((3, 0), (64, 3), (96, 8), (256, 51)):
        w0 = [w.requires_grad_() for w in spec.init(2)]
        given = spec.example(torch.Generator().manual_seed(0), lanes=1, time=4 * tiles)
        spec.scan(w0, *given)
        with torch.no_grad():
            spec.scan(w0, *given)
        (learns, answers), (reads, _) = seen
        assert (learns, reads) == (places * apiece, 0)
        assert places <= 3 or learns <= ROOM * answers - LESS * apiece
        seen.clear()
