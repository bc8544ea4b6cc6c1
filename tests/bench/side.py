"""A side of a benchmark: a process that makes one step for every line that it is sent, and answers with a line of JSON."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class Failed(SystemExit):
    """A side ended, or did not run; the text says which and how."""


class Side:
    """The parent's handle of a side.

    module: of tests/bench; given --serve it makes the steps of (task, side) and calls `answer`. tree: the repository that
    it is run in, this one if left out. python and environment: this process's if left out. Raises Failed, from here and
    from `step`, if the process ends.
    """

    def __init__(
        self,
        label: str,
        module: str,
        task: dict,
        side: dict,
        tree: Path | None = None,
        python: str = sys.executable,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.label = label
        words = [python, "-W", "ignore", "-m", f"tests.bench.{module}", "--serve", json.dumps([task, side])]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree, env=environment
        )
        self.ready = self._answer()
        """What it said when it was loaded."""
        self.steps: list[dict] = []

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def step(self) -> dict:
        """Its answer, with at least "seconds"."""
        with suppress(BrokenPipeError):  # _answer() says that it has ended
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        self.steps.append(self._answer())
        return self.steps[-1]

    def warm_up(self) -> "Side":
        """Make a step that is not counted."""
        self.step()
        self.steps.clear()
        return self

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries print too
                return json.loads(line)
        raise Failed(f"{self.label}: ended with exit code {self.process.wait()}")


def answer(ready: dict, step: Callable[[], dict]) -> None:
    """The process's part: say `ready`, then the result of a step for every line on standard input."""
    print(json.dumps(ready), flush=True)
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)


def ratio(name: str, above: list[dict], below: list[dict], key: str) -> str:
    """A RATIO line: median, smallest and largest of above / below, step by step."""
    ratios = sorted(a[key] / b[key] for a, b in zip(above, below, strict=True))
    return f"RATIO {name} {statistics.median(ratios):.2f} {ratios[0]:.2f} {ratios[-1]:.2f}"
