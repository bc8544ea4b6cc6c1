"""Look at a file of cells without loading its matrix: what it holds, what a build would drop, and the command for it.

`inspect_file` uses the rules of the builder itself for everything that both decide.
"""

import dataclasses
import os
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data.build import onefile
from data.build.cells import (
    COLUMN_FLAGS,
    MAY_BE_ABSENT,
    NO_COLUMN,
    ORGANISM_COLUMNS,
    REQUIRED_COLUMNS,
    Cells,
    check_labels,
    organism_name,
)
from data.build.columns import Column
from data.build.h5ad import open_h5ad, table_index, uns_text
from data.build.matrix import layer_names, open_matrix, other_layers
from data.build.settings import BuildConfig
from data.errors import UserError
from data.formats.stores import StoreGroup
from data.inspection.columns import guessed_column, obs_facts
from data.inspection.facts import ColumnFacts, FileFacts, GeneFacts, LayerFacts, Usable
from data.inspection.genes import gene_facts, organism_of_names
from data.inspection.layers import best_layer, layer_facts
from data.meaning.labels import is_cluster, is_term_id, transposed
from data.meaning.words import USUAL, ages_in_words

DEFAULT = BuildConfig()
PLACEHOLDERS = {"tissue": "TISSUE", "disease": "DISEASE", "suspension_type": "cell", "donor_id": "donor1"}
"""--constant of a required column that the file lacks. Words in capitals must be replaced by the user."""
FEWEST_LABELS = 3
"""Cells of the smallest puzzle in the proposed command, where the file has fewer labels than the defaults need."""


def inspect_file(path: str | os.PathLike, config: BuildConfig = DEFAULT) -> FileFacts:
    """What a file of cells holds. Reads obs, var and a sample of each matrix.

    config: settings that the user chose; those at their default are chosen here. Raises UserError when the file cannot
    be opened, and data.build.h5ad.OtherKind when it is no file of cells that is read here.
    """
    path = Path(path)
    with open_h5ad(path) as file:
        names = layer_names(file, path)
        n_var = table_index(file, "var", path).shape[0]
        kind = "a zarr store of anndata" if isinstance(file, StoreGroup) else "an .h5ad file of anndata"
    layers = [layer_facts(path, name, config.gene_key) for name in names]
    n_cells, columns = obs_facts(path)
    layer = best_layer(layers) if config.layer == "auto" else config.layer
    problems = [] if layer else [_no_layer(path, layers)]
    named = layer or next((one.name for one in layers if one.encoding), None)  # the names matter without values, too
    genes, gene_list = _genes(path, named, config.gene_key)
    organism, source = _organism(path, genes, gene_list, columns)
    chosen = _with_columns(config, columns, config.organism or organism)
    chosen = dataclasses.replace(
        chosen,
        layer="auto" if layer in (None, _automatic(layers)) else layer,
        gene_key=genes.key if genes and genes.key else config.gene_key,
    )
    usable, chosen, more = _usable(path, chosen, columns)
    facts = FileFacts(
        path=path,
        kind=kind,
        n_cells=n_cells,
        n_genes=next((one.n_genes for one in layers if one.name == layer), n_var),
        layers=layers,
        layer=layer,
        genes=genes,
        organism=organism,
        organism_source=source,
        columns=columns,
        used=_used(chosen, columns),
        usable=usable,
        problems=[*problems, *more, *_gene_problems(genes)],
        notes=_notes(layers, layer, genes),
        command=build_command(path, chosen),
    )
    return facts


def first_lines(path: str | os.PathLike, config: BuildConfig = DEFAULT) -> list[str]:
    """A line or two about a file for the start of a long command. Reads no obs column. Raises UserError as a build."""
    path = Path(path)
    with open_h5ad(path) as file:
        names = layer_names(file, path)
    with open_matrix(path, config.layer) as matrix:
        layer, n_cells, n_genes = matrix.layer, matrix.n_cells, matrix.n_genes
    facts = layer_facts(path, layer, config.gene_key)
    genes, gene_list = _genes(path, layer, config.gene_key)
    organism = uns_text(path, ORGANISM_COLUMNS)
    source = next((one for one in genes.sources if one.key == config.gene_key), None) if genes else None
    parts = [
        f"{n_cells:,} cells x {n_genes:,} genes",
        f"{layer} {'' if facts.values.startswith('cannot') else 'holds '}{facts.values}",
    ]
    if source is not None:
        parts.append(f"gene names from {source.key} are {source.kind} ({', '.join(source.examples[:2])})")
    parts += [organism] if organism else []
    others = [name for name in names if name != layer]
    lines = [f"{path.name}: {'; '.join(parts)}"]
    if others:
        lines.append(f"  other matrices (--layer): {', '.join(others)}")
    if source is not None and genes is not None and genes.key not in (None, source.key):
        lines.append(f"  --gene-key {shlex.quote(genes.key)} would give {genes.kind}")
    return lines


def build_command(path: Path, config: BuildConfig) -> str:
    """The call of launch/build.py with every option that is not at its default."""
    words = ["python", "launch/build.py", str(path)]
    for field in dataclasses.fields(BuildConfig):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        for item in value if isinstance(value, tuple) else (value,):
            words += [flag] if item is True else [flag, str(item)]
    return shlex.join([*words, "--out", "puzzles"])


def _automatic(layers: list[LayerFacts]) -> str:
    return "raw" if any(layer.name == "raw" for layer in layers) else "X"


def _no_layer(path: Path, layers: list[LayerFacts]) -> str:
    held = "; ".join(f"{one.name}: {one.problem or one.values}" for one in layers)
    remedy = "add the counts as a layer"
    if len(layers) == 1 and layers[0].encoding:
        with open_matrix(path, layers[0].name) as matrix:
            remedy = other_layers(matrix)
    return f"no matrix can be ranked by expression ({held or 'the file has none'}); {remedy}"


def _genes(path: Path, layer: str | None, wanted: str) -> tuple[GeneFacts | None, list[str]]:
    """(facts about the genes of a layer, their names as a build takes them); (None, []) when there are none."""
    if layer is None:
        return None, []
    try:
        with open_matrix(path, layer) as matrix:
            return gene_facts(matrix, wanted)
    except UserError:
        return None, []


def _gene_problems(genes: GeneFacts | None) -> list[str]:
    return [genes.problem] if genes is not None and genes.problem else []


def _with_columns(config: BuildConfig, columns: list[ColumnFacts], organism: str | None) -> BuildConfig:
    """The settings with a column, or a constant, for each fact that a build needs. What the user chose is kept."""
    by_name = {column.name: column for column in columns}
    chosen: dict[str, Any] = {}
    constants = list(config.constant)
    given = config.constants
    taken = {key for key in config.column_keys.values() if key in by_name}
    for name, flag in COLUMN_FLAGS.items():
        field = flag[2:].replace("-", "_")
        key = getattr(config, field)
        bad_labels = name == "cell_type" and key in by_name and _no_labels(by_name[key])
        no_words = name in MAY_BE_ABSENT and key in by_name and _no_words(name, by_name[key], organism)
        if key != name or (key in by_name and not bad_labels and not no_words) or name in given:
            continue
        guess = guessed_column(name, columns, taken)
        if no_words and guess is None and not config.allow_numeric_labels:
            chosen[field] = NO_COLUMN
            continue
        if guess is not None:
            chosen[field] = guess
            taken.add(guess)
        elif name in REQUIRED_COLUMNS and name in PLACEHOLDERS and key not in by_name:
            constants.append(f"{name}={PLACEHOLDERS[name]}")
    return dataclasses.replace(config, constant=tuple(constants), **chosen)


def _no_labels(column: ColumnFacts) -> bool:
    """Whether a column of cell types cannot be one: all numbers or ids, nothing known, or one value."""
    ids = column.most_common and all(is_term_id(text) for text, _ in column.most_common)
    return bool(ids) or column.kind in ("clusters", "numbers", "empty") or column.n_values < 2


def _no_words(name: str, column: ColumnFacts, organism: str | None) -> bool:
    """Whether no context should state a column of words, because it holds only numbers or ids."""
    texts = [text for text, _ in column.most_common]
    in_years = organism_name(organism or "human") == "Homo sapiens"  # other animals are not counted so
    if in_years and name == "development_stage" and column.kind in ("numbers", "clusters"):
        values = Column(np.arange(len(texts), dtype=np.int32), texts)
        return not texts or not ages_in_words(values)[1]
    usual = USUAL.get(name, str)
    return column.kind in ("numbers", "clusters") or bool(texts) and all(is_term_id(usual(text)) for text in texts)


def _used(config: BuildConfig, columns: list[ColumnFacts]) -> dict[str, str]:
    """{CELLxGENE name: the column or constant that a build reads}."""
    names, given = {column.name for column in columns}, config.constants
    used = {}
    for name, key in config.column_keys.items():
        if key in names:
            used[name] = key
        elif name in given or key in given:
            used[name] = f"= {given.get(name, given.get(key))}"
    return used


def _usable(
    path: Path, config: BuildConfig, columns: list[ColumnFacts]
) -> tuple[Usable | None, BuildConfig, list[str]]:
    """(the cells that a build would use, the settings that use most, problems). None when the labels are missing."""
    names = {column.name for column in columns}
    if config.cell_type_key not in names and "cell_type" not in config.constants:
        why = transposed(path)
        turned = f"the file looks transposed, with genes as rows ({why}): turn it (adata.T) and save it again"
        none = "no obs column holds cell types: a build needs them; annotate the cells first"
        return None, config, [turned if why else none]
    try:
        cells = onefile.read_usable_cells(path, config)
        n_copies = cells.dropped.get("is_primary_data is not True", 0)
        if n_copies and _counted(cells).most_labels < FEWEST_LABELS:
            config = dataclasses.replace(config, include_non_primary=True)
            cells = onefile.read_usable_cells(path, config)
            cells.notes.append(
                f"without --include-non-primary {n_copies:,} of {cells.n_read:,} cells are dropped (is_primary_data is not "
                "True) and too few cell types are left"
            )
        if not len(cells) and cells.dropped.get("suspension_type is not 'cell'"):
            config = _with_nuclei(config)
            cells = onefile.read_usable_cells(path, config)
    except UserError as error:
        return None, config, [str(error).removeprefix(f"{path}: ")]
    usable = _counted(cells)
    problems = []
    if usable.labels and all(map(is_cluster, usable.labels)):
        problems.append(
            f"the labels in {config.cell_type_key!r} are all numbers or names of clusters, so no cell types; annotate "
            "them, or name the column of cell types with --cell-type-key"
        )
    try:
        check_labels(path, list(usable.labels))
    except UserError as error:
        problems.append(str(error).removeprefix(f"{path}: "))
    if not usable.cells:
        reasons = ", ".join(f"{n:,} because {reason}" for reason, n in usable.dropped.items() if n)
        problems.append(f"all {cells.n_read:,} cells would be dropped: {reasons}")
    elif usable.most_labels < 2:
        problems.append(
            "no donor and batch has two cell types, and a puzzle needs two; name the column of donors with --donor-key"
        )
    elif usable.most_labels < config.min_cells:
        fewest = min(FEWEST_LABELS, usable.most_labels)
        config = dataclasses.replace(config, min_cells=fewest, max_cells=max(fewest, usable.most_labels))
    elif usable.most_labels < config.max_cells and config.max_cells == DEFAULT.max_cells:
        config = dataclasses.replace(config, max_cells=usable.most_labels)
    able = sum(n >= config.min_cells for n in usable.labels_of_donor)  # those that can give a puzzle
    if able == 1 and config.split is None and config.test_fraction and not config.unseen_disease:
        config = dataclasses.replace(config, split="cell")
    return usable, config, problems


def _with_nuclei(config: BuildConfig) -> BuildConfig:
    """The settings that keep nuclei, where the builder has them."""
    default = getattr(config, "suspension", None)
    if default is None:
        return config
    kept = ("cell", "nucleus", "na")
    return dataclasses.replace(config, suspension=kept if isinstance(default, tuple) else ",".join(kept))


def _counted(cells: Cells) -> Usable:
    """The counts of the usable cells. One pass over the codes, since a file may have millions of cells."""
    label, donor, batch = (cells.columns[name] for name in ("cell_type", "donor_id", "batch"))
    group = donor.codes.astype(np.int64) * len(batch.names) + batch.codes
    pairs, sizes = np.unique(group * len(label.names) + label.codes, return_counts=True)
    by_label = np.bincount(pairs % max(1, len(label.names)), weights=sizes, minlength=len(label.names))
    labels = {name: int(n) for name, n in zip(label.names, by_label.tolist(), strict=True) if n}
    per_group = Counter((pairs // max(1, len(label.names))).tolist())
    most_of_donor: dict[int, int] = {}
    for code, n in per_group.items():
        owner = code // max(1, len(batch.names))
        most_of_donor[owner] = max(n, most_of_donor.get(owner, 0))
    return Usable(
        cells=len(cells),
        dropped={reason: n for reason, n in cells.dropped.items() if n},
        labels=dict(sorted(labels.items(), key=lambda item: (-item[1], item[0]))),
        donors=len(np.unique(donor.codes)),
        labels_of_donor=list(most_of_donor.values()),
        groups=len(per_group),
        most_labels=max(per_group.values(), default=0),
        notes=cells.notes,
    )


def _organism(
    path: Path, genes: GeneFacts | None, gene_list: list[str], columns: list[ColumnFacts]
) -> tuple[str | None, str]:
    """(organism or None, where it is stated)."""
    for column in columns:
        if column.name in ORGANISM_COLUMNS and column.most_common:
            names = dict.fromkeys(organism_name(text) for text, _ in column.most_common)
            return ", ".join(names), f"obs column {column.name}"
    if (stated := uns_text(path, ORGANISM_COLUMNS)) is not None:
        return organism_name(stated), "uns"
    guess = organism_of_names(genes, gene_list) if genes else None
    return guess, "not stated; guessed from the gene names" if guess else "not stated"


def _notes(layers: list[LayerFacts], layer: str | None, genes: GeneFacts | None) -> list[str]:
    """What a user should know about the matrices and genes."""
    notes = []
    n_genes = {one.name: one.n_genes for one in layers if one.n_genes}
    if n_genes.get("X", 0) > n_genes.get("raw", n_genes.get("X", 0)):
        also = " and is taken" if layer == "X" else "; --layer X takes all of them" if layer == "raw" else ""
        notes.append(f"raw has {n_genes['raw']:,} genes only; X has {n_genes['X']:,}{also}")
    empty = next((one.empty_cells for one in layers if one.name == layer), 0)
    if empty:
        notes.append(f"{empty:,} cells have no expressed gene: a puzzle that draws one of them is left out")
    if genes is None:
        return notes
    if genes.kind == "other names":
        notes.append("gene names look like neither symbols nor Ensembl ids")
    return [*notes, *genes.notes]
