"""The text tools of a workflow: `markers(GENE)` and `profile(CELL TYPE)`, their requests and their results.

A model asks by ending its response in `<call>markers(CD3D)</call>`. Sampling stops there; the result is shown with the
question the next time. Nothing a model writes is run: a request is looked up in two tables, or is not understood.
"""

import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from data.atlas.markers import RENAMED, read_markers
from data.prompts import normalise_label
from data.puzzles import Puzzle, cell_ids_problem

CALL_END = "</call>"
"""Sampling stops after it."""
MOST_NAMES = 15
"""Most names in a result."""
INSTRUCTIONS = (
    "\n\nBefore you answer you may look something up. To do so, end your response with one of these lines:\n"
    "<call>markers(GENE)</call> for the cell types that the gene marks\n"
    "<call>profile(CELL TYPE)</call> for the genes that are typical of the cell type\n"
    "You will see what was found and the question again."
)
LEFT = "\nYou can look up {left} more."
NONE_LEFT = "\nYou can look up nothing more. Give your answer in the usual format."
NOT_UNDERSTOOD = "not understood; write <call>markers(GENE)</call> or <call>profile(CELL TYPE)</call>"
LONGEST_CALL = 200
"""Letters of what a request may ask for."""
_CALL = re.compile(rf"<call>\s*(markers|profile)\(([^<>\n]{{1,{LONGEST_CALL}}})\)\s*(?:</call>|\Z)")


class Tables:
    """The marker table (data/atlas/markers.tsv), and the genes that the cells of each type list in training puzzles."""

    def __init__(self, puzzles: Iterable[Puzzle]) -> None:
        """puzzles: of the training file, of which a puzzle's own cells are left out when it asks."""
        self.puzzles = list(puzzles)
        self.counted: dict[str, tuple[dict[Any, list[str]], dict[Any, list[Any]], Counter]] = {}
        """Results of _counted."""

    @cached_property
    def marked(self) -> dict[str, list[str]]:
        """{gene in capitals: the cell types that it marks}"""
        found: dict[str, list[str]] = {}
        for label, entry in read_markers().items():
            for gene in entry.markers:
                found.setdefault(gene.upper(), []).append(label)
        return found | {new.upper(): found[old.upper()] for new, old in RENAMED.items()}

    @cached_property
    def listed(self) -> dict[str, dict[str | tuple[str, ...], list[str]]]:
        """{normalised label: {cell, or its genes where its name is not known: its genes}}. Each cell once, whoever shows it."""
        found: dict[str, dict[str | tuple[str, ...], list[str]]] = {}
        for puzzle in self.puzzles:
            for genes, label, cell in zip(puzzle.cells, puzzle.answer, _names_of_cells(puzzle), strict=True):
                found.setdefault(normalise_label(label), {}).setdefault(cell or tuple(genes), genes)
        return found

    @cached_property
    def longest_markers(self) -> str:
        """The call for markers with the longest result."""
        return max((f"markers({gene})" for gene in self.marked), key=lambda call: len(call + self.markers(call[8:-1])))

    def markers(self, gene: str) -> str:
        """The cell types that a gene marks, as text."""
        return ", ".join(self.marked.get(gene.strip().upper(), ["of no cell type of the table"])[:MOST_NAMES])

    def profile(self, label: str, puzzle: Puzzle) -> str:
        """The genes that most cells of a type list in the training puzzles, without the cells of this puzzle."""
        # its own cell would give its answer away, also as another puzzle shows it (--gene-dropout lists other genes)
        wanted = normalise_label(label)
        shown = zip(puzzle.cells, puzzle.answer, _names_of_cells(puzzle), strict=True)
        own = {
            name
            for genes, own, cell in shown
            if normalise_label(own) == wanted
            for name in (tuple(genes), cell)
            if name
        }
        cells, with_genes, counts = self._counted(wanted)
        # equal genes are taken for the same cell: a build that left out cell_ids shows nothing else
        same = {cell for cell in own if cell in cells} | {cell for genes in own for cell in with_genes.get(genes, ())}
        counts = counts - Counter(gene for cell in same for gene in cells[cell])
        typical = sorted(counts, key=lambda gene: (-counts[gene], gene))
        return ", ".join(typical[:MOST_NAMES]) or "no other cell of this type"

    def _counted(self, label: str) -> tuple[dict[Any, list[str]], dict[Any, list[Any]], Counter]:
        """({cell: genes}, {genes: cells}, in how many cells each gene is) of a normalised label; counted once per label."""
        if label not in self.counted:
            cells = self.listed.get(label, {})
            with_genes: dict[Any, list[Any]] = {}
            for cell, genes in cells.items():
                with_genes.setdefault(tuple(genes), []).append(cell)
            self.counted[label] = cells, with_genes, Counter(gene for genes in cells.values() for gene in genes)
        return self.counted[label]

    def result(self, call: str, puzzle: Puzzle) -> str:
        """What a request finds, one line. call: see `call_in`. puzzle: the one that the request is about."""
        tool, _, argument = call.removesuffix(")").partition("(")
        if tool == "markers":
            return f"{call}: {self.markers(argument)}"
        return f"{call}: {self.profile(argument, puzzle)}" if tool == "profile" else NOT_UNDERSTOOD


def _names_of_cells(puzzle: Puzzle) -> list[str]:
    """File and barcode of each cell, as a build records them; "" for puzzles of others."""
    if cell_ids_problem(puzzle) or not puzzle.meta.get("cell_ids"):
        return [""] * len(puzzle.cells)
    return [f"{puzzle.meta.get('source', '')} {cell}" for cell in puzzle.meta["cell_ids"]]


def call_in(response: str) -> str | None:
    """The request that a response ends in: "markers(CD3D)"; "" when it is not understood, None when there is none.

    Only what stands before an answer counts, and of several requests the first.

    >>> call_in("Is it a T cell? <call>markers(CD3D)</call>"), call_in("<call>shell(ls)</call>")
    ('markers(CD3D)', '')
    >>> call_in("<think>CD3D</think><answer>T cell</answer>") is None
    True
    """
    text = response.split("<answer>")[0]
    at = text.find("<call>")
    if at < 0:
        return None
    match = _CALL.match(text, at)
    return f"{match[1]}({match[2].strip()})" if match else ""


def lookup_text(results: list[str], calls: int) -> str:
    """What follows the question: how to ask, what was found, how often one may ask. calls: the most in all."""
    left = calls - len(results)
    shown = "".join(f"\n{line}" for line in results)
    return (
        INSTRUCTIONS
        + (f"\n\nFound so far:{shown}\n" if results else "")
        + (LEFT.format(left=left) if left else NONE_LEFT)
    )
