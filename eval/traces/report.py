"""traces.md: what the reasoning of a set of responses does, in numbers and step diagrams, for a biologist to read.

After Cell-o1, arXiv:2506.02911, section 6.2 and Figure 6.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.describe import escape
from data.errors import UserError
from data.files import write_whole
from eval.report.figures import percent
from eval.report.html import count
from eval.traces.reading import Step, TraceAnalysis
from eval.traces.responses import Response
from eval.traces.summary import TraceSummary, steps_png, summary_png

INSTRUCTED = "simplest to determine"
"""Part of the system message of the published unseen-disease prompts, which ask for easy cells first."""

Read = Sequence[tuple[Response, TraceAnalysis]]
"""Responses with their analyses."""


class Drawn(NamedTuple):
    """A response that is drawn as a step diagram."""

    file: str
    why: str
    """Why this response was chosen."""
    response: Response
    analysis: TraceAnalysis


def write_traces(
    out: Path, read: Read, summary: TraceSummary, *, show: int, file: str, source: dict[str, Any]
) -> list[Drawn]:
    """Write traces.json, traces.md, traces.png and step diagrams of at most `show` responses. Returns what was drawn.

    file: of the responses, for the titles. source: where everything came from, for traces.json.
    """
    for given in filter(None, source.values()):
        if Path(given).resolve() == (out / "traces.json").resolve():
            raise UserError(f"--out {out}: would write over {given}; name another folder")
    drawn = []
    for place, why in choose_to_draw([analysis for _, analysis in read], show):
        response, analysis = read[place]
        drawn.append(Drawn(f"steps-{response.name}.png", why, response, analysis))
        write_whole(out / drawn[-1].file, steps_png(analysis, diagram_title(response.name, analysis)))
    write_whole(out / "traces.png", summary_png(summary, Path(file).name))
    instructed = sum(INSTRUCTED in response.puzzle.system_message for response, _ in read)
    write_whole(out / "traces.md", traces_markdown(file, summary, drawn, instructed))
    rows = [{"name": response.name, **analysis.to_dict()} for response, analysis in read]
    content = {"source": source, "summary": summary.to_dict(), "responses": rows}
    write_whole(out / "traces.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    return drawn


def choose_to_draw(analyses: list[TraceAnalysis], show: int) -> list[tuple[int, str]]:
    """[(index, why)] of the responses to draw: in turn one with a change of mind, a bad one and a good one.

    As long as there are other puzzles, each puzzle is drawn once. Responses whose changes lead to the right label come
    first, then those with the most changes.
    """

    def share_right(place: int) -> float:
        return analyses[place].cells_right / len(analyses[place].truth)

    def towards_right(place: int) -> int:
        return sum(after.right for _, after in analyses[place].reflections)

    places = range(len(analyses))
    changing = [i for i in places if analyses[i].reflections]
    queues = {
        "changes its mind": sorted(changing, key=lambda i: (-towards_right(i), -len(analyses[i].reflections))),
        "among the worst": sorted(
            places, key=lambda i: (not analyses[i].answer, share_right(i), -len(analyses[i].contradictions))
        ),
        "among the best": sorted(places, key=lambda i: (-share_right(i), -len(analyses[i].truth))),
    }
    chosen: dict[int, str] = {}
    for each_puzzle_once in (True, False):
        while len(chosen) < show and len(chosen) < len(analyses):
            before = len(chosen)
            for why, queue in queues.items():
                seen = {analyses[i].id for i in chosen} if each_puzzle_once else set()
                place = next((i for i in queue if i not in chosen and analyses[i].id not in seen), None)
                if place is not None and len(chosen) < show:
                    chosen[place] = why
            if len(chosen) == before:
                break
    order = list(queues)
    return sorted(chosen.items(), key=lambda item: order.index(item[1]))


def diagram_title(name: str, analysis: TraceAnalysis) -> str:
    """The title of a step diagram."""
    right = f"{analysis.cells_right} of {len(analysis.truth)} cells right" if analysis.answer else "no valid answer"
    return f"{name}: {right}, {count(len(analysis.reflections), 'change')} of mind"


def traces_markdown(file: str, summary: TraceSummary, drawn: Sequence[Drawn], instructed: int) -> str:
    """The text of traces.md. instructed: number of prompts that asked for the simplest cell first."""
    parts = [
        "# What the reasoning does\n",
        f"{count(summary.n_responses, 'response')} of {file}, {summary.n_cells:,} cells; {summary.mean_steps:.1f} "
        "steps each on average. A step gives a label to a cell that had none, or had another label. Steps are found by "
        "rules (eval/traces/reading.py), not by a human reader: look at the pictures before you quote a share. "
        "After Cell-o1, arXiv:2506.02911, section 6.2 and Figure 6.\n",
        "![Summary](traces.png)\n",
    ]
    if instructed:
        parts.append(
            f"{count(instructed, 'prompt')} asked for the simplest cell first: there, easy cells first is obedience.\n"
        )
    for title, measures in sections(summary):
        parts.append(f"## {title}\n")
        parts += [f"- **{name}: {value}**  \n  {reading}" for name, value, reading in measures]
        parts.append("")
    parts += ["## Step diagrams\n"] if drawn else []
    for file_name, why, response, analysis in drawn:
        parts.append(f"### {diagram_title(response.name, analysis)} ({why})\n\n![{response.name}]({file_name})\n")
        parts += [f"{i}. {step_line(step)}" for i, step in enumerate(analysis.steps, start=1)]
        parts.append(answer_line(analysis))
    return "\n".join(parts).rstrip() + "\n"


Section = tuple[str, list[tuple[str, str, str]]]
"""(title, [(what, value, how to read it)])"""


def sections(summary: TraceSummary) -> list[Section]:
    """The numbers of traces.md, each with a sentence that says how to read it."""
    return [_changes(summary), _order(summary), _reasoning_against_answer(summary), _labels(summary)]


def _changes(summary: TraceSummary) -> Section:
    def of_changes(value: float | None) -> str:
        return share_text(value, summary.reflections)

    return "Changes of mind (self-reflection)", [
        (
            "Responses that change their mind",
            share_text(summary.self_reflection),
            "They give a cell another label than before. More is not better by itself: see where the changes lead.",
        ),
        (
            "Changes from a wrong label to the right one",
            of_changes(summary.towards_right),
            "Useful reflection.",
        ),
        (
            "Changes from the right label to a wrong one",
            of_changes(summary.away_from_right),
            "Harmful reflection.",
        ),
        (
            "Changes from a wrong label to another",
            of_changes(summary.wrong_to_wrong),
            "Neither useful nor harmful.",
        ),
    ]


def _order(summary: TraceSummary) -> Section:
    order = summary.curriculum
    rho = order and f"{order['spearman']:+.2f} (95 % interval {order['low']:+.2f} to {order['high']:+.2f})"
    tau = f" Kendall's tau is {order['kendall']:+.2f}." if order else ""
    return "Order (curriculum)", [
        (
            "Easy cells first",
            rho or "nothing to measure",
            "Rank correlation (Spearman's rho) within a response of how early a cell is assigned and how often its "
            "true type is right: +1 easy first, -1 hard first, 0 no relation. Mean over puzzles whose cell types "
            f"differ in ease.{tau} When ease is measured on these same responses, it contains their own errors: with "
            "few responses, give --accuracy-from another set.",
        ),
        (
            "Puzzles with easy cells first",
            share_text(order and order["positive"], order and order["puzzles"]),
            "About half is expected by chance.",
        ),
        (
            "Responses in cell order 1 to N",
            share_text(summary.in_cell_order),
            "They go through the cells as the prompt lists them, whatever their ease.",
        ),
        (
            "Right in the first third, in the last third",
            f"{share_text(summary.first_third)}, {share_text(summary.last_third)}",
            "Accuracy of the assignments made early and late. A fall fits easy cells first, and errors that add up.",
        ),
    ]


def _reasoning_against_answer(summary: TraceSummary) -> Section:
    who_was_right = (
        f" The reasoning was right in {share_text(summary.reasoning_was_right)} of these, the answer in "
        f"{share_text(summary.answer_was_right)}."
    )
    return "Reasoning against answer", [
        (
            "Responses whose answer contradicts the reasoning",
            share_text(summary.contradiction),
            "Of those with a valid answer: a cell gets another label than the reasoning gave it last.",
        ),
        (
            "Cells contradicted",
            share_text(summary.contradicted_cells),
            "Of the cells that have both labels." + (who_was_right if summary.contradicted_cells else ""),
        ),
        (
            "Cells never given a label",
            share_text(summary.unassigned),
            "The answer labels them without a reason that the rules can find.",
        ),
    ]


def _labels(summary: TraceSummary) -> Section:
    most = ", ".join(f"{escape(label)} ({number})" for label, number in summary.outside_labels.items())
    return "Labels", [
        (
            "Responses that end with one label at two cells",
            share_text(summary.duplicated),
            "Every cell of a batch has a type of its own, so at most one of the two is right.",
        ),
        (
            "Responses that name a type outside the list",
            share_text(summary.outside),
            f"In {share_text(summary.outside_assigned)} such a type is given to a cell; elsewhere it is only "
            "mentioned, as in a comparison. A lower bound: recognised are the types of data/atlas/markers.tsv, of the "
            "puzzles and of a list of "
            'common types (eval/traces/names.py), and phrases like "is a ... cell"; other names are missed.'
            + (f" Named most: {most}." if most else ""),
        ),
    ]


def share_text(value: float | None, of: float | None = None) -> str:
    """A share in percent, with the number that it is a share of where that is given."""
    if value is None:
        return "nothing to count"
    return percent(value) + (f" of {of:,}" if of is not None else "")


def step_line(step: Step) -> str:
    """A step in words."""
    remarks = [
        *(["changed"] if step.reassigned else []),
        *(["another cell has it"] if step.taken else []),
        *([] if step.listed else ["not in the list"]),
    ]
    right = "right" if step.right else "wrong"
    return ", ".join([f"Cell {step.cell}: {step.label}", right, *remarks])


def answer_line(analysis: TraceAnalysis) -> str:
    """Where the answer differs from the reasoning; "" where it does not."""
    remarks = [
        *([] if analysis.answer else ["The format is invalid: there is no answer to compare with."]),
        *[
            f"The answer gives cell {cell} another label: {escape(analysis.answer[cell - 1])}."
            for cell in analysis.contradictions
        ],
        *([f"Given no label: cells {', '.join(map(str, analysis.unassigned))}."] if analysis.unassigned else []),
    ]
    return "\n" + " ".join(remarks) + "\n" if remarks else ""
