"""--dtype auto: what it is here, what is recorded, and what --resume and a described machine make of it."""

import dataclasses
import json

import pytest
import torch

from data.distill.rounds import SelfDistillConfig, record_settings
from data.distill.settings import DistillConfig
from data.errors import UserError
from data.options import resolved_dtype
from eval.settings import EvaluateConfig, settings_of
from trainer.config import GrpoConfig
from trainer.record.runfolder import check_run, write_json
from trainer.sft.settings import SftConfig

SFT = {"traces": "t.jsonl", "model": "m", "out": "o"}
EVALUATE = {"puzzles": ("p.jsonl",), "out": "o"}
DISTILL = {"puzzles": "p.jsonl", "out": "o.jsonl"}
SELF = {"model": "m", "puzzles": "p.jsonl", "out": "o"}


@pytest.fixture(params=[True, False], ids=["gpu", "cpu"])
def auto(request, monkeypatch) -> str:
    """What auto is on a machine with a GPU, and on one without."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    return "bfloat16" if request.param else "float32"


@pytest.mark.parametrize(
    ("dtype", "every_weight", "on_gpu", "is_"),
    [
        ("auto", False, True, "bfloat16"),
        ("auto", False, False, "float32"),
        ("auto", True, True, "float32"),
        ("float32", False, True, "float32"),
        ("bfloat16", True, False, "bfloat16"),
    ],
)
def test_what_auto_is(dtype, every_weight, on_gpu, is_):
    assert resolved_dtype(dtype, every_weight=every_weight, on_gpu=on_gpu) == is_


def test_a_step_of_1e_6_is_lost_in_bfloat16():
    """Why auto keeps float32 where every weight is trained: AdamW changes a weight of 0.02 by about the learning rate."""
    weight = torch.tensor(0.02)
    assert weight.bfloat16() - 1e-6 == weight.bfloat16() and weight - 1e-6 != weight


def test_every_command_resolves_it(auto):
    assert GrpoConfig().dtype == SftConfig(**SFT).dtype == SelfDistillConfig(**SELF).dtype == auto
    assert EvaluateConfig(**EVALUATE, model="m").dtype == auto
    assert DistillConfig(**DISTILL, teacher="vllm", model="m").dtype == auto
    full = (GrpoConfig(lora_rank=0), SftConfig(**SFT, lora_rank=0), SelfDistillConfig(**SELF, lora_rank=0))
    assert {config.dtype for config in full} == {"float32"}
    assert GrpoConfig(lora_rank=0, dtype="bfloat16").dtype == "bfloat16"


def test_who_has_no_model_in_this_process_has_no_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("looked for a GPU"))
    assert EvaluateConfig(**EVALUATE, model="m", endpoint="http://127.0.0.1/v1").dtype == "auto"
    assert EvaluateConfig(**EVALUATE, baseline="random").dtype == "auto"
    assert DistillConfig(**DISTILL).dtype == "auto"
    with pytest.raises(UserError, match="--dtype needs --teacher vllm, not embedded"):
        DistillConfig(**DISTILL, dtype="bfloat16")


def test_a_described_machine_has_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert GrpoConfig(dry_run=True, rank_gib=80.0).dtype == "bfloat16"
    assert GrpoConfig(dry_run=True, rank_gib=80.0, lora_rank=0).dtype == "float32"
    assert GrpoConfig(dry_run=True, nodes=2).dtype == GrpoConfig(rank_gib=80.0).dtype == "float32"


def test_the_resolved_dtype_is_recorded_and_compared(auto, tmp_path):
    out = tmp_path / "run"
    config = GrpoConfig(out=str(out), model="m", resume=True)
    write_json(out / "config.json", {"settings": dataclasses.asdict(config)})
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    assert json.loads((out / "config.json").read_text())["settings"]["dtype"] == auto
    check_run(config)
    check_run(dataclasses.replace(config, dtype=auto, eager=True))
    other = "float32" if auto == "bfloat16" else "bfloat16"
    with pytest.raises(UserError, match=f"dtype was '{auto}' in .*, now '{other}'"):
        check_run(dataclasses.replace(config, dtype=other))


def test_answers_and_rounds_record_it(auto, tmp_path):
    evaluation = EvaluateConfig(**EVALUATE, model="m")
    assert settings_of(evaluation, [], "files")["dtype"] == auto
    assert DistillConfig(**DISTILL, teacher="vllm", model="m").meaning([])["dtype"] == auto
    config = SelfDistillConfig(**SELF)
    record_settings(config, tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded["dtype"] == auto and "eager" not in recorded
    record_settings(dataclasses.replace(config, eager=True), tmp_path)  # how the machine is used may change
