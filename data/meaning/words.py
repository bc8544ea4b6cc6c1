"""Words that obs columns hold in other spellings than CELLxGENE's: healthy donors, sexes, ages, kinds of suspension."""

import re
from collections.abc import Callable

import numpy as np

from data.build.columns import Column, is_number

NORMAL, NUCLEUS, CELL = "normal", "nucleus", "cell"
_HEALTHY = re.compile(
    r"(healthy|normal|ctrl|controls?|hc|unaffected|wild ?type|wt)"
    r"( (controls?|donors?|volunteers?|individuals?|subjects?|persons?|patients?|tissue))?|non ?diseased|disease free"
    r"|no (known |diagnosed )?(disease|diagnosis)|not diseased|pato 0000461"
)
"""Values of the column of diseases, with one blank for each run of signs, of donors without a disease."""
_SEXES = {
    **dict.fromkeys(("m", "male", "males", "man", "men", "boy"), "male"),
    **dict.fromkeys(("f", "female", "females", "woman", "women", "girl"), "female"),
}
_SUSPENSIONS = {
    **dict.fromkeys(("cell", "cells", "single cell", "single cells", "whole cell", "whole cells"), CELL),
    **dict.fromkeys(("scrna", "scrna seq", "scrnaseq", "sc"), CELL),
    **dict.fromkeys(("nucleus", "nuclei", "single nucleus", "single nuclei", "isolated nuclei", "nuclear"), NUCLEUS),
    **dict.fromkeys(("snrna", "snrna seq", "snrnaseq", "sn"), NUCLEUS),
}
YES, NO = frozenset({"true", "1", "1.0", "yes", "y", "t"}), frozenset({"false", "0", "0.0", "no", "n", "f"})
"""Values of is_primary_data, in lower case."""
OLDEST = 120


def _words(text: str) -> str:
    return re.sub(r"[\s_./:-]+", " ", text.lower()).strip()


def suspension_kind(text: str) -> str:
    """cell, nucleus, or na where a value of suspension_type says neither."""
    return _SUSPENSIONS.get(_words(text), "na")


def usual_disease(text: str) -> str:
    """A value of the column of diseases, which may be 'a || b', with "normal" for all that means a healthy donor."""
    parts = [part.strip() for part in text.split("||")]
    return " || ".join(NORMAL if _HEALTHY.fullmatch(_words(part)) else part for part in parts)


def usual_sex(text: str) -> str:
    """male or female for their usual spellings, any other value as it is."""
    return _SEXES.get(_words(text), text)


USUAL: dict[str, Callable[[str], str]] = {"disease": usual_disease, "sex": usual_sex}
"""CELLxGENE column -> the word for a value."""


def with_usual_words(name: str, column: Column) -> tuple[Column, list[str]]:
    """(a column with the usual words, a note on those that changed). name: as CELLxGENE calls the column."""
    if name not in USUAL:
        return column, []
    return _renamed(name, column, {text: USUAL[name](text) for text in column.names})


def ages_in_words(column: Column) -> tuple[Column, list[str]]:
    """(a column of development stages in which 40 is "40-year-old stage", a note), when its numbers are whole years.

    Words among them, such as adult or >89, stay as they are. Else (the column, []).
    """
    ages = [text.removesuffix(".0") for text in column.counts() if is_number(text)]
    if not ages or not all(age.isdecimal() and 1 <= int(age) <= OLDEST for age in ages):
        return column, []
    return _renamed(
        "development_stage",
        column,
        {text: f"{text.removesuffix('.0')}-year-old stage" if is_number(text) else text for text in column.names},
    )


def _renamed(name: str, column: Column, new: dict[str, str]) -> tuple[Column, list[str]]:
    """The column with other words, and a note on those that do not differ in case only."""
    if all(old == word for old, word in new.items()):
        return column, []
    names = list(dict.fromkeys(new[old] for old in column.names))
    code_of = np.array([*(names.index(new[old]) for old in column.names), -1], dtype=np.int32)
    used = column.counts()
    told = [f"{old!r} as {new[old]!r}" for old in sorted(used) if old.lower() != new[old].lower()]
    rest = f" and {len(told) - 3} more" if len(told) > 3 else ""
    notes = [f"the {name.replace('_', ' ')} is read in other words: {', '.join(told[:3])}{rest}"] if told else []
    return Column(code_of[column.codes], names, column.placeholders), notes
