"""Newton–Schulz of many matrices at once, wherever they live: the output map of Muon, M3 and deep momentum.

The iteration itself is `nestling.memory.newton_schulz`, the same that memories use inside. Matrices of one shape go through it
together; a sharded matrix is gathered, as orthogonality is a property of the whole, and dealt out again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nestling.memory.newton_schulz import newton_schulz
from nestling.optim.base import rows, sharded

QUINTIC = (3.4445, -4.7750, 2.0315)
ADJUSTMENTS = ("original", "match_rms_adamw", "none")


def orthogonalized(
    matrices: Sequence[Tensor],
    steps: int,
    coefficients: tuple[float, float, float] = QUINTIC,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    parts: int = 1,
) -> list[Tensor]:
    """NS of every tensor, as the matrix `[out, in]` it acts as; the same shapes back.

    parts: matrices of equal height that each of them is made of, for which NS is taken apart.

    dtype: of the iterations; None: bfloat16 on an accelerator, where it is fast, at least float32 on a CPU.
    """
    whole: list[Tensor] = [x.full_tensor() if sharded(x) else x for x in matrices]  # type: ignore[attr-defined]
    by_shape: dict[Any, list[int]] = {}
    for place, x in enumerate(whole):
        by_shape.setdefault((rows(x).shape, x.device, x.dtype), []).append(place)
    made: list[Tensor] = list(whole)
    for (_, device, kind), places in by_shape.items():
        inside = dtype
        if inside is None and device.type != "cpu" and kind != torch.float64:
            inside = torch.bfloat16
        stack = torch.cat([rows(whole[place]).reshape(parts, -1, rows(whole[place]).shape[1]) for place in places])
        found = newton_schulz(stack, steps, iteration=coefficients, eps=eps, dtype=inside)
        for place, y in zip(places, torch.split(found, parts), strict=True):
            made[place] = y.reshape(whole[place].shape)
    return [_dealt(y, x) if sharded(x) else y for x, y in zip(matrices, made, strict=True)]


def _dealt(y: Tensor, like: Any) -> Tensor:
    """A whole matrix as shards like others."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(y, like.device_mesh, like.placements)


def adjustment(kind: str | None, p: Tensor, parts: int = 1) -> float:
    """Factor of NS(m) for a matrix `[m, n]`, whose entries are about 1/√max(m, n) (derived).

    "original" (None): √max(1, m/n), as Muon's author has it;  "match_rms_adamw": 0.2 √max(m, n), the size of AdamW's steps;
    "none": 1. Raises ValueError for another. parts: matrices of equal height that p is made of.
    """
    m, n = p.shape[0] // parts, p.shape[1:].numel()
    if kind in (None, "original"):
        return float(max(1.0, m / max(n, 1)) ** 0.5)
    if kind == "match_rms_adamw":
        return float(0.2 * max(m, n) ** 0.5)
    if kind == "none":
        return 1.0
    raise ValueError(f"adjust_lr_fn is {kind!r}; expected one of: {', '.join(ADJUSTMENTS)}")
