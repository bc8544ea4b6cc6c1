"""The cost of a teacher: tokens, money, and a budget that is never exceeded.

Prices are in currency units per million tokens. Three amounts are counted separately: `spent`, the cost of completions
by their token counts; `lost`, the possible cost of tries that returned nothing (time-out, incomplete body, kill);
`reserved`, the largest possible cost of the requests in flight. A request is sent only when their sum and its own
largest possible cost stay within the budget.
"""

from dataclasses import dataclass

TEMPLATE_TOKENS = 64
"""Upper bound on the tokens that a chat template adds to a chat."""


@dataclass(kw_only=True)
class Meter:
    """Counts tokens and money. It changes in place: one teacher and one raw file share it."""

    price_in: float = 0.0
    """Per million prompt tokens."""
    price_out: float = 0.0
    """Per million completion tokens, reasoning included."""
    budget: float | None = None
    """None: no limit."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    spent: float = 0.0
    """Cost of all completions."""
    uncounted: int = 0
    """Completions without token counts. Each is in `spent` with its largest possible cost."""
    lost: float = 0.0
    """Upper bound on the cost of tries that returned nothing."""
    reserved: float = 0.0
    """Upper bound on the cost of the requests in flight."""

    @property
    def priced(self) -> bool:
        return self.price_in > 0 or self.price_out > 0

    def worst_cost(self, chat: list[dict[str, str]], max_tokens: int) -> float:
        """The largest possible cost of a request."""
        # a byte-level tokenizer never makes more tokens than there are bytes
        prompt = sum(len(turn["content"].encode()) for turn in chat) + TEMPLATE_TOKENS
        return self.cost(prompt, max_tokens)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The cost of a completion with these token counts."""
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6

    def fits(self, worst: float) -> bool:
        """Whether a request with this largest possible cost may be sent now."""
        return self.budget is None or self.spent + self.lost + self.reserved + worst <= self.budget

    def count(self, prompt_tokens: int | None, completion_tokens: int | None, worst: float) -> None:
        """Count a completion. worst: its largest possible cost, which is used when it has no token counts."""
        self.prompt_tokens += prompt_tokens or 0
        self.completion_tokens += completion_tokens or 0
        known = prompt_tokens is not None and completion_tokens is not None
        self.uncounted += not known and worst > 0
        self.spent += self.cost(prompt_tokens, completion_tokens) if known else worst
