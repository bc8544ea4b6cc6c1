"""Figure 5 of Cell-o1 (arXiv:2506.02911): reward, response length and test accuracy of several configurations.

The paper shows one seed each. Here a line is the mean over seeds, and its band reaches from the lowest to the highest.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from eval.ablation.compare import Arm
from eval.report.figures import BLUE, GREEN, GREY, ORANGE, drawn_png, percent_axis, sampled_reward, series, smooth

COLOURS = (BLUE, ORANGE, GREEN, "#c94f9b", GREY, "#56b4e9", "#d55e00", "#b59f00")
"""Those of the report page and more of Okabe and Ito's."""
FEW = 10
"""Steps below which a line shows each of its values."""
PANELS = (("reward", "mean reward of sampled answers"), ("completions/mean_length", "mean response length, tokens"))
"""(key in metrics.jsonl, label of the axis)"""


def draw_arms(arms: Sequence[Arm], found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw reward, response length and test accuracy of all configurations as one PNG, 1,800 pixels wide."""
    split, rows = next(iter(found.items()))
    # room for a row of the legend per four configurations, and for a bar each
    with drawn_png(path, width=12, height=max(3.9, 3.3 + 0.17 * len(arms))) as figure:
        panels = figure.subplots(1, 3)
        for axes, (key, label) in zip(panels, PANELS, strict=False):
            draw_panel(axes, arms, key, label)
        draw_accuracy(panels[2], arms, rows, split)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False)


def draw_panel(axes: Axes, arms: Sequence[Arm], key: str, label: str) -> None:
    """A value of metrics.jsonl over the steps, a band for each configuration."""
    for number, arm in enumerate(arms):
        lines = [series(run.steps, sampled_reward(run.steps) if key == "reward" else key) for run in arm.runs]
        draw_band(axes, lines, colour_of(number, len(arms)), arm.name)
    axes.set(xlabel="step", ylabel=label)


def draw_band(axes: Axes, lines: Sequence[tuple[np.ndarray, np.ndarray]], colour: str, name: str) -> None:
    """The smoothed mean over seeds, and a band from the lowest to the highest. lines: (steps [K], values [K]) per seed."""
    lines = [smooth(*line) for line in lines if len(line[0])]
    if not lines:
        return
    # only steps that every seed has reached: a mean over fewer seeds would jump where one ends
    steps = sorted(set.intersection(*(set(step.tolist()) for step, _ in lines)))
    by_step = [dict(zip(step.tolist(), value, strict=True)) for step, value in lines]
    values = np.array([[line[at] for at in steps] for line in by_step])
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0)
    # few values as dots too: one alone has no line
    few = "o" if len(steps) < FEW else ""
    axes.plot(steps, values.mean(axis=0), marker=few, markersize=4, color=colour, linewidth=2, label=name)


def draw_accuracy(axes: Axes, arms: Sequence[Arm], rows: Sequence[dict[str, Any]], split: str) -> None:
    """Test accuracy over the steps where checkpoints were evaluated, else of the trained models, with intervals."""
    label = f"batch accuracy on the {split} puzzles"
    asked = {run.curve_puzzles for arm in arms for run in arm.runs if run.curve}
    if asked:
        if rows[0].get("n_puzzles") not in asked:  # other numbers than the table's
            label = f"batch accuracy on {' or '.join(f'{n:,}' for n in sorted(asked))} {split} puzzles"
        for number, arm in enumerate(arms):
            lines = [tuple(np.array(run.curve, dtype=float).reshape(-1, 2).T) for run in arm.runs]
            draw_band(axes, lines, colour_of(number, len(arms)), arm.name)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        percent_axis(axes)
        return
    for number, row in enumerate(rows):
        values = row["by_seed"]["batch_accuracy"]
        axes.barh(number, row["metrics"]["batch_accuracy"], color=colour_of(number, len(rows)), height=0.7, alpha=0.85)
        axes.plot(row["intervals"]["batch_accuracy"], [number, number], color="black", linewidth=1.2)
        axes.plot(values, number + 0.2 * spread(len(values)), "o", color="black", markersize=3)
    # the first configuration is the topmost
    axes.set(xlabel=label, ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
    axes.set_yticklabels([row["name"] for row in rows])
    percent_axis(axes, along="x")


def spread(n: int) -> np.ndarray:
    """n places from -1 to 1, evenly; 0 for one. [n]"""
    return np.linspace(-1, 1, n) if n > 1 else np.zeros(n)


def colour_of(number: int, n: int) -> Any:
    """The colour of configuration `number` of n: one of COLOURS, or of a continuous map where those do not suffice."""
    return COLOURS[number] if n <= len(COLOURS) else matplotlib.colormaps["turbo"](number / (n - 1))
