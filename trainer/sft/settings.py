"""Settings of the cold start."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.errors import UserError
from data.options import option
from trainer.config import TrainingConfig, optimizing, run, speed, weights

examples = partial(option, section="Traces")


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainingConfig):
    """Supervised cold start on accepted traces."""

    traces: str = run(dataclasses.MISSING, "JSONL of accepted traces (launch/distill.py).")
    model: str = run(dataclasses.MISSING, "Folder of the Hugging Face checkpoint to start from.")
    out: str = run(dataclasses.MISSING, "Run folder; the trained checkpoint is OUT/model.")
    labels: str | None = run(None, "labels.json of the traces' puzzles, kept with OUT/model; default: beside --traces.")
    target: str = examples(
        "trace",
        "What is learned: the whole trace, or the answer alone with nothing thought (the paper's instruction tuning).",
        ("trace", "answer"),
    )
    dora: bool = weights(
        False, "Weight-decomposed LoRA (DoRA), as the authors' script has it; vLLM cannot serve it unmerged."
    )
    epochs: int = run(10, "Passes over the traces.")
    batch_size: int = optimizing(128, "Traces per optimizer step.")
    lr: float = optimizing(5e-5, "Peak learning rate; linear warm-up, then cosine to a tenth.")
    weight_decay: float = optimizing(0.0, "AdamW weight decay.")
    max_tokens: int = examples(8192, "Longest prompt + response; a longer trace is never cut.")
    overlong: str = examples(
        "skip", "Traces that are too long are left out and counted, or refused.", ("skip", "refuse")
    )
    micro_tokens: int = speed(8192, "Packed tokens per forward pass.")
    holdout: float = examples(0.1, "Share of the puzzles kept out, to evaluate after each epoch; 0 keeps none.")
    eval_every: int = examples(0, "Also evaluate them every so many steps; 0: after each epoch alone.")
    stop_loss: float = examples(
        0.0,
        "Stop at the first evaluation whose eval_loss (nats per token) is at most this; 0: never. Where the loss falls "
        "late and fast, the step at which it falls differs from machine to machine.",
    )
    eval_engine: str = examples(
        "none", "Also answer the held-out puzzles at each evaluation and report the five metrics.", ("none", "vllm")
    )
    eval_puzzles: int = examples(100, "Held-out puzzles answered at most.")
    eval_response_tokens: int = examples(3000, "Longest answer to them.")
    patience: int = examples(
        0,
        "Stop after so many epochs without a lower eval_loss at their end and keep the best epoch's weights; 0: never.",
    )
    save_every: int = run(0, "Steps between checkpoints; 0: one after each epoch. The last step always saves.")
    seed: int = run(0, "Order of the traces and LoRA initialisation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.traces).resolve() == (Path(self.out) / "traces.json").resolve():
            raise UserError(f"--out {self.out}: would write over --traces {self.traces}; name another folder")
        if self.dora and not self.lora_rank:
            raise UserError("--dora: trains an adapter, so --lora-rank must be above 0")
        if self.dora and self.eval_engine == "vllm":
            raise UserError("--eval-engine vllm: vLLM cannot serve a DoRA adapter; leave out --dora, or --eval-engine")
        if not self.holdout and (needs := self.needs_held_out()):
            raise UserError(f"--holdout 0: keeps no puzzle for {needs}; give a share above 0")

    def needs_held_out(self) -> str:
        """The settings in use that ask something of the held-out puzzles, as a sentence has them; "" for none."""
        flags = {
            "--patience": self.patience,
            "--eval-every": self.eval_every,
            "--stop-loss": self.stop_loss,
            "--eval-engine": self.eval_engine != "none",
        }
        return ", ".join(flag for flag, used in flags.items() if used)
