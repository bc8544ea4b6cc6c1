"""What is set and changed in vLLM where an engine starts, and where its versions differ: in one place.

The ranges of setup.cfg were tried at both ends, vLLM 0.26 with torch 2.11 (on a GPU and on a CPU) and 0.32 with torch 2.13 (on
a CPU), and read in all versions between. What else we use of vLLM is alike in them, or the place that uses it says so.
"""

import importlib
import os
import re
import secrets
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.errors import UserError

MOST_SEQUENCES = {"cuda": 512, "cpu": 256}
"""Responses sampled side by side at most. More wait: their keys and values, and their logits, would take the memory."""


def prepare_environment() -> None:
    """Set the variables that vLLM reads when it is imported. Called only where an engine starts."""
    # run the engine core in this process: a debugger and torch's random generators then reach it
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # it has a generator of its own: see drawing_from
    if not torch.cuda.is_available():
        # by default vLLM pins its threads to cores, but the ranks of a machine share its cores
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # vLLM compiles one function where it samples: seconds of each process (see count_at_least)
        torch.compiler.set_stance("force_eager")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # about vLLM's own calls to torch


def import_vllm() -> type:
    """vLLM's class LLM, imported with its variables set, and on a CPU with `count_at_least` for what it would compile."""
    prepare_environment()
    from vllm import LLM

    if not torch.cuda.is_available():
        importlib.import_module("vllm.v1.sample.sampler").batched_count_greater_than = count_at_least
    return LLM


def count_at_least(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[B] int64, how many of each row of x [B,V] are at least its value [B,1].

    vLLM counts for every token that it samples how many were at least as likely, and compiles the function, which takes
    seconds of each process. Without a compiler its sum of truth values in int64 takes ten times as long as this one: 34 ms
    a token of 128 responses at a vocabulary of 49,152.

    >>> count_at_least(torch.tensor([[-1.0, -2.0, -2.0], [-3.0, -1.0, -0.5]]), torch.tensor([[-2.0], [-0.5]])).tolist()
    [3, 1]
    """
    counted = torch.ge(x, values, out=torch.empty_like(x, dtype=torch.float32)).sum(-1)
    return counted.long()  # of up to 2^24 ones a sum in float32 is exact


def why_not_started(model_dir: str, error: Exception) -> str:
    """One sentence for an exception of vLLM's constructor. Its traceback is printed under VLLM_LOGGING_LEVEL=DEBUG."""
    if os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG":
        traceback.print_exception(error)
    if too_long := re.search(
        r"max_model_len \((\d+)\) is greater than the derived max_model_len \(.*?=(\d+)", str(error)
    ):
        asked, most = map(int, too_long.groups())
        return (
            f"--max-response-tokens: the longest prompt and response would have {asked:,} tokens, and {model_dir} has "
            f"positions for {most:,} (max_position_embeddings in its config.json); give {asked - most:,} fewer"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = next((line for line in lines if "validation error for" not in line), lines[0])  # pydantic's heading
    said = said if len(said) <= 300 else f"{said[:300]}..."
    if re.search(r"memory.utilization|KV cache memory|cache blocks|out of memory", str(error), re.IGNORECASE):
        remedy = (
            "--memory-fraction is its share of the GPU: lower it when other programs hold memory, else raise it; or give"
            if torch.cuda.is_available()
            else "set VLLM_CPU_KVCACHE_SPACE to more GiB, or give"
        )
        return f"--model {model_dir}: vLLM has too little memory ({said}); {remedy} a smaller --max-response-tokens"
    return (
        f"--model {model_dir}: vLLM does not start with this model ({type(error).__name__}: {said}); use --engine torch where "
        "the command has it, or a model that vLLM serves (VLLM_LOGGING_LEVEL=DEBUG shows the traceback)"
    )


def vllm_rank(rank: int) -> int:
    """The smallest slot size of vLLM that holds LoRA rank `rank`. Raises UserError above the largest size."""
    for allowed in (8, 16, 32, 64, 128, 256, 320, 512):
        if rank <= allowed:
            return allowed
    raise UserError(
        f"an adapter of rank {rank}: vLLM serves up to 512; train with a smaller --lora-rank, or merge it (launch/export.py)"
    )


def merges_adapter(sampler_lora: str, model_dir: str, dtype: str, on_gpu: bool) -> bool:
    """Does the sampler add the adapter to its weights ("merged"), or compute it beside them in vLLM's kernels ("kernel")?

    "auto" merges on a CPU, where vLLM's kernels take several times as long as the model itself, but not into a bfloat16 base:
    its numbers lie far apart, and a small update would be rounded away from most of them. dtype: of the trainer's base.
    on_gpu: also True where the weights are the trainer's too.
    """
    folder = Path(model_dir)
    # a shape for --dry-run has no weights at all
    can = dtype == "float32" and (any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin")))
    if sampler_lora == "merged" and not can:
        raise UserError(
            f"--sampler-lora merged: needs --dtype float32 and safetensors files in {model_dir}; use --sampler-lora kernel"
        )
    return sampler_lora == "merged" or (sampler_lora == "auto" and can and not on_gpu)


def refuse_kernels(dtype: str, on_gpu: bool, base_dtype: str = "") -> None:
    """Raises UserError where vLLM's kernels cannot compute an adapter. dtype: of the sampler; base_dtype: where it is another."""
    if not on_gpu or dtype != "float32":  # its kernels assert it, inside its start
        return
    problem, cpu = "on a GPU vLLM computes adapters in 16 bits only", "CUDA_VISIBLE_DEVICES= (empty)"
    if base_dtype not in ("", dtype):
        raise UserError(f"--sampler-dtype {dtype}: {problem}; leave it out, or go on with the CPU: {cpu}")
    raise UserError(
        f"--dtype {dtype}: {problem}; use --dtype bfloat16 (in grpo.py and ppo.py also --sampler-dtype bfloat16, or "
        f"--sampler-lora merged), or go on with the CPU: {cpu}"
    )


def refuse_dora(config: dict[str, Any]) -> None:
    """Raises UserError for a DoRA adapter: vLLM would ignore its magnitudes and sample from another policy."""
    if config.get("use_dora") or config.get("lora_magnitude_vector"):
        raise UserError(
            "the adapter is DoRA (use_dora), which vLLM cannot serve: train plain LoRA, or merge it into the base first"
        )


def gpu_settings(sequences: int, gpu_bytes: int, eager: bool) -> dict[str, Any]:
    """Arguments of vLLM's LLM that make it start sooner on a GPU.

    sequences: max_num_seqs. gpu_bytes: memory of the GPU. eager: neither compile the model nor capture CUDA graphs.

    By default vLLM captures 172 graphs for 256 sequences: for each of 51 batch sizes up to 512 tokens, with and without
    an adapter, and for decoding once more. A step starts all its prompts at once, in batches of thousands of tokens that
    no graph is made for, and then only decodes: so graphs of decoding suffice, for as many sequences as a step has.
    """
    settings: dict[str, Any] = {"enforce_eager": eager}
    settings["max_num_batched_tokens"] = prompt_batch(sequences, gpu_bytes)
    if not eager:
        sizes = graph_sizes(sequences)
        settings["compilation_config"] = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
    return settings


def prompt_batch(sequences: int, gpu_bytes: float) -> int:
    """Prompt tokens that vLLM computes at a time; it sets memory aside for them, which its KV cache then lacks.

    As vLLM's own choice for offline work on a card of 70 GiB or more, and on a smaller one; of a 24 GB card 8,192 tokens
    of a 7B model would take as much as the whole KV cache.
    """
    tokens = 16384 if gpu_bytes >= 70 << 30 else 8192 if gpu_bytes >= 40 << 30 else 2048
    return max(tokens, sequences)


def graph_sizes(sequences: int) -> list[int]:
    """Batch sizes of decoding that get a CUDA graph; a smaller batch is padded to the next one.

    As sequences end, a step goes through all sizes from `sequences` to 1. Above 32 sizes grow by a quarter at most, and
    below decoding takes the same time whatever the size. graph_sizes(40) is [1, 2, 4, 8, 16, 24, 32, 40].
    """
    sizes, size = [1, 2, 4, 8, 16, 24, 32], 32
    while size < sequences:
        size += max(8, 1 << (size.bit_length() - 3))  # a quarter of the power of two below
        sizes.append(size)
    return sorted({min(size, sequences) for size in sizes})


@contextmanager
def telling_of_each(llm: Any, end: Callable[[int, list], None]) -> Iterator[None]:
    """While `llm` generates: end(place among the prompts, its completions) as soon as all completions of a prompt have ended."""
    engine, first = llm.llm_engine, llm.request_counter.counter  # requests are numbered in the order of the prompts
    step = engine.step

    def step_and_tell() -> list:
        outputs = step()
        for output in outputs:
            if output.finished:
                end(int(output.request_id) - first, output.outputs)
        return outputs

    engine.step = step_and_tell
    try:
        yield
    finally:
        del engine.step  # of the instance: the class has its own


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """A context in which vLLM draws its tokens from a seed. The global random generators are as before afterwards.

    vLLM has two model runners. The one for CPUs draws from torch's generator. The one for GPUs, in all versions of our
    range, draws a seed per request from numpy's, which vLLM itself seeds with 0 once: without this, samplers of several
    ranks would draw alike, and a resumed run other tokens than an unbroken one.
    """
    numpy_state = np.random.get_state()
    # of this process's GPU: by default torch warns where there are several, and sets each of them up
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        np.random.seed(seed % (1 << 32))
        try:
            yield
        finally:
            np.random.set_state(numpy_state)


def name_shared_memory_apart() -> None:
    """Make the names of vLLM's shared memory on a CPU unique to a sampler.

    Under an external launcher vLLM names it by the ranks alone. Two runs on a machine would then meet in one piece of
    memory, and one that a killed run left behind would make every later run fail (errno 17).
    """
    from vllm.distributed.device_communicators import cpu_communicator

    distributed = cpu_communicator._CPUSHMDistributed
    if not hasattr(distributed, "name_by_ranks"):
        distributed.name_by_ranks = staticmethod(distributed.make_group_name)
        distributed.make_group_name = staticmethod(_name_with_token)


def _name_with_token(communicator: Any) -> str:
    """vLLM's own name and a random number, which the sampler's first rank draws. Collective over the sampler's ranks."""
    token = torch.tensor([secrets.randbits(62)])
    torch.distributed.broadcast(token, src=communicator.ranks[0], group=communicator.device_group)
    from vllm.distributed.device_communicators import cpu_communicator

    # at the end: the name begins with slashes, which may stand nowhere else
    return f"{cpu_communicator._CPUSHMDistributed.name_by_ranks(communicator)}-{token.item():x}"


def leave_other_models_alone() -> None:
    """Make vLLM's change to a class of transformers hold for vLLM's own instance only.

    For a model that it has no code for (SmolLM3, OLMo 2) vLLM runs transformers' class, and replaces its __call__ by one
    that expects vLLM's attributes. The trainer's instance of the same class has none.
    """
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

    for changed in TorchCompileWithNoGuardsWrapper.__subclasses__():
        if changed.__module__.startswith("transformers.") and not hasattr(changed, "call_of_vllm"):
            changed.call_of_vllm = changed.__call__
            changed.__call__ = _call_by_owner


def _call_by_owner(model: Any, *args: Any, **kwargs: Any) -> Any:
    if "do_not_compile" in vars(model):  # set by vLLM's __init__
        return model.call_of_vllm(*args, **kwargs)
    return torch.nn.Module.__call__(model, *args, **kwargs)


@contextmanager
def plain_weights() -> Iterator[None]:
    """A context in which vLLM on a CPU leaves the weights that it loads as the checkpoint has them, for --base shared.

    Otherwise it packs every matrix for the kernels of oneDNN, AMX or Zen, and frees the plain one; no setting turns that off.
    The products are then PyTorch's own, on the plain weights. On a GPU vLLM leaves them plain anyway.
    """
    from vllm.model_executor.layers import utils

    # looked up by name for every layer, the head included, when its weights are loaded
    packing = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = _use_plain_weight
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = packing


def _use_plain_weight(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


def held_weights(worker: Any) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """({name: tensor} of the model of a vLLM worker, {packed module: its parts}). Views: nothing is copied."""
    model = worker.model_runner.get_model()
    # a layer with LoRA slots is wrapped. detach(): a plain tensor, which still counts the writes to the parameter
    held = {name.replace(".base_layer.", "."): p.detach() for name, p in model.named_parameters()}
    return held, dict(getattr(model, "packed_modules_mapping", {}))


KV_CACHE = "kv_cache"
"""vLLM's tag of the memory of its KV cache, in the allocator that a sleeping engine uses (on a GPU)."""


def discard_kv_cache(allocator: Any = None) -> None:
    """Give the memory of the KV cache back, and of nothing else: under --base shared the trainer reads the weights.

    An engine's own sleep() takes the weights too, at every level. The last versions of our range can discard a tag alone;
    for the others the same is done here, piece by piece. allocator: default vLLM's. Afterwards the prefix cache must be reset.
    """
    allocator = allocator or _allocator()
    if hasattr(allocator, "discard"):
        allocator.discard((KV_CACHE,))
        return
    from vllm.device_allocator import cumem

    for piece in allocator.pointer_to_data.values():
        if piece.tag == KV_CACHE:
            cumem.unmap_and_release(piece.handle)
            piece.is_asleep = True  # some versions wake only what says so


def restore_kv_cache(worker: Any) -> None:
    """Take memory for the KV cache of a vLLM worker again, at the same addresses; what it holds is of no use.

    By the worker and not by its allocator alone: in the first versions of our range the runner keeps the addresses of its
    block tables in the same memory, and the worker has it write them anew. Without that the next batch reads from a random
    address.
    """
    worker.wake_up([KV_CACHE])


def _allocator() -> Any:
    from vllm.device_allocator.cumem import CuMemAllocator

    return CuMemAllocator.get_instance()
