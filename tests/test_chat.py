"""An OpenAI-compatible endpoint: what is asked, asked again, kept, and said when it fails."""
import json
import socket

import pytest

from helpers import Handler, Server, refuses
from lorasae.errors import InputError
from lorasae.evals import chat as chat_module
from lorasae.evals.chat import Kept, chat


class Answering(Handler):
    """server.answer(body) is a text, (status, bytes), or None: it hangs up."""

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
def test_a_busy_endpoint_is_asked_again_in_openais_format(endpoint, trouble, monkeypatch):
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
def test_an_endpoint_that_stays_wrong_is_quoted_in_one_line(endpoint, trouble, said, asked):
    endpoint.answer = lambda body: trouble
    with pytest.raises(InputError) as refused:
        chat(endpoint.url, "m", [], 5)
    line, address = str(refused.value), f"{endpoint.url}/chat/completions"
    assert line.startswith(f"{address} (m) gave no chat completion: {said}")
    assert "\n" not in line and len(line) < 450 and len(endpoint.requests) == asked


def test_only_http_addresses_are_endpoints_and_a_model_may_say_nothing(endpoint):
    for url, said in (("localhost:8000/v1", "http"), ("file:///etc/passwd", "http"), ("", "http"),
                      ("http://127.0.0.1:9/v1", "no answer: .*refused")):
        refuses(said, chat, url, "m", [], 5)
    endpoint.answer = lambda body: (200, b'{"choices": [{"message": {"content": null}}]}')
    assert chat(endpoint.url, "m", [], 5) == ""


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
        refuses("latent_3.json", Kept, path, None, "m")
