"""The pieces of HTML that the report page is put together from. Every text that comes from a file goes through `escape`."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

TEMPLATE = Path(__file__).with_name("report.html")
EMPTY = "&ndash;"
"""Stands in a table for a value that is not there."""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole file. The template holds the style; the body goes in last, so that no text of a model is a place holder."""
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("{{title}}", escape(title)).replace("{{body}}", "\n".join(parts))


def section(name: str, title: str, body: str) -> str:
    """name: what a link to it ends in."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>'


def contents(links: dict[str, str]) -> str:
    """Links to the sections: {name: what the link says}."""
    items = "".join(f'<li><a href="#{name}">{escape(text)}</a></li>' for name, text in links.items())
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str] | str], kind: str = "", caption: str = "") -> str:
    """A table that becomes a list of cards on a narrow screen.

    columns: text. rows: cells as HTML, the first heads its row; a text instead of cells heads the rows that follow.
    """
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = "".join(_row(columns, row) for row in rows)
    says = f"<caption>{escape(caption)}</caption>" if caption else ""
    kind = f' class="{kind}"' if kind else ""
    return f'<div class="wide"><table{kind}>{says}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _row(columns: Sequence[str], row: Sequence[str] | str) -> str:
    if isinstance(row, str):
        return f'<tr class="group"><th colspan="{len(columns)}" scope="rowgroup">{escape(row)}</th></tr>'
    first, *cells = row
    tds = [_cell(*pair) for pair in zip(columns[1:], cells, strict=True)]
    return f'<tr><th scope="row">{first}</th>{"".join(tds)}</tr>'


def _cell(column: str, text: str) -> str:
    """A cell names its column, for the cards; one without a value is left out of them."""
    empty = ' class="empty"' if text == EMPTY else ""
    return f'<td{empty} data-name="{escape(column)}">{text}</td>'


def figure(svg: str | None, title: str, caption: str, more: str = "") -> str:
    """A drawing with the sentence that says how to read it; `more` is HTML under it."""
    if svg is None:
        return missing(f"{title}: nothing recorded to draw.")
    says = f"<figcaption>{escape(caption)}</figcaption>"
    return f"<figure><h3>{escape(title)}</h3>{svg}{says}{more}</figure>"


def details(title: str, body: str, opened: bool = False) -> str:
    """What can be opened and closed, with the mouse or from the keyboard."""
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{body}</details>"


def missing(sentence: str) -> str:
    """What the page cannot show, and why."""
    return f'<p class="missing">{escape(sentence)}</p>'


def note(sentence: str) -> str:
    return f'<p class="note">{escape(sentence)}</p>'


def mark(right: bool) -> str:
    """A sign for right or wrong, told apart by its shape and by its name."""
    name, label, sign = ("tick", "right", "&#10003;") if right else ("cross", "wrong", "&#10007;")
    return f'<b class="{name}" role="img" aria-label="{label}">{sign}</b>'


def share(value: float | None, interval: Sequence[float] | None = None) -> str:
    """A share in percent, under it its 95 % interval."""
    if value is None:
        return EMPTY
    under = f"<br> <small>{100 * interval[0]:.1f} to {100 * interval[1]:.1f}</small>" if interval else ""
    return f"{100 * value:.1f}&nbsp;%{under}"


def number(value: float | None, interval: Sequence[float] | None = None, digits: int = 0) -> str:
    if value is None:
        return EMPTY
    under = f"<br> <small>{interval[0]:,.{digits}f} to {interval[1]:,.{digits}f}</small>" if interval else ""
    return f"{value:,.{digits}f}{under}"


def count(n: int, noun: str) -> str:
    """1 -> "1 puzzle", 1200 -> "1,200 puzzles"."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
