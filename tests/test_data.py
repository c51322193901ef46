"""Packing, the held-out split, the order of the text, and how batches go on at a position: io/corpus, order, packing."""
import gzip
import io
import itertools
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lorasae.io import corpus as corpus_file
from lorasae.io import documents, order, packing, streams
from lorasae.io.corpus import Corpus
from lorasae.model import special_positions
from lorasae.io.order import ordered
from lorasae.io.packing import pack
from lorasae.io.streams import files, held_out
from lorasae.errors import InputError

BOS, EOS = 0, 1


def word_tokenizer(words):
    """One token a word; BOS is put first by the post-processor, as in Gemma's and Llama's tokenizer.json."""
    vocabulary = {"<bos>": BOS, "<eos>": EOS, "<unk>": 2} | {word: 3 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return tokenizer


NUMBERED = word_tokenizer([f"d{i}" for i in range(500)])


def numbered(i, length=10):
    """Document i: its own word again and again, so that a token tells from which document it comes."""
    return f"d{i} " * length


def write_documents(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def corpus_of(path, **settings):
    return Corpus(path, NUMBERED, BOS, EOS, **({"context": 16, "eval_tokens": 64, "seed": 0} | settings))


def sources_of(tokens):
    """The set of the document numbers that tokens come from."""
    return set((np.unique(tokens) - 3).tolist()) - {-3, -2, -1}


def take(batches, count):
    return torch.stack([tokens for tokens, _ in itertools.islice(batches, count)])


# ---- Packing ---------------------------------------------------------------------------------------------------------

def test_packing_gives_the_worked_example():
    tokenizer = word_tokenizer(["a", "b", "c"])
    chunks = [chunk.tolist() for chunk, _ in pack(["a b c a b", "c a b c a"], tokenizer, BOS, EOS, 5)]
    assert chunks == [[0, 1, 3, 4, 5], [0, 3, 4, 1, 5]]                # and [0, 3, 4, 5, 3], the last, is dropped


def test_chunks_are_the_pieces_of_a_tokenizer_that_truncates_with_overflow(monkeypatch):
    """The published code joins a group's documents with EOS, encodes once and keeps all pieces but the last."""
    monkeypatch.setattr(packing, "GROUP", 7)
    rng = np.random.default_rng(0)
    documents = [" ".join(f"d{i}" for i in rng.integers(500, size=rng.integers(0, 40))) for _ in range(45)]
    for context in (2, 3, 8, 16):
        truncating = Tokenizer.from_str(NUMBERED.to_str())
        truncating.enable_truncation(context)
        expected = []
        for first in range(0, len(documents), 7):
            encoding = truncating.encode("<eos>" + "<eos>".join(documents[first:first + 7]))
            expected += [piece.ids for piece in [encoding, *encoding.overflowing]][:-1]
        assert [chunk.tolist() for chunk, _ in pack(documents, NUMBERED, BOS, EOS, context)] == expected


def test_chunks_are_those_of_the_fast_tokenizer_of_transformers():
    transformers = pytest.importorskip("transformers", reason="the oracle of this test is transformers' fast tokenizer")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(NUMBERED.to_str()),
                                                bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    documents = [numbered(i, 1 + i % 9) for i in range(60)]
    output = fast("<eos>" + "<eos>".join(documents), max_length=16, truncation=True, return_overflowing_tokens=True)
    assert [chunk.tolist() for chunk, _ in pack(documents, NUMBERED, BOS, EOS, 16)] == output["input_ids"][:-1]


def test_the_last_piece_of_a_group_is_dropped_even_when_full(monkeypatch):
    monkeypatch.setattr(packing, "GROUP", 2)
    chunks = pack([numbered(0, 7), numbered(1, 7), numbered(2, 8)], NUMBERED, BOS, EOS, 9)
    assert [sources_of(chunk) for chunk, _ in chunks] == [{0}, {2}]         # 2 pieces of 8 less one; 9 tokens are one


def test_how_the_text_is_batched_for_the_tokenizer_changes_nothing(monkeypatch):
    texts = [numbered(i, 5 + i % 11) for i in range(100)]
    whole = [(chunk.tolist(), rest.begun) for chunk, rest in pack(texts, NUMBERED, BOS, EOS, 16)]
    monkeypatch.setattr(packing, "BATCH", 1)
    assert [(chunk.tolist(), rest.begun) for chunk, rest in pack(texts, NUMBERED, BOS, EOS, 16)] == whole


def test_a_tokenizer_file_that_truncates_and_pads_is_used_whole(tmp_path):
    tokenizer = Tokenizer.from_str(NUMBERED.to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    path = write_documents(tmp_path / "a.jsonl", [numbered(i, 40) for i in range(20)])
    settings = dict(context=16, eval_tokens=64, seed=0)
    assert torch.equal(Corpus(path, tokenizer, BOS, EOS, **settings).held_out, corpus_of(path).held_out)


def test_special_positions_marks_bos_and_eos():
    tokens = torch.tensor([[BOS, EOS, 5, 6], [BOS, 5, EOS, 2]])
    assert special_positions(tokens, BOS, EOS).tolist() == [[True, True, False, False], [True, False, True, False]]


# ---- The split -------------------------------------------------------------------------------------------------------

def test_validation_is_the_start_of_the_permuted_documents(tmp_path):
    texts = [numbered(i) for i in range(100)]
    corpus = corpus_of(write_documents(tmp_path / "a.jsonl", texts), eval_tokens=100, seed=42)
    permuted = [texts[i] for i in np.random.default_rng(42).permutation(100)]
    chunks = [chunk for chunk, _ in pack(permuted, NUMBERED, BOS, EOS, 16)]
    assert corpus.held_out.dtype == torch.int64
    assert torch.equal(corpus.held_out, torch.from_numpy(np.stack(chunks[:7])))      # 100 tokens round up to 7 chunks


def test_training_mixes_chunks_of_the_same_order_after_the_last_validation_document(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_file, "MIXED", 8 * 16)                       # eight chunks
    texts = [numbered(i) for i in range(100)]
    corpus = corpus_of(write_documents(tmp_path / "a.jsonl", texts), seed=42)
    turns = np.random.default_rng(42).permutation(100)
    held = max(i for i in range(100) if turns[i] in sources_of(corpus.held_out)) + 1
    expected = [chunk for chunk, _ in pack([texts[i] for i in turns[held:]], NUMBERED, BOS, EOS, 16)]
    found = take(corpus.batches(2), 12).flatten(0, 1).tolist()
    for mix in range(0, 24, 8):
        in_order = [chunk.tolist() for chunk in expected[mix:mix + 8]]
        assert sorted(found[mix:mix + 8]) == sorted(in_order) and found[mix:mix + 8] != in_order


def test_chunks_of_one_long_document_do_not_follow_one_another(tmp_path):
    path = write_documents(tmp_path / "a.jsonl", [numbered(i, 4000) for i in range(6)])
    corpus = corpus_of(path)
    chunks = take(corpus.batches(1), 400)[:, 0]
    sources = [min(sources_of(chunk)) for chunk in chunks]
    changes = sum(source != following for source, following in zip(sources, sources[1:]))
    assert changes > 0.5 * len(sources)


@pytest.mark.parametrize("streamed", [False, True])
def test_no_document_is_in_both_parts_however_often_the_text_starts_again(tmp_path, monkeypatch, capsys, streamed):
    if streamed:
        monkeypatch.setattr(order, "IN_MEMORY", 0)
        monkeypatch.setattr(order, "SEGMENT", 1000)
    for part in range(4):
        write_documents(tmp_path / f"{part}.jsonl", [numbered(i) for i in range(part, 60, 4)])
    corpus = corpus_of(tmp_path)
    held, seen = sources_of(corpus.held_out), sources_of(take(corpus.batches(4), 60))      # six times through
    assert held and not held & seen and len(held | seen) >= 59      # the end of a group, dropped, may hide a document


def test_a_text_that_is_in_validation_under_another_name_is_left_out_of_training(tmp_path):
    write_documents(tmp_path / "a.jsonl", [numbered(i) for i in range(50)])
    write_documents(tmp_path / "b.jsonl", [numbered(i) for i in range(50)])
    corpus = corpus_of(tmp_path)
    assert not sources_of(corpus.held_out) & sources_of(take(corpus.batches(4), 50))


def test_both_parts_are_the_same_for_the_same_arguments_alone(tmp_path):
    path = write_documents(tmp_path / "a.jsonl", [numbered(i) for i in range(100)])
    first, again, other = corpus_of(path), corpus_of(path), corpus_of(path, seed=1)
    trained = take(first.batches(4), 30)
    assert torch.equal(take(again.batches(4), 30), trained)             # here asked for before validation
    assert torch.equal(again.held_out, first.held_out)
    assert not torch.equal(other.held_out, first.held_out)
    assert not torch.equal(take(other.batches(4), 30), trained)


def test_the_standard_library_is_split_by_file_name():
    corpus = Corpus("stdlib", NUMBERED, BOS, EOS, context=16, eval_tokens=160)
    names = {file.name for file in files("stdlib")}
    assert {file.name for file in corpus.validation_files} == {name for name in names if held_out(name)}
    assert {file.name for file in corpus.training_files} == {name for name in names if not held_out(name)}
    assert 0.03 < len(corpus.validation_files) / len(names) < 0.1 and corpus.held_out.shape == (10, 16)


# ---- Order, ends and resuming ----------------------------------------------------------------------------------------

def kept(position):
    """A position as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(position, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(params=["in memory", "stream", "sixteen files", "one long text"])
def several_passes(request, tmp_path, monkeypatch):
    """A folder of text that 30 batches of 4 chunks use up several times, in every kind of order."""
    if request.param != "in memory":                    # there a mix is all of an epoch
        monkeypatch.setattr(corpus_file, "MIXED", 16 * 7)
        monkeypatch.setattr(order, "IN_MEMORY", 0)
        monkeypatch.setattr(order, "SEGMENT", 2000)
    if request.param == "sixteen files":
        for part in range(20):
            text = b"".join(json.dumps({"text": numbered(i)}).encode() + b"\n" for i in range(part, 60, 20))
            (tmp_path / f"{part}.jsonl.gz").write_bytes(gzip.compress(text))
    elif request.param == "one long text":
        monkeypatch.setattr(documents, "DOCUMENT", 100)
        write_documents(tmp_path / "a.jsonl", ["".join(f"{numbered(i)}\n" for i in range(60))])
    else:
        write_documents(tmp_path / "a.jsonl", [numbered(i) for i in range(60)])
    return tmp_path


def test_batches_go_on_at_every_position_as_if_nothing_had_happened(several_passes, monkeypatch):
    monkeypatch.setattr(packing, "GROUP", 40)                               # a group's end within a pass
    with corpus_of(several_passes).batches(4) as batches:
        whole = list(itertools.islice(batches, 30))
        positions = [batches.start] + [position for _, position in whole]
    tokens = [tokens.tolist() for tokens, _ in whole]
    for done in (0, 1, 2, 3, 7, 9, 10, 17, 23, 29):
        with corpus_of(several_passes).batches(4, kept(positions[done])) as batches:
            assert [tokens.tolist() for tokens, _ in itertools.islice(batches, 30 - done)] == tokens[done:], done
            assert str(batches.start) == str(positions[done])


def test_a_position_of_a_resumed_run_is_that_of_the_whole_run(several_passes):
    whole = list(itertools.islice(corpus_of(several_passes).batches(2), 40))
    middle = list(itertools.islice(corpus_of(several_passes).batches(2, kept(whole[9][1])), 10))
    assert str(middle[-1][1]) == str(whole[19][1])
    assert torch.equal(take(corpus_of(several_passes).batches(2, kept(middle[-1][1])), 20), torch.stack([t for t, _ in whole[20:]]))


def test_a_position_serves_another_batch_size(several_passes):
    whole = take(corpus_of(several_passes).batches(1), 36).flatten(0, 1)
    _, position = next(corpus_of(several_passes).batches(12))
    assert torch.equal(take(corpus_of(several_passes).batches(8, position), 3).flatten(0, 1), whole[12:])


def test_the_rest_of_a_document_of_many_chunks_is_in_the_position(tmp_path):
    path = write_documents(tmp_path / "a.jsonl", [numbered(i, 400) for i in range(10)])         # 27 chunks in each
    whole = list(itertools.islice(corpus_of(path).batches(1), 100))
    for done in (1, 5, 26, 27, 28, 60):
        assert torch.equal(take(corpus_of(path).batches(1, kept(whole[done - 1][1])), 20), torch.stack([t for t, _ in whole[done:done + 20]]))


def test_nothing_before_the_position_is_tokenised_or_read_again(tmp_path, monkeypatch):
    """Plain files are entered in their middle, and of compressed ones no line before the place is parsed."""
    monkeypatch.setattr(order, "IN_MEMORY", 0)
    monkeypatch.setattr(order, "SEGMENT", 5000)
    monkeypatch.setattr(packing, "BATCH", 1000)
    monkeypatch.setattr(corpus_file, "MIXED", 16 * 8)
    text = b"".join(json.dumps({"text": numbered(i)}).encode() + b"\n" for i in range(400))
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.replace(b"d", b"d1")))
    corpus = corpus_of(tmp_path)
    with corpus.batches(4) as batches:
        position = kept(list(itertools.islice(batches, 60))[-1][1])
    saved = kept(corpus.held)
    first_lines, original = {}, documents.text_of

    def parse(line, where, *more):
        name, _, number = where.partition(", line ")
        first_lines.setdefault(name, int(number))
        return original(line, where, *more)

    monkeypatch.setattr(documents, "text_of", parse)
    with corpus_of(tmp_path, saved=saved).batches(4, position) as batches:
        for _ in range(30):
            next(batches)
    places = position["segment"]["following"]["files"]
    assert sorted(first_lines.values()) == sorted(line + 1 for _, line in places) and min(first_lines.values()) > 20


def test_within_a_mix_a_run_goes_on_without_the_next_segment(tmp_path, monkeypatch):
    """Which may be far down a compressed file."""
    monkeypatch.setattr(order, "IN_MEMORY", 0)
    monkeypatch.setattr(order, "SEGMENT", 3000)
    path = write_documents(tmp_path / "a.jsonl", [numbered(i) for i in range(400)])
    whole = list(itertools.islice(corpus_of(path).batches(1), 250))
    saved = kept(corpus_of(path).held)

    def unreachable(self, size):
        raise InputError("the next segment was needed")

    monkeypatch.setattr(order.Mix, "take", unreachable)
    lengths = set()
    for number, (_, position) in enumerate(whole):
        if position["taken"] and position["segment"]:
            left = position["mixed"] - position["taken"]
            expected = whole[number + 1:number + 1 + left]
            with corpus_of(path, saved=saved).batches(1, kept(position)) as batches:
                found = [next(batches) for _ in expected]
            assert all(torch.equal(tokens, before) for (tokens, _), (before, _) in zip(found, expected))
            lengths.add(position["mixed"])
    assert len(lengths) > 1 and min(lengths) > 5


def test_a_position_of_an_earlier_version_is_refused(tmp_path):
    path = write_documents(tmp_path / "a.jsonl", [numbered(i) for i in range(60)])
    _, position = next(corpus_of(path).batches(1))
    del position["mixed"]
    with pytest.raises(InputError, match="written by an earlier version.*start again with another --out"):
        corpus_of(path).batches(1, position)


def test_validation_chunks_and_what_they_exclude_can_be_kept(tmp_path):
    path = write_documents(tmp_path / "a.jsonl", [numbered(i) for i in range(60)])
    corpus = corpus_of(path)
    saved = kept(corpus.held)
    again = corpus_of(path, saved=saved)
    assert torch.equal(take(again.batches(4), 20), take(corpus.batches(4), 20))
    path.unlink()
    assert torch.equal(again.held_out, corpus.held_out)


def test_a_position_is_small_and_plain(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "IN_MEMORY", 0)
    path = write_documents(tmp_path / "a.jsonl", [numbered(i % 500, 200) for i in range(4000)])
    size = path.stat().st_size
    for small, most in ((2 ** 28, 20_000), (0, 0.25 * size)):               # here the stream is one segment, packed
        monkeypatch.setattr(order, "IN_MEMORY", small)
        with corpus_of(path).batches(4) as batches:
            _, position = next(batches)
        file = io.BytesIO()
        torch.save(position, file)
        assert len(file.getvalue()) < most


@pytest.mark.parametrize("change", ["a letter", "longer", "renamed", "one more", "one less"])
def test_a_text_that_has_changed_since_is_refused_in_one_line(tmp_path, change):
    for part in range(3):
        write_documents(tmp_path / f"{part}.jsonl", [numbered(i) for i in range(40)])
    _, position = next(corpus_of(tmp_path).batches(1))
    path = tmp_path / "1.jsonl"
    if change == "a letter":
        path.write_text(path.read_text().replace("d7 ", "d8 ", 1))
    elif change == "longer":
        path.write_text(path.read_text() + path.read_text())
    elif change == "renamed":
        path.rename(tmp_path / "1b.jsonl")
    elif change == "one more":
        write_documents(tmp_path / "1b.jsonl", ["more"])
    else:
        path.unlink()
    with pytest.raises(InputError, match=r"has changed since the run that is to be resumed: .*/[12]b?\.jsonl is another file") as caught:
        corpus_of(tmp_path).batches(1, position)
    assert "\n" not in str(caught.value)


def test_a_file_that_was_only_touched_is_the_same(tmp_path):
    path = write_documents(tmp_path / "a.jsonl", [numbered(i) for i in range(60)])
    _, position = next(corpus_of(path).batches(1))
    write_documents(path, [numbered(i) for i in range(60)])
    next(corpus_of(path).batches(1, position))


def test_a_large_file_is_known_by_stretches_of_it(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    data = bytearray(b"x" * 300_000)
    path.write_bytes(data)
    known = streams.fingerprints(files(str(path)))
    for place in (0, 100_000, 299_999):
        changed = data.copy()
        changed[place] = ord("y")
        path.write_bytes(changed)
        assert streams.fingerprints(files(str(path))) != known


def test_finite_text_starts_again_in_a_new_order_and_says_so_once(tmp_path, capsys):
    corpus = corpus_of(write_documents(tmp_path / "a.jsonl", [numbered(i) for i in range(60)]))
    chunks = take(corpus.batches(1), 120)[:, 0]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "a.jsonl has text for only" in lines[0] and "16 tokens" in lines[0]
    length = int(lines[0].split("only ")[1].split()[0])
    assert not torch.equal(chunks[:length], chunks[length:2 * length])
    common = sources_of(chunks[:length]) & sources_of(chunks[length:2 * length])
    assert len(common) >= len(sources_of(chunks)) - 2               # all but the ends of groups, which are dropped


def test_text_that_suffices_says_nothing(tmp_path, capsys):
    corpus = corpus_of(write_documents(tmp_path / "a.jsonl", [numbered(i % 500) for i in range(4000)]))
    batches = corpus.batches(1)
    take(batches, 5)
    batches.close()
    assert capsys.readouterr().err == ""


def test_a_stream_gives_every_document_once_in_a_seeded_order(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "IN_MEMORY", 0)
    monkeypatch.setattr(order, "MIXED", 3)
    for part in range(5):
        write_documents(tmp_path / f"{part}.jsonl", [f"{part} {i}" for i in range(40)])
    sources = files(str(tmp_path))

    def texts(seed, epoch=0):
        return [text for text, _ in ordered(sources, None, seed, epoch)]

    for segment in (1500, 100_000):                                         # the second holds the whole stream
        monkeypatch.setattr(order, "SEGMENT", segment)
        orders = [texts(0), texts(0), texts(1), texts(0, epoch=1)]
        assert orders[0] == orders[1] and orders[0] != orders[2] and orders[0] != orders[3]
        assert sorted(orders[0]) == sorted(f"{part} {i}" for part in range(5) for i in range(40))
        places = [orders[0].index(f"3 {i}") for i in range(40)]
        assert places != sorted(places)                                     # a file's own order is gone
    monkeypatch.setattr(order, "SEGMENT", 1)
    monkeypatch.setattr(order, "MIXED", 1)
    parts = [int(text.split()[0]) for text in texts(0)]
    assert parts[::40] == np.random.default_rng(0).permutation(5).tolist()     # nor are the files in the order of names


def test_a_segment_is_bounded_in_bytes_whatever_the_documents_weigh(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "IN_MEMORY", 0)
    monkeypatch.setattr(order, "SEGMENT", 10_000)
    write_documents(tmp_path / "a.jsonl", ["ä" * 1000] * 50 + [""] * 1000 + ["b" * 4000] * 20)
    found = list(order.segments(files(str(tmp_path)), None, 0, 0))
    weights = [sum(len(text.encode()) + order.EACH for text in segment.texts) for segment in found]
    assert all(10_000 <= weight < 15_000 for weight in weights[:-1]) and sum(len(segment.texts) for segment in found) == 1070


def test_any_stretch_of_a_stream_has_its_files_in_proportion(tmp_path, monkeypatch):
    """One file three times as long as the other: three quarters of the characters of every stretch come from it."""
    write_documents(tmp_path / "a.jsonl", ["a" * 1000] * 3000)
    write_documents(tmp_path / "b.jsonl", ["b" * 250] * 4000)
    with order.Mix(files(str(tmp_path)), None, at_once=2) as mix:
        stretch = mix.take(1_600_000)
    assert abs(sum(text.count("a") for text in stretch) / sum(map(len, stretch)) - 0.75) < 0.06


@pytest.mark.parametrize("name, pack", [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress)])
def test_what_is_permuted_in_memory_is_decided_by_what_the_files_hold(tmp_path, monkeypatch, name, pack):
    text = b"".join(json.dumps({"text": numbered(i)}).encode() + b"\n" for i in range(100))
    (tmp_path / name).write_bytes(pack(text))
    for most, expected in ((len(text), 100), (len(text) - 1, None)):
        monkeypatch.setattr(order, "IN_MEMORY", most)
        found = order.all_documents(files(str(tmp_path)), None)
        assert (found and len(found)) == expected


# ---- Too little text, wrong tokens -----------------------------------------------------------------------------------

@pytest.mark.parametrize("documents, message", [
    ([], r"a.jsonl is too short: 0 tokens for 4 validation chunks .*, 61 needed"),
    ([numbered(0, 5)], r"a.jsonl is too short: 6 tokens for 4 validation chunks .*, 61 needed"),
    ([numbered(0, 59)], r"a.jsonl is too short: 60 tokens for 4 validation chunks .*, 61 needed"),
    ([numbered(0, 60)], r"a.jsonl is too short: 0 tokens for training .*, 16 needed"),
    ([numbered(0, 60)] * 9, r"a.jsonl is too short: 0 tokens for training .*, 16 needed"),
])
def test_too_little_text_is_told_with_the_tokens_there_are_and_the_tokens_needed(tmp_path, documents, message):
    corpus = corpus_of(write_documents(tmp_path / "a.jsonl", documents))
    with pytest.raises(InputError, match=message):
        corpus.batches(2)


def test_the_tokens_said_to_be_needed_suffice(tmp_path):
    seed = next(seed for seed in range(9) if np.random.default_rng(seed).permutation(2)[0] == 0)    # the written order
    path = write_documents(tmp_path / "a.jsonl", [numbered(0, 60), numbered(1, 15)])           # 61 tokens, then 16
    assert sources_of(take(corpus_of(path, seed=seed).batches(1), 1)) == {1}
    path = write_documents(tmp_path / "b.jsonl", [numbered(0, 60), numbered(1, 14)])
    with pytest.raises(InputError, match="15 tokens for training .*, 16 needed"):
        corpus_of(path, seed=seed).batches(1)


@pytest.mark.parametrize("bos, eos, name", [(None, EOS, "BOS"), (9999, EOS, "BOS"), ([0, 1], EOS, "BOS"),
                                            (BOS, None, "EOS"), (BOS, -1, "EOS")])
def test_a_tokenizer_without_the_models_special_tokens_is_refused(tmp_path, bos, eos, name):
    path = write_documents(tmp_path / "a.jsonl", [numbered(0)])
    with pytest.raises(InputError, match=f"the tokenizer has no {name} token"):
        Corpus(path, NUMBERED, bos, eos)


# ---- The background thread -------------------------------------------------------------------------------------------

def test_an_unreadable_line_deep_in_the_text_reaches_the_training_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "IN_MEMORY", 0)                               # a stream: the line is met while training
    monkeypatch.setattr(order, "SEGMENT", 1000)
    monkeypatch.setattr(packing, "BATCH", 100)
    monkeypatch.setattr(corpus_file, "MIXED", 16 * 8)
    path = write_documents(tmp_path / "a.jsonl", [numbered(i % 500) for i in range(2000)])
    with path.open("a") as file:
        file.write("{broken\n")
    batches = corpus_of(path).batches(1)
    with pytest.raises(InputError, match="line 2,001: not JSON"):
        for _ in range(5000):
            next(batches)
