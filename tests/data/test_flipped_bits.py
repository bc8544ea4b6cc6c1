"""A flipped bit in a file of ours: what is read is what was written, or one sentence names the file. Never another value."""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest

from data.atlas.simulate import write_atlas
from data.atlas.stream import stream_atlas
from data.build.h5ad import open_h5ad, read_column
from data.clusters.annotated import write_annotated
from data.distill.distill import Completion
from data.distill.meter import Meter
from data.distill.responses import RawFile
from data.errors import UserError
from data.files import ROW_SEAL, append_rows, appended_rows, sealed_row, unsealed_row
from data.formats.checksum import LENGTH, add_checksum, drop_checksum, refuse_damaged
from data.puzzles import Puzzle, read_puzzles, read_rows, write_puzzles
from eval.predict import Partial


def flips(content: bytes, n: int, seed: int = 0) -> Iterator[bytes]:
    """The content with one flipped bit, `n` times, at random places; the last 30 bytes always among them."""
    rng = random.Random(seed)
    last = range(max(0, len(content) - 30), len(content))
    for place in [*last, *(rng.randrange(len(content)) for _ in range(n - len(last)))]:
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        yield bytes(changed)


def outcomes(path: Path, n: int, read: Callable[[], object]) -> tuple[int, int]:
    """(refused, read as written) over flips of the file. read: what is compared. Any other outcome fails."""
    whole, right = path.read_bytes(), repr(read())
    refused = same = 0
    for changed in flips(whole, n):
        path.write_bytes(changed)
        try:
            found = repr(read())
        except UserError as error:
            assert path.name in str(error) and "\n" not in str(error), error
            refused += 1
        else:
            assert found == right, "another value was read"
            same += 1
    path.write_bytes(whole)
    assert repr(read()) == right
    return refused, same


def some_puzzles(n: int) -> list[Puzzle]:
    return [
        Puzzle(
            id=f"p{i}",
            context="The cell is from a female, originating from the blood.",
            cells=[[f"GENE{i}", "IL7R"], ["CD79A", f"MS4A{i}"]],
            candidates=["B cell", "T cell"],
            answer=["T cell", "B cell"] if i % 2 else ["B cell", "T cell"],
            meta={"donor": f"D{i % 3}", "age": i, "cell_ids": [f"a{i}", f"b{i}"]},
        )
        for i in range(n)
    ]


@pytest.mark.slow(4)
def test_a_flipped_bit_in_puzzles_is_refused(tmp_path):
    path = tmp_path / "p.parquet"
    write_puzzles(path, some_puzzles(30))
    refused, same = outcomes(path, 500, lambda: read_rows(path))
    # the index of so small a file is most of it, and the statistics there concern no value
    assert refused > 150 and same > 150
    # every page has the format's own checksum, which other programs check too
    column = pyarrow.parquet.read_metadata(path).row_group(0).column(1)
    changed = bytearray(path.read_bytes())
    changed[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1] ^= 1
    path.write_bytes(changed)
    with pytest.raises(UserError, match=r"p\.parquet: damaged, put a copy back .*CRC checksum verification failed"):
        read_puzzles(path)


def test_the_index_of_a_parquet_file_is_covered_too(tmp_path):
    """No page has the name of a column: the checksum of the rows sees that it is another."""
    path = tmp_path / "p.parquet"
    write_puzzles(path, some_puzzles(3))
    table = pyarrow.parquet.read_table(path)
    renamed = table.rename_columns(["ids" if name == "id" else name for name in table.column_names])
    pyarrow.parquet.write_table(renamed.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(UserError, match=r"p\.parquet: was changed or damaged .*the checksum of its rows is another"):
        read_rows(path)
    pyarrow.parquet.write_table(table.replace_schema_metadata(None), path)  # of another writer, or an older version
    assert read_puzzles(path) == some_puzzles(3)


def test_puzzles_filtered_on_purpose_are_read_when_the_checksum_is_left_out(tmp_path):
    """pyarrow keeps the metadata of a table that it filters; pandas does not."""
    written = some_puzzles(4)
    write_puzzles(tmp_path / "p.parquet", written)
    half = pyarrow.parquet.read_table(tmp_path / "p.parquet").slice(0, 2)
    pyarrow.parquet.write_table(half, tmp_path / "half.parquet")
    with pytest.raises(UserError, match=r"half\.parquet: .*Write it with table\.replace_schema_metadata\(None\)"):
        read_puzzles(tmp_path / "half.parquet")
    pyarrow.parquet.write_table(half.replace_schema_metadata(None), tmp_path / "half.parquet")
    assert read_puzzles(tmp_path / "half.parquet") == written[:2]
    pd.read_parquet(tmp_path / "p.parquet").head(2).to_parquet(tmp_path / "pandas.parquet")
    assert [puzzle.id for puzzle in read_puzzles(tmp_path / "pandas.parquet")] == [p.id for p in written[:2]]


@pytest.mark.slow(3)
@pytest.mark.parametrize("text", ["Cell 1 is a T cell.", 'é \ud800 \u2028 "{}\\'], ids=["ascii", "odd"])
def test_a_flipped_bit_in_a_raw_response_is_refused(tmp_path, text):
    path = tmp_path / "t.raw.jsonl"

    def opened() -> RawFile:
        return RawFile(path, {"teacher": "x"}, Meter(), resume=path.exists(), replace=False, sync=False)

    with opened() as raw:
        for i in range(5):
            raw.append(Completion(puzzle_id=f"p{i}", attempt=0, hinted=False, text=f"{text} {i}", completion_tokens=i))

    def read() -> list[Completion]:
        with opened() as raw:
            return list(raw.completions.values())

    whole = path.read_bytes()
    assert len(read()) == 5 and whole.count(ROW_SEAL.encode()) == 6
    for changed in flips(whole, 800):
        path.write_bytes(changed)
        try:
            found = read()
        except UserError as error:
            # a flip of a number's or a name's first bits can make the settings another run's
            assert re.search(r"t\.raw\.jsonl(, line [1-6]: damaged|: already)", str(error)), error
        else:
            # without its end a line counts as cut off by a kill, which a note says
            assert found == [done for done in found if done.text.startswith(text)] and len(found) >= 4


def test_raw_responses_of_older_versions_are_read(tmp_path):
    path = tmp_path / "t.raw.jsonl"
    old = {"puzzle_id": "p0", "attempt": 0, "hinted": False, "text": "old", "finish_reason": "stop", "model": "m"}
    old |= {"prompt_tokens": None, "completion_tokens": None}
    path.write_text(json.dumps({"settings": {"teacher": "x"}}) + "\n" + json.dumps(old) + "\n")
    with RawFile(path, {"teacher": "x"}, Meter(), resume=True, replace=False, sync=False) as raw:
        assert [done.text for done in raw.completions.values()] == ["old"]
        raw.append(Completion(puzzle_id="p1", attempt=0, hinted=False, text="new"))
    with RawFile(path, {"teacher": "x"}, Meter(), resume=True, replace=False, sync=False) as raw:
        assert [done.text for done in raw.completions.values()] == ["old", "new"]


def test_a_cut_last_response_is_said(tmp_path, capsys):
    path = tmp_path / "t.raw.jsonl"
    for resume in (False, True):
        with RawFile(path, {"teacher": "x"}, Meter(), resume=resume, replace=False, sync=False) as raw:
            raw.append(Completion(puzzle_id=f"p{resume}", attempt=0, hinted=False, text="a"))
    path.write_bytes(path.read_bytes()[:-1])
    with RawFile(path, {"teacher": "x"}, Meter(), resume=True, replace=False, sync=False) as raw:
        assert len(raw.completions) == 1
    assert capsys.readouterr().err == f"note: {path}: its last line was cut off, and is left out\n"


@pytest.mark.slow(2)
def test_a_flipped_bit_in_an_answer_or_a_rollout_is_refused(tmp_path):
    rows = [
        {"id": f"p{i}", "prediction": f"<answer>B cell | T cell {i}</answer>", "response_tokens": i} for i in range(6)
    ]
    partial = Partial(tmp_path / "eval", {"model": "m"}, resume=False)
    partial.add(rows[:3])
    partial.add(rows[3:])
    path = partial.path

    def answers() -> list[dict]:
        found = Partial(tmp_path / "eval", {"model": "m"}, resume=True).rows
        # the last line may be left out, which a note says; a key that is not known changes no answer
        return [found.get(f"p{i}", {}).get("prediction") for i in range(5)]

    refused, same = outcomes(path, 400, answers)
    assert refused > same
    rollouts = tmp_path / "rollouts.jsonl"
    append_rows(rollouts, [{"step": i, "completion": f"Cell {i}", "reward": i / 3} for i in range(6)], seal=True)
    refused, same = outcomes(rollouts, 300, lambda: [row["completion"] for row in read_rows(rollouts)])
    assert refused > same
    streamed = lambda: [(row["step"], row["completion"], row["reward"]) for _, row in appended_rows(rollouts)][:5]  # noqa: E731
    outcomes(rollouts, 300, streamed)


def test_a_sealed_row_is_the_row():
    row = {"b": 1e-7, "a": [1, None, {"z": "\ud83d", "y": float("inf")}], "\u00e4": True}
    line = json.dumps(sealed_row(row))
    assert list(json.loads(line)) == ["b", "a", "\u00e4", "row_checksum"] and unsealed_row(json.loads(line)) == row
    assert unsealed_row({"a": 1}) == {"a": 1}
    for other in (line.replace("1e-07", "1e-06"), line.replace("true", "null"), line.replace('"b"', '"c"')):
        with pytest.raises(ValueError, match="checksum is another"):
            unsealed_row(json.loads(other))
    with pytest.raises(ValueError, match="no JSON object"):
        unsealed_row([])


@pytest.mark.slow(3)
def test_a_flipped_bit_in_an_atlas_of_ours_is_refused(tmp_path):
    path = tmp_path / "a.h5ad"
    write_atlas(path, 6, 0, cells_per_type=1, n_types=12)

    def read() -> tuple:
        with open_h5ad(path) as file:
            return file["X/data"][:].sum(), list(file["var/_index"][:]), read_column(file, "obs", "cell_type", path)

    whole, right = path.read_bytes(), repr(read())
    for number, changed in enumerate(flips(whole, 200)):
        path.write_bytes(changed)
        if number < 30:  # the line itself: without it, or with another checksum, the cells are the same
            try:
                assert repr(read()) == right
            except UserError as error:
                assert "a.h5ad: was changed or damaged" in str(error)
        else:
            with pytest.raises(UserError, match=r"a\.h5ad: was changed or damaged after it was written"):
                read()
    path.write_bytes(whole[:-LENGTH])  # as others write it
    assert repr(read()) == right
    with pytest.raises(UserError, match="a.h5ad: was changed since it was written, and would be replaced"):
        stream_atlas(path, n_donors=6, cells=400, n_types=12)
    path.unlink()
    stream_atlas(path, n_donors=6, cells=400, n_types=12)
    assert path.read_bytes()[-LENGTH:].startswith(b"\nCRC-32 of the bytes before this line: ")
    refuse_damaged(path)


def test_labels_are_written_with_a_checksum_that_other_programs_pass_over(tmp_path):
    source, out = tmp_path / "mine.h5ad", tmp_path / "out.h5ad"
    names = pd.Index([f"c{i}" for i in range(20)])
    anndata.AnnData(np.eye(20, dtype=np.float32), obs=pd.DataFrame({"k": list("ab") * 10}, index=names)).write_h5ad(
        source
    )
    add_checksum(source)  # as if we had simulated it
    write_annotated(source, out, {"type": np.array(["T", "B"] * 10)}, {"by": "test"})
    assert out.read_bytes().count(b"CRC-32 of the bytes") == 1
    assert list(anndata.read_h5ad(out).obs["type"][:2]) == ["T", "B"]
    assert anndata.read_h5ad(out, backed="r").X[3, 3] == 1
    changed = bytearray(out.read_bytes())
    changed[changed.index(b"_index")] ^= 1
    out.write_bytes(changed)
    with pytest.raises(UserError, match=r"out\.h5ad: was changed or damaged"), open_h5ad(out):
        pass


def test_a_program_that_writes_the_file_takes_the_checksum_away(tmp_path):
    """HDF5 cuts the file to its own length: a line of older bytes would refuse a good file."""
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(10)
    for change in (lambda file: file["x"].__setitem__(0, 7), lambda file: file.create_dataset("y", data=[1] * 999)):
        add_checksum(path)
        refuse_damaged(path)
        with h5py.File(path, "r+") as file:
            change(file)
        assert b"CRC-32" not in path.read_bytes()
        refuse_damaged(path)
    size = path.stat().st_size
    add_checksum(path)
    drop_checksum(path)
    drop_checksum(path)
    assert path.stat().st_size == size
    (tmp_path / "short.h5ad").write_bytes(b"1")
    refuse_damaged(tmp_path / "short.h5ad")
