"""The labels that a cluster can get: those the user lists, else those the model knows for the tissue, else any.

A list is a file or a text with commas. A line of a file is a label, or a label, a tab and its Cell Ontology id; lines
that begin with "#" are skipped.
"""

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.build.cells import check_labels
from data.build.columns import unwrapped
from data.build.contexts import several_values
from data.clusters.known import KnownLabels
from data.clusters.profiles import ClusterProfile
from data.errors import UserError
from data.prompts import normalise_label

OPEN = "open"
"""The value of --candidates with which the model names any cell type."""
_TERM = re.compile(r"CL:\d{7}")


@dataclass(frozen=True)
class Candidates:
    """The labels among which the clusters of a sample are divided."""

    labels: list[str]
    """[M] each once; [] when the model may name any cell type."""
    source: str
    """Where they come from, for the page."""
    ontology: dict[str, str] = field(default_factory=dict)
    """{normalised label: Cell Ontology id}; also of labels that are not candidates, for open-ended answers."""


def candidates_of(
    profiles: Iterable[ClusterProfile], given: str | Sequence[str] | None, known: KnownLabels | None
) -> dict[str, Candidates]:
    """{sample: its candidates}. given: --candidates, or a list of labels. known: what the model was trained on.

    Raises UserError for a list that cannot be used, and when the model knows labels but none of a sample's tissue.
    """
    tissues: dict[str, list[str]] = {}
    for profile in profiles:
        tissues.setdefault(profile.sample, []).append(profile.tissue)
    labels = known.labels if known else {}
    ontology = {
        normalise_label(name): label.ontology_term_id for name, label in labels.items() if label.ontology_term_id
    }
    if isinstance(given, str) and given == OPEN:
        return {sample: Candidates([], "open-ended, as asked for", ontology) for sample in tissues}
    if given is not None:
        labels, terms, where = listed(given, labels)
        return {sample: Candidates(labels, where, ontology | terms) for sample in tissues}
    if known is None:
        source = "open-ended, because neither --candidates nor the model lists labels"
        return {sample: Candidates([], source) for sample in tissues}
    return {sample: _of_tissues(known, named, sample, ontology) for sample, named in tissues.items()}


def listed(given: str | Sequence[str], known: Iterable[str] = ()) -> tuple[list[str], dict[str, str], str]:
    """(labels, {normalised label: Cell Ontology id}, where they come from) of a list. Raises UserError.

    known: labels of the model, by which a name with a comma in it is recognised.
    """
    where, terms = "a list", {}
    lines = list(given)
    if isinstance(given, str):
        path = Path(given)
        is_file = os.path.isfile(given)  # Path.is_file raises for a text that is too long for a name
        if not is_file and "," not in given:
            raise UserError(
                f"--candidates {given}: no such file, and no list of labels with commas between them; give one of both, "
                f"or {OPEN}"
            )
        where = f"--candidates {path}" if is_file else "--candidates"
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines() if is_file else given.split(",")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--candidates {path}: cannot be read as text ({error}); give a label per line") from None
        if not is_file:
            _refuse_cut_names(lines, known)
    labels: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        # spreadsheets and pandas write quotes around a text with a comma
        name, term = (unwrapped(part.strip()) for part in line.partition("\t")[::2])
        label = " ".join(name.split())
        if term and not _TERM.fullmatch(term):
            raise UserError(f"{where}, line {number}: {term!r} is no Cell Ontology id; write it as CL:0000236")
        if held := _TERM.search(label):
            raise UserError(
                f"{where}, line {number}: {label!r} holds a Cell Ontology id; write LABEL, a tab, {held[0]}"
            )
        if normalise_label(label) in labels:
            raise UserError(f"{where}, line {number}: lists {label!r} again; leave one out")
        labels[normalise_label(label)] = label
        terms |= {normalise_label(label): term} if term else {}
    if len(labels) < 2:
        raise UserError(
            f"{where}: lists {'one label' if labels else 'no label'}, so there is nothing to choose; give at least two, or {OPEN}"
        )
    check_labels(Path(where), labels.values())
    return list(labels.values()), terms, where


def _refuse_cut_names(pieces: list[str], known: Iterable[str]) -> None:
    """Raises UserError where commas between labels seem to cut a label, such as 'CD8-positive, alpha-beta T cell'."""
    whole = {normalise_label(label) for label in known}
    for piece, after in itertools.pairwise(pieces):
        both = f"{piece.strip()}, {after.strip()}"
        if re.search(r"-(positive|negative)$", piece.strip()) or normalise_label(both) in whole:
            raise UserError(
                f"--candidates: is {both!r} one label? Labels with a comma in them need a file, a label a line, and "
                "--candidates FILE"
            )


def _of_tissues(known: KnownLabels, named: list[str], sample: str, ontology: dict[str, str]) -> Candidates:
    """The labels that the model knows for the tissues of a sample's clusters; all labels where one has no known tissue.

    A tissue may be 'a || b'.
    """
    parts = list(dict.fromkeys(part for tissue in named for part in several_values(tissue))) if all(named) else []
    tissue, of_part = " || ".join(parts), {part: known.in_tissue(part) for part in parts}
    labels = sorted({label for own in of_part.values() for label in own}) if parts else sorted(known.labels)
    unknown = [part for part, own in of_part.items() if not own]
    if unknown:
        tissue, labels = unknown[0], []
    if len(labels) < 2:
        where = f" (sample {sample!r})" if sample else ""
        raise UserError(
            f"the model knows {len(labels)} label for the tissue {tissue!r}{where}, and "
            f"was trained on {', '.join(known.tissues[:8]) or 'no stated tissue'}: list labels with --candidates, or give "
            f"--candidates {OPEN}"
        )
    return Candidates(
        labels, f"labels that the model was trained on, of {tissue or 'all tissues: the file states none'}", ontology
    )
