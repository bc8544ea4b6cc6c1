"""The report page of a run: one HTML file that opens without a network, for a biologist to read.

Run folder (the page says what is missing):
    summary.json                          summary[stage][split] = metrics; summary["run"] = config, seconds, versions
    sft/metrics.jsonl, grpo/metrics.jsonl one row per optimizer step
    puzzles/{test,unseen}.parquet         the puzzles that were evaluated
    eval/{stage}/{split}/predictions.jsonl  id, prediction, response_tokens, finish_reason
    eval/{stage}/{split}/metrics.json     the metrics with intervals and breakdowns, which override those of
                                          summary.json (also eval/{stage}/metrics.json, when only one split was
                                          evaluated)

Results, curves and settings are made here, the other sections in eval/report/breakdowns.py, reasoning.py and
puzzles.py.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import write_whole
from eval.breakdowns import n_batches
from eval.published import KEY_MODELS, NOTE, SOURCE
from eval.report.breakdowns import where_sections
from eval.report.faults import faults_table, warning
from eval.report.figures import (
    GRPO_CURVES,
    SFT_CURVES,
    STAGE_NAMES,
    Curve,
    batch_accuracy_svg,
    curve_svg,
    dot_spacing,
    percent,
    series,
    smoothing_window,
    split_name,
)
from eval.report.html import (
    EMPTY,
    contents,
    count,
    details,
    escape,
    figure,
    html_table,
    missing,
    note,
    number,
    page,
    section,
    share,
)
from eval.report.puzzles import puzzles_section
from eval.report.reasoning import traces_section
from eval.report.run import Evaluation, Evaluations, on_other_puzzles, published_beside, read_run, variant_of_split
from eval.report.variants import variant_table
from eval.report.votes import votes_table
from eval.run_files import SPLITS, STAGES, read_steps

PAPER_SIZES = (8, 15)
"""Fewest and most cells of a published puzzle."""
COLUMNS = {
    "batch_accuracy": "whole puzzles right",
    "cell_accuracy": "cells right, mean over puzzles",
    "cell_accuracy_micro": "cells right, pooled",
    "format_validity": "valid format",
    "uniqueness": "uniqueness",
    "response_length": "response length",
    "n_puzzles": "puzzles",
}
BASELINE_NAMES = {
    "random": "labels at random",
    "markers": "marker table, one to one",
    "nearest": "nearest training profile",
    "nearest-assigned": "nearest training profile, one to one",
}
GLOSSARY = {
    "Puzzle, batch": "N cells of one donor, each of a different type, and the list of those N types. The annotator "
    "sees the most expressed genes of every cell and has to match cells and types.",
    "Whole puzzles right (batch accuracy)": "Share of puzzles in which every cell has the right label. One swapped "
    "pair makes the puzzle wrong.",
    "Cells right (cell accuracy)": "Share of cells with the right label: the mean over puzzles of the share within "
    "each puzzle. 'Pooled' counts all cells of all puzzles together, so large puzzles weigh more.",
    "Valid format": "Share of answers that can be read: reasoning, then exactly one label per cell. An answer that "
    "cannot be read has 0 cells right.",
    "Uniqueness": "Number of different labels given / number of cells, averaged over puzzles. Every cell has a type of "
    "its own, so a careful annotator reaches 100 %.",
    "Response length": "Mean length of the answers, reasoning included, in tokens (a token is about three quarters of "
    "an English word), or in words where no token counts were recorded.",
    "95 % interval": "The range in which the true value is likely to be, given the number of puzzles. It does not cover "
    "which donors and cells the puzzles were made of. Where the ranges of two numbers overlap widely, their difference may "
    "be chance.",
    "Held-out donors, held-out cells": "Puzzles set aside for testing. The puzzles of held-out donors share no donor "
    "with training; those of held-out cells share no cell with training, but they share donors.",
    "Held-out puzzles": "Puzzles set aside for testing that may share cells with those of training, or of which it is not "
    "recorded how they were held out.",
    "Unseen diseases": "Puzzles of donors whose disease does not occur in training.",
    "Published": "Copied from the tables of the Cell-o1 paper, not measured here.",
    "SFT": "Supervised fine-tuning: the model learns to imitate worked examples.",
    "GRPO": "Group relative policy optimisation: the model answers each puzzle several times, and is moved towards "
    "those of its own answers that scored above their mean.",
    "KL": "Kullback-Leibler divergence: how far the model has moved from the model that GRPO started from.",
}
LINKS = {
    "results": "Results",
    "where": "Where it is right",
    "where-unseen": "Unseen diseases",
    "where-cells": "Held-out cells",
    "reasoning": "The reasoning",
    "puzzles": "Puzzles to read",
    "grpo": "GRPO training",
    "sft": "SFT training",
    "words": "Words",
    "made": "Settings",
}


def write_report(run_dir: str | os.PathLike, show: int = 3) -> Path:
    """Write report.html into a run folder and return its path; see `written_report`."""
    return written_report(run_dir, show)[0]


def written_report(run_dir: str | os.PathLike, show: int = 3) -> tuple[Path, Evaluations]:
    """Write report.html into a run folder. The same folder gives the same bytes. Returns (its path, what it shows).

    show: number of best and of worst puzzles. Raises UserError when the folder holds nothing to show, or when its
    predictions and puzzles do not match.
    """
    run_dir = Path(run_dir)
    summary, evaluations = read_run(run_dir)
    files = (run_dir / "summary.json", run_dir / "sft/metrics.jsonl", run_dir / "grpo/metrics.jsonl")
    if not evaluations and not any(path.is_file() for path in files):
        raise UserError(
            f"{run_dir}: nothing to show, neither eval/STAGE/SPLIT/metrics.json (stages {', '.join(STAGES)}, splits "
            f"{', '.join(SPLITS)}) nor sft/metrics.jsonl, grpo/metrics.jsonl or summary.json: name a run folder"
        )
    sections = [
        _results_section(summary, evaluations),
        *where_sections(evaluations, summary),
        traces_section(evaluations, summary),
        puzzles_section(evaluations, summary, show),
        _curves_section(run_dir, "grpo", GRPO_CURVES, "What GRPO training looked like"),
        _curves_section(run_dir, "sft", SFT_CURVES, "What supervised fine-tuning looked like"),
        _glossary_section(),
        _settings_section(summary.get("run") or {}),
    ]
    # link only to the sections that this run has
    links = {name: text for name, text in LINKS.items() if any(f'<section id="{name}"' in part for part in sections)}
    path = run_dir / "report.html"
    whole = page(headline(summary, evaluations), [_head(summary, evaluations), contents(links), *sections])
    write_whole(path, whole)
    return path, evaluations


def headline(summary: dict[str, Any], evaluations: Evaluations | None = None) -> str:
    """The result in one sentence: batch accuracy of the last stage that was evaluated, against the stages before it."""
    for split in SPLITS:
        found = [(stage, summary.get(stage, {}).get(split, {}).get("batch_accuracy")) for stage in STAGES]
        found = [(stage, value) for stage, value in found if value is not None]
        if not found:
            continue
        (last, value), earlier = found[-1], found[-2::-1]
        others = on_other_puzzles((evaluations or {}).get(split, {}))
        earlier = [one for one in earlier if one[0] not in others]
        words = f"the {_puzzles_of([split_name(summary, split)])}"
        opening = STAGE_NAMES[last][0].upper() + STAGE_NAMES[last][1:]
        alone = variant_of_split((evaluations or {}).get(split, {})) == "cell"
        what = "the single cell right" if alone else "every cell of a batch right"
        of_stage = (evaluations or {}).get(split, {})
        sentence = f"{opening} the annotator names {what} in {percent(value)} of {words}{_sampled(of_stage.get(last))}"
        against = " and ".join(f"{percent(other)} {STAGE_NAMES[stage]}" for stage, other in earlier)
        return sentence + (f", against {against}." if against else ".")
    return "This run has not been evaluated yet."


def _head(summary: dict[str, Any], evaluations: Evaluations) -> str:
    title = f"<h1>{escape(headline(summary, evaluations)).replace(' %', '&nbsp;%')}</h1>"
    title += _why_zero(summary, evaluations)
    of_stage = evaluations.get("test", {})
    if not {"sft", "grpo"} <= of_stage.keys() or len({_sampled(of_stage[stage]) for stage in ("sft", "grpo")}) > 1:
        return title  # a sampled answer and a greedy one say little about two models
    sft = {a.puzzle.id: a.score.batch_right for a in of_stage["sft"].answers}
    pairs = [(sft[a.puzzle.id], a.score.batch_right) for a in of_stage["grpo"].answers if a.puzzle.id in sft]
    if not pairs:
        return title
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    return (
        f'{title}<p class="lead">On the same {count(len(pairs), "held-out puzzle")}, GRPO got {gained} right that SFT '
        f"had wrong, and {lost} wrong that SFT had right.</p>"
    )


def _sampled(evaluation: Evaluation | None) -> str:
    """Words for an evaluation of several answers to a puzzle: its metrics are those of the first, which was sampled."""
    k = (evaluation.result.get("k_sample") or {}).get("k", 1) if evaluation is not None else 1
    return f" (the first of {k} sampled answers)" if k > 1 else ""


def _why_zero(summary: dict[str, Any], evaluations: Evaluations) -> str:
    """Why the number of the headline is 0, when no answer of its stage is valid or no label is a candidate."""
    for split in SPLITS:
        stages = [stage for stage in STAGES if "batch_accuracy" in summary.get(stage, {}).get(split, {})]
        if stages:
            return warning(stages[-1], evaluations.get(split, {}).get(stages[-1]))
    return ""


def _results_section(summary: dict[str, Any], evaluations: Evaluations) -> str:
    rows: list[list[str] | str] = []
    lacking, more = "", ""
    compared: list[str] = []
    for split in SPLITS:
        name = split_name(summary, split)
        if not any(summary[stage].get(split) for stage in STAGES):
            # few runs have a second file, so its absence says nothing
            lacking += missing(f"This run was not evaluated on {name}.") if split != "cells" else ""
            continue
        rows.append(f"This run: {name}")
        of_stage = evaluations.get(split, {})
        rows += [_result_row(STAGE_NAMES[s] + _sampled(of_stage.get(s)), summary[s].get(split)) for s in STAGES]
        rows += _baseline_rows(summary, split, evaluations.get(split, {}))
        lacking += "".join(
            missing(
                f"{name}, {STAGE_NAMES[stage]}: answered other puzzles ({of_stage[stage].result.get('n_puzzles')} of them) than "
                "the last stage, so its numbers do not compare; run launch/evaluate.py again"
            )
            for stage in on_other_puzzles(of_stage)
        )
        lacking += "".join(missing(sentence) for sentence in _notes(name, split, of_stage, summary))
        variant = variant_of_split(of_stage)
        if variant in ("cell", "open"):
            compared.append(split)
            more += variant_table(variant, name, of_stage)
            continue
        of_paper, published = published_beside(split, of_stage)
        if not published:
            lacking += missing(
                f"No published numbers are shown beside {name}: this folder has neither their puzzles nor a "
                "metrics.json that says which of the paper's tables fits them."
            )
            continue
        compared.append(split)
        rows.append(f"Published, on other puzzles: {of_paper}")
        rows += [_published_row(row, published) for row in published if row["model"] in KEY_MODELS]
        everything = html_table(["published", *COLUMNS.values()], [_published_row(row, published) for row in published])
        more += details(f"All {len(published)} published rows: {of_paper}", everything)
    shown = html_table(["", *COLUMNS.values()], rows, "results") if rows else ""
    shown += "".join(faults_table(split_name(summary, split), of_stage) for split, of_stage in evaluations.items())
    shown += "".join(votes_table(split_name(summary, split), of_stage) for split, of_stage in evaluations.items())
    notes = _sizes(summary, {split: evaluations[split] for split in compared})
    notes += note(_how_to_read(summary, published='class="published"' in "".join(map(str, rows)))) if rows else ""
    with_intervals = all("intervals" in summary[stage][split] for stage in STAGES for split in summary[stage])
    bars = figure(
        batch_accuracy_svg(summary),
        "Whole puzzles right, by stage",
        "The height is the share of puzzles with every cell right: higher is better. The thin line is the 95 % "
        "interval for this number of puzzles "
        f"({'as in the table' if with_intervals else 'Wilson, where the table has none'}); where intervals overlap "
        "widely, the difference may be chance.",
    )
    return section("results", "Results", f'{shown}{lacking}<div class="grid">{bars}<div>{notes}</div></div>{more}')


def _notes(name: str, split: str, of_stage: dict[str, Evaluation], summary: dict[str, Any]) -> list[str]:
    """The notes of all evaluations of a split; what is said of several of them, once, of all of them without their names."""
    said_of: dict[str, list[str]] = {}
    for stage, evaluation in of_stage.items():
        for said in evaluation.notes:
            said_of.setdefault(said, []).append(STAGE_NAMES[stage])
    for baseline, of_split in (summary.get("baselines") or {}).items():
        for said in of_split.get(split, {}).get("notes", ()):
            said_of.setdefault(said, []).append(BASELINE_NAMES.get(baseline, baseline))
    everyone = len(of_stage) + sum(split in of_split for of_split in (summary.get("baselines") or {}).values())
    named = {said: f", {', '.join(who)}" if len(who) < everyone else "" for said, who in said_of.items()}
    return [f"{name}{who}: {said}." for said, who in named.items()]


def _how_to_read(summary: dict[str, Any], published: bool) -> str:
    intervals = any("intervals" in scores for stage in STAGES for scores in summary[stage].values())
    return (
        (
            "Small print below a number is its 95 % interval (bootstrap over puzzles; an interval of a single value "
            "means that all puzzles came out (nearly) alike). "
            if intervals
            else ""
        )
        + (f"Published rows: {SOURCE}. {NOTE} Their response lengths are in tokens of Qwen2.5." if published else "")
    ).strip()


def _baseline_rows(summary: dict[str, Any], split: str, of_stage: dict[str, Evaluation]) -> list[str | list[str]]:
    """The rows of the baselines that were evaluated on the split, under a heading."""
    found = {name: of_split[split] for name, of_split in (summary.get("baselines") or {}).items() if split in of_split}
    rows = [_result_row(escape(BASELINE_NAMES.get(name, name)), scores) for name, scores in found.items()]
    asked = {(scores.get("puzzles") or {}).get("digest") for scores in found.values()}
    same = asked == {next((one.digest for one in reversed(of_stage.values()) if one.digest), None)} != {None}
    return ["Without a language model" + ", on the same puzzles" * same, *rows] if rows else []


def _result_row(name: str, scores: dict[str, Any] | None) -> list[str]:
    if not scores:
        return [name, '<span class="missing">not evaluated in this run</span>', *[EMPTY] * 6]
    limits = (scores.get("intervals") or {}) if n_batches(scores) > 1 else {}  # a single batch has none
    cells = [share(scores.get(key), limits.get(key)) for key in list(COLUMNS)[:5]]
    length = number(scores.get("response_length"), limits.get("response_length"))
    known = scores.get("response_length") is not None
    length += " words" * (known and scores.get("response_length_unit") == "words")
    return [name, *cells, length, number(scores.get("n_puzzles"))]


def _published_row(row: dict[str, Any], among: list[dict[str, Any]]) -> list[str]:
    """A published row. Published cell accuracy is shown as pooled, see eval/published.py.

    among: all rows of the table; they show their settings when these differ.
    """
    setting = f", {row['setting']}" if len({other["setting"] for other in among}) > 1 else ""
    name = f'<span class="published">{escape(row["model"] + setting)} <small>published</small></span>'
    shares = [
        share(row.get("batch_accuracy")),
        EMPTY,
        share(row.get("cell_accuracy")),
        share(row.get("format_validity")),
    ]
    return [name, *shares, share(row.get("uniqueness")), number(row.get("response_length")), EMPTY]


def _sizes(summary: dict[str, Any], evaluations: Evaluations) -> str:
    """How the sizes of our puzzles compare with the paper's, and what guessing would reach."""
    splits_of: dict[str, list[str]] = {}  # {sentence: splits for which it holds}
    low, high = PAPER_SIZES
    for split, of_stage in evaluations.items():
        sizes = next((evaluation.sizes for evaluation in reversed(of_stage.values()) if evaluation.sizes), [])
        sentence = "are others than the paper's: a difference to its numbers does not show which model is better."
        if sizes and all(evaluation.variant == "batch" for evaluation in of_stage.values()):
            guess = percent(sum(1 / n for n in sizes) / len(sizes))
            ours = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else str(sizes[0])
            same = low <= min(sizes) and max(sizes) <= high
            sentence = (
                f"have {ours} cells each, where guessing gets {guess} of the cells right; the paper's have {low} to "
                f"{high} (guessing: {percent(1 / high)} to {percent(1 / low)}). "
                + ("The task has the same size, but " if same else "That is another task size, and ")
                + "the puzzles are others: a difference to the published numbers does not show which model is better."
            )
        splits_of.setdefault(sentence, []).append(split_name(summary, split))
    return "".join(note(f"The {_puzzles_of(names)} {sentence}") for sentence, names in splits_of.items())


def _puzzles_of(splits: list[str]) -> str:
    """["held-out donors"] -> "puzzles of held-out donors"; a name that says "puzzles" by itself stands alone."""
    return f"puzzles of {' and of '.join(splits)}".replace("puzzles of held-out puzzles", "held-out puzzles")


def _curves_section(run_dir: Path, stage: str, curves: Iterable[Curve], title: str) -> str:
    file_name = f"{stage}/metrics.jsonl"
    steps = read_steps(run_dir / file_name)
    if not steps:
        return section(stage, title, missing(f"This run folder has no {file_name}, so there is no curve to show."))
    every, window = dot_spacing(len(steps)), smoothing_window(len(steps))
    dots = "Dots are single steps" if every == 1 else f"Dots are single steps (one in {every} is drawn)"
    line = f"the line is the running mean over {window} steps" if window > 1 else "the line joins them"
    recorded = [len(series(steps, key)[0]) for curve in curves for key in curve.lines]
    seldom = any(0 < n and smoothing_window(n) < window for n in recorded)
    fewer = " Of what was measured in fewer steps, fewer values are averaged, or the line joins them."
    intro = note(f"{count(len(steps), 'optimizer step')}. {dots}, {line}.{fewer if seldom else ''}")
    drawn = [(curve, curve_svg(curve, steps)) for curve in curves]
    absent = [curve.title for curve, svg in drawn if svg is None and not curve.optional]
    lacking = missing(f"Not recorded in {file_name}: {', '.join(absent)}.") if absent else ""
    figures = "".join(figure(svg, curve.title, curve.caption) for curve, svg in drawn if svg)
    return section(stage, title, f'{intro}{lacking}<div class="grid">{figures}</div>')


def _glossary_section() -> str:
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in GLOSSARY.items())
    return section("words", "Words used here", f"<dl>{items}</dl>")


def _settings_section(run: dict[str, Any]) -> str:
    seconds = {stage: f"{value:,.0f} s" for stage, value in (run.get("seconds") or {}).items()}
    versions = (run.get("versions") or {}) | ({"git commit": run["git_commit"]} if run.get("git_commit") else {})
    # a summary.json of an older version has the command of --notify, which may hold a key
    settings = {name: value for name, value in (run.get("config") or {}).items() if name != "notify"}
    tables = {
        "Time taken by the last call of the command": seconds,
        "Settings": settings,
        "Versions": versions,
    }
    blocks = [details(title, _settings_table(values)) for title, values in tables.items() if values]
    return section("made", "How this run was made", "".join(blocks) or missing("Not recorded in summary.json."))


def _settings_table(values: dict[str, Any]) -> str:
    texts = {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return html_table(
        ("setting", "value"), [[escape(key), escape(text)] for key, text in texts.items()], "words settings"
    )
