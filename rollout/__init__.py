"""Sampling: the `Rollout` noun, the engine protocol, the vLLM and plain-torch engines, the LoRA sync."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample. Example: Sampling(n=8, max_tokens=192, temperature=1.0, top_p=1.0, seed=7)"""

    n: int
    """Responses per prompt (G)."""
    max_tokens: int
    """Longest response, its end-of-turn token included."""
    temperature: float
    """0 is greedy."""
    top_p: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response: token-in, token-out. Text is decoded for the reward and never encoded again."""

    puzzle_id: str
    prompt_ids: list[int]
    """[P] prompt tokens as they were sampled from."""
    response_ids: list[int]
    """[T] sampled tokens, the end-of-turn token included when it was reached."""
    sampler_logprobs: list[float]
    """[T] log-prob of each sampled token under the sampler, at its temperature."""
    finish_reason: str
    """"stop" (end of turn) or "length" (cut at max_tokens)."""
    adapter_version: int
    """Optimizer steps behind the sampler's adapter; 0 = none loaded yet."""
    adapter_hash: str
    """SHA-256 (16 hex digits) of the adapter the sampler held; "" = adapter off."""


class Engine(Protocol):
    """What a sampler does. One engine lives in every rank."""

    hash: str
    """SHA-256 (16 hex digits) of the adapter at hand; "" before the first."""

    def generate(self, puzzle_ids: list[str], prompts: list[list[int]], sampling: Sampling) -> list[list[Rollout]]:
        """Sample `sampling.n` responses per prompt; the outer list is in prompt order."""

    def load_adapter(
        self, tensors: dict[str, Tensor], manifest: "list[tuple[str, tuple, str, int]]", version: int
    ) -> None:
        """Replace the adapter by `tensors` (PEFT names), verified against the manifest of rollout/sync.py."""

    def prompt_logprobs(self, ids: list[int]) -> list[float]:
        """[T-1] log-probs of ids[1:], each given what stands before it, under the adapter at hand; nothing is sampled."""

    def close(self) -> None:
        """Free what the engine holds."""


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from the parts' text: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
