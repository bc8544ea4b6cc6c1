"""Run by test_layout.py under torchrun: loss and gradient of random steps in every layout, in float64 over gloo.

torchrun --nproc-per-node W tests/helpers/layouts.py CHECKPOINT OUT.safetensors
"""

import itertools
import random
import sys
from contextlib import nullcontext
from dataclasses import replace

import torch
from safetensors.torch import save_file
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from rollout import Rollout
from trainer.config import GrpoConfig, OnlineConfig
from trainer.grpo import loss_terms, reference_logprobs
from trainer.metrics import TokenSums
from trainer.packing import ScoredGroup, count_trained, micro_batches, scored_groups
from trainer.policy import Policy
from trainer.ppo.critic import Critic, ValueSums
from trainer.ppo.settings import PpoConfig
from trainer.prompts.failures import Lesson, teacher_logprobs, untaught, with_lesson
from trainer.ranks.world import join_world, leave_world

OBJECTIVES = {
    "on-policy": {"beta": 0.04},  # old = stop_gradient(new), references from the model itself
    "paper": {"beta": 0.04},
    "verl": {"aggregation": "token-mean", "dual_clip": 1.5, "clip_high": 0.28, "correction": "tis"},
    "gspo": {"aggregation": "seq-mean-token-sum", "ratio_level": "sequence", "beta": 0.0},
    "dr_grpo": {
        "aggregation": "seq-mean-token-sum-norm",
        "correction": "seq-mis",
        "correction_cap": 3.0,
        "kl_kind": "k3",
    },
    "cispo": {"aggregation": "token-mean", "surrogate": "cispo", "clip_low": 0.5, "clip_high": 0.5, "beta": 0.0},
    "distill": {"beta": 0.04, "distill_failures": 0.5},  # the teacher's pass is made in the layout too
    "ppo": {"kl_in": "loss", "beta": 0.04},  # an advantage per token
    "value": {},  # PPO's critic, on the policy's base model
}
PPO = ("ppo", "value")
PER_TOKEN = ("advantages", "old_values", "returns")
LAYOUTS = tuple(itertools.product(("plain", "shared"), (1, 60, 100_000), (False, True)))
"""(packing, token budget of a micro-batch, shuffled): budget 1 is one response per micro-batch."""
SOME_LAYOUTS = (("plain", 1, False), ("plain", 60, True), ("shared", 60, False), ("shared", 100_000, True))
N_GROUPS, G = 6, 3
LESSONS = range(4)
"""Groups of the step that have a right response, in "distill"."""


def layouts_of(objective: str) -> tuple:
    """Every layout for the paper's objective, some for the others."""
    return LAYOUTS if objective == "paper" else SOME_LAYOUTS


def float64_policy(checkpoint: str) -> Policy:
    policy = Policy(checkpoint, lora_rank=4, lora_alpha=8, seed=0, device=torch.device("cpu"), dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    for p in policy.trainable().values():  # lora_B starts at 0, and then lora_A has no gradient
        p.data += 0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    for module in policy.model.modules():
        if isinstance(module, Qwen2RMSNorm):  # transformers rounds to float32 inside; a float64 check must not
            module.forward = lambda x, m=module: (
                m.weight * x * torch.rsqrt(x.square().mean(-1, True) + m.variance_epsilon)
            )
    return policy


def random_step(seed: int) -> list[dict]:
    """Groups of responses of 1 to 12 tokens with advantages; some responses, and one whole group, are not trained."""
    rng = random.Random(seed)
    groups = []
    for g in range(N_GROUPS):
        prompt = [rng.randrange(5, 200) for _ in range(rng.randint(1, 20))]
        rows = []
        for i in range(G):
            n = rng.randint(1, 12)
            row = {name: [rng.gauss(-5.0, 0.6) for _ in range(n)] for name in ("sampler", "old", "ref")}
            # of PPO; a generator of its own leaves the numbers above as they are
            more = random.Random(f"{seed}/{g}/{i}")
            row |= {name: [more.gauss(0, 1) for _ in range(n)] for name in ("advantages", "old_values", "returns")}
            ids = [rng.randrange(5, 200) for _ in range(n)]
            rollout = Rollout(
                puzzle_id=f"{g}",
                prompt_ids=prompt,
                response_ids=ids,
                sampler_logprobs=row["sampler"],
                finish_reason="stop",
                adapter_version=0,
                adapter_hash="",
            )
            trained = g != 2 and not (g == 4 and i % 2)
            rows.append({**row, "rollout": rollout, "advantage": rng.gauss(0, 1), "trained": trained})
        groups.append(rows)
    return groups


def lessons_in(step: list[list[dict]]) -> list[Lesson]:
    """Of groups 0 to 3 the last two responses are wrong, and the teacher's prompt is longer than the group's own."""
    return [
        Lesson(
            group=g,
            sibling=0,
            wrong=[1, 2],
            prompt_ids=[*step[g][0]["rollout"].prompt_ids, *range(30, 30 + 5 * g), 7],
            responses=[row["rollout"] for row in step[g][1:]],
        )
        for g in LESSONS
    ]


def taught(group: ScoredGroup, rows: list[dict], g: int, answers: dict[int, list[torch.Tensor]]) -> ScoredGroup:
    """The group with the teacher's numbers. rows: of the step, in its own order, which a shuffle changes in `group`."""
    group = replace(group, tokens=untaught(group))
    if g not in answers:
        return group
    places = [next(i for i, r in enumerate(group.rollouts) if r is row["rollout"]) for row in rows]
    lesson = Lesson(group=g, sibling=places[0], wrong=places[1:], prompt_ids=[], responses=[])
    named = replace(group, rows=[{**row, "response": i} for i, row in enumerate(group.rows)])
    return with_lesson(named, lesson, answers[g], 0.5)


def config_of(name: str) -> OnlineConfig:
    kind = PpoConfig if name in PPO else GrpoConfig
    return kind(group_size=G, max_response_tokens=16, **OBJECTIVES[name])


def float64_critic(policy: Policy) -> Critic:
    critic = Critic(policy, config_of("value"))
    generator = torch.Generator().manual_seed(4)
    for p in critic.parameters.values():  # the head starts at 0, and then the adapter has no gradient
        p.data += 0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return critic


def loss_and_gradient(
    policy, critic, world, step, name, packing, budget, shuffled
) -> tuple[torch.Tensor, torch.Tensor]:
    rng = random.Random(f"{budget}{packing}")
    order = list(range(N_GROUPS))
    if shuffled:
        rng.shuffle(order)
    mine = [step[g] if not shuffled else rng.sample(step[g], G) for g in order][world.rank :: world.size]
    cfg = config_of(name)
    rows = [row for group in mine for row in group]
    rollouts = [[row["rollout"] for row in group] for group in mine]
    advantages = torch.tensor([row["advantage"] for row in rows], dtype=torch.float64)
    trained = torch.tensor([row["trained"] for row in rows])
    scored = scored_groups(rollouts, rows, advantages, trained)
    if name in PPO:
        tokens = [
            {key: [torch.tensor(row[key], dtype=torch.float64) for row in group] for key in PER_TOKEN} for group in mine
        ]
        scored = [replace(group, tokens=numbers) for group, numbers in zip(scored, tokens, strict=True)]
    if name == "distill":
        cfg = replace(cfg, packing=packing, micro_tokens=max(budget, 1))
        answers = dict(zip(LESSONS, teacher_logprobs(lessons_in(step), policy, cfg, world), strict=True))
        places = order[world.rank :: world.size]
        scored = [taught(group, step[g], g, answers) for group, g in zip(scored, places, strict=True)]
    plan = micro_batches(scored, budget, world.device, packing == "shared")

    def recorded(name: str) -> list[torch.Tensor]:
        flat = [[value for row in micro.rows for value in rows[row][name]] for micro in plan]
        return [m.packed.unpack(torch.tensor(v, dtype=torch.float64)) for m, v in zip(plan, flat, strict=True)]

    if name in ("on-policy", "distill"):
        references, olds = [reference_logprobs(policy, micro, cfg) for micro in plan], [None] * len(plan)
    else:
        references, olds = recorded("ref") if cfg.beta else [None] * len(plan), recorded("old")
    of_critic = name == "value"
    parameters = list((critic.parameters if of_critic else policy.trainable()).values())
    for p in parameters:
        p.grad = None
    sums, denominators = (ValueSums if of_critic else TokenSums)(), count_trained(plan, world)
    for micro, reference, old in zip(plan, references, olds, strict=True):
        complete = replace(micro, ref_logprobs=reference, old_logprobs=old)
        with critic.active() if of_critic else nullcontext():
            terms = critic.terms(micro, denominators) if of_critic else loss_terms(policy, complete, denominators, cfg)
            terms.loss.backward()
        sums.add(terms, terms.loss)
    sums.read()
    world.sum_gradients(parameters)
    return torch.tensor(world.total(sums.sums["loss"]), dtype=torch.float64), torch.cat(
        [p.grad.flatten() for p in parameters]
    )


def main(checkpoint: str, out: str) -> None:
    world = join_world()
    policy = float64_policy(checkpoint)
    critic = float64_critic(policy)
    results = {}
    for name in OBJECTIVES:
        for packing, budget, shuffled in layouts_of(name):
            loss, gradient = loss_and_gradient(policy, critic, world, random_step(0), name, packing, budget, shuffled)
            key = f"{name}/{packing}/{budget}/{shuffled}"
            results |= {f"{key}/loss": loss, f"{key}/gradient": gradient}
    if world.is_main:
        save_file(results, out)
    leave_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
