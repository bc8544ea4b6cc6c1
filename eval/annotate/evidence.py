"""What speaks for and against a label: the reasoning about a cluster, the genes it cites, the marker table, doubts.

The marker table is data/atlas/markers.tsv. The model does not see it when it answers, so it is a second opinion; but a
model that was trained on the simulated atlas learned from the same table.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data.atlas.markers import as_in_table, name_in_table
from data.prompts import RESPONSE_LAYOUT, normalise_label
from eval.annotate.votes import Reading
from eval.traces.names import find_cells

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*[A-Za-z0-9]|[A-Za-z]")
_SENTENCE = re.compile(r"(?<=[.!?;])\s+(?=[A-Z(\[])")


@dataclass(frozen=True)
class Rationale:
    """An answer that gave a cluster its label, and what it says of the cluster."""

    reading: Reading
    cell: int
    """The number of the cluster in the puzzle, from 1."""
    about: str
    """The sentences of the reasoning that are about it; "" where none names its number."""
    cited: tuple[str, ...]
    """The genes of its list that `about` names, in order."""

    @property
    def reasoning(self) -> str:
        """The whole reasoning."""
        return reasoning_of(self.reading.text)


def reasoning_of(text: str) -> str:
    """The text between the <think> tags of a valid response; otherwise the whole text."""
    found = RESPONSE_LAYOUT.fullmatch(text)
    return (found["reasoning"] if found else text).strip()


def rationales(readings: Iterable[Reading], labels: dict[str, str | None]) -> dict[str, Rationale]:
    """{cluster: the answer that gave it its label and cites most of its genes}; of equals the first.

    labels: {cluster: label}. A cluster without a label has no rationale.
    """
    best: dict[str, Rationale] = {}
    for reading in readings:
        pairs = zip(reading.question.clusters, reading.labels, strict=False)
        for number, (cluster, label) in enumerate(pairs, start=1):
            wanted = labels.get(cluster)
            if label is None or wanted is None or normalise_label(label) != normalise_label(wanted):
                continue
            about = sentences_about(reasoning_of(reading.text), number, len(reading.question.clusters))
            found = Rationale(reading, number, about, cited(about, reading.question.puzzle.cells[number - 1]))
            known = best.get(cluster)
            if known is None or (len(found.cited), bool(about)) > (len(known.cited), bool(known.about)):
                best[cluster] = found
    return best


def sentences_about(reasoning: str, cell: int, n_cells: int) -> str:
    """The sentences that are about one cell of a puzzle: from a sentence that names it to the next that names another.

    >>> sentences_about("Cell 1: LYZ, so a monocyte. CD14 too.\\nCell 2: MS4A1, so a B cell", 1, 2)
    'Cell 1: LYZ, so a monocyte. CD14 too.'
    """
    if n_cells == 1:
        return reasoning
    kept, ours = [], False
    for line in reasoning.split("\n"):
        for sentence in _SENTENCE.split(line):
            named = [number for mention in find_cells(sentence, n_cells, []) for number in mention.numbers]
            if named:
                ours = cell in named
            if ours and sentence.strip():
                kept.append(sentence.strip())
    return " ".join(kept)


def cited(text: str, genes: Sequence[str]) -> tuple[str, ...]:
    """The genes of a list that a text names as whole words, in the order of the text; case counts.

    >>> cited("High LYZ (and CD14), low CD1", ["CD14", "CD1C", "LYZ"])
    ('LYZ', 'CD14')
    """
    known = set(genes)
    return tuple(dict.fromkeys(word for word in _WORD.findall(text) if word in known))


@dataclass(frozen=True)
class Markers:
    """A label's markers among the genes of a cluster."""

    label: str
    found: tuple[str, ...]
    """Markers that the cluster lists, the strongest first."""
    missing: tuple[str, ...]
    """Markers that it does not list."""
    known: bool
    """Does the table have the label?"""


def markers_of(label: str, genes: Iterable[str], table: dict[str, list[str]]) -> Markers:
    """The markers of a label that are, and are not, among some genes. table: {normalised label: markers}."""
    listed, markers = as_in_table(genes), table.get(normalise_label(label), [])
    found = tuple(gene for gene in markers if name_in_table(gene) in listed)
    return Markers(label, found, tuple(gene for gene in markers if gene not in found), bool(markers))
