"""Adapters and SAE trained together: every gradient, two rates, and what the run says of both."""
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import write_sae
from helpers import command, metrics, moved, random_sae, read, words
from lorasae import adapt
from lorasae.adapt import adamw, first_differing
from lorasae.beyond import finetune
from lorasae.beyond.finetuning import Finetuning, make_trainable
from lorasae.beyond.muon import Muon, muon
from lorasae.io.saes import load_sae
from lorasae.lora import add_lora, attach_lora, detach_lora, lora_parameters
from lorasae.runs.config import Config

LAYER = 1


@pytest.fixture
def tokens(model):
    tokens = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = model.config.bos_token_id
    return tokens


def kind_of(model, sae_kind, sample, dropout=0.0, optimizer=adamw, **how):
    """A Finetuning with adapters that are not the identity, where the paper puts them."""
    sae = random_sae(sae_kind, model)
    torch.manual_seed(0)
    blocks = range(4) if sae_kind == "topk" else range(LAYER + 1, 4)
    adapters = moved(detach_lora(add_lora(model, blocks, rank=3, dropout=dropout)))
    attach_lora(model, adapters)
    config = Config(train_sae=True, batch_size=2, context=24, lr=1e-2, **{"sae_lr": 1e-3, **how})
    make_trainable(sae, config)
    return Finetuning(model.train(), LAYER, sae, adapters, config, sample, optimizer)


def copies(parameters):
    return [parameter.detach().clone() for parameter in parameters]


# ---- One step ------------------------------------------------------------------------------------

@pytest.mark.parametrize("sae_kind", ["topk", "jumprelu"])
def test_every_gradient_of_both_is_that_of_equation_7(model, tokens, sae_kind):
    # Eq. 7 has no gradient for thresholds: they are frozen.
    how = {"thresholds": "frozen"} if sae_kind == "jumprelu" else {}
    kind = kind_of(model, sae_kind, tokens, **how)
    sae = kind.trained.sae
    assert kind.first == (0 if sae_kind == "topk" else LAYER + 1)
    part = kind.frozen(tokens)
    loss, values = finetune.loss_of(model, kind.trained, part, kind.first, kind.config)
    expected = adapt.naive_loss(model, {LAYER: sae}, tokens) / tokens.numel()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) == values["kl"].item()
    naive = finetune.naive_loss(model, {LAYER: sae}, tokens, "kl")
    assert naive.item() == pytest.approx(expected.item(), rel=1e-5)

    trained = lora_parameters(model) + [p for p in sae.parameters() if p.requires_grad]
    gradients = (torch.autograd.grad(value, trained) for value in (loss, expected))
    for found, gradient in zip(*gradients, strict=True):
        assert (found - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_has_its_own_rate_and_both_fall(model, tokens, name):
    kind = kind_of(model, "topk", tokens, optimizer={"adamw": adamw, "muon": muon}[name],
                   lr_decay=True, tokens=4 * 48)
    part = kind.frozen(tokens)
    values = [kind.step(part, step) for step in range(4)]
    groups = kind.optimizer.param_groups
    of_adapters = getattr(kind.optimizer.parts[0], "parts", [])
    assert [type(part) for part in of_adapters] == [Muon] * (name == "muon")
    assert [group["lr"] for group in groups] == pytest.approx([2.5e-3, 2.5e-4, 2.5e-4])
    assert [group["weight_decay"] for group in groups] == [0.01, 0, 0]
    assert values[-1]["kl"] < values[0]["kl"]


@pytest.mark.parametrize("sae_kind", ["topk", "jumprelu"])
def test_beside_an_sae_that_stands_still_adapters_train_as_they_do_alone(model, tokens, sae_kind):
    kind = kind_of(model, sae_kind, tokens, dropout=0.1, sae_lr=1e-12)
    parameters, sae = lora_parameters(model), kind.trained.sae
    before = copies(parameters)
    torch.manual_seed(0)
    for step in range(3):
        kind.step(kind.frozen(tokens), step)
    together = copies(parameters)

    with torch.no_grad():
        for parameter, value in zip(parameters, before):
            parameter.copy_(value)
    saes, optimizer = {LAYER: sae.requires_grad_(False)}, adamw(parameters, kind.config)
    first = first_differing(model, saes)
    torch.manual_seed(0)
    for _ in range(3):
        part = adapt.frozen_forward(model, saes, tokens, first)
        adapt.take_step(model, saes, part, first, optimizer, kind.config)
    for found, alone, start in zip(together, parameters, before):
        assert (found - alone).norm() <= 0.02 * (alone - start).norm() + 1e-6


def test_frozen_adapters_stay_while_the_sae_trains_around_them(model, tokens):
    kind = kind_of(model, "jumprelu", tokens, dropout=0.5)
    parameters = lora_parameters(model.requires_grad_(False).eval())
    config = Config(method="finetune", objective="kl", batch_size=2, context=24, lr=1e-2)
    kind = Finetuning(model, LAYER, kind.trained.sae, {}, config, tokens)
    before, part = copies(parameters), kind.frozen(tokens)
    values = [kind.step(part, step) for step in range(6)]
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, before))
    assert values[-1]["kl"] < values[0]["kl"]


# ---- The run -------------------------------------------------------------------------------------

def test_a_run_leaves_both_and_merge_tells_them_apart(site, finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished("both"), tmp_path / "run"))
    assert not torch.equal(load_sae(run).W_enc, load_sae(site / "gemma2/sae").W_enc)
    assert metrics(run)[0].keys() == {
        "step", "tokens", "kl", "fvu", "l0", "grad_norm", "grad_norm_lora"}
    command("train", "--merge", run)
    assert f"the SAE trained with them is {run}/sae/" in capsys.readouterr().out
    assert (run / "merged/model.safetensors").exists()

    both, one = (folder / "adapter" for folder in (run, finished("lora")))
    assert (both / "adapter_config.json").read_bytes() == (one / "adapter_config.json").read_bytes()
    shapes = [{name: tensor.shape for name, tensor in load_file(path).items()}
              for path in (both / "adapter_model.safetensors", one / "adapter_model.safetensors")]
    assert shapes[0] == shapes[1]


def test_there_is_one_gap_and_it_is_that_of_the_sae_as_it_came(site, tmp_path, capsys):
    """What the terminal says, what results.json says, and what eval says, are one number."""
    run, sae = tmp_path / "run", write_sae(tmp_path / "sae", 48, "gemma2")
    arguments = words(site, "both", "--sae", sae, "--lr", 1e-2, "--eval-tokens", 512)
    command("train", *arguments, "--out", run)
    results = read(run / "results.json")
    gap = results["ce_before"] - results["ce_base"]
    closed = (results["ce_before"] - results["ce_adapted"]) / gap
    assert gap > 0 and results["gap_closed"] == pytest.approx(closed)
    sequences = read(run / "sequences.json")["before"]["ce"]
    assert results["ce_before"] == pytest.approx(sum(sequences) / len(sequences))
    command("eval", run)
    again = read(run / "eval-fidelity.json")
    assert again["gap_closed"] == results["gap_closed"]
    found = re.findall(r"(?<!KL )gap closed (-?[\d.]+%)", capsys.readouterr().out)
    assert found == [f"{results['gap_closed']:.1%}"] * 2
