"""From Python: generated text, text to tokens, the SAE of a preset, and what stands in for one."""
import pytest
import torch
from safetensors.torch import save

import lorasae
from helpers import Hub, random_sae, use_hub
from lorasae.generation import generate
from lorasae.sae import StandIn


def without_cache(model, tokens, count, saes):
    """Every step from the beginning."""
    for _ in range(count):
        best = model(tokens, saes)[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, best], 1)
    return tokens


@pytest.fixture
def saes(model, tokens):
    """SAEs of a model whose EOS does not come up in what is generated here."""
    saes = {1: random_sae("topk", model), 2: random_sae("jumprelu", model)}
    model.config.__dict__["eos_token_id"] = 0
    seen = [without_cache(model, tokens, 12, saes) for saes in (saes, {})]
    unseen = set(range(3, 97)) - set(torch.cat(seen).flatten().tolist())
    model.config.__dict__["eos_token_id"] = min(unseen)
    return saes


def test_it_is_greedy_and_new_positions_get_the_saes(model, tokens, saes):
    found = generate(model, tokens, 12, saes)
    assert torch.equal(found, without_cache(model, tokens, 12, saes))
    assert not torch.equal(found, generate(model, tokens, 12))
    assert torch.equal(generate(model, tokens, 0), tokens)
    with pytest.raises(lorasae.InputError, match="blocks 0 to 3"):
        generate(model, tokens, 1, {4: saes[1]})

    # Rows are independent, and prompts may be of any lengths.
    lengths = [40, 23]
    ragged = generate(model, tokens, 12, saes, lengths=lengths)
    assert torch.equal(ragged[0], found[0])
    alone = without_cache(model, tokens[1:, :23], 12, saes)
    assert torch.equal(ragged[1, :35], alone[0])
    assert (ragged[1, 35:] == model.config.eos_token_id).all()


def test_a_row_ends_at_eos_or_where_it_is_told_to(model, tokens, saes):
    free = generate(model, tokens, 12)
    new = free[:, 40:].tolist()
    model.config.__dict__["eos_token_id"] = eos = new[0][4]
    first = new[0].index(eos)
    found = generate(model, tokens[:1], 12)
    assert torch.equal(found, free[:1, :40 + first + 1])
    both = generate(model, tokens, 12)
    assert (both[0, 40 + first:] == eos).all()

    asked = []
    stopped = generate(model, tokens, 12, stop=lambda row, ids: asked.append((row, len(ids))))
    assert torch.equal(stopped, free) and sorted(asked) == [
        (row, length) for row in (0, 1) for length in range(1, 13)]
    assert generate(model, tokens, 12, stop=lambda row, ids: len(ids) == 3).shape == (2, 43)


def test_a_temperature_draws_by_the_softmax_and_a_generator_repeats_it(model, tokens, saes):
    def drawn(seed, temperature=0.7, prompts=tokens, count=4):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, prompts, count, saes, temperature, generator)

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert torch.equal(drawn(0, 1e-6), generate(model, tokens, 4, saes))
    many = drawn(0, 0.7, tokens[:1, :8].expand(4000, -1), count=1)[:, 8]
    p = (model(tokens[:1, :8], saes)[0, -1] / 0.7).softmax(-1)
    found = many.bincount(minlength=97) / 4000
    assert (found - p).abs().max() < 4 * (p * (1 - p) / 4000).sqrt().max()


def test_text_becomes_tokens_with_one_bos_in_front(whole_model, raw_config):
    tokenizer = lorasae.load_tokenizer(whole_model)
    tokens = lorasae.encode(whole_model, "def area(width")
    assert torch.equal(tokens, lorasae.encode(tokenizer, "def area(width"))
    bos, *ids = tokens[0].tolist()
    assert bos == raw_config["bos_token_id"] and tokenizer.decode(ids) == "def area(width"
    assert ids == tokenizer.encode("def area(width", add_special_tokens=False).ids


def test_a_preset_knows_which_sae_of_many_is_its_own(tmp_path, monkeypatch):
    with Hub() as hub:
        use_hub(monkeypatch, hub, tmp_path)
        hub.models["google/gemma-scope-2-270m-pt"] = {}
        for l0, b_dec in (("small", 1.0), ("medium", 2.0)):
            tensors = {"w_enc": torch.eye(8), "w_dec": torch.eye(8), "b_enc": torch.zeros(8),
                       "b_dec": torch.full([8], b_dec), "threshold": torch.ones(8)}
            file = f"resid_post/layer_12_width_16k_l0_{l0}/params.safetensors"
            hub.models["google/gemma-scope-2-270m-pt"][file] = save(tensors)
        assert (lorasae.load_sae("gemma-3-270m").b_dec == 2).all()


def test_a_stand_in_is_spliced_where_its_sae_is(model, tokens):
    tokens[:, 0] = model.config.bos_token_id
    sae = random_sae("jumprelu", model)
    same = StandIn(sae, sae)
    assert torch.equal(model(tokens, {1: same}), model(tokens, {1: sae}))
    assert not torch.equal(model(tokens, {1: sae.forward}), model(tokens, {1: sae}))
    assert same.W_dec is sae.W_dec and StandIn(sae, sae, everywhere=True).on_special
    with pytest.raises(AttributeError):
        StandIn(lambda x: x).threshold
