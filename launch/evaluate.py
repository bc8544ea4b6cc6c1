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
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import click

from data.errors import RunError
from data.puzzles import Puzzle, read_puzzles, read_rows
from eval import baselines
from eval.metrics import METRICS, match_rows
from eval.predict import (
    Answered,
    Ask,
    Partial,
    answer_all,
    ask_engine,
    ask_teacher,
    average_of,
    count_tokens,
    digest,
    evaluate,
    variant_of_all,
    write_average,
    write_evaluation,
)
from eval.similarity import LabelEncoder
from launch.options import command, option
from rollout import Sampling

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
    predictions: str | None = option(
        None,
        "Saved predictions instead of a model: a .jsonl with id, prediction, or the --out folder of an evaluation.",
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
    limit: int | None = option(None, "Use only the first LIMIT puzzles of each file.")
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
    sets = {stem: puzzles[: config.limit] for stem, puzzles in whole.items()}
    for stem, puzzles in sets.items():
        variant_of_all(puzzles, file_of(config, stem))
    encoder = LabelEncoder(config.medcpt) if config.medcpt else None
    others = {stem: compared(config, stem, puzzles) for stem, puzzles in sets.items()} if config.compare else {}
    name = name_of(config)
    answers, close = source(config, sets)
    done, results = {}, {}
    for stem, puzzles in sets.items():
        folder = Path(config.out) if len(sets) == 1 else Path(config.out) / stem
        partial = Partial(folder, settings(config, whole[stem]), config.resume)
        rows = answers(stem, puzzles, partial)
        result = evaluate(
            rows, puzzles, name=name, run=partial.settings, file=file_of(config, stem), seed=config.seed, encoder=encoder,
            other=others.get(stem),
        )  # fmt: skip
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


def file_of(config: EvaluateConfig, stem: str) -> str:
    return next(path for path in config.puzzles if Path(path).stem == stem)


def settings(config: EvaluateConfig, puzzles: list[Puzzle]) -> dict:
    """What the answers depend on; no key is among it. puzzles: the whole file, so that --limit may grow."""
    asked = ("samples", "temperature", "top_p", "max_response_tokens", "seed")
    names = {
        "model": ("model", "endpoint", *asked) if config.endpoint else ("model", "base", "dtype", "chunk", *asked),
        "baseline": ("baseline", "train", "seed"), "predictions": ("predictions", "tokenizer"),
    }  # fmt: skip
    (kind,) = (kind for kind in names if getattr(config, kind) is not None)
    return {name: getattr(config, name) for name in names[kind]} | {"puzzles_digest": digest(puzzles)}


def name_of(config: EvaluateConfig) -> str:
    """What answered, for the tables; of a folder of saved predictions, what its metrics.json calls it."""
    if config.baseline:
        return f"baseline {config.baseline}"
    if config.model:
        return config.model
    files = sorted(Path(str(config.predictions)).glob("metrics.json")) or sorted(
        Path(str(config.predictions)).glob("*/metrics.json")
    )
    evaluated = json.loads(files[0].read_text(encoding="utf-8")) if files else {}
    return evaluated.get("name") or str(config.predictions)


Answers = Callable[[str, list[Puzzle], Partial], list[dict]]


def source(config: EvaluateConfig, sets: Sets) -> tuple[Answers, Callable[[], None]]:
    """(rows of a set of puzzles, what to call at the end)."""
    if config.predictions:
        return functools.partial(saved, config), lambda: None
    if config.baseline:
        return functools.partial(baseline, config, sets), lambda: None
    model = Remote(config) if config.endpoint else Local(config, sets)

    def answers(stem: str, puzzles: list[Puzzle], partial: Partial) -> list[dict]:
        if partial.path.is_file() and not config.resume:
            print(f"{partial.path}: an unfinished run, now replaced; --resume goes on with one", file=sys.stderr)
        chunk = len(puzzles) if config.endpoint else config.chunk  # an endpoint's answers are saved one by one
        return answer_all(puzzles, model.ask, partial, chunk=chunk, whole_chunks=not config.endpoint, name=stem)

    return answers, model.close


def saved(config: EvaluateConfig, stem: str, puzzles: list[Puzzle], partial: Partial) -> list[dict]:
    """Rows of saved predictions, in puzzle order."""
    path = predictions_file(config, "predictions", stem)
    rows = match_rows(read_rows(path), puzzles, f"{path}: ")
    if config.tokenizer:
        from trainer.loading import load_tokenizer

        rows = count_tokens(rows, load_tokenizer(config.tokenizer))
    return [{"id": puzzle.id} | row for puzzle, row in zip(puzzles, rows, strict=True)]


def baseline(config: EvaluateConfig, sets: Sets, stem: str, puzzles: list[Puzzle], partial: Partial) -> list[dict]:
    """Rows of a baseline; says how much of the puzzles it knows nothing of."""
    name, train = str(config.baseline), read_puzzles(config.train) if config.train else None
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
    """The file of predictions that --predictions or --compare names for a set of puzzles. Raises ValueError if there is none."""
    given = Path(getattr(config, flag))
    if given.is_file():
        if len(config.puzzles) > 1:
            raise ValueError(
                f"--{flag} {given}: one file answers one --puzzles file; name the --out folder of an evaluation"
            )
        return given
    inside = [given / stem / "predictions.jsonl", *([given / "predictions.jsonl"] if len(config.puzzles) == 1 else [])]
    found = next((path for path in inside if path.is_file()), None)
    if found is None:
        raise ValueError(f"--{flag} {given}: no such file, and no folder with {inside[-1].relative_to(given)}")
    return found


def compared(config: EvaluateConfig, stem: str, puzzles: list[Puzzle]) -> tuple[str, list[dict]]:
    """(name, rows) of the model to compare with. Raises ValueError unless it answered the same puzzles."""
    path = predictions_file(config, "compare", stem)
    rows = read_rows(path)
    evaluated = path.with_name("metrics.json")
    result = json.loads(evaluated.read_text(encoding="utf-8")) if evaluated.is_file() else {}
    theirs = result.get("puzzles", {}).get("digest")
    beyond = {row["id"] for row in rows if "id" in row} - {puzzle.id for puzzle in puzzles}
    if beyond or theirs not in (None, digest(puzzles)):
        raise ValueError(
            f"--compare {path}: answers other puzzles than --puzzles {file_of(config, stem)}"
            f"{' --limit ' + str(config.limit) if config.limit else ''}; a paired comparison needs the same ones: evaluate both "
            "models on the same file with the same --limit"
        )
    return result.get("name") or str(config.compare), match_rows(rows, puzzles, f"--compare {path}: ")


class Remote:
    """A model behind an OpenAI-compatible endpoint. The key stays with the client."""

    def __init__(self, config: EvaluateConfig) -> None:
        from data.meter import Meter
        from rollout.teachers import Endpoint, OpenAITeacher, is_loopback

        key = os.environ.get(config.key_env, "")
        if not key and not is_loopback(str(config.endpoint)):
            raise click.UsageError(
                f"the environment variable {config.key_env} holds no key for --endpoint: set it, or name another with --key-env"
            )
        endpoint = Endpoint(
            model=str(config.model), base_url=str(config.endpoint), key=key or "EMPTY",
            temperature=float(config.temperature or 0.0), top_p=config.top_p if config.top_p < 1 else None,
            max_response_tokens=config.max_response_tokens, seed=config.seed, concurrency=config.concurrency,
        )  # fmt: skip
        self.teacher = OpenAITeacher(endpoint, Meter(), lambda row: None, functools.partial(print, file=sys.stderr))
        self.asking = ask_teacher(self.teacher, config.samples)

    def ask(self, puzzles: list[Puzzle], first: int) -> Iterator[Answered]:
        """See eval.predict. Raises RunError in the words of this command's options."""
        try:
            yield from self.asking(puzzles, first)
        except RunError as error:
            raise RunError(str(error).replace("--base-url", "--endpoint")) from None

    def close(self) -> None:
        self.teacher.close()


class Local:
    """A checkpoint, or an adapter on one, in vLLM in this process; loaded when the first puzzle is asked."""

    def __init__(self, config: EvaluateConfig, sets: Sets) -> None:
        self.config, self.sets = config, sets
        self.asking: Ask | None = None
        self.engine = None

    def ask(self, puzzles: list[Puzzle], first: int) -> Iterable[Answered]:
        """See eval.predict."""
        if self.asking is None:
            self.asking = self._load()
        return self.asking(puzzles, first)

    def _load(self) -> Ask:
        from rollout.sync import Parcel
        from rollout.vllm_engine import VLLMEngine
        from trainer.loading import load_tokenizer
        from trainer.policy import encode_prompt
        from trainer.runfolder import read_adapter
        from trainer.world import join_world

        config = self.config
        folder, adapter, lora = Path(str(config.model)), None, None
        if (folder / "adapter_config.json").is_file():
            adapter, adapter_config = read_adapter(folder)
            folder = Path(config.base or adapter_config["base_model_name_or_path"])
            lora = {key: adapter_config[key] for key in ("r", "lora_alpha", "target_modules")}
        tokenizer = load_tokenizer(str(folder))

        def encode(puzzle: Puzzle) -> list[int]:
            return encode_prompt(tokenizer, puzzle.chat())

        longest = max(len(encode(puzzle)) for puzzles in self.sets.values() for puzzle in puzzles)
        join_world()
        self.engine = VLLMEngine(
            str(folder), lora=lora, max_model_len=longest + config.max_response_tokens, dtype=config.dtype,
            memory_fraction=config.memory_fraction,
        )  # fmt: skip
        if adapter:
            parcel = Parcel.of(adapter)
            self.engine.load_adapter(parcel, parcel.manifest(), version=1)
        sampling = Sampling(
            n=config.samples, max_tokens=config.max_response_tokens, temperature=float(config.temperature or 0.0),
            top_p=config.top_p, seed=config.seed,
        )  # fmt: skip
        return ask_engine(self.engine, tokenizer, encode, sampling)

    def close(self) -> None:
        """Stop the engine, where one was started."""
        from trainer.world import leave_world

        if self.engine is not None:
            self.engine.close()
            leave_world()


if __name__ == "__main__":
    main()
