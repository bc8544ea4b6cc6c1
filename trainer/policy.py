"""The policy: a frozen base model with a LoRA adapter; the reference policy is the same weights with the adapter off."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from trainer.logprobs import fused_logprobs
from trainer.packing import ATTENTION, PackedBatch

transformers_logging.disable_progress_bar()  # one line per loaded shard says nothing here


class Policy:
    """model_dir: a Hugging Face checkpoint. lora_rank 0 trains every weight and has no adapter to switch off."""

    def __init__(
        self, model_dir: str, *, lora_rank: int, lora_alpha: float, seed: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.tokenizer = load_tokenizer(model_dir)
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation=ATTENTION)
        self.lora: dict | None = None
        if lora_rank:
            # PEFT draws lora_A from torch's global generator; lora_B starts at 0, so adapter on == adapter off
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                config = LoraConfig(
                    r=lora_rank, lora_alpha=lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
                )
                self.model = get_peft_model(base, config)
            targets = sorted(self.model.peft_config["default"].target_modules)
            self.lora = {"r": lora_rank, "lora_alpha": lora_alpha, "target_modules": targets}
        else:
            self.model = base
        self.model.to(device).eval()  # dropout stays off: sampler and trainer must agree on every log-prob
        self.device = device
        self.causal_lm = self.model.base_model.model if lora_rank else self.model

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters by name, in a fixed order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The adapter under PEFT's file names (`base_model.model....lora_A.weight`), which vLLM reads too."""
        return {re.sub(r"\.default(?=\.)", "", name): p.detach() for name, p in self.trainable().items()}

    def load_adapter(self, tensors: dict[str, Tensor]) -> None:
        """Take over the values of an adapter of the same names and shapes, in place."""
        for name, tensor in self.adapter_tensors().items():
            tensor.copy_(tensors[name])  # adapter_tensors shares storage with the parameters

    def response_logprobs(self, batch: PackedBatch, temperature: float = 1.0, reference: bool = False) -> Tensor:
        """[N,T] log-probs of a packed batch's response tokens; 0 where there is no token.

        reference: switch the adapter off and make no graph.
        """
        adapter = self.model.disable_adapter() if reference else nullcontext()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not reference), adapter:
            hidden = self.causal_lm.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, layout=batch.layout, use_cache=False
            ).last_hidden_state[0]  # [L,H]
            logprobs = fused_logprobs(
                hidden[batch.predict_at], self.causal_lm.lm_head.weight, batch.targets, temperature
            )
        return batch.unpack(logprobs)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Attend as an ordinary causal model (KV cache, left padding) inside this context."""
        self.causal_lm.config._attn_implementation = "sdpa"
        try:
            yield
        finally:
            self.causal_lm.config._attn_implementation = ATTENTION


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
