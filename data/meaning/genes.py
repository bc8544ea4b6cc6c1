"""The genes of a layer: which rows of var are genes, and by which names they are listed.

G is the number of columns of the layer, which are the rows of its var table.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from data.build.columns import clean_text, is_number, unwrapped
from data.build.h5ad import as_text, column_names, nearest_names, read_column, table_index
from data.build.matrix import Matrix
from data.errors import UserError
from data.meaning.ensembl import SOURCE, known_symbols, symbols_of

_ENSEMBL_ID = re.compile(r"ENS[A-Z]*G\d{6,}(\.\d+)?(_PAR_Y)?|FBgn\d{7}|WBGene\d{8}")
"""Ids of Ensembl, and those of FlyBase and WormBase, which Ensembl takes over."""
_VERSION = re.compile(r"\.\d+(?=(_PAR_Y)?$)")
_ENSEMBL_PREFIX = re.compile(r"ENS[A-Z]*G\d{6,}(\.\d+)?[_|-](?!PAR_Y$)(?=[A-Za-z])")
_ENSEMBL_SUFFIX = re.compile(r"(?<=.)[_-]ENS[A-Z]*G\d+(\.\d+)?$")
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
_COPY = re.compile(r"(.+)[-.](\d{1,3})")
"""A name that scanpy (CD3D-1) or R (CD3D.1) made unique, when CD3D is a name too."""
_FLY = re.compile(r"CG\d+$|FBgn\d")
"""Names that many genes of Drosophila have."""
FLY_SHARE = 0.02
"""Share of such names in a file of Drosophila, where nan and na are genes."""
_NO_GENE = re.compile(
    r"(?P<spike_in>(gSpikein[_-])?ERCC[-_.]\d+\b)|(?P<antibody_tag>.*[_.-]TotalSeq)"
    r"|(?P<peak>(chr[\w.]*|\d{1,2}|[XYM]T?)[:_-]\d{2,}[_-]\d{3,}$)",
    re.IGNORECASE,
)
"""The beginning of names that are no genes; the group says what they are."""
MOST = 0.5
"""Share of the names that must be Ensembl ids, or numbers, for the names of a file to be called so."""
KIND_SAMPLE = 2000
"""About this many names, evenly spaced, are looked at to tell their kind."""
LONGEST_SYMBOL = 25


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
        others = [name for name in self.columns if any(word in _plain(name) for word in SYMBOL_WORDS)]
        return usual + [name for name in others if name not in usual]


def _plain(text: str) -> str:
    """A text in lower case, letters only: "Gene Expression" is "geneexpression"."""
    return re.sub(r"[^a-z]", "", text.lower())


def gene_table(matrix: Matrix, gene_key: str = "feature_name") -> GeneTable:
    """Which columns of a layer are genes, and their names.

    gene_key: a var column, or `index`. A missing name is replaced by the var index. Suffixes such as `_ENSG00000010610`
    go, and those that made a name unique (CD3D-1). Ensembl ids are replaced by symbols, of a var column or of the
    shipped table, where there are some. Raises UserError when the column is missing, no row is a gene, the names are
    numbers, or a name cannot be part of a list.
    """
    var = _Var(matrix)
    names = [_without_id(name) for name in _named(var, gene_key)]
    is_gene, left_out, notes = _only_genes(var, names)
    _refuse_numbers(var, names, is_gene, gene_key)
    names, more = _symbols_for_ids(var, names, is_gene, gene_key)
    names, of_copies = _without_copies(names)
    used = (name for name, wanted in zip(names, is_gene.tolist(), strict=True) if wanted)
    bad = next((name for name in used if ", " in name or "\n" in name or not name.strip()), None)
    if bad is not None:
        raise UserError(
            f"{matrix.path}: the gene name {bad!r} is empty or holds the separator of the gene list; see --gene-key"
        )
    return GeneTable(np.array(names, dtype=object), is_gene, notes + more + of_copies, left_out)


def name_sources(matrix: Matrix, wanted: str = "feature_name") -> list[NameSource]:
    """Where the genes of a layer have names: the key that a user wants, columns named for symbols or ids, the index."""
    var = _Var(matrix)
    ids = [name for name in var.columns if "id" in name.lower()]
    keys = [name for name in (wanted, *var.named_symbols, *ids) if name in var.columns]
    sources = []
    for key in dict.fromkeys(keys):
        values = var.readable(key)
        names = [_without_id(value or gene) for value, gene in zip(values or (), var.index, strict=False)]
        kind = kind_of_names(names)
        # a column with few values is a class of genes, such as a biotype
        told = key in var.named_symbols or kind == "Ensembl ids"
        if names and (key == wanted or told and len(set(names)) > MOST * len(names)):
            sources.append(NameSource(key, kind, names))
    index = [_without_id(name) for name in var.index]
    return [*sources, NameSource("index", kind_of_names(index), index)]


def best_source(sources: list[NameSource], wanted: str) -> str | None:
    """The key to use: the wanted one if it has symbols, else another with symbols, else any that are no numbers."""
    kinds = {source.key: source.kind for source in sources}
    if kinds.get(wanted) == "symbols":
        return wanted
    symbols = [key for key, kind in kinds.items() if kind == "symbols"]
    others = [key for key, kind in kinds.items() if kind != "numbers"]
    return next(iter([*symbols, *([wanted] if wanted in others else []), *others]), None)


def kind_of_names(names: list[str]) -> str:
    """symbols, Ensembl ids, numbers or other names, by what most of about KIND_SAMPLE names are."""
    sample = names[:: max(1, len(names) // KIND_SAMPLE)]
    if sum(_ENSEMBL_ID.fullmatch(name) is not None for name in sample) > MOST * len(sample):
        return "Ensembl ids"
    if sum(map(is_number, sample)) > MOST * len(sample):
        return "numbers"
    return "symbols" if sum(len(name) <= LONGEST_SYMBOL for name in sample) > MOST * len(sample) else "other names"


def are_genes(names: list[str]) -> bool:
    """Whether most names are Ensembl ids, or symbols of the shipped table."""
    n_known = len(known_symbols(set(names))) + sum(_ENSEMBL_ID.fullmatch(name) is not None for name in names)
    return n_known > MOST * len(names)


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


def _without_id(name: str) -> str:
    """A name without the Ensembl id that makes it unique: CD4_ENSG00000010610 is CD4."""
    return name if "ENS" not in name else _ENSEMBL_PREFIX.sub("", _ENSEMBL_SUFFIX.sub("", name))


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
        found = [_NO_GENE.match(text) for text in texts]
        _mark(kinds, [_kind_of(match) if match else None for match in found])
    _mark(kinds, _nameless(names))
    counts = Counter(kind for kind in kinds if kind)
    listed = ", ".join(f"{n} {kind!r}" for kind, n in sorted(counts.items()))
    if counts.total() == len(kinds):
        raise UserError(f"{var.matrix} holds no genes (its var rows are {listed}); choose another file or --layer")
    notes = [f"{counts.total()} of {len(kinds)} rows of var are no genes and are left out: {listed}"] if counts else []
    return np.array([kind is None for kind in kinds], dtype=bool), dict(sorted(counts.items())), notes


def _nameless(names: list[str]) -> list[str | None]:
    """[G] "without a name" for names that mean "not known", such as "nan", else None; in Drosophila these are genes.

    https://github.com/scverse/scanpy/issues/1259
    """
    bad = {name for name in set(names) if name.strip() and clean_text(name) is None}
    if not bad or sum(_FLY.match(name) is not None for name in names) > FLY_SHARE * len(names):
        return []
    return ["without a name" if name in bad else None for name in names]


def _without_copies(names: list[str]) -> tuple[list[str], list[str]]:
    """([G] names without the numbers that made them unique, notes): CD3D-1 is CD3D when both are there.

    A name that is a symbol itself stays: SNORD115-1. https://github.com/scverse/scanpy/issues/1719
    """
    known = set(names)
    copies = {name: match[1] for name in known if (match := _COPY.fullmatch(name)) and match[1] in known}
    for name in known_symbols(set(copies)) if copies else ():
        del copies[name]
    if not copies:
        return names, []
    n_rows, first = sum(name in copies for name in names), min(copies)
    note = (
        f"{n_rows} gene names were made unique with a number, such as {first!r}: they are read as {copies[first]!r}, and "
        "a cell has the largest value of the rows with one name"
    )
    return [copies.get(name, name) for name in names], [note]


def _kind_of(match: re.Match) -> str:
    """What a name that matches _NO_GENE stands for."""
    return next(group for group in ("spike_in", "antibody_tag", "peak") if match[group]).replace("_", "-")


def _mark(kinds: list[str | None], found: list[str | None]) -> None:
    """Write what was found about rows that have no kind yet."""
    for i, kind in enumerate(found):
        if kinds[i] is None and kind is not None:
            kinds[i] = kind


def _types(values: list[str | None] | None) -> list[str | None]:
    """[G] the type of the rows that are no genes, else None; [] for a column that does not say what is a gene."""
    plain = {value: _plain(value) for value in set(values or ()) if value}
    if GENE_TYPES & set(plain.values()):  # one type is that of genes, so all others are not
        return [None if value and plain[value] in GENE_TYPES else value or "without a type" for value in values or ()]
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
    others = [name for name in var.columns if name not in usual]
    found = [name for name in (*usual, *others) if name != gene_key and _are_symbols(var.readable(name), is_gene)]
    return found + (["index"] if gene_key != "index" and _are_symbols(var.index, is_gene) else [])


def _are_symbols(values: list[str | None] | None, is_gene: np.ndarray) -> bool:
    """Whether values look like gene symbols: known, distinct, neither ids nor numbers nor sentences."""
    if values is None:
        return False
    known = [value for value, wanted in zip(values, is_gene.tolist(), strict=True) if wanted and value]
    words = [value for value in known if not is_number(value) and not _ENSEMBL_ID.fullmatch(value) and " " not in value]
    return len(known) >= MOST * is_gene.sum() and len(words) > MOST * len(known) and len(set(words)) > MOST * len(words)


def _symbols_for_ids(var: _Var, names: list[str], is_gene: np.ndarray, gene_key: str) -> tuple[list[str], list[str]]:
    """([G] names, notes). When most names are Ensembl ids, they are replaced by symbols where there are some."""
    ids = [i for i, name in enumerate(names) if is_gene[i] and _ENSEMBL_ID.fullmatch(name)]
    if len(ids) <= MOST * is_gene.sum():
        return names, []  # a few genes without a symbol keep their id as it stands
    found = f"the gene names are Ensembl ids ({names[ids[0]]})"
    versionless = list(names)
    for i in ids:
        versionless[i] = _VERSION.sub("", names[i])
    columns = [
        name
        for name in (*var.named_symbols, "index")
        if name != gene_key and _are_symbols(var.index if name == "index" else var.readable(name), is_gene)
    ]
    if columns:
        symbols = var.index if columns[0] == "index" else var.values(columns[0])
        of_id = {i: _without_id(symbols[i]) for i in ids if symbols[i]}
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
