"""What lanes have learned, kept as products: the closest matrices of their rank, and the full ones where these have no higher."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestling as nl
from nestling.layers import Continuum
from nestling.layers.low_rank import LowRank, full, like, pays, zeros
from nestling.optim.inner import Adam

F64 = torch.float64
SHAPES = [(7, 4), (4, 7), (6, 6)]


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def closest(x: Tensor, rank: int) -> Tensor:
    """By the truncated sum of singular triples."""
    u, s, v = torch.linalg.svd(x)
    return sum((s[n] * torch.outer(u[:, n], v[n]) for n in range(min(rank, len(s)))), torch.zeros_like(x))


def empty(out: int, into: int, rank: int, lanes: int = 3) -> LowRank:
    found = zeros(torch.empty(out, into, dtype=F64), lanes, rank)
    assert isinstance(found, LowRank)
    return found


@pytest.mark.parametrize(("out", "into"), SHAPES)
def test_the_closest_matrix_of_its_rank(out: int, into: int) -> None:
    x = random(0, 3, out, into)
    kept = like(x, empty(out, into, 2))
    for lane in range(3):
        torch.testing.assert_close(full(kept)[lane], closest(x[lane], 2))
        missing = torch.linalg.svdvals(x[lane])[2:].square().sum().sqrt()
        torch.testing.assert_close((full(kept)[lane] - x[lane]).norm(), missing)


@pytest.mark.parametrize(("out", "into"), SHAPES)
def test_of_lower_rank_it_is_the_matrix_itself(out: int, into: int) -> None:
    x = random(1, 3, out, 1) @ random(2, 3, 1, into)
    x[2] = 0.0
    kept = like(x, empty(out, into, 2))
    torch.testing.assert_close(full(kept), x)
    basis = kept.left.mT if into > out else kept.right
    count = basis.square().sum(-1)
    expected = torch.tensor([[1.0, 0], [1, 0], [0, 0]], dtype=F64)  # what is mere rounding is no direction
    torch.testing.assert_close(count, expected)
    torch.testing.assert_close(full(like(full(kept), kept)), x)


def test_numbers_that_are_not_finite_stay_so_in_their_lane() -> None:
    x = random(3, 3, 6, 4)
    expected = full(like(x, empty(6, 4, 2)))
    x[1, 2, 3] = math.inf
    found = full(like(x, empty(6, 4, 2)))
    assert torch.equal(found[0::2], expected[0::2])
    assert not found[1].isfinite().all()


def test_the_projection_is_a_constant_to_the_gradient() -> None:
    x, way = random(4, 1, 6, 4).requires_grad_(), random(5, 1, 6, 4)
    (full(like(x, empty(6, 4, 2, lanes=1))) * way).sum().backward()
    v = torch.linalg.svd(x.detach()[0])[2][:2]
    torch.testing.assert_close(x.grad[0], way[0] @ v.T @ v)


@pytest.mark.parametrize(("out", "into"), SHAPES)
@pytest.mark.parametrize("own", [6, 2, 1])
def test_exact_gradients_are_the_derivative(out: int, into: int, own: int) -> None:
    """Of matrices of higher rank than is kept, and of those that have it, or less, wherever they move."""
    rows, columns = random(6, 3, out, own), random(7, 3, own, into)
    ways = random(8, 3, out, own), random(9, 3, own, into)
    weight, old = random(10, 3, out, into), empty(out, into, 2)

    def value(by: float, exact: bool = True) -> tuple[Tensor, Tensor]:
        step = torch.tensor(by, dtype=F64, requires_grad=True)
        x = (rows + step * ways[0]) @ (columns + step * ways[1])
        total = (full(like(x, old, exact=exact)) * weight).sum()
        return total.detach(), torch.autograd.grad(total, step)[0]

    difference = float(value(1e-5)[0] - value(-1e-5)[0]) / 2e-5
    total, slope = value(0.0)
    assert float(slope) == pytest.approx(difference, rel=1e-5)
    constant, of_first_order = value(0.0, exact=False)
    assert torch.equal(constant, total)
    assert float(of_first_order) != pytest.approx(difference, rel=1e-3)


def test_where_singular_values_are_equal_there_is_no_slope_to_take() -> None:
    x = torch.eye(6, dtype=F64)[None].requires_grad_()
    full(like(x, empty(6, 6, 2, lanes=1), exact=True)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_product_is_kept_only_where_it_is_smaller() -> None:
    weight = torch.empty(12, 6, dtype=torch.bfloat16)
    assert pays(weight.shape, 3)
    assert not pays(weight.shape, 4), "4 · 18 = 12 · 6"
    assert isinstance(zeros(weight, 2, 4), Tensor)
    kept = zeros(weight, 2, 3)
    assert isinstance(kept, LowRank)
    assert kept.left.dtype == torch.float32
    assert nl.state.nbytes(kept) == 2 * 4 * 3 * 18


def test_levels_descend_by_truncated_steps() -> None:
    """Of one window and of two: what is pending is truncated with every window, what is learned with every update."""
    layer = Continuum(6, 5, (2, 4), rank=2, rate=0.3, clip=math.inf, mean=False).double()
    state = layer.start(2)
    delta = [[torch.zeros(2, *w.shape, dtype=F64) for w in level.weights()] for level in layer.levels_]
    pending = [torch.zeros_like(d) for d in delta[1]]
    rate = [float(F.softplus(level.rate.detach())) for level in layer.levels_]
    with torch.no_grad():
        for turn in range(1, 6):
            found = tuple(tuple(random(10 * turn + n, *d.shape) for n, d in enumerate(level)) for level in delta)
            position = torch.full((2,), 2 * turn)
            state = layer.learn(state, found, 1, torch.tensor([True, True]), position)
            for lane in range(2):
                for n in range(2):
                    delta[0][n][lane] = closest(delta[0][n][lane] - rate[0] * found[0][n][lane], 2)
                    summed = pending[n][lane] + rate[1] * found[1][n][lane]
                    if turn % 2 == 0:
                        delta[1][n][lane], summed = closest(delta[1][n][lane] - summed, 2), torch.zeros_like(summed)
                    pending[n][lane] = closest(summed, 2)
            for level in range(2):
                for mine, theirs in zip(state.delta[level], delta[level], strict=True):
                    torch.testing.assert_close(full(mine), theirs)
            for mine, theirs in zip(state.pending[1], pending, strict=True):
                torch.testing.assert_close(full(mine), theirs)


def build(rank: int | None) -> nl.models.LanguageModel:
    torch.manual_seed(0)
    model = nl.models.build("hope_swa", dim=16, vocab_size=31, ffn=24, periods=[4, 8], rank=rank).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("rate"):
                weight.fill_(1.0)
            elif weight.dim() == 2:
                weight.mul_(6)
    return model


def test_as_the_full_form_while_no_more_has_been_learned_than_the_rank_holds() -> None:
    """Four tokens have three losses: an update of rank 3. Two fit into rank 6 and not into 5; outputs and gradients alike."""
    tokens = torch.randint(31, (2, 11), generator=torch.Generator().manual_seed(0))
    runs = {}
    for rank in (None, 6, 5):
        model = build(rank)
        logits, state = model(tokens)
        logits.square().sum().backward()
        runs[rank] = logits.detach(), state, [p.grad for p in model.parameters()]
    assert isinstance(runs[6][1].continuum[0].delta[0][0], LowRank)
    torch.testing.assert_close(runs[6][0], runs[None][0], rtol=1e-8, atol=1e-8)
    for low, whole in zip(runs[6][2], runs[None][2], strict=True):
        torch.testing.assert_close(low, whole, rtol=1e-6, atol=1e-8 * float(whole.abs().max()))
    for low, whole in zip(runs[6][1].continuum, runs[None][1].continuum, strict=True):
        for mine, theirs in zip((*low.delta, *low.pending), (*whole.delta, *whole.pending), strict=True):
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(full(a), b, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(runs[5][0][:, :8], runs[None][0][:, :8], rtol=1e-8, atol=1e-8)
    assert (runs[5][0] - runs[None][0])[:, 8:].abs().max() > 1e-6


@torch.no_grad()
def test_sessions_weigh_what_the_rank_says() -> None:
    """dim 16, hidden 24: matrices of 48 × 16 and 16 × 24 in two levels and two blocks, pending in one of them."""
    small, large = build(2), build(None)
    difference = nl.state.nbytes(large.start(1)) - nl.state.nbytes(small.start(1))
    assert difference == 8 * 2 * 3 * ((48 * 16 - 2 * 64) + (16 * 24 - 2 * 40))
    for model, per_matrix in ((small, 2 * 64 + 2 * 40), (large, 48 * 16 + 16 * 24)):
        own = {level.name: level for level in nl.models.levels(model)}
        assert own["blocks.0.ffn.level0"].weights == per_matrix
        assert own["blocks.1.ffn.level1"].weights == 2 * per_matrix
    with torch.device("meta"):  # as `nestling levels` does
        light = nl.models.levels(nl.models.build("hope_swa", dim=16, vocab_size=31, ffn=24, rank=2))
    assert [level.weights for level in light] == [level.weights for level in nl.models.levels(small)]
    assert (
        "of rank 2 at most" in {level.name: level for level in nl.models.levels(small)}["blocks.0.ffn.level0"].retention
    )


def test_impossible_ranks_are_refused_in_words() -> None:
    for rank in (0, 1.5, True, "low"):
        with pytest.raises(ValueError, match="expected a whole number of at least 1, or None"):
            nl.models.build("hope", rank=rank)
    with pytest.raises(ValueError, match="expected a rule without a memory"):
        Continuum(8, 4, (4,), rank=2, rule=Adam())
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="other periods, widths or"):
        build(2)(tokens, build(3)(tokens)[1])
