"""The last line of an .h5ad file of ours: a checksum of all bytes before it, so that a reader sees a flipped bit.

HDF5 does not read what follows its own end, so every program opens such a file; one that opens it to write cuts the line
off when it closes it. HDF5's own checksum (fletcher32) guards numbers in chunks only: no gene name, no label, no attribute.
A file that others wrote has no such line, and nothing can be said of its bits.
"""

import os
import re
from pathlib import Path

from data.errors import UserError
from data.files import crc32_of

LINE = "\nCRC-32 of the bytes before this line: {:08x}\n"
LENGTH = len(LINE.format(0))
_found_whole: set[tuple[int, ...]] = set()
"""What stands for the content of the files that this process has checked: a build opens a file ten times."""


def add_checksum(path: Path) -> None:
    """Append the line to a file that is written and closed."""
    crc = crc32_of(path)
    with open(path, "ab") as file:
        file.write(LINE.format(crc).encode())


def drop_checksum(path: Path) -> None:
    """Take the line away, before the file is changed. Without one: nothing."""
    if _stated(path) is not None:
        os.truncate(path, path.stat().st_size - LENGTH)


def refuse_damaged(path: Path) -> None:
    """Raises UserError when the bytes of a file are not those of which its last line has the checksum."""
    status = path.stat()
    content = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if content in _found_whole or (stated := _stated(path)) is None:
        return
    if crc32_of(path, status.st_size - LENGTH) != stated:
        raise UserError(
            f"{path}: was changed or damaged after it was written (its checksum is another); copy or make the file again"
        )
    _found_whole.add(content)


def is_as_written(path: Path) -> bool:
    """Does a file end in the line, and is it right? A program that writes to it, or writes it anew, leaves none."""
    stated = _stated(path)
    return stated is not None and crc32_of(path, path.stat().st_size - LENGTH) == stated


def refuse_edited(path: Path, as_written: bool) -> None:
    """Raises UserError unless a file that a command would replace is as the command wrote it: an owner's work would be lost."""
    if not as_written:
        raise UserError(
            f"{path}: was changed since it was written, and would be replaced; name another --out, or move it"
        )


def _stated(path: Path) -> int | None:
    """The checksum that the last line states; None without such a line."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) < LENGTH:
            return None
        file.seek(-LENGTH, os.SEEK_END)
        found = re.fullmatch(re.escape(LINE.format(0)).replace("0" * 8, "([0-9a-f]{8})").encode(), file.read())
    return int(found[1], 16) if found else None
