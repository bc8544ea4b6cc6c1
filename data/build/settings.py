"""The settings of a build, and which values cannot be meant."""

from dataclasses import dataclass

from data.build.cells import COLUMN_FLAGS, parse_constants
from data.build.rank import GENE_CLASSES, PROFILES, RANKS, RankSettings
from data.errors import UserError
from data.options import option


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """How puzzles are built. Defaults: Cell-o1 (arXiv:2506.02911) and its code."""

    seed: int = option(0, "Seed of every random choice.")
    min_cells: int = option(8, "Fewest cells (= cell types) of a puzzle.")
    max_cells: int = option(15, "Most cells of a puzzle.")
    top_genes: int = option(50, "Genes listed per cell, most expressed first.")
    puzzles_per_n: int = option(40, "Train puzzles per file and number of cells N.")
    test_puzzles_per_n: int = option(10, "Test, and unseen, puzzles per file and number of cells N.")
    split: str | None = option(None, "Unit of train and test, by default donor.", ("donor", "cell", "instance"))
    test_fraction: float = option(0.15, "Share of the donors (of the cells, of the puzzles) that goes to test.")
    unseen_disease: tuple[str, ...] = option((), "Disease kept out of train and test, repeatable.")
    allow_leaks: bool = option(False, "Build even where train, test and unseen share cells, donors or near-duplicates.")
    compat: str = option(
        "paper", "authors: sorted candidates and the instance split of the code, leaks and all.", ("paper", "authors")
    )
    layer: str = option(
        "auto", "X, raw, or a name in layers (layers/raw for one called raw); auto: raw.X if any, else X."
    )
    rank: str = option(
        "expression",
        "expression: the paper's order. Ours: hvg, only highly variable genes; deg, by excess over the mean of (256 cells "
        "of) the donor's batch, with --profile cluster over the mean of its types.",
        RANKS,
    )
    hvg_genes: int = option(2000, "Genes that count as highly variable with --rank hvg.")
    profile: str = option(
        "cell", "cell: one cell stands for its type; cluster: the mean of the type's cells in the batch.", PROFILES
    )
    drop_genes: tuple[str, ...] = option(
        (), "Gene class never listed: ribosomal or mitochondrial; repeatable, or several with commas."
    )
    gene_dropout: float = option(
        0.0,
        "Chance that a gene of a train cell is passed over, drawn anew per puzzle, so that few cells give many views.",
    )
    allow_scaled: bool = option(False, "Rank genes even where the layer holds negative values or looks scaled.")
    include_non_primary: bool = option(False, "Use cells whose is_primary_data is not True as well.")
    organism: str | None = option(None, "Use the cells of this organism only; a file of another is skipped.")
    gene_key: str = option("feature_name", "var column with the gene names, or index.")
    cell_type_key: str = option("cell_type", "obs column with the cell type.")
    donor_key: str = option("donor_id", "obs column with the donor.")
    batch_key: str = option("batch", "obs column with the experimental batch; donor only where it lacks or is unknown.")
    tissue_key: str = option("tissue", "obs column with the tissue.")
    disease_key: str = option("disease", "obs column with the disease.")
    sex_key: str = option("sex", "obs column with the sex.")
    development_stage_key: str = option("development_stage", "obs column with the development stage.")
    ethnicity_key: str = option("self_reported_ethnicity", "obs column with the ethnicity.")
    suspension_key: str = option("suspension_type", "obs column with 'cell' or 'nucleus'; only cells are kept.")
    constant: tuple[str, ...] = option((), "NAME=VALUE: an obs column for the files that lack it, repeatable.")

    @property
    def split_mode(self) -> str:
        return self.split or ("instance" if self.compat == "authors" else "donor")

    @property
    def dropped_classes(self) -> tuple[str, ...]:
        return tuple(name.strip() for item in self.drop_genes for name in item.split(","))

    @property
    def column_keys(self) -> dict[str, str]:
        """{CELLxGENE obs column: what the files call it}."""
        return {name: getattr(self, flag[2:].replace("-", "_")) for name, flag in COLUMN_FLAGS.items()}

    @property
    def constants(self) -> dict[str, str]:
        return parse_constants(self.constant, self.column_keys)

    @property
    def rank_settings(self) -> RankSettings:
        """With --gene-dropout more genes are ranked than are shown."""
        return RankSettings(
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
        """Asked for: with the flag, or with the authors' behaviour, of which leaks are a part."""
        return self.allow_leaks or self.compat == "authors"


def check_config(config: BuildConfig) -> None:
    """Raise UserError, naming the options, for values that cannot be meant."""
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
    if not 0 <= config.test_fraction < 1:
        raise UserError(f"--test-fraction {config.test_fraction}: must be at least 0 and below 1")
    if not 0 <= config.gene_dropout <= 0.5:
        raise UserError(f"--gene-dropout {config.gene_dropout}: must be from 0 to 0.5")
    if config.gene_dropout and config.split_mode == "instance":
        raise UserError("--gene-dropout changes train cells only, so it needs --split donor or cell, not instance")
    if config.compat == "authors" and config.split_mode != "instance":
        raise UserError(f"--compat authors means --split instance, which contradicts --split {config.split}")
    parse_constants(config.constant, config.column_keys)
