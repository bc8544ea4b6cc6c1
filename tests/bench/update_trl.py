"""One GRPO optimizer step as TRL 1.16.0 makes it, on given rollouts: the other side of tests/bench/update.py.

Needs trl, datasets, multiprocess and xxhash (and liger-kernel for `liger`) beside our own packages. transformers' own
`_run_epoch` drives the step: an epoch is P prompts with G rows each, N / micro_batch passes, and one optimizer step.
Three things are not TRL's: `rollout_func` (TRL's interface for given rollouts) returns the given tokens, the reward is
a fixed list, and nothing is logged, saved or sent.
"""

import warnings

import torch
from peft import LoraConfig
from torch import Tensor
from transformers.trainer_callback import PrinterCallback

with warnings.catch_warnings():  # about the version of vLLM, which is not used here
    warnings.simplefilter("ignore", UserWarning)
    import trl.trainer.utils
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

from tests.bench.update import fixed_reward
from trainer.model.loading import load_tokenizer
from trainer.packing import Group

MANY_STEPS = 1_000_000
TRL_CHOICE = trl.trainer.utils._use_triton


class TrlStep:
    """TRL's GRPOTrainer with fabricated rollouts.

    groups: (prompt, responses) per prompt, G responses each, N in all. micro_batch: responses per forward pass; divides
    N. liger: Liger's fused GRPO loss instead of TRL's own, as under use_liger_loss, which TRL 1.16 no longer has; on a
    GPU also TRL's use_liger_kernel (Triton kernels inside the layers). adapter: LoRA weights to start from, under the
    names of `Policy.adapter_tensors`. compact: apply the LM head to response tokens only, as TRL always does on a GPU;
    on a CPU it scores prompts and padding too. The choice holds for the whole process, until the next TrlStep. attn:
    transformers' name of an attention kernel.
    """

    def __init__(
        self,
        model_dir: str,
        groups: list[Group],
        *,
        lora_rank: int,
        micro_batch: int,
        checkpointing: bool,
        liger: bool,
        out: str,
        dtype: str = "float32",
        adapter: dict[str, Tensor] | None = None,
        compact: bool = False,
        attn: str = "sdpa",
    ) -> None:
        group_size = len(groups[0][1])
        n_rows = len(groups) * group_size
        assert all(len(responses) == group_size for _, responses in groups) and n_rows % micro_batch == 0
        # in this module the name only decides which positions are scored; the kernels read their own copy of it
        trl.trainer.utils._use_triton = (lambda device: True) if compact else TRL_CHOICE
        rewards = [fixed_reward(group, response) for group in range(len(groups)) for response in range(group_size)]
        rollouts = {
            "prompt_ids": [prompt for prompt, responses in groups for _ in responses],
            "completion_ids": [response for _, responses in groups for response in responses],
            "logprobs": None,
        }
        names = [f"prompt {group}" for group in range(len(groups))]
        expected = [name for name in names for _ in range(group_size)]

        def given(prompts: list[str], trainer: GRPOTrainer) -> dict:
            assert prompts == expected, "TRL asks for the groups in another order"
            return dict(rollouts)

        def reward(**kwargs) -> list[float]:
            return rewards

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rollout_func is experimental, use_liger_kernel deprecated
            self.trainer = _Stepper(
                model_dir,
                reward_funcs=reward,
                args=_config(groups, micro_batch, checkpointing, liger, out, dtype, attn),
                train_dataset=Dataset.from_dict({"prompt": names}),
                processing_class=load_tokenizer(model_dir),
                peft_config=LoraConfig(
                    r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
                ),
                rollout_func=given,
            )
        self.trainer.remove_callback(PrinterCallback)
        if liger:
            self.trainer.liger_loss = _liger_loss(self.trainer.args)
        if adapter is not None:
            with torch.no_grad():
                for name, parameter in self.trainable().items():
                    parameter.copy_(adapter[name.replace(".default.", ".")])
        self.trainer.train()  # does all of TRL's preparation but makes no step: see _Stepper

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """LoRA parameters by name; the names are those of `Policy.trainable`."""
        return {name: p for name, p in self.trainer.model.named_parameters() if p.requires_grad}

    def step(self) -> dict[str, float]:
        """Reference log-probs, forward, backward, clip, AdamW: {"loss", "grad_norm" before clipping}."""
        self.trainer.optimizer_step()
        return {"loss": self.trainer._tr_loss.item(), "grad_norm": float(self.trainer.gradient_norm)}

    def first_gradient(self) -> dict[str, Tensor]:
        """Make the first step and return its gradient by parameter name, before clipping."""
        assert self.trainer.state.global_step == 0, "the first step has been made already"
        self.trainer.gradient = {}
        self.step()
        gradient, self.trainer.gradient = self.trainer.gradient, None
        return gradient


class _Stepper(GRPOTrainer):
    """A GRPOTrainer whose `train` stops before the first epoch; optimizer_step() then makes one epoch, one step."""

    gradient: dict[str, Tensor] | None = None
    """If it is a dict, it is filled with the next step's gradient."""
    gradient_norm: Tensor | float = 0.0
    epoch_arguments: dict | None = None
    liger_loss: torch.nn.Module | None = None

    def _run_epoch(self, **arguments) -> None:
        self.epoch_arguments = arguments
        self.control.should_training_stop = True

    def optimizer_step(self) -> None:
        before = self.state.global_step
        self._tr_loss.zero_()
        self.control.should_training_stop = False
        super()._run_epoch(**{**self.epoch_arguments, "epoch": before})
        assert self.state.global_step == before + 1, "an epoch was not one optimizer step"

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        if self.gradient is not None:
            self.gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.gradient_norm = super()._clip_grad_norm(model)
        return self.gradient_norm

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        if self.liger_loss is None:
            return super()._compute_loss(model, inputs)
        causal_lm, responses = model.get_base_model(), inputs["completion_ids"]
        with self.accelerator.autocast():
            hidden = causal_lm.model(
                input_ids=torch.cat([inputs["prompt_ids"], responses], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                use_cache=False,
            ).last_hidden_state[:, -responses.shape[1] - 1 : -1]
            loss, _ = self.liger_loss(
                hidden,
                causal_lm.lm_head.weight,
                responses,
                inputs["completion_mask"],
                inputs["advantages"],
                ref_per_token_logps=inputs["ref_per_token_logps"],
            )
        return loss / self.current_gradient_accumulation_steps

    def _send_telemetry(self) -> None:
        """Send nothing."""


def _liger_loss(args: GRPOConfig) -> torch.nn.Module:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss(
        beta=args.beta,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon,
        temperature=args.temperature,
        loss_type=args.loss_type,
    )


def _config(
    groups: list[Group], micro_batch: int, checkpointing: bool, liger: bool, out: str, dtype: str, attn: str
) -> GRPOConfig:
    """Our paper preset as TRL's settings. TRL always adds 1e-4 to the standard deviation (ours: --advantage-eps)."""
    group_size = len(groups[0][1])
    return GRPOConfig(
        output_dir=out,
        # one optimizer step sees all N rows
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=len(groups) * group_size // micro_batch,
        num_generations=group_size,
        num_iterations=1,
        max_steps=MANY_STEPS,
        shuffle_dataset=False,
        dataloader_num_workers=0,
        # the objective
        loss_type="grpo",
        beta=0.001,
        use_bias_correction_kl=False,  # TRL's default multiplies the KL by the ratio
        epsilon=0.2,
        temperature=1.0,
        scale_rewards="group",
        mask_truncated_completions=False,
        use_vllm=False,
        max_completion_length=max(len(response) for _, responses in groups for response in responses),
        # the optimizer: transformers' default is fused AdamW
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        # the machine
        use_cpu=not torch.cuda.is_available(),
        model_init_kwargs={"dtype": dtype, "attn_implementation": attn},
        bf16=dtype == "bfloat16",
        gradient_checkpointing=checkpointing,
        use_liger_kernel=liger and torch.cuda.is_available(),
        # no other work
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
