"""Numbers of a set of analysed traces, and pictures: the step diagram of one response, the summary of a set.

Cell-o1, arXiv:2506.02911, section 6.2 and Figure 6. Curriculum order is measured as the rank correlation, within a
response, between how early a cell is assigned and how often its true type is right over the whole set: 1 is easy first,
-1 is hard first, and an order that does not depend on ease, such as 1, 2, 3, ..., gives 0.
"""

import io
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from data.errors import UserError
from eval.metrics import wilson_interval
from eval.report.figures import BLUE, GREEN, GREY, ORANGE, percent
from eval.traces.reading import Step, TraceAnalysis
from reward.cellpuzzles import normalise_label

RED = "#d55e00"
N_BINS = 5
"""Parts into which the accuracy curve divides a response."""
OUTSIDE_SHOWN = 20
"""Labels outside the list that a summary names at most."""
STEPS_SHOWN = 30
"""Steps that a diagram draws at most."""
_STYLE = {"font.size": 9, "text.parse_math": False}  # "$" in a label or a file name is no mathematics
_LEFT, _RIGHT, _ROW, _COLUMN, _LINE, _LETTER = 2.9, 3.1, 0.5, 0.66, 0.15, 0.066
"""Inches of a step diagram: its two side columns, a row, a step, a further line of text in a row, a letter."""


@dataclass(frozen=True)
class TraceSummary:
    """The numbers of a set of responses. Shares are in [0, 1]; None where there was nothing to count."""

    n_responses: int
    n_cells: int
    """Cells of all responses together."""
    mean_steps: float
    in_cell_order: float
    """Share of responses that first assign the cells in the order 1, 2, ..., N."""
    self_reflection: float
    """Share of responses that give some cell another label than before."""
    reflections: int
    """Total number of changes of mind; the next three fields are shares of them."""
    towards_right: float | None
    away_from_right: float | None
    wrong_to_wrong: float | None
    contradiction: float | None
    """Share of valid responses whose answer gives some cell another label than the reasoning did last."""
    contradicted_cells: float | None
    """The same as a share of the cells with both labels; the next two fields are shares of these cells."""
    reasoning_was_right: float | None
    answer_was_right: float | None
    unassigned: float
    """Share of cells to which the reasoning gives no label."""
    duplicated: float
    """Share of responses whose reasoning ends with the same label for two cells."""
    outside: float
    """Share of responses that name a cell type outside the candidate list, in the reasoning or the answer."""
    outside_assigned: float
    """Share of responses that give such a type to a cell."""
    outside_labels: dict[str, int]
    """{label: number of responses that name it} of the most frequent such types."""
    curriculum: dict[str, float] | None
    """spearman, kendall: means over puzzles; low, high: 95 % interval of spearman; positive: share of puzzles with
    spearman above 0; puzzles: their number. None when no puzzle can be measured."""
    first_third: float | None
    """Accuracy of the first assignments of cells, among those in the first third of a response."""
    last_third: float | None
    """The same in the last third."""
    by_position: list[dict[str, float | None]]
    """{start, end, steps, accuracy, type_accuracy} of each part of a response, early to late. type_accuracy is the mean
    accuracy, over the whole set, of the true types of the cells that are assigned in this part."""
    type_accuracy: dict[str, float]
    """{true cell type: share of its cells that are right in valid answers}, or what the caller passed."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON object, in the order above."""
        return asdict(self)


def summarise_traces(
    analyses: Sequence[TraceAnalysis], per_type_accuracy: dict[str, float] | None = None
) -> TraceSummary:
    """The numbers of a set of responses.

    per_type_accuracy: accuracy by true cell type to measure the order against, such as another model's; default: that
    of the answers of these responses. Raises UserError when there is no response.
    """
    if not analyses:
        raise UserError("there is no trace to summarise: the list of analysed responses is empty")
    of_type = per_type_accuracy if per_type_accuracy is not None else type_accuracy(analyses)
    valid = [a for a in analyses if a.answer]
    changes = [pair for a in analyses for pair in a.reflections]
    both = [(label, a.answer[cell - 1], a.truth[cell - 1]) for a in valid for cell, label in a.last.items()]
    differ = [row for row in both if not _same(row[0], row[1])]
    cells = sum(len(a.truth) for a in analyses)
    placed = [(*one, of_type.get(a.truth[one[-1].cell - 1])) for a in analyses for one in _places(a)]
    named = Counter(label for a in analyses for label in a.outside)
    return TraceSummary(
        n_responses=len(analyses),
        n_cells=cells,
        mean_steps=fmean(len(a.steps) for a in analyses),
        in_cell_order=_share(analyses, lambda a: [s.cell for s in a.first] == list(range(1, len(a.truth) + 1))),
        self_reflection=_share(analyses, lambda a: a.reflections),
        reflections=len(changes),
        towards_right=_share(changes, lambda pair: pair[1].right),
        away_from_right=_share(changes, lambda pair: pair[0].right),
        wrong_to_wrong=_share(changes, lambda pair: not (pair[0].right or pair[1].right)),
        contradiction=_share(valid, lambda a: a.contradictions),
        contradicted_cells=_share(both, lambda row: not _same(row[0], row[1])),
        reasoning_was_right=_share(differ, lambda row: _same(row[0], row[2])),
        answer_was_right=_share(differ, lambda row: _same(row[1], row[2])),
        unassigned=sum(len(a.unassigned) for a in analyses) / cells,
        duplicated=_share(analyses, lambda a: a.duplicated),
        outside=_share(analyses, lambda a: a.outside),
        outside_assigned=_share(analyses, lambda a: set(a.outside) & {*a.answer, *(s.label for s in a.steps)}),
        outside_labels=dict(sorted(named.items(), key=lambda item: (-item[1], item[0]))[:OUTSIDE_SHOWN]),
        curriculum=_curriculum(analyses, of_type),
        first_third=_share([step for start, end, step, _ in placed if start + end < 2 / 3], lambda step: step.right),
        last_third=_share([step for start, end, step, _ in placed if start + end > 4 / 3], lambda step: step.right),
        by_position=_by_position(placed),
        type_accuracy={label: of_type[label] for label in sorted(of_type)},
    )


def type_accuracy(analyses: Iterable[TraceAnalysis]) -> dict[str, float]:
    """{true cell type: share of its cells that are right in valid answers}; empty without a valid answer."""
    right: dict[str, list[bool]] = defaultdict(list)
    for a in analyses:
        for given, label in zip(a.answer, a.truth, strict=False):
            right[label].append(_same(given, label))
    return {label: fmean(found) for label, found in right.items()}


def curriculum_of(analysis: TraceAnalysis, of_type: dict[str, float]) -> tuple[float, float] | None:
    """(Spearman's rho, Kendall's tau-b) between how early a cell is assigned and how easy its type is, in one response.

    of_type: {cell type: accuracy}. None when the response assigns fewer than three cells with known ease, or when all
    their types are equally easy.
    """
    ease = [of_type[label] for label in (analysis.truth[step.cell - 1] for step in analysis.first) if label in of_type]
    if len(ease) < 3 or len(set(ease)) == 1:
        return None
    # [cells] large for cells assigned early
    early = np.arange(len(ease), 0, -1.0)
    values = np.array(ease)
    # mean ranks, so that ties in ease count half
    ranks = np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])
    signs = np.sign(values[:, None] - values[None]), np.sign(early[:, None] - early[None])
    tau = (signs[0] * signs[1]).sum() / math.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum())
    return float(np.corrcoef(early, ranks)[0, 1]), float(tau)


def _curriculum(analyses: Sequence[TraceAnalysis], of_type: dict[str, float]) -> dict[str, float] | None:
    """Means over puzzles.

    A puzzle counts with the mean of its responses, because these are not independent of each other.
    """
    by_puzzle: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for a in analyses:
        found = curriculum_of(a, of_type)
        if found is not None:
            by_puzzle[a.id].append(found)
    if not by_puzzle:
        return None
    rho = [fmean(pair[0] for pair in pairs) for pairs in by_puzzle.values()]
    tau = [fmean(pair[1] for pair in pairs) for pairs in by_puzzle.values()]
    # normal approximation over puzzles; with one puzzle the interval is everything
    half = 1.96 * stdev(rho) / math.sqrt(len(rho)) if len(rho) > 1 else math.inf
    return {
        "spearman": fmean(rho),
        "low": max(-1.0, fmean(rho) - half),
        "high": min(1.0, fmean(rho) + half),
        "kendall": fmean(tau),
        "positive": fmean(value > 0 for value in rho),
        "puzzles": len(rho),
    }


def _places(analysis: TraceAnalysis) -> list[tuple[float, float, Step]]:
    """(where it begins, where it ends, step) of the first assignment of each cell; the response goes from 0 to 1."""
    n = len(analysis.first)
    return [(i / n, (i + 1) / n, step) for i, step in enumerate(analysis.first)]


def _by_position(placed: list[tuple[float, float, Step, float | None]]) -> list[dict[str, float | None]]:
    """A row for each part of the responses: what is right among the steps there, and how many they are.

    placed: (begin, end, step, accuracy of its type). A step counts in each part by how much of it lies there: so all parts
    have the same mixture of responses, also where these have as many steps as no multiple of the parts.
    """
    rows = []
    for part in range(N_BINS):
        low, high = part / N_BINS, (part + 1) / N_BINS
        here = [
            (max(0.0, min(end, high) - max(start, low)) / (end - start), step, ease)
            for start, end, step, ease in placed
        ]
        known = [(weight, ease) for weight, _, ease in here if ease is not None]
        steps, of_known = sum(weight for weight, _, _ in here), sum(weight for weight, _ in known)
        if steps:
            rows.append(
                {
                    "start": low,
                    "end": high,
                    "steps": steps,
                    "accuracy": sum(weight for weight, step, _ in here if step.right) / steps,
                    "type_accuracy": sum(weight * ease for weight, ease in known) / of_known if of_known else None,
                }
            )
    return rows


def _share(rows: Sequence, holds: Callable[[Any], Any]) -> float | None:
    return fmean(bool(holds(row)) for row in rows) if rows else None


def _same(one: str, other: str) -> bool:
    return normalise_label(one) == normalise_label(other)


def steps_png(analysis: TraceAnalysis, title: str = "") -> bytes:
    """The step diagram of one response as a PNG file."""
    with matplotlib.rc_context(_STYLE):
        return _png(_steps_figure(analysis, title), 130)


def _steps_figure(whole: TraceAnalysis, title: str) -> Figure:
    """Rows are cells with true labels, columns the first STEPS_SHOWN steps; the final answer is on the right."""
    analysis = replace(whole, steps=whole.steps[:STEPS_SHOWN])
    x = _columns(analysis.steps)
    texts = [_caption(analysis, i, x) for i in range(len(analysis.steps))]
    height_of = dict.fromkeys(range(1, len(analysis.truth) + 1), 1)
    for step, (text, _) in zip(analysis.steps, texts, strict=True):
        height_of[step.cell] = max(height_of[step.cell], text.count("\n") + 1)
    bottoms = np.cumsum([_ROW + _LINE * (lines - 1) for lines in height_of.values()])
    y = {cell: float(bottom) - 0.2 for cell, bottom in zip(height_of, bottoms, strict=True)}
    width, height = _LEFT + x[-1] + _RIGHT, float(bottoms[-1]) + 1.35
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((_LEFT / width, 0.75 / height, 1 - (_LEFT + _RIGHT) / width, float(bottoms[-1]) / height))
    axes.set(xlim=(0, x[-1]), ylim=(bottoms[-1], 0), yticks=[])
    axes.set_xticks(x[: len(analysis.steps)], range(1, len(analysis.steps) + 1))
    left_out = len(whole.steps) - len(analysis.steps)
    axes.set_xlabel("step of the reasoning" + (f" ({left_out} more not drawn)" if left_out else ""))
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for cell, truth in enumerate(analysis.truth, start=1):
        axes.axhline(y[cell], color=GREY, alpha=0.25, linewidth=0.8, zorder=0)
        _beside(axes, 0, y[cell], f"{cell}  {truth}", -8, ha="right")
        if cell not in whole.last:
            _beside(axes, 0, y[cell], "given no label", 6, va="bottom", color=GREY)
    _draw_changes(axes, analysis, x, y)
    for i, step in enumerate(analysis.steps):
        _draw_step(axes, x[i], y[step.cell], step, *texts[i])
    _draw_answer(axes, whole, y)
    _beside(axes, 0, 0, "cell and its true type", -8, ha="right", va="bottom", weight="bold")
    figure.text(0.12 / width, 1 - 0.24 / height, title or whole.id, weight="bold", fontsize=11)
    figure.legend(handles=_legend(), loc="lower left", ncols=6, frameon=False, fontsize=8.5, handletextpad=0.3)
    return figure


def _beside(axes: Axes, edge: int, y: float, text: str, points: float, **style: Any) -> None:
    """Write text beside the left (edge 0) or right (edge 1) side of a step diagram, `points` points away from it."""
    style = {"va": "center", "linespacing": 1.08} | style
    axes.annotate(_wrap(text, 2.6), (edge, y), (points, 0), ("axes fraction", "data"), "offset points", **style)


def _columns(steps: Sequence[Step]) -> list[float]:
    """[steps + 1] distances in inches from the left side to each step and to the right side.

    There is more room between two steps of the same cell, whose labels are in the same row.
    """
    x = [0.45]
    for i, step in enumerate(steps):
        again = i + 1 < len(steps) and steps[i + 1].cell == step.cell
        # a label is drawn right of its marker: leave room for it before the cell's next marker
        x.append(x[-1] + max(_COLUMN, again * (0.2 + _LETTER * max(map(len, step.label.split())))))
    return [*x[:-1], max(x[-1] + 0.4, 2.5)]


def _caption(analysis: TraceAnalysis, i: int, x: list[float]) -> tuple[str, str]:
    """(label of step i, wrapped to the room before the cell's next step; the side of it that is at the marker)."""
    step = analysis.steps[i]
    text = step.label + " (not in the list)" * (not step.listed)
    others = [k for k, other in enumerate(analysis.steps) if other.cell == step.cell and k != i]
    right = x[min([k for k in others if k > i], default=-1)] - x[i] - 0.08
    left = 0 if others else x[i]
    side, room = ("right", left) if right < min(1.8, left) else ("left", right)
    return _wrap(text, min(2.4, room)), side


def _wrap(text: str, inches: float) -> str:
    return "\n".join(textwrap.wrap(text, max(8, int(inches / _LETTER)), break_long_words=False))


def _draw_step(axes: Axes, x: float, y: float, step: Step, text: str, side: str) -> None:
    """Draw a step: a green disc or a red cross, its label above, and a ring if another cell has the label."""
    if step.taken:
        axes.plot([x], [y], "o", markersize=14, markerfacecolor="none", markeredgecolor=ORANGE, markeredgewidth=1.4)
    colour, shape = (GREEN, "o") if step.right else (RED, "X")
    axes.plot([x], [y], shape, color=colour, markersize=9, markeredgecolor="white", markeredgewidth=0.6)
    style = {"fontsize": 7.5, "ha": side, "va": "bottom", "linespacing": 1.08}
    axes.annotate(text, (x, y), (4 if side == "right" else -4, 8), textcoords="offset points", **style)


def _draw_changes(axes: Axes, analysis: TraceAnalysis, x: list[float], y: dict[int, float]) -> None:
    """Draw an arrow from each assignment to the one that replaces it."""
    place = {id(step): x[i] for i, step in enumerate(analysis.steps)}
    style = {"arrowstyle": "-|>", "color": BLUE, "linewidth": 1.6, "shrinkA": 6, "shrinkB": 7}
    for before, after in analysis.reflections:
        axes.annotate("", (place[id(after)], y[after.cell]), (place[id(before)], y[after.cell]), arrowprops=style)


def _draw_answer(axes: Axes, analysis: TraceAnalysis, y: dict[int, float]) -> None:
    """Write the column of the final answer."""
    _beside(axes, 1, 0, "final answer", 12, va="bottom", weight="bold")
    if not analysis.answer:
        _beside(axes, 1, fmean(y.values()), "no valid answer", 12, color=RED)
    for cell, (given, truth) in enumerate(zip(analysis.answer, analysis.truth, strict=False), start=1):
        colour, mark = (GREEN, "\u25cf") if _same(given, truth) else (RED, "\u2716")
        changed = " (reasoning says otherwise)" if cell in analysis.contradictions else ""
        _beside(axes, 1, y[cell], mark, 12, color=colour)
        _beside(axes, 1, y[cell], given + changed, 26, fontsize=8.5)


def _legend() -> list[Line2D]:
    plain = {"linestyle": "none", "markersize": 8}
    return [
        Line2D([], [], color=GREEN, marker="o", label="right", **plain),
        Line2D([], [], color=RED, marker="X", label="wrong", **plain),
        Line2D([], [], color=BLUE, marker=">", linestyle="-", label="changes its mind"),
        Line2D([], [], color=ORANGE, marker="o", markerfacecolor="none", label="another cell has this label", **plain),
    ]


def summary_png(summary: TraceSummary, title: str = "") -> bytes:
    """Two panels as a PNG file: accuracy along the reasoning, and the share of responses with each habit."""
    with matplotlib.rc_context(_STYLE | {"axes.spines.top": False, "axes.spines.right": False}):
        return _png(_summary_figure(summary, title), 150)


def _summary_figure(summary: TraceSummary, title: str) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    if title:
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
    curve, bars = figure.subplots(1, 2, width_ratios=(1.15, 1))
    rows = summary.by_position
    middle = [(row["start"] + row["end"]) / 2 for row in rows]
    for x, row in zip(middle, rows, strict=True):
        curve.plot([x, x], wilson_interval(row["accuracy"], row["steps"]), color=BLUE, linewidth=1.2)
    curve.plot(middle, [row["accuracy"] for row in rows], "o-", color=BLUE, label="of the assignments made here")
    ease = [math.nan if row["type_accuracy"] is None else row["type_accuracy"] for row in rows]
    curve.plot(middle, ease, "s--", color=ORANGE, label="of their cell types over valid answers")
    curve.set(xlim=(0, 1), xlabel="place in the reasoning (0 first, 1 last assignment)", ylim=(-0.03, 1.03))
    curve.set_title("Accuracy along the reasoning", loc="left")
    curve.legend(loc="lower left", frameon=False)
    shares = {
        "changes its mind": summary.self_reflection,
        "answer contradicts reasoning": summary.contradiction,
        "names a type outside the list": summary.outside,
        "ends with a label at two cells": summary.duplicated,
        "goes in cell order 1 to N": summary.in_cell_order,
    }
    for place, share in enumerate(shares.values()):
        bars.barh(place, share or 0, color=BLUE if share is not None else GREY, height=0.62)
        text = percent(share) if share is not None else "nothing to count"
        bars.annotate(text, (share or 0, place), (4, 0), textcoords="offset points", va="center")
    bars.set_yticks(range(len(shares)), list(shares))
    bars.set(ylim=(len(shares) - 0.5, -0.5), xlim=(0, 1.15), xticks=[0, 0.25, 0.5, 0.75, 1])
    bars.set_title("Share of responses", loc="left")
    bars.grid(False)
    for axis in (curve.yaxis, bars.xaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    return figure


def _png(figure: Figure, dpi: int) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
