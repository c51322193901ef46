"""Autointerp: SAEBench's windows, prompts, parsing and scores; judges; answers asked once."""
import json
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tokenizers import Tokenizer

from conftest import TEXT, write_tokenizer
from helpers import Handler, Server, adapted, random_sae, toy_text
from lorasae.errors import InputError
from lorasae.evals import autointerp, chat as chat_module, firing, judges
from lorasae.evals.autointerp import Window
from lorasae.evals.chat import Kept, chat
from lorasae.evals.common import interval
from lorasae.evals.firing import Firing
from lorasae.lora import adapters, attach_lora, base, detach_lora

WORDS = [f"w{a}{b}" for a in "abcdefg" for b in "hijklm"]


@pytest.fixture
def setting(model, raw_config, tmp_path):
    """Both families with all blocks adapted, a random SAE at layer 1, and held-out text."""
    text = toy_text(tmp_path, raw_config, WORDS, " ".join(WORDS), eval_tokens=6000)
    sae = random_sae("jumprelu", model, 24, std=1, seed=2)
    sae.W_dec.data = torch.nn.functional.normalize(sae.W_enc.data, dim=1)
    rows = firing.rows_of(text)
    with torch.no_grad():
        pre = model.run(model.embed(rows), 0, 2) @ sae.W_enc.T
        sae.threshold.data = pre.flatten(0, 1).quantile(0.97, dim=0).clamp(min=0.01)
    (tmp_path / "run").mkdir()
    return SimpleNamespace(model=adapted(model, range(4), std=0.02), saes={1: sae}, text=text,
                           folder=tmp_path / "run",
                           config=SimpleNamespace(model="tiny", layer=(1,), sae=("sae",)))


one_family = pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)


def options(**changes):
    usual = {"judge": None, "judge_latents": 6, "judge_seeds": 2, "latents": None,
             "chat_model": "m", "device": None}
    return SimpleNamespace(**{**usual, **changes})


def planted(count=40, length=128, latent_places=60, seed=0):
    """Rows of random tokens, and a latent that fires at random places, each time differently."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 90, (count, length), generator=generator)
    places = torch.randperm(count * length, generator=generator)[:latent_places].sort().values
    return rows, Firing(places, 1 + torch.rand(latent_places, generator=generator))


# ---- Where latents fire --------------------------------------------------------------------------

def test_rows_are_bos_and_the_next_tokens_of_a_chunk():
    chunks = torch.arange(600).view(2, 300)
    rows = firing.rows_of(SimpleNamespace(held_out=chunks, bos=7))
    assert rows.shape == (4, 128) and (rows[:, 0] == 7).all()
    assert rows[:2, 1:].flatten().tolist() == list(range(1, 255))
    assert rows[2, 1] == 301                            # what is too short for a row is left
    assert firing.rows_of(SimpleNamespace(held_out=chunks[:, :40], bos=7)).shape == (2, 40)


def test_firings_and_rates_are_those_of_the_dense_activations(setting):
    model, sae = setting.model, setting.saes[1]
    rows = firing.rows_of(setting.text)
    with torch.no_grad(), base(model):
        z = sae.encode(model.run(model.embed(rows), 0, 2))
        z[model.special(rows)] = 0
        rates = firing.rates(model, sae, 1, rows)
        found = firing.firings(model, sae, 1, rows, [20, 3])
    assert torch.equal(rates.fired, (z > 0).sum((0, 1)))
    assert rates.tokens == (~model.special(rows)).sum()
    torch.testing.assert_close(rates.total, z.double().sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert list(found) == [20, 3]
    for latent in (20, 3):
        dense = torch.zeros(rows.numel())
        dense[found[latent].places] = found[latent].values
        torch.testing.assert_close(dense.view(rows.shape), z[..., latent], rtol=1e-4, atol=1e-4)


def test_the_strongest_places_keep_their_distance():
    found = Firing(torch.tensor([12, 15, 40, 140, 141, 155]),
                   torch.tensor([9.0, 8.0, 1.0, 7.0, 6.0, 5.0]))
    assert firing.strongest(found, 128, 9, apart=10) == [12, 140, 155, 40]
    assert firing.strongest(found, 128, 2, apart=10) == [12, 140]
    assert firing.strongest(found, 128, 9, apart=128) == [12, 140]              # one a row
    # 12 is too near the edge
    assert firing.strongest(found, 128, 9, apart=10, margin=13) == [15, 141, 155, 40]


def test_pieces_are_the_text_also_where_a_character_has_several_tokens(raw_config, tmp_path):
    write_tokenizer(tmp_path, raw_config, TEXT + "é€🙂")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("a 🙂\n€ c", add_special_tokens=False).ids
    pieces = firing.pieces(tokenizer, ids)
    assert "".join(pieces) == "a 🙂\n€ c" and len(pieces) == len(ids)
    assert any("🙂" in piece for piece in pieces)
    broken = firing.pieces(tokenizer, ids[:4])          # ends within a character
    assert len(broken) == 4 and "".join(broken) == tokenizer.decode(ids[:4])


# ---- Windows -------------------------------------------------------------------------------------

@pytest.fixture
def drawn():
    """(rows, a latent that fires in them, the windows to explain it by, those to score)"""
    rows, found = planted()
    return rows, found, *autointerp.windows(found, rows, np.random.default_rng(0))


def middles(windows):
    return [window.activations[10] for window in windows if window.active]


def test_windows_are_fifteen_to_explain_and_fourteen_to_score_of_which_four_are_active(drawn):
    rows, found, shown, scored = drawn
    assert (len(shown), len(scored), sum(window.active for window in scored)) == (15, 14, 4)
    peaks = [max(window.activations) for window in shown]
    assert peaks == sorted(peaks, reverse=True)

    text, dense = rows.view(-1).tolist(), torch.zeros(rows.numel())
    dense[found.places] = found.values
    for window in shown + scored:                       # each is a stretch of one row
        assert len(window.tokens) == len(window.activations) == len(window.fires) == 21
        starts = [i for i in range(len(text) - 20) if tuple(text[i:i + 21]) == window.tokens]
        assert any(list(window.activations) == dense[i:i + 21].tolist()
                   and i // 128 == (i + 20) // 128 for i in starts)
    assert min(middles(shown + scored)) > 0


def test_the_strongest_twelve_are_split_ten_to_two_and_the_others_are_weaker(drawn):
    rows, found, shown, scored = drawn
    top = torch.tensor(firing.strongest(found, 128, 12, apart=10, margin=10))
    strongest = sorted(found.values[torch.searchsorted(found.places, top)].tolist())
    assert sum(value >= strongest[0] for value in middles(shown)) == 10
    assert sum(value >= strongest[0] for value in middles(scored)) == 2
    together = sorted(middles(shown + scored))
    assert [value for value in together if value >= strongest[0]] == strongest


def test_weaker_windows_are_drawn_by_the_square_of_the_activation():
    rows, found = planted(latent_places=80)
    values = torch.full((80,), 0.2)
    values[:20] = 9 + torch.rand(20)                    # enough for the strongest twelve
    values[20:50] = 1                                   # of 25 times the mass of a faint one
    found = Firing(found.places, values)
    drawn = []
    for seed in range(30):
        shown, scored = autointerp.windows(found, rows, np.random.default_rng(seed))
        drawn += sorted(middles(shown + scored))[:7]
    assert sum(value >= 1 for value in drawn) / len(drawn) > 0.9    # by activation alone: 0.8


def test_a_latent_without_enough_windows_has_none():
    rows, found = planted()
    top = torch.tensor(firing.strongest(found, 128, 12, apart=10, margin=10))
    tops = torch.isin(found.places, top)                # twelve, and no weaker places
    for some in slice(11), tops:
        few = Firing(found.places[some], found.values[some])
        assert autointerp.windows(few, rows, np.random.default_rng(0)) is None


def test_both_models_share_their_random_windows():
    rows, found = planted()
    _, other = planted(seed=1)
    sets = []
    for latent in (found, other):
        _, scored = autointerp.windows(latent, rows, np.random.default_rng([42, 0, 5]))
        sets.append({window.tokens for window in scored if not window.active})
    assert sets[0] == sets[1] and len(sets[0]) == 10


# ---- Scores --------------------------------------------------------------------------------------

def test_an_oracle_scores_1_and_always_none_scores_10_of_14(drawn):
    *_, scored = drawn
    oracle = [number for number, window in enumerate(scored, 1) if window.active]
    assert autointerp.score(oracle, scored) == (1, 1)
    assert autointerp.score([], scored) == (pytest.approx(10 / 14), 0.5)
    assert autointerp.score(list(range(1, 15)), scored) == (pytest.approx(4 / 14), 0.5)
    assert autointerp.score(oracle[:2] + [99], scored) == (pytest.approx(12 / 14), 0.75)
    assert autointerp.FLOOR == 10 / 14


@pytest.mark.parametrize("answer, numbers", [
    ("1, 3 and 5.", [1, 3, 5]), ("None", []), ("None.", []), ("none", None), ("2", [2]),
    ("1,2,", [1, 2]), ("1, 2, and 4", [1, 2, 4]), ("", None), (" \n", None), ("²", None),
    ("I think 3", None), ("3; 4", None)])
def test_an_answer_is_numbers_or_none_or_of_no_use(answer, numbers):
    assert judges.read_numbers(answer) == numbers


@pytest.mark.parametrize("answer, explanation", [
    ('This neuron activates on the word "but".', 'the word "but"'), ("", ""),
    ("numbers", "numbers"), ("It activates on what activates on dots.", "dots")])
def test_an_explanation_is_what_follows_activates_on(answer, explanation):
    assert judges.read_explanation(answer) == explanation


# ---- The lexical judge ---------------------------------------------------------------------------

class Letters:
    """Token i is the letter chr(i)."""

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))

    def id_to_token(self, i):
        return chr(i)


def window_of(text, fires="", active=True):
    firing_letters = tuple(letter in fires for letter in text)
    return Window(tuple(map(ord, text)), tuple(map(float, firing_letters)), firing_letters, active)


def test_the_lexical_judge_knows_a_latent_by_its_tokens():
    shown = [window_of("abxcd", "x"), window_of("efxgh", "x"), window_of("ijyka", "y")]
    quiet = [window_of("aabcd", active=False), window_of("zzzzz", active=False)]
    scored = [window_of("zzxzz"), quiet[0], window_of("ykkkk"), quiet[1]]
    verdict = judges.lexical(shown, scored, Letters())
    assert verdict.explanation == "'x', 'y'" and verdict.picked == [1, 3]

    # A token that fires in less than half of its places explains nothing
    mixed = Window(tuple(map(ord, "aaa")), (1.0, 0.0, 0.0), (True, False, False), True)
    verdict = judges.lexical([mixed, window_of("bx", "x")], [window_of("a"), window_of("x")],
                             Letters())
    assert verdict.explanation == "'x'" and verdict.picked == [2]

    # At most ten tokens, the strongest first
    shown = [Window((ord(c),), (float(i),), (True,), True)
             for i, c in enumerate("abcdefghijklmnop", 1)]
    verdict = judges.lexical(shown, [window_of("p"), window_of("a")], Letters())
    explained = verdict.explanation.split(", ")
    assert explained[:2] == ["'p'", "'o'"] and len(explained) == 10 and verdict.picked == [1]


# ---- A language model as the judge ---------------------------------------------------------------

def test_the_judge_predicts_from_its_explanation_alone():
    questions = []

    def ask(messages, max_tokens):
        questions.append((messages, max_tokens))
        return ["This neuron activates on the letter x.", "2"][len(questions) - 1]

    shown = [window_of("abx", "x"), window_of("x", "x")]
    scored = [window_of("q", active=False)] * 13 + [window_of("cx", "x")]
    verdict = judges.language_model(shown, scored, Letters(), ask, np.random.default_rng(0))
    assert verdict == ("the letter x", [2])
    lines = window_of("ab\nxyc", "xy")
    assert judges.written(lines, Letters(), marked=True) == "ab↵<<xy>>c"
    assert judges.written(lines, Letters(), marked=False) == "ab↵xyc"
    (explain, explain_tokens), (predict, predict_tokens) = questions
    assert (explain_tokens, predict_tokens) == (30, 33)
    assert "1. ab<<x>>\n2. <<x>>" in explain[1]["content"]
    assert "fires on the letter x." in predict[1]["content"] and "14. cx" in predict[1]["content"]
    assert "<<" not in predict[1]["content"] and "ab" not in predict[1]["content"]
    assert "14" in predict[0]["content"]


class Answering(Handler):
    """server.answer(body) is a text, an error's status, a reply's bytes, or None: it hangs up."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        answer = self.server.answer(body)
        if answer is None:                              # promises more than it sends
            self.reply(200, b"{", length=1000)
            self.connection.shutdown(socket.SHUT_RDWR)
        elif isinstance(answer, int):
            self.reply(answer, Location="http://127.0.0.1:9/elsewhere")
        elif isinstance(answer, bytes):
            self.reply(200, answer)
        else:
            self.reply_json({"choices": [{"message": {"content": answer}}]})


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(chat_module, "WAITS", (0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(Answering) as server:
        yield server


def politely(body):
    """Explains, then says None."""
    return "This neuron activates on words." if "<<" in body["messages"][1]["content"] else "None"


def in_turn(*answers):
    """An answer that is the next of these at every request, then politely()."""
    waiting = list(answers)
    return lambda body: waiting.pop(0) if waiting else politely(body)


@pytest.mark.parametrize("trouble", [429, 500, None])
def test_a_question_in_openais_format_is_asked_again_of_a_busy_endpoint(
        endpoint, trouble, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    endpoint.answer = in_turn(trouble, trouble, "hello")
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    assert chat(endpoint.url + "/v1", **body) == "hello" and len(endpoint.requests) == 3
    path, key, asked = endpoint.requests[-1]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert asked == {**body, "temperature": 0.8}


@pytest.mark.parametrize("trouble, asked", [
    (429, 3), (500, 3), (None, 3), (401, 1), (302, 1), (b"not JSON", 1), (b"[]", 1), (b"{}", 1),
    (b'{"choices": []}', 1), (b'{"choices": [{"message": {"content": [1]}}]}', 1)])
def test_an_endpoint_that_stays_wrong_is_one_clear_line(endpoint, trouble, asked):
    endpoint.answer = lambda body: trouble
    with pytest.raises(InputError, match="OpenAI-compatible") as refused:
        chat(endpoint.url, "m", [], 5)
    assert "\n" not in str(refused.value) and len(endpoint.requests) == asked


def test_only_http_addresses_are_endpoints_and_a_model_may_say_nothing(endpoint):
    for url, said in (("localhost:8000/v1", "http"), ("file:///etc/passwd", "http"), ("", "http"),
                      ("http://127.0.0.1:9/v1", "OpenAI-compatible")):
        with pytest.raises(InputError, match=said):
            chat(url, "m", [], 5)
    endpoint.answer = lambda body: b'{"choices": [{"message": {"content": null}}]}'
    assert chat(endpoint.url, "m", [], 5, temperature=None) == ""
    assert "temperature" not in endpoint.requests[0][2]


def test_a_question_is_asked_once_and_another_judges_answers_are_not_taken(tmp_path):
    asked = []

    def ask(messages, max_tokens):
        asked.append(messages)
        return f"answer {len(asked)}"

    path = tmp_path / "answers" / "latent_3.json"
    kept = Kept(path, ask, "m at u")
    answers = [kept([1], 5), kept([1], 5), kept([2], 5), kept([1], 6)]
    assert answers == ["answer 1", "answer 1", "answer 2", "answer 3"]
    assert Kept(path, ask, "m at u")([2], 5) == "answer 2" and len(asked) == 3  # from the file
    assert Kept(path, ask, "other at u")([2], 5) == "answer 4"
    assert not list(path.parent.glob("*.part"))
    for damage in (b"{", b"[]"):
        path.write_bytes(damage)
        with pytest.raises(InputError, match="latent_3.json"):
            Kept(path, None, "m")


# ---- The whole evaluation ------------------------------------------------------------------------

def test_the_lexical_judge_scores_both_models_paired_by_latent(setting, capsys):
    numbers = autointerp.evaluate(setting, options())
    assert numbers["judge"] == "lexical judge, no language model"
    assert numbers["floor"] == {"score": 10 / 14, "balanced": 0.5}
    rows = numbers["rows"]
    assert 2 <= len(rows) <= 6 and len(rows) + numbers["rare"] == numbers["chosen"]
    for measure in ("score", "balanced"):
        means = {name: torch.tensor([sum(row[measure][name]) / 2 for row in rows]).double()
                 for name in ("base", "lora")}
        means["delta"] = means["lora"] - means["base"]
        for name, values in means.items():
            found = numbers[measure][name]
            assert (found["mean"], found["ci90"]) == pytest.approx(interval(values))
    assert numbers["score"]["delta"]["mean"] != 0       # adapters before the SAE matter
    json.dumps(numbers, allow_nan=False)
    assert autointerp.evaluate(setting, options()) == numbers
    autointerp.show(numbers)
    printed = capsys.readouterr().out
    for text in ("lexical judge, no language model", "0.7143", "0.5000"):
        assert text in printed
    assert not (setting.folder / "autointerp").exists()


@one_family
def test_fresh_adapters_score_exactly_as_the_base_model(setting):
    for module in adapters(setting.model).values():
        torch.nn.init.zeros_(module.lora_B.weight)
    numbers = autointerp.evaluate(setting, options())
    assert numbers["score"]["base"] == numbers["score"]["lora"]
    assert numbers["balanced"]["delta"]["ci90"] == 0
    assert all(row["explanation"]["base"] == row["explanation"]["lora"] for row in numbers["rows"])


def test_adapters_after_the_sae_have_nothing_to_be_judged(setting, model):
    modules = detach_lora(model)
    attach_lora(model, {name: modules[name] for name in modules if int(name.split(".")[2]) > 1})
    assert firing.reads_nothing_new(setting)
    rows, sae = firing.rows_of(setting.text), setting.saes[1]
    adapted = firing.firings(model, sae, 1, rows, [3])[3]
    with base(model):
        plain = firing.firings(model, sae, 1, rows, [3])[3]
    assert torch.equal(adapted.values, plain.values) and torch.equal(adapted.places, plain.places)
    with pytest.raises(InputError, match="--adapt all") as refused:
        autointerp.evaluate(setting, options())
    assert "\n" not in str(refused.value)


@pytest.fixture
def asked(endpoint):
    """The options that ask the endpoint, which answers politely."""
    endpoint.answer = politely
    return options(judge=endpoint.url, judge_seeds=1, judge_latents=4)


@one_family
def test_an_endpoints_answers_are_kept_so_that_a_run_that_broke_off_asks_only_the_rest(
        setting, endpoint, asked, capsys):
    whole = autointerp.evaluate(setting, asked)
    assert whole["judge"] == f"m at {endpoint.url}" and "questions" in capsys.readouterr().out
    assert whole["score"]["base"]["mean"] == pytest.approx(10 / 14)
    assert whole["balanced"]["lora"]["mean"] == 0.5
    assert all(row["explanation"]["base"] == "words" for row in whole["rows"])
    total = len(endpoint.requests)
    assert total > len(whole["rows"]) * 2
    assert autointerp.evaluate(setting, asked) == whole and len(endpoint.requests) == total

    for path in (setting.folder / "autointerp").iterdir():
        path.unlink()
    endpoint.requests.clear()
    endpoint.answer = lambda body: politely(body) if len(endpoint.requests) <= 5 else 401
    with pytest.raises(InputError, match="401"):
        autointerp.evaluate(setting, asked)
    endpoint.requests.clear()
    endpoint.answer = politely
    assert autointerp.evaluate(setting, asked) == whole and len(endpoint.requests) == total - 5


@one_family
def test_a_latent_whose_answer_names_no_windows_is_left_out_and_counted(setting, endpoint, asked):
    strange = ["I cannot say"]

    def answer(body):
        return strange.pop() if strange and politely(body) == "None" else politely(body)

    endpoint.answer = answer
    numbers = autointerp.evaluate(setting, asked)
    found = len(numbers["rows"]) + numbers["unusable"] + numbers["rare"]
    assert numbers["unusable"] == 1 and found == numbers["chosen"]
    endpoint.answer = lambda body: ""
    with pytest.raises(InputError, match="nothing is left to score"):
        autointerp.evaluate(setting, options(judge=endpoint.url, judge_seeds=1, chat_model="other"))


@one_family
@pytest.mark.parametrize("how, message", [
    ({"latents": [24]}, "0 to 23"), ({"latents": [-1]}, "0 to 23"),
    ({"judge_latents": 0}, "at least"), ({"judge_seeds": 0}, "at least"),
    ({"judge": "nonsense"}, "http")])
def test_what_cannot_be_judged_is_one_clear_line(setting, how, message):
    with pytest.raises(InputError, match=message) as refused:
        autointerp.evaluate(setting, options(**how))
    assert "\n" not in str(refused.value)


@one_family
def test_named_latents_are_judged(setting):
    all_of_them = autointerp.evaluate(setting, options(judge_latents=24))
    some = [row["latent"] for row in all_of_them["rows"]][:3]
    numbers = autointerp.evaluate(setting, options(latents=some + some[:1]))
    assert [row["latent"] for row in numbers["rows"]] == some
    alone = autointerp.evaluate(setting, options(latents=some[:1]))
    assert alone["rows"] == numbers["rows"][:1] and alone["score"]["base"]["ci90"] is None
    autointerp.show(alone)
    assert numbers["rows"] == all_of_them["rows"][:3]   # whatever other latents are judged


@one_family
def test_too_little_text_is_one_clear_line(setting):
    text = setting.text
    for chunks, said in ((text.held_out[:2], "--eval-tokens|too rarely"),
                         (text.held_out[:2, :20], "--context")):
        setting.text = SimpleNamespace(held_out=chunks, bos=text.bos, tokenizer=text.tokenizer)
        with pytest.raises(InputError, match=said):
            autointerp.evaluate(setting, options())
