"""Workflows of distillation without a model: a scripted teacher, so that every vote, rival, lookup and trace is known."""

import json
import random
from collections.abc import Callable, Iterator

import pytest

from data.distill.consensus import consensus
from data.distill.distill import Completion, Draws, Plan, Request, distill
from data.distill.embedded_teacher import EmbeddedTeacher, TeacherConfig, marker_table
from data.distill.hints import find_mention
from data.distill.lookups import NOT_UNDERSTOOD, Tables, call_in, lookup_text
from data.distill.meter import Meter
from data.distill.report import acceptance_table, make_report
from data.distill.settings import DistillConfig
from data.distill.workflow import Workflow, WorkflowDraws, largest_requests, part_of, puzzle_of_step
from data.errors import UserError
from data.puzzles import Puzzle, read_rows, write_puzzles
from data.variants import convert
from reward.cellpuzzles import batch_reward
from reward.judge import TraceJudge
from tests.helpers.commands import succeed

LABELS = ["T cell", "B cell", "NK cell", "monocyte"]
GENES = {"T cell": "CD3D", "B cell": "MS4A1", "NK cell": "NKG7", "monocyte": "LYZ"}
PUZZLE = Puzzle(
    id="p",
    context="A donor.",
    cells=[[GENES[label], f"H{i}"] for i, label in enumerate(LABELS)],
    candidates=sorted(LABELS),
    answer=LABELS,
    meta={"tissue": "blood"},
)


def trace(labels: list[str], reasoning: str | None = None) -> str:
    """A response with these labels that argues with a gene of each cell."""
    argued = " ".join(f"Cell {i} has {genes[0]}." for i, genes in enumerate(PUZZLE.cells, start=1))
    return f"<think>{argued if reasoning is None else reasoning}</think>\n<answer>{' | '.join(labels)}</answer>"


def swapped(*places: int) -> list[str]:
    """The right labels with two of them exchanged."""
    labels = list(LABELS)
    labels[places[0]], labels[places[1]] = labels[places[1]], labels[places[0]]
    return labels


# no answer is all right, and the vote is: 2 + 2 + 1 + 2 votes for the right labels, at most 6 for others
SPLIT = [swapped(0, 1), swapped(2, 3), ["T cell", "B cell", "T cell", "monocyte"]]


class Scripted:
    """A teacher that answers by a function of the request, and keeps what it was asked."""

    def __init__(self, say: Callable[[Request], str], most: int = 10**6) -> None:
        """most: it stops, as after a signal, when it has answered so often."""
        self.say, self.most, self.ended = say, most, ""
        self.asked: list[Request] = []

    def sample(self, requests: list[Request]) -> Iterator[Completion]:
        for request in requests:
            if len(self.asked) == self.most:
                self.ended = "budget"
                return
            self.asked.append(request)
            named = dict(zip(("puzzle_id", "attempt", "hinted"), request.key, strict=True))
            yield Completion(**named, text=self.say(request), finish_reason="stop", completion_tokens=1)

    def stop(self) -> None:
        self.ended = self.ended or "stopped"

    def close(self) -> None:
        pass

    def steps(self) -> list[str]:
        """What was asked, in order: "answer", "debate", "tools", "write"."""
        return [r.puzzle.id.partition("[")[2].partition(" ")[0] or "answer" for r in self.asked]


@pytest.fixture
def judge():
    judge = TraceJudge("reward.cellpuzzles:batch_reward")
    yield judge
    judge.close()


def run(judge, say, kind="consensus", k=3, puzzle=PUZZLE, recorded=(), most=10**6, tables=None, **more):
    """(draws, teacher, recorded completions) of a run on one puzzle."""
    workflow = Workflow(kind=kind, **more)
    plan = Plan(candidates=k, stop_at=0)
    draws = WorkflowDraws([puzzle], plan, workflow, judge.labels, tables or Tables([puzzle]))
    teacher, written = Scripted(say, most), list(recorded)
    distill(draws, teacher, judge, recorded=list(recorded), record=written.append)
    return draws, teacher, written


def report_of(draws: Draws) -> dict:
    return make_report(draws, Meter(), seed=0, settings={}, rows=1, ended="")["workflow"]


# ---- consensus


def test_an_answer_that_gives_the_final_assignment_is_its_trace(judge):
    """Two of three answers are right: the vote is theirs, they are the traces, and nothing more is asked."""
    answers = [trace(swapped(0, 1)), trace(LABELS, "CD3D MS4A1 NKG7 LYZ"), trace(LABELS)]
    draws, teacher, _ = run(judge, lambda request: answers[request.attempt])
    assert teacher.steps() == ["answer"] * 3
    assert [c.attempt for c in draws.accepted(PUZZLE)] == [1, 2]
    (row,) = draws.rows("first", 0)
    assert row["assistant_msg"] == answers[1] and (row["attempt"], row["workflow"]) == (1, "consensus")
    assert "hinted" not in row
    found = report_of(draws)
    assert found["answers"] == {"batch_accuracy": pytest.approx(2 / 3), "cell_accuracy": pytest.approx(10 / 12)}
    assert found["vote"] == found["final"] == {"batch_accuracy": 1.0, "cell_accuracy": 1.0}
    assert (found["from_answers"], found["written"], found["not_written"], found["asked_about"]) == (1, 0, 0, 0)


def test_hinted_answers_of_a_run_without_a_workflow_are_not_its_written_traces(judge):
    """They were written from the answer, and were never checked for a mention of the vote."""
    said = "It was decided by vote."
    held = [
        Completion(puzzle_id="p", attempt=i, hinted=True, text=trace(LABELS, said), finish_reason="stop")
        for i in range(4)
    ]

    def say(request: Request) -> str:
        return trace(LABELS) if request.hinted else trace(SPLIT[request.attempt])

    draws, teacher, _ = run(judge, say, recorded=held)
    clean, other, _ = run(judge, say)
    assert teacher.steps() == other.steps() == ["answer"] * 3 + ["write"]
    assert draws.rows("first", 0) == clean.rows("first", 0) != []


def test_a_vote_that_no_answer_gave_is_argued_for(judge):
    """The case that a workflow is for: all three answers are wrong, and the vote is right."""
    clean = trace(LABELS)
    draws, teacher, _ = run(judge, lambda r: clean if r.hinted else trace(SPLIT[r.attempt]))
    assert teacher.steps() == ["answer"] * 3 + ["write"]
    asked = teacher.asked[3]
    assert asked.hinted and asked.chat()[1]["content"].startswith(PUZZLE.user_message)
    assert "T cell | B cell | NK cell | monocyte" in asked.chat()[1]["content"]
    (row,) = draws.rows("first", 0)
    assert row["assistant_msg"] == clean and row["hinted"] and row["puzzle_id"] == "p"
    assert Puzzle.from_row(row).answer == LABELS and row["user_msg"] == PUZZLE.user_message
    found = report_of(draws)
    assert found["answers"]["batch_accuracy"] == found["any"] == 0.0 and found["final"]["batch_accuracy"] == 1.0
    assert (found["from_answers"], found["written"]) == (0, 1)


def test_a_wrong_vote_teaches_nothing_and_costs_no_trace(judge):
    """Two answers agree on a swap: a right answer in the minority is not kept, for the workflow did not find it."""
    answers = [swapped(0, 1), swapped(0, 1), LABELS]
    draws, teacher, _ = run(judge, lambda request: trace(answers[request.attempt]))
    assert teacher.steps() == ["answer"] * 3 and draws.rows("all", 0) == []
    found = report_of(draws)
    assert found["any"] == 1.0 and found["vote"] == {"batch_accuracy": 0.0, "cell_accuracy": 0.5}
    draws, teacher, _ = run(judge, lambda request: "no tags")
    assert draws.rows("all", 0) == [] and report_of(draws)["final"] == {"batch_accuracy": 0.0, "cell_accuracy": 0.0}


@pytest.mark.parametrize(
    ("written", "reason", "detail"),
    [
        (trace(LABELS, "CD3D MS4A1 NKG7 LYZ, so most votes agree"), "leak", "a vote: 'votes'"),
        (trace(LABELS, "CD3D MS4A1 NKG7 LYZ against the other assignment"), "leak", "a rival: 'other assignment'"),
        (trace(LABELS, "CD3D MS4A1 NKG7 LYZ as I looked it up"), "leak", "a tool: 'looked it up'"),
        (trace(LABELS, "CD3D MS4A1 NKG7 LYZ <call>markers(LYZ)</call>"), "leak", "a tool: '<call>'"),
        (trace(LABELS, "CD3D MS4A1 NKG7 LYZ as the hint says"), "leak", "a hint: 'hint'"),
        (trace(LABELS, "They are clear."), "leak", "no argument: no gene of cell 1 is cited"),
        (trace(swapped(0, 1)), "wrong_labels", "2 of 4 right"),
    ],
    ids=lambda value: value[:30],
)
def test_a_trace_that_is_not_clean_is_rejected_and_asked_for_again(judge, written, reason, detail):
    draws, teacher, _ = run(judge, lambda r: written if r.hinted else trace(SPLIT[r.attempt]), writes=2)
    assert teacher.steps()[3:] == ["write"] * 2 and draws.rows("all", 0) == []
    verdicts = [verdict for (hinted, _), (_, verdict) in draws.judged["p"].items() if hinted]
    assert [(v.accepted, v.reason, v.detail) for v in verdicts] == [(False, reason, detail)] * 2
    assert report_of(draws)["not_written"] == 1


def test_a_lenient_reward_does_not_let_another_assignment_through():
    """The judge accepts every valid format; the trace must still argue for the final assignment."""
    lenient = TraceJudge("reward.cellpuzzles:mixed_reward", accept_at=0.0)
    try:
        draws, _, _ = run(lenient, lambda r: trace(swapped(0, 1)) if r.hinted else trace(SPLIT[r.attempt]), writes=1)
        ((_, verdict),) = [pair for (hinted, _), pair in draws.judged["p"].items() if hinted]
        assert (verdict.reason, verdict.detail) == ("wrong_labels", "not the assignment that it was to argue for")
    finally:
        lenient.close()


def test_a_clean_trace_may_use_ordinary_words():
    for text in (
        "The majority of its genes are of T cells.",
        "We look at cell 2, which wakes up NK genes.",
        "A profile of B cells.",
    ):
        assert find_mention(trace(LABELS, text)) == "", text
    assert find_mention(trace(LABELS, "profile(B cell) lists it")) == "a tool: 'profile'"


# ---- debate


def rivals(request: Request) -> tuple[str, str]:
    """The two assignments that a comparison shows, in its order."""
    lines = request.ask.splitlines()
    return lines[3].removeprefix("One: "), lines[4].removeprefix("Other: ")


def test_the_vote_and_its_rival_are_compared_on_their_own_cells(judge):
    """Three answers say B, T for cells 1 and 2, two say T, B; the comparisons say T, B."""
    answers = [swapped(0, 1)] * 3 + [LABELS] * 2
    draws, teacher, _ = run(
        judge,
        lambda r: trace(["T cell", "B cell"]) if r.ask else trace(answers[r.attempt]),
        "debate",
        5,
        comparisons=3,
    )
    assert teacher.steps() == ["answer"] * 5 + ["debate"] * 3
    shown = [rivals(request) for request in teacher.asked[5:]]
    ours, other = "Cell 1 is B cell; Cell 2 is T cell", "Cell 1 is T cell; Cell 2 is B cell"
    assert shown == [(ours, other), (other, ours), (ours, other)], "in turns, so that no place wins"
    part = teacher.asked[5].puzzle
    assert part.cells == PUZZLE.cells[:2] and part.candidates == ["B cell", "T cell"]
    assert teacher.asked[5].chat()[1]["content"] == part.user_message + teacher.asked[5].ask
    assert [c.attempt for c in draws.accepted(PUZZLE)] == [3, 4]
    found = report_of(draws)
    assert (found["asked_about"], found["gained"], found["lost"]) == (1, 1, 0)
    assert found["vote"]["batch_accuracy"] == 0.0 and found["final"]["batch_accuracy"] == 1.0


def test_a_debate_that_is_undecided_leaves_the_vote(judge):
    """One comparison for each side, the third invalid; and where all answers agree there is no debate."""
    answers = [LABELS] * 3 + [swapped(0, 1)] * 2
    said = [["T cell", "B cell"], ["B cell", "T cell"], ["T cell"]]
    draws, teacher, _ = run(
        judge, lambda r: trace(said[r.attempt]) if r.ask else trace(answers[r.attempt]), "debate", 5
    )
    assert teacher.steps().count("debate") == 3 and draws.outcome(PUZZLE).labels == LABELS
    draws, teacher, _ = run(judge, lambda r: trace(LABELS), "debate", 3)
    assert teacher.steps() == ["answer"] * 3 and not draws.outcome(PUZZLE).asked


@pytest.mark.parametrize("comparisons", [2, 3])
def test_the_place_of_an_assignment_alone_changes_nothing(judge, comparisons):
    """A model that always takes the one shown last: of three comparisons the rival is last in two."""
    answers = [LABELS] * 3 + [swapped(0, 1)] * 2

    def last_shown(request: Request) -> str:
        if not request.ask:
            return trace(answers[request.attempt])
        return trace([part.partition(" is ")[2] for part in rivals(request)[1].split("; ")])

    draws, _, _ = run(judge, last_shown, "debate", 5, comparisons=comparisons)
    assert draws.outcome(PUZZLE).labels == LABELS


def test_one_comparison_decides(judge):
    answers = [swapped(0, 1)] * 2 + [LABELS]
    draws, _, _ = run(
        judge, lambda r: trace(["T cell", "B cell"]) if r.ask else trace(answers[r.attempt]), "debate", comparisons=1
    )
    assert draws.outcome(PUZZLE).labels == LABELS


def test_a_debate_can_lose(judge):
    answers = [LABELS] * 2 + [swapped(0, 1)]
    draws, _, _ = run(judge, lambda r: trace(["B cell", "T cell"]) if r.ask else trace(answers[r.attempt]), "debate")
    found = report_of(draws)
    assert (found["gained"], found["lost"], found["final"]["batch_accuracy"]) == (0, 1, 0.0)
    assert "0 gained and 1 lost of 1 asked about" in acceptance_table(
        make_report(draws, Meter(), seed=0, settings={}, rows=0, ended="")
    )


# ---- tools


def test_lookups_go_on_until_an_answer_and_the_answers_vote_with_the_others(judge):
    """Two conversations: one looks a gene up and writes nonsense before it answers, one answers at once."""
    answers = [swapped(0, 1)] * 2 + [LABELS]
    right = trace(["T cell", "B cell"])
    said = {0: "Hm. <call>markers(cd3d)</call> and so on", 1: "<call>shell(rm)</call>", 2: right, 5: right}

    def say(request: Request) -> str:
        return said[request.attempt] if request.ask else trace(answers[request.attempt])

    draws, teacher, _ = run(judge, say, "tools", comparisons=2)
    assert teacher.steps() == ["answer"] * 3 + ["tools"] * 4
    first, at_once, second, third = teacher.asked[3:]
    assert [r.attempt for r in teacher.asked[3:]] == [0, 5, 1, 2], "conversations go on side by side"
    assert {r.stop for r in teacher.asked[3:]} == {"</call>"} and first.ask == at_once.ask
    assert "Found so far" not in first.ask and "You can look up 4 more." in first.ask
    assert "markers(cd3d): " in second.ask and "T cell" in second.ask and NOT_UNDERSTOOD not in second.ask
    assert NOT_UNDERSTOOD in third.ask and "You can look up 2 more." in third.ask
    assert first.puzzle.cells == PUZZLE.cells[:2] and first.puzzle.id == at_once.puzzle.id != second.puzzle.id
    # cells 1 and 2: two answers for B, T; one answer and two conversations for T, B
    assert draws.outcome(PUZZLE).labels == LABELS and [c.attempt for c in draws.accepted(PUZZLE)] == [2]
    assert report_of(draws)["gained"] == 1
    answers = [swapped(0, 1)] * 4 + [LABELS]  # four against one and two
    draws, _, _ = run(judge, say, "tools", 5, comparisons=2)
    assert draws.outcome(PUZZLE).labels == swapped(0, 1)


def test_lookups_end_and_what_is_no_assignment_is_no_vote(judge):
    answers = [LABELS] * 2 + [swapped(0, 1)]
    for last in (trace(["martian", "martian"]), "<call>markers(LYZ)</call>", "no tags"):

        def say(request: Request, last: str = last) -> str:
            if not request.ask:
                return trace(answers[request.attempt])
            return last if request.attempt % 3 == 2 else "<call>profile(B cell)</call>"

        draws, teacher, _ = run(judge, say, "tools", lookups=2)
        assert teacher.steps()[3:] == ["tools"] * 9 and teacher.asked[-1].stop == ""
        assert "You can look up nothing more." in teacher.asked[-1].ask
        assert draws.outcome(PUZZLE).labels == LABELS


def test_the_tables_do_not_give_a_puzzle_its_own_answer():
    other = Puzzle(**{**vars(PUZZLE), "id": "q", "cells": [["CD3D", "X"], ["MS4A1", "Y"], ["Z"], ["W"]]})
    tables = Tables([PUZZLE, other])
    assert tables.profile("b CELL", PUZZLE) == "MS4A1, Y", "H1, of its own B cell, is left out"
    assert tables.profile("B cell", other) == "H1, MS4A1"
    assert tables.profile("B cell", Puzzle(**{**vars(PUZZLE), "answer": ["x", "y", "z", "w"]})) == "MS4A1, H1, Y"
    assert Tables([PUZZLE]).profile("B cell", PUZZLE) == "no other cell of this type"
    # nor where another puzzle shows the same cell, with the same genes or with others
    again = Puzzle(**{**vars(PUZZLE), "id": "again"})
    assert Tables([PUZZLE, again]).profile("B cell", PUZZLE) == "no other cell of this type"
    ids = {"source": "a.h5ad", "cell_ids": ["1", "2", "3", "4"]}
    one, two = (Puzzle(**{**vars(found), "meta": ids}) for found in (PUZZLE, other))
    assert Tables([one, two]).profile("B cell", one) == "no other cell of this type"
    cells = [["A"], ["A"], ["A"], ["B"], ["B", "C"]]  # other cells with equal genes count each
    many = Puzzle(id="m", context="", cells=cells, candidates=["B cell"] * 5, answer=["B cell"] * 5)
    many = Puzzle(**{**vars(many), "meta": {"source": "c.h5ad", "cell_ids": list("12345")}})
    assert Tables([many]).profile("B cell", one) == "A, B, C"
    two = Puzzle(**{**vars(two), "meta": {**ids, "source": "b.h5ad"}})
    assert Tables([one, two]).profile("B cell", one) == "MS4A1, Y"
    assert tables.profile("martian", PUZZLE) == "no other cell of this type"
    assert tables.markers("no such gene") == "of no cell type of the table"
    assert "B cell" in tables.markers(" ms4a1 ").split(", ")


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("<think>x</think><answer>T cell</answer>", None),
        ("<call>markers(CD3D)</call>", "markers(CD3D)"),
        ("I ask. <call> profile( CD8-positive, alpha-beta T cell ) ", "profile(CD8-positive, alpha-beta T cell)"),
        ("<call>markers(A)</call> <call>markers(B)</call>", "markers(A)"),
        ("<call>markers(A", ""),
        ("<call>markers()</call>", ""),
        ("<call>markers(A)</call", ""),
        ("<call>exec(A)</call>", ""),
        ("<think></think><answer><call>markers(A)</call></answer>", None),
    ],
)
def test_the_protocol_is_strict(text, call):
    assert call_in(text) == call


# ---- on disk, again, and whatever the teacher


@pytest.mark.parametrize("kind", ["consensus", "debate", "tools"])
def test_a_run_that_was_cut_anywhere_ends_as_the_unbroken_one(judge, kind):
    """Every step is recorded before it is used, and what is recorded is not asked again."""
    answers = [swapped(0, 1)] * 2 + [swapped(2, 3), swapped(0, 2)]

    def say(request: Request) -> str:
        if request.hinted:
            return trace(LABELS) if request.attempt else "no tags"
        if request.stop and request.attempt in (0, 5):
            return "<call>markers(CD3D)</call>"
        return trace(request.puzzle.answer) if request.ask else trace(answers[request.attempt])

    whole, asked, written = run(judge, say, kind, 4)
    total = len(asked.asked)
    assert total > 4 or kind == "consensus"
    for most in range(total):
        _, _, held = run(judge, say, kind, 4, most=most)
        assert len(held) == most
        again, rest, after = run(judge, say, kind, 4, recorded=held)
        assert len(rest.asked) == total - most and again.rows("all", 0) == whole.rows("all", 0)
        assert sorted(c.key for c in after) == sorted(c.key for c in written)


def test_what_answered_another_question_is_not_used(judge):
    """With one more answer the vote, and so the question, is another: the old comparisons do not count."""
    answers = [LABELS, LABELS, swapped(0, 1), swapped(2, 3), swapped(2, 3)]

    def say(request: Request) -> str:
        return trace(request.puzzle.answer) if request.ask else trace(answers[request.attempt])

    _, first, written = run(judge, say, "debate", 3)
    _, second, _ = run(judge, say, "debate", 5, recorded=written)
    assert first.asked[3].puzzle.cells == PUZZLE.cells[:2]
    assert second.steps() == ["answer"] * 2 + ["debate"] * 3 and second.asked[2].puzzle.cells == PUZZLE.cells[2:]


def test_a_failed_step_is_no_vote(judge):
    class Failing(Scripted):
        def sample(self, requests):
            for completion in super().sample(requests):
                failed = Completion(
                    puzzle_id=completion.puzzle_id, attempt=completion.attempt, hinted=False, error="status 500"
                )
                yield failed if "[" in completion.puzzle_id else completion

    answers = [LABELS] * 2 + [swapped(0, 1)]
    for kind in ("debate", "tools"):
        draws = WorkflowDraws(
            [PUZZLE], Plan(candidates=3, stop_at=0), Workflow(kind=kind), judge.labels, Tables([PUZZLE])
        )
        distill(draws, Failing(lambda r: trace(answers[r.attempt % 3])), judge)
        assert draws.outcome(PUZZLE).labels == LABELS


def test_other_variants(judge):
    """Single cells have all candidates of their batch; open-ended puzzles have none, and only vote."""
    (cell, *_), (open_ended,) = convert([PUZZLE], "cell"), convert([PUZZLE], "open")
    said = [["B cell"], ["B cell"], ["T cell"]]
    draws, teacher, _ = run(
        judge, lambda r: trace(["T cell"]) if r.ask else trace(said[r.attempt]), "debate", puzzle=cell
    )
    assert teacher.asked[3].puzzle.candidates == ["B cell", "T cell"] and draws.outcome(cell).labels == ["T cell"]
    draws, _, _ = run(judge, lambda r: trace(LABELS) if r.hinted else trace(SPLIT[r.attempt]), puzzle=open_ended)
    assert draws.outcome(open_ended).labels == LABELS and draws.outcome(open_ended).found == "written"
    with pytest.raises(UserError, match="--workflow debate: puzzle .* has no candidates to choose from"):
        run(judge, lambda r: "", "debate", puzzle=open_ended)
    with pytest.raises(UserError, match="its id reads like a step of a workflow"):
        run(judge, lambda r: "", puzzle=Puzzle(**{**vars(PUZZLE), "id": "p [debate 0123456789ab]"}))
    assert puzzle_of_step("p [debate 0123456789ab]") == "p" and puzzle_of_step("p [1]") == "p [1]"


def test_parts_and_the_longest_request():
    part = part_of(PUZZLE, [3, 0], ["monocyte", "t CELL"])
    assert part.cells == [["LYZ", "H3"], ["CD3D", "H0"]] and part.candidates == ["T cell", "monocyte"]
    assert part.answer == ["monocyte", "T cell"] and part.variant == "batch" and part.meta == {}
    tables = Tables([PUZZLE, Puzzle(**{**vars(PUZZLE), "id": "q"})])
    longest = [len(r.chat()[1]["content"]) for r in largest_requests(Workflow(kind="tools"), PUZZLE, tables)]
    asked = PUZZLE.user_message + lookup_text([tables.result("profile(monocyte)", PUZZLE)] * 4, 4)
    assert max(longest) >= len(asked)
    for call in ("markers(EPCAM)", "markers(CD3D)", f"profile({'y' * 200})", f"markers({'y' * 200})"):
        assert max(longest) >= len(PUZZLE.user_message + lookup_text([tables.result(call, PUZZLE)] * 4, 4)), call
    vote = consensus(SPLIT, PUZZLE.candidates)
    assert vote.labels == LABELS and vote.shares == pytest.approx([2 / 3, 2 / 3, 1 / 3, 2 / 3])


def crowd(number: int) -> Puzzle:
    """A puzzle of seven cells of twelve types that are in no marker table."""
    rng = random.Random(number)
    labels = rng.sample([f"type {k}" for k in range(12)], 7)
    of_type = [[f"G{label.split()[1]}M{m}" for m in range(4)] for label in labels]
    cells = [rng.sample(genes, 2) + rng.sample([f"H{g}" for g in range(9)], 4) for genes in of_type]
    return Puzzle(id=f"crowd-{number}", context="none", cells=cells, candidates=sorted(labels), answer=labels)


@pytest.mark.slow(4)
@pytest.mark.parametrize("kind", ["consensus", "debate", "tools"])
def test_the_command_with_the_embedded_teacher(tmp_path, kind):
    """A noisy teacher: its votes are right more often than it is. Cut near the end, it ends in the same files."""
    out = tmp_path / "t.jsonl"
    write_puzzles(tmp_path / "p.jsonl", [crowd(number) for number in range(30)])
    given = ["--puzzles", tmp_path / "p.jsonl", "--out", out, "--teacher-noise", 1.3, "--candidates", 5]
    given += ["--workflow", kind]
    assert f"{kind}: an answer is right in 24.0% of 30 puzzles" in succeed("distill", *given)
    report = json.loads((tmp_path / "t.report.json").read_text())
    found, rows = report["workflow"], read_rows(out)
    assert (found["kind"], found["puzzles"], report["settings"]["workflow"]) == (kind, 30, kind)
    assert found["final"]["batch_accuracy"] > 0.6 > found["answers"]["batch_accuracy"] + 0.3
    assert len(rows) == found["from_answers"] + found["written"] and found["written"] > 2
    assert all(row["workflow"] == kind for row in rows) and sum("hinted" in row for row in rows) == found["written"]
    assert all(batch_reward(row["assistant_msg"], Puzzle.from_row(row)).total == 1.0 for row in rows)
    raw, kept = (tmp_path / "t.raw.jsonl").read_bytes(), out.read_bytes()
    steps = {json.loads(line)["puzzle_id"].partition("[")[2].partition(" ")[0] for line in raw.splitlines()[1:]}
    assert steps == {"", "write"} | ({kind} - {"consensus"})
    (tmp_path / "t.raw.jsonl").write_bytes(raw[: len(raw) * 9 // 10])
    succeed("distill", *given, "--resume")
    assert out.read_bytes() == kept
    assert sorted((tmp_path / "t.raw.jsonl").read_bytes().splitlines()) == sorted(raw.splitlines())


def test_the_embedded_teacher_argues_for_what_it_is_shown():
    teacher = EmbeddedTeacher(marker_table([PUZZLE]), 0, TeacherConfig(slip=0.0, bad_format=0.0))
    wrong = Puzzle(**{**vars(PUZZLE), "answer": swapped(0, 1)})
    (done,) = teacher.sample([Request(puzzle=wrong, attempt=0, hinted=True)])
    assert done.hinted and done.text.endswith("<answer>B cell | T cell | NK cell | monocyte</answer>")
    assert "Cell 1: no marker left, so B cell" in done.text and "Cell 3: NKG7, H2, so NK cell" in done.text


def test_settings_that_do_not_go_together_are_refused():
    given = {"puzzles": "p", "out": "t.jsonl", "teacher": "vllm", "model": "m"}
    for more, words in (
        ({"workflow": "debate", "hint": True}, "--hint shows the right answer, --workflow debate finds its own"),
        ({"workflow": "consensus", "stop_at": 2}, "needs all --candidates: leave --stop-at out"),
        ({"workflow": "consensus", "comparisons": 5}, "--comparisons goes with --workflow debate or tools"),
        ({"lookups": 5}, "--lookups goes with --workflow tools"),
        ({"hint_candidates": 8}, "--hint-candidates goes with --hint or --workflow"),
        ({"workflow": "tools", "lookups": 0}, "--lookups 0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            DistillConfig(**given, **more)
    plain, debate = DistillConfig(**given), DistillConfig(**given, workflow="debate", comparisons=5)
    assert not {"workflow", "comparisons", "lookups"} & plain.shown().keys() and debate.shown()["comparisons"] == 5
    assert plain.meaning([PUZZLE]) == debate.meaning([PUZZLE]), "a workflow goes on from plain answers"
