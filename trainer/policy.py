"""The policy: a frozen base model with a LoRA adapter; the reference policy is the same weights with the adapter off.

And what it is asked: prompts as tokens, and which of them a step takes.
"""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MethodType

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from data.puzzles import Puzzle
from rollout import stable_seed
from trainer.config import GrpoConfig
from trainer.logprobs import fused_logprobs
from trainer.packing import ATTENTION, PackedBatch, pack
from trainer.sharding import empty_model, shard
from trainer.world import World, local, rows_of, whole

transformers_logging.disable_progress_bar()  # one line per loaded shard says nothing here


class Policy:
    """model_dir: a Hugging Face checkpoint. lora_rank 0 trains every weight and has no adapter to switch off.

    sharded: over the ranks of the world (FSDP2); then every call below is collective. checkpointing: activations of a layer
    are computed again in backward. frozen: with lora_rank 0, keep the checkpoint's own weights beside as the reference.
    """

    def __init__(
        self, model_dir: str, *, lora_rank: int, lora_alpha: float, seed: int, device: torch.device, dtype: torch.dtype,
        sharded: bool = False, checkpointing: bool = False, frozen: bool = False,
    ) -> None:  # fmt: skip
        self.tokenizer = load_tokenizer(model_dir)
        self.device, self.sharded, self.lora = device, sharded, None
        self.trained: dict[str, torch.nn.Parameter] = {}

        def load() -> PreTrainedModel:
            if sharded:
                return empty_model(model_dir, dtype, ATTENTION)
            return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation=ATTENTION)

        self.model = self.causal_lm = load()
        if lora_rank:
            # PEFT draws lora_A from torch's global generator; lora_B starts at 0, so adapter on == adapter off
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                config = LoraConfig(
                    r=lora_rank, lora_alpha=lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
                )
                self.model = get_peft_model(self.causal_lm, config, low_cpu_mem_usage=sharded)
            targets = sorted(self.model.peft_config["default"].target_modules)
            self.lora = {"r": lora_rank, "lora_alpha": lora_alpha, "target_modules": targets}
        # the reference: the same weights with the adapter off, or the frozen copy
        self.reference_lm = load().requires_grad_(False) if frozen and not lora_rank else self.causal_lm
        for causal_lm in {id(lm): lm for lm in (self.causal_lm, self.reference_lm)}.values():
            causal_lm.packed_logprobs = MethodType(packed_logprobs, causal_lm)
            if checkpointing:
                recompute_layers(causal_lm)
            if sharded:
                shard(causal_lm, model_dir, seed, device, "packed_logprobs")
            causal_lm.to(device).eval()  # dropout stays off: sampler and trainer must agree on every log-prob
        self.model.eval()

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters by name, in a fixed order."""
        if self.sharded or not self.trained:  # sharding swaps the parameter objects
            self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return self.trained

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The adapter under PEFT's file names (`base_model.model....lora_A.weight`), which vLLM reads too, whole on every rank.

        With lora_rank 0: every weight under its checkpoint name.
        """
        return {name.replace(".default.", "."): whole(p.detach()) for name, p in self.trainable().items()}

    def load_adapter(self, tensors: dict[str, Tensor]) -> None:
        """Take over the values of an adapter of the same names and shapes, in place."""
        for name, p in self.trainable().items():
            local(p.detach()).copy_(tensors[name.replace(".default.", ".")][rows_of(p)])

    def response_logprobs(self, batch: PackedBatch, temperature: float = 1.0, reference: bool = False) -> Tensor:
        """[N,T] log-probs of a packed batch's response tokens; 0 where there is no token.

        reference: switch the adapter off and make no graph.
        """
        adapter = self.model.disable_adapter() if reference and self.lora else nullcontext()
        causal_lm = self.reference_lm if reference else self.causal_lm
        with torch.set_grad_enabled(torch.is_grad_enabled() and not reference), adapter:
            logprobs = causal_lm.packed_logprobs(batch, temperature)
        if self.sharded and not logprobs.requires_grad:
            causal_lm.reshard()  # no backward will do it
        return batch.unpack(logprobs)

    def idle_pass(self, reference: bool = False) -> None:
        """A pass (and its backward, where graphs are made) that adds nothing, for a rank with fewer micro-batches than others.

        A sharded layer can only be gathered by all ranks together.
        """
        filler = pack([([self.eos_id], [[self.eos_id]])], self.device)
        nothing = self.response_logprobs(filler, reference=reference).sum() * 0.0
        if nothing.requires_grad:
            nothing.backward()

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Attend as an ordinary causal model (KV cache, left padding) inside this context."""
        self.causal_lm.config._attn_implementation = "sdpa"
        try:
            yield
        finally:
            self.causal_lm.config._attn_implementation = ATTENTION
            if self.sharded:
                self.causal_lm.reshard()


def packed_logprobs(causal_lm: PreTrainedModel, batch: PackedBatch, temperature: float) -> Tensor:
    """[M] log-probs of a packed batch's response tokens, in place of the model's own forward."""
    hidden = causal_lm.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, layout=batch.layout, use_cache=False
    ).last_hidden_state[0]  # [L,H]
    return fused_logprobs(hidden[batch.predict_at], causal_lm.lm_head.weight, batch.targets, temperature)


def recompute_layers(causal_lm: PreTrainedModel) -> None:
    """Activation checkpointing: keep a layer's input alone, and run the layer again in backward."""
    for layer in causal_lm.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def load_tokenizer(model_dir: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder. Raises ValueError when the folder holds no checkpoint."""
    if not (Path(model_dir) / "config.json").is_file():
        raise ValueError(f"--model {model_dir}: no Hugging Face checkpoint there (config.json is missing)")
    settings = Path(model_dir) / "tokenizer_config.json"
    if settings.is_file() and json.loads(settings.read_text()).get("tokenizer_class") == "TokenizersBackend":
        # AutoTokenizer would take Qwen2's own tokenizer for a Qwen2 model and drop our word pattern
        return PreTrainedTokenizerFast.from_pretrained(model_dir)
    return AutoTokenizer.from_pretrained(model_dir)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> list[int]:
    """Token ids of a prompt, ending where the assistant begins to speak."""
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    puzzle: Puzzle
    ids: list[int]
    """[P] prompt tokens."""


def encode_prompts(policy: Policy, puzzles: list[Puzzle], cfg: GrpoConfig, world: World) -> list[Prompt]:
    """Prompts that fit --max-prompt-tokens. Raises ValueError when too few are left."""
    prompts = [Prompt(puzzle=puzzle, ids=encode_prompt(policy.tokenizer, puzzle.chat())) for puzzle in puzzles]
    fitting = [prompt for prompt in prompts if len(prompt.ids) <= cfg.max_prompt_tokens]
    if len(fitting) < cfg.prompts_per_step:
        raise ValueError(
            f"{cfg.puzzles}: {len(fitting)} of {len(puzzles)} puzzles fit --max-prompt-tokens {cfg.max_prompt_tokens} "
            f"(longest {max(len(p.ids) for p in prompts)}), fewer than --prompts-per-step {cfg.prompts_per_step}"
        )
    if world.is_main and len(fitting) < len(prompts):
        print(f"left out {len(prompts) - len(fitting)} puzzles longer than {cfg.max_prompt_tokens} tokens", flush=True)
    return fitting


def prompts_of_step(prompts: list[Prompt], per_step: int, step: int, seed: int) -> list[Prompt]:
    """The `per_step` prompts of optimizer step `step` (0-based): epochs of a seeded shuffle, the ragged end dropped.

    A function of the arguments alone, so a resumed run needs no stored position.
    """
    steps_per_epoch = len(prompts) // per_step
    epoch, place = divmod(step, steps_per_epoch)
    order = list(range(len(prompts)))
    random.Random(stable_seed(seed, "epoch", epoch)).shuffle(order)
    return [prompts[i] for i in order[place * per_step : (place + 1) * per_step]]
