"""Simulated atlases of any size: the cells of data/atlas/simulate.py plus filler genes, written block by block.

Axes: C cells, G genes (core genes, which data/atlas/simulate.py draws, and filler genes), R cells of a block. A filler
gene has an invented name and no meaning: a cell gets a Poisson number of filler counts, spread over genes by fixed
heavy-tailed weights, so most counts are 1. Only one block is in memory, for any C.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse
from tqdm import tqdm

from data.atlas.h5ad_writer import COMPRESSIONS, ENCODINGS, ROOM, GrowingH5ad
from data.atlas.markers import MarkerEntry, ontology_term_ids, read_markers
from data.atlas.simulate import (
    TITLE,
    Donor,
    DonorBatch,
    Programs,
    batch_obs,
    check_atlas_settings,
    disease_activity,
    draw_block,
    draw_donor_batches,
    draw_donors,
    draw_programs,
    refuse_to_replace,
    select_types,
    synthetic_ensembl_id,
    types_of,
)
from data.errors import UserError
from data.files import replacing, require_free_space
from data.formats.checksum import add_checksum
from data.formats.locks import open_hdf5

BLOCK_CELLS = 1000
MAX_GENES = 100_000
MAX_DENSE_BYTES = 20_000_000_000

FILLER_COUNTS = 0.035  # mean counts per filler gene and cell
FILLER_SPREAD = 1.25  # standard deviation of the logarithm of a filler gene's weight
FILLER_SLOTS = 1 << 18  # resolution of the weights
BATCH_SPREAD = 0.4  # standard deviation of the logarithm of a batch's number of cells


@dataclass(frozen=True)
class AtlasSummary:
    """The size of an atlas."""

    cells: int
    genes: int
    donors: int
    tissues: int
    cell_types: int
    """"unknown" is not counted."""
    diseases: int
    """"normal" is not counted."""

    def __str__(self) -> str:
        return (
            f"{self.cells} cells x {self.genes} genes, {self.donors} donors, {self.tissues} tissues, "
            f"{self.cell_types} cell types, {self.diseases} diseases besides normal"
        )


def summarise_atlas(adata: anndata.AnnData) -> AtlasSummary:
    """The summary of an atlas in memory."""
    obs = adata.obs
    diseases, types = set(obs["disease"]) - {"normal"}, set(obs["cell_type"]) - {"unknown"}
    donors, tissues = obs["donor_id"].nunique(), obs["tissue"].nunique()
    return AtlasSummary(adata.n_obs, adata.n_vars, donors, tissues, len(types), len(diseases))


def stream_atlas(
    path: str | os.PathLike,
    n_donors: int = 48,
    seed: int = 0,
    *,
    cells: int | None = None,
    genes: int | None = None,
    encoding: str = "csr",
    compression: str = "gzip",
    cells_per_type: float = 8.0,
    noise: float = 1.0,
    n_types: int | None = None,
) -> AtlasSummary:
    """Simulate an atlas and write each block of cells as it is drawn. Returns the size of the atlas.

    The file is written completely or not at all (temporary name, then rename). The same settings write the same bytes.
    cells: exact number of cells. Default: as `cells_per_type` gives; if then no batch has more than BLOCK_CELLS cells,
        the counts of core genes and the values of obs are those of data.atlas.simulate.simulate_atlas.
    genes: number of genes, filler included. Default: no filler.
    encoding, compression: of X. CSC needs 8 bytes per value beside the output while it is written.
    Other settings: as for simulate_atlas. Raises UserError, with the option's name, for a setting out of range, and
    when the disk has less free space than the next block and ROOM.
    """
    path = Path(path)
    if path.suffix != ".h5ad":
        raise UserError(f"--out {path}: the file name must end in .h5ad")
    check_atlas_settings(n_donors, seed, cells_per_type, noise)
    rng = np.random.default_rng(seed)  # the draws from here on come in the same order as in simulate_atlas
    entries = select_types(read_markers(), n_types)
    programs = draw_programs(rng, entries)
    table = GeneTable.of(programs, genes, seed)
    donors = draw_donors(rng, n_donors)
    sizes = batch_sizes(donors, entries, cells, cells_per_type, seed)
    refuse_to_replace(path)
    check_matrix_layout(encoding, compression, sum(sizes), len(table.var))
    batches = draw_donor_batches(
        rng, programs, entries, donors, cells_per_type, iter(sizes) if cells is not None else None
    )
    settings = {"donors": n_donors, "seed": seed, "noise": noise, "types": len(entries), "genes": len(table.var)}
    settings |= {"cells_per_type": cells_per_type} if cells is None else {"cells": cells}
    uns = {"title": TITLE, "simulation": settings}
    seen: set[str] = set()
    categories = obs_categories(donors, entries)
    with replacing(path) as partial:
        require_free_space(path.parent, ROOM)
        with (
            open_hdf5(partial, "w") as file,
            # beside the output: /tmp may be small, or in memory
            tempfile.TemporaryDirectory(dir=path.parent, prefix=".columns-") as folder,
        ):
            out = GrowingH5ad(file, table.var, categories, uns, encoding, compression, Path(folder))
            with tqdm(total=cells, desc="cells", unit="cell", unit_scale=True, disable=None) as bar:
                for counts, obs in _blocks(rng, programs, batches, noise, table):
                    out.append(counts, obs)
                    seen.update(obs["cell_type"])
                    bar.update(len(obs))
            out.finish()
        add_checksum(partial)
    return AtlasSummary(
        cells=out.n_cells,
        genes=len(table.var),
        donors=n_donors,
        tissues=len({donor.tissue for donor in donors}),
        cell_types=len(seen - {"unknown"}),
        diseases=len({donor.disease for donor in donors} - {"normal"}),
    )


def check_matrix_layout(encoding: str, compression: str, cells: int, genes: int) -> None:
    """Raise UserError, with the option's name, for an unknown layout or a dense matrix above MAX_DENSE_BYTES."""
    if encoding not in ENCODINGS:
        raise UserError(f"--encoding {encoding}: must be one of {', '.join(ENCODINGS)}")
    if compression not in COMPRESSIONS:
        raise UserError(f"--compression {compression}: must be one of {', '.join(COMPRESSIONS)}")
    if encoding == "dense" and 4 * cells * genes > MAX_DENSE_BYTES:
        raise UserError(
            f"--encoding dense: {cells} cells x {genes} genes are {4e-9 * cells * genes:.0f} GB before compression, "
            f"more than {MAX_DENSE_BYTES / 1e9:.0f} GB; give --encoding csr, or fewer --cells or --genes"
        )


def batch_sizes(
    donors: Sequence[Donor], entries: dict[str, MarkerEntry], cells: int | None, cells_per_type: float, seed: int
) -> list[int]:
    """The number of cells of each batch, in the order of donors: `cells` divided by log-normal shares.

    Without `cells`, the expected number. Raises UserError when `cells` is too few for one cell of every type in each
    batch.
    """
    fewest = np.array([len(types_of(donor, entries)) for donor in donors for _ in donor.suspensions])
    if cells is None:
        return np.ceil(fewest * max(1, cells_per_type)).astype(int).tolist()
    if cells < fewest.sum():
        raise UserError(
            f"--cells {cells} is too few for {len(donors)} donors: give at least {fewest.sum()}, "
            f"one for each type in each of their {len(fewest)} batches, or fewer --donors"
        )
    rng = np.random.default_rng([seed, 1])  # its own generator: the draws of simulate_atlas must not shift
    shares = np.exp(rng.normal(0, BATCH_SPREAD, len(fewest)))
    return (fewest + rng.multinomial(cells - fewest.sum(), shares / shares.sum())).tolist()


@dataclass(frozen=True)
class GeneTable:
    """All genes of an atlas, in the order of their synthetic Ensembl ids, and the distribution of filler counts."""

    var: pd.DataFrame
    """[G] rows of var."""
    core_columns: np.ndarray
    """[core genes] column of each gene of Programs, increasing."""
    slots: np.ndarray
    """[about FILLER_SLOTS] columns of filler genes. A gene occurs in proportion to its weight. Empty without filler."""
    filler_counts: float
    """Mean number of filler counts of a cell."""
    rng: np.random.Generator
    """Draws the filler only, so that the other draws are the same with and without filler."""

    @classmethod
    def of(cls, programs: Programs, genes: int | None, seed: int) -> "GeneTable":
        """The table of `genes` genes, by default of the core genes. Raises UserError for a number out of range."""
        core = list(programs.genes)
        genes = len(core) if genes is None else genes
        if not len(core) <= genes <= MAX_GENES:
            raise UserError(
                f"--genes {genes} is out of range: give {len(core)}, the genes that the chosen types need, to "
                f"{MAX_GENES}"
            )
        filler = filler_symbols(genes - len(core), core)
        symbols = np.array(sorted([*core, *filler], key=synthetic_ensembl_id), dtype=object)
        is_filler = np.isin(symbols.astype(str), filler)
        rng = np.random.default_rng([seed, 2])
        weights = np.exp(rng.normal(0, FILLER_SPREAD, len(filler)))
        times = np.maximum(1, np.round(FILLER_SLOTS * weights / max(weights.sum(), 1e-9))).astype(int)
        columns = {
            "feature_is_filtered": np.zeros(genes, dtype=bool),
            "feature_name": pd.Categorical(symbols),
            "feature_reference": pd.Categorical(["NCBITaxon:9606"] * genes),
            "feature_biotype": pd.Categorical(["gene"] * genes),
        }
        return cls(
            var=pd.DataFrame(columns, index=[synthetic_ensembl_id(symbol) for symbol in symbols]),
            core_columns=np.flatnonzero(~is_filler).astype(np.int32),
            slots=np.repeat(np.flatnonzero(is_filler).astype(np.int32), times),
            filler_counts=FILLER_COUNTS * len(filler),
            rng=rng,
        )

    def widen(self, core: sparse.csr_matrix) -> sparse.csr_matrix:
        """Counts [R, core genes] -> [R, G] float32 with sorted indices; filler counts are drawn and added."""
        shape = (core.shape[0], len(self.var))
        wide = sparse.csr_matrix((core.data, self.core_columns[core.indices], core.indptr), shape=shape)
        return wide + self._filler(*shape) if len(self.slots) else wide

    def _filler(self, n_cells: int, n_genes: int) -> sparse.csr_matrix:
        """[R, G] filler counts of a block."""
        depth = self.filler_counts * np.exp(self.rng.normal(0, 0.35, n_cells))  # [R], spread as library sizes are
        times = self.rng.poisson(depth)  # [R]
        columns = self.slots[self.rng.integers(0, len(self.slots), times.sum(), dtype=np.uint32)]
        # one key per count, row x G + column; sorted, equal keys are neighbours, and their number is the count
        starts = np.arange(n_cells, dtype=np.int32) * np.int32(n_genes)  # fits 32 bits: below BLOCK_CELLS x MAX_GENES
        keys = np.repeat(starts, times) + columns
        keys.sort()
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        counts = np.diff(first, append=len(keys)).astype(np.float32)
        rows, columns = np.divmod(keys[first], np.int32(n_genes))
        starts = np.searchsorted(rows, np.arange(n_cells + 1)).astype(np.int32)
        return sparse.csr_matrix((counts, columns, starts), shape=(n_cells, n_genes))


def filler_symbols(n: int, core: Sequence[str]) -> list[str]:
    """n invented symbols that look like those of long non-coding genes. Real accessions of those do not start with 9.

    Their synthetic ids are distinct, also from those of the core symbols.
    """
    taken, symbols, number = {synthetic_ensembl_id(symbol) for symbol in core}, [], 0
    while len(symbols) < n:
        form = ("LINC9{:05d}", "AC9{:05d}.1", "AL9{:05d}.2")[number % 3]
        symbol = form.format(number // 3)
        gene_id = synthetic_ensembl_id(symbol)
        if gene_id not in taken:
            taken.add(gene_id)
            symbols.append(symbol)
        number += 1
    return symbols


def _blocks(
    rng: np.random.Generator, programs: Programs, batches: Iterator[DonorBatch], noise: float, table: GeneTable
) -> Iterator[tuple[sparse.csr_matrix, pd.DataFrame]]:
    """Yield (counts [R, G], obs [R]) of all cells, in order."""
    for batch in batches:
        if len(batch.types) > BLOCK_CELLS:  # all blocks of a batch must have the same disease activity
            batch = replace(batch, raised=disease_activity(rng, batch.donor))
        for start in range(0, len(batch.types), BLOCK_CELLS):
            counts, obs = draw_block(rng, programs, batch, noise, slice(start, start + BLOCK_CELLS))
            yield table.widen(counts), obs


def obs_categories(donors: Sequence[Donor], entries: dict[str, MarkerEntry]) -> dict[str, list[str] | None]:
    """{obs column: its sorted values in the whole atlas}, in column order. None for a column of booleans."""
    # categories are written before the first cell, so they are found from one cell of each batch
    types = {name for donor in donors for name in types_of(donor, entries)}
    batches = [
        DonorBatch(d, number, np.array([""]), np.ones(0)) for d in donors for number in range(1, len(d.suspensions) + 1)
    ]
    rows = pd.concat([batch_obs(np.random.default_rng(0), batch, slice(None)) for batch in batches])
    categories = {name: sorted(set(rows[name])) if rows[name].dtype == object else None for name in rows.columns}
    terms = {ontology_term_ids().get(name, "unknown") for name in types}
    known = {"cell_type": types, "cell_type_ontology_term_id": terms}
    return categories | {column: sorted(values | {"unknown"}) for column, values in known.items()}
