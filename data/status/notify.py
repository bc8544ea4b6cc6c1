"""Runs the command of --notify when a run is over, also when it was killed.

    python -m data.status.notify        # started by RunStatus (data/status/status.py)

Its standard input is a pipe from the run: a line {"command", "status", "out", "killed"}, with the path of status.json, what
the command writes, and the error of a kill; at the end a line with "state", "error", "exit_code", "step" and "steps". When
the pipe ends without that line, the run was killed: status.json gets the state "killed". A process of its own, because
nothing in a killed process can say that it was killed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from data.errors import UserError
from data.files import write_whole


def main() -> None:
    """Wait for the end of the run, then run the command. It gets RUN_OUT, RUN_STATE, RUN_STEP, RUN_STEPS, RUN_ERROR."""
    given, last = sys.stdin.readline(), sys.stdin.readline()
    if not given:
        return  # killed before it had begun
    order = json.loads(given)
    path = Path(order["status"])
    ended = json.loads(last) if last.endswith("\n") else note_the_kill(path, order["killed"])
    variables = {"RUN_OUT": order["out"], **{f"RUN_{name.upper()}": value for name, value in ended.items()}}
    known = {name: "" if value is None else str(value).replace("\0", "") for name, value in variables.items()}
    done = subprocess.run(
        order["command"], shell=True, env=os.environ | known, stdin=subprocess.DEVNULL, stdout=2, check=False
    )
    if done.returncode:
        print(f"note: the command of --notify ended with exit code {done.returncode}", file=sys.stderr)


def note_the_kill(path: Path, error: str) -> dict:
    """Write into status.json that the run was killed; returns what the command is told."""
    try:
        status = json.loads(path.read_bytes())
    except (OSError, ValueError):
        status = {}
    status |= {"state": "killed", "error": error, "seconds_left": None, "waiting_for": ""}
    try:
        if not path.parent.is_dir():  # removed by the user, and not to be made again
            return {name: status.get(name) for name in ("state", "error", "exit_code", "step", "steps")}
        write_whole(path, json.dumps(status, indent=1, ensure_ascii=False) + "\n")
    except UserError as problem:
        print(f"note: {problem}", file=sys.stderr)
    return {name: status.get(name) for name in ("state", "error", "exit_code", "step", "steps")}


if __name__ == "__main__":
    main()
