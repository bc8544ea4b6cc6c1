"""Rejection sampling of reasoning traces: a teacher writes candidates for each puzzle, and a judge accepts or rejects.

    Request -> teacher -> Completion -> raw file -> judge -> Verdict -> rows of accepted traces

Teachers: data/distill/embedded_teacher.py, rollout/teachers/openai.py and rollout/teachers/vllm.py. Judge:
reward/judge.py. Raw file: data/distill/responses.py. launch/distill.py connects them.

For each puzzle, only as many candidates are requested at a time as accepted traces are still missing. A later candidate
is not paid for when an earlier one is accepted.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from data.distill.hints import hinted_chat
from data.errors import RunError, UserError
from data.prompts import chat, normalise_label
from data.puzzles import Puzzle

KEEP_RULES = ("first", "shortest", "all", "random")
"""Which of a puzzle's accepted traces are kept."""
_EMPTY_BLOCK = re.compile(r"\A\s*<think>\s*</think>")
_THINK_TAG, _LONE_ANSWER_TAG = re.compile(r"</?think>"), re.compile(r"\s*</?answer>\s*")
_DRAFT = re.compile(r"\s*<answer>(.*?)</answer>\s*", re.DOTALL)
RequestKey = tuple[str, int, bool]
"""(puzzle id, attempt, hinted): identifies a request and the completion that answers it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for one candidate trace."""

    puzzle: Puzzle
    attempt: int
    """Number of the candidate, from 0. Candidates with and without a hint are counted separately."""
    hinted: bool = False
    """Whether the prompt shows the correct answer (data/distill/hints.py)."""
    ask: str = ""
    """Text that follows the user message: what a step of a workflow asks (data/distill/workflow.py)."""
    stop: str = ""
    """The response ends after this text, when it occurs; "": at the end of the turn only."""

    @property
    def key(self) -> RequestKey:
        return self.puzzle.id, self.attempt, self.hinted

    def chat(self) -> list[dict[str, str]]:
        """The prompt as chat turns (system, user). A hinted one ends in the answer; no stored row does."""
        if self.hinted:
            return hinted_chat(self.puzzle)
        return chat(self.puzzle.system_message, self.puzzle.user_message + self.ask)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The result of a request: the response as it came, or the error of the last try."""

    puzzle_id: str
    attempt: int
    hinted: bool
    text: str = ""
    reasoning: str = ""
    """The reasoning, when an endpoint returns it separately from the text."""
    finish_reason: str = ""
    """"stop", "length" (cut at the limit), or another word of the endpoint."""
    prompt_tokens: int | None = None
    """None when the teacher does not count tokens or did not report them."""
    completion_tokens: int | None = None
    """Reasoning included. None as above."""
    model: str = ""
    error: str = ""
    """Why there is no response; "" when there is one."""

    @property
    def key(self) -> RequestKey:
        return self.puzzle_id, self.attempt, self.hinted

    @property
    def trace(self) -> str:
        """The response in the layout that rewards expect, without white space around it.

        Reasoning that came separately is put into <think> tags. A <think> that the chat template opened is put back.
        """
        # it may name the tags that the system message asks for, and a response has each of them once
        reasoning = _THINK_TAG.sub("", self.reasoning)
        reasoning = _LONE_ANSWER_TAG.sub(" answer ", _DRAFT.sub(r" \1 ", reasoning)).strip()
        text = self.text
        if reasoning:  # an empty block beside it is the server's
            text = _EMPTY_BLOCK.sub("", text)
        if "<think>" not in text:
            if reasoning:
                text = f"<think>{reasoning}</think>\n{text.lstrip()}"
            elif "</think>" in text:
                text = "<think>" + text
        return text.strip().encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written to a file


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judge's decision about a completion."""

    accepted: bool
    reason: str = ""
    """Reason for a rejection, a key of reward.judge.REASONS; "" when accepted."""
    detail: str = ""
    """Example: "3 of 8 right"."""


class Teacher(Protocol):
    """A source of candidate traces."""

    ended: str
    """Why the teacher gives no more completions: "budget" or "stopped"; "" as long as it does."""

    def sample(self, requests: list[Request]) -> Iterator[Completion]:
        """Yield one completion per request, in the order in which they arrive; fewer when the teacher ends early.

        Raises RunError, after the last completion that arrived, when no further request can succeed.
        """

    def stop(self) -> None:
        """Send no new request, and end `sample` when the responses that are paid for have arrived.

        May be called from a signal handler.
        """

    def close(self) -> None:
        """Free the teacher's resources."""


Judge = Callable[[list[tuple[Puzzle, Completion]]], list[Verdict]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many candidates a puzzle may have."""

    candidates: int = 8
    """Largest number of candidates per puzzle (k of the paper)."""
    stop_at: int = 1
    """A puzzle is settled when it has this many accepted traces. 0: every candidate is drawn."""
    hint_candidates: int = 0
    """Largest number of candidates with a hint, for a puzzle of which every candidate was rejected."""


def refuse_unsolvable(puzzles: list[Puzzle]) -> None:
    """Raises UserError for a puzzle that no answer can solve: no teacher should be paid for it."""
    for puzzle in puzzles:
        offered = [normalise_label(label) for label in puzzle.candidates]
        if twice := [label for label, n in Counter(offered).items() if n > 1]:
            raise UserError(
                f"puzzle {puzzle.id}: lists the candidate {twice[0]!r} twice; leave the puzzle out of the file"
            )
        if offered and (lost := [x for x in puzzle.answer if normalise_label(x) not in offered]):
            raise UserError(
                f"puzzle {puzzle.id}: its answer {lost[0]!r} is none of its candidates; leave the puzzle out of the file"
            )


class Draws:
    """The candidates drawn and judged so far, by puzzle, and the requests to make next.

    Several rows with one puzzle id share their candidates. Raises UserError when such rows have different prompts or
    answers.
    """

    def __init__(self, puzzles: list[Puzzle], plan: Plan) -> None:
        self.puzzles, self.plan = puzzles, plan
        self.by_id = {puzzle.id: puzzle for puzzle in puzzles}
        self.judged: dict[str, dict[tuple[bool, int], tuple[Completion, Verdict]]] = {name: {} for name in self.by_id}
        """{puzzle id: {(hinted, attempt): (completion, verdict)}}."""
        for puzzle in puzzles:
            if puzzle.chat() != self.by_id[puzzle.id].chat() or puzzle.answer != self.by_id[puzzle.id].answer:
                raise UserError(f"two different puzzles have the id {puzzle.id}: give each its own")

    def puzzle_of(self, completion: Completion) -> Puzzle | None:
        """The puzzle that a completion is for, by which it is judged; None for one that this run would not ask for."""
        if completion.attempt >= (self.plan.hint_candidates if completion.hinted else self.plan.candidates):
            return None  # of a run with more --candidates, or with --hint
        return self.by_id.get(completion.puzzle_id)

    def needs_verdict(self, completion: Completion) -> bool:
        """Whether the judge must see the completion before anything is done with it."""
        return True

    def take(self, completion: Completion, verdict: Verdict | None) -> None:
        """Record a completion and its verdict. verdict: None for one that needs none."""
        assert verdict is not None
        self.judged[completion.puzzle_id][completion.hinted, completion.attempt] = (completion, verdict)

    def for_report(self) -> dict[str, Any]:
        """What the report has besides its usual content."""
        return {}

    def wanted(self, puzzle: Puzzle) -> list[Request]:
        """The requests to make now, [] when the puzzle is settled. An attempt that failed is not repeated."""
        plain = self._lacking(puzzle, hinted=False, limit=self.plan.candidates)
        if plain or not self.plan.hint_candidates or not self._hopeless(puzzle):
            return plain
        return self._lacking(puzzle, hinted=True, limit=self.plan.hint_candidates)

    def _lacking(self, puzzle: Puzzle, hinted: bool, limit: int) -> list[Request]:
        """Requests for as many attempts, not yet made, as accepted traces are missing."""
        judged = self.judged[puzzle.id]
        missing = [attempt for attempt in range(limit) if (hinted, attempt) not in judged]
        if self.plan.stop_at:
            accepted = sum(verdict.accepted for (with_hint, _), (_, verdict) in judged.items() if with_hint == hinted)
            missing = missing[: max(0, self.plan.stop_at - accepted)]
        return [Request(puzzle=puzzle, attempt=attempt, hinted=hinted) for attempt in missing]

    def _hopeless(self, puzzle: Puzzle) -> bool:
        """Whether every candidate without a hint was rejected, and at least one of them was a response."""
        plain = [pair for (hinted, _), pair in self.judged[puzzle.id].items() if not hinted]
        return not any(verdict.accepted for _, verdict in plain) and any(not drawn.error for drawn, _ in plain)

    def next_requests(self) -> list[Request]:
        """All requests to make now, in puzzle order; [] when all puzzles are settled."""
        return [request for puzzle in self.by_id.values() for request in self.wanted(puzzle)]

    def accepted(self, puzzle: Puzzle) -> list[Completion]:
        """The accepted completions in the order of attempts. Hinted ones are used only when there is no other."""
        drawn = sorted(self.judged[puzzle.id].items())
        plain = [completion for (hinted, _), (completion, verdict) in drawn if verdict.accepted and not hinted]
        return plain or [completion for _, (completion, verdict) in drawn if verdict.accepted]

    def rows(self, keep: str, seed: int) -> list[dict]:
        """The accepted traces in puzzle order, as rows.

        A row is that of the puzzle with the trace as `assistant_msg`, plus `puzzle_id`, `attempt` and, if true,
        `hinted`. A trace with labels other than the correct ones also has the column `answer` (see Puzzle.to_row).
        keep: one of KEEP_RULES. "shortest" counts characters; "random" depends on (seed, puzzle id) only.
        """
        rows = []
        for puzzle in self.puzzles:
            for completion in _kept(self.accepted(puzzle), keep, f"{seed} {puzzle.id} keep"):
                mark = {"hinted": True} if completion.hinted else {}
                traced = replace(puzzle, meta={**puzzle.meta, "assistant_msg": completion.trace})
                rows.append({**traced.to_row(), "puzzle_id": puzzle.id, "attempt": completion.attempt, **mark})
        return rows


def _kept(accepted: list[Completion], keep: str, name: str) -> list[Completion]:
    """The accepted traces that the rule keeps. name: seeds the draw of "random"."""
    if keep == "all" or not accepted:
        return accepted
    if keep == "shortest":
        return [min(accepted, key=lambda completion: len(completion.trace))]
    if keep == "random":
        digest = hashlib.sha256(name.encode()).digest()  # Python's hash() differs from process to process
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
    watch: Callable[[Completion, Verdict | None], None] = lambda completion, verdict: None,
) -> str:
    """Send requests to the teacher until every puzzle is settled or the teacher ends. Returns why it ended, or "".

    recorded: completions of an earlier run. They are judged first and not requested again.
    record(completion) is called before anything else is done with a completion: a response that is paid for must not be
    lost. watch(completion, verdict) is called when the completion is in `draws`.
    Raises the exception of the teacher or the judge, after all completions that arrived have been recorded.
    """
    background = _BackgroundJudge(judge)
    held = {completion.key: completion for completion in recorded}

    def take(judged: list[tuple[Completion, Verdict | None]]) -> None:
        for completion, verdict in judged:
            draws.take(completion, verdict)
            watch(completion, verdict)

    def judge_some(completions: list[Completion]) -> None:
        """Hand completions to the judge, and take those that are judged by now, or need no verdict."""
        known = [(puzzle, c) for c in completions if (puzzle := draws.puzzle_of(c)) is not None]
        take([(c, None) for _, c in known if not draws.needs_verdict(c)])
        take(background.add([(puzzle, c) for puzzle, c in known if draws.needs_verdict(c)]))

    try:
        # judged again, not trusted: the reward or the threshold may have changed since
        judge_some(list(recorded))
        take(background.rest(teacher))
        # each round requests what is missing after the verdicts of the round before
        while not teacher.ended and (requests := draws.next_requests()):
            # a step of a workflow is known only once the steps before it are: then what is on disk for it is used
            if found := [held[request.key] for request in requests if request.key in held]:
                judge_some(found)
                take(background.rest(teacher))
                continue
            broken: Exception | None = None
            with closing(teacher.sample(requests)) as completions:  # an error must end the teacher's own threads too
                for completion in completions:
                    record(completion)
                    if broken is None and teacher.ended != "stopped":
                        try:
                            judge_some([completion])
                        except (ValueError, RunError) as error:
                            # the judge failed: record the responses still in flight before the error goes on
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
    """Runs the judge in a thread, one batch at a time, so that recording a response never waits for a verdict."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.pool = judge, ThreadPoolExecutor(1)
        self.waiting: list[tuple[Puzzle, Completion]] = []
        self.batch: list[Completion] = []
        self.running: Future[list[Verdict]] | None = None

    def add(self, pairs: list[tuple[Puzzle, Completion]]) -> list[tuple[Completion, Verdict]]:
        """Add pairs to judge. Returns those that are judged by now. Raises the judge's exception."""
        self.waiting += pairs
        return self._next() if self.running is None or self.running.done() else []

    def rest(self, teacher: Teacher) -> list[tuple[Completion, Verdict]]:
        """Wait until all pairs are judged, or until the teacher is told to stop."""
        judged = []
        while (self.running or self.waiting) and teacher.ended != "stopped":
            if self.running is None or wait([self.running], timeout=0.1).done:
                judged += self._next()
        return judged

    def _next(self) -> list[tuple[Completion, Verdict]]:
        """Take the results of the batch that was judged, and start on the waiting pairs."""
        judged = list(zip(self.batch, self.running.result(), strict=True)) if self.running else []
        self.batch, self.running = [completion for _, completion in self.waiting], None
        if self.waiting:
            self.running = self.pool.submit(self.judge, self.waiting)
        self.waiting = []
        return judged
