"""docs/papers is what the code says: every citation leads to a line, every system to a page."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import nestling as nl

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    place = importlib.util.spec_from_file_location("generate_papers", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(place)
    sys.modules["generate_papers"] = module  # its dataclasses look themselves up
    place.loader.exec_module(module)
    return module


def test_the_pages_are_those_of_the_code(generate: ModuleType) -> None:
    """But for line numbers, which any change moves, and `make docs` puts right."""
    for paper in generate.PAPERS:
        made = generate.page(paper)
        if made is not None:
            stands = (generate.PAGES / paper.page).read_text("utf-8")
            assert generate.steady(stands) == generate.steady(made), f"{paper.page} is behind the code: run make docs"


def test_a_citation_leads_to_its_line(generate: ModuleType) -> None:
    found = {(c.paper, c.places): c for c in generate.citations()}
    momentum = found["Titans", "eq. 13–14"]
    assert momentum.path.name == "momentum.py"
    assert generate.bare(momentum.says) == "S ← μS − η∇ℓ, W ← αW + S: past surprise carries over"
    assert found["Miras", "eq. 15"].path.name == "huber.py", "a bare number is of the paper cited before it"
    for c in found.values():
        line = c.path.read_text("utf-8").splitlines()[c.line - 1]
        assert re.search(r"\d|appendix|abstract", line), f"{c.path}:{c.line} cites nothing"
        assert generate.bare(c.says), f"{c.path}:{c.line} says nothing"


def test_every_system_and_every_source_has_a_page(generate: ModuleType) -> None:
    pages = {paper: generate.page(paper) or "" for paper in generate.PAPERS}
    for name in nl.memory.names():
        full = [paper.name for paper, text in pages.items() if f"\n### {name}\n" in text]
        assert full == [generate.first_paper(name)], f"{name}: its source should begin with one of the papers"
    for name in ("titans", "memora"):
        notes = " ".join(nl.memory.describe(name)["notes"].split())
        text = next(text for text in pages.values() if f"\n### {name}\n" in text)
        assert notes in " ".join(text.split())


def test_a_sentence_is_found_in_prose_and_in_tables(generate: ModuleType) -> None:
    text = "First thing. A second one (Atlas, eq. 3) goes on. Third.\n\nname    its row\n        goes on (eq. 4)\nother   row\n"
    assert generate.sentence(text, text.index("Atlas")) == "A second one (Atlas, eq. 3) goes on."
    assert generate.sentence(text, text.index("eq. 4")) == "name: its row goes on (eq. 4)"
    named = "Found (Atlas, eq. 3; by A. Name. Or not) late. Then."
    assert generate.sentence(named, named.index("Atlas")) == "Found (Atlas, eq. 3; by A. Name. Or not) late."
    assert generate.bare("A second one (Atlas, eq. 3) goes on.") == "A second one goes on"
    assert (
        generate.bare("Kept (Atlas, eq. 3, with the half of its own)")
        == "Kept (Atlas, eq. 3, with the half of its own)"
    )
