"""The pages of docs/papers, made from the code: where each equation of a paper is, and what is built from it.

    python docs/generate.py            writes the pages (make docs does)
    python docs/generate.py --check    says which would change, but for line numbers, and fails if any would

Read are the citations in docstrings ("Titans, eq. 13–14"; a bare "eq. 15" is of the paper that its docstring or file cites
first) and the registries of memories and models. Nothing about a paper is written here but its title.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nestling as nl

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "nestling"
PAGES = ROOT / "docs" / "papers"


@dataclass(frozen=True)
class Paper:
    """How a paper is cited, its title, its number on arXiv."""

    name: str
    title: str
    arxiv: str

    @property
    def page(self) -> str:
        return self.name.lower().replace(" ", "-") + ".md"


PAPERS = (
    Paper("Titans", "Titans: Learning to Memorize at Test Time", "2501.00663"),
    Paper(
        "Miras",
        "It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online Optimization",
        "2504.13173",
    ),
    Paper("Lattice", "Lattice: Learning to Efficiently Compress the Memory", "2504.05646"),
    Paper("Atlas", "Atlas: Learning to Optimally Memorize the Context at Test Time", "2505.23735"),
    Paper("TNT", "TNT: Improving Chunkwise Training for Test-Time Memorization", "2511.07343"),
    Paper("Trellis", "Trellis: Learning to Compress Key-Value Memory in Attention Models", "2512.23852"),
    Paper("Nested Learning", "Nested Learning: The Illusion of Deep Learning Architectures", "2512.24695"),
)
NAMES = "|".join(paper.name for paper in PAPERS)

NUMBER = r"(?:[A-Z]\.)?\d+(?:\.\d+)*(?:–\d+(?:\.\d+)*)?"
PLACE = rf"(?:eq\. {NUMBER}|§{NUMBER}|(?:Table|prop\.|theorem|remark|fig\.|algorithm) {NUMBER}|appendix [A-Z](?:\.\d+)?|abstract)"
PLACES = rf"{PLACE}(?:(?:, and |, | and )(?:{PLACE}|{NUMBER}(?!\w)))*"
CITED = re.compile(
    rf"(?<![\w])(?P<paper>{NAMES}), (?P<places>{PLACES})|(?P<own>\b(?:its|in the) )?(?P<bare>{PLACES})(?![\w])"
)
ORDER = ("eq.", "§", "prop.", "theorem", "remark", "algorithm", "Table", "fig.", "appendix", "abstract")


@dataclass(frozen=True)
class Text:
    """A docstring: its file, the line where it begins, whose it is, and its text."""

    path: Path
    line: int
    owner: str
    text: str


@dataclass(frozen=True)
class Citation:
    """One place of a paper, where it is cited, and the sentence that cites it."""

    paper: str
    places: str
    path: Path
    line: int
    owner: str
    says: str

    @property
    def link(self) -> str:
        """Of the line, as seen from a page."""
        return link(self.path, self.line, self.owner)

    def key(self) -> tuple[int, tuple[int, ...], str]:
        """Sorts equations first, by number."""
        found = re.findall(PLACE, self.places)
        kind, first = min((next(n for n, word in enumerate(ORDER) if p.startswith(word)), p) for p in found)
        return kind, tuple(int(n) for n in re.findall(r"\d+", first.split("–")[0])), str(self.path)


def link(path: Path, line: int, owner: str = "") -> str:
    words = str(path.relative_to(SOURCE)) + (f", `{owner}`" if owner else "")
    return f"[{words}](../../{path.relative_to(ROOT)}#L{line})"


@lru_cache(maxsize=1)
def texts() -> tuple[Text, ...]:
    """All docstrings of the package."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                owner = "" if isinstance(node, ast.Module) else node.name
                found.append(Text(path, first.lineno, owner, first.value.value))
    return tuple(found)


ITEM = re.compile(r"^ *(?:\S+ )*?\S+ {2,}(?=\S)", re.MULTILINE)


def sentence(text: str, at: int) -> str:
    """The sentence around a place in a docstring; in a table, the row's."""
    first, last = text.rfind("\n\n", 0, at), text.find("\n\n", at)
    start = 0 if first < 0 else first + 2
    block = text[start : last if last >= 0 else len(text)]
    at -= start
    rows = [0, *(m.start() for m in ITEM.finditer(block)), len(block)]
    row = max(r for r in rows[:-1] if r <= at)
    block = block[row : min(r for r in rows if r > row)]
    at -= row
    term = ITEM.match(block)
    ends = re.finditer(r"(?<!\beq)(?<!\bprop)(?<!\bfig)[.] +(?=[^\Wa-z])|\.\n *", block)
    stops = [m.end() for m in ends if block.count("(", 0, m.start()) == block.count(")", 0, m.start())]
    first = max([0, *(stop for stop in stops if stop <= at)])
    last = min([*(stop for stop in stops if stop > at), len(block)])
    says = block[first:last].strip()
    if term and first == 0:
        head, _, tail = says.partition("  ")
        says = f"{head.rstrip(' ,:')}: " + re.sub(r"[;,]? {3,}", "; ", re.sub(r"\n *", " ", tail.strip()))
    elif (
        start > 0 and first == 0 and re.match(r"[a-z]+ |\(", says)
    ):  # it goes on behind an equation that stands by itself
        begins = [m.end() for m in re.finditer(r"[.] +(?=[^\Wa-z])|\.\n *", text[:start])]
        says = text[max([0, *begins]) : start] + says
    return " ".join(says.split())


def citations() -> list[Citation]:
    """Every citation in a docstring."""
    found, of_file = [], {}
    for text in texts():
        current: str | None = of_file.get(text.path) if text.owner else None
        for match in CITED.finditer(text.text):
            if match["paper"]:
                current = match["paper"]
                of_file.setdefault(text.path, current)
            if current is None:
                continue
            places = match["places"] or match["bare"]
            line = text.line + text.text.count("\n", 0, match.start())
            says = sentence(text.text, match.start())
            found.append(Citation(current, places, text.path, line, text.owner, says))
    return found


def bare(says: str) -> str:
    """A sentence without parentheses that only cite, as the columns beside it say where."""

    def kept(match: re.Match[str]) -> str:
        rest = re.sub(rf"(?:(?:{NAMES}), )?{PLACES}", "", match[0])
        return "" if len(rest.strip(" ();,.")) <= 12 and CITED.search(match[0]) else match[0]

    says = re.sub(rf"; {PLACES}$", "", re.sub(r" ?\([^()]*\)", kept, says))
    says = re.sub(rf"(?<=: ){PLACES}(?:, |$)", "", says)  # a column of a table
    return says.strip(" .;:,")


def of_paper(paper: Paper, text: str) -> bool:
    """Whether a text cites the paper, by place."""
    return any(match["paper"] == paper.name for match in CITED.finditer(text))


@lru_cache(maxsize=1)
def registered() -> dict[tuple[str, str], tuple[Path, int]]:
    """Where `register("name", …)` stands, by ("memory" or "models", name)."""
    found = {}
    for room in ("memory", "models"):
        for path in sorted((SOURCE / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "register"):
                    continue
                if node.args and isinstance(node.args[0], ast.Constant):
                    found[room, str(node.args[0].value)] = (path, node.lineno)
    return found


def first_paper(name: str) -> str | None:
    """The paper that a system's source names first."""
    match = re.search(rf"(?<!\w)({NAMES})(?!\w)", nl.memory.entry(name).source)
    return match[1] if match else None


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(*rows: tuple[str, ...]) -> Iterator[str]:
    """Of a heading and rows; nothing without rows."""
    if len(rows) > 1:
        yield ""
        for number, row in enumerate(rows):
            yield "| " + " | ".join(row) + " |"
            if number == 0:
                yield "| " + " | ".join("---" for _ in row) + " |"


def notes(text: str) -> list[str]:
    """What is from the paper, derived, ours: an item each."""
    return re.split(r"(?<=\.) (?=(?:From the paper|Derived|Our default|Left out)\b)", text)


READS = {
    "after": "after the token's own write",
    "before": "before the token's own write",
    "boundary": "at the chunk's start",
}


def symbols(mine: list[str]) -> Iterator[str]:
    """What the paper's letters are called here: a table in the docstring of the file of its systems."""
    files = {registered()["memory", name][0] for name in mine if not of_others(name)}
    for text in texts():
        if text.path not in files or text.owner:
            continue
        rows = re.findall(r"^(\S+(?: \S+)*) {2,}(\S.*)$", text.text, re.MULTILINE)
        if rows and rows[0] == ("paper", "here"):
            yield from ("", "## Its letters and ours", "")
            yield from textwrap.wrap(CONVENTIONS, 128, break_long_words=False)
            yield from table(("in the paper", "here"), *((cell(a), cell(b)) for a, b in rows[1:]))


CONVENTIONS = (
    "Vectors are rows here, x W, and weights `[in, out]`; the papers mostly write columns, W x. η, μ, α, β, γ and δ in our "
    "equations are the gates `lr`, `momentum`, `retention`, `delta`, `window` and `threshold` of `nl.memory.Gates`, α always the "
    "share that is kept. The token-by-token definitions that every fast path is held to are "
    f"{link(SOURCE / 'memory' / 'reference.py', 1)} and the other files of that name."
)


def system(name: str) -> Iterator[str]:
    """A named memory: how to build it, its choices, what in it is whose."""
    entry, words = nl.memory.entry(name), nl.memory.named(name).describe()
    yield from ("", f"### {name}", "", f"`{entry.equation}`", "")
    yield f"{entry.source}. {link(*registered()['memory', name])}"
    yield ""
    for part, heading in (
        ("features", "features"),
        ("network", "network"),
        ("bias", "objective"),
        ("retention", "retention"),
        ("rule", "rule"),
        ("period", "period"),
        ("read", "read"),
        ("gates", "gates"),
        ("state", "state at 64 a key"),
    ):
        said = words[part]
        if part == "read":
            said = re.sub(r"\b(after|before|boundary)\b", lambda word: READS[word[0]], said)
        yield f"- {heading}: {said}"
    yield ""
    for item in notes(entry.notes):
        yield from textwrap.wrap(item, 128, break_long_words=False)
        yield ""


def page(paper: Paper) -> str | None:
    """One page; None where nothing cites the paper."""
    mine = sorted((n for n in nl.memory.names() if first_paper(n) == paper.name), key=lambda n: (of_others(n), n))
    also = [n for n in nl.memory.names() if n not in mine and of_paper(paper, nl.memory.entry(n).source)]
    models = [name for name in nl.models.names() if of_paper(paper, nl.models.describe(name))]
    cited = grouped(sorted((c for c in citations() if c.paper == paper.name), key=Citation.key))
    if not (mine or also or models or cited):
        return None
    lines = [
        "<!-- Made by docs/generate.py from docstrings and registries: change those, then run make docs. -->",
        f"# {paper.name}: equation by equation",
        "",
        f"*{paper.title}*, [arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}).",
        *building(mine, models),
        *symbols(mine),
        "",
        "## Where each equation is",
        *table(
            ("in the paper", "what it says", "where"), *((places, cell(bare(c.says)), c.link) for places, c in cited)
        ),
    ]
    if mine:
        lines += [
            "",
            "## The memories",
            "",
            "What they are made of, and what is from the paper, derived, or our choice.",
        ]
        for name in mine:
            lines += system(name)
    if also:
        lines += ["", "## Memories of others that it restates"]
        rows = ((n, f"`{cell(nl.memory.entry(n).equation)}`", nl.memory.entry(n).source, elsewhere(n)) for n in also)
        lines += table(("memory", "equation", "source", "more"), *rows)
    if models:
        lines += ["", "## The models"]
        rows = ((name, cell(nl.models.describe(name)), link(*registered()["models", name])) for name in models)
        lines += table(("model", "what it is", "where"), *rows)
    ours = derived(paper, {bare(c.says) for _, c in cited})
    if ours:
        lines += ["", "## Derived, and ours", "", "What the docstrings say of it beside the equations."]
        lines += table(("what", "where"), *((cell(says), place) for says, place in ours))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def building(mine: list[str], models: list[str]) -> Iterator[str]:
    """The code that makes everything of a page."""
    if not (mine or models):
        return
    yield from ("", "## How to build it", "", "```python", "import nestling as nl", "")
    for name in mine:
        yield f'{name} = nl.memory.named("{name}", key_dim=64)'
    plain = next((name for name in mine if isinstance(nl.memory.named(name), nl.memory.MemorySpec)), None)
    if plain:
        yield f"layer = nl.layers.Memory(dim=256, heads=4, spec={plain})"
    for name in models:
        yield f'{name}_model = nl.models.build("{name}", size="tiny")'
    yield "```"


def grouped(cited: list[Citation]) -> list[tuple[str, Citation]]:
    """Citations by one sentence as one row."""
    rows: dict[tuple[Path, str], tuple[list[str], Citation]] = {}
    for c in cited:
        rows.setdefault((c.path, c.says), ([], c))[0].append(c.places)
    return [(", ".join(dict.fromkeys(places)), c) for places, c in rows.values()]


def of_others(name: str) -> bool:
    """Whether a memory is one of the classics, which no paper here brought."""
    return registered()["memory", name][0].stem == "classics"


def elsewhere(name: str) -> str:
    """The page where a memory is told in full, or its entry."""
    own = first_paper(name)
    page = next((paper.page for paper in PAPERS if paper.name == own), None)
    return f"[{own}]({page}#{name})" if page else link(*registered()["memory", name])


def derived(paper: Paper, told: set[str]) -> list[tuple[str, str]]:
    """Sentences of docstrings about this paper that say what is derived or ours, each with its place."""
    files = {c.path: c.paper for c in reversed(citations()) if c.path.parent.name != "systems"}
    found = {}
    for text in texts():
        if files.get(text.path) != paper.name:
            continue
        for match in re.finditer(r"\bderived\b|\bours?\b", text.text):
            says = bare(sentence(text.text, match.start()))
            if len(says) > 20 and says not in told:
                line = text.line + text.text.count("\n", 0, match.start())
                found.setdefault(says, link(text.path, line, text.owner))
    return list(found.items())


def steady(text: str) -> str:
    """A page without its line numbers, which move with every change of the code."""
    return re.sub(r"#L\d+\)", ")", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page would change")
    check = parser.parse_args().check
    stale = []
    for paper in PAPERS:
        path, made = PAGES / paper.page, page(paper)
        if made is None:
            continue
        before = path.read_text("utf-8") if path.exists() else ""
        if check and steady(before) != steady(made):
            stale.append(paper.page)
        elif not check and before != made:
            path.parent.mkdir(exist_ok=True)
            path.write_text(made, "utf-8")
    if stale:
        print(f"behind the code: {', '.join(stale)}. Run make docs.", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
