"""The command `nestling`: one thin module per verb in `nestling.commands`, each a dataclass of settings and a `run`.

Exit codes: 0 done; 1 something went wrong on the way (a missing file, a damaged checkpoint, a full disk); 2 the
settings cannot be; 130 or 143 stopped by Ctrl-C or by a request to terminate. Bad input is answered by one
message and never by a traceback.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from nestling import arguments
from nestling.config import SettingError, did_you_mean, override, read_file


class Verb(NamedTuple):
    """One verb: what it does, its settings (a dataclass with defaults for all) and its function (settings →
    exit code), by name.

    Both are imported only when the verb is used; the module of the settings should not import PyTorch, so that
    help is quick.
    """

    about: str
    settings: str
    function: str


VERBS = {
    "train": Verb("train a model on text", "nestling.learn.config:TrainConfig", "nestling.commands.train:run"),
    "eval": Verb(
        "measure a trained model: bits per byte, overall and by position in the document",
        "nestling.commands.eval:EvalConfig",
        "nestling.commands.eval:run",
    ),
    "generate": Verb(
        "let a trained model read, and then write",
        "nestling.commands.generate:GenerateConfig",
        "nestling.commands.generate:run",
    ),
    "convert": Verb(
        "add levels to a trained model, or change those it has",
        "nestling.commands.convert:ConvertConfig",
        "nestling.commands.convert:run",
    ),
    "levels": Verb(
        "show what learns in a model, and how often",
        "nestling.commands.levels:LevelsConfig",
        "nestling.commands.levels:run",
    ),
    "memories": Verb(
        "show every memory: its choices, equation, source, cost and state",
        "nestling.commands.memories:MemoriesConfig",
        "nestling.commands.memories:run",
    ),
    "plan": Verb(
        "count what a model costs, and how fast a machine could run it at best",
        "nestling.commands.plan:PlanConfig",
        "nestling.commands.plan:run",
    ),
    "bench capacity": Verb(
        "store random pairs, and measure how many each kind of memory holds",
        "nestling.commands.bench_capacity:CapacityConfig",
        "nestling.commands.bench_capacity:run",
    ),
    "bench optimizers": Verb(
        "run every optimizer on a landscape, a sequence of tasks and text, with equal tuning",
        "nestling.commands.bench_optimizers:OptimizersConfig",
        "nestling.commands.bench_optimizers:run",
    ),
    "bench learning": Verb(
        "measure what small models learn of formal languages, recall, copying and text",
        "nestling.commands.bench_learning:LearningConfig",
        "nestling.commands.bench_learning:run",
    ),
    "doctor": Verb(
        "check that everything Nestling needs is here and works",
        "nestling.commands.doctor:DoctorConfig",
        "nestling.commands.doctor:run",
    ),
    "demo": Verb(
        "train for three minutes, then show what makes a model that learns while it reads different",
        "nestling.commands.demo:DemoConfig",
        "nestling.commands.demo:run",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command: run it with `argv` (default: the command line's) and exit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Parse, call, and turn what goes wrong into a message and an exit code. (A verb's help exits by itself.)"""
    try:
        code = _run(argv)
        sys.stdout.flush()  # here, where a reader that went away is still answered for
        return code
    except SettingError as error:
        print(f"nestling: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nestling: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away (| head): not our failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        message = explain(error)
        if message is None:
            raise  # a defect of ours: the traceback is what helps
        print(f"nestling: {message}", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int:
    verb, rest = (argv[0], argv[1:]) if argv else ("help", [])
    group = {name.split()[1]: name for name in VERBS if name.startswith(f"{verb} ")}
    if group and rest and rest[0] in group:  # a verb of two words
        verb, rest = group[rest[0]], rest[1:]
    if verb in ("-h", "--help", "help"):
        print(overview(VERBS))
    elif verb == "--version":
        print(f"nestling {version('nestling')}")
    elif verb in VERBS:
        config = parse(verb, rest)
        return int(_named(VERBS[verb].function)(config))
    elif group and (not rest or arguments.asks_help(rest)):
        print(overview(group.values()))
    elif group:
        raise SettingError(f"{verb}: there is no {rest[0]!r}.{did_you_mean(rest[0], group)}")
    else:
        raise SettingError(
            f"there is no verb {verb!r}.{did_you_mean(verb, dict.fromkeys(v.split()[0] for v in VERBS))}"
        )
    return 0


def overview(names: Iterable[str]) -> str:
    """The text of `nestling --help`, or of a verb of two words without its second."""
    width = max(map(len, names := list(names)))
    verbs = "\n".join(f"  {name:{width}}  {VERBS[name].about}" for name in names)
    return (
        "Nestling: language models that keep learning while you use them.\n\n"
        f"usage: nestling VERB [OPTIONS], or nestling --version\n\n{verbs}\n\n"
        "nestling VERB --help shows a verb's options. --config FILE (YAML, TOML or JSON) gives any verb defaults\n"
        "that options override. Start with: nestling train --minutes 3"
    )


def parse(verb: str, argv: list[str]) -> Any:
    """The settings of `verb`: defaults, then what `--config FILE` says, then the options; raises `SettingError`."""
    kind = _named(VERBS[verb].settings)
    argv, file = _take_config(argv)
    argv = arguments.gather(kind, _spell_out_resume(argv) if verb == "train" else argv)
    default, prog, source = kind(), f"nestling {verb}", f"--config {file}"
    settings = {} if file is None else read_file(file)
    for option, name in (("set", "overrides"), ("from", "source")):
        if option in settings and option in arguments.options_of(kind):
            settings[name] = settings.pop(option)
    # An option overrides what was said elsewhere, also where both could not stand together.
    for option, rival in _RIVALS.items():
        if _given(f"--{option}", argv):
            settings.pop(rival, None)
    if verb == "train" and "--resume" in argv and not arguments.asks_help(argv):
        from nestling.learn.folder import read_config

        # The run's own settings are the defaults, so that only what is said otherwise differs (and is refused).
        asked = arguments.parse(prog, override(default, settings, source), argv)
        beaten = {rival: None for option, rival in _RIVALS.items() if getattr(asked, option) is not None}
        default = override(read_config(asked.folder), {**beaten, "out": asked.folder}, source)
    elif verb == "train" and not arguments.asks_help(argv) and ("source" in settings or _given("--from", argv)):
        from nestling.learn.folder import settings_of

        asked = arguments.parse(prog, override(default, settings, source), argv)
        # The other run's settings are the defaults; a budget and a folder are the new run's own.
        new = {"minutes": None, "tokens": None, "out": None, "resume": False, "source": asked.source}
        stored, named = settings_of(asked.source), "optimizer" in settings or _given("--optimizer", argv)
        if named and asked.optimizer != stored.optimizer:  # another optimizer's settings say nothing about this one
            new |= {"lr": None, "optimizer_set": {}, "horizon": None}
        default = override(stored, new, source)
    return arguments.parse(prog, override(default, settings, source), argv)


NO_MEMORY = ("not enough memory", "can't allocate memory", "size calculation overflowed")  # PyTorch's words, on CPUs

_RIVALS = {"tokens": "minutes", "minutes": "tokens"}


def explain(error: Exception) -> str | None:
    """One message for an ordinary failure; None for what only a defect can raise."""
    import torch

    from nestling.learn.checkpoint import CheckpointError
    from nestling.learn.generation import GenerationError
    from nestling.learn.learner import LearningError
    from nestling.state import StateError
    from nestling.stream import CorpusError, StreamError

    if isinstance(error, CheckpointError | GenerationError | LearningError | StateError | CorpusError | StreamError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in NO_MEMORY):
        return "out of memory: try fewer --lanes, a shorter --length or a smaller --size."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError):
        return str(error)
    return None


def _named(place: str) -> Any:
    """What `module:name` names."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def _take_config(argv: list[str]) -> tuple[list[str], Path | None]:
    """`argv` without `--config FILE` (or `--config=FILE`), and the file."""
    rest, file = [], None
    words = iter(argv)
    for word in words:
        if word == "--config":
            given = next(words, None)
            if given is None:
                raise SettingError("--config: expected a file after it.")
        elif word.startswith("--config="):
            given = word.removeprefix("--config=")
        else:
            rest.append(word)
            continue
        if not given:
            raise arguments.empty("--config")
        file = Path(given)
    return rest, file


def _spell_out_resume(argv: list[str]) -> list[str]:
    """`--resume FOLDER` as `--resume --out FOLDER`."""
    spelled = []
    for before, word in zip(["", *argv], argv, strict=False):
        if word == "--resume=" or (before == "--resume" and not word):
            raise arguments.empty("--resume")
        if word.startswith("--resume="):
            spelled += ["--resume", "--out", word.removeprefix("--resume=")]
        elif before == "--resume" and not word.startswith("-"):
            spelled += ["--out", word]
        else:
            spelled.append(word)
    return spelled


def _given(option: str, argv: list[str]) -> bool:
    return any(word == option or word.startswith(f"{option}=") for word in argv)
