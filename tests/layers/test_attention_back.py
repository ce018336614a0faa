"""The way back through a call's attention against autograd of the formula, by the framework's operations and by the C code."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from nestling import native
from nestling.layers import attention_back
from nestling.layers.attention_back import Read


def case(time: int, visible: int, window: int | None, dim: int) -> tuple[Tensor, Read, Tensor, list[Tensor]]:
    """A forward pass that lies in the middle of a longer buffer, and what autograd finds."""
    generator = torch.Generator().manual_seed(time + visible)
    q, grad = (torch.randn(2, 3, time, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    room = torch.randn(2, 2, 3, visible + time + 9, dim, generator=generator, dtype=torch.float64) * 2
    leaves = [q.clone().requires_grad_(), room[..., 4 : 4 + visible + time, :].clone().requires_grad_()]
    keys, values = leaves[1]
    ahead = torch.arange(-visible, time) - torch.arange(time)[:, None]
    seen = ahead <= 0 if window is None else (ahead <= 0) & (ahead > -window)
    scores = (leaves[0] @ keys.mT / dim**0.5).masked_fill(~seen, -torch.inf)
    y = scores.softmax(-1) @ values
    found = torch.autograd.grad(y, leaves, grad)
    read = Read(q, room[..., 4 : 4 + visible + time, :], y.detach(), scores.detach().logsumexp(-1), window)
    return grad, read, room, list(found)


@pytest.mark.parametrize("in_c", [False, True])
@pytest.mark.parametrize(
    ("time", "visible", "window", "dim"),
    [
        (1, 0, None, 2),
        (1, 7, 3, 4),
        (5, 0, 5, 6),
        (64, 600, None, 16),
        (70, 300, 301, 8),
        (9, 290, 150, 20),
        (6, 9, 6, 4),
    ],
)
def test_gradients_are_those_of_the_formula(
    time: int, visible: int, window: int | None, dim: int, in_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of queries, and, added to what was there, of all keys and values or of the call's own."""
    grad, read, room, (want_q, want) = case(time, visible, window, dim)
    if not in_c:
        monkeypatch.setattr(attention_back, "TILE", 100)
    elif native.status().startswith("off"):
        pytest.skip("no C code here")
    else:
        monkeypatch.setattr(attention_back, "_plainly", None)
    for n in (time, visible + time):
        before = torch.randn(*room.shape[:3], n + 2, dim, dtype=torch.float64)
        sums = before.clone()
        with nullcontext() if in_c else native.without():
            of_q = attention_back.attention_back(read, grad, sums[..., 1 : n + 1, :])
        torch.testing.assert_close(of_q, want_q, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(
            sums[..., 1 : n + 1, :] - before[..., 1 : n + 1, :], want[..., -n:, :], rtol=1e-11, atol=1e-11
        )
        assert torch.equal(sums[..., [0, -1], :], before[..., [0, -1], :])


@pytest.mark.parametrize("in_c", [False, True])
def test_single_precision(in_c: bool) -> None:
    grad, read, _, (want_q, want) = case(64, 200, None, 16)
    low = Read(*(u.float() for u in read[:4]), None)
    sums = torch.zeros_like(low.pairs)
    with nullcontext() if in_c else native.without():
        of_q = attention_back.attention_back(low, grad.float(), sums)
    torch.testing.assert_close(of_q.double(), want_q, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.double(), want, rtol=1e-4, atol=1e-4)


def test_layouts_that_the_c_code_does_not_read() -> None:
    grad, read, _, (want_q, want) = case(5, 8, None, 4)
    turned = read._replace(pairs=read.pairs.permute(3, 0, 1, 2, 4).contiguous().permute(1, 2, 3, 0, 4))
    sums = torch.zeros_like(read.pairs)
    torch.testing.assert_close(attention_back.attention_back(turned, grad, sums), want_q)
    torch.testing.assert_close(sums, want)
