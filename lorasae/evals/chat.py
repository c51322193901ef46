"""A language model behind an OpenAI-compatible endpoint: all that any evaluation asks of the outside.

    ask = partial(chat, "http://localhost:8000/v1", "my-model")     # OPENAI_API_KEY holds the key, if it takes one
    answer = ask([{"role": "user", "content": "..."}], max_tokens=100)
    ask = Kept(path, ask, name="my-model at ...")                  # what it has answered before is read from the file
"""
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from hashlib import blake2b
from pathlib import Path

from lorasae.errors import InputError
from lorasae.io.files import read_json, write_json

WAITS = (2, 4, 8, 16, 32)                   # seconds before a busy or failing server is asked again
TIMEOUT = 300                                           # seconds without a byte from it


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the endpoint that was named, never to where that sends us."""

    def redirect_request(self, *_):
        return None


def chat(url, model, messages, max_tokens, temperature=0.8):
    """The answer to messages ({role, content} each) as text. Raises InputError where the endpoint gives none.

    temperature None leaves it to the endpoint.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url} is not the address of an OpenAI-compatible endpoint: expected http(s)://HOST/v1")
    body = {"model": model, "messages": messages, "max_tokens": max_tokens}
    if temperature is not None:
        body["temperature"] = temperature
    headers = {"Content-Type": "application/json"}
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(NoRedirect)

    for wait in (*WAITS, None):
        try:
            with opener.open(request, timeout=TIMEOUT) as reply:
                return text_of(json.load(reply))
        except urllib.error.HTTPError as error:
            problem, again = f"{error.code} {error.reason}", error.code == 429 or error.code >= 500
        except (OSError, http.client.HTTPException) as error:           # refused, unreachable, timed out, cut off
            problem, again = str(error), True
        except (ValueError, LookupError, TypeError):
            problem, again = "its answer is not a chat completion", False
        if not again or wait is None:
            raise InputError(f"{request.full_url} ({model}): {problem}; is this an OpenAI-compatible endpoint, and is "
                             "OPENAI_API_KEY set where it wants a key?")
        time.sleep(wait)


def text_of(completion):
    """The text in an endpoint's reply; "" where the model said nothing."""
    content = completion["choices"][0]["message"]["content"] or ""
    if not isinstance(content, str):
        raise TypeError
    return content


class Kept:
    """ask(messages, max_tokens), each answer of which is kept in the JSON file `path`: the same question is asked once.

    name: who answers, part of what makes a question the same. An answer is on disk before it is used, so that a run
    that is killed and started again asks only what it had not asked. For one thread at a time.
    """

    def __init__(self, path, ask, name):
        self.path, self.ask, self.name = Path(path), ask, name
        self.answers = read_json(path) if self.path.exists() else {}
        if not isinstance(self.answers, dict):
            raise InputError(f"{path} does not hold a judge's answers: move it away, and they are asked for again")

    def __call__(self, messages, max_tokens):
        question = json.dumps([self.name, messages, max_tokens])
        key = blake2b(question.encode(), digest_size=16).hexdigest()
        if key not in self.answers:
            self.answers[key] = self.ask(messages, max_tokens=max_tokens)
            write_json(self.path, self.answers)
        return self.answers[key]
