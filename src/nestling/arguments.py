"""The words of a command line as settings. tyro parses and prints help; what it refuses is told here in one line.

nestling: --lanes: got 'two', but expected a whole number. See nestling train --help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from nestling.config import LARGEST, SettingError, from_text, may_be_empty, too_large

Settings = TypeVar("Settings")


def asks_help(argv: list[str]) -> bool:
    """Whether help is asked for, and not settings."""
    return "-h" in argv or "--help" in argv


def parse(prog: str, default: Settings, argv: list[str]) -> Settings:
    """`default` (a dataclass) with what `argv` says put in; help is printed, and exits.

    Raises `SettingError` for what cannot be, in our words or, where we have none, in tyro's.
    """
    kind = type(default)
    if asks_help(argv):
        return tyro.cli(kind, default=default, args=argv, prog=prog, description=_about(kind))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = tyro.cli(kind, default=default, args=argv, prog=prog)
    except SystemExit as end:
        if not end.code:
            raise
        told: BaseException | None = end
        while told is not None and not isinstance(told, SettingError):
            told = told.__cause__ or told.__context__
        wrong = _complaint(kind, argv)
        message = str(told) if told else f"{wrong} See {prog} --help." if wrong else said.getvalue()
        raise SettingError(message) from None
    for field in dataclasses.fields(found):  # type: ignore[arg-type]
        if too_large(value := getattr(found, field.name)):
            raise SettingError(
                f"{field.name.replace('_', '-')}: got {value}, but expected whole numbers up to {LARGEST}. See {prog} --help."
            )
    return found


def _about(kind: type) -> str:
    """The docstring of the settings, wrapped (indented lines are what tyro leaves as they are), and how to use a file."""
    file = "--config FILE takes settings from a YAML, TOML or JSON file; the options below override it."
    width = min(shutil.get_terminal_size().columns, 100)
    paragraphs = [*textwrap.dedent("    " + (kind.__doc__ or "")).split("\n\n"), file]
    return "\n".join(
        textwrap.fill(" ".join(text.split()), width, initial_indent="  ", subsequent_indent="  ") for text in paragraphs
    )


def options_of(kind: type) -> dict[str, Any]:
    """The type of every option, by the name it has on the command line without its dashes."""
    options = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        notes = getattr(hint, "__metadata__", ())
        if not _POSITIONAL.intersection(notes):
            renamed = [note.name for note in notes if isinstance(getattr(note, "name", None), str)]
            options[renamed[0] if renamed else name.replace("_", "-")] = get_args(hint)[0] if notes else hint
    return options


_POSITIONAL = frozenset(get_args(tyro.conf.Positional[int])[1:])


def _takes_many(hint: Any) -> bool:
    return get_origin(hint) in (tuple, dict)


def _words(kind: type, argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """`argv` as options and the words after each that are its values; ("", [word]) for one that belongs to none."""
    options = options_of(kind)
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "-" or not word.startswith("-"):
            yield "", [word]
            continue
        option, equals, value = word.partition("=")
        hint = options.get(_plain(option))
        values = [value] if equals else []
        room = 0 if equals or hint in (None, bool) else len(words) if _takes_many(hint) else 1
        while room and words and not re.match("--[a-zA-Z]", words[0]):
            values.append(words.pop(0))
            room -= 1
        yield option, values


def _plain(option: str) -> str:
    return option.removeprefix("--").replace("_", "-")


def empty(option: str) -> SettingError:
    """What is said of an empty word after `option` ("": on its own), which a shell makes of a variable that is not set."""
    return SettingError(
        f"{option}: got '' (empty), but expected a value: give one, or leave {option} out."
        if option
        else "got '' (empty) as a word on its own, but expected a name or a path: give one, or leave it out."
    )


def gather(kind: type, argv: list[str]) -> list[str]:
    """`argv` with the values of an option that takes several, and was given several times, behind its first.

    Raises `SettingError` for an empty word: as a path it would be the current folder.
    """
    options = options_of(kind)
    many: dict[str, list[str]] = {}
    order = []
    for option, values in _words(kind, argv):
        name = _plain(option)
        if "" in values and name.replace("-", "_") not in may_be_empty(kind):
            raise empty(option)
        if not option or not _takes_many(options.get(name)):
            order.append([option, *values] if option else values)
            continue
        if not values:
            raise SettingError(f"{option}: expected at least one value after it.")
        if name not in many:
            many[name] = [option]
            order.append(many[name])
        many[name] += values
    return [word for words in order for word in words]


def _complaint(kind: type, argv: list[str]) -> str | None:
    """The first thing in `argv` that cannot be, and what was expected; None: it is nothing of the ordinary kinds."""
    options = options_of(kind)
    room = len(get_type_hints(kind)) - len(options)
    for option, values in _words(kind, argv):
        name = _plain(option)
        if not option:
            room -= 1
            if room < 0:
                return f"{values[0]!r} is one word too many: expected options, which start with --."
            continue
        hint = options.get(name)
        if hint is None and options.get(name.removeprefix("no-")) is not bool:
            close = difflib.get_close_matches(name.lstrip("-"), options, n=2, cutoff=0.6)
            return f"there is no option {option}." + (
                f" Did you mean {' or '.join('--' + x for x in close)}?" if close else ""
            )
        if hint in (None, bool):
            if values:
                return f"{option}: got {values[0]!r}, but it takes no value."
            continue
        if not values:
            return f"{option}: expected a value after it (one that begins with -- as {option}=VALUE)."
        try:
            if not _takes_many(hint):
                from_text(values[0], hint)
        except TypeError as error:
            return f"{option}: got {values[0]!r}, but expected {error}."
    return None
