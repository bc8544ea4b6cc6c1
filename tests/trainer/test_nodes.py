"""Two nodes, sharded or not, colocated or split: the same numbers; and what happens when a part of it fails.

Every test runs the real command under real launchers; the two nodes are network namespaces where the machine allows them.
"""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.commands import ROOT, SMALL_GRPO, free_port, run_command, succeed
from tests.helpers.nodes import Launch, Launched, torchrun, two_nodes
from trainer.ranks.watch import BEAT_SECONDS

pytestmark = pytest.mark.slow(12)
SMALL = (*SMALL_GRPO, "--save-every", 2, "--reward-workers", 0)
SHORT = (*SMALL, "--engine", "torch", "--steps", 3)
ENDLESS = (*SMALL, "--engine", "torch", "--steps", 100_000, "--save-every", 1000)
REWARD = """
import os, pathlib, time

calls = 0

def length(completion, puzzle):
    global calls
    calls += 1
    while calls > int(os.environ.get("STOP_AFTER", 10**9)) and not pathlib.Path(os.environ["GO"]).exists():
        time.sleep(0.05)  # of which responses the run waits for the test
    return -abs(len(completion) - 20) / 20

def takes_its_time(completion, puzzle):
    time.sleep(0.05)
    return length(completion, puzzle)

def hangs_on_rank_1(completion, puzzle):
    if os.environ["RANK"] == "1":
        time.sleep(1000)
    return 0.0
"""
FLIP = """
import runpy, sys
import torch
import rollout.split

class Flipped(rollout.split.Parcel):
    def manifest(self):
        rows = super().manifest()
        self.buffer[1000] ^= 4  # after the checksums, before the broadcast
        return rows

rollout.split.Parcel = Flipped
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def words(pipeline, tmp_path_factory):
    """words(out) are the options every run here has."""
    reward = tmp_path_factory.mktemp("reward") / "rewards.py"
    reward.write_text(REWARD)

    def of(out: Path, reward_name: str = "length") -> list:
        return [
            "--model",
            pipeline / "base",
            "--puzzles",
            pipeline / "puzzles/train.parquet",
            "--out",
            out,
            "--reward",
            f"{reward}:{reward_name}",
        ]

    return of


@pytest.fixture(scope="module")
def reference(words, tmp_path_factory) -> list[dict]:
    """Metrics of three steps in one process."""
    out = tmp_path_factory.mktemp("reference") / "run"
    succeed("grpo", *words(out), *SHORT)
    return metrics(out)


@pytest.fixture
def start():
    """start(launch, log): a launcher that is gone after the test."""
    running: list[Launched] = []

    def begin(launch: Launch, log: Path, env: dict | None = None, fresh: bool = False) -> Launched:
        running.append(Launched(launch, log, env, fresh))
        return running[-1]

    yield begin
    for launched in running:
        launched.kill()


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_numbers(out: Path, reference: list[dict]) -> None:
    rows = metrics(out)
    assert len(rows) == len(reference)
    for row, expected in zip(rows, reference, strict=True):
        assert row["reward"] == expected["reward"]
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert row["kl"] == pytest.approx(expected["kl"], rel=1e-3, abs=1e-6)


def stopping_after(steps: int, tmp_path: Path) -> dict[str, str]:
    """Environment with which a run of SMALL waits in the step after these until tmp_path/go is there."""
    return {"STOP_AFTER": str(steps * 12), "GO": str(tmp_path / "go")}


def kill_sampler_at(launched: Launched, said: str, go: Path) -> None:
    """Kill the process of the one sampler when the run has said a line; then let the run go on."""
    launched.wait_for(said)
    (sampler,) = launched.descendants("trainer.start.sampler")
    sampler.kill()
    go.touch()


def on_two_nodes(start, nodes, arguments: list, tmp_path: Path, fresh: bool = False) -> list[Launched]:
    launched = []
    for number, node in enumerate(nodes):
        launch = torchrun(*arguments, ranks=1, node=node, head=nodes[0], number=number)
        env = {"GLOO_SOCKET_IFNAME": node.interface}
        launched.append(start(launch, tmp_path / f"node{number}.log", env, fresh))
    return launched


def test_two_nodes_sharded_give_the_numbers_of_one_process(words, reference, start, tmp_path):
    with two_nodes() as nodes:
        more = [
            "--shard",
            "fsdp",
            "--checkpointing",
            "--micro-tokens",
            500,
        ]  # ranks differ in their number of micro-batches
        # the launchers and ranks of this test are real processes; those of the others are forked
        launched = on_two_nodes(start, nodes, [*words(tmp_path / "run"), *SHORT, *more], tmp_path, fresh=True)
        assert [one.end() for one in launched] == [0, 0], launched[0].output + launched[1].output
    assert_same_numbers(tmp_path / "run", reference)
    # a checkpoint of a sharded run holds whole tensors: one process goes on with it
    succeed("grpo", *words(tmp_path / "run"), *SHORT, "--steps", 4, "--resume", "--micro-tokens", 500)
    assert len(metrics(tmp_path / "run")) == 4


def test_every_weight_sharded_gives_the_numbers_of_one_process(words, start, tmp_path):
    """Two updates a batch and a frozen reference: each rank makes the passes that the other needs, in the same order."""
    more = ["--lora-rank", 0, "--lr", 1e-3, "--updates-per-batch", 2, "--beta", 0.1, "--micro-tokens", 150]
    succeed("grpo", *words(tmp_path / "one"), *SHORT, *more)
    launched = start(torchrun(*words(tmp_path / "two"), *SHORT, *more, "--shard", "fsdp", ranks=2), tmp_path / "log")
    assert launched.end() == 0, launched.output
    assert_same_numbers(tmp_path / "two", metrics(tmp_path / "one"))


def test_a_sampler_on_the_other_node_gives_the_numbers_of_one_process(words, reference, start, tmp_path):
    with two_nodes() as nodes:
        arguments = [*words(tmp_path / "run"), *SHORT, "--placement", "split"]
        launched = on_two_nodes(start, nodes, arguments, tmp_path)
        assert [one.end() for one in launched] == [0, 0], launched[0].output + launched[1].output
    assert_same_numbers(tmp_path / "run", reference)
    hashes = [row["adapter_hash"] for row in metrics(tmp_path / "run")]
    rollouts = [json.loads(line) for line in (tmp_path / "run/rollouts.jsonl").read_text().splitlines()]
    for step in (2, 3):
        assert {r["adapter_hash"] for r in rollouts if r["step"] == step} == {hashes[step - 2]}
    assert "Traceback" not in launched[0].said + launched[1].said


def test_a_killed_trainer_is_named_on_the_other_node(words, start, tmp_path):
    with two_nodes() as nodes:
        launched = on_two_nodes(start, nodes, [*words(tmp_path / "run"), *ENDLESS], tmp_path)
        launched[0].wait_for("step 2/")
        time.sleep(3 * BEAT_SECONDS)  # rank 1 has said that it is past the start
        rank_1 = max(
            launched[1].descendants("--steps"), key=lambda process: process.create_time()
        )  # below its launcher
        rank_1.kill()
        assert launched[0].end() != 0
    said = launched[0].output
    assert (
        "rank 0 on node 0" in said and f"rank 1 on node 1 ({nodes[1].host}, process {rank_1.pid}) died in phase" in said
    )
    assert "of step" in said.split("died in phase")[1]
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1) and f"process {rank_1.pid}) died" in status["error"]


def test_a_rank_that_hangs_is_named_with_the_stacks_of_all(words, start, tmp_path):
    arguments = [*words(tmp_path / "run", "hangs_on_rank_1"), *ENDLESS, "--hang-seconds", 60]
    launched = start(torchrun(*arguments, ranks=2), tmp_path / "log")
    assert launched.end() != 0
    said = launched.output
    assert "rank 1 on node 0" in said and "hangs in phase 'score' of step 1: no progress for" in said
    assert "---- stacks of rank 0" in said and "---- stacks of rank 1" in said
    assert "in hangs_on_rank_1" in said.split("---- stacks of rank 1")[1]


def test_a_sampler_killed_while_it_generates_is_named_and_the_run_stops(words, start, tmp_path):
    slow = ["--placement", "split", "--max-response-tokens", 1500, "--reward-workers", 1]  # seconds of sampling a step
    launched = start(torchrun(*words(tmp_path / "run"), *ENDLESS, *slow, ranks=2), tmp_path / "log")
    launched.wait_for("step 1/")
    (sampler,) = launched.descendants("trainer.start.sampler")
    everything = launched.descendants("")
    began = sampler.cpu_times().user
    while sampler.cpu_times().user < began + 0.7:  # it samples: it costs next to nothing to wait for orders
        time.sleep(0.05)
    sampler.kill()
    assert launched.end() != 0
    says = f"its process {sampler.pid}) was killed by SIGKILL in phase 'generate' of step 2"
    assert says in launched.output and "Error: sampler 0 (rank 1 on node 0" in launched.output
    gone, alive = psutil.wait_procs(everything, timeout=120)
    assert len(gone) >= 4 and not alive  # both ranks, the sampler, the reward's process


def test_killed_samplers_and_killed_runs_change_nothing(words, start, tmp_path):
    """Sampling two steps ahead: a run whose sampler is killed early, and one killed as a whole later on, and resumed."""
    ahead = [*SHORT, "--steps", 12, "--placement", "split", "--max-staleness", 2, "--correction", "tis"]
    arguments = [*words(tmp_path / "restarted"), *ahead, "--restart-samplers", 1]
    stops = stopping_after(3, tmp_path)
    restarted = start(torchrun(*arguments, ranks=2), tmp_path / "restarted.log", stops)
    kill_sampler_at(restarted, "step 3/", tmp_path / "go")
    assert restarted.end() == 0, restarted.output
    assert "it is started again (attempt 2)" in restarted.output

    stops = stopping_after(7, tmp_path / "never")
    cut = start(torchrun(*words(tmp_path / "cut"), *ahead, ranks=2), tmp_path / "cut.log", stops)
    cut.wait_for("step 7/")
    cut.kill()
    resumed = start(torchrun(*words(tmp_path / "cut"), *ahead, "--resume", ranks=2), tmp_path / "resumed.log")
    assert resumed.end() == 0, resumed.output
    last = "checkpoints/step-000012/"
    for name in (
        *("metrics.jsonl", "rollouts.jsonl"),
        *(last + "adapter_model.safetensors", last + "training/optimizer.safetensors"),
    ):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "restarted" / name).read_bytes()
    assert min(row["grad_norm"] for row in metrics(tmp_path / "cut")) > 1e-4, (
        "equal although every step changed the adapter"
    )
    assert len({row["adapter_hash"] for row in metrics(tmp_path / "cut")}) == 12


@pytest.mark.vllm
@pytest.mark.slow(60)
def test_vllm_in_a_process_of_its_own_samples_as_in_the_ranks_own(words, start, tmp_path):
    """The adapter travels by broadcast, is added to the other process's weights, and the canary proves it; killed, it goes on."""
    with_vllm = (*SMALL, "--steps", 3, "--save-every", 3)
    succeed("grpo", *words(tmp_path / "one"), *with_vllm)
    split = [*words(tmp_path / "two"), *with_vllm, "--placement", "split", "--restart-samplers", 1]
    launched = start(torchrun(*split, ranks=2), tmp_path / "log", stopping_after(1, tmp_path))
    kill_sampler_at(launched, "step 1/", tmp_path / "go")
    assert launched.end() == 0, launched.output
    assert "it is started again (attempt 2)" in launched.output
    assert_same_numbers(tmp_path / "two", metrics(tmp_path / "one"))


@pytest.mark.vllm
@pytest.mark.slow(30)
def test_a_sampler_that_vllm_refuses_is_one_sentence_and_is_not_started_again(words, start, tmp_path):
    split = [*words(tmp_path / "run"), *SMALL, "--steps", 3, "--placement", "split", "--restart-samplers", 2]
    launched = start(torchrun(*split, ranks=2), tmp_path / "log", {"VLLM_CPU_KVCACHE_SPACE": "100000"}, fresh=True)
    assert launched.end() != 0
    said = launched.said
    assert "Error: sampler 0: --model " in said and "vLLM does not start with this model" in said, said
    assert "started again" not in said and "store" not in said and "terminate called" not in said, said
    assert "sampler.py" not in said and "vllm_engine.py" not in said, "a traceback of ours"
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_one_flipped_bit_on_the_wire_is_refused_and_named(words, start, tmp_path):
    (tmp_path / "flip.py").write_text(FLIP)
    command = [ROOT / "launch/grpo.py", *words(tmp_path / "run"), *SHORT, "--placement", "split"]
    launch = torchrun(*command, ranks=2, script=tmp_path / "flip.py")
    launched = start(launch, tmp_path / "log", {"PYTHONPATH": str(ROOT)})
    assert launched.end() != 0
    assert "Error: sampler 0: LoRA sync: base_model.model.model.layers.0" in launched.output
    assert "arrived as" in launched.output and not (tmp_path / "run/metrics.jsonl").exists()


def test_two_runs_on_one_port_are_told_apart_by_their_token(words, start, tmp_path):
    port = free_port()
    split = ["--placement", "split", "--sync-host", "127.0.0.1", "--sync-port", port]
    waiting = words(tmp_path / "first", "takes_its_time")  # the second run needs the cores more
    first = start(torchrun(*waiting, *ENDLESS, *split, ranks=2), tmp_path / "first.log")
    first.wait_for("step 1/")
    second = start(torchrun(*words(tmp_path / "second"), *ENDLESS, *split, ranks=2), tmp_path / "second.log")
    assert second.end() != 0
    says = f"Error: --sync-port {port}: another run (its token is not this run's) already answers on 127.0.0.1"
    assert says in second.output
    assert first.process.poll() is None
    # ---- and a sampler that is sent to another run's store does not join it
    from rollout.link import Address, join_store
    from rollout.sync import RunError

    with pytest.raises(RunError, match="belongs to another run"):
        join_store(Address(host="127.0.0.1", port=port, token="0" * 32), "sampler 0")
    # ---- SIGTERM to every rank: the step is finished and saved, and all end well
    for process in first.descendants(str(ROOT / "launch/grpo.py")):
        if process.ppid() == first.process.pid:
            process.send_signal(signal.SIGTERM)
    assert first.end() == 0, first.output
    step = metrics(tmp_path / "first")[-1]["step"]
    assert (tmp_path / f"first/checkpoints/step-{step:06d}/state.json").is_file()
    assert "Traceback" not in first.said and "terminate called" not in first.output


def test_options_that_exclude_one_another_are_refused(words, tmp_path):
    cases = [
        (["--max-staleness", 1], "--max-staleness 1: needs --placement split"),
        (["--max-staleness", 1, "--placement", "split"], "add --correction tis"),
        (["--sampler-ranks", 2], "--sampler-ranks 2: needs --placement split"),
        (["--rank-gib", 22.5], "--rank-gib: describes a machine for --dry-run; leave it out of a run"),
        (["--placement", "split"], "--sampler-ranks 1: the launch has 1 ranks, and at least one must train"),
        (["--tensor-parallel", 2], "--tensor-parallel 2: needs --engine vllm"),
        (["--prompts-per-step", 5, "--updates-per-batch", 2], "the second must divide the first"),
        (["--max-response-tokens", 5000], "more than the model's 4096 positions"),
    ]
    for more, says in cases:
        done = run_command("grpo", *words(tmp_path / "run"), *SHORT, *more)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert not (tmp_path / "run").exists()
