"""Distillation without a network: embedded teacher, choice of requests, hints, verdicts, raw file, report."""

import dataclasses
import errno
import hashlib
import json
import os
import random

import pytest
import torch
from safetensors.torch import save_file

from data.distill.distill import Completion, Draws, Plan, Verdict, distill, refuse_unsolvable
from data.distill.embedded_teacher import (
    GLANCE_OPENINGS,
    MARKERS_OPENING,
    EmbeddedTeacher,
    TeacherConfig,
    learned_markers,
    marker_table,
    write_trace,
)
from data.distill.hints import HINT, LEAKS, find_leak, hinted_chat
from data.distill.meter import TEMPLATE_TOKENS, Meter
from data.distill.report import acceptance_table, make_report
from data.distill.responses import RawFile, prompts_hash
from data.distill.settings import DistillConfig
from data.errors import RunError, UserError
from data.files import sealed_row
from data.puzzles import Puzzle, read_puzzles, read_rows, write_puzzles, write_rows
from data.variants import convert
from reward.cellpuzzles import batch_reward
from reward.judge import REASONS, TraceJudge
from tests.helpers.commands import run_command, succeed
from tests.helpers.endpoints import here

TABLE = {"T cell": ["CD3D", "IL7R"], "B cell": ["MS4A1", "CD79A"]}
PUZZLE = Puzzle(
    id="p",
    context="",
    cells=[["ACTB", "CD3D", "IL7R"], ["MS4A1", "ACTB"]],
    candidates=["B cell", "T cell"],
    answer=["T cell", "B cell"],
    meta={"tissue": "blood", "disease": "normal"},
)
SURE = TeacherConfig(noise=0.0, slip=0.0, bad_format=0.0, glance=0.0)
RIGHT = "<think>Cell 1 has CD3D, so T cell. Cell 2 has MS4A1, so B cell.</think>\n<answer>T cell | B cell</answer>"
WRONG = "<think>?</think><answer>B cell | T cell</answer>"


@pytest.fixture
def judge():
    judge = TraceJudge("reward.cellpuzzles:batch_reward")
    yield judge
    judge.close()


def named(name: str, **meta) -> Puzzle:
    return Puzzle(**{**vars(PUZZLE), "id": name, "meta": PUZZLE.meta | meta})


def drawn(text: str, attempt: int = 0, name: str = "p", hinted: bool = False, **more) -> Completion:
    return Completion(puzzle_id=name, attempt=attempt, hinted=hinted, text=text, finish_reason="stop", **more)


def made_up(number: int) -> Puzzle:
    """A puzzle with labels that are not in the marker table."""
    rng = random.Random(number)
    labels = rng.sample([f"type {k}" for k in range(12)], 3)
    of_type = [[f"G{label.split()[1]}M{m}" for m in range(4)] for label in labels]
    cells = [rng.sample(genes, 2) + rng.sample([f"H{g}" for g in range(9)], 4) for genes in of_type]
    return Puzzle(id=f"made-up-{number}", context="none", cells=cells, candidates=sorted(labels), answer=labels)


# ---- the embedded teacher


def test_a_sure_teacher_cites_the_markers_and_is_right():
    assert write_trace(PUZZLE, TABLE, random.Random(0), SURE) == (
        "<think>By the markers.\nCell 1: CD3D, IL7R, so T cell\nCell 2: MS4A1, so B cell</think>\n"
        "<answer>T cell | B cell</answer>"
    )


def test_the_plain_voice_writes_sentences():
    plain = dataclasses.replace(SURE, voice="plain")
    assert write_trace(PUZZLE, TABLE, random.Random(0), plain) == (
        "<think>By their marker genes:\nCell 1 expresses CD3D and IL7R, which mark T cell.\n"
        "Cell 2 expresses MS4A1, which marks B cell.</think>\n<answer>T cell | B cell</answer>"
    )
    assert write_trace(PUZZLE, TABLE, random.Random(0), dataclasses.replace(plain, glance=1.0)) == (
        "<think>At first sight:\nCell 1 looks like T cell.\nCell 2 looks like B cell.</think>\n"
        "<answer>T cell | B cell</answer>"
    )


def test_the_voice_changes_words_only():
    """The same draws: the same labels, mistakes and styles for a seed, whatever the words are."""
    for seed in range(50):
        notes, plain = (
            write_trace(PUZZLE, TABLE, random.Random(seed), TeacherConfig(voice=voice)) for voice in ("notes", "plain")
        )
        assert notes.split("</think>")[1] == plain.split("</think>")[1]


def test_the_most_common_opening_is_the_markers_and_first_words_differ():
    """Greedy decoding after SFT takes the most likely first token, so no two openings may begin with the same token."""
    config = TeacherConfig()
    openings = [
        write_trace(PUZZLE, TABLE, random.Random(i), config).split("\n")[0].removeprefix("<think>") for i in range(2000)
    ]
    counts = {opening: openings.count(opening) for opening in (*GLANCE_OPENINGS, MARKERS_OPENING)}
    assert sum(counts.values()) == 2000
    assert max(counts, key=counts.get) == MARKERS_OPENING and abs(counts[MARKERS_OPENING] / 2000 - 0.22) < 0.04
    assert len({opening.split()[0] for opening in counts}) == len(counts)


def test_learned_markers_tell_the_label_and_not_one_odd_cell():
    odd = Puzzle(**{**vars(PUZZLE), "id": "odd", "cells": [["ACTB", "CD3D", "ODD1"], ["MS4A1", "ACTB"]]})
    table = learned_markers([PUZZLE] * 5 + [odd], n_markers=2)
    assert table == {"T cell": ["CD3D", "IL7R"], "B cell": ["MS4A1", "ACTB"]}


def test_its_accepted_rows_are_those_the_published_demo_was_trained_on(judge):
    """The hash was taken when the embedded teacher was the only one."""
    puzzles = [made_up(number) for number in range(40)]
    draws = Draws(puzzles, Plan(candidates=4))
    distill(draws, EmbeddedTeacher(marker_table(puzzles), 5, TeacherConfig(noise=0.8)), judge)
    text = "".join(json.dumps(row) + "\n" for row in draws.rows("first", 5))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "c82b704dd5ab793f052d362d1b2099d58583b2f17ed5c64193fd06ee550e668d"
    )
    report = make_report(draws, Meter(), seed=5, settings={}, rows=40, ended="")
    assert (report["traces_drawn"], report["puzzles_accepted"], report["accepted_at_first"]) == (49, 40, 34)


def test_a_candidate_depends_on_its_attempt_alone():
    in_order, other = EmbeddedTeacher(TABLE, 1), EmbeddedTeacher(TABLE, 1)
    traces = [in_order.candidate(PUZZLE, attempt) for attempt in range(6)]
    assert [other.candidate(PUZZLE, attempt) for attempt in (4, 1, 1, 5)] == [traces[i] for i in (4, 1, 1, 5)]


# ---- which requests are made, and which traces are kept


def test_no_more_is_asked_for_than_a_puzzle_still_lacks():
    draws = Draws([PUZZLE, named("q")], Plan(candidates=4, stop_at=2, hint_candidates=1))
    asked = [[request.key for request in draws.next_requests()]]
    yes, no = Verdict(accepted=True), Verdict(accepted=False, reason="wrong_labels")
    for verdict, other in ((yes, no), (no, no), (yes, no)):
        for request in draws.next_requests():
            judged = verdict if request.puzzle.id == "p" else other
            draws.take(drawn("", request.attempt, request.puzzle.id, request.hinted), judged)
        asked.append([request.key for request in draws.next_requests()])
    assert asked == [
        [("p", 0, False), ("p", 1, False), ("q", 0, False), ("q", 1, False)],
        [("q", 2, False), ("q", 3, False)],
        [("q", 0, True)],
        [],
    ]


def test_a_puzzle_that_only_met_errors_gets_no_hint_and_all_are_drawn_at_once():
    draws = Draws([PUZZLE], Plan(candidates=3, stop_at=0, hint_candidates=2))
    assert [request.attempt for request in draws.next_requests()] == [0, 1, 2]
    for attempt in range(3):
        draws.take(drawn("", attempt, error="status 500"), Verdict(accepted=False, reason="endpoint_error"))
    assert draws.next_requests() == []


def test_fewer_candidates_than_an_earlier_run_drew_are_those_of_the_smaller_number():
    answers = [drawn("<answer>no</answer>", 0), drawn("<answer>no</answer>", 1), drawn(RIGHT, 2)]
    for k, kept in ((3, 1), (2, 0)):
        draws = Draws([PUZZLE], Plan(candidates=k, stop_at=0))
        for completion in answers:
            if draws.puzzle_of(completion) is not None:
                draws.take(completion, Verdict(accepted=completion.text == RIGHT))
        assert len(draws.accepted(PUZZLE)) == kept


def test_without_hint_the_hinted_candidates_of_an_earlier_run_are_no_traces():
    """Else who drops --hint would still train on answers that the teacher was shown."""
    for hints, kept in ((0, 0), (1, 1)):
        draws = Draws([PUZZLE], Plan(candidates=1, hint_candidates=hints))
        for completion in (drawn("<answer>no</answer>", 0), drawn(RIGHT, 0, hinted=True)):
            if draws.puzzle_of(completion) is not None:
                draws.take(completion, Verdict(accepted=completion.text == RIGHT))
        assert len(draws.accepted(PUZZLE)) == kept
    late = drawn(RIGHT, 3, hinted=True)
    assert Draws([PUZZLE], Plan(hint_candidates=1)).puzzle_of(late) is None


@pytest.mark.parametrize(
    ("candidates", "answer", "said"),
    [
        (
            ["T cell", "t cell"],
            ["T cell", "t cell"],
            "puzzle p: lists the candidate 't cell' twice; leave the puzzle out",
        ),
        (["T cell", "B cell"], ["T cell", "NK cell"], "puzzle p: its answer 'NK cell' is none of its candidates"),
    ],
)
def test_puzzles_that_nobody_can_solve_are_refused(candidates, answer, said):
    with pytest.raises(UserError) as refused:
        refuse_unsolvable([dataclasses.replace(PUZZLE, id="p", candidates=candidates, answer=answer)])
    assert said in str(refused.value)


def test_a_puzzle_of_one_cell_has_nothing_to_exchange():
    one = Puzzle(id="one", context="", cells=[["CD3D"]], candidates=["T cell"], answer=["T cell"])
    assert "T cell" in write_trace(one, {}, random.Random(0), TeacherConfig(slip=1.0))


def test_another_model_in_the_same_folder_is_another_meaning(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    save_file({"w": torch.zeros(3)}, model / "model.safetensors")
    config = DistillConfig(puzzles="p", out="t.jsonl", teacher="vllm", model=str(model))
    before = config.meaning([PUZZLE])
    assert config.meaning([PUZZLE]) == before
    save_file({"w": torch.ones(3)}, model / "model.safetensors")
    assert config.meaning([PUZZLE]) != before
    path = tmp_path / "t.raw.jsonl"
    with opened(path, settings=before) as raw:
        raw.append(drawn("x"))
    with pytest.raises(ValueError, match="--resume: model_files was"):
        opened(path, settings=config.meaning([PUZZLE]), resume=True)
    # a file of a run before this was recorded
    older = tmp_path / "older.raw.jsonl"
    with opened(older, settings={k: v for k, v in before.items() if k != "model_files"}) as raw:
        raw.append(drawn("x"))
    opened(older, settings=before, resume=True).__exit__(None, None, None)


def test_responses_on_a_disk_without_locks_or_in_a_place_that_is_no_folder(tmp_path, monkeypatch, capsys):
    def knows_none(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("data.files.fcntl.flock", knows_none)
    with opened(tmp_path / "t.raw.jsonl") as raw:
        raw.append(drawn("x"))
    assert "this disk knows no locks" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"cannot be written \(.*\)"):
        opened(tmp_path / "t.raw.jsonl/t.raw.jsonl")


def test_which_accepted_trace_is_kept():
    draws = Draws([PUZZLE, named("q")], Plan())
    for name in ("p", "q"):
        for attempt, text in enumerate(["no", "yes, long", "yes", "yes!"]):
            draws.take(drawn(text, attempt, name), Verdict(accepted=attempt > 0))
    draws.take(drawn("hinted", 0, "p", True), Verdict(accepted=True))
    kept = {keep: [row["attempt"] for row in draws.rows(keep, 0)] for keep in ("first", "shortest", "all")}
    assert kept == {"first": [1, 1], "shortest": [2, 2], "all": [1, 2, 3, 1, 2, 3]}
    picks = [[row["attempt"] for row in draws.rows("random", seed)] for seed in range(40)]
    assert picks[3] == [row["attempt"] for row in draws.rows("random", 3)]
    assert {pick[0] for pick in picks} == {1, 2, 3} and any(a != b for a, b in picks)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_kept_trace_with_wrong_labels_is_never_read_as_the_truth(tmp_path, ending):
    puzzles, free = [PUZZLE, named("q"), named("r")], "It is B cell, then T cell."
    draws = Draws(puzzles, Plan())
    for puzzle, text in zip(puzzles, (RIGHT, WRONG, free), strict=True):
        draws.take(drawn(text, 0, puzzle.id), Verdict(accepted=True))
    rows = draws.rows("first", 0)
    assert [row.get("answer") for row in rows] == [None, "T cell | B cell", "T cell | B cell"]
    write_rows(tmp_path / f"t.{ending}", rows)
    read = read_puzzles(tmp_path / f"t.{ending}")
    assert [puzzle.answer for puzzle in read] == [PUZZLE.answer] * 3
    assert [puzzle.meta["assistant_msg"] for puzzle in read] == [RIGHT, WRONG, free]
    write_puzzles(tmp_path / f"again.{ending}", read)
    assert [{**row, "answer": row.get("answer")} for row in read_rows(tmp_path / f"again.{ending}")] == [
        {**row, "answer": row.get("answer")} for row in rows
    ]


def test_two_puzzles_of_one_id_are_refused_and_a_repeated_one_is_asked_once():
    draws = Draws([PUZZLE, PUZZLE], Plan())
    assert len(draws.next_requests()) == 1
    draws.take(drawn(RIGHT), Verdict(accepted=True))
    assert len(draws.rows("first", 0)) == 2
    with pytest.raises(ValueError, match="two different puzzles have the id p"):
        Draws([PUZZLE, Puzzle(**{**vars(PUZZLE), "context": "other"})], Plan())


@pytest.mark.parametrize(
    ("text", "reasoning", "trace"),
    [
        (" <think>a</think><answer>b</answer>\n", "", "<think>a</think><answer>b</answer>"),
        ("\n\n<answer>b</answer>", "a\n", "<think>a</think>\n<answer>b</answer>"),
        ("<think>a</think><answer>b</answer>", "other", "<think>a</think><answer>b</answer>"),
        ("a</think><answer>b</answer>", "", "<think>a</think><answer>b</answer>"),
        ("no tags \ud83d", "", "no tags ?"),
        ("<answer>b</answer>", "put it in <answer> tags", "<think>put it in answer tags</think>\n<answer>b</answer>"),
        ("<think>\n\n</think>\n<answer>b</answer>", "a", "<think>a</think>\n<answer>b</answer>"),
        (
            "<answer>b</answer>",
            "<think>So:<answer>c | d</answer>.</think>",
            "<think>So: c | d .</think>\n<answer>b</answer>",
        ),
    ],
)
def test_reasoning_that_came_apart_stands_in_think_tags(text, reasoning, trace):
    assert drawn(text, reasoning=reasoning).trace == trace


# ---- hints


def test_the_hint_is_in_the_request_alone():
    system, user = hinted_chat(PUZZLE)
    assert user["content"] == PUZZLE.user_message + HINT.format(answer="T cell | B cell")
    assert [system, {**user, "content": PUZZLE.user_message}] == PUZZLE.chat()


LEAKED = [
    ("a hint", "As the hint says, CD3D is T. MS4A1 is B."),
    ("being told", "I was told so. CD3D. MS4A1."),
    ("being told", "I was told from the start. CD3D. MS4A1."),
    ("a hint", "CD3D and MS4A1 fit the hint at the end."),
    ("a hint", "The assignment hinted at above fits CD3D and MS4A1."),
    ("a given answer", "CD3D and MS4A1 fit the provided answer."),
    ("a given answer", "Since the solution is already known: CD3D, MS4A1."),
    ("a given answer", "Per the instructions the final list is fixed: CD3D, MS4A1."),
    ("a telling request", "The prompt reveals the cell types in order. CD3D, MS4A1."),
    ("a telling request", "As stated in the request, cell 1 is T. CD3D, MS4A1."),
    ("a telling request", "The user says that cell 2 must be B. CD3D, MS4A1."),
    ("a telling request", "The final assignment in the message says B for cell 2. CD3D, MS4A1."),
    ("having the answer", "We need to not reveal that we have the answer. CD3D, MS4A1."),
    ("having the answer", "The answer we have says B for cell 2. CD3D, MS4A1."),
    ("having the answer", "I should not say that I saw the solution. CD3D, MS4A1."),
    ("concealing it", "I must not mention what stands below. CD3D, MS4A1."),
    ("concealing it", "I pretend to find it from the genes. CD3D, MS4A1."),
    ("the correct answer", "The expected labels are as follows. CD3D, MS4A1."),
    ("the correct answer", "CD3D, MS4A1: this is the Correct final answer."),
    ("a reference", "CD3D, MS4A1, and the ground-truth agrees."),
    ("knowing it already", "We already know it. CD3D, MS4A1."),
    ("working backwards", "CD3D and MS4A1 are consistent with the answer."),
    ("working backwards", "Since the labels are there, I reverse-engineer the markers. CD3D, MS4A1."),
    ("working backwards", "I will write reasoning that leads to it. CD3D, MS4A1."),
    ("an echo of the hint", "The reasoning of an expert who finds CD3D, MS4A1."),
    ("no argument", "T cell, B cell. Cell 1 has CD3D, cell 2 MS4A1."),
    ("no argument", "Cell 1: T cell\nCell 2: B cell\nbecause of CD3D and MS4A1."),
    ("no argument", "Cell 1 has CD3D. So T cell, and B cell is left."),
    ("no argument", "Cell 1 must be T cell, cell 2 must be B cell, as CD3D and MS4A1 say."),
]


@pytest.mark.parametrize(("kind", "reasoning"), LEAKED)
def test_a_leak_is_found(kind, reasoning):
    assert find_leak(f"<think>{reasoning}</think><answer>T cell | B cell</answer>", PUZZLE).startswith(kind)


def test_every_kind_of_leak_is_tried():
    assert set(LEAKS) | {"an echo of the hint", "no argument"} == {kind for kind, _ in LEAKED}


@pytest.mark.parametrize(
    "reasoning",
    [
        "Cell 1 has CD3D, so T cell. Cell 2 has MS4A1, so B cell.",
        "CD3D hints at a T cell in cell 1, which can be told from a B cell by it; MS4A1 hints towards one in cell 2.",
        "Given the high CD3D, cell 1 is a T cell; it is told apart by IL7R. The provided list leaves B cell (**MS4A1**).\n"
        "So: T cell | B cell",
        "The prompt lists the candidate cell types, each to be used once, and the user message gives cell 1 as ACTB, CD3D. "
        "CD3D reveals a T cell, which does not imply anything of cell 2. I should not rely on ACTB; MS4A1 is an expected marker "
        "of B cells, so the final assignment is clear, and the final answer must list the labels in order.",
        "The question is which cell is the B cell; cell 1 (CD3D) is not. We see no MS4A1. Now the assignment of cell 2.",
    ],
)
def test_an_argument_is_no_leak(reasoning):
    assert find_leak(f"<think>{reasoning}</think><answer>T cell | B cell</answer>", PUZZLE) == ""


# ---- verdicts


def test_every_rejection_has_its_reason(tmp_path, judge):
    (tmp_path / "odd.py").write_text(
        "def fn(completion, puzzle):\n    if 'raise' in completion:\n        raise KeyError(1)\n    return 0.4\n"
    )
    pairs = [
        drawn(RIGHT),
        drawn(WRONG, 1),
        drawn("T cell | B cell", 2),
        drawn("", 3, error="status 500"),
        Completion(puzzle_id="p", attempt=4, hinted=False, text=RIGHT, finish_reason="length"),
        drawn(RIGHT.replace("has", "is told to have"), 5, hinted=True),
        drawn(RIGHT, 6, hinted=True),
    ]
    verdicts = judge([(PUZZLE, completion) for completion in pairs])
    reasons = ["", "wrong_labels", "invalid_format", "endpoint_error", "truncated", "leak", ""]
    assert [v.reason for v in verdicts] == reasons and [v.accepted for v in verdicts] == [not r for r in reasons]
    assert verdicts[1].detail == "0 of 2 right" and verdicts[2].detail == "<think> occurs 0 times, not once"
    own = TraceJudge(f"{tmp_path}/odd.py:fn", accept_at=0.5)
    verdicts = own([(PUZZLE, drawn(RIGHT)), (PUZZLE, drawn("raise", 1))])
    own.accept_at = 0.3
    assert own([(PUZZLE, drawn(WRONG))])[0].accepted
    own.close()
    assert [v.reason for v in verdicts] == ["below_threshold", "reward_error"] and "KeyError" in verdicts[1].detail
    assert {"declined", "reward_timeout"} | {v.reason for v in verdicts} < set(REASONS)


def test_a_reward_that_always_fails_ends_the_run_and_a_bad_path_is_refused_by_its_option(tmp_path):
    (tmp_path / "bad.py").write_text("def fn(completion, puzzle):\n    raise KeyError(1)\n")
    own = TraceJudge(f"{tmp_path}/bad.py:fn")
    with pytest.raises(RunError, match=r"--accept .*failed on all of the first 8 responses.*KeyError"):
        own([(PUZZLE, drawn(RIGHT, attempt)) for attempt in range(8)])
    own.close()
    with pytest.raises(ValueError, match=r"^--accept nowhere:fn: cannot import"):
        TraceJudge("nowhere:fn")


# ---- the raw file and the meter

SETTINGS = {"teacher": "openai", "model": "m", "seed": 0}


def opened(path, meter=None, settings=SETTINGS, resume=False, replace=False) -> RawFile:
    return RawFile(path, settings, meter or Meter(), resume=resume, replace=replace, sync=True)


def test_a_torn_line_is_dropped_and_everything_else_is_used(tmp_path):
    path = tmp_path / "t.raw.jsonl"
    with opened(path) as raw:
        raw.append(drawn("half a pair \ud83d", prompt_tokens=5, completion_tokens=7, model="m"))
        raw.append(drawn("", 1, error="status 500"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"puzzle_id": "p", "attem')
    meter = Meter()
    with opened(path, meter, resume=True) as raw:
        assert path.read_bytes() == whole and (meter.prompt_tokens, meter.completion_tokens) == (5, 7)
        assert (
            list(raw.completions) == [("p", 0, False)] and raw.completions["p", 0, False].text == "half a pair \ud83d"
        )
        with pytest.raises(ValueError, match="another process is writing it"):
            opened(path, resume=True)


def test_a_raw_file_is_never_overwritten_by_mistake(tmp_path):
    path = tmp_path / "t.raw.jsonl"
    with pytest.raises(ValueError, match=r"--resume: there is no .*t.raw.jsonl"):
        opened(path, resume=True)
    with opened(path, settings={"teacher": "vllm"}):
        pass  # a run that was refused before its first response may be overwritten
    with opened(path) as raw:
        raw.append(drawn("bought"))
    with pytest.raises(ValueError, match="already holds responses; add --resume"):
        opened(path)
    with pytest.raises(ValueError, match="already holds responses"):
        opened(path, settings={"teacher": "embedded"}, replace=True)
    with pytest.raises(ValueError, match="--resume: model was 'm' in .*, now 'other'"):
        opened(path, settings={**SETTINGS, "model": "other"}, resume=True)
    with open(path, "a") as handle:
        handle.write("not json\n")
    with pytest.raises(ValueError, match="line 3: damaged"):
        opened(path, resume=True)
    (tmp_path / "killed.raw.jsonl").write_text('{"sett')  # before its first line was written
    with opened(tmp_path / "killed.raw.jsonl") as raw:
        assert raw.path.read_text() == json.dumps(sealed_row({"settings": SETTINGS})) + "\n"


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        '{"puzzle_id": "p", "attempt": 0, "hinted": false}',
        '{"puzzle_id": "p", "attempt": 0, "hinted": false, "text": "x", "extra": 1}',
        '{"puzzle_id": "p", "attempt": 0, "hinted": false, "text": null}',
        '{"puzzle_id": ["p"], "attempt": 0, "hinted": false, "sent": 1.0}',
        '{"settings": {"teacher": "openai"}}',
        "[" * 100_000,
    ],
    ids=lambda line: line[:80],
)
def test_a_line_that_no_run_wrote_is_named(tmp_path, line):
    path = tmp_path / "t.raw.jsonl"
    with opened(path) as raw:
        raw.append(drawn("bought"))
    with open(path, "a") as handle:
        handle.write(line + "\n")
    with pytest.raises(ValueError, match=r"t\.raw\.jsonl, line 3: damaged; remove that line"):
        opened(path, resume=True)


def test_what_a_kill_left_in_flight_counts_at_its_worst(tmp_path):
    path, named = tmp_path / "t.raw.jsonl", {"puzzle_id": "p", "hinted": False}
    with opened(path) as raw:
        raw.write({"sent": 3.0, **named, "attempt": 0})
        raw.write({"lost": 3.0, **named, "attempt": 0, "error": "no response within 1 s"})
        raw.append(drawn("answered", 0, prompt_tokens=1_000_000, completion_tokens=0))
        raw.write({"sent": 4.0, **named, "attempt": 1})
        raw.append(drawn("no usage", 1))
        raw.write({"sent": 5.0, **named, "attempt": 2})
        raw.append(drawn("", 2, error="status 500"))
        raw.write({"sent": 6.0, **named, "attempt": 3})
    meter = Meter(price_in=2.0, price_out=1.0, budget=15.0)
    with opened(path, meter, resume=True):
        pass
    assert (meter.spent, meter.lost, meter.uncounted) == (2.0 + 4.0, 3.0 + 6.0, 1)
    assert meter.fits(0.0) and not meter.fits(0.1)


def test_the_worst_case_of_a_request():
    meter = Meter(price_in=1e6, price_out=2e6)
    assert meter.worst_cost([{"content": "abc"}, {"content": "\u00e9"}], 10) == 3 + 2 + TEMPLATE_TOKENS + 20


def test_the_report_says_where_traces_are_accepted_and_why_not(judge):
    puzzles = [
        named("a", tissue="lung"),
        named("b"),
        named("c", disease="lupus"),
        named("d"),
        named("e", tissue="skin"),
    ]
    draws = Draws(puzzles, Plan(candidates=2))
    completions = [drawn(RIGHT, 0, "a"), drawn(WRONG, 0, "b"), drawn(RIGHT, 1, "b"), drawn("?", 0, "c")]
    for completion, verdict in zip(completions, judge([(PUZZLE, c) for c in completions]), strict=True):
        draws.take(completion, verdict)
    report = make_report(draws, Meter(), seed=0, settings={}, rows=2, ended="budget")
    assert report["by"]["tissue"] == {
        "blood": {"puzzles": 3, "asked": 2, "accepted": 1, "accepted_at_first": 0, "acceptance": 0.5},
        "lung": {"puzzles": 1, "asked": 1, "accepted": 1, "accepted_at_first": 1, "acceptance": 1.0},
        "skin": {"puzzles": 1, "asked": 0, "accepted": 0, "accepted_at_first": 0, "acceptance": None},
    }
    assert (report["puzzles"], report["puzzles_asked"], report["puzzles_accepted"]) == (5, 3, 2)
    assert report["acceptance"] == pytest.approx(2 / 3)
    assert report["by"]["disease"]["lupus"]["acceptance"] == 0 and report["by"]["n_cells"]["2"]["accepted"] == 2
    assert report["rejected"] == {
        "wrong_labels": {"traces": 1, "details": {"0 of 2 right": 1}},
        "invalid_format": {"traces": 1, "details": {"<think> occurs 0 times, not once": 1}},
    }
    assert "tissue lung                              1       1    100.0%    100.0%" in acceptance_table(report)
    assert "tissue skin                              1       0         -         -" in acceptance_table(report)


def test_the_table_says_what_was_spent_though_the_endpoint_counted_no_token():
    draws, meter = Draws([PUZZLE], Plan()), Meter(price_in=1.0, price_out=1.0)
    empty = make_report(draws, meter, seed=0, settings={}, rows=0, ended="")
    assert "cost" not in acceptance_table(empty) and empty["acceptance"] is None
    meter.count(None, None, worst=0.25)
    meter.lost = 0.5
    said = acceptance_table(make_report(draws, meter, seed=0, settings={}, rows=0, ended=""))
    assert "cost 0.25 (without token counts: 1, at the worst case), and at most 0.5 lost" in said


@pytest.mark.slow(1)
def test_the_command_resumes_to_the_same_files_and_replaces_what_cost_nothing(tmp_path):
    puzzles, out = tmp_path / "p.jsonl", tmp_path / "t.jsonl"
    write_puzzles(puzzles, [made_up(number) for number in range(30)])
    given = ("--puzzles", puzzles, "--out", out, "--teacher-noise", 2, "--candidates", 4)
    last = json.loads(succeed("distill", *given).splitlines()[-1])
    names = (
        "puzzles",
        "puzzles_asked",
        "traces_drawn",
        "puzzles_accepted",
        "accepted_at_first",
        "acceptance",
        "candidates",
        "seed",
    )
    assert tuple(last) == names
    rows, raw = out.read_bytes(), (tmp_path / "t.raw.jsonl").read_bytes()
    report = json.loads((tmp_path / "t.report.json").read_text())
    assert all(batch_reward(row["assistant_msg"], Puzzle.from_row(row)).total == 1.0 for row in read_rows(out))
    assert len(raw.splitlines()) == 1 + last["traces_drawn"] and last["puzzles_accepted"] == len(rows.splitlines())
    (tmp_path / "t.raw.jsonl").write_bytes(raw[: len(raw) // 2])
    succeed("distill", *given, "--resume")
    again = json.loads((tmp_path / "t.report.json").read_text())
    assert out.read_bytes() == rows and {**again, "timing": 0} == {**report, "timing": 0}
    assert sorted((tmp_path / "t.raw.jsonl").read_bytes().splitlines()) == sorted(raw.splitlines())
    assert json.loads(raw.splitlines()[0])["settings"]["prompts"] == prompts_hash(read_puzzles(puzzles))
    succeed("distill", *given, "--skip", 10, "--limit", 15, "--out", tmp_path / "some.jsonl")
    asked = {row["puzzle_id"] for row in read_rows(tmp_path / "some.raw.jsonl") if "puzzle_id" in row}
    chosen = {puzzle.id for puzzle in read_puzzles(puzzles)[10:25]}
    assert asked == chosen and read_rows(tmp_path / "some.jsonl") == [
        row for row in map(json.loads, rows.splitlines()) if row["id"] in chosen
    ]
    refused = run_command("distill", *given, "--skip", 30, "--out", tmp_path / "none.jsonl")
    assert refused.returncode == 2 and "--skip 30: " in refused.stderr and "so none is left" in refused.stderr
    succeed("distill", *given, "--seed", 1)


@pytest.mark.slow(3)
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--model", "m"], "--model needs --teacher openai or vllm, not embedded"),
        (["--hint"], "--hint needs --teacher openai or vllm, not embedded"),
        (["--teacher", "openai"], "--teacher openai needs --model"),
        (["--out", "t.txt"], "--out t.txt: name a file that ends in .jsonl or .parquet"),
        (["--teacher", "openai", "--model", "m", "--budget", 1], "--budget needs --price-in and --price-out"),
        (["--teacher", "openai", "--model", "m"], "set the environment variable OPENAI_API_KEY to its key"),
        (["--teacher", "openai", "--model", "m", "--key-env", "sk-secret"], "--key-env: give the NAME"),
        (["--teacher", "openai", "--model", "m", "--base-url", "http://me:sk-secret@h/v1"], "--base-url: write it as"),
        *(
            (["--teacher", "openai", "--model", "m", "--base-url", url], "--base-url: write it as https://HOST/v1")
            for url in ("http://localhost:80o0/v1", "http://[::1/v1", "http://h:99999/v1", "http://h/v1\n", "h:8000/v1")
        ),
        (["--teacher", "openai", "--model", "m", "--key-env", "BAD_KEY"], "--key-env BAD_KEY: its value holds a space"),
        (["--teacher", "openai", "--model", "m", "--base-url", "http://127.evil.com/v1"], "OPENAI_API_KEY to its key"),
        (["--candidates", 0], "--candidates 0: must be at least 1"),
        (["--accept", "nowhere:fn"], "--accept nowhere:fn: cannot import nowhere"),
        ([], "the embedded teacher answers batch-level puzzles only, and this file holds 'cell' ones"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_in_one_sentence(tmp_path, given, sentence):
    write_puzzles(tmp_path / "p.jsonl", convert([PUZZLE], "cell"))
    done = run_command(
        "distill",
        "--puzzles",
        tmp_path / "p.jsonl",
        "--out",
        tmp_path / "t.jsonl",
        *given,
        env={"OPENAI_API_KEY": "", "BAD_KEY": "sk-secret sk-secret"},
    )
    assert done.returncode == 2 and sentence in done.stderr and "sk-secret" not in done.stderr + done.stdout
    assert not (tmp_path / "t.raw.jsonl").exists()


@pytest.mark.parametrize("kind", ["same", "symlink", "hard link", "report"])
def test_the_puzzles_are_never_written_over(tmp_path, kind):
    puzzles = tmp_path / ("t.report.json" if kind == "report" else "p.jsonl")
    out = puzzles if kind == "same" else tmp_path / "t.jsonl"
    write_puzzles(tmp_path / "p.jsonl", [made_up(number) for number in range(8)])
    if kind == "symlink":
        out.symlink_to(puzzles)
    elif kind == "hard link":
        os.link(puzzles, out)
    elif kind == "report":
        puzzles.write_text(json.dumps(read_rows(tmp_path / "p.jsonl")))
    before, names = puzzles.read_bytes(), sorted(os.listdir(tmp_path))
    said = here("--puzzles", puzzles, "--out", out, exit_code=2)
    assert f"--out {out}: would write" in said and "name another file" in said
    assert puzzles.read_bytes() == before and sorted(os.listdir(tmp_path)) == names


def test_a_choice_among_one_is_announced(tmp_path):
    write_puzzles(tmp_path / "p.jsonl", [made_up(number) for number in range(8)])
    given = ("--puzzles", tmp_path / "p.jsonl", "--out", tmp_path / "t.jsonl", "--keep", "all", "--candidates", 6)
    assert "note: --keep all has nothing to choose from, since --stop-at 1" in here(*given)
    assert len(read_rows(tmp_path / "t.jsonl")) == 8
    assert "note: --keep" not in here(*given, "--stop-at", 0)
    assert len(read_rows(tmp_path / "t.jsonl")) > 8


def test_traces_without_their_responses_are_replaced_by_no_teacher(tmp_path):
    out = tmp_path / "traces.jsonl"
    out.write_text("paid for")
    with pytest.raises(UserError, match="is there without its responses"):
        DistillConfig(puzzles="p.parquet", out=str(out)).refuse_overwriting()


def test_a_file_of_one_line_that_is_not_ours_is_not_cut(tmp_path):
    (tmp_path / "x.raw.jsonl").write_text('{"my own": "line"}')
    for resume in (False, True):
        with pytest.raises(UserError, match="holds something else than responses"):
            RawFile(tmp_path / "x.raw.jsonl", {"teacher": "embedded"}, Meter(), resume=resume, replace=True, sync=False)
    assert (tmp_path / "x.raw.jsonl").read_text() == '{"my own": "line"}'
