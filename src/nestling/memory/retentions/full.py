"""W ← W + …: nothing is let go (linear attention, DeltaNet, TTT)."""

from __future__ import annotations

from dataclasses import dataclass

from nestling.memory.retentions.base import Retention


@dataclass(frozen=True)
class Full(Retention):
    """Keeps everything; reads no gate."""

    def __str__(self) -> str:
        return "keeps all"

    @property
    def decays(self) -> bool:
        return False
