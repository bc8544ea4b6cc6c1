"""The CellPuzzles rewards and the import-path loader."""

import asyncio
import json
import math
import re
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import UserError
from data.puzzles import Puzzle, read_puzzles
from eval.metrics import score_one
from reward import Reward, Status, as_reward, load_reward
from reward.adapters import adapt, score_plain
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
    for reward, right in ((batch_reward, batch), (mixed_reward, batch), (strict_reward, strict)):
        found = reward(text, PUZZLE)
        assert (found.status is Status.INVALID_FORMAT) == (right == -1) == bool(found.message)
        assert found.parts["format_validity"] == float(batch != -1)  # two cells of one type have a valid format
        assert found.parts["batch_accuracy"] == float(batch == 1) and found.parts["cell_accuracy"] >= 0


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


SIGNATURES = """
import functools

def one(completion): return 1.0
def three(completion, puzzle, weight): return weight
def keyword(completion, puzzle, *, weight): return 1.0
def optional(completion, puzzle, weight=1.0, **more): return weight
halved = functools.partial(three, weight=0.5)
class Judge:
    def __init__(self, completion, puzzle): pass
    def __call__(self, completion, puzzle): return 1.0
judge = Judge(None, None)
class OneArgument:
    def __call__(self, completion): return 1.0
short = OneArgument()
cached = functools.cache(one)

def passes_a_weight(fn):
    @functools.wraps(fn)
    def inner(*args, **kwargs): return fn(*args, weight=0.25, **kwargs)
    return inner

decorated = passes_a_weight(three)

def passes_on(fn):
    @functools.wraps(fn)
    def inner(*args, **kwargs): return fn(*args, **kwargs)
    return inner

def times(fn):
    @functools.wraps(fn)
    def inner(prompts, completions, **columns): return fn(completions)
    return inner

def narrows(fn):
    @functools.wraps(fn)
    def inner(completions, answer): return fn(completions, answer=answer)
    return inner

@times
def trl_opened(completions): return [1.0]
@narrows
def trl_narrowed(completions, **columns): return [1.0]
def swapped(puzzle, completion): return 1.0
def trl(prompts, completions, answer, **columns): return [1.0]
def trl_narrow(completions, donor): return [float(donor[0] == "d1")]
def trl_solution(completions, solution, **columns): return [1.0]
def trl_default(completions, solution=None): return [1.0]
def trl_position(completions, answer, /): return [1.0]
@passes_a_weight
def trl_decorated(completions, answer, weight): return [weight]
def verl(data_source, solution_str, ground_truth, extra_info=None, address=None): return 1.0
def verl_short(solution_str, ground_truth): return 1.0
def trl_usual(prompts, completions, **kwargs): return [1.0]
def any_names(completions, puzzle): return 1.0
def optional_names(completion, puzzle, completions=None, *, solution_str=None): return 1.0
partial_names = functools.partial(optional_names, solution_str="x")
@passes_on
def verl_wrapped(solution_str, ground_truth, extra_info=None): return 0.0
def trl_two(completions, ground_truth=None): return 1.0
def verl_two(solution_str, ground_truth, method="strict"): return 0.0
def verl_more(data_source, solution_str, ground_truth, extra_info, strict): return 1.0
verl_strict = functools.partial(verl_more, strict=True)
"""


@pytest.fixture(scope="module")
def signatures(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("signatures") / "mine.py"
    file.write_text(SIGNATURES)
    return str(file)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (":one", "it is called with (completion, puzzle), and takes (completion): too many positional arguments"),
        (":three", "and takes (completion, puzzle, weight): missing a required argument: 'weight'"),
        (
            ":keyword",
            "and takes (completion, puzzle, *, weight): missing a required ",
        ),  # Python says more or less of it
        (":Judge", "Judge is a class; write an instance into the file, such as `reward = Judge()`, and name that"),
        (":swapped", "takes (puzzle, completion), and is called with (completion, puzzle); swap them"),
        (":short", "and takes (completion): too many positional arguments"),
        (":cached", "and takes (completion): too many positional arguments"),
        (":trl", "for a function written for TRL write trl:FILE:trl"),
        (":verl", "for a function written for verl write verl:FILE:verl"),
        (":trl_usual", "as functions for TRL do, and is called with (completion, puzzle); write trl:FILE:trl_usual"),
        (":trl_two", "as functions for TRL do, and is called with (completion, puzzle); write trl:FILE:trl_two"),
        (":verl_two", "as functions for verl do, and is called with (completion, puzzle); write verl:FILE:verl_two"),
        (
            ":verl_wrapped",
            "as functions for verl do, and is called with (completion, puzzle); write verl:FILE:verl_wrapped",
        ),
        ("trl::trl_position", "it is called with keywords: prompts, completions, "),
        ("trl::one", "and takes (completion): got an unexpected keyword argument 'completions'"),
        ("trl::Judge", "Judge is a class"),
        (
            "verl::verl_short",
            "the keywords data_source, solution_str, ground_truth, extra_info, and takes (solution_str, ",
        ),
        ("verl::verl_short", "got an unexpected keyword argument 'data_source'"),
        ("verl::verl_more", "missing a required argument: 'strict'"),
    ],
)
def test_a_function_that_takes_other_arguments_is_refused_at_the_start(signatures, name, says):
    style, _, function = name.rpartition(":")
    path = f"{style}{signatures}:{function}"
    with pytest.raises(UserError) as caught:
        load_reward(path)
    assert str(caught.value).startswith(f"--reward {path}: ") and says.replace("FILE", signatures) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        (":optional", 1.0),
        (":halved", 0.5),
        (":judge", 1.0),
        (":decorated", 0.25),
        (":any_names", 1.0),
        (":optional_names", 1.0),
        (":partial_names", 1.0),
        ("trl::trl", 1.0),
        ("trl::trl_default", 1.0),
        ("trl::trl_decorated", 0.25),
        ("trl::trl_opened", 1.0),
        ("trl::trl_narrowed", 1.0),
        ("verl::verl", 1.0),
        ("verl::verl_strict", 1.0),
    ],
)
def test_a_function_that_can_be_called_is_not_refused(signatures, name, total):
    style, _, function = name.rpartition(":")
    assert as_reward(load_reward(f"{style}{signatures}:{function}")("abc", PUZZLE)).total == total


def test_a_column_that_no_puzzle_has_is_named_with_those_there_are(signatures):
    donor = Puzzle(id="q", context="", cells=[["A"]], candidates=["a"], answer=["a"], meta={"donor": "d1"})
    path = f"trl:{signatures}:trl_solution"
    says = (
        "it needs 'solution', and puzzle q has no such column; it has id, puzzle_id, answer, .*, assistant_msg, donor$"
    )
    with pytest.raises(UserError, match=f"^--reward {re.escape(path)}: {says}"):
        load_reward(path, [donor])
    assert re.match(says, score_plain(load_reward(path), "abc", donor, None).message)
    narrow = f"trl:{signatures}:trl_narrow"
    assert load_reward(narrow, [donor])("abc", donor).total == 1.0
    with pytest.raises(UserError, match="it needs 'donor', and puzzle p has no such column"):
        load_reward(narrow, [donor, PUZZLE])


def test_a_column_does_not_replace_what_is_scored(signatures):
    """A file that went through another program may have a column of that name."""
    path = Path(signatures).with_name("counts.py")
    path.write_text("def fn(completions, **columns): return [float(len(completions[0][0]['content']))]\n")
    donor = Puzzle(id="q", context="", cells=[["A"]], candidates=["a"], answer=["a"], meta={"completions": "old text"})
    assert load_reward(f"trl:{path}:fn", [donor])("abc", donor).total == 3.0


def in_every_style(value: object) -> list[Reward]:
    """What score_plain gives for a function that returns this: plain, as a part, for TRL, for verl, in verl's dict."""

    def trl(completions, log_metric):
        return [value]

    def verl(data_source, solution_str, ground_truth, extra_info):
        return value

    def verl_dict(data_source, solution_str, ground_truth, extra_info):
        return {"score": value}

    functions = [
        adapt("", lambda completion, puzzle: value, "x"),
        lambda completion, puzzle: Reward(total=value, parts={"part": value}),
        *(adapt(style, fn, "x") for style, fn in (("trl", trl), ("verl", verl), ("verl", verl_dict))),
    ]
    return [score_plain(fn, "abc", PUZZLE, None) for fn in functions]


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (2, 2.0),
        (True, 1.0),
        (Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(False), 0.0),
        (np.array(0.5), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (torch.tensor(1), 1.0),
        (torch.tensor([0.5]), 0.5),
    ],
)
def test_a_number_is_the_same_in_every_style(value, number):
    for reward in in_every_style(value):
        assert (reward.total, reward.message, type(reward.total)) == (number, "", float)
        assert list(reward.parts.values()) in ([], [number])


@pytest.mark.parametrize(
    "value", ["0.5", 0.5 + 0j, math.nan, np.array(math.inf), np.array([0.5, 1.0]), torch.ones(2), [0.5], b"1"]
)
def test_what_is_no_number_is_none_in_any_style(value):
    for reward in in_every_style(value):
        assert math.isnan(reward.total) and reward.status is Status.ERROR
        assert f"reward is {value!r}: return a finite number or a Reward" in reward.message


@pytest.mark.parametrize("list_of", [list, tuple, np.array, torch.tensor])
def test_trls_list_may_be_an_array(list_of):
    def fn(completions):
        return list_of([0.5])

    def several(completions):
        return list_of([0.5, 1.0])

    assert score_plain(adapt("trl", fn, "x"), "abc", PUZZLE, None).total == 0.5
    message = score_plain(adapt("trl", several, "x"), "abc", PUZZLE, None).message
    assert message.startswith("a TRL-style reward returns one number per completion; for one it returned ")


def test_verls_dict_needs_a_score_and_keeps_its_numbers():
    def fn(data_source, solution_str, ground_truth, extra_info):
        numbers = {"acc": True, "share": np.float32(0.5), "pred": "T cell", "lengths": [1, 2]}
        return numbers | ({"score": 1} if solution_str == "score" else {})

    scored = adapt("verl", fn, "x")
    assert score_plain(scored, "score", PUZZLE, None).parts == {"acc": 1.0, "share": 0.5}
    message = score_plain(scored, "none", PUZZLE, None).message
    assert (
        message == "a verl-style reward returns a number or a dict with 'score'; its dict has acc, share, pred, lengths"
    )


def test_a_future_that_nothing_completes_is_an_error_at_once():
    loop = asyncio.new_event_loop()
    future, done = loop.create_future(), loop.create_future()
    done.set_result(0.5)
    verl = lambda data_source, solution_str, ground_truth, extra_info: future  # noqa: E731
    for fn in (lambda completion, puzzle: future, adapt("verl", verl, "x")):
        message = score_plain(fn, "abc", PUZZLE, 5.0).message
        assert message.startswith("the reward returned an asyncio Future of an event loop that does not run: write ")
    assert score_plain(lambda completion, puzzle: done, "abc", PUZZLE, 5.0).total == 0.5
    loop.close()
