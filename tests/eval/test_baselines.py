"""Baselines on puzzles small enough to answer by hand."""

import random

import numpy as np
import pytest

from data.atlas.markers import read_markers
from data.puzzles import Puzzle
from data.variants import cell_level, open_ended
from eval.baselines import BASELINES, Profiles, answer, cautions, each_by_itself, known_markers, one_to_one, overlap
from eval.metrics import score, score_one

TABLE = {"a cell": ["A1", "A2", "SHARED"], "b cell": ["B1", "SHARED"]}


def puzzle(cells: list[list[str]], labels: list[str], name: str = "p", candidates: list[str] | None = None) -> Puzzle:
    return Puzzle(id=name, context="c", cells=cells, candidates=candidates or sorted(labels), answer=labels)


def labels_of(name: str, one: Puzzle, train: list[Puzzle] | None = None, seed: int = 0) -> list[str]:
    rows, _ = answer(name, [one], seed, train)
    assert rows[0]["id"] == one.id
    scored = score_one(rows[0]["prediction"], one)
    assert scored.valid
    return scored.labels


def test_random_is_right_in_one_of_n_cells_and_one_of_n_factorial_batches():
    names = ["a", "b", "c", "d"]
    puzzles = []
    for i in range(3000):
        labels = random.Random(i).sample(names, 4)
        puzzles.append(puzzle([["G"]] * 4, labels, f"p{i}", candidates=names))
    metrics = score([row["prediction"] for row in answer("random", puzzles, 0)[0]], puzzles)
    assert metrics.cell_accuracy == pytest.approx(1 / 4, abs=4 * (0.25 * 0.75 / 9000) ** 0.5)  # 4 standard errors or so
    assert metrics.batch_accuracy == pytest.approx(1 / 24, abs=4 * (23 / 24**2 / 3000) ** 0.5)
    assert metrics.uniqueness == 1.0


def test_random_depends_on_the_seed_and_the_puzzle_alone():
    puzzles = [puzzle([["G"]] * 9, list("abcdefghi"), f"p{i}") for i in range(3)]
    first, _ = answer("random", puzzles, 0)
    assert answer("random", puzzles[::-1], 0)[0] == first[::-1]
    assert answer("random", puzzles, 1)[0] != first and first[0]["prediction"] != first[1]["prediction"]


def test_overlap_counts_markers_and_the_hungarian_method_takes_the_largest_sum():
    cells = [["A1", "SHARED", "A2", "X"], ["SHARED", "A1", "B1"]]
    assert overlap(puzzle(cells, ["a cell", "b cell"]), TABLE).tolist() == [[3.0, 1.0], [2.0, 2.0]]
    # greedily the first cell would take column 1 (4); the largest sum is 3 + 3
    assert one_to_one(np.array([[3.0, 4.0], [1.0, 3.0]])) == [0, 1]
    assert one_to_one(np.array([[1.0, 5.0], [4.0, 6.0]])) == [1, 0] and each_by_itself(
        np.array([[1.0, 5.0], [4.0, 6.0]])
    ) == [1, 1]


def test_markers_of_the_table_name_their_cells():
    table = read_markers()
    names = list(table)[:6]
    assert labels_of("markers", puzzle([list(table[name].markers) for name in names], names)) == names


def test_markers_of_a_label_that_the_table_lacks_are_learned_from_training():
    train = [puzzle([["MS4A1", "CD79A", "RPL3"], ["ODD1", "ODD2", "RPL3"]], ["B cell", "odd cell"])] * 3
    assert {"ODD1", "ODD2"} <= set(known_markers(train)["odd cell"])
    # a label of the table that the puzzles write with other capitals keeps the table's genes
    capitals = [
        Puzzle(id="c", context="x", cells=[["ACTB"], ["LYZ"]], candidates=["B Cell", "T"], answer=["B Cell", "T"])
    ]
    assert known_markers(capitals)["b cell"] == known_markers([])["b cell"] and "t" in known_markers(capitals)
    one = puzzle([["RPL3", "ODD2"], ["MS4A1", "CD79A"]], ["odd cell", "B cell"])
    assert answer("markers", [one], 0, train)[1] == []
    assert labels_of("markers", one, train) == ["odd cell", "B cell"]
    assert "odd cell" in answer("markers", [one], 0)[1]  # and without training nothing is known of it


def test_profiles_by_hand():
    # weights of a cell of 2 genes are 1 and 1/2
    train = [puzzle([["A", "B"], ["C", "A"]], ["a", "c"]), puzzle([["B", "A"], ["C", "D"]], ["A ", "c"])]
    profiles = Profiles(train)
    assert list(profiles.genes) == ["A", "B", "C", "D"] and list(profiles.types) == ["a", "c"]
    a, c = np.array([0.75, 0.75, 0.0, 0.0]), np.array([0.25, 0.0, 1.0, 0.25])
    np.testing.assert_allclose(profiles.profiles, [a / np.linalg.norm(a), c / np.linalg.norm(c)], rtol=1e-12)
    found = profiles.similarity(puzzle([["A", "B"], ["NEW", "C"], ["NEW"]], ["a", "c", "other"]))
    cell = np.array([1.0, 0.5, 0.0, 0.0])
    first = [
        cell @ a / np.linalg.norm(cell) / np.linalg.norm(a),
        cell @ c / np.linalg.norm(cell) / np.linalg.norm(c),
        0.0,
    ]
    np.testing.assert_allclose(found[0], first, rtol=1e-12)
    np.testing.assert_allclose(found[1], [0.0, 1.0 / np.linalg.norm(c), 0.0], rtol=1e-12)
    assert found[2].tolist() == [0.0, 0.0, 0.0]


def test_nearest_repeats_a_label_where_its_assignment_may_not():
    train = [puzzle([["A", "B"], ["C", "D"]], ["a", "c"])]
    one = puzzle([["A", "B"], ["A", "C"]], ["a", "c"])  # the second cell is nearer to a, and c is left for it
    assert labels_of("nearest", one, train) == ["a", "a"]
    assert labels_of("nearest-assigned", one, train) == ["a", "c"]


def test_ties_fall_by_chance_and_not_by_the_order_of_cells_and_candidates():
    """Candidates in the order of the cells, and nothing known: no better than chance."""
    puzzles = [puzzle([["?"]] * 5, list("vwxyz"), f"p{i}", candidates=list("vwxyz")) for i in range(1000)]
    train = [puzzle([["A"]], ["a"])]
    for name in BASELINES:
        metrics = score([row["prediction"] for row in answer(name, puzzles, 0, train)[0]], puzzles)
        assert metrics.cell_accuracy == pytest.approx(0.2, abs=0.03), name


def test_a_cell_alone_gets_one_of_the_candidates():
    train = [puzzle([["A", "B"], ["C", "D"]], ["a", "c"])]
    alone = cell_level(puzzle([["A", "B"], ["A", "C"]], ["a", "c"]))
    for name in ("nearest", "nearest-assigned"):
        assert [labels_of(name, cell, train) for cell in alone] == [["a"], ["a"]]


def test_what_a_baseline_cannot_do_is_said():
    one = puzzle([["A"]] * 2, ["a", "c"])
    with pytest.raises(
        ValueError, match="--baseline nearest: learns from training puzzles; name their file with --train"
    ):
        answer("nearest", [one], 0)
    with pytest.raises(ValueError, match="p/open has no candidates"):
        answer("random", [open_ended(one)], 0)
    with pytest.raises(ValueError, match="--baseline best: choose one of random, markers, nearest, nearest-assigned"):
        answer("best", [one], 0)
    assert answer("nearest", [one], 0, [puzzle([["A"]], ["a"])])[1] == ["c"]


def test_training_puzzles_that_leak_and_genes_that_nobody_knows_are_said():
    genes = [f"G{i}" for i in range(40)]
    train = [puzzle([genes[:20], genes[20:]], ["a", "c"], "t")]
    leaking = [puzzle([genes[:20], [f"X{i}" for i in range(20)]], ["a", "c"])]
    for name in ("nearest", "nearest-assigned", "markers"):
        said = " ".join(cautions(name, leaking, train))
        assert "the training puzzles leak into these" in said and "a cell that --train has too: 1 distinct cell" in said
    assert (
        cautions("random", leaking, train) == []
        and cautions("nearest", [puzzle([["G1"], ["G2"]], ["a", "c"])], train) == []
    )
    names = list(read_markers())[:2]
    human = puzzle([list(read_markers()[name].markers) for name in names], names)
    mouse = puzzle([[gene.capitalize() for gene in cell] for cell in human.cells], names)
    (said,) = cautions("markers", [mouse], None)
    assert "2 of 2 cells list no gene that baseline markers knows" in said and "another species" in said
    assert cautions("markers", [human], None) == []
    assert "2 of 2 cells list no gene" in cautions("nearest", [mouse], train)[0]
