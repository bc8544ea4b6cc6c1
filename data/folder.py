"""A folder of puzzles on disk: a file per split and report.json. A build writes it whole; other commands read it back.

puzzles/train.parquet  test.parquet  unseen.parquet  report.json  labels.json
.puzzles.building/     finished files of a build that is running, or was stopped (data/build/staging.py)
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.build.contexts import stated_in
from data.build.staging import Staging
from data.clusters.known import LABELS, PUZZLE_OPTIONS, STATES, USUAL, KnownLabel, KnownLabels
from data.errors import UserError
from data.files import flush, locked_or_said, parse_json, reason_of, remove_folder
from data.puzzles import Puzzle, read_puzzles, read_rows, save_rows

FORMATS = {"parquet": ("parquet",), "jsonl": ("jsonl",), "both": ("parquet", "jsonl")}
"""{value of --format: endings of the files of puzzles}"""
COUNTS = {str: int}
REPORT = {
    "options?": dict,
    "versions?": dict,
    "command?": (str, list),
    "notes?": [str],
    "splits?": {str: {"puzzles?": int}},
    "files": [
        {
            "cells_dropped?": COUNTS,
            "cells_set_aside?": COUNTS,
            "groups_skipped?": COUNTS,
            "notes?": [str],
            "splits?": {str: {"quota_left?": COUNTS, "puzzles_with_a_cell_without_genes?": int}},
        }
    ],
    "audit?": {
        "rules": {str: (int, float)},
        "splits": [{"name": str, "puzzles": int, "donors": int, "cells": int, "distinct_cells": int}],
        "pairs": [
            {
                "first": str,
                "second": str,
                "shared_cells": int,
                "puzzles_with_shared_cell": int,
                "share_with_shared_cell": (int, float),
                "shared_donors?": list,
                "near_duplicate_lists": int,
                "same_batches": int,
            }
        ],
        "leaks": [str],
        "warnings": [str],
    },
}
"""The parts of a build's report.json that the data card (data/card.py) reads, in the notation of `fits_shape`."""


def read_splits(files: Sequence[str]) -> dict[str, list[Puzzle]]:
    """{name: puzzles} of files of puzzles.

    The name is the file's stem, with its folder or a number where two stems are equal.

    An empty file is an empty split: a build without unseen puzzles writes one. Raises UserError that names the file
    (and row) that does not hold puzzles, or says that none of the files holds a puzzle.
    """
    places = [(Path(os.path.abspath(file)).parent.name, Path(file).stem) for file in files]
    splits: dict[str, list[Puzzle]] = {}
    for i, (file, (folder, stem)) in enumerate(zip(files, places, strict=True)):
        ambiguous = any(other == stem and beside != folder for beside, other in places)
        number = 1 + places[:i].count((folder, stem))
        name = (f"{folder}/{stem}" if ambiguous else stem) + (f" ({number})" if number > 1 else "")
        name = f"{folder}/{stem}" if name == "total" and len(files) > 1 else name  # the sum has that name
        splits[name] = read_puzzles(file) if read_rows(file) else []
    if not any(splits.values()):
        raise UserError(f"{files[0]}: holds no puzzle; build some with launch/build.py")
    return splits


def report_beside(files: Iterable[str], say: Callable[[str], None] = print) -> dict[str, Any] | None:
    """The report.json in the folder of the files.

    None when they are in several folders, or the folder has no build's report.
    """
    folders = {Path(os.path.abspath(file)).parent for file in files}
    found = folders.pop() / "report.json"
    if folders or not found.is_file():
        return None
    try:
        return read_report(found)
    except UserError:
        say(f"note: {found} is not the report of a build, and is left out")
        return None


def read_report(path: str | Path | None) -> dict[str, Any] | None:
    """The report.json of a build. None if path is None.

    Raises UserError that names the file when it is absent or no such report.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise UserError(f"--report {path}: no such file")
    try:
        report = parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        report = None
    if not fits_shape(report, REPORT):
        raise UserError(f"--report {path}: not the report.json of a build; leave the option out to do without")
    return report


def fits_shape(value: Any, shape: Any) -> bool:
    """Does a value of a JSON file have this shape?

    shape: a type, or a tuple of types; [shape] for a list of values of that shape; {str: shape} for an object whose
    values have that shape; another dict gives the shape of each key, where a key that ends in ? may be absent or null.
    """
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits_shape(item, shape[0]) for item in value)
    if not isinstance(shape, dict):
        return isinstance(value, shape)
    if not isinstance(value, dict):
        return False
    if str in shape:
        return all(fits_shape(item, shape[str]) for item in value.values())
    return all(
        (key[-1] == "?" and value.get(key.rstrip("?")) is None) or fits_shape(value.get(key.rstrip("?")), of_key)
        for key, of_key in shape.items()
    )


def write_build(
    out: Path, splits: dict[str, list[Puzzle]], report: dict[str, Any], formats: tuple[str, ...] = ("parquet",)
) -> None:
    """Write a file per split, report.json, and the labels of the train puzzles, into the folder `out`.

    All files go into a sibling folder first, so that none is ever half-written. Files that an older build wrote in
    another format are removed, because the new report does not describe them.
    """
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    example = next((puzzles[:1] for puzzles in splits.values() if puzzles), [])  # an empty split gets the same columns
    try:
        partial.mkdir(parents=True)
        for split, puzzles in splits.items():
            for ending in formats:
                rows = [puzzle.to_row() for puzzle in puzzles]
                save_rows(partial / f"{split}.{ending}", rows, like=[puzzle.to_row() for puzzle in example])
        if "labels" in report:
            text = labels_text(report["labels"], splits["train"], report["options"])
            (partial / LABELS).write_text(text, encoding="utf-8")
        (partial / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        out.mkdir(exist_ok=True)
        # the report last, and an older one gone first: who finds it finds all, and nothing of another build
        files = sorted(partial.iterdir(), key=lambda file: (file.name == "report.json", file.name))
        for file in files:
            flush(file)
        (out / "report.json").unlink(missing_ok=True)
        for file in files:
            os.replace(file, out / file.name)
        for ending in FORMATS["both"]:
            for split in splits if ending not in formats else ():
                (out / f"{split}.{ending}").unlink(missing_ok=True)
    finally:
        remove_folder(partial)


def labels_text(labels: dict[str, dict[str, Any]], train: list[Puzzle], options: dict[str, Any]) -> str:
    """labels.json: the labels of the report, the genes and facts of the train puzzles, the options of their build."""
    genes = {gene for puzzle in train for cell in puzzle.cells for gene in cell}
    known = {label: KnownLabel(**of_label) for label, of_label in labels.items()}
    puzzles = {name: options[name] for name in PUZZLE_OPTIONS}
    puzzles |= {name: options[name] for name, usual in USUAL.items() if options.get(name, usual) != usual}
    stated = [stated_in(context) for context in {puzzle.context for puzzle in train}]
    puzzles |= {STATES: sorted(set.intersection(*stated))} if stated and set.intersection(*stated) else {}
    return KnownLabels(known, sorted(genes), puzzles=puzzles).to_json()


def _without_report(out: Path) -> list[str]:
    """The names of files of puzzles in a folder without report.json: of somebody else, or of a build that was killed."""
    puzzles = [f"{split}.{ending}" for split in ("train", "test", "unseen") for ending in FORMATS["both"]]
    return [name for name in puzzles if (out / name).exists()] if not (out / "report.json").is_file() else []


@contextlib.contextmanager
def staged(out: Path, resume: bool) -> Iterator[Staging]:
    """The folder beside `out` that keeps the finished files of a build, locked: one build at a time may write there.

    It stays when a build ends early with some files finished. resume: use the finished files that are there; else they
    are dropped. Raises UserError when another build holds the lock.
    """
    staging = Staging(out.with_name(f".{out.name}.building"))
    if staging.folder.is_symlink():  # files are removed in it
        raise UserError(f"--out {out}: {staging.folder} is a symbolic link; remove it, or name another folder")
    if (found := _without_report(out)) and not staging.folder.exists():
        raise UserError(f"--out {out}: {found[0]} is there without the report.json of a build; name another folder")
    existed = staging.folder.parent.exists()
    staging.folder.mkdir(parents=True, exist_ok=True)
    with open(os.open(staging.folder / "lock", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w") as lock:
        try:
            locked_or_said(lock.fileno(), out)
        except BlockingIOError:
            raise UserError(
                f"--out {out}: another build is writing there; wait for it, or name another folder"
            ) from None
        if not resume and (left := staging.finished()):
            print(f"note: {left} finished files of a build that was stopped are dropped (--resume would use them)")
            staging.drop_files()
        try:
            yield staging
        finally:
            # where files of puzzles have no report, the folder says that they are a build's
            if not staging.finished() and not _without_report(out):
                staging.remove()
                if not existed:
                    with contextlib.suppress(OSError):  # not empty: it is somebody's
                        staging.folder.parent.rmdir()
            elif sys.exc_info()[0] is not None:
                print(f"note: {staging.finished()} finished files are kept; --resume uses them", file=sys.stderr)


@contextlib.contextmanager
def naming_the_file(out: Path, files: Sequence[str] = ()) -> Iterator[None]:
    """Turn an OSError in the block into a UserError that names `out`, or the one of `files` that cannot be read."""
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out}: is a file, not a folder")
        yield
    except BrokenPipeError:
        raise  # the reader of our output is gone: click ends the process without a message
    except OSError as error:
        reason = reason_of(error)
        if error.filename is not None and str(error.filename) in {str(Path(file)) for file in files}:
            raise UserError(
                f"{error.filename}: cannot be read ({reason}); give permission, or name another file"
            ) from None
        raise UserError(
            f"--out {out}: cannot be written ({reason}); make room or give permission, or name another folder"
        ) from None
