"""The figures of a run: inline SVG for the report page, one PNG for the README. No pyplot: it has global state.

Shares are drawn in percent. The colours are Okabe and Ito's, which colour-blind readers can tell apart. Axes and text
of an SVG take the colours of the page, so that they stay legible in dark mode.
"""

import io
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from data.errors import UserError
from data.files import replacing
from eval.metrics import wilson_interval
from eval.report.run import read_run
from eval.run_files import SPLITS, STAGES, read_steps

STAGE_NAMES = {"base": "before training", "sft": "after SFT", "grpo": "after GRPO"}
_SHORT_NAMES = {"base": "before", "sft": "SFT", "grpo": "GRPO"}
TEST_NAMES = {"donor": "held-out donors", "cell": "held-out cells", "instance": "held-out puzzles"}
"""{the build's --split: what the test puzzles are called, by what they do not share with training}"""
UNKNOWN_TEST = "held-out puzzles"
"""What they are called where no build says how they were held out."""

BLUE, ORANGE, GREEN, GREY = "#1f83c9", "#e08600", "#00936b", "#8a8f98"
STAGE_COLOURS = {"base": GREY, "sft": ORANGE, "grpo": BLUE}
# matplotlib cannot write CSS variables: these two colours stand for them and are replaced in the SVG text
INK, GRID = "#010203", "#040506"


@dataclass(frozen=True)
class Curve:
    """A figure of the report that is drawn from a metrics.jsonl, and how to read it."""

    title: str
    lines: dict[str, str]
    """{key in metrics.jsonl: name in the legend}"""
    unit: str
    """Label of the vertical axis; "percent" for a share in [0, 1]."""
    caption: str
    """One or two sentences that tell a biologist how to read it."""
    optional: bool = False
    """Nothing is said where it is missing: not every run has it."""


SAMPLED_REWARD = "dynamic_sampling/reward"
"""Under --oversample the mean reward of all answers; "reward" is that of the groups that are trained on."""
GRPO_CURVES = (
    Curve(
        "Reward",
        {"reward": "reward", SAMPLED_REWARD: "of all answers"},
        "mean reward",
        "Each dot is the mean reward of the answers sampled in one step; it should rise. With the paper's reward an "
        "answer earns 1 when every cell is right, 0 when any is wrong and -1 when its format is invalid.",
    ),
    Curve(
        "Accuracy on held-out puzzles (validation)",
        {"validation/cell_accuracy": "cells right", "validation/batch_accuracy": "whole batches right"},
        "percent",
        "Share of cells, and of whole batches, named right in greedy answers to puzzles of donors that the run does not "
        "train on (--validate). It shows whether what is learned holds for new donors; where the best checkpoint was chosen "
        "by it (--keep-best), it flatters a little, and the test results above do not.",
        optional=True,
    ),
    Curve(
        "Accuracy on training puzzles",
        {"rewards/cell_accuracy": "cells right", "rewards/batch_accuracy": "whole batches right"},
        "percent",
        "Share of cells, and of whole batches, named right in the answers sampled for training; both should rise. "
        "Training answers are sampled with randomness, so they can sit below the held-out results above.",
    ),
    Curve(
        "Format validity",
        {"rewards/format_validity": "valid answers"},
        "percent",
        "Share of sampled answers that keep to the format (reasoning, then one label per cell); it should reach "
        "100 % and stay there.",
    ),
    Curve(
        "Response length",
        {"completions/mean_length": "mean length"},
        "tokens",
        "Mean length of the sampled answers, reasoning included. A steady rise means longer reasoning; a sudden jump "
        "or fall is a warning.",
    ),
    Curve(
        "Distance from the SFT model (KL)",
        {"kl": "KL"},
        "nats per token",
        "How far the annotator has moved from the model that GRPO started from; 0 means no change. A slow rise is "
        "normal; a very fast rise means that the answers have drifted. It is measured only where beta, its weight in the "
        "loss, is above 0.",
    ),
    Curve(
        "Loss",
        {"loss": "loss"},
        "GRPO loss",
        "The quantity that the optimizer lowers. It does not show how good the answers are: look at the reward instead. "
        "By construction it stays near 0, but where tokens of all answers weigh alike, or a batch is used several times.",
    ),
    Curve(
        "Puzzles that teach",
        {"groups/mixed": "mixed answers", "groups/all_right": "all right", "groups/all_wrong": "all wrong"},
        "percent",
        "Share of training puzzles by the outcome of their sampled answers. Only puzzles with mixed outcomes teach "
        "GRPO anything; when 'mixed' is near 0, the puzzles have become too easy or are still too hard.",
    ),
    Curve(
        "Sampler against trainer",
        {"sampling/logp_difference/mean": "mean", "sampling/logp_difference/max": "maximum"},
        "|log-prob. difference|",
        "How much the sampler, which writes the answers, and the trainer disagree on a token's log-probability. It "
        "should stay small and flat; a rise means that the two have different weights.",
    ),
)
SFT_CURVES = (
    Curve(
        "Supervised fine-tuning (SFT) loss",
        {"loss": "training", "eval_loss": "validation"},
        "nats per token",
        "How surprised the model is by the example answers that it learns from; it should fall and then flatten. A "
        "validation loss that rises while the training loss falls means that the model is memorising.",
    ),
)


def series(steps: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(step [K], value [K]) of the rows that hold a finite number under `key`."""
    rows = [
        (row["step"], row[key]) for row in steps if isinstance(row.get(key), int | float) and math.isfinite(row[key])
    ]
    if key == "kl" and len(rows) > 1 and not any(value for _, value in rows):
        rows = []  # with beta 0 it is not computed, and stands as 0
    points = np.array(rows, dtype=float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def sampled_reward(steps: list[dict[str, Any]]) -> str:
    """The key of the mean reward of all answers that were sampled."""
    return SAMPLED_REWARD if any(SAMPLED_REWARD in row for row in steps) else "reward"


def smoothing_window(n_steps: int) -> int:
    """Steps that the smoothed line averages over: a tenth of the run, odd, 3 to 51; 1 (none) below 20 steps."""
    return 1 if n_steps < 20 else min(51, max(3, n_steps // 10 | 1))


def dot_spacing(n_steps: int) -> int:
    """Steps between two dots: at most 400 dots per curve keep the page of a long run small."""
    return max(1, math.ceil(n_steps / 400))


def smooth(step: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centred running mean of a curve [K], only where the window is full: no value is guessed at the two ends."""
    window = smoothing_window(len(value))
    half = window // 2
    return step[half : len(step) - half], np.convolve(value, np.full(window, 1 / window), "valid")


def curve_svg(curve: Curve, steps: list[dict[str, Any]]) -> str | None:
    """The figure of a curve: raw dots and a smoothed line. None when the rows hold none of its keys."""
    found = {name: series(steps, key) for key, name in curve.lines.items()}
    found = {name: points for name, points in found.items() if len(points[0])}
    if not found:
        return None
    with page_style():
        figure = Figure(figsize=(5.4, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for (name, (step, value)), colour in zip(found.items(), (BLUE, ORANGE, GREEN), strict=False):
            draw_curve(axes, step, value, colour, name)
        axes.set(xlabel="step", ylabel="" if curve.unit == "percent" else curve.unit)
        if curve.unit == "percent":
            percent_axis(axes)
        if len(found) > 1:
            figure.legend(
                loc="outside upper left", ncols=len(found), frameon=False, handlelength=1.2, columnspacing=1.2
            )
        return svg_element(figure, curve.title)


def draw_curve(axes: Axes, step: np.ndarray, value: np.ndarray, colour: str, name: str) -> None:
    """Draw raw dots and their smoothed line."""
    # the line uses all steps; only the dots are thinned out
    every = dot_spacing(len(step))
    axes.plot(step[::every], value[::every], "o", color=colour, alpha=0.35, markersize=3, markeredgewidth=0)
    axes.plot(*smooth(step, value), color=colour, linewidth=2, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def split_name(summary: dict[str, Any], split: str) -> str:
    """The name of a split for a reader.

    summary["run"]["split"] is the build's --split.
    """
    if split == "cells":
        return "held-out real cells"
    stated = (summary.get("run") or {}).get("split")
    return TEST_NAMES.get(stated, UNKNOWN_TEST) if split == "test" else "unseen diseases"


def batch_accuracy_svg(summary: dict[str, Any]) -> str | None:
    """Bars of batch accuracy, one per split and stage, with 95 % intervals. None when no stage was evaluated."""
    bars = [
        (split, stage, summary[stage][split])
        for split in SPLITS
        for stage in STAGES
        if summary.get(stage, {}).get(split)
    ]
    bars = [(split, stage, scores) for split, stage, scores in bars if scores.get("batch_accuracy") is not None]
    if not bars:
        return None
    splits = list(dict.fromkeys(split for split, _, _ in bars))
    # a gap between the splits
    x = [i + 0.8 * splits.index(split) for i, (split, _, _) in enumerate(bars)]
    with page_style():
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        axes = figure.add_subplot()
        for position, (_, stage, scores) in zip(x, bars, strict=True):
            share, top = scores["batch_accuracy"], scores["batch_accuracy"]
            axes.bar(position, share, width=0.8, color=STAGE_COLOURS[stage])
            limits = batch_interval(scores)
            if limits:
                low, top = limits
                axes.plot([position, position], [low, top], color=INK, linewidth=1.2)
            axes.annotate(
                percent(share), (position, top), (0, 3), textcoords="offset points", ha="center", weight="bold"
            )
        axes.set_xticks(x, [_SHORT_NAMES[stage] for _, stage, _ in bars])
        for split in splits:
            middle = np.mean([position for position, bar in zip(x, bars, strict=True) if bar[0] == split])
            axes.text(
                middle,
                -0.22,
                split_name(summary, split),
                transform=axes.get_xaxis_transform(),
                ha="center",
                weight="bold",
            )
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(x[0] - 0.7, x[-1] + 0.7)
        percent_axis(axes, top=1.12)
        return svg_element(figure, "Batch accuracy per stage")


def batch_interval(scores: dict[str, Any]) -> tuple[float, float] | None:
    """95 % interval of batch accuracy: from the metrics, else Wilson's; None when the number of puzzles is unknown."""
    known = (scores.get("intervals") or {}).get("batch_accuracy")
    if known:
        return tuple(known)
    return wilson_interval(scores["batch_accuracy"], scores["n_puzzles"]) if scores.get("n_puzzles") else None


def percent(share: float) -> str:
    """0.618 -> "62 %". "0 %" and "100 %" stand for exactly 0 and 1; others near them become "<1 %" and ">99 %"."""
    if 0 < share <= 0.005:  # half a percent would be rounded to an even number: 0
        return "<1 %"
    return ">99 %" if 0.995 <= share < 1 else f"{100 * share:.0f} %"


@contextmanager
def drawn_png(path: str | os.PathLike, *, width: float, height: float) -> Iterator[Figure]:
    """An empty figure to draw on, written to path as a whole at the end of the block. width, height: inches of 150 pixels."""
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with replacing(path) as partial:  # no version in the file: the same figure has the same bytes
            figure.savefig(partial, format="png", metadata={"Software": None})


def learning_curve_png(run_dir: str | os.PathLike, path: str | os.PathLike) -> Path:
    """Draw a run for a README, 1200 pixels wide: what GRPO learns, and at what cost. Returns the path.

    Raises UserError when the run folder has no GRPO step.
    """
    steps_file = Path(run_dir) / "grpo" / "metrics.jsonl"
    steps, path = read_steps(steps_file), Path(path)
    if not steps:
        raise UserError(f"{steps_file}: holds no GRPO step to draw; run launch/grpo.py (or `make demo`) first")
    if path.suffix != ".png":
        raise UserError(f"{path}: the picture is a PNG; give a name that ends in .png")
    summary, _ = read_run(Path(run_dir))
    with drawn_png(path, width=8, height=3.7) as figure:
        grid = figure.add_gridspec(2, 2, width_ratios=(1.6, 1), hspace=0.08, wspace=0.04)
        _draw_learning(figure.add_subplot(grid[:, 0]), steps, summary)
        _draw_strip(
            figure.add_subplot(grid[0, 1]), steps, "rewards/format_validity", "Answers with a valid format", GREEN
        )
        _draw_strip(figure.add_subplot(grid[1, 1]), steps, "kl", "Drift from the SFT model (KL)", GREY)
    return path


def _draw_learning(axes: Axes, steps: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Training reward and batch accuracy, with the held-out results before and after GRPO as horizontal lines."""
    which = "sampled" if sampled_reward(steps) == "reward" else "trained-on"
    lines = (
        (sampled_reward(steps), "mean reward of sampled answers (-1 to 1)", GREY),
        ("rewards/batch_accuracy", f"share of {which} answers with every cell right (0 to 1)", BLUE),
    )
    for key, name, colour in lines:
        step, value = series(steps, key)
        if len(step):
            draw_curve(axes, step, value, colour, name)
    marks = [(stage, summary.get(stage, {}).get("test", {}).get("batch_accuracy")) for stage in ("sft", "grpo")]
    marks = sorted([mark for mark in marks if mark[1] is not None], key=lambda mark: mark[1])
    for stage, share in marks:
        above = stage == marks[-1][0]  # the lower line's text is below it, so that close lines stay readable
        axes.axhline(share, color=ORANGE if stage == "sft" else GREEN, linestyle=(0, (5, 3)), linewidth=1.4)
        axes.annotate(
            f"{split_name(summary, 'test')}, {STAGE_NAMES[stage]}: {percent(share)}",
            (1, share),
            (-2, 4 if above else -4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="bottom" if above else "top",
            weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    axes.set_title("Naming every cell of a batch: GRPO training", loc="left", weight="bold")
    axes.set(xlabel="GRPO step")
    axes.grid(axis="y", color="#e3e5e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(y=0.12)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=1, frameon=False)


def _draw_strip(axes: Axes, steps: list[dict[str, Any]], key: str, title: str, colour: str) -> None:
    step, value = series(steps, key)
    axes.set_title(title if len(step) else f"{title}: not recorded", loc="left", fontsize=9, weight="bold")
    if len(step):
        draw_curve(axes, step, value, colour, key)
    axes.grid(axis="y", color="#e3e5e8", linewidth=0.6)
    if key == "rewards/format_validity":
        axes.tick_params(labelbottom=False)
        percent_axis(axes)
    else:
        axes.set_ylim(bottom=min(0.0, value.min(initial=0.0)))
        axes.set_xlabel("GRPO step")


def percent_axis(axes: Axes, top: float = 1.03, along: str = "y") -> None:
    """Percentages from 0 to 100 along an axis, "x" or "y". top: where it ends, as a share."""
    bottom = -0.03 if top < 1.1 else 0
    axes.set(**{f"{along}lim": (bottom, top), f"{along}ticks": [0, 0.25, 0.5, 0.75, 1]})
    axis = axes.yaxis if along == "y" else axes.xaxis
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def page_style() -> matplotlib.rc_context:
    """Matplotlib settings: text as text, the page's colours, and identifiers that are the same in every drawing."""
    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "cellpuzzles",
            "font.size": 10,
            "text.parse_math": False,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "grid.color": GRID,
            "grid.linewidth": 0.7,
        }
    )


def svg_element(figure: Figure, label: str) -> str:
    """The figure as an <svg> element inside an HTML page: without prologue, fixed size, or address."""
    buffer = io.StringIO()
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    # without a date: the same run gives the same page, byte for byte
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r' (xmlns(:xlink)?|width|height|version)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    # its style sheet would style the whole page
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    # the page's font is narrower than the one that matplotlib measured with, so the text fits
    svg = re.sub(r"font-family: [^;]*sans-serif; ", "", svg)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # figure_1, axes_1, ...: a page holds many figures
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
