"""Let a model answer puzzles: in chunks, with every answer saved as soon as it comes, so that a run can be resumed.

A model is a function `ask(puzzles, first)` that yields lists of pairs (puzzle, [k] Answer); each list is saved when it
comes. `first` is the position of the chunk in the file. A local model derives its seed from it, so that a run that was
killed and resumed gives the same answers as an unbroken run (on the same day, where the chat template of a model shows it).

A row of predictions.jsonl is {id, prediction, response_tokens, finish_reason}. With k > 1 answers per puzzle it also
has samples, samples_tokens and samples_finish_reasons, [k] each, and `prediction` is the first sample; under --consensus
also greedy, greedy_tokens and greedy_finish_reason, of one more answer at temperature 0.
"""

import contextlib
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
from data.files import append_rows, appended_rows, lock_folder, sealed_row, seen_from, unlock_folder, write_whole
from data.prompts import ChatFormat
from data.puzzles import Puzzle, id_text, read_rows
from eval.run_files import PARTIAL, read_result
from rollout import LocalEngine, Rollout, Sampling, stable_seed

REFUSED = "refused"
"""The finish_reason of an empty answer to a prompt that the endpoint refused for good."""
_REFUSAL = re.compile(r"status (4\d\d): ")
_NOT_FOR_GOOD = (401, 403, 408, 409, 425, 429)
"""Status codes about the key, the time or the load, not about the prompt."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One response to one puzzle."""

    text: str
    """The whole response, reasoning included."""
    tokens: int | None
    """Its length in the model's own tokens; None when unknown."""
    finish_reason: str
    """"stop", "length" (cut at the limit), or REFUSED."""
    greedy: bool = False
    """Is it one more answer, at temperature 0, beside the sampled ones?"""


Answered = list[tuple[Puzzle, list[Answer]]]
Ask = Callable[[list[Puzzle], int], Iterable[Answered]]
LINES = 20
"""Lines of progress that a run prints where there is no terminal for a bar."""


def ask_engine(engine: LocalEngine, chat: ChatFormat, sampling: Sampling, greedy: bool = False) -> Ask:
    """A model in an engine in this process. chat: how it is asked. sampling.temperature 0 is greedy.

    greedy: every puzzle gets one more answer, at temperature 0, after the sampled ones.
    """

    def answer(rollout: Rollout, greedy: bool = False) -> Answer:
        text = chat.response_text(rollout.response_ids)
        return Answer(text=text, tokens=len(rollout.response_ids), finish_reason=rollout.finish_reason, greedy=greedy)

    def ask(puzzles: list[Puzzle], first: int) -> Iterator[Answered]:
        # each chunk has its own seed: a resumed run samples what the unbroken run would have
        of_chunk = replace(sampling, seed=stable_seed("evaluate", sampling.seed, first))
        names, prompts = [puzzle.id for puzzle in puzzles], [chat.prompt_ids(puzzle.chat()) for puzzle in puzzles]
        answers = [[answer(r) for r in group] for group in engine.generate(names, prompts, of_chunk)]
        if greedy:
            for of_puzzle, group in zip(
                answers, engine.generate(names, prompts, replace(of_chunk, n=1, temperature=0.0)), strict=True
            ):
                of_puzzle += [answer(r, greedy=True) for r in group]
        yield list(zip(puzzles, answers, strict=True))

    return ask


def refused_for_good(error: str) -> bool:
    """Did the endpoint refuse this prompt, so that it would refuse it again?

    error: of a Completion (data/distill/distill.py).
    """
    status = _REFUSAL.match(error)
    return status is not None and int(status[1]) not in _NOT_FOR_GOOD


def ask_teacher(
    teacher: Teacher, k: int, refused_are_invalid: bool = False
) -> Callable[[list[Puzzle], int, "Partial"], Iterable[Answered]]:
    """A model behind an endpoint (rollout/teachers/openai.py). A puzzle is yielded as soon as its k answers are there.

    `ask` also takes the Partial that keeps those of a puzzle that lacks others: they cost money.

    Reasoning that the endpoint returns in a field of its own is put into <think> tags. refused_are_invalid: a prompt
    that the endpoint refuses for good gets an empty answer. `ask` raises RunError, after the last answer, when
    another request failed.
    """

    def ask(puzzles: list[Puzzle], first: int, kept: Partial) -> Iterator[Answered]:
        by_id, error, refused = {puzzle.id: puzzle for puzzle in puzzles}, "", set()
        came = {name: dict(kept.attempts.get(name, {})) for name in by_id}
        for done in teacher.sample(
            [Request(puzzle=p, attempt=i) for p in puzzles for i in range(k) if i not in came[p.id]]
        ):
            answer = Answer(text=done.trace, tokens=done.completion_tokens, finish_reason=done.finish_reason)
            if refused_for_good(done.error):
                refused.add(done.puzzle_id)
                answer = Answer(text="", tokens=0, finish_reason=REFUSED)
            if done.error and not (refused_are_invalid and refused_for_good(done.error)):
                error = done.error
                continue  # the other answers are on their way, and may have cost money
            came[done.puzzle_id][done.attempt] = answer
            if len(came[done.puzzle_id]) == k:
                yield [(by_id[done.puzzle_id], [came[done.puzzle_id][i] for i in range(k)])]
            elif answer.finish_reason != REFUSED:
                kept.add_attempt(done.puzzle_id, done.attempt, answer)
        lacking = sum(len(answers) < k for answers in came.values())
        if lacking:
            again = "--resume asks for them"
            if refused and not refused_are_invalid:
                again += f", and with --refused invalid the {len(refused)} refused for good count as invalid answers"
            raise RunError(f"{lacking} of {len(puzzles)} puzzles got no answer ({error or teacher.ended}); {again}")

    return ask


def row_of(puzzle: Puzzle, answers: Sequence[Answer]) -> dict[str, Any]:
    """The row of predictions.jsonl. Token counts are left out when one of them is unknown."""
    extra = [answer for answer in answers if answer.greedy]
    answers = [answer for answer in answers if not answer.greedy]
    counted = all(answer.tokens is not None for answer in answers)
    row = {"id": puzzle.id, "prediction": answers[0].text}
    row |= {"response_tokens": answers[0].tokens} if counted else {}
    row["finish_reason"] = answers[0].finish_reason
    if len(answers) > 1:
        row["samples"] = [answer.text for answer in answers]
        row |= {"samples_tokens": [answer.tokens for answer in answers]} if counted else {}
        row["samples_finish_reasons"] = [answer.finish_reason for answer in answers]
    for one in extra:
        row |= {"greedy": one.text, "greedy_tokens": one.tokens, "greedy_finish_reason": one.finish_reason}
    return row


def distinct_puzzles(puzzles: Sequence[Puzzle]) -> list[Puzzle]:
    """The puzzles with each id once. Raises UserError when two different puzzles have the same id."""
    found: dict[str, Puzzle] = {}
    for puzzle in puzzles:
        if found.setdefault(puzzle.id, puzzle).user_message != puzzle.user_message:
            raise UserError(f"puzzle {puzzle.id} occurs twice with different cells: give each puzzle its own id")
    return list(found.values())


def answer_all(
    puzzles: Sequence[Puzzle], ask: Ask, partial: "Partial", *, chunk: int, whole_chunks: bool, name: str
) -> list[dict]:
    """Rows of all puzzles, in their order. Every answer is saved in `partial` as soon as it comes.

    Puzzles that `partial` already holds are not asked again. whole_chunks: ask a whole chunk again when one of its
    puzzles has no answer; for a sampler whose answers depend on the other prompts of the chunk. name: shown by the
    progress bar.
    """
    todo = distinct_puzzles(puzzles)
    held = said = sum(puzzle.id in partial.rows for puzzle in todo)
    with tqdm(total=len(todo), initial=held, desc=name, unit="puzzle", disable=None) as bar:
        for first in range(0, len(todo), chunk):
            together = todo[first : first + chunk]
            missing = [puzzle for puzzle in together if puzzle.id not in partial.rows]
            # what vLLM samples for a prompt depends on the other prompts of the chunk
            asked = together if whole_chunks and missing else missing
            for answered in ask(asked, first) if asked else ():
                new = sum(puzzle.id not in partial.rows for puzzle, _ in answered)
                partial.add([row_of(*pair) for pair in answered])
                held += new
                partial.tell(held, len(todo))
                bar.update(new)
                if bar.disable and (held - said >= len(todo) / LINES or held == len(todo)):
                    print(f"{name}: {held:,} of {len(todo):,} puzzles answered", flush=True)
                    said = held
    return [partial.rows[puzzle.id] for puzzle in puzzles]


class Partial:
    """Unfinished predictions, OUT/predictions.partial.jsonl: a line with the settings, then a row per puzzle.

    Of a puzzle of an endpoint that lacks some of its k answers, a line per answer that came, with its number: `attempt`.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: dict[str, Any],
        resume: bool,
        afresh: str = "name another --out",
        wanted: set[str] | None = None,
    ) -> None:
        """settings: everything the answers depend on. resume: read the rows that a run with the same settings left. afresh:
        what starts again without them, for a message. wanted: ids of the puzzles of this run; None: not checked.

        The rows may be those of a finished run (predictions.jsonl). Raises UserError when they were made with other
        settings, when answers of a model would be lost, when a line before the last one is damaged, or when another process
        writes the folder.
        """
        self.path, self.afresh = Path(folder) / PARTIAL, afresh
        if self.path.parent.is_dir():  # a folder is made with the first answer: a refused command leaves none
            lock_folder(self.path.parent)
        else:
            above = next(place for place in self.path.absolute().parents if os.path.lexists(place))
            if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):  # told before an answer is paid for
                raise UserError(f"--out {folder}: {above} is no folder in which you may write; name another place")
        self.rows: dict[str, dict] = {}
        """{puzzle id: row}"""
        self.attempts: dict[str, dict[int, Answer]] = {}
        """{puzzle id: {number: answer}} of puzzles that lack others of their k answers."""
        self.tell: Callable[[int, int], None] = lambda done, total: None
        """Called with the puzzles that are answered, and all of them, after some were saved."""
        self.settings = json.loads(json.dumps(settings))  # as they are read back: lists for tuples
        before, rows, path = self._left()
        if resume:
            self._refuse_other_settings(before, path)
            self.rows = {row["id"]: row for row in rows if "attempt" not in row}
            for row in (row for row in rows if "attempt" in row and row["id"] not in self.rows):
                answer = Answer(
                    text=row["prediction"], tokens=row["response_tokens"], finish_reason=row["finish_reason"]
                )
                self.attempts.setdefault(row["id"], {})[row["attempt"]] = answer
        # a baseline answers again in seconds, and predictions of another place are still there
        source = before.get("predictions")
        elsewhere = source and not _reads(before, path, recorded=True) and seen_from(path.parent, Path(source)).exists()
        if rows and "baseline" not in before and not elsewhere:
            self._refuse_to_lose(before, rows, path, resume, wanted)
        self.started = False

    def add(self, rows: list[dict]) -> None:
        """Append rows and wait until they are on disk.

        The first call rewrites the file, with the rows that were read from it.
        """
        # a row that is answered again replaces the old one
        for row in rows:
            self.rows[row["id"]] = row
        self._write(rows)

    def add_attempt(self, name: str, number: int, answer: Answer) -> None:
        """Keep one of a puzzle's k answers, until `add` gets them all."""
        self.attempts.setdefault(name, {})[number] = answer
        self._write([_attempt_row(name, number, answer)])

    def _write(self, rows: list[dict]) -> None:
        if not self.started:
            lock_folder(self.path.parent)
            lacking = [(name, of) for name, of in self.attempts.items() if name not in self.rows]
            attempts = [_attempt_row(name, number, answer) for name, of in lacking for number, answer in of.items()]
            lines = [{"settings": self.settings}, *self.rows.values(), *attempts]
            write_whole(self.path, "".join(json.dumps(sealed_row(line)) + "\n" for line in lines))
            self.started = True
            return
        # an answer must survive a crash of the machine: it may have cost money
        append_rows(self.path, rows, sync=True, seal=True)

    def remove(self) -> None:
        """Remove the file, once the results are written, and let others write the folder."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        unlock_folder(self.path.parent)

    def _refuse_other_settings(self, before: dict[str, Any], path: Path) -> None:
        if name := self._changed(before) if path.is_file() else "":
            raise UserError(
                f"--resume: {path} was made with {self._words(name, before)}: give the same, or {self.afresh} to start again"
            )

    def _refuse_to_lose(
        self, before: dict[str, Any], rows: list[dict], path: Path, resume: bool, wanted: set[str] | None
    ) -> None:
        """Raises UserError when this run would replace a model's answers by others, or by fewer: they took hours, or money."""
        if path.name == "predictions.jsonl" and not _reads(self.settings, path):
            raise UserError(
                f"--out: {path} holds {len(rows):,} answers, and no metrics.json says whose they are: name another folder, or "
                "move that file"
            )
        if path == self.path and not resume:
            raise UserError(
                f"--out: {path} holds {len(rows):,} answers of an unfinished run: --resume goes on with it; or {self.afresh}"
            )
        if not resume and before.get("endpoint") and not self._changed(before):
            raise UserError(
                f"--out: {path.with_name('predictions.jsonl')} holds {len(rows):,} answers that may have cost money: --resume "
                "keeps them; or name another folder to ask again"
            )
        if not resume and not _reads(self.settings, path) and (name := self._changed(before)):
            raise UserError(
                f"--out: {path} was made with {self._words(name, before)}: name another folder, or remove {path}"
            )
        if wanted is not None and (more := {id_text(row["id"]) for row in rows if "id" in row} - wanted):
            raise UserError(
                f"--out: {path} goes with answers to {len(more):,} puzzles that this run does not ask, {sorted(more)[0]} for "
                "example: give --limit as before, or name another folder"
            )

    def _left(self) -> tuple[dict[str, Any], list[dict], Path]:
        """(settings, rows, file with the settings) of an earlier run, finished or not; no settings and rows if there is none."""
        if self.path.is_file():
            parsed = [row for _, row in appended_rows(self.path, _is_line)]
            return (parsed[0].get("settings", {}) if parsed else {}), [row for row in parsed if "id" in row], self.path
        finished, predictions = self.path.with_name("metrics.json"), self.path.with_name("predictions.jsonl")
        if not predictions.is_file():
            return {}, [], finished
        try:
            if not finished.is_file():  # of another program: perhaps the only copy
                return {"predictions": str(predictions)}, read_rows(predictions), predictions
            return read_result(finished).get("run") or {}, read_rows(predictions), finished
        except UserError as error:
            raise UserError(f"{error}; put a copy of the file back, or name another --out") from None

    def _changed(self, before: dict[str, Any]) -> str:
        """The name of the first setting that differs from those of this run; "" when none does."""
        names = self.settings.keys() | before.keys()
        if before.get("model_files") and before["model_files"] == self.settings.get("model_files"):
            names -= {"model", "base"}  # the same files, named otherwise
        return next((name for name in sorted(names) if self.settings.get(name) != before.get(name)), "")

    def _words(self, name: str, before: dict[str, Any]) -> str:
        if name == "model_files":
            return "other files of the model"
        return f"{name} {before.get(name)}, and this run has {self.settings.get(name)}"


def _reads(settings: dict[str, Any], path: Path, recorded: bool = False) -> bool:
    """Does an evaluation with these settings read the predictions.jsonl beside a file, its own? recorded: by an earlier one."""
    source = settings.get("predictions")
    own = [path.parent.resolve(), path.with_name("predictions.jsonl").resolve()]
    if source is None:
        return False
    places = [Path(source)]
    # it was relative to the folder of that command, which need not be today's; or the folder of several files
    if recorded:
        own += [path.parent.parent.resolve()]
        places += [path.parent / source, seen_from(path.parent, places[0])]
    return any(place.resolve() in own for place in places)


def _attempt_row(name: str, number: int, answer: Answer) -> dict[str, Any]:
    row = {"id": name, "attempt": number, "prediction": answer.text}
    return row | {"response_tokens": answer.tokens, "finish_reason": answer.finish_reason}


def _is_line(row: dict[str, Any]) -> bool:
    """Does a line of the file hold settings, or an answer?"""
    if "attempt" in row and not (
        isinstance(row["attempt"], int) and {"response_tokens", "finish_reason"} <= row.keys()
    ):
        return False
    return isinstance(row.get("settings"), dict) or all(isinstance(row.get(name), str) for name in ("id", "prediction"))


def count_tokens(rows: Sequence[dict], tokenizer) -> list[dict]:
    """The rows with new token counts: tokens of this tokenizer, without special tokens."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return [
        row
        | {"response_tokens": count(row["prediction"])}
        | ({"samples_tokens": [count(text) for text in row["samples"]]} if row.get("samples") else {})
        | ({"greedy_tokens": count(row["greedy"])} if isinstance(row.get("greedy"), str) else {})
        for row in rows
    ]
