"""Metrics of hand-made answers against numbers worked out by hand."""

import math

import pytest

from data.puzzles import Puzzle
from eval.metrics import read_steps, read_summary, score, score_one, wilson_interval


def puzzle(*answer: str) -> Puzzle:
    return Puzzle(
        id="-".join(answer),
        context="The cell is from a female donor.",
        cells=[[f"GENE{i}"] for i in range(len(answer))],
        candidates=sorted(answer),
        answer=list(answer),
    )


def answer(*labels: str) -> str:
    return f"<think>because of the markers</think>\n<answer>{' | '.join(labels)}</answer>"


FOUR = puzzle("T cell", "B cell", "NK cell", "monocyte")
TWO = puzzle("T cell", "B cell")


def test_every_metric_by_hand():
    predictions = [
        answer("T cell", "B cell", "monocyte", "NK cell"),  # 2 of 4 right, 4 distinct
        answer("T cell", "B cell"),  # 2 of 2 right, 2 distinct
        "T cell | B cell",  # no tags: invalid, 0 of 2
        answer("T cell", "T cell"),  # valid, 1 of 2 right, 1 distinct
    ]
    metrics = score(predictions, [FOUR, TWO, TWO, TWO], token_lengths=[10, 20, 30, 0])
    assert metrics.cell_accuracy == pytest.approx((0.5 + 1.0 + 0.0 + 0.5) / 4)
    assert metrics.cell_accuracy_micro == pytest.approx((2 + 2 + 0 + 1) / (4 + 2 + 2 + 2))
    assert metrics.batch_accuracy == 0.25
    assert metrics.format_validity == 0.75
    assert metrics.uniqueness == pytest.approx((1.0 + 1.0 + 0.0 + 0.5) / 4)
    assert metrics.response_length == 15.0
    assert metrics.n_puzzles == 4
    assert list(metrics.to_dict()) == [
        "cell_accuracy", "cell_accuracy_micro", "batch_accuracy", "format_validity", "uniqueness", "response_length",
        "n_puzzles",
    ]  # fmt: skip


def test_macro_and_micro_weigh_large_batches_differently():
    metrics = score([answer("T cell", "B cell", "NK cell", "monocyte"), answer("B cell", "T cell")], [FOUR, TWO])
    assert metrics.cell_accuracy == 0.5
    assert metrics.cell_accuracy_micro == pytest.approx(4 / 6)


def test_an_invalid_answer_keeps_its_cells_in_the_denominator():
    metrics = score([answer("T cell", "B cell"), "<answer>T cell</answer>"], [TWO, FOUR])
    assert metrics.cell_accuracy_micro == pytest.approx(2 / 6)
    assert (metrics.cell_accuracy, metrics.batch_accuracy, metrics.format_validity) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "prediction",
    [
        "",
        "<think>x</think>",
        answer("T cell"),
        answer("T cell", "B cell", "NK cell"),
        "<think>x</think>\n<answer>T cell | B cell</answer> and more",
        "<think>T cell | B cell\n<answer>\n</think>\n<answer>B cell | T cell</answer>",
    ],
)
def test_an_invalid_answer_scores_nothing(prediction):
    row = score_one(prediction, TWO)
    assert (row.valid, row.labels, row.right, row.n_distinct, row.batch_right) == (False, [], [False, False], 0, False)
    assert row.problem


def test_labels_compare_after_trimming_collapsing_and_case_folding():
    row = score_one(answer("  t  CELL", "b cell "), TWO)
    assert row.batch_right and row.right == [True, True]
    assert score_one(answer("T cell.", "B cell"), TWO).right == [False, True]
    assert score_one(answer("T cell", "t  cell"), TWO).n_distinct == 1


def test_length_is_tokens_when_given_else_words():
    text = answer("T cell", "B cell")  # <think>because of the markers</think> <answer>T cell | B cell</answer>
    assert score([text], [TWO]).response_length == 9.0
    assert score([text], [TWO], [123]).response_length == 123.0


def test_row_of_one_puzzle():
    row = score_one(answer("T cell", "NK cell"), TWO, token_length=7).to_dict()
    assert row["id"] == "T cell-B cell" and row["labels"] == ["T cell", "NK cell"] and row["right"] == [True, False]
    assert (row["cell_accuracy"], row["batch_accuracy"], row["uniqueness"]) == (0.5, 0.0, 1.0)


def test_unequal_or_empty_lists_are_refused():
    with pytest.raises(ValueError, match="1 predictions for 2 puzzles"):
        score(["x"], [TWO, TWO])
    with pytest.raises(ValueError, match="2 token lengths for 1 puzzles"):
        score(["x"], [TWO], [1, 2])
    with pytest.raises(ValueError, match="empty"):
        score([], [])


def test_wilson_interval_of_published_values():
    # Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), table I, method 3
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    low, high = wilson_interval(1.0, 29)
    assert math.isclose(low, 0.8830, abs_tol=5e-5) and high == pytest.approx(1.0)


def test_summary_problems_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"summary\.json: no such file; `make demo` \(launch/demo\.py\)"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json: not JSON"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(ValueError, match=r"summary\.json: must be an object"):
        read_summary(tmp_path)


def test_steps_of_a_missing_file_are_none(tmp_path):
    assert read_steps(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"note": "saved"}\n')
    assert read_steps(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
