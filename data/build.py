"""CellPuzzles from .h5ad files: batches of N cells of one donor and experimental batch, each of another cell type.

The rules are those of the Cell-o1 paper (arXiv:2506.02911) where the authors' code differs from it: shuffled
candidates, donor-disjoint splits, no cell in two splits, no batch twice. All random choices come from one seed through
generators named by purpose, file and split, so that two runs give the same bytes whatever the order of the files.
"""

import dataclasses
import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from data import h5ad
from data.contexts import agreed_facts, context_sentence, has_disease, joined_values
from data.puzzles import Puzzle
from data.splits import audit, choose_test_donors, divide

SPLITS = ("train", "test", "unseen")
TRIES = 50
"""Draws in a row that may repeat an earlier batch before a group is taken to have no other batch of that size."""


def _setting(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A field with the text that its flag shows in launch/build.py."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """How puzzles are built. Defaults: Cell-o1 (arXiv:2506.02911) and its code."""

    seed: int = _setting(0, "Seed of every random choice.")
    min_cells: int = _setting(8, "Fewest cells (= cell types) of a puzzle.")
    max_cells: int = _setting(15, "Most cells of a puzzle.")
    top_genes: int = _setting(50, "Genes listed per cell, most expressed first.")
    puzzles_per_n: int = _setting(40, "Train puzzles per file and number of cells N.")
    test_puzzles_per_n: int = _setting(10, "Test, and unseen, puzzles per file and number of cells N.")
    split: str | None = _setting(None, "Unit of train and test, by default donor.", ("donor", "cell", "instance"))
    test_fraction: float = _setting(0.15, "Share of the donors (of the cells, of the puzzles) that goes to test.")
    unseen_disease: tuple[str, ...] = _setting((), "Disease kept out of train and test, repeatable.")
    compat: str = _setting(
        "paper", "authors: sorted candidates and the instance split of the code.", ("paper", "authors")
    )
    layer: str = _setting("auto", "X, raw, or a name in layers; auto: raw where the file has it, else X.")
    drop_genes: tuple[str, ...] = _setting((), "Gene class never listed: ribosomal or mitochondrial; repeatable.")
    gene_dropout: float = _setting(
        0.0,
        "Chance that a gene of a train cell is passed over, drawn anew per puzzle, so that few cells give many views.",
    )
    allow_scaled: bool = _setting(False, "Rank genes even where the layer holds negative values.")
    gene_key: str = _setting("feature_name", "var column with the gene names, or index.")
    cell_type_key: str = _setting("cell_type", "obs column with the cell type.")
    donor_key: str = _setting("donor_id", "obs column with the donor.")
    batch_key: str = _setting("batch", "obs column with the experimental batch; donor only where a file lacks it.")
    tissue_key: str = _setting("tissue", "obs column with the tissue.")
    disease_key: str = _setting("disease", "obs column with the disease.")
    sex_key: str = _setting("sex", "obs column with the sex.")
    development_stage_key: str = _setting("development_stage", "obs column with the development stage.")
    ethnicity_key: str = _setting("self_reported_ethnicity", "obs column with the ethnicity.")
    suspension_key: str = _setting("suspension_type", "obs column with 'cell' or 'nucleus'; only cells are kept.")
    constant: tuple[str, ...] = _setting((), "NAME=VALUE: an obs column for the files that lack it, repeatable.")

    @property
    def split_mode(self) -> str:
        return self.split or ("instance" if self.compat == "authors" else "donor")

    @property
    def column_keys(self) -> dict[str, str]:
        """{CELLxGENE obs column: what the files call it}."""
        return {name: getattr(self, flag[2:].replace("-", "_")) for name, flag in h5ad.COLUMN_FLAGS.items()}

    @property
    def constants(self) -> dict[str, str]:
        return h5ad.parse_constants(self.constant, self.column_keys)


@dataclass(frozen=True)
class Source:
    """One .h5ad file: the cells that may be used, and its part of the report."""

    path: Path
    cells: pd.DataFrame
    """As data.h5ad.read_cells gives them."""
    groups: h5ad.Groups
    report: dict[str, Any]


def build_puzzles(files: Sequence[str | Path], config: BuildConfig) -> tuple[dict[str, list[Puzzle]], dict[str, Any]]:
    """({"train": puzzles, "test": ..., "unseen": ...}, report) of one or more .h5ad files.

    Raises ValueError, in one sentence, when an option, a file or a column stands in the way.
    """
    check_config(config)
    files = tqdm(h5ad.sorted_files(files), desc="obs", unit="file", disable=None)
    sources = [read_source(path, config) for path in files]
    _refuse_if_nothing_to_build(sources, config)
    assignment = assign_donors(sources, config)
    splits: dict[str, list[Puzzle]] = {split: [] for split in SPLITS}
    for source in tqdm(sources, desc="puzzles", unit="file", disable=None):
        for split, puzzles in _puzzles_of_source(source, assignment, config).items():
            splits[split] += puzzles
    for split, puzzles in splits.items():
        splits[split] = [dataclasses.replace(p, id=f"{split}-{i:06d}") for i, p in enumerate(puzzles)]
    audit(splits, config.split_mode)
    if not splits["train"]:
        raise ValueError("no train puzzle could be built: every batch drawn holds a cell without an expressed gene")
    return splits, _report(splits, sources, config)


def check_config(config: BuildConfig) -> None:
    """Raise ValueError, naming the options, for values that cannot be meant."""
    if config.min_cells < 2:
        raise ValueError(f"--min-cells {config.min_cells}: a puzzle needs at least 2 cells")
    if config.min_cells > config.max_cells:
        raise ValueError(f"--min-cells {config.min_cells} is larger than --max-cells {config.max_cells}")
    for name in ("top_genes", "puzzles_per_n", "test_puzzles_per_n"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
    unknown = [name for name in config.drop_genes if name not in h5ad.GENE_CLASSES]
    if unknown:
        raise ValueError(f"--drop-genes {unknown[0]}: not one of {', '.join(h5ad.GENE_CLASSES)}")
    if not 0 <= config.test_fraction < 1:
        raise ValueError(f"--test-fraction {config.test_fraction}: must be at least 0 and below 1")
    if not 0 <= config.gene_dropout <= 0.5:
        raise ValueError(f"--gene-dropout {config.gene_dropout}: must be from 0 to 0.5")
    if config.gene_dropout and config.split_mode == "instance":
        raise ValueError("--gene-dropout changes train cells only, so it needs --split donor or cell, not instance")
    if config.compat == "authors" and config.split_mode != "instance":
        raise ValueError(f"--compat authors means --split instance, which contradicts --split {config.split}")


def read_source(path: Path, config: BuildConfig) -> Source:
    """The usable cells of a file. Raises ValueError when a column is absent or a label cannot stand in a puzzle."""
    cells, dropped, notes = h5ad.read_cells(path, config.column_keys, config.constants)
    h5ad.check_labels(path, cells["cell_type"].unique())
    groups = h5ad.groups_of(cells)
    report = {
        "file": path.name,
        "sha256": h5ad.sha256(path),
        "layer": h5ad.resolve_layer(path, config.layer),
        "cells_read": len(cells) + sum(dropped.values()),
        "cells_dropped": dropped,
        "cells_kept": len(cells),
        "cell_types": _counts(cells["cell_type"]),
        "donors": int(cells["donor_id"].nunique()),
        "groups": len(groups),
        "groups_skipped": {
            f"fewer than {config.min_cells} cell types": sum(len(g) < config.min_cells for g in groups.values())
        },
        "notes": notes,
    }
    return Source(path, cells, groups, report)


def _refuse_if_nothing_to_build(sources: list[Source], config: BuildConfig) -> None:
    """Note which files can give no puzzle, and raise the first reason when none can."""
    problems = []
    for source in sources:
        groups, n_types = source.groups, len(source.report["cell_types"])
        best = max(groups, key=lambda group: len(groups[group]), default=None)
        if best is None:
            reasons = ", ".join(f"{n} because {reason}" for reason, n in source.report["cells_dropped"].items() if n)
            problem = f"all {source.report['cells_read']} cells were dropped ({reasons or 'the file has none'})"
        elif n_types < config.min_cells:
            problem = f"has {n_types} cell types, fewer than --min-cells {config.min_cells}"
        elif len(groups[best]) < config.min_cells:
            problem = (
                f"no donor and batch has {config.min_cells} cell types: the best, donor {best[0]!r} batch {best[1]!r}, "
                f"has {len(groups[best])}; lower --min-cells"
            )
        else:
            continue
        problems.append(f"{source.path}: {problem}")
        source.report["notes"].append(f"gives no puzzle: {problem}")
    if len(problems) == len(sources):
        others = f" (none of the other {len(problems) - 1} files gives a puzzle either)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + others)


def assign_donors(sources: list[Source], config: BuildConfig) -> dict[str, str]:
    """{donor: split} for the donors that can give puzzles; a donor id means one donor, in whatever file it stands.

    In the cell and instance modes every donor without an unseen disease is "train": cells or puzzles are divided later.
    Raises ValueError when no cell has an unseen disease, or too few donors are left.
    """
    cells = pd.concat([source.cells[["donor_id", "tissue", "disease"]].astype(object) for source in sources])
    diseases = cells["disease"].dropna().unique()
    for name in config.unseen_disease:
        if not any(has_disease(disease, (name,)) for disease in diseases):
            raise ValueError(f"--unseen-disease {name}: no cell has it (nearest: {h5ad.nearest(name, diseases)})")
    is_unseen = {disease for disease in diseases if has_disease(disease, config.unseen_disease)}
    unseen = set(cells["donor_id"][cells["disease"].isin(is_unseen)])
    assignment = dict.fromkeys(sorted(unseen), "unseen")
    able = {d for s in sources for (d, _), types in s.groups.items() if len(types) >= config.min_cells}
    able = sorted(able - unseen)
    if not able:
        raise ValueError("every donor that can give a puzzle has an --unseen-disease: nothing is left to train on")
    assignment.update(dict.fromkeys(able, "train"))
    if config.split_mode == "donor" and config.test_fraction > 0:
        if len(able) == 1:
            only = f"only donor {able[0]!r} can give puzzles, so none is left for test"
            raise ValueError(f"{only}; use --split cell or --test-fraction 0")
        tissues = cells["tissue"].fillna("unknown").groupby(cells["donor_id"]).agg(lambda t: t.mode()[0])
        tissue_of = {donor: tissues[donor] for donor in able}
        rng = random.Random(f"{config.seed}:test donors")
        assignment.update(dict.fromkeys(choose_test_donors(tissue_of, config.test_fraction, rng), "test"))
    return assignment


def split_groups(source: Source, assignment: dict[str, str], config: BuildConfig) -> dict[str, h5ad.Groups]:
    """The groups of a file by split. Unseen holds the cells that have an unseen disease, not its donors' other cells.

    In the cell mode the cells of each type and group are divided over train and test.
    """
    splits: dict[str, h5ad.Groups] = {split: {} for split in SPLITS}
    for group, types in source.groups.items():
        if group[0] in assignment:
            splits[assignment[group[0]]][group] = types
    disease = source.cells["disease"]
    unseen = {name for name in disease.dropna().unique() if has_disease(name, config.unseen_disease)}
    rows = set(disease.index[disease.isin(unseen)])
    for group, types in splits["unseen"].items():
        with_disease = {cell_type: [row for row in of_type if row in rows] for cell_type, of_type in types.items()}
        splits["unseen"][group] = {cell_type: kept for cell_type, kept in with_disease.items() if kept}
    of_unseen_donors = source.cells["donor_id"].map(assignment.get) == "unseen"
    source.report["cells_set_aside"] = {
        "donor has an unseen disease, the cell does not": int(of_unseen_donors.sum()) - len(rows)
    }
    if config.split_mode == "cell":
        rng = random.Random(f"{config.seed}:test cells:{source.path.stem}")
        for group, types in list(splits["train"].items()):
            divided = {cell_type: divide(of_type, config.test_fraction, rng) for cell_type, of_type in types.items()}
            splits["train"][group] = {cell_type: train for cell_type, (train, _) in divided.items()}
            splits["test"][group] = {cell_type: test for cell_type, (_, test) in divided.items() if test}
    return splits


def draw_batches(
    groups: h5ad.Groups, sizes: Sequence[int], quota: int, rng: random.Random
) -> tuple[list[tuple[tuple[str, str], list[int]]], dict[str, Any]]:
    """([(group, rows in cell order)], {"quota_left", "exhausted"}): at most `quota` batches of each size.

    Round-robin over the groups; the size is drawn from those with open quota that the group has types enough for, then
    that many types, then one cell of each. No set of cells comes twice: a group whose TRIES draws of a size were all
    seen before is exhausted for that size.
    """
    quota_left = dict.fromkeys(sizes, quota)
    drawn, seen, exhausted = [], set(), []
    closed: set[tuple[tuple[str, str], int]] = set()
    queue = deque(sorted(groups))
    while queue:
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


def _draw_new(types: dict[str, list[int]], n_cells: int, seen: set[frozenset], rng: random.Random) -> list[int] | None:
    for _ in range(TRIES):
        rows = [rng.choice(types[cell_type]) for cell_type in rng.sample(sorted(types), n_cells)]
        if frozenset(rows) not in seen:
            return rows
    return None


def _puzzles_of_source(source: Source, assignment: dict[str, str], config: BuildConfig) -> dict[str, list[Puzzle]]:
    """The puzzles of a file by split, without ids; their genes are read in one pass. Completes the file's report."""
    sizes = range(config.min_cells, config.max_cells + 1)
    dataset, drawn = source.path.stem, {}
    source.report["splits"] = {split: {} for split in SPLITS}
    for split, groups in split_groups(source, assignment, config).items():
        quota = config.puzzles_per_n if split == "train" else config.test_puzzles_per_n
        rng = random.Random(f"{config.seed}:batches:{dataset}:{split}")
        drawn[split], drawing = draw_batches(groups, sizes, quota, rng)
        source.report["splits"][split] = drawing if groups else {}
    rows = sorted({row for batches in drawn.values() for _, batch in batches for row in batch})
    if not rows:
        return {}
    settings = {"layer": config.layer, "gene_key": config.gene_key, "drop": config.drop_genes}
    n_ranked = 3 * config.top_genes if config.gene_dropout else config.top_genes
    genes = h5ad.top_genes(source.path, rows, n_ranked, allow_scaled=config.allow_scaled, **settings)
    gene_lists = dict(zip(rows, genes, strict=True))
    cell_ids = dict(zip(rows, h5ad.read_cell_ids(source.path, rows), strict=True))
    puzzles = {}
    for split, batches in drawn.items():
        rng = random.Random(f"{config.seed}:candidates:{dataset}:{split}")
        made = [_puzzle(source, group, batch, gene_lists, cell_ids, config.compat, rng) for group, batch in batches]
        made = [dataclasses.replace(p, cells=_listed(p.cells, split == "train", config, rng)) for p in made]
        puzzles[split] = [puzzle for puzzle in made if all(puzzle.cells)]
        source.report["splits"][split]["puzzles_with_a_cell_without_genes"] = len(made) - len(puzzles[split])
    if config.split_mode == "instance":
        rng = random.Random(f"{config.seed}:test puzzles:{dataset}")
        by_size = [[p for p in puzzles["train"] if len(p.cells) == n_cells] for n_cells in sizes]
        divided = [divide(of_size, config.test_fraction, rng) for of_size in by_size]
        puzzles["train"], puzzles["test"] = (list(chain(*parts)) for parts in zip(*divided, strict=True))
    for split, made in puzzles.items():
        source.report["splits"][split].update(_summary(made))
    return puzzles


def _listed(ranked: list[list[str]], is_train: bool, config: BuildConfig, rng: random.Random) -> list[list[str]]:
    """[N][<= M] genes shown of each cell's ranked genes; --gene-dropout passes over some of a train cell's."""
    if is_train and config.gene_dropout:
        ranked = [[gene for gene in genes if rng.random() >= config.gene_dropout] for genes in ranked]
    return [genes[: config.top_genes] for genes in ranked]


def _puzzle(source: Source, group, rows, gene_lists, cell_ids, compat: str, rng: random.Random) -> Puzzle:
    cells = source.cells.loc[rows].astype(object)
    answer = cells["cell_type"].tolist()
    candidates = sorted(answer) if compat == "authors" else rng.sample(answer, len(answer))
    meta = {
        "dataset": source.path.stem,
        "donor": group[0],
        "batch": group[1],
        "tissue": joined_values(cells["tissue"]),
        "disease": joined_values(cells["disease"]),
        "n_cells": len(rows),
        "cell_ids": [cell_ids[row] for row in rows],
        "source": source.path.name,
    }
    context = context_sentence(agreed_facts(cells))
    genes = [gene_lists[row] for row in rows]
    return Puzzle(id="", context=context, cells=genes, candidates=candidates, answer=answer, meta=meta)


def _summary(puzzles: list[Puzzle]) -> dict[str, Any]:
    """Counts of a split for the report, each sorted by name."""
    return {
        "puzzles": len(puzzles),
        "puzzles_per_n": _counts(len(puzzle.cells) for puzzle in puzzles),
        "distinct_cells": len({(p.meta["source"], cell) for p in puzzles for cell in p.meta["cell_ids"]}),
        **{f"{key}s": _counts(puzzle.meta[key] for puzzle in puzzles) for key in ("donor", "tissue", "disease")},
        "labels": _counts(label for puzzle in puzzles for label in puzzle.answer),
    }


def _counts(values: Iterable) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _report(splits: dict[str, list[Puzzle]], sources: list[Source], config: BuildConfig) -> dict[str, Any]:
    """What was read, dropped and built; holds file names but no folders, so that it does not depend on where it ran."""
    options = {option.name: getattr(config, option.name) for option in dataclasses.fields(BuildConfig)}
    asked_for = {"test": config.test_fraction > 0, "unseen": bool(config.unseen_disease)}
    notes = [f"{split} is empty: none of its donors and batches has {config.min_cells} cell types left"
             for split, asked in asked_for.items() if asked and not splits[split]]  # fmt: skip
    files_of = Counter(donor for source in sources for donor in source.cells["donor_id"].unique())
    if shared := sorted(donor for donor, n in files_of.items() if n > 1):
        notes.append(f"taken for one donor although in several files: {', '.join(shared)}")
    return {
        "seed": config.seed,
        "options": {**options, "split": config.split_mode},
        "notes": notes,
        "files": [source.report for source in sources],
        "splits": {split: _summary(puzzles) for split, puzzles in splits.items()},
    }
