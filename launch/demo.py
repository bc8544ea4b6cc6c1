"""The whole story on one small machine: atlas -> puzzles -> traces -> SFT -> GRPO -> evaluation -> report.

    python launch/demo.py                                       # what `make demo` runs
    python launch/demo.py --recipe launch/recipes/pbmc.yaml     # the same on real PBMCs

Each stage is one of the commands of launch/, printed before it runs. A stage whose result exists is not run again.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet
import yaml

from data.files import lock_folder
from eval.report.faults import fault_sentences
from eval.run_files import summary_text, write_summary
from launch.options import command, option
from launch.stages import LAUNCH, begun, run_stage
from trainer.record.runfolder import list_checkpoints, provenance

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
    traces_from: int | None = option(None, "Training puzzles that the teacher answers; default: all.", section=TRAINING)
    hidden: int = option(128, "Hidden size of the embedded policy.", section=TRAINING)
    layers: int = option(3, "Layers of the embedded policy.", section=TRAINING)
    sft_epochs: int = option(3, "Epochs of the cold start (all weights).", section=TRAINING)
    sft_lr: float = option(3e-3, "Peak learning rate of the cold start.", section=TRAINING)
    grpo_recipe: str = option(str(LAUNCH / "recipes/demo.yaml"), "Recipe of the GRPO stage.", section=TRAINING)
    grpo_steps: int | None = option(None, "Optimizer steps of the GRPO stage; default: the recipe's.", section=TRAINING)
    eval_puzzles: int = option(300, "Puzzles per held-out split that are evaluated.", section=RUN)


SIMULATED_BUILD = (
    *("min-cells=3", "max-cells=4", "top-genes=12", "drop-genes=ribosomal", "drop-genes=mitochondrial"),
    *("puzzles-per-n=4000", "test-puzzles-per-n=150"),
    *("unseen-disease=systemic lupus erythematosus", "unseen-disease=Crohn disease"),
)
COLD_START = {"lora_rank": 0, "batch_size": 8, "warmup_steps": 20, "weight_decay": 0.01, "holdout": 0.02}


@command(DemoConfig)
def main(config: DemoConfig) -> None:
    """Run every stage, then write summary.json and report.html."""
    out = Path(config.out)
    if (out / "summary.json").is_file():
        print(f"{out} already holds a finished demo: open {out / 'report.html'}, or name another --out to run it again")
        return
    lock_folder(out)
    seconds = prepare(config)
    train = out / "puzzles/train.parquet"
    seconds |= evaluate(config, "base", out / "base")
    seconds |= evaluate(config, "sft", out / "sft/model")
    grpo = {"recipe": config.grpo_recipe, "steps": config.grpo_steps, "seed": config.seed}
    grpo |= {"model": out / "sft/model", "puzzles": train, "out": out / "grpo"}
    seconds |= run_stage("grpo", out / "grpo/finished.json", "grpo", *begun(out / "grpo"), **grpo)
    seconds |= evaluate(config, "grpo", list_checkpoints(out / "grpo")[-1])
    split = json.loads((out / "puzzles/report.json").read_text())["options"]["split"]
    write_summary(out, {"config": vars(config), "split": split, "seconds": seconds, **provenance()})
    run_stage("report", None, "report", run=out, png=out / "curve.png")
    print(
        "\n".join(["", summary_text(out), *filter(None, [fault_sentences(out)]), "", f"report: {out / 'report.html'}"])
    )


def prepare(config: DemoConfig) -> dict[str, float]:
    """Run everything before GRPO: atlas, puzzles, traces, base checkpoint, SFT.

    Returns the seconds of each stage that ran.
    """
    out, seed = Path(config.out), {"seed": config.seed}
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    h5ad = Path(config.h5ad) if config.h5ad else out / "atlas.h5ad"
    if not config.h5ad:
        atlas = {"donors": config.donors, "types": config.types, "noise": config.noise}
        seconds |= run_stage("simulate", h5ad, "simulate", out=h5ad, **atlas, **seed)
    build = [word for item in config.build or SIMULATED_BUILD for word in ("--" + item).split("=", 1)]
    seconds |= run_stage("build", out / "puzzles/report.json", "build", *build, h5ad=h5ad, out=out / "puzzles", **seed)
    train, traces = out / "puzzles/train.parquet", out / "traces.jsonl"
    seconds |= run_stage("distill", traces, "distill", puzzles=train, out=traces, limit=config.traces_from, **seed)
    # genes and diseases that only held-out donors have get tokens too, instead of letters that the model never saw
    words = ["--puzzles", traces, *(word for file in held_out_files(out) for word in ("--words-of", file))]
    policy = {"puzzles": train, "out": out / "base", "hidden": config.hidden, "layers": config.layers, **seed}
    seconds |= run_stage("create policy", out / "base/config.json", "create_policy", *words, **policy)
    cold_start = {"traces": traces, "model": out / "base", "out": out / "sft"}
    cold_start |= {**COLD_START, "epochs": config.sft_epochs, "lr": config.sft_lr, **seed}
    ranks = min(2, len(os.sched_getaffinity(0)))  # small matrices: two processes are faster than two threads
    finished = out / "sft/model/config.json"
    return seconds | run_stage("sft", finished, "sft", *begun(out / "sft"), ranks=ranks, **cold_start)


def evaluate(config: DemoConfig, stage: str, model: Path) -> dict[str, float]:
    """Evaluate a model on the held-out splits, into OUT/eval/STAGE/SPLIT.

    Returns the seconds of the stage, if it ran.
    """
    out = Path(config.out)
    folder, files = out / "eval" / stage, held_out_files(out)
    words = [word for file in files for word in ("--puzzles", file)]
    settings = {"model": model, "limit": config.eval_puzzles, "max_response_tokens": response_tokens(config)}
    # launch/evaluate.py makes a folder per file only when there are several files
    settings["out"] = folder if len(files) > 1 else folder / "test"
    return run_stage(f"evaluate {stage}", folder / "test/metrics.json", "evaluate", *words, **settings)


def held_out_files(out: Path) -> list[str]:
    """The files of test and unseen puzzles that hold a puzzle."""
    files = (out / "puzzles/test.parquet", out / "puzzles/unseen.parquet")
    return [str(file) for file in files if file.is_file() and pyarrow.parquet.read_metadata(file).num_rows > 0]


def response_tokens(config: DemoConfig) -> int:
    """The response limit of the GRPO recipe, so that all stages cut responses at the same length."""
    return yaml.safe_load(Path(config.grpo_recipe).read_text())["max_response_tokens"]


if __name__ == "__main__":
    main()
