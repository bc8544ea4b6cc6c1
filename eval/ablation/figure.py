"""Figure 5 of Cell-o1 (arXiv:2506.02911): reward, response length and test accuracy of several configurations.

The paper shows one seed each. Here a line is the mean over seeds, and its band reaches from the lowest to the highest.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from eval.ablation.compare import Arm
from eval.report.figures import BLUE, GREEN, GREY, ORANGE, drawn_png, percent_axis, series, smooth

COLOURS = (BLUE, ORANGE, GREEN, "#c94f9b", GREY, "#56b4e9", "#d55e00", "#b59f00")
"""Those of the report page and more of Okabe and Ito's; taken again from the first where they do not suffice."""
PANELS = (("reward", "mean reward of sampled answers"), ("completions/mean_length", "mean response length, tokens"))
"""(key in metrics.jsonl, label of the axis)"""


def draw_arms(arms: Sequence[Arm], found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw reward, response length and test accuracy of all configurations as one PNG, 1,800 pixels wide."""
    split, rows = next(iter(found.items()))
    with drawn_png(path, width=12, height=3.9) as figure:
        panels = figure.subplots(1, 3)
        for axes, (key, label) in zip(panels, PANELS, strict=False):
            for number, arm in enumerate(arms):
                draw_band(axes, [series(run.steps, key) for run in arm.runs], COLOURS[number % len(COLOURS)], arm.name)
            axes.set(xlabel="step", ylabel=label)
        draw_accuracy(panels[2], arms, rows, split)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False)


def draw_band(axes: Axes, lines: Sequence[tuple[np.ndarray, np.ndarray]], colour: str, name: str) -> None:
    """The smoothed mean over seeds, and a band from the lowest to the highest. lines: (steps [K], values [K]) per seed."""
    lines = [smooth(*line) for line in lines if len(line[0])]
    if not lines:
        return
    # only steps that every seed has reached: a mean over fewer seeds would jump where one ends
    steps = sorted(set.intersection(*(set(step.tolist()) for step, _ in lines)))
    values = np.array([[dict(zip(step.tolist(), value, strict=True))[at] for at in steps] for step, value in lines])
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0)
    axes.plot(steps, values.mean(axis=0), color=colour, linewidth=2, label=name)


def draw_accuracy(axes: Axes, arms: Sequence[Arm], rows: Sequence[dict[str, Any]], split: str) -> None:
    """Test accuracy over the steps where checkpoints were evaluated, else of the trained models, with intervals."""
    axes.set_ylabel(f"batch accuracy on the {split} puzzles")
    percent_axis(axes)
    if any(run.curve for arm in arms for run in arm.runs):
        for number, arm in enumerate(arms):
            lines = [tuple(np.array(run.curve, dtype=float).reshape(-1, 2).T) for run in arm.runs]
            draw_band(axes, lines, COLOURS[number % len(COLOURS)], arm.name)
        axes.set_xlabel("step")
        return
    for number, row in enumerate(rows):
        colour, values = COLOURS[number % len(COLOURS)], row["by_seed"]["batch_accuracy"]
        low, high = row["intervals"]["batch_accuracy"]
        axes.bar(number, row["metrics"]["batch_accuracy"], color=colour, width=0.7, alpha=0.85)
        axes.plot([number, number], [low, high], color="black", linewidth=1.2)
        axes.plot(number + np.linspace(-0.2, 0.2, len(values)), values, "o", color="black", markersize=3)
    axes.set_xticks(range(len(rows)), [row["name"].split(":")[0] for row in rows])
