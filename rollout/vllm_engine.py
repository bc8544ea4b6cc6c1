"""Sampling with vLLM inside every rank: the engine shares the process, and its world, with the trainer."""

import os
import warnings
from typing import Any

# Set before vLLM is imported: the engine core runs in this process, so a debugger and torch's RNG reach it.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from rollout import Rollout, Sampling
from rollout.sync import Manifest, adapter_hash, verify

warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # of vLLM's own calls to torch


class VLLMEngine:
    """One vLLM engine per rank (tensor parallel 1), LoRA slots on, adapter handed over in memory.

    model_dir: a Hugging Face checkpoint. lora: PEFT's r, lora_alpha, target_modules, or None for no adapter.
    max_model_len: prompt + response tokens. kv_cache_bytes: KV cache on CPU; on a GPU vLLM sizes it from memory_fraction.
    """

    def __init__(
        self, model_dir: str, *, lora: dict[str, Any] | None, max_model_len: int, dtype: str = "float32",
        max_num_seqs: int = 256, kv_cache_bytes: int = 1 << 30, memory_fraction: float = 0.4, rank: int = 0,
    ) -> None:  # fmt: skip
        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, kv_cache_bytes >> 30)))
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # several ranks share the cores
        from vllm import LLM

        memory = {"gpu_memory_utilization": memory_fraction} if on_gpu else {"kv_cache_memory_bytes": kv_cache_bytes}
        adapter = {"enable_lora": True, "max_loras": 1, "max_lora_rank": vllm_rank(lora["r"])} if lora else {}
        self.lora, self.request, self.version, self.hash, self.rank = lora, None, 0, "", rank
        self.llm = LLM(
            model_dir, dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs, seed=0,
            enforce_eager=not on_gpu, distributed_executor_backend="external_launcher", tensor_parallel_size=1,
            worker_extension_cls="rollout.vllm_engine.LoRAWorker", logprobs_mode="processed_logprobs",
            skip_tokenizer_init=True, use_tqdm_on_load=False, disable_log_stats=True, enable_prefix_caching=True,
            **memory, **adapter,
        )  # fmt: skip

    def load_adapter(self, tensors: dict[str, Tensor], manifest: Manifest, version: int) -> None:
        """See Engine. A new LoRA name and id per version: vLLM's prefix cache is keyed by the name."""
        from vllm.lora.request import LoRARequest

        # before the hand-over: vLLM folds alpha / r into lora_B in place
        self.hash, self.version = adapter_hash(tensors), version
        self.llm.collective_rpc("set_adapter", args=(tensors, manifest, self.lora, version + 1))
        # a cache that starts empty also makes a resumed run sample what the unbroken one would have
        self.llm.reset_prefix_cache()
        self.request = LoRARequest(f"policy-{version}", version + 1, "in-memory")

    def generate(self, puzzle_ids: list[str], prompts: list[list[int]], sampling: Sampling) -> list[list[Rollout]]:
        """See Engine. Same prompts, adapter and seed give the same responses: vLLM draws from torch's global generator."""
        from vllm import SamplingParams

        params = SamplingParams(
            n=sampling.n, temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_tokens,
            logprobs=0, detokenize=False,
        )  # fmt: skip
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        with torch.random.fork_rng():
            torch.manual_seed(sampling.seed + self.rank)  # ranks sample other prompts: other draws
            outputs = self.llm.generate(requests, params, lora_request=self.request, use_tqdm=False)
        return [
            [self._rollout(puzzle_id, ids, completion) for completion in output.outputs]
            for puzzle_id, ids, output in zip(puzzle_ids, prompts, outputs, strict=True)
        ]

    def prompt_logprobs(self, ids: list[int]) -> list[float]:
        """See Engine. vLLM reads no prefix cache for it, so every layer runs under the adapter at hand."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        with torch.random.fork_rng():
            (output,) = self.llm.generate(
                [{"prompt_token_ids": ids}], params, lora_request=self.request, use_tqdm=False
            )
        return [step[token].logprob for token, step in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]

    def _rollout(self, puzzle_id: str, prompt_ids: list[int], completion) -> Rollout:
        ids = list(completion.token_ids)
        return Rollout(
            puzzle_id=puzzle_id, prompt_ids=prompt_ids, response_ids=ids,
            sampler_logprobs=[step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)],
            finish_reason=completion.finish_reason, adapter_version=self.version, adapter_hash=self.hash,
        )  # fmt: skip

    def close(self) -> None:
        """Stop the engine; its process groups go down before torch.distributed's own."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm


def vllm_rank(rank: int) -> int:
    """The smallest LoRA rank vLLM allocates that holds `rank`. Raises ValueError above its largest."""
    for allowed in (8, 16, 32, 64, 128, 256, 320, 512):
        if rank <= allowed:
            return allowed
    raise ValueError(f"--lora-rank {rank}: vLLM serves adapters up to rank 512")


class LoRAWorker:
    """Mixed into vLLM's worker class (`worker_extension_cls`); `self` is the worker. Puts adapter tensors into its LoRA slots.

    vLLM packs q/k/v and gate/up into one module each, so "modules bound" counts vLLM's modules, not PEFT's.
    """

    def set_adapter(
        self, tensors: dict[str, Tensor], manifest: Manifest, config: dict, adapter_id: int
    ) -> tuple[int, int]:
        """Replace whatever adapter is loaded by `tensors`; returns (PEFT modules given, vLLM modules bound).

        config: PEFT's r, lora_alpha, target_modules. Raises RuntimeError naming a tensor that arrived damaged or unbound.
        """
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        verify(tensors, manifest)
        manager = self.model_runner.lora_manager
        adapters = manager._adapter_manager
        lora = LoRAModel.from_lora_tensors(
            adapter_id,
            tensors,
            PEFTHelper.from_dict({**config, "peft_type": "LORA"}),
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
        )
        given = len(lora.loras)
        if 2 * given != len(tensors):
            raise RuntimeError(
                f"LoRA sync: {len(tensors)} tensors made {given} adapter modules, expected {len(tensors) // 2}"
            )
        for loaded in list(manager.list_adapters()):
            adapters.remove_adapter(loaded)
        adapters.add_adapter(lora)  # packs q/k/v and gate/up in place
        adapters.activate_adapter(adapter_id)
        bound = [name for name in adapters.modules if lora.get_lora(name) is not None]
        unbound = sorted(set(lora.loras) - set(bound) - _packed_away(adapters, lora))
        if unbound or not bound:
            raise RuntimeError(f"LoRA sync: vLLM has no module for {unbound[0] if unbound else 'any adapter tensor'}")
        return given, len(bound)


def _packed_away(adapters, lora) -> set[str]:
    """Names of adapter modules that live on inside a packed vLLM module (q_proj in qkv_proj)."""
    return {
        part
        for name, parts in adapters.packed_modules.items()
        if lora.get_lora(name) is not None
        for part in parts
    }  # fmt: skip
