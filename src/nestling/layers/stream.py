"""Bookkeeping that convolution, memory and attention share: which earlier tokens a token may see, given resets and invalid
tokens, and those that are refused as they are not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from nestling import state as fast
from nestling.memory.inputs import small

S = TypeVar("S", bound=Any)


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


class Kept(NamedTuple):
    """What a layer keeps of a call's tokens, the token guard's way: one that is not finite is as if it were not valid.

    rows     what was given, 0 at such tokens
    reset, valid  without them: a reset there goes to the lane's next token
    lost     bool `[lane, time]`: these tokens, which are answered with NaN;  None: there is none
    emptied  bool `[lane]`: lanes that end with such a reset and no token behind it
    """

    rows: tuple[Tensor, ...]
    reset: Tensor | None
    valid: Tensor | None
    lost: Tensor | None
    emptied: Tensor | None

    def answered(self, y: Tensor) -> Tensor:
        """Answers `[lane, time, dim]`, NaN at the tokens that are lost."""
        return y if self.lost is None else torch.where(self.lost.unsqueeze(-1), torch.nan, y)

    def ended(self, state: S, start: Callable[[int], S], count: str = "faults") -> S:
        """The state after the call, whose field `count` counts those tokens."""
        if self.lost is not None:
            state = state._replace(**{count: getattr(state, count) + self.lost.sum(1)})
        if self.emptied is not None and bool(self.emptied.any()):
            state = fast.where(self.emptied, start(len(self.emptied)), state, keep=("faults", count))
        return state


def kept(rows: tuple[Tensor, ...], reset: Tensor | None, valid: Tensor | None) -> Kept:
    """See `Kept`; rows `[lane, time, …]`, whose squares must be finite, as products with them then are. A compiled call
    does not look: zeros stand for those tokens in its cache."""
    if small(rows):
        return Kept(rows, reset, valid, None, None)
    fine = _fine(rows)
    if not torch.compiler.is_compiling() and not bool((~fine).any()):
        return Kept(rows, reset, valid, None, None)
    rows = tuple(torch.where(fine.view(*fine.shape, *[1] * (x.dim() - 2)), x, 0.0) for x in rows)
    lost = ~fine if valid is None else ~fine & valid.to(fine.device)
    if torch.compiler.is_compiling():
        return Kept(rows, reset, valid, lost, None)
    acts = fine if valid is None else fine & valid.to(fine.device)
    if reset is None:
        return Kept(rows, None, acts, lost, None)
    fresh = reset.to(fine.device) & (acts | lost)
    number = torch.arange(fine.shape[1], device=fine.device)
    begun = torch.where(fresh, number, -1).cummax(1).values  # the last reset so far, and the last token that counts
    read = torch.where(acts, number, -1).cummax(1).values
    before = torch.nn.functional.pad(read[:, :-1], (1, 0), value=-1)
    return Kept(rows, acts & (begun > before), acts, lost, begun[:, -1] > read[:, -1])


def kept_of(
    make: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, reset: Tensor | None, valid: Tensor | None
) -> Kept:
    """`kept` of the rows that are made of x `[lane, time, dim]`, each of its own token. Where they are to be differentiated they
    are made once more if tokens are left out, without these: 0 times what is not finite would reach the weights' gradients."""
    rows = make(x)
    own = kept(rows, reset, valid)
    if own.lost is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return own
    return own._replace(rows=make(torch.where(_fine(rows)[..., None], x, 0.0)))


def kept_around(x: Tensor, reset: Tensor | None, valid: Tensor | None) -> Kept:
    """`kept` for what hands x `[lane, time, dim]` on to layers; a compiled call leaves it to these."""
    return Kept((x,), reset, valid, None, None) if torch.compiler.is_compiling() else kept((x,), reset, valid)


def _fine(rows: tuple[Tensor, ...]) -> Tensor:
    """Tokens, bool `[lane, time]`, all of whose rows are finite, and their squares."""
    sizes = (
        torch.linalg.vector_norm(x.detach().flatten(2), dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
        for x in rows
    )
    return torch.stack([size.square().isfinite() for size in sizes]).all(0)
