"""A GGUF file, written here by llama.cpp's own library, becomes a checkpoint that answers as the model it was made of."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from data.errors import UserError
from tests.helpers.commands import run_command, succeed
from trainer.model.from_gguf import import_gguf
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


def test_what_cannot_be_imported_is_named(file, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    done = run_command("import_gguf", tmp_path / "x.gguf", "--out", tmp_path / "m")
    assert done.returncode == 2 and "is no GGUF file" in done.stderr
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
