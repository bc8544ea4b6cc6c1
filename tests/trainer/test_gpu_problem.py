"""A GPU that torch cannot use is one sentence, and not a run of days on the CPU."""

import sys

import pytest
import torch

from data.errors import UserError
from tests.helpers.commands import run_command
from tests.helpers.forked import ENVIRONMENT
from trainer.config import GrpoConfig
from trainer.ranks.world import gpu_problem, own_device
from trainer.start.preflight import launch_of

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading and "
    "installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to ..."
)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """nvidia_smi(text): the program of that name on PATH prints text."""

    def write(text: str) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{text}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return write


def broken(monkeypatch, message: str) -> None:
    """A torch built for CUDA 13 that finds no GPU it can use."""

    def init() -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)


def test_a_driver_that_is_too_old_is_said_from_the_start(nvidia_smi, monkeypatch):
    nvidia_smi("GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-0)")
    broken(monkeypatch, TOO_OLD)
    said = gpu_problem()
    assert said == (
        f"nvidia-smi lists a GPU that torch {torch.__version__} (CUDA 13.0) cannot use: The NVIDIA driver on your system is "
        "too old (found version 12020); update the driver, or set CUDA_VISIBLE_DEVICES= (empty) to use the CPU"
    )
    for start in (lambda: own_device(0, 1), lambda: launch_of(GrpoConfig())):
        with pytest.raises(UserError) as caught:
            start()
        assert str(caught.value) == said
    described = GrpoConfig(dry_run=True, rank_gib=80.0)  # another machine's GPUs
    assert launch_of(described).device == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_problem() == "" and own_device(0, 1).type == "cpu"


def test_a_torch_for_cpus_beside_a_gpu(nvidia_smi, tmp_path, monkeypatch):
    nvidia_smi("GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-0)")
    monkeypatch.setattr(torch.version, "cuda", None)
    cpu = "or set CUDA_VISIBLE_DEVICES= (empty) to use the CPU"
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert gpu_problem().endswith(f"is a build for CPUs: install a CUDA build of it, {cpu}")
    (tmp_path / "pins.txt").touch()  # an environment of make setup
    assert gpu_problem().endswith(f"is a build for CPUs: rm -r {tmp_path}, then EXTRA=cuda make setup, {cpu}")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for there, words in ((1, "1 GPU"), (2, "2 GPUs")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        assert own_device(there - 1, there) == torch.device("cuda", there - 1)
        with pytest.raises(UserError, match=f"^4 processes on this machine see {words}, .* --nproc-per-node {there}"):
            own_device(3, 4)
    monkeypatch.setenv("SLURM_PROCID", "3")  # srun --gpus-per-task=1 without torchrun
    with pytest.raises(UserError, match=r"let each see all GPUs of its node \(srun --gpu-bind=none\), or set CUDA"):
        own_device(3, 4)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(UserError, match="--nproc-per-node 2\\), or set CUDA"):
        own_device(3, 4)


def test_no_gpu_is_no_problem(nvidia_smi, monkeypatch):
    broken(monkeypatch, "No CUDA GPUs are available")
    for text in ("No devices were found", ""):
        nvidia_smi(text)
        assert gpu_problem() == ""
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu_problem() == ""


@pytest.mark.slow(1)
@pytest.mark.skipif(
    ENVIRONMENT.get("CUDA_VISIBLE_DEVICES") in ("", "-1"), reason="the tests run with the CPU asked for"
)
def test_the_command_says_it(pipeline, tmp_path, nvidia_smi):
    nvidia_smi("GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-0)")
    given = ("--model", pipeline / "base", "--max-prompt-tokens", 400, "--max-response-tokens", 16, "--lora-rank", 8)
    done = run_command("grpo", *given, "--dry-run", env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert done.returncode == 2 and "Error: nvidia-smi lists a GPU" in done.stderr and "Traceback" not in done.stderr
