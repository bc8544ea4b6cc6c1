"""What reasoning traces do: order of the steps, changes of mind, contradictions, labels outside the list; with pictures.

python launch/traces.py --puzzles test.parquet --predictions eval/grpo/predictions.jsonl --out traces/grpo
python launch/traces.py --puzzles runs/demo/puzzles/train.parquet --predictions runs/demo/grpo/rollouts.jsonl --out traces/rl
python launch/traces.py --puzzles reasoning.parquet --out traces/o1        (published reasoning rows)
"""

import json
import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import UserError
from data.files import write_whole
from data.puzzles import Puzzle, read_puzzles, read_rows
from eval.report.figures import percent
from eval.traces.reading import Step, TraceAnalysis, analyse, known_labels
from eval.traces.summary import TraceSummary, steps_png, summarise_traces, summary_png
from launch.options import command, option

INSTRUCTED = "simplest to determine"
"""Stands in the system message of the published unseen-disease prompts, which ask for easy cells first."""


@dataclass(frozen=True, kw_only=True)
class TracesConfig:
    puzzles: str = option(MISSING, "Puzzles, .parquet or .jsonl.")
    predictions: str | None = option(
        None,
        "Responses, .jsonl: predictions (id, prediction), a GRPO run's rollouts.jsonl, or rows with reasoning; "
        "default: the reasoning in --puzzles itself.",
    )
    out: str = option(MISSING, "Folder for traces.json, traces.md, traces.png and steps-<id>.png.")
    show: int = option(6, "How many responses to draw: changes of mind, then the worst, then the best.")
    step: tuple[int, ...] = option((), "Of rollouts, only those of this step, repeatable.")
    accuracy_from: str | None = option(
        None, "traces.json of other responses: measure ease by their accuracy per cell type instead of by these."
    )


class Response(NamedTuple):
    """A response to read. `name` is unique in a file and fit for a file name."""

    name: str
    puzzle: Puzzle
    text: str


@command(TracesConfig)
def main(config: TracesConfig) -> None:
    """Read reasoning traces: steps, order, self-reflection, contradictions (Cell-o1, section 6.2)."""
    if config.show < 0:
        raise UserError(f"--show {config.show}: give 0 or more")
    puzzles = read_puzzles(config.puzzles)
    responses = read_responses(config, puzzles)
    of_type = read_type_accuracy(config.accuracy_from) if config.accuracy_from else None
    known = known_labels(puzzles)
    read = [(response, analyse(response.text, response.puzzle, known)) for response in responses]
    summary = summarise_traces([analysis for _, analysis in read], of_type)
    out = Path(config.out)
    shown = choose([analysis for _, analysis in read], config.show)
    pictures = []
    for place, why in shown:
        response, analysis = read[place]
        pictures.append((f"steps-{response.name}.png", why, *read[place]))
        write_whole(out / pictures[-1][0], steps_png(analysis, picture_title(response.name, analysis)))
    write_whole(out / "traces.png", summary_png(summary, Path(config.predictions or config.puzzles).name))
    instructed = sum(INSTRUCTED in response.puzzle.system_message for response in responses)
    write_whole(out / "traces.md", report(config, summary, pictures, instructed))
    rows = [{"name": response.name, **analysis.to_dict()} for response, analysis in read]
    source = {"puzzles": config.puzzles, "predictions": config.predictions, "accuracy_from": config.accuracy_from}
    content = {"source": source, "summary": summary.to_dict(), "responses": rows}
    write_whole(out / "traces.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(
        f"{len(read)} responses, {summary.mean_steps:.1f} steps each, {percent(summary.self_reflection)} change their mind"
    )
    print(f"wrote {out / 'traces.md'}, traces.json, traces.png and {len(pictures)} step diagrams")


def read_responses(config: TracesConfig, puzzles: list[Puzzle]) -> list[Response]:
    """The responses of the file, in its order. Raises UserError naming file and row for one that cannot be matched."""
    file = config.predictions or config.puzzles
    by_id = {puzzle.id: puzzle for puzzle in puzzles}
    found: list[Response] = []
    rows = read_rows(file)
    for number, row in enumerate(rows):
        if config.step and row.get("step") not in config.step:
            continue
        for suffix, text in texts_of(row, f"{file}, row {number}"):
            name = row.get("puzzle_id") or row.get("id")
            if "user_msg" in row:
                name = Puzzle.from_row(row).id
            if name is None and len(rows) == len(puzzles):
                name = puzzles[number].id
            if name is None:
                raise UserError(
                    f"{file}: {len(rows)} responses without an id for {len(puzzles)} puzzles; add a column id"
                )
            if name not in by_id:
                raise UserError(
                    f"{file}, row {number}: its puzzle {name} is not in --puzzles {config.puzzles}; name its file"
                )
            found.append(Response(f"{name}{suffix}", by_id[name], text))
    if not found:
        cause = f"no row of step {', '.join(map(str, config.step))}" if config.step else "no response with reasoning"
        remedy = "name another --step" if config.step else "name the responses with --predictions"
        raise UserError(f"{file}: holds {cause}; {remedy}")
    return unique(found)


def texts_of(row: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """[(what to add to the puzzle's id, response)] of a row; none for a puzzle row with a bare answer."""
    if isinstance(row.get("completion"), str):
        return [(f"-step{row.get('step', 0)}-{row.get('response', 0)}", row["completion"])]
    if row.get("samples"):
        return [(f"-{k}", text) for k, text in enumerate(row["samples"], start=1)]
    if isinstance(row.get("prediction"), str):
        return [("", row["prediction"])]
    if isinstance(row.get("assistant_msg"), str):
        return [("", row["assistant_msg"])] if "<think>" in row["assistant_msg"] else []
    raise UserError(f"{where}: has no response; it needs a text column prediction, completion or assistant_msg")


def unique(responses: list[Response]) -> list[Response]:
    """The responses with names for files: odd characters become "_", a name that is taken gets a number."""
    taken: dict[str, int] = {}
    named = []
    for response in responses:
        name = re.sub(r"[^\w.-]+", "_", response.name)[:80]
        taken[name] = taken.get(name, 0) + 1
        named.append(response._replace(name=name if taken[name] == 1 else f"{name}.{taken[name]}"))
    return named


def read_type_accuracy(path: str) -> dict[str, float]:
    """The accuracy per cell type of a traces.json. Raises UserError when it is none."""
    if not Path(path).is_file():
        raise UserError(f"--accuracy-from {path}: no such file; launch/traces.py writes a traces.json into its --out")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))["summary"]["type_accuracy"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(
            f"--accuracy-from {path}: not a traces.json; launch/traces.py writes one into its --out"
        ) from None


def choose(analyses: list[TraceAnalysis], show: int) -> list[tuple[int, str]]:
    """[(place, why)] of the responses to draw: in turn a change of mind, a bad one, a good one, while there are any.

    Each puzzle is drawn once as long as others are left. Changes towards the right label come first, then the most changes.
    """

    def share(place: int) -> float:
        return analyses[place].cells_right / len(analyses[place].truth)

    def towards(place: int) -> int:
        return sum(after.right for _, after in analyses[place].reflections)

    places = range(len(analyses))
    changing = [i for i in places if analyses[i].reflections]
    queues = {
        "changes its mind": sorted(changing, key=lambda i: (-towards(i), -len(analyses[i].reflections))),
        "among the worst": sorted(
            places, key=lambda i: (not analyses[i].answer, share(i), -len(analyses[i].contradictions))
        ),
        "among the best": sorted(places, key=lambda i: (-share(i), -len(analyses[i].truth))),
    }
    chosen: dict[int, str] = {}
    for once in (True, False):
        while len(chosen) < show and len(chosen) < len(analyses):
            before = len(chosen)
            for why, queue in queues.items():
                seen = {analyses[i].id for i in chosen} if once else set()
                place = next((i for i in queue if i not in chosen and analyses[i].id not in seen), None)
                if place is not None and len(chosen) < show:
                    chosen[place] = why
            if len(chosen) == before:
                break
    order = list(queues)
    return sorted(chosen.items(), key=lambda item: order.index(item[1]))


def picture_title(name: str, analysis: TraceAnalysis) -> str:
    """What stands above a step diagram."""
    right = f"{analysis.cells_right} of {len(analysis.truth)} cells right" if analysis.answer else "no valid answer"
    return f"{name}: {right}, {count(len(analysis.reflections), 'change')} of mind"


def count(number: int, noun: str) -> str:
    """1 -> "1 step", 2 -> "2 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def report(
    config: TracesConfig,
    summary: TraceSummary,
    pictures: list[tuple[str, str, Response, TraceAnalysis]],
    instructed: int,
) -> str:
    """The text of traces.md. pictures: (file, why, response, analysis)."""
    parts = [
        "# What the reasoning does\n",
        f"{count(summary.n_responses, 'response')} of {config.predictions or config.puzzles}, {summary.n_cells:,} cells; "
        f"{summary.mean_steps:.1f} steps each on average. A step is an assignment of a label to a cell that had none, or had "
        "another. Steps are found by rules (eval/traces/reading.py), not by a reader: look at the pictures before you quote a share. "
        "After Cell-o1, arXiv:2506.02911, section 6.2 and Figure 6.\n",
        "![Summary](traces.png)\n",
    ]
    if instructed:
        parts.append(
            f"{count(instructed, 'prompt')} asked for the simplest cell first: there, easy cells first is obedience.\n"
        )
    for title, numbers in sections(summary):
        parts.append(f"## {title}\n")
        parts += [f"- **{name}: {value}**  \n  {reading}" for name, value, reading in numbers]
        parts.append("")
    parts += ["## Step diagrams\n"] if pictures else []
    for file, why, response, analysis in pictures:
        parts.append(f"### {picture_title(response.name, analysis)} ({why})\n\n![{response.name}]({file})\n")
        parts += [f"{i}. {step_line(step)}" for i, step in enumerate(analysis.steps, start=1)]
        parts.append(outcome(analysis))
    return "\n".join(parts).rstrip() + "\n"


def sections(summary: TraceSummary) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """[(title, [(what, value, how to read it)])] of the report."""
    order = summary.curriculum
    rho = order and f"{order['spearman']:+.2f} (95 % interval {order['low']:+.2f} to {order['high']:+.2f})"
    tau = order and f" Kendall's tau says {order['kendall']:+.2f}."
    labels = ", ".join(f"{label} ({number})" for label, number in summary.outside_labels.items())
    return [
        (
            "Changes of mind (self-reflection)",
            [
                (
                    "Responses that change their mind",
                    share(summary.self_reflection),
                    "They give a cell another label than before. More is not better by itself: see where the changes lead.",
                ),
                (
                    "Changes from a wrong label to the right one",
                    share(summary.towards_right, summary.reflections),
                    "Useful reflection.",
                ),
                (
                    "Changes from the right label to a wrong one",
                    share(summary.away_from_right, summary.reflections),
                    "Harmful reflection.",
                ),
                (
                    "Changes from a wrong label to another",
                    share(summary.wrong_to_wrong, summary.reflections),
                    "Neither.",
                ),
            ],
        ),
        (
            "Order (curriculum)",
            [
                (
                    "Easy cells first",
                    rho or "nothing to measure",
                    "Rank correlation (Spearman's rho) within a response of how early a cell is assigned and how often its true type is "
                    "right: +1 easy first, -1 hard first, 0 no relation. Mean over puzzles whose cell types differ in ease."
                    + (tau or "")
                    + " Ease that is taken from these same responses contains their own errors: with few responses, give "
                    "--accuracy-from another set.",
                ),
                (
                    "Puzzles with easy cells first",
                    share(order and order["positive"], order and order["puzzles"]),
                    "About half would be chance.",
                ),
                (
                    "Responses in cell order 1 to N",
                    share(summary.in_cell_order),
                    "They go through the cells as the prompt lists them, whatever their ease.",
                ),
                (
                    "Right in the first third, in the last third",
                    f"{share(summary.first_third)}, {share(summary.last_third)}",
                    "Accuracy of the assignments made early and late. A fall fits easy cells first, and errors that add up.",
                ),
            ],
        ),
        (
            "Reasoning against answer",
            [
                (
                    "Responses whose answer contradicts the reasoning",
                    share(summary.contradiction),
                    "Of those with a valid answer: a cell gets another label than the reasoning gave it last.",
                ),
                (
                    "Cells contradicted",
                    share(summary.contradicted_cells),
                    "Of the cells that have both labels."
                    + (
                        f" The reasoning was right in {share(summary.reasoning_was_right)} of these, the answer in "
                        f"{share(summary.answer_was_right)}."
                        if summary.contradicted_cells
                        else ""
                    ),
                ),
                (
                    "Cells never given a label",
                    share(summary.unassigned),
                    "The answer labels them without a reason that the rules can find.",
                ),
            ],
        ),
        (
            "Labels",
            [
                (
                    "Responses that end with one label at two cells",
                    share(summary.duplicated),
                    "Every cell of a batch has a type of its own, so at most one of the two is right.",
                ),
                (
                    "Responses that name a type outside the list",
                    share(summary.outside),
                    f"In {share(summary.outside_assigned)} it is given to a cell; elsewhere it is only mentioned, as in a comparison. A "
                    "lower bound: found are the types of data/atlas/markers.tsv, of the puzzles and of a list of common ones "
                    '(eval/traces/names.py), and what is said like "is a ... cell"; other names are missed.'
                    + (f" Named most: {labels}." if labels else ""),
                ),
            ],
        ),
    ]


def share(value: float | None, of: float | None = None) -> str:
    """A share in percent, and of how many."""
    if value is None:
        return "nothing to count"
    return percent(value) + (f" of {of:,}" if of is not None else "")


def step_line(step: Step) -> str:
    """A step in words."""
    odd = [
        *(["changed"] if step.reassigned else []),
        *(["another cell has it"] if step.taken else []),
        *([] if step.listed else ["not in the list"]),
    ]
    return f"Cell {step.cell}: {step.label}, {'right' if step.right else 'wrong'}" + "".join(
        f", {word}" for word in odd
    )


def outcome(analysis: TraceAnalysis) -> str:
    """What the answer says of the reasoning."""
    said = [
        *([] if analysis.answer else ["The format is invalid: there is no answer to compare with."]),
        *[
            f"The answer gives cell {cell} another label: {analysis.answer[cell - 1]}."
            for cell in analysis.contradictions
        ],
        *([f"Given no label: cells {', '.join(map(str, analysis.unassigned))}."] if analysis.unassigned else []),
    ]
    return "\n" + " ".join(said) + "\n" if said else ""


if __name__ == "__main__":
    main()
