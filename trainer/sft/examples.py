"""Traces as token ids: what the cold start learns, and what it leaves out."""

import random
from dataclasses import dataclass

from data.errors import UserError
from data.prompts import answer_text
from data.puzzles import Puzzle, content_id
from reward.cellpuzzles import parse_response
from trainer.config import SftConfig
from trainer.policy import Policy, encode_prompt


@dataclass(frozen=True, kw_only=True)
class Example:
    puzzle: Puzzle
    prompt_ids: list[int]
    response_ids: list[int]
    """The trace and the end-of-turn token."""

    @property
    def puzzle_id(self) -> str:
        return self.puzzle.id


def encode_traces(policy: Policy, rows: list[dict], cfg: SftConfig) -> tuple[list[Example], int]:
    """(examples that fit --max-tokens, number that do not). Raises UserError naming a row that is no trace."""
    examples, too_long, valid = [], [], 0
    for number, row in enumerate(rows):
        try:
            puzzle = Puzzle.from_row(row)
        except ValueError as error:
            raise UserError(f"{cfg.traces}, row {number}: {error}") from None
        text = row["assistant_msg"] if cfg.target == "trace" else answer_only(puzzle)
        valid += parse_response(text, len(puzzle.answer)).valid
        prompt_ids = encode_prompt(policy.tokenizer, puzzle.chat())
        response_ids = [*policy.tokenizer.encode(text, add_special_tokens=False), policy.eos_id]
        if len(prompt_ids) + len(response_ids) > cfg.max_tokens:
            too_long.append(number)
            continue
        examples.append(Example(puzzle=puzzle, prompt_ids=prompt_ids, response_ids=response_ids))
    if not examples:
        raise UserError(f"--max-tokens {cfg.max_tokens}: none of the {len(rows)} traces of {cfg.traces} fits")
    if too_long and cfg.overlong == "refuse":
        raise UserError(
            f"{cfg.traces}: {len(too_long)} traces, the first in row {too_long[0]}, are longer than --max-tokens "
            f"{cfg.max_tokens}; raise it, or leave them out with --overlong skip"
        )
    if not valid:
        raise UserError(
            f"{cfg.traces}: no row has a reasoning trace in the answer format; make some with launch/distill.py, or learn "
            "the answers alone with --target answer"
        )
    return examples, len(too_long)


def answer_only(puzzle: Puzzle) -> str:
    """The answer with nothing thought before it, in the format that is scored."""
    return f"<think></think>\n<answer>{answer_text(puzzle.answer)}</answer>"


def split_by_puzzle(examples: list[Example], holdout: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(kept, held out): a share of the puzzles, at least one of two or more, never one puzzle on both sides.

    A puzzle is its prompt: the same one under two ids is one.
    """
    first: dict[str, str] = {}
    names_of = [first.setdefault(content_id(e.puzzle.user_message), e.puzzle_id) for e in examples]
    names = sorted(set(names_of))
    random.Random(f"{seed} holdout").shuffle(names)
    out = set(names[: max(int(holdout * len(names)), min(1, len(names) - 1) if holdout else 0)])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example, name in zip(examples, names_of, strict=True):
        sides[name in out].append(example)
    return sides
