"""Autointerp: SAEBench's windows, prompts, parsing and scores; the lexical judge; endpoints; answers asked once."""
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import TEXT, write_tokenizer
from lorasae.errors import InputError
from lorasae.evals import autointerp, chat as chat_module, firing, judges
from lorasae.evals.autointerp import Window
from lorasae.evals.chat import Kept, chat
from lorasae.evals.common import interval
from lorasae.evals.firing import Firing
from lorasae.lora import adapters, add_lora, attach_lora, base, detach_lora
from lorasae.sae import JumpReLU

WORDS = [f"w{a}{b}" for a in "abcdefg" for b in "hijklm"]


@pytest.fixture
def setting(model, raw_config, tmp_path):
    """Both families with all blocks adapted, a random SAE at layer 1, and held-out text of context 64."""
    from tokenizers import Tokenizer
    from lorasae.io.corpus import Corpus
    (tmp_path / "text").mkdir()
    generator = np.random.default_rng(0)
    for i in range(40):
        words = generator.choice(WORDS, 150)
        (tmp_path / "text" / f"{i}.txt").write_text("".join(f"{a} = {b}\n" for a, b in zip(words, words[::-1])))
    write_tokenizer(tmp_path, raw_config, TEXT + " ".join(WORDS) + "\n")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    config = model.config
    corpus = Corpus(str(tmp_path / "text"), tokenizer, config.bos_token_id, config.eos_token_id, context=64,
                    eval_tokens=6000)

    sae = JumpReLU(config.hidden_size, 24)
    torch.manual_seed(2)
    torch.nn.init.normal_(sae.W_enc)
    sae.W_dec.data = torch.nn.functional.normalize(sae.W_enc.data, dim=1)
    sae.requires_grad_(False)
    rows = firing.rows_of(corpus)
    with torch.no_grad():
        pre = model.run(model.embed(rows), 0, 2) @ sae.W_enc.T
        sae.threshold.data = pre.flatten(0, 1).quantile(0.97, dim=0).clamp(min=0.01)

    add_lora(model, range(4), 3, dropout=0.0)
    torch.manual_seed(5)
    for module in adapters(model).values():
        torch.nn.init.normal_(module.lora_B.weight, std=0.02)
    (tmp_path / "run").mkdir()
    return SimpleNamespace(model=model, saes={1: sae}, corpus=corpus, folder=tmp_path / "run",
                           config=SimpleNamespace(model="tiny", layer=(1,), sae=("sae",)))


one_family = pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)   # where the family can change nothing


def options(**changes):
    return SimpleNamespace(**{"judge": None, "judge_latents": 6, "judge_seeds": 2, "latents": None, "chat_model": "m",
                              "device": None, **changes})


def planted(count=40, length=128, latent_places=60, seed=0):
    """Rows of random tokens, and a latent that fires at random places with distinct activations."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 90, (count, length), generator=generator)
    places = torch.randperm(count * length, generator=generator)[:latent_places].sort().values
    return rows, Firing(places, 1 + torch.rand(latent_places, generator=generator))


# ---- Where latents fire ----------------------------------------------------------------------------------------------

def test_rows_are_bos_and_the_next_tokens_of_a_chunk():
    chunks = torch.arange(600).view(2, 300)
    rows = firing.rows_of(SimpleNamespace(held_out=chunks, bos=7))
    assert rows.shape == (4, 128) and (rows[:, 0] == 7).all()
    assert rows[0, 1:].tolist() == list(range(1, 128)) and rows[1, 1:].tolist() == list(range(128, 255))
    assert rows[2, 1] == 301                                                    # what is too short for a row is left
    assert firing.rows_of(SimpleNamespace(held_out=chunks[:, :40], bos=7)).shape == (2, 40)


def test_firings_and_rates_are_those_of_the_dense_activations(setting):
    model, sae = setting.model, setting.saes[1]
    rows = firing.rows_of(setting.text)
    with torch.no_grad(), base(model):
        z = sae.encode(model.run(model.embed(rows), 0, 2))
        z[model.special(rows)] = 0
        rates = firing.rates(model, sae, 1, rows)
        found = firing.firings(model, sae, 1, rows, [20, 3])
    assert torch.equal(rates.fired, (z > 0).sum((0, 1))) and rates.tokens == (~model.special(rows)).sum()
    torch.testing.assert_close(rates.total, z.double().sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert list(found) == [20, 3]
    for latent in (20, 3):
        dense = torch.zeros(rows.numel())
        dense[found[latent].places] = found[latent].values
        torch.testing.assert_close(dense.view(rows.shape), z[..., latent], rtol=1e-4, atol=1e-4)


def test_the_strongest_places_keep_their_distance():
    found = Firing(torch.tensor([12, 15, 40, 140, 141, 155]), torch.tensor([9.0, 8.0, 1.0, 7.0, 6.0, 5.0]))
    assert firing.strongest(found, 128, 9, apart=10) == [12, 140, 155, 40]
    assert firing.strongest(found, 128, 2, apart=10) == [12, 140]
    assert firing.strongest(found, 128, 9, apart=10, margin=13) == [15, 141, 155, 40]       # 12 is too near the edge
    assert firing.strongest(found, 128, 9, apart=128) == [12, 140]                          # one a row


def test_pieces_are_the_text_also_where_a_character_has_several_tokens(raw_config, tmp_path):
    from tokenizers import Tokenizer
    write_tokenizer(tmp_path, raw_config, TEXT + "é€🙂")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("a 🙂\n€ c", add_special_tokens=False).ids
    pieces = firing.pieces(tokenizer, ids)
    assert "".join(pieces) == "a 🙂\n€ c" and len(pieces) == len(ids) and any("🙂" in piece for piece in pieces)
    broken = firing.pieces(tokenizer, ids[:4])                                  # ends within a character
    assert len(broken) == 4 and "".join(broken) == tokenizer.decode(ids[:4])


# ---- Windows ---------------------------------------------------------------------------------------------------------

def test_windows_are_fifteen_to_explain_and_fourteen_to_score_of_which_four_are_active():
    rows, found = planted()
    shown, scored = autointerp.windows(found, rows, np.random.default_rng(0))
    assert len(shown) == 15 and len(scored) == 14 and sum(window.active for window in scored) == 4
    assert all(len(window.tokens) == len(window.activations) == len(window.fires) == 21 for window in shown + scored)
    peaks = [max(window.activations) for window in shown]
    assert peaks == sorted(peaks, reverse=True)

    text, dense = rows.view(-1).tolist(), torch.zeros(rows.numel())
    dense[found.places] = found.values
    for window in shown + scored:                                               # each is a stretch of one row
        starts = [i for i in range(len(text) - 20) if tuple(text[i:i + 21]) == window.tokens]
        assert any(list(window.activations) == dense[i:i + 21].tolist() and i // 128 == (i + 20) // 128 for i in starts)
    assert all(window.activations[10] > 0 for window in shown + scored if window.active)


def test_the_strongest_twelve_are_split_ten_to_two_and_the_others_are_weaker():
    rows, found = planted()
    shown, scored = autointerp.windows(found, rows, np.random.default_rng(0))
    top = firing.strongest(found, 128, 12, apart=10, margin=10)
    strongest = sorted(found.values[torch.searchsorted(found.places, torch.tensor(top))].tolist())
    middles = lambda windows: [window.activations[10] for window in windows if window.active]
    assert sum(value >= strongest[0] for value in middles(shown)) == 10
    assert sum(value >= strongest[0] for value in middles(scored)) == 2
    assert sorted(value for value in middles(shown + scored) if value >= strongest[0]) == strongest


def test_weaker_windows_are_drawn_by_the_square_of_the_activation():
    rows, found = planted(latent_places=80)
    values = torch.full((80,), 0.2)
    values[:20] = 9 + torch.rand(20)                                            # enough for the strongest twelve
    values[20:50] = 1                                                           # of 25 times the mass of a faint one
    found = Firing(found.places, values)
    drawn = []
    for seed in range(30):
        shown, scored = autointerp.windows(found, rows, np.random.default_rng(seed))
        middles = [window.activations[10] for window in shown + scored if window.active]
        drawn += sorted(middles)[:7]
    assert sum(value >= 1 for value in drawn) / len(drawn) > 0.9                # by activation alone: 0.8


def test_a_latent_without_enough_windows_has_none():
    rows, found = planted()
    few = Firing(found.places[:11], found.values[:11])
    assert autointerp.windows(few, rows, np.random.default_rng(0)) is None
    alone = firing.strongest(found, 128, 12, apart=10, margin=10)               # twelve tops, and no weaker places
    where = torch.isin(found.places, torch.tensor(alone))
    assert autointerp.windows(Firing(found.places[where], found.values[where]), rows, np.random.default_rng(0)) is None


def test_both_models_share_their_random_windows():
    rows, found = planted()
    _, other = planted(seed=1)
    sets = []
    for latent in (found, other):
        _, scored = autointerp.windows(latent, rows, np.random.default_rng([42, 0, 5]))
        sets.append({window.tokens for window in scored if not window.active})
    assert sets[0] == sets[1] and len(sets[0]) == 10


# ---- Scores ----------------------------------------------------------------------------------------------------------

def test_an_oracle_scores_1_and_always_none_scores_10_of_14():
    rows, found = planted()
    _, scored = autointerp.windows(found, rows, np.random.default_rng(0))
    oracle = [number for number, window in enumerate(scored, 1) if window.active]
    assert autointerp.score(oracle, scored) == (1, 1)
    assert autointerp.score([], scored) == (pytest.approx(10 / 14), 0.5)
    assert autointerp.score(list(range(1, 15)), scored) == (pytest.approx(4 / 14), 0.5)
    assert autointerp.score(oracle[:2] + [99], scored) == (pytest.approx(12 / 14), 0.75)
    assert autointerp.FLOOR == 10 / 14


@pytest.mark.parametrize("answer, numbers", [
    ("1, 3 and 5.", [1, 3, 5]), ("None", []), ("None.", []), ("none", None), ("Examples 1", None), ("2", [2]),
    ("1,2,", [1, 2]),
    ("1, 2, and 4", [1, 2, 4]), ("", None), (" \n", None), ("²", None), ("I think 3", None), ("3; 4", None)])
def test_an_answer_is_numbers_or_none_or_of_no_use(answer, numbers):
    assert judges.read_numbers(answer) == numbers


@pytest.mark.parametrize("answer, explanation", [
    ('This neuron activates on the word "but".', 'the word "but"'), ("numbers", "numbers"), ("", ""),
    ("It activates on what activates on dots.", "dots")])
def test_an_explanation_is_what_follows_activates_on(answer, explanation):
    assert judges.read_explanation(answer) == explanation


# ---- The lexical judge -----------------------------------------------------------------------------------------------

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


def test_a_token_that_fires_in_less_than_half_of_its_places_explains_nothing():
    mixed = Window(tuple(map(ord, "aaa")), (1.0, 0.0, 0.0), (True, False, False), True)
    verdict = judges.lexical([mixed, window_of("bx", "x")], [window_of("a"), window_of("x")], Letters())
    assert verdict.explanation == "'x'" and verdict.picked == [2]


def test_the_lexical_judge_gives_at_most_ten_tokens_the_strongest_first():
    letters = "abcdefghijklmnop"
    shown = [Window((ord(c),), (float(i),), (True,), True) for i, c in enumerate(letters, 1)]
    verdict = judges.lexical(shown, [window_of("p"), window_of("a")], Letters())
    assert verdict.explanation.startswith("'p', 'o'") and len(verdict.explanation.split(", ")) == 10
    assert verdict.picked == [1]


# ---- A language model as the judge -----------------------------------------------------------------------------------

def test_firing_tokens_are_marked_for_explaining_and_not_for_predicting():
    window = window_of("ab\nxyc", "xy")
    assert judges.written(window, Letters(), marked=True) == "ab↵<<xy>>c"
    assert judges.written(window, Letters(), marked=False) == "ab↵xyc"


def test_the_judge_predicts_from_its_explanation_alone():
    questions = []

    def ask(messages, max_tokens):
        questions.append((messages, max_tokens))
        return ["This neuron activates on the letter x.", "2"][len(questions) - 1]

    shown = [window_of("abx", "x"), window_of("x", "x")]
    scored = [window_of("q", active=False)] * 13 + [window_of("cx", "x")]
    verdict = judges.language_model(shown, scored, Letters(), ask, np.random.default_rng(0))
    assert verdict == ("the letter x", [2])
    (explain, explain_tokens), (predict, predict_tokens) = questions
    assert (explain_tokens, predict_tokens) == (30, 33)
    assert "1. ab<<x>>\n2. <<x>>" in explain[1]["content"]
    assert "fires on the letter x." in predict[1]["content"] and "14. cx" in predict[1]["content"]
    assert "<<" not in predict[1]["content"] and "ab" not in predict[1]["content"] and "14" in predict[0]["content"]


@pytest.fixture
def endpoint(monkeypatch):
    """A server at .url; .answer(request body) gives text, an error's status, the reply's bytes, or None to cut it."""
    state = SimpleNamespace(requests=[], answer=None)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append(body)
            answer = state.answer(body)
            if answer is None:                                                  # promises more than it sends
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"{")
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if isinstance(answer, str):
                answer = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
            self.send_response(answer if isinstance(answer, int) else 200)
            if answer == 302:
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()
            if isinstance(answer, bytes):
                self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    monkeypatch.setattr(chat_module, "WAITS", (0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield state
    server.shutdown()
    server.server_close()


def politely(body):
    """Explains, then says None."""
    return "This neuron activates on words." if "<<" in body["messages"][1]["content"] else "None"


def in_turn(*answers):
    """An answer that is the next of these at every request, then politely()."""
    waiting = list(answers)
    return lambda body: waiting.pop(0) if waiting else politely(body)


@pytest.mark.parametrize("trouble", [429, 500, None])
def test_a_busy_failing_or_cut_connection_is_tried_again(endpoint, trouble):
    endpoint.answer = in_turn(trouble, trouble, "hello")
    assert chat(endpoint.url, "m", [], 5, temperature=None) == "hello"
    assert len(endpoint.requests) == 3 and "temperature" not in endpoint.requests[0]


@pytest.mark.parametrize("trouble, asked", [
    (429, 3), (None, 3), (401, 1), (302, 1), (b"not JSON", 1), (b"[]", 1),
    (b'{"choices": [{"message": {"content": [1]}}]}', 1)])
def test_an_endpoint_that_stays_wrong_is_one_clear_line(endpoint, trouble, asked):
    endpoint.answer = lambda body: trouble
    with pytest.raises(InputError, match="OpenAI-compatible") as refused:
        chat(endpoint.url, "m", [], 5)
    assert "\n" not in str(refused.value) and len(endpoint.requests) == asked


@pytest.mark.parametrize("url", ["localhost:8000/v1", "file:///etc/passwd", ""])
def test_only_http_addresses_are_endpoints(url):
    with pytest.raises(InputError, match="http"):
        chat(url, "m", [], 5)


def test_a_model_that_says_nothing_has_said_nothing(endpoint):
    endpoint.answer = lambda body: b'{"choices": [{"message": {"content": null}}]}'
    assert chat(endpoint.url, "m", [], 5) == ""


def test_a_question_is_asked_once_and_another_judges_answers_are_not_taken(tmp_path):
    asked = []

    def ask(messages, max_tokens):
        asked.append(messages)
        return f"answer {len(asked)}"

    path = tmp_path / "answers" / "latent_3.json"
    kept = Kept(path, ask, "m at u")
    assert [kept([1], 5), kept([1], 5), kept([2], 5), kept([1], 6)] == ["answer 1", "answer 1", "answer 2", "answer 3"]
    assert Kept(path, ask, "m at u")([2], 5) == "answer 2" and len(asked) == 3  # from the file
    assert Kept(path, ask, "other at u")([2], 5) == "answer 4"
    assert not list(path.parent.glob("*.part"))


def test_a_damaged_file_of_answers_is_one_clear_line(tmp_path):
    for damage in (b"{", b"[]"):
        (tmp_path / "latent_3.json").write_bytes(damage)
        with pytest.raises(InputError, match="latent_3.json"):
            Kept(tmp_path / "latent_3.json", None, "m")


# ---- The whole evaluation --------------------------------------------------------------------------------------------

def test_the_lexical_judge_scores_both_models_paired_by_latent(setting, capsys):
    numbers = autointerp.evaluate(setting, options())
    assert numbers["judge"] == "lexical judge, no language model"
    assert numbers["floor"] == {"score": 10 / 14, "balanced": 0.5}
    rows = numbers["rows"]
    assert 2 <= len(rows) <= 6 and len(rows) + numbers["rare"] == numbers["chosen"]
    for measure in ("score", "balanced"):
        means = {}
        for name in ("base", "lora"):
            means[name] = torch.tensor([sum(row[measure][name]) / 2 for row in rows], dtype=torch.float64)
        means["delta"] = means["lora"] - means["base"]
        for name, values in means.items():
            found = numbers[measure][name]
            assert (found["mean"], found["ci90"]) == pytest.approx(interval(values))
    assert numbers["score"]["delta"]["mean"] != 0                               # adapters before the SAE matter
    json.dumps(numbers, allow_nan=False)
    assert autointerp.evaluate(setting, options()) == numbers
    autointerp.show(numbers)
    printed = capsys.readouterr().out
    assert "lexical judge, no language model" in printed and "0.7143" in printed and "0.5000" in printed
    assert not (setting.folder / "autointerp").exists()


@one_family
def test_fresh_adapters_score_exactly_as_the_base_model(setting):
    for module in adapters(setting.model).values():
        torch.nn.init.zeros_(module.lora_B.weight)
    numbers = autointerp.evaluate(setting, options())
    assert numbers["score"]["base"] == numbers["score"]["lora"] and numbers["balanced"]["delta"]["ci90"] == 0
    assert all(row["explanation"]["base"] == row["explanation"]["lora"] for row in numbers["rows"])


def test_adapters_after_the_sae_have_nothing_to_be_judged(setting, model):
    after = {name: module for name, module in detach_lora(model).items() if int(name.split(".")[2]) > 1}
    attach_lora(model, after)
    assert firing.reads_nothing_new(setting)
    rows, sae = firing.rows_of(setting.text), setting.saes[1]
    adapted = firing.firings(model, sae, 1, rows, [3])[3]
    with base(model):
        plain = firing.firings(model, sae, 1, rows, [3])[3]
    assert torch.equal(adapted.values, plain.values) and torch.equal(adapted.places, plain.places)
    with pytest.raises(InputError, match="--adapt all") as refused:
        autointerp.evaluate(setting, options())
    assert "\n" not in str(refused.value)


@one_family
def test_an_endpoints_answers_are_kept_so_that_a_rerun_asks_nothing(setting, endpoint, capsys):
    endpoint.answer = politely
    asked = options(judge=endpoint.url, judge_seeds=1, judge_latents=4)
    numbers = autointerp.evaluate(setting, asked)
    assert numbers["judge"] == f"m at {endpoint.url}" and "questions" in capsys.readouterr().out
    assert numbers["score"]["base"]["mean"] == pytest.approx(10 / 14) and numbers["balanced"]["lora"]["mean"] == 0.5
    assert all(row["explanation"]["base"] == "words" for row in numbers["rows"])
    first = len(endpoint.requests)
    assert first > len(numbers["rows"]) * 2
    assert autointerp.evaluate(setting, asked) == numbers and len(endpoint.requests) == first


@one_family
def test_a_run_that_broke_off_goes_on_where_it_was(setting, endpoint):
    asked = options(judge=endpoint.url, judge_seeds=1, judge_latents=4)
    endpoint.answer = politely
    whole = autointerp.evaluate(setting, asked)
    total = len(endpoint.requests)

    for path in (setting.folder / "autointerp").iterdir():
        path.unlink()
    endpoint.requests.clear()
    endpoint.answer = lambda body: politely(body) if len(endpoint.requests) <= 5 else 401
    with pytest.raises(InputError, match="401"):
        autointerp.evaluate(setting, asked)
    answered = 5
    endpoint.requests.clear()
    endpoint.answer = politely
    assert autointerp.evaluate(setting, asked) == whole and len(endpoint.requests) == total - answered


@one_family
def test_a_latent_whose_answer_names_no_windows_is_left_out_and_counted(setting, endpoint):
    asked = options(judge=endpoint.url, judge_seeds=1, judge_latents=4)
    endpoint.answer = politely
    whole = autointerp.evaluate(setting, asked)
    for path in (setting.folder / "autointerp").iterdir():
        path.unlink()
    strange = ["I cannot say"]
    endpoint.answer = lambda body: strange.pop() if strange and politely(body) == "None" else politely(body)
    numbers = autointerp.evaluate(setting, asked)
    assert numbers["unusable"] == 1 and len(numbers["rows"]) + numbers["unusable"] == len(whole["rows"])
    endpoint.answer = lambda body: ""
    with pytest.raises(InputError, match="nothing is left to score"):
        autointerp.evaluate(setting, options(judge=endpoint.url, judge_seeds=1, judge_latents=3, chat_model="other"))


@one_family
@pytest.mark.parametrize("how, message", [
    ({"latents": [24]}, "0 to 23"), ({"latents": [-1]}, "0 to 23"), ({"judge_latents": 0}, "at least"),
    ({"judge_seeds": 0}, "at least"), ({"judge": "nonsense"}, "http")])
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
    assert numbers["rows"] == all_of_them["rows"][:3]                           # whatever other latents are judged


@one_family
def test_too_little_text_is_one_clear_line(setting):
    corpus = setting.text
    short = SimpleNamespace(held_out=corpus.held_out[:2], bos=corpus.bos, tokenizer=corpus.tokenizer)
    setting.text = short
    with pytest.raises(InputError, match="--eval-tokens|too rarely"):
        autointerp.evaluate(setting, options())
    setting.text = SimpleNamespace(held_out=short.held_out[:, :20], bos=short.bos, tokenizer=short.tokenizer)
    with pytest.raises(InputError, match="--context"):
        autointerp.evaluate(setting, options())
