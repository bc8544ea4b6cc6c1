"""--distill-failures: a wrong response learns, token by token, from a right one of its own group.

GRPO gives all tokens of a response one number, its advantage. Of a wrong response next to a right one more can be said: the
policy is shown the right one and asked the same puzzle (the teacher), and how likely it then finds each token of the wrong
response says where that went wrong. This is on-policy self-distillation; SDPO (arXiv:2601.20802) learns from it alone, here
it stands beside GRPO's loss, and only in wrong responses.

    right     every cell of the response has its label (the reward's part batch_accuracy is 1)
    wrong     scored and not right, in a group that has a right response; the first of these is its teacher's
    teacher   the policy before the batch's first update, without gradient, asked with data.prompts.showing_an_answer
    term      weight * (log policy - log teacher)^2 / 2 at each token of the wrong response; 0 everywhere else

The term is k2 (objective.kl_estimate) as a loss. Its gradient is (log policy - log teacher) times that of log policy, and the
mean of this over tokens that the policy samples is the gradient of KL(policy || teacher), the reverse KL of on-policy
distillation (GKD, arXiv:2306.13649), token by token. It is the same as k1 taken as a negative reward of the token alone;
k3, GRPO's own estimate, has another gradient as a loss (both: arXiv:2510.01555). The sum over the vocabulary would have less
variance, but V numbers for each token of a bundle. Like the KL to the reference, the term has no importance ratio: from a
batch's second update on (--updates-per-batch) its tokens are a little old.

Axes: N rows (responses), T tokens of the longest response. "Collective": all ranks make the call, in the same order.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.errors import UserError
from data.prompts import ChatFormat, showing_an_answer
from rollout import Rollout
from trainer.config import GrpoConfig
from trainer.metrics import TokenSums
from trainer.objective import LossTerms, kl_estimate
from trainer.packing import MicroBatch, ScoredGroup, balance, filler, micro_batches
from trainer.policy import Policy, Prompt
from trainer.ranks.world import World
from trainer.start.parts import Step

PART = "batch_accuracy"
"""The part of a reward that says whether a response is right."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """The wrong responses of one group, and the prompt that shows their teacher a right one."""

    group: int
    """Its place in the step."""
    sibling: int
    """Place in the group of the right response that is shown."""
    wrong: list[int]
    """Places in the group of the responses that learn."""
    prompt_ids: list[int]
    responses: list[Rollout]
    """Those of `wrong`."""


@dataclass(frozen=True, kw_only=True)
class Taught:
    """The step's groups, those with a lesson with the teacher's numbers in `tokens`; and what metrics.jsonl says of it."""

    groups: list[ScoredGroup]
    figures: dict[str, float]

    def metrics(self, sums: TokenSums, cfg: GrpoConfig) -> dict[str, float]:
        """Keys of metrics.jsonl; {} without --distill-failures. sums: over all ranks."""
        if not cfg.distill_failures:
            return {}
        return {**self.figures, "distill/loss": sums.sums["distill_loss"] / cfg.updates_per_batch}


def teach_failures(now: Step, prompts: list[Prompt], groups: list[ScoredGroup]) -> Taught:
    """What the teacher makes of each wrong response. groups: of all ranks; without --distill-failures they come back as
    they are. prompts: all of the run. Collective.

    Raises UserError when the reward does not say which responses are right.
    """
    cfg = now.cfg
    if not cfg.distill_failures:
        return Taught(groups=groups, figures={})
    lessons, too_long = lessons_of(groups, prompts, now.policy.chat, cfg)
    answers = teacher_logprobs(lessons, now.policy, cfg, now.world)
    weight = weight_of(cfg, now.step)
    taught = list(groups)
    if lessons:  # all groups have the numbers, or none has: they are packed together
        taught = [replace(group, tokens={**group.tokens, **untaught(group)}) for group in groups]
    differences = []
    for lesson, of_lesson in zip(lessons, answers, strict=True):
        group = taught[lesson.group] = with_lesson(taught[lesson.group], lesson, of_lesson, weight)
        differences += [
            torch.tensor(group.rollouts[i].sampler_logprobs, dtype=torch.float64) - own.double()
            for i, own in zip(lesson.wrong, of_lesson, strict=True)
        ]
    figures = {
        "distill/weight": weight,
        "distill/responses": len(differences) / sum(len(group.rollouts) for group in groups),
        "distill/too_long": too_long / max(too_long + len(differences), 1),
        # k1, whose mean over the policy's own samples is the KL
        "distill/kl": torch.cat(differences).mean().item() if differences else 0.0,
    }
    return Taught(groups=taught, figures=figures)


def weight_of(cfg: GrpoConfig, step: int) -> float:
    """The weight of the term in a step (from 0), by --distill-schedule.

    >>> cfg = GrpoConfig(distill_failures=0.5, distill_schedule="linear", steps=4)
    >>> [weight_of(cfg, step) for step in range(4)]
    [0.5, 0.375, 0.25, 0.125]
    """
    left = 1 - step / cfg.steps if cfg.distill_schedule == "linear" else 1.0
    return cfg.distill_failures * left


def lessons_of(
    groups: list[ScoredGroup], prompts: list[Prompt], chat: ChatFormat, cfg: GrpoConfig
) -> tuple[list[Lesson], int]:
    """(the lessons of a step, wrong responses left without one because they would be too long with the teacher's prompt).

    Too long: more than --max-prompt-tokens + --max-response-tokens in all, the longest text that the run has anyway.
    """
    # by the prompt, not the puzzle's id, which puzzles of two builds can share
    # of the step's puzzles alone: a tuple of each prompt of the run would take seconds
    asked = {group.rollouts[0].puzzle_id for group in groups}
    puzzles = {tuple(prompt.ids): prompt.puzzle for prompt in prompts if prompt.puzzle.id in asked}
    lessons, too_long = [], 0
    for place, group in enumerate(groups):
        scored = [i for i, row in enumerate(group.rows) if row["reward"] is not None]
        right = [i for i in scored if is_right(group.rows[i], cfg)]
        wrong = [i for i in scored if i not in right]
        if not right or not wrong:
            continue
        puzzle = puzzles[tuple(group.rollouts[0].prompt_ids)]
        shown = chat.prompt_ids(showing_an_answer(puzzle.chat(), group.rows[right[0]]["completion"]))
        room = cfg.max_prompt_tokens + cfg.max_response_tokens - len(shown)
        fitting = [i for i in wrong if len(group.rollouts[i].response_ids) <= room]
        too_long += len(wrong) - len(fitting)
        if fitting:
            responses = [group.rollouts[i] for i in fitting]
            lessons.append(Lesson(group=place, sibling=right[0], wrong=fitting, prompt_ids=shown, responses=responses))
    return lessons, too_long


def is_right(row: dict, cfg: GrpoConfig) -> bool:
    """row: of rollouts.jsonl, of a response that was scored."""
    if PART not in row["parts"]:
        raise UserError(
            f"--distill-failures {cfg.distill_failures}: --reward {cfg.reward} does not say which responses are right; return "
            f"a Reward with a part {PART!r}, 1 where the response is right (reward/README.md), or leave the option out"
        )
    return row["parts"][PART] == 1


@torch.no_grad()
def teacher_logprobs(lessons: list[Lesson], policy: Policy, cfg: GrpoConfig, world: World) -> list[list[Tensor]]:
    """Per lesson and response, the log-prob of each token under the policy that sees the right sibling. Collective.

    lessons: of all ranks, the same on every rank. They are dealt to the ranks by what they cost; all ranks get all numbers.
    """
    groups = [
        ScoredGroup(
            rollouts=[replace(response, prompt_ids=lesson.prompt_ids) for response in lesson.responses],
            rows=[],
            advantages=torch.zeros(len(lesson.wrong)),
            trained=torch.ones(len(lesson.wrong), dtype=torch.bool),
        )
        for lesson in lessons
    ]
    ours = balance([policy.cost.of(*group.size) for group in groups], world.size)[world.rank]
    sharing = cfg.packing == "shared" and not policy.cannot_share
    plan: list[MicroBatch] = []
    if ours:  # there may be fewer lessons than ranks
        plan = micro_batches([groups[i] for i in ours], cfg.micro_tokens, world.device, sharing)
    if policy.sharded:  # a layer's weights can only be gathered by all ranks together
        plan += [filler(world.device)] * (int(world.largest(len(plan))) - len(plan))
    of_row = {}
    for micro in world.paced(plan):
        values, kept = policy.response_logprobs(micro.packed, cfg.temperature).cpu(), micro.packed.mask.cpu()
        for row, numbers, own in zip(micro.rows, values, kept, strict=False):  # a filler has a row that is nobody's
            of_row[row] = numbers[own]
    rows = iter(range(len(of_row)))
    found = [[place, [of_row[next(rows)] for _ in groups[place].rollouts]] for place in ours]
    answers = dict(world.gather(found))
    return [answers[place] for place in range(len(lessons))]


def untaught(group: ScoredGroup) -> dict[str, list[Tensor]]:
    """The numbers of responses without a teacher, as ScoredGroup.tokens has them: weight 0."""
    zeros = [torch.zeros(len(rollout.response_ids)) for rollout in group.rollouts]
    return {"teacher_logprobs": zeros, "teacher_weight": zeros}


def with_lesson(group: ScoredGroup, lesson: Lesson, answers: list[Tensor], weight: float) -> ScoredGroup:
    """The group with the teacher's numbers, and in its rows of rollouts.jsonl which response taught."""
    logprobs, weights = (list(group.tokens[name]) for name in ("teacher_logprobs", "teacher_weight"))
    rows = list(group.rows)
    for i, own in zip(lesson.wrong, answers, strict=True):
        logprobs[i], weights[i] = own, torch.full_like(own, weight)
        rows[i] = {**rows[i], "taught_by": rows[lesson.sibling]["response"]}
    tokens = {**group.tokens, "teacher_logprobs": logprobs, "teacher_weight": weights}
    return replace(group, rows=rows, tokens=tokens)


def with_distillation(terms: LossTerms, micro: MicroBatch) -> LossTerms:
    """The terms of a micro-batch with that of the teacher; as they are in a step without a lesson."""
    if micro.teacher_logprobs is None:
        return terms
    taught = terms.mask & (micro.teacher_weight > 0)
    # elsewhere the policy's own number stands for the teacher's: a difference, and a gradient, of exactly 0
    teacher = torch.where(taught, micro.teacher_logprobs, terms.logprobs.detach())
    weight = torch.where(taught, micro.teacher_weight, torch.zeros_like(teacher))
    return replace(terms, distillation=weight * kl_estimate(terms.logprobs, teacher, "k2"))
