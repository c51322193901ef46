"""Gemma 3: its text model beside a vision tower, and what is refused."""
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import GEMMA3
from helpers import adapted, refuses
from lorasae.io.adapters import load_adapter, save_adapter
from lorasae.io.files import read_json, write_json
from lorasae.io.models import load_model, parse_config, save_model, text_config
from lorasae.lora import merge_lora


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
    model = adapted(load_model(folder), [1, 3], rank=4, std=0.1)
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


@pytest.mark.parametrize("change, message", [
    ({"layer_types": ["full_attention"]}, "for each of the 4 blocks"),
    ({"layer_types": ["linear"] * 4}, "layer_types must have"),
    ({"attn_logit_softcapping": 50.0}, "must be null"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}}, "yarn"),
    ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     "no rotary scaling"),
])
def test_what_gemma_3_does_not_do_is_refused(change, message):
    refuses(message, parse_config, {**GEMMA3, **change}, "here")
