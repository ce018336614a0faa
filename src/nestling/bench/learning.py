"""First evidence that models learn: tasks, and the models that are asked to solve them, at sizes that one core can train.

Formal languages, associative recall, selective copying, and text; see `formal` and `sequences` for how the first ones are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling import models, stream
from nestling import state as fast
from nestling.bench import formal, sequences
from nestling.layers import SelfModifying
from nestling.learn.evaluation import by_position, evaluate, mean_and_error, passages, token_nats
from nestling.memory import Full
from nestling.memory.networks import Matrix
from nestling.memory.self_modifying import READOUT_STD
from nestling.models import LanguageModel
from nestling.models.block import Block, ModelConfig
from nestling.models.lm import ModelState

Scores = dict[str, float]
Make = Callable[[int], LanguageModel]
"""A model from the size of a vocabulary."""


@dataclass
class Trial:
    """A task with a seed: the loss of the next batch, a quick look at the scores, and the scores."""

    loss: Callable[[LanguageModel], Tensor]
    look: Callable[[LanguageModel], Scores]
    score: Callable[[LanguageModel], Scores]


@dataclass(frozen=True)
class Task:
    """What is asked of whom.

    unit    what the scores are.  higher: whether more is better; the best possible is then 1, and ends the training
    steps   of training at most.  every: steps between two looks
    rates   learning rates tried in turn, until one solves the task; the best counts, by the last score
    """

    title: str
    unit: str
    vocabulary: int
    steps: int
    every: int
    rates: tuple[float, ...]
    entries: Mapping[str, Make]
    make: Callable[[int], Trial]
    higher: bool = True


def alternating(width: int = 32, layers: int = 1, heads: int = 4, lr_max: float = 1.0) -> Make:
    """Hope as a formal language needs it: one token a chunk, matrix memories, L2, nothing forgotten, and step sizes up to lr_max.

    With chunk 1 the inner loss and the rule multiply all memories by αI − ηkᵀ(2k − v) from the key's side (derived). So that one
    symbol turns the sign of what is stored at k for good and another leaves it alone, α has to be 1 and η(2 − ⟨k, v⟩) 2 or 0; the
    default, η ≤ 0.5, does not allow that. Training finds it from where it is near: values that begin at 0, and read-outs of η
    that differ from symbol to symbol, with a standard deviation of 2 about 0. The continuum stands still: it would learn to
    foretell the next symbol, and labels are none.
    """

    def make(vocabulary: int) -> LanguageModel:
        config = ModelConfig("hope", "", width, layers, heads, vocabulary, 2 * width, chunk=1)
        matrix = Matrix(identity=True)
        spec = config.memory("self_modifying", lr_max=lr_max, network=matrix, others=matrix, retention=Full())
        model = LanguageModel(config, [Block(config, SelfModifying(width, heads, spec)) for _ in range(layers)])
        with torch.no_grad():
            for mixer in model.mixers():
                assert isinstance(mixer, SelfModifying)
                initial = dict(zip(spec.names, mixer.initial, strict=True))
                initial["v.0"].zero_()
                initial["lr.bias"].zero_()
                initial["lr.weight"].mul_(2 / READOUT_STD)
        return model

    return make


def named(name: str, **settings: object) -> Make:
    """A model by name, of width 64, as many parameters as the transformer's."""
    widths = {"dim": 64, "layers": 2, "heads": 4}
    return lambda vocabulary: models.build(name, "tiny", vocab_size=vocabulary, **widths | settings)


def language(name: str, seed: int, *, size: int = 32, growing: int = 150, quick: bool = False) -> Trial:
    """A formal language; the quick look is at 200 words of each bin.

    growing: steps in which ever more of a word counts, from its first symbols to all of it.
    """
    asked = formal.LANGUAGES[name]
    words = formal.words(asked, seed, **({"train": 300, "test": 60} if quick else {}))
    reading = formal.batches(asked, words.train, size, seed)
    steps = count(1)

    def loss(model: LanguageModel) -> Tensor:
        first = max(4, formal.SHORT[1] * next(steps) // growing)
        tokens, targets = (x[:, :first] for x in next(reading))
        logits = model(tokens)[0][..., :2]  # one for each label
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=formal.UNSCORED)

    def score(model: LanguageModel, most: int | None = None) -> Scores:
        return {f"bin {n}": formal.share_right(model, asked, chosen[:most]) for n, chosen in enumerate(words.bins)}

    return Trial(loss, lambda model: score(model, 200), score)


def synthetic(draw: sequences.Draw, seed: int, *, size: int = 32, only_asked: bool = False) -> Trial:
    """Recall or copying; 1 280 sequences for the test, 128 of them for the quick look.

    only_asked: no other targets are learned.
    """
    generator = torch.Generator().manual_seed(seed)
    test = draw(1280, torch.Generator().manual_seed(seed + 1_000_003))

    def loss(model: LanguageModel) -> Tensor:
        tokens, targets, asked = draw(size, generator)
        if only_asked:
            targets = targets.masked_fill(~asked, -100)
        return F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten(), ignore_index=-100)

    @torch.no_grad()
    def score(model: LanguageModel, most: int = 1280) -> Scores:
        tokens, targets, asked = (x[:most] for x in test)
        answers = torch.cat([model(tokens[n : n + 128])[0].argmax(-1) for n in range(0, len(tokens), 128)])
        return {"accuracy": sequences.macro_accuracy(answers, targets, asked)}

    return Trial(loss, lambda model: score(model, 128), score)


def text(
    seed: int, corpus: stream.Corpus, *, lanes: int = 8, length: int = 128, document: int = 2048, documents: int = 16
) -> Trial:
    """The embedded corpus, documents cut at `document` bytes, state carried from step to step until a document ends.

    Scores are bits per byte by position in held-out documents that are long enough.
    """
    tokenizer = stream.ByteTokenizer()
    reading = stream.Lanes(corpus.train, tokenizer, lanes, length, seed=seed, max_document=document)
    edges = [0, *(document >> n for n in range(5, -1, -1))]
    long = [d for d in corpus.heldout if len(d.text) >= document][:documents]
    ready = [p for p in passages(long, tokenizer, document + 4) if len(p.tokens) > document]
    carried: list[ModelState | None] = [None]

    def loss(model: LanguageModel) -> Tensor:
        batch = next(reading)
        before = None if carried[0] is None else model.reattached(carried[0])
        logits, state = model(batch.tokens, before, reset=batch.reset)
        carried[0] = fast.detach(state)
        nats = token_nats(logits, batch.targets.masked_fill(~batch.loss_mask, -100))
        return nats.sum() / batch.loss_mask.sum()

    def score(model: LanguageModel, most: int = documents) -> Scores:
        found = sorted(evaluate(model, ready[:most], lanes=8, segment=length), key=lambda s: s.index)
        mean, error, _ = mean_and_error(by_position(found, edges))
        scores = {f"{a}–{b}": float(x) for (a, b), x in zip(pairwise(edges), mean, strict=True)}
        return scores | {"± last": float(error[-1])}

    return Trial(loss, lambda model: score(model, 4), score)


def tasks(quick: bool = False) -> Mapping[str, Task]:
    """All of them by name; quick: a few steps, to see what they do."""
    corpus: list[stream.Corpus] = []

    def on_text(seed: int) -> Trial:
        if not corpus:
            corpus.append(stream.standard_library())
        return text(seed, corpus[0], **({"lanes": 2, "length": 32, "document": 256, "documents": 2} if quick else {}))

    def steps(most: int, every: int = 100) -> tuple[int, int]:
        """Of training, and between two looks."""
        return (4, 2) if quick else (most, every)

    def formal_task(name: str) -> Task:
        entries = {
            "hope": alternating(),
            "transformer": named("transformer", dim=32),
        }
        title, (most, every) = formal.LANGUAGES[name].title, steps(1500, 50)
        make = lambda seed: language(name, seed, quick=quick)  # noqa: E731
        unit = "share of words right at every symbol"
        return Task(title, unit, 4, most, every, (1e-2, 3e-3), entries, make)

    chunked: dict[str, dict[str, object]] = {
        "titans_lmm": {"chunk": 16},
        "gated_deltanet": {"chunk": 64},
        "transformer": {},
    }
    others = {name: named(name, **own) for name, own in chunked.items()}
    moving = {"hope": named("hope", chunk=16, periods=(16, 32))} | others
    still = {"hope": named("hope", chunk=16, periods=(128,))} | others
    reading = {"hope": named("hope", chunk=16, periods=(64, 256))} | others
    accuracy, rates = "accuracy, mean over tokens", (3e-3,)
    return {
        "parity": formal_task("parity"),
        "aa": formal_task("aa"),
        "recall": Task(
            "multi-query associative recall", accuracy, 16, *steps(600), rates, moving,
            lambda seed: synthetic(sequences.recall, seed),
        ),
        "copying": Task(
            "selective copying", accuracy, 16, *steps(600), rates, still,
            lambda seed: synthetic(sequences.copying, seed, only_asked=True),
        ),
        "text": Task(
            "text", "bits per byte by position, held out", 257, *steps(400), rates, reading, on_text, higher=False
        ),
    }  # fmt: skip
