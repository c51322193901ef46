"""Absorption: words, where they are read, the criterion, and SAEs that do or do not absorb."""
import random
from string import ascii_letters, ascii_uppercase
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models

from lorasae.evals import absorption, texts
from lorasae.evals.absorption import (Asked, absorbs, ask, f1, initial, letter_latents,
                                      letter_words, prompt, scores)
from lorasae.io.models import load_tokenizer
from lorasae.sae import JumpReLU

BOS = 2


@pytest.fixture(scope="module")
def text():
    return SimpleNamespace(tokenizer=load_tokenizer("tiny-gemma-2"), bos=BOS)


def test_words_are_the_tokens_that_consist_of_ascii_letters(text):
    found = letter_words(text.tokenizer)
    assert len(found) > 1000
    assert " width" in found and "self" in found
    for word, token in found.items():
        assert word.strip().isascii() and word.strip().isalpha() and word.count(" ") <= 1
        assert text.tokenizer.decode([token]) == word
    assert (initial(" width"), initial("Self")) == ("W", "S")

    # SentencePiece's words keep their leading space
    vocabulary = {"<unk>": 0, "▁snake": 1, "snake": 2, "▁": 3, "a1": 4, "é": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    assert letter_words(tokenizer) == {" snake": 1, "snake": 2}


def test_a_prompt_answers_ten_other_words_and_asks_for_this_one():
    examples = ["cat", " dog", " snakes", "eel"]
    lines = prompt(" snake", examples, random.Random(0)).split("\n")
    assert len(lines) == 11 and lines[-1] == " snake has the first letter:"
    assert set(lines[:-1]) == {"cat has the first letter: C", " dog has the first letter: D",
                               "eel has the first letter: E"}


def test_prompts_are_read_at_the_token_of_the_word(text):
    vocabulary = letter_words(text.tokenizer)
    asked = ask(vocabulary, text, 300, seed=1)
    assert 0.95 * 240 <= len(asked.train) <= 240 and 50 < len(asked.test) <= 60
    assert not set(asked.train) & set(asked.test)
    words = [*asked.train, *asked.test, *asked.test]
    assert len(words) == len(asked.prompts)
    for word, ids in zip(words, asked.prompts):
        assert ids[0] == BOS and ids[-asked.offset - 1] == vocabulary[word]
        assert text.tokenizer.decode(ids[-asked.offset:]) == " has the first letter:"
    again = len(asked.test)
    assert all(a != b for a, b in zip(asked.prompts[-2 * again:-again], asked.prompts[-again:]))
    assert asked == ask(vocabulary, text, 300, seed=1) != ask(vocabulary, text, 300, seed=2)


def test_the_offset_depends_on_the_tokenizer():
    """Letter by letter, the question has 22 tokens: the sixth from the end lies inside it."""
    alphabet = {character: i for i, character in enumerate(ascii_letters + " :\n")}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    found = letter_words(tokenizer)
    assert set(found) == set(ascii_letters)
    asked = ask(found, SimpleNamespace(tokenizer=tokenizer, bos=0), 50, seed=0)
    assert asked.offset == len(" has the first letter:")


def test_residuals_are_read_at_the_word(model, monkeypatch):
    monkeypatch.setattr(texts, "BATCH", 2)
    bos = model.config.bos_token_id
    prompts = [[bos, 5, 6, 7, 8, 9, 10], [bos, 11, 12, 13, 14], [bos, *[3] * 9]]
    found = absorption.read_at_word(model, None, 1, Asked([], [], prompts, offset=2))
    for row, ids in zip(found, prompts):
        x = model.run(model.embed(torch.tensor([ids])), 0, 2)
        torch.testing.assert_close(row, x[0, -3], atol=1e-4, rtol=1e-4)


def test_a_latent_absorbs_only_if_the_letters_latents_are_silent_and_it_writes_enough():
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    sae = JumpReLU(3, 4).requires_grad_(False)
    sae.W_enc.data = sae.W_dec.data = rows
    sae.b_enc.data = torch.tensor([-1.0, -2.0, 0.0, 0.0])
    u = torch.tensor([2.0, 0.0, 0.0])                                       # any norm will do
    x = torch.tensor([
        [3.0, 0.0, 0.0],        # the letter's latent fires
        [1.0, 2.0, 0.0],        # silent; 0.12 of the second's 0.2 lie along u: too little
        [1.0, 3.0, 0.0],        # 0.6 of its 1.0 lie along u: absorbed
        [-1.0, 5.0, 0.0],       # likewise, but x points away from the letter
        [0.5, 0.0, 4.0],        # only a latent at right angles fires
    ])
    silent, absorbed = absorbs(sae, x, sae.encode(x), u, torch.tensor([0]))
    assert silent.tolist() == [False, True, True, True, True]
    assert absorbed.tolist() == [False, False, True, False, False]


def test_a_letter_gets_another_latent_only_while_f1_improves(monkeypatch):
    true = torch.arange(100) < 50

    def kept(*right):
        """How many latents are kept if 1, 2, ... of them find this many of the 50 texts."""
        monkeypatch.setattr(absorption, "logistic", lambda x, *_: torch.arange(100)
                            < right[x.shape[1] - 1])
        z = torch.zeros(100, len(right))
        latents, fires = letter_latents(z, true, z, true, torch.arange(len(right)))
        assert fires.sum() == right[len(latents) - 1]
        return len(latents)

    assert [f1(torch.arange(100) < n, true) for n in (0, 25, 50, 100)] == (
        pytest.approx([0, 2 / 3, 1, 2 / 3]))
    assert f1(true & False, true & False) == 0
    assert kept(20, 25, 26) == 2
    assert kept(20, 20, 50) == 1                # stops at the first that does not help
    assert kept(10, 20, 30) == 3


def test_letters_without_a_silent_word_are_left_out_of_the_mean():
    def row(right, silent, absorbed, f1=0.9):
        return {"right": right, "silent": silent, "absorbed": absorbed, "probe_f1": f1}

    counts = {"A": row(10, 3, 2), "B": row(10, 0, 0), "C": row(8, 1, 0), "D": row(0, 0, 0, 0.5)}
    assert scores(counts) == pytest.approx({"absorption": 0.1, "probe_f1": 0.8})
    assert scores({"B": row(10, 0, 0)})["absorption"] == 0


D, EACH = 64, 20
WORDS = [letter + "x" for letter in ascii_uppercase for _ in range(EACH)]


def spelled(absorbing):
    """(x [26 · EACH, D], odd, SAE): each letter and each of seven odd words with S has a direction.

    An absorbing SAE writes the letter with the odd word's latent and keeps the letter's silent.
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
        sae.W_enc.data[18, own] = -2            # "starts with S" does not fire on snakes
        sae.W_dec.data[26:, 18] = 1             # what "snake" writes includes the letter
        sae.W_dec.data[26:] /= 2 ** 0.5
    return x, odd, sae.requires_grad_(False)


def measured(absorbing):
    """({letter: counts}, the number of test words that have their own latent)"""
    pytest.importorskip("sklearn", reason="scikit-learn fits the probes")
    x, odd, sae = spelled(absorbing)
    test = torch.arange(len(x)) % 5 == 0
    sides = [[word for word, chosen in zip(WORDS, side) if chosen] for side in (~test, test)]
    x = torch.cat([x[~test], x[test], x[test]])
    return absorption.absorption(sae, x, Asked(*sides, [], 5), seed=0), int(test[odd].sum())


def test_only_an_sae_built_to_absorb_is_found_to_absorb():
    counts, snakes = measured(absorbing=True)
    assert counts["S"]["latents"] == [18]
    assert counts["S"]["absorbed"] == counts["S"]["silent"] == snakes > 0
    assert counts["S"]["right"] > snakes and scores(counts)["absorption"] > 0
    assert all(row["absorbed"] == 0 for name, row in counts.items() if name != "S")

    counts, _ = measured(absorbing=False)
    assert len(counts) == 26
    for row in counts.values():
        assert row["probe_f1"] > 0.95 and len(row["latents"]) == 1
        assert row["silent"] == row["absorbed"] == 0
