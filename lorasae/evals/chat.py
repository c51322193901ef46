"""A language model behind an OpenAI-compatible endpoint.

    ask = partial(chat, "http://localhost:8000/v1", "my-model")     # the key: $OPENAI_API_KEY
    answer = ask([{"role": "user", "content": "..."}], max_tokens=100)
    ask = Kept(path, ask, name="my-model at ...")       # asks only what the file does not answer

(huggingface_hub's http_backoff refuses even a local endpoint if HF_HUB_OFFLINE is set, and closes
the connections of all threads if that of one fails.)
"""
import json
import os
import time
from pathlib import Path

import httpx                                            # huggingface_hub brings it

from lorasae.errors import InputError
from lorasae.io.files import read_object, write_json

NO_ANSWER = "no answer"                                 # refused, timed out, cut off
BUSY = (NO_ANSWER, 408, 429, 500, 502, 503, 504)        # after these, asking again may help
WAITS = (2, 4, 8, 16, 32)                               # seconds before it does
TIMEOUT = 300                                           # seconds without a byte


def chat(url, model, messages, max_tokens):
    """The answer to messages [{role, content}] as text. InputError if the endpoint gives none."""
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url} is not an OpenAI-compatible endpoint: expected http(s)://HOST/v1")
    address = f"{url.rstrip('/')}/chat/completions"
    body = {"model": model, "messages": messages, "max_tokens": max_tokens}
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    # A redirect is an answer: the key goes only to the endpoint that was named
    for wait in (0, *WAITS):
        time.sleep(wait)
        try:
            reply = httpx.post(address, json=body, headers=headers, timeout=TIMEOUT)
            status, answer = reply.status_code, reply.text or reply.reason_phrase
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            status, answer = NO_ANSWER, str(error)
        if status not in BUSY:
            break

    try:
        text = json.loads(answer)["choices"][0]["message"]["content"] or ""
    except (ValueError, LookupError, TypeError):
        text = None
    if status != 200 or not isinstance(text, str):
        raise InputError(f"{address} ({model}) gave no chat completion: {status}: "
                         f"{' '.join(answer.split())[:300]}")
    return text


class Kept:
    """ask(messages, max_tokens), whose answers are kept in the JSON file `path`.

    name: who answers. The same question to the same name is asked only once, also by a later run:
    an answer is on disk before it is used. For one thread at a time.
    """

    def __init__(self, path, ask, name):
        self.path, self.ask, self.name = Path(path), ask, name
        self.answers = read_object(path) if self.path.exists() else {}

    def __call__(self, messages, max_tokens):
        question = json.dumps([self.name, messages, max_tokens])
        if question not in self.answers:
            self.answers[question] = self.ask(messages, max_tokens=max_tokens)
            write_json(self.path, self.answers)
        return self.answers[question]
