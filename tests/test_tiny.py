"""The included models load, are small, match transformers and have learned the language."""
import sysconfig

import pytest
import torch

from helpers import transformers_model
from lorasae.evals import fidelity
from lorasae.io.files import read_json
from lorasae.io.models import load_model, load_tokenizer
from lorasae.io.shards import Text
from lorasae.io.text import held_out
from lorasae.tiny import make

LOSS_BOUND = {  # nats per token, with room for other standard libraries; a bigram model has 4.65
    "gemma-2": 3.0, "llama-3": 3.0, "gemma-2-medium": 3.2, "gemma-2-small": 3.6}
SAMPLE = "class Ünïcode(dict):\n\n    def __len__(self):\t# 日本語 🐍\r\n        return 3  \n"


@pytest.fixture(params=make.NAMES)
def folder(request):
    """The folder of each shipped model."""
    return make.HERE / request.param


def held_out_tokens(folder, count):
    with Text("stdlib", load_tokenizer(folder), make.BOS, make.EOS, context=256,
              eval_tokens=count) as text:
        return text.held_out


def test_the_shipped_model_is_as_large_as_a_new_one(folder):
    new = make.new_model(read_json(folder / "config.json"))
    assert sum(p.numel() for p in new.parameters()) == read_json(folder / "MADE.json")["parameters"]


def test_transformers_loads_the_shipped_folder_and_gives_the_same_logits(folder):
    oracle = transformers_model(folder, dtype=torch.float32)
    tokens = held_out_tokens(folder, 512)  # 256 positions: past window and start of rotary scaling
    expected, ours = oracle(tokens).logits, load_model(folder, dtype=torch.float32)(tokens)
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_tokenizer_puts_bos_first_and_decodes_to_the_same_text(folder):
    tokenizer, raw = load_tokenizer(folder), read_json(folder / "config.json")
    encoding = tokenizer.encode(SAMPLE)
    assert encoding.ids[0] == raw["bos_token_id"] == tokenizer.token_to_id("<bos>") == make.BOS
    assert tokenizer.token_to_id("<eos>") == raw["eos_token_id"] == make.EOS
    assert tokenizer.token_to_id("<pad>") == raw["pad_token_id"]
    assert tokenizer.get_vocab_size() == raw["vocab_size"]
    assert tokenizer.decode(encoding.ids) == SAMPLE
    assert tokenizer.encode(SAMPLE, add_special_tokens=False).ids == encoding.ids[1:]


def test_everything_shipped_fits_in_31_mb():
    files = [path for path in make.HERE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 31_000_000


def test_the_model_has_learned_more_than_a_bigram_model_can(folder):
    model = load_model(folder, dtype=torch.float32)
    tokens = held_out_tokens(folder, make.EVAL_TOKENS)[::6]             # quicker
    losses = fidelity.measure(model, {}, tokens.split(make.BATCH), ("base",))["base"]["ce"]
    assert losses.mean() < LOSS_BOUND[folder.name]
    made = read_json(folder / "MADE.json")["model_loss"]
    assert abs(losses.mean() - made) < 0.25                             # sixths differ by 0.2


def test_neither_tokenizer_nor_models_read_held_out_text(tmp_path, monkeypatch):
    folders = ("", "package/", "test/", "package/tests/")
    names = [f"{folder}module{i}.py" for folder in folders for i in range(40)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    kept = {name for name in names if not held_out(name)}
    assert 0 < len(names) - len(kept) < 40
    assert set(make.texts(tests=True)) == kept
    assert set(make.texts(tests=False)) == {name for name in kept if "test" not in name}
