"""Micro-batches and shared-prefix packing: the G responses of a prompt share one copy of the prompt in the training forward.

A micro-batch is one row of tokens: group after group, each `prompt, response 1, ..., response G`. A response attends to
its prompt and to itself only, and its positions continue from the prompt, so the numbers are those of one row per response.

Legend: L packed tokens, M response tokens, N rows (responses), T longest response.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from rollout import Rollout

ATTENTION = "shared_prefix"

Group = tuple[list[int], list[list[int]]]
"""(prompt token ids, the responses' token ids)"""


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch. Example: the group ([5, 6], [[7], [8, 9]]) packs to input_ids [[5, 6, 7, 8, 9]],
    position_ids [[0, 1, 2, 2, 3]], predict_at [1, 1, 3], targets [7, 8, 9], rows [0, 1, 1], cols [0, 0, 1]."""

    input_ids: Tensor
    """[1,L]"""
    position_ids: Tensor
    """[1,L]"""
    layout: tuple[tuple[int, int, tuple[int, ...]], ...]
    """Per group: (first token, prompt length, response lengths)."""
    predict_at: Tensor
    """[M] the packed position whose hidden state predicts each response token."""
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
    """Pack groups into one micro-batch. Every prompt and response must have at least one token."""
    ids, positions, layout, predict_at, targets, rows, cols, lengths = [], [], [], [], [], [], [], []
    for prompt, responses in groups:
        assert prompt and all(responses), "an empty prompt or response has nothing to predict from"
        layout.append((len(ids), len(prompt), tuple(map(len, responses))))
        last_prompt_token = len(ids) + len(prompt) - 1
        ids += prompt
        positions += range(len(prompt))
        for response in responses:
            predict_at += [last_prompt_token, *range(len(ids), len(ids) + len(response) - 1)]
            targets += response
            rows += [len(lengths)] * len(response)
            cols += range(len(response))
            positions += range(len(prompt), len(prompt) + len(response))
            ids += response
            lengths.append(len(response))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    as_long = [torch.tensor(x, dtype=torch.long, device=device) for x in (predict_at, targets, rows, cols)]
    return PackedBatch(
        input_ids=torch.tensor([ids], device=device), position_ids=torch.tensor([positions], device=device),
        layout=tuple(layout), predict_at=as_long[0], targets=as_long[1], rows=as_long[2], cols=as_long[3],
        mask=mask.to(device),
    )  # fmt: skip


def split_by_tokens(sizes: list[tuple[int, list[int]]], budget: int) -> list[list[tuple[int, list[int]]]]:
    """Micro-batches of at most `budget` packed tokens, in order.

    sizes: per group (prompt length, response lengths). Returns lists of (group index, response indices). A group too
    large for the budget is cut between responses, its prompt repeated; a single response is never cut.
    """
    batches: list[list[tuple[int, list[int]]]] = [[]]
    used = 0
    for group, (prompt, responses) in enumerate(sizes):
        fits = used + prompt + sum(responses) <= budget
        if not fits and used > 0:
            batches.append([])
            used = 0
        members: list[int] = []
        used += prompt
        for index, length in enumerate(responses):
            if members and used + length > budget:
                batches[-1].append((group, members))
                batches.append([])
                members, used = [], prompt
            members.append(index)
            used += length
        batches[-1].append((group, members))
    return [batch for batch in batches if batch]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward and backward pass sees. N rows, T tokens of its longest response."""

    groups: list[Group]
    """Prompts and the responses to each, as they were packed."""
    rows: list[int]
    """[N] place of each row among the rows handed to micro_batches."""
    packed: PackedBatch
    mask: Tensor
    """[N,T] bool, True = trained; all False for a row that is left out of the update."""
    advantages: Tensor
    """[N]"""
    sampler_logprobs: Tensor
    """[N,T], 0 where there is no token."""


def micro_batches(
    groups: list[list[Rollout]], advantages: Tensor, trained: Tensor, budget: int, device: torch.device,
    share_prompts: bool = True,
) -> list[MicroBatch]:  # fmt: skip
    """Pack groups of rollouts into micro-batches of at most `budget` tokens.

    advantages, trained (bool): one per rollout, group after group. share_prompts False gives every response a copy of its
    prompt: the same numbers at more cost, for comparison.
    """
    row_of = list(_numbered(groups))
    if not share_prompts:
        groups, row_of = [[r] for group in groups for r in group], [[row] for rows in row_of for row in rows]
    sizes = [(len(group[0].prompt_ids), [len(r.response_ids) for r in group]) for group in groups]
    result = []
    for plan in split_by_tokens(sizes, budget):
        rows = [row_of[g][i] for g, indices in plan for i in indices]
        packing = [(groups[g][0].prompt_ids, [groups[g][i].response_ids for i in indices]) for g, indices in plan]
        sampled = [value for g, indices in plan for i in indices for value in groups[g][i].sampler_logprobs]
        result.append(make_micro_batch(packing, rows, advantages[rows], trained[rows], sampled, device))
    return result


def make_micro_batch(
    groups: list[Group], rows: list[int], advantages: Tensor, trained: Tensor, sampler_logprobs: Any, device: torch.device
) -> MicroBatch:  # fmt: skip
    """advantages, trained: [N]; sampler_logprobs: one number per response token, row after row."""
    packed = pack(groups, device)
    return MicroBatch(
        groups=groups, rows=rows, packed=packed, mask=packed.mask & trained.to(device)[:, None],
        advantages=advantages.to(device),
        sampler_logprobs=packed.unpack(torch.as_tensor(sampler_logprobs, dtype=advantages.dtype, device=device)),
    )  # fmt: skip


def _numbered(groups: list[list[Rollout]]) -> Iterator[list[int]]:
    """Row numbers of each group's rollouts: [[0, 1], [2, 3, 4], ...]."""
    first = 0
    for group in groups:
        yield list(range(first, first + len(group)))
        first += len(group)


def _shared_prefix_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout=None, **kwargs
):
    """transformers' attention signature: query [1,Hq,L,D], key and value [1,Hkv,L,D] -> ([1,L,Hq,D], None)."""
    assert layout is not None and query.shape[0] == 1, "shared_prefix attention serves packed batches only"
    pieces = [
        piece
        for start, prompt, lengths in layout
        for piece in _attend_group(query, key, value, start, prompt, lengths, scaling)
    ]  # fmt: skip
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _attend_group(query, key, value, start, prompt, lengths, scaling) -> list[Tensor]:
    """Outputs [1,Hq,*,D] of one group: the prompt, then the responses."""
    if len(lengths) == 1:  # nothing is shared: an ordinary causal row
        row = slice(start, start + prompt + lengths[0])
        q, k, v = query[:, :, row], key[:, :, row], value[:, :, row]
        return [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)]
    inside = slice(start, start + prompt)
    prompt_key, prompt_value = key[:, :, inside], value[:, :, inside]
    on_prompt = F.scaled_dot_product_attention(
        query[:, :, inside], prompt_key, prompt_value, is_causal=True, scale=scaling, enable_gqa=True
    )
    # responses side by side as a batch, padded on the right: padding is causally after every real query
    own_q, own_k, own_v = (_side_by_side(x, start + prompt, lengths) for x in (query, key, value))  # [G,H,R,D]
    n, longest = len(lengths), max(lengths)
    keys = torch.cat([prompt_key.expand(n, -1, -1, -1), own_k], dim=2)
    values = torch.cat([prompt_value.expand(n, -1, -1, -1), own_v], dim=2)
    visible = torch.ones(longest, prompt + longest, dtype=torch.bool, device=query.device).tril(prompt)
    out = F.scaled_dot_product_attention(own_q, keys, values, attn_mask=visible, scale=scaling, enable_gqa=True)
    return [on_prompt, *(out[i : i + 1, :, :length] for i, length in enumerate(lengths))]


def _side_by_side(x: Tensor, start: int, lengths: tuple[int, ...]) -> Tensor:
    """[1,H,L,D] -> [G,H,R,D]: the responses that begin at `start`, padded with zeros to the longest."""
    parts = x[:, :, start : start + sum(lengths)].split(lengths, dim=2)
    return torch.cat([F.pad(part, (0, 0, 0, max(lengths) - part.shape[2])) for part in parts])


AttentionInterface.register(ATTENTION, _shared_prefix_attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)  # no [L,L] mask is ever built
