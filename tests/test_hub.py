"""Presets, and fetching over HTTP from a server in this process that speaks the Hub's protocol."""
import io
import os
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import torch

from helpers import Hub, use_hub
from lorasae.io import hub
from lorasae.errors import InputError
from lorasae.io.hub import model_files, model_plan, sae_choice, sae_files, sae_plan
from lorasae.io.presets import PRESETS, TINY, preset
from lorasae.io.saes import load_sae

L0S = (22, 41, 62, 114, 445)
MODEL = {"config.json": b"{}", "tokenizer.json": b"{ }", "model.safetensors.index.json": b"[]", "README.md": b"read me",
         "model-00001-of-00002.safetensors": b"1" * 5000, "model-00002-of-00002.safetensors": b"2" * 3000,
         "pytorch_model.bin": b"pickle", "original/consolidated.00.pth": b"pickle", "consolidated.safetensors": b"3"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub of our own, with .cache, the folder of what was fetched from it."""
    server = Hub()
    server.cache = tmp_path / "hub"
    use_hub(monkeypatch, server, tmp_path)
    yield server
    if server.thread.is_alive():
        server.stop()


def fetched(server):
    """The names of the files whose contents were sent."""
    return sorted(line.partition("/resolve/")[2].partition("/")[2] for line in server.requests
                  if line.startswith("GET") and "/resolve/" in line)


def gemma_scope(layers=(11, 12), widths=("16k", "1m"), M=16, D=6):
    rng, files = np.random.default_rng(0), {"README.md": b"Gemma Scope"}
    for layer in layers:
        for width in widths:
            for l0 in L0S:
                data = io.BytesIO()
                np.savez(data, W_enc=rng.normal(size=(D, M)).astype("f"), W_dec=rng.normal(size=(M, D)).astype("f"),
                         b_enc=np.full(M, l0, "f"), b_dec=np.zeros(D, "f"), threshold=np.full(M, layer, "f"))
                files[f"layer_{layer}/width_{width}/average_l0_{l0}/params.npz"] = data.getvalue()
    return files | {"embedding/width_4k/average_l0_6/params.npz": b"another kind of SAE"}


# ---- Models ---------------------------------------------------------------------------------------------------------

def test_a_repository_is_fetched_once_and_only_what_is_read(server):
    server.models["some/model"] = MODEL
    folder = model_files("some/model")
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
              "model.safetensors.index.json", "tokenizer.json"]
    assert fetched(server) == sorted(path.name for path in folder.rglob("*")) == wanted
    assert all((folder / name).read_bytes() == MODEL[name] for name in wanted)
    server.requests.clear()
    assert model_files("some/model") == folder and fetched(server) == []


def test_the_configuration_can_be_had_without_the_weights(server):
    server.models["some/model"] = MODEL
    assert hub.config_file("some/model").read_bytes() == b"{}" and fetched(server) == ["config.json"]


def test_the_cache_serves_without_a_network(server, monkeypatch):
    server.models["some/model"] = MODEL
    folder = model_files("some/model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert model_files("some/model") == folder and server.requests == []
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set and other/model is not wholly in the cache .*hub: "):
        model_files("other/model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server.stop()
    assert model_files("some/model") == folder
    with pytest.raises(InputError, match="the Hub is out of reach and other/model is not wholly in the cache"):
        model_files("other/model")


def test_an_interrupted_download_is_not_taken_for_a_whole_one(server, monkeypatch):
    server.models["some/model"] = MODEL
    model_files("some/model")
    next(server.cache.rglob("model-00002-of-00002.safetensors")).unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="some/model is not wholly in the cache"):
        model_files("some/model")


@pytest.mark.parametrize("refusal", [(401, "GatedRepo"), (403, "GatedRepo"), (403, ""), (401, "")])
def test_a_gated_preset_names_the_licence_the_login_and_the_ungated_copy(server, refusal):
    server.models["google/gemma-2-2b"] = server.models["unsloth/gemma-2-2b"] = MODEL
    server.refused["google/gemma-2-2b"] = refusal
    with pytest.raises(InputError) as error:
        model_files("gemma-2-2b")
    line = str(error.value)
    assert all(part in line for part in ("google/gemma-2-2b is gated", "https://huggingface.co/google/gemma-2-2b",
                                         "`hf auth login`", "--model unsloth/gemma-2-2b")) and "\n" not in line
    assert (model_files("unsloth/gemma-2-2b") / "config.json").read_bytes() == b"{}"


def test_a_gated_repository_of_others_names_the_licence_and_the_login(server):
    server.models["some/gated"] = MODEL
    server.refused["some/gated"] = (403, "GatedRepo")
    with pytest.raises(InputError, match="some/gated is gated: accept .*huggingface.co/some/gated and log in") as error:
        model_files("some/gated")
    assert "ungated" not in str(error.value)


def test_a_repository_that_is_not_there_or_private_is_one_line(server):
    for name in ("some/nothing", "some/bad--name"):
        for find in (model_files, model_plan, sae_files):
            with pytest.raises(InputError, match=f"there is no local folder {name}, and no repository of th") as error:
                find(name)
            assert "\n" not in str(error.value)
    server.models["some/private"] = MODEL
    server.refused["some/private"] = (401, "")
    with pytest.raises(InputError, match="there is no local folder some/private, and .* needs `hf auth login`"):
        model_files("some/private")


@pytest.mark.parametrize("name", ["gemma-3", "a/b/c", "/no/where", "./x/y"])
def test_a_name_that_can_be_no_model_lists_the_presets(server, name):
    with pytest.raises(InputError, match=f"there is no model {name}: expected a preset .*gemma-2-2b.*OWNER/NAME"):
        model_files(name)
    assert server.requests == []


def test_a_repository_without_the_files_of_a_model_says_which(server):
    server.models["some/pickles"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(InputError, match="some/pickles on the Hub has no model.safetensors, and pickled"):
        model_files("some/pickles")
    server.models["some/data"] = {"README.md": b""}
    with pytest.raises(InputError, match="some/data on the Hub has no config.json"):
        model_files("some/data")
    assert fetched(server) == ["config.json"]


def test_a_full_disk_is_one_line(server, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(hub, "snapshot_download", full)
    with pytest.raises(InputError, match="cannot fetch some/model: .*No space left on device"):
        model_files("some/model")


def test_a_local_folder_is_taken_as_it_is_and_a_preset_may_be_one(tmp_path):
    assert model_files(tmp_path) == model_files(str(tmp_path)) == tmp_path
    assert model_plan(tmp_path) == []
    for name in ("tiny-gemma-2", "tiny-llama-3"):
        assert TINY in hub.Path(PRESETS[name].repo).parents and TINY in hub.Path(PRESETS[name].sae).parents


def test_the_plan_lists_sizes_and_what_the_cache_holds(server):
    server.models["some/model"] = MODEL
    plan = model_plan("some/model")
    wanted = {"config.json", "tokenizer.json"} | {name for name in MODEL if name.startswith("model")}
    assert {fetch.path: fetch.bytes for fetch in plan} == {name: len(MODEL[name]) for name in wanted}
    assert not any(fetch.cached for fetch in plan) and fetched(server) == []
    model_files("some/model")
    assert all(fetch.cached for fetch in model_plan("some/model"))
    server.models["google/scope"] = gemma_scope()
    (fetch,) = sae_plan("google/scope", layer=12, width="16k", l0=62)
    path = "layer_12/width_16k/average_l0_62/params.npz"
    assert fetch == ("google/scope", path, len(server.models["google/scope"][path]), False)


# ---- SAEs -----------------------------------------------------------------------------------------------------------

def test_one_sae_is_fetched_of_a_repository_of_many(server):
    server.models["google/scope"] = gemma_scope()
    sae = load_sae("google/scope", layer=12, width="16k", l0=114)
    assert fetched(server) == ["layer_12/width_16k/average_l0_114/params.npz"]
    assert (sae.b_enc == 114).all() and (sae.threshold == 12).all()
    same = load_sae("google/scope/layer_12/width_16k/average_l0_114")
    assert torch.equal(same.W_enc, sae.W_enc)
    assert sae_files("google/scope/layer_12/width_16k/average_l0_114/params.npz/").name == "average_l0_114"


@pytest.mark.parametrize("source", ["hub", "folder"])
def test_the_l0_nearest_to_the_papers_is_taken_and_said(server, tmp_path, capsys, source):
    server.models["google/scope"] = gemma_scope()
    for path, data in server.models["google/scope"].items() if source == "folder" else ():
        (tmp_path / "scope" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "scope" / path).write_bytes(data)
    name = str(tmp_path / "scope") if source == "folder" else "google/scope"
    assert sae_files(name, layer=12, width=2 ** 20).match("layer_12/width_1m/average_l0_62")
    assert f"{name} offers l0 22, 41, 62, 114, 445: taking 62, the nearest to 70\n" in capsys.readouterr().err
    assert sae_files(name, layer=11, width="16384", l0=22).match("layer_11/width_16k/average_l0_22")
    assert "nearest" not in capsys.readouterr().err


@pytest.mark.parametrize("l0", [114, 114.0, "114", "114.0"])
def test_an_l0_is_a_number_however_it_is_given(server, l0):
    """The command line's comes as 114.0, a preset's as 114."""
    server.models["google/scope"] = gemma_scope()
    assert sae_files("google/scope", layer=12, width="16k", l0=l0).match("layer_12/width_16k/average_l0_114")


@pytest.mark.parametrize("l0", [62.5, float("nan"), float("inf"), -62, "many", "²", True, [62]])
def test_an_l0_that_no_sae_can_have_is_one_line(server, l0):
    server.models["google/scope"] = gemma_scope()
    with pytest.raises(InputError, match="--l0 .* chooses no SAE: their L0s are given in whole numbers, such as 82"):
        sae_files("google/scope", layer=12, width="16k", l0=l0)


def test_the_small_files_beside_the_weights_are_fetched_too(server):
    small = {name: b"{}" for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")}
    server.models["some/model"] = {**MODEL, **small}
    folder = model_files("some/model")
    assert all((folder / name).read_bytes() == b"{}" for name in small)
    assert not (folder / "README.md").exists() and small.keys() < {fetch.path for fetch in model_plan("some/model")}


@pytest.mark.parametrize("how, message", [
    ({"layer": 12, "width": "16k", "l0": 70}, r"offers l0 22, 41, 62, 114, 445, but not 70 \(in layer_12/width_16k\)"),
    ({"layer": 12, "width": "32k"}, "offers width 16k, 1m, but not 32k"),
    ({"layer": 12}, "offers width 16k, 1m: choose with --width"),
    ({"layer": 26, "width": "16k"}, "offers layer 11, 12, but not 26"),
    ({"width": "16k"}, "offers layer 11, 12: choose with --layer"),
])
def test_an_sae_that_does_not_exist_lists_those_that_do(server, how, message):
    server.models["google/scope"] = gemma_scope()
    with pytest.raises(InputError, match=f"google/scope {message}"):
        sae_files("google/scope", **how)
    assert fetched(server) == []


def test_other_layouts_are_found_by_layer(server):
    scope = {f"Llama3_1-8B-Base-L{layer}R-32x/{name}": name.encode() for layer in (1, 15, 16)
             for name in ("hyperparams.json", "lm_config.json", "checkpoints/final.safetensors")}
    server.models["fnlp/scope"] = scope
    assert sae_files("fnlp/scope", layer=16).name == "Llama3_1-8B-Base-L16R-32x"
    assert fetched(server) == [f"Llama3_1-8B-Base-L16R-32x/{name}" for name in ("checkpoints/final.safetensors",
                                                                                "hyperparams.json")]
    server.models["some/sparsify"] = {f"layers.{layer}{part}/{name}": b"x" for layer in (2, 12) for part in ("", ".mlp")
                                     for name in ("cfg.json", "sae.safetensors")}
    with pytest.raises(InputError, match=r"several SAEs that fit \(layers.12, layers.12.mlp\): name one of these"):
        sae_files("some/sparsify", layer=12)
    assert sae_files("some/sparsify/layers.12", layer=12).name == "layers.12"
    with pytest.raises(InputError, match="some/sparsify/nothing holds no SAE of a known format: expected params.npz"):
        sae_files("some/sparsify/nothing", layer=12)
    for half in ("cfg.json", "sae.safetensors"):
        server.models["some/half"] = {f"layers.2/{half}": b"x"}
        with pytest.raises(InputError, match="some/half holds no SAE of a known format"):
            sae_files("some/half")


def test_without_a_network_the_saes_in_the_cache_are_offered(server, monkeypatch, capsys):
    server.models["google/scope"] = gemma_scope()
    folder = sae_files("google/scope", layer=12, width="16k", l0=114)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    capsys.readouterr()
    assert sae_files("google/scope", layer=12, width="16k", l0=114) == folder
    assert "choosing among the files of google/scope in the cache" in capsys.readouterr().err
    with pytest.raises(InputError, match="offers l0 114, but not 62"):
        sae_files("google/scope", layer=12, width="16k", l0=62)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set and google/other is not wholly in the cache"):
        sae_files("google/other", layer=12)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server.stop()
    assert sae_files("google/scope", layer=12, width="16k") == folder
    with pytest.raises(InputError, match="the Hub is out of reach and google/other is not wholly in the cache"):
        sae_files("google/other", layer=12)


def test_local_saes_are_found_from_a_file_a_folder_or_a_run(tmp_path):
    (tmp_path / "run" / "sae").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "50pct").mkdir(parents=True)
    for folder in ("sae", "checkpoints/50pct"):
        for name in ("cfg.json", "sae_weights.safetensors"):
            (tmp_path / "run" / folder / name).write_bytes(b"x")
    for source in ("run", "run/sae", "run/sae/cfg.json"):
        assert sae_files(tmp_path / source) == tmp_path / "run" / "sae"
    assert sae_files(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "50pct"
    (tmp_path / "run" / "notes.txt").write_text("not an SAE")
    with pytest.raises(InputError, match="notes.txt is no file of an SAE: expected an .npz file, ae.pt, cfg.json"):
        sae_files(tmp_path / "run" / "notes.txt")
    (tmp_path / "l" / "checkpoints").mkdir(parents=True)
    for name in ("hyperparams.json", "checkpoints/final.safetensors"):
        (tmp_path / "l" / name).write_bytes(b"x")
    assert sae_files(tmp_path / "l" / "checkpoints" / "final.safetensors") == tmp_path / "l"
    assert sae_plan(tmp_path / "l") == []
    with pytest.raises(InputError, match="there is no SAE /no/where: expected a file, a folder, or OWNER/NAME"):
        sae_files("/no/where")


# ---- Presets --------------------------------------------------------------------------------------------------------

def test_presets_are_known_by_repository_and_mirror_too():
    for known in PRESETS.values():
        assert preset(known.repo) is known and (known.mirror is None or preset(known.mirror) is known)
    assert preset("gemma-2-2b") is PRESETS["gemma-2-2b"] and preset("some/model") is None


def test_what_is_given_goes_before_the_preset():
    scope = "google/gemma-scope-2b-pt-res"
    assert sae_choice("gemma-2-2b") == (scope, {"layer": 12, "width": "16k", "l0": 82})
    assert sae_choice("unsloth/gemma-2-2b", layer=12) == sae_choice("gemma-2-2b", scope) == sae_choice("gemma-2-2b")
    assert sae_choice("gemma-2-2b", layer=9) == (scope, {"layer": 9, "width": "16k", "l0": None})
    assert sae_choice("gemma-2-2b", width="65k") == (scope, {"layer": 12, "width": "65k", "l0": None})
    assert sae_choice("gemma-2-2b", l0=41) == (scope, {"layer": 12, "width": "16k", "l0": 41})
    assert sae_choice("gemma-2-2b", "mine") == ("mine", {"layer": 12, "width": None, "l0": None})
    assert sae_choice("some/model", "mine", layer=3) == ("mine", {"layer": 3, "width": None, "l0": None})


def test_a_model_without_an_sae_says_how_to_get_one():
    with pytest.raises(InputError, match="train.py --model llama-3.2-1b --method topk --out RUN_DIR`, then pass --sae"):
        sae_choice("llama-3.2-1b")
    assert sae_choice("llama-3.2-1b", "run")[0] == "run"
    with pytest.raises(InputError, match="some/model is not a preset, .* pass one with --sae"):
        sae_choice("some/model")


def test_the_environment_alone_points_the_program_at_a_server(server, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE as a user sets them, in a fresh process."""
    server.models["some/model"], server.models["google/scope"] = MODEL, gemma_scope()
    code = ("from lorasae.io.hub import model_files, sae_files\n"
            "print(model_files('some/model'))\nprint(sae_files('google/scope', layer=12, width='16k', l0=62))")
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_CACHE", None)
    for offline in ("0", "1"):
        done = subprocess.run([sys.executable, "-c", code], env={**environment, "HF_HUB_OFFLINE": offline}, text=True,
                              capture_output=True, cwd=TINY.parents[1])
        assert done.returncode == 0, done.stderr
        folders = done.stdout.split()
        assert all(folder.startswith(str(tmp_path / "home")) for folder in folders) and len(folders) == 2
        server.requests.clear()
    assert server.requests == []
