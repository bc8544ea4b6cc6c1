"""Files that are written completely or not at all, their hash, and the wording of disk errors."""

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
    """Yield a temporary path beside `path`, with the same ending, to write to.

    When the block ends without an exception, the file is flushed to disk and renamed to `path`. A missing folder is
    created. Raises UserError, with the file's name, when the file cannot be written.
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
    """Write a file with `replacing`. Text is encoded as UTF-8; its line ends are not changed."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


def flush(path: Path) -> None:
    """Wait until everything that was written to a file is on disk."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits. The file is read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def reason_of(error: OSError) -> str:
    """Why a file operation failed, on one line."""
    # HDF5 appends a page of its own to the message; strerror is the operating system's part
    return os.strerror(error.errno) if error.errno else " ".join(str(error).split())


def require_free_space(folder: Path, n_bytes: int) -> None:
    """Raise OSError when the disk of `folder` has less than `n_bytes` bytes free.

    Called before a write, because open files can then still be closed in order.
    """
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < n_bytes:  # some network disks report 0 total and 0 free bytes
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
