"""The whole story on one small machine: atlas -> puzzles -> traces -> SFT -> GRPO -> evaluation -> report.

    python launch/demo.py                                       # what `make demo` runs
    python launch/demo.py --recipe launch/recipes/pbmc.yaml     # the same on real PBMCs
    python launch/demo.py --recipe launch/recipes/smollm2.yaml  # a pretrained model on both (make smollm2)

Each stage is one of the commands of launch/, printed before it runs. A stage whose result exists is not run again, and
SFT and GRPO go on from their newest checkpoint: the same command continues a run that was stopped.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from data.errors import UserError
from data.files import lock_folder
from data.status.status import NOTIFY, Report, reporting
from eval.baselines import BASELINES
from eval.report.faults import fault_sentences
from eval.run_files import held_out_files, summary_text, write_summary
from launch.annotate import annotate_held_out, annotate_stage
from launch.options import command, option
from launch.stages import LAUNCH, begun, evaluate_files, run_stage
from launch.together import write_both, write_labels
from trainer.record.runfolder import FINISHED, list_checkpoints, provenance

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
    grpo_recipe: str = option(str(LAUNCH / "recipes/demo.yaml"), "Recipe of the GRPO stage.", section=TRAINING)
    grpo_steps: int | None = option(None, "Optimizer steps of the GRPO stage; default: the recipe's.", section=TRAINING)
    annotate: tuple[str, ...] = option(
        (),
        "Options for launch/annotate.py as name=value: the last stage labels the clusters of the real file.",
        section=RUN,
    )
    eval_puzzles: int = option(300, "Puzzles per held-out split that are evaluated.", section=RUN)
    notify: str = option("", NOTIFY, section=RUN)


SIMULATED_BUILD = (
    *("min-cells=3", "max-cells=4", "top-genes=12", "drop-genes=ribosomal", "drop-genes=mitochondrial"),
    *("puzzles-per-n=4000", "test-puzzles-per-n=150"),
    *("unseen-disease=systemic lupus erythematosus", "unseen-disease=Crohn disease"),
)
PARTS = ("cold start", "evaluation before", "GRPO", "evaluation after", "report", "annotation")
COLD_START = ("lora-rank=0", "batch-size=8", "warmup-steps=20", "weight-decay=0.01", "holdout=0.02")


@command(DemoConfig)
def main(config: DemoConfig) -> None:
    """Run every stage, write summary.json and report.html, and annotate a file."""
    out = Path(config.out)
    labelled = out / "annotate/labelled.csv"
    if (out / "summary.json").is_file() and (labelled.is_file() or (config.h5ad and not config.annotate)):
        print(f"{out} already holds a finished demo: open {out / 'report.html'}, or name another --out to run it again")
        return
    refuse_missing_files(config)
    with reporting(out, config.notify, "part") as report:
        lock_folder(out)
        said = run_parts(config, report)
    print("\n".join(["", *said, "", f"report: {out / 'report.html'}"]))


def run_parts(config: DemoConfig, report: Report) -> list[str]:
    """All stages, in the PARTS that status.json counts; returns what is said at the end."""
    out = Path(config.out)

    def done(part: str) -> None:
        # no time is left to be told: the parts take from seconds to hours
        report.begin().counted(PARTS.index(part) + 1, len(PARTS), None)

    report.begin().counted(0, len(PARTS), None)
    seconds = prepare(config)
    done("cold start")
    train = training_files(config)[0]
    seconds |= evaluate(config, "base", base_model(config))
    seconds |= evaluate(config, "sft", out / "sft/model")
    done("evaluation before")
    grpo = {"recipe": config.grpo_recipe, "steps": config.grpo_steps, "seed": config.seed}
    grpo |= {"model": out / "sft/model", "puzzles": train, "out": out / "grpo"}
    seconds |= run_stage("grpo", out / "grpo" / FINISHED, "grpo", *begun(out / "grpo"), **grpo)
    done("GRPO")
    trained = list_checkpoints(out / "grpo")[-1]
    seconds |= evaluate(config, "grpo", trained, compare=out / "eval/sft")
    done("evaluation after")
    seconds |= evaluate_baselines(config)
    split = json.loads((out / "puzzles/report.json").read_text())["options"]["split"]
    write_summary(out, {"config": vars(config), "split": split, "seconds": seconds, **provenance()})
    run_stage("report", None, "report", run=out, png=out / "curve.png")
    done("report")
    # last: a model that cannot annotate has its numbers and its page all the same
    said = [summary_text(out), *filter(None, [fault_sentences(out), annotate(config, trained)])]
    done("annotation")
    return said


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
    sources = {"": (h5ad, config.build or SIMULATED_BUILD)}
    if config.cells_h5ad:
        sources["cells"] = (Path(config.cells_h5ad), config.cells_build)
    for name, (file, options) in sources.items():
        puzzles, traces = out / (name or "puzzles"), out / f"traces{name and '_'}{name}.jsonl"
        build = {"h5ad": file, "out": puzzles, **seed}
        seconds |= run_stage(_stage("build", name), puzzles / "report.json", "build", *flags(options), **build)
        ask = {"puzzles": puzzles / "train.parquet", "out": traces, "limit": config.traces_from, **seed}
        seconds |= run_stage(_stage("distill", name), traces, "distill", *flags(config.distill), **ask)
    train, traces = training_files(config)
    write_labels(out, list(sources))
    if config.cells_h5ad:
        write_both((out / "puzzles/train.parquet", out / "cells/train.parquet"), train)
        write_both((out / "traces.jsonl", out / "traces_cells.jsonl"), traces)
        shutil.copyfile(out / "cells/test.parquet", out / "puzzles/cells.parquet")  # where the report looks for puzzles
    if not config.model:
        # genes and diseases that only held-out donors have get tokens too, instead of letters that the model never saw
        words = ["--puzzles", traces, *(word for file in held_out_files(out) for word in ("--words-of", file))]
        policy = {"puzzles": train, "out": out / "base", "hidden": config.hidden, "layers": config.layers, **seed}
        seconds |= run_stage("create policy", out / "base/config.json", "create_policy", *words, **policy)
    cold_start = {"traces": traces, "model": base_model(config), "out": out / "sft"}
    cold_start |= {"epochs": config.sft_epochs, "lr": config.sft_lr, **seed}
    words, finished = [*begun(out / "sft"), *flags(config.sft or COLD_START)], out / "sft/model/config.json"
    return seconds | run_stage("sft", finished, "sft", *words, ranks=training_ranks(), **cold_start)


def _stage(verb: str, name: str) -> str:
    return f"{verb} {name}".rstrip()


def flags(options: Iterable[str]) -> list[str]:
    """name=value options as words of a command line; a name alone is a switch."""
    return [word for item in options for word in ("--" + item).split("=", 1)]


def training_files(config: DemoConfig) -> tuple[Path, Path]:
    """(training puzzles, traces), of both files where there are two."""
    out = Path(config.out)
    if config.cells_h5ad:
        return out / "train_both.parquet", out / "traces_both.jsonl"
    return out / "puzzles/train.parquet", out / "traces.jsonl"


def annotate(config: DemoConfig, model: Path) -> str:
    """A sentence on the last stage: clusters of a file, labelled as a biologist would have them; "" if there is none.

    With --annotate those of the real file, else those of a held-out donor of the simulated atlas.
    """
    out = Path(config.out)
    if config.annotate:
        file, labelled = Path(config.cells_h5ad or config.h5ad or out / "atlas.h5ad"), out / "annotate/labelled.h5ad"
        annotate_stage(file, labelled, model, response_tokens(config), *flags(config.annotate), seed=config.seed)
        return f"annotation of the clusters of {file}: see {labelled.with_suffix('.html')}"
    if config.h5ad:
        return ""
    return annotate_held_out(out, model, response_tokens(config), config.seed)


def refuse_missing_files(config: DemoConfig) -> None:
    """Raises UserError, before anything is made, when a file or the checkpoint of the settings is not there."""
    if config.model and not (Path(config.model) / "config.json").is_file():
        raise UserError(f"--model {config.model}: no checkpoint there; `make smollm2` brings SmolLM2's")
    for name, file in (("--h5ad", config.h5ad), ("--cells-h5ad", config.cells_h5ad)):
        if file and not Path(file).exists():
            raise UserError(f"{name} {file}: no such file; `make pbmc` and `make smollm2` bring the real cells")


def base_model(config: DemoConfig) -> Path:
    """The checkpoint before any training."""
    return Path(config.model or Path(config.out) / "base")


def training_ranks() -> int:
    """Processes of the cold start: one per GPU; on a CPU two, which are faster than two threads."""
    import torch  # seconds, which `--help` need not wait for

    return torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))


def evaluate(config: DemoConfig, stage: str, model: Path, **more: object) -> dict[str, float]:
    """Evaluate a model on all held-out splits; see `evaluate_files`."""
    out, more = Path(config.out), {"model": model, "max_response_tokens": response_tokens(config), **more}
    return evaluate_files(out / "eval" / stage, f"evaluate {stage}", held_out_files(out), config.eval_puzzles, **more)


def evaluate_baselines(config: DemoConfig) -> dict[str, float]:
    """Evaluate every baseline. For each of two files it learns from the training puzzles of that file alone."""
    out, seconds = Path(config.out), {}
    for name in BASELINES:
        for train in ("puzzles", "cells"):
            files = [file for file in held_out_files(out) if (Path(file).stem == "cells") == (train == "cells")]
            if files:
                learns = {"baseline": name, "train": out / train / "train.parquet"}
                stage = f"baseline-{name}"
                seconds |= evaluate_files(
                    out / "eval" / stage, f"evaluate {stage}", files, config.eval_puzzles, **learns
                )
    return seconds


def response_tokens(config: DemoConfig) -> int:
    """The response limit of the GRPO recipe, so that all stages cut responses at the same length."""
    return yaml.safe_load(Path(config.grpo_recipe).read_text())["max_response_tokens"]


if __name__ == "__main__":
    main()
