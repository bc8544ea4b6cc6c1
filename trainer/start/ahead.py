"""What a command that trains twice (launch/demo.py) can know of GRPO before its cold start, which takes hours."""

from dataclasses import replace
from pathlib import Path

import torch

from data.errors import UserError
from data.processes import free_memory, usable_cores
from data.prompts import ChatFormat
from data.puzzles import read_puzzles, read_rows
from trainer.config import GrpoConfig
from trainer.model.loading import empty_model, load_tokenizer
from trainer.sft.examples import trace_of
from trainer.start.memory import n_weights
from trainer.start.model_check import check_model
from trainer.start.preflight import check_launch, launch_of, refuse_problems

COPIES = {"adapter": 2.0, "every weight": 5.0}
"""Memory of a process of the cold start on a CPU, in copies of the weights in float32: weights and activations; where all are
trained also gradients and the optimizer's two moments."""


def refuse_model(model: Path, begun: bool) -> None:
    """Raises UserError for a checkpoint that the trainers or vLLM refuse. Reads no weights. begun: as for check_model."""
    refuse_problems(check_model(str(model), vllm=True, begun=begun))


def refuse_lengths(cfg: GrpoConfig, traces: Path) -> list[str]:
    """Notes on what does not fit the lengths of GRPO; raises UserError when GRPO would refuse them.

    cfg: as GRPO will run, with the checkpoint before the cold start, which has the same tokenizer and shape.
    """
    refuse_problems(check_launch(cfg, launch_of(replace(cfg, nodes=1, ranks_per_node=1))))
    chat = ChatFormat(load_tokenizer(str(cfg.model)), str(cfg.model))
    puzzles = read_puzzles(cfg.puzzles)
    prompts = [len(chat.prompt_ids(puzzle.chat())) for puzzle in puzzles]
    fitting = sum(length <= cfg.max_prompt_tokens for length in prompts)
    if fitting < cfg.prompts_per_step:
        raise UserError(
            f"{fitting} of {len(prompts)} prompts fit its max_prompt_tokens {cfg.max_prompt_tokens} (longest "
            f"{max(prompts)}), fewer than a step's {cfg.prompts_per_step}; raise it, or build shorter puzzles"
        )
    notes = []
    if fitting < len(prompts):
        notes.append(
            f"{len(prompts) - fitting} of {len(prompts)} prompts are longer than GRPO's max_prompt_tokens "
            f"{cfg.max_prompt_tokens} (longest {max(prompts)}): GRPO leaves them out"
        )
    answers = [len(chat.response_ids(trace_of(row))) for row in read_rows(traces)]
    long = sum(length > cfg.max_response_tokens for length in answers)
    if long:
        notes.append(
            f"{long} of {len(answers)} traces are longer than GRPO's max_response_tokens {cfg.max_response_tokens} (longest "
            f"{max(answers)}): answers like them will be cut"
        )
    return notes


def cold_start_ranks(model: Path, every_weight: bool = False) -> int:
    """Processes of the cold start: one per GPU; on a CPU two, which are faster than two threads, where both fit in memory."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    needed = (
        4
        * n_weights(empty_model(str(model), torch.float32, "sdpa"))
        * COPIES["every weight" if every_weight else "adapter"]
    )
    return max(1, min(2, usable_cores(), int(free_memory() / needed)))
