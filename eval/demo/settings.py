"""The settings of launch/demo.py, and the files that they name."""

from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError
from data.options import flag_of, option
from data.status.status import NOTIFY

RUN, ATLAS, TRAINING = "The run", "Atlas and puzzles", "Model and training"
"""Headings of --help."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    out: str = option("runs/demo", "Run folder of the demo.", section=RUN)
    seed: int = option(0, "Seed of every random choice of every stage.", section=RUN)
    h5ad: str | None = option(None, "Your own single-cell file; default: a simulated atlas.", section=ATLAS)
    donors: int = option(64, "Donors of the simulated atlas.", section=ATLAS)
    types: int = option(40, "Cell types of the simulated atlas.", section=ATLAS)
    noise: float = option(0.4, "Difficulty of the simulated atlas (0.5 easy, 2 hard).", section=ATLAS)
    build: tuple[str, ...] = option(
        (), "Options for launch/build.py as name=value, instead of those for the simulated atlas.", section=ATLAS
    )
    cells_h5ad: str | None = option(
        None,
        "A second file: trained on too, and its held-out puzzles are evaluated as the split 'cells'.",
        section=ATLAS,
    )
    cells_build: tuple[str, ...] = option((), "Options for launch/build.py with the second file.", section=ATLAS)
    model: str | None = option(
        None,
        "Checkpoint to start from; default: a small policy made from scratch (--hidden, --layers).",
        section=TRAINING,
    )
    distill: tuple[str, ...] = option((), "Options for launch/distill.py as name=value.", section=TRAINING)
    traces_from: int | None = option(
        None, "Training puzzles (of each file) that the teacher answers; default: all.", section=TRAINING
    )
    hidden: int = option(128, "Hidden size of the embedded policy.", section=TRAINING)
    layers: int = option(3, "Layers of the embedded policy.", section=TRAINING)
    sft: tuple[str, ...] = option(
        (), "Options for launch/sft.py as name=value, instead of those that train all weights.", section=TRAINING
    )
    sft_epochs: int = option(3, "Epochs of the cold start.", section=TRAINING)
    sft_lr: float = option(3e-3, "Peak learning rate of the cold start.", section=TRAINING)
    grpo_recipe: str = option("demo", "Recipe of the GRPO stage: a file, or a name as for --recipe.", section=TRAINING)
    grpo_steps: int | None = option(None, "Steps of the GRPO stage; default: the recipe's.", section=TRAINING)
    annotate: tuple[str, ...] = option(
        (),
        "Options for launch/annotate.py as name=value: the last stage labels the clusters of the real file.",
        section=RUN,
    )
    eval_puzzles: int = option(300, "Puzzles per held-out split that are evaluated.", section=RUN)
    notify: str = option("", NOTIFY, section=RUN)

    def __post_init__(self) -> None:
        if self.cells_build and not self.cells_h5ad:
            raise UserError("--cells-build: of which file? Name it with --cells-h5ad")
        for name, own in SET_HERE.items():
            for item in getattr(self, name):
                given = item.partition("=")[0].replace("_", "-")
                # the demo gives these itself, after the others: click would take the last in silence
                if given in own and not (given == "limit" and self.traces_from is None):
                    raise UserError(f"{flag_of(name)} {item}: the demo sets --{given} itself; use {own[given]}")


SIMULATED_BUILD = (
    *("min-cells=3", "max-cells=4", "top-genes=12", "drop-genes=ribosomal", "drop-genes=mitochondrial"),
    *("puzzles-per-n=4000", "test-puzzles-per-n=150"),
    *("unseen-disease=systemic lupus erythematosus", "unseen-disease=Crohn disease"),
)
COLD_START = ("lora-rank=0", "batch-size=8", "warmup-steps=20", "weight-decay=0.01", "holdout=0.02")


OWN = {
    "simulate": {"donors": "--donors", "types": "--types", "noise": "--noise", "seed": "--seed"},
    "create_policy": {"hidden": "--hidden", "layers": "--layers"},
    "distill": {"limit": "--traces-from"},
    "sft": {"epochs": "--sft-epochs", "lr": "--sft-lr"},
    "grpo": {"steps": "--grpo-steps"},
    "evaluate": {"limit": "--eval-puzzles"},
}
"""{stage: {its setting: the demo's option that sets it}}."""
EVERY = {"out": "--out", "seed": "--seed"}
SET_HERE = {
    "build": EVERY | {"h5ad": "--h5ad"},
    "cells_build": EVERY | {"h5ad": "--cells-h5ad"},
    "distill": EVERY | OWN["distill"] | {"puzzles": "--h5ad"},
    "sft": EVERY | OWN["sft"] | {"traces": "--distill", "model": "--model"},
    "annotate": EVERY | {"model": "--model", "max-response-tokens": "--grpo-recipe"},
}
"""{setting of the demo: {option of its stage: the demo's own option for it}}."""
PARTS = ("cold start", "evaluation before", "GRPO", "evaluation after", "report", "annotation")


def bought_already(traces: Path, config: DemoConfig) -> list[str]:
    """["--resume"] for a teacher whose responses took hours or money, when an earlier call has left some, else []."""
    teacher = next((option for option in reversed(config.distill) if option.startswith("teacher=")), "teacher=embedded")
    left = teacher != "teacher=embedded" and traces.with_suffix(".raw.jsonl").is_file()
    return ["--resume"] if left else []


def training_files(config: DemoConfig) -> tuple[Path, Path]:
    """(training puzzles, traces), of both files where there are two."""
    out = Path(config.out)
    if config.cells_h5ad:
        return out / "train_both.parquet", out / "traces_both.jsonl"
    return out / "puzzles/train.parquet", out / "traces.jsonl"


def base_model(config: DemoConfig) -> Path:
    """The checkpoint before any training."""
    return Path(config.model or Path(config.out) / "base")


def refuse_missing_files(config: DemoConfig) -> None:
    """Raises UserError, before anything is made, when a file or the checkpoint of the settings is not there."""
    if (Path(config.out) / "config.json").exists():  # labels.json and more of it would be replaced
        raise UserError(
            f"--out {config.out}: holds a checkpoint, or a run of a trainer (config.json); name another folder"
        )
    if config.model and not (Path(config.model) / "config.json").is_file():
        raise UserError(f"--model {config.model}: no checkpoint there; `make smollm2` brings SmolLM2's")
    for name, file in (("--h5ad", config.h5ad), ("--cells-h5ad", config.cells_h5ad)):
        if file and not Path(file).exists():
            raise UserError(f"{name} {file}: no such file; `make pbmc` and `make smollm2` bring the real cells")
