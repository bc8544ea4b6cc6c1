"""Settings of the training loops: flat frozen dataclasses; launch/options.py makes flags and recipe keys of the fields."""

import datetime
import importlib.util
import re
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from data.errors import UserError
from data.options import DTYPES, check_numbers, flag_of, option, settle_dtype
from trainer.objective import AGGREGATIONS, CORRECTIONS, SURROGATES

# --help lists the settings under these headings
run = partial(option, section="Run")
sampling = partial(option, section="Sampling")
rewarding = partial(option, section="Reward")
objective = partial(option, section="Objective")
optimizing = partial(option, section="Optimizer")
validating = partial(option, section="Validation")
weights = partial(option, section="Adapter and base model")
speed = partial(option, section="Speed and memory")
ranks = partial(option, section="Several ranks")
fit = partial(option, section="Dry run: does it fit")

# --preset: what each program's objective is, as values of the settings below; recipe keys and flags win over a preset.
#   paper  Cell-o1 Eq. (1) and appendix B.3
#   verl   verl's defaults with the KL loss of its GRPO examples; near the authors' run (its
#          token-mean is within micro-batches of 2, its low_var without +-20)
#   trl    TRL's GRPOConfig defaults (loss_type "dapo", sampler correction "sequence_mask")
PRESETS: dict[str, dict[str, Any]] = {
    "advantage": {"paper": "grpo", "verl": "grpo", "trl": "grpo"},
    "advantage_eps": {"paper": 1e-6, "verl": 1e-6, "trl": 1e-4},
    "surrogate": {"paper": "clip", "verl": "clip", "trl": "clip"},
    "ratio_level": {"paper": "token", "verl": "token", "trl": "token"},
    "clip_low": {"paper": 0.2, "verl": 0.2, "trl": 0.2},
    "clip_high": {"paper": 0.2, "verl": 0.2, "trl": 0.2},
    "dual_clip": {"paper": None, "verl": 3.0, "trl": None},  # verl's clip_ratio_c
    "beta": {"paper": 0.001, "verl": 0.001, "trl": 0.0},
    "kl_kind": {"paper": "low_var", "verl": "low_var", "trl": "k3"},
    "aggregation": {"paper": "seq-mean-token-mean", "verl": "token-mean", "trl": "token-mean"},
    "correction": {"paper": "none", "verl": "none", "trl": "seq-mis"},
    "correction_cap": {"paper": 2.0, "verl": 2.0, "trl": 3.0},
    "correction_floor": {"paper": 0.0, "verl": 0.0, "trl": 0.0},
}


def preset_values(name: str) -> dict[str, Any]:
    """{setting: value} of a preset."""
    return {setting: values[name] for setting, values in PRESETS.items()}


LOGGERS = ("tensorboard", "wandb", "trackio", "mlflow")
"""Values of --log, and the names of their packages (trainer/record/steplog.py)."""

RANGES = {
    "at least 0": (
        *("lora_rank", "warmup_steps", "weight_decay", "patience", "save_every", "reward_workers"),
        *("max_staleness", "restart_samplers", "nodes", "ranks_per_node", "rank_gib", "clip_high", "correction_floor"),
        *("distill_failures", "decay_steps", "eval_every", "stop_loss"),
    ),
    "at least 1": (
        *("keep_checkpoints", "micro_tokens", "epochs", "batch_size", "max_tokens", "eval_puzzles"),
        *("eval_response_tokens", "steps", "prompts_per_step", "max_prompt_tokens", "max_response_tokens"),
        *("sampler_ranks", "tensor_parallel", "validate_every", "oversample"),
    ),
    "above 0": ("lr", "grad_clip", "hang_seconds", "reward_seconds", "correction_cap"),
    "above 0 and at most 1": ("memory_fraction", "top_p"),
    "at least 0 and below 1": ("holdout", "overlong_buffer"),
    "at least 0 and at most 65535": ("sync_port",),
    "above 0: the adapter's update is multiplied by it": ("lora_alpha",),
    "at least 0.01: vLLM samples at 0.01 what is lower, and the trainer's log-probs would be others": ("temperature",),
    "at least 1e-12: a group of equal rewards would divide 0 by 0": ("advantage_eps",),
    "at least 0 and at most 1: no ratio is below 0": ("clip_low",),
    "above 1: it bounds what the clip lets through": ("dual_clip",),
    "at least 0: a negative weight would pay for leaving the reference": ("beta",),
}
"""What a number may be, and why -> the settings."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the cold start and GRPO share: the adapter, the optimizer, precision and memory, checkpoints."""

    resume: bool = run(False, "Go on from the newest checkpoint in OUT.")
    date: str = run(
        "",
        "Day (2026-11-26) that a chat template with a date shows; default: the day the run begins, kept by --resume.",
    )
    lora_rank: int = weights(256, "LoRA rank on all linear layers; 0 trains (and GRPO ships) every weight.")
    lora_alpha: float = weights(512.0, "LoRA alpha; the update is scaled by alpha / rank.")
    warmup_steps: int = optimizing(0, "Steps of linear warm-up.")
    grad_clip: float = optimizing(1.0, "Largest gradient norm.")
    optimizer: str = optimizing("adamw", "AdamW, or with its moments in 8 bits (bitsandbytes).", ("adamw", "adamw8bit"))
    micro_tokens: int = speed(16384, "Packed tokens per forward pass.")
    dtype: str = weights(
        "auto",
        "Base weights and compute; LoRA weights stay float32. auto: bfloat16 on a GPU, float32 on a CPU or where every "
        "weight is trained.",
        DTYPES,
    )
    autocast: bool = weights(False, "Matrix products in bfloat16; always so for LoRA on bfloat16 weights.")
    attn: str = speed(
        "auto",
        "Attention kernels: PyTorch's own, or those of flash-attn-4 or flash-attn (GPU). auto: the latter where they are "
        "installed and give PyTorch's numbers.",
        ("auto", "sdpa", "flash"),
    )
    quantize: str = weights(
        "none", "Hold the base in 4 bits (QLoRA); vLLM samples from the same rounded weights.", ("none", "nf4")
    )
    checkpointing: bool = speed(False, "Compute activations again in backward instead of keeping them.")
    keep_attention: bool = speed(False, "With --checkpointing: keep attention's outputs, and do not compute it again.")
    memory_fraction: float = sampling(0.4, "Share of GPU memory given to vLLM.")
    eager: bool = sampling(False, "vLLM on a GPU: no compiling, no CUDA graphs; it starts sooner and samples slower.")
    keep_checkpoints: int = run(2, "Newest checkpoints kept.")
    hang_seconds: float = run(1800.0, "A rank without progress for so long is named, and the run ends.")
    notify: str = run(
        "",
        "Shell command for the end of the run, also a failed or killed one; it gets RUN_OUT, RUN_STATE, RUN_ERROR, ...",
    )

    @property
    def described_gpu(self) -> bool | None:
        """True for a machine with GPUs that --dry-run describes; None: the machine is this one."""
        return None

    @property
    def compute_dtype(self) -> str:
        """Of matrix products in the trainer."""
        return "bfloat16" if self.autocast else self.dtype

    def __post_init__(self) -> None:
        """Raises UserError for a setting out of range, or settings of weights and optimizer that exclude one another."""
        settle_dtype(self, every_weight=not self.lora_rank, on_gpu=self.described_gpu)
        check_numbers(self, RANGES)
        if self.date:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError:
                raise UserError(f"--date {self.date}: write the day as 2026-11-26") from None
        for name, used in (
            (f"--quantize {self.quantize}", self.quantize != "none"),
            (f"--optimizer {self.optimizer}", self.optimizer == "adamw8bit"),
        ):
            if used and importlib.util.find_spec("bitsandbytes") is None:
                raise UserError(f"{name}: the package is not installed; pip install bitsandbytes")
        if self.keep_attention and not self.checkpointing:
            raise UserError("--keep-attention: without --checkpointing everything is kept; add that, or leave this out")
        if self.quantize != "none" and not self.lora_rank:
            raise UserError(
                f"--quantize {self.quantize}: trains an adapter on a frozen base, so --lora-rank must be above 0"
            )


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(TrainingConfig):
    """What GRPO and PPO share: both train on responses that the policy samples, scored by a reward."""

    algorithm: ClassVar[str]

    model: str | None = run(None, "Checkpoint folder to start from, and the reference; default: the embedded one.")
    puzzles: str | None = run(None, "Training puzzles, .parquet or .jsonl; default: the embedded simulated ones.")
    out: str = run("runs/grpo", "Run folder.")
    curriculum: str | None = run(
        None,
        "Each pass over the puzzles goes from easy to hard: FILE has several answers to each training puzzle "
        "(predictions.jsonl of launch/evaluate.py --samples 8), and the share that is right says how easy it is.",
    )
    validate: str | None = validating(
        None,
        "Held-out puzzles, .parquet or .jsonl, that greedy answers are measured on during the run (launch/hold_out.py "
        "makes some). Puzzles that share a donor with training are refused, and so are the test puzzles of a build: what is "
        "chosen by them is no test any more.",
    )
    validate_every: int = validating(20, "Steps between validations.")
    keep_best: bool = validating(
        False,
        "Keep the checkpoint with the best batch accuracy in --validate beside the newest ones; OUT/best points to it.",
    )
    steps: int = run(100, "Steps in all: batches that are sampled, scored and trained on.")
    seed: int = run(0, "Every random choice: prompt order, sampling, LoRA initialisation.")
    engine: str = sampling("vllm", "Sampler: vLLM, or the trainer's own model in plain PyTorch.", ("vllm", "torch"))
    placement: str = ranks(
        "colocate", "Every rank trains and samples, or the last --sampler-ranks only sample.", ("colocate", "split")
    )
    sampler_ranks: int = ranks(1, "Ranks that sample under --placement split.")
    tensor_parallel: int = ranks(1, "Neighbouring ranks that form one vLLM sampler.")
    max_staleness: int = ranks(0, "Steps that sampling may run ahead (split); above 0 it needs a --correction.")
    restart_samplers: int = ranks(0, "Times a sampler that died is started again (split); 0 stops the run.")
    sync_host: str | None = ranks(None, "Interface (eth0) or address where samplers meet rank 0; default: MASTER_ADDR.")
    sync_port: int = ranks(0, "Port for that; 0 takes a free one.")
    shard: str = ranks("none", "Every rank holds the model, or its share of every layer (FSDP2).", ("none", "fsdp"))
    dry_run: bool = fit(False, "Check settings, world and memory, print the table, and stop before a model is loaded.")
    nodes: int = fit(0, "For --dry-run: nodes of the machine to check for; 0: the launch's own.")
    ranks_per_node: int = fit(0, "For --dry-run: GPUs (ranks) of a node; 0: the launch's own.")
    rank_gib: float = fit(0.0, "For --dry-run: memory of a rank in GiB; 0: what is free here.")
    reward: str = rewarding(
        "reward.cellpuzzles:batch_reward",
        "module:function or file.py:function of (completion, puzzle); trl:... and verl:... take functions in those styles.",
    )
    reward_workers: int = rewarding(1, "Processes that score, per rank; 0 scores in the trainer (to debug a reward).")
    reward_seconds: float = rewarding(60.0, "Time limit per response (needs a worker process).")
    score_last: bool = rewarding(
        False,
        "Score no response before all are sampled: for a reward that needs the cores, or the GPU's memory, which vLLM has "
        "while it samples.",
    )
    on_reward_error: str = rewarding(
        "stop",
        "When the reward of a response fails or takes too long: stop, or drop it from its group.",
        ("stop", "drop"),
    )
    overlong_buffer: float = rewarding(
        0.0,
        "Soft over-long penalty (DAPO): over this last share of --max-response-tokens the reward falls by up to 1; 0: none.",
    )
    insist: bool = rewarding(False, "Go on when no response of the first step has a valid format, or all were cut.")
    prompts_per_step: int = sampling(64, "Prompts per batch, over all ranks (P).")
    group_size: int = sampling(5, "Responses per prompt (G).")
    temperature: float = sampling(1.0, "Sampling temperature; log-probs are taken at the same temperature.")
    top_p: float = sampling(1.0, "Nucleus sampling mass.")
    base: str = weights(
        "auto",
        "Trainer and vLLM read one copy of the frozen base, or each has its own; auto: one where it can be, on a GPU.",
        ("auto", "shared", "copies"),
    )
    sampler_lora: str = sampling(
        "auto",
        "vLLM adds the adapter to its weights, or computes it beside them; auto: merged on a CPU on a float32 --base of its own.",
        ("auto", "merged", "kernel"),
    )
    sampler_dtype: str = sampling(
        "auto", "vLLM's weights and products; auto: --dtype, but on a CPU bfloat16 with --autocast.", DTYPES
    )
    max_prompt_tokens: int = sampling(3072, "Longer prompts are left out and counted.")
    max_response_tokens: int = sampling(3000, "Responses are cut here (and score as truncated).")
    lr: float = optimizing(1e-6, "Learning rate: constant after warm-up, until --decay-steps.")
    decay_steps: int = optimizing(0, "Last N of the --steps (or all), in which the rate falls evenly to 1/N; 0: none.")
    weight_decay: float = optimizing(0.01, "AdamW weight decay.")
    clip_low: float = objective(0.2, "Ratios are clipped at 1 - clip_low.")
    clip_high: float = objective(0.2, "Ratios are clipped at 1 + clip_high.")
    surrogate: str = objective(
        "clip",
        "PPO's clipped surrogate, whose clipped tokens have no gradient, or CISPO's, where every token keeps its gradient, "
        "weighted by the clipped ratio.",
        SURROGATES,
    )
    dual_clip: float | None = objective(None, "Bound c of dual clip for negative advantages; default off.")
    ratio_level: str = objective("token", "Importance ratio per token (PPO) or sequence (GSPO).", ("token", "sequence"))
    beta: float = objective(0.001, "Weight of the KL to the adapter-off reference; 0 makes no reference pass.")
    kl_kind: str = objective("low_var", "KL estimator.", ("k1", "k2", "k3", "low_var"))
    aggregation: str = objective("seq-mean-token-mean", "How per-token losses become one number.", AGGREGATIONS)
    correction: str = objective("none", "Sampler-mismatch weight, truncated or masked.", CORRECTIONS)
    correction_cap: float = objective(2.0, "Cap of the sampler-mismatch weight.")
    correction_floor: float = objective(0.0, "Smallest weight that mis and seq-mis keep.")
    packing: str = speed(
        "shared", "Responses share their prompt in the forward pass, or each has a copy.", ("shared", "plain")
    )
    entropy: bool = objective(False, "Also report the policy's exact entropy per token (a pass over the logits more).")
    save_every: int = run(20, "Steps between checkpoints; the last step always saves.")
    save_steps: str = run("never", "Steps kept for launch/replay.py in OUT/steps: never, every:10, or 3,17.")
    tensorboard: bool = run(False, "The same as --log tensorboard.")
    log: str = run(
        "",
        "Loggers that get every number too, separated by commas: tensorboard, wandb, trackio, mlflow; each library's own "
        "environment variables say where to, and offline.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, {"at least 1": ("save_every",)})
        self._check_placement()
        if self.correction_floor > self.correction_cap:
            raise UserError(
                f"--correction-floor {self.correction_floor}: above --correction-cap {self.correction_cap}, so no weight is "
                "between them; lower it"
            )
        if unknown := [name for name in self.loggers if name not in LOGGERS]:
            raise UserError(f"--log {self.log}: '{unknown[0]}' is not one of {', '.join(LOGGERS)}")
        for name in self.loggers:
            if importlib.util.find_spec(name) is None:
                raise UserError(f"--log {name}: the package is not installed; pip install {name}")
        if self.keep_best and not self.validate:
            raise UserError("--keep-best: the best in what? Name held-out puzzles with --validate")
        if self.surrogate != "clip" and self.dual_clip is not None:
            raise UserError(
                f"--dual-clip {self.dual_clip}: is for --surrogate clip; unset it (in a recipe, dual_clip: null)"
            )
        self.keeps_step(1)  # a value that cannot be read is refused here, and not in step 1

    @property
    def described_gpu(self) -> bool | None:
        """See TrainingConfig. Memory of a rank is given for GPUs only."""
        return True if self.dry_run and self.rank_gib else None

    @property
    def loggers(self) -> tuple[str, ...]:
        """Names of --log and --tensorboard, each once."""
        named = [name.strip() for name in self.log.split(",") if name.strip()]
        return tuple(dict.fromkeys([*["tensorboard"] * self.tensorboard, *named]))

    @property
    def loss_beta(self) -> float:
        """Weight of the KL in the loss."""
        return self.beta

    @property
    def ranks_apart(self) -> int:
        """Ranks of the launch that only sample."""
        return self.sampler_ranks if self.placement == "split" else 0

    def sequences(self, trainers: int) -> int:
        """Responses that one sampler samples in a step. trainers: ranks that train."""
        samplers = (self.sampler_ranks if self.placement == "split" else trainers) // self.tensor_parallel
        return -(-self.prompts_per_step // max(1, samplers)) * self.group_size

    def _check_placement(self) -> None:
        """Raises UserError for settings that exclude one another."""
        if self.placement == "colocate":
            for name, unset in (("max_staleness", 0), ("restart_samplers", 0), ("sampler_ranks", 1)):
                if getattr(self, name) != unset:
                    raise UserError(f"{flag_of(name)} {getattr(self, name)}: needs --placement split")
        elif self.sampler_ranks % self.tensor_parallel:
            raise UserError(
                f"--sampler-ranks {self.sampler_ranks}: must be a multiple of --tensor-parallel {self.tensor_parallel}"
            )
        if self.engine == "vllm" and self.top_p < 1 and self.temperature != 1:
            raise UserError(
                f"--top-p {self.top_p} and --temperature {self.temperature}: vLLM then reports log-probs of a distribution "
                "that the trainer does not score; leave one of them at 1, or use --engine torch"
            )
        for name, unset in (("tensor_parallel", 1), ("sampler_dtype", "auto")):
            if self.engine == "torch" and getattr(self, name) != unset:
                raise UserError(f"{flag_of(name)} {getattr(self, name)}: needs --engine vllm")
        if self.shard == "fsdp" and (self.quantize != "none" or self.optimizer == "adamw8bit"):
            name = f"--quantize {self.quantize}" if self.quantize != "none" else f"--optimizer {self.optimizer}"
            raise UserError(f"{name}: cannot be sharded; use --shard none")
        if self.max_staleness and self.correction == "none":
            raise UserError(
                f"--max-staleness {self.max_staleness}: the rollouts are of an older policy, which the loss must correct for; "
                "add --correction tis"
            )

    def keeps_step(self, step: int) -> bool:
        """Does --save-steps ask for a bundle of this (1-based) step? Raises UserError when it cannot be read."""
        if self.save_steps == "never":
            return False
        if every := re.fullmatch(r"every:([1-9]\d*)", self.save_steps):
            return step % int(every[1]) == 0
        if re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.save_steps):
            return str(step) in self.save_steps.split(",")
        raise UserError(f"--save-steps {self.save_steps}: write never, every:10 or a list of steps such as 3,17")


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(OnlineConfig):
    """Group relative policy optimisation; the defaults of the objective are the paper's (Cell-o1 Eq. 1, appendix B.3)."""

    presets: ClassVar = staticmethod(preset_values)  # for launch/options.py
    algorithm: ClassVar[str] = "GRPO"

    preset: str = run(
        "paper", "Sets the whole objective at once; other flags and recipe keys win.", ("paper", "verl", "trl")
    )
    updates_per_batch: int = optimizing(1, "Optimizer steps per sampled batch; 1 is on-policy, the ratio is exactly 1.")
    advantage: str = objective("grpo", "Group advantage estimator.", ("grpo", "dr_grpo", "rloo"))
    advantage_eps: float = objective(1e-6, "Added to the group's standard deviation.")
    distill_failures: float = objective(
        0.0,
        "Weight of a second loss in a wrong response whose group has a right one: at each token, the reverse KL of the policy "
        "to itself when it is shown the right one; 0: off (trainer/prompts/failures.py).",
    )
    distill_schedule: str = objective(
        "constant", "That weight over the run: the same, or falling evenly to 0 over --steps.", ("constant", "linear")
    )
    oversample: int = sampling(
        1,
        "Dynamic sampling (DAPO): groups of equal rewards, which teach nothing, are replaced by groups of other prompts until "
        "a batch is full or this many times --prompts-per-step were asked; 1: off.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = "at least 2: a response alone has none to be compared with, and nothing would be learnt"
        check_numbers(self, {alone: ("group_size",), "at least 1": ("updates_per_batch",)})
        if self.distill_schedule != "constant" and not self.distill_failures:
            raise UserError(
                f"--distill-schedule {self.distill_schedule}: of what weight? Give it with --distill-failures, such as 0.1"
            )
        if self.oversample > 1 and self.max_staleness:
            raise UserError(
                f"--oversample {self.oversample} and --max-staleness {self.max_staleness}: groups that come later would be of a "
                "newer policy than the batch; leave one of them out"
            )
        if self.prompts_per_step % self.updates_per_batch:
            raise UserError(
                f"--prompts-per-step {self.prompts_per_step} and --updates-per-batch {self.updates_per_batch}: "
                "the second must divide the first"
            )
