"""What a build says of its labels, and what a model takes along of it."""

import json
from pathlib import Path

import anndata
import pytest

from data.build.build import build_puzzles
from data.build.contexts import stated_in
from data.clusters.known import (
    KnownLabel,
    KnownLabels,
    cell_types_file,
    check_genes_known,
    labels_file_of,
    read_known_labels,
    read_labels,
)
from data.errors import UserError
from data.folder import write_build
from data.puzzles import read_puzzles
from tests.data.test_build import SMALL, TYPES, write_atlas

IDS = {
    "B cell": "CL:0000236",
    "CD4-positive, alpha-beta T cell": "CL_0000624",  # another spelling of CL:0000624
    "macrophage": "unknown",
    "mast cell": "CL:0000097",
    "plasma cell": "CL:0000786",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A build of 8 donors of two tissues; half of the mast cells have the id of another type."""
    folder = tmp_path_factory.mktemp("built")
    adata = anndata.read_h5ad(write_atlas(folder / "a.h5ad"))
    adata.obs["cell_type_ontology_term_id"] = [IDS[name] for name in adata.obs["cell_type"]]
    adata.obs = adata.obs.astype({"tissue": str})
    is_mast = adata.obs.index[adata.obs["cell_type"] == "mast cell"]
    adata.obs.loc[is_mast[::2], "cell_type_ontology_term_id"] = "CL:0000000"
    adata.obs.loc[adata.obs["cell_type"] == "macrophage", "tissue"] = "unknown"
    adata.write_h5ad(folder / "a.h5ad")
    splits, report = build_puzzles([folder / "a.h5ad"], SMALL)
    write_build(folder / "puzzles", splits, report)
    return folder / "puzzles"


def test_labels_json_counts_the_train_donors_and_takes_ids_on_which_cells_agree(built):
    content = json.loads((built / "labels.json").read_text())
    train = read_puzzles(built / "train.parquet")
    assert content["genes"] == sorted({gene for p in train for cell in p.cells for gene in cell})
    assert list(content["labels"]) == TYPES
    assert content["puzzles"]["states"] == sorted(set.intersection(*(stated_in(p.context) for p in train)))
    ids = {label: known["ontology_term_id"] for label, known in content["labels"].items()}
    assert ids == {
        "B cell": "CL:0000236",
        "CD4-positive, alpha-beta T cell": "CL:0000624",
        "macrophage": None,
        "mast cell": None,
        "plasma cell": "CL:0000786",
    }
    # 7 of the 8 donors are for train; each has 2 batches of 4 cells of a type
    donors = 8 - len({p.meta["donor"] for p in read_puzzles(built / "test.parquet")})
    assert donors == 7 and {known["n"] for known in content["labels"].values()} == {7 * 2 * 4}
    assert (
        content["labels"]["B cell"]["tissues"] == ["blood", "lung"] and not content["labels"]["macrophage"]["tissues"]
    )
    assert json.loads((built / "report.json").read_text())["labels"] == content["labels"]


def test_a_label_that_no_train_puzzle_has_is_not_known(tmp_path):
    """Donor d0 alone has a tissue and a type of its own, and goes to unseen by its disease."""
    adata = anndata.read_h5ad(write_atlas(tmp_path / "a.h5ad", diseases=("normal",)))
    first = adata.obs["donor_id"] == "d0"
    adata.obs = adata.obs.astype(str).assign(is_primary_data=True)
    adata.obs.loc[first, ["tissue", "disease"]] = "moon", "influenza"
    adata.obs.loc[first & (adata.obs["cell_type"] == "mast cell"), "cell_type"] = "moon cell"
    adata.write_h5ad(tmp_path / "a.h5ad")
    _, report = build_puzzles(
        [tmp_path / "a.h5ad"], SMALL.__class__(**vars(SMALL) | {"unseen_disease": ("influenza",)})
    )
    assert "moon cell" not in report["labels"] and "mast cell" in report["labels"]
    assert all("moon" not in known["tissues"] for known in report["labels"].values())
    assert {known["ontology_term_id"] for known in report["labels"].values()} == {None}, "the file has no such column"


def known_of(label: str) -> KnownLabels:
    return KnownLabels({label: KnownLabel("CL:0000236", ("blood", "lung"), 3)}, ["CD79A"])


def test_labels_are_read_back_and_asked_by_tissue(built):
    known = read_labels(built / "labels.json")
    assert known.path == built / "labels.json" and known.to_json() == (built / "labels.json").read_text()
    assert (
        known.in_tissue(" Lung") == [name for name in TYPES if name != "macrophage"] and known.in_tissue("moon") == []
    )
    assert known.ontology_term_id("B cell") == "CL:0000236" and known.ontology_term_id("moon cell") is None
    assert known.tissues == ["blood", "lung"]


def test_where_the_labels_of_a_model_are_found(tmp_path):
    """Its own file; beside the puzzles of its run; of the model it was trained from, through an adapter and a run."""
    base, run, puzzles = tmp_path / "base", tmp_path / "run", tmp_path / "puzzles"
    checkpoint, whole = run / "checkpoints/step-000010", tmp_path / "sft/model"
    for folder in (base, checkpoint, puzzles, whole):
        folder.mkdir(parents=True)
    assert labels_file_of(checkpoint) is None and read_known_labels(tmp_path / "absent") is None
    (checkpoint / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (run / "config.json").write_text(
        json.dumps({"settings": {"puzzles": str(puzzles / "train.parquet"), "model": "x"}})
    )
    (tmp_path / "sft/config.json").write_text(json.dumps({"settings": {"traces": "t.jsonl", "model": str(base)}}))
    (base / "cell_types.json").write_text(known_of("of the base").to_json())
    assert labels_file_of(checkpoint) == base / "cell_types.json" == labels_file_of(whole)
    (puzzles / "labels.json").write_text(known_of("of the puzzles").to_json())
    assert list(read_known_labels(checkpoint).labels) == ["of the puzzles"]
    moved = tmp_path / "moved"  # an adapter whose base is named by --base, as its own path leads nowhere
    moved.mkdir()
    (moved / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "nowhere"}))
    assert read_known_labels(moved) is None and list(read_known_labels(moved, base).labels) == ["of the base"]
    (checkpoint / "cell_types.json").write_text(known_of("its own").to_json())
    assert list(read_known_labels(checkpoint).labels) == ["its own"]
    (checkpoint / "cell_types.json").unlink()
    (run / "config.json").write_text(json.dumps({"settings": {"puzzles": "puzzles/train.parquet", "model": "x"}}))
    assert labels_file_of(checkpoint) == puzzles / "labels.json", "a path from the folder where the run was started"
    (puzzles / "train.parquet").write_text("")
    assert labels_file_of(puzzles / "train.parquet") == puzzles / "labels.json"
    (base / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (base / "cell_types.json").unlink()
    assert labels_file_of(whole) is None, "a model that names itself ends the search"


def test_the_file_that_a_trained_model_gets(tmp_path):
    (tmp_path / "labels.json").write_text(known_of("named").to_json())
    (tmp_path / "t").mkdir()
    (tmp_path / "t/labels.json").write_text(known_of("beside the traces").to_json())
    (tmp_path / "t/traces.jsonl").write_text("")
    (tmp_path / "m").mkdir()
    (tmp_path / "m/cell_types.json").write_text(known_of("of the model").to_json())
    traces, model = tmp_path / "t/traces.jsonl", tmp_path / "m"
    for labels, places, expected in (
        (str(tmp_path / "labels.json"), (traces, model), "named"),
        (None, (traces, model), "beside the traces"),
        (None, (tmp_path / "x.jsonl", model), "of the model"),
    ):
        assert cell_types_file(labels, *places) == {"cell_types.json": known_of(expected).to_json()}
    assert cell_types_file(None, tmp_path / "x.jsonl") == {}


SIZES = {"max_cells": 4, "top_genes": 12, "drop_genes": []}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no such file; launch/build.py writes labels.json beside train.parquet"),
        ("{", "is not JSON"),
        ('{"labels": {}}', "is no labels.json of launch/build.py .it lacks labels or genes"),
        ('{"labels": {"a": {"tissues": []}}, "genes": []}', "the label 'a' lacks ontology_term_id, tissues or n"),
        ('{"labels": {"a": {"tissues": [1], "n": 1, "ontology_term_id": null}}, "genes": []}', "the label 'a' lacks"),
        *(
            (
                json.dumps({"labels": {}, "genes": [], "puzzles": {**SIZES, "states": states}}),
                "states is no list of names",
            )
            for states in ("disease", [1], [["disease"]])
        ),
        (json.dumps({"labels": {}, "genes": [], "puzzles": {"max_cells": 4}}), "its puzzles lack max_cells, top_genes"),
    ],
)
def test_a_file_that_holds_no_labels(tmp_path, text, says):
    if text is not None:
        (tmp_path / "labels.json").write_text(text)
    with pytest.raises(UserError, match=says):
        cell_types_file(str(tmp_path / "labels.json"))


def test_genes_in_common():
    assert check_genes_known(["A", "B", "C", "D"], ["A", "B"]) == 1.0, (
        "a model of few genes knows the cells of a whole genome"
    )
    assert check_genes_known(["A", "B"], ["A", "C", "D", "E"]) == 0.5
    with pytest.raises(
        UserError,
        match=r"list 3 genes of the file \(Cd3d, Lyz2, .*only 1 are in both \(2 are but for upper and lower case, as symbols "
        r"of mouse and human are\), a share of 0.33 where 0.50 is needed",
    ):
        check_genes_known(["ACTB", "Cd3d", "Lyz2"], ["ACTB", "CD3D", "LYZ"])
    with pytest.raises(UserError, match="the model was trained on 0 "):
        check_genes_known(["ACTB"], [])
    assert check_genes_known(["ACTB", "Cd3d", "Lyz2"], ["ACTB", "CD3D", "LYZ"], share=0.3) == pytest.approx(1 / 3)


def test_what_a_model_knows_that_was_trained_on_two_builds():
    blood = KnownLabels(
        {"B cell": KnownLabel("CL:0000236", ("blood",), 5), "T cell": KnownLabel(None, ("blood",), 2)},
        ["CD3D", "MS4A1"],
        puzzles={
            **{"max_cells": 4, "top_genes": 12, "drop_genes": ["ribosomal", "mitochondrial"]},
            "states": ["disease", "sex", "tissue"],
        },
    )
    lung = KnownLabels(
        {"T cell": KnownLabel("CL:0000084", ("lung",), 3)},
        ["CD3D", "IL7R"],
        puzzles={"max_cells": 5, "top_genes": 16, "drop_genes": ["ribosomal"], "states": ["disease", "tissue"]},
    )
    both = blood.joined(lung)
    assert both.labels == {
        "B cell": KnownLabel("CL:0000236", ("blood",), 5),
        "T cell": KnownLabel("CL:0000084", ("blood", "lung"), 5),
    }
    assert both.genes == ["CD3D", "IL7R", "MS4A1"]
    alike = {"max_cells": 5, "top_genes": 16, "drop_genes": ["ribosomal"]}
    assert both.puzzles == {**alike, "states": ["disease", "tissue"]}
    assert blood.joined(KnownLabels({}, [], puzzles=alike)).puzzles == alike, "a file of an earlier build states none"
    assert KnownLabels({}, []).joined(lung) == KnownLabels(lung.labels, lung.genes, None, lung.puzzles)


def test_the_labels_of_a_run_are_its_own_and_not_those_of_the_current_folder(tmp_path, monkeypatch):
    """Two clones with the same names of folders; the command is given in the one, for a model of the other."""
    for name, label in (("A", "B cell"), ("B", "T cell")):
        labels = {"labels": {label: {"ontology_term_id": None, "tissues": [], "n": 1}}, "genes": ["G"]}
        (tmp_path / name / "mine/puzzles").mkdir(parents=True)
        (tmp_path / name / "mine/puzzles/labels.json").write_text(json.dumps(labels))
        (tmp_path / name / "mine/puzzles/train.parquet").write_text("")
    checkpoint = tmp_path / "A/mine/grpo/checkpoints/step-000100"
    checkpoint.mkdir(parents=True)
    settings = {"settings": {"puzzles": "mine/puzzles/train.parquet"}}
    (tmp_path / "A/mine/grpo/config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path / "B")
    found = labels_file_of("../A/mine/grpo/checkpoints/step-000100")
    assert found.resolve() == tmp_path / "A/mine/puzzles/labels.json"
