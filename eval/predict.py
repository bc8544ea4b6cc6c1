"""Answers to puzzles: asked for in chunks and saved as they come, matched with their puzzles, scored, written.

An answering model is a function `ask(puzzles, first)` that gives pairs (puzzle, [k] Answer) in lists, each saved when it comes.
`first` is the place of the chunk in the file, from which a local model takes its seed, so that a run that was killed and resumed
gives what an unbroken one would have.

A row of predictions.jsonl: {id, prediction, response_tokens, finish_reason}; with k > 1 answers per puzzle also samples,
samples_tokens and samples_finish_reasons, [k] each, and `prediction` is the first of them.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.distill.distill import Request, Teacher
from data.errors import RunError, UserError
from data.files import write_whole
from data.puzzles import Puzzle, read_rows, write_rows
from eval.bootstrap import intervals, paired
from eval.breakdowns import average_over, breakdowns, decomposition, how_sure, k_sample
from eval.metrics import METRICS, lacking_tokens, read_result, scores_of, summarise
from eval.published import average_markdown, comparable, evaluation_markdown
from eval.similarity import LabelEncoder, similarity
from rollout import LocalEngine, Rollout, Sampling, stable_seed

PARTIAL = "predictions.partial.jsonl"
REFUSED = "refused"
"""The finish_reason of the empty answer that stands for a prompt which the endpoint refused for good."""
_REFUSAL = re.compile(r"status (4\d\d): ")
_MAY_PASS = (401, 403, 408, 409, 425, 429)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One response to one puzzle."""

    text: str
    """The whole response, reasoning included."""
    tokens: int | None
    """Its length in the model's own tokens; None where that is not known."""
    finish_reason: str
    """"stop", "length" when it was cut, or REFUSED."""


Answered = list[tuple[Puzzle, list[Answer]]]
Ask = Callable[[list[Puzzle], int], Iterable[Answered]]
LINES = 20
"""Of progress, where there is no terminal for a bar."""


def ask_engine(engine: LocalEngine, tokenizer, encode: Callable[[Puzzle], list[int]], sampling: Sampling) -> Ask:
    """Answers from an engine in this process. encode: a puzzle's prompt in tokens. Greedy when sampling.temperature is 0."""

    def answer(rollout: Rollout) -> Answer:
        text = tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        return Answer(text=text, tokens=len(rollout.response_ids), finish_reason=rollout.finish_reason)

    def ask(puzzles: list[Puzzle], first: int) -> Iterator[Answered]:
        of_chunk = replace(sampling, seed=stable_seed("evaluate", sampling.seed, first))
        groups = engine.generate([puzzle.id for puzzle in puzzles], [encode(puzzle) for puzzle in puzzles], of_chunk)
        yield [(puzzle, [answer(r) for r in group]) for puzzle, group in zip(puzzles, groups, strict=True)]

    return ask


def refused_for_good(error: str) -> bool:
    """Did the endpoint refuse this prompt, so that asking again is no use? error: of a Completion (rollout/teachers/openai.py)."""
    status = _REFUSAL.match(error)
    return status is not None and int(status[1]) not in _MAY_PASS


def ask_teacher(teacher: Teacher, k: int, refused_are_invalid: bool = False) -> Ask:
    """k answers per puzzle from a model behind an endpoint (rollout/teachers/openai.py), a puzzle as soon as its k are there.

    Reasoning that the endpoint gives apart is put into <think> tags. refused_are_invalid: a prompt that is refused for good gets
    an empty answer. Raises RunError, after all answers that came, when another request failed for good.
    """

    def ask(puzzles: list[Puzzle], first: int) -> Iterator[Answered]:
        by_id, error, refused = {puzzle.id: puzzle for puzzle in puzzles}, "", set()
        came: dict[str, dict[int, Answer]] = {name: {} for name in by_id}
        for done in teacher.sample([Request(puzzle=p, attempt=i) for p in puzzles for i in range(k)]):
            answer = Answer(text=done.trace, tokens=done.completion_tokens, finish_reason=done.finish_reason)
            if refused_for_good(done.error):
                refused.add(done.puzzle_id)
                answer = Answer(text="", tokens=0, finish_reason=REFUSED)
            if done.error and not (refused_are_invalid and refused_for_good(done.error)):
                error = done.error
                continue
            came[done.puzzle_id][done.attempt] = answer
            if len(came[done.puzzle_id]) == k:
                yield [(by_id[done.puzzle_id], [came[done.puzzle_id][i] for i in range(k)])]
        lacking = sum(len(answers) < k for answers in came.values())
        if lacking:
            again = "--resume asks for them"
            if refused and not refused_are_invalid:
                again += f", and with --refused invalid the {len(refused)} refused for good count as invalid answers"
            raise RunError(f"{lacking} of {len(puzzles)} puzzles got no answer ({error or teacher.ended}); {again}")

    return ask


def row_of(puzzle: Puzzle, answers: Sequence[Answer]) -> dict[str, Any]:
    """The row of predictions.jsonl; token counts are left out where one is not known."""
    counted = all(answer.tokens is not None for answer in answers)
    row = {"id": puzzle.id, "prediction": answers[0].text}
    row |= {"response_tokens": answers[0].tokens} if counted else {}
    row["finish_reason"] = answers[0].finish_reason
    if len(answers) > 1:
        row["samples"] = [answer.text for answer in answers]
        row |= {"samples_tokens": [answer.tokens for answer in answers]} if counted else {}
        row["samples_finish_reasons"] = [answer.finish_reason for answer in answers]
    return row


def distinct(puzzles: Sequence[Puzzle]) -> list[Puzzle]:
    """The puzzles, each id once. Raises UserError for an id that names two different puzzles."""
    found: dict[str, Puzzle] = {}
    for puzzle in puzzles:
        if found.setdefault(puzzle.id, puzzle).user_message != puzzle.user_message:
            raise UserError(f"puzzle {puzzle.id} occurs twice with different cells: give each puzzle its own id")
    return list(found.values())


def answer_all(
    puzzles: Sequence[Puzzle], ask: Ask, partial: "Partial", *, chunk: int, whole_chunks: bool, name: str
) -> list[dict]:
    """Rows of all puzzles, in their order; each answer is saved in `partial` as soon as it comes.

    Puzzles that `partial` already holds are not asked again. whole_chunks: a chunk that lacks one is asked whole, for a sampler
    whose answers depend on what it answers together. name: what the progress bar says.
    """
    todo = distinct(puzzles)
    held = said = sum(puzzle.id in partial.rows for puzzle in todo)
    with tqdm(total=len(todo), initial=held, desc=name, unit="puzzle", disable=None) as bar:
        for first in range(0, len(todo), chunk):
            together = todo[first : first + chunk]
            missing = [puzzle for puzzle in together if puzzle.id not in partial.rows]
            asked = together if whole_chunks and missing else missing
            for answered in ask(asked, first) if asked else ():
                new = sum(puzzle.id not in partial.rows for puzzle, _ in answered)
                partial.add([row_of(*pair) for pair in answered])
                held += new
                bar.update(new)
                if bar.disable and (held - said >= len(todo) / LINES or held == len(todo)):
                    print(f"{name}: {held:,} of {len(todo):,} puzzles answered", flush=True)
                    said = held
    return [partial.rows[puzzle.id] for puzzle in puzzles]


class Partial:
    """OUT/predictions.partial.jsonl: a line with the settings, then the rows of the puzzles answered so far."""

    def __init__(self, folder: str | os.PathLike, settings: dict[str, Any], resume: bool) -> None:
        """settings: what the answers depend on. resume: take over what a run with the same settings left, or finished.

        Raises UserError when what is there was made with other settings, or is damaged before its last line.
        """
        self.path = Path(folder) / PARTIAL
        self.rows: dict[str, dict] = {}
        """{puzzle id: row}"""
        self.settings = json.loads(json.dumps(settings))
        if resume:
            self.rows = {row["id"]: row for row in self._left()}
        self.started = False

    def add(self, rows: list[dict]) -> None:
        """Append rows and wait until they are on disk. The first time, the file is written anew with all rows held."""
        for row in rows:
            self.rows[row["id"]] = row
        if not self.started:
            lines = [{"settings": self.settings}, *self.rows.values()]
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in lines))
            self.started = True
            return
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(row) + "\n" for row in rows))
            handle.flush()
            os.fsync(handle.fileno())

    def remove(self) -> None:
        """The results are written: what is partial is not needed any more."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _left(self) -> list[dict]:
        """Rows that an earlier run left, or none."""
        if not self.path.is_file():
            finished = self.path.with_name("metrics.json")
            predictions = self.path.with_name("predictions.jsonl")
            if not (finished.is_file() and predictions.is_file()):
                return []
            self._same(read_result(finished).get("run") or {}, finished)
            return read_rows(predictions)
        lines = self.path.read_text(encoding="utf-8").split("\n")
        whole = lines[:-1]  # what follows the last line break was cut off by the end of that run
        try:
            parsed = [json.loads(line) for line in whole]
        except json.JSONDecodeError as error:
            raise UserError(
                f"--resume: {self.path} is damaged ({error.msg}); leave --resume out to start again"
            ) from None
        if not parsed:
            return []
        self._same(parsed[0].get("settings", {}), self.path)
        return parsed[1:]

    def _same(self, settings: dict[str, Any], path: Path) -> None:
        """Raises UserError naming the first setting that differs."""
        for name in sorted(self.settings.keys() | settings.keys()):
            if self.settings.get(name) != settings.get(name):
                raise UserError(
                    f"--resume: {path} was made with {name} {settings.get(name)}, and this run has {self.settings.get(name)}: "
                    "give the same, or leave --resume out to start again"
                )


def count_tokens(rows: Sequence[dict], tokenizer) -> list[dict]:
    """The rows with their token counts, in this tokenizer's tokens (no special ones), in place of those they had."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return [
        row
        | {"response_tokens": count(row["prediction"])}
        | ({"samples_tokens": [count(text) for text in row["samples"]]} if row.get("samples") else {})
        for row in rows
    ]


def evaluate(
    rows: Sequence[dict],
    puzzles: Sequence[Puzzle],
    *,
    name: str,
    run: dict[str, Any],
    file: str = "",
    seed: int = 0,
    encoder: LabelEncoder | None = None,
    other: tuple[str, Sequence[dict]] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of metrics.json: the metrics of the first answers, then everything else there is to say about the rows.

    rows: matched, one per puzzle. name: of what answered. run: its settings. file: of the puzzles. encoder: for the similarity of
    labels. other: (name, matched rows) of a model to compare with. notes: what a reader must know besides; those on the rows are
    added.
    """
    texts, samples, unit = scores_of(rows, puzzles)
    firsts = [of_puzzle[0] for of_puzzle in samples]
    variant = variant_of_all(puzzles, file)
    found = breakdowns(firsts, puzzles, seed)
    result = summarise(firsts).to_dict() | {
        "name": name,
        "response_length_unit": unit,
        "intervals": intervals([[score] for score in firsts], puzzles, seed),
        "interval": how_sure(puzzles),
        "puzzles": {"file": Path(file).name, "variant": variant, "digest": digest(puzzles)},
        "run": run,
        **notes_on(rows, notes),
        "breakdowns": found,
    }
    if len(samples[0]) > 1:
        result["k_sample"] = k_sample(texts, samples, puzzles, seed)
    if variant == "cell":
        result["decomposition"] = decomposition([of[0] for of in texts], puzzles, firsts, seed)
    if encoder is not None:
        result["similarity"] = similarity(firsts, puzzles, encoder, seed)
    if other is not None:
        result["compare"] = compare(rows, *other, puzzles, seed)
    diseases = [str(group["value"]) for group in found["disease"]]
    result["published"] = comparable(variant, diseases, encoder is not None)
    return result


def notes_on(rows: Sequence[dict], notes: Sequence[str]) -> dict[str, Any]:
    """{refused, notes}: how many answers are missing because the endpoint refused the prompt, and sentences; each where there are
    any."""
    refused = sum(
        reason == REFUSED for row in rows for reason in row.get("samples_finish_reasons") or [row.get("finish_reason")]
    )
    lacking, notes = lacking_tokens(rows), list(notes)
    if refused:
        asked = sum(len(row.get("samples") or [None]) for row in rows)
        notes.append(
            f"of {asked:,} requests the endpoint refused {refused:,} for good: counted as invalid, of no length"
        )
    if lacking:
        notes.append(
            f"{lacking:,} of {len(rows):,} predictions state no number of tokens, so all lengths are in words; --tokenizer "
            "FOLDER counts tokens"
        )
    return ({"refused": refused} if refused else {}) | ({"notes": notes} if notes else {})


def variant_of_all(puzzles: Sequence[Puzzle], file: str) -> str:
    """The variant of the puzzles of a file. Raises UserError when they are of several."""
    variants = sorted({puzzle.variant for puzzle in puzzles})
    if len(variants) > 1:
        raise UserError(f"--puzzles {file}: holds {' and '.join(variants)} puzzles; evaluate each kind by itself")
    return variants[0]


def compare(
    rows: Sequence[dict], other: str, their_rows: Sequence[dict], puzzles: Sequence[Puzzle], seed: int
) -> dict[str, Any]:
    """{other, response_length_unit, metrics} of two models' matched rows, see `paired`; in words unless both have tokens."""
    units = {scores_of(of_model, puzzles)[2] for of_model in (rows, their_rows)}
    ours, theirs = (scores_of(of_model, puzzles, in_words=len(units) > 1)[1] for of_model in (rows, their_rows))
    unit = units.pop() if len(units) == 1 else "words"
    return {"other": other, "response_length_unit": unit, "metrics": paired(ours, theirs, puzzles, seed)}


def average_of(
    answered: dict[str, tuple[list[dict], list[Puzzle]]], results: dict[str, dict[str, Any]], seed: int
) -> dict[str, Any]:
    """The content of average.json: several files of puzzles, and the unweighted mean over them (as Table 3 over its diseases).

    answered: {file: (matched rows, puzzles)}. results: {file: the content of its metrics.json}.
    """
    sets = {
        file: ([of_puzzle[0] for of_puzzle in scores_of(rows, puzzles)[1]], puzzles)
        for file, (rows, puzzles) in answered.items()
    }
    kept = (*METRICS, "n_puzzles", "intervals")
    variants = sorted({result["puzzles"]["variant"] for result in results.values()})  # batch before the others
    units = {result["response_length_unit"] for result in results.values()}
    return {
        "name": next(iter(results.values()))["name"],
        "response_length_unit": units.pop() if len(units) == 1 else "tokens or words",
        "files": {file: {key: result[key] for key in kept} for file, result in results.items()},
        "average": average_over(sets, seed),
        "published": comparable(variants[0], list(results)),
    }


def digest(puzzles: Sequence[Puzzle]) -> str:
    """16 hex digits that name the puzzles, their order, and their answers."""
    rows = [[puzzle.id, puzzle.user_message, puzzle.answer] for puzzle in puzzles]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def write_evaluation(out: Path, rows: list[dict], result: dict[str, Any], title: str) -> None:
    """Write OUT/predictions.jsonl, evaluation.md and, last, metrics.json, each whole or not at all."""
    write_rows(out / "predictions.jsonl", rows)
    write_whole(out / "evaluation.md", evaluation_markdown(title, result))
    write_whole(out / "metrics.json", json.dumps(result, indent=1, allow_nan=False) + "\n")


def write_average(out: Path, result: dict[str, Any]) -> None:
    """Write OUT/evaluation.md and average.json of several files, each whole or not at all. result: of `average_of`."""
    write_whole(out / "evaluation.md", average_markdown(result))
    write_whole(out / "average.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
