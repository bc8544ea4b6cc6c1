"""Leaks between sets of puzzles: hand-counted sets, published rows, near-duplicates against brute force, exit codes."""

import json
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data.audit import audit, refuse_to_replace
from data.errors import UserError
from data.near_duplicates import near_duplicates
from data.puzzles import Puzzle, read_puzzles, write_puzzles
from tests.helpers.commands import FIXTURES, run_command

SAMPLE = FIXTURES / "cellpuzzles_sample.jsonl"


def genes(start: int, n: int = 20) -> list[str]:
    return [f"G{i}" for i in range(start, start + n)]


def puzzle(name: str, cells: list[list[str]], **meta) -> Puzzle:
    labels = [f"type {i}" for i in range(len(cells))]
    return Puzzle(id=name, context=f"Donor of {name}.", cells=cells, candidates=labels, answer=labels, meta=meta)


def stated(name: str, ids: str, donor: str, start: int) -> Puzzle:
    """A puzzle of one cell per letter of ids, with gene lists that no other start gives."""
    cells = [genes(start + 20 * i) for i in range(len(ids))]
    return puzzle(name, cells, donor=donor, source="atlas.h5ad", cell_ids=list(ids))


def only_pair(first, second, **options):
    found = audit({"train": first, "test": second}, **options)
    return found, found.pairs[0]


def test_shared_cells_donors_and_batches_are_counted_by_hand():
    train = [stated("a", "uvw", "d1", 0), stated("b", "wxy", "d2", 1000), stated("c", "uz", "d3", 2000)]
    test = [
        stated("p", "wvu", "d9", 3000),
        stated("q", "mnw", "d3", 4000),
        stated("r", "klo", "d8", 5000),
        stated("s", "pqr", "d3", 6000),
    ]
    found, pair = only_pair(train, test)
    assert (pair.shared_cells, pair.shared_by_id, pair.shared_by_list) == (3, 3, 0)  # u, v and w
    assert (pair.puzzles_with_shared_cell, pair.share_with_shared_cell) == (2, 0.5)  # p and q
    assert (pair.shared_donors, pair.puzzles_with_shared_donor) == (("d3",), 2)  # q and s
    assert (pair.same_batches, pair.same_batch_examples) == (1, ("p = a",))  # the same cells in another order
    assert pair.shared_cell_examples == ("p cell 1 = a cell 3, cell id w", "q cell 3 = a cell 3, cell id w")
    assert pair.near_duplicate_lists == 0
    assert found.leaks == (
        "1 of 4 puzzles (25.0 %) of test with the batch of cells, or the prompt, of a puzzle of train (for example p = a)",
        "2 of 4 puzzles (50.0 %) of test with a cell that train has too: 3 distinct cells, 3 by cell id, 0 same gene lists "
        "(for example p cell 1 = a cell 3, cell id w; q cell 3 = a cell 3, cell id w)",
        "2 of 4 puzzles (50.0 %) of test from a donor that train has too: 1 donor (for example d3)",
    )
    assert found.warnings == ()
    assert [(s.puzzles, s.cells, s.distinct_cells, s.donors) for s in found.splits] == [(3, 8, 6, 3), (4, 12, 11, 3)]


def test_clean_sets_have_no_finding():
    found, _ = only_pair([stated("a", "uv", "d1", 0)], [stated("b", "xy", "d2", 1000)])
    assert found.leaks == found.warnings == ()
    assert json.loads(json.dumps(found.to_dict()))["rules"] == {"min_genes": 20, "same_genes": 0.9, "same_order": 0.95}


def test_the_same_cell_id_in_another_file_is_another_cell():
    other = puzzle("b", [genes(500), genes(600)], donor="d2", source="other.h5ad", cell_ids=["u", "v"])
    assert only_pair([stated("a", "uv", "d1", 0)], [other])[0].leaks == ()


def test_a_leak_of_one_puzzle_in_thousands_is_not_0_percent():
    train = [stated("a", "uvw", "d1", 0)]
    test = [stated(str(i), (f"{i}x", f"{i}y", f"{i}z"), f"e{i}", 100 * (i + 1)) for i in range(2000)]
    found = only_pair(train, [*test, stated("q", "klm", "d1", 900_000)])[0]
    assert found.leaks == (
        "1 of 2001 puzzles (<0.1 %) of test from a donor that train has too: 1 donor (for example d1)",
    )


def test_donors_shared_on_purpose_are_a_warning():
    found, _ = only_pair([stated("a", "uv", "d1", 0)], [stated("b", "xy", "d1", 1000)], donors_apart=False)
    assert found.leaks == ()
    assert found.warnings == (
        "1 of 1 puzzle (100.0 %) of test from a donor that train has too: 1 donor (for example d1)",
    )


def test_identical_lists_tell_a_cell_only_from_20_genes_on():
    for n, shared in ((19, 0), (20, 1)):
        found, pair = only_pair([puzzle("a", [genes(0, n), genes(100)])], [puzzle("b", [genes(0, n), genes(200)])])
        assert (pair.shared_by_list, pair.shared_cells, pair.shared_by_id) == (shared, shared, None)
        assert [s.short_lists for s in found.splits] == [n < 20, n < 20]
        assert ("short lists: 1 of 2 cells of train list fewer than 20 genes" in " ".join(found.warnings)) == (n < 20)


def test_the_same_prompt_is_a_leak_however_short_its_lists():
    same = puzzle("a", [["CD3D"], ["MS4A1"]])
    found, pair = only_pair([same], [same, puzzle("b", [["CD3D"], ["NKG7"]])])
    assert (pair.same_batches, pair.shared_cells) == (1, 0)
    assert len(found.leaks) == 1


def test_the_same_batch_twice_in_a_set_is_a_warning():
    twice = [stated("a", "uv", "d1", 0), stated("b", "vw", "d1", 100), stated("c", "vu", "d1", 200)]
    found = audit({"train": twice, "one cell": [stated("x", "k", "d2", 900), stated("y", "k", "d2", 1000)]})
    assert found.leaks == ()
    assert found.splits[0].duplicate_examples == ("c",)
    assert found.splits[1].duplicate_puzzles == 0  # one cell with other candidates is another puzzle
    assert found.warnings == (
        "duplicate puzzles: 1 of 3 puzzles (33.3 %) of train with the batch of cells, or the prompt, of an earlier one "
        "(for example c)",
    )


def test_near_duplicates_at_their_bounds():
    """25 genes: distances squared may sum to 0.05 * 25 * (625 - 1) / 6 = 130. 20 genes: 19 of 21 is more than 0.9."""
    first = genes(0, 25)
    at_bound = [*first]
    at_bound[0], at_bound[8], at_bound[20], at_bound[21] = first[8], first[0], first[21], first[20]  # 64 + 64 + 1 + 1
    beyond = [*at_bound]
    beyond[23], beyond[24] = first[24], first[23]  # 132
    assert only_pair([puzzle("a", [first])], [puzzle("b", [at_bound])])[1].near_duplicate_lists == 1
    assert only_pair([puzzle("a", [first])], [puzzle("b", [beyond])])[1].near_duplicate_lists == 0
    for new, near in ((1, 1), (2, 0)):
        changed = genes(0, 20 - new) + genes(900, new)
        found, pair = only_pair([puzzle("a", [genes(0)])], [puzzle("b", [changed])])
        assert (pair.near_duplicate_lists, len(found.leaks), pair.shared_cells) == (near, near, 0)
    assert pair.near_duplicate_examples == ()


def test_a_near_duplicate_is_told_with_its_numbers():
    found, pair = only_pair([puzzle("a", [genes(0)])], [puzzle("b", [genes(500), [*genes(0, 19), "NEW"]])])
    assert pair.near_duplicate_examples == ("b cell 2 ~ a cell 1 (0.90 of the genes, rank correlation 1.000)",)
    assert found.leaks[0].startswith("1 of 1 puzzle (100.0 %) of test with a gene list that train has almost alike")


@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_are_those_of_brute_force(seed):
    """Random lists of 15 to 40 of 60 genes, and changed copies of them, all pairs by the definition with fractions."""
    rng = random.Random(seed)
    lists = [rng.sample(range(60), rng.randint(15, 40)) for _ in range(30)]
    for _ in range(90):
        copy = list(rng.choice(lists))
        for _ in range(rng.randint(0, 4)):
            i = rng.randrange(len(copy) - 1)
            copy[i], copy[i + 1] = copy[i + 1], copy[i]
        if rng.random() < 0.3:
            copy.insert(rng.randrange(len(copy)), copy.pop())
        for _ in range(rng.randint(0, 2)):
            copy.pop(rng.randrange(len(copy)))
        copy += [gene for gene in rng.sample(range(60), rng.randint(0, 2)) if gene not in copy]
        lists.append(copy)
    lists = [list(unique) for unique in dict.fromkeys(map(tuple, lists))]
    firsts, seconds = list(range(0, len(lists), 2)), list(range(len(lists) // 3, len(lists)))
    found = {
        (int(first), second): (round(float(jaccard), 9), round(float(spearman), 9))
        for second, *columns in near_duplicates([np.array(row) for row in lists], firsts, seconds)
        for first, jaccard, spearman in zip(*columns, strict=True)
    }
    expected = {}
    for first in firsts:
        for second in seconds:
            alike = likeness(lists[first], lists[second])
            if first != second and alike:
                expected[first, second] = tuple(round(float(number), 9) for number in alike)
    assert found == expected
    assert len(expected) > 10


def likeness(one: list[int], other: list[int]) -> tuple[Fraction, Fraction] | None:
    """(Jaccard, Spearman) of two lists that are near-duplicates by the definition."""
    shared = set(one) & set(other)
    jaccard = Fraction(len(shared), len(set(one) | set(other)))
    if min(len(one), len(other)) < 20 or jaccard < Fraction(9, 10):
        return None
    x, y = ([Fraction([g for g in genes if g in shared].index(g)) for g in sorted(shared)] for genes in (one, other))
    mean = Fraction(len(shared) - 1, 2)
    covariance = sum((a - mean) * (b - mean) for a, b in zip(x, y, strict=True))
    spearman = covariance / sum((a - mean) ** 2 for a in x)
    return (jaccard, spearman) if spearman >= Fraction(95, 100) else None


def test_a_long_list_meets_its_copy_in_another_set_of_lengths():
    """A gene of the second set that no first list has must not be looked up beyond the table."""
    found, pair = only_pair(
        [puzzle("a", [genes(0, 50)])], [puzzle("b", [genes(0, 48) + ["ZZ1", "ZZ2"]]), puzzle("c", [genes(2000, 50)])]
    )
    assert pair.near_duplicate_lists == 1


def test_published_rows_that_share_puzzles_and_a_cell():
    rows = read_puzzles(SAMPLE)
    borrowed = [rows[0].cells[0], *rows[7].cells[1:]]
    mixed = Puzzle(id="mixed", context="", cells=borrowed, candidates=rows[7].candidates, answer=rows[7].answer)
    found, pair = only_pair(rows[:5], [rows[3], rows[4], mixed, rows[6]])
    assert (pair.same_batches, pair.puzzles_with_shared_cell) == (2, 3)
    assert pair.shared_cells == pair.shared_by_list == len(rows[3].cells) + len(rows[4].cells) + 1
    assert pair.shared_by_id is None and pair.shared_donors is None
    assert (
        "donors not stated: all 5 puzzles of train, so donors that they share with other sets are not seen"
        in found.warnings
    )


def test_wrong_number_of_cell_ids_is_named():
    bad = puzzle("b", [genes(0), genes(50)], source="x", cell_ids=["u"])
    with pytest.raises(ValueError, match="test, puzzle b: 1 cell_ids for 2 cells"):
        audit({"test": [bad]})


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    write_puzzles(folder / "train.parquet", [stated("a", "uv", "d1", 0), stated("b", "wx", "d2", 100)])
    write_puzzles(folder / "clean.jsonl", [stated("c", "yz", "d3", 200)])
    write_puzzles(folder / "leaky.parquet", [stated("d", "uk", "d4", 300), stated("e", "lm", "d5", 400)])
    write_puzzles(folder / "other/train.parquet", [stated("f", "no", "d6", 500)])
    (folder / "text.h5ad").write_bytes(b"\x89HDF\r\n")
    return folder


def test_clean_files_exit_with_0(files):
    done = run_command("audit", files / "train.parquet", files / "clean.jsonl", files / "other/train.parquet")
    assert done.returncode == 0, done.stderr
    assert "no leak found" in done.stdout and f"{files.name}/train -> clean" in done.stdout
    assert f"{files.name}/train -> other/train" in done.stdout


def test_leaking_files_exit_with_1_and_write_what_was_found(files, tmp_path):
    words = ("audit", files / "train.parquet", files / "leaky.parquet", "--json", tmp_path / "new/audit.json")
    done = run_command(*words)
    assert done.returncode == 1, done.stderr
    assert "leak: 1 of 2 puzzles (50.0 %) of leaky with a cell that train has too" in done.stdout
    assert json.loads((tmp_path / "new/audit.json").read_text())["pairs"][0]["puzzles_with_shared_cell"] == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["audit.json"]
    assert run_command(*words, "--allow-leaks").returncode == 0


def test_the_same_file_twice_leaks_altogether(files):
    done = run_command("audit", files / "train.parquet", files / "train.parquet")
    assert done.returncode == 1
    assert (
        "leak: all 2 puzzles of train (2) with the batch of cells, or the prompt, of a puzzle of train" in done.stdout
    )
    assert "the same file is given more than once" in done.stdout


@pytest.mark.slow(1)
@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["missing.parquet"], "missing.parquet: no such file"),
        (["text.h5ad"], "text.h5ad: not a file of puzzles; give a .parquet, .jsonl or .json file"),
        (["train.parquet", "--json", "train.parquet"], "train.parquet: is a folder or a file to read"),
        (["train.parquet", "--json", "text.h5ad/x.json"], "text.h5ad/x.json: cannot be written"),
    ],
)
def test_bad_input_exits_with_2_and_one_sentence(files, words, problem):
    done = run_command("audit", *(word if word.startswith("--") else files / word for word in words))
    assert done.returncode == 2
    assert problem in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_an_empty_file_is_an_empty_set_and_meant_donors_are_a_warning(files, tmp_path):
    write_puzzles(tmp_path / "unseen.parquet", [])
    write_puzzles(tmp_path / "same.parquet", [stated("g", "pq", "d1", 700)])
    words = ("audit", files / "train.parquet", tmp_path / "same.parquet", tmp_path / "unseen.parquet")
    assert run_command(*words).returncode == 1
    done = run_command(*words, "--same-donors")
    assert done.returncode == 0 and "warning: 1 of 1 puzzle (100.0 %) of same from a donor" in done.stdout
    done = run_command("audit", tmp_path / "unseen.parquet")
    assert done.returncode == 2 and "unseen.parquet: holds no puzzle" in done.stderr


def test_without_files_the_usage_is_shown():
    assert run_command("audit").returncode == 2


@pytest.mark.slow(1)
def test_two_files_of_one_name_are_told_apart_by_their_hashes(tmp_path):
    """Two builds of other files called atlas.h5ad, whose cells have the same names."""
    for folder, start, digest in (("x", 0, "ab12"), ("y", 1000, "cd34"), ("z", 2000, "ab12")):
        name = f"{folder}-1"
        write_puzzles(tmp_path / folder / f"{folder}.parquet", [stated(name, "uvw", f"donor {folder}", start)])
        report = {"files": [{"file": "atlas.h5ad", "sha256": digest}]}
        (tmp_path / folder / "report.json").write_text(json.dumps(report))
    x, y, z = (tmp_path / name / f"{name}.parquet" for name in "xyz")
    done = run_command("audit", x, y)
    assert done.returncode == 0, done.stdout
    assert "warning: 2 different files are called atlas.h5ad (by the report.json beside the puzzles)" in done.stdout
    done = run_command("audit", x, z)
    assert done.returncode == 1 and "3 by cell id" in done.stdout and "different files" not in done.stdout
    (tmp_path / "y/report.json").unlink()  # what is not known to differ is taken for the same
    assert run_command("audit", x, y).returncode == 1
    (tmp_path / "y/report.json").write_text('{"files": ["atlas.h5ad"]}')
    assert run_command("audit", x, y).returncode == 1


def test_cell_ids_that_are_no_list_are_named(tmp_path):
    for ids in (5, "uv", {"u": 1, "v": 2}):
        bad = puzzle("b", [genes(0), genes(50)], source="x", cell_ids=ids)
        with pytest.raises(
            ValueError, match="test, puzzle b: .* cell_ids for 2 cells; remove the column or give one id"
        ):
            audit({"test": [bad]})


def test_the_report_of_a_build_is_not_replaced_by_an_audit(tmp_path):
    report = tmp_path / "report.json"
    report.write_text('{"seed": 0}')
    with pytest.raises(UserError, match="report.json: is no audit, and would be replaced; name another file"):
        refuse_to_replace(report)
    report.write_text('{"rules": {}, "splits": [], "pairs": []}')
    refuse_to_replace(report)
    refuse_to_replace(tmp_path / "new.json")
