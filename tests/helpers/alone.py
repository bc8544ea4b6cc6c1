"""A training loop inside the test's own process, so that a test can look into it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.ranks.world import World, join_world, leave_world


@contextmanager
def alone() -> Iterator[World]:
    """A world of one; its environment and threads are undone, or commands and tests run later would find them."""
    before, threads = dict(os.environ), torch.get_num_threads()
    try:
        yield join_world()
    finally:
        leave_world()
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(before)
