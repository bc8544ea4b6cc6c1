"""The figure of a comparison in rounds: test accuracy after each model that was made, and per token sampled for it."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from eval.ablation.figure import colour_of
from eval.report.figures import drawn_png, percent_axis

MARKERS = "osD^vPX*<>"
WIDE = 0.35
"""How far the points of one round lie apart, as a share of the distance between rounds."""


def draw_rounds(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw a row of two panels per split as one PNG, 1,800 pixels wide. found: {split: rows of compare_arms}.

    A point is a model: its batch accuracy, mean over seeds, with the 95 % interval over puzzles. Lines begin at the
    configuration that sampled nothing, where there is one: the common start.
    """
    with drawn_png(path, width=12, height=1.2 + 3.6 * len(found)) as figure:
        panels = figure.subplots(len(found), 2, squeeze=False)
        for of_split, (split, rows) in zip(panels, found.items(), strict=True):
            draw_split(of_split[0], rows, split, by_tokens=False)
            draw_split(of_split[1], rows, split, by_tokens=True)
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False)


def draw_split(axes: Axes, rows: list[dict[str, Any]], split: str, by_tokens: bool) -> None:
    """One panel. by_tokens: over thousands of sampled tokens, else over the number of models made."""
    rows = [row for row in rows if row.get("points")]
    start = next((row["points"][0] for row in rows if row["sampled"] == 0), None)
    trained = [row for row in rows if row["sampled"] > 0]
    if start is not None:
        low, high = start["interval"]
        axes.axhspan(low, high, color="#8a8f98", alpha=0.12, linewidth=0)
        axes.axhline(start["value"], color="#8a8f98", linewidth=1, linestyle="--")
        axes.errorbar([0], [start["value"]], [[start["value"] - low], [high - start["value"]]], fmt="k.", label="start")
    for number, row in enumerate(trained):
        points = [point for point in row["points"] if by_tokens or not point["partial"]]
        # points of one round would hide one another: each configuration has a place of its own beside the round
        apart = 0.0 if by_tokens or len(trained) == 1 else WIDE * (number / (len(trained) - 1) - 0.5)
        at = [point["sampled"] / 1000 if by_tokens else i + apart for i, point in enumerate(points, start=1)]
        values = [point["value"] for point in points]
        colour, marker = colour_of(number, len(trained)), MARKERS[number % len(MARKERS)]
        errors = [
            [point["value"] - point["interval"][0] for point in points],
            [point["interval"][1] - point["value"] for point in points],
        ]
        line = ([0, *at], [start["value"], *values]) if start is not None else (at, values)
        axes.plot(*line, color=colour, linewidth=1.2, alpha=0.6)
        axes.errorbar(
            at, values, errors, fmt=marker, color=colour, markersize=5, elinewidth=1, capsize=2, label=row["name"]
        )
    axes.set_ylabel(f"batch accuracy on the {split} puzzles")
    axes.set_xlabel(
        "thousands of response tokens sampled for training" if by_tokens else "models made (rounds, commands)"
    )
    if not by_tokens:
        counts = [sum(not point["partial"] for point in row["points"]) for row in trained]
        axes.set_xticks(range(1 + max(counts, default=0)))
    percent_axis(axes)
    shown = [end for row in rows for point in row["points"] for end in point["interval"]]
    if shown:  # points need no axis from 0, and the differences between them are small
        axes.set_ylim(max(min(shown) - 0.04, -0.03), min(max(shown) + 0.04, 1.03))
        axes.set_yticks([tick / 20 for tick in range(21) if axes.get_ylim()[0] <= tick / 20 <= axes.get_ylim()[1]])
