"""The text around a puzzle: system message, user message, chat layout, response layout.

All stages (distillation, SFT, GRPO, evaluation) use one layout: a system message and a user message. The published
CellPuzzles rows have exactly these bytes (Cell-o1, arXiv:2506.02911, Table 1), so a published row that is parsed and
rendered again does not change.

A puzzle has one of three variants: "batch" (the published one), "cell" (one cell of a batch alone, appendix C) and
"open" (a batch without candidates, appendix D). data/variants.py makes the last two. A file that was written with another
system message keeps it: the row says what is asked.
"""

import re

SYSTEM_MESSAGE = (
    "You are an expert assistant specialized in cell type annotation. You will be given a batch of N cells from the "
    "same donor, where each cell represents a unique cell type. For each cell, the top expressed genes are provided in "
    "descending order of expression. Using both the gene expression data and donor information, determine the correct "
    "cell type for each cell. You will also receive a list of N candidate cell types, and each candidate must be "
    "assigned to exactly one cell. Ensure that you consider all cells and candidate types together, rather than "
    "annotating each cell individually. Include your detailed reasoning within <think> and </think> tags, and provide "
    "your final answer within <answer> and </answer> tags. The final answer should be a single string listing the "
    "assigned cell types in order, separated by ' | '."
)

# Table 10, word for word. The paper does not show the user message of a single cell: its layout below is the batch's.
CELL_SYSTEM_MESSAGE = (
    "You are an expert assistant specialized in cell type annotation. You will be given the gene expression profile of a "
    "single cell from a specific donor. The top expressed genes are listed in descending order. Use both gene expression "
    "and donor context to determine the correct cell type. You will also receive a list of candidate cell types\u2014choose "
    "the one that best fits this cell. Include your detailed reasoning within <think> and </think> tags, and provide your "
    "final answer within <answer> and </answer> tags. The final answer should be a single string with exactly one cell "
    "type."
)
# Appendix D describes the open-ended set-up and shows no prompt: the model names a cell type for each cell of the batch,
# from genes and context, without a list of labels. So this is the published message without what it says of candidates.
OPEN_SYSTEM_MESSAGE = SYSTEM_MESSAGE.replace(
    " You will also receive a list of N candidate cell types, and each candidate must be assigned to exactly one cell.",
    "",
).replace("all cells and candidate types together", "all cells together")
SYSTEM_MESSAGES = {"batch": SYSTEM_MESSAGE, "cell": CELL_SYSTEM_MESSAGE, "open": OPEN_SYSTEM_MESSAGE}

CONTEXT_HEAD = "Context: "
CANDIDATES_HEAD = "Match the cells above to one of the following cell types:\n"
CELL_CANDIDATES_HEAD = "Match the cell above to one of the following cell types:\n"
OPEN_REQUEST = "Name the cell type of each cell above."
LABEL_SEPARATOR = " | "

RESPONSE_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
RESPONSE_LAYOUT = re.compile(r"\s*<think>(?P<reasoning>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)


def variant_of(n_cells: int, n_candidates: int) -> str:
    """The variant: "open" without candidates, "cell" for one cell with several candidates, otherwise "batch"."""
    if n_candidates == 0:
        return "open"
    return "cell" if n_cells == 1 and n_candidates > 1 else "batch"


def user_message(context: str, cells: list[list[str]], candidates: list[str], context_tail: str = " ") -> str:
    """Render the user message of a puzzle of any variant.

    context_tail: the characters between the context and the blank line. The published rows have one space there.
    """
    cell_lines = [f"Cell {number}: {', '.join(genes)}" for number, genes in enumerate(cells, start=1)]
    head = {"batch": CANDIDATES_HEAD, "cell": CELL_CANDIDATES_HEAD, "open": OPEN_REQUEST}
    request = head[variant_of(len(cells), len(candidates))] + "\n".join(candidates)
    return "\n\n".join([f"{CONTEXT_HEAD}{context}{context_tail}", "\n".join(cell_lines), request])


def answer_text(labels: list[str]) -> str:
    """The correct answer as the published rows write it: labels in cell order, joined by ' | '."""
    return LABEL_SEPARATOR.join(labels)


def chat(system_msg: str, user_msg: str) -> list[dict[str, str]]:
    """The chat turns for a tokenizer's chat template or an OpenAI-compatible endpoint."""
    return [{"role": "system", "content": system_msg}, {"role": "user", "content": user_msg}]
