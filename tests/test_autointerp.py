"""Autointerp: SAEBench's windows, prompts, parsing and scores; a judge and its endpoint."""
import json
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from conftest import TEXT, write_tokenizer
from helpers import Handler, Server, adapted, random_sae, refuses, toy_text
from lorasae import InputError, base
from lorasae.evals import autointerp, chat as chat_module
from lorasae.evals import judge as judges
from lorasae.evals.autointerp import Window, firings, rows_of, strongest, times_fired
from lorasae.evals.chat import Kept, chat
from lorasae.evals.common import interval

WORDS = [f"w{a}{b}" for a in "abcdefg" for b in "hijklm"]


@pytest.fixture
def setting(model, raw_config, tmp_path):
    """Each family's model with all blocks adapted, a random SAE at layer 1, and held-out text."""
    text = toy_text(tmp_path, raw_config, WORDS, " ".join(WORDS), eval_tokens=6000)
    sae = random_sae("jumprelu", model, 24, std=1, seed=2)
    sae.W_dec.data = torch.nn.functional.normalize(sae.W_enc.data, dim=1)
    rows = rows_of(text)
    pre = model.run(model.embed(rows), 0, 2) @ sae.W_enc.T
    sae.threshold.data = pre.flatten(0, 1).quantile(0.97, dim=0).clamp(min=0.01)
    model = adapted(model, range(4), std=0.02)
    return SimpleNamespace(model=model, saes={1: sae}, text=text, folder=tmp_path / "run")


one_family = pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)


def test_rows_are_bos_and_the_next_tokens_of_a_chunk():
    chunks = torch.arange(600).view(2, 300)
    rows = rows_of(SimpleNamespace(held_out=chunks, bos=7))
    assert rows.shape == (4, 128) and (rows[:, 0] == 7).all()
    assert rows[:2, 1:].flatten().tolist() == list(range(1, 255))
    assert rows[2, 1] == 301                            # a remainder too short for a row is dropped
    assert rows_of(SimpleNamespace(held_out=chunks[:, :40], bos=7)).shape == (2, 40)


def test_firings_match_the_dense_activations(setting):
    model, sae = setting.model, setting.saes[1]
    rows = rows_of(setting.text)
    with torch.no_grad(), base(model):
        z = sae.encode(model.run(model.embed(rows), 0, 2))
        z[model.special(rows)] = 0
        z = z.flatten(0, 1)
        assert torch.equal(times_fired(model, sae, 1, rows), (z > 0).sum(0))
        found = firings(model, sae, 1, rows, [20, 3]).to_dense()
    torch.testing.assert_close(found, z.T[[20, 3]], rtol=1e-4, atol=1e-4)


def planted(latent_places=60, seed=0):
    """Rows of random tokens, and a latent that fires at random places with random strengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 90, (40, 128), generator=generator)
    places = torch.randperm(rows.numel(), generator=generator)[:latent_places]
    activation = torch.zeros(rows.numel())
    activation[places] = 1 + torch.rand(latent_places, generator=generator)
    return rows, activation


def windows(activation, rows, seed=0):
    return autointerp.windows(activation, rows, np.random.default_rng(seed))


def middles(windows):
    return sorted(window.activations[10] for window in windows if window.active)


def test_the_strongest_places_keep_their_distance_within_a_row():
    places = torch.tensor([12, 15, 40, 140, 141, 155])
    values = torch.tensor([9.0, 8.0, 1.0, 7.0, 6.0, 5.0])
    assert strongest(places, values, 128) == [12, 140, 155, 40]
    assert strongest(places, values, 141) == [12, 140, 141, 155, 40]
    many = torch.arange(0, 128 * 20, 128)
    assert strongest(many, many, 128) == many.tolist()[:-13:-1]


def test_a_latent_gets_15_windows_to_explain_and_14_to_score_4_of_them_active():
    rows, activation = planted()
    shown, scored = windows(activation, rows)
    assert (len(shown), len(scored), sum(window.active for window in scored)) == (15, 14, 4)
    peaks = [max(window.activations) for window in shown]
    assert peaks == sorted(peaks, reverse=True)

    text = rows.flatten().tolist()
    for window in shown + scored:                       # each is a stretch of one row
        start, = [i for i in range(len(text) - 20) if text[i:i + 21] == window.tokens]
        assert window.activations == activation[start:start + 21].tolist()
        assert start // 128 == (start + 20) // 128

    # Of the strongest twelve, two are scored; seven others are weaker
    column = torch.arange(rows.numel()) % 128
    places = ((activation > 0) & (column >= 10) & (column < 118)).nonzero().squeeze(1)
    top = sorted(activation[strongest(places, activation[places], 128)].tolist())
    assert middles(shown + scored)[7:] == top and middles(shown + scored)[0] > 0
    assert [value >= top[0] for value in middles(scored)] == [False, False, True, True]

    # Another latent has the same random windows
    _, others = windows(planted(seed=1)[1], rows)
    random = [[w.tokens for w in found if not w.active] for found in (scored, others)]
    assert sorted(random[0]) == sorted(random[1])


def test_weaker_windows_are_drawn_in_proportion_to_the_squared_activation():
    rows, activation = planted(latent_places=80)
    places = activation.nonzero().squeeze(1)
    activation[places[:20]] = 9 + torch.rand(20)        # enough for the strongest twelve
    activation[places[20:50]] = 1                       # 25 times the mass of a faint one
    activation[places[50:]] = 0.2
    drawn = []
    for seed in range(30):
        drawn += middles(sum(windows(activation, rows, seed), []))[:7]
    assert sum(value >= 1 for value in drawn) / len(drawn) > 0.9    # not squared: 0.8


def test_a_latent_fires_above_a_hundredth_of_its_largest_activation_and_needs_enough_windows():
    rows, activation = planted()
    faint = torch.where(activation == 0, 0.01 * activation.max(), activation)
    assert all(value == 0 or value >= 1 for window in sum(windows(faint, rows), [])
               for value in window.activations)
    places = activation.nonzero().squeeze(1)
    for kept in (11, 18):                               # too few strong ones, or too few weak ones
        few = activation.clone()
        few[places[kept:]] = 0
        assert windows(few, rows) is None


def test_an_oracle_scores_1_and_always_answering_none_scores_10_of_14():
    _, scored = windows(*reversed(planted()))
    oracle = [number for number, window in enumerate(scored, 1) if window.active]
    for picked, right in ((oracle, 14), (range(1, 15), 4), ([*oracle[:2], 99], 12), ([], 10)):
        assert autointerp.score(picked, scored) == pytest.approx(right / 14)


@pytest.mark.parametrize("answer, numbers", [
    ("1, 3 and 5.", [1, 3, 5]), ("None", []), ("None.", []), ("none", None), ("2", [2]),
    ("1,2,", [1, 2]), ("1, 2, and 4", [1, 2, 4]), ("", None), (" \n", None), ("²", None),
    ("I think 3", None), ("3; 4", None)])
def test_an_answer_is_numbers_or_none_or_unusable(answer, numbers):
    assert judges.read_numbers(answer) == numbers


@pytest.mark.parametrize("answer, explanation", [
    ('This neuron activates on the word "but".', 'the word "but"'), ("", ""),
    ("numbers", "numbers"), ("It activates on what activates on dots.", "dots")])
def test_an_explanation_is_what_follows_activates_on(answer, explanation):
    assert judges.read_explanation(answer) == explanation


class Letters:
    """Token i is the letter chr(i)."""

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))


def window_of(text, fires=""):
    return Window([*map(ord, text)], [float(letter in fires) for letter in text], True)


def test_a_language_model_predicts_from_nothing_but_its_explanation():
    questions, answers = [], ["This neuron activates on the letter x.", "2"]

    def ask(messages, max_tokens):
        questions.append((*(message["content"] for message in messages), max_tokens))
        return answers[len(questions) - 1]

    shown = [window_of("abx", "x"), window_of("x", "x")]
    scored = [window_of("q")] * 13 + [window_of("cx", "x")]
    verdict = judges.judge(Letters(), shown, scored, ask, np.random.default_rng(0))
    assert verdict == ("the letter x", [2])
    (_, explain, explain_tokens), (system, predict, predict_tokens) = questions
    assert (explain_tokens, predict_tokens) == (30, 33) and "14" in system
    assert "1. ab<<x>>\n2. <<x>>" in explain
    assert "fires on the letter x." in predict and "14. cx" in predict
    assert "<<" not in predict and "ab" not in predict


def test_a_window_is_one_line_even_if_a_character_has_several_tokens(raw_config, tmp_path):
    lines = window_of("ab\nxyc", "xy")
    assert judges.written(Letters(), lines, marked=True) == "ab↵<<xy>>c"
    assert judges.written(Letters(), lines, marked=False) == "ab↵xyc"

    write_tokenizer(tmp_path, raw_config, TEXT + "é€🙂")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    quiet, ids = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("a ", "a 🙂"))
    window = Window(ids, [0.0] * len(quiet) + [1.0] * (len(ids) - len(quiet)), True)
    assert judges.written(tokenizer, window, marked=True) == "a <<🙂>>" and len(ids) > 3


def politely(question):
    """Explains, then says None."""
    return "This neuron activates on words." if "<<" in question else "None"


def by_parity(question):
    """Explains, then picks the texts with an even number of letters."""
    texts = question.split("The texts:\n\n")[-1].splitlines()
    even = [number for number, text in enumerate(texts, 1) if len(text) % 2 == 0]
    return politely(question) if "<<" in question else ", ".join(map(str, even)) or "None"


@pytest.fixture
def judge(setting, monkeypatch):
    """judge(**options) evaluates with a chat model; judge.answer(question) gives its answers."""
    def chat(url, model, messages, max_tokens):
        evaluate.asked.append(messages)
        return evaluate.answer(messages[1]["content"])

    def evaluate(**options):
        evaluate.asked = []
        usual = {"judge": "http://here", "chat_model": "m", "judge_latents": 4, "latents": None,
                 "seeds": 1}
        return autointerp.evaluate(setting, **{**usual, **options})

    monkeypatch.setattr(autointerp, "chat", chat)
    evaluate.answer = politely
    return evaluate


def test_both_models_are_scored_and_paired_by_latent(judge):
    judge.answer = by_parity
    numbers = judge(judge_latents=12, seeds=2)
    latents, row = numbers["latents"], numbers["rows"]["score"]
    assert 2 <= len(latents) <= 12 and numbers["over"] == f"latents ({len(latents)})"
    double = dict(dtype=torch.float64)
    base, lora = (torch.tensor([sum(each["score"][who]) / 2 for each in latents], **double)
                  for who in ("base", "lora"))
    assert row["base"] == pytest.approx(interval(base)[0])
    difference = row["difference"], row["ci90"]
    assert difference == pytest.approx(interval(lora - base))
    assert row["difference"] != 0                       # adapters before the SAE matter
    assert any(len(set(each["score"]["base"])) == 2 for each in latents)    # seeds differ
    json.dumps(numbers, allow_nan=False)


@one_family
def test_a_chat_models_answers_are_kept_and_only_missing_ones_are_requested(setting, judge, capsys):
    whole = judge()
    total = len(judge.asked)
    assert whole["sets"] == ["m at http://here"] and "questions" in capsys.readouterr().err
    assert whole["rows"]["score"]["base"] == pytest.approx(10 / 14)
    assert all(row["explanation"]["base"] == "words" for row in whole["latents"])
    assert total > len(whole["latents"]) * 2
    assert judge() == whole and not judge.asked

    left = list(range(5))

    def busy(question):
        try:
            left.pop()
        except IndexError:
            raise InputError("401") from None
        return politely(question)

    for path in (setting.folder / "autointerp").iterdir():
        path.unlink()
    judge.answer = busy
    refuses("401", judge)
    judge.answer = politely
    assert judge() == whole and len(judge.asked) == total - 5


@one_family
def test_a_latent_whose_answer_names_no_windows_is_left_out_and_counted(judge):
    strange = ["I cannot say"]
    judge.answer = lambda text: strange.pop() if strange and "<<" not in text else politely(text)
    assert "and 1 got answers that name no windows" in judge()["left_out"]
    judge.answer = lambda text: ""
    refuses("nothing is left to score", judge, chat_model="other")


@one_family
def test_only_the_named_latents_are_judged(judge):
    all_of_them = judge(judge_latents=24)["latents"]
    some = [row["latent"] for row in all_of_them[:3]]
    assert judge(latents=some + some[:1])["latents"] == all_of_them[:3]
    alone = judge(latents=some[:1])
    assert alone["latents"] == all_of_them[:1] and "±" not in str(autointerp.tables(alone)[0].rows)


@one_family
def test_what_cannot_be_judged_is_refused_in_one_clear_line(setting, judge):
    for options, message in (
            ({"latents": [24]}, "0 to 23"), ({"latents": [-1]}, "0 to 23"),
            ({"judge_latents": 0}, "1 or more"),
            ({"judge": None}, "needs a language model as its judge: --judge http")):
        refuses(message, judge, **options)
        assert not judge.asked

    text = setting.text
    for chunks, message in ((text.held_out[:2], "--eval-tokens|too rarely"),
                            (text.held_out[:2, :20], "--context")):
        setting.text = SimpleNamespace(held_out=chunks, bos=text.bos, tokenizer=text.tokenizer)
        refuses(message, judge)


# ---- The judge's endpoint ------------------------------------------------------------------------

class Answering(Handler):
    """server.answer(body) returns a text, or (status, bytes), or None to hang up."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        answer = self.server.answer(body)
        if answer is None:                              # promises more than it sends
            self.reply(200, b"{", length=1000)
            self.connection.shutdown(socket.SHUT_RDWR)
        elif isinstance(answer, tuple):
            self.reply(*answer, Location=f"{self.server.url}/elsewhere")
        else:
            self.reply_json({"choices": [{"message": {"content": answer}}]})


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(chat_module, "WAITS", (0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(Answering) as server:
        yield server


@pytest.mark.parametrize("trouble", [(408, b""), (429, b""), (500, b"[]"), (503, b"{}"), None])
def test_a_busy_endpoint_is_retried_in_openais_format(endpoint, trouble, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    answers = iter([trouble, trouble, "hello"])
    endpoint.answer = lambda body: next(answers)
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    assert chat(endpoint.url + "/v1", **body) == "hello" and len(endpoint.requests) == 3
    assert endpoint.requests[-1] == ("/v1/chat/completions", "Bearer secret", body)


@pytest.mark.parametrize("trouble, said, asked", [
    ((429, b"slow down\nplease"), "429: slow down please", 3), ((500, b""), "500: Internal", 3),
    (None, "no answer: ", 3), ((401, b""), "401: Unauthorized", 1), ((302, b""), "302: Found", 1),
    ((404, b'{"error": {"message": "no such\\nmodel", "code": 7}}'), "404: no such model", 1),
    ((400, b'{"error": "bad"}'), '400: {"error": "bad"}', 1), ((200, b"[]"), "200: []", 1),
    ((200, b'{"error": {"message": "no credit"}}'), "200: no credit", 1),
    ((200, b"\xff"), "200: \ufffd", 1), ((400, b"<html>" * 999), "400: <html>", 1),
    ((200, b'{"choices": [{"message": {"content": [1]}}]}'), '200: {"choices"', 1)])
def test_an_endpoint_that_keeps_failing_is_quoted_in_one_line(endpoint, trouble, said, asked):
    endpoint.answer = lambda body: trouble
    with pytest.raises(InputError) as refused:
        chat(endpoint.url, "m", [], 5)
    line, address = str(refused.value), f"{endpoint.url}/chat/completions"
    assert line.startswith(f"{address} (m) gave no chat completion: {said}")
    assert "\n" not in line and len(line) < 450 and len(endpoint.requests) == asked


def test_only_http_addresses_are_endpoints_and_an_answer_may_be_empty(endpoint):
    for url, said in (("localhost:8000/v1", "http"), ("file:///etc/passwd", "http"), ("", "http"),
                      ("http://localhost:80a/v1", "not sent: nonnumeric port"),
                      ("http://127.0.0.1:9/v1", "no answer: .*refused")):
        refuses(said, chat, url, "m", [], 5)
    endpoint.answer = lambda body: (200, b'{"choices": [{"message": {"content": null}}]}')
    assert chat(endpoint.url, "m", [], 5) == ""


def test_a_question_is_asked_once_and_another_judges_answers_are_not_reused(tmp_path):
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
        refuses("latent_3.json", Kept, path, None, "m")
