"""The paper's metrics of a model, of saved predictions or of a baseline on puzzle files, with intervals and breakdowns.

    python launch/evaluate.py --puzzles test.parquet --model runs/demo/sft/model --out eval/sft
    python launch/evaluate.py --puzzles test.parquet --out eval/grpo --compare eval/sft \\
        --model runs/demo/grpo/checkpoints/step-000050
    python launch/evaluate.py --puzzles test.parquet --out eval/gpt-4o --samples 8 \\
        --model gpt-4o --endpoint https://api.openai.com/v1
    python launch/evaluate.py --puzzles test.parquet --out eval/vote --samples 8 --consensus \\
        --model runs/demo/sft/model
    python launch/evaluate.py --puzzles test.parquet --predictions answers.jsonl --out eval/mine
    python launch/evaluate.py --puzzles test.parquet --baseline nearest --train train.parquet --out eval/nearest
"""

import functools
import json
import sys
from pathlib import Path

from data.puzzles import read_puzzles
from data.status.status import Report, reporting
from eval import baselines
from eval.evaluation import average_of, evaluation_of, write_average, write_evaluation
from eval.metrics import METRICS
from eval.predict import Partial, ask_engine
from eval.reasons import console_lines, verdict
from eval.settings import EvaluateConfig, settings_of
from eval.similarity import LabelEncoder
from eval.sources import Loaded, PuzzleSet, limit_note, name_of, open_source, read_sets, rows_to_compare
from launch.options import command
from rollout import Sampling


@command(EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    """Score a model (vLLM or an endpoint), saved predictions or a baseline; print and write the metrics."""
    with reporting(config.out, config.notify, "puzzle") as report:
        evaluate(config, report)


def evaluate(config: EvaluateConfig, report: Report) -> None:
    """Evaluate every file of puzzles; the report is told of the answers."""
    sets = read_sets(config)
    train = read_puzzles(config.train) if config.train else None
    encoder = LabelEncoder(config.medcpt) if config.medcpt else None
    others = {puzzle_set.name: rows_to_compare(config, puzzle_set) for puzzle_set in sets} if config.compare else {}
    name, out = name_of(config), Path(config.out)
    load = functools.partial(load_model, config, sets)
    source = open_source(config, train=train, tokenizer=tokenizer_of(config), load=load)
    model_files = fingerprint_of(config)
    answered, results = {}, {}
    before, total = 0, sum(len(puzzle_set.puzzles) for puzzle_set in sets)
    folders = [out if len(sets) == 1 else out / puzzle_set.name for puzzle_set in sets]
    partials = []
    for puzzle_set, folder in zip(sets, folders, strict=True):  # all of them before a model is asked anything
        settings = settings_of(config, puzzle_set.whole, model_files)
        wanted = {puzzle.id for puzzle in puzzle_set.puzzles}
        partials.append(Partial(folder, settings, config.resume, wanted=wanted))
    for puzzle_set, folder, partial in zip(sets, folders, partials, strict=True):
        partial.tell = lambda done, _, before=before: report.progress(before + done, total)
        rows = source.rows(puzzle_set, partial)
        before += len(puzzle_set.puzzles)
        result = evaluation_of(
            rows,
            puzzle_set.puzzles,
            name=name,
            run=partial.settings,
            file=puzzle_set.file,
            seed=config.seed,
            confident_from=config.confident_from,
            encoder=encoder,
            other=others.get(puzzle_set.name),
            notes=[*limit_note(puzzle_set), *baselines.cautions(config.baseline, puzzle_set.puzzles, train)],
        )
        for note in result.get("notes", ()):
            print(f"{puzzle_set.name}: {note}", file=sys.stderr)
        write_evaluation(folder, rows, result, f"{name} on {puzzle_set.name}")
        partial.remove()
        say(f"{puzzle_set.name} {json.dumps({key: result[key] for key in (*METRICS, 'n_puzzles')})}")
        for line in console_lines(result):
            say(f"{puzzle_set.name}: {line}" if not line.startswith(" ") else line)
        answered[puzzle_set.name], results[puzzle_set.name] = (rows, puzzle_set.puzzles), result
    source.close()
    if len(sets) > 1:
        write_average(out, average_of(answered, results, config.seed))
    say(f"tables: {out / 'evaluation.md'}")
    for file, result in results.items():
        if said := verdict(result):  # the last lines, so that an accuracy of 0 is not left unexplained
            say(f"{file}: {said}")


def say(line: str) -> None:
    """Print a line that may hold text of a model, also where the terminal's encoding lacks a character of it."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding), flush=True)


def fingerprint_of(config: EvaluateConfig) -> str | None:
    """What changes when the files of a local model are replaced; None where no local model answers."""
    if config.model is None or config.endpoint is not None:
        return None
    from trainer.model.opening import files_fingerprint

    return files_fingerprint(config.model, config.base)


def tokenizer_of(config: EvaluateConfig):
    """The tokenizer of --tokenizer; None without it."""
    if config.tokenizer is None:
        return None
    from trainer.model.loading import load_tokenizer

    return load_tokenizer(config.tokenizer)


def load_model(config: EvaluateConfig, sets: list[PuzzleSet]) -> Loaded:
    """Load the checkpoint, or an adapter on one, into vLLM with room for the longest prompt and response."""
    from trainer.model.opening import open_checkpoint
    from trainer.model.serving import start_engine
    from trainer.ranks.world import leave_world

    opened = open_checkpoint(str(config.model), config.base)
    for note in opened.chat.notes:
        print(f"note: {note}", file=sys.stderr)
    longest = max(len(opened.chat.prompt_ids(puzzle.chat())) for puzzle_set in sets for puzzle in puzzle_set.puzzles)
    engine = start_engine(
        opened,
        longest=longest + config.max_response_tokens,
        dtype=config.dtype,
        memory_fraction=config.memory_fraction,
        sequences=min(config.chunk, max(len(puzzle_set.puzzles) for puzzle_set in sets)) * config.samples,
        eager=config.eager,
    )
    sampling = Sampling(
        n=config.samples,
        max_tokens=config.max_response_tokens,
        temperature=config.used_temperature,
        top_p=config.top_p,
        seed=config.seed,
        stop_ids=opened.chat.stop_ids,
    )

    def close() -> None:
        engine.close()
        leave_world()

    return ask_engine(engine, opened.chat, sampling, config.asks_greedily), close


if __name__ == "__main__":
    main()
