"""One GRPO optimizer step of a 7B shape on a GPU, in one process: with and without each of our kernels, and TRL's.

    python -m tests.bench.gpu_update --work /dev/shm/w --profile   # random weights, r = 256, the paper's lengths
    python -m tests.bench.gpu_update --work /dev/shm/w --trl       # the same of TRL
    python -m tests.bench.gpu_update --work /tmp/w --tiny                  # every line, on a CPU

2 prompts x 5 responses (tests/bench/update.py). Prints `RESULT update_<variant> <seconds> s, ...`: tokens per second count
a copy of the prompt per response, TFLOP/s the operations that the step needs, memory is the peak that PyTorch allocated.
--profile: also the GPU's busy time and its 40 longest kernels. --trl: TRL 1.16 alone, without and with checkpointing, with
Liger and with flash-attn-4 where they are installed; its fastest is what ours is to be compared with.
"""

import argparse
import gc
import importlib.util
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from peft.tuners.lora import Linear

from data.errors import UserError
from tests.bench.gpu_run import make_model
from tests.bench.kernels import milliseconds, say
from tests.bench.update import Task, our_step, step_flops
from trainer import logprobs
from trainer.kernels import attention as attention_kernels
from trainer.kernels import layers as layer_kernels
from trainer.model import attention
from trainer.model.cost import head_size
from trainer.model.loading import recompute_layers
from trainer.policy import Policy
from trainer.start import parts

ON_GPU = torch.cuda.is_available()


class Timed:
    """Measures a step under a name."""

    def __init__(self, task: Task, flops: float) -> None:
        self.flops = flops
        self.tokens = sum(len(prompt) + len(r) for prompt, responses in task.groups() for r in responses)

    def __call__(self, name: str, step: Callable[[], object], repeats: int = 2) -> None:
        try:
            if ON_GPU:
                torch.cuda.reset_peak_memory_stats()
            seconds = milliseconds(step, repeats) / 1000
        except (torch.OutOfMemoryError, RuntimeError) as error:
            say(f"update_{name}", f"failed: {str(error).splitlines()[0]}")
            return
        peak = torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else 0.0
        rates = f"{self.tokens / seconds:.0f} tok/s, {self.flops / seconds / 1e12:.3g} TFLOP/s"
        say(f"update_{name}", f"{seconds:.3f} s, {rates}, {peak:.1f} GB")


def measure_ours(task: Task, profiles: bool) -> None:
    """All variants on one policy: what is switched is looked up at every call."""
    step, policy, cost = kept_step(task)
    timed = Timed(task, step_flops(task, cost, shared=True))
    timed("ours", step, 3)
    say("update_waits_of_the_host", waits(step) if ON_GPU else "skipped: counted on a GPU")
    if profiles and ON_GPU:
        profile(step)
    switches = {
        "layer_kernels": (layer_kernels, "runs_on", lambda x: False),
        "rotary_kernel": (attention_kernels, "runs_on", lambda x: False),
        "merge_kernel": (attention, "merge_for", lambda out, lse: attention.merged),
        "head_kernel": (logprobs, "passes_for", lambda like: logprobs.passes),
        "inputs_made_again": (layer_kernels, "made_of", lambda out, *how: out),
    }
    for name, (module, function, other) in switches.items():
        kept = getattr(module, function)
        setattr(module, function, other)
        timed(f"without_{name}", step)
        setattr(module, function, kept)
    fused = [(module, module.__dict__.pop("forward")) for module in policy.model.modules() if type(module) is Linear]
    timed("without_fused_adapter", step)
    for module, forward in fused:
        module.forward = forward
    say("update_attention_of_ours", policy.attn)
    kernels = "sdpa" if policy.attn == "flash" else "flash"
    try:  # a package that is there may not work, which must not end what follows
        attention.kernels_for(kernels, policy.device, torch.bfloat16, head_size(policy.causal_lm.config))
    except UserError as problem:
        say(f"update_{kernels}", f"skipped: {problem}")
    else:
        own = policy.attention
        policy.attention = policy.causal_lm.config._attn_implementation = attention.NAMES[kernels]
        timed(kernels, step)
        policy.attention = policy.causal_lm.config._attn_implementation = own
    layers = policy.causal_lm.model.layers
    plain = [layer.forward for layer in layers]
    for name, keeps in (("checkpointing", False), ("checkpointing_keep_attention", True)):
        recompute_layers(policy.causal_lm, keeps)
        timed(name, step)
        for layer, forward in zip(layers, plain, strict=True):
            layer.forward = forward


def waits(step: Callable[[], object]) -> int:
    """How often the host waits for the GPU in a step, by PyTorch's own count (it knows most kinds of waiting, not all)."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{entry.filename}:{entry.lineno}" for entry in found if "synchroniz" in str(entry.message))
    for place, count in places.most_common(10):
        print(f"WAIT {count} x {place}", flush=True)
    return places.total()


def kept_step(task: Task) -> tuple[Callable[[], None], Policy, object]:
    """update.our_step, and the policy that it loads."""
    found, load_policy = [], parts.load_policy

    def load(*args: object, **settings: object) -> Policy:
        found.append(load_policy(*args, **settings))
        return found[-1]

    parts.load_policy = load
    step, cost = our_step(task, "shared")
    parts.load_policy = load_policy
    return step, found[0], cost


def profile(step: Callable[[], None]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, end = 0.0, spans[0][0]
    for first, last in spans:
        busy, end = busy + max(0.0, last - max(first, end)), max(end, last)
    say("update_gpu_busy_ms", f"{busy / 1e3:.0f} of {(end - spans[0][0]) / 1e3:.0f}")
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in events:
        by_name[event.name].append(event.time_range.end - event.time_range.start)
    for name, taken in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:40]:
        print(f"KERNEL {sum(taken) / 1e3:8.2f} ms {len(taken):5d} x {name[:140]}", flush=True)


def measure_trl(task: Task) -> None:
    from tests.bench.update_trl import TrlStep

    timed = Timed(task, 0.0)
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    # flash_attention_4 needs transformers 5 and the package flash-attn-4, which is also what ours takes
    kernels = ["sdpa"]
    if ON_GPU and not attention.why_no_flash(torch.device("cuda")):
        kernels.append("flash_attention_4")
    # Liger last: it replaces layers of the model's module for good
    for liger, attn in product((False, True) if has_liger else (False,), reversed(kernels)):
        for checkpointing, micro_batch in ((False, 2), (True, 5)):
            parts_of_name = ("checkpointing" * checkpointing, f"micro_batch_{micro_batch}", "liger" * liger, attn)
            name = "_".join(["trl", *filter(None, parts_of_name)])
            settings = {
                "lora_rank": task.rank,
                "micro_batch": micro_batch,
                "checkpointing": checkpointing,
                "liger": liger,
            }
            made = None
            try:
                made = TrlStep(
                    task.folder, task.groups(), dtype=task.dtype, out=tempfile.mkdtemp(), attn=attn, **settings
                )
                timed(name, made.step, 1)  # once, after one that is not counted: all settings must fit the piece
            except Exception as error:  # of whatever library: the other settings are still wanted
                say(f"update_{name}", f"failed: {str(error).splitlines()[0]}")
            del made
            gc.collect()
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for the checkpoint (15 GB); on a fast disk")
    parser.add_argument("--tiny", action="store_true", help="a million weights in place of the shape")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--trl", action="store_true")
    arguments = parser.parse_args()
    shape, dtype = ("embedded", "float32") if arguments.tiny else ("qwen2.5-7b", "bfloat16")
    folder = arguments.work / f"model-{shape}"
    folder.mkdir(parents=True, exist_ok=True)
    make_model(shape, folder, dtype)
    small = {"scale": 0.05, "rank": 8, "micro_tokens": 512}
    size = small if arguments.tiny else {"scale": 1.0, "rank": 256, "micro_tokens": 8192}
    task = Task(model=shape, prompts=2, dtype=dtype, folder=str(folder), **size)
    measure_trl(task) if arguments.trl else measure_ours(task, arguments.profile)


if __name__ == "__main__":
    main()
