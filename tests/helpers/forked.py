"""The client of the fork server: starts it, asks it for processes, and stands for them as subprocess.Popen would."""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

SERVER = Path(__file__).with_name("forkserver.py")
ENVIRONMENT = dict(os.environ)
"""The environment that pytest was started with. Commands get it; modules that tests import change os.environ later on."""
SET_BEFORE_IMPORT = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""What our commands set before they import torch and vLLM (launch/__init__.py, rollout/vllm_versions.py)."""
READ_AT_IMPORT = (
    "CUDA_",
    "HF_",
    "KMP_",
    "LD_",
    "MKL_",
    "OMP_",
    "PYTHON",
    "PYTORCH_",
    "TORCH_",
    "TRANSFORMERS_",
    "VLLM_",
)
"""The names of variables that libraries may read when they are imported begin so."""
VLLM_LIBRARIES = (
    "vllm.entrypoints.llm",
    "vllm.lora.peft_helper",
    "vllm.lora.worker_manager",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.qwen2",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
)
TIMEOUT = 1700.0
"""Seconds after which a command counts as hanging, on a machine that may be busy."""
GRACE = 30.0
"""Seconds that the other ranks have to end after SIGTERM; torchrun gives them as many."""


def can_fork() -> bool:
    """Is the fork server faithful here? Not where CUDA may be used: it does not survive a fork."""
    return hasattr(os, "pidfd_open") and not os.path.exists("/dev/nvidiactl") and not os.environ.get("TESTS_FRESH")


@dataclass(frozen=True, kw_only=True)
class Command:
    """`python SCRIPT ARGUMENTS` in a working directory and an environment."""

    script: Path | str
    """A file; a str is the name of a module, as after `python -m`."""
    arguments: tuple[str, ...]
    cwd: Path
    env: dict[str, str]
    starts_others: bool = False
    """Does it start Python processes, which are to be forked too?"""
    node: str = ""
    """Network namespace to run in; "": that of pytest."""


class ForkServer:
    """One per pytest worker, started by the first command."""

    def __init__(self) -> None:
        self.libraries: tuple[str, ...] = ()
        """Modules to import besides the server's own list; conftest.py names vLLM's when a selected test needs them."""
        self.requests: socket.socket | None = None

    def start(self) -> None:
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen(
            [sys.executable, SERVER, *self.libraries],
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            env=SET_BEFORE_IMPORT | ENVIRONMENT,
            start_new_session=True,
        )
        theirs.close()
        atexit.register(self.stop, process)

    def stop(self, process: subprocess.Popen) -> None:
        """The server ends when this end of the socket closes, and kills what still runs."""
        self.requests.close()
        process.wait()

    def fork(self, command: Command, streams: list[int]) -> IO[str]:
        """Run a command on three descriptors; returns a pipe that holds its process id and, later, its exit code."""
        env = command.env
        changed = {name for name in {*env, *ENVIRONMENT} if env.get(name) != ENVIRONMENT.get(name)} - {"PYTHONPATH"}
        at_import = sorted(name for name in changed if name.startswith(READ_AT_IMPORT))
        assert not at_import, (
            f"{at_import}: libraries read this when they are imported; start the command with fresh=True"
        )
        if self.requests is None:
            self.start()
        request = {"script": str(command.script), "flag": "-m" * isinstance(command.script, str)}
        request |= {"arguments": command.arguments, "cwd": str(command.cwd), "env": env, "node": command.node}
        request |= {"starts_others": command.starts_others, "unbuffered": False}
        receiver, sender = os.pipe()
        socket.send_fds(self.requests, [json.dumps(request).encode()], [*streams, sender])
        os.close(sender)
        return os.fdopen(receiver)


server = ForkServer()


class ForkedProcess:
    """A forked command, with the part of subprocess.Popen that tests use. Its standard input is empty, its text UTF-8.

    stdout, stderr: descriptors; the standard output is a pipe that can be read here when it is None.
    """

    def __init__(self, command: Command, stdout: int | None = None, stderr: int = 2) -> None:
        self.stdout: IO[str] | None = None
        mine, theirs = None, stdout
        if theirs is None:
            mine, theirs = os.pipe()
            self.stdout = os.fdopen(mine, encoding="utf-8", errors="replace")
        with open(os.devnull, "rb") as nothing:
            self.answers = server.fork(command, [nothing.fileno(), theirs, stderr])
        if mine is not None:
            os.close(theirs)
        self.returncode: int | None = None
        """Negative for a signal."""
        line = self.answers.readline()
        assert line, "the fork server has ended; the reason is on its standard error"
        self.pid = int(line)

    def poll(self, seconds: float = 0.0) -> int | None:
        """The exit code, once it has ended; waits at most so long for it."""
        if self.returncode is None and select.select([self.answers], [], [], seconds)[0]:
            self.returncode = int(self.answers.readline())
            self.answers.close()
        return self.returncode

    def wait(self, timeout: float = TIMEOUT) -> int:
        code = self.poll(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return code

    def communicate(self, timeout: float = TIMEOUT) -> tuple[str, None]:
        """The rest of the standard output, when it is a pipe, and the end of the process."""
        end = time.monotonic() + timeout
        text = self.stdout.read()
        self.wait(max(0.0, end - time.monotonic()))
        return text, None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # the server has seen its end, and says so in a moment
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def kill_group(self) -> None:
        """Kill the process and all it started that did not leave its session."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.wait()


def run_forked(commands: list[Command], timeout: float) -> subprocess.CompletedProcess:
    """Run one command, or the ranks of one, to its end, as subprocess.run(capture_output=True, text=True).

    When a rank fails the others get SIGTERM, and SIGKILL later, as from torchrun; the exit code is then 1 as there.
    """
    with ExitStack() as cleanup:
        (stdout, stdout_end), (stderr, stderr_end) = os.pipe(), os.pipe()
        for pipe in (stdout, stderr):
            cleanup.callback(os.close, pipe)
        try:
            processes = [ForkedProcess(command, stdout_end, stderr_end) for command in commands]
        finally:
            os.close(stdout_end)
            os.close(stderr_end)
        said = read_to_the_end({stdout: b"", stderr: b""}, processes, timeout)
    codes = [process.wait() for process in processes]
    text = [said[pipe].decode("utf-8", "replace").replace("\r\n", "\n") for pipe in (stdout, stderr)]
    words = [str(commands[0].script), *commands[0].arguments]
    return subprocess.CompletedProcess(words, codes[0] if len(codes) == 1 else int(any(codes)), *text)


def read_to_the_end(said: dict[int, bytes], processes: list[ForkedProcess], timeout: float) -> dict[int, bytes]:
    """What comes out of each pipe until all are closed and all processes have ended.

    Raises subprocess.TimeoutExpired, after killing them, when that takes too long.
    """
    unread, stopping, deadline = set(said), False, time.monotonic() + timeout
    while unread or any(process.returncode is None for process in processes):
        pipes = [*unread, *(process.answers for process in processes if process.returncode is None)]
        ready = select.select(pipes, [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            for process in processes:
                process.kill_group()
            if stopping:
                break
            raise subprocess.TimeoutExpired(f"process {processes[0].pid}", timeout, b"".join(said.values()))
        for pipe in unread.intersection(ready):
            piece = os.read(pipe, 1 << 16)
            said[pipe] += piece
            if not piece:
                unread.remove(pipe)
        codes = [process.poll() for process in processes]
        if len(codes) > 1 and any(codes) and not stopping:
            stopping, deadline = True, time.monotonic() + GRACE
            for process in processes:
                process.send_signal(signal.SIGTERM)
    return said
