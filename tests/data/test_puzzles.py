"""Puzzle rows: the published bytes survive a round trip, malformed rows are named."""

import dataclasses
import json
import random
import tracemalloc

import pytest

from data.errors import UserError
from data.prompts import SYSTEM_MESSAGE, normalise_label
from data.puzzles import Puzzle, content_id, of_other_steps, read_puzzles, read_rows, write_puzzles, write_rows
from tests.helpers.commands import FIXTURES

SAMPLE = FIXTURES / "cellpuzzles_sample.jsonl"
USER = (
    "Context: A donor. \n\nCell 1: CD3D, IL7R\nCell 2: MS4A1\n\n"
    "Match the cells above to one of the following cell types:\nB cell\nT cell"
)
ROW = {"system_msg": SYSTEM_MESSAGE, "user_msg": USER, "assistant_msg": "T cell | B cell"}


def test_published_rows_render_back_to_the_same_bytes():
    rows = read_rows(SAMPLE)
    assert len(rows) == 8
    for row in rows:
        puzzle = Puzzle.from_row(row)
        assert puzzle.to_row() == row
        assert puzzle.user_message == row["user_msg"]
        assert sorted(puzzle.candidates) == sorted(puzzle.answer)
        assert all(len(genes) == 50 for genes in puzzle.cells)
        assert puzzle.id == content_id(row["user_msg"])


def test_a_published_row_is_parsed_into_its_parts():
    puzzle = Puzzle.from_row(read_rows(SAMPLE)[0])
    assert puzzle.context == (
        "The cell is from a female at the 73-year-old stage, originating from the lung. The patient has been diagnosed "
        "with chronic obstructive pulmonary disease. The patient is a smoker. There is no cancer present."
    )
    assert puzzle.answer[:2] == ["smooth muscle cell", "non-classical monocyte"]
    assert puzzle.candidates == sorted(puzzle.candidates)
    assert puzzle.meta == {}


def test_a_reasoning_trace_keeps_its_text_and_gives_the_labels_of_its_answer_block():
    row = read_rows(SAMPLE)[5]
    puzzle = Puzzle.from_row(row)
    assert row["assistant_msg"].startswith("<think>")
    assert puzzle.meta["assistant_msg"] == row["assistant_msg"]
    assert row["assistant_msg"].endswith(f"<answer>{' | '.join(puzzle.answer)}</answer>")


@pytest.mark.parametrize("name", ["puzzles.parquet", "puzzles.jsonl"])
def test_round_trip_through_a_file(tmp_path, name):
    published = [Puzzle.from_row(row) for row in read_rows(SAMPLE)]
    meta = {"donor": "D1", "n_cells": 2, "cell_ids": ["c1", "c2"]}
    own = Puzzle(
        id="train-000000",
        context="A donor.",
        cells=[["CD3D", "IL7R"], ["MS4A1"]],
        candidates=["B cell", "T cell"],
        answer=["T cell", "B cell"],
        meta=meta,
    )
    write_puzzles(tmp_path / name, [*published, own])
    assert read_puzzles(tmp_path / name) == [*published, own]
    assert [path.name for path in tmp_path.iterdir()] == [name]  # no partial file is left
    assert own.to_row() == {**ROW, "id": "train-000000", **meta}


def test_a_context_without_the_published_trailing_space_is_kept():
    row = {**ROW, "user_msg": USER.replace("donor. \n", "donor.\n")}
    assert Puzzle.from_row(row).to_row() == row


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"assistant_msg": None}, "a puzzle row needs the text column(s) assistant_msg"),
        (
            {"system_msg": None},
            "system_msg (for assistant_msg also answer, as 'T cell | B cell'); its text columns are ",
        ),
        ({"user_msg": USER.replace("Match the", "Assign the")}, "the user message has no candidate list"),
        ({"user_msg": USER.replace("Context: ", "")}, "the user message does not begin with 'Context:'"),
        ({"user_msg": USER.replace("Cell 2:", "Cell 3:")}, "line 2 of the cells is not 'Cell 2: GENE, GENE, ...'"),
        ({"assistant_msg": "T cell"}, "2 cells, 2 candidates and 1 answers: the three must be equal in number"),
        ({"user_msg": USER + "\nNK cell"}, "2 cells, 3 candidates and 2 answers"),
    ],
)
@pytest.mark.parametrize("name", ["bad.parquet", "bad.jsonl"])
def test_a_malformed_row_is_named_with_its_problem(tmp_path, name, changes, problem):
    write_rows(tmp_path / name, [ROW, {**ROW, **changes}])
    with pytest.raises(ValueError) as error:
        read_puzzles(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}, row 1: ")
    assert problem in str(error.value)


def test_files_that_hold_no_puzzles_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.parquet: no such file"):
        read_puzzles(tmp_path / "missing.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.parquet: not a parquet file"):
        read_puzzles(tmp_path / "text.parquet")
    (tmp_path / "cut.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW)[:40])
    with pytest.raises(ValueError, match=r"cut\.jsonl, line 2: not JSON"):
        read_puzzles(tmp_path / "cut.jsonl")
    write_puzzles(tmp_path / "empty.parquet", [])
    with pytest.raises(ValueError, match=r"empty\.parquet: holds no puzzle"):
        read_puzzles(tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match=r"puzzles\.csv: write puzzles to a name that ends in"):
        write_puzzles(tmp_path / "puzzles.csv", [])


def test_files_that_are_no_rows(tmp_path):
    for name, text, says in (
        ("a.json", b"[1, 2]", "must be a list of rows"),
        ("b.json", b"{oops", "line 1: not JSON"),
        ("deep.json", b"[" * 100_000, "deep.json: not JSON \\(nested too deeply"),
        ("deep.jsonl", b"[" * 100_000, "line 1: not JSON \\(nested too deeply"),
        ("digits.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1: not JSON \\(Exceeds the limit"),
        ("c.jsonl", b"[]\n", "line 1: must be a row"),
        ("d.jsonl", b"\xff\xfe", "not a file of puzzles"),
    ):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(ValueError, match=says):
            read_rows(tmp_path / name)


def test_the_authors_unseen_files_call_the_answer_answer(tmp_path):
    rows = [Puzzle(id="", context="c.", cells=[["A"], ["B"]], candidates=["x", "y"], answer=["y", "x"]).to_row()]
    old = [{"answer" if key == "assistant_msg" else key: value for key, value in row.items()} for row in rows]
    (tmp_path / "melanoma.json").write_text(json.dumps(old))
    (puzzle,) = read_puzzles(tmp_path / "melanoma.json")
    assert puzzle.answer == ["y", "x"] and puzzle.to_row()["assistant_msg"] == "y | x"


def test_damaged_parquet_is_told_in_one_sentence(tmp_path):
    """Bits are flipped in the columns and in the footer. The file is read or refused, never with a traceback."""
    rows = [{**ROW, "id": str(i), "n_cells": i, "cell_ids": ["c1", "c2"]} for i in range(300)]
    write_rows(tmp_path / "a.parquet", rows)
    whole, refused = (tmp_path / "a.parquet").read_bytes(), 0
    for seed in range(120):
        rng, damaged = random.Random(seed), bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(4 if seed % 2 else len(whole) - 3000, len(whole) - 8)] ^= 1 << rng.randrange(8)
        (tmp_path / "b.parquet").write_bytes(damaged)
        try:
            read_puzzles(tmp_path / "b.parquet")
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path}/b.parquet") and "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_a_folder_is_not_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r": is a folder; name a \.parquet, \.jsonl or \.json file in it"):
        read_rows(tmp_path)


def test_metadata_that_parquet_cannot_hold_is_named(tmp_path):
    for value, other in ((1, "one"), ([1], 1), (2**70, 1), ({}, {})):
        rows = [{**ROW, "age": value}, {**ROW, "age": other}]
        with pytest.raises(ValueError, match=r"(column 'age'|the rows) cannot be stored as parquet .*write \.jsonl"):
            write_rows(tmp_path / "a.parquet", rows)
        write_rows(tmp_path / "a.jsonl", rows)
        assert [row["age"] for row in read_rows(tmp_path / "a.jsonl")] == [value, other]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_id_is_text_whatever_the_file_says(tmp_path):
    assert Puzzle.from_row({**ROW, "id": 7}).id == "7"


def test_genes_of_many_puzzles_are_one_text_each(tmp_path):
    """Half a million puzzles would hold 250 million texts."""
    puzzle = Puzzle(id="a", context="x", cells=[["CD3D", "IL7R"], ["LYZ"]], candidates=["T", "M"], answer=["T", "M"])
    write_puzzles(tmp_path / "p.jsonl", [puzzle, dataclasses.replace(puzzle, id="b")])
    first, second = read_puzzles(tmp_path / "p.jsonl")
    assert first.cells == second.cells and first.cells[0][0] is second.cells[0][0]


def test_one_row_of_a_long_file_is_read_without_the_others(tmp_path):
    """The rollouts of a long run are larger than memory."""
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps({"step": step, "ids": list(range(9000))}) + "\n" for step in range(60)))
    tracemalloc.start()
    (row,) = read_rows(path, lambda row: {"step": row["step"]} if row["step"] == 40 else None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert row == {"step": 40} and peak < path.stat().st_size


def test_the_last_answer_block_holds_the_labels():
    row = {**ROW, "assistant_msg": "<think>I write it in <answer> tags.</think><answer>T cell | B cell</answer>\n"}
    row.pop("answer", None)
    assert Puzzle.from_row(row).answer == ["T cell", "B cell"]
    with pytest.raises(UserError, match="assistant_msg has text after its <answer> block"):
        Puzzle.from_row({**row, "assistant_msg": "<think>x</think><answer>T cell | B cell</answer> So it is."})


def test_labels_that_look_the_same_are_the_same():
    """The hyphens of chat models, and characters without a width."""
    label = "CD8-positive, alpha-beta T cell"
    assert normalise_label("CD8\u2011positive, alpha\u2010beta\u200b T cell") == normalise_label(label)
    assert normalise_label("CD8 positive, alpha-beta T cell") != normalise_label(label)
    assert normalise_label("T\u2013B") != normalise_label("T-B"), "a dash looks different"


def test_rows_of_other_steps_are_not_parsed(tmp_path):
    """A checksum that is wrong is seen where its row is wanted; a line that was cut is damaged for every step."""
    path = tmp_path / "rollouts.jsonl"
    path.write_text('{"step": 1, "row_checksum": "0"}\n{"step": 2}\n')
    assert read_rows(path, glance=of_other_steps([2])) == [{"step": 1}, {"step": 2}]
    for steps in ([1], []):
        with pytest.raises(UserError, match="line 1: changed or damaged"):
            read_rows(path, glance=of_other_steps(steps))
    path.write_text('{"step": 2}\n{"step": 1, "completion": "a')
    with pytest.raises(UserError, match="line 2: not JSON"):
        read_rows(path, glance=of_other_steps([2]))
