"""The deep systems at their defaults against their papers' equations, in column vectors and without the library's code.

W_2 `[hidden, in]`, W_3 likewise, W_1 `[out, hidden]`; the library has their transposes. Gradients are autograd's of losses
written here; features, norms, Newton–Schulz and kernels are written here as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nestling as nl
from nestling.memory import MLP, Identity, Muon

from .cases import normal

TIME = 11
Weights = list[Tensor]


def gelu(z: Tensor) -> Tensor:
    return z * (1 + torch.erf(z / math.sqrt(2))) / 2


def tanh_gelu(z: Tensor) -> Tensor:
    return z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2


def layer_norm(z: Tensor) -> Tensor:
    return (z - z.mean()) / (z.var(unbiased=False) + 1e-6).sqrt()


def mlp(w: Weights, x: Tensor, rest: Tensor) -> Tensor:
    """x + LN(W_1 σ(W_2 φ)) (Miras, §5.3; Atlas, eq. 42); rest: what the residual adds."""
    return rest + layer_norm(w[1] @ gelu(w[0] @ x))


def gated(w: Weights, x: Tensor, rest: Tensor) -> Tensor:
    """x + LN(W_1(σ(W_2 φ) ∘ W_3 φ)) (Atlas, eq. 43)."""
    return rest + layer_norm(w[2] @ (gelu(w[0] @ x) * (w[1] @ x)))


def square(prediction: Tensor, value: Tensor, _: Tensor) -> Tensor:
    return ((prediction - value) ** 2).sum() / 2


def hebbian(prediction: Tensor, value: Tensor, _: Tensor) -> Tensor:
    return -(prediction @ value)


def cubed(prediction: Tensor, value: Tensor, _: Tensor) -> Tensor:
    """‖e‖₃³ with the gradient 3 tanh(10 e)(e² + ε) of Miras, remark 5."""
    e = (prediction - value).detach()
    return (3 * torch.tanh(10 * e) * (e**2 + 1e-6)) @ prediction


def huber(prediction: Tensor, value: Tensor, threshold: Tensor) -> Tensor:
    e = prediction - value
    return (e**2).sum() / 2 if bool(e.norm() <= threshold) else threshold * e.abs().sum()


def polynomial(x: Tensor, logs: Tensor, projection: Tensor) -> Tensor:
    """All monomials up to degree 2, whose inner product is a_0 + a_1 q·k + a_2 (Rq·Rk)², a_i = exp(θ_i)/i! (Atlas, eq. 5)."""
    a = [float(logs[i].exp()) / math.factorial(i) for i in range(3)]
    r = projection.T @ x
    pairs = [r[i] * r[j] * math.sqrt(a[2] * (1 if i == j else 2)) for i in range(len(r)) for j in range(i, len(r))]
    return torch.cat([math.sqrt(a[1]) * x, x.new_full((1,), math.sqrt(a[0])), torch.stack(pairs)])


def newton_schulz(s: Tensor) -> Tensor:
    """Five quintic steps, along the shorter side."""
    x = s / s.norm()
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if s.shape[0] > s.shape[1] else x


def gradient(loss: Callable[[Weights], Tensor], w: Weights) -> Weights:
    leaves = [x.detach().requires_grad_() for x in w]
    return list(torch.autograd.grad(loss(leaves), leaves))


class Made:
    """A system at its defaults, its inputs (one lane, one head) and w0, transposed for the papers' convention."""

    def __init__(self, name: str, dim: int = 6, **choices: Any) -> None:
        self.spec = nl.memory.named(name, key_dim=dim, chunk=4, **choices)
        example = self.spec.example(torch.Generator().manual_seed(3), lanes=1, heads=1, time=TIME, dtype=torch.float64)
        self.given = example
        self.q, self.k, self.v = (x[0, 0] for x in example[:3])
        self.gates: dict[str, Tensor] = {name: gate[0, 0] for name, gate in example[3].items()}
        self.w0 = [normal(1, *shape, seed=n) * shape[0] ** -0.5 for n, shape in enumerate(self.spec.shapes)]
        self.first = [w[0].T for w in self.w0]

    def read(self, engine: str) -> Tensor:
        y, _ = self.spec.scan(self.w0, *self.given, engine=engine)
        return y[0, 0]

    def gate(self, name: str, t: int) -> Tensor:
        return self.gates[name][t] if name in self.gates else torch.ones(()).double()


def softmax(z: Tensor) -> Tensor:
    """Of each unit's inputs: along the rows of W."""
    return z.exp() / z.exp().sum(1, keepdim=True)


def shrunk(a: Tensor) -> Tensor:
    return (a**4).sum() ** -0.5


def loop(
    made: Made,
    network: Callable[[Weights, Tensor, Tensor], Tensor],
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    muon: str = "",
    scale: float = 1.0,
) -> Tensor:
    """Token by token, gradients at the weights of the chunk's start: Titans, Moneta, Yaad, Memora, TTT-MLP and Atlas' family."""
    system, chunk = made.spec.name, 4
    depth = 3 if network is gated else 2
    window = made.gates["window"].shape[-1] if "window" in made.gates else 1

    def phi(x: Tensor) -> tuple[Tensor, Tensor]:
        if len(made.first) == depth:
            return x, x
        features = polynomial(x, made.first[depth][:, 0], made.first[depth + 1].T)
        return features, features[: len(x)]

    def link(z: Weights, anchor: Weights) -> Weights:
        if system == "memora":
            return [softmax(x) for x in z]
        return [shrunk(a) * x for x, a in zip(z, anchor, strict=True)] if system == "moneta" else z

    z = anchor = made.first[:depth]
    s, out = [torch.zeros_like(w) for w in z], []
    for t in range(TIME):

        def windowed(w: Weights, t: int = t) -> Tensor:
            total = torch.zeros(()).double()
            for i in range(max(0, t - window + 1), t + 1):
                gamma = made.gates["window"][t, t - i] if window > 1 else 1.0
                total = total + gamma * loss(network(w, *phi(made.k[i])), made.v[i], made.gate("threshold", i))
            return total

        g = gradient(windowed, link(anchor, anchor))
        eta, alpha, mu = scale * made.gate("lr", t), made.gate("retention", t), made.gates.get("momentum")
        ends = (t + 1) % chunk == 0
        if muon:  # Atlas, eq. 33 and 32
            assert mu is not None
            s = [mu[t] * a + b for a, b in zip(s, g, strict=True)]
            moves = muon == "token" or ends
            z = [alpha * a - (eta * newton_schulz(b) if moves else 0.0) for a, b in zip(z, s, strict=True)]
        elif mu is not None:  # Titans, eq. 13–14
            s = [mu[t] * a - eta * b for a, b in zip(s, g, strict=True)]
            z = [alpha * a + b for a, b in zip(z, s, strict=True)]
        else:
            z = [alpha * a - eta * b for a, b in zip(z, g, strict=True)]
        anchor = z if ends else anchor
        out.append(network(link(z, anchor), *phi(made.q[t])))
    return torch.stack(out)


def tanh_mlp(w: Weights, x: Tensor, rest: Tensor) -> Tensor:
    return rest + layer_norm(w[1] @ tanh_gelu(w[0] @ x))


def kernel_loop(
    made: Made, loss: Callable[[Tensor, Tensor, Tensor], Tensor], *, normalized: bool, span: int = 0
) -> Tensor:
    """First layer over exponential features, kept as pairs: z(x) = W_2 x + Σ_j a_j κ(k_j, x) u_j, u = −∂ℓ/∂z at the chunk's
    start; the second layer as ever (Atlas, eq. 25–27). With a span W = W_0 − Σ η∇ℓ(W_0) over the last tokens alone (eq. 18)."""
    w2, w1, theta = made.first
    scale, window = float(theta.exp()), made.gates["window"].shape[-1] if "window" in made.gates else 1
    Pairs = list[tuple[Tensor, Tensor, Tensor]]

    def hidden(x: Tensor, share: Tensor, pairs: Pairs) -> Tensor:
        near = [a * torch.exp(scale * (k @ x - 1)) for k, _, a in pairs]
        total = sum((n * u for n, (_, u, _) in zip(near, pairs, strict=True)), torch.zeros(len(w2)).double())
        return share * (w2 @ x) + (total / sum(near) if normalized and near else total)

    def answer(x: Tensor, share: Tensor, pairs: Pairs, outer: Tensor) -> Tensor:
        return x + layer_norm(outer @ gelu(hidden(x, share, pairs)))

    def written(i: int, share: Tensor, pairs: Pairs, outer: Tensor) -> Weights:
        """∂ℓ/∂z(k_i) and ∂ℓ/∂W_1."""
        z = hidden(made.k[i], share, pairs)
        return gradient(lambda w: loss(made.k[i] + layer_norm(w[1] @ gelu(w[0])), made.v[i], z), [z, outer])

    one = torch.ones(()).double()
    share, outer, out = one, w1, []
    pairs: Pairs = []
    anchor = (share, pairs, outer)
    for t in range(TIME):
        eta, alpha = made.gate("lr", t), made.gate("retention", t)
        if span:
            pairs, outer = [], w1
            for i in range(max(0, t - span + 1), t + 1):
                error, g = written(i, one, [], w1)
                pairs.append((made.k[i], -error, made.gate("lr", i)))
                outer = outer - made.gate("lr", i) * g
        else:
            share, outer = alpha * share, alpha * outer
            pairs = [(k, u, alpha * a) for k, u, a in pairs]
            for i in range(max(0, t - window + 1), t + 1):
                error, g = written(i, *anchor)
                step = eta * (made.gates["window"][t, t - i] if window > 1 else 1.0)
                pairs = [*pairs, (made.k[i], -error, step)]
                outer = outer - step * g
        anchor = (share, pairs, outer) if (t + 1) % 4 == 0 else anchor
        out.append(answer(made.q[t], share, pairs, outer))
    return torch.stack(out)


SYSTEMS: dict[str, Callable[[], tuple[Made, Tensor]]] = {}


def system(
    name: str, network: Any, loss: Any, *, of: str = "", choices: dict[str, Any] | None = None, **how: Any
) -> None:
    def make() -> tuple[Made, Tensor]:
        made = Made(of or name, **(choices or {}))
        return made, kernel_loop(made, loss, **how) if network is None else loop(made, network, loss, **how)

    SYSTEMS[name] = make


WIDE = {"dim": 18}  # so that keys are reduced, to 16
system("titans", mlp, square)
system("ttt_mlp", tanh_mlp, square, scale=1 / 6)
system("moneta", mlp, cubed)
system("yaad", mlp, huber)
system("memora", mlp, square)
system("dla", mlp, hebbian, choices=WIDE)
system("omeganet", mlp, square, choices=WIDE)
system("omeganet, the key itself", mlp, square, of="omeganet", choices={"features": Identity(), "network": MLP()})
system("atlas", mlp, square, muon="chunk", choices=WIDE)
system("atlas_plus", gated, square, muon="chunk", choices=WIDE)
system("atlas, per token", mlp, square, of="atlas", muon="token", choices={"rule": Muon("token"), **WIDE})
system("atlas_plus, per token", gated, square, of="atlas_plus", muon="token", choices={"rule": Muon("token"), **WIDE})
system("deep_transformer", None, hebbian, normalized=True)
system("swdt", None, hebbian, normalized=True, span=5, choices={"span": 5})
system("dot", None, square, normalized=False)


@pytest.mark.parametrize("engine", ["chunked", "reference"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_it_is_its_papers_loop(name: str, engine: str) -> None:
    made, expected = SYSTEMS[name]()
    torch.testing.assert_close(made.read(engine), expected, rtol=1e-9, atol=1e-9)
    assert (made.read(engine) - made.q).abs().amax(-1).min() > 1e-3, "more than the residual is compared"
