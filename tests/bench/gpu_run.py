"""A GRPO run with its seconds taken apart: start, sample, update, hand over, sleep, wake; and its memory beside the table's.

    python -m tests.bench.gpu_run small --out OUT --work FOLDER            # 40 M weights, 8 x 8 responses of 256 tokens
    python -m tests.bench.gpu_run qwen2.5-7b --out OUT --work /dev/shm/w   # the shape, random weights, r = 256
    python -m tests.bench.gpu_run small --tiny --out OUT --work FOLDER     # a million weights, for a CPU
    python -m tests.bench.gpu_run FOLDER --out OUT --work FOLDER -- --recipe smollm2_grpo --puzzles train.parquet

What follows `--` goes to launch/grpo.py, and wins. Shapes get the 8 real puzzles of tests/fixtures, and a tokenizer made of
them. The run folder and a made checkpoint are in --work (the 7B shape takes 25 GB there). Prints `RESULT <name> <value>`.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

import launch.grpo  # first: it sets variables that torch and vLLM read when they are imported

import torch  # isort: skip

from data.puzzles import read_puzzles
from rollout import vllm_engine
from rollout.vllm_engine import VLLMEngine
from rollout.vllm_versions import gpu_settings
from tests.bench.kernels import say
from tests.bench.update import MODELS, Task, make_checkpoint, shape_of
from trainer import grpo
from trainer.config import GrpoConfig
from trainer.model.embedded import make_tokenizer
from trainer.model.loading import load_tokenizer
from trainer.record.runfolder import read_record
from trainer.start import parts
from trainer.start.memory import estimate_memory
from trainer.start.preflight import GIB, launch_of

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures/cellpuzzles_sample.jsonl"
COMMON = ["--insist", "--save-every", "100", "--max-prompt-tokens", "3072"]
"""--insist: random weights give no valid answer."""
SMALL = [*("--prompts-per-step", "8", "--group-size", "8", "--max-response-tokens", "256", "--steps", "4")]
SMALL += [*("--lora-rank", "8", "--lora-alpha", "16", "--lr", "1e-4", "--memory-fraction", "0.3")]
TINY = [*("--prompts-per-step", "2", "--group-size", "2", "--max-response-tokens", "8", "--steps", "3")]
TINY += ["--lora-rank", "8", "--lora-alpha", "16"]
LARGE = [*("--prompts-per-step", "8", "--group-size", "5", "--max-response-tokens", "1024", "--steps", "3")]
LARGE += [*("--lora-rank", "256", "--lora-alpha", "512", "--checkpointing", "--memory-fraction", "0.4")]


class Watch:
    """Takes the times of a run from outside: of vLLM's sleep and wake, and of the first step; and looks at the GPU's memory."""

    def __init__(self, name: str, run: Path) -> None:
        """name: of the figures. run: the run folder."""
        self.name, self.run = name, run
        self.seconds: dict[str, list[float]] = {"sleep": [], "wake": [], "load_adapter": [], "prove": []}
        self.most: dict[str, int] = {}
        """{phase of a step, or "start": bytes of the GPU that this process used at most}"""
        # torch's own figures would not do: they count vLLM's tensors, also while they sleep
        self.clock: Any = None
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while torch.cuda.is_available():
            if torch.cuda.is_initialized():
                phase = self.clock.phase if self.clock else "start"
                self.most[phase] = max(self.most.get(phase, 0), own_gpu_bytes())
            time.sleep(0.05)

    def attach(self) -> None:
        """Put clocks around what the run calls."""
        VLLMEngine.sleep = self._timed("sleep", VLLMEngine.sleep, lambda engine: engine.may_sleep and not engine.asleep)
        VLLMEngine.wake = self._timed("wake", VLLMEngine.wake, lambda engine: engine.asleep)
        # the hand-over with its checks, and the sampler's part of the canary
        VLLMEngine.load_adapter = self._timed("load_adapter", VLLMEngine.load_adapter, lambda engine: True)
        VLLMEngine.prove = self._timed("prove", VLLMEngine.prove, lambda engine: True)
        make_engine, clock = parts.make_vllm_engine, grpo.Clock

        def timed_engine(*args: Any, **settings: Any) -> Any:
            start = time.perf_counter()
            engine = make_engine(*args, **settings)
            say(f"{self.name}_engine_start_s", time.perf_counter() - start)
            return engine

        def next_step(world: Any, step: int) -> Any:
            if step == 1:
                say(f"{self.name}_before_step_1_s", time.time() - psutil.Process().create_time())
            else:  # printed now: a run that is killed has said what its steps took
                say_step(self.name, read_lines(self.run / "timing.jsonl")[-1])
            self.clock = clock(world, step)
            return self.clock

        parts.make_vllm_engine, grpo.Clock = timed_engine, next_step

    def act_as_a_card_of(self, gib: float) -> None:
        """Let this process have so much of the GPU, and let vLLM choose its batches as on such a card. Before attach()."""
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * GIB / total)
        vllm_engine.gpu_settings = lambda sequences, _, eager: gpu_settings(sequences, int(gib * GIB), eager)
        sleep, wake = VLLMEngine.sleep, VLLMEngine.wake

        def sleep_and_lend(engine: VLLMEngine) -> None:
            # torch counts what sleeps as in use, though the GPU has it back: as much may be taken instead
            before = torch.cuda.mem_get_info()[0]
            sleep(engine)
            given_back = max(0, torch.cuda.mem_get_info()[0] - before) if engine.asleep else 0
            torch.cuda.set_per_process_memory_fraction(min(1.0, (gib * GIB + given_back) / total))

        def wake_and_take_back(engine: VLLMEngine) -> None:
            wake(engine)
            torch.cuda.set_per_process_memory_fraction(gib * GIB / total)

        VLLMEngine.sleep, VLLMEngine.wake = sleep_and_lend, wake_and_take_back

    def _timed(self, name: str, method: Callable, happens: Callable[[VLLMEngine], bool]) -> Callable:
        def call(engine: VLLMEngine, *given: Any) -> Any:
            counts, start = happens(engine), time.perf_counter()
            found = method(engine, *given)
            if counts:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.seconds[name].append(time.perf_counter() - start)
            return found

        return call


def own_gpu_bytes() -> int:
    """Memory of the GPU that this process uses; where the driver does not say, what all processes use."""
    try:
        import pynvml

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device):
            if process.pid == os.getpid() and process.usedGpuMemory:
                return process.usedGpuMemory
    except Exception:  # noqa: S110, BLE001 (no such package, or whatever this driver answers)
        pass
    free, total = torch.cuda.mem_get_info()
    return total - free


def long_puzzles(folder: Path, most: int, tokenizer: Any) -> Path:
    """The puzzles of the fixture with longer system messages: their prompts have just below `most` tokens."""
    rows = [json.loads(line) for line in FIXTURE.read_text(encoding="utf-8").splitlines()]
    lengths = []
    for row in rows:
        words = row["user_msg"].split()
        tokens = len(tokenizer(" ".join(words)).input_ids)
        # 100: for the chat template
        missing = most - 100 - len(tokenizer(row["system_msg"] + row["user_msg"]).input_ids)
        filler = words * (missing // tokens + 1)
        row["system_msg"] += " " + " ".join(filler[: int(missing * len(words) / tokens)])
        lengths.append(len(tokenizer(row["system_msg"] + row["user_msg"]).input_ids))
    say("long_puzzles_tokens", f"{min(lengths)} to {max(lengths)}")
    path = folder / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_model(model: str, folder: Path, dtype: str) -> None:
    """A checkpoint of a shape with random weights, and a tokenizer that knows the words of the fixture."""
    if (folder / "tokenizer.json").is_file():
        return
    make_checkpoint(Task(model=model, folder=str(folder), dtype=dtype), folder)
    texts = sorted({text for puzzle in read_puzzles(FIXTURE) for text in (puzzle.system_message, puzzle.user_message)})
    # not more tokens than the shape's embedding has rows
    make_tokenizer(texts, vocab_size=min(8192, shape_of(model)["vocab_size"] - 64)).save_pretrained(folder)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def say_step(name: str, row: dict) -> None:
    """Print a line of timing.jsonl."""
    for phase in ("sample", "score", "update", "sync", "step"):
        say(f"{name}_step_{row['step']}_{phase}_s", row[f"timing_s/{phase}"])
    if row["step"] > 1:  # a line has the recording of the step before
        say(f"{name}_step_{row['step'] - 1}_record_s", row["timing_s/record"])


def report(watch: Watch, limit_gib: float | None, memory_fraction: float | None) -> None:
    """Print the figures of a finished run that its steps have not printed. limit_gib, memory_fraction: of act_as_a_card_of."""
    name, out = watch.name, watch.run
    steps, metrics = read_lines(out / "timing.jsonl"), read_lines(out / "metrics.jsonl")
    settled = steps[1:] or steps  # the first step warms up
    say_step(name, steps[-1])
    for what, seconds in watch.seconds.items():
        if seconds:
            say(f"{name}_{what}_first_s", seconds[0])
            say(f"{name}_{what}_s", statistics.median(seconds[1:] or seconds))
    say(f"{name}_tokens_per_s", statistics.median(step["tokens_per_second"] for step in settled))
    say(f"{name}_sampled_tokens_per_s", statistics.median(step["sampling/tokens_per_second"] for step in settled))
    say(f"{name}_logp_difference", max(row["sampling/logp_difference/mean"] for row in metrics))
    say(f"{name}_effective_sample_size", min(row["sampling/effective_sample_size"] for row in metrics))
    settings = read_record(out)["settings"]
    say(f"{name}_dtype", settings["dtype"])
    if torch.cuda.is_available():
        config = GrpoConfig(**settings)
        machine = launch_of(config)
        if limit_gib:
            config = dataclasses.replace(config, memory_fraction=memory_fraction)
            machine = dataclasses.replace(machine, rank_bytes=limit_gib * GIB)
        table = {row.what: row.value.split()[0] for row in estimate_memory(config, machine)}
        for phase, most in watch.most.items():
            say(f"{name}_most_gib_in_{phase or 'start'}", most / GIB)
        say(f"{name}_table_gib_while_training", table["while training"])
        say(f"{name}_table_gib_while_sampling", table["while sampling"])


def main() -> None:
    given = sys.argv[1:]
    ours = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="small, a shape of launch/recipes (qwen2.5-7b), or a checkpoint folder")
    parser.add_argument("--name", help="of the figures; default: the model's")
    parser.add_argument("--out", type=Path, required=True, help="where timing.jsonl and metrics.jsonl are copied to")
    parser.add_argument("--work", type=Path, required=True, help="for the checkpoint and the run; on a fast disk")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--limit-gib", type=float, help="act as a card of so much memory; then --memory-fraction is of it"
    )
    parser.add_argument("--long", action="store_true", help="prompts of just below 3,072 tokens; else of about 1,000")
    parser.add_argument("--tiny", action="store_true", help="a million weights in place of the shape, short responses")
    arguments = parser.parse_args(given[:ours])
    name = arguments.name or Path(arguments.model).name
    words = ["--dtype", arguments.dtype]
    shape = {"small": "40M"}.get(arguments.model, arguments.model)
    if Path(shape).is_dir():
        model = Path(shape)
    else:
        words += [*COMMON, *(SMALL if arguments.model == "small" else LARGE)]
        words += TINY if arguments.tiny else []
        shape = "embedded" if arguments.tiny else shape
        model = arguments.work / f"model-{shape}"
        make_model(shape, model, "float32" if shape in MODELS else "bfloat16")
        words += [
            "--puzzles",
            str(long_puzzles(arguments.work, 3072, load_tokenizer(model)) if arguments.long else FIXTURE),
        ]
    given = given[ours + 1 :]
    share, limit = None, arguments.limit_gib if torch.cuda.is_available() else None
    if limit:
        share = float(given[given.index("--memory-fraction") + 1])
        # vLLM takes its share of the card that is there
        given += ["--memory-fraction", str(share * limit * GIB / torch.cuda.get_device_properties(0).total_memory)]
    run = arguments.work / f"run-{name}"
    shutil.rmtree(run, ignore_errors=True)
    watch = Watch(name, run)
    if limit:
        watch.act_as_a_card_of(limit)
    watch.attach()
    launch.grpo.main([*words, "--model", str(model), "--out", str(run), *given], standalone_mode=False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for file in ("timing.jsonl", "metrics.jsonl", "config.json"):
        shutil.copy(run / file, arguments.out / f"{name}.{file}")
    report(watch, limit, share)


if __name__ == "__main__":
    main()
