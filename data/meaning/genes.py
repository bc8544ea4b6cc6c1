"""The genes of a layer: which rows of var are genes, and by which names they are listed.

G is the number of columns of the layer, which are the rows of its var table.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from data.build.columns import is_number, unwrapped
from data.build.h5ad import as_text, column_names, nearest_names, read_column, table_index
from data.build.matrix import Matrix
from data.errors import UserError
from data.meaning.ensembl import SOURCE, symbols_of
from data.meaning.names import (
    ENSEMBL_ID,
    MOST,
    VERSION,
    kind_of_names,
    nameless,
    no_genes,
    note_on_shared,
    notes_on_names,
    without_copies,
    without_genome,
    without_id,
)

TYPE_COLUMNS = ("featuretypes", "featuretype", "modality", "modalities")
"""Columns of var, as _plain gives them, that say what a row is."""
GENE_TYPES = frozenset(
    {"geneexpression", "gex", "rna", "mrna", "scrna", "gene", "genes", "expression", "transcriptome"}
)
OTHER_TYPES = frozenset(
    {
        "antibodycapture",
        "antibody",
        "adt",
        "prot",
        "protein",
        "proteins",
        "cite",
        "hto",
        "hashtag",
        "multiplexingcapture",
    }
    | {"crisprguidecapture", "crispr", "guide", "sgrna", "grna", "peaks", "peak", "atac", "chromatinaccessibility"}
    | {"custom", "antigencapture", "vdj", "vdjt", "vdjb", "tcr", "bcr", "tag", "cellplex", "spikein", "ercc"}
)
"""Values of such a column, as _plain gives them, for rows that are no genes. Other words may be biotypes of genes."""
SYMBOL_COLUMNS = (
    *("featurename", "genesymbols", "genesymbol", "genename", "genenames", "symbols", "symbol", "geneshortname"),
    *(
        "hgncsymbol",
        "mgisymbol",
        "externalgenename",
        "hugosymbol",
        "hgnc",
        "genes",
        "gene",
        "features",
        "name",
        "names",
    ),
)
"""Columns of var, as _plain gives them, that hold symbols, the best first."""
SYMBOL_WORDS = ("symbol", "genename", "featurename")
"""A column with such a word in its name, as _plain gives it, may hold symbols too: real_gene_name."""


@dataclass(frozen=True)
class GeneTable:
    """The columns of a layer as genes."""

    names: np.ndarray
    """[G] object: the name by which a gene is listed."""
    is_gene: np.ndarray
    """[G] bool: False for tags, peaks, guides, spike-ins and rows without a name."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the report."""
    left_out: dict[str, int] = field(default_factory=dict)
    """{what rows are that are no genes: their number}."""


@dataclass(frozen=True)
class NameSource:
    """A place where the genes of a layer have names."""

    key: str
    """As --gene-key takes it: a var column, or "index"."""
    kind: str
    """symbols, Ensembl ids, numbers or other names."""
    names: list[str]
    """[G]"""


@dataclass(frozen=True)
class _Var:
    """The var table of a layer. The table raw/var often lacks columns, which are then taken from var by the index."""

    matrix: Matrix

    @property
    def table(self) -> str:
        return "raw/var" if self.matrix.layer == "raw" else "var"

    @cached_property
    def index(self) -> list[str]:
        """[G] the names of the rows."""
        return self._index_of(self.table)

    @cached_property
    def _var_index(self) -> list[str]:
        return self._index_of("var")

    def _index_of(self, table: str) -> list[str]:
        path = self.matrix.path
        index = table_index(self.matrix.node.file, table, path)[:].tolist()
        return [unwrapped(as_text(name, f"{path}: the index of {table}")) for name in index]

    @cached_property
    def columns(self) -> list[str]:
        """The names of the columns that can be read for all rows."""
        names = column_names(self.matrix.node.file[self.table])
        return names + [name for name in self._columns_of_var() if name not in names]

    def _columns_of_var(self) -> list[str]:
        """The columns of var when the rows of raw/var can be looked up there, else none."""
        if self.table == "var":
            return []
        known = set(self._var_index)
        unique = len(known) == len(self._var_index)
        return column_names(self.matrix.node.file["var"]) if unique and known >= set(self.index) else []

    def values(self, name: str) -> list[str | None]:
        """[G] the values of one of `columns`, None where a value is missing."""
        file, path = self.matrix.node.file, self.matrix.path
        if name in column_names(file[self.table]):
            return read_column(file, self.table, name, path).texts()
        by_index = dict(zip(self._var_index, read_column(file, "var", name, path).texts(), strict=True))
        return [by_index[gene] for gene in self.index]

    def readable(self, name: str) -> list[str | None] | None:
        """The values of a column that nobody named, or None when it cannot be read."""
        try:
            return self.values(name)
        except UserError:
            return None

    def called(self, wanted: Iterable[str]) -> list[str]:
        """The columns with these names, in the order of `wanted`; case and signs are ignored."""
        return [name for plain in wanted for name in self.columns if _plain(name) == plain]

    @cached_property
    def named_symbols(self) -> list[str]:
        """The columns whose names say that they hold symbols, the best first."""
        usual = self.called(SYMBOL_COLUMNS)
        named = [name for name in self.columns if any(word in _plain(name) for word in SYMBOL_WORDS)]
        others = [name for name in named if not _OF_SPECIES.search(_plain(name))]
        return usual + [name for name in others if name not in usual]


_OF_SPECIES = re.compile("ortholog|homolog|mouse|human")
"""In the plain name of a column: the genes of another species, perhaps. It is used where --gene-key names it, or nothing else
has names."""


def _plain(text: str) -> str:
    """A text in lower case, letters only: "Gene Expression" is "geneexpression"."""
    return re.sub(r"[^a-z]", "", text.lower())


def gene_table(matrix: Matrix, gene_key: str = "feature_name") -> GeneTable:
    """Which columns of a layer are genes, and their names.

    gene_key: a var column, or `index`. A missing name is replaced by the var index. What programs add to a name goes:
    an Ensembl id (CD4_ENSG00000010610), a number that made it unique (CD4-1), the name of a genome (GRCh38_CD4).
    Ensembl ids are replaced by symbols, of a var column or of the shipped table, where there are some. Raises UserError
    when the column is missing, no row is a gene, the names are numbers, or a name cannot be part of a list.
    """
    var = _Var(matrix)
    names, of_genome = without_genome(_named(var, gene_key))
    names = [without_id(name) for name in names]
    is_gene, left_out, notes = _only_genes(var, names)
    _refuse_numbers(var, names, is_gene, gene_key)
    names, more = _symbols_for_ids(var, names, is_gene, gene_key)
    if bad := _without_separator(var, names, is_gene):
        left_out["name that no list can hold"] = sum(bad.values())
        shown = ", ".join(map(repr, list(bad)[:3]))
        n_rows = sum(bad.values())
        rows = f"{n_rows} row{'' if n_rows == 1 else 's'} of var"
        notes.append(f"{rows} left out for a name that is empty or has a comma, which ends a name in a list: {shown}")
    genes = [name for name, wanted in zip(names, is_gene.tolist(), strict=True) if wanted]
    more += [*notes_on_names(genes), *note_on_shared(genes)]
    names, of_copies = without_copies(names, is_gene.tolist())
    return GeneTable(np.array(names, dtype=object), is_gene, notes + of_genome + more + of_copies, left_out)


def _without_separator(var: _Var, names: list[str], is_gene: np.ndarray) -> dict[str, int]:
    """{name that a list of genes cannot hold: its rows}, which are no genes in is_gene from now on.

    Raises UserError when most names are such: they are sentences.
    """
    used = np.flatnonzero(is_gene).tolist()
    bad = [i for i in used if ", " in names[i] or "\n" in names[i] or not names[i].strip()]
    if len(bad) > MOST * len(used):
        raise UserError(
            f"{var.matrix.path}: the gene name {names[bad[0]]!r} is empty or holds the separator of the gene list; see "
            "--gene-key"
        )
    is_gene[bad] = False
    return dict(Counter(names[i] for i in bad))


def name_sources(matrix: Matrix, wanted: str = "feature_name") -> list[NameSource]:
    """Where the genes of a layer have names: the key that a user wants, columns named for symbols or ids, the index."""
    var = _Var(matrix)
    ids = [name for name in var.columns if "id" in name.lower() and not _OF_SPECIES.search(_plain(name))]
    index = [without_id(name) for name in without_genome(var.index)[0]]
    keys = [name for name in (wanted, *var.named_symbols, *ids) if name in var.columns]
    found = [*_sources(var, keys, wanted, var.named_symbols), NameSource("index", kind_of_names(index), index)]
    if all(source.kind == "numbers" for source in found):  # then they may be of the file's own species
        others = [name for name in var.columns if _OF_SPECIES.search(_plain(name))]
        return [*_sources(var, others, wanted, others), *found]
    return found


def _sources(var: _Var, keys: list[str], wanted: str, told: list[str]) -> Iterator[NameSource]:
    """Those of some columns that hold names. told: columns whose own names say that they hold symbols."""
    for key in dict.fromkeys(keys):
        values = var.readable(key)
        named, _ = without_genome([value or gene for value, gene in zip(values or (), var.index, strict=False)])
        names = [without_id(name) for name in named]
        kind = kind_of_names(names)
        # a column with few values is a class of genes, such as a biotype
        names_genes = key in told or kind == "Ensembl ids"
        if names and (key == wanted or names_genes and len(set(names)) > MOST * len(names)):
            yield NameSource(key, kind, names)


def best_source(sources: list[NameSource], wanted: str) -> str | None:
    """The key to use: the wanted one if it has symbols, else another with symbols, else any that are no numbers."""
    kinds = {source.key: source.kind for source in sources}
    if kinds.get(wanted) == "symbols":
        return wanted
    symbols = [key for key, kind in kinds.items() if kind == "symbols"]
    others = [key for key, kind in kinds.items() if kind != "numbers"]
    return next(iter([*symbols, *([wanted] if wanted in others else []), *others]), None)


def _named(var: _Var, gene_key: str) -> list[str]:
    """[G] the names that --gene-key gives, the index where a value is missing."""
    if gene_key == "index":
        return var.index
    if gene_key in var.columns:
        return [name if name is not None else gene for name, gene in zip(var.values(gene_key), var.index, strict=True)]
    symbols = _columns_of_symbols(var, np.ones(len(var.index), dtype=bool), gene_key)
    raise UserError(
        f"{var.matrix.path}: {var.table} has no column {gene_key!r} (nearest: {nearest_names(gene_key, var.columns)}); "
        "name the column of gene names with --gene-key, or --gene-key index for the index"
        + (f" (gene symbols are in {', '.join(map(repr, symbols[:4]))})" if symbols else "")
    )


def _only_genes(var: _Var, names: list[str]) -> tuple[np.ndarray, dict[str, int], list[str]]:
    """([G] bool: the row is a gene, what is left out, notes on it). Raises UserError when no row is a gene."""
    kinds: list[str | None] = [None] * len(names)  # what a row is, when it is no gene
    for column in var.called(TYPE_COLUMNS):
        _mark(kinds, _types(var.readable(column)))
    for column in var.called(("featurebiotype",)):
        values = var.readable(column) or []
        spikes = {value for value in set(values) if value and _plain(value) in ("spikein", "ercc")}
        _mark(kinds, ["spike-in" if value in spikes else None for value in values])
    for texts in (names, var.index) if names != var.index else (names,):
        _mark(kinds, no_genes(texts))
    _mark(kinds, nameless(names))
    counts = Counter(kind for kind in kinds if kind)
    listed = ", ".join(f"{n} {kind!r}" for kind, n in sorted(counts.items()))
    if counts.total() == len(kinds):
        raise UserError(f"{var.matrix} holds no genes (its var rows are {listed}); choose another file or --layer")
    notes = [f"{counts.total()} of {len(kinds)} rows of var are no genes and are left out: {listed}"] if counts else []
    return np.array([kind is None for kind in kinds], dtype=bool), dict(sorted(counts.items())), notes


def _mark(kinds: list[str | None], found: list[str | None]) -> None:
    """Write what was found about rows that have no kind yet."""
    for i, kind in enumerate(found):
        if kinds[i] is None and kind is not None:
            kinds[i] = kind


def _types(values: list[str | None] | None) -> list[str | None]:
    """[G] the type of the rows that are no genes, else None; [] for a column that does not say what is a gene."""
    plain = {value: _plain(value) for value in set(values or ()) if value}
    if GENE_TYPES & set(plain.values()):  # one type is that of genes, so all others are not
        # no value says nothing: an outer join leaves none for the genes of a file without the column
        return [None if not value or plain[value] in GENE_TYPES else value for value in values or ()]
    return [value if value and plain[value] in OTHER_TYPES else None for value in values or ()]


def _refuse_numbers(var: _Var, names: list[str], is_gene: np.ndarray, gene_key: str) -> None:
    """Raise UserError when the names of genes are numbers: an export lost them."""
    genes = [name for name, wanted in zip(names, is_gene.tolist(), strict=True) if wanted]
    if sum(map(is_number, genes)) <= MOST * len(genes):
        return
    others = _columns_of_symbols(var, is_gene, gene_key)
    where = "index" if gene_key == "index" else f"column {gene_key!r}"
    remedy = f"name the column with the symbols: --gene-key {others[0]!r}" if others else ""
    if len(others) > 1:
        remedy += f" (or {', '.join(map(repr, others[1:4]))})"
    raise UserError(
        f"{var.matrix.path}: the gene names in the {where} of {var.table} are numbers ({', '.join(genes[:3])}), so the "
        f"names were lost when the file was written; "
        + (remedy or f"no column of {var.table} has symbols: export the file again with the gene names")
    )


def _columns_of_symbols(var: _Var, is_gene: np.ndarray, gene_key: str) -> list[str]:
    """The columns of var, or "index", that hold symbols; usual names first."""
    usual = var.named_symbols
    others = sorted((n for n in var.columns if n not in usual), key=lambda n: bool(_OF_SPECIES.search(_plain(n))))
    found = [name for name in (*usual, *others) if name != gene_key and _are_symbols(var.readable(name), is_gene)]
    return found + (["index"] if gene_key != "index" and _are_symbols(var.index, is_gene) else [])


def _are_symbols(values: list[str | None] | None, is_gene: np.ndarray) -> bool:
    """Whether values look like gene symbols: known, distinct, neither ids nor numbers nor sentences."""
    if values is None:
        return False
    known = [value for value, wanted in zip(values, is_gene.tolist(), strict=True) if wanted and value]
    words = [value for value in known if not is_number(value) and not ENSEMBL_ID.fullmatch(value) and " " not in value]
    return len(known) >= MOST * is_gene.sum() and len(words) > MOST * len(known) and len(set(words)) > MOST * len(words)


def _symbols_for_ids(var: _Var, names: list[str], is_gene: np.ndarray, gene_key: str) -> tuple[list[str], list[str]]:
    """([G] names, notes). When most names are Ensembl ids, they are replaced by symbols where there are some."""
    ids = [i for i, name in enumerate(names) if is_gene[i] and ENSEMBL_ID.fullmatch(name)]
    if len(ids) <= MOST * is_gene.sum():
        return names, []  # a few genes without a symbol keep their id as it stands
    found = f"the gene names are Ensembl ids ({names[ids[0]]})"
    versionless = list(names)
    for i in ids:
        versionless[i] = VERSION.sub("", names[i])
    columns = [
        name
        for name in (*var.named_symbols, "index")
        if name != gene_key and _are_symbols(var.index if name == "index" else var.readable(name), is_gene)
    ]
    if columns:
        values = var.index if columns[0] == "index" else var.values(columns[0])
        symbols, _ = without_genome([value or "" for value in values])
        of_id = {i: without_id(symbols[i]) for i in ids if symbols[i]}
        source = "index of var" if columns[0] == "index" else f"var column {columns[0]!r}"
    else:
        table = symbols_of({versionless[i].removesuffix("_PAR_Y") for i in ids})
        of_id = {i: symbol for i in ids if (symbol := table.get(versionless[i].removesuffix("_PAR_Y")))}
        source = f"table {SOURCE}"
    if not of_id:
        return versionless, [f"{found} and no symbols are known for them, so the ids are listed"]
    for i, symbol in of_id.items():
        versionless[i] = symbol
    rest = f"; {len(ids) - len(of_id)} stay ids" if len(of_id) < len(ids) else ""
    return versionless, [f"{found}: {len(of_id)} are listed by the symbols of the {source}{rest}"]
