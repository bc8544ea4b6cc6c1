"""Why a number of a step is 0: healthy zeros and broken ones look the same otherwise."""

from trainer.config import GrpoConfig
from trainer.objective import CLIPS


def explain_zeros(metrics: dict, cfg: GrpoConfig) -> list[str]:
    """Notes on the zeros of a line of metrics.jsonl."""
    notes = []
    on_policy = cfg.updates_per_batch == 1
    if metrics["groups/dropped_responses"] == 1:
        return ["loss 0: no response of the step was scored, so no optimizer step was made"]
    if metrics["groups/mixed"] == 0:
        right, wrong = metrics["groups/all_right"], metrics["groups/all_wrong"]
        which = (
            "all groups right" if right == 1 else "all groups wrong" if wrong == 1 else "groups all right or all wrong"
        )
        notes.append(f"pg_loss 0: {which}, so every advantage is 0 and the surrogate has no gradient")
    elif on_policy and cfg.aggregation == "seq-mean-token-mean" and abs(metrics["pg_loss"]) < 1e-5:
        notes.append(
            "pg_loss 0: fresh samples, so every ratio is 1 and the advantages of a group cancel; the gradient does not"
        )
    if not any(metrics[f"clip_ratio/{name}_mean"] for name in CLIPS if name):
        reason = (
            "one update per batch, so every ratio is exactly 1"
            if on_policy
            else "no ratio went past the bound on its advantage's side"
        )
        notes.append(f"no clip: {reason}")
    if metrics["kl"] == 0:
        reason = (
            "the adapter starts at zero, so policy and reference are the same"
            if cfg.beta
            else "beta is 0: no reference"
        )
        notes.append(f"kl 0: {reason}")
    return notes
