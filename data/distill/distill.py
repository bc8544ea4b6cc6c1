"""Reasoning traces by rejection sampling: candidates per puzzle from a teacher, kept when a judge accepts them.

    Request -> teacher -> Completion -> raw file -> judge -> Verdict -> rows of accepted traces

The teachers are data/distill/embedded_teacher.py and rollout/teachers/openai.py, the judge is reward/judge.py, the raw file is
data/distill/responses.py; launch/distill.py puts them together. A puzzle is asked for no more candidates at a time than it still
lacks accepted ones, so none is bought that a better luck with its neighbours would have made needless.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

from data.distill.hints import hinted_chat
from data.errors import RunError, UserError
from data.puzzles import Puzzle

KEEP_RULES = ("first", "shortest", "all", "random")
RequestKey = tuple[str, int, bool]
"""(puzzle id, attempt, hinted): the name of a request, and of the completion that answers it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One candidate trace that is asked for."""

    puzzle: Puzzle
    attempt: int
    """Which candidate of the puzzle, from 0; hinted ones are counted apart."""
    hinted: bool = False

    @property
    def key(self) -> RequestKey:
        return self.puzzle.id, self.attempt, self.hinted

    def chat(self) -> list[dict[str, str]]:
        """The prompt as chat turns (system, user); a hinted one ends in the answer, which no stored row shows."""
        return hinted_chat(self.puzzle) if self.hinted else self.puzzle.chat()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came back for a request: a response as it came, or the error that ended the last try."""

    puzzle_id: str
    attempt: int
    hinted: bool
    text: str = ""
    reasoning: str = ""
    """What a reasoning model's endpoint gave apart from the text."""
    finish_reason: str = ""
    """"stop", "length" (cut at the limit), or whatever else the endpoint calls it."""
    prompt_tokens: int | None = None
    """None: the teacher counts none, or did not say."""
    completion_tokens: int | None = None
    model: str = ""
    error: str = ""

    @property
    def key(self) -> RequestKey:
        return self.puzzle_id, self.attempt, self.hinted

    @property
    def trace(self) -> str:
        """The response in the layout of the rewards: reasoning that came apart goes into <think> tags where the text has none,
        a <think> that the chat template had opened is put back, and white space around the whole is gone."""
        text = self.text
        if "<think>" not in text:
            if self.reasoning:
                text = f"<think>{self.reasoning.strip()}</think>\n{text.lstrip()}"
            elif "</think>" in text:
                text = "<think>" + text
        return text.strip().encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written to a file


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge says of a completion."""

    accepted: bool
    reason: str = ""
    """Why not, in a word of reward.judge.REASONS; "" when accepted."""
    detail: str = ""
    """More of the same. Example: "3 of 8 right"."""


class Teacher(Protocol):
    """Whoever writes the candidate traces."""

    ended: str
    """Why it gives no more: "budget" or "stopped"; "" while it does."""

    def sample(self, requests: list[Request]) -> Iterator[Completion]:
        """One completion per request, in the order in which they are done; fewer when the teacher ends in between.

        Raises RunError, after the last completion that came, when no further request can succeed.
        """

    def stop(self) -> None:
        """Ask nothing more, and end `sample` as soon as what is paid for has come; called from a signal handler."""

    def close(self) -> None:
        """Free what it holds."""


Judge = Callable[[list[tuple[Puzzle, Completion]]], list[Verdict]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many candidates a puzzle may have."""

    candidates: int = 8
    """Most per puzzle (k)."""
    stop_at: int = 1
    """Accepted traces after which a puzzle is asked no more; 0: every candidate is drawn."""
    hint_candidates: int = 0
    """Most with the answer hinted, for a puzzle whose every candidate was rejected."""


class Draws:
    """What has been drawn and judged, by puzzle, and what to ask for next.

    Puzzles of one id are asked once; raises UserError when they differ.
    """

    def __init__(self, puzzles: list[Puzzle], plan: Plan) -> None:
        self.puzzles, self.plan = puzzles, plan
        self.by_id = {puzzle.id: puzzle for puzzle in puzzles}
        self.judged: dict[str, dict[tuple[bool, int], tuple[Completion, Verdict]]] = {name: {} for name in self.by_id}
        """Per puzzle id: (hinted, attempt) -> the completion and what became of it."""
        for puzzle in puzzles:
            if puzzle.chat() != self.by_id[puzzle.id].chat() or puzzle.answer != self.by_id[puzzle.id].answer:
                raise UserError(f"two different puzzles have the id {puzzle.id}: give each its own")

    def take(self, completion: Completion, verdict: Verdict) -> None:
        """Record a verdict. A rejected completion's text is forgotten; the raw file has it."""
        self.judged[completion.puzzle_id][completion.hinted, completion.attempt] = (completion, verdict)

    def wanted(self, puzzle: Puzzle) -> list[Request]:
        """What to ask for now; [] when the puzzle is settled. Attempts that ended in an error are not asked for again."""
        plain = self._lacking(puzzle, hinted=False, limit=self.plan.candidates)
        if plain or not self.plan.hint_candidates or not self._hopeless(puzzle):
            return plain
        return self._lacking(puzzle, hinted=True, limit=self.plan.hint_candidates)

    def _lacking(self, puzzle: Puzzle, hinted: bool, limit: int) -> list[Request]:
        judged = self.judged[puzzle.id]
        missing = [attempt for attempt in range(limit) if (hinted, attempt) not in judged]
        if self.plan.stop_at:
            accepted = sum(verdict.accepted for (with_hint, _), (_, verdict) in judged.items() if with_hint == hinted)
            missing = missing[: max(0, self.plan.stop_at - accepted)]
        return [Request(puzzle=puzzle, attempt=attempt, hinted=hinted) for attempt in missing]

    def _hopeless(self, puzzle: Puzzle) -> bool:
        """Was every candidate without a hint rejected, and at least one of them a response?"""
        plain = [pair for (hinted, _), pair in self.judged[puzzle.id].items() if not hinted]
        return not any(verdict.accepted for _, verdict in plain) and any(not drawn.error for drawn, _ in plain)

    def next_requests(self) -> list[Request]:
        """Everything that can be asked for now, in puzzle order; [] when all puzzles are settled."""
        return [request for puzzle in self.by_id.values() for request in self.wanted(puzzle)]

    def accepted(self, puzzle: Puzzle) -> list[Completion]:
        """In the order of attempts; hinted ones only where there is no other."""
        drawn = sorted(self.judged[puzzle.id].items())
        plain = [completion for (hinted, _), (completion, verdict) in drawn if verdict.accepted and not hinted]
        return plain or [completion for _, (completion, verdict) in drawn if verdict.accepted]

    def rows(self, keep: str, seed: int) -> list[dict]:
        """Accepted traces in puzzle order: the puzzle's row with the trace as `assistant_msg`, `puzzle_id`, `attempt` and, only
        where it is true, `hinted`; a trace whose labels are not the puzzle's has these as `answer` (see Puzzle.to_row).
        keep: one of KEEP_RULES; "shortest" counts characters, "random" draws from (seed, puzzle)."""
        rows = []
        for puzzle in self.puzzles:
            for completion in _kept(self.accepted(puzzle), keep, f"{seed} {puzzle.id} keep"):
                mark = {"hinted": True} if completion.hinted else {}
                traced = replace(puzzle, meta={**puzzle.meta, "assistant_msg": completion.trace})
                rows.append({**traced.to_row(), "puzzle_id": puzzle.id, "attempt": completion.attempt, **mark})
        return rows


def _kept(accepted: list[Completion], keep: str, name: str) -> list[Completion]:
    if keep == "all" or not accepted:
        return accepted
    if keep == "shortest":
        return [min(accepted, key=lambda completion: len(completion.trace))]
    if keep == "random":
        digest = hashlib.sha256(name.encode()).digest()
        return [random.Random(int.from_bytes(digest[:8], "big")).choice(accepted)]
    assert keep == "first", keep
    return accepted[:1]


def distill(
    draws: Draws,
    teacher: Teacher,
    judge: Judge,
    *,
    recorded: list[Completion] = (),
    record: Callable[[Completion], None] = lambda completion: None,
    watch: Callable[[Completion], None] = lambda completion: None,
) -> str:
    """Ask the teacher until every puzzle is settled, or it ends; returns why it ended ("" when all puzzles are settled).

    recorded: completions of an earlier run, judged first and not asked for again. record(completion): called before anything
    else is done with a completion. watch(completion): called when its verdict is in `draws`.

    Raises what the teacher or the judge raises, with every completion that came recorded.
    """
    background = _BackgroundJudge(judge)

    def take(judged: list[tuple[Completion, Verdict]]) -> None:
        for completion, verdict in judged:
            draws.take(completion, verdict)
            watch(completion)

    try:
        take(background.add([(draws.by_id[c.puzzle_id], c) for c in recorded if c.puzzle_id in draws.by_id]))
        take(background.rest(teacher))
        while not teacher.ended and (requests := draws.next_requests()):
            broken: Exception | None = None
            with closing(teacher.sample(requests)) as completions:
                for completion in completions:
                    record(completion)
                    if broken is None and teacher.ended != "stopped":
                        try:
                            take(background.add([(draws.by_id[completion.puzzle_id], completion)]))
                        except (ValueError, RunError) as error:  # of the judge: what is still to come is recorded first
                            broken = error
                            teacher.stop()
            if broken is not None:
                raise broken
            take(background.rest(teacher))
        return teacher.ended
    finally:
        teacher.stop()
        background.pool.shutdown(wait=False, cancel_futures=True)


class _BackgroundJudge:
    """The judge on a thread of its own, a batch at a time, so that no response waits for a verdict to be recorded."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.pool = judge, ThreadPoolExecutor(1)
        self.waiting: list[tuple[Puzzle, Completion]] = []
        self.batch: list[Completion] = []
        self.running: Future[list[Verdict]] | None = None

    def add(self, pairs: list[tuple[Puzzle, Completion]]) -> list[tuple[Completion, Verdict]]:
        """Hand in; returns what is judged by now. Raises what the judge raised."""
        self.waiting += pairs
        return self._next() if self.running is None or self.running.done() else []

    def rest(self, teacher: Teacher) -> list[tuple[Completion, Verdict]]:
        """Wait for all that was handed in; gives up when the teacher is told to stop."""
        judged = []
        while (self.running or self.waiting) and teacher.ended != "stopped":
            if self.running is None or wait([self.running], timeout=0.1).done:
                judged += self._next()
        return judged

    def _next(self) -> list[tuple[Completion, Verdict]]:
        judged = list(zip(self.batch, self.running.result(), strict=True)) if self.running else []
        self.batch, self.running = [completion for _, completion in self.waiting], None
        if self.waiting:
            self.running = self.pool.submit(self.judge, self.waiting)
        self.waiting = []
        return judged
