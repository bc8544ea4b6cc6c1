"""The policy's model: loaded, quantised, given its adapter, sharded. What happens once, before the first step."""

import json
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from data.errors import UserError
from trainer.model.sharding import empty_model

transformers_logging.disable_progress_bar()  # one line per loaded shard says nothing here

SHARES_PROMPTS = ("qwen2", "qwen3", "llama", "mistral")
"""Model types whose attention is softmax(q k scale) v through transformers' attention interface; tests run each of them."""
CHANGED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings of models that do something to the head's output, which log-probs from hidden states would miss."""


def why_not_shared(config: PretrainedConfig) -> str:
    """Why the model cannot be given packed rows with shared prompts; "" when it can."""
    if config.model_type not in SHARES_PROMPTS:
        return f"its type {config.model_type} is none of {', '.join(SHARES_PROMPTS)}"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window or any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return "it attends within a sliding window"
    return ""


def refuse_unknown_heads(causal_lm: PreTrainedModel, model_dir: str) -> None:
    """Raises UserError for a model whose logits are not hidden @ head, or whose parts have other names."""
    shape, instead = causal_lm.config, "use Qwen2.5, Qwen3, Llama or Mistral"
    if not hasattr(causal_lm, "lm_head") or not hasattr(getattr(causal_lm, "model", None), "layers"):
        raise UserError(f"--model {model_dir}: a {shape.model_type} has no model.layers and lm_head; {instead}")
    changed = [name for name in CHANGED_LOGITS if getattr(shape, name, None) not in (None, 1, 1.0)]
    if causal_lm.lm_head.bias is not None:
        changed.append("a bias of the head")
    if changed:
        raise UserError(
            f"--model {model_dir}: the logits of this {shape.model_type} are more than hidden states times head ({changed[0]}), "
            f"which the fused log-probs do not know; {instead}"
        )


def load_base(
    model_dir: str, dtype: torch.dtype, quantize: str, device: torch.device, sharded: bool, attention_name: str
) -> PreTrainedModel:
    """The checkpoint's model, with our attention where that can serve it and its own where not; empty if it will be sharded.

    attention_name: of our attention (trainer/model/attention.py).
    quantize: "none", or "nf4" for linear layers in 4 bits (bitsandbytes), computed in `dtype`.
    """
    attention = {} if why_not_shared(AutoConfig.from_pretrained(model_dir)) else {"attn_implementation": attention_name}
    if quantize == "nf4":
        attention["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        attention["device_map"] = {"": device}
    if sharded:
        causal_lm = empty_model(model_dir, dtype, attention.get("attn_implementation", "sdpa"))
    else:
        causal_lm = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, **attention)
    refuse_unknown_heads(causal_lm, model_dir)
    return causal_lm


def keep_four_bits_exact(model: torch.nn.Module) -> None:
    """On CPUs with AVX-512 bitsandbytes repacks a 4-bit layer that is not in training mode, for good, for a bfloat16 kernel."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and hasattr(module, "quant_state"):
            module.training = True  # nothing else in it depends on the mode


def add_adapter(causal_lm: PreTrainedModel, rank: int, alpha: float, seed: int, sharded: bool, dora: bool = False):
    """PEFT's model with LoRA (or DoRA) on every linear layer. lora_B starts at 0, so adapter on == adapter off."""
    # PEFT draws lora_A from torch's global generator
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora)
        return get_peft_model(causal_lm, config, low_cpu_mem_usage=sharded)


def recompute_layers(causal_lm: PreTrainedModel) -> None:
    """Activation checkpointing: keep a layer's input alone, and run the layer again in backward."""
    for layer in causal_lm.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def load_tokenizer(model_dir: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder. Raises UserError when the folder holds no checkpoint."""
    if not (Path(model_dir) / "config.json").is_file():
        raise UserError(f"--model {model_dir}: no Hugging Face checkpoint there (config.json is missing)")
    settings = Path(model_dir) / "tokenizer_config.json"
    if settings.is_file() and json.loads(settings.read_text()).get("tokenizer_class") == "TokenizersBackend":
        # AutoTokenizer would take Qwen2's own tokenizer for a Qwen2 model and drop our word pattern
        return PreTrainedTokenizerFast.from_pretrained(model_dir)
    return AutoTokenizer.from_pretrained(model_dir)


def linear_weights(model_dir: str) -> set[str]:
    """Checkpoint names of the layers' linear weights: those that are held in 4 bits."""
    layers = empty_model(model_dir, torch.float32, "sdpa").model.layers
    modules = layers.named_modules(prefix="model.layers")
    return {f"{name}.weight" for name, module in modules if isinstance(module, torch.nn.Linear)}


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """A weight as bitsandbytes' 4-bit layers multiply with it."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, quant_type="nf4")
    return dequantize_4bit(packed, state).to(weight.dtype)
