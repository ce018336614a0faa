"""What it costs to keep what lanes have learned as products of low rank: held-out bits per byte, and bytes per lane.

python benchmarks/low_rank.py runs/hope_swa-small-0 --documents 8
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import nestling as nl
from common import machine
from nestling.layers.low_rank import full
from nestling.learn import load_run, mean_and_error
from nestling.models import LanguageModel, ModelState
from nestling.stream import ByteTokenizer, standard_library


@torch.no_grad()
def read(model: LanguageModel, tokens: Tensor, segment: int) -> tuple[Tensor, ModelState]:
    """−log₂ p of every next byte `[document, time]`, and the state at the end."""
    state, parts = None, []
    for first in range(0, tokens.shape[1] - 1, segment):
        here = tokens[:, first : first + segment]
        logits, state = model(here, state)
        targets = tokens[:, first + 1 : first + 1 + here.shape[1]]
        parts.append(F.cross_entropy(logits[:, : targets.shape[1]].mT, targets, reduction="none") / math.log(2))
    assert state is not None
    return torch.cat(parts, 1).double(), state


def apart(state: ModelState, other: ModelState) -> float:
    """‖Δ − Δ'‖/‖Δ'‖ over all lanes, levels and matrices."""
    pairs = [
        (full(a), full(b))
        for mine, theirs in zip(state.continuum, other.continuum, strict=True)
        for level, same in zip(mine.delta, theirs.delta, strict=True)
        for a, b in zip(level, same, strict=True)
    ]
    missing, whole = (
        sum(float(x.square().sum()) for x in xs) for xs in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    return math.sqrt(missing / whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of a model whose levels learn from the model's loss")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--segment", type=int, default=256)
    given = parser.parse_args()
    trained = load_run(given.run).model
    long = [d for d in standard_library().heldout if len(d.text) >= given.length][: given.documents]
    encode = ByteTokenizer().encode
    tokens = torch.stack(
        [torch.cat([torch.tensor([256]), torch.from_numpy(encode(d.text))])[: given.length + 1] for d in long]
    )
    exact, end = read(trained, tokens, given.segment)
    with torch.no_grad():
        empty = nl.models.convert(trained)
        for block in empty.learning:
            for level in empty.continuum(block).levels_:
                level.rate.fill_(-1e9)  # type: ignore[union-attr, operator]
    still, _ = read(empty, tokens, given.segment)
    half = exact.shape[1] // 2
    table = Table(title=f"{given.run}: {len(long)} held-out documents of {given.length:,} bytes; paired by document")
    for column in (
        "rank",
        "bits per byte",
        f"more than in full, from {half:,} on",
        "‖Δ − Δ'‖/‖Δ'‖",
        "state bytes per lane",
    ):
        table.add_column(column, justify="right")
    size = nl.state.nbytes(trained.start(1))
    table.add_row("in full", f"{float(exact.mean()):.3f}", "", "", f"{size:,}")
    for rank in given.ranks:
        model = nl.models.convert(trained, rank=rank)
        cost, state = read(model, tokens, given.segment)
        mean, error, _ = mean_and_error((cost - exact)[:, half:].mean(1, keepdim=True))
        table.add_row(
            str(rank),
            f"{float(cost.mean()):.3f}",
            f"{float(mean[0]):+.4f} ± {float(error[0]):.4f}",
            f"{apart(state, end):.2f}",
            f"{nl.state.nbytes(model.start(1)):,}",
        )
    mean, error, _ = mean_and_error((still - exact)[:, half:].mean(1, keepdim=True))
    table.add_row("no learning", f"{float(still.mean()):.3f}", f"{float(mean[0]):+.4f} ± {float(error[0]):.4f}", "", "")
    Console(width=130).print(table)
    print(machine(0))


if __name__ == "__main__":
    main()
