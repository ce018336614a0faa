"""The C code's products of matrices of which one is a triangle, by themselves: calls are mostly too short to leave a part out."""

from __future__ import annotations

import ctypes
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nestling.native import library

from .test_native import NEEDS

MADE, READ, READ_TURNED = 1, 2, 3  # `Which` of matrix.h
MARGIN = 3

SOURCE = """
#include "matrix.h"

const int nestling_rows = ROWS, nestling_panel = PANEL;

int ends(int past, int i, int columns) { return reach(below(MADE, past), i, columns); }

void multiply(
    int which, int past, int rows, int depth, int columns, const real *a, int turns_a, const real *b, int turns_b, real *c,
    int width, int sign, real *scratch
) {
    Operand left = turns_a ? turned(a, rows) : plain(a, depth), right = turns_b ? turned(b, depth) : plain(b, columns);
    triangular(below(which, past), rows, depth, columns, left, right, c, width, sign, scratch);
}
"""


@NEEDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_triangles(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole and broken blocks and panels, operands as they lie and transposed. What need not be there is not a number, and
    nothing is written beside the result."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "triangles.c"
    source.write_text(SOURCE)
    code = library(source, dtype)
    assert code is not None
    block, panel = (ctypes.c_int.in_dll(code, f"nestling_{name}").value for name in ("rows", "panel"))
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    def multiplied(
        which: int, past: int, a: Tensor, turns_a: bool, b: Tensor, turns_b: bool, c: Tensor, sign: int
    ) -> Tensor:
        (rows, depth), columns = a.shape, b.shape[1]
        a, b = ((x.mT if turns else x).contiguous() for x, turns in ((a, turns_a), (b, turns_b)))
        to = torch.nn.functional.pad(c, (0, MARGIN, 0, 1), value=7.0)
        scratch = torch.full((depth * panel + MARGIN,), torch.nan, dtype=dtype)
        at = [ctypes.c_void_p(x.data_ptr()) for x in (a, b, to, scratch)]
        code.multiply(
            which, past, rows, depth, columns, at[0], turns_a, at[1], turns_b, at[2], columns + MARGIN, sign, at[3]
        )
        assert bool((to[:, columns:] == 7).all())
        assert bool((to[rows] == 7).all())
        assert bool(scratch[-MARGIN:].isnan().all())
        return to[:rows, :columns]

    sizes = (1, block + 1, panel, 2 * panel + block + 3)
    for rows, past in product(sizes, (0, 1, block, block + 1, panel + 3)):
        wide = rows + past
        ends = torch.tensor([code.ends(past, i, wide) for i in range(rows)])[:, None]
        row, column = torch.arange(rows)[:, None], torch.arange(wide)
        inside, there = column <= row + past, column < ends
        assert bool((inside <= there).all())
        assert bool((ends <= (row + past + 2 * block).clamp_max(wide)).all())  # about the triangle, and no more
        triangle = draw(rows, wide) * inside
        some = triangle.masked_fill(~there, torch.nan)
        for which, sign, turns_a, turns_b in product((MADE, READ, READ_TURNED), (0, 1, -1), (0, 1), (0, 1)):
            left = triangle if turns_b else some  # a transposed B may be met with all of A
            a, b = {
                MADE: (draw(rows, panel + 5), draw(panel + 5, wide)),
                READ: (left, draw(wide, panel + 5)),
                READ_TURNED: (left.mT, draw(rows, panel + 5)),
            }[which]
            c = draw(a.shape[0], b.shape[1]) if sign else torch.full((a.shape[0], b.shape[1]), torch.nan, dtype=dtype)
            found = multiplied(which, past, a, bool(turns_a), b, bool(turns_b), c, sign)
            exact = a.nan_to_num().double() @ b.double()
            exact = c.double() + sign * exact if sign else exact
            if which == MADE:
                found, exact = found[there], exact[there]
            error = float((found.double() - exact).abs().max())
            told = f"{which=} {rows=} {past=} {sign=} {turns_a=} {turns_b=}: off by {error:.1e}"
            assert error < (1e-4 if dtype == torch.float32 else 1e-12), told
