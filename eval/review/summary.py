"""What the reviewers' files say together: wins, errors, agreement, comments; as JSON and as Markdown.

The files are made by the page (eval/review/page.py); its key says which side was which model.
"""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from data.audit import tenths
from data.describe import escape
from data.errors import UserError
from eval.review.page import KIND, NAMES, SIDES, WHOLE, WORDING, read_object

RESAMPLES = 10_000
VERDICTS = ("left", "tie", "right")


def read_review(path: str | Path, key: dict[str, Any]) -> dict[str, Any]:
    """A reviewer's exported file, checked against the key.

    Raises UserError that names the file and what is wrong with it.
    """
    review = read_object(path)
    if review.get("kind") != KIND:
        raise UserError(f"{path}: not a review; give the file that the page's Export button made")
    if review.get("page") != key["page"]:
        raise UserError(f"{path}: a review of another page (id {review.get('page')}, the key's is {key['page']})")
    if not isinstance(review.get("reviewer"), str) or not review["reviewer"].strip():
        raise UserError(f"{path}: names no reviewer; import it into the page, fill in the name and export it again")
    if not isinstance(review.get("answers"), dict):
        raise UserError(f"{path}: damaged, it has no 'answers'; ask the reviewer to export it again")
    cases = {str(case["case"]): case for case in key["cases"]}
    for number, entry in review["answers"].items():
        problem = "is not on the page" if number not in cases else _entry_problem(entry, cases[number], key)
        if problem:
            raise UserError(f"{path}: damaged, case {number} {problem}; ask the reviewer to export it again")
    return review | {"reviewer": " ".join(review["reviewer"].split()), "file": Path(path).name}


def _entry_problem(entry: Any, case: dict[str, Any], key: dict[str, Any]) -> str:
    """What is wrong with a reviewer's entry for a case; "" when it is valid."""
    if not isinstance(entry, dict) or not isinstance(entry.get("comment"), str):
        return "has no comment field"
    if entry.get("verdict") not in (*VERDICTS, None):
        return f"has the verdict {entry['verdict']!r}"
    errors = entry.get("errors")
    if not isinstance(errors, dict) or set(errors) != set(SIDES):
        return "has no errors of a left and a right answer"
    for side in SIDES:
        places = {str(i + 1) for i in range(case["n_cells"])} if case["readable"][case[side]] else {WHOLE}
        marks = errors[side] if isinstance(errors[side], dict) else {"errors": errors[side]}
        for place, kinds in marks.items():
            if place not in places:
                return f"marks cell {place!r} of the {side} answer"
            known = isinstance(kinds, list) and all(isinstance(k, str) and k in key["error_types"] for k in kinds)
            if not known or len(set(kinds)) < len(kinds):
                return f"marks cell {place} of the {side} answer with {json.dumps(kinds)}"
    return ""


def merge_reviews(reviews: list[dict[str, Any]], key: dict[str, Any]) -> dict[str, Any]:
    """The summary of the reviews of one page.

    Raises UserError for two reviews by one reviewer, or when no case is judged.
    """
    seen: dict[str, str] = {}
    for review in reviews:
        name = review["reviewer"].casefold()
        if name in seen:
            raise UserError(
                f"{review['file']}: a second review by {review['reviewer']}, after {seen[name]}; give one file per "
                "reviewer"
            )
        seen[name] = review["file"]
    first, second = key["models"]
    votes = {review["reviewer"]: _votes(review, key) for review in reviews}
    counts = np.zeros((len(key["cases"]), 3), dtype=np.int64)
    for own in votes.values():
        for number, vote in own.items():
            counts[number - 1, vote] += 1
    counts = counts[counts.sum(axis=1) > 0]
    if not len(counts):
        raise UserError(f"--collect: no case is judged in {', '.join(seen.values())}")
    return {
        "page": key["page"],
        "models": [first, second],
        "show_truth": key["show_truth"],
        "cases": len(key["cases"]),
        "answered": key.get("answered"),  # a key of an older version does not know
        "cases_judged": len(counts),
        "judgements": int(counts.sum()),
        "results": {first: _result(counts, key), second: _result(counts[:, ::-1], key)},
        "errors": {model: _errors(reviews, key, model) for model in key["models"]},
        "reviewers": [_reviewer(review) for review in reviews],
        "agreement": [_agreement(a, b, votes) for a, b in combinations(votes, 2)],
        "disagreements": _disagreements(votes, key),
        "comments": _comments(reviews, key),
    }


def _votes(review: dict[str, Any], key: dict[str, Any]) -> dict[int, int]:
    """{case: 0 loss, 1 tie, 2 win of the first model}"""
    verdicts = {case["case"]: review["answers"].get(str(case["case"]), {}).get("verdict") for case in key["cases"]}
    vote_of = {
        case["case"]: {"tie": 1, **{side: 2 * (case[side] == key["models"][0]) for side in SIDES}}
        for case in key["cases"]
    }
    return {number: vote_of[number][verdict] for number, verdict in verdicts.items() if verdict is not None}


def _result(counts: np.ndarray, key: dict[str, Any]) -> dict[str, Any]:
    """Wins, ties, losses and win rate, with 95 % percentile bootstrap intervals over cases.

    counts: [cases, 3] number of losses, ties and wins.
    """
    n = len(counts)
    rng = np.random.default_rng(int(key["page"], 16))  # the same intervals each time
    # cases are drawn, with all their judgements: reviewers of one case are not independent
    resampled = rng.multinomial(n, [1 / n] * n, size=RESAMPLES) @ counts
    result: dict[str, Any] = {}
    for name, value in (("wins", (0, 0, 1)), ("ties", (0, 1, 0)), ("losses", (1, 0, 0)), ("win_rate", (0, 0.5, 1))):
        low, high = np.percentile(resampled @ value / resampled.sum(axis=1), [2.5, 97.5])
        share = float(counts.sum(axis=0) @ value / counts.sum())
        result[name] = {"share": share, "interval": [float(low), float(high)]}
        if name != "win_rate":
            result[name]["count"] = int(counts.sum(axis=0) @ value)
    return result


def _errors(reviews: list[dict[str, Any]], key: dict[str, Any], model: str) -> dict[str, Any]:
    """{types, wrong_places, marked_though_right}: the errors that reviewers marked on a model's answers, by type.

    wrong_places counts the wrong cells that the reviewers saw. All cells of an unreadable answer are wrong; it counts
    as one place.
    """
    types, wrong, on_right = Counter(dict.fromkeys(key["error_types"], 0)), 0, 0
    for review in reviews:
        for case in key["cases"]:
            entry = review["answers"].get(str(case["case"]))
            if entry is None:
                continue
            places = [str(cell) for cell in case["wrong"][model]] if case["readable"][model] else [WHOLE]
            wrong += len(places)
            for place, kinds in entry["errors"][next(side for side in SIDES if case[side] == model)].items():
                types.update(kinds)
                on_right += bool(kinds) and place not in places
    return {"types": dict(types), "wrong_places": wrong, "marked_though_right": on_right}


def _reviewer(review: dict[str, Any]) -> dict[str, Any]:
    verdicts = Counter(entry["verdict"] for entry in review["answers"].values() if entry.get("verdict"))
    return {
        "name": review["reviewer"],
        "file": review["file"],
        "judged": verdicts.total(),
        **{v: verdicts[v] for v in VERDICTS},
    }


def _agreement(a: str, b: str, votes: dict[str, dict[int, int]]) -> dict[str, Any]:
    shared = sorted(votes[a].keys() & votes[b].keys())
    pair = [[votes[name][case] for case in shared] for name in (a, b)]
    return {
        "reviewers": [a, b],
        "shared": len(shared),
        "same": sum(x == y for x, y in zip(*pair, strict=True)),
        "kappa": cohen_kappa(*pair),
        "kappa_linear": cohen_kappa(*pair, linear=True),
    }


def cohen_kappa(first: list[int], second: list[int], linear: bool = False) -> float | None:
    """Agreement of two raters beyond chance: 1 - observed / expected disagreement. Ratings: 0 loss, 1 tie, 2 win.

    Cohen 1960 (doi:10.1177/001316446002000104). linear: disagreement is weighted by distance, Cohen 1968
    (doi:10.1037/h0026256). None where no disagreement is expected by chance: no ratings, or both raters always gave the
    same one rating.
    """
    if not first:
        return None
    shares = np.zeros((3, 3))
    np.add.at(shares, (first, second), 1 / len(first))
    distance = np.abs(np.subtract.outer(np.arange(3), np.arange(3)))
    weight = distance if linear else distance > 0
    expected = float((weight * np.outer(shares.sum(axis=1), shares.sum(axis=0))).sum())
    # both raters always gave the same rating: kappa would be 0 / 0
    return None if expected < 1e-12 else 1.0 - float((weight * shares).sum()) / expected


def _disagreements(votes: dict[str, dict[int, int]], key: dict[str, Any]) -> list[dict[str, Any]]:
    """Cases on which the reviewers disagree. A verdict is the model that won, or "tie"."""
    said, rows = (key["models"][1], "tie", key["models"][0]), []
    for case in key["cases"]:
        verdicts = {name: said[own[case["case"]]] for name, own in votes.items() if case["case"] in own}
        if len(set(verdicts.values())) > 1:
            rows.append({name: case[name] for name in ("case", "puzzle", "n_cells")} | {"verdicts": verdicts})
    return rows


def _comments(reviews: list[dict[str, Any]], key: dict[str, Any]) -> list[dict[str, Any]]:
    """The comments, in case order, with the models that were left and right, because comments refer to sides."""
    found = []
    for case in key["cases"]:
        for review in reviews:
            text = review["answers"].get(str(case["case"]), {}).get("comment", "").strip()
            if text:
                found.append(
                    {
                        "case": case["case"],
                        "puzzle": case["puzzle"],
                        "left": case["left"],
                        "right": case["right"],
                        "reviewer": review["reviewer"],
                        "comment": text,
                    }
                )
    return found


def summary_markdown(summary: dict[str, Any], error_names: dict[str, str]) -> str:
    """The summary as Markdown. error_names: the key's {id of an error type: name}."""
    models, reviewers = summary["models"], summary["reviewers"]

    def share(value: dict[str, Any]) -> str:
        low, high = value["interval"]
        return f"{tenths(value['share'])} % ({tenths(low)} to {tenths(high)})"

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
        f"{'saw' if summary['show_truth'] else 'did not see'} the true cell types. In brackets: 95 % bootstrap "
        f"interval, over cases ({RESAMPLES:,} resamples). In the win rate a tie counts half.",
        *_left_out(summary["answered"]),
        _markdown_rows(("model", *columns, "win rate"), results),
        "## Errors marked",
        "Counted over cells and reviewers; an answer that cannot be read counts as one cell. "
        + (WORDING if error_names == NAMES else "The types are those of the page, which was made with other names."),
        _markdown_rows(("type", *models), errors),
        "## Reviewers",
        _markdown_rows(("reviewer", "cases judged", "left", "tie", "right"), people),
        "## Agreement",
        "Cohen's kappa of loss, tie and win over the cases both judged, unweighted (Cohen 1960, "
        "doi:10.1177/001316446002000104) and linear-weighted (Cohen 1968, doi:10.1037/h0026256).",
        _markdown_rows(("reviewer", "and", "shared cases", "same verdict", "kappa", "linear kappa"), pairs),
        "## Cases on which they disagree",
        _markdown_rows(("case", "puzzle", "cells", "better"), odd),
        "## Comments",
        _markdown_rows(("case", "sides", "reviewer", "comment"), said),
    ]
    return "\n\n".join(parts) + "\n"


def _left_out(answered: dict[str, int] | None) -> list[str]:
    """A sentence on the puzzles to which both models gave the same answer: none of them is a case."""
    if not answered or not answered["alike"]:
        return []
    both, alike = answered["both"], answered["alike"]
    return [
        f"To {alike:,} of {both:,} puzzles both models gave the same answer. None of them is among the cases, so wins and losses "
        "are shares of the puzzles on which the models differ."
    ]


def _markdown_rows(columns: tuple[str, ...], rows: list[list[Any]]) -> str:
    """A Markdown table; "None." without rows."""

    def line(cells: Any) -> str:
        return "| " + " | ".join(escape(str(cell)) for cell in cells) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)]) if rows else "None."
