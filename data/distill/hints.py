"""Requests that show the teacher the correct answer as a hint, and the check that a trace does not reveal the hint.

The hint is the end of the user message that the teacher sees. It is never in a stored row. A trace leaks the hint when
its reasoning
- contains a phrase of LEAKS (whole words, case ignored),
- repeats ECHO consecutive words of the hint, or
- reaches the answer without an argument: it must cite at least one gene of every cell before the place where it lists
  all labels in the order of the cells, or before its end when it never does. For a puzzle of one cell, the label may
  come first.
"""

import re

from data.prompts import RESPONSE_TAGS, answer_text, chat
from data.puzzles import Puzzle

HINT = (
    "\n\nFor this one request, work backwards from the correct answer, which is:\n{answer}\n"
    "Write the reasoning of an expert who finds it from the genes alone: argue cell by cell, citing genes of every cell, and "
    "give the whole list of cell types nowhere but in the answer tags. Do not say, imply or quote that you were shown the "
    "answer or these lines."
)
_ANSWER = r"(?:answers?|solutions?)"
_MAPPING = r"(?:answers?|solutions?|assignments?|mappings?)"
_SHOWN = r"(?:given|provided|supplied|shown|revealed|stated|told|known|disclosed|specified)"
_REQUEST = r"(?:prompt|request|message|question|instructions?|user)"
_CONCEAL = r"(?:say|reveal|disclos|divulg|mention|imply|admit|quot)\w*"
LEAKS = {
    "a hint": r"hint(?:ed)?|hint(?:s|ing)(?! (?:at|towards?)\b)",
    "being told": r"(?<!be )told(?! apart)|(?<=be )told(?! (?:apart|from)\b)|"
    r"you (?:said|gave|provided|mentioned|stated|showed|specified)",
    "a telling request": rf"{_REQUEST} (?:\w+ )?(?:reveal|disclos|dictat|giv(?:es?|en|ing) away)\w*|"
    rf"{_REQUEST},? (?:\w+ ){{0,2}}cells? \d+ (?:is|are|must|should|has to|was)|"
    rf"{_MAPPING} (?:in|from|of) the {_REQUEST}",
    "a given answer": rf"{_SHOWN} (?:(?:\w+ )?{_ANSWER}|{_MAPPING})|"
    rf"{_MAPPING} (?:(?:is|are|was|were|has been|have been) )?(?:already )?{_SHOWN}|"
    rf"final (?:list|{_MAPPING}) (?:is|are) (?:already )?fixed",
    "having the answer": rf"(?:saw|seen|that (?:I|we) (?:already )?have) (?:the|your) {_ANSWER}|"
    rf"{_ANSWER} (?:that )?(?:I|we) (?:already )?(?:have|had|saw|see)",
    "the correct answer": rf"(?:correct|right|true|actual|expected|intended|official|target) (?:\w+ )?{_MAPPING}|"
    r"(?:expected|intended|official|target|prescribed) (?:\w+ )?labels",
    "concealing it": rf"(?:I|we) (?:\w+ ){{0,3}}(?:not|never|(?:must|should)n't) (?:to )?{_CONCEAL}|"
    rf"(?:without|avoid) {_CONCEAL} (?:that|it|this|the {_ANSWER})|pretend(?:s|ed|ing)?",
    "a reference": r"ground[- ]truth|gold[- ](?:standard|labels?|answers?)|answer[- ]key|reference (?:answers?|labels?)",
    "knowing it already": rf"already know|know(?:ing)? (?:that )?the (?:\w+ )?{_ANSWER}",
    "working backwards": r"work(?:s|ed|ing)? backwards?|reverse[- ]?engineer\w*|(?:reasoning|argument)s? (?:that|which) "
    r"(?:leads?|arrives?) (?:to|at)|(?:justify|rationali[sz]e|fits?|match(?:es)?|agrees? with|"
    rf"consistent with|supports?|confirms?) (?:the|this|that|your) {_ANSWER}",
}
"""Kind of phrase that reveals a hint -> its pattern."""
MENTIONS = {
    "a vote": r"vot(?:e|es|ed|ing)|consensus|majority (?:of (?:the )?)?(?:answers?|samples?|attempts?)",
    "a rival": r"rivals?|(?:first|second|other|two|both|competing|alternative) (?:assignments?|proposals?|mappings?)|"
    r"assignments? (?:that )?(?:was|were) proposed|proposed (?:assignments?|mappings?)",
    "a tool": r"look(?:s|ed|ing)? (?:\w+ ){0,3}up|lookups?|tools?|marker table|(?:training|typical) profiles?|"
    r"(?:markers|profile)(?=\()",
}
"""Kind of phrase that shows how a workflow came to its assignment (data/distill/workflow.py) -> its pattern."""
ECHO = 6
"""This many consecutive words of the hint count as a quotation."""

_LEAKS = {name: re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE) for name, pattern in LEAKS.items()}
_MENTIONS = {name: re.compile(rf"\b(?:{pattern})(?!\w)", re.IGNORECASE) for name, pattern in MENTIONS.items()}
_GAP = r"(?:[\W\d_]|\b(?:and|then|cell|is|as|a|an|the|for|must|should|has|to|be|so|are|gets)\b)*"
"""The text that may be between two labels of a plain list of labels."""


def hinted_chat(puzzle: Puzzle) -> list[dict[str, str]]:
    """The puzzle's prompt with the hint, which contains the correct answer, at the end of the user message."""
    return chat(puzzle.system_message, puzzle.user_message + HINT.format(answer=answer_text(puzzle.answer)))


def find_leak(trace: str, puzzle: Puzzle) -> str:
    """How a trace reveals that its teacher saw the answer; "" when it does not. Example: "a hint: 'hinted'"."""
    reasoning = _reasoning(trace)
    if shown := _phrase(reasoning, _LEAKS):
        return shown
    said = _words(reasoning)
    echoes = _runs(_words(HINT)) & _runs(said)
    if echoes:
        return f"an echo of the hint: '{' '.join(min(echoes))}'"
    return _unargued(reasoning, puzzle)


def find_mention(trace: str) -> str:
    """How a trace shows that a workflow led to it; "" when it does not. Example: "a vote: 'voted'"."""
    reasoning = _reasoning(trace)
    return "a tool: '<call>'" if "<call>" in reasoning else _phrase(reasoning, _MENTIONS)


def _reasoning(trace: str) -> str:
    """What stands before the answer, without tags."""
    reasoning = trace.split("<answer>")[0]
    for tag in RESPONSE_TAGS:
        reasoning = reasoning.replace(tag, " ")
    return reasoning


def _phrase(reasoning: str, patterns: dict[str, re.Pattern]) -> str:
    """The first pattern that occurs, with what it found; "" when none does."""
    text = " ".join(reasoning.split())
    for name, pattern in patterns.items():
        if match := pattern.search(text):
            return f"{name}: '{match[0].lower()}'"
    return ""


def _unargued(reasoning: str, puzzle: Puzzle) -> str:
    """The first cell of which no gene is cited before the answer is listed, as a sentence; "" when there is none."""
    labels = [r"\s+".join(map(re.escape, label.split())) for label in puzzle.answer]
    listed = re.search(r"(?<!\w)" + _GAP.join(labels) + r"(?!\w)", reasoning, re.IGNORECASE)
    before = reasoning[: listed.start()] if listed and len(labels) > 1 else reasoning
    for number, genes in enumerate(puzzle.cells, start=1):
        if not re.search(rf"(?<![\w-])(?:{'|'.join(map(re.escape, genes))})(?!\w)", before):
            return f"no argument: no gene of cell {number} {'before the whole answer' if listed else 'is cited'}"
    return ""


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: list[str]) -> set[tuple[str, ...]]:
    """All runs of ECHO consecutive words."""
    return {tuple(words[i : i + ECHO]) for i in range(len(words) - ECHO + 1)}
