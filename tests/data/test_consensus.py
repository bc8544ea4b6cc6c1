"""The one-to-one vote over several answers, its shares and its runner-up, by hand."""

import itertools

import numpy as np
import pytest

from data.distill.consensus import best_assignment, consensus

ABC = ["A", "B", "C"]
ABCD = [*ABC, "D"]


def test_the_vote_is_one_to_one_and_shares_are_of_all_valid_answers():
    # votes: cell 1: A 3, B 1; cell 2: A 3, B 1; cell 3: C 4. One-to-one: A for one of the two, B for the other
    answers = [["A", "A", "C"], ["A", "A", "C"], ["a ", "B", "C"], ["B", "A", "C"]]
    found = consensus(answers, ABC)
    assert found.votes.tolist() == [[3, 1, 0], [3, 1, 0], [0, 0, 4]]
    assert found.labels[2] == "C" and sorted(found.labels) == ABC
    first = found.labels[0] == "A"
    assert found.shares == ([0.75, 0.25, 1.0] if first else [0.25, 0.75, 1.0])


def test_an_assignment_that_no_answer_gave_can_win():
    answers = [["A", "B", "D", "C"], ["B", "A", "C", "D"]] + [["A", "B", "C", "E"]]
    found = consensus(answers, ["A", "B", "C", "D"])
    assert found.labels == ["A", "B", "C", "D"] and found.shares == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1 / 3])
    assert found.labels not in answers


def test_strange_labels_are_no_votes_but_count_as_answers():
    found = consensus([["A", "martian"], ["A", "B"]], ["A", "B"])
    assert found.votes.tolist() == [[2, 0], [0, 1]] and found.shares == [1.0, 0.5]
    assert consensus([], ABC) is None


def test_one_cell_among_several_candidates_and_no_candidates():
    found = consensus([["B"], ["A"], ["B"]], ABC)
    assert (found.labels, found.shares, found.rival()) == (["B"], [2 / 3], [0])
    found = consensus([["x", "y"], ["z", "Y"], ["Z", "w"]], [])
    assert found.labels == ["z", "y"] and found.shares == pytest.approx([2 / 3, 2 / 3]) and found.rival() is None


def test_the_rival_is_the_second_best_assignment_and_needs_a_vote():
    answers = [ABC, ABC, ABC, ABC, ["B", "A", "C"], ["A", "C", "C"]]
    found = consensus(answers, ABC)
    assert found.votes.tolist() == [[5, 1, 0], [1, 4, 1], [0, 0, 6]]
    # chosen: 5 + 4 + 6. Cells 1 and 2 swapped: 1 + 1 + 6 = 8; 2 and 3: 5 + 1 + 0; 1 and 3: 0 + 4 + 0; the cycles at most 2
    assert found.labels == ABC and found.rival() == [1, 0, 2]
    assert consensus([ABC, ABC], ABC).rival() is None, "all agree"
    assert consensus([["A", "B"], ["A", "martian"]], ["A", "B"]).rival() is None, "the other assignment has no vote"
    assert consensus([["A"]], ["A"]).rival() is None, "there is no other assignment"


def test_among_equal_rivals_one_with_a_vote_is_taken():
    answers = [["A", "A", "A"], ["B", "A", "C"], ["A", "A", "A"]]
    found = consensus(answers, ABC)
    # 1 + 3 + 1 votes; A, B, C has 2 + 0 + 1, and C, A, B, without a vote of its own, 0 + 3 + 0
    assert found.chosen == [1, 0, 2]
    assert found.rival() == [0, 1, 2]


def test_the_rival_against_all_assignments():
    """On random votes: no assignment but the chosen one has more votes than the rival."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        answers = [[ABCD[j] for j in rng.permutation(4)] for _ in range(5)]
        found = consensus(answers, ABCD)
        totals = {columns: int(found.votes[range(4), columns].sum()) for columns in itertools.permutations(range(4))}
        assert totals[tuple(found.chosen)] == max(totals.values())
        del totals[tuple(found.chosen)]
        rival = found.rival()
        assert rival is not None and totals[tuple(rival)] == max(totals.values())


def test_best_assignment_of_a_matrix():
    assert best_assignment(np.array([[2, 3, 0], [0, 3, 1]])) == [0, 1]  # 2 + 3 against 3 + 1
