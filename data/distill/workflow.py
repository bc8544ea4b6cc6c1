"""A workflow does better than one answer of its model, and its result becomes one clean trace for the model to learn.

    k answers -> one-to-one vote -> where they disagree: compare rivals, or look up -> final assignment -> clean trace

- consensus: the votes of the valid answers, solved as a one-to-one assignment (data/distill/consensus.py).
- debate: where another assignment got votes too, the model is shown both for the cells on which they differ, with their
  genes, and answers for these cells; a clear majority of --comparisons answers decides, and the vote without one.
- tools: the model answers --comparisons times more for the cells on which votes disagree, and may look up genes and cell
  types first (data/distill/lookups.py), --lookups times at most. These answers vote with the others.

The clean trace is one of the k answers that gives the final assignment, which knows of no vote. Where none does, and the
assignment is right, the model is asked to argue for it, as with a hint (data/distill/hints.py); the trace must end in it
and mention neither hint nor votes, rivals and tools.

Every request of a step has an id made of the puzzle's id, the step, and a hash of its whole prompt. So every response is
on disk as any other is, a resumed run finds it again, and one that answered another question is never used.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from data.distill.consensus import Consensus, consensus
from data.distill.distill import Completion, Draws, Plan, Request, RequestKey, Verdict
from data.distill.hints import find_leak, find_mention
from data.distill.lookups import CALL_END, LONGEST_CALL, NOT_UNDERSTOOD, Tables, call_in, lookup_text
from data.errors import UserError
from data.prompts import normalise_label
from data.puzzles import Puzzle

WORKFLOWS = ("none", "consensus", "debate", "tools")
RIVALS = (
    "\n\nTwo assignments of these cells were proposed.\nOne: {one}\nOther: {other}\n"
    "Compare them by the genes of each cell, and give the assignment that fits better in the usual format."
)
ReadLabels = Callable[[str, int], Sequence[str]]
"""(response, number of cells) -> its labels; [] when its format is invalid."""
_STEP = re.compile(r" \[(?:debate|tools|write) [0-9a-f]{12}\]\Z")


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """Which workflow, and how often it asks."""

    kind: str
    """One of WORKFLOWS, not "none"."""
    comparisons: int = 3
    """debate: answers that compare the two assignments; tools: conversations about the cells in question."""
    lookups: int = 4
    """tools: most requests of a conversation."""
    writes: int = 4
    """Most traces asked for a final assignment that no answer gave."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a puzzle's workflow."""

    vote: Consensus | None
    """None when no answer was valid: then there is no assignment."""
    labels: list[str]
    """[N] the final assignment; [] without a vote."""
    asked: bool
    """Was there a disagreement that the model was asked about?"""
    found: str
    """Where its trace comes from: "answer", "written", or "" when there is none."""


class WorkflowDraws(Draws):
    """`Draws` of which each puzzle goes through a workflow. What is wanted next follows from what was taken so far."""

    def __init__(
        self, puzzles: list[Puzzle], plan: Plan, workflow: Workflow, read: ReadLabels, tables: Tables | None = None
    ) -> None:
        """read: finds the labels of a response. tables: for "tools".

        Raises UserError as Draws does, for an id that looks like a step's, and for puzzles without candidates where they
        are needed.
        """
        super().__init__(puzzles, plan)
        self.workflow, self.read, self.tables = workflow, read, tables
        self.origin: dict[str, Puzzle] = {}
        """{id of a step: its puzzle}"""
        self.writes: dict[str, Puzzle] = {}
        """{id of a step that writes a trace: its puzzle with the final assignment as the answer}"""
        self.steps: dict[RequestKey, Completion] = {}
        """The responses of the steps that need no verdict."""
        self.now: dict[str, tuple[list[Request], Outcome | None]] = {}
        """{puzzle id: what `_proceed` found}, until something is taken for the puzzle."""
        for puzzle in puzzles:
            if _STEP.search(puzzle.id):
                raise UserError(f"puzzle {puzzle.id!r}: its id reads like a step of a workflow; give it another")
            if workflow.kind in ("debate", "tools") and not puzzle.candidates:
                raise UserError(
                    f"--workflow {workflow.kind}: puzzle {puzzle.id} has no candidates to choose from; take consensus"
                )

    # ---- what the loop of data/distill/distill.py asks

    def puzzle_of(self, completion: Completion) -> Puzzle | None:
        """See Draws; that of a step is the puzzle that it is about."""
        return super().puzzle_of(completion) or self.origin.get(completion.puzzle_id)

    def needs_verdict(self, completion: Completion) -> bool:
        """Answers and written traces; what comes between is no answer to the puzzle."""
        return completion.puzzle_id in self.by_id or completion.puzzle_id in self.writes

    def take(self, completion: Completion, verdict: Verdict | None) -> None:
        """See Draws. A written trace is rejected when it argues for another assignment or mentions how it came about."""
        self.now.pop(self.puzzle_of(completion).id, None)
        if completion.puzzle_id in self.by_id:
            super().take(completion, verdict)
        elif completion.puzzle_id in self.writes:
            asked = self.writes[completion.puzzle_id]
            if verdict.accepted:
                verdict = self._checked(completion, asked, verdict)
            self.judged[self.origin[completion.puzzle_id].id][True, completion.attempt] = (completion, verdict)
        else:
            self.steps[completion.key] = completion

    def wanted(self, puzzle: Puzzle) -> list[Request]:
        """See Draws."""
        return self._proceed(puzzle)[0]

    def accepted(self, puzzle: Puzzle) -> list[Completion]:
        """See Draws: the accepted answers that give the final assignment, or the trace that was written for it."""
        outcome = self.outcome(puzzle)
        if outcome is None or not outcome.found:
            return []
        if outcome.found == "answer":
            return self._own(puzzle, outcome.labels)
        return [c for c, verdict in self._judged(puzzle, hinted=True) if verdict.accepted]

    def rows(self, keep: str, seed: int) -> list[dict]:
        """See Draws; each row names the workflow."""
        return [{**row, "workflow": self.workflow.kind} for row in super().rows(keep, seed)]

    def outcome(self, puzzle: Puzzle) -> Outcome | None:
        """How the puzzle's workflow ended; None when it has not."""
        return self._proceed(puzzle)[1]

    # ---- the steps

    def _proceed(self, puzzle: Puzzle) -> tuple[list[Request], Outcome | None]:
        """(requests to make now, the end): one of the two is empty."""
        if puzzle.id not in self.now:
            self.now[puzzle.id] = self._next(puzzle)
        return self.now[puzzle.id]

    def _next(self, puzzle: Puzzle) -> tuple[list[Request], Outcome | None]:
        """See `_proceed`. Everything is found anew from what was taken, so a resumed run comes to the same."""
        answers = self._lacking(puzzle, hinted=False, limit=self.plan.candidates)
        if answers:
            return answers, None
        vote = consensus(self._valid(puzzle), puzzle.candidates)
        if vote is None:
            return [], Outcome(vote=None, labels=[], asked=False, found="")
        labels, asked = vote.labels, False
        rival = vote.rival() if self.workflow.kind != "consensus" else None
        if rival is not None:
            asked = True
            ask = self._debate if self.workflow.kind == "debate" else self._look_up
            requests, labels = ask(puzzle, vote, [puzzle.candidates[j] for j in rival])
            if requests:
                return requests, None
        if self._own(puzzle, labels):
            return [], Outcome(vote=vote, labels=labels, asked=asked, found="answer")
        requests = self._write(puzzle, labels)
        written = any(verdict.accepted for _, verdict in self._judged(puzzle, hinted=True))
        if requests and not written:
            return requests, None
        return [], Outcome(vote=vote, labels=labels, asked=asked, found="written" if written else "")

    def _valid(self, puzzle: Puzzle) -> list[Sequence[str]]:
        """[S][N] labels of the puzzle's answers of a valid format, in the order of attempts."""
        return [labels for labels in self._all_answers(puzzle) if labels]

    def _own(self, puzzle: Puzzle, labels: Sequence[str]) -> list[Completion]:
        """The accepted answers that give these labels, in the order of attempts."""
        plain = self._judged(puzzle, hinted=False)
        return [c for c, verdict in plain if verdict.accepted and _same(self.read(c.trace, len(labels)), labels)]

    def _judged(self, puzzle: Puzzle, hinted: bool) -> list[tuple[Completion, Verdict]]:
        """The puzzle's answers, or (hinted) the traces written for it, with their verdicts, in the order of attempts."""
        return [pair for key, pair in sorted(self.judged[puzzle.id].items()) if key[0] == hinted]

    def _debate(self, puzzle: Puzzle, vote: Consensus, rival: list[str]) -> tuple[list[Request], list[str]]:
        """(comparisons to ask for, the assignment that they decide for). rival: [N] labels of the second best one."""
        cells = [i for i, (ours, other) in enumerate(zip(vote.labels, rival, strict=True)) if ours != other]
        pair = [[labels[i] for i in cells] for labels in (vote.labels, rival)]
        part = part_of(puzzle, cells, [*pair[0], *pair[1]])
        requests = []
        for attempt in range(self.workflow.comparisons):
            one, other = pair if attempt % 2 == 0 else pair[::-1]  # in turns, or the first one shown would win
            ask = RIVALS.format(one=listed(one), other=listed(other))
            requests.append(self._step(puzzle, "debate", Request(puzzle=part, attempt=attempt, ask=ask)))
        lacking = [request for request in requests if request.key not in self.steps]
        said = [self.read(self.steps[r.key].trace, len(cells)) for r in requests if r.key in self.steps]
        for_ours, for_rival = (sum(_same(labels, of_pair) for labels in said) for of_pair in pair)
        # of an odd number one order is shown once more: the place alone must not decide, unless there is only one
        needed = self.workflow.comparisons % 2 if self.workflow.comparisons > 1 else 0
        return lacking, rival if for_rival - for_ours > needed else vote.labels

    def _look_up(self, puzzle: Puzzle, vote: Consensus, rival: list[str]) -> tuple[list[Request], list[str]]:
        """(the next requests of the conversations, the assignment that they and the answers vote for)."""
        differs = [ours != other for ours, other in zip(vote.labels, rival, strict=True)]
        cells = [i for i, share in enumerate(vote.shares) if share < 1 or differs[i]]
        part = part_of(puzzle, cells, [labels[i] for i in cells for labels in (vote.labels, rival)])
        talks = [self._conversation(puzzle, part, number) for number in range(self.workflow.comparisons)]
        if requests := [next_one for next_one, _ in talks if next_one is not None]:
            return requests, vote.labels
        answers = [[labels[i] for i in cells] for labels in self._valid(puzzle)]
        # one more vote each, though better informed ones: a model that looks up badly must not undo what many answers say
        found = consensus([*answers, *(labels for _, labels in talks if labels)], part.candidates)
        labels = list(vote.labels)
        for cell, label in zip(cells, found.labels, strict=True):
            labels[cell] = label
        return [], labels

    def _conversation(self, puzzle: Puzzle, part: Puzzle, number: int) -> tuple[Request | None, Sequence[str]]:
        """(the next request of conversation `number` about the part, None at its end; the labels that it ended in)."""
        results: list[str] = []
        for turn in range(self.workflow.lookups + 1):
            last = turn == self.workflow.lookups
            ask, stop = lookup_text(results, self.workflow.lookups), "" if last else CALL_END
            attempt = number * (self.workflow.lookups + 1) + turn
            request = self._step(puzzle, "tools", Request(puzzle=part, attempt=attempt, ask=ask, stop=stop))
            if request.key not in self.steps:
                return request, []
            said = self.steps[request.key]
            # a server may cut the reasoning at the look-up, and return no text
            call = None if last else call_in(said.text or said.reasoning)
            if call is None:
                return None, self.read(said.trace, len(part.cells))
            results.append(self.tables.result(call, puzzle) if call else NOT_UNDERSTOOD)
        raise AssertionError("the last turn ends a conversation")

    def _write(self, puzzle: Puzzle, labels: list[str]) -> list[Request]:
        """Requests for a trace that argues for the assignment; [] where all are made, or it is wrong and cannot teach."""
        if not _same(labels, puzzle.answer):
            return []
        asked = replace(puzzle, answer=labels)
        for attempt in range(self.workflow.writes):
            request = self._step(puzzle, "write", Request(puzzle=asked, attempt=attempt, hinted=True))
            self.writes[request.puzzle.id] = asked
            if (True, attempt) not in self.judged[puzzle.id]:
                return [request]
        return []

    def _step(self, puzzle: Puzzle, step: str, request: Request) -> Request:
        """The request under the id of a step of the puzzle."""
        digest = hashlib.sha256(json.dumps(request.chat()).encode()).hexdigest()[:12]
        name = f"{puzzle.id} [{step} {digest}]"
        self.origin[name] = puzzle
        return replace(request, puzzle=replace(request.puzzle, id=name))

    def _checked(self, completion: Completion, asked: Puzzle, verdict: Verdict) -> Verdict:
        """The verdict on a written trace that the judge accepted. asked: with the final assignment as the answer."""
        if not _same(self.read(completion.trace, len(asked.cells)), asked.answer):
            return Verdict(accepted=False, reason="wrong_labels", detail="not the assignment that it was to argue for")
        shown = find_leak(completion.trace, asked) or find_mention(completion.trace)
        return Verdict(accepted=False, reason="leak", detail=shown) if shown else verdict

    # ---- the report

    def for_report(self) -> dict[str, Any]:
        """{"workflow": numbers of the puzzles whose workflow has ended}.

        answers: the mean answer; any: some answer is right (pass@k); vote and final: the assignments, {batch_accuracy,
        cell_accuracy}, 0 without one. `final` is the ceiling of what the workflow can teach. gained, lost: puzzles that
        were asked about and became right, or wrong. from_answers, written, not_written: right assignments by the source
        of their trace.
        """
        ended = [(puzzle, outcome) for puzzle in self.puzzles if (outcome := self.outcome(puzzle)) is not None]
        numbers: dict[str, Any] = {"kind": self.workflow.kind, "puzzles": len(ended)}
        if not ended:
            return {"workflow": numbers}
        votes = [(puzzle, o.vote.labels if o.vote else []) for puzzle, o in ended]
        finals = [(puzzle, o.labels) for puzzle, o in ended]
        was = [_same(labels, puzzle.answer) for puzzle, labels in votes]
        now = [_same(labels, puzzle.answer) for puzzle, labels in finals]
        every = [(puzzle, self._all_answers(puzzle)) for puzzle, _ in ended]
        numbers["answers"] = {
            "batch_accuracy": fmean(fmean([_same(one, puzzle.answer) for one in of] or [0]) for puzzle, of in every),
            "cell_accuracy": fmean(fmean([_share_right(one, puzzle) for one in of] or [0]) for puzzle, of in every),
        }
        numbers["any"] = fmean(any(_same(one, puzzle.answer) for one in of) for puzzle, of in every)
        for name, pairs, right in (("vote", votes, was), ("final", finals, now)):
            numbers[name] = {
                "batch_accuracy": fmean(right),
                "cell_accuracy": fmean(_share_right(labels, puzzle) for puzzle, labels in pairs),
            }
        sources = Counter(o.found for right, (_, o) in zip(now, ended, strict=True) if right)
        return {
            "workflow": numbers
            | {
                "asked_about": sum(o.asked for _, o in ended),
                "gained": sum(after and not before for before, after in zip(was, now, strict=True)),
                "lost": sum(before and not after for before, after in zip(was, now, strict=True)),
                "from_answers": sources["answer"],
                "written": sources["written"],
                "not_written": sources[""],
            }
        }

    def _all_answers(self, puzzle: Puzzle) -> list[Sequence[str]]:
        """[k][N] labels of all answers, in the order of attempts; [] for an invalid one, and nothing for a failed request."""
        answered = [c for c, _ in self._judged(puzzle, hinted=False) if not c.error]
        return [self.read(c.trace, len(puzzle.cells)) for c in answered]


def part_of(puzzle: Puzzle, cells: Sequence[int], labels: Sequence[str]) -> Puzzle:
    """The puzzle of some of its cells, with those of its candidates that are in question. cells: their places.

    A model that knows nothing but puzzles can answer it: it is a smaller one.
    """
    asked = {normalise_label(label) for label in labels}
    kept = {name: puzzle.meta[name] for name in ("system_msg", "context_tail") if name in puzzle.meta}
    return replace(
        puzzle,
        cells=[puzzle.cells[i] for i in cells],
        candidates=[label for label in puzzle.candidates if normalise_label(label) in asked],
        answer=[puzzle.answer[i] for i in cells],
        meta=kept,
    )


def puzzle_of_step(name: str) -> str:
    """The id of the puzzle that a step is about, from the id of the step; other ids as they are."""
    return _STEP.sub("", name)


def listed(labels: Sequence[str]) -> str:
    """An assignment in words: "Cell 1 is T cell; Cell 2 is B cell"."""
    return "; ".join(f"Cell {number} is {label}" for number, label in enumerate(labels, start=1))


def largest_requests(workflow: Workflow, puzzle: Puzzle, tables: Tables | None) -> list[Request]:
    """Requests of which one is as long as any that the workflow makes for the puzzle, so that an engine has room."""
    requests = [Request(puzzle=puzzle, attempt=0), Request(puzzle=puzzle, attempt=0, hinted=True)]
    if workflow.kind == "debate":
        shown = listed(puzzle.candidates if len(puzzle.cells) > 1 else puzzle.candidates[:1])
        requests.append(Request(puzzle=puzzle, attempt=0, ask=RIVALS.format(one=shown, other=shown)))
    if workflow.kind == "tools":
        calls = [f"profile({label})" for label in puzzle.candidates] + [tables.longest_markers]
        # a call that asks for what is not there is repeated in its result
        found = [tables.result(call, puzzle) for call in (*calls, f"profile({'x' * LONGEST_CALL})")]
        longest = [max([*found, NOT_UNDERSTOOD], key=len)] * workflow.lookups
        requests.append(Request(puzzle=puzzle, attempt=0, ask=lookup_text(longest, workflow.lookups)))
    return requests


def _same(labels: Sequence[str], other: Sequence[str]) -> bool:
    """Are the two the same labels, compared as in the reward? False for an empty one."""
    return bool(labels) and [*map(normalise_label, labels)] == [*map(normalise_label, other)]


def _share_right(labels: Sequence[str], puzzle: Puzzle) -> float:
    right = sum(normalise_label(a) == normalise_label(b) for a, b in zip(labels, puzzle.answer, strict=False))
    return right / len(puzzle.answer)
