"""The responses whose reasoning is analysed: predictions, a run's rollouts, or published rows with reasoning."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from data.errors import UserError
from data.puzzles import Puzzle, id_text, of_other_steps, read_rows


class Response(NamedTuple):
    """A response to read. `name` is unique in its file, and fit for a file name."""

    name: str
    puzzle: Puzzle
    text: str


def read_responses(
    file: str, puzzles: Sequence[Puzzle], puzzles_file: str, steps: Sequence[int] = ()
) -> list[Response]:
    """The responses of a file, in its order.

    Rows are matched by puzzle_id or id, or by order when they have no id and are as many as the puzzles. puzzles_file:
    named in errors. steps: of rollouts, only those of these steps. Raises UserError that names file and row of a
    response that cannot be matched, or says that there is no response.
    """
    by_id = {puzzle.id: puzzle for puzzle in puzzles}
    found: list[Response] = []
    # of rollouts, which are far larger than their texts, and of which few steps may be asked for
    heavy, other = {"response_ids", "sampler_logprobs"}, {"step": None}
    rows = read_rows(
        file,
        lambda row: other if steps and row.get("step") not in steps else {k: row[k] for k in row if k not in heavy},
        of_other_steps(steps),
    )
    for number, row in enumerate(rows):
        if steps and row.get("step") not in steps:
            continue
        for suffix, text in texts_of(row, f"{file}, row {number}"):
            name = row.get("id") if row.get("puzzle_id") is None else row["puzzle_id"]
            if isinstance(name, list | dict):
                raise UserError(f"{file}, row {number}: its id is {str(name)[:40]!r}; write the puzzle's id, a text")
            name = id_text(name) or None
            if "user_msg" in row:
                try:
                    name = Puzzle.from_row(row).id
                except UserError as error:
                    raise UserError(f"{file}, row {number}: {error}") from None
            if name is None and len(rows) == len(puzzles):
                name = puzzles[number].id
            if name is None:
                raise UserError(
                    f"{file}: {len(rows)} responses without an id for {len(puzzles)} puzzles; add a column id"
                )
            if name not in by_id:
                raise UserError(
                    f"{file}, row {number}: its puzzle {name} is not in --puzzles {puzzles_file}; name its file"
                )
            found.append(Response(f"{name}{suffix}", by_id[name], text))
    if not found:
        cause = f"no row of step {', '.join(map(str, steps))}" if steps else "no response with reasoning"
        remedy = "name another --step" if steps else "name the responses with --predictions"
        raise UserError(f"{file}: holds {cause}; {remedy}")
    return with_file_names(found)


def texts_of(row: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """[(suffix to the puzzle's id, response)] of a row; [] for a row of a puzzle with a bare answer.

    where: begins an error message. Raises UserError for a row without a response.
    """
    if isinstance(row.get("completion"), str):
        return [(f"-step{row.get('step', 0)}-{row.get('response', 0)}", row["completion"])]
    if row.get("samples"):
        if not isinstance(row["samples"], list) or not all(isinstance(text, str) for text in row["samples"]):
            raise UserError(f"{where}: 'samples' must be a list of texts")
        return [(f"-{k}", text) for k, text in enumerate(row["samples"], start=1)]
    if isinstance(row.get("prediction"), str):
        return [("", row["prediction"])]
    if isinstance(row.get("assistant_msg"), str):
        return [("", row["assistant_msg"])] if "<think>" in row["assistant_msg"] else []
    raise UserError(f"{where}: has no response; it needs a text column prediction, completion or assistant_msg")


def with_file_names(responses: list[Response]) -> list[Response]:
    """The responses with names fit for files: odd characters become "_", and a name that is taken gets a number."""
    taken: dict[str, int] = {}
    named = []
    for response in responses:
        name = re.sub(r"[^\w.-]+", "_", response.name)[:80]
        taken[name] = taken.get(name, 0) + 1
        named.append(response._replace(name=name if taken[name] == 1 else f"{name}.{taken[name]}"))
    return named
