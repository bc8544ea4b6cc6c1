"""A simulated single-cell atlas: an .h5ad file in the CELLxGENE schema, to try the whole pipeline without a download.

Axes: C cells, G genes, T cell types, R cells of a block. The relative expression of a cell is the sum of

- a background of ribosomal, mitochondrial and housekeeping genes, which are most of a cell's top genes;
- the markers of its type, weaker towards the end of the marker list, some of them dropped out;
- some markers of related types, and an ambient mixture of the types of its batch;
- state programs (stress, interferon, ...), some of which a disease raises;

times log-normal effects of donor and batch. Counts are negative binomial around library size x relative expression (the
gamma-Poisson model of Grun et al. 2014, doi:10.1038/nmeth.2930). The names, the markers and the shape of a top-50 list
are real. Everything else is invented.

The bytes for a seed are pinned by tests: never change the number or the order of random draws.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from data.atlas.h5ad_writer import ROOM
from data.atlas.markers import MarkerEntry, ontology_term_ids, read_markers
from data.errors import UserError
from data.files import replacing, require_free_space
from data.formats.checksum import add_checksum, is_as_written, refuse_edited
from data.formats.locks import open_hdf5

TITLE = "Simulated atlas (no real cells)"
"""uns["title"] of every simulated atlas."""
TISSUES = ("lung", "blood", "bone marrow", "ileum", "kidney", "islet of Langerhans")

RIBOSOMAL = tuple(
    """RPL3 RPL4 RPL5 RPL6 RPL7 RPL7A RPL8 RPL9 RPL10 RPL10A RPL11 RPL12 RPL13 RPL13A RPL14 RPL15 RPL17 RPL18 RPL18A
    RPL19 RPL21 RPL22 RPL22L1 RPL23 RPL23A RPL24 RPL26 RPL27 RPL27A RPL28 RPL29 RPL30 RPL31 RPL32 RPL34 RPL35 RPL35A
    RPL36 RPL36A RPL36AL RPL37 RPL37A RPL38 RPL39 RPL41 RPLP0 RPLP1 RPLP2 RPS2 RPS3 RPS3A RPS4X RPS5 RPS6 RPS7 RPS8
    RPS9 RPS10 RPS11 RPS12 RPS13 RPS14 RPS15 RPS15A RPS16 RPS17 RPS18 RPS19 RPS20 RPS21 RPS23 RPS24 RPS25 RPS26
    RPS27 RPS27A RPS27L RPS28 RPS29 RPSA""".split()
)
MITOCHONDRIAL = tuple(
    """MT-CO1 MT-CO2 MT-CO3 MT-ND4 MT-ATP6 MT-CYB MT-ND2 MT-ND1 MT-ND3 MT-ND5 MT-ND4L MT-ATP8 MT-ND6""".split()
)
# most expressed first
HOUSEKEEPING = tuple(
    """MALAT1 B2M TMSB4X EEF1A1 FTL FTH1 ACTB TPT1 PTMA TMSB10 GAPDH H3-3B SAT1 UBC HLA-B MYL6 ACTG1 FAU EIF1 HLA-A
    VIM H3-3A OAZ1 SERF2 RACK1 HSP90AA1 CALM2 UBA52 NACA CFL1 PFN1 PPIA ITM2B HNRNPA1 YBX1 EEF1B2 EEF1D CD63 GSTP1
    S100A6 BTG1 UBB HSPA8 HINT1 CALM1 COX4I1 COX7C SLC25A6 LDHA EIF4A1""".split()
)
# genes that show the state of a cell, not its type; a disease raises some of these programs
PROGRAMS = {
    "immediate early": "FOS JUN JUNB FOSB DUSP1 ZFP36 EGR1 IER2 KLF6 JUND".split(),
    "heat shock": "HSPA1A HSPA1B HSP90AB1 DNAJB1 DNAJA1 HSPH1 HSPE1 HSPB1".split(),
    "metallothionein": "MT2A MT1X MT1E MT1M MT1G MT1F".split(),
    "interferon": "ISG15 IFI6 IFI44L IFITM1 LY6E IFIT3 MX1 IFIT1 XAF1 STAT1 OAS1 IFI27".split(),
    "inflammation": "NFKBIA SOD2 NAMPT CXCL8 CXCL2 TNFAIP3 ICAM1 IL1B NFKB1".split(),
    "fibrosis": "TIMP1 FN1 CCN2 SERPINE1 TGFBI CCN1 TIMP3".split(),
    "unfolded protein": "HSPA5 HERPUD1 DDIT3 PDIA4 SDF2L1 HSP90B1 TXNIP ATF3".split(),
    "proliferation": "NPM1 H2AZ1 TUBA1B HMGB1 NUCKS1 ANP32E SLC25A5 NME1".split(),
}
DISEASE_PROGRAMS = {
    "chronic obstructive pulmonary disease": ("metallothionein", "inflammation"),
    "lung adenocarcinoma": ("proliferation", "heat shock"),
    "systemic lupus erythematosus": ("interferon",),
    "HIV infectious disease": ("interferon", "immediate early"),
    "acute myeloid leukemia": ("proliferation",),
    "Crohn disease": ("inflammation", "interferon"),
    "chronic kidney disease": ("fibrosis", "metallothionein"),
    "type 2 diabetes mellitus": ("unfolded protein",),
}
# the donors of a tissue get these diseases in turn
TISSUE_CONDITIONS = {
    "lung": ("normal", "chronic obstructive pulmonary disease", "lung adenocarcinoma"),
    "blood": ("normal", "systemic lupus erythematosus", "HIV infectious disease"),
    "bone marrow": ("normal", "acute myeloid leukemia"),
    "ileum": ("normal", "Crohn disease"),
    "kidney": ("normal", "chronic kidney disease"),
    "islet of Langerhans": ("normal", "type 2 diabetes mellitus"),
}
# cell type -> the only disease in which it occurs
DISEASE_ONLY_TYPES = {"malignant cell": "lung adenocarcinoma"}

ETHNICITIES = ("European", "African American", "Asian", "Hispanic or Latin American", "unknown")
SMOKING = ("active", "former", "never")
ASSAYS = ("10x 3' v3", "10x 3' v2", "10x 5' v1")

LIBRARY_SIZE = 4000.0  # median counts per cell
MARKER_STRENGTH = 12.0  # first marker of a list in a cell of full identity, relative to a median ribosomal gene
MARKER_DECAY = 8.0  # list positions over which the strength falls by e
DROPOUT = 0.45  # chance that a cell lacks one of its own markers
LINEAGE_LEAK = 0.3  # chance that a cell carries a marker of its lineage, own or not
AMBIENT_LEAK = 0.03  # share of every lineage's markers in the ambient RNA of each cell of the batch
STATE_STRENGTH = 1.3  # first gene of a state program at activity 1, relative to a median ribosomal gene
DISPERSION = 0.35  # of the negative binomial: variance = mean + DISPERSION * mean ** 2


@dataclass(frozen=True)
class Donor:
    """One donor. All cells of a donor are of one tissue."""

    donor_id: str
    tissue: str
    disease: str
    sex: str
    age: int
    """Years."""
    ethnicity: str
    smoking_status: str
    suspensions: tuple[str, ...]
    """"cell" or "nucleus", for each batch of the donor."""
    assay: str


@dataclass(frozen=True)
class Programs:
    """The expression programs of which every cell is a mixture. Weights are relative to a median ribosomal gene."""

    genes: pd.Index
    """[G] symbols."""
    background: np.ndarray
    """[G] weight of ribosomal, mitochondrial and housekeeping genes, 0 elsewhere."""
    state: np.ndarray
    """[len(PROGRAMS), G] weight of each program's genes."""
    markers: pd.DataFrame
    """[T, G] marker weights, labelled by cell type and symbol."""
    lineage: pd.Series
    """[T] lineage of each type."""
    ribosomal_share: pd.Series
    """[T] factor on the ribosomal genes; types of one lineage have the same."""


@dataclass(frozen=True)
class DonorBatch:
    """One experimental batch of one donor: its cells before their counts are drawn."""

    donor: Donor
    number: int
    """1 for the donor's first batch."""
    types: np.ndarray
    """[C] cell type of each cell of the batch, in the order of the rows."""
    effect: np.ndarray
    """[G] factor of donor and batch on each gene."""
    raised: np.ndarray | None = None
    """[len(PROGRAMS)] activity that the disease adds. None: it is drawn together with the cells."""

    @property
    def suspension(self) -> str:
        return self.donor.suspensions[self.number - 1]


def simulate_atlas(
    n_donors: int = 48, seed: int = 0, *, cells_per_type: float = 8, noise: float = 1.0, n_types: int | None = None
) -> anndata.AnnData:
    """Simulate raw counts [C, G] (CSR, float32) of cells of 6 tissues, with the obs columns of CELLxGENE.

    n_donors: number of donors, spread evenly over the tissues, at least one for each.
    seed: the same seed and settings give the same arrays.
    cells_per_type: mean number of cells per type, batch and donor, before the donor's own composition.
    noise: strength of leakage, dropout and weak markers. When the cells of 5 types of one batch are matched to the
        types by the number of markers in their top 50 (24) genes, about 100 % (99 %) of the cells are right at noise
        0.5, 94 % (88 %) at 1, 71 % (67 %) at 2.
    n_types: number of cell types, taken from the tissues in turn. Default: every type of data/atlas/markers.tsv.

    `feature_name` in var has the gene symbols. The index of var has synthetic ENSG ids, made from a hash of the symbol
    (they start with ENSG9; no real id does). Genes are sorted by them, so the order of genes says nothing about cell
    types. Raises UserError, with the option's name, when a setting is out of range.
    """
    check_atlas_settings(n_donors, seed, cells_per_type, noise)
    rng = np.random.default_rng(seed)
    entries = select_types(read_markers(), n_types)
    programs = draw_programs(rng, entries)
    batches = draw_donor_batches(rng, programs, entries, draw_donors(rng, n_donors), cells_per_type)
    blocks = [draw_block(rng, programs, batch, noise) for batch in batches]
    counts, obs = [counts for counts, _ in blocks], [obs for _, obs in blocks]
    cells = pd.concat(obs, ignore_index=True)
    cells.index = [f"cell_{i:06d}" for i in range(len(cells))]
    cells = cells.astype({column: "category" for column in cells.columns.drop("is_primary_data")})
    settings = {
        "donors": n_donors,
        "seed": seed,
        "cells_per_type": cells_per_type,
        "noise": noise,
        "types": len(entries),
    }
    return anndata.AnnData(
        X=scipy.sparse.vstack(counts, format="csr"),
        obs=cells,
        var=pd.DataFrame({"feature_name": programs.genes}, index=[synthetic_ensembl_id(g) for g in programs.genes]),
        uns={"title": TITLE, "simulation": settings},
    )


def check_atlas_settings(n_donors: int, seed: int, cells_per_type: float, noise: float) -> None:
    """Raise UserError, with the option's name, when a setting is out of range."""
    if n_donors < len(TISSUES):
        raise UserError(f"--donors {n_donors} is too few: give at least {len(TISSUES)}, one for each tissue")
    if seed < 0:
        raise UserError(f"--seed {seed} is negative: give 0 or more")
    if not 0 < cells_per_type <= 1000:
        raise UserError(f"--cells-per-type {cells_per_type} is out of range: give a number above 0 and up to 1000")
    if not 0 <= noise <= 5:
        raise UserError(f"--noise {noise} is out of range: give 0 (no noise) to 5")


def write_atlas(
    path: str | os.PathLike,
    n_donors: int = 48,
    seed: int = 0,
    *,
    cells_per_type: float = 8,
    noise: float = 1.0,
    n_types: int | None = None,
) -> anndata.AnnData:
    """Simulate an atlas, write it as .h5ad and return it.

    The file is written completely or not at all (temporary name, then rename); an older atlas is replaced. Settings: as
    for `simulate_atlas`; the same settings write the same bytes. Raises UserError, before anything is written, when the
    name does not end in .h5ad or a setting is out of range.
    """
    path = Path(path)
    if path.suffix != ".h5ad":
        raise UserError(f"--out {path}: the file name must end in .h5ad")
    refuse_to_replace(path)
    adata = simulate_atlas(n_donors, seed, cells_per_type=cells_per_type, noise=noise, n_types=n_types)
    with replacing(path) as partial:
        require_free_space(path.parent, ROOM + adata.X.data.nbytes + adata.X.indices.nbytes)
        adata.write_h5ad(partial, compression="gzip")
        add_checksum(partial)
    return adata


def refuse_to_replace(path: Path) -> None:
    """Raises UserError when a simulated atlas would take the place of a file that is none, or whose clusters got labels."""
    if not path.exists():
        return
    try:
        with open_hdf5(path, "r") as file:
            uns = file.get("uns", {})
            ours = "title" in uns and uns["title"].asstr()[()] == TITLE and "cell_type_llm" not in uns
    except (OSError, AttributeError, TypeError):  # no HDF5, or an attribute of another kind
        ours = False
    if not ours:
        raise UserError(f"--out {path}: is no simulated atlas, and would be replaced; name another file")
    refuse_edited(path, is_as_written(path))


def synthetic_ensembl_id(symbol: str) -> str:
    """An id that looks like one of Ensembl. It depends on the symbol only and is not the gene's real id."""
    return f"ENSG9{int(hashlib.sha256(symbol.encode()).hexdigest(), 16) % 10**10:010d}"


def background_genes() -> set[str]:
    """The symbols of the ribosomal, mitochondrial and housekeeping genes."""
    return {*RIBOSOMAL, *MITOCHONDRIAL, *HOUSEKEEPING}


def draw_programs(rng: np.random.Generator, entries: dict[str, MarkerEntry]) -> Programs:
    """Draw the strength of every gene, once for the whole atlas."""
    symbols = background_genes().union(*PROGRAMS.values(), *(entry.markers for entry in entries.values()))
    genes = pd.Index(sorted(symbols, key=synthetic_ensembl_id))
    spread = pd.Series(np.exp(rng.normal(0, 0.5, len(genes))), index=genes)  # a gene is strong or weak everywhere
    background = pd.Series(0.0, index=genes)
    background[list(RIBOSOMAL)] = spread[list(RIBOSOMAL)]
    background[list(MITOCHONDRIAL)] = 1.3 * spread[list(MITOCHONDRIAL)] * np.linspace(1.5, 0.2, len(MITOCHONDRIAL))
    background[list(HOUSEKEEPING)] = spread[list(HOUSEKEEPING)] * np.geomspace(5, 0.4, len(HOUSEKEEPING))
    state = pd.DataFrame(0.0, index=list(PROGRAMS), columns=genes)
    for name, members in PROGRAMS.items():
        state.loc[name, members] = STATE_STRENGTH * spread[members] * np.linspace(1.0, 0.4, len(members))
    markers = pd.DataFrame(0.0, index=list(entries), columns=genes)
    for name, entry in entries.items():
        fall = np.exp(-np.arange(len(entry.markers)) / MARKER_DECAY)
        markers.loc[name, list(entry.markers)] = MARKER_STRENGTH * spread[list(entry.markers)] * fall
    lineage = pd.Series({name: entry.lineage for name, entry in entries.items()})
    shares = {name: np.exp(rng.normal(0, 0.2)) for name in dict.fromkeys(lineage)}
    return Programs(
        genes=genes,
        background=background.to_numpy(),
        state=state.to_numpy(),
        markers=markers,
        lineage=lineage,
        ribosomal_share=lineage.map(shares),
    )


def draw_donors(rng: np.random.Generator, n_donors: int) -> list[Donor]:
    """Draw the donors. Tissues take turns, and the diseases of a tissue take turns.

    A third of the donors has two batches. The second batch of every fourth of these is single nuclei.
    """
    two_batches = rng.permutation(n_donors)[: max(1, n_donors // 3)].tolist()
    nuclei = two_batches[::4]
    donors = []
    for i in range(n_donors):
        tissue = TISSUES[i % len(TISSUES)]
        conditions = TISSUE_CONDITIONS[tissue]
        second = ("nucleus",) if i in nuclei else ("cell",) if i in two_batches else ()
        donors.append(
            Donor(
                donor_id=f"donor_{i + 1:03d}",
                tissue=tissue,
                disease=conditions[i // len(TISSUES) % len(conditions)],
                sex=str(rng.choice(["female", "male"])),
                age=int(rng.integers(19, 86)),
                ethnicity=str(rng.choice(ETHNICITIES)),
                smoking_status=str(rng.choice(SMOKING)) if tissue == "lung" else "unknown",
                suspensions=("cell", *second),
                assay=str(rng.choice(ASSAYS)),
            )
        )
    return donors


def select_types(entries: dict[str, MarkerEntry], n_types: int | None) -> dict[str, MarkerEntry]:
    """Select n_types entries; the tissues take turns. Raises UserError when there are not enough for every tissue."""
    if n_types is None:
        return entries
    if not 2 * len(TISSUES) <= n_types <= len(entries):
        raise UserError(f"--types {n_types} is out of range: give {2 * len(TISSUES)} to {len(entries)}")
    chosen: set[str] = set()
    for turn in range(len(entries) * len(TISSUES)):
        tissue, specific = TISSUES[turn % len(TISSUES)], turn // len(TISSUES) % 2 == 0
        waiting = [name for name, entry in entries.items() if tissue in entry.tissues and name not in chosen]
        if waiting and len(chosen) < n_types:  # in turn, a type of few tissues and one of many
            chosen.add(min(waiting, key=lambda name: len(entries[name].tissues) * (1 if specific else -1)))
    return {name: entry for name, entry in entries.items() if name in chosen}


def types_of(donor: Donor, entries: dict[str, MarkerEntry]) -> list[str]:
    """The cell types that occur in the donor's tissue with the donor's disease."""
    return [
        name
        for name, entry in entries.items()
        if donor.tissue in entry.tissues and DISEASE_ONLY_TYPES.get(name, donor.disease) == donor.disease
    ]


def draw_donor_batches(
    rng: np.random.Generator,
    programs: Programs,
    entries: dict[str, MarkerEntry],
    donors: Sequence[Donor],
    cells_per_type: float,
    sizes: Iterator[int] | None = None,
) -> Iterator[DonorBatch]:
    """Yield the batches of the donors, one by one. Each type of a donor's tissue has at least one cell in each batch.

    sizes: number of cells of each batch, at least its number of types. Default: drawn around `cells_per_type`.
    A batch is drawn when the caller requests it, and the caller draws its counts before the next one: the order of
    random draws depends on both.
    """
    for donor in donors:
        donor_effect = np.exp(rng.normal(0, 0.2, len(programs.genes)))
        abundance = {name: float(np.exp(rng.normal(0, 0.4))) for name in types_of(donor, entries)}
        for number in range(1, len(donor.suspensions) + 1):
            effect = donor_effect * np.exp(rng.normal(0, 0.1, len(programs.genes)))
            if sizes is None:
                of_type = [1 + rng.poisson(max(cells_per_type * a - 1, 0)) for a in abundance.values()]
            else:
                share = np.array(list(abundance.values())) / sum(abundance.values())
                of_type = 1 + rng.multinomial(next(sizes) - len(share), share)
            types = rng.permutation(np.repeat(list(abundance), of_type))  # the order of rows must not tell the type
            yield DonorBatch(donor, number, types, effect)


def draw_block(
    rng: np.random.Generator, programs: Programs, batch: DonorBatch, noise: float, rows: slice = slice(None)
) -> tuple[scipy.sparse.csr_matrix, pd.DataFrame]:
    """(counts [R, G], obs [R]) of some rows of a batch. Default: all rows."""
    mean = relative_expression(rng, programs, batch, noise, rows) * batch.effect
    return draw_counts(rng, mean), batch_obs(rng, batch, rows)


def disease_activity(rng: np.random.Generator, donor: Donor) -> np.ndarray:
    """[len(PROGRAMS)] the activity that the donor's disease adds to each state program in one batch."""
    raised = [name in DISEASE_PROGRAMS.get(donor.disease, ()) for name in PROGRAMS]
    return np.where(raised, rng.gamma(4, 0.25, len(PROGRAMS)), 0)


def relative_expression(
    rng: np.random.Generator, programs: Programs, batch: DonorBatch, noise: float, rows: slice
) -> np.ndarray:
    """[R, G] expected expression of some cells of one batch, not normalised."""
    types = batch.types[rows]
    n_cells = len(types)
    own = programs.markers.loc[types].to_numpy()
    of_batch = programs.markers.loc[list(dict.fromkeys(batch.types))]
    by_lineage = of_batch.groupby(programs.lineage).max()  # [lineages, G], only lineages of this batch
    related = by_lineage.loc[programs.lineage[types]].to_numpy()  # [R, G]
    # a cell of low identity looks like background: it can only be told by excluding the other cells of the puzzle
    identity = rng.random((n_cells, 1)) ** noise
    detected = np.where(rng.random(own.shape) < (1 - DROPOUT) ** noise, own, 0)  # own markers after dropout
    leak = np.where(rng.random(own.shape) < 1 - (1 - LINEAGE_LEAK) ** noise, related, 0)  # markers of related types
    soup = AMBIENT_LEAK * noise * by_lineage.to_numpy().sum(axis=0)  # [G] ambient RNA, the same for all cells
    activity = rng.gamma(0.5, 0.5, (n_cells, len(PROGRAMS)))  # mostly small, sometimes large
    activity = activity + (disease_activity(rng, batch.donor) if batch.raised is None else batch.raised)

    is_ribosomal, is_mitochondrial = programs.genes.isin(RIBOSOMAL), programs.genes.isin(MITOCHONDRIAL)
    ribosomal = programs.ribosomal_share[types].to_numpy() * np.exp(rng.normal(0, 0.25, n_cells))  # [R]
    mitochondrial = np.exp(rng.normal(0, 0.5, n_cells))  # [R]
    if batch.suspension == "nucleus":  # nuclei lose the cytoplasmic RNA
        ribosomal, mitochondrial = 0.3 * ribosomal, 0.1 * mitochondrial
    factor = np.ones((n_cells, len(programs.genes)))
    factor[:, is_ribosomal] = ribosomal[:, None]
    factor[:, is_mitochondrial] = mitochondrial[:, None]
    return programs.background * factor + identity * np.maximum(detected, leak) + soup + activity @ programs.state


def draw_counts(rng: np.random.Generator, weights: np.ndarray) -> scipy.sparse.csr_matrix:
    """[R, G] negative binomial counts. Their mean is a log-normal library size x the normalised weights."""
    library = LIBRARY_SIZE * np.exp(rng.normal(0, 0.35, len(weights)))
    mean = library[:, None] * weights / weights.sum(axis=1, keepdims=True)
    # a Poisson variable with a gamma-distributed rate is negative binomial
    rate = rng.gamma(1 / DISPERSION, DISPERSION * mean)
    return scipy.sparse.csr_matrix(rng.poisson(rate).astype(np.float32))


def batch_obs(rng: np.random.Generator, batch: DonorBatch, rows: slice) -> pd.DataFrame:
    """[R] rows of obs for one batch. As in real files, a few cells have no label or are no primary data."""
    donor, types = batch.donor, batch.types[rows]
    n_cells = len(types)
    constant = {
        "donor_id": donor.donor_id,
        "batch": f"{donor.donor_id}_batch_{batch.number}",
        "tissue": donor.tissue,
        "disease": donor.disease,
        "sex": donor.sex,
        "development_stage": f"{donor.age}-year-old stage",
        "self_reported_ethnicity": donor.ethnicity,
        "suspension_type": batch.suspension,
        "assay": donor.assay,
        "smoking_status": donor.smoking_status,
    }
    obs = pd.DataFrame(constant, index=range(n_cells))
    obs["cell_type"] = np.where(rng.random(n_cells) < 0.03, "unknown", types)
    obs["is_primary_data"] = rng.random(n_cells) >= 0.04
    terms = ontology_term_ids()
    obs["cell_type_ontology_term_id"] = [terms.get(name, "unknown") for name in obs["cell_type"]]
    return obs
