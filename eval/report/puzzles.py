"""The report page's puzzles to read: the best, the worst and an unchosen one, with truth and answers cell by cell."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.atlas.markers import read_markers
from data.puzzles import Puzzle
from eval.report.figures import STAGE_NAMES, split_name
from eval.report.html import count, details, escape, html_table, mark, missing, note, section
from eval.report.run import Answered, Evaluations
from reward.cellpuzzles import normalise_label

GENES_SHOWN = 8
TITLES = {"best": "The best", "worst": "The worst", "first": "An unchosen one"}


@dataclass(frozen=True)
class Example:
    """A puzzle with the stages' answers to it."""

    puzzle: Puzzle
    answers: dict[str, Answered]
    """{stage: its answer}, stages in order."""

    @property
    def last(self) -> Answered:
        """The answer of the last stage."""
        return list(self.answers.values())[-1]

    @property
    def change(self) -> float:
        """Share of right cells after the last stage minus that after SFT; 0 when either answer cannot be read."""
        before, after = self.answers.get("sft", self.last).score, self.last.score
        return after.cell_accuracy - before.cell_accuracy if before.valid and after.valid else 0.0


def examples_of(answers: dict[str, list[Answered]]) -> list[Example]:
    """The puzzles that the last stage answered, in its order, with the answers of SFT and GRPO.

    answers: {stage: its answers}. Without answers of SFT and GRPO, those of the base model are used.
    """
    stages = [stage for stage in ("sft", "grpo") if answers.get(stage)] or [s for s in ("base",) if answers.get(s)]
    if not stages:
        return []
    by_id = {stage: {answered.puzzle.id: answered for answered in answers[stage]} for stage in stages}
    return [
        Example(answered.puzzle, {s: by_id[s][answered.puzzle.id] for s in stages if answered.puzzle.id in by_id[s]})
        for answered in answers[stages[-1]]
    ]


def choose_examples(examples: list[Example], show: int) -> dict[str, list[Example]]:
    """{"best", "worst": at most `show` examples each, "first": the first in the file that is neither}.

    Best: the largest share of right cells after the last stage, then the largest gain over SFT, then the most cells.
    Worst: the smallest share of right cells among answers that can be read (the others come last), then the largest
    loss. Ties stay in file order.
    """

    def right(example: Example) -> float:
        return example.last.score.cell_accuracy

    def best_first(example: Example) -> tuple:
        return -right(example), -example.change, -len(example.puzzle.cells)

    def worst_first(example: Example) -> tuple:
        return not example.last.score.valid, right(example), example.change, -len(example.puzzle.cells)

    ranked = sorted((example for example in examples if right(example) > 0), key=best_first)
    best = ranked[: min(show, (len(examples) + 1) // 2)]
    taken = {example.puzzle.id for example in best}
    wrong = [example for example in examples if right(example) < 1 and example.puzzle.id not in taken]
    worst = sorted(wrong, key=worst_first)[:show]
    taken |= {example.puzzle.id for example in worst}
    left = [example for example in examples if example.puzzle.id not in taken]
    first = sorted(left, key=lambda example: not example.last.score.valid)[:1]  # the first that can be read
    return {"best": best, "worst": worst, "first": first}


def puzzles_section(evaluations: Evaluations, summary: dict[str, Any], show: int) -> str:
    """The section, with puzzles of the first split that has answers."""
    title = "Puzzles to read"
    of_split = {
        split: examples_of({stage: evaluation.answers for stage, evaluation in of_stage.items()})
        for split, of_stage in evaluations.items()
    }
    split, examples = next(((split, some) for split, some in of_split.items() if some), ("", []))
    if not examples:
        files = "predictions (eval/*/test/predictions.jsonl) with their puzzles (puzzles/test.parquet)"
        return section("puzzles", title, missing(f"This run folder has no {files}, so there is no puzzle to show."))
    chosen = choose_examples(examples, show)
    unreadable = sum(not example.last.score.valid for example in examples)
    last = STAGE_NAMES[list(examples[0].answers)[-1]]
    says = (
        f"From the {count(len(examples), 'puzzle')} of {split_name(summary, split)}: those with the most and with the "
        f"fewest cells right {last} (among equal ones, those that changed most since SFT), and the first in the file "
        "that is neither. "
        + (
            f"{count(unreadable, 'answer')} {last} cannot be read; such a puzzle is shown only when there is no other. "
            if unreadable
            else ""
        )
        + "Genes are in the order of the prompt, the most expressed first; genes in bold are known markers of the "
        "cell's true type (data/atlas/markers.tsv). A tick means right, a cross wrong."
    )
    markers = {normalise_label(label): set(entry.markers) for label, entry in read_markers().items()}
    parts = []
    for kind, some in chosen.items():
        shown = "".join(
            _article(example, markers, opened=place == 0 and kind != "first") for place, example in enumerate(some)
        )
        parts.append(
            f"<h3>{TITLES[kind]}</h3>{shown}" if some else missing(f"{TITLES[kind]}: there is no such puzzle.")
        )
    return section("puzzles", title, note(says) + "".join(parts))


def _article(example: Example, markers: dict[str, set[str]], opened: bool) -> str:
    """A puzzle with its answers. opened: show what the last stage wrote without a click."""
    puzzle = example.puzzle
    scores = {stage: answered.score for stage, answered in example.answers.items()}
    tally = ", ".join(f"{sum(s.right)} of {s.n_cells} {STAGE_NAMES[stage]}" for stage, s in scores.items())
    head = f"<h4>Puzzle {escape(puzzle.id)}: cells right {escape(tally)}</h4>"
    candidates = "; ".join(escape(label) for label in puzzle.candidates) or "none were given"
    prompt = f"<p>{escape(puzzle.context)}</p><p><b>Candidates:</b> {candidates}</p>"
    notes = [
        f"The answer {STAGE_NAMES[stage]} cannot be read ({score.problem}), so all its cells count as wrong."
        for stage, score in scores.items()
        if not score.valid
    ]
    notes += [
        f"The answer {STAGE_NAMES[stage]} hit the length limit."
        for stage, answered in example.answers.items()
        if answered.finish_reason == "length"
    ]
    columns = ["cell", "genes", "true type", *(STAGE_NAMES[stage] for stage in example.answers)]
    rows = []
    for i, (genes, truth) in enumerate(zip(puzzle.cells, puzzle.answer, strict=True)):
        given = [_given(answered, i) for answered in example.answers.values()]
        own = markers.get(normalise_label(truth), set())
        rows.append([str(i + 1), _genes(genes, own, i + 1), escape(truth), *given])
    texts = [
        details(
            f"What the model wrote {STAGE_NAMES[stage]}: its reasoning and answer",
            _pre(answered.prediction),
            opened and answered is example.last,
        )
        for stage, answered in example.answers.items()
    ]
    texts.append(details("The prompt, word for word", _pre(f"{puzzle.system_message}\n\n{puzzle.user_message}")))
    parts = [head, prompt, *map(missing, notes), html_table(columns, rows, "cells"), *texts]
    return f"<article>{''.join(parts)}</article>"


def _given(answered: Answered, cell: int) -> str:
    """Mark and label that an answer gives to a cell."""
    score = answered.score
    label = escape(score.labels[cell]) if score.valid else '<span class="missing">no readable answer</span>'
    wrong = "" if score.right[cell] else ' class="wrong"'
    return f"<span{wrong}>{mark(score.right[cell])} {label}</span>"


def _genes(genes: Sequence[str], markers: set[str], cell: int) -> str:
    """The first genes of a cell, and the others to open."""
    shown = [f"<b>{escape(gene)}</b>" if gene in markers else escape(gene) for gene in genes]
    rest = shown[GENES_SHOWN:]
    more = f"{len(rest)} more {'gene' if len(rest) == 1 else 'genes'} of cell {cell}"
    hidden = details(more, f"<i>{', '.join(rest)}</i>") if rest else ""
    return f'<div class="genes"><i>{", ".join(shown[:GENES_SHOWN])}</i>{hidden}</div>'


def _pre(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"
