"""Levels of a continuum that learn by losses of their own, without the language model's (error="local"; not the paper's).

    k_t = RMSNorm(u_t)      v_t = g ∘ k_{t+1}             u the level's own inputs, g slow: a gain for each channel
    L_t = ℓ(MLP(k_t; θ), v_t)                            an attentional bias, ½‖·‖² unless said otherwise
    θ ← θ − Σ_{t in chunk} η ∇_θ L_t                     eq. 71 with this loss; served from the next token on

A level learns what comes after what in its own context flow. It is an associative memory that is asked where it is trained:
without clipping it is `nl.memory.scan` of a gated MLP with chunk C, gradient descent, nothing forgotten, and the read "boundary".
The gradient is a closed form, which the outer loop differentiates (g learns through it alone).

As with the model's loss, a window is the fastest period, counted from the lane's position 0, and its last token, whose successor
lies in the next one, has no loss. The state holds the inputs of the window that is open; when it closes its gradients are taken
at once, at weights that stood still, and `descent` says what the levels do with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nestling import state as fast
from nestling.layers import descent
from nestling.layers.descent import ContinuumState
from nestling.layers.pieces import Piece, merge, pieces, place, write
from nestling.layers.stride import Matrices, Window
from nestling.memory import GatedMLP, Report
from nestling.state import register

if TYPE_CHECKING:
    from nestling.layers.continuum import Continuum, FeedForward

FIRST_GAIN = 0.1
NETWORK = GatedMLP(activation="silu", residual=False, norm=False)


@register
class LocalState(NamedTuple):
    """Per lane.

    continuum  the fast weights
    open       u of every level that learns, `[lane, window, dim]`, zeros behind the tokens of the open window
    position   tokens since the lane's start or last reset, int64 `[lane]`, on the CPU
    """

    continuum: ContinuumState
    open: tuple[Tensor, ...]
    position: Tensor


def start(own: Continuum, lanes: int) -> LocalState:
    """Lanes that have read nothing."""
    continuum = own.start(lanes)
    assert continuum is not None
    assert own.window is not None
    down = [level.mlp.down.weight for period, level in own.each() if period is not None]
    return LocalState(
        continuum,
        tuple(
            torch.zeros(
                lanes, own.window, w.shape[0], dtype=torch.promote_types(w.dtype, torch.float32), device=w.device
            )
            for w in down
        ),
        torch.zeros(lanes, dtype=torch.int64),
    )


def read(
    own: Continuum,
    x: Tensor,
    state: LocalState,
    *,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    report: Report | None = None,
) -> tuple[Tensor, LocalState]:
    """x `[lane, time, dim]` → y of the same shape, new state; as a layer's forward."""
    check(own, state)
    assert own.window is not None
    time = x.shape[1]
    cut = list(pieces(state.position, time, reset, valid, own.window))
    if not cut:  # no valid token at all
        return torch.zeros_like(x), state
    at = torch.cat([piece.at for piece in cut], 1).to(x.device)
    plain = reset is None and valid is None and all(piece.mask is None for piece in cut)
    taken = x if plain else x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))
    outputs, notes = [], []
    for piece, part in zip(cut, torch.split(taken, [piece.at.shape[1] for piece in cut], 1), strict=True):
        y, after = _piece(own, part, state, piece)
        if report is not None:
            notes.append(Report())
            descent.note(notes[-1], state.continuum, after.continuum, piece)
        state = after
        outputs.append(y)
    if report is not None:
        merge(report, notes, cut, time)
    return torch.cat(outputs, 1) if plain else place(outputs, cut, (x.shape[0], time), 1), state


def _piece(own: Continuum, x: Tensor, state: LocalState, piece: Piece) -> tuple[Tensor, LocalState]:
    """Read tokens within a window, and learn where it ends with them. x `[lane, n, dim]`."""
    assert own.window is not None
    if piece.fresh is not None:
        state = fast.where(piece.fresh, start(own, len(x)), state, keep=("faults",))
    y, seen = own.chain(x, state.continuum.delta)
    learning = [n for n, period in enumerate(own.periods) if period is not None]
    offset, position = state.position % own.window, state.position + piece.length
    inputs = tuple(write(old, seen[n], offset, piece) for n, old in zip(learning, state.open, strict=True))
    continuum = state.continuum
    if bool(piece.closing.any()):
        found, moved = dict(zip(learning, inputs, strict=True)), descent.dense(continuum.delta)
        gradients = tuple(
            _gradients(own, level, found[n], moved[n]) if n in found else () for n, (_, level) in enumerate(own.each())
        )
        window = Window(own.window - 1, piece.closing, position)
        (continuum,) = descent.learn([own], [continuum], [gradients], window)
        inputs = tuple(torch.where(piece.closing.to(u.device)[:, None, None], 0.0, u) for u in inputs)
    return y, LocalState(continuum, inputs, position)


def _gradients(own: Continuum, level: FeedForward, u: Tensor, delta: Matrices) -> Matrices:
    """∂(Σ_t L_t)/∂θ per lane over a window, like `delta`, and what a rule that erases needs beside; u `[lane, window, dim]`."""
    assert level.value is not None
    with torch.autocast(u.device.type, enabled=False):
        (up, down), dtype = (w + d for w, d in zip(level.weights(), delta, strict=True)), delta[0].dtype
        k = level.norm(u.to(level.norm.weight.dtype)).to(dtype)
        v = k[:, 1:] * level.value.to(dtype)
        weights = (*(w.mT for w in up.chunk(2, 1)), down.mT)
        trace = NETWORK.trace(weights, k[:, :-1])
        errors = NETWORK.errors(weights, trace, own.bias.error(trace.prediction, v))
        gate, other, out = (e.mT @ x for x, e in zip(trace.inputs, errors, strict=True))
        found = torch.cat([gate, other], 1), out
    return (*found, *level.said(u[:, :-1], delta)) if own.rule.erases else found


def check(own: Continuum, state: LocalState) -> None:
    """Refuse a state of other levels."""
    came, fits = own.shapes(state.continuum), own.shapes()
    if came != fits or any(u.shape[1] != own.window for u in state.open):
        raise ValueError(
            f"the state of a continuum has weights {came} and windows of {[u.shape[1] for u in state.open]}; expected {fits} "
            f"and {own.window}: it was made by a model with other periods, widths or another inner rule"
        )


def paths(own: Continuum) -> dict[int, tuple[str, ...]]:
    """Which part of a `LocalState` is whose, beside the fast weights: by the level's number."""
    learning = [n for n, period in enumerate(own.periods) if period is not None]
    first = min(learning, key=lambda n: own.periods[n] or 0)
    return {n: (f"open.{place}", *(["position"] if n == first else [])) for place, n in enumerate(learning)}
