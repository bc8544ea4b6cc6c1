"""Micro-batches and shared-prefix packing: the G responses of a prompt share one copy of the prompt in the training forward.

A micro-batch is one long row of tokens: group after group, each `prompt, response 1, ..., response G`. A response attends
to its prompt and to itself only, and its positions continue from the prompt. Its log-probs are therefore those of a row of
its own, while the prompt is computed once instead of G times.

Axes: L packed tokens, M response tokens (all responses side by side), N rows (one per response), T tokens of the longest
response. [M] values become [N,T] with PackedBatch.unpack.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rollout import Rollout
from trainer.model.attention import Layout, Segments
from trainer.model.cost import Cost
from trainer.ranks.world import World, travels

Group = tuple[list[int], list[list[int]]]
"""(prompt token ids, the responses' token ids)"""


def make_layout(sizes: list[tuple[int, list[int]]], device: torch.device | str) -> Layout:
    """Which tokens of a packed row attend to which. sizes: per group (prompt length, response lengths), in packed order.

    A prompt with one response is one causal segment. A prompt with several is a segment of its own, as is each response;
    a second attention call lets those responses see all of their prompt.
    """
    own, responses, prompts, at = [], [], [], 0  # at: packed position of the next token
    for prompt, lengths in sizes:
        if len(lengths) > 1:
            responses.append((at + prompt, sum(lengths)))  # side by side, so one span
            prompts.append((at, prompt))
        # a single response can stand in one causal segment with its prompt: one kernel call less, the same numbers
        for length in [prompt, *lengths] if len(lengths) > 1 else [prompt + lengths[0]]:
            own.append((at, length))
            at += length
    device = torch.device(device)
    shared = Segments(tuple(responses), tuple(prompts), causal=False, device=device) if prompts else None
    return Layout(Segments(tuple(own), tuple(own), causal=True, device=device), shared)


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """The tokens of one forward pass.

    >>> batch = pack([([5, 6], [[7], [8, 9]])])  # one prompt of two tokens, two responses
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([[5, 6, 7, 8, 9]], [[0, 1, 2, 2, 3]])
    >>> batch.targets.tolist(), batch.predict_at.tolist()  # 7 and 8 are both predicted by the prompt's last token
    ([7, 8, 9], [1, 1, 3])
    >>> batch.unpack(batch.targets).tolist()
    [[7, 0], [8, 9]]
    """

    input_ids: Tensor
    """[1,L]"""
    position_ids: Tensor
    """[1,L]"""
    layout: Layout
    """Who attends to whom."""
    predict_at: Tensor
    """[M] packed position of the token before each response token: its hidden state predicts that token."""
    targets: Tensor
    """[M] response tokens."""
    rows: Tensor
    """[M] row of each response token."""
    cols: Tensor
    """[M] its place in the response."""
    mask: Tensor
    """[N,T] bool, True where a row has a token."""

    def unpack(self, values: Tensor) -> Tensor:
        """[M] per-token values -> [N,T], 0 where there is no token. Differentiable."""
        return values.new_zeros(self.mask.shape).index_put((self.rows, self.cols), values)


def pack(groups: Iterable[Group], device: torch.device | str = "cpu") -> PackedBatch:
    """Pack groups into one row. Every prompt and every response must have at least one token."""
    ids, positions, sizes, predict_at, targets, rows, cols, lengths = [], [], [], [], [], [], [], []
    for prompt, responses in groups:
        assert prompt and all(responses), "an empty prompt or response has nothing to predict from"
        sizes.append((len(prompt), [len(response) for response in responses]))
        last_prompt_token = len(ids) + len(prompt) - 1
        ids += prompt
        positions += range(len(prompt))
        for response in responses:
            # a token is predicted by the one before it: the first of every response by the prompt's last token
            predict_at += [last_prompt_token, *range(len(ids), len(ids) + len(response) - 1)]
            targets += response
            rows += [len(lengths)] * len(response)
            cols += range(len(response))
            positions += range(len(prompt), len(prompt) + len(response))  # each response continues from the prompt
            ids += response
            lengths.append(len(response))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # [N,T]
    as_long = [torch.tensor(x, dtype=torch.long, device=device) for x in (predict_at, targets, rows, cols)]
    return PackedBatch(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        layout=make_layout(sizes, device),
        predict_at=as_long[0],
        targets=as_long[1],
        rows=as_long[2],
        cols=as_long[3],
        mask=mask.to(device),
    )


Sizes = list[tuple[int, list[int]]]
"""Per group (prompt length, response lengths)."""


def balance(costs: list[float], ranks: int) -> list[list[int]]:
    """Deal items to ranks so that the slowest rank costs little more than the mean. Returns item numbers per rank, in order.

    Longest processing time first: the most expensive item goes first, each to the rank with the smallest load so far. With
    at least as many items as ranks, every rank gets one.
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    # ties are broken by number, so that every rank computes the same deal without talking to the others
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))  # a tie goes to the lower rank
        loads[rank] += costs[item]
        dealt[rank].append(item)
    return [sorted(items) for items in dealt]


def split_by_tokens(sizes: Sizes, budget: int) -> list[list[tuple[int, list[int]]]]:
    """Micro-batches of at most `budget` packed tokens: in order, or largest first where that needs fewer.

    Returns lists of (group index, response indices). A group too large for the budget is cut between responses, its prompt
    repeated; a single response is never cut.
    """
    pieces = [
        (prompt + sum(responses[i] for i in members), (group, members))
        for group, (prompt, responses) in enumerate(sizes)
        for members in _cut(responses, budget - prompt)  # if that is below 0, one response per run
    ]
    in_order: list[tuple[int, list]] = []
    largest_first: list[tuple[int, list]] = []
    for size, piece in pieces:
        _place(size, piece, in_order, len(in_order) - 1, budget)  # next fit: only the last batch is open
    for size, piece in sorted(pieces, key=lambda sized: (-sized[0], sized[1])):
        _place(size, piece, largest_first, 0, budget)  # first fit, decreasing
    fewer = largest_first if len(largest_first) < len(in_order) else in_order
    return [sorted(batch) for _, batch in fewer]  # in order of groups again


def _cut(lengths: list[int], room: int) -> list[list[int]]:
    """A group's responses in runs of at most `room` tokens."""
    runs: list[list[int]] = []
    used = room  # full: the first response opens a run, even one that is longer than the room
    for index, length in enumerate(lengths):
        if not runs or used + length > room:
            runs.append([])
            used = 0
        runs[-1].append(index)
        used += length
    return runs


def _place(size: int, piece: tuple[int, list[int]], batches: list[tuple[int, list]], first: int, budget: int) -> None:
    """Put a piece into the first batch from number `first` on that has room, or into a new one."""
    for number in range(max(first, 0), len(batches)):
        used, inside = batches[number]
        if used + size <= budget:
            batches[number] = (used + size, [*inside, piece])
            return
    batches.append((size, [piece]))


class Denominators(NamedTuple):
    """What per-token losses are divided by.

    They are counted over ALL ranks and micro-batches of an optimizer step before its first backward pass. Dividing by a
    micro-batch's own counts instead would make the loss depend on how the batch was cut up.
    """

    n_rows: float  # float, as World.total gives it
    """Responses with at least one trained token."""
    n_tokens: float
    """Trained tokens."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """All that one forward and backward pass needs. N rows, T tokens of its longest response."""

    groups: list[Group]
    """Prompts and the responses to each, as they were packed."""
    rows: list[int]
    """[N] place of each row among the rows handed to micro_batches; empty for a filler."""
    packed: PackedBatch
    mask: Tensor
    """[N,T] bool, True = trained; all False for a row that is left out of the update, and in a filler."""
    trained: Denominators
    """Its share of the denominators: what `mask` counts, known without a read of the device."""
    advantages: Tensor
    """[N]; [N,T] in PPO"""
    sampler_logprobs: Tensor
    """[N,T] of the program that sampled (vLLM), 0 where there is no token."""
    ref_logprobs: Tensor | None = None
    """[N,T] of the reference policy (adapter off); None when beta is 0, and before they are computed."""
    old_logprobs: Tensor | None = None
    """[N,T] of the policy before the batch's first optimizer step; None when that is its only step (old = new)."""
    old_values: Tensor | None = None
    """[N,T] of the critic before the batch's first optimizer step (PPO only)."""
    returns: Tensor | None = None
    """[N,T] what the critic learns (PPO only)."""
    teacher_logprobs: Tensor | None = None
    """[N,T] of the policy that is shown a right answer (--distill-failures); None in a step without one."""
    teacher_weight: Tensor | None = None
    """[N,T] of the term that they make; 0 in responses without a teacher."""

    @property
    def is_filler(self) -> bool:
        """It holds no response: it only keeps a rank of a sharded model in step with the others."""
        return not self.rows


def count_trained(micros: list[MicroBatch], world: World) -> Denominators:
    """The denominators of an optimizer step. micros: this rank's. Collective."""
    return Denominators(*world.total(*(sum(count) for count in zip(*(micro.trained for micro in micros), strict=True))))


@travels
@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """A prompt's rollouts with their advantages, ready to train on. Ranks exchange these."""

    rollouts: list[Rollout]
    rows: list[dict]
    """Per rollout, its row of rollouts.jsonl."""
    advantages: Tensor
    """[G]"""
    trained: Tensor
    """[G] bool"""
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    """{field of MicroBatch: G tensors of a number per response token}: PPO's, with its advantages; a teacher's."""

    @property
    def size(self) -> tuple[int, list[int]]:
        """(prompt length, response lengths)"""
        return len(self.rollouts[0].prompt_ids), [len(r.response_ids) for r in self.rollouts]


def scored_groups(
    groups: list[list[Rollout]], rows: list[dict], advantages: Tensor, trained: Tensor
) -> list[ScoredGroup]:
    """rows, advantages, trained: one per rollout, group after group."""
    return [
        ScoredGroup(rollouts=group, rows=[rows[i] for i in at], advantages=advantages[at], trained=trained[at])
        for group, at in zip(groups, _numbered(groups), strict=True)
    ]


def micro_batches(
    scored: list[ScoredGroup],
    budget: int,
    device: torch.device,
    share_prompts: bool = True,
    in_step_with: World | None = None,
) -> list[MicroBatch]:
    """Pack groups into micro-batches of at most `budget` tokens.

    share_prompts False gives every response its own copy of the prompt: the same numbers at more cost.
    in_step_with: append fillers until every rank of this world has the same number of micro-batches (then collective). A
    model whose layers are sharded needs that: a layer's weights can only be gathered by all ranks together.
    """
    groups = [group.rollouts for group in scored]
    # rows are numbered over all groups of this rank, whatever order packing puts them in
    advantages, trained = (torch.cat(x) for x in zip(*((g.advantages, g.trained) for g in scored), strict=True))
    tokens = {name: [numbers for g in scored for numbers in g.tokens[name]] for name in scored[0].tokens}
    row_of = list(_numbered(groups))
    # one response per group: make_layout then gives it an ordinary causal segment
    if not share_prompts:
        groups, row_of = [[r] for group in groups for r in group], [[row] for rows in row_of for row in rows]
    sizes = [(len(group[0].prompt_ids), [len(r.response_ids) for r in group]) for group in groups]
    result = []
    for plan in split_by_tokens(sizes, budget):
        rows = [row_of[g][i] for g, indices in plan for i in indices]  # [N] in packed order
        packing = [(groups[g][0].prompt_ids, [groups[g][i].response_ids for i in indices]) for g, indices in plan]
        sampled = [value for g, indices in plan for i in indices for value in groups[g][i].sampler_logprobs]
        made = make_micro_batch(packing, rows, advantages[rows], trained[rows], sampled, device)
        # [M] side by side -> [N,T]
        known = {name: torch.cat([numbers[row] for row in rows]).to(device) for name, numbers in tokens.items()}
        result.append(replace(made, **{name: made.packed.unpack(numbers) for name, numbers in known.items()}))
    if in_step_with is not None:
        most = int(in_step_with.largest(len(result)))  # a sync point: every rank must come here
        result += [filler(device)] * (most - len(result))
    return result


def filler(device: torch.device) -> MicroBatch:
    """A micro-batch that trains on nothing: one token of which no position counts, so its loss and its gradient are 0."""
    nothing = torch.zeros(1, dtype=torch.bool)
    # token 0 exists in every vocabulary
    return make_micro_batch([([0], [[0]])], [], torch.zeros(1), nothing, [0.0], device)


def make_micro_batch(
    groups: list[Group],
    rows: list[int],
    advantages: Tensor,
    trained: Tensor,
    sampler_logprobs: Any,
    device: torch.device,
) -> MicroBatch:
    """advantages, trained: [N]; sampler_logprobs: one number per response token, row after row."""
    packed = pack(groups, device)
    responses = [response for _, responses in groups for response in responses]
    lengths = [len(response) for response, kept in zip(responses, trained.tolist(), strict=True) if kept]
    return MicroBatch(
        groups=groups,
        rows=rows,
        packed=packed,
        mask=packed.mask & trained.to(device)[:, None],  # a response is trained whole or not at all
        trained=Denominators(len(lengths), sum(lengths)),
        advantages=advantages.to(device),
        # in the advantages' dtype: float32 in training, float64 in the ledger
        sampler_logprobs=packed.unpack(torch.as_tensor(sampler_logprobs, dtype=advantages.dtype, device=device)),
    )


def packing_figures(
    plans: list[list[MicroBatch]], parts: list[list[ScoredGroup]], cost: Cost, budget: int, world: World
) -> dict[str, float]:
    """How much packing saved and how even the ranks are; keys of timing.jsonl. Collective.

    plans: this rank's micro-batches, per update. parts: the groups of all ranks, per update.
    """
    micros = [micro for plan in plans for micro in plan if not micro.is_filler]
    packed = sum(micro.packed.input_ids.numel() for micro in micros)
    load = sum(cost.of(len(prompt), list(map(len, responses))) for m in micros for prompt, responses in m.groups)
    all_packed, batches, all_load = world.total(packed, len(micros), load)
    sizes = [group.size for part in parts for group in part]
    return {
        # tokens with a copy of the prompt for every response / tokens packed; 1: nothing was shared
        "packing/sharing": sum(len(lengths) * prompt + sum(lengths) for prompt, lengths in sizes) / all_packed,
        "packing/fill": all_packed / (batches * budget),  # 1: every micro-batch is full
        "packing/balance": all_load / world.size / world.largest(load),  # mean load / largest load; 1: even
    }


def _numbered(groups: list[list[Rollout]]) -> Iterator[list[int]]:
    """Row numbers of each group's rollouts: [[0, 1], [2, 3, 4], ...]."""
    first = 0
    for group in groups:
        yield list(range(first, first + len(group)))
        first += len(group)
