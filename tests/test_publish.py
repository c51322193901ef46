"""Publishing to a fake Hub, tracking with a fake trackio, and the table of presets."""
import json
import re
import shutil
import sys
from base64 import b64decode
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, snapshot_download

import lorasae
from helpers import KINDS, HubHandler, command, misuse, read, refusal, stopped_at, words
from lorasae.io.presets import PRESETS
from lorasae.runs.tracking import tracked

BASE, SAE = ["--model", "me/base"], ["--sae", "me/sae"]
SCRATCH = ("topk", "jumprelu", "e2e")
PARTS = {"lora": ["adapter"], "both": ["adapter", "sae"],
         "several": ["rank-1/adapter", "rank-4/adapter", "rank-16/adapter"]}
CODE = re.compile(r"```python\n(.*?)```", re.S)


class Desk(HubHandler):
    """The Hub's side of create_repo and create_commit: uploads become files of server.models."""
    def do_GET(self):
        if self.path != "/api/models/me/base":
            return super().do_GET()
        self.reply_json({"id": "me/base", "cardData": {"license": "apache-2.0"}})

    def do_POST(self):
        server, (_, _, kind, *repo) = self.server, self.path.split("/")
        data = self.rfile.read(int(self.headers["Content-Length"]))
        server.posts.append(self.path)
        if server.refused:
            self.reply(403, b"{}", X_Error_Message="you may not write here")
        elif kind == "repos":
            self.reply_json({"url": f"{server.url}/me/run"})
        elif kind == "validate-yaml":
            assert yaml.safe_load(json.loads(data)["content"].split("---\n")[1])
            self.reply_json({})
        elif repo[2] == "preupload":
            files = json.loads(data)["files"]
            about = {"uploadMode": "regular", "shouldIgnore": False}
            self.reply_json({"files": [file | about for file in files]})
        else:
            _, *files = [json.loads(line)["value"] for line in data.splitlines()]
            server.models["/".join(repo[:2])] = {
                file["path"]: b64decode(file["content"]) for file in files}
            self.reply_json({"commitUrl": f"{server.url}/me/run/commit/1", "commitOid": "1"})


@pytest.fixture
def hub(server, site):
    """A Hub that accepts uploads and has `site`'s model and SAE as me/base and me/sae."""
    server.RequestHandlerClass, server.posts = Desk, []
    for name, files in (("me/base", "gemma2/*.*"), ("me/sae", "gemma2/sae/*")):
        server.models[name] = {path.name: path.read_bytes() for path in site.glob(files)}
    return server


def published(folder, hub, kind):
    names = BASE if kind in SCRATCH else BASE + SAE
    command("train", "--publish", folder, "me/run", *names)
    return hub.models["me/run"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_needed_are_uploaded_and_the_card_has_the_numbers(kind, finished, hub, site):
    folder = finished(kind)
    found = published(folder, hub, kind)
    parts = PARTS.get(kind, ["sae"])
    sources = {f"{part}/{path.name}".replace("adapter/", ""): path
               for part in parts for path in (folder / part).iterdir()}
    assert found.keys() == {"README.md", "run/config.json", "run/results.json", *sources}

    # Files name the base by its repository and contain no local path.
    for name, data in found.items():
        assert str(site).encode() not in data and str(folder).encode() not in data
        assert (b"me/base" in data) == name.endswith((".md", "config.json", "cfg.json"))
        assert not name.endswith(".safetensors") or data == sources[name].read_bytes()
    assert found["run/results.json"] == (folder / "results.json").read_bytes()

    results = read(folder / "results.json")
    text, about = found["README.md"].decode(), ModelCard(found["README.md"].decode()).data
    end = "adapted" if kind in PARTS else "sae"
    assert "None" not in text and about.license == "apache-2.0"
    assert about.library_name == ("peft" if kind in PARTS else "saelens")
    for rank, numbers in results.get("ranks", {"": results}).items():
        name = f"\n      name: kl_{end}, rank-{rank}" if rank else ""
        assert f"type: kl_{end}\n      value: {round(numbers[f'kl_{end}'], 4)}{name}\n" in text
        row = [f"{numbers[f'{what}_{end}']:.4f}" for what in ("ce", "excess", "kl")]
        if kind not in SCRATCH:
            row += [f"{numbers[what]:.1%}" for what in ("gap_closed", "kl_gap_closed")]
        assert f"| {' | '.join(row)} |" in text
    assert f"| {96 if kind in SCRATCH else 128} | {numbers['l0_sae']['1']:.1f} |" in text


@pytest.mark.parametrize("kind", ["lora", "several", "both", "jumprelu"])
def test_the_code_on_the_card_runs_and_other_libraries_agree(kind, finished, hub):
    [pytest.importorskip(library) for library in ("transformers", "peft", "sae_lens")]
    card = published(finished(kind), hub, kind)["README.md"].decode()
    ours, theirs, *in_sae_lens = CODE.findall(card)
    exec(ours, names := {})                             # noqa: S102 - it is ours
    logits, names["snapshot_download"] = names["logits"], snapshot_download
    with lorasae.base(names["model"]):
        without_adapters = names["model"](names["tokens"], names["saes"])
    assert (logits - without_adapters).abs().max() > 1e-2 or kind == "jumprelu"
    exec(re.sub(r'"(me/\w+)"', r'snapshot_download("\1")', theirs), names)      # noqa: S102
    torch.testing.assert_close(names["logits"], logits, rtol=1e-4, atol=1e-4)
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    for code in in_sae_lens:
        exec(code, names)                               # noqa: S102
        torch.testing.assert_close(names["sae"](x), names["saes"][1](x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted, names", [
    ("is not OWNER/NAME on the Hub, where the repository needs a name", ["me/run"]),
    ("is not OWNER/NAME on the Hub", ["me/run", *BASE]),
    ("run is not OWNER/NAME on the Hub", ["run", *BASE, *SAE]),
    ("names 2 SAEs for --layer 1", ["me/run", *BASE, *SAE, "me/other"]),
    ("no repository of that name on the Hub", ["me/run", "--model", "me/x", *SAE]),
    ("could not publish me/run (403", ["me/run", *BASE, *SAE]),
])
def test_a_refusal_is_one_line(wanted, names, finished, hub):
    hub.refused["me/run"] = 403
    assert wanted in refusal("train", "--publish", finished("lora"), *names)
    assert "me/run" not in hub.models and bool(hub.posts) == ("403" in wanted)


def test_a_missing_name_uploads_nothing(finished, hub, tmp_path, capsys):
    assert "expected 2 arguments" in misuse(capsys, "train", "--publish", finished("lora"))
    assert "leave out --rank" in misuse(capsys, "train", "--card", tmp_path, "--rank", 4)
    assert "--sae has no effect" in refusal("train", "--card", finished("topk"), *BASE, *SAE)
    assert not hub.posts


def test_a_presets_card_has_its_name_and_licence(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished("lora"), folder)
    changes = {"config.json": {"model": "gemma-3-270m"}, "results.json": {
        "gap_closed": 0.5, "ci90": {"gap_closed": 0.25, "ce_base": 0.1}}}
    for name, values in changes.items():
        (folder / name).write_text(json.dumps(read(folder / name) | values))
    command("train", "--card", folder, *SAE)
    text = capsys.readouterr().out
    assert "base_model: google/gemma-3-270m\n" in text and "license: gemma\n" in text
    assert "closed 50.0% ± 25.0% of it" in text and "interval over the text's 4 documents" in text


@pytest.fixture
def calls(monkeypatch):
    """The calls to a fake trackio, in order."""
    calls = []
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(
        init=lambda **how: calls.append(("init", how)),
        log=lambda values, step: calls.append(("log", {"step": step, **values})),
        finish=lambda: calls.append(("finish", None))))
    return calls


def test_a_resumed_run_continues_the_same_tracked_run(site, tmp_path, calls):
    folder = tmp_path / "run"
    with stopped_at(13):
        command("train", *words(site, "lora", "--track"), "--out", folder)
    command("train", "--resume", folder)
    begun, logged, ended = ([value for name, value in calls if name == which]
                            for which in ("init", "log", "finish"))
    assert begun[0] == begun[1] and len(ended) == 2 and begun[0]["config"]["rank"] == (4,)
    assert begun[0]["name"] == str(folder) and begun[0]["resume"] == "allow"
    last = {line["step"]: line for line in logged}      # some steps were taken twice
    assert [*last.values()] == [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_a_run_tracks_only_if_asked_and_names_a_missing_trackio(site, tmp_path, calls, monkeypatch):
    for writes, track in ((False, True), (True, False)):        # not the first process; not asked
        with tracked(SimpleNamespace(config=SimpleNamespace(track=track), writes=writes)):
            assert not calls
    monkeypatch.setitem(sys.modules, "trackio", None)
    tracking = words(site, "lora", "--track", "--out", tmp_path / "run")
    assert "pip install trackio" in refusal("train", *tracking) and not [*tmp_path.iterdir()]


def test_the_table_of_presets_needs_no_network(hub, capsys):
    command("train", "--list")
    table = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    rows = {row.split()[0]: row for row in table[1:]}
    assert [*rows] == [*PRESETS] and not hub.requests and len({*map(len, table)}) == 1
    assert re.search(r" 12 +16k +82 +12: 16k-1m, .* 10\.8GB +5\.23GB +gemma$", rows["gemma-2-2b"])
