"""The engine's two products with running weights, each as one step of autograd.

    read       z_t = γ_t h_t W_0 + f_t h_t S_0 − Σ_i C[t,i] (h_t·x_i) r_i
    advance    W = γ W_0 + f S_0 − Σ_i a_i x_iᵀ r_i,      S = m S_0 − Σ_i b_i x_iᵀ r_i

Left to autograd, the passes over wide tensors that scale, sum and keep what is between the matrix products take longer than the
products. Here each factor is put on the narrower side of its product, sums are taken inside the products, and what lies between
is made again. A second derivative, and a compiler, which fuses by itself, take the formula as it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Parts = tuple[Tensor | None, ...]


def read(
    h: Tensor,
    w: Tensor,
    keep: Tensor | None,
    s: Tensor | None,
    carry: Tensor | None,
    x: Tensor,
    coefficient: Tensor,
    rows: Tensor,
) -> Tensor:
    """h `[…, t, in]`, W and S `[…, in, out]`, γ and f `[…, t]`, x `[…, i, in]`, C `[…, t, i]`, r `[…, i, out]` → z `[…, t, out]`.

    keep None: γ = 1;  s and carry None: no S. All but W may be without some of W's leading dimensions.
    """
    lead = w.shape[:-2]
    parts = (
        flat(lead, h, 2),
        flat(lead, w, 2),
        flat(lead, keep, 1),
        flat(lead, s, 2),
        flat(lead, carry, 1),
        flat(lead, x, 2),
        flat(lead, coefficient, 2),
        flat(lead, rows, 2),
    )
    z = _read(*parts) if torch.compiler.is_compiling() else _Read.apply(*parts)  # type: ignore[no-untyped-call]
    return z.view(*lead, *z.shape[-2:])


def advance(
    w: Tensor, keep: Tensor | None, s: Tensor | None, carry: Tensor | None, x: Tensor, a: Tensor, rows: Tensor
) -> Tensor:
    """γ W + f S − Σ_i a_i x_iᵀ r_i with γ and f `[…]`, a `[…, i]`; shapes else, and None, as in `read`."""
    lead = w.shape[:-2]
    parts = (
        flat(lead, w, 2),
        flat(lead, keep, 0),
        flat(lead, s, 2),
        flat(lead, carry, 0),
        flat(lead, x, 2),
        flat(lead, a, 1),
        flat(lead, rows, 2),
    )
    new = _advance(*parts) if torch.compiler.is_compiling() else _Advance.apply(*parts)  # type: ignore[no-untyped-call]
    return new.view(w.shape)


def flat(lead: torch.Size, x: Tensor | None, own: int) -> Any:
    """`[…, own dimensions]` → `[batch, own dimensions]`, a view wherever it can be one."""
    if x is None:
        return None
    mine = x.shape[x.dim() - own :]
    return (x if x.shape[: x.dim() - own] == lead else x.expand(*lead, *mine)).reshape(-1, *mine)


def _narrow(w: Tensor) -> bool:
    """Whether the input side is the narrower one, to put factors on."""
    return w.shape[-2] <= w.shape[-1]


def _read(
    h: Tensor,
    w: Tensor,
    keep: Tensor | None,
    s: Tensor | None,
    carry: Tensor | None,
    x: Tensor,
    coefficient: Tensor,
    rows: Tensor,
) -> Tensor:
    z = _scaled(keep, h, w)
    if s is not None:
        z = z + _scaled(carry, h, s)
    return torch.baddbmm(z, coefficient * (h @ x.mT), rows, alpha=-1)


def _scaled(scale: Tensor | None, h: Tensor, w: Tensor) -> Tensor:
    if scale is None:
        return h @ w
    return (scale.unsqueeze(-1) * h) @ w if _narrow(w) else scale.unsqueeze(-1) * (h @ w)


def _advance(
    w: Tensor, keep: Tensor | None, s: Tensor | None, carry: Tensor | None, x: Tensor, a: Tensor, rows: Tensor
) -> Tensor:
    new = w if keep is None else keep[:, None, None] * w
    if s is not None:
        assert carry is not None
        new = torch.addcmul(new, carry[:, None, None], s)
    return torch.baddbmm(new, *_sides(x, a, rows), alpha=-1)


def _sides(x: Tensor, a: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """xᵀ and r, one of them times a."""
    if x.shape[-1] <= rows.shape[-1]:
        return (a.unsqueeze(-1) * x).mT, rows
    return x.mT, a.unsqueeze(-1) * rows


def again(formula: Callable[..., Tensor], saved: Parts, grad: Tensor) -> Parts:
    """Gradients that can be differentiated once more.

    To names of their own: where one input was made from another, the way through it is not to be counted here.
    """
    saved = tuple(x.view_as(x) if x is not None and x.requires_grad else x for x in saved)
    wanted = [x for x in saved if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(formula(*saved), wanted, grad, create_graph=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in saved)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        w: Tensor,
        keep: Tensor | None,
        s: Tensor | None,
        carry: Tensor | None,
        x: Tensor,
        coefficient: Tensor,
        rows: Tensor,
    ) -> Tensor:
        # The narrow products whose scale stands behind them are kept for the gradient of that scale.
        at_w, at_s = None, None
        if keep is None or _narrow(w):
            z = _scaled(keep, h, w)
        else:
            at_w = h @ w
            z = keep.unsqueeze(-1) * at_w
        if s is not None:
            assert carry is not None
            if _narrow(s):
                z.baddbmm_(carry.unsqueeze(-1) * h, s)
            else:
                at_s = h @ s
                z.addcmul_(carry.unsqueeze(-1), at_s)
        ctx.save_for_backward(h, w, keep, s, carry, x, coefficient, rows, at_w, at_s)
        return z.baddbmm_((h @ x.mT).mul_(coefficient), rows, alpha=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Parts:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(_read, saved[:8], grad)
        h, w, keep, s, carry, x, coefficient, rows, at_w, at_s = saved
        grad = grad.contiguous()
        of = grad @ rows.mT  # of −P, where z = … − P r and P = C ∘ h xᵀ
        gram = h @ x.mT
        d_rows = ((gram * coefficient).mT @ grad).neg_()
        d_coefficient = gram.mul_(of).neg_()
        d_gram = of.mul_(coefficient).neg_()
        d_h, d_x = d_gram @ x, d_gram.mT @ h
        d_w, d_keep = _back_scaled(keep, h, w, at_w, grad, d_h)
        d_s, d_carry = (None, None) if s is None else _back_scaled(carry, h, s, at_s, grad, d_h)
        return d_h, d_w, d_keep, d_s, d_carry, d_x, d_coefficient, d_rows


def _back_scaled(
    scale: Tensor | None, h: Tensor, w: Tensor, product: Tensor | None, grad: Tensor, d_h: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of diag(scale) h w to w and scale; that to h is added to d_h. product: h w, where the scale stands behind it."""
    if scale is None:
        d_h.baddbmm_(grad, w.mT)
        return h.mT @ grad, None
    column = scale.unsqueeze(-1)
    if product is None:
        back = grad @ w.mT
        d_h.addcmul_(column, back)
        return (column * h).mT @ grad, back.mul_(h).sum(-1)
    scaled = column * grad
    d_h.baddbmm_(scaled, w.mT)
    return h.mT @ scaled, (product * grad).sum(-1)


class _Advance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        keep: Tensor | None,
        s: Tensor | None,
        carry: Tensor | None,
        x: Tensor,
        a: Tensor,
        rows: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(w, keep, s, carry, x, a, rows)
        left, right = _sides(x, a, rows)
        if keep is None and s is None:
            return torch.baddbmm(w, left, right, alpha=-1)
        new = w.clone() if keep is None else keep[:, None, None] * w
        if s is not None:
            assert carry is not None
            new.addcmul_(carry[:, None, None], s)
        return new.baddbmm_(left, right, alpha=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Parts:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return again(_advance, saved, grad)
        w, keep, s, carry, x, a, rows = saved
        grad = grad.contiguous()
        column = a.unsqueeze(-1)
        if x.shape[-1] <= rows.shape[-1]:
            d_rows = ((column * x) @ grad).neg_()
            back = (rows @ grad.mT).neg_()
            d_x, d_a = column * back, back.mul_(x).sum(-1)
        else:
            d_x = ((column * rows) @ grad.mT).neg_()
            back = (x @ grad).neg_()
            d_rows, d_a = column * back, back.mul_(rows).sum(-1)
        d_w, d_keep, d_s, d_carry = grad, None, None, None
        product = torch.empty_like(grad) if keep is not None or s is not None else grad
        if s is not None:
            d_carry = torch.mul(grad, s, out=product).sum((1, 2))
            d_s = carry[:, None, None] * grad
        if keep is not None:
            d_keep = torch.mul(grad, w, out=product).sum((1, 2))
            d_w = torch.mul(grad, keep[:, None, None], out=product)
        return d_w, d_keep, d_s, d_carry, d_x, d_a, d_rows
