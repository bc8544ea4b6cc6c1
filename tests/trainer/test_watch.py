"""Verdicts of the watch on beats it might hear; the whole of it, with real processes, is tested in test_nodes.py."""

import os
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from rollout import RunError
from rollout.link import Address
from tests.helpers.commands import ROOT, free_port
from trainer.ranks import watch as watching
from trainer.ranks import world as world_of_ranks
from trainer.ranks.watch import JOIN_SECONDS, LATE_SECONDS, SILENT_LOOKS, Beat, Watch, is_gone, stacks
from trainer.ranks.world import World
from trainer.start.sampler import START, _notice


@pytest.fixture
def watch():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    watch = Watch(store, rank=0, size=3, hang_seconds=60)
    yield watch
    watch.close()


def test_a_run_that_was_suspended_does_not_hang(watch, monkeypatch):
    """Slurm's SUSPEND, or SIGSTOP: the clock goes on, and all ranks would be found stuck when they go on."""
    watch.close()  # its thread must not look at the clock meanwhile
    began = watch.since = watch.beaten = watching.time.monotonic()
    for second, seconds in ((1, 1), (3601, 11), (3602, 12), (3670, 22)):
        monkeypatch.setattr(watching.time, "monotonic", lambda at=began + second: at)
        watch.publish()
        assert watch.me.seconds == pytest.approx(seconds)
    monkeypatch.setattr(watching.time, "monotonic", lambda: began + 9000)
    watch.advance()  # before the first heartbeat after another pause
    watch.publish()
    assert watch.me.seconds == 0


def beat(rank: int, **more) -> Beat:
    return Beat(
        **{"rank": rank, "node": "1", "host": "far", "pid": 1, "number": 5, "phase": "update", "step": 3, **more}
    )


def test_a_rank_says_its_node_also_without_torchrun(monkeypatch):
    for of_torchrun, of_slurm, local, node in (
        ("", "", "8", "1"),
        ("", "", "", "0"),
        ("3", "5", "8", "3"),
        ("", "5", "8", "5"),
    ):
        monkeypatch.setenv("GROUP_RANK", of_torchrun)
        monkeypatch.setenv("SLURM_NODEID", of_slurm)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        watch = Watch(dist.HashStore(), 9, 16, hang_seconds=60)
        watch.close()  # else its thread ends this process in a minute
        assert watch.me.node == node


def test_all_is_well(watch):
    now = watch.began
    assert watch.judge([beat(1), beat(2)], now) == ""
    assert watch.judge([beat(1, number=6), beat(2, number=6)], now + 100) == ""
    assert watch.judge([beat(1, number=7, seconds=50), beat(2, number=7)], now + 101) == ""


def test_silence_is_death(watch):
    now = watch.began
    watch.judge([beat(1), beat(2)], now)
    for look in range(SILENT_LOOKS):
        assert watch.judge([beat(1), beat(2, number=10 + look)], now + 9.5 + look / 100) == ""
    verdict = watch.judge([beat(1), beat(2, number=16)], now + 11)
    assert verdict == "rank 1 on node 1 (far, process 1) died in phase 'update' of step 3: no sign of life for 11 s"
    assert watch.judge([beat(1, done=True), beat(2, number=17)], now + 12) == ""  # it left in order


def test_a_pause_of_this_machine_is_nobodys_death(watch):
    watch.over.set()
    watch.thread.join()  # its own looks would count
    now = watch.began
    watch.judge([beat(1), beat(2)], now)
    for look in range(SILENT_LOOKS - 1):
        assert watch.judge([beat(1), beat(2)], now + 60 + look) == ""
    assert "no sign of life for 64 s" in watch.judge([beat(1), beat(2)], now + 64)


def test_a_process_of_this_machine_that_is_gone_needs_no_silence(watch):
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    assert is_gone(gone) and not is_gone(os.getpid())
    here = beat(1, host=watch.me.host, pid=gone)
    watch.judge([here, beat(2)], watch.began)
    assert "died in phase 'update' of step 3: its process is gone" in watch.judge([here, beat(2)], watch.began + 1)


def test_the_rank_that_works_hangs_not_those_that_wait_for_it(watch):
    now = watch.began
    waiting = beat(1, seconds=70, waiting="a sum over the ranks", progress=9)
    working = beat(2, seconds=70, phase="score", progress=8)
    watch.me.progress, watch.me.seconds, watch.me.waiting = 9, 70, "a sum over the ranks"
    watch.since -= 70  # its next heartbeat counts from there
    assert watch.judge([waiting, working], now).startswith(
        "rank 2 on node 1 (far, process 1) hangs in phase 'score' of step 3: no progress for 70 s"
    )
    assert watch.judge([waiting, beat(2, seconds=5, phase="score")], now) == ""  # it is slow, and alive
    deadlock = watch.judge([waiting, beat(2, seconds=70, waiting="the rollouts of step 4", progress=8)], now)
    assert deadlock.startswith("rank 2") and deadlock.endswith("waiting for the rollouts of step 4")
    tied = watch.judge([beat(1, seconds=70, progress=8), beat(2, seconds=70, progress=8)], now)
    assert tied.startswith("rank 1 on node 1 (far, process 1) (or rank 2, as far as it) hangs")


def test_a_rank_that_reads_a_sum_of_nccl_waits_too(watch, monkeypatch):
    """NCCL's all_reduce only asks for the sum; the read of the number is what waits."""
    seen = []
    world = World(rank=0, size=3, device=torch.device("cpu"), watch=watch)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *how: seen.append(watch.me.waiting))
    for name in ("tolist", "item"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, read=read: seen.append(watch.me.waiting) or read(t))
    assert world.total(1, 2) == [1, 2] and world.largest(3.0) == 3
    assert seen == ["a sum over the ranks"] * 2 + ["a maximum over the ranks"] * 2


def test_a_failure_and_a_rank_that_never_came(watch):
    now = watch.began
    assert (
        watch.judge([beat(2, failed="ValueError: no")], now)
        == "rank 2 on node 1 (far, process 1) failed in phase 'update' of step 3: ValueError: no"
    )
    assert watch.judge([beat(2)], now + 59) == ""
    assert (
        watch.judge([beat(2, number=9)], now + 61)
        == "rank 1 has not joined in 60 s (--hang-seconds 60): look at what its launcher printed"
    )
    watch.hang_seconds = 1800
    assert watch.judge([], now + JOIN_SECONDS - 1) == ""
    assert (
        watch.judge([], now + JOIN_SECONDS + 1)
        == f"ranks 1, 2 have not joined in {JOIN_SECONDS:.0f} s: look at what its launcher printed"
    )


def test_who_is_late_is_said_once_and_before_the_end(watch, capsys):
    for after in (LATE_SECONDS - 1, LATE_SECONDS + 1, LATE_SECONDS + 2):
        watch.tell_who_is_late([beat(2)], watch.began + after)
    assert capsys.readouterr().err == "note: rank 1 has not joined after 30 s; all others wait\n"


@pytest.mark.slow(14)
def test_a_rank_that_was_killed_before_it_joined_is_named_within_the_hang_limit():
    """Found by the campaign: the others waited 300 s, whatever --hang-seconds was."""
    code = "import sys; from rollout import RunError; from trainer.ranks.world import join_world\ntry: join_world(hang_seconds=3)"
    code += "\nexcept RunError as error: sys.exit(str(error))"
    port = free_port()
    common = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    says = ("rank 1 has not joined in 3 s (--hang-seconds 3): look at what its launcher printed", f"127.0.0.1:{port}")
    for rank, said in enumerate(says):  # no launcher holds the store, as under Slurm: rank 0 does
        env = os.environ | {name: str(value) for name, value in ({"RANK": rank, "LOCAL_RANK": rank} | common).items()}
        alone = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False
        )
        assert alone.returncode == 1 and said in alone.stderr and "Traceback" not in alone.stderr, alone.stderr
    assert "where rank 0 holds the store of the launch" in alone.stderr


def test_stacks_begin_with_the_main_thread():
    assert stacks().startswith("thread MainThread:") and "test_stacks_begin" in stacks()


LEAVES_LATE = """
import os, time
import trainer.ranks.watch
from trainer.ranks.world import guarded, join_world, leave_world

if os.environ["RANK"] == "1":
    # between two looks into the store, whose host could be gone by the next one
    trainer.ranks.watch.MEET_SECONDS = 3.0
world = join_world(samplers=int(os.environ["SAMPLERS"]))
with guarded(world):
    print("trains" if world.sampler is None else "samples", flush=True)
leave_world()
print("left", flush=True)
"""


@pytest.mark.slow(16)
@pytest.mark.parametrize("samplers", [0, 1])
def test_without_a_launchers_store_rank_0_leaves_last(samplers, tmp_path):
    """Two plain processes, as srun starts them: rank 0 holds the store that the other still reads."""
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES_LATE)
    port = free_port()
    common = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"SAMPLERS": samplers, "PYTHONPATH": ROOT}
    processes = []
    for rank in (0, 1):
        env = {
            **os.environ,
            **{name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()},
        }
        words = [sys.executable, str(script)]
        processes.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=1000) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [out.split() for out, _ in said] == [["trains", "left"], ["samples" if samplers else "trains", "left"]]
    assert all("Error" not in err for _, err in said), said


class SilentStore:
    """A store over a link that goes: from then on its calls never return, as torch's do while TCP tries again."""

    def __init__(self) -> None:
        self.gone, self.for_ever = threading.Event(), threading.Event()

    def clone(self) -> "SilentStore":
        return self

    def set(self, key: str, value: str) -> None:
        if self.gone.is_set():
            self.for_ever.wait()

    def check(self, keys: list[str]) -> bool:
        self.set("", "")
        return False

    def add(self, key: str, number: int) -> int:
        self.set("", "")
        return 0


@pytest.fixture
def silent(monkeypatch):
    """A watch whose store has fallen silent, and the exit codes with which it ended the process."""
    for name, value in {"BEAT_SECONDS": 0.01, "STORE_BEATS": 20, "CLOSE_SECONDS": 0.2}.items():
        monkeypatch.setattr(watching, name, value)
    store = SilentStore()
    ended = threading.Event()
    monkeypatch.setattr(watching, "GRACE_SECONDS", 60.0)
    monkeypatch.setattr(watching.os, "_exit", lambda code: ended.set())
    watch = Watch(store, rank=1, size=2, hang_seconds=60)
    watch.ended, watch.fall_silent = ended, store.gone.set
    yield watch
    watch.over.set()  # or its threads, once they go on, would end this process
    store.for_ever.set()


def test_a_store_that_falls_silent_ends_a_rank_that_is_stuck(silent, monkeypatch, capsys):
    """Found by the campaign: with the link between two nodes down, the rank of the second waited for ever."""
    monkeypatch.setattr(watching, "GRACE_SECONDS", 0.1)
    told = []
    silent.on_lost = told.append
    silent.fall_silent()
    assert silent.ended.wait(600)
    assert "the store of the launch has not answered for" in silent.verdict and "node 0, or the network to it" in str(
        told
    )
    assert f"stops in phase 'start': {silent.verdict}" in capsys.readouterr().err


@pytest.mark.slow(10)
def test_a_rank_whose_collective_fails_names_the_silent_store_and_can_end(silent):
    silent.fall_silent()
    assert "has not answered for" in silent.explain(RuntimeError("[pair.cc] timed out"))
    silent.close("lost")  # returns, although its last word cannot be sent
    silent.leave_store()


def test_a_sampler_whose_keeper_is_gone_ends_before_it_imports_anything_large():
    """Found by the campaign: on a busy machine it lived on for over 30 s, until it had imported torch."""
    words = [sys.executable, "-X", "importtime", "-c", START, "1"]  # process 1 is not its parent
    done = subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "data.processes" in done.stderr and "torch" not in done.stderr


def test_a_keeper_whose_line_to_the_trainers_store_is_reset_says_so():
    """Found by the campaign: a traceback of torch's store."""

    class Reset:
        def check(self, keys: list[str]) -> bool:
            raise dist.DistNetworkError("Connection reset by peer")

    address = Address(host="10.0.0.1", port=7, token="secret")
    with pytest.raises(
        RunError, match=r"sampler 3: the trainers' store at 10\.0\.0\.1:7 is gone \(Connection reset by peer\)"
    ):
        _notice(Reset(), "e3/g0/lost", address, 3)


def test_a_rank_that_waits_for_a_slow_one_waits_as_long_as_that_works(monkeypatch):
    """A reward of one rank may take longer than --hang-seconds and say of every answer that it is done: the watch decides."""
    given = []

    def joined(*arguments, timeout, **more):
        given.append(timeout)
        raise KeyError("this is far enough")

    monkeypatch.setattr(world_of_ranks.dist, "init_process_group", joined)
    monkeypatch.setattr(world_of_ranks, "store_of_launch", lambda *arguments: dist.HashStore())
    monkeypatch.setattr(world_of_ranks, "Watch", lambda *arguments: None)
    monkeypatch.setattr(world_of_ranks, "_joined", None)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "0", "LOCAL_RANK": "0"}
    for size in (1, 2):
        for name, value in (address | {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(KeyError, match="far enough"):
            world_of_ranks.join_world(hang_seconds=3)
    alone, together = given
    assert alone == timedelta(seconds=6) and together > timedelta(days=1)
