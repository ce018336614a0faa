"""Short causal depthwise convolution: y_t = Σ_j w_j ∘ x_{t−j}, j = 0 … width − 1 (Titans, §4.4; width 4 in Miras, §5.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.layers.fused import convolve, spread
from nestling.layers.stream import places
from nestling.memory.inputs import surely


class ShortConvolution(nn.Module):
    """Depthwise convolution over the last `width` valid tokens since the lane's reset; SiLU on top.

    The state is the tail of inputs, `[lane, width − 1, channels]`. It starts as the identity plus small noise, so that keys and
    values are at first the token's own.
    """

    def __init__(self, channels: int, width: int = 4) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"ShortConvolution: width is {width}; expected at least 1")
        self.width = width
        weight = torch.randn(width, channels) * (0.1 / width)
        weight[0] += 1
        self.weight = nn.Parameter(weight)

    def start(self, lanes: int) -> Tensor:
        """An empty tail."""
        return self.weight.new_zeros(lanes, self.width - 1, self.weight.shape[1])

    def forward(
        self, x: Tensor, tail: Tensor | None = None, *, reset: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x `[lane, time, channels]` → y of the same shape, new tail. Invalid tokens are skipped as if not there."""
        (y,), tail = self.parts(x, tail, (0,), reset=reset, valid=valid)
        return y, tail

    def parts(
        self,
        x: Tensor,
        tail: Tensor | None,
        sources: tuple[int, ...],
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """y in as many parts as there are sources, side by side all channels, and the new tail. Each reads one of the equal parts
        of x `[lane, time, …]`, its source; several may read the same."""
        tail = self.start(x.shape[0]).to(x.dtype) if tail is None else tail.to(x.dtype)
        lanes, time, _ = x.shape
        count = len(sources)
        if time == 0 or self.width == 1:
            return F.silu(spread(x, sources) * self.weight[0].to(x.dtype)).chunk(count, -1), tail
        weight = self.weight.to(x.dtype)
        halo = self.width - 1
        if valid is not None and surely(valid):
            valid = None
        if valid is None and reset is not None and surely(~reset[:, 1:]):  # at the call's start or not at all
            tail, reset = torch.where(reset[:, :1, None].to(x.device), 0.0, tail), None
        if reset is None and valid is None:
            # A copy: a view would keep all of x for as long as the state lives, and a compiled step notice its strides.
            last = spread(x[:, max(0, time - halo) :], sources)
            kept = last if time >= halo else torch.cat([tail[:, time:], last], 1)
            new = kept.clone(memory_format=torch.contiguous_format)
            return convolve(x, tail, weight, sources), new
        x = spread(x, sources)
        stream = torch.cat([tail, x], 1)
        at = places(reset, valid, lanes, time, x.device)
        if valid is not None:  # valid tokens side by side, in order, behind the tail
            order = torch.where(valid.to(x.device), at.rank, time) + halo
            packed = x.new_zeros(lanes, halo + time + 1, x.shape[2])
            packed = packed.scatter(1, order.unsqueeze(-1).expand(-1, -1, x.shape[2]), x)
            stream = torch.cat([tail, packed[:, halo : halo + time]], 1)
        rows = torch.arange(lanes, device=x.device)[:, None]
        y = torch.zeros_like(x)
        for j in range(self.width):
            place = at.rank - j
            tap = stream[rows, (place + halo).clamp_min(0)]
            y = y + torch.where((place >= at.start).unsqueeze(-1) | (at.start < 0).unsqueeze(-1), tap, 0.0) * weight[j]
        keep = at.total[:, None] - halo + torch.arange(halo, device=x.device)
        fresh = (keep >= at.last[:, None]) | (at.last[:, None] < 0)
        new = torch.where(fresh.unsqueeze(-1), stream[rows, keep + halo], 0.0)
        return F.silu(y).chunk(count, -1), new
