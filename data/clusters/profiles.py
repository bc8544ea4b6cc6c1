"""The clusters of a file of cells as mean profiles: what a model is asked about when it annotates them.

A cluster is looked at in each sample (donor) by itself, as a puzzle has the cells of one donor. A profile is the mean
over the cluster's cells of log(1 + counts per 10,000), so counts and log-normalised values give the same lists. The genes
are named, left out and ordered by the code of the builder (data/build/rank.py, data/meaning/genes.py): the list by
expression of a cluster of one cell is what a puzzle shows of this cell.

Axes: C cells of the file, U distinct genes, K profiles. Memory does not grow with C but by a few bytes a cell: rows are
read in blocks, and the sums of at most SUMS_AT_ONCE values are held at a time.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.build.cells import ORGANISMS, organism_name
from data.build.columns import Column
from data.build.contexts import context_sentence
from data.build.matrix import Matrix, note_on_raw, open_matrix
from data.build.rank import (
    COUNTS_PER_CELL,
    SAME_LEVEL,
    Genes,
    RankSettings,
    Reader,
    Scale,
    genes_of,
    log_for,
    mean_levels,
    scale_for,
)
from data.clusters.by_genes import MeansByGenes
from data.clusters.columns import (
    ClusteredCells,
    Source,
    facts_of_samples,
    read_clustered_cells,
    remedy_for_organism,
    tissue_of,
)
from data.clusters.settings import ProfileSettings, check_settings
from data.errors import UserError
from data.formats.memory import InMemory
from data.inspection.genes import gene_facts, organism_of_names
from data.meaning.values import value_kind

SUMS_AT_ONCE = 16_000_000
"""Values of mean profiles in memory at once (float64). More samples than fit are read one group after the other."""
Advance = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ClusterProfile:
    """One cluster in one sample."""

    sample: str
    """Donor or sample of these cells; "" where the file states none."""
    cluster: str
    """The cluster's name in the file. Never shown to a model."""
    n_cells: int
    by_expression: list[str]
    """Top genes of the mean profile, most expressed first; ties in the order of names, as in a puzzle."""
    by_difference: list[str]
    """Top genes by the difference from the mean of the sample's other profiles, those above it only.

    Empty for the only profile of a sample.
    """
    context: str
    """The context sentence of a puzzle: facts on which all cells of the sample agree."""
    tissue: str
    """The tissue of most of these cells; "" where it is not known."""
    mean: np.ndarray
    """[U] float32 mean of log(1 + counts per 10,000); log-normalised values are averaged as the file has them."""


@dataclass(frozen=True, kw_only=True)
class Profiles:
    """The profiles of a file, and which cell belongs to which."""

    genes: list[str]
    """[U] symbols, in alphabetical order."""
    profiles: list[ClusterProfile]
    """[K] every (sample, cluster) with at least min_cells cells, or those of `asked`; by sample, then cluster, numbers in
    their order."""
    profile_of_cell: np.ndarray
    """[C] int32 index into profiles, -1 for a cell without a profile."""
    cluster_of_cell: np.ndarray
    """[C] object: the cluster's name, "" where it is not known, and for a cell of another organism."""
    sample_of_cell: np.ndarray
    """[C] object: the sample's name, "" where it is not known."""
    values: str
    """What the matrix holds: counts, fractional counts, log counts or normalised (data/meaning/values.py)."""
    organism: str | None
    """As the file states it, or as its genes look; None when neither tells."""
    notes: list[str]
    """What a user must know, one sentence each."""


@dataclass(frozen=True)
class Asked:
    """Which profiles a model is asked about, where a file has more samples than it needs."""

    samples: int
    """Samples in which a cluster is asked about, at most; more where it is the company of another."""
    together: int
    """Clusters that a question holds."""


def read_profiles(
    file: str | os.PathLike,
    cluster_key: str,
    settings: ProfileSettings = ProfileSettings(),
    advance: Advance = lambda read, total: None,
    asked: Asked | None = None,
) -> Profiles:
    """The profiles of the clusters in an .h5ad file or a zarr store of anndata. The matrix is read in blocks.

    cluster_key: the obs column of clusters. advance(cells read now, cells to read in all) is called while the matrix is
    read. asked: which profiles are wanted; None: all. Other samples are not read. Equal input gives equal bytes.
    Raises UserError, with one sentence, for a file, a column or a matrix that cannot be used.
    """
    return _profiles(Path(file), cluster_key, settings, advance, asked)


def profiles_of(
    adata: Any,
    cluster_key: str,
    settings: ProfileSettings = ProfileSettings(),
    advance: Advance = lambda read, total: None,
    asked: Asked | None = None,
) -> Profiles:
    """read_profiles of an AnnData in memory, which is not changed: the same code, so the same numbers."""
    return _profiles(InMemory(adata), cluster_key, settings, advance, asked)


def _profiles(
    source: Source, cluster_key: str, settings: ProfileSettings, advance: Advance, asked: Asked | None
) -> Profiles:
    check_settings(settings)
    cells = read_clustered_cells(source, cluster_key, settings)
    groups = _groups(cells, settings.min_cells)
    _refuse_no_group(source, cells, groups, settings)
    wanted = asked_groups(groups, asked) if asked else set(range(len(groups)))
    all_groups = groups
    read = {groups[place].sample_code for place in wanted}  # whole samples: profiles of one are compared
    wanted_groups = {id(groups[place]) for place in wanted}
    groups = [group for group in groups if group.sample_code in read]
    facts, notes = facts_of_samples(cells)
    with open_matrix(source, settings.layer) as matrix:
        genes, organism, more = _genes(matrix, cells.organism, settings)
        notes += [*note_on_raw(matrix, settings.layer), *more]
        used = np.sort(np.concatenate([group.rows for group in groups]))
        # None: scaled values are refused, and there is no option to insist
        kind = value_kind(matrix, used, allow_scaled=None, is_gene=genes.is_gene)
        notes.append(_note_on_values(matrix, kind))
        averaged = _averages(matrix, genes, used, kind, lambda n_rows: advance(n_rows, len(used)))
        kept = _named_by_a_gene(genes)
        found = zip(groups, _lists(averaged, genes, groups, settings.top_genes), strict=True)
        # the means of all donors and clusters would be gigabytes
        lists = [(group, (*names, mean[kept])) for group, (*names, mean) in found if id(group) in wanted_groups]
        notes += _notes_on_silent(source, lists)
        heard = [(group, found) for group, found in lists if found[0]]
        profiles = [
            ClusterProfile(
                sample=group.sample,
                cluster=group.cluster,
                n_cells=len(group.rows),
                by_expression=by_expression,
                by_difference=by_difference,
                context=context_sentence(facts[group.sample_code]),
                tissue=tissue_of(cells, group.rows),
                mean=mean,
            )
            for group, (by_expression, by_difference, mean) in heard
        ]
    profile_of_cell = np.full(len(cells.usable), -1, dtype=np.int32)
    for number, (group, _) in enumerate(heard):
        profile_of_cell[group.rows] = number
    named = np.where(cells.usable, cells.clusters.codes, -1)
    return Profiles(
        genes=genes.names[kept].tolist(),
        profiles=profiles,
        profile_of_cell=profile_of_cell,
        cluster_of_cell=np.array(Column(named, cells.clusters.names).texts(missing=""), dtype=object),
        sample_of_cell=np.array(cells.samples.texts(missing=""), dtype=object),
        values=kind,
        organism=organism,
        notes=[*cells.notes, *_notes_on_small(cells, all_groups, settings), *notes],
    )


@dataclass(frozen=True)
class _Group:
    """The cells of one cluster in one sample."""

    sample: str
    sample_code: int
    cluster: str
    rows: np.ndarray
    """Rows of the file, increasing."""


def _groups(cells: ClusteredCells, min_cells: int) -> list[_Group]:
    """Every (sample, cluster) with at least min_cells usable cells, in the order of Profiles.profiles."""
    rows = np.flatnonzero(cells.usable)
    keys = np.stack([cells.samples.codes[rows], cells.clusters.codes[rows]])
    order = np.lexsort((rows, keys[1], keys[0]))  # np.lexsort takes its most important key last
    starts = np.flatnonzero(np.r_[True, (np.diff(keys[:, order]) != 0).any(axis=0)]) if len(order) else []
    groups = []
    for members in np.split(order, starts[1:]) if len(order) else []:
        sample, cluster = keys[:, members[0]].tolist()
        if len(members) >= min_cells:
            name = cells.samples.names[sample] if sample >= 0 else ""
            groups.append(_Group(name, sample, cells.clusters.names[cluster], rows[members]))
    return sorted(groups, key=lambda group: (natural(group.sample), natural(group.cluster)))


def asked_groups(groups: Sequence[_Group], asked: Asked) -> set[int]:
    """The places of the groups that are asked about.

    A question is about clusters of one sample, so samples are chosen for all their clusters together: again and again the one
    with most clusters that are wanted in a further sample (more than a question holds are no better), and of such those with
    most cells. Where a sample has fewer wanted ones than a question holds, its largest others keep them company.
    """
    places: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(group.sample_code, []).append(place)
    left = Counter({group.cluster: asked.samples for group in groups})
    chosen: set[int] = set()

    def gain(own: list[int]) -> tuple[int, int]:
        wanted = [place for place in own if left[groups[place].cluster] > 0]
        return min(len(wanted), asked.together), sum(len(groups[place].rows) for place in wanted)

    while places:
        sample = max(places, key=lambda code: gain(places[code]))  # of equal ones the first
        own = places.pop(sample)
        wanted = [place for place in own if left[groups[place].cluster] > 0]
        if not wanted:
            break
        others = sorted(set(own) - set(wanted), key=lambda place: (-len(groups[place].rows), place))
        chosen |= {*wanted, *others[: max(0, asked.together - len(wanted))]}
        left.subtract(groups[place].cluster for place in wanted)
    return chosen


def natural(text: str) -> list[tuple[int, int | str]]:
    """A key that sorts cluster 2 before cluster 10."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part] + [(2, text)]


def _refuse_no_group(source: Source, cells: ClusteredCells, groups: list[_Group], settings: ProfileSettings) -> None:
    """Raise UserError when no cluster has enough cells in a sample."""
    if groups:
        return
    n_samples, n_clusters = (len(column.counts()) or 1 for column in (cells.samples, cells.clusters))
    raise UserError(
        f"{source}: no cluster has {settings.min_cells} cells in one sample ({int(cells.usable.sum()):,} cells, {n_clusters} "
        f"clusters, {n_samples} samples); name the column of donors or samples with --sample-key, or lower --min-cells"
    )


def _notes_on_small(cells: ClusteredCells, groups: list[_Group], settings: ProfileSettings) -> list[str]:
    """A note on the cells whose cluster is too small in their sample."""
    n_left = int(cells.usable.sum()) - sum(len(group.rows) for group in groups)
    if not n_left:
        return []
    seen = {group.cluster for group in groups}
    lost = [name for name in cells.clusters[np.flatnonzero(cells.usable)].counts() if name not in seen]
    nowhere = f"; the clusters {', '.join(map(repr, sorted(lost, key=natural)[:5]))} have no profile" if lost else ""
    return [f"{n_left} cells are in a cluster with fewer than {settings.min_cells} cells in their sample{nowhere}"]


def _notes_on_silent(source: Source, lists: Sequence[tuple[_Group, tuple]]) -> list[str]:
    """A note on clusters without an expressed gene, which have no profile. Raises UserError when there is no other."""
    silent = [group.cluster for group, (by_expression, *_) in lists if not by_expression]
    if not silent:
        return []
    names = ", ".join(map(repr, sorted(set(silent), key=natural)[:5]))
    if len(silent) == len(lists):
        raise UserError(f"{source}: no cluster has an expressed gene; name the layer with the values (--layer)")
    return [
        f"no gene is expressed in the cells of {len(silent)} clusters in their sample ({names}): they have no profile"
    ]


def _genes(matrix: Matrix, stated: str | None, settings: ProfileSettings) -> tuple[Genes, str | None, list[str]]:
    """(the genes of the layer, the organism, notes). Raises UserError for genes of another organism than the model's."""
    wanted = settings.gene_key or "feature_name"
    facts, names = gene_facts(matrix, wanted)
    key = settings.gene_key or facts.key or facts.sources[0].key
    ranking = RankSettings(
        top_genes=settings.top_genes, layer=settings.layer, gene_key=key, drop_genes=settings.dropped_classes
    )
    genes = genes_of(matrix, ranking)
    notes = list(genes.notes)
    if key != wanted:
        notes.insert(0, f"gene names are taken from the {'index of var' if key == 'index' else f'var column {key!r}'}")
    looks_like, wanted_organism = organism_of_names(facts, names), organism_name(settings.organism)
    organism = stated or looks_like
    # symbols of a rat look like those of a mouse, so the names decide between these two organisms only
    if looks_like and looks_like != wanted_organism and wanted_organism in ORGANISMS.values():
        raise UserError(
            f"{matrix.path}: its gene names look like those of {looks_like} ({', '.join(names[:3])}); "
            f"{remedy_for_organism(looks_like, settings.organism)}"
        )
    return genes, organism, notes


def _named_by_a_gene(genes: Genes) -> np.ndarray:
    """Indices of the names that a column of a gene has; tags and spike-ins have names too."""
    return np.arange(len(genes.names)) if genes.is_gene is None else np.unique(genes.ids[genes.is_gene])


def level_for(kind: str) -> Scale:
    """The function to the level that is averaged: log(1 + counts per 10,000); log counts are kept as they are."""
    if kind == "log counts":
        return log_for(kind)
    # CPM and TPM are brought to the same sum as counts, so that the mean has one unit
    scale, log = scale_for("counts" if kind == "normalised" else kind), log_for(kind)
    return lambda values: log(scale(values))


def _note_on_values(matrix: Matrix, kind: str) -> str:
    """What was found in the matrix, and what is averaged."""
    if kind == "log counts":
        return f"the layer {matrix.layer} holds log-normalised values: they are averaged as they are"
    return f"the layer {matrix.layer} holds {kind}: the mean is that of log(1 + x), x scaled to {COUNTS_PER_CELL:,.0f} a cell"


Averages = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""(rows, the group of each, number of groups) -> [groups, U] float64 means."""


def _averages(matrix: Matrix, genes: Genes, used: np.ndarray, kind: str, advance: Callable[[int], None]) -> Averages:
    """The function that averages groups of the used rows, in the way that suits how the matrix is stored."""
    if matrix.encoding == "csc":
        return MeansByGenes(matrix, genes, used, kind == "log counts", advance).means
    reader, level = Reader(matrix, None, advance, genes.is_gene), level_for(kind)
    return lambda rows, owner, n_groups: mean_levels(reader, genes, rows, owner, n_groups, level)


def _lists(
    averaged: Averages, genes: Genes, groups: list[_Group], n_top: int
) -> Iterator[tuple[list[str], list[str], np.ndarray]]:
    """(by expression, by difference, float32 mean) of each group, in order; whole samples are read together."""
    for members in _whole_samples(groups, max(1, SUMS_AT_ONCE // len(genes.names))):
        rows = np.concatenate([group.rows for group in members])
        owner = np.repeat(np.arange(len(members)), [len(group.rows) for group in members])
        order = np.argsort(rows, kind="stable")
        means = averaged(rows[order], owner[order], len(members))
        samples = np.array([group.sample_code for group in members])
        # added up once: the mean over the others, made anew for each of 400 clusters, would take minutes
        total = {code: means[samples == code].sum(axis=0) for code in set(samples.tolist())}
        for mean, code in zip(means, samples.tolist(), strict=True):
            n_others = int((samples == code).sum()) - 1
            others = (total[code] - mean) / n_others if n_others else None
            yield _top(genes, mean, mean, n_top), _above(genes, mean, others, n_top), mean.astype(np.float32)


def _whole_samples(groups: list[_Group], most: int) -> Iterator[list[_Group]]:
    """The groups in blocks of whole samples: at most `most` groups each, unless one sample has more."""
    block: list[_Group] = []
    start = 0
    for end in range(1, len(groups) + 1):
        if end < len(groups) and groups[end].sample_code == groups[start].sample_code:
            continue
        if block and len(block) + end - start > most:
            yield block
            block = []
        block, start = block + groups[start:end], end
    yield block


def _above(genes: Genes, mean: np.ndarray, others: np.ndarray | None, n_top: int) -> list[str]:
    """The genes by how far the mean [U] lies above that of the other profiles of the sample [U]; None: there are none."""
    if others is None:
        return []
    difference = mean - others
    return _top(genes, np.where(difference > SAME_LEVEL * mean, difference, 0), mean, n_top)


def _top(genes: Genes, scores: np.ndarray, mean: np.ndarray, n_top: int) -> list[str]:
    """The n_top expressed genes with the largest scores above 0."""
    ids = np.flatnonzero((scores > 0) & (mean > 0))
    return genes.ranked(ids, scores[ids], n_top)
