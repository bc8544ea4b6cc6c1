"""Cell-level and open-ended puzzles: their bytes, their files, the way there and back, and their scores by hand."""

import dataclasses
import json
from pathlib import Path

import pytest

from data.prompts import CELL_SYSTEM_MESSAGE, OPEN_SYSTEM_MESSAGE, SYSTEM_MESSAGE
from data.puzzles import Puzzle, content_id, read_puzzles, read_rows, write_puzzles, write_rows
from data.variants import cell_level, convert, open_ended, regroup
from eval.metrics import score
from reward.cellpuzzles import batch_reward, mixed_reward, parse_response, strict_reward
from tests.helpers.commands import FIXTURES, run_command, succeed

SAMPLE = FIXTURES / "cellpuzzles_sample.jsonl"
META = {"dataset": "atlas", "donor": "D1", "n_cells": 3, "cell_ids": ["c1", "c2", "c3"]}
BATCH = Puzzle(
    id="test-7",
    context="A donor.",
    cells=[["CD3D", "IL7R"], ["MS4A1"], ["NKG7", "GNLY"]],
    candidates=["NK cell", "B cell", "T cell"],
    answer=["T cell", "B cell", "NK cell"],
    meta=META,
)
TWO = Puzzle(
    id="test-8", context="", cells=[["CD3D"], ["MS4A1"]], candidates=["B cell", "T cell"], answer=["T cell", "B cell"]
)
CELL_USER = (
    "Context: A donor. \n\nCell 1: MS4A1\n\n"
    "Match the cell above to one of the following cell types:\nNK cell\nB cell\nT cell"
)
OPEN_USER = (
    "Context: A donor. \n\nCell 1: CD3D, IL7R\nCell 2: MS4A1\nCell 3: NKG7, GNLY\n\n"
    "Name the cell type of each cell above."
)


def response(answer: str) -> str:
    return f"<think>because of the markers</think>\n<answer>{answer}</answer>"


def published() -> list[Puzzle]:
    return [Puzzle.from_row(row) for row in read_rows(SAMPLE)]


def test_a_cell_level_row_has_one_cell_all_candidates_and_one_label():
    first, second, third = cell_level(BATCH)
    assert second.to_row() == {
        "system_msg": CELL_SYSTEM_MESSAGE,
        "user_msg": CELL_USER,
        "assistant_msg": "B cell",
        "id": "test-7/cell-2",
        "dataset": "atlas",
        "donor": "D1",
        "n_cells": 3,
        "cell_ids": ["c2"],
        "batch_id": "test-7",
        "cell_index": 1,
    }
    assert second.chat() == [{"role": "system", "content": CELL_SYSTEM_MESSAGE}, {"role": "user", "content": CELL_USER}]
    assert [p.id for p in (first, third)] == ["test-7/cell-1", "test-7/cell-3"]
    assert [p.cells for p in (first, third)] == [[["CD3D", "IL7R"]], [["NKG7", "GNLY"]]]
    assert [p.answer for p in (first, third)] == [["T cell"], ["NK cell"]]
    assert {p.variant for p in (first, second, third)} == {"cell"}


def test_an_open_ended_row_has_every_cell_and_no_candidates():
    puzzle = open_ended(BATCH)
    assert puzzle.to_row() == {
        "system_msg": OPEN_SYSTEM_MESSAGE,
        "user_msg": OPEN_USER,
        "assistant_msg": "T cell | B cell | NK cell",
        "id": "test-7/open",
        **META,
        "batch_id": "test-7",
    }
    assert (puzzle.variant, puzzle.candidates) == ("open", [])


def test_the_batch_is_left_as_it_was():
    before = dataclasses.asdict(BATCH)
    cell_level(BATCH), open_ended(BATCH)
    assert dataclasses.asdict(BATCH) == before
    assert (BATCH.variant, BATCH.system_message) == ("batch", SYSTEM_MESSAGE)


def test_the_prompts_are_the_papers():
    """Table 10 word for word; appendix D shows no prompt, so there the published one without its candidates."""
    assert CELL_SYSTEM_MESSAGE == (
        "You are an expert assistant specialized in cell type annotation. You will be given the gene expression profile "
        "of a single cell from a specific donor. The top expressed genes are listed in descending order. Use both gene "
        "expression and donor context to determine the correct cell type. You will also receive a list of candidate cell "
        "types\N{EM DASH}choose the one that best fits this cell. Include your detailed reasoning within <think> and "
        "</think> tags, and provide your final answer within <answer> and </answer> tags. The final answer should be a "
        "single string with exactly one cell type."
    )
    assert OPEN_SYSTEM_MESSAGE == (
        "You are an expert assistant specialized in cell type annotation. You will be given a batch of N cells from the "
        "same donor, where each cell represents a unique cell type. For each cell, the top expressed genes are provided "
        "in descending order of expression. Using both the gene expression data and donor information, determine the "
        "correct cell type for each cell. Ensure that you consider all cells together, rather than annotating each cell "
        "individually. Include your detailed reasoning within <think> and </think> tags, and provide your final answer "
        "within <answer> and </answer> tags. The final answer should be a single string listing the assigned cell types "
        "in order, separated by ' | '."
    )


EARLIER = {
    "cell": "You are an expert assistant specialized in cell type annotation. You will be given one cell of a donor. Its "
    "top expressed genes are provided in descending order of expression.",
    "open": "You are an expert assistant specialized in cell type annotation. There is no list to choose from: name every "
    "cell type as the Cell Ontology names it.",
}


@pytest.mark.parametrize("variant", ["cell", "open"])
def test_a_row_with_an_earlier_wording_is_read_and_asked_as_it_is(tmp_path, variant):
    rows = [{**puzzle.to_row(), "system_msg": EARLIER[variant]} for puzzle in convert([BATCH], variant)]
    path = tmp_path / "old.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    puzzles = read_puzzles(path)
    assert [puzzle.variant for puzzle in puzzles] == [variant] * len(rows)
    assert [puzzle.to_row() for puzzle in puzzles] == rows
    assert {puzzle.system_message for puzzle in puzzles} == {EARLIER[variant]}
    if variant == "cell":
        answers, (whole,) = regroup([response(puzzle.answer[0]) for puzzle in puzzles], puzzles)
        assert answers == ["<think></think><answer>T cell | B cell | NK cell</answer>"]
        assert whole.system_message == SYSTEM_MESSAGE


@pytest.mark.parametrize("name", ["puzzles.parquet", "puzzles.jsonl"])
@pytest.mark.parametrize("variant", ["cell", "open"])
def test_published_rows_converted_come_back_from_a_file(tmp_path, name, variant):
    made = convert([*published(), BATCH, TWO], variant)
    write_puzzles(tmp_path / name, made)
    assert read_puzzles(tmp_path / name) == made
    assert [Puzzle.from_row(p.to_row()) for p in made] == made
    assert {p.variant for p in made} == {variant}


def test_published_rows_keep_their_context_genes_and_candidate_order():
    for row, puzzle in zip(read_rows(SAMPLE), published(), strict=True):
        head, _, candidates = row["user_msg"].partition(
            "\n\nMatch the cells above to one of the following cell types:\n"
        )
        context, _, cell_text = head.partition("\n\n")
        assert open_ended(puzzle).user_message == f"{head}\n\nName the cell type of each cell above."
        cells = cell_level(puzzle)
        assert len(cells) == len(puzzle.answer)
        for i, (cell, line) in enumerate(zip(cells, cell_text.split("\n"), strict=True)):
            genes = line.removeprefix(f"Cell {i + 1}: ")
            assert cell.user_message == (
                f"{context}\n\nCell 1: {genes}\n\nMatch the cell above to one of the following cell types:\n{candidates}"
            )
            assert cell.id == f"{content_id(row['user_msg'])}/cell-{i + 1}"


def test_a_trace_and_a_system_message_of_the_batch_are_dropped_and_its_context_tail_is_kept():
    row = read_rows(SAMPLE)[5]
    row = {**row, "system_msg": "Annotate.", "user_msg": row["user_msg"].replace(". \n\nCell 1", ".\n\nCell 1")}
    puzzle = Puzzle.from_row(row)
    assert puzzle.meta.keys() == {"system_msg", "assistant_msg", "context_tail"}
    cell, opened = cell_level(puzzle)[0], open_ended(puzzle)
    assert cell.to_row()["assistant_msg"] == puzzle.answer[0]
    assert opened.to_row()["assistant_msg"] == " | ".join(puzzle.answer)
    assert (cell.system_message, opened.system_message) == (CELL_SYSTEM_MESSAGE, OPEN_SYSTEM_MESSAGE)
    assert ".\n\nCell 1: " in cell.user_message and ".\n\nCell 1: " in opened.user_message


@pytest.mark.parametrize("made", [*cell_level(TWO), open_ended(TWO)], ids=lambda p: p.id)
def test_a_variant_with_a_trace_and_a_message_of_its_own_round_trips_without_an_id(made):
    row = {**made.to_row(), "system_msg": "Annotate.", "assistant_msg": response(" | ".join(made.answer))}
    del row["id"]
    puzzle = Puzzle.from_row(row)
    assert puzzle.to_row() == row
    assert (puzzle.answer, puzzle.variant) == (made.answer, made.variant)
    assert puzzle.id == content_id(made.user_message)


CELL_ROW, OPEN_ROW = cell_level(BATCH)[1].to_row(), open_ended(BATCH).to_row()


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {**CELL_ROW, "assistant_msg": "B cell | T cell"},
            "1 cells, 3 candidates and 2 answers: a cell-level puzzle has",
        ),
        (
            {**CELL_ROW, "user_msg": CELL_USER.replace("MS4A1\n", "MS4A1\nCell 2: CD3D\n")},
            "2 cells, 3 candidates and 1 ans",
        ),
        (
            {**CELL_ROW, "user_msg": CELL_USER.removesuffix("\nB cell\nT cell")},
            "1 cells, 1 candidates and 1 answers: a cell-level puzzle has one cell, two or more candidates and one answer",
        ),
        (
            {**CELL_ROW, "user_msg": CELL_USER.replace("the cell above", "the cells above")},
            "1 cells, 3 candidates and 1 answers: the three must be equal in number",
        ),
        (
            {**OPEN_ROW, "assistant_msg": "T cell | B cell"},
            "3 cells and 2 answers: an open-ended puzzle has one answer per cell",
        ),
        (
            {**OPEN_ROW, "user_msg": OPEN_USER + "\nB cell"},
            "the user message has no candidate list: no line 'Match the cells",
        ),
        ({**OPEN_ROW, "user_msg": OPEN_USER.replace("Cell 3", "Cell 4")}, "line 3 of the cells is not 'Cell 3: GENE"),
        ({**OPEN_ROW, "user_msg": OPEN_USER[9:]}, "the user message does not begin with 'Context:'"),
    ],
)
def test_a_malformed_variant_is_named_with_its_problem(tmp_path, row, problem):
    write_rows(tmp_path / "bad.jsonl", [BATCH.to_row(), row])
    with pytest.raises(ValueError) as error:
        read_puzzles(tmp_path / "bad.jsonl")
    assert str(error.value).startswith(f"{tmp_path / 'bad.jsonl'}, row 1: {problem}")


def test_what_is_no_batch_is_not_converted():
    cell, opened = cell_level(BATCH)[0], open_ended(BATCH)
    end = "convert the batch-level file it was made from"
    for make in (cell_level, open_ended):
        with pytest.raises(ValueError) as error:
            make(cell)
        assert str(error.value) == (
            f"puzzle test-7/cell-1 is not a batch-level puzzle (1 cells, 3 candidates, 1 answers): {end}"
        )
        with pytest.raises(ValueError, match=r"puzzle test-7/open is not a batch-level puzzle \(3 cells, 0 candidates"):
            make(opened)
        with pytest.raises(ValueError, match=r"puzzle test-8 is not a batch-level puzzle \(2 cells, 1 candidates"):
            make(dataclasses.replace(TWO, candidates=["B cell"]))
        with pytest.raises(ValueError, match="puzzle test-8 already has a column batch_id, which its variants need"):
            make(dataclasses.replace(TWO, meta={"batch_id": "x"}))
    single = dataclasses.replace(TWO, cells=[["CD3D"]], candidates=["T cell"], answer=["T cell"])
    with pytest.raises(
        ValueError, match="puzzle test-8 has a single cell, which is nothing to decompose: leave it out"
    ):
        cell_level(single)
    assert Puzzle.from_row(open_ended(single).to_row()) == open_ended(single)
    with pytest.raises(ValueError, match="puzzle test-8 has 1 cell_ids for 2 cells: give one per cell"):
        cell_level(dataclasses.replace(TWO, meta={"cell_ids": ["c1"]}))


def test_convert_refuses_an_unknown_variant_and_an_id_twice():
    with pytest.raises(ValueError, match="variant 'batch': choose one of cell, open"):
        convert([BATCH], "batch")
    for variant in ("cell", "open"):
        with pytest.raises(ValueError, match="puzzle test-7 occurs 2 times: keep it once, or give each its own id"):
            convert([BATCH, TWO, BATCH], variant)
    assert [p.id for p in convert([BATCH, TWO], "open")] == ["test-7/open", "test-8/open"]
    assert [p.meta["cell_index"] for p in convert([BATCH, TWO], "cell")] == [0, 1, 2, 0, 1]


def test_one_label_is_a_valid_answer_to_one_cell_and_needs_no_bar():
    cell = cell_level(BATCH)[1]
    assert parse_response(response("B cell"), 1).labels == ["B cell"]
    for text, batch, mixed, strict in [
        (response(" b  CELL\n"), 1, 1, 1),
        (response("T cell"), 0, 0, 0),
        (response("B cell | T cell"), -1, -1, -1),
        (response("B cell |"), -1, -1, -1),
        (response(" "), -1, -1, -1),
        ("B cell", -1, -1, -1),
    ]:
        assert [fn(text, cell).total for fn in (batch_reward, mixed_reward, strict_reward)] == [batch, mixed, strict], (
            text
        )


def test_an_open_ended_answer_is_right_when_it_has_the_gold_labels():
    puzzle = open_ended(BATCH)
    for text, batch, mixed, strict in [
        (response("T cell | b cell | NK cell"), 1, 1, 1),
        (response("T cell | B cell | natural killer cell"), 0, 1 / 3, 0),  # another name of it is not the gold label
        (response("T cell | T cell | NK cell"), 0, 1 / 3, -1),
        (response("T cell | B cell"), -1, -1, -1),
    ]:
        rewards = [fn(text, puzzle).total for fn in (batch_reward, mixed_reward, strict_reward)]
        assert rewards == pytest.approx([batch, mixed, strict]), text


def test_metrics_of_both_variants_by_hand():
    cells = [*cell_level(BATCH), *cell_level(TWO)]
    texts = [response("T cell"), response("T cell"), "NK cell", response("T cell"), response("B cell")]
    metrics = score(texts, cells, token_lengths=[10, 20, 30, 40, 50])
    assert metrics.cell_accuracy == metrics.cell_accuracy_micro == metrics.batch_accuracy == pytest.approx(3 / 5)
    assert metrics.format_validity == metrics.uniqueness == pytest.approx(4 / 5)
    assert (metrics.response_length, metrics.n_puzzles) == (30.0, 5)

    metrics = score(
        [response("T cell | T cell | a"), response("T cell | B cell")], [open_ended(BATCH), open_ended(TWO)]
    )
    assert metrics.cell_accuracy == pytest.approx((1 / 3 + 1) / 2)
    assert metrics.cell_accuracy_micro == pytest.approx(3 / 5)
    assert metrics.uniqueness == pytest.approx((2 / 3 + 1) / 2)
    assert (metrics.batch_accuracy, metrics.format_validity) == (0.5, 1.0)


def test_regroup_gives_one_answer_per_batch_in_cell_order_and_the_batches_back():
    cells = [*cell_level(BATCH), *cell_level(TWO)]
    texts = [response(" T cell "), response("B cell"), response("NK cell"), response("T cell"), response("T cell")]
    shuffled = [4, 2, 0, 3, 1]
    answers, batches = regroup([texts[i] for i in shuffled], [cells[i] for i in shuffled])
    assert batches == [TWO, BATCH]
    assert answers == [
        "<think></think><answer>T cell | T cell</answer>",
        "<think></think><answer>T cell | B cell | NK cell</answer>",
    ]
    metrics = score(answers, batches)
    assert (metrics.cell_accuracy, metrics.batch_accuracy, metrics.format_validity) == (0.75, 0.5, 1.0)
    assert metrics.cell_accuracy_micro == pytest.approx(4 / 5)
    assert metrics.uniqueness == pytest.approx((0.5 + 1.0) / 2)
    assert regroup([], []) == ([], [])


def test_regrouped_published_batches_are_the_published_ones(tmp_path):
    batches = published()[:5]  # the test rows, which have bare answers
    write_puzzles(tmp_path / "cells.parquet", convert(batches, "cell"))
    cells = read_puzzles(tmp_path / "cells.parquet")
    answers, whole = regroup([response(cell.answer[0]) for cell in cells], cells)
    assert whole == batches
    assert [puzzle.to_row() for puzzle in whole] == read_rows(SAMPLE)[:5]
    assert score(answers, whole).batch_accuracy == 1.0


def test_an_invalid_cell_makes_its_batch_invalid_or_is_wrong_by_itself():
    cells = [*cell_level(BATCH), *cell_level(TWO)]
    texts = [response("T cell"), "B cell", response("NK cell"), response("T cell"), response("B cell")]
    answers, batches = regroup(texts, cells)
    assert answers[0] == "<think></think><answer>T cell |  | NK cell</answer>"
    assert parse_response(answers[0], 3).problem == "label 2 of the answer is empty"
    metrics = score(answers, batches)  # 0 of 3 and 2 of 2 right
    assert (metrics.cell_accuracy, metrics.batch_accuracy, metrics.format_validity) == (0.5, 0.5, 0.5)
    assert (metrics.cell_accuracy_micro, metrics.uniqueness) == (pytest.approx(2 / 5), 0.5)

    answers, batches = regroup(texts, cells, invalid_label="no valid answer")
    assert answers[0] == "<think></think><answer>T cell | no valid answer | NK cell</answer>"
    metrics = score(answers, batches)  # 2 of 3 and 2 of 2 right
    assert metrics.cell_accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert metrics.cell_accuracy_micro == pytest.approx(4 / 5)
    assert (metrics.batch_accuracy, metrics.format_validity) == (0.5, 1.0)


@pytest.mark.parametrize(
    "text",
    [
        response("T cell"),
        "  \n" + response("T cell") + "\n\n",
        response("T\ncell"),
        response("T cell").replace("\n", ""),
        "",
        "T cell",
        response(""),
        response("  "),
        response("T cell | B cell"),
        response("T cell |"),
        response("|"),
        "sure: " + response("T cell"),
        response("T cell") + " done",
        response("T cell").replace("markers", "<answer>"),
        response("<think>T cell"),
        "<answer>T cell</answer><think></think>",
        response("T cell").replace("</answer>", ""),
        response("T cell") * 2,
        response("T cell").upper(),
    ],
)
def test_regroup_judges_a_cell_as_the_reward_does(text):
    answers, _ = regroup([text, response("B cell")], cell_level(TWO))
    parsed = parse_response(text, 1)
    assert answers == [f"<think></think><answer>{''.join(parsed.labels)} | B cell</answer>"]
    assert parse_response(answers[0], 2).valid == parsed.valid


def test_regroup_names_what_is_missing_or_strange():
    cells = cell_level(BATCH)
    text = response("T cell")

    def problem(puzzles: list[Puzzle]) -> str:
        with pytest.raises(ValueError) as error:
            regroup([text] * len(puzzles), puzzles)
        return str(error.value)

    end = "regroup the cells of one file, each once"
    assert problem([*cell_level(TWO), cells[1]]) == (
        "batch test-7: 2 of its 3 cells have no prediction (cell-1, cell-3): answer every cell of a batch"
    )
    assert problem([*cells, cells[2]]) == f"batch test-7: cell-3 comes twice or is none of it: {end}"
    far = dataclasses.replace(cells[0], meta=cells[0].meta | {"cell_index": 9})
    assert problem([*cells, far]) == f"batch test-7: cell-10 comes twice or is none of it: {end}"
    other = dataclasses.replace(cells[0], context="Another donor.")
    assert problem([other, *cells[1:]]) == f"batch test-7: its cells differ in context or candidates: {end}"
    for puzzle in (BATCH, open_ended(BATCH), dataclasses.replace(cells[0], meta={"batch_id": "test-7"})):
        assert problem([puzzle]).startswith(f"puzzle {puzzle.id} is not a cell of a batch (one cell, with the columns")
    with pytest.raises(ValueError, match="1 predictions for 3 puzzles: give one prediction per puzzle"):
        regroup([text], cells)


@pytest.mark.parametrize(("variant", "suffix"), [("cell", ".parquet"), ("open", ".jsonl")])
def test_the_command_writes_a_variant_and_says_how_many(tmp_path, variant, suffix):
    write_puzzles(tmp_path / "batches.parquet", [BATCH, TWO])
    out = tmp_path / f"new/{variant}{suffix}"
    printed = succeed("variant", "--puzzles", tmp_path / "batches.parquet", "--variant", variant, "--out", out)
    counts = {
        "cell": "5 cell-level puzzles, 5 cells of 2 batches",
        "open": "2 open-ended puzzles, 5 cells of 2 batches",
    }
    assert printed == f"{out}: {counts[variant]}\n"
    assert read_puzzles(out) == convert([BATCH, TWO], variant)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_the_evaluation_command_scores_cell_level_answers(tmp_path):
    write_puzzles(tmp_path / "cells.parquet", cell_level(BATCH))
    rows = [{"id": f"test-7/cell-{i}", "prediction": response("T cell")} for i in (3, 2, 1)]
    write_rows(tmp_path / "answers.jsonl", rows)
    printed = succeed(
        "evaluate",
        "--puzzles",
        tmp_path / "cells.parquet",
        "--predictions",
        tmp_path / "answers.jsonl",
        "--out",
        tmp_path / "scores",
    )
    assert '"cell_accuracy": 0.3333333333333333' in printed and '"format_validity": 1.0' in printed


def test_the_command_names_the_users_mistake(tmp_path):
    file = tmp_path / "cells.parquet"
    write_puzzles(file, cell_level(BATCH))
    kept = file.read_bytes()

    def refusal(variant: str, out: Path) -> str:
        done = run_command("variant", "--puzzles", file, "--variant", variant, "--out", out)
        assert (done.returncode, done.stdout) == (2, "")
        return done.stderr

    assert refusal("cell", tmp_path / "a.jsonl") == (
        f"Error: --puzzles {file}: puzzle test-7/cell-1 is not a batch-level puzzle (1 cells, 3 candidates, 1 answers): "
        "convert the batch-level file it was made from\n"
    )
    assert f"--out {tmp_path / 'a.csv'}: name a file that ends in .parquet or .jsonl" in refusal(
        "cell", tmp_path / "a.csv"
    )
    assert f"--out {file}: is the --puzzles file; name another" in refusal("open", file)
    assert "'single' is not one of 'cell', 'open'" in refusal("single", tmp_path / "a.jsonl")
    assert file.read_bytes() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["cells.parquet"]


def test_cell_ids_that_are_no_list_and_columns_of_two_kinds_are_named(tmp_path):
    rows = [{**BATCH.to_row(), "cell_ids": 5}]
    write_rows(tmp_path / "ids.jsonl", rows)
    done = run_command(
        "variant", "--puzzles", tmp_path / "ids.jsonl", "--variant", "cell", "--out", tmp_path / "a.jsonl"
    )
    assert done.returncode == 2 and "puzzle test-7 has 5 cell_ids for 3 cells: give one per cell" in done.stderr
    rows = [{**BATCH.to_row(), "age": 5}, {**TWO.to_row(), "age": "five"}]
    write_rows(tmp_path / "age.jsonl", rows)
    done = run_command(
        "variant", "--puzzles", tmp_path / "age.jsonl", "--variant", "open", "--out", tmp_path / "a.parquet"
    )
    assert done.returncode == 2 and "column 'age' cannot be stored as parquet" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "a.parquet").exists()
