"""Tiny random models in the exact format of the real ones, written by the tests themselves: nothing is downloaded."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")           # before torch is imported: on tiny tensors threads only cost

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

GEMMA = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 97, "hidden_size": 48,
    "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "query_pre_attn_scalar": 24, "sliding_window": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 4096, "bos_token_id": 2, "eos_token_id": 1,
    "pad_token_id": 0, "hidden_activation": "gelu_pytorch_tanh", "torch_dtype": "float32",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 64,
    "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 1,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 64},
    "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "float32",
}


def random_weights(raw, seed=0, scale=0.2):
    """{name: tensor} for a configuration, large enough that soft-caps bite and every detail shows in the logits."""
    from lorasae.io.models import parse_config
    from lorasae.model import Transformer
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(parse_config(raw, "the test")).named_parameters()}
    return {name: scale * torch.randn(shape, generator=generator) + (1.0 if len(shape) == 1 else 0.0)
            for name, shape in shapes.items()}


def write_model(folder, raw, seed=0, scale=0.2):
    """A single-file Hugging Face folder with random weights."""
    from lorasae.io.files import write_json
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", raw)
    save_file(random_weights(raw, seed, scale), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(params=["gemma2", "llama"])
def raw_config(request):
    return {"gemma2": GEMMA, "llama": LLAMA}[request.param]


@pytest.fixture
def model_folder(raw_config, tmp_path):
    return write_model(tmp_path / "model", raw_config)


@pytest.fixture
def model(raw_config):
    """A random frozen Transformer of each family."""
    from lorasae.io.models import parse_config
    from lorasae.model import Transformer
    model = Transformer(parse_config(raw_config, "the test"))
    model.load_state_dict(random_weights(raw_config, scale=0.15), strict=True)
    return model.requires_grad_(False).eval()


@pytest.fixture
def tokens():
    return torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))


TEXT = "def area(width, height):\n    return width * height\n\n\nclass Shape:\n    name = 'square'\n\n"


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """Sixty little documents, all different."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        (folder / f"part{i:02d}.txt").write_text("".join(f"x{i * j} = {j}\n{TEXT}" for j in range(12)))
    return folder


def write_tokenizer(folder, raw, text):
    """A byte-level BPE as small as the model's vocabulary, its BOS and EOS at the ids of the configuration."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    bos, eos = raw["bos_token_id"], raw["eos_token_id"]
    special = ["<pad>"] * 3
    special[bos], special[eos] = "<bos>", "<eos>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(set(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)[0][0]))
    trainer = trainers.BpeTrainer(vocab_size=raw["vocab_size"], special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def whole_model(model_folder, raw_config, text_folder):
    """A model folder with its tokenizer."""
    write_tokenizer(model_folder, raw_config, "".join(path.read_text() for path in sorted(text_folder.iterdir())))
    return model_folder


@pytest.fixture
def sae_folder(whole_model, raw_config, tmp_path):
    """A random TopK SAE of that model, in SAELens's format."""
    from lorasae.sae import TopK
    from lorasae.io.saes import save_sae
    torch.manual_seed(0)
    sae = TopK(raw_config["hidden_size"], 128, 8)
    torch.nn.init.normal_(sae.W_enc)
    sae.W_dec.data = torch.nn.functional.normalize(sae.W_enc.data, dim=1)
    save_sae(sae, tmp_path / "sae", model_name="test", layer=1, context=32)
    return tmp_path / "sae"
