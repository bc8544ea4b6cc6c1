"""Run by test_sync.py: adapters handed to real vLLM engines, and what is proven about them.

torchrun --nproc-per-node 1 tests/helpers/sync_checks.py ranks CHECKPOINT      LoRA ranks 8 to 256, a damaged slot, 120 hand-overs
torchrun --nproc-per-node 1 tests/helpers/sync_checks.py rounded CHECKPOINT    a float32 adapter in a bfloat16 sampler
torchrun --nproc-per-node 2 tests/helpers/sync_checks.py parallel CHECKPOINT   one sampler over two processes
"""

import json
import os
import sys
from dataclasses import replace
from functools import partial

import psutil
import torch

from rollout import Canary, Sampling
from rollout.sync import Parcel, SyncError, _mean_difference, adapter_hash
from rollout.vllm_engine import VLLMEngine
from trainer.packing import pack
from trainer.policy import Policy
from trainer.ranks.world import World, join_world, leave_world

TEXT = list(range(5, 69))


def policy_of(checkpoint: str, rank: int) -> Policy:
    policy = Policy(
        checkpoint, lora_rank=rank, lora_alpha=2 * rank, seed=0, device=torch.device("cpu"), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / rank)
    return policy


TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}


def canary_of(policy: Policy) -> Canary:
    text = pack([(TEXT[:1], [TEXT[1:]])])
    with torch.no_grad():
        on, off = (policy.response_logprobs(text, reference=reference)[0].tolist() for reference in (False, True))
    return Canary(ids=TEXT, policy=on, reference=off, tolerance=1e-4)


def worker_of(engine: VLLMEngine):
    return engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def ranks(checkpoint: str, world: World) -> dict:
    engine = VLLMEngine(checkpoint, lora=policy_of(checkpoint, 256).lora, max_model_len=256, sampler_lora="kernel")
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    distances = {}
    for version, rank in enumerate((8, 16, 64, 256)):
        policy = policy_of(checkpoint, rank)
        engine.lora = policy.lora
        canary = canary_of(policy)
        engine.deliver(policy.adapter_tensors(), version, canary)
        distances[rank] = canary.check(*engine.prove(canary))
    result = {"distances": distances, "bound": engine.bound, "threads gained": after - before}
    # ---- a slot that does not hold what was sent: vLLM's copy goes wrong for one module, on its own way of loading
    worker_of(engine).slot_plan = None
    adapters = worker_of(engine).model_runner.lora_manager._adapter_manager
    module = adapters.modules["model.layers.0.mlp.down_proj"]
    true = module.set_lora

    def wrong(index, lora_a, lora_b):
        true(index, lora_a, lora_b)
        module.lora_b_stacked[0][index, 0, 3, 1] += 1e-3

    module.set_lora = wrong
    try:
        engine.deliver(policy.adapter_tensors(), 98, canary)
    except SyncError as error:
        result["damaged slot"] = str(error)
    module.set_lora = true
    # ---- an adapter that vLLM loads and does not use: the answer is exactly that of the base model
    generate = engine.llm.generate
    engine.llm.generate = lambda *args, **options: generate(*args, **{**options, "lora_request": None})
    try:
        engine.prove(Canary(ids=TEXT, policy=engine.off, reference=[x + 1e-3 for x in engine.off], tolerance=1e-4))
    except SyncError as error:
        result["unused"] = str(error)
    engine.llm.generate = generate
    result |= many(engine, policy, canary, 120)
    engine.close()
    return result


def rounded(checkpoint: str, world: World) -> dict:
    """A float32 adapter in a bfloat16 sampler: later hand-overs give the slots that vLLM's own loading gives."""
    policy = policy_of(checkpoint, 8)
    engine = VLLMEngine(checkpoint, lora=policy.lora, max_model_len=256, dtype="bfloat16", sampler_lora="kernel")
    worker, found = worker_of(engine), []
    for version, keeps_plan in enumerate((True, True, False)):
        if version < 2:  # the third hands over what the second did
            with torch.no_grad():
                for parameter in policy.trainable().values():
                    parameter.mul_(1.3)
        if not keeps_plan:
            worker.slot_plan = None
        parcel = engine.parcel = Parcel.of(policy.adapter_tensors(), reuse=engine.parcel)
        engine.load_adapter(parcel, parcel.manifest(), version)
        modules = worker.model_runner.lora_manager._adapter_manager.modules.values()
        slots = [stack.clone() for module in modules for stack in (*module.lora_a_stacked, *module.lora_b_stacked)]
        found.append((worker.slot_plan is not None, slots))
    same = [all(map(torch.equal, found[i][1], found[2][1])) for i in (0, 1)]
    dtypes = sorted({str(slot.dtype) for slot in found[2][1]})
    engine.close()
    return {"plans": [has for has, _ in found], "same": same, "dtypes": dtypes}


def merged(checkpoint: str, world: World, dtype: str = "float32") -> dict:
    """The adapter added to the sampler's weights: proven like one beside them, and nothing is left of it afterwards."""
    policy = policy_of(checkpoint, 16)
    engine = VLLMEngine(checkpoint, lora=policy.lora, max_model_len=256, dtype=dtype, base_dtype="float32")
    untouched = engine.prompt_logprobs(TEXT)
    random = torch.Generator().manual_seed(0)
    distances = []
    for version in range(20):
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
        canary = replace(canary_of(policy), tolerance=TOLERANCE[dtype])
        engine.deliver(policy.adapter_tensors(), version, canary)
        distances.append(canary.check(*engine.prove(canary)))
    result = {"merges": engine.merges, "bound": engine.bound, "distance": max(distances)}
    result["away from the base"] = _mean_difference(canary.policy, canary.reference)
    result["dtype"] = str(next(worker_of(engine).model_runner.get_model().parameters()).dtype)
    result["off again"] = engine.prompt_logprobs(TEXT, adapter=False) == untouched == engine.off
    result["on again"] = engine.prompt_logprobs(TEXT) == engine.prove(canary)[0] != untouched
    result |= many(engine, policy, canary, 60)
    nothing = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in policy.adapter_tensors().items()}
    parcel = Parcel.of(nothing)
    engine.load_adapter(parcel, parcel.manifest(), 999)
    result["base after 80 adapters"] = engine.prompt_logprobs(TEXT) == untouched
    tensors = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in policy.adapter_tensors().items()}
    parcel = Parcel.of(tensors)
    try:
        engine.load_adapter(parcel, parcel.manifest(), 1000)
    except SyncError as error:
        result["unknown layer"] = str(error)
    engine.close()
    return result


def many(engine: VLLMEngine, policy: Policy, canary: Canary, times: int) -> dict:
    """Hand-overs in a row: hashes, resident memory and file descriptors (500 in tests/bench/sync.py)."""
    process, tensors = psutil.Process(), policy.adapter_tensors()
    expected, hashes, memory, files = adapter_hash(tensors), set(), [], []
    for number in range(times):
        engine.deliver(tensors, 100 + number, canary)
        hashes.add(engine.hash)
        memory.append(process.memory_info().rss)
        files.append(process.num_fds())
    return {
        "hashes": sorted(hashes) == [expected],
        "grown_bytes": memory[-1] - memory[times // 5],
        "files": [files[times // 5], files[-1]],
    }


def parallel(checkpoint: str, world: World, sampler_lora: str = "kernel") -> dict:
    policy = policy_of(checkpoint, 16)
    engine = VLLMEngine(
        checkpoint,
        lora=policy.lora,
        max_model_len=256,
        rank=world.rank,
        size=world.size,
        tensor_parallel=2,
        sampler_lora=sampler_lora,
    )
    canary = canary_of(policy)
    engine.deliver(policy.adapter_tensors(), 1, canary)
    prompts = [list(range(5 + i, 45 + i)) for i in range(4)]
    engine.ask(
        0, list("abcd"), prompts, Sampling(n=2, max_tokens=12, temperature=1.0, top_p=1.0, seed=3, stop_ids=(2,))
    )
    groups = engine.collect(0)
    batch = pack([(group[0].prompt_ids, [r.response_ids for r in group]) for group in groups])
    with torch.no_grad():
        trainer = policy.response_logprobs(batch)[batch.mask]
    sampler = torch.tensor([value for group in groups for r in group for value in r.sampler_logprobs])
    result = {
        "ids": [group[0].puzzle_id for group in groups],
        "difference": float((trainer - sampler).abs().max()),
        "canary": canary.check(*engine.prove(canary)),
    }
    engine.close()
    return result


if __name__ == "__main__":
    joined = join_world()
    checks = {"ranks": ranks, "parallel": parallel, "merged": merged, "rounded": rounded}
    checks["merged, bfloat16"] = partial(merged, dtype="bfloat16")
    checks["parallel, merged"] = partial(parallel, sampler_lora="merged")
    outcome = checks[sys.argv[1]](sys.argv[2], joined)
    print(f"RESULT {os.environ['RANK']} {json.dumps(outcome)}", flush=True)
    leave_world()
