"""A GGUF file, written here by llama.cpp's own library, becomes a checkpoint that answers as the model it was made of."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.helpers.commands import run_command, succeed
from trainer.model.loading import load_tokenizer

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS, HIDDEN, LAYERS = 4, 2, 64, 2


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring dimensions of a head where transformers rotates its two halves."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def original(pipeline) -> LlamaForCausalLM:
    tokenizer = load_tokenizer(str(pipeline / "base"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def file(pipeline, original, tmp_path_factory) -> Path:
    """As llama.cpp's converter writes a tied model: no output.weight, the end of turn also named as padding."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokenizer = load_tokenizer(str(pipeline / "base"))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(128)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
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
            writer.add_tensor(f"blk.{layer}.{name}.weight", (permuted(weight, heads) if heads else weight).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow(10)
def test_the_checkpoint_answers_as_the_model(pipeline, original, file, tmp_path):
    printed = succeed("import_gguf", file, "--out", tmp_path / "m")
    assert f"{sum(p.numel() for p in original.parameters()):,} weights in float32" in printed
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, original(ids).logits, rtol=0, atol=1e-5)
    assert made.config.tie_word_embeddings and not hasattr(made.config, "quantization_config")
    tokenizer, ours = AutoTokenizer.from_pretrained(tmp_path / "m"), load_tokenizer(str(pipeline / "base"))
    assert tokenizer.chat_template == ours.chat_template and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"  # not the end of turn, which the file names
    settings = json.loads((tmp_path / "m/generation_config.json").read_text())
    assert settings["eos_token_id"] == ours.eos_token_id and settings["pad_token_id"] == ours.pad_token_id
    shown = succeed("check_model", tmp_path / "m", "--answer-tokens", 4)
    assert "PROBLEM" not in shown and "tied to the embedding" in shown


def test_what_cannot_be_imported_is_named(file, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    done = run_command("import_gguf", tmp_path / "x.gguf", "--out", tmp_path / "m")
    assert done.returncode == 2 and "is no GGUF file" in done.stderr
    whole = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    done = run_command("import_gguf", tmp_path / "cut.gguf", "--out", tmp_path / "m")
    assert done.returncode == 2 and "cut.gguf: transformers cannot read this model" in done.stderr, done.stderr[-500:]
    (tmp_path / "m").mkdir()
    done = run_command("import_gguf", file, "--out", tmp_path / "m")
    assert done.returncode == 2 and "exists; name another folder" in done.stderr
    assert not list((tmp_path / "m").iterdir())
