"""A Hugging Face checkpoint from a GGUF file, the format of llama.cpp, in which models are handed on without a hub."""

import struct
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from data.errors import UserError, first_line
from data.files import replacing_folder
from trainer.record.runfolder import disk_errors

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


def import_gguf(file: Path, out: Path) -> int:
    """Write the checkpoint folder `out`, whole or not at all. Returns the number of weights.

    The weights are dequantised to float32; what the quantisation rounded away stays lost. Raises UserError for a file
    that is no GGUF, or of a model that transformers cannot read from one.
    """
    if not file.is_file() or file.open("rb").read(4) != MAGIC:
        raise UserError(f"{file}: is no GGUF file (it must begin with the letters GGUF)")
    if out.exists():
        raise UserError(f"--out {out}: exists; name another folder")
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    except ImportError as error:
        raise UserError(f"{file}: reading it needs the package gguf; pip install gguf ({first_line(error)})") from None
    except DAMAGE as error:
        raise UserError(f"{file}: transformers cannot read this model from GGUF ({first_line(error)})") from None
    # the weights are plain numbers now; while the model calls itself quantised, save_pretrained refuses
    model.hf_quantizer, model.quantization_method, model.is_quantized = None, None, False
    del model.config.quantization_config
    pad_apart(model, tokenizer)
    with replacing_folder(out) as partial, disk_errors(out):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        stored = "lm_head.weight" in safe_open(partial / "model.safetensors", "pt").keys()  # noqa: SIM118 (no mapping)
        assert stored != model.config.tie_word_embeddings, "a tied head is stored once, another one is stored"
    return sum(p.numel() for p in model.parameters())


def pad_apart(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token that is not its end of turn, in place, where the vocabulary has one.

    llama.cpp's files often name the end of turn as padding. Libraries that mask padding then mask the end of turn too, and
    a model trained with them never learns to stop.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return
    known = tokenizer.get_vocab()
    pad = next((token for token in PADS if token in known and token != tokenizer.eos_token), None)
    if pad is not None:
        tokenizer.pad_token = pad
        model.config.pad_token_id = model.generation_config.pad_token_id = known[pad]
