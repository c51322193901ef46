"""Packing, the held-out split, the order of the text, resuming and the background thread: lorasae/data.py."""
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lorasae.io import corpus as data
from lorasae.io.corpus import Corpus, pack, special_mask
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
    return torch.stack([next(batches) for _ in range(count)])


# ---- Packing ---------------------------------------------------------------------------------------------------------

def test_packing_gives_the_worked_example():
    tokenizer = word_tokenizer(["a", "b", "c"])
    chunks = [chunk.tolist() for chunk, _ in pack(["a b c a b", "c a b c a"], tokenizer, BOS, EOS, 5)]
    assert chunks == [[0, 1, 3, 4, 5], [0, 3, 4, 1, 5]]                # and [0, 3, 4, 5, 3], the last, is dropped


def test_chunks_are_the_pieces_of_a_tokenizer_that_truncates_with_overflow(monkeypatch):
    """The published code joins a group's documents with EOS, encodes once and keeps all pieces but the last."""
    monkeypatch.setattr(data, "GROUP", 7)
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
    monkeypatch.setattr(data, "GROUP", 2)
    chunks = pack([numbered(0, 7), numbered(1, 7), numbered(2, 8)], NUMBERED, BOS, EOS, 9)
    assert [sources_of(chunk) for chunk, _ in chunks] == [{0}, {2}]         # 2 pieces of 8 less one; 9 tokens are one


def test_how_the_text_is_batched_for_the_tokenizer_changes_nothing(monkeypatch):
    documents = [numbered(i, 5 + i % 11) for i in range(100)]
    whole = [(chunk.tolist(), begun) for chunk, begun in pack(documents, NUMBERED, BOS, EOS, 16)]
    monkeypatch.setattr(data, "BATCH", 1)
    assert [(chunk.tolist(), begun) for chunk, begun in pack(documents, NUMBERED, BOS, EOS, 16)] == whole


def test_a_tokenizer_file_that_truncates_and_pads_is_used_whole(tmp_path):
    tokenizer = Tokenizer.from_str(NUMBERED.to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    path = write_documents(tmp_path / "a.jsonl", [numbered(i, 40) for i in range(20)])
    settings = dict(context=16, eval_tokens=64, seed=0)
    assert torch.equal(Corpus(path, tokenizer, BOS, EOS, **settings).validation, corpus_of(path).validation)


def test_special_mask_marks_bos_and_eos():
    tokens = torch.tensor([[BOS, EOS, 5, 6], [BOS, 5, EOS, 2]])
    assert special_mask(tokens, BOS, EOS).tolist() == [[True, True, False, False], [True, False, True, False]]


# ---- The split -------------------------------------------------------------------------------------------------------

def test_validation_is_the_start_of_the_permuted_documents(tmp_path):
    documents = [numbered(i) for i in range(100)]
    corpus = corpus_of(write_documents(tmp_path / "a.jsonl", documents), eval_tokens=100, seed=42)
    order = [documents[i] for i in np.random.default_rng(42).permutation(100)]
    chunks = [chunk for chunk, _ in pack(order, NUMBERED, BOS, EOS, 16)]
    assert corpus.validation.dtype == torch.int64
    assert torch.equal(corpus.validation, torch.from_numpy(np.stack(chunks[:7])))      # 100 tokens round up to 7 chunks


def test_training_continues_the_same_order_after_the_last_validation_document(tmp_path):
    documents = [numbered(i) for i in range(100)]
    corpus = corpus_of(write_documents(tmp_path / "a.jsonl", documents), seed=42)
    order = np.random.default_rng(42).permutation(100)
    held = max(i for i in range(100) if order[i] in sources_of(corpus.validation)) + 1
    expected = [chunk for chunk, _ in pack([documents[i] for i in order[held:]], NUMBERED, BOS, EOS, 16)]
    batches = corpus.batches(2)
    assert torch.equal(take(batches, 10).flatten(0, 1), torch.from_numpy(np.stack(expected[:20])))


@pytest.mark.parametrize("streamed", [False, True])
def test_no_document_is_in_both_parts_however_often_the_text_starts_again(tmp_path, monkeypatch, capsys, streamed):
    if streamed:
        monkeypatch.setattr(data, "IN_MEMORY", 0)
        monkeypatch.setattr(data, "BUFFER", 10)
    for part in range(4):
        write_documents(tmp_path / f"{part}.jsonl", [numbered(i) for i in range(part, 60, 4)])
    corpus = corpus_of(tmp_path)
    held, seen = sources_of(corpus.validation), sources_of(take(corpus.batches(4), 60))      # six times through
    assert held and not held & seen and len(held | seen) >= 59      # the end of a group, dropped, may hide a document


def test_a_text_that_is_in_validation_under_another_name_is_left_out_of_training(tmp_path):
    write_documents(tmp_path / "a.jsonl", [numbered(i) for i in range(50)])
    write_documents(tmp_path / "b.jsonl", [numbered(i) for i in range(50)])
    corpus = corpus_of(tmp_path)
    assert not sources_of(corpus.validation) & sources_of(take(corpus.batches(4), 50))


def test_both_parts_are_the_same_for_the_same_arguments_alone(tmp_path):
    path = write_documents(tmp_path / "a.jsonl", [numbered(i) for i in range(100)])
    first, again, other = corpus_of(path), corpus_of(path), corpus_of(path, seed=1)
    trained = take(first.batches(4), 30)
    assert torch.equal(take(again.batches(4), 30), trained)             # here asked for before validation
    assert torch.equal(again.validation, first.validation)
    assert not torch.equal(other.validation, first.validation)
    assert not torch.equal(take(other.batches(4), 30), trained)


def test_the_standard_library_is_split_by_file_name():
    from lorasae.io.streams import files, held_out
    corpus = Corpus("stdlib", NUMBERED, BOS, EOS, context=16, eval_tokens=160)
    names = {file.name for file in files("stdlib")}
    assert {file.name for file in corpus.validation_files} == {name for name in names if held_out(name)}
    assert {file.name for file in corpus.training_files} == {name for name in names if not held_out(name)}
    assert 0.03 < len(corpus.validation_files) / len(names) < 0.1 and corpus.validation.shape == (10, 16)


# ---- Order, ends and resuming ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("skip", [1, 7, 23])
def test_skipping_batches_continues_where_an_earlier_run_stopped(tmp_path, monkeypatch, skip, streamed):
    if streamed:
        monkeypatch.setattr(data, "IN_MEMORY", 0)
        monkeypatch.setattr(data, "BUFFER", 20)
    corpus = corpus_of(write_documents(tmp_path / "a.jsonl", [numbered(i) for i in range(60)]))
    whole = take(corpus.batches(4), 30)                                     # a pass is about nine batches
    assert torch.equal(take(corpus_of(tmp_path / "a.jsonl").batches(4, skip), 30 - skip), whole[skip:])


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
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    monkeypatch.setattr(data, "MIXED", 3)
    for part in range(5):
        write_documents(tmp_path / f"{part}.jsonl", [f"{part} {i}" for i in range(40)])
    sources = data.files(str(tmp_path))
    for buffer in (25, 1000):                                               # the second holds the whole stream
        monkeypatch.setattr(data, "BUFFER", buffer)
        orders = [list(data.shuffled(sources, np.random.default_rng(seed))) for seed in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2]
        assert sorted(orders[0]) == sorted(f"{part} {i}" for part in range(5) for i in range(40))
        places = [orders[0].index(f"3 {i}") for i in range(40)]
        assert places != sorted(places)                                     # a file's own order is gone
    monkeypatch.setattr(data, "BUFFER", 1)
    monkeypatch.setattr(data, "MIXED", 1)
    parts = [int(text.split()[0]) for text in data.shuffled(sources, np.random.default_rng(0))]
    assert parts[::40] == np.random.default_rng(0).permutation(5).tolist()     # nor are the files in the order of names


def test_any_stretch_of_a_stream_has_its_files_in_proportion(tmp_path, monkeypatch):
    """One file three times as long as the other: three quarters of the characters of every stretch come from it."""
    write_documents(tmp_path / "a.jsonl", ["a" * 1000] * 3000)
    write_documents(tmp_path / "b.jsonl", ["b" * 250] * 4000)
    stretch = []
    for text in data.mixed(data.files(str(tmp_path)), None, at_once=2):
        stretch.append(text)
        if sum(map(len, stretch)) > 1_500_000:
            break
    assert abs(sum(text.count("a") for text in stretch) / sum(map(len, stretch)) - 0.75) < 0.06


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
    assert sources_of(next(corpus_of(path, seed=seed).batches(1))) == {1}
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
    monkeypatch.setattr(data, "IN_MEMORY", 0)                               # a stream: the line is met while training
    monkeypatch.setattr(data, "BUFFER", 10)
    monkeypatch.setattr(data, "BATCH", 100)
    path = write_documents(tmp_path / "a.jsonl", [numbered(i % 500) for i in range(2000)])
    with path.open("a") as file:
        file.write("{broken\n")
    batches = corpus_of(path).batches(1)
    with pytest.raises(InputError, match="line 2,001: not JSON"):
        for _ in range(5000):
            next(batches)
