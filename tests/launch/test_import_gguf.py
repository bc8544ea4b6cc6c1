"""A GGUF file, written here by llama.cpp's own library, becomes a checkpoint that answers as the model it was made of."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from data.errors import UserError
from tests.helpers.commands import run_command, succeed
from trainer.model.from_gguf import Header, import_gguf
from trainer.model.loading import load_tokenizer

pytest.importorskip("gguf")

from tests.helpers.gguf_file import tiny_llama, write_gguf  # noqa: E402


@pytest.fixture(scope="module")
def original(pipeline) -> LlamaForCausalLM:
    return tiny_llama(pipeline / "base")


@pytest.fixture(scope="module")
def file(pipeline, original, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, pipeline / "base", original)
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


def test_all_ends_of_an_answer_are_kept(pipeline, original, tmp_path):
    """The end of a turn and of a message, where they are not the end of the text. None of them becomes the padding."""
    known = load_tokenizer(str(pipeline / "base")).get_vocab()
    start, end, text = (known[token] for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))

    def more(writer):
        writer.add_eot_token_id(text)
        writer.add_eom_token_id(start)

    write_gguf(tmp_path / "m.gguf", pipeline / "base", original, more)
    import_gguf(tmp_path / "m.gguf", tmp_path / "m")
    assert json.loads((tmp_path / "m/generation_config.json").read_text())["eos_token_id"] == [end, text, start]
    # nothing is left to pad with but an end: it stays, and training masks by position
    assert AutoTokenizer.from_pretrained(tmp_path / "m").pad_token == "<|im_end|>"


def llama3_factors(factor: float) -> Callable:
    """As llama.cpp's converter writes the scaling of Llama 3.1: by what each frequency is divided (heads of 32)."""

    def more(writer):
        wavelengths = 2 * torch.pi * 500_000.0 ** (torch.arange(16) / 16)
        smooth = (8192 / wavelengths - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / factor + smooth)
        factors = torch.where(wavelengths < 8192 / 4, 1.0, torch.where(wavelengths > 8192, factor, between))
        writer.add_tensor("rope_freqs.weight", factors.float().numpy())

    return more


def test_the_stretched_rotary_embedding_of_llama_3_is_kept(pipeline, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    original = tiny_llama(pipeline / "base", rope_parameters=rope)
    write_gguf(tmp_path / "m.gguf", pipeline / "base", original, llama3_factors(8.0))
    import_gguf(tmp_path / "m.gguf", tmp_path / "m")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert made.config.rope_parameters == rope
    ids = torch.arange(5, 405)[None]
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, original(ids).logits, rtol=0, atol=1e-5)


def test_what_transformers_does_not_read_of_an_architecture_is_set(file):
    """The base of StarCoder 2's rotary embedding, Phi-3's window."""
    header = Header(file)
    header.get = {
        "general.architecture": "starcoder2",
        "starcoder2.rope.freq_base": 100_000.0,
        "starcoder2.attention.sliding_window": 2047,
    }.get
    config = SimpleNamespace(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, sliding_window=None)
    header.correct(file, config)
    assert config.rope_parameters["rope_theta"] == 100_000.0 and config.sliding_window == 2047


def test_digits_are_cut_as_the_file_says(pipeline, original, tmp_path):
    cuts = {}
    for way in ("default", "smollm", "an-unknown-one"):
        write_gguf(
            tmp_path / f"{way}.gguf", pipeline / "base", original, lambda writer, way=way: writer.add_tokenizer_pre(way)
        )
        _, notes = import_gguf(tmp_path / f"{way}.gguf", tmp_path / way)
        cut = AutoTokenizer.from_pretrained(tmp_path / way).backend_tokenizer.pre_tokenizer
        cuts[way] = [word for word, _ in cut.pre_tokenize_str("CD14 x")]
        assert len(notes) == (way == "an-unknown-one") and all(f"'{way}'" in note for note in notes)
    space = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" x")[0][0]
    assert cuts == {
        "default": ["CD", "14", space],
        "smollm": ["CD", "1", "4", space],
        "an-unknown-one": ["CD", "14", space],
    }


@pytest.mark.parametrize(
    ("more", "without", "sentence"),
    [
        (lambda writer: writer.add_uint16("split.count", 2), "-", "is part 1 of 2 of a model"),
        (lambda writer: None, "blk.1.", r"lacks the weights of model.layers.1"),
        (lambda writer: None, "blk.1.ffn_up", r"lacks the weights of model.layers.1.mlp.up_proj.weight \(1 missing\)"),
        (llama3_factors(1.5), "blk.9", None),
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", torch.tensor([1.0] * 15 + [4.0]).numpy()),
            "-",
            r"scales its rotary embedding \(rope_freqs.weight\)",
        ),
        (
            lambda writer: writer.add_sliding_window(64),
            "-",
            "its layers attend in a window of 64 tokens, which would be lost",
        ),
        (lambda writer: writer.add_string("llama.rope.scaling.type", "yarn"), "-", r"\(rope.scaling.type yarn\)"),
        (
            lambda writer: writer.add_tensor("blk.0.attn_q.bias", torch.ones(128).numpy()),
            "-",
            "it would not be the same model",
        ),
    ],
)
def test_a_file_that_would_become_another_model_is_refused(pipeline, original, tmp_path, more, without, sentence):
    if sentence is None:
        original = tiny_llama(pipeline / "base")  # theta 10,000: the factors were made for 500,000
        sentence = "scales its rotary embedding"
    write_gguf(tmp_path / "m.gguf", pipeline / "base", original, more, without)
    with pytest.raises(UserError, match=rf"^{tmp_path}/m.gguf: .*{sentence}") as caught:
        import_gguf(tmp_path / "m.gguf", tmp_path / "m")
    assert "cannot read" not in str(caught.value)
    assert not (tmp_path / "m").exists()


@pytest.mark.vllm
@pytest.mark.slow(15)
def test_vllm_samples_from_the_model_of_the_file(pipeline, original, file, tmp_path):
    """The log-probs of its samples are the trainer's (the canary and every token), whose model is the file's (above)."""
    import_gguf(file, tmp_path / "m")
    asked = ("--prompts-per-step", 2, "--group-size", 2, "--steps", 1, "--max-response-tokens", 24, "--lora-rank", 4)
    base = ("--model", tmp_path / "m", "--puzzles", pipeline / "puzzles/train.parquet", "--out", tmp_path / "run")
    succeed("grpo", *base, *asked, "--insist")
    (row,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert row["sampling/logp_difference/max"] < 1e-4 and row["completions/mean_length"] > 2


def test_what_cannot_be_imported_is_named(file, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    done = run_command("import_gguf", tmp_path / "x.gguf", "--out", tmp_path / "m")
    assert done.returncode == 2 and "is no GGUF file" in done.stderr
    done = run_command("import_gguf", tmp_path / "y.gguf", "--out", tmp_path / "m")
    assert done.returncode == 2 and "y.gguf: no such file" in done.stderr
    whole = file.read_bytes()
    for length in (4, 20, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut.gguf: transformers cannot read this model"):
            import_gguf(tmp_path / "cut.gguf", tmp_path / "m")
    assert not (tmp_path / "m").exists()
    (tmp_path / "m").mkdir()
    done = run_command("import_gguf", file, "--out", tmp_path / "m")
    assert done.returncode == 2 and "exists; name another folder" in done.stderr
    assert not list((tmp_path / "m").iterdir())


@pytest.mark.parametrize(
    ("kind", "said", "lost"),
    [
        ("llama", {"attention.head_count": 4}, "does not say how many key-value heads it has"),
        ("llama", {"attention.head_count_kv": 4}, ""),
        ("llama", {"attention.head_count_kv": 4, "rope.scale_linear": 4.0}, "in a way of older files"),
        ("qwen2", {"rope.scaling.factor": 4.0}, "in a way of older files"),
        ("qwen2", {"rope.scaling.factor": 4.0, "rope.scaling.type": "yarn"}, ""),  # refused by its name
        ("gemma2", {"attention.key_length": 256}, ""),
        ("gemma2", {"attention.key_length": 128}, "scales its attention by a number that the file does not hold"),
    ],
)
def test_what_a_file_leaves_out_is_not_guessed(file, kind, said, lost):
    """Keys of older files, and of a model that transformers has one setting for."""
    header = Header(file)
    header.fields = {"general.architecture": kind, **{f"{kind}.{key}": value for key, value in said.items()}}
    header.get = header.fields.get
    if not lost:
        return header.refuse_what_is_not_said(file)
    with pytest.raises(UserError, match=f"{lost}.*; get the model as a Hugging Face checkpoint"):
        header.refuse_what_is_not_said(file)
