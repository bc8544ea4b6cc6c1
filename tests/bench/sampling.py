"""Sampling: our vLLM engine against vllm.LLM.generate on the same requests, in one process, in turns.

    python -m tests.bench.sampling [--repeats 5] [--model embedded]
    python -m tests.bench.sampling --model 40M --dtype bfloat16 --tokens 256     # on a GPU: both compiled, with CUDA graphs

8 prompts x 5 responses, a quarter of the paper's prompt lengths, one LoRA adapter (r = 16) on both sides. Our side does
what a training step does: it samples with its own seed, requests the log-prob of every token, and makes Rollout
objects. Also prints how many prompt tokens came from the prefix cache, and writes JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from rollout import Sampling
from rollout.sync import Parcel
from rollout.vllm_engine import VLLMEngine
from rollout.vllm_versions import gpu_settings
from tests.bench.update import Task, make_checkpoint
from trainer.policy import Policy
from trainer.ranks.world import join_world, leave_world

SHARE = 0.2
"""Of a GPU's memory, for each of the two engines."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="on a GPU: neither side compiles or captures CUDA graphs")
    parser.add_argument("--tokens", type=int, default=64, help="response tokens")
    parser.add_argument("--json", default="runs/bench/sampling.json")
    arguments = parser.parse_args()
    world = join_world()
    with tempfile.TemporaryDirectory() as folder:
        task = Task(model=arguments.model, prompts=8, dtype=arguments.dtype, folder=folder)
        make_checkpoint(task, Path(folder))
        result = measure(task, arguments, world.device)
    Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    ratios = sorted(plain / ours for plain, ours in zip(result["plain"], result["ours"], strict=True))
    figures = f"{statistics.median(ratios):.2f} {ratios[0]:.2f} {ratios[-1]:.2f}"
    print(f"RATIO sampling_ours_over_plain_vllm {figures}")
    print(f"RESULT sampling_ours_over_plain_vllm {figures}")  # for gpu.sh
    leave_world()


def measure(task: Task, arguments: argparse.Namespace, device: torch.device) -> dict:
    """{"ours": seconds per response token of each turn, "plain": the same, "cached": prompt tokens from the cache}."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    dtype = getattr(torch, task.dtype)
    policy = Policy(task.folder, lora_rank=16, lora_alpha=32, seed=0, device=device, dtype=dtype)
    with torch.no_grad():  # lora_B starts at 0: a trained adapter does not
        for parameter in policy.trainable().values():
            parameter.normal_(std=0.01)
    adapter = Path(task.folder) / "adapter"
    policy.model.save_pretrained(adapter)
    prompts = [prompt for prompt, _ in task.groups()]
    longest = max(map(len, prompts)) + arguments.tokens
    same = {"sequences": 8 * task.group_size, "eager": arguments.eager}
    engine = VLLMEngine(
        task.folder, lora=policy.lora, max_model_len=longest, dtype=task.dtype, memory_fraction=SHARE, **same
    )
    parcel = Parcel.of(policy.adapter_tensors())
    engine.load_adapter(parcel, parcel.manifest(), version=0)
    settings = {"enforce_eager": True}
    if device.type == "cuda":
        settings = gpu_settings(same["sequences"], torch.cuda.get_device_properties(device).total_memory, same["eager"])
        settings["gpu_memory_utilization"] = SHARE  # vLLM asks that so much is free, although the KV cache has a size
    plain = LLM(
        task.folder,
        dtype=task.dtype,
        max_model_len=longest,
        max_num_seqs=same["sequences"],
        **settings,
        enable_lora=True,
        max_lora_rank=16,
        max_loras=1,
        kv_cache_memory_bytes=1 << 30,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        distributed_executor_backend="external_launcher",
        use_tqdm_on_load=False,
    )
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    ids = [str(i) for i in range(len(prompts))]
    request = LoRARequest("plain", 1, str(adapter))
    found: dict[str, list[float]] = {"ours": [], "plain": []}
    for turn in range(arguments.repeats + 1):
        start = time.perf_counter()
        groups = engine.generate(
            ids,
            prompts,
            Sampling(
                n=task.group_size, max_tokens=arguments.tokens, temperature=1.0, top_p=1.0, seed=turn, stop_ids=(2,)
            ),
        )
        engine.llm.reset_prefix_cache()  # both sides start every turn with an empty cache
        between = time.perf_counter()
        torch.manual_seed(turn)
        params = SamplingParams(
            n=task.group_size, temperature=1.0, max_tokens=arguments.tokens, stop_token_ids=[2], detokenize=False
        )
        outputs = plain.generate(requests, params, lora_request=request, use_tqdm=False)
        plain.reset_prefix_cache()
        end = time.perf_counter()
        tokens = sum(len(r.response_ids) for group in groups for r in group)
        theirs = sum(len(c.token_ids) for output in outputs for c in output.outputs)
        if turn:  # the first warms up
            found["ours"].append((between - start) / tokens)
            found["plain"].append((end - between) / theirs)
    for side, seconds in found.items():
        print(f"{side}: {1 / statistics.median(seconds):.0f} response tokens per second")
    cached = sum(output.num_cached_tokens for output in outputs)
    print(f"prefix cache: {cached} of {sum(map(len, prompts))} prompt tokens")
    engine.close()
    return {**found, "cached": cached}


if __name__ == "__main__":
    main()
