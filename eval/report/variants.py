"""The report page's tables of single cells combined into batches (Table 11) and of answers by similarity (Table 12).

The published rows of these tables are shown here, beside the same measures of ours, and not beside the metrics of the
puzzles themselves, which measure something else.
"""

from typing import Any

from eval.published import KEY_MODELS, MEASURES, SIMILARITY_COLUMNS, SOURCE, comparable
from eval.report.figures import STAGE_NAMES
from eval.report.html import EMPTY, details, escape, html_table, missing, note, number, share
from eval.report.run import Evaluation

BATCH_COLUMNS = {
    "batch_accuracy": "whole batches right",
    "cell_accuracy": "cells right, mean over batches",
    "cell_accuracy_micro": "cells right, pooled",
    "format_validity": "valid format",
    "uniqueness": "uniqueness",
    "response_length": "response length",
}
WAYS = {"spoiled": "an invalid cell spoils its batch", "wrong_alone": "an invalid cell is wrong alone"}
DIGITS = {"response_length": 0, "mean_similarity": 3}


def variant_table(variant: str, name: str, of_stage: dict[str, Evaluation]) -> str:
    """The table of a split whose puzzles are single cells ("cell") or open-ended ("open").

    name: the name of the split.
    """
    published = comparable(variant, [])["rows"]
    if variant == "cell":
        title, columns = f"Single cells put together into batches: {name} (Table 11)", BATCH_COLUMNS
        ours = {
            f"{STAGE_NAMES[stage]}, {WAYS[way]}": found
            for stage, evaluation in of_stage.items()
            for way, found in (evaluation.result.get("decomposition") or {}).items()
            if way in WAYS
        }
        remedy = "No metrics.json says how the single cells do as batches; launch/evaluate.py puts them together."
    else:
        title, columns = f"By similarity of labels: {name} (Table 12)", SIMILARITY_COLUMNS
        ours = {
            STAGE_NAMES[stage]: {
                **evaluation.result,
                **found,
                "intervals": {**evaluation.result.get("intervals", {}), **found.get("intervals", {})},
            }
            for stage, evaluation in of_stage.items()
            if (found := evaluation.result.get("similarity"))
        }
        remedy = "No metrics.json holds similarities of labels; launch/evaluate.py --medcpt FOLDER computes them."
    theirs = {(row["model"], row["setting"]): [_name(row), *_published(row, columns)] for row in published}
    rows: list[list[str] | str] = [
        "This run",
        *([escape(row), *_cells(values, columns)] for row, values in ours.items()),
    ]
    rows += ["Published, on other puzzles", *(row for (model, _), row in theirs.items() if model in KEY_MODELS)]
    shown = html_table(["", *columns.values()], rows, "results") if ours else missing(remedy)
    everything = details(
        f"All {len(theirs)} published rows", html_table(["published", *columns.values()], theirs.values())
    )
    says = note(f"Published rows: {SOURCE}.{MEASURES[variant]}")
    return f"<h3>{escape(title)}</h3>{shown}{everything}{says}"


def _cells(values: dict[str, Any], columns: dict[str, str]) -> list[str]:
    limits = values.get("intervals") or {}
    return [
        number(values.get(key), limits.get(key), DIGITS[key])
        if key in DIGITS
        else share(values.get(key), limits.get(key))
        for key in columns
    ]


def _name(row: dict[str, Any]) -> str:
    setting = "" if row["setting"] == "open-ended" else f", {row['setting']}"
    return f'<span class="published">{escape(row["model"] + setting)} <small>published</small></span>'


def _published(row: dict[str, Any], columns: dict[str, str]) -> list[str]:
    """The cells of a published row. Published cell accuracy is shown as pooled, but for Table 11, see eval/published.py."""
    pooled, mean = (
        ("cell_accuracy", "cell_accuracy_micro")
        if row["table"] == "Table 11"
        else ("cell_accuracy_micro", "cell_accuracy")
    )
    values = {**row, pooled: row.get("cell_accuracy"), "mean_similarity": row.get("medcpt")}
    return [EMPTY if key == mean else cell for key, cell in zip(columns, _cells(values, columns), strict=True)]
