"""Checkpoints: whole, checked, resumable; a damaged one is refused by name."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from trainer.config import GrpoConfig
from trainer.metrics import StepLog
from trainer.record.runfolder import (
    PENDING,
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    rewind,
    save_checkpoint,
    training_file,
)

ADAPTER = {"m.lora_A.weight": torch.arange(6.0).view(2, 3), "m.lora_B.weight": torch.ones(3, 2)}
MOMENTS = {"exp_avg/m": torch.full((2, 3), 0.5), "step/m": torch.tensor(4.0)}


def save(out, step, keep=2):
    saved = Checkpoint(step=step, adapter=ADAPTER, adapter_config={"r": 2}, moments=MOMENTS)
    return save_checkpoint(out, saved, keep)


def test_round_trip_and_only_the_newest_are_kept(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000004", "step-000006"]
    step, adapter, moments = load_checkpoint(list_checkpoints(tmp_path)[-1])
    assert step == 6
    torch.testing.assert_close(adapter, ADAPTER, rtol=0, atol=0)
    torch.testing.assert_close(moments, MOMENTS, rtol=0, atol=0)


def test_a_checkpoint_of_an_older_run_is_read(tmp_path):
    path = save(tmp_path, 2)
    for file in ("optimizer.safetensors", "pending.json"):
        (path / "training" / file).rename(path / file)
    state = json.loads((path / "state.json").read_text())
    state["crc32"] = {Path(name).name: crc for name, crc in state["crc32"].items()}
    (path / "state.json").write_text(json.dumps(state))
    torch.testing.assert_close(load_checkpoint(path)[2], MOMENTS, rtol=0, atol=0)
    assert training_file(path, PENDING) == path / "pending.json"


def test_a_half_written_checkpoint_is_not_seen_and_a_damaged_one_is_named(tmp_path):
    path = save(tmp_path, 2)
    (tmp_path / "checkpoints/step-000009.partial").mkdir()
    assert list_checkpoints(tmp_path) == [path]
    file = path / "training/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="optimizer.safetensors: damaged or missing"):
        load_checkpoint(path)


def test_rewind_drops_later_rows_and_a_torn_last_line(tmp_path):
    lines = [json.dumps({"step": step}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "rew']))
    rewind(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_tensorboard_gets_every_number_or_says_what_is_missing(tmp_path):
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(ValueError, match="--tensorboard: the package is not installed; pip install tensorboard"):
            GrpoConfig(tensorboard=True)
        return
    log = StepLog(tmp_path, GrpoConfig(tensorboard=True, steps=2), first_step=0)
    log.board.add_scalar("reward", 0.5, 1)
    log.close()
    assert [path.name.startswith("events.out.tfevents") for path in (tmp_path / "tensorboard").iterdir()] == [True]
