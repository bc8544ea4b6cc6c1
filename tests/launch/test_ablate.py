"""launch/ablate.py: what is no configuration is refused; a real run of one, continued and drawn."""

import json
import shutil

import pytest

from tests.helpers.commands import SMALL_GRPO, run_command, succeed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--arms: name at least one configuration, or give --recipe launch/recipes/fig5.yaml"),
        (("--arms", "A=build --model x"), "'A=build --model x': write NAME=COMMAND, with one of grpo, ppo"),
        (("--arms", "grpo --model x"), "write NAME=COMMAND"),
        (("--arms", "A=grpo --model {sfd}"), "{sfd} is none of {base}, {sft} and {puzzles}"),
        (("--arms", "A b=grpo", "--arms", "A-b=grpo"), "another configuration has this name"),
        (("--arms", "A=grpo", "--only", "B"), "--only B: no such configuration; there are A"),
        (("--arms", "A=grpo 'x"), "No closing quotation"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path, words, says):
    done = run_command("ablate", "--out", tmp_path / "out", "--start", tmp_path / "start", *words)
    assert done.returncode == 2 and says in done.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())


@pytest.mark.vllm
@pytest.mark.slow(30)
def test_a_configuration_is_trained_evaluated_and_drawn(pipeline, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(pipeline, start)
    shutil.copytree(pipeline / "base", start / "sft/model")
    small = " ".join(map(str, SMALL_GRPO))
    words = ("--out", tmp_path / "out", "--start", start, "--seeds", 3, "--eval-puzzles", 4, "--arms")
    arm = f"A: one step=grpo --model {{sft}} --puzzles {{puzzles}} --steps 1 {small}"
    printed = succeed("ablate", *words, arm)
    run = tmp_path / "out/A-one-step/seed-3"
    assert json.loads((run / "config.json").read_text())["settings"]["seed"] == 3
    found = json.loads((tmp_path / "out/ablation.json").read_text())
    assert set(found) == {"test", "unseen"} and found["test"][0]["seeds"] == [3]
    assert "| A: one step | 1 |" in printed and (tmp_path / "out/ablation.png").is_file()
    again = succeed("ablate", *words, arm)
    assert f"[A: one step, seed 3] found {run / 'finished.json'}" in again
