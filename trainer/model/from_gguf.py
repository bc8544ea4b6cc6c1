"""A Hugging Face checkpoint from a GGUF file, the format of llama.cpp, in which models are handed on without a hub."""

import copy
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging as transformers_logging

from data.errors import UserError, disk_errors, first_line
from data.files import reason_of, replacing_folder, weight_files

transformers_logging.disable_progress_bar()

MAGIC = b"GGUF"
DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    struct.error,
)
DAMAGE = (*DAMAGE, TypeError, ValueError)
"""What transformers raises for a file that was cut, or that holds what it does not expect."""
PADS = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
"""Tokens that models pad with, in the order in which they are tried."""
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""How Llama 3.1, 3.2 and 3.3 stretch their rotary embedding (transformers' names)."""
LIKE_GPT2 = ("default", "gpt-2")
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r")
"""llama.cpp's names of two ways to cut text before the merges: GPT-2's, and GPT-2's with every digit by itself."""


def import_gguf(file: Path, out: Path) -> tuple[int, list[str]]:
    """Write the checkpoint folder `out`, whole or not at all. Returns (number of weights, what the user should know).

    The weights are dequantised to float32; what the quantisation rounded away stays lost. Raises UserError for a file
    that is no GGUF, of a model that transformers cannot read from one, or that would become another model.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        begins = file.open("rb").read(4)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({reason_of(error)}); copy it again") from None
    if begins != MAGIC:
        raise UserError(f"{file}: is no GGUF file (it must begin with the letters GGUF)")
    if out.exists():
        raise UserError(f"--out {out}: exists; name another folder")
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        header = Header(file)
        header.refuse_a_part(file)
        header.refuse_what_is_not_said(file)
        model, found = AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    except UserError:  # which is a ValueError, too
        raise
    except ImportError as error:
        raise UserError(f"{file}: reading it needs the package gguf; pip install gguf ({first_line(error)})") from None
    except DAMAGE as error:
        raise UserError(f"{file}: transformers cannot read this model from GGUF ({first_line(error)})") from None
    if missing := sorted(found["missing_keys"]):  # transformers gives them random numbers
        raise UserError(f"{file}: lacks the weights of {missing[0]} ({len(missing)} missing); download it again")
    weights = sum(p.numel() for p in model.parameters())
    if weights != header.weights:  # it skips a tensor that it has no name for, without a word
        raise UserError(
            f"{file}: holds {header.weights:,} weights, and transformers makes a model of {weights:,}: it would not be the "
            "same model; get it as a Hugging Face checkpoint"
        )
    header.correct(file, model.config)
    if scaled := header.rope_scaling(file, model.config):
        model.config.rope_parameters = scaled
    # the weights are plain numbers now; while the model calls itself quantised, save_pretrained refuses
    model.hf_quantizer, model.quantization_method, model.is_quantized = None, None, False
    model.config.__dict__.pop("quantization_config", None)
    ends = header.ends(tokenizer)
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    notes = split_digits(header, tokenizer)
    pad_apart(model, tokenizer, ends)
    with replacing_folder(out) as partial, disk_errors(out):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        names = {name for path in weight_files(partial) for name in safe_open(path, "pt").keys()}  # noqa: SIM118 (no mapping)
        assert ("lm_head.weight" in names) != model.config.tie_word_embeddings, "a tied head is stored once"
    return weights, notes


class Header:
    """What a GGUF file says of its model that transformers does not read. Raises what the package gguf raises."""

    def __init__(self, file: Path) -> None:
        from gguf import GGUFReader  # an extra

        reader = GGUFReader(file)
        self.fields = reader.fields
        self.rope_factors = {
            t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors if t.name.startswith("rope_f")
        }
        """{name: what llama.cpp divides the frequencies of the rotary embedding by}."""
        self.weights = sum(int(t.n_elements) for t in reader.tensors if t.name not in self.rope_factors)

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields[key].contents() if key in self.fields else default

    def refuse_a_part(self, file: Path) -> None:
        """Raises UserError for one of several files of a model."""
        if (parts := self.get("split.count", 1)) > 1:
            raise UserError(
                f"{file}: is part {self.get('split.no', 0) + 1} of {parts} of a model, and one file is needed; join them "
                "with llama.cpp: llama-gguf-split --merge FIRST_PART ALL.gguf"
            )

    def refuse_what_is_not_said(self, file: Path) -> None:
        """Raises UserError where transformers would guess, wrongly for some models, what a file leaves out."""
        kind, lost = self.get("general.architecture"), ""
        if kind == "llama" and f"{kind}.attention.head_count_kv" not in self.fields:
            # it puts llama.cpp's order of the rotary halves back only where it knows both numbers of heads
            lost = (
                "does not say how many key-value heads it has, so its queries and keys would stay in llama.cpp's order"
            )
        if self.get(f"{kind}.rope.scale_linear", 1.0) != 1.0 or (
            self.get(f"{kind}.rope.scaling.factor", 1.0) != 1.0 and f"{kind}.rope.scaling.type" not in self.fields
        ):
            lost = "scales its rotary embedding in a way of older files that would be lost"
        if kind == "gemma2" and self.get(f"{kind}.attention.key_length", 256) != 256:
            # query_pre_attn_scalar: 144 in the 27B model, whose heads have 128; 256 is taken, which the others have
            lost = "scales its attention by a number that the file does not hold"
        if lost:
            raise UserError(f"{file}: {lost}; get the model as a Hugging Face checkpoint")

    def ends(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Ids of all tokens that end an answer: of the text, of a turn, of a message. The tokenizer's comes first."""
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        named = [tokenizer.eos_token_id, *(self.get(f"tokenizer.ggml.{key}") for key in keys)]
        return list(dict.fromkeys(int(end) for end in named if end is not None))

    def correct(self, file: Path, config: PretrainedConfig) -> None:
        """Set what transformers does not read of some architectures: the rotary embedding's base, the window of attention.

        Raises UserError for a window that the model's class has no place for.
        """
        kind = self.get("general.architecture")
        base, window = self.get(f"{kind}.rope.freq_base"), self.get(f"{kind}.attention.sliding_window")
        rotary = getattr(config, "rope_parameters", None) or {}
        if base and "rope_theta" in rotary and abs(rotary["rope_theta"] / base - 1) > 1e-6:
            rotary["rope_theta"] = float(base)
        if window and getattr(config, "sliding_window", None) != window:
            # where only some layers have it, or a switch turns it on, the file does not say enough
            if (
                not hasattr(config, "sliding_window")
                or hasattr(config, "use_sliding_window")
                or hasattr(config, "layer_types")
            ):
                raise UserError(
                    f"{file}: its layers attend in a window of {window} tokens, which would be lost; get the model as a Hugging "
                    "Face checkpoint"
                )
            config.sliding_window = int(window)

    def rope_scaling(self, file: Path, config: PretrainedConfig) -> dict[str, Any]:
        """The rotary embedding's settings if the file scales it, else {}. Raises UserError for a scaling unknown here.

        Llama 3.1 and later stretch the slow frequencies, of which the file holds the numbers alone. The settings that they
        were made with are the same in all of these models, but for the factor, and are kept if they give the same numbers.
        """
        kind = self.get(f"{self.get('general.architecture')}.rope.scaling.type", "none")
        if kind == "none" and not self.rope_factors:
            return {}
        plain_settings = getattr(config, "rope_parameters", None) or {}  # of some families one for each kind of layer
        if kind == "none" and list(self.rope_factors) == ["rope_freqs.weight"] and "rope_theta" in plain_settings:
            factors, like = self.rope_factors["rope_freqs.weight"], copy.deepcopy(config)
            settings = {**plain_settings, **LLAMA3, "factor": round(float(factors.max()), 4)}
            like.rope_parameters = settings
            plain = settings["rope_theta"] ** -(torch.arange(len(factors)) / len(factors))
            frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](like, torch.device("cpu"))
            if frequencies.shape == factors.shape and torch.allclose(plain / factors, frequencies, rtol=1e-4, atol=0):
                return settings
        name = next(iter(self.rope_factors), f"rope.scaling.type {kind}")
        raise UserError(
            f"{file}: scales its rotary embedding ({name}) in a way that would be lost; get the model as a Hugging Face "
            "checkpoint"
        )


def split_digits(header: Header, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Cut text before the merges as the file says, where transformers does not know how. Returns what is not certain.

    A file names only the way of cutting. transformers cuts as GPT-2 did where it does not know the name.
    """
    way = header.get("tokenizer.ggml.pre")
    if way is None and header.get("tokenizer.ggml.model") == "gpt2":
        return [
            "the file does not say how text is cut (tokenizer.ggml.pre): compare a few token ids with the original tokenizer"
        ]
    if header.get("tokenizer.ggml.model") != "gpt2" or way in LIKE_GPT2:
        return []
    if way in DIGITS_APART:
        digits, gpt2 = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
        return []
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as known
    except ImportError:  # another version, which goes by the architecture
        return []
    if way in known:
        return []
    return [f"transformers does not know how '{way}' cuts text: compare a few token ids with the original tokenizer"]


def pad_apart(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> None:
    """Give the tokenizer a pad token that is not one of the ends of an answer, in place, where the vocabulary has one.

    llama.cpp's files often name the end of turn as padding. Libraries that mask padding then mask the end of turn too, and
    a model trained with them never learns to stop.
    """
    if tokenizer.pad_token_id not in (None, *ends):
        return
    known = tokenizer.get_vocab()
    pad = next((token for token in PADS if token in known and known[token] not in ends), None)
    if pad is not None:
        tokenizer.pad_token = pad
        model.config.pad_token_id = model.generation_config.pad_token_id = known[pad]
