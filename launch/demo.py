"""The whole story on one small machine: atlas -> puzzles -> traces -> SFT -> GRPO -> evaluation -> report.

    python launch/demo.py                                       # what `make demo` runs
    python launch/demo.py --recipe launch/recipes/pbmc.yaml     # the same on real PBMCs
    python launch/demo.py --recipe launch/recipes/smollm2.yaml  # a pretrained model on both (make smollm2)

Each stage is one of the commands of launch/, printed before it runs. A stage whose result exists is not run again, and
SFT and GRPO go on from their newest checkpoint: the same command continues a run that was stopped.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.build.settings import check_config
from data.errors import UserError
from data.files import lock_folder, write_whole
from data.options import naming, words_of
from data.processes import provenance
from data.status.status import Report, reporting
from eval.annotate.run import refuse_missing_columns
from eval.baselines import BASELINES
from eval.demo.record import last_of, record_settings, refuse_other_settings
from eval.demo.settings import (
    COLD_START,
    OWN,
    PARTS,
    SIMULATED_BUILD,
    DemoConfig,
    base_model,
    bought_already,
    refuse_missing_files,
    training_files,
)
from eval.report.faults import fault_sentences
from eval.run_files import held_out_files, summary_text, write_summary
from launch.annotate import annotate_held_out, annotate_stage
from launch.options import command, read_recipe
from launch.stages import begun, evaluate_files, read_stage, run_stage
from launch.together import write_both, write_labels
from reward import load_reward
from trainer.config import GrpoConfig
from trainer.record.runfolder import FINISHED, FREE_ON_RESUME, list_checkpoints


@command(DemoConfig)
def main(config: DemoConfig) -> None:
    """Run every stage, write summary.json and report.html, and annotate a file."""
    out = Path(config.out)
    labelled = out / "annotate/labelled.csv"
    if all((out / name).is_file() for name in ("summary.json", "report.html")) and (
        labelled.is_file() or (config.h5ad and not config.annotate)
    ):
        refuse_other_settings(config, recipe_values(config), FREE_ON_RESUME)
        print(f"{out} already holds a finished demo: open {out / 'report.html'}, or name another --out to run it again")
        print(f"(to label clusters with other options: remove {labelled.parent}, and give them with --annotate)")
        return
    refuse_missing_files(config)
    refuse_wrong_options(config)
    if config.model:
        from trainer.start.ahead import refuse_model  # torch: seconds, which `--help` need not wait for

        refuse_model(base_model(config), (out / "sft/config.json").is_file())
    refuse_other_settings(config, recipe := recipe_values(config), FREE_ON_RESUME)
    with reporting(out, config.notify, "part") as report:
        lock_folder(out)
        record_settings(config, recipe)
        said = run_parts(config, report)
    print("\n".join(["", *said, "", f"report: {out / 'report.html'}"]))


def run_parts(config: DemoConfig, report: Report) -> list[str]:
    """All stages, in the PARTS that status.json counts; returns what is said at the end."""
    out = Path(config.out)

    def done(part: str) -> None:
        # no time is left to be told: the parts take from seconds to hours
        report.begin().counted(PARTS.index(part) + 1, len(PARTS), None)

    report.begin().counted(0, len(PARTS), None)
    seconds = prepare(config, functools.partial(refuse_what_comes_later, config))
    done("cold start")
    train = training_files(config)[0]
    seconds |= evaluate(config, "base", base_model(config))
    seconds |= evaluate(config, "sft", out / "sft/model")
    done("evaluation before")
    grpo = {"recipe": config.grpo_recipe, "steps": config.grpo_steps, "seed": config.seed}
    grpo |= {"model": out / "sft/model", "puzzles": train, "out": out / "grpo"}
    seconds |= run_stage("grpo", out / "grpo" / FINISHED, "grpo", *begun(out / "grpo"), **grpo)
    done("GRPO")
    trained = last_of(list_checkpoints(out / "grpo"), out / "grpo")
    seconds |= evaluate(config, "grpo", trained, compare=out / "eval/sft")
    done("evaluation after")
    seconds |= evaluate_baselines(config)
    shown = {name: value for name, value in vars(config).items() if name != "notify"}  # it may hold an address or a key
    split = json.loads((out / "puzzles/report.json").read_text())["options"]["split"]
    write_summary(out, {"config": shown, "split": split, "seconds": seconds, **provenance()})
    run_stage("report", None, "report", run=out, png=out / "curve.png")
    done("report")
    # last: a model that cannot annotate has its numbers and its page all the same
    said = [summary_text(out), *filter(None, [fault_sentences(out), annotate(config, trained)])]
    done("annotation")
    return said


def prepare(config: DemoConfig, before_training: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Run everything before GRPO: atlas, puzzles, traces, base checkpoint, SFT. before_training: called when all but SFT is done.

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
        seconds |= run_stage(_stage("build", name), puzzles / "report.json", "build", *words_of(options), **build)
        ask = {"puzzles": puzzles / "train.parquet", "out": traces, "limit": config.traces_from, **seed}
        words = [*bought_already(traces, config), *words_of(config.distill)]
        seconds |= run_stage(_stage("distill", name), traces, "distill", *words, **ask)
    train, traces = training_files(config)
    write_labels(out, list(sources))
    if config.cells_h5ad:
        write_both((out / "puzzles/train.parquet", out / "cells/train.parquet"), train)
        write_both((out / "traces.jsonl", out / "traces_cells.jsonl"), traces)
        write_whole(out / "puzzles/cells.parquet", (out / "cells/test.parquet").read_bytes())  # report.py looks there
    if not config.model:
        # genes and diseases that only held-out donors have get tokens too, instead of letters that the model never saw
        words = ["--puzzles", traces, *(word for file in held_out_files(out) for word in ("--words-of", file))]
        policy = {"puzzles": train, "out": out / "base", "hidden": config.hidden, "layers": config.layers, **seed}
        seconds |= run_stage("create policy", out / "base/config.json", "create_policy", *words, **policy)
    cold_start = {"traces": traces, "model": base_model(config), "out": out / "sft"}
    cold_start |= {"epochs": config.sft_epochs, "lr": config.sft_lr, **seed}
    words, finished = [*begun(out / "sft"), *words_of(config.sft or COLD_START)], out / "sft/model/config.json"
    if not finished.is_file():
        from trainer.start.ahead import cold_start_ranks

        before_training()
        cold_start["ranks"] = cold_start_ranks(base_model(config), "lora-rank=0" in (config.sft or COLD_START))
    return seconds | run_stage("sft", finished, "sft", *words, **cold_start)


def refuse_what_comes_later(config: DemoConfig) -> None:
    """Raises UserError for what the stages after the cold start would refuse, hours later; says what they will leave out."""
    from trainer.start.ahead import refuse_lengths

    puzzles, traces = training_files(config)
    if not held_out_files(Path(config.out)):
        raise UserError(
            f"--build: {config.out}/puzzles has no held-out puzzle to evaluate on; give a test-fraction above 0"
        )
    read = read_stage(
        "grpo", recipe=config.grpo_recipe, model=base_model(config), puzzles=puzzles, out=Path(config.out) / "grpo"
    )
    with naming("--grpo-recipe"):
        for note in refuse_lengths(read, traces):
            print(f"note: {note}", flush=True)


def _stage(verb: str, name: str) -> str:
    return f"{verb} {name}".rstrip()


def annotate(config: DemoConfig, model: Path) -> str:
    """A sentence on the last stage: clusters of a file, labelled as a biologist would have them; "" if there is none.

    With --annotate those of the real file, else those of a held-out donor of the simulated atlas.
    """
    out = Path(config.out)
    if config.annotate:
        file, labelled = Path(config.cells_h5ad or config.h5ad or out / "atlas.h5ad"), out / "annotate/labelled.h5ad"
        annotate_stage(file, labelled, model, response_tokens(config), *words_of(config.annotate), seed=config.seed)
        return f"annotation of the clusters of {file}: see {labelled.with_suffix('.html')}"
    if config.h5ad:
        return ""
    return annotate_held_out(out, model, response_tokens(config), config.seed)


def refuse_wrong_options(config: DemoConfig) -> None:
    """Raises UserError, before anything is made, for options that a stage would refuse when its turn comes, hours later."""
    out, (puzzles, traces) = Path(config.out), training_files(config)
    tuned, cells = out / "sft/model", config.cells_h5ad or config.h5ad or out / "atlas.h5ad"
    cold_start = {"traces": traces, "model": base_model(config), "epochs": config.sft_epochs, "lr": config.sft_lr}
    grpo = {"recipe": config.grpo_recipe, "steps": config.grpo_steps, "puzzles": puzzles, "model": tuned}
    shape = {} if config.model else {"hidden": config.hidden, "layers": config.layers}
    atlas = {} if config.h5ad else {"donors": config.donors, "types": config.types, "noise": config.noise}
    for option, verb, words, result, more in (
        ("--noise", "simulate", (), "atlas.h5ad", {**atlas, "seed": config.seed}),
        ("--build", "build", words_of(config.build or SIMULATED_BUILD), "puzzles", {}),
        ("--cells-build", "build", words_of(config.cells_build), "cells", {}),
        (
            "--distill",
            "distill",
            words_of(config.distill),
            traces.name,
            {"puzzles": puzzles, "limit": config.traces_from},
        ),
        ("--hidden", "create_policy", (), "base", shape),
        ("--sft", "sft", words_of(config.sft or COLD_START), "sft", cold_start),
        ("--grpo-recipe", "grpo", (), "grpo", grpo),
        ("--eval-puzzles", "evaluate", (), "eval", {"puzzles": puzzles, "model": tuned, "limit": config.eval_puzzles}),
        ("--annotate", "annotate", (cells, *words_of(config.annotate)), "annotate/labelled.h5ad", {"model": tuned}),
    ):
        with naming(option, **OWN.get(verb, {})):
            read = read_stage(verb, *words, **more, out=out / result)
            if verb == "build":
                check_config(read)
            if verb == "grpo":
                load_reward(read.reward)
            if verb == "annotate" and config.annotate and Path(cells).exists():
                refuse_missing_columns(Path(cells), read.cluster_key, read.truth_key)


def recipe_values(config: DemoConfig) -> dict[str, Any]:
    """The values of the recipe of the GRPO stage, with what it leaves out of the two that other stages need."""
    defaults = {"steps": GrpoConfig.steps, "max_response_tokens": GrpoConfig.max_response_tokens}
    return defaults | read_recipe(GrpoConfig, config.grpo_recipe)


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
    return recipe_values(config)["max_response_tokens"]


if __name__ == "__main__":
    main()
