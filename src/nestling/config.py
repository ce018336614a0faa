"""Settings: frozen dataclasses that a file or a command line may override, and the errors that refuse what cannot be.

A setting lives in one place, the dataclass beside what it configures, with its default and its help. This module turns
a mapping (from YAML, TOML or JSON) into such a dataclass and says in words what does not fit. It needs no PyTorch, so
that `nestling --help` is quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import tomllib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


class SettingError(ValueError):
    """A setting that is unknown, impossible, or at odds with another; the message says what to change."""


def check_threads(threads: int | None) -> None:
    """Refuse a number of CPU threads that no machine of this size can use: PyTorch does not survive starting very many.

    At most 1024, or 4 for every core where that is more. Raises `SettingError`; None (PyTorch's own choice) passes.
    """
    cores = os.cpu_count() or 1
    most = max(1024, 4 * cores)
    if threads is not None and not 1 <= threads <= most:
        raise SettingError(
            f"threads: got {threads}, but expected a number from 1 to {most}; this machine has {cores} cores, and more "
            "threads than cores are slow."
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'lanes'?"` if a known name is close to `name`, otherwise the list of what there is."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f" Did you mean {' or '.join(repr(match) for match in close)}?"
    return f" There is: {', '.join(known)}."


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML, TOML or JSON file, told apart by suffix; raises `SettingError` for what cannot be
    read.
    """
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml", ".json"):
        raise SettingError(f"--config {path}: expected a file ending in .yaml, .yml, .toml or .json.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingError(f"--config {path}: cannot be read ({reason}).") from error
    try:
        if suffix == ".toml":
            settings: Any = tomllib.loads(text)
        elif suffix == ".json":
            settings = json.loads(text)
        else:
            import yaml

            try:
                settings = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(error) from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SettingError(f"--config {path}: is not valid {suffix[1:].upper()} ({reason}).") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise SettingError(f"--config {path}: expected `name: value` pairs, got {type(settings).__name__}.")
    return settings


def override(config: Config, settings: Mapping[str, Any], source: str) -> Config:
    """`config` (a dataclass instance) with `settings` put in; `-` and `_` are the same in names.

    Values are checked against the field's type: int, float (an int will do), bool, str, Path, Literal, optional, tuples
    of these (a lone value is a tuple of one) and mappings. Raises `SettingError` naming `source`, the setting, what
    came and what was expected.
    """
    hints = get_type_hints(type(config))
    values: dict[str, Any] = {}
    for key, value in settings.items():
        name = key.replace("-", "_")
        if name not in hints:
            raise SettingError(f"{source}: there is no setting {key!r}.{did_you_mean(name, hints)}")
        try:
            if "" in (value if isinstance(value, (list, tuple)) else [value]) and name not in may_be_empty(
                type(config)
            ):
                raise TypeError("something: give a value, or leave the setting out")
            values[name] = _fit(value, hints[name])
        except TypeError as error:
            raise SettingError(f"{source}: {key} = {value!r}, but expected {error}.") from None
    try:
        return dataclasses.replace(config, **values)  # type: ignore[type-var]
    except SettingError as error:
        raise SettingError(f"{source}: {error}") from error


def from_text(text: str, hint: Any) -> Any:
    """One word of a command line as the type `hint`, by the rules of `override`; raises TypeError(what was expected)."""
    arguments = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        if text == "None" and type(None) in arguments:
            return None
        try:
            return from_text(text, next(argument for argument in arguments if argument is not type(None)))
        except TypeError as error:
            raise TypeError(f"{error}{' or None' if type(None) in arguments else ''}") from None
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise TypeError(_WORDS[hint]) from None
    if get_origin(hint) is Literal:
        return _fit(text, hint)
    return text


def may_be_empty(kind: type) -> set[str]:
    """The settings that can be empty text, as they are by default; to every other one it is a name or a path left out."""
    return {field.name for field in dataclasses.fields(kind) if field.default == ""}


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass of settings as what JSON can hold; `override` reads it back."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return settings


def _fit(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; raises TypeError(what was expected)."""
    if too_large(value):
        raise TypeError(f"whole numbers up to {LARGEST}")
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _fit(value, next(argument for argument in arguments if argument is not type(None)))
    if origin is Literal:
        if value not in arguments:
            raise TypeError("one of " + ", ".join(repr(argument) for argument in arguments))
        return value
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_fit(item, arguments[0]) for item in items)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise TypeError("a mapping of names to values")
        return {str(key): item for key, item in value.items()}
    if hint is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 3e-4 as text
        try:
            return float(value)
        except ValueError:
            raise TypeError(_WORDS[hint]) from None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(_WORDS.get(hint, str(hint)))
    return value


LARGEST = 2**53  # a size or a seed: what every reader of JSON keeps exactly, and what sizes can be computed with


def too_large(value: Any) -> bool:
    """Whether this is, or has inside, a whole number that no size and no seed can be."""
    if isinstance(value, Mapping):
        return any(map(too_large, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(too_large, value))
    return isinstance(value, int) and abs(value) > LARGEST


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
}
