"""Gemma 3: its text model beside a vision tower, what is refused, and Gemma Scope 2's files."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import GEMMA3
from lorasae.errors import InputError
from lorasae.io.adapters import load_adapter, save_adapter
from lorasae.io.files import read_json, write_json
from lorasae.io.models import load_config, load_model, parse_config, save_model, text_config
from lorasae.io.saes import load_sae, save_sae
from lorasae.lora import add_lora, merge_lora
from lorasae.sae import JumpReLU

D, M = 48, 96


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A random model with a vision tower, as transformers saves it."""
    transformers = pytest.importorskip("transformers", reason="makes the model")
    text = {key: value for key, value in GEMMA3.items() if key not in ("architectures",)}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision,
                                       mm_tokens_per_image=4, bos_token_id=2, eos_token_id=[1, 5])
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("seeing")
    model.save_pretrained(folder)
    return folder, model


def test_the_text_model_beside_a_vision_tower_is_transformers_own(seeing, tokens, capsys):
    folder, oracle = seeing
    model = load_model(folder)
    assert "vision tower" in capsys.readouterr().err
    expected = oracle(input_ids=tokens).logits
    assert (model(tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (model.config.eos_token_id, model.config.with_vision) == (1, True)


def test_both_spellings_of_its_weights_are_read(seeing, tokens, tmp_path):
    folder, _ = seeing
    weights = load_file(folder / "model.safetensors")
    renamed = {}
    for name, tensor in weights.items():
        for new, old in (("model.language_model.", "language_model.model."),
                         ("language_model.model.", "model.language_model."),
                         ("model.vision_tower.", "vision_tower."),
                         ("vision_tower.", "model.vision_tower.")):
            if name.startswith(new):
                name = old + name.removeprefix(new)
                break
        renamed[name] = tensor
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    write_json(tmp_path / "config.json", read_json(folder / "config.json"))
    assert torch.equal(load_model(tmp_path)(tokens), load_model(folder)(tokens))


def test_its_adapters_load_in_peft_and_merge_into_a_plain_model(seeing, tokens, tmp_path):
    peft = pytest.importorskip("peft", reason="reads the adapters")
    transformers = pytest.importorskip("transformers", reason="reads the merged model")
    folder, oracle = seeing
    model = load_model(folder)
    add_lora(model, [1, 3], 4, dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_model(folder), tmp_path / "adapter")
    assert torch.equal(again(tokens), model(tokens))

    theirs = peft.PeftModel.from_pretrained(
        transformers.Gemma3ForConditionalGeneration.from_pretrained(folder), tmp_path / "adapter")
    found = theirs.eval()(input_ids=tokens).logits
    assert (found - model(tokens)).abs().max() <= 1e-5 * found.abs().max()
    assert (found - oracle(input_ids=tokens).logits).abs().max() > 1e-2
    assert not [name for name, _ in theirs.named_modules() if "vision" in name and "lora" in name]

    expected = model(tokens)
    save_model(merge_lora(model), tmp_path / "merged", config=text_config(folder))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(plain).__name__ == "Gemma3ForCausalLM"
    assert (plain(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_vision_tower_by_itself_is_refused(seeing, tmp_path):
    folder, _ = seeing
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "vision" in name},
              tmp_path / "model.safetensors", {"format": "pt"})
    write_json(tmp_path / "config.json", read_json(folder / "config.json"))
    with pytest.raises(InputError, match="lacks 'model.embed_tokens.weight'"):
        load_model(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"layer_types": ["full_attention"]}, "for each of the 4 blocks"),
    ({"layer_types": ["linear"] * 4}, "layer_types must have"),
    ({"final_logit_softcapping": 30.0}, "must be null"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}}, "yarn"),
    ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     "no rotary scaling"),
])
def test_what_gemma_3_does_not_do_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        parse_config({**GEMMA3, **change}, "here")


def test_the_presets_have_the_published_sizes():
    config = load_config("gemma-3-270m", offline=True)
    assert config.layer_types.count("full_attention") == 3
    assert (config.query_pre_attn_scalar, config.local_rope_theta) == (256, 1e4)


# ---- Gemma Scope 2 -------------------------------------------------------------------------------

HOOK = "model.layers.1.output"
CONFIG = {"hf_hook_point_in": HOOK, "hf_hook_point_out": HOOK, "width": M, "l0": 60,
          "model_name": "google/gemma-v3-270m-pt", "architecture": "jump_relu",
          "affine_connection": False, "type": "sae"}


def gemma_scope_2(root, folder="resid_post/layer_1_width_16k_l0_medium", config=CONFIG, seed=0):
    """Writes a folder of a Gemma Scope 2 repository -> its tensors."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w_enc": (D, M), "w_dec": (M, D), "b_enc": (M,), "b_dec": (D,), "threshold": (M,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["threshold"] = tensors["threshold"].abs()
    path = root / folder
    path.mkdir(parents=True)
    save_file(tensors, path / "params.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("config", [CONFIG, None])
def test_gemma_scope_2_is_its_closed_form(tmp_path, config):
    t = gemma_scope_2(tmp_path, config=config)
    sae = load_sae(tmp_path, layer=1, width="16k", l0="medium")
    x = torch.randn(20, D, dtype=torch.float64)
    pre = x @ t["w_enc"].double() + t["b_enc"].double()
    z = pre * (pre > t["threshold"].double())
    expected = z.relu() @ t["w_dec"].double() + t["b_dec"].double()
    assert isinstance(sae, JumpReLU) and not sae.on_special and sae.site == "resid"
    torch.testing.assert_close(sae(x.float()).double(), expected, rtol=1e-5, atol=1e-4)
    assert sae.model_name == (config and "google/gemma-3-270m-pt")


def test_the_l0_is_a_number_or_a_name_and_four_layers_go_before_all(tmp_path, capsys):
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
    assert "taking small, about 20, the nearest to 24" in capsys.readouterr().err
    assert loaded(layer=1, width="16k") == first + "medium"
    assert loaded(layer=0) == "resid_post_all/layer_0_width_16k_l0_big"
    assert loaded(layer=1, width="16k", site="mlp") == "mlp_out/layer_1_width_16k_l0_small"


@pytest.mark.parametrize("folder, config, message", [
    ("layer_1_width_16k_l0_medium", {**CONFIG, "type": "transcoder"}, "transcoder"),
    ("layer_1_width_16k_l0_medium", {**CONFIG, "affine_connection": True}, "affine_connection"),
    ("layer_1_width_16k_l0_medium",
     {**CONFIG, "hf_hook_point_in": "model.layers.1.self_attn.o_proj.input",
      "hf_hook_point_out": "model.layers.1.self_attn.o_proj.input"}, "is not a block's output"),
    ("layer_1_width_16k_l0_medium", {**CONFIG, "hf_hook_point_in": "model.layers.2.output",
                                     "hf_hook_point_out": "model.layers.2.output"}, "on block 2"),
    ("mlp_out/layer_1_width_16k_l0_medium", None, "--site mlp reads them"),
    ("attn_out/layer_1_width_16k_l0_medium", None, "holds no SAE of a block's output"),
    ("transcoder_all/layer_1_width_16k_l0_medium", None, "holds no SAE of a block's output"),
    ("renamed", None, "its name does not tell"),
])
def test_what_is_not_a_residual_sae_of_gemma_scope_2_is_refused(tmp_path, folder, config, message):
    gemma_scope_2(tmp_path, folder, config)
    with pytest.raises(InputError, match=message):
        load_sae(tmp_path, layer=1)


def test_an_mlps_sae_says_so_and_comes_back(tmp_path):
    gemma_scope_2(tmp_path, "mlp_out/layer_1_width_16k_l0_medium", None)
    sae = load_sae(tmp_path, layer=1, site="mlp")
    assert (sae.site, sae.after_norm) == ("mlp", True)
    save_sae(sae, tmp_path / "saved", model_name="m", layer=1, context=32)
    with pytest.raises(InputError, match="--site mlp"):
        load_sae(tmp_path / "saved", layer=1)
    again = load_sae(tmp_path / "saved", layer=1, site="mlp")
    assert torch.equal(again.W_enc, sae.W_enc) and (again.site, again.after_norm) == ("mlp", True)
