"""Configurations compared: hand-made run folders with known answers, read, compared and drawn."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from data.errors import UserError
from data.puzzles import Puzzle, write_puzzles, write_rows
from eval.ablation.compare import (
    compare_arms,
    points_of,
    read_arm,
    refuse_other_curves,
    refuse_other_puzzles,
    refuse_other_samples,
    variety,
)
from eval.ablation.figure import colour_of, draw_accuracy, draw_arms, draw_panel
from eval.ablation.made import Made, models_of, places, read_points, write_points
from eval.ablation.results import write_results
from eval.ablation.tables import ablation_markdown, line
from eval.evaluation import puzzles_digest
from eval.report.figures import drawn_png
from tests.helpers.endpoints import puzzle

PUZZLES = [puzzle(number) for number in range(4)]


def made_run(folder: Path, right: list[bool], rewards: list[float], puzzles: list[Puzzle] = PUZZLES) -> Path:
    """A run folder whose model was right on some puzzles and kept no format on the others."""
    answers = [
        f"<think>a</think><answer>{' | '.join(p.answer)}</answer>" if ok else "no"
        for p, ok in zip(puzzles, right, strict=True)
    ]
    rows = [{"id": p.id, "prediction": text} for p, text in zip(puzzles, answers, strict=True)]
    (folder / "eval/test").mkdir(parents=True)
    write_rows(folder / "eval/test/predictions.jsonl", rows)
    (folder / "eval/test/metrics.json").write_text(json.dumps({"puzzles": {"digest": puzzles_digest(puzzles)}}))
    steps = [{"step": k + 1, "reward": r, "completions/mean_length": 10 * r} for k, r in enumerate(rewards)]
    write_rows(folder / "metrics.jsonl", steps)
    return folder


@pytest.fixture
def arms(tmp_path):
    first = {
        0: made_run(tmp_path / "A/0", [True, True, True, False], [0.0, 1.0, 1.0]),
        1: made_run(tmp_path / "A/1", [True, True, False, False], [0.0, 0.5, 0.8]),
    }
    other = {0: made_run(tmp_path / "B/0", [True, False, False, False], [-1.0, -1.0]), 1: tmp_path / "B/1"}
    return [read_arm("A", first, ["test"]), read_arm("B", other, ["test"])]


def test_means_over_seeds_and_the_paired_difference(arms):
    a, b = compare_arms(arms, "test", PUZZLES)
    assert a["seeds"] == [0, 1] and b["seeds"] == [0], "a seed that has not run is left out"
    assert a["by_seed"]["batch_accuracy"] == [0.75, 0.5] and a["metrics"]["batch_accuracy"] == 0.625
    assert b["metrics"]["batch_accuracy"] == 0.25 == b["metrics"]["format_validity"]
    assert "against" not in a and b["against"]["batch_accuracy"]["difference"] == pytest.approx(0.25 - 0.625)
    low, high = b["against"]["batch_accuracy"]["interval"]
    # of 4 puzzles: both always right on the first, both wrong on the last, B worse on the two between
    assert -1 <= low < -0.375 < high <= 0
    table = ablation_markdown({"test": [a, b]}, "A")
    assert "| A | 2 | 0.625 [" in table and "| 0.750, 0.500 |" in table and "| -0.375 [" in table


def test_runs_that_answered_other_puzzles_are_refused(arms):
    with pytest.raises(UserError, match="evaluated on other puzzles than the other runs; remove .*eval and run again"):
        compare_arms(arms, "test", PUZZLES[:3])


@pytest.mark.parametrize("curve", [False, True])
def test_the_figure_is_a_picture_with_every_configuration(arms, tmp_path, curve):
    if curve:
        for step, share in ((1, 0.25), (3, 0.5)):
            folder = tmp_path / f"A/0/curve/step-{step:06d}"
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps({"batch_accuracy": share}))
        arms[0] = read_arm("A", {0: tmp_path / "A/0"}, ["test"])
        assert arms[0].runs[0].curve == [(1, 0.25), (3, 0.5)]
    draw_arms(arms, {"test": compare_arms(arms, "test", PUZZLES)}, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == (1800, 585)
        blue, orange = (31, 131, 201), (224, 134, 0)
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
        assert blue in colours and (orange in colours or curve)


def test_one_checkpoint_is_a_dot_and_the_label_says_how_many_puzzles(arms, tmp_path):
    folder = tmp_path / "A/0/curve/step-000020"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"batch_accuracy": 0.5, "n_puzzles": 2}))
    arms[0] = read_arm("A", {0: tmp_path / "A/0"}, ["test"])
    rows = compare_arms(arms, "test", PUZZLES)
    with drawn_png(tmp_path / "one.png", width=5, height=4) as figure:
        axes = figure.subplots()
        draw_accuracy(axes, arms, rows, "test")
        (line,) = axes.get_lines()
        assert line.get_marker() == "o" and line.get_ydata().tolist() == [0.5]
        assert axes.get_ylabel() == "batch accuracy on 2 test puzzles"


def test_the_reward_of_all_answers_is_compared(arms, tmp_path):
    rows = [{"step": k, "reward": 0.5, "dynamic_sampling/reward": 0.8, "completions/mean_length": 1} for k in (1, 2)]
    write_rows(tmp_path / "A/0/metrics.jsonl", rows)
    arms[0] = read_arm("A", {0: tmp_path / "A/0"}, ["test"])
    with drawn_png(tmp_path / "reward.png", width=5, height=4) as figure:
        axes = figure.subplots()
        draw_panel(axes, arms, "reward", "mean reward")
        assert axes.get_lines()[0].get_ydata().tolist() == [0.8, 0.8]


def test_many_configurations_have_a_bar_and_a_colour_each(arms, tmp_path):
    many = [dataclasses.replace(arms[number % 2], name=f"rank {number}, rate 3e-3, alpha 16") for number in range(18)]
    rows = [
        {"name": arm.name, "metrics": {"batch_accuracy": 0.5}, "by_seed": {"batch_accuracy": [0.5]}}
        | {"intervals": {"batch_accuracy": [0.4, 0.6]}}
        for arm in many
    ]
    draw_arms(many, {"test": rows}, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == (1800, 954)  # higher, so that 18 rows of text fit
    assert len({tuple(colour_of(number, 18)) for number in range(18)}) == 18


# ---- commands one after another, and rounds


def made_points(folder: Path, taught: dict) -> Path:
    """One seed of a configuration of two models: 1 and then 3 of the 4 puzzles right, for 100 and 250 tokens more."""
    made_run(folder / "first", [True, False, False, False], [])
    made_run(folder, [True, True, True, False], [])
    (folder / "first/eval").rename(folder / "first/of")
    (folder / "models").mkdir()
    (folder / "first/of").rename(folder / "models/01")
    models = [
        Made(name="grpo", model=folder, sampled=100, longest=8),
        Made(name="round 1", model=folder, sampled=250, longest=8, taught=taught),
    ]
    write_points(folder, models, [folder / "models/01", folder / "eval"])
    return folder


@pytest.fixture
def chain(tmp_path):
    start = made_run(tmp_path / "S/0", [True, False, False, False], [])
    write_points(start, [Made(name="start", model=start, sampled=0, longest=None)], [start / "eval"])
    folders = {seed: made_points(tmp_path / f"C/{seed}", {"workflow": share}) for seed, share in ((0, 0.5), (1, 0.7))}
    return [read_arm("S", {0: start}, ["test"]), read_arm("C", folders, ["test"])]


def test_models_of_a_chain_with_what_they_cost(chain):
    assert [(point.name, point.sampled) for point in chain[1].runs[0].points] == [("grpo", 100), ("round 1", 350)]
    first, second = points_of(chain[1], "test", PUZZLES)
    assert (first["value"], first["sampled"], first["taught"]) == (0.25, 100, {})
    assert second["value"] == 0.75 and second["by_seed"] == [0.75, 0.75] and second["sampled"] == 350
    assert (
        second["taught"] == {"workflow": pytest.approx(0.6)} and second["interval"][0] < 0.75 <= second["interval"][1]
    )
    start, row = compare_arms(chain, "test", PUZZLES)
    assert start["sampled"] == 0 and row["sampled"] == 350 and row["metrics"]["batch_accuracy"] == 0.75
    text = ablation_markdown({"test": [start, row]}, "S")
    assert "| against S | sampled tokens |" in text and "| C | round 1 | 350 | 0.750 [" in text
    assert "| workflow |" in text and "| 0.600 |" in text


def test_a_folder_of_an_older_version_has_no_points(arms):
    assert read_points(Path("nowhere")) == [] and all(not run.points for arm in arms for run in arm.runs)
    rows = compare_arms(arms, "test", PUZZLES)
    assert all("sampled" not in row for row in rows) and "sampled tokens" not in ablation_markdown({"test": rows}, "A")


def test_accuracy_by_size_is_of_the_puzzles_of_this_size(chain):
    (start, _) = compare_arms(chain, "test", PUZZLES)
    sizes = {str(len(p.cells)) for p in PUZZLES}
    assert set(start["by_size"]) == sizes
    if len(sizes) == 1:
        assert start["by_size"][min(sizes)] == 0.25


def test_how_different_answers_are(chain, tmp_path):
    """Three answers each: to puzzle 0 one right and two equal wrong ones, to the others none of a valid format."""
    right = f"<think>a</think><answer>{' | '.join(PUZZLES[0].answer)}</answer>"
    wrong = f"<think>a</think><answer>{' | '.join(['x'] * len(PUZZLES[0].answer))}</answer>"
    rows = [
        {
            "id": PUZZLES[0].id,
            "samples": [right, wrong, wrong.upper().replace("THINK", "think").replace("ANSWER", "answer")],
        }
    ]
    rows += [{"id": p.id, "samples": ["no", "neither", "no"]} for p in PUZZLES[1:]]
    folder = tmp_path / "S/0/samples"
    folder.mkdir()
    write_rows(folder / "predictions.jsonl", rows)
    (folder / "metrics.json").write_text("{}")
    arm = read_arm("S", {0: tmp_path / "S/0"}, ["test"])
    found = variety(arm, PUZZLES)
    assert found == {"k": 3, "distinct": (2 + 1 + 1 + 1) / 4, "right_once": 0.25, "mean": pytest.approx(1 / 3 / 4)}
    assert variety(chain[1], PUZZLES) is None


def test_other_numbers_of_answers_are_not_compared(chain, tmp_path):
    write_rows(tmp_path / "test.jsonl", [p.to_row() for p in PUZZLES])
    for name, seeds, k in (("S", 1, 3), ("C", 2, 2)):
        for seed in range(seeds):
            folder = tmp_path / f"{name}/{seed}/samples"
            folder.mkdir()
            write_rows(folder / "predictions.jsonl", [{"id": p.id, "samples": ["no"] * k} for p in PUZZLES])
            (folder / "metrics.json").write_text(json.dumps({"k_sample": {"k": k}}))
    arms = [read_arm(arm.name, {run.seed: run.evaluated.parent for run in arm.runs}, ["test"]) for arm in chain]
    with pytest.raises(UserError, match="have 2 to 3 answers to a puzzle in samples/"):
        write_results(tmp_path, arms, [str(tmp_path / "test.jsonl")], 4)
    with pytest.raises(UserError, match="--samples 8: .*S/0/samples holds 3 answers to each puzzle; give 3"):
        refuse_other_samples(tmp_path / "S/0/samples", 8)
    refuse_other_samples(tmp_path / "S/0/samples", 3)
    refuse_other_samples(tmp_path / "S/0/nothing", 3)


def test_a_curve_is_of_the_same_puzzles_everywhere(tmp_path):
    file = tmp_path / "test.jsonl"
    write_rows(file, [p.to_row() for p in PUZZLES])
    at = tmp_path / "S/0/curve/step-000001"
    at.mkdir(parents=True)
    (at / "metrics.json").write_text(json.dumps({"puzzles": {"digest": puzzles_digest(PUZZLES[:2])}}))
    refuse_other_curves([tmp_path / "S/0", tmp_path / "S/1"], [str(file)], 2)
    refuse_other_curves([tmp_path / "S/0"], [str(file)], 0)
    with pytest.raises(
        UserError, match="--curve-puzzles 4: .*step-000001 was evaluated on other puzzles of .*; give the"
    ):
        refuse_other_curves([tmp_path / "S/1", tmp_path / "S/0"], [str(file)], 4)


def test_a_seed_that_is_being_evaluated_elsewhere_is_left_out(arms, tmp_path):
    """B is evaluated on one of the two splits so far."""
    a, b = (read_arm(name, {0: tmp_path / f"{name}/0"}, ["test", "unseen"]) for name in "AB")
    assert not a.runs and not b.runs
    shutil.copytree(tmp_path / "A/0/eval/test", tmp_path / "A/0/eval/unseen")
    assert read_arm("A", {0: tmp_path / "A/0"}, ["test", "unseen"]).runs
    for split in ("test", "unseen"):
        write_rows(tmp_path / f"{split}.jsonl", [p.to_row() for p in PUZZLES])
    files = [str(tmp_path / f"{split}.jsonl") for split in ("test", "unseen")]
    both = [read_arm(name, {0: tmp_path / f"{name}/0"}, ["test", "unseen"]) for name in "AB"]
    assert "| A |" in (text := write_results(tmp_path, both, files, 4)) and "| B |" not in text


def test_tokens_of_a_run_and_of_rounds(tmp_path):
    settings = {"prompts_per_step": 4, "group_size": 3, "max_response_tokens": 16}
    grpo, rounds = tmp_path / "grpo", tmp_path / "rounds"
    for folder, content in ((grpo, {"settings": settings}), (rounds, {"max_response_tokens": 9})):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(content))
    lengths = [{"step": 1, "completions/mean_length": 10.5}, {"step": 2, "completions/mean_length": 4.0}]
    lengths[1]["dynamic_sampling/num_gen_batches"] = 2.0  # twice as many were sampled as were trained on
    write_rows(grpo / "metrics.jsonl", lengths)
    (made,) = models_of("grpo", grpo, [grpo / "x"])
    assert (made.name, made.sampled, made.longest, made.model) == ("grpo", 10.5 * 12 + 2 * 4 * 12, 16, grpo / "x")
    part, last = models_of("grpo", grpo, [grpo / "step-000001", grpo / "step-000002"])
    assert (part.name, part.sampled, part.partial) == ("grpo, step 1", 126, True)
    assert (last.name, last.sampled, last.partial) == ("grpo", 96, False)
    where = [place.relative_to(grpo).as_posix() for place in places(grpo, [part, last, made])]
    assert where == ["models/01-step-000001", "models/01", "eval"]
    write_points(grpo, [part, last], places(grpo, [part, last]))
    assert [(p.name, p.sampled, p.partial) for p in read_points(grpo)] == [
        ("grpo, step 1", 126, True),
        ("grpo", 222, False),
    ]
    rows = [{"round": 0}, {"round": 1, "acceptance": 0.5}, {"round": 2, "acceptance": 0.6, "workflow": 0.7}]
    (rounds / "rounds.json").write_text(json.dumps(rows))
    for number in (1, 2):
        (rounds / f"round-{number}").mkdir()
        report = {"tokens": {"prompt": 9, "completion": 100 * number}}
        (rounds / f"round-{number}/traces.report.json").write_text(json.dumps(report))
    first, second = models_of("selfdistill", rounds, [tmp_path])
    assert (first.name, first.sampled, first.taught) == ("round 1", 100, {"acceptance": 0.5})
    assert (second.sampled, second.longest, second.taught["workflow"]) == (200, 9, 0.7)
    assert second.model == rounds / "round-2/sft/model"


def test_the_figure_of_rounds_shows_the_start_and_every_model(chain, tmp_path):
    write_rows(tmp_path / "test.jsonl", [p.to_row() for p in PUZZLES])
    text = write_results(tmp_path, chain, [str(tmp_path / "test.jsonl")], 4)
    assert (tmp_path / "ablation.md").read_text() == text
    with Image.open(tmp_path / "ablation.png") as image:
        assert image.size == (1800, 720)
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
        assert (31, 131, 201) in colours, "the first configuration that trains"


def test_a_name_with_a_bar_or_a_dollar_stays_in_its_cell_and_can_be_drawn(tmp_path):
    assert re.split(r"(?<!\\)\|", line("beta 0|1", "3"))[1:-1] == [r" beta 0\|1 ", " 3 "]
    with drawn_png(tmp_path / "a.png", width=2, height=2) as figure:
        figure.add_subplot().set_title(r"$\foo$ costs $10")
    assert (tmp_path / "a.png").is_file()


def test_models_of_the_seeds_are_paired_by_their_step(tmp_path):
    """A seed that was stopped by SIGTERM and went on has a checkpoint more. Of both seeds, step k is right in k / 40."""
    for seed, steps in ((0, [10, 20, 30]), (1, [10, 13, 20, 30])):
        folder = tmp_path / f"seed-{seed}"
        models = [
            Made(name=f"grpo, step {k}", model=Path(f"step-{k:06d}"), sampled=10, longest=8, partial=True)
            for k in steps
        ]
        models.append(Made(name="grpo", model=Path("step-000040"), sampled=10, longest=8))
        where = places(folder, models)
        for place, k in zip(where, [*steps, 40], strict=True):
            made = made_run(tmp_path / f"made-{seed}-{k}", [i < k // 10 for i in range(4)], [0.0])
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(made / "eval", place)
        write_points(folder, models, where)
    arm = read_arm("A", {seed: tmp_path / f"seed-{seed}" for seed in (0, 1)}, ["test"])
    assert [row["by_seed"] for row in points_of(arm, "test", PUZZLES)] == [[k / 4] * 2 for k in (1, 2, 3, 4)]


def test_every_evaluation_of_a_run_is_of_the_same_puzzles(tmp_path):
    """Not that of eval/ alone: the samples, and the models of the rounds, would be refused after all runs."""
    write_puzzles(tmp_path / "test.jsonl", PUZZLES)
    for place in ("samples", "models/01/test"):
        folder = tmp_path / place.partition("/")[0]
        (folder / place).mkdir(parents=True)
        (folder / place / "metrics.json").write_text(json.dumps({"puzzles": {"digest": puzzles_digest(PUZZLES[:2])}}))
        refuse_other_puzzles([folder], [str(tmp_path / "test.jsonl")], 2)
        with pytest.raises(UserError, match=f"--eval-puzzles 4: {folder}/.* was evaluated on other puzzles"):
            refuse_other_puzzles([folder], [str(tmp_path / "test.jsonl")], 4)


def test_a_run_without_its_checkpoints_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint of its run"):
        models_of("grpo", tmp_path, [])
