"""Four-bit base, bfloat16 products, eight-bit AdamW, models of other types: through the real command, and number by number."""

import dataclasses
import errno
import json
import os
import platform
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    MistralConfig,
    MistralForCausalLM,
)

from data.errors import UserError
from tests.helpers.commands import run_command, succeed
from trainer.config import GrpoConfig
from trainer.model.loading import Head, empty_model, head_of, through_nf4, why_not_shared
from trainer.model.merge import sampler_model, write_checkpoint
from trainer.model.shared import has_bfloat16_products, sampler_dtype
from trainer.packing import pack
from trainer.policy import Policy
from trainer.start.memory import sampler_memory
from trainer.start.parts import load_policy, share_sampler_base
from trainer.start.preflight import GIB, Launch

REWARD = "def fewer_letters(completion, puzzle):\n    return -len(completion) / 50\n"
SHORT = (
    "--prompts-per-step",
    2,
    "--group-size",
    2,
    "--max-prompt-tokens",
    400,
    "--max-response-tokens",
    12,
    "--steps",
    2,
    "--lora-rank",
    64,
    "--lora-alpha",
    64,
    "--lr",
    1e-2,
    "--insist",
)


def start(pipeline: Path, model: Path, out: Path, *more: object) -> str:
    """A short run with a reward that differs between a random model's responses; returns what it printed."""
    out.parent.mkdir(exist_ok=True)
    reward = out.parent / "short.py"
    reward.write_text(REWARD)
    return succeed(
        "grpo",
        "--model",
        model,
        "--puzzles",
        pipeline / "puzzles/train.parquet",
        "--out",
        out,
        "--reward",
        f"{reward}:fewer_letters",
        *SHORT,
        *more,
    )


def run(pipeline: Path, out: Path, *more: object) -> list[dict]:
    start(pipeline, pipeline / "base", out, *more)
    return lines(out / "metrics.jsonl")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def policy(model: Path | str, **more) -> Policy:
    settings = {
        "lora_rank": 8,
        "lora_alpha": 8,
        "seed": 0,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        **more,
    }
    return Policy(str(model), **settings)


BATCH = pack([(list(range(5, 60)), [list(range(60, 90)), list(range(7, 12)), [9]])])


def logprobs_and_gradient(of: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    for name, p in of.trainable().items():
        if "lora_B" in name:
            p.data = torch.linspace(-0.1, 0.1, p.numel()).view_as(p)
    values = of.response_logprobs(BATCH)
    values.sum().backward()
    return values.detach(), torch.cat([p.grad.flatten() for p in of.trainable().values()])


@pytest.mark.vllm
@pytest.mark.slow(5)
def test_a_four_bit_base_samples_from_its_own_weights(pipeline, tmp_path):
    """vLLM holds the rounded weights, so the canary of every hand-over agrees and fresh samples have ratio 1."""
    rows = run(pipeline, tmp_path / "run", "--quantize", "nf4", "--entropy")
    assert len(rows) == 2 and rows[0]["sampling/logp_difference/mean"] < 1e-4
    assert 0 < rows[0]["entropy"] < 12
    # the base in 4 bits and its copy in full weights are one policy, in value and gradient
    quantised = policy(pipeline / "base", quantize="nf4")
    layer = quantised.causal_lm.model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == layer.in_features * layer.out_features // 2
    copy = policy(tmp_path / "run/sampler_base")
    for ours, theirs in zip(logprobs_and_gradient(quantised), logprobs_and_gradient(copy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    base = load_file(pipeline / "base/model.safetensors")
    rounded = load_file(tmp_path / "run/sampler_base/model.safetensors")
    for name, weight in base.items():
        linear = "_proj.weight" in name
        assert torch.equal(rounded[name], through_nf4(weight) if linear else weight), name
        assert linear == (not torch.equal(rounded[name], weight)), name


def test_the_copy_is_made_once(pipeline, tmp_path):
    first = sampler_model(str(pipeline / "base"), "nf4", "float32", tmp_path)
    made = (Path(first) / "model.safetensors").stat().st_mtime_ns
    assert sampler_model(str(pipeline / "base"), "nf4", "float32", tmp_path) == first
    assert (Path(first) / "model.safetensors").stat().st_mtime_ns == made
    assert sampler_model("anything", "none", "float32", tmp_path) == "anything"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_the_copy_needs_no_locks_of_the_disk(pipeline, tmp_path, monkeypatch, capsys, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("data.files.fcntl.flock", refuse)
    assert (Path(sampler_model(str(pipeline / "base"), "nf4", "float32", tmp_path)) / "model.safetensors").is_file()
    assert "this disk knows no locks" in capsys.readouterr().err


def test_a_copy_that_is_there_needs_no_right_to_write(pipeline, tmp_path, monkeypatch):
    """The run of a colleague, whose adapter is evaluated."""
    first = sampler_model(str(pipeline / "base"), "nf4", "float32", tmp_path)
    monkeypatch.setattr("trainer.model.merge.wait_for_lock", lambda *_: pytest.fail("nothing is written"))
    assert sampler_model(str(pipeline / "base"), "nf4", "float32", tmp_path) == first


def test_one_rank_makes_the_copy_before_any_looks_for_it(monkeypatch):
    """On a disk without working locks ranks that each made it would remove one another's."""
    done = []
    monkeypatch.setattr("trainer.start.parts.sampler_model", lambda *what: done.append("copy"))
    for is_main, quantize, expected in (
        (True, "nf4", ["copy", "wait"]),
        (False, "nf4", ["wait"]),
        (True, "none", []),
    ):
        world = SimpleNamespace(is_main=is_main, total=lambda value: done.append("wait"))
        cfg = SimpleNamespace(quantize=quantize, model="m", dtype="float32", out="o")
        share_sampler_base(cfg, world)
        assert done == expected
        done.clear()


def test_a_copy_of_another_model_is_made_anew(pipeline, tmp_path):
    """A run that died before its first step may begin again with other settings, in the same folder."""
    other = tmp_path / "other"
    shutil.copytree(pipeline / "base", other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    save_file(weights | {name: weights[name] + 1}, other / "model.safetensors", {"format": "pt"})
    copy = Path(sampler_model(str(pipeline / "base"), "nf4", "float32", tmp_path))
    before = load_file(copy / "model.safetensors")[name]
    sampler_model(str(other), "nf4", "float32", tmp_path)
    assert torch.equal(load_file(copy / "model.safetensors")[name], before + 1)
    sampler_model(str(other), "nf4", "bfloat16", tmp_path)
    assert load_file(copy / "model.safetensors")[name].dtype == torch.bfloat16


@pytest.mark.slow(3)
def test_eight_bit_moments_resume_bit_for_bit(pipeline, tmp_path):
    more = ("--optimizer", "adamw8bit", "--engine", "torch", "--save-every", 1)
    whole = run(pipeline, tmp_path / "whole", *more, "--steps", 3)
    run(pipeline, tmp_path / "cut", *more)
    saved = load_file(tmp_path / "cut/checkpoints/step-000002/training/optimizer.safetensors")
    assert {t.dtype for name, t in saved.items() if name.startswith("state1/")} == {torch.uint8}
    assert run(pipeline, tmp_path / "cut", *more, "--steps", 3, "--resume") == whole
    plain = run(pipeline, tmp_path / "plain", "--engine", "torch")
    assert plain[0]["loss"] == whole[0]["loss"] and plain[1]["adapter_hash"] != whole[1]["adapter_hash"]


def test_bfloat16_products_stay_near_float32(pipeline):
    exact, autocast = policy(pipeline / "base"), policy(pipeline / "base", autocast=True)
    kinds = set()
    autocast.causal_lm.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda m, x, y: kinds.add((x[0].dtype, y.dtype))
    )
    (values, gradient), (near, near_gradient) = logprobs_and_gradient(exact), logprobs_and_gradient(autocast)
    assert kinds == {(torch.bfloat16, torch.bfloat16)}
    assert near.dtype == torch.float32 and near_gradient.dtype == torch.float32
    assert not torch.equal(values, near)
    torch.testing.assert_close(values, near, rtol=0, atol=0.05)
    assert torch.nn.functional.cosine_similarity(gradient, near_gradient, dim=0) > 0.99


@pytest.mark.vllm
@pytest.mark.slow(5)
def test_bfloat16_weights_make_bfloat16_products(pipeline, tmp_path):
    rows = run(pipeline, tmp_path / "run", "--dtype", "bfloat16")
    assert rows[0]["sampling/logp_difference/mean"] < 0.05 and rows[1]["grad_norm"] > 0


@pytest.mark.vllm
@pytest.mark.slow(5)
def test_a_sampler_in_bfloat16_beside_a_base_in_float32(pipeline, tmp_path):
    said = start(pipeline, pipeline / "base", tmp_path / "run", "--dtype", "float32", "--sampler-dtype", "bfloat16")
    assert (
        "two copies, the trainer's and the sampler's: the trainer's is in float32 (--dtype), and the sampler's in bfloat16"
        in said
    )
    rows = lines(tmp_path / "run/metrics.jsonl")
    assert all(1e-4 < row["sampling/logp_difference/mean"] < 0.05 for row in rows) and rows[1]["grad_norm"] > 0


def test_the_sampler_computes_as_the_trainer_does(pipeline, tmp_path, monkeypatch):
    """--autocast on a CPU that has its products; never where both read one base, or where the user says otherwise."""
    monkeypatch.setattr("trainer.model.shared.has_bfloat16_products", lambda device: there)
    float32 = {"model": str(pipeline / "base"), "dtype": "float32"}
    for there, on_gpu, settings, dtype in (  # noqa: B007 (the lambda reads it)
        (True, False, {"autocast": True}, "bfloat16"),
        (False, False, {"autocast": True}, "float32"),
        (True, True, {"autocast": True}, "float32"),
        (True, False, {"autocast": True, "base": "shared"}, "float32"),
        (True, False, {"autocast": True, "sampler_dtype": "float32"}, "float32"),
        (True, False, {}, "float32"),
        (True, False, {"autocast": True, "lora_rank": 0}, "float32"),
        (True, True, {"dtype": "bfloat16"}, "bfloat16"),
        (False, False, {"sampler_dtype": "bfloat16"}, "bfloat16"),
    ):
        assert sampler_dtype(GrpoConfig(**{**float32, **settings}), on_gpu) == dtype, settings
    there = True
    # a checkpoint of numbers of bfloat16, also one of float32: small updates would be rounded away
    write_checkpoint(pipeline / "base", tmp_path / "narrow", torch.bfloat16)
    write_checkpoint(tmp_path / "narrow", tmp_path / "wide", torch.float32)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    for name in ("narrow", "wide", "damaged"):
        assert (
            sampler_dtype(GrpoConfig(**{**float32, "model": str(tmp_path / name)}, autocast=True), False) == "float32"
        )
    with pytest.raises(UserError, match="--sampler-dtype bfloat16: needs --engine vllm"):
        GrpoConfig(engine="torch", sampler_dtype="bfloat16")
    here = Launch(nodes=1, ranks_per_node=1, rank_bytes=8 * GIB, device="cpu")
    base = empty_model(str(pipeline / "base"), torch.float32, "sdpa")
    wide, narrow = (sampler_memory(GrpoConfig(**float32, autocast=autocast), here, base) for autocast in (False, True))
    assert narrow.weights == wide.weights / 2 and narrow.response == wide.response / 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--quantize", "nf4", "--shard", "fsdp"), "--quantize nf4: cannot be sharded; use --shard none"),
        (("--optimizer", "adamw8bit", "--shard", "fsdp"), "--optimizer adamw8bit: cannot be sharded"),
        (("--quantize", "nf4", "--lora-rank", 0), "--lora-rank must be above 0"),
        (("--attn", "flash"), "--attn flash: needs an NVIDIA GPU"),
    ],
)
def test_what_cannot_be_together_is_refused(pipeline, tmp_path, more, says):
    done = run_command(
        "grpo",
        "--model",
        pipeline / "base",
        "--puzzles",
        pipeline / "puzzles/train.parquet",
        "--out",
        tmp_path / "run",
        *SHORT,
        *more,
    )
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]


@pytest.fixture
def windowed(pipeline, tmp_path) -> Path:
    """A checkpoint of another type, whose layers attend within a window."""
    base = AutoConfig.from_pretrained(pipeline / "base")
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=base.vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            sliding_window=16,
            eos_token_id=base.eos_token_id,
            pad_token_id=base.pad_token_id,
        )
    )
    model.save_pretrained(tmp_path / "windowed")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (pipeline / "base" / name).is_file():
            shutil.copy(pipeline / "base" / name, tmp_path / "windowed")
    return tmp_path / "windowed"


def test_a_model_that_cannot_share_prompts_says_so_and_trains(pipeline, windowed, tmp_path):
    out = start(pipeline, windowed, tmp_path / "run", "--engine", "torch")
    (line,) = [line for line in out.splitlines() if "--packing plain" in line]
    assert line.endswith("cannot share prompts, since it attends within a sliding window")
    rows = lines(tmp_path / "run/metrics.jsonl")
    assert rows[0]["sampling/logp_difference/mean"] < 1e-5 and rows[1]["grad_norm"] > 0
    assert {row["packing/sharing"] for row in lines(tmp_path / "run/timing.jsonl")} == {1.0}


def test_what_a_model_does_to_its_logits_is_known():
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    heads = [
        (Gemma2Config(**small, head_dim=16, num_key_value_heads=2, final_logit_softcapping=20.0), Head(softcap=20.0)),
        (GraniteConfig(**small, logits_scaling=8.0), Head(divisor=8.0)),
        (CohereConfig(**small, logit_scale=0.25), Head(divisor=4.0)),
        (MistralConfig(**small, num_key_value_heads=2), Head()),
    ]
    for config, head in heads:
        assert head_of(AutoModelForCausalLM.from_config(config), "x") == head
    assert "its type gemma2 is none of" in why_not_shared(Gemma2Config())


def test_every_weight_in_bfloat16_is_said(pipeline, capsys):
    cfg = GrpoConfig(model=str(pipeline / "base"), puzzles="p", out="o", lora_rank=0, dtype="bfloat16")
    load_policy(cfg, torch.device("cpu"))
    assert "note: --lora-rank 0 with --dtype bfloat16: weights of 8 bits round" in capsys.readouterr().out
    load_policy(dataclasses.replace(cfg, dtype="float32"), torch.device("cpu"))
    assert "bfloat16" not in capsys.readouterr().out


def test_autocast_is_left_out_where_it_would_take_longer(pipeline, monkeypatch, capsys):
    cfg = GrpoConfig(model=str(pipeline / "base"), puzzles="p", out="o", lora_rank=8, dtype="float32", autocast=True)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for there in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda there=there: there)
        assert load_policy(cfg, torch.device("cpu")).autocast is there
        assert ("note: --autocast is left out" in capsys.readouterr().out) is not there
    assert has_bfloat16_products(torch.device("cuda"))
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert has_bfloat16_products(torch.device("cpu"))
