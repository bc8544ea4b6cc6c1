"""Handing an adapter to vLLM: ours against a file in /dev/shm and against merging all weights, in one run.

    python -m tests.bench.sync [--repeats 7]

For two models (tiny; the shape of Qwen2.5-0.5B) and two LoRA ranks, in turns:
ours   `LocalEngine.deliver`: manifest, checksums before and after, slots read back; without and with the canary, which
       runs the model on 16 tokens in trainer and sampler. On a CPU the sampler adds the adapter to its weights
kernel the same without the canary, to a sampler that computes the adapter beside its weights (--sampler-lora kernel)
file   save in PEFT's format to /dev/shm and load with vLLM's own add_lora; not verified
merge  add s B A to a copy of every weight and load all weights into a vLLM engine without LoRA; not verified
Prints a table and one RATIO line per comparison, and writes JSON.
"""

# ruff: noqa: B023 (every function is called in the round that made it)
import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from rollout.sync import Canary, adapter_hash
from rollout.vllm_engine import VLLMEngine
from trainer.model.embedded import make_tokenizer
from trainer.packing import pack
from trainer.policy import Policy
from trainer.ranks.world import join_world, leave_world

MODELS = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
}
RANKS = (16, 256)
TEXT = list(range(5, 21))
"""Token ids of the canary."""


def make_checkpoint(folder: Path, shape: dict) -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True, max_position_embeddings=512))
    model.save_pretrained(folder)
    make_tokenizer(["a few words"]).save_pretrained(folder)


def randomise(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)


def seconds(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def through_file(engine: VLLMEngine, policy: Policy, folder: Path, number: int) -> None:
    """The usual way without a hand-over in memory: write a folder in PEFT's format, and let vLLM load it."""
    from vllm.lora.request import LoRARequest

    path = folder / f"adapter-{number}"
    path.mkdir()
    save_file(
        {name: t.contiguous() for name, t in policy.adapter_tensors().items()}, path / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **policy.lora}
    (path / "adapter_config.json").write_text(json.dumps(config))
    engine.llm.llm_engine.add_lora(LoRARequest(f"file-{number}", number, str(path)))
    shutil.rmtree(path)


def merged(policy: Policy) -> dict[str, torch.Tensor]:
    """Every weight under its checkpoint name, the adapter merged in float32."""
    weights = {}
    with torch.no_grad():
        for name, module in policy.causal_lm.named_modules():
            if hasattr(module, "lora_A"):
                weights[f"{name}.weight"] = module.base_layer.weight + module.get_delta_weight("default")
        for name, parameter in policy.causal_lm.named_parameters():
            if ".lora_" not in name:
                weights.setdefault(name.replace(".base_layer", ""), parameter.detach())
    return weights


def merge_and_load(engine: VLLMEngine, policy: Policy) -> None:
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(merged(policy).items())})
    engine.llm.reset_prefix_cache()


def measure(name: str, folder: Path, repeats: int, shm: Path) -> list[dict]:
    rows = []
    full = VLLMEngine(str(folder), lora=None, max_model_len=128, kv_cache_bytes=1 << 28)
    for rank in RANKS:
        policy = Policy(
            str(folder), lora_rank=rank, lora_alpha=2 * rank, seed=0, device=torch.device("cpu"), dtype=torch.float32
        )
        randomise(policy)
        room = {"lora": policy.lora, "max_model_len": 128, "kv_cache_bytes": 1 << 28}
        engine = VLLMEngine(str(folder), **room)
        # vLLM loads a file only into its kernels
        beside = VLLMEngine(str(folder), **room, sampler_lora="kernel") if engine.merges else engine
        text = pack([(TEXT[:1], [TEXT[1:]])])

        def canary(policy=policy, text=text) -> Canary:
            with torch.no_grad():
                return Canary(
                    ids=TEXT,
                    policy=policy.response_logprobs(text)[0].tolist(),
                    tolerance=1e-3,
                    reference=policy.response_logprobs(text, reference=True)[0].tolist(),
                )

        proof = canary()
        version = 0

        def ours(with_canary: bool, engine=engine, policy=policy, canary=canary) -> None:
            nonlocal version
            version += 1
            tensors = policy.adapter_tensors()
            if with_canary:
                engine.deliver(tensors, version, canary())
            else:
                prove, engine.prove = engine.prove, lambda canary: None
                engine.deliver(tensors, version, proof)
                engine.prove = prove

        times: dict[str, list[float]] = {"ours": [], "ours with canary": [], "kernel": [], "file": [], "merge": []}
        for number in range(repeats + 1):  # the first round warms up
            laps = {
                "ours": seconds(lambda: ours(False)),
                "kernel": seconds(lambda: ours(False, beside)),
                "file": seconds(lambda n=number: through_file(beside, policy, shm, 100_000 + n)),
                "ours with canary": seconds(lambda: ours(True)),
                "merge": seconds(lambda: merge_and_load(full, policy)),
            }
            for key, value in laps.items() if number else ():
                times[key].append(value)
        megabytes = sum(t.numel() * t.element_size() for t in policy.adapter_tensors().values()) / 1e6
        rows.append({"model": name, "rank": rank, "adapter_megabytes": megabytes, "seconds": times})
        for one in {engine, beside}:
            one.llm.llm_engine.engine_core.shutdown()
    return rows


def in_a_row(folder: Path, times: int) -> str:
    """Many hand-overs with every proof in a row: do hashes, resident memory and file descriptors stay equal?"""
    policy = Policy(str(folder), lora_rank=16, lora_alpha=32, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    randomise(policy)
    engine = VLLMEngine(str(folder), lora=policy.lora, max_model_len=128, kv_cache_bytes=1 << 28)
    text = pack([(TEXT[:1], [TEXT[1:]])])
    with torch.no_grad():
        on, off = (policy.response_logprobs(text, reference=reference)[0].tolist() for reference in (False, True))
    canary = Canary(ids=TEXT, policy=on, reference=off, tolerance=1e-4)
    process, tensors = psutil.Process(), policy.adapter_tensors()
    memory, files, hashes = [], [], set()
    for version in range(times):
        engine.deliver(tensors, version, canary)
        hashes.add(engine.hash)
        memory.append(process.memory_info().rss / 1e6)
        files.append(process.num_fds())
    engine.llm.llm_engine.engine_core.shutdown()
    early = times // 10
    return (
        f"{times} hand-overs in a row: resident memory {memory[early]:.1f} MB after {early}, {memory[-1]:.1f} MB at "
        f"the end; file descriptors {files[early]}, {files[-1]}; hashes equal: {hashes == {adapter_hash(tensors)}}"
    )


def report(rows: list[dict]) -> None:
    print(f"{'model':6} {'rank':>4} {'adapter':>10} " + " ".join(f"{key:>18}" for key in rows[0]["seconds"]))
    for row in rows:
        medians = " ".join(f"{1000 * statistics.median(values):15.1f} ms" for values in row["seconds"].values())
        print(f"{row['model']:6} {row['rank']:4} {row['adapter_megabytes']:7.1f} MB {medians}")
    for row in rows:
        for ours in ("ours", "ours with canary", "kernel"):
            for other in ("file", "merge"):
                ratios = sorted(b / a for a, b in zip(row["seconds"][ours], row["seconds"][other], strict=True))
                label = f"sync_{row['model']}_r{row['rank']}_{other}_over_{ours.replace(' ', '_')}"
                print(f"RATIO {label} {statistics.median(ratios):.2f} {ratios[0]:.2f} {ratios[-1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--in-a-row", type=int, default=500)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--json", default="runs/bench/sync.json")
    arguments = parser.parse_args()
    join_world()
    rows = []
    shm = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        for name in arguments.models:
            folder = shm / name
            make_checkpoint(folder, MODELS[name])
            rows += measure(name, folder, arguments.repeats, shm)
            if name == "tiny":
                print(in_a_row(folder, arguments.in_a_row), flush=True)
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(shm)
    Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    report(rows)
    leave_world()


if __name__ == "__main__":
    main()
