"""The judge of distilled traces: a reward and a threshold accept a trace, or it is rejected with a reason."""

from collections.abc import Iterator
from contextlib import contextmanager

from data.distill.distill import Completion, Verdict
from data.distill.hints import find_leak
from data.errors import RunError, UserError
from data.puzzles import Puzzle
from reward import Reward, Status, load_reward
from reward.cellpuzzles import cells_right, parse_response
from reward.scoring import Scorer

REASONS = {
    "endpoint_error": "no response arrived",
    "truncated": "cut at the length limit, whatever it contains",
    "invalid_format": "not <think>...</think> then <answer>...</answer> with one label per cell",
    "wrong_labels": "valid format, but not all labels are right",
    "below_threshold": "valid format and all labels right, but the reward is below the threshold",
    "leak": "accepted by the reward, but the reasoning reveals that the answer was hinted",
    "declined": "the reward gave no score",
    "reward_error": "the reward function raised",
    "reward_timeout": "the reward function took too long",
}
"""Reason for rejection -> its meaning. A trace gets the first reason that applies."""
HOPELESS = 8
"""When the reward fails on each of the first responses, and these are at least so many, the run ends."""


class TraceJudge:
    """Gives verdicts on (puzzle, completion) pairs (data.distill.distill.Judge).

    path: a reward, as for load_reward. A trace is accepted when its reward is at least `accept_at`. Raises UserError
    when the reward cannot be loaded.
    """

    def __init__(self, path: str, accept_at: float = 1.0, workers: int = 1, seconds: float = 60.0) -> None:
        with _as_accept():
            load_reward(path)  # each worker loads its own; this refuses a bad path before any request is paid for
        self.path, self.accept_at = path, accept_at
        self.scorer = Scorer(path, workers, seconds)
        self.scored = self.failed = 0

    def __call__(self, pairs: list[tuple[Puzzle, Completion]]) -> list[Verdict]:
        """The verdicts, in order. Raises RunError when the reward failed on every response so far, HOPELESS or more."""
        # a response that was cut is rejected whatever it contains, so it is not scored
        whole = [(puzzle, c) for puzzle, c in pairs if not c.error and c.finish_reason != "length"]
        traces, puzzles = [completion.trace for _, completion in whole], [puzzle for puzzle, _ in whole]
        with _as_accept():
            rewards = self.scorer.score(traces, puzzles, [False] * len(whole)) if whole else []
        self.scored += len(rewards)
        self.failed += sum(reward.failed for reward in rewards)
        if rewards and self.failed == self.scored >= HOPELESS:
            raise RunError(
                f"--accept {self.path}: failed on all of the first {self.scored} responses, the last with "
                f"{rewards[-1].message}; fix it and add --resume: the responses are kept"
            )
        by_key = {completion.key: reward for (_, completion), reward in zip(whole, rewards, strict=True)}
        return [self.verdict(puzzle, completion, by_key.get(completion.key)) for puzzle, completion in pairs]

    def verdict(self, puzzle: Puzzle, completion: Completion, reward: Reward | None) -> Verdict:
        """The verdict on one completion. reward: None when there was nothing to score."""
        if completion.error:
            return Verdict(accepted=False, reason="endpoint_error", detail=completion.error)
        if reward is None:
            return Verdict(accepted=False, reason="truncated")
        if not reward.scored:
            reason = {Status.ERROR: "reward_error", Status.TIMEOUT: "reward_timeout"}.get(reward.status, "declined")
            return Verdict(accepted=False, reason=reason, detail=reward.message)
        if reward.total >= self.accept_at:
            shown = find_leak(completion.trace, puzzle) if completion.hinted else ""
            return Verdict(accepted=not shown, reason="leak" if shown else "", detail=shown)
        parsed = parse_response(completion.trace, len(puzzle.cells))
        if not parsed.valid:
            return Verdict(accepted=False, reason="invalid_format", detail=parsed.problem)
        right, n_cells = cells_right(parsed.labels, puzzle.answer), len(puzzle.cells)
        if right < n_cells:
            return Verdict(accepted=False, reason="wrong_labels", detail=f"{right} of {n_cells} right")
        return Verdict(accepted=False, reason="below_threshold", detail=f"reward {reward.total:g}")

    def labels(self, response: str, n_cells: int) -> list[str]:
        """The labels of a response to a puzzle of `n_cells` cells; [] when its format is invalid."""
        return parse_response(response, n_cells).labels

    def close(self) -> None:
        """End the worker processes."""
        self.scorer.close()


@contextmanager
def _as_accept() -> Iterator[None]:
    """Messages about a reward name --accept, the option of launch/distill.py, instead of --reward."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--reward ", "--accept ", 1)) from None
