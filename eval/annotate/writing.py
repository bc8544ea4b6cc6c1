"""What an annotation leaves: columns of obs, a record in uns, a CSV row per cluster; the three files, all or none."""

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data.clusters.annotated import holds_uns, refuse_copy, storable, texts_of_uns, write_annotated
from data.errors import UserError
from data.files import crc32_of, replacing
from data.formats.checksum import is_as_written, refuse_edited
from eval.annotate.annotation import Annotated, Annotation
from eval.annotate.doubts import Agreement
from eval.annotate.evidence import markers_of
from eval.annotate.page import MADE_BY

KEY = "cell_type_llm"
COLUMNS = (KEY, f"{KEY}_confidence", f"{KEY}_second", f"{KEY}_ontology_term_id")
"""The obs columns."""
TABLE_CRC, PAGE_CRC = "table_crc32", "page_crc32"
"""Members of the record in a file's uns: the CRC-32 of the .csv and the .html beside it."""
NONE = "none"
"""The second choice of a cluster whose votes all went to one label."""
CSV_COLUMNS = (
    *("cluster", "cells", "label", "best_label", "confidence", "share_of_votes", "second", "second_share"),
    *("ontology_term_id", "votes", "answers", "samples", "cited_genes", "marker_genes_found", "shared_with"),
)
TRUTH_COLUMNS = ("truth", "truth_share")
"""With --truth-key: the commonest known label of the cluster's cells, and its share of those with a known label."""


def obs_columns_of(annotation: Annotation, cluster_of_cell: np.ndarray) -> dict[str, Any]:
    """{obs column: [C] values}: categories of text, and the confidence as float64.

    A cell without a cluster has no value (NaN) in any of them: nobody was asked about it.
    """
    codes, names = pd.factorize(cluster_of_cell)
    found = [annotation.clusters.get(name) for name in names]

    def column(of: Callable[[Annotated], str]) -> pd.Categorical:
        values = np.array([of(cluster) if cluster else None for cluster in found], dtype=object)
        return pd.Categorical(values[codes], categories=sorted(set(values) - {None}))

    confidence = np.array([cluster.confidence if cluster else np.nan for cluster in found])
    return {
        KEY: column(lambda cluster: cluster.label),
        f"{KEY}_confidence": confidence[codes],
        f"{KEY}_second": column(lambda cluster: cluster.found.second or NONE),
        f"{KEY}_ontology_term_id": column(lambda cluster: cluster.ontology),
    }


def plain(text: str) -> str:
    """The text as UTF-8 can hold it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def record_of(annotation: Annotation, provenance: dict[str, Any]) -> dict[str, Any]:
    """The content of uns["cell_type_llm"]: JSON-able values.

    provenance: model, hashes, versions, command, settings.
    """
    candidates = {sample: some.labels for sample, some in annotation.candidates.items()}
    sources = sorted({some.source for some in annotation.candidates.values()})
    alike = len({tuple(labels) for labels in candidates.values()}) == 1
    votes = {name: dict(cluster.found.tally.votes.most_common()) for name, cluster in annotation.clusters.items()}
    return {
        **{name: plain(value) if isinstance(value, str) else json.dumps(value) for name, value in provenance.items()},
        # of one list or, where samples differ, of each sample
        "candidates": json.dumps(next(iter(candidates.values())) if alike else candidates),
        "candidates_from": "; ".join(sources),
        # as text: cluster and label names are no names for HDF5 ("CD4+/CD8+")
        "votes": json.dumps(votes),
        "answers": annotation.n_answers,
        "invalid_answers": annotation.n_invalid,
        "notes": json.dumps(annotation.notes),
    }


def csv_of(annotation: Annotation, table: dict[str, list[str]], agreement: Agreement | None = None) -> str:
    """A CSV with a row per cluster. table: {normalised label: marker genes}, to count those that a cluster lists.

    agreement: with a column of known labels.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((*CSV_COLUMNS, *(TRUTH_COLUMNS if agreement else ())))
    for cluster in annotation.clusters.values():
        found, tally = cluster.found, cluster.found.tally
        best = found.label or ""
        shared = [
            c.cluster for c in annotation.clusters.values() if best and c.found.label == best and c is not cluster
        ]
        second_share = tally.votes[found.second] / tally.valid if found.second else 0.0
        row = (
            *(cluster.cluster, cluster.n_cells, cluster.label, best, f"{cluster.confidence:.3f}", f"{found.share:.3f}"),
            *(found.second or "", f"{second_share:.3f}", cluster.ontology, tally.valid, tally.asked),
            "; ".join(profile.sample for profile in cluster.profiles),
            " ".join(cluster.rationale.cited) if cluster.rationale else "",
            " ".join(markers_of(best, cluster.genes, table).found),
            "; ".join(shared),
        )
        if agreement:
            truth, share = agreement.of_cluster.get(cluster.cluster, ("", 0.0))
            row += (truth, f"{share:.3f}" if truth else "")
        writer.writerow([_harmless(value) for value in row])
    return out.getvalue()


def _harmless(value: Any) -> Any:
    """A text that a spreadsheet does not take for a formula: names come from a file, labels from a model."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "@", "\t") else value


def write_all(
    source: Path, out: Path, columns: dict, record: dict, rows_text: str, page: str, stamp: list[int] | None = None
) -> list[str]:
    """Write OUT, and beside it .csv and .html: all three or none. Returns notes on what was replaced in the copy.

    columns: of obs_columns_of. record: of record_of. rows_text: of csv_of. page: HTML. stamp: of write_annotated. Raises
    UserError that names the file when one cannot be written.
    """
    with replacing(out.with_suffix(".csv")) as rows, replacing(out.with_suffix(".html")) as html:
        # half of a surrogate pair, in an endpoint's answer or a file name, is no UTF-8
        rows.write_bytes(rows_text.encode("utf-8", "backslashreplace"))
        html.write_bytes(page.encode("utf-8", "backslashreplace"))
        # so that a file that its owner edits is not replaced by a later call
        record = record | {name: f"{crc32_of(file):08x}" for name, file in ((TABLE_CRC, rows), (PAGE_CRC, html))}
        # last and largest: where it cannot be written, the other two keep their temporary names and go
        return write_annotated(source, out, columns, {KEY: record}, stamp)


def add_to(adata: Any, columns: dict[str, Any], record: dict[str, Any]) -> None:
    """Put the columns and the record into an AnnData in memory."""
    for name, values in columns.items():
        adata.obs[name] = values
    adata.uns[KEY] = {name: storable(value) for name, value in record.items()}


def refuse_places(source: Path, out: Path, candidates: str | None = None) -> None:
    """Raises UserError, before a model is asked, when the source cannot be copied, or a file of the user's would be lost.

    candidates: --candidates, which may be a file.
    """
    table, html = out.with_suffix(".csv"), out.with_suffix(".html")
    for path in (out, table, html):
        if os.path.isdir(path):
            raise UserError(f"{path}: is a folder, and a file is to be written there; name another --out")
        if candidates and os.path.isfile(candidates) and os.path.exists(path) and os.path.samefile(candidates, path):
            raise UserError(f"--out {out}: {path.name} is the file of --candidates; name another --out")
    if os.path.isfile(table):
        with open(table, encoding="utf-8", errors="replace") as file:
            ours = file.readline().startswith(",".join(CSV_COLUMNS[:3]))
        if not ours:
            raise UserError(f"{table}: is no table of this command, and would be replaced; name another --out")
    if os.path.isfile(html) and MADE_BY not in html.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{html}: is no page of this command, and would be replaced; name another --out")
    refuse_copy(source, out)
    if not os.path.isfile(out):
        if os.path.isfile(table):  # which the .h5ad file, written first, would tell from one that was edited
            raise UserError(f"{table}: would be replaced, and {out} is not there; move it, or name another --out")
        return
    if not holds_uns(out, KEY):
        raise UserError(f"{out}: holds no labels of this command, and would be replaced; name another --out")
    refuse_edited(out, is_as_written(out))
    written = texts_of_uns(out, KEY)  # files of older versions lack the checksums
    for path, name in ((table, TABLE_CRC), (html, PAGE_CRC)):
        if os.path.isfile(path):
            refuse_edited(path, written.get(name, crc := f"{crc32_of(path):08x}") == crc)
