"""TNT against loops written here from its equations, and every identity that follows from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestling as nl
from nestling.memory import L2, MLP, DotProduct, Full, Gates, Gradient, Matrix, MemorySpec, Tnt

D, HEADS = 4, 2


def plain(chunk: int, network: object = MLP(), bias: object = L2(), read: str = "after") -> MemorySpec:
    """Gradient descent alone, as the paper writes it."""
    return MemorySpec(D, D, network, bias, Full(), Gradient(), chunk=chunk, read=read)  # type: ignore[arg-type]


def data(seed: int, time: int, lanes: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(lanes, HEADS, time, D, generator=g, dtype=torch.float64) for _ in range(3))
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v


def weights(spec: nl.memory.Memory, seed: int = 1, grad: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [(0.5 * torch.randn(HEADS, *s, generator=g, dtype=torch.float64)).requires_grad_(grad) for s in spec.shapes]


def steps(count: int, time: int, seed: int = 2, lanes: int = 2) -> Tensor:
    """η of `count` memories, `[lane, head, time, memory]`."""
    g = torch.Generator().manual_seed(seed)
    return 0.1 + 0.3 * torch.rand(lanes, HEADS, time, count, generator=g, dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def f(w: list[Tensor], x: Tensor) -> Tensor:
    """x + LN(GELU(x W₁) W₂) for one token of one lane and head."""
    h = F.gelu(x @ w[0]) @ w[1]
    return x + F.layer_norm(h, h.shape, eps=1e-6)


def gradient(w: list[Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in w]
    return torch.autograd.grad(0.5 * (f(leaves, k) - v).square().sum(), leaves)


def equations(
    w0: list[Tensor], q: Tensor, k: Tensor, v: Tensor, eta: Tensor, chunks: list[int], shards: list[int], literal: bool
) -> Tensor:
    """Eq. 5–7 for one lane and head: q, k, v `[time, dim]`, eta `[time, memory]`; the first memory is the global one."""
    out = []
    now = [w0[2 * n : 2 * n + 2] for n in range(len(chunks))]
    anchor = list(now)
    for t in range(len(q)):
        y = torch.zeros(D, dtype=torch.float64)
        for n, chunk in enumerate(chunks):
            if n > 0 and t % shards[n - 1] == 0:
                now[n] = w0[2 * n : 2 * n + 2]
            since = t if n == 0 else t % shards[n - 1]
            if since % chunk == 0:
                anchor[n] = now[n]
            now[n] = [w - eta[t, n] * g for w, g in zip(now[n], gradient(anchor[n], k[t], v[t]), strict=True)]
            if n == 0:
                y = y + f(anchor[0], q[t])
                continue
            seen = k[t - since : t + 1]
            read = sum(torch.outer(s, s) / s.square().sum() for s in seen) @ q[t]
            y = y + f(now[n], read if literal else nl.layers.l2_norm(read))
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("engine", ["reference", "chunked"])
@pytest.mark.parametrize("projection", ["normalized", "literal"])
def test_both_engines_are_the_papers_equations(projection: str, engine: str) -> None:
    spec = Tnt(D, D, plain(6), (plain(2), plain(3)), shard=(6, 12), global_chunk=None, projection=projection)  # type: ignore[arg-type]
    w0, (q, k, v), eta = weights(spec), data(0, 29), steps(3, 29)
    y, _ = spec.scan(w0, q, k, v, Gates(lr=eta), engine=engine)  # type: ignore[arg-type]
    for lane, head in ((0, 1), (1, 0)):
        own = [w[head] for w in w0]
        expected = equations(
            own,
            q[lane, head],
            k[lane, head],
            v[lane, head],
            eta[lane, head],
            [6, 2, 3],
            [6, 12],
            projection == "literal",
        )
        close(y[lane, head], expected)


@pytest.mark.parametrize("chunk", [1, 4])
def test_one_local_memory_of_an_endless_shard_is_the_memory_itself(chunk: int) -> None:
    """Eq. 3–4, and with chunk 1 the online rule of eq. 1–2."""
    inner = nl.memory.named("titans", key_dim=D, chunk=chunk)
    spec = Tnt(D, D, None, (inner,), shard=1000, projection="none")
    q, k, v, gates = inner.example(torch.Generator().manual_seed(3), time=23, dtype=torch.float64)
    w0 = weights(spec)
    y, state = spec.scan(w0, q, k, v, gates)
    expected, end = inner.scan(w0, q, k, v, gates)
    close(y, expected)
    close(state.parts[0].weights[0], end.weights[0])
    if chunk == 1:
        online, (q, k, v), eta = replace(spec, locals=(plain(1),)), data(1, 9, 1), steps(1, 9, lanes=1)
        y, _ = online.scan(w0, q, k, v, Gates(lr=eta[..., 0]))
        own = [w[0] for w in w0]
        for t in range(9):
            own = [w - eta[0, 0, t, 0] * g for w, g in zip(own, gradient(own, k[0, 0, t], v[0, 0, t]), strict=True)]
            close(y[0, 0, t], f(own, q[0, 0, t]))


def test_the_global_memory_alone_answers_its_first_chunk_from_the_initial_weights() -> None:
    spec = Tnt(D, D, plain(8), ())
    w0, (q, k, v), eta = weights(spec), data(4, 20), steps(1, 20)[..., 0]
    y, _ = spec.scan(w0, q, k, v, Gates(lr=eta))
    static = spec.memories[0].network.apply(lambda n, h: h @ w0[n], q)  # type: ignore[attr-defined]
    close(y[:, :, :8], static[:, :, :8])
    assert (y[:, :, 8:] - static[:, :, 8:]).abs().amax(-1).min() > 1e-6
    close(replace(spec, global_chunk=20).scan(w0, q, k, v, Gates(lr=eta))[0], static)


def test_shards_side_by_side_are_shards_one_after_the_other() -> None:
    """Also in the gradients of W_init, which every shard sends back."""
    inner = nl.memory.named("titans", key_dim=D, chunk=3)
    spec = Tnt(D, D, None, (inner,), shard=8, projection="none")
    w0 = weights(spec, grad=True)
    q, k, v, gates = inner.example(torch.Generator().manual_seed(5), time=40, dtype=torch.float64)
    y, _ = spec.scan(w0, q, k, v, gates)
    parts = [
        inner.scan(w0, *(x[:, :, s : s + 8] for x in (q, k, v)), gates[s : s + 8], engine="reference")[0]
        for s in range(0, 40, 8)
    ]
    close(y, torch.cat(parts, 2), 1e-12)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(6), dtype=y.dtype)
    ours = torch.autograd.grad((y * probe).sum(), w0)
    theirs = torch.autograd.grad((torch.cat(parts, 2) * probe).sum(), w0)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-12)


def reach(spec: Tnt, time: int, token: int) -> list[int]:
    """Outputs that depend on a token's key and value."""
    w0, (q, k, v) = weights(spec), data(7, time, 1)
    k, v = k.requires_grad_(), v.requires_grad_()
    _, _, _, gates = spec.example(torch.Generator().manual_seed(8), lanes=1, time=time, dtype=torch.float64)
    y, _ = spec.scan(w0, q, k, v, gates)
    found, probe = [], torch.randn(D, generator=torch.Generator().manual_seed(23), dtype=y.dtype)
    for t in range(time):
        grads = torch.autograd.grad((y[:, :, t] * probe).sum(), (k, v), retain_graph=True)
        if any(bool(g[:, :, token].any()) for g in grads):
            found.append(t)
    return found


def test_a_local_memory_sees_its_shard_and_the_global_one_earlier_global_chunks_only() -> None:
    local = nl.memory.named("tnt", key_dim=D, chunk=2, shard=6, global_=None)
    assert reach(local, 18, 7) == list(range(7, 12))
    assert reach(nl.memory.named("tnt", key_dim=D, locals=(), global_chunk=4), 18, 5) == list(range(8, 18))
    both = nl.memory.named("tnt", key_dim=D, chunk=2, shard=6, global_chunk=3)
    assert reach(both, 18, 7) == list(range(7, 18)), "no gap where the global chunk divides the shard"
    assert reach(replace(both, global_chunk=12), 18, 4) == [4, 5, *range(12, 18)], "a gap where it is longer"


@pytest.mark.parametrize("token", [0, 3, 5, 6, 8, 11, 12, 17])
def test_the_sum_is_causal_at_every_kind_of_border(token: int) -> None:
    spec = nl.memory.named("tnt", key_dim=D, chunk=3, shard=6, global_chunk=4)
    w0 = weights(spec)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(9), time=18, dtype=torch.float64)
    y, _ = spec.scan(w0, q, k, v, gates)
    k, v = k.clone(), v.clone()
    k[0, :, token], v[0, :, token] = -k[0, :, token], v[0, :, token] + 1
    z, _ = spec.scan(w0, q, k, v, gates)
    assert torch.equal(y[0, :, :token], z[0, :, :token])
    assert torch.equal(y[1], z[1])
    assert not torch.equal(y[0, :, token], z[0, :, token])


def linear(chunk: int, shard: int, bias: object, projection: str = "none") -> tuple[Tnt, list[Tensor]]:
    spec = Tnt(D, D, None, (plain(chunk, Matrix(), bias),), shard=shard, projection=projection)  # type: ignore[arg-type]
    return spec, [torch.zeros(HEADS, D, D, dtype=torch.float64)]


def test_the_first_token_of_a_shard_is_written_and_read() -> None:
    spec, w0 = linear(4, 4, L2(), "literal")
    _, k, v = data(10, 12)
    y, _ = spec.scan(w0, k, k, v)
    for t in (0, 4, 8):
        close(y[:, :, t], v[:, :, t])


def test_a_token_is_written_once_and_not_once_for_every_later_one_of_its_chunk() -> None:
    """Eq. 6 as printed sums the whole chunk on top of W_{t−1}: a misprint."""
    spec, w0 = linear(6, 6, DotProduct())
    q, k, v = data(11, 6)
    _, state = spec.scan(w0, q, k, v)
    close(state.parts[0].weights[0], k.mT @ v)


@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
def test_a_linear_hebbian_memory_is_block_diagonal_linear_attention_at_every_chunk(chunk: int) -> None:
    spec, w0 = linear(chunk, 5, DotProduct())
    q, k, v = data(12, 17)
    place = torch.arange(17)
    block = (place[:, None] >= place) & (place[:, None] // 5 == place // 5)
    close(spec.scan(w0, q, k, v)[0], ((q @ k.mT) * block) @ v)


def test_equal_local_memories_add_up() -> None:
    one = nl.memory.named("tnt", key_dim=D, chunk=2, shard=6, global_chunk=4)
    three = replace(one, locals=one.locals * 3, shard=6, chunk=2)
    w0 = weights(one)
    q, k, v, gates = one.example(torch.Generator().manual_seed(13), time=15, dtype=torch.float64)
    parts = len(one.memories[0].shapes)
    alone = replace(one, locals=(), shard=())
    total, _ = three.scan(
        [*w0[:parts], *w0[parts:] * 3], q, k, v, gates.map(lambda g: torch.cat([g[..., :1], *[g[..., 1:]] * 3], -1))
    )
    both, _ = one.scan(w0, q, k, v, gates)
    far, _ = alone.scan(w0[:parts], q, k, v, gates.map(lambda g: g[..., 0]))
    close(total, far + 3 * (both - far))


def test_the_chunk_matters_to_a_regression_and_not_in_the_limit_of_small_steps() -> None:
    spec, w0 = linear(1, 16, L2())
    q, k, v = data(14, 16)
    gaps = {}
    for eta in (0.5, 1e-3):
        lr = torch.full(q.shape[:3], eta, dtype=torch.float64)
        fine, coarse = (replace(spec, chunk=c).scan(w0, q, k, v, Gates(lr=lr))[0] for c in (1, 8))
        gaps[eta] = float((fine - coarse).norm() / fine.norm())
    assert gaps[0.5] > 0.1
    assert gaps[1e-3] < 1e-2


def test_the_second_stage_is_the_same_memory_with_other_local_chunks() -> None:
    stage1 = nl.memory.named("tnt", key_dim=D, chunk=(4, 8), shard=16, global_chunk=8)
    w0 = weights(stage1)
    inputs = stage1.example(torch.Generator().manual_seed(15), time=21, dtype=torch.float64)
    y, _ = stage1.scan(w0, *inputs)
    assert torch.equal(stage1.refined((4, 8)).scan(w0, *inputs)[0], y)
    fine = stage1.refined((1, 2))
    assert (fine.scan(w0, *inputs)[0] - y).abs().max() > 1e-3
    assert [m.chunk for m in fine.memories] == [8, 1, 2]  # type: ignore[attr-defined]
    assert (fine.shapes, fine.gate_channels, fine.largest_steps) == (
        stage1.shapes,
        stage1.gate_channels,
        stage1.largest_steps,
    )
    layers = [nl.layers.Memory(D * HEADS, HEADS, spec) for spec in (stage1, fine)]
    layers[1].load_state_dict(layers[0].state_dict())
    assert stage1.refined(2) == stage1.refined((2, 2))


@pytest.mark.parametrize("time", [1, 2, 3, 5, 8, 11, 12, 13, 23])
def test_prefill_and_decode_are_the_full_forward_at_every_length(time: int) -> None:
    """Chunks of 3, shards of 8, global chunks of 12: lengths inside, at and beyond each of them."""
    spec = nl.memory.named("tnt", key_dim=D, chunk=3, shard=8, global_chunk=12)
    w0 = weights(spec)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(16), time=26, dtype=torch.float64)
    whole, end = spec.scan(w0, q, k, v, gates, engine="reference")
    y, state = spec.scan(w0, *(x[:, :, :time] for x in (q, k, v)), gates[:time])
    outputs = [y]
    for t in range(time, 26):
        at = gates[slice(t, t + 1)].map(lambda g: g[:, :, 0])
        one, state = spec.step(w0, q[:, :, t], k[:, :, t], v[:, :, t], at, state)
        outputs.append(one.unsqueeze(2))
    close(torch.cat(outputs, 2), whole)
    for a, b in zip(nl.state.leaves(state), nl.state.leaves(end), strict=True):
        close(a.double(), b.double())


def test_momentum_and_decay_do_not_cross_a_shard() -> None:
    """With μ = α = 1 all that was ever written would come back; a shard's first answer knows its own token alone."""
    spec = nl.memory.named("tnt", key_dim=D, chunk=2, shard=5, global_=None)
    w0 = weights(spec)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(17), time=15, dtype=torch.float64)
    ones = torch.ones_like(gates.lr)
    gates = Gates(lr=gates.lr, momentum=ones, retention=0.5 * ones)
    whole, state = spec.scan(w0, q, k, v, gates)
    last, own = spec.scan(w0, *(x[:, :, 10:] for x in (q, k, v)), gates[10:])
    close(whole[:, :, 10:], last)
    close(state.parts[0].momentum[0], own.parts[0].momentum[0])


MIXTURES = {
    "windows of two lengths": {
        "global_": nl.memory.named("omeganet", key_dim=D, chunk=8),
        "locals": (nl.memory.named("swla", key_dim=D, features=nl.memory.Identity()), "omeganet"),
        "chunk": (2, 4),
    },
    "channels": {"global_": "gla", "locals": ("gla", "rwkv7_like"), "global_chunk": 8},
    "channels beside a scalar": {"global_": "titans", "locals": ("gla", "yaad"), "global_chunk": 8, "chunk": 3},
    "duals": {"global_": "memora", "locals": ("moneta",), "global_chunk": 8, "chunk": 3},
    "erasing": {"global_": "deltanet", "locals": ("gated_deltanet", "longhorn"), "global_chunk": 8},
    "Newton–Schulz": {"global_": "atlas", "locals": ("atlas_plus",), "global_chunk": 8, "chunk": 3},
    "a memory that makes its own": {"global_": "self_modifying", "locals": ("ttt_mlp",), "global_chunk": 8, "chunk": 3},
    "caches": {"global_": "deep_transformer", "locals": ("dot", "swdt"), "global_chunk": 8},
    "reads of other timing": {
        "global_": "titans",
        "locals": ("titans", "ttt_linear"),
        "global_chunk": 6,
        "read": "before",
    },
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_any_memory_may_stand_inside(mixture: str) -> None:
    """Engine = reference in outputs, state and gradients, with resets, invalid tokens and shards inside the call."""
    spec = nl.memory.named("tnt", key_dim=D, shard=7, **MIXTURES[mixture])
    w0 = [w.double() for w in spec.init(HEADS, torch.Generator().manual_seed(18))]
    q, k, v, gates = spec.example(torch.Generator().manual_seed(19), time=24, dtype=torch.float64)
    g = torch.Generator().manual_seed(20)
    masks = {"reset": torch.rand(2, 24, generator=g) < 0.1, "valid": torch.rand(2, 24, generator=g) < 0.8}
    inputs = [x.requires_grad_() for x in (*w0, q, k, v, *(gate for _, gate in gates.items()))]
    runs = []
    for engine in ("reference", "chunked"):
        y, state = spec.scan(w0, q, k, v, gates, engine=engine, **masks)  # type: ignore[arg-type]
        moved = [x for x in nl.state.leaves(state) if x.requires_grad]
        total = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in (y, *moved))
        found = torch.autograd.grad(total, inputs, allow_unused=True)
        runs.append((y, *nl.state.leaves(state), *(torch.zeros(1) if x is None else x for x in found)))
    for number, (a, b) in enumerate(zip(*runs, strict=True)):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-8, atol=1e-8, msg=lambda m, n=number: f"{n}: {m}")


def test_a_layer_gives_each_memory_its_own_largest_step_and_first_gates() -> None:
    spec = nl.memory.named("tnt", key_dim=D, locals=("omeganet", "linear_attention"), global_chunk=16, chunk=4)
    torch.manual_seed(0)
    layer = nl.layers.Memory(D * HEADS, HEADS, spec)
    assert layer.lr_max == (0.25, 0.5, 1.0)
    with torch.no_grad():
        layer.gates.weight.zero_()
    gates = layer._gates(torch.zeros(1, 3, D * HEADS))
    shares = torch.tensor([0.25, 0.5, 1.0]) * torch.sigmoid(torch.tensor([-1.0, -1.0, 0.0]))
    close(gates.lr[0, 1, 2], shares, 1e-6)
    first = torch.sigmoid(torch.tensor([3.0, *[-3.0] * 7]))
    close(gates.window[0, 0, 0], first / first.sum(), 1e-6)
    assert gates.log_retention.shape == (1, HEADS, 3, 2)
    levels = layer.levels()
    assert [(x.name, x.period.n) for x in levels] == [("global", 16), ("local0", 4), ("local1", 1)]
    assert "anew every 2048 tokens" in levels[1].retention
    assert levels[2].state_paths == ("tail", "memory.projection", "memory.position", "memory.faults", "memory.parts.2")


def test_every_memory_reports_under_its_own_name() -> None:
    spec = nl.memory.named("tnt", key_dim=D, chunk=2, shard=4, global_chunk=4)
    w0, report = weights(spec), nl.Report()
    q, k, v, gates = spec.example(torch.Generator().manual_seed(21), time=10, dtype=torch.float64)
    k[0, 0, 3] = torch.nan
    y, _ = spec.scan(w0, q, k, v, gates, report=report.scope("m"))
    close(y, spec.scan(w0, q, k, v, gates)[0])
    assert sorted(report) == ["m", "m.global", "m.local"]
    assert report["m.local"]["surprise"].shape == (2, HEADS, 10)
    assert report["m"]["faults"].tolist() == [1, 0], "one token, refused by both"


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"global_": None, "locals": ()}, "neither"),
        ({"shard": 0}, "shard is 0"),
        ({"shard": (4, 8)}, "shard has 2 entries for 1"),
        ({"locals": ("titans", "titans", "titans"), "chunk": (1, 2)}, "chunk has 2 entries for 3"),
        ({"chunk": 0}, "chunk is 0"),
        ({"global_chunk": 0}, "chunk is 0"),
        ({"global_": None, "global_chunk": 8}, "there is no global memory"),
        ({"projection": "half"}, "projection is 'half'"),
        ({"locals": ("titan",)}, "'titan' is not known"),
        ({"locals": (nl.memory.named("titans", key_dim=8),)}, "key_dim=8"),
        ({"locals": (nl.memory.named("tnt", key_dim=4),)}, "not itself a hierarchy"),
        ({"steps": (0.1,)}, "steps has 1 entries"),
    ],
)
def test_impossible_hierarchies_are_refused_in_words(choices: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nl.memory.named("tnt", key_dim=4, **choices)


def test_states_and_refinements_that_do_not_fit_are_refused_in_words() -> None:
    spec = nl.memory.named("tnt", key_dim=D, chunk=(2, 4))
    with pytest.raises(ValueError, match="refined to 3 chunks"):
        spec.refined((1, 2, 3))
    other = nl.memory.named("tnt", key_dim=D, chunk=2)
    q, k, v = data(22, 3)
    with pytest.raises(ValueError, match="2 memories and 1 projections"):
        spec.scan(weights(spec), q, k, v, state=other.start(weights(other), 2))
    with pytest.raises(ValueError, match="lr has shape"):
        spec.scan(weights(spec), q, k, v, Gates(lr=torch.ones(2, HEADS, 3)))


def test_faults_and_positions_go_on_through_a_packed_call_and_a_reset_at_its_first_token() -> None:
    spec = nl.memory.named("tnt", key_dim=D, chunk=2, shard=4, global_chunk=8)
    w0 = weights(spec)
    q, k, v, gates = spec.example(torch.Generator().manual_seed(24), time=20, dtype=torch.float64)
    k[0, 0, 1] = k[1, 0, 9] = torch.nan
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[1, 8] = True
    ends = []
    for engine in ("reference", "chunked"):
        state = None
        for part in (slice(0, 8), slice(8, 20)):
            inputs = (q[:, :, part], k[:, :, part], v[:, :, part], gates[part])
            _, state = spec.scan(w0, *inputs, state, engine=engine, reset=reset[:, part])  # type: ignore[arg-type]
        ends.append(state)
    assert ends[1].faults.tolist() == [1, 1]
    assert ends[1].position.tolist() == [20, 12]
    for a, b in zip(nl.state.leaves(ends[0]), nl.state.leaves(ends[1]), strict=True):
        close(a.double(), b.double())
