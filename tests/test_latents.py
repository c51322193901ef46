"""A latent's page: the effects it reports, what it lists, and HTML that is whole, harmless and found by a search."""
import html.parser
import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tokenizers import Tokenizer

from conftest import TEXT, write_tokenizer
from helpers import adapted, random_sae
from lorasae.errors import InputError
from lorasae.evals import firing, latents, page
from lorasae.lora import base

EVIL = "<script>alert(1)</script>"


def perturbed(model, blocks):
    """The model with adapters on those blocks, far from the identity."""
    return adapted(model, blocks, std=0.1)


def make_sae(model, kind):
    sae = random_sae(kind, model, 40, k=4, threshold=3, std=1, seed=2)
    torch.nn.init.normal_(sae.b_dec, std=0.1)
    sae.W_dec.data = F.normalize(sae.W_enc.data, dim=1)
    return sae


def make_setting(model, raw, folder, blocks=(0, 1, 2, 3), kind="topk"):
    write_tokenizer(folder, raw, TEXT + "x0123456789 = <>&/")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos, eos = model.config.bos_token_id, model.config.eos_token_id
    generator = torch.Generator().manual_seed(1)
    chunks = torch.randint(3, 90, (40, 64), generator=generator)
    chunks[:, 0] = bos
    chunks[::5, 30] = eos
    text = SimpleNamespace(held_out=chunks, tokenizer=tokenizer, bos=bos, eos=eos)
    (folder / "run").mkdir()
    if blocks:
        perturbed(model, blocks)
    saes = {1: make_sae(model, kind)}
    return SimpleNamespace(model=model, saes=saes, text=text, config=None, folder=folder / "run")


@pytest.fixture
def setting(model, raw_config, tmp_path):
    return make_setting(model, raw_config, tmp_path)


def options(*named):
    return SimpleNamespace(latents=list(named) or None)


# ---- Effects -------------------------------------------------------------------------------------

def test_the_direct_effect_is_the_decoder_row_through_norm_and_head(model):
    v = torch.randn(model.config.hidden_size)
    rms = v.square().mean().sqrt()
    logits = (model.norm(v[None])[0] * rms) @ model.head.T     # the norm divides by the rms: undone
    before = latents.direct_effect(model, v)
    torch.testing.assert_close(before, logits - logits.mean(), rtol=1e-4, atol=1e-4)
    assert torch.equal(latents.direct_effect(perturbed(model, range(4)), v), before)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_an_effect_is_that_of_running_the_model_with_and_without_the_latent(model, kind):
    sae, layer, latent = make_sae(model, kind), 1, 7
    perturbed(model, range(4))
    tokens = torch.randint(3, 97, (6, 20), generator=torch.Generator().manual_seed(3))
    tokens[:, 0] = model.config.bos_token_id
    at = torch.tensor([5, 19, 10, 7, 8, 12])

    class Without:
        """The same SAE, its latent silent but at BOS."""
        on_special = sae.on_special

        def __call__(self, x):
            z = sae.encode(x)
            z[:, 1:, latent] = 0
            return sae.decode(z)

    rows = torch.arange(6)
    special = model.special(tokens)
    with torch.no_grad():
        x = model.run(model.embed(tokens), 0, 2)
        present, absent = (model.logits(model.run(latents.splice(x, each, special), 2, 4))[rows, at]
                           for each in (sae, Without()))
    change = (present - absent).mean(0)
    found, use = latents.effect(model, sae, layer, latent, tokens, at)
    assert change.abs().max() > 0.01                                            # it does something
    torch.testing.assert_close(found, change - change.mean(), rtol=1e-3, atol=1e-4)
    kl = F.kl_div(absent.log_softmax(-1), present.log_softmax(-1), log_target=True, reduction="batchmean")
    assert use == pytest.approx(kl.item(), rel=1e-3, abs=1e-6)


# ---- What is listed ------------------------------------------------------------------------------

def test_rates_passages_and_effects_are_those_of_both_models(setting):
    numbers = latents.evaluate(setting, options(5, 9))
    model, sae, rows = setting.model, setting.saes[1], firing.rows_of(setting.text)
    json.dumps(numbers, allow_nan=False)
    assert [row["latent"] for row in numbers["rows"]] == [5, 9] and numbers["chosen"] == "named by --latents"
    assert numbers["adapted_blocks"] == [0, 1, 2, 3] and numbers["tokens"] == (~model.special(rows)).sum()

    with torch.no_grad():
        for name in ("base", "lora"):
            with firing.as_model(model, name):
                z = sae.encode(model.run(model.embed(rows), 0, 2))
            z = z.masked_fill(model.special(rows)[..., None], 0)
            for row in numbers["rows"]:
                mine = z[..., row["latent"]]
                assert row["rate"][name] == pytest.approx((mine > 0).sum().item() / numbers["tokens"])
                strongest = mine.amax(1).sort(descending=True).values[:10]
                peaks = torch.tensor([passage["peak"][name] for passage in row["passages"]])
                assert all((peaks - value).abs().min() < 1e-3 * value for value in strongest[strongest > 0])
                if name == "base":
                    peaks = [passage["peak"][name] for passage in row["passages"] if passage["strongest_in"] == name]
                    torch.testing.assert_close(torch.tensor(peaks), strongest[strongest > 0], rtol=1e-3, atol=1e-3)
    for row in numbers["rows"]:
        for passage in row["passages"]:
            own = passage["strongest_in"]
            assert len(passage["tokens"]) == len(passage["activations"]) <= 46
            assert passage["activations"][passage["at"]] == passage["peak"][own] > 0
        assert row["effect"]["base"]["raised"] != row["effect"]["lora"]["raised"]
        assert -1 <= row["effect"]["agreement"] <= 1
        values = [value for _, value in row["effect"]["base"]["raised"]]
        assert len(values) == 10 and values == sorted(values, reverse=True) and values[0] > 0


def test_adapters_after_the_sae_leave_one_reading_and_two_effects(model, raw_config, tmp_path):
    numbers = latents.evaluate(make_setting(model, raw_config, tmp_path, blocks=(2, 3)), options(5))
    row, = numbers["rows"]
    assert list(row["rate"]) == ["base"] and {passage["strongest_in"] for passage in row["passages"]} == {"base"}
    assert row["effect"]["base"] != row["effect"]["lora"]
    assert "the same before and after adapting" in latents.page(numbers)


def test_without_adapters_the_base_model_is_alone_and_a_latent_can_be_silent(
        model, raw_config, tmp_path):
    setting = make_setting(model, raw_config, tmp_path, blocks=())
    numbers = latents.evaluate(setting, options(5))
    assert "lora" not in numbers["rows"][0]["effect"]
    assert "adapted model" not in latents.page(numbers)
    setting.saes[1].b_enc.data[5] = -1e9
    numbers = latents.evaluate(setting, options(5))
    assert numbers["rows"][0]["effect"] is None and "fires nowhere" in latents.page(numbers)
    latents.show(numbers)


def test_a_latent_that_only_adapting_awakens_has_its_passages(model, raw_config, tmp_path):
    setting = make_setting(model, raw_config, tmp_path, kind="jumprelu")
    sae, rows = setting.saes[1], firing.rows_of(setting.text)
    with torch.no_grad():
        top = {}
        for name in ("base", "lora"):
            with firing.as_model(model, name):
                top[name] = F.linear(model.run(model.embed(rows), 0, 2)[~model.special(rows)], sae.W_enc).amax(0)
    latent = (top["lora"] - top["base"]).argmax().item()
    assert top["lora"][latent] > top["base"][latent]
    sae.threshold.data[latent] = (top["lora"][latent] + top["base"][latent]) / 2
    row, = latents.evaluate(setting, options(latent))["rows"]
    assert row["effect"] is None and row["rate"]["base"] == 0 < row["rate"]["lora"]
    text = latents.page({**latents.evaluate(setting, options(latent))})
    assert "only after adapting" in text and "fires nowhere" not in text


def test_without_autointerp_the_hardest_firing_of_the_rare_are_shown(setting, monkeypatch):
    sae = setting.saes[1]
    monkeypatch.setattr(latents, "RARE", 0.2)
    with base(setting.model):
        rates = firing.rates(setting.model, sae, 1, firing.rows_of(setting.text))
    numbers = latents.evaluate(setting, options())
    shown = [row["latent"] for row in numbers["rows"]]
    strength = rates.total / rates.fired * sae.W_dec.double().norm(dim=1)
    eligible = [i for i in range(40) if 10 <= rates.fired[i] <= 0.2 * rates.tokens]
    assert 0 < len(eligible) < 40 and shown == sorted(eligible, key=lambda i: -strength[i])[:20]
    assert "hardest" in numbers["chosen"]


def autointerp_results(layer=1, **words):
    rows = []
    for latent, score in ((3, 0.5), (9, 1.0), (5, 0.75)):
        explanation = {"base": f"explains {latent}", "lora": words.get("lora", f"explains {latent}")}
        balanced = {"base": [score, score], "lora": [score, score]}
        rows.append({"latent": latent, "explanation": explanation, "balanced": balanced})
    return {"layer": layer, "judge": "a judge", "rows": rows}


def test_after_autointerp_the_best_explained_are_shown_with_their_explanations(setting):
    (setting.folder / "eval-autointerp.json").write_text(json.dumps(autointerp_results(lora=f"otherwise {EVIL}")))
    numbers = latents.evaluate(setting, options())
    assert [row["latent"] for row in numbers["rows"]] == [9, 5, 3] and "judge predicts best" in numbers["chosen"]
    text = latents.page(numbers)
    assert all(part in text for part in ("explains 9", "a judge", "otherwise &lt;script&gt;"))
    assert "<script" not in text
    (setting.folder / "eval-autointerp.json").write_text(json.dumps(autointerp_results(layer=2)))
    assert latents.evaluate(setting, options(9))["rows"][0]["explanation"] is None      # of another layer


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"layer": 1, "rows": [{}], "judge": ""}'])
def test_a_damaged_file_or_a_latent_that_is_not_there_is_one_clear_line(setting, content):
    (setting.folder / "eval-autointerp.json").write_text(content)
    with pytest.raises(InputError, match="eval-autointerp.json"):
        latents.evaluate(setting, options(5))
    (setting.folder / "eval-autointerp.json").unlink()
    for latent in (-1, 40):
        with pytest.raises(InputError, match="0 to 39"):
            latents.evaluate(setting, options(latent))


# ---- Tokens as text ------------------------------------------------------------------------------

def test_parts_of_characters_are_shown_as_bytes_by_the_alphabet_of_tokenizers(raw_config, tmp_path):
    write_tokenizer(tmp_path, raw_config, TEXT + "€")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = {tokenizer.id_to_token(i): i for i in range(tokenizer.get_vocab_size())}
    assert latents.token_text(tokenizer, ids["â"]) == "\\xe2" and latents.token_text(tokenizer, ids["Ĥ"]) == "\\x82"
    assert latents.token_text(tokenizer, ids["Ġ"]) == " " and latents.token_text(tokenizer, ids["<bos>"]) == "<bos>"
    assert latents.token_text(tokenizer, 5000) == "(id 5000)"

    from tokenizers.pre_tokenizers import ByteLevel
    alphabet = latents.byte_alphabet()
    assert set(alphabet) == set(ByteLevel.alphabet()) and sorted(alphabet.values()) == list(range(256))
    encoded = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("€ \n")[0][0]
    assert bytes(alphabet[character] for character in encoded) == "€ \n".encode()


# ---- The page ------------------------------------------------------------------------------------

class Reader(html.parser.HTMLParser):
    """Checks that tags are balanced; collects the text as a browser's search sees it, tags, and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.text, self.attributes = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_the_page_is_whole_and_asks_for_nothing_from_elsewhere(setting):
    numbers = latents.evaluate(setting, options(5, 9))
    text = latents.page(json.loads(json.dumps(numbers)))                     # from the file as well
    reader = Reader(text)
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(reader.seen)
    for needed in ("default-src 'none'", "width=device-width", "prefers-color-scheme", "@media print"):
        assert needed in text
    assert not re.search(r"https?:|url\(|@import", text)
    links = [value for name, value in reader.attributes if name == "href"]
    names = [value for name, value in reader.attributes if name == "id"]
    assert links == ["#latent-5", "#latent-9"] and names == ["latent-5", "latent-9"]
    assert not [name for name, _ in reader.attributes if name.startswith("on")]


def test_tokens_that_look_like_html_are_harmless_text(setting):
    numbers = latents.evaluate(setting, options(5))
    plain = Reader(latents.page(numbers))
    nasty = ['"><img src=x onerror=alert(1)>', EVIL, "&lt;b&gt;", "</p></section>", "<!--", "' onmouseover='x"]
    row = numbers["rows"][0]
    passage_ = row["passages"][0]
    passage_["tokens"] = (nasty * 10)[:len(passage_["tokens"])]
    row["direct"]["raised"] = [[text, 1.0] for text in nasty]
    row["effect"]["base"]["lowered"] = [[text, -1.0] for text in nasty]
    row["explanation"] = {"base": EVIL, "lora": nasty[0], "judge": EVIL, "balanced": 1.0}
    numbers["run"] = EVIL
    text = latents.page(numbers)
    reader = Reader(text)
    assert set(reader.seen) == set(plain.seen)
    assert not any(tag in text for tag in ("<script", "<img", "<!--"))
    assert {name for name, _ in reader.attributes} == {name for name, _ in plain.attributes}
    assert all(token in reader.text for token in nasty)                      # and it reads as it is


def test_a_passage_reads_as_its_text_and_is_shaded_from_the_faintest_to_the_hottest():
    texts = [" return", " self", ".", "value", "\n", "    ", "x"]
    html_ = page.passage(texts, [0, 3.0, 0, 0, 1.5, 0, 0], 3.0, 1)
    assert Reader(html_).text == " return self.value\n    x"
    assert '<mark class="a9 peak" title="3.00"> self</mark>' in html_ and 'class="a5"' in html_
    assert 'class="a1"' in page.passage(["a", "b"], [1e-6, 9.0], 9.0, 1)
    assert "mark" not in page.passage(["a"], [0.0], 9.0, 5)
    assert page.passage(["", "€"], [5.0, 0.0], 5.0, 0).count("<mark") == 1      # a part of a character lends its shade


def test_whitespace_and_control_characters_are_visible_in_lists():
    assert page.visible(" a\n\tb\r\x00\u202e") == "␣a↵⇥b\\x0d\\x00\\u202e"
    assert page.visible(" " * 15 + "x  y") == "␣×15x␣␣y"
    assert "\u202e" not in page.passage(["\u202e", "\x1b"], [0, 0], 1.0, 0)     # no text may turn the line around
