"""Networks that drop, delay and close: between two ranks, to a sampler, to an endpoint.

Nodes are network namespaces (root and iproute2); `tc` delays and drops. An endpoint is reached through a proxy that
misbehaves, which needs no rights.
"""

import json
import random
import shutil
import socket
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tests.campaign.cases import Skipped, until
from tests.campaign.jobs import an_endpoint, make_bench
from tests.campaign.relay import Line, line_to
from tests.campaign.running import Running
from tests.helpers.commands import ROOT, command_of, rank_commands
from tests.helpers.forked import ForkedProcess
from tests.helpers.nodes import Launched, torchrun, two_nodes

CASES = (
    *("endpoint: closes", "ranks: delay", "endpoint: hangs", "ranks: link goes", "endpoint: half replies"),
    *("ranks: drops packets", "sampler: link goes", "sampler: delay", "evaluation through a bad proxy"),
    *("line to the launch's store", "line to the sync store", "line to an endpoint"),
)
LAST = ("stall", "reset")
"""What a line does from a moment on; whoever depends on it must end with a sentence."""
HANG_SECONDS = 30
STEPS = 8


def prepare(folder: Path):
    return make_bench(folder)


def close(bench) -> None:
    bench.close()


def play(bench, name: str, rng: random.Random, folder: Path) -> str:
    who, _, what = name.partition(": ")
    if who == "endpoint":
        return distill_through(bench, what, rng, folder)
    if who.startswith("line"):
        return over_a_line(bench, name, rng, folder)
    if who.startswith("evaluation"):
        return evaluate_through(bench, rng, folder)
    return on_two_nodes(bench, who == "sampler", what, rng, folder)


# ---- endpoints


class Proxy:
    """Passes connections on to a port; what = "closes", "hangs" or "half replies" with a probability of a half."""

    def __init__(self, to: tuple[str, int], what: str, rng: random.Random) -> None:
        self.to, self.what, self.rng, self.over = to, what, rng, threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        self.bad = 0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(client, self.rng.random() < 0.5), daemon=True).start()

    def serve(self, client: socket.socket, bad: bool) -> None:
        self.bad += bad
        with client, suppress(OSError):
            if bad and self.what == "closes":
                client.recv(10)
                return
            if bad and self.what == "hangs":
                client.recv(1 << 16)
                self.over.wait(60)
                return
            with socket.create_connection(self.to) as server:
                threading.Thread(target=pump, args=(client, server, None), daemon=True).start()
                pump(server, client, self.rng.randrange(1, 400) if bad else None)

    def close(self) -> None:
        self.over.set()
        self.listener.close()


def pump(source: socket.socket, target: socket.socket, most: int | None) -> None:
    """Pass bytes on, at most so many, then close."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data if most is None else data[:most])
            if most is not None and (most := most - len(data)) <= 0:
                break
        for end in (source, target):
            end.shutdown(socket.SHUT_RDWR)


def distill_through(bench, what: str, rng: random.Random, folder: Path) -> str:
    """Half of the connections misbehave. The traces are those of a good line; no answer is recorded twice."""
    server = an_endpoint(bench.folder / "pipeline")
    proxy = Proxy(server.http.server_address[:2], what, rng)
    given = ("--puzzles", bench.folder / "pipeline/puzzles/test.parquet", "--out", folder / "t.jsonl", "--teacher")
    given += ("openai", "--model", "m", "--temperature", 1, "--candidates", 4, "--concurrency", rng.choice((1, 4, 16)))
    given += ("--backoff-seconds", 0.01, "--timeout-seconds", 2, "--retries", 30)
    running = Running("distill", *given, "--base-url", proxy.url, log=folder / "log")
    try:
        code = running.end()
    finally:
        proxy.close()
        server.close()
    assert code == 0, running.output[-3000:]
    whole = bench.whole("distill, endpoint")
    assert (folder / "t.jsonl").read_bytes() == (whole / "t.jsonl").read_bytes()
    rows = [json.loads(line) for line in (folder / "t.raw.jsonl").read_text().splitlines()]
    keys = [(row["puzzle_id"], row["attempt"], row["hinted"]) for row in rows if "text" in row]
    assert len(set(keys)) == len(keys), "a response was recorded twice"
    return f"{proxy.bad} bad connections"


def evaluate_through(bench, rng: random.Random, folder: Path) -> str:
    """The same for an evaluation; it may end with a sentence and goes on with --resume."""
    server = an_endpoint(bench.folder / "pipeline")
    proxy = Proxy(server.http.server_address[:2], rng.choice(("closes", "half replies")), rng)
    given = ("--puzzles", bench.folder / "pipeline/puzzles/test.parquet", "--out", folder / "eval", "--model", "m")
    given += ("--endpoint", proxy.url, "--temperature", 1, "--concurrency", rng.choice((1, 8)))
    try:
        for turn in range(10):
            running = Running("evaluate", *given, *(("--resume",) if turn else ()), log=folder / f"log{turn}")
            code = running.end()
            assert code in (0, 1) and "Traceback" not in running.output, running.output[-3000:]
            if code == 0:
                break
    finally:
        proxy.close()
        server.close()
    assert code == 0, running.output[-3000:]
    whole = bench.whole("evaluate")
    name = "eval/predictions.jsonl"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    return f"{turn + 1} calls"


# ---- a relay in the line


def over_a_line(bench, name: str, rng: random.Random, folder: Path) -> str:
    """A relay (tests/campaign/relay.py) delays, throttles, loses for a while, stalls or resets.

    Slow: the unbroken numbers. Stalled or reset: a sentence within the limit, and --resume gives the unbroken numbers.
    """
    how = rng.choice(("delay", "rate", "loss", *LAST))
    order = {"delay": f"delay {rng.uniform(0.01, 0.1)}", "rate": f"rate {rng.randint(30_000, 300_000)}"}
    order["loss"] = f"loss {rng.uniform(0.005, 0.05)}"
    play = {"line to the launch's store": launch_store, "line to the sync store": sync_store}.get(name, endpoint)
    return f"{how}: {play(bench, how, order.get(how, how), rng, folder)}"


def endpoint(bench, how: str, order: str, rng: random.Random, folder: Path) -> str:
    """A distillation whose endpoint is at the other end of the line, which is mended after it was stalled or reset."""
    server, whole = an_endpoint(bench.folder / "pipeline"), bench.whole("distill, endpoint")
    given = ("--puzzles", bench.folder / "pipeline/puzzles/test.parquet", "--out", folder / "t.jsonl", "--teacher")
    given += ("openai", "--model", "m", "--temperature", 1, "--candidates", 4, "--concurrency", rng.choice((1, 4, 16)))
    given += ("--backoff-seconds", 0.05, "--timeout-seconds", 5, "--retries", 30)
    try:
        with line_to(server.http.server_address[1]) as line:
            line.does("pass" if how in LAST else order)
            running = Running("distill", *given, "--base-url", f"http://127.0.0.1:{line.port}/v1", log=folder / "log")
            if how in LAST:
                until(lambda: len(server.bodies) > 2 or not running.alive(), 60, "the first answers")
                line.does(order)
                time.sleep(rng.uniform(0.5, 8))
                line.does("pass")
            code = running.end()
    finally:
        server.close()
    assert code == 0, running.output[-3000:]
    assert (folder / "t.jsonl").read_bytes() == (whole / "t.jsonl").read_bytes()
    rows = [json.loads(row) for row in (folder / "t.raw.jsonl").read_text().splitlines()]
    keys = [(row["puzzle_id"], row["attempt"], row["hinted"]) for row in rows if "text" in row]
    assert len(set(keys)) == len(keys), "a response was recorded twice"
    return "the same traces"


def launch_store(bench, how: str, order: str, rng: random.Random, folder: Path) -> str:
    """Rank 1 reaches the store of the launch (its heartbeat, the meeting of all ranks) over the line."""
    commands, store = rank_commands(command_of("grpo", words_of(bench, "grpo 2 ranks", how, folder), None, ROOT), 2)
    with line_to(store.port) as line:
        commands[1].env["MASTER_PORT"] = str(line.port)
        return ranks_over(bench, "grpo 2 ranks", line, commands, how, order, rng, folder)


def sync_store(bench, how: str, order: str, rng: random.Random, folder: Path) -> str:
    """The sampler reaches the run's own store (orders, rollouts, the adapter's meeting) over the line."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = words_of(bench, "grpo split", how, folder, "--sync-port", port)
    with line_to(port) as line:
        # rank 1 starts the sampler's process with the address that it was told
        script = folder / "grpo.py"
        script.write_text(
            "import runpy\nimport trainer.start.sampler as sampler\nfrom rollout.link import Address\n"
            f"sampler.Address = lambda **told: Address(**told | {{'port': {line.port}}})\n"
            f"runpy.run_path({str(ROOT / 'launch/grpo.py')!r}, run_name='__main__')\n"
        )
        commands, _store = rank_commands(command_of("grpo", words, None, ROOT), 2)
        commands[1] = replace(commands[1], script=script)
        return ranks_over(bench, "grpo split", line, commands, how, order, rng, folder)


def words_of(bench, name: str, how: str, folder: Path, *more: object) -> list:
    """The options of a run; of one whose line will end, without an end of its own."""
    words = [*bench.jobs[name].words(folder / "job"), *more, "--hang-seconds", HANG_SECONDS]
    return [*words, "--steps", 100_000] if how in LAST else words


def ranks_over(
    bench, name: str, line: Line, commands: list, how: str, order: str, rng: random.Random, folder: Path
) -> str:
    """Play a run of two ranks over a line, and what must hold."""
    whole, job, log = bench.whole(name), bench.jobs[name], folder / "log"
    line.does("pass" if how in LAST else order)
    with open(log, "ab") as handle:
        ranks = [ForkedProcess(command, handle.fileno(), handle.fileno()) for command in commands]

    def alive() -> bool:
        return any(rank.poll() is None for rank in ranks)

    try:
        if how not in LAST:
            until(lambda: not alive(), 8 * HANG_SECONDS, "the end of a run over a slow line")
            assert [rank.returncode for rank in ranks] == [0, 0], log.read_text(errors="replace")[-3000:]
            job.same(folder / "job", whole)
            return "the unbroken numbers"
        until(lambda: "step 1/" in log.read_text(errors="replace") or not alive(), 4 * HANG_SECONDS, "the first step")
        time.sleep(rng.uniform(0, 2))
        line.does(order)
        began = time.monotonic()
        until(lambda: not alive(), 4 * HANG_SECONDS + 60, "both ranks' end")
        said = log.read_text(errors="replace")
        assert all(rank.returncode for rank in ranks), "a rank calls it a success"
        assert "Traceback" not in said, said[-3000:]
        named = [text for text in said.splitlines() if "rank 1" in text or "store" in text or "sampler" in text]
        assert named, f"nobody is named: {said[-3000:]}"
        return f"both ended within {HANG_SECONDS * (1 + int((time.monotonic() - began) // HANG_SECONDS))} s"
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill_group()


# ---- two nodes


def on_two_nodes(bench, split: bool, what: str, rng: random.Random, folder: Path) -> str:
    """A run over two namespaces whose link misbehaves in the middle.

    Delayed or with drops: the unbroken numbers. Gone: both nodes end with a sentence within the limit.
    """
    if not shutil.which("tc"):
        raise Skipped("tc (iproute2) is not there")
    job = bench.jobs["grpo split" if split else "grpo 2 ranks"]
    arguments = [*job.words(folder / "job"), "--hang-seconds", HANG_SECONDS]
    whole = bench.whole("grpo split" if split else "grpo 2 ranks")
    if what == "link goes":
        arguments += ["--steps", 100_000, "--save-every", 1000]
    with two_nodes() as nodes:
        if not nodes[0].prefix:
            raise Skipped("network namespaces need root")
        running = []
        try:
            for number, node in enumerate(nodes):
                words = torchrun(*arguments, ranks=1, node=node, head=nodes[0], number=number)
                env = {"GLOO_SOCKET_IFNAME": node.interface}
                running.append(Launched(words, folder / f"node{number}.log", env))
            running[0].wait_for("step 1/")
            if what == "link goes":
                return link_goes(nodes, running, rng)
            how = {
                "delay": ("delay", f"{rng.randint(5, 60)}ms", f"{rng.randint(1, 20)}ms"),
                "drops packets": ("loss", f"{rng.randint(1, 15)}%"),
            }[what]
            inside = [word for word in nodes[1].prefix[:4]]  # ip netns exec NAME
            words = [*inside, "tc", "qdisc", "add", "dev", nodes[1].interface, "root", "netem", *how]
            if subprocess.run(words, capture_output=True, check=False).returncode:
                raise Skipped("tc netem is not in this kernel")
            for launched in running:
                assert launched.end() == 0, launched.output[-3000:]
            for name in ("metrics.jsonl", "rollouts.jsonl"):
                assert (folder / "job/run" / name).read_bytes() == (whole / "run" / name).read_bytes(), name
            return " ".join(how)
        finally:
            for launched in running:
                launched.kill()


def link_goes(nodes, running: list[Launched], rng: random.Random) -> str:
    """The link goes down in the middle of a step: each node ends by itself, and says of whom it heard nothing."""
    time.sleep(rng.uniform(0, 2))
    words = [*nodes[1].prefix[:4], "ip", "link", "set", nodes[1].interface, "down"]
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0
    began = time.monotonic()
    for launched in running:
        assert launched.end(300) != 0, launched.output[-3000:]
    seconds = time.monotonic() - began
    said = running[0].said + running[1].said
    assert "rank 1 on node 1" in said or "does not answer" in said, said[-4000:]
    assert seconds < 4 * HANG_SECONDS + 60, f"took {seconds:.0f} s"
    return "both ended"
