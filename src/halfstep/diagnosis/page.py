"""A page that needs nothing else: one HTML file with its style, its plots and the library that
draws them.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from halfstep.errors import OperandError

__all__ = [
    "Card",
    "Page",
    "Tone",
    "check_writable",
    "figure",
    "note",
    "paragraph",
    "table",
    "write_whole",
]

_STYLE = """
:root { --ink: #1d2433; --soft: #5b6475; --line: #e3e7ee; --paper: #ffffff; --ground: #f4f6fa;
        --good: #0f7b55; --bad: #b3261e; --plain: #33507a; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", Roboto, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 32px 20px 64px; }
header p.kicker { margin: 0; color: var(--soft); letter-spacing: .04em; }
h1 { font-size: 30px; line-height: 1.2; margin: 6px 0 14px; }
h2 { font-size: 21px; margin: 0 0 6px; } h3 { font-size: 16px; margin: 18px 0 0; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
          padding: 22px 24px; margin: 18px 0; }
section p { max-width: 78ch; margin: 8px 0; }
p.note, footer { color: var(--soft); font-size: 14px; }
ul.verdict { padding-left: 20px; margin: 8px 0; } ul.verdict li { margin: 6px 0; max-width: 80ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(178px, 1fr)); gap: 14px; }
.card { background: var(--paper); border: 1px solid var(--line); border-top: 4px solid var(--plain);
        border-radius: 10px; padding: 14px 16px; }
.card.good { border-top-color: var(--good); } .card.bad { border-top-color: var(--bad); }
.card .figure { font-size: 25px; font-weight: 650; line-height: 1.2; }
.card .label { font-weight: 600; } .card .detail { color: var(--soft); font-size: 14px; }
.warning { border-left: 5px solid var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; margin: 8px 0; }
th { text-align: left; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th, td { padding: 6px 10px 6px 0; vertical-align: top; }
td { border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; padding-right: 18px; }
code { font: 13.5px ui-monospace, "DejaVu Sans Mono", Menlo, monospace; background: var(--ground);
       padding: 1px 4px; border-radius: 4px; }
mark { background: #fde3e1; color: var(--bad); border-radius: 3px; padding: 0 1px; }
""".strip()


class Tone(StrEnum):
    """How a card looks: class names of the style sheet."""

    PLAIN = ""
    GOOD = "good"
    BAD = "bad"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One figure to be seen first: ``figure`` large, ``label`` above, ``detail`` below;
    plain text.
    """

    label: str
    figure: str
    detail: str
    tone: Tone = Tone.PLAIN


class Page:
    """A page built from the top: header, cards, sections, footer; then :meth:`html`.

    ``title``, ``kicker`` and headings are plain text; the bodies of sections are HTML, from
    :func:`paragraph`, :func:`table` and :func:`figure`, which escape what they are given.
    """

    def __init__(self, *, kicker: str, title: str) -> None:
        self._title = title
        header = f'<p class="kicker">{html.escape(kicker)}</p><h1>{html.escape(title)}</h1>'
        self._parts = [f"<header>{header}</header>"]
        self._footer = ""

    def cards(self, cards: Iterable[Card]) -> None:
        """A row of figures."""
        shown = "".join(
            f'<div class="card {card.tone}"><div class="label">{html.escape(card.label)}</div>'
            f'<div class="figure">{html.escape(card.figure)}</div>'
            f'<div class="detail">{html.escape(card.detail)}</div></div>'
            for card in cards
        )
        self._parts.append(f'<div class="cards">{shown}</div>')

    def verdict(self, heading: str, sentences: Iterable[str], *, warning: bool = False) -> None:
        """A section of sentences, one a line; ``warning`` marks it."""
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
        self._parts.append(
            f'<section class="{"warning" if warning else ""}"><h2>{html.escape(heading)}</h2>'
            f'<ul class="verdict">{items}</ul></section>'
        )

    def section(self, heading: str, *bodies: str) -> None:
        """A section; ``bodies`` are HTML."""
        self._parts.append(f"<section><h2>{html.escape(heading)}</h2>{''.join(bodies)}</section>")

    def footer(self, lines: Iterable[str]) -> None:
        """Small lines at the end, plain text."""
        self._footer = "<br>".join(html.escape(line) for line in lines)

    def html(self) -> str:
        """The whole document. Nothing in it is loaded from anywhere."""
        from plotly.offline import get_plotlyjs

        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<link rel="icon" href="data:,">'
            f"<title>{html.escape(self._title)}</title><style>{_STYLE}</style>"
            f"<script>{get_plotlyjs()}</script></head><body><main>{''.join(self._parts)}"
            f"<footer>{self._footer}</footer></main></body></html>\n"
        )


def paragraph(text: str) -> str:
    """A paragraph of plain text; what stands between backticks is set as code."""
    pieces = html.escape(text).split("`")
    shown = "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))
    return f"<p>{shown}</p>"


def note(text: str) -> str:
    """A paragraph in small grey letters."""
    return paragraph(text).replace("<p>", '<p class="note">', 1)


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Iterable[int] = (),
    raw: bool = False,
) -> str:
    """A table of plain text (of HTML, if ``raw``); the columns in ``numbers`` are set
    to the right.
    """
    right = set(numbers)

    def cell(tag: str, index: int, text: str) -> str:
        kind = ' class="number"' if index in right else ""
        content = text if raw and tag == "td" else html.escape(text)
        return f"<{tag}{kind}>{content}</{tag}>"

    titles = "".join(cell("th", i, text) for i, text in enumerate(head))
    lines = "".join(
        f"<tr>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def figure(plot: Any, name: str) -> str:
    """The plot (a plotly Figure) as HTML with the identifier ``name``; the page carries the
    library.
    """
    return plot.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"displaylogo": False, "responsive": True, "displayModeBar": False},
    )


def check_writable(output: Path) -> None:
    """Raise now, not after the work: `OperandError` where ``output`` is no place for a page.

    Its folder is made where there is none.
    """
    if output.is_dir() or (output.exists() and not os.access(output, os.W_OK)):
        raise OperandError(f"the page cannot be written to {output}; give the name of a file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OperandError(f"the folder of {output} cannot be made: {error}") from error


def write_whole(file: Path, text: str) -> None:
    """Write ``text`` to ``file`` whole or not at all: beside it first, then moved into
    its place.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
