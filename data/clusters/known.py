"""The labels and genes that a model was trained on: labels.json beside puzzles, cell_types.json beside a model's weights.

{"labels": {label: {"ontology_term_id": "CL:0000084" or null, "tissues": [...], "n": cells}}, "genes": [...],
 "puzzles": {"max_cells": 15, "top_genes": 50, "drop_genes": [...], "states": ["disease", "tissue"]}}
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from data.errors import UserError
from data.files import read_settings, seen_from
from data.puzzles import Puzzle

LABELS = "labels.json"
"""Written by a build beside train.parquet."""
CELL_TYPES = "cell_types.json"
"""The same content in the folder of a model."""
PUZZLE_OPTIONS = {"max_cells": int, "top_genes": int, "drop_genes": list}
"""Options of a build on which the look of a prompt depends, with their types in JSON."""
USUAL = {"rank": "expression", "profile": "cell"}
"""Two more of them with their usual values; recorded where they are others."""
STATES = "states"
"""The obs columns of which every training prompt states something; recorded where there are any."""
ADAPTER_CONFIG = "adapter_config.json"
SHARE_KNOWN = 0.5
"""Share of the genes in common below which a model is not asked."""
SHOWN = 3


@dataclass(frozen=True)
class KnownLabel:
    """A label of the training puzzles."""

    ontology_term_id: str | None
    """Of the Cell Ontology; None when the training files state none."""
    tissues: tuple[str, ...]
    """The tissues in which the training files have it, sorted."""
    n: int
    """Its cells in the training files."""


@dataclass(frozen=True)
class KnownLabels:
    """What a model was trained on."""

    labels: dict[str, KnownLabel]
    """By label, sorted."""
    genes: list[str]
    """The symbols that occur in the training puzzles, sorted."""
    path: Path | None = None
    """The file that says so."""
    puzzles: dict[str, Any] = field(default_factory=dict)
    """How the training puzzles were built, of PUZZLE_OPTIONS; a model is best asked in the same way. {} if not recorded."""

    def in_tissue(self, tissue: str) -> list[str]:
        """The labels of a tissue, sorted; case is ignored. [] when the model knows none there."""
        wanted = tissue.strip().lower()
        return [label for label, known in self.labels.items() if wanted in map(str.lower, known.tissues)]

    def ontology_term_id(self, label: str) -> str | None:
        """The Cell Ontology id of a label, or None."""
        known = self.labels.get(label)
        return known.ontology_term_id if known else None

    @property
    def tissues(self) -> list[str]:
        """The tissues of the training files, sorted."""
        return sorted({tissue for known in self.labels.values() for tissue in known.tissues})

    def joined(self, other: "KnownLabels") -> "KnownLabels":
        """What a model knows that was trained on the puzzles of both.

        A label of both has the tissues and cells of both, and the id that one of them states first. Puzzles have the
        sizes of the larger ones, the gene classes that both leave out, and the facts that both state.
        """
        labels = dict(self.labels)
        for label, theirs in other.labels.items():
            ours = labels.get(label, KnownLabel(None, (), 0))
            tissues = tuple(sorted({*ours.tissues, *theirs.tissues}))
            labels[label] = KnownLabel(ours.ontology_term_id or theirs.ontology_term_id, tissues, ours.n + theirs.n)
        puzzles = dict(self.puzzles or other.puzzles)
        if self.puzzles and other.puzzles:
            puzzles |= {name: max(self.puzzles[name], other.puzzles[name]) for name in ("max_cells", "top_genes")}
            for name in ("drop_genes", STATES):
                puzzles[name] = [one for one in self.puzzles.get(name, []) if one in other.puzzles.get(name, [])]
            puzzles = {name: value for name, value in puzzles.items() if name != STATES or value}
        return KnownLabels(dict(sorted(labels.items())), sorted({*self.genes, *other.genes}), None, puzzles)

    def only_in(self, puzzles: Iterable[Puzzle]) -> Self:
        """The labels and genes that occur in some puzzles; `n` stays that of all training files."""
        puzzles = list(puzzles)
        told = {label for puzzle in puzzles for label in puzzle.answer}
        genes = {gene for puzzle in puzzles for cell in puzzle.cells for gene in cell}
        kept = {name: label for name, label in self.labels.items() if name in told}
        return replace(self, labels=kept, genes=[gene for gene in self.genes if gene in genes])

    def to_json(self) -> str:
        """The content of labels.json."""
        labels = {
            label: {"ontology_term_id": known.ontology_term_id, "tissues": list(known.tissues), "n": known.n}
            for label, known in sorted(self.labels.items())
        }
        content = {"labels": labels, "genes": sorted(self.genes)} | ({"puzzles": self.puzzles} if self.puzzles else {})
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_labels(path: Path) -> KnownLabels:
    """The labels of a labels.json or cell_types.json. Raises UserError, with the file's name, for another file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; launch/build.py writes {LABELS} beside train.parquet")
    found = read_settings(path)
    labels, genes = found.get("labels"), found.get("genes")
    if not isinstance(labels, dict) or not isinstance(genes, list) or not all(isinstance(gene, str) for gene in genes):
        raise UserError(
            f"{path}: is no {LABELS} of launch/build.py (it lacks labels or genes); build the puzzles again"
        )
    known = {label: _known(path, label, labels[label]) for label in sorted(labels)}
    return KnownLabels(known, sorted(genes), path, _puzzles(path, found.get("puzzles", {})))


def _puzzles(path: Path, value: Any) -> dict[str, Any]:
    """The options of the puzzles; files of earlier builds have none. Raises UserError for values of another kind."""
    fits = isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in PUZZLE_OPTIONS.items())
    states = value.get(STATES, []) if fits else []
    if value and not (fits and isinstance(states, list) and all(isinstance(name, str) for name in states)):
        raise UserError(
            f"{path}: its puzzles lack {', '.join(PUZZLE_OPTIONS)}, or {STATES} is no list of names; build the puzzles again"
        )
    return {name: value[name] for name in (*PUZZLE_OPTIONS, *USUAL, STATES) if name in value} if value else {}


def _known(path: Path, label: str, value: Any) -> KnownLabel:
    value = value if isinstance(value, dict) else {}
    term, tissues, n = value.get("ontology_term_id"), value.get("tissues"), value.get("n")
    fits = isinstance(term, str | None) and isinstance(tissues, list) and isinstance(n, int)
    if not fits or not all(isinstance(tissue, str) for tissue in tissues):
        raise UserError(f"{path}: the label {label!r} lacks ontology_term_id, tissues or n; build the puzzles again")
    return KnownLabel(term, tuple(tissues), n)


def labels_file_of(model: str | Path) -> Path | None:
    """The file that says which labels a model knows, or None. model: its folder, or a file of puzzles or traces.

    Beside a file it is labels.json. Of a model it is its own cell_types.json; for a checkpoint of a run, the run's --labels,
    or labels.json beside its puzzles or traces; for an adapter, or a run that has none, that of the model it was trained
    from.
    """
    if Path(model).is_file():
        beside = Path(model).parent / LABELS
        return beside if beside.is_file() else None
    for folder, settings in runs_behind(model):
        if (folder / CELL_TYPES).is_file():
            return folder / CELL_TYPES
        named = [Path(settings["labels"])] if settings.get("labels") else []
        named += [Path(settings[key]).parent / LABELS for key in ("puzzles", "traces") if settings.get(key)]
        for path in (seen_from(folder, path) for path in named):
            if path.is_file():
                return path
    return None


def learned_files_of(model: str | Path) -> list[Path]:
    """The files of puzzles and traces that a model was trained on, as its runs name them; some may not be there any more."""
    return [
        seen_from(folder, Path(settings[key]))
        for folder, settings in runs_behind(model)
        for key in ("traces", "puzzles")
        if settings.get(key)
    ]


def runs_behind(model: str | Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """(folder, settings of its run, {} without one) of a model, of those that it was trained from, and so on."""
    seen: set[Path] = set()
    waiting = [Path(model)]
    while waiting:
        folder = waiting.pop(0)
        if folder in seen or not folder.is_dir():
            continue
        seen.add(folder)
        settings = _run_settings(folder)
        yield folder, settings
        adapter = folder / ADAPTER_CONFIG
        base = read_settings(adapter).get("base_model_name_or_path") if adapter.is_file() else None
        waiting += [seen_from(folder, Path(place)) for place in (base, settings.get("model")) if place]


def _run_settings(folder: Path) -> dict[str, str]:
    """The settings, those that are texts, of the run that a checkpoint belongs to; {} without a run."""
    # config.json of a run is one level above OUT/model, and two above OUT/checkpoints/step-000010
    for place in (folder.parent, folder.parent.parent):
        if (place / "config.json").is_file():
            settings = read_settings(place / "config.json").get("settings")
            if isinstance(settings, dict):  # else it is the config.json of a model
                return {key: value for key, value in settings.items() if isinstance(value, str)}
    return {}


def cell_types_file(labels: str | None, *places: str | Path) -> dict[str, str]:
    """{"cell_types.json": its text} for the folder of a trained model; {} when no file says what it knows.

    labels: a labels.json that the user names. Otherwise places: models, or files beside which labels.json may lie, the
    best first. Raises UserError for a file that is no labels.json.
    """
    found = [Path(labels)] if labels else [path for place in places if (path := labels_file_of(place))]
    return {CELL_TYPES: read_labels(found[0]).to_json()} if found else {}


def read_known_labels(*models: str | Path) -> KnownLabels | None:
    """The labels and genes that a model was trained on; None when no file says so (see labels_file_of).

    models: its folder, and after it the checkpoint under an adapter where that is known.
    """
    path = next(filter(None, map(labels_file_of, models)), None)
    return read_labels(path) if path is not None else None


def check_genes_known(genes: Iterable[str], known: Iterable[str], share: float = SHARE_KNOWN) -> float:
    """The share of genes in common, of the smaller of the two sets. Raises UserError when it is below `share`.

    genes: symbols of the user's file. known: symbols that the model was trained on. Of the smaller set, because a small
    panel is known to a model of all genes, and a model of a few thousand genes knows the cells of a whole genome.
    """
    genes, known = set(genes), set(known)
    common = genes & known
    found = len(common) / max(1, min(len(genes), len(known)))
    if found < share:
        here, there = (", ".join(sorted(names - common)[:SHOWN]) for names in (genes, known))
        alike = len({gene.upper() for gene in genes} & {gene.upper() for gene in known})
        but_for_case = (
            f" ({alike:,} are but for upper and lower case, as symbols of mouse and human are)"
            if alike > len(common)
            else ""
        )
        raise UserError(
            f"the prompts would list {len(genes):,} genes of the file ({here}, ...) and the model was trained on "
            f"{len(known):,} ({there}, ...), but only {len(common):,} are in both{but_for_case}, a share of {found:.2f} where "
            f"{share:.2f} is needed; name the column of gene symbols with --gene-key, or use a model that was trained on such "
            "genes"
        )
    return found
