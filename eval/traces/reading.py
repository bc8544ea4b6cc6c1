"""Read a reasoning trace: which label it gives to which cell, in what order, and where it changes its mind.

Cell-o1, arXiv:2506.02911, section 6.2 and Figure 6: self-reflection (a cell gets another label later) and curriculum
order (easy cells first). The paper does not publish how it recognised a step. These rules are ours:

Names. Labels are compared word by word, the longest first. Case, plural, hyphens, commas, quotes and Markdown do not
    matter. The "T cell" in "CD8-positive, alpha-beta T cell" is no T cell. A short form ("CD8 T cell", "NK",
    "macrophage") means the one candidate that it fits; if it fits several, it is no name. Any other type is outside the
    candidate list: a known one (data/atlas/markers.tsv, the puzzles' labels, common types in eval/traces/names.py), or
    an unknown one, recognised where a name follows "is a", "->" or "so" and ends in "cell", "-cyte", "neuron" or the
    like. A class of types ("an epithelial cell") is no label: it counts as outside the list only when the cell gets no
    label. Unknown names in other phrases are missed, so the number of types outside the list is a lower bound.
Cells. Recognised are "Cell 3", "cell #3", "Cells 2, 5 and 7-9", a line "3: ..." or "3 -> ...", a numbered list of N
    bare labels (unless it repeats the candidates in their order), a table with a column of cells, and N labels joined
    by "|". A sentence without a cell is about the cell of its line, list item or section: in running prose the cell
    named last; in a list item the item's own cell, until the item turns to another cell within a few words ("For Cell 2
    ..."). "seen in Cell 2" and "unlike Cell 2" are only references.
Claims. A label belongs to the cell before it in the sentence, or to the cell that it points at ("mast cell (Cell 1)",
    "mast cell for Cell 1"). After a word of decision (is, so, suggests, fits, ->, ...) it is a strong claim; of several
    strong claims about one cell the last one in the clause counts. A single label without such a word ("genes of type 2
    cells", "T-cell markers") is a weak claim. It counts only for a cell that has no label yet, and only if the first
    strong claim about the cell, if there is one, names the same label. No claim is a label that is tentative (could be,
    maybe, either, if, a question), joined with another by "or", "vs" or "and", negated (not, lacks, rather than,
    unlikely, ruled out), part of a rule ("B cells express"), or outside the list without "is a ...", "-> ..." or the
    like.
Steps. A claim is a step when it gives a cell its first label, or a label that differs from the one it has. Otherwise it
    is a restatement.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from data.puzzles import Puzzle
from eval.traces.names import (
    FOLD,
    Cells,
    Name,
    Vocabulary,
    find_cells,
    find_names,
    find_pairs,
    known_labels,
    vocabulary,
    with_unknown,
)
from reward.cellpuzzles import normalise_label, parse_response

_Claim = tuple[int, int, "Name", bool]  # position of the label, cell, label, is it strong
_pattern = partial(re.compile, flags=re.I)
_LEAD = re.compile(r"[\s>#-]*(?:\(?\d{1,3}[.)]\s+)?")
_HEAD_END = re.compile(r"\W{0,3}(?:[:(>=|-]|$)")
_TURN_WORDS = 4  # most words before the cell to which a list item turns, such as "Let us turn to"
_CLOSING = _pattern(
    r"\W*(?:final|putting|summar|in summary|overall|combining|therefore, the|thus, the|hence, (?:the|in)|step \d)"
)
_SENTENCE_END = _pattern(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\betc)[.!?]['\")]*\s+(?=[A-Z(\[]|cell\s+\d)|;\s+|"
    r"(?<=[\s,])(?=(?:(?:wait|on second thought|correction)\b,?|no,)\s)"
)
_IDLE = _pattern(r"\W*(?:(?:but|and|so|now|what) )?(?:if|suppose|assuming|let's say)\b|.*\?[\s)']*$")
_PREMISE = _pattern(r"\W*(?:(?:and|but) )?(?:because|since|although|while|as|given|with|even though|we need|we must)\b")
_SUBJECT = _pattern(r"\W*(?:\w+, )?the\s+")
_REFERENCE = _pattern(
    r"(?:\b(?:seen in|in contrast (?:to|with)|than|unlike|(?:compared|relative) (?:to|with)|(?<!starting )from|"
    r"(?<!look )(?<!looks )(?<!seems )like|similar to|as in|(?<=\w )as for|between|among|versus|vs\.?|(?:signature|"
    r"pattern|found|absent|missing|lower|weaker) in|except(?: for)?|besides|apart from|other than)|\(see)\s+(?:(?:that|"
    r"those) of\s+|the\s+)?$"
)
_ASIDE = _pattern(r"\b(?:which|because|since)\s+(?:in\s+)?$")
_POINTS_AT = _pattern(
    r"\W{0,3}(?:(?:is|are|as|must be|would be|most likely|best|already|now|assigned|given|matched|mapped|"
    r"goes|moves|belongs|remains|left)\s+){0,3}(?:to|for)\s+(?:the\s+)?|\s*[:=(]\s*|\s*-*>\s*"
)
_ALIKE = _pattern(r"\W*(?:[=:>]|(?:(?:both|all)\s+)?(?:are|were|must be|as|correspond to|match)\b)")
_SO_CELL = _pattern(
    r"\W{0,3}(?:so|hence|thus|therefore|(?:which )?(?:is|must be|should be|would be)(?: then| now| therefore| thus)?|"
    r"matches|fits)\s+(?:the\s+)?|[^.;]{0,40}[,(]\s*(?:i\.e\.|namely)[\s,]+|[^.;]{0,200}>\s*"
)
_CHAIN = _pattern(
    r"[\s,/()'-]*(?:and/or|and|or|vs\.?|versus|nor)?[\s,('-]*(?:(?:an?|the|one|neither|either)\s+)?[\s'(]*"
)
_EITHER = _pattern(r"/|\b(?:or|nor|vs\.?|versus)\b")
_BREAK = _pattern(
    r"[,;:()=>|]|\s-+\s|\band(?=\s+(?:is|are|it|this|so|thus|therefore|hence|fits|matches)\b)|\b(?:but|so|hence|thus|"
    r"therefore|however|instead(?! of)|making|which|while|whereas|because|since)\b"
)
_TENTATIVE = _pattern(
    r"\b(?:could|might|may|maybe|perhaps|possibl[ey]|potential(?:ly)?|either|candidates? for|whether|if|"
    r"consider\w*|options?|alternatives?|not sure|unsure|uncertain|tempting|(?:we|also|still) need|"
    r"look(?:ing)? for|expected (?:in|for|of)|"
    r"(?:also|often|sometimes|commonly) (?:seen|found|expressed|produced) (?:in|by))\b"
)
_NOT = (
    r"\b(?:not(?! only)|no(?! doubt)|nor|neither|never|without|lack(?:s|ing)?|than|instead of|unlike|unlikely|cannot|"
    r"\w+n't|rul(?:es?|ed|ing) out|exclud\w+|absence of|against|other than|opposed to|distinct from|differ\w* from|"
    r"less|except)\b"
)
_NEGATED = _pattern(_NOT + r"(?:\W+\w+){0,6}\W*$")
_DECIDES = _pattern(
    r"(?:"
    + _NOT
    + r"(?:\W+\w+){3,}|(?:\b(?:absence|lack|loss) of|\bwithout|\blacking|\b(?:ruling out|excluding))(?:\W+\w+)+|"
    r"\bno\s+(?-i:[A-Z][A-Z0-9-]+))\W+(?:makes?|means?|indicates?|suggests?|confirms?|leaves?|points?|tips?|implies|"
    r"supports?)\b"
)
_DOUBTED_AFTER = _pattern(
    r"\s+(?:identity |profile |label )?(?:(?:is|are|seems?|looks?|remains?|appears?|can be|could be|was|were|does|"
    r"do)\s*)?(?:then |also |very |thus )?(?:unlikely|less likely|not\b|n't|ruled out|excluded|cannot|can't|possible|"
    r"plausible|an? (?:candidate|option))"
)
_TO = r"(?<!due)(?<!similar)(?<!compared)(?<!close)\W+(?:in)?to\W+(?:(?:the|an?|be|being)\W+){0,2}$"
_STRONG = _pattern(
    r"(?:\b(?:is|are|as|be|been|being|was|actually|identif\w+|assign\w*|match\w*|indicat\w+|suggest\w*|consistent with|"
    r"confirm\w*|fit\w*|mak(?:es|ing)|points?|correspond\w*|so|hence|thus|therefore|annotat\w+|label\w*|call\w*|"
    r"classif\w+|designat\w*|must|maps?|becomes?|aligns?|represents?|reflects?|leav\w+|likely|definitely|supports?|"
    r"implies|looks like|(?:it|that|this)'s|mean(?:s|ing)|favou?rs?|conclud\w+|go(?:ing)? with|settl\w+ (?:on|for)|"
    r"make (?:it|this|that|cell \d+)|tips|i\.e|namely|specifically)\b|[:=>|])\W*(?:[\w/-]+\W+){0,4}$|"
    r"\b(?:re)?(?:chang|revis|switch|assign|updat|correct|amend|flip|swap|mov)(?:e|es|ed|ing)?\s+(?:it|this|that|my|"
    r"the|its|cell|from|back|label)\b(?:\W+\w+){0,12}?"
    + _TO
    + r"|\b(?:change|revise|switch|reassign|update|correct|amend)(?:s|d|ed)?"
    + _TO
    + r"|\breplac\w+(?:\W+\w+){1,12}?\W+(?:by|with)\W+(?:(?:the|an?)\W+)?$"
)
_FIRM = _pattern(
    r"(?:\b(?:is|are|as|be|to|so|hence|thus|therefore|(?:it|that|this)'s)\b|[:=>|])\W*(?:(?:an?|the|likely|clearly|"
    r"most|best|now|then|actually|really|indeed|definitely|probably|therefore|thus)\W+){0,3}$"
)
_ATTRIBUTE = _pattern(
    r"[\s-]*(?:[a-z]+ )?(?:markers?|genes?|activation|receptors?|surface|restricted|maturation|development|"
    r"transcripts?|function|specific|associated|related|like|expression|defining|typical|tryptases?|scavenger|cues|"
    r"clues|immunoglobulins?)\b"
)
_RULE = _pattern(r"\s+(?:\w+ly |often |also |still )?(?:express(?:es)?|shows?|have|has|lacks?|can|are|would|display)\b")


@dataclass(frozen=True)
class Step:
    """The assignment of a label to a cell that had no label, or another one."""

    position: int
    """Where the label begins in the response, in characters."""
    cell: int
    """Cell number, from 1, as in the prompt."""
    label: str
    """Spelled as in the puzzle. If it is no candidate: a known label, or the words of the text in lower case."""
    right: bool
    """Is it the cell's true label?"""
    reassigned: bool
    """Did the cell have another label before?"""
    taken: bool
    """Does another cell have this label at this point?"""
    listed: bool
    """Is it a candidate? Always True for an open-ended puzzle, which has no list."""


@dataclass(frozen=True)
class TraceAnalysis:
    """The analysis of one response. Cell numbers count from 1."""

    id: str
    truth: tuple[str, ...]
    """[N] true labels."""
    steps: tuple[Step, ...]
    """In reading order."""
    restated: int
    """Number of claims that repeat the label that the cell has."""
    answer: tuple[str, ...]
    """[N] labels of the final answer, spelled as in the puzzle; empty when the format is invalid."""
    outside: tuple[str, ...]
    """Labels outside the candidate list in reasoning or answer, each once; empty for an open-ended puzzle."""

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
        """(the assignment before, the new assignment) of each change of mind, in reading order."""
        earlier = [[s for s in self.steps[:i] if s.cell == step.cell] for i, step in enumerate(self.steps)]
        return [(before[-1], step) for before, step in zip(earlier, self.steps, strict=True) if before]

    @property
    def contradictions(self) -> list[int]:
        """Cells whose label in a valid answer differs from the last label in the reasoning."""
        pairs = [(cell, label, self.answer[cell - 1]) for cell, label in sorted(self.last.items()) if self.answer]
        return [cell for cell, label, given in pairs if normalise_label(label) != normalise_label(given)]

    @property
    def unassigned(self) -> list[int]:
        """Cells to which the reasoning gives no label."""
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
        """A JSON object of the fields, and of numbers that follow from them."""
        names = ("contradictions", "unassigned", "duplicated", "cells_right")
        return asdict(self) | {"reflections": len(self.reflections)} | {n: getattr(self, n) for n in names}


def analyse(response: str, puzzle: Puzzle, known: Iterable[str] = ()) -> TraceAnalysis:
    """The analysis of one response. Never raises.

    known: labels that the response may name, besides those of data/atlas/markers.tsv and of the puzzle.
    """
    start = response.find("<think>") + len("<think>") if "<think>" in response else 0
    ends = [place for place in (response.find("</think>", start), response.find("<answer>", start)) if place >= 0]
    # positions in `text` plus `start` are positions in the response, because FOLD keeps the length
    text = response[start : min(ends, default=len(response))].translate(FOLD)
    text = re.sub(r"[^\S\n]{40,}", lambda gap: "\n" * len(gap[0]), text)  # a wide gap separates like a new line
    every = known_labels([puzzle], known)
    words = vocabulary(tuple(puzzle.candidates), every)
    lines = text.split("\n")
    named = [find_names(line, words) for line in lines]
    claims = list(_claims(lines, named, len(puzzle.cells), words))
    # the first strong claim about each cell: reversed, so that the first one is written last
    firm = {cell: name.label for _, cell, name, strong in reversed(claims) if strong and not name.coarse}
    has, steps, restated = {}, [], 0
    for place, cell, name, strong in claims:
        label = str(name.label)
        if has.get(cell) == label:
            restated += 1
        # a weak claim counts only for a cell without a label, and only if no strong claim contradicts it later
        elif not name.coarse and (strong or (cell not in has and firm.get(cell, label) == label)):
            right = normalise_label(label) == normalise_label(puzzle.answer[cell - 1])
            steps.append(Step(start + place, cell, label, right, cell in has, label in has.values(), name.listed))
            has[cell] = label
    # the answer may spell a label differently: compare and report the puzzle's spelling
    answer = tuple(words.spelled.get(normalise_label(x), x) for x in parse_response(response, len(puzzle.cells)).labels)
    # a class of types that was only said on the way to a label is not counted as outside the list
    given = [name for _, cell, name, _ in claims if cell not in has or not name.coarse]
    mentioned = [name.label for name in (*itertools.chain(*named), *given) if not name.listed]
    unlisted = [label for label in answer if puzzle.candidates and label not in puzzle.candidates]
    outside: dict[str, str] = {}
    for label in (*mentioned, *unlisted):
        outside.setdefault(normalise_label(str(label)), str(label))
    return TraceAnalysis(puzzle.id, tuple(puzzle.answer), tuple(steps), restated, answer, tuple(outside.values()))


def _claims(lines: list[str], named: list[list[Name]], n_cells: int, words: Vocabulary) -> Iterator[_Claim]:
    """The claims of a trace in reading order. named: the known labels of each line."""
    # tables and lists say cell and label by their layout; they need no grammar
    pairs = find_pairs(lines, named, n_cells, list(words.candidates))
    about = _About()
    indent, at = 0, -1
    for number, line in enumerate(lines):
        at += 1 + (len(lines[number - 1]) if number else 0)
        if number in pairs:
            yield from ((at + name.start, cell, name, True) for cell, name in pairs[number] if name.label)
            continue
        if not line.strip():
            # an empty line ends a paragraph: what follows is about the heading's cell again, if there is one
            about.topic, about.hanging = about.heading, about.hanging and bool(about.heading)
            continue
        lead, depth, names = _LEAD.match(line)[0], len(line) - len(line.lstrip()), named[number]
        cells = find_cells(line, n_cells, names)
        opens = bool(cells) and cells[0].start <= len(lead)
        apart = opens or "#" in lead or re.search(r"\d", lead) or _CLOSING.match(line)
        # a line that continues an item (deeper indent, or text that belongs to it) keeps the item's cell
        if apart or not (about.hanging or depth > indent):
            about.begin(line, lead, cells, opens)
            indent = depth
        claims = _line_claims(line, with_unknown(line, names, words), cells, about, n_cells)
        # once a cell has its label, the lines below need not be about it any more
        settled = any(cell in about.topic and strong for _, cell, _, strong in claims)
        about.hanging = about.hanging or ("-" not in lead and bool(about.topic) and not settled)
        yield from ((at + place, *rest) for place, *rest in claims)


@dataclass
class _About:
    """Which cell the text is about at the current line; it changes while the lines are read."""

    topic: tuple[int, ...] = ()
    """The cell that a sentence is about when it names no cell."""
    heading: tuple[int, ...] = ()
    """The cell of the heading above; a new paragraph returns to it."""
    section: bool = False
    """Does the heading hold until the next heading ("### Cell 3"), and not only for one line ("Cell 3:")?"""
    item: bool = False
    """Is the text a list item or a section, which stays with its cell, and not running prose?"""
    hanging: bool = False
    """Do the lines below belong to this line, whatever their indent?"""

    def begin(self, line: str, lead: str, cells: list[Cells], opens: bool) -> None:
        """Take in a line that begins something new. lead: its list mark or number. opens: does it begin with a cell?"""
        section = "#" in lead
        if section or (opens and not re.search(r"\w", line[cells[0].end :])):
            self.section, self.heading = section, cells[0].numbers if len(cells) == 1 == len(cells[0].numbers) else ()
        elif not self.section or _CLOSING.match(line):
            self.section, self.heading = False, ()
        self.item = self.section or bool(lead.strip()) or (opens and bool(_HEAD_END.match(line, cells[0].end)))
        self.topic = () if opens else self.heading
        self.hanging = opens and "-" not in lead

    def read(self, line: str, start: int, subjects: list[Cells]) -> None:
        """Take in a sentence: move on to the cell that it is about. start: where it begins in its line."""
        turned_to = subjects[:1]
        if turned_to and self.item:
            # an item turns to another cell only near its beginning; later cells are mentioned in passing
            near = len(re.findall(r"[\w/-]+", line[start : turned_to[0].start])) <= _TURN_WORDS
            turned_to = turned_to if near or not self.topic else []
        elif turned_to:
            # in prose the last cell of the main clause is the one that the next sentence is about
            main = [x for x in subjects[1:] if not _ASIDE.search(line[max(start, x.start - 12) : x.start])]
            turned_to = [x for x in turned_to + main if len(x.numbers) < 2][-1:] or turned_to
        for mention in turned_to:
            self.topic = mention.numbers if len(mention.numbers) == 1 else ()


def _line_claims(line: str, names: list[Name], cells: list[Cells], about: _About, n_cells: int) -> list[_Claim]:
    """The claims of a line. `about` is updated."""
    claims: list[_Claim] = []
    for start, end in itertools.pairwise([0, *(match.end() for match in _SENTENCE_END.finditer(line)), len(line)]):
        here = [cell for cell in cells if start <= cell.start < end]
        # "seen in Cell 2" does not make Cell 2 the subject
        subjects = [cell for cell in here if not _REFERENCE.search(line[max(start, cell.start - 30) : cell.start])]
        # a question or a supposition claims nothing, but it may change the topic
        if not _IDLE.match(line[start:end]):
            topic = about.topic if n_cells > 1 else (1,)
            claims += _sentence_claims(line[:end], start, [x for x in names if start <= x.start < end], subjects, topic)
        about.read(line, start, subjects)
    return claims


def _sentence_claims(line: str, start: int, names: list[Name], subjects: list[Cells], topic: tuple) -> list[_Claim]:
    """The claims of the sentence line[start:]. topic: the cell that it is about when it names no cell."""
    chains: list[list[Name]] = []
    for name in names:
        end = chains[-1][-1].end if chains else -1
        # "NK cells or T cells" is one chain of labels; what is said of it holds for all or for none
        joined = end >= 0 and _CHAIN.fullmatch(line, end, name.start)
        chains = [*chains[:-1], [*chains[-1], name]] if joined else [*chains, [name]]
    found: dict[tuple, list[tuple[bool, Name]]] = defaultdict(list)
    for chain in chains:
        labels = [name for name in chain if name.label]
        labels = [name for name in labels if not name.coarse] or labels
        cells, mention = _owner(line, start, chain, subjects, topic)
        gaps = "".join(line[a.end : b.start] for a, b in itertools.pairwise(chain))
        # "Cells 1 and 2 are B cell and T cell, respectively": pair them in order
        if len(labels) == len(cells) > 1 and "respectively" in line[start:]:
            found |= {((cell,), name.start): [(True, name)] for cell, name in zip(cells, labels, strict=True)}
        elif len({name.label for name in labels}) == 1 and not (_EITHER.search(gaps) or _doubted(line, start, chain)):
            lead, after = line[max(start, chain[0].start - 70) : chain[0].start], chain[-1].end
            strong = mention == "points" or bool(_STRONG.search(lead) and not _ATTRIBUTE.match(line, after))
            # outside the list a name needs a clear phrase ("is a", "->"), because it is often only a comparison
            claimable = labels[0].listed or mention == "points" or _FIRM.search(lead)
            # "B cells express CD19" is a rule about B cells, not a claim about a cell
            if claimable and (strong or mention is not None or not _RULE.match(line, after)):
                found[cells, mention].append((strong, labels[0]))
    claims = []
    for (cells, _), options in found.items():
        options = [option for option in options if not option[1].coarse] or options
        strong = [name for is_strong, name in options if is_strong]
        # several weak labels for one cell leave it open; of strong ones the last is the conclusion
        if strong or len({name.label for _, name in options}) == 1:
            name = strong[-1] if strong else options[0][1]
            claims += [(name.start, cell, name, bool(strong)) for cell in cells]
    return sorted(claims)


def _owner(line: str, start: int, chain: list[Name], subjects: list[Cells], topic: tuple) -> tuple[tuple, Any]:
    """(cells that a label belongs to, which mention of them).

    The mention is its position, "points" if the label points at the cells, or None if they are the topic.
    """
    before = [cell for cell in subjects if cell.end <= chain[0].start]
    after = [cell for cell in subjects if cell.start >= chain[-1].end]
    if after:
        gap = line[chain[-1].end : after[0].start]
        # "mast cell (Cell 1)" points at the cell; in "mast cell (Cell 1 has KIT)" the bracket gives a reason
        closed = "(" not in gap or line[after[0].end : after[0].end + 1] == ")"
        if (_POINTS_AT.fullmatch(gap) and closed) or (not before and _SO_CELL.fullmatch(gap)):
            return after[0].numbers if len(after[0].numbers) == 1 or not re.search(r"\w", gap) else (), "points"
    if before:
        alike = len(before[-1].numbers) == 1 or _ALIKE.match(line, before[-1].end)
        return before[-1].numbers if alike else (), before[-1].start
    # "Since mast cells ..., Cell 2 is ...": the label before the subject belongs to no cell yet
    other = _PREMISE.match(line, start) or _SUBJECT.fullmatch(line, start, chain[0].start)
    return ((), None) if after and other else (topic, None)


def _doubted(line: str, start: int, chain: list[Name]) -> bool:
    """Is the label tentative or negated in its clause?"""
    head = line[max(start, chain[0].start - 300) : chain[0].start]
    # only the clause counts: "not a B cell, so it is a T cell" negates the first label alone
    clause = head[max((match.end() for match in _BREAK.finditer(head)), default=0) :]
    negated = _NEGATED.search(clause) and not _DECIDES.search(clause)
    return bool(negated or _TENTATIVE.search(clause) or _DOUBTED_AFTER.match(line, chain[-1].end))
