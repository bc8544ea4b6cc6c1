"""Sampling with the trainer's own model in plain PyTorch: slow, deterministic, and easy to step through.

Every response has its own random generator, so it does not depend on the other responses in the batch.
B: responses decoded together. L: tokens of the longest prompt. T: response tokens. V: vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from rollout import Finished, LocalEngine, Rollout, Sampling, stable_seed
from rollout.sync import Manifest, Parcel, manifest_hash


class TorchEngine(LocalEngine):
    """Samples from `model`, the policy in training (adapter on): `batch` responses at a time, with a KV cache."""

    def __init__(
        self,
        model: torch.nn.Module,
        decoding: Callable[[], AbstractContextManager],
        *,
        batch: int = 64,
        rank: int = 0,
        size: int = 1,
        adopt: Callable[[dict[str, Tensor]], None] | None = None,
        anyone: Callable[[bool], bool] = bool,
    ) -> None:
        """decoding(): a context in which `model` attends as an ordinary causal model (policy.decoding).

        adopt: loads an adapter into the model, if it is not the trainer's own. anyone(flag): True if the flag is True
        on any rank; the ranks of a sharded model must all decode until the last one is done.
        """
        super().__init__(rank, size)
        self.model, self.decoding, self.batch = model, decoding, batch
        self.adopt, self.anyone = adopt, anyone

    def load_adapter(self, parcel: Parcel, manifest: Manifest, version: int) -> None:
        """See LocalEngine. The trainer's own model already has these tensors; only their hash is recorded."""
        parcel.verify(manifest)
        if self.adopt is not None:
            self.adopt(parcel.tensors)  # in a sampler process: its model is a copy
        self.version, self.hash = version, manifest_hash(manifest)

    def generate(
        self,
        puzzle_ids: list[str],
        prompts: list[list[int]],
        sampling: Sampling,
        repeats: Sequence[int] = (),
        finished: Finished | None = None,
    ) -> list[list[Rollout]]:
        """See LocalEngine."""
        repeats = repeats or [0] * len(prompts)
        jobs = [(row, copy) for row in range(len(prompts)) for copy in range(sampling.n)]
        responses: list[tuple[list[int], list[float]]] = []
        for start in range(0, len(jobs), self.batch):
            chosen = jobs[start : start + self.batch]
            # all draws of a response are made beforehand: they do not depend on which other responses share the batch
            uniforms = [self._uniforms(sampling, puzzle_ids[row], copy, repeats[row]) for row, copy in chosen]
            responses += self._decode([prompts[row] for row, _ in chosen], torch.stack(uniforms), sampling)
        rollouts = [
            Rollout(
                puzzle_id=puzzle_ids[row],
                prompt_ids=prompts[row],
                response_ids=ids,
                sampler_logprobs=logprobs,
                finish_reason="stop" if ids[-1] in sampling.stop_ids else "length",
                adapter_version=self.version,
                adapter_hash=self.hash,
            )
            for (row, _), (ids, logprobs) in zip(jobs, responses, strict=True)
        ]
        groups = [rollouts[i : i + sampling.n] for i in range(0, len(rollouts), sampling.n)]
        for place, group in enumerate(groups):  # all at once: they are decoded side by side
            if finished is not None:
                finished(place, group)
        return groups

    @torch.no_grad()
    def prompt_logprobs(self, ids: list[int], adapter: bool = True) -> list[float]:
        """See LocalEngine."""
        tokens_1T = torch.tensor([ids], device=next(self.model.parameters()).device)
        with self.decoding(), nullcontext() if adapter else self.model.disable_adapter():
            logits_TV = self.model(input_ids=tokens_1T, use_cache=False).logits[0, :-1].float()
        return logits_TV.log_softmax(-1).gather(-1, tokens_1T[0, 1:, None])[:, 0].tolist()

    @staticmethod
    def _uniforms(sampling: Sampling, puzzle_id: str, copy: int, repeat: int) -> Tensor:
        """[max_tokens] float64 in [0, 1): one draw per token. A function of (seed, puzzle, copy, repeat) only."""
        again = (repeat,) if repeat else ()  # a puzzle that stands in the batch once is drawn as it always was
        generator = torch.Generator().manual_seed(stable_seed(sampling.seed, puzzle_id, copy, *again))
        return torch.rand(sampling.max_tokens, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def _decode(
        self, prompts: list[list[int]], uniforms_BT: Tensor, sampling: Sampling
    ) -> list[tuple[list[int], list[float]]]:
        """Per prompt (response ids, their log-probs), including the end of turn. uniforms_BT: one draw per token."""
        device = next(self.model.parameters()).device
        width = max(map(len, prompts))
        # padded on the left, so that the last position of every row predicts its next token
        tokens_BL = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        seen_BL = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # 0: padding
        stop_ids = torch.tensor(sampling.stop_ids, device=device)
        cache, done_B = None, torch.zeros(len(prompts), dtype=torch.bool, device=device)
        ids_TB, logprobs_TB = [], []
        with self.decoding():
            for step in range(sampling.max_tokens):
                # positions count real tokens only, as in training; after the first pass only the newest token is fed
                position_ids = (seen_BL.cumsum(-1) - 1).clamp(min=0)[:, -tokens_BL.shape[1] :]
                out = self.model(
                    input_ids=tokens_BL,
                    attention_mask=seen_BL,
                    position_ids=position_ids,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache = out.past_key_values
                logits_BV = out.logits[:, -1].float()
                choice_B, logprob_B = draw_token(
                    logits_BV, uniforms_BT[:, step].to(device), sampling.temperature, sampling.top_p
                )
                ids_TB.append(choice_B)
                logprobs_TB.append(logprob_B)
                done_B |= torch.isin(choice_B, stop_ids)
                # sync point of a sharded model: a rank that stopped alone would leave the others waiting for its layers
                if not self.anyone(not bool(done_B.all())):
                    break
                tokens_BL = choice_B[:, None]
                seen_BL = torch.cat([seen_BL, seen_BL.new_ones(len(prompts), 1)], dim=1)
        # finished rows were decoded on with the rest of the batch: cut each after its first end-of-turn token
        ids, logprobs = torch.stack(ids_TB, 1).tolist(), torch.stack(logprobs_TB, 1).tolist()
        lengths = [next((i for i, t in enumerate(row, 1) if t in sampling.stop_ids), len(row)) for row in ids]
        return [(row[:n], values[:n]) for row, values, n in zip(ids, logprobs, lengths, strict=True)]


def draw_token(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """(tokens [B], log-probs [B]), by inverting the cumulative distribution at `uniform_B`. Greedy at temperature 0.

    logits_BV: float32. uniform_B: float64 in [0, 1). The log-probs are over the whole vocabulary at
    `temperature`, also where top_p < 1: that is what the trainer computes.
    """
    if temperature == 0:
        logprobs_BV = logits_BV.log_softmax(-1)
        choice_B = logits_BV.argmax(-1)
        return choice_B, logprobs_BV.gather(-1, choice_B[:, None])[:, 0]
    logprobs_BV = (logits_BV / temperature).log_softmax(-1)
    kept_BV = logprobs_BV
    if top_p < 1:
        ordered, index = logprobs_BV.sort(-1, descending=True)
        beyond = ordered.exp().cumsum(-1) - ordered.exp() >= top_p  # the token that crosses top_p stays
        dropped = torch.zeros_like(beyond).scatter(-1, index, beyond)
        kept_BV = logprobs_BV.masked_fill(dropped, float("-inf")).log_softmax(-1)
    cumulative_BV = kept_BV.double().exp().cumsum(-1)  # float64: a float32 sum over V loses the rare tokens
    target_B = uniform_B * cumulative_BV[:, -1]  # the sum is 1 only up to rounding
    choice_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)
    return choice_B, logprobs_BV.gather(-1, choice_B[:, None])[:, 0]
