"""The figures of the report page that compare stages: by number of cells, by group, along the reasoning.

Inline SVG in the page's colours (eval/report/figures.py). Stages differ in the shape of their points as well as in
colour.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from eval.breakdowns import n_batches
from eval.metrics import wilson_interval
from eval.report.figures import INK, STAGE_COLOURS, STAGE_NAMES, page_style, percent, percent_axis, svg_element

SHAPES = {"base": "s", "sft": "^", "grpo": "o"}
WIDTH = 4.8
"""Width of a figure in inches: narrow, so that its text stays legible on a phone."""
_LETTERS = 26
"""Letters of a label before a line break."""


@dataclass(frozen=True)
class Dots:
    """A row of a dot plot."""

    label: str
    values: dict[str, tuple[float, Sequence[float] | None]]
    """{stage: (share, its interval)}"""


def by_size_svg(groups: dict[str, list[dict[str, Any]]], guessing: bool) -> str:
    """Cell and batch accuracy against N. groups: {stage: rows of a breakdown by N}. guessing: draw 1 / N."""
    sizes = sorted({row["value"] for rows in groups.values() for row in rows})
    beside = min(0.12, 0.03 * (sizes[-1] - sizes[0] + 1.2))  # stages are shifted, so that no point hides another
    with page_style():
        figure = Figure(figsize=(WIDTH, 4.9), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, metric, title in (
            (upper, "cell_accuracy", "cells right"),
            (lower, "batch_accuracy", "whole puzzles right"),
        ):
            axes.set_title(title, loc="left", fontsize=10)
            for place, (stage, rows) in enumerate(groups.items()):
                x = [row["value"] + beside * (place - (len(groups) - 1) / 2) for row in rows]
                axes.plot(
                    x, [row[metric] for row in rows], SHAPES[stage] + "-", color=STAGE_COLOURS[stage], markersize=5
                )
                for at, row in zip(x, rows, strict=True):
                    if n_batches(row) > 1 and row.get("intervals"):
                        axes.plot(
                            [at, at], row["intervals"][metric], color=STAGE_COLOURS[stage], linewidth=1, alpha=0.7
                        )
            percent_axis(axes)
        if guessing:
            upper.plot(sizes, [1 / n for n in sizes], ":", color=INK, linewidth=1.2)
        lower.set(xlabel="N, cells in a puzzle", xlim=(sizes[0] - 0.6, sizes[-1] + 0.6))
        lower.xaxis.set_major_locator(FixedLocator(sizes) if len(sizes) < 13 else MaxNLocator(integer=True))
        dotted = [Line2D([], [], color=INK, linestyle=":", linewidth=1.2, label="guessing")] if guessing else []
        _stage_legend(figure, list(groups), dotted)
        return svg_element(figure, "Accuracy by number of cells")


def distribution_svg(found: dict[str, dict[str, Any]]) -> str:
    """Histograms of the share of cells right, a panel per stage.

    found: {stage: result of eval.breakdowns.distribution}.
    """
    with page_style():
        figure = Figure(figsize=(WIDTH, 0.9 + 1.35 * len(found)), layout="constrained")
        panels = figure.subplots(len(found), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, (stage, spread) in zip(panels, found.items(), strict=True):
            total = sum(part["batches"] for part in spread["bins"])
            heights = [part["batches"] / total for part in spread["bins"]]
            middles = [-0.07, *((i + 0.5) / 10 for i in range(10)), 1.07]
            axes.bar(middles, heights, width=[0.05, *[0.094] * 10, 0.05], color=STAGE_COLOURS[stage])
            axes.plot(
                [spread["mean"]] * 2, [0, 1], "--", color=INK, linewidth=1.2, transform=axes.get_xaxis_transform()
            )
            said = f"{STAGE_NAMES[stage]}: mean {percent(spread['mean'])}, median {percent(spread['quartiles'][1])}"
            axes.set_title(said, loc="left", fontsize=10)
            axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        panels[-1].set_xticks(
            [-0.07, 0.1, 0.3, 0.5, 0.7, 0.9, 1.07], ["none", "10 %", "30 %", "50 %", "70 %", "90 %", "all"]
        )
        panels[-1].set(xlabel="cells right in a puzzle", xlim=(-0.13, 1.13))
        figure.supylabel("share of puzzles", fontsize=10)
        return svg_element(figure, "Cells right in single puzzles")


def dots_svg(title: str, rows: list[Dots]) -> str:
    """A dot plot with a row per group and a point per stage, and 95 % intervals where they are known."""
    stages = [stage for stage in STAGE_NAMES if any(stage in row.values for row in rows)]
    labels = [_broken(row.label) for row in rows]
    with page_style():
        needs = [0.1 + 0.14 * max(len(stages), label.count("\n") + 1) for label in labels]  # inches
        figure = Figure(figsize=(WIDTH, 0.95 + sum(needs)), layout="constrained")
        axes = figure.add_subplot()
        ends = np.cumsum(needs) / np.mean(needs)  # a row of three lines is as much higher than one of one
        middles = ends - np.array(needs) / np.mean(needs) / 2
        for y, row in zip(middles, rows, strict=True):
            for stage, (value, interval) in row.values.items():
                at = y + 0.22 * (stages.index(stage) - (len(stages) - 1) / 2)
                if interval:
                    axes.plot(interval, [at, at], color=STAGE_COLOURS[stage], linewidth=1.2, alpha=0.75)
                axes.plot([value], [at], SHAPES[stage], color=STAGE_COLOURS[stage], markersize=5.5)
        axes.set_yticks(middles, labels, fontsize=9, linespacing=1.0)
        axes.tick_params(axis="y", length=0)
        axes.set(ylim=(len(rows) + 0.05, -0.05), xlim=(-0.03, 1.03), xticks=[0, 0.25, 0.5, 0.75, 1])
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        for y in ends[:-1]:
            axes.axhline(y, color=STAGE_COLOURS["base"], alpha=0.25, linewidth=0.6)
        _stage_legend(figure, stages)
        return svg_element(figure, title)


def along_svg(by_position: dict[str, list[dict[str, Any]]]) -> str:
    """Accuracy of assignments by their position in the reasoning. by_position: {stage: TraceSummary.by_position}."""
    with page_style():
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for place, (stage, rows) in enumerate(by_position.items()):
            x = [(row["start"] + row["end"]) / 2 + 0.008 * (place - (len(by_position) - 1) / 2) for row in rows]
            axes.plot(
                x, [row["accuracy"] for row in rows], SHAPES[stage] + "-", color=STAGE_COLOURS[stage], markersize=5
            )
            for at, row in zip(x, rows, strict=True):
                _upright(axes, at, wilson_interval(row["accuracy"], row["steps"]), stage)
        axes.set(xlim=(0, 1), xticks=[0, 0.5, 1], xlabel="place in the reasoning")
        axes.set_xticklabels(["first cell", "half way", "last cell"])
        for text, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
            text.set_horizontalalignment(side)
        percent_axis(axes)
        _stage_legend(figure, list(by_position))
        return svg_element(figure, "Accuracy along the reasoning")


def _upright(axes: Axes, x: float, interval: Sequence[float], stage: str) -> None:
    axes.plot([x, x], interval, color=STAGE_COLOURS[stage], linewidth=1, alpha=0.7)


def _stage_legend(figure: Figure, stages: list[str], more: Sequence[Line2D] = ()) -> None:
    handles = [
        Line2D([], [], color=STAGE_COLOURS[s], marker=SHAPES[s], linestyle="none", label=STAGE_NAMES[s]) for s in stages
    ]
    handles += more
    style = {"frameon": False, "handletextpad": 0.2, "columnspacing": 1.0, "handlelength": 1.3, "fontsize": 9}
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), borderaxespad=0, **style)


def _broken(label: str) -> str:
    """The label on at most three lines; the number in brackets at its end stays."""
    lines = textwrap.wrap(label, _LETTERS) or [""]
    number = label[label.rfind("\u00a0(") :] if "\u00a0(" in label else ""
    return "\n".join(lines if len(lines) < 4 else [*lines[:2], lines[2][: _LETTERS - 3 - len(number)] + "..." + number])
