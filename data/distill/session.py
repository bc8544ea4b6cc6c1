"""A distillation from its settings to its files: teacher, judge and raw file put together, progress, signals, report.

Reading order: `run_distillation`, then data/distill/distill.py for the loop that it starts.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from types import FrameType
from typing import Protocol

from tqdm import tqdm

from data.describe import unlike
from data.distill.distill import (
    Completion,
    Draws,
    Plan,
    Request,
    RequestKey,
    Teacher,
    Verdict,
    distill,
    refuse_unsolvable,
)
from data.distill.lookups import Tables
from data.distill.meter import Meter
from data.distill.report import acceptance_table, headline, make_report, write_report
from data.distill.responses import RawFile
from data.distill.settings import DistillConfig
from data.distill.workflow import WorkflowDraws, largest_requests, puzzle_of_step
from data.errors import RunError, UserError
from data.processes import how_to_go_on
from data.puzzles import Puzzle, read_puzzles, write_rows
from data.status.status import Report, reporting

MakeTeacher = Callable[[list[Puzzle], list[Puzzle], Meter, RawFile], Teacher]
"""(all puzzles of the file, the puzzles that will be asked, meter, raw file) -> teacher."""


class ClosableJudge(Protocol):
    """A judge (data.distill.distill.Judge) that holds processes."""

    def __call__(self, pairs: list[tuple[Puzzle, Completion]]) -> list[Verdict]:
        """Verdicts in order."""

    def labels(self, response: str, n_cells: int) -> list[str]:
        """The labels of a response to a puzzle of `n_cells` cells; [] when its format is invalid."""

    def close(self) -> None:
        """End its processes."""


def run_distillation(config: DistillConfig, judge: ClosableJudge, make_teacher: MakeTeacher) -> None:
    """Draw traces until every puzzle is settled or the teacher ends; write all files and print the report.

    Raises UserError for files that would be overwritten, puzzles that the teacher cannot answer, a raw file of other
    settings, and when no trace was accepted.
    """
    start = time.monotonic()
    config.refuse_overwriting()
    puzzles = read_puzzles(config.puzzles)
    chosen = puzzles[config.skip :][: config.limit]
    if not chosen:
        raise UserError(f"--skip {config.skip}: {config.puzzles} holds {len(puzzles):,} puzzles, so none is left")
    for one in unlike(chosen, puzzles) if len(chosen) < len(puzzles) else ():
        print(
            f"note: of {len(puzzles):,} puzzles {len(chosen):,} are asked (--skip, --limit), and {one}", file=sys.stderr
        )
    if config.teacher == "embedded" and (variants := {puzzle.variant for puzzle in chosen} - {"batch"}):
        raise UserError(
            f"--puzzles {config.puzzles}: the embedded teacher answers batch-level puzzles only, and this file holds "
            f"'{min(variants)}' ones; choose --teacher openai or vllm"
        )
    if not config.raw_file.exists():  # else its answers are there, and belong to the file as it is
        refuse_unsolvable(chosen)
    plan = Plan(
        candidates=config.candidates,
        stop_at=config.stop_at,
        hint_candidates=config.hint_candidates if config.hint else 0,
    )
    draws = make_draws(config, puzzles, chosen, plan, judge)
    meter = Meter(price_in=config.price_in or 0.0, price_out=config.price_out or 0.0, budget=config.budget)
    with reporting(config.out, config.notify, "puzzle") as report:
        with closing(judge), open_raw_file(config, puzzles, meter) as raw:
            answered = {completion.puzzle_id for completion in raw.completions.values()}
            refuse_unsolvable([puzzle for puzzle in chosen if puzzle.id not in answered])  # such as of a larger --limit
            teacher = make_teacher(puzzles, chosen, meter, raw)
            teacher.answered_before = len(raw.completions)
            with Progress(draws, meter, report) as progress, Interruptible(teacher, raw) as interrupted:
                ended = distill(
                    draws,
                    teacher,
                    judge,
                    recorded=list(raw.completions.values()),
                    record=raw.append,
                    watch=progress.show,
                )
                if ended == "stopped":
                    report.stop(128 + interrupted.signal)
                    interrupted.end()
            teacher.close()
        write_results(config, draws, meter, ended, time.monotonic() - start)


def make_draws(
    config: DistillConfig, puzzles: list[Puzzle], chosen: list[Puzzle], plan: Plan, judge: ClosableJudge
) -> Draws:
    """The candidates of the chosen puzzles, or their workflows. puzzles: of the whole file."""
    workflow = config.used_workflow
    if workflow is None:
        return Draws(chosen, plan)
    whole = dataclasses.replace(plan, stop_at=0)  # all answers vote
    return WorkflowDraws(chosen, whole, workflow, judge.labels, Tables(puzzles))


def open_raw_file(config: DistillConfig, puzzles: list[Puzzle], meter: Meter) -> RawFile:
    """The file of all responses, with those of an earlier run. puzzles: of the whole file."""
    costs_nothing = config.teacher == "embedded"  # old responses may be replaced, and need not be synced one by one
    return RawFile(
        config.raw_file,
        config.meaning(puzzles),
        meter,
        resume=config.resume,
        replace=costs_nothing,
        sync=not costs_nothing,
        worst_cost=worst_cost(config, puzzles, meter),
    )


def worst_cost(config: DistillConfig, puzzles: list[Puzzle], meter: Meter) -> Callable[[RequestKey], float]:
    """A function that gives the most that a request can cost, from its key in the raw file."""
    by_id = {puzzle.id: puzzle for puzzle in puzzles}
    workflow, tables = config.used_workflow, Tables(puzzles)

    def worst(key: RequestKey) -> float:
        puzzle_id, attempt, hinted = key
        if puzzle_id not in by_id and workflow is not None and puzzle_of_step(puzzle_id) in by_id:
            largest = largest_requests(workflow, by_id[puzzle_of_step(puzzle_id)], tables)
            return max(meter.worst_cost(request.chat(), config.max_response_tokens) for request in largest)
        if puzzle_id not in by_id:
            return 0.0
        request = Request(puzzle=by_id[puzzle_id], attempt=attempt, hinted=hinted)
        return meter.worst_cost(request.chat(), config.max_response_tokens)

    return worst


def write_results(config: DistillConfig, draws: Draws, meter: Meter, ended: str, seconds: float) -> None:
    """Write the report and the accepted traces, and print both in short.

    Raises UserError when no trace was accepted, RunError when no request was answered.
    """
    rows = draws.rows(config.keep, config.seed)
    report = make_report(draws, meter, seed=config.seed, rows=len(rows), ended=ended, settings=config.shown())
    write_report(config.report_file, {**report, "timing": {"seconds": round(seconds, 1)}})
    print(acceptance_table(report), flush=True)
    if ended == "budget":
        print(
            f"note: --budget {config.budget:g} is used up: puzzles are left, "
            f"{report['puzzles'] - report['puzzles_asked']} of them never asked; raise it and add --resume",
            file=sys.stderr,
        )
    if not rows:
        refuse_without_an_answer(config, draws)
        reasons = ", ".join(report["rejected"]) or "nothing was drawn"
        easier = "lower --teacher-noise" if config.teacher == "embedded" else "change the teacher"
        raise UserError(
            f"--puzzles {config.puzzles}: no trace was accepted ({reasons}); raise --candidates or {easier}"
        )
    write_rows(config.out, rows)
    print(json.dumps(headline(draws, config.seed)))


def refuse_without_an_answer(config: DistillConfig, draws: Draws) -> None:
    """Raises RunError with the last error when requests were made and none was answered."""
    drawn = [completion for judged in draws.judged.values() for completion, _ in judged.values()]
    if drawn and all(completion.error for completion in drawn):
        raise RunError(
            f"--teacher {config.teacher}: none of {len(drawn)} requests was answered, the last with {drawn[-1].error}; all are "
            f"in {config.raw_file}; mend that, then go on with --resume"
        )


class Interruptible:
    """A context in which the first SIGTERM or SIGINT stops the teacher, which then waits for the requests in flight.

    A second signal of either kind ends the process at once. In both cases every response that was received is on disk.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, teacher: Teacher, raw: RawFile) -> None:
        self.teacher, self.raw, self.signal = teacher, raw, 0

    def __enter__(self) -> "Interruptible":
        self.before = {number: signal.signal(number, self.handle) for number in self.SIGNALS}
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        for either in self.SIGNALS:
            signal.signal(either, signal.SIG_DFL)
        self.signal = number
        self.teacher.stop()

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def end(self) -> None:
        """Say how to continue, and leave with the exit code of the signal. Engines and judges end with the process."""
        self.raw.flush()
        name = signal.Signals(self.signal).name
        print(f"stopped by {name}: every response is in {self.raw.path}; {how_to_go_on()}", file=sys.stderr)
        sys.stdout.flush()
        os._exit(128 + self.signal)


class Progress:
    """Settled puzzles, acceptance rate and cost: a bar on a terminal, a line now and then elsewhere."""

    SECONDS = 20.0
    """Least time between two lines."""

    def __init__(self, draws: Draws, meter: Meter, report: Report) -> None:
        self.draws, self.meter, self.report = draws, meter, report
        self.bar = tqdm(total=len(draws.by_id), desc="distill", unit="puzzle", disable=None)
        self.settled: set[str] = set()
        self.drawn = self.accepted = 0
        self.next_line = time.monotonic() + self.SECONDS

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self, completion: Completion, verdict: Verdict | None) -> None:
        """Count a completion that is in `draws`. verdict: None for a step between answers and traces."""
        puzzle = self.draws.puzzle_of(completion)
        self.drawn += verdict is not None
        self.accepted += verdict is not None and verdict.accepted
        if puzzle.id not in self.settled and not self.draws.wanted(puzzle):
            self.settled.add(puzzle.id)
            self.bar.update()
        money = f", {self.meter.spent + self.meter.lost:.4g} spent" if self.meter.priced else ""
        rate = f"{self.accepted} of {self.drawn} traces accepted ({self.accepted / max(self.drawn, 1):.0%}){money}"
        self.bar.set_postfix_str(rate, refresh=False)
        self.report.progress(len(self.settled), len(self.draws.by_id))
        if self.bar.disable and time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + self.SECONDS
            print(f"distill: {len(self.settled)} of {len(self.draws.by_id)} puzzles, {rate}", file=sys.stderr)
