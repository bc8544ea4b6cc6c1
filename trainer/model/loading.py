"""Load the policy's model, quantize it and give it its adapter. All of this happens once, before the first step."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import (
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
from trainer.model.sharding import empty_model, first_line, read_config

transformers_logging.disable_progress_bar()  # one line per loaded shard, on every rank

SHARES_PROMPTS = tuple("qwen2 qwen3 llama mistral smollm3 gemma phi3 olmo2 granite glm glm4 starcoder2 cohere".split())
"""Model types whose attention is softmax(q k scale) v through transformers' attention interface. Tests run each."""
RUNS_TOO = ("gemma2", "gemma3_text")
"""Model types whose attention is their own, so each response gets a row. Tests run each."""
INSTEAD = "use a Qwen2.5, Qwen3, Llama, SmolLM, Mistral, Gemma, Phi-3, OLMo 2, Granite or GLM-4"


def why_not_shared(config: PretrainedConfig) -> str:
    """Why the model cannot train on packed rows with shared prompts; "" if it can."""
    if config.model_type not in SHARES_PROMPTS:
        return f"its type {config.model_type} is none of {', '.join(SHARES_PROMPTS)}"
    # some configurations name a window and a separate switch for it (Qwen2)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window or any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return "it attends within a sliding window"
    return ""


@dataclass(frozen=True)
class Head:
    """What a model does to hidden @ lm_head.T before the softmax: softcap * tanh(logits / softcap), then / divisor."""

    divisor: float = 1.0
    """Granite's logits_scaling; 1 / logit_scale of Cohere."""
    softcap: float | None = None
    """Gemma 2's final_logit_softcapping."""


def head_of(causal_lm: PreTrainedModel, model_dir: str) -> Head:
    """The model's head. Raises UserError for one with a bias, and for a model that lacks model.layers or lm_head."""
    shape = causal_lm.config
    if not hasattr(causal_lm, "lm_head") or not hasattr(getattr(causal_lm, "model", None), "layers"):
        raise UserError(f"--model {model_dir}: a {shape.model_type} has no model.layers and lm_head; {INSTEAD}")
    if causal_lm.lm_head.bias is not None:
        raise UserError(
            f"--model {model_dir}: the head of this {shape.model_type} has a bias, which the fused log-probs do not know; "
            f"{INSTEAD}"
        )
    # both at once would depend on their order; no model has both
    divisor = getattr(shape, "logits_scaling", None) or 1 / (getattr(shape, "logit_scale", None) or 1.0)
    return Head(divisor=float(divisor), softcap=getattr(shape, "final_logit_softcapping", None))


def load_base(
    model_dir: str, dtype: torch.dtype, quantize: str, device: torch.device, sharded: bool, attention_name: str
) -> PreTrainedModel:
    """The checkpoint's model, with our attention if that supports it, else with its own.

    attention_name: the name of our attention (trainer/model/attention.py).
    quantize: "none", or "nf4" to hold linear layers in 4 bits and multiply in `dtype` (QLoRA, arXiv:2305.14314;
    bitsandbytes). sharded: the model is made without weights (meta device); sharding.shard fills it. Raises UserError
    for a model with an unknown head.
    """
    config = read_config(model_dir)
    attention = {} if why_not_shared(config) else {"attn_implementation": attention_name}
    if getattr(config, "attn_logit_softcapping", None):
        attention["attn_implementation"] = "eager"  # PyTorch's kernel would leave Gemma 2's cap of the scores out
    if quantize == "nf4":
        attention["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        attention["device_map"] = {"": device}  # quantize on the device that will hold the layers
    if sharded:
        causal_lm = empty_model(model_dir, dtype, attention.get("attn_implementation", "sdpa"))
    else:
        try:
            causal_lm = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, **attention)
        except (ValueError, OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"--model {model_dir}: the weights cannot be loaded ({first_line(error)})") from None
    head_of(causal_lm, model_dir)
    return causal_lm


def keep_four_bits_exact(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit layers.

    On CPUs with AVX-512 it repacks a 4-bit layer that is not in training mode, permanently, for a bfloat16 kernel. The
    layer's products would then no longer be those of the sampler's rounded base (through_nf4).
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and hasattr(module, "quant_state"):
            module.training = True  # nothing else in the layer depends on the mode


def add_adapter(causal_lm: PreTrainedModel, rank: int, alpha: float, seed: int, sharded: bool, dora: bool = False):
    """PEFT's model with LoRA (arXiv:2106.09685) or DoRA (arXiv:2402.09353) on every linear layer but the head.

    lora_B starts at 0, so at first the policy with its adapter equals the policy without.
    """
    # PEFT draws lora_A from torch's global generator: seed it, so that all ranks get the same adapter, and restore it
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora)
        return get_peft_model(causal_lm, config, low_cpu_mem_usage=sharded)


def recompute_layers(causal_lm: PreTrainedModel) -> None:
    """Gradient checkpointing (arXiv:1604.06174): keep only each layer's input, and run the layer again in backward."""
    for layer in causal_lm.model.layers:
        # the reentrant form needs an input with a gradient, which a frozen embedding does not give
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def load_tokenizer(model_dir: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder. Raises UserError if the folder has no checkpoint."""
    if not (Path(model_dir) / "config.json").is_file():
        raise UserError(f"--model {model_dir}: no Hugging Face checkpoint there (config.json is missing)")
    settings = Path(model_dir) / "tokenizer_config.json"
    if settings.is_file() and json.loads(settings.read_text()).get("tokenizer_class") == "TokenizersBackend":
        # for a Qwen2 model AutoTokenizer would use Qwen2's own tokenizer class, which drops our word pattern
        return PreTrainedTokenizerFast.from_pretrained(model_dir)
    return AutoTokenizer.from_pretrained(model_dir)


def linear_weights(model_dir: str) -> set[str]:
    """Checkpoint names of the linear weights of all layers: the weights that --quantize nf4 holds in 4 bits."""
    layers = empty_model(model_dir, torch.float32, "sdpa").model.layers
    modules = layers.named_modules(prefix="model.layers")
    return {f"{name}.weight" for name, module in modules if isinstance(module, torch.nn.Linear)}


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """A weight rounded to NF4 and back: the values that bitsandbytes' 4-bit layers multiply with.

    NF4 (arXiv:2305.14314, section 3): per block of 64 weights, each is divided by the block's largest absolute value
    and rounded to the nearest of 16 quantiles of a normal distribution.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    # the same block size as bitsandbytes' layers (its default, 64), or the values would differ
    packed, state = quantize_4bit(weight, quant_type="nf4")
    return dequantize_4bit(packed, state).to(weight.dtype)
