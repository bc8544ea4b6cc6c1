"""annotation.html: one file that opens without a network, for the biologist who checks the labels.

Every text that comes from the file or from a model is escaped; the page runs no script and loads nothing.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.annotate.annotation import UNCERTAIN, UNKNOWN_TERM, Annotated, Annotation, counts_of
from eval.annotate.doubts import Agreement, doubts_of
from eval.annotate.evidence import Markers, markers_of
from eval.report.html import (
    EMPTY,
    contents,
    count,
    details,
    escape,
    figure,
    html_table,
    mark,
    missing,
    note,
    number,
    page,
    section,
    share,
)

MADE_BY = "A language model read the genes of every cluster"
"""In every page of this command: by it eval/annotate/writing.py knows one."""
STYLE = """
mark { background: #ffe08a; color: #1c2126; border-radius: 3px; padding: 0 .15em; }
.genes-of { overflow-wrap: anywhere; font-size: .93rem; }
.votes td:first-of-type { width: 45%; } .bar { background: var(--grid); border-radius: 3px; display: block; }
.bar i { background: var(--accent); border-radius: 3px; display: block; height: .6rem; min-width: 2px; margin-top: .45rem; }
.umap { background: #fff; border-radius: 6px; overflow: visible; }
.swatch, .bar, .bar i, mark { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
.swatch { border-radius: 50%; outline: 1px solid var(--line); display: inline-block; height: .7rem; width: .7rem;
  margin-right: .35rem; }
.legend { columns: 3 14rem; list-style: none; margin: .6rem 0 0; padding: 0; font-size: .9rem; }
.umap text { fill: #1c2126; stroke: #fff; stroke-width: 3px; paint-order: stroke; font-size: 13px; font-weight: 600;
  text-anchor: middle; }
.doubts { margin: .2rem 0; padding-left: 1.4rem; } .doubts li { margin: .15rem 0; }
@media screen and (max-width: 820px) { .votes td:first-of-type { width: auto; } }
blockquote { border-left: 3px solid var(--line); margin: .4rem 0; padding: .1rem .9rem; }
article h3 small { font-weight: 400; } .left td, .left th { text-align: left; }
"""
CALIBRATED = (
    "How a share of answers became a confidence: eval/annotate/calibration.tsv, a table of shares and of how often the label "
    "was right, fitted on simulated cells with one small model. Another model, or real cells, may be right less often at the "
    "same share: compare with cells of known type (--truth-key)."
)
SHOWN_MISSING = 8
"""Marker genes that are not listed, and are named."""
FEWEST_POINTS = 20
"""Cells of a cluster that such a sample holds, where it has as many."""
MOST_POINTS = 12_000
"""More cells than this are drawn as a random sample, so that the page stays small."""
WIDTH, HEIGHT, EDGE = 640, 480, 14
GREY = "#9aa0a6"
PALE, NO_CLUSTER = "#dfe3e8", "without a cluster"
"""Of cells that no label is written for."""
# Okabe and Ito's colours first, which colour-blind readers can tell apart, then Tol's
COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#a5a100", "#332288", "#88ccee", "#44aa99"),
    *("#117733", "#999933", "#aa4499", "#882255", "#661100", "#6699cc", "#aa4466", "#4477aa", "#b8860b", "#7b5ea7"),
)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the page is made of, beside the annotation."""

    title: str
    """The file's name."""
    table: dict[str, list[str]]
    """{normalised label: marker genes}"""
    settings: dict[str, Any]
    """Model, hashes, versions, options, command: shown at the end."""
    clusters: np.ndarray
    """[C] cluster of each cell."""
    places: np.ndarray | None = None
    """[C, 2] obsm["X_umap"]."""
    agreement: Agreement | None = None


def annotation_page(annotation: Annotation, shown: Shown) -> str:
    """The whole page."""
    found = list(annotation.clusters.values())
    title = f"{shown.title}: {counts_of(annotation)}"
    parts = [f"<h1>{escape(title)}</h1>", _lead(annotation, shown)]
    sections = {
        "labels": ("The labels", _overview(annotation, shown)),
        "umap": ("Where they lie", _umap(annotation, shown)),
        "truth": ("Against known labels", _truth(annotation, shown)),
        "clusters": ("Cluster by cluster", "".join(_article(cluster, annotation, shown) for cluster in found)),
        "candidates": ("Candidates", _candidates(annotation)),
        "made": ("How it was made", _settings(annotation, shown)),
    }
    kept = {name: pair for name, pair in sections.items() if pair[1]}
    parts.append(contents({name: heading for name, (heading, _) in kept.items()}))
    parts += [section(name, heading, body) for name, (heading, body) in kept.items()]
    return page(title, parts, STYLE)


def _lead(annotation: Annotation, shown: Shown) -> str:
    text = (
        f"{MADE_BY}, several times and in different company ({count(annotation.n_answers, 'answer')}), and its answers "
        "voted. It can be wrong: read the reasons and the doubts before you use a label."
    )
    if shown.agreement is not None and shown.agreement.n_clusters:
        a = shown.agreement
        text += f" Beside the column {a.key}: {a.clusters_right} of {count(a.n_clusters, 'cluster')} right."
    return f'<p class="lead">{escape(text)}</p>' + "".join(note(sentence) for sentence in annotation.notes)


def _overview(annotation: Annotation, shown: Shown) -> str:
    columns = ["cluster", "label", "confidence", "answers for it", "second choice", "Cell Ontology", "cells"]
    columns += [shown.agreement.key] if shown.agreement else []
    colours = colours_of([cluster.label for cluster in annotation.clusters.values()])
    rows = []
    for place, cluster in enumerate(annotation.clusters.values()):
        found, tally = cluster.found, cluster.found.tally
        row = [
            f'<a href="#cluster-{place}">{escape(cluster.cluster)}</a>',
            f"{_swatch(colours[cluster.label])}{escape(cluster.label)}{best_guess(cluster)}",
            share(cluster.confidence),
            f"{tally.votes[found.label]} of {tally.asked}" if found.label else EMPTY,
            escape(found.second) if found.second else EMPTY,
            escape(cluster.ontology) if cluster.ontology != UNKNOWN_TERM else EMPTY,
            number(cluster.n_cells),
        ]
        if shown.agreement:
            truth = shown.agreement.of_cluster.get(cluster.cluster)
            right = mark(shown.agreement.right(cluster)) + " " if truth else ""
            row.append(right + escape(truth[0]) if truth else EMPTY)
        rows.append(row)
    says = note(
        "Confidence is the share of the answers that gave the label, translated into the accuracy that such a share had on cells "
        "of known type (see the end of the page). Below the limit a cluster is uncertain."
    )
    return html_table(columns, rows, "left") + says


def best_guess(cluster: Annotated) -> str:
    """The label with most votes of an uncertain cluster, in brackets; "" for another cluster."""
    uncertain = cluster.label == UNCERTAIN and cluster.found.label
    return f" <small>(best guess: {escape(str(cluster.found.label))})</small>" if uncertain else ""


def _swatch(colour: str) -> str:
    return f'<i class="swatch" style="background:{colour}"></i>'


def _umap(annotation: Annotation, shown: Shown) -> str:
    if shown.places is None:
        return ""
    labels = np.array([_label_of(annotation, name) for name in shown.clusters.tolist()], dtype=object)
    colours = colours_of([cluster.label for cluster in annotation.clusters.values()]) | {NO_CLUSTER: PALE}
    svg = umap_svg(shown.places, labels, shown.clusters, colours)
    used = set(labels.tolist())
    legend = "".join(f"<li>{_swatch(c)}{escape(label)}</li>" for label, c in colours.items() if label in used)
    caption = (
        "Each dot is a cell, at its place in obsm['X_umap'], in the colour of its label; the names are the clusters'."
    )
    shown_colours = [colour for label, colour in colours.items() if label in used]
    if len(set(shown_colours)) < len(shown_colours):
        caption += f" There are {len(COLOURS)} colours: some labels share a colour, and the names tell them apart."
    n = int(np.isfinite(shown.places).all(axis=1).sum())
    if n > MOST_POINTS:
        caption += (
            f" {MOST_POINTS:,} of {n:,} cells are drawn, chosen at random, of every cluster at least {FEWEST_POINTS}."
        )
    if n < len(labels):
        caption += f" {len(labels) - n:,} cells have no place there."
    return figure(svg, "UMAP", caption, f'<ul class="legend">{legend}</ul>')


def _label_of(annotation: Annotation, cluster: str) -> str:
    found = annotation.clusters.get(cluster)
    return found.label if found else NO_CLUSTER


def _truth(annotation: Annotation, shown: Shown) -> str:
    agreement = shown.agreement
    if agreement is None:
        return ""
    if not agreement.n_clusters:
        return missing(f"The column {agreement.key} has no known label.")
    said = (
        f"The best label of {agreement.clusters_right} of {count(agreement.n_clusters, 'cluster')} is the commonest label of "
        f"its cells in {agreement.key}; {agreement.cells_right:,} of {count(agreement.n_cells, 'cell')} have their own label "
        "written (uncertain counts as wrong). Labels are compared letter by letter, but for case and blanks: another name "
        "for the same type counts as different. The model did not see this column."
    )
    rows = []
    for cluster in annotation.clusters.values():
        truth = agreement.of_cluster.get(cluster.cluster)
        if truth and not agreement.right(cluster):
            best = escape(cluster.found.label or UNCERTAIN)
            rows.append([escape(cluster.cluster), best, f"{escape(truth[0])} <small>{share(truth[1])}</small>"])
    wrong = html_table(["cluster", "best label", f"commonest in {agreement.key}"], rows, "left", "Where they differ")
    return note(said) + (wrong if rows else "")


def _article(cluster: Annotated, annotation: Annotation, shown: Shown) -> str:
    place = list(annotation.clusters).index(cluster.cluster)
    samples = f", asked about in {count(len(cluster.profiles), 'sample')}" if len(cluster.profiles) > 1 else ""
    size = f"{count(cluster.n_cells, 'cell')}{samples}, confidence {share(cluster.confidence)}"
    label = f"{escape(cluster.cluster)}: {escape(cluster.label)}{best_guess(cluster)}"
    head = f"<h3>{label} <small>{size}</small></h3>"
    doubts = doubts_of(cluster, annotation, shown.table)
    shown_doubts = "".join(f"<li>{escape(doubt)}</li>" for doubt in doubts)
    body = (
        f'<h4>Doubts</h4><ul class="doubts">{shown_doubts}</ul>' if doubts else note("Nothing speaks against it here.")
    )
    if cluster.profiles:
        body = _votes(cluster) + _reasons(cluster) + _genes(cluster) + _markers(cluster, shown.table) + body
    return f'<article id="cluster-{place}">{head}{body}</article>'


def _votes(cluster: Annotated) -> str:
    tally = cluster.found.tally
    rows = [
        [
            escape(label),
            f'<span class="bar"><i style="width:{100 * n / tally.valid:.0f}%"></i></span>',
            f"{n} of {tally.valid}",
        ]
        for label, n in tally.votes.most_common()
    ]
    return (
        html_table(["label", "share", "votes"], rows, "votes left") if rows else missing("No answer gave it a label.")
    )


def _reasons(cluster: Annotated) -> str:
    rationale = cluster.rationale
    if rationale is None:
        return ""
    whole = details(
        f"The whole answer, in which this cluster is Cell {rationale.cell}",
        f"<pre>{escape(rationale.reading.text)}</pre>",
    )
    if not rationale.about:
        return missing("The reasoning says nothing of this cluster by its number.") + whole
    return (
        f"<h4>What the model says</h4><blockquote>{highlighted(rationale.about, rationale.cited)}</blockquote>{whole}"
    )


def highlighted(text: str, genes: Iterable[str]) -> str:
    """The text as HTML, escaped, with the genes marked where they are whole words.

    >>> highlighted("LYZ <high>, LYZL no", ["LYZ"])
    '<mark>LYZ</mark> &lt;high&gt;, LYZL no'
    """
    known = set(genes)
    words = re.split(r"([A-Za-z0-9][A-Za-z0-9.-]*[A-Za-z0-9])", text)
    return "".join(f"<mark>{escape(word)}</mark>" if word in known else escape(word) for word in words)


def _genes(cluster: Annotated) -> str:
    largest, cited = cluster.profiles[0], set(cluster.rationale.cited if cluster.rationale else ())

    def line(genes: Sequence[str]) -> str:
        return ", ".join(f"<mark>{escape(gene)}</mark>" if gene in cited else escape(gene) for gene in genes)

    found = f'<h4>Its genes</h4><p class="genes-of"><b>Most expressed:</b> {line(largest.by_expression)}</p>'
    if largest.by_difference:
        found += f'<p class="genes-of"><b>More than in other clusters:</b> {line(largest.by_difference)}</p>'
    return found + (note("Marked genes are those that the answer above cites for it.") if cited else "")


def _markers(cluster: Annotated, table: dict[str, list[str]]) -> str:
    labels = [label for label in (cluster.found.label, cluster.found.second) if label]
    rows = []
    for label in labels:
        markers = markers_of(label, cluster.genes, table)
        if markers.known:
            rows.append([escape(label), ", ".join(map(escape, markers.found)) or EMPTY, _not_listed(markers)])
    if not rows:
        why = "does not have these labels" if table else "is of human genes, and these are of another organism"
        return missing(f"The marker table (data/atlas/markers.tsv) {why}.") if labels else ""
    return html_table(["marker table", "for: listed", "against: not listed"], rows, "left words")


def _not_listed(markers: Markers) -> str:
    shown = ", ".join(map(escape, markers.missing[:SHOWN_MISSING]))
    more = len(markers.missing) - SHOWN_MISSING
    return (shown + (f" and {more} more" if more > 0 else "")) or EMPTY


def _candidates(annotation: Annotation) -> str:
    by_list: dict[tuple, list[str]] = {}
    for sample, some in annotation.candidates.items():
        by_list.setdefault((some.source, *some.labels), []).append(sample)
    parts = []
    for (source, *labels), samples in by_list.items():
        of = (
            f" ({', '.join(filter(None, samples[:6]))}{' ...' if len(samples) > 6 else ''})" if len(by_list) > 1 else ""
        )
        parts.append(f"<p><b>{escape(source + of)}:</b> {escape(', '.join(labels)) or 'any cell type'}</p>")
    return "".join(parts)


def _settings(annotation: Annotation, shown: Shown) -> str:
    rows = [[escape(name), escape(str(value))] for name, value in shown.settings.items()]
    rows.append(["answers", f"{annotation.n_answers:,}, of which {annotation.n_invalid:,} of an invalid format"])
    return html_table(["", "value"], rows, "settings left") + note(CALIBRATED)


# ---- the cells on their UMAP


def colours_of(labels: Sequence[str]) -> dict[str, str]:
    """{label: colour}, in order of first appearance; UNCERTAIN is grey, and colours repeat after the last."""
    distinct = [label for label in dict.fromkeys(labels) if label != UNCERTAIN]
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(distinct)} | {UNCERTAIN: GREY}


def shortened(name: str) -> str:
    """The name of a cluster on the UMAP, of at most 24 characters."""
    return name if len(name) <= 24 else f"{name[:23]}\u2026"


def sample_of(rows: list[int], clusters: list[str]) -> list[int]:
    """MOST_POINTS of the rows, in order: some of every cluster, the rest at random. clusters: of each row."""
    rng, of_cluster = random.Random(0), {}
    for row, cluster in zip(rows, clusters, strict=True):
        of_cluster.setdefault(cluster, []).append(row)
    few = [row for own in of_cluster.values() for row in rng.sample(own, min(FEWEST_POINTS, len(own)))]
    kept = set(few[:MOST_POINTS])
    rest = [row for row in rows if row not in kept]
    return sorted(kept | set(rng.sample(rest, MOST_POINTS - len(kept))))


def umap_svg(places: np.ndarray, labels: np.ndarray, clusters: np.ndarray, colours: dict[str, str]) -> str | None:
    """The drawing; None where no cell has a place.

    places: [C, 2]. labels, clusters: [C] text of each cell. A dot per cell, and each cluster's name where the median of
    its cells lies.
    """
    rows = np.flatnonzero(np.isfinite(places).all(axis=1))
    if not len(rows):
        return None
    if len(rows) > MOST_POINTS:
        rows = np.array(sample_of(rows.tolist(), clusters[rows].tolist()))
    low, high = places[rows].min(axis=0), places[rows].max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    room = np.array([WIDTH - 2 * EDGE, HEIGHT - 2 * EDGE])
    at = EDGE + (places[rows] - low) / span * room
    at[:, 1] = HEIGHT - at[:, 1]  # SVG counts down from the top
    parts = []
    first = {NO_CLUSTER: 0, UNCERTAIN: 1}  # below the labelled cells
    for label, colour in sorted(colours.items(), key=lambda item: first.get(item[0], 2)):
        of_label = at[labels[rows] == label]
        if len(of_label):
            # a line of length 0 with round ends is a dot: one path for thousands of cells
            dots = "".join(f"M{x:.0f} {y:.0f}h0" for x, y in of_label)
            parts.append(f'<path d="{dots}" stroke="{colour}"><title>{escape(label)}</title></path>')
    for cluster in dict.fromkeys(clusters[rows].tolist()):
        if cluster:
            x, y = np.median(at[clusters[rows] == cluster], axis=0)
            parts.append(f'<text x="{x:.0f}" y="{y:.0f}">{escape(shortened(cluster))}</text>')
    size = 3.0 if len(rows) > 3000 else 4.5
    return (
        f'<svg class="umap" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="UMAP of the cells, coloured by label" '
        f'fill="none" stroke-width="{size}" stroke-linecap="round">{"".join(parts)}</svg>'
    )
