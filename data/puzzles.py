"""`Puzzle`, the unit of the task, and its rows on disk.

A row has the three columns of the published dataset (`system_msg`, `user_msg`, `assistant_msg`). A puzzle that
launch/build.py built also has an `id` and metadata columns (dataset, donor, batch, tissue, disease, cell_ids, source,
...).

Axes: N cells of a puzzle, M genes listed per cell.
"""

import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import parse_json, reason_of, replacing, unsealed_row
from data.prompts import (
    CANDIDATES_HEAD,
    CELL_CANDIDATES_HEAD,
    CONTEXT_HEAD,
    OPEN_REQUEST,
    SYSTEM_MESSAGES,
    answer_text,
    chat,
    user_message,
    variant_of,
)

NAMED = 3
"""Examples that a refusal names."""
MESSAGE_COLUMNS = ("system_msg", "user_msg", "assistant_msg")
ROWS_SEAL = b"rows_crc32"
"""Key, in the metadata of a parquet file of ours, of the checksum of its rows."""
_STEP_FIRST = re.compile(r'\{"step": (\d+)[,}]')
_CELL_LINE = re.compile(r"Cell (\d+): (.*)")
_ANSWER_BLOCK = re.compile(r"<answer>((?:(?!<answer>).)*)</answer>\s*\Z", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """N cells of one donor and N candidate labels; each cell gets a different label.

    Or a variant of such a batch (data/variants.py): one of its cells with all N candidates, or the batch without
    candidates.

    Examples: `to_row` and `from_row` below.
    """

    id: str
    """Unique name. A row without an id gets the first 16 hex digits of its user message's SHA-256."""
    context: str
    """What is known about the donor, in one or more sentences."""
    cells: list[list[str]]
    """[N][<= M] gene symbols per cell, most expressed first."""
    candidates: list[str]
    """[N] labels in the order of the prompt. A cell-level puzzle has those of its batch, an open-ended one none."""
    answer: list[str]
    """[N] answer[i] is the label of cell i."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Metadata columns; also `system_msg`, `assistant_msg`, `context_tail` where a row differs from our rendering."""

    @property
    def variant(self) -> str:
        """The variant: "batch", "cell" (one cell, several candidates) or "open" (no candidates)."""
        return variant_of(len(self.cells), len(self.candidates))

    @property
    def system_message(self) -> str:
        return self.meta.get("system_msg", SYSTEM_MESSAGES[self.variant])

    @property
    def user_message(self) -> str:
        return user_message(self.context, self.cells, self.candidates, self.meta.get("context_tail", " "))

    def chat(self) -> list[dict[str, str]]:
        """The prompt as chat turns (system, user)."""
        return chat(self.system_message, self.user_message)

    def to_row(self) -> dict[str, Any]:
        """The row to write: the three messages, then `id` and the metadata columns.

        `id` is left out when it is the hash of the user message. The column `answer` (the correct labels) is added only
        when `assistant_msg` is a trace that ends in other labels; launch/distill.py keeps such traces with --accept-at.

        >>> puzzle = Puzzle(
        ...     id="blood-1",
        ...     context="The cell is from a female, originating from the blood.",
        ...     cells=[["CD3D", "IL7R"], ["CD79A", "MS4A1"]],
        ...     candidates=["B cell", "T cell"],
        ...     answer=["T cell", "B cell"],
        ...     meta={"donor": "D1"},
        ... )
        >>> row = puzzle.to_row()
        >>> list(row)
        ['system_msg', 'user_msg', 'assistant_msg', 'id', 'donor']
        >>> row["assistant_msg"]
        'T cell | B cell'
        """
        row: dict[str, Any] = {
            "system_msg": self.system_message,
            "user_msg": self.user_message,
            "assistant_msg": self.meta.get("assistant_msg", answer_text(self.answer)),
        }
        if self.id != content_id(row["user_msg"]):
            row["id"] = self.id
        row.update(
            {key: value for key, value in self.meta.items() if key not in MESSAGE_COLUMNS and key != "context_tail"}
        )
        if "assistant_msg" in self.meta and _parse_answer(row["assistant_msg"]) != self.answer:
            row["answer"] = answer_text(self.answer)
        return row

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Puzzle":
        """Parse a row of any variant.

        The correct labels are taken from the text column `answer`, or from the end of `assistant_msg` when the row has
        no such column. Raises UserError, with the part that is missing, when the messages are no CellPuzzles puzzle.

        >>> cells = "Cell 1: CD3D, IL7R\\nCell 2: CD79A, MS4A1"
        >>> request = "Match the cells above to one of the following cell types:\\nB cell\\nT cell"
        >>> user_msg = f"Context: The cell is from a female. \\n\\n{cells}\\n\\n{request}"
        >>> row = {"system_msg": "...", "user_msg": user_msg, "assistant_msg": "T cell | B cell"}
        >>> puzzle = Puzzle.from_row(row)
        >>> puzzle.cells
        [['CD3D', 'IL7R'], ['CD79A', 'MS4A1']]
        >>> puzzle.answer
        ['T cell', 'B cell']
        >>> puzzle.to_row() == row
        True
        """
        given = row
        if "assistant_msg" not in row:  # the authors' files of unseen diseases call the column `answer`
            row = {"assistant_msg" if key == "answer" else key: value for key, value in row.items()}
        missing = [column for column in MESSAGE_COLUMNS if not isinstance(row.get(column), str)]
        if missing:
            texts = ", ".join(name for name, value in given.items() if isinstance(value, str)) or "none"
            raise UserError(
                f"a puzzle row needs the text column(s) {', '.join(missing)} (for assistant_msg also answer, as "
                f"'T cell | B cell'); its text columns are {texts}"
            )
        variant, body, candidates = _split_request(row["user_msg"])
        context, tail, cells = _parse_body(body)
        has_answer = isinstance(row.get("answer"), str)
        answer = _parse_answer(row["answer" if has_answer else "assistant_msg"])
        if any("</think>" in label or "</answer>" in label for label in answer):
            raise UserError(
                "assistant_msg has text after its <answer> block, so its labels cannot be read; end it there, or give the "
                "correct labels in a text column answer"
            )
        _check_numbers(variant, len(cells), len(candidates), len(answer))
        # parquet gives None for a column that other rows have: it is no metadata of this row
        meta = {k: v for k, v in row.items() if k not in MESSAGE_COLUMNS and k != "id" and v is not None}
        # keep only what differs from our own rendering, so that an unchanged row renders back to the same bytes
        if row["system_msg"] != SYSTEM_MESSAGES[variant]:
            meta["system_msg"] = row["system_msg"]
        if has_answer:
            del meta["answer"]
        if row["assistant_msg"] != answer_text(answer):
            meta["assistant_msg"] = row["assistant_msg"]
        if tail != " ":
            meta["context_tail"] = tail
        return cls(
            id=id_text(row.get("id")) or content_id(row["user_msg"]),
            context=context,
            cells=cells,
            candidates=candidates,
            answer=answer,
            meta=meta,
        )


def content_id(user_msg: str) -> str:
    """The first 16 hex digits of the prompt's SHA-256."""
    return hashlib.sha256(user_msg.encode()).hexdigest()[:16]


def cell_ids_problem(puzzle: Puzzle) -> str | None:
    """What is wrong with the column `cell_ids` of a puzzle. None when nothing is, or the puzzle has no such column."""
    ids = puzzle.meta.get("cell_ids")
    if ids is None or isinstance(ids, list | tuple) and len(ids) == len(puzzle.cells):
        return None
    return f"{len(ids) if isinstance(ids, list | tuple) else repr(ids)} cell_ids for {len(puzzle.cells)} cells"


def _split_request(text: str) -> tuple[str, str, list[str]]:
    """(variant, text before the request, candidates) of a user message. The request begins at "Match the cells above".

    Raises UserError when there is no request.
    """
    for variant, head in (("batch", CANDIDATES_HEAD), ("cell", CELL_CANDIDATES_HEAD)):
        body, found, candidate_text = text.partition("\n\n" + head)
        if found:
            return variant, body, candidate_text.split("\n")
    if text.endswith("\n\n" + OPEN_REQUEST):
        return "open", text.removesuffix("\n\n" + OPEN_REQUEST), []
    raise UserError(f"the user message has no candidate list: no line {CANDIDATES_HEAD.strip()!r}")


def _parse_body(body: str) -> tuple[str, str, list[list[str]]]:
    """(context, context tail, cells) of the text before the request."""
    head, found, cell_text = body.rpartition("\n\n")
    if not found or not head.startswith(CONTEXT_HEAD):
        raise UserError(f"the user message does not begin with {CONTEXT_HEAD.strip()!r} and a blank line after it")
    cells = []
    for number, line in enumerate(cell_text.split("\n"), start=1):
        match = _CELL_LINE.fullmatch(line)
        if not match or int(match[1]) != number:
            raise UserError(f"line {number} of the cells is not 'Cell {number}: GENE, GENE, ...': {line[:60]!r}")
        cells.append([sys.intern(gene) for gene in match[2].split(", ")])  # else a text for each gene of each cell
    raw_context = head[len(CONTEXT_HEAD) :]
    context = raw_context.removesuffix(" ")
    return context, raw_context[len(context) :], cells


def id_text(value: Any) -> str:
    """An id of a row as text: of numbers too, also of those that pandas made floats; "" for None."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value)


def _check_numbers(variant: str, n_cells: int, n_candidates: int, n_answers: int) -> None:
    """Raise UserError when the numbers of cells, candidates and answers do not fit the variant."""
    found = f"{n_cells} cells, {n_candidates} candidates and {n_answers} answers"
    if variant == "batch" and not n_cells == n_candidates == n_answers:
        raise UserError(f"{found}: the three must be equal in number")
    if variant == "cell" and not (n_cells == n_answers == 1 and n_candidates > 1):
        raise UserError(f"{found}: a cell-level puzzle has one cell, two or more candidates and one answer")
    if variant == "open" and n_cells != n_answers:
        raise UserError(f"{n_cells} cells and {n_answers} answers: an open-ended puzzle has one answer per cell")


def _parse_answer(assistant_msg: str) -> list[str]:
    """The labels of an answer, or of the answer block at the end of a reasoning trace."""
    block = _ANSWER_BLOCK.search(assistant_msg)
    return [label.strip() for label in (block[1] if block else assistant_msg).split("|")]


def read_rows(
    path: str | os.PathLike,
    keep: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda row: row,
    glance: Callable[[str], dict[str, Any] | None] = lambda line: None,
) -> list[dict[str, Any]]:
    """All rows of a .parquet, .jsonl or .json file. Raises UserError with the name of the file and the line, if any.

    keep(row): what is wanted of a row, None for nothing. The rollouts of a long run are far larger than memory; of a .jsonl
    file no more than one row is held beside what is kept. glance(line): the row as far as it is wanted, where that can be told
    without parsing a line of a .jsonl file (of_other_steps); else None.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; name a .parquet, .jsonl or .json file in it")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".parquet":
            return _kept(_rows_of_parquet(path), keep)
        with open(path, encoding="utf-8-sig") as file:  # editors of Windows begin a file with a mark
            if path.suffix != ".json":
                return _kept(_rows_of_jsonl(path, file, glance), keep)
            text = file.read()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a file of puzzles; give a .parquet, .jsonl or .json file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read, is it damaged or without permission? ({reason_of(error)})") from None
    return _kept(_rows_of_json(path, text), keep)


def _kept(
    rows: Iterable[dict[str, Any]], keep: Callable[[dict[str, Any]], dict[str, Any] | None]
) -> list[dict[str, Any]]:
    return [wanted for row in rows if (wanted := keep(row)) is not None]


def _rows_of_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow  # here, not above: reading .jsonl must not wait for this import
    import pyarrow.parquet as parquet

    try:
        # pages of other writers without checksums are read as they are
        table = parquet.read_table(path, page_checksum_verification=True)
        rows = table.to_pylist()
        stated = (table.schema.metadata or {}).get(ROWS_SEAL)
        whole = stated is None or stated == _seal_of_rows(rows)
    except OSError as error:
        if error.errno:  # of the disk, not of pyarrow
            raise
        raise UserError(f"{path}: damaged, put a copy back or make it again ({' '.join(str(error).split())})") from None
    except (pyarrow.ArrowException, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{path}: not a parquet file, or a damaged one ({' '.join(str(error).split())})") from None
    if not whole:
        raise UserError(
            f"{path}: was changed or damaged after it was written (the checksum of its rows is another); put a copy back or "
            "make it again. Changed on purpose with pyarrow? Write it with table.replace_schema_metadata(None)"
        )
    return rows


def _seal_of_rows(rows: list[dict[str, Any]]) -> bytes:
    """A checksum of what was read or will be read: names of columns, values, their order."""
    crc = 0
    for row in rows:
        crc = zlib.crc32(json.dumps(row, default=str).encode(), crc)
    return b"%08x" % crc


def _rows_of_json(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}{_where(error)}: not JSON ({getattr(error, 'msg', error)})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: must be a list of rows, [{{...}}, ...]")
    return rows


def _where(error: ValueError) -> str:
    """The line that a parser of JSON names; it names none for numbers of thousands of digits, and nesting."""
    return f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""


def step_alone(line: str) -> dict[str, int] | None:
    """The step of a whole line of a run's .jsonl file that begins with it, unparsed; else None."""
    found = _STEP_FIRST.match(line) if line.endswith("}\n") else None
    return {"step": int(found[1])} if found else None


def of_other_steps(steps: Collection[int]) -> Callable[[str], dict[str, Any] | None]:
    """For `read_rows`: of a line of rollouts.jsonl whose step is not wanted, its step alone. steps: () if all are wanted.

    A line has thousands of numbers; to parse all of them for the rows of one step would take an hour of a long run.
    """

    def glance(line: str) -> dict[str, Any] | None:
        row = step_alone(line) if steps else None
        return row if row and row["step"] not in steps else None

    return glance


def _rows_of_jsonl(
    path: Path, lines: Iterable[str], glance: Callable[[str], dict[str, Any] | None]
) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):  # of a file: str.splitlines would also cut at U+2028
        if line == "\n":
            continue
        if (known := glance(line)) is not None:
            yield known
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({getattr(error, 'msg', error)})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: must be a row, {{...}}")
        try:
            row = unsealed_row(row)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; put a copy back, or remove that line") from None
        yield row


def read_puzzles(path: str | os.PathLike) -> list[Puzzle]:
    """The puzzles of a .parquet, .jsonl or .json file, ours or the published ones, in file order.

    Raises UserError with the file and number of the first row that is no puzzle, or when the file has no row.

    >>> puzzle = Puzzle(
    ...     id="blood-1",
    ...     context="The cell is from a female, originating from the blood.",
    ...     cells=[["CD3D", "IL7R"], ["CD79A", "MS4A1"]],
    ...     candidates=["B cell", "T cell"],
    ...     answer=["T cell", "B cell"],
    ... )
    >>> write_puzzles("puzzles.parquet", [puzzle])
    >>> for puzzle in read_puzzles("puzzles.parquet"):
    ...     print(puzzle.id, dict(zip(puzzle.answer, puzzle.cells)))
    blood-1 {'T cell': ['CD3D', 'IL7R'], 'B cell': ['CD79A', 'MS4A1']}
    """
    puzzles = []
    for number, row in enumerate(read_rows(path)):
        try:
            puzzles.append(Puzzle.from_row(row))
        except ValueError as error:
            raise UserError(f"{path}, row {number}: {error}") from None
    if not puzzles:
        raise UserError(f"{path}: holds no puzzle; build some with launch/build.py")
    return puzzles


def write_puzzles(path: str | os.PathLike, puzzles: Iterable[Puzzle]) -> None:
    """Write puzzles as .parquet or .jsonl, completely or not at all (temporary name, then rename).

    See `read_puzzles` for an example. Raises UserError for another file ending or a value that parquet cannot store.
    """
    write_rows(path, [puzzle.to_row() for puzzle in puzzles])


def write_rows(path: str | os.PathLike, rows: list[dict[str, Any]]) -> None:
    """Write rows as .parquet or .jsonl, completely or not at all. Raises UserError for another file ending."""
    if Path(path).suffix not in (".parquet", ".jsonl"):
        raise UserError(f"{path}: write puzzles to a name that ends in .parquet or .jsonl")
    with replacing(path) as partial:
        save_rows(partial, rows)


def save_rows(path: Path, rows: list[dict[str, Any]], like: Sequence[dict[str, Any]] = ()) -> None:
    """Write rows directly to `path`, for a folder that is renamed as a whole afterwards.

    like: example rows; a parquet file without rows gets their columns and types. Raises UserError, with the column's
    name, for values that parquet cannot store.
    """
    if path.suffix != ".parquet":
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(lines.encode("utf-8", "backslashreplace"))  # a cut answer may end in half a character
        return
    import pyarrow
    import pyarrow.parquet as parquet

    columns = {}
    # column by column, so that a value of the wrong type can be reported with its column
    for column in dict.fromkeys([*MESSAGE_COLUMNS, *(key for row in rows or like for key in row)]):
        values = [row.get(column) for row in rows or like]
        try:
            columns[column] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError) as error:
            why = " ".join(str(error).split())
            raise UserError(f"column {column!r} cannot be stored as parquet ({why}); write .jsonl instead") from None
    table = pyarrow.table(columns)
    try:
        table = table if rows else table.schema.empty_table()
        # two checksums: the format's own of every page, which other programs check too, and one that covers its index
        table = table.replace_schema_metadata({ROWS_SEAL: _seal_of_rows(table.to_pylist())})
        parquet.write_table(table, path, write_page_checksum=True)
    except pyarrow.ArrowException as error:
        why = " ".join(str(error).split())
        raise UserError(f"the rows cannot be stored as parquet ({why}); write .jsonl instead") from None


def shared_puzzles(held_out: Sequence[Puzzle], training: Sequence[Puzzle], by_donor: bool = True) -> str:
    """What held-out puzzles share with training: "2 donors (d1, d2)", "1 equal puzzle (test-1 and train-7)", or "".

    by_donor False: only equal puzzles count, for files of one donor whose cells were divided.
    """
    donors = [{puzzle.meta.get("donor") for puzzle in puzzles} for puzzles in (held_out, training)]
    shared = sorted(str(donor) for donor in (donors[0] & donors[1]) - {None}) if by_donor else []
    known = {puzzle.user_message: puzzle.id for puzzle in training}
    equal = [f"{puzzle.id} and {known[puzzle.user_message]}" for puzzle in held_out if puzzle.user_message in known]
    for found, what in ((shared, "donor"), (equal, "equal puzzle")):
        if found:
            names = ", ".join(found[:NAMED]) + (", ..." if len(found) > NAMED else "")
            return f"{len(found)} {what}{'s' if len(found) > 1 else ''} ({names})"
    return ""
