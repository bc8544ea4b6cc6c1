"""A process that has imported the large libraries and forks a copy of itself for every command that a test runs.

python tests/helpers/forkserver.py [MODULE ...]

Importing torch, transformers, peft and vLLM takes 6 to 9 CPU seconds, which is most of the time of a short command. This
server pays for it once per pytest worker. tests/helpers/commands.py starts it and sends requests to its standard input, which
is a Unix socket. MODULE ... are imported besides LIBRARIES.

A request is a JSON object (the fields of Command in forked.py) with four file descriptors: standard input, output and error of
the command, and a pipe. The copy writes its process id to that pipe, and the server the exit code once the command has ended.

A command that starts other Python processes (torchrun its ranks, the demo its stages) gets a server of its own: see
fork_children.

A copy becomes what `python SCRIPT ARGUMENTS` would be: its own session, working directory, environment, sys.argv, sys.path and
`__main__`. Nothing of this repository is imported here, so the command imports its own modules, and what they do at import
(`launch` sets a variable of torch) happens in the command. These differences from a fresh process remain:
- The hash seed is that of the server: the same for all commands of a pytest worker.
- Libraries have read their environment variables before the fork (commands.py refuses requests that change one of those).
- The memory of the libraries counts as the command's from the start.
- The last part of the interpreter's shutdown, which takes all modules apart, is left out: it takes 0.4 to 2 CPU seconds.

Forking is safe because the server has one Python thread and never runs a tensor operation, so that no thread pool exists.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
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
    "setproctitle",
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

CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000
"""Linux, sched.h: a host name of its own, a network of its own."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Linux, sys/prctl.h: the signal that a process gets when its parent ends; be the parent of orphaned descendants."""

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
    """Make this copy what `python SCRIPT ARGUMENTS`, or one with -m MODULE or -c CODE, is before its first line."""
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    if request["node"]:
        enter_node(request["node"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(set_by_libraries | request["env"])
    own = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    flag, script, arguments = request["flag"], request["script"], request["arguments"]
    first = {"": str(Path(script).parent), "-m": request["cwd"], "-c": ""}[flag]
    sys.path[:] = [first, *own, *library_path]
    sys.argv[:] = ["-c" if flag == "-c" else script, *arguments]
    sys.stdout.reconfigure(line_buffering=request["unbuffered"])
    words = [sys.executable, *[flag] * bool(flag), script, *arguments]
    sys.modules["setproctitle"].setproctitle(" ".join(words))  # for who looks it up in /proc
    random.seed()  # the global generators of a fresh process differ from run to run
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].seed()
    sys.excepthook = print_traceback


def enter_node(name: str) -> None:
    """Join the network namespace of this name, and call this host so."""
    library = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{name}", "rb") as namespace:
        if library.setns(namespace.fileno(), CLONE_NEWNET) or library.unshare(CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
    socket.sethostname(name)


def print_traceback(kind: type[BaseException], error: BaseException, traceback: TracebackType) -> None:
    """As Python prints it, without the frames of this file."""
    while traceback.tb_next is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    sys.__excepthook__(kind, error.with_traceback(traceback), traceback)


def fork_children() -> tuple[dict[str, Any], list[int]] | None:
    """Fork a server for the processes that this command starts, before it has threads or makes tensors.

    From here on subprocess.Popen asks that server for `python SCRIPT`, with -m or -c too, and starts all else as always.
    Returns None in the command; a request and its standard streams in a copy that has become the command's child.
    """
    library = ctypes.CDLL(None)
    # The child must be the command's own, which waits for it and is told when it ends. So the server forks a process that
    # forks the child and ends, and the kernel gives the orphan to the nearest ancestor that asks for orphans.
    library.prctl(PR_SET_CHILD_SUBREAPER, 1)
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        ask_instead_of_starting(mine)
        return None
    mine.close()
    library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    while True:
        message, received, _, _ = socket.recv_fds(theirs, 1 << 20, 4)
        if not message:
            os._exit(0)
        between = os.fork()
        if between:
            for handle in received:
                os.close(handle)
            os.waitpid(between, 0)
            continue
        between = os.getpid()
        if os.fork():
            os._exit(0)
        while os.getppid() == between:
            time.sleep(0.001)
        request, (*streams, pipe) = json.loads(message), received
        if request["new_session"]:
            os.setsid()
        report(pipe, os.getpid())
        os.close(pipe)
        theirs.close()
        return request, streams


def ask_instead_of_starting(requests: socket.socket) -> None:
    """Replace the part of subprocess.Popen that starts a process, for Python processes."""
    start_process, lock = subprocess.Popen._execute_child, threading.Lock()

    def fork_or_start(
        popen, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *rest
    ):
        request = None if executable or preexec_fn or pass_fds or shell else program_of(args)
        if request is None:
            given = (args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell)
            return start_process(popen, *given, *rest)
        stdin, stdin_end, stdout_end, stdout, stderr_end, stderr = rest[:6]
        streams = [place if handle == -1 else handle for place, handle in enumerate((stdin, stdout, stderr))]
        request |= {"cwd": os.fspath(cwd or os.getcwd()), "env": dict(os.environ if env is None else env)}
        request |= {"new_session": rest[11], "node": ""}
        receiver, sender = os.pipe()
        with lock:
            socket.send_fds(requests, [json.dumps(request).encode()], [*streams, sender])
        os.close(sender)
        with os.fdopen(receiver) as answer:
            popen.pid = int(answer.readline())
        popen._child_created = True
        popen._close_pipe_fds(stdin, stdin_end, stdout_end, stdout, stderr_end, stderr)

    subprocess.Popen._execute_child = fork_or_start


def program_of(words: Any) -> dict[str, Any] | None:
    """{script, flag, arguments, unbuffered, starts_others} of a command line, when it is a Python program's."""
    if isinstance(words, str | bytes | os.PathLike):
        return None
    python, *words = map(os.fspath, words)
    if python != sys.executable:
        return None
    unbuffered = words[:1] == ["-u"]
    words = words[unbuffered:]
    flag = words[0] if words[:1] in (["-m"], ["-c"]) else ""
    words = words[bool(flag) :]
    if not words or not (flag or words[0].endswith(".py")):
        return None
    request = {"script": words[0], "flag": flag, "arguments": words[1:], "unbuffered": unbuffered}
    return request | {"starts_others": words[0] == "torch.distributed.run" or "--placement" in words}


def run(script: str, flag: str) -> None:
    """Run a file, a module or code as `__main__`. What it raises goes on to the interpreter, as in any other process."""
    global exit_code
    try:
        if flag == "-m":
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            if not flag:
                vars(main).update(__file__=script, __cached__=None)
                with open(script, "rb") as handle:
                    program = compile(handle.read(), script, "exec")
            vars(main).update(__annotations__={})
            exec(script if flag else program, vars(main))
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
    # it looks for the memory of the command line, which it finds only before a library has changed the environment
    importlib.import_module("setproctitle").getproctitle()
    for name in (*LIBRARIES, *sys.argv[1:]):
        importlib.import_module(name)
    # half a second of every engine's start, which it leaves out where it has been done; older versions have no such thing
    if set_up_logging := getattr(sys.modules.get("vllm.logger"), "configure_logging_if_needed", None):
        set_up_logging(sys.modules["vllm.config.logging"].LoggingConfig())
    # on a CPU every engine's start looks through all modules for kernels to replace: once is enough
    platform = getattr(sys.modules.get("vllm.platforms"), "current_platform", None)
    if hasattr(platform, "register_triton_kernel_overrides"):
        platform.register_triton_kernel_overrides()
        type(platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
    # what vLLM wants to know of a model's class it asks a process of its own, for CUDA's sake: 8 s each on a new machine
    registry = sys.modules.get("vllm.model_executor.models.registry")
    if hasattr(registry, "_run_in_subprocess"):
        registry._run_in_subprocess = lambda look: look()
    set_by_libraries = {name: value for name, value in os.environ.items() if name not in before}
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()  # collections in the copies leave the libraries alone, and their memory stays shared
    todo = serve(socket.socket(fileno=os.dup(0)))
    while todo is not None:
        request, streams = todo
        become(request, streams, library_path, set_by_libraries)
        todo = fork_children() if request["starts_others"] else None
    run(request["script"], request["flag"])


if __name__ == "__main__":
    start()
