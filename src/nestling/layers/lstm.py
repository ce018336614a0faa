"""Long short-term memory: the recurrent network that the papers compare with, one token after another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from nestling import state as fast
from nestling.layers.base import Layer
from nestling.layers.level import Level, Period
from nestling.layers.pieces import Piece, pieces, place
from nestling.layers.stream import kept
from nestling.memory import Report
from nestling.state import register


@register
class LSTMState(NamedTuple):
    """Hidden and cell state `[lane, dim]`; tokens read, int64 `[lane]`, CPU, and those left out as not finite."""

    hidden: Tensor
    cell: Tensor
    position: Tensor
    faults: Tensor


class LSTM(Layer):
    """PyTorch's `nn.LSTM` of one layer, with a state per lane.

    i, f, o = σ(…),  g = tanh(…)  of (x_t, h_{t−1}),   c_t = f ∘ c_{t−1} + i ∘ g,   h_t = o ∘ tanh(c_t),   y_t = h_t
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cells = nn.LSTM(dim, dim, batch_first=True)

    def start(self, lanes: int) -> LSTMState:
        weight = self.cells.weight_hh_l0
        assert isinstance(weight, Tensor)
        zeros = weight.new_zeros(lanes, self.cells.hidden_size)
        none = torch.zeros(lanes, dtype=torch.int64)
        return LSTMState(zeros, zeros, none, none.to(zeros.device))

    def forward(
        self,
        x: Tensor,
        state: LSTMState | None = None,
        *,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        report: Report | None = None,
    ) -> tuple[Tensor, LSTMState]:
        lanes, time, _ = x.shape
        state = self.start(lanes) if state is None else state
        if time == 0:
            return x, state
        own = kept((x,), reset, valid)
        (x,), reset, valid = own.rows, own.reset, own.valid
        cut = list(pieces(torch.zeros_like(state.position), time, reset, valid, time))  # resets alone cut
        outputs = []
        for piece in cut:
            y, state = self._piece(
                x.gather(1, piece.at.to(x.device)[..., None].expand(-1, -1, x.shape[2])), state, piece
            )
            outputs.append(y)
        y = place(outputs, cut, (lanes, time), 1) if cut else torch.zeros_like(x)
        return own.answered(y), own.ended(state, self.start)

    def levels(self) -> list[Level]:
        return [
            Level(
                "cells",
                Period(1, "token"),
                network="vector of cells",
                bias="none of its own: the gates are made by the slow weights",
                retention="a share for each cell",
                rule="adds a gated candidate",
                flow="tokens",
                transfer="direct",
                params=self.own(),
                state_paths=("hidden", "cell", "position", "faults"),
            )
        ]

    def _piece(self, x: Tensor, state: LSTMState, piece: Piece) -> tuple[Tensor, LSTMState]:
        if piece.fresh is not None:
            state = fast.where(piece.fresh, self.start(len(x)), state, keep=("faults",))
        lanes = piece.length.nonzero()[:, 0]  # those that have a token
        at = lanes.to(x.device)
        before = tuple(u.index_select(0, at).to(x.dtype)[None] for u in state[:2])
        if piece.mask is None:
            y, after = self.cells(x, before)
        else:
            packed = pack_padded_sequence(x[at], piece.length[lanes], batch_first=True, enforce_sorted=False)
            packed, after = self.cells(packed, before)
            part, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
            y = x.new_zeros(x.shape).index_copy(0, at, part)
        hidden, cell = (u.to(v.dtype).index_copy(0, at, v[0]) for u, v in zip(state[:2], after, strict=True))
        return y, LSTMState(hidden, cell, state.position + piece.length, state.faults)
