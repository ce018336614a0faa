"""The way back through the attention of a call's tokens over all that they see, from what its forward pass has kept:

    D = Σ_channels y ∘ ∂y,   P = exp(q Kᵀ/√d − L),   S = P ∘ (∂y Vᵀ − D)          L the logarithm of the softmax's sum
    ∂q = S K/√d,  ∂K = Sᵀ q/√d,  ∂V = Pᵀ ∂y

a tile of keys after the other. ∂K and ∂V are added to what is there, so that many calls share one sum, and from a given key on
only, as a window's own gradient asks for those of its own tokens alone.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nestling.native import DEFINES, library, threads

SOURCE = Path(__file__).parent / "attention_back.c"
TILE = 512
"""Keys that the framework's operations take at once, so that what they make of them stays in the cache."""


class Read(NamedTuple):
    """A call's forward pass.

    q      `[lane, head, time, dim]`
    pairs  keys and values, `[2, lane, head, visible + time, dim]`, the call's own last
    y, log what came out, like q, and L, `[lane, head, time]`
    window how many tokens each sees, its own included, at least `time`; None: all
    """

    q: Tensor
    pairs: Tensor
    y: Tensor
    log: Tensor
    window: int | None

    @property
    def visible(self) -> int:
        """Tokens before the call's own."""
        return self.pairs.shape[3] - self.q.shape[2]

    @property
    def edge(self) -> int:
        """Token m sees key n where n − m is not less."""
        return -self.q.shape[2] if self.window is None else self.visible + 1 - self.window


def attention_back(read: Read, grad: Tensor, sums: Tensor) -> Tensor:
    """∂q, like q, of grad, like y. sums `[2, lane, head, n, dim]`: ∂K and ∂V of the last n keys are added to; n is `time`, or all
    there are."""
    scale = read.q.shape[3] ** -0.5
    q, grad, log = (q.contiguous() for q in (read.q * scale, grad, read.log))
    mean = (grad * read.y).sum(-1)
    of_q = torch.zeros_like(q)
    if not _in_c(read, q, grad, log, mean, of_q, sums):
        _plainly(read, q, grad, log, mean, of_q, sums)
    return of_q.mul_(scale)


def _plainly(read: Read, q: Tensor, grad: Tensor, log: Tensor, mean: Tensor, of_q: Tensor, sums: Tensor) -> None:
    """q comes scaled, and of_q is to be."""
    visible, edge, time = read.visible, read.edge, q.shape[2]
    q, grad, of_q, log, mean = (u.flatten(0, 1) for u in (q, grad, of_q, log.unsqueeze(-1), mean.unsqueeze(-1)))
    begin = visible + time - sums.shape[3]
    for first in (*range(0, visible, TILE), visible):
        last = min(first + TILE, visible) if first < visible else first + time
        keys, values = (u.flatten(0, 1) for u in read.pairs[..., first:last, :])
        share = torch.baddbmm(log, q, keys.mT, beta=-1).clamp_(max=0.0).exp_()  # rounding aside it is
        if first == visible:
            share.tril_()
        elif first < edge + time - 1:
            share[..., : edge + time - 1 - first].triu_(edge - first)
        slope = torch.baddbmm(mean, grad, values.mT, beta=-1).mul_(share)
        of_q.baddbmm_(slope, keys)
        if first >= begin:
            of_keys, of_values = (u.flatten(0, 1) for u in sums[..., first - begin : last - begin, :])
            of_keys.baddbmm_(slope.mT, q)
            of_values.baddbmm_(share.mT, grad)


class _BackInC(ctypes.Structure):
    """`Back` of attention_back.c, field for field."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("parts", "time", "dim", "threads", "visible", "edge", "begin")),
        *((name, ctypes.c_ssize_t) for name in ("stride", "of_stride")),
        *((name, ctypes.c_void_p) for name in ("q", "grad", "log", "mean", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("of_q", "of_keys", "of_values")),
    ]


def _in_c(read: Read, q: Tensor, grad: Tensor, log: Tensor, mean: Tensor, of_q: Tensor, sums: Tensor) -> bool:
    """`_plainly` by the C code; False where it does not serve."""
    given = (q, grad, log, mean, of_q, read.pairs, sums)
    if any(type(u) is not Tensor or u.device.type != "cpu" or u.dtype != q.dtype for u in given) or not q.numel():
        return False
    code = library(SOURCE, q.dtype) if q.dtype in DEFINES else None
    if code is None or not all(_rows(u) for u in (read.pairs, sums)):
        return False
    lanes, heads, time, dim = q.shape
    begin = read.pairs.shape[3] - sums.shape[3]
    numbers = (lanes * heads, time, dim, threads(lanes * heads), read.visible, read.edge, begin)
    strides = (u.stride(2) for u in (read.pairs, sums))
    flat = (u.data_ptr() for u in (q, grad, log, mean, *read.pairs, of_q, *sums))
    failed: int = code.nestling_attention_back(ctypes.byref(_BackInC(*numbers, *strides, *flat)))
    return failed == 0


def _rows(pairs: Tensor) -> bool:
    """Whether heads follow each other in memory at one distance, lanes and all, and rows without a gap."""
    _, _, heads, _, dim = pairs.shape
    _, lane, head, row, channel = pairs.stride()
    return (row, channel) == (dim, 1) and lane == heads * head
