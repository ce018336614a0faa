"""The scan of the weight matrix that modifies itself by the C code: when it serves, what it is given (`self_referential.c`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.layout import layout
from nestling.memory.native import fields
from nestling.memory.native.call import Given
from nestling.memory.native.lanes import Ends, Lanes, Stand
from nestling.memory.native.runs import runs
from nestling.memory.native.scan import runs_here
from nestling.native import plain

SOURCE = Path(__file__).parent / "self_referential.c"
LINE = 16  # columns that the weights' are a multiple of there, with zeros behind them: rows then begin with a line of the cache
TILE = 16  # tokens at a time: more make longer products, and more pairs of tokens

Slow = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Scan(Lanes):
    """One scan. Its stream: x `[lane, head, time, width]`, after φ; its weights: `_lined`."""

    source = SOURCE
    entry = "nestling_self_referential"
    names = ("k",)

    def structure(self, streams: Given, stand: Stand) -> fields.Scan:
        (x,), (w,) = streams, stand.weights
        assert x is not None
        width = (fields.INT * (fields.DEPTH + 1))(*w.shape[-2:])
        return fields.Scan(cell=fields.Cell(network=fields.Network(depth=1, width=width)), time=x.shape[2])

    def stores(self, structure: fields.Scan) -> list[tuple[fields.Store, slice]]:
        return [(structure.store, slice(None))]

    def width(self, stand: Stand) -> int:
        return stand.weights[0].shape[-2]

    def like(self, name: str, x: Tensor, lanes: int) -> Tensor:
        return torch.empty_like(x)  # every token's gradient is written


def read(
    x: Tensor, live: Tensor, begins: Tensor | None, fresh: Tensor, w: Tensor, slow: Slow
) -> tuple[Tensor, Tensor] | None:
    """Answers and weights behind a call; None where the C code does not serve, or something is not finite.

    x `[lane, head, time, width]`, after φ; live, begins bool `[lane, time]`: tokens that write, that start from `fresh`
    slow   the same by the framework's operations, of x, fresh and w
    """
    if plain(x, live, fresh, w) or not runs_here(SOURCE, x) or x.numel() == 0 or x.shape[2] == 1:
        return None  # one token alone is read by few operations, which take less than what a call of the C code begins with
    (lanes, _, time, _), columns = x.shape, w.shape[-1]
    cut = runs(layout(torch.zeros(lanes, dtype=torch.int64), time, begins, None, period=TILE, tile=TILE, halo=0), time)
    assert cut is not None

    def again(streams: Given, at: Stand) -> Ends:
        (x,) = streams
        assert x is not None
        y, end = slow(x, at.start[0][..., :columns] if at.start else fresh, at.weights[0][..., :columns])
        return Ends(y, (_lined(end),), (), ())

    fine = None if bool(live.all()) else live.contiguous()
    one = Scan("self_referential", cut._replace(whole=True), fine, again)
    ends = one.scan((x,), Stand((_lined(w),), (), (), (_lined(fresh),) if cut.fresh else ()))
    return None if ends is None else (ends.y, ends.weights[0][..., :columns].contiguous())


def _lined(w: Tensor) -> Tensor:
    return F.pad(w, (0, -w.shape[-1] % LINE))
