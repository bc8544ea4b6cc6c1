"""One SFT optimizer step: ours against TRL's SFTTrainer, on the same traces from the same adapter, in one run.

    pip install -e ".[bench]"                     # TRL 1.16
    python -m tests.bench.sft                     # CPU: 16 traces, the paper's lengths x 0.25, a tiny model
    python -m tests.bench.sft --model 40M --trl "padded 1" --rounds 2
    python -m tests.bench.sft --trl-python ENV/bin/python     # TRL in its own environment, which also has our packages

A step is collating or packing, forward, backward, clipping and AdamW, with LoRA on all linear layers; the loss is on
response tokens only. Each side is a process that makes one step on request; the sides take turns. First TRL makes a
step at each of SETTINGS, and its fastest setting is compared. On a CPU TRL applies the LM head to prompts and padding
too, in plain PyTorch operations. "changed" makes it score response tokens only, as it does on a GPU (the search uses
this too). "our head" gives TRL our fused head; what is left are the differences in passes, padding, attention and
bookkeeping. The losses of both sides must agree to 1e-4 before anything is timed and after every step. Prints RATIO
lines and writes JSON. On a shared machine set OMP_WAIT_POLICY=passive (both sides get it), and read the ratios of CPU
seconds too.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from tests.bench.memory import resident
from tests.bench.side import Side, answer, ratio
from tests.bench.update import PROMPT, RESPONSE, SPREAD, draw_text, make_checkpoint, shape_of
from trainer.ranks.world import join_world
from trainer.sft.examples import Example
from trainer.sft.loop import BETAS
from trainer.sft.settings import SftConfig

CELLS = (8, 15)
"""Fewest and most cells of a puzzle."""
CELL_SHARE = 0.9
"""Share of a mean prompt that lists cells; the rest does not depend on their number."""
LR = 1e-3
AGREE = 1e-4
"""Largest allowed difference between the losses of two sides, in nats per response token."""
SETTINGS = [
    *(f"padded {m}" for m in (1, 2, 4, 8, 16)),
    *(f"grouped {m}" for m in (2, 4, 8)),
    "padding-free 2",
    "padding-free 4",
    "packing 1",
]
"""TRL's settings: how it makes its passes (TrlSettings.way), and traces (or packed rows) per pass."""
HEADS = {"own": "TRL", "changed": "TRL changed", "ours": "TRL with our head"}
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""Settings that keep glibc from returning freed memory to the system."""

Trace = tuple[list[int], list[int]]
"""(prompt, response) token ids."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The work that every side gets."""

    model: str
    scale: float = 0.25
    traces: int = 16
    rank: int = 16
    dtype: str = "float32"
    checkpointing: bool = False
    micro_tokens: int = 2048
    """Tokens per pass of ours, and per row of TRL's packing: a quarter of the default of launch/sft.py."""
    folder: str = ""

    def batch(self) -> list[Trace]:
        """The traces of a step, with the paper's lengths x scale."""
        rng = random.Random(0)
        vocabulary = shape_of(self.model)["vocab_size"]

        def text(mean: float, spread: float) -> list[int]:
            return draw_text(rng, mean * self.scale, spread, vocabulary)

        def prompt() -> list[int]:
            cells = rng.randint(*CELLS) / statistics.mean(CELLS)
            return text(PROMPT * (1 - CELL_SHARE + CELL_SHARE * cells), 0.05)

        return [(prompt(), text(RESPONSE, SPREAD)) for _ in range(self.traces)]

    @property
    def adapter(self) -> str:
        return f"{self.folder}/adapter.safetensors"

    def config(self) -> SftConfig:
        return SftConfig(
            traces="",
            model=self.folder,
            out="",
            lora_rank=self.rank,
            lora_alpha=2 * self.rank,
            batch_size=self.traces,
            lr=LR,
            weight_decay=0.0,
            grad_clip=1.0,
            micro_tokens=self.micro_tokens,
            dtype=self.dtype,
            checkpointing=self.checkpointing,
        )


def make_start(task: Task) -> None:
    """Write the checkpoint and an adapter that changes the model: both sides start from them."""
    from trainer.start.parts import load_policy

    make_checkpoint(task, Path(task.folder))  # type: ignore[arg-type]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(task.config(), device)
    generator = torch.Generator().manual_seed(0)
    tensors = policy.adapter_tensors()
    for tensor in tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, task.adapter)


# ---- a side: a process that makes one step on request


def our_step(task: Task):
    """A function that makes a step as trainer.sft.loop.train_rank does: {"loss", "norm", "positions"}."""
    from safetensors.torch import load_file

    from data.puzzles import Puzzle
    from trainer.sft.loop import accumulate, refuse_what_is_not_finite, sum_and_clip_gradients
    from trainer.start.parts import load_policy, make_optimizer

    cfg, world = task.config(), join_world()
    policy = load_policy(cfg, world.device)
    policy.load_adapter(load_file(task.adapter))
    parameters = list(policy.trainable().values())
    optimizer = make_optimizer(cfg, parameters, BETAS)
    batch = [
        Example(
            puzzle=Puzzle(id=str(i), context="", cells=[["CD3D"]], candidates=["T cell"], answer=["T cell"]),
            prompt_ids=prompt,
            response_ids=response,
        )
        for i, (prompt, response) in enumerate(task.batch())
    ]
    positions = sum(len(e.prompt_ids) + len(e.response_ids) for e in batch)

    def step() -> dict[str, float]:
        optimizer.zero_grad(set_to_none=True)
        loss = accumulate(policy, batch, cfg, world)
        norm = sum_and_clip_gradients(parameters, cfg.grad_clip, world)
        refuse_what_is_not_finite(norm, step=0)
        optimizer.step()
        return {"loss": loss, "norm": norm, "positions": positions}

    return step


def trl_step(task: Task, side: dict):
    from tests.bench.sft_trl import TrlSettings, TrlStep

    way, micro_batch = side["setting"].split()
    settings = TrlSettings(
        way=way,
        micro_batch=int(micro_batch),
        head=side["head"],
        lora_rank=task.rank,
        lr=LR,
        betas=BETAS,
        grad_clip=1.0,
        row_tokens=task.micro_tokens,
        checkpointing=side["checkpointing"],
        dtype=task.dtype,
    )
    return TrlStep(task.folder, task.batch(), settings, tempfile.mkdtemp(dir=task.folder), task.adapter).step


def serve(task: Task, side: dict) -> None:
    """Answer with the results of each step, its seconds and the peak memory so far."""
    if not torch.cuda.is_available():
        torch.set_num_threads(psutil.cpu_count())
    import peft  # noqa: F401 (import before the first measurement: the memory of imports does not count)
    import transformers  # noqa: F401

    if side["name"] == "trl":
        import tests.bench.sft_trl  # noqa: F401
    before = resident("VmRSS")
    step = our_step(task) if side["name"] == "ours" else trl_step(task, side)

    def timed() -> dict:
        start, worked = time.perf_counter(), time.process_time()
        found = step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, most = time.perf_counter() - start, resident("VmHWM")
        work = {"seconds": seconds, "cpu": time.process_time() - worked, "bytes": most - before, "peak": most}
        return found | work

    answer({"ready": True}, timed)


def start(task: Task, side: dict, arguments: argparse.Namespace) -> Side:
    python = sys.executable if side["name"] == "ours" else arguments.trl_python
    environment = {**os.environ, **(KEEP_MEMORY if arguments.keep_memory else {})}
    return Side(label(side), "sft", vars(task), side, python=python, environment=environment)


def label(side: dict) -> str:
    if side["name"] == "ours":
        return "ours"
    return f"{HEADS[side['head']]}, {side['setting']}{', checkpointing' * side['checkpointing']}"


# ---- the comparison


def agreement(one: list[dict], other: list[dict], who: str) -> dict[str, float]:
    """The largest absolute difference of losses and relative difference of gradient norms over the common steps.

    Raises SystemExit if the losses differ by more than AGREE.
    """
    pairs = list(zip(one, other, strict=False))
    loss = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    norm = max(abs(a["norm"] / b["norm"] - 1) for a, b in pairs)
    if loss > AGREE:
        raise SystemExit(f"{who}: its loss differs from ours by {loss:.1e} within {len(pairs)} steps")
    return {"steps": len(pairs), "loss": loss, "norm": norm}


def find_setting(task: Task, ours: Side, arguments: argparse.Namespace) -> tuple[dict, dict[str, dict]]:
    """(TRL's fastest setting, {setting: its step}). TRL's losses must equal ours. The fastest is also tried with
    checkpointing."""
    found: dict[str, dict] = {}
    best: dict = {}
    for setting in [*(arguments.trl or SETTINGS), None]:
        side = trl_side(setting, arguments.search_head) if setting else {**best, "checkpointing": True}
        running = start(task, side, arguments)
        step = found[label(side)] = running.step()
        running.close()
        agreement([step], ours.steps, label(side))
        padding = 1 - n_tokens(task) / step["positions"]
        print(
            f"  {label(side)}: {step['seconds']:.2f} s ({step['cpu']:.2f} of CPU), padding {padding:.1%}, "
            f"peak {step['peak'] / 1e9:.2f} GB",
            flush=True,
        )
        if step["seconds"] == min(other["seconds"] for other in found.values()):
            best = side
    return best, found


def trl_side(setting: str, head: str, checkpointing: bool = False) -> dict:
    return {"name": "trl", "setting": setting, "checkpointing": checkpointing, "head": head}


def compare_sides(task: Task, arguments: argparse.Namespace) -> dict:
    print_task(task)
    ours, settings = start(task, {"name": "ours"}, arguments), {}
    ours.step()
    if len(arguments.trl) == 1:
        trl = trl_side(arguments.trl[0], "own", task.checkpointing)
    else:
        trl, settings = find_setting(task, ours, arguments)
    heads = arguments.head or [head for head in HEADS if head != "changed" or not torch.cuda.is_available()]
    running = [ours, *(start(task, {**trl, "head": head}, arguments) for head in heads)]
    for side in running[1:]:  # warms up; not counted
        side.step()
        agreement(side.steps, ours.steps, side.label)
    for number in range(arguments.rounds):
        for side in running:
            side.step()
        seconds = ", ".join(f"{side.steps[-1]['seconds']:.2f}" for side in running)
        print(f"  round {number + 1}: {seconds} s; load {os.getloadavg()[0]:.1f}", flush=True)
    for side in running:
        side.close()
        first, second = (step["loss"] for step in side.steps[:2])
        assert abs(first - second) > 10 * AGREE, f"{side.label}: its optimizer step changed nothing"
    same = {side.label: agreement(side.steps, ours.steps, side.label) for side in running[1:]}
    result = {
        "task": vars(task),
        "tokens": n_tokens(task),
        "settings": settings,
        "agreement": same,
        "keep_memory": arguments.keep_memory,
        "sides": {side.label: side.steps[1:] for side in running},
    }
    report(result)
    return result


def print_task(task: Task) -> None:
    prompts, responses = ([len(x) for x in column] for column in zip(*task.batch(), strict=True))
    print(
        f"{task.model}: {task.traces} traces a step, lengths x {task.scale}, LoRA r = {task.rank}, {task.dtype}, "
        f"{n_tokens(task)} tokens, passes of at most {task.micro_tokens} (ours)\n"
        f"  prompts {statistics.mean(prompts):.0f}: {sorted(prompts)}\n"
        f"  responses {statistics.mean(responses):.0f}: {sorted(responses)}",
        flush=True,
    )


def n_tokens(task: Task) -> int:
    return sum(len(prompt) + len(response) for prompt, response in task.batch())


def report(result: dict) -> None:
    for name, steps in result["sides"].items():
        seconds, last = sorted(step["seconds"] for step in steps), steps[-1]
        middle, cpu = statistics.median(seconds), statistics.median(step["cpu"] for step in steps)
        print(
            f"  {name}: {middle:.2f} s a step ({seconds[0]:.2f}-{seconds[-1]:.2f}), "
            f"{result['tokens'] / middle:.0f} tok/s, {cpu:.2f} CPU seconds, peak RSS {last['peak'] / 1e9:.2f} GB, "
            f"{last['bytes'] / 1e9:.2f} GB above its imports"
        )
    for name, found in result["agreement"].items():
        print(
            f"  {name}: losses of {found['steps']} steps are ours to {found['loss']:.1e}, "
            f"gradient norms to {found['norm']:.1e}"
        )


def ratio_lines(result: dict) -> list[str]:
    name, (ours, *others) = result["task"]["model"], result["sides"].items()
    lines = []
    for text, steps in others:
        who = {"TRL": "trl", "TRL changed": "trl_changed", "TRL with our head": "trl_our_head"}[text.split(",")[0]]
        lines.append(ratio(f"sft_{who}_over_ours_{name}", steps, ours[1], "seconds"))
        lines.append(ratio(f"sft_{who}_over_ours_cpu_{name}", steps, ours[1], "cpu"))
        lines.append(ratio(f"sft_ours_over_{who}_memory_{name}", ours[1], steps, "bytes"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", action="append", help="tiny, 40M or a folder of launch/recipes; default: tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=0.25)
    parser.add_argument("--traces", type=int, default=16, help="per optimizer step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="ours, and TRL under --trl, recompute activations")
    parser.add_argument("--micro-tokens", type=int, default=Task.micro_tokens, help="of ours, per pass")
    parser.add_argument(
        "--trl", action="append", default=[], help='TRL settings to search, as "padded 4"; one: no search'
    )
    parser.add_argument("--search-head", default="changed", choices=list(HEADS), help="of TRL, in the search")
    parser.add_argument("--head", action="append", choices=list(HEADS), help="of TRL; default: all")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has TRL")
    parser.add_argument("--keep-memory", action="store_true", help="glibc keeps freed memory, on both sides")
    parser.add_argument("--out", default="runs/bench")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        task, side = json.loads(arguments.serve)
        serve(Task(**task), side)
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.model or ["tiny"]:
            task = Task(
                model=model,
                scale=arguments.scale,
                traces=arguments.traces,
                rank=arguments.rank,
                dtype=arguments.dtype,
                checkpointing=arguments.checkpointing,
                micro_tokens=arguments.micro_tokens,
                folder=f"{folder}/{model}",
            )
            make_start(task)
            results.append(compare_sides(task, arguments))
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "sft.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(line for result in results for line in ratio_lines(result)))


if __name__ == "__main__":
    main()
