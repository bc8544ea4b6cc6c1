"""Blind review: the page on which experts judge pairs of answers, and what their files say together.

The page (review.html) holds anonymous answers, left and right at random; which model gave which is only in the key. A
reviewer's file names its page by the id that the key has too. Commands: launch/review.py.
"""

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError
from data.prompts import RESPONSE_LAYOUT
from data.puzzles import Puzzle
from eval.metrics import score_one

TEMPLATE = Path(__file__).with_name("review.html")
GENES_SHOWN = 15
RESAMPLES = 10_000
KIND, KEY_KIND = "cellpuzzles blind review", "cellpuzzles blind review key"
SIDES = ("left", "right")
VERDICTS = ("left", "tie", "right")
WHOLE = "all"
"""Where an error is marked on an answer that cannot be read, instead of a cell number."""


@dataclass(frozen=True)
class ErrorType:
    """What can be wrong with the label of a cell; `key` is the letter that marks it."""

    id: str
    key: str
    name: str
    meaning: str


WORDING = "The five error types are after the Cell-o1 paper's expert review; their names and meanings are worded by us."
ERROR_TYPES = (
    ErrorType("marker_misread", "m", "Marker misread", "a gene is named, but as a sign of the wrong cell type"),
    ErrorType("marker_overlooked", "o", "Marker overlooked", "a telling gene of the cell's list is not used"),
    ErrorType(
        "context_ignored", "c", "Context ignored", "donor, tissue, disease or the other cells rule the label out"
    ),
    ErrorType("lineage_confusion", "l", "Lineage confusion", "a related type was taken: another subtype or stage"),
    ErrorType("slip", "f", "Format or assignment slip", "the reasoning has it right, but the answer line does not"),
)


@dataclass(frozen=True, kw_only=True)
class Review:
    """A page and its key, and what to tell of their making."""

    html: str
    key: dict[str, Any]
    both: int
    """Puzzles that both models answered."""
    same: int
    """Of these, left out because both answers are the same text."""
    naming: list[int]
    """Cases in which an answer contains the name of a model."""


def answers_by_id(rows: list[dict], puzzles: list[Puzzle], where: str) -> dict[str, str]:
    """{puzzle id: answer} of prediction rows; rows without an id are in puzzle order. Raises UserError naming `where`."""
    known = {puzzle.id for puzzle in puzzles}
    if len(known) < len(puzzles):
        twice = next(name for name, n in Counter(puzzle.id for puzzle in puzzles).items() if n > 1)
        raise UserError(f"--puzzles: puzzle {twice} occurs twice; answers are matched by id, so each needs its own")
    if not any("id" in row for row in rows) and len(rows) != len(puzzles):
        raise UserError(f"{where}: {len(rows)} predictions for {len(puzzles)} puzzles, and no 'id' to match them by")
    answers: dict[str, str] = {}
    for number, row in enumerate(rows):
        name = row.get("id", puzzles[number].id if number < len(puzzles) else None)
        if not isinstance(row.get("prediction"), str):
            raise UserError(f"{where}, row {number}: needs the text column 'prediction'; it has {', '.join(row)}")
        if name not in known:
            raise UserError(f"{where}, row {number}: puzzle {name} is not in the --puzzles file")
        if name in answers:
            raise UserError(f"{where}, row {number}: puzzle {name} is answered a second time; keep one answer of it")
        answers[name] = row["prediction"]
    return answers


def make_review(
    puzzles: list[Puzzle], answers: dict[str, dict[str, str]], cases: int, seed: int, show_truth: bool
) -> Review:
    """Page and key of at most `cases` puzzles. answers: {model: {puzzle id: text}} of two models.

    Order and sides come from the seed and from the answers, so that who has only the page cannot compute them.
    """
    first, second = answers
    both = [puzzle for puzzle in puzzles if puzzle.id in answers[first] and puzzle.id in answers[second]]
    differing = [p for p in both if answers[first][p.id].strip() != answers[second][p.id].strip()]
    if not differing:
        raise UserError(f"of {len(both)} puzzles answered in both --predictions files none has two different answers")
    digest = _digest([[[p.id, *(answers[model][p.id] for model in answers)] for p in both], show_truth])
    rng = random.Random(f"{seed}:blind review:{digest}")
    shown, keyed = [], []
    for number, puzzle in enumerate(stratified(differing, cases, rng), start=1):
        sides = dict(zip(SIDES, rng.sample([first, second], 2), strict=True))
        shown.append(_case(puzzle, [answers[model][puzzle.id] for model in sides.values()], show_truth))
        scores = {model: score_one(answers[model][puzzle.id], puzzle) for model in answers}
        wrong = {m: [i for i, right in enumerate(s.right, start=1) if not right] for m, s in scores.items()}
        readable = {model: score.valid for model, score in scores.items()}
        keyed.append(
            {
                "case": number,
                "puzzle": puzzle.id,
                "n_cells": len(puzzle.cells),
                **sides,
                "wrong": wrong,
                "readable": readable,
            }
        )
    key = {
        "kind": KEY_KIND,
        "models": list(answers),
        "seed": seed,
        "show_truth": show_truth,
        "answers": digest,
        "error_types": {kind.id: kind.name for kind in ERROR_TYPES},
        "cases": keyed,
    }
    key["page"] = key_id(key)
    data = {
        "kind": KIND,
        "page": key["page"],
        "show_truth": show_truth,
        "genes_shown": GENES_SHOWN,
        "whole": WHOLE,
        "error_types": [asdict(kind) for kind in ERROR_TYPES],
        "wording": WORDING,
        "cases": shown,
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    names = re.compile("|".join(rf"(?<!\w){re.escape(model)}(?!\w)" for model in answers), re.IGNORECASE)
    naming = [c["case"] for c in keyed if any(names.search(answers[model][c["puzzle"]]) for model in answers)]
    html = TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)
    return Review(html=html, key=key, both=len(both), same=len(both) - len(differing), naming=naming)


def stratified(puzzles: list[Puzzle], wanted: int, rng: random.Random) -> list[Puzzle]:
    """`wanted` puzzles (all, if there are no more) in random order; each number of cells keeps its share, to within one."""
    sizes: dict[int, list[Puzzle]] = defaultdict(list)
    for puzzle in puzzles:
        sizes[len(puzzle.cells)].append(puzzle)
    wanted = min(wanted, len(puzzles))
    shares = {n: wanted * len(group) / len(puzzles) for n, group in sorted(sizes.items())}
    take = {n: int(share) for n, share in shares.items()}
    for n in sorted(shares, key=lambda n: (take[n] - shares[n], n))[: wanted - sum(take.values())]:
        take[n] += 1
    chosen = [puzzle for n in shares for puzzle in rng.sample(sizes[n], take[n])]
    rng.shuffle(chosen)
    return chosen


def _case(puzzle: Puzzle, texts: list[str], show_truth: bool) -> dict[str, Any]:
    """What the page holds of a puzzle and its left and right answer: no id, no name, no length, no truth unless shown."""
    case: dict[str, Any] = {"context": puzzle.context, "candidates": puzzle.candidates, "cells": puzzle.cells}
    case |= {"answers": [], **({"truth": puzzle.answer} if show_truth else {})}
    for text in texts:
        score, match = score_one(text, puzzle), RESPONSE_LAYOUT.fullmatch(text)
        reasoning = match["reasoning"] if match is not None and score.valid else text
        answer = {"labels": score.labels, "reasoning": reasoning.strip(), "problem": score.problem}
        case["answers"].append(answer | ({"right": score.right} if show_truth else {}))
    return case


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def key_id(key: dict[str, Any]) -> str:
    """The page id of a key: 32 hex digits of its hash. Nothing of the key can be read from it."""
    return _digest({name: value for name, value in key.items() if name != "page"})[:32]


def read_key(path: str | Path) -> dict[str, Any]:
    """The key of a page. Raises UserError when the file is no key, or was changed."""
    key = _read_object(path)
    if key.get("kind") != KEY_KIND:
        raise UserError(f"{path}: not the key of a review page; name the .key.json that was written beside the page")
    if key.get("page") != key_id(key):
        raise UserError(f"{path}: the key was changed after its page was made; restore the file that was written then")
    return key


def read_review(path: str | Path, key: dict[str, Any]) -> dict[str, Any]:
    """A reviewer's exported file, checked against the key. Raises UserError naming the file and what is wrong with it."""
    review = _read_object(path)
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
    """What is wrong with a reviewer's entry of a case; empty when nothing is."""
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


def _read_object(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        value = json.loads(Path(path).read_bytes())
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{path}: not JSON ({error}); ask for the file again, as it was exported") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; give the file as it was exported")
    return value


def merge(reviews: list[dict[str, Any]], key: dict[str, Any]) -> dict[str, Any]:
    """The summary of reviews of one page. Raises UserError for two of one reviewer, or when no case is judged."""
    seen: dict[str, str] = {}
    for review in reviews:
        name = review["reviewer"].casefold()
        if name in seen:
            raise UserError(
                f"{review['file']}: a second review by {review['reviewer']}, after {seen[name]}; give one file per reviewer"
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
    """{case: 0 loss, 1 tie, 2 win of the first model}."""
    verdicts = {case["case"]: review["answers"].get(str(case["case"]), {}).get("verdict") for case in key["cases"]}
    worth = {c["case"]: {"tie": 1, **{side: 2 * (c[side] == key["models"][0]) for side in SIDES}} for c in key["cases"]}
    return {number: worth[number][verdict] for number, verdict in verdicts.items() if verdict is not None}


def _result(counts: np.ndarray, key: dict[str, Any]) -> dict[str, Any]:
    """Losses, ties, wins and win rate with 95 % percentile bootstrap intervals over cases. counts: [cases, 3]."""
    n = len(counts)
    rng = np.random.default_rng(int(key["page"], 16))
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
    """Marks by type on the model's answers, over all reviewers, and how many wrong cells they had before them.

    On an unreadable answer, whose cells are all wrong, the whole answer is one place.
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

    Cohen 1960 (doi:10.1177/001316446002000104); linear: disagreement weighed by distance, Cohen 1968 (doi:10.1037/h0026256).
    None where chance alone leaves nothing to disagree on: no rating, or both always said the same one thing.
    """
    if not first:
        return None
    shares = np.zeros((3, 3))
    np.add.at(shares, (first, second), 1 / len(first))
    distance = np.abs(np.subtract.outer(np.arange(3), np.arange(3)))
    weight = distance if linear else distance > 0
    expected = float((weight * np.outer(shares.sum(axis=1), shares.sum(axis=0))).sum())
    return None if expected < 1e-12 else 1.0 - float((weight * shares).sum()) / expected


def _disagreements(votes: dict[str, dict[int, int]], key: dict[str, Any]) -> list[dict[str, Any]]:
    """Cases on which the reviewers do not all say the same; a verdict is the model that won, or "tie"."""
    said, rows = (key["models"][1], "tie", key["models"][0]), []
    for case in key["cases"]:
        verdicts = {name: said[own[case["case"]]] for name, own in votes.items() if case["case"] in own}
        if len(set(verdicts.values())) > 1:
            rows.append({name: case[name] for name in ("case", "puzzle", "n_cells")} | {"verdicts": verdicts})
    return rows


def _comments(reviews: list[dict[str, Any]], key: dict[str, Any]) -> list[dict[str, Any]]:
    """The comments with a text, in case order; they speak of left and right, so those are named."""
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
