"""Public models and SAEs as they are published: configurations, files, places, presets."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import refuses
from lorasae.errors import InputError
from lorasae.io import hub
from lorasae.io.files import write_json
from lorasae.io.hub import find_sae
from lorasae.io.models import parse_config
from lorasae.io.presets import PRESETS, preset
from lorasae.io.sae_readers import FORMATS, check_layer
from lorasae.io.saes import load_sae, save_sae
from lorasae.runs.config import configure
from lorasae.runs.training import same_model
from lorasae.sae import JumpReLU
from train import RECIPES

D, M = 48, 96

# ---- Gemma 3's configurations --------------------------------------------------------------------

KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window")
GEMMA_3 = {
    "270m": (640, 2048, 18, 4, 1, 256, 256, 512),
    "1b": (1152, 6912, 26, 4, 1, 256, 256, 512),
    "4b": (2560, 10240, 34, 8, 4, 256, 256, 1024),
    "12b": (3840, 15360, 48, 16, 8, 256, 256, 1024),
    "27b": (5376, 21504, 62, 32, 16, 128, 168, 1024),
}
LARGE = ("4b", "12b", "27b")                            # with a vision tower
LEFT_OUT = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "query_pre_attn_scalar": 256}               # left out of their config.json
FULL, SLIDING = "full_attention", "sliding_attention"


def pattern(depth):
    return [FULL if (layer + 1) % 6 == 0 else SLIDING for layer in range(depth)]


def published(size, spelling):
    """A config.json of Gemma 3, as transformers 4 ("older"), 5 ("newer"), or both write it."""
    text = {"model_type": "gemma3_text", **dict(zip(KEYS, GEMMA_3[size]))}
    linear = {"rope_type": "linear", "factor": 8.0}
    if spelling != "older":
        full = linear if size in LARGE else {"rope_type": "default"}
        text["layer_types"] = pattern(text["num_hidden_layers"])
        text["rope_parameters"] = {
            FULL: {**full, "rope_theta": 1000000.0},
            SLIDING: {"rope_type": "default", "rope_theta": 10000.0}}
    elif size in LARGE:
        text["rope_scaling"] = linear
    if spelling != "newer" and size not in LARGE:
        text |= {"rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None,
                 "_sliding_window_pattern": 6, "cache_implementation": "hybrid"}
    if size in LARGE:
        text = {key: value for key, value in text.items() if LEFT_OUT.get(key) != value}
        return {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
                "text_config": text, "vision_config": {"model_type": "siglip_vision_model"},
                "eos_token_id": [1, 106], "mm_tokens_per_image": 256}
    return {**text, "vocab_size": 262144, "max_position_embeddings": 32768, "bos_token_id": 2,
            "eos_token_id": 1, "pad_token_id": 0, "rms_norm_eps": 1e-6, "attention_bias": False,
            "attn_logit_softcapping": None, "final_logit_softcapping": None}


@pytest.mark.parametrize("spelling", ["older", "newer", "both"])
@pytest.mark.parametrize("size", GEMMA_3)
def test_gemma_3_configurations_are_read_exactly(size, spelling):
    raw = published(size, spelling)
    config = parse_config(raw, "here")
    depth = GEMMA_3[size][2]
    assert tuple(getattr(config, key) for key in KEYS) == GEMMA_3[size]
    assert config.layer_types == tuple(pattern(depth))
    scaling = 8.0 if size in LARGE else None
    assert getattr(config.rope_scaling, "factor", None) == scaling
    expected = (1e6, 1e4, 1e-6, 2, 1, True)
    assert expected == (config.rope_theta, config.local_rope_theta, config.rms_norm_eps,
                        config.bos_token_id, config.eos_token_id, config.tie_word_embeddings)
    sizes = (262208, 131072) if size in LARGE else (262144, 32768)
    assert (config.vocab_size, config.max_position_embeddings) == sizes
    assert config.with_vision is (size in LARGE)

    # and as transformers reads it
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    theirs = transformers.AutoConfig.for_model(**published(size, spelling)).get_text_config()
    assert tuple(getattr(theirs, key) for key in (*KEYS, "vocab_size")) == (
        *GEMMA_3[size], config.vocab_size)
    assert tuple(theirs.layer_types) == config.layer_types
    tables = theirs.rope_parameters
    assert (tables[FULL]["rope_theta"], tables[SLIDING]["rope_theta"]) == (1e6, 1e4)
    assert tables[FULL].get("factor") == scaling


@pytest.mark.parametrize("size", ["270m", "1b"])
def test_a_gemma_3_preset_has_the_published_sizes(size):
    config = parse_config(PRESETS[f"gemma-3-{size}"].config, "preset")
    assert config == parse_config(published(size, "both"), "here")


# ---- Gemma Scope 2 -------------------------------------------------------------------------------

HOOK = "model.layers.1.output"
CONFIG = {"hf_hook_point_in": HOOK, "hf_hook_point_out": HOOK, "width": M, "l0": 60,
          "model_name": "google/gemma-v3-270m-pt", "architecture": "jump_relu",
          "affine_connection": False, "type": "sae"}
MEDIUM = "layer_1_width_16k_l0_medium"


def gemma_scope_2(root, folder=f"resid_post/{MEDIUM}", config=CONFIG, seed=0, width=D):
    """Writes a folder of a Gemma Scope 2 repository and returns its tensors."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w_enc": (width, M), "w_dec": (M, width), "b_enc": (M,), "b_dec": (width,),
              "threshold": (M,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["threshold"] = 5 * tensors["threshold"].abs()
    path = root / folder
    path.mkdir(parents=True)
    save_file(tensors, path / "params.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("part", ["resid_post", "resid_post_all", "mlp_out", "mlp_out_all"])
def test_gemma_scope_2_matches_its_formula_and_sae_lens(
        tmp_path, part, with_config, monkeypatch):
    repo, folder = "google/gemma-scope-2-270m-pt", f"{part}/{MEDIUM}"
    site = "mlp" if part.startswith("mlp_out") else "resid"
    suffix = ".post_feedforward_layernorm.output" if site == "mlp" else ".output"
    hook = f"model.layers.1{suffix}"
    config = {**CONFIG, "hf_hook_point_in": hook, "hf_hook_point_out": hook}
    t = gemma_scope_2(tmp_path, folder, config if with_config else None)
    ours = load_sae(tmp_path, layer=1, width="16k", l0="medium", site=site)
    assert isinstance(ours, JumpReLU) and not ours.on_special
    assert (ours.site, ours.after_norm) == (site, True)

    # in float64
    x = 2 * torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    pre = x.double() @ t["w_enc"].double() + t["b_enc"].double()
    z = pre.relu() * (pre > t["threshold"].double())
    x_hat = z @ t["w_dec"].double() + t["b_dec"].double()
    assert 0.05 < (z > 0).double().mean() < 0.5
    for found, expected in ((ours.encode(x), z), (ours(x), x_hat)):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    # SAELens's loader, reading the folder as if it were the repository
    sae_lens = pytest.importorskip("sae_lens", reason="the oracle sae-lens is not installed")
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def download(repo_id, filename, subfolder="", **_):
        path = tmp_path / subfolder / filename
        if not path.exists():
            raise loaders.EntryNotFoundError(filename)
        return str(path)

    def shapes(repo_id, filename):
        return {name: list(tensor.shape) for name, tensor in load_file(tmp_path / filename).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    theirs = sae_lens.SAE.load_from_disk(
        tmp_path, converter=lambda path, device, cfg_overrides:
            loaders.gemma_3_sae_huggingface_loader(repo, folder, device)[:2])
    assert torch.equal(theirs.W_enc.T, ours.W_enc) and torch.equal(theirs.W_dec, ours.W_dec)
    for found, expected in ((ours.encode(x), theirs.encode(x)), (ours(x), theirs(x))):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    about = theirs.cfg.metadata
    check_layer(about.hook_name, 1, "SAELens", site)
    check_layer(about.hf_hook_name, 1, "SAELens", site)
    assert ours.model_name == (about.model_name if with_config else None)
    assert same_model(ours.model_name, "gemma-3-270m")


def test_l0_is_a_number_or_a_name_and_four_layer_folders_come_first(tmp_path, capsys):
    made = {}
    for seed, folder in enumerate((
            "resid_post/layer_1_width_16k_l0_small", "resid_post/layer_1_width_16k_l0_medium",
            "resid_post/layer_1_width_16k_l0_medium_seed_1", "resid_post/layer_1_width_65k_l0_big",
            "resid_post_all/layer_1_width_16k_l0_small", "resid_post_all/layer_0_width_16k_l0_big",
            "mlp_out/layer_1_width_16k_l0_small", "transcoder_all/layer_1_width_16k_l0_small")):
        made[folder] = gemma_scope_2(tmp_path, folder, None, seed)

    def loaded(**which):
        W_dec = load_sae(tmp_path, **which).W_dec
        return next(folder for folder in made if torch.equal(made[folder]["w_dec"], W_dec))

    first = "resid_post/layer_1_width_16k_l0_"
    assert loaded(layer=1, width="16k", l0="small") == first + "small"
    assert loaded(layer=1, width=16384, l0=60) == first + "medium"
    assert capsys.readouterr().err == ""
    assert loaded(layer=1, width="16k", l0=24) == first + "small"
    assert "taking small, the nearest to 24" in capsys.readouterr().err
    assert loaded(layer=1, width="16k") == first + "medium"
    assert loaded(layer=0) == "resid_post_all/layer_0_width_16k_l0_big"
    assert loaded(layer=1, width="16k", site="mlp") == "mlp_out/layer_1_width_16k_l0_small"


@pytest.mark.parametrize("folder, config, message", [
    (MEDIUM, {**CONFIG, "type": "transcoder"}, "transcoder"),
    (MEDIUM, {**CONFIG, "affine_connection": True}, "affine_connection"),
    (MEDIUM, {**CONFIG, "hf_hook_point_in": "model.layers.2.output",
              "hf_hook_point_out": "model.layers.2.output"}, "on block 2, not 1: pass --layer 2"),
    ("resid_post/layer_2_width_16k_l0_medium/", None, "offers layer 2, but not 1"),
    (f"mlp_out/{MEDIUM}", None, "offers site mlp, but not resid: choose another --site"),
    ("renamed", None, "its name does not give site and layer: keep its name"),
    (MEDIUM, None, "its name does not give site and layer: keep its name"),
])
def test_anything_but_a_residual_sae_of_gemma_scope_2_is_refused(tmp_path, folder, config, message):
    gemma_scope_2(tmp_path, folder, config)
    refuses(message, load_sae, tmp_path, layer=1)


def test_an_mlp_sae_records_its_site_and_loads_again(tmp_path):
    gemma_scope_2(tmp_path, f"mlp_out/{MEDIUM}", None)
    sae = load_sae(tmp_path, layer=1, site="mlp")
    save_sae(sae, tmp_path / "saved", model_name="m", layer=1, context=32)
    refuses("--site mlp", load_sae, tmp_path / "saved", layer=1)
    again = load_sae(tmp_path / "saved", layer=1, site="mlp")
    assert torch.equal(again.W_enc, sae.W_enc) and (again.site, again.after_norm) == ("mlp", True)


# ---- Where the public SAEs belong ----------------------------------------------------------------

SCOPE, AVERAGE = "google/gemma-scope-2b-pt", "layer_12/width_16k/average_l0_82"
SCOPE_2, AT = "google/gemma-scope-2-1b-pt", "layer_13_width_16k_l0_medium"
LLAMA_SCOPE = "fnlp/Llama3_1-8B-Base-LX"
PLACES = [                                              # repository/folder, format, layer, site
    (f"{SCOPE}-res/{AVERAGE}", "gemma_scope", 12, "resid"),
    (f"{SCOPE}-mlp/{AVERAGE}", "gemma_scope", 12, "mlp"),
    (f"{SCOPE}-att/{AVERAGE}", "gemma_scope", 12, None),
    (f"{SCOPE}-transcoders/{AVERAGE}", "gemma_scope", 12, None),
    (f"{SCOPE}-res/embedding/width_4k/average_l0_6", "gemma_scope", None, None),
    *((f"{SCOPE_2}/{part}{every}/{AT}{affine}", "gemma_scope_2", 13, site)
      for every in ("", "_all")
      for part, affine, site in (
          ("resid_post", "", "resid"), ("mlp_out", "", "mlp"), ("attn_out", "", None),
          ("transcoder", "", None), ("transcoder", "_affine", None))),
    (f"{SCOPE_2}/resid_post/layer_22_width_1m_l0_big", "gemma_scope_2", 22, "resid"),
    (f"{SCOPE_2}/crosscoder/layer_7_13_17_22_width_65k_l0_medium", ["params_layer_0.safetensors"],
     None, None),
    (f"{SCOPE_2}/clt/width_262k_l0_medium_affine", ["params_layer_0.safetensors"], None, None),
    (f"{LLAMA_SCOPE}R-32x/Llama3_1-8B-Base-L16R-32x", "llama_scope", 16, "resid"),
    (f"{LLAMA_SCOPE}M-32x/Llama3_1-8B-Base-L16M-32x", "llama_scope", 16, "mlp"),
    (f"{LLAMA_SCOPE}A-8x/Llama3_1-8B-Base-L16A-8x", "llama_scope", 16, None),
    (f"{LLAMA_SCOPE}TC-8x/Llama3_1-8B-Base-L16TC-8x", "llama_scope", 16, None),
    ("OpenMOSS-Team/Llama-Scope-2-Qwen3-1.7B/transcoder/8x/k64/layer3_transcoder_8x_k64",
     "llama_scope", None, None),
    ("EleutherAI/sae-SmolLM2-1.7B-layer17-32x/layers.17", "sparsify", 17, "resid"),
    ("EleutherAI/sae-SmolLM2-135M-64x/layers.12.mlp", "sparsify", 12, "mlp"),
    ("EleutherAI/sae-pythia-160m-32k/layers.3.attention", "sparsify", 3, None),
    ("EleutherAI/sae-llama-3-8b-32x/embed_tokens", "sparsify", None, None),
    ("chanind/gemma-3-1b-batch-topk-matryoshka/blocks.13.hook_resid_post", "sae_lens", 13, "resid"),
    ("andyrdt/saes-llama-3.1-8b-instruct/resid_post_layer_15/trainer_1", "dictionary_learning", 15,
     "resid"),
    ("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", ["config.json", "layer12.sae.pt"], 12, None),
    ("Goodfire/Llama-3.1-8B-Instruct-SAE-l19", ["Llama-3.1-8B-Instruct-SAE-l19.pth"], 19, None),
    ("Aquinlabs/llama-3.2-1b-sae/layer_5", ["sae.pt"], 5, None),
]


@pytest.mark.parametrize("place, files, layer, site", PLACES, ids=[row[0] for row in PLACES])
def test_a_public_sae_is_found_at_its_layer_and_site_or_refused(
        tmp_path, monkeypatch, place, files, layer, site):
    owner, name, *folders = place.split("/")
    names = FORMATS[files][1] if isinstance(files, str) else files
    listed = {"/".join([*folders, file]): 1 for file in names}
    monkeypatch.setattr(hub, "listing", lambda repo: {"README.md": 1, **listed})
    local = tmp_path / place
    for file in names:
        (local / file).parent.mkdir(parents=True, exist_ok=True)
        (local / file).touch()

    # on the Hub, in a local copy, and by the folder itself
    for source in (f"{owner}/{name}", place, tmp_path / owner / name, local):
        if site:
            found = find_sae(source, layer=layer, site=site)
            assert isinstance(files, str) and found.kind == files
        if site != "resid":
            message = "contains no SAE in a known format|offers site (other|mlp), but not resid"
            with pytest.raises(InputError, match=message) as refused:
                find_sae(source, layer=layer)
            assert ("site mlp" in str(refused.value)) is (site == "mlp")
        if site and layer is not None and source != local:
            refuses(f"offers layer {layer}, but not 2", find_sae, source, layer=2, site=site)


def test_the_path_gives_the_layer_if_the_file_does_not(tmp_path):
    """Only the last five parts of the path count."""
    above = tmp_path / "transcoder/layer_3/a/b/c"
    npz = above / f"gemma-scope-2b-pt-res/{AVERAGE}/params.npz"
    for path in npz, above / "layers.17/cfg.json", above / "layers.17/sae.safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for source in (npz, npz.parent, npz.parents[1], npz.parents[2]):
        assert find_sae(source, layer=12).kind == "gemma_scope"
        refuses("offers layer 12, but not 9: choose another --layer", find_sae, source, layer=9)
    refuses("offers layer 17, but not 12", find_sae, above / "layers.17", layer=12)


@pytest.mark.parametrize("hook, site", [
    ("blocks.3.hook_resid_post", "resid"), ("blocks.4.hook_resid_pre", "resid"),
    ("model.layers.3", "resid"), ("model.layers.3.output", "resid"),
    ("blocks.3.hook_mlp_out", "mlp"), ("model.layers.3.mlp", "mlp"),
    ("model.layers.3.mlp.output", "mlp"),
    ("model.layers.3.post_feedforward_layernorm.output", "mlp"),
    ("blocks.3.attn.hook_z", None), ("blocks.3.hook_attn_out", None),
    ("blocks.3.hook_resid_mid", None), ("blocks.3.ln2.hook_normalized", None),
    ("blocks.3.hook_mlp_in", None), ("hook_embed", None), ("blocks.0.hook_resid_pre", None),
    ("model.layers.3.self_attn.o_proj.input", None), ("model.layers.3.self_attn", None),
    ("model.layers.3.pre_feedforward_layernorm.output", None), ("model.embed_tokens", None)])
def test_a_hooks_name_gives_site_and_layer(hook, site):
    for asked in ("resid", "mlp"):
        if asked == site:
            check_layer(hook, 3, "the file", asked)
            message = "trained on block 3, not 4: pass --layer 3"
            refuses(message, check_layer, hook, 4, "the file", asked)
        else:
            message = f"the file reads '{hook}', which is not"
            refuses(message, check_layer, hook, None, "the file", asked)


# ---- Presets -------------------------------------------------------------------------------------

def write_config(folder, raw):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", raw)
    return str(folder)


@pytest.mark.parametrize("name, preset_name", [
    ("gemma-3-270m", "gemma-3-270m"), ("gemma-3-1b-pt", "gemma-3-1b"),
    ("gemma-2-2b", "gemma-2-2b"), ("SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
    ("smollm2-135m-instruct", "smollm2-135m-instruct")])
def test_a_preset_applies_to_a_folder_with_its_name_and_sizes(tmp_path, name, preset_name):
    known = PRESETS[preset_name]
    folder = write_config(tmp_path / name, known.config)
    assert preset(folder) is known
    for method in ("lora", "topk"):
        if known.sae or method == "topk":
            by_name, by_folder = (configure({"model": model, "method": method}, RECIPES)
                                  for model in (preset_name, folder))
            assert replace(by_name, model=folder) == by_folder
    assert hub.model_place(folder) == Path(folder)              # the folder's own weights

    # another name, another size, no sizes
    assert preset(write_config(tmp_path / "mine", known.config)) is None
    other = {**known.config, "num_hidden_layers": 3}
    assert preset(write_config(tmp_path / "other" / name, other)) is None
    assert preset(tmp_path / "nothing" / name) is None
    assert preset(write_config(tmp_path / "empty" / name, {})) is None
