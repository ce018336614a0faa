"""Settings from files: what they may say, what is refused, and in which words."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from nestling.config import SettingError, override, read_file, to_json


@dataclass(frozen=True)
class Settings:
    lanes: int = 8
    lr: float = 0.1
    minutes: float | None = None
    data: tuple[str, ...] = ()
    schedule: Literal["cosine", "flat"] = "cosine"
    quiet_mode: bool = False
    out: Path | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.lanes < 1:
            raise SettingError(f"lanes: got {self.lanes}, but expected at least 1.")


def test_every_kind_of_value_arrives_with_its_type():
    given = {
        "lanes": 2,
        "lr": 1,
        "minutes": 3,
        "data": "a.txt",
        "schedule": "flat",
        "quiet-mode": True,
        "out": "runs/x",
    }
    expected = Settings(2, 1.0, 3.0, ("a.txt",), "flat", True, Path("runs/x"), {"dim": 4})
    assert override(Settings(), given | {"overrides": {"dim": 4}}, "here") == expected
    assert isinstance(override(Settings(), {"lr": 1}, "here").lr, float)
    assert override(Settings(), to_json(expected), "json") == expected
    assert override(expected, {"minutes": None, "lr": "3e-4"}, "here").lr == 3e-4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lane": 2}, r"no setting 'lane'\. Did you mean 'lanes'"),
        ({"xyz": 2}, r"no setting 'xyz'\. There is: lanes"),
        ({"lanes": "two"}, "lanes = 'two', but expected a whole number"),
        ({"lanes": True}, "lanes = True, but expected a whole number"),
        ({"lanes": 2.5}, "expected a whole number"),
        ({"lr": "fast"}, "expected a number"),
        ({"schedule": "linear"}, "expected one of 'cosine', 'flat'"),
        ({"quiet_mode": "yes"}, "expected true or false"),
        ({"data": [1]}, "expected text"),
        ({"overrides": [1]}, "expected a mapping"),
        ({"lanes": 0}, "file.yaml: lanes: got 0"),
        ({"lanes": 10**20}, "expected whole numbers up to"),
        ({"lr": 10**400}, "expected whole numbers up to"),
        ({"overrides": {"periods": [8, 10**20]}}, "expected whole numbers up to"),
        ({"out": "a\0b"}, "expected a path"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(given, words):
    with pytest.raises(SettingError, match=words):
        override(Settings(), given, "file.yaml")


@pytest.mark.parametrize(
    ("name", "text"),
    [("c.yaml", "lanes: 3\nlr: 3e-4\n"), ("c.toml", "lanes = 3\nlr = 3e-4\n"), ("c.json", '{"lanes": 3, "lr": 3e-4}')],
)
def test_three_formats_say_the_same(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert override(Settings(), read_file(tmp_path / name), name) == Settings(lanes=3, lr=3e-4)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.yaml", "a: [", "not valid YAML"),
        ("c.toml", "a = ", "not valid TOML"),
        ("c.json", "{", "not valid JSON"),
        ("c.json", "[" * 100_000, "not valid JSON"),
        ("c.yaml", "[" * 10_000, "not valid YAML"),
        ("c.yaml", "- 1\n- 2\n", "expected `name: value` pairs"),
        ("c.ini", "a = 1", "ending in .yaml"),
        ("c.yaml", "!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_unreadable_files_are_refused_in_words(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingError, match=words):
        read_file(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingError, match=r"nowhere\.yaml: cannot be read"):
        read_file(tmp_path / "nowhere.yaml")
