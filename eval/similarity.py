"""Open-ended answers scored by the similarity of labels to gold labels in an encoder's space (Cell-o1, Table 12).

The paper embeds labels with the MedCPT query encoder (Jin et al. 2023, doi:10.1093/bioinformatics/btad651: the [CLS]
state of a BERT) and accepts a label when its cosine similarity to the gold label is above 0.8. Any encoder folder that
transformers can load works: `--medcpt FOLDER`.

The similarity in Table 12 is a mean over answers of a valid format. If invalid answers counted as 0, it could not
exceed the share of valid answers; but instruction-tuned Llama has similarity .7400 at format validity .2822.

Example: similarity(scores, puzzles, LabelEncoder("MedCPT-Query-Encoder"))["mean_similarity"] == 0.74
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError
from data.puzzles import Puzzle
from eval.bootstrap import added_up, percentile_intervals, units_of
from eval.metrics import PuzzleScore
from reward.cellpuzzles import normalise_label

THRESHOLD = 0.8
MAX_TOKENS = 64
"""Longest label; MedCPT's authors cut queries at this length."""


class LabelEncoder:
    """Unit vectors of labels: the normalised [CLS] state of a BERT-like encoder. Each distinct label is embedded once.

    Labels are normalised as for comparison: trimmed, white space collapsed, case folded (MedCPT's vocabulary is
    uncased). So a right label always has similarity 1.
    """

    def __init__(self, folder: str | os.PathLike, batch: int = 64) -> None:
        """folder: a checkpoint with its tokenizer.

        Raises UserError that names the folder when transformers cannot load it.
        """
        from transformers import AutoModel, AutoTokenizer

        if not (Path(folder) / "config.json").is_file():
            raise UserError(
                f"--medcpt {folder}: no config.json there; name the folder of a downloaded encoder checkpoint"
            )
        given = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **given)
            self.model = AutoModel.from_pretrained(folder, **given, weights_only=True).eval()
        except Exception as error:  # of transformers, tokenizers, safetensors, huggingface_hub: each has its own
            reason = " ".join(str(error).split())[:400]
            raise UserError(f"--medcpt {folder}: transformers cannot load an encoder from it ({reason})") from None
        self.batch = batch
        self.vectors: dict[str, np.ndarray] = {}
        """{normalised label: [H] unit vector}"""

    def embed(self, labels: Iterable[str]) -> None:
        """Add the vectors of labels that `vectors` lacks."""
        import torch

        missing = sorted({normalise_label(label) for label in labels} - self.vectors.keys())
        for start in range(0, len(missing), self.batch):
            texts = missing[start : start + self.batch]
            encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            with torch.no_grad():
                cls_BH = self.model(**encoded).last_hidden_state[:, 0].float()
            units_BH = torch.nn.functional.normalize(cls_BH, dim=-1).numpy().astype(np.float64)
            self.vectors.update(zip(texts, units_BH, strict=True))

    def similarity(self, label: str, gold: str) -> float:
        """Cosine similarity of two labels that were embedded before; exactly 1 for equal labels."""
        one, other = normalise_label(label), normalise_label(gold)
        return 1.0 if one == other else float(self.vectors[one] @ self.vectors[other])


def similarity(
    scores: Sequence[PuzzleScore],
    puzzles: Sequence[Puzzle],
    encoder: LabelEncoder,
    *names: object,
    threshold: float = THRESHOLD,
) -> dict[str, Any]:
    """{threshold, cell_accuracy, cell_accuracy_micro, batch_accuracy, mean_similarity, intervals}.

    A cell is right when the similarity of its label to its own gold label is above the threshold; an invalid answer has
    no right cell. Accuracies are over all batches; mean_similarity is over the cells of valid answers (None when there
    are none). Intervals: 95 % bootstrap over batches, with a seed derived from `names`.
    """
    encoder.embed(label for puzzle in puzzles for label in puzzle.answer)
    encoder.embed(label for score in scores for label in score.labels)
    numerators, denominators = [], []
    for score, puzzle in zip(scores, puzzles, strict=True):
        # an invalid answer has no labels; then zip gives nothing, which is not an error
        near = [encoder.similarity(*pair) for pair in zip(score.labels, puzzle.answer, strict=score.valid)]
        right, n = sum(value > threshold for value in near), score.n_cells
        numerators.append([right / n, right, float(right == n), sum(near)])
        denominators.append([1.0, n, 1.0, len(near)])
    sums = added_up(np.array(numerators, dtype=float), np.array(denominators), units_of(puzzles))
    metrics = ("cell_accuracy", "cell_accuracy_micro", "batch_accuracy", "mean_similarity")
    values = [None if np.isnan(value) else float(value) for value in sums.values()]
    limits = percentile_intervals(sums.draws("similarity", *names))
    return {
        "threshold": threshold,
        **dict(zip(metrics, values, strict=True)),
        "intervals": dict(zip(metrics, limits, strict=True)),
    }
