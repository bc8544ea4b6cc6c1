"""Blind review by experts: write the page of anonymous pairs of answers, and merge the reviewers' files.

    python launch/review.py --puzzles test.parquet --predictions sft/predictions.jsonl \\
        --predictions grpo/predictions.jsonl --name SFT --name GRPO --out review.html
    python launch/review.py --collect ana.json --collect ben.json --key review.key.json --out summary

The first call also writes review.key.json, which says who is who: keep it to yourself. The second call writes
summary.json and summary.md.
"""

import json
from dataclasses import MISSING, dataclass
from pathlib import Path

from data.errors import UserError
from data.files import write_whole
from data.puzzles import read_puzzles
from eval.metrics import read_predictions
from eval.review.page import Review, answers_by_id, make_review, read_key
from eval.review.summary import merge_reviews, read_review, summary_markdown
from launch.options import command, option


@dataclass(frozen=True, kw_only=True)
class ReviewConfig:
    puzzles: str | None = option(None, "Puzzles that were answered, .parquet or .jsonl.")
    predictions: tuple[str, ...] = option(
        (), "Answers of a model, .jsonl, .json or .parquet with id and prediction; give two."
    )
    name: tuple[str, ...] = option((), "Names of the two models in the summary; default: where their paths differ.")
    cases: int = option(100, "Most cases on the page; drawn so that each number of cells keeps its share.")
    seed: int = option(0, "Decides which cases, in which order, and which answer is on the left.")
    show_truth: bool = option(
        True, "Show the true cell types; else they are not in the page, and any cell can be marked as wrong."
    )
    collect: tuple[str, ...] = option((), "A reviewer's exported file; one or more, instead of --puzzles.")
    key: str | None = option(None, "The .key.json that was written beside the page, for --collect.")
    out: str = option(MISSING, "Page to write, .html; with --collect the summary, written as OUT.json and OUT.md.")


@command(ReviewConfig)
def main(config: ReviewConfig) -> None:
    """Write a page on which experts compare two models' answers blind, or merge their files (--collect)."""
    making = config.puzzles is not None or config.predictions
    if bool(making) == bool(config.collect):
        raise UserError("give either --puzzles and two --predictions, or --collect and --key")
    if config.collect:
        collect(config)
    else:
        write_page(config)


def write_page(config: ReviewConfig) -> None:
    """Write the page and its key."""
    out = Path(config.out)
    if config.puzzles is None or len(config.predictions) != 2:
        raise UserError(f"a page needs --puzzles and two --predictions, not {len(config.predictions)}")
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
    if out.exists() and not key_file.is_file():
        raise UserError(
            f"--out {out}: is there without its key, {key_file.name}, and would be replaced; name another --out"
        )
    write_whole(key_file, json.dumps(review.key, ensure_ascii=False, indent=1) + "\n")
    write_whole(out, review.html)
    print_summary(review, out, key_file)


def print_summary(review: Review, out: Path, key_file: Path) -> None:
    """Print what was written, and what the user should know before sending it."""
    cases = review.key["cases"]
    print(f"{out}: {len(cases)} cases of {review.both} puzzles answered by both; {review.same} left out (same text)")
    print(f"{key_file}: which side is which model; do not send it to the reviewers")
    if review.naming:
        listed = ", ".join(map(str, review.naming[:10])) + (", ..." if len(review.naming) > 10 else "")
        print(
            f"a model's name occurs in answers of {len(review.naming)} cases ({listed}): read them before you send the "
            "page"
        )


def short_names(first: str, second: str) -> tuple[str, ...]:
    """The parts in which two paths differ: eval/sft/p.jsonl and eval/grpo/p.jsonl are "sft" and "grpo"."""
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
        raise UserError("--collect needs --key, the .key.json that was written beside the page")
    out = Path(config.out)
    out = out.with_suffix("") if out.suffix in (".json", ".md") else out
    files = [out.with_name(out.name + suffix) for suffix in (".json", ".md")]
    for path in (*config.collect, config.key):
        if Path(path).resolve() in {file.resolve() for file in files}:
            raise UserError(f"--out {config.out}: would write over {path}; name another")
    key = read_key(config.key)
    summary = merge_reviews([read_review(path, key) for path in config.collect], key)
    text = summary_markdown(summary, key["error_types"])
    write_whole(files[0], json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    write_whole(files[1], text)
    print(text.partition("\n## ")[0].strip())
    print(f"\nwrote {files[0]} and {files[1]}")


if __name__ == "__main__":
    main()
