"""Statistics, figure and data card: hand-counted sets, published rows, reports of builds, exit codes."""

import json
import struct

import pytest

from data.card import data_card, without_folders, write_description
from data.describe import disease_of, escape, statistics_markdown, tissue_of, with_total, wrapped
from data.folder import read_report, read_splits, report_beside
from data.puzzles import Puzzle, read_puzzles, write_puzzles
from data.variants import cell_level, open_ended
from tests.helpers.commands import FIXTURES, run_command, succeed

SAMPLE = FIXTURES / "cellpuzzles_sample.jsonl"
HEALTHY = "The patient is healthy with no diagnosed disease."


def puzzle(name: str, labels: str, n_genes: int = 30, context: str = "A donor.", **meta) -> Puzzle:
    """One cell per letter of labels; its genes follow from name and letter."""
    cells = [[f"{name}{label}{i}" for i in range(n_genes)] for label in labels]
    return Puzzle(id=name, context=context, cells=cells, candidates=sorted(labels), answer=list(labels), meta=meta)


def built(name: str, labels: str, ids: str, donor: str, tissue: str, disease: str, n_genes: int = 30) -> Puzzle:
    meta = {"donor": donor, "tissue": tissue, "disease": disease, "dataset": "atlas", "source": "atlas.h5ad"}
    return puzzle(name, labels, n_genes, **meta, cell_ids=[f"c{i}" for i in ids])


TRAIN = [
    built("p", "ABC", "123", "d1", "lung", "normal"),
    built("q", "AB", "12", "d1", "lung", "melanoma"),
    built("r", "AD", "45", "d2", "blood", "melanoma || psoriasis", n_genes=40),
]
TEST = [built("s", "AB", "67", "d3", "blood", "normal"), built("t", "BA", "76", "d3", "blood", "normal")]


def section(text: str, title: str) -> list[str]:
    """The lines under a heading, without the blank ones."""
    return [line for line in text.split(f"## {title}", 1)[1].split("\n## ")[0].splitlines()[1:] if line]


def test_tables_are_those_counted_by_hand():
    text = statistics_markdown({"train": TRAIN, "test": TEST})
    assert section(text, "Diseases") == [
        "| disease | train puzzles | train cells | test puzzles | test cells | total puzzles | total cells |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| normal | 1 | 3 | 2 | 4 | 3 | 7 |",
        "| melanoma | 1 | 2 | 0 | 0 | 1 | 2 |",
        r"| melanoma \|\| psoriasis | 1 | 2 | 0 | 0 | 1 | 2 |",
        "| **all** | **3** | **7** | **2** | **4** | **5** | **11** |",
    ]
    assert section(text, "Tissues")[2:4] == ["| blood | 1 | 2 | 2 | 4 | 3 | 6 |", "| lung | 2 | 5 | 0 | 0 | 2 | 5 |"]
    assert section(text, "Cell types") == [
        "| cell type | train cells | test cells | total cells |",
        "| :--- | ---: | ---: | ---: |",
        "| A | 3 | 2 | 5 |",
        "| B | 2 | 2 | 4 |",
        "| C | 1 | 0 | 1 |",
        "| D | 1 | 0 | 1 |",
        "| **all** | **7** | **4** | **11** |",
    ]
    assert section(text, "Cells per puzzle, N")[2:4] == [
        "| 2 | 2 | 4 | 2 | 4 | 4 | 8 |",
        "| 3 | 1 | 3 | 0 | 0 | 1 | 3 |",
    ]
    assert section(text, "Genes per cell")[2:4] == ["| 30 | 5 | 4 | 9 |", "| 40 | 2 | 0 | 2 |"]
    assert section(text, "Datasets")[2] == "| atlas | 3 | 7 | 2 | 4 | 5 | 11 |"
    assert [row[:13] for row in section(text, "Donors")[2:5]] == ["| d1 | 2 | 5 ", "| d3 | 0 | 0 ", "| d2 | 1 | 2 "]


def test_the_summary_is_the_one_counted_by_hand():
    text = statistics_markdown({"train": TRAIN, "test": TEST})
    rows = dict(line.strip("| ").split(" | ", 1) for line in section(text, "Summary")[2:])
    assert rows["puzzles"] == "3 | 2 | 5"
    assert rows["cells"] == "7 | 4 | 11"
    assert rows["distinct cells"] == "5 | 2 | 7"
    assert rows["cells seen before in the split"] == "28.6 % | 50.0 % | 36.4 %"
    assert rows["duplicate puzzles"] == "0 (0.0 %) | 1 (50.0 %) | 1 (20.0 %)"  # s and t have the same two cells
    assert (rows["donors"], rows["diseases"], rows["cell types"]) == ("2 | 1 | 3", "3 | 1 | 3", "4 | 2 | 4")
    assert rows["puzzles per donor: least / median / most"] == "1 / 1.5 / 2 | 2 / 2 / 2 | 1 / 2 / 2"
    assert rows["genes per cell: least / median / most"] == "30 / 30 / 40 | 30 / 30 / 30 | 30 / 30 / 40"


def test_an_empty_split_is_a_column_of_dashes():
    text = statistics_markdown({"train": TRAIN, "unseen": []})
    assert {line.split(" | ")[2] for line in section(text, "Summary")[2:]} == {"-"}


def test_one_split_has_no_total():
    assert section(statistics_markdown({"test": TEST}), "Cell types")[0] == "| cell type | test cells |"


def test_published_rows_say_tissue_and_disease_in_their_context():
    rows = read_puzzles(SAMPLE)
    assert (tissue_of(rows[0]), disease_of(rows[0])) == ("lung", "chronic obstructive pulmonary disease")
    text = statistics_markdown({"published": rows})
    assert section(text, "Tissues")[2:4] == ["| lung | 4 | 39 |", "| bone marrow | 1 | 10 |"]
    assert "| normal | 1 | 10 |" in section(text, "Diseases")
    assert section(text, "Donors") == ["No row states its donor."]
    assert section(text, "Datasets") == ["No row states its dataset."]


@pytest.mark.parametrize(
    ("context", "tissue", "disease"),
    [
        (f"The cell is from a male, originating from the blood. {HEALTHY}", "blood", "normal"),
        ("The cell is from, originating from the vena cava sup. of St. Luke", "vena cava sup", "not stated"),
        ("The cell is from, originating from the lung The patient is a smoker.", "lung", "not stated"),
        (
            "The cell is from a male. The patient has been diagnosed with acute kidney injury, type 1.5. The patient is a "
            "smoker.",
            "not stated",
            "acute kidney injury, type 1.5",
        ),
        ("A donor.", "not stated", "not stated"),
    ],
)
def test_contexts_are_read(context, tissue, disease):
    row = puzzle("x", "AB", context=context)
    assert (tissue_of(row), disease_of(row)) == (tissue, disease)


def test_columns_win_over_the_context():
    row = puzzle("x", "AB", context=f"It is originating from the lung. {HEALTHY}", tissue="blood", disease="unknown")
    assert (tissue_of(row), disease_of(row)) == ("blood", "normal")


def test_labels_are_wrapped_and_never_cut():
    label = "effector memory CD8-positive, alpha-beta T cell, terminally differentiated"
    assert wrapped("T cell") == "T cell"
    assert wrapped("CD8-positive, alpha-beta memory T cell") == "CD8-positive, alpha-beta\nmemory T cell"
    assert len(wrapped(label).split("\n")) == 3 and wrapped(label).replace("\n", " ") == label
    assert len(wrapped(label * 5).split("\n")) <= 3
    assert escape("a || b_c *d* <e> `f`") == r"a \|\| b_c \*d\* \<e> \`f\`"


def test_folders_of_a_machine_are_left_out():
    assert without_folders("python launch/build.py --h5ad /data/me/a.h5ad --out=/tmp/x/y") == (
        "python launch/build.py --h5ad a.h5ad --out=y"
    )
    assert (
        without_folders("https://x.org/a/b ../c/d ./e/f counts / log") == "https://x.org/a/b ../c/d ./e/f counts / log"
    )


REPORT = {
    "seed": 7,
    "command": "python launch/build.py --h5ad /home/someone/atlas.h5ad --seed 7",
    "versions": {"python": "3.11.7", "numpy": "2.3.5"},
    "options": {
        "min_cells": 2,
        "max_cells": 3,
        "top_genes": 50,
        "unseen_disease": ["melanoma", "lupus"],
        "split": "cell",
        "puzzles_per_n": 4000,
        "organism": None,
    },
    "notes": ["unseen is empty"],
    "files": [
        {
            "file": "atlas.h5ad",
            "sha256": "ab12",
            "layer": "raw",
            "values": "counts",
            "organism": "Homo sapiens",
            "cells_read": 1200,
            "cells_dropped": {"no donor": 30, "no cell type": 0},
            "cells_kept": 1170,
            "donors": 3,
            "groups": 4,
            "groups_skipped": {"fewer than 2 cell types": 1},
            "notes": ["a note"],
            "splits": {"train": {"quota_left": {"3": 5}, "puzzles_with_a_cell_without_genes": 2}},
        },
        {"file": "b.h5ad", "cells_dropped": {"no donor": 12}},
    ],
    "splits": {"train": {"puzzles": 4}, "test": {"puzzles": 2}},
}


def test_the_card_says_what_the_report_says():
    card = data_card({"train": TRAIN, "test": TEST}, REPORT, "SUMMARY")
    assert section(card, "Sources")[2:] == [
        "| atlas.h5ad | Homo sapiens | raw | counts | 1,200 | 1,170 | 3 | 4 | ab12 |",
        "| b.h5ad | " + " | ".join(["not stated"] * 8) + " |",
    ]
    assert "- Diseases kept out of train and test: melanoma; lupus." in section(card, "Filters")
    assert "- A batch has 2 to 3 cells, each of another cell type, all of one donor and experimental batch." in card
    assert section(card, "What was left out, and why")[2:] == [
        "| cells | no donor | 42 |",
        "| cells | no cell type | 0 |",
        "| donors x batches | fewer than 2 cell types | 1 |",
        "| train puzzles | a cell without an expressed gene | 2 |",
        "| train puzzles | asked for, but no other batch of that size to draw | 5 |",
    ]
    assert section(card, "Splits")[0] == "SUMMARY"
    assert "| train -> test | 0 | 0 (0.0 %) | 0 | 0 | 0 |" in section(card, "Leak audit")
    limits = section(card, "Known limits")
    assert "- report.json counts 4 puzzles in train, the file holds 3." in limits
    assert "- test has 1 donor only: its results depend on them." in limits
    assert "- Train and test differ by cell, not by donor: test says nothing about new donors." in limits
    assert limits[-2:] == ["- Note of the build: unseen is empty", "- Note of the build: atlas.h5ad: a note"]
    origin = section(card, "How it was made")
    assert origin[:2] == ["- Seed: 7", "- Versions: python 3.11.7, numpy 2.3.5"]
    assert "python launch/build.py --h5ad atlas.h5ad --seed 7" in origin and "| puzzles_per_n | 4000 |" in origin
    assert "licence of the files they come from" in card and "/home" not in card


def test_the_audit_of_the_report_is_used_where_it_is_of_these_puzzles():
    pair = {
        "first": "train",
        "second": "test",
        "shared_cells": 1234,
        "puzzles_with_shared_cell": 1,
        "share_with_shared_cell": 0.5,
        "shared_donors": None,
        "near_duplicate_lists": 0,
        "same_batches": 0,
    }
    sizes = [
        {"name": n, "puzzles": p, "donors": 9, "cells": 1, "distinct_cells": 1} for n, p in (("train", 3), ("test", 2))
    ]
    found = {"rules": {}, "splits": sizes, "pairs": [pair], "leaks": ["SENTENCE"], "warnings": []}
    card = data_card({"train": TRAIN, "test": TEST}, {"audit": found}, "")
    assert "| train -> test | 1,234 | 1 (50.0 %) | not stated | 0 | 0 |" in card and "- Leak: SENTENCE" in card
    assert "SENTENCE" in data_card({"train": TRAIN, "test": TEST, "unseen": []}, {"audit": found}, "")
    assert "SENTENCE" not in data_card({"train": TRAIN, "test": TEST[:1]}, {"audit": found}, "")


def test_donors_shared_by_a_split_of_cells_are_no_leak_in_the_card():
    other = built("u", "AB", "89", "d1", "lung", "normal")
    for mode, kind in (("cell", "Warning"), ("donor", "Leak")):
        card = data_card({"train": TRAIN, "test": [other]}, {"options": {"split": mode}}, "")
        assert f"- {kind}: 1 of 1 puzzle (100.0 %) of test from a donor that train has too" in card


def test_files_are_whole_and_the_same_each_time(tmp_path):
    splits = {"train": TRAIN, "test": TEST, "unseen": []}
    files = write_description(tmp_path / "new/folder", splits, None)
    names = ["data_card.md", "statistics.md", "statistics.png"]
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == names
    first = [path.read_bytes() for path in files]
    assert [path.read_bytes() for path in write_description(tmp_path / "new/folder", splits, None)] == first
    picture = (tmp_path / "new/folder/statistics.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and struct.unpack(">II", picture[16:24]) == (1950, 1575)
    with pytest.raises(ValueError, match="no split holds a puzzle"):
        write_description(tmp_path / "none", {"train": []}, None)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow(2)
def test_the_command_describes_a_build_with_its_report(pipeline, tmp_path):
    folder = pipeline / "puzzles"
    words = [word for name in ("train", "test", "unseen") for word in ("--puzzles", folder / f"{name}.parquet")]
    said = succeed("describe", *words, "--out", tmp_path / "out")
    assert [line.rsplit("/", 1)[1] for line in said.splitlines()] == ["statistics.md", "statistics.png", "data_card.md"]
    report = json.loads((folder / "report.json").read_text())
    card = (tmp_path / "out/data_card.md").read_text()
    assert report["files"][0]["sha256"] in card and str(pipeline) not in card
    first, *_, last = section((tmp_path / "out/statistics.md").read_text(), "Cell types")
    assert first == "| cell type | train cells | test cells | unseen cells | total cells |"
    of_splits = [
        sum(len(p.cells) for p in read_puzzles(folder / f"{name}.parquet")) for name in ("train", "test", "unseen")
    ]
    assert last == "| **all** | " + " | ".join(f"**{n:,}**" for n in [*of_splits, sum(of_splits)]) + " |"
    succeed("describe", *words, "--out", tmp_path / "again", env={"PYTHONHASHSEED": "5"}, fresh=True)
    for name in ("statistics.md", "data_card.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_file_called_total_is_not_the_total_and_an_empty_list_is_refused(tmp_path):
    rows = read_puzzles(SAMPLE)
    write_puzzles(tmp_path / "train.jsonl", rows[:2])
    write_puzzles(tmp_path / "total.jsonl", rows[:1])
    splits = read_splits([str(tmp_path / "train.jsonl"), str(tmp_path / "total.jsonl")])
    assert list(splits) == ["train", f"{tmp_path.name}/total"]
    assert {name: len(puzzles) for name, puzzles in with_total(splits).items()}["total"] == 3
    (tmp_path / "r.yaml").write_text("puzzles: []\n")
    done = run_command("describe", "--recipe", tmp_path / "r.yaml", "--out", tmp_path / "out")
    assert done.returncode == 2 and "--puzzles: name at least one file of puzzles" in done.stderr


def test_the_command_describes_published_rows(tmp_path):
    succeed("describe", "--puzzles", SAMPLE, "--out", tmp_path)
    assert "Not stated: there is no report.json" in (tmp_path / "data_card.md").read_text()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--puzzles", "none.parquet", "--out", "out"], "none.parquet: no such file"),
        (["--puzzles", "ok.jsonl", "--out", "ok.jsonl"], "ok.jsonl: is a file, not a folder"),
        (["--puzzles", "ok.jsonl", "--out", "out", "--report", "none.json"], "none.json: no such file"),
        (["--puzzles", "ok.jsonl", "--out", "out", "--report", "ok.jsonl"], "not the report.json of a build"),
    ],
)
def test_bad_input_exits_with_2_and_one_sentence(tmp_path, words, problem):
    write_puzzles(tmp_path / "ok.jsonl", TRAIN)
    done = run_command("describe", *(word if word.startswith("--") else tmp_path / word for word in words))
    assert done.returncode == 2, done.stderr
    assert problem in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_no_report_is_none():
    assert read_report(None) is None


def what(splits) -> str:
    """The card's first paragraph."""
    return data_card(splits, {}, "").split("\n\n")[1]


def test_the_card_says_what_kind_of_puzzle_it_is():
    batch = "A puzzle is a batch of 2 to 3 cells of one donor, with the candidate cell types, each of which goes to exactly one"
    assert batch in what({"train": TRAIN}) and "of 2 cells of one donor" in what({"test": TEST})
    cells = what({"train": [cell for puzzle in TRAIN for cell in cell_level(puzzle)]})
    assert (
        "A puzzle is one cell of a batch alone, with all candidate cell types of the batch, one of which is its own."
        in cells
    )
    assert "exactly one" not in cells and "1 to 1" not in cells
    opened = what({"train": list(map(open_ended, TRAIN))})
    assert opened.endswith("An open-ended puzzle is a batch of 2 to 3 cells of one donor, without candidates.")
    mixed = what({"train": TRAIN, "open": [open_ended(TEST[0])]})
    assert "exactly one cell (3 puzzles)." in mixed and "2 cells of one donor, without candidates (1 puzzle)." in mixed


def test_primary_data_is_a_filter_only_where_it_was_one():
    dropped = {"suspension_type is not 'cell'": 1, "is_primary_data is not True": 0}
    absent = ["no obs column 'is_primary_data': all cells count as primary data"]
    of_all, of_none = {"cells_dropped": dropped, "notes": []}, {"cells_dropped": dropped, "notes": absent}

    def left_out(files, **options) -> str:
        card = data_card({"train": TRAIN}, {"files": files, "options": {"min_cells": 2, "max_cells": 3, **options}}, "")
        return next(line for line in section(card, "Filters") if "left out where" in line)

    assert (
        left_out([of_all]) == "- A cell is left out where: suspension_type is not 'cell'; is_primary_data is not True."
    )
    assert left_out([of_none, of_all]) == left_out([of_all])
    assert left_out([of_none]) == "- A cell is left out where: suspension_type is not 'cell'."
    assert left_out([of_all], include_non_primary=True) == left_out([of_none])


@pytest.mark.parametrize(
    "text",
    [
        '{"files": ["x"]}',
        '{"files": 3}',
        '{"scores": []}',
        '{"files": [], "options": [1]}',
        '{"files": [], "versions": [1]}',
        '{"files": [], "splits": {"train": 3}}',
        '{"files": [{"cells_dropped": {"a": "b"}}]}',
        '{"files": [], "audit": "x"}',
        '{"files": [], "audit": {"rules": {}, "splits": [{}], "pairs": [], "leaks": [], "warnings": []}}',
    ],
)
def test_a_report_of_another_shape_is_refused_and_a_foreign_one_is_left_out(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=r"report\.json: not the report\.json of a build; leave the option out"):
        read_report(tmp_path / "report.json")
    write_puzzles(tmp_path / "a.jsonl", TRAIN)
    assert report_beside([str(tmp_path / "a.jsonl")]) is None


def test_reports_of_builds_are_read(tmp_path, pipeline):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    assert read_report(tmp_path / "report.json") == REPORT
    assert read_report(pipeline / "puzzles/report.json")["audit"]["pairs"]


def test_a_file_may_be_called_like_a_formula(tmp_path):
    write_puzzles(tmp_path / "a$\\frac$b.jsonl", TRAIN)
    write_puzzles(tmp_path / "_b.jsonl", TEST)
    (tmp_path / "report.json").write_text('{"files": ["x"]}')
    words = ("--puzzles", tmp_path / "a$\\frac$b.jsonl", "--puzzles", tmp_path / "_b.jsonl")
    said = succeed("describe", *words, "--out", tmp_path / "out")
    assert said.startswith(f"note: {tmp_path}/report.json is not the report of a build, and is left out\n")
    assert (tmp_path / "out/statistics.png").stat().st_size > 10_000
