"""What a teacher costs: tokens, money, and a budget that is not passed.

Prices are in currency units per million tokens. Money is counted in three heaps: what completions cost by their own token
counts; what tries may have cost of which nothing came back (a time-out, a body cut short, a kill); and what the requests in
flight can cost at most. A request is sent when the three and its own worst case stay within the budget.
"""

from dataclasses import dataclass

TEMPLATE_TOKENS = 64
"""What a chat template may add to the tokens of a chat, at most."""


@dataclass(kw_only=True)
class Meter:
    price_in: float = 0.0
    """Per million prompt tokens."""
    price_out: float = 0.0
    """Per million completion tokens, reasoning included."""
    budget: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    spent: float = 0.0
    uncounted: int = 0
    """Completions that came without their token counts; `spent` holds the worst case of each."""
    lost: float = 0.0
    """At most what tries cost that brought nothing back."""
    reserved: float = 0.0
    """At most what the requests in flight will cost."""

    @property
    def priced(self) -> bool:
        return self.price_in > 0 or self.price_out > 0

    def worst_cost(self, chat: list[dict[str, str]], max_tokens: int) -> float:
        """The most a request can cost: no byte-level tokenizer makes more tokens than bytes."""
        prompt = sum(len(turn["content"].encode()) for turn in chat) + TEMPLATE_TOKENS
        return self.cost(prompt, max_tokens)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6

    def fits(self, worst: float) -> bool:
        """May a request of that worst case be sent now?"""
        return self.budget is None or self.spent + self.lost + self.reserved + worst <= self.budget

    def count(self, prompt_tokens: int | None, completion_tokens: int | None, worst: float) -> None:
        """Count a completion; one that came without its token counts cost its worst case."""
        self.prompt_tokens += prompt_tokens or 0
        self.completion_tokens += completion_tokens or 0
        known = prompt_tokens is not None and completion_tokens is not None
        self.uncounted += not known and worst > 0
        self.spent += self.cost(prompt_tokens, completion_tokens) if known else worst
