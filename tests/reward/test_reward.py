"""The CellPuzzles rewards and the import-path loader."""

import asyncio
import json
import re
from itertools import permutations

import pytest

from data.errors import UserError
from data.puzzles import Puzzle, read_puzzles
from eval.metrics import score_one
from reward import Reward, load_reward
from reward.cellpuzzles import batch_reward, mixed_reward, normalise_label, parse_response, strict_reward
from tests.helpers.commands import FIXTURES, run_command

REAL = FIXTURES / "cellpuzzles_sample.jsonl"
PUZZLE = Puzzle(
    id="p",
    context="",
    cells=[["CD3D"], ["MS4A1"], ["NKG7"]],
    candidates=["B cell", "NK cell", "T cell"],
    answer=["T cell", "B cell", "NK cell"],
)


def response(answer: str, reasoning: str = "CD3D") -> str:
    return f"<think>{reasoning}</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("text", "batch", "mixed", "strict"),
    [
        (response("T cell | B cell | NK cell"), 1, 1, 1),
        (response(" t  CELL |b cell| nk cell "), 1, 1, 1),
        (response("T\N{NO-BREAK SPACE}cell |\tB  cell\n| NK cell"), 1, 1, 1),
        (response("T cell | NK cell | B cell"), 0, 1 / 6, 0),
        (response("B cell | T cell | NK cell."), 0, 0, 0),
        (response("T cell | T cell | NK cell"), 0, 1 / 3, -1),  # duplicates have a valid format, but are wrong
        (response("T cell | monocyte | NK cell"), 0, 1 / 3, 0),
        (response("T cell | B cell"), -1, -1, -1),
        (response("T cell | B cell | NK cell | "), -1, -1, -1),
        (response("T cell | | NK cell"), -1, -1, -1),
        ("  \n" + response("T cell | B cell | NK cell") + "\n\n", 1, 1, 1),
        ("sure: " + response("T cell | B cell | NK cell"), -1, -1, -1),
        (response("T cell | B cell | NK cell") + " done", -1, -1, -1),
        (response("T cell | B cell | NK cell", "the <answer> tag"), -1, -1, -1),
        (response("T cell | B cell | NK cell").replace("\n", ""), 1, 1, 1),
        (response("T cell | B cell | NK cell").replace("</answer>", ""), -1, -1, -1),
        ("<answer>T cell | B cell | NK cell</answer>\n<think>x</think>", -1, -1, -1),
        ("<THINK>x</THINK><answer>T cell | B cell | NK cell</answer>", -1, -1, -1),
        ("", -1, -1, -1),
    ],
)
def test_rewards_by_hand(text, batch, mixed, strict):
    assert batch_reward(text, PUZZLE).total == batch
    assert mixed_reward(text, PUZZLE).total == pytest.approx(mixed)
    assert strict_reward(text, PUZZLE).total == strict


@pytest.mark.parametrize(
    "labels", list(permutations(["M\u00fcller cell", "mu\u0308ller cell", "MU\u0308LLER  CELL"], 2))
)
def test_labels_compare_after_composition(labels):
    """NFC and NFD of a name look the same; here in every pair of answer and label, also for the rule on duplicates."""
    given, gold = labels
    puzzle = Puzzle(id="p", context="", cells=[["GLUL"], ["RHO"]], candidates=[gold, "rod"], answer=[gold, "rod"])
    assert batch_reward(response(f"{given} | rod"), puzzle).total == 1
    assert strict_reward(response(f"{given} | {gold}"), puzzle).total == -1
    assert score_one(response(f"{given} | {gold}"), puzzle).right == [True, False]
    assert score_one(response(f"{given} | {gold}"), puzzle).uniqueness == 0.5


def test_what_folding_takes_apart_is_composed_again():
    assert normalise_label("\u01f0") == normalise_label("J\u030c") == "\u01f0"


def test_the_reasoning_cannot_be_scored_instead_of_the_answer():
    """The authors' scorer reads the first line with a bar when the answer line is empty (cello1.md section 3)."""
    gamed = "<think>T cell | B cell | NK cell</think>\n<answer>\nB cell | NK cell | T cell\n</answer>"
    assert batch_reward(gamed, PUZZLE).total == 0


def test_parse_names_the_problem():
    assert parse_response(response("a | b"), 3).problem == "the answer has 2 labels for 3 cells"
    assert parse_response("x", 3).problem == "<think> occurs 0 times, not once"
    assert parse_response(response("a | b | c"), 3).labels == ["a", "b", "c"]


def test_real_rows_score_one_with_their_own_answers():
    rows = [json.loads(line) for line in REAL.read_text().splitlines()]
    for row, puzzle in zip(rows, read_puzzles(REAL), strict=True):
        own = row["assistant_msg"]
        text = own if own.startswith("<think>") else f"<think></think><answer>{own}</answer>"
        assert batch_reward(text, puzzle) == Reward(
            total=1.0, parts={"cell_accuracy": 1.0, "batch_accuracy": 1.0, "format_validity": 1.0}
        )


def test_load_reward_by_module_and_by_file(tmp_path):
    assert load_reward("reward.cellpuzzles:batch_reward") is batch_reward
    (tmp_path / "mine.py").write_text("async def shortest(completion, puzzle):\n    return -float(len(completion))\n")
    fn = load_reward(f"{tmp_path}/mine.py:shortest")
    assert asyncio.run(fn("abc", PUZZLE)) == -3.0


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("reward.cellpuzzles", "write it as module:function"),
        ("no.such.module:f", "cannot import no.such.module"),
        ("reward.cellpuzzles:bach_reward", "has no 'bach_reward'; its functions are .*batch_reward"),
        ("reward.cellpuzzles:_TAGS", "is a tuple, not a function"),
        ("nowhere.py:f", "no file nowhere.py"),
        ("trl:nowhere.py:f", "--reward trl:nowhere.py:f: no file nowhere.py"),
    ],
)
def test_load_reward_says_what_is_wrong(path, says):
    with pytest.raises(ValueError, match=says):
        load_reward(path)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import nonexistent_package_x\n", "No module named 'nonexistent_package_x'"),
        ("def fn(:\n", "invalid syntax"),
        ("table = {}['labels']\n", "KeyError: 'labels'"),
        ("value = undefined_name\n", "NameError: name 'undefined_name' is not defined"),
        ("raise ValueError('half \\ud83d,\\n two lines')\n", "ValueError: half \\ud83d, two lines)"),
        ("import sys\nsys.exit(4)\n", "it ends the program, SystemExit: 4; put what a script does under `if __name__"),
        ("import argparse\nargparse.ArgumentParser(prog='x').parse_args(['--y'])\n", "SystemExit: 2"),
        # `result` is also a file of the room reward/
        ("from .result import Reward\n", "a reward file cannot import relatively; write `from result import Reward`"),
        ("from . import helper\n", "a reward file cannot import relatively; write `import helper`"),
        ("from ..beside.helper import (\n h)\n", "cannot import relatively; write `from beside.helper import (`"),
    ],
)
def test_a_reward_file_that_fails_while_it_is_imported_is_one_sentence(tmp_path, source, says):
    file = tmp_path / "mine.py"
    file.write_text(source + "\ndef fn(completion, puzzle):\n    return 1.0\n")
    with pytest.raises(UserError, match=re.escape(f"--reward {file}:fn: cannot import {file} (")) as caught:
        load_reward(f"{file}:fn")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_reward_file_that_exits_is_refused_by_the_command(tmp_path):
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(0)\n")
    done = run_command("grpo", "--reward", f"{tmp_path}/mine.py:fn", "--dry-run")
    assert done.returncode == 2 and "cannot import" in done.stderr and "SystemExit: 0" in done.stderr


def test_an_interrupt_during_the_import_is_the_users(tmp_path):
    (tmp_path / "mine.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_reward(f"{tmp_path}/mine.py:fn")
