"""Real language models against transformers and peft: parity, SAEs, adapters, resume.

    LORASAE_REAL=DIR python -m pytest tests/real        about ten minutes on two cores

DIR contains smollm2-135m-instruct/ and gemma-3-270m/, as Hugging Face saves them.
"""
import argparse
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from helpers import command, metrics, read, same_run, stopped_at
from lorasae.attention import Cache
from lorasae.io.adapters import load_adapter
from lorasae.io.models import load_model, load_tokenizer

pytestmark = pytest.mark.skipif(
    "LORASAE_REAL" not in os.environ, reason="run LORASAE_REAL=DIR python -m pytest tests/real")

DIR = Path(os.environ.get("LORASAE_REAL", ".")).absolute()
SMOLLM2, GEMMA = "smollm2-135m-instruct", "gemma-3-270m"
MODELS = (SMOLLM2, GEMMA)
LAYER = 12

TOPK = f"--method topk --layer {LAYER} --k 32 --lr 1e-3 --batch-size 4 --context 256".split()
SAE = {
    SMOLLM2: [*TOPK, "--width", 4608, "--tokens", "120k", "--eval-tokens", "16k"],
    GEMMA: [*TOPK, "--width", 4608, "--tokens", "16k", "--eval-tokens", 2048],
}
ADAPTERS = ["--rank", 16, "--adapt", "after", "--eval-tokens", 2048]
TOKENS = {SMOLLM2: "20k", GEMMA: "3k"}


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    """Other tests use one thread each (conftest.py)."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def oracle():
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    return transformers.AutoModelForCausalLM


@cache
def some_text(name, length=700):
    """Tokens [1, length]: BOS, then text of the standard library."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    ids = load_tokenizer(DIR / name).encode(text, add_special_tokens=False).ids
    bos = read(DIR / name / "config.json")["bos_token_id"]
    return torch.tensor([[bos, *ids]])[:, :length]


def close(found, expected, to=1e-5):
    return (found - expected).abs().max() <= to * expected.abs().max()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(kind, name): the folder of a run that trains an "sae", or "adapters" around that SAE."""
    place = tmp_path_factory.mktemp("runs")

    @cache
    def run(kind, name):
        folder = place / f"{name}-{kind}"
        words = SAE[name]
        if kind == "adapters":
            words = ["--sae", run("sae", name), "--tokens", TOKENS[name], *ADAPTERS]
        with torch.enable_grad():
            command("train", "--model", DIR / name, *words, "--device", "cpu", "--out", folder)
        return folder
    return run


# ---- The models ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_equal_transformers_and_bf16_is_as_near_as_theirs(name, oracle):
    """fp32: within 1e-5 of the largest. bf16: as near to fp32 as transformers, up to noise."""
    tokens = some_text(name)
    expected = oracle.from_pretrained(DIR / name, dtype=torch.float32)(tokens).logits
    assert close(load_model(DIR / name, dtype="float32")(tokens), expected)

    theirs = oracle.from_pretrained(DIR / name, dtype=torch.bfloat16)(tokens).logits.float()
    ours = load_model(DIR / name, dtype="bfloat16")(tokens).float()
    off, their_off = ((logits - expected).square().mean().sqrt() for logits in (ours, theirs))
    assert 0 < off <= 1.05 * their_off


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_greedy_generation_with_the_cache_matches_transformers(name, oracle, count=12):
    """The prompt is longer than Gemma's sliding window."""
    prompt = some_text(name, 600)
    model, tokens, past = load_model(DIR / name, dtype="float32"), prompt, Cache()
    for _ in range(count):
        logits = model(tokens[:, past.length():], cache=past)[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert close(logits, model(tokens[:, :-1])[:, -1])

    theirs = oracle.from_pretrained(DIR / name, dtype=torch.float32)
    assert theirs.generate(prompt, max_new_tokens=count, do_sample=False).equal(tokens)


# ---- An SAE, and adapters around it --------------------------------------------------------------

def test_a_short_sae_run_measures_ordinary_tokens_and_leaves_out_few_others(runs):
    run = runs("sae", SMOLLM2)
    results, *_, last = read(run / "results.json"), *metrics(run)
    assert results["fvu"] < 0.32
    assert results["fvu"] / 2 < last["fvu"] < 2 * results["fvu"]
    assert 1 / 256 <= results["left_out_sae"][str(LAYER)] < 0.01        # BOS, and few others


@pytest.mark.parametrize("name, closed", [(SMOLLM2, 0.05), (GEMMA, 0.01)])
def test_adapting_a_model_to_its_sae_lowers_kl(runs, name, closed):
    results = read(runs("adapters", name) / "results.json")
    assert results["kl_adapted"] < (1 - closed) * results["kl_sae"]
    assert 0 < results["ce_adapted"] - results["ce_base"] < results["ce_sae"] - results["ce_base"]


def spliced(run, special):
    """A hook that replaces a block's output by the reconstruction of a run's SAE, written out."""
    t = load_file(run / "sae/sae_weights.safetensors")
    facts = read(run / "sae/cfg.json")
    largest = facts["metadata"]["max_norm"]
    assert facts["apply_b_dec_to_input"] and facts["metadata"]["exclude_special_tokens"]

    def hook(block, inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        pre = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
        z = pre * (pre >= pre.topk(facts["k"]).values[..., -1:])
        spared = special | (x.norm(dim=-1) > largest)
        x = torch.where(spared[..., None], x, z @ t["W_dec"] + t["b_dec"])
        return (x, *output[1:]) if isinstance(output, tuple) else x
    return hook


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_runs_numbers_match_plain_transformers_and_peft(runs, name, oracle):
    peft = pytest.importorskip("peft", reason="peft loads the adapters")
    run, count = runs("adapters", name), 2
    tokens = torch.from_numpy(np.load(run / "text/held-out.npy")[:count]).long()
    base = oracle.from_pretrained(DIR / name, dtype=torch.float32)
    special = (tokens == base.config.bos_token_id) | (tokens == base.config.eos_token_id)
    block, hook = base.model.layers[LAYER], spliced(runs("sae", name), special)

    def log_p(model, with_sae):
        handle = block.register_forward_hook(hook) if with_sae else None
        found = model(tokens).logits[:, :-1].log_softmax(-1)
        if handle:
            handle.remove()
        return found

    expected = log_p(base, False)
    found = {"base": expected, "sae": log_p(base, True)}
    adapted = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    found["adapted"] = log_p(adapted, True)
    ours = read(run / "sequences.json")
    for setting, log_q in found.items():
        ce = F.nll_loss(log_q.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
        kl = (expected.exp() * (expected - log_q)).sum(-1).mean(1)
        assert ours[setting]["ce"][:count] == pytest.approx(ce.tolist(), abs=1e-3), setting
        assert ours[setting]["kl"][:count] == pytest.approx(kl.tolist(), abs=1e-3), setting
    assert (log_p(adapted, False) - expected).abs().max() > 0.01    # not the identity


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_transformers_loads_the_adapter_and_the_merged_model(runs, name, oracle):
    peft = pytest.importorskip("peft", reason="peft loads the adapters")
    run, tokens = runs("adapters", name), some_text(name, 200)
    expected = load_adapter(load_model(DIR / name, dtype="float32"), run)(tokens)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.float32)
    assert close(theirs(input_ids=tokens).logits, expected)
    command("train", "--merge", run)
    merged = oracle.from_pretrained(run / "merged", dtype=torch.float32)
    assert close(merged(tokens).logits, expected)
    assert load_tokenizer(run / "merged").get_vocab_size() > 49_000


def test_resuming_an_interrupted_run_gives_the_same_bits(runs, tmp_path):
    words = ["--model", DIR / SMOLLM2, "--sae", runs("sae", SMOLLM2), *ADAPTERS, "--tokens", 2048,
             "--eval-tokens", 1024, "--checkpoint-every", 2, "--device", "cpu"]
    command("train", *words, "--out", tmp_path / "whole")
    with stopped_at(3):
        command("train", *words, "--out", tmp_path / "halves")
    command("train", "--resume", tmp_path / "halves")
    same_run(tmp_path / "halves", tmp_path / "whole")
