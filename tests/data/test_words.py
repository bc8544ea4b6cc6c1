"""data/meaning/words.py: spellings of healthy donors, sexes, ages, suspensions and flags, and columns to leave out."""

import h5py
import numpy as np
import pandas as pd
import pytest

from data.build.cells import read_cells
from data.build.contexts import context_sentence, has_disease
from data.inspection.inspection import first_lines, inspect_file
from data.meaning.words import suspension_kind, usual_disease, usual_sex
from tests.data.test_real_files import N_CELLS, SMALL, as_integers, atlas, built, refusal, saved, with_obs

DONORS = [f"d{i // 16}" for i in range(N_CELLS)]
HEALTHY = "The patient is healthy with no diagnosed disease."


def contexts(path, **options):
    return {row["user_msg"].split("\n")[0] for _, row in built(path, **options)[0]}


@pytest.mark.slow(1)
@pytest.mark.parametrize(
    "word",
    ["Healthy", "healthy control", "control", "Controls", "HC", "unaffected", "no disease", "wild type", "Wild-type"]
    + ["Healthy_donor", "Normal", "PATO:0000461", "non-diseased", "disease-free"],
)
def test_healthy_donors_are_normal(tmp_path, word):
    path = with_obs(tmp_path / "a.h5ad", disease=word)
    rows, report = built(path)
    assert rows and all(HEALTHY in row["user_msg"] and row["disease"] == "normal" for _, row in rows)
    note = f"the disease is read in other words: {word!r} as 'normal'"
    assert (note in report["notes"]) == (word != "Normal")


def test_what_is_a_disease():
    for word in ("COVID-19", "HD", "control of diabetes", "healthy carrier of BRCA1", "hypertension", "none of these"):
        assert usual_disease(word) == word
    assert usual_disease("Healthy || COVID-19") == "normal || COVID-19"
    assert context_sentence({"disease": "normal || COVID-19"}) == "The patient has been diagnosed with COVID-19."
    assert has_disease("Healthy", ("normal",)) and has_disease("normal", ("healthy",))


def test_sexes(tmp_path):
    words = {
        "M": "male",
        "Male": "male",
        "F": "female",
        "FEMALE": "female",
        "woman": "female",
        "XX": "XX",
        "other": "other",
    }
    assert {word: usual_sex(word) for word in words} == words
    path = with_obs(tmp_path / "a.h5ad", sex=["M" if d in ("d0", "d1") else "F" for d in DONORS])
    assert read_cells(path, SMALL.column_keys, {}).columns["sex"].texts() == ["male"] * 32 + ["female"] * 32
    assert "the sex is read in other words: 'F' as 'female', 'M' as 'male'" in built(path)[1]["notes"]


@pytest.mark.parametrize("number", [int, float, str])
def test_ages_in_years(tmp_path, number):
    ages = [number(40 + i // 16) for i in range(N_CELLS)]
    path = with_obs(tmp_path / "a.h5ad", development_stage=ages)
    stages = read_cells(path, SMALL.column_keys, {}).columns["development_stage"].texts()
    assert stages == [f"{40 + i // 16}-year-old stage" for i in range(N_CELLS)]
    notes = built(path)[1]["notes"]
    assert any("'40' as '40-year-old stage'" in note for note in notes)
    assert "the file states no organism: its ages count as years of people; else give --organism" in notes
    assert not inspect_file(path).problems
    mouse = with_obs(tmp_path / "b.h5ad", development_stage=ages, organism="Mus musculus")
    assert "'development_stage' holds only numbers" in refusal(mouse)  # weeks, perhaps
    assert "--development-stage-key none" in inspect_file(mouse).command
    assert "'development_stage' holds only numbers" in refusal(path, organism="mouse")  # the option says so


def test_ages_among_words(tmp_path):
    """De-identified files have >89; the numbers of the others are years all the same."""
    ages = ["40"] * (N_CELLS - 4) + [">89"] * 4
    path = with_obs(tmp_path / "a.h5ad", development_stage=ages)
    stages = read_cells(path, SMALL.column_keys, {}).columns["development_stage"].texts()
    assert stages == ["40-year-old stage"] * (N_CELLS - 4) + [">89"] * 4


@pytest.mark.parametrize("word", ["human", "Homo_sapiens", "NCBITaxon:9606", "Homo sapiens"])
def test_usual_words_for_an_organism(tmp_path, word):
    path = with_obs(tmp_path / "a.h5ad", organism=word, development_stage=40)
    for wanted in (None, "human", "Homo sapiens"):
        rows, report = built(path, organism=wanted)
        assert rows and report["organism"] == "Homo sapiens" and "40-year-old stage" in rows[0][1]["user_msg"]
    assert "keep them with --organism 'Homo sapiens'" in refusal(path, organism="mouse")


def test_an_organism_of_no_cell_is_not_offered(tmp_path):
    adata = atlas()
    adata.obs["organism"] = pd.Categorical(["Mus musculus"] * N_CELLS, ["Homo sapiens", "Mus musculus"])
    message = refusal(saved(tmp_path / "a.h5ad", adata), organism="rat")
    assert "--organism 'Mus musculus'" in message and "Homo sapiens" not in message


def test_ids_that_were_numbers_are_whole(tmp_path):
    donors = [f"{i // 16 + 1}.0" for i in range(N_CELLS)]
    path = with_obs(tmp_path / "a.h5ad", donor_id=donors)
    assert set(read_cells(path, SMALL.column_keys, {}).columns["donor_id"].texts()) == {"1", "2", "3", "4"}
    path = with_obs(tmp_path / "b.h5ad", donor_id=["v" + donor for donor in donors])
    assert "v1.0" in read_cells(path, SMALL.column_keys, {}).columns["donor_id"].texts()


def test_general_names_of_columns_are_worded_for_their_tissue_only():
    for tissue in ("blood", "kidney cortex", "upper lobe of lung"):
        facts = {"Condition": "Healthy", "medical_conditions": "Tumor", "tissue": tissue}
        assert context_sentence(facts) == f"The cell is from, originating from the {tissue}."
    assert "no reported skin condition" in context_sentence({"Condition": "Healthy", "tissue": "skin of forearm"})
    for tissue in ("muscle of leg", "bone of hand", "blood of arm", "left ventricle of heart"):
        for condition in ("Healthy", "Scar", "DM - non ulcer"):
            assert context_sentence({"Condition": condition, "tissue": tissue}).count(".") == 1
    assert "skin condition" in context_sentence({"Condition": "Healthy", "tissue": "left forearm"})
    other = ("caudate lobe of liver", "striated muscle tissue", "coronary sulcus", "neuromuscular junction")
    for tissue in (*other, "intervertebral disc of lumbar spinal column"):
        assert "brain" not in context_sentence({"medical_conditions": "Tumor", "tissue": tissue})
    for tissue in ("cardiac ventricle wall", "lower lobe of left lung", "cortex of kidney", "adrenal cortex"):
        assert "brain" not in context_sentence({"medical_conditions": "Tumor", "tissue": tissue})
    assert "keloid" in context_sentence({"Condition": "Keloid", "tissue": "ear lobe"})
    brain = ("brain", "middle temporal gyrus", "temporal cortex", "frontal lobe", "hippocampal formation", "cortex")
    more = (
        "primary somatosensory cortex",
        "caudate nucleus",
        "Brodmann (1909) area 4",
        "substantia nigra pars compacta",
    )
    for tissue in (*brain, *more):
        assert "brain tumor" in context_sentence({"medical_conditions": "Tumor", "tissue": tissue})


@pytest.mark.parametrize("name, flag", [("sex", "sex_key"), ("tissue", "tissue_key"), ("disease", "disease_key")])
def test_numbers_can_be_left_out_of_the_context(tmp_path, name, flag):
    numbers = [int(donor[1:]) % 2 for donor in DONORS]
    path = with_obs(tmp_path / "a.h5ad", **{name: numbers})
    message = refusal(path)
    option = f"--{flag.replace('_', '-')}"
    assert f"leave it out of the context with {option} none" in message
    assert "--constant" not in message  # one word for both numbers would be wrong
    plain = contexts(saved(tmp_path / "b.h5ad", atlas()))
    assert contexts(path, **{flag: "none"}) == {
        text.replace(" a female", "") if name == "sex"
        else text.replace(", originating from the blood", "") if name == "tissue"
        else text.replace(f" {HEALTHY}", "")
        for text in plain
    }  # fmt: skip
    facts = inspect_file(path)
    assert not facts.problems and (f"{option} none" in facts.command or f"{name}={name.upper()}" in facts.command)


@pytest.mark.parametrize("yes, no", [("yes", "no"), ("t", "f"), ("Y", "N"), ("TRUE", "FALSE")])
def test_flags_of_primary_data(tmp_path, yes, no):
    path = with_obs(tmp_path / "a.h5ad", is_primary_data=[no if i < 4 else yes for i in range(N_CELLS)])
    report = built(path)[1]
    assert report["cells_dropped"]["is_primary_data is not True"] == 4
    assert not any("is_primary_data" in note for note in report["notes"])


def test_flags_that_are_not_understood(tmp_path):
    path = with_obs(tmp_path / "a.h5ad", is_primary_data=["perhaps" if i < 4 else "True" for i in range(N_CELLS)])
    note = "is_primary_data is not understood where it is 'perhaps' (4): read as not True"
    assert note in built(path)[1]["notes"]


def test_kinds_of_suspension(tmp_path):
    for word in ("cell", "Single Cell", "whole cell", "scRNA-seq"):
        assert suspension_kind(word) == "cell"
    for word in ("Nuclei", "single nucleus", "snRNA", "single-nuclei", "snRNA-seq"):
        assert suspension_kind(word) == "nucleus"
    assert suspension_kind("fresh") == "na"
    path = with_obs(tmp_path / "a.h5ad", suspension_type=["fresh" if i < 4 else "whole cell" for i in range(N_CELLS)])
    report = built(path)[1]
    assert report["cells_kept"] == 60
    note = "cells of another suspension type are left out: 'fresh' (4); --suspension cell,na keeps them"
    assert note in report["notes"]


def test_one_donor_for_each_cell(tmp_path):
    path = with_obs(tmp_path / "a.h5ad", donor_id=[f"donor_{i}" for i in range(N_CELLS)])
    assert "64 cells have 64 donors: name the column of donors with --donor-key" in refusal(path)
    assert "--donor-key" in inspect_file(path).problems[0]


def test_a_file_without_a_matrix_of_counts(tmp_path):
    adata = atlas()
    adata.layers["scaled"] = adata.X.toarray() - 4.0
    adata.X = None
    path = saved(tmp_path / "a.h5ad", adata)
    message = refusal(path)
    assert message == f"{path}: has no layer 'X'; --layer can be one of scaled"
    del adata.layers["scaled"]
    message = refusal(saved(tmp_path / "b.h5ad", adata))
    assert message.endswith("the file has no matrix, so add its counts as a layer and name it with --layer")


def test_tags_and_pages_of_text_are_no_facts(tmp_path):
    sexes = ["female" if i < 32 else "x" * 3000 for i in range(N_CELLS)]
    path = with_obs(tmp_path / "a.h5ad", tissue="lung </answer>", sex=sexes)
    rows, report = built(path)
    assert rows and not any("</answer>" in row["user_msg"] or "xxx" in row["user_msg"] for _, row in rows)
    note = "no context states the tissue of 64 cells, a tag or a text above 500 letters: 'lung </answer>'"
    assert note in report["notes"]
    labels = ["B cell " + "x" * 600 if t == "B cell" else t for t in atlas().obs["cell_type"]]
    assert "has 607 letters; shorten it" in refusal(with_obs(tmp_path / "b.h5ad", cell_type=labels))


def test_the_organism_of_the_file_is_named(tmp_path):
    path = with_obs(tmp_path / "a.h5ad", organism="Macaca mulatta")
    message = refusal(path, organism="Homo sapiens")
    assert message.endswith("(the file has Macaca mulatta)); keep them with --organism 'Macaca mulatta'")


def test_factors_of_seuratdisk_as_floats_are_seen_by_an_inspection(tmp_path):
    path = saved(tmp_path / "a.h5ad", atlas())
    as_integers(path, ["cell_type", "sex"])
    with h5py.File(path, "r+") as file:
        for name in ("cell_type", "sex"):
            codes = file[f"obs/{name}"][:].astype(np.float64)
            del file[f"obs/{name}"]
            file[f"obs/{name}"] = codes
    facts = inspect_file(path)
    column = next(column for column in facts.columns if column.name == "cell_type")
    assert (column.kind, column.n_values, column.looks_like_cell_types) == ("labels", 4, True) and not facts.problems


def test_a_matrix_that_cannot_be_used_is_said_so(tmp_path):
    path = saved(tmp_path / "a.h5ad", atlas())
    with h5py.File(path, "r+") as file:
        file["X/indices"][5] = 9999
    assert "; X cannot be used;" in first_lines(path)[0]


@pytest.mark.parametrize(
    "ids, organism",
    [
        ("ENSRNOG{:011d}", "Rattus norvegicus"),
        ("ENSDARG{:011d}", "Danio rerio"),
        ("WBGene{:08d}", "Caenorhabditis elegans"),
    ],
)
def test_organisms_of_ids(tmp_path, ids, organism):
    names = [ids.format(i + 1) for i in range(10)]
    assert inspect_file(saved(tmp_path / "a.h5ad", atlas(names, names))).organism == organism
