"""Sentences that say why a label may be wrong, and how labels agree with a column of known ones."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from data.prompts import normalise_label
from eval.annotate.annotation import Annotated, Annotation
from eval.annotate.evidence import markers_of

CLOSE = 0.25
"""A second choice with at least this share of the votes is named as a doubt."""
FEW_CELLS = 20
INVALID = 0.25
"""Share of answers without a usable label from which on it is named."""


def doubts_of(cluster: Annotated, annotation: Annotation, table: dict[str, list[str]]) -> list[str]:
    """The doubts about a cluster's label, one sentence each; [] where nothing speaks against it.

    table: {normalised label: marker genes}.
    """
    found, tally, said = cluster.found, cluster.found.tally, []
    if not cluster.profiles:
        return [
            "It has too few cells in every sample, or none with an expressed gene, so the model was not asked about it."
        ]
    if found.label is None and tally.valid:
        return [f"Its {tally.valid} votes are for labels that --one-to-one always gave to other clusters."]
    if found.label is None:
        return [f"None of {tally.asked} answers gave it a label that can be used."]
    own, others = tally.votes[found.label], [name for name, n in tally.votes.items() if n and name != found.label]
    if found.second and tally.votes[found.second] >= CLOSE * tally.valid:
        said.append(f"{tally.votes[found.second]} of {tally.valid} votes are for {found.second}.")
    elif 2 * own <= tally.valid:
        said.append(f"Only {own} of {tally.valid} votes are for it; the others name {len(others)} labels.")
    if tally.asked - tally.valid >= INVALID * tally.asked:
        said.append(f"{tally.asked - tally.valid} of {tally.asked} answers about it cannot be used.")
    favourites = {sample: max(votes, key=lambda label: votes[label]) for sample, votes in tally.by_sample.items()}
    # a tie is no other favourite
    other = [sample for sample, votes in tally.by_sample.items() if votes[favourites[sample]] > votes[found.label]]
    if other and len(favourites) > 1:
        shown = ", ".join(f"{sample or 'unnamed'}: {favourites[sample]}" for sample in other[:3])
        said.append(f"In {len(other)} of {len(favourites)} samples most votes are for another label ({shown}).")
    shared = [c.cluster for c in annotation.clusters.values() if c is not cluster and c.found.label == found.label]
    if shared:
        said.append(
            f"It shares its label with {'cluster' if len(shared) == 1 else 'clusters'} {', '.join(shared[:8])}"
            f"{f' and {len(shared) - 8} more' if len(shared) > 8 else ''}."
        )
    best = markers_of(found.label, cluster.genes, table)
    if best.known and not best.found:
        said.append(f"None of the {len(best.missing)} marker genes of {found.label} is among its listed genes.")
    if found.second:
        second = markers_of(found.second, cluster.genes, table)
        if len(second.found) > len(best.found):
            said.append(
                f"The marker table speaks more for {found.second} ({len(second.found)} marker genes listed, against "
                f"{len(best.found)})."
            )
    if cluster.n_cells < FEW_CELLS:
        said.append(f"It has {cluster.n_cells} cells only.")
    return said


@dataclass(frozen=True)
class Agreement:
    """How labels agree with a column of known ones. Cells without a known label are left out."""

    key: str
    of_cluster: dict[str, tuple[str, float]]
    """{cluster: (its commonest known label, the share of its cells with it)}"""
    clusters_right: int
    """Clusters whose best label is their commonest known label, compared as in the reward."""
    n_clusters: int
    cells_right: int
    """Cells whose written label is their known label."""
    n_cells: int

    def right(self, cluster: Annotated) -> bool:
        """Is the best label of a cluster its commonest known one?"""
        truth = self.of_cluster.get(cluster.cluster)
        return truth is not None and same(cluster.found.label, truth[0])


def same(label: str | None, other: str) -> bool:
    """Are two labels equal, as the reward compares them?"""
    return label is not None and normalise_label(label) == normalise_label(other)


def agreement_of(annotation: Annotation, key: str, clusters: Sequence[str], truth: Sequence[str]) -> Agreement:
    """key: the column's name. clusters, truth: [C] of each cell, "" where not known."""
    pairs = Counter(pair for pair in zip(clusters, truth, strict=True) if all(pair))
    counts: dict[str, Counter] = defaultdict(Counter)
    for (cluster, label), n in pairs.items():
        counts[cluster][label] += n
    of_cluster, right, cells_right = {}, 0, 0
    for name, of in counts.items():
        # ties go to the label that comes first in the alphabet
        label = min(of, key=lambda text: (-of[text], text))
        of_cluster[name] = (label, of[label] / sum(of.values()))
        cluster = annotation.clusters[name]
        right += same(cluster.found.label, label)
        cells_right += sum(n for text, n in of.items() if same(cluster.label, text))
    return Agreement(key, of_cluster, right, len(counts), cells_right, sum(pairs.values()))
