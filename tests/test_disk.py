"""Small files: whole or not at all, and every value checked where it is taken."""
import json
import os

import pytest
import torch

from lorasae.errors import InputError
from lorasae.io import files as disk
from lorasae.io.files import Fields, read_bytes, read_json, read_object, whole, write_bytes, write_json
from lorasae.io.files import is_finite

FULL = OSError(28, "No space left on device")


def fail(*args, **kwargs):
    raise FULL


class FullDisk:
    """A file on a disk that fills up after so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise FULL
        return self.file.write(data)

    def flush(self):
        self.file.flush()


# ---- Writing ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ["fsync", "replace", "chmod"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, where):
    write_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(os, where, fail)
    with pytest.raises(InputError, match=f"cannot write {tmp_path}/a.json: No space left on device"):
        write_json(tmp_path / "a.json", {"new": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and read_json(tmp_path / "a.json") == {"old": 1}


def test_a_disk_that_fills_up_in_the_middle_is_one_line(tmp_path):
    with pytest.raises(InputError, match="No space left on device"), whole(tmp_path / "a.bin") as file:
        file = FullDisk(file, 10)
        for _ in range(10):
            file.write(b"123")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [0, 500, 20_000])
def test_a_disk_that_fills_up_under_torch_save_is_one_line(tmp_path, room):
    """torch.save turns what the file raises into a RuntimeError of its own."""
    with pytest.raises(InputError, match="a.pt: No space left on device"), whole(tmp_path / "a.pt") as file:
        torch.save({"a": torch.zeros(10_000)}, FullDisk(file, room))
    assert not list(tmp_path.iterdir())


def test_what_is_not_the_disks_fault_passes_through(tmp_path):
    for error in (RuntimeError("a bug"), ZeroDivisionError(), KeyboardInterrupt()):
        with pytest.raises(type(error)), whole(tmp_path / "a.bin"):
            raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "folder", "file/below", "/".join(["y" * 200] * 30)])
def test_a_name_that_cannot_be_written_is_one_line(tmp_path, name):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as error:
        write_bytes(tmp_path / name, b"data")
    assert "\n" not in str(error.value) and not [path for path in tmp_path.rglob("*.part")]
    assert sorted(path.name for path in tmp_path.iterdir())[:2] == ["file", "folder"]


def test_a_name_as_long_as_a_name_may_be_is_written(tmp_path):
    write_bytes(tmp_path / ("x" * 255), b"data")
    assert (tmp_path / ("x" * 255)).read_bytes() == b"data"


# ---- Reading ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, message", [
    ("{", "is not JSON"), ("", "is not JSON"), ('{"a": NaN}', "NaN is no JSON number"), ('{"a": -Infinity}', "-Infinity is no JSON"),
    ('{"a": 1e999}', "1e999 is too large a number"), ('{"a": 1, "b": {"a": 2, "a": 3}}', "an object holds the key 'a' twice"),
    ('{"a": ' + "9" * 10_000 + "}", "is not JSON"), ('{"a":' * 100_000 + "1" + "}" * 100_000, "nests its values too deeply"),
    ("[" * 100_000, "nests its values too deeply"), ("[1]", r"is not a JSON object, but \[1\]"), ("null", "is not a JSON object, but None"),
    ('{"a": "\xff"}', "is not JSON")])
def test_what_is_no_json_object_is_one_line(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message) as error:
        read_object(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(error.value) and len(str(error.value)) < 300 + len(str(tmp_path))


def test_what_is_no_plain_file_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("{}")
    for name, message in {"folder": "it is a folder or a device", "pipe": "it is a folder or a device", "none": "has no none",
                          "loop": "cannot read .*loop: ", "dangling": "has no dangling", "a\0b": "a NUL character",
                          "x" * 300: "File name too long", "file/below": "Not a directory"}.items():
        with pytest.raises(InputError, match=message):
            read_bytes(tmp_path / name)
    monkeypatch.setattr(disk.os, "stat", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(InputError, match="cannot read .*file: Permission denied"):
        read_json(tmp_path / "file")


def test_json_comes_back_as_it_was_written(tmp_path):
    value = {"a": [1, 2.5, None, True, "ü"], "b": {}}
    write_json(tmp_path / "a.json", value)
    assert read_object(tmp_path / "a.json") == value and json.loads((tmp_path / "a.json").read_text()) == value


# ---- Taking ----------------------------------------------------------------------------------------------------------

FIELDS = Fields({"int": 3, "float": 2.5, "bool": True, "str": "s", "null": None, "list": [1, 2], "mixed": [1, "x"],
                 "dict": {"inner": "7"}, "long": "x" * 10_000, "huge": 10**400}, "a.json")


@pytest.mark.parametrize("key, kind, how, value", [
    ("int", int, {}, 3), ("int", float, {}, 3.0), ("float", float, {"above": 0}, 2.5), ("bool", bool, {}, True), ("str", str, {}, "s"),
    ("list", [int], {"at_least": 1}, [1, 2]), ("absent", int, {"default": 7}, 7), ("absent", int, {"default": None}, None),
    ("null", int, {"default": None}, None), ("null", float, {"default": 5.0, "nullable": True}, None),
    ("int", int, {"at_least": 3, "at_most": 3, "above": 2, "below": 4}, 3), ("huge", int, {}, 10**400)])
def test_a_right_value_is_taken_as_its_kind(key, kind, how, value):
    taken = FIELDS.take(key, kind, **how)
    assert taken == value and type(taken) is type(value)


@pytest.mark.parametrize("key, kind, how, message", [
    ("absent", int, {}, "a.json lacks absent"), ("null", int, {}, "a.json: null is None, but should be a whole number"),
    ("null", int, {"default": 5}, "null is None"), ("bool", int, {}, "bool is True, but should be a whole number"),
    ("bool", float, {}, "should be a number"), ("int", bool, {}, "int is 3, but should be true or false"),
    ("float", int, {}, "float is 2.5, but should be a whole number"), ("str", float, {}, "str is 's', but should be a number"),
    ("int", str, {}, "should be a string"), ("list", dict, {}, "should be an object"), ("dict", [int], {}, "should be a list, each of it"),
    ("mixed", [int], {"at_least": 0}, "mixed is .*, but should be a list, each of it a whole number, at least 0"),
    ("int", int, {"at_least": 4}, "at least 4"), ("int", int, {"above": 3}, "above 3"), ("int", int, {"at_most": 2}, "at most 2"),
    ("int", int, {"below": 3}, "below 3"), ("huge", float, {}, "huge is 1000"), ("long", int, {}, "long is 'xxx")])
def test_a_wrong_value_is_a_line_that_names_file_and_key(key, kind, how, message):
    with pytest.raises(InputError, match=message) as error:
        FIELDS.take(key, kind, **how)
    assert str(error.value).startswith("a.json") and len(str(error.value)) < 200


def test_an_inner_object_knows_where_it_stands():
    with pytest.raises(InputError, match="a.json, dict: inner is '7', but should be a whole number"):
        FIELDS.take("dict", dict).take("inner", int)
    with pytest.raises(InputError, match="a.json, dict lacks other"):
        FIELDS.take("dict", dict).take("other", int)


def test_only_and_stated_refuse_other_values_and_stated_absent_ones():
    FIELDS.only(str="s", bool=True, absent=1)
    for wrong in ({"str": "t"}, {"bool": 1}, {"int": True}, {"null": False}):
        with pytest.raises(InputError, match="a.json: .* is not supported, only"):
            FIELDS.only(**wrong)
    FIELDS.stated(str="s")
    with pytest.raises(InputError, match="a.json lacks absent"):
        FIELDS.stated(str="s", absent=1)


# ---- Tensors ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_finite_is_what_isfinite_says(dtype):
    x = torch.randn(5, 7).to(dtype)
    assert is_finite(x) and is_finite(x[:0])
    for value in (float("nan"), float("inf"), -float("inf")):
        y = x.clone()
        y[2, 3] = value
        assert not is_finite(y) and not is_finite(y.T)
