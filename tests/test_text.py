"""io/text.py: documents from good and bad files, and datasets from a Hub that fails."""
import gzip
import hashlib
import json
import os
import struct
import sys
import time

import pytest
from huggingface_hub import constants
from zstandard import compress as zstd_compress

from helpers import lines, one_line, refuses
from lorasae.errors import InputError
from lorasae.io import text
from lorasae.io.text import PIECE, documents_in, files, held_out
from test_shards import cache, joined, numbered, text_of         # noqa: F401

TEXTS = ["first document\nwith two lines", "zweites, größeres 文書 🙂", "", "last \\u0041 \ttab",
         "what\x85str.splitlines\u2028takes\x1cfor\x0blines"]
GOOD = lines([numbered(i) for i in range(60)])
BOM = b"\xef\xbb\xbf"


def gzip_compress(data):
    return gzip.compress(data, mtime=0)                 # no time: it would be in test ids


def documents(source, field=None):
    return [joined(pieces) for file in files(str(source))
            for _, pieces in documents_in(file, field)]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def answer(source, field=None):
    """The error message of a run on this source."""
    with one_line(kind=(InputError, OSError)) as caught:
        text_of(source, field=field).close()
    assert len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize("name, pack, field", [
    ("a.jsonl", bytes, "text"), ("a.JSONL", bytes, "text"), ("a.jsonl.gz", gzip_compress, "text"),
    ("a.jsonl.zst", zstd_compress, "text"), ("a.json.gz", gzip_compress, "raw_content"),
    ("a.jsonl", BOM.__add__, "text"), ("a.json.zst", zstd_compress, "raw_content"),
])
def test_json_lines_give_the_same_documents_however_compressed(tmp_path, name, pack, field):
    data = lines(TEXTS, field)
    assert documents(write(tmp_path / name, pack(data))) == TEXTS
    windows = data.replace(b"\n", b"\r\n\r\n")
    assert documents(write(tmp_path / name, pack(windows))) == TEXTS
    if pack in (gzip_compress, zstd_compress):          # an archive of several members
        members = b"".join(pack(lines([text], field)) for text in TEXTS)
        assert documents(write(tmp_path / name, members)) == TEXTS


def test_a_field_is_chosen_by_name_and_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    data = b'{"text": "no", "body": "yes"}\n\n  \n{"body": "also", "raw_content": "no"}'
    assert documents(write(tmp_path / "a.jsonl", data), field="body") == ["yes", "also"]
    half = rb'{"text": "a\ud83db \ud83d\ude42"}'
    assert documents(write(tmp_path / "a.jsonl", half)) == ["a?b 🙂"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_long_text_is_read_in_pieces(tmp_path, name):
    whole = "".join(f"line {i} " + "größe " * (i % 50) + "\r\n" for i in range(9000))
    whole += "z" * 3 * PIECE + "\nend"
    data = whole.encode() if name.startswith("a.txt") else lines([whole])
    pack = gzip_compress if name.endswith("gz") else BOM.__add__
    file, = files(str(write(tmp_path / name, pack(data))))
    pieces, = (list(found) for _, found in documents_in(file, None))
    begins, pieces = zip(*pieces)
    assert list(begins) == [True] + [False] * (len(pieces) - 1)
    assert "".join(pieces) == whole and max(map(len, pieces)) == PIECE
    assert all(piece.endswith("\n") for piece in pieces[:-1] if "zz" not in piece)


def test_a_folder_is_read_in_order_of_names_without_hidden_or_unknown_files(tmp_path, capsys):
    for name in ("b/x.py", "a.txt", "b.md", "b/.hidden/y.txt", ".git/z.txt", "b/.w.txt",
                 "picture.png", "b/data.bin"):
        write(tmp_path / ".here" / name, BOM + name.encode())
    assert documents(tmp_path / ".here") == ["a.txt", "b.md", "b/x.py"]
    note = f"note: 2 of the 5 files in {tmp_path}/.here are not text and are skipped\n"
    assert capsys.readouterr().err == note


def test_the_standard_library_is_its_sources_without_tests(tmp_path, monkeypatch):
    for name in ("ast.py", "json/decoder.py", "test/test_ast.py", "json/tests/t.py", "lib.pickle",
                 "site-packages/torch/a.py", "__pycache__/c.py", "encodings/cp037.py"):
        write(tmp_path / name, name.encode())
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [file.name for file in files("stdlib")] == ["ast.py", "json/decoder.py"]
    paths = [f"package{i % 7}/module{i}.py" for i in range(16_000)]
    assert 900 < sum(map(held_out, paths)) < 1100


@pytest.mark.parametrize("place", [0, 100_000, 299_999])
def test_a_changed_letter_is_noticed_anywhere(tmp_path, place):
    data = bytearray(b"x" * 300_000)
    path = write(tmp_path / "a.txt", data)
    known = text.fingerprints(files(str(path)))
    data[place] = ord("y")
    assert text.fingerprints(files(str(write(path, data)))) != known


@pytest.mark.parametrize("source, words", [
    ("", "no file or folder : expected one, or stdlib, pile"), ("hf://", "is not a dataset"),
    ("nowhere", "no file or folder nowhere: expected one, or stdlib, pile"),
    ("no\0where", "no file or folder no\0where"), ("no\nw.txt", "no file or folder no w.txt"),
    ("x" * 300 + ".txt", "no file or folder xxx"), ("/dev/null", "no file or folder /dev/null"),
    ("a.parquet", "a.parquet contains no text: none of its 1 files ends in .txt"),
    ("empty", "empty contains no text: none of its 0 files ends in .txt"),
])
def test_a_source_without_text_is_refused(source, words, monkeypatch, tmp_path):
    write(tmp_path / "a.parquet", b"PAR1")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert words in answer(source)


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("nothing"), os.mkfifo,
                                  lambda path: path.symlink_to(path.name)])
def test_broken_links_and_pipes_are_refused_and_skipped_in_folders(make, tmp_path):
    make(tmp_path / "a.txt")
    (tmp_path / "within").symlink_to(tmp_path)
    assert f"no file or folder {tmp_path}/a.txt" in answer(tmp_path / "a.txt")
    write(tmp_path / "good.jsonl", GOOD)
    assert [file.name for file in files(str(tmp_path))] == [f"{tmp_path}/good.jsonl"]


PNG = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + bytes(100)
NOT_TEXT, CUT, SHORT = "codec can't decode byte", "if it is damaged, download", "too short"
ZST = zstd_compress(lines(hashlib.sha256(b"%d" % i).hexdigest() for i in range(20_000)))


@pytest.mark.parametrize("name, data, words", [
    ("a.txt", PNG, NOT_TEXT), ("a.txt", bytes(1000), "has a zero byte"),
    ("a.md", numbered(0, 100).encode("utf-16-le"), "has a zero byte"),
    ("a.txt", b"a\xc3", NOT_TEXT),
    ("a.txt", numbered(0, 20_000).encode() + b"\xff", NOT_TEXT),
    ("a.jsonl", PNG, "line 1 ("), ("a.jsonl", bytes(1000), "line 1 ("),
    ("a.jsonl.gz", GOOD, CUT), ("a.jsonl.gz", gzip_compress(GOOD)[:-4], CUT),
    ("a.jsonl.gz", gzip_compress(GOOD) + b"more", CUT),
    ("a.jsonl.gz", gzip_compress(GOOD)[:20] + b"\xff" * 60, CUT), ("a.jsonl.zst", GOOD, CUT),
    ("a.txt.zst", PNG, "a single compressed document: decompress it"),
    ("a.jsonl.zst", ZST[:50] + b"\xff" * len(ZST), CUT),
    ("a.jsonl.zst", ZST[:len(ZST) // 2], "Unterminated string"),
    ("a.txt", b"", SHORT), ("a.jsonl", b"\n \n\t\n", SHORT), ("a.jsonl.gz", b"", SHORT),
    ("a.jsonl.zst", b"", SHORT), ("a.txt", b"\n", SHORT), (".jsonl", b"{", "line 1 ("),
])
def test_a_file_that_is_not_what_its_name_says_is_refused(name, data, words, tmp_path):
    line = answer(write(tmp_path / name, data))
    assert words in line and f"{tmp_path}/{name}" in line


@pytest.mark.parametrize("bad, words", [
    ("[1, 2]", "expected a JSON object with a string 'text'"), ("null", "expected a JSON object"),
    ('{"text": null}', "a string 'text'; its strings are: none (--field)"),
    ('{"text": ["a"]}', "a string 'text'"), ('{"TEXT": "a", "n": 1}', "its strings are: TEXT"),
    (json.dumps({f"key{i}": "a" for i in range(1000)}), "its strings are: key0, key1"),
    ('{"text": "a"} {"text": "b"}', "Extra data"), ("[" * 100_000, "recursion depth"),
    ('{"text": "a", "n": ' + "9" * 5000 + "}", "Exceeds the limit (4300 digits)"),
])
def test_a_bad_line_of_json_is_reported_by_its_number(bad, words, tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD + bad.encode() + b"\n" + GOOD)
    line = answer(path)
    assert f"{tmp_path}/a.jsonl, line 61" in line and words in line


def test_a_field_without_text_and_a_missing_zstandard_are_named(tmp_path, monkeypatch):
    for field in ("absent", "meta", "te\nxt"):
        words = f"line 1: expected a JSON object with a string {field!r}; its strings are: text"
        assert words in answer(write(tmp_path / "a.jsonl", GOOD), field)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "import of zstandard halted" in answer(write(tmp_path / "a.jsonl.zst", ZST))


MANY = [f"document {i} {hashlib.sha256(b'%d' % i).hexdigest()}" for i in range(400)]
PACKINGS = [("a.jsonl", bytes), ("a.jsonl.gz", gzip_compress), ("a.jsonl.zst", zstd_compress)]


@pytest.fixture
def hub(server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(0.001))
    monkeypatch.setattr(text, "HUB_BLOCK", 1000)
    monkeypatch.setattr(text, "BLOCK", 500)
    return server


@pytest.mark.parametrize("fault", [None, "drop", "busy"])
@pytest.mark.parametrize("name, pack", PACKINGS)
def test_a_dataset_reads_like_the_same_file_on_disk(hub, name, pack, fault):
    hub.datasets["owner/name"] = {f"data/{name}": pack(lines(MANY)), "README.md": b"#",
                                  "data/x.parquet": b"PAR1"}
    for chosen in (f"/data/{name}", "/data", "/**/*.jsonl*", "@main/data/*"):
        hub.faults = [fault, fault, None, "drop", "busy", None, fault] * bool(fault)
        assert documents(f"hf://datasets/owner/name{chosen}") == MANY
        assert len(hub.faults) <= (5 if name.endswith("zst") else 0)    # read in one block


def test_only_what_is_used_is_fetched_and_a_server_that_stays_down_ends_the_stream(hub):
    hub.datasets["owner/name"] = {"a.jsonl": lines(MANY * 50)}
    file, = files("hf://datasets/owner/name/a.jsonl")
    listed = hub.sent
    found = documents_in(file, None)
    assert [joined(next(found)[1]) for _ in range(10)] == MANY[:10]
    assert file.size > 1_000_000 and hub.sent - listed < 5000

    hub.faults = [None] * 3 + ["busy"] * 100
    with pytest.raises(InputError, match=r"cannot read datasets/owner/name/a.jsonl \(.*503"):
        documents("hf://datasets/owner/name/a.jsonl")


@pytest.mark.parametrize("name, chosen", [
    ("pile", ["train/00.jsonl.zst", "train/01.jsonl.zst"]), ("pile-val", ["val.jsonl.zst"]),
    ("redpajama-1t-sample", ["arxiv_sample.jsonl", "c4_sample.jsonl"]),
    ("redpajama-v2", ["sample/documents/2023-06/0000/en_head.json.gz"]),
])
def test_the_named_streams_find_their_files(hub, name, chosen):
    layout = ["train/00.jsonl.zst", "train/01.jsonl.zst", "val.jsonl.zst", "test.jsonl.zst",
              "arxiv_sample.jsonl", "c4_sample.jsonl", "README.md",
              "sample/documents/2023-06/0000/en_head.json.gz",
              "sample/documents/2023-06/0000/de_head.json.gz",
              "sample/quality_signals/2023-06/0000/en_head.signals.json.gz"]
    dataset = "/".join(text.NAMED[name].split("/")[3:5])
    hub.datasets[dataset] = {path: b"{}" for path in layout}
    assert [file.name.removeprefix(f"datasets/{dataset}/") for file in files(name)] == chosen


@pytest.mark.parametrize("source, message", [
    ("owner/absent/a.jsonl", "no repository of that name on the Hub"),
    ("owner/name/absent.jsonl", "absent.jsonl contains no text: none of its 0 files ends in .txt"),
    ("owner/name/tables", "tables contains no text: none of its 1 files ends in .txt"),
    ("owner", "is not a dataset: expected hf://datasets/OWNER/NAME/FILES"),
    ("owner/gated", "owner/gated is gated: accept its licence at https://huggingface.co/datasets"),
])
def test_a_dataset_that_cannot_be_read_is_refused_in_one_line(hub, source, message):
    hub.datasets["owner/name"] = {"a.jsonl": lines(MANY), "tables/a.parquet": b"PAR1"}
    hub.datasets["owner/gated"] = {"a.jsonl": lines(MANY)}
    hub.refused = {"owner/gated": (403, "GatedRepo")}
    refuses(message, documents, f"hf://datasets/{source}")


@pytest.mark.parametrize("offline, message", [(True, "HF_HUB_OFFLINE is set"),
                                              (False, "the Hub is out of reach")])
def test_without_a_network_a_dataset_is_refused_in_one_line(hub, monkeypatch, offline, message):
    hub.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    refuses(message, files, "pile-val")
