"""Where the answers of an evaluation come from: saved predictions, a baseline, an endpoint, or a checkpoint in vLLM.

Each source gives matched rows, one per puzzle. A checkpoint is loaded by a function that launch/evaluate.py passes in,
because this room does not import the trainer.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.describe import unlike
from data.distill.meter import Meter
from data.errors import RunError, UserError
from data.puzzles import Puzzle, read_puzzles
from data.variants import regroup
from eval import baselines
from eval.evaluation import puzzles_digest, variant_of_all
from eval.metrics import checked_row, match_rows, read_predictions
from eval.predict import REFUSED, Answered, Ask, Partial, answer_all, ask_teacher, count_tokens
from eval.run_files import read_result
from eval.settings import EvaluateConfig

Loaded = tuple[Ask, Callable[[], None]]
"""(a loaded model, what to call at the end)"""


@dataclass(frozen=True)
class PuzzleSet:
    """The puzzles of one --puzzles file."""

    name: str
    """The file's name without its ending."""
    file: str
    whole: list[Puzzle]
    """All puzzles of the file."""
    puzzles: list[Puzzle]
    """The puzzles that are evaluated (--limit)."""


def read_sets(config: EvaluateConfig) -> list[PuzzleSet]:
    """The puzzles of every file. Raises UserError as `limited` does."""
    sets = []
    for file in config.puzzles:
        whole = read_puzzles(file)
        sets.append(PuzzleSet(Path(file).stem, file, whole, limited(whole, config.limit, file)))
    return sets


def limited(puzzles: list[Puzzle], limit: int | None, file: str) -> list[Puzzle]:
    """The first `limit` puzzles; of single cells the whole batches among them.

    A batch that lacks a cell has no score.

    Raises UserError for puzzles of several variants, and for single cells that make up no whole batch.
    """
    first = puzzles[:limit]
    if variant_of_all(puzzles, file) != "cell":
        return first
    # checked even without a limit: a file with a cell missing, or twice, is refused before anything is asked
    try:
        regroup([""] * len(puzzles), puzzles)
    except UserError as error:
        raise UserError(f"--puzzles {file}: {error}") from None
    n_cells = Counter(puzzle.meta["batch_id"] for puzzle in first)
    whole = [puzzle for puzzle in first if n_cells[puzzle.meta["batch_id"]] == len(puzzle.candidates)]
    if not whole:
        raise UserError(
            f"--limit {limit}: the first {limit} cells of {file} hold no whole batch, the first of which has "
            f"{len(first[0].candidates)} cells: raise --limit"
        )
    return whole


def limit_note(puzzle_set: PuzzleSet) -> list[str]:
    """A sentence where --limit leaves puzzles of other kinds out than it keeps; [] where the first ones are like all."""
    first, whole = puzzle_set.puzzles, puzzle_set.whole
    found = unlike(first, whole) if len(first) < len(whole) else []
    return [
        f"only the first {len(first):,} of {len(whole):,} puzzles of the file were asked (--limit), and {one}"
        for one in found
    ]


def name_of(config: EvaluateConfig) -> str:
    """What the tables call the source.

    For a folder of saved predictions it is the name in its metrics.json files, if they all have the same.
    """
    if config.baseline:
        return f"baseline {config.baseline}"
    if config.model:
        return config.model
    if Path(str(config.predictions)).is_file():
        return str(config.predictions)
    files = [predictions_file(config, "predictions", Path(path).stem) for path in config.puzzles]
    names = {str(read_result(file.with_name("metrics.json")).get("name") or config.predictions) for file in files}
    return names.pop() if len(names) == 1 else str(config.predictions)


@dataclass(frozen=True)
class Source:
    """A source of answers."""

    rows: Callable[[PuzzleSet, Partial], list[dict]]
    """One row per puzzle, in puzzle order. `Partial` keeps what a model has answered so far."""
    close: Callable[[], None] = lambda: None
    """To be called at the end."""


def open_source(
    config: EvaluateConfig, *, train: list[Puzzle] | None, tokenizer: Any, load: Callable[[], Loaded]
) -> Source:
    """The source that the options name. No model is loaded, and no puzzle asked, before the first rows are requested.

    train: puzzles that a baseline learns from. tokenizer: counts the tokens of saved predictions, or None. load: loads
    the checkpoint of --model. Raises UserError when an endpoint needs a key and has none.
    """
    if config.predictions:
        return Source(lambda puzzle_set, partial: saved_rows(config, puzzle_set, tokenizer, partial))
    if config.baseline:
        return Source(lambda puzzle_set, _: baseline_rows(config, puzzle_set, train))
    model = RemoteModel(config) if config.endpoint else LocalModel(load)

    def rows(puzzle_set: PuzzleSet, partial: Partial) -> list[dict]:
        model.resume(partial)
        puzzles = puzzle_set.puzzles
        chunk = len(puzzles) if config.endpoint else config.chunk  # an endpoint's answers are saved one by one anyway
        return answer_all(
            puzzles, model.ask, partial, chunk=chunk, whole_chunks=not config.endpoint, name=puzzle_set.name
        )

    return Source(rows, model.close)


def saved_rows(config: EvaluateConfig, puzzle_set: PuzzleSet, tokenizer: Any, partial: Partial) -> list[dict]:
    """Rows of saved predictions, in puzzle order. With a tokenizer their tokens are counted again."""
    path = predictions_file(config, "predictions", puzzle_set.name)
    rows = match_rows(read_predictions(path), puzzle_set.puzzles, f"{path}: ")
    if tokenizer is not None:
        if path.resolve() == partial.path.with_name("predictions.jsonl").resolve():
            raise UserError(f"--tokenizer: its counts would replace those of {path}; name another --out")
        rows = count_tokens(rows, tokenizer)
    return [{"id": puzzle.id} | row for puzzle, row in zip(puzzle_set.puzzles, rows, strict=True)]


def baseline_rows(config: EvaluateConfig, puzzle_set: PuzzleSet, train: list[Puzzle] | None) -> list[dict]:
    """Rows of a baseline. Prints how many cell types it has no knowledge of."""
    name = str(config.baseline)
    rows, unknown = baselines.answer(name, puzzle_set.puzzles, config.seed, train)
    if unknown:
        remedy = "other training puzzles may hold them"
        remedy = remedy if train else "it learns them from training puzzles: --train FILE"
        print(
            f"{puzzle_set.name}: baseline {name} knows nothing of {len(unknown)} cell types, the first is "
            f"{unknown[0]}; {remedy}",
            file=sys.stderr,
        )
    return rows


class RemoteModel:
    """A model behind an OpenAI-compatible endpoint. The key stays in the client."""

    def __init__(self, config: EvaluateConfig) -> None:
        from rollout.teachers.openai import Endpoint, OpenAITeacher, is_loopback, read_key  # loads the client library

        key = read_key(config.key_env)
        if not key and not is_loopback(str(config.endpoint)):
            raise UserError(
                f"the environment variable {config.key_env} holds no key for --endpoint: set it, or name another with "
                "--key-env"
            )
        endpoint = Endpoint(
            model=str(config.model),
            base_url=str(config.endpoint),
            key=key or "EMPTY",
            temperature=config.used_temperature,
            top_p=config.top_p if config.top_p < 1 else None,
            max_response_tokens=config.max_response_tokens,
            seed=config.seed,
            concurrency=config.concurrency,
        )
        self.teacher = OpenAITeacher(endpoint, Meter(), lambda row: None, functools.partial(print, file=sys.stderr))
        self._ask = ask_teacher(self.teacher, config.samples, config.refused == "invalid")

    def resume(self, partial: Partial) -> None:
        """Count the answers of an earlier run.

        They prove that the settings work, so that refusals of all prompts that are left do not end the run.
        """
        self.kept = partial
        whole = sum(row.get("finish_reason") != REFUSED for row in partial.rows.values())
        self.teacher.answered_before += whole + sum(map(len, partial.attempts.values()))

    def ask(self, puzzles: list[Puzzle], first: int) -> Iterator[Answered]:
        """See eval/predict.py. Errors name this command's option for the URL, not the teacher's."""
        try:
            yield from self._ask(puzzles, first, self.kept)
        except (RunError, UserError) as error:
            raise type(error)(str(error).replace("--base-url", "--endpoint")) from None

    def close(self) -> None:
        self.teacher.close()


class LocalModel:
    """A checkpoint in this process, loaded when the first puzzles are asked."""

    def __init__(self, load: Callable[[], Loaded]) -> None:
        self.load = load
        self.loaded: Loaded | None = None

    def resume(self, partial: Partial) -> None:
        """Nothing to do: a local model does not refuse prompts."""

    def ask(self, puzzles: list[Puzzle], first: int) -> Iterable[Answered]:
        """See eval/predict.py."""
        self.loaded = self.loaded or self.load()
        return self.loaded[0](puzzles, first)

    def close(self) -> None:
        if self.loaded is not None:
            self.loaded[1]()


def predictions_file(config: EvaluateConfig, flag: str, name: str) -> Path:
    """The file of predictions for a set of puzzles. flag: "predictions" or "compare".

    Raises UserError if there is none.
    """
    given = Path(getattr(config, flag))
    if given.is_file():
        if len(config.puzzles) > 1:
            raise UserError(
                f"--{flag} {given}: one file answers one --puzzles file; name the --out folder of an evaluation"
            )
        return given
    inside = [given / name / "predictions.jsonl", *([given / "predictions.jsonl"] if len(config.puzzles) == 1 else [])]
    found = next((path for path in inside if path.is_file()), None)
    if found is None:
        raise UserError(f"--{flag} {given}: no such file, and no folder with {inside[-1].relative_to(given)}")
    return found


def rows_to_compare(config: EvaluateConfig, puzzle_set: PuzzleSet) -> tuple[str, list[dict]]:
    """(name, matched rows) of the model of --compare. Raises UserError unless it answered the same puzzles."""
    path = predictions_file(config, "compare", puzzle_set.name)
    rows = [checked_row(row, f"--compare {path}: row {number}") for number, row in enumerate(read_predictions(path))]
    # beside a file of another name lie the numbers of other answers
    result = read_result(path.with_name("metrics.json")) if path.name == "predictions.jsonl" else {}
    theirs = (result.get("puzzles") or {}).get("digest")
    # predictions of more puzzles, or of other cells under the same ids, cannot be paired
    beyond = {row["id"] for row in rows if "id" in row} - {puzzle.id for puzzle in puzzle_set.puzzles}
    if beyond or theirs not in (None, puzzles_digest(puzzle_set.puzzles)):
        raise UserError(
            f"--compare {path}: answers other puzzles than --puzzles {puzzle_set.file}"
            f"{' --limit ' + str(config.limit) if config.limit else ''}; a paired comparison needs the same ones: "
            "evaluate both models on the same file with the same --limit"
        )
    return result.get("name") or str(config.compare), match_rows(rows, puzzle_set.puzzles, f"--compare {path}: ")
