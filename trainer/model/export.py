"""Export a trained model: merged into one Hugging Face checkpoint, or the adapter alone, with a model card."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from data.clusters.known import cell_types_file
from data.errors import UserError
from data.files import read_settings, remove_folder
from data.processes import provenance
from trainer.model.merge import write_checkpoint
from trainer.model.opening import ADAPTER_CONFIG, OpenedModel, changes_base, run_of
from trainer.record.runfolder import ADAPTER, DATA, MAGNITUDE

WEIGHT_FILES = (".safetensors", ".bin", ".pt")
TOKENIZER = ("token", "chat_", "vocab", "merges", "special")
"""Beginnings of the names of a tokenizer's files."""
METRICS = {
    "cell_accuracy": "cell accuracy (mean over batches)",
    "batch_accuracy": "batch accuracy",
    "format_validity": "format validity",
    "uniqueness": "uniqueness",
    "response_length": "response length",
}
"""{key of metrics.json: what the card calls it}"""


def export_model(
    opened: OpenedModel,
    out: Path,
    *,
    dtype: str,
    adapter_only: bool,
    metrics: list[dict[str, Any]],
    labels: str | None = None,
) -> None:
    """Write the model to a new folder, whole or not at all.

    dtype: of the merged weights on disk; the merge itself is computed in float32. adapter_only: write the adapter in
    PEFT's format instead. metrics: for the card, the content of metrics.json files with a "name" each. labels: the
    labels.json of the training puzzles, if it is not the one that the run names; it becomes cell_types.json. Raises
    UserError when the adapter does not fit its base, and OSError when the folder cannot be written.
    """
    run = run_of(opened.folder)
    how = "" if opened.adapter is None else "merged in float32, "
    what = "an adapter (PEFT)" if adapter_only else f"{how}saved in {dtype}"
    library = "peft" if adapter_only else "transformers"
    card = model_card(out.name, what, library, opened, run, metrics)
    files = {"README.md": card, **cell_types_file(labels, opened.folder, opened.base)}
    if adapter_only:
        write_adapter(out, opened, files)
        return
    if opened.settings and changes_base(opened.settings):
        start = json.dumps(opened.settings["init_lora_weights"])
        raise UserError(
            f"{opened.folder}: the adapter was begun with init_lora_weights {start}, which takes a part out of the base's "
            "weights first: it cannot be merged here; merge it with PEFT (merge_and_unload)"
        )
    # the base as it was held in training: its dtype there, and through 4 bits where it was quantised
    # a checkpoint of trained weights has no base below it, so it is only converted
    settings = run.get("settings", {}) if opened.adapter is not None else {}
    write_checkpoint(
        opened.base,
        out,
        getattr(torch, dtype),
        adapter=opened.adapter,
        config=opened.settings,
        base_dtype=getattr(torch, settings["dtype"]) if "dtype" in settings else None,  # None: as in the file
        quantize=settings.get("quantize", "none"),
        extra=files | {"generation_config.json": generation_settings(opened)},
    )


def generation_settings(opened: OpenedModel) -> str:
    """The base's generation_config.json with every token at which our samplers end a response.

    Another server knows this file alone: without the template's end of turn it would let responses run to the limit.
    """
    path = opened.base / "generation_config.json"
    if path.is_file():
        settings = read_settings(path)
    else:
        shape = read_settings(opened.base / "config.json")
        settings = {key: shape[key] for key in ("bos_token_id", "pad_token_id") if key in shape}
    ends = [opened.chat.turn_end, *(token for token in opened.chat.stop_ids if token != opened.chat.turn_end)]
    settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return json.dumps(settings, indent=2) + "\n"


def write_adapter(out: Path, opened: OpenedModel, files: dict[str, str]) -> None:
    """Write the adapter as PEFT reads it, with tokenizer and chat template. files: {file name: text} of more files."""
    partial = out.with_name(out.name + ".partial")
    remove_folder(partial)
    try:
        partial.mkdir(parents=True)
        # in PEFT's files DoRA's magnitudes have no ".weight" at the end
        tensors = {
            name.replace(f"{MAGNITUDE}.weight", MAGNITUDE): tensor.contiguous()
            for name, tensor in opened.adapter.items()
        }
        # written by Python: on a full disk that raises OSError, where safetensors' save_file has an error of its own
        (partial / ADAPTER).write_bytes(save(tensors, {"format": "pt"}))
        # what our checkpoints do not record, and what the adapter's own file says wins
        settings = {"bias": "none", "inference_mode": True, **opened.settings}
        (partial / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        for path in sorted(opened.base.iterdir()):
            if path.is_file() and path.name.startswith(TOKENIZER) and path.suffix not in WEIGHT_FILES:
                shutil.copy(path, partial)
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")
        partial.rename(out)  # last: OUT is there with all its files, or not at all
    finally:
        remove_folder(partial)  # nothing is left of it after the rename


def model_card(
    name: str, what: str, library: str, opened: OpenedModel, run: dict[str, Any], metrics: list[dict[str, Any]]
) -> str:
    """The card as Markdown: what the model is, how good it is, how it was trained and on what data.

    what: the format of the weights, in words. library: that loads them. Absolute paths are cut down to their last part.
    """
    settings = run.get("settings", {})
    # whole weights of a run began from its --model; they lie over no base
    began_from = opened.base.resolve().name if opened.adapter is not None else Path(str(settings.get("model", ""))).name
    front = ["---", f"library_name: {library}", "tags:"]
    front += [
        "- biology",
        "- single-cell",
        "- cell-type-annotation",
        "- grpo",
        *([f"base_model: {began_from}"] if began_from else []),
        "---",
    ]
    text = [
        *front,
        "",
        f"# {name}",
        "",
        f"A cell type reasoner for CellPuzzles (Cell-o1, arXiv:2506.02911): {what}"
        + (f"; base: `{began_from}`." if began_from else "."),
        "",
        "It reads a batch of cells of one donor as ranked gene lists with a list of candidate labels, reasons between",
        "`<think>` and `</think>`, and answers between `<answer>` and `</answer>`, one label per cell joined by ` | `.",
        "Prompt: the system and user message of `data/prompts.py`, through the tokenizer's chat template.",
        *how_asked(opened, settings.get("date", "")),
        "",
    ]
    text += ["## How good", "", *metrics_lines(metrics), ""]
    text += ["## Recipe", "", *recipe_lines(settings, opened.settings), ""]
    text += ["## Data", "", *data_lines(settings, run.get("data", {})), ""]
    # of the run that trained it; of this program only where no run is known
    versions = ", ".join(f"{k} {v}" for k, v in (run or provenance()).get("versions", {}).items())
    commit = run.get("git_commit", "unknown")
    text += ["## Made with", "", f"Code: commit {commit}. Versions: {versions}.", ""]
    text += ["Not a medical device. Labels are as good as the annotation of the cells that it was trained on.", ""]
    return "\n".join(text)


def how_asked(opened: OpenedModel, date: str) -> list[str]:
    """Lines on what is unusual in its prompts: a server that leaves it out asks otherwise. date: that training showed, or ""."""
    try:
        found = [*opened.chat.notes]
        if date and opened.chat.shows_date():
            found.append(f"the chat template shows the date, which was {date} in training")
    except UserError:  # an adapter is exported without a look at its base's template
        found = ["its chat template cannot be used as it is: launch/check_model.py says why"]
    return ["", "Of its prompts and answers:", "", *(f"- {one}" for one in found)] if found else []


def metrics_lines(metrics: list[dict[str, Any]]) -> list[str]:
    """Lines of a table with a column per evaluation."""
    if not metrics:
        return ["Not evaluated yet: `python launch/evaluate.py --model ... --puzzles ...`."]
    heads = [f"{m['name']}{_puzzles_of(m)}" for m in metrics]
    rows = ["| metric | " + " | ".join(heads) + " |", "|---|" + "---|" * len(metrics)]
    for key, label in METRICS.items():
        values = [f"{m[key]:.4g}" if isinstance(m.get(key), int | float) else "-" for m in metrics]
        if key == "response_length":
            values = [f"{v} {m.get('response_length_unit', 'tokens')}" for v, m in zip(values, metrics, strict=True)]
        rows.append(f"| {label} | " + " | ".join(values) + " |")
    return rows


def _puzzles_of(metrics: dict[str, Any]) -> str:
    """Number and file of the puzzles of an evaluation, as far as it states them; a name alone could be any split's."""
    n, file = metrics.get("n_puzzles"), (metrics.get("puzzles") or {}).get("file")
    return (f": {n:,} puzzles" + f" of {file}" * bool(file)) if isinstance(n, int) else ""


def recipe_lines(settings: dict[str, Any], adapter: dict[str, Any] | None) -> list[str]:
    """Lines of a table with the settings of the run, and the adapter's."""
    if not settings:
        return ["Not known: the checkpoint is not in a run's folder."]
    # out: a folder on the machine that trained it says nothing about the model
    # notify: it may hold an address or a key
    shown = {
        k: value for k, value in settings.items() if value not in (None, (), [], "") and k not in ("out", "notify")
    }
    shown |= {
        f"adapter {key}": value for key, value in (adapter or {}).items() if key in ("r", "lora_alpha", "use_dora")
    }
    rows = [f"| {key} | {without_folders(value)} |" for key, value in shown.items()]
    return ["| setting | value |", "|---|---|", *rows]


def without_folders(value: Any) -> str:
    """A setting as text; an absolute path is cut down to its last part."""
    text = Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)
    return text.replace("|", "\\|")


def data_lines(settings: dict[str, Any], hashes: dict[str, str]) -> list[str]:
    """Lines of a table with name and SHA-256 of every file that the run trained on, hashed when the run began."""
    named = {key: Path(settings[key]).name for key in DATA if settings.get(key)}
    rows = [f"| {key} | {name} | {hashes.get(key, 'not recorded')} |" for key, name in named.items()]
    return ["| what | file | SHA-256 |", "|---|---|---|", *rows] if rows else ["Not known."]
