"""Sampling with vLLM inside every rank: the engine shares process and torch.distributed world with the trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import DistError

from data.errors import RunError, UserError
from data.files import INDEX
from rollout import Finished, LocalEngine, Rollout, Sampling
from rollout.sync import Manifest, Parcel, manifest_hash
from rollout.vllm_versions import (
    MOST_SEQUENCES,
    discard_kv_cache,
    drawing_from,
    gpu_settings,
    held_weights,
    import_vllm,
    leave_other_models_alone,
    merges_adapter,
    name_shared_memory_apart,
    plain_weights,
    refuse_dora,
    refuse_kernels,
    restore_kv_cache,
    telling_of_each,
    vllm_rank,
    why_not_started,
)


class VLLMEngine(LocalEngine):
    """A vLLM engine inside the rank, or over `tensor_parallel` neighbouring ranks. It gets its adapter in memory.

    model_dir: a Hugging Face checkpoint. lora: PEFT's r, lora_alpha, target_modules, or None for no adapter.
    max_model_len: prompt + response tokens. base_dtype: of the trainer's base, where it is not dtype. sequences: responses
    that one generate() asks for at most; eager: see gpu_settings. kv_cache_bytes: KV cache on CPU; on a GPU vLLM sizes it
    from memory_fraction. may_sleep: free the GPU's memory between samplings (level 1: the weights move to main memory;
    level 2 would lose the adapter). nucleus: top_p will be below 1, and the temperature 1. sampler_lora: see
    merges_adapter. shares_weights: the trainer reads its frozen weights from held_weights(); only the KV cache sleeps.
    """

    def __init__(
        self,
        model_dir: str,
        *,
        lora: dict[str, Any] | None,
        max_model_len: int,
        dtype: str = "float32",
        base_dtype: str = "",
        sequences: int = 256,
        eager: bool = False,
        kv_cache_bytes: int = 1 << 30,
        memory_fraction: float = 0.4,
        rank: int = 0,
        size: int = 1,
        tensor_parallel: int = 1,
        may_sleep: bool = False,
        nucleus: bool = False,
        sampler_lora: str = "auto",
        shares_weights: bool = False,
    ) -> None:
        super().__init__(rank, size, tensor_parallel)
        refuse_dora(lora or {})
        on_gpu = torch.cuda.is_available()
        llm = import_vllm()
        if tensor_parallel > 1 and not on_gpu:
            name_shared_memory_apart()
        self.merges = bool(lora) and merges_adapter(
            sampler_lora, model_dir, base_dtype or dtype, on_gpu or shares_weights
        )
        """Is the adapter added to the sampler's copy of the weights, and not applied beside them?"""
        if lora and not self.merges:
            refuse_kernels(dtype, on_gpu, base_dtype)
        self.merged: tuple[Parcel, Manifest] | None = None
        sequences = min(sequences, MOST_SEQUENCES["cuda" if on_gpu else "cpu"])
        device = {"kv_cache_memory_bytes": kv_cache_bytes, "enforce_eager": True}  # CUDA graphs exist on GPUs only
        if on_gpu:
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            device = {"gpu_memory_utilization": memory_fraction, **gpu_settings(sequences, total, eager)}
        adapter = {}
        if lora and not self.merges:
            adapter = {"enable_lora": True, "max_loras": 1, "max_lora_rank": vllm_rank(lora["r"])}
        self.lora, self.request, self.may_sleep, self.asleep = lora, None, may_sleep and on_gpu, False
        self.model_dir, self.shares_weights = model_dir, shares_weights
        assert not (shares_weights and self.merges)  # a merge would write to the trainer's weights (why_two_copies)
        start = plain_weights()(llm) if shares_weights and not on_gpu else llm
        self.bound = (0, 0)
        """(PEFT modules given, vLLM modules bound) of the last adapter."""
        # vLLM's CPU worker replaces the function by a no-op, and its GPU worker sets one thread; both restored below
        set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
        # with an index the files that it names, as the trainer reads, and not Mistral's consolidated ones beside them
        files = {"config_format": "hf", "load_format": "safetensors"} if (Path(model_dir) / INDEX).is_file() else {}
        try:
            self.llm = start(
                model_dir,
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=sequences,
                seed=0,  # generate() seeds each call itself
                distributed_executor_backend="external_launcher",  # this process is the worker; vLLM starts none
                tensor_parallel_size=tensor_parallel,
                enable_sleep_mode=self.may_sleep,
                worker_extension_cls="rollout.vllm_worker.SyncWorker",
                # "processed" is after temperature and top-p, "raw" before both. The trainer scores with the temperature and the
                # whole vocabulary, so a nucleus needs raw, which is right at temperature 1 only (GrpoConfig refuses others)
                logprobs_mode="raw_logprobs" if nucleus else "processed_logprobs",
                generation_config="vllm",  # nothing from the model's generation_config.json: no top-k, no penalty
                skip_tokenizer_init=True,
                use_tqdm_on_load=False,
                disable_log_stats=True,
                enable_prefix_caching=True,  # a group's responses share the keys of their prompt
                **device,
                **adapter,
                **files,
            )
        except Exception as error:  # whatever vLLM raises about a model that it has not the code for
            # a rank that is gone shows itself by a collective that fails, and the watch explains it
            if max(size, tensor_parallel) > 1 and (isinstance(error, DistError) or type(error) is RuntimeError):
                raise
            raise UserError(why_not_started(model_dir, error)) from error
        finally:
            torch.set_num_threads = set_num_threads
            if on_gpu:
                torch.set_num_threads(threads)
        leave_other_models_alone()

    def load_adapter(self, parcel: Parcel, manifest: Manifest, version: int) -> None:
        """See LocalEngine. Every version gets a new LoRA name and id: vLLM's prefix cache is keyed by the name."""
        from vllm.lora.request import LoRARequest

        self.hash, self.version = "", version  # of no adapter, should this fail
        if self.lora is None:
            self.llm.collective_rpc("set_weights", args=(parcel, manifest))
        elif self.merges:
            self.merged = (parcel, manifest)
            self._merge(parcel, manifest)
        else:
            self.bound = self.llm.collective_rpc("set_adapter", args=(parcel, manifest, self.lora, version + 1))[0]
            self.request = LoRARequest(f"policy-{version}", version + 1, "in-memory")  # vLLM's ids start at 1
        self.forget()  # then a resumed run samples the same tokens as an uninterrupted one
        self.hash = manifest_hash(manifest)

    def _merge(self, parcel: Parcel | None, manifest: Manifest) -> None:
        """Give the sampler the base's weights, with the adapter added unless the parcel is None."""
        scale = self.lora["lora_alpha"] / self.lora["r"]
        self.bound = self.llm.collective_rpc("set_merged", args=(parcel, manifest, scale, self.model_dir))[0]
        self.forget()

    def forget(self) -> None:
        """See LocalEngine. Empties the prefix cache; also where another adapter filled it, or its memory is given away."""
        if not self.llm.reset_prefix_cache():  # vLLM itself only logs it
            raise RunError("vLLM did not empty its prefix cache, since a request is not finished; go on with --resume")

    def wake(self) -> None:
        """See LocalEngine."""
        if self.asleep:
            torch.cuda.empty_cache()  # torch keeps what the trainer has freed, and vLLM's allocator cannot take it from there
            self.llm.collective_rpc(restore_kv_cache) if self.shares_weights else self.llm.wake_up()
            self.asleep = False

    def sleep(self) -> None:
        """See LocalEngine. The adapter moves to main memory with the weights, and back with them; shared weights stay."""
        if self.may_sleep and not self.asleep:
            torch.cuda.synchronize()  # sleep() unmaps memory that a queued kernel could still read
            if self.shares_weights:
                self.forget()
                discard_kv_cache()
            else:
                self.llm.sleep(level=1)
            self.asleep = True

    def held_weights(self) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
        """({name: tensor} of vLLM's model, {packed module: its parts}), not copied."""
        return self.llm.collective_rpc(held_weights)[0]

    def generate(
        self,
        puzzle_ids: list[str],
        prompts: list[list[int]],
        sampling: Sampling,
        repeats: Sequence[int] = (),
        finished: Finished | None = None,
    ) -> list[list[Rollout]]:
        """See LocalEngine. Equal prompts, adapter and seed give equal responses."""
        from vllm import SamplingParams

        params = SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_ids),
            logprobs=0,  # of the sampled token alone
            detokenize=False,  # the engine has no tokenizer
        )
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        groups: dict[int, list[Rollout]] = {}

        def end(place: int, completions: list) -> None:
            groups[place] = [self._rollout(puzzle_ids[place], prompts[place], each) for each in completions]
            if finished is not None:
                finished(place, groups[place])

        self.wake()
        # samplers get different prompts and different draws; the ranks of one sampler must draw the same tokens
        with drawing_from(sampling.seed + self.rank // self.tensor_parallel), telling_of_each(self.llm, end):
            self.llm.generate(requests, params, lora_request=self.request, use_tqdm=False)
        return [groups[place] for place in range(len(prompts))]

    def prompt_logprobs(self, ids: list[int], adapter: bool = True) -> list[float]:
        """See LocalEngine. Prompt log-probs use no prefix cache, so every layer runs with the current adapter."""
        from vllm import SamplingParams

        self.wake()
        if self.merges and not adapter and self.merged is not None:
            self._merge(None, [])
            try:
                return self.prompt_logprobs(ids)
            finally:
                self._merge(*self.merged)
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        with drawing_from(0):  # greedy: nothing is drawn
            (output,) = self.llm.generate(
                [{"prompt_token_ids": ids}], params, lora_request=self.request if adapter else None, use_tqdm=False
            )
        return [step[token].logprob for token, step in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]

    def _rollout(self, puzzle_id: str, prompt_ids: list[int], completion) -> Rollout:
        ids = list(completion.token_ids)
        return Rollout(
            puzzle_id=puzzle_id,
            prompt_ids=prompt_ids,
            response_ids=ids,
            sampler_logprobs=[step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)],
            finish_reason=completion.finish_reason,
            adapter_version=self.version,
            adapter_hash=self.hash,
        )

    def close(self) -> None:
        """Stop the engine. Its process groups must be destroyed before torch.distributed's own."""
        if llm := self.__dict__.pop("llm", None):  # once
            llm.llm_engine.engine_core.shutdown()
