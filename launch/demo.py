"""The whole story on one small machine: atlas -> puzzles -> traces -> SFT -> GRPO -> evaluation -> report.

    python launch/demo.py                                       # what `make demo` runs
    python launch/demo.py --recipe launch/recipes/pbmc.yaml     # the same on real PBMCs

Each stage is one of the commands of launch/, printed before it runs. A stage whose result is there is not run again.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data.processes import environment_without_launcher
from launch.options import command, option
from trainer.record.runfolder import list_checkpoints, provenance, write_json

LAUNCH = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    out: str = option("runs/demo", "Run folder of the demo.")
    seed: int = option(0, "Every random choice of every stage.")
    h5ad: str | None = option(None, "Your own single-cell file; default: a simulated atlas.")
    donors: int = option(64, "Donors of the simulated atlas.")
    types: int = option(40, "Cell types of the simulated atlas.")
    noise: float = option(0.4, "Difficulty of the simulated atlas (0.5 easy, 2 hard).")
    build: tuple[str, ...] = option((), "Options for launch/build.py as name=value, in place of the simulated atlas's.")
    traces_from: int | None = option(None, "Training puzzles shown to the teacher; default: all.")
    hidden: int = option(128, "Hidden size of the embedded policy.")
    layers: int = option(3, "Layers of the embedded policy.")
    sft_epochs: int = option(3, "Epochs of the cold start (all weights).")
    sft_lr: float = option(3e-3, "Peak learning rate of the cold start.")
    grpo_recipe: str = option(str(LAUNCH / "recipes/demo.yaml"), "Recipe of the GRPO stage.")
    grpo_steps: int | None = option(None, "Optimizer steps of the GRPO stage; default: the recipe's.")
    eval_puzzles: int = option(300, "Puzzles per held-out split that are evaluated.")


SIMULATED_BUILD = (
    "min-cells=3",
    "max-cells=4",
    "top-genes=12",
    "drop-genes=ribosomal",
    "drop-genes=mitochondrial",
    "puzzles-per-n=4000",
    "test-puzzles-per-n=150",
    "unseen-disease=systemic lupus erythematosus",
    "unseen-disease=Crohn disease",
)


@command(DemoConfig)
def main(config: DemoConfig) -> None:
    """Run every stage, then write summary.json and report.html."""
    out = Path(config.out)
    if (out / "summary.json").is_file():
        print(f"{out} already holds a finished demo: open {out / 'report.html'}, or name another --out to run it again")
        return
    seconds = prepare(config)
    splits = held_out_files(out)
    puzzles = [word for path in splits for word in ("--puzzles", path)]

    def evaluate(stage: str, model: Path) -> dict[str, float]:
        folder = out / "eval" / stage  # launch/evaluate.py makes one folder per file by itself when there are several
        return run_stage(
            f"evaluate {stage}",
            folder / "test/metrics.json",
            "evaluate",
            *puzzles,
            model=model,
            out=folder if len(splits) > 1 else folder / "test",
            limit=config.eval_puzzles,
            max_response_tokens=response_tokens(config),
        )

    seconds |= evaluate("base", out / "base")
    seconds |= evaluate("sft", out / "sft/model")
    resume = ["--resume"] if (out / "grpo/config.json").is_file() else []
    seconds |= run_stage(
        "grpo",
        out / "grpo/finished.json",
        "grpo",
        *resume,
        recipe=config.grpo_recipe,
        model=out / "sft/model",
        puzzles=out / "puzzles/train.parquet",
        out=out / "grpo",
        steps=config.grpo_steps,
        seed=config.seed,
    )
    seconds |= evaluate("grpo", list_checkpoints(out / "grpo")[-1])
    write_summary(config, out, seconds)
    run_stage("report", None, "report", run=out, png=out / "curve.png")
    print_summary(out)


def prepare(config: DemoConfig) -> dict[str, float]:
    """Everything before GRPO: atlas, puzzles, traces, base checkpoint, SFT. Returns seconds per stage that ran."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    seed = {"seed": config.seed}
    seconds: dict[str, float] = {}
    h5ad = Path(config.h5ad) if config.h5ad else out / "atlas.h5ad"
    if not config.h5ad:
        atlas = {"donors": config.donors, "types": config.types, "noise": config.noise}
        seconds |= run_stage("simulate", h5ad, "simulate", out=h5ad, **atlas, **seed)
    build = [word for item in config.build or SIMULATED_BUILD for word in ("--" + item).split("=", 1)]
    seconds |= run_stage("build", out / "puzzles/report.json", "build", *build, h5ad=h5ad, out=out / "puzzles", **seed)
    train, traces = out / "puzzles/train.parquet", out / "traces.jsonl"
    seconds |= run_stage("distill", traces, "distill", puzzles=train, out=traces, limit=config.traces_from, **seed)
    shape = {"hidden": config.hidden, "layers": config.layers}
    # a gene or disease that only held-out donors have is a token too, not a dozen letters the model has never seen
    held_out = [word for path in held_out_files(out) for word in ("--words-of", path)]
    seconds |= run_stage(
        "create policy",
        out / "base/config.json",
        "create_policy",
        "--puzzles",
        traces,
        *held_out,
        puzzles=train,
        out=out / "base",
        **shape,
        **seed,
    )
    cold_start = {
        "lora_rank": 0,
        "epochs": config.sft_epochs,
        "batch_size": 8,
        "lr": config.sft_lr,
        "warmup_steps": 20,
        "weight_decay": 0.01,
        "holdout": 0.02,
    }
    ranks = min(2, len(os.sched_getaffinity(0)))  # small matrices: two processes are faster than two threads
    begun = ["--resume"] if (out / "sft/config.json").is_file() else []
    seconds |= run_stage(
        "sft",
        out / "sft/model/config.json",
        "sft",
        *begun,
        ranks=ranks,
        traces=traces,
        model=out / "base",
        out=out / "sft",
        **cold_start,
        **seed,
    )
    return seconds


def run_stage(
    stage: str, result: Path | None, verb: str, *words: object, ranks: int = 1, **flags: object
) -> dict[str, float]:
    """Run launch/VERB.py as a process of its own, or as `ranks` processes under torchrun, unless its result is there.

    words are passed as they are, flags as --name value (None is left out). Returns {stage: seconds} when it ran.
    A stage that fails ends the demo with the stage's own message and exit code.
    """
    if result is not None and result.is_file():
        print(f"[{stage}] found {result}", flush=True)
        return {}
    given = [(f"--{name.replace('_', '-')}", value) for name, value in flags.items() if value is not None]
    arguments = [str(word) for word in (*words, *(word for pair in given for word in pair))]
    launcher = ["torchrun", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else ["python"]
    print(f"\n[{stage}] $ {shlex.join([*launcher, f'launch/{verb}.py', *arguments])}", flush=True)
    start = time.perf_counter()
    env = environment_without_launcher()
    env |= {"OMP_NUM_THREADS": "1"} if ranks > 1 else {}  # torchrun's own default, without its banner
    launcher = [sys.executable, *(["-m", "torch.distributed.run", *launcher[1:]] if ranks > 1 else [])]
    done = subprocess.run([*launcher, str(LAUNCH / f"{verb}.py"), *arguments], env=env, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    seconds = time.perf_counter() - start
    print(f"[{stage}] {seconds:.0f} s", flush=True)
    return {stage: round(seconds, 1)}


def held_out_files(out: Path) -> list[str]:
    """The test and unseen puzzle files that hold a puzzle."""
    import pyarrow.parquet as parquet

    files = (out / "puzzles/test.parquet", out / "puzzles/unseen.parquet")
    return [str(path) for path in files if path.is_file() and parquet.read_metadata(path).num_rows > 0]


def response_tokens(config: DemoConfig) -> int:
    """The GRPO recipe's response limit, so that every stage is cut at the same length."""
    import yaml

    return yaml.safe_load(Path(config.grpo_recipe).read_text())["max_response_tokens"]


def write_summary(config: DemoConfig, out: Path, seconds: dict[str, float]) -> None:
    """summary.json: {stage: {split: metrics}}, and under "run" the settings, seconds and versions."""
    summary: dict[str, dict] = {}
    for stage in ("base", "sft", "grpo"):
        folders = sorted((out / "eval" / stage).glob("*/metrics.json"))
        summary[stage] = {path.parent.name: headline(json.loads(path.read_text())) for path in folders}
    split = json.loads((out / "puzzles/report.json").read_text())["options"]["split"]
    summary["run"] = {"config": vars(config), "split": split, "seconds": seconds, **provenance()}
    write_json(out / "summary.json", summary)


def headline(metrics: dict) -> dict:
    """The numbers of a metrics.json without its breakdowns."""
    return {key: value for key, value in metrics.items() if isinstance(value, int | float) or key == "intervals"}


def print_summary(out: Path) -> None:
    """The headline table."""
    summary = json.loads((out / "summary.json").read_text())
    names = ("batch_accuracy", "cell_accuracy", "format_validity", "uniqueness", "response_length")
    print(f"\n{'stage':6}{'split':8}" + "".join(f"{name:>17}" for name in names))
    for stage in ("base", "sft", "grpo"):
        for split, metrics in summary[stage].items():
            print(f"{stage:6}{split:8}" + "".join(f"{metrics[name]:17.3f}" for name in names))
    print(f"\nreport: {out / 'report.html'}")


if __name__ == "__main__":
    main()
