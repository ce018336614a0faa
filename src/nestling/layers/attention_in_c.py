"""What attention does by the C code with the tokens of a call: turning queries and keys, and the way back; see `attention.c`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from nestling.native import DEFINES, call, library, threads

SOURCE = Path(__file__).parent / "attention.c"


class Read(NamedTuple):
    """A call's forward pass.

    q      `[lane, head, time, dim]`
    pairs  keys and values, `[2, lane, head, visible + time, dim]`, the call's own last
    y, log what came out, like q, and the logarithm of the softmax's sum, `[lane, head, time]`
    window how many tokens each sees, its own included, at least `time`; None: all
    """

    q: Tensor
    pairs: Tensor
    y: Tensor
    log: Tensor
    window: int | None

    @property
    def visible(self) -> int:
        """Tokens before the call's own."""
        return self.pairs.shape[3] - self.q.shape[2]

    @property
    def edge(self) -> int:
        """Token m sees key n where n − m is not less."""
        return -self.q.shape[2] if self.window is None else self.visible + 1 - self.window


class _Attention(ctypes.Structure):
    """`Attention` of attention.c, field for field."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("lanes", "heads", "time", "dim", "threads", "visible", "edge", "begin")),
        ("scale", ctypes.c_double),
        *((f"{name}_{of}", ctypes.c_ssize_t) for name in ("y", "grad") for of in ("lane", "head", "row")),
        *((name, ctypes.c_ssize_t) for name in ("stride", "of_stride")),
        *((name, ctypes.c_void_p) for name in ("qkv", "cos", "sin", "q", "keys", "values", "y", "log")),
        *((name, ctypes.c_void_p) for name in ("grad", "of_q", "of_keys", "of_values", "of_qkv")),
    ]


def turn_in_c(qkv: Tensor, cos: Tensor, sin: Tensor, pairs: Tensor) -> Tensor | None:
    """The call's queries, turned, `[lane, head, time, dim]`, and its keys and values in the last rows of pairs, see `Read`; None
    where the C code does not serve.

    qkv  `[lane, time, 3, head, dim]`, not yet turned;  cos, sin  `[lane, 1, time, dim / 2]`
    """
    lanes, time, _, heads, dim = qkv.shape
    code = library(SOURCE, qkv.dtype) if qkv.dtype in DEFINES else None
    if code is None or not _served(qkv, (cos, sin, pairs)) or not _rows(pairs):
        return None
    if cos.shape != (lanes, 1, time, dim // 2) or not (cos.is_contiguous() and sin.is_contiguous()):
        return None
    qkv, q = qkv.contiguous(), qkv.new_empty(lanes, heads, time, dim)
    numbers = (lanes, heads, time, dim, threads(lanes * heads), pairs.shape[3] - time, 0, 0)
    at = (u.data_ptr() for u in (qkv, cos, sin, q))
    c = _Attention(*numbers, 1.0, *(0,) * 6, pairs.stride(2), 0, *at, *_both(pairs))
    return q if call(code, "nestling_attention", c) == 0 else None


def back_in_c(
    read: Read,
    grad: Tensor,
    sums: Tensor,
    of_q: Tensor | None,
    of_qkv: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> bool:
    """`attention_back` into of_q, or, turned back by the angles of `turn_in_c` and with the sums of the call's own rows, into
    of_qkv `[lane, time, 3, head, dim]`; False where the C code does not serve."""
    q, pairs, y, log, _ = read
    code = library(SOURCE, q.dtype) if q.dtype in DEFINES else None
    if code is None or not _served(q, (grad, log, y, pairs, sums)) or not (_rows(pairs) and _rows(sums)):
        return False
    lanes, heads, time, dim = q.shape
    q, log = q.contiguous(), log.contiguous()
    grad, y = (u if u.stride(3) == 1 else u.contiguous() for u in (grad.resolve_neg(), y))
    begin = pairs.shape[3] - sums.shape[3]
    numbers = (lanes, heads, time, dim, threads(lanes * heads), read.visible, read.edge, begin)
    layouts = (*y.stride()[:3], *grad.stride()[:3], pairs.stride(2), sums.stride(2))
    angles = (None if u is None else u.data_ptr() for u in (cos, sin))
    given = (q.data_ptr(), *_both(pairs), y.data_ptr(), log.data_ptr(), grad.data_ptr())
    q_to, qkv_to = (None if u is None else u.data_ptr() for u in (of_q, of_qkv))
    c = _Attention(*numbers, dim**-0.5, *layouts, None, *angles, *given, q_to, *_both(sums), qkv_to)
    return call(code, "nestling_attention", c) == 0


def _both(pairs: Tensor) -> tuple[int, int]:
    """Where keys and values begin."""
    at = pairs.data_ptr()
    return at, at + pairs.stride(0) * pairs.element_size()


def _served(x: Tensor, others: tuple[Tensor, ...]) -> bool:
    plain = x.device.type == "cpu" and x.numel() > 0 and type(x) is Tensor
    return plain and all(type(u) is Tensor and u.device == x.device and u.dtype == x.dtype for u in others)


def _rows(pairs: Tensor) -> bool:
    """Whether heads follow each other in memory at one distance, lanes and all, and rows without a gap."""
    _, _, heads, _, dim = pairs.shape
    _, lane, head, row, channel = pairs.stride()
    return (row, channel) == (dim, 1) and lane == heads * head
