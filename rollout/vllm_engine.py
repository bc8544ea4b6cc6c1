"""Sampling with vLLM inside every rank: the engine shares process and torch.distributed world with the trainer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import DistError

from data.errors import RunError, UserError
from data.files import INDEX, weight_files
from rollout import LocalEngine, Rollout, Sampling
from rollout.sync import Manifest, Parcel, SyncError, manifest_hash
from rollout.vllm_versions import (
    MOST_SEQUENCES,
    discard_kv_cache,
    drawing_from,
    gpu_settings,
    held_weights,
    leave_other_models_alone,
    merges_adapter,
    name_shared_memory_apart,
    plain_weights,
    prepare_environment,
    refuse_dora,
    refuse_kernels,
    restore_kv_cache,
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
        prepare_environment()
        if tensor_parallel > 1 and not on_gpu:
            name_shared_memory_apart()
        from vllm import LLM

        self.merges = bool(lora) and merges_adapter(
            sampler_lora, model_dir, base_dtype or dtype, on_gpu or shares_weights
        )
        """Is the adapter added to the sampler's copy of the weights, and not applied beside them?"""
        if lora and not self.merges:
            refuse_kernels(dtype, on_gpu)
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
        start = plain_weights()(LLM) if shares_weights and not on_gpu else LLM
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
                worker_extension_cls="rollout.vllm_engine.SyncWorker",
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
        self, puzzle_ids: list[str], prompts: list[list[int]], sampling: Sampling, repeats: Sequence[int] = ()
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
        self.wake()
        # samplers get different prompts and different draws; the ranks of one sampler must draw the same tokens
        with drawing_from(sampling.seed + self.rank // self.tensor_parallel):
            outputs = self.llm.generate(requests, params, lora_request=self.request, use_tqdm=False)
        return [
            [self._rollout(puzzle_id, ids, completion) for completion in output.outputs]
            for puzzle_id, ids, output in zip(puzzle_ids, prompts, outputs, strict=True)
        ]

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


class SyncWorker:
    """A mixin for vLLM's worker class (`worker_extension_cls`); `self` is the worker. Puts tensors where vLLM reads."""

    def set_adapter(self, parcel: Parcel, manifest: Manifest, config: dict, adapter_id: int) -> tuple[int, int]:
        """Replace the loaded adapter by the parcel's. Returns (PEFT modules given, vLLM modules bound).

        vLLM packs q/k/v and gate/up into one module each, so "bound" counts vLLM's modules, not PEFT's. config: PEFT's
        r, lora_alpha, target_modules. Raises SyncError that names a damaged tensor, a module that vLLM does not have,
        or a slot whose content differs from the parcel.
        """
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        parcel.verify(manifest)  # the bytes as they arrived
        tensors = as_vllm_packs(parcel.tensors, self.model_runner.get_model().packed_modules_mapping)
        manager = self.model_runner.lora_manager
        adapters = manager._adapter_manager
        plan: SlotPlan | None = getattr(self, "slot_plan", None)
        if plan is not None and plan.parcel is parcel and plan.config == config:
            plan.refill(adapters, adapter_id)
            return len(parcel.tensors) // 2, plan.bound
        lora = LoRAModel.from_lora_tensors(
            adapter_id,
            tensors,
            PEFTHelper.from_dict({**config, "peft_type": "LORA"}),
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
        )
        sources = _sources(lora.loras, tensors)
        given = len(lora.loras)
        if 2 * given != len(tensors):
            raise SyncError(
                f"LoRA sync: {len(tensors)} tensors made {given} adapter modules, expected {len(tensors) // 2}"
            )
        for loaded in list(manager.list_adapters()):  # first: there is one slot (max_loras)
            adapters.remove_adapter(loaded)
        adapters.add_adapter(lora)  # packs q/k/v and gate/up, and multiplies lora_B by alpha / r in place
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
        pieces = [replace(piece, sent=sources.get(id(piece.sent), piece.sent)) for piece in pieces]
        plan = SlotPlan(parcel=parcel, config=dict(config), slot=slot, lora=lora, bound=len(bound), pieces=pieces)
        self.slot_plan = plan if plan.reads_the_parcel() else None
        return len(parcel.tensors) // 2, len(bound)

    def set_merged(self, parcel: Parcel | None, manifest: Manifest, scale: float, base: str) -> tuple[int, int]:
        """Replace the weights by the base's plus the parcel's adapter, W + scale B A. Returns (adapter modules, merged).

        The base is read from its files each time (they stay in the page cache), so nothing drifts over many versions.
        parcel None: the base alone. Raises SyncError for a damaged tensor, or one whose layer the base does not have.
        """
        pairs: dict[str, list[Tensor]] = {}
        if parcel is not None:
            parcel.verify(manifest)
            for name, tensor in parcel.tensors.items():  # A comes before B
                layer = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
                pairs.setdefault(f"{layer}.weight", []).append(tensor)
        used = []

        def each():
            for path in weight_files(Path(base)):
                with safe_open(path, "pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 (no mapping)
                        weight = handle.get_tensor(name)
                        if name in pairs:
                            used.append(name)
                            lora_a, lora_b = (half.float().cpu() for half in pairs[name])
                            weight = torch.addmm(weight.float(), lora_b, lora_a, alpha=scale)
                        yield name, weight

        self.reload_weights(weights_iterator=each())
        self._repack_head()
        if missing := sorted(set(pairs) - set(used)):
            raise SyncError(f"LoRA sync: the base has no {missing[0]} for the adapter")
        return len(pairs), len(used)

    def _repack_head(self) -> None:
        """vLLM 0.32 on a CPU: a head tied to the embedding keeps its old packed copy unless it is packed again."""
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        if hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)

    def set_weights(self, parcel: Parcel, manifest: Manifest) -> int:
        """Replace every weight of the model by the parcel's (checkpoint names). Returns how many tensors vLLM read.

        vLLM packs the weights and, on a CPU, changes their memory layout, so they cannot be read back and compared.
        Only the canary proves which weights it samples from.
        """
        parcel.verify(manifest)
        taken = []

        def each():
            for name, tensor in parcel.tensors.items():
                taken.append(name)
                yield name, tensor

        self.reload_weights(weights_iterator=each())
        self._repack_head()
        if len(taken) != len(parcel.tensors):
            raise SyncError(f"weight sync: vLLM took {len(taken)} of {len(parcel.tensors)} tensors")
        return len(taken)


def as_vllm_packs(tensors: dict[str, Tensor], packs: dict[str, list[str]]) -> dict[str, Tensor]:
    """The adapter with gate_up_proj as two modules, where vLLM packs it from two but the checkpoint holds one (GLM-4).

    Both halves have the same A [r,in]; B [gate + up,r] is cut in the middle. The parts are views of the tensors.
    """
    whole, parts = "gate_up_proj", packs.get("gate_up_proj", [])
    if len(parts) < 2:
        return tensors
    split = {}
    for name, tensor in tensors.items():
        if f".{whole}." not in name:
            split[name] = tensor
            continue
        halves = tensor.chunk(2) if ".lora_B." in name else (tensor, tensor)
        for part, half in zip(parts, halves, strict=True):
            split[name.replace(whole, part)] = half
    return split


def _sources(loras: dict[str, Any], tensors: dict[str, Tensor]) -> dict[int, Tensor]:
    """{id of a tensor of vLLM's LoRAModel: the parcel's tensor that it was made of}: a copy, if of another dtype or place."""
    made = {}
    for name, tensor in tensors.items():
        module, half = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        if module in loras:
            made[id(getattr(loras[module], half.lower()))] = tensor
    return made


def _packed_away(adapters, lora) -> set[str]:
    """Names of adapter modules that are part of a packed vLLM module (q_proj in qkv_proj)."""
    return {
        part for name, parts in adapters.packed_modules.items() if lora.get_lora(name) is not None for part in parts
    }


@dataclass(frozen=True, kw_only=True)
class SlotPiece:
    """A part of a module's LoRA slot, which vLLM's kernels read, and the tensor that belongs there."""

    module: str
    half: str
    """lora_A or lora_B."""
    slot: Tensor
    """A view into the weights that vLLM's kernels read."""
    sent: Tensor


def _slot_pieces(name: str, module, slot: int, weights) -> list[SlotPiece]:
    """This rank's pieces of a module: three for q/k/v, two for gate/up, one for others; A and B each."""
    packed = isinstance(weights.lora_a, list)
    lora_a, lora_b = weights.lora_a, weights.lora_b
    if module.tp_size > 1:  # this rank's slots hold only its shard
        lora_a, lora_b = module.slice_lora_a(lora_a), module.slice_lora_b(lora_b)
    halves = (("lora_A", module.lora_a_stacked, lora_a), ("lora_B", module.lora_b_stacked, lora_b))
    return [
        SlotPiece(module=name, half=half, slot=place[slot, 0, : value.shape[0], : value.shape[1]], sent=value)
        for half, stacked, values in halves
        for place, value in zip(stacked, values if packed else [values], strict=True)
        if value is not None
    ]


def _check_slots(pieces: list[SlotPiece]) -> None:
    """Raises SyncError that names the first module whose slot differs from the tensor sent."""
    same = torch.stack([(piece.slot == piece.sent.to(piece.slot)).all() for piece in pieces]).tolist()  # one wait
    for piece, holds in zip(pieces, same, strict=True):
        if not holds:
            raise SyncError(f"LoRA sync: the slot of {piece.module} does not hold the {piece.half} that was sent")


@dataclass(frozen=True, kw_only=True)
class SlotPlan:
    """Where each tensor of a parcel lies in vLLM's slots: recorded with the first version, used for later ones.

    This saves most of the time of a hand-over, which has many small tensors (LOG.md).
    """

    parcel: Parcel
    config: dict
    slot: int
    lora: Any
    """vLLM's LoRAModel."""
    bound: int
    pieces: list[SlotPiece]

    def reads_the_parcel(self) -> bool:
        """Are all tensors views into the parcel? Where vLLM cut them (tensor parallel) they are not, and every version goes
        through vLLM's own loading."""
        storage = self.parcel.buffer.untyped_storage().data_ptr()
        return all(piece.sent.untyped_storage().data_ptr() == storage for piece in self.pieces)

    def refill(self, adapters, adapter_id: int) -> None:
        """Copy the parcel's tensors into the slots, compare them there, and give the adapter its new id."""
        torch._foreach_copy_([piece.slot for piece in self.pieces], [piece.sent for piece in self.pieces])
        _check_slots(self.pieces)
        # s = alpha / r of W + s B A (LoRA, arXiv:2106.09685); after the comparison, since the parcel holds B unscaled
        scale = self.config["lora_alpha"] / self.config["r"]
        torch._foreach_mul_([piece.slot for piece in self.pieces if piece.half == "lora_B"], scale)
        for loaded in list(adapters.list_adapters()):
            adapters.remove_adapter(loaded)
        self.lora.id = adapter_id
        adapters._registered_adapters[adapter_id] = self.lora
        adapters._active_adapters[adapter_id] = None
        adapters.lora_index_to_id[self.slot] = adapter_id
