"""A trained model as others load it: merged into one Hugging Face checkpoint, or the adapter alone in PEFT's format.

python launch/export.py --model runs/grpo/checkpoints/step-000100 --out cell-reasoner --metrics eval/metrics.json
python launch/export.py --model runs/grpo/checkpoints/step-000100 --out cell-reasoner-lora --adapter-only
"""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import parse_json, reason_of
from launch.options import command, option
from trainer.model.opening import is_adapter, open_checkpoint


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    model: str = option(MISSING, "Checkpoint of a run (adapter or weights), or any checkpoint folder.")
    out: str = option(MISSING, "Folder to write; must not exist.")
    base: str | None = option(None, "Checkpoint under an adapter; default: the one that the adapter names.")
    dtype: str = option(
        "bfloat16",
        "Of the weights on disk; the merge is computed in float32.",
        ("bfloat16", "float16", "float32"),
    )
    adapter_only: bool = option(False, "Write the adapter in PEFT's format instead of merged weights.")
    metrics: tuple[str, ...] = option((), "metrics.json of an evaluation, for the model card; repeatable.")
    labels: str | None = option(None, "labels.json of the training puzzles; default: beside the run's puzzles.")


@command(ExportConfig)
def main(config: ExportConfig) -> None:
    """Write a model that transformers and vLLM load, with a model card."""
    folder, out = Path(config.model), Path(config.out)
    if out.exists():
        raise UserError(f"--out {out}: exists already; name another folder")
    if not is_adapter(folder):
        refuse_without_adapter(config)
    opened = open_checkpoint(folder, config.base, served=False)
    if not (opened.base / "config.json").is_file():
        raise UserError(f"{folder}: its base {opened.base} is no checkpoint folder; name it with --base")
    metrics = [read_metrics(path) for path in config.metrics]

    from trainer.model.export import export_model  # transformers takes seconds to load: not before a refusal

    chosen = {"dtype": config.dtype, "adapter_only": config.adapter_only, "labels": config.labels}
    try:
        export_model(opened, out, **chosen, metrics=metrics)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({reason_of(error)}); make room, or name another folder"
        ) from None
    print(f"wrote {out} ({'adapter' if config.adapter_only else config.dtype})")


def refuse_without_adapter(config: ExportConfig) -> None:
    """Raises UserError when the folder holds no checkpoint either, or an option needs an adapter."""
    if not (Path(config.model) / "config.json").is_file():
        raise UserError(
            f"--model {config.model}: neither a checkpoint (config.json) nor an adapter (adapter_config.json)"
        )
    if config.base:
        raise UserError(
            f"--base {config.base}: {config.model} holds whole weights, which lie over no base; leave the option out"
        )
    if config.adapter_only:
        raise UserError(f"--adapter-only: {config.model} holds whole weights, no adapter; leave the flag out")


def read_metrics(path: str) -> dict[str, Any]:
    """A metrics.json, or the one in a folder, with the folder's name. Raises UserError when it is no such file."""
    file = Path(path) / "metrics.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"--metrics {path}: no such file; write one with launch/evaluate.py")
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--metrics {path}: not JSON ({error}); write it again with launch/evaluate.py") from None
    if not isinstance(found, dict) or "batch_accuracy" not in found:
        raise UserError(f"--metrics {path}: is no metrics.json of launch/evaluate.py (it lacks batch_accuracy)")
    return {**found, "name": file.parent.name}


if __name__ == "__main__":
    main()
