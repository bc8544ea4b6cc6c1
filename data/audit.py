"""Leaks between sets of puzzles, ours or published: shared cells, donors and batches, near-duplicate gene lists.

Published rows state neither donor nor cell id. So a cell is also identified by its whole ranked gene list: 491 of the
1,095 published test batches hold a cell whose list is in the published train rows too.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError
from data.files import parse_json
from data.near_duplicates import MIN_GENES, SAME_GENES, SAME_ORDER, near_duplicates
from data.puzzles import Puzzle, cell_ids_problem, content_id

EXAMPLES = 3
"""Examples that a sentence about a leak names."""


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """Facts about one set of puzzles."""

    name: str
    puzzles: int
    cells: int
    """A cell that is in three puzzles counts three times."""
    distinct_cells: int
    """Cells are identified by source and cell id where the row states them, else by gene list."""
    puzzles_with_cell_ids: int
    puzzles_with_donor: int
    donors: int
    short_lists: int
    """Cells with fewer than MIN_GENES genes, which are not compared by their lists."""
    duplicate_puzzles: int
    """Puzzles that repeat the batch of cells (or the prompt) of an earlier puzzle."""
    duplicate_examples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PairFacts:
    """What the second (evaluated) set shares with the first (trained on). Counts are of the second set."""

    first: str
    second: str
    shared_cells: int
    """Distinct cells of the second set that are in the first set too, by cell id or by gene list."""
    shared_by_id: int | None
    """None when one of the sets states no cell ids."""
    shared_by_list: int
    puzzles_with_shared_cell: int
    share_with_shared_cell: float
    """In [0, 1], of the second set's puzzles."""
    shared_cell_examples: tuple[str, ...]
    shared_donors: tuple[str, ...] | None
    """None when one of the sets states no donors."""
    puzzles_with_shared_donor: int
    near_duplicate_pairs: int
    near_duplicate_lists: int
    """Distinct gene lists of the second set with at least one near-duplicate in the first."""
    puzzles_with_near_duplicate: int
    near_duplicate_examples: tuple[str, ...]
    same_batches: int
    """Puzzles of the second set that have the batch of cells (or the prompt) of a puzzle of the first set."""
    same_batch_examples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Facts about every set and every pair of sets, with one sentence for each leak and each warning."""

    splits: tuple[SplitFacts, ...]
    pairs: tuple[PairFacts, ...]
    leaks: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The audit as a JSON object, with the thresholds that were used."""
        rules = {"min_genes": MIN_GENES, "same_genes": SAME_GENES / 100, "same_order": SAME_ORDER / 100}
        return {"rules": rules, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class _NumberedSplit:
    """A set of puzzles with its gene lists replaced by numbers."""

    name: str
    puzzles: Sequence[Puzzle]
    lists: list[list[int]]
    """[puzzle][cell] number of the cell's gene list; equal lists have the same number in all sets."""
    keys: list[list[tuple[str, str]]]
    """[puzzle][cell] (source, cell id); an empty list for a puzzle whose row does not state them."""
    batches: list[set]
    """[puzzle] everything that identifies its batch of cells: cell ids, gene lists, prompt."""

    def places(self) -> Iterator[tuple[int, int, tuple[str, str] | None, int]]:
        """(puzzle, cell, (source, id) or None, gene list) of every cell; puzzle and cell count from 0."""
        for p, lists in enumerate(self.lists):
            keys = self.keys[p] or [None] * len(lists)
            yield from ((p, c, keys[c], number) for c, number in enumerate(lists))

    def place(self, p: int, c: int) -> str:
        """The name of a cell in a sentence, counted from 1."""
        return f"{self.puzzles[p].id} cell {c + 1}"


def audit(splits: dict[str, Sequence[Puzzle]], donors_apart: bool = True) -> Audit:
    """Compare every pair of sets, and look for duplicates within each set.

    splits: {name: puzzles}; in a pair, the earlier set is taken as the one that was trained on.
    donors_apart: False where donors are shared on purpose (--split cell): shared donors are then a warning, not a leak.
    Raises UserError that names set and puzzle when a puzzle has more or fewer cell ids than cells.
    """
    vocabulary: dict[str, int] = {}
    numbers: dict[tuple[int, ...], int] = {}
    numbered = [_numbered(name, puzzles, vocabulary, numbers) for name, puzzles in splits.items()]
    genes = _by_rarity(list(numbers), len(vocabulary))
    facts = tuple(_split_facts(split, genes) for split in numbered)
    pairs = tuple(_pair_facts(first, second, genes) for first, second in combinations(numbered, 2))
    leaks, warnings = [], [sentence for split in facts for sentence in _warnings(split)]
    for pair in pairs:
        found = dict(_findings(pair, {split.name: split.puzzles for split in facts}))
        donors = found.pop("donors", None)
        leaks += found.values()
        if donors:
            (leaks if donors_apart else warnings).append(donors)
    return Audit(splits=facts, pairs=pairs, leaks=tuple(leaks), warnings=tuple(warnings))


def refuse_to_replace(path: str | os.PathLike | None) -> None:
    """Raises UserError for a file that is there and is no audit, such as the report of a build. None: nothing is written."""
    if path is None or not os.path.exists(path):
        return
    if not os.path.isfile(path):
        raise UserError(f"--json {path}: is no regular file; name another file")
    if not os.path.getsize(path):
        return
    try:
        held = parse_json(Path(path).read_bytes())
    except (ValueError, OSError):
        held = None
    if not isinstance(held, dict) or not {"rules", "splits", "pairs"} <= held.keys():
        raise UserError(f"--json {path}: is no audit, and would be replaced; name another file")


def leak_lines(audited: dict[str, Any]) -> list[str]:
    """An audit in short, for the end of a build. audited: Audit.to_dict()."""
    lines = [f"leak: {leak}" for leak in audited["leaks"]] + [f"warning: {one}" for one in audited["warnings"]]
    if audited["leaks"]:
        return lines
    compared = not any(split["short_lists"] for split in audited["splits"])
    found = "donor, batch or near-duplicate list" if compared else "donor or batch (short gene lists are not compared)"
    return [*lines, f"leak audit: no shared cell, {found}"]


def _numbered(name: str, puzzles: Sequence[Puzzle], vocabulary: dict[str, int], numbers: dict) -> _NumberedSplit:
    """A set whose genes and gene lists are numbered. A gene that a list repeats counts once.

    vocabulary, numbers: {gene: number} and {gene list: number}, shared by all sets; new entries are added to them.
    """
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
        if stated and len(of_cells) > 1:  # a single cell with other candidates is another puzzle
            batches[-1].add(frozenset(keys[-1]))
        if len(of_cells) > 1 and all(len(set(cell)) >= MIN_GENES for cell in puzzle.cells):
            batches[-1].add(tuple(sorted(of_cells)))
    return _NumberedSplit(name, puzzles, lists, keys, batches)


def _by_rarity(lists: list[tuple[int, ...]], n_genes: int) -> list[np.ndarray]:
    """[list][rank] genes, renumbered so that gene 0 is the one that is in the fewest lists."""
    flat = np.fromiter((gene for genes in lists for gene in genes), dtype=np.int32)
    order = np.argsort(np.bincount(flat, minlength=n_genes), kind="stable")
    rarity = np.empty(n_genes, dtype=np.int32)
    rarity[order] = np.arange(n_genes, dtype=np.int32)
    ends = np.cumsum([len(genes) for genes in lists], dtype=np.int64)
    return np.split(rarity[flat], ends[:-1])


def _split_facts(split: _NumberedSplit, genes: list[np.ndarray]) -> SplitFacts:
    short = {number for _, _, _, number in split.places() if len(genes[number]) < MIN_GENES}
    seen: set = set()
    repeated = []
    for puzzle, names in zip(split.puzzles, split.batches, strict=True):
        repeated += [puzzle.id] if names & seen else []
        seen |= names
    donors = _donors(split)
    return SplitFacts(
        name=split.name,
        puzzles=len(split.puzzles),
        cells=sum(map(len, split.lists)),
        # a short list does not identify a cell: without an id, each such cell counts as a cell of its own
        distinct_cells=len({key or ((p, c) if n in short else n) for p, c, key, n in split.places()}),
        puzzles_with_cell_ids=sum(map(bool, split.keys)),
        puzzles_with_donor=sum(donor is not None for donor in donors),
        donors=len(set(donors) - {None}),
        short_lists=sum(number in short for lists in split.lists for number in lists),
        duplicate_puzzles=len(repeated),
        duplicate_examples=tuple(repeated[:EXAMPLES]),
    )


def _donors(split: _NumberedSplit) -> list[str | None]:
    """[puzzle] donor id, None where the row does not state it."""
    donors = [puzzle.meta.get("donor") for puzzle in split.puzzles]
    return [None if donor is None else str(donor) for donor in donors]


def _pair_facts(first: _NumberedSplit, second: _NumberedSplit, genes: list[np.ndarray]) -> PairFacts:
    # where each cell id and each gene list of the first set occurs for the first time
    keys: dict[tuple[str, str] | None, tuple[int, int]] = {}
    lists: dict[int, tuple[int, int]] = {}
    for p, c, key, number in first.places():
        keys.setdefault(key, (p, c))
        lists.setdefault(number, (p, c))
    keys.pop(None, None)
    by_id, by_list, hit_puzzles, hit_cells, examples = set(), set(), set(), set(), []
    for p, c, key, number in second.places():
        same_list = number in lists and len(genes[number]) >= MIN_GENES
        if key not in keys and not same_list:
            continue
        by_id |= {key} & keys.keys()
        by_list |= {number} if same_list else set()
        hit_cells.add(key or number)
        if p not in hit_puzzles and len(examples) < EXAMPLES:
            place, rule = (keys[key], f"cell id {key[1]}") if key in keys else (lists[number], "same gene list")
            examples.append(f"{second.place(p, c)} = {first.place(*place)}, {rule}")
        hit_puzzles.add(p)
    ids_stated = any(first.keys) and any(second.keys)
    return PairFacts(
        first=first.name,
        second=second.name,
        shared_cells=len(hit_cells),
        shared_by_id=len(by_id) if ids_stated else None,
        shared_by_list=len(by_list),
        puzzles_with_shared_cell=len(hit_puzzles),
        share_with_shared_cell=len(hit_puzzles) / max(1, len(second.puzzles)),
        shared_cell_examples=tuple(examples),
        **_donor_facts(first, second),
        **_near_facts(first, second, genes),
        **_batch_facts(first, second),
    )


def _donor_facts(first: _NumberedSplit, second: _NumberedSplit) -> dict[str, Any]:
    of_first, of_second = set(_donors(first)) - {None}, _donors(second)
    if not of_first or not any(donor is not None for donor in of_second):
        return {"shared_donors": None, "puzzles_with_shared_donor": 0}
    shared = of_first & set(of_second)
    return {
        "shared_donors": tuple(sorted(shared)),
        "puzzles_with_shared_donor": sum(donor in shared for donor in of_second),
    }


def _batch_facts(first: _NumberedSplit, second: _NumberedSplit) -> dict[str, Any]:
    seen = {name: i for i, names in reversed(list(enumerate(first.batches))) for name in names}
    same = []
    for puzzle, names in zip(second.puzzles, second.batches, strict=True):
        places = [seen[name] for name in names if name in seen]
        same += [f"{puzzle.id} = {first.puzzles[min(places)].id}"] if places else []
    return {"same_batches": len(same), "same_batch_examples": tuple(same[:EXAMPLES])}


def _near_facts(first: _NumberedSplit, second: _NumberedSplit, genes: list[np.ndarray]) -> dict[str, Any]:
    of_first: dict[int, tuple[int, int]] = {}
    for p, c, _, number in first.places():
        of_first.setdefault(number, (p, c))
    of_second = sorted({number for lists in second.lists for number in lists})
    n_pairs, best = 0, {}
    for number, found, jaccard, spearman in near_duplicates(genes, sorted(of_first), of_second):
        n_pairs += len(found)
        best[number] = max(zip(jaccard, spearman, -found, strict=True))  # among equally close lists, the lowest number
    examples, puzzles = [], set()
    for p, c, _, number in second.places():
        if number in best and p not in puzzles:
            puzzles.add(p)
            jaccard, spearman, closest = best[number]
            alike = f"{jaccard:.2f} of the genes, rank correlation {spearman:.3f}"
            examples.append(f"{second.place(p, c)} ~ {first.place(*of_first[-closest])} ({alike})")
    return {
        "near_duplicate_pairs": n_pairs,
        "near_duplicate_lists": len(best),
        "puzzles_with_near_duplicate": len(puzzles),
        "near_duplicate_examples": tuple(examples[:EXAMPLES]),
    }


def _findings(pair: PairFacts, n_puzzles: dict[str, int]) -> Iterator[tuple[str, str]]:
    """(kind, sentence) of each leak of a pair. n_puzzles: {split: number of its puzzles}"""
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


def _warnings(split: SplitFacts) -> Iterator[str]:
    """Duplicates within a set, and what could not be compared."""
    if split.duplicate_puzzles:
        share = _share(split.duplicate_puzzles, split.puzzles)
        shown = _examples(split.duplicate_examples)
        batch = "the batch of cells, or the prompt, of an earlier one"
        yield f"duplicate puzzles: {share} of {split.name} with {batch}{shown}"
    if split.puzzles_with_donor < split.puzzles:
        share = _share(split.puzzles - split.puzzles_with_donor, split.puzzles)
        yield f"donors not stated: {share} of {split.name}, so donors that they share with other sets are not seen"
    if split.puzzles_with_cell_ids < split.puzzles:
        share = _share(split.puzzles - split.puzzles_with_cell_ids, split.puzzles)
        yield f"cell ids not stated: {share} of {split.name}, whose cells are known by their gene lists alone"
    if split.short_lists:
        cells = (
            f"{split.short_lists} of {_number(split.cells, 'cell')} of {split.name} list fewer than {MIN_GENES} genes"
        )
        yield f"short lists: {cells}, too few to tell cells apart by"


def tenths(share: float) -> str:
    """A share in percent with one decimal: 0.618 -> "61.8". "0.0" and "100.0" stand for exactly 0 and 1."""
    text = f"{100 * share:.1f}"
    if text == "0.0" and share:
        return "<0.1"
    return ">99.9" if text == "100.0" and share != 1 else text


def _share(count: int, total: int) -> str:
    """For example 'all 90 puzzles' or '12 of 90 puzzles (13.3 %)'."""
    if count == total > 1:
        return f"all {total} puzzles"
    return f"{count} of {_number(total, 'puzzle')} ({tenths(count / total)} %)"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _examples(shown: Sequence[str]) -> str:
    return f" (for example {'; '.join(shown)})"


def tell_sources_apart(
    files: Sequence[str], splits: dict[str, list[Puzzle]]
) -> tuple[dict[str, list[Puzzle]], list[str]]:
    """(the splits, warnings), with different .h5ad files of one name renamed, so that equal cell ids are not confused.

    Files are different when the report.json beside the puzzles records different hashes for one name.
    files: the files that the splits were read from, in the order of the splits.
    """
    hashes = [_hashes_beside(file) for file in files]
    of_name: dict[str, set[str]] = {}
    for name, digest in chain.from_iterable(of_file.items() for of_file in hashes):
        of_name.setdefault(name, set()).add(digest)
    ambiguous = {name for name, digests in of_name.items() if len(digests) > 1}
    warnings = [
        f"{len(of_name[name])} different files are called {name} (by the report.json beside the puzzles): their cells "
        "are told apart, even where ids are alike"
        for name in sorted(ambiguous)
    ]

    def renamed(puzzle: Puzzle, of_file: dict[str, str]) -> Puzzle:
        source = puzzle.meta.get("source")
        if not isinstance(source, str) or source not in ambiguous & of_file.keys():
            return puzzle
        return dataclasses.replace(puzzle, meta=puzzle.meta | {"source": f"{source} {of_file[source]}"})

    pairs = zip(splits.items(), hashes, strict=True)
    return {name: [renamed(puzzle, of_file) for puzzle in puzzles] for (name, puzzles), of_file in pairs}, warnings


def _hashes_beside(file: str) -> dict[str, str]:
    """{.h5ad file: its hash} of the report.json beside a file of puzzles; empty where there is no such report."""
    try:
        report = parse_json((Path(file).parent / "report.json").read_text(encoding="utf-8"))
        return {str(entry["file"]): str(entry["sha256"]) for entry in report["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def audit_text(audited: Audit) -> str:
    """The audit as text: the numbers of every set, those of every pair, then warnings and leaks."""
    short = f"lists < {MIN_GENES} genes"
    rows = [("set", "puzzles", "cells", "distinct cells", "donors", "duplicate puzzles", short)]
    rows += [
        (
            split.name,
            split.puzzles,
            split.cells,
            split.distinct_cells,
            split.donors if split.puzzles_with_donor else "not stated",
            split.duplicate_puzzles,
            split.short_lists,
        )
        for split in audited.splits
    ]
    lines = _aligned(rows)
    rows = [("pair", "shared cells", "puzzles with one", "shared donors", "near-duplicate lists", "same batches")]
    rows += [
        (
            f"{pair.first} -> {pair.second}",
            pair.shared_cells,
            f"{pair.puzzles_with_shared_cell} ({tenths(pair.share_with_shared_cell)} %)",
            "not stated" if pair.shared_donors is None else len(pair.shared_donors),
            pair.near_duplicate_lists,
            pair.same_batches,
        )
        for pair in audited.pairs
    ]
    lines += ["", *_aligned(rows), ""] if audited.pairs else [""]
    lines += [f"warning: {sentence}" for sentence in audited.warnings]
    lines += [f"leak: {sentence}" for sentence in audited.leaks] or ["no leak found"] * bool(audited.pairs)
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table, with the first column aligned left and the others right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]

    def line(row: Sequence[object]) -> str:
        right = [f"{cell!s:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([f"{row[0]!s:<{widths[0]}}", *right])

    return [line(row) for row in rows]
