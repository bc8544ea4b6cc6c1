"""ablation.md: configurations compared, what each round made, and what was lost beside what was gained."""

from typing import Any

from data.describe import escape
from eval.ablation.made import OF_ROUND


def ablation_markdown(
    found: dict[str, list[dict[str, Any]]], first: str, varieties: dict[str, dict[str, float] | None] | None = None
) -> str:
    """The tables of ablation.md. found: {split: rows of `compare_arms`}. varieties: {name: of `compare.variety`}."""
    parts = ["# Configurations compared\n"]
    for split, rows in found.items():
        parts.append(compared(split, rows, first))
        if any(len(row.get("points", ())) > 1 for row in rows):
            parts.append(rounds(split, rows))
    parts.append(lost(found, varieties or {}))
    parts.append(
        "Intervals are bootstrap intervals over puzzles of the mean over seeds; `against` is the paired difference in batch "
        "accuracy on the same puzzles. They do not cover the choice of seeds: see the values of each seed."
    )
    return "\n".join(parts) + "\n"


def compared(split: str, rows: list[dict[str, Any]], first: str) -> str:
    """The last models of all configurations on one split."""
    counted = any("sampled" in row for row in rows)
    lines = [
        f"## {split}\n",
        *heading(
            *("configuration", "seeds", "batch accuracy (95 %)", "of each seed", "cell accuracy", "valid format"),
            *("tokens", f"against {first}", *["sampled tokens"] * counted),
        ),
    ]
    for row in rows:
        values, against = row["metrics"], "-"
        if "against" in row:
            pair = row["against"]["batch_accuracy"]
            against = f"{pair['difference']:+.3f} [{pair['interval'][0]:+.3f}, {pair['interval'][1]:+.3f}]"
        cells = [
            *(row["name"], str(len(row["seeds"]))),
            share(values["batch_accuracy"], row["intervals"]["batch_accuracy"]),
            ", ".join(f"{value:.3f}" for value in row["by_seed"]["batch_accuracy"]),
            *(f"{values['cell_accuracy']:.3f}", f"{values['format_validity']:.3f}", f"{values['response_length']:.1f}"),
            against,
            *([f"{row['sampled']:,.0f}" if "sampled" in row else "-"] if counted else []),
        ]
        lines.append(line(*cells))
    return "\n".join(lines) + "\n"


def rounds(split: str, rows: list[dict[str, Any]]) -> str:
    """Every model that a configuration made, with what taught it."""
    points = [(row["name"], point) for row in rows for point in row.get("points", ())]
    columns = [name for name in OF_ROUND if any(name in point["taught"] for _, point in points)]
    lines = [
        f"### {split}: every model\n",
        *heading("configuration", "model", "sampled tokens", "batch accuracy (95 %)", "of each seed", *columns),
    ]
    for name, point in points:
        taught = [f"{point['taught'][key]:.3f}" if key in point["taught"] else "-" for key in columns]
        seeds = ", ".join(f"{value:.3f}" for value in point["by_seed"])
        cells = (point["name"], f"{point['sampled']:,.0f}", share(point["value"], point["interval"]), seeds)
        lines.append(line(name, *cells, *taught))
    said = {
        "acceptance": "`acceptance`: share of the training puzzles asked for which a trace was accepted",
        "answers": "`answers`, `vote`, `workflow`: share that is right of single answers, of the vote, and of the workflow's "
        "final assignments on these puzzles; the last is the most that the round can teach",
    }
    notes = [said[name] for name in columns if name in said]
    return "\n".join([*lines, *([f"\n{'; '.join(notes)}."] if notes else [])]) + "\n"


def lost(found: dict[str, list[dict[str, Any]]], varieties: dict[str, dict[str, float] | None]) -> str:
    """Beside what is gained: the format, puzzles of each size, and how different the answers to one puzzle are."""
    sizes = {split: list(dict.fromkeys(n for row in rows for n in row["by_size"])) for split, rows in found.items()}
    k = next((int(one["k"]) for one in varieties.values() if one), 0)
    several = (f"different answers of {k}", f"one of {k} right", "mean of them right") if k else ()
    titles = [
        *(f"valid format, {split}" for split in found),
        *(f"{n} cells, {split}" for split, of_split in sizes.items() for n in of_split),
        *several,
    ]
    lines = ["## What is lost beside what is gained\n", *heading("configuration", *titles)]
    for rows in zip(*found.values(), strict=True):
        of_split = dict(zip(found, rows, strict=True))
        cells = [f"{row['metrics']['format_validity']:.3f}" for row in rows]
        cells += [
            f"{of_split[split]['by_size'][n]:.3f}" if n in of_split[split]["by_size"] else "-"
            for split in found
            for n in sizes[split]
        ]
        one = varieties.get(rows[0]["name"])
        if k:
            cells += [f"{one['distinct']:.2f}", f"{one['right_once']:.3f}", f"{one['mean']:.3f}"] if one else ["-"] * 3
        lines.append(line(rows[0]["name"], *cells))
    return "\n".join(lines) + "\n"


def share(value: float, interval: list[float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def heading(*titles: str) -> list[str]:
    return [line(*titles), "|" + "---|" * len(titles)]


def line(*cells: str) -> str:
    return f"| {' | '.join(map(escape, cells))} |"
