"""The report page's sections on accuracy: by N (Figure 4A), per puzzle (4B), by tissue, disease and cell type."""

from typing import Any

from eval.breakdowns import n_batches
from eval.report.figures import STAGE_NAMES, split_name
from eval.report.html import count, details, escape, figure, html_table, missing, note, section, share
from eval.report.run import Evaluation, Evaluations
from eval.report.stages import Dots, by_size_svg, distribution_svg, dots_svg
from eval.run_files import STAGES
from reward.cellpuzzles import normalise_label

GROUPS_SHOWN = 12
TYPES_SHOWN = 25
CONFUSIONS_SHOWN = 12
SECTION_OF = {"test": "where", "unseen": "where-unseen", "cells": "where-cells"}
"""{split: end of the link to its section}"""
INTERVAL = "The thin line is the 95 % interval for this number of puzzles (bootstrap over puzzles)"

OfStage = dict[str, dict[str, Any]]
"""{stage: its breakdowns}"""


def where_sections(evaluations: Evaluations, summary: dict[str, Any]) -> list[str]:
    """A section for each split that has breakdowns; if no split has any, a section that says why."""
    found = {
        split: {stage: evaluation.found for stage, evaluation in of_stage.items() if evaluation.found}
        for split, of_stage in evaluations.items()
    }
    parts = [_where(split, of_stage, evaluations[split], summary) for split, of_stage in found.items() if of_stage]
    if parts:
        return parts
    files = "metrics.json with breakdowns, nor predictions.jsonl with puzzles, under eval/ and puzzles/"
    reason = f"This run folder has no {files}, so accuracy by size, tissue, disease and cell type cannot be shown."
    return [section("where", "Where it is right, and where not", missing(reason))]


def _where(split: str, found: OfStage, of_stage: dict[str, Evaluation], summary: dict[str, Any]) -> str:
    name = split_name(summary, split)
    absent = [STAGE_NAMES[stage] for stage in STAGES if stage not in found]
    lacking = missing(f"Not shown, because eval/ holds nothing of it: {', '.join(absent)}.") if absent else ""
    guessing = all(evaluation.variant != "open" for evaluation in of_stage.values())
    figures = [
        _sizes(found, guessing),
        _distribution(found),
        *(_dimension(found, dimension) for dimension in ("tissue", "disease")),
    ]
    body = f'{lacking}<div class="grid">{"".join(figures)}{_types(found)}{_confusions(found)}</div>'
    return section(SECTION_OF[split], f"Where it is right: {name}", body)


def _sizes(found: OfStage, guessing: bool) -> str:
    groups = {stage: breakdown["n_cells"] for stage, breakdown in found.items() if breakdown.get("n_cells")}
    if not groups:
        return missing("Accuracy by number of cells: no evaluation holds it.")
    caption = (
        "After Figure 4A of the paper. Each point stands for all puzzles with N cells. A line that falls to the right "
        f"means that larger puzzles are harder. {INTERVAL}."
        + (" The dotted line is what guessing would reach, 1 cell in N." if guessing else "")
    )
    return figure(by_size_svg(groups, guessing), "Accuracy by number of cells", caption, _numbers("N", groups))


def _distribution(found: OfStage) -> str:
    every = {
        stage: breakdown["batch_distribution"]
        for stage, breakdown in found.items()
        if breakdown.get("batch_distribution")
    }
    if not every:
        return missing("Cells right in single puzzles: no evaluation holds it.")
    drawn = {stage: spread for stage, spread in every.items() if spread["mean"] > 0} or every
    empty = [STAGE_NAMES[stage] for stage in every if stage not in drawn]
    caption = (
        "After Figure 4B of the paper. Each bar is the share of puzzles with this share of their cells right. Puzzles "
        "with no cell right, and puzzles with all cells right, have bars of their own at the two ends. A tall bar at "
        "the far right is good. The broken line is the mean."
        + (f" Not drawn: {' and '.join(empty)} no puzzle has a right cell." if empty else "")
    )
    columns = ["cells right", *(STAGE_NAMES[stage] for stage in drawn)]
    bins = [spread["bins"] for spread in drawn.values()]
    rows = []
    for parts in zip(*bins, strict=True):
        low, high = parts[0]["from"], parts[0]["to"]
        name = f"{100 * low:.0f} to below {100 * high:.0f} %" if low < high else "none" if high == 0 else "all"
        rows.append(["above 0, below 10 %" if (low, high) == (0.0, 0.1) else name, *(str(p["batches"]) for p in parts)])
    numbers = details("Number of puzzles", html_table(columns, rows))
    return figure(distribution_svg(drawn), "Cells right in single puzzles", caption, numbers)


def _dimension(found: OfStage, dimension: str) -> str:
    groups = {stage: breakdown[dimension] for stage, breakdown in found.items() if breakdown.get(dimension)}
    title = f"By {dimension}"
    if not groups:
        return missing(f"{title}: the puzzles do not state it.")
    last = list(groups.values())[-1]
    if len(last) == 1:
        return note(f"{title}: all {count(last[0]['n_puzzles'], 'puzzle')} are of one {dimension}, {last[0]['value']}.")
    shown = [group["value"] for group in last[:GROUPS_SHOWN]]
    by_value = {stage: {row["value"]: row for row in rows} for stage, rows in groups.items()}
    dots = []
    for value in shown:
        values = {stage: _accuracy(rows[value]) for stage, rows in by_value.items() if value in rows}
        dots.append(Dots(_label(value, by_value[list(groups)[-1]][value]["n_puzzles"]), values))
    more = f" Shown are the {GROUPS_SHOWN} of {len(last)} with the most puzzles." if len(last) > GROUPS_SHOWN else ""
    caption = (
        "Share of cells with the right label; further to the right is better. In brackets: the number of puzzles. "
        f"{INTERVAL}: where lines overlap widely, the difference may be chance.{more}"
    )
    return figure(dots_svg(title, dots), title, caption, _numbers(dimension, groups))


def _label(name: object, n: int) -> str:
    """A name with a number in brackets; no line break between the two."""
    return f"{name}\u00a0({n:,})"


def _accuracy(row: dict[str, Any]) -> tuple[float, list[float] | None]:
    """(cell accuracy, its interval); a single puzzle has no interval."""
    interval = row.get("intervals", {}).get("cell_accuracy")
    return row["cell_accuracy"], interval if n_batches(row) > 1 else None


def _numbers(head: str, groups: dict[str, list[dict[str, Any]]]) -> str:
    """The numbers behind a figure, as a table to open."""
    last = list(groups.values())[-1]
    columns, rows = [head, "puzzles"], []
    for stage in groups:
        columns += [f"cells right {STAGE_NAMES[stage]}", f"puzzles right {STAGE_NAMES[stage]}"]
    for group in last[: 3 * GROUPS_SHOWN]:
        cells = [escape(str(group["value"])), f"{group['n_puzzles']:,}"]
        for rows_of in groups.values():
            row = next((group_row for group_row in rows_of if group_row["value"] == group["value"]), None)
            for metric in ("cell_accuracy", "batch_accuracy"):
                several = row is not None and n_batches(row) > 1
                interval = row.get("intervals", {}).get(metric) if row is not None and several else None
                cells.append(share(row[metric] if row is not None else None, interval))
        rows.append(cells)
    most = 3 * GROUPS_SHOWN
    more = note(f"The {most} with the most puzzles of {len(last):,}.") if len(last) > most else ""
    return details("The same in numbers", html_table(columns, rows) + more)


def _types(found: OfStage) -> str:
    """Accuracy by cell type: a figure of the most frequent types, and a table of all."""
    types = {
        stage: {row["cell_type"]: row for row in breakdown["cell_type"]}
        for stage, breakdown in found.items()
        if breakdown.get("cell_type")
    }
    if not types:
        return missing("By cell type: no evaluation holds it.")
    last = list(types)[-1]
    frequent = list(types[last].values())[:TYPES_SHOWN]
    ranked = sorted(frequent, key=lambda row: -row["accuracy"])
    # two points per type stay legible; the table below the figure has the base model too
    drawn = [stage for stage in types if stage != "base"] or list(types)
    dots = []
    for row in ranked:
        own = {stage: types[stage][row["cell_type"]] for stage in drawn if row["cell_type"] in types[stage]}
        values = {s: (of_type["accuracy"], of_type["interval"] if s == last else None) for s, of_type in own.items()}
        dots.append(Dots(_label(row["cell_type"], row["cells"]), values))
    everything = (
        f"The {TYPES_SHOWN} most frequent of {len(types[last])} types"
        if len(types[last]) > TYPES_SHOWN
        else "All types"
    )
    caption = (
        f"Share of the cells of a type with the right label; in brackets the number of cells. {everything}, the best "
        f"ones on top. The thin line is the 95 % interval {STAGE_NAMES[last]} (Wilson)."
    )
    columns = [
        "true type",
        "cells",
        *(STAGE_NAMES[stage] for stage in types),
        f"most often taken for {STAGE_NAMES[last]}",
    ]
    rows = []
    for label, row in types[last].items():
        taken = "; ".join(f"{escape(given)} ({n})" for given, n in row["most_confused"]) or "&ndash;"
        shares = [share(types[stage].get(label, {}).get("accuracy")) for stage in types]
        rows.append([escape(label), f"{row['cells']:,}", *shares, taken])
    numbers = details(f"All {count(len(rows), 'type')} in numbers", html_table(columns, rows, "words"))
    return figure(dots_svg("By cell type", dots), "By cell type", caption, numbers)


def _mixed(counts: dict[str, dict[str, int]], truth: str, given: str) -> int:
    """How often a stage took one type for another; a label that no puzzle has is spelled as each stage first wrote it."""
    return sum(n for label, n in counts.get(truth, {}).items() if normalise_label(label) == normalise_label(given))


def _confusions(found: OfStage) -> str:
    """The pairs of types that the last stage confuses most, and how often earlier stages confused them."""
    counts = {stage: breakdown["confusion"] for stage, breakdown in found.items() if breakdown.get("confusion")}
    if not counts:
        return missing("Confusions: no evaluation has an answer that can be read.")
    stages, last = list(counts), list(counts)[-1]
    pairs = [
        (n, truth, given)
        for truth, of in counts[last].items()
        for given, n in of.items()
        if normalise_label(truth) != normalise_label(given)
    ]
    if not pairs:
        return note(f"Confusions: no cell has a wrong label in a readable answer {STAGE_NAMES[last]}.")
    rows = []
    for n, truth, given in sorted(pairs, key=lambda pair: (-pair[0], *pair[1:]))[:CONFUSIONS_SHOWN]:
        of_type = sum(counts[last][truth].values())
        before = [f"{_mixed(counts[stage], truth, given):,}" for stage in stages if stage not in (last, "base")]
        rows.append([escape(truth), escape(given), *before, f"{n:,}", share(n / of_type)])
    columns = ["true type", "taken for", *(STAGE_NAMES[stage] for stage in stages if stage not in (last, "base"))]
    columns += [STAGE_NAMES[last], "share"]
    says = (
        "Each row is one kind of mistake, the most frequent first: the number of cells of the true type that got the "
        f"label beside it. 'Share' is the share of the cells of that type in readable answers {STAGE_NAMES[last]}."
    )
    body = html_table(columns, rows, "words counts") + note(says)
    return f'<article class="narrow"><h3>What is mixed up most</h3>{body}</article>'
