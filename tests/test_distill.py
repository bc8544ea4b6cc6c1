"""The embedded teacher: marker tables, traces in two manners, rejection sampling."""

import random

from data.distill import GLANCE_OPENINGS, MARKERS_OPENING, TeacherConfig, distill, learned_markers, teach
from data.puzzles import Puzzle
from reward.cellpuzzles import batch_reward

TABLE = {"T cell": ["CD3D", "IL7R"], "B cell": ["MS4A1", "CD79A"]}
PUZZLE = Puzzle(
    id="p", context="", cells=[["ACTB", "CD3D", "IL7R"], ["MS4A1", "ACTB"]], candidates=["B cell", "T cell"],
    answer=["T cell", "B cell"],
)  # fmt: skip
SURE = TeacherConfig(noise=0.0, slip=0.0, bad_format=0.0, glance=0.0)


def accept(trace: str, puzzle: Puzzle) -> bool:
    return batch_reward(trace, puzzle).total == 1.0


def test_a_sure_teacher_cites_the_markers_and_is_right():
    assert teach(PUZZLE, TABLE, random.Random(0), SURE) == (
        "<think>By the markers.\nCell 1: CD3D, IL7R, so T cell\nCell 2: MS4A1, so B cell</think>\n"
        "<answer>T cell | B cell</answer>"
    )


def test_the_most_common_opening_is_the_markers_and_first_words_differ():
    """Greedy decoding after SFT takes the likeliest first token: no two openings may share it."""
    config = TeacherConfig()
    openings = [
        teach(PUZZLE, TABLE, random.Random(i), config).split("\n")[0].removeprefix("<think>") for i in range(2000)
    ]
    counts = {opening: openings.count(opening) for opening in (*GLANCE_OPENINGS, MARKERS_OPENING)}
    assert sum(counts.values()) == 2000
    assert max(counts, key=counts.get) == MARKERS_OPENING and abs(counts[MARKERS_OPENING] / 2000 - 0.22) < 0.04
    assert len({opening.split()[0] for opening in counts}) == len(counts)


def test_rejection_sampling_keeps_only_what_is_right_and_repeats_itself():
    config = TeacherConfig(noise=2.0, bad_format=0.3)
    puzzles = [Puzzle(**{**vars(PUZZLE), "id": str(i)}) for i in range(60)]
    rows, report = distill(puzzles, accept, candidates=8, seed=1, table=TABLE, config=config)
    assert all(accept(row["assistant_msg"], PUZZLE) for row in rows)
    assert report["puzzles_accepted"] == len(rows) and report["traces_drawn"] > report["puzzles"]
    assert 0 < report["accepted_at_first"] < len(rows)
    assert distill(puzzles, accept, candidates=8, seed=1, table=TABLE, config=config) == (rows, report)
    one, _ = distill(puzzles, accept, candidates=1, seed=1, table=TABLE, config=config)
    assert len(one) == report["accepted_at_first"]


def test_learned_markers_tell_the_label_and_not_one_odd_cell():
    odd = Puzzle(**{**vars(PUZZLE), "id": "odd", "cells": [["ACTB", "CD3D", "ODD1"], ["MS4A1", "ACTB"]]})
    table = learned_markers([PUZZLE] * 5 + [odd], n_markers=2)
    assert table == {"T cell": ["CD3D", "IL7R"], "B cell": ["MS4A1", "ACTB"]}
