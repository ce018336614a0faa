"""Which part of Hope's memory brings what: held-out bits per byte with parts of it erased at every segment, or standing still.

python benchmarks/which_levels.py runs/adaptation/0/hope [more runs] --documents 16
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import nestling as nl
from nestling.learn import load_run, mean_and_error
from nestling.models import LanguageModel, ModelState
from nestling.stream import ByteTokenizer, standard_library

Edit = Callable[[ModelState, ModelState], ModelState]


def memories(state: ModelState, fresh: ModelState) -> ModelState:
    """Erase the sequence memories; the continuum goes on."""
    assert state.open is not None
    return state._replace(blocks=fresh.blocks, open=state.open._replace(blocks=fresh.blocks))


def continuum(state: ModelState, fresh: ModelState) -> ModelState:
    """Erase what the feed-forward levels have learned; the sequence memories go on."""
    return state._replace(continuum=fresh.continuum)


def both(state: ModelState, fresh: ModelState) -> ModelState:
    return continuum(memories(state, fresh), fresh)


def nothing(state: ModelState, fresh: ModelState) -> ModelState:
    return state


@contextmanager
def still(model: LanguageModel, level: int | None) -> Iterator[None]:
    """Step size 0 for one level of every continuum, or for all (None)."""
    rates = [
        level_.rate for b in model.learning for n, level_ in enumerate(model.continuum(b).levels_) if level in (None, n)
    ]
    kept = [rate.detach().clone() for rate in rates]
    with torch.no_grad():
        for rate in rates:
            rate.fill_(-1e9)
        yield
        for rate, old in zip(rates, kept, strict=True):
            rate.copy_(old)


@torch.no_grad()
def bits(model: LanguageModel, tokens: Tensor, segment: int, edit: Edit) -> Tensor:
    """−log₂ p of every next byte `[document, time]`, `edit` applied between segments."""
    state, parts = model.start(len(tokens)), []
    for first in range(0, tokens.shape[1] - 1, segment):
        here = tokens[:, first : first + segment]
        logits, state = model(here, state)
        state = edit(state, model.start(len(tokens)))
        targets = tokens[:, first + 1 : first + 1 + here.shape[1]]
        parts.append(F.cross_entropy(logits[:, : targets.shape[1]].mT, targets, reduction="none") / math.log(2))
    return torch.cat(parts, 1).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="runs of Hope; several are averaged")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--segment", type=int, default=256)
    given = parser.parse_args()
    models = [load_run(run).model for run in given.runs]
    if any(model.window is None or given.segment % model.window for model in models):
        parser.error(f"--segment {given.segment}: expected a multiple of every model's fastest period")
    long = [d for d in standard_library().heldout if len(d.text) >= given.length][: given.documents]
    encode = ByteTokenizer().encode
    tokens = torch.stack(
        [torch.cat([torch.tensor([256]), torch.from_numpy(encode(d.text))])[: given.length + 1] for d in long]
    )
    edges = [0, given.segment]
    while edges[-1] < given.length:
        edges.append(min(2 * edges[-1], given.length))
    cases: list[tuple[str, int | str | None, Edit]] = [
        ("everything running", "", nothing),
        ("sequence memories erased", "", memories),
        ("continuum erased", "", continuum),
        ("both erased", "", both),
        ("fast level of the continuum still", 0, nothing),
        ("slow level of the continuum still", 1, nothing),
        ("continuum still", None, nothing),
    ]
    table = Table(
        title=f"bits per byte, {len(long)} held-out documents, {len(models)} runs; erased every {given.segment} tokens"
    )
    table.add_column("")
    for first, last in pairwise(edges):
        table.add_column(f"{first}–{last}", justify="right")
    table.add_column("more than all running, last", justify="right")
    running: Tensor | None = None
    for name, level, edit in cases:
        rows = []
        for model in models:
            if level == "":
                cost = bits(model, tokens, given.segment, edit)
            else:
                assert not isinstance(level, str)
                with still(model, level):
                    cost = bits(model, tokens, given.segment, edit)
            rows.append(torch.stack([cost[:, a:b].mean(1) for a, b in pairwise(edges)], 1))
        row = torch.stack(rows).mean(0)
        running = row if running is None else running
        mean, error, _ = mean_and_error(row - running)
        cells = [f"{x:.3f}" for x in row.mean(0).tolist()]
        table.add_row(name, *cells, "" if name.startswith("everything") else f"{mean[-1]:+.3f} ± {error[-1]:.3f}")
    Console(width=130).print(table)
    print(f"nestling {nl.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
