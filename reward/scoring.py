"""Scoring in worker processes: a time limit per response, and a reward function that cannot take the trainer down.

scorer = Scorer("my_rewards.py:fn", workers=2, seconds=60)
rewards = scorer.score(completions, puzzles, truncated)      # [N] Reward, in order
scorer.close()
"""

import asyncio
import inspect
import json
import os
import select
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TextIO

from data.puzzles import Puzzle
from reward import Reward, RewardFn, Status, as_reward, load_reward

GRACE = 1.0  # seconds beyond the limit before a process is killed: a coroutine's own time-out gets to reply first
START_SECONDS = 300.0  # a reward module may load a model


class Scorer:
    """path: what load_reward takes. workers 0 scores in this process: no time limit, breakpoints reach the function.

    Raises ValueError when the reward does not load.
    """

    def __init__(self, path: str, workers: int = 1, seconds: float = 60.0) -> None:
        self.fn = load_reward(path) if workers == 0 else None
        self.seconds = seconds
        self.workers = [_Worker(path, seconds) for _ in range(workers)]

    def score(self, completions: list[str], puzzles: list[Puzzle], truncated: list[bool]) -> list[Reward]:
        """[N] rewards in order. A response cut at the length limit has the status TRUNCATED; its reward stays as given."""
        jobs = [
            {"index": index, "completion": completion, "puzzle": asdict(puzzle)}
            for index, (completion, puzzle) in enumerate(zip(completions, puzzles, strict=True))
        ]
        results = self._in_workers(jobs) if self.workers else self._here(completions, puzzles)
        return [
            replace(result, status=Status.TRUNCATED) if cut and result.scored else result
            for result, cut in zip(results, truncated, strict=True)
        ]

    def _here(self, completions: list[str], puzzles: list[Puzzle]) -> list[Reward]:
        async def gather() -> list[Reward]:
            pairs = zip(completions, puzzles, strict=True)
            return await asyncio.gather(*(score_one(self.fn, text, puzzle, None) for text, puzzle in pairs))

        return asyncio.run(gather())

    def _in_workers(self, jobs: list[dict]) -> list[Reward]:
        shares = [jobs[k :: len(self.workers)] for k in range(len(self.workers))]
        with ThreadPoolExecutor(len(self.workers)) as threads:
            parts = threads.map(lambda worker, share: worker.score(share), self.workers, shares)
            by_index = {index: reward for part in parts for index, reward in part.items()}
        return [by_index[index] for index in range(len(jobs))]

    def close(self) -> None:
        """End the worker processes."""
        for worker in self.workers:
            worker.stop()


class _Worker:
    """One scoring process, started when it is first needed and again after it was killed or died."""

    def __init__(self, path: str, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self.process: subprocess.Popen | None = None
        self.unread = b""

    def score(self, jobs: list[dict]) -> dict[int, Reward]:
        """{index: reward}. The job that stops a process is named in its reward; the others go to a new process."""
        done: dict[int, Reward] = {}
        while waiting := [job for job in jobs if job["index"] not in done]:
            self._start()
            self._send(waiting)
            for _ in waiting:
                reply = self._receive(self.seconds + GRACE)
                if isinstance(reply, Reward):  # too late, or gone: the first job without an answer is to blame
                    done[next(job["index"] for job in waiting if job["index"] not in done)] = reply
                    self.stop()
                    break
                index = reply.pop("index")
                done[index] = Reward(**{**reply, "status": Status(reply["status"])})
        return done

    def _start(self) -> None:
        if self.process is not None:
            return
        root = str(Path(__file__).resolve().parent.parent)
        paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "reward.scoring", self.path, str(self.seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
        self.unread = b""
        if isinstance(self._receive(START_SECONDS), Reward):
            self.stop()
            raise ValueError(f"--reward {self.path}: its scoring process did not start; its own words stand above")

    def _send(self, jobs: list[dict]) -> None:
        try:
            self.process.stdin.write((json.dumps(jobs) + "\n").encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died between two steps; _receive says so

    def _receive(self, seconds: float) -> dict | Reward:
        """The next reply, or the Reward that says why there is none."""
        deadline = time.monotonic() + seconds
        pipe = self.process.stdout.fileno()
        while b"\n" not in self.unread:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return timed_out(self.seconds)
            piece = os.read(pipe, 1 << 16)
            if not piece:
                message = f"its scoring process ended with exit code {self.process.wait()}"
                return Reward(total=float("nan"), status=Status.ERROR, message=message)
            self.unread += piece
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def serve(path: str, seconds: float) -> None:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    fn = load_reward(path)
    _reply(replies, {"ready": True})
    for line in sys.stdin:
        asyncio.run(_score_chunk(fn, json.loads(line), seconds, replies))


async def _score_chunk(fn: RewardFn, jobs: list[dict], seconds: float, replies: TextIO) -> None:
    """Plain functions run one after another; coroutines run side by side. Each reply leaves as soon as it is there."""

    async def one(job: dict) -> None:
        reward = await score_one(fn, job["completion"], Puzzle(**job["puzzle"]), seconds)
        values = {"total": reward.total, "parts": reward.parts, "status": reward.status, "message": reward.message}
        _reply(replies, {"index": job["index"], **values})

    await asyncio.gather(*(one(job) for job in jobs))


async def score_one(fn: RewardFn, completion: str, puzzle: Puzzle, seconds: float | None) -> Reward:
    """One reward; an exception or a time-out becomes its status, with total nan, and never a number.

    The one place that catches every Exception: the function is the user's, and the run's --on-reward-error decides.
    """
    start = time.monotonic()
    try:
        result = fn(completion, puzzle)
        if inspect.isawaitable(result):
            result = await asyncio.wait_for(result, seconds)
        reward = as_reward(result)
    except Exception as error:
        if isinstance(error, TimeoutError) and seconds is not None and time.monotonic() - start >= seconds:
            return timed_out(seconds)
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}, line {where.lineno})"
        return Reward(total=float("nan"), status=Status.ERROR, message=" ".join(message.split()))
    if seconds is not None and time.monotonic() - start > seconds:
        return timed_out(seconds)
    return reward


def timed_out(seconds: float) -> Reward:
    return Reward(
        total=float("nan"), status=Status.TIMEOUT, message=f"it took longer than --reward-seconds {seconds:g}"
    )


def _reply(replies: TextIO, message: dict) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _end_with_parent(parent: int) -> None:
    """A trainer killed with -9 leaves no worker behind, not even one stuck in a reward function."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
