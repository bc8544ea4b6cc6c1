"""The context of a puzzle: sentences about the donor, worded like the published CellPuzzles rows.

Source of the wording: Cell-o1 (arXiv:2506.02911), Table 9, and the published dataset. Two tables, INTRO and RULES, say
which obs column gives which words; the functions below look values up in them.
"""

import re

import numpy as np

from data.build.columns import Column, clean_text
from data.meaning.words import NORMAL, usual_disease

INTRO = {
    "sex": " a {}",
    "development_stage": " at the {}",
    "self_reported_ethnicity": " with {} background",
    "tissue": ", originating from the {}",
}
"""obs column -> its part of the first sentence, in order. A missing value removes its part and nothing else, as in the
published rows ("The cell is from, originating from the lung.")."""

_YES, _NO = "yes|true", "no|false"
RULES: dict[str, dict[str, str]] = {
    "ever_smoker": {
        f"{_YES}|current smoker": "The patient is a smoker.",
        f"{_NO}|non-smoker": "The patient is a non-smoker.",
    },
    "tumor_stage": {
        "non-cancer": "There is no cancer present.",
        "early": "The patient has an early-stage tumor.",
        "advanced": "The patient has an advanced-stage tumor.",
    },
    "sampletype": {
        "M3": "The sample was collected at month 3 post-treatment.",
        "M6": "The sample was collected at month 6 post-treatment.",
        "UV": "The sample was exposed to ultraviolet (UV) treatment.",
        "control": "The sample is from the control group.",
    },
    "donor_BMI": {".+": "The patient has a BMI of {value}."},
    "lung_condition": {".+": "The lung condition is described as {value}."},
    "smoking_status": {
        "active": "The patient is an active smoker.",
        "former": "The patient is a former smoker.",
        "hist of marijuana use": "The patient has a history of marijuana use.",
        "never": "The patient has never smoked.",
    },
    "BMI": {".+": "The patient's BMI is {value}."},
    "medical_conditions": {
        "epilepsy": "The patient has a history of epilepsy.",
        "tumor": "The patient has a diagnosed brain tumor.",
        "hydrocephalus": "The patient has hydrocephalus (fluid buildup in the brain).",
        "both": "The patient has both epilepsy and a brain tumor.",
        "other": "The patient has other neurological conditions.",
    },
    "hemisphere": {"left|right": "The tissue sample was taken from the {lower} hemisphere of the brain."},
    "harm_tumor.type": {
        "pbmc": "The sample is from peripheral blood mononuclear cells.",
        ".+": "The patient has been diagnosed with {lower} cancer.",
    },
    "harm_tumor.site": {
        "primary": "The tumor is located at the primary site.",
        "metastasis": "The tumor has metastasized to other parts of the body.",
        "normal": "This sample was collected from non-tumorous tissue.",
    },
    "harm_sample.type": {
        "tumor|normal": "The sample is derived from {lower} tissue.",
        "blood": "The sample is a blood-derived specimen.",
        "lymphnode": "The sample is derived from lymph node tissue.",
    },
    "harm_condition": {
        "(?P<site>.+)[_ ]T": "The sample is from tumor tissue in the {site}.",
        "(?P<site>.+)[_ ]N": "The sample is from normal {site} tissue.",
        "(?P<site>.+)[_ ]M": "The sample is from metastatic {site} tumor.",
        ".+": "The overall condition is described as {value}.",
    },
    "harm_cd45pos": {
        _YES: "The cell is CD45-positive, suggesting an immune cell origin.",
        _NO: "The cell is CD45-negative, suggesting a non-immune cell lineage.",
        "mixed": "The sample contains a mixture of CD45-positive and CD45-negative cells.",
    },
    "diabetes_history": {_YES: "The patient has a history of diabetes.", _NO: "The patient does not have diabetes."},
    "hypertension": {
        _YES: "The patient has a history of hypertension.",
        _NO: "The patient does not have hypertension.",
    },
    "eGFR": {".+": "The patient's estimated glomerular filtration rate (eGFR) is in the range {value}."},
    "Condition": {
        "healthy": "The donor was healthy with no reported skin condition.",
        # the published atlas has an en dash between the two words
        r"dm\s*\S\s*non ulcer": "The donor had diabetes mellitus without skin ulceration.",
        "keloid": "The donor had a keloid, which is an overgrowth of scar tissue.",
        "locali[sz]ed scleroderma": (
            "The donor was diagnosed with localized scleroderma, a skin-related autoimmune disease."
        ),
        "scar": "The donor had a typical scar from prior skin injury.",
    },
    "author_tumor_subsite": {".+": "The tissue was collected from the {lower}."},
    "activation": {
        "activated": "The sample was stimulated and represents activated immune cells.",
        "resting": "The sample represents resting (non-activated) immune cells.",
    },
    "Genotype": {
        "FLT3-ITD,NPM1-MUT": "The patient carries FLT3-ITD and NPM1 mutations.",
        "FLT3-WT,NPM1-MUT": "The patient carries a wild-type FLT3 and an NPM1 mutation.",
        "APL": "The patient is diagnosed with acute promyelocytic leukemia (APL).",
    },
}
"""obs column -> {regular expression for the whole value, case ignored: sentence}. The first match gives its sentence;
without a match the column gives none."""

_LIMB = r"((left|right|upper|lower) )*(foot|forearm|arm|hand|hindlimb|forelimb|leg|face)"
_SKIN = rf"\b(skin|dermis|dermal|epiderm\w*|scalp)\b|^{_LIMB}$"
_BRAIN = (
    r"brain|cerebr|cerebell|central nervous|hippocamp|gyrus|thalam|neocortex|^cortex$|amygdala|\binsula\b|striatum|putamen"
    r"|\bcaudate (nucleus|putamen)|accumbens|pallidus|nigra|claustrum|brodmann|white matter|corpus callosum|choroid plexus"
    r"|mening|dura mater|\bpons\b|medulla oblongata|spinal cord|(lateral|third|fourth) ventric|subventric|(frontal|temporal"
    r"|parietal|occipital|cingulate|entorhinal|perirhinal|retrosplenial|motor|visual|auditory|somatosensory|association"
    r"|insular)( \w+)* (cortex|lobe|pole)"
)
TISSUES = {("Condition", r"healthy|scar|dm.*"): _SKIN, ("medical_conditions", ".*"): _BRAIN}
"""(obs column, values) -> what its tissue must hold, where a tissue is known.

The wording is that of one atlas of skin and one of the brain (Table 9); other files use these general names and words for
other facts. The regions are names that UBERON gives to parts of the two; one that is missing costs a sentence, and a wrong
one makes a false sentence.
"""

CONTEXT_COLUMNS = (*INTRO, "disease", *RULES)
STATED = {
    "sex": r"^The cell is from a ",
    "development_stage": r"^The cell is from( a \S+)? at the ",
    "self_reported_ethnicity": r"^The cell is from.* with .* background",
    "tissue": r"^The cell is from.*, originating from the ",
    "disease": r"The patient (is healthy with no diagnosed disease|has been diagnosed with )",
}
"""obs column -> what a context has in it that states its value."""


LONGEST_FACT = 500
"""Longer values are no facts on a donor."""
_TAG = re.compile(r"</?(think|answer)>", re.IGNORECASE)


def agreed_facts(cells: dict[str, Column]) -> dict[str, str]:
    """{context column: value} of the facts that are known and equal for all cells of a puzzle.

    cells: {column: its values for the cells of the puzzle}.
    """
    facts = {}
    for name in CONTEXT_COLUMNS:
        if name in cells:
            codes = cells[name].codes
            if codes[0] >= 0 and (codes == codes[0]).all():
                facts[name] = cells[name].names[codes[0]]
    return facts


def without_unfit(name: str, column: Column) -> tuple[Column, list[str]]:
    """(a context column without the values that no prompt should state, a note on them): tags, and pages of text."""
    unfit = [i for i, text in enumerate(column.names) if len(text) > LONGEST_FACT or _TAG.search(text)]
    n_cells = int(np.isin(column.codes, unfit).sum())
    if not n_cells:
        return column, []
    codes = np.where(np.isin(column.codes, unfit), -1, column.codes).astype(np.int32)
    shown = column.names[unfit[0]]
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    note = f"no context states the {name.replace('_', ' ')} of {n_cells} cells, a tag or a text above {LONGEST_FACT} letters"
    return Column(codes, column.names, column.placeholders), [f"{note}: {shown!r}"]


def joined_values(column: Column) -> str:
    """The distinct values of a puzzle's cells, written as in CELLxGENE: 'a || b'. A missing value is 'unknown'."""
    return " || ".join(sorted(set(column.texts(missing="unknown"))))


def several_values(value: str) -> list[str]:
    """The single values of a value that may be 'a || b', as CELLxGENE writes several diseases of one donor."""
    return [part.strip() for part in value.split("||") if part.strip()]


def has_disease(disease: str | None, names: tuple[str, ...]) -> bool:
    """Whether a disease value, which may be 'a || b', contains one of the names. Case is ignored.

    A name may be 'a || b' too: the value must then contain both.
    """
    parts = {usual_disease(part).lower() for part in several_values(disease or "")}
    wanted = [{usual_disease(part).lower() for part in several_values(name)} for name in names]
    return any(name and name <= parts for name in wanted)


def in_words(value: str) -> str:
    """A value as a sentence says it: 'a || b || c' is 'a, b and c'."""
    parts = several_values(value)
    return value if len(parts) < 2 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _known(facts: dict[str, str]) -> dict[str, str]:
    return {name: text for name, value in facts.items() if (text := clean_text(value))}


def _ill(disease: str) -> str:
    """'normal || COVID-19' is COVID-19: who has a disease is not healthy."""
    parts = several_values(disease)
    return " || ".join(part for part in parts if part.lower() != NORMAL or len(parts) == 1)


def context_sentence(facts: dict[str, str]) -> str:
    """The context for some facts {obs column: value}. Values that mean "not known" are left out. No trailing space.

    Example: {"sex": "male", "tissue": "lung", "disease": "normal"} ->
    "The cell is from a male, originating from the lung. The patient is healthy with no diagnosed disease."
    """
    known = {name: in_words(_ill(text) if name == "disease" else text) for name, text in _known(facts).items()}
    intro = "".join(piece.format(known[name]) for name, piece in INTRO.items() if name in known)
    sentences = [f"The cell is from{intro}."] if intro else []
    if "disease" in known:
        healthy = known["disease"].lower() == NORMAL
        diagnosis = "is healthy with no diagnosed disease" if healthy else f"has been diagnosed with {known['disease']}"
        sentences.append(f"The patient {diagnosis}.")
    extras = [_extra(rules, known[name]) for name, rules in RULES.items() if name in known and _fits(name, known)]
    return " ".join(sentences + [sentence for sentence in extras if sentence])


def stated_in(context: str) -> set[str]:
    """The obs columns of the first sentence, and disease, of which a context states something.

    >>> sorted(stated_in("The cell is from a male, originating from the lung. The patient has been diagnosed with asthma."))
    ['disease', 'sex', 'tissue']
    """
    return {name for name, pattern in STATED.items() if re.search(pattern, context)}


def _fits(name: str, known: dict[str, str]) -> bool:
    """Whether the wording of a column's value is for the tissue."""
    return "tissue" not in known or all(
        re.search(tissue, known["tissue"], re.IGNORECASE)
        for (column, values), tissue in TISSUES.items()
        if column == name and re.fullmatch(values, known[name], re.IGNORECASE)
    )


def _extra(rules: dict[str, str], value: str) -> str:
    """The sentence of the first rule that matches the value, or ""."""
    for pattern, sentence in rules.items():
        if match := re.fullmatch(pattern, value, re.IGNORECASE):
            return sentence.format(**match.groupdict(), value=value, lower=value.lower())
    return ""
