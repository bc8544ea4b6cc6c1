"""What an inspection finds in a file of cells: plain values, for the text, for --json and for other commands."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LayerFacts:
    """One matrix of the file."""

    name: str
    """As --layer takes it: X, raw, or a name in layers."""
    values: str
    """counts, counts with fractions, log-normalised, normalised, scaled, or what is wrong with it."""
    usable: bool
    """Whether a build can rank its values."""
    encoding: str
    """csr, csc or dense; "" when it cannot be read."""
    n_genes: int
    problem: str = ""
    """Why it cannot be used."""
    empty_cells: int = 0
    """Cells without a stored value, where that is cheap to know (csr)."""


@dataclass(frozen=True)
class GeneNames:
    """One source of gene names: a var column, or the index."""

    key: str
    """As --gene-key takes it."""
    kind: str
    """symbols, Ensembl ids, numbers or other names."""
    examples: list[str]


@dataclass(frozen=True)
class GeneFacts:
    """The genes of the matrix that a build reads."""

    sources: list[GeneNames]
    key: str | None
    """The source that a build should use; None when no source can be used."""
    feature_types: dict[str, int]
    """{value of var's feature_types: genes with it}; empty when the file has no such column."""
    spike_ins: int
    left_out: dict[str, int] = field(default_factory=dict)
    """{what rows of var are that are no genes: their number}."""
    notes: list[str] = field(default_factory=list)
    """What a build says about the genes."""
    problem: str = ""
    """Why a build refuses them."""

    @property
    def kind(self) -> str | None:
        """The kind of the names that a build should use."""
        return next((source.kind for source in self.sources if source.key == self.key), None)


@dataclass(frozen=True)
class ColumnFacts:
    """One obs column. A long column without categories is judged from a sample of its cells."""

    name: str
    kind: str
    """labels, clusters (few values, all numbers or names such as C12), numbers, identifiers, true/false, empty or unreadable."""
    n_values: int
    """Distinct known values; in the sample, when it is not exact."""
    n_missing: int
    exact: bool
    """False when only a sample was read."""
    most_common: list[tuple[str, int]]
    """(value, cells) of labels and clusters, commonest first."""
    looks_like_cell_types: bool = False


@dataclass(frozen=True)
class Usable:
    """The cells that a build would use."""

    cells: int
    dropped: dict[str, int]
    """{reason: cells}."""
    labels: dict[str, int]
    """{cell type: cells}, commonest first."""
    donors: int
    labels_of_donor: list[int]
    """Of each donor the cell types of its batch that has most."""
    groups: int
    """Donors and batches."""
    most_labels: int
    """Cell types of the group that has most."""
    notes: list[str]


@dataclass(frozen=True)
class FileFacts:
    """What a file of cells holds. `data.inspection.text.facts_text` prints it."""

    path: Path
    kind: str
    n_cells: int
    n_genes: int
    layers: list[LayerFacts]
    layer: str | None
    """The layer that a build should read; None when no layer can be used."""
    genes: GeneFacts | None
    organism: str | None
    organism_source: str
    """Where the organism is stated, or that it was guessed from the gene names."""
    columns: list[ColumnFacts]
    """All obs columns."""
    used: dict[str, str]
    """{CELLxGENE name: obs column or "= VALUE"} of what a build would read."""
    usable: Usable | None
    """None when a build cannot tell (see problems)."""
    problems: list[str]
    """Why nothing can be built, each with its remedy; empty when the command works."""
    notes: list[str]
    command: str
    """The command that builds puzzles from the file."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "path": str(self.path)}
