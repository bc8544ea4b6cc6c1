"""The report page of a run: one HTML file that opens without a network, for a biologist to read.

Run folder (what is missing is said on the page, except summary.json):
    summary.json                          summary[stage][split] = metrics; summary["run"] = config, seconds, versions
    sft/metrics.jsonl, grpo/metrics.jsonl one row per optimizer step
    puzzles/{test,unseen}.parquet         the puzzles evaluated
    eval/{stage}/{split}/predictions.jsonl  id, prediction, response_tokens, finish_reason
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from data.puzzles import Puzzle, read_puzzles, read_rows
from eval.figures import (
    GRPO_CURVES,
    SFT_CURVES,
    STAGE_NAMES,
    Curve,
    batch_accuracy_svg,
    curve_svg,
    dot_spacing,
    percent,
    smoothing_window,
    split_name,
)
from eval.metrics import SPLITS, STAGES, PuzzleScore, read_steps, read_summary, score_one

GENES_SHOWN = 8

GLOSSARY = {
    "Puzzle, batch": "N cells of one donor, each of a different type, and the list of those N types. The annotator "
    "sees the most expressed genes of every cell and has to match cells and types.",
    "Batch accuracy": "Share of puzzles in which every cell is named right. One swapped pair makes the puzzle wrong.",
    "Cell accuracy": "Share of cells named right: the mean over puzzles of the share within each puzzle. 'Pooled' "
    "counts all cells of all puzzles together, so large puzzles weigh more.",
    "Format validity": "Share of answers that can be read: reasoning, then exactly one label per cell. An answer that "
    "cannot be read counts as 0 cells right.",
    "Uniqueness": "Number of different labels given / number of cells, averaged over puzzles. Every cell has a type of "
    "its own, so a careful annotator reaches 100 %.",
    "Response length": "Mean length of the answers, reasoning included, in tokens (a token is about three quarters of "
    "an English word), or in words where no token counts were recorded.",
    "Held-out donors, held-out cells": "Puzzles set aside for testing. Held-out donors share no donor with training; held-out "
    "cells share no cell with it, but their donors do.",
    "Unseen diseases": "Puzzles of donors whose disease does not occur in training at all.",
    "SFT": "Supervised fine-tuning: the model imitates worked examples.",
    "GRPO": "Group relative policy optimisation: the model answers each puzzle several times and is moved towards "
    "those of its own answers that scored above their mean.",
    "KL": "Kullback-Leibler divergence: how far the model has moved from the one GRPO started from.",
}


@dataclass(frozen=True)
class Answered:
    """One puzzle with a stage's answer to it."""

    puzzle: Puzzle
    prediction: str
    finish_reason: str
    score: PuzzleScore


def write_report(run_dir: str | os.PathLike) -> Path:
    """Write report.html into a run folder and return its path; the same folder gives the same bytes.

    Raises ValueError when summary.json is missing, or when predictions and puzzles of the folder do not match.
    """
    run_dir = Path(run_dir)
    summary = read_summary(run_dir)
    answers = {stage: read_answers(run_dir, stage, "test") for stage in STAGES}
    sections = [
        _head_section(summary, answers),
        _results_section(summary),
        _curves_section(run_dir, "grpo", GRPO_CURVES, "What GRPO training looked like"),
        _curves_section(run_dir, "sft", SFT_CURVES, "What supervised fine-tuning looked like"),
        _examples_section(answers, split_name(summary, "test")),
        _glossary_section(),
        _settings_section(summary.get("run", {})),
    ]
    path = run_dir / "report.html"
    partial = path.with_name("report.html.partial")
    partial.write_text(_page(headline(summary), sections), encoding="utf-8")
    os.replace(partial, path)
    return path


def read_answers(run_dir: Path, stage: str, split: str) -> list[Answered]:
    """Scored answers of a stage in the order of its predictions; none when the folder lacks predictions or puzzles."""
    predictions_file = run_dir / "eval" / stage / split / "predictions.jsonl"
    puzzles_file = run_dir / "puzzles" / f"{split}.parquet"
    if not (predictions_file.is_file() and puzzles_file.is_file()):
        return []
    puzzles = {puzzle.id: puzzle for puzzle in read_puzzles(puzzles_file)}
    answers = []
    for row in read_rows(predictions_file):
        puzzle = puzzles.get(row["id"])
        if puzzle is None:
            raise ValueError(
                f"{predictions_file}: puzzle {row['id']} is not in {puzzles_file}; run launch/evaluate.py again"
            )
        score = score_one(row["prediction"], puzzle, row.get("response_tokens"))
        answers.append(Answered(puzzle, row["prediction"], row.get("finish_reason") or "", score))
    return answers


def headline(summary: dict[str, Any]) -> str:
    """The result in one sentence: batch accuracy of the last stage evaluated, against the stages before it."""
    for split in SPLITS:
        found = [(stage, summary.get(stage, {}).get(split, {}).get("batch_accuracy")) for stage in STAGES]
        found = [(stage, share) for stage, share in found if share is not None]
        if not found:
            continue
        (last, share), earlier = found[-1], found[-2::-1]
        words = f"the puzzles of {split_name(summary, split)}"
        opening = STAGE_NAMES[last][0].upper() + STAGE_NAMES[last][1:]
        sentence = f"{opening} the annotator names every cell of a batch right in {percent(share)} of {words}"
        against = " and ".join(f"{percent(other)} {STAGE_NAMES[stage]}" for stage, other in earlier)
        return sentence + (f", against {against}." if against else ".")
    return "This run has not been evaluated yet."


def choose_examples(answers: dict[str, list[Answered]]) -> dict[str, Answered | None]:
    """The first puzzle, in file order, of each kind; a puzzle is shown once.

    "rescued": SFT wrong, GRPO right. "right": every cell right. "partly": valid answer, some cells right, not all.
    The last two are taken from the last stage that has answers.
    """
    last = next((answers[stage] for stage in reversed(STAGES) if answers.get(stage)), [])
    sft_wrong = {a.puzzle.id for a in answers.get("sft", []) if not a.score.batch_right}
    rescued = next((a for a in answers.get("grpo", []) if a.score.batch_right and a.puzzle.id in sft_wrong), None)
    right = next((a for a in last if a.score.batch_right and a is not rescued), None)
    partly = next((a for a in last if 0 < a.score.cell_accuracy < 1), None)
    return {"right": right, "partly": partly, "rescued": rescued}


def _head_section(summary: dict[str, Any], answers: dict[str, list[Answered]]) -> str:
    title = f"<h1>{escape(headline(summary)).replace(' %', '&nbsp;%')}</h1>"
    sft = {a.puzzle.id: a.score.batch_right for a in answers["sft"]}
    pairs = [(sft[a.puzzle.id], a.score.batch_right) for a in answers["grpo"] if a.puzzle.id in sft]
    if not pairs:
        return title
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    return (
        f'{title}<p class="lead">On the same {_count(len(pairs), "held-out puzzle")}, GRPO got {gained} right that SFT '
        f"had wrong, and {lost} wrong that SFT had right.</p>"
    )


def _results_section(summary: dict[str, Any]) -> str:
    columns = (
        "stage",
        "batch accuracy",
        "cell accuracy",
        "format validity",
        "uniqueness",
        "response length",
        "puzzles",
    )
    rows, missing = [], ""
    for split in SPLITS:
        if not any(summary.get(stage, {}).get(split) for stage in STAGES):
            missing += _missing(f"This run was not evaluated on {split_name(summary, split)}.")
            continue
        rows.append(
            f'<tr class="group"><th colspan="{len(columns)}" scope="rowgroup">{split_name(summary, split)}</th></tr>'
        )
        rows += [_result_row(stage, summary.get(stage, {}).get(split)) for stage in STAGES]
    bars = _figure(
        batch_accuracy_svg(summary),
        "Batch accuracy by stage",
        "Height is the share of puzzles with every cell right: higher is better. The thin line is the 95 % interval "
        "that this number of puzzles allows (Wilson); where intervals overlap widely the difference may be chance.",
    )
    return _section("Results", (_table(columns, rows) if rows else "") + missing + bars)


def _result_row(stage: str, scores: dict[str, float] | None) -> str:
    name = f'<th scope="row">{STAGE_NAMES[stage]}</th>'
    if not scores:
        return f'<tr>{name}<td colspan="6" class="missing">not evaluated in this run</td></tr>'
    cells = [_share(scores.get(key)) for key in ("batch_accuracy", "cell_accuracy", "format_validity", "uniqueness")]
    if scores.get("cell_accuracy_micro") is not None:
        cells[1] += f"<br><small>pooled {_share(scores['cell_accuracy_micro'])}</small>"
    cells += [_number(scores.get("response_length")), _number(scores.get("n_puzzles"))]
    return f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _curves_section(run_dir: Path, stage: str, curves: Iterable[Curve], title: str) -> str:
    file_name = f"{stage}/metrics.jsonl"
    steps = read_steps(run_dir / file_name)
    if not steps:
        return _section(title, _missing(f"This run folder has no {file_name}, so there is no curve to show."))
    every, window = dot_spacing(len(steps)), smoothing_window(len(steps))
    dots = "Dots are single steps" if every == 1 else f"Dots are single steps (one in {every} is drawn)"
    line = f"the line is the running mean over {window} steps" if window > 1 else "the line joins them"
    intro = f"<p>{_count(len(steps), 'optimizer step')}. {dots}, {line}.</p>"
    drawn = [(curve, curve_svg(curve, steps)) for curve in curves]
    absent = [curve.title for curve, svg in drawn if svg is None]
    note = _missing(f"Not recorded in {file_name}: {', '.join(absent)}.") if absent else ""
    figures = "".join(_figure(svg, curve.title, curve.caption) for curve, svg in drawn if svg)
    return _section(title, f'{intro}{note}<div class="grid">{figures}</div>')


def _examples_section(answers: dict[str, list[Answered]], test_name: str) -> str:
    if not any(answers.values()):
        files = "predictions (eval/*/test/predictions.jsonl) with their puzzles (puzzles/test.parquet)"
        return _section("Examples", _missing(f"This run folder has no {files}, so there is no example to show."))
    last = next(stage for stage in reversed(STAGES) if answers[stage])
    sft = {a.puzzle.id: a for a in answers["sft"]}
    titles = {
        "right": f"Every cell right {STAGE_NAMES[last]}",
        "partly": f"Partly wrong {STAGE_NAMES[last]}",
        "rescued": "Wrong after SFT, right after GRPO",
    }
    articles = ""
    for kind, example in choose_examples(answers).items():
        body = _missing("The test puzzles hold no example of this kind.")
        if example is not None:
            body = _example(example, STAGE_NAMES[last], sft[example.puzzle.id] if kind == "rescued" else None)
        articles += f"<article><h3>{titles[kind]}</h3>{body}</article>"
    intro = f"<p>Of each kind the first puzzle in the file of {test_name}, not the prettiest.</p>"
    return _section("Examples", intro + articles)


def _example(example: Answered, stage_name: str, before: Answered | None) -> str:
    """Context, a row per cell and the reasoning; `before` (what SFT answered) adds a column."""
    puzzle, score = example.puzzle, example.score
    columns = ["cell", f"first {GENES_SHOWN} genes", stage_name, "truth", ""]
    if before is not None:
        columns.insert(2, STAGE_NAMES["sft"])
    rows = []
    for i, (genes, truth) in enumerate(zip(puzzle.cells, puzzle.answer, strict=True)):
        cells = [str(i + 1), f'<span class="genes">{escape(", ".join(genes[:GENES_SHOWN]))}</span>']
        cells += [f"{_mark(before.score.right[i])} {_label(before, i)}"] if before is not None else []
        cells += [_label(example, i), escape(truth), _mark(score.right[i])]
        tds = [f'<td data-name="{column}">{cell}</td>' for column, cell in zip(columns, cells, strict=True)]
        wrong = "" if score.right[i] else ' class="wrong"'
        rows.append(f"<tr{wrong}>{''.join(tds)}</tr>")
    cut = " The response hit the length limit." if example.finish_reason == "length" else ""
    texts = [(STAGE_NAMES["sft"], before)] if before is not None else []
    return (
        f"<p><b>Puzzle {escape(puzzle.id)}.</b> {escape(puzzle.context)} "
        f"<b>{sum(score.right)} of {score.n_cells} cells right.</b>{cut}</p>{_table(columns, rows, 'cells')}"
    ) + "".join(
        _details(f"What the model wrote {name}: its reasoning and answer", f"<pre>{escape(answered.prediction)}</pre>")
        for name, answered in [*texts, (stage_name, example)]
    )


def _label(answered: Answered, cell: int) -> str:
    """The label given to a cell; for an answer that cannot be read, the reason at the first cell."""
    score = answered.score
    if not score.valid:
        return f'<span class="missing">unreadable answer: {escape(score.problem)}</span>' if cell == 0 else "&ndash;"
    text = escape(score.labels[cell])
    return text if score.right[cell] else f'<span class="cross">{text}</span>'


def _mark(right: bool) -> str:
    name, label, sign = ("tick", "right", "&#10003;") if right else ("cross", "wrong", "&#10007;")
    return f'<b class="{name}" role="img" aria-label="{label}">{sign}</b>'


def _glossary_section() -> str:
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in GLOSSARY.items())
    return _section("Words used here", f"<dl>{items}</dl>")


def _settings_section(run: dict[str, Any]) -> str:
    seconds = {stage: f"{value:,.0f} s" for stage, value in (run.get("seconds") or {}).items()}
    versions = (run.get("versions") or {}) | ({"git commit": run["git_commit"]} if run.get("git_commit") else {})
    tables = {"Time taken": seconds, "Settings": run.get("config"), "Versions": versions}
    blocks = [_details(title, _settings_table(values)) for title, values in tables.items() if values]
    return _section("How this run was made", "".join(blocks) or _missing("Not recorded in summary.json."))


def _settings_table(values: dict[str, Any]) -> str:
    texts = {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    rows = [f'<tr><th scope="row">{escape(key)}</th><td>{escape(text)}</td></tr>' for key, text in texts.items()]
    return _table(("setting", "value"), rows, "settings")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _table(columns: Iterable[str], rows: list[str], kind: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="wide">{table}</div>'


def _figure(svg: str | None, title: str, caption: str) -> str:
    if svg is None:
        return _missing(f"{title}: nothing recorded to draw.")
    return f"<figure><h3>{escape(title)}</h3>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _missing(sentence: str) -> str:
    return f'<p class="missing">{escape(sentence)}</p>'


def _share(value: float | None) -> str:
    return "&ndash;" if value is None else f"{100 * value:.1f}&nbsp;%"


def _number(value: float | None) -> str:
    return "&ndash;" if value is None else f"{value:,.0f}"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _page(title: str, sections: list[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


_CSS = """
:root { color-scheme: light dark; --page: #f6f7f8; --card: #fff; --ink: #1c2126; --soft: #5b6570; --line: #d9dde1;
  --grid: #e3e6e9; --good: #00724f; --bad: #b3261e; --badwash: #fdf0ee; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1d2226; --ink: #e6e9ec; --soft: #a3adb7;
  --line: #363d44; --grid: #30373d; --good: #4cc79b; --bad: #ff8f84; --badwash: #33211f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: clamp(1.4rem, 1rem + 2vw, 2.1rem); line-height: 1.25; margin: 0 0 .6rem; text-wrap: balance; }
h2 { margin: 2.6rem 0 .6rem; font-size: 1.35rem; }
h3 { margin: 0 0 .4rem; font-size: 1.02rem; }
.lead { font-size: 1.1rem; color: var(--soft); margin: 0; }
.missing { color: var(--soft); font-style: italic; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 1rem; }
figure, article, .wide { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
figure { margin: 1rem 0 0; padding: .9rem 1rem; break-inside: avoid; }
.grid figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 600px; margin: 0 auto; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
article { padding: 1rem; margin: 1rem 0; }
article .wide { border: 0; margin: 0 0 .6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
th:first-child { text-align: left; white-space: nowrap; font-weight: 500; }
thead th, thead th:first-child { font-size: .85rem; color: var(--soft); font-weight: 600; vertical-align: bottom; }
tr.group th { font-weight: 700; background: var(--page); }
small { color: var(--soft); white-space: nowrap; }
.cells th, .cells td, .settings th, .settings td { text-align: left; }
.cells td { font-size: .93rem; }
.cells tr.wrong { background: var(--badwash); }
.genes { font-style: italic; font-size: .86rem; color: var(--soft); }
.tick { color: var(--good); }
.cross { color: var(--bad); }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--soft); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--page); padding: .8rem; font-size: .85rem; }
.settings td { overflow-wrap: anywhere; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; color: var(--soft); max-width: 52em; }
@media screen and (max-width: 560px) {
  main { padding-top: 1.2rem; } article { padding: .8rem .6rem; } th, td { padding: .35rem .45rem; }
  .cells thead { display: none; }
  .cells tr { display: grid; grid-template-columns: 1.8rem 1fr 1.8rem; border-bottom: 1px solid var(--line); }
  .cells td { border: 0; padding: .12rem .3rem; grid-column: 2; }
  .cells td:first-child { grid-column: 1; grid-row: 1; font-weight: 600; }
  .cells td:last-child { grid-column: 3; grid-row: 1; }
  .cells td:nth-child(n+3):not(:last-child)::before { content: attr(data-name) ": "; color: var(--soft); } }
@media print {
  :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --grid: #ddd;
    --good: #00553a; --bad: #8c1d18; --badwash: #fff; }
  body { font-size: 12px; } main { max-width: none; padding: 0; }
  h2, h3 { break-after: avoid; } tr { break-inside: avoid; }
  .grid { grid-template-columns: 1fr 1fr; } }
"""
