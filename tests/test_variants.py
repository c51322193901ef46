"""The diffs in lorasae/variants/ apply, and match their formulas or other libraries.

Each is applied to a copy of the package, where the function below with its name checks it.
"""
import os
import shutil
import subprocess
import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
DIFFS = {path.stem: path for path in sorted((ROOT / "lorasae" / "variants").glob("*.diff"))}
ORACLES = {"qwen2": ["transformers"], "qwen3": ["transformers"], "dora": ["transformers", "peft"]}
RIGHT = "this is right:"


def test_every_variant_applies_and_is_right(tmp_path):
    git = shutil.which("git") or pytest.skip("git is needed to apply the diffs")
    able = [name for name in DIFFS if all(map(find_spec, ORACLES.get(name, [])))]
    ignored = shutil.ignore_patterns("tiny", "__pycache__")
    apart = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    for name in able:
        copy = tmp_path / name
        for folder in ("lorasae", "tests"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
        (copy / "lorasae" / "tiny").symlink_to(ROOT / "lorasae" / "tiny")
        for file in ("train.py", "eval.py"):
            shutil.copy(ROOT / file, copy / file)
        run([git, "apply", str(DIFFS[name])], copy, apart)
    said = run([sys.executable, __file__, *able], tmp_path, os.environ)
    assert said.count(RIGHT) == len(able), said
    if len(able) < len(DIFFS):
        pytest.skip("some variants need transformers and peft as oracles")


def run(words, folder, environment):
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def test_the_readme_lists_every_variant():
    text = (ROOT / "lorasae" / "variants" / "README.md").read_text(encoding="utf-8")
    assert len(DIFFS) == 7 and all(f"({name}.diff)" in text for name in DIFFS)


# ---- The checks, inside the copy -----------------------------------------------------------------

def gemma():
    """A model, tokens, and a TopK SAE of block 1 that leaves BOS and EOS alone."""
    from conftest import GEMMA, write_model
    from helpers import random_sae, some_tokens
    from lorasae import load_model
    model = load_model(write_model(Path("model"), GEMMA, scale=0.15))
    return model, some_tokens(model), random_sae("topk", model, on_special=False)


def close(found, expected, tolerance=1e-5):
    error = (found - expected).abs().max() / expected.abs().max()
    print(f"{error:.1e}")
    assert error <= tolerance


def gradients(loss, parameters):
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)])


def hidden_mse():
    import train
    from helpers import adapted
    from lorasae import adapt
    from lorasae.lora import base, lora_parameters
    model, tokens, sae = gemma()
    adapted(model, [2, 3])
    saes, own = {1: sae}, lora_parameters(model)
    config = SimpleNamespace(compile=False, hidden_weight=0.7)
    part = adapt.frozen_forward(model, saes, tokens, 2)
    loss, values = adapt.adapted_loss(model, saes, part, 2, config)

    with base(model), torch.no_grad():
        target = model.norm(model.residual(tokens))
    hidden = model.norm(model.residual(tokens, saes))
    mse = (hidden - target).square().mean(-1).sum()
    expected = adapt.naive_loss(model, saes, tokens) + 0.7 * mse
    close(loss, expected)
    close(values["hidden_mse"], mse)
    close(gradients(loss, own), gradients(expected, own), 1e-4)
    several = torch.stack([hidden, hidden + 1])
    losses, _ = adapt.objective(model, part, several, config)
    assert losses.shape == (2,) and losses[1] > losses[0]
    assert train.arguments(["--hidden-weight", "0.7"])


def error_term():
    from lorasae.adapt import naive_loss
    model, tokens, sae = gemma()
    x = model.run(model.embed(tokens), 0, 2)
    spliced = (x + sae(x)) / 2
    special = model.special(tokens)
    spliced[special] = x[special]
    close(model(tokens, {1: sae}), model.logits(model.run(spliced, 2, 4)))
    half = naive_loss(model, {1: sae}, tokens)
    sae.error = 0.0
    whole = naive_loss(model, {1: sae}, tokens)
    sae.error = 1.0
    close(model(tokens, {1: sae}), model(tokens))
    print(f"KL {whole:.2f} -> {half:.2f}")
    assert half < 0.7 * whole


def gated():
    import train
    from lorasae.adapt import FrozenPart
    from lorasae.dictionary import begin, new_sae, take_step
    from lorasae.io.saes import load_sae, save_sae
    from lorasae.sae import JumpReLU

    # each activation is a sum of two of 32 directions
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(32, 24), dim=1)
    chosen = torch.rand(40, 64, 32).topk(2).indices
    x = directions[chosen].mul(1 + torch.rand(40, 64, 2, 1)).sum(2) * 5

    config = SimpleNamespace(
        l0=4, max_norm=0, lr=5e-3, steps=300, dead_after=10 ** 9, auxk=False, clip=1.0)
    sae = new_sae("gated", 24, 64, None, on_special=True)
    seen = FrozenPart(x, None, torch.zeros(40, 64, dtype=torch.bool))
    training = begin(sae, seen, config)
    seen = [take_step(None, sae, 0, seen, step, training, config) for step in range(300)]
    print({name: value.item() for name, value in seen[-1].items()})
    assert seen[-1]["fvu"] < 0.1 * seen[0]["fvu"] and abs(seen[-1]["l0"] - 4) < 1

    # The gates' error trains the gates, but not the decoder.
    x = x.flatten(0, 1)
    sae.training_step(x, None)
    sae.gate_error.backward()
    assert sae.b_enc.grad.abs().sum() > 0 and sae.b_mag.grad is sae.W_dec.grad is None

    # In its file too, it is a JumpReLU SAE.
    sae.r.data += 0.1 * torch.randn(64)
    save_sae(sae, "saved", model_name="m", layer=0, context=64)
    folded = load_sae("saved")
    assert isinstance(folded, JumpReLU)
    close(folded.encode(x), sae.encode(x))
    close(folded(x), sae(x))
    assert train.arguments(["--method", "gated", "--l0", "8"])


def dora():
    import peft
    import transformers
    from conftest import LLAMA, write_model
    from helpers import adapted
    from lorasae.io.adapters import load_adapter, save_adapter
    from lorasae.io.models import load_model
    from lorasae.lora import base, lora_parameters, merge_lora
    write_model(Path("model"), LLAMA)
    tokens = torch.randint(3, 97, (2, 40))
    model = load_model("model")
    plain = model(tokens)
    fresh = adapted(load_model("model"), [1, 2], std=0.0)
    close(fresh(tokens), plain)

    adapted(model, [1, 2])
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    save_adapter(model, "adapter")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained("model"), "adapter", is_trainable=True)
    assert torch.equal(load_adapter(load_model("model"), "adapter")(tokens), model(tokens))

    # values and gradients
    own = lora_parameters(model)
    named = dict(theirs.named_parameters())
    their_own = [named[f"base_model.model.{module}.{part}"] for module, part in peft_names(model)]
    expected = theirs(tokens).logits
    wanted = gradients(expected.square().sum(), their_own)
    logits = model(tokens)
    close(logits, expected)
    close(gradients(logits.square().sum(), own), wanted, 1e-4)
    with base(model):
        close(model(tokens), plain)
    close(merge_lora(model)(tokens), expected)


def peft_names(model):
    """(module, PEFT's in-memory name of the part) for every trainable tensor."""
    from lorasae.lora import adapters
    for module, adapter in adapters(model).items():
        for part in adapter.parts:
            first, *rest = part.split(".")
            yield module, ".".join([first, "default", "weight"])


def qwen(kind):
    import transformers
    from lorasae import add_lora, base, generate, load_model
    sizes = dict(
        vocab_size=97, hidden_size=64, intermediate_size=80, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, rope_theta=1e6, bos_token_id=1,
        eos_token_id=2)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    torch.manual_seed(0)
    oracle = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    oracle.save_pretrained("qwen")
    model, tokens = load_model("qwen"), torch.randint(3, 97, (2, 40))
    expected = oracle(tokens).logits
    close(model(tokens), expected)
    continued = generate(model, tokens, 8)
    theirs = oracle.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=2)
    assert torch.equal(continued, theirs)
    add_lora(model, [1, 2], 4)
    close(model.eval()(tokens), expected)
    with base(model):
        close(model(tokens), expected)


qwen2, qwen3 = (partial(qwen, kind) for kind in ("Qwen2", "Qwen3"))


def agreement():
    import eval as command
    from helpers import adapted
    from lorasae.lora import base
    model, tokens, sae = gemma()
    adapted(model, [2, 3], std=0.3)
    text = SimpleNamespace(held_out=tokens, documents=torch.tensor([0, 1]))
    config = SimpleNamespace(eval_batch=1)
    setting = SimpleNamespace(model=model, saes={1: sae}, text=text, config=config)
    suite = command.SUITES["agreement"]
    numbers = suite.evaluate(setting)

    with base(model):
        wanted = model(tokens).argmax(-1)
        by_sae = (model(tokens, {1: sae}).argmax(-1) == wanted).double().mean().item()
    both = (model(tokens, {1: sae}).argmax(-1) == wanted).double().mean().item()
    print(by_sae, both)
    assert abs(numbers["sae"][0] - by_sae) < 1e-9 and abs(numbers["adapted"][0] - both) < 1e-9
    assert 0 < both != by_sae < 1
    setting.saes = {}
    assert suite.evaluate(setting)["sae"][0] == 1
    assert suite.tables(numbers)[0].rows[0][1] == f"{by_sae:.1%}"


def check(name):
    """Runs in a separate process, inside the copy."""
    os.chdir(name)
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    import lorasae
    assert Path(lorasae.__file__).is_relative_to(os.getcwd())
    globals()[name.replace("-", "_")]()
    print(RIGHT, name, flush=True)
    sys.exit()


if __name__ == "__main__":
    for oracle in filter(find_spec, ("transformers", "peft")):
        import_module(oracle)                           # once, for all processes forked below
    sys.path.remove(str(Path(__file__).parent))
    for name in sys.argv[1:]:
        if os.fork() == 0:
            check(name)
        os.wait()
