"""What several tests need: random SAEs, adapters that are not the identity, the commands, metrics, and servers on this computer."""
import importlib
import io
import json
import sys
import socket
import threading
from contextlib import contextmanager, suppress
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save

from conftest import GEMMA, TEXT, random_weights, write_tokenizer
from lorasae.lora import add_lora, adapters
from lorasae.sae import JumpReLU, TopK


# ---- Models ----------------------------------------------------------------------------------------------------------

def random_sae(kind, model, latents=None, k=8, threshold=0.5, std=None, seed=0, **how):
    """A frozen "topk" or "jumprelu" with tied random weights, for a model or for a width; it reconstructs badly, and fires."""
    D = model if isinstance(model, int) else model.config.hidden_size
    latents = latents or 4 * D
    torch.manual_seed(seed)
    sae = TopK(D, latents, k, **how) if kind == "topk" else JumpReLU(D, latents, **how)
    torch.nn.init.normal_(sae.W_enc, std=std or D ** -0.5)
    sae.W_dec.data = sae.W_enc.data.clone()
    if kind == "jumprelu":
        sae.threshold.data.fill_(threshold)
    return sae.requires_grad_(False)


def moved(model, std=0.05, seed=5):
    """Moves the adapters (of a model, or what detach_lora returned) off the identity that they start as."""
    torch.manual_seed(seed)
    for module in (model if isinstance(model, dict) else adapters(model)).values():
        torch.nn.init.normal_(module.lora_B.weight, std=std)
    return model


def adapted(model, blocks, rank=3, std=0.05, dropout=0.0, **how):
    """The model with adapters on `blocks` that are not the identity."""
    return moved(add_lora(model, blocks, rank, dropout=dropout, **how), std)


# ---- Commands --------------------------------------------------------------------------------------------------------

def command(script, *words):
    """Runs a script's or a module's main() in this process: command("train", "--model", folder, "--rank", 4)."""
    importlib.import_module(script).main([str(word) for word in words])


def refusal(script, *words):
    """The one line with which a command refuses, without its `error: `."""
    with pytest.raises(SystemExit) as stopped:
        command(script, *words)
    line = stopped.value.code
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line, line
    return line.removeprefix("error: ")


def lines(texts, field="text"):
    """A JSON-lines file of documents."""
    return "".join(json.dumps({"meta": {"n": i}, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def zstd_compress(data):
    if sys.version_info >= (3, 14):
        from compression import zstd
        return zstd.compress(data)
    return pytest.importorskip("zstandard", reason=".zst needs zstandard before Python 3.14").compress(data)


def read(path):
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def metrics(folder):
    """The lines of a run's metrics.jsonl, without what differs from one machine to the next."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "tokens_per_second")} for line in lines]


@contextmanager
def interrupted_after(count, module, name):
    """Inside the `with`, a function of a module is interrupted (Ctrl-C) when it is called once more than `count` times."""
    real, calls = getattr(module, name), []

    def interrupted(*args):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, interrupted)
        yield


@contextmanager
def counted(module, name):
    """Inside the `with`, [an entry a call of a function of a module]."""
    real, calls = getattr(module, name), []

    def counting(*args):
        calls.append(1)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, counting)
        yield calls


def misuse(capsys, script, *words):
    """The one line with which a command refuses words that it cannot read, without its `error: `; its status is 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command(script, *words)
    shown = capsys.readouterr()
    line, = shown.err.splitlines()
    assert stopped.value.code == 2 and shown.out == "" and line.startswith("error: ") and line.endswith("(--help lists the options)")
    return line.removeprefix("error: ")


# ---- Servers ---------------------------------------------------------------------------------------------------------

class Handler(BaseHTTPRequestHandler):
    """Answers with reply, reply_json or refuse; `self.server` is the Server."""
    protocol_version, wbufsize = "HTTP/1.1", -1         # headers and body leave together

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", length=None, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.server.sent += len(body)

    def reply_json(self, value):
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status, code, **headers):
        self.reply(status, b"{}", X_Error_Code=code, X_Error_Message=f"no: {code}", **headers)


class Server(ThreadingHTTPServer):
    """A server on this computer, from its making to `stop` or the end of its `with`; `.url`, `.requests` so far, `.sent` bytes."""

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests, self.sent, self.connections = [], 0, []
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def handle_error(self, request, client_address):
        pass                                            # a client that hangs up is none

    def process_request(self, request, client_address):
        self.connections.append(request)
        super().process_request(request, client_address)

    def stop(self):
        self.shutdown()
        self.server_close()
        for connection in self.connections:             # those that are kept alive would be answered still
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.thread.join()

    def __exit__(self, *_):
        self.stop()


class Hub(Server):
    """Speaks what huggingface_hub asks of the Hub: listings, metadata, models' files, datasets' files by Range.

    models, datasets: {OWNER/NAME: {path: bytes}}. refused: {OWNER/NAME: (status, error code)}, to who wants a file. requests:
    "GET path" and "HEAD path"; ranges: where each request for a part of a dataset's file began. faults: what befalls the next of
    these, first to last: "drop" closes the connection halfway, "cut" sends half a body as if it were whole, "whole" ignores
    Range, "busy" answers 503, None is as it should be.
    """
    commit = "c" * 40

    def __init__(self):
        self.models, self.datasets, self.refused, self.faults, self.ranges = {}, {}, {}, [], []
        super().__init__(HubHandler)


class HubHandler(Handler):
    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        parts = path.split("/")
        api = parts[:1] == ["api"]
        parts = parts[api:]
        is_dataset = parts[:1] == ["datasets"]
        if is_dataset or api:
            parts = parts[1:]                           # "datasets" or "models"
        repo, rest = "/".join(parts[:2]), parts[2:]
        files = (self.server.datasets if is_dataset else self.server.models).get(repo)
        if files is None:
            self.refuse(401, "RepoNotFound")
        elif api and rest[:1] == ["tree"]:
            self.tree(files, "/".join(rest[2:]), "recursive=true" in self.path.lower())
        elif api:
            self.reply_json({"id": repo, "sha": self.server.commit, "siblings": [{"rfilename": name} for name in files]})
        elif rest[0] == "resolve" and repo in self.server.refused:
            status, code = self.server.refused[repo]
            self.refuse(status, code, X_Repo_Commit=self.server.commit)
        elif not is_dataset:
            self.file(files.get("/".join(rest[2:])))
        elif rest[0] == "resolve":                      # the Hub sends the client on to where its files lie
            self.reply(302, Location=self.path.replace("/resolve/", "/stored/"))
        else:
            self.part(files["/".join(rest[2:])])

    do_HEAD = do_GET

    def tree(self, files, folder, recursive):
        inside = [path for path in files if path.startswith(folder + "/" if folder else "")]
        if not inside:
            return self.refuse(404, "EntryNotFound")
        entries = {}
        for path in inside:
            tail = path[len(folder) + 1 if folder else 0:].split("/")
            for depth in range(1, len(tail) + 1 if recursive else 2):
                name = "/".join(([folder] if folder else []) + tail[:depth])
                kind, size = ("file", len(files[path])) if depth == len(tail) else ("directory", 0)
                entries[name] = {"type": kind, "size": size, "path": name, "oid": sha1(files.get(path, b"")).hexdigest()}
        self.reply_json(list(entries.values()))

    def file(self, data):
        if data is None:
            return self.refuse(404, "EntryNotFound", X_Repo_Commit=self.server.commit)
        self.reply(200, data, ETag=f'"{sha256(data).hexdigest()}"', X_Repo_Commit=self.server.commit)

    def part(self, data):
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.server.ranges.append(first)
        fault = self.server.faults.pop(0) if self.server.faults else None
        body = data[first:last + 1]
        headers = {"Content_Range": f"bytes {first}-{first + len(body) - 1}/{len(data)}"}
        if fault == "busy":
            self.reply(503)
        elif fault == "whole":
            self.reply(200, data)
        elif fault == "cut":
            self.reply(206, body[:len(body) // 2], **headers)
        elif fault == "drop":
            self.reply(206, body[:len(body) // 2], length=len(body), **headers)
            self.close_connection = True
        else:
            self.reply(206, body, **headers)


def use_hub(monkeypatch, server, folder):
    """Points huggingface_hub, in this process, at a Hub of ours, with an empty cache in `folder` and nobody logged in."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


# ---- Gemma-2-2B and its SAEs, but small ------------------------------------------------------------------------------

GEMMA_2B = {**GEMMA, "num_hidden_layers": 26, "hidden_size": 32, "intermediate_size": 48, "sliding_window": 4096,
            "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def gemma_2b_files(folder):
    """The files of a Gemma-2-2B repository: three shards behind an index."""
    tensors = random_weights(GEMMA_2B, scale=0.05)
    shards, names = [{}, {}, {}], [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for i, name in enumerate(sorted(tensors)):
        shards[i % 3][name] = tensors[name].bfloat16()
    write_tokenizer(folder, GEMMA_2B, TEXT)
    index = {"metadata": {"total_size": 1}, "weight_map": {key: name for name, shard in zip(names, shards) for key in shard}}
    return {"config.json": json.dumps(GEMMA_2B).encode(), "tokenizer.json": (folder / "tokenizer.json").read_bytes(),
            "model.safetensors.index.json": json.dumps(index).encode(), "README.md": b"# Gemma 2",
            **{name: save(shard, {"format": "pt"}) for name, shard in zip(names, shards)}}


def gemma_scope_files(D, M=64):
    """The repository's layout; the SAE of layer 12, width 16k, L0 82 is a random JumpReLU that fires."""
    rng, files = np.random.default_rng(0), {}
    for l0 in (22, 41, 82, 176, 445):
        W, buffer = rng.normal(size=(M, D)).astype("f") / D ** 0.5, io.BytesIO()
        np.savez(buffer, W_enc=W.T, W_dec=W, b_enc=np.zeros(M, "f"), b_dec=np.zeros(D, "f"), threshold=np.full(M, 0.1, "f"))
        files[f"layer_12/width_16k/average_l0_{l0}/params.npz"] = buffer.getvalue()
    return files


class Endpoint(Server):
    """A chat model that gives `answers` in turn (a string, or an error's status), then repeats the last.

    requests: (path, Authorization, body) of each.
    """

    def __init__(self, *answers):
        self.answers = list(answers)
        super().__init__(EndpointHandler)
        self.url += "/v1"


class EndpointHandler(Handler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, int):
            self.reply(answer)
        else:
            self.reply(200, answer.encode())
