"""A weight matrix that modifies itself (Irie, Schlag, Csordás and Schmidhuber, 2022), one token after another.

    y_t, q_t, k_t, b_t = φ(x_t) W_{t−1}                               φ = softmax, per head
    W_t = W_{t−1} + φ(k_t)ᵀ (σ(b_t) ∘ (φ(q_t) W_{t−1} − φ(k_t) W_{t−1}))

Row vectors; W has the columns of y, q, k and of four step sizes b, one for each of these four parts. The matrix that answers also
makes the key, the query and the step of its own change, a delta rule toward what it recalls for the query; its initial value is
the only slow weight in it. As every token needs the weights that the last one left, tokens cannot be read in parallel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestling.layers.base import Layer
from nestling.layers.level import Level, Period
from nestling.layers.self_referential_in_c import read
from nestling.memory import Report
from nestling.memory.inputs import surely
from nestling.state import register

GROUP = 64
"""Tokens whose weights are kept for the backward pass at a time; those of other groups are made again."""


@register
class SelfReferentialState(NamedTuple):
    """W `[lane, head, width, 3 · width + 4]`, in at least float32; tokens left out as not finite, int64 `[lane]`."""

    weights: Tensor
    faults: Tensor


class SelfReferential(Layer):
    """`y, state = layer(x, state)`: y = SRWM(x) W_o.

    From the paper: the equations above, four step sizes, heads, an output projection, initial values of standard deviation
    1/√width with the step sizes' shifted to −1.

    Args:
        dim: width.  heads: matrices, each of width dim / heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"SelfReferential: dim {dim} cannot be split into {heads} heads: choose a multiple")
        self.heads, self.width = heads, dim // heads
        initial = torch.randn(heads, self.width, 3 * self.width + 4) * self.width**-0.5
        initial[..., -4:] -= 1
        self.initial = nn.Parameter(initial)
        self.out = nn.Linear(dim, dim, bias=False)

    def start(self, lanes: int) -> SelfReferentialState:
        w = self.initial if torch.is_grad_enabled() else self.initial.detach()
        wide = w.to(torch.promote_types(w.dtype, torch.float32)).expand(lanes, *w.shape)
        return SelfReferentialState(wide, torch.zeros(lanes, dtype=torch.int64, device=w.device))

    def forward(
        self,
        x: Tensor,
        state: SelfReferentialState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        report: Report | None = None,
    ) -> tuple[Tensor, SelfReferentialState]:
        lanes, time, _ = x.shape
        state = self.start(lanes) if state is None else state
        if time == 0:
            return x, state
        with torch.autocast(x.device.type, enabled=False):
            weights, faults = state
            fresh = self.start(lanes).weights
            wide = x.to(torch.promote_types(x.dtype, weights.dtype)).view(lanes, time, self.heads, self.width)
            fine = wide.flatten(2).sum(-1).isfinite()
            live = fine if valid is None else fine & valid.to(x.device)
            lost = ~fine if valid is None else ~fine & valid.to(x.device)
            wide = wide if surely(fine) else torch.where(fine[..., None, None], wide, 0.0)
            begins = None if reset is None else reset.to(x.device) & (valid.to(x.device) if valid is not None else True)
            given = wide.transpose(1, 2).softmax(-1)

            def slow(x: Tensor, fresh: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
                return _read_in_groups(x, live, begins, fresh, w)

            found = read(given, live, begins, fresh, weights, slow)
            y, weights = slow(given, fresh, weights) if found is None else found
            y = y.transpose(1, 2).flatten(2).to(x.dtype)
        return self.out(y), SelfReferentialState(weights, faults + lost.sum(1))

    def levels(self) -> list[Level]:
        return [
            Level(
                "memory",
                Period(1, "token"),
                network=f"matrix {self.width} × {3 * self.width + 4}, which makes its own keys, queries and steps",
                bias="L2, toward what it recalls for its query",
                retention="everything",
                rule="delta rule",
                flow="tokens",
                transfer="initialization",
                params=self.own(),
                state_paths=("weights", "faults"),
            )
        ]


def _read_in_groups(x: Tensor, live: Tensor, begins: Tensor | None, fresh: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """x and answers `[lane, head, time, width]`, by the framework's operations."""
    time, outputs = x.shape[2], []
    for first in range(0, time, GROUP):
        part = slice(first, first + GROUP)
        starts = None if begins is None else begins[:, part]
        given = (x[:, :, part], live[:, part], starts, fresh, w)
        if torch.is_grad_enabled() and time > GROUP:
            y, w = checkpoint(_read, *given, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
        else:
            y, w = _read(*given)
        outputs.append(y)
    return torch.cat(outputs, 2), w


def _read(x: Tensor, live: Tensor, begins: Tensor | None, fresh: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """x `[lane, head, time, width]`, after φ; live, begins bool `[lane, time]`: tokens that write, that start from `fresh`."""
    width, everyone, outputs = x.shape[-1], surely(live), []
    shares = [width, width, width, 4]
    repeats = torch.tensor([width, width, width, 4], device=x.device)
    for t in range(x.shape[2]):
        if begins is not None:
            w = torch.where(begins[:, t, None, None, None], fresh, w)
        y, q, k, b = torch.split(x[:, :, t, None] @ w, shares, -1)
        key = k.softmax(-1)
        step = b.sigmoid().repeat_interleave(repeats, -1, output_size=3 * width + 4)
        change = step * ((q.softmax(-1) - key) @ w)
        if not everyone:
            change = torch.where(live[:, t, None, None, None], change, 0.0)
        w = w + key.mT * change
        outputs.append(y[:, :, 0])
    return torch.stack(outputs, 2), w
