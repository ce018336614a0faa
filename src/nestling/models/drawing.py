"""The nest as a picture: every frame is a frequency, and holds the faster ones (after Nested Learning, Figures 1 and 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from nestling.layers import Level, Period
from nestling.models.nest import merge

FORMATS = (".svg", ".png", ".pdf")
WIDTH = 900.0
PAD, GAP, HEAD, BETWEEN = 16.0, 14.0, 40.0, 28.0
INK, FAINT = "#1f2933", "#6b7785"
SLOW, FAST = (0x2F, 0x5D, 0x9B), (0xC4, 0x4A, 0x2B)
LABEL = 62.0
"""Width of a card's column of words, in points; so are all measures here."""
MOST_TICKS = 120


@dataclass(frozen=True)
class _Card:
    title: str
    lines: tuple[tuple[str, tuple[str, ...]], ...]
    generates: bool
    wide: bool = False
    """Alone in its row: its lines stand in two columns."""

    @property
    def columns(self) -> tuple[tuple[tuple[str, tuple[str, ...]], ...], ...]:
        half = (len(self.lines) + 1) // 2
        return (self.lines[:half], self.lines[half:]) if self.wide else (self.lines,)

    @property
    def height(self) -> float:
        return 38 + max(sum(12.5 * len(texts) + 3 for _, texts in lines) for lines in self.columns)


@dataclass(frozen=True)
class _Frame:
    """Levels of one period, and what lies between them and the slower frame around."""

    period: Period
    rows: tuple[tuple[_Card, ...], ...]
    transfers: tuple[str, ...]

    @property
    def height(self) -> float:
        """Without the frames inside."""
        return HEAD + sum(max(card.height for card in row) + GAP for row in self.rows)


def draw(levels: Sequence[Level], path: Path | str, title: str = "") -> Path:
    """Draw levels (of `nl.models.levels`, or `nl.models.of_optimizer`) into an .svg, .png or .pdf file; returns its path.

    The slowest level is the outermost frame. Every card says what a level is, what it learns from and by which rule; at a frame's
    edge stands how knowledge goes to the slower level; the ticks at its top are its updates.

    Raises ValueError for another kind of file, and where there is no level.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"draw: got {path.name!r}; expected a file that ends in {', '.join(FORMATS)}")
    if not levels:
        raise ValueError("draw: there are no levels; expected at least one")
    import matplotlib
    from matplotlib.figure import Figure

    frames = _frames(levels)
    height = 62 + sum(f.height for f in frames) + (BETWEEN + PAD) * (len(frames) - 1) + 46
    figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    pen = _Pen(axes)
    pen.text(PAD + 4, 26, title or "The nested system", 15, weight="bold")
    pen.text(PAD + 4, 46, "outside slow, inside fast: every frame is a frequency", 9.5, FAINT)
    tokens = [f.period.n for f in frames if f.period.unit == "token"]
    horizon = 2 * max([n for n in tokens if n] or [8])
    top = 60.0
    for depth, frame in enumerate(frames):
        left = PAD + PAD * depth
        inside = frames[depth:]
        size = sum(f.height for f in inside) + (BETWEEN + PAD) * (len(inside) - 1)
        color = _shade(depth, len(frames))
        pen.box(left, top, WIDTH - 2 * left, size, _light(color, 0.9 - 0.03 * depth), color, 1.4, 12)
        _head(pen, frame, left, top, color, WIDTH - PAD * (len(frames) + 1), horizon if tokens else None)
        y = top + HEAD
        for row in frame.rows:
            y = _row(pen, row, left + PAD, y, WIDTH - 2 * (left + PAD), color) + GAP
        if depth + 1 < len(frames):
            _between(pen, frames[depth + 1], left + 2 * PAD + 8, y - GAP, y + BETWEEN, _shade(depth + 1, len(frames)))
        top += frame.height + BETWEEN
    if tokens:
        pen.text(PAD + 4, height - 16, f"ticks: updates while a lane reads {horizon:,} tokens", 8.5, FAINT)
    with matplotlib.rc_context({"svg.hashsalt": "nest"}):
        figure.savefig(path, dpi=144, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    return path


def _frames(levels: Sequence[Level]) -> list[_Frame]:
    """Slow to fast."""
    merged = sorted(merge(levels), key=lambda found: found[0].period.key(), reverse=True)
    frames: list[_Frame] = []
    for _, group in groupby(merged, key=lambda found: found[0].period.key()):
        found = sorted(group, key=lambda pair: pair[0].transfer != "generation")  # left of what they generate
        left = PAD * (len(frames) + 2)
        cards = []
        for n, (level, members) in enumerate(found):
            wide = n == len(found) - 1 and n % 2 == 0
            cards.append(_card(level, members, (WIDTH - 2 * left - GAP) / 2, wide))
        rows = tuple(tuple(cards[n : n + 2]) for n in range(0, len(cards), 2))
        inside = [n + 1 < len(found) and level.transfer == "generation" for n, (level, _) in enumerate(found)]
        ways = dict.fromkeys(level.transfer for (level, _), within in zip(found, inside, strict=True) if not within)
        frames.append(_Frame(found[0][0].period, rows, tuple(ways)))
    return frames


def _card(level: Level, members: Sequence[Level], width: float, wide: bool) -> _Card:
    """width: of a card that shares its row with another, and of each column of one that does not."""
    name = level.name.split(".*.", 1)[-1]
    times = f"  × {len(members)} blocks" if len(members) > 1 else ""
    lines = {
        "is": level.network,
        "minimizes": level.bias,
        "keeps": level.retention,
        "moves by": level.rule,
        "reads": level.flow,
    }
    if level.period.unit == "token":
        lines["per lane"] = (
            "grows with the text"
            if any(m.weights is None for m in members)
            else f"{sum(m.weights or 0 for m in members):,} numbers"
        )
    slow, moved = sum(m.slow for m in members), sum(m.moved for m in members)
    if moved:
        lines["moves"] = f"{moved:,} slow parameters" + (
            "" if moved == slow else f", {slow:,} of which make no other level"
        )
    elif slow:
        lines["made of"] = f"{slow:,} slow parameters"
    room = width - LABEL - 26
    return _Card(
        name + times,
        tuple((word, tuple(_wrap(text, room, 9))) for word, text in lines.items()),
        level.transfer == "generation",
        wide,
    )


class _Pen:
    """Draws with points from the upper left corner."""

    def __init__(self, axes: Any) -> None:
        self.axes = axes

    def text(self, x: float, y: float, text: str, size: float, color: str = INK, **how: Any) -> None:
        self.axes.text(x, y, text, fontsize=size, color=color, va=how.pop("va", "baseline"), parse_math=False, **how)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        edge: str,
        line: float = 1.0,
        round_: float = 7,
    ) -> None:
        from matplotlib.patches import FancyBboxPatch

        style = f"round,pad=0,rounding_size={round_}"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=fill, ec=edge, lw=line))

    def line(self, xs: Sequence[float], ys: Sequence[float], color: str, width: float) -> None:
        self.axes.plot(xs, ys, color=color, lw=width, solid_capstyle="butt")

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: str, style: str = "-|>") -> None:
        how = {"arrowstyle": style, "color": color, "lw": 1.8, "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", xy=end, xytext=start, arrowprops=how)


def _head(pen: _Pen, frame: _Frame, left: float, top: float, color: str, right: float, horizon: int | None) -> None:
    """A frame's period, frequency, and the ticks of its updates, which end at `right` in every frame."""
    period = frame.period
    words = str(period) if period.n == 0 else f"every {period}" if period.n > 1 else f"every {period.unit}"
    about = f"frequency {period.often}"
    if period.unit == "step":
        about += " of the optimizer"
    pen.text(left + PAD, top + 25, words, 12, color, weight="bold")
    pen.text(left + PAD + _width(words, 12, bold=True) + 12, top + 25, about, 9, FAINT)
    if horizon is None:
        return
    wide, base = 240.0, top + 27
    first = right - wide
    pen.line([first, right], [base, base], color, 0.8)
    if period.unit == "step":
        pen.text(first - 8, top + 26, "a step ends", 8, FAINT, ha="right")
        pen.line([right, right], [base - 13, base], color, 2.2)
        return
    count = horizon if period.n == 0 else horizon // period.n
    if count > MOST_TICKS:
        pen.axes.fill_between([first, right], [base - 9] * 2, [base] * 2, color=color, alpha=0.45, lw=0)
        return
    for n in range(1, count + 1):
        x = first + wide * n / count
        pen.line([x, x], [base - 9, base], color, min(1.8, 120 / count))


def _row(pen: _Pen, row: Sequence[_Card], left: float, top: float, width: float, color: str) -> float:
    """A row of cards; returns where it ends."""
    height = max(card.height for card in row)
    each = (width - GAP * (len(row) - 1)) / len(row)
    for n, card in enumerate(row):
        x = left + n * (each + GAP)
        pen.box(x, top, each, height, "white", _light(color, 0.45))
        pen.text(x + 12, top + 20, card.title, 10.5, color, weight="bold")
        for place, lines in enumerate(card.columns):
            start, y = x + 12 + place * (each + GAP) / 2, top + 38
            for word, texts in lines:
                pen.text(start, y, word, 8.5, FAINT)
                for text in texts:
                    pen.text(start + LABEL, y, text, 9)
                    y += 12.5
                y += 3
        if card.generates and n + 1 < len(row):
            beside = top + 16  # of the title, which is short
            pen.arrow((x + each - 5, beside), (x + each + GAP + 5, beside), color)
            pen.text(x + each - 9, beside + 3, "generates", 8, color, ha="right", style="italic")
    return top + height


def _between(pen: _Pen, inner: _Frame, x: float, above: float, below: float, color: str) -> None:
    """How knowledge goes between a frame and the slower one around it."""
    ways = [way for way in inner.transfers if way != "none"]
    if not ways:
        return
    words = " · ".join(_TRANSFERS.get(way, way) for way in ways)
    pen.arrow((x, below), (x, above + 3), color, "<|-|>" if any("initial" in way for way in ways) else "-|>")
    pen.text(x + 13, (above + below) / 2 + 4, words, 9, color, style="italic")


_TRANSFERS = {
    "initialization": "initialization: where it begins is learned outside",
    "backpropagation": "backpropagation: all share one backward pass, each at its own frequency",
    "direct": "direct: what is held here is handed on as it is",
    "generation": "generation: this level makes what the slower one learns from, or with",
}


def _wrap(text: str, room: float, size: float) -> list[str]:
    """Words in lines that are at most `room` points wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _width(longer, size) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


@lru_cache(maxsize=4096)
def _width(text: str, size: float, bold: bool = False) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight="bold" if bold else "normal")
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, False)
    return float(width)


def _shade(depth: int, count: int) -> str:
    share = depth / max(count - 1, 1)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(SLOW, FAST, strict=True))


def _light(color: str, share: float) -> str:
    """The color, with so much white in it."""
    parts = (int(color[n : n + 2], 16) for n in (1, 3, 5))
    return "#" + "".join(f"{math.floor(p + (255 - p) * share):02x}" for p in parts)
