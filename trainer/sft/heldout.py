"""What the cold start does with the held-out puzzles beside their loss: answers them, and keeps the best epoch."""

import math
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors.torch import load_file

from data.errors import UserError
from data.files import read_sealed, replacing_folder
from data.puzzles import Puzzle
from rollout import Canary, Engine, Sampling
from trainer.grpo import CANARY_TOKENS, hand_over, make_canary
from trainer.model.merge import sampler_model
from trainer.policy import Policy
from trainer.ranks.world import World
from trainer.record.runfolder import save_tensors, write_json
from trainer.sft.examples import Example
from trainer.sft.settings import SftConfig
from trainer.start.parts import share_sampler_base

Judge = Callable[[list[str], list[Puzzle]], dict[str, float]]
"""(answers, puzzles) -> {metric: value}"""


class HeldOutAnswers:
    """Samples greedy answers to the held-out puzzles with vLLM, under the current weights, and judges them."""

    def __init__(
        self, cfg: SftConfig, policy: Policy, held_out: list[Example], world: World, judge: Judge | None
    ) -> None:
        from rollout.vllm_engine import VLLMEngine

        assert judge is not None
        of_puzzle = {example.puzzle_id: example for example in held_out}  # several traces can share a puzzle
        names = sorted(of_puzzle)  # of several files: those of one come before those of the next
        random.Random(f"{cfg.seed} answered").shuffle(names)
        self.examples = [of_puzzle[name] for name in names[: cfg.eval_puzzles]]
        self.cfg, self.policy, self.world, self.judge = cfg, policy, world, judge
        longest = max(len(e.prompt_ids) for e in self.examples)
        share_sampler_base(cfg, world)
        self.engine: Engine = VLLMEngine(
            sampler_model(cfg.model, cfg.quantize, cfg.dtype, cfg.out),
            lora=policy.lora,
            max_model_len=longest + cfg.eval_response_tokens,
            dtype=cfg.dtype,
            sequences=-(-len(self.examples) // world.size),
            eager=cfg.eager,
            memory_fraction=cfg.memory_fraction,
            rank=world.rank,
            size=world.size,
            may_sleep=True,  # it samples now and then, and the trainer needs the memory
        )
        self.engine.sleep()  # until metrics(): the first steps need the memory as the others do
        self.canary: Canary = make_canary(policy, self.examples[0].prompt_ids[:CANARY_TOKENS], cfg)

    def metrics(self, step: int) -> dict[str, float]:
        """{"eval/<metric>": value}, the same on every rank. step: from 1. Collective."""
        hand_over(self.engine, self.policy, self.canary, version=step)  # also wakes the engine
        greedy = Sampling.greedy(self.cfg.eval_response_tokens, self.policy.chat.stop_ids)
        self.engine.ask(step, [e.puzzle_id for e in self.examples], [e.prompt_ids for e in self.examples], greedy)
        # gather() undoes the split over the ranks: answer i belongs to example i again
        ids = self.world.gather([group[0].response_ids for group in self.engine.collect(step)])
        texts = [self.policy.chat.response_text(response) for response in ids]
        found = self.judge(texts, [e.puzzle for e in self.examples])
        found["response_length"] = sum(map(len, ids)) / len(ids)
        return {f"eval/{name}": value for name, value in found.items()}

    def close(self) -> None:
        self.engine.close()


class BestEpoch:
    """The epoch with the lowest eval_loss and, with --patience, its weights on disk (OUT/best).

    state: what `state` gave at the checkpoint from which the run goes on; {} for a new run.
    """

    def __init__(self, out: Path, cfg: SftConfig, epochs_done: int, state: dict[str, bool]) -> None:
        self.folder, self.patience, self.latest = out / "best", cfg.patience, epochs_done
        self.stop_loss, self.low_enough = cfg.stop_loss, state.get("low_enough", False)
        self.epoch, self.loss = 0, math.inf  # epochs count from 1; 0: none evaluated yet
        record, older = self.folder / "best.json", self.folder.with_name(f".{self.folder.name}.replaced")
        if not self.folder.exists():  # a kill between the two renames of replacing_folder; of ranks, one is first
            with suppress(OSError):
                older.rename(self.folder)
        if self.patience and record.is_file():
            found = read_sealed(record)
            # a later epoch is of a run that died after it, before its checkpoint; it will be trained again
            if found["epoch"] <= epochs_done:
                self.epoch, self.loss = found["epoch"], found["eval_loss"]
        elif self.patience and epochs_done:  # then OUT/model would get the last epoch's weights
            raise UserError(f"--resume: {self.folder} is not there any more, which held the best epoch; put it back")

    def compare(self, epoch: int, loss: float, policy: Policy, world: World) -> None:
        """Compare a new epoch (from 1) with the best. With --patience rank 0 keeps the weights of a better one."""
        self.latest = epoch
        if not loss < self.loss:  # a tie keeps the earlier epoch; nan is not below anything, so it is never the best
            return
        self.epoch, self.loss = epoch, loss
        if self.patience and world.is_main:
            with replacing_folder(self.folder) as partial:
                save_tensors(policy.adapter_tensors(), partial / "best.safetensors")
                write_json(partial / "best.json", {"epoch": epoch, "eval_loss": loss})

    def see(self, loss: float) -> None:
        """Note an evaluation, of a whole epoch or within one: is its loss as low as --stop-loss asks?"""
        self.low_enough = bool(self.stop_loss) and loss <= self.stop_loss  # nan is not below anything

    def is_over(self) -> bool:
        """Is the last eval_loss low enough, or have --patience epochs passed since the best? The same on every rank."""
        return self.low_enough or bool(self.patience and self.epoch and self.latest - self.epoch >= self.patience)

    def state(self) -> dict[str, bool]:
        """What a checkpoint keeps of this, so that a run which is resumed where it stopped makes no further step."""
        return {"low_enough": True} if self.low_enough else {}

    def load_into(self, policy: Policy) -> None:
        """Give the policy the weights of the best epoch; with --stop-loss reached they are the last ones."""
        if self.low_enough:
            return
        if self.patience and self.epoch and self.epoch != self.latest:  # else the policy has them
            policy.load_adapter(load_file(self.folder / "best.safetensors"))
