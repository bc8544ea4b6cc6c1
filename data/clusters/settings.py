"""The settings with which the clusters of a file become profiles, and the check that they can be used."""

from dataclasses import dataclass
from functools import partial

from data.build.cells import COLUMN_FLAGS, NUMERIC_REFUSED, parse_constants
from data.build.rank import GENE_CLASSES
from data.errors import UserError
from data.options import option

cells = partial(option, section="Cells and columns")
genes = partial(option, section="Genes")


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """How clusters become profiles. Options that a build has, too, mean the same there (data/build/settings.py)."""

    sample_key: str | None = cells(
        None, "obs column with the donor or sample of a cell; default: donor_id, where the file has it."
    )
    min_cells: int = cells(3, "Cells that a cluster needs in a sample to get a profile.")
    organism: str = cells("Homo sapiens", "The organism whose genes the model knows; cells of others get no profile.")
    tissue_key: str = cells("tissue", "obs column with the tissue; none: no context states it.")
    disease_key: str = cells("disease", "obs column with the disease; none: no context states it.")
    sex_key: str = cells("sex", "obs column with the sex; none: no context states it.")
    development_stage_key: str = cells(
        "development_stage", "obs column with the development stage; none: no context states it."
    )
    ethnicity_key: str = cells("self_reported_ethnicity", "obs column with the ethnicity; none: no context states it.")
    constant: tuple[str, ...] = cells((), "NAME=VALUE: the value of an obs column for all cells; repeatable.")
    layer: str = genes(
        "auto", "X, raw, or a name in layers (layers/raw for a layer called raw); auto: raw.X if present, else X."
    )
    gene_key: str | None = genes(
        None, "var column with the gene names, or index; default: the place that has gene symbols."
    )
    top_genes: int = genes(50, "Genes listed per cluster.")
    drop_genes: tuple[str, ...] = genes(
        (), "Gene class never listed: ribosomal or mitochondrial; repeatable, or several with commas."
    )

    @property
    def dropped_classes(self) -> tuple[str, ...]:
        """The gene classes of --drop-genes, which takes several with commas."""
        return tuple(name.strip() for item in self.drop_genes for name in item.split(","))

    @property
    def column_keys(self) -> dict[str, str]:
        """{CELLxGENE obs column of a context: its name in the file}."""
        return {name: getattr(self, COLUMN_FLAGS[name][2:].replace("-", "_")) for name in NUMERIC_REFUSED}

    @property
    def constants(self) -> dict[str, str]:
        """{obs column: value} of --constant."""
        return parse_constants(self.constant, self.column_keys)


def check_settings(settings: ProfileSettings) -> None:
    """Raise UserError, with the option's name, for a value out of range."""
    for name in ("min_cells", "top_genes"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be at least 1")
    if unknown := [name for name in settings.dropped_classes if name not in GENE_CLASSES]:
        raise UserError(f"--drop-genes {unknown[0]}: not one of {', '.join(GENE_CLASSES)}")
    parse_constants(settings.constant, settings.column_keys)
