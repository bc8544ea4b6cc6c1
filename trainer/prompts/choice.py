"""Which prompts a step asks: its batch, in a seeded order, and under dynamic sampling others beside it.

Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): a group whose rewards are all equal has advantages of 0, so it
teaches nothing, and a batch with many of them has a small and noisy gradient. Their places are filled with groups of other
prompts, in as many rounds as needed, until every group is mixed or --oversample times the batch was asked; places that are
then left keep the groups they had. All of it follows from (seed, step) and the rewards, so a resumed run, and any number of
ranks, asks the same prompts.

P: prompts of a step.
"""

import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import cycle, islice

from rollout import stable_seed
from trainer.advantages import differ
from trainer.config import GrpoConfig
from trainer.packing import ScoredGroup
from trainer.policy import Prompt

More = Callable[[list[Prompt], str], list[ScoredGroup]]
"""(prompts, name of the round) -> a scored group of each"""


def prompts_of_step(prompts: list[Prompt], per_step: int, step: int, seed: int) -> list[Prompt]:
    """The `per_step` prompts of optimizer step `step` (0-based): epochs of a seeded shuffle, the ragged end dropped.

    With --curriculum an epoch goes from easy to hard; prompts that are equally hard stay in the order of the shuffle. A
    function of the arguments alone, so a resumed run needs no stored position.
    """
    epoch, place = divmod(step, len(prompts) // per_step)
    order = _order_of_epoch(tuple(prompt.difficulty for prompt in prompts), per_step, epoch, seed)
    return [prompts[i] for i in order[place * per_step : (place + 1) * per_step]]


@lru_cache(maxsize=1)  # of half a million prompts it takes half a second
def _order_of_epoch(difficulty: tuple[float, ...], per_step: int, epoch: int, seed: int) -> list[int]:
    # a fresh order per epoch, drawn from (seed, epoch) alone: a resumed run finds the same one
    order = list(range(len(difficulty)))
    random.Random(stable_seed(seed, "epoch", epoch)).shuffle(order)
    del order[len(order) // per_step * per_step :]  # before they are sorted, or the hardest would never be asked
    order.sort(key=lambda i: difficulty[i])  # where none is known, the shuffled order stays
    return order


def replace_equal_groups(
    sampled: list[ScoredGroup], more: More, prompts: list[Prompt], cfg: GrpoConfig, step: int
) -> tuple[list[ScoredGroup], dict[str, float]]:
    """([P] groups, mixed ones in place of those of equal rewards as far as they were found; keys of metrics.jsonl).

    sampled: [P] groups of the step's batch. prompts: all of the run. With --oversample 1, what was given. Collective.
    """
    if cfg.oversample == 1:
        return sampled, {}
    spare = other_prompts(prompts, {group.rollouts[0].puzzle_id for group in sampled}, cfg.seed, step)
    asked, found = list(sampled), []  # found: mixed groups of the rounds
    places = [place for place, group in enumerate(sampled) if not is_mixed(group)]
    rounds = 0
    while len(found) < len(places) and len(asked) < cfg.oversample * len(sampled):
        rounds += 1
        count = min(len(places) - len(found), cfg.oversample * len(sampled) - len(asked))
        groups = more(list(islice(spare, count)), f"round-{rounds}")
        asked += groups
        found += [group for group in groups if is_mixed(group)]
    replaced = dict(zip(places, found, strict=False))  # what was found last may be too little, never too much
    kept = [replaced.get(place, group) for place, group in enumerate(sampled)]
    return kept, sampling_metrics(asked, len(sampled))


def is_mixed(group: ScoredGroup) -> bool:
    """Has the group two different rewards? Responses that were not scored do not count."""
    return differ(row["reward"] for row in group.rows if row["reward"] is not None)


def other_prompts(prompts: list[Prompt], batch: set[str], seed: int, step: int) -> Iterator[Prompt]:
    """Prompts for the places to fill, without end: in a seeded order of the step, those of its batch last."""
    order = list(prompts)
    random.Random(stable_seed(seed, "oversample", step)).shuffle(order)
    order.sort(key=lambda prompt: prompt.puzzle.id in batch)  # keeps the order otherwise
    return cycle(order)


def sampling_metrics(asked: list[ScoredGroup], batch: int) -> dict[str, float]:
    """Keys of metrics.jsonl, about all groups that were sampled, and not only those that are trained on."""
    rewards = [row["reward"] for group in asked for row in group.rows if row["reward"] is not None]
    return {
        "dynamic_sampling/num_gen_batches": len(asked) / batch,
        "dynamic_sampling/filtered_groups": sum(not is_mixed(group) for group in asked) / len(asked),
        **({"dynamic_sampling/reward": sum(rewards) / len(rewards)} if rewards else {}),
    }
