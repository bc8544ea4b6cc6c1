"""Commands run as a user would run them, and where things are.

A command is forked from a process that has imported its libraries (forkserver.py), which saves the 6 to 9 CPU seconds that these
imports take. `fresh=True` starts a real process instead: for tests about startup, exit codes, the hash seed, variables that
libraries read when they are imported, and one run of each command. With TESTS_FRESH=1 in the environment all are real.
"""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.helpers.forked import ENVIRONMENT, TIMEOUT, Command, ForkedProcess, can_fork, run_forked

if TYPE_CHECKING:
    from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/fixtures"
SMALL_GRPO = (
    *("--prompts-per-step", 4, "--group-size", 3, "--max-prompt-tokens", 400, "--max-response-tokens", 16),
    *("--lora-rank", 8, "--lora-alpha", 16, "--lr", 1e-2, "--insist"),
)
"""Options of launch/grpo.py for a step of 12 short responses."""


def free_port() -> int:
    """A port of the loopback address that no connection is given by itself: those have numbers above 32767."""
    for port in random.Random(os.getpid() + time.monotonic_ns()).sample(range(15000, 30000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port below 30000")


STARTS_OTHERS = ("ablate", "demo", "selfdistill")
"""Verbs of launch/ whose work is done by other verbs, each in a process of its own."""


def command_of(script: str | Path, arguments: tuple, env: dict | None, cwd: Path) -> Command:
    """script: a verb of launch/, or the path of a Python file."""
    path = ROOT / "launch" / f"{script}.py" if isinstance(script, str) else script
    words, env = tuple(map(str, arguments)), {**ENVIRONMENT, **(env or {})}
    return Command(script=path, arguments=words, cwd=cwd, env=env, starts_others=script in STARTS_OTHERS)


def run_command(
    script: str | Path,
    *arguments: object,
    ranks: int | None = None,
    env: dict | None = None,
    cwd: Path = ROOT,
    timeout: float = TIMEOUT,
    fresh: bool = False,
) -> subprocess.CompletedProcess:
    """Run launch/SCRIPT.py, or the file SCRIPT, to its end; with `ranks`, as the processes of one torchrun."""
    command = command_of(script, arguments, env, cwd)
    if can_fork() and not fresh:
        return run_forked([command], timeout) if ranks is None else run_ranks(command, ranks, timeout)
    launcher = [sys.executable]
    if ranks is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words = [*launcher, str(command.script), *command.arguments]
    return subprocess.run(words, cwd=cwd, env=command.env, capture_output=True, text=True, timeout=timeout, check=False)


def start_command(
    script: str | Path, *arguments: object, env: dict | None = None, cwd: Path = ROOT, fresh: bool = False
) -> ForkedProcess | subprocess.Popen:
    """Start it and return at once: a process with its own session, whose standard output is a pipe."""
    command = command_of(script, arguments, env, cwd)
    if can_fork() and not fresh:
        return ForkedProcess(command)
    words = [sys.executable, str(command.script), *command.arguments]
    return subprocess.Popen(words, cwd=cwd, env=command.env, stdout=subprocess.PIPE, text=True, start_new_session=True)


def kill_at(said: str, out: Path, script: str | Path, *arguments: object) -> None:
    """Start a command that writes OUT and kill it at its line that begins with `said`.

    On a busy machine it may end before the kill comes. That would prove nothing, so it is then done once more.
    """
    for _ in range(5):
        process = start_command(script, *arguments)
        while (line := process.stdout.readline()) and not line.startswith(said):
            pass
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        assert line.startswith(said), f"it ended with {code} and did not say {said!r}"
        if code == -signal.SIGKILL:
            return
        shutil.rmtree(out)
    raise AssertionError(f"it ended five times before the kill came: {code}")


def succeed(*args, **kwargs) -> str:
    """run_command that must exit 0; returns its standard output."""
    done = run_command(*args, **kwargs)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def run_ranks(command: Command, ranks: int, timeout: float) -> subprocess.CompletedProcess:
    """The forked command once per rank, with the variables and the store that torchrun gives them."""
    commands, store = rank_commands(command, ranks)
    done = run_forked(commands, timeout)
    del store  # torchrun's lives longer than any rank, too
    return done


def rank_commands(command: Command, ranks: int) -> tuple[list[Command], "TCPStore"]:
    """(the command of each rank, the store that must live as long as they do)"""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "ROLE_WORLD_SIZE": ranks,
        "GROUP_RANK": 0,
        "GROUP_WORLD_SIZE": 1,
        "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_RUN_ID": f"tests-{store.port}",
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    commands = []
    for rank in range(ranks):
        variables = {**common, "RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank}
        env = command.env | {name: str(value) for name, value in variables.items()}
        commands.append(dataclasses.replace(command, env=env))
    return commands, store
