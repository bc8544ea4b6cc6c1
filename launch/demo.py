"""The whole story on one small machine: atlas -> puzzles -> traces -> SFT -> GRPO -> evaluation -> report.

    python launch/demo.py                                       # what `make demo` runs
    python launch/demo.py --recipe launch/recipes/pbmc.yaml     # the same on real PBMCs

Each stage is one of the commands of launch/, printed before it runs. A stage whose result is there is not run again.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launch.options import command, option
from trainer.runfolder import list_checkpoints, provenance, write_json

LAUNCH = Path(__file__).resolve().parent
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    out: str = option("runs/demo", "Run folder of the demo.")
    seed: int = option(0, "Every random choice of every stage.")
    h5ad: str | None = option(None, "Your own single-cell file; default: a simulated atlas.")
    donors: int = option(64, "Donors of the simulated atlas.")
    noise: float = option(1.0, "Difficulty of the simulated atlas (0.5 easy, 2 hard).")
    build: tuple[str, ...] = option((), "Options for launch/build.py as name=value, in place of the simulated atlas's.")
    traces_from: int = option(1500, "Training puzzles shown to the teacher; the rest is for GRPO alone.")
    hidden: int = option(128, "Hidden size of the embedded policy.")
    layers: int = option(4, "Layers of the embedded policy.")
    sft_epochs: int = option(6, "Epochs of the cold start (all weights).")
    sft_lr: float = option(2e-3, "Peak learning rate of the cold start.")
    grpo_recipe: str = option(str(LAUNCH / "recipes/demo.yaml"), "Recipe of the GRPO stage.")
    grpo_steps: int | None = option(None, "Optimizer steps of the GRPO stage; default: the recipe's.")
    eval_puzzles: int = option(300, "Puzzles per held-out split that are evaluated.")


SIMULATED_BUILD = (
    "min-cells=4", "max-cells=6", "top-genes=24", "puzzles-per-n=1500", "test-puzzles-per-n=100",
    "unseen-disease=systemic lupus erythematosus", "unseen-disease=Crohn disease",
)  # fmt: skip


@command(DemoConfig)
def main(config: DemoConfig) -> None:
    """Run every stage, then write summary.json and report.html."""
    out = Path(config.out)
    if (out / "summary.json").is_file():
        print(f"{out} already holds a finished demo: open {out / 'report.html'}, or name another --out to run it again")
        return
    seconds = prepare(config)
    splits = [str(p) for p in (out / "puzzles/test.parquet", out / "puzzles/unseen.parquet") if has_rows(p)]
    puzzles = [flag for path in splits for flag in ("--puzzles", path)]
    evaluate = [*puzzles, "--limit", config.eval_puzzles, "--max-response-tokens", response_tokens(config)]
    for stage in ("base", "sft"):
        model = out / "base" if stage == "base" else out / "sft/model"
        seconds |= run(f"evaluate {stage}", out / f"eval/{stage}/test/metrics.json", "evaluate", "--model", model, *evaluate,
                       "--out", eval_folder(out, stage, splits))  # fmt: skip
    grpo = ["--recipe", config.grpo_recipe, "--model", out / "sft/model", "--puzzles", out / "puzzles/train.parquet"]
    grpo += ["--out", out / "grpo", "--seed", config.seed]
    grpo += ["--steps", config.grpo_steps] if config.grpo_steps else []
    grpo += ["--resume"] if (out / "grpo/config.json").is_file() else []
    seconds |= run("grpo", out / "grpo/finished.json", "grpo", *grpo)
    seconds |= run("evaluate grpo", out / "eval/grpo/test/metrics.json", "evaluate", "--model",
                   list_checkpoints(out / "grpo")[-1], *evaluate, "--out", eval_folder(out, "grpo", splits))  # fmt: skip
    write_summary(config, out, seconds)
    run("report", None, "report", "--run", out)
    print_summary(out)


def prepare(config: DemoConfig) -> dict[str, float]:
    """Everything before GRPO: atlas, puzzles, traces, base checkpoint, SFT. Returns seconds per stage that ran."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    seed = ("--seed", config.seed)
    seconds: dict[str, float] = {}
    h5ad = Path(config.h5ad) if config.h5ad else out / "atlas.h5ad"
    if not config.h5ad:
        seconds |= run(
            "simulate", h5ad, "simulate", "--out", h5ad, "--donors", config.donors, "--noise", config.noise, *seed
        )
    build = [
        part
        for item in config.build or SIMULATED_BUILD
        for part in ("--" + item.split("=", 1)[0], item.split("=", 1)[1])
    ]
    seconds |= run(
        "build", out / "puzzles/report.json", "build", "--h5ad", h5ad, "--out", out / "puzzles", *seed, *build
    )
    train, traces = out / "puzzles/train.parquet", out / "traces.jsonl"
    seconds |= run(
        "distill", traces, "distill", "--puzzles", train, "--out", traces, "--limit", config.traces_from, *seed
    )
    seconds |= run("create policy", out / "base/config.json", "create_policy", "--puzzles", train, "--puzzles", traces,
                   "--out", out / "base", "--hidden", config.hidden, "--layers", config.layers, *seed)  # fmt: skip
    seconds |= run("sft", out / "sft/model/config.json", "sft", "--traces", traces, "--model", out / "base", "--out", out / "sft",
                   "--lora-rank", 0, "--epochs", config.sft_epochs, "--batch-size", 64, "--lr", config.sft_lr,
                   "--warmup-steps", 20, "--weight-decay", 0.01, *seed)  # fmt: skip
    return seconds


def run(stage: str, result: Path | None, verb: str, *arguments: object) -> dict[str, float]:
    """Run launch/VERB.py as a process of its own unless its result is there; returns {stage: seconds} when it ran."""
    if result is not None and result.is_file():
        print(f"[{stage}] found {result}", flush=True)
        return {}
    words = [str(argument) for argument in arguments]
    print(f"\n[{stage}] $ python launch/{verb}.py {' '.join(repr(w) if ' ' in w else w for w in words)}", flush=True)
    start = time.perf_counter()
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith("TORCHELASTIC")}
    done = subprocess.run([sys.executable, str(LAUNCH / f"{verb}.py"), *words], env=env, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    seconds = time.perf_counter() - start
    print(f"[{stage}] {seconds:.0f} s", flush=True)
    return {stage: round(seconds, 1)}


def has_rows(path: Path) -> bool:
    import pyarrow.parquet as parquet

    return path.is_file() and parquet.read_metadata(path).num_rows > 0


def response_tokens(config: DemoConfig) -> int:
    """The GRPO recipe's response limit, so that every stage is cut at the same length."""
    import yaml

    return yaml.safe_load(Path(config.grpo_recipe).read_text())["max_response_tokens"]


def eval_folder(out: Path, stage: str, splits: list[str]) -> Path:
    """launch/evaluate.py makes one folder per file by itself when there are several."""
    return out / "eval" / stage / ("" if len(splits) > 1 else Path(splits[0]).stem)


def write_summary(config: DemoConfig, out: Path, seconds: dict[str, float]) -> None:
    """summary.json: {stage: {split: metrics}}, and under "run" the settings, seconds and versions."""
    summary: dict[str, dict] = {}
    for stage in ("base", "sft", "grpo"):
        folders = sorted((out / "eval" / stage).glob("*/metrics.json"), reverse=False)
        summary[stage] = {path.parent.name: json.loads(path.read_text()) for path in folders}
    summary["run"] = {"config": vars(config), "seconds": seconds, **provenance()}
    write_json(out / "summary.json", summary)


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
