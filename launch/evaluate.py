"""The paper's metrics of a model, of saved predictions or of a baseline on puzzle files, with intervals and breakdowns.

python launch/evaluate.py --puzzles test.parquet --model runs/demo/sft/model --out eval/sft
python launch/evaluate.py --puzzles test.parquet --model runs/demo/grpo/checkpoints/step-000060 --out eval/grpo --compare eval/sft
python launch/evaluate.py --puzzles test.parquet --model gpt-4o --endpoint https://api.openai.com/v1 --samples 8 --out eval/gpt-4o
python launch/evaluate.py --puzzles test.parquet --predictions answers.jsonl --out eval/mine
python launch/evaluate.py --puzzles test.parquet --baseline nearest --train train.parquet --out eval/nearest
"""

import dataclasses
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import click

from data.errors import UserError
from data.puzzles import Puzzle, read_puzzles
from data.variants import regroup
from eval import baselines
from eval.metrics import METRICS, match_rows, read_predictions, read_result
from eval.predict import (
    Partial,
    answer_all,
    average_of,
    count_tokens,
    digest,
    evaluate,
    variant_of_all,
    write_average,
    write_evaluation,
)
from eval.similarity import LabelEncoder
from launch.answering import Local, Remote, model_files
from launch.options import command, option

Sets = dict[str, list[Puzzle]]
"""{name of the file, without its ending: its puzzles}"""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    puzzles: tuple[str, ...] = option(
        (),
        "Puzzles, .parquet or .jsonl; repeat for several files (then OUT/<name> each, and their unweighted average).",
    )
    model: str | None = option(
        None, "Checkpoint folder, or an adapter folder (a GRPO checkpoint); with --endpoint a model's name."
    )
    base: str | None = option(None, "Checkpoint under an adapter; default: the one the adapter names.")
    endpoint: str | None = option(None, "Base URL of an OpenAI-compatible server that serves --model.")
    key_env: str = option(
        "OPENAI_API_KEY", "Environment variable with the endpoint's key, which is never written down."
    )
    concurrency: int = option(8, "Requests to the endpoint at a time.")
    refused: str = option(
        "stop",
        "Prompts that the endpoint refuses for good (a content filter, say): end without a result, or count as invalid answers.",
        ("stop", "invalid"),
    )
    predictions: str | None = option(
        None,
        "Saved predictions instead of a model: a .jsonl, .json or .parquet with id, prediction, or an evaluation's --out folder.",
    )
    baseline: str | None = option(None, "A baseline instead of a model.", baselines.BASELINES)
    train: str | None = option(None, "Training puzzles that a baseline learns from.")
    out: str = option(dataclasses.MISSING, "Folder for metrics.json, evaluation.md and predictions.jsonl.")
    compare: str | None = option(None, "Predictions of another model on the same puzzles: a .jsonl or an --out folder.")
    medcpt: str | None = option(None, "Encoder folder (MedCPT-Query-Encoder), for the similarity of labels (Table 12).")
    tokenizer: str | None = option(None, "Folder of the tokenizer that counts the tokens of saved predictions.")
    samples: int = option(1, "Answers per puzzle; above 1 also pass@k and votes.")
    temperature: float | None = option(None, "Default: 0 (greedy) for one answer, 1 for several.")
    top_p: float = option(1.0, "Nucleus that is sampled from.")
    seed: int = option(0, "Of samples, intervals and baselines.")
    max_response_tokens: int = option(3000, "Longest response.")
    limit: int | None = option(
        None, "Use only the first LIMIT puzzles of each file; of single cells the whole batches among them."
    )
    chunk: int = option(256, "Puzzles that vLLM answers between two saves.")
    resume: bool = option(False, "Go on where a run with the same settings was stopped.")
    dtype: str = option("float32", "Weights and compute.", ("float32", "bfloat16"))
    memory_fraction: float = option(0.85, "Share of a GPU's memory that vLLM may use.")


@command(EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    """Score a model (vLLM or an endpoint), saved predictions or a baseline; prints the metrics and writes them to --out."""
    config = dataclasses.replace(config, temperature=temperature(config))
    check(config)
    whole = read_sets(config)
    sets = {stem: limited(puzzles, config.limit, file_of(config, stem)) for stem, puzzles in whole.items()}
    train = read_puzzles(config.train) if config.train else None
    encoder = LabelEncoder(config.medcpt) if config.medcpt else None
    others = {stem: compared(config, stem, puzzles) for stem, puzzles in sets.items()} if config.compare else {}
    name = name_of(config)
    answers, close = source(config, sets, train)
    done, results = {}, {}
    for stem, puzzles in sets.items():
        folder = Path(config.out) if len(sets) == 1 else Path(config.out) / stem
        partial = Partial(folder, settings(config, whole[stem]), config.resume)
        rows = answers(stem, puzzles, partial)
        notes = baselines.cautions(config.baseline, puzzles, train) if config.baseline else []
        result = evaluate(
            rows,
            puzzles,
            name=name,
            run=partial.settings,
            file=file_of(config, stem),
            seed=config.seed,
            encoder=encoder,
            other=others.get(stem),
            notes=notes,
        )
        for note in result.get("notes", ()):
            print(f"{stem}: {note}", file=sys.stderr)
        write_evaluation(folder, rows, result, f"{name} on {stem}")
        partial.remove()
        print(stem, json.dumps({key: result[key] for key in (*METRICS, "n_puzzles")}), flush=True)
        done[stem], results[stem] = (rows, puzzles), result
    close()
    if len(sets) > 1:
        write_average(Path(config.out), average_of(done, results, config.seed))
    print(f"tables: {Path(config.out) / 'evaluation.md'}", flush=True)


def temperature(config: EvaluateConfig) -> float:
    """The temperature, or its default for the number of samples."""
    return config.temperature if config.temperature is not None else float(config.samples > 1)


def check(config: EvaluateConfig) -> None:
    """Raises click.UsageError for options that do not go together."""
    given = [name for name in ("model", "predictions", "baseline") if getattr(config, name) is not None]
    if len(given) != 1:
        raise click.UsageError("give either --model, --predictions or --baseline")
    if not config.puzzles:
        raise click.UsageError("Missing option '--puzzles'.")
    for name, needed in (("endpoint", "model"), ("base", "model"), ("train", "baseline"), ("tokenizer", "predictions")):
        if getattr(config, name) is not None and getattr(config, needed) is None:
            raise click.UsageError(f"--{name} goes with --{needed}; give that too, or leave it out")
    if config.endpoint and config.base:
        raise click.UsageError("--base is for an adapter folder, not for a model behind --endpoint: leave one out")
    if config.endpoint and ("@" in urlsplit(config.endpoint).netloc or urlsplit(config.endpoint).query):
        raise click.UsageError(
            "--endpoint holds a key or a password, which would be written down: use --key-env instead"
        )
    if config.model is None and (config.samples > 1 or config.resume):
        raise click.UsageError("--samples and --resume are for a --model; leave them out")
    for name in ("samples", "concurrency", "chunk", "max_response_tokens", "limit"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise click.UsageError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be 1 or more")
    if config.samples > 1 and config.temperature == 0:
        raise click.UsageError(
            "--samples above 1 with --temperature 0 gives the same answer again: raise --temperature"
        )
    stems = [Path(path).stem for path in config.puzzles]
    if len(set(stems)) < len(stems):
        raise click.UsageError(
            "two --puzzles files have the same name, and results go to OUT/<name>: evaluate them apart"
        )


def read_sets(config: EvaluateConfig) -> Sets:
    """The puzzles of each file, all of them."""
    return {Path(path).stem: read_puzzles(path) for path in config.puzzles}


def limited(puzzles: list[Puzzle], limit: int | None, file: str) -> list[Puzzle]:
    """The first `limit` puzzles; of single cells the whole batches among them, since a batch without one cannot be scored.

    Raises UserError for puzzles of several kinds, and for single cells that make up no whole batches.
    """
    first = puzzles[:limit]
    if variant_of_all(puzzles, file) != "cell":
        return first
    try:
        regroup([""] * len(puzzles), puzzles)
    except ValueError as error:
        raise UserError(f"--puzzles {file}: {error}") from None
    held = Counter(puzzle.meta["batch_id"] for puzzle in first)
    whole = [puzzle for puzzle in first if held[puzzle.meta["batch_id"]] == len(puzzle.candidates)]
    if not whole:
        raise UserError(
            f"--limit {limit}: the first {limit} cells of {file} hold no whole batch, the first of which has "
            f"{len(first[0].candidates)} cells: raise --limit"
        )
    return whole


def file_of(config: EvaluateConfig, stem: str) -> str:
    return next(path for path in config.puzzles if Path(path).stem == stem)


def settings(config: EvaluateConfig, puzzles: list[Puzzle]) -> dict:
    """What the answers depend on; no key is among it. puzzles: the whole file, so that --limit may grow."""
    asked = ("samples", "temperature", "top_p", "max_response_tokens", "seed")
    local = config.model is not None and config.endpoint is None
    names = {
        "model": ("model", "base", "dtype", "chunk", *asked) if local else ("model", "endpoint", *asked),
        "baseline": ("baseline", "train", "seed"),
        "predictions": ("predictions", "tokenizer"),
    }
    (kind,) = (kind for kind in names if getattr(config, kind) is not None)
    files = {"model_files": model_files(config)} if local else {}
    return {name: getattr(config, name) for name in names[kind]} | files | {"puzzles_digest": digest(puzzles)}


def name_of(config: EvaluateConfig) -> str:
    """What answered, for the tables; of a folder of saved predictions, what its metrics.json files call it, if all the same."""
    if config.baseline:
        return f"baseline {config.baseline}"
    if config.model:
        return config.model
    if Path(str(config.predictions)).is_file():
        return str(config.predictions)
    files = [predictions_file(config, "predictions", Path(path).stem) for path in config.puzzles]
    names = {str(read_result(file.with_name("metrics.json")).get("name") or config.predictions) for file in files}
    return names.pop() if len(names) == 1 else str(config.predictions)


Answers = Callable[[str, list[Puzzle], Partial], list[dict]]


def source(config: EvaluateConfig, sets: Sets, train: list[Puzzle] | None) -> tuple[Answers, Callable[[], None]]:
    """(rows of a set of puzzles, what to call at the end)."""
    if config.predictions:
        return functools.partial(saved, config), lambda: None
    if config.baseline:
        return functools.partial(baseline, config, train), lambda: None
    model = Remote(config) if config.endpoint else Local(config, sets)

    def answers(stem: str, puzzles: list[Puzzle], partial: Partial) -> list[dict]:
        if partial.path.is_file() and not config.resume:
            print(f"{partial.path}: an unfinished run, now replaced; --resume goes on with one", file=sys.stderr)
        model.resume(partial)
        chunk = len(puzzles) if config.endpoint else config.chunk  # an endpoint's answers are saved one by one
        return answer_all(puzzles, model.ask, partial, chunk=chunk, whole_chunks=not config.endpoint, name=stem)

    return answers, model.close


def saved(config: EvaluateConfig, stem: str, puzzles: list[Puzzle], partial: Partial) -> list[dict]:
    """Rows of saved predictions, in puzzle order."""
    path = predictions_file(config, "predictions", stem)
    rows = match_rows(read_predictions(path), puzzles, f"{path}: ")
    if config.tokenizer:
        from trainer.model.loading import load_tokenizer

        rows = count_tokens(rows, load_tokenizer(config.tokenizer))
    return [{"id": puzzle.id} | row for puzzle, row in zip(puzzles, rows, strict=True)]


def baseline(
    config: EvaluateConfig, train: list[Puzzle] | None, stem: str, puzzles: list[Puzzle], partial: Partial
) -> list[dict]:
    """Rows of a baseline; says how much of the puzzles it knows nothing of."""
    name = str(config.baseline)
    rows, unknown = baselines.answer(name, puzzles, config.seed, train)
    if unknown:
        print(
            f"{stem}: baseline {name} knows nothing of {len(unknown)} cell types, the first is {unknown[0]}; "
            + (
                "other training puzzles may hold them"
                if train
                else "it learns them from training puzzles: --train FILE"
            ),
            file=sys.stderr,
        )
    return rows


def predictions_file(config: EvaluateConfig, flag: str, stem: str) -> Path:
    """The file of predictions that --predictions or --compare names for a set of puzzles. Raises UserError if there is none."""
    given = Path(getattr(config, flag))
    if given.is_file():
        if len(config.puzzles) > 1:
            raise UserError(
                f"--{flag} {given}: one file answers one --puzzles file; name the --out folder of an evaluation"
            )
        return given
    inside = [given / stem / "predictions.jsonl", *([given / "predictions.jsonl"] if len(config.puzzles) == 1 else [])]
    found = next((path for path in inside if path.is_file()), None)
    if found is None:
        raise UserError(f"--{flag} {given}: no such file, and no folder with {inside[-1].relative_to(given)}")
    return found


def compared(config: EvaluateConfig, stem: str, puzzles: list[Puzzle]) -> tuple[str, list[dict]]:
    """(name, rows) of the model to compare with. Raises UserError unless it answered the same puzzles."""
    path = predictions_file(config, "compare", stem)
    rows, result = read_predictions(path), read_result(path.with_name("metrics.json"))
    theirs = (result.get("puzzles") or {}).get("digest")
    beyond = {row["id"] for row in rows if "id" in row} - {puzzle.id for puzzle in puzzles}
    if beyond or theirs not in (None, digest(puzzles)):
        raise UserError(
            f"--compare {path}: answers other puzzles than --puzzles {file_of(config, stem)}"
            f"{' --limit ' + str(config.limit) if config.limit else ''}; a paired comparison needs the same ones: evaluate both "
            "models on the same file with the same --limit"
        )
    return result.get("name") or str(config.compare), match_rows(rows, puzzles, f"--compare {path}: ")


if __name__ == "__main__":
    main()
