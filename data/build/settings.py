"""The settings of a build, and the check that they can be used together."""

from dataclasses import dataclass
from functools import partial

from data.build.cells import COLUMN_FLAGS, SUSPENSION_KINDS, CellRules, parse_constants
from data.build.columns import clean_text
from data.build.rank import GENE_CLASSES, PROFILES, RANKS, RankSettings
from data.errors import UserError
from data.options import option

# --help lists the settings under these headings
puzzles = partial(option, section="Puzzles")
splits = partial(option, section="Splits")
genes = partial(option, section="Genes")
cells = partial(option, section="Cells and columns")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """How puzzles are built. The defaults are those of Cell-o1 (arXiv:2506.02911) and its code."""

    seed: int = puzzles(0, "Seed of every random choice.")
    min_cells: int = puzzles(8, "Smallest number of cells (= cell types) of a puzzle.")
    max_cells: int = puzzles(15, "Largest number of cells of a puzzle.")
    top_genes: int = puzzles(50, "Genes listed per cell, most expressed first.")
    puzzles_per_n: int = puzzles(40, "Train puzzles per file and per number of cells N.")
    test_puzzles_per_n: int = puzzles(10, "Test puzzles, and unseen puzzles, per file and per number of cells N.")
    split: str | None = splits(
        None, "What goes to train or test as a unit; default: donor.", ("donor", "cell", "instance")
    )
    test_fraction: float = splits(0.15, "Share of the donors (or cells, or puzzles) for test.")
    unseen_disease: tuple[str, ...] = splits((), "Disease whose cells are kept out of train and test; repeatable.")
    allow_leaks: bool = splits(False, "Build even if train, test and unseen share cells, donors or near-duplicates.")
    compat: str = splits(
        "paper",
        "authors: as in the authors' code, sorted candidates and --split instance; splits share cells and donors.",
        ("paper", "authors"),
    )
    layer: str = genes(
        "auto", "X, raw, or a name in layers (layers/raw for a layer called raw); auto: raw.X if present, else X."
    )
    rank: str = genes(
        "expression",
        "expression: the paper's order. Ours: hvg, only highly variable genes; deg, by the difference from the mean of "
        "(256 cells of) the donor's batch, with --profile cluster from the mean of its types.",
        RANKS,
    )
    hvg_genes: int = genes(2000, "Genes that count as highly variable with --rank hvg.")
    profile: str = genes(
        "cell", "cell: one cell stands for its type; cluster: the mean of the type's cells in the batch.", PROFILES
    )
    drop_genes: tuple[str, ...] = genes(
        (), "Gene class never listed: ribosomal or mitochondrial; repeatable, or several with commas."
    )
    gene_dropout: float = genes(
        0.0,
        "Probability that a gene of a train cell is left out, drawn anew for each puzzle: few cells give many views.",
    )
    allow_scaled: bool = genes(False, "Rank genes even if the layer has negative values or looks scaled.")
    include_non_primary: bool = cells(False, "Also use cells whose is_primary_data is not True.")
    suspension: tuple[str, ...] = cells(
        ("cell",), "Suspension types to use: cell, nucleus, na (not stated); repeatable, or several with commas."
    )
    keep_label: tuple[str, ...] = cells(
        (), "Label to use although it looks like no cell type (doublet, unassigned, low quality); repeatable."
    )
    allow_numeric_labels: bool = cells(
        False, "Use cell types (or a sex, tissue, disease) that are only numbers or ids."
    )
    organism: str | None = cells(None, "Use the cells of this organism only; a file of another organism is skipped.")
    gene_key: str = genes("feature_name", "var column with the gene names, or index.")
    cell_type_key: str = cells("cell_type", "obs column with the cell type.")
    donor_key: str = cells("donor_id", "obs column with the donor.")
    batch_key: str = cells(
        "batch", "obs column with the experimental batch; cells without one are grouped by donor only."
    )
    tissue_key: str = cells("tissue", "obs column with the tissue; none: no context states it.")
    disease_key: str = cells("disease", "obs column with the disease; none: no context states it.")
    sex_key: str = cells("sex", "obs column with the sex; none: no context states it.")
    development_stage_key: str = cells(
        "development_stage", "obs column with the development stage; none: no context states it."
    )
    ethnicity_key: str = cells("self_reported_ethnicity", "obs column with the ethnicity; none: no context states it.")
    suspension_key: str = cells("suspension_type", "obs column with 'cell' or 'nucleus'; see --suspension.")
    constant: tuple[str, ...] = cells((), "NAME=VALUE: the value of an obs column for all cells; repeatable.")

    @property
    def split_mode(self) -> str:
        """What goes to train or test as a unit: "donor", "cell" or "instance" (a puzzle)."""
        return self.split or ("instance" if self.compat == "authors" else "donor")

    @property
    def dropped_classes(self) -> tuple[str, ...]:
        """The gene classes of --drop-genes, which takes several with commas."""
        return tuple(name.strip() for item in self.drop_genes for name in item.split(","))

    @property
    def cell_rules(self) -> CellRules:
        """The part of the settings that says which cells are used (data/build/cells.py)."""
        return CellRules(
            organism=self.organism,
            include_non_primary=self.include_non_primary,
            suspension=tuple(name.strip().lower() for item in self.suspension for name in item.split(",")),
            keep_label=self.keep_label,
            allow_numeric_labels=self.allow_numeric_labels,
        )

    @property
    def column_keys(self) -> dict[str, str]:
        """{CELLxGENE obs column: its name in the files}."""
        return {name: getattr(self, flag[2:].replace("-", "_")) for name, flag in COLUMN_FLAGS.items()}

    @property
    def constants(self) -> dict[str, str]:
        """{obs column: value} of --constant."""
        return parse_constants(self.constant, self.column_keys)

    @property
    def rank_settings(self) -> RankSettings:
        """The part of the settings that data/build/rank.py needs."""
        return RankSettings(
            # --gene-dropout passes over at most half of the genes: three times as many fill a list almost always
            top_genes=self.top_genes * (3 if self.gene_dropout else 1),
            layer=self.layer,
            gene_key=self.gene_key,
            allow_scaled=self.allow_scaled,
            drop_genes=self.dropped_classes,
            rank=self.rank,
            hvg_genes=self.hvg_genes,
        )

    @property
    def accepts_leaks(self) -> bool:
        """Whether splits that share cells or donors are accepted: by the flag, or because the authors' splits do."""
        return self.allow_leaks or self.compat == "authors"


def check_config(config: BuildConfig) -> None:
    """Raise UserError, with the option's name, for a value out of range or options that contradict each other."""
    if config.min_cells < 2:
        raise UserError(f"--min-cells {config.min_cells}: a puzzle needs at least 2 cells")
    if config.min_cells > config.max_cells:
        raise UserError(f"--min-cells {config.min_cells} is larger than --max-cells {config.max_cells}")
    for name in ("top_genes", "puzzles_per_n", "test_puzzles_per_n", "hvg_genes"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
    unknown = [name for name in config.dropped_classes if name not in GENE_CLASSES]
    if unknown:
        raise UserError(f"--drop-genes {unknown[0]}: not one of {', '.join(GENE_CLASSES)}")
    suspension = config.cell_rules.suspension
    if unknown := [name for name in suspension if name not in SUSPENSION_KINDS]:
        raise UserError(f"--suspension {unknown[0]}: not one of {', '.join(SUSPENSION_KINDS)}")
    for name in config.keep_label:
        if not clean_text(name):
            raise UserError(f"--keep-label {name}: this means that the cell type is not known; it cannot be a label")
    if not 0 <= config.test_fraction < 1:
        raise UserError(f"--test-fraction {config.test_fraction}: must be at least 0 and below 1")
    if not 0 <= config.gene_dropout <= 0.5:
        raise UserError(f"--gene-dropout {config.gene_dropout}: must be from 0 to 0.5")
    if config.gene_dropout and config.split_mode == "instance":
        raise UserError("--gene-dropout changes train cells only, so it needs --split donor or cell, not instance")
    if config.compat == "authors" and config.split_mode != "instance":
        raise UserError(f"--compat authors means --split instance, which contradicts --split {config.split}")
    parse_constants(config.constant, config.column_keys)
