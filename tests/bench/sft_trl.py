"""One SFT optimizer step as TRL 1.16.0's SFTTrainer makes it: the other side of tests/bench/sft.py.

Needs trl, datasets, multiprocess and xxhash beside our own packages. transformers' own `_run_epoch` drives the step:
the dataset is the traces of one optimizer step, so an epoch is the passes of one step. The loss is completion-only, on
given token ids. Nothing is logged, saved or sent.
"""

import warnings
from dataclasses import dataclass

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers.trainer_callback import PrinterCallback

with warnings.catch_warnings():  # about the version of vLLM, which is not used here
    warnings.simplefilter("ignore", UserWarning)
    import trl.trainer.utils
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

from trainer.logprobs import fused_logprobs
from trainer.model.loading import load_tokenizer

MANY_STEPS = 1_000_000
WAYS = ("padded", "grouped", "padding-free", "packing")
HEADS = ("own", "changed", "ours")
TRL_CHOICE, TRL_HEAD = trl.trainer.utils._use_triton, trl.trainer.utils._ChunkedLogProbFunction


@dataclass(frozen=True, kw_only=True)
class TrlSettings:
    """How TRL makes its step."""

    way: str
    """padded: in the given order, padded to the longest trace of a pass. grouped: the same, sorted by length
    (group_by_length). padding-free: the traces of a pass end to end. packing: TRL's packing into rows of
    `row_tokens`."""
    micro_batch: int
    """Traces, or rows of packed traces, per pass."""
    head: str
    """own: TRL unchanged; on a CPU it scores prompts and padding too, in plain PyTorch operations. changed: response
    tokens only, as TRL always does on a GPU. ours: response tokens only, with our fused head and without TRL's
    metrics."""
    lora_rank: int
    lr: float
    betas: tuple[float, float]
    grad_clip: float
    row_tokens: int
    checkpointing: bool
    dtype: str = "float32"


class TrlStep:
    """TRL's SFTTrainer on the traces of one optimizer step.

    adapter: file of LoRA weights to start from, under the names of `Policy.adapter_tensors`. The choice of a head holds
    for the whole process, until the next TrlStep.
    """

    def __init__(
        self, model_dir: str, traces: list[tuple[list[int], list[int]]], settings: TrlSettings, out: str, adapter: str
    ) -> None:
        assert settings.way in WAYS and settings.head in HEADS
        # in this module the name only decides which positions are scored; the kernels read their own copy of it
        trl.trainer.utils._use_triton = TRL_CHOICE if settings.head == "own" else lambda device: True
        trl.trainer.utils._ChunkedLogProbFunction = _OurHead if settings.head == "ours" else TRL_HEAD
        rows = {
            "input_ids": [prompt + response for prompt, response in traces],
            "completion_mask": [[0] * len(prompt) + [1] * len(response) for prompt, response in traces],
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer = _Stepper(
                model_dir,
                args=_config(settings, len(traces), out),
                train_dataset=Dataset.from_dict(rows),
                processing_class=load_tokenizer(model_dir),
                peft_config=LoraConfig(
                    r=settings.lora_rank,
                    lora_alpha=2 * settings.lora_rank,
                    target_modules="all-linear",
                    task_type="CAUSAL_LM",
                ),
            )
        self.trainer.remove_callback(PrinterCallback)
        tensors = load_file(adapter)
        trainable = {
            n.replace(".default.", "."): p for n, p in self.trainer.model.named_parameters() if p.requires_grad
        }
        assert trainable.keys() == tensors.keys(), "the two sides train other parameters"
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(tensors[name])
        self.trainer.train()  # does all of TRL's preparation but makes no step: see _Stepper

    def step(self) -> dict[str, float]:
        """Collate, forward, backward, clip, AdamW: {"loss", "norm" before clipping, "positions" of all passes}."""
        self.trainer.optimizer_step()
        return {
            "loss": self.trainer._tr_loss.item(),
            "norm": float(self.trainer.gradient_norm),
            "positions": self.trainer.positions,
        }


class _Stepper(SFTTrainer):
    """An SFTTrainer whose `train` stops before the first epoch; optimizer_step() then makes one epoch, one step."""

    gradient_norm: torch.Tensor | float = 0.0
    positions = 0
    """Tokens and padding of the last step's forward passes."""
    epoch_arguments: dict | None = None

    def _run_epoch(self, **arguments) -> None:
        self.epoch_arguments = arguments
        self.control.should_training_stop = True

    def optimizer_step(self) -> None:
        before, self.positions = self.state.global_step, 0
        self._tr_loss.zero_()
        self.control.should_training_stop = False
        super()._run_epoch(**{**self.epoch_arguments, "epoch": before})
        assert self.state.global_step == before + 1, "an epoch was not one optimizer step"

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        self.gradient_norm = super()._clip_grad_norm(model)
        return self.gradient_norm

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.positions += inputs["input_ids"].numel()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _send_telemetry(self) -> None:
        """Send nothing."""


class _OurHead:
    """Our fused head in place of TRL's own. Entropy and accuracy, which TRL only reports, are zeros."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, *_) -> tuple:
        assert bias is None
        logprobs = fused_logprobs(hidden, weight, targets, temperature)
        nothing = torch.zeros_like(logprobs, requires_grad=False)
        return logprobs, nothing, None, None, nothing.bool()


def _config(settings: TrlSettings, n_traces: int, out: str) -> SFTConfig:
    """Our settings as TRL's."""
    packs = settings.way == "packing"
    assert packs or n_traces % settings.micro_batch == 0
    return SFTConfig(
        output_dir=out,
        # one optimizer step sees all traces; packed they are fewer rows, and the last step of an epoch takes what is
        # left
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=n_traces if packs else n_traces // settings.micro_batch,
        max_steps=MANY_STEPS,
        train_sampling_strategy="group_by_length" if settings.way == "grouped" else "sequential",
        dataloader_num_workers=0,
        # the objective
        completion_only_loss=True,
        packing=packs,
        padding_free=settings.way == "padding-free",
        max_length=settings.row_tokens if packs else None,
        # the optimizer: transformers' default is fused AdamW
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        weight_decay=0.0,
        max_grad_norm=settings.grad_clip,
        # the machine
        use_cpu=not torch.cuda.is_available(),
        model_init_kwargs={"dtype": settings.dtype},
        bf16=settings.dtype == "bfloat16",
        gradient_checkpointing=settings.checkpointing,
        # no other work
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
