"""The examples in the README and the guide run as they stand there, one file after the other from top to bottom."""

from __future__ import annotations

import re
import runpy
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))) if "```python" in p.read_text("utf-8")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    script = tmp_path / "example.py"
    script.write_text("\n".join(blocks), "utf-8")
    monkeypatch.chdir(tmp_path)
    for room, entries in (("nestling.memory.named", "_SYSTEMS"), ("nestling.models.registry", "_MODELS")):
        registry = import_module(room)
        monkeypatch.setattr(registry, entries, dict(getattr(registry, entries)))  # what a page registers goes with it
    runpy.run_path(str(script))


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target
