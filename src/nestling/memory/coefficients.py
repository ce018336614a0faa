"""The coefficient matrices of a tile: everything about an update that depends on the gates alone (Titans, eq. 16–18;
Miras, eq. 28; Atlas, eq. 15–16). All of it at once is derived.

With W_0, S_0 at the tile's start, tokens t = 1 … L and gradients G_i = x_iᵀδ_i at the anchor,

    S_t = m_t S_0 − Σ_i (EΓ)[t,i] G_i
    W_t = γ_t W_0 + f_t S_0 − Σ_i A[t,i] G_i − Σ_i D[t,i] ε_i x_iᵀ p_i        p_i = x_i W_{i−1}

    D[t,s] = Π_{s<j≤t} α_j        E[s,i] = Π_{i<j≤s} μ_j      (lower triangular, ones on the diagonal)
    Γ[n,i] = η_n γ^{(n)}_{n−i} for a window, else diag(η)
    A = D E Γ,   f = D m          without momentum: A = D Γ, f = 0;  Nesterov: A = D (diag(μ) E + I) Γ, f = D diag(μ) m

An erasing rule without momentum and window needs no A: both sums share D, with r_i = η_i δ_i + ε_i p_i in place of ε_i p_i.

All matrices have a row 0 for "before the first token", so that reading before or after a token's write is a choice of rows.
One set serves all layers of a memory. Tokens that are masked neither decay nor write, nor add S to W.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestling.memory.gates import Factor


class Coefficients(NamedTuple):
    """Rows t = 0 … L; columns i over the halo and the tile's tokens. Leading dimensions as the gates'.

    keep        γ `[…, L+1]`, None: all ones
    carry       f `[…, L+1]`, None without momentum
    write       A `[…, L+1, halo + L]`, None where `step` stands for it
    running     D `[…, L+1, L]`, None without an erasing rule
    keep_s      m_L `[…]`, and write_s (EΓ)[L] `[…, halo + L]`; None without momentum
    step        η `[…, L]`, only for an erasing rule without momentum and window
    """

    keep: Tensor | None
    carry: Tensor | None
    write: Tensor | None
    running: Tensor | None
    keep_s: Tensor | None
    write_s: Tensor | None
    step: Tensor | None

    def each(self) -> list[Coefficients]:
        """Those of every tile. Dimension 2 counts tiles."""
        count = next(c.shape[2] for c in self if c is not None)
        return [Coefficients(*parts) for parts in zip(*(each(c, count) for c in self), strict=True)]


def each(x: Tensor | None, count: int) -> tuple[Tensor | None, ...]:
    """Tile by tile, along dimension 2. Taken apart at once, as the gradient of an index is as large as the whole."""
    return (None,) * count if x is None else x.unbind(2)


def products(gate: Factor) -> Tensor:
    """M[t,s] = Π_{s<j≤t} g_j for 0 ≤ s ≤ t ≤ L, else 0: `[…, L]` → `[…, L+1, L+1]`. Exact for gates of 0."""
    cumulative = torch.nn.functional.pad(gate.log.cumsum(-1), (1, 0))
    m: Tensor = _decays(cumulative) if torch.compiler.is_compiling() else _Decays.apply(cumulative)  # type: ignore[no-untyped-call]
    if gate.zero is None or gate.value is None:
        return m
    zeros = torch.nn.functional.pad(gate.zero.cumsum(-1), (1, 0))
    # The sum of the zeros' values inside (s, t] is 0, but it carries the derivative where exactly one zero lies inside.
    values = torch.nn.functional.pad(torch.where(gate.zero, gate.value, 0.0).cumsum(-1), (1, 0))
    count = zeros.unsqueeze(-1) - zeros.unsqueeze(-2)
    single = torch.where(count == 1, values.unsqueeze(-1) - values.unsqueeze(-2), 0.0)
    return m * torch.where(count == 0, 1.0, single)


def _decays(log: Tensor) -> Tensor:
    """exp(c_t − c_s) for s ≤ t, else 0: `[…, n]` → `[…, n, n]`."""
    upper = torch.ones(log.shape[-1], log.shape[-1], dtype=torch.bool, device=log.device).triu(1)
    return (log.unsqueeze(-1) - log.unsqueeze(-2)).masked_fill(upper, -torch.inf).exp()


class _Decays(torch.autograd.Function):
    """The same in place, and of its gradient the sums alone."""

    @staticmethod
    def forward(ctx: Any, log: Tensor) -> Tensor:
        m = (log.unsqueeze(-1) - log.unsqueeze(-2)).exp_().tril_()
        ctx.save_for_backward(m)
        return m

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (m,) = ctx.saved_tensors
        moved: Tensor = grad * m
        return moved.sum(-1) - moved.sum(-2)


def spread(lr: Tensor, window: Tensor, present: Tensor | None) -> Tensor:
    """Γ `[…, L, halo + L]`: the weights of a window in its tokens' steps; arguments as in `coefficients`."""
    halo, length = window.shape[-1] - 1, lr.shape[-1]
    lag = torch.arange(length, device=lr.device)[:, None] + halo - torch.arange(halo + length, device=lr.device)
    band = (lag >= 0) & (lag <= halo)
    gathered = window.gather(-1, lag.clamp(0, halo).expand(*window.shape[:-1], halo + length))
    gamma = lr.unsqueeze(-1) * torch.where(band, gathered, 0.0)
    return gamma if present is None else gamma * present.unsqueeze(-2)


def coefficients(
    lr: Tensor,
    retention: Factor | None,
    momentum: Factor | None,
    window: Tensor | None,
    *,
    alive: Tensor | None,
    present: Tensor | None,
    erases: bool,
    ahead: bool = False,
) -> Coefficients:
    """Build them for any number of tiles at once.

    lr, gates   `[lane, head, tile, L]`, 1 (lr: 0) where a token is masked;  window `[…, L, c]`
    alive       bool `[lane, 1, tile, L]`: tokens that act;  None: all
    present     bool `[lane, 1, tile, halo + L]`: tokens that a window may use;  None: all
    ahead       Nesterov's momentum: W adds μS − ηG in place of S
    """
    length = lr.shape[-1]
    if retention is None:
        d = torch.ones(length + 1, length + 1, dtype=lr.dtype, device=lr.device).tril().expand(*lr.shape[:-1], -1, -1)
        keep = None
    else:
        d = products(retention)
        keep = d[..., 0]
    running = d[..., 1:]
    gamma = None if window is None else spread(lr, window, present)
    if momentum is None and gamma is None and erases:
        return Coefficients(keep, None, None, running, None, None, lr)
    if momentum is None:
        write = running * lr.unsqueeze(-2) if gamma is None else running @ gamma
        return Coefficients(keep, None, write, running if erases else None, None, None, None)
    e = products(momentum)
    impulse = e[..., 1:, 1:] * lr.unsqueeze(-2) if gamma is None else e[..., 1:, 1:] @ gamma
    adding = running if alive is None else running * alive.unsqueeze(-2)
    m = e[..., 1:, 0]
    added, carried = impulse, m
    if ahead:
        mu = momentum.plain()
        added = mu.unsqueeze(-1) * impulse + (lr.diag_embed() if gamma is None else gamma)
        carried = mu * m
    return Coefficients(
        keep,
        (adding @ carried.unsqueeze(-1)).squeeze(-1),
        adding @ added,
        running if erases else None,
        m[..., -1],
        impulse[..., -1, :],
        None,
    )


def leading(
    lr: Tensor, momentum: Factor, window: Tensor | None, *, alive: Tensor | None, present: Tensor | None
) -> Coefficients:
    """Those of a leader, W_t = W_0 + η_t S_t with S_t = μ_t S_{t−1} − Σ γ_i G_i; arguments as in `coefficients`.

    `keep` is 1 where no token has acted yet and 0 behind, where what is not kept is W_0.
    """
    acting = torch.ones_like(lr) if alive is None else alive.to(lr.dtype).expand_as(lr)
    e = products(momentum)
    impulse = e[..., 1:, 1:] @ (acting.diag_embed() if window is None else spread(acting, window, present))
    m = e[..., 1:, 0]
    place = torch.arange(1, lr.shape[-1] + 1, device=lr.device)
    last = (
        torch.where(acting > 0, place, 0).cummax(-1).values
    )  # a token that does not act leaves the last one's weights
    begun = last > 0
    eta = torch.where(begun, lr.gather(-1, (last - 1).clamp_min(0)), 0.0)
    pad = torch.nn.functional.pad
    return Coefficients(
        pad((~begun).to(lr.dtype), (1, 0), value=1.0),
        pad(eta * m, (1, 0)),
        pad(eta.unsqueeze(-1) * impulse, (0, 0, 1, 0)),
        None,
        m[..., -1],
        impulse[..., -1, :],
        None,
    )
