"""The memory estimate beside what fresh processes really hold at their peak, and the counts that it is made of."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import GEMMA, LLAMA, write_model
from lorasae.io.models import load_config, parse_config
from lorasae.lora import add_lora, lora_parameters
from lorasae.model import Transformer
from lorasae.io.saes import save_sae
from lorasae.sae import JumpReLU
from lorasae.runs.memory import adapter_parameters, estimate, kept_by_block, model_parameters

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "lorasae" / "tiny" / "gemma-2" / "tokenizer.json"
SIZES = {                                               # D, I, blocks, V, context, sequences, latents
    "nothing": (32, 64, 2, 4096, 32, 1, 64),
    "small": (128, 512, 6, 8192, 128, 2, 1024),
    "medium": (256, 1024, 8, 16384, 256, 2, 2048),
    "large": (384, 1536, 10, 32768, 256, 4, 8192),
}


def python(*arguments):
    found = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """Bytes of a run whose model and SAE weigh nothing: what Python, PyTorch and the text take."""
    return measured(tmp_path_factory.mktemp("nothing"), "nothing", "lora")


def measured(folder, size, method):
    """Peak memory of a whole run of three steps, evaluations included, and its configuration."""
    D, I, depth, V, context, batch, latents = SIZES[size]
    raw = {**GEMMA, "hidden_size": D, "intermediate_size": I, "num_hidden_layers": depth, "vocab_size": V,
           "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": D // 8, "sliding_window": 4096}
    write_model(folder / "model", raw, scale=0.02)
    shutil.copy(TOKENIZER, folder / "model")
    (folder / "text.txt").write_text("".join(path.read_text() for path in sorted((ROOT / "lorasae").glob("*.py"))))
    common = ["train.py", "--model", folder / "model", "--data", folder / "text.txt", "--context", context,
              "--batch-size", batch, "--eval-tokens", 4 * context, "--dtype", "float32", "--device", "cpu",
              "--layer", depth // 2 - 1]

    def train(name, tokens, *arguments):
        python(*map(str, [*common, "--out", folder / name, "--tokens", tokens, *arguments]))
        return json.loads((folder / name / "results.json").read_text())["peak_memory_bytes"]

    if method != "lora":
        l0 = ["--l0", 20] if method == "jumprelu" else []
        return train("run", 3 * batch * context, "--method", method, "--width", latents, *l0)
    sae = JumpReLU(D, latents)
    torch.nn.init.normal_(sae.W_enc, std=D ** -0.5), torch.nn.init.constant_(sae.threshold, 1.0)
    save_sae(sae, folder / "sae", model_name="test", layer=depth // 2 - 1, context=context)
    return train("run", 3 * batch * context, "--sae", folder / "sae", "--rank", 16, "--adapt", "after")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is counted as Linux does")
@pytest.mark.parametrize("size, method", [("small", "lora"), ("medium", "lora"), ("large", "lora"),
                                          ("medium", "jumprelu"), ("medium", "e2e")])
def test_the_estimate_is_near_the_measured_peak_of_a_real_run(tmp_path, process, size, method):
    peak = measured(tmp_path, size, method) - process
    D, I, depth, V, context, batch, latents = SIZES[size]
    lora = method == "lora"
    found = estimate(load_config(tmp_path / "model"), method=method, blocks=range(depth // 2, depth) if lora else (),
                     ranks=[16] if lora else (), latents=[latents], kinds="jumprelu", micro_batch=batch,
                     context=context, ahead=1, dtype=torch.float32)
    print(f"{size} {method}: measured {peak / 1e6:.0f} MB, estimated {found.total / 1e6:.0f} MB "
          f"{({name: round(value / 1e6) for name, value in found._asdict().items()})}")
    noise = 20e6                                        # processes that do the same differ by that much
    assert abs(found.total - peak) < 0.25 * peak + noise


@pytest.mark.parametrize("raw", [GEMMA, LLAMA], ids=["gemma", "llama"])
def test_parameters_are_counted_exactly(raw):
    config = parse_config(raw, "the test")
    with torch.device("meta"):
        model = Transformer(config)
        assert model_parameters(config) == sum(p.numel() for p in model.parameters())
        adapted = add_lora(model, [1, 3], 5)
    assert adapter_parameters(config, [1, 3], [5]) == sum(p.numel() for p in lora_parameters(adapted))


@pytest.mark.parametrize("dropout", [0.0, 0.1, None])
@pytest.mark.parametrize("raw", [GEMMA, LLAMA], ids=["gemma", "llama"])
def test_what_backward_keeps_of_a_block_is_what_autograd_saves(raw, dropout):
    T = 100
    config = parse_config({**raw, "sliding_window": 4096}, "the test")
    model = Transformer(config).requires_grad_(False).train()
    if dropout is not None:
        add_lora(model, [1], 2, dropout=dropout)
    parameters, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)      # held, so that no address comes twice
        return tensor

    x = torch.randn(1, T, config.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.run(x, 1, 2)
    expected = sum(size for size, _ in saved.values()) / T
    assert kept_by_block(config, T, 4, "cpu", False, dropout) == pytest.approx(expected, rel=0.15)


def test_only_the_largest_phase_counts_and_every_lever_moves_its_part():
    config = parse_config(GEMMA, "the test")
    common = dict(method="lora", blocks=[2, 3], ranks=[8], latents=[512], micro_batch=2, context=64, ahead=1,
                  dtype=torch.float32)
    plain = estimate(config, **common)
    needed = plain.model + plain.saes + plain.training + max(plain.ahead, plain.step, plain.evaluation)
    assert plain.total == needed + plain.held_back and plain.held_back == round(0.2 * needed)
    assert estimate(config, **{**common, "ahead": 16}).ahead == 8 * plain.ahead
    assert estimate(config, **{**common, "ranks": [8, 8]}).training == 2 * plain.training
    assert estimate(config, **{**common, "dtype": torch.bfloat16}).model == plain.model / 2
    assert estimate(config, **{**common, "micro_batch": 4}).activations == 2 * plain.activations
    assert estimate(config, **{**common, "latents": [512, 512]}).saes == 2 * plain.saes
    assert estimate(config, **{**common, "sae_dtype": torch.bfloat16}).saes == plain.saes / 2
