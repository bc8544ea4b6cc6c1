"""Held-out donors as a user's file: their labels taken away, their types split into clusters, and the labels to compare.

The clusters are cut finer than the types, as clusters of a real file often are: each type of a donor is divided at
random into several clusters, which get numbers. The numbers say nothing of the types.
"""

import csv
import json
import random
from pathlib import Path
from typing import Any

import anndata
import numpy as np

from data.build.columns import is_placeholder
from data.errors import UserError
from data.files import replacing
from data.formats.checksum import add_checksum, refuse_damaged
from eval.annotate.doubts import same

CLUSTER, TYPE, DONOR = "cluster", "cell_type", "donor_id"


def held_out_donors(report: Path, split: str = "test") -> list[str]:
    """The donors of a split of a build, those of most puzzles first. report: its report.json. split: test or unseen."""
    donors = json.loads(report.read_text(encoding="utf-8"))["splits"].get(split, {}).get("donors") or {}
    if not donors:
        raise UserError(f"{report}: the build has no donor in its {split} split; build with more donors")
    return sorted(donors, key=lambda name: (-donors[name], name))


def overclustered(
    adata: Any, donors: list[str], seed: int, parts: int = 2, fewest: int = 3
) -> tuple[Any, dict[str, str]]:
    """(cells of some donors without their labels and with an obs column "cluster", {cluster: its type}).

    parts: clusters per donor and type. fewest: cells of the smallest cluster; types with fewer than parts x fewest cells in
    a donor are left out, and so are cells whose type is not known. A cluster has cells of one donor.
    """
    rng = random.Random(f"{seed}:overclustered")
    labels, donor_of = adata.obs[TYPE].astype(str).to_numpy(), adata.obs[DONOR].astype(str).to_numpy()
    pieces: list[tuple[str, np.ndarray]] = []
    for donor in donors:
        for label in sorted(set(labels[donor_of == donor])):
            rows = np.flatnonzero((donor_of == donor) & (labels == label)).tolist()
            if len(rows) >= parts * fewest and not is_placeholder(label):
                rng.shuffle(rows)
                pieces += [(label, np.array(rows[i::parts])) for i in range(parts)]
    rng.shuffle(pieces)  # else the numbers of two clusters of one type would follow each other
    names = np.full(adata.n_obs, "", dtype=object)
    for number, (_, rows) in enumerate(pieces):
        names[rows] = str(number)
    cells = np.flatnonzero(names != "")
    blind = adata[cells].copy()
    ours = {TYPE, f"{TYPE}_ontology_term_id"}
    blind.obs = blind.obs[[column for column in blind.obs.columns if column not in ours]]
    blind.obs[CLUSTER] = names[cells]
    blind.obs[CLUSTER] = blind.obs[CLUSTER].astype("category")
    return blind, {str(number): label for number, (label, _) in enumerate(pieces)}


def write_held_out(atlas: Path, report: Path, out: Path, seed: int, n_donors: int = 1) -> dict[str, str]:
    """Write the file of the first held-out donors, blind, to OUT.h5ad; returns {cluster: its type}.

    The types go to OUT.types.json beside it, to count what is right afterwards.
    """
    refuse_damaged(atlas)
    adata = anndata.read_h5ad(atlas)
    blind, types = overclustered(adata, held_out_donors(report)[:n_donors], seed)
    with replacing(out) as partial:
        blind.write_h5ad(partial)
        add_checksum(partial)
    with replacing(out.with_suffix(".types.json")) as partial:
        partial.write_text(json.dumps(types, indent=1) + "\n", encoding="utf-8")
    return types


def count_right(table: Path, types: Path) -> tuple[int, int]:
    """(clusters whose best label is their type, clusters). table: the CSV of an annotation. types: of `write_held_out`."""
    known = json.loads(types.read_text(encoding="utf-8"))
    with open(table, encoding="utf-8", newline="") as handle:
        best = {row["cluster"]: row["best_label"] for row in csv.DictReader(handle)}
    return sum(same(best.get(cluster), label) for cluster, label in known.items()), len(known)
