"""A language model behind an OpenAI-compatible endpoint.

    ask = partial(chat, "http://localhost:8000/v1", "my-model")     # the key: $OPENAI_API_KEY
    answer = ask([{"role": "user", "content": "..."}], max_tokens=100)
    ask = Kept(path, ask, name="my-model at ...")       # asks only what the file does not answer

(huggingface_hub's http_backoff refuses even a local endpoint if HF_HUB_OFFLINE is set, and closes
the connections of all threads if that of one fails.)
"""
import http.client
import json
import os
import time
from hashlib import blake2b
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from lorasae.errors import InputError
from lorasae.io.files import read_json, write_json

BUSY = (408, 429, 500, 502, 503, 504)                   # statuses after which asking again may help
WAITS = (2, 4, 8, 16, 32)                               # seconds before it does
TIMEOUT = 300                                           # seconds without a byte


class NoRedirect(HTTPRedirectHandler):
    """The key goes only to the endpoint that was named."""

    def redirect_request(self, *_):
        return None


def chat(url, model, messages, max_tokens):
    """The answer to messages [{role, content}] as text. InputError if the endpoint gives none."""
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url} is not an OpenAI-compatible endpoint: expected http(s)://HOST/v1")
    address = f"{url.rstrip('/')}/chat/completions"
    body = {"model": model, "messages": messages, "max_tokens": max_tokens}
    headers = {"Content-Type": "application/json"}
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = Request(address, json.dumps(body).encode(), headers)

    for wait in (*WAITS, None):
        try:
            status, answer = post(request)
        except (OSError, http.client.HTTPException) as error:   # refused, timed out, cut off
            status, answer = "no answer", str(error).encode()
        if status == 200:
            return text_of(answer, address)
        if wait is None or status not in ("no answer", *BUSY):
            raise InputError(f"{address} ({model}): {status}: {own_words(answer)}")
        time.sleep(wait)


def post(request):
    """(status, body) of the answer to a request."""
    try:
        with build_opener(NoRedirect).open(request, timeout=TIMEOUT) as reply:
            return reply.status, reply.read()
    except HTTPError as error:
        return error.code, error.read() or error.reason.encode()


def text_of(answer, address):
    """The text in a chat completion; "" if the model said nothing."""
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"] or ""
    except (ValueError, LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        raise InputError(f"{address}: its answer is not a chat completion: is this an "
                         "OpenAI-compatible endpoint?")
    return content


def own_words(answer):
    """What an endpoint says of an error: its error.message, or the first line of the answer."""
    try:
        return json.loads(answer)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return answer.decode(errors="replace").strip().partition("\n")[0][:200]


class Kept:
    """ask(messages, max_tokens), whose answers are kept in the JSON file `path`.

    name: who answers. The same question to the same name is asked only once, also by a later run:
    an answer is on disk before it is used. For one thread at a time.
    """

    def __init__(self, path, ask, name):
        self.path, self.ask, self.name = Path(path), ask, name
        self.answers = read_json(path) if self.path.exists() else {}
        if not isinstance(self.answers, dict):
            raise InputError(f"{path} does not hold a judge's answers: move it away, and they are "
                             "asked for again")

    def __call__(self, messages, max_tokens):
        question = json.dumps([self.name, messages, max_tokens])
        key = blake2b(question.encode(), digest_size=16).hexdigest()
        if key not in self.answers:
            self.answers[key] = self.ask(messages, max_tokens=max_tokens)
            write_json(self.path, self.answers)
        return self.answers[key]
