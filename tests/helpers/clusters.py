"""Clustered cells of four types, and models that answer questions about them without weights."""

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from data.clusters.known import KnownLabels
from data.puzzles import Puzzle
from eval.annotate import Model
from eval.baselines import one_to_one
from eval.metrics import answer_of
from eval.predict import Answer
from tests.helpers.endpoints import Loopback, begin_json, body_of

GENES = {
    "T cell": ["CD3D", "CD3E", "IL7R", "TRAC"],
    "B cell": ["CD79A", "MS4A1", "CD19", "CD79B"],
    "monocyte": ["LYZ", "CD14", "S100A9", "FCN1"],
    "NK cell": ["NKG7", "GNLY", "KLRD1", "PRF1"],
}
TYPES = tuple(GENES)


def clustered(types: list[str], parts: int, n_cells: int = 12, seed: int = 0) -> anndata.AnnData:
    """Cells of one blood donor: counts, with obs columns leiden (numbers), cell_type, and obsm["X_umap"]."""
    rng = np.random.default_rng(seed)
    genes = [gene for label in TYPES for gene in GENES[label]] + ["ACTB", "MALAT1"]
    labels = [label for label in types for _ in range(parts * n_cells)]
    clusters = [str(i * parts + k) for i in range(len(types)) for k in range(parts) for _ in range(n_cells)]
    rate = np.array([[30.0 if gene in GENES[label] else 0.3 for gene in genes[:-2]] + [20.0, 10.0] for label in labels])
    obs = pd.DataFrame(
        {
            "leiden": pd.Categorical(clusters),
            "cell_type": pd.Categorical(labels),
            "donor_id": pd.Categorical(["d1"] * len(labels)),
            "tissue": pd.Categorical(["blood"] * len(labels)),
            "disease": pd.Categorical(["normal"] * len(labels)),
            "sex": pd.Categorical(["female"] * len(labels)),
        },
        index=[f"cell{i}" for i in range(len(labels))],
    )
    var = pd.DataFrame({"feature_name": pd.Categorical(genes)}, index=genes)
    adata = anndata.AnnData(scipy.sparse.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=obs, var=var)
    corner = np.array([[TYPES.index(label) % 2, TYPES.index(label) // 2] for label in labels], dtype=float)
    adata.obsm["X_umap"] = corner * 10 + rng.normal(size=corner.shape)
    return adata


def reads_markers(puzzle: Puzzle) -> str:
    """An answer: the one-to-one assignment of candidates to cells with most of the candidates' genes."""
    fit = [
        [sum(gene in cell[:6] for gene in GENES.get(name, ())) for name in puzzle.candidates] for cell in puzzle.cells
    ]
    labels = [puzzle.candidates[column] for column in one_to_one(np.array(fit))]
    lines = [
        f"Cell {number} has {', '.join(cell[:2])}, so it is a {label}."
        for number, (cell, label) in enumerate(zip(puzzle.cells, labels, strict=True), start=1)
    ]
    return answer_of(labels, "\n".join(lines))


class Scripted(Model):
    """A model whose answers a function writes; `prompts` holds what it was asked."""

    prompts: list[str]


def model_that(answers: Callable[[Puzzle], str], known: KnownLabels | None = None) -> Scripted:
    """A local model, for eval.annotate.annotate."""
    prompts: list[str] = []

    def load(asked, sets):
        def ask(puzzles, first):
            prompts.extend(puzzle.system_message + puzzle.user_message for puzzle in puzzles)
            yield [(puzzle, [Answer(text=answers(puzzle), tokens=5, finish_reason="stop")]) for puzzle in puzzles]

        return ask, lambda: None

    model = Scripted(name="a model", load=load, known=known, hashes={"model": "abc"}, files="1 file")
    object.__setattr__(model, "prompts", prompts)
    return model


class MarkerServer(Loopback):
    """A chat endpoint on loopback that reads markers; after `good` answers it wants money (402) until it is paid."""

    def __init__(self, good: int | None = None) -> None:
        self.good, self.lock = good, threading.Lock()
        self.prompts: list[str] = []
        """User messages that were answered."""
        super().__init__()

    def handle(self, to: BaseHTTPRequestHandler) -> None:
        status, answer = self.answer(body_of(to))
        data = json.dumps(answer).encode()
        begin_json(to, status, len(data))
        to.wfile.write(data)

    def answer(self, body: dict) -> tuple[int, dict]:
        """(status, JSON) of a request."""
        message = body["messages"][1]["content"]
        with self.lock:
            if self.good is not None and len(self.prompts) >= self.good:
                return 402, {"error": {"message": "pay first"}}
            self.prompts.append(message)
        n_cells = len(re.findall(r"^Cell \d+:", message, re.MULTILINE))
        blank = {"system_msg": "", "user_msg": message, "assistant_msg": " | ".join(["?"] * n_cells)}
        text = reads_markers(Puzzle.from_row(blank))
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 9, "completion_tokens": 9}
        return 200, {"model": body["model"], "choices": [choice], "usage": usage}
