"""Scoring in worker processes: each response has a time limit, and a reward that crashes does not crash the trainer.

    scorer = Scorer("my_rewards.py:fn", workers=2, seconds=60)
    rewards = scorer.score(completions, puzzles, truncated)      # [N] Reward, in order
    scorer.close()

A worker is `python -m reward.scoring PATH SECONDS PARENT JOBS REPLIES`. JOBS and REPLIES are descriptors of its own: it
reads one JSON job {"index", "completion", "puzzle"} per line and writes one JSON result {"index", "total", "parts",
"status", "message"} per line. Its standard input is empty, and what the reward prints goes to standard error.

A plain function gets one response at a time, in the main thread and outside an event loop, so that it may call
asyncio.run, fork, and start pools of processes. An async one gets up to CONCURRENT at once, each with its own time limit.
"""

import asyncio
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from data.errors import UserError
from data.processes import end_group_with_this_process, end_with_parent, keep_from_children, module_environment
from data.puzzles import Puzzle
from reward import Reward, RewardFn, Status, load_reward
from reward.adapters import CONCURRENT, is_async, score_async, score_here, score_plain
from reward.result import timed_out

GRACE = 1.0  # seconds after the limit until a process is killed: the time-out of a coroutine can reply before
FOREIGN = (
    "something else than a result came from its scoring process: does it write to descriptors that are not its own?"
)
START_SECONDS = 300.0  # a reward module may load a model


class Scorer:
    """Scores responses. path: a reward, as for load_reward.

    workers: number of processes. 0 scores in this process, without a time limit; a debugger then reaches the function.
    Workers start with `start`, else with the first `score`; `ready` and `score` raise UserError when one does not.
    """

    def __init__(
        self, path: str, workers: int = 1, seconds: float = 60.0, on_reply: Callable[[], None] = lambda: None
    ) -> None:
        """seconds: time limit per response. on_reply() is called for every response that a worker has scored."""
        self.fn = load_reward(path) if workers == 0 else None
        self.workers = [_Worker(path, seconds, on_reply) for _ in range(workers)]
        # one pool for the life of the scorer: a worker process ends with the thread that started it (end_with_parent)
        self.threads = ThreadPoolExecutor(workers) if workers else None
        self.starting: list[Future[None]] = []
        self.stop, self.closed = threading.Event(), False  # stop: of the call of `score` that runs
        self.lock = threading.Lock()  # calls side by side would read one another's replies

    def start(self) -> None:
        """Begin to start the worker processes, and do not wait for them."""
        self.starting = [self.threads.submit(worker.start) for worker in self.workers]  # without workers none

    def ready(self) -> None:
        """Wait until the worker processes are ready."""
        while self.starting:
            self.starting.pop().result()

    def score(
        self, completions: list[str], puzzles: list[Puzzle], truncated: list[bool], stop_at_failure: bool = False
    ) -> list[Reward | None]:
        """[N] rewards in order. A response that was cut gets the status TRUNCATED; its reward does not change.

        truncated: [N] whether a response was cut at the length limit.
        stop_at_failure: stop at the first ERROR or TIMEOUT; responses that were not scored by then are None.
        """
        jobs = [
            {"index": index, "completion": completion, "puzzle": asdict(puzzle)}
            for index, (completion, puzzle) in enumerate(zip(completions, puzzles, strict=True))
        ]
        if self.workers:
            with self.lock:
                found = self._score_in_workers(jobs, stop_at_failure)
        else:
            found = score_here(self.fn, completions, puzzles, stop_at_failure)
        results = [found.get(index) for index in range(len(jobs))]
        return [
            replace(result, status=Status.TRUNCATED) if cut and result is not None and result.scored else result
            for result, cut in zip(results, truncated, strict=True)
        ]

    def _score_in_workers(self, jobs: list[dict], stop_at_failure: bool) -> dict[int, Reward]:
        self.stop = stop = threading.Event()
        pairs = [(worker, jobs[k :: len(self.workers)]) for k, worker in enumerate(self.workers)]
        assert self.threads is not None
        if self.closed:  # looked at after `stop` is there for close() to set
            return {}
        try:
            self.ready()
            futures = [self.threads.submit(worker.score, share, stop, stop_at_failure) for worker, share in pairs]
            wait(futures)  # result() below may raise; first let all workers end their share
        except BaseException:  # Ctrl-C: Python ends when its threads have, and these would score all that is left
            stop.set()
            for worker in self.workers:
                worker.kill()
            raise
        return {index: reward for future in futures for index, reward in future.result().items()}

    def close(self) -> None:
        """End the worker processes, also while `score` runs in another thread: what it has not scored is None."""
        self.closed = True
        self.stop.set()
        for worker in self.workers:
            worker.kill()
        if self.threads is not None:
            self.threads.shutdown()
        for worker in self.workers:
            worker.stop()


class _Worker:
    """One scoring process. It is started when it is first needed, and again after it died or was killed."""

    def __init__(self, path: str, seconds: float, on_reply: Callable[[], None]) -> None:
        self.path, self.seconds, self.on_reply = path, seconds, on_reply
        self.process: subprocess.Popen | None = None
        self.jobs = self.replies = -1  # our ends of the two pipes
        self.unread = b""
        self.is_async = False

    def score(self, jobs: list[dict], stop: threading.Event, at_failure: bool) -> dict[int, Reward]:
        """{index: reward}. When the process hangs or dies with several jobs in flight, each is tried again alone, so
        that only the job that caused it gets the failure."""
        done: dict[int, Reward] = {}
        waiting, alone = deque(jobs), deque()
        while (waiting or alone) and not stop.is_set():
            queue, window = (alone, 1) if alone else (waiting, CONCURRENT)
            alone.extend(self._run(queue, window, done, stop, at_failure))
        return done

    def _run(self, queue: deque, window: int, done: dict[int, Reward], stop: threading.Event, at_failure: bool) -> list:
        """Do the jobs of the queue, at most `window` in flight, until it is empty or the process fails.

        Returns the jobs to try again alone.
        """
        self.start()
        window = window if self.is_async else 1
        in_flight: dict[int, tuple[dict, float]] = {}
        while (queue or in_flight) and not stop.is_set():
            failure = None
            while queue and len(in_flight) < window and failure is None:
                job = queue.popleft()
                in_flight[job["index"]] = (job, time.monotonic() + self.seconds + GRACE)
                failure = self._send(job)
            reply = failure or self._receive(min(deadline for _, deadline in in_flight.values()))
            if isinstance(reply, dict) and not is_reply(reply, in_flight):
                reply = Reward(total=math.nan, status=Status.ERROR, message=FOREIGN)
            if isinstance(reply, Reward):  # no reply: the process hangs or has died
                self.stop()
                if len(in_flight) > 1:
                    return [job for job, _ in in_flight.values()]  # any of them may be the cause
                index, reward = next(iter(in_flight)), reply
                if queue and not stop.is_set():
                    self.start()
            else:
                index = reply.pop("index")
                reward = Reward(**{**reply, "status": Status(reply["status"])})
            del in_flight[index]
            done[index] = reward
            self.on_reply()
            if at_failure and reward.failed:
                stop.set()
        if in_flight:
            self.stop()  # its answers are no longer wanted
        return []

    def start(self) -> None:
        """Start the process, unless it runs. Returns when it is ready; raises UserError when it does not get so far."""
        if self.process is not None and self.process.poll() is not None:
            self.stop()  # it died between two steps, with nothing in flight
        if self.process is not None:
            return
        jobs, self.jobs = os.pipe()
        self.replies, replies = os.pipe()
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-P",  # no module of the current folder stands before ours, or before one beside a reward's file
                "-m",
                "reward.scoring",
                self.path,
                str(self.seconds),
                *map(str, (os.getpid(), jobs, replies)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what the reward prints must not mix with what a command prints
            pass_fds=(jobs, replies),
            env=module_environment(),
            start_new_session=True,  # a SIGTERM for the run must not reach it
        )
        os.close(jobs)
        os.close(replies)
        os.set_blocking(self.jobs, False)  # a stuck worker that reads no more must not block _send
        self.unread = b""
        ready = self._receive(time.monotonic() + START_SECONDS)
        if isinstance(ready, Reward):
            why = ready.message if ready.status is Status.ERROR else f"it was not ready within {START_SECONDS:g} s"
        else:
            why = str(ready.get("refused", "")).removeprefix(f"--reward {self.path}: ")
        if why:
            self.stop()
            raise UserError(f"--reward {self.path}: its scoring process did not start: {why}")
        self.is_async = ready.get("is_async") is True

    def _send(self, job: dict) -> Reward | None:
        """Write one job. Returns a Reward with the reason when it cannot be written."""
        data, pipe = (json.dumps(job, default=str) + "\n").encode(), self.jobs
        deadline = time.monotonic() + self.seconds + GRACE
        while data:
            replied, free, _ = select.select([self.replies], [pipe], [], max(0.0, deadline - time.monotonic()))
            if not (replied or free):
                return timed_out(self.seconds)
            if replied and not self._take():  # a worker that waits to write its answers reads no job
                return self._ended()
            try:
                data = data[os.write(pipe, data) :] if free else data
            except BrokenPipeError:
                return self._ended()
        return None

    def _take(self) -> bool:
        """Read a piece of the replies; False when there will be none."""
        self.unread += (piece := os.read(self.replies, 1 << 16))
        return bool(piece)

    def _receive(self, deadline: float) -> dict | Reward:
        """The next reply, or a Reward with the reason why there is none."""
        while b"\n" not in self.unread:
            if not select.select([self.replies], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return timed_out(self.seconds)
            if not self._take():
                return self._ended()
        line, _, self.unread = self.unread.partition(b"\n")
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        return reply if isinstance(reply, dict) else Reward(total=math.nan, status=Status.ERROR, message=FOREIGN)

    def _ended(self) -> Reward:
        try:
            message = f"its scoring process ended with exit code {self.process.wait(timeout=5)}"
        except subprocess.TimeoutExpired:
            message = "its scoring process closed its pipes"
        return Reward(total=math.nan, status=Status.ERROR, message=message)

    def kill(self) -> None:
        """Kill the process and the processes that it started."""
        if (process := self.process) is not None:  # another thread may forget it
            with suppress(ProcessLookupError):  # it is gone
                os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own (start_new_session)

    def stop(self) -> None:
        """Kill it, and forget it."""
        if self.process is None:
            return
        self.kill()
        self.process.wait()
        os.close(self.jobs)
        os.close(self.replies)
        self.process = None


def is_reply(reply: dict, in_flight: dict[int, Any]) -> bool:
    """Is this what a worker says about one of its jobs, and not what a reward wrote into its pipe?"""
    kinds = {"index": int, "total": float, "parts": dict, "status": str, "message": str}
    known = reply.keys() == kinds.keys() and all(type(reply[name]) is kind for name, kind in kinds.items())
    return known and reply["index"] in in_flight and reply["status"] in list(Status)


# ---- what runs in the worker


def serve(path: str, seconds: float, jobs: int, replies: int) -> None:
    """Do jobs until there are no more. jobs, replies: descriptors."""
    keep_from_children([jobs, replies])
    end_group_with_this_process()
    sys.stdout.reconfigure(line_buffering=True)  # a worker is killed without notice; what it printed must be seen
    try:
        fn = load_reward(path)
    except UserError as error:  # it could be loaded in the trainer: e.g. it reads sys.argv or the environment
        _write(replies, {"refused": str(error)})
        os._exit(1)
    _write(replies, {"ready": True, "is_async": is_async(fn)})
    if is_async(fn):
        asyncio.run(_serve_side_by_side(fn, seconds, jobs, replies))
    for job in map(json.loads, os.fdopen(jobs, "rb", closefd=False)):
        _answer(replies, job, score_plain(fn, job["completion"], Puzzle(**job["puzzle"]), seconds))
    os._exit(0)  # the trainer is done; threads of the reward function may still be stuck


async def _serve_side_by_side(fn: RewardFn, seconds: float, jobs: int, replies: int) -> None:
    loop, tasks, unread = asyncio.get_running_loop(), set(), b""

    async def answer(job: dict) -> None:
        _answer(replies, job, await score_async(fn, job["completion"], Puzzle(**job["puzzle"]), seconds))

    def read() -> None:  # whenever jobs arrive, also while coroutines run
        nonlocal unread
        piece = os.read(jobs, 1 << 16)
        if not piece:
            os._exit(0)
        *lines, unread = (unread + piece).split(b"\n")
        for line in lines:
            task = loop.create_task(answer(json.loads(line)))
            tasks.add(task)  # the event loop has only weak references to tasks
            task.add_done_callback(tasks.discard)

    loop.add_reader(jobs, read)
    await asyncio.Event().wait()  # for ever: `read` ends the process


def _answer(replies: int, job: dict, reward: Reward) -> None:
    _write(replies, {"index": job["index"], **asdict(reward)})


def _write(replies: int, message: dict) -> None:
    data = (json.dumps(message) + "\n").encode()
    while data:
        data = data[os.write(replies, data) :]


if __name__ == "__main__":
    end_with_parent(int(sys.argv[3]))
    serve(sys.argv[1], float(sys.argv[2]), int(sys.argv[4]), int(sys.argv[5]))
