"""From matched answers to the files of an evaluation: metrics.json, evaluation.md, predictions.jsonl, average.json.

Answers come from eval/sources.py. The keys of metrics.json are read by the report page (eval/report/run.py).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import write_whole
from data.puzzles import Puzzle, write_rows
from eval.bootstrap import intervals, paired
from eval.breakdowns import (
    average_over,
    breakdowns,
    decomposition,
    greedy_answers,
    interval_method,
    k_sample,
    notes_on_reuse,
    vote_confidence,
)
from eval.metrics import METRICS, cell_vote, lacking_tokens, metrics_of, score_all, scores_of
from eval.predict import REFUSED
from eval.published import average_markdown, comparable, evaluation_markdown
from eval.reasons import faults_of, finish_reasons, scored_answers
from eval.similarity import LabelEncoder, similarity


def evaluation_of(
    rows: Sequence[dict],
    puzzles: Sequence[Puzzle],
    *,
    name: str,
    run: dict[str, Any],
    file: str = "",
    seed: int = 0,
    confident_from: float | None = None,
    encoder: LabelEncoder | None = None,
    other: tuple[str, Sequence[dict]] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of metrics.json: the metrics of the first answers, then intervals, breakdowns and everything else.

    rows: one matched row per puzzle. name: of the model that answered. run: its settings. file: of the puzzles.
    confident_from: the threshold of --consensus, None without it. encoder: for the similarity of labels. other: (name,
    matched rows) of a model to compare with. notes: sentences that a reader must know; those about the rows are added.
    """
    texts, samples, unit = scores_of(rows, puzzles)
    firsts = [of_puzzle[0] for of_puzzle in samples]
    variant = variant_of_all(puzzles, file)
    found = breakdowns(firsts, puzzles, seed)
    result = metrics_of(firsts).to_dict() | {
        "name": name,
        "response_length_unit": unit,
        "intervals": intervals([[score] for score in firsts], puzzles, seed),
        "interval": interval_method(puzzles),
        "puzzles": {"file": Path(file).name, "variant": variant, "digest": puzzles_digest(puzzles)},
        "run": run,
        **notes_on(rows, notes, puzzles),
        **faults_of(scored_answers(rows, puzzles, texts, samples)),
        "breakdowns": found,
    }
    if len(samples[0]) > 1:
        result["k_sample"] = k_sample(texts, samples, puzzles, seed)
        if confident_from is not None:
            result["k_sample"] |= greedy_answers(rows, puzzles, unit, seed)
            result["k_sample"]["consensus"] = vote_confidence(texts, puzzles, confident_from, seed)
    elif confident_from is not None:
        raise UserError("--consensus: the predictions have one answer to each puzzle; give some with several (samples)")
    if variant == "cell":
        result["decomposition"] = decomposition([of_puzzle[0] for of_puzzle in texts], puzzles, firsts, seed)
    if encoder is not None:
        result["similarity"] = similarity(firsts, puzzles, encoder, seed)
    if other is not None:
        result["compare"] = comparison(rows, *other, puzzles, seed)
        if confident_from is not None:
            result["compare"]["consensus"] = compared_vote(texts, other[1], puzzles, seed)
    diseases = [str(group["value"]) for group in found["disease"]]
    result["published"] = comparable(variant, diseases, encoder is not None)
    return result


def notes_on(rows: Sequence[dict], notes: Sequence[str], puzzles: Sequence[Puzzle] = ()) -> dict[str, Any]:
    """{refused, notes}: the number of answers that the endpoint refused, and the notes with those about rows and puzzles.

    Each key is left out where there is nothing to say.
    """
    refused = sum(
        reason == REFUSED for row in rows for reason in finish_reasons(row, len(row.get("samples") or [None]))
    )
    lacking, notes = lacking_tokens(rows), list(notes)
    if refused:
        asked = sum(len(row.get("samples") or [None]) for row in rows)
        notes.append(
            f"of {asked:,} requests the endpoint refused {refused:,} for good: counted as invalid, of no length"
        )
    if lacking:
        notes.append(
            f"{lacking:,} of {len(rows):,} predictions state no number of tokens, so all lengths are in words; "
            "--tokenizer FOLDER counts tokens"
        )
    notes += notes_on_reuse(puzzles)
    return ({"refused": refused} if refused else {}) | ({"notes": notes} if notes else {})


def variant_of_all(puzzles: Sequence[Puzzle], file: str) -> str:
    """The variant of the puzzles of a file. Raises UserError when they are of several variants."""
    variants = sorted({puzzle.variant for puzzle in puzzles})
    if len(variants) > 1:
        raise UserError(f"--puzzles {file}: holds {' and '.join(variants)} puzzles; evaluate each kind by itself")
    return variants[0]


def comparison(
    rows: Sequence[dict], other: str, other_rows: Sequence[dict], puzzles: Sequence[Puzzle], seed: int
) -> dict[str, Any]:
    """{other, response_length_unit, metrics, invalid_reasons, label_problems, answers} of two models' matched rows.

    answers: {ours, theirs}: answers to a puzzle, whose mean is compared; absent where both have one.
    For the metrics see eval.bootstrap.paired, for the last two keys, which are of the other model, eval.reasons.faults_of.
    Lengths are in words unless both models have token counts.
    """
    units = {scores_of(of_model, puzzles)[2] for of_model in (rows, other_rows)}
    ours, theirs = (scores_of(of_model, puzzles, in_words=len(units) > 1)[1] for of_model in (rows, other_rows))
    unit = units.pop() if len(units) == 1 else "words"
    texts = [row.get("samples") or [row["prediction"]] for row in other_rows]
    faults = faults_of(scored_answers(other_rows, puzzles, texts, theirs))
    answers = {"ours": max(map(len, ours)), "theirs": max(map(len, theirs))}  # to a puzzle: their mean is compared
    found = {"other": other, "response_length_unit": unit, "metrics": paired(ours, theirs, puzzles, seed)} | faults
    return found | ({"answers": answers} if max(answers.values()) > 1 else {})


def compared_vote(
    texts: Sequence[Sequence[str]], other_rows: Sequence[dict], puzzles: Sequence[Puzzle], seed: int
) -> dict[str, dict]:
    """eval.bootstrap.paired of the one-to-one vote over our answers against another model's answers, without lengths."""
    voted = score_all([cell_vote(of_puzzle, puzzle) for of_puzzle, puzzle in zip(texts, puzzles, strict=True)], puzzles)
    theirs = scores_of(other_rows, puzzles, in_words=True)[1]
    found = paired([[score] for score in voted], theirs, puzzles, "consensus", seed)
    return {name: one for name, one in found.items() if name != "response_length"}


def average_of(
    answered: dict[str, tuple[list[dict], list[Puzzle]]], results: dict[str, dict[str, Any]], seed: int
) -> dict[str, Any]:
    """The content of average.json: the metrics of several files and their unweighted mean (as in Table 3).

    answered: {file: (matched rows, puzzles)}. results: {file: the content of its metrics.json}.
    """
    units = {result["response_length_unit"] for result in results.values()}
    sets = {  # a mean of tokens and words would mean nothing
        file: ([of_puzzle[0] for of_puzzle in scores_of(rows, puzzles, in_words=len(units) > 1)[1]], puzzles)
        for file, (rows, puzzles) in answered.items()
    }
    shown = (*METRICS, "n_puzzles", "interval", "intervals", "invalid_reasons", "label_problems")
    variants = sorted({result["puzzles"]["variant"] for result in results.values()})  # "batch" comes first
    return {
        "name": next(iter(results.values()))["name"],
        "response_length_unit": units.pop() if len(units) == 1 else "tokens or words, of the average in words",
        "files": {file: {key: result[key] for key in shown} for file, result in results.items()},
        "average": average_over(sets, seed),
        "published": comparable(variants[0], list(results)),
    }


def puzzles_digest(puzzles: Sequence[Puzzle]) -> str:
    """16 hex digits that identify the puzzles, their order, and their answers."""
    rows = [[puzzle.id, puzzle.user_message, puzzle.answer] for puzzle in puzzles]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def write_evaluation(out: Path, rows: list[dict], result: dict[str, Any], title: str) -> None:
    """Write OUT/predictions.jsonl, evaluation.md and, last, metrics.json, each whole or not at all."""
    # metrics.json comes last: where it is, the evaluation is complete
    write_rows(out / "predictions.jsonl", rows)
    write_whole(out / "evaluation.md", evaluation_markdown(title, result))
    write_whole(out / "metrics.json", json.dumps(result, indent=1, allow_nan=False) + "\n")


def write_average(out: Path, result: dict[str, Any]) -> None:
    """Write OUT/evaluation.md and average.json of several files, each whole or not at all. result: of `average_of`."""
    write_whole(out / "evaluation.md", average_markdown(result))
    write_whole(out / "average.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
