"""Why answers score nothing: reasons for an invalid format, labels that are no candidate, labels that repeat.

Everything is counted over all answers: P puzzles with k answers each are P x k answers. The counts are plain dicts,
ready for metrics.json; the sentences and lists made from them stand on the console and in evaluation.md, and the report
page (eval/report/faults.py) shows the same.

Texts of a model are shortened and get no control characters, so that they can be printed.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from data.puzzles import Puzzle
from eval.metrics import PuzzleScore
from eval.predict import REFUSED
from reward.cellpuzzles import normalise_label

LENGTH_LIMITS = ("length", "max_tokens", "max_output_tokens", "model_length")
"""Names that servers give to the finish reason of a response that was cut, in lower case."""
CUT_REASON = "the response was cut at the length limit"
EMPTY_REASON = "the response is empty"
REFUSED_REASON = "the endpoint refused the prompt"
KEPT = 30
"""Most labels of a list in metrics.json; the counts beside the list are of all labels."""
SHOWN = 5
"""Most reasons, or labels, of a list on the console and on the pages."""
NAMED = 3
"""Most reasons in a sentence."""
WRITE_ALONE = "write the label alone"
LONGER = "allow longer responses (--max-response-tokens)"
_TAG = re.compile(r"<(\w+)>\.\.\.</\1>|</?\w+>")
_NUMBERED = re.compile(r"(cell\s*#?\s*\d+\s*[:.)=-]|\d+\s*[:.)])")
"""The beginning of a normalised label with the number of its cell: "cell 1: ...", "1) ..."."""


@dataclass(frozen=True, kw_only=True)
class ScoredAnswer:
    """One answer to one puzzle, with its score."""

    puzzle: Puzzle
    text: str
    """The whole response, reasoning included."""
    finish_reason: object
    """What the model's server says about the end of the response; None when unknown."""
    score: PuzzleScore


def scored_answers(
    rows: Sequence[dict],
    puzzles: Sequence[Puzzle],
    texts: Sequence[Sequence[str]],
    samples: Sequence[Sequence[PuzzleScore]],
) -> list[ScoredAnswer]:
    """[P * k] all answers in the order of the puzzles. rows: [P] matched rows. texts, samples: [P][k], of scores_of."""
    return [
        ScoredAnswer(puzzle=puzzle, text=text, finish_reason=finish_reason, score=score)
        for row, puzzle, of_row, scores in zip(rows, puzzles, texts, samples, strict=True)
        for text, finish_reason, score in zip(of_row, finish_reasons(row, len(of_row)), scores, strict=True)
    ]


def finish_reasons(row: dict, k: int) -> list[object]:
    """[k] the finish reasons of a row's answers; None where the row states none."""
    stated = row.get("samples_finish_reasons")
    if isinstance(stated, list) and len(stated) == k:
        return stated
    return [row.get("finish_reason"), *[None] * (k - 1)]  # `prediction` is the first sample


def faults_of(answers: Sequence[ScoredAnswer]) -> dict[str, Any]:
    """{invalid_reasons, label_problems} of all answers, as metrics.json holds them.

    invalid_reasons: [{reason, count, example_id, example, remedy}], the commonest first; counts sum to the number of
        invalid answers. Problems that differ only in numbers are one reason, but a tag that is missing and a tag that
        is repeated are two, and so are problems with two remedies. example: the first characters of the response to example_id.
    label_problems: counts over the labels of valid answers.
        answers, valid_answers, labels: the denominators.
        not_candidate: labels that are no candidate of their puzzle; None for open-ended puzzles, which have none.
        contain_candidate: those among them that contain a candidate, so that only its surroundings are wrong.
        not_candidate_labels: [{label, count, example_id, candidate}], the commonest first, at most 30; candidate: the
            longest candidate in the label, or None. different_not_candidate: the number of different labels.
        numbered, numbered_labels: the same for wrong labels of open-ended puzzles that begin with the number of a cell.
        repeated: labels that occur again in the same answer, more often than the candidates list them.
        repeated_in_answers: the number of answers with such labels. repeated_labels: as above, without a candidate.
    """
    valid = [answer for answer in answers if answer.score.valid]
    strange, numbered, repeated = ([row for one in valid for row in of(one)] for of in (_strange, _numbered, _repeated))
    with_candidates = any(answer.puzzle.candidates for answer in answers)
    problems: dict[str, Any] = {
        "answers": len(answers),
        "valid_answers": len(valid),
        "labels": sum(len(answer.score.labels) for answer in valid),
        "not_candidate": len(strange) if with_candidates else None,
        "contain_candidate": sum(candidate is not None for _, _, candidate in strange),
        "different_not_candidate": len({normalise_label(label) for label, _, _ in strange}),
        "not_candidate_labels": _commonest(strange),
        "numbered": len(numbered),
        "numbered_labels": _commonest(numbered),
        "repeated": len(repeated),
        "repeated_in_answers": sum(bool(_repeated(answer)) for answer in valid),
        "repeated_labels": _commonest(repeated),
    }
    return {"invalid_reasons": invalid_reasons(answers), "label_problems": problems}


# ---- reasons for an invalid format


def invalid_reasons(answers: Iterable[ScoredAnswer]) -> list[dict[str, Any]]:
    """[{reason, count, example_id, example, remedy}] of the invalid answers, see `faults_of`."""
    # by remedy, too: a reason with two causes would show the remedy of the one beside an example of the other
    groups: dict[tuple[str, str], list[ScoredAnswer]] = {}
    for answer in answers:
        if not answer.score.valid:
            # "0 times" gets a kind of its own: a missing tag has another remedy than a repeated tag
            kind = re.sub(r"\d+", "#", _problem(answer).replace(" occurs 0 times", " occurs no times"))
            groups.setdefault((kind, _remedy(answer)), []).append(answer)
    found = []
    for (_, remedy), group in sorted(groups.items(), key=lambda item: -len(item[1])):  # stable: else the first one seen
        found.append(
            {
                "reason": _merged([_problem(answer) for answer in group]),
                "count": len(group),
                "example_id": str(group[0].puzzle.id),
                "example": shortened(group[0].text),
                "remedy": remedy,
            }
        )
    return found


def _problem(answer: ScoredAnswer) -> str:
    """Why an invalid answer is invalid. How the response ended says more than the tags that it lacks."""
    if answer.finish_reason == REFUSED:
        return REFUSED_REASON
    if str(answer.finish_reason).lower() in LENGTH_LIMITS:
        return CUT_REASON
    if not answer.text.strip():
        return EMPTY_REASON
    if block := _unfinished(answer.text):
        return f"the response ends within its `<{block}>` block"
    return _TAG.sub(r"`\g<0>`", answer.score.problem)


def _unfinished(text: str) -> str:
    """The block in which a response ends, as one that was cut: its last tag opens it. "" when it ends otherwise."""
    tags = re.findall(r"</?(?:think|answer)>", text)
    last = tags[-1].strip("<>") if tags else ""
    return last if last in ("think", "answer") and f"</{last}>" not in tags else ""


def _merged(problems: Sequence[str]) -> str:
    """One text for problems that differ only in numbers: 'occurs 2 or 3 times', 'has 1 to 9 labels'."""
    numbers = [re.findall(r"\d+", problem) for problem in problems]
    slots = [sorted(set(map(int, slot))) for slot in zip(*numbers, strict=True)]
    words = iter(_listed(slot) for slot in slots)
    return re.sub(r"\d+", lambda _: next(words), problems[0])


def _listed(numbers: Sequence[int]) -> str:
    """[2] -> "2", [2, 3, 5] -> "2, 3 or 5", more -> "2 to 9"."""
    if len(numbers) > 3:
        return f"{numbers[0]} to {numbers[-1]}"
    return " or ".join(part for part in (", ".join(map(str, numbers[:-1])), str(numbers[-1])) if part)


def _remedy(answer: ScoredAnswer) -> str:
    """What makes an invalid answer valid."""
    text, problem = answer.text, _problem(answer)
    if problem == REFUSED_REASON:
        return "ask another endpoint: this one does not accept these prompts"
    if problem == CUT_REASON:
        return LONGER
    if problem == EMPTY_REASON:
        return "the response is empty: look at what the server sends, or the file holds"
    if _unfinished(text) and text.lstrip().startswith("<think>"):
        return f"the last block has no end: if the responses were cut, {LONGER}"
    if "<think>" not in text:
        if "</think>" in text:
            return "put the opening `<think>` back in front of each response: the chat template or the server leaves it out"
        return (
            "each response must be `<think>reasoning</think><answer>label | label</answer>`: put these tags around what "
            "you have (the reasoning may be empty), or train the model on the format with launch/sft.py"
        )
    if "</think>" not in text:
        return "end the reasoning with `</think>` in front of `<answer>`"
    if "<answer>" in text and "</answer>" not in text:
        return "end the labels with `</answer>`"
    if "<answer>" not in text:
        return "put the labels into one `<answer>...</answer>` block after the reasoning"
    if " occurs " in problem:
        return "write each of the four tags once: a tag that the reasoning quotes counts too"
    if problem.startswith("the text "):
        return "write nothing before, between or after the two blocks"
    if len(answer.puzzle.cells) == 1:
        return "write exactly one label, that of the cell"
    if _separators(text) >= len(answer.puzzle.cells) - 1 and " | " not in text:
        return "write ` | ` between two labels, not a comma, a semicolon or a new line"
    return "write one label per cell, in the order of the cells, with ` | ` between two labels"


def _separators(text: str) -> int:
    """The number of commas, semicolons or new lines within the answer, whichever is largest."""
    inside = text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    return max(inside.count(sign) for sign in (",", ";", "\n"))


# ---- labels

Found = tuple[str, str, str | None]
"""(label as written, id of its puzzle, candidate that it contains)"""


def _strange(answer: ScoredAnswer) -> list[Found]:
    """The labels of a valid answer that are no candidate of the puzzle."""
    candidates = answer.puzzle.candidates
    known = {normalise_label(candidate) for candidate in candidates}
    return [
        (label, answer.puzzle.id, contained_candidate(label, candidates))
        for label, right in zip(answer.score.labels, answer.score.right, strict=True)
        if candidates and not right and normalise_label(label) not in known
    ]


def contained_candidate(label: str, candidates: Sequence[str]) -> str | None:
    """The longest candidate that a label contains as whole words, also in the plural; None when it contains none.

    A hyphen belongs to a word: "non-classical monocyte" does not contain "classical monocyte".

    >>> contained_candidate("Cell 1: T cells", ["B cell", "T cell"])
    'T cell'
    """
    text = normalise_label(label)
    found = [one for one in candidates if re.search(rf"(?<![\w-]){re.escape(normalise_label(one))}s?(?![\w-])", text)]
    return max(found, key=len, default=None)


def _numbered(answer: ScoredAnswer) -> list[Found]:
    """The labels of a valid answer to an open-ended puzzle that begin with the number of their cell."""
    if answer.puzzle.candidates:
        return []
    pairs = zip(answer.score.labels, answer.score.right, strict=True)
    return [
        (label, answer.puzzle.id, None)
        for label, right in pairs
        if not right and _NUMBERED.match(normalise_label(label))
    ]


def _repeated(answer: ScoredAnswer) -> list[Found]:
    """The labels of a valid answer beyond the first of each, or beyond as many as the candidates list."""
    listed = Counter(normalise_label(candidate) for candidate in answer.puzzle.candidates)
    seen: Counter = Counter()
    found: list[Found] = []
    for label in answer.score.labels:
        key = normalise_label(label)
        seen[key] += 1
        if seen[key] > max(1, listed[key]):
            found.append((label, answer.puzzle.id, None))
    return found


def _commonest(found: Sequence[Found]) -> list[dict[str, Any]]:
    """[{label, count, example_id, candidate}] of at most KEPT labels, the commonest first.

    Labels are compared as in the reward, and spelled as first written.
    """
    groups: dict[str, list[Found]] = {}
    for one in found:
        groups.setdefault(normalise_label(one[0]), []).append(one)
    rows = []
    for group in sorted(groups.values(), key=len, reverse=True)[:KEPT]:
        label, example_id, _ = group[0]
        candidates = Counter(candidate for *_, candidate in group if candidate is not None)
        candidate = shortened(candidates.most_common(1)[0][0]) if candidates else None
        rows.append(
            {"label": shortened(label), "count": len(group), "example_id": str(example_id), "candidate": candidate}
        )
    return rows


# ---- sentences and lists


def shortened(text: str, longest: int = 80) -> str:
    """The first characters of a text on one line, without control characters.

    >>> shortened("T cell\\n\\x1b[31m| B cell", longest=12)
    'T cell ?[31m...'
    """
    begin = " ".join(text[: 4 * longest].split())
    whole = len(begin) <= longest and len(text) <= 4 * longest
    printable = "".join(char if char.isprintable() else "?" for char in begin[:longest])
    return printable if whole else f"{printable}..."


def invalid_sentence(faults: dict[str, Any]) -> str:
    """How many answers are invalid, and why; "" when all are valid or nothing was counted. faults: of `faults_of`."""
    reasons = faults.get("invalid_reasons")
    if not reasons:
        return ""
    n, total = sum(one["count"] for one in reasons), faults["label_problems"]["answers"]
    parts = [one["reason"] + (f" ({one['count']:,})" if len(reasons) > 1 else "") for one in reasons[:NAMED]]
    rest = sum(one["count"] for one in reasons[NAMED:])
    parts += [f"other reasons ({rest:,})"] if rest else []
    nouns = f"{n:,} of {total:,} {'answer' if total == 1 else 'answers'} {'has' if n == 1 else 'have'}"
    return f"{nouns} an invalid format: {'; '.join(parts)}"


@dataclass(frozen=True, kw_only=True)
class LabelList:
    """One kind of wrong label: how many there are, and the commonest."""

    sentence: str
    """How many labels."""
    rows: list[dict[str, Any]]
    """[{label, count, example_id, candidate}], the commonest first; at most KEPT."""
    hint: str
    """The remedy for every label of the list; "" where there is no common one."""


def label_lists(faults: dict[str, Any]) -> list[LabelList]:
    """The lists of labels that are no candidate, that are numbered, and that repeat; only those that are not empty."""
    found = faults.get("label_problems")
    if not found:
        return []
    lists, of = [], f"of {_labels(found['labels'])}"
    if found["not_candidate"]:
        n, within = found["not_candidate"], found["contain_candidate"]
        contain = (
            f"; {within:,} of them {'contains' if within == 1 else 'contain'} one: {WRITE_ALONE}" if within else ""
        )
        sentence = f"labels that are no candidate: {n:,} {of}{contain}"
        lists.append(LabelList(sentence=sentence, rows=found["not_candidate_labels"], hint=""))
    if found["numbered"]:
        sentence = f"labels that begin with the number of their cell: {found['numbered']:,} {of}"
        lists.append(LabelList(sentence=sentence, rows=found["numbered_labels"], hint=WRITE_ALONE))
    if found["repeated"]:
        within = f"in {found['repeated_in_answers']:,} of {found['valid_answers']:,} valid answers"
        sentence = f"labels that repeat another label of their answer: {found['repeated']:,} {of}, {within}"
        lists.append(LabelList(sentence=sentence, rows=found["repeated_labels"], hint=""))
    return lists


def _labels(n: int) -> str:
    return f"{n:,} label" + ("" if n == 1 else "s")


def hint_of(row: dict[str, Any], hint: str = "") -> str:
    """The hint beside a label of a `LabelList`; "" where there is none."""
    return hint if row["candidate"] is None else f"{contains(row)}: {WRITE_ALONE}"


def contains(row: dict[str, Any]) -> str:
    """'contains the candidate "T cell"' for a label that contains one, else ""."""
    return "" if row["candidate"] is None else f'contains the candidate "{row["candidate"]}"'


def sentences(faults: dict[str, Any]) -> list[str]:
    """The sentences of an evaluation; [] when nothing is wrong with any answer."""
    return [*filter(None, [invalid_sentence(faults)]), *(one.sentence for one in label_lists(faults))]


def console_lines(faults: dict[str, Any]) -> list[str]:
    """The sentences; below each its reasons or labels with counts, the commonest first, an example and the remedy."""
    lines = []
    if said := invalid_sentence(faults):
        lines.append(said)
        for one in faults["invalid_reasons"][:SHOWN]:
            lines.append(f'{one["count"]:8,}  {one["reason"]}; {one["example_id"]} begins "{one["example"]}"')
            lines.append(f"{'':10}{one['remedy']}")
    for of_labels in label_lists(faults):
        lines.append(of_labels.sentence)
        for row in of_labels.rows[:SHOWN]:
            hint = hint_of(row, of_labels.hint)
            where = f'"{row["label"]}", for example in {row["example_id"]}'
            lines.append(f"{row['count']:8,}  {where}{'; it ' if row['candidate'] else '; ' if hint else ''}{hint}")
    return lines


def verdict(faults: dict[str, Any]) -> str:
    """Why every accuracy is 0, and the remedy, when no answer is valid or no label is a candidate; "" otherwise."""
    found = faults.get("label_problems")
    if not found:
        return ""
    reasons = faults["invalid_reasons"]
    if reasons and not found["valid_answers"]:
        n, first = found["answers"], reasons[0]
        all_of = "the only answer has" if n == 1 else f"all {n:,} answers have"
        often = "" if len(reasons) == 1 else f" ({first['count']:,} of {n:,})"
        return (
            f"{all_of} an invalid format, so every accuracy is 0: {first['reason']}{often}. Remedy: {first['remedy']}"
        )
    if found["not_candidate"] and found["not_candidate"] == found["labels"]:
        row = found["not_candidate_labels"][0]
        remedy = WRITE_ALONE if found["contain_candidate"] else "write the labels as the puzzle lists them"
        inside = f", which {contains(row)}" if contains(row) else ""
        return (
            f"none of {_labels(found['labels'])} is a candidate, so every accuracy is 0: the commonest is "
            f'"{row["label"]}"{inside}. Remedy: {remedy}'
        )
    return ""


def markdown(faults: dict[str, Any]) -> str:
    """A section of evaluation.md with the sentences and lists; "" when nothing is wrong with any answer."""
    blocks = []
    if said := invalid_sentence(faults):
        reasons = [
            f"- {one['count']:,}: {one['reason']}. For example {code(one['example_id'])}, which begins "
            f"{code(one['example'])}. Remedy: {one['remedy']}."
            for one in faults["invalid_reasons"][:SHOWN]
        ]
        blocks.append(f"{said}.\n\n" + "\n".join(reasons))
    for of_labels in label_lists(faults):
        rows = []
        for row in of_labels.rows[:SHOWN]:
            inside = f", which contains the candidate {code(row['candidate'])}" if row["candidate"] else ""
            hint = WRITE_ALONE if row["candidate"] else of_labels.hint
            said = f"{code(row['label'])}, for example in {code(row['example_id'])}{inside}"
            rows.append(f"- {row['count']:,}: {said}{': ' + hint if hint else ''}.")
        blocks.append(f"{of_labels.sentence[0].upper()}{of_labels.sentence[1:]}.\n\n" + "\n".join(rows))
    return "## What is wrong with the answers\n\n" + "\n\n".join(blocks) if blocks else ""


def code(text: str) -> str:
    """A text of a model or a file as a code span of Markdown, in which nothing else is read as Markdown or HTML."""
    inside = shortened(text).replace("`", "'")
    return f"`{inside}`" if inside else "(nothing)"
