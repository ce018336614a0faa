"""The projection of queries onto the keys that a memory was trained on (TNT, §4.1.2, eq. 7; recurrence as in its appendix C).

    P_t = P_{t−1} + k_tᵀk_t/‖k_t‖²      P restarts from 0 before the first token of a shard;  read input q_t P_t

A memory is trained at keys and asked at queries. q P is the part of the query in the span of the shard's keys; exactly so only
where these are orthonormal, as P sums projectors and grows with the shard (its trace is the number of tokens). Normalizing what
comes out keeps the read input at the keys' own norm.

So P is itself a memory of the shard (derived): linear attention whose values are its keys, each written with the step 1/‖k‖².
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nestling.memory.biases import DotProduct
from nestling.memory.gates import Gates
from nestling.memory.inputs import surely
from nestling.memory.norm import EPS, l2_norm
from nestling.memory.spec import MemorySpec
from nestling.memory.state import MemoryState

Projecting = Literal["normalized", "literal", "none"]
"""What a local memory is asked with: q P of unit norm (ours), q P as it is (eq. 7), or q itself."""


def finite(q: Tensor) -> tuple[Tensor, Tensor | None]:
    """Queries to be projected, 0 for those that are not finite, and which are, `[…, 1]`; None: all.

    A query that is not finite has no answer, and its row of zeros keeps it out of the gradients of all keys.
    """
    fine = q.detach().isfinite().all(-1, keepdim=True)
    return (q, None) if surely(fine) else (torch.where(fine, q, 0.0), fine)


def answered(read: Tensor, fine: Tensor | None) -> Tensor:
    """What the memory is asked with, NaN where the query is not finite."""
    return read if fine is None else torch.where(fine, read, torch.nan)


def step(p: Tensor, k: Tensor, fresh: Tensor | None, alive: Tensor | None) -> Tensor:
    """P after one token, straight from the recurrence.

    p `[lane, head, dim, dim]`, k `[lane, head, dim]`, fresh, alive bool `[lane]`: a shard begins here (None: in no lane), the
    token counts (None: in all)
    """
    per_lane = (-1, 1, 1, 1)
    norm = l2_norm(k)
    if fresh is not None:
        p = torch.where(fresh.to(p.device).view(per_lane), 0.0, p)
    more = norm.unsqueeze(-1) * norm.unsqueeze(-2)
    return p + (more if alive is None else torch.where(alive.to(p.device).view(per_lane), more, 0.0))


def memory(dim: int) -> MemorySpec:
    """P as a memory: its weights. What it reads are keys, the same as values, and `steps`; it is asked with the queries."""
    return MemorySpec(dim, dim, bias=DotProduct(), name="projection")


def steps(k: Tensor) -> Gates:
    """1/‖k‖², with the ε of the norm: no keys of unit norm are made, and none kept for the backward pass. As the square of 1/‖k‖,
    since the gradient of 1/‖k‖² has ‖k‖⁻⁴ in it, which is 0 for long keys."""
    return Gates(lr=(k.square().sum(-1) + EPS**2).rsqrt().square())


def state(p: Tensor) -> MemoryState:
    """The memory's state with this P, at no place in particular: it counts nothing."""
    return MemoryState.fresh((p,))
