"""Refusing settings of a memory, in words."""

from __future__ import annotations


def whole_numbers(name: str, **settings: object) -> None:
    """Refuse what is no whole number of at least 1; name: the memory's."""
    for setting, number in settings.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: {setting} is {number!r}; expected a whole number of at least 1")


def read_timing(name: str, read: object) -> None:
    """Refuse a `read` that is not known."""
    if read not in ("after", "before", "boundary"):
        raise ValueError(f"{name}: read is {read!r}; expected 'after', 'before' or 'boundary'")
