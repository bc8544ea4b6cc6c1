"""The pieces of HTML that the report page is made of. Every text that comes from a file goes through `escape`."""

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from data.audit import tenths

TEMPLATE = Path(__file__).with_name("report.html")
EMPTY = "&ndash;"
"""A missing value in a table."""


def with_policy(template: str) -> str:
    """The template with its content security policy in the place of {{policy}}.

    A page loads nothing, sends nothing, and runs no script but those of the template, which are known by their hash:
    text that got into a page unescaped would still not run.
    """
    scripts = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes) or "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; form-action 'none'"
    return template.replace("{{policy}}", policy)


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """The whole page. The template holds the style; `style` is added to it.

    The body is inserted last, so text of a model is never a place holder.
    """
    template = with_policy(TEMPLATE.read_text(encoding="utf-8")).replace("</style>", f"{style}</style>")
    return template.replace("{{title}}", escape(title)).replace("{{body}}", "\n".join(parts))


def section(name: str, title: str, body: str) -> str:
    """A section. name: the end of a link to it."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>'


def contents(links: dict[str, str]) -> str:
    """Links to the sections. links: {name of the section: text of the link}."""
    items = "".join(f'<li><a href="#{name}">{escape(text)}</a></li>' for name, text in links.items())
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str] | str], kind: str = "", caption: str = "") -> str:
    """A table, which becomes a list of cards on a narrow screen.

    columns: text. rows: cells as HTML, of which the first is the head of its row; a text instead of cells is a heading
    for the rows that follow. kind: CSS classes.
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
    """A cell. It names its column, for the cards; cards leave out cells without a value."""
    empty = ' class="empty"' if text == EMPTY else ""
    return f'<td{empty} data-name="{escape(column)}">{text}</td>'


def figure(svg: str | None, title: str, caption: str, more: str = "") -> str:
    """A drawing with a caption that says how to read it. svg: None where there is nothing to draw.

    more: HTML below it.
    """
    if svg is None:
        return missing(f"{title}: nothing recorded to draw.")
    says = f"<figcaption>{escape(caption)}</figcaption>"
    return f"<figure><h3>{escape(title)}</h3>{svg}{says}{more}</figure>"


def details(title: str, body: str, opened: bool = False) -> str:
    """A part that can be opened and closed, with the mouse or from the keyboard."""
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{body}</details>"


def missing(sentence: str) -> str:
    """A sentence that says what the page cannot show, and why."""
    return f'<p class="missing">{escape(sentence)}</p>'


def note(sentence: str) -> str:
    """A sentence that helps to read what is beside it."""
    return f'<p class="note">{escape(sentence)}</p>'


def mark(right: bool) -> str:
    """A sign for right or wrong, which differ in shape and name, not only in colour."""
    name, label, sign = ("tick", "right", "&#10003;") if right else ("cross", "wrong", "&#10007;")
    return f'<b class="{name}" role="img" aria-label="{label}">{sign}</b>'


def share(value: float | None, interval: Sequence[float] | None = None) -> str:
    """A share in percent, with its 95 % interval below it."""
    if value is None:
        return EMPTY
    under = f"<br> <small>{escape(f'{tenths(interval[0])} to {tenths(interval[1])}')}</small>" if interval else ""
    return f"{escape(tenths(value))}&nbsp;%{under}"


def number(value: float | None, interval: Sequence[float] | None = None, digits: int = 0) -> str:
    """A number, with its 95 % interval below it."""
    if value is None:
        return EMPTY
    under = f"<br> <small>{interval[0]:,.{digits}f} to {interval[1]:,.{digits}f}</small>" if interval else ""
    return f"{value:,.{digits}f}{under}"


def count(n: int, noun: str) -> str:
    """1 -> "1 puzzle", 1200 -> "1,200 puzzles"."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
