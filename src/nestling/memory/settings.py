"""Refusing settings of a memory, or of one of its choices, in words."""

from __future__ import annotations

import math


def whole_numbers(owner: object, *, least: int = 1, **settings: object) -> None:
    """Refuse what is no whole number of at least so much.  owner: the memory's name, or the choice whose settings these are"""
    for setting, number in settings.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ValueError(f"{_named(owner, setting)} is {number!r}; expected a whole number of at least {least}")


def numbers(
    owner: object, *, least: float = -math.inf, above: float = -math.inf, hint: str = "", **settings: object
) -> None:
    """Refuse what is no finite number of at least so much, or above it.  hint: why, or what else to do"""
    for setting, number in settings.items():
        finite = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        if not finite or number < least or number <= above:  # type: ignore[operator]
            bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
            raise ValueError(f"{_named(owner, setting)} is {number!r}; expected a finite number{bound}{hint}")


def switches(owner: object, **settings: object) -> None:
    """Refuse what is neither True nor False: any other word or number would count as one of them."""
    for setting, given in settings.items():
        if not isinstance(given, bool):
            raise ValueError(f"{_named(owner, setting)} is {given!r}; expected True or False")


def choice(owner: object, setting: str, given: object, kind: type, example: str) -> None:
    """Refuse what is no choice of a kind: a name, another kind's, a class that is still to be called.

    kind      the protocol that such choices answer;  example: some that do
    """
    if isinstance(given, type):
        raise ValueError(
            f"{_named(owner, setting)} is the class {given.__name__}; expected one made of it: {given.__name__}()"
        )
    if not isinstance(given, kind):
        raise ValueError(
            f"{_named(owner, setting)} is {given!r}; expected what answers nestling.memory.{kind.__name__}, such as {example}"
        )


def read_timing(name: str, read: object) -> None:
    """Refuse a `read` that is not known."""
    if read not in ("after", "before", "boundary"):
        raise ValueError(f"{name}: read is {read!r}; expected 'after', 'before' or 'boundary'")


def _named(owner: object, setting: str) -> str:
    return f"{owner}: {setting}" if isinstance(owner, str) else f"{type(owner).__name__}.{setting}"
