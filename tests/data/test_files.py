"""Files that are written completely or not at all."""

import errno
import os

import h5py
import pytest

from data.files import reason_of, replacing, require_free_space, write_whole


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
