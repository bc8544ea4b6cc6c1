"""Files and folders that are written completely or not at all, files that grow, locks, and hashes."""

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

import data.files
from data.clusters.annotated import holds_uns
from data.errors import UserError
from data.files import (
    LOCK,
    append_rows,
    appended_rows,
    lock_folder,
    model_hashes,
    read_sealed,
    reason_of,
    replacing,
    replacing_folder,
    require_free_space,
    sealed,
    sha256,
    unlock_folder,
    weights_hash,
    write_whole,
)
from data.formats.locks import open_hdf5
from tests.helpers.commands import ROOT


def test_a_file_takes_the_place_of_the_old_one_and_folders_are_made(tmp_path):
    path = tmp_path / "new/folder/a.txt"
    assert write_whole(path, "first\n") == path
    write_whole(path, "second \u2028 line\r\n")
    assert path.read_bytes() == b"second \xe2\x80\xa8 line\r\n" and os.listdir(path.parent) == ["a.txt"]


def test_what_fails_half_way_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.parquet"
    write_whole(path, b"old")
    with pytest.raises(KeyError), replacing(path) as partial:
        partial.write_bytes(b"half")
        assert partial.suffix == ".parquet" and partial.parent == tmp_path
        raise KeyError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.parquet"]


def test_where_nothing_can_be_written_the_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path, reason in ((tmp_path / "file/a.txt", "File exists|Not a directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=rf"^{path}: cannot be written \(({reason})\); make room or name another"):
            write_whole(path, "text")
    assert os.listdir(tmp_path) == ["file"]


def test_a_reason_is_one_line_whoever_said_it(tmp_path):
    assert reason_of(OSError(errno.ENOSPC, "file write failed:\n time = now")) == "No space left on device"
    assert reason_of(OSError("Can't close\nfile")) == "Can't close file"
    with (
        pytest.raises(ValueError, match=r"cannot be written \(Is a directory\)"),
        replacing(tmp_path / "a.h5ad") as partial,
    ):
        partial.mkdir()
        h5py.File(partial, "w")  # its message is a page long


def test_room_is_asked_for_before_the_disk_is_full(tmp_path):
    require_free_space(tmp_path, 1)
    with pytest.raises(OSError, match="No space left on device"):
        require_free_space(tmp_path, 10**18)


# ---- folders


def test_a_folder_takes_the_place_of_the_old_one_as_a_whole(tmp_path):
    path = tmp_path / "step-000002"
    for text in ("first", "second"):
        with replacing_folder(path) as partial:
            (partial / "training").mkdir()
            (partial / "training/a.txt").write_text(text)
            assert partial.name == "step-000002.partial" and (path.exists() == (text == "second"))
        assert (path / "training/a.txt").read_text() == text
    assert os.listdir(tmp_path) == ["step-000002"]


def test_a_folder_that_cannot_be_filled_frees_its_room_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "step-000002"
    with replacing_folder(path) as partial:
        (partial / "a.txt").write_text("old")
    with pytest.raises(UserError, match=rf"^{path}: cannot be written \(No space left on device\); make room"):
        with replacing_folder(path) as partial:
            (partial / "a.txt").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert (path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["step-000002"]


# ---- files that grow


def test_rows_are_appended_all_or_none_where_the_disk_is_full(tmp_path):
    """RLIMIT_FSIZE stands for the full disk: the second write ends in the middle of a row."""
    path = tmp_path / "metrics.jsonl"
    append_rows(path, [{"step": 1, "text": "e\u0301 \ud800"}])
    before = path.read_bytes()
    assert before == b'{"step": 1, "text": "e\xcc\x81 \\ud800"}\n' and json.loads(before)["text"] == "e\u0301 \ud800"
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        with pytest.raises(UserError, match=rf"^{path}: cannot be written \(File too large\); make room"):
            append_rows(path, [{"step": 2}, {"step": 3}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "tail",
    [
        b'{"step": 2, "text": "half of a \xc3',  # the first byte of a two-byte character
        b'{"step": 2, "parts": {"a": 1.0}',  # ends in an inner brace
        b'{"step": 2',
        b"\0" * 100,  # what a power cut leaves of a page that was never written
        b"[2]",
        b'{"step": 2, "text": "\xff"}\n',
        b'{"other": 2}\n',
    ],
)
def test_a_torn_last_line_is_left_out_and_said(tmp_path, tail, capsys):
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    assert list(appended_rows(path, lambda row: "step" in row)) == [(b'{"step": 1}\n', {"step": 1})]
    assert capsys.readouterr().err == f"note: {path}: its last line was cut off, and is left out\n"
    path.write_bytes(b'{"step": 1}\n' + tail.rstrip(b"\n") + b'\n{"step": 3}\n')
    with pytest.raises(
        UserError, match=rf"^{path}, line 2: is damaged; put a copy of the file back, or remove that line"
    ):
        list(appended_rows(path, lambda row: "step" in row))


def test_a_whole_last_line_counts_without_its_line_break(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xe2\x80\xa8"}\n{"text": ""}')  # U+2028 is no end of a line
    assert [row["text"] for _, row in appended_rows(tmp_path / "a.jsonl")] == ["\u2028", ""]
    assert [line[-1:] for line, _ in appended_rows(tmp_path / "a.jsonl")] == [b"\n", b"\n"]
    assert capsys.readouterr().err == ""


# ---- one writer per folder

HOLDER = """
import os, sys, time
from data.files import lock_folder
lock_folder(sys.argv[1])
if os.fork() == 0:
    time.sleep(1000)  # a child that outlives the holder
print(os.getpid(), flush=True)
time.sleep(1000)
"""


def test_a_folder_is_held_by_one_process_until_it_dies(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        text=True,
    )
    try:
        assert int(holder.stdout.readline()) == holder.pid
        with pytest.raises(
            UserError, match=rf"^{folder}: another run is writing there \(process {holder.pid} on .*\); wait"
        ):
            lock_folder(folder)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        deadline = time.monotonic() + 60
        while True:  # on a busy machine the child may not have run yet since its fork, and closes the lock when it does
            try:
                lock_folder(folder)  # although the child lives on, and the file is still there
                break
            except UserError:
                assert time.monotonic() < deadline
        lock_folder(folder)  # this process has it already
        unlock_folder(folder)
        assert os.listdir(folder) == []
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def test_a_lock_that_a_killed_run_leaves_to_its_child_for_an_instant_is_waited_for(tmp_path, monkeypatch):
    """Between its fork and its exec a child holds what its parent held; a run may be resumed just then."""
    handle = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    monkeypatch.setattr(data.files, "LOCK_PATIENCE", 300.0)
    threading.Timer(0.3, os.close, [handle]).start()
    lock_folder(tmp_path)
    unlock_folder(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_disk_without_locks_is_said_and_a_place_that_is_no_folder_refused(tmp_path, monkeypatch, capsys):
    def knows_none(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(data.files.fcntl, "flock", knows_none)
    lock_folder(tmp_path)
    assert "this disk knows no locks (No locks available), so nothing keeps a second run out" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be written \(Not a directory\)"):
        lock_folder(tmp_path / "file/run")


# ---- JSON and weights that name their faults


def test_a_sealed_file_shows_what_was_changed_or_cut(tmp_path):
    path, value = tmp_path / "state.json", {"step": 4, "crc32": {"a": 1}, "lr": 1e-6, "\u00e4": (1, None)}
    write_whole(path, json.dumps(sealed(value), indent=1))
    assert read_sealed(path) == {**value, "\u00e4": [1, None]}
    whole = path.read_text()
    for text, says in (
        (whole.replace('"step": 4', '"step": 6'), "was changed or damaged after it was written"),
        (whole[:-10], "damaged, not JSON"),
        ("", "damaged, not JSON"),
        ("[]", "holds no JSON object"),
        ("[" * 100_000, "damaged, not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"^{path}: {says}.*; put a copy back"):
            read_sealed(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="damaged, not JSON"):
        read_sealed(path)
    path.write_text('{"step": 4}')  # of a version without checksums
    assert read_sealed(path) == {"step": 4}
    path.unlink()
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\)"):
        read_sealed(path)


def test_weights_are_told_apart_by_a_sample_of_every_tensor(tmp_path, monkeypatch):
    """a: 6 blocks of bytes. What is sampled of a large file: its header, and the first, middle and last block of a tensor."""
    path = tmp_path / "model.safetensors"
    a, b = np.zeros(6 * 4096, np.uint8), np.arange(100, dtype=np.float32)

    def hash_of(**changed) -> str:
        save_file({"a": a, "b": b, **changed}, path)
        return weights_hash(path)

    assert hash_of() == sha256(path)  # read whole
    monkeypatch.setattr(data.files, "WHOLE", 1000)
    before = hash_of()
    assert before != sha256(path) and before == hash_of()
    assert hash_of(b=b + 1e-3) != before  # a tensor smaller than a block is read whole
    assert hash_of(a=a + 1) != before
    for place, seen in ((0, True), (3 * 4096, True), (6 * 4096 - 1, True), (4096, False), (5 * 4096 - 1, False)):
        changed = a.copy()
        changed[place] = 1
        assert (hash_of(a=changed) != before) == seen, place
    path.write_bytes(b"\xff" * 5000)
    with pytest.raises(UserError, match="damaged, its header cannot be read"):
        weights_hash(path)


def test_the_files_of_a_model_that_a_run_depends_on(tmp_path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    for name in (
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
        "config.json.bak",
        "consolidated.pth",
    ):
        (tmp_path / name).write_text("{}")
    found = model_hashes(tmp_path)
    assert set(found) == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "config.json.bak",
    }
    assert found["config.json"] == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # SHA-256 of {}
    assert model_hashes(tmp_path / "none") == {}


def test_a_backup_that_the_user_made_stays(tmp_path):
    (tmp_path / "model.old").mkdir()
    (tmp_path / "model.old/weights").touch()
    for _ in range(2):
        with replacing_folder(tmp_path / "model") as partial:
            (partial / "weights").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.old"} and (
        tmp_path / "model.old/weights"
    ).exists()


def test_a_disk_without_locks_is_no_other_program(tmp_path, monkeypatch):
    """h5py.File stands for one on NFS without a lock service; HDF5 goes on by itself only where the call does not exist."""
    path, real, number = tmp_path / "a.h5ad", h5py.File, errno.ENOLCK

    def file(path, mode, locking=True, **more):
        if locking:
            raise OSError(
                number, f"Unable to synchronously open file (unable to lock file, errno = {number}, error message"
            )
        return real(path, mode, **more)

    monkeypatch.setattr(h5py, "File", file)
    with open_hdf5(path, "w") as made:
        made["x"] = [1]
    assert holds_uns(path, "x") is False
    number = errno.EAGAIN
    with pytest.raises(OSError, match="unable to lock file, errno = 11") as held:
        open_hdf5(path, "r")
    assert reason_of(held.value).endswith("on a disk without locks set HDF5_USE_FILE_LOCKING=FALSE")
