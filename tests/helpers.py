"""Helpers that several tests share: SAEs, adapters, commands, metrics, local servers, text."""
import importlib
import json
import multiprocessing
import socket
import threading
from contextlib import contextmanager, suppress
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from conftest import TEXT, write_tokenizer
from lorasae.errors import InputError
from lorasae.io.files import read_json as read
from lorasae.io.shards import Text
from lorasae.lora import add_lora, adapters
from lorasae.sae import JumpReLU, TopK


# ---- Models --------------------------------------------------------------------------------------

def random_sae(kind, model, latents=None, k=8, threshold=0.5, std=None, seed=0, **how):
    """A frozen SAE with tied random weights, for a model or a width. Its latents fire."""
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
    """Gives adapters (a model's, or those that detach_lora returned) a random nonzero B."""
    torch.manual_seed(seed)
    for module in (model if isinstance(model, dict) else adapters(model)).values():
        torch.nn.init.normal_(module.lora_B.weight, std=std)
    return model


def adapted(model, blocks, rank=3, std=0.05, dropout=0.0, **how):
    """Adds adapters to `blocks` of the model and moves them off the identity."""
    torch.manual_seed(4)
    return moved(add_lora(model, blocks, rank, dropout=dropout, **how), std)


def some_tokens(model, B=2, T=40, seed=1):
    """Random tokens [B, T] with BOS in front, and an EOS in the first row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 97, (B, T), generator=generator)
    tokens[:, 0] = model.config.bos_token_id
    tokens[0, 7] = model.config.eos_token_id
    return tokens


def without_cache(model, tokens, count, saes):
    """Greedy decoding that runs the whole sequence again for every token."""
    for _ in range(count):
        best = model(tokens, saes)[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, best], 1)
    return tokens


def same_tensors(found, expected, tolerance=1e-3):
    """Checks that each pair differs by at most `tolerance` of its norm, or that both are None."""
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= tolerance * b.norm() + 1e-7


# ---- Commands ------------------------------------------------------------------------------------

def command(script, *words):
    """Runs a module's main() in this process: command("train", "--rank", 4)."""
    importlib.import_module(script).main([str(word) for word in words])


def refusal(script, *words):
    """The one-line error that ends a command, without its `error: `."""
    with pytest.raises(SystemExit) as stopped:
        command(script, *words)
    line = stopped.value.code
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line, line
    return line.removeprefix("error: ")


def lines(texts, field="text"):
    """The bytes of a JSON-lines file with these documents."""
    rows = [{"meta": {"n": i}, field: text} for i, text in enumerate(texts)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def metrics(folder):
    """The lines of a run's metrics.jsonl, without the values that depend on the machine."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        line.pop("seconds", None), line.pop("tokens_per_second", None)
    return lines


def counted(module, name):
    """A context manager: a mock that calls the function it replaces and counts in .call_count."""
    return mock.patch.object(module, name, autospec=True, side_effect=getattr(module, name))


@contextmanager
def one_line(message=None, kind=InputError):
    """Expects the `with` block to raise a matching one-line error of this kind, kept in .value."""
    with pytest.raises(kind, match=message) as error:
        yield error
    assert "\n" not in str(error.value)


def refuses(message, function, *arguments, **how):
    """Checks that the call raises an InputError of one line that matches."""
    with one_line(message):
        function(*arguments, **how)


def transformers_model(folder, **how):
    """The oracle: the model in a folder, loaded by transformers with eager attention."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    make = transformers.AutoModelForCausalLM.from_pretrained
    return make(folder, attn_implementation="eager", **how)


def misuse(capsys, script, *words):
    """The one-line error with which a command rejects options that it cannot parse (status 2)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command(script, *words)
    shown = capsys.readouterr()
    line, = shown.err.splitlines()
    assert stopped.value.code == 2 and shown.out == ""
    assert line.startswith("error: ") and line.endswith("(--help lists the options)")
    return line.removeprefix("error: ")


# ---- Runs ----------------------------------------------------------------------------------------

AROUND = ["--sae", "SITE/MODEL/sae", "--dropout", 0.1, "--lr", 1e-3]
KINDS = {                                               # kinds of runs, and their options
    "lora": [*AROUND, "--rank", 4],
    "several": [*AROUND, "--rank", 1, 4, 16],
    "both": [*AROUND, "--rank", 4, "--train-sae", "--sae-lr", 1e-3],
    "finetune": ["--method", "finetune", "--sae", "SITE/MODEL/sae", "--lr", 1e-3],
    "topk": ["--method", "topk", "--width", 96, "--k", 8, "--lr", 1e-3],
    "jumprelu": ["--method", "jumprelu", "--width", 96, "--l0", 8, "--lr", 1e-3],
    "e2e": ["--method", "e2e", "--width", 96, "--k", 8, "--lr", 1e-3],
}


def words(site, kind="lora", *more, model="gemma2"):
    """The arguments of a short run: 20 steps of 2 x 32 tokens with an SAE at block 1."""
    common = ["--model", "SITE/MODEL", "--layer", 1, "--data", "SITE/text", "--context", 32,
              "--tokens", 1280, "--eval-tokens", 256, "--batch-size", 2, "--dtype", "float32",
              "--device", "cpu", "--checkpoint-every", 8]
    found = [str(word) for word in (*common, *KINDS[kind], *more)]
    return [word.replace("SITE", str(site)).replace("MODEL", model) for word in found]


def products(folder):
    """{path: bytes} of the files that a run made: adapters, SAEs and their descriptions."""
    paths = [path for path in sorted(folder.rglob("*"))
             if path.parent.name.startswith(("adapter", "sae")) and path.name != "training.json"]
    assert paths
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@contextmanager
def stopped_at(step):
    """Interrupts the `with` block's run (Ctrl-C) in the middle of a step and checks its message."""
    from lorasae.runs.folder import Run
    log = Run.log

    def stop(self, number, values):
        if number == step:
            raise KeyboardInterrupt
        log(self, number, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", stop)
        goes_on = r"interrupted: python train.py --resume \S+ continues at step \d"
        with pytest.raises(SystemExit, match=goes_on):
            yield


COSTS = ("seconds", "tokens_per_second", "peak_memory_bytes")       # what differs from run to run


def without_costs(nest):
    """The numbers of a results.json, without the run's time and memory."""
    if not isinstance(nest, dict):
        return nest
    return {name: without_costs(value) for name, value in nest.items() if name not in COSTS}


def same_run(folder, other):
    """Checks that two runs have bitwise the same products, metrics and results."""
    assert products(folder) == products(other)
    assert metrics(folder) == metrics(other)
    found, expected = (without_costs(read(run / "results.json")) for run in (folder, other))
    assert found == expected
    assert not list(folder.rglob("*.part"))


def processes():
    """A context whose processes start in milliseconds, with torch and train.py already imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "helpers", "torch.distributed.tensor"])
    return context


# ---- Servers -------------------------------------------------------------------------------------

class Handler(BaseHTTPRequestHandler):
    """Answers with reply, reply_json or refuse; `self.server` is the Server."""
    protocol_version, wbufsize = "HTTP/1.1", -1         # headers and body are sent together

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
    """A local server that runs until `stop` or its `with` ends; .url, .requests, .sent (bytes)."""

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests, self.sent, self.connections = [], 0, []
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def handle_error(self, request, client_address):
        pass                                            # a client that hangs up is not an error

    def process_request(self, request, client_address):
        self.connections.append(request)
        super().process_request(request, client_address)

    def stop(self):
        self.shutdown()
        self.server_close()
        for connection in self.connections:             # or kept-alive clients still get answers
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.thread.join()

    def __exit__(self, *_):
        self.stop()


class Hub(Server):
    """Answers huggingface_hub as the Hub does: listings, metadata, files of models and datasets.

    models, datasets: {OWNER/NAME: {path: bytes}}. refused: {OWNER/NAME: (status, error code)}, the
    answer to requests for its files. down: answer 503 to everything. requests: "GET path" and "HEAD
    path". faults: what happens to the next requests for a part of a dataset's file, in order:
    "drop" closes the connection halfway, "busy" answers 503, and None answers normally.
    """
    commit = "c" * 40

    def __init__(self):
        self.models, self.datasets, self.refused, self.faults = {}, {}, {}, []
        self.down = False
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
        if self.server.down:
            self.reply(503)
        elif files is None:
            self.refuse(401, "RepoNotFound")
        elif api and rest[:1] == ["tree"]:
            self.tree(files, "/".join(rest[2:]), "recursive=true" in self.path.lower())
        elif api:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            self.reply_json({"id": repo, "sha": self.server.commit, "siblings": siblings})
        elif rest[0] == "resolve" and repo in self.server.refused:
            status, code = self.server.refused[repo]
            self.refuse(status, code, X_Repo_Commit=self.server.commit)
        elif not is_dataset:
            self.file(files.get("/".join(rest[2:])))
        elif rest[0] == "resolve":                      # the Hub redirects to its files
            self.reply(302, Location=self.path.replace("/resolve/", "/stored/"))
        else:
            self.part(files["/".join(rest[2:])])

    do_HEAD = do_GET

    def tree(self, files, folder, recursive):
        inside = [path for path in files if path.startswith(folder + "/" if folder else "")]
        if not inside:
            return self.refuse(404, "EntryNotFound")
        entries, above = {}, len(Path(folder).parts)
        for path in map(Path, inside):
            for depth in range(above + 1, len(path.parts) + 1 if recursive else above + 2):
                name = "/".join(path.parts[:depth])
                kind, data = ("file", files[name]) if name in files else ("directory", b"")
                entries[name] = {"type": kind, "size": len(data), "path": name,
                                 "oid": sha1(data).hexdigest()}
        self.reply_json(list(entries.values()))

    def file(self, data):
        if data is None:
            return self.refuse(404, "EntryNotFound", X_Repo_Commit=self.server.commit)
        etag = f'"{sha256(data).hexdigest()}"'
        self.reply(200, data, ETag=etag, X_Repo_Commit=self.server.commit)

    def part(self, data):
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        fault = self.server.faults.pop(0) if self.server.faults else None
        body = data[first:last + 1]
        headers = {"Content_Range": f"bytes {first}-{first + len(body) - 1}/{len(data)}"}
        if fault == "busy":
            self.reply(503)
        elif fault == "drop":
            self.reply(206, body[:len(body) // 2], length=len(body), **headers)
            self.close_connection = True
        else:
            self.reply(206, body, **headers)


# ---- Tensors that claim to be on CUDA ------------------------------------------------------------

class OnCuda(torch.Tensor):
    """is_cuda is True. Emulates what only CUDA can do, and fails at what CUDA cannot do."""
    is_cuda = True

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.mm and "out_dtype" in kwargs:
            dtype = kwargs["out_dtype"]
            assert args[0].dtype == args[1].dtype == torch.bfloat16 and dtype == torch.float32
            function, args, kwargs = torch.matmul, [matrix.to(dtype) for matrix in args], {}
        if "embedding_bag_per_sample_weights_backward" in str(function):
            assert args[0].dtype != torch.bfloat16, "not implemented for 'BFloat16'"
        return super().__torch_function__(function, types, args, kwargs)


def on_cuda(tensor):
    return tensor.detach().as_subclass(OnCuda)


# ---- Text ----------------------------------------------------------------------------------------

def toy_text(folder, raw, words, characters, eval_tokens):
    """The Text of 40 files of lines `word = word`, with a tokenizer for these characters."""
    source = folder / "text"
    source.mkdir()
    generator = np.random.default_rng(0)
    for i in range(40):
        drawn = generator.choice(words, 150)
        lines = [f"{a} = {b}\n" for a, b in zip(drawn, drawn[::-1])]
        (source / f"{i}.txt").write_text("".join(lines))
    write_tokenizer(folder, raw, f"{TEXT}{characters} = \n")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with Text(str(source), tokenizer, raw["bos_token_id"], raw["eos_token_id"], context=64,
              eval_tokens=eval_tokens) as text:
        return text
