"""How good the labels of clusters are: held-out donors of a demo run, each type split in two, beside the baselines.

    python launch/demo.py --out runs/demo                            # atlas, puzzles, a trained model
    python -m tests.bench.annotate --run runs/demo                   # the table
    python -m tests.bench.annotate --run runs/demo --variants        # other ways to ask
    python -m tests.bench.annotate --run runs/demo --calibrate       # writes eval/annotate/calibration.tsv
    python -m tests.bench.annotate --run runs/demo --celltypist      # needs pip install celltypist

The calibration is fitted on the donors of unseen diseases; the table is about the test donors. No timing.
"""

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import anndata
import numpy as np

from data.clusters.profiles import Profiles, profiles_of
from data.prompts import normalise_label
from data.puzzles import Puzzle, read_puzzles
from eval.annotate.annotation import Questions, annotate_profiles
from eval.annotate.calibration import (
    TABLE,
    calibrated,
    expected_calibration_error,
    fit_calibration,
    halves,
    read_calibration,
)
from eval.annotate.candidates import Candidates
from eval.annotate.heldout import CLUSTER, DONOR, TYPE, held_out_donors, overclustered
from eval.annotate.settings import QuestionSettings
from eval.annotate.votes import read_answer
from eval.baselines import Profiles as NearestProfiles
from eval.baselines import assign, each_by_itself, known_markers, overlap
from rollout import Sampling, stable_seed

DEMO = {"cluster_key": CLUSTER, "max_cells": 4, "top_genes": 12, "drop_genes": ("ribosomal", "mitochondrial")}
"""As the demo's model was trained."""
VARIANTS = {
    "default": {},
    "genes by expression": {"genes_by": "expression"},
    "genes by difference": {"genes_by": "difference"},
    "greedy": {"temperature": 0.0},
    "no shared favourites": {"one_to_one": "always"},
    "never one-to-one": {"one_to_one": "never"},
    "one screening pass": {"screens": 1},
    "four screening passes": {"screens": 4},
    "16 votes": {"samples": 16},
    "puzzles of 3": {"max_cells": 3},
}
SHARES = [round(0.05 * i, 2) for i in range(21)]


class Engine:
    """A checkpoint in vLLM that answers questions."""

    def __init__(self, folder: Path) -> None:
        from trainer.model.opening import open_checkpoint
        from trainer.model.serving import start_engine

        self.opened = open_checkpoint(str(folder))
        self.engine = start_engine(self.opened, longest=600, dtype="float32", memory_fraction=0.4)

    def asker(self, settings: QuestionSettings):
        chat = self.opened.chat
        sampling = Sampling(
            n=1, max_tokens=96, temperature=settings.temperature, top_p=1.0, seed=settings.seed, stop_ids=chat.stop_ids
        )

        def ask(questions, name):
            puzzles = [question.puzzle for question in questions]
            ids = [chat.prompt_ids(puzzle.chat()) for puzzle in puzzles]
            groups = self.engine.generate([puzzle.id for puzzle in puzzles], ids, sampling)
            texts = [chat.response_text(rollouts[0].response_ids) for rollouts in groups]
            return [read_answer(*pair) for pair in zip(questions, texts, strict=True)]

        return ask


@dataclasses.dataclass
class Result:
    """Clusters of several divisions, pooled."""

    shares: list[float] = dataclasses.field(default_factory=list)
    right: list[bool] = dataclasses.field(default_factory=list)
    beside: dict[str, list[bool]] = dataclasses.field(default_factory=dict)
    """{baseline: is each cluster right}"""

    def line(self, name: str, table: tuple[np.ndarray, np.ndarray]) -> str:
        confidence = [calibrated(share, table) for share in self.shares]
        upper, lower = halves(confidence, self.right)
        error, raw = (expected_calibration_error(values, self.right) for values in (confidence, self.shares))
        return (
            f"{name:24} right {np.mean(self.right):.3f}  confident half {upper:.3f}, other {lower:.3f}  calibration error "
            f"{error:.3f} (of shares {raw:.3f})  clusters {len(self.right)}"
        )


def candidates_by_tissue(profiles: Profiles, train: list[Puzzle]) -> dict[str, Candidates]:
    """{sample: the labels of its tissue in the training puzzles}."""
    of_tissue: dict[str, set] = {}
    for puzzle in train:
        of_tissue.setdefault(puzzle.meta["tissue"], set()).update(puzzle.answer)
    return {p.sample: Candidates(sorted(of_tissue[p.tissue]), p.tissue) for p in profiles.profiles}


def measured(
    engine: Engine, adata: Any, donors: list[str], train: list[Puzzle], settings: QuestionSettings, n: int
) -> Result:
    """n random divisions of the donors' types into clusters, annotated."""
    found = Result()
    for seed in range(n):
        blind, types = overclustered(adata, donors, seed)
        profiles = profiles_of(blind, CLUSTER, settings)
        candidates = candidates_by_tissue(profiles, train)
        asked = dataclasses.replace(settings, seed=seed)
        questions = Questions(profiles, candidates, asked)
        annotation = annotate_profiles(profiles, candidates, questions, engine.asker(asked), asked)
        labels = [annotation.clusters[name].found for name in types]
        found.shares += [label.tally.share_of_answers(label.label) for label in labels]
        found.right += [annotation.clusters[name].found.label == label for name, label in types.items()]
        for name, right in baselines(profiles, candidates, train, types).items():
            found.beside.setdefault(name, []).extend(right)
    return found


def baselines(
    profiles: Profiles, candidates: dict[str, Candidates], train: list[Puzzle], types: dict[str, str]
) -> dict[str, list[bool]]:
    """{baseline: is each cluster right}: each cluster by itself, with all candidates of its tissue."""
    nearest, table = NearestProfiles(train), known_markers(train)
    right: dict[str, list[bool]] = {}
    for profile in profiles.profiles:
        labels = candidates[profile.sample].labels
        lists = {"nearest profile": profile.by_expression, "marker table": profile.by_expression}
        lists |= {f"{name}, by difference": profile.by_difference for name in list(lists)}
        for name, genes in lists.items():
            puzzle = Puzzle(id=profile.cluster, context="", cells=[genes], candidates=labels, answer=[])
            fit = nearest.similarity(puzzle) if name.startswith("nearest") else overlap(puzzle, table)
            label = assign(puzzle, fit, each_by_itself, stable_seed(name, profile.cluster))[0]
            right.setdefault(name, []).append(normalise_label(label) == normalise_label(types[profile.cluster]))
    return right


def celltypist_right(adata: Any, donors: list[str], train_donors: set[str], n: int) -> list[bool]:
    """CellTypist (logistic regression) trained on the cells of the training donors, majority of each cluster's cells."""
    import celltypist
    import scanpy

    logged = adata.copy()
    logged.var_names_make_unique()
    scanpy.pp.normalize_total(logged, target_sum=1e4)
    scanpy.pp.log1p(logged)
    train = logged[logged.obs[DONOR].isin(train_donors)]
    model = celltypist.train(train, labels=TYPE, n_jobs=1, feature_selection=False, max_iter=200)
    right = []
    for seed in range(n):
        blind, types = overclustered(logged, donors, seed)
        labels = celltypist.annotate(blind, model=model).predicted_labels["predicted_labels"].astype(str)
        of_cluster = blind.obs[CLUSTER].astype(str)
        for cluster, label in types.items():
            right.append(Counter(labels[of_cluster == cluster]).most_common(1)[0][0] == label)
    return right


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="default: the last GRPO checkpoint of the run")
    parser.add_argument("--divisions", type=int, default=2, help="random divisions of the types into clusters")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--celltypist", action="store_true")
    given = parser.parse_args()
    run, report = given.run, given.run / "puzzles/report.json"
    model = given.model or sorted((run / "grpo/checkpoints").iterdir())[-1]
    adata, train = anndata.read_h5ad(run / "atlas.h5ad"), read_puzzles(run / "puzzles/train.parquet")
    donors = held_out_donors(report)
    print(f"{model}: {len(donors)} held-out donors", flush=True)
    if given.celltypist:
        train_donors = set(held_out_donors(report, "train"))
        right = celltypist_right(adata, donors, train_donors, given.divisions)
        print(f"{'CellTypist':24} right {np.mean(right):.3f}  clusters {len(right)}")
        return  # once its libraries are loaded, vLLM does not start in this process
    engine = Engine(model)
    default = QuestionSettings(**DEMO).as_trained(None)
    if given.calibrate:
        fitted = measured(engine, adata, held_out_donors(report, "unseen"), train, default, given.divisions)
        write_table(fit_calibration(fitted.shares, fitted.right, SHARES), len(fitted.right))
        print(fitted.line("fitted on unseen", read_calibration()), flush=True)
    for name, changed in (VARIANTS if given.variants else {"default": {}}).items():
        settings = dataclasses.replace(default, **changed)
        found = measured(engine, adata, donors, train, settings, given.divisions)
        print(found.line(name, read_calibration()), flush=True)
        if name == "default":
            for baseline, right in found.beside.items():
                print(f"{baseline:24} right {np.mean(right):.3f}", flush=True)
    metrics = run / "eval" / ("sft" if "sft" in model.parts else "grpo") / "test/metrics.json"
    if metrics.is_file():
        print("batch puzzles, cells right:", round(json.loads(metrics.read_text())["cell_accuracy"], 3))
    engine.engine.close()


def write_table(fitted: list[float], n: int) -> None:
    """Write eval/annotate/calibration.tsv."""
    lines = [
        "# Share of answers -> accuracy, by isotonic regression; made by tests/bench/annotate.py --calibrate.",
        f"# Fitted on {n} clusters of known type: donors of unseen diseases of the simulated atlas, each type split in two,",
        "# annotated by the model of make demo (a million parameters) with 8 votes. Values between rows are interpolated.",
        "share\tconfidence",
        *(f"{share:.2f}\t{value:.3f}" for share, value in zip(SHARES, fitted, strict=True)),
    ]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
