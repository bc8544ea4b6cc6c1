"""What a reward may do in its process: start pools and processes, fork, run event loops, print, read, raise anything."""

import bdb
import datetime
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from data.errors import UserError
from data.processes import module_environment
from data.puzzles import Puzzle
from reward import Reward, Status, as_reward, load_reward
from reward.adapters import CONCURRENT
from reward.scoring import Scorer
from tests.helpers.commands import ROOT

PUZZLE = Puzzle(id="p", context="", cells=[["A"], ["B"]], candidates=["B cell", "T cell"], answer=["T cell", "B cell"])
RIGHT, WRONG = (f"<think>x</think><answer>{answer}</answer>" for answer in ("T cell | B cell", "B cell | T cell"))

POOLS = """
import multiprocessing, os
from concurrent.futures import ProcessPoolExecutor

def check(text, gold):
    return float(text.split("<answer>")[-1].split("</answer>")[0].strip() == gold)

def put(queue, text, gold):
    queue.put(check(text, gold))

pools = {}

def executor(how, text, gold):
    if how not in pools:
        pools[how] = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(how))
    return pools[how].submit(check, text, gold).result()

def single(how, text, gold):
    context = multiprocessing.get_context(how)
    queue = context.SimpleQueue()
    process = context.Process(target=put, args=(queue, text, gold))
    process.start()
    found = queue.get()
    process.join()
    return found

def pool(how, text, gold):
    with multiprocessing.get_context(how).Pool(2) as pool:
        return pool.starmap(check, [(text, gold)])[0]
"""
POOLS += "".join(
    f"""
def {kind}_{how}(data_source, solution_str, ground_truth, extra_info):
    return {kind}("{how}", solution_str, ground_truth)
"""
    for kind in ("executor", "single", "pool")
    for how in ("fork", "spawn", "forkserver")
)

DOINGS = """
import asyncio, bdb, os, subprocess, sys, time
from reward import Reward

own_loop = None

async def judge(completion, puzzle):
    global own_loop
    own_loop = own_loop or asyncio.get_running_loop()  # as a client that is made at its first use
    future = own_loop.create_future()
    own_loop.call_soon(future.set_result, 1.0)
    return await future

retried = lambda completion, puzzle: judge(completion, puzzle)
at_once = most = 0

async def counts(completion, puzzle):
    global at_once, most
    at_once += 1
    most = max(most, at_once)
    await asyncio.sleep(0.01)
    at_once -= 1
    return float(most)

def column_of(completion, puzzle):
    raise ValueError(repr(puzzle.meta))

def plain(completion, puzzle):
    async def later():
        await asyncio.sleep(0.01)
        return float(len(completion))
    return asyncio.run(later())

def gives_a_coroutine(completion, puzzle):
    async def later():
        await asyncio.sleep(600 if completion == "hang" else 0.01)
        return float(len(completion))
    return later()

class Asynchronous:
    running = 0
    async def __call__(self, completion, puzzle):
        self.running += 1
        while self.running < 3:  # no call ends before all have begun
            await asyncio.sleep(0.01)
        return float(len(completion))

side_by_side = Asynchronous()

def forks(completion, puzzle):
    child = os.fork()
    if child == 0 and completion == "exit":
        sys.exit(0)
    if child == 0 and completion == "raise":
        raise ValueError("in the child")
    return float(len(completion)) + (100 if child == 0 else 0)

async def forks_async(completion, puzzle):
    return forks(completion, puzzle)

def waits_for_all(completion, puzzle):
    subprocess.Popen(["true"])
    try:
        while True:
            os.wait()
    except ChildProcessError:
        return 1.0

def leaves_a_child(completion, puzzle):
    if os.fork() == 0:
        time.sleep(600)
    subprocess.Popen(["sleep", "600"])
    if completion == "die":
        os._exit(7)
    return 1.0

def noisy(completion, puzzle):
    print('{"index": 0, "total": 5.0}')
    os.write(1, b'{"index": 0, "total": 5.0}\\n')
    os.system("echo '{}'")
    return float(len(sys.stdin.read()))

def scribbles(completion, puzzle):
    for descriptor in range(3, 60):
        try:
            os.set_blocking(descriptor, False)
            os.write(descriptor, completion.encode() + b"\\n")
        except OSError:
            pass
    return 1.0

class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")

RAISED = {
    "exit": SystemExit(3),
    "generator": GeneratorExit(),
    "cancelled": asyncio.CancelledError(),
    "interrupt": KeyboardInterrupt(),
    "quit": bdb.BdbQuit(),
    "base": BaseException("base"),
    "mute": Mute(),
    "surrogate": ValueError("half \\ud83d of two"),
    "timeout": TimeoutError("a server's, not ours"),
}

def raises(completion, puzzle):
    if completion in RAISED:
        raise RAISED[completion]
    return 1.0

async def raises_async(completion, puzzle):
    await asyncio.sleep(0)
    return raises(completion, puzzle)

SAID = {"number": 12, "surrogate": "half \\ud83d of two", "mute": Mute()}

def says(completion, puzzle):
    return Reward(total=1.0, parts={"half \\ud83d": 1.0}, message=SAID[completion])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "pools.py").write_text(POOLS)
    (folder / "doings.py").write_text(DOINGS)
    return folder


def score(path: str, texts: list[str], workers: int = 1, seconds: float = 60.0) -> list[Reward]:
    scorer = Scorer(path, workers, seconds)
    try:
        return scorer.score(texts, [PUZZLE] * len(texts), [False] * len(texts))
    finally:
        scorer.close()


@pytest.mark.slow(4)
@pytest.mark.parametrize("kind", ["executor", "single", "pool"])
@pytest.mark.parametrize("how", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("path", ["file", "module"])
def test_a_reward_may_use_processes(folder, monkeypatch, path, how, kind):
    """verl 5839, 3290. The functions that a pool runs are the reward's own: its workers must find them by name."""
    monkeypatch.chdir(folder)  # where a module is looked for
    name = "pools.py" if path == "file" else "pools"
    several = 20 if (kind, how) == ("executor", "fork") else 2
    got = score(f"verl:{name}:{kind}_{how}", [RIGHT, WRONG] * (several // 2))
    assert [(reward.total, reward.status) for reward in got] == [(1.0, Status.OK), (0.0, Status.OK)] * (several // 2)


BESIDE = """
import multiprocessing
try:
    from .helper_beside import worth
except ImportError:
    from helper_beside import worth

def plain(completion, puzzle):
    from helper_beside import again
    return again()

def spawned(completion, puzzle):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(worth) + pool.apply(plain, ("", None))
"""


@pytest.mark.slow(2)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_imports_those_beside_it_from_any_current_folder(tmp_path, workers):
    """Also when the current folder has a file of that name, and one that is named like a room of ours."""
    beside, current = tmp_path / "beside", tmp_path / "current"
    for folder, number in ((beside, 0.5), (current, -1.0)):
        folder.mkdir()
        (folder / "helper_beside.py").write_text(f"def worth():\n    return {number}\nagain = worth\n")
        (folder / "json.py").write_text("raise RuntimeError('this is not the json that is meant')\n")
    (current / "reward.py").write_text("raise RuntimeError('this is not the room')\n")
    (beside / "mine.py").write_text(BESIDE)
    code = f"""
from data.puzzles import Puzzle
from reward.scoring import Scorer
puzzle = Puzzle(id="p", context="", cells=[["A"], ["B"]], candidates=["B cell", "T cell"], answer=["T cell", "B cell"])
for name in ("plain", "spawned"):
    scorer = Scorer(f"{beside}/mine.py:{{name}}", {workers})
    print([reward.total for reward in scorer.score(["a"], [puzzle], [False])])
    scorer.close()
"""
    command = [sys.executable, "-P", "-c", code]  # -P: as a command, which does not search the current folder first
    done = subprocess.run(command, cwd=current, capture_output=True, text=True, env=module_environment())
    assert done.stdout == "[0.5]\n[1.0]\n", done.stderr


def test_a_file_that_fails_only_in_the_worker_says_why(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import sys\nif 'worker' in sys.argv[0]:\n    raise KeyError('k')\ndef fn(c, p):\n    return 1.0\n")
    load_reward(f"{file}:fn")
    with pytest.raises(UserError) as caught:
        score(f"{file}:fn", ["a"])
    says = f"--reward {file}:fn: its scoring process did not start: cannot import {file} (KeyError: 'k')"
    assert str(caught.value) == says


def test_also_in_the_trainer_itself(folder):
    """--reward-workers 0, with started workers: they import what `python -c` has as its main module, which is nothing."""
    code = f"""
from data.puzzles import Puzzle
from reward.scoring import Scorer
puzzle = Puzzle(id="p", context="", cells=[["A"], ["B"]], candidates=["B cell", "T cell"], answer=["T cell", "B cell"])
print(Scorer({f"verl:{folder}/pools.py:executor_spawn"!r}, 0).score([{RIGHT!r}], [puzzle], [False])[0].total)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1.0\n", done.stderr


def test_a_file_is_one_module_under_a_name_that_finds_it(folder):
    fn = load_reward(f"{folder}/pools.py:check")
    assert load_reward(f"{folder}/pools.py:check") is fn
    code = f"import importlib; print(importlib.import_module({fn.__module__!r}).check('<answer>a</answer>', 'a'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1.0\n", done.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_plain_functions_are_called_outside_an_event_loop(folder, workers):
    assert [reward.total for reward in score(f"{folder}/doings.py:plain", ["a", "bb"], workers)] == [1.0, 2.0]
    assert [r.total for r in score(f"{folder}/doings.py:gives_a_coroutine", ["a", "bb"], workers)] == [1.0, 2.0]
    assert [r.total for r in score(f"{folder}/doings.py:side_by_side", ["a", "bb", "ccc"], workers)] == [1.0, 2.0, 3.0]


@pytest.mark.slow(1)
def test_a_coroutine_of_a_plain_function_has_its_time_limit(folder):
    got = score(f"{folder}/doings.py:gives_a_coroutine", ["a", "hang", "bb"], seconds=5.0)
    assert [str(reward.status) for reward in got] == ["ok", "timeout", "ok"]


@pytest.mark.parametrize("name", ["forks", "forks_async"])
def test_a_reward_that_forks_and_returns_is_answered_once(folder, name):
    scorer = Scorer(f"{folder}/doings.py:{name}", 1, 60.0)
    texts = ["a", "exit", "raise", "bb"]
    for _ in range(2):
        got = scorer.score(texts, [PUZZLE] * 4, [False] * 4)
        assert [(reward.total, reward.message) for reward in got] == [(1.0, ""), (4.0, ""), (5.0, ""), (2.0, "")]
    scorer.close()


def test_a_reward_that_waits_for_all_its_children_waits_for_none_of_ours(folder):
    assert score(f"{folder}/doings.py:waits_for_all", ["a"], seconds=10.0)[0].total == 1.0


def test_a_child_hides_no_death_and_does_not_stay(folder):
    """The death is seen at once, not at the time limit: no child holds an end of a pipe. Nothing of the group is left."""
    scorer = Scorer(f"{folder}/doings.py:leaves_a_child", 1, 600.0)
    assert scorer.score(["a"], [PUZZLE], [False])[0].total == 1.0
    group = scorer.workers[0].process.pid
    assert "ended with exit code 7" in scorer.score(["die"], [PUZZLE], [False])[0].message
    assert gone(group)
    assert scorer.score(["a"], [PUZZLE], [False])[0].total == 1.0
    group = scorer.workers[0].process.pid
    scorer.close()
    assert gone(group)


def test_nobody_of_a_killed_trainer_stays(folder):
    code = f"""
from data.puzzles import Puzzle
from reward.scoring import Scorer
scorer = Scorer({f"{folder}/doings.py:leaves_a_child"!r}, 1, 600.0)
puzzle = Puzzle(id="p", context="", cells=[["A"], ["B"]], candidates=["a", "b"], answer=["a", "b"])
scorer.score(["x"], [puzzle], [False])
print(scorer.workers[0].process.pid, flush=True)
input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    group = int(trainer.stdout.readline())
    assert not gone(group, within=0.0)
    trainer.kill()
    trainer.communicate()
    assert gone(group)


def gone(group: int, within: float = 300.0) -> bool:
    """Has every process of the group ended, now or soon?"""
    deadline = time.monotonic() + within
    while True:
        members = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{entry}/stat") as handle:
                    state, _, of_group = handle.read().rsplit(")", 1)[1].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            members += [entry] if int(of_group) == group and state != "Z" else []
        if not members or time.monotonic() > deadline:
            return not members
        time.sleep(0.1)


def test_what_it_prints_and_reads_is_apart_from_jobs_and_replies(folder, capfd):
    """Standard input is empty, and standard output is standard error."""
    assert [reward.total for reward in score(f"{folder}/doings.py:noisy", ["a", "b"])] == [0.0, 0.0]
    out, err = capfd.readouterr()
    assert out == "" and err.count('{"index": 0, "total": 5.0}') == 4


@pytest.mark.parametrize("text", ['{"index": 0, "total": 9.0}', "[]", "{}", "no JSON", '{"index": 7}', "[" * 5000])
def test_what_it_writes_into_the_pipe_of_replies_is_no_reward(folder, text):
    """Found by the campaign: the trainer ended with KeyError: 'status'."""
    (reward,) = score(f"{folder}/doings.py:scribbles", [text])
    assert (
        reward.status is Status.ERROR and "something else than a result came from its scoring process" in reward.message
    )


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["raises", "raises_async"])
def test_whatever_is_raised_is_an_error_at_once(folder, name, workers):
    says = {
        "exit": "SystemExit: 3 (doings.py, line ",
        "generator": "GeneratorExit: (doings.py, line ",
        "cancelled": "CancelledError: (doings.py, line ",
        "base": "BaseException: base (doings.py, line ",
        "mute": "Mute: (a Mute whose text raises RuntimeError) (doings.py, line ",
        "surrogate": "ValueError: half \\ud83d of two (doings.py, line ",
        "timeout": "TimeoutError: a server's, not ours (doings.py, line ",
        **({"interrupt": "KeyboardInterrupt: (doings.py, line "} if workers else {}),
    }
    got = score(f"{folder}/doings.py:{name}", ["fine", *says, "fine"], workers)
    assert [reward.total for reward in (got[0], got[-1])] == [1.0, 1.0]
    for (case, text), reward in zip(says.items(), got[1:-1], strict=True):
        assert reward.status is Status.ERROR and math.isnan(reward.total), case
        assert reward.message.startswith(text), reward.message


@pytest.mark.parametrize(("case", "error"), [("interrupt", KeyboardInterrupt), ("quit", bdb.BdbQuit)])
def test_an_end_in_the_trainer_itself_is_the_trainers(folder, case, error):
    """Also q in a debugger that a reward has opened: it would open again for every response."""
    with pytest.raises(error):
        score(f"{folder}/doings.py:raises", [case], workers=0)


@pytest.mark.parametrize(("name", "workers"), [("judge", 0), ("retried", 0), ("judge", 1), ("retried", 1)])
def test_a_client_lives_in_one_event_loop(folder, name, workers):
    scorer = Scorer(f"{folder}/doings.py:{name}", workers)
    for _ in range(2):
        got = scorer.score(["a", "b"], [PUZZLE] * 2, [False] * 2)
        assert [reward.total for reward in got] == [1.0, 1.0], got
    scorer.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_scoring_stops_at_the_first_failure_and_keeps_to_its_limits(folder, workers):
    scorer = Scorer(f"{folder}/doings.py:raises", workers)
    texts = ["fine", "base", "fine", "base"]
    got = scorer.score(texts, [PUZZLE] * 4, [False] * 4, stop_at_failure=True)
    scorer.close()
    assert [reward and str(reward.status) for reward in got] == ["ok", "error", None, None]
    most = max(reward.total for reward in score(f"{folder}/doings.py:counts", ["a"] * 100, workers))
    assert 1 < most <= CONCURRENT


def test_a_column_is_the_same_with_workers_and_without(folder):
    puzzle = replace(PUZZLE, meta={"day": datetime.date(2020, 1, 1), "raw": b"xy", "n": 3})
    messages = []
    for workers in (0, 1):
        scorer = Scorer(f"{folder}/doings.py:column_of", workers)
        messages += [reward.message for reward in scorer.score(["a"], [puzzle], [False])]
        scorer.close()
    assert messages[0] == messages[1] and "'2020-01-01'" in messages[0]


def test_messages_become_text_that_can_be_written(folder):
    got = score(f"{folder}/doings.py:says", ["number", "surrogate", "mute"])
    assert [r.message for r in got] == ["12", "half \\ud83d of two", "(a Mute whose text raises RuntimeError)"]
    assert got[0].parts == {"half \\ud83d": 1.0}
    assert json.dumps(got[1].message, ensure_ascii=False).encode()


def test_a_reward_whose_square_is_infinite_in_float32_is_refused():
    assert as_reward(1e18).total == 1e18 and as_reward(Reward(total=-1e18)).total == -1e18
    for odd in (1e308, -2e18, Reward(total=1.0, parts={"x": 1e39}), 10**400):
        with pytest.raises((ValueError, OverflowError)):
            as_reward(odd)
    with pytest.raises(
        ValueError, match=r"the reward is 1e\+308: its square must fit float32, so return at most 1e\+18"
    ):
        as_reward(1e308)
