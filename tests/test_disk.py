"""Files are written whole or not at all, every value read is checked, and errors are one line."""
import argparse
import errno
import os
import sys

import pytest
import torch

from helpers import one_line, refuses
from lorasae.errors import InputError
from lorasae.io.console import count, one_line_errors
from lorasae.io.files import Fields, read_json, whole, write_bytes, write_json, write_tensors

FULL = OSError(28, "No space left on device")


def fail(*args, **kwargs):
    raise FULL


class FullDisk:
    """A file on a disk that fills up after `room` bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise FULL
        return self.file.write(data)

    def flush(self):
        self.file.flush()


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_is_reported_in_one_line_and_the_old_file_stays(tmp_path, monkeypatch, where):
    write_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(os, where, fail)
    with pytest.raises(InputError, match=f"cannot write {tmp_path}/a.json: No space left"):
        write_json(tmp_path / "a.json", {"new": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json") == {"old": 1}


@pytest.mark.parametrize("save", [
    lambda file: [file.write(b"123") for _ in range(10_000)],
    lambda file: torch.save({"a": torch.zeros(10_000)}, file),      # wraps it in a RuntimeError
])
@pytest.mark.parametrize("room", [0, 500, 20_000])
def test_a_disk_that_fills_up_while_writing_is_reported_in_one_line(tmp_path, save, room):
    with pytest.raises(InputError, match="a.pt: No space left"), whole(tmp_path / "a.pt") as file:
        save(FullDisk(file, room))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_that_is_not_the_disks_fault_passes_through(tmp_path, error):
    with pytest.raises(error), whole(tmp_path / "a.bin"):
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 300, "folder", "file/below", "/".join(["y" * 200] * 30)])
def test_a_name_that_cannot_be_written_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    with one_line(kind=(InputError, OSError)):
        write_bytes(tmp_path / name, b"data")
    assert not list(tmp_path.rglob("*.part"))


def test_a_long_name_is_written_and_what_a_file_system_cannot_do_does_no_harm(
        tmp_path, monkeypatch):
    write_bytes(tmp_path / ("ü" * 127), b"data")
    assert (tmp_path / ("ü" * 127)).read_bytes() == b"data"

    def not_permitted(*args, **kwargs):
        raise OSError(errno.EINVAL, "Invalid argument")
    for name in ("chmod", "fchmod", "chown", "utime", "fsync", "link", "symlink"):
        monkeypatch.setattr(os, name, not_permitted)
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("value", [float("nan"), {"a": [-float("inf")]}])
def test_a_number_that_is_not_finite_is_not_written_as_json(tmp_path, value):
    refuses("it would contain numbers that are not finite", write_json, tmp_path / "a.json", value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask, mode", [(0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", {})
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


def test_errors_name_the_inner_object_and_unexpected_values_are_refused():
    fields = Fields({"bool": True, "int": 3, "str": "s", "null": None, "dict": {"inner": "7"},
                     "long": "x" * 10_000}, "a.json")
    inner = fields.take("dict", dict)
    refuses("a.json, dict: inner is '7', but should be a whole", inner.take, "inner", int)
    refuses("a.json, dict lacks other", inner.take, "other", int)

    fields.only(str="s", bool=True, absent=1)
    for wrong in ({"str": "t"}, {"bool": 1}, {"int": True}, {"null": False}):
        refuses("a.json: .* but should be .*, equal to", fields.only, **wrong)
    refuses(r"^a.json: long is 'x+\.{3}x+', but should be", fields.take, "long", int)


@pytest.mark.parametrize("work, message", [
    (lambda folder: open(folder), "Is a directory: '/"),
    (lambda folder: read_json(folder / "a\nb"), r"No such file or directory: '/\S+/a\\nb'"),
    (lambda folder: fail(), "No space left on device"),
])
def test_a_file_that_cannot_be_read_gives_one_line_and_a_bug_keeps_its_traceback(
        tmp_path, work, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as stopped, one_line_errors():
        work(tmp_path)
    assert "\n" not in stopped.value.code
    with pytest.raises(ZeroDivisionError), one_line_errors():
        sys.exit(1 // 0)


@pytest.mark.parametrize("text, tokens", [
    ("15M", 15_000_000), ("2.01M", 2_010_000), ("1.07B", 1_070_000_000), ("16.1k", 16_100),
    ("1.5e6", 1_500_000), ("15_000_000", 15_000_000), ("7", 7)])
def test_token_counts_are_read_as_people_write_them(text, tokens):
    assert count(text) == tokens and type(count(text)) is int


@pytest.mark.parametrize("text", [
    "", "M", "0", "-1", "1.5", "1.0001k", "nan", "inf", "1e30", "1e999999", "many", "٣M", "_"])
def test_anything_but_a_token_count_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="not a positive number of tokens"):
        count(text)
