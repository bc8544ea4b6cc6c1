"""Names of genes: of which kind they are, what programs add to them, and which of them are no genes."""

import re
from collections import Counter

from data.build.columns import MISSING_VALUES, is_number
from data.meaning.ensembl import known_symbols

ENSEMBL_ID = re.compile(r"ENS[A-Z]*G\d{6,}(\.\d+)?(_PAR_Y)?|FBgn\d{7}|WBGene\d{8}")
"""Ids of Ensembl, and those of FlyBase and WormBase, which Ensembl takes over."""
VERSION = re.compile(r"\.\d+(?=(_PAR_Y)?$)")
_ENSEMBL_PREFIX = re.compile(r"ENS[A-Z]*G\d{6,}(\.\d+)?[_|-](?!PAR_Y$)(?=[A-Za-z])")
_ENSEMBL_SUFFIX = re.compile(r"(?<=.)[_-]ENS[A-Z]*G\d+(\.\d+)?$")
_GENOME = re.compile(r"(GRC[a-z]\d{1,2}|hg\d\d|mm\d{1,2}|rn\d{1,2}|dm\d|danRer\d+|susScr\d+)(_+|-)(?=\w)")
"""The name of a genome before that of a gene: GRCh38_CD3D, mm10___Cd3d."""
_COPY = re.compile(r"(.+)[-.](\d{1,3})")
"""A name that scanpy (CD3D-1) or R (CD3D.1) made unique, when CD3D is a name too."""
_FLY = re.compile(r"CG\d+$|FBgn\d")
"""Names that many genes of Drosophila have."""
FLY_SHARE = 0.02
"""Share of such names in a file of Drosophila, where nan and na are genes."""
_SCAFFOLD = r"(chr[\w.]*|(GL|KI|KZ|KN|KQ|KV|ML|JH|KB|NW_|NT_)\d+(\.\d+)?)"
_NO_GENE = re.compile(
    r"(?P<spike_in>(gSpike-?in[_-]|spike[_-])?(ERCC([-_.]\d+|[ ]?\d{5})(?!\d)|SIRV[-_]?\d+)|gSpike-?in|spike-?(ins?)?[_-]?\d*$"
    r"|phiX(174)?$|lambda[_-]?phage$)"
    r"|(?P<hashtag>(((?-i:HTO)[_-]?|HTO_)\d+|HTO[_-](?=[A-Z]).+|(.*[_-])?hashtag([_ -]?\w+)?|CMO\d{3}|.+[_-]HTO)$)"
    r"|(?P<antibody_tag>.*[_.-]TotalSeq|TotalSeq|(ADT|prot|protein|Ab)[_-](?=[A-Z])|.+[_-](ADT|protein)$"
    r"|.*isotype([_ -]?(control|ctrl))?$|.*IgG\w*[_-](control|ctrl)$)"
    rf"|(?P<peak>({_SCAFFOLD}[:_-]\d+[_-]\d+|(\d{{1,2}}|[XYM]T?)[:_-]\d{{2,}}[_-]\d{{3,}})$)"
    r"|(?P<control_probe>Neg(ative)?[_-]?Control|NegPrb\d|Negative\d+$|System[_-]?Control|Blank[_-]\d|FalseCode\d"
    r"|(Unassigned|Deprecated)[_-]?Codeword|Intergenic[_-]Region|antisense_)"
    r"|(?P<CRISPR_guide>(NEG[_-]?CTRL|NON[_-]?TARGET(ING)?|SAFE[_-]?TARGET(ING)?|NO[_-]TARGET)([_-]|\d|$)"
    r"|(?-i:sg[A-Z][A-Z0-9]+)([_-]\w+)?$|(?-i:NTC)(_?\d*|[_-]\w+)$|.+[_-](sgRNA|gRNA|sg)[_-]?\d+$)"
    r"|(?P<aligner_counter>__\w+$|N_(unmapped|multimapping|noFeature|ambiguous)$|Unassigned_[A-Z]\w+$"
    r"|(no_feature|too_low_aQual|not_aligned|alignment_not_unique|unmapped)$)",
    re.IGNORECASE,
)
"""The beginning of names that are no genes; the group says what they are."""
MOST = 0.5
"""Share of the names of a file that must be of a kind, for all of them to be called so."""
KIND_SAMPLE = 2000
"""About this many names, evenly spaced, are looked at to tell their kind."""
LONGEST_SYMBOL = 25
_OTHER_NAME = re.compile(
    r"(?P<RefSeq_ids>[NX][MRP]_\d+(\.\d+)?)|(?P<numbers_of_genes>(gene|feature|var|row|probe|v|x)[_-]?\d+)",
    re.IGNORECASE,
)
"""Names that are no symbols although they are short; the group says what they are."""
_MONTH = "(jan|feb|mar|apr|may|jun|jul|aug|sept?|oct|nov|dec)"
_DATE = re.compile(
    rf"\d{{1,4}}-{_MONTH}|{_MONTH}-\d{{1,4}}|(19|20)\d\d-\d\d-\d\d( 00:00:00)?|\d\d?/\d\d?/\d{{2,4}}", re.IGNORECASE
)
"""What spreadsheets make of genes such as MARCH1, SEPT7 and DEC1: 1-Mar, Sep-07, 2023-09-02."""


def kind_of_names(names: list[str]) -> str:
    """symbols, Ensembl ids, numbers or other names, by what most of about KIND_SAMPLE names are."""
    sample = names[:: max(1, len(names) // KIND_SAMPLE)]
    if sum(ENSEMBL_ID.fullmatch(name) is not None for name in sample) > MOST * len(sample):
        return "Ensembl ids"
    if sum(map(is_number, sample)) > MOST * len(sample):
        return "numbers"
    n_symbols = sum(len(name) <= LONGEST_SYMBOL and not _OTHER_NAME.fullmatch(name) for name in sample)
    return "symbols" if n_symbols > MOST * len(sample) else "other names"


def notes_on_names(names: list[str]) -> list[str]:
    """Notes on names that are no symbols: dates of a spreadsheet, ids of RefSeq, numbers of genes."""
    notes = []
    if dates := [name for name in names if _DATE.fullmatch(name)]:
        notes.append(
            f"{len(dates)} gene names look like dates ({', '.join(dates[:3])}), which a spreadsheet makes of genes such as "
            "MARCHF1 and SEPTIN7: they are listed as they are; export the names again without the spreadsheet"
        )
    kinds = Counter(match.lastgroup for name in names if (match := _OTHER_NAME.fullmatch(name)))
    for kind, n in kinds.items():
        if kind and n > MOST * len(names):
            first = next(name for name in names if _OTHER_NAME.fullmatch(name))
            notes.append(
                f"the gene names are {kind.replace('_', ' ')} ({first}) and no symbols: they are listed as they are"
            )
    return notes


def are_genes(names: list[str]) -> bool:
    """Whether most names are Ensembl ids, or symbols of the shipped table."""
    n_known = len(known_symbols(set(names))) + sum(ENSEMBL_ID.fullmatch(name) is not None for name in names)
    return n_known > MOST * len(names)


def without_id(name: str) -> str:
    """A name without the Ensembl id that makes it unique: CD4_ENSG00000010610 is CD4."""
    return name if "ENS" not in name else _ENSEMBL_PREFIX.sub("", _ENSEMBL_SUFFIX.sub("", name))


def without_genome(names: list[str]) -> tuple[list[str], list[str]]:
    """(names without the name of a genome, notes). Cell Ranger writes it when its reference holds several genomes.

    https://github.com/10XGenomics/cellranger/issues/24
    """
    found = [_GENOME.match(name) for name in names]
    genomes = sorted({match[1] for match in found if match})
    if sum(match is not None for match in found) <= MOST * len(names):
        return names, []
    first = next(name for name, match in zip(names, found, strict=True) if match)
    note = f"the gene names begin with the name of a genome ({first}), which is left out"
    if len(genomes) > 1:
        note += f"; they are of {len(genomes)} genomes ({', '.join(genomes)}), so a cell may list genes of each"
    return [name[match.end() :] if match else name for name, match in zip(names, found, strict=True)], [note]


def nameless(names: list[str]) -> list[str | None]:
    """[G] "without a name" for names that mean "not known", such as "nan", else None; in Drosophila these are genes.

    https://github.com/scverse/scanpy/issues/1259
    """
    bad = {name for name in names if name.lower() in MISSING_VALUES and name}
    if not bad or sum(_FLY.match(name) is not None for name in names) > FLY_SHARE * len(names):
        return []
    return ["without a name" if name in bad else None for name in names]


_REAL = re.compile(r"SLA-\d+")
"""Names that look like copies and are genes: SLA-1 of the pig's MHC, beside SLA, the Src-like adaptor."""


def copies_of(names: list[str]) -> dict[str, str]:
    """{name with a number that made it unique: the name without}: CD3D-1 is CD3D when both are there.

    A name that is a symbol itself is no copy: SNORD115-1. https://github.com/scverse/scanpy/issues/1719
    """
    known = set(names)
    copies = {name: match[1] for name in known if (match := _COPY.fullmatch(name)) and match[1] in known}
    symbols = known_symbols(set(copies)) if copies else set()
    return {name: other for name, other in copies.items() if name not in symbols and not _REAL.fullmatch(name)}


def without_copies(names: list[str], is_gene: list[bool]) -> tuple[list[str], list[str]]:
    """([G] names without the numbers of `copies_of`, notes)."""
    copies = copies_of([name for name, wanted in zip(names, is_gene, strict=True) if wanted])
    if not copies:
        return names, []
    n_rows, first = sum(name in copies for name in names), min(copies)
    note = (
        f"{n_rows} gene names were made unique with a number, such as {first!r}: they are read as {copies[first]!r}, and "
        "a cell has the largest value of the rows with one name"
    )
    return [copies.get(name, name) for name in names], [note]


def note_on_shared(names: list[str]) -> list[str]:
    """A note when several rows have one name. names: of genes."""
    counts = {name: n for name, n in Counter(names).items() if n > 1}
    if not counts:
        return []
    first = min(counts)
    return [
        f"{sum(counts.values())} rows of var share {len(counts)} gene names, such as {first!r} ({counts[first]} rows): a cell "
        "has the largest value of the rows with one name"
    ]


def no_genes(names: list[str]) -> list[str | None]:
    """[G] what a name stands for that is no gene's, such as "spike-in" or "control-probe"; None for the others.

    Beside guides that target nothing, TREM2-1 is a guide, too. https://github.com/broadinstitute/CellBender/issues/62
    """
    found = [_NO_GENE.match(name) for name in names]
    kinds = [next(k for k, text in match.groupdict().items() if text) if match else None for match in found]
    guides = copies_of(names) if "CRISPR_guide" in kinds else {}
    kinds = ["CRISPR_guide" if name in guides else kind for name, kind in zip(names, kinds, strict=True)]
    return [kind and kind.replace("_", "-") for kind in kinds]
