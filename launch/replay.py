"""Replay one optimizer step from its bundle, on the CPU, in one process: loss, gradient, and every token's share.

python launch/grpo.py --save-steps every:10 ...           # leaves OUT/steps/step-000010
python launch/replay.py runs/grpo/steps/step-000010
python launch/replay.py runs/grpo/steps/step-000010 --row 3 --html step.html --ledger tokens.csv
python -m pdb -c "import trainer.grpo" -c "b trainer.grpo.loss_terms" -c c launch/replay.py runs/grpo/steps/step-000010
"""

from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError
from data.files import write_whole
from launch.options import argument, command, option

SETTINGS_SHOWN = (
    *("advantage", "gamma", "lam", "kl_in", "clip_low", "clip_high", "dual_clip", "beta", "kl_kind", "aggregation"),
    "correction",
)


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    bundle: str = argument("Folder of a step bundle: OUT/steps/step-000010.")
    model: str | None = option(None, "Base checkpoint, where it has moved since the run.")
    row: int | None = option(None, "Explain this response of the step (from 0): the formulas with their values.")
    html: str | None = option(
        None, "Write a page with every token coloured by advantage, ratio, KL or share of the loss."
    )
    ledger: str | None = option(None, "Write the loss ledger, one row per token, as .csv.")
    value_ledger: str | None = option(None, "Write the ledger of the critic's loss (PPO), one row per token, as .csv.")


@command(ReplayConfig)
def main(config: ReplayConfig) -> None:
    """Compute a recorded step again. Exit code 1 unless loss and gradient equal the record bit for bit."""
    for flag, path in (("--ledger", config.ledger), ("--value-ledger", config.value_ledger)):
        if path and not path.endswith(".csv"):
            raise UserError(f"{flag} {path}: name a file that ends in .csv")

    # torch and transformers take seconds to load: not before the options are known to be good
    from eval.report.stepview import step_page
    from trainer.config import GrpoConfig
    from trainer.inspect.comparison import (
        compare_with_recorded,
        ledger_lines,
        prompts_of,
        value_ledger_lines,
        write_ledger,
    )
    from trainer.inspect.explain import explain_response, share_formula
    from trainer.inspect.ledger import ledger, value_ledger
    from trainer.inspect.replay import replay
    from trainer.ppo.settings import PpoConfig
    from trainer.record.bundle import read_bundle

    bundle = read_bundle(config.bundle, (GrpoConfig, PpoConfig))
    if config.value_ledger and not bundle.critic:
        raise UserError(f"--value-ledger {config.value_ledger}: {config.bundle} is a step of GRPO, which has no critic")
    if config.row is not None and not 0 <= config.row < len(bundle.responses):
        raise UserError(f"--row {config.row}: the step has responses 0 to {len(bundle.responses) - 1}")
    replayed = replay(bundle, config.model)
    lines, equal = compare_with_recorded(bundle, replayed)
    print("\n".join(lines))
    if replayed.first("bad") is None:
        rows = ledger(bundle, replayed.of_policy.terms, replayed.policy.tokenizer)
        print("\n".join(ledger_lines(rows, replayed.of_policy.loss)))
        of_values = []
        if replayed.of_critic:
            of_values = value_ledger(bundle, replayed.of_critic.terms, replayed.policy.tokenizer)
            print("\n".join(value_ledger_lines(of_values, replayed.of_critic.loss)))
        if config.row is not None:
            print("\n" + explain_response(bundle, rows, config.row, of_values))
        if config.ledger:
            write_ledger(Path(config.ledger), rows)
            print(f"wrote {config.ledger}")
        if config.value_ledger:
            write_ledger(Path(config.value_ledger), of_values)
            print(f"wrote {config.value_ledger}")
        if config.html:
            prompts = prompts_of(bundle, replayed.policy.tokenizer)
            settings = {name: getattr(bundle.config, name) for name in SETTINGS_SHOWN if hasattr(bundle.config, name)}
            page = step_page(
                *(bundle.step, settings, bundle.responses, rows, prompts),
                formula=share_formula(bundle.config, any("distillation" in row for row in rows)),
                ppo=isinstance(bundle.config, PpoConfig),
            )
            write_whole(config.html, page)
            print(f"wrote {config.html}")
    elif config.row is not None or config.html or config.ledger or config.value_ledger:
        print("--row, --html and the ledgers need terms that are finite: nothing was written for them")
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
