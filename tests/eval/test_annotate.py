"""Annotating a user's clusters: questions, votes, confidence, what is written. Hand-computed, without a model."""

import csv
import dataclasses
import io
import json
import random
from collections import Counter
from itertools import combinations
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from data.clusters.known import KnownLabel, KnownLabels
from data.clusters.profiles import ClusterProfile, profiles_of
from data.distill.lookups import Tables
from data.errors import RunError, UserError
from data.folder import labels_text
from data.puzzles import Puzzle
from eval.annotate import annotate
from eval.annotate.annotation import Questions, annotate_profiles
from eval.annotate.calibration import (
    calibrated,
    expected_calibration_error,
    fit_calibration,
    halves,
    read_calibration,
)
from eval.annotate.candidates import OPEN, candidates_of, listed
from eval.annotate.doubts import agreement_of, doubts_of
from eval.annotate.evidence import cited, markers_of, rationales, sentences_about
from eval.annotate.page import highlighted
from eval.annotate.questions import SCREEN, VOTE, Layout, SampleQuestions, deal, divide
from eval.annotate.run import annotate_file
from eval.annotate.settings import AnnotateConfig, QuestionSettings
from eval.annotate.votes import Reading, Tally, beliefs, count_votes, decide, label_clusters, read_answer
from eval.annotate.writing import csv_of, obs_columns_of, record_of
from eval.baselines import known_markers, overlap
from eval.metrics import answer_of
from tests.helpers.clusters import GENES, TYPES, clustered, model_that, reads_markers


def profile(cluster: str, genes: list[str], mean: list[float], sample: str = "d1", n_cells: int = 30, tissue="blood"):
    return ClusterProfile(
        sample=sample,
        cluster=cluster,
        n_cells=n_cells,
        by_expression=genes,
        by_difference=genes[::-1],
        context=f"The cell is from {sample}.",
        tissue=tissue,
        mean=np.array(mean, dtype=np.float32),
    )


def of_types(names: list[str], sample: str = "d1") -> list[ClusterProfile]:
    """A profile per name; clusters of one type are nearly equal."""
    found = []
    for i, name in enumerate(names):
        mean = [5.0 if gene in GENES[name] else 0.1 * (i % 3) for label in TYPES for gene in GENES[label]]
        found.append(profile(f"{i}", [*GENES[name], "ACTB"], mean, sample))
    return found


def config_of(folder, file: str = "in.h5ad", **more) -> AnnotateConfig:
    """Of a command that asks little about a file of a folder."""
    little = {
        "cluster_key": "leiden",
        "candidates": ",".join(TYPES),
        "model": "m",
        "max_cells": 3,
        "samples": 2,
        "screens": 1,
    }
    return AnnotateConfig(**{"file": str(folder / file), "out": str(folder / "out.h5ad"), **little, **more})


def settings(**more) -> QuestionSettings:
    return QuestionSettings(**{"cluster_key": "leiden", "max_cells": 3, "samples": 4, **more}).as_trained(None)


# ---- questions


def test_sets_cover_all_clusters_and_the_nearest_meet():
    near = np.full((6, 6), 0.1)
    for i, j in ((0, 3), (1, 4), (2, 5)):
        near[i, j] = near[j, i] = 0.9
    nobody = np.zeros((6, 6), bool)
    for seed in range(10):
        assert sorted(map(sorted, divide(2, near, nobody, random.Random(seed)))) == [[0, 3], [1, 4], [2, 5]]
    # 5 clusters in sets of 2: the last one is completed with its nearest, which has had its turn
    sets = divide(2, near[:5, :5], nobody[:5, :5], random.Random(0))
    assert len(sets) == 3 and all(len(of) == 2 for of in sets) and {c for of in sets for c in of} == set(range(5))


def test_pairs_that_must_not_meet_do_not_unless_nobody_else_is_there():
    apart = np.zeros((4, 4), bool)
    apart[:2, :2] = apart[2:, 2:] = True
    np.fill_diagonal(apart, False)
    alike = apart.astype(float)  # those that must not meet are the nearest
    for seed in range(10):
        for members in divide(3, alike, apart, random.Random(seed)):
            assert len(members) == 2 and not apart[members[0], members[1]]  # a third would meet its like
    both = ~np.eye(2, dtype=bool)
    assert sorted(divide(2, np.zeros((2, 2)), both, random.Random(0))[0]) == [0, 1]  # better than a puzzle of one


def test_dealt_hands_hold_every_label():
    hands = deal(7, 3, random.Random(1))
    assert [len(hand) for hand in hands] == [3, 3, 3] and {i for hand in hands for i in hand} == set(range(7))
    assert all(len(set(hand)) == 3 for hand in hands)
    assert deal(2, 4, random.Random(0)) in ([[0, 1]], [[1, 0]])


def test_puzzles_have_the_trained_format_and_no_cluster_name():
    names = ["CD8 T, treated (old label)", "<b>x</b>", "7", "leiden-3", "monocytes of the atlas"]
    some = of_types(["T cell", "B cell", "monocyte", "T cell", "NK cell"])
    some = [profile(name, p.by_expression, p.mean.tolist()) for name, p in zip(names, some, strict=True)]
    of = SampleQuestions(0, some, list(TYPES), Layout(max_cells=3))
    asked = of.screening(2) + of.voting(range(4), np.full((5, len(TYPES)), 0.25))
    for question in asked:
        puzzle = question.puzzle
        assert len(puzzle.cells) == len(puzzle.candidates) == len(set(puzzle.candidates)) and puzzle.variant == "batch"
        text = json.dumps(puzzle.chat())
        assert not [name for name in names if name in text and name != "7"] and " 7" not in text
        assert len(ranked_by([question], some)) == 1
    screened = Counter(
        (c, label) for q in asked if q.stage == SCREEN for c in set(q.clusters) for label in q.puzzle.candidates
    )
    assert all(screened[p.cluster, label] >= 2 for p in some for label in TYPES)
    voted = Counter(cluster for q in asked if q.stage == VOTE for cluster in q.clusters)
    assert all(voted[p.cluster] >= 4 for p in some)
    assert len({q.puzzle.id for q in asked}) == len(asked)


def ranked_by(questions: list, profiles: list[ClusterProfile]) -> set[str]:
    """How the genes of the questions are ranked."""
    of = {p.cluster: {"expression": p.by_expression, "difference": p.by_difference} for p in profiles}
    found = set()
    for question in questions:
        fits = [
            name
            for name in ("expression", "difference")
            if question.puzzle.cells == [of[cluster][name] for cluster in question.clusters]
        ]
        found |= set(fits) or {"nothing known"}
    return found


def test_a_cluster_is_described_in_turns_by_what_it_expresses_and_by_what_sets_it_apart():
    some = of_types(["T cell", "B cell", "monocyte", "T cell", "NK cell"])
    belief = np.full((5, len(TYPES)), 0.25)
    of = SampleQuestions(0, some, list(TYPES), Layout(max_cells=3))
    in_turns = [*[{"expression"}] * 2, *[{"difference"}] * 2, {"expression"}]  # even rounds: similar clusters meet
    assert [ranked_by(of.voting([number], belief), some) for number in range(5)] == in_turns
    assert ranked_by(of.screening(1), some) == {"expression"}
    assert ranked_by(of.screening(2), some) == {"expression", "difference"}
    for name in ("expression", "difference"):
        of = SampleQuestions(0, some, list(TYPES), Layout(max_cells=3, genes_by=name))
        assert ranked_by(of.screening(2) + of.voting(range(4), belief), some) == {name}
    # a cluster without others in its sample differs from nothing
    alone = dataclasses.replace(some[0], by_difference=[])
    for name in ("both", "expression", "difference"):
        of = SampleQuestions(0, [alone], list(TYPES), Layout(max_cells=3, genes_by=name))
        assert all(q.puzzle.cells == [alone.by_expression] for q in of.voting(range(4), belief[:1]))


def test_order_differs_from_vote_to_vote_and_repeats_with_the_seed():
    some = of_types(["T cell", "B cell", "monocyte"])
    belief = np.eye(3, len(TYPES))

    def orders(seed: int) -> list:
        of = SampleQuestions(0, some, list(TYPES), Layout(max_cells=3, seed=seed))
        return [(q.clusters, tuple(q.puzzle.candidates)) for q in of.voting(range(8), belief)]

    assert orders(0) == orders(0) != orders(1)
    assert len({clusters for clusters, _ in orders(0)}) >= 3 and len({labels for _, labels in orders(0)}) >= 3


def test_voting_offers_each_cluster_its_favourite_and_separates_equal_favourites():
    some = of_types(["T cell", "T cell", "B cell", "monocyte"])
    belief = np.array([[0.9, 0.1, 0.1, 0.1], [0.8, 0.1, 0.3, 0.1], [0.1, 0.9, 0.1, 0.1], [0.1, 0.1, 0.9, 0.1]])
    of = SampleQuestions(0, some, list(TYPES), Layout(max_cells=3))
    for question in of.voting(range(6), belief):
        members = [int(cluster) for cluster in question.clusters]
        assert {list(TYPES)[belief[i].argmax()] for i in members} <= set(question.puzzle.candidates)
        assert not {0, 1} <= set(members)
    together = SampleQuestions(0, some, list(TYPES), Layout(max_cells=4, keep_apart=False)).voting(range(2), belief)
    assert all(set(question.clusters) == {"0", "1", "2", "3"} for question in together)


def test_a_single_cluster_is_asked_as_a_single_cell_and_open_questions_have_no_candidates():
    (one,) = of_types(["B cell"])
    alone = SampleQuestions(0, [one], list(TYPES), Layout(max_cells=3))
    belief = np.array([[0.1, 0.9, 0.2, 0.3]])
    (question,) = alone.voting([0], belief)
    assert question.puzzle.variant == "cell" and set(question.puzzle.candidates) == {"B cell", "monocyte", "NK cell"}
    some = of_types(["T cell", "B cell", "monocyte", "NK cell"])
    free = SampleQuestions(0, some, [], Layout(max_cells=3))
    assert free.screening(2) == []
    assert {q.puzzle.variant for q in free.voting(range(2), np.zeros((4, 0)))} == {"open"}


def test_similar_clusters_meet_in_even_rounds():
    some = of_types(["T cell", "B cell", "T cell", "B cell"])
    of = SampleQuestions(0, some, list(TYPES), Layout(max_cells=2, keep_apart=False))
    pairs = [tuple(sorted(q.clusters)) for q in of.voting([0, 2], np.full((4, 4), 0.25))]
    assert Counter(pairs) == {("0", "2"): 2, ("1", "3"): 2}


def test_room_is_made_for_the_longest_prompt():
    adata = clustered(list(TYPES), parts=2)
    asked = settings(candidates=",".join(TYPES))
    profiles = profiles_of(adata, "leiden", asked)
    questions = Questions(profiles, candidates_of(profiles.profiles, asked.candidates, None), asked)
    (longest,) = questions.longest()
    every = questions.screening + questions.voting([])
    assert len(longest.user_message) > max(len(question.puzzle.user_message) for question in every)
    assert len(longest.cells) == 4 and longest.candidates.count(max(TYPES, key=len)) == 2


# ---- votes


def reading(question, *labels: str) -> Reading:
    return read_answer(question, answer_of(labels, "why"))


@pytest.fixture
def question():
    some = of_types(["T cell", "B cell"])
    (found,) = SampleQuestions(0, some, list(TYPES), Layout(max_cells=2)).voting([0], np.eye(2, 4) + 0.1)
    assert set(found.puzzle.candidates) == {"T cell", "B cell"}
    return found


def test_only_offered_labels_of_valid_answers_count(question):
    first = question.clusters[0]
    answers = [
        reading(question, " t  CELL", "B cell"),  # compared as in the reward, spelled as in the puzzle
        reading(question, "T cell", "neuron"),  # no candidate: the other cell's vote stays
        read_answer(question, "T cell | B cell"),  # no valid format
        reading(question, "T cell", "nk cell"),  # a candidate of the sample that this puzzle does not offer
    ]
    assert [answer.labels for answer in answers[:3]] == [("T cell", "B cell"), ("T cell", None), ()]
    tallies = count_votes(answers, question.clusters)
    assert tallies[first].votes == {"T cell": 3} and tallies[first].asked == 4 and tallies[first].valid == 3
    second = tallies[question.clusters[1]]
    assert second.votes == {"B cell": 1, "NK cell": 1} and second.by_sample == {"d1": second.votes}


def test_belief_is_the_share_of_wins_among_offers(question):
    answers = [reading(question, "T cell", "B cell")] * 3 + [reading(question, "B cell", "T cell")]
    found = beliefs(answers, question.clusters, ["T cell", "B cell", "monocyte"])
    # 3 of 4 and 1 of 4, with one puzzle of two labels imagined beside them; a label never offered has chance
    assert found.tolist() == [[3.5 / 5, 1.5 / 5, 0.5], [1.5 / 5, 3.5 / 5, 0.5]]
    unasked = beliefs([reading(question, "monocyte", "B cell")], question.clusters, ["T cell", "B cell", "monocyte"])
    assert unasked.tolist() == [[0.25, 0.25, 0.75], [0.25, 0.75, 0.5]]  # got without an offer: 1 of 1


def test_sharing_of_labels():
    votes = np.array([[6, 2, 0], [5, 3, 0], [4, 0, 4], [0, 0, 0]])
    assert decide(votes, "never") == [0, 0, 0, None]
    assert decide(votes, "always") == [0, 1, 2, None]  # 6 + 3 + 4 votes
    # clusters 0 and 1 have more than half of their votes for label 0; cluster 2 is undecided and gets the free label
    assert decide(votes, "auto") == [0, 0, 2, None]
    # an undecided cluster without votes for a free label keeps its favourite
    assert decide(np.array([[6, 0], [0, 6], [3, 3]]), "auto") == [0, 1, 0]
    # label 2 is free: 2 votes are half of the favourite's 4, and 1 vote is less
    assert decide(np.array([[6, 0, 0, 0], [4, 0, 2, 2]]), "auto") == [0, 2]
    assert decide(np.array([[6, 0, 0, 0], [4, 2, 1, 1]]), "auto") == [0, 1]
    assert decide(np.array([[6, 0, 0, 0], [0, 6, 0, 0], [4, 3, 1, 0]]), "auto") == [0, 1, 0]


def test_share_and_second_choice(question):
    answers = [reading(question, "T cell", "B cell")] * 3 + [reading(question, "B cell", "T cell")]
    found = label_clusters(count_votes(answers, question.clusters), "auto")[question.clusters[0]]
    assert (found.label, found.second, found.share) == ("T cell", "B cell", 0.75)


def test_open_ended_labels_are_put_together():
    some = of_types(["T cell", "B cell"])
    (asked,) = SampleQuestions(0, some, [], Layout(max_cells=2)).voting([0], np.zeros((2, 0)))
    answers = [
        reading(asked, "T Cell", "B cell"),
        reading(asked, "T cell", "B  cell"),
        reading(asked, "T cell", "plasma cell"),
    ]
    tallies = count_votes(answers, asked.clusters)
    assert tallies[asked.clusters[0]].votes == {"T cell": 3}
    assert tallies[asked.clusters[1]].votes == {"B cell": 2, "plasma cell": 1}


# ---- confidence


def test_expected_calibration_error_by_hand():
    # bins (0.7, 0.8]: confidence 0.75, right 0.5; (0.2, 0.3]: confidence 0.3, right 1: (2 * 0.25 + 1 * 0.7) / 3
    assert expected_calibration_error([0.75, 0.75, 0.3], [True, False, True]) == pytest.approx((0.5 + 0.7) / 3)
    assert expected_calibration_error([1.0, 0.0], [True, False]) == 0
    # 0.5 is the top of the bin (0.4, 0.5]: alone in it, beside 0.45, and apart from 0.55
    assert expected_calibration_error([0.5, 0.45], [True, False]) == pytest.approx(0.025)
    assert expected_calibration_error([0.5, 0.55], [True, False]) == pytest.approx((0.5 + 0.55) / 2)


def test_halves_do_not_depend_on_the_order_of_ties():
    confidence, right = [0.9, 0.5, 0.5, 0.5], [True, True, False, False]
    # of the upper two, one is the 0.9 and one an average 0.5: (1 + 1/3) / 2
    assert halves(confidence, right) == pytest.approx((2 / 3, 1 / 3))
    assert halves([0.5, 0.5, 0.9, 0.5], [False, True, True, False]) == pytest.approx((2 / 3, 1 / 3))


def test_fit_is_monotone_and_by_hand():
    # share 0.5: 1 of 4 right, and two imagined (one right): 2 of 6; share 1: 4 of 4 and two imagined: 5 of 6
    shares, right = [0.5] * 4 + [1.0] * 4, [True, False, False, False] + [True] * 4
    assert fit_calibration(shares, right, [0, 0.25, 0.5, 0.75, 1.0]) == pytest.approx([0, 1 / 6, 1 / 3, 7 / 12, 5 / 6])
    # a higher share that was right less often is pooled: 5 of 6 and 1 of 6
    turned = fit_calibration([0.5] * 4 + [1.0] * 4, [True] * 4 + [False] * 4, [0.5, 1.0])
    assert turned == pytest.approx([0.5, 0.5])


def test_the_shipped_calibration_is_monotone_from_0_to_1():
    shares, confidences = read_calibration()
    assert (
        shares[0] == confidences[0] == 0
        and shares[-1] == 1
        and (np.diff(shares) > 0).all()
        and (np.diff(confidences) >= 0).all()
    )
    assert ((confidences >= 0) & (confidences <= 1)).all() and confidences[-1] > 0.8
    assert calibrated(0.0, (shares, confidences)) == 0
    table = (np.array([0.0, 0.5, 1.0]), np.array([0.2, 0.4, 0.9]))
    assert calibrated(0.75, table) == pytest.approx(0.65) and calibrated(0.0, table) == 0  # no vote, whatever it says


# ---- candidates


KNOWN = KnownLabels(
    {
        "B cell": KnownLabel("CL:0000236", ("blood", "lung"), 9),
        "T cell": KnownLabel("CL:0000084", ("blood",), 9),
        "club cell": KnownLabel(None, ("lung",), 9),
    },
    ["CD3D"],
)


def test_candidates_come_from_the_list_else_from_the_model_else_are_open(tmp_path):
    blood, lung = profile("1", ["G"], [1]), profile("1", ["G"], [1], sample="d2", tissue="Lung")
    found = candidates_of([blood, lung], None, KNOWN)
    assert found["d1"].labels == ["B cell", "T cell"] and found["d2"].labels == ["B cell", "club cell"]
    assert found["d1"].ontology == {"b cell": "CL:0000236", "t cell": "CL:0000084"}
    listed = tmp_path / "labels.txt"
    listed.write_text("# mine\nB cell\n mast  cell \tCL:0000097\n\n")
    own = candidates_of([blood], str(listed), KNOWN)["d1"]
    assert own.labels == ["B cell", "mast cell"] and own.ontology["mast cell"] == "CL:0000097"
    assert candidates_of([blood], "a, b", None)["d1"].labels == ["a", "b"]
    assert candidates_of([blood], ["a", "b"], None)["d1"].labels == ["a", "b"]
    assert candidates_of([blood], OPEN, KNOWN)["d1"].labels == []
    assert candidates_of([blood], None, None)["d1"].labels == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("no-such-file.txt", "no such file, and no list of labels with commas"),
        ("T cell,t  CELL", "--candidates, line 2: lists 't CELL' again; leave one out"),
        (
            "T cell,B cell;CL:0000236",
            "line 2: 'B cell;CL:0000236' holds a Cell Ontology id; write LABEL, a tab",
        ),
        ("T cell,", "lists one label, so there is nothing to choose"),
        ("T cell,B | cell", "separates answers"),
        ("T cell,<answer>", "looks like a tag"),
        ("T cell,T cells", "differ only in case, blanks, hyphens or a plural s"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(given, said):
    with pytest.raises(UserError, match="--candidates") as refused:
        candidates_of([profile("1", ["G"], [1])], given, None)
    assert said in str(refused.value)


def test_a_tissue_that_the_model_does_not_know_is_refused_by_name():
    with pytest.raises(UserError, match="knows 0 label for the tissue 'brain'.*trained on blood, lung.*--candidates"):
        candidates_of([profile("1", ["G"], [1], tissue="brain")], None, KNOWN)


def test_a_donor_of_several_tissues_gets_the_labels_of_all():
    both = [profile("0", ["G"], [1]), profile("1", ["G"], [1], tissue="lung")]
    assert candidates_of(both, None, KNOWN)["d1"].labels == sorted(KNOWN.labels)
    assert candidates_of(both[:1], None, KNOWN)["d1"].labels == KNOWN.in_tissue("blood")
    unknown = [*both, profile("2", ["G"], [1], tissue="brain")]
    with pytest.raises(UserError, match="knows 0 label for the tissue 'brain'"):
        candidates_of(unknown, None, KNOWN)
    stated = [*both[:1], profile("2", ["G"], [1], tissue="")]
    assert candidates_of(stated, None, KNOWN)["d1"].labels == sorted(KNOWN.labels)


def test_a_list_with_commas_may_be_longer_than_a_file_name_and_cuts_no_label():
    names = [f"cell type {i}" for i in range(40)]
    assert candidates_of([profile("1", ["G"], [1])], ",".join(names), None)["d1"].labels == names
    known = dataclasses.replace(KNOWN, labels=KNOWN.labels | {"T cell, resting": next(iter(KNOWN.labels.values()))})
    for given in ("CD8-positive, alpha-beta T cell,B cell", "B cell, T cell, resting"):
        with pytest.raises(UserError, match="one label. Labels with a comma in them need a file, a label a line"):
            candidates_of([profile("1", ["G"], [1])], given, known)


# ---- evidence


def test_what_a_reasoning_says_of_one_cell():
    text = "By the markers.\nCell 1: CD3D, IL7R, so T cell\nCell 2 has MS4A1. It is a B cell. Cell 1 keeps T cell."
    assert sentences_about(text, 1, 2) == "Cell 1: CD3D, IL7R, so T cell Cell 1 keeps T cell."
    assert sentences_about(text, 2, 2) == "Cell 2 has MS4A1. It is a B cell."
    assert cited("Cell 1: CD3D, (IL7R); not CD3E or HLA-DRA.", ["HLA-DRA", "CD3D", "CD3", "IL7R"]) == (
        "CD3D",
        "IL7R",
        "HLA-DRA",
    )


def test_the_rationale_is_the_answer_that_cites_most_genes(question):
    first, second = question.clusters
    genes = dict(zip(question.clusters, question.puzzle.cells, strict=True))[first]
    texts = ["Cell 1: T cell", f"Cell 1 has {genes[1]} and {genes[0]}, so T cell", f"Cell 1 has {genes[0]}, so T cell"]
    answers = [read_answer(question, answer_of(["T cell", "B cell"], text)) for text in texts]
    answers.append(read_answer(question, answer_of(["B cell", "T cell"], f"Cell 1 has {', '.join(genes)}")))
    found = rationales(answers, {first: "T cell", second: None})
    assert list(found) == [first] and found[first].cited == (genes[1], genes[0]) and found[first].cell == 1


def test_markers_for_and_against():
    found = markers_of("B Cell", ["MS4A1", "ACTB"], {"b cell": ["CD79A", "MS4A1", "CD19"]})
    assert found.found == ("MS4A1",) and found.missing == ("CD79A", "CD19") and found.known
    assert not markers_of("neuron", ["MS4A1"], {}).known


def test_text_of_a_model_is_escaped_where_genes_are_marked():
    assert highlighted("<img src=x> CD3D, CD3", ["CD3D"]) == "&lt;img src=x&gt; <mark>CD3D</mark>, CD3"


# ---- the whole, in memory


def test_over_clustered_types_share_labels_and_every_cell_gets_one(tmp_path):
    adata = clustered(["T cell", "B cell", "monocyte", "NK cell"], parts=2)
    before = adata.copy()
    found = annotate(adata, cluster_key="leiden", model=model_that(reads_markers), max_cells=3, candidates=list(TYPES))
    assert found is adata and (adata.X != before.X).nnz == 0
    assert (adata.obs["cell_type_llm"].astype(str) == adata.obs["cell_type"].astype(str)).all()
    assert adata.obs["cell_type_llm_confidence"].between(0.8, 1).all()
    assert set(adata.obs["cell_type_llm_ontology_term_id"]) == {"unknown"}
    votes = json.loads(adata.uns["cell_type_llm"]["votes"])
    assert set(votes) == set(adata.obs["leiden"].astype(str)) and all(sum(v.values()) >= 8 for v in votes.values())
    adata.write_h5ad(tmp_path / "out.h5ad")
    again = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert isinstance(again.obs["cell_type_llm"].dtype, pd.CategoricalDtype)
    assert again.uns["cell_type_llm"]["model"] == "a model"


def test_copy_leaves_the_input_alone():
    adata = clustered(["T cell", "B cell"], parts=1)
    found = annotate(
        adata, cluster_key="leiden", model=model_that(reads_markers), copy=True, candidates="T cell,B cell"
    )
    assert "cell_type_llm" in found.obs and "cell_type_llm" not in adata.obs and "cell_type_llm" not in adata.uns


def test_a_cluster_without_an_expressed_gene_is_not_asked_about(capsys):
    adata = clustered(list(TYPES), parts=1)
    rows = (adata.obs["leiden"] == "1").to_numpy()
    adata.X = scipy.sparse.csr_matrix(adata.X.toarray() * ~rows[:, None])
    model = model_that(reads_markers)
    annotate(adata, cluster_key="leiden", model=model, candidates=list(TYPES), max_cells=3, samples=4)
    assert set(adata.obs["cell_type_llm"][rows]) == {"uncertain"}
    assert set(adata.obs["cell_type_llm"][~rows]) == {TYPES[0], *TYPES[2:]}
    assert not any(
        line.endswith(": ") or line.endswith(":")
        for p in model.prompts
        for line in p.splitlines()
        if "Cell " in line[:5]
    )
    assert "no gene is expressed in the cells of 1 clusters in their sample ('1')" in capsys.readouterr().err
    adata.X = scipy.sparse.csr_matrix(adata.shape, dtype=np.float32)
    with pytest.raises(UserError):
        annotate(adata, cluster_key="leiden", model=model, candidates=list(TYPES), max_cells=3)


def test_known_labels_are_compared_in_memory_too(capsys):
    adata = clustered(list(TYPES), parts=1)
    given = {"cluster_key": "leiden", "candidates": list(TYPES), "max_cells": 3, "samples": 4}
    annotate(adata, model=model_that(reads_markers), truth_key="cell_type", **given)
    assert "for 4 of 4 clusters the best label is what most of their cells have in cell_type" in capsys.readouterr().out
    with pytest.raises(UserError, match="no obs column 'nothing'"):
        annotate(adata, model=model_that(reads_markers), truth_key="nothing", **given)
    with pytest.raises(UserError, match="base: the model is open already"):
        annotate(adata, model=model_that(reads_markers), base="somewhere", **given)


def test_a_file_that_changes_while_the_model_answers_is_not_labelled(tmp_path):
    adata = clustered(list(TYPES), parts=1)
    adata.write_h5ad(tmp_path / "mine.h5ad")

    def answers(puzzle):
        adata[::-1].copy().write_h5ad(tmp_path / "mine.h5ad")
        return reads_markers(puzzle)

    given = {"cluster_key": "leiden", "candidates": ",".join(TYPES), "max_cells": 3, "samples": 4}
    asked = AnnotateConfig(file=str(tmp_path / "mine.h5ad"), out=str(tmp_path / "out.h5ad"), model="m", **given)
    with pytest.raises(UserError, match="mine.h5ad: was changed while the model answered.*--resume"):
        annotate_file(asked, model_that(answers), "annotate")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("out.h5ad", "out.csv", ".partial"))]
    annotate_file(dataclasses.replace(asked, resume=True), model_that(reads_markers), "annotate")
    labelled = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert (labelled["cell_type_llm"].astype(str) == labelled["cell_type"].astype(str)).all()


def test_labels_and_names_in_obs_change_no_prompt():
    asked: list[list[str]] = []
    for changed in (False, True):
        adata = clustered(["T cell", "B cell", "monocyte"], parts=2)
        if changed:
            adata.obs["cell_type"] = "a secret label"
            names = {str(i): f"secret {i}" for i in range(6)}
            adata.obs["leiden"] = adata.obs["leiden"].astype(str).map(names).astype("category")
        model = model_that(reads_markers)
        annotate(adata, cluster_key="leiden", model=model, max_cells=3, candidates=list(TYPES))
        asked.append(model.prompts)
        assert "secret" not in "".join(model.prompts)
    assert asked[0] == asked[1]


def test_answers_in_a_folder_are_not_asked_again(tmp_path):
    adata = clustered(["T cell", "B cell", "monocyte"], parts=1)
    given = {"cluster_key": "leiden", "candidates": list(TYPES), "max_cells": 3, "answers": tmp_path}
    first, second = model_that(reads_markers), model_that(reads_markers)
    one = annotate(adata, model=first, copy=True, **given)
    with pytest.raises(UserError, match="holds answers of an earlier run.*--resume"):
        annotate(adata, model=second, copy=True, **given)
    two = annotate(adata, model=second, copy=True, resume=True, **given)
    assert first.prompts and not second.prompts
    assert two.obs.equals(one.obs)
    with pytest.raises(UserError, match="--resume: .* was made with temperature 1.0, and this run has 0.5"):
        annotate(adata, model=second, copy=True, resume=True, temperature=0.5, **given)
    with pytest.raises(
        UserError, match="--resume: .* was made with questions .clusters, candidates, options. .*remove"
    ):
        annotate(adata, model=second, copy=True, resume=True, seed=1, **given)


def test_the_folder_of_answers_is_free_when_annotate_returns(tmp_path):
    """Else an idle notebook would keep everybody else out."""
    from data.files import _locked

    adata, before = clustered(["T cell", "B cell"], parts=1), dict(_locked)
    model = model_that(reads_markers)
    annotate(adata, cluster_key="leiden", candidates=list(TYPES), model=model, answers=tmp_path)
    with pytest.raises(UserError, match="add --resume to use them"):
        annotate(adata, cluster_key="leiden", candidates=list(TYPES), model=model, answers=tmp_path)
    with pytest.raises(UserError, match="--resume: .* was made with temperature"):
        again = {"answers": tmp_path, "resume": True, "temperature": 0.5}
        annotate(adata, cluster_key="leiden", candidates=list(TYPES), model=model, **again)
    with pytest.raises(UserError, match="environment variable NO_SUCH holds no key"):
        far = {"endpoint": "https://far.example/v1", "key_env": "NO_SUCH", "answers": tmp_path / "new"}
        (tmp_path / "new").mkdir()
        annotate(adata, cluster_key="leiden", candidates=list(TYPES), model="m", **far)
    assert _locked == before and not list(tmp_path.rglob(".lock"))


def test_answers_that_cannot_be_used_lower_the_confidence():
    """One usable vote of eight is no certainty."""
    votes = []

    def once(puzzle):
        votes.append(puzzle)
        return reads_markers(puzzle) if len(votes) <= 5 else "no idea"

    adata = clustered(["T cell", "B cell"], parts=1)
    annotate(adata, cluster_key="leiden", candidates=list(TYPES), model=model_that(once))
    assert adata.obs["cell_type_llm_confidence"].max() < 0.5 and set(adata.obs["cell_type_llm"]) == {"uncertain"}


def test_a_model_that_names_no_candidate_ends_without_labels():
    adata = clustered(["T cell", "B cell"], parts=1)
    never = model_that(lambda puzzle: answer_of(["neuron"] * len(puzzle.cells)))
    with pytest.raises(RunError, match="none of .* answers can be used .mostly: it names no candidate"):
        annotate(adata, cluster_key="leiden", model=never, candidates=list(TYPES))
    assert "cell_type_llm" not in adata.obs


def test_answers_of_no_use_end_the_run_before_the_votes_are_asked():
    """A small model that was trained on puzzles of 3 and 4 cells names 3 labels for 2 clusters."""
    model = model_that(lambda puzzle: answer_of([*puzzle.candidates, "platelet"], ""))
    with pytest.raises(
        RunError, match=r"the answer has 3 labels for 2 cells; asked about 2 clusters at a time.*--max-cells"
    ):
        annotate(clustered(list(TYPES[:2]), parts=1), cluster_key="leiden", model=model, candidates=list(TYPES))
    # 2 passes of 2 hands of 2 labels, and none of 8 votes
    assert len(model.prompts) == 4


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"candidates": [1, 2]}, "candidates: 1 is no label; give a list of texts"),
        ({"candidates": 7}, "candidates: 7 is no label"),
        ({"adata": SimpleNamespace(obs=None)}, "adata: is a SimpleNamespace, not an AnnData; read the file"),
        ({"adata": "file.h5ad"}, "adata: is a str, not an AnnData; read the file with anndata.read_h5ad"),
        ({"sample": 4}, "sample: annotate has no such option; nearest: 'samples'"),
    ],
)
def test_arguments_of_another_kind_are_refused_in_a_sentence(changed, said):
    given = {"adata": clustered(list(TYPES), parts=1), "candidates": list(TYPES)} | changed
    with pytest.raises(UserError) as refused:
        annotate(given.pop("adata"), cluster_key="leiden", model=model_that(reads_markers), **given)
    assert str(refused.value).startswith(said)


def test_known_genes_and_a_name_without_endpoint_are_checked():
    adata = clustered(["T cell", "B cell"], parts=1)
    stranger = KnownLabels(KNOWN.labels, [f"X{i}" for i in range(500)])
    with pytest.raises(UserError, match="only 0 are in both"):
        annotate(adata, cluster_key="leiden", model=model_that(reads_markers, known=stranger))
    with pytest.raises(UserError, match="give endpoint= too"):
        annotate(adata, cluster_key="leiden", model="runs/demo/sft/model")
    with pytest.raises(UserError, match="answers: name a folder that keeps the endpoint's answers"):
        annotate(adata, cluster_key="leiden", model="m", endpoint="http://127.0.0.1:9/v1")


# ---- what is written


@pytest.fixture
def annotation():
    return annotation_of()


def annotation_of(**more):
    """Clusters 0 (T cell, 3 of 4 votes), 1 (B cell, all), 2 (monocyte, all), and "tiny", which was not asked about."""
    adata = clustered(["T cell", "B cell", "monocyte"], parts=1)
    names = adata.obs["leiden"].astype(str).to_numpy(copy=True)
    names[-2:] = "tiny"
    adata.obs["leiden"] = pd.Categorical(names)

    def unsure(puzzle):
        answer = reads_markers(puzzle)
        return answer.replace("T cell |", "monocyte |") if puzzle.id.startswith("vote-0-3-") else answer

    asked = settings(candidates=",".join(TYPES), **more)
    profiles = profiles_of(adata, "leiden", asked)
    candidates = candidates_of(profiles.profiles, asked.candidates, KNOWN)
    questions = Questions(profiles, candidates, asked)

    def ask(some, name):
        return [read_answer(q, unsure(q.puzzle)) for q in some]

    return annotate_profiles(profiles, candidates, questions, ask, asked), profiles


def test_columns_csv_and_record(annotation):
    found, profiles = annotation
    cells = np.array([*profiles.cluster_of_cell.tolist(), "", "never seen"], dtype=object)
    columns = obs_columns_of(found, cells)
    # nobody was asked about cells without a cluster: they are not uncertain, they have no label
    assert all(pd.isna(list(column)[-2:]).all() and not pd.isna(list(column)[:-2]).any() for column in columns.values())
    assert set(columns["cell_type_llm"].categories) == {cluster.label for cluster in found.clusters.values()}
    by_label = dict(zip(columns["cell_type_llm"], columns["cell_type_llm_ontology_term_id"], strict=True))
    assert by_label["B cell"] == "CL:0000236" and by_label["monocyte"] == "unknown"
    rows = list(csv.DictReader(io.StringIO(csv_of(found, {"b cell": ["CD79A", "MS4A1"]}))))
    assert [row["cluster"] for row in rows] == list(found.clusters)
    (b_cell,) = [row for row in rows if row["label"] == "B cell"]
    assert b_cell["marker_genes_found"] == "CD79A MS4A1" and float(b_cell["share_of_votes"]) == 1
    clusters = profiles.cluster_of_cell.tolist()
    first = clusters[0]
    truth = ["neuron" if cluster == first else "" for cluster in clusters]
    truth[clusters.index(first)] = "glia"
    beside = list(csv.DictReader(io.StringIO(csv_of(found, {}, agreement_of(found, "known", clusters, truth)))))
    n = clusters.count(first)
    expected = {name: ("neuron", f"{(n - 1) / n:.3f}") if name == first else ("", "") for name in found.clusters}
    assert {row["cluster"]: (row["truth"], row["truth_share"]) for row in beside} == expected
    record = record_of(found, {"model": "m", "versions": {"a": "1"}})
    assert json.loads(record["candidates"]) == list(TYPES) and json.loads(record["versions"]) == {"a": "1"}


def test_a_tie_of_a_sample_is_no_vote_for_another_label(annotation):
    cluster = next(c for c in annotation[0].clusters.values() if c.found.label == "T cell")
    votes = {"d1": Counter({"T cell": 8}), "d2": Counter({"monocyte": 4, "T cell": 4})}
    tally = dataclasses.replace(cluster.found.tally, by_sample=votes)
    tied = dataclasses.replace(cluster, found=dataclasses.replace(cluster.found, tally=tally))
    assert not [said for said in doubts_of(tied, annotation[0], {}) if "another label" in said]
    votes["d2"]["monocyte"] += 1
    assert "In 1 of 2 samples most votes are for another label (d2: monocyte)." in doubts_of(tied, annotation[0], {})


def test_symbols_of_today_are_markers_too():
    """C20orf85 and PIFO of our table are CIMIP1 and CIMAP3 in GENCODE 48."""
    label, table = "ciliated columnar cell of tracheobronchial tree", known_markers(())
    found = markers_of(label, ["CIMIP1", "PIFO", "FOXJ1"], table)
    assert found.found == ("C20orf85", "PIFO", "FOXJ1") and len(found.missing) == 10
    puzzle = Puzzle(id="p", context="", cells=[["CIMIP1", "CIMAP3"]], candidates=[label], answer=[label])
    assert overlap(puzzle, table).tolist() == [[2.0]]
    assert label in Tables([]).markers("CIMIP1")


def test_a_label_below_the_limit_is_uncertain_and_what_speaks_against_it_is_said(annotation):
    (t_cell,) = [cluster for cluster in annotation[0].clusters.values() if cluster.found.label == "T cell"]
    assert (t_cell.found.share, t_cell.found.second, t_cell.label, t_cell.ontology) == (
        *(0.75, "monocyte"),
        *("T cell", "CL:0000084"),
    )
    strict, profiles = annotation_of(min_confidence=0.96)  # 3 of 4 votes are 0.955 after calibration
    (unsure,) = [cluster for cluster in strict.clusters.values() if cluster.found.label == "T cell"]
    (sure,) = [cluster for cluster in strict.clusters.values() if cluster.found.label == "B cell"]
    assert (unsure.label, unsure.ontology, sure.label) == ("uncertain", "unknown", "B cell")
    columns = obs_columns_of(strict, profiles.cluster_of_cell)
    first = profiles.cluster_of_cell.tolist().index(unsure.cluster)
    names = ("cell_type_llm", "cell_type_llm_second", "cell_type_llm_ontology_term_id")
    assert [columns[name][first] for name in names] == ["uncertain", "monocyte", "unknown"]
    rows = {row["cluster"]: row for row in csv.DictReader(io.StringIO(csv_of(strict, {})))}
    row = rows[unsure.cluster]
    assert (row["label"], row["best_label"], row["share_of_votes"], row["second"], row["second_share"]) == (
        *("uncertain", "T cell"),
        *("0.750", "monocyte", "0.250"),
    )
    said = doubts_of(unsure, strict, {"t cell": ["FOXP3"], "monocyte": list(unsure.genes[:2])})
    assert said == [
        "1 of 4 votes are for monocyte.",
        "None of the 1 marker genes of T cell is among its listed genes.",
        "The marker table speaks more for monocyte (2 marker genes listed, against 0).",
        "It has 12 cells only.",
    ]
    (tiny,) = [cluster for cluster in strict.clusters.values() if cluster.cluster == "tiny"]
    assert tiny.label == "uncertain" and doubts_of(tiny, strict, {})[0].startswith(
        "It has too few cells in every sample"
    )


def test_agreement_and_doubts(annotation):
    found, profiles = annotation
    clusters = profiles.cluster_of_cell.tolist()
    truth = [found.clusters[c].label for c in clusters]
    wrong = clusters[0]
    truth = ["neuron" if c == wrong else t for c, t in zip(clusters, truth, strict=True)]
    of = agreement_of(found, "cell_type", clusters, truth)
    assert (of.clusters_right, of.n_clusters) == (2, 4) and of.of_cluster[wrong] == ("neuron", 1.0)
    assert of.cells_right == sum(c != wrong for c in clusters) and of.n_cells == len(clusters)
    said = doubts_of(found.clusters[wrong], found, {"t cell": ["FOXP3"], "b cell": ["FOXP3"], "monocyte": ["FOXP3"]})
    assert any("None of the 1 marker genes" in sentence for sentence in said)


def test_genes_are_ranked_as_in_the_puzzles_of_the_training_where_clusters_allow_it():
    options = {"max_cells": 4, "top_genes": 9, "drop_genes": []}
    plain = json.loads(labels_text({}, [], {**options, "rank": "expression", "profile": "cell"}))["puzzles"]
    assert plain == options, "what is usual is not recorded"
    ways = {}
    for rank, profile in (("deg", "cell"), ("hvg", "cell"), ("expression", "cluster"), ("expression", "cell")):
        text = labels_text({}, [], {**options, "rank": rank, "profile": profile})
        known = KnownLabels({}, [], None, json.loads(text)["puzzles"])
        asked = QuestionSettings(cluster_key="leiden").as_trained(known)
        ways[rank, profile] = (asked.genes_by, QuestionSettings.unlike_training(known)[:35])
    assert ways == {
        ("deg", "cell"): ("difference", ""),
        ("hvg", "cell"): ("both", "the model was trained on lists of h"),
        ("expression", "cluster"): ("both", "the model was trained on means of c"),
        ("expression", "cell"): ("both", ""),
    }
    known = KnownLabels({}, [], None, {**options, "rank": "deg"})
    assert QuestionSettings(cluster_key="leiden", genes_by="both").as_trained(known).genes_by == "both"


def test_a_fact_that_every_training_prompt_states_and_this_file_does_not_is_named(capsys):
    adata = clustered(list(TYPES), parts=1)
    adata.obs["disease"], adata.obs["tissue"] = "unknown", "blood"
    sizes = {"max_cells": 4, "top_genes": 12, "drop_genes": []}
    for states, constant, said in (
        (["disease", "tissue"], (), True),
        (["disease", "tissue"], ("disease=normal",), False),
        (["tissue"], (), False),
    ):
        known = KnownLabels(KNOWN.labels, KNOWN.genes, None, {**sizes, "states": states})
        annotate(
            adata, cluster_key="leiden", model=model_that(reads_markers, known=known), constant=constant, copy=True
        )
        note = "every prompt that the model was trained on states disease, and not all of this file do"
        assert (note in capsys.readouterr().err) == said


def test_a_model_is_asked_as_it_was_trained_unless_told_otherwise():
    trained = KnownLabels(
        KNOWN.labels, KNOWN.genes, None, {"max_cells": 4, "top_genes": 12, "drop_genes": ["ribosomal"]}
    )
    given = QuestionSettings(cluster_key="leiden", top_genes=20)
    as_trained, untrained = given.as_trained(trained), given.as_trained(None)
    assert (as_trained.max_cells, as_trained.top_genes, as_trained.drop_genes) == (4, 20, ("ribosomal",))
    assert (untrained.max_cells, untrained.top_genes, untrained.drop_genes) == (12, 20, ())
    adata = clustered(list(TYPES), parts=1)
    few = KnownLabels(
        {label: KnownLabel(None, ("blood",), 9) for label in TYPES}, ["CD3D", "LYZ"], None, trained.puzzles
    )
    model = model_that(reads_markers, known=few)
    annotate(adata, cluster_key="leiden", model=model)
    assert all(
        len(line.split(", ")) <= 12 for text in model.prompts for line in text.splitlines() if line.startswith("Cell ")
    )
    assert {text.count("\nCell ") for text in model.prompts} == {4}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_cells": 1}, "--max-cells 1: must be at least 2"),
        ({"min_confidence": 1.5}, "--min-confidence 1.5: must be at least 0 and at most 1"),
        ({"samples": 0}, "--samples 0: must be at least 1"),
        ({"truth_key": "leiden"}, "is the column of clusters"),
        ({"endpoint": "http://x/v1", "base": "b"}, "--base is for an adapter folder"),
        ({"out": "a.csv"}, "must end in .h5ad"),
        ({"out": "in.h5ad"}, "is the input"),
        ({"out": f"{__file__}/made/out.h5ad"}, f"{__file__} is a file and no folder"),
    ],
)
def test_settings_that_cannot_be(changed, said):
    given = {"file": "in.h5ad", "out": "out.h5ad", "model": "m", "cluster_key": "leiden", **changed}
    with pytest.raises(UserError) as refused:
        AnnotateConfig(**given)
    assert said in str(refused.value)


def test_all_pairs_of_clusters_meet_or_share_a_favourite():
    """Four types, two clusters each, puzzles of 4: over 8 rounds every two clusters of different types meet."""
    some = of_types([name for name in TYPES for _ in range(2)])
    belief = np.kron(np.eye(4), np.ones((2, 1)))
    of = SampleQuestions(0, some, list(TYPES), Layout(max_cells=4))
    met = Counter()
    for question in of.voting(range(8), belief):
        met.update(map(tuple, map(sorted, combinations(question.clusters, 2))))
    wanted = {(str(i), str(j)) for i, j in combinations(range(8), 2) if i // 2 != j // 2}
    assert set(met) == wanted


def test_labels_may_be_an_array_or_an_index(tmp_path):
    for given in (np.array(TYPES), pd.Index(TYPES), pd.Series(TYPES)):
        assert candidates_of([], given, None) == {}
    adata = clustered(list(TYPES), parts=1)
    found = annotate(adata, cluster_key="leiden", model=model_that(reads_markers), candidates=np.array(TYPES))
    assert set(found.obs["cell_type_llm"]) == set(TYPES)
    # ---- a matrix on disk cannot be copied
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    given = {"cluster_key": "leiden", "model": model_that(reads_markers), "candidates": list(TYPES)}
    with pytest.raises(UserError, match="its matrix is on disk"):
        annotate(backed, copy=True, **given)


@pytest.mark.parametrize("samples", [1, 8])
def test_a_confidence_of_fewer_answers_than_it_was_calibrated_with_is_said(samples):
    """One of one is a share of 1, whatever the model says."""
    given = {"cluster_key": "leiden", "model": model_that(reads_markers), "candidates": list(TYPES)}
    found = annotate(clustered(list(TYPES), parts=1), samples=samples, **given)
    assert ("calibrated with 8 answers" in str(found.uns["cell_type_llm"])) == (samples == 1)


def test_a_cluster_without_a_label_that_has_votes_is_not_said_to_have_none():
    votes = {name: Tally(Counter({"T cell": 8}), asked=8) for name in "ab"}
    found = label_clusters(votes, "always")
    (left,) = [name for name in "ab" if found[name].label is None]
    cluster = SimpleNamespace(found=found[left], profiles=("one",))
    assert doubts_of(cluster, SimpleNamespace(clusters={}), {}) == [
        "Its 8 votes are for labels that --one-to-one always gave to other clusters."
    ]


def test_scattered_votes_are_a_doubt(annotation):
    """No second label is close, and half of the votes are for others."""
    found, _ = annotation
    cluster = next(iter(found.clusters.values()))

    def doubts(votes: dict[str, int]) -> list[str]:
        tally = Tally(asked=8, votes=Counter(votes), by_sample={"d": Counter(votes)})
        best = dataclasses.replace(cluster.found, label="A", second="B", tally=tally)
        one = dataclasses.replace(cluster, found=best, n_cells=50)
        return [said for said in doubts_of(one, found, {}) if "votes are for" in said]

    assert doubts({"A": 4, "B": 1, "C": 1, "D": 1, "E": 1}) == [
        "Only 4 of 8 votes are for it; the others name 4 labels."
    ]
    assert doubts({"A": 5, "B": 1, "C": 1, "D": 1}) == []
    assert doubts({"A": 4, "B": 4}) == ["4 of 8 votes are for B."]


def test_a_list_of_a_spreadsheet_may_have_quotes(tmp_path):
    text = '"CD8-positive, alpha-beta T cell"\tCL:0000625\nB cell\n'
    (tmp_path / "labels.txt").write_text(text)
    labels, terms, _ = listed(str(tmp_path / "labels.txt"))
    assert labels == ["CD8-positive, alpha-beta T cell", "B cell"]
    assert terms == {"cd8-positive, alpha-beta t cell": "CL:0000625"}


def test_the_marker_table_says_nothing_of_mouse_genes(tmp_path):
    adata = clustered(list(TYPES), parts=1)
    adata.var_names = [name.capitalize() for name in adata.var_names]
    adata.obs["organism"] = "Mus musculus"
    adata.write_h5ad(tmp_path / "mouse.h5ad")
    config = config_of(tmp_path, "mouse.h5ad", organism="Mus musculus")
    annotate_file(config, model_that(lambda puzzle: answer_of(puzzle.candidates)), "cmd")
    page = (tmp_path / "out.html").read_text()
    assert "marker genes of" not in page and "is of human genes, and these are of another organism" in page


def test_what_a_note_advises_is_said_before_anything_is_asked(tmp_path, capsys):
    adata = clustered(list(TYPES), parts=1)
    del adata.obs["donor_id"]
    adata.obs["patient"] = "p"

    def dead(puzzle):
        raise RunError("the endpoint is out of money")

    with pytest.raises(RunError):
        annotate(adata, cluster_key="leiden", model=model_that(dead), candidates=list(TYPES), max_cells=3)
    assert "name the column of samples with --sample-key" in capsys.readouterr().err


def test_clusters_are_in_the_order_of_their_names():
    names = ["10", "2", "0", "1"]
    some = [dataclasses.replace(one, cluster=name) for name, one in zip(names, of_types(list(TYPES)[:4]), strict=True)]
    profiles = SimpleNamespace(
        profiles=some, cluster_of_cell=np.array(["12", "11", *names] * 3, dtype=object), genes=[], notes=[]
    )
    asked = settings(candidates=",".join(TYPES))
    candidates = candidates_of(some, list(TYPES), None)
    questions = Questions(profiles, candidates, asked)

    def ask(questions, stage):
        return [read_answer(one, answer_of(one.puzzle.candidates)) for one in questions]

    found = annotate_profiles(profiles, candidates, questions, ask, asked)
    assert list(found.clusters) == ["0", "1", "2", "10", "11", "12"]


def test_a_set_or_a_generator_of_labels_asks_the_same_in_every_process(tmp_path):
    adata, asked = clustered(list(TYPES), parts=1), []

    def keep(puzzle):
        asked.append(puzzle.user_message)
        return answer_of(puzzle.candidates)

    for given in (sorted(TYPES), set(TYPES), frozenset(TYPES), (name for name in sorted(TYPES))):
        asked.append("")
        given_to = {"cluster_key": "leiden", "model": model_that(keep), "max_cells": 3, "samples": 2, "screens": 1}
        annotate(adata, candidates=given, **given_to)
    first, *others = _runs(asked)
    assert first and len(others) == 3 and all(other == first for other in others)


def _runs(asked: list[str]) -> list[list[str]]:
    """The questions between the empty texts that begin each run."""
    found: list[list[str]] = []
    for text in asked:
        found.append([]) if not text else found[-1].append(text)
    return found


@pytest.mark.parametrize("edited", ["out.csv", "out.html", "out.h5ad", ""])
def test_what_its_owner_has_edited_is_not_replaced(tmp_path, edited):
    clustered(list(TYPES), parts=1).write_h5ad(tmp_path / "in.h5ad")
    config = config_of(tmp_path)
    annotate_file(config, model_that(reads_markers), "cmd")
    asked = model_that(reads_markers)
    if not edited:
        annotate_file(dataclasses.replace(config, resume=True), asked, "cmd")
        return
    if edited == "out.h5ad":
        curated = anndata.read_h5ad(tmp_path / edited)
        curated.obs["checked"] = True
        curated.write_h5ad(tmp_path / edited)
    else:
        with open(tmp_path / edited, "a") as file:
            file.write("my comment\n")
    before = (tmp_path / edited).read_bytes()
    with pytest.raises(UserError, match=f"{edited}: was changed since it was written, and would be replaced"):
        annotate_file(dataclasses.replace(config, resume=True), asked, "cmd")
    assert (tmp_path / edited).read_bytes() == before and not asked.prompts


def test_a_table_without_its_file_is_not_replaced(tmp_path):
    """Its owner has moved the .h5ad file away, as another refusal advises; nothing tells whether the table was edited."""
    clustered(list(TYPES), parts=1).write_h5ad(tmp_path / "in.h5ad")
    config = config_of(tmp_path)
    (tmp_path / "out.csv").write_text("cluster,cells,label,best_label\n")
    with pytest.raises(UserError, match="out.csv: would be replaced, and .*out.h5ad is not there; move it"):
        annotate_file(config, model_that(reads_markers), "cmd")
