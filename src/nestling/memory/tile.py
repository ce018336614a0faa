"""A tile of tokens in a handful of matrix products: rank-one factors, what a rule erases, reads, and the weights after it.

The equations stand in `chunked`. Between lane and head there may be one more dimension, of memories that share their gates (see
`self_modifying`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from nestling.memory import fused
from nestling.memory.biases import Bias
from nestling.memory.coefficients import Coefficients
from nestling.memory.inputs import erase_strength, surely
from nestling.memory.networks.base import Network, at
from nestling.memory.retentions import Retention
from nestling.memory.state import Weights

if TYPE_CHECKING:
    from nestling.memory.spec import MemorySpec


class Factors(NamedTuple):
    """Rank-one gradients of a tile (halo first): x_l `[…, i, in_l]`, δ_l `[…, i, out_l]`, and which tokens were finite.

    products   x_l W_l at the anchor `[…, i, out_l]`
    """

    inputs: tuple[Tensor, ...]
    errors: tuple[Tensor, ...]
    finite: Tensor
    products: tuple[Tensor, ...]

    def only(self, keep: Tensor) -> Factors:
        """Those of the tokens in `keep` (bool `[…, i]`), others 0."""
        return Factors(only(keep, self.inputs), only(keep, self.errors), keep, only(keep, self.products))


class Writes(NamedTuple):
    """What a tile writes, per layer: W_t = γ_t W_0 + f_t S_0 − Σ_i A[t,i] x_iᵀ δ_i − Σ_i D[t,i] x_iᵀ e_i.

    inputs   x_l `[…, halo + i, in_l]`
    errors   δ_l `[…, halo + i, out_l]`; None where `erased` holds r_l, which has them inside
    erased   e_l or r_l `[…, i, out_l]`; None where nothing is erased
    """

    inputs: tuple[Tensor, ...]
    errors: tuple[Tensor, ...] | None
    erased: tuple[Tensor, ...] | None
    halo: int


class Reader(Protocol):
    """What `read` asks of a memory."""

    @property
    def read(self) -> Literal["after", "before", "boundary"]: ...
    @property
    def network(self) -> Network: ...
    @property
    def retention(self) -> Retention: ...


class Triangle(NamedTuple):
    """Of an erasing layer: X Xᵀ `[…, i, halo + i]`, the strengths ε `[…, i]` and (I + T)⁻¹ `[…, i, i]`."""

    gram: Tensor
    strength: Tensor
    inverse: Tensor


def factors(spec: MemorySpec, anchor: Sequence[Tensor], k: Tensor, v: Tensor) -> Factors:
    """Gradients at the anchor (weights, not dual). A token whose factors are not finite gets factors of 0."""
    found = gradients(spec.network, spec.bias, anchor, k, v)
    keep = found.finite.all(1, keepdim=True)
    if keep.device.type == "cpu" and not torch.compiler.is_compiling() and bool((~keep).any()):
        # Made again without them: factors that overflow have derivatives that are no numbers, and 0 times these neither.
        k, v = (torch.where(keep.unsqueeze(-1), x, 0.0) for x in (k, v))
        found = gradients(spec.network, spec.bias, anchor, k, v)
    return found.only(keep)


def gradients(network: Network, bias: Bias, anchor: Sequence[Tensor], k: Tensor, v: Tensor) -> Factors:
    """Rank-one gradients at the anchor as they come, finite or not."""
    trace = network.trace(anchor, k)
    errors = network.errors(anchor, trace, bias.error(trace.prediction, v))
    return Factors(trace.inputs, errors, sound((*trace.inputs, *errors)), trace.products)


def sound(rows: Weights) -> Tensor:
    """Which rows `[…, i, dim]` are finite in all of these."""
    total = rows[0].detach().sum(-1)
    for x in rows[1:]:
        total = total + x.detach().sum(-1)
    return torch.isfinite(total)


def only(keep: Tensor, rows: Weights) -> Weights:
    """Rows `[…, i, dim]` in `keep` as they are, others 0."""
    if surely(keep):
        return rows
    return tuple(torch.where(keep.unsqueeze(-1), x, 0.0) for x in rows)


def triangle(c: Coefficients, layer: int, x_all: Tensor, erase: Tensor, halo: int) -> Triangle:
    """The system of an erasing layer, which depends on its inputs and the gates alone."""
    assert c.running is not None
    gram = x_all[..., halo:, :] @ x_all.mT
    strength = erase_strength(erase, layer, gram.diagonal(halo, -2, -1))
    t = c.running[..., :-1, :] * gram[..., halo:] * strength.unsqueeze(-1)
    return Triangle(gram, strength, invert(t))


def invert(t: Tensor) -> Tensor:
    """(I + T)⁻¹ of strictly lower triangular T."""
    unit = torch.eye(t.shape[-1], dtype=t.dtype, device=t.device)
    inverse: Tensor = torch.linalg.solve_triangular(unit + t, unit.expand_as(t), upper=False, unitriangular=True)
    return inverse


def solve(
    found: Factors,
    c: Coefficients,
    weights: Weights,
    momentum: Weights,
    erase: Tensor | None,
    halo: int,
    begins: bool,
    first: Triangle | None = None,
    start: Weights = (),
) -> Writes:
    """Add what an erasing rule takes away: e_i = ε_i x_i W_{i−1}, on the running weights.

    begins  a chunk begins here, so that the weights are the anchor and their products known
    first   the first layer's system, where several memories have the same keys and it is known already
    start   initial weights, where what is not kept goes back to them
    """
    inputs, errors, _, products = found
    if erase is None:
        return Writes(inputs, errors, None, halo)
    erased = []
    for layer, (x_all, delta) in enumerate(zip(inputs, errors, strict=True)):
        x, before = x_all[..., halo:, :], slice(None, -1)
        system = first if first is not None and layer == 0 else triangle(c, layer, x_all, erase, halo)
        gram, strength, inverse = system
        scale = strength if c.keep is None else strength * c.keep[..., before]
        product = products[layer][..., halo:, :] if begins else x @ weights[layer]
        right = scale.unsqueeze(-1) * product
        if start and c.keep is not None:
            right = torch.addcmul(right, (strength - scale).unsqueeze(-1), x @ start[layer])
        if c.step is not None:
            right = torch.addcmul(right, c.step.unsqueeze(-1), delta)
        else:
            assert c.write is not None
            if momentum:
                assert c.carry is not None
                right = _plus_scaled(right, strength * c.carry[..., before], x, momentum[layer])
            right = _plus(right, strength.unsqueeze(-1) * (c.write[..., before, :] * gram), delta, -1)
        erased.append(inverse @ right)
    return Writes(inputs, None if c.step is not None else errors, tuple(erased), halo)


def read(
    spec: Reader,
    c: Coefficients,
    anchor: Sequence[Tensor],
    weights: Weights,
    momentum: Weights,
    writes: Writes,
    q: Tensor,
    scales: Weights = (),
    start: Weights = (),
) -> Tensor:
    """Answer every query of the tile with its own token's weights.

    scales  what a scaled retention makes weights of the dual with, in this chunk
    start   initial weights, where what is not kept goes back to them
    """
    if spec.read == "boundary":
        return spec.network.apply(at(anchor), q)
    rows = slice(1, None) if spec.read == "after" else slice(None, -1)
    keep = None if c.keep is None else c.keep[..., rows]
    carry = None if c.carry is None else c.carry[..., rows]
    columns = _columns(c, writes)[..., rows, :]

    def linear(layer: int, h: Tensor) -> Tensor:
        s = momentum[layer] if momentum else None
        x, r = _rows(writes, layer)
        z = fused.read(h, weights[layer], keep, s, carry, x, columns, r)
        if start and keep is not None:
            z = z + (1 - keep).unsqueeze(-1) * (h @ start[layer])
        return scales[layer] * z if scales else z

    def through_link(layer: int, h: Tensor) -> Tensor:
        moved = torch.einsum("...ti,...ia,...ib->...tab", columns, *_rows(writes, layer))
        dual = weights[layer].unsqueeze(-3)
        if c.keep is not None:
            dual = c.keep[..., rows, None, None] * dual
        if momentum and c.carry is not None:
            dual = dual + c.carry[..., rows, None, None] * momentum[layer].unsqueeze(-3)
        return (h.unsqueeze(-2) @ spec.retention.link(dual - moved)).squeeze(-2)

    return spec.network.apply(linear if spec.retention.linear or scales else through_link, q)


def advance(c: Coefficients, weights: Weights, momentum: Weights, writes: Writes) -> tuple[Weights, Weights]:
    """Weights and momentum after the tile."""
    new_weights, new_momentum = [], []
    keep = None if c.keep is None else c.keep[..., -1]
    last = _columns(c, writes)[..., -1, :]
    for layer, w in enumerate(weights):
        s, carry = None, None
        if momentum:
            assert c.carry is not None
            assert c.write_s is not None
            assert writes.errors is not None
            s, carry = momentum[layer], c.carry[..., -1]
            step = writes.inputs[layer], c.write_s, writes.errors[layer]
            new_momentum.append(fused.advance(s, c.keep_s, None, None, *step))
        x, r = _rows(writes, layer)
        new_weights.append(fused.advance(w, keep, s, carry, x, last, r))
    return tuple(new_weights), tuple(new_momentum)


def surprise_and_update(found: Factors, lr: Tensor, halo: int) -> tuple[Tensor, Tensor]:
    """Surprise ‖∂ℓ/∂z_n‖ and size of the token's own step, η √Σ_l (‖x_l‖‖δ_l‖)²."""
    squares = [
        x[..., halo:, :].square().sum(-1) * d[..., halo:, :].square().sum(-1)
        for x, d in zip(found.inputs, found.errors, strict=True)
    ]
    return found.errors[-1][..., halo:, :].norm(dim=-1).detach(), (lr * sum(squares).sqrt()).detach()  # type: ignore[union-attr]


def _rows(writes: Writes, layer: int) -> tuple[Tensor, Tensor]:
    """x and r of a layer such that W_t = γ_t W_0 + f_t S_0 − Σ_i C[t,i] x_iᵀ r_i, both sums in one."""
    inputs, errors, erased, halo = writes
    x = inputs[layer]
    if erased is None:
        assert errors is not None
        return x, errors[layer]
    own = x[..., halo:, :]
    if errors is None:
        return own, erased[layer]
    return torch.cat([x, own], -2), torch.cat([errors[layer], erased[layer]], -2)


def _columns(c: Coefficients, writes: Writes) -> Tensor:
    """Its coefficients C `[…, L+1, i]`."""
    found = [
        m for m, rows in ((c.write, writes.errors), (c.running, writes.erased)) if m is not None and rows is not None
    ]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def _plus_scaled(z: Tensor, scale: Tensor, h: Tensor, w: Tensor) -> Tensor:
    """z + diag(scale) h w, scaling the narrower side."""
    if w.shape[-2] <= w.shape[-1]:
        return _plus(z, scale.unsqueeze(-1) * h, w)
    return torch.addcmul(z, scale.unsqueeze(-1), h @ w)


def _plus(z: Tensor, a: Tensor, b: Tensor, sign: int = 1) -> Tensor:
    """z ± a b in one pass; a and b may lack z's dimension of memories."""
    lead = z.shape[:-2]

    def flat(x: Tensor) -> Tensor:
        return x.expand(*lead, *x.shape[-2:]).flatten(0, -3)

    return torch.baddbmm(flat(z), flat(a), flat(b), alpha=sign).view(z.shape)
