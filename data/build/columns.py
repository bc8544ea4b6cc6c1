"""A column of an obs or var table as categories of cleaned text. C is the number of cells (or genes) in the table."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

MISSING_VALUES = frozenset(
    {
        "",
        "unknown",
        "nan",
        "none",
        "na",
        "n/a",
        "n.a.",
        "#n/a",
        "null",
        "missing",
        "unspecified",
        "?",
        "??",
        "-",
        "--",
        ".",
    }
    | {f"not {word}" for word in ("available", "applicable", "known", "specified", "provided", "reported", "recorded")}
    | {f"not {word}" for word in ("collected", "determined")}
)
"""Names of genes, in lower case, that mean "not known". Few words: UNK is a gene."""
_PLACEHOLDER = re.compile(
    r"unk|unkn|unknown( (donor|sample|patient|subject|individual|participant|batch|sex|gender|age|stage|tissue|organ"
    r"|ethnicity|race|origin))?|nan?|n a|nd|n d|none( reported| given| stated)?|null|missing|empty|blank|tbd|tba"
    r"|to be (determined|defined|announced)|undetermined|undefined|undisclosed|unspecified|unavailable|inapplicable"
    r"|withheld|declined( to (answer|state|report))?|prefer not to (answer|say|state)|no (data|info|information|value)"
    r"|not (available|applicable|known|specified|provided|reported|recorded|collected|determined|stated|given|disclosed"
    r"|defined|assessed|measured|shared)"
)
"""Values of obs columns that mean "not known", in lower case, with one blank for each run of _SIGNS."""
_SIGNS = re.compile(r"""[\s_\-\u2013\u2014./#?*<>()\[\]{}'"]+""")
_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u2060\ufeff]")
"""Characters without a width, which web pages and spreadsheets leave in texts."""
_BYTES = re.compile(r"b(['\"])(.*)\1")
"""A text that Python made of bytes: b'T cell'."""
_QUOTED = re.compile(r"(['\"])(.*)\1")
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Column:
    """A column as categories of cleaned text. An atlas repeats a few values for millions of cells."""

    codes: np.ndarray
    """[C] int32 index into names; -1 where the value is not known (is_placeholder)."""
    names: list[str]
    """The distinct values."""
    placeholders: tuple[str, ...] = ()
    """The texts that were read as "not known", for messages."""

    def __getitem__(self, cells: Any) -> "Column":
        return Column(self.codes[cells], self.names, self.placeholders)

    def texts(self, missing: str | None = None) -> list[str | None]:
        """[C] the values as text, `missing` where a value is not known."""
        lookup = np.array([*self.names, missing], dtype=object)  # code -1 takes the last entry
        return lookup[self.codes].tolist()

    def where(self, wanted: Callable[[str], bool]) -> np.ndarray:
        """[C] bool: whether the value is known and `wanted(value)` holds."""
        return np.array([*map(wanted, self.names), False], dtype=bool)[self.codes]  # code -1 takes the last entry

    def counts(self) -> dict[str, int]:
        """{value: number of cells that have it}, in the order of names; missing values are not counted."""
        n_cells = np.bincount(self.codes[self.codes >= 0], minlength=len(self.names)).tolist()
        return {name: n for name, n in zip(self.names, n_cells, strict=True) if n}


def whole_numbers(column: Column) -> Column:
    """A column of ids in which "1.0" is "1", when all ids end so: what pandas makes of numbers when one is missing.

    Another file of the same study may hold the numbers themselves.
    """
    if not column.names or not all(re.fullmatch(r"\d+\.0", name) for name in column.names):
        return column
    return Column(column.codes, [name.removesuffix(".0") for name in column.names], column.placeholders)


def constant_column(text: str, n_cells: int) -> Column:
    """A column with the same value for every cell."""
    return Column(np.zeros(n_cells, dtype=np.int32), [text])


def unwrapped(text: str) -> str:
    """The text within b'...' or quotes, which programs write around texts; any other text as it is.

    https://github.com/scverse/anndata/issues/2271, https://github.com/chanzuckerberg/cellxgene-census/issues/1434
    """
    if text[-1:] not in ("'", '"'):
        return text
    found = (_BYTES if text.startswith("b") else _QUOTED).fullmatch(text)
    return found[2].strip() if found and found[1] not in found[2] else text


def is_placeholder(text: str) -> bool:
    """Whether a value of an obs column means "not known": n.d., Not_Applicable, (unknown), ???."""
    words = _SIGNS.sub(" ", text.lower()).strip()
    return not words or _PLACEHOLDER.fullmatch(words) is not None


def is_missing_name(text: str) -> bool:
    """Whether a gene's name means "not known". pandas writes <NA>, others put quotes or brackets around the word."""
    return text.lower() in MISSING_VALUES or text.lower().strip("<>()[]{}'\"") in MISSING_VALUES


def one_line(value: Any) -> str:
    """A value of a table as one line of text, in the composed form of Unicode and without invisible characters."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    # pandas stores whole numbers as floats when a value is missing: the batch 27.0 is the batch 27
    if isinstance(value, float | np.floating) and value.is_integer():
        value = int(value)
    text = str(value)
    if not text.isascii():
        text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    return unwrapped(" ".join(text.split()))


def clean_text(value: Any, is_missing: Callable[[str], bool] = is_placeholder) -> str | None:
    """A value of an obs column as one line of text. None when it means "not known"."""
    text = one_line(value)
    return None if is_missing(text) else text


def is_number(text: str) -> bool:
    """Whether a text is a number: "0", "1.0", "-2" or "1e5"."""
    return _NUMBER.fullmatch(text) is not None
