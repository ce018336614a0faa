"""The parts beside the memories, against loops written here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import nestling as nl
from nestling.layers import Attention, Memory, ShortConvolution, l2_norm
from nestling.layers.memory import MemoryLayerState
from nestling.memory import L2, Decay, Matrix, MemorySpec, Omega


def test_short_convolution_is_its_sum_with_resets_and_invalid_tokens() -> None:
    """y_t = SiLU(Σ_j w_j x of the j-th last valid token since the reset), token by token."""
    generator = torch.Generator().manual_seed(0)
    layer = ShortConvolution(5, 4).double()
    x = torch.randn(3, 17, 5, generator=generator, dtype=torch.float64)
    reset = torch.rand(3, 17, generator=generator) < 0.15
    valid = torch.rand(3, 17, generator=generator) < 0.7
    y, tail = layer(x, reset=reset, valid=valid)
    for lane in range(3):
        past: list[torch.Tensor] = []
        for t in range(17):
            if not valid[lane, t]:
                continue
            if reset[lane, t]:
                past = []
            past.append(x[lane, t])
            expected = sum(layer.weight[j] * past[-1 - j] for j in range(min(4, len(past))))
            torch.testing.assert_close(y[lane, t], F.silu(expected))
        kept = [torch.zeros(5, dtype=torch.float64)] * 3 + past
        torch.testing.assert_close(tail[lane], torch.stack(kept[-3:]))


def test_attention_is_nadaraya_watson_over_rotated_keys() -> None:
    """Each answer is the exp(q·k)-weighted mean of the values so far, the minimizer of the weighted squared error."""
    torch.manual_seed(0)
    layer = Attention(8, 2).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    y, _ = layer(x)
    q, k, v = layer.qkv(x).view(1, 6, 3, 2, 4).unbind(2)

    def rotate(u: torch.Tensor, t: int) -> torch.Tensor:
        turn = torch.polar(torch.ones(2).double(), t * 10_000.0 ** (-torch.arange(2).double() / 2))
        z = torch.complex(u[:, :2], u[:, 2:]) * turn
        return torch.cat([z.real, z.imag], -1)

    for t in range(6):
        weights = torch.stack([(rotate(q[0, t], t) * rotate(k[0, s], s)).sum(-1) for s in range(t + 1)]) / 2
        mixed = (weights.softmax(0)[..., None] * v[0, : t + 1]).sum(0)
        torch.testing.assert_close(y[0, t], layer.out(mixed.flatten()))


def test_l2_norm_is_safe_at_zero() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    y = l2_norm(x)
    y.sum().backward()
    assert not y.any()
    assert torch.isfinite(x.grad).all()
    torch.testing.assert_close(l2_norm(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))


def test_memory_layer_feeds_its_spec_what_it_says() -> None:
    """The layer around the reference engine, assembled here from its parts."""
    torch.manual_seed(1)
    spec = nl.memory.named("titans", key_dim=4, chunk=3)
    layer = Memory(8, 2, spec).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    y, _ = layer(x)
    mixed, _ = layer.convolution(layer.qkv(x))
    q, k, v = (p.reshape(2, 11, 2, 4).transpose(1, 2) for p in mixed.chunk(3, -1))
    raw = layer.gates(x).reshape(2, 11, 2, 3).permute(3, 0, 2, 1)
    gates = nl.memory.Gates(lr=3**-0.5 * raw[0].sigmoid(), momentum=raw[1].sigmoid(), retention=raw[2].sigmoid())
    out, _ = nl.memory.scan(spec, tuple(layer.initial), l2_norm(q), l2_norm(k), v, gates, engine="reference")
    expected = layer.out(layer.norm(out).transpose(1, 2).reshape(2, 11, 8) * F.silu(layer.gate(x)))
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


def test_under_autocast_the_fast_weights_stay_in_float32() -> None:
    layer = Memory(8, 2, nl.memory.named("titans", key_dim=4)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(torch.randn(1, 20, 8))
    assert y.dtype == torch.bfloat16
    assert all(w.dtype == torch.float32 for w in (*state.memory.weights, *state.memory.momentum))


def test_reports_reach_through_a_model() -> None:
    report = nl.Report()
    model = nl.models.build("titans_lmm")
    model(torch.randint(257, (2, 9)), report=report)
    assert list(report) == ["blocks.0.mixer", "blocks.1.mixer"]
    assert report["blocks.1.mixer"]["surprise"].shape == (2, 4, 9)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Attention(10, 3), "heads"),
        (lambda: ShortConvolution(3, 0), "width is 0"),
        (lambda: Memory(8, 2, nl.memory.named("titans", key_dim=8)), "key_dim=8"),
    ],
)
def test_impossible_layers_are_refused_in_words(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", ["titans", "gated_deltanet", "self_modifying", "trellis"])
def test_no_lanes_at_all(name: str) -> None:
    spec = nl.memory.named(name, key_dim=8, chunk=4)
    layer = (nl.layers.SelfModifying if name == "self_modifying" else nl.layers.Memory)(8, 1, spec)
    y, state = layer(torch.zeros(0, 9, 8))
    y.sum().backward()
    assert y.shape == (0, 9, 8)
    assert layer(torch.zeros(0, 3, 8), state)[0].shape == (0, 3, 8)


def fades(name: str) -> bool:
    """Whether a memory is deep and decays; self_modifying makes its own gates, and dot grows."""
    spec = nl.memory.named(name, key_dim=16)
    return spec.deep and "retention" in spec.gates_used and name not in ("self_modifying", "dot")


DEEP = [name for name in nl.memory.names() if fades(name)]


@pytest.mark.parametrize("name", DEEP)
def test_the_gradient_does_not_swell_with_what_was_read(name: str) -> None:
    """Where weights fade behind a norm, its slope grows as they get small: after 2,048 tokens twice to 300 times the gradient, at
    the α ≈ 0.98 that matrices begin with. Then a model does not train."""
    torch.manual_seed(0)
    layer = Memory(32, 2, nl.memory.named(name, key_dim=16))
    x, along = torch.randn(2, 2112, 32), torch.randn(2, 64, 32)

    def size(state: MemoryLayerState | None) -> float:
        layer.zero_grad()
        (layer(x[:, 2048:], state)[0] * along).sum().backward()
        return float(torch.stack([p.grad.norm() for p in layer.parameters() if p.grad is not None]).norm())

    with torch.no_grad():
        state = layer(x[:, :2048])[1]
    assert size(state) < 1.1 * size(None)


def windowed(lags: int = 8, window: float = 10.0) -> Memory:
    """Open gates: the largest steps, nothing forgotten, and every token of the window as this bias says."""
    spec = MemorySpec(32, 32, network=Matrix(), bias=Omega(L2(), lags), retention=Decay(), chunk=16)
    layer = Memory(32, 1, spec)
    with torch.no_grad():
        layer.gates.weight.zero_()
        for kind, own in zip(layer.kinds, layer.gates.bias.split(list(layer.kinds.values())), strict=True):
            own.fill_(window if kind == "window" else 10.0)
    return layer


def test_a_window_with_all_gates_open_steps_no_further_than_one_token() -> None:
    """Keys behind SiLU are alike: as a sum, the steps of a window leave the region in which they descend."""
    torch.manual_seed(0)
    layer, x = windowed(), torch.randn(2, 512, 32)
    with torch.no_grad():
        gates = layer._gates(x)
        torch.testing.assert_close(gates.window, torch.full_like(gates.window, 1 / 8))
        _, state = layer(x)
        assert float(state.memory.weights[0].abs().max()) < 100
        q, k, v = (torch.randn(2, 1, 512, 32) for _ in range(3))
        q, k = l2_norm(F.silu(q + 0.5)), l2_norm(F.silu(k + 0.5))
        largest = []
        for window in (gates.window, torch.ones_like(gates.window)):
            _, memory = layer.spec.scan(layer._first(), q, k, v, replace(gates, window=window))
            largest.append(float(memory.weights[0].abs().max()))
        assert largest[0] < 100
        assert not largest[1] < 1e10


def test_a_window_whose_gates_are_all_closed_writes_nothing_and_has_finite_gradients() -> None:
    torch.manual_seed(0)
    layer = windowed(window=-1e4)
    gates = layer._gates(torch.randn(1, 5, 32))
    assert not gates.window.any()
    y, _ = layer(torch.randn(1, 20, 32))
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


def test_under_muon_a_layer_begins_with_small_steps_long_momentum_and_slow_decay() -> None:
    """Each of the three by itself leaves gradients that grow, at one chunk or another."""
    layer = Memory(32, 4, nl.memory.named("atlas", key_dim=8, chunk=4))
    sizes = list(layer.kinds.values())
    first = dict(zip(layer.kinds, layer.gates.bias.detach().view(4, -1).split(sizes, -1), strict=True))
    assert layer.lr_max == (0.05,)
    assert {kind: float(bias.unique()) for kind, bias in first.items() if kind != "window"} == {
        "lr": -1.0,
        "momentum": 2.0,
        "retention": 11.0,
    }


def test_a_layer_is_exported_with_its_number_of_lanes_left_open() -> None:
    class Answers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Memory(16, 2, nl.memory.named("titans", key_dim=8, chunk=4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)[0]

    model = Answers().eval()
    lanes = torch.export.Dim("lanes")
    exported = torch.export.export(model, (torch.randn(2, 1, 16),), dynamic_shapes={"x": {0: lanes}}, strict=False)
    x = torch.randn(3, 1, 16)
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-5, atol=1e-6)
