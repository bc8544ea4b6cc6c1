"""Configurations compared: hand-made run folders with known answers, read, compared and drawn."""

import json
from pathlib import Path

import pytest
from PIL import Image

from data.errors import UserError
from data.puzzles import Puzzle, write_rows
from eval.ablation.compare import ablation_markdown, compare_arms, read_arm
from eval.ablation.figure import draw_arms
from eval.evaluation import puzzles_digest
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
    return [read_arm("A", first), read_arm("B", other)]


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
        arms[0] = read_arm("A", {0: tmp_path / "A/0"})
        assert arms[0].runs[0].curve == [(1, 0.25), (3, 0.5)]
    draw_arms(arms, {"test": compare_arms(arms, "test", PUZZLES)}, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == (1800, 585)
        blue, orange = (31, 131, 201), (224, 134, 0)
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
        assert blue in colours and (orange in colours or curve)
