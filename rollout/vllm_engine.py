"""Sampling with vLLM inside every rank: the engine shares the process, and its world, with the trainer."""

import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.errors import UserError
from rollout import LocalEngine, Rollout, Sampling
from rollout.sync import Manifest, Parcel, SyncError, manifest_hash


def prepare_environment(kv_cache_bytes: int) -> None:
    """What vLLM reads from the environment when it is imported. Called where an engine starts, and nowhere else."""
    # the engine core runs in this process, so that a debugger and torch's random generators reach it
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, kv_cache_bytes >> 30)))  # GiB
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # several ranks share the cores
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # of vLLM's own calls to torch


class VLLMEngine(LocalEngine):
    """A vLLM engine inside the rank, or over `tensor_parallel` neighbouring ranks; adapter or weights handed over in memory.

    model_dir: a Hugging Face checkpoint. lora: PEFT's r, lora_alpha, target_modules, or None for no adapter. max_model_len:
    prompt + response tokens. kv_cache_bytes: KV cache on CPU; on a GPU vLLM sizes it from memory_fraction. may_sleep: give the
    GPU's memory back between samplings (level 1: the weights wait in main memory; level 2 would lose the adapter).
    """

    def __init__(
        self,
        model_dir: str,
        *,
        lora: dict[str, Any] | None,
        max_model_len: int,
        dtype: str = "float32",
        max_num_seqs: int = 256,
        kv_cache_bytes: int = 1 << 30,
        memory_fraction: float = 0.4,
        rank: int = 0,
        size: int = 1,
        tensor_parallel: int = 1,
        may_sleep: bool = False,
    ) -> None:
        super().__init__(rank, size, tensor_parallel)
        refuse_dora(lora or {})
        on_gpu = torch.cuda.is_available()
        prepare_environment(kv_cache_bytes)
        from vllm import LLM

        memory = {"gpu_memory_utilization": memory_fraction} if on_gpu else {"kv_cache_memory_bytes": kv_cache_bytes}
        adapter = {"enable_lora": True, "max_loras": 1, "max_lora_rank": vllm_rank(lora["r"])} if lora else {}
        self.lora, self.request, self.may_sleep, self.asleep = lora, None, may_sleep and on_gpu, False
        self.bound = (0, 0)
        """(PEFT modules given, vLLM modules bound) of the last adapter."""
        set_num_threads = torch.set_num_threads  # vLLM's CPU worker leaves one that does nothing; put back below
        self.llm = LLM(
            model_dir,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            seed=0,
            enforce_eager=not on_gpu,
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=tensor_parallel,
            enable_sleep_mode=self.may_sleep,
            worker_extension_cls="rollout.vllm_engine.SyncWorker",
            logprobs_mode="processed_logprobs",
            skip_tokenizer_init=True,
            use_tqdm_on_load=False,
            disable_log_stats=True,
            enable_prefix_caching=True,
            **memory,
            **adapter,
        )
        torch.set_num_threads = set_num_threads

    def load_adapter(self, parcel: Parcel, manifest: Manifest, version: int) -> None:
        """See LocalEngine. A new LoRA name and id per version: vLLM's prefix cache is keyed by the name."""
        from vllm.lora.request import LoRARequest

        self.hash, self.version = manifest_hash(manifest), version
        if self.lora is None:
            self.llm.collective_rpc("set_weights", args=(parcel, manifest))
        else:
            answers = self.llm.collective_rpc("set_adapter", args=(parcel, manifest, self.lora, version + 1))
            self.bound = answers[0]
            self.request = LoRARequest(f"policy-{version}", version + 1, "in-memory")
        # a cache that starts empty also makes a resumed run sample what the unbroken one would have
        self.llm.reset_prefix_cache()

    def wake(self) -> None:
        """See LocalEngine."""
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def sleep(self) -> None:
        """See LocalEngine. The adapter goes with the weights, and comes back with them."""
        if self.may_sleep and not self.asleep:
            torch.cuda.synchronize()
            self.llm.sleep(level=1)
            self.asleep = True

    def generate(self, puzzle_ids: list[str], prompts: list[list[int]], sampling: Sampling) -> list[list[Rollout]]:
        """See LocalEngine. Same prompts, adapter and seed give the same responses: vLLM draws from torch's global generator."""
        from vllm import SamplingParams

        params = SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            logprobs=0,
            detokenize=False,
        )
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        self.wake()
        with torch.random.fork_rng():
            # other ranks sample other prompts: other draws; those of one sampler draw the same
            torch.manual_seed(sampling.seed + self.rank // self.tensor_parallel)
            outputs = self.llm.generate(requests, params, lora_request=self.request, use_tqdm=False)
        return [
            [self._rollout(puzzle_id, ids, completion) for completion in output.outputs]
            for puzzle_id, ids, output in zip(puzzle_ids, prompts, outputs, strict=True)
        ]

    def prompt_logprobs(self, ids: list[int], adapter: bool = True) -> list[float]:
        """See LocalEngine. vLLM reads no prefix cache for it, so every layer runs under the adapter at hand."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        with torch.random.fork_rng():
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
        """Stop the engine; its process groups go down before torch.distributed's own."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm


def vllm_rank(rank: int) -> int:
    """The smallest LoRA rank vLLM allocates that holds `rank`. Raises UserError above its largest."""
    for allowed in (8, 16, 32, 64, 128, 256, 320, 512):
        if rank <= allowed:
            return allowed
    raise UserError(f"--lora-rank {rank}: vLLM serves adapters up to rank 512")


def refuse_dora(config: dict[str, Any]) -> None:
    """Raises UserError for a DoRA adapter: vLLM would leave its magnitudes out and sample from another policy."""
    if config.get("use_dora") or config.get("lora_magnitude_vector"):
        raise UserError(
            "the adapter is DoRA (use_dora), which vLLM cannot serve: train plain LoRA, or merge it into the base first"
        )


class SyncWorker:
    """Mixed into vLLM's worker class (`worker_extension_cls`); `self` is the worker. Puts tensors where vLLM samples from."""

    def set_adapter(self, parcel: Parcel, manifest: Manifest, config: dict, adapter_id: int) -> tuple[int, int]:
        """Replace whatever adapter is loaded by the parcel's; returns (PEFT modules given, vLLM modules bound).

        vLLM packs q/k/v and gate/up into one module each, so "bound" counts vLLM's modules, not PEFT's. config: PEFT's r,
        lora_alpha, target_modules. Raises SyncError naming a tensor that arrived damaged, a module without a place in vLLM,
        or a slot that does not hold what was sent.
        """
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        parcel.verify(manifest)
        tensors = parcel.tensors
        manager = self.model_runner.lora_manager
        adapters = manager._adapter_manager
        plan: SlotPlan | None = getattr(self, "slot_plan", None)
        if plan is not None and plan.parcel is parcel and plan.config == config:
            plan.refill(adapters, adapter_id)
            return len(tensors) // 2, plan.bound
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
            raise SyncError(
                f"LoRA sync: {len(tensors)} tensors made {given} adapter modules, expected {len(tensors) // 2}"
            )
        for loaded in list(manager.list_adapters()):
            adapters.remove_adapter(loaded)
        adapters.add_adapter(lora)  # packs q/k/v and gate/up, and folds alpha / r into lora_B, in place
        adapters.activate_adapter(adapter_id)
        bound = [name for name in adapters.modules if lora.get_lora(name) is not None]
        unbound = sorted(set(lora.loras) - set(bound) - _packed_away(adapters, lora))
        if unbound or not bound:
            raise SyncError(f"LoRA sync: vLLM has no module for {unbound[0] if unbound else 'any adapter tensor'}")
        slot = adapters.lora_index_to_id.index(adapter_id)
        pieces = [
            piece for name in bound for piece in _slot_pieces(name, adapters.modules[name], slot, lora.get_lora(name))
        ]
        _check_slots(pieces)
        plan = SlotPlan(parcel=parcel, config=dict(config), slot=slot, lora=lora, bound=len(bound), pieces=pieces)
        self.slot_plan = plan if plan.reads_the_parcel() else None
        return given, len(bound)

    def set_weights(self, parcel: Parcel, manifest: Manifest) -> int:
        """Replace every weight of the model by the parcel's (checkpoint names); returns how many vLLM read.

        vLLM packs and, on a CPU, re-lays the weights out, so they cannot be read back: the canary alone proves what it samples
        from.
        """
        parcel.verify(manifest)
        taken = []

        def each():
            for name, tensor in parcel.tensors.items():
                taken.append(name)
                yield name, tensor

        self.reload_weights(weights_iterator=each())
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        # a head tied to the embedding would keep its old packed copy (vLLM 0.32 on CPU)
        if hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)
        if len(taken) != len(parcel.tensors):
            raise SyncError(f"weight sync: vLLM took {len(taken)} of {len(parcel.tensors)} tensors")
        return len(taken)


def _packed_away(adapters, lora) -> set[str]:
    """Names of adapter modules that live on inside a packed vLLM module (q_proj in qkv_proj)."""
    return {
        part for name, parts in adapters.packed_modules.items() if lora.get_lora(name) is not None for part in parts
    }


@dataclass(frozen=True, kw_only=True)
class SlotPiece:
    """A part of a module's LoRA slot, which vLLM's kernels read, and the tensor that belongs there."""

    module: str
    half: str
    """lora_A or lora_B."""
    held: Tensor
    sent: Tensor


def _slot_pieces(name: str, module, slot: int, weights) -> list[SlotPiece]:
    """This rank's pieces of a module: three for a packed q/k/v, one for most."""
    packed = isinstance(weights.lora_a, list)
    lora_a, lora_b = weights.lora_a, weights.lora_b
    if module.tp_size > 1:
        lora_a, lora_b = module.slice_lora_a(lora_a), module.slice_lora_b(lora_b)
    halves = (("lora_A", module.lora_a_stacked, lora_a), ("lora_B", module.lora_b_stacked, lora_b))
    return [
        SlotPiece(module=name, half=half, held=place[slot, 0, : value.shape[0], : value.shape[1]], sent=value)
        for half, stacked, values in halves
        for place, value in zip(stacked, values if packed else [values], strict=True)
        if value is not None
    ]


def _check_slots(pieces: list[SlotPiece]) -> None:
    """Raises SyncError naming the first module whose slot does not hold what was sent."""
    for piece in pieces:
        if not torch.equal(piece.held, piece.sent.to(device=piece.held.device, dtype=piece.held.dtype)):
            raise SyncError(f"LoRA sync: the slot of {piece.module} does not hold the {piece.half} that was sent")


@dataclass(frozen=True, kw_only=True)
class SlotPlan:
    """Where each tensor of a parcel lies in vLLM's slots, learned from the first version; later ones are copied straight there.

    It saves most of a hand-over of many small tensors (LOG.md).
    """

    parcel: Parcel
    config: dict
    slot: int
    lora: Any
    """vLLM's LoRAModel, whose tensors are views into the parcel."""
    bound: int
    pieces: list[SlotPiece]

    def reads_the_parcel(self) -> bool:
        """Are all tensors views into the parcel? Not where vLLM changed their dtype, device or order: then each version goes
        through its own loading."""
        storage = self.parcel.buffer.untyped_storage().data_ptr()
        return all(piece.sent.untyped_storage().data_ptr() == storage for piece in self.pieces)

    def refill(self, adapters, adapter_id: int) -> None:
        """Copy the parcel's tensors into the slots, check them there, and give the adapter its new id."""
        torch._foreach_copy_([piece.held for piece in self.pieces], [piece.sent for piece in self.pieces])
        _check_slots(self.pieces)
        scale = self.config["lora_alpha"] / self.config["r"]  # vLLM folds it into lora_B
        torch._foreach_mul_([piece.held for piece in self.pieces if piece.half == "lora_B"], scale)
        for loaded in list(adapters.list_adapters()):
            adapters.remove_adapter(loaded)
        self.lora.id = adapter_id
        adapters._registered_adapters[adapter_id] = self.lora
        adapters._active_adapters[adapter_id] = None
        adapters.lora_index_to_id[self.slot] = adapter_id
