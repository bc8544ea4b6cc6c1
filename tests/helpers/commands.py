"""Commands run as a user would run them, and where things are."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/fixtures"


def run_command(verb: str, *arguments: object, ranks: int | None = None, env: dict | None = None, timeout: int = 240):
    """Run launch/VERB.py as a user would; with `ranks`, under torchrun. Returns the completed process."""
    words = [str(ROOT / "launch" / f"{verb}.py"), *map(str, arguments)]
    launcher = [sys.executable]
    if ranks is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    full_env = {**os.environ, **(env or {})}
    return subprocess.run(
        [*launcher, *words], cwd=ROOT, env=full_env, capture_output=True, text=True, timeout=timeout, check=False
    )


def succeed(*args, **kwargs) -> str:
    """run_command that must exit 0; returns its standard output."""
    done = run_command(*args, **kwargs)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout
