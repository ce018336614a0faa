"""The layers that the papers compare with, against loops written here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import nestling as nl
from nestling.layers import LSTM, Memory, l2_norm


def test_lstm_is_its_equations_with_resets_and_invalid_tokens() -> None:
    torch.manual_seed(0)
    layer = LSTM(5).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 14, 5, dtype=torch.float64, generator=generator)
    reset, valid = torch.rand(3, 14, generator=generator) < 0.2, torch.rand(3, 14, generator=generator) < 0.7
    valid[2] = False  # a lane without a token
    y, state = layer(x, reset=reset, valid=valid)
    cells = layer.cells
    for lane in range(3):
        h = c = torch.zeros(5, dtype=torch.float64)
        for t in range(14):
            if not valid[lane, t]:
                continue
            if reset[lane, t]:
                h = c = torch.zeros(5, dtype=torch.float64)
            z = cells.weight_ih_l0 @ x[lane, t] + cells.bias_ih_l0 + cells.weight_hh_l0 @ h + cells.bias_hh_l0
            i, f, g, o = z.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            torch.testing.assert_close(y[lane, t], h)
        torch.testing.assert_close(state.hidden[lane], h)
        torch.testing.assert_close(state.cell[lane], c)


@pytest.mark.parametrize(
    ("system", "settings"),
    [("mamba2_like", {"tied": True}), ("comba_like", {"delta": True}), ("rwkv7_like", {"delta": True})],
)
def test_gates_of_the_baselines_are_what_they_say(system: str, settings: dict[str, bool]) -> None:
    torch.manual_seed(1)
    spec = nl.memory.named(system, key_dim=4)
    layer = Memory(8, 2, spec, **settings).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    y, _ = layer(x)
    mixed, _ = layer.convolution(layer.qkv(x))
    q, k, v = (p.reshape(2, 9, 2, 4).transpose(1, 2) for p in mixed.chunk(3, -1))
    raw = layer.gates(x).reshape(2, 9, 2, -1).transpose(1, 2)
    if system == "mamba2_like":
        lr = F.softplus(raw[..., 0])
        gates = nl.memory.Gates(lr=lr, retention=torch.exp(-layer.rate.exp()[:, None] * lr))
    elif system == "comba_like":
        lr, retention, delta = raw.sigmoid().unbind(-1)
        gates = nl.memory.Gates(lr=lr, retention=retention, delta=delta)
    else:
        lr, delta = raw[..., 0].sigmoid(), raw[..., -1].sigmoid()
        gates = nl.memory.Gates(lr=lr, retention=raw[..., 1:5].sigmoid(), delta=delta)
    out, _ = nl.memory.scan(spec, tuple(layer.initial), l2_norm(q), l2_norm(k), v, gates, engine="reference")
    expected = layer.out(layer.norm(out).transpose(1, 2).reshape(2, 9, 8) * F.silu(layer.gate(x)))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("settings", [{"delta": True}, {"tied": True}])
def test_gates_that_a_memory_does_not_read_are_refused_in_words(settings: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="linear_attention reads the gates lr"):
        Memory(8, 2, nl.memory.named("linear_attention", key_dim=4), **settings)
