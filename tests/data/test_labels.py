"""data/meaning/labels.py and data/build/columns.py: which values are no labels, and which mean "not known"."""

import unicodedata

import pytest

from data.build.columns import clean_text
from data.inspection.inspection import inspect_file
from data.meaning.labels import is_cluster, names_no_cell_type, names_state, same_name
from tests.data.test_real_files import N_CELLS, atlas, built, plain, refusal, with_obs

__all__ = ["plain"]  # a fixture
CLUSTERS = ["cluster {}", "C1{}", "leiden_{}", "Cluster#{}", "seurat_{}", "clust-{}", "c_{}", "RNA_snn_res.0.5_{}"]
JUNK = ["ambient", "Ambient RNA", "Background", "Low UMI", "MT-high", "high mito", "Negative", "singlet", "rejected"]
JUNK += ["dropped", "delete", "trash", "Outliers", "uncertain", "indeterminate", "lowQualityCells", "DoubletCells"]
JUNK += ["doublet-like", "ambig", "poor_QC", "fails QC", "un-annotated", "low counts", "nocall", "No call", "Unmapped"]
JUNK += ["not a cell", "T cells (removed)", "to_remove", "Mito-high", "lowRNA", "few genes", "unassigned T", "misc"]
TYPES = ["unresolved T", "excluded volume cell", "cycling T cell", "stressed neuron", "cycling", "stressed", "ILC2"]
TYPES += [
    "CD8-negative T cell",
    "uncertain T cell",
    "indeterminate dendritic cell",
    "mixed glia",
    "unipolar brush cell",
]
UNKNOWN = ["Unk", "unkn", "undetermined", "undefined", "TBD", "n.d.", "ND", "N/D", "no data", "not stated", "not given"]
UNKNOWN += ["unavailable", "???", "---", "empty", "blank", "withheld", "not disclosed", "declined", "unknown donor"]
UNKNOWN += ["(unknown)", "not_available", "Not_Applicable", "[unknown]", "*"]


@pytest.mark.parametrize("form", CLUSTERS)
def test_names_of_clusters_are_refused_as_numbers_are(tmp_path, form):
    clusters = [form.format(i // 4 % 4) for i in range(N_CELLS)]
    path = with_obs(tmp_path / "a.h5ad", author_cell_type=atlas().obs["cell_type"], cell_type=clusters)
    first = ", ".join(form.format(i) for i in range(3))
    assert refusal(path) == (
        f"{path}: the obs column 'cell_type' holds only names of clusters ({first}, ...), which are no cell types; name "
        "the column of cell types with --cell-type-key (columns that look like cell types: 'author_cell_type'), or "
        "insist with --allow-numeric-labels"
    )
    assert built(path, allow_numeric_labels=True)[0]
    facts = inspect_file(path)
    assert facts.used["cell_type"] == "author_cell_type" and not facts.problems


def test_names_of_clusters_among_labels_are_set_aside(tmp_path):
    labels = atlas().obs["cell_type"].astype(str).tolist()[:48] + ["C12", "leiden_3"] * 8
    rows, report = built(with_obs(tmp_path / "a.h5ad", cell_type=labels))
    assert rows and report["cells_dropped"]["the label names no cell type"] == 16
    assert any("are left out: 'C12' (8), 'leiden_3' (8)" in note for note in report["notes"])


def test_one_label_beside_clusters_is_refused(tmp_path):
    labels = ["B cell" if label == "B cell" else str(i % 3) for i, label in enumerate(atlas().obs["cell_type"])]
    message = refusal(with_obs(tmp_path / "a.h5ad", cell_type=labels))
    assert "'cell_type' holds hardly anything but numbers (0, 1, 2, ...), which are no cell types" in message
    assert "--cell-type-key" in message and "--allow-numeric-labels" in message


def test_what_is_no_name_of_a_cluster():
    for label in ("CD4", "ILC2", "Th17", "DC1", "L2/3", "type 2 pneumocyte", "group 2 ILC", "C fiber", "CL:0000084"):
        assert not is_cluster(label)


@pytest.mark.parametrize("label", JUNK)
def test_more_labels_that_name_no_cell_type(label):
    assert names_no_cell_type(label)


@pytest.mark.parametrize("label", TYPES)
def test_more_labels_that_name_a_cell_type(label):
    assert not names_no_cell_type(label)


def test_labels_that_name_a_state_are_told(tmp_path):
    labels = atlas().obs["cell_type"].astype(str).tolist()[:60] + ["cycling"] * 4
    _, report = built(with_obs(tmp_path / "a.h5ad", cell_type=labels))
    assert "labels that name a state rather than a cell type are used as they are: 'cycling' (4)" in report["notes"]
    assert not names_state("cycling T cell")


@pytest.mark.parametrize("text", UNKNOWN)
def test_more_placeholders_are_missing_values(text):
    assert clean_text(text) is None


@pytest.mark.parametrize("text", ["Na+", "+", "NDD", "N1", "D", "ND4", "0", "-1", "X", "blank slate"])
def test_more_that_is_no_placeholder(text):
    assert clean_text(text) == text


def test_a_donor_that_may_be_a_code_is_told(tmp_path):
    donors = ["ND" if i < 16 else f"d{i // 16}" for i in range(N_CELLS)]
    _, report = built(with_obs(tmp_path / "a.h5ad", donor_id=donors))
    assert report["cells_dropped"]["no donor"] == 16
    note = "the donor 'ND' is read as \"not known\": rename it in the file if it is the code of a donor"
    assert note in report["notes"]


def test_composed_letters_and_invisible_characters(tmp_path, plain):
    assert clean_text(unicodedata.normalize("NFD", "M\u00fcller cell")) == "M\u00fcller cell"
    labels = [f"\ufeff{t}\u200b" if i % 2 else t for i, t in enumerate(atlas().obs["cell_type"])]
    assert built(with_obs(tmp_path / "a.h5ad", cell_type=labels))[0] == plain[1]


@pytest.mark.parametrize("other", ["B cells", "B-cell", "Bcell", "B-Cells"])
def test_spellings_of_one_label_are_refused(tmp_path, other):
    labels = atlas().obs["cell_type"].astype(str).tolist()
    labels[0] = other
    first, second = sorted(["B cell", other])
    assert f"the cell types {first!r} and {second!r} differ only in" in refusal(
        with_obs(tmp_path / "a.h5ad", cell_type=labels)
    )


@pytest.mark.parametrize(
    "one, other", [("CD4- T cell", "CD4 T cell"), ("Inh 1-1", "Inh 11"), ("L2-3 IT", "L23 IT"), ("CD4+ T", "CD4 T")]
)
def test_labels_of_two_types(one, other):
    assert same_name(one) != same_name(other)
