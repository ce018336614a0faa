"""Bookkeeping that convolution and attention share: which earlier tokens a token may see, given resets and invalid tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Places of a call's tokens in the lane's own stream, `[lane, time]` int64.

    rank     number of valid tokens of the call before this one
    start    rank of the first token since the last reset, −1 where there was none in the call
    total    valid tokens in the call, `[lane]`
    last     start of the call's last token, `[lane]`
    """

    rank: Tensor
    start: Tensor
    total: Tensor
    last: Tensor


def places(reset: Tensor | None, valid: Tensor | None, lanes: int, time: int, device: torch.device) -> Places:
    """See `Places`. A reset at an invalid token is ignored."""
    if valid is None:
        valid = torch.ones(lanes, time, dtype=torch.bool, device=device)
    valid = valid.to(device)
    rank = valid.cumsum(1) - valid.long()
    fresh = torch.zeros_like(valid) if reset is None else reset.to(device) & valid
    start = torch.where(fresh, rank, -1).cummax(1).values
    return Places(rank, start, valid.sum(1), start[:, -1])


def advance_position(position: Tensor, at: Places) -> Tensor:
    """Position per lane (CPU) after the call."""
    total, last = at.total.cpu(), at.last.cpu()
    return torch.where(last >= 0, total - last, position + total)
