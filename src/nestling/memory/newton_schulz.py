"""Newton–Schulz: the nearest semi-orthogonal matrix by products alone (Atlas, §5; Nested Learning, eq. 42–44).

    X ← X / ‖X‖_F,      then  X ← aX + (bA + cA²)X,  A = XXᵀ,  `steps` times

An odd polynomial of X acts on its singular values alone: UΣVᵀ goes to U p(Σ)Vᵀ. Muon's quintic reaches about [0.68, 1.13] in
five steps and stays there; the cubic (3/2, −1/2, 0) converges to UVᵀ, more slowly. The map knows nothing of X's scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from nestling.memory.settings import whole_numbers

Iteration = Literal["quintic", "cubic"] | tuple[float, float, float]
_COEFFICIENTS = {"quintic": (3.4445, -4.7750, 2.0315), "cubic": (1.5, -0.5, 0.0)}
EPS = 1e-12  # a matrix of a smaller norm has no direction


def coefficients_of(iteration: Iteration) -> tuple[float, float, float]:
    """(a, b, c) of an iteration. Raises ValueError for one that is not known."""
    if isinstance(iteration, str):
        if iteration not in _COEFFICIENTS:
            raise ValueError(
                f"iteration is {iteration!r}; expected one of: {', '.join(_COEFFICIENTS)}, or three numbers a, b, c"
            )
        return _COEFFICIENTS[iteration]
    numeric = len(iteration) == 3 and all(isinstance(number, int | float) for number in iteration)
    if not numeric:
        raise ValueError(f"iteration is {iteration!r}; expected the three numbers a, b, c of aX + (bA + cA²)X")
    return iteration


def newton_schulz(
    x: Tensor,
    steps: int = 5,
    *,
    iteration: Iteration = "quintic",
    eps: float = EPS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Orthogonalize matrices `[…, rows, columns]`; the same shape and dtype back, differentiable.

    steps       iterations; 0 only normalizes
    iteration   "quintic" (Muon's), "cubic" (convergent), or (a, b, c)
    eps         a matrix of norm up to eps gives 0, with a gradient of 0: there the map has no limit
    dtype       of the iterations. Default: that of x, in at least float32. bfloat16 is Muon's choice for slow weights; float16
                is refused, as the squares of small singular values vanish in it
    """
    a, b, c = coefficients_of(iteration)
    whole_numbers("newton_schulz", least=0, steps=steps)
    if x.dim() < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected matrices [..., rows, columns] that have entries")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; expected a real floating point tensor: convert it first")
    if dtype == torch.float16:
        raise ValueError("dtype is torch.float16, in which A² underflows; expected torch.bfloat16, float32 or float64")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; expected torch.bfloat16, float32 or float64")
    with torch.autocast(x.device.type, enabled=False):
        up = x.to(torch.promote_types(x.dtype, torch.float32))
        # Squares of very large or small entries leave the range; the largest one divides out, as the map is free of scale.
        largest = up.detach().abs().amax((-2, -1), keepdim=True)
        up = up / torch.where(largest > 0, largest, 1.0)
        norm = torch.linalg.vector_norm(up, dim=(-2, -1), keepdim=True)
        empty = norm.detach() * largest <= eps  # false for NaN, which goes on to whoever guards
        up = torch.where(empty, 0.0, up / torch.where(empty, 1.0, norm))
        y = up if dtype is None else up.to(dtype)
        if tall := y.shape[-2] > y.shape[-1]:
            y = y.mT
        flat = y.reshape(-1, *y.shape[-2:])
        iterate: Callable[..., Tensor] = _iterate if torch.compiler.is_compiling() else _Iterate.apply
        y = iterate(flat, steps, a, b, c).view(y.shape)
        return (y.mT if tall else y).to(x.dtype)


def _mixed(gram: Tensor, b: float, c: float) -> Tensor:
    """bA + cA²."""
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram


def _iterate(y: Tensor, steps: int, a: float, b: float, c: float) -> Tensor:
    """The iterations of matrices `[batch, rows, columns]`, rows ≤ columns."""
    for _ in range(steps):
        y = torch.baddbmm(y, _mixed(y @ y.mT, b, c), y, beta=a)
    return y


class _Iterate(torch.autograd.Function):
    """The same, with the gradient that knows A to be symmetric: a quarter of the products less.

    With M = bA + cA² and S = gyᵀ + ygᵀ, the gradient g of one iteration's result becomes ag + Mg + (bS + c(SA + AS))y.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, steps: int, a: float, b: float, c: float) -> Tensor:
        ctx.settings = steps, a, b, c
        kept: list[Tensor] = []
        for _ in range(steps):
            gram = y @ y.mT
            kept += [y, gram]
            y = torch.baddbmm(y, _mixed(gram, b, c), y, beta=a)
        ctx.save_for_backward(*kept)
        return y if kept else y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        steps, a, b, c = ctx.settings
        kept = ctx.saved_tensors
        if steps and torch.is_grad_enabled():  # a second derivative takes the formula as it stands
            (grad,) = torch.autograd.grad(_iterate(kept[0], steps, a, b, c), kept[0], grad, create_graph=True)
            return grad, None, None, None, None
        for n in range(steps - 1, -1, -1):
            y, gram = kept[2 * n : 2 * n + 2]
            moved = grad @ y.mT
            moved = moved + moved.mT
            if c:
                both = moved @ gram
                moved = moved.mul_(b).add_(both, alpha=c).add_(both.mT, alpha=c)
            else:
                moved = moved.mul_(b)
            grad = torch.baddbmm(torch.baddbmm(grad, _mixed(gram, b, c), grad, beta=a), moved, y)
        return grad, None, None, None, None
