"""status.json and --notify of the commands that do not train; tests/trainer/test_nothing_lost.py has those that do."""

import json
import signal
import threading
import time
from pathlib import Path

import pytest

from data.errors import UserError
from data.puzzles import Puzzle, read_puzzles
from data.status import status as told
from data.status.status import Report, reporting, without_notify
from eval.metrics import answer_of
from tests.helpers.clusters import TYPES, MarkerServer, clustered
from tests.helpers.commands import run_command, start_command, succeed
from tests.helpers.endpoints import Server
from tests.helpers.pipeline import BUILD


def notify(path: Path) -> tuple[str, str]:
    return "--notify", f'echo "$RUN_STATE $RUN_STEP/$RUN_STEPS $RUN_EXIT_CODE [$RUN_ERROR] $RUN_OUT" >> {path}'


def status_of(path: Path) -> dict:
    found = json.loads(path.read_text())
    assert list(found)[:4] == ["state", "unit", "step", "steps"]
    return found


def test_a_report_counts_what_is_done(tmp_path, monkeypatch):
    now, out = [1000.0], tmp_path / "traces.jsonl"
    monkeypatch.setattr(told.time, "monotonic", lambda: now[0])
    with reporting(out, "", "puzzle") as report:
        assert not list(tmp_path.iterdir())  # nothing is counted yet
        report.progress(10, 100)  # ten of an earlier run
        path = tmp_path / "traces.status.json"
        assert (status_of(path)["step"], status_of(path)["seconds_per_step"]) == (10, None)
        now[0] += 1
        report.progress(20, 100)  # too soon after the last time
        assert status_of(path)["step"] == 10
        now[0] += 4
        report.progress(30, 100)  # 20 in 5 s
        found = status_of(path)
        assert (found["state"], found["unit"], found["step"], found["steps"]) == ("running", "puzzle", 30, 100)
        assert (found["seconds_per_step"], found["seconds_left"]) == (0.25, 17.5)
        report.progress(100, 100)  # the last one is always written
        assert status_of(path)["step"] == 100
    found = status_of(path)
    assert (found["state"], found["exit_code"], found["seconds_left"], found["error"]) == ("finished", 0, 0.0, "")


def test_a_second_stage_of_a_command_has_its_own_rate(tmp_path, monkeypatch):
    """launch/annotate.py: 300 questions of screening, then 64 votes, a second each."""
    now, out = [1000.0], tmp_path / "out.h5ad"
    monkeypatch.setattr(told.time, "monotonic", lambda: now[0])
    with reporting(out, "", "question", beside=True) as report:
        for total, asked in ((300, 300), (64, 7)):
            for done in range(asked + 1):
                report.progress(done, total)
                now[0] += 1
        found = json.loads(next(tmp_path.glob("*.json")).read_text())
        assert found["seconds_per_step"] == 1 and found["seconds_left"] == found["steps"] - found["step"] > 50


def test_a_refusal_before_the_work_leaves_no_file(tmp_path):
    with pytest.raises(UserError), reporting(tmp_path / "o", "touch told", "cell"):
        raise UserError("no")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error, state, code, text",
    [
        (UserError("one\nsentence"), "failed", 2, "one sentence"),
        (RuntimeError("broken"), "failed", 1, "RuntimeError: broken"),
        (SystemExit(2), "failed", 2, "a stage failed, see what it printed"),
        (SystemExit(0), "finished", 0, ""),
    ],
)
def test_how_a_command_ended(tmp_path, error, state, code, text):
    with pytest.raises(type(error)), reporting(tmp_path / "rounds", "", "round") as report:
        report.progress(1, 2)
        raise error
    found = status_of(tmp_path / "rounds/status.json")
    assert (found["state"], found["exit_code"], found["error"]) == (state, code, text)


def test_a_command_that_is_asked_to_stop(tmp_path):
    report = Report(tmp_path / "puzzles", "", "cell", beside=True)
    report.progress(1, 2)
    report.stop(143)
    report.end(RuntimeError("too late"))
    found = status_of(tmp_path / "puzzles.status.json")
    assert (found["state"], found["exit_code"], found["error"]) == ("stopped", 143, "")


@pytest.mark.slow(8)
def test_build_and_distill_tell_their_owner(pipeline, tmp_path):
    said = tmp_path / "told"
    build = (pipeline / "atlas.h5ad", *BUILD, "--out", tmp_path / "puzzles", *notify(said))
    succeed("build", *build)
    found = status_of(tmp_path / "puzzles.status.json")
    assert (found["state"], found["unit"]) == ("finished", "cell") and found["step"] == found["steps"] > 100
    succeed("distill", "--puzzles", pipeline / "puzzles/test.parquet", "--out", tmp_path / "t.jsonl", *notify(said))
    puzzles = status_of(tmp_path / "t.status.json")
    assert (puzzles["state"], puzzles["unit"]) == ("finished", "puzzle")
    assert puzzles["step"] == puzzles["steps"] == len(read_puzzles(pipeline / "puzzles/test.parquet"))
    assert "notify" not in (tmp_path / "t.report.json").read_text()
    lines = said.read_text().splitlines()
    assert lines[0] == f"finished {found['step']}/{found['steps']} 0 [] {tmp_path / 'puzzles'}"
    assert lines[1] == f"finished {puzzles['step']}/{puzzles['steps']} 0 [] {tmp_path / 't.jsonl'}"


def answers(puzzles: Path, begun: threading.Event, hold: threading.Event) -> Server:
    """An endpoint that is right, and waits for `hold` from the third answer on."""

    def behave(number: int, of: Puzzle, asked: int) -> dict:
        if number > 2:
            begun.set()
            hold.wait(600)
        return {"content": answer_of(of.answer, f"Cell 1 has {of.cells[0][0]}.")}

    return Server(read_puzzles(puzzles), behave)


@pytest.mark.slow(10)
def test_evaluate_tells_of_an_end_and_a_kill_and_distill_of_a_stop(pipeline, tmp_path):
    said, puzzles = tmp_path / "told", pipeline / "puzzles/test.parquet"
    begun, hold = threading.Event(), threading.Event()
    server = answers(puzzles, begun, hold)
    asked = ("--puzzles", puzzles, "--model", "m", "--concurrency", 1, "--temperature", 1, *notify(said))
    words = (*asked, "--out", tmp_path / "eval", "--endpoint", server.url)
    process = start_command("evaluate", *words)
    assert begun.wait(600)
    # the second answer is saved after the messenger has been told of the first
    partial, deadline = tmp_path / "eval/predictions.partial.jsonl", time.monotonic() + 600
    while not (partial.is_file() and partial.read_bytes().count(b"\n") > 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert status_of(tmp_path / "eval/status.json")["state"] == "running"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 600
    while not (said.is_file() and said.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert said.read_text().startswith("killed ") and "the same command goes on, with --resume if" in said.read_text()
    assert status_of(tmp_path / "eval/status.json")["state"] == "killed"
    hold.set()
    succeed("evaluate", *words, "--resume")
    n = len(read_puzzles(puzzles))
    assert said.read_text().splitlines()[1] == f"finished {n}/{n} 0 [] {tmp_path / 'eval'}"

    begun.clear(), hold.clear()
    out = ("--out", tmp_path / "t.jsonl", "--teacher", "openai", "--base-url", server.url)
    process = start_command("distill", *asked, *out)
    assert begun.wait(600)
    process.send_signal(signal.SIGTERM)
    hold.set()
    assert process.wait(600) == 128 + signal.SIGTERM
    found = status_of(tmp_path / "t.status.json")
    assert (found["state"], found["exit_code"]) == ("stopped", 143)
    server.close()


@pytest.mark.slow(4)
def test_annotate_tells_its_owner(tmp_path):
    said, mine, server = tmp_path / "told", tmp_path / "mine.h5ad", MarkerServer()
    clustered(list(TYPES), parts=2).write_h5ad(mine)
    words = (mine, "--cluster-key", "leiden", "--out", tmp_path / "out.h5ad", "--model", "m", "--endpoint", server.url)
    succeed("annotate", *words, "--candidates", ",".join(TYPES), "--max-cells", 3, *notify(said))
    found = status_of(tmp_path / "out.status.json")
    assert (found["state"], found["unit"]) == ("finished", "question") and found["step"] == found["steps"] > 1
    assert said.read_text() == f"finished {found['step']}/{found['steps']} 0 [] {tmp_path / 'out.h5ad'}\n"
    refused = run_command("annotate", *words, "--candidates", ",".join(TYPES), "--max-cells", 3, *notify(said))
    assert refused.returncode == 2 and said.read_text().count("\n") == 1  # its answers are there: refused
    server.close()


def test_the_command_of_notify_is_in_no_record():
    words = ["annotate.py", "x.h5ad", "--notify", "curl -H SECRET", "--out", "o", "--notify=SECRET", "--seed", "1"]
    assert without_notify(words) == "annotate.py x.h5ad --out o --seed 1"
    assert without_notify(["a", "--notify", "--notify", "--out", "o"]) == "a --out o", (
        "its value may look like an option"
    )
