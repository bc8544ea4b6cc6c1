"""The puzzles of one .h5ad file: `summarise_file` looks at it before the donors are divided, `build_file` builds.

Each call runs in a worker process. Every random choice comes from a generator that is named by seed, purpose, file and
split, so the puzzles do not depend on the order of the files or on the number of workers.
A group is a donor and experimental batch; a row is the number of a cell in the file; N is the number of cells of a
puzzle.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data.build import h5ad
from data.build.cells import Cells, Groups, check_labels, groups_of, read_cells
from data.build.contexts import agreed_facts, context_sentence, has_disease, joined_values
from data.build.draw import PuzzleCells, draw_puzzle_cells, split_groups
from data.build.matrix import note_on_raw, open_matrix
from data.build.rank import Profile, genes_of, ranked_genes
from data.build.settings import BuildConfig
from data.build.splits import SPLITS, split_items
from data.clusters.labels import LabelCounts, count_labels
from data.formats.stores import content_sha256
from data.meaning.values import value_kind
from data.puzzles import Puzzle

HVG_CELLS = 5000
"""--rank hvg learns which genes vary from at most this many train cells, evenly spaced."""
PEER_CELLS = 256
"""--rank deg compares a cell with the mean of at most this many cells of its donor and batch, evenly spaced."""


@dataclass(frozen=True)
class FileSummary:
    """What the division of donors needs to know about a file, and the first part of the file's report."""

    path: Path
    donors: dict[str, Counter]
    """{donor: {(tissue, disease): number of usable cells}}; "unknown" where a value is missing."""
    group_sizes: dict[tuple[str, str], int]
    """{(donor, batch): number of cell types}."""
    organism: str | None
    """None when the file does not state it."""
    report: dict[str, Any]
    """The file's part of report.json so far."""
    remedies: dict[str, str]
    """{reason of the report's cells_dropped: the option that keeps these cells}."""
    labels: LabelCounts


def summarise_file(path: Path, config: BuildConfig) -> FileSummary:
    """Read obs and a sample of the matrix. Raises UserError for a column, label or layer that cannot be used."""
    cells = read_usable_cells(path, config)
    check_labels(path, (cells.columns["cell_type"].names[i] for i in np.unique(cells.columns["cell_type"].codes)))
    groups = groups_of(cells)
    donors: dict[str, Counter] = {}
    columns = [cells.columns[name] for name in ("donor_id", "tissue", "disease")]
    for key, count in Counter(zip(*(column.codes.tolist() for column in columns), strict=True)).items():
        donor, tissue, disease = (
            column.names[code] if code >= 0 else "unknown" for column, code in zip(columns, key, strict=True)
        )
        donors.setdefault(donor, Counter())[tissue, disease] += count
    with open_matrix(path, config.layer) as matrix:
        layer, kind = matrix.layer, None
        notes = [*cells.notes, *note_on_raw(matrix, config.layer)]
        if len(cells):  # also called for its errors: a bad gene column must show before hours of work
            genes = genes_of(matrix, config.rank_settings)
            notes += genes.notes
            kind = value_kind(matrix, cells.rows, config.allow_scaled, genes.is_gene)
    report = {
        "file": path.name,
        "layer": layer,
        "values": kind,
        "organism": cells.organism,
        "cells_read": cells.n_read,
        "cells_dropped": cells.dropped,
        "cells_kept": len(cells),
        "cell_types": count_sorted(
            chain.from_iterable(len(r) * [t] for types in groups.values() for t, r in types.items())
        ),
        "donors": len(donors),
        "groups": len(groups),
        "groups_skipped": {
            f"fewer than {config.min_cells} cell types": sum(len(g) < config.min_cells for g in groups.values())
        },
        "notes": notes,
    }
    sizes = {group: len(types) for group, types in groups.items()}
    return FileSummary(path, donors, sizes, cells.organism, report, cells.remedies, count_labels(path, cells))


def read_usable_cells(path: Path, config: BuildConfig) -> Cells:
    return read_cells(path, config.column_keys, config.constants, config.cell_rules)


@dataclass(frozen=True)
class _Source:
    """One file while its puzzles are built."""

    path: Path
    config: BuildConfig
    cells: Cells
    groups: Groups
    """All usable cells, before they are divided over the splits."""

    def generator(self, purpose: str, split: str = "") -> random.Random:
        """The random generator for one purpose, seeded by the build's seed, the purpose and the file's name.

        Its draws therefore do not depend on which other files are built."""
        name = ":".join(filter(None, (purpose, self.path.stem, split)))
        return random.Random(f"{self.config.seed}:{name}")


def build_file(
    path: Path,
    assignment: dict[str, str],
    kind: str | None,
    config: BuildConfig,
    advance: Callable[[int, int], None] = lambda read, total: None,
) -> tuple[dict[str, list[Puzzle]], dict[str, Any]]:
    """Build the puzzles of one file. Returns ({split: puzzles without ids}, second part of the file's report).

    assignment: {donor: split}. kind: kind of the file's values, as summarise_file found it.
    advance(cells read now, cells to read in all) is called while the matrix is read. Raises UserError as
    data.build.matrix does.
    """
    with ThreadPoolExecutor(1) as hasher:  # hashing releases the GIL: it runs beside the work below
        digest = hasher.submit(content_sha256, path)
        cells = read_usable_cells(path, config)
        source = _Source(path, config, cells, groups_of(cells))
        groups, set_aside = split_groups(cells, source.groups, path.stem, assignment, config)
        drawn, left_over = _draw(source, groups)
        members = {split: _members(groups[split], chosen, config) for split, chosen in drawn.items()}
        gene_lists = _gene_lists(source, members, kind, advance)
        puzzles = _puzzles(source, drawn, members, gene_lists)
        report = {"sha256": digest.result(), "cells_set_aside": set_aside, "splits": {s: {} for s in SPLITS}}
        report["notes"] = _note_on_lost_puzzles(puzzles, gene_lists) + _notes_on_donors_left_out(groups, drawn, config)
    for split, made in puzzles.items():
        kept = [puzzle for puzzle in made if all(puzzle.cells)]  # a cell without a listed gene cannot be told apart
        puzzles[split] = kept
        report["splits"][split] = left_over[split] | {"puzzles_with_a_cell_without_genes": len(made) - len(kept)}
    if config.split_mode == "instance":  # the authors' split: puzzles of each size are divided, cells may be shared
        rng = source.generator("test puzzles")
        sizes = range(config.min_cells, config.max_cells + 1)
        by_size = [[p for p in puzzles.get("train", []) if len(p.cells) == n_cells] for n_cells in sizes]
        divided = [split_items(of_size, config.test_fraction, rng) for of_size in by_size]
        puzzles["train"], puzzles["test"] = (list(chain(*parts)) for parts in zip(*divided, strict=True))
    for split, made in puzzles.items():
        report["splits"][split].update(split_summary(made))
    return puzzles, report


def _note_on_lost_puzzles(puzzles: dict[str, list[Puzzle]], gene_lists: dict[int, list[str]]) -> list[str]:
    """A note on the puzzles that are left out because a cell of theirs lists no gene."""
    made = [puzzle for of_split in puzzles.values() for puzzle in of_split]
    lost = sum(not all(puzzle.cells) for puzzle in made)
    empty = sum(not genes for genes in gene_lists.values())
    if not lost:
        return []
    return [
        f"{lost} of {len(made)} puzzles are left out: {empty} of the {len(gene_lists)} cells drawn have no expressed "
        "gene (or none that may be listed)"
    ]


def _notes_on_donors_left_out(
    groups: dict[str, Groups], drawn: dict[str, list[PuzzleCells]], config: BuildConfig
) -> list[str]:
    """A note for each split whose quota was used up before every donor that can give a puzzle had given one."""
    notes = []
    for split, of_split in groups.items():
        donors = {donor for (donor, _), types in of_split.items() if len(types) >= config.min_cells}
        heard = {donor for (donor, _), _ in drawn[split]}
        if heard and len(heard) < len(donors):
            option = "--puzzles-per-n" if split == "train" else "--test-puzzles-per-n"
            notes.append(
                f"{split}: its {len(drawn[split])} puzzles are of {len(heard)} of {len(donors)} donors, drawn at random; a "
                f"larger {option} takes more of them"
            )
    return notes


def _draw(source: _Source, groups: dict[str, Groups]) -> tuple[dict[str, list[PuzzleCells]], dict[str, dict[str, Any]]]:
    """({split: cells of its puzzles}, {split: the part of the quota that could not be drawn}). groups: by split."""
    config = source.config
    sizes = range(config.min_cells, config.max_cells + 1)
    drawn: dict[str, list[PuzzleCells]] = {}
    left_over: dict[str, dict[str, Any]] = {}
    for split, of_split in groups.items():
        quota = config.puzzles_per_n if split == "train" else config.test_puzzles_per_n
        choices = of_split
        if config.profile == "cluster":  # a type has one profile per group; its first cell represents it
            choices = {group: {name: rows[:1] for name, rows in types.items()} for group, types in of_split.items()}
        drawn[split], left = draw_puzzle_cells(choices, sizes, quota, source.generator("batches", split))
        left_over[split] = left if of_split else {}
    return drawn, left_over


Members = dict[int, tuple[tuple[str, str], np.ndarray]]
"""{drawn row: (its group, the rows whose mean is shown for it)}. With --profile cell these rows are the cell itself."""


def _members(groups: Groups, drawn: list[PuzzleCells], config: BuildConfig) -> Members:
    """The members of the drawn rows of one split.

    With --rank deg and --profile cluster, all types of a group have an entry, drawn or not: they are compared with each
    other.
    """
    if config.profile == "cell":
        return {row: (group, np.array([row])) for group, rows in drawn for row in rows}
    of_type = {group: {int(rows[0]): rows for rows in types.values()} for group, types in groups.items()}
    if config.rank == "deg":
        return {row: (group, rows) for group in dict(drawn) for row, rows in of_type[group].items()}
    return {row: (group, of_type[group][row]) for group, rows in drawn for row in rows}


def _gene_lists(
    source: _Source, members: dict[str, Members], kind: str | None, advance: Callable[[int, int], None]
) -> dict[int, list[str]]:
    """{drawn row: its ranked genes} for all splits together, so that the file is read as few times as possible."""
    config = source.config
    drawn = {row: member for of_split in members.values() for row, member in of_split.items()}
    groups = sorted({group for group, _ in drawn.values()})
    number = {group: i for i, group in enumerate(groups)}
    order = sorted(drawn)
    profiles = [Profile(number[drawn[row][0]], drawn[row][1]) for row in order]
    needs_peers = config.rank == "deg" and config.profile == "cell"
    peers = [_peers(source.groups[group]) for group in groups] if needs_peers else []
    # highly variable genes are learned from train cells only: test cells must not choose the genes that are shown
    train = [rows for _, rows in (members["train"] or drawn).values()]
    train_rows = np.unique(np.concatenate(train)) if train else np.zeros(0, np.int64)
    train_rows = train_rows[:: max(1, -(-len(train_rows) // HVG_CELLS))] if config.rank == "hvg" else train_rows[:0]
    total = len(np.unique(np.concatenate([p.rows for p in profiles]))) if profiles else 0
    total += sum(map(len, peers)) + len(train_rows)
    advance(0, total)
    ranked = ranked_genes(
        source.path, profiles, train_rows, peers, kind, config.rank_settings, lambda n: advance(n, total)
    )
    return dict(zip(order, ranked, strict=True))


def _peers(types: dict[str, np.ndarray]) -> np.ndarray:
    """At most PEER_CELLS rows of a group, evenly spaced. They do not depend on which cells were drawn."""
    rows = np.sort(np.concatenate(list(types.values())))
    return rows[:: -(-len(rows) // PEER_CELLS)]


def _puzzles(
    source: _Source, drawn: dict[str, list[PuzzleCells]], members: dict[str, Members], gene_lists: dict[int, list[str]]
) -> dict[str, list[Puzzle]]:
    """{split: puzzles without ids}, from the drawn rows and their gene lists."""
    rows = sorted(gene_lists)
    cell_ids = dict(zip(rows, h5ad.read_cell_ids(source.path, rows), strict=True)) if rows else {}
    puzzles = {}
    for split, of_split in drawn.items():
        rng = source.generator("candidates", split)
        # all candidates of a split are shuffled before the first gene is left out: the order of draws is pinned
        made = [_puzzle(source, chosen, members[split], cell_ids, rng) for chosen in of_split]
        shown = [[gene_lists[row] for row in batch] for _, batch in of_split]
        puzzles[split] = [
            dataclasses.replace(puzzle, cells=_listed(ranked, split == "train", source.config, rng))
            for puzzle, ranked in zip(made, shown, strict=True)
        ]
    return {split: made for split, made in puzzles.items() if made or rows}


def _listed(ranked: list[list[str]], is_train: bool, config: BuildConfig, rng: random.Random) -> list[list[str]]:
    """[N][<= M] the genes that a puzzle shows of each cell. --gene-dropout leaves out some of a train cell's genes."""
    if is_train and config.gene_dropout:
        ranked = [[gene for gene in genes if rng.random() >= config.gene_dropout] for genes in ranked]
    return [genes[: config.top_genes] for genes in ranked]


def _puzzle(
    source: _Source, chosen: PuzzleCells, members: Members, cell_ids: dict[int, str], rng: random.Random
) -> Puzzle:
    """A puzzle of the chosen cells whose gene lists are still empty."""
    (donor, batch), rows = chosen
    answer = source.cells.at(rows)["cell_type"].texts()
    candidates = sorted(answer) if source.config.compat == "authors" else rng.sample(answer, len(answer))
    profiles = [members[row][1] for row in rows]
    columns = source.cells.at(np.concatenate(profiles))
    ids = [cell_ids[row] for row in rows]
    if source.config.profile == "cluster":
        sizes = [f"{len(profile)} cell{'s' if len(profile) > 1 else ''}" for profile in profiles]
        ids = [f"mean of {size} from {name}" for size, name in zip(sizes, ids, strict=True)]
    meta = {
        "dataset": source.path.stem,
        "donor": donor,
        "batch": batch,
        "tissue": joined_values(columns["tissue"]),
        "disease": joined_values(columns["disease"]),
        "n_cells": len(rows),
        "cell_ids": ids,
        "source": source.path.name,
    }
    context = context_sentence(agreed_facts(columns))
    return Puzzle(id="", context=context, cells=[], candidates=candidates, answer=answer, meta=meta)


def split_summary(puzzles: list[Puzzle]) -> dict[str, Any]:
    """The counts of a split for the report, each sorted by name."""
    return {
        "puzzles": len(puzzles),
        "puzzles_per_n": count_sorted(len(puzzle.cells) for puzzle in puzzles),
        "distinct_cells": len({(p.meta["source"], cell) for p in puzzles for cell in p.meta["cell_ids"]}),
        **{f"{key}s": count_sorted(puzzle.meta[key] for puzzle in puzzles) for key in ("donor", "tissue", "disease")},
        "labels": count_sorted(label for puzzle in puzzles for label in puzzle.answer),
    }


def count_sorted(values: Iterable) -> dict[str, int]:
    """{value as text: how often it occurs}, sorted by value."""
    return {str(value): count for value, count in sorted(Counter(values).items())}


def unseen_donors(summary: FileSummary, names: tuple[str, ...]) -> set[str]:
    """The donors with at least one cell that has one of the diseases."""
    return {d for d, kinds in summary.donors.items() if any(has_disease(disease, names) for _, disease in kinds)}
