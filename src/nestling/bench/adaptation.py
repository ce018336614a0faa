"""What does it bring to keep learning while reading? Bits per byte by position in held-out documents, rows paired by document.

running       the model with its memory running
erased        the same weights, the memory erased at every segment
transformer   a same-size transformer trained on equal tokens, whose window is the segment
second        the memory model reading the same document again, with the state it had at the end of the first reading
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from nestling.learn.evaluation import by_position, evaluate, mean_and_error, passages
from nestling.models import LanguageModel
from nestling.stream import Document, Tokenizer


@dataclass(frozen=True)
class Adaptation:
    """Bits per byte, `[document, bin]` a row, of the documents at least as long as the last edge.

    edges: of the bins, in tokens of the document.
    """

    edges: tuple[int, ...]
    names: tuple[str, ...]
    rows: dict[str, Tensor]

    def gain(self, better: str, worse: str) -> tuple[Tensor, Tensor]:
        """Mean over documents of worse − better per bin, and its standard error: what `better` saves, paired by document."""
        mean, error, _ = mean_and_error(self.rows[worse] - self.rows[better])
        return mean, error


def measure(
    model: LanguageModel,
    baseline: LanguageModel | None,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    segment: int,
    length: int,
    lanes: int = 8,
) -> Adaptation:
    """Read the first `length` bytes of every document that has so many (tokens, with another tokenizer than bytes).

    Raises ValueError where no document is long enough.
    """
    ready = [p for p in passages(documents, tokenizer, limit=length + 4) if len(p.tokens) > length]
    if not ready:
        raise ValueError(f"no held-out document has {length} tokens: choose a shorter length or give longer documents")
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, max(segment // 4, 2 * edges[-1])))

    def table(reader: LanguageModel, readings: int = 1, erase: int | None = None) -> list[Tensor]:
        scores = sorted(
            evaluate(reader, ready, lanes=lanes, segment=segment, readings=readings, erase_every=erase),
            key=lambda s: s.index,
        )
        return [by_position(scores, edges, reading) for reading in range(readings)]

    first, second = table(model, readings=2)
    rows = {"running": first, "erased": table(model, erase=segment)[0], "second": second}
    if baseline is not None:
        rows["transformer"] = table(baseline, erase=segment)[0]
    return Adaptation(tuple(edges), tuple(p.name for p in ready), rows)


def draw(result: Adaptation, path: Path, *, title: str, segment: int) -> None:
    """Bits per byte over the position in the document, with standard errors, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    words = {
        "running": ("memory running", "#1b6ca8", "-"),
        "erased": (f"memory erased every {segment} tokens", "#d1495b", "-"),
        "transformer": (f"transformer, window {segment} tokens", "#777777", "--"),
        "second": ("second reading, memory running", "#2e933c", ":"),
    }
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    middle = [(a + b) / 2 for a, b in pairwise(result.edges)]
    for name, (label, color, style) in words.items():
        if name in result.rows:
            mean, error, _ = mean_and_error(result.rows[name])
            axes.errorbar(
                middle,
                mean,
                torch.nan_to_num(error),
                label=label,
                color=color,
                linestyle=style,
                marker="o",
                ms=4,
                capsize=2,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(middle, [f"{a}–{b}" for a, b in pairwise(result.edges)])
    axes.minorticks_off()
    axes.set_xlabel("position in the document (tokens)")
    axes.set_ylabel("bits per byte (lower is better)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
