"""The text of an inspection: short aligned lines."""

import textwrap
from dataclasses import replace

from data.build.contexts import CONTEXT_COLUMNS
from data.inspection.columns import CLUSTER_NAME, plain
from data.inspection.facts import ColumnFacts, FileFacts

COLUMNS = 118
"""Longer lines are wrapped."""
WIDTH = 12
"""Width of the first word of a line."""
SHOWN = 8
"""Values of a column that are listed."""
OTHERS_SHOWN = 30
REMEDY_OF = {"is_primary_data is not True": " (--include-non-primary keeps them)"}
"""Reason for which cells are dropped -> how to keep them."""
ROLES = {
    "donor_id": "donors",
    "batch": "batches",
    "tissue": "tissues",
    "disease": "diseases",
    "suspension_type": "suspension",
    "sex": "sex",
    "development_stage": "stages",
    "self_reported_ethnicity": "ethnicities",
}
"""CELLxGENE column -> how its line begins."""


def facts_text(facts: FileFacts) -> str:
    """What a file holds, for people. Lines are at most about 120 columns where the names in the file allow it."""
    lines = [f"{facts.path.name}: {facts.kind}, {facts.n_cells:,} cells x {facts.n_genes:,} genes", ""]
    lines += _matrix_lines(facts)
    lines += _gene_lines(facts)
    lines.append(_line("organism", f"{facts.organism or 'unknown'} ({facts.organism_source})"))
    lines += _label_lines(facts)
    by_name = {column.name: column for column in facts.columns}
    for role, title in ROLES.items():
        if role in facts.used:
            lines.append(_line(title, _used_text(facts.used[role], by_name)))
    absent = [name for name in ROLES if name not in facts.used]
    if absent:
        lines.append(_line("not found", f"{', '.join(absent)} (optional)"))
    lines += _other_lines(facts)
    lines.append("")
    lines += _dropped_lines(facts)
    lines += [_line("note", note) for note in facts.notes]
    lines += [_line("problem", problem) for problem in facts.problems]
    lines += ["", "To build puzzles from it:" if not facts.problems else "When that is solved, build puzzles with:"]
    lines.append(f"  {facts.command}")
    if any(f"{name}={value}" in facts.command for name, value in (("tissue", "TISSUE"), ("disease", "DISEASE"))):
        lines.append("  Replace the words in capitals by what you know about the cells (disease=normal: healthy).")
    return "\n".join(lines)


def _line(title: str, text: str) -> str:
    """A title and its text, wrapped below the text."""
    indent = " " * (WIDTH + len(text) - len(text.lstrip()) + 2)
    lines = textwrap.wrap(
        f"{title:{WIDTH}}{text}",
        COLUMNS,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    )
    return "\n".join(lines)


def _matrix_lines(facts: FileFacts) -> list[str]:
    width = max([len(layer.name) for layer in facts.layers], default=0)
    lines = []
    for number, layer in enumerate(facts.layers):
        used = "   <- used" if layer.name == facts.layer else ""
        size = f"{layer.n_genes:,} genes, {layer.encoding}" if layer.encoding else layer.problem
        lines.append(_line("" if number else "matrices", f"{layer.name:{width}}  {layer.values:26}{size}{used}"))
    return lines or [_line("matrices", "none")]


def _gene_lines(facts: FileFacts) -> list[str]:
    if facts.genes is None:
        return [_line("gene names", "none that a build can read")]
    width = max([len(source.key) for source in facts.genes.sources], default=0)
    lines = []
    for number, source in enumerate(facts.genes.sources):
        used = "   <- used" if source.key == facts.genes.key else ""
        examples = ", ".join(source.examples)
        lines.append(
            _line("" if number else "gene names", f"{source.key:{width}}  {source.kind:14}{examples}, ...{used}")
        )
    if len(facts.genes.feature_types) > 1 or facts.genes.feature_types.keys() - {"Gene Expression"}:
        lines.append(_line("features", ", ".join(f"{n:,} {name}" for name, n in facts.genes.feature_types.items())))
    return lines


def _label_lines(facts: FileFacts) -> list[str]:
    """The columns of cell types, the one that a build reads first, then the columns of clusters."""
    chosen = facts.used.get("cell_type")
    other_roles = {column for role, column in facts.used.items() if role != "cell_type"}
    labels = [c for c in facts.columns if c.name == chosen or c.looks_like_cell_types and c.name not in other_roles]
    labels.sort(key=lambda column: column.name != chosen)
    lines = []
    for number, column in enumerate(labels):
        used = "   <- used" if column.name == chosen else ""
        lines.append(_line("" if number else "cell types", f"{column.name}: {_number_of(column)}{used}"))
        if column.name == chosen and not column.exact and facts.usable is not None:
            column = replace(column, exact=True, most_common=list(facts.usable.labels.items()))
        lines.append(_line("", f"  {_values(column)}"))
    if not labels:
        lines.append(_line("cell types", chosen or "no column looks like cell types"))
    for column in facts.columns:
        if column.name not in other_roles and column.name != chosen and _is_clustering(column):
            lines.append(_line("clusters", f"{column.name}: {_number_of(column)}, numbers without names"))
    return lines


def _is_clustering(column: ColumnFacts) -> bool:
    return column.kind == "clusters" and (column.n_values > 2 or bool(CLUSTER_NAME.search(plain(column.name))))


def _number_of(column: ColumnFacts) -> str:
    if not column.n_values:
        return "no known value"
    about = "" if column.exact else "about "
    missing = f", {column.n_missing:,} cells without" if column.n_missing and column.exact else ""
    return f"{about}{column.n_values:,} value{'' if column.n_values == 1 else 's'}{missing}"


def _values(column: ColumnFacts) -> str:
    """The commonest values of a column with their numbers of cells; without numbers when only a sample was read."""
    shown = [f"{text} {count:,}" if column.exact else text for text, count in column.most_common[:SHOWN]]
    more = column.n_values - len(shown)
    return "; ".join(shown) + (f"; and {more:,} more" if more > 0 else "")


def _used_text(column: str, by_name: dict[str, ColumnFacts]) -> str:
    if column not in by_name:
        return f"{column.removeprefix('= ')} (not in the file: --constant)"
    facts = by_name[column]
    values = f": {_values(facts)}" if facts.most_common and facts.n_values <= SHOWN else ""
    return f"{column}, {_number_of(facts)}{values}"


def _other_lines(facts: FileFacts) -> list[str]:
    """The columns that a context sentence also states, and those that a build does not read."""
    used = set(facts.used.values()) | {"is_primary_data", "organism", "organism_ontology_term_id"}
    others = [c for c in facts.columns if c.name not in used and not c.looks_like_cell_types and not _is_clustering(c)]
    told = [column.name for column in others if column.name in CONTEXT_COLUMNS]
    names = [column.name for column in others if column.name not in told]
    more = f" and {len(names) - OTHERS_SHOWN:,} more" if len(names) > OTHERS_SHOWN else ""
    lines = [_line("also told", ", ".join(told))] if told else []
    return [*lines, _line("not used", ", ".join(names[:OTHERS_SHOWN]) + more)] if names else lines


def _dropped_lines(facts: FileFacts) -> list[str]:
    """The cells that a build would leave out, by reason, and those that it would use."""
    if facts.usable is None:
        return []
    usable = facts.usable
    lines = [
        _line("dropped", f"{n:,} of {facts.n_cells:,} cells: {reason}{REMEDY_OF.get(reason, '')}")
        for reason, n in usable.dropped.items()
    ]
    counts = (_count(len(usable.labels), "cell type"), _count(usable.donors, "donor"))
    kept = f"{_count(usable.cells, 'cell')}: {' and '.join(counts)}"
    if usable.groups:
        kept += f"; {_count(usable.groups, 'pair')} of donor and batch, the best with {usable.most_labels:,} cell types"
    return [*(lines or [_line("dropped", "no cell")]), _line("kept", kept), *(_line("note", n) for n in usable.notes)]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
