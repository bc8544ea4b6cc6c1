"""The obs columns of a file that is to be annotated: clusters, samples, and the facts that a context states.

C is the number of cells of the file.
"""

import os
import re
from dataclasses import dataclass

import numpy as np

from data.build.cells import (
    FREE_TEXT,
    NUMERIC_REFUSED,
    count_cells,
    notes_on_tissue_type,
    one_organism,
    organism_name,
    read_in_words,
    read_organisms,
    resolve_columns,
)
from data.build.columns import Column, is_number
from data.build.contexts import CONTEXT_COLUMNS, TISSUES
from data.build.h5ad import nearest_names, obs_columns, read_obs
from data.clusters.settings import ProfileSettings
from data.errors import UserError
from data.formats.memory import InMemory
from data.inspection.columns import CLUSTER_NAME, FEW, guessed_column, obs_facts, plain
from data.meaning.labels import only_codes
from data.meaning.words import ages_in_words, suspension_kind

Source = str | os.PathLike | InMemory
SAMPLE, SUSPENSION, DATASET = "donor_id", "suspension_type", "dataset_id"
FEWEST_PER_CLUSTER = 2
"""A column with fewer cells per value than this, on average, names cells and no clusters."""


@dataclass(frozen=True)
class ClusteredCells:
    """The cells of a file: clusters, samples and facts. A code is -1 where a value is not known."""

    clusters: Column
    """[C]"""
    samples: Column
    """[C] donor or sample."""
    usable: np.ndarray
    """[C] bool: the cluster is known, and the organism is the one that the model knows."""
    facts: dict[str, Column]
    """{context column: [C] values}."""
    organism: str | None
    """Of the usable cells; None when the file does not state it."""
    notes: list[str]


def read_clustered_cells(source: Source, cluster_key: str, settings: ProfileSettings) -> ClusteredCells:
    """Read the obs columns. Raises UserError for a column that is missing or holds no clusters, or for the organism."""
    clusters, notes = read_clusters(source, cluster_key)
    n_cells = len(clusters.codes)
    samples, more = _read_samples(source, cluster_key, settings, n_cells)
    notes += more
    usable = clusters.codes >= 0
    organisms = read_organisms(source, n_cells)
    if organisms is not None:
        usable, more = _of_organism(source, organisms, usable, settings.organism)
        notes += more
    columns, supplied, more = resolve_columns(source, settings.column_keys, settings.constants, required=())
    columns = {name: key for name, key in columns.items() if name in CONTEXT_COLUMNS}
    facts, in_words = read_in_words(source, columns, supplied, n_cells)
    notes += [*more, *in_words]
    organism = one_organism(source, organisms[np.flatnonzero(usable)]) if organisms is not None else None
    # other animals are not counted in years
    if "development_stage" in facts and (organism or organism_name(settings.organism)) == "Homo sapiens":
        facts["development_stage"], more = ages_in_words(facts["development_stage"])
        notes += more
    for name in (*NUMERIC_REFUSED, *FREE_TEXT):
        held = only_codes(facts[name])[0] if name in columns else ""
        if held:
            del facts[name]
            notes.append(f"the obs column {columns[name]!r} holds only {held}: no context states it")
    rows = np.flatnonzero(usable)
    notes += notes_on_tissue_type(source, rows)
    notes += _notes_on_nuclei(source, rows)
    return ClusteredCells(clusters, samples, usable, facts, organism, notes)


def read_clusters(source: Source, key: str) -> tuple[Column, list[str]]:
    """([C] the cluster of each cell, notes). Raises UserError for a column that is missing or holds no clusters."""
    if not key:
        raise UserError(f"{source}: name its column of clusters with --cluster-key{_columns_of_clusters(source)}")
    if key not in obs_columns(source):
        raise UserError(
            f"{source}: no obs column {key!r} (nearest: {nearest_names(key, obs_columns(source))}); name the column of "
            f"clusters with --cluster-key{_columns_of_clusters(source)}"
        )
    n_cells, column = count_cells(source), read_obs(source, [key])[key]
    counts = column.counts()
    n_known = sum(counts.values())
    other = f"name another column with --cluster-key{_columns_of_clusters(source, key)}"
    if not counts:
        raise UserError(f"{source}: the obs column {key!r} has no known value; {other}")
    if len(counts) == 1:
        raise UserError(
            f"{source}: the obs column {key!r} has one value only ({next(iter(counts))!r}), so it divides no cells; "
            f"cluster the cells (scanpy.tl.leiden), or {other}"
        )
    if n_known < FEWEST_PER_CLUSTER * len(counts):
        raise UserError(
            f"{source}: the obs column {key!r} has {len(counts):,} values for {n_known:,} cells, so it names cells and no "
            f"clusters; {other}"
        )
    if len(counts) > FEW and not CLUSTER_NAME.search(plain(key)) and all(map(is_number, counts)):
        raise UserError(
            f"{source}: the obs column {key!r} holds {len(counts):,} different numbers, so it is a measurement and no "
            f"clusters (or rename it, so that its name holds 'cluster'); {other}"
        )
    if n_known == n_cells:
        return column, []
    said = f" ({', '.join(map(repr, column.placeholders[:3]))})" if any(column.placeholders) else ""
    return column, [f"{n_cells - n_known} cells have no known cluster{said}: they get no profile"]


def _columns_of_clusters(source: Source, but: str | None = None) -> str:
    """The columns that look like clusterings, for a message. Looks at every column, so only for a message."""
    facts = [column for column in obs_facts(source)[1] if column.name != but]
    named = [c.name for c in facts if CLUSTER_NAME.search(plain(c.name)) and c.kind in ("clusters", "labels")]
    likely = named + [c.name for c in facts if c.kind == "clusters" and c.name not in named]
    return f" (columns that look like clusters: {', '.join(map(repr, likely[:5]))})" if likely else ""


def _read_samples(
    source: Source, cluster_key: str, settings: ProfileSettings, n_cells: int
) -> tuple[Column, list[str]]:
    """([C] the donor or sample of each cell, notes)."""
    key, present = settings.sample_key or SAMPLE, obs_columns(source)
    if key == cluster_key and settings.sample_key:
        raise UserError(f"--sample-key {key}: is the column of clusters; name the column of donors or samples")
    if key in present:
        column = read_obs(source, [key])[key]
        n_unknown = int((column.codes < 0).sum())
        notes = [f"{n_unknown} cells have no known {key!r}: they count as one sample"] if n_unknown else []
        return column, notes + ([] if settings.sample_key else _notes_on_datasets(source, column, present))
    if settings.sample_key:
        raise UserError(
            f"{source}: no obs column {key!r} (nearest: {nearest_names(key, present)}); name the column of donors or "
            "samples with --sample-key"
        )
    likely = guessed_column(SAMPLE, obs_facts(source)[1], {cluster_key})
    hint = f" (perhaps {likely!r})" if likely else ""
    note = (
        f"no obs column {SAMPLE!r}: all cells count as one sample; name the column of samples with --sample-key{hint}"
    )
    return Column(np.full(n_cells, -1, dtype=np.int32), []), [note]


def _notes_on_datasets(source: Source, donors: Column, present: list[str]) -> list[str]:
    """A note where one name of a donor stands in several data sets of CELLxGENE, in which it may mean several people."""
    if DATASET not in present:
        return []
    datasets = read_obs(source, [DATASET])[DATASET]
    known = (donors.codes >= 0) & (datasets.codes >= 0)
    pairs = np.unique(np.stack([donors.codes[known], datasets.codes[known]]), axis=1)
    again = int((np.bincount(pairs[0], minlength=1) > 1).sum())
    if not again:
        return []
    return [
        f"{again} of the donors are in several data sets ({DATASET}), in which one name may mean several people: if it does, "
        "make a column of both names, and give it with --sample-key"
    ]


def _of_organism(source: Source, organisms: Column, usable: np.ndarray, wanted: str) -> tuple[np.ndarray, list[str]]:
    """([C] bool: usable cells that are not of another organism, notes). Raises UserError when none is left."""
    held = organisms[np.flatnonzero(usable)].counts()
    of_it = organisms.where(lambda name: name.lower() == organism_name(wanted).lower()) | (organisms.codes < 0)
    if not (usable & of_it).any():
        found = sorted(held)
        raise UserError(f"{source}: holds cells of {', '.join(found)}; {remedy_for_organism(found[0], wanted)}")
    n_others = int((usable & ~of_it).sum())
    others = ", ".join(sorted(name for name in held if name.lower() != organism_name(wanted).lower()))
    return usable & of_it, [f"{n_others} cells of {others} get no profile"] if n_others else []


def remedy_for_organism(found: str, wanted: str) -> str:
    """What to do with cells of another organism than the model's, for a message."""
    return (
        f"the model knows the genes of {wanted}: rename the genes to their orthologs there (and the organism, where the file "
        f"states it), or give --organism {found!r} for a model that was trained on it"
    )


def _notes_on_nuclei(source: Source, rows: np.ndarray) -> list[str]:
    """A note when cells are nuclei, whose genes differ from those of whole cells."""
    if SUSPENSION not in obs_columns(source):
        return []
    column = read_obs(source, [SUSPENSION])[SUSPENSION][rows]
    n_nuclei = int(column.where(lambda name: suspension_kind(name) == "nucleus").sum())
    if not n_nuclei:
        return []
    return [
        f"{n_nuclei} of {len(rows)} cells are nuclei ({SUSPENSION}): a model that was trained on whole cells alone may know "
        "them less well"
    ]


def facts_of_samples(cells: ClusteredCells) -> tuple[dict[int, dict[str, str]], list[str]]:
    """({code of a sample: {context column: value}} of what all usable cells of the sample agree on, notes).

    All puzzles of a sample have one context, so a fact on a part of its cells, or known for a part, is left out.
    """
    rows = np.flatnonzero(cells.usable)
    samples = cells.samples.codes[rows]
    facts: dict[int, dict[str, str]] = {code: {} for code in np.unique(samples).tolist()}
    notes = []
    for name in CONTEXT_COLUMNS:
        if name not in cells.facts:
            continue
        column = cells.facts[name][rows]
        known = column.codes >= 0
        # one number for each pair: np.unique is slow on two rows of a million
        pairs = np.unique((samples[known] + 1) * np.int64(len(column.names)) + column.codes[known])
        values: dict[int, list[int]] = {}
        for pair in pairs.tolist():
            values.setdefault(pair // len(column.names) - 1, []).append(pair % len(column.names))
        partly = set(np.unique(samples[~known]).tolist()) & values.keys()
        for sample, codes in values.items():
            if len(codes) == 1 and sample not in partly:
                facts[sample][name] = column.names[codes[0]]
        mixed = {sample for sample, codes in values.items() if len(codes) > 1}
        for found, how in ((mixed, "differs"), (partly - mixed, "is known for a part of the cells only")):
            where = f"in {len(found)} of {len(facts)} samples" if len(facts) > 1 else "of the file"
            if found:
                notes.append(f"the {name.replace('_', ' ')} {how} {where}: no context states it there")
    for of_sample in facts.values():
        if "tissue" not in of_sample:  # some columns are worded for a tissue: "no reported skin condition"
            for (name, values), _ in TISSUES.items():
                if name in of_sample and re.fullmatch(values, of_sample[name], re.IGNORECASE):
                    del of_sample[name]
    return facts, notes


def most_common(column: Column) -> str:
    """The value of most cells; the first in alphabetical order of several, "" where no value is known."""
    counts = column.counts()
    return min(counts, key=lambda name: (-counts[name], name), default="")


def tissue_of(cells: ClusteredCells, rows: np.ndarray) -> str:
    """The tissue of most of some cells, "" where it is not known."""
    return most_common(cells.facts["tissue"][rows]) if "tissue" in cells.facts else ""
