"""A replayed step beside the recorded one, as text, and the ledger as a table: what launch/replay.py shows."""

import csv
import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from data.files import replacing
from trainer.inspect.ledger import contributions_by, contributions_by_group, total_contribution
from trainer.inspect.replay import Replayed
from trainer.packing import MicroBatch
from trainer.record.bundle import Bundle
from trainer.record.nonfinite import BadToken


def compare_with_recorded(bundle: Bundle, replayed: Replayed) -> tuple[list[str], bool]:
    """(lines of recorded beside replayed numbers, does the replay agree with the record).

    A step that stopped at a non-finite value agrees when the replay finds the same token, or a non-finite gradient.
    """
    lines = [
        f"{bundle.path}: step {bundle.step}, update {bundle.update}; {len(bundle.responses)} responses, "
        f"{bundle.denominators.n_tokens:g} trained tokens, {len(bundle.ranks)} rank(s); {bundle.config.model}"
    ]
    lines += [f"note: {sentence}" for sentence in replayed.unlike]
    if bundle.problem:
        lines.append(f"recorded    stopped: {bundle.problem}")
    if (bad := replayed.first("bad")) is not None:
        found = _place(bundle, bad)
        lines.append(f"replayed    {found}: {bad[-1]}")
        # with " of ": the record says "token 12 of 340", and token 1 must not agree with token 12
        return lines, bundle.problem is not None and bundle.problem.startswith(f"{found} of ")
    if (bad_gradient := replayed.first("bad_gradient")) is not None:
        lines.append(f"replayed    {_place(bundle, bad_gradient)}: {bad_gradient[-1]}")
    if bundle.problem:
        both = [replayed.of_policy, *([replayed.of_critic] if replayed.of_critic else [])]
        lines += [f"replayed    loss {found.loss:.9g}, gradient norm {found.grad_norm:.9g}" for found in both]
        # every term is finite here, so the run must have stopped at its gradient, and the replay must find it bad too
        return lines, not all(math.isfinite(found.grad_norm) for found in both)
    now = {name: value for name, value in replayed.found().items() if name in bundle.recorded}
    width = max(map(len, now)) + 1
    lines += [_beside(f"{name:{width}}", bundle.recorded[name], value) for name, value in now.items()]
    for name, difference in (
        ("reference log-probs", replayed.reference_difference),
        ("old log-probs", replayed.old_difference),
        ("old values", replayed.value_difference),
    ):
        if difference is not None:
            lines.append(f"{name} computed again: largest difference {difference:.3g}")
    if not replayed.equals(bundle):
        kind = "GPUs, another kind of CPU (with --autocast)" if bundle.config.autocast else "GPUs"
        lines.append(
            f"recorded with torch {bundle.versions.get('torch')} on {len(bundle.ranks)} rank(s), now torch "
            f"{torch.__version__}: other versions, {kind} or more than two ranks round differently"
        )
    return lines, replayed.equals(bundle)


def _place(bundle: Bundle, bad: tuple[int, MicroBatch, BadToken]) -> str:
    """Puzzle, response and token of a bad token, as the run names them."""
    rank, micro, token = bad
    response = bundle.ranks[rank].responses[micro.rows[token.row]]
    return f"puzzle {response['puzzle_id']}, response {response['response']}, token {token.position + 1}"


def _beside(name: str, before: float | str, now: float | str) -> str:
    """A line with a recorded and a replayed value, and whether they are equal."""
    # bit for bit, and no tolerance: the same program on the same numbers
    same = "equal" if before == now else f"DIFFERS{'' if isinstance(now, str) else f' by {now - before:.3g}'}"
    shown = (f"{before:.9g}", f"{now:.9g}") if isinstance(now, float) else (before, now)
    return f"{name} recorded {shown[0]:>18}   replayed {shown[1]:>18}   {same}"


def value_ledger_lines(rows: list[dict[str, Any]], loss: float) -> list[str]:
    """The sums of the critic's ledger in words. rows: of value_ledger. loss: of the float32 step."""
    exact, clipped = total_contribution(rows), sum(row["clipped"] for row in rows)
    return [
        f"value ledger: {sum(row['mask'] for row in rows)} trained tokens, {clipped} of them clipped, shares sum to "
        f"{exact:.9g} in float64 (the float32 step's own sum is {exact - loss:.2g} off)"
    ]


def ledger_lines(rows: list[dict[str, Any]], loss: float) -> list[str]:
    """The sums of the ledger in words. rows: of trainer.inspect.ledger. loss: of the float32 step."""
    exact = total_contribution(rows)  # float64
    by_clip = contributions_by(rows, "clip")
    by_group = sorted(contributions_by_group(rows).items(), key=lambda item: -abs(item[1]))
    return [
        f"ledger: {sum(row['mask'] for row in rows)} trained tokens, shares sum to {exact:.9g} in float64 (the float32 "
        f"step's own sum is {exact - loss:.2g} off)",
        "  by clip: " + ", ".join(f"{name or 'none'} {share:+.6g}" for name, share in sorted(by_clip.items())),
        "  groups with the largest shares: " + ", ".join(f"{name} {share:+.6g}" for name, share in by_group[:3]),
        *_distillation_line(rows),
    ]


def _distillation_line(rows: list[dict[str, Any]]) -> list[str]:
    """Of --distill-failures, in a step that has it."""
    taught = [row for row in rows if row["mask"] and row.get("teacher_logprob") is not None]
    if not taught:
        return []
    share = math.fsum(row["weight"] * row["distillation"] for row in taught)
    responses = len({row["row"] for row in taught})
    return [f"  distillation of {responses} wrong responses: {len(taught)} tokens, share {share:+.6g}"]


def write_ledger(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the ledger as .csv, whole or not at all."""
    # newline="": the csv module writes the line ends itself
    with replacing(path) as partial, open(partial, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def prompts_of(bundle: Bundle, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """{number of a response in the step: its prompt as text}. Not by puzzle: those of two builds may share an id."""
    prompts, first = {}, 0
    for inputs in bundle.ranks:
        for micro in inputs.micro_batches:
            places = iter(micro.rows)  # rows are numbered in the order of packing: group after group
            for prompt, responses in micro.groups:
                for _ in responses:
                    prompts[first + next(places)] = tokenizer.decode(prompt)
        first += len(inputs.responses)
    return prompts
