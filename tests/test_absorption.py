"""Absorption: words and the place they are read at, the criterion, an SAE that absorbs and one that does not."""
import json
import random
import string
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from lorasae.errors import InputError
from lorasae.evals import absorption
from lorasae.evals.absorption import absorbs, ask, f1, letter, letter_probes, prompt, scores, split_count, words
from lorasae.io.models import load_model
from lorasae.io.presets import TINY
from lorasae.io.saes import load_sae
from lorasae.lora import add_lora
from lorasae.sae import JumpReLU

TOKENIZER = Tokenizer.from_file(str(TINY / "gemma-2" / "tokenizer.json"))


# ---- Words and prompts ---------------------------------------------------------------------------

def test_words_are_the_tokens_of_letters_alone():
    found = words(TOKENIZER)
    assert len(found) > 1000
    assert " width" in found and "self" in found
    for word, token in found.items():
        assert word.strip().isascii() and word.strip().isalpha() and word.count(" ") <= 1
        assert TOKENIZER.decode([token]) == word
    assert (letter(" width"), letter("Self")) == (22, 18)

    # SentencePiece's words keep their space
    vocabulary = {"<unk>": 0, "▁snake": 1, "snake": 2, "▁": 3, "a1": 4, "é": 5}
    assert words(Tokenizer(models.WordLevel(vocabulary, "<unk>"))) == {" snake": 1, "snake": 2}


def test_a_prompt_answers_ten_other_words_and_asks_for_this_one():
    examples = ["cat", " dog", " snakes", "eel"]
    text = prompt(" snake", examples, random.Random(0))
    lines = text.split("\n")
    assert len(lines) == 11 and lines[-1] == " snake has the first letter:"
    assert set(lines[:-1]) == {"cat has the first letter: C", " dog has the first letter: D",
                               "eel has the first letter: E"}


def test_prompts_are_read_at_the_words_own_token():
    vocabulary = words(TOKENIZER)
    asked = ask(vocabulary, TOKENIZER, 300, seed=1)
    assert 0.95 * 240 <= len(asked.train) <= 240 and len(asked.again) == len(asked.test) <= 60
    assert not set(asked.train) & set(asked.test)
    for word, ids in zip([*asked.train, *asked.test, *asked.test], [*asked.prompts, *asked.again]):
        assert ids[-asked.offset - 1] == vocabulary[word]
        assert TOKENIZER.decode(ids[-asked.offset:]) == " has the first letter:"
    assert asked == ask(vocabulary, TOKENIZER, 300, seed=1) != ask(vocabulary, TOKENIZER, 300, seed=2)


def test_the_offset_is_the_tokenizers():
    """Letter by letter the question has 22 tokens: SAEBench's sixth from the end would be in the middle of it."""
    alphabet = {character: i for i, character in enumerate(string.ascii_letters + " :\n")}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    found = words(tokenizer)
    assert set(found) == set(string.ascii_letters)
    asked = ask(found, tokenizer, 50, seed=0)
    assert asked.offset == len(" has the first letter:")


def test_a_tokenizer_that_joins_the_word_with_the_question_is_refused():
    vocabulary = {"<unk>": 0} | {f" {word}": i for i, word in enumerate(string.ascii_lowercase, 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")        # " a has the first letter:" is one token
    with pytest.raises(InputError, match="joins the word with what follows"):
        ask(words(tokenizer), tokenizer, 26, seed=0)


def test_residuals_are_read_at_that_place(model):
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14], [3] * 9]
    found = absorption.read_at_word(model, 1, prompts, offset=2, batch=2)
    for row, ids in zip(found, prompts):
        x = model.run(model.embed(torch.tensor([[model.config.bos_token_id, *ids]])), 0, 2)
        torch.testing.assert_close(row, x[0, -3], atol=1e-4, rtol=1e-4)


# ---- The criterion -------------------------------------------------------------------------------

def directions(*rows):
    sae = JumpReLU(len(rows[0]), len(rows))
    sae.W_enc.data = sae.W_dec.data = torch.tensor(rows, dtype=torch.float32)
    return sae.requires_grad_(False)


def test_a_latent_absorbs_only_where_the_letters_own_are_silent_and_it_carries_enough():
    sae = directions([1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0])
    sae.b_enc.data = torch.tensor([-1.0, -2.0, 0.0, 0.0])
    u = torch.tensor([2.0, 0.0, 0.0])                                       # any length
    x = torch.tensor([
        [3.0, 0.0, 0.0],        # its own latent fires
        [1.0, 2.0, 0.0],        # own silent; the second one has 0.2, of which 0.12 lie along u: too little of 1
        [1.0, 3.0, 0.0],        # 1.0, of which 0.6 lie along u: absorbed
        [-1.0, 5.0, 0.0],       # the same, but x points away from the letter
        [0.5, 0.0, 4.0],        # only a latent at right angles fires
    ])
    silent, absorbed = absorbs(sae, x, u, torch.tensor([0]))
    assert silent.tolist() == [False, True, True, True, True]
    assert absorbed.tolist() == [False, False, True, False, False]


def test_letters_take_another_latent_only_while_f1_gains():
    assert split_count([0.5, 0.54, 0.56]) == 2
    assert split_count([0.5, 0.52, 0.9]) == 1                # stops at the first that does not gain
    assert split_count([0.1, 0.2, 0.3]) == 3
    found, true = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    assert f1(found, true).item() == pytest.approx(0.5) and f1(~true, ~true & found).item() == 1
    assert f1(found & False, true & False).item() == 0


def test_letters_without_candidates_count_zero_and_saebenchs_mean_leaves_them_out():
    row = {"words": 20, "latents": [1], "probe_f1": 0.9, "one_f1": 0.5, "sparse_f1": 0.5}
    counts = {"a": {**row, "true_positives": 10, "candidates": 4, "survivors": 3, "absorbed": 2},
              "b": {**row, "true_positives": 10, "candidates": 2, "survivors": 0, "absorbed": 0},
              "c": {**row, "true_positives": 10, "candidates": 0, "survivors": 0, "absorbed": 0},
              "d": {**row, "true_positives": 0, "candidates": 0, "survivors": 0, "absorbed": 0}}
    found = scores(counts)
    assert found["absorption"] == pytest.approx(0.2 / 3)
    assert found["saebench"] == pytest.approx(0.2)
    assert found["candidates"] == 6 and found["known"] == 4


# ---- Planted SAEs --------------------------------------------------------------------------------

D, EACH = 64, 20


def spelled(absorbing):
    """x [26 · EACH, D]: each letter has a direction, and so has each of seven words of S; and an SAE.

    An absorbing SAE writes the letter with such a word's own latent, and keeps the letter's latent silent there.
    """
    generator = torch.Generator().manual_seed(0)
    letters = torch.arange(26).repeat_interleave(EACH)
    x = 0.05 * torch.randn(len(letters), D, generator=generator)
    x[torch.arange(len(x)), letters] += 3
    odd = (letters == 18).nonzero().flatten()[::3]
    own = torch.arange(40, 47)
    x[odd, own] += 3

    sae = JumpReLU(D, 33)
    sae.W_enc.data[:26, :26] = torch.eye(26)
    sae.W_enc.data[26:, own] = torch.eye(7)
    sae.W_dec.data = sae.W_enc.data.clone()
    sae.b_enc.data.fill_(-1)
    if absorbing:
        sae.W_enc.data[18, own] = -2                                        # "starts with S" does not fire on snakes
        sae.W_dec.data[26:, 18] = 1                                         # what "snake" writes contains it
        sae.W_dec.data[26:] /= 2 ** 0.5
    return x, letters, odd, sae.requires_grad_(False)


def measured(absorbing):
    x, letters, odd, sae = spelled(absorbing)
    test = torch.zeros(len(x), dtype=torch.bool)
    test[torch.arange(len(x)) % 5 == 0] = True
    again = x[test]
    train, test_set = (x[~test], letters[~test]), (x[test], letters[test])
    counts = absorption.absorption(sae, train, test_set, lambda rows: again[rows], seed=0)
    return counts, int(test[odd].sum())


def test_an_sae_built_to_absorb_is_found_out():
    counts, snakes = measured(absorbing=True)
    assert counts["s"]["latents"] == [18]
    assert counts["s"]["absorbed"] == counts["s"]["survivors"] == snakes > 0
    assert all(row["absorbed"] == 0 for name, row in counts.items() if name != "s")
    assert scores(counts)["saebench"] > scores(counts)["absorption"] > 0


def test_an_sae_whose_latents_are_the_letters_absorbs_nothing():
    counts, _ = measured(absorbing=False)
    assert len(counts) == 26
    for row in counts.values():
        assert row["probe_f1"] > 0.95 and row["one_f1"] == 1 and len(row["latents"]) == 1
        assert row["candidates"] == row["absorbed"] == 0


def test_letter_probes_find_directions_of_letters():
    x, letters, _, _ = spelled(absorbing=False)
    probe = letter_probes(x, letters, batch=64, weight_decay=1e-4, seed=0)
    assert (probe.weight[:, :26].argmax(1) == torch.arange(26)).all()
    sparse = letter_probes(x, letters, batch=64, weight_decay=1e-6, l1=0.01, seed=0)
    assert sparse.weight.abs().sum() < 0.8 * probe.weight.abs().sum()


# ---- The whole suite -----------------------------------------------------------------------------

@pytest.fixture
def setting(tmp_path):
    model = load_model("tiny-gemma-2", dtype="float32").requires_grad_(False)
    sae = load_sae(str(TINY / "gemma-2-sae" / "topk"), layer=2)
    text = SimpleNamespace(tokenizer=TOKENIZER, bos=model.config.bos_token_id,
                           eos=model.config.eos_token_id)
    config = SimpleNamespace(model="tiny-gemma-2", sae=("topk",), layer=(2,))
    return SimpleNamespace(model=model, saes={2: sae}, text=text, config=config, folder=tmp_path)


def test_a_fresh_adapter_is_paired_to_a_difference_of_zero(setting, capsys):
    add_lora(setting.model, range(6), 2, dropout=0.0)
    numbers = absorption.evaluate(setting, SimpleNamespace(seeds=1, words=200))
    assert numbers == json.loads(json.dumps(numbers, allow_nan=False))
    assert all(row["difference"] == 0 for row in numbers["rows"].values())

    absorption.show(numbers)
    assert "these rates say little" in capsys.readouterr().out
    figure = pytest.importorskip("matplotlib.figure", reason="draws the picture").Figure()
    absorption.draw(numbers, figure)
    assert figure.axes


@pytest.mark.parametrize("blocks, count, said", [([3, 4, 5], 200, "--adapt all"),
                                                 (range(6), 10, "--words 10")])
def test_adapters_after_the_sae_and_too_few_words_are_refused(setting, blocks, count, said):
    add_lora(setting.model, blocks, 2)
    with pytest.raises(InputError, match=said):
        absorption.evaluate(setting, SimpleNamespace(seeds=1, words=count))
