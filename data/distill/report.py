"""The report of a distillation: acceptance, in all and by number of cells, tissue and disease; reasons for rejection.

Acceptance is the share of puzzles with an accepted trace among those for which a trace was requested. Puzzles that were
not reached, because of a budget or a signal, are counted separately.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.distill.distill import Draws
from data.distill.meter import Meter
from data.files import write_whole
from data.puzzles import Puzzle

GROUPS: dict[str, Callable[[Puzzle], str]] = {
    "dataset": lambda puzzle: str(puzzle.meta.get("dataset", "unknown")),
    "n_cells": lambda puzzle: str(len(puzzle.cells)),
    "tissue": lambda puzzle: str(puzzle.meta.get("tissue", "unknown")),
    "disease": lambda puzzle: str(puzzle.meta.get("disease", "unknown")),
}
DETAILS = 20
"""Largest number of details listed under a reason."""
SHOWN = 8
"""Largest number of values of a group in the printed table."""
OF_ROUND = ("batch_accuracy", "cell_accuracy", "format_validity", "response_length")
"""Metrics of the held-out puzzles in a row of rounds.json (launch/selfdistill.py)."""


def headline(draws: Draws, seed: int) -> dict[str, Any]:
    """The numbers of the whole run. Hinted traces count as drawn, and their puzzles as accepted."""
    accepted = [draws.accepted(puzzle) for puzzle in draws.puzzles]
    drawn = [
        completion for judged in draws.judged.values() for completion, _ in judged.values() if not completion.error
    ]
    n_accepted, n_asked = sum(map(bool, accepted)), sum(_asked(draws, puzzle) for puzzle in draws.puzzles)
    return {
        "puzzles": len(draws.puzzles),
        "puzzles_asked": n_asked,
        "traces_drawn": len(drawn),
        "puzzles_accepted": n_accepted,
        "accepted_at_first": sum(map(_at_first, accepted)),
        "acceptance": _share(n_accepted, n_asked),
        "candidates": draws.plan.candidates,
        "seed": seed,
    }


def make_report(
    draws: Draws, meter: Meter, *, seed: int, settings: dict[str, Any], rows: int, ended: str
) -> dict[str, Any]:
    """The content of the report file: settings, headline, groups, reasons, tokens and cost.

    Everything follows from the raw file. settings: shown as they are. rows: number of traces kept. ended: the result of
    distill().
    """
    judged = [pair for of_puzzle in draws.judged.values() for pair in of_puzzle.values()]
    rejected = [verdict for _, verdict in judged if not verdict.accepted]
    reasons = Counter(verdict.reason for verdict in rejected)
    accepted = [draws.accepted(puzzle) for puzzle in draws.puzzles]
    return {
        **headline(draws, seed),
        "rows": rows,
        "ended": ended or "every puzzle is settled",
        "puzzles_never_answered": sum(not any(not c.error for c, _ in of.values()) for of in draws.judged.values()),
        "hinted": {
            "traces_drawn": sum(c.hinted and not c.error for c, _ in judged),
            "puzzles_accepted": sum(bool(kept) and kept[0].hinted for kept in accepted),
            "leaks": reasons["leak"],
        },
        "by": {name: _by(draws, group) for name, group in GROUPS.items()},
        "rejected": {
            reason: {"traces": count, "details": _details(v.detail for v in rejected if v.reason == reason)}
            for reason, count in reasons.most_common()
        },
        "tokens": {"prompt": meter.prompt_tokens, "completion": meter.completion_tokens},
        "cost": {
            "spent": round(meter.spent, 6),
            "lost_at_most": round(meter.lost, 6),
            "budget": meter.budget,
            "responses_without_token_counts": meter.uncounted,
        },
        "settings": settings,
        **draws.for_report(),
    }


def _asked(draws: Draws, puzzle: Puzzle) -> bool:
    """Whether a candidate of the puzzle was requested."""
    return bool(draws.judged[puzzle.id])


def _share(accepted: int, asked: int) -> float | None:
    """accepted / asked; None when nothing was requested."""
    return accepted / asked if asked else None


def _at_first(accepted: list) -> bool:
    """Whether the first candidate was accepted."""
    return bool(accepted) and accepted[0].attempt == 0 and not accepted[0].hinted


def _by(draws: Draws, group: Callable[[Puzzle], str]) -> dict[str, dict[str, Any]]:
    """{value of the group: counts and acceptance}, sorted by number or name."""
    found: dict[str, Counter] = {}
    for puzzle in draws.puzzles:
        accepted = draws.accepted(puzzle)
        counts = {
            "puzzles": 1,
            "asked": _asked(draws, puzzle),
            "accepted": bool(accepted),
            "accepted_at_first": _at_first(accepted),
        }
        found.setdefault(group(puzzle), Counter()).update(counts)
    # names are no numbers: they have the key 0 and are sorted by themselves
    by_number = sorted(found.items(), key=lambda item: (int(item[0]) if item[0].isdigit() else 0, item[0]))
    return {name: {**counts, "acceptance": _share(counts["accepted"], counts["asked"])} for name, counts in by_number}


def _details(details) -> dict[str, int]:
    """{detail: how often}, the most frequent ones."""
    counts = Counter(detail for detail in details if detail)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:DETAILS])


def acceptance_table(report: dict[str, Any]) -> str:
    """The report as text for the terminal, a few lines per group."""
    width = 34
    lines = [f"{'':{width}}{'puzzles':>8}{'asked':>8}{'accepted':>10}{'at first':>10}"]
    whole = {**report, "asked": report["puzzles_asked"]}
    groups = [("all", {"": whole})] + list(report["by"].items())
    for group, values in groups:
        shown = sorted(values.items(), key=lambda item: -item[1]["puzzles"])[:SHOWN]
        for name, counts in values.items():
            if (name, counts) in shown:
                first = _share(counts["accepted_at_first"], counts["asked"])
                label = f"{group} {name}"[: width - 1]
                shares = "".join(
                    f"{'-' if share is None else f'{share:.1%}':>10}" for share in (counts["acceptance"], first)
                )
                lines.append(f"{label:{width}}{counts['puzzles']:8}{counts['asked']:8}{shares}")
        if len(values) > len(shown):
            lines.append(f"{group}: {len(values) - len(shown)} more in the report")
    reasons = ", ".join(f"{found['traces']} {reason}" for reason, found in report["rejected"].items())
    lines.append(f"{report['traces_drawn']} traces drawn, {report['rows']} kept; rejected: {reasons or 'none'}")
    hinted, tokens, cost = report["hinted"], report["tokens"], report["cost"]
    if hinted["traces_drawn"]:
        leaks = f"{hinted['leaks']} rejected as leaks"
        lines.append(f"hinted: {hinted['traces_drawn']} drawn, {hinted['puzzles_accepted']} puzzles accepted, {leaks}")
    if any((*tokens.values(), cost["spent"], cost["lost_at_most"])):
        uncounted = cost["responses_without_token_counts"]
        lines.append(
            f"tokens: {tokens['prompt']} in, {tokens['completion']} out; cost {cost['spent']:g}"
            + (f" (without token counts: {uncounted}, at the worst case)" if uncounted else "")
            + (f", and at most {cost['lost_at_most']:g} lost" if cost["lost_at_most"] else "")
        )
    if "workflow" in report:
        lines.append(workflow_line(report["workflow"]))
    return "\n".join(lines)


def workflow_line(found: dict[str, Any]) -> str:
    """What a workflow came to, in one line. found: of WorkflowDraws.for_report."""
    if not found["puzzles"]:
        return f"{found['kind']}: no puzzle has all its answers yet"
    answers, vote, final = (f"{found[name]['batch_accuracy']:.1%}" for name in ("answers", "vote", "final"))
    return (
        f"{found['kind']}: an answer is right in {answers} of {found['puzzles']} puzzles, some answer in {found['any']:.1%}, "
        f"the vote in {vote}, the final assignment in {final} ({found['gained']} gained and {found['lost']} lost of "
        f"{found['asked_about']} asked about); traces: {found['from_answers']} of the answers, {found['written']} written, "
        f"{found['not_written']} not found"
    )


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write the report as JSON, completely or not at all."""
    write_whole(path, json.dumps(report, indent=1) + "\n")


def round_row(number: int, metrics: dict[str, Any], report: dict[str, Any] | None) -> dict[str, Any]:
    """A row of rounds.json. report: of the distillation; None for the first teacher."""
    row: dict[str, Any] = {"round": number, **{name: metrics[name] for name in OF_ROUND if name in metrics}}
    if report is None:
        return row
    row |= {"acceptance": report["acceptance"], "accepted": report["puzzles_accepted"]}
    if found := report.get("workflow"):
        # the accuracy of the final assignments, `workflow`, is the ceiling of what a round can teach
        row |= {"answers": found["answers"]["batch_accuracy"], "vote": found["vote"]["batch_accuracy"]}
        row |= {"workflow": found["final"]["batch_accuracy"], "sampled_tokens": report["tokens"]["completion"]}
    return row
