"""What a run folder goes through: two runs at once, other files under the same names, damage, full disks, the end of a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.commands import ROOT, SMALL_GRPO, run_command, start_command, succeed

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
    shutil.copytree(run / "base", tmp_path / "base")
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
    made = len(metrics(copy)) + 2
    done = resume(copy, "--steps", made)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line)["step"] for line in metrics(copy)] == list(range(1, made + 1))
    assert not (copy / "run/.lock").exists()


# ---- other files under the same names


def test_other_weights_under_the_same_name_are_refused(copy):
    weights = load_file(copy / "base/model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.001
    save_file(weights, copy / "base/model.safetensors", {"format": "pt"})
    refused(resume(copy, "--steps", 6), f"--resume: {copy / 'base/model.safetensors'} is another file")
    assert len(metrics(copy)) == 4


@pytest.mark.slow(2)
def test_another_template_is_refused_and_another_reward_or_number_of_ranks_is_said(copy):
    (copy / "base/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    refused(resume(copy, "--steps", 6), f"--resume: {copy / 'base/chat_template.jinja'} is ")
    shutil.rmtree(copy / "base")
    shutil.copytree(copy.parent / "base", copy / "base")
    with open(copy / "rewards.py", "a") as handle:
        handle.write("# another line\n")
    done = resume(copy, "--steps", 6, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"note: the file of --reward {copy / 'rewards.py'}:fewer_letters was changed since" in done.stdout
    assert (
        f"note: {copy / 'run'} had 1 ranks that train and now has 2: sums are rounded in another order" in done.stdout
    )
    assert [json.loads(line)["step"] for line in metrics(copy)] == [1, 2, 3, 4, 5, 6]
    again = resume(copy, "--steps", 6, ranks=2)
    assert again.returncode == 0 and "was changed since" not in again.stdout and "had 1 ranks" not in again.stdout
    assert f"note: {copy / 'run'} has made all of its 6 steps already" in again.stdout


@pytest.mark.slow(2)
def test_fewer_steps_than_were_made_and_a_folder_without_its_record_are_refused(copy):
    before = metrics(copy)
    refused(resume(copy, "--steps", 3), f"--steps 3: {copy / 'run'} has made 4 steps already; give at least as many")
    record = copy / "run/config.json"
    text = record.read_text()
    sealed = json.loads(text) | {"checksum": "00000000"}
    for content, says in (
        (json.dumps(sealed), "was changed or damaged after it was written"),
        ("{}", "is no record of a run"),
        ("[]", "holds no JSON object"),
        ("", "damaged, not JSON"),
    ):
        record.write_text(content)
        refused(resume(copy, "--steps", 6), f"{record}: {says}")
    record.unlink()
    refused(run_command("grpo", *words(copy), "--steps", 6), "holds the steps of a run, though not its config.json")
    assert metrics(copy) == before


# ---- damage


@pytest.mark.slow(3)
def test_a_run_goes_on_from_the_last_whole_checkpoint_and_ends_with_the_bytes_of_the_unbroken_run(run, copy):
    """Step 4's checkpoint is damaged, and the last line of every file was cut off in the middle of a character."""
    succeed("grpo", *words(run), "--steps", 6, "--out", copy / "whole")
    damaged = copy / "run/checkpoints/step-000004"
    weights = bytearray((damaged / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "adapter_model.safetensors").write_bytes(weights)
    for name in ("metrics.jsonl", "timing.jsonl", "rollouts.jsonl"):
        with open(copy / "run" / name, "ab") as handle:
            handle.write(b'{"step": 5, "completion": "\xc3')
    done = resume(copy, "--steps", 6)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        f"note: {damaged / 'adapter_model.safetensors'}: missing, damaged or changed; --resume goes on from step-000002"
        in done.stderr
    )
    assert done.stderr.count("its last line was cut off, and is left out") == 3
    for name in ("metrics.jsonl", "rollouts.jsonl", "checkpoints/step-000006/adapter_model.safetensors"):
        assert (copy / "run" / name).read_bytes() == (copy / "whole" / name).read_bytes(), name


# ---- disks


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(KiB): an empty disk of that size, which goes with the test."""
    made = []

    def make(kib: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("making a disk needs root")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.slow(8)
@pytest.mark.parametrize("kib", [0, 12, 100, 300])
def test_a_full_disk_is_one_sentence_and_room_makes_the_run_whole(run, small_disk, kib):
    """The room ends in the first file, in the log of a step, and in a checkpoint; then the disk is made larger."""
    disk = small_disk(max(kib, 4))
    if kib == 0:
        (disk / "full").write_bytes(b"0" * 4096)
    given = (*words(run), "--out", disk / "run", "--steps", 4)
    done = run_command("grpo", *given)
    refused(done, f"Error: {disk / 'run'}", "cannot be written (No space left on device); make room")
    assert not list(disk.rglob("*partial*"))
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    again = ("--resume",) if (disk / "run/config.json").exists() else ()
    succeed("grpo", *given, *again)
    for name in ("metrics.jsonl", "rollouts.jsonl", "checkpoints/step-000004/adapter_model.safetensors"):
        assert (disk / "run" / name).read_bytes() == (run / "run" / name).read_bytes(), name


@pytest.mark.slow(2)
def test_a_read_only_disk_is_one_sentence(run, small_disk):
    disk = small_disk(100)
    (disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    done = run_command("grpo", *words(run), "--out", disk / "run", "--steps", 1)
    refused(done, f"Error: {disk / 'run'}: cannot be written (Read-only file system); make room")
    done = run_command("grpo", *words(run), "--out", disk / "other", "--steps", 1)
    refused(done, f"Error: {disk / 'other'}: cannot be written (Read-only file system); make room")


@pytest.mark.slow(2)
def test_standard_output_on_a_full_disk_is_one_sentence_too(run, small_disk):
    disk = small_disk(4)
    (disk / "full").write_bytes(b"0" * 4096)
    with open(disk / "log", "w") as log:
        command = [sys.executable, ROOT / "launch/grpo.py", *words(run), "--out", run / "logged", "--steps", 1]
        done = subprocess.run(list(map(str, command)), stdout=log, stderr=subprocess.PIPE, text=True, check=False)
    assert "cannot be written (No space left on device); make room or give permission" in done.stderr
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.slow(6)
@pytest.mark.parametrize(("rank", "kib"), [(4, 1400), (0, 3800)])
def test_a_cold_start_whose_model_does_not_fit_goes_on_when_there_is_room(pipeline, small_disk, rank, kib):
    """Its checkpoint fits and OUT/model does not; --resume then makes no step again."""
    disk = small_disk(kib)
    given = ("--traces", pipeline / "traces.jsonl", "--model", pipeline / "base", "--out", disk / "run", "--epochs", 1)
    given = (*given, "--batch-size", 32, "--lora-rank", rank)
    refused(run_command("sft", *given), f"Error: {disk / 'run/model'}: cannot be written (No space left on device)")
    assert not (disk / "run/model").exists() and not list(disk.rglob("*partial*"))
    before = (disk / "run/metrics.jsonl").read_bytes()
    status = status_of(disk / "run")
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 2, status["steps"])
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    succeed("sft", *given, "--resume")
    assert (disk / "run/metrics.jsonl").read_bytes() == before
    assert set(load_file(disk / "run/model/model.safetensors")) == set(load_file(pipeline / "base/model.safetensors"))


# ---- what the owner is told


def status_of(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


@pytest.mark.slow(4)
def test_the_owner_is_told_of_the_end_a_failure_and_a_kill(run, tmp_path):
    told = tmp_path / "told"
    (tmp_path / "bad.py").write_text("def fn(completion, puzzle):\n    raise LookupError('no such table')\n")
    notify = ("--notify", f'echo "$RUN_STATE $RUN_STEP/$RUN_STEPS $RUN_EXIT_CODE [$RUN_ERROR] $RUN_OUT" >> {told}')
    succeed("grpo", *words(run), "--out", tmp_path / "done", "--steps", 2, *notify)
    status = status_of(tmp_path / "done")
    assert (status["state"], status["step"], status["steps"], status["exit_code"]) == ("finished", 2, 2, 0)
    assert status["error"] == status["waiting_for"] == "" and status["seconds_left"] == 0
    timing = [json.loads(line) for line in (tmp_path / "done/timing.jsonl").read_text().splitlines()]
    assert status["seconds_per_step"] == pytest.approx(sum(row["timing_s/step"] for row in timing) / 2, abs=1e-3)

    bad = ("--reward", f"{tmp_path / 'bad.py'}:fn")
    refused(run_command("grpo", *words(run), "--out", tmp_path / "bad", "--steps", 2, *bad, *notify), "no such table")
    status = status_of(tmp_path / "bad")
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", None, 2)
    assert status["error"].startswith("step 1: --reward") and "no such table" in status["error"]

    process = start_command("grpo", *words(run), "--out", tmp_path / "killed", "--steps", 4000, *notify)
    while not process.stdout.readline().startswith("step 2/"):
        assert process.poll() is None
    # it is written before the line, and again with every step
    assert status_of(tmp_path / "killed")["step"] >= 2
    assert status_of(tmp_path / "killed")["state"] == "running"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 600
    while told.read_text().count("\n") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed = status_of(tmp_path / "killed")
    assert killed["state"] == "killed" and "--resume goes on from the newest checkpoint" in killed["error"]
    first, second, third = told.read_text().splitlines()
    assert first == f"finished 2/2 0 [] {tmp_path / 'done'}"
    assert second.startswith("failed / 2 [step 1: --reward") and second.endswith(str(tmp_path / "bad"))
    assert third.startswith("killed ") and third.endswith(str(tmp_path / "killed"))


@pytest.mark.slow(2)
def test_a_run_that_was_asked_to_stop_says_so(run, tmp_path):
    process = start_command("grpo", *words(run), "--out", tmp_path / "run", "--steps", 4000)
    while not process.stdout.readline().startswith("step 1/"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate()
    status = status_of(tmp_path / "run")
    assert process.returncode == 0 and (status["state"], status["exit_code"]) == ("stopped", 0)
    assert status["step"] == len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) < 4000
