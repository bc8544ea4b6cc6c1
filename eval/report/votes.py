"""The report page's table of several answers to a puzzle: greedy, votes, pass@k, and how far the vote can be trusted."""

from typing import Any

from eval.breakdowns import n_batches
from eval.published import confidence_sentence
from eval.report.figures import STAGE_NAMES
from eval.report.html import EMPTY, escape, html_table, note, share
from eval.report.run import Evaluation

NAMES = {
    "greedy": "one answer, greedy",
    "mean": "one answer, sampled (mean)",
    "majority_vote": "majority vote over whole assignments",
    "cell_vote": "one-to-one vote (consensus)",
}
COLUMNS = {"batch_accuracy": "whole puzzles right", "cell_accuracy": "cells right", "format_validity": "valid format"}


def votes_table(name: str, of_stage: dict[str, Evaluation]) -> str:
    """The table of a split; "" when no stage answered a puzzle several times. name: the name of the split."""
    rows: list[list[str] | str] = []
    said = ""
    for stage, evaluation in of_stage.items():
        found = evaluation.result.get("k_sample") or {}
        if not found:
            continue
        rows.append(f"{STAGE_NAMES[stage]}, {found['k']} answers to each puzzle")
        rows += [[escape(title), *_shares(found[key])] for key, title in NAMES.items() if key in found]
        k = str(found["k"])
        passes, several = found["pass_at_k"][k], n_batches(found["mean"]) > 1
        limits = passes["interval"] if several else None
        rows.append([f"pass@{k}: some answer is right", share(passes["value"], limits), EMPTY, EMPTY])
        if "consensus" in found:
            unit = "cell" if evaluation.result["puzzles"]["variant"] == "cell" else "batch"
            said += note(f"{STAGE_NAMES[stage]}: {confidence_sentence(found['consensus'], unit, several)}")
    table = html_table(["", *COLUMNS.values()], rows, "results")
    return f"<h3>{escape(f'Several answers to a puzzle: {name}')}</h3>{table}{said}" if rows else ""


def _shares(scores: dict[str, Any]) -> list[str]:
    limits = (scores.get("intervals") or {}) if n_batches(scores) > 1 else {}
    return [share(scores.get(key), limits.get(key)) for key in COLUMNS]
