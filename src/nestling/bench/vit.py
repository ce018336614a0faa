"""A small vision transformer [Dosovitskiy et al. 2021]: patches in, a class out, mean over patches, pre-norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.optim.joined import Joined

OUTER = ("patches.*", "head.*")
"""Patterns of its weights that are matrices, but neither from nor to hidden states."""


class VisionBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = Joined(dim, 3 * dim, parts=3), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, patch, dim]` → the same."""
        lanes, count, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(lanes, count, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(read)
        y: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y


class VisionTransformer(nn.Module):
    """Pictures `[batch, channel, pixels, pixels]` → logits `[batch, class]`.

    Args:
        channels, pixels: of the pictures.
        patch: side of a patch, a divisor of pixels.
        classes: how many.
        dim, layers, heads: widths and depth.
    """

    def __init__(
        self, channels: int, pixels: int, patch: int, classes: int, *, dim: int = 48, layers: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        if pixels % patch or dim % heads:
            raise ValueError(f"patch {patch} must divide pixels {pixels}, and heads {heads} the width {dim}")
        self.patch = patch
        self.patches = nn.Linear(channels * patch**2, dim)
        self.places = nn.Parameter(0.02 * torch.randn((pixels // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(VisionBlock(dim, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        cut = images.unfold(2, self.patch, self.patch).unfold(
            3, self.patch, self.patch
        )  # [batch, channel, row, column, …]
        x = self.patches(cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


def patch_of(pixels: int) -> int:
    """The largest patch that divides a side and leaves about seven or more of them: 2 of 8, 4 of 28 and 32, 8 of 64."""
    return max(side for side in range(1, pixels + 1) if pixels % side == 0 and side <= max(2, pixels // 7))
