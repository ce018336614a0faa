"""W ← αW + …: L2 retention as a gate per head and token (Titans, eq. 13, where 1 − α is called α; Miras, §4), or per channel
of the key as well, W ← diag(α)W + … (GLA; Miras, Table 1)."""

from __future__ import annotations

from dataclasses import dataclass

from nestling.memory.retentions.base import Retention
from nestling.memory.settings import switches


@dataclass(frozen=True)
class Decay(Retention):
    """Keeps the share `gates.retention` (None: all) of the weights at every token.

    per_channel     the gate has one share per channel of the key, `[lane, head, time, key_dim]`; for memories of one layer
    toward_initial  what is let go returns to the initial weights, W ← αW + (1 − α)W_0 + …: the prior of the global retention
                    (Miras, §3.2) is W_0 in place of 0, so that forgetting is going back to what was learned slowly (derived)
    """

    per_channel: bool = False
    toward_initial: bool = False

    def __post_init__(self) -> None:
        switches(self, per_channel=self.per_channel, toward_initial=self.toward_initial)
        if self.per_channel and self.toward_initial:
            raise ValueError("Decay(per_channel=True, toward_initial=True): choose one of them")

    def __str__(self) -> str:
        channel = " of each channel" if self.per_channel else ""
        return f"decay{channel} to {'the initial weights' if self.toward_initial else 0}"
