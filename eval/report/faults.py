"""The report's tables and lines on what is wrong with answers: invalid formats, labels that are no candidate, repeats.

The counts are those of eval/reasons.py, from metrics.json; where it has none, they are counted from the answers.
"""

import os
from pathlib import Path
from typing import Any

from eval.reasons import SHOWN, console_lines, hint_of, invalid_sentence, label_lists, sentences, verdict
from eval.report.figures import STAGE_NAMES
from eval.report.html import escape, html_table, note
from eval.report.run import Evaluation, Evaluations, evaluation_folder
from eval.run_files import SPLITS, STAGES, read_result

COLUMNS = ("reason, or label", "times", "for example", "remedy")


def faults_table(name: str, of_stage: dict[str, Evaluation]) -> str:
    """The reasons and labels of a split, stage by stage; "" when nothing is wrong with any answer.

    name: the name of the split.
    """
    rows = [row for stage, one in of_stage.items() for row in _rows(STAGE_NAMES[stage], one.faults)]
    if not rows:
        return ""
    says = "An answer of an invalid format has no cell right, and a label that is no candidate is wrong."
    shown = html_table(COLUMNS, rows, "words faults")
    return f"<h3>What is wrong with the answers: {escape(name)}</h3>{shown}{note(says)}"


def _rows(stage: str, faults: dict[str, Any]) -> list[list[str] | str]:
    rows: list[list[str] | str] = []
    if said := invalid_sentence(faults):
        rows.append(f"{stage}: {said}")
        for one in faults["invalid_reasons"][:SHOWN]:
            rows.append(
                _row(one["reason"], one["count"], f'{one["example_id"]} begins "{one["example"]}"', one["remedy"])
            )
    for of_labels in label_lists(faults):
        rows.append(f"{stage}: {of_labels.sentence}")
        for row in of_labels.rows[:SHOWN]:
            rows.append(_row(f'"{row["label"]}"', row["count"], row["example_id"], hint_of(row, of_labels.hint)))
    return rows


def _row(what: str, times: int, example: str, remedy: str) -> list[str]:
    return [escape(what), f"{times:,}", escape(example), escape(remedy) or "&ndash;"]


def fault_lines(evaluations: Evaluations) -> list[str]:
    """What is wrong with the answers of each stage and split, for the console: reasons with counts and remedies."""
    lines = []
    for split, of_stage in evaluations.items():
        for stage, one in of_stage.items():
            found = console_lines(one.faults)
            lines += [f"{STAGE_NAMES[stage]}, {split}:", *(f"  {line}" for line in found)] if found else []
    return lines


def fault_sentences(run_dir: str | os.PathLike) -> str:
    """The same in one line for each stage, split and kind of fault, from the metrics.json files of a run; "" for none."""
    results = {
        (stage, split): read_result(evaluation_folder(Path(run_dir), stage, split) / "metrics.json")
        for stage in STAGES
        for split in SPLITS
    }
    lines = [f"{stage} {split}: {said}" for (stage, split), one in results.items() for said in sentences(one)]
    return "\n".join(lines)


def warning(stage: str, one: Evaluation | None) -> str:
    """A box that says why every accuracy of a stage is 0, when no answer is valid or no label is a candidate."""
    said = verdict(one.faults) if one else ""
    name = STAGE_NAMES[stage]
    return f'<p class="warning">{escape(name[0].upper() + name[1:])}, {escape(said)}.</p>' if said else ""
