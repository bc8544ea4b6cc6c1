"""Turn traces into token ids, leave out those that are too long, and hold out puzzles for evaluation."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from data.errors import UserError
from data.prompts import answer_text
from data.puzzles import Puzzle, content_id
from reward.cellpuzzles import parse_response
from trainer.policy import Policy
from trainer.sft.settings import SftConfig


@dataclass(frozen=True, kw_only=True)
class Example:
    """A trace to learn, as token ids."""

    puzzle: Puzzle
    prompt_ids: list[int]
    """[tokens of the prompt] not trained on."""
    response_ids: list[int]
    """[tokens of the response] the trace and the end-of-turn token, trained on."""

    @property
    def puzzle_id(self) -> str:
        return self.puzzle.id


def trace_of(row: dict) -> str:
    """The text to learn from, of a row that Puzzle.from_row reads: the authors name its column in two ways."""
    return row["assistant_msg"] if "assistant_msg" in row else row["answer"]


def encode_traces(
    policy: Policy, rows: list[dict], cfg: SftConfig, advance: Callable[[], None] = lambda: None
) -> tuple[list[Example], int]:
    """(examples that fit --max-tokens, number of traces that do not fit). rows: of the --traces file.

    advance() is called after each row: many take longer than a rank may be silent.
    Raises UserError for a row that is not a puzzle, if no trace fits, if a trace does not fit and --overlong is refuse,
    or if no trace has the format that the reward accepts.
    """
    examples, too_long, valid = [], [], 0
    for number, row in enumerate(rows):
        advance()
        try:
            puzzle = Puzzle.from_row(row)
        except ValueError as error:
            raise UserError(f"{cfg.traces}, row {number}: {error}") from None
        text = trace_of(row) if cfg.target == "trace" else answer_only(puzzle)
        valid += parse_response(text, len(puzzle.answer)).valid  # of all traces, also those left out below
        prompt_ids = policy.chat.prompt_ids(puzzle.chat())
        response_ids = policy.chat.response_ids(text)  # with the end of turn, which teaches the model to stop
        if len(prompt_ids) + len(response_ids) > cfg.max_tokens:
            too_long.append(number)  # never cut: half an answer teaches half an answer
            continue
        examples.append(Example(puzzle=puzzle, prompt_ids=prompt_ids, response_ids=response_ids))
    policy.chat.refuse_unwritable(label for example in examples for label in example.puzzle.answer)
    if not examples:
        raise UserError(f"--max-tokens {cfg.max_tokens}: none of the {len(rows)} traces of {cfg.traces} fits")
    if too_long and cfg.overlong == "refuse":
        raise UserError(
            f"{cfg.traces}: {len(too_long)} traces, the first in row {too_long[0]}, are longer than --max-tokens "
            f"{cfg.max_tokens}; raise it, or leave them out with --overlong skip"
        )
    if not valid:
        raise UserError(
            f"{cfg.traces}: no row has a reasoning trace in the answer format; make some with launch/distill.py, or "
            "learn the answers alone with --target answer"
        )
    return examples, len(too_long)


def note_on_formats(rows: list[dict], cfg: SftConfig) -> str:
    """A sentence when some of the traces are not in the answer format, which they then teach to leave; "" otherwise."""
    if cfg.target != "trace":
        return ""
    bad = [i for i, row in enumerate(rows) if not parse_response(trace_of(row), len(Puzzle.from_row(row).answer)).valid]
    if not bad:
        return ""
    return (
        f"{len(bad)} of {len(rows)} rows of {cfg.traces} have no trace in the answer format, the first in row {bad[0]}: they "
        "teach to answer without it; leave such rows out"
    )


def answer_only(puzzle: Puzzle) -> str:
    """The answer with an empty reasoning part, in the format that the reward accepts."""
    return f"<think></think>\n<answer>{answer_text(puzzle.answer)}</answer>"


def split_by_puzzle(examples: list[Example], holdout: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(to train on, held out). holdout: share of the puzzles held out; at least one puzzle if there are two or more.

    All traces of a puzzle go to the same side. Puzzles with equal prompts are one puzzle, whatever their ids, and so are the
    cells of a batch in a cell-level file: they share candidates, and the labels of all but one leave the last.
    """
    first: dict[str, str] = {}
    # one puzzle under two ids, trained on and held out, would make eval_loss too good
    batches = [e.puzzle.meta.get("batch_id") if e.puzzle.variant == "cell" else None for e in examples]
    names_of = [
        first.setdefault(content_id(e.puzzle.user_message), e.puzzle_id if batch is None else str(batch))
        for e, batch in zip(examples, batches, strict=True)
    ]
    names = sorted(set(names_of))
    random.Random(f"{seed} holdout").shuffle(names)  # of sorted names: independent of the order of the file
    # rounded down, but at least one, and never the only one
    out = set(names[: max(int(holdout * len(names)), min(1, len(names) - 1) if holdout else 0)])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example, name in zip(examples, names_of, strict=True):
        sides[name in out].append(example)
    return sides
