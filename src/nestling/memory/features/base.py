"""What every feature map answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Features(Protocol):
    """φ, applied to keys and queries before the network. Its own parameters are slow weights and stand behind w0's others.

    The first key_dim features are the key itself, up to a factor: what a residual network passes on.
    """

    @abstractmethod
    def width(self, key_dim: int) -> int:
        """Number of features of a key: the network's input dimension."""
        ...

    def shapes(self, key_dim: int) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each of its own parameters. Default: it has none."""
        return ()

    def init(self, key_dim: int, heads: int, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        """Initial parameters, each `[head, rows, columns]`."""
        return ()

    @abstractmethod
    def apply(self, x: Tensor, own: Sequence[Tensor]) -> Tensor:
        """φ(x): `[…, head, time, key_dim]` in at least float32 → `[…, head, time, width]`, with the parameters `own`."""
        ...
