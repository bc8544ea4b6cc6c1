"""--log: each library's own client gets every number, offline, and none can stop a run. A library that is missing is skipped."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.errors import UserError
from tests.helpers.commands import ROOT
from trainer.config import LOGGERS, GrpoConfig
from trainer.record import steplog
from trainer.record.steplog import Loggers

WRITES = """
import sys
from pathlib import Path
from trainer.config import GrpoConfig
from trainer.record.steplog import Loggers

name, out, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
log = Loggers(out, GrpoConfig(log=name, lr=0.125, notify="mail secret"), first)
for step in (first + 1, first + 2):
    log.write(step, {"step": step, "reward": step / 4, "status/ok": 1.0, "adapter_hash": "ab", "none": None})
assert list(log.open) == [name]
log.close()
assert list(log.open) == [name], "closing failed"
"""


def without_accounts() -> dict[str, str]:
    """The environment without what a library would send numbers with, or to."""
    return {
        name: value for name, value in os.environ.items() if name.split("_")[0] not in ("WANDB", "TRACKIO", "MLFLOW")
    }


def written(name: str, out: Path, **env: str) -> None:
    """Two processes, as a run and its continuation: steps 1 and 2, then 3 and 4."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    out.mkdir()
    for first in (0, 2):
        done = subprocess.run(
            [sys.executable, "-c", WRITES, name, str(out), str(first)],
            cwd=out.parent,
            env={**without_accounts(), "PYTHONPATH": str(ROOT), **env},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]


VALUES = [0.25, 0.5, 0.75, 1.0]


@pytest.mark.slow(8)
def test_tensorboard(tmp_path):
    written("tensorboard", tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert found.Tags()["scalars"] == ["reward", "status/ok"]
    assert [(event.step, event.value) for event in found.Scalars("reward")] == list(enumerate(VALUES, start=1))


def records(content: bytes) -> list[bytes]:
    """The records of wandb's transaction log: LevelDB's log format after a head of 7 bytes, in blocks of 32 KB."""
    found, parts, at = [], b"", 7
    while at + 7 <= len(content):
        if 0x8000 - at % 0x8000 < 7:  # no record begins in the last bytes of a block
            at += 0x8000 - at % 0x8000
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        if kind in (1, 4):  # whole, or the last part
            found, parts = [*found, parts], b""
        at += 7 + length
    return found


@pytest.mark.slow(12)
def test_wandb_without_a_key_writes_offline(tmp_path):
    written("wandb", tmp_path / "run", HOME=str(tmp_path), NETRC=str(tmp_path / "netrc"))
    from wandb.proto import wandb_internal_pb2

    rows, names = [], set()
    for path in sorted((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")):
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                names.add(record.run.run_id)
                settings = {item.key: item.value_json for item in record.run.config.update}
                assert settings["lr"] == "0.125" and "notify" not in settings
            if record.WhichOneof("record_type") == "history":
                keys = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
                rows.append((keys["_step"], keys["reward"], keys["status/ok"]))
    assert rows == [(step, value, 1.0) for step, value in enumerate(VALUES, start=1)]
    assert len(names) == 1, "a resumed run goes on under its name"


@pytest.mark.slow(12)
def test_trackio(tmp_path):
    written("trackio", tmp_path / "run", TRACKIO_DIR=str(tmp_path / "trackio"))
    look = (
        "import json, trackio; (run,) = trackio.Api().runs('cellpuzzles'); from trackio.sqlite_storage import SQLiteStorage;"
        "print(json.dumps([(r['step'], r['reward']) for r in SQLiteStorage.get_logs('cellpuzzles', run.name) if 'reward' in r]))"
    )
    env = {**without_accounts(), "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run([sys.executable, "-c", look], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [[step, value] for step, value in enumerate(VALUES, start=1)]


@pytest.mark.slow(20)
def test_mlflow(tmp_path):
    written("mlflow", tmp_path / "run")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'run/mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("cellpuzzles").experiment_id])
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "reward")] == list(
        enumerate(VALUES, start=1)
    )
    assert run.info.status == "FINISHED" and run.data.params["lr"] == "0.125" and "notify" not in run.data.params


def test_a_logger_that_fails_is_said_once_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    got = []

    def broken_later(out, settings, first_step, names):
        def log(step, numbers):
            if step == 2:
                raise ConnectionError("no route to host")
            got.append(("wandb", step))

        return log, lambda: got.append("wandb closed")

    def broken_at_once(out, settings, first_step, names):
        sys.exit("no account")

    def sound(out, settings, first_step, names):
        return (lambda step, numbers: got.append((step, numbers))), (lambda: got.append("closed"))

    openers = {"tensorboard": sound, "wandb": broken_later, "trackio": broken_at_once}
    monkeypatch.setattr(steplog, "LOGGERS", openers)
    cfg = GrpoConfig()
    object.__setattr__(cfg, "log", "wandb,trackio,tensorboard,wandb")  # unchecked: the packages need not be here
    loggers = Loggers(tmp_path, cfg, first_step=0)
    for step in (1, 2, 3):
        loggers.write(step, {"step": step, "reward": 0.5, "adapter_hash": "x"})
    loggers.close()
    assert got == [("wandb", 1), (1, {"reward": 0.5}), (2, {"reward": 0.5}), (3, {"reward": 0.5}), "closed"]
    said = "".join(capsys.readouterr())
    assert said.count("note: --log wandb failed and gets no more numbers of this run, which goes on") == 1
    assert "(ConnectionError: no route to host)" in said and f"all are in {tmp_path}/metrics.jsonl" in said
    assert said.count("note: --log trackio failed") == 1 and "SystemExit: no account" in said


def test_names_are_checked_and_a_missing_package_is_refused():
    assert GrpoConfig().loggers == ()
    with pytest.raises(UserError, match="--log wandb,mlfow: 'mlfow' is not one of tensorboard, wandb, trackio, mlflow"):
        cfg = GrpoConfig()
        object.__setattr__(cfg, "log", "wandb,mlfow")
        cfg.__post_init__()
    for name in LOGGERS:
        if importlib.util.find_spec(name) is None:
            with pytest.raises(UserError, match=f"--log {name}: the package is not installed; pip install {name}"):
                GrpoConfig(log=name)
        else:
            assert GrpoConfig(log=f"{name}, {name}", tensorboard=name == "tensorboard").loggers == (name,)


def test_names_that_are_damaged_are_made_anew(tmp_path, capsys):
    (tmp_path / "loggers.json").write_text("{")
    names = steplog.names_of_run(tmp_path)
    assert set(names) == {"wandb", "mlflow"} and "loggers.json is damaged" in capsys.readouterr().err
    assert steplog.names_of_run(tmp_path) == names and not capsys.readouterr().err
