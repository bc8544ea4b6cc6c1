"""Scoring in worker processes: each response has a time limit, and a reward that crashes does not crash the trainer.

    scorer = Scorer("my_rewards.py:fn", workers=2, seconds=60)
    rewards = scorer.score(completions, puzzles, truncated)      # [N] Reward, in order
    scorer.close()

What runs in a worker is reward/worker.py. A plain function gets one response at a time, an async one up to CONCURRENT at
once, each with its own time limit. While others are still sampled, `begin` gives the workers what has ended.
"""

import itertools
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from queue import SimpleQueue
from typing import Any

from data.errors import UserError
from data.processes import module_environment
from data.puzzles import Puzzle
from reward import Reward, Status, load_reward
from reward.adapters import CONCURRENT, score_here
from reward.result import timed_out

GRACE = 1.0  # seconds after the limit until a process is killed: the time-out of a coroutine can reply before
FOREIGN = (
    "something else than a result came from its scoring process: does it write to descriptors that are not its own?"
)
GLANCE = 0.05  # seconds after which a thread that waits for a reply looks for what else there is to do
START_SECONDS = 300.0  # a reward module may load a model


class Scorer:
    """Scores responses. path: a reward, as for load_reward.

    workers: number of processes. 0 scores in this process, without a time limit; a debugger then reaches the function.
    Workers start with `start`, else with the first response; `ready` and `score` raise UserError when one does not.
    """

    def __init__(
        self, path: str, workers: int = 1, seconds: float = 60.0, on_reply: Callable[[], None] = lambda: None
    ) -> None:
        """seconds: time limit per response. on_reply(): called for every response that a worker has scored."""
        self.fn = load_reward(path) if workers == 0 else None
        self.workers = [_Worker(path, seconds, on_reply) for _ in range(workers)]
        self.starting: list[Future] = []
        self.begun: dict[tuple[int, str], deque[_Job]] = {}  # (id of the puzzle, completion) -> what `begin` began
        self.numbers = itertools.count()  # of jobs
        self.stop = threading.Event()  # of the jobs up to the end of the next `score`
        self.closed = threading.Event()
        self.lock = threading.Lock()  # calls of `score` side by side would share one `stop`
        for worker in self.workers:
            weakref.finalize(self, worker.waiting.put, None)  # a scorer that nobody closes must not leave processes

    def start(self) -> None:
        """Begin to start the worker processes, and do not wait for them."""
        self.starting = [worker.add(_Job(index=-1, stop=self.closed)).result for worker in self.workers]

    def ready(self) -> None:
        """Wait until the worker processes are ready."""
        starting, self.starting = self.starting, []
        for started in starting:
            started.result()

    def begin(self, completion: str, puzzle: Puzzle) -> None:
        """Begin to score a response that the next `score` asks for, while others are still sampled. Returns at once.

        Called by the thread that calls `score`, which gives up what it does not ask for. Without workers nothing is begun.
        """
        if self.workers:
            self.begun.setdefault((id(puzzle), completion), deque()).append(self._add(completion, puzzle))

    def score(
        self, completions: list[str], puzzles: list[Puzzle], truncated: list[bool], stop_at_failure: bool = False
    ) -> list[Reward | None]:
        """[N] rewards in order. A response that was cut gets the status TRUNCATED; its reward does not change.

        truncated: [N] whether a response was cut at the length limit.
        stop_at_failure: stop at the first ERROR or TIMEOUT; responses that were not scored by then are None. Of responses that
        were begun several may have failed.
        """
        if self.workers:
            with self.lock:
                results = self._score_in_workers(list(zip(completions, puzzles, strict=True)), stop_at_failure)
        else:
            found = score_here(self.fn, completions, puzzles, stop_at_failure)
            results = [found.get(index) for index in range(len(completions))]
        return [
            replace(result, status=Status.TRUNCATED) if cut and result is not None and result.scored else result
            for result, cut in zip(results, truncated, strict=True)
        ]

    def _score_in_workers(self, asked: list[tuple[str, Puzzle]], stop_at_failure: bool) -> list[Reward | None]:
        if self.closed.is_set():
            return [None] * len(asked)
        stop, (begun, self.begun) = self.stop, (self.begun, {})

        def look(result: Future) -> None:  # called before the worker takes another job
            if result.exception() is None and result.result() is not None and result.result().failed:
                stop.set()

        try:
            self.ready()
            results = []
            for completion, puzzle in asked:
                same = begun.get((id(puzzle), completion))
                results.append((same.popleft() if same else self._add(completion, puzzle)).result)
                if stop_at_failure:
                    results[-1].add_done_callback(look)
            wait(results)
        except BaseException:  # Ctrl-C: nobody wants the rest any more
            stop.set()
            for worker in self.workers:
                worker.kill()
            raise
        finally:
            stop.set()  # for what was begun and not asked for
            self.stop = stop if self.closed.is_set() else threading.Event()
        return [result.result() for result in results]

    def _add(self, completion: str, puzzle: Puzzle) -> "_Job":
        job = _Job(index=next(self.numbers), completion=completion, puzzle=puzzle, stop=self.stop)
        return self.workers[job.index % len(self.workers)].add(job)

    def close(self) -> None:
        """End the worker processes, also while `score` runs in another thread: what it has not scored is None."""
        self.closed.set()
        self.stop.set()
        for worker in self.workers:
            worker.kill()
        with self.lock:  # jobs that came after the end would never be done
            for worker in self.workers:
                worker.waiting.put(None)
        for worker in self.workers:
            while worker.thread.is_alive():
                worker.kill()  # again: it may just have been started
                worker.thread.join(timeout=0.1)
            worker.stop()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """A response to score. Without a puzzle there is none, and the worker only starts its process."""

    index: int
    completion: str = ""
    puzzle: Puzzle | None = None
    stop: threading.Event
    """Set when nobody wants the reward any more; it is None then."""
    result: Future = field(default_factory=Future)
    """The reward; UserError if the process does not start."""


class _Worker:
    """A scoring process, started when it is first needed and again after it died or was killed, and the thread that feeds it."""

    def __init__(self, path: str, seconds: float, on_reply: Callable[[], None]) -> None:
        self.path, self.seconds, self.on_reply = path, seconds, on_reply
        self.process: subprocess.Popen | None = None
        self.jobs = self.replies = -1  # our ends of the two pipes
        self.unread = b""
        self.is_async = False
        self.waiting: SimpleQueue[_Job | None] = SimpleQueue()  # None: the end
        # one thread for life: a process ends with the thread that started it (end_with_parent). A daemon: Python waits for
        # other threads before it ends, and after Ctrl-C they would score all that is left
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def add(self, job: _Job) -> _Job:
        """Returns the job, whose result comes later."""
        self.waiting.put(job)
        return job

    def _work(self) -> None:
        """Do jobs until the end. When the process hangs or dies with several jobs in flight, each is tried again alone, so
        that only the job that caused it gets the failure."""
        while (job := self.waiting.get()) is not None:
            for again in self._run(job, CONCURRENT):
                self._run(again, 1)
        self.stop()

    def _run(self, first: _Job, window: int) -> list[_Job]:
        """Do a job and, where the window is above 1 and the reward async, those that come while any is in flight.

        Returns the jobs to try again alone: those in flight when the process failed.
        """
        in_flight: dict[int, tuple[_Job, float]] = {}
        if first.stop.is_set():  # then there may be no process, and none is needed
            first.result.set_result(None)
            return []
        try:
            self.start()
            return self._do(first, window, in_flight)
        except Exception as error:  # `score` raises it, and would wait for ever if this thread ended
            unwanted = first.stop.is_set()  # by close(), which kills a process that starts
            if first.puzzle is not None:
                first.stop.set()  # no other job of the batch needs to try
            for job in (first, *(job for job, _ in in_flight.values())):
                if not job.result.done():
                    job.result.set_result(None) if unwanted else job.result.set_exception(error)
            self.stop()
            return []

    def _do(self, first: _Job, window: int, in_flight: dict[int, tuple[_Job, float]]) -> list[_Job]:
        job: _Job | None = first
        while job is not None or in_flight:
            failure = None
            if job is not None and (job.puzzle is None or job.stop.is_set()):
                job.result.set_result(None)
            elif job is not None:
                in_flight[job.index] = (job, time.monotonic() + self.seconds + GRACE)
                failure = self._send(job)
            room = failure is None and self.is_async and len(in_flight) < window
            if (job := self._next() if room else None) is not None or not in_flight:
                continue
            if any(job.stop.is_set() for job, _ in in_flight.values()):
                self.stop()
                for job, _ in in_flight.values():
                    # those of a later batch are not to blame, and begin again
                    job.result.set_result(None) if job.stop.is_set() else self.waiting.put(job)
                return []
            reply = failure or self._reply(in_flight)
            if isinstance(reply, dict) and not is_reply(reply, in_flight):
                reply = Reward(total=math.nan, status=Status.ERROR, message=FOREIGN)
            if isinstance(reply, Reward):  # no reply: the process hangs or has died
                self.stop()
                jobs = [job for job, _ in in_flight.values()]
                if len(jobs) > 1:
                    return jobs  # any of them may be the cause
                jobs[0].result.set_result(None if jobs[0].stop.is_set() else reply)
                self.on_reply()
                return []
            if reply is not None:
                done, _ = in_flight.pop(reply.pop("index"))
                done.result.set_result(Reward(**{**reply, "status": Status(reply["status"])}))
                self.on_reply()
        return []

    def _next(self) -> _Job | None:
        """A job that waits, if there is one."""
        if self.waiting.empty():
            return None
        if (job := self.waiting.get()) is None:
            self.waiting.put(None)  # the end is for _work
        return job

    def _reply(self, in_flight: dict[int, tuple[_Job, float]]) -> dict | Reward | None:
        """The next reply, or a Reward with the reason why there will be none. None: nothing came while it glanced."""
        deadline = min(deadline for _, deadline in in_flight.values())
        come = b"\n" in self.unread or select.select([self.replies], [], [], GLANCE)[0]
        return self._receive(deadline) if come or time.monotonic() > deadline else None

    def start(self) -> None:
        """Start the process, unless it runs. Returns when it is ready; raises UserError when it does not get so far."""
        if self.process is not None and self.process.poll() is not None:
            self.stop()  # it died between two steps, with nothing in flight
        if self.process is not None:
            return
        ends: list[int] = []
        try:
            for _ in range(2):
                ends += os.pipe()
            jobs, self.jobs, self.replies, replies = ends
            # -P: no module of the current folder stands before ours, or before one beside a reward's file
            words = [sys.executable, "-P", "-m", "reward.worker", self.path, str(self.seconds)]
            self.process = subprocess.Popen(
                [*words, *map(str, (os.getpid(), jobs, replies))],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what the reward prints must not mix with what a command prints
                pass_fds=(jobs, replies),
                env=module_environment(),
                start_new_session=True,  # a SIGTERM for the run must not reach it
            )
        except OSError:
            for end in ends:
                os.close(end)
            raise
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

    def _send(self, job: _Job) -> Reward | None:
        """Write one job. Returns a Reward with the reason when it cannot be written."""
        row = {"index": job.index, "completion": job.completion, "puzzle": asdict(job.puzzle)}
        data, pipe = (json.dumps(row, default=str) + "\n").encode(), self.jobs
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
