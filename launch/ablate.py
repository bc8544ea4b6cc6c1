"""Train several configurations from one cold start with several seeds, and draw them side by side (Figure 5 of the paper).

    python launch/ablate.py --recipe launch/recipes/fig5.yaml
    python launch/ablate.py --recipe launch/recipes/fig5.yaml --only "C: PPO" --seeds 2     # a part, on another machine

A configuration is one line, NAME=COMMAND, where COMMAND is a command of launch/ with its options, and {base}, {sft} and
{puzzles} stand for what the demo stages made. COMMAND then COMMAND runs one after another: {model} is what the one before
made. Each run is a folder of its own, OUT/NAME/seed-S: the same command goes on where it was stopped, and several machines
can share OUT when each is given other runs.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.files import lock_folder, unlock_folder
from data.options import naming
from data.status.status import reporting
from eval.ablation.compare import read_arm, refuse_other_curves, refuse_other_puzzles, refuse_other_samples
from eval.ablation.made import Made, models_of, places, write_points
from eval.ablation.results import write_results
from eval.ablation.settings import (
    START,
    TRAINERS,
    AblateConfig,
    filled,
    folder_name,
    read_arms,
    record_commands,
    refuse_other_commands,
    refuse_test_puzzles,
)
from eval.demo.record import record_settings, refuse_another_start
from eval.demo.settings import DemoConfig, base_model, training_files
from eval.run_files import held_out_files, unfinished
from launch.demo import prepare, recipe_values, refuse_wrong_options, response_tokens
from launch.options import command, resolve
from launch.stages import begun, evaluate_files, read_stage, run_stage
from trainer.record.runfolder import FINISHED, FREE_ON_RESUME, list_checkpoints


@command(AblateConfig)
def main(config: AblateConfig) -> None:
    """Train, evaluate and compare configurations; write OUT/ablation.md, ablation.json and ablation.png."""
    arms = read_arms(config)
    demo = resolve(DemoConfig, [config.start_recipe] if config.start_recipe else [], {"out": config.start})
    out, start = Path(config.out), Path(config.start)
    paths = {"base": base_model(demo), "sft": start / "sft/model", "puzzles": training_files(demo)[0]}
    trained, values = refuse_wrong_words(arms, paths), values_of(arms)
    with naming("--start-recipe"):
        refuse_wrong_options(replace(demo, annotate=()))  # nothing is annotated here
        refuse_another_start(demo, recipe_values(demo), FREE_ON_RESUME if config.start_recipe else None)
    if built := paths["puzzles"].is_file():  # before the cold start, where that can be seen
        refuse_test_puzzles(trained, held_out_files(start))
    # all configurations of the first seed come first: they can be compared early
    runs = [(name, seed) for seed in config.seeds for name in arms if name in config.only or not config.only]
    folders = {name: {seed: out / folder_name(name) / f"seed-{seed}" for seed in config.seeds} for name in arms}
    refuse_other_commands({folders[name][seed]: (name, arms[name]) for name, seed in runs}, values)
    with reporting(out, config.notify, "run") as report:
        lock_folder(start)  # two machines must not build the start at once
        report.progress(0, len(runs))
        record_settings(demo, recipe_values(demo), anew=bool(config.start_recipe))
        prepare(demo)
        unlock_folder(start)
        files = held_out_files(start)
        if not built:
            refuse_test_puzzles(trained, files)
        every = [one for of in folders.values() for one in of.values()]
        refuse_other_puzzles(every, files, config.eval_puzzles)
        refuse_other_curves(every, files, config.curve_puzzles)
        for number, (name, seed) in enumerate(runs):
            report.progress(number, len(runs))
            folder, stage = folders[name][seed], f"{name}, seed {seed}"
            record_commands(folder, arms[name], values[name])
            made = run_arm(folder, stage, arms[name], seed, paths, config.checkpoints)
            evaluate_arm(config, folder, stage, made, files, response_tokens(demo))
        compared = [read_arm(*arm, [Path(file).stem for file in files]) for arm in folders.items()]
        text = write_results(out, compared, files, config.eval_puzzles)
        report.progress(len(runs), len(runs))
    print(f"\n{text}\ntables: {out / 'ablation.md'}\nfigure: {out / 'ablation.png'}")


def refuse_wrong_words(arms: dict[str, list[list[str]]], paths: dict[str, Path]) -> dict[str, list[str | None]]:
    """{name: the files of puzzles that it trains on}. Raises UserError for a command that would be refused in its turn."""
    trained: dict[str, list[str | None]] = {name: [] for name in arms}
    for name, commands in arms.items():
        for words in commands:
            verb, *given = filled(words, paths | {"model": paths["sft"]})
            with naming(f"--arms {name}: {verb}"):
                if verb != START:
                    trained[name].append(read_stage(verb, *given, out="out", seed=0).puzzles)
    return trained


def values_of(arms: dict[str, list[list[str]]]) -> dict[str, list[dict[str, Any]]]:
    """{name: the settings of each of its commands}, with those of their recipes, and without what may change on --resume."""
    read = {
        n: [vars(read_stage(*words, out="out", seed=0)) for words in of if words[0] != START] for n, of in arms.items()
    }
    free = FREE_ON_RESUME - {"steps", "decay_steps"}  # compared are finished runs: none gets more of them
    kept = {n: [{k: v for k, v in one.items() if k not in free} for one in of] for n, of in read.items()}
    return json.loads(json.dumps(kept, default=str))  # JSON's types, as in the record


def run_arm(
    folder: Path, stage: str, commands: list[list[str]], seed: int, paths: dict[str, Path], checkpoints: bool
) -> list[Made]:
    """Run the commands of a configuration with one seed, as far as that has not been done.

    Returns all models that they made; with checkpoints also those on the way.
    """
    made: list[Made] = []
    model = paths["sft"]
    for number, words in enumerate(commands, start=1):
        run, named = (folder, stage) if len(commands) == 1 else (folder / f"command-{number}", f"{stage}, {words[0]}")
        verb, *given = filled(words, paths | {"model": model})
        if verb != START:
            again = begun(run) if verb in TRAINERS else []  # selfdistill goes on by itself
            run_stage(named, run / FINISHED, verb, *again, *given, out=run, seed=seed)
        models = list_checkpoints(run) if verb in TRAINERS else [model]
        made += models_of(verb, run, models if checkpoints else models[-1:])
        model = made[-1].model
        if verb in TRAINERS and commands[number:]:  # a command starts from one checkpoint, not from an adapter on one
            # in float32 nothing of the adapter is rounded away
            one = {"model": model, "out": run / "merged", "dtype": "float32"}
            run_stage(f"{named}, merge", run / "merged/config.json", "export", **one)
            model = run / "merged"
    return made


def evaluate_arm(
    config: AblateConfig, folder: Path, stage: str, made: list[Made], files: list[str], longest: int
) -> None:
    """Evaluate every model of a configuration with one seed. longest: response tokens of a model that was not trained here."""
    folders = places(folder, made)
    for one, into in zip(made, folders, strict=True):
        # answers are cut where those of the training were
        cut = {"model": one.model, "max_response_tokens": one.longest or longest}
        evaluate_files(into, f"evaluate {stage}, {one.name}", files, config.eval_puzzles, **cut)
    if config.samples:
        into = folder / "samples"
        refuse_other_samples(into, config.samples)
        several = cut | {"samples": config.samples, "puzzles": files[0], "limit": config.eval_puzzles, "out": into}
        run_stage(f"sample {stage}", into / "metrics.json", "evaluate", *unfinished(into), **several)
    for checkpoint in list_checkpoints(folder) if config.curve_puzzles else ():
        at = folder / "curve" / checkpoint.name
        into = cut | {"model": checkpoint, "puzzles": files[0], "limit": config.curve_puzzles, "out": at}
        run_stage(f"{stage}, {checkpoint.name}", at / "metrics.json", "evaluate", *unfinished(at), **into)
    write_points(folder, made, folders)


if __name__ == "__main__":
    main()
