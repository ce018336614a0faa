"""The layers that the papers compare with, against loops written here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import nestling as nl
from nestling.layers import LSTM, Memory, SelfReferential, l2_norm


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


@pytest.mark.parametrize("time", [9, 70])
def test_the_self_referential_matrix_is_its_equations_with_every_gradient(time: int) -> None:
    """Column vectors and four matrices, as the paper writes them; resets, invalid tokens and one that is not finite."""
    torch.manual_seed(2)
    layer = SelfReferential(6, 2).double()
    generator = torch.Generator().manual_seed(3)
    x = 3 * torch.randn(2, time, 6, dtype=torch.float64, generator=generator)
    reset, valid = torch.rand(2, time, generator=generator) < 0.1, torch.rand(2, time, generator=generator) < 0.9
    x[1, 4], valid[1, 4], reset[1, 4] = torch.nan, True, False
    weight = torch.randn(2, time, 6, dtype=torch.float64, generator=generator)
    y, state = layer(x, reset=reset, valid=valid)
    assert state.faults.tolist() == [0, 1]
    used = valid & x.isfinite().all(-1)
    (y[used] * weight[used]).sum().backward()
    got = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for lane in range(2):
        for t in range(time):
            if t == 0 or (reset[lane, t] and valid[lane, t]):
                parts = [
                    [m.T for m in w.split([3, 3, 3, 4], 1)] for w in layer.initial
                ]  # of each head: W^y, W^q, W^k, W^β
            if not used[lane, t]:
                continue
            answers = []
            for h in range(2):
                u = x[lane, t, 3 * h : 3 * h + 3].softmax(0)
                answer, q, k, b = (m @ u for m in parts[h])
                q, k = q.softmax(0), k.softmax(0)
                parts[h] = [m + b[i].sigmoid() * torch.outer(m @ q - m @ k, k) for i, m in enumerate(parts[h])]
                answers.append(answer)
            expected = layer.out.weight @ torch.cat(answers)
            torch.testing.assert_close(y[lane, t], expected, rtol=1e-8, atol=1e-8)
            total = total + (expected * weight[lane, t]).sum()
        torch.testing.assert_close(state.weights[lane], torch.stack([torch.cat(m).T for m in parts]))
    total.backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-8, atol=1e-8, msg=name)
