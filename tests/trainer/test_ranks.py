"""What ranks send one another, and what the owner of a run is told while a rank waits."""

import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from data.errors import UserError
from data.processes import Heap, module_environment
from data.status.notify import note_the_kill
from data.status.status import NOTIFY_SECONDS, RunStatus
from launch.grpo import prepare
from rollout import Rollout
from tests.helpers.commands import ROOT
from trainer.config import GrpoConfig
from trainer.packing import ScoredGroup, scored_groups
from trainer.ranks import world
from trainer.ranks.watch import WAITING_SECONDS, Beat, RankLost, Watch
from trainer.ranks.world import World, from_bytes, to_bytes

ROLLOUT = Rollout(
    puzzle_id="p\u2028 \ud800",
    prompt_ids=[1, 2],
    response_ids=[3],
    sampler_logprobs=[-0.1],
    finish_reason="stop",
    adapter_version=7,
    adapter_hash="ab",
)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([0.1, -0.0, float("nan"), float("-inf"), 3e38]),
        torch.tensor([True, False]),
        torch.tensor([[1, -(2**62)]]),
        torch.tensor([[0.1], [-7.0]]).to(torch.bfloat16).t(),  # not contiguous
        torch.tensor(4.0, dtype=torch.float64),
        torch.zeros(0, 3),
    ],
)
def test_a_tensor_arrives_bit_for_bit(tensor):
    (found,) = from_bytes(to_bytes([tensor]))
    assert found.dtype == tensor.dtype and found.shape == tensor.shape
    assert found.contiguous().flatten().view(torch.uint8).equal(tensor.contiguous().flatten().view(torch.uint8))
    found.zero_()  # it may be written to


def test_groups_arrive_as_they_were_sent():
    rows = [{"step": 1, "parts": {"a": 1 / 3}, "reward": None, "message": "\u00e9"}]
    (group,) = scored_groups([[ROLLOUT]], rows, torch.tensor([0.1]), torch.tensor([True]))
    (found,) = from_bytes(to_bytes([group]))
    assert isinstance(found, ScoredGroup) and found.rollouts == [ROLLOUT] and found.rows == rows
    assert found.advantages.equal(group.advantages) and found.trained.equal(group.trained)
    assert json.dumps(found.rows[0]) == json.dumps(rows[0])  # the order of the keys too: rows are written as they come


class Runs:
    """Unpickling it would run code."""

    def __reduce__(self):
        return pytest.fail, ("code of a peer was run",)


def test_nothing_of_a_peer_is_run():
    with pytest.raises(ValueError, match="Expecting value|codec|invalid"):
        from_bytes(pickle.dumps(Runs()))
    with pytest.raises(KeyError, match="Popen"):
        from_bytes(to_bytes([{"\0kind": ["Popen", {"args": "true"}]}]))
    with pytest.raises(AssertionError):
        to_bytes([Runs()])


# ---- whom a rank waits for


def beat(rank: int, waiting: str = "", **more) -> Beat:
    return Beat(rank=rank, node="0", host="h|b", pid=10 + rank, phase="sample", step=3, waiting=waiting, **more)


def test_the_owner_is_told_for_whom_a_rank_waits(monkeypatch):
    watch, told, now = Watch.__new__(Watch), [], [100.0]
    monkeypatch.setattr("trainer.ranks.watch.time.monotonic", lambda: now[0])
    watch.me, watch.since, watch.last_told, watch.on_wait, watch.teller = beat(0), 100.0, 90.0, told.append, None
    others = [beat(1), beat(2, "a sum over the ranks"), beat(3, done=True)]
    now[0] += WAITING_SECONDS + 1
    watch.tell_who_is_waited_for(others)  # it works itself
    watch.me.waiting = "the sum of gradients"
    watch.tell_who_is_waited_for(others)
    watch.teller.join()
    now[0] += WAITING_SECONDS - 1
    watch.tell_who_is_waited_for(others)  # too soon after the last time
    now[0] += 1
    watch.tell_who_is_waited_for([beat(1, "x")])  # everybody waits
    watch.teller.join()
    assert told == [
        "rank 1 on node 0 (h, process 11) in phase 'sample' of step 3, for 11 s",
        "the sum of gradients, for 21 s",
    ]


def test_a_status_file_on_a_slow_disk_does_not_stop_the_heartbeats(monkeypatch):
    """fsync on a network disk may take longer than the others wait for a sign of life."""
    watch, asked, free = Watch.__new__(Watch), [], threading.Event()
    watch.me, watch.since, watch.last_told, watch.teller = beat(0, "the samplers"), -1e6, -1e6, None
    watch.on_wait = lambda text: asked.append(text) or free.wait()
    watch.tell_who_is_waited_for([])  # it returns, though the disk does not
    first, watch.last_told = watch.teller, -1e6
    watch.tell_who_is_waited_for([])  # not a second one beside it
    assert watch.teller is first and first.is_alive()
    free.set()
    first.join()
    assert len(asked) == 1


def test_a_store_that_is_gone_while_ranks_meet_is_one_sentence():
    class Gone:
        def add(self, *_):
            raise dist.DistNetworkError("connection reset by peer")

    watch = Watch.__new__(Watch)
    watch.store, watch.size, watch.verdict = Gone(), 2, ""
    watch.explain = lambda error: ""
    with pytest.raises(RankLost, match=r"the store of the launch is gone \(connection reset by peer\)"):
        watch.meet("the end of the run")


def test_status_has_the_mean_of_the_last_steps_and_the_wait(tmp_path):
    status = RunStatus(tmp_path)
    for step in range(1, 26):
        status.step(step, 30, 100.0 if step <= 5 else float(step))  # the last 20: 6 to 25
    status.waits("rank 1")
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["seconds_per_step"], found["seconds_left"], found["waiting_for"]) == (15.5, 77.5, "rank 1")
    status.end(RuntimeError("two\nlines"))
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["state"], found["error"], found["exit_code"]) == ("failed", "RuntimeError: two lines", 1)
    assert (found["step"], found["waiting_for"], found["seconds_left"]) == (25, "", None)


def test_half_of_a_launchers_variables_is_refused_in_a_sentence(monkeypatch):
    """Some schedulers set RANK for a process alone too."""
    monkeypatch.setattr(world, "_joined", None)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(UserError, match="RANK is set and LOCAL_RANK and LOCAL_WORLD_SIZE not: start with torchrun"):
        world.join_world()


def test_a_rank_that_dies_when_all_is_done_and_saved_fails_nobody(tmp_path, monkeypatch, capsys):
    """Found by the campaign: a traceback of gloo's, and a status.json that said "running" for ever."""

    def closed() -> None:
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:9090")

    status = RunStatus(tmp_path)
    alone = world.World(rank=0, size=1, device=torch.device("cpu"), store=None, watch=None, sampler=None)
    alone.listeners.append(status)
    monkeypatch.setattr(world, "_joined", alone)
    monkeypatch.setattr(world.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(world.dist, "barrier", closed)
    world.leave_world()
    assert "note: a rank was lost when the run was over" in capsys.readouterr().err
    told = json.loads((tmp_path / "status.json").read_text())
    assert (told["state"], told["exit_code"]) == ("finished", 0) and world._joined is None


def test_a_folder_that_was_removed_is_not_made_again_for_its_status(tmp_path):
    (tmp_path / "run").mkdir()
    status = RunStatus(tmp_path / "run", proof=tmp_path / "run/config.json")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="run: was removed while the run was writing there"):
        status.step(1, 2, 0.5)
    status.end(None)
    note_the_kill(tmp_path / "run/status.json", "killed")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run/checkpoints").mkdir(parents=True)  # a checkpoint has made the folder again
    with pytest.raises(UserError, match="run: was removed"):
        status.step(2, 2, 0.5)
    (tmp_path / "run/config.json").write_text("{}")  # only status.json was removed
    status.step(2, 2, 0.5)


def test_a_rank_that_dies_before_the_ranks_meet_at_the_end_is_told(tmp_path, monkeypatch):
    def lost(what: str) -> None:
        raise RankLost("rank 1 died")

    status = RunStatus(tmp_path)
    alone = world.World(rank=0, size=1, device=torch.device("cpu"), store=None, watch=None, sampler=None)
    alone.listeners.append(status)
    monkeypatch.setattr(world, "_joined", alone)
    monkeypatch.setattr(world.World, "meet", lambda self, what: lost(what))
    with pytest.raises(RankLost):
        world.leave_world()
    told = json.loads((tmp_path / "status.json").read_text())
    assert (told["state"], told["exit_code"]) == ("failed", 1) and "rank 1 died" in told["error"]


@pytest.mark.slow(6)
def test_where_a_process_is_can_be_asked_also_when_it_is_the_only_one():
    code = "import time\nfrom trainer.ranks.world import join_world\njoin_world()\nprint('joined', flush=True)\ntime.sleep(1000)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as process:
        assert "joined\n" in iter(process.stdout.readline, "")
        process.send_signal(signal.SIGUSR1)
        # the signal may come before it sleeps; another line than these would be waited for till the end of time
        assert any(re.search(r'File "<string>", line [45] in <module>', line) for line in process.stderr)
        assert process.poll() is None
        process.kill()


def test_an_error_is_not_held_back_by_a_slow_command_of_notify():
    """The launcher ends all ranks some seconds after the first: rank 0 must have said why by then."""
    waits = []
    listener = SimpleNamespace(end=lambda error, wait: waits.append(wait))
    for watch in (None, object()):
        for error in (None, UserError("no")):
            one = world.World(rank=0, size=1, device=torch.device("cpu"), watch=watch, listeners=[listener])
            one.ended(error)
    assert waits == [NOTIFY_SECONDS] * 3 + [world.NOTIFY_FAILED_SECONDS] and world.NOTIFY_FAILED_SECONDS < 8


def test_what_a_default_run_refuses_ends_its_watch(monkeypatch, tmp_path):
    """Without --model the ranks have joined before the files are read: a refusal would look like a death to the others."""
    ended = []
    joined = world.World(rank=0, size=1, device=torch.device("cpu"), at_failure=[lambda: ended.append(True)])
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "runs/demo/sft/model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    monkeypatch.setattr(world, "join_world", lambda *settings: joined)
    with pytest.raises(UserError, match="runs/demo/puzzles/train.parquet: no such file"):
        prepare(GrpoConfig())
    assert ended == [True]


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text(), reason="the system gives no huge pages"
)
def test_large_tensors_lie_in_huge_pages():
    code = "import transformers, trainer, torch; x = torch.ones(1 << 24); print(open('/proc/self/smaps_rollup').read())"
    words = [sys.executable, "-c", code]
    found = {}
    for off in ({}, {"THP_MEM_ALLOC_ENABLE": "0"}):
        env = {**module_environment(), **off}
        text = subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout
        found[bool(off)] = int(re.search(r"AnonHugePages: *(\d+) kB", text)[1])
    assert found[False] >= found[True] + 48 * 1024, "of the 64 MiB"


def test_a_rank_on_a_cpu_looks_at_its_heap_between_phases_and_micro_batches(monkeypatch):
    """On a GPU it is not in this heap."""
    asked = []
    monkeypatch.setattr(Heap, "enter", lambda heap, step: asked.append(step))
    monkeypatch.setattr(Heap, "look", lambda heap: asked.append("look"))
    for device, step in (("cpu", 1), ("cuda", 2)):
        alone = World(rank=0, size=1, device=torch.device(device))
        alone.enter("update", step)
        alone.advance()
    assert asked == [1, "look"]
