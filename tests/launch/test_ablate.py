"""launch/ablate.py: what is no configuration is refused; a real run of one, continued and drawn."""

import dataclasses
import json
import shutil

import pytest

from data.errors import UserError
from data.puzzles import read_puzzles, write_puzzles
from eval.ablation.settings import refuse_test_puzzles
from eval.run_files import held_out_files
from tests.helpers.commands import SMALL_GRPO, run_command, succeed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--arms: name at least one configuration, or give --recipe launch/recipes/fig5.yaml"),
        (
            ("--arms", "A=build --model x"),
            "'A=build --model x': write NAME=COMMAND, with one of grpo, ppo, selfdistill",
        ),
        (("--arms", "A=grpo --model {sft} then"), "write NAME=COMMAND"),
        (("--arms", "A=start then grpo --model {model}"), "write NAME=COMMAND"),
        (("--arms", "A=grpo then selfdistill --model {sft}"), "command 2 would not go on from command 1"),
        (("--arms", "grpo --model x"), "write NAME=COMMAND"),
        (("--arms", "A=grpo --model {sfd}"), "{sfd} is none of {base}, {sft}, {puzzles}, {model}"),
        (("--arms", "A b=grpo", "--arms", "A-b=grpo"), "another configuration has this name"),
        (("--arms", "A=grpo", "--only", "B"), "--only B: no such configuration; there are 'A'"),
        (("--arms", "A=start", "--seeds", 1, "--seeds", 1), "--seeds: 1 is named twice"),
        (
            ("--arms", "A=grpo --model {sft} --puzzles {puzzles} --steps 0"),
            "--arms A: grpo: --steps 0: must be at least 1",
        ),
        (("--arms", "A=grpo --modle {sft}"), "--arms A: grpo: No such option"),
        (
            ("--arms", "A=selfdistill --model {sft} --puzzles p.jsonl --rounds x"),
            "--arms A: selfdistill: Invalid value",
        ),
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
    status = json.loads((tmp_path / "out/status.json").read_text())
    assert (status["state"], status["unit"], status["step"], status["steps"]) == ("finished", "run", 1, 1)
    told = ("--notify", f'echo "$RUN_STATE $RUN_EXIT_CODE $RUN_STEP" > {tmp_path / "told"}')
    done = run_command(
        "ablate", *words, arm, "--arms", "B=grpo --model {sft} --puzzles {puzzles} --max-prompt-tokens 1", *told
    )
    assert done.returncode == 2 and (tmp_path / "told").read_text().startswith("failed 2 ")


@pytest.mark.vllm
@pytest.mark.slow(180)
@pytest.mark.timeout(3600)  # a dozen processes, one after the other
def test_commands_run_one_after_another_from_the_model_before(pipeline, tmp_path):
    """The start as it is, which has the format; a step of GRPO, then a round from the merged model."""
    start = tmp_path / "start"
    shutil.copytree(pipeline, start)
    learn = "--lora-rank 0 --batch-size 8"
    cold = (*learn.split(), "--traces", start / "traces.jsonl", "--model", start / "base", "--out", start / "sft")
    succeed("sft", *cold, "--epochs", 25, "--lr", 3e-3, "--holdout", 0)
    small = " ".join(map(str, SMALL_GRPO))
    learn += " --lr 1e-3 --candidates 2 --limit 24 --max-response-tokens 64"
    learn += " --accept reward.cellpuzzles:mixed_reward --accept-at 0.3"
    chain = (
        f"A chain=grpo --model {{sft}} --puzzles {{puzzles}} --steps 1 {small} "
        f"then selfdistill --model {{model}} --puzzles {{puzzles}} --rounds 1 {learn}"
    )
    words = ("--out", tmp_path / "out", "--start", start, "--seeds", 3, "--eval-puzzles", 4, "--samples", 2)
    words = (*words, "--arms", "SFT=start", "--arms", chain)
    printed = succeed("ablate", *words, timeout=3000)
    run = tmp_path / "out/A-chain/seed-3"
    assert f"--model {run}/command-1/merged" in printed, "the round begins at the merged model"
    points = json.loads((run / "points.json").read_text())
    assert [point["name"] for point in points] == ["grpo", "round 1"]
    assert [point["evaluated"] for point in points] == ["models/01", "eval"]
    metrics = [json.loads(line) for line in (run / "command-1/metrics.jsonl").read_text().splitlines()]
    sampled = json.loads((run / "command-2/round-1/traces.report.json").read_text())["tokens"]["completion"]
    assert points[0]["sampled"] == round(metrics[0]["completions/mean_length"] * 12)
    assert sampled > 0 and points[1]["sampled"] == points[0]["sampled"] + sampled
    found = json.loads((tmp_path / "out/ablation.json").read_text())
    assert [row["sampled"] for row in found["test"]] == [0, points[1]["sampled"]]
    assert found["varieties"]["SFT"]["k"] == 2 and "### test: every model" in printed
    assert (tmp_path / "out/ablation.png").is_file()
    again = succeed("ablate", *words)
    for name in ("command-1/finished.json", "command-1/merged/config.json", "command-2/finished.json"):
        assert f"found {run / name}" in again


def test_an_arm_that_trains_on_test_puzzles_is_refused(pipeline, tmp_path):
    test, sft = str(pipeline / "puzzles/test.parquet"), tmp_path
    paths = {"base": sft, "sft": sft, "puzzles": pipeline / "puzzles/train.parquet"}
    files = held_out_files(pipeline)
    refuse_test_puzzles({"A": [["grpo", "--puzzles", "{puzzles}"], ["selfdistill", "--model={model}"]]}, paths, files)
    for words in (["--puzzles", test], [f"--puzzles={test}"]):
        arms = {"A": [["grpo", "--puzzles", "{puzzles}"], ["selfdistill", *words]]}
        with pytest.raises(UserError, match=r"--arms A: it would train on puzzle test-\d+ of .*, which is test-"):
            refuse_test_puzzles(arms, paths, files)
    with pytest.raises(UserError, match="--arms B: .*unseen"):  # under another id too
        renamed = tmp_path / "renamed.jsonl"
        puzzles = read_puzzles(pipeline / "puzzles/unseen.parquet")
        write_puzzles(renamed, [dataclasses.replace(p, id=f"mine-{i}") for i, p in enumerate(puzzles)])
        refuse_test_puzzles({"B": [["grpo", "--puzzles", str(renamed)]]}, paths, files)
