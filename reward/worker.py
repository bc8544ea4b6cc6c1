"""A worker process of reward/scoring.py: `python -m reward.worker PATH SECONDS PARENT JOBS REPLIES`.

JOBS and REPLIES are descriptors of its own: it reads one JSON job {"index", "completion", "puzzle"} per line and writes one
JSON result {"index", "total", "parts", "status", "message"} per line. Its standard input is empty, and what the reward
prints goes to standard error.

A plain function gets one response at a time, in the main thread and outside an event loop, so that it may call
asyncio.run, fork, and start pools of processes. An async one gets what comes at once.
"""

import asyncio
import json
import os
import sys
from dataclasses import asdict

from data.errors import UserError
from data.processes import end_group_with_this_process, end_with_parent, keep_from_children
from data.puzzles import Puzzle
from reward import Reward, RewardFn, load_reward
from reward.adapters import is_async, score_async, score_plain


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
