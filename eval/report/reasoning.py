"""The report page's section on reasoning, after Figure 6 of the paper.

The reasoning is analysed by eval/traces/reading.py.
"""

from collections.abc import Sequence
from typing import Any

from eval.report.figures import STAGE_NAMES, split_name
from eval.report.html import EMPTY, count, escape, figure, html_table, mark, missing, note, section, share
from eval.report.run import Answered, Evaluations
from eval.report.stages import Dots, along_svg, dots_svg
from eval.traces.reading import Step, TraceAnalysis, analyse, known_labels
from eval.traces.summary import STEPS_SHOWN, TraceSummary, summarise_traces

ANSWERS_READ = 200
"""Answers of a stage that are analysed; each takes some hundredths of a second."""
TITLE = "What the reasoning does"
HABITS = {  # name in the figure: field of TraceSummary
    "changes its mind": "self_reflection",
    "answer contradicts reasoning": "contradiction",
    "names a type outside the list": "outside",
    "ends with one label at two cells": "duplicated",
    "goes in cell order 1 to N": "in_cell_order",
}

Read = dict[str, list[tuple[Answered, TraceAnalysis]]]
"""{stage: its answers with their analyses}, of the stages in which some reasoning gives a cell a label."""


def traces_section(evaluations: Evaluations, summary: dict[str, Any]) -> str:
    """The section, for the first split with answers: habits, order, all numbers, three answers drawn step by step."""
    split, of_stage = next(
        ((split, of) for split, of in evaluations.items() if any(evaluation.answers for evaluation in of.values())),
        ("", {}),
    )
    if not split:
        files = "predictions (eval/*/test/predictions.jsonl) with their puzzles (puzzles/test.parquet)"
        return section("reasoning", TITLE, missing(f"This run folder has no {files}, so no reasoning can be read."))
    analysed = {
        stage: analysed_answers(evaluation.answers[:ANSWERS_READ])
        for stage, evaluation in of_stage.items()
        if evaluation.answers
    }
    found: Read = {stage: pairs for stage, pairs in analysed.items() if any(a.steps for _, a in pairs)}
    silent = [STAGE_NAMES[stage] for stage in analysed if stage not in found]
    lacking = missing(f"No answer {' or '.join(silent)} gives a cell a label in its reasoning.") if silent else ""
    if not found:
        return section("reasoning", TITLE, lacking)
    summaries = {stage: summarise_traces([analysis for _, analysis in pairs]) for stage, pairs in found.items()}
    n, fewest = (most(len(pairs) for pairs in found.values()) for most in (max, min))
    cut = any(len(evaluation.answers) > ANSWERS_READ for evaluation in of_stage.values())
    intro = note(
        f"{'The first ' if cut else ''}{f'{fewest:,} to ' if fewest < n else ''}{count(n, 'answer')} of each stage, on "
        f"{split_name(summary, split)}. A step is "
        "a place where the reasoning gives a cell a label, or another label than before. Steps are found by rules "
        "(eval/traces/reading.py), not by a human reader: look at examples before you quote a share."
    )
    figures = f'<div class="grid">{_habits(summaries)}{_along(summaries)}</div>'
    return section("reasoning", TITLE, f"{intro}{lacking}{figures}{_measures(summaries)}{_diagrams(found)}")


def analysed_answers(answers: Sequence[Answered]) -> list[tuple[Answered, TraceAnalysis]]:
    """Each answer with the analysis of its reasoning."""
    known = known_labels([answered.puzzle for answered in answers])
    return [(answered, analyse(answered.prediction, answered.puzzle, known)) for answered in answers]


def _habits(summaries: dict[str, TraceSummary]) -> str:
    rows = []
    for label, field in HABITS.items():
        values = {stage: getattr(summary, field) for stage, summary in summaries.items()}
        rows.append(Dots(label, {stage: (value, None) for stage, value in values.items() if value is not None}))
    caption = (
        "After Figure 6 of the paper. Share of answers in which each of these happens. Changing one's mind "
        "(self-reflection) is good when it corrects errors: see the table. Contradictions, types outside the list and "
        "one label at two cells are faults, so their points should lie on the left."
    )
    return figure(dots_svg("Habits of the reasoning", rows), "Habits of the reasoning", caption)


def _along(summaries: dict[str, TraceSummary]) -> str:
    rows = {stage: summary.by_position for stage, summary in summaries.items() if summary.by_position}
    caption = (
        "Share of labels that are right when the reasoning first gives them, from the first cell that it assigns to "
        "the last. A falling line means that easy cells come first (curriculum order), or that errors add up; a flat "
        "line means no order by ease."
    )
    return figure(along_svg(rows), "Accuracy along the reasoning", caption)


def _measures(summaries: dict[str, TraceSummary]) -> str:
    """A table of all measures, each with a sentence that says how to read it."""
    columns = ["", *(STAGE_NAMES[stage] for stage in summaries), "how to read it"]
    rows = []
    for name, cell_of, reading in MEASURES:
        rows.append([name, *(cell_of(summary) for summary in summaries.values()), reading])
    return html_table(columns, rows, "words readings", "The same and more in numbers")


def _order(summary: TraceSummary) -> str:
    if summary.curriculum is None:
        return EMPTY
    interval = f"{summary.curriculum['low']:+.2f} to {summary.curriculum['high']:+.2f}"
    return f"{summary.curriculum['spearman']:+.2f}<br> <small>{interval}</small>"


MEASURES = (
    (
        "Steps in an answer",
        lambda s: f"{s.mean_steps:.1f}",
        "Mean. As many steps as cells means that each cell is assigned once.",
    ),
    (
        "Answers that change their mind",
        lambda s: share(s.self_reflection),
        "Self-reflection: a cell gets another label than before.",
    ),
    (
        "Changes that correct an error",
        lambda s: f"{share(s.towards_right)}<br> <small>of {s.reflections:,}</small>",
        "From a wrong label to the right one, out of all changes.",
    ),
    ("Changes that make an error", lambda s: share(s.away_from_right), "From the right label to a wrong one."),
    (
        "Easy cells first",
        _order,
        "Rank correlation of how early a cell is assigned with how often its type is right: +1 easy first, -1 hard "
        "first, 0 neither; below it the 95 % interval.",
    ),
    (
        "Right in the first third, in the last third",
        lambda s: f"{share(s.first_third)}, {share(s.last_third)}",
        "Accuracy of the labels that are given early and late.",
    ),
    (
        "Answers in cell order 1 to N",
        lambda s: share(s.in_cell_order),
        "They go through the cells as listed, whatever their ease.",
    ),
    (
        "Answers that contradict their reasoning",
        lambda s: share(s.contradiction),
        "A cell gets another label in the answer than it got last in the reasoning.",
    ),
    ("Cells contradicted", lambda s: share(s.contradicted_cells), "Out of the cells that have both labels."),
    (
        "Cells without a step",
        lambda s: share(s.unassigned),
        "The answer labels them without a reason that the rules can find.",
    ),
    (
        "Answers with one label at two cells",
        lambda s: share(s.duplicated),
        "At the end of the reasoning; at most one of the two cells can be right.",
    ),
    (
        "Answers that name a type outside the list",
        lambda s: f"{share(s.outside)}{_named(s)}",
        "Mentioned, or given as a label; no cell of the puzzle is of such a type. A lower bound: rare names are not "
        "recognised.",
    ),
)


def _named(summary: TraceSummary) -> str:
    """The types outside the list that are named most."""
    most = [f"{escape(label)} ({n})" for label, n in list(summary.outside_labels.items())[:3]]
    return f"<br> <small>most: {', '.join(most)}</small>" if most else ""


def choose_diagrams(pairs: list[tuple[Answered, TraceAnalysis]]) -> dict[str, tuple[Answered, TraceAnalysis]]:
    """{why: answer to draw}, of different puzzles: one that changes its mind, a bad one and a good one.

    Answers whose changes lead to the right label come first, then those with the most changes. Bad and good answers
    have at least one step and can be read.
    """

    def share_right(pair: tuple[Answered, TraceAnalysis]) -> float:
        return pair[0].score.cell_accuracy

    def towards(pair: tuple[Answered, TraceAnalysis]) -> tuple[int, int]:
        return sum(after.right for _, after in pair[1].reflections), len(pair[1].reflections)

    with_steps = [pair for pair in pairs if pair[1].steps]
    readable = [pair for pair in with_steps if pair[0].score.valid]
    queues = {
        "It changes its mind": sorted((p for p in with_steps if p[1].reflections), key=towards, reverse=True),
        "It goes wrong": sorted((p for p in readable if share_right(p) < 1), key=share_right),
        "It goes well": sorted((p for p in readable if share_right(p) > 0), key=share_right, reverse=True),
    }
    chosen: dict[str, tuple[Answered, TraceAnalysis]] = {}
    for why, queue in queues.items():
        taken = {pair[1].id for pair in chosen.values()}
        pair = next((pair for pair in queue if pair[1].id not in taken), None)
        if pair is not None:
            chosen[why] = pair
    return chosen


def _diagrams(found: Read) -> str:
    last = list(found)[-1]
    says = note(
        f"Answers {STAGE_NAMES[last]}, to be read from top to bottom. Every line is a step of the reasoning, marked in "
        "the column of the cell that it assigns. A tick is a right label, a cross a wrong one; a vertical line from "
        "one mark to another is a change of mind. Marks that run evenly from left to right follow the numbers of the "
        "cells; an order by ease jumps. The last line is the answer itself. A narrow screen shows the steps without "
        "the columns."
    )
    parts = [_diagram(why, *pair) for why, pair in choose_diagrams(found[last]).items()]
    return f"<h3>Step by step</h3>{says}{''.join(parts)}"


def _diagram(why: str, answered: Answered, analysis: TraceAnalysis) -> str:
    score, cells = answered.score, range(1, len(analysis.truth) + 1)
    title = (
        f"{why}: puzzle {analysis.id}, {sum(score.right)} of {score.n_cells} cells right, "
        f"{count(len(analysis.reflections), 'change')} of mind"
    )
    heads = "".join(f'<th scope="col" class="lane"><span class="hidden">cell </span>{cell}</th>' for cell in cells)
    steps = analysis.steps[:STEPS_SHOWN]
    rows = []
    for i, step in enumerate(steps):
        lanes = "".join(_lane(steps, i, cell) for cell in cells)
        rows.append(f'<tr><th scope="row">{i + 1}</th>{lanes}<td class="says">{_says(step, analysis)}</td></tr>')
    if score.valid:
        lanes = "".join(f'<td class="lane">{mark(right)}</td>' for right in score.right)
    else:
        lanes = '<td class="lane"></td>' * len(analysis.truth)
    rows.append(f'<tr class="end"><th scope="row">end</th>{lanes}<td class="says">{_end(answered, analysis)}</td></tr>')
    says = '<th scope="col" class="says">what the reasoning says</th>'
    head = f'<thead><tr><th scope="col">step</th>{heads}{says}</tr></thead>'
    return (
        f'<article><h4>{escape(title)}</h4><table class="lanes">{head}<tbody>{"".join(rows)}</tbody></table></article>'
    )


def _lane(steps: Sequence[Step], i: int, cell: int) -> str:
    """Row i of the column of a cell: the mark of its step, the line between two of its steps, or nothing."""
    own = [k for k, step in enumerate(steps) if step.cell == cell]
    before, after = any(k < i for k in own), any(k > i for k in own)
    if i in own:
        line = {(False, True): " down", (True, False): " up", (True, True): " through"}.get((before, after), "")
        return f'<td class="lane{line}">{mark(steps[i].right)}</td>'
    return f'<td class="lane{" through" if before and after else ""}"></td>'


def _says(step: Step, analysis: TraceAnalysis) -> str:
    """A step in words."""
    remarks = [
        *(["changes its mind"] if step.reassigned else []),
        *(["another cell has this label"] if step.taken else []),
        *([] if step.listed else ["not in the list"]),
        *([] if step.right else [f"truth: {analysis.truth[step.cell - 1]}"]),
    ]
    more = f" <small>{escape('; '.join(remarks))}</small>" if remarks else ""
    return f'Cell {step.cell}: <span class="phone">{mark(step.right)} </span>{escape(step.label)}{more}'


def _end(answered: Answered, analysis: TraceAnalysis) -> str:
    """The last row: the answer, and where it differs from the reasoning."""
    score = answered.score
    if not score.valid:
        return f"The answer cannot be read: {escape(score.problem)}."
    parts = [f"The answer has {sum(score.right)} of {score.n_cells} cells right."]
    left_out = len(analysis.steps) - STEPS_SHOWN
    parts += [f"{count(left_out, 'more step')} before it, not shown."] if left_out > 0 else []
    parts += [
        f"It gives cell {cell} another label than the reasoning did: {analysis.answer[cell - 1]}."
        for cell in analysis.contradictions
    ]
    parts += [f"No step assigns cell {', '.join(map(str, analysis.unassigned))}."] if analysis.unassigned else []
    return escape(" ".join(parts))
