"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path`, with its ending, to write to; flushed to disk and renamed when the block ends well.

    The folder is made where it is missing. Raises ValueError that names the file when it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be written ({reason}); make room or name another place") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, content: bytes | str) -> Path:
    """Write a file by `replacing`; text as UTF-8 with its line ends as they are."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)
