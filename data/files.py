"""Files that are written whole or not at all, and what is asked of files anywhere."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data.errors import UserError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path`, with its ending, to write to; flushed to disk and renamed when the block ends well.

    The folder is made where it is missing. Raises UserError that names the file when it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        flush(partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason_of(error)}); make room or name another place") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, content: bytes | str) -> Path:
    """Write a file by `replacing`; text as UTF-8 with its line ends as they are."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


def flush(path: Path) -> None:
    """Wait until what was written to a file is on disk."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def sha256(path: Path) -> str:
    """Of a file's bytes, read in blocks; as hex digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def reason_of(error: OSError) -> str:
    """The operating system's words, on one line: HDF5 adds a page of its own to them."""
    return os.strerror(error.errno) if error.errno else " ".join(str(error).split())


def require_free_space(folder: Path, n_bytes: int) -> None:
    """Raise OSError where the disk has less room than that, while what is open on it can still be closed in order."""
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < n_bytes:  # some network disks say 0 of both
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
