"""Find what a line of a reasoning trace names: cell types and cells, and the lists and tables that pair the two.

Used by eval/traces/reading.py; its docstring says what counts as a name.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache, partial
from typing import NamedTuple

from data.atlas.markers import read_markers
from data.puzzles import Puzzle
from reward.cellpuzzles import normalise_label

COMMON = tuple(
    " ".join(
        """
adipocyte, preadipocyte, chondrocyte, osteoblast, osteoclast, osteocyte, tenocyte, synoviocyte, myofibroblast,
mesenchymal stem cell, myoblast, myocyte, myotube, skeletal muscle satellite cell, skeletal muscle fiber, cardiac
muscle cell, telocyte, interstitial cell of Cajal, juxtaglomerular cell, hepatic stellate cell, pericardial cell,
fibrocyte, odontoblast, ameloblast, cementoblast, nucleus pulposus cell, notochordal cell, neutrophil, eosinophil,
basophil, megakaryocyte, erythrocyte, reticulocyte, proerythroblast, normoblast, promyelocyte, myelocyte, myeloblast,
lymphoblast, innate lymphoid cell, Kupffer cell, Langerhans cell, Hofbauer cell, histiocyte, thymocyte, follicular
dendritic cell, centroblast, centrocyte, myeloid-derived suppressor cell, common lymphoid progenitor, common myeloid
progenitor, megakaryocyte-erythroid progenitor cell, hemocytoblast, angioblast, hemangioblast, liver sinusoidal
endothelial cell, endocardial cell, littoral cell, foveolar cell, gastric chief cell, parietal cell, enterochromaffin
cell, enterochromaffin-like cell, colonocyte, BEST4-positive enterocyte, tuft cell, brush cell, hepatocyte,
cholangiocyte, hepatoblast, oval cell, acinar cell, ductal cell, centroacinar cell, epsilon cell, stellate cell,
ciliated cell, basal cell, hillock cell, ionocyte, pneumocyte, deuterosomal cell, serous cell, mucous neck cell,
mucous cell, pulmonary neuroendocrine cell, neuroendocrine cell, clara cell, bronchioalveolar stem cell, keratinocyte,
melanocyte, Merkel cell, sebocyte, corneocyte, trichocyte, eccrine sweat gland cell, hair follicle cell, dermal
papilla cell, outer root sheath cell, urothelial cell, umbrella cell, macula densa cell, intercalated cell, principal
cell, proximal tubule cell, luminal epithelial cell, myoepithelial cell, lactocyte, mammary basal cell, prostate basal
cell, prostate luminal cell, thyrocyte, thyroid follicular cell, parafollicular cell, parathyroid chief cell, oxyphil
cell, chromaffin cell, adrenocortical cell, zona glomerulosa cell, corticotroph, gonadotroph, lactotroph, somatotroph,
thyrotroph, melanotroph, pituicyte, pinealocyte, tanycyte, Sertoli cell, Leydig cell, peritubular myoid cell,
spermatocyte, spermatid, spermatogonium, spermatogonial stem cell, germ cell, primordial germ cell, oocyte, oogonium,
granulosa cell, theca cell, luteal cell, cumulus cell, decidual cell, trophoblast, cytotrophoblast,
syncytiotrophoblast, extravillous trophoblast, amniocyte, astrocyte, oligodendrocyte, oligodendrocyte precursor cell,
microglial cell, ependymal cell, choroid plexus cell, radial glial cell, neural stem cell, neural progenitor cell,
neural crest cell, neuroblast, glioblast, neuron, interneuron, motor neuron, sensory neuron, glutamatergic neuron,
GABAergic neuron, dopaminergic neuron, serotonergic neuron, cholinergic neuron, pyramidal neuron, Purkinje cell,
cerebellar granule cell, granule cell, medium spiny neuron, Golgi cell, basket cell, chandelier cell, Cajal-Retzius
cell, satellite glial cell, enteric glial cell, olfactory ensheathing cell, olfactory sensory neuron, sustentacular
cell, Mueller cell, rod photoreceptor cell, cone photoreceptor cell, photoreceptor cell, retinal bipolar cell, bipolar
cell, amacrine cell, horizontal cell, retinal ganglion cell, retinal pigment epithelial cell, lens fiber cell, corneal
epithelial cell, conjunctival epithelial cell, trabecular meshwork cell, hair cell, inner hair cell, outer hair cell,
Deiters cell, taste receptor cell, embryonic stem cell, blastomere, fibroadipogenic progenitor cell
""".split()
    ).split(", ")
)
"""Common cell types, most by their Cell Ontology names, that are recognised besides those of data/atlas/markers.tsv."""
_SYNONYMS = [
    [tuple(side.split()) for side in pair.split("=")]
    for pair in """
natural killer cell = nk cell; dendritic cell = dc; regulatory t cell = treg; t cell = t lymphocyte; b cell = b
lymphocyte; endothelial cell of lymphatic vessel = lymphatic endothelial cell; alveolar type 1 cell = at1; alveolar
type 2 cell = at2; endothelial cell = endothelium; type b pancreatic cell = beta cell; pancreatic a cell = alpha cell;
pancreatic d cell = delta cell; microglial cell = microglia; cardiac muscle cell = cardiomyocyte; malignant cell =
tumor cell; malignant cell = cancer cell; erythrocyte = red blood cell; oligodendrocyte precursor cell =
oligodendrocyte progenitor cell; mueller cell = muller cell; microglial cell = microglia cell; oligodendrocyte
precursor cell = opc; hematopoietic stem cell = hsc; plasmacytoid dendritic cell = pdc; club cell = clara cell;
alveolar type 1 cell = type 1 pneumocyte; alveolar type 2 cell = type 2 pneumocyte; lung neuroendocrine cell = pulmonary
neuroendocrine cell; type ec enteroendocrine cell = enterochromaffin cell; enterocyte of colon = colonocyte;
erythroblast = normoblast; plasma cell = plasma b cell; cd56 dim natural killer cell = cd56dim nk cell; cd56 bright
natural killer cell = cd56bright nk cell
""".split(";")
]
"""[[words of a label, words of a synonym of it], ...]"""
_BROAD = frozenset(
    """
cell immune myeloid lymphoid blood white red hematopoietic haematopoietic stromal mesenchymal epithelial endothelial
structural connective tissue vascular vessel muscle glial neural neuronal lymphocyte leukocyte phagocyte granulocyte
phagocytic cytotoxic effector progenitor precursor stem secretory barrier lineage innate adaptive professional antigen
presenting antibody secreting specialized specialised differentiated undifferentiated immature mature inflammatory
mononuclear parenchymal airway
""".split()
)
"""Words of classes of cell types ("an epithelial cell"). A class is coarser than a label, so it changes no label."""
_NO_TYPE = frozenset(
    """
a activated active an and any are as at be best better by certain challenging clear clearly close common complex
couple cycling dead different difficult distinct dividing doubtful dying each easy entire expressed expressing few
final first for from gene given good great group hard healthy high human i in interesting its key kind last likely
list low marker mix mixed more most multi multiple my negative neighboring new next no normal not of on one only or
other our particular plausible poor poorly positive potential primary proliferating proliferative puzzling quality
quick rare real remaining respective resting rich same second sense set similar simple single small so some specific
stage strange stressed strong subset such sure target that their these third this those to top tough tricky true type
typical unassigned uncertain unclear unique unknown unlabeled unusual very weak weird which whole with wrong your
""".split()
)
"""Words that do not belong to a name of a cell type: "a single cell", "a CD3-positive cell"."""
_pattern = partial(re.compile, flags=re.I)
FOLD = str.maketrans(
    {  # one character for one, so that positions in the folded text are positions in the response
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"),
        **dict.fromkeys('"*`\u201c\u201d\u00a0\u202f', " "),
        **dict.fromkeys("\u2192\u27f6\u21d2\u279c\u2794", ">"),
        **dict.fromkeys("\u2018\u2019", "'"),
        "\u2022": "-",
    }
)
_GREEK = {"\u03b1": "alpha", "\u03b2": "beta", "\u03b3": "gamma", "\u03b4": "delta"}
_WORD = re.compile(r"[A-Za-z0-9]+|[\u03b1-\u03b4]+|\+")
_JOIN = _pattern(r"[ \t,'()-]*(?:the[ \t]+)?")
_KIND = (
    r"((?:[a-z][\w+/-]*[ \t]+){0,3}?(?:[a-z][\w+/-]*[ \t]+cells?|[a-z]{3,}(?:cyte|blast|phage|clast|phil)s?|"
    r"[a-z]*neurons?))"
)
_UNKNOWN = _pattern(
    r"(?:(?:\b(?:is|are|as|be|becomes?)|\b(?:it|that|this)'s)[ \t]+(?:(?:now|then|actually|really|indeed|most|likely|"
    r"clearly|definitely|probably|therefore|thus)[ \t]+){0,2}an?[ \t]+"
    + _KIND
    + r"(?=\s*(?:[.,;:!?()|\]]|$|\b(?:with|based|because|"
    r"since|given|due|as|and|by|in|from|rather|instead|not|here|for|too|but|so)\b|-[ \t])))|(?:(?:[:=>]|"
    r"\bso)[ \t]+(?:an?[ \t]+)?" + _KIND + r"(?=\s*(?:[.,;!()|\]]|$)))"
)
_CELL = _pattern(
    r"\bcells[\s#]+(\d{1,3}(?:\s*(?:(?:,\s*)?and|[,&-]|to)\s*#?\d{1,3})*)\b|\bcell(?:\s+(?:no\.|"
    r"number))?[\s#_-]*(\d{1,3})\b"
)
_NUMBERED = re.compile(r"\s*(?:-\s*)?\(?(\d{1,3})\s*(?:[:=]|-*>)\s*(?=\S)")
_BARE = re.compile(r"[\s|]*(?:-\s*)?\(?(\d{1,3})[.):]?\s*[-:=>|]*\s*")
_RULE_ROW = re.compile(r"\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)+\|?\s*")
_CELL_COLUMN = _pattern(r"\W*(?:cell(?:\W*(?:no|number|id|index))?\W*|#\s*|no\.?\s*)")
_CELL_FIELD = _pattern(r"\W*(?:cell\W*)?(\d{1,3})\W*")
_NO_LABELS = r"(?!.*\b(?:candidate|possible|alternative|initial|second|marker|gene))"
_LABEL_COLUMN = [
    _pattern(_NO_LABELS + r".*(?:" + words + ")")
    for words in (r"final|assign|conclusion|verdict|decision|answer|best|predict|annotat", r"type|label|identity")
]


class Name(NamedTuple):
    """A cell type named in a line."""

    start: int
    end: int
    label: str | None
    """None for a short form that fits several candidates, or something similar to a candidate."""
    listed: bool
    """Is it a candidate? Always True for an open-ended puzzle, which has no list."""
    coarse: bool = False
    """Is it only a class of cell types?"""


Pairs = dict[int, list[tuple[int, Name]]]
"""{line: [(cell, label), ...]}"""


class Cells(NamedTuple):
    """Cells named in a line; "Cell 2 and Cell 5" is one mention of two cells."""

    start: int
    end: int
    numbers: tuple[int, ...]
    """Empty when the puzzle has no such cell."""


class Vocabulary(NamedTuple):
    """The names of the labels of a puzzle, and of other known labels."""

    table: dict[tuple[str, ...], tuple[str | None, bool]]
    """{words: (label, is it listed)}; the label is None for a short form that several candidates share."""
    longest: dict[str, int]
    """{first word: number of words of the longest name that begins with it}"""
    candidates: dict[str, frozenset[str]]
    """{candidate: its words}; empty for an open-ended puzzle."""
    spelled: dict[str, str]
    """{normalised label: its spelling in the puzzle, or else ours}"""


@lru_cache(maxsize=1)
def _markers() -> tuple[str, ...]:
    return tuple(read_markers())


def known_labels(puzzles: Iterable[Puzzle], more: Iterable[str] = ()) -> tuple[str, ...]:
    """All known labels besides COMMON, each once: of data/atlas/markers.tsv, `more`, and of the puzzles."""
    return tuple(dict.fromkeys([*_markers(), *more, *(x for p in puzzles for x in (*p.candidates, *p.answer))]))


@lru_cache(maxsize=4096)
def _words(text: str) -> list[tuple[int, int, str]]:
    """(start, end, word) of each word: lower case, singular, no "the", with "+" and Greek letters spelled out."""
    found: list[tuple[int, int, str]] = []
    for match in _WORD.finditer(text):
        word, end = match[0].lower(), match.end()
        if word[0] in _GREEK:
            found += [(match.start() if i == 0 else end, end, _GREEK[letter]) for i, letter in enumerate(word)]
        elif word != "the":
            # CD8+ is CD8-positive
            word = "positive" if word == "+" else word
            # plural to singular; words in ss, us and is ("mucous") are no plurals
            if len(word) > 2 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
                word = word[:-1]
            # type I and type II pneumocytes are written both ways
            if found and found[-1][2] == "type":
                word = {"i": "1", "ii": "2"}.get(word, word)
            found.append((match.start(), end, word))
    return found


@lru_cache(maxsize=4096)
def _spelled(label: str) -> tuple[str, ...]:
    return tuple(word for _, _, word in _words(label.translate(FOLD)))


@lru_cache(maxsize=64)
def vocabulary(candidates: tuple[str, ...], known: tuple[str, ...]) -> Vocabulary:
    """The names of the candidates (none for an open-ended puzzle), of the known labels and of the common ones."""
    listed, opened = candidates or known, not candidates
    words = {x: _spelled(x) for x in (*known, *listed)}
    of_candidate = {x: frozenset(words[x]) for x in candidates}
    owners = defaultdict(set)
    for label in listed:
        for form in _short_forms(words[label]):
            owners[form].add(label)
    short = {form: (next(iter(labels)) if len(labels) == 1 else None, True) for form, labels in owners.items()}
    # later entries win: a candidate over a short form, a short form over a known label of the same words
    table = {words[x]: (x, False) for x in known} | short | {words[x]: (x, True) for x in listed}
    for form, label in _common().items():
        table.setdefault(form, _as_candidate(form, of_candidate) or (label, opened))
    longest: dict[str, int] = {}
    for form in table:
        longest[form[0]] = max(longest.get(form[0], 0), len(form))
    spelled = {normalise_label(label): label for label in (*COMMON, *known, *candidates)}
    return Vocabulary(table, longest, of_candidate, spelled)


@lru_cache(maxsize=1)
def _common() -> dict[tuple[str, ...], str]:
    """{words: label} of the labels that are known for every puzzle, by their names and synonyms."""
    found = {_spelled(label): label for label in COMMON}
    labels = {_spelled(label): label for label in _markers()} | found
    return found | {new: labels[old] for old, new in _SYNONYMS if old in labels}


def _as_candidate(form: tuple[str, ...], candidates: dict[str, frozenset[str]]) -> tuple[str | None, bool] | None:
    """(candidate, True) for the one candidate that has all words of a name; (None, True) for several; else None."""
    having = [label for label, words in candidates.items() if words.issuperset(form)]
    return (having[0] if len(having) == 1 else None, True) if having else None


def _short_forms(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Short forms of a label: without "of ...", its first words, "positive", "alpha-beta", or the last "cell"."""
    whole = {new for old, new in _SYNONYMS if old == words and "of" in old}  # "enterocyte of colon" is cut below
    heads = {words, words[: words.index("of")] if "of" in words else words}
    heads |= {head[:-1] for head in heads if head[-1] == "human" and len(head) > 1}  # "... natural killer cell, human"
    heads |= {tuple(word for word in head if word != "positive") for head in heads}
    heads |= {tuple(word for word in head if word not in ("alpha", "beta")) for head in heads if "t" in head}
    # last words name the type ("memory T cell" -> "T cell"), but never drop the "non" of "non-classical"
    forms = {head[i:] for head in heads for i in range(len(head)) if not {"non", "negative"} & set(head[:i])}
    forms |= {form[: -len(old)] + new for old, new in _SYNONYMS for form in forms if form[-len(old) :] == old}
    forms |= whole
    forms |= {form[:-1] for form in forms if form[-1] == "cell" and len(form) > 2 and form[-2] not in ("t", "b")}
    forms |= {form[-1:] for form in forms if form[-1].endswith(("blast", "cyte", "phage"))}
    forms |= {("neuron",)} if words[-1].endswith("neuron") else set()
    forms |= {("nk",)} & {form[:-1] for form in forms if form[0] == "nk"}
    # single letters and general words would be found everywhere
    bad = {"cell", "lymphocyte", "positive", "negative", "of", "human", "and", *"acdefghijklmnopqrsuvwxyz0123456789"}
    return {form for form in forms if form[0] not in bad and "".join(form) not in ("t", "b", "type1", "type2")}


def find_names(text: str, known: Vocabulary) -> list[Name]:
    """The known labels named in a text, from left to right; at each place the longest name, none inside another."""
    words, found, place = _words(text), [], 0
    while place < len(words):
        length = 1
        for length in range(min(known.longest.get(words[place][2], 1), len(words) - place), 0, -1):
            some = words[place : place + length]
            entry = known.table.get(tuple(word for _, _, word in some))
            if entry and all(_JOIN.fullmatch(text, a[1], b[0]) for a, b in itertools.pairwise(some)):
                found.append(Name(some[0][0], some[-1][1], *entry))
                break
        place += length  # the loop ends with 1 where no name begins
    return found


def with_unknown(text: str, names: list[Name], known: Vocabulary) -> list[Name]:
    """The names of a line, with unknown names added: what follows "is a ... cell", "-> ...cyte" and the like."""
    found = []
    for match in _UNKNOWN.finditer(text):
        start, end = match.span(1 if match[1] else 2)
        words = frozenset(_spelled(text[start:end])) - {"cell"}
        # "a single cell", "a highly active cell": no type of cell
        idle = bool(words & _NO_TYPE) or any(word.endswith("ly") for word in words)
        if idle or any(name.start < end and start < name.end for name in names):
            continue
        candidate = _as_candidate(tuple(words), known.candidates)
        # a name that shares a telling word with a candidate may mean it: do not count it as outside the list
        alike = any(words & other - _BROAD for other in known.candidates.values())
        label = normalise_label(text[start:end]).removesuffix("s")
        coarse = words <= _BROAD or any(word in ("lineage", "like") or word.endswith("ing") for word in words)
        entry = candidate or (None if alike else label, not known.candidates)
        found.append(Name(start, end, *entry, coarse))
    return sorted([*names, *found])


def find_cells(text: str, n_cells: int, names: list[Name]) -> list[Cells]:
    """The cells named in a line. names: the labels of the line, whose numbers are no cells ("type 2 cell")."""
    found: list[Cells] = []
    for match in filter(None, [_NUMBERED.match(text), *_CELL.finditer(text)]):
        if any(name.start < match.end() and match.start() < name.end for name in names):
            continue
        numbers: list[int] = []
        for joint, digits in re.findall(r"(-|to)?\s*#?(\d+)", match[1] or match[2], re.I):
            numbers += range(numbers[-1] + 1, int(digits) + 1) if joint and numbers else [int(digits)]
        # a number that is no cell of the puzzle makes the mention unusable
        ours = tuple(numbers) if all(1 <= number <= n_cells for number in numbers) else ()
        joined = found and re.fullmatch(r"\s*(?:and|,\s*and|&)\s*", text[found[-1].end : match.start()], re.I)
        begin, before = (found[-1].start, found.pop().numbers) if joined else (match.start(), ())
        found.append(Cells(begin, match.end(), before + ours))
    return found


def find_pairs(lines: list[str], named: list[list[Name]], n_cells: int, candidates: list[str]) -> Pairs:
    """{line: [(cell, label), ...]} of tables, numbered lists 1 to N of bare labels, and N labels joined by "|"."""
    found = _tables(lines, named, n_cells, candidates)
    run: list[tuple[int, Name]] = []
    for number, line in enumerate(lines):
        item, names = _BARE.match(line), named[number]
        gaps = {line[a.end : b.start].strip() for a, b in itertools.pairwise(names)}
        if number not in found and len(names) == n_cells and gaps == {"|"}:
            found[number] = list(enumerate(names, start=1))
        # a bare item holds a number and a label, and no other word behind it
        bare = item and not gaps and names and names[0].start <= item.end() + 3 and not _WORD.search(line, names[0].end)
        if bare and number not in found:
            run = (run if int(item[1]) == len(run) + 1 else []) + [(number, names[0])]
            run = run if int(item[1]) == len(run) else []
        elif line.strip():
            run = []
        # N items in the order of the candidates only repeat the prompt
        if bare and len(run) == n_cells > 1 and [name.label for _, name in run] != candidates:
            found |= {place: [(cell, name)] for cell, (place, name) in enumerate(run, start=1)}
    return found


def _tables(lines: list[str], named: list[list[Name]], n_cells: int, candidates: list[str]) -> Pairs:
    """{line: [(cell, label)]} of Markdown tables whose headings show a column of cells and a column of labels."""
    found: Pairs = {}
    for number, line in enumerate(lines[1:]):
        if number in found or not _RULE_ROW.fullmatch(line):
            continue
        heads = [lines[number][a:b].strip() for a, b in _fields(lines[number])]
        of_cell = next((i for i, head in enumerate(heads) if _CELL_COLUMN.fullmatch(head)), None)
        of_label = next((i for words in _LABEL_COLUMN for i, head in enumerate(heads) if words.match(head)), None)
        if of_cell is None or of_label is None:
            continue
        rows: Pairs = {number: [], number + 1: []}
        for place, row in itertools.takewhile(lambda item: "|" in item[1], enumerate(lines[number + 2 :], number + 2)):
            fields = _fields(row)
            cell = _CELL_FIELD.fullmatch(row, *fields[of_cell]) if of_cell < len(fields) else None
            start, end = fields[of_label] if of_label < len(fields) else (0, 0)
            names = [name for name in named[place] if start <= name.start < end]
            # a field with two labels, or with a question mark, decides nothing
            sure = len(names) == 1 and names[0].label and "?" not in row[start:end]
            rows[place] = [(int(cell[1]), names[0])] if cell and sure and 1 <= int(cell[1]) <= n_cells else []
        given = [name.label for row in rows.values() for _, name in row]
        # a column "#" over the candidates in their order numbers the list, not the cells
        if "cell" in heads[of_cell].lower() or given != candidates:
            found |= rows
    return found


def _fields(row: str) -> list[tuple[int, int]]:
    """(start, end) of each field of a table row."""
    edges = [match.start() for match in re.finditer(r"\|", row)]
    edges = ([] if row.lstrip().startswith("|") else [-1]) + edges + ([] if row.rstrip().endswith("|") else [len(row)])
    return [(a + 1, b) for a, b in itertools.pairwise(edges)]
