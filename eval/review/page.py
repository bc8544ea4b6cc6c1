"""Blind review: the page on which experts compare pairs of answers, and its key.

The page (review.html) shows anonymous answers, left and right at random. Only the key says which model gave which
answer. A reviewer's exported file carries the id of its page, which is also in the key. Command: launch/review.py.
"""

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import parse_json
from data.prompts import RESPONSE_LAYOUT
from data.puzzles import Puzzle, id_text
from eval.metrics import score_one
from eval.report.html import with_policy

TEMPLATE = Path(__file__).with_name("review.html")
GENES_SHOWN = 15
"""Genes of a cell that are visible without a click."""
KIND, KEY_KIND = "cellpuzzles blind review", "cellpuzzles blind review key"
SIDES = ("left", "right")
WHOLE = "all"
"""Used instead of a cell number where an error is marked on an answer that cannot be read."""


@dataclass(frozen=True)
class ErrorType:
    """A way in which the label of a cell can be wrong. `key` is the letter that marks it on the page."""

    id: str
    key: str
    name: str
    meaning: str


WORDING = "The five error types are those of the Cell-o1 paper's human evaluation (appendix E), in its words."
ERROR_TYPES = (
    ErrorType(
        "incorrect_reasoning",
        "i",
        "Incorrect Reasoning",
        "The explanation invokes wrong markers or faulty logic.",
    ),
    ErrorType(
        "no_reasoning",
        "n",
        "No Reasoning",
        "A label is predicted with virtually no justification.",
    ),
    ErrorType(
        "plausible_but_incorrect",
        "p",
        "Plausible but Incorrect",
        "The reasoning sounds biologically sensible but ignores key evidence, resulting in an incorrect label.",
    ),
    ErrorType(
        "forced_assignment",
        "f",
        "Forced Assignment Error",
        "The reasoning is correct, but to exhaust remaining labels, the model attaches the correct label to the wrong cell.",
    ),
    ErrorType(
        "wrong_conclusion",
        "w",
        "Correct Reasoning, Wrong Conclusion",
        "The explanation cites the right evidence, yet the model outputs a contradictory label.",
    ),
)
NAMES = {kind.id: kind.name for kind in ERROR_TYPES}


@dataclass(frozen=True, kw_only=True)
class Review:
    """A page and its key, with what the user should know about them."""

    html: str
    key: dict[str, Any]
    both: int
    """Number of puzzles that both models answered."""
    same: int
    """Number of these puzzles that are left out, because both answers are the same text."""
    naming: list[int]
    """Cases in which an answer contains the name of a model."""


def answers_by_id(rows: list[dict], puzzles: list[Puzzle], where: str) -> dict[str, str]:
    """{puzzle id: answer} of prediction rows. Rows without an id are in puzzle order.

    where: begins an error message. Raises UserError when rows and puzzles do not match.
    """
    known = {puzzle.id for puzzle in puzzles}
    if len(known) < len(puzzles):
        twice = next(name for name, n in Counter(puzzle.id for puzzle in puzzles).items() if n > 1)
        raise UserError(f"--puzzles: puzzle {twice} occurs twice; answers are matched by id, so each needs its own")
    if not any("id" in row for row in rows) and len(rows) != len(puzzles):
        raise UserError(f"{where}: {len(rows)} predictions for {len(puzzles)} puzzles, and no 'id' to match them by")
    answers: dict[str, str] = {}
    for number, row in enumerate(rows):
        name = row.get("id", puzzles[number].id if number < len(puzzles) else None)
        name = name if isinstance(name, list | dict | None) else id_text(name)
        if not isinstance(row.get("prediction"), str):
            raise UserError(f"{where}, row {number}: needs the text column 'prediction'; it has {', '.join(row)}")
        if isinstance(name, list | dict) or name not in known:
            raise UserError(f"{where}, row {number}: puzzle {name} is not in the --puzzles file")
        if name in answers:
            raise UserError(f"{where}, row {number}: puzzle {name} is answered a second time; keep one answer of it")
        answers[name] = row["prediction"]
    return answers


def make_review(
    puzzles: list[Puzzle], answers: dict[str, dict[str, str]], cases: int, seed: int, show_truth: bool
) -> Review:
    """Page and key of at most `cases` puzzles. Raises UserError when no puzzle has two different answers.

    answers: {model: {puzzle id: text}} of two models. Order and sides depend on the seed and on the answers, so a
    reviewer, who has only the page, cannot compute them.
    """
    first, second = answers
    both = [puzzle for puzzle in puzzles if puzzle.id in answers[first] and puzzle.id in answers[second]]
    differing = [p for p in both if answers[first][p.id].strip() != answers[second][p.id].strip()]
    if not differing:
        raise UserError(f"of {len(both)} puzzles answered in both --predictions files none has two different answers")
    digest = _digest([[[p.id, *(answers[model][p.id] for model in answers)] for p in both], show_truth])
    # the digest of all answers is in no page, so a reviewer cannot repeat the draw
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
        "error_types": NAMES,
        "answered": {"both": len(both), "alike": len(both) - len(differing)},
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
    # "<" is escaped, so that no text of an answer can end the script element
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    names = re.compile("|".join(rf"(?<!\w){re.escape(model)}(?!\w)" for model in answers), re.IGNORECASE)
    naming = [c["case"] for c in keyed if any(names.search(answers[model][c["puzzle"]]) for model in answers)]
    html = with_policy(TEMPLATE.read_text(encoding="utf-8")).replace("{{data}}", text)
    return Review(html=html, key=key, both=len(both), same=len(both) - len(differing), naming=naming)


def stratified(puzzles: list[Puzzle], wanted: int, rng: random.Random) -> list[Puzzle]:
    """At most `wanted` puzzles in random order.

    Each number of cells keeps its share of the puzzles, to within one puzzle.
    """
    sizes: dict[int, list[Puzzle]] = defaultdict(list)
    for puzzle in puzzles:
        sizes[len(puzzle.cells)].append(puzzle)
    wanted = min(wanted, len(puzzles))
    shares = {n: wanted * len(group) / len(puzzles) for n, group in sorted(sizes.items())}
    take = {n: int(share) for n, share in shares.items()}
    # largest remainder: the sizes that lost most by rounding down get one more
    for n in sorted(shares, key=lambda n: (take[n] - shares[n], n))[: wanted - sum(take.values())]:
        take[n] += 1
    drawn = [puzzle for n in shares for puzzle in rng.sample(sizes[n], take[n])]
    rng.shuffle(drawn)
    return drawn


def _case(puzzle: Puzzle, texts: list[str], show_truth: bool) -> dict[str, Any]:
    """A puzzle with its left and right answer for the page: no id, model or length, and the truth only if shown."""
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
    """The page id of a key: 32 hex digits of its hash. The id reveals nothing about the key."""
    return _digest({name: value for name, value in key.items() if name != "page"})[:32]


def read_key(path: str | Path) -> dict[str, Any]:
    """The key of a page. Raises UserError when the file is no key, or was changed."""
    key = read_object(path)
    if key.get("kind") != KEY_KIND:
        raise UserError(f"{path}: not the key of a review page; name the .key.json that was written beside the page")
    if key.get("page") != key_id(key):
        raise UserError(f"{path}: the key was changed after its page was made; restore the file that was written then")
    return key


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object of a file. Raises UserError that names the file when it holds none."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        value = parse_json(Path(path).read_bytes())
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{path}: not JSON ({error}); ask for the file again, as it was exported") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; give the file as it was exported")
    return value
