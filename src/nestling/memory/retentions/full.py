"""W ← W + …: nothing is let go (linear attention, DeltaNet, TTT)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Full:
    """Keeps everything; reads no gate."""

    def __str__(self) -> str:
        return "keeps all"

    @property
    def decays(self) -> bool:
        return False

    @property
    def linear(self) -> bool:
        return True

    def link(self, dual: Tensor) -> Tensor:
        return dual

    def dual(self, initial: Tensor) -> Tensor:
        return initial
