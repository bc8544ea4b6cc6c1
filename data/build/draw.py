"""Which cells form a puzzle: rows of one group (a donor and experimental batch), one cell per cell type.

A row is the number of a cell in its file. N is the number of cells of a puzzle.
"""

import random
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.build.cells import Cells, Groups
from data.build.contexts import has_disease
from data.build.settings import BuildConfig
from data.build.splits import SPLITS, split_items

TRIES = 50
"""A group counts as exhausted for a size N after this many draws in a row that gave only sets of cells seen before."""

PuzzleCells = tuple[tuple[str, str], list[int]]
"""((donor, batch), [N] rows in cell order)."""


def split_groups(
    cells: Cells, groups: Groups, dataset: str, assignment: dict[str, str], config: BuildConfig
) -> tuple[dict[str, Groups], dict[str, int]]:
    """({split: groups of a file}, {reason: cells set aside}).

    assignment: {donor: split}. The unseen split has only the cells with an unseen disease; other cells of the same
    donors are set aside. With --split cell, the cells of each type and group are divided over train and test.
    """
    splits: dict[str, Groups] = {split: {} for split in SPLITS}
    for group, types in groups.items():
        if group[0] in assignment:
            splits[assignment[group[0]]][group] = types
    rows_unseen = cells.rows[_has_unseen_disease(cells, config)]
    is_unseen = np.zeros(int(cells.rows.max(initial=-1)) + 1, dtype=bool)
    is_unseen[rows_unseen] = True
    for group, types in splits["unseen"].items():
        with_disease = {cell_type: rows[is_unseen[rows]] for cell_type, rows in types.items()}
        splits["unseen"][group] = {cell_type: rows for cell_type, rows in with_disease.items() if len(rows)}
    donors = cells.columns["donor_id"]
    of_unseen_donor = np.array([assignment.get(name) == "unseen" for name in donors.names])[donors.codes]
    set_aside = {"donor has an unseen disease, the cell does not": int(of_unseen_donor.sum()) - len(rows_unseen)}
    if config.split_mode == "cell":
        # the generator is named by seed, purpose and file: the draw is the same with any number of workers
        rng = random.Random(f"{config.seed}:test cells:{dataset}")
        for group, types in list(splits["train"].items()):
            divided = {name: split_items(rows.tolist(), config.test_fraction, rng) for name, rows in types.items()}
            splits["train"][group] = {name: np.array(train) for name, (train, _) in divided.items()}
            splits["test"][group] = {name: np.array(test) for name, (_, test) in divided.items() if test}
    return splits, set_aside


def _has_unseen_disease(cells: Cells, config: BuildConfig) -> np.ndarray:
    """[C] bool: whether a cell has one of the unseen diseases."""
    disease = cells.columns["disease"]
    unseen = [has_disease(name, config.unseen_disease) for name in disease.names]
    return np.array([*unseen, False])[disease.codes]  # code -1 (not known) takes the last entry


def draw_puzzle_cells(
    groups: Groups, sizes: Sequence[int], quota: int, rng: random.Random
) -> tuple[list[PuzzleCells], dict[str, Any]]:
    """Draw the cells of at most `quota` puzzles of each size. Returns (drawn, {"quota_left", "exhausted"}).

    sizes: numbers of cells N of a puzzle. The groups take turns. A turn draws a size N (of those with quota left and
    not more than the group's cell types), then N cell types, then one cell of each type. No set of cells is drawn
    twice: after TRIES draws that gave only sets seen before, a group is exhausted for that size.

    The turns go by name, unless the quota is used up before every group with enough types has had one: names of a cohort
    begin alike and must not decide, so then the order is drawn.
    """
    beginning = rng.getstate()
    drawn, left_over = _draw_in_turn(sorted(groups), groups, sizes, quota, rng)
    able = {group for group, types in groups.items() if len(types) >= min(sizes)}
    if able <= {group for group, _ in drawn}:
        return drawn, left_over
    rng.setstate(beginning)
    return _draw_in_turn(_in_drawn_order(groups, rng), groups, sizes, quota, rng)


def _draw_in_turn(
    order: list[tuple[str, str]], groups: Groups, sizes: Sequence[int], quota: int, rng: random.Random
) -> tuple[list[PuzzleCells], dict[str, Any]]:
    """draw_puzzle_cells with the groups in a given order."""
    quota_left = dict.fromkeys(sizes, quota)
    drawn, seen, exhausted = [], set(), []
    closed: set[tuple[tuple[str, str], int]] = set()
    queue = deque(order)
    while queue:  # every turn either draws a puzzle, closes a size of a group or drops the group, so this ends
        group = queue.popleft()
        types = groups[group]
        open_sizes = [n for n in sizes if quota_left[n] and n <= len(types) and (group, n) not in closed]
        if not open_sizes:
            continue
        queue.append(group)
        n_cells = rng.choice(open_sizes)
        rows = _draw_new(types, n_cells, seen, rng)
        if rows is None:
            closed.add((group, n_cells))
            exhausted.append({"donor": group[0], "batch": group[1], "n_cells": n_cells})
        else:
            seen.add(frozenset(rows))
            drawn.append((group, rows))
            quota_left[n_cells] -= 1
    return drawn, {"quota_left": {str(n): left for n, left in quota_left.items() if left}, "exhausted": exhausted}


def _in_drawn_order(groups: Groups, rng: random.Random) -> list[tuple[str, str]]:
    """The groups in a drawn order, a donor's second batch after the first batch of every other donor."""
    order = sorted(groups)
    rng.shuffle(order)
    batches: Counter = Counter()  # of each donor so far
    turn = {}
    for group in order:
        donor, _ = group
        batches[donor] += 1
        turn[group] = batches[donor]
    return sorted(order, key=turn.__getitem__)


def _draw_new(
    types: dict[str, Sequence[int]], n_cells: int, seen: set[frozenset], rng: random.Random
) -> list[int] | None:
    """Rows of `n_cells` cells of different types whose set is not in `seen`. None after TRIES draws without one."""
    for _ in range(TRIES):
        # types are sorted before the draw: it must not depend on the order in which a file lists them
        rows = [int(rng.choice(types[cell_type])) for cell_type in rng.sample(sorted(types), n_cells)]
        if frozenset(rows) not in seen:
            return rows
    return None
