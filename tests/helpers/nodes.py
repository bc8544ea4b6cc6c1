"""Two "nodes" for the tests: network namespaces joined by a veth pair where the machine allows it, else loopback."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.helpers.commands import ROOT, free_port
from tests.helpers.forked import ENVIRONMENT, TIMEOUT, Command, ForkedProcess, can_fork
from trainer.ranks.watch import is_gone


@dataclass(frozen=True)
class Node:
    prefix: tuple[str, ...]
    """Words before a command that make it run on this node."""
    address: str
    interface: str
    port: int = field(default_factory=free_port)
    """Where launchers meet, if it is the head."""

    @property
    def host(self) -> str:
        """What the node calls itself."""
        return self.interface if self.prefix else os.uname().nodename


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Node 0 and node 1; an address of one is reached from the other, and loopback is not shared between namespaces."""
    names = [f"cp{os.getpid()}{end}" for end in "ab"]
    script = [
        *(["ip", "netns", "add", name] for name in names),
        ["ip", "link", "add", names[0], "type", "veth", "peer", "name", names[1]],
    ]
    for place, name in enumerate(names):
        inside = ["ip", "netns", "exec", name]
        script += [
            ["ip", "link", "set", name, "netns", name],
            [*inside, "ip", "addr", "add", f"10.77.0.{place + 1}/24", "dev", name],
            [*inside, "ip", "link", "set", name, "up"],
            [*inside, "ip", "link", "set", "lo", "up"],
        ]
    try:
        try:
            for words in script:
                subprocess.run(words, check=True, capture_output=True)
            renamed = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"')  # another host to whoever asks
            nodes = tuple(
                Node(("ip", "netns", "exec", name, *renamed, name), f"10.77.0.{i + 1}", name)
                for i, name in enumerate(names)
            )
            subprocess.run([*nodes[0].prefix, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            warnings.warn(f"no network namespaces here ({error}): both nodes on loopback", stacklevel=1)
            nodes = (Node((), "127.0.0.1", "lo"), Node((), "127.0.0.1", "lo"))
        yield nodes
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """`python -m torch.distributed.run ARGUMENTS` on a node, or on this machine."""

    arguments: tuple[str, ...]
    node: Node | None = None


class Launched:
    """A running launcher with its output in a file. It and its ranks are forked, as in commands.py, unless `fresh`."""

    def __init__(self, launch: Launch, log: Path, env: dict | None = None, fresh: bool = False) -> None:
        self.log, env, prefix = log, {**ENVIRONMENT, **(env or {})}, launch.node.prefix if launch.node else ()
        self.process: ForkedProcess | subprocess.Popen
        with open(log, "wb") as handle:
            if can_fork() and not fresh:
                command = Command(
                    script="torch.distributed.run",
                    arguments=launch.arguments,
                    cwd=ROOT,
                    env=env,
                    starts_others=True,
                    node=launch.node.interface if prefix else "",
                )
                self.process = ForkedProcess(command, handle.fileno(), handle.fileno())
                return
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "torch.distributed.run", *launch.arguments],
                cwd=ROOT,
                stdout=handle,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def said(self) -> str:
        """The output without what torchrun's own agent logs: the one on the second node may find the first's store gone
        when both are done, and prints a traceback about it."""
        return "".join(line for line in self.output.splitlines(True) if "torch/distributed/elastic/" not in line)

    def wait_for(self, text: str, seconds: float = TIMEOUT) -> None:
        """Return once the output holds `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.poll() is None and time.monotonic() < deadline, self.output[-4000:]
            time.sleep(0.05)

    def end(self, seconds: float = TIMEOUT) -> int:
        """The exit code, once it ends."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{self.output[-4000:]}") from None

    def descendants(self, word: str) -> list[psutil.Process]:
        """Processes below the launcher whose command line has `word`; all of them for ""."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        # a forked process shows its whole command line as one word
        found = []
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended a moment ago
                if not word or word in " ".join(process.cmdline()).split():
                    found.append(process)
        return found

    def kill(self) -> None:
        """Leave nothing behind."""
        try:
            below = psutil.Process(self.process.pid).children(recursive=True)
            os.killpg(self.process.pid, signal.SIGKILL)
        except (psutil.NoSuchProcess, ProcessLookupError):
            return
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        deadline = time.monotonic() + 300
        # until then one may hold a lock or a port
        while not all(is_gone(process.pid) for process in below) and time.monotonic() < deadline:
            time.sleep(0.02)


def torchrun(
    *arguments: object,
    ranks: int,
    node: Node | None = None,
    head: Node | None = None,
    number: int = 0,
    script: Path = ROOT / "launch/grpo.py",
) -> Launch:
    """A launcher of a script: alone, or as node `number` of two that meet at node `head`."""
    words: list[object] = ["--nproc-per-node", ranks]
    if head is None:
        words += ["--standalone"]
    else:
        words += ["--nnodes", 2, "--node-rank", number, "--master-addr", head.address, "--master-port", head.port]
    return Launch(arguments=tuple(map(str, [*words, script, *arguments])), node=node)
