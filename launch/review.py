"""Blind review by experts: write the page of anonymous pairs, and put the reviewers' files together.

python launch/review.py --puzzles test.parquet --predictions sft/predictions.jsonl --predictions grpo/predictions.jsonl \
    --name SFT --name GRPO --out review.html        also writes review.key.json, which says who is who: keep it to yourself
python launch/review.py --collect ana.json --collect ben.json --key review.key.json --out summary   summary.json, summary.md
"""

import json
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import click

from data.errors import UserError
from data.files import write_whole
from data.puzzles import read_puzzles
from eval.metrics import read_predictions
from eval.review import RESAMPLES, VERDICTS, WORDING, Review, answers_by_id, make_review, merge, read_key, read_review
from launch.options import command, option


@dataclass(frozen=True, kw_only=True)
class ReviewConfig:
    puzzles: str | None = option(None, "Puzzles that were answered, .parquet or .jsonl.")
    predictions: tuple[str, ...] = option(
        (), "Answers of a model, .jsonl, .json or .parquet with id and prediction; give two."
    )
    name: tuple[str, ...] = option((), "Names of the two models in the summary; default: where their paths differ.")
    cases: int = option(100, "Most cases on the page; drawn so that each number of cells keeps its share.")
    seed: int = option(0, "Which cases, in which order, and which answer stands left.")
    show_truth: bool = option(
        True, "Show the true cell types; else they are not in the page and any cell can be marked."
    )
    collect: tuple[str, ...] = option((), "A reviewer's exported file; one or more, instead of --puzzles.")
    key: str | None = option(None, "The .key.json that was written beside the page, for --collect.")
    out: str = option(MISSING, "Page to write, .html; with --collect the summary, written as OUT.json and OUT.md.")


@command(ReviewConfig)
def main(config: ReviewConfig) -> None:
    """Write a page on which experts compare two models' answers blind, or merge what they sent back (--collect)."""
    making = config.puzzles is not None or config.predictions
    if bool(making) == bool(config.collect):
        raise click.UsageError("give either --puzzles and two --predictions, or --collect and --key")
    if config.collect:
        collect(config)
    else:
        write_page(config)


def write_page(config: ReviewConfig) -> None:
    """Write the page and its key."""
    out = Path(config.out)
    if config.puzzles is None or len(config.predictions) != 2:
        raise click.UsageError(f"a page needs --puzzles and two --predictions, not {len(config.predictions)}")
    if out.suffix != ".html":
        raise UserError(f"--out {out}: name a file that ends in .html")
    if config.cases < 1:
        raise UserError(f"--cases {config.cases}: must be at least 1")
    names = config.name or short_names(*config.predictions)
    if len(names) != 2 or len({name.strip().casefold() for name in names} - {"", "tie"}) != 2:
        raise UserError(f"--name {', '.join(names)}: give two different names, neither of them 'tie'")
    puzzles = read_puzzles(config.puzzles)
    answers = {
        name: answers_by_id(read_predictions(path), puzzles, path)
        for name, path in zip(names, config.predictions, strict=True)
    }
    review = make_review(puzzles, answers, config.cases, config.seed, config.show_truth)
    key_file = out.with_suffix(".key.json")
    if key_file.is_file() and read_key(key_file)["page"] != review.key["page"]:
        raise UserError(f"{key_file}: is the key of another page, whose reviews need it; name another --out")
    write_whole(out, review.html)
    write_whole(key_file, json.dumps(review.key, ensure_ascii=False, indent=1) + "\n")
    tell(review, out, key_file)


def tell(review: Review, out: Path, key_file: Path) -> None:
    """Print what was written, and what the user should know before sending it."""
    cases = review.key["cases"]
    print(
        f"{out}: {len(cases)} cases of {review.both} puzzles answered by both; {review.same} left out, same text twice"
    )
    print(f"{key_file}: which side is which model; do not send it to the reviewers")
    if review.naming:
        listed = ", ".join(map(str, review.naming[:10])) + (", ..." if len(review.naming) > 10 else "")
        print(
            f"a model's name occurs in answers of {len(review.naming)} cases ({listed}): read them before you send the page"
        )


def short_names(first: str, second: str) -> tuple[str, ...]:
    """Where two paths differ: eval/sft/p.jsonl and eval/grpo/p.jsonl are "sft" and "grpo"."""
    if Path(first).resolve() == Path(second).resolve():
        raise UserError(f"--predictions {second}: given twice; a review compares two files")
    parts = [list(Path(path).resolve().with_suffix("").parts) for path in (first, second)]
    for end in (0, -1):
        while all(parts) and parts[0][end] == parts[1][end]:
            for own in parts:
                own.pop(end)
    return tuple("/".join(own) for own in parts)


def collect(config: ReviewConfig) -> None:
    """Merge the reviewers' files into OUT.json and OUT.md."""
    if config.key is None:
        raise click.UsageError("--collect needs --key, the .key.json that was written beside the page")
    out = Path(config.out)
    out = out.with_suffix("") if out.suffix in (".json", ".md") else out
    files = [out.with_name(out.name + suffix) for suffix in (".json", ".md")]
    for path in (*config.collect, config.key):
        if Path(path).resolve() in {file.resolve() for file in files}:
            raise UserError(f"--out {config.out}: would write over {path}; name another")
    key = read_key(config.key)
    summary = merge([read_review(path, key) for path in config.collect], key)
    text = summary_markdown(summary, key["error_types"])
    write_whole(files[0], json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    write_whole(files[1], text)
    print(text.partition("\n## ")[0].strip())
    print(f"\nwrote {files[0]} and {files[1]}")


def summary_markdown(summary: dict[str, Any], error_names: dict[str, str]) -> str:
    """The summary as a text to read. error_names: {id: name} of the key."""
    models, reviewers = summary["models"], summary["reviewers"]

    def share(value: dict[str, Any]) -> str:
        low, high = value["interval"]
        return f"{100 * value['share']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"

    def kappa(value: float | None) -> str:
        return "not defined" if value is None else f"{value:.2f}"

    columns = ("wins", "ties", "losses")
    results = [
        [
            m,
            *(f"{summary['results'][m][c]['count']} = {share(summary['results'][m][c])}" for c in columns),
            share(summary["results"][m]["win_rate"]),
        ]
        for m in models
    ]
    errors = [[name, *(summary["errors"][m]["types"][kind] for m in models)] for kind, name in error_names.items()]
    errors += [["wrong cells seen", *(summary["errors"][m]["wrong_places"] for m in models)]]
    errors += [["right cells marked", *(summary["errors"][m]["marked_though_right"] for m in models)]]
    people = [[r["name"], f"{r['judged']} of {summary['cases']}", *(r[v] for v in VERDICTS)] for r in reviewers]
    pairs = [
        [*a["reviewers"], a["shared"], a["same"], kappa(a["kappa"]), kappa(a["kappa_linear"])]
        for a in summary["agreement"]
    ]
    odd = [
        [d["case"], d["puzzle"], d["n_cells"], "; ".join(f"{n}: {v}" for n, v in d["verdicts"].items())]
        for d in summary["disagreements"]
    ]
    said = [
        [c["case"], f"left {c['left']}, right {c['right']}", c["reviewer"], c["comment"]] for c in summary["comments"]
    ]
    parts = [
        f"# Blind review: {models[0]} against {models[1]}",
        f"{summary['judgements']} judgements of {summary['cases_judged']} of {summary['cases']} cases. The reviewers "
        f"{'saw' if summary['show_truth'] else 'did not see'} the true cell types. In brackets: 95 % bootstrap interval, over "
        f"cases ({RESAMPLES:,} resamples). In the win rate a tie counts half.",
        _table(("model", *columns, "win rate"), results),
        "## Errors marked",
        f"Counted over cells and reviewers; an answer that cannot be read counts as one cell. {WORDING}",
        _table(("type", *models), errors),
        "## Reviewers",
        _table(("reviewer", "cases judged", "left", "tie", "right"), people),
        "## Agreement",
        "Cohen's kappa of loss, tie and win over the cases both judged, unweighted (Cohen 1960, "
        "doi:10.1177/001316446002000104) and linear-weighted (Cohen 1968, doi:10.1037/h0026256).",
        _table(("reviewer", "and", "shared cases", "same verdict", "kappa", "linear kappa"), pairs),
        "## Cases on which they disagree",
        _table(("case", "puzzle", "cells", "better"), odd),
        "## Comments",
        _table(("case", "sides", "reviewer", "comment"), said),
    ]
    return "\n\n".join(parts) + "\n"


def _table(columns: tuple[str, ...], rows: list[list[Any]]) -> str:
    def line(cells: Any) -> str:
        return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)]) if rows else "None."


if __name__ == "__main__":
    main()
