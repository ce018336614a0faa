"""A training run from its settings to its summary: `train(TrainConfig(model="hope", minutes=3))`."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from nestling import models, processor, stream
from nestling.config import SettingError, did_you_mean, override, to_json
from nestling.learn import checkpoint, folder
from nestling.learn.assembly import assemble
from nestling.learn.budget import Budget
from nestling.learn.checkpoint import Checkpoint
from nestling.learn.config import TrainConfig
from nestling.learn.continual import Retained
from nestling.learn.display import Display, clock
from nestling.learn.evaluation import Score, bits_per_byte, evaluate, passages
from nestling.learn.interrupt import Interrupt
from nestling.learn.learner import Learner, Progress, StepResult
from nestling.learn.metrics import MetricsLog, draw_curve, read_metrics

EVAL_BYTES = 8192


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. interrupted: the signal that stopped it, or None; bits_per_byte: on held-out text, nan
    if not measured.
    """

    out: Path
    step: int
    tokens: int
    seconds: float
    interrupted: int | None
    bits_per_byte: float


def train(config: TrainConfig, console: Console | None = None) -> TrainResult:
    """Train, or go on training (`config.resume`), until the budget is spent or Ctrl-C; everything is in the
    run's folder then.

    Resuming continues bit for bit: weights, optimizer, fast state, place in the text, random generators, budget
    and counters all come from the checkpoint, and metrics after it are written again. Raises `SettingError` for
    impossible settings, and `CheckpointError`, `stream.CorpusError` or `LearningError` for what goes wrong on the way.
    """
    config = config.resolved()
    device = open_device(config.device)
    console = console or Console(stderr=True)
    with processor.training(config.threads):
        if not config.resume:
            folder.check_free(config.folder)
            return _train(folder.begin(config), None, device, console)
        config = folder.resume(config)
        with folder.owned(config.folder):
            latest = checkpoint.latest(config.folder / "checkpoints")
            saved = None if latest is None else checkpoint.load(latest)
            return _train(config, saved, device, console)


def _train(config: TrainConfig, saved: Checkpoint | None, device: torch.device, console: Console) -> TrainResult:
    """The run from `saved` on; a new run makes its folder and owns it, one that is resumed is owned by the caller."""
    parts = stream.parts_of(config.data) if config.continual else ()
    corpus = stream.joined(parts) if parts else open_corpus(config.data)
    torch.manual_seed(config.seed)
    model = build_model(config).to(device)
    if config.source is not None and saved is None:
        _begin_from(config.source, model)
    budget = Budget(**saved.numbers["budget"]) if saved else Budget(tokens=config.tokens, minutes=config.minutes)
    learner = assemble(config, model, corpus, parts, budget)
    if saved:
        learner.restore(saved)

    # Only now is anything written: settings that cannot be leave no trace.
    out = config.folder if config.resume else folder.create(config)
    with nullcontext() if config.resume else folder.owned(out):
        checkpoint.clean(out / "checkpoints")
        spent = saved.numbers["seconds"] if saved else 0.0
        describe(config, model, corpus, console)
        retained = Retained(tuple(p.name for p in parts), saved.numbers["continual"] if saved and parts else [])
        seconds, interrupted = _learn(learner, budget, config, out, spent, console, parts, retained)
        scores: list[Score] = []
        if interrupted is None:
            scores, interrupted = _measure(model, corpus, config, console)
        held_out = bits_per_byte(scores) if interrupted is None else math.nan
        if parts and interrupted is None:
            retained.save(out / "continual.json")
            retained.tell(console)
        result = TrainResult(out, learner.progress.step, learner.progress.tokens, seconds, interrupted, held_out)
        _report(result, len(scores), config, model, console)
    return result


def _begin_from(source: Path, model: nn.Module) -> None:
    """Give the model the slow weights of another run."""
    found = folder.find_checkpoint(source)
    checkpoint.load_model(model, checkpoint.load(found).model, found)


def _learn(
    learner: Learner,
    budget: Budget,
    config: TrainConfig,
    out: Path,
    spent: float,
    console: Console,
    parts: Sequence[stream.Part],
    retained: Retained,
) -> tuple[float, int | None]:
    """The loop: step, watch the clock, write, show, keep. Returns the seconds of learning so far and the signal
    that stopped it, or None. Every one of the `parts` has an equal share of the budget, and is measured at its end.
    """
    now = learner.progress
    log = MetricsLog(out / "metrics.jsonl", now.step)
    start = time.monotonic() - spent
    seconds = spent

    def complete() -> bool:
        return budget.total is not None and now.tokens >= budget.total

    def keep() -> None:
        log.sync()  # first, so that no checkpoint is ahead of its metrics
        numbers = {"budget": budget.state_dict(), "seconds": seconds, "config": to_json(config)}
        if parts:
            numbers["continual"] = retained.rows
        checkpoint.save(out / "checkpoints", learner.checkpoint(numbers))

    def look_back() -> int | None:
        """A part is over: measure all, outside the budget, and turn to the next. The signal that cut it short, or None."""
        nonlocal start
        began = time.monotonic()
        row = []
        display.note(
            f"step {now.step}: {parts[len(retained.rows)].name} is read; measuring what is known of every part"
        )
        for part in parts:
            scores, interrupted = _measure(learner.model, part.corpus, config, None)
            if interrupted is not None:
                return interrupted
            row.append(bits_per_byte(scores))
        retained.add(row)
        if len(retained.rows) < len(parts):
            assert isinstance(learner.stream, stream.Parts)
            learner.stream.turn(len(retained.rows))
        start += time.monotonic() - began
        return None

    def behind() -> bool:
        """Whether the part that is being read has had its share."""
        return bool(parts) and budget.progress(now.tokens) >= (len(retained.rows) + 1) / len(parts)

    stopped: int | None = None
    with closing(log), Interrupt() as stop, Display(budget.progress(now.tokens), console) as display:
        if now.step == 0:
            keep()  # from the first moment there is something to go on from
        while stop.requested is None:
            while stopped is None and len(retained.rows) < len(parts) and behind():
                stopped = look_back()
                keep()
            if complete() or stopped is not None:
                break
            result = learner.step()
            seconds = time.monotonic() - start
            recalibrated = budget.observe(now.tokens, seconds)

            _write(log, now, result, seconds)
            left = None if config.minutes is None else 60 * config.minutes - seconds
            display.show(result, budget.progress(now.tokens), left)
            if note := _trouble(now, result):
                display.note(note)
            if recalibrated or complete() or stop.requested or now.step % config.checkpoint_every == 0:
                keep()
    return seconds, stopped or stop.requested


def _write(log: MetricsLog, now: Progress, result: StepResult, seconds: float) -> None:
    """A step's line in the metrics."""
    log.write(
        step=now.step,
        tokens=now.tokens,
        loss=result.loss,
        bits_per_byte=result.bits_per_byte,
        lr=result.lr,
        grad_norm=result.grad_norm,
        faults=result.faults,
        skipped=result.skipped,
        seconds=round(seconds, 3),
    )


def _trouble(now: Progress, result: StepResult) -> str:
    """What was not finite in a step, in words; empty: nothing."""
    if result.skipped:
        return f"step {now.step}: loss or gradient not finite, nothing learned from it ({now.skipped} so far)"
    if result.faults:
        return f"step {now.step}: {result.faults} tokens or writes to memories were not finite, and left out"
    return ""


def _measure(
    model: nn.Module, corpus: stream.Corpus, config: TrainConfig, console: Console | None
) -> tuple[list[Score], int | None]:
    """The held-out documents read with the memory running, and the signal that cut it short, or None. console: where to show
    that it goes on.
    """
    documents = corpus.heldout[: config.eval_documents]
    scores: list[Score] = []
    shown = nullcontext() if console is None else console.status(f"measuring on {len(documents)} held-out documents")
    with Interrupt() as stop, shown:
        for score in evaluate(
            model, passages(documents, stream.ByteTokenizer(), EVAL_BYTES), lanes=min(8, len(documents) or 1)
        ):
            scores.append(score)
            if stop.requested is not None:
                break
    return scores, stop.requested


def _report(result: TrainResult, documents: int, config: TrainConfig, model: nn.Module, console: Console) -> None:
    """Draw the curve, and (for a run that is complete) write the summary; say where things are and what to do next."""
    out = result.out
    held_out = None if math.isnan(result.bits_per_byte) else result.bits_per_byte
    title = f"{config.model} {config.size}, {parameters(model):,} parameters, seed {config.seed}"
    draw_curve(read_metrics(out / "metrics.jsonl"), out / "loss.png", title, held_out)
    if result.interrupted is not None:
        console.print(
            f"Stopped after step {result.step}; everything is in {out}. Go on with:\n"
            f"  nestling train --resume {shlex.quote(str(out))}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return
    summary = {
        "model": config.model,
        "size": config.size,
        "seed": config.seed,
        "settings": config.overrides,
        "from": None if config.source is None else str(config.source),
        "parameters": parameters(model),
        "steps": result.step,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 1),
        "held_out_bits_per_byte": held_out,
        "held_out_documents": documents,
        "held_out_bytes_of_each": EVAL_BYTES,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": config.device,
    }
    checkpoint.replace_file(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    if held_out is not None:
        measured = f", {held_out:.3f} bits per byte on held-out documents"
    else:
        measured = ", and not every token of the held-out documents has a finite cost" if documents else ""
    console.print(
        f"{result.tokens:,} tokens in {clock(result.seconds)}{measured}. Everything is in {out}; try next:\n"
        f"  nestling generate {shlex.quote(str(out))}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@dataclass(frozen=True)
class Run:
    """A trained model, ready to use. checkpoint: the folder it came from."""

    model: models.LanguageModel
    tokenizer: stream.Tokenizer
    config: TrainConfig
    checkpoint: Path


def load_run(path: Path | None = None, device: str = "cpu", overrides: Mapping[str, Any] | None = None) -> Run:
    """The model in a run's folder or in one of its checkpoints; None: the newest run in `runs/`.

    overrides: settings of the model that differ from the run's and leave its weights' shapes as they are. Raises
    `CheckpointError`, and `SettingError` for settings that the model does not have.
    """
    target = open_device(device)
    found = folder.find_checkpoint(path)
    saved = checkpoint.load(found)
    config = override(TrainConfig(), saved.numbers["config"], str(found))
    config = replace(config, overrides=config.overrides | dict(overrides or {}))
    model = build_model(config).to(target)
    checkpoint.load_model(model, saved.model, found)
    return Run(model, stream.ByteTokenizer(), config, found)


def build_model(config: TrainConfig, vocab_size: int = stream.ByteTokenizer.vocab_size) -> models.LanguageModel:
    """The model that the settings name, with fresh weights; raises `SettingError`."""
    if config.model not in models.names():
        raise SettingError(f"model: there is none named {config.model!r}.{did_you_mean(config.model, models.names())}")
    if config.size not in models.SIZES:
        raise SettingError(f"size: there is none named {config.size!r}.{did_you_mean(config.size, models.SIZES)}")
    if taken := sorted({"name", "size", "vocab_size"} & set(config.overrides)):
        raise SettingError(
            f"set: got {', '.join(taken)}, but --model and --size choose the model, and its vocabulary is the tokenizer's."
        )
    try:
        return models.build(config.model, config.size, vocab_size=vocab_size, **config.overrides)
    except (ValueError, TypeError) as error:
        raise SettingError(str(error)) from error


def open_corpus(data: Sequence[str]) -> stream.Corpus:
    """The texts at these paths, or the embedded corpus; raises `stream.CorpusError`."""
    return stream.from_paths(data) if data else stream.standard_library()


def open_device(name: str) -> torch.device:
    """The device, after trying it; raises `SettingError` if there is none of that name here."""
    if name.partition(":")[0] not in ("cpu", "cuda", "mps", "xpu"):
        raise SettingError(f"device: got {name!r}, but expected cpu, cuda, cuda:1 (and so on), mps or xpu.")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise SettingError(
            f"device: {name!r} cannot be used here ({reason}). Try cpu, or see nestling doctor."
        ) from error
    return device


def parameters(model: nn.Module) -> int:
    """Number of slow weights."""
    return sum(parameter.numel() for parameter in model.parameters())


def describe(config: TrainConfig, model: models.LanguageModel, corpus: stream.Corpus, console: Console) -> None:
    """One line: what is going to learn from what."""
    size = sum(len(document.text) for document in corpus.train)
    source = "the embedded corpus" if not config.data else ", ".join(config.data)
    _say(
        console,
        f"{config.model} {config.size} ({parameters(model):,} parameters) reads {source}: "
        f"{len(corpus.train):,} documents, {size:,} characters; {len(corpus.heldout):,} held out",
    )
    if config.continual and config.schedule != "constant":
        _say(
            console,
            f"note: with --schedule {config.schedule} later parts are learned at lower rates, which alone makes them displace "
            "less; --schedule constant learns all alike",
        )
    if still := _still_rates(config, model):
        _say(console, still)
    if still := _still_gains(config, model):
        _say(console, still)
    chunk = model.config.global_chunk
    if chunk is not None and chunk >= config.length:
        _say(
            console,
            f"note: what the global memories write is read {chunk} tokens later at the earliest, and so beyond --length "
            f"{config.length}: their gates stay as they are; longer segments train them",
        )


def _say(console: Console, text: str) -> None:
    """As it is, on one line."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _still_gains(config: TrainConfig, model: models.LanguageModel) -> str:
    """A note where a level's update is hardly ever made and served within a segment, which is how the gain of its own loss, the
    parameter `value` of a `Continuum`, is trained."""
    own = model.config
    periods = sorted({p for p in own.periods if p >= config.length})
    if own.error != "local" or not periods:
        return ""
    said = f"note: the gains (value) of levels with a period of {', '.join(map(str, periods))} tokens are hardly trained, and not"
    return (
        f"{said} at all where a period is a multiple of --length {config.length}: with error=local they learn by updates that "
        "are made and served within one segment; longer segments train them"
    )


def _still_rates(config: TrainConfig, model: models.LanguageModel) -> str:
    """A note where no update of a level is served while the outer loop looks, so that its step size is not trained."""
    own = model.config
    # Their carried states are constants (`nestling.layers.carried`).
    within = isinstance(own.outer, int) or (own.arrangement == "nested" and own.rank is not None)
    steps = 1 if within else math.inf if config.carry is None else config.carry
    periods = sorted({p for p in own.periods if p >= steps * config.length})
    if not periods:
        return ""
    said = f"note: the step size of levels with a period of {', '.join(map(str, periods))} tokens stays as it is, as "
    if within:
        setting = f"outer={own.outer}" if isinstance(own.outer, int) else f"arrangement=nested and rank={own.rank}"
        return f"{said}with {setting} no update of theirs is seen beyond --length {config.length}; longer segments train it"
    return (
        f"{said}lanes start afresh after --length {config.length} times --carry {config.carry} tokens, before an update of "
        "theirs is used; more of either trains it"
    )
