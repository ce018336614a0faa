"""The projection of queries onto the keys that a memory was trained on (TNT, §4.1.2, eq. 7; recurrence as in its appendix C).

    P_t = P_{t−1} + k_tᵀk_t/‖k_t‖²      P restarts from 0 before the first token of a shard;  read input q_t P_t

A memory is trained at keys and asked at queries. q P is the part of the query in the span of the shard's keys; exactly so only
where these are orthonormal, as P sums projectors and grows with the shard (its trace is the number of tokens). Normalizing what
comes out keeps the read input at the keys' own norm.

In chunks (derived), with rows Q, K of unit norm and the P_0 that stood before them, no P per token is made:

    Q̃ = Q P_0 + tril(Q Kᵀ) K,      P = P_0 + KᵀK
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.memory.inputs import surely
from nestling.memory.norm import l2_norm

Projecting = Literal["normalized", "literal", "none"]
"""What a local memory is asked with: q P of unit norm (ours), q P as it is (eq. 7), or q itself."""

TILE = 64  # tokens per product


def finite(q: Tensor) -> tuple[Tensor, Tensor | None]:
    """Queries to be projected, 0 for those that are not finite, and which are, `[…, 1]`; None: all.

    A query that is not finite has no answer, and its row of zeros keeps it out of the gradients of all keys.
    """
    fine = q.detach().isfinite().all(-1, keepdim=True)
    return (q, None) if surely(fine) else (torch.where(fine, q, 0.0), fine)


def answered(read: Tensor, fine: Tensor | None) -> Tensor:
    """What the memory is asked with, NaN where the query is not finite."""
    return read if fine is None else torch.where(fine, read, torch.nan)


def step(p: Tensor, k: Tensor, fresh: Tensor, alive: Tensor) -> Tensor:
    """P after one token, straight from the recurrence.

    p `[lane, head, dim, dim]`, k `[lane, head, dim]`, fresh, alive bool `[lane]`: a shard begins here, the token counts
    """
    per_lane = (-1, 1, 1, 1)
    norm = l2_norm(k)
    p = torch.where(fresh.to(p.device).view(per_lane), 0.0, p)
    return p + torch.where(alive.to(p.device).view(per_lane), norm.unsqueeze(-1) * norm.unsqueeze(-2), 0.0)


def project(p: Tensor, q: Tensor, k: Tensor, fresh: Tensor | None, alive: Tensor | None) -> tuple[Tensor, Tensor]:
    """q_t P_t of every token `[lane, head, time, dim]` in chunk form, and the last P `[lane, head, dim, dim]`.

    p       before the first token
    fresh   bool `[lane, time]`: P restarts before this token;  None: nowhere
    alive   bool `[lane, time]`: tokens that count;  None: all
    """
    time = q.shape[2]
    k = l2_norm(k)
    if alive is not None:
        k = torch.where(alive.to(k.device)[:, None, :, None], k, 0.0)
    size = min(TILE, time)
    missing = -time % size
    if missing:
        q, k = (F.pad(x, (0, 0, 0, missing)) for x in (q, k))
    q, k = (torch.unflatten(x, 2, (-1, size)) for x in (q, k))  # [lane, head, tile, place, dim]
    score = (q @ k.mT).tril()
    begun = None
    if fresh is not None:
        marks = torch.unflatten(F.pad(fresh.to(p.device), (0, missing)), 1, (-1, size))
        begun = marks.cumsum(-1)  # [lane, tile, place]
        same = begun.unsqueeze(-1) == begun.unsqueeze(-2)
        score = score.masked_fill(~same.unsqueeze(1), 0.0)
    y = score @ k
    if begun is not None:
        last = (begun == begun[..., -1:])[:, None, ..., None]
        k, kept = torch.where(last, k, 0.0), (begun[..., -1] == 0)[:, None, :, None, None]
    before = []
    for n, new in enumerate((k.mT @ k).unbind(2)):
        before.append(p)
        p = new + (p if begun is None else torch.where(kept[:, :, n], p, 0.0))
    carried = q @ torch.stack(before, 2)
    if begun is not None:
        carried = torch.where((begun == 0)[:, None, ..., None], carried, 0.0)
    return (carried + y).flatten(2, 3)[:, :, :time], p
