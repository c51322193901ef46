"""io/shards.py: batches by step, held-out text, caches, resuming, and the end of the text."""
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from zstandard import compress as zstd_compress

from helpers import counted, lines, refuses
from lorasae.errors import InputError
from lorasae.io import shards
from lorasae.io.files import write_json
from lorasae.io.shards import Text, read_shards
from lorasae.io.text import digest, documents, documents_in, files, held_out

ROOT = Path(__file__).parent.parent
BOS, EOS, FIRST_WORD = 0, 1, 3


def word_tokenizer(words):
    """One token per word; the post-processor puts BOS first, as in Gemma's tokenizer.json."""
    special = {"<bos>": BOS, "<eos>": EOS, "<unk>": 2}
    vocabulary = special | {word: FIRST_WORD + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return tokenizer


NUMBERED = word_tokenizer([f"d{i}" for i in range(500)])


def numbered(i, length=10):
    """Document i: its own word repeated, so that a token tells which document it comes from."""
    return f"d{i} " * length


def write_documents(path, texts):
    path.write_bytes(lines(texts))
    return path


def text_of(path, **settings):
    return Text(path, NUMBERED, BOS, EOS,
                **{"context": 16, "eval_tokens": 64, "seed": 0, "batch_size": 4, **settings})


def sources_of(tokens):
    """The numbers of the documents that tokens come from."""
    return set((np.unique(tokens) - FIRST_WORD).tolist()) - {-3, -2, -1}


def joined(pieces):
    return "".join(text for _, text in pieces)


def take(text, count, start=0):
    return torch.stack([text.batch(step) for step in range(start, start + count)])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LORASAE_CACHE", str(folder))
    yield folder / "text"
    assert not any(thread.name.startswith("text") for thread in threading.enumerate()), "not closed"


@pytest.fixture
def small_shards(monkeypatch):
    for name, value in dict(FIRST=16 * 4, LARGEST=16 * 8, BATCH=100).items():
        monkeypatch.setattr(shards, name, value)


@pytest.fixture
def streamed(monkeypatch, small_shards):
    monkeypatch.setattr(shards, "SMALL", 0)


@pytest.fixture(params=["small", "one file", "mixed files", "one long text", "long texts"])
def source(request, tmp_path, monkeypatch, small_shards):
    """Text that forty batches read several times; all but "small" are streams."""
    folder, texts = tmp_path / "source", [numbered(i) for i in range(80)]
    folder.mkdir()
    if request.param != "small":
        monkeypatch.setattr(shards, "SMALL", 0)
    if "long" in request.param:
        monkeypatch.setattr("lorasae.io.text.PIECE", 100)
        count = 1 if "one" in request.param else 6
        for part in range(count):
            (folder / f"{part}.txt").write_text("\n".join(texts[part::count]) * 2)
    elif request.param == "mixed files":
        for part in range(10):
            (folder / f"{part}.txt").write_text(texts.pop())
            write_documents(folder / f"{part}.jsonl", texts[part:62:10])      # two of them twice
            (folder / f"{part}.jsonl.gz").write_bytes(gzip.compress(lines(texts[60 + part::10])))
    else:
        write_documents(folder / "a.jsonl", texts)
    return folder


# ---- A batch is a function of the step -----------------------------------------------------------

def test_a_batch_depends_only_on_the_step(source, tmp_path, cache):
    with text_of(source) as text:
        whole = take(text, 40)
        assert whole.dtype == torch.int64 and whole.shape == (40, 4, 16)
        for step in (7, 0, 39, 3):
            assert torch.equal(text.batch(step), whole[step])
        held = text.held_out

    # resumed anywhere, in any number of processes, with an empty cache, with other batch sizes
    run = tmp_path / "run"
    with text_of(source, folder=run) as text:
        assert torch.equal(take(text, 5), whole[:5])
    for start in (3, 11, 30, 5):
        shutil.rmtree(cache, ignore_errors=True)
        with text_of(source, folder=run) as text, text_of(source, folder=run, process=1) as other:
            assert torch.equal(take(text, 8, start), whole[start:start + 8])
            assert torch.equal(take(other, 8, start), whole[start:start + 8])
            assert torch.equal(other.held_out, held) and torch.equal(text.held_out, held)
            documents = text.documents
    with text_of(source, batch_size=10) as text:
        assert torch.equal(take(text, 16).flatten(0, 1), whole.flatten(0, 1))

    # existing shards need neither source nor tokenizer; an evaluation needs only the folder
    shutil.rmtree(source)
    with counted(Text, "_write") as calls, text_of(source, folder=run) as text:
        assert torch.equal(text.batch(5), whole[5])
    assert calls.call_count <= 1                        # it tries the next shard, in vain
    run.rename(tmp_path / "moved")
    with text_of("nowhere", folder=tmp_path / "moved") as kept:
        assert torch.equal(kept.held_out, held) and torch.equal(kept.documents, documents)


def test_the_training_order_is_as_documented(tmp_path, small_shards):
    """Documents in file order, each after an EOS; pieces after a BOS, permuted within a shard.

    Empty documents are left out.
    """
    texts = [numbered(i, i % 16) for i in range(120)]
    with text_of(write_documents(tmp_path / "a.jsonl", texts), seed=42) as text:
        found, tokens = take(text, 15).flatten(0, 1), []
        for document in texts:
            if document and digest(document) not in text.record["held_out"]:
                tokens += [EOS, *NUMBERED.encode(document, add_special_tokens=False).ids]
        assert len(text.shards) > 2
        for shard, _ in text.shards:
            cut = [[BOS, *tokens[15 * row:15 * row + 15]] for row in range(shard.first, shard.stop)]
            turns = np.random.default_rng([42, 0, shard.number]).permutation(shard.chunks)
            expected = [cut[i] for i in turns][:max(0, len(found) - shard.first)]
            assert found[shard.first:shard.stop].tolist() == expected


def test_shards_start_small_and_double(tmp_path, monkeypatch, capsys):
    for name, value in dict(FIRST=16 * 10, LARGEST=16 * 40, BATCH=1).items():
        monkeypatch.setattr(shards, name, value)
    path = write_documents(tmp_path / "a.jsonl", [numbered(i % 500) for i in range(400)])
    with text_of(path, batch_size=1) as text:
        take(text, 120)
        assert len(text.shards) > 3
        for (shard, _), size in zip(text.shards, (160, 320, 640, 640)):   # a document has 11 tokens
            assert size - 15 <= 15 * shard.chunks < size + 15 + 11
    assert capsys.readouterr().err == ""                # the text is long enough


def test_writing_stays_exactly_one_shard_ahead(tmp_path, streamed):
    path = write_documents(tmp_path / "a.jsonl", [numbered(i % 500) for i in range(2000)])
    with text_of(path) as text, counted(Text, "_write") as calls:
        for _ in range(20):
            text.batch(5)                               # does not start writing each time
        text.writing.result()
        newest, _ = text.shards[-1]
        assert [shard.number for shard, _ in read_shards(text.folder)][-1] == newest.number + 1
        assert newest.first <= 5 * 4 + 3 and calls.call_count == newest.number + 2


# ---- Held-out text -------------------------------------------------------------------------------

def test_held_out_text_is_the_same_for_every_seed_and_never_trained_on(source, request):
    with text_of(source) as one, text_of(source, seed=1) as other:
        assert torch.equal(one.held_out, other.held_out)
        assert torch.equal(one.documents, other.documents)
        assert not torch.equal(take(one, 4), take(other, 4))
        assert one.held_out.dtype == one.documents.dtype == torch.int64
        assert one.held_out.shape == (4, 16) and one.documents.shape == (4,)
        held, seen = sources_of(one.held_out), sources_of(take(one, 60))
    assert held and len(seen) > 50
    if "one long" not in request.node.name:             # which contains everything twice
        assert not held & seen


def test_a_held_out_chunk_is_of_one_document_unless_short_documents_share_it(tmp_path):
    texts = [numbered(i, 40 if i % 2 else 7) for i in range(320)]
    with text_of(write_documents(tmp_path / "a.jsonl", texts), eval_tokens=16 * 16) as text:
        assert len(text.record["held_out"]) >= 20                # a sixteenth of them
        for chunk, document in zip(text.held_out, text.documents.tolist()):
            found = sources_of(chunk)
            alike = text.held_out[text.documents == document]
            if all(i % 2 for i in found):
                assert len(found) == 1 and sources_of(alike) == found
            else:                                       # a shared chunk counts as a document
                assert len(alike) == 1 and not any(i % 2 for i in found)
        kinds = [min(sources_of(chunk)) % 2 for chunk in text.held_out]
        assert 0 < sum(kinds) < len(kinds) and len(set(text.documents.tolist())) > 6


@pytest.mark.parametrize("most", [2 ** 28, 0])
@pytest.mark.parametrize("piece", [200, 65_536])        # many pieces, or a single one
def test_a_single_document_holds_out_its_last_sixteenth(tmp_path, capsys, monkeypatch, most, piece):
    monkeypatch.setattr(shards, "SMALL", most)
    monkeypatch.setattr("lorasae.io.text.PIECE", piece)
    (tmp_path / "a.txt").write_text("".join(numbered(i, 20) + "\n" for i in range(480)))
    with text_of(tmp_path, batch_size=1) as text:
        held, train = text.held_out, take(text, 590)
        assert set(text.documents.tolist()) == {0} and (held == EOS).sum() == 0
    assert 440 <= max(sources_of(train)) <= min(sources_of(held)) and (train == EOS).sum() <= 2
    assert len(sources_of(train)) > (380 if most == 0 else 435)  # a stream's shard has many passes
    note = f"note: {tmp_path} is a single document: its last sixteenth is held out\n"
    assert capsys.readouterr().err.startswith(note)


def test_the_standard_library_is_split_by_file_name():
    with Text("stdlib", NUMBERED, BOS, EOS, context=16, eval_tokens=160) as text:
        digests = text.record["held_out"]
        assert text.held_out.shape == (10, 16)
    assert set(digests) == {
        digest(next(pieces)[1]) for file in files("stdlib") if held_out(file.name) and file.size
        for _, pieces in documents_in(file, None)}


# ---- Caches, changes and deletion ----------------------------------------------------------------

def test_runs_share_the_shards_of_a_small_source(tmp_path, monkeypatch, cache, small_shards):
    path = write_documents(tmp_path / "a.jsonl", [numbered(i) for i in range(80)])
    with text_of(path) as text:
        whole = take(text, 20)[:12]                     # all shards
        text.keep_from(12)                              # deletes none of them
    folder, = cache.iterdir()
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.copy(path, tmp_path / "elsewhere"))
    with counted(Text, "_write") as calls, text_of(moved, folder=tmp_path / "run") as text:
        assert torch.equal(take(text, 12), whole) and not calls.called
    assert not list((tmp_path / "run").glob("shard*"))
    for changed in (dict(seed=1), dict(context=17), dict(eval_tokens=100)):
        with text_of(path, **changed) as text:
            text.batch(0)
    change_a_letter(copied := Path(shutil.copy(path, tmp_path / "b.jsonl")))
    with text_of(copied.rename(moved)) as text:         # the same name and size
        text.batch(0)
    assert len(list(cache.iterdir())) == 5

    # a token outside the vocabulary is reported in one line
    shard = folder / "shard-00000.npy"
    good = shard.read_bytes()
    shard.write_bytes(good[:-4] + b"\x7f" * 4)
    with text_of(path) as text, pytest.raises(InputError, match=f"{folder} is damaged"):
        take(text, 12)
    shard.write_bytes(good)

    # a damaged or deleted shard is written again
    for name in ("shard-00001.npy", "shard-00000.json"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
        with text_of(path) as text:
            assert torch.equal(take(text, 12), whole), name
    (folder / "shard-00001.npy").unlink()
    shutil.copy(path, moved)
    with text_of(moved, folder=tmp_path / "run") as text:               # it recognises its text
        assert torch.equal(take(text, 1), whole[:1])
        shutil.rmtree(folder)                                           # while it is in use
        assert torch.equal(take(text, 12), whole)


def test_runs_of_several_processes_started_at_once_agree(tmp_path, small_shards):
    path = write_documents(tmp_path / "a.jsonl", [numbered(i % 500) for i in range(2000)])
    found = []

    def work(run, process):
        with text_of(path, folder=tmp_path / f"run{run}", process=process) as text:
            found.append(take(text, 100))

    places = [(0, 1), (0, 0), (1, 0), (1, 1), (1, 2), (2, 0)]
    threads = [threading.Thread(target=work, args=place) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all(torch.equal(tokens, found[0]) for tokens in found)


def test_shards_that_no_checkpoint_needs_are_deleted(tmp_path, streamed):
    path = write_documents(tmp_path / "a.jsonl", [numbered(i % 500) for i in range(3000)])
    run = tmp_path / "run"

    def numbers():
        return [shard.number for shard, _ in read_shards(run)]

    with text_of(path, folder=run) as text, text_of(path, folder=run, process=1) as other:
        whole = []
        for step in range(150):
            whole.append(text.batch(step))
            text.keep_from(step - 2)
            other.keep_from(step)                       # has no effect: process 0 deletes
            assert len(list(run.glob("shard-*.npy"))) <= 5
            if step in (10, 149):                       # it misses the shards in between
                assert torch.equal(other.batch(step), whole[step])
    first, second, *_ = kept = numbers()
    assert first == 0 and second > 10 and kept[1:] == list(range(second, kept[-1] + 1))
    with text_of(path, folder=run) as text:
        assert torch.equal(text.sequences(0, 3), whole[0][:3])   # the first shard is kept
        assert torch.equal(text.batch(148), whole[148]) and numbers() == kept
        assert torch.equal(text.batch(20), whole[20]) and 1 in numbers()        # written again


def change_a_letter(path):
    path.write_text(path.read_text().replace("d7 ", "d8 ", 1))


@pytest.mark.parametrize("change", [
    change_a_letter, lambda path: path.write_text(path.read_text() * 2), Path.unlink,
    lambda path: path.rename(path.with_name("1b.jsonl"))])
def test_text_that_has_changed_is_refused_if_more_of_it_is_needed(tmp_path, streamed, change):
    source, run = tmp_path / "source", tmp_path / "run"
    source.mkdir()
    for part in range(3):
        write_documents(source / f"{part}.jsonl", [numbered(i % 500) for i in range(600)])
    with text_of(source, folder=run) as text:
        whole = take(text, 5)
    path = source / "1.jsonl"
    path.write_bytes(path.read_bytes())                                 # unchanged
    with text_of(source, folder=run) as text:
        take(text, 15)
    change(path)
    message = r"has changed since the run began \(.*/1b?\.jsonl is new, missing or different\)"
    with text_of(source, folder=run) as text:
        refuses(message, take, text, 100)
        assert torch.equal(take(text, 2), whole[:2])                    # existing shards still work


# ---- The end of the text, and too little text ----------------------------------------------------

def test_finite_text_is_used_again_in_another_order_with_one_note(source, capsys):
    length = 40                                         # chunks; the whole text has 43 to 92
    with text_of(source, batch_size=1) as text:
        chunks = take(text, 300)[:, 0]
    line, = [line for line in capsys.readouterr().err.splitlines() if "single doc" not in line]
    assert re.search("note: all of .*source has been read: it is used again", line)
    again = [chunks[start:start + length] for start in range(length, 280)]
    assert not any(torch.equal(chunks[:length], other) for other in again)
    assert sources_of(chunks[100:]) == sources_of(chunks)


@pytest.mark.parametrize("texts, message", [
    ([], "too short: its held-out text makes 0 chunks of 16 tokens, but it needs 4: use more text"),
    ([""] * 50, "too short: its held-out text makes 0 chunks of 16 tokens, but it needs 4"),
    ([numbered(0, 5)] * 3, "too short: its held-out text makes 1 chunks of 16 tokens, but it"),
    ([numbered(0, 99)] * 50, "to train on: its documents all begin like those held out"),
    ([numbered(0, 99), "d1"], "too short: its training text makes 0 chunks of 16 tokens"),
])
def test_too_little_text_is_refused_in_one_line(tmp_path, streamed, monkeypatch, texts, message):
    path = write_documents(tmp_path / "a.jsonl", texts)
    for seed, most in enumerate((2 ** 28, 0)[:1 if "training" in message else 2]):
        monkeypatch.setattr(shards, "SMALL", most)
        with pytest.raises(InputError, match=rf"a\.jsonl .*{message}"):
            with text_of(path, seed=seed) as text:
                text.batch(0)


def test_a_tokenizer_without_the_special_tokens_or_a_vocabulary_is_refused(tmp_path):
    path = write_documents(tmp_path / "a.jsonl", map(numbered, range(300)))
    for bos, eos, name in ((9999, EOS, "BOS"), (BOS, 9999, "EOS")):
        refuses(f"the tokenizer has no {name} token", Text, path, NUMBERED, bos, eos)
    empty = Tokenizer(models.BPE())
    empty.add_special_tokens(["<bos>", "<eos>"])
    with pytest.raises(InputError, match="the tokenizer makes no tokens from .*a.jsonl: is its"):
        Text(path, empty, BOS, EOS, context=4, eval_tokens=16, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_does_without_a_cache_that_it_cannot_write(tmp_path, monkeypatch, small_shards):
    monkeypatch.setenv("LORASAE_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    path = write_documents(tmp_path / "a.jsonl", map(numbered, range(80)))
    with text_of(path, folder=tmp_path / "run") as text:
        found = take(text, 30)                          # more than one epoch
    assert len(read_shards(tmp_path / "run")) > 1
    monkeypatch.setenv("LORASAE_CACHE", str(tmp_path / "cache"))
    with text_of(path) as text:
        assert torch.equal(found, take(text, 30))


def test_a_bad_line_deep_in_the_text_raises_when_its_batch_is_asked_for(tmp_path, streamed):
    path = write_documents(tmp_path / "a.jsonl", [numbered(i) for i in range(300)])
    with path.open("a") as file:
        file.write("{broken\n")
    with text_of(path) as text:
        refuses(r"line 301 \(Expecting", take, text, 100)
        newest, _ = text.shards[-1]
        with counted(Text, "_write") as calls:          # shards written before it are good
            take(text, newest.stop // 4)
        assert newest.stop > 150 and calls.call_count <= 1


# ---- Streams -------------------------------------------------------------------------------------

def test_a_stream_gives_every_document_once_in_a_seeded_order(tmp_path, monkeypatch):
    monkeypatch.setattr("lorasae.io.text.AT_ONCE", 3)
    for part in range(5):
        write_documents(tmp_path / f"{part}.jsonl", [f"{part} {i}" for i in range(40)])
    sources = files(str(tmp_path))
    one, again, other = ([*map(joined, documents(sources, None, seed))] for seed in (0, 0, 1))
    assert one == again != other
    assert sorted(one) == sorted(f"{part} {i}" for part in range(5) for i in range(40))


def test_any_stretch_of_a_stream_mixes_its_files_in_proportion(tmp_path):
    """A file three times as long as the other gives three quarters of the characters."""
    write_documents(tmp_path / "a.jsonl", ["a" * 1000] * 3000)
    write_documents(tmp_path / "b.jsonl", ["b" * 250] * 4000)
    found = documents(files(str(tmp_path)), None, 0)
    stretch = "".join(joined(next(found)) for _ in range(2800))
    assert abs(stretch.count("a") / len(stretch) - 0.75) < 0.06


# ---- Closing, and memory -------------------------------------------------------------------------

def test_closing_stops_the_writing_of_shards(tmp_path, streamed, monkeypatch):
    path = write_documents(tmp_path / "a.jsonl", [numbered(i % 500, 100) for i in range(900)])
    monkeypatch.setattr(shards, "LARGEST", 10 ** 12)
    with pytest.raises(KeyboardInterrupt), text_of(path) as text:
        text._write_after(shards.NONE._replace(number=99))              # would take weeks
        while not text.writing.running():
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert text.writing.done() and not read_shards(text.folder)


BOUNDED = """
import re, resource, sys
from pathlib import Path
from lorasae.errors import InputError
from lorasae.io import shards, text
from test_shards import text_of

text.SMALL = shards.SMALL = 2 ** 24
shards.FIRST, shards.MANY = 2 ** 14, 16
allocated = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
limit = 1024 * allocated + 300 * 2 ** 20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
for name in sys.argv[1:]:
    try:
        with text_of(name, context=64, eval_tokens=640) as run:
            for step in range(100):
                run.batch(step)
        print("read")
    except InputError as error:
        print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_bounded_whatever_a_file_contains(tmp_path):
    """300 MiB are enough for long documents, files and lines, and small archives of long text."""
    words = [numbered(i, 5000) for i in range(100)]
    text = "".join(words)
    documents = (json.dumps({"text": f"d{i} {text * 13}"}) + "\n" for i in range(2))    # 20 MB each
    (tmp_path / "document.jsonl").write_text("".join(documents))
    (tmp_path / "long.txt").write_text(text * 120)                                      # 190 MB
    with (tmp_path / "line.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(10 ** 9)
    (tmp_path / "archive.jsonl.zst").write_bytes(zstd_compress(lines(words)) * 200)
    line = gzip.compress(b'{"text": "' + b"a" * 2 ** 27, mtime=0)
    (tmp_path / "line.jsonl.gz").write_bytes(line)
    names = ["document.jsonl", "long.txt", "line.jsonl", "archive.jsonl.zst", "line.jsonl.gz"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "MALLOC_ARENA_MAX": "2"}
    result = subprocess.run([sys.executable, "-c", BOUNDED, *names], cwd=tmp_path, timeout=200,
                            env=environment, capture_output=True, text=True)
    too_long = ("line 1 is longer than 64 MiB: expected one JSON object per line, with one "
                "document in each; split this one up")
    assert result.stdout.splitlines() == [
        "read", "read", f"line.jsonl, {too_long}", "read", f"line.jsonl.gz, {too_long}"
    ], result.stderr


def test_a_shard_without_chunks_is_valid(tmp_path):
    """The last shard, if the tokens left do not fill a chunk."""
    shards.write_array(tmp_path / "shard-00000.npy", np.empty((0, 16), np.int32))
    facts = shards.Shard(0, 0, 0, 16, True, 1, [])
    write_json(tmp_path / "shard-00000.json", facts._asdict())
    (shard, chunks), = read_shards(tmp_path)
    assert shard.ends and chunks.shape == (0, 16)
