"""Train several configurations from one cold start with several seeds, and draw them side by side (Figure 5 of the paper).

    python launch/ablate.py --recipe launch/recipes/fig5.yaml
    python launch/ablate.py --recipe launch/recipes/fig5.yaml --only "C: PPO" --seeds 2     # a part, on another machine

A configuration is one line, NAME=COMMAND, where COMMAND is a command of launch/ with its options, and {base}, {sft} and
{puzzles} stand for what the demo stages made. Each run is a run folder of its own, OUT/NAME/seed-S: the same command
goes on where it was stopped, and several machines can share OUT when each is given other runs.
"""

import json
from pathlib import Path

from data.errors import UserError
from data.files import lock_folder, unlock_folder, write_whole
from data.puzzles import read_puzzles
from eval.ablation.compare import Arm, ablation_markdown, compare_arms, read_arm
from eval.ablation.figure import draw_arms
from eval.ablation.settings import AblateConfig, filled, folder_name, read_arms
from eval.run_files import held_out_files
from launch.demo import DemoConfig, base_model, evaluate_files, prepare, training_files
from launch.options import command, resolve
from launch.stages import begun, run_stage
from trainer.record.runfolder import FINISHED, list_checkpoints


@command(AblateConfig)
def main(config: AblateConfig) -> None:
    """Train, evaluate and compare configurations; write OUT/ablation.md, ablation.json and ablation.png."""
    commands = read_arms(config)
    demo = start_of(config)
    lock_folder(Path(config.start))  # two machines must not build the start at once
    prepare(demo)
    unlock_folder(Path(config.start))
    files = held_out_files(Path(config.start))
    paths = (base_model(demo), Path(config.start) / "sft/model", training_files(demo)[0])
    for seed in config.seeds:  # all configurations of the first seed come first: they can be compared early
        for name, words in commands.items():
            if name in config.only or not config.only:
                run_arm(config, name, [filled(word, paths) for word in words], seed, files)
    folders = {name: {seed: run_folder(config, name, seed) for seed in config.seeds} for name in commands}
    write_results(config, [read_arm(name, of_seed) for name, of_seed in folders.items()], files)


def start_of(config: AblateConfig) -> DemoConfig:
    """The settings of the demo stages that all configurations start from."""
    return resolve(DemoConfig, [config.start_recipe] if config.start_recipe else [], {"out": config.start})


def run_arm(config: AblateConfig, name: str, words: list[str], seed: int, files: list[str]) -> None:
    """Train and evaluate one configuration with one seed, as far as that has not been done."""
    run, stage, (verb, *given) = run_folder(config, name, seed), f"{name}, seed {seed}", words
    run_stage(stage, run / FINISHED, verb, *begun(run), *given, out=run, seed=seed)
    checkpoints = list_checkpoints(run)
    # answers are cut where those of the training were
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]
    tokens = {"max_response_tokens": settings["max_response_tokens"]}
    for checkpoint in checkpoints if config.curve_puzzles else ():
        folder = run / "curve" / checkpoint.name
        limits = {"puzzles": files[0], "limit": config.curve_puzzles, "out": folder}
        run_stage(
            f"{stage}, {checkpoint.name}", folder / "metrics.json", "evaluate", model=checkpoint, **limits, **tokens
        )
    evaluate_files(run / "eval", f"evaluate {stage}", files, config.eval_puzzles, model=checkpoints[-1], **tokens)


def run_folder(config: AblateConfig, name: str, seed: int) -> Path:
    return Path(config.out) / folder_name(name) / f"seed-{seed}"


def write_results(config: AblateConfig, arms: list[Arm], files: list[str]) -> None:
    """Write the tables, the numbers and the figure of all runs that are there, and print the tables."""
    out = Path(config.out)
    arms = [arm for arm in arms if arm.runs]
    if not arms:
        raise UserError(f"{out}: no configuration has run yet; run this command without --only")
    found = {}
    for file in files:
        puzzles = read_puzzles(file)[: config.eval_puzzles]
        found[Path(file).stem] = compare_arms(arms, Path(file).stem, puzzles)
    text = ablation_markdown(found, arms[0].name)
    write_whole(out / "ablation.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_whole(out / "ablation.md", text)
    draw_arms(arms, found, out / "ablation.png")
    print(f"\n{text}\ntables: {out / 'ablation.md'}\nfigure: {out / 'ablation.png'}")


if __name__ == "__main__":
    main()
