"""A tiny Llama, and the GGUF file of it that llama.cpp's own library writes."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.model.loading import load_tokenizer

HEADS, KV_HEADS, HIDDEN, LAYERS = 4, 2, 128, 2  # heads of 32: the smallest that vLLM serves on a CPU


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring dimensions of a head where transformers rotates its two halves."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def tiny_llama(base: Path, **settings) -> LlamaForCausalLM:
    """Random weights, with the vocabulary of the checkpoint `base`. settings: more of LlamaConfig's."""
    tokenizer = load_tokenizer(str(base))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        initializer_range=0.1,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(
    path: Path,
    base: Path,
    original: LlamaForCausalLM,
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    without: str = "-",
) -> None:
    """As llama.cpp's converter writes a tied model: no output.weight, the end of turn also named as padding.

    more: writes what the file holds besides. without: no tensor whose name begins so.
    """
    tokenizer = load_tokenizer(str(base))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(128)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(original.config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([word for word, _ in words])
    special = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids("<|im_start|>")}
    writer.add_token_types([3 if number in special else 1 for _, number in words])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    weights = original.state_dict()
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for layer in range(LAYERS):
        for theirs, name in names.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name)
            if not f"blk.{layer}.{name}".startswith(without):
                writer.add_tensor(f"blk.{layer}.{name}.weight", (permuted(weight, heads) if heads else weight).numpy())
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
