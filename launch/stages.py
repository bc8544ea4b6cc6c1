"""Stages of the commands that run other commands (demo, ablate, selfdistill): each is a process of its own, and runs once."""

import importlib
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from data.options import flag_of
from data.processes import environment_without_launcher, run_as_stage
from eval.run_files import PARTIAL

LAUNCH = Path(__file__).resolve().parent


def run_stage(
    stage: str, result: Path | None, verb: str, *words: object, ranks: int = 1, **flags: object
) -> dict[str, float]:
    """Run launch/VERB.py as a process, or as `ranks` processes under torchrun, unless its result exists.

    result: a file that the stage writes last. words are passed as they are, flags as --name value (None is left out).
    Returns {stage: seconds} when the stage ran, else {}. A stage that fails ends this process with its exit code, one that
    was stopped with 143 or 130.
    """
    if result is not None and result.is_file():
        print(f"[{stage}] found {result}", flush=True)
        return {}
    arguments = command_line(words, flags)
    launcher = ["torchrun", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else ["python"]
    print(f"\n[{stage}] $ {shlex.join([*launcher, f'launch/{verb}.py', *arguments])}", flush=True)
    start = time.perf_counter()
    env = environment_without_launcher()  # a stage that inherited RANK would join the world of this process
    env |= {"OMP_NUM_THREADS": "1"} if ranks > 1 else {}  # torchrun's own default, without its banner
    launcher = [sys.executable, *(["-m", "torch.distributed.run", *launcher[1:]] if ranks > 1 else [])]
    code, asked = run_as_stage([*launcher, str(LAUNCH / f"{verb}.py"), *arguments], env)
    if asked or (code == 0 and result is not None and not result.is_file()):  # a trainer that is stopped exits with 0
        print(f"[{stage}] stopped; start the same command again to go on", file=sys.stderr, flush=True)
        raise SystemExit(128 + (asked or signal.SIGTERM))
    if code < 0 or code == 128 + signal.SIGKILL:
        number = -code if code < 0 else signal.SIGKILL
        name = {int(one): one.name for one in signal.Signals}.get(number, f"signal {number}")
        why = " (the system does that when memory is full)" if name == "SIGKILL" else ""
        print(
            f"[{stage}] was killed by {name}{why}; start the same command again to go on", file=sys.stderr, flush=True
        )
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
    seconds = time.perf_counter() - start
    print(f"[{stage}] {seconds:.0f} s", flush=True)
    return {stage: round(seconds, 1)}


def command_line(words: tuple[object, ...], flags: dict[str, object]) -> list[str]:
    """The arguments of a command: words as they are, flags as --name value (None is left out)."""
    given = [(flag_of(name), value) for name, value in flags.items() if value is not None]
    return [str(word) for word in (*words, *(word for pair in given for word in pair))]


def read_stage(verb: str, *words: object, **flags: object) -> Any:
    """The settings with which launch/VERB.py would run; words and flags as for `run_stage`. It is not run.

    Raises click.ClickException or UserError for what that command refuses before it reads a file.
    """
    return importlib.import_module(f"launch.{verb}").main.read(command_line(words, flags))


def begun(folder: Path) -> list[str]:
    """["--resume"] for a stage whose run folder an earlier call began, else []."""
    return ["--resume"] if (folder / "config.json").is_file() else []


def evaluate_files(folder: Path, stage: str, files: list[str], limit: int, **settings: object) -> dict[str, float]:
    """Evaluate a model, or a baseline, on the first `limit` puzzles of each file, into FOLDER/SPLIT.

    Returns {stage: seconds}, if it ran.
    """
    words = [word for file in files for word in ("--puzzles", file)]
    # launch/evaluate.py makes a folder per file only when there are several files
    out = folder if len(files) > 1 else folder / Path(files[0]).stem
    last = folder / "average.json" if len(files) > 1 else out / "metrics.json"
    # an earlier call was stopped; a baseline answers again in seconds
    begun = [*folder.glob(f"*/{PARTIAL}"), *folder.glob("*/metrics.json")] if "model" in settings else []
    words += ["--resume"] if begun else []
    return run_stage(stage, last, "evaluate", *words, limit=limit, out=out, **settings)
