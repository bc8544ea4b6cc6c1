"""Log-probs of response tokens: ours (fused with the head, in chunks) against log_softmax and gather, in one run.

    python -m tests.bench.memory [--repeats 5]

Measures forward and backward at several vocabularies and numbers of tokens, in float32. Each case runs in its own
process, which reports its peak resident memory above what it had before the pass. The two sides alternate. Prints a
table and RATIO lines, and writes JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from trainer.logprobs import fused_logprobs

CASES = ((32_000, 2048), (152_064, 1024), (152_064, 4096))
"""(vocabulary, tokens)"""
HIDDEN = 896
"""Hidden size of Qwen2.5-0.5B."""


def plain_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The usual way: all logits at once."""
    return (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def one(which: str, vocabulary: int, tokens: int) -> None:
    """Print {"seconds", "bytes"} of one forward and backward pass. which: "fused" or "plain"."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, HIDDEN, generator=generator) * 0.02
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    run = fused_logprobs if which == "fused" else plain_logprobs
    run(hidden[:2], weight, targets[:2]).sum().backward()  # warm up
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's record of the peak to the current value
    before = resident("VmRSS")
    start = time.perf_counter()
    run(hidden, weight, targets).sum().backward()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": resident("VmHWM") - before}))


def resident(what: str) -> int:
    """Resident bytes of this process: now (VmRSS) or at the peak (VmHWM)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default="runs/bench/memory.json")
    parser.add_argument("--one", nargs=3)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one[0], int(arguments.one[1]), int(arguments.one[2]))
        return
    rows = []
    for vocabulary, tokens in CASES:
        found: dict[str, list[dict]] = {"plain": [], "fused": []}
        for _ in range(arguments.repeats):
            for which, results in found.items():
                words = [sys.executable, "-m", "tests.bench.memory", "--one", which, str(vocabulary), str(tokens)]
                done = subprocess.run(words, capture_output=True, text=True, check=True)
                results.append(json.loads(done.stdout))
        rows.append({"vocabulary": vocabulary, "tokens": tokens, **found})
        medians = [
            f"{which} {statistics.median(r['bytes'] for r in results) / 1e6:7.0f} MB "
            f"{statistics.median(r['seconds'] for r in results):6.2f} s"
            for which, results in found.items()
        ]
        print(f"V {vocabulary:7} tokens {tokens:5}  " + "  ".join(medians), flush=True)
    Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        for key, name, over in (
            ("bytes", "plain_over_fused_memory", True),
            ("seconds", "fused_over_plain_time", False),
        ):
            pairs = zip(row["plain"], row["fused"], strict=True)
            ratios = sorted((p[key] / max(f[key], 1)) if over else (f[key] / p[key]) for p, f in pairs)
            label = f"{name}_V{row['vocabulary']}_T{row['tokens']}"
            print(f"RATIO {label} {statistics.median(ratios):.2f} {ratios[0]:.2f} {ratios[-1]:.2f}")


if __name__ == "__main__":
    main()
