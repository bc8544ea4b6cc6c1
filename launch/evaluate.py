"""The paper's five metrics of a model, or of saved predictions, on a puzzle file.

python launch/evaluate.py --puzzles test.parquet --model runs/demo/sft/model --out eval/sft
python launch/evaluate.py --puzzles test.parquet --model runs/demo/grpo/checkpoints/step-000060 --out eval/grpo
python launch/evaluate.py --puzzles test.parquet --predictions answers.jsonl --out eval/mine
"""

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from data.puzzles import Puzzle, read_puzzles, read_rows
from eval.predict import predict, score_rows, write_evaluation
from launch.options import command, option


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    puzzles: tuple[str, ...] = option(
        (), "Puzzles, .parquet or .jsonl; repeat for several files (then OUT/<name> each)."
    )
    model: str | None = option(None, "Checkpoint folder, or an adapter folder (a GRPO checkpoint).")
    base: str | None = option(None, "Checkpoint under an adapter; default: the one the adapter names.")
    predictions: str | None = option(None, "Saved predictions (.jsonl with id, prediction) instead of a model.")
    out: str = option(dataclasses.MISSING, "Folder for metrics.json and predictions.jsonl.")
    max_response_tokens: int = option(3000, "Longest response.")
    limit: int | None = option(None, "Use only the first LIMIT puzzles of each file.")
    dtype: str = option("float32", "Weights and compute.", ("float32", "bfloat16"))


@command(EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    """Score a model (greedy, vLLM) or saved predictions; prints the metrics and writes them to --out."""
    if (config.model is None) == (config.predictions is None):
        raise click.UsageError("give either --model or --predictions")
    if not config.puzzles:
        raise click.UsageError("Missing option '--puzzles'.")
    if config.predictions and len(config.puzzles) > 1:
        raise click.UsageError("--predictions answers one --puzzles file")
    sets = {Path(path).stem: read_puzzles(path)[: config.limit] for path in config.puzzles}
    if config.predictions:
        answers = {name: read_rows(config.predictions) for name in sets}
    else:
        answers = generate(config, sets)
    for name, puzzles in sets.items():
        metrics = score_rows(answers[name], puzzles)
        folder = Path(config.out) if len(sets) == 1 else Path(config.out) / name
        write_evaluation(folder, answers[name], metrics)
        print(name, json.dumps(asdict(metrics)), flush=True)


def generate(config: EvaluateConfig, sets: dict[str, list[Puzzle]]) -> dict[str, list[dict]]:
    """Predictions per puzzle set from one engine."""
    from rollout.sync import Parcel
    from rollout.vllm_engine import VLLMEngine
    from trainer.loading import load_tokenizer
    from trainer.policy import encode_prompt
    from trainer.runfolder import read_adapter
    from trainer.world import join_world, leave_world

    folder, adapter = Path(str(config.model)), None
    if (folder / "adapter_config.json").is_file():
        adapter, adapter_config = read_adapter(folder)
        folder = Path(config.base or adapter_config["base_model_name_or_path"])
    tokenizer = load_tokenizer(str(folder))
    prompts = {name: [encode_prompt(tokenizer, p.chat()) for p in puzzles] for name, puzzles in sets.items()}
    longest = max(len(ids) for encoded in prompts.values() for ids in encoded)
    join_world()
    lora = {k: adapter_config[k] for k in ("r", "lora_alpha", "target_modules")} if adapter else None
    engine = VLLMEngine(str(folder), lora=lora, max_model_len=longest + config.max_response_tokens, dtype=config.dtype)
    if adapter:
        parcel = Parcel.of(adapter)
        engine.load_adapter(parcel, parcel.manifest(), version=1)
    limit = config.max_response_tokens
    answers = {name: predict(engine, tokenizer, puzzles, prompts[name], limit) for name, puzzles in sets.items()}
    engine.close()
    leave_world()
    return answers


if __name__ == "__main__":
    main()
