"""A campaign of bad text: whatever --data and --field are given, the answer is one line that names the place."""
import io
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lorasae.errors import InputError
from lorasae.io.corpus import Corpus
from test_data import BOS, EOS, NUMBERED, numbered
from test_streams import gzip_compress, zstd_compress

ROOT = Path(__file__).parent.parent
GOOD = "".join(json.dumps({"text": numbered(i)}) + "\n" for i in range(60)).encode()


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as writer:
        writer.writestr(zipfile.ZipInfo("a.txt"), numbered(0, 100))     # its time is 1980: see gzip_compress
    return file.getvalue()


def answer(source, field=None):
    """The InputError of a run on this source."""
    with pytest.raises(InputError) as caught:
        corpus = Corpus(source, NUMBERED, BOS, EOS, context=16, eval_tokens=64, seed=0, field=field)
        corpus.batches(2).close()
    line = str(caught.value)
    assert line.isprintable() and len(line) < 600, line
    return line


# ---- What is no text at all ------------------------------------------------------------------------------------------

def broken_link(folder):
    (folder / "a.txt").symlink_to(folder / "nothing")


def circle(folder):
    (folder / "a.txt").symlink_to(folder / "b.txt")
    (folder / "b.txt").symlink_to(folder / "a.txt")


def pipe(folder):
    os.mkfifo(folder / "a.txt")


def listening(folder):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "a.txt"))


def own_parent(folder):
    (folder / "within").symlink_to(folder)


@pytest.mark.parametrize("source", ["", " ", "\t\n"])
def test_an_empty_name_is_not_the_current_folder(source, monkeypatch, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    monkeypatch.chdir(tmp_path)
    assert "names no text; expected a file or folder, stdlib, pile" in answer(source)


@pytest.mark.parametrize("source, words", [
    ("nowhere", "no file or folder nowhere; expected one, or stdlib"), ("no\0where", "no file or folder no"),
    ("no\nwhere.txt", "no file or folder no\\nwhere.txt"), ("x" * 300 + ".txt", "xxx"), ("\udcff", "no file or folder \\udcff"),
    ("/dev/null", "neither a file nor a folder"), ("/dev/zero", "neither a file nor a folder"), ("hf://", "is no dataset"),
])
def test_a_name_without_text_behind_it(source, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert words in answer(source)


@pytest.mark.parametrize("make", [broken_link, circle, pipe, listening])
def test_what_is_neither_a_file_nor_a_folder(make, tmp_path):
    make(tmp_path)
    assert f"{tmp_path}/a.txt is neither a file nor a folder" in answer(tmp_path / "a.txt")
    assert "holds no readable text: none of its 0 files ends in .txt" in answer(tmp_path)       # nor is it in a folder


@pytest.mark.parametrize("make", [broken_link, circle, pipe, listening, own_parent])
def test_beside_good_text_it_is_passed_over(make, tmp_path):
    make(tmp_path)
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    corpus = Corpus(tmp_path, NUMBERED, BOS, EOS, context=16, eval_tokens=64)
    assert [file.name for file in corpus.training_files] == [f"{tmp_path}/good.jsonl"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "a.jsonl").chmod(0)
    assert f"cannot read {tmp_path}/a.jsonl: Permission denied" in answer(tmp_path)
    (tmp_path / "folder").mkdir(0)
    assert f"cannot read {tmp_path}/folder: Permission denied" in answer(tmp_path)


def test_a_file_that_goes_between_listing_and_reading(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    corpus = Corpus(tmp_path, NUMBERED, BOS, EOS, context=16, eval_tokens=64)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(InputError, match=r"cannot read .*a\.jsonl: No such file or directory"):
        corpus.batches(1)


# ---- Files that are not what their name says -------------------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + bytes(100)
NOT_TEXT, CUT = "is not UTF-8 text: byte", "is it damaged or cut short?"


@pytest.mark.parametrize("name, data, words", [
    ("a.txt", PNG, NOT_TEXT), ("a.py", archive(), "is not "), ("a.txt", bytes(1000), "byte 0 is zero; is it a binary file?"),
    ("a.txt", numbered(0, 100).encode("utf-16"), NOT_TEXT), ("a.md", numbered(0, 100).encode("utf-16-le"), "byte 1 is zero"),
    ("a.txt", "ö".encode("latin-1") * 100, NOT_TEXT), ("a.txt", numbered(0, 20_000).encode() + b"\xff", "byte 60,000"),
    ("a.txt", numbered(0, 99_000).encode() + b"\0", "byte 297,000 is zero"), ("a.txt", gzip_compress(GOOD), NOT_TEXT),
    ("a.jsonl", PNG, "line 1: not UTF-8"), ("a.jsonl", bytes(1000), "line 1: not JSON"), ("a.jsonl", archive(), "line 1: not "),
    ("a.jsonl", gzip_compress(GOOD), "line 1: not "), ("a.jsonl", GOOD.decode().encode("utf-16"), "line 1: not UTF-8"),
    ("a.jsonl.gz", GOOD, CUT), ("a.jsonl.gz", zstd_compress(GOOD), CUT), ("a.jsonl.gz", gzip_compress(GOOD)[:-4], CUT),
    ("a.jsonl.gz", gzip_compress(GOOD) + b"more", CUT), ("a.jsonl.gz", gzip_compress(GOOD)[:5], CUT),
    ("a.jsonl.zst", GOOD, CUT), ("a.jsonl.zst", gzip_compress(GOOD), CUT), ("a.txt.zst", PNG, CUT),
    ("a.jsonl.zst", zstd_compress(GOOD)[:5] + b"\xff" * 50, CUT),
    ("a.txt", b"", "too short: 0 tokens"), ("a.jsonl", b"", "too short"), ("a.jsonl", b"\n \n\t\n", "too short"),
    ("a.jsonl.gz", b"", "too short"), ("a.jsonl.zst", b"", "too short"), ("a.txt", b"\n", "too short"),
    ("a.parquet", b"PAR1", "unknown kind of file"), ("a", GOOD, "unknown kind of file"), (".jsonl", b"{", "line 1: not JSON"),
])
def test_a_file_that_is_not_what_its_name_says(name, data, words, tmp_path):
    (tmp_path / name).write_bytes(data)
    line = answer(tmp_path / name)
    assert words in line and f"{tmp_path}/{name}" in line


# ---- JSON ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bad, words", [
    ("[1, 2]", "expected a JSON object"), ("3", "expected a JSON object"), ('"text"', "expected a JSON object"),
    ("null", "expected a JSON object"), ("NaN", "expected a JSON object"), ("[]", "expected a JSON object"), ("{}", "such are: none"),
    ('{"text": null}', "such are: none"), ('{"text": 3}', "no field 'text' that is a string"), ('{"text": ["a"]}', "no field 'text'"),
    ('{"text": {"text": "a"}}', "no field 'text'"), ('{"text": true}', "no field 'text'"), ('{"TEXT": "a"}', "such are: TEXT"),
    ('{"body\\n": "a"}', "such are: body\\n"), (json.dumps({f"key{i}": "a" for i in range(1000)}), "such are: key0, key1"),
    ("{", "not JSON"), ("{'text': 'a'}", "not JSON"), ('{"text": "a"', "not JSON"), ('{"text": "a"},', "not JSON"),
    ('{"text": "a\tb"}', "not JSON (Invalid control character"), ('{"text": "a"} {"text": "b"}', "not JSON"), ("text", "not JSON"),
    ('{"text": "\\x"}', "not JSON"), ("[" * 100_000, "nested too deeply"), ('{"a":' * 100_000, "nested too deeply"),
    ('{"text": "a", "n": ' + "9" * 5000 + "}", "number of thousands of digits"), ("\ufeff\ufeff{}", "not JSON"),
])
def test_a_bad_line_of_json_is_told_by_its_number(bad, words, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + bad.encode() + b"\n" + GOOD)
    line = answer(tmp_path / "a.jsonl")
    assert f"{tmp_path}/a.jsonl, line 61: " in line and words in line


def test_windows_files_are_good(tmp_path):
    """A byte order mark at the start, and both characters at a line's end."""
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n"))
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    one, other = (Corpus(tmp_path / name, NUMBERED, BOS, EOS, context=16, eval_tokens=64) for name in ("a.jsonl", "b.jsonl"))
    assert one.held_out.tolist() == other.held_out.tolist()


@pytest.mark.parametrize("field, words", [
    ("", "--field '': expected the name"), (3, "--field 3: expected"), (["text"], "--field ['text']: expected"),
    (True, "--field True: expected"), ("absent", "line 1: no field 'absent' that is a string; such are: text, title (--field)"),
    ("n", "line 1: no field 'n' that is a string"), ("meta", "line 1: no field 'meta' that is"), ("Text", "no field 'Text'"),
    ("meta.set", "no field 'meta.set'"), ("te\nxt", "no field 'te\\nxt'"),
])
def test_a_field_that_is_no_text(field, words, tmp_path):
    record = {"text": numbered(0), "title": "a", "n": 3, "meta": {"set": "b"}}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    assert words in answer(tmp_path / "a.jsonl", field)


# ---- Memory ----------------------------------------------------------------------------------------------------------

BOUNDED = """
import itertools, json, re, resource, sys
from pathlib import Path
import torch
from lorasae.errors import InputError
from lorasae.io.corpus import Corpus
from test_data import BOS, EOS, NUMBERED

allocated = 1024 * int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
resource.setrlimit(resource.RLIMIT_DATA, (allocated + 700 * 2 ** 20,) * 2)
for name in sys.argv[1:]:
    try:
        corpus = Corpus(name, NUMBERED, BOS, EOS, context=64, eval_tokens=640, seed=0)
        with corpus.batches(4) as batches:
            for tokens, position in itertools.islice(batches, 100):
                pass
        print("read")
    except InputError as error:
        print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
def test_memory_is_bounded_whatever_a_file_holds(tmp_path):
    """A long document, a long file, a line without end, and small archives of much text, with 700 MiB beside what is imported."""
    words = [numbered(i, 5000) for i in range(100)]
    text = "".join(words)
    (tmp_path / "document.jsonl").write_text(json.dumps({"text": text * 13}) + "\n")                    # 20 MB
    with (tmp_path / "long.txt").open("w") as file:
        for _ in range(350):                                                                            # 560 MB
            file.write(text)
    with (tmp_path / "line.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(10 ** 9)
    lines = "".join(json.dumps({"text": word}) + "\n" for word in words)
    (tmp_path / "archive.jsonl.zst").write_bytes(zstd_compress(lines.encode()) * 400)
    (tmp_path / "line.jsonl.gz").write_bytes(gzip_compress(b'{"text": "' + bytes([97]) * 2 ** 27))
    names = ["document.jsonl", "long.txt", "line.jsonl", "archive.jsonl.zst", "line.jsonl.gz"]
    result = subprocess.run([sys.executable, "-c", BOUNDED, *names], cwd=tmp_path, capture_output=True, text=True, timeout=100,
                            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1",
                                              "MALLOC_ARENA_MAX": "2"})
    assert result.returncode == 0, result.stderr
    too_long = "line 1: longer than 64 MiB; expected a JSON object a line, a document in each: cut it into several"
    assert result.stdout.splitlines() == ["read", "read", f"line.jsonl, {too_long}", "read", f"line.jsonl.gz, {too_long}"]
