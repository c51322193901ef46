"""A language model behind an OpenAI-compatible endpoint: all that any evaluation asks of the outside.

    ask = partial(chat, "http://localhost:8000/v1", "my-model")     # OPENAI_API_KEY holds the key, if it takes one
    answer = ask([{"role": "user", "content": "..."}], max_tokens=100)
"""
import http.client
import json
import os
import time
import urllib.error
import urllib.request

from lorasae.errors import InputError

WAITS = (2, 4, 8, 16, 32)                               # seconds before a busy or failing server is asked again


def chat(url, model, messages, max_tokens, temperature=0.8):
    """The answer to messages ({role, content} each) as text. Raises InputError where the endpoint gives none."""
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}
    headers = {"Content-Type": "application/json"}
    if os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
    for wait in (*WAITS, None):
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                return json.load(reply)["choices"][0]["message"]["content"] or ""
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
