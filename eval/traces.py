"""What a reasoning trace does: which label it gives to which cell, in what order, and where it changes its mind.

Cell-o1, arXiv:2506.02911, section 6.2 and Figure 6: self-reflection (a cell gets another label later on) and curriculum order
(easy cells first). How the paper recognised a step is not published; these rules are ours:

Names. Labels are compared word by word, longest first: case, plural, hyphens, commas, quotes, markdown do not count, and the
    "T cell" in "CD8-positive, alpha-beta T cell" is no T cell. A short form ("CD8 T cell", "NK", "macrophage") is the one
    candidate it fits, or no name where it fits several. A known label that is neither is outside the candidate list.
Cells. "Cell 3", "cell #3", "Cells 2, 5 and 7-9", a line "3: ..." or "3 -> ...", a numbered list of N bare labels (unless it
    is the candidates in their order), N labels joined by "|". A sentence without a cell goes on about the one before it in
    its line, list item or section. "seen in Cell 2" and "unlike Cell 2" only refer.
Claims. A label belongs to the cell before it in the sentence, or to the one it points at ("mast cell (Cell 1)", "mast cell for
    Cell 1"). After a word of decision (is, so, suggests, fits, ->, ...) it is a strong claim; of several about one cell the
    last in the clause counts. A sole label without one ("genes of type 2 cells", "T-cell markers") is a weak claim: it
    stands only for a cell without a label of which the first strong claim, if any, says the same. Not claimed is what is
    tentative (could be, maybe, either, if, a question), joined by "or", "vs", "and", negated (not, lacks, rather than,
    unlikely, ruled out), a rule ("B cells express"), or outside the list without "is a ...", "-> ..." or the like.
Steps. A claim is a step when it gives a cell its first label, or another than it has; else it is a restatement.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

from data.markers import read_markers
from data.puzzles import Puzzle
from reward.cellpuzzles import normalise_label, parse_response

# fmt: off
_Claim = tuple[int, int, "_Name", bool]  # where the label begins, cell, label, is it strong
_markers = lru_cache(maxsize=1)(read_markers)
_FOLD = str.maketrans({  # one character for one: a place in the folded text is the same place in the response
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"), **dict.fromkeys('"*`\u201c\u201d\u00a0\u202f', " "),
    **dict.fromkeys("\u2192\u27f6\u21d2\u279c\u2794", ">"), **dict.fromkeys("\u2018\u2019", "'"), "\u2022": "-"})
_GREEK = {"\u03b1": "alpha", "\u03b2": "beta", "\u03b3": "gamma", "\u03b4": "delta"}
_SYNONYMS = [[tuple(side.split()) for side in pair.split(" = ")] for pair in (
    "natural killer cell = nk cell", "dendritic cell = dc", "regulatory t cell = treg", "t cell = t lymphocyte",
    "b cell = b lymphocyte", "endothelial cell of lymphatic vessel = lymphatic endothelial cell", "alveolar type 1 cell = at1",
    "alveolar type 2 cell = at2", "endothelial cell = endothelium", "type b pancreatic cell = beta cell",
    "pancreatic a cell = alpha cell", "pancreatic d cell = delta cell",
)]
_pattern = partial(re.compile, flags=re.I)
_WORD = re.compile(r"[A-Za-z0-9]+|[\u03b1-\u03b4]+|\+")
_JOIN = _pattern(r"[ \t,'()-]*(?:the[ \t]+)?")
_CELL = _pattern(
    r"\bcells[\s#]+(\d{1,3}(?:\s*(?:(?:,\s*)?and|[,&-]|to)\s*#?\d{1,3})*)\b|\bcell(?:\s+(?:no\.|number))?[\s#_-]*(\d{1,3})\b")
_NUMBERED = re.compile(r"\s*(?:-\s*)?\(?(\d{1,3})\s*(?:[:=]|-*>)\s*(?=\S)")
_BARE = re.compile(r"\s*(?:-\s*)?\(?(\d{1,3})[.):]?\s*[-:=>]*\s*")
_LEAD = re.compile(r"[\s>#-]*(?:\(?\d{1,3}[.)]\s+)?")
_CLOSING = _pattern(r"\W*(?:final|putting|summar|in summary|overall|combining|therefore, the|thus, the|hence, (?:the|in))")
_SENTENCE_END = _pattern(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\betc)[.!?]['\")]*\s+(?=[A-Z(\[]|cell\s+\d)|;\s+|"
                         r"(?<=[\s,])(?=(?:wait|on second thought|correction|no)\b,?\s)")
_IDLE = _pattern(r"\W*(?:(?:but|and|so|now|what) )?(?:if|suppose|assuming|let's say)\b|.*\?[\s)']*$")
_PREMISE = _pattern(r"\W*(?:(?:and|but) )?(?:because|since|although|while|as|given|with|even though|we need|we must)\b")
_REFERENCE = _pattern(r"\b(?:seen in|in contrast (?:to|with)|than|unlike|compared (?:to|with)|from|like|similar to|as (?:in|for)|"
                      r"between|among|versus|vs\.?|(?:signature|pattern|found) in|see)\s+(?:(?:that|those) of\s+|the\s+)?$")
_POINTS_AT = _pattern(r"\W{0,3}(?:(?:is|are|as|must be|would be|most likely|best|already|now|assigned|given|matched|mapped)\s+)"
                      r"{0,3}(?:to|for)\s+(?:the\s+)?|\s*[:=(]\s*|\s*-*>\s*")
_ALIKE = _pattern(r"\W*(?:[=:>]|(?:(?:both|all)\s+)?(?:are|were|must be|as|correspond to|match)\b)")
_SO_CELL = _pattern(r"\W{0,3}(?:so|hence|thus|therefore|is|must be|should be|would be|matches|fits)\s+(?:the\s+)?")
_CHAIN = _pattern(r"[\s,/()'-]*(?:and/or|and|or|vs\.?|versus|nor)?[\s,('-]*(?:(?:an?|the|one|neither|either)\s+)?[\s'(]*")
_EITHER = _pattern(r"/|\b(?:or|nor|vs\.?|versus)\b")
_BREAK = _pattern(r"[,;:()=>]|\s-+\s|\b(?:but|so|hence|thus|therefore|however|instead(?! of)|making|which|while|whereas|because|"
                  r"since)\b")
_TENTATIVE = _pattern(r"\b(?:could|might|may|maybe|perhaps|possibl[ey]|potential(?:ly)?|either|candidates? for|whether|if|"
                      r"consider\w*|options?|alternatives?|not sure|unsure|uncertain|tempting|(?:we|also|still) need|"
                      r"look(?:ing)? for|(?:also|often|sometimes|commonly) (?:seen|found|expressed|produced) (?:in|by))\b")
_NOT = (r"\b(?:not(?! only)|no(?! doubt)|nor|neither|never|without|lack(?:s|ing)?|than|instead of|unlike|unlikely|cannot|\w+n't|"
        r"rul(?:es?|ed|ing) out|exclud\w+|absence of|against|other than|opposed to|distinct from|differ\w* from|less|except)\b")
_NEGATED = _pattern(_NOT + r"(?:\W+\w+){0,6}\W*$")
_DECIDES = _pattern(_NOT + r"(?:\W+\w+){3,}\W+(?:makes?|indicates?|suggests?|confirms?|leaves?|points?|implies|supports?)\b")
_DOUBTED_AFTER = _pattern(
    r"\s+(?:identity |profile |label )?(?:(?:is|are|seems?|looks?|remains?|appears?|can be|could be|was|were|does|do)\s*)?"
    r"(?:then |also |very |thus )?(?:unlikely|less likely|not\b|n't|ruled out|excluded|cannot|can't|possible|plausible|"
    r"an? (?:candidate|option))")
_STRONG = _pattern(
    r"(?:\b(?:is|are|as|be|been|being|was|actually|identif\w+|assign\w*|match\w*|indicat\w+|suggest\w*|consistent with|"
    r"confirm\w*|fit\w*|mak(?:es|ing)|points?|correspond\w*|so|hence|thus|therefore|annotat\w+|label\w*|call\w*|classif\w+|"
    r"designat\w*|must|maps?|becomes?|aligns?|represents?|reflects?|leav\w+|likely|definitely|supports?|implies|looks like)\b|"
    r"[:=>])\W*(?:[\w/-]+\W+){0,4}$")
_FIRM = _pattern(r"(?:\b(?:is|are|as|be|to)\b|[:=>])\W*(?:(?:an?|the|likely|clearly|most|best)\W+){0,2}$")
_ATTRIBUTE = _pattern(
    r"[\s-]*(?:[a-z]+ )?(?:markers?|genes?|activation|receptors?|surface|restricted|maturation|development|transcripts?|function|"
    r"specific|associated|related|like|expression|defining|typical|tryptases?|scavenger|cues|clues|immunoglobulins?)\b")
_RULE = _pattern(r"\s+(?:\w+ly |often |also |still )?(?:express(?:es)?|shows?|have|has|lacks?|can|are|would|display)\b")
# fmt: on


@dataclass(frozen=True)
class Step:
    """One assignment of a label to a cell that had none, or had another."""

    position: int
    """Where the label begins in the response, in characters."""
    cell: int
    """Cell number, from 1, as the prompt counts."""
    label: str
    """As the puzzle writes it; a known label where it is none of the candidates."""
    right: bool
    """Is it the cell's true label?"""
    reassigned: bool
    """Had the cell another label before?"""
    taken: bool
    """Has another cell this label at this point?"""
    listed: bool
    """Is it a candidate (of an open-ended puzzle: any known label)?"""


@dataclass(frozen=True)
class TraceAnalysis:
    """One response, read. Cell numbers count from 1."""

    id: str
    truth: tuple[str, ...]
    """[N] true labels."""
    steps: tuple[Step, ...]
    """In reading order."""
    restated: int
    """Claims that only repeat what the cell has."""
    answer: tuple[str, ...]
    """[N] labels of the final answer, spelled as the puzzle does; empty when the format is invalid."""
    outside: tuple[str, ...]
    """Labels outside the candidate list that the reasoning or the answer names, each once."""

    @property
    def last(self) -> dict[int, str]:
        """{cell: label} at the end of the reasoning."""
        return {step.cell: step.label for step in self.steps}

    @property
    def first(self) -> list[Step]:
        """The first assignment of each cell, in reading order."""
        return [step for step in self.steps if not step.reassigned]

    @property
    def reflections(self) -> list[tuple[Step, Step]]:
        """(the assignment before, the reassignment) of each change of mind, in reading order."""
        earlier = [[s for s in self.steps[:i] if s.cell == step.cell] for i, step in enumerate(self.steps)]
        return [(before[-1], step) for before, step in zip(earlier, self.steps, strict=True) if before]

    @property
    def contradictions(self) -> list[int]:
        """Cells whose label in a valid answer is not the last one of the reasoning."""
        return [cell for cell, label in sorted(self.last.items()) if self.answer and self.answer[cell - 1] != label]

    @property
    def unassigned(self) -> list[int]:
        """Cells that the reasoning gives no label."""
        return [cell for cell in range(1, len(self.truth) + 1) if cell not in self.last]

    @property
    def duplicated(self) -> list[str]:
        """Labels that two or more cells have at the end of the reasoning."""
        return sorted({label for label in self.last.values() if list(self.last.values()).count(label) > 1})

    @property
    def cells_right(self) -> int:
        """Cells right in the final answer; 0 when the format is invalid."""
        return sum(normalise_label(a) == normalise_label(b) for a, b in zip(self.answer, self.truth, strict=False))

    def to_dict(self) -> dict[str, Any]:
        """A JSON object: the fields, and what follows from them."""
        names = ("contradictions", "unassigned", "duplicated", "cells_right")
        return asdict(self) | {"reflections": len(self.reflections)} | {n: getattr(self, n) for n in names}


class _Name(NamedTuple):
    start: int
    end: int
    label: str | None  # None: a short form of several candidates
    listed: bool


class _Cells(NamedTuple):
    start: int
    end: int
    numbers: tuple[int, ...]  # empty for a cell that the puzzle has not


def analyse(response: str, puzzle: Puzzle, known: Iterable[str] = ()) -> TraceAnalysis:
    """Read one response; never raises. known: labels it may name besides those of data/markers.tsv and of the puzzle."""
    start = response.find("<think>") + len("<think>") if "<think>" in response else 0
    ends = [place for place in (response.find("</think>", start), response.find("<answer>", start)) if place >= 0]
    text = response[start : min(ends, default=len(response))].translate(_FOLD)
    text = re.sub(r"[^\S\n]{40,}", lambda gap: "\n" * len(gap[0]), text)  # as good as a new line, and kept short
    every = known_labels([puzzle], known)
    listed = tuple(puzzle.candidates) or every
    table = _names(listed, every)
    claims = list(_claims(text, len(puzzle.cells), puzzle.candidates, table))
    firm = {cell: name.label for _, cell, name, strong in reversed(claims) if strong}
    has, steps, restated = {}, [], 0
    for place, cell, name, strong in claims:
        label = str(name.label)
        if has.get(cell) == label:
            restated += 1
        elif strong or (cell not in has and firm.get(cell, label) == label):
            right = normalise_label(label) == normalise_label(puzzle.answer[cell - 1])
            steps.append(Step(start + place, cell, label, right, cell in has, label in has.values(), name.listed))
            has[cell] = label
    spelled = {normalise_label(label): label for label in (*every, *listed)}
    answer = tuple(spelled.get(normalise_label(x), x) for x in parse_response(response, len(puzzle.cells)).labels)
    named = [name.label for name in _find_names(text, table) if not name.listed]
    outside = dict.fromkeys([*named, *(label for label in answer if label not in listed)])
    return TraceAnalysis(puzzle.id, tuple(puzzle.answer), tuple(steps), restated, answer, tuple(outside))


def known_labels(puzzles: Iterable[Puzzle], more: Iterable[str] = ()) -> tuple[str, ...]:
    """Every label we know a cell type by: of data/markers.tsv, of the puzzles, and `more`, each once."""
    return tuple(dict.fromkeys([*_markers(), *more, *(x for p in puzzles for x in (*p.candidates, *p.answer))]))


@lru_cache(maxsize=4096)
def _words(text: str) -> list[tuple[int, int, str]]:
    """(start, end, word) as labels are compared: lower case, singular, no "the", "+" and Greek letters spelled out."""
    found: list[tuple[int, int, str]] = []
    for match in _WORD.finditer(text):
        word, end = match[0].lower(), match.end()
        if word[0] in _GREEK:
            found += [(match.start() if i == 0 else end, end, _GREEK[letter]) for i, letter in enumerate(word)]
        elif word != "the":
            word = "positive" if word == "+" else word
            if len(word) > 2 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
                word = word[:-1]
            if found and found[-1][2] == "type":
                word = {"i": "1", "ii": "2"}.get(word, word)
            found.append((match.start(), end, word))
    return found


@lru_cache(maxsize=64)
def _names(listed: tuple[str, ...], known: tuple[str, ...]) -> dict[tuple[str, ...], tuple[str | None, bool]]:
    """{words: (label, is it listed)}; the label of a short form that several candidates share is None."""
    words = {x: tuple(word for _, _, word in _words(x.translate(_FOLD))) for x in (*known, *listed)}
    owners = defaultdict(set)
    for label in listed:
        for form in _short_forms(words[label]):
            owners[form].add(label)
    short = {form: (next(iter(labels)) if len(labels) == 1 else None, True) for form, labels in owners.items()}
    return {words[x]: (x, False) for x in known} | short | {words[x]: (x, True) for x in listed}


def _short_forms(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    """What a label is called in passing: without "of ...", first words, "positive", "alpha-beta" or its last "cell"."""
    heads = {words, words[: words.index("of")] if "of" in words else words}
    heads |= {tuple(word for word in head if word != "positive") for head in heads}
    heads |= {tuple(word for word in head if word not in ("alpha", "beta")) for head in heads if "t" in head}
    forms = {head[i:] for head in heads for i in range(len(head)) if not {"non", "negative"} & set(head[:i])}
    forms |= {form[: -len(old)] + new for old, new in _SYNONYMS for form in forms if form[-len(old) :] == old}
    forms |= {form[:-1] for form in forms if form[-1] == "cell" and len(form) > 2 and form[-2] not in ("t", "b")}
    forms |= {form[-1:] for form in forms if form[-1].endswith(("blast", "cyte", "phage"))}
    forms |= {("nk",)} & {form[:-1] for form in forms if form[0] == "nk"}
    bad = {"cell", "lymphocyte", "positive", "negative", "of", "human", "and", *"acdefghijklmnopqrsuvwxyz0123456789"}
    return {form for form in forms if form[0] not in bad and "".join(form) not in ("t", "b", "type1", "type2")}


def _find_names(text: str, table: dict) -> list[_Name]:
    """Labels named in a text, longest first from the left, none inside another."""
    words, found, place = _words(text), [], 0
    longest = max(map(len, table))
    while place < len(words):
        for length in range(min(longest, len(words) - place), 0, -1):
            some = words[place : place + length]
            entry = table.get(tuple(word for _, _, word in some))
            if entry and all(_JOIN.fullmatch(text, a[1], b[0]) for a, b in itertools.pairwise(some)):
                found.append(_Name(some[0][0], some[-1][1], *entry))
                break
        place += length  # 1 where no name begins here
    return found


def _find_cells(text: str, n_cells: int, names: list[_Name]) -> list[_Cells]:
    """Cells named in a line; "Cell 2 and Cell 5" are one mention of two."""
    found: list[_Cells] = []
    for match in filter(None, [_NUMBERED.match(text), *_CELL.finditer(text)]):
        if any(name.start < match.end() and match.start() < name.end for name in names):
            continue
        numbers: list[int] = []
        for joint, digits in re.findall(r"(-|to)?\s*#?(\d+)", match[1] or match[2], re.I):
            numbers += range(numbers[-1] + 1, int(digits) + 1) if joint and numbers else [int(digits)]
        ours = tuple(numbers) if all(1 <= number <= n_cells for number in numbers) else ()
        joined = found and re.fullmatch(r"\s*(?:and|,\s*and|&)\s*", text[found[-1].end : match.start()], re.I)
        begin, before = (found[-1].start, found.pop().numbers) if joined else (match.start(), ())
        found.append(_Cells(begin, match.end(), before + ours))
    return found


def _claims(text: str, n_cells: int, candidates: list[str], table: dict) -> Iterator[_Claim]:
    """Claims in reading order, line by line."""
    lines = text.split("\n")
    lists = _bare_lists(lines, n_cells, candidates, table)
    topic: tuple[int, ...] = ()
    alone = hanging = False  # is the topic a heading of its own; do the lines below hang on its line
    indent, at = 0, -1
    for number, line in enumerate(lines):
        at += 1 + (len(lines[number - 1]) if number else 0)
        if number in lists:
            yield from ((at + name.start, cell, name, True) for cell, name in lists[number] if name.label)
            continue
        if not line.strip():
            topic = topic if alone else ()
            continue
        lead, depth, names = _LEAD.match(line)[0], len(line) - len(line.lstrip()), _find_names(line, table)
        cells = _find_cells(line, n_cells, names)
        opens = bool(cells) and cells[0].start <= len(lead)
        apart = "#" in lead or re.search(r"\d", lead) or _CLOSING.match(line) or not (hanging or depth > indent)
        if opens or apart:
            topic, indent = (), depth
            alone = opens and not re.search(r"\w", line[cells[0].end :])
            hanging = opens and "-" not in lead
        claims, topic = _line_claims(line, names, cells, topic if n_cells > 1 else (1,))
        yield from ((at + place, *rest) for place, *rest in claims)


def _bare_lists(lines: list[str], n_cells: int, candidates: list[str], table: dict) -> dict[int, list[tuple]]:
    """{line: [(cell, label), ...]} of numbered lists 1 to N, a bare label a line, and of lines of N labels joined by "|"."""
    found: dict[int, list[tuple]] = {}
    run: list[tuple[int, _Name]] = []
    for number, line in enumerate(lines):
        item, names = _BARE.match(line), _find_names(line, table)
        gaps = {line[a.end : b.start].strip() for a, b in itertools.pairwise(names)}
        if len(names) == n_cells and gaps == {"|"}:
            found[number] = list(enumerate(names, start=1))
        bare = item and not gaps and names and names[0].start <= item.end() + 3 and not _WORD.search(line, names[0].end)
        if bare:
            run = (run if int(item[1]) == len(run) + 1 else []) + [(number, names[0])]
            run = run if int(item[1]) == len(run) else []
        elif line.strip():
            run = []
        if bare and len(run) == n_cells > 1 and [name.label for _, name in run] != candidates:
            found |= {place: [(cell, name)] for cell, (place, name) in enumerate(run, start=1)}
    return found


def _line_claims(line: str, names: list[_Name], cells: list[_Cells], topic: tuple) -> tuple[list[_Claim], tuple]:
    """(claims of a line, the cells it is about at its end)."""
    claims: list[_Claim] = []
    for start, end in itertools.pairwise([0, *(match.end() for match in _SENTENCE_END.finditer(line)), len(line)]):
        here = [cell for cell in cells if start <= cell.start < end]
        subjects = [cell for cell in here if not _REFERENCE.search(line[max(start, cell.start - 30) : cell.start])]
        if not _IDLE.match(line[start:end]):
            claims += _sentence_claims(line[:end], start, [x for x in names if start <= x.start < end], subjects, topic)
        if subjects and (not topic or not re.search(r"\w{3}", line[start : subjects[0].start])):
            topic = subjects[0].numbers if len(subjects[0].numbers) == 1 else ()
    return claims, topic


def _sentence_claims(line: str, start: int, names: list[_Name], subjects: list[_Cells], topic: tuple) -> list[_Claim]:
    """Claims of the sentence line[start:]."""
    chains: list[list[_Name]] = []
    for name in names:
        end = chains[-1][-1].end if chains else -1
        joined = end >= 0 and _CHAIN.fullmatch(line, end, name.start)
        chains = [*chains[:-1], [*chains[-1], name]] if joined else [*chains, [name]]
    found: dict[tuple, list[tuple[bool, _Name]]] = defaultdict(list)
    for chain in chains:
        labels = [name for name in chain if name.label]
        cells, mention = _owner(line, start, chain, subjects, topic)
        gaps = "".join(line[a.end : b.start] for a, b in itertools.pairwise(chain))
        if len(labels) == len(cells) > 1 and "respectively" in line[start:]:
            found |= {((cell,), name.start): [(True, name)] for cell, name in zip(cells, labels, strict=True)}
        elif len({name.label for name in labels}) == 1 and not (_EITHER.search(gaps) or _doubted(line, start, chain)):
            lead, after = line[max(start, chain[0].start - 70) : chain[0].start], chain[-1].end
            strong = mention == "points" or bool(_STRONG.search(lead) and not _ATTRIBUTE.match(line, after))
            kept = labels[0].listed or mention == "points" or _FIRM.search(lead)
            if kept and (strong or mention is not None or not _RULE.match(line, after)):
                found[cells, mention].append((strong, labels[0]))
    claims = []
    for (cells, _), options in found.items():
        strong = [name for is_strong, name in options if is_strong]
        if strong or len({name.label for _, name in options}) == 1:
            name = strong[-1] if strong else options[0][1]
            claims += [(name.start, cell, name, bool(strong)) for cell in cells]
    return sorted(claims)


def _owner(line: str, start: int, chain: list[_Name], subjects: list[_Cells], topic: tuple) -> tuple[tuple, Any]:
    """(cells that a label belongs to, by which mention of them: its place, "points" or, the topic's, None)."""
    before = [cell for cell in subjects if cell.end <= chain[0].start]
    after = [cell for cell in subjects if cell.start >= chain[-1].end]
    if after:
        gap = line[chain[-1].end : after[0].start]
        closed = "(" not in gap or line[after[0].end : after[0].end + 1] == ")"
        if (_POINTS_AT.fullmatch(gap) and closed) or (not before and _SO_CELL.fullmatch(gap)):
            return after[0].numbers if len(after[0].numbers) == 1 or not _WORD.search(gap) else (), "points"
    if before:
        alike = len(before[-1].numbers) == 1 or _ALIKE.match(line, before[-1].end)
        return before[-1].numbers if alike else (), before[-1].start
    return ((), None) if after and _PREMISE.match(line, start) else (topic, None)


def _doubted(line: str, start: int, chain: list[_Name]) -> bool:
    """Is the label tentative or negated where it stands?"""
    head = line[max(start, chain[0].start - 300) : chain[0].start]
    clause = head[max((match.end() for match in _BREAK.finditer(head)), default=0) :]
    negated = _NEGATED.search(clause) and not _DECIDES.search(clause)
    return bool(negated or _TENTATIVE.search(clause) or _DOUBTED_AFTER.match(line, chain[-1].end))
