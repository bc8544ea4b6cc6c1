"""One GRPO optimizer step: ours against TRL's, and against our own with a copy of the prompt per response.

    pip install -e ".[bench]"                     # TRL 1.16
    python -m tests.bench.update                  # CPU: the paper's lengths x 0.25, a tiny and a 40 M model
    python -m tests.bench.update --model qwen2.5-7b --scale 1 --prompts 2 --rank 256 --dtype bfloat16 \\
        --micro-tokens 16384 --checkpointing --no-sweep     # one GPU of 80 GB

A step is reference log-probs, forward, backward, clipping and AdamW, on the same fabricated rollouts with the same
LoRA. Each side is a process that makes one step on request. The sides take turns; on a GPU, which holds one side at a
time, they run one after another. TRL runs once at each of checkpointing on and off x micro-batch 1, 2, 5, and its
fastest setting is compared. On a CPU TRL applies the LM head to prompts and padding too; "changed" makes it score
response tokens only, as it does on a GPU. --liger adds "changed" with Liger's fused loss. Memory is the peak of a
process above its memory after the imports (on a GPU: the peak that PyTorch allocated). Prints RATIO lines, and writes
JSON and a plot.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from tests.bench.memory import resident
from tests.bench.side import Failed, Side, answer, ratio
from trainer.model.cost import Cost
from trainer.packing import Group

MODELS = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32_000,
    },
    "40M": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 32_000,
    },
    # the demo's shape, with which vLLM can sample on a CPU (head size 32)
    "embedded": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
}
PROMPT, RESPONSE, G = 2000, 1146, 5
"""Mean lengths in tokens of CellPuzzles prompts and of the paper's responses, and its group size."""
SPREAD = 0.35
"""Standard deviation of the logarithm of a length."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The work that every side gets."""

    model: str
    scale: float = 0.25
    prompts: int = 2
    group_size: int = G
    response: float = RESPONSE
    rank: int = 16
    dtype: str = "float32"
    checkpointing: bool = False
    micro_tokens: int = 2600
    """Tokens per pass of ours; a group of a quarter of the paper's lengths has about 2,000."""
    folder: str = ""

    def groups(self) -> list[Group]:
        """Fabricated rollouts with the paper's length distribution."""
        rng = random.Random(0)
        vocabulary = shape_of(self.model)["vocab_size"]

        def text(mean: float, spread: float) -> list[int]:
            return draw_text(rng, mean * self.scale, spread, vocabulary)

        return [
            (text(PROMPT, 0.1), [text(self.response, SPREAD) for _ in range(self.group_size)])
            for _ in range(self.prompts)
        ]


def draw_text(rng: random.Random, mean: float, spread: float, vocabulary: int) -> list[int]:
    """Random tokens; the length is log-normal. spread: standard deviation of its logarithm."""
    length = round(mean * math.exp(rng.gauss(-(spread**2) / 2, spread)))
    return [rng.randrange(100, vocabulary) for _ in range(max(4, length))]


def shape_of(model: str) -> dict:
    if model in MODELS:
        return MODELS[model]
    return json.loads((Path("launch/recipes") / model / "config.json").read_text())


def make_checkpoint(task: Task, folder: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from trainer.model.embedded import make_tokenizer

    tied = {"tie_word_embeddings": True, "max_position_embeddings": 8192} if task.model in MODELS else {}
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, task.dtype))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(Qwen2Config(**{**shape_of(task.model), **tied}))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    make_tokenizer(["a few words"]).save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


def fixed_reward(group: int, response: int) -> float:
    """Reward of a response, 0 to 1. The rewards of a group of two or more are never all equal."""
    return ((7 * response + 3 * group) % 5) / 4


def step_flops(task: Task, cost: Cost, shared: bool) -> float:
    """Floating-point operations of a step.

    In units of a forward pass, linear layers and head cost 3 (reference, policy, gradient of their input); attention
    costs 4.5 (reference, policy, and 2.5 for its backward, arXiv:2307.08691). The gradient of the adapter itself is
    left out.
    """
    total = 0.0
    for prompt, responses in task.groups():
        for group in [[len(r) for r in responses]] if shared else [[len(r)] for r in responses]:
            pairs = Cost(token=0, pair=cost.pair, target=0).of(len(prompt), group)
            total += 3 * (cost.of(len(prompt), group) - pairs) + 4.5 * pairs
    return total


# ---- a side: a process that makes one step on request


def our_step(task: Task, packing: str):
    """(a function that makes a step with trainer.grpo.update, the cost of a forward pass)."""
    from reward import Reward
    from rollout import Rollout
    from trainer.config import GrpoConfig
    from trainer.grpo import Step, compare, update
    from trainer.packing import scored_groups
    from trainer.ranks.world import join_world
    from trainer.start.parts import load_policy, make_optimizer

    cfg = GrpoConfig(
        model=task.folder,
        lora_rank=task.rank,
        lora_alpha=2 * task.rank,
        prompts_per_step=task.prompts,
        dtype=task.dtype,
        group_size=task.group_size,
        packing=packing,
        checkpointing=task.checkpointing,
        micro_tokens=task.micro_tokens,
    )
    world = join_world()
    policy = load_policy(cfg, world.device)
    optimizer = make_optimizer(cfg, list(policy.trainable().values()))
    groups = [
        [
            Rollout(
                puzzle_id=str(g),
                prompt_ids=prompt,
                response_ids=ids,
                sampler_logprobs=[0.0] * len(ids),
                finish_reason="stop",
                adapter_version=0,
                adapter_hash="",
            )
            for ids in responses
        ]
        for g, (prompt, responses) in enumerate(task.groups())
    ]
    rewards = [Reward(total=fixed_reward(g, i)) for g in range(task.prompts) for i in range(task.group_size)]
    advantages, trained = compare(rewards, cfg)
    rows = [
        {"puzzle_id": r.puzzle_id, "response": 1, "response_ids": r.response_ids} for group in groups for r in group
    ]
    sampled = scored_groups(groups, rows, advantages, trained)

    out = Path(tempfile.gettempdir())
    now = Step(step=0, cfg=cfg, policy=policy, optimizer=optimizer, world=world, out=out)

    def step() -> None:
        update(now, sampled)

    return step, policy.cost


def trl_step(task: Task, side: dict):
    from tests.bench.update_trl import TrlStep

    made = TrlStep(
        task.folder,
        task.groups(),
        lora_rank=task.rank,
        micro_batch=side["micro_batch"],
        dtype=task.dtype,
        checkpointing=side["checkpointing"],
        liger=side["liger"],
        compact=side["compact"],
        out=tempfile.mkdtemp(),
    )
    return made.step


def serve(task: Task, side: dict) -> None:
    """Answer with the seconds of each step and the peak memory so far."""
    if not torch.cuda.is_available():
        torch.set_num_threads(psutil.cpu_count())
    import peft  # noqa: F401 (import before the first measurement: the memory of imports does not count)
    import transformers  # noqa: F401

    process, cost = psutil.Process(), None
    if side["name"] == "ours":
        import trainer.grpo
        import trainer.start.parts  # noqa: F401
    else:
        import tests.bench.update_trl  # noqa: F401
    before = process.memory_info().rss
    if side["name"] == "ours":
        step, cost = our_step(task, side["packing"])
    else:
        step = trl_step(task, side)

    def timed() -> dict:
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        most = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM") - before
        return {"seconds": seconds, "bytes": most}

    answer({"cost": vars(cost) if cost else None}, timed)


def start(task: Task, side: dict) -> Side:
    return Side(label(side), "update", vars(task), side).warm_up()


def label(side: dict) -> str:
    if side["name"] == "ours":
        return f"ours, {side['packing']}"
    checkpointing = "checkpointing, " if side["checkpointing"] else ""
    changes = f"{' changed' if side['compact'] else ''}{' + Liger' if side['liger'] else ''}"
    return f"TRL{changes}, {checkpointing}micro-batch {side['micro_batch']}"


# ---- the comparison


def best_trl(task: Task) -> tuple[dict, dict[str, float]]:
    """(TRL's fastest setting, {setting: seconds of its step})."""
    found: dict[str, float] = {}
    best = None
    for checkpointing in (False, True):
        for micro_batch in (1, 2, 5):
            side = {
                "name": "trl",
                "checkpointing": checkpointing,
                "micro_batch": micro_batch,
                "liger": False,
                "compact": False,
            }
            if task.prompts * task.group_size % micro_batch:
                continue
            try:
                running = start(task, side)
            except Failed as error:  # out of memory, on a GPU
                print(f"  {error}", flush=True)
                continue
            found[label(side)] = running.step()["seconds"]
            running.close()
            print(f"  {label(side)}: {found[label(side)]:.2f} s", flush=True)
            if found[label(side)] == min(found.values()):
                best = side
    return best, found


def compare_sides(task: Task, repeats: int, liger: bool, only_trl: int) -> dict:
    """Time all sides. only_trl: only shared packing and TRL at this micro-batch, without a search; 0: all sides."""
    print(
        f"{task.model}: {task.prompts} prompts x {task.group_size} responses, lengths x {task.scale}, "
        f"LoRA r = {task.rank}"
    )
    trl, settings = (
        {"name": "trl", "checkpointing": False, "micro_batch": only_trl, "liger": False, "compact": False},
        {},
    )
    sides = [{"name": "ours", "packing": "shared"}, trl]
    if not only_trl:
        trl, settings = best_trl(task)
        sides = [sides[0], {"name": "ours", "packing": "plain"}, trl]
    if not only_trl and not torch.cuda.is_available():
        sides.append({**trl, "compact": True})
    if liger:
        sides.append({**trl, "compact": True, "liger": True})
    running = []
    for batch in [[side] for side in sides] if torch.cuda.is_available() else [sides]:  # a GPU holds one at a time
        together = [start(task, side) for side in batch]
        for _ in range(repeats):
            for side in together:
                side.step()
        for side in together:
            side.close()
        running += together
    cost = Cost(**running[0].ready["cost"])
    flops = {packing: step_flops(task, cost, packing == "shared") for packing in ("shared", "plain")}
    tokens = sum(len(prompt) + len(r) for prompt, responses in task.groups() for r in responses)
    for side in running:
        middle = statistics.median(step["seconds"] for step in side.steps)
        rate = flops["shared"] / middle / 1e12 if side is running[0] else flops["plain"] / middle / 1e12
        print(
            f"  {side.label}: {middle:.2f} s, {tokens / middle:.0f} tok/s, {rate:.3f} TFLOP/s, "
            f"{max(s['bytes'] for s in side.steps) / 1e6:.0f} MB"
        )
    return {
        "task": vars(task),
        "tokens": tokens,
        "flops": flops,
        "settings": settings,
        "sides": {side.label: side.steps for side in running},
    }


def ratio_lines(found: dict) -> list[str]:
    name, (ours, *others) = found["task"]["model"], found["sides"].items()
    allowed = found["flops"]["plain"] / found["flops"]["shared"]
    lines = [f"counted for {name}: operations of plain over shared {allowed:.2f}"]
    for text, side in others:
        if text.startswith("ours"):
            lines.append(ratio(f"update_plain_over_shared_{name}", side, ours[1], "seconds"))
            continue
        who = "trl" + "_changed" * ("changed" in text) + "_liger" * ("Liger" in text)
        lines.append(ratio(f"update_{who}_over_ours_{name}", side, ours[1], "seconds"))
        lines.append(ratio(f"update_ours_over_{who}_memory_{name}", ours[1], side, "bytes"))
    return lines


# ---- cost against response length and group size


def sweep(task: Task, repeats: int) -> list[dict]:
    """Seconds of one of our steps, with shared and with plain packing, over response lengths and over group sizes."""
    points = [{"response": RESPONSE * x} for x in (0.25, 0.5, 1.0, 2.0)] + [{"group_size": g} for g in (2, 5, 10)]
    found = []
    for point in points:
        here = Task(**{**vars(task), **point})
        running = [start(here, {"name": "ours", "packing": packing}) for packing in ("shared", "plain")]
        seconds = [[side.step()["seconds"] for side in running] for _ in range(repeats)]
        cost = Cost(**running[0].ready["cost"])
        for side in running:
            side.close()
        shared, plain = (statistics.median(column) for column in zip(*seconds, strict=True))
        counted = step_flops(here, cost, False) / step_flops(here, cost, True)
        found.append({**point, "shared": shared, "plain": plain, "counted": counted})
        print(
            f"  {point}: plain {plain:.2f} s, shared {shared:.2f} s, ratio {plain / shared:.2f}, counted {counted:.2f}"
        )
    return found


def plot(points: list[dict], model: str, scale: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    panels = (
        ("response", f"mean response length (prompt {PROMPT * scale:.0f} tokens, G = {G})"),
        ("group_size", "group size"),
    )
    for axis, (key, text) in zip(axes, panels, strict=True):
        rows = [row for row in points if key in row]
        x = [row[key] * (scale if key == "response" else 1) for row in rows]
        axis.plot(x, [row["plain"] for row in rows], "o-", color="#b0553a", label="a copy of the prompt per response")
        axis.plot(x, [row["shared"] for row in rows], "o-", color="#2f6f8f", label="shared prompt")
        counted = [row["plain"] / row["counted"] for row in rows]
        axis.plot(x, counted, ":", color="#555555", label="copies / counted saving")
        axis.set_xlabel(text)
        axis.set_ylabel("seconds per optimizer step")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    axes[0].set_title(f"one optimizer step, {model} model", loc="left", fontsize=10)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--model", action="append", help="tiny, 40M, embedded or a folder of launch/recipes; default: the first two"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=float, default=0.25)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="ours with activation checkpointing")
    parser.add_argument(
        "--liger", action="store_true", help="also TRL with Liger's fused loss (pip install liger-kernel)"
    )
    parser.add_argument("--micro-tokens", type=int, default=Task.micro_tokens, help="of ours, per pass")
    parser.add_argument(
        "--only-trl", type=int, default=0, help="without a search: TRL at this micro-batch, against shared packing"
    )
    parser.add_argument("--no-sweep", action="store_true")
    parser.add_argument("--out", default="runs/bench")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        task, side = json.loads(arguments.serve)
        serve(Task(**task), side)
        return
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    results, points, lines = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.model or ["tiny", "40M"]:
            task = Task(
                model=model,
                scale=arguments.scale,
                prompts=arguments.prompts,
                rank=arguments.rank,
                dtype=arguments.dtype,
                checkpointing=arguments.checkpointing,
                micro_tokens=arguments.micro_tokens,
                folder=f"{folder}/{model}",
            )
            make_checkpoint(task, Path(task.folder))
            results.append(compare_sides(task, arguments.repeats, arguments.liger, arguments.only_trl))
            lines += ratio_lines(results[-1])
            if not arguments.no_sweep and not points:
                points = sweep(task, min(arguments.repeats, 3))
    (out / "update.json").write_text(json.dumps({"results": results, "sweep": points}, indent=1) + "\n")
    if points:
        plot(points, results[0]["task"]["model"], arguments.scale, out / "update.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
