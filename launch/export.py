"""A trained model as others load it: merged into one Hugging Face checkpoint, or the adapter alone in PEFT's format.

python launch/export.py --model runs/grpo/checkpoints/step-000100 --out cell-reasoner --metrics eval/metrics.json
python launch/export.py --model runs/grpo/checkpoints/step-000100 --out cell-reasoner-lora --adapter-only
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from data.errors import UserError
from data.files import reason_of
from launch.options import command, option
from trainer.record.runfolder import ADAPTER, DATA, MAGNITUDE, provenance, read_adapter

WEIGHT_FILES = (".safetensors", ".bin", ".pt")
TOKENIZER = ("token", "chat_", "vocab", "merges", "special")
"""How the names of a tokenizer's files begin."""
METRICS = {
    "cell_accuracy": "cell accuracy (mean over batches)",
    "batch_accuracy": "batch accuracy",
    "format_validity": "format validity",
    "uniqueness": "uniqueness",
    "response_length": "response length (tokens)",
}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is exported, and how."""

    model: str = option(dataclasses.MISSING, "Checkpoint of a run (adapter or weights), or any checkpoint folder.")
    out: str = option(dataclasses.MISSING, "Folder to write; must not exist.")
    base: str | None = option(None, "Checkpoint under an adapter; default: the one the adapter names.")
    dtype: str = option(
        "bfloat16", "Of the weights on disk; the merge is made in float32.", ("bfloat16", "float16", "float32")
    )
    adapter_only: bool = option(False, "Write the adapter in PEFT's format instead of merged weights.")
    metrics: tuple[str, ...] = option((), "metrics.json of an evaluation, for the model card; repeatable.")


@command(ExportConfig)
def main(config: ExportConfig) -> None:
    """Write a model that transformers and vLLM load, with a model card."""
    folder, out = Path(config.model), Path(config.out)
    if out.exists():
        raise UserError(f"--out {out}: exists already; name another folder")
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        raise UserError(f"--model {folder}: neither a checkpoint (config.json) nor an adapter (adapter_config.json)")
    if config.base and not is_adapter:
        raise UserError(
            f"--base {config.base}: {folder} holds whole weights, which lie over no base; leave the option out"
        )
    if config.adapter_only and not is_adapter:
        raise UserError(f"--adapter-only: {folder} holds whole weights, no adapter; leave the flag out")
    run = run_of(folder)
    adapter, adapter_config = read_adapter(folder, for_vllm=False) if is_adapter else (None, None)
    base = Path(config.base or (adapter_config or {}).get("base_model_name_or_path") or folder)
    if not (base / "config.json").is_file():
        raise UserError(f"{folder}: its base {base} is no checkpoint folder; name it with --base")
    card = model_card(config, base, adapter_config, run, [read_metrics(path) for path in config.metrics])
    from trainer.model.merge import write_checkpoint  # the model's libraries take seconds to load: not for a refusal

    try:
        if config.adapter_only:
            write_adapter(out, base, adapter, adapter_config, card)
        else:
            settings = run.get("settings", {})
            base_dtype = getattr(torch, settings["dtype"]) if is_adapter and "dtype" in settings else None
            write_checkpoint(
                base,
                out,
                getattr(torch, config.dtype),
                adapter=adapter,
                config=adapter_config,
                base_dtype=base_dtype,
                quantize=settings.get("quantize", "none") if is_adapter else "none",
                extra={"README.md": card},
            )
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({reason_of(error)}); make room, or name another folder"
        ) from None
    print(f"wrote {out} ({'adapter' if config.adapter_only else config.dtype})")


def run_of(folder: Path) -> dict[str, Any]:
    """config.json of the run a checkpoint is part of (settings, versions, git commit); empty where it is none."""
    for place in (folder.parent, folder.parent.parent):
        if (place / "config.json").is_file():
            found = json.loads((place / "config.json").read_text(encoding="utf-8"))
            if "settings" in found:
                return found
    return {}


def read_metrics(path: str) -> dict[str, Any]:
    """A metrics.json, with its name. Raises UserError when it is none."""
    file = Path(path) / "metrics.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"--metrics {path}: no such file; write one with launch/evaluate.py")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--metrics {path}: not JSON ({error}); write it again with launch/evaluate.py") from None
    if "batch_accuracy" not in found:
        raise UserError(f"--metrics {path}: is no metrics.json of launch/evaluate.py (it lacks batch_accuracy)")
    return {"name": file.parent.name, **found}


def write_adapter(out: Path, base: Path, adapter: dict, adapter_config: dict[str, Any], card: str) -> None:
    """The adapter as PEFT reads it, with tokenizer, chat template and card; whole or not at all."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        # PEFT calls DoRA's magnitudes so
        tensors = {name.replace(f"{MAGNITUDE}.weight", MAGNITUDE): t.contiguous() for name, t in adapter.items()}
        (partial / ADAPTER).write_bytes(save(tensors, {"format": "pt"}))
        settings = {"bias": "none", "inference_mode": True, **adapter_config}
        (partial / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        for path in sorted(base.iterdir()):
            if path.is_file() and path.name.startswith(TOKENIZER) and path.suffix not in WEIGHT_FILES:
                shutil.copy(path, partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def model_card(
    config: ExportConfig, base: Path, adapter: dict[str, Any] | None, run: dict[str, Any], metrics: list[dict[str, Any]]
) -> str:
    """Markdown: what it is, how it was trained, on what data, how good. Folders are named without their place."""
    name, settings = Path(config.out).name, run.get("settings", {})
    front = ["---", "library_name: " + ("peft" if config.adapter_only else "transformers"), "tags:"]
    front += ["- biology", "- single-cell", "- cell-type-annotation", "- grpo", f"base_model: {base.name}", "---"]
    what = "an adapter (PEFT)" if config.adapter_only else f"merged in float32, saved in {config.dtype}"
    text = [
        *front,
        "",
        f"# {name}",
        "",
        f"A cell type reasoner for CellPuzzles (Cell-o1, arXiv:2506.02911): {what}; base: `{base.name}`.",
        "",
        "It reads a batch of cells of one donor as ranked gene lists with a list of candidate labels, reasons between",
        "`<think>` and `</think>`, and answers between `<answer>` and `</answer>`, one label per cell joined by ` | `.",
        "Prompt: the system and user message of `data/prompts.py`, through the tokenizer's chat template.",
        "",
    ]
    text += ["## How good", "", *metric_table(metrics), ""]
    text += ["## Recipe", "", *recipe_table(settings, adapter), ""]
    text += ["## Data", "", *data_table(settings, run.get("data", {})), ""]
    versions = ", ".join(f"{k} {v}" for k, v in (run or provenance()).get("versions", {}).items())
    commit = run.get("git_commit", "unknown")
    text += ["## Made with", "", f"Code: commit {commit}. Versions: {versions}.", ""]
    text += ["Not a medical device. Labels are as good as the annotation of the cells that it was trained on.", ""]
    return "\n".join(text)


def metric_table(metrics: list[dict[str, Any]]) -> list[str]:
    if not metrics:
        return ["Not evaluated yet: `python launch/evaluate.py --model ... --puzzles ...`."]
    rows = ["| metric | " + " | ".join(str(m["name"]) for m in metrics) + " |", "|---|" + "---|" * len(metrics)]
    for key, label in METRICS.items():
        values = [f"{m[key]:.4g}" if isinstance(m.get(key), int | float) else "-" for m in metrics]
        rows.append(f"| {label} | " + " | ".join(values) + " |")
    return rows


def recipe_table(settings: dict[str, Any], adapter: dict[str, Any] | None) -> list[str]:
    if not settings:
        return ["Not known: the checkpoint is not in a run's folder."]
    shown = {key: value for key, value in settings.items() if value not in (None, (), [], "") and key != "out"}
    shown |= {
        f"adapter {key}": value for key, value in (adapter or {}).items() if key in ("r", "lora_alpha", "use_dora")
    }
    return [
        "| setting | value |",
        "|---|---|",
        *(f"| {key} | {without_place(value)} |" for key, value in shown.items()),
    ]


def without_place(value: Any) -> str:
    """A setting as text; of an absolute path its last part alone."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)


def data_table(settings: dict[str, Any], hashes: dict[str, str]) -> list[str]:
    """Name and SHA-256, as it was when the run began, of every file the run trained on."""
    named = {key: Path(settings[key]).name for key in DATA if settings.get(key)}
    rows = [f"| {key} | {name} | {hashes.get(key, 'not recorded')} |" for key, name in named.items()]
    return ["| what | file | SHA-256 |", "|---|---|---|", *rows] if rows else ["Not known."]


if __name__ == "__main__":
    main()
