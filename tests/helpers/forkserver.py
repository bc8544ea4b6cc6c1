"""A process that has imported the large libraries and forks a copy of itself for every command that a test runs.

python tests/helpers/forkserver.py [MODULE ...]

Importing torch, transformers, peft and vLLM takes 6 to 9 CPU seconds, which is most of the time of a short command. This
server pays for it once per pytest worker. tests/helpers/commands.py starts it and sends requests to its standard input, which
is a Unix socket. MODULE ... are imported besides LIBRARIES.

A request is a JSON object {"script", "arguments", "cwd", "env"} with four file descriptors: standard input, output and error of
the command, and a pipe. The copy writes its process id to that pipe, and the server the exit code once the command has ended.

A copy becomes what `python SCRIPT ARGUMENTS` would be: its own session, working directory, environment, sys.argv, sys.path and
`__main__`. Nothing of this repository is imported here, so the command imports its own modules, and what they do at import (they
set environment variables for vLLM) happens in the command. These differences from a fresh process remain:
- The hash seed is that of the server: the same for all commands of a pytest worker.
- Libraries have read their environment variables before the fork (commands.py refuses requests that change one of those).
- /proc shows the command line of the server.
- The memory of the libraries counts as the command's from the start.
- The last part of the interpreter's shutdown, which takes all modules apart, is left out: it takes 0.4 to 2 CPU seconds.

Forking is safe because the server has one Python thread and never runs a tensor operation, so that no thread pool exists.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import select
import signal
import socket
import sys
import threading
import types
from pathlib import Path
from types import TracebackType
from typing import Any

LIBRARIES = (
    "accelerate",
    "anndata",
    "bitsandbytes.functional",
    "bitsandbytes.optim",
    "click",
    "h5py",
    "matplotlib.backends.backend_agg",
    "openai",
    "peft",
    "psutil",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "safetensors.torch",
    "scipy.optimize",
    "scipy.sparse",
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.checkpoint",
    "tqdm",
    "transformers.integrations.flash_attention",
    "transformers.masking_utils",
    "transformers.models.qwen2.modeling_qwen2",
    "yaml",
)
"""What commands import, directly or not. A module that is missing here costs each command time, and nothing else."""

exit_code: int | None = None
"""Of the command, once its last line has run; negative for a signal."""


@atexit.register  # before any library's, so that it runs after all of theirs
def leave() -> None:
    """End without taking the modules apart."""
    if exit_code is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if exit_code < 0:
        signal.signal(-exit_code, signal.SIG_DFL)
        os.kill(os.getpid(), -exit_code)
    os._exit(exit_code)


def serve(requests: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for every request. Returns only in a copy: the request, and the standard streams of the command.

    When pytest has closed its end, the commands that still run are killed and the server exits.
    """
    running: dict[int, tuple[int, int]] = {}  # descriptor of a process -> its id, the pipe for its exit code
    while True:
        ready, _, _ = select.select([requests, *running], [], [])
        for handle in set(ready) - {requests}:
            pid, pipe = running.pop(handle)
            _, status = os.waitpid(pid, 0)
            report(pipe, os.waitstatus_to_exitcode(status))
            os.close(pipe)
            os.close(handle)
        if requests not in ready:
            continue
        message, received, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not message:
            for pid, _ in running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            os._exit(0)
        *streams, pipe = received
        pid = os.fork()
        if pid == 0:
            os.setsid()
            report(pipe, os.getpid())
            for handle, (_, other) in running.items():
                os.close(handle)
                os.close(other)
            os.close(pipe)
            requests.close()
            return json.loads(message), streams
        for stream in streams:
            os.close(stream)
        running[os.pidfd_open(pid)] = (pid, pipe)


def report(pipe: int, number: int) -> None:
    """Write one line, unless the test no longer listens."""
    with contextlib.suppress(BrokenPipeError):
        os.write(pipe, f"{number}\n".encode())


def become(
    request: dict[str, Any], streams: list[int], library_path: list[str], set_by_libraries: dict[str, str]
) -> None:
    """Make this copy what `python SCRIPT ARGUMENTS` is before the first line of SCRIPT."""
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(set_by_libraries | request["env"])
    own = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [str(Path(request["script"]).parent), *own, *library_path]
    sys.argv[:] = [request["script"], *request["arguments"]]
    random.seed()  # the global generators of a fresh process differ from run to run
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].seed()
    sys.excepthook = print_traceback


def print_traceback(kind: type[BaseException], error: BaseException, traceback: TracebackType) -> None:
    """As Python prints it, without the frames of this file."""
    while traceback.tb_next is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    sys.__excepthook__(kind, error.with_traceback(traceback), traceback)


def run(script: str) -> None:
    """Run a file as `__main__`. What it raises goes on to the interpreter, as in any other process."""
    global exit_code
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    vars(main).update(__file__=script, __cached__=None, __annotations__={})
    with open(script, "rb") as handle:
        program = compile(handle.read(), script, "exec")
    try:
        exec(program, vars(main))
        exit_code = 0
    except SystemExit as ending:
        exit_code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        raise
    except KeyboardInterrupt:
        exit_code = -signal.SIGINT  # the interpreter ends by the signal, for the shell to know
        raise
    except BaseException:
        exit_code = 1
        raise


def start() -> None:
    """Import the libraries and serve; returns when a command has ended in a copy."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # python puts the folder of this file first, whose modules must not be taken for libraries
    library_path = [path for path in sys.path[1:] if path not in inherited]
    sys.path[:] = library_path
    before = dict(os.environ)
    for name in (*LIBRARIES, *sys.argv[1:]):
        importlib.import_module(name)
    set_by_libraries = {name: value for name, value in os.environ.items() if name not in before}
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()  # collections in the copies leave the libraries alone, and their memory stays shared
    request, streams = serve(socket.socket(fileno=os.dup(0)))
    become(request, streams, library_path, set_by_libraries)
    run(request["script"])


if __name__ == "__main__":
    start()
