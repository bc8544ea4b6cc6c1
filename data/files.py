"""Files written completely or not at all, their hash, the files of a checkpoint, and the wording of disk errors."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import UserError

POINTER = b"version https://git-lfs.github.com/"
"""How a file begins that Git LFS has left in place of a large one."""

INDEX = "model.safetensors.index.json"
"""Lists the weight files of a checkpoint that has several, and which tensor lies in which."""


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


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object of a file that came with a model. Raises UserError that names the file and what is wrong with it."""
    refuse_pointer(path)
    text = path.read_bytes()
    if text.startswith(b"\xef\xbb\xbf"):  # a text editor's mark, which other programs do not expect in JSON
        raise UserError(f"{path}: begins with a byte order mark; save it as UTF-8 without one")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); copy the file again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object; copy the file again")
    return found


def refuse_pointer(path: Path) -> None:
    """Raises UserError if a file is a pointer of Git LFS, as a clone leaves it where git-lfs is not installed."""
    try:
        with open(path, "rb") as handle:
            begins = handle.read(len(POINTER))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}); copy it again") from None
    if begins == POINTER:
        raise UserError(f"{path}: is a pointer of Git LFS in place of the file; run `git lfs pull` in {path.parent}")


def weight_files(base: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the files of its index, else model.safetensors, else all.

    Raises UserError if there is none, or if one is missing.
    """
    if (base / INDEX).is_file():
        files = sorted({base / name for name in read_settings(base / INDEX)["weight_map"].values()})
    else:
        # not all files at once: some checkpoints hold the same weights twice, once in their authors' own format
        single = base / "model.safetensors"
        files = [single] if single.is_file() else sorted(base.glob("*.safetensors"))
    if not files and any(base.glob("pytorch_model*.bin")):
        raise UserError(f"{base}: its weights are in .bin files, and safetensors are needed; {how_to_convert(base)}")
    if not files:
        raise UserError(f"{base}: no .safetensors file there; name a Hugging Face checkpoint folder")
    if missing := [path for path in files if not path.is_file()]:
        raise UserError(f"{missing[0]}: is missing, though {INDEX} names it; download the checkpoint again")
    return files


def how_to_convert(model: str | Path) -> str:
    """How to save a checkpoint again, with transformers' names, as safetensors."""
    return (
        f"convert it: M = transformers.AutoModelForCausalLM.from_pretrained('{model}'); M.save_pretrained('NEW'), with the "
        "tokenizer's files beside it"
    )


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
