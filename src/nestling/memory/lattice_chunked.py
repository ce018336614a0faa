"""A tile of Lattice in a handful of matrix products (derived). Rows are tokens: K, Q `[token, slot]`, V `[token, dim]`.

With F, n at the anchor, W_0 the weights before the tile, D the products of retentions, A and H as in `lattice` and Ã = diag(γ)A,

    Z = H Fᵀ        R = D (Ã ∘ Z)
    S_t = c_t W_0 − Σ_i D[t,i] ã_iᵀ h_i + Diag(R_t) F
    q S_t = c_t q W_0 − Σ_i D[t,i] (q·ã_i) h_i + (R_t ∘ q) F

A token's norms need no state per token: with X_{t,i} = Σ_j D[t,j] ã_{j,i} h_j, the part of it along f_i is R_{t,i}, so

    ‖s_{t,i}‖² = c_t²‖w_i‖² − 2c_t (X_{t,i}·w_i − R_{t,i} f_i·w_i) + ‖X_{t,i}‖² − R_{t,i}²
    ‖X_t‖² = (D ∘ D)(Ã ∘ ((2 strictly lower D + I) ∘ HHᵀ) Ã)

where the second term is 0 if w is the anchor, as steps are orthogonal to it. For that reason the norm is never less than
c_t |f_i·w_i| either, which holds it where the last two terms are large and nearly equal.

Precision: what is parallel to a slot is added and taken away again, so that answers in float32 have errors of about 1e-7 ‖X‖
beside a slot of norm 1. With unit codes, values of norm 1, 10, 100 and 1000 that are exactly parallel to slots, and chunk 16, the
largest relative error against float64 is 3e-7, 5e-7, 5e-6 and 2e-4 for decoding and similarity (token by token 4e-7 to 2e-6); for
encoding, whose X grows with the value's square, 4e-7, 8e-5, 8e-2 and more than 1 (token by token 4e-7, 1e-5, 4e-4 and 9e-2). With
a tenth of the value in other directions it is at most 4e-6, and 1e-4 for encoding.

With gates g_{t,i} = μ_t + ã_{t,i} z_{t,i}/n_i on the running slots (`form="gate"`), D has a matrix for each slot, of plain
products, as gates may be 0 or less, and there is no R:

    s_{t,i} = D[t,0,i] w_i − Σ_j B[t,j,i] h_j        B[t,j,i] = D[t,j,i] ã_{j,i}
    q S_t = (q ∘ D[t,0]) W_0 − Σ_j (q·B[t,j]) h_j
    ‖s_{t,i}‖² = D[t,0,i]² ‖w_i‖² − 2 D[t,0,i] Σ_j B[t,j,i] h_j·w_i + Σ_{j,l} B[t,j,i] B[t,l,i] h_j·h_l

which is held at the square of the part along f_i, n_i + D[t,0,i] (f_i·w_i − n_i) + Σ_j D[t,j,i] (μ_j − 1) n_i: at least n_i²,
where nothing decays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestling.memory import fused
from nestling.memory.coefficients import Coefficients
from nestling.memory.norm import EPS
from nestling.memory.slots import Moved, rows_of, slot_norms
from nestling.memory.state import Weights
from nestling.memory.tile import only, sound

if TYPE_CHECKING:
    from nestling.memory.lattice import Lattice


def tile(
    spec: Lattice, tokens: Weights, lr: Tensor, c: Coefficients, anchor: Tensor, weights: Tensor, begins: bool
) -> Moved:
    """Answer and write; lr `[lane, head, place]`, anchor and weights `[lane, head, slot, dim]`."""
    q, k, v = tokens
    assert c.running is not None
    unit = spec.phi == "unit"
    n = slot_norms(anchor) if unit else None
    f = anchor if n is None else anchor / n.unsqueeze(-1)

    a, h = k, v
    if spec.objective == "decoding":
        h = k @ f - v
    elif spec.objective == "similarity":
        h = -v
    else:
        a = v @ f.mT - k
    a = a if n is None else a / n.unsqueeze(-2)
    z = h @ f.mT if unit else a
    fine = sound((a, h.square(), z)).all(1)
    a, h, z = only(fine[:, None], (a, h, z))
    radial = a * z
    steps = (
        a.square() * (h.square().sum(-1, keepdim=True) - z.square() if unit else h.square().sum(-1, keepdim=True))
    ).detach()
    size = steps.sum(-1).clamp_min(0).sqrt()

    rate = lr.unsqueeze(-1)
    a = rate * a
    if spec.slotwise:
        assert n is not None
        y, after = _gated(spec, q, a, h, z, c, f, n, anchor, weights)
        return Moved(y, (after,), fine, h.detach().norm(dim=-1), size)
    r = c.running @ (rate * radial) if unit else None  # rows 0 … L
    after = fused.advance(weights, None if c.keep is None else c.keep[..., -1], None, None, a, c.running[..., -1, :], h)
    if r is not None:
        after = after + r[..., -1, :, None] * f

    if spec.read == "boundary":
        asked = q if spec.read_norm == "none" or n is None else q / n.unsqueeze(-2)
        return Moved(asked @ anchor, (after,), fine, h.detach().norm(dim=-1), size)
    rows = rows_of(spec.read)
    keep = None if c.keep is None else c.keep[..., rows]
    if n is not None and spec.read_norm == "chunk":
        q = q / n.unsqueeze(-2)
    elif n is not None and spec.read_norm == "token":
        assert r is not None
        q = q * _norms(c, a, h, z, r, f, n, weights, begins, rows).rsqrt()
    y = fused.read(q, weights, keep, None, None, a, c.running[..., rows, :], h)
    if r is not None:
        y = y + (r[..., rows, :] * q) @ f
    return Moved(y, (after,), fine, h.detach().norm(dim=-1), size)


def _gated(
    spec: Lattice,
    q: Tensor,
    a: Tensor,
    h: Tensor,
    z: Tensor,
    c: Coefficients,
    f: Tensor,
    n: Tensor,
    anchor: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Answers and weights after the tile, where gates at the chunk's start act on the running slots; a: γ-weighted."""
    mu = _kept(c)
    gates = 1 + a * z / n.unsqueeze(-2) if mu is None else mu + a * z / n.unsqueeze(-2)
    d = _products(gates)
    b = d[..., 1:, :] * a.unsqueeze(-3)
    after = d[..., -1, 0, :, None] * weights - b[..., -1, :, :].mT @ h
    if spec.read == "boundary":
        return (q if spec.read_norm == "none" else q / n.unsqueeze(-2)) @ anchor, after
    rows = rows_of(spec.read)
    d, b = d[..., rows, :, :], b[..., rows, :, :]
    keep = d[..., 0, :]
    if spec.read_norm == "chunk":
        q = q / n.unsqueeze(-2)
    elif spec.read_norm == "token":
        written = (b * ((h @ h.mT).unsqueeze(-3) @ b)).sum(-2)
        along = (b * (h @ weights.mT).unsqueeze(-3)).sum(-2)
        total = keep.square() * weights.square().sum(-1).unsqueeze(-2) - 2 * keep * along + written
        least = n.unsqueeze(-2) + keep * ((f * weights).sum(-1) - n).unsqueeze(-2)
        if mu is not None:
            least = least + (d[..., 1:, :] * (mu - 1).unsqueeze(-3)).sum(-2) * n.unsqueeze(-2)
        least = least.square()
        q = q * torch.where(total < least, least, total).clamp_min(EPS**2).rsqrt()
    return (keep * q) @ weights - (b @ q.unsqueeze(-1)).squeeze(-1) @ h, after


def _kept(c: Coefficients) -> Tensor | None:
    """μ `[…, token, 1]` of the tile's own tokens, from the products; None: all 1."""
    if c.keep is None:
        return None
    assert c.running is not None
    return torch.cat([c.keep[..., 1:2], c.running.diagonal(-2, -2, -1)], -1).unsqueeze(-1)


def _products(gates: Tensor) -> Tensor:
    """D[t,s,i] = Π_{s<j≤t} g_{j,i} for 0 ≤ s ≤ t ≤ L, else 0: `[…, L, slot]` → `[…, L+1, L+1, slot]`. Of any numbers."""
    length = gates.shape[-2] + 1
    pairs = torch.ones(length, length, dtype=torch.bool, device=gates.device)
    factors = torch.where(pairs.tril(-1).unsqueeze(-1), torch.nn.functional.pad(gates, (0, 0, 1, 0)).unsqueeze(-2), 1.0)
    return torch.where(pairs.tril().unsqueeze(-1), factors.cumprod(-3), 0.0)


def _norms(
    c: Coefficients,
    a: Tensor,
    h: Tensor,
    z: Tensor,
    r: Tensor,
    f: Tensor,
    n: Tensor,
    weights: Tensor,
    begins: bool,
    rows: slice,
) -> Tensor:
    """‖s_{t,i}‖² `[…, token, slot]`, at least 1e-12 and that of the part along the anchor's slot."""
    assert c.running is not None
    d, r = c.running[..., rows, :], r[..., rows, :]
    own = c.running[..., 1:, :]
    pairs = own.tril(-1) * 2 + torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
    written = a * ((pairs * (h @ h.mT)) @ a)
    first = n.square() if begins else weights.square().sum(-1)
    first = first.unsqueeze(-2)
    along, least = None, first
    if not begins:
        radial = (f * weights).sum(-1).unsqueeze(-2)
        along, least = d @ (a * (h @ weights.mT)) - r * radial, radial.square()
    if c.keep is not None:
        keep = c.keep[..., rows].unsqueeze(-1)
        first, least = keep.square() * first, keep.square() * least
        along = None if along is None else keep * along
    total = first + d.square() @ written - r.square()
    if along is not None:
        total = total - 2 * along
    return torch.where(total < least, least, total).clamp_min(EPS**2)
