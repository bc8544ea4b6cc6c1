"""Label the clusters of your own .h5ad file with a trained model, or with any model behind an endpoint.

    python launch/annotate.py mine.h5ad --cluster-key leiden --out mine.annotated.h5ad --model runs/demo/sft/model
    python launch/annotate.py mine.h5ad --cluster-key leiden --out mine.annotated.h5ad --candidates labels.txt \\
        --model gpt-4o --endpoint https://api.openai.com/v1
"""

import functools
import sys
from pathlib import Path

from data.clusters.known import read_known_labels
from data.files import weight_files, weights_hash
from data.processes import provenance
from data.status.status import reporting, without_notify
from eval.annotate.heldout import CLUSTER, count_right, write_held_out
from eval.annotate.run import Model, annotate_file, summary_lines
from eval.annotate.settings import AnnotateConfig
from launch.evaluate import load_model, say
from launch.options import command
from launch.progress import watching_cells
from launch.stages import run_stage


@command(AnnotateConfig)
def main(config: AnnotateConfig) -> None:
    """Give the clusters of an .h5ad file cell types, with votes, confidence, reasons and doubts."""
    model = open_endpoint(config.model) if config.endpoint else open_model(config.model, config.base)
    watch = functools.partial(watching_cells, "reading cells")
    with reporting(config.out, config.notify, "question") as report:
        annotation, agreement, replaced = annotate_file(config, model, without_notify(sys.argv), watch, report.progress)
    for sentence in [*annotation.unsaid, *replaced]:
        print(f"note: {sentence}", file=sys.stderr)
    for line in summary_lines(annotation, agreement):
        say(line)
    out = Path(config.out)
    print(f"labels: {out}\ntable: {out.with_suffix('.csv')}\npage: {out.with_suffix('.html')}", flush=True)


def open_model(folder: str | Path, base: str | None = None) -> Model:
    """A checkpoint or an adapter folder of ours, to be loaded into vLLM when the first question is asked.

    For eval.annotate.annotate(adata, model=open_model("runs/demo/sft/model"), ...). base: the checkpoint under an adapter.
    Raises UserError when the folder holds no model that can be served.
    """
    from rollout.sync import adapter_hash
    from trainer.model.opening import files_fingerprint, open_checkpoint

    opened = open_checkpoint(str(folder), base)
    made = provenance()
    # the hash that a training run records of its model: the two can be compared, and 15 GB are not read for it
    weights = [weights_hash(path) for path in weight_files(opened.base)]
    hashes = {"model": weights[0] if len(weights) == 1 else " ".join(name[:16] for name in weights)}
    hashes |= {"adapter": adapter_hash(opened.adapter)} if opened.adapter else {}
    return Model(
        name=str(folder),
        load=load_model,
        known=read_known_labels(folder, opened.base),
        hashes=hashes,
        versions=made["versions"] | {"commit": made["git_commit"]},
        files=files_fingerprint(folder, base),
    )


def open_endpoint(name: str) -> Model:
    """A model behind an OpenAI-compatible endpoint."""
    return Model(name=name, versions={"commit": provenance()["git_commit"]})


# ---- the last stage of the two stories (launch/demo.py)


def annotate_stage(file: Path, labelled: Path, model: Path, response_tokens: int, *words: str, **flags: object) -> None:
    """Run this command as a stage, unless it has run: the clusters of `file` to `labelled`.

    words and flags: more options, such as cluster_key="louvain".
    """
    # a stage that was stopped has left answers
    words += ("--resume",) if labelled.with_suffix(".answers").is_dir() else ()
    flags = {"out": labelled, "model": model, "max_response_tokens": response_tokens, **flags}
    run_stage("annotate", labelled.with_suffix(".csv"), "annotate", file, *words, **flags)


def annotate_held_out(out: Path, model: Path, response_tokens: int, seed: int) -> str:
    """A sentence: how many clusters are right of a held-out donor of a demo run, whose labels are taken away.

    Each of the donor's types is split into two clusters. out: the folder of the run. model: the checkpoint. Leaves
    OUT/annotate/: donor.h5ad, donor.types.json, labelled.h5ad, labelled.csv, labelled.html.
    """
    blind, labelled = out / "annotate/donor.h5ad", out / "annotate/labelled.h5ad"
    report = out / "puzzles/report.json"
    if not blind.with_suffix(".types.json").is_file():
        write_held_out(out / "atlas.h5ad", report, blind, seed)
    annotate_stage(blind, labelled, model, response_tokens, cluster_key=CLUSTER, seed=seed)
    right, n = count_right(labelled.with_suffix(".csv"), blind.with_suffix(".types.json"))
    return f"annotation of a held-out donor: {right} of {n} clusters right; see {labelled.with_suffix('.html')}"


if __name__ == "__main__":
    main()
