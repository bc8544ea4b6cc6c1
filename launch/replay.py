"""Replay one optimizer step from its bundle, on the CPU, in one process: loss, gradient, and every token's share.

python launch/grpo.py --save-steps every:10 ...           # leaves OUT/steps/step-000010
python launch/replay.py runs/grpo/steps/step-000010
python launch/replay.py runs/grpo/steps/step-000010 --row 3 --html step.html --ledger tokens.csv
python -m pdb -c "import trainer.grpo" -c "b trainer.grpo.loss_terms" -c c launch/replay.py runs/grpo/steps/step-000010
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import replacing, write_whole
from launch.options import argument, command, option


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    bundle: str = argument("Folder of a step bundle: OUT/steps/step-000010.")
    model: str | None = option(None, "Base checkpoint, where it has moved since the run.")
    row: int | None = option(None, "Explain this response of the step (from 0): the formulas with their values.")
    html: str | None = option(
        None, "Write a page with every token coloured by advantage, ratio, KL or share of the loss."
    )
    ledger: str | None = option(None, "Write the loss ledger, one row per token, as .csv.")


@command(ReplayConfig)
def main(config: ReplayConfig) -> None:
    """Compute a recorded step again and say whether loss and gradient are, bit for bit, those recorded (else exit code 1)."""
    if config.ledger and not config.ledger.endswith(".csv"):
        raise UserError(f"--ledger {config.ledger}: name a file that ends in .csv")

    from trainer.inspect.explain import explain_response
    from trainer.inspect.ledger import ledger
    from trainer.inspect.replay import replay
    from trainer.record.bundle import (
        read_bundle,  # torch and transformers load only once the options are known to be good
    )

    bundle = read_bundle(config.bundle)
    if config.row is not None and not 0 <= config.row < len(bundle.responses):
        raise UserError(f"--row {config.row}: the step has responses 0 to {len(bundle.responses) - 1}")
    replayed = replay(bundle, config.model)
    equal = report(bundle, replayed)
    if replayed.bad is None:
        rows = ledger(bundle, replayed.terms, replayed.policy.tokenizer)
        report_ledger(rows, replayed.loss)
        if config.row is not None:
            print("\n" + explain_response(bundle, rows, config.row))
        if config.ledger:
            write_csv(Path(config.ledger), rows)
        if config.html:
            write_html(Path(config.html), bundle, rows, replayed.policy.tokenizer)
    elif config.row is not None or config.html or config.ledger:
        print("--row, --html and --ledger need terms that are finite: nothing was written for them")
    if not equal:
        raise SystemExit(1)


def report(bundle, replayed) -> bool:
    """Print recorded beside replayed; returns whether the replay tells the recorded story."""
    print(
        f"{bundle.path}: step {bundle.step}, update {bundle.update}; {len(bundle.responses)} responses, "
        f"{bundle.denominators.n_tokens:g} trained tokens, {len(bundle.ranks)} rank(s); {bundle.config.model}"
    )
    if bundle.problem:
        print(f"recorded    stopped: {bundle.problem}")
    if replayed.bad is not None:
        rank, micro, token = replayed.bad
        response = bundle.ranks[rank].responses[micro.rows[token.row]]
        found = f"puzzle {response['puzzle_id']}, response {response['response']}, token {token.position + 1}"
        print(f"replayed    {found}: {token}")
        return bundle.problem is not None and bundle.problem.startswith(f"{found} of ")
    if bundle.problem:
        print(f"replayed    loss {replayed.loss:.9g}, gradient norm {replayed.grad_norm:.9g}")
        return not math.isfinite(replayed.grad_norm)
    recorded = bundle.recorded
    for name, now in (
        ("loss", replayed.loss),
        ("grad_norm", replayed.grad_norm),
        ("gradient_hash", replayed.gradient_hash),
    ):
        before = recorded[name]
        same = "equal" if before == now else f"DIFFERS{'' if isinstance(now, str) else f' by {now - before:.3g}'}"
        shown = (f"{before:.9g}", f"{now:.9g}") if isinstance(now, float) else (before, now)
        print(f"{name:14} recorded {shown[0]:>18}   replayed {shown[1]:>18}   {same}")
    for name, difference in (("reference", replayed.reference_difference), ("old", replayed.old_difference)):
        if difference is not None:
            print(f"{name} log-probs computed again: largest difference {difference:.3g}")
    if not replayed.equals(bundle):
        import torch

        print(
            f"recorded with torch {bundle.versions.get('torch')} on {len(bundle.ranks)} rank(s), now torch "
            f"{torch.__version__}: other versions, GPUs or more than two ranks round differently"
        )
    return replayed.equals(bundle)


def report_ledger(rows: list[dict[str, Any]], loss: float) -> None:
    """The sums of the ledger that mean something."""
    from trainer.inspect.ledger import contributions_by, total_contribution

    exact = total_contribution(rows)
    print(
        f"ledger: {sum(row['mask'] for row in rows)} trained tokens, shares sum to {exact:.9g} in float64 (the float32 step's "
        f"own sum is {exact - loss:.2g} off)"
    )
    by_clip = contributions_by(rows, "clip")
    print("  by clip: " + ", ".join(f"{name or 'none'} {share:+.6g}" for name, share in sorted(by_clip.items())))
    by_group = sorted(contributions_by(rows, "puzzle_id").items(), key=lambda item: -abs(item[1]))
    print("  groups with the largest shares: " + ", ".join(f"{name} {share:+.6g}" for name, share in by_group[:3]))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """The ledger as a table; whole or not at all."""
    with replacing(path) as partial, open(partial, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def write_html(path: Path, bundle, rows: list[dict[str, Any]], tokenizer) -> None:
    """The page of the step."""
    from eval.report.stepview import step_page

    prompts = {}
    for inputs in bundle.ranks:
        for micro in inputs.micro_batches:
            places = iter(micro.rows)
            for prompt, responses in micro.groups:
                for _ in responses:
                    prompts[inputs.responses[next(places)]["puzzle_id"]] = tokenizer.decode(prompt)
    names = ("advantage", "clip_low", "clip_high", "dual_clip", "beta", "kl_kind", "aggregation", "correction")
    settings = {name: getattr(bundle.config, name) for name in names}
    write_whole(path, step_page(bundle.step, settings, bundle.responses, rows, prompts))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
