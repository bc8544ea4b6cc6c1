"""Files and folders written completely or not at all, .jsonl files that grow, the lock of a folder, hashes, and the wording
of disk errors."""

import atexit
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.processes import keep_from_children

POINTER = b"version https://git-lfs.github.com/"
"""How a file begins that Git LFS has left in place of a large one."""

INDEX = "model.safetensors.index.json"
"""Lists the weight files of a checkpoint that has several, and which tensor lies in which."""
LOCK = ".lock"
"""The file in a folder that the process which writes the folder holds locked."""
SEAL, ROW_SEAL = "checksum", "row_checksum"
"""The last key of a JSON file that was written with `sealed`, and of a line of a .jsonl file, with `sealed_row`."""
WHOLE = 64 << 20
"""`weights_hash` reads a file of weights up to this many bytes whole."""
READ_WITH_WEIGHTS = (
    *(
        "config.",
        "generation_config.",
        "tokenizer",
        "special_tokens",
        "added_tokens",
        "vocab",
        "merges",
        "chat_template",
    ),
)
"""How the names of the other files of a model begin on which a run depends."""
BLOCK = 4096
"""Bytes of each of the three places that `weights_hash` reads of a tensor in a larger file."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with the same ending, to write to.

    When the block ends without an exception, the file is flushed to disk and renamed to `path`. A missing folder is
    created. Raises UserError, with the file's name, when the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        with naming_what_cannot_be_written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            flush(partial)
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield NAME.partial, an empty folder beside `path`, to write files to.

    When the block ends without an exception, every file is flushed to disk and the folder takes the place of `path`, whose
    old content goes. Otherwise it is removed, which frees a full disk. After a kill NAME.partial stays; readers must ignore
    that name. Raises UserError, with the folder's name, when something cannot be written.
    """
    path = Path(path)
    # no name that a user gives to a backup, such as NAME.old
    partial, old = path.with_name(f"{path.name}.partial"), path.with_name(f".{path.name}.replaced")
    try:
        with naming_what_cannot_be_written(path):
            remove_folder(partial)  # of a process that was killed while it wrote
            partial.mkdir(parents=True)
            yield partial
            # before the rename, or a power cut could leave a visible folder of empty files
            for file in sorted(partial.rglob("*")):
                if file.suffix == ".safetensors":
                    file.chmod(usual_mode(partial))  # its library lets nobody but the owner read it
                flush(file)
            remove_folder(old)
            if path.exists():
                os.replace(path, old)  # a folder with files in it cannot be replaced
            os.replace(partial, path)
            flush(path.parent)
            remove_folder(old)
    finally:
        remove_folder(partial)


def usual_mode(folder: Path) -> int:
    """The mode that a new file gets in a folder, from the user's umask. Asking the umask itself would change it for a moment."""
    probe = folder / f".mode-{os.getpid()}"
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT, 0o666))
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()


def remove_folder(path: Path, must: bool = False) -> None:
    """Remove a folder and all in it. Of a symbolic link the link goes, and never what it points to.

    must: raise OSError when something cannot be removed; it is left there otherwise.
    """
    with contextlib.nullcontext() if must else contextlib.suppress(OSError):
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=not must)  # it does not follow the links inside


@contextlib.contextmanager
def naming_what_cannot_be_written(path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError in the block into a UserError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason_of(error)}); make room or name another place") from None


def write_whole(path: str | os.PathLike, content: bytes | str) -> Path:
    """Write a file with `replacing`. Text is encoded as UTF-8; its line ends are not changed.

    Half a character, with which an answer may end that was cut, is written as JSON writes it: \\ud83d.
    """
    with replacing(path) as partial:
        partial.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
    return Path(path)


def append_rows(
    path: str | os.PathLike, rows: Iterable[dict[str, Any]], sync: bool = False, seal: bool = False
) -> None:
    """Append rows to a .jsonl file, one JSON object per line: all of them, or none when the disk is full.

    seal: with a checksum in each (`sealed_row`). sync: return only when they are on disk, not just handed to the operating
    system; a power cut may else lose or tear them, which `appended_rows` sees. Raises UserError, with the file's name, when
    they cannot be written.
    """
    # half of a surrogate pair is no character in UTF-8; backslashreplace writes it as JSON does, \\ud800
    rows = map(sealed_row, rows) if seal else rows
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    left = text.encode("utf-8", "backslashreplace")
    with naming_what_cannot_be_written(path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        before = os.fstat(handle).st_size
        try:
            while left:  # os.write may take only a part
                left = left[os.write(handle, left) :]
            if sync:
                os.fsync(handle)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, before)  # a file gets shorter on a full disk too
            raise
        finally:
            os.close(handle)


def appended_rows(
    path: str | os.PathLike, is_row: Callable[[dict], bool] = lambda row: True, glance: Callable = lambda line: None
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line with its end, row without its checksum) of each line of a .jsonl file whose writer may have been killed.

    A last line that is cut off or cannot be read is left out, and a note on standard error says so. is_row(row): is the
    object one that the writer writes? glance(line): the row as far as it is wanted, or None to have it parsed.
    Raises UserError that names a damaged line before the last.
    """
    with open(path, "rb") as handle:  # bytes: a cut can leave half a character
        for number, line in enumerate(handle, start=1):
            try:
                row = glance(text := line.decode()) or unsealed_row(parse_json(text))
            except ValueError:
                row = None
            if row is not None and is_row(row):
                yield line if line.endswith(b"\n") else line + b"\n", row
            elif handle.peek(1):
                raise UserError(
                    f"{path}, line {number}: is damaged; put a copy of the file back, or remove that line to go on without it"
                )
            else:
                print(f"note: {path}: its last line was cut off, and is left out", file=sys.stderr, flush=True)


# ---- one writer per folder

_locked: dict[Path, tuple[int, list[int]]] = {}
"""{folder: (id of the process that holds it, [descriptor of its lock]; in a fork of that process [])}"""


LOCK_PATIENCE = 2.0
"""Seconds that a lock of another process may last before it counts as held."""


def take_lock(handle: int) -> None:
    """Lock an open file for this process alone. Raises BlockingIOError when another process keeps it LOCK_PATIENCE seconds.

    The kernel drops the lock of a killed process, though not at once where that process was just starting a child: the
    child holds every descriptor of its parent from its fork to its exec, and `--resume` may come between the two.
    """
    until = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def locked_or_said(handle: int, path: str | os.PathLike) -> bool:
    """take_lock; where the disk knows no locks (Lustre without flock), a note and False.

    path: named in the note.
    """
    return _or_said(take_lock, handle, path)


def wait_for_lock(handle: int, path: str | os.PathLike) -> bool:
    """Return once this process has the lock of an open file. As locked_or_said where the disk knows no locks."""
    return _or_said(lambda handle: fcntl.flock(handle, fcntl.LOCK_EX), handle, path)


def _or_said(lock: Callable[[int], object], handle: int, path: str | os.PathLike) -> bool:
    try:
        lock(handle)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        print(
            f"note: {path}: this disk knows no locks ({reason_of(error)}), so nothing keeps a second run out",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True


def lock_folder(folder: str | os.PathLike) -> None:
    """Make this process the only one that writes a folder, until it ends or calls `unlock_folder`. A missing folder is made.

    The operating system drops the lock when the process dies, however it dies. Raises UserError when another process has
    it. Where a network disk knows no locks (Lustre without flock), a note says so.
    """
    folder = Path(folder)
    path = folder.resolve() / LOCK
    if path.parent in _locked and _locked[path.parent][0] == os.getpid():
        return
    with naming_what_cannot_be_written(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            # writable: NFS locks nothing else. no link: the file that it points to would be emptied
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                known = locked_or_said(handle, folder)
            except BlockingIOError:
                who = os.read(handle, 300).decode(errors="replace").strip()
                os.close(handle)
                raise UserError(
                    f"{folder}: another run is writing there ({who or 'it has just begun'}); wait for its end, or name "
                    "another folder"
                ) from None
            except OSError:
                os.close(handle)
                raise
            if not known:
                os.close(handle)
                return
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    break
            os.close(handle)  # its holder removed the file between our open and our lock: that lock keeps nobody out
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    descriptors = [handle]
    keep_from_children(descriptors)  # a child that outlives this process must not hold the lock
    if not _locked:
        atexit.register(unlock_folders)
    _locked[path.parent] = (os.getpid(), descriptors)


def unlock_folder(folder: str | os.PathLike) -> None:
    """Let others write a folder that this process holds. Without a lock: nothing."""
    path = Path(folder).resolve()
    owner, descriptors = _locked.get(path, (0, []))
    if owner != os.getpid():  # a fork has the table of its parent
        return
    with contextlib.suppress(OSError):
        (path / LOCK).unlink()  # before the lock is free, or it could be another's by then
    del _locked[path]
    os.close(descriptors.pop())


def unlock_folders() -> None:
    """unlock_folder of all folders that this process holds."""
    for folder in list(_locked):
        unlock_folder(folder)


# ---- JSON that names its faults


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The value with a checksum of itself as its last key, so that `read_sealed` sees a change made later."""
    return {**value, SEAL: _seal_of(value)}


def sealed_row(row: dict[str, Any]) -> dict[str, Any]:
    """`sealed`, for a line of a .jsonl file."""
    return {**row, ROW_SEAL: _seal_of(row)}


def unsealed_row(row: Any) -> dict[str, Any]:
    """A parsed line without its checksum; lines of users and of older versions have none.

    Raises ValueError when it is no JSON object, or the checksum is that of another row.
    """
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    rest = {name: value for name, value in row.items() if name != ROW_SEAL}
    if ROW_SEAL in row and row[ROW_SEAL] != _seal_of(rest):
        raise ValueError("changed or damaged after it was written, its checksum is another")
    return rest


def _seal_of(value: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def read_sealed(path: Path, remedy: str = "put a copy back, or name another --out") -> dict[str, Any]:
    """The JSON object of a file of ours. A file of an older version has no checksum, and is read as it is.

    Raises UserError that names the file when it is missing, damaged, no JSON object, or was changed later.
    """
    try:
        found = parse_json(path.read_bytes().decode())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}); {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); {remedy}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object; {remedy}")
    rest = {name: value for name, value in found.items() if name != SEAL}
    if SEAL in found and found[SEAL] != _seal_of(rest):
        raise UserError(f"{path}: was changed or damaged after it was written (its {SEAL} is another); {remedy}")
    return rest


def parse_json(text: str | bytes) -> Any:
    """What json.loads gives; every complaint is a ValueError, also about brackets nested so deeply that Python gives up."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def seen_from(folder: Path, path: Path) -> Path:
    """A path of a run's settings: from a folder above `folder`, where the run may have begun; else as it stands."""
    # last the current folder: it may hold another run with the same names
    found = (place / path for place in (*folder.absolute().parents, Path()) if (place / path).exists())
    return next(found, path)


def refuse_folder_of_a_model(out: Path) -> None:
    """Raises UserError when a run's record, OUT/config.json, would be written over a model's, or over another command's."""
    path = out / "config.json"
    if (out / "adapter_config.json").exists() or (
        path.is_file() and not isinstance(read_settings(path).get("settings"), dict)
    ):
        raise UserError(
            f"--out {out}: holds a model, or the config.json of another command, which would be lost; name another folder"
        )


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object of a file that came with a model. Raises UserError that names the file and what is wrong with it."""
    refuse_pointer(path)
    text = path.read_bytes()
    if text.startswith(b"\xef\xbb\xbf"):  # a text editor's mark, which other programs do not expect in JSON
        raise UserError(f"{path}: begins with a byte order mark; save it as UTF-8 without one")
    try:
        found = parse_json(text)
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


WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".tflite", ".ckpt")
}


def files_beside_weights(model: str | Path) -> list[Path]:
    """The files of a checkpoint but for weights of any format, their index, and the state.json of a run."""
    files = [path for path in sorted(Path(model).iterdir()) if path.is_file() and path.name != "state.json"]
    return [path for path in files if not WEIGHT_SUFFIXES & set(path.suffixes)]  # all: model.safetensors.index.json


def model_hashes(model: str | Path) -> dict[str, str]:
    """{file name: hash} of a checkpoint's weights (`weights_hash`), settings, tokenizer and chat template.

    {} where there is no such folder. Raises UserError as weight_files does.
    """
    base = Path(model)
    if not base.is_dir():
        return {}
    others = [path for path in sorted(base.iterdir()) if path.is_file() and path.name.startswith(READ_WITH_WEIGHTS)]
    return {path.name: weights_hash(path) for path in weight_files(base)} | {path.name: sha256(path) for path in others}


def how_to_convert(model: str | Path) -> str:
    """How to save a checkpoint again, with transformers' names, as safetensors."""
    return (
        f"convert it: M = transformers.AutoModelForCausalLM.from_pretrained('{model}'); M.save_pretrained('NEW'), with the "
        "tokenizer's files beside it"
    )


def flush(path: Path) -> None:
    """Wait until everything that was written to a file, or the list of a folder's files, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits. The file is read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def crc32_of(path: Path, size: int | None = None) -> int:
    """CRC-32 of a file, or of its first `size` bytes. The file is read in blocks."""
    crc, left = 0, path.stat().st_size if size is None else size
    with open(path, "rb") as handle:
        while left and (block := handle.read(min(1 << 20, left))):
            crc, left = zlib.crc32(block, crc), left - len(block)
    return crc


def weights_hash(path: Path) -> str:
    """SHA-256 that tells a .safetensors file of weights from another, in well under a second for any size.

    It is that of the whole file up to WHOLE bytes; of a larger one, of its size, its header (names, shapes and places of
    the tensors) and three blocks of BLOCK bytes of every tensor: its first, its middle, its last. Weights that were trained
    on differ in nearly every number, so other weights are seen. A change of a few numbers between the blocks is not.
    Raises UserError when the header of a large file cannot be read.
    """
    size = path.stat().st_size
    if size <= WHOLE:
        return sha256(path)
    digest = hashlib.sha256(f"sampled {size} ".encode())
    with open(path, "rb") as handle:
        length = handle.read(8)  # little-endian, of the JSON header that follows
        header = handle.read(min(int.from_bytes(length, "little"), WHOLE))
        digest.update(length + header)
        try:
            tensors = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
            places = [tensors[name]["data_offsets"] for name in sorted(tensors)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: damaged, its header cannot be read; copy the file again") from None
        for start, end in places:
            for place in (start, (start + end) // 2, end - BLOCK):
                place = max(start, place)
                handle.seek(8 + len(header) + place)
                digest.update(handle.read(min(BLOCK, end - place)))
    return digest.hexdigest()


def reason_of(error: OSError) -> str:
    """Why a file operation failed, on one line."""
    # HDF5 appends a page of its own to the message; strerror is the operating system's part
    text = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
    return text + "; on a disk without locks set HDF5_USE_FILE_LOCKING=FALSE" * ("unable to lock file" in str(error))


def full_disk(error: OSError) -> str:
    """The sentence for a disk that is full or read-only, whatever was being written, standard output too; "" otherwise."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return ""
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}cannot be written ({reason_of(error)}); make room or give permission"


def require_free_space(folder: Path, n_bytes: int) -> None:
    """Raise OSError when the disk of `folder` has less than `n_bytes` bytes free.

    Called before a write, because open files can then still be closed in order.
    """
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < n_bytes:  # some network disks report 0 total and 0 free bytes
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
