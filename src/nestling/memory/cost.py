"""What a memory costs: FLOPs of its matrix products per token, and the numbers it carries."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from nestling import native
from nestling.state import leaves

if TYPE_CHECKING:
    from nestling.memory.protocol import Memory

TIME = 128  # tokens over which a memory is counted


class Cost(NamedTuple):
    """Of one head of one lane.

    flops   of the matrix products of one token in a stretch of `time`, read and written; elementwise work counts nothing
    state   numbers carried from call to call, after `time` tokens
    time    tokens that were read
    """

    flops: float
    state: int
    time: int


def cost(spec: Memory, time: int = TIME) -> Cost:
    """Count what a memory does and keeps, by reading `time` random tokens from the start, without gradients.

    A memory whose state grows with the stream costs more per token in a longer one.
    """
    generator = torch.Generator().manual_seed(0)
    w0 = spec.init(1, generator)
    example = spec.example(generator, lanes=1, heads=1, time=time)
    with torch.no_grad(), native.without(), FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        _, state = spec.scan(w0, *example)
    return Cost(counter.get_total_flops() / time, sum(x.numel() for x in leaves(state) if x.is_floating_point()), time)


def _attention(q: Any, k: Any, v: Any, products: int, causal: bool) -> int:
    lanes, heads, queries, dim = q
    return int(products * 2 * lanes * heads * queries * k[2] * dim // (2 if causal else 1))


def _sdpa(
    q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, out_shape: Any = None, **_: object
) -> int:
    return _attention(q, k, v, 2, causal)


def _sdpa_backward(
    grad: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dropout: float = 0.0,
    causal: bool = False,
    out_shape: Any = None,
    **_: object,
) -> int:
    return _attention(q, k, v, 5, causal)


def _triangular(a: Any, b: Any, *_: object, **__: object) -> int:
    return int(prod(b) * b[-2])


def _added(z: Any, a: Any, b: Any, *_: object, **__: object) -> int:
    return int(2 * prod(a) * b[-1])


def _lstm(x: Any, to_gates: Any, of_hidden: Any, *_: object, **__: object) -> int:
    return int(2 * prod(x[:-1]) * (prod(to_gates) + prod(of_hidden)))


def _lstm_backward(x: Any, to_gates: Any, of_hidden: Any, *_: object, **__: object) -> int:
    return 2 * _lstm(x, to_gates, of_hidden)


FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
    torch.ops.aten.linalg_solve_triangular: _triangular,
    torch.ops.aten.baddbmm_: _added,
    torch.ops.aten.mkldnn_rnn_layer: _lstm,
    torch.ops.aten.mkldnn_rnn_layer_backward: _lstm_backward,
}
"""What torch.utils.flop_counter does not know.

Causal attention counts the half below the diagonal, as its kernel skips the rest; its backward counts five products, one of
which its kernel computes a second time. A triangular solve of n rows counts n² a column. PyTorch's LSTM is one operation on the
CPU, for all tokens.
"""
