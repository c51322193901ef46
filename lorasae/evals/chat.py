"""A language model behind an OpenAI-compatible endpoint.

    ask = partial(chat, "http://localhost:8000/v1", "my-model")     # the key: $OPENAI_API_KEY
    answer = ask([{"role": "user", "content": "..."}], max_tokens=100)
    ask = Kept(path, ask, name="my-model at ...")       # asks only if the file has no answer

(huggingface_hub's http_backoff would not do: it refuses even a local endpoint if HF_HUB_OFFLINE is
set, and closes every thread's connections if one of them fails.)
"""
import http.client
import json
import os
import time
from contextlib import suppress
from urllib.request import HTTPErrorProcessor, Request, build_opener

from lorasae.errors import InputError
from lorasae.io.files import read_object, write_json

NO_ANSWER = "no answer"                                 # refused, timed out or cut off
BUSY = (NO_ANSWER, 408, 429, 500, 502, 503, 504)        # after these, a retry may help
WAITS = (2, 4, 8, 16, 32)                               # seconds before each retry
TIMEOUT = 300                                           # seconds without a byte


class AsItIs(HTTPErrorProcessor):
    """Returns redirects and errors as answers, so the key goes only to the named endpoint."""

    def http_response(self, request, response):
        return response

    https_response = http_response


def chat(url, model, messages, max_tokens):
    """The answer to messages [{role, content}] as text. InputError if the endpoint gives none."""
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url} is not an OpenAI-compatible endpoint: expected http(s)://HOST/v1")
    address = f"{url.rstrip('/')}/chat/completions"
    body = {"model": model, "messages": messages, "max_tokens": max_tokens}
    headers = {"Content-Type": "application/json"}
    key = "".join(os.environ.get("OPENAI_API_KEY", "").split())
    if key:
        headers["Authorization"] = f"Bearer {key}"

    for wait in (0, *WAITS):
        time.sleep(wait)
        status, answer = post(address, json.dumps(body).encode(), headers)
        if status not in BUSY:
            break

    try:
        text = json.loads(answer)["choices"][0]["message"]["content"] or ""
    except (ValueError, LookupError, TypeError):
        text = None
    if status != 200 or not isinstance(text, str):
        raise InputError(f"{address} ({model}) gave no chat completion: {status}: "
                         f"{own_words(answer)}")
    return text


def post(address, body, headers):
    """(status, text) of the answer to a request."""
    try:
        with build_opener(AsItIs).open(Request(address, body, headers), timeout=TIMEOUT) as reply:
            return reply.status, reply.read().decode(errors="replace") or reply.reason
    except (ValueError, http.client.InvalidURL) as error:               # a malformed address
        return "not sent", str(error)
    except (OSError, http.client.HTTPException) as error:
        return NO_ANSWER, str(error)


def own_words(answer):
    """An endpoint's error message: its error.message, or the beginning of its answer."""
    with suppress(ValueError, LookupError, TypeError):
        answer = str(json.loads(answer)["error"]["message"])
    return " ".join(answer.split())[:300]


class Kept:
    """Wraps ask(messages, max_tokens) and keeps its answers in the JSON file `path`.

    name: who answers. Each name is asked each question only once, even by later runs: an answer is
    on disk before it is used. Only one thread at a time may call it.
    """

    def __init__(self, path, ask, name):
        self.path, self.ask, self.name = path, ask, name
        self.answers = read_object(path) if path.exists() else {}

    def __call__(self, messages, max_tokens):
        question = json.dumps([self.name, messages, max_tokens])
        if question not in self.answers:
            self.answers[question] = self.ask(messages, max_tokens=max_tokens)
            write_json(self.path, self.answers)
        return self.answers[question]
