"""The settings of an annotation (launch/annotate.py, eval.annotate.annotate), and which of them exclude one another."""

import os
from dataclasses import MISSING, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

from data.clusters.known import SHARE_KNOWN, STATES, KnownLabels
from data.clusters.settings import ProfileSettings
from data.errors import UserError
from data.options import DTYPES, argument, check_endpoint, check_key_env, check_numbers, option
from data.status.status import NOTIFY
from eval.annotate.questions import GENES_BY
from eval.annotate.votes import SHARING
from eval.settings import EvaluateConfig

FILES, MODEL, QUESTIONS, LABELS = "File and clusters", "Who answers", "What is asked", "Labels"
"""Headings of --help; those of the profiles follow."""
RANGES = {
    "at least 1": ("samples", "screens", "max_donors", "min_cells", "top_genes"),
    "at least 2: a puzzle compares": ("max_cells",),
    "at least 0 and at most 1": ("min_confidence", "min_known_genes"),
    "at least 0": ("temperature",),
}
UNTRAINED = {"max_cells": 12, "top_genes": 50, "drop_genes": ()}
"""How a model is asked of which no training puzzles are known: near the paper's puzzles of 8 to 15 cells and 50 genes."""
files, model, questions, labels = (partial(option, section=name) for name in (FILES, MODEL, QUESTIONS, LABELS))


@dataclass(frozen=True, kw_only=True)
class QuestionSettings(ProfileSettings):
    """What is asked, of whom, and how labels are made of the answers. Without the names of files."""

    cluster_key: str = files("", "obs column with the clusters, such as leiden; without it the columns are named.")
    truth_key: str | None = files(None, "obs column with known labels, to compare with; never shown to the model.")
    base: str | None = model(None, "Checkpoint under an adapter; default: the one that the adapter names.")
    dtype: str = model("auto", "Weights and compute; auto: bfloat16 on a GPU, float32 on a CPU.", DTYPES)
    eager: bool = model(False, "vLLM on a GPU: do not compile the model nor capture CUDA graphs; it starts sooner.")
    memory_fraction: float = model(0.85, "Share of a GPU's memory that vLLM may use.")
    chunk: int = model(256, "Puzzles that vLLM answers between two saves.")
    endpoint: str | None = model(None, "Base URL of an OpenAI-compatible server that serves --model.")
    key_env: str = model("OPENAI_API_KEY", "Environment variable with the endpoint's key, which is never written down.")
    concurrency: int = model(8, "Requests to the endpoint at a time.")
    refused: str = model("stop", "As in launch/evaluate.py.", ("stop", "invalid"))
    max_response_tokens: int = model(3000, "Longest response.")
    temperature: float = model(1.0, "Of sampling; 0 is greedy (each vote still has an order of its own).")
    max_cells: int | None = questions(None, "Most clusters in a puzzle; default: as the model was trained, else 12.")
    top_genes: int | None = questions(None, "Genes listed per cluster; default: as the model was trained, else 50.")
    drop_genes: tuple[str, ...] | None = questions(
        None,
        "Gene class never listed: ribosomal or mitochondrial; repeatable, or several with commas; default: as the model was "
        "trained, else none.",
    )
    genes_by: str | None = questions(
        None,
        "How a cluster's genes are ranked in a prompt: by the difference from the sample's other clusters, by expression, or "
        "both in turns; default: difference for a model of puzzles built with --rank deg, else both.",
        GENES_BY,
    )
    screens: int = questions(2, "Times that every cluster meets every candidate before the votes.")
    samples: int = questions(8, "Votes for a cluster in each donor or sample.")
    max_donors: int = questions(
        8, "Donors or samples in which a cluster is asked about: those with many clusters, then many cells."
    )
    seed: int = questions(0, "Seed of orders, sets and sampling.")
    candidates: str | None = labels(
        None,
        "Labels to choose from: a file (a label a line, with its Cell Ontology id after a tab) or a list with commas; "
        "open: any cell type; default: the labels that the model was trained on for the tissue.",
    )
    one_to_one: str = labels(
        "auto",
        "May two clusters have one label: where the votes say so, never two (always), or freely (never).",
        SHARING,
    )
    min_confidence: float = labels(0.5, "Below it a cluster is 'uncertain'.")
    min_known_genes: float = labels(
        SHARE_KNOWN, "Share of the listed genes that the model must know from its training."
    )

    def __post_init__(self) -> None:
        check_numbers(self, RANGES)
        if self.endpoint and self.base:
            raise UserError("--base is for an adapter folder, not for a model behind --endpoint: leave one out")
        check_key_env(self.key_env)
        if self.endpoint:
            check_endpoint("--endpoint", self.endpoint)
        if self.truth_key == self.cluster_key:
            raise UserError(f"--truth-key {self.truth_key}: is the column of clusters; name the column of known labels")

    def as_trained(self, known: KnownLabels | None) -> Self:
        """The settings with what was left out filled in: from the puzzles that the model was trained on, else defaults."""
        trained = UNTRAINED | (known.puzzles if known else {})
        trained["drop_genes"] = tuple(trained["drop_genes"])
        trained["genes_by"] = "difference" if trained.pop("rank", "") == "deg" else "both"
        for name in ("profile", STATES):
            trained.pop(name, None)
        return replace(self, **{name: value for name, value in trained.items() if getattr(self, name) is None})

    @staticmethod
    def unlike_training(known: KnownLabels | None) -> str:
        """A note where genes are ranked in another way than in the puzzles that the model was trained on; "" elsewhere."""
        built = known.puzzles if known else {}
        if built.get("rank") == "hvg":
            return "the model was trained on lists of highly variable genes (--rank hvg), and is shown lists of all genes here"
        if built.get("profile") == "cluster" and built.get("rank") != "deg":
            return (
                "the model was trained on means of counts (--profile cluster), and is shown means of logarithms here, whose "
                "order can differ"
            )
        return ""

    def asked(self, model: str, out: Path, resume: bool) -> EvaluateConfig:
        """How a model is asked, in the terms of an evaluation. out: folder of the answers."""
        names = "base dtype eager memory_fraction chunk endpoint key_env concurrency refused max_response_tokens temperature seed"
        same = {name: getattr(self, name) for name in names.split()}
        return EvaluateConfig(puzzles=("clusters",), out=str(out), model=model, resume=resume, **same)


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig(QuestionSettings):
    """The settings of launch/annotate.py."""

    file: str = argument("The .h5ad file; it is not changed.")
    out: str = files(
        MISSING, "File to write; ends in .h5ad. Beside it come a .csv, a .html page and a folder of answers."
    )
    model: str = model(
        MISSING, "Checkpoint folder, or an adapter folder (a GRPO checkpoint); with --endpoint the name of a model."
    )
    resume: bool = files(False, "Use the answers that an earlier run left in the folder of answers.")
    notify: str = files("", NOTIFY)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("file", "out", "model", "base", "candidates"):
            try:
                (getattr(self, name) or "").encode()
            except UnicodeEncodeError:  # the page and the record could not hold it
                raise UserError(f"{getattr(self, name)!r}: the name is not UTF-8; rename it") from None
        if Path(self.out).suffix != ".h5ad":
            raise UserError(f"--out {self.out}: must end in .h5ad")
        if Path(self.out).resolve() == Path(self.file).resolve():
            raise UserError(f"--out {self.out}: is the input, which is never changed; name another file")
        above = next(folder for folder in Path(self.out).absolute().parents if os.path.exists(folder))
        if not above.is_dir():
            raise UserError(f"--out {self.out}: {above} is a file and no folder; name another place")
        self.asked(self.model, self.answers, self.resume)  # refuses what an evaluation refuses, before a file is read

    @property
    def answers(self) -> Path:
        """The folder that keeps the model's answers."""
        return Path(self.out).with_suffix(".answers")
