"""W ← αW + …: L2 retention as a gate per head and token (Titans, eq. 13, where 1 − α is called α; Miras, §4), or per channel
of the key as well, W ← diag(α)W + … (GLA; Miras, Table 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Decay:
    """Keeps the share `gates.retention` (None: all) of the weights at every token.

    per_channel  the gate has one share per channel of the key, `[lane, head, time, key_dim]`; for memories of one layer
    """

    per_channel: bool = False

    @property
    def decays(self) -> bool:
        return True

    @property
    def linear(self) -> bool:
        return True

    def link(self, dual: Tensor) -> Tensor:
        return dual

    def dual(self, initial: Tensor) -> Tensor:
        return initial
