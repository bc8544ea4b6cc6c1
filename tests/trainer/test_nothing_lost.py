"""What a run folder goes through: two runs at once, other files under the same names, damage, full disks, the end of a run."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.commands import SMALL_GRPO, run_command, start_command, succeed

SMALL = (*SMALL_GRPO, "--engine", "torch", "--save-every", 2, "--reward-workers", 0)
REWARD = """
def fewer_letters(completion, puzzle):
    return -len(completion) / 50
"""


@pytest.fixture(scope="module")
def run(pipeline, tmp_path_factory) -> Path:
    """A folder with rewards.py, base/ (the model) and run/, a run of 4 steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "rewards.py").write_text(REWARD)
    shutil.copytree(pipeline / "base", folder / "base")
    shutil.copy(pipeline / "puzzles/train.parquet", folder)
    succeed("grpo", *words(folder), "--steps", 4)
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of the folder that a test may change. The names of the settings stay, relative to it."""
    shutil.copytree(run, tmp_path / "copy")
    record = tmp_path / "copy/run/config.json"
    settings = json.loads(record.read_text().replace(f'"{run}/', f'"{tmp_path / "copy"}/'))
    del settings["checksum"]
    record.write_text(json.dumps(settings))
    return tmp_path / "copy"


def words(folder: Path) -> tuple:
    given = ("--model", folder / "base", "--puzzles", folder / "train.parquet", "--out", folder / "run", *SMALL)
    return (*given, "--reward", f"{folder / 'rewards.py'}:fewer_letters")


def resume(folder: Path, *more: object, **kwargs):
    return run_command("grpo", *words(folder), "--resume", *more, **kwargs)


def refused(done, *says: str) -> None:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    for text in says:
        assert text in done.stderr, done.stderr[-2000:]


def metrics(folder: Path) -> list[bytes]:
    return (folder / "run/metrics.jsonl").read_bytes().splitlines()


# ---- two runs on one folder


@pytest.mark.slow(3)
def test_a_second_start_is_refused_while_a_run_lasts_and_not_after_a_kill(copy):
    first = start_command("grpo", *words(copy), "--resume", "--steps", 4000)
    while not first.stdout.readline().startswith("step 6/"):
        assert first.poll() is None
    refused(resume(copy, "--steps", 4000), f"{copy / 'run'}: another run is writing there (process {first.pid} on ")
    refused(run_command("grpo", *words(copy), "--steps", 4000), "another run is writing there")
    first.kill()
    first.wait()
    assert resume(copy, "--steps", 6).returncode == 0
    assert [json.loads(line)["step"] for line in metrics(copy)] == [1, 2, 3, 4, 5, 6]
    assert not (copy / "run/.lock").exists()


# ---- other files under the same names


def test_other_weights_under_the_same_name_are_refused(copy):
    weights = load_file(copy / "base/model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.001
    save_file(weights, copy / "base/model.safetensors", {"format": "pt"})
    refused(resume(copy, "--steps", 6), f"--resume: {copy / 'base/model.safetensors'} is another file")
    assert len(metrics(copy)) == 4


def test_another_tokenizer_is_refused_and_another_reward_is_said(copy):
    (copy / "base/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    refused(resume(copy, "--steps", 6), f"--resume: {copy / 'base/chat_template.jinja'} is ")
    shutil.rmtree(copy / "base")
    shutil.copytree(copy.parent / "copy/run", copy / "unused")  # a folder beside changes nothing
