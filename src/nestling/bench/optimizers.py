"""The problems of the optimizer laboratory: a landscape, a sequence of tasks, and text.

landscape   ψ(r, θ) = r² + k(r − θ + a sin ωr)² from (−3.5, 2)          (Nested Learning, eq. 53); k, a, ω are ours: 10, 1, 5
tasks       a perceptron learns several maps in turn, inputs of each from a subspace of its own, so that gradients of different
            tasks are nearly orthogonal (eq. 45); then all once more, shorter. Scored on all of them: what was forgotten counts
text        a tiny transformer reads the embedded corpus; scored in bits per byte on held-out files
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nestling import models, stream
from nestling.learn.evaluation import bits_per_byte, evaluate, passages, token_nats


class Trial(NamedTuple):
    """One run of a problem: what is trained, the loss of a step, and the score at the end (lower is better)."""

    module: nn.Module
    loss: Callable[[int], Tensor]
    score: Callable[[], float]


@dataclass(frozen=True)
class Problem:
    """A problem: its title, what the score is, how many steps a run has, and how one with a seed is made.

    layers: whether it has layers; without, optimizers that need them are left out.
    """

    title: str
    unit: str
    steps: int
    make: Callable[[int], Trial]
    layers: bool = True


class Landscape(nn.Module):
    """ψ of eq. 53 at two numbers, started near the paper's point."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor([-3.5, 2.0]) + 0.1 * torch.randn(2, generator=generator))

    def forward(self) -> Tensor:
        r, theta = self.at
        value: Tensor = r**2 + 10 * (r - theta + torch.sin(5 * r)) ** 2
        return value


def landscape(seed: int) -> Trial:
    module = Landscape(torch.Generator().manual_seed(seed))
    return Trial(module, lambda step: module(), lambda: float(module().detach()))


def tasks(seed: int, *, count: int = 4, steps: int = 300, dim: int = 32, batch: int = 16) -> Trial:
    """`count` tasks in turn for four fifths of the steps, then all in turn again for the rest."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, 8))
    rank = dim // count
    bases = torch.linalg.qr(normal(dim, dim)).Q.mT.view(count, rank, dim)
    maps = normal(count, dim, 8)
    tests = normal(count, 64, rank) @ bases
    long, short = round(0.8 * steps / count), round(0.2 * steps / count)

    def task_of(step: int) -> int:
        return min(step // long if step < long * count else (step - long * count) // max(short, 1), count - 1)

    def error(x: Tensor, task: int) -> Tensor:
        found: Tensor = (module(x) - torch.tanh(x @ maps[task])).square().sum(1).mean()
        return found

    def loss(step: int) -> Tensor:
        task = task_of(step)
        return error(normal(batch, rank) @ bases[task], task)

    def score() -> float:
        with torch.no_grad():
            return sum(float(error(tests[task], task)) for task in range(count)) / count

    return Trial(module, loss, score)


def text(seed: int, *, corpus: stream.Corpus, lanes: int = 8, length: int = 64, documents: int = 8) -> Trial:
    """The tiny transformer with segments of its own: nothing is carried from step to step."""
    torch.manual_seed(seed)
    tokenizer = stream.ByteTokenizer()
    model = models.build("transformer", "tiny", vocab_size=tokenizer.vocab_size)
    reading = stream.Lanes(corpus.train, tokenizer, lanes, length, seed=seed, max_document=4096)
    held_out = list(passages(corpus.heldout[:documents], tokenizer, 512))

    def loss(step: int) -> Tensor:
        batch = next(reading)
        logits, _ = model(batch.tokens, reset=batch.reset)
        nats = token_nats(logits, batch.targets.masked_fill(~batch.loss_mask, -100))
        return nats.sum() / batch.loss_mask.sum()

    return Trial(model, loss, lambda: bits_per_byte(evaluate(model, held_out, lanes=len(held_out))))


def problems(quick: bool = False) -> Mapping[str, Problem]:
    """All of them by name; quick: shorter, to see what they do."""
    corpus: list[stream.Corpus] = []

    def on_text(seed: int) -> Trial:
        if not corpus:
            corpus.append(stream.standard_library())
        return text(seed, corpus=corpus[0])

    some = 30 if quick else 300
    return {
        "landscape": Problem("a curved valley (eq. 53)", "ψ at the end", some, landscape, layers=False),
        "tasks": Problem(
            "four tasks in turn, twice", "mean squared error over all tasks", some, lambda seed: tasks(seed, steps=some)
        ),
        "text": Problem("text, tiny transformer", "bits per byte, held out", 10 if quick else 150, on_text),
    }
