"""Leaks between sets of puzzles, ours or the published ones: shared cells, donors and batches, near-duplicate gene lists.

Published rows say neither donor nor cell, so a cell is also known by its whole ranked gene list: 491 of the 1,095
published test batches hold a cell whose list stands in the published train rows too.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from data.errors import UserError
from data.puzzles import Puzzle, cell_ids_problem, content_id

MIN_GENES = 20
"""Lists of fewer genes carry too little to tell one cell from another: they are counted, not judged."""
SAME_GENES = 90
"""Near-duplicates share at least this many percent of their genes (Jaccard index) ..."""
SAME_ORDER = 95
"""... and rank those they share alike: a Spearman correlation of at least this many percent."""
EXAMPLES = 3
_BITS = np.left_shift(np.uint64(1), np.arange(64, dtype=np.uint64))
"""A list's sketch flips one of 64 bits per gene: two sketches differ in no more bits than their lists in genes."""


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """One set of puzzles by itself."""

    name: str
    puzzles: int
    cells: int
    """Places: a cell in three puzzles counts three times."""
    distinct_cells: int
    """By source and cell id where stated, else by gene list."""
    puzzles_with_cell_ids: int
    puzzles_with_donor: int
    donors: int
    short_lists: int
    """Cells with fewer than MIN_GENES genes: not judged by their lists."""
    duplicate_puzzles: int
    """Puzzles with the batch of cells (or the prompt) of an earlier one."""
    duplicate_examples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PairFacts:
    """What the second (evaluated) set has in common with the first; its numbers count the second set's."""

    first: str
    second: str
    shared_cells: int
    """Distinct cells of the second set that are in the first, by either rule."""
    shared_by_id: int | None
    """None: one of the sets states no cell ids."""
    shared_by_list: int
    puzzles_with_shared_cell: int
    share_with_shared_cell: float
    """In [0, 1], of the second set's puzzles."""
    shared_cell_examples: tuple[str, ...]
    shared_donors: tuple[str, ...] | None
    """None: one of the sets states no donors."""
    puzzles_with_shared_donor: int
    near_duplicate_pairs: int
    near_duplicate_lists: int
    """Distinct gene lists of the second set with at least one near-duplicate in the first."""
    puzzles_with_near_duplicate: int
    near_duplicate_examples: tuple[str, ...]
    same_batches: int
    """Puzzles of the second set with the batch of cells (or the prompt) of one of the first."""
    same_batch_examples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Facts of every set and pair of sets, and what of them is a leak or a warning, one sentence each."""

    splits: tuple[SplitFacts, ...]
    pairs: tuple[PairFacts, ...]
    leaks: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with the rules that were used."""
        rules = {"min_genes": MIN_GENES, "same_genes": SAME_GENES / 100, "same_order": SAME_ORDER / 100}
        return {"rules": rules, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class _Set:
    """A set of puzzles with its cells as numbers."""

    name: str
    puzzles: Sequence[Puzzle]
    lists: list[list[int]]
    """[puzzle][cell] number of the cell's gene list; equal lists have equal numbers in all sets."""
    keys: list[list[tuple[str, str]]]
    """[puzzle][cell] (source, cell id); an empty list where the row does not state them."""
    batches: list[set]
    """[puzzle] what names its batch of cells: by id, by lists, by prompt."""

    def places(self) -> Iterator[tuple[int, int, tuple[str, str] | None, int]]:
        """(puzzle, cell, (source, id) or None, list) of every cell; puzzle and cell count from 0."""
        for p, lists in enumerate(self.lists):
            keys = self.keys[p] or [None] * len(lists)
            yield from ((p, c, keys[c], number) for c, number in enumerate(lists))

    def place(self, p: int, c: int) -> str:
        return f"{self.puzzles[p].id} cell {c + 1}"


def audit(splits: dict[str, Sequence[Puzzle]], donors_apart: bool = True) -> Audit:
    """Compare every two sets, the earlier one as what was trained on; a set by itself is looked through for duplicates.

    donors_apart: False where donors are shared on purpose (--split cell), which makes them a warning instead of a leak.
    Raises UserError, naming set and puzzle, when a puzzle has more or fewer cell ids than cells.
    """
    vocabulary: dict[str, int] = {}
    numbers: dict[tuple[int, ...], int] = {}
    sets = [_numbered(name, puzzles, vocabulary, numbers) for name, puzzles in splits.items()]
    genes = _by_rarity(list(numbers), len(vocabulary))
    facts = tuple(_split_facts(one, genes) for one in sets)
    pairs = tuple(_pair_facts(one, other, genes) for one, other in combinations(sets, 2))
    leaks, warnings = [], [sentence for one in facts for sentence in _warnings(one)]
    for pair in pairs:
        found = dict(_findings(pair, {one.name: one.puzzles for one in facts}))
        donors = found.pop("donors", None)
        leaks += found.values()
        if donors:
            (leaks if donors_apart else warnings).append(donors)
    return Audit(splits=facts, pairs=pairs, leaks=tuple(leaks), warnings=tuple(warnings))


def _numbered(name: str, puzzles: Sequence[Puzzle], vocabulary: dict[str, int], numbers: dict) -> _Set:
    """A set whose genes and gene lists are numbered through tables that all sets share; a repeated gene counts once."""
    lists, keys, batches = [], [], []
    for puzzle in puzzles:
        of_cells = []
        for cell in puzzle.cells:
            genes = tuple(dict.fromkeys([vocabulary.setdefault(gene, len(vocabulary)) for gene in cell]))
            of_cells.append(numbers.setdefault(genes, len(numbers)))
        source, ids = puzzle.meta.get("source"), puzzle.meta.get("cell_ids")
        if problem := cell_ids_problem(puzzle):
            raise UserError(f"{name}, puzzle {puzzle.id}: {problem}; remove the column or give one id per cell")
        stated = ids is not None and source is not None
        lists.append(of_cells)
        keys.append([(str(source), str(cell)) for cell in ids] if stated else [])
        batches.append({content_id(puzzle.user_message)})
        if stated and len(of_cells) > 1:  # one cell alone, with other candidates, is another puzzle
            batches[-1].add(frozenset(keys[-1]))
        if len(of_cells) > 1 and all(len(set(cell)) >= MIN_GENES for cell in puzzle.cells):
            batches[-1].add(tuple(sorted(of_cells)))
    return _Set(name, puzzles, lists, keys, batches)


def _by_rarity(lists: list[tuple[int, ...]], n_genes: int) -> list[np.ndarray]:
    """[list][rank] genes, renumbered so that gene 0 is the one that stands in fewest lists."""
    flat = np.fromiter((gene for genes in lists for gene in genes), dtype=np.int32)
    order = np.argsort(np.bincount(flat, minlength=n_genes), kind="stable")
    rarity = np.empty(n_genes, dtype=np.int32)
    rarity[order] = np.arange(n_genes, dtype=np.int32)
    ends = np.cumsum([len(genes) for genes in lists], dtype=np.int64)
    return np.split(rarity[flat], ends[:-1])


def _split_facts(one: _Set, genes: list[np.ndarray]) -> SplitFacts:
    short = {number for _, _, _, number in one.places() if len(genes[number]) < MIN_GENES}
    seen: set = set()
    repeated = []
    for puzzle, names in zip(one.puzzles, one.batches, strict=True):
        repeated += [puzzle.id] if names & seen else []
        seen |= names
    donors = _donors(one)
    return SplitFacts(
        name=one.name,
        puzzles=len(one.puzzles),
        cells=sum(map(len, one.lists)),
        distinct_cells=len({key or ((p, c) if n in short else n) for p, c, key, n in one.places()}),
        puzzles_with_cell_ids=sum(map(bool, one.keys)),
        puzzles_with_donor=sum(donor is not None for donor in donors),
        donors=len(set(donors) - {None}),
        short_lists=sum(number in short for lists in one.lists for number in lists),
        duplicate_puzzles=len(repeated),
        duplicate_examples=tuple(repeated[:EXAMPLES]),
    )


def _donors(one: _Set) -> list[str | None]:
    """[puzzle] donor id, None where the row does not state it."""
    donors = [puzzle.meta.get("donor") for puzzle in one.puzzles]
    return [None if donor is None else str(donor) for donor in donors]


def _pair_facts(one: _Set, other: _Set, genes: list[np.ndarray]) -> PairFacts:
    keys: dict[tuple[str, str] | None, tuple[int, int]] = {}
    lists: dict[int, tuple[int, int]] = {}
    for p, c, key, number in one.places():
        keys.setdefault(key, (p, c))
        lists.setdefault(number, (p, c))
    keys.pop(None, None)
    by_id, by_list, hit_puzzles, hit_cells, examples = set(), set(), set(), set(), []
    for p, c, key, number in other.places():
        same_list = number in lists and len(genes[number]) >= MIN_GENES
        if key not in keys and not same_list:
            continue
        by_id |= {key} & keys.keys()
        by_list |= {number} if same_list else set()
        hit_cells.add(key or number)
        if p not in hit_puzzles and len(examples) < EXAMPLES:
            first, rule = (keys[key], f"cell id {key[1]}") if key in keys else (lists[number], "same gene list")
            examples.append(f"{other.place(p, c)} = {one.place(*first)}, {rule}")
        hit_puzzles.add(p)
    ids_stated = any(one.keys) and any(other.keys)
    return PairFacts(
        first=one.name,
        second=other.name,
        shared_cells=len(hit_cells),
        shared_by_id=len(by_id) if ids_stated else None,
        shared_by_list=len(by_list),
        puzzles_with_shared_cell=len(hit_puzzles),
        share_with_shared_cell=len(hit_puzzles) / max(1, len(other.puzzles)),
        shared_cell_examples=tuple(examples),
        **_donor_facts(one, other),
        **_near_facts(one, other, genes),
        **_batch_facts(one, other),
    )


def _donor_facts(one: _Set, other: _Set) -> dict[str, Any]:
    firsts, seconds = set(_donors(one)) - {None}, _donors(other)
    if not firsts or not any(donor is not None for donor in seconds):
        return {"shared_donors": None, "puzzles_with_shared_donor": 0}
    shared = firsts & set(seconds)
    return {
        "shared_donors": tuple(sorted(shared)),
        "puzzles_with_shared_donor": sum(donor in shared for donor in seconds),
    }


def _batch_facts(one: _Set, other: _Set) -> dict[str, Any]:
    seen = {name: i for i, names in reversed(list(enumerate(one.batches))) for name in names}
    same = []
    for puzzle, names in zip(other.puzzles, other.batches, strict=True):
        firsts = [seen[name] for name in names if name in seen]
        same += [f"{puzzle.id} = {one.puzzles[min(firsts)].id}"] if firsts else []
    return {"same_batches": len(same), "same_batch_examples": tuple(same[:EXAMPLES])}


def _near_facts(one: _Set, other: _Set, genes: list[np.ndarray]) -> dict[str, Any]:
    firsts: dict[int, tuple[int, int]] = {}
    for p, c, _, number in one.places():
        firsts.setdefault(number, (p, c))
    seconds = sorted({number for lists in other.lists for number in lists})
    n_pairs, best = 0, {}
    for second, found, jaccard, spearman in near_duplicates(genes, sorted(firsts), seconds):
        n_pairs += len(found)
        best[second] = max(zip(jaccard, spearman, -found, strict=True))
    examples, puzzles = [], set()
    for p, c, _, number in other.places():
        if number in best and p not in puzzles:
            puzzles.add(p)
            jaccard, spearman, first = best[number]
            alike = f"{jaccard:.2f} of the genes, rank correlation {spearman:.3f}"
            examples.append(f"{other.place(p, c)} ~ {one.place(*firsts[-first])} ({alike})")
    return {
        "near_duplicate_pairs": n_pairs,
        "near_duplicate_lists": len(best),
        "puzzles_with_near_duplicate": len(puzzles),
        "near_duplicate_examples": tuple(examples[:EXAMPLES]),
    }


def near_duplicates(
    genes: list[np.ndarray], firsts: Sequence[int], seconds: Sequence[int]
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(second, its near-duplicates among the firsts, their Jaccard indices and Spearman correlations), all [k >= 1].

    genes: [list][rank] distinct genes per list, numbered from 0, the rarer the lower; firsts, seconds: numbers of lists.
    Exact: two lists that share at least t genes share one among the len - t + 1 rarest of either, so only lists that meet
    there are compared (prefix filtering), and of those only the ones whose parity sketches allow it. Lists of fewer than
    MIN_GENES genes and a list with itself are left out.
    """
    length = np.array([len(row) for row in genes], dtype=np.int64)
    firsts, seconds = (np.array([n for n in ns if length[n] >= MIN_GENES], dtype=np.int64) for ns in (firsts, seconds))
    if not len(firsts) or not len(seconds):
        return
    n_genes = 1 + max(int(genes[n].max()) for ns in (firsts, seconds) for n in ns)
    sketch = np.array([np.bitwise_xor.reduce(_BITS[row % len(_BITS)], initial=0) for row in genes], dtype=np.uint64)
    rank = np.full(n_genes + 1, -1, dtype=np.int32)  # the last entry is the padding's
    for size in np.unique(length[seconds]).tolist():
        near = firsts[100 * np.minimum(length[firsts], size) >= SAME_GENES * np.maximum(length[firsts], size)]
        if not len(near):
            continue
        need = -(-SAME_GENES * (length[near] + size) // (100 + SAME_GENES))  # fewest shared genes for the Jaccard index
        table = np.full((len(near), int(length[near].max())), n_genes, dtype=np.int32)
        table[np.arange(table.shape[1]) < length[near][:, None]] = np.concatenate([genes[n] for n in near])
        rows, starts = _rows_by_gene(table, length[near] - need + 1, n_genes)
        may_differ, sketches = length[near] + size - 2 * need, sketch[near]
        for second in seconds[length[seconds] == size]:
            rarest = np.sort(genes[second])[: size - need.min() + 1]
            meet = np.concatenate([rows[starts[gene] : starts[gene + 1]] for gene in rarest])
            meet = np.unique(meet[np.bitwise_count(sketches[meet] ^ sketch[second]) <= may_differ[meet]])
            meet = meet[near[meet] != second]
            if len(meet):
                rank[genes[second]] = np.arange(size)
                found, jaccard, spearman = _alike(rank[table[meet]], length[near[meet]], size)
                rank[genes[second]] = -1
                if len(found):
                    yield int(second), near[meet[found]], jaccard, spearman


def _rows_by_gene(table: np.ndarray, n_rarest: np.ndarray, n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows of the table gene by gene, where each gene's rows start); a row stands under its n_rarest rarest genes."""
    rarest = np.sort(table, axis=1)[:, : n_rarest.max()]
    rows, columns = np.nonzero(np.arange(rarest.shape[1]) < n_rarest[:, None])
    listed = rarest[rows, columns]
    order = np.argsort(listed, kind="stable")
    return rows[order], np.searchsorted(listed[order], np.arange(n_genes + 1))


def _alike(ranks: np.ndarray, lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows that are near-duplicates, their Jaccard indices, their Spearman correlations); decided in whole numbers.

    ranks: [rows][rank in the first list] rank of that gene in the second list, -1 where it lacks the gene.
    """
    shared = (ranks >= 0).sum(1)
    union = lengths + size - shared
    keep = 100 * shared >= SAME_GENES * union
    rows, ranks, shared, union = np.flatnonzero(keep), ranks[keep], shared[keep].astype(np.int64), union[keep]
    common = ranks >= 0
    in_first = np.cumsum(common, axis=1) - 1
    in_second = np.argsort(np.argsort(np.where(common, ranks, np.iinfo(np.int32).max), axis=1), axis=1)
    squares = (np.where(common, in_first - in_second, 0) ** 2).sum(1)
    span = shared * (shared**2 - 1)
    keep = 600 * squares <= (100 - SAME_ORDER) * span
    return rows[keep], (shared / union)[keep], (1 - 6 * squares / np.maximum(1, span))[keep]


def _findings(pair: PairFacts, n_puzzles: dict[str, int]) -> Iterator[tuple[str, str]]:
    """(kind, sentence) of each leak of a pair."""
    first, second = pair.first, pair.second

    def of(count: int) -> str:
        return f"{_share(count, n_puzzles[second])} of {second}"

    if pair.same_batches:
        batch = f"the batch of cells, or the prompt, of a puzzle of {first}"
        yield "batches", f"{of(pair.same_batches)} with {batch}{_examples(pair.same_batch_examples)}"
    if pair.shared_cells:
        rules = f"{_number(pair.shared_by_list, 'same gene list')}"
        if pair.shared_by_id is not None:
            rules = f"{pair.shared_by_id} by cell id, {rules}"
        cells = f"a cell that {first} has too: {_number(pair.shared_cells, 'distinct cell')}, {rules}"
        yield "cells", f"{of(pair.puzzles_with_shared_cell)} with {cells}{_examples(pair.shared_cell_examples)}"
    if pair.shared_donors:
        donors = f"a donor that {first} has too: {_number(len(pair.shared_donors), 'donor')}"
        shown = _examples(pair.shared_donors[:EXAMPLES])
        yield "donors", f"{of(pair.puzzles_with_shared_donor)} from {donors}{shown}"
    if pair.near_duplicate_lists:
        lists = f"a gene list that {first} has almost alike: {_number(pair.near_duplicate_lists, 'distinct list')}"
        yield "lists", f"{of(pair.puzzles_with_near_duplicate)} with {lists}{_examples(pair.near_duplicate_examples)}"


def _warnings(one: SplitFacts) -> Iterator[str]:
    """What is odd in one set, and what could not be judged."""
    if one.duplicate_puzzles:
        share = _share(one.duplicate_puzzles, one.puzzles)
        shown = _examples(one.duplicate_examples)
        yield f"duplicate puzzles: {share} of {one.name} with the batch of cells, or the prompt, of an earlier one{shown}"
    if one.puzzles_with_donor < one.puzzles:
        share = _share(one.puzzles - one.puzzles_with_donor, one.puzzles)
        yield f"donors not stated: {share} of {one.name}, so donors that they share with other sets are not seen"
    if one.puzzles_with_cell_ids < one.puzzles:
        share = _share(one.puzzles - one.puzzles_with_cell_ids, one.puzzles)
        yield f"cell ids not stated: {share} of {one.name}, whose cells are known by their gene lists alone"
    if one.short_lists:
        cells = f"{one.short_lists} of {_number(one.cells, 'cell')} of {one.name} list fewer than {MIN_GENES} genes"
        yield f"short lists: {cells}, too few to tell cells apart by"


def _share(count: int, total: int) -> str:
    """'all 90 puzzles', '12 of 90 puzzles (13.3 %)'"""
    if count == total > 1:
        return f"all {total} puzzles"
    return f"{count} of {_number(total, 'puzzle')} ({100 * count / total:.1f} %)"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _examples(shown: Sequence[str]) -> str:
    return f" (for example {'; '.join(shown)})"
