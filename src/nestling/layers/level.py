"""A level of the nested system: one thing that learns, how often, from what (Nested Learning, §3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Unit = Literal["token", "step"]


@dataclass(frozen=True)
class Period:
    """Time between two updates: `n` tokens of a lane's stream or `n` outer steps. Tokens are faster than steps.

    n = 0 stands for frequency ∞: solved anew from all its data at every token (softmax attention).
    """

    n: int
    unit: Unit

    def key(self) -> tuple[int, int]:
        """Sorts fast before slow."""
        return (0 if self.unit == "token" else 1, self.n)

    @property
    def frequency(self) -> float:
        """Updates per token or step: 1/n, ∞ for n = 0."""
        return 1 / self.n if self.n else float("inf")

    @property
    def often(self) -> str:
        """Its frequency in words: updates per token, or per step of the optimizer."""
        if self.n == 0:
            return "∞"
        return f"{'1' if self.n == 1 else f'1/{self.n}'} per {self.unit}"

    @property
    def every(self) -> str:
        """When, in words."""
        return str(self) if self.n == 0 else f"every {self}"

    def __str__(self) -> str:
        if self.n == 0:
            return "every token, from all data"
        return f"{self.n} {self.unit}{'s' if self.n > 1 else ''}"


@dataclass(frozen=True)
class Level:
    """One level.

    network, bias, retention, rule  the memory's choices in words
    flow          context flow: what it compresses (tokens, activations, gradients)
    transfer      how knowledge reaches the next slower level (none, direct, backpropagation, initialization, generation)
    params        names of the slow parameters that make it: its initial state, step size, projections, gates. What several
                  levels of a layer share is the fastest one's; what makes no memory, the slow weights' own
    moves         names of the slow parameters this level moves
    state_paths   paths of the state tensors that are this level's fast weights
    weights       numbers that a fresh lane keeps there, without the window that is still open; None: they grow with the text.
                  Filled in by `nestling.models.levels`, as is
    slow, moved   how many numbers `params` and `moves` have. Over all levels `slow` adds up to the model's parameters
    """

    name: str
    period: Period
    network: str
    bias: str
    retention: str
    rule: str
    flow: str
    transfer: str
    params: tuple[str, ...] = ()
    state_paths: tuple[str, ...] = ()
    weights: int | None = 0
    slow: int = 0
    moves: tuple[str, ...] = ()
    moved: int = 0

    def under(self, prefix: str, state: str | None = None) -> Level:
        """The same level inside a larger module, whose state stands under `state` (default: the same prefix; "": where it is)."""
        state = prefix if state is None else state
        return replace(
            self,
            name=f"{prefix}.{self.name}" if self.name else prefix,
            params=tuple(f"{prefix}.{p}" for p in self.params),
            moves=tuple(f"{prefix}.{p}" for p in self.moves),
            state_paths=tuple(f"{state}.{p}" if state else p for p in self.state_paths),
        )
