"""The optimizers' rules as steps inside a model: what a level of the continuum does with a chunk's gradient (Nested Learning,
eq. 71, where f is "the error component of any optimizer").

Each lane has weights of its own, so everything here is `[lane, out, in]`, and a memory belongs to the lane's state: it is saved,
forked and reset with it. A rule is two pure functions; its step size is the level's η, outside the memory, as it is in
`nestling.optim`. Gradients come as constants, so no memory has a history of autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from nestling.memory.newton_schulz import newton_schulz
from nestling.optim.elementwise import optimum
from nestling.optim.orthogonal import adjustment

Memory = tuple[Tensor, ...]
"""What a rule keeps of one matrix, per lane; the first dimension is the lane."""


class InnerRule(Protocol):
    """How a level descends."""

    @property
    def rate(self) -> float:
        """The η that a level begins with (ours)."""
        ...

    def start(self, w: Tensor) -> Memory:
        """Before the first gradient of weights like `w` `[lane, out, in]`."""
        ...

    @property
    def unit(self) -> str:
        """What η counts: rules of the same unit can take over each other's step sizes."""
        ...

    @property
    def erases(self) -> bool:
        """Whether it needs what the weights said to the level's inputs, too: Σ (W x)xᵀ/‖x‖², in the memory's first tensor."""
        ...

    def step(self, g: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """D and the new memory, for a gradient `[lane, out, in]`; the weights go to W − η'D."""
        ...

    def size(self, rate: Tensor) -> Tensor:
        """η' of the level's η."""
        ...


GRADIENT = "the gradient"
"""The unit of rules whose step is as large as the gradient is. Others have a length of their own, whatever the gradient's."""


class Plain:
    """A rule that needs gradients alone, and takes η as it is."""

    erases: ClassVar[bool] = False
    unit: ClassVar[str] = GRADIENT

    def size(self, rate: Tensor) -> Tensor:
        return rate


@dataclass(frozen=True)
class Gradient(Plain):
    """D = g: gradient descent (the default of the continuum)."""

    rate: float = 0.5

    def start(self, w: Tensor) -> Memory:
        return ()

    def step(self, g: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        return g, ()

    def __str__(self) -> str:
        return "gradient descent"


@dataclass(frozen=True)
class Momentum(Plain):
    """D = m, m ← βm + (1 − β)g: as `PreconditionedMomentum`, as a mean.

    share   β
    """

    share: float = 0.9
    rate: float = 0.5

    def __post_init__(self) -> None:
        _check(self, "share")

    def start(self, w: Tensor) -> Memory:
        return (torch.zeros_like(w),)

    def step(self, g: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        m = memory[0].lerp(g, 1 - self.share)
        return m, (m,)

    def __str__(self) -> str:
        return f"momentum ({self.share})"


@dataclass(frozen=True)
class DGD:
    """W ← W − η'(g + κ W Ĉ), η' = η/(1 + κη), Ĉ the mean of x̂x̂ᵀ over the chunk, x̂ = x/‖x‖: delta gradient descent, as
    `nestling.optim.DGD` in form "normalized".

    W are the weights that are used, θ₀ + Δ, so that a level also erases what the outer loop has given it; what it remembers are
    the sums of a chunk that is open.

    coupling   κ in [0, 1]: 1 is the paper, 0 gradient descent; 0.1 is ours
    """

    coupling: float = 0.1
    rate: float = 0.5

    erases: ClassVar[bool] = True
    unit: ClassVar[str] = GRADIENT

    def __post_init__(self) -> None:
        if not 0 <= self.coupling <= 1:
            raise ValueError(f"DGD: coupling is {self.coupling}; expected a number in [0, 1]")

    def start(self, w: Tensor) -> Memory:
        return (torch.zeros_like(w),)

    def step(self, g: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        return g + self.coupling * memory[0], self.start(g)

    def size(self, rate: Tensor) -> Tensor:
        return rate / (1 + self.coupling * rate)

    def __str__(self) -> str:
        return f"delta gradient descent (erasing {self.coupling})"


@dataclass(frozen=True)
class Adam(Plain):
    """D = m̂/(√v̂ + ε): as `AdamMemory`, the optimal element-wise memory, with the correction of its means.

    shares   β₁, β₂
    eps      ε, outside the root
    """

    shares: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    rate: float = 3e-3

    unit: ClassVar[str] = "Adam's direction, about 1 in every element"

    def __post_init__(self) -> None:
        _check(self, "shares")

    def start(self, w: Tensor) -> Memory:
        return torch.zeros_like(w), torch.zeros_like(w), _count(w)

    def step(self, g: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        mean, square = memory[0].lerp(g, 1 - self.shares[0]), memory[1].lerp(g.square(), 1 - self.shares[1])
        steps = memory[2] + 1
        corrected = [
            x / _lanes(1 - share ** steps.to(x.dtype), x) for x, share in zip((mean, square), self.shares, strict=True)
        ]
        # The root has no slope at 0; what is smaller than the smallest number has none for us.
        (found,) = optimum(corrected[:1], [corrected[1].clamp_min(torch.finfo(g.dtype).tiny)], "root", self.eps)
        return found, (mean, square, steps)

    def __str__(self) -> str:
        return f"Adam {self.shares}"


@dataclass(frozen=True)
class M3(Plain):
    """D = s (NS(M¹) + α NS(M²)): two momenta of two periods, as `nestling.optim.M3` with second_moment="none".

    share, slow_share   β₁, β₃
    slow_weight         α
    period              f, the level's updates between two of the slow memory
    steps               of Newton–Schulz

    s makes a step as large as AdamW's (0.2 √max(out, in)).
    """

    share: float = 0.9
    slow_share: float = 0.9
    slow_weight: float = 0.5
    period: int = 4
    steps: int = 5
    rate: float = 1e-2

    unit: ClassVar[str] = "M3's direction, about 0.2 in every element"

    def __post_init__(self) -> None:
        _check(self, "share")
        _check(self, "slow_share")
        if self.period < 1 or self.steps < 0:
            raise ValueError(f"M3: period is {self.period} and steps {self.steps}; expected at least 1 and 0")

    def start(self, w: Tensor) -> Memory:
        return torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w), _count(w)

    def step(self, g: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        fast, slow, pending, direction, count = memory
        due = (count > 0) & (count % self.period == 0)
        if bool(due.any()):  # the slow memory moves first in a period, by the gradients of the one before
            where = _lanes(due, slow)
            slow = torch.where(where, slow.lerp(pending / self.period, 1 - self.slow_share), slow)
            pending = torch.where(where, 0.0, pending)
            direction = torch.where(where, newton_schulz(slow, self.steps), direction)
        fast, pending = fast.lerp(g, 1 - self.share), pending + g
        found = newton_schulz(fast, self.steps) + self.slow_weight * direction
        return adjustment("match_rms_adamw", g[0]) * found, (fast, slow, pending, direction, count + 1)

    def __str__(self) -> str:
        return f"M3 ({self.share}; {self.slow_share} every {self.period} updates)"


RULES: dict[str, Callable[[], InnerRule]] = {
    "gradient": Gradient,
    "momentum": Momentum,
    "dgd": DGD,
    "adam": Adam,
    "m3": M3,
}


def named(name: str) -> InnerRule:
    """A rule by name, with its default settings. Raises ValueError for one that is not known."""
    if name not in RULES:
        raise ValueError(f"rule is {name!r}; expected one of: {', '.join(RULES)}")
    return RULES[name]()


def _count(w: Tensor) -> Tensor:
    return torch.zeros(w.shape[0], dtype=torch.int64, device=w.device)


def _lanes(x: Tensor, like: Tensor) -> Tensor:
    return x.view(-1, *[1] * (like.dim() - 1))


def _check(rule: object, setting: str) -> None:
    value = getattr(rule, setting)
    if any(not 0 <= share < 1 for share in (value if isinstance(value, tuple) else (value,))):
        raise ValueError(f"{type(rule).__name__}: {setting} is {value}; expected shares to keep in [0, 1)")
