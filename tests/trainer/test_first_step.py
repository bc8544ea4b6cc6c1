"""A run whose first step has no usable response stops and says why."""

import json

import pytest

from reward import Status
from reward.result import nothing_usable
from tests.helpers.commands import SMALL_GRPO, run_command

SMALL = (*(word for word in SMALL_GRPO if word != "--insist"), "--engine", "torch", "--steps", 1)


def row(status: Status, message: str = "", text: str = "no tags") -> dict:
    return {"status": str(status), "puzzle_id": "p1", "completion": text, **({"message": message} if message else {})}


NO_TAG, TWICE = "<think> occurs 0 times, not once", "<answer> occurs 2 times, not once"


def test_the_reasons_are_counted_and_one_response_is_shown():
    rows = [
        row(Status.TRUNCATED, NO_TAG, "cut"),
        *[row(Status.INVALID_FORMAT, NO_TAG)] * 3,
        *[row(Status.INVALID_FORMAT, TWICE)] * 2,
        row(Status.INVALID_FORMAT, "label 1 of the answer is empty"),
        row(Status.TRUNCATED),
    ]
    assert nothing_usable(rows) == (
        "each of the 8 responses has an invalid format or was cut, so there is nothing to learn from: "
        f"{NO_TAG} (3); it was cut at --max-response-tokens (2); {TWICE} (2). Puzzle p1 was answered 'no tags'"
    )
    assert nothing_usable([row(Status.TRUNCATED, text="a" * 300 + "b" * 300)] * 2) == (
        "each of the 2 responses was cut at the length limit, so there is nothing to learn from: it was cut at "
        f"--max-response-tokens (2). Puzzle p1 was answered '{'a' * 200} ... {'b' * 200}'"
    )


@pytest.mark.parametrize("status", [Status.OK, Status.ERROR, Status.DECLINED])
def test_one_other_response_is_enough(status):
    """Also where a reward of the user's own knows no format: then every status is OK."""
    assert nothing_usable([row(Status.INVALID_FORMAT, NO_TAG), row(status)]) == ""
    assert nothing_usable([row(status)] * 4) == ""


@pytest.mark.slow(12)
@pytest.mark.parametrize("ranks", [None, 2])
def test_the_run_stops_on_all_ranks_and_goes_on_when_told_to(pipeline, tmp_path, ranks):
    out = tmp_path / "run"
    given = ("--model", pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet", "--out", out, *SMALL)
    done = run_command("grpo", *given, ranks=ranks)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert ranks or done.returncode == 2
    (said,) = {line for line in done.stderr.splitlines() if "Error: step 1: " in line}
    assert "each of the 12 responses was cut at the length limit" in said and "--resume --insist" in said
    rows = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {row["step"] for row in rows} == {1} and not (out / "finished.json").exists()
    assert repr(rows[0]["completion"]) in said
    done = run_command("grpo", *given, "--resume", "--insist", ranks=ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "finished.json").exists()
    assert len((out / "rollouts.jsonl").read_text().splitlines()) == 12
