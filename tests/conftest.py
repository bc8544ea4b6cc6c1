"""Shared fixtures: a tiny real pipeline (puzzles, traces, checkpoint) made once per session, and a command runner."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from launch import options
from tests.helpers.forked import VLLM_LIBRARIES, server
from tests.helpers.pipeline import make_pipeline


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files come first, so that no worker begins one when the other has nothing left."""
    seconds: Counter = Counter()
    for item in items:
        seconds[item.path] += sum(mark.args[0] for mark in item.iter_markers("slow"))
    items.sort(key=lambda item: -seconds[item.path])


def pytest_collection_finish(session: pytest.Session) -> None:
    """The fork server imports vLLM only where a selected test needs it."""
    if any(item.get_closest_marker("vllm") for item in session.items):
        server.libraries = VLLM_LIBRARIES


@pytest.fixture(scope="session", autouse=True)
def a_failed_run_ends_its_command_and_not_pytest() -> None:
    """A command that a test runs in this process would take it along, and with it the reason."""
    options.end_now = sys.exit


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Path:
    """A folder with puzzles/, traces.jsonl and base/ (a random 0.2 M-parameter checkpoint), made by the real commands."""
    return make_pipeline(tmp_path_factory.mktemp("pipeline"))
