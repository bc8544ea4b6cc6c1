"""Validation inside a run: greedy answers to held-out puzzles, from the run's own sampler, and the best checkpoint by them.

What is measured is decided by whoever starts the run (a Judge), since the paper's metrics are in eval/, which the trainer
does not import.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import read_sealed
from data.prompts import ChatFormat
from data.puzzles import Puzzle, shared_puzzles
from rollout import Engine, Sampling
from trainer.config import OnlineConfig
from trainer.policy import Prompt
from trainer.ranks.world import World
from trainer.record.runfolder import list_checkpoints

Judge = Callable[[list[str], list[Puzzle], list[int]], dict[str, float]]
"""(answers, puzzles, tokens of each answer) -> {metric: value}"""
BEST_BY = "batch_accuracy"
"""The metric of --keep-best."""
TEST_SPLITS = ("test", "unseen")
"""Splits of a build that nothing may be chosen by. Its puzzles are called test-000012 (data/build/build.py)."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Puzzles that the run does not train on, and how answers to them are measured."""

    puzzles: list[Puzzle]
    judge: Judge


class Validator:
    """Answers the held-out puzzles, and remembers after which step the answers were best."""

    def __init__(self, cfg: OnlineConfig, chat: ChatFormat, world: World, out: Path, held_out: HeldOut | None) -> None:
        """held_out: None where the run has no --validate. Raises UserError when no puzzle fits --max-prompt-tokens."""
        self.cfg, self.chat, self.world, self.out, self.held_out = cfg, chat, world, out, held_out
        self.best: dict[str, Any] = {}
        """{step: from 1, batch_accuracy} with --keep-best; {} before the first validation. Checkpoints keep it."""
        self.prompts: list[Prompt] = []
        assert held_out is not None or not cfg.validate, "trainer.grpo.train needs what --validate names"
        if held_out is None:
            return
        prompts = [Prompt(puzzle=puzzle, ids=self.chat.prompt_ids(puzzle.chat())) for puzzle in held_out.puzzles]
        self.prompts = [prompt for prompt in prompts if len(prompt.ids) <= cfg.max_prompt_tokens]
        if not self.prompts:
            raise UserError(f"--validate {cfg.validate}: no puzzle fits --max-prompt-tokens {cfg.max_prompt_tokens}")
        if world.is_main and len(self.prompts) < len(prompts):
            left_out = len(prompts) - len(self.prompts)
            print(f"left out {left_out} puzzles of --validate longer than {cfg.max_prompt_tokens} tokens", flush=True)

    def is_due(self, step: int) -> bool:
        """step: from 0."""
        return self.held_out is not None and (step + 1) % self.cfg.validate_every == 0

    def metrics(self, engine: Engine, step: int) -> dict[str, float]:
        """{"validation/METRIC": value}, the same on every rank, under the adapter that was delivered last. Collective.

        step: from 0.
        """
        assert self.held_out is not None
        greedy = Sampling.greedy(self.cfg.max_response_tokens, self.chat.stop_ids)
        seconds = engine.seconds  # of the step's own sampling
        asked = fill_ranks(self.prompts, self.world)
        engine.ask(step, [p.puzzle.id for p in asked], [p.ids for p in asked], greedy, "validation")
        answers = self.world.gather([group[0].response_ids for group in engine.collect(step, "validation")])
        engine.seconds = seconds
        answers = answers[: len(self.prompts)]
        texts = [self.chat.response_text(ids) for ids in answers]
        found = self.held_out.judge(texts, [p.puzzle for p in self.prompts], list(map(len, answers)))
        # on a tie the earlier step stays the best
        if self.cfg.keep_best and found[BEST_BY] > self.best.get(BEST_BY, -1.0):
            self.best = {"step": step + 1, BEST_BY: found[BEST_BY]}
        return {f"validation/{name}": value for name, value in found.items()}

    def restore(self) -> None:
        """Go on from what the newest checkpoint has recorded, if there is one. Collective."""
        # rank 0 may just have set a damaged one aside, which another rank, or node, might still see
        newest = list_checkpoints(self.out)[-1:] if self.world.is_main else []
        best = read_sealed(newest[0] / "state.json").get("best", {}) if newest else {}
        self.best = self.world.gather_in_rank_order(best)[0]
        self.point_to_best()

    def point_to_best(self) -> None:
        """OUT/best: a link to the checkpoint of the best step. Rank 0 makes it, once the checkpoint is whole."""
        if not self.cfg.keep_best or not self.world.is_main:
            return
        link, folder = self.out / "best", f"checkpoints/step-{self.best.get('step', 0):06d}"
        if not (self.out / folder).is_dir():  # none yet; or it was damaged, and set aside
            link.unlink(missing_ok=True)
            if self.best:
                print(f"note: {self.out / folder}, the best so far, is not there any more", file=sys.stderr, flush=True)
            return
        new = self.out / ".best.new"
        new.unlink(missing_ok=True)
        new.symlink_to(folder)  # relative: the run folder can be moved
        os.replace(new, link)


def fill_ranks(prompts: Sequence[Prompt], world: World) -> list[Prompt]:
    """The prompts, the last one repeated until every rank has as many: ranks of a sharded model sample in step.

    The answers to the repeated ones are of no use; World.gather puts them last.
    """
    return [*prompts, *[prompts[-1]] * (-len(prompts) % world.size)]


def refuse_leaks(held_out: list[Puzzle], training: list[Puzzle], file: str) -> str:
    """Raises UserError, with names, for held-out puzzles of a test split, of a donor of training, or equal to one of training.

    file: of --validate. Returns a sentence for the user when donors are not stated, so that nobody can know; else "".
    """
    test = [puzzle.id for puzzle in held_out if puzzle.id.startswith(tuple(f"{split}-" for split in TEST_SPLITS))]
    if test or Path(file).stem in TEST_SPLITS:
        what = f"puzzle {test[0]} is" if test else "it is called"
        raise UserError(
            f"--validate {file}: {what} of a test split, by which nothing may be chosen, or it is no test any more; hold out "
            "donors of training instead (launch/hold_out.py)"
        )
    if shared := shared_puzzles(held_out, training):
        raise UserError(
            f"--validate {file}: shares {shared} with --puzzles; hold out whole donors (launch/hold_out.py)"
        )
    unknown = any(puzzle.meta.get("donor") is None for puzzle in (*held_out, *training))
    return f"--validate {file}: not every puzzle states its donor, so a shared one is not seen" if unknown else ""
