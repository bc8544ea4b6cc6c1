"""The words every stage puts around a puzzle: system message, user message, chat layout.

One layout everywhere (distillation, SFT, GRPO, evaluation): system message + user message. The published CellPuzzles
rows use exactly these bytes (Cell-o1, arXiv:2506.02911, Table 10), so an official row renders back to itself.
"""

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

CONTEXT_HEAD = "Context: "
CANDIDATES_HEAD = "Match the cells above to one of the following cell types:\n"
LABEL_SEPARATOR = " | "


def user_message(context: str, cells: list[list[str]], candidates: list[str], context_tail: str = " ") -> str:
    """Render the user turn of one puzzle.

    context_tail: what stands between the context and the blank line; the published rows keep one space there.
    """
    cell_lines = [f"Cell {number}: {', '.join(genes)}" for number, genes in enumerate(cells, start=1)]
    return "\n\n".join(
        [f"{CONTEXT_HEAD}{context}{context_tail}", "\n".join(cell_lines), CANDIDATES_HEAD + "\n".join(candidates)]
    )


def answer_text(labels: list[str]) -> str:
    """The gold answer as the published rows write it: labels in cell order, joined by ' | '."""
    return LABEL_SEPARATOR.join(labels)


def chat(system_msg: str, user_msg: str) -> list[dict[str, str]]:
    """The chat turns handed to a tokenizer's chat template or to an OpenAI-compatible endpoint."""
    return [{"role": "system", "content": system_msg}, {"role": "user", "content": user_msg}]
