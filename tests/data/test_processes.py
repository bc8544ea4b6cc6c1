"""Child processes: no variable of torchrun, our modules in reach, and no child that outlives its parent."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

import data.processes
from data.processes import (
    LAUNCHER_VARIABLES,
    STAGE_OF,
    Heap,
    control_groups,
    end_with_the_command_above,
    environment_without_launcher,
    free_memory,
    how_to_go_on,
    module_environment,
    provenance,
    usable_cores,
)
from tests.helpers.commands import ROOT

CHILD = """
import sys, time
import data.processes
if sys.argv[1] == "poll":  # as where the kernel cannot do it
    data.processes.sys = type("Elsewhere", (), {"platform": "elsewhere"})
    data.processes.POLL_SECONDS = 0.05
data.processes.end_with_parent(int(sys.argv[2]))
print("at work", flush=True)
time.sleep(60)
print("still there", flush=True)
"""
PARENT = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2], str(os.getpid())])
"""


def test_the_launchers_variables_are_gone(monkeypatch):
    for name in (*LAUNCHER_VARIABLES, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_PLAN", "stays")
    env = environment_without_launcher()
    assert env["MASTER_PLAN"] == "stays" and env["PATH"] == os.environ["PATH"]
    assert not [name for name in env if "RANK" in name or "WORLD_SIZE" in name or name.startswith("TORCHELASTIC")]
    assert "MASTER_ADDR" not in env and "MASTER_PORT" not in env
    assert os.environ["RANK"] == "1", "the process itself keeps them"


@pytest.mark.slow(2)
def test_they_are_those_that_torchrun_sets(tmp_path):
    """What torchrun adds to a process's environment is in the list, or is meant for every process."""
    script = tmp_path / "say.py"
    script.write_text("import os\nprint('\\n'.join(os.environ))\n")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", script]
    done = subprocess.run(words, env=environment_without_launcher(), capture_output=True, text=True, check=True)
    added = set(done.stdout.split()) - set(environment_without_launcher())
    assert set(LAUNCHER_VARIABLES) <= added
    others = {name for name in added - set(LAUNCHER_VARIABLES) if not name.startswith("TORCHELASTIC_")}
    assert {name for name in others if "RANK" in name or "MASTER" in name or "WORLD" in name} == set()


def test_a_module_of_ours_runs_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert module_environment()["PYTHONPATH"] == f"{ROOT}{os.pathsep}/elsewhere"
    monkeypatch.delenv("PYTHONPATH")
    assert module_environment()["PYTHONPATH"] == str(ROOT)
    words = [sys.executable, "-c", "import data.processes; print(data.processes.ROOT)"]
    done = subprocess.run(words, cwd=tmp_path, env=module_environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ROOT)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("by", ["kernel", "poll"])
def test_a_child_ends_with_its_parent(by, how):
    """Parent and child write to one pipe: it ends when the last of them has ended."""
    words = [sys.executable, "-c", PARENT, CHILD, by]
    with subprocess.Popen(words, env=module_environment(), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "at work\n"
        parent.send_signal(how)
        assert parent.wait() == -how
        assert parent.stdout.read() == ""


def test_a_child_that_comes_too_late_ends_at_once():
    """Its parent is not the process that it was told: that one has ended, and another has taken the child in."""
    words = [sys.executable, "-c", CHILD, "kernel", "1" if os.getpid() != 1 else "2"]
    done = subprocess.run(words, env=module_environment(), capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (1, "")


def test_nothing_happens_while_the_parent_lives():
    code = "from data.processes import end_with_parent; end_with_parent(int(__import__('sys').argv[1])); print('done')"
    words = [sys.executable, "-c", code, str(os.getpid())]
    done = subprocess.run(words, env=module_environment(), capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


HOLES = """
from data.processes import give_freed_memory_back, resident_bytes

kept = []
for _ in range(3):  # 40 blocks of 8 MiB, each with a small one behind it that stays; the first round's are mapped each by itself
    blocks = []
    for _ in range(40):
        blocks.append(bytes([1]) * (8 << 20))
        kept.append(bytes([1]) * (100 << 10))
    full = resident_bytes()
    del blocks
{given}
print(full - resident_bytes() >> 20)
"""


def test_freed_blocks_go_back_to_the_system():
    freed = {}
    for given in ("give_freed_memory_back()", ""):
        words = [sys.executable, "-c", HOLES.format(given=given)]
        freed[given] = int(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    always, never = freed.values()
    assert always > 300 and never < 200, f"MiB of 320: {freed}"


def test_memory_goes_back_only_once_the_process_has_grown(monkeypatch):
    """Beyond 1.25 of what it needed in the first step and a whole one after it; then what it needs is learned again."""
    given, free, now = [], [1000], [0.0]
    monkeypatch.setattr(data.processes, "give_freed_memory_back", lambda: given.append(heap.step))
    monkeypatch.setattr(data.processes, "free_memory", lambda: free[0])
    monkeypatch.setattr(data.processes.time, "monotonic", lambda: now[0])
    heap = Heap()

    def look(size: int, step: int = 0) -> int:
        monkeypatch.setattr(data.processes, "resident_bytes", lambda: size)
        now[0] += 2
        heap.enter(step) if step else heap.look()
        return len(given)

    assert look(500) == 0, "no step has begun: many rows are read"
    sizes = [(40, 7), (90, 7), (60, 8), (100, 0), (120, 9), (125, 0), (60, 10)]  # a run that goes on at step 7
    assert [look(*each) for each in sizes] == [1] * 7, "what loading has left, once"
    assert look(126) == 2 and given == [7, 10]
    assert [look(*each) for each in [(50, 10), (200, 11), (240, 12)]] == [2] * 3, "it needs more now"
    monkeypatch.setattr(data.processes, "resident_bytes", lambda: 251)
    heap.look()
    assert len(given) == 2, "it was looked at less than a second ago"
    assert look(251, 13) == look(900, 20) == 3, "no look in steps 13 and 14: what it needs is still to be learned"
    free[0] = 100
    assert look(800) == 3, "an eighth of its size is free"
    assert look(801) == 3, "too soon"
    now[0] += 20
    assert look(801) == 4
    assert look(1) == look(801) == 4


# ---- commands that run other commands

ABOVE = """
import signal, sys, threading
from data.processes import run_as_stage

def signal_itself():
    if sys.stdin.readline():
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

threading.Thread(target=signal_itself, daemon=True).start()
print(*run_as_stage([sys.executable, "-c", sys.argv[1]], {}), flush=True)
"""
STAGE = """
import os, time
from data.processes import STAGE_OF, end_with_the_command_above, how_to_go_on
end_with_the_command_above()
assert STAGE_OF not in os.environ and how_to_go_on() == "start the same command again to go on"
print(os.getpid(), flush=True)
time.sleep(600)
"""


def start_a_stage() -> tuple[subprocess.Popen, psutil.Process]:
    """A command, and the stage that it runs."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    above = subprocess.Popen([sys.executable, "-c", ABOVE, STAGE], text=True, cwd=ROOT, **pipes)
    return above, psutil.Process(int(above.stdout.readline()))


def test_a_stage_ends_with_the_command_above_it():
    above, stage = start_a_stage()
    above.kill()
    above.wait()
    stage.wait(600)  # raises when it lives on
    above.stdin.close()
    above.stdout.close()


@pytest.mark.parametrize("reaches", ["the thread that waits", "another thread"])
def test_a_request_to_stop_is_handed_on_to_the_stage(reaches):
    """One that reaches another thread does not end the wait, no more than one that comes just before it."""
    above, stage = start_a_stage()
    if reaches == "another thread":
        said, _ = above.communicate("now\n", timeout=300)
    else:
        above.terminate()
        said, _ = above.communicate(timeout=300)
    assert said.split() == [str(-signal.SIGTERM), str(int(signal.SIGTERM))] and above.returncode == 0
    assert not stage.is_running()


def test_a_command_of_its_own_is_told_of_resume(monkeypatch):
    monkeypatch.delenv(STAGE_OF, raising=False)
    end_with_the_command_above()
    assert how_to_go_on() == "add --resume to go on"


def test_a_machine_without_git_has_an_unknown_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance()["git_commit"] == "unknown" and "torch" in provenance()["versions"]


@pytest.mark.parametrize("new", [True, False])
def test_a_container_has_the_cores_and_the_memory_of_its_limits(monkeypatch, tmp_path, new):
    """docker --cpus 2 --memory 4g, or Kubernetes' limits: the machine's 64 cores and 500 GB are visible all the same."""
    monkeypatch.setattr(data.processes, "GROUPS", tmp_path)
    monkeypatch.setattr(data.processes, "MY_GROUPS", tmp_path / "mine")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=500 << 30))
    assert (usable_cores(), free_memory()) == (64, 500 << 30)  # no control groups
    (tmp_path / "mine").write_text("0::/pods/a\n" if new else "3:cpuacct,cpu:/pods/a\n2:memory:/pods/a\n1:pids:/\n")
    cpu, memory = (tmp_path, tmp_path) if new else (tmp_path / "cpu", tmp_path / "memory")

    def limit(folder, **files) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(f"{text}\n")

    if new:
        limit(cpu / "pods/a", cpu__max="max 100000", memory__max="max", memory__current=5)
        limit(cpu / "pods", cpu__max="250000 100000", memory__max=4 << 30, memory__current=3 << 30)
        limit(cpu / "pods", memory__stat=f"anon 1\ninactive_file {1 << 30}\nactive_file {1 << 30}")
    else:
        limit(cpu / "pods/a", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
        limit(cpu, cpu__cfs_quota_us=250000, cpu__cfs_period_us=100000)
        limit(memory, memory__limit_in_bytes=4 << 30, memory__usage_in_bytes=3 << 30)
        limit(memory, memory__stat=f"cache 1\ntotal_inactive_file {1 << 30}\ntotal_active_file {1 << 30}")
    assert (usable_cores(), free_memory()) == (3, 3 << 30)
    assert [folder for folder, _ in control_groups("cpu")] == [cpu / "pods/a", cpu / "pods", cpu]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    assert usable_cores() == 2
