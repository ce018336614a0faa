"""Persistent tokens, and memory as context, gate and layer, against their equations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestling as nl
from nestling.layers import Memory, MemoryAsContext, MemoryAsGate, MemoryAsLayer, Persistent, SlidingAttention
from nestling.layers.rotary import rotate

SYSTEMS = ["titans", "gated_deltanet", "moneta", "atlas"]


def spec(system: str) -> nl.memory.MemorySpec:
    return nl.memory.named(system, key_dim=4, chunk=3)


def data(lanes: int, time: int) -> Tensor:
    return torch.randn(lanes, time, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def matter(layer: torch.nn.Module) -> torch.nn.Module:
    """Away from what initialization makes equal."""
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if name.endswith("norm.weight"):
                weight.add_(0.3 * torch.randn_like(weight))
    return layer.double()


def attended(layer: SlidingAttention, prefix: Tensor, x: Tensor) -> Tensor:
    """Dense attention over [prefix ‖ x]: every query sees the prefix and its window. `[lane, time, dim]`."""
    lanes, time, dim = x.shape
    number = prefix.shape[1]
    whole = torch.cat([prefix.expand(lanes, -1, -1), x], 1)
    q, k, v = layer.qkv(whole).view(lanes, number + time, 3, layer.heads, -1).unbind(2)
    position = torch.arange(number + time)[None].expand(lanes, -1)
    q, k = rotate(q, position, layer.base), rotate(k, position, layer.base)
    t, s = torch.arange(number + time)[:, None], torch.arange(number + time)
    mask = (s <= t) & ((s > t - layer.window) | (s < number))
    score = torch.einsum("lthd,lshd->lhts", q, k) / k.shape[-1] ** 0.5
    y = torch.einsum("lhts,lshd->lthd", score.masked_fill(~mask, -torch.inf).softmax(-1), v)
    return y.reshape(lanes, -1, dim)[:, number:]


@pytest.mark.parametrize("system", SYSTEMS)
def test_persistent_tokens_stand_before_the_first_and_after_every_reset(system: str) -> None:
    torch.manual_seed(0)
    inner = Memory(8, 2, spec(system))
    layer = Persistent(inner, 3, 8).double()
    x, reset = data(2, 11), torch.zeros(2, 11, dtype=torch.bool)
    valid = torch.ones(2, 11, dtype=torch.bool)
    reset[0, 4] = reset[0, 9] = reset[1, 7] = True
    valid[1, 2] = valid[0, 9] = False  # the reset of an invalid token is ignored
    report = nl.Report()
    y, state = layer(x, reset=reset, valid=valid, report=report)
    surprise = report[""]["surprise"]
    assert surprise.shape == (2, 2, 11)
    for lane, begin, end in ((0, 0, 4), (0, 4, 11), (1, 0, 7), (1, 7, 11)):
        mine = [t for t in range(begin, end) if valid[lane, t]]
        alone = nl.Report()
        expected, after = inner(torch.cat([layer.tokens, x[lane, mine]])[None], report=alone)
        torch.testing.assert_close(y[lane, mine], expected[0, 3:])
        torch.testing.assert_close(surprise[lane][:, mine], alone[""]["surprise"][0][:, 3:])
        if end == 11:
            for a, b in zip(nl.state.leaves(nl.state.take(state, [lane])), nl.state.leaves(after), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("system", SYSTEMS)
def test_memory_as_gate_is_its_equation(system: str) -> None:
    torch.manual_seed(1)
    layer = matter(MemoryAsGate(8, 2, spec(system), window=4, persistent=2))
    x = data(2, 13)
    y, _ = layer(x)
    tokens = layer.memory.tokens
    m, _ = layer.memory.layer(torch.cat([tokens.expand(2, -1, -1), x], 1))
    own = F.rms_norm(m[:, 2:], (8,), layer.memory_norm.weight, 1e-6)
    a = attended(layer.attention, tokens[None], x)
    expected = F.rms_norm(a, (8,), layer.attention_norm.weight, 1e-6) * torch.sigmoid(own)
    torch.testing.assert_close(y, expected @ layer.out.weight.T)


@pytest.mark.parametrize("system", SYSTEMS)
def test_memory_as_layer_is_its_equation(system: str) -> None:
    torch.manual_seed(2)
    layer = matter(MemoryAsLayer(8, 2, spec(system), window=4, persistent=2))
    x = data(2, 13)
    y, _ = layer(x)
    m, _ = layer.memory.layer(torch.cat([layer.memory.tokens.expand(2, -1, -1), x], 1))
    m = F.rms_norm(m, (8,), layer.memory_norm.weight, 1e-6)
    torch.testing.assert_close(y, attended(layer.attention, m[:, :2], m[:, 2:]) @ layer.out.weight.T)


@pytest.mark.parametrize("persistent", [0, 2])
@pytest.mark.parametrize("system", SYSTEMS)
def test_memory_as_context_is_its_equations_token_by_token(system: str, persistent: int) -> None:
    """Titans, eq. 21–25, with each token seeing what came before it: gradients too."""
    torch.manual_seed(3)
    segment = 4
    layer = matter(MemoryAsContext(8, 2, spec(system), segment=segment, persistent=persistent))
    x = data(2, 10)
    weight = torch.randn(2, 10, 8, dtype=torch.float64)
    y, _ = layer(x)
    (y * weight).sum().backward()
    got = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()

    def heads(u: Tensor, part: int) -> Tensor:
        return (u @ layer.qkv.weight[8 * part : 8 * part + 8].T).view(-1, 2, 4)

    total, network = torch.zeros((), dtype=torch.float64), layer.memory.spec.network
    for lane in range(2):
        state, outputs = layer.memory.start(1), []
        for begin in range(0, 10, segment):
            rows = x[lane, begin : begin + segment]
            stood = [layer.memory.spec.retention.link(w)[0] for w in state.memory.weights]  # M_{τ−1}
            fixed = [] if layer.tokens is None else list(layer.tokens)
            for j in range(len(rows)):
                recalled = []
                for row in rows[: j + 1]:
                    q = F.silu(row @ layer.memory.qkv.weight[:8].T).view(2, 1, 4)
                    q = q / (q.square().sum(-1, keepdim=True) + 1e-12).sqrt()
                    own = tuple(layer.memory.initial[network.depth :])
                    h = network.apply(lambda n, u, stood=stood: u @ stood[n], layer.memory.spec.features.apply(q, own))
                    recalled.append(F.rms_norm(h.flatten(), (8,), layer.recall_norm.weight, 1e-6))
                context = torch.stack([*fixed, *recalled, *rows[: j + 1]])
                at = [*range(persistent), *(persistent + i for i in range(j + 1))]
                at += [persistent + segment + i for i in range(j + 1)]
                keys = rotate(heads(context, 1)[None], torch.tensor(at)[None], layer.base)[0]
                asked = rotate(heads(rows[j : j + 1], 0)[None], torch.tensor(at[-1:])[None], layer.base)[0, 0]
                share = ((keys * asked).sum(-1) / 2).softmax(0)
                a = (share[..., None] * heads(context, 2)).sum(0).flatten()
                m, state = layer.memory(a[None, None], state)
                gate = torch.sigmoid(F.rms_norm(m[0, 0], (8,), layer.memory_norm.weight, 1e-6))
                o = F.rms_norm(a, (8,), layer.attention_norm.weight, 1e-6) * gate
                outputs.append(layer.out.weight @ o)
        expected = torch.stack(outputs)
        torch.testing.assert_close(y[lane], expected, rtol=1e-8, atol=1e-8)
        total = total + (expected * weight[lane]).sum()
    total.backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-6, atol=1e-8, msg=name)


def test_attention_never_crosses_a_segment_but_the_memory_does() -> None:
    torch.manual_seed(4)
    layer = MemoryAsContext(8, 2, spec("titans"), segment=4, persistent=2).double()
    x = data(1, 12)
    whole, _ = layer(x)
    assert not torch.allclose(whole[:, 8:], layer(x[:, 8:])[0], atol=1e-4)
    _, state = layer(x[:, :8])
    assert not state.key.any()
    assert not state.value.any()


def test_impossible_compositions_are_refused_in_words() -> None:
    own = nl.memory.named("self_modifying", key_dim=4)
    for make, words in (
        (lambda: MemoryAsContext(8, 2, own, segment=4, persistent=2), "MemoryAsGate"),
        (lambda: MemoryAsContext(8, 2, spec("titans"), segment=0, persistent=2), "segment is 0"),
        (lambda: MemoryAsContext(9, 3, nl.memory.named("titans", key_dim=3), segment=2, persistent=2), "even width"),
        (lambda: Persistent(Memory(8, 2, spec("titans")), -1, 8), "number is -1"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
