"""The engine's part for decay by channel of the key, W_t = diag(α_t) W_{t−1} + … (GLA; Miras, Table 1; derived).

The coefficients of `coefficients` get one more dimension c, that of the key's channels, and go inside the products of keys:

    D[t,s,c] = Π_{s<j≤t} α_{j,c}        A[t,i,c] = Σ_s D[t,s,c] (EΓ)[s,i]        γ_t, f_t likewise
    h_t W_t = (γ_t ∘ h_t) W_0 + (f_t ∘ h_t) S_0 − Σ_i (Σ_c A[t,i,c] h_{tc} x_{ic}) δ_i − Σ_i (Σ_c D[t,i,c] h_{tc} x_{ic}) e_i

Scaling keys by 1/γ_i would make these plain products, and overflow as soon as a channel forgets. Here tiles are short, between
tiles only γ ≤ 1 multiplies queries and keys, and inside a tile every D is the exponential of a difference that is at most 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nestling.memory.coefficients import each, products, spread
from nestling.memory.networks.base import at
from nestling.memory.state import Weights

if TYPE_CHECKING:
    from nestling.memory.spec import MemorySpec
    from nestling.memory.tile import Factors
    from nestling.memory.tiles import Tiles


class Course(NamedTuple):
    """Coefficients of one tile, rows t = 0 … L; see the module.

    keep      γ `[…, L+1, c]`;  carry: f, None without momentum
    write     A `[…, L+1, halo + L, c]`;  running: D `[…, L+1, L, c]`
    share     α `[…, L, c]`
    keep_s    m_L `[…]`, and write_s (EΓ)[L] `[…, halo + L]`; None without momentum
    """

    keep: Tensor
    carry: Tensor | None
    write: Tensor
    running: Tensor
    share: Tensor
    keep_s: Tensor | None
    write_s: Tensor | None


def courses(tiles: Tiles) -> list[Course]:
    """Those of a group's tiles."""
    lr, gate = tiles.lr, tiles.retention
    assert gate is not None
    d = products(gate.map(lambda part: part.mT)).movedim(-3, -1)
    keep, running = d[..., 0, :], d[..., 1:, :]
    gamma = None if tiles.window is None else spread(lr, tiles.window, tiles.present)
    carry, keep_s, write_s = None, None, None
    if tiles.momentum is not None:
        e = products(tiles.momentum)
        impulse = e[..., 1:, 1:] * lr.unsqueeze(-2) if gamma is None else e[..., 1:, 1:] @ gamma
        adding = running if tiles.alive is None else running * tiles.alive[..., None, :, None]
        m = e[..., 1:, 0]
        carry = torch.einsum("...tsc,...s->...tc", adding, m)
        write = torch.einsum("...tsc,...si->...tic", adding, impulse)
        keep_s, write_s = m[..., -1], impulse[..., -1, :]
    elif gamma is not None:
        write = torch.einsum("...tsc,...si->...tic", running, gamma)
    else:
        write = running * lr[..., None, :, None]
    parts = (keep, carry, write, running, gate.plain(), keep_s, write_s)
    return [Course(*part) for part in zip(*(each(x, lr.shape[2]) for x in parts), strict=True)]


def tile(
    spec: MemorySpec,
    c: Course,
    anchor: Weights,
    weights: Weights,
    momentum: Weights,
    found: Factors,
    q: Tensor,
    erase: Tensor | None,
) -> tuple[Tensor, Weights, Weights]:
    """Answer a tile's queries, and move weights and momentum past it. The memory has one layer."""
    (x_all,), (delta,), (w,) = found.inputs, found.errors, weights
    s = momentum[0] if momentum else None
    x = x_all[..., x_all.shape[-2] - q.shape[-2] :, :]
    erased = None if erase is None else _erased(spec, c, w, s, x_all, x, delta, erase)

    def linear(rows: slice, h: Tensor) -> Tensor:
        z = (c.keep[..., rows, :] * h) @ w - _between(c.write[..., rows, :, :], h, x_all) @ delta
        if s is not None and c.carry is not None:
            z = z + (c.carry[..., rows, :] * h) @ s
        return z if erased is None else z - _between(c.running[..., rows, :, :], h, x) @ erased

    if spec.read == "boundary":
        y = spec.network.apply(at(anchor), q)
    else:
        rows = slice(1, None) if spec.read == "after" else slice(None, -1)
        y = spec.network.apply(lambda _, h: linear(rows, h), q)
    new = c.keep[..., -1, :, None] * w - (c.write[..., -1, :, :] * x_all).mT @ delta
    if erased is not None:
        new = new - (c.running[..., -1, :, :] * x).mT @ erased
    if s is None:
        return y, (new,), ()
    assert c.carry is not None
    assert c.keep_s is not None
    assert c.write_s is not None
    moved = c.keep_s[..., None, None] * s - (c.write_s.unsqueeze(-1) * x_all).mT @ delta
    return y, (new + c.carry[..., -1, :, None] * s,), (moved,)


def _between(d: Tensor, h: Tensor, x: Tensor) -> Tensor:
    """Σ_c D[t,i,c] h_{tc} x_{ic}: `[…, t, i]`."""
    z: Tensor = (d * x.unsqueeze(-3)) @ h.unsqueeze(-1)
    return z.squeeze(-1)


def _erased(
    spec: MemorySpec,
    c: Course,
    w: Tensor,
    s: Tensor | None,
    x_all: Tensor,
    x: Tensor,
    delta: Tensor,
    erase: Tensor,
) -> Tensor:
    """e_t = ε_t (x_t ∘ α_t) W_{t−1}, without α_t where what stood before the decay is erased."""
    before = slice(None, -1)
    seen = c.share * x if spec.rule.erase == "after_decay" else x
    strength = erase.unsqueeze(-1)
    right = (c.keep[..., before, :] * seen) @ w - _between(c.write[..., before, :, :], seen, x_all) @ delta
    if s is not None and c.carry is not None:
        right = right + (c.carry[..., before, :] * seen) @ s
    system = strength * _between(c.running[..., before, :, :], seen, x)
    unit = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    solved: Tensor = torch.linalg.solve_triangular(unit + system, strength * right, upper=False, unitriangular=True)
    return solved
