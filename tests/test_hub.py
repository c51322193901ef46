"""Presets, and fetching over HTTP from a server in this process that speaks the Hub's protocol."""
import io
import itertools

import numpy as np
import pytest
import torch
import zstandard
from huggingface_hub import constants

from conftest import GEMMA, LLAMA, TEXT, write_shards, write_tokenizer
from helpers import HubHandler, command, counted, lines, one_line, read, refuses
from lorasae import InputError, load_model, load_sae, load_tokenizer
from lorasae.io import hub
from lorasae.io.files import write_bytes
from lorasae.io.hub import find_sae, model_files, model_plan, sae_choice, sae_plan
from lorasae.io.models import load_config
from lorasae.io.presets import PRESETS, preset
from lorasae.io.text import files

L0S = (22, 41, 62, 114, 445)
MODEL = {
    "config.json": b"{}", "tokenizer.json": b"{ }", "model.safetensors.index.json": b"[]",
    "model-00001-of-00002.safetensors": b"1" * 5000, "README.md": b"read me",
    "model-00002-of-00002.safetensors": b"2" * 3000, "pytorch_model.bin": b"pickle",
    "original/consolidated.00.pth": b"pickle", "consolidated.safetensors": b"3"}
SCOPE = "google/gemma-scope-2b-pt-res"


@pytest.fixture(params=["HF_HUB_OFFLINE is set", "the Hub is out of reach", "the Hub is down"])
def unreachable(server, monkeypatch, request):
    """A function that makes the Hub unreachable in one of three ways -> how the error begins."""
    def leave():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", "OFFLINE" in request.param)
        server.down = "down" in request.param
        if "reach" in request.param:
            server.stop()
        return request.param
    return leave


def sae_files(source, **which):
    return find_sae(source, **which).fetch()


def fetched(server):
    """The names of the files whose contents the server sent."""
    return sorted(line.partition("/resolve/")[2].partition("/")[2] for line in server.requests
                  if line.startswith("GET") and "/resolve/" in line)


def gemma_scope_files(D, M, layers=(12,), widths=("16k",), l0s=(82,)):
    """The repository's layout, with random JumpReLUs that fire and encode their layer and L0."""
    rng, files = np.random.default_rng(0), {"README.md": b"# Gemma Scope"}
    for layer, width, l0 in itertools.product(layers, widths, l0s):
        W, buffer = rng.normal(size=(M, D)).astype("f") / D ** 0.5, io.BytesIO()
        np.savez(
            buffer, W_enc=W.T, W_dec=W, b_enc=np.zeros(M, "f"), b_dec=np.full(D, l0 / 10_000, "f"),
            threshold=np.full(M, layer / 100, "f"))
        files[f"layer_{layer}/width_{width}/average_l0_{l0}/params.npz"] = buffer.getvalue()
    return files


def gemma_scope():
    other = {"embedding/width_4k/average_l0_6/params.npz": b"another kind of SAE"}
    return other | gemma_scope_files(6, 16, layers=(11, 12), widths=("16k", "1m"), l0s=L0S)


def test_a_repository_is_fetched_once_and_only_the_files_that_are_read(server):
    small = {"tokenizer_config.json": b"1", "special_tokens_map.json": b"2",
             "tokenizer.model": b"3", "chat_template.jinja": b"4", "merges.txt": b"5",
             "added_tokens.json": b"6", "generation_config.json": b"7"}
    server.models["some/model"] = {**MODEL, **small}
    assert (model_files("some/model", ["config.json"]) / "config.json").read_bytes() == b"{}"
    assert fetched(server) == ["config.json"]

    folder = model_files("some/model")
    wanted = sorted([
        "config.json", "tokenizer.json", *small, "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    assert fetched(server) == sorted(path.name for path in folder.rglob("*")) == wanted
    assert all((folder / name).read_bytes() == {**MODEL, **small}[name] for name in wanted)
    server.requests.clear()
    assert model_files("some/model/") == folder and fetched(server) == []
    server.models["some/pickles"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    refuses("no .*.safetensors .*pickled weights are never opened", model_files, "some/pickles")
    assert fetched(server) == ["config.json"]


def test_the_cache_is_used_when_the_hub_is_unreachable(server, unreachable):
    server.models["some/model"] = MODEL
    folder = model_files("some/model")
    plan = model_plan("some/model")
    why = unreachable()
    assert model_files("some/model") == folder
    assert sorted(model_plan("some/model")) == sorted(plan) and all(f.cached for f in plan)
    for find in (model_files, model_plan):
        refuses(f"{why}.*, and other/model is neither a local folder nor", find, "other/model")


def test_an_error_names_the_file_that_an_incomplete_cache_lacks(server, tmp_path, monkeypatch):
    write_shards(tmp_path / "good", LLAMA, shards=2)
    files = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    missing = "model-00002-of-00002.safetensors"
    server.models["some/model"] = {name: files[name] for name in files.keys() - {missing}}
    model_files("some/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for find, name in ((load_model, missing), (load_tokenizer, "tokenizer.json")):
        with one_line(f"{tmp_path}/hub/.*{name}", kind=(InputError, OSError)) as error:
            find("some/model")
        assert "No such file" in str(error.value)


@pytest.mark.parametrize("body", [b"<html>please log in</html>", b"[]", b"{}", b"null", b""])
def test_an_answer_that_makes_no_sense_gives_a_short_error(server, monkeypatch, body):
    for method in ("do_GET", "do_HEAD"):
        monkeypatch.setattr(HubHandler, method, lambda self: self.reply(200, body))
    for find in (model_files, model_plan, sae_files, lambda name: files(f"hf://datasets/{name}")):
        with pytest.raises(InputError, match="some/model") as error:
            find("some/model")
        assert len(str(error.value)) < 400


LICENCE = "google/gemma-2-2b is gated: .*https://huggingface.co/google/gemma-2-2b and .*`hf auth"


@pytest.mark.parametrize("name, refusal, message", [
    *(("google/gemma-2-2b", refusal, f"{LICENCE} login`.* --model unsloth/gemma-2-2b$")
      for refusal in ((401, "GatedRepo"), (403, "GatedRepo"), (403, ""), (401, ""))),
    ("some/gated", (403, "GatedRepo"), "some/gated is gated: accept .*gated repositories$"),
    ("some/private", (401, ""), "local folder some/private, and .* needs `hf auth login`")])
def test_an_error_says_if_a_repository_needs_a_licence_or_a_login(server, name, refusal, message):
    server.models[name], server.refused[name] = MODEL, refusal
    refuses(message, model_files, name)


@pytest.mark.parametrize("find", [model_files, model_plan, sae_files])
def test_a_repository_that_does_not_exist_is_reported_in_one_line(server, find):
    for name in ("some/nothing", "some/bad--name"):
        refuses(f"no local folder {name}, and no repository .* needs `hf auth", find, name)
    server.requests.clear()
    for name in ("gemma-3", "/no/where", "./x/y"):      # none can be a repository
        refuses(f"no (model|SAE) {name}: expected .*gemma-2-2b.*OWNER", find, name)
    assert server.requests == []


def test_the_plan_lists_sizes_and_which_files_are_cached(server):
    server.models["some/model"] = MODEL
    plan = model_plan("some/model")
    wanted = {"config.json", "tokenizer.json"} | {name for name in MODEL if name[:5] == "model"}
    assert {(fetch.path, fetch.bytes) for fetch in plan} == {(n, len(MODEL[n])) for n in wanted}
    assert not any(fetch.cached for fetch in plan) and fetched(server) == []
    model_files("some/model")
    assert all(fetch.cached for fetch in model_plan("some/model"))
    one = {"config.json": b"{}", "model.safetensors": b"1", "tokenizer.json": b"2"}
    server.models["unsloth/gemma-2-2b"] = one           # the Hub overrides the preset
    assert {fetch.path for fetch in model_plan("unsloth/gemma-2-2b")} == set(one)
    server.models["google/scope"] = gemma_scope()
    (fetch,) = sae_plan("google/scope", layer=12, width="16k", l0=62)
    path = "layer_12/width_16k/average_l0_62/params.npz"
    assert fetch == ("google/scope", path, len(server.models["google/scope"][path]), False)


def test_a_preset_can_be_planned_without_the_hub(server, unreachable):
    server.models["unsloth/gemma-2-2b"] = MODEL
    model_files("unsloth/gemma-2-2b", ["config.json"])
    why = unreachable()
    weights = ("*.safetensors", PRESETS["gemma-2-2b"].weights, False)
    assert model_plan("gemma-2-2b") == [("google/gemma-2-2b", *weights)]
    half = [("unsloth/gemma-2-2b", "config.json", 2, True), ("unsloth/gemma-2-2b", *weights)]
    assert model_plan("unsloth/gemma-2-2b") == half     # it includes what the cache lacks
    assert load_config("gemma-2-2b").hidden_size == 2304
    refuses(why, load_config, "some/model")

    one = "an SAE of 16,384 latents"
    for source in (SCOPE, "gemma-2-2b"):
        assert sae_plan(source, layer=9) == [(SCOPE, one, 4 * 2 * 16384 * 2304, False)]
    for width in (65536, "65k"):
        assert sae_plan(SCOPE, layer=9, width=width)[0].bytes == 4 * 2 * 65536 * 2304
    assert sae_plan("llama-3.1-8b", layer=3)[0].bytes == 2 * 2 * 131072 * 4096
    assert sae_plan("gemma-3-270m", layer=12)[0].bytes == 4 * 2 * 16384 * 640
    refuses(why, sae_plan, "some/scope", layer=3)


def test_only_one_sae_is_fetched_from_a_repository_of_many(server):
    server.models["google/scope"] = gemma_scope()
    with counted(hub, "listing") as calls:
        sae = load_sae("google/scope", layer=12, width="16k", l0=114)
    assert calls.call_count == 1
    assert fetched(server) == ["layer_12/width_16k/average_l0_114/params.npz"]
    assert (sae.b_dec == torch.tensor(0.0114)).all() and (sae.threshold == 0.12).all()
    same = load_sae("google/scope/layer_12/width_16k/average_l0_114/")
    assert torch.equal(same.W_enc, sae.W_enc)


@pytest.mark.parametrize("source", ["hub", "folder"])
def test_the_l0_nearest_to_the_papers_is_chosen_and_printed(server, tmp_path, capsys, source):
    server.models["google/scope"] = gemma_scope()
    for path, data in gemma_scope().items():
        write_bytes(tmp_path / "scope" / path, data)
    name = f"{tmp_path}/scope" if source == "folder" else "google/scope"
    found = sae_files(name, layer=12, width=2 ** 20)
    assert found.match("layer_12/width_1m/average_l0_62")
    said = f"{name} offers l0 22, 41, 62, 114, 445: taking 62, the nearest to 70\n"
    assert said in capsys.readouterr().err
    for width, l0 in (("16384", 22), ("16k", 22.0)):    # as presets and the command line write it
        found = sae_files(name, layer=11, width=width, l0=l0)
        assert found.match("layer_11/width_16k/average_l0_22")
    assert "nearest" not in capsys.readouterr().err


@pytest.mark.parametrize("how, message", [
    ({"layer": 12, "width": "16k", "l0": 62.5}, "offers l0 22, 41, 62, 114, 445, but not 62.5"),
    ({"layer": 12, "width": "32k"}, "offers width 1m, 16k, but not 32k"),
    ({"layer": 12}, "offers width 1m, 16k: choose with --width"),
    ({"layer": 26, "width": "16k"}, "offers layer 11, 12, but not 26"),
    ({"width": "16k"}, "offers layer 11, 12: choose with --layer"),
])
def test_an_error_for_an_sae_that_does_not_exist_lists_those_that_do(server, how, message):
    server.models["google/scope"] = gemma_scope()
    refuses(f"google/scope .*{message}", sae_files, "google/scope", **how)
    assert fetched(server) == []


def test_the_files_of_another_layout_are_fetched_and_half_an_sae_is_refused(server):
    """For more layouts see tests/test_real_formats.py."""
    names = ("checkpoints/final.safetensors", "hyperparams.json", "lm_config.json")
    server.models["fnlp/scope"] = {
        f"Llama3_1-8B-Base-L{layer}R-32x/{name}": name.encode()
        for layer in (1, 15, 16) for name in names}
    assert sae_files("fnlp/scope", layer=16).name == "Llama3_1-8B-Base-L16R-32x"
    assert fetched(server) == [f"Llama3_1-8B-Base-L16R-32x/{name}" for name in names[:2]]

    for half in ("cfg.json", "sae.safetensors"):
        server.models["some/half"] = {f"layers.2/{half}": b"x"}
        refuses("some/half contains no SAE in a known format: expected", sae_files, "some/half")


def test_without_the_hub_the_cached_saes_are_offered(server, unreachable, capsys):
    server.models["google/scope"] = gemma_scope()
    folder = sae_files("google/scope", layer=12, width="16k", l0=114)
    why = unreachable()
    capsys.readouterr()
    assert sae_files("google/scope", layer=12, width="16k", l0=114) == folder
    assert "choosing among the cached files of google/scope" in capsys.readouterr().err
    assert sae_files("google/scope", layer=12, width="16k") == folder
    refuses("offers l0 114, but not 62", sae_files, "google/scope", layer=12, width="16k", l0=62)
    message = f"{why}.*, and google/other is neither a local folder nor completely in the cache"
    refuses(message, sae_files, "google/other", layer=12)


def test_presets_are_found_by_repository_or_mirror_and_given_options_override_them():
    for known in PRESETS.values():
        assert preset(known.repo) is known
        assert known.mirror is None or preset(known.mirror) is known
    assert preset("gemma-2-2b") is PRESETS["gemma-2-2b"] and preset("some/model") is None

    def chosen(model="gemma-2-2b", **how):
        source, which = sae_choice(model, **how)
        return source, *which.values()

    assert chosen() == chosen("unsloth/gemma-2-2b", layer=12) == (SCOPE, 12, 16384, 82)
    assert chosen(layer=9) == (SCOPE, 9, 16384, None)
    assert chosen(width="65k") == (SCOPE, 12, 65536, None)
    assert chosen(l0=41) == (SCOPE, 12, 16384, 41)
    message = "train.py --model llama-3.2-1b --method topk --out RUN_DIR`, then pass --sae"
    for find in (sae_choice, load_sae):
        refuses(message, find, "llama-3.2-1b")
    refuses("some/model is not a preset, .* pass one with --sae", sae_choice, "some/model")


# ---- The headline command ------------------------------------------------------------------------

GEMMA_2B = {
    **GEMMA, "num_hidden_layers": 26, "hidden_size": 32, "intermediate_size": 48,
    "sliding_window": 4096, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0}


def test_the_headline_command_runs_to_its_end(server, tmp_path, monkeypatch, capsys):
    """A server has small versions of all that the real command fetches: Gemma-2-2B in all but size
    (26 blocks, three shards, bf16 weights, the same names of files and tensors, a tokenizer that
    puts BOS first), Gemma Scope in its own layout, and the Pile as .jsonl.zst.
    """
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "model", GEMMA_2B, scale=0.05, dtype=torch.bfloat16)
    write_tokenizer(tmp_path / "model", GEMMA_2B, TEXT)
    model = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    scope = gemma_scope_files(GEMMA_2B["hidden_size"], 2 ** 14, l0s=(22, 82))
    pile = zstandard.compress(lines([f"note {i}\n" + TEXT * 20 for i in range(100)]))
    server.models = {"google/gemma-2-2b": {**model, "README.md": b"# Gemma 2"},
                     "google/gemma-scope-2b-pt-res": scope}
    server.datasets = {"monology/pile-uncopyrighted": {"train/00.jsonl.zst": pile}}

    words = ["train", "--model", "gemma-2-2b", "--layer", 12, "--rank", 64]
    words += ["--tokens", 1024, "--eval-tokens", 1024, "--device", "cpu"]   # few, to save time
    command(*words, "--dry-run")
    planned = capsys.readouterr().out
    for part in ("model-00003-of-00003.safetensors", "of blocks 13 to 25",
                 "layer_12/width_16k/average_l0_82/params.npz"):
        assert part in planned, planned

    command(*words)
    run = tmp_path / "runs" / "gemma-2-2b-lora"
    config, results = read(run / "config.json"), read(run / "results.json")
    expected = {"dtype": "bfloat16", "context": 1024, "batch_size": 1, "lr": 5e-5, "width": 16384,
                "l0": 82}
    assert {name: config[name] for name in expected} == expected
    assert results["train_tokens"] == 1024 == results["eval_tokens"] and results["kl_sae"] > 0
    adapter = read(run / "adapter" / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"]) == (64, 32)
    assert adapter["layers_to_transform"] == list(range(13, 26))
    unneeded = ("README", "average_l0_22")
    assert not any(name in path for path in server.requests for name in unneeded)
