"""The engine's part for rules whose steps go along a map D of the momentum (Atlas, eq. 32–33 and 39–41).

With W_0, S_0 at the tile's start and gradients G_i = x_iᵀδ_i at the anchor, momentum is the linear recurrence it always is,

    S_t = m_t S_0 − Σ_i (EΓ)[t,i] G_i                             matrices as in `coefficients`, with η = 1

Per token, every S_t and W_t = γ_t W_0 + Σ_s D[t,s] η_s D(S_s) is made; all S_t of a tile go through the map at once. Per chunk,
only S_b at a chunk's last token b is, and W_t = γ_t W_0 for the tokens before, which need no weights of their own. At every
r-th token it is the same with tiles that end there, at the anchor of the whole chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nestling.memory import fused
from nestling.memory.coefficients import each, products, spread
from nestling.memory.inputs import surely
from nestling.memory.networks.base import at
from nestling.memory.rules import Directed
from nestling.memory.state import Weights

if TYPE_CHECKING:
    from nestling.memory.layout import Layout
    from nestling.memory.spec import MemorySpec
    from nestling.memory.tile import Factors
    from nestling.memory.tiles import Tiles


class Course(NamedTuple):
    """Coefficients of one tile; rows of the momentum: all tokens, or the last one alone.

    keep      γ `[…, L+1]`, None: all ones
    held      m `[…, rows]`
    impulse   EΓ `[…, rows, halo + L]`
    size      per token D[t,s] η_s `[…, L+1, L]`; per chunk η `[…]` of the lane's last token
    last      per chunk: which place is the lane's last token, bool `[lane, 1, L]`
    """

    keep: Tensor | None
    held: Tensor
    impulse: Tensor
    size: Tensor
    last: Tensor | None


def courses(rule: Directed, tiles: Tiles, cut: Layout, first: int) -> list[Course]:
    """Those of a group's tiles, the first of which is number `first` of the cut."""
    lr, alive = tiles.lr, tiles.alive
    assert tiles.momentum is not None
    length, count = lr.shape[-1], lr.shape[2]
    acting = torch.ones_like(lr) if alive is None else alive.to(lr.dtype).expand_as(lr)
    decays = None if tiles.retention is None else products(tiles.retention)
    keep = None if decays is None else decays[..., 0]
    e = products(tiles.momentum)
    rows = slice(1, None) if rule.per_token else slice(-1, None)
    held, impulse = e[..., rows, 0], e[..., rows, 1:]
    gamma = acting.diag_embed() if tiles.window is None else spread(acting, tiles.window, tiles.present)
    impulse = impulse @ gamma
    last = None
    if rule.per_token:
        if decays is None:
            decays = torch.ones(length + 1, length + 1, dtype=lr.dtype, device=lr.device).tril()
        size = decays[..., 1:] * lr.unsqueeze(-2)
    else:
        place = torch.arange(length, device=lr.device)
        if cut.ok is None:
            last = (place == length - 1).expand(lr.shape[0], 1, count, length)
        else:
            filled = cut.ok[:, first : first + count, -length:].sum(-1, keepdim=True).to(lr.device)
            last = (place == filled - 1).unsqueeze(1)
        size = torch.where(last, lr, 0.0).sum(-1)
    parts = (each(x, count) for x in (keep, held, impulse, size, last))
    return [Course(*part) for part in zip(*parts, strict=True)]


class Tile(NamedTuple):
    """What a tile stands on, its factors and its queries."""

    anchor: Weights
    weights: Weights
    momentum: Weights
    found: Factors
    q: Tensor


def tile(
    spec: MemorySpec,
    c: Course,
    anchor: Weights,
    weights: Weights,
    momentum: Weights,
    found: Factors,
    q: Tensor,
    border: Tensor,
) -> tuple[Tensor, Weights, Weights]:
    """Answer a tile's queries, and move weights and momentum past it. border: bool `[lane]`, the lane's chunk closes here."""
    assert spec.directed is not None
    x = Tile(anchor, weights, momentum, found, q)
    if c.last is None:
        return _per_token(spec, spec.directed, c, x)
    return _per_chunk(spec, spec.directed, c, x, border, c.last)


def _per_token(spec: MemorySpec, rule: Directed, c: Course, x: Tile) -> tuple[Tensor, Weights, Weights]:
    anchor, weights, momentum, found, q = x
    running, moved = [], []
    for w, s, h, delta in zip(weights, momentum, found.inputs, found.errors, strict=True):
        written = (c.impulse.unsqueeze(-1) * h.unsqueeze(-3)).mT @ delta.unsqueeze(-3)
        every = c.held[..., None, None] * s.unsqueeze(-3) - written  # S_t `[…, L, in, out]`
        steps = torch.einsum("...ts,...sab->...tab", c.size, rule.direction(every))
        before = w.unsqueeze(-3)
        running.append(steps + (before if c.keep is None else c.keep[..., None, None] * before))
        moved.append(every[..., -1, :, :])
    after = tuple(w[..., -1, :, :] for w in running)
    if spec.read == "boundary":
        return spec.network.apply(at(anchor), q), after, tuple(moved)
    rows = slice(1, None) if spec.read == "after" else slice(None, -1)

    def linear(layer: int, h: Tensor) -> Tensor:
        z: Tensor = h.unsqueeze(-2) @ running[layer][..., rows, :, :]
        return z.squeeze(-2)

    return spec.network.apply(linear, q), after, tuple(moved)


def _per_chunk(
    spec: MemorySpec, rule: Directed, c: Course, x: Tile, border: Tensor, last: Tensor
) -> tuple[Tensor, Weights, Weights]:
    anchor, weights, momentum, found, q = x
    after, moved = [], []
    closes = border.to(q.device).view(-1, 1, 1, 1)
    for w, s, h, delta in zip(weights, momentum, found.inputs, found.errors, strict=True):
        s = fused.advance(s, c.held[..., -1], None, None, h, c.impulse[..., -1, :], delta)
        new = w if c.keep is None else c.keep[..., -1, None, None] * w
        if bool(border.any()):
            new = torch.where(closes, new + c.size[..., None, None] * rule.direction(s), new)
        after.append(new)
        moved.append(s)
    if spec.read == "boundary":
        return spec.network.apply(at(anchor), q), tuple(after), tuple(moved)
    keep = None if c.keep is None else c.keep[..., slice(1, None) if spec.read == "after" else slice(None, -1)]

    def linear(layer: int, h: Tensor) -> Tensor:
        z = h @ weights[layer]
        return z if keep is None else keep.unsqueeze(-1) * z

    y = spec.network.apply(linear, q)
    if spec.read == "after" and bool(border.any()):  # a chunk's last token reads what it has just written
        its = torch.where(last.unsqueeze(-1), q, 0.0).sum(-2, keepdim=True)
        y = torch.where(closes & last.unsqueeze(-1), spec.network.apply(at(after), its), y)
    return y, tuple(after), tuple(moved)


def write(
    rule: Directed,
    found: Factors,
    weights: Weights,
    momentum: Weights,
    share: Tensor,
    lr: Tensor,
    retention: Tensor | None,
    mu: Tensor,
    live: Tensor | None,
    due: Tensor,
) -> tuple[Weights, Weights]:
    """Every layer's weights and momentum after one token.

    share   γ of each factor in the sum `[…, halo + 1, 1]`;  lr, gates `[…, 1]`, lr 0 where masked
    live    bool `[lane, 1]`: the token acts;  None: in all lanes
    due     bool `[lane]`, on the CPU: lanes in which the map acts now
    """
    after, moved = [], []
    acts = torch.compiler.is_compiling() or bool(due.any())  # one graph has the same work at every token
    for w, s, x, delta in zip(weights, momentum, found.inputs, found.errors, strict=True):
        new_s = mu.unsqueeze(-1) * s - x.mT @ (share * delta)
        if live is not None:
            new_s = torch.where(live[:, None, None], new_s, s)
        new = w if retention is None else retention.unsqueeze(-1) * w
        if acts:
            stepped = new + lr.unsqueeze(-1) * rule.direction(new_s)
            new = stepped if surely(due) else torch.where(due.to(w.device).view(-1, 1, 1, 1), stepped, new)
        after.append(new)
        moved.append(new_s)
    return tuple(after), tuple(moved)
