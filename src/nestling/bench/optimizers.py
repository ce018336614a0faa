"""The problems of the optimizer laboratory: landscapes, a sequence of tasks, pictures and text.

landscape   ψ(r, θ) = r² + k(r − θ + a sin ωr)² from (−3.5, 2)          (Nested Learning, eq. 53); k, a, ω are ours: 10, 1, 5
banana      (1 − x)² + 100(y − x²)² from (−1.2, 1)                                                          [Rosenbrock 1960]
tasks       a perceptron learns several maps in turn, inputs of each from a subspace of its own, so that gradients of different
            tasks are nearly orthogonal (eq. 45); then all once more, shorter. Scored on all of them: what was forgotten counts
digits      a small vision transformer learns the digits that ship with scikit-learn; scored in nats per held-out picture
images      a larger one learns the user's pictures (see `pictures`); scored alike
text        a tiny transformer reads the embedded corpus; scored in bits per byte on held-out files
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling import models, stream
from nestling.bench import pictures
from nestling.bench.vit import OUTER, VisionTransformer, patch_of
from nestling.learn.evaluation import bits_per_byte, evaluate, passages, token_nats

RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Learning rates tried, as multiples of the optimizer's default."""
WIDE = (0.001, 0.003, 0.01, *RATES, 100.0, 300.0, 1000.0)
"""Of landscapes, whose scale says nothing about networks."""


class Trial(NamedTuple):
    """One run of a problem: what is trained, the loss of a step, and the score at the end (lower is better).

    outer: patterns of weights that are matrices, but not of hidden states; see `nestling.optim.split`.
    """

    module: nn.Module
    loss: Callable[[int], Tensor]
    score: Callable[[], float]
    outer: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """A problem: its title, what the score is, how many steps a run has, and how one with a seed is made.

    layers: whether it has layers; without, optimizers that need them are left out.
    rates: learning rates that are tried, as multiples of the optimizer's default, the same for every optimizer.
    """

    title: str
    unit: str
    steps: int
    make: Callable[[int], Trial]
    layers: bool = True
    rates: tuple[float, ...] = RATES


class Landscape(nn.Module):
    """A function of two numbers, started near a point."""

    def __init__(
        self, value: Callable[[Tensor, Tensor], Tensor], start: tuple[float, float], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.value = value
        self.at = nn.Parameter(torch.tensor(start) + 0.1 * torch.randn(2, generator=generator))

    def forward(self) -> Tensor:
        return self.value(*self.at)


def valley(r: Tensor, theta: Tensor) -> Tensor:
    """ψ of eq. 53."""
    return r**2 + 10 * (r - theta + torch.sin(5 * r)) ** 2


def banana(x: Tensor, y: Tensor) -> Tensor:
    """Rosenbrock's function."""
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def landscape(
    seed: int, value: Callable[[Tensor, Tensor], Tensor] = valley, start: tuple[float, float] = (-3.5, 2.0)
) -> Trial:
    module = Landscape(value, start, torch.Generator().manual_seed(seed))
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


def vision(seed: int, *, found: pictures.Pictures, dim: int, layers: int, batch: int = 32) -> Trial:
    """A vision transformer on pictures, drawn at random; the seed also chooses what is held out, unless that is given."""
    split = found.split(seed)
    channels, pixels = found.images.shape[1], found.images.shape[-1]
    torch.manual_seed(seed)
    module = VisionTransformer(channels, pixels, patch_of(pixels), len(found.classes), dim=dim, layers=layers)
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(len(split.train), (batch,), generator=generator)
        return F.cross_entropy(module(split.train[chosen]), split.train_labels[chosen])

    def score() -> float:
        with torch.no_grad():
            parts = range(0, len(split.test), 512)
            pairs = ((module(split.test[n : n + 512]), split.test_labels[n : n + 512]) for n in parts)
            return sum(float(F.cross_entropy(found, y, reduction="sum")) for found, y in pairs) / len(split.test)

    return Trial(module, loss, score, OUTER)


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


def problems(
    quick: bool = False, *, steps: int | None = None, data: Path | None = None, pixels: int = 32
) -> Mapping[str, Problem]:
    """All of them by name, but "digits" where scikit-learn is not installed, and "images" without data.

    quick: shorter runs, to see what they do. steps: of every run. data, pixels: see `pictures.read`.
    """

    @cache
    def corpus() -> stream.Corpus:
        return stream.standard_library()

    @cache
    def digits() -> pictures.Pictures:
        return pictures.digits()

    some, more = (30, 10) if quick else (300, 600)
    some, more = (some, more) if steps is None else (steps, steps)
    found = {
        "landscape": Problem(
            "a curved valley (eq. 53)", "ψ at the end", some, landscape, layers=False, rates=WIDE
        ),
        "banana": Problem(
            "Rosenbrock's banana", "value at the end", some, lambda seed: landscape(seed, banana, (-1.2, 1.0)), layers=False,
            rates=WIDE,
        ),
        "tasks": Problem(
            "four tasks in turn, twice", "mean squared error over all tasks", some, lambda seed: tasks(seed, steps=some)
        ),
    }  # fmt: skip
    if find_spec("sklearn") is not None:
        found["digits"] = Problem(
            "digits, small vision transformer", "nats per held-out picture", some,
            lambda seed: vision(seed, found=digits(), dim=48, layers=2),
        )  # fmt: skip
    if data is not None:
        own = pictures.read(data, pixels)
        found["images"] = Problem(
            f"{len(own.images):,} pictures of {len(own.classes)} classes, vision transformer", "nats per held-out picture",
            some, lambda seed: vision(seed, found=own, dim=96, layers=4),
        )  # fmt: skip
    found["text"] = Problem(
        "text, tiny transformer", "bits per byte, held out", more, lambda seed: text(seed, corpus=corpus())
    )
    return found
