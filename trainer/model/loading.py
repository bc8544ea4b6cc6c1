"""Load the policy's model, quantize it and give it its adapter. All of this happens once, before the first step.

What cannot be trained is refused here, with a sentence: the libraries would train random weights in its place, or say why
in a hundred lines.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
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

from data.errors import UserError, first_sentence
from data.files import read_settings, refuse_pointer, weight_files
from trainer.model.attention import keep_attention, kernels_for
from trainer.model.cost import head_size

transformers_logging.disable_progress_bar()  # one line per loaded shard, on every rank

SHARES_PROMPTS = tuple("qwen2 qwen3 llama mistral smollm3 gemma phi3 olmo2 granite glm glm4 starcoder2 cohere".split())
"""Model types whose attention is softmax(q k scale) v through transformers' attention interface. Tests run each."""
RUNS_TOO = ("gemma2", "gemma3_text")
"""Model types whose attention is their own, so each response gets a row. Tests run each."""
INSTEAD = "use a Qwen2.5, Qwen3, Llama, SmolLM, Mistral, Gemma, Phi-3, OLMo 2, Granite or GLM-4"

TOKENIZER_SETTINGS = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
"""Files that hold a tokenizer's vocabulary; a model has one of them."""


def read_config(model_dir: str) -> PretrainedConfig:
    """The checkpoint's configuration. Raises UserError for a model that is not known here, or of a kind with no text."""
    settings = read_settings(Path(model_dir) / "config.json")
    if kind := wrong_kind(settings):
        raise UserError(f"--model {model_dir}: {kind}")
    try:
        return AutoConfig.from_pretrained(model_dir, trust_remote_code=False)  # else transformers asks on the terminal
    except (ValueError, KeyError, OSError, TypeError, AttributeError, StrictDataclassError) as error:
        if settings.get("auto_map"):
            raise UserError(
                f"--model {model_dir}: a {settings.get('model_type')} needs Python code of its own (auto_map in "
                f"config.json), which is never run here; {INSTEAD}"
            ) from None
        raise UserError(f"--model {model_dir}: config.json cannot be used ({first_sentence(error)})") from None


def wrong_kind(settings: dict[str, Any]) -> str:
    """Why a checkpoint is of a kind that cannot be trained here; "" if nothing says so. settings: its config.json."""
    (architecture,) = (settings.get("architectures") or [""])[:1]
    if quantised := quantised_kind(settings):
        return quantised
    if "text_config" in settings and any(key.startswith(("vision", "audio")) for key in settings):
        return (
            "is a multimodal checkpoint (text and images or sound); take a text-only one, such as gemma-3-1b-it or "
            "Qwen2.5-7B-Instruct"
        )
    if architecture.endswith(("Classification", "RewardModel", "QuestionAnswering")):
        return (
            f"is a {architecture}, a model that scores texts and writes none; take the chat model that it was made from"
        )
    return ""


def quantised_kind(settings: dict[str, Any]) -> str:
    """Why a checkpoint of quantised weights cannot be used; "" for another. settings: its config.json."""
    if (quantised := settings.get("quantization_config") or settings.get("compression_config")) is None:
        return ""
    method = quantised.get("quant_method", "no quant_method") if isinstance(quantised, dict) else quantised
    return (
        f"its weights are quantised (quantization_config in config.json: {method}), which neither training nor export "
        "can use; take the model that is not quantised, with --quantize nf4 to hold it in 4 bits"
    )


def empty_model(model_dir: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model of a checkpoint without its weights: parameters on the meta device; buffers are computed."""
    config = read_config(model_dir)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except ValueError as error:
        # the two of the library's messages that are long and say little to a user
        known = {
            "Unrecognized configuration": "is no causal language model",
            "attention implementation": "has no attention that can be chosen (PyTorch's, or ours)",
        }
        short = next((say for word, say in known.items() if word in str(error)), "")
        if short:
            raise UserError(f"--model {model_dir}: a {config.model_type} {short}; {INSTEAD}") from None
        raise UserError(f"--model {model_dir}: config.json cannot be used ({first_sentence(error)})") from None
    model.tie_weights()
    return model


def load_weights(model_dir: str, **settings: Any) -> tuple[PreTrainedModel, list[str]]:
    """(the checkpoint's model, names of tensors in its files that it has no place for).

    settings: of from_pretrained; device_map "meta" reads names and shapes alone. Raises UserError where the files lack a
    weight, which transformers would replace by random numbers, or have one of another shape.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its table of the same differences, which the sentences below say
    try:
        causal_lm, found = AutoModelForCausalLM.from_pretrained(
            model_dir,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            use_safetensors=True,  # a .bin file is a pickle
            trust_remote_code=False,
            **settings,
        )
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        weight_files(Path(model_dir))  # says it better where the weights are .bin files, or not there
        raise UserError(f"--model {model_dir}: the weights cannot be loaded ({first_sentence(error)})") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    unexpected, missing = sorted(found["unexpected_keys"]), set(found["missing_keys"])
    if missing:
        first = next((name for name in causal_lm.state_dict() if name in missing), min(missing))
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        instead, remedy = "", "copy the files again, or take the config.json that belongs to them"
        if unexpected:
            instead = f"; they hold {unexpected[0]}, which the model has no place for"
        if unexpected and unexpected[0].startswith("base_model."):
            remedy = "these are PEFT's names: save the model again after merge_and_unload()"
        raise UserError(f"--model {model_dir}: the weight files lack the tensor {first}{others}{instead}; {remedy}")
    for name, stored, wanted in sorted(found["mismatched_keys"], key=lambda entry: entry[0]):
        shapes = [" x ".join(map(str, shape)) for shape in (stored, wanted)]
        raise UserError(
            f"--model {model_dir}: the tensor {name} is {shapes[0]} in the weight files and {shapes[1]} by config.json; "
            "take the config.json that belongs to them"
        )
    return causal_lm, unexpected


def refuse_not_finite(weight: torch.Tensor, name: str, model_dir: str | Path) -> None:
    """Raises UserError if a weight holds a value that is no finite number: training would only see what it spoils."""
    if not weight.is_floating_point() or not weight.numel():  # held in 4 bits; a rank without rows of it
        return
    # aminmax makes no copy of the weight, and gives nan where any value is
    if not all(bool(value.isfinite()) for value in torch.aminmax(weight.detach())):
        raise UserError(
            f"--model {model_dir}: the weight {name} holds a value that is no finite number; copy the files again, or take "
            "an earlier checkpoint of the model"
        )


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


def attention_kernels(model_dir: str, attn: str, device: torch.device, dtype: torch.dtype) -> str:
    """What --attn comes to for a model: "sdpa" or "flash". dtype: of the products. See kernels_for."""
    config = read_config(model_dir)
    if attn == "auto" and why_not_shared(config):  # then another attention is used
        return "sdpa"
    return kernels_for(attn, device, dtype, head_size(config))


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
    model_dir: str, dtype: torch.dtype, quantize: str, device: torch.device, empty: bool, attention_name: str
) -> PreTrainedModel:
    """The checkpoint's model, with our attention if that supports it, else with its own.

    attention_name: the name of our attention (trainer/model/attention.py).
    quantize: "none", or "nf4" to hold linear layers in 4 bits and multiply in `dtype` (QLoRA, arXiv:2305.14314;
    bitsandbytes). empty: the model is made without weights (meta device); sharding.shard or SharedBase fills it. Raises
    UserError for a model with an unknown head, and for weights that are missing, of another shape or not finite.
    """
    config = read_config(model_dir)
    attention = {} if why_not_shared(config) else {"attn_implementation": attention_name}
    if getattr(config, "attn_logit_softcapping", None):
        attention["attn_implementation"] = "eager"  # PyTorch's kernel would leave Gemma 2's cap of the scores out
    if quantize == "nf4" or device.type == "cuda":
        attention["device_map"] = {"": device}  # read, round and check the weights on the device that will hold them
    if quantize == "nf4":
        attention["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if empty:
        causal_lm = empty_model(model_dir, dtype, attention.get("attn_implementation", "sdpa"))
    else:
        causal_lm, _ = load_weights(model_dir, dtype=dtype, **attention)
        for name, weight in causal_lm.named_parameters():
            refuse_not_finite(weight, name, model_dir)
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


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """In the block torch's global generators draw from this seed; after it they are as before."""
    # of this process's GPU: by default torch warns where there are several, and sets each of them up
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield


def add_adapter(causal_lm: PreTrainedModel, rank: int, alpha: float, seed: int, sharded: bool, dora: bool = False):
    """PEFT's model with LoRA (arXiv:2106.09685) or DoRA (arXiv:2402.09353) on every linear layer but the head.

    lora_B starts at 0, so at first the policy with its adapter equals the policy without.
    """
    # PEFT draws lora_A from torch's global generator: seed it, so that all ranks get the same adapter, and restore it
    with seeded(seed):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora)
        try:
            return get_peft_model(causal_lm, config, low_cpu_mem_usage=sharded)
        except (ValueError, NotImplementedError) as error:
            model = causal_lm.config
            raise UserError(
                f"--model {model.name_or_path}: PEFT cannot put an adapter on a {model.model_type} "
                f"({first_sentence(error)}); {INSTEAD}"
            ) from error


def recompute_layers(causal_lm: PreTrainedModel, keep: bool = False) -> None:
    """Gradient checkpointing (arXiv:1604.06174): keep only each layer's input, and run the layer again in backward.

    keep: the outputs of our attention too, which then is not computed again.
    """
    contexts = {"context_fn": keep_attention} if keep else {}
    for layer in causal_lm.model.layers:
        # the reentrant form needs an input with a gradient, which a frozen embedding does not give
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, **contexts)


def load_tokenizer(model_dir: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder. Raises UserError if the folder has no checkpoint, or a damaged file."""
    folder = Path(model_dir)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--model {model_dir}: no Hugging Face checkpoint there (config.json is missing), and nothing is downloaded"
        )
    # also those that others read later (ChatFormat): a damaged file is named before a library stumbles over it
    for name in ("config.json", "generation_config.json", *TOKENIZER_SETTINGS):
        if (folder / name).is_file():
            read_settings(folder / name)
    vocabularies = [folder / name for name in VOCABULARIES if (folder / name).is_file()]
    if not vocabularies:
        raise UserError(
            f"--model {model_dir}: no tokenizer there (tokenizer.json is missing); copy it from the model's page"
        )
    for path in vocabularies:
        refuse_pointer(path)
    # tokenizer.json says all. AutoTokenizer would take the class that the model's type, or tokenizer_config.json, names, which
    # builds a tokenizer of its own: Qwen2's drops our word pattern, Llama's every space of a byte-level vocabulary
    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(model_dir, trust_remote_code=False)
    except Exception as error:  # the library tokenizers raises plain Exception for a file that it cannot read
        raise UserError(
            f"--model {model_dir}: its tokenizer cannot be loaded ({first_sentence(error)}); copy its files again"
        ) from error


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
