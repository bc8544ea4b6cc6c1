"""What an engine is started with on a GPU, and that its draws depend on the seed alone."""

import importlib.util
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.errors import UserError
from rollout.vllm_engine import VLLMEngine
from rollout.vllm_versions import count_at_least, drawing_from, gpu_settings, graph_sizes, refuse_kernels


def test_sizes_of_cuda_graphs():
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    assert graph_sizes(320) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320]
    for most in range(1, 513):
        sizes = graph_sizes(most)
        assert sizes[-1] == most and sizes == sorted(set(sizes))
        assert all(b - a <= max(8, a // 4) for a, b in zip(sizes, sizes[1:], strict=False))


def test_what_a_gpu_gets():
    large, small = 80 << 30, 24 << 30
    assert gpu_settings(40, large, eager=True) == {"enforce_eager": True, "max_num_batched_tokens": 16384}
    assert gpu_settings(8, large, eager=False) == {
        "enforce_eager": False,
        "max_num_batched_tokens": 16384,
        "compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]},
    }
    assert gpu_settings(40, small, eager=True) == {"enforce_eager": True, "max_num_batched_tokens": 2048}


@pytest.mark.slow(5)
def test_vllm_takes_them():
    from vllm.config import CompilationConfig, CUDAGraphMode

    made = CompilationConfig(**gpu_settings(40, 80 << 30, eager=False)["compilation_config"])
    assert made.cudagraph_mode is CUDAGraphMode.FULL_DECODE_ONLY
    assert made.cudagraph_mode.decode_mode() is CUDAGraphMode.FULL
    assert made.cudagraph_mode.mixed_mode() is CUDAGraphMode.NONE
    assert made.cudagraph_capture_sizes == [1, 2, 4, 8, 16, 24, 32, 40]


def draws() -> tuple:
    """A number of each generator that a model runner of vLLM may use, and of Python's, which none does."""
    return torch.rand(1).item(), int(np.random.randint(1 << 40))


def test_draws_are_those_of_the_seed_and_leave_the_generators_as_they_were():
    torch.manual_seed(1)
    np.random.seed(1)
    before, expected = draws(), draws()
    torch.manual_seed(1)
    np.random.seed(1)
    assert draws() == before
    state = random.getstate()
    found = []
    for seed in (7, 8, (1 << 62) + 9):
        with drawing_from(seed):
            found.append(draws())
    with drawing_from(7):
        assert draws() == found[0]
    assert len({torch_draw for torch_draw, _ in found}) == len({numpy_draw for _, numpy_draw in found}) == 3
    with pytest.raises(KeyError), drawing_from(9):
        raise KeyError
    assert draws() == expected and random.getstate() == state


def started_with(monkeypatch, folder, **more) -> dict:
    """The arguments that vLLM's LLM would get. It then fails, as with a model that it does not know."""
    given = {}

    class Llm:
        def __init__(self, *_, **arguments):
            given.update(arguments)
            torch.set_num_threads(1)  # as its worker for GPUs does
            raise ValueError("no such model")

    sampler = SimpleNamespace(batched_count_greater_than=None)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Llm))
    monkeypatch.setitem(sys.modules, "vllm.v1.sample.sampler", sampler)
    with pytest.raises(UserError, match="vLLM does not start with this model"):
        VLLMEngine(str(folder), lora=None, max_model_len=64, dtype="float32", **more)
    # a GPU has the compiled function
    assert sampler.batched_count_greater_than is (None if torch.cuda.is_available() else count_at_least)
    return given


def test_vllm_reads_the_files_that_the_trainer_reads_and_leaves_its_threads(monkeypatch, tmp_path):
    """Mistral's consolidated weights may lie beside, older than the shards of the index."""
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: None)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    threads = torch.get_num_threads()
    assert not {"config_format", "load_format"} & started_with(monkeypatch, tmp_path).keys()
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ  # vLLM would take it in place of our kv_cache_bytes
    torch.set_num_threads(threads)  # on a CPU the worker leaves them alone
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 << 30))
    try:
        torch.set_num_threads(2)
        found = started_with(monkeypatch, tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert (found["config_format"], found["load_format"]) == ("hf", "safetensors")


def test_adapters_in_float32_are_refused_on_a_gpu_and_not_by_vllms_assertion():
    with pytest.raises(
        UserError, match="--dtype float32: on a GPU vLLM computes adapters in 16 bits only; use --dtype"
    ):
        refuse_kernels("float32", on_gpu=True)
    refuse_kernels("bfloat16", on_gpu=True)
    refuse_kernels("float32", on_gpu=False)


@pytest.mark.vllm
def test_vllm_counts_with_the_function_that_is_replaced():
    """Elsewhere it would be ignored unseen, and sampling on a CPU slower. Read, because importing vLLM takes seconds."""
    (folder,) = importlib.util.find_spec("vllm").submodule_search_locations
    sampler = (Path(folder) / "v1/sample/sampler.py").read_text()
    assert "token_ranks = batched_count_greater_than(logprobs, token_logprobs)" in sampler


def test_ranks_are_counted_as_vllm_counts_them():
    x = torch.randn(7, 300).log_softmax(-1)
    chosen = x.gather(1, torch.randint(300, (7, 1)))
    x[2, :5], x[3] = -torch.inf, x[3, 0]
    assert torch.equal(count_at_least(x, chosen), (x >= chosen).sum(-1))
