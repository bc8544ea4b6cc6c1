"""Tables and figure of a set of puzzles, ours or published, as in the Cell-o1 paper (arXiv:2506.02911).

The paper has puzzles per disease (Table 5; 6,912 train + 1,095 test = 8,007) and cells per cell type (Tables 7 and 8); its
Table 6 counts the cell types of each tissue, where we count puzzles and cells.
"""

import io
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median

from data.audit import SplitFacts, audit, tenths
from data.puzzles import Puzzle

Splits = dict[str, Sequence[Puzzle]]
NOT_STATED = "not stated"
_TISSUE = re.compile(r"originating from the (.+?)(?:\.(?=\s|$)|\s+(?=(?:The|There|This) )|$)")
_DIAGNOSIS = re.compile(r"The patient has been diagnosed with (.+?)\.(?=\s|$)")
_HEALTHY = "The patient is healthy with no diagnosed disease"


def tissue_of(puzzle: Puzzle) -> str:
    """The tissue of a puzzle: its column, or, for a published row, what its context says; else 'not stated'."""
    found = _TISSUE.search(puzzle.context)
    return _stated(puzzle.meta.get("tissue")) or (found[1] if found else NOT_STATED)


def disease_of(puzzle: Puzzle) -> str:
    """The disease of a puzzle: its column, or what its context says; 'normal' for a healthy donor, as in CELLxGENE."""
    found = _DIAGNOSIS.search(puzzle.context)
    said = found[1] if found else "normal" if _HEALTHY in puzzle.context else NOT_STATED
    return _stated(puzzle.meta.get("disease")) or said


def _stated(value: object) -> str | None:
    """A metadata value as text; None where it is missing or unknown."""
    return None if value in (None, "", "unknown") else str(value)


def unlike(kept: Sequence[Puzzle], whole: Sequence[Puzzle]) -> list[str]:
    """How some puzzles of a file differ in their make-up from all of it, in words; [] where they are like all.

    A file can be in the order of sizes, or of the data sets that it was built from, so its first puzzles may be of a kind.
    """

    def sizes(some: Sequence[Puzzle]) -> list[int]:
        return sorted({len(one.candidates) if one.variant == "cell" else len(one.cells) for one in some})

    def span(numbers: list[int]) -> str:
        return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])

    of_kept, of_all = sizes(kept), sizes(whole)
    found = [f"they have {span(of_kept)} cells, all have {span(of_all)}"] if of_kept != of_all else []
    for key, noun in (("dataset", "data sets"), ("tissue", "tissues"), ("disease", "diseases")):
        n_kept, n_all = (len({str(puzzle.meta.get(key)) for puzzle in some}) for some in (kept, whole))
        found += [f"they are of {n_kept} of its {n_all} {noun}"] if n_kept < n_all else []
    return found


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """A way to group puzzles, or their cells, by a value."""

    title: str
    value: str
    """What the groups are called, in the head of the first column."""
    of_puzzle: Callable[[Puzzle], str | int] | None = None
    """The value of a puzzle; None where the value belongs to a cell."""
    of_cells: Callable[[Puzzle], Sequence[str | int]]
    """The value of every cell of a puzzle."""

    def counts(self, puzzles: Sequence[Puzzle]) -> dict[str, Counter]:
        """{"puzzles": {value: number}, "cells": {value: number}}; without "puzzles" where the value belongs to a cell.

        A cell counts once per puzzle that it is in.
        """
        found = {} if self.of_puzzle is None else {"puzzles": Counter(map(self.of_puzzle, puzzles))}
        return found | {"cells": Counter(chain.from_iterable(map(self.of_cells, puzzles)))}


def _by_puzzle(title: str, value: str, of_puzzle: Callable[[Puzzle], str | int]) -> Breakdown:
    return Breakdown(title=title, value=value, of_puzzle=of_puzzle, of_cells=lambda p: [of_puzzle(p)] * len(p.cells))


def _column(*names: str) -> Callable[[Puzzle], str]:
    """A function that gives the first of these metadata columns that a puzzle has."""
    return lambda puzzle: next((text for name in names if (text := _stated(puzzle.meta.get(name)))), NOT_STATED)


DISEASES = _by_puzzle("Diseases (after Table 5 of the paper)", "disease", disease_of)
TISSUES = _by_puzzle("Tissues", "tissue", tissue_of)
CELL_TYPES = Breakdown(title="Cell types (after Tables 7 and 8)", value="cell type", of_cells=lambda p: p.answer)
SIZES = _by_puzzle("Cells per puzzle, N", "N", lambda p: len(p.cells))
DATASETS = _by_puzzle("Datasets", "dataset", _column("dataset", "source"))
GENES = Breakdown(title="Genes per cell", value="genes listed", of_cells=lambda p: [len(cell) for cell in p.cells])
DONORS = _by_puzzle("Donors", "donor", _column("donor"))
BREAKDOWNS = (DISEASES, TISSUES, CELL_TYPES, SIZES, DATASETS, GENES, DONORS)


def statistics_markdown(splits: Splits, summary: str | None = None) -> str:
    """All tables as Markdown, with a column per split and one for the total. The same puzzles give the same bytes.

    summary: the result of `summary_table`, where the caller has it already.
    """
    intro = (
        "Cells are counted as places in puzzles: a cell in three puzzles counts three times. A healthy donor's disease "
        "is 'normal', as in CELLxGENE."
    )
    parts = ["# Statistics of the puzzles", intro, "## Summary", summary or summary_table(splits)]
    for breakdown in BREAKDOWNS:
        parts += [f"## {breakdown.title}", breakdown_table(breakdown, splits)]
    return "\n\n".join(parts) + "\n"


def with_total(splits: Splits) -> Splits:
    """The splits, followed by 'total' with all their puzzles where there are several splits."""
    return dict(splits) if len(splits) == 1 else {**splits, "total": list(chain.from_iterable(splits.values()))}


def facts_of(splits: Splits) -> dict[str, SplitFacts]:
    """{split or 'total': its counts}"""
    return {name: audit({name: puzzles}).splits[0] for name, puzzles in with_total(splits).items()}


def summary_table(splits: Splits) -> str:
    """A Markdown table with the numbers of puzzles, cells, donors, ... of every split and in total."""
    facts, columns = facts_of(splits), with_total(splits)
    rows: dict[str, list[str]] = {
        "puzzles": [f"{one.puzzles:,}" for one in facts.values()],
        "cells": [f"{one.cells:,}" for one in facts.values()],
        "distinct cells": [f"{one.distinct_cells:,}" for one in facts.values()],
        "cells seen before in the split": [
            _percent(one.cells - one.distinct_cells, one.cells) for one in facts.values()
        ],
        "duplicate puzzles": [
            f"{one.duplicate_puzzles:,} ({_percent(one.duplicate_puzzles, one.puzzles)})" for one in facts.values()
        ],
        "donors": [f"{one.donors:,}" if one.puzzles_with_donor else NOT_STATED for one in facts.values()],
    }
    for breakdown, name in (
        (DISEASES, "diseases"),
        (TISSUES, "tissues"),
        (DATASETS, "datasets"),
        (CELL_TYPES, "cell types"),
    ):
        found = [breakdown.counts(puzzles)["cells"].keys() - {NOT_STATED} for puzzles in columns.values()]
        rows[name] = [f"{len(values):,}" if values else NOT_STATED for values in found]
    for name, values_of in (
        (
            "puzzles per donor",
            lambda puzzles: [n for d, n in DONORS.counts(puzzles)["puzzles"].items() if d != NOT_STATED],
        ),
        ("cells per puzzle", lambda puzzles: [len(p.cells) for p in puzzles]),
        ("genes per cell", lambda puzzles: [len(cell) for p in puzzles for cell in p.cells]),
    ):
        rows[f"{name}: least / median / most"] = [_spread(values_of(puzzles)) for puzzles in columns.values()]
    of_empty = {i for i, puzzles in enumerate(columns.values()) if not puzzles}
    shown = [[name, *("-" if i in of_empty else cell for i, cell in enumerate(row))] for name, row in rows.items()]
    return markdown_table(["", *columns], shown)


def breakdown_table(breakdown: Breakdown, splits: Splits) -> str:
    """A Markdown table with a row per value, the most frequent first (numbers ascending), and a last row of sums."""
    counts = [breakdown.counts(puzzles) for puzzles in with_total(splits).values()]
    total = counts[-1][next(iter(counts[-1]))]
    if set(total) <= {NOT_STATED}:
        return f"No row states its {breakdown.value}."
    is_number = all(isinstance(value, int) for value in total)
    values = sorted(total, key=lambda value: value if is_number else (-total[value], value))
    head = [breakdown.value, *(f"{name} {unit}" for name in with_total(splits) for unit in counts[-1])]
    rows = [[str(value), *(f"{of_unit[value]:,}" for one in counts for of_unit in one.values())] for value in values]
    rows.append(["**all**", *(f"**{of_unit.total():,}**" for one in counts for of_unit in one.values())])
    return markdown_table(head, rows)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, with the first `left` columns aligned left and the others right."""
    lines = [head, [":---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join("| " + " | ".join(escape(cell) for cell in line) + " |" for line in lines)


def escape(text: str) -> str:
    """The text with Markdown's special characters escaped; '**bold**' stays bold."""
    text = " ".join(text.split())
    return re.sub(r"([\\|<`]|(?<!\*)\*(?!\*))", r"\\\1", text)


def _percent(part: int, whole: int) -> str:
    return f"{tenths(part / max(1, whole))} %"


def _spread(values: Sequence[int]) -> str:
    return f"{min(values)} / {median(values):g} / {max(values)}" if values else NOT_STATED


COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A8F98")
"""Okabe and Ito's colours, which colour-blind readers can tell apart; one per split, in order."""
SIZE, DPI = (13.0, 10.5), 150
"""Inches, and dots per inch: the picture is 1950 x 1575 pixels."""
TOP = 10
"""Most bars of a panel."""


def statistics_png(splits: Splits) -> bytes:
    """The figure as PNG, after Figure 3 of the paper: N by split; the most frequent tissues, diseases, cell types."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    splits = {name: puzzles for name, puzzles in splits.items() if puzzles}
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        FigureCanvasAgg(figure)
        upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.2), hspace=0.03)
        sizes, tissues = upper.subplots(1, 2)
        diseases, cell_types = lower.subplots(1, 2)
        _draw_sizes(sizes, splits)
        _draw_top(tissues, splits, TISSUES, "Tissues", "puzzles")
        _draw_top(diseases, splits, DISEASES, "Diseases", "puzzles")
        _draw_top(cell_types, splits, CELL_TYPES, "Cell types", "cells")
        handles, names = sizes.get_legend_handles_labels()
        legend = figure.legend(handles, names, loc="outside upper center", ncols=min(5, len(names)), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a "$" in a file name is no mathematics
        picture = io.BytesIO()
        figure.savefig(picture, format="png", metadata={"Software": None})  # without a version: the same bytes anywhere
    return picture.getvalue()


def _draw_sizes(axes, splits: Splits) -> None:
    """Bars, side by side, of the share of each split's puzzles by number of cells."""
    sizes = sorted({len(p.cells) for puzzles in splits.values() for p in puzzles})
    width = 0.8 / len(splits)
    for i, (name, puzzles) in enumerate(splits.items()):
        counts = SIZES.counts(puzzles)["puzzles"]
        shares = [100 * counts[size] / len(puzzles) for size in sizes]
        x = [position + (i - (len(splits) - 1) / 2) * width for position in range(len(sizes))]
        label = f"{name} ({len(puzzles):,} puzzles)"
        axes.bar(x, shares, width * 0.94, color=COLOURS[i % len(COLOURS)], label=label)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set(xlabel="cells in the puzzle, N", ylabel="% of the split's puzzles")
    axes.set_title("Puzzle size", loc="left", weight="bold")
    _lighten(axes, "y")


def _draw_top(axes, splits: Splits, breakdown: Breakdown, title: str, unit: str) -> None:
    """Horizontal bars of the TOP most frequent values, stacked by split, with the sum at the end."""
    from matplotlib.ticker import MaxNLocator

    counts = [breakdown.counts(puzzles)[unit] for puzzles in splits.values()]
    total = sum(counts, Counter())
    shown = sorted(total, key=lambda value: (-total[value], value))[:TOP]
    left = [0] * len(shown)
    for i, of_split in enumerate(counts):
        axes.barh(range(len(shown)), [of_split[value] for value in shown], 0.72, left, color=COLOURS[i % len(COLOURS)])
        left = [so_far + of_split[value] for so_far, value in zip(left, shown, strict=True)]
    for row, value in enumerate(shown):
        axes.annotate(f"{total[value]:,}", (total[value], row), (4, 0), textcoords="offset points", va="center", size=9)
    axes.set_yticks(range(len(shown)), [wrapped(str(value)) for value in shown], size=9, linespacing=1.05)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.set_ylim(max(len(shown), 4) - 0.4, -0.6)
    axes.set_xlim(0, 1.14 * total[shown[0]])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{unit} (a cell counts once per puzzle)" if unit == "cells" else unit)
    axes.set_title(title, loc="left", weight="bold")
    if len(shown) < len(total):
        part = sum(total[value] for value in shown) / total.total()
        axes.set_title(f"{len(shown)} of {len(total)}, {100 * part:.0f} % of the {unit}", loc="right", size=9)
    _lighten(axes, "x")


def _lighten(axes, axis: str) -> None:
    axes.grid(axis=axis, color="#e3e5e8", linewidth=0.7)
    axes.set_axisbelow(True)


def wrapped(label: str, width: int = 32, lines: int = 3) -> str:
    """The label broken into as few lines as fit the width, of similar lengths, and never cut.

    width: characters; a label that would need more than `lines` lines gets wider lines.
    """

    def split(width: int) -> list[str]:
        return textwrap.wrap(label, width, break_long_words=False, break_on_hyphens=False)

    while len(split(width)) > lines:
        width += 1
    least = len(split(width))
    while width > 1 and len(split(width - 1)) == least:
        width -= 1
    return "\n".join(split(width))
