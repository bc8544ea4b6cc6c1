"""Breakdowns, k samples, decomposition and similarity of hand-made answers against numbers worked out by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from data.errors import UserError
from data.puzzles import Puzzle, write_puzzles, write_rows
from data.variants import cell_level, convert, open_ended
from eval import published
from eval.bootstrap import RESAMPLES
from eval.breakdowns import (
    average_over,
    breakdowns,
    cell_types,
    confusion_counts,
    decomposition,
    distribution,
    greedy_answers,
    interval_method,
    k_sample,
    n_batches,
    vote_confidence,
)
from eval.metrics import METRICS, answer_of, score_all, wilson_interval
from eval.similarity import LabelEncoder, similarity
from launch.evaluate import main

ABC = ["T cell", "B cell", "NK cell"]


def puzzle(labels: list[str], name: str = "p", context: str = "A donor.", **meta) -> Puzzle:
    cells = [[f"GENE{i}"] for i in range(len(labels))]
    return Puzzle(id=name, context=context, cells=cells, candidates=sorted(labels), answer=labels, meta=meta)


PUZZLES = [
    puzzle(ABC[:2], "p0", tissue="lung", disease="normal", donor="d1"),
    puzzle(ABC[:2], "p1", tissue="lung", disease="melanoma", donor="d1"),
    puzzle(
        ABC,
        "p2",
        "The cell is from a male, originating from the blood. The patient has been diagnosed with "
        "influenza. The patient is a smoker.",
    ),
    puzzle(ABC, "p3", tissue="lung", disease="melanoma", donor="d2"),
]
TEXTS = [
    answer_of(ABC[:2]),
    "no tags",
    answer_of(["T cell", "NK cell", "b  CELL"]),
    answer_of(["B cell", "T cell", "NK cell"]),
]
SCORES = score_all(TEXTS, PUZZLES, [10, 20, 30, 40])  # right: 2 of 2, 0 of 2 (invalid), 1 of 3, 1 of 3


def rows(found: dict, dimension: str) -> dict:
    return {row["value"]: row for row in found[dimension]}


def test_groups_by_hand():
    found = breakdowns(SCORES, PUZZLES, 0)
    by_n = rows(found, "n_cells")
    assert list(by_n) == [2, 3]
    assert (by_n[2]["cell_accuracy"], by_n[2]["batch_accuracy"], by_n[2]["format_validity"]) == (0.5, 0.5, 0.5)
    assert (by_n[2]["n_puzzles"], by_n[2]["cells"], by_n[2]["response_length"]) == (2, 4, 15.0)
    assert by_n[3]["cell_accuracy_micro"] == pytest.approx(2 / 6) and by_n[2]["intervals"]["cell_accuracy"] == [
        0.0,
        1.0,
    ]
    assert list(rows(found, "tissue")) == ["lung", "blood"]  # most puzzles first; blood is read from the context
    assert rows(found, "tissue")["blood"]["cell_accuracy"] == pytest.approx(1 / 3)
    by_disease = rows(found, "disease")
    assert list(by_disease) == ["melanoma", "influenza", "normal"]
    assert by_disease["melanoma"]["cell_accuracy"] == pytest.approx(1 / 6)
    assert by_disease["melanoma"]["cell_accuracy_micro"] == pytest.approx(1 / 5)
    assert {name: row["n_puzzles"] for name, row in rows(found, "donor").items()} == {"d1": 2, "d2": 1, "not stated": 1}
    assert json.loads(json.dumps(found, allow_nan=False))["n_cells"][0]["value"] == 2


def test_cells_of_one_batch_have_no_interval():
    """The bootstrap draws batches: three cell-level puzzles of one batch would all be drawn, or none."""
    batches = [puzzle(ABC, f"b{i}", context=f"Donor {i}.", donor=donor) for i, donor in enumerate((0, "d1", "d1"))]
    cells = convert(batches, "cell")
    texts = [answer_of([one.answer[0] if i % 3 else "x"]) for i, one in enumerate(cells)]
    found = rows(breakdowns(score_all(texts, cells), cells, 0), "donor")
    assert {name: (row["n_puzzles"], n_batches(row)) for name, row in found.items()} == {"d1": (6, 2), "0": (3, 1)}
    assert n_batches({"n_puzzles": 4}) == 4 and n_batches({"smallest": 1}) == 1
    shown = {name: published._shares(row, ["cell_accuracy"])[0] for name, row in found.items()}
    assert "to" not in shown["0"] and "to" in shown["d1"]


def test_what_no_puzzle_states_is_not_broken_down():
    plain = [puzzle(ABC, f"p{i}") for i in range(2)]
    found = breakdowns(score_all([answer_of(ABC)] * 2, plain), plain)
    assert found["tissue"] == found["disease"] == found["donor"] == [] and "disease_average" not in found
    assert len(found["n_cells"]) == 1


def test_average_over_diseases_is_unweighted_and_leaves_healthy_donors_out():
    average = breakdowns(SCORES, PUZZLES, 0)["disease_average"]
    assert sorted(average["over"]) == ["influenza", "melanoma"]
    assert average["cell_accuracy"] == pytest.approx((1 / 6 + 1 / 3) / 2)
    assert average["cell_accuracy_micro"] == pytest.approx((1 / 5 + 1 / 3) / 2)
    assert average["batch_accuracy"] == 0.0 and average["response_length"] == 30.0
    assert list(average["intervals"]) == list(METRICS)


def test_average_draws_within_each_set():
    """One set all right, one all wrong: every resample has both, so the mean is a half without any doubt."""
    right, wrong = answer_of(ABC), answer_of(ABC[1:] + ABC[:1])
    puzzles = [puzzle(ABC)] * 5
    found = average_over(
        {"one": (score_all([right] * 5, puzzles), puzzles), "two": (score_all([wrong] * 5, puzzles), puzzles)}
    )
    assert (found["batch_accuracy"], found["intervals"]["batch_accuracy"], found["smallest"]) == (0.5, [0.5, 0.5], 5)


def test_distribution_by_hand():
    found = distribution(SCORES)  # 1, 0, 1/3, 1/3
    filled = {(one["from"], one["to"]): one["batches"] for one in found["bins"] if one["batches"]}
    assert filled == {(0.0, 0.0): 1, (0.3, 0.4): 2, (1.0, 1.0): 1}
    assert found["quartiles"] == pytest.approx([0.25, 1 / 3, 0.5]) and found["mean"] == pytest.approx(5 / 12)
    tenths = score_all([answer_of(["T cell"] + ["x"] * 9)], [puzzle(["T cell", *map(str, range(9))])])
    assert [one["from"] for one in distribution(tenths)["bins"] if one["batches"]] == [0.1]  # 1 / 10 is not below 0.1


def test_confusion_counts_valid_answers_only():
    found = confusion_counts(SCORES, PUZZLES)
    assert found == {
        "B cell": {"B cell": 1, "NK cell": 1, "T cell": 1},
        "NK cell": {"B cell": 1, "NK cell": 1},
        "T cell": {"T cell": 2, "B cell": 1},
    }
    table = {row["cell_type"]: row for row in cell_types(SCORES, PUZZLES, found)}
    t_cell = table["T cell"]
    assert (t_cell["cells"], t_cell["right"], t_cell["accuracy"], t_cell["answered"]) == (4, 2, 0.5, 3)
    assert t_cell["interval"] == pytest.approx(wilson_interval(0.5, 4)) and t_cell["most_confused"] == [["B cell", 1]]
    assert table["B cell"]["most_confused"] == [["NK cell", 1], ["T cell", 1]] and list(table)[-1] == "NK cell"


def test_labels_are_counted_as_they_are_compared():
    pair = [puzzle(["T cell", "B cell"], "p"), puzzle(["t  Cell", "B cell"], "q")]
    scores = score_all([answer_of(["T CELL", "monocyte"]), answer_of(["MONOCYTE", "b cell"])], pair)
    found = confusion_counts(scores, pair)
    assert found == {"B cell": {"B cell": 1, "monocyte": 1}, "T cell": {"T cell": 1, "monocyte": 1}}
    assert [(row["cell_type"], row["cells"], row["right"]) for row in cell_types(scores, pair, found)] == [
        ("B cell", 2, 1),
        ("T cell", 2, 1),
    ]


def test_cells_put_together_both_ways():
    batches = [puzzle(ABC, "p", donor="d"), puzzle(ABC[:2], "q", donor="e")]
    cells = [cell for batch in batches for cell in cell_level(batch)]
    texts = [answer_of([label]) for label in ("T cell", "B cell", "?", "T cell", "B cell")]
    texts[2] = "NK cell"  # no tags: invalid
    scores = score_all(texts, cells, [5, 5, 5, 5, 10])
    found = decomposition(texts, cells, scores, 0)
    assert found["cell_format_validity"] == pytest.approx(4 / 5)
    spoiled, alone = found["spoiled"], found["wrong_alone"]
    assert (spoiled["n_puzzles"], spoiled["cells"], spoiled["response_length"]) == (2, 5, 6.0)
    assert (spoiled["cell_accuracy"], spoiled["format_validity"], spoiled["uniqueness"]) == (0.5, 0.5, 0.5)
    assert alone["cell_accuracy"] == pytest.approx((2 / 3 + 1) / 2) and alone["cell_accuracy_micro"] == pytest.approx(
        4 / 5
    )
    assert (alone["format_validity"], alone["batch_accuracy"]) == (found["cell_format_validity"], 0.5)
    assert alone["uniqueness"] == pytest.approx((2 / 3 + 1) / 2), "what stands for an invalid answer is no label"
    low, high = alone["intervals"]["format_validity"]
    assert low <= 4 / 5 <= high
    assert spoiled["batch_accuracy"] == 0.5
    assert [row["value"] for row in breakdowns(scores, cells)["n_cells"]] == [2, 3]  # N of the batch, not 1
    assert interval_method(cells)["batches"] == 2 and interval_method(cells)["resamples"] == RESAMPLES


def test_k_samples_by_hand():
    puzzles = [puzzle(ABC[:2], "p"), puzzle(ABC[:2], "q")]
    right, wrong = answer_of(ABC[:2]), answer_of(ABC[1::-1])
    texts = [[right, wrong, right], ["no tags", wrong, wrong]]
    samples = [score_all(of, [one] * 3, [1, 2, 3]) for of, one in zip(texts, puzzles, strict=True)]
    found = k_sample(texts, samples, puzzles, 0)
    assert (
        found["k"] == 3 and found["mean"]["batch_accuracy"] == pytest.approx(2 / 6) and found["mean"]["n_puzzles"] == 2
    )
    assert found["mean"]["format_validity"] == pytest.approx(5 / 6) and found["mean"]["response_length"] == 2.0
    passes = {k: one["value"] for k, one in found["pass_at_k"].items()}
    assert passes == {"1": pytest.approx(1 / 3), "2": pytest.approx(0.5), "3": pytest.approx(0.5)}
    assert found["pass_at_k"]["3"]["interval"] == [0.0, 1.0]
    for vote in ("majority_vote", "cell_vote"):
        assert (found[vote]["batch_accuracy"], found[vote]["format_validity"]) == (0.5, 1.0)
        assert found[vote]["response_length"] == 6.0  # a vote costs all the answers


def test_pass_at_k_of_single_cells_is_drawn_by_batches():
    """Of two batches of three cells one is all right and one all wrong: a draw of batches is 0, a half or 1."""
    cells = cell_level(puzzle(ABC, "p")) + cell_level(puzzle(ABC, "q"))
    texts = [[answer_of(one.answer) if i < 3 else "no"] * 2 for i, one in enumerate(cells)]
    samples = [score_all(of, [one] * 2, [1, 1]) for of, one in zip(texts, cells, strict=True)]
    found = k_sample(texts, samples, cells, 0)["pass_at_k"]["1"]
    assert (found["value"], found["interval"]) == (0.5, [0.0, 1.0])


def test_the_confidence_of_a_vote_by_hand():
    one, two, three = puzzle(ABC[:2], "p"), puzzle(ABC[:2], "q"), puzzle(ABC[:2], "r")
    right, wrong, half = answer_of(ABC[:2]), answer_of(ABC[1::-1]), answer_of([ABC[0], "martian"])
    # p: both cells 3 of 4, right. q: cell 1 has 2 of 2 for the right label, cell 2 has 1 of 2. r: no valid answer
    texts = [[right, right, right, wrong], [right, half, "no tags", ""], ["no tags"] * 4]
    found = vote_confidence(texts, [one, two, three], 0.75, 0)
    assert (found["threshold"], found["cells_confident"], found["cell_accuracy"]) == (0.75, 3 / 6, 1.0)
    assert (found["batches_confident"], found["batch_accuracy"]) == (pytest.approx(1 / 3), 1.0)
    everything = vote_confidence(texts, [one, two, three], 0.0, 0)
    assert everything["cells_confident"] == pytest.approx(4 / 6), "r has no label at all"
    wrongly = [[wrong, wrong, wrong, right], *texts[1:]]
    found = vote_confidence(wrongly, [one, two, three], 0.75, 0)
    assert (found["cell_accuracy"], found["batch_accuracy"]) == (pytest.approx(1 / 3), 0.0)
    nothing = vote_confidence(texts[2:], [three], 0.5, 0)
    assert nothing["cells_confident"] == 0.0 and nothing["cell_accuracy"] is None and nothing["batch_accuracy"] is None
    assert nothing["intervals"]["cell_accuracy"] is None


def test_greedy_answers_stand_beside_the_sampled_ones():
    puzzles = [puzzle(ABC[:2], "p"), puzzle(ABC[:2], "q")]
    rows = [
        {"greedy": answer_of(ABC[:2]), "greedy_tokens": 5},
        {"greedy": answer_of(ABC[1::-1]), "greedy_tokens": 7},
    ]
    found = greedy_answers(rows, puzzles, "tokens", 0)["greedy"]
    assert (found["batch_accuracy"], found["response_length"]) == (0.5, 6.0)
    words = len(answer_of(ABC[:2]).split())
    assert greedy_answers(rows, puzzles, "words", 0)["greedy"]["response_length"] == words
    assert greedy_answers([rows[0], {}], puzzles, "tokens", 0) == {}


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A small BERT with random weights and a tokenizer of its own, saved as a checkpoint is."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = ["t", "b", "nk", "cell", "monocyte", "classical", "macro", "##phage", "alveolar"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=1.0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def vector(folder, text: str) -> np.ndarray:
    """The [CLS] state of one label, embedded alone."""
    from transformers import AutoModel, AutoTokenizer

    with torch.no_grad():
        encoded = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
        state = AutoModel.from_pretrained(folder).eval()(**encoded).last_hidden_state[0, 0].double().numpy()
    return state / np.linalg.norm(state)


def test_an_encoder_embeds_each_label_once_and_alike_in_any_batch(encoder_folder):
    encoder = LabelEncoder(encoder_folder, batch=2)
    encoder.embed(["T cell", "classical monocyte", "alveolar macrophage", "t  CELL", "monocyte"])
    assert sorted(encoder.vectors) == ["alveolar macrophage", "classical monocyte", "monocyte", "t cell"]
    for label in encoder.vectors:  # padded beside others, and alone
        np.testing.assert_allclose(encoder.vectors[label], vector(encoder_folder, label), atol=2e-6)
    expected = vector(encoder_folder, "monocyte") @ vector(encoder_folder, "classical monocyte")
    assert encoder.similarity("Monocyte", "classical monocyte") == pytest.approx(expected, abs=1e-5)
    assert encoder.similarity("T cell", "t  cell") == 1.0 and abs(expected) < 0.999
    encoder.model = None  # a label that is held is not embedded again
    encoder.embed(["T cell", "monocyte"])


def test_similarity_by_hand(encoder_folder):
    gold = ["classical monocyte", "T cell"]
    puzzles = [open_ended(puzzle(gold, name)) for name in ("p", "q", "r")]
    texts = [answer_of(["monocyte", "t CELL"]), answer_of(gold), "classical monocyte | T cell"]
    near = float(vector(encoder_folder, "monocyte") @ vector(encoder_folder, "classical monocyte"))
    scores = score_all(texts, puzzles)
    encoder = LabelEncoder(encoder_folder)
    below = similarity(scores, puzzles, encoder, threshold=near + 1e-3)
    assert (below["cell_accuracy"], below["cell_accuracy_micro"], below["batch_accuracy"]) == (
        0.5,
        0.5,
        pytest.approx(1 / 3),
    )
    assert below["mean_similarity"] == pytest.approx((near + 3) / 4, abs=1e-5)  # over the valid answers' cells
    above = similarity(scores, puzzles, encoder, threshold=near - 1e-3)
    assert above["cell_accuracy"] == above["batch_accuracy"] == pytest.approx(2 / 3)
    assert above["intervals"]["batch_accuracy"] == [0.0, 1.0] and above["threshold"] == pytest.approx(near - 1e-3)
    nothing = similarity(score_all(["?"] * 3, puzzles), puzzles, encoder)
    assert nothing["mean_similarity"] is None and nothing["intervals"]["mean_similarity"] is None
    assert nothing["cell_accuracy"] == 0.0


def test_similarity_by_command(encoder_folder, tmp_path):
    gold = ["classical monocyte", "T cell"]
    puzzles = [open_ended(puzzle(gold, name)) for name in ("p", "q", "r")]
    write_puzzles(tmp_path / "open.jsonl", puzzles)
    texts = [answer_of(gold), answer_of(["NK cell", "T cell"]), answer_of(["monocyte", "T cell"])]
    rows = [{"id": p.id, "prediction": text} for p, text in zip(puzzles, texts, strict=True)]
    write_rows(tmp_path / "answers.jsonl", rows)
    arguments = ["--puzzles", "open.jsonl", "--predictions", "answers.jsonl", "--medcpt", encoder_folder, "--out", "o"]
    words = [str(tmp_path / word) if word in ("open.jsonl", "answers.jsonl", "o") else str(word) for word in arguments]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads((tmp_path / "o/metrics.json").read_text())["similarity"]
    far, near = (
        float(vector(encoder_folder, x) @ vector(encoder_folder, "classical monocyte")) for x in ("nk cell", "monocyte")
    )
    assert far < 0.8 < near and found["threshold"] == 0.8
    assert found["cell_accuracy"] == pytest.approx(5 / 6) and found["batch_accuracy"] == pytest.approx(2 / 3)
    assert found["mean_similarity"] == pytest.approx((4 + far + near) / 6, abs=1e-5)
    exact, by_similarity = (tmp_path / "o/evaluation.md").read_text().split("## By similarity of labels (Table 12)")
    assert "| Cell-o1, Table 12 (published) | 0.0 % |  | 33.7 % | 0.723 | 92.2 % | 696.9 |" in by_similarity
    assert "| 66.7 % (0.0 to 100.0) |" in by_similarity and "Table 12 (published)" not in exact


def test_similarities_of_batch_level_answers_stand_beside_those_of_the_paper(encoder_folder, tmp_path):
    write_puzzles(tmp_path / "batch.jsonl", [puzzle(["classical monocyte", "T cell"], name) for name in ("p", "q")])
    rows = [{"id": name, "prediction": answer_of(["T cell", "classical monocyte"])} for name in ("p", "q")]
    write_rows(tmp_path / "answers.jsonl", rows)
    words = [
        "--puzzles",
        tmp_path / "batch.jsonl",
        "--predictions",
        tmp_path / "answers.jsonl",
        "--medcpt",
        encoder_folder,
    ]
    done = CliRunner().invoke(main, [str(word) for word in (*words, "--out", tmp_path / "o")])
    assert done.exit_code == 0, (done.output, done.exception)
    exact, by_similarity = (tmp_path / "o/evaluation.md").read_text().split("## By similarity of labels (Table 12)")
    assert "| Cell-o1, constrained, Table 12 (published) |  |  |  | 0.918 |  |  |" in by_similarity
    assert "Cell-o1, Table 2 (published)" in exact and "constrained" not in exact


def test_a_folder_that_is_no_encoder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"--medcpt .*: no config.json there; name the folder"):
        LabelEncoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="transformers cannot load an encoder from it"):
        LabelEncoder(tmp_path)


def test_an_encoder_of_which_half_was_downloaded_is_named(encoder_folder, tmp_path):
    """safetensors and tokenizers have errors of their own."""
    for name, damaged in (("model.safetensors", lambda whole: whole[:200]), ("tokenizer.json", lambda whole: b"{}")):
        folder = Path(shutil.copytree(encoder_folder, tmp_path / name))
        assert (folder / name).is_file()
        (folder / name).write_bytes(damaged((folder / name).read_bytes()))
        with pytest.raises(UserError, match="transformers cannot load an encoder from it"):
            LabelEncoder(folder)
