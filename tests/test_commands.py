"""How tests run commands: each command starts as a real process, and forked ones are what real ones are.

That a forked run of GRPO writes the bytes of a real one is seen in trainer/test_grpo.py, where a run is killed and resumed, and
for SFT in trainer/test_sft_run.py.
"""

import json
import os
import signal
import subprocess
import time

import pytest

from tests.helpers.commands import ROOT, run_command, start_command, succeed
from tests.helpers.forked import ENVIRONMENT, TIMEOUT, Command, can_fork, run_forked
from trainer.ranks.watch import is_gone

WHAT_A_SCRIPT_SEES = """
import json, os, random, signal, sys, threading
import numpy, torch
if __name__ == "__main__":
    seen = {
        "argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "env": dict(os.environ), "file": __file__,
        "main": sorted(name for name in vars(sys.modules["__main__"]) if name != "__warningregistry__"),
        "streams": [[s.encoding, s.line_buffering, s.isatty()] for s in (sys.stdin, sys.stdout, sys.stderr)],
        "stdin": sys.stdin.read(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "handlers": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD)],
        "threads": [threading.active_count(), torch.get_num_threads()],
        "draws": [random.random(), numpy.random.rand(), torch.rand(1).item()],
        "ours": sorted(name for name in sys.modules if name.split(".")[0] in ("data", "reward", "rollout", "trainer", "launch")),
        "flags": str(sys.flags), "umask": os.umask(0o22),
    }
    print(json.dumps(seen))
    print("and on standard error", file=sys.stderr)
"""
ENDINGS = {
    "pass": 0,
    "sys.exit(3)": 3,
    "sys.exit()": 0,
    "sys.exit('a sentence')": 1,
    "raise ValueError('wrong')": 1,
    "os._exit(7)": 7,
    "os.kill(os.getpid(), signal.SIGKILL)": -signal.SIGKILL,
    "os.kill(os.getpid(), signal.SIGTERM)": -signal.SIGTERM,
    "raise KeyboardInterrupt": -signal.SIGINT,
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)": 5,
    "threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()": 0,
    "atexit.register(print, 'at exit')": 0,
    "pathlib.Path('no such file').read_text()": 1,
}


forked_here = pytest.mark.skipif(not can_fork(), reason="commands are real processes here: see can_fork")
VERBS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if "__main__" in path.read_text())


@pytest.mark.slow(2)
@pytest.mark.parametrize("verb", VERBS)
def test_a_command_starts_as_a_user_starts_it(verb):
    helped = run_command(verb, "--help", fresh=True, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert helped.returncode == 0 and helped.stdout.startswith(f"Usage: {verb}.py "), helped.stderr[-2000:]
    loaded = {line.rpartition("|")[2].strip() for line in helped.stderr.splitlines()}
    assert "click" in loaded and not loaded & {"transformers", "peft", "vllm"}, "seconds before a word of help"
    wrong = run_command(verb, "--no-such-option")
    assert wrong.returncode == 2 and "No such option" in wrong.stderr and not wrong.stdout


@forked_here
@pytest.mark.vllm
@pytest.mark.slow(20)
def test_greedy_answers_of_a_forked_vllm_are_those_of_a_real_process(pipeline, tmp_path):
    given = ("--model", pipeline / "base", "--puzzles", pipeline / "puzzles/test.parquet", "--max-response-tokens", 24)
    for out, fresh in (("real", True), ("forked", False)):
        succeed("evaluate", *given, "--out", tmp_path / out, fresh=fresh)
    real, forked = ((tmp_path / out / "predictions.jsonl").read_bytes() for out in ("real", "forked"))
    assert real == forked and len(real.splitlines()) > 10


@pytest.fixture
def script(tmp_path):
    """script(text): the path of a Python file that holds it."""

    def write(text: str):
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    return write


@pytest.mark.slow(7)
@forked_here
def test_a_forked_script_sees_what_a_real_process_sees(script, tmp_path):
    path = script(WHAT_A_SCRIPT_SEES)
    more = {"env": {"OWN": "1"}, "cwd": tmp_path}
    real, forked, again = (run_command(path, "--word", "a b", **more, fresh=fresh) for fresh in (True, False, False))
    assert (real.returncode, real.stderr) == (forked.returncode, forked.stderr) == (0, "and on standard error\n")
    expected, seen = json.loads(real.stdout), json.loads(forked.stdout)
    draws = [expected.pop("draws"), seen.pop("draws"), json.loads(again.stdout)["draws"]]
    assert all(len(set(of_one_generator)) == 3 for of_one_generator in zip(*draws, strict=True))
    names = {name for name in {*expected["env"], *seen["env"]} if expected["env"].get(name) != seen["env"].get(name)}
    assert {name for name in names if name in expected["env"]} == set(), "what libraries set at import may come on top"
    del expected["env"], seen["env"]
    assert seen == expected


@pytest.mark.slow(2)
@forked_here
@pytest.mark.parametrize("line", ENDINGS)
def test_a_forked_script_ends_as_a_real_process_ends(script, line):
    path = script(
        f"import atexit, os, pathlib, signal, sys, threading, time\n\ndef end():\n    {line}\n\nprint('begun')\nend()\n"
    )
    real, forked = (run_command(path, fresh=fresh) for fresh in (True, False))
    assert real.returncode == forked.returncode == ENDINGS[line]
    assert (real.stdout, real.stderr) == (forked.stdout, forked.stderr)


@pytest.mark.slow(6)
@forked_here
def test_a_forked_command_can_be_watched_and_killed(script):
    running = start_command(script("import time\nprint('at work', flush=True)\ntime.sleep(1000)\n"))
    assert running.stdout.readline() == "at work\n" and running.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(0.1)
    running.send_signal(signal.SIGTERM)
    assert running.wait() == running.poll() == -signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(running.pid, 0)


WHAT_A_CHILD_SEES = """
import json, os, sys
seen = {"argv": sys.argv, "cwd": os.getcwd(), "own": os.environ.get("OWN"), "in": sys.stdin.read(), "name": __name__}
seen |= {"of": os.getppid() == int(os.environ["STARTED_BY"]), "leads": os.getsid(0) == os.getpid(), "path": sys.path[0]}
print(json.dumps(seen | {"has_torch": "torch" in sys.modules}))
print("said", file=sys.stderr)
sys.exit(3)
"""
STARTS_IT = """
import json, os, subprocess, sys
for words in ([sys.argv[1], "a b"], ["-u", "-m", "child"], ["-c", "import child", "a b"], ["-B", "-c", ""]):
    for more in ({"cwd": sys.argv[2]}, {"start_new_session": True}):
        env = os.environ | {"OWN": "1", "STARTED_BY": str(os.getpid()), "PYTHONPATH": os.path.dirname(sys.argv[1])}
        done = subprocess.run([sys.executable, *words], input="given", capture_output=True, text=True, env=env, **more)
        print(json.dumps([done.returncode, done.stdout, done.stderr]))
killed = subprocess.Popen([sys.executable, sys.argv[1]], stdin=subprocess.PIPE, env=env)
killed.kill()
print(json.dumps([killed.wait(), "", ""]))
"""


@pytest.mark.slow(4)
@forked_here
def test_what_a_forked_command_starts_is_forked_too_and_its_own_child(script, tmp_path):
    (tmp_path / "child.py").write_text(WHAT_A_CHILD_SEES)
    (tmp_path / "elsewhere").mkdir()
    words = (str(tmp_path / "child.py"), str(tmp_path / "elsewhere"))
    path = script(STARTS_IT)
    real = run_command(path, *words, fresh=True)
    forked = run_forked(
        [Command(script=path, arguments=words, cwd=ROOT, env=ENVIRONMENT, starts_others=True)], timeout=TIMEOUT
    )
    assert real.stderr == forked.stderr == ""
    expected, found = ([json.loads(line) for line in done.stdout.splitlines()] for done in (real, forked))
    assert [code for code, _, _ in expected] == [3, 3, 3, 3, 3, 3, 0, 0, -signal.SIGKILL]
    for mine, theirs in zip(expected, found, strict=True):
        assert (mine[0], mine[2]) == (theirs[0], theirs[2])
        sees, of_fork = (json.loads(text) if text else {} for text in (mine[1], theirs[1]))
        assert not sees or (sees.pop("has_torch"), of_fork.pop("has_torch"), sees["of"]) == (False, True, True)
        assert sees == of_fork


@pytest.mark.slow(3)
@forked_here
def test_a_command_that_hangs_is_killed_with_what_it_started(script):
    path = script(
        "import subprocess, time\nprint(subprocess.Popen(['sleep', '1000']).pid, flush=True)\ntime.sleep(1000)\n"
    )
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run_command(path, timeout=20)
    started, deadline = int(caught.value.output), time.monotonic() + 300
    while not is_gone(started):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow(2)
def test_ranks_have_torchruns_variables_and_a_failing_one_ends_the_others(script):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    # one write per rank: print writes the end of a line apart, and torchrun makes its ranks write at once
    path = script(f"import json, os\nos.write(1, (json.dumps([os.environ[n] for n in {names}]) + '\\n').encode())\n")
    for fresh in (True, False):
        rows = sorted(map(json.loads, run_command(path, ranks=2, fresh=fresh).stdout.splitlines()))
        assert [row[:5] for row in rows] == [["0", "0", "2", "2", "0"], ["1", "1", "2", "2", "0"]]
        assert rows[0][5:] == rows[1][5:]
    path = script("import os, sys, time\nsys.exit('rank 1 fails') if os.environ['RANK'] == '1' else time.sleep(1000)\n")
    began = time.monotonic()
    done = run_command(path, ranks=2)
    assert done.returncode == 1 and "rank 1 fails\n" in done.stderr and time.monotonic() - began < 900


@forked_here
def test_what_libraries_read_at_import_needs_a_real_process(script):
    path = script("import sys; print(sys.flags.utf8_mode)")
    with pytest.raises(AssertionError, match="PYTHONUTF8.*fresh=True"):
        run_command(path, env={"PYTHONUTF8": "1"})
    assert run_command(path, env={"PYTHONUTF8": "1"}, fresh=True).stdout == "1\n"
