"""The embedded default: what is shipped loads, is small, is what transformers sees, and has learned the language."""
import math
import sysconfig
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer

from lorasae.io.models import load_model
from lorasae.io.files import read_json
from lorasae.io.shards import Text
from lorasae.io.text import held_out
from lorasae.tiny import make

FOLDERS = {name: make.HERE / name for name in make.CONFIGS}
LOSS_BOUND = {"gemma-2": 3.0, "llama-3": 3.0, "gemma-2-medium": 3.2, "gemma-2-small": 3.6}      # nats a token; room for other libraries
SAMPLE = "class Ünïcode(dict):\n\n    def __len__(self):\t# 日本語 🐍\r\n        return 3  \n"

every = pytest.mark.parametrize("name", make.CONFIGS)


def tokenizer_of(name):
    return Tokenizer.from_file(str(FOLDERS[name] / "tokenizer.json"))


def held_out_tokens(name, count):
    with Text("stdlib", tokenizer_of(name), make.BOS, make.EOS, context=256,
              eval_tokens=count) as text:
        return text.held_out


@every
def test_the_shipped_model_loads_and_is_the_one_that_the_script_makes(name):
    model = load_model(FOLDERS[name])
    raw = read_json(FOLDERS[name] / "config.json")
    assert raw == {**make.CONFIGS[name], "torch_dtype": "bfloat16"}
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == read_json(FOLDERS[name] / "MADE.json")["parameters"]


@every
def test_transformers_loads_the_shipped_folder_and_gives_the_same_logits(name):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(FOLDERS[name], dtype=torch.float32,
                                                               attn_implementation="eager")
    tokens = held_out_tokens(name, 512)                 # 256 positions: past the sliding window and the rotary bend
    with torch.no_grad():
        expected, ours = oracle(tokens).logits, load_model(FOLDERS[name], dtype=torch.float32)(tokens)
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


@every
def test_the_tokenizer_puts_bos_first_and_gives_the_text_back(name):
    tokenizer, raw = tokenizer_of(name), make.CONFIGS[name]
    encoding = tokenizer.encode(SAMPLE)
    assert encoding.ids[0] == raw["bos_token_id"] == tokenizer.token_to_id("<bos>")
    assert tokenizer.token_to_id("<eos>") == raw["eos_token_id"]
    assert tokenizer.token_to_id("<pad>") == raw["pad_token_id"]
    assert tokenizer.get_vocab_size() == raw["vocab_size"]
    assert tokenizer.decode(encoding.ids) == SAMPLE
    assert tokenizer.encode(SAMPLE, add_special_tokens=False).ids == encoding.ids[1:]


def test_all_that_is_shipped_fits_in_19_mb():
    assert sum(path.stat().st_size for path in make.HERE.rglob("*") if path.is_file()) <= 19_000_000


@every
def test_the_model_has_learned_what_word_counts_cannot(name):
    made = read_json(FOLDERS[name] / "MADE.json")
    model = load_model(FOLDERS[name], dtype=torch.float32)
    loss = make.model_loss(model, held_out_tokens(name, make.EVAL_TOKENS)[::6])     # quicker
    assert loss < LOSS_BOUND[name] < made["bigram_loss"] < made["unigram_loss"]
    assert abs(loss - made["model_loss"]) < 0.25        # sixths of the text differ by 0.2


def test_the_split_depends_on_the_path_alone(tmp_path, monkeypatch):
    """Two libraries with other contents at the same paths: the same files are held out, tests among them."""
    names = [f"{folder}module{i}.py" for folder in ("", "package/", "test/", "package/tests/") for i in range(40)]
    kept = {name for name in names if not held_out(name)}
    assert 0 < len(names) - len(kept) < 40
    for version in ("one", "two"):
        root = tmp_path / version
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{version} {name}")
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
        assert {text.split()[1] for text in make.texts(tests=True)} == kept
        assert {text.split()[1] for text in make.texts(tests=False)} == {name for name in kept if "test" not in name}


def test_batches_are_pieces_of_the_stream_after_a_bos():
    stream = torch.arange(1000, 1000 + 40 * 255 + 17)
    source = make.batches(stream, torch.Generator().manual_seed(0))
    for batch in (next(source) for _ in range(5)):      # two passes and a half
        assert batch.shape == (make.BATCH, 256) and (batch[:, 0] == make.BOS).all()
        assert (batch[:, 2:] - batch[:, 1:-1] == 1).all() and batch[:, 1].unique().numel() == make.BATCH


def test_ngram_losses_are_those_of_normalised_distributions_counted_by_hand():
    stream = torch.randint(0, 7, (60,), generator=torch.Generator().manual_seed(0))
    vocabulary = 9                                      # 7 and 8 are never seen
    words, pairs = Counter(stream.tolist()), Counter(zip(stream[:-1].tolist(), stream[1:].tolist()))
    discount = (ones := list(pairs.values()).count(1)) / (ones + 2 * list(pairs.values()).count(2))

    def unigram(b):
        return (words[b] + 1) / (len(stream) + vocabulary)

    def bigram(a, b):
        after = {y: count for (x, y), count in pairs.items() if x == a}
        if not after:
            return unigram(b)
        total = sum(after.values())
        return max(after.get(b, 0) - discount, 0) / total + discount * len(after) / total * unigram(b)

    assert all(abs(sum(bigram(a, b) for b in range(vocabulary)) - 1) < 1e-9 for a in range(vocabulary))
    tokens = torch.tensor([[8, 0, 1, 2, 3], [7, 7, 4, 8, 6]])
    expected = [-sum(math.log(p) for p in chances) / 8 for chances in (
        [unigram(b) for row in tokens.tolist() for b in row[1:]],
        [bigram(a, b) for row in tokens.tolist() for a, b in zip(row, row[1:])])]
    assert make.ngram_losses(stream, tokens, vocabulary) == pytest.approx(expected, abs=1e-6)
