"""Files to documents, bad files, and datasets read from a Hub that drops, cuts and lies: io/streams.py, io/documents.py."""
import gzip
import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from helpers import Hub
from lorasae.io import order, streams
from lorasae.io.corpus import Corpus
from lorasae.errors import InputError
from lorasae.io.documents import DOCUMENT, Reader, read
from lorasae.io.streams import files, held_out
from test_data import NUMBERED, numbered, sources_of, take

TEXTS = ["first document\nwith two lines", "zweites, größeres 文書 🙂", "", "last \\u0041 \ttab"]


def gzip_compress(data):
    """Without the time, which would be in the names of tests, and they must be equal in all processes."""
    return gzip.compress(data, mtime=0)


def zstd_compress(data):
    if sys.version_info >= (3, 14):
        from compression import zstd
        return zstd.compress(data)
    return pytest.importorskip("zstandard", reason=".zst needs zstandard before Python 3.14").compress(data)


def lines(texts, field="text"):
    return "".join(json.dumps({"meta": {"n": i}, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def documents(source, field=None):
    result = []
    for file in files(str(source)):
        result += read(file, field)
    return result


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# ---- Formats ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, pack, field", [
    ("a.jsonl", bytes, "text"), ("a.JSONL", bytes, "text"), ("a.jsonl.gz", gzip_compress, "text"),
    ("a.jsonl.zst", zstd_compress, "text"), ("a.json.gz", gzip_compress, "raw_content"),
    ("a.json.zst", zstd_compress, "raw_content"),
])
def test_json_lines_of_every_packing_give_the_same_documents(tmp_path, name, pack, field):
    assert documents(write(tmp_path / name, pack(lines(TEXTS, field)))) == TEXTS


@pytest.mark.parametrize("pack, suffix", [(gzip_compress, ".gz"), (zstd_compress, ".zst")])
def test_archives_of_several_members_are_read_to_their_end(tmp_path, pack, suffix):
    path = write(tmp_path / f"a.jsonl{suffix}", b"".join(pack(lines([text])) for text in TEXTS))
    assert documents(path) == TEXTS


def test_a_field_is_chosen_by_name_before_the_usual_ones(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "no", "body": "yes"}\n\n  \n{"body": "also", "raw_content": "no"}')
    assert documents(path, field="body") == ["yes", "also"]


def test_half_of_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    text, = documents(write(tmp_path / "a.jsonl", rb'{"text": "a\ud83db \ud83d\ude42"}'))
    assert text.replace("\ufffd", "") == "ab 🙂" and "\ufffd" in text and text.encode()


def test_long_plain_text_is_cut_after_lines(tmp_path):
    text = "".join(f"line {i} " + "größe " * (i % 50) + "\r\n" for i in range(20_000)) + "z" * 3 * DOCUMENT + "\nend"
    assert len(text.encode()) > 2 * 2 ** 20               # several blocks, with characters across their borders
    parts = documents(write(tmp_path / "a.txt", text.encode()))
    assert "".join(parts) == text and max(map(len, parts)) == DOCUMENT
    assert all(part.endswith("\n") for part in parts[:-1] if "zz" not in part)
    assert all(len(one) + len(other) > DOCUMENT for one, other in zip(parts, parts[1:]))


def test_a_folder_is_read_in_the_order_of_names_without_what_is_hidden_or_unknown(tmp_path, capsys):
    for name in ("b/x.py", "a.txt", "b.md", "b/.hidden/y.txt", ".git/z.txt", "b/.w.txt", "picture.png", "b/data.bin"):
        write(tmp_path / name, name.encode())
    assert documents(tmp_path) == ["a.txt", "b.md", "b/x.py"]
    assert capsys.readouterr().err == f"note: 2 of the 5 files in {tmp_path} are not text and are skipped\n"


def test_a_folder_within_a_hidden_one_is_read(tmp_path):
    write(tmp_path / ".cache" / "texts" / "a.txt", b"here")
    assert documents(tmp_path / ".cache" / "texts") == ["here"]


def test_the_standard_library_is_its_utf8_sources_without_tests(tmp_path, monkeypatch):
    for name in ("ast.py", "json/decoder.py", "test/test_ast.py", "json/tests/t.py", "idlelib/idle_test/t.py",
                 "site-packages/torch/a.py", "dist-packages/b.py", "__pycache__/c.py", "encodings/cp037.py",
                 "pydoc_data/topics.py", "lib2to3/Grammar.pickle"):
        write(tmp_path / name, name.encode())
    write(tmp_path / "latin.py", "# é".encode("latin-1"))
    monkeypatch.setattr(streams.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [file.name for file in files("stdlib")] == ["ast.py", "json/decoder.py"]
    assert documents("stdlib") == ["ast.py", "json/decoder.py"]


def test_one_path_in_sixteen_is_held_out_and_always_the_same():
    paths = [f"package{i % 7}/module{i}.py" for i in range(16_000)]
    assert 900 < sum(map(held_out, paths)) < 1100
    assert [name for name in ("ast.py", "traceback.py", "opcode.py") if held_out(name)] == [
        name for name in ("ast.py", "traceback.py", "opcode.py") if hashlib.sha256(name.encode()).digest()[0] < 16]


# ---- Bad files -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, data, message", [
    ("a.jsonl", b'{"text": "a"}\n{"text": oh}\n', r"a\.jsonl, line 2: not JSON \(.*, column 10\)$"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b', r"a\.jsonl, line 2: not JSON .*; is the file cut short\?"),
    ("a.jsonl", b'[1, 2]\n', r"a\.jsonl, line 1: expected a JSON object with a text in it, found '\[1, 2\]'"),
    ("a.jsonl", b'null\n', r"a\.jsonl, line 1: expected a JSON object"),
    ("a.jsonl", b'{"body": "a", "n": 1, "title": ""}', r"line 1: no field 'text' that is .*; such are: body, title"),
    ("a.jsonl", b'{"text": null}\n', r"line 1: no field 'text' that is a string; such are: none"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8 text: byte 24 "),
    ("a.txt", b"abc\xffdef", r"a\.txt is not UTF-8 text: byte 3 \(invalid start byte\)"),
    ("a.txt", "é".encode() * 2 ** 20 + b"\xc3", r"a\.txt is not UTF-8 text: byte 2,097,152 "),
    ("a.txt", b"x" + "é".encode() * 2 ** 19 + b"ab\xff", r"a\.txt is not UTF-8 text: byte 1,048,579 "),
    ("a.txt", b"x" * (2 ** 20 - 1) + b"\xc3(", r"a\.txt is not UTF-8 text: byte 1,048,575 "),
    ("a.jsonl.gz", b"not gzip", r"cannot read .*a\.jsonl\.gz: Not a gzipped file"),
    ("a.jsonl.gz", gzip_compress(lines(TEXTS))[:-9], r"cannot read .*a\.jsonl\.gz: .*is it damaged or cut short"),
    ("a.jsonl.gz", gzip_compress(lines(TEXTS))[:20] + b"\xff" * 60, r"cannot read .*a\.jsonl\.gz: "),
    ("a.jsonl.zst", b"not zstd", r"cannot read .*a\.jsonl\.zst: "),
])
def test_a_bad_file_is_told_in_one_line_with_its_place(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(InputError, match=message) as caught:
        documents(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_zst_file_that_is_cut_or_damaged_is_told(tmp_path):
    whole = zstd_compress(lines(hashlib.sha256(b"%d" % i).hexdigest() for i in range(20_000)))
    with pytest.raises(InputError, match=r"a\.jsonl\.zst, line [\d,]+: not JSON .*is the file cut short\?"):
        documents(write(tmp_path / "a.jsonl.zst", whole[:len(whole) // 2]))
    with pytest.raises(InputError, match=r"cannot read .*a\.jsonl\.zst: .*; is it damaged or cut short\?"):
        documents(write(tmp_path / "a.jsonl.zst", whole[:50] + b"\xff" * len(whole)))


def test_a_chosen_field_that_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="no field 'body' that is a string; such are: text"):
        documents(write(tmp_path / "a.jsonl", lines(TEXTS)), field="body")


@pytest.mark.parametrize("source, message", [
    ("long" * 2000, "cannot read long"), ("nowhere", "no file or folder .*nowhere; expected one, or stdlib, pile, "),
    ("a.parquet", r"a\.parquet: unknown kind of file; its name should end in \.txt"),
    ("empty", r"empty holds no readable text: none of its 0 files ends in \.txt"),
    ("pictures", r"pictures holds no readable text: none of its 1 files ends in \.txt"),
])
def test_a_source_without_text_is_refused(tmp_path, monkeypatch, source, message):
    write(tmp_path / "a.parquet", b"PAR1")
    write(tmp_path / "pictures" / "a.png", b"PNG")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        files(source)


def test_a_missing_zstandard_is_told_with_the_command_that_installs_it(tmp_path, monkeypatch):
    if sys.version_info >= (3, 14):
        pytest.skip("Python 3.14 reads .zst itself")
    path = write(tmp_path / "a.jsonl.zst", zstd_compress(lines(TEXTS)))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match="pip install zstandard"):
        documents(path)


# ---- A Hub on this computer ------------------------------------------------------------------------------------------

@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", partial(huggingface_hub.HfFileSystem, endpoint=server.url))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)               # huggingface_hub waits too
    monkeypatch.setattr(streams, "pause", lambda seconds: None)             # no waiting before another try
    monkeypatch.setattr(streams, "BLOCK", 1000)
    yield server
    for thread in threading.enumerate():                # one that still reads would disturb the next test's connections
        if thread.name == "prefetch":
            thread.stopped.set()
            thread.join(10)
    server.stop()


MANY = [f"document {i} {hashlib.sha256(b'%d' % i).hexdigest()}" for i in range(400)]


@pytest.mark.parametrize("name, pack", [("a.jsonl", bytes), ("a.jsonl.gz", gzip_compress),
                                        ("a.jsonl.zst", zstd_compress)])
def test_a_dataset_is_read_as_the_same_file_on_disk(hub, tmp_path, name, pack):
    hub.datasets["owner/name"] = {f"data/{name}": pack(lines(MANY)), "README.md": b"#", "data/x.parquet": b"PAR1"}
    assert documents(f"hf://datasets/owner/name/data/{name}") == MANY
    assert documents("hf://datasets/owner/name/data") == MANY
    assert documents("hf://datasets/owner/name/**/*.jsonl*") == MANY
    assert documents("hf://datasets/owner/name@main/data/*") == MANY


@pytest.mark.parametrize("fault", ["drop", "cut", "whole", "busy"])
def test_a_stream_goes_on_at_the_same_byte_after(hub, capfd, fault):
    data = lines(MANY)
    hub.datasets["owner/name"] = {"a.jsonl": data}
    hub.faults = [None, None, fault, None, fault, fault, None, fault]
    assert documents("hf://datasets/owner/name/a.jsonl") == MANY
    blocks = list(range(0, len(data), 1000))
    assert sorted(set(hub.ranges)) == blocks and hub.ranges == sorted(hub.ranges)
    assert len(hub.ranges) == len(blocks) + 4                              # each fault costs one more request, no more


def test_a_longer_outage_is_waited_out(hub, capfd):
    """More refusals in a row than huggingface_hub itself puts up with for one request."""
    hub.datasets["owner/name"] = {"a.jsonl": lines(MANY)}
    hub.faults = [None] * 5 + ["busy"] * 14
    assert documents("hf://datasets/owner/name/a.jsonl") == MANY
    assert "note: datasets/owner/name/a.jsonl, byte 5,000: " in capfd.readouterr().err


def test_every_fault_at_once_and_at_random_changes_no_document(hub):
    hub.datasets["owner/name"] = {"a.jsonl.gz": gzip_compress(lines(MANY))}
    hub.faults = ["cut", "drop", "busy", None, "whole", "drop", None, None, "cut", "cut", None, "drop"] * 3
    assert documents("hf://datasets/owner/name/a.jsonl.gz") == MANY


def test_only_what_is_used_is_fetched(hub):
    hub.datasets["owner/name"] = {"a.jsonl": lines(MANY * 50)}
    file, = files("hf://datasets/owner/name/a.jsonl")
    listed = hub.sent
    with Reader(file) as reader:
        assert [reader.next() for _ in range(10)] == [[text] for text in MANY[:10]]
    assert file.size > 1_000_000 and hub.ranges == [0, 1000] and hub.sent - listed == 2000
    assert len(hub.requests) <= 4 + 2 * 2                                     # some to list, and two a block: the redirect


def test_a_server_that_stays_away_ends_the_stream_with_one_line(hub, capsys):
    hub.datasets["owner/name"] = {"a.jsonl": lines(MANY)}
    hub.faults = [None] * 3 + ["cut"] * 100
    with pytest.raises(InputError, match=r"a\.jsonl: nothing after byte 3,000 of [\d,]+ \(500 bytes came"):
        documents("hf://datasets/owner/name/a.jsonl")
    assert len(capsys.readouterr().err.splitlines()) == len(streams.WAITS)


@pytest.mark.parametrize("name, chosen", [
    ("pile", ["train/00.jsonl.zst", "train/01.jsonl.zst"]), ("pile-val", ["val.jsonl.zst"]),
    ("redpajama-1t-sample", ["arxiv_sample.jsonl", "c4_sample.jsonl"]),
    ("redpajama-v2", [f"sample/documents/2023-06/0000/en_{part}.json.gz" for part in ("head", "middle")]),
])
def test_the_named_streams_find_their_files(hub, name, chosen):
    layout = ["train/00.jsonl.zst", "train/01.jsonl.zst", "val.jsonl.zst", "test.jsonl.zst", "arxiv_sample.jsonl",
              "c4_sample.jsonl", "README.md", "sample/documents/2023-06/0000/en_head.json.gz",
              "sample/documents/2023-06/0000/en_middle.json.gz", "sample/documents/2023-06/0000/de_head.json.gz",
              "sample/quality_signals/2023-06/0000/en_head.signals.json.gz"]
    dataset = "/".join(streams.NAMED[name].split("/")[3:5])
    hub.datasets[dataset] = {path: b"{}" for path in layout}
    assert [file.name.removeprefix(f"datasets/{dataset}/") for file in files(name)] == chosen


def test_the_corpus_of_a_stream_survives_a_bad_connection(hub):
    """The whole path, from the Hub to the chunks, once undisturbed and once not."""
    parts = [zstd_compress(lines([numbered(i) for i in range(k, 200, 4)])) for k in range(4)]
    hub.datasets["monology/pile-uncopyrighted"] = {f"train/{k:02d}.jsonl.zst": part for k, part in enumerate(parts)}
    settings = dict(context=16, eval_tokens=160, seed=3)
    calm = Corpus("pile", NUMBERED, 0, 1, **settings)
    expected = take(calm.batches(4), 20)
    hub.faults = ["drop", None, "cut", "whole", None, None, "busy"] * 5
    rough = Corpus("pile", NUMBERED, 0, 1, **settings)
    assert (take(rough.batches(4), 20) == expected).all() and (rough.held_out == calm.held_out).all()
    assert not sources_of(expected) & sources_of(calm.held_out)


@pytest.mark.parametrize("name, pack", [("a.jsonl", bytes), ("a.jsonl.gz", gzip_compress), ("a.jsonl.zst", zstd_compress)])
def test_a_stream_goes_on_at_a_position_over_a_bad_connection(hub, monkeypatch, name, pack):
    monkeypatch.setattr(order, "IN_MEMORY", 0)
    monkeypatch.setattr(order, "SEGMENT", 3000)
    hub.datasets["owner/name"] = {f"{part}/{name}": pack(lines([numbered(i) for i in range(part, 200, 4)])) for part in range(4)}
    settings = dict(context=16, eval_tokens=160, seed=3)
    first = Corpus("hf://datasets/owner/name", NUMBERED, 0, 1, **settings)
    with first.batches(4) as batches:
        whole = list(itertools.islice(batches, 40))                        # about twice through
    for done in (1, 12, 30):
        hub.faults = ["drop", None, "cut", "whole", None, None, "busy"] * 3
        again = Corpus("hf://datasets/owner/name", NUMBERED, 0, 1, saved=first.held, **settings)
        with again.batches(4, whole[done - 1][1]) as batches:
            assert [tokens.tolist() for tokens, _ in itertools.islice(batches, 40 - done)] == [t.tolist() for t, _ in whole[done:]]


def test_a_plain_file_of_the_hub_is_entered_where_a_run_stood(hub):
    hub.datasets["owner/name"] = {"a.jsonl": lines(MANY)}
    file, = files("hf://datasets/owner/name/a.jsonl")
    with Reader(file) as reader:
        for _ in range(300):
            reader.next()
        place = reader.place
    hub.ranges.clear()
    with Reader(file, place=place) as reader:
        assert reader.next() == [MANY[300]] and reader.place[1] == 301
    assert hub.ranges == [place[0]]


def test_a_dataset_that_has_changed_since_is_refused(hub):
    hub.datasets["owner/name"] = {"a.jsonl": lines([numbered(i) for i in range(60)])}
    settings = dict(context=16, eval_tokens=64)
    _, position = next(Corpus("hf://datasets/owner/name", NUMBERED, 0, 1, **settings).batches(1))
    hub.datasets["owner/name"] = {"a.jsonl": lines([numbered(i) for i in range(60)]).replace(b"d1 ", b"d2 ")}
    changed = Corpus("hf://datasets/owner/name", NUMBERED, 0, 1, **settings)
    with pytest.raises(InputError, match="has changed since .*: datasets/owner/name/a.jsonl is another file now"):
        changed.batches(1, position)


def test_a_run_on_the_hub_goes_on_from_the_cache(hub, tmp_path, monkeypatch, capsys):
    data = lines([numbered(i) for i in range(60)])
    hub.datasets["owner/name"] = {"data/a.jsonl": data}
    settings = dict(context=16, eval_tokens=64)
    with Corpus("hf://datasets/owner/name/data", NUMBERED, 0, 1, **settings).batches(1) as batches:
        (_, position), (expected, _) = next(batches), next(batches)
    cached = tmp_path / "cache" / "datasets--owner--name"
    blob = write(cached / "blobs" / hashlib.sha1(data).hexdigest(), data)           # laid out as a download leaves it
    write(cached / "refs" / "main", b"0" * 40)
    link = cached / "snapshots" / ("0" * 40) / "data" / "a.jsonl"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with Corpus("hf://datasets/owner/name/data", NUMBERED, 0, 1, **settings).batches(1, position) as batches:
        assert next(batches)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("source, message", [
    ("hf://datasets/owner/absent/a.jsonl", "owner/absent/a.jsonl is not on the Hub: check the name"),
    ("hf://datasets/owner/name/absent.jsonl", "absent.jsonl: found no files; expected files that end in .txt"),
    ("hf://datasets/owner/name/tables", r"tables: found \.parquet; expected files that end in \.txt"),
    ("hf://datasets/owner", "is no dataset: expected hf://datasets/OWNER/NAME/FILES"),
    ("hf://owner/name", "is no dataset: expected hf://datasets/OWNER/NAME/FILES"),
    ("hf://datasets/owner/gated", "dataset owner/gated is gated: accept its terms at https://.*/datasets/owner/gated,"),
])
def test_a_dataset_that_cannot_be_read_is_told_in_one_line(hub, source, message):
    hub.datasets["owner/name"] = {"a.jsonl": lines(MANY), "tables/a.parquet": b"PAR1"}
    hub.datasets["owner/gated"] = {"a.jsonl": lines(MANY)}
    hub.refused = {"owner/gated": (403, "GatedRepo")}
    with pytest.raises(InputError, match=message) as caught:
        documents(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_the_cache_is_read_and_an_empty_cache_is_told(hub, tmp_path, monkeypatch, capsys, offline):
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    message = "HF_HUB_OFFLINE is set" if offline else "cannot reach the Hub .* check the network"
    with pytest.raises(InputError, match=message):
        files("pile-val")
    cached = tmp_path / "cache" / "datasets--monology--pile-uncopyrighted"
    write(cached / "refs" / "main", b"0" * 40)
    write(cached / "snapshots" / ("0" * 40) / "val.jsonl.zst", zstd_compress(lines(TEXTS)))
    write(cached / "snapshots" / ("0" * 40) / "test.jsonl.zst", zstd_compress(lines(["other"])))
    assert documents("pile-val") == TEXTS
    assert "reading its 1 files in the Hub's cache" in capsys.readouterr().err


def test_the_endpoint_of_the_environment_is_used(hub, tmp_path):
    hub.datasets["owner/name"] = {"a.jsonl": lines(MANY)}
    program = ("from lorasae.io.documents import read\nfrom lorasae.io.streams import files\n"
               "file, = files('hf://datasets/owner/name')\nprint(sum(map(len, read(file))))")
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    result = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, env=environment,
                            capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == sum(map(len, MANY))
