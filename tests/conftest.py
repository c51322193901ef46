"""Tiny random models in the real file formats, and other fixtures. Nothing is downloaded."""
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")           # before torch: tiny tensors need no threads

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Workers get whole files, so a file's fixtures train once; at the end, idle workers steal."""
    from xdist.scheduler import WorkStealingScheduling
    return WorkStealingScheduling(config, log)


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


GEMMA = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 97,
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 16,
    "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "max_position_embeddings": 4096, "bos_token_id": 2, "eos_token_id": 1,
    "pad_token_id": 0, "hidden_activation": "gelu_pytorch_tanh", "torch_dtype": "float32",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97,
    "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 1,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64},
    "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "float32",
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 97,
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention",
                    "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "bos_token_id": 2, "eos_token_id": 1,
    "pad_token_id": 0, "hidden_activation": "gelu_pytorch_tanh", "torch_dtype": "float32",
}


def random_weights(raw, seed=0, scale=0.2):
    """{name: tensor}, large enough that soft-caps bite and every detail shows in the logits."""
    from lorasae.io.models import parse_config
    from lorasae.model import Transformer
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Transformer(parse_config(raw, "the test"))
    weights = {}
    for name, p in model.named_parameters():
        of_heads = name.endswith(("q_norm.weight", "k_norm.weight"))
        start = 1.0 if p.dim() == 1 and not of_heads else 0.0
        weights[name] = scale * torch.randn(p.shape, generator=generator) + start
    return weights


def write_model(folder, raw, seed=0, scale=0.2):
    """Writes a Hugging Face model folder with random weights in a single file."""
    from lorasae.io.files import write_json
    write_json(folder / "config.json", raw)
    save_file(random_weights(raw, seed, scale), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_shards(folder, raw, shards=3, scale=0.2, dtype=torch.float32):
    """Like write_model, but splits the weights over several files with an index."""
    from lorasae.io.files import write_json
    tensors, weight_map = random_weights(raw, scale=scale), {}
    write_json(folder / "config.json", raw)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name].to(dtype) for name in sorted(tensors)[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    return folder


@pytest.fixture(params=["gemma2", "gemma3", "llama"])
def raw_config(request):
    return {"gemma2": GEMMA, "gemma3": GEMMA3, "llama": LLAMA}[request.param]


@pytest.fixture
def model_folder(raw_config, tmp_path):
    return write_model(tmp_path / "model", raw_config)


def random_model(raw, scale=0.15):
    """A random frozen Transformer."""
    from lorasae.io.models import parse_config
    from lorasae.model import Transformer
    model = Transformer(parse_config(raw, "the test"))
    model.load_state_dict(random_weights(raw, scale=scale), strict=True)
    return model.requires_grad_(False).eval()


@pytest.fixture
def model(raw_config):
    """A random model of each family in turn."""
    return random_model(raw_config)


@pytest.fixture
def tokens():
    return torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))


TEXT = ("def area(width, height):\n    return width * height\n\n\n"
        "class Shape:\n    name = 'square'\n\n")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """A folder of sixty small documents, all different."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        text = "".join(f"x{i * j} = {j}\n{TEXT}" for j in range(12))
        (folder / f"part{i:02d}.txt").write_text(text)
    return folder


def write_tokenizer(folder, raw, text):
    """Writes a byte-level BPE tokenizer with the model's vocabulary size, BOS and EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    bos, eos = raw["bos_token_id"], raw["eos_token_id"]
    special = ["<pad>"] * 3
    special[bos], special[eos] = "<bos>", "<eos>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (first, _), *_ = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    trainer = trainers.BpeTrainer(
        vocab_size=raw["vocab_size"], special_tokens=special, initial_alphabet=sorted(set(first)),
        show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def whole_model(model_folder, raw_config, text_folder):
    """A model folder with its tokenizer."""
    texts = [path.read_text() for path in sorted(text_folder.iterdir())]
    write_tokenizer(model_folder, raw_config, "".join(texts))
    return model_folder


def write_sae(folder, d_model, model_name="test", scale=1.0):
    """Writes a random TopK SAE for layer 1 in SAELens's format. scale: multiplies its encoder."""
    from helpers import random_sae
    from lorasae.io.saes import save_sae
    sae = random_sae("topk", d_model, 128, std=1)
    sae.W_dec.data = torch.nn.functional.normalize(sae.W_enc.data, dim=1)
    sae.W_enc.data *= scale
    save_sae(sae, folder, model_name=model_name, layer=1, context=32)
    return folder


# ---- Runs ----------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def seeded():
    """Makes a test's random numbers independent of the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keeps the shards of small texts in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORASAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def site(tmp_path_factory, text_folder):
    """A folder of all that runs need: models gemma2/, gemma3/, llama/, SAEs */sae, and text/."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(text_folder, folder / "text")
    text = "".join(path.read_text() for path in sorted(text_folder.iterdir()))
    for name, raw in (("gemma2", GEMMA), ("gemma3", GEMMA3), ("llama", LLAMA)):
        write_tokenizer(write_model(folder / name, raw), raw, text)
        write_sae(folder / name / "sae", raw["hidden_size"], name, scale=0.05)
    return folder


@pytest.fixture(scope="session")
def finished(site, tmp_path_factory):
    """finished(kind, *more) -> the folder of a finished run, trained once for all tests to read."""
    from helpers import command, words
    made, place = {}, tmp_path_factory.mktemp("finished")

    def run(kind, *more):
        key = (kind, *map(str, more))
        if key not in made:
            made[key] = place / f"{len(made)}-{kind}"
            command("train", *words(site, kind, *more), "--out", made[key])
        return made[key]
    return run


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local Hub that huggingface_hub talks to, with an empty cache and nobody logged in."""
    from huggingface_hub import constants
    from helpers import Hub
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server


@pytest.fixture
def study(tmp_path):
    """A small study of the included models."""
    from lorasae.paper.study import Study
    return Study(tmp_path, sae_tokens=400_000, frontier_tokens=2_000_000, lora_tokens=60_000,
                 long_tokens=300_000, eval_tokens=12_000, seeds=[0, 1])
