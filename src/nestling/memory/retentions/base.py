"""What every retention answers.

The state is the *dual* variable Z; the weights are link(Z). In the dual every rule of the linear family stays linear,
Z_t = α_t Z_{t−1} + S_t, and the gradient is taken with respect to the weights (Miras, eq. 21 and 27; mirror descent).
For most retentions the link is the identity and Z = W.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from nestling.memory.state import Weights


@runtime_checkable
class Retention(Protocol):
    """A retention that leaves all as it is here is a decay of the weights themselves."""

    @property
    def decays(self) -> bool:
        """Whether it reads `gates.retention`. Default: it does."""
        return True

    @property
    def linear(self) -> bool:
        """Whether link is the identity. Default: where a class has no `link` of its own."""
        return type(self).link is Retention.link

    @property
    def largest_step(self) -> float:
        """Share of a layer's usual largest step at which its map still serves. Default: 1."""
        return 1.0

    def link(self, dual: Tensor) -> Tensor:
        """Weights of the dual variable, both `[…, in, out]`. Default: the identity."""
        return dual

    def dual(self, initial: Tensor) -> Tensor:
        """Initial dual variable from a network's initial weights `[head, in, out]`. Default: these."""
        return initial


class Scaled(Retention):
    """A retention whose link is a number per weight matrix, W = scale(Z) Z, taken at the anchor for the whole chunk.

    The chunk's last token reads at the scale of the new anchor, so that chunk 1 is W_t = link(Z_t). Weights inside a chunk are
    then linear in the dual, and cost about what they cost without a link.
    """

    @abstractmethod
    def scale(self, dual: Tensor) -> Tensor:
        """`[…, 1, 1]`."""

    def link(self, dual: Tensor) -> Tensor:
        return self.scale(dual) * dual


class Settled(Retention):
    """A retention that maps the weights themselves at the end of every chunk; inside, they are linear as without it.

    The chunk's last token reads what has been mapped, so that chunk 1 is a map at every token.
    """

    @abstractmethod
    def settle(self, weights: Tensor, anchor: Tensor) -> Tensor:
        """Weights after a chunk, from those of the linear recurrence and those at its start, all `[…, in, out]`."""


class Lagged(Settled):
    """One that has a map of its own for the first token of every chunk as well, and a new anchor behind it."""

    @abstractmethod
    def first(self, step: Tensor, anchor: Tensor, share: Tensor) -> Tensor:
        """Weights after that token, from its step in the linear recurrence, the weights before it `[…, in, out]` and what is kept
        of these `[…, 1, 1]`."""


def settled(
    retention: Retention,
    at: Tensor,
    weights: Weights,
    anchor: Weights,
    first: Tensor | None = None,
    share: Tensor | None = None,
) -> Weights:
    """Weights after a token, mapped in the lanes whose chunk it closes (`at`, bool `[lane]`).

    first   lanes of which it is a chunk's first token;  None: a retention that asks for none
    share   what that token keeps `[…, 1]`;  None: all
    """
    if isinstance(retention, Lagged) and first is not None and _any(first):
        kept = weights[0].new_ones(()) if share is None else share.unsqueeze(-1)
        weights = _where(
            first, [retention.first(w - kept * a, a, kept) for w, a in zip(weights, anchor, strict=True)], weights
        )
    if isinstance(retention, Settled) and _any(at):
        weights = _where(at, [retention.settle(w, a) for w, a in zip(weights, anchor, strict=True)], weights)
    return weights


def _any(lanes: Tensor) -> bool:
    return torch.compiler.is_compiling() or bool(lanes.any())


def _where(lanes: Tensor, new: Sequence[Tensor], old: Weights) -> Weights:
    return tuple(
        torch.where(lanes.to(b.device).view(-1, *[1] * (b.dim() - 1)), a, b) for a, b in zip(new, old, strict=True)
    )


def per_channel(retention: Retention) -> bool:
    """Whether `gates.retention` has one share per channel of the key."""
    return bool(getattr(retention, "per_channel", False))


def toward_initial(retention: Retention) -> bool:
    """Whether what is not kept goes back to the initial weights instead of 0."""
    return bool(getattr(retention, "toward_initial", False))


def linked(retention: Retention, dual: Tensor, anchor: Tensor) -> Tensor:
    """Weights of a token whose chunk has this (dual) anchor."""
    return retention.scale(anchor) * dual if isinstance(retention, Scaled) else retention.link(dual)
