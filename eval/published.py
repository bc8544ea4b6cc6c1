"""The paper's published numbers beside ours: eval/published.tsv, and evaluation.md.

Published numbers always carry this label. They are of the paper's models on the paper's puzzles (Cell-o1,
arXiv:2506.02911), so they can be compared with ours only as far as the puzzles can.

Example: published_rows(table="Table 3", setting="melanoma")[-1].cell_accuracy == 0.8591
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from data.audit import tenths
from data.describe import NOT_STATED, markdown_table
from eval import reasons
from eval.breakdowns import n_batches

FILE = Path(__file__).with_name("published.tsv")
SOURCE = "Fang et al. 2025, Cell-o1, arXiv:2506.02911 v1"
NOTE = (
    "Published numbers are of the paper's models on the paper's puzzles; they compare with ours as far as the puzzles "
    "do. Published cell accuracy is shown as pooled over cells: Table 3's is (checked), of Tables 2 and 12 it is not known. "
    "Table 11's is not (its values are no shares of its 991 cells), so it stands as the mean over batches."
)
KEY_MODELS = ("Qwen2.5-7B-Instruct", "IT Qwen2.5-7B", "o1", "Cell-o1")
"""Models whose published rows the report's tables show: base, base tuned on answers alone, teacher, and result."""
MEASURES = {
    "batch": "",
    "cell": " Table 11: the cell-level rows are of single answers put together into batches (the batch-level rows of "
    "answers to whole batches): they stand beside ours put together, not beside the metrics of single cells.",
    "open": " Table 12 takes a label as right when its MedCPT similarity to the gold label is above 0.8: it stands "
    "beside our similarities (--medcpt), not beside exact matches.",
}
"""{variant of the puzzles: what the published accuracies measure, where it differs from ours}"""
DISEASES = {
    "breast cancer": ("breast cancer", "breast carcinoma"),
    "melanoma": ("melanoma", "malignant melanoma"),
    "systemic lupus erythematosus": ("systemic lupus erythematosus", "sle"),
    "colorectal cancer": ("colorectal cancer", "colorectal carcinoma"),
}
"""The diseases of Table 3: {disease: names of a disease or a file that mean the same}"""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of the paper's tables. Shares are in [0, 1]; None means not published."""

    table: str
    setting: str
    model: str
    response_length: float | None
    """In tokens of Qwen2.5, for every model."""
    cell_accuracy: float | None
    batch_accuracy: float | None
    format_validity: float | None
    uniqueness: float | None
    medcpt: float | None
    """Mean MedCPT similarity of given and gold labels."""

    def to_dict(self) -> dict[str, Any]:
        """The row as a JSON object, with its label and without what was not published."""
        return {"label": "published"} | {key: value for key, value in asdict(self).items() if value is not None}


@cache
def _all_rows() -> tuple[Published, ...]:
    lines = [line for line in FILE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    names = lines[0].split("\t")
    assert names == [field.name for field in fields(Published)], "eval/published.tsv has other columns"
    numbers = names[3:]
    rows = [dict(zip(names, line.split("\t"), strict=True)) for line in lines[1:]]
    return tuple(Published(**row | {n: None if row[n] == "-" else float(row[n]) for n in numbers}) for row in rows)


def published_rows(table: str | None = None, setting: str | None = None) -> list[Published]:
    """Rows of eval/published.tsv in file order; only those of a table or a setting where given."""
    return [row for row in _all_rows() if table in (None, row.table) and setting in (None, row.setting)]


def disease_of_table_3(name: str) -> str | None:
    """The disease of Table 3 that the name of a disease or a file means; None for another disease, also for a subtype.

    "breast carcinoma" and "breast_cancer" mean its breast cancer; "uveal melanoma" does not mean its melanoma.
    """
    text = " ".join(name.lower().replace("_", " ").replace("-", " ").split())
    return next((disease for disease, names in DISEASES.items() if text in names), None)


def comparable(variant: str, diseases: list[str], with_similarity: bool = False) -> dict[str, Any]:
    """{label, source, note, rows}: the paper's numbers to show beside an evaluation.

    variant: of the puzzles. "batch" gives Table 2, and the rows of Table 3 for those of its diseases that are among
    `diseases`, with its average if all four are; "cell" gives Table 11, "open" Table 12. with_similarity: MedCPT
    similarity was computed. The note says what the accuracies of the rows measure.
    """
    rows = published_rows({"batch": "Table 2", "cell": "Table 11", "open": "Table 12"}[variant])
    if variant == "open":
        rows = [row for row in rows if row.setting == "open-ended"]
    if variant == "batch":
        named = [disease_of_table_3(name) for name in diseases if name not in ("normal", NOT_STATED)]
        found = set(named) - {None}
        # beside a mean over these four and no other
        settings = {*found, "average"} if found == set(DISEASES) and len(named) == len(DISEASES) else found
        rows += [row for row in published_rows("Table 3") if row.setting in settings]
        rows += published_rows("Table 12", "constrained") if with_similarity else []
    return {
        "label": "published",
        "source": SOURCE,
        "note": NOTE + MEASURES[variant],
        "rows": [row.to_dict() for row in rows],
    }


COLUMNS = {
    "batch_accuracy": "batches all right",
    "cell_accuracy": "cells right, mean over batches",
    "cell_accuracy_micro": "cells right, pooled",
    "format_validity": "valid format",
    "uniqueness": "uniqueness",
    "response_length": "response length",
}
SIMILARITY_COLUMNS = {
    "batch_accuracy": "batches all right",
    "cell_accuracy": "cells right, mean over batches",
    "cell_accuracy_micro": "cells right, pooled",
    "mean_similarity": "mean similarity (valid answers)",
    "format_validity": "valid format",
    "response_length": "response length",
}
GROUP_COLUMNS = ("batch_accuracy", "cell_accuracy", "cell_accuracy_micro", "format_validity")
"""The columns that a breakdown shows."""
BREAKDOWN_TITLES = {
    "n_cells": ("By number of cells (Figure 4A)", "N"),
    "tissue": ("By tissue", "tissue"),
    "disease": ("By disease", "disease"),
    "donor": ("By donor", "donor"),
}
LONGEST = 30
"""Most rows of a breakdown in evaluation.md; metrics.json has all."""


def evaluation_markdown(title: str, result: dict[str, Any]) -> str:
    """The text of evaluation.md: metrics.json for a biologist to read, with published numbers beside ours.

    title: of the page. result: the content of metrics.json. The same result gives the same text.
    """
    parts = [f"# {title}", _headline(result), *(f"Mind: {sentence}." for sentence in result.get("notes", ()))]
    parts += [*filter(None, [reasons.markdown(result)])]
    parts += [f"## The metrics\n\n{_metrics_table(result)}\n\n{_glossary(result)}"]
    if "k_sample" in result:
        parts.append(_k_sample(result))
    if "compare" in result:
        parts.append(_compare(result))
    if "decomposition" in result:
        parts.append(_decomposition(result))
    if "similarity" in result:
        parts.append(_similarity(result))
    found = result["breakdowns"]
    parts += [_by_value(name, found[name], result) for name in BREAKDOWN_TITLES if found[name]]
    if "disease_average" in found:
        parts.append(
            average_table("Unweighted average over diseases (as in Table 3)", found["disease_average"], result)
        )
    if result["puzzles"]["variant"] != "cell":  # of a single cell all are right, or none
        parts.append(_distribution(found["batch_distribution"]))
    parts.append(_cell_types(found["cell_type"]))
    return "\n\n".join(parts) + "\n"


def average_table(title: str, average: dict[str, Any], result: dict[str, Any]) -> str:
    """A section with the unweighted mean over diseases or files, beside the average of Table 3 where `result` has it.

    average: the result of eval.breakdowns.average_over. result: its keys "name" and "published" are used.
    """
    rows = [[result["name"], *_shares(average, COLUMNS)]]
    rows += [_published_row(row) for row in result["published"]["rows"] if row.get("setting") == "average"]
    return f"## {title}\n\nOver {', '.join(average['over'])}.\n\n" + markdown_table(["", *COLUMNS.values()], rows)


def average_markdown(result: dict[str, Any]) -> str:
    """The text of evaluation.md for several files. result: the content of average.json."""
    of_table_3 = [row for row in result["published"]["rows"] if row["table"] == "Table 3"]
    rows = []
    for file, metrics in result["files"].items():
        rows.append([file, f"{metrics['n_puzzles']:,}", *_shares(metrics, COLUMNS)])
        disease = disease_of_table_3(file)
        for row in of_table_3:
            if row["setting"] == disease:
                label, *cells = _published_row(row)
                rows.append([label, "", *cells])
    files = markdown_table(["file", "puzzles", *COLUMNS.values()], rows)
    said = [f"- {file}: {one}." for file, metrics in result["files"].items() for one in reasons.sentences(metrics)]
    parts = [f"# {result['name']} on {len(result['files'])} files", f"## By file\n\n{files}"]
    parts += (
        ["What is wrong with the answers (the folder of each file says more):\n\n" + "\n".join(said)] if said else []
    )
    parts += [average_table("Unweighted average over the files", result["average"], result), _glossary(result)]
    return "\n\n".join(parts) + "\n"


def _headline(result: dict[str, Any]) -> str:
    low, high = result["intervals"]["batch_accuracy"]
    n, batches = result["n_puzzles"], result["interval"]["batches"]
    what = f"{n:,} single cells of {batches:,} batches" if result["puzzles"]["variant"] == "cell" else f"{n:,} batches"
    limits = f" (95 % interval {_range(low, high)})" if batches > 1 else ""  # a single batch has none
    k = (result.get("k_sample") or {}).get("k", 1)
    first = f" (the first of {k} answers to each, sampled; below are the mean and the votes of all)" * (k > 1)
    return (
        f"**{result['name']}** names every cell right in {_percent(result['batch_accuracy'])} of {what}{limits}, "
        f"and {_percent(result['cell_accuracy_micro'])} of all cells{first}."
    )


def _metrics_table(result: dict[str, Any]) -> str:
    """Our metrics with intervals, then the paper's models that were measured in the same way."""
    rows = [[result["name"], *_shares(result, COLUMNS)]]
    rows += [_published_row(row) for row in result["published"]["rows"] if row["table"] == "Table 2"]
    return markdown_table(["", *_titles(result, COLUMNS)], rows)


def _titles(result: dict[str, Any], names: Iterable[str]) -> list[str]:
    """The titles of the columns of these metrics. A single cell is no batch: there they say cells."""
    alone = {"batch_accuracy": "cells right"} if result["puzzles"]["variant"] == "cell" else {}
    return [alone.get(name, COLUMNS[name]) for name in names]


def _glossary(result: dict[str, Any]) -> str:
    unit = result["response_length_unit"]
    return (
        "In brackets: the 95 % interval, by bootstrap over batches; an interval of a single value means that all "
        "batches are (nearly) alike, which says little when there are few. 'Mean over batches' is the paper's definition of "
        "cell accuracy (B.1); 'pooled' counts all cells together. An answer of an invalid format has no cell right. "
        "Uniqueness: different labels / cells. Response length is in "
        f"{'words' if unit == 'words' else unit + ' of the model'}, the published ones in tokens of Qwen2.5.\n\n"
        f"(published): {result['published']['source']}. {result['published']['note']}"
    )


def _published_row(row: dict[str, Any], columns: dict[str, str] = COLUMNS) -> list[str]:
    """The name of a published row, then its cells in the order of the columns."""
    setting = "" if row["setting"] in ("test", "open-ended", "average") else f", {row['setting']}"
    cells = {name: _percent(row[name]) for name in COLUMNS if name in row}
    if row["table"] != "Table 11":
        cells["cell_accuracy"], cells["cell_accuracy_micro"] = "", cells.pop("cell_accuracy", "")
    cells["response_length"] = f"{row['response_length']:,.1f}" if "response_length" in row else ""
    cells["mean_similarity"] = _number(row["medcpt"], 3) if "medcpt" in row else ""
    return [f"{row['model']}{setting}, {row['table']} (published)", *(cells.get(name, "") for name in columns)]


def _k_sample(result: dict[str, Any]) -> str:
    found, unit = result["k_sample"], "cell" if result["puzzles"]["variant"] == "cell" else "batch"
    k = found["k"]
    names = {
        **({"greedy": "one answer, greedy"} if "greedy" in found else {}),
        "mean": f"mean of {k} answers",
        "majority_vote": "majority vote over whole assignments",
        "cell_vote": "vote cell by cell, one to one",
    }
    rows = [[label, *_shares(found[name], COLUMNS)] for name, label in names.items()]
    several = n_batches(result) > 1
    passes = [
        [n, _cell(one["value"], one["interval"] if several else None, _percent)]
        for n, one in found["pass_at_k"].items()
    ]
    return (
        f"## {k} answers per {unit}\n\n{markdown_table(['', *_titles(result, COLUMNS)], rows)}\n\n"
        "Whole assignments vote if they use each candidate at most once; if none does, all answers of a valid format "
        "vote. The response length of a vote is that of all its answers together. pass@k: the probability that at "
        f"least one of k answers has every cell right.\n\n{markdown_table(['k', 'pass@k'], passes)}"
        + (
            f"\n\nOf the vote cell by cell: {confidence_sentence(found['consensus'], unit, several)}"
            if "consensus" in found
            else ""
        )
    )


def confidence_sentence(found: dict[str, Any], unit: str = "batch", several: bool = True) -> str:
    """How far the one-to-one vote can be trusted, in words.

    found: of eval.breakdowns.vote_confidence. unit: batch or cell. several: there are two batches or more, so intervals.
    """
    limits = found["intervals"] if several else dict.fromkeys(found["intervals"])
    values = {name: _cell(found[name], limits[name], _percent) for name in limits}
    of_cells = (
        f"{values['cells_confident']} of the cells have a label that at least {_percent(found['threshold'])} of the valid "
        f"answers give them; of these {values['cell_accuracy']} are right."
    )
    if unit == "cell":  # a puzzle is one cell: nothing more to say
        return of_cells
    return (
        f"{of_cells} In {values['batches_confident']} of the batches every cell is so; of these {values['batch_accuracy']} are "
        "all right."
    )


def _compare(result: dict[str, Any]) -> str:
    found, rows, several = result["compare"], [], n_batches(result) > 1
    for name, title in zip(COLUMNS, _titles(result, COLUMNS), strict=True):
        one, show, scale = found["metrics"][name], _shown(name), 1 if name == "response_length" else 100
        difference, low, high = (f"{scale * x:+.1f}" for x in (one["difference"], *one["interval"]))
        # every resample of one batch is that batch
        limits, p = (f" ({low} to {high})", f"{one['p']:.2g}") if several else ("", "-")
        rows.append([title, show(one["ours"]), show(one["theirs"]), f"{difference}{limits}", p])
    return (
        f"## Against {found['other']}\n\nBoth models on the same resamples of batches (paired bootstrap). Differences "
        f"of shares are in percentage points; response length is in {found['response_length_unit']}.\n\n"
        + markdown_table(["", *_who(found), "difference", "p (two-sided)"], rows)
        + "".join(f"\n\nOf the other model, {sentence}." for sentence in reasons.sentences(found))
        + (_compared_vote(found, several) if "consensus" in found else "")
    )


def _who(found: dict[str, Any]) -> list[str]:
    """The two columns of a comparison; where one model has several answers to a puzzle, both say what is compared."""
    k = found.get("answers") or {"ours": 1, "theirs": 1}
    if max(k.values()) == 1:
        return ["this", found["other"]]
    means = {side: f"mean of {n} answers" if n > 1 else "one answer" for side, n in k.items()}
    return [f"this, {means['ours']}", f"{found['other']}, {means['theirs']}"]


def _compared_vote(found: dict[str, Any], several: bool) -> str:
    """The one-to-one vote of this model against the single answers of the other one."""
    rows = []
    for name, one in found["consensus"].items():
        difference, low, high = (f"{100 * x:+.1f}" for x in (one["difference"], *one["interval"]))
        shares = [_percent(one["ours"]), _percent(one["theirs"])]
        limits, p = (f" ({low} to {high})", f"{one['p']:.2g}") if several else ("", "-")
        rows.append([COLUMNS[name], *shares, f"{difference}{limits}", p])
    head = ["", "this, by the one-to-one vote", found["other"], "difference", "p (two-sided)"]
    return f"\n\n{markdown_table(head, rows)}"


def _decomposition(result: dict[str, Any]) -> str:
    found = result["decomposition"]
    ways = {"spoiled": "an invalid cell spoils its batch", "wrong_alone": "an invalid cell is wrong by itself"}
    rows = [[label, *_shares(found[way], COLUMNS)] for way, label in ways.items()]
    rows += [_published_row(row) for row in result["published"]["rows"] if row["table"] == "Table 11"]
    return (
        "## Cells put together into batches (Table 11)\n\nThe paper does not say which of the two ways its Table 11 "
        f"uses. Of single answers, {_percent(found['cell_format_validity'])} have a valid format. Response length is "
        "that of single answers; in the published batch-level rows it is that of answers to whole batches.\n\n"
        + markdown_table(["", *COLUMNS.values()], rows)
    )


def _similarity(result: dict[str, Any]) -> str:
    """Our accuracies by similarity with intervals, and the rows of Table 12, whose accuracies are by similarity too."""
    found = result["similarity"]
    ours = {**result, **found, "intervals": {**result["intervals"], **found["intervals"]}}
    rows = [[result["name"], *_shares(ours, SIMILARITY_COLUMNS)]]
    rows += [
        _published_row(row, SIMILARITY_COLUMNS) for row in result["published"]["rows"] if row["table"] == "Table 12"
    ]
    return (
        f"## By similarity of labels (Table 12)\n\nA label is right when its similarity to the gold label is above "
        f"{found['threshold']:g}.\n\n" + markdown_table(["", *SIMILARITY_COLUMNS.values()], rows)
    )


def _by_value(name: str, groups: list[dict[str, Any]], result: dict[str, Any]) -> str:
    """The section of a breakdown; below a disease of Table 3, its published rows."""
    title, head = BREAKDOWN_TITLES[name]
    with_chance, rows = name == "n_cells" and result["puzzles"]["variant"] != "open", []
    for one in groups[:LONGEST]:
        by_chance = [_percent(1 / one["value"])] if with_chance else []
        rows.append([str(one["value"]), f"{one['n_puzzles']:,}", *_shares(one, GROUP_COLUMNS), *by_chance])
        of_paper = disease_of_table_3(str(one["value"])) if name == "disease" else None
        for row in result["published"]["rows"]:
            if of_paper and row["table"] == "Table 3" and row["setting"] == of_paper:
                label, *cells = _published_row(row)
                rows.append([label, "", *cells[: len(GROUP_COLUMNS)]])
    more = f"\n\nThe {LONGEST} largest of {len(groups):,}." if len(groups) > LONGEST else ""
    columns = [
        head,
        "puzzles",
        *_titles(result, GROUP_COLUMNS),
        *(["cells right by chance"] if with_chance else []),
    ]
    return f"## {title}\n\n{markdown_table(columns, rows)}{more}"


def _distribution(found: dict[str, Any]) -> str:
    names = [f"{100 * one['from']:.0f} to below {100 * one['to']:.0f} %" for one in found["bins"]]
    names[0], names[1], names[-1] = "none", "above 0, below 10 %", "all"
    rows = [[name, f"{one['batches']:,}"] for name, one in zip(names, found["bins"], strict=True)]
    low, middle, high = (_percent(x) for x in found["quartiles"])
    return (
        f"## Cells right in single batches (Figure 4B)\n\nMedian {middle}, quartiles {low} and {high}.\n\n"
        + markdown_table(["cells right", "batches"], rows)
    )


def _cell_types(rows: list[dict[str, Any]]) -> str:
    shown = [
        [
            one["cell_type"],
            f"{one['cells']:,}"
            + (f" ({one['distinct_cells']:,})" if one.get("distinct_cells", n := one["cells"]) < n else ""),
            _cell(one["accuracy"], one["interval"], _percent),
            "; ".join(f"{label} ({n})" for label, n in one["most_confused"]),
        ]
        for one in rows[:LONGEST]
    ]
    more = f"\n\nThe {LONGEST} most frequent of {len(rows):,}." if len(rows) > LONGEST else ""
    reused = any(one.get("distinct_cells", one["cells"]) < one["cells"] for one in rows[:LONGEST])
    head = ["cell type", "cells (distinct)" if reused else "cells", "right", "most confused with"]
    return f"## By cell type\n\n{markdown_table(head, shown)}{more}"


def _shares(metrics: dict[str, Any], names: Any) -> list[str]:
    """Values with their intervals, as cells of a table; without intervals for a single batch, which has none."""
    several = n_batches(metrics) > 1
    return [_cell(metrics[name], metrics["intervals"][name] if several else None, _shown(name)) for name in names]


def _shown(name: str) -> Any:
    """The function that shows values of a measure."""
    digits = {"response_length": 1, "mean_similarity": 3}.get(name)
    return _percent if digits is None else lambda x: _number(x, digits)


def _cell(value: float, interval: list[float] | None, show: Any) -> str:
    return show(value) + (f" ({show(interval[0])} to {show(interval[1])})".replace(" %", "") if interval else "")


def _range(low: float, high: float) -> str:
    return f"{tenths(low)} to {tenths(high)} %"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{tenths(share)} %"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
