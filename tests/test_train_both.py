"""Adapters and SAE trained together: every gradient, two rates, and a run that evaluates, merges and resumes as others do."""
import json

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import train as training
from helpers import counted, interrupted_after
from lorasae import adapt
from lorasae.beyond import finetune
from lorasae.adapt import adamw, first_differing, teach
from lorasae.beyond.finetune import hold, naive_loss
from lorasae.io.saes import load_sae
from lorasae.lora import add_lora, lora_parameters
from lorasae.beyond.muon import Muon
from lorasae.runs.config import Config, read_config
from test_finetune import LAYER, close, command, gradients, random_sae, read, refusal


@pytest.fixture
def tokens(model):
    tokens = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = model.config.bos_token_id
    return tokens


def setting(model, kind, tokens, dropout=0.0):
    """(SAE, Held, adapters' parameters): adapters that are not the identity, where the paper puts them."""
    sae = random_sae(kind, model.config.hidden_size)
    learned = ~model.special(tokens) | sae.on_special
    held = hold(sae, model.run(model.embed(tokens), 0, LAYER + 1)[learned])
    torch.manual_seed(0)
    blocks = range(4) if kind == "topk" else range(LAYER + 1, 4)
    parameters = lora_parameters(add_lora(model, blocks, rank=3, dropout=dropout))
    for parameter in parameters[1::2]:
        torch.nn.init.normal_(parameter, std=0.05)
    return sae, held, parameters


# ---- One step ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_every_gradient_of_both_is_that_of_equation_7(model, tokens, kind):
    sae, held, adapters = setting(model, kind, tokens)
    if kind == "jumprelu":
        sae.threshold.requires_grad_(False)
    first = finetune.first_trained(model, LAYER)
    assert first == (0 if kind == "topk" else LAYER + 1)
    lesson = teach(model, {}, tokens, first)
    learners = finetune.Learners(LAYER, sae, held, lora_parameters(model))
    loss, _ = finetune.learn(model, learners, lesson, first, Config())
    expected = adapt.naive_loss(model, {LAYER: sae}, tokens) / tokens.numel()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)

    of_adapters = torch.autograd.grad(loss, adapters, retain_graph=True)
    for found, gradient in zip(of_adapters, torch.autograd.grad(expected, adapters, retain_graph=True)):
        assert (found - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7
    close(gradients(loss, sae), gradients(expected, sae))
    naive = naive_loss(model, {LAYER: sae}, tokens, "kl")
    assert naive.item() == pytest.approx(expected.item(), rel=1e-5)


def take_steps(model, sae, held, adapters, tokens, steps, sae_lr, **how):
    config = Config(tokens=48 * steps, batch_size=2, context=24, lr=1e-2, **how)
    lesson = teach(model, {}, tokens, finetune.first_trained(model, LAYER))
    learners = finetune.Learners(LAYER, sae, held, adapters)
    optimizer = finetune.optimizers(learners, config, sae_lr)
    values = [values for _, values in
              finetune.train(model, learners, [lesson] * steps, optimizer, config)]
    return values, optimizer, config


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_has_its_own_rate_and_both_fall(model, tokens, name):
    sae, held, adapters = setting(model, "topk", tokens)
    values, optimizer, _ = take_steps(model, sae, held, adapters, tokens, 4, sae_lr=1e-3, lr_decay=True, optimizer=name)
    assert isinstance(optimizer.parts[0], Muon) == (name == "muon")
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2.5e-3, 2.5e-4, 2.5e-4])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0, 0]
    assert values[-1]["kl"] < values[0]["kl"]


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_beside_an_sae_that_stands_still_adapters_train_as_they_do_alone(model, tokens, kind):
    sae, held, adapters = setting(model, kind, tokens, dropout=0.1)
    before = [parameter.detach().clone() for parameter in adapters]
    _, _, config = take_steps(model, sae, held, adapters, tokens, 3, sae_lr=1e-12)
    together = [parameter.detach().clone() for parameter in adapters]

    with torch.no_grad():
        for parameter, value in zip(adapters, before):
            parameter.copy_(value)
    saes = {LAYER: sae.requires_grad_(False)}
    lesson = teach(model, saes, tokens, first_differing(model, saes))
    for _ in adapt.train(model, saes, [lesson] * 3, adamw(adapters, config), config):
        pass
    for found, alone, start in zip(together, adapters, before):
        assert (found - alone).norm() <= 0.02 * (alone - start).norm() + 1e-6


def test_frozen_adapters_stay_while_the_sae_learns_around_them(model, tokens):
    sae, held, adapters = setting(model, "jumprelu", tokens, dropout=0.5)
    model.requires_grad_(False)
    before = [parameter.clone() for parameter in adapters]
    values, _, _ = take_steps(model, sae, held, [], tokens, 6, sae_lr=1e-2)
    assert all(torch.equal(parameter, value) for parameter, value in zip(adapters, before))
    assert values[-1]["kl"] < values[0]["kl"]


# ---- The run -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def arguments(whole_model, sae_folder, text_folder):
    return ["--train-sae", "--model", whole_model, "--sae", sae_folder, "--layer", LAYER, "--data", text_folder, "--context", 32,
            "--tokens", 640, "--eval-tokens", 256, "--batch-size", 2, "--rank", 3, "--lr", 3e-3, "--sae-lr", 1e-3, "--dropout", 0.1,
            "--dtype", "float32", "--device", "cpu"]


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
def test_a_run_leaves_both_which_eval_opens_and_merge_tells_apart(arguments, sae_folder, tmp_path, capsys):
    run = tmp_path / "run"
    command(training, *arguments, "--out", run)
    results = read(run / "results.json")
    assert results["kl_adapted"] < results["before"]["kl_sae"] and results["closed"]["kl_gap_closed"] > 0
    assert {path.name for path in (run / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert not torch.equal(load_sae(run).W_enc, load_sae(sae_folder).W_enc)
    names = {line["step"]: set(line) for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}[10]
    assert {"kl", "l0", "fvu", "grad_norm", "grad_norm_lora"} <= names

    command(evaluation, run)
    again = read(run / "eval-fidelity.json")
    for name in ("ce_base", "ce_sae", "ce_adapted", "kl_sae", "kl_adapted", "kl_lora", "kl_gap_closed"):
        assert again[name] == pytest.approx(results[name], rel=1e-6), name

    capsys.readouterr()
    command(training, "--merge", run)
    said = capsys.readouterr().out
    assert f"the SAE that was trained with them is {run}/sae/" in said
    assert (run / "merged/model.safetensors").exists()


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
def test_the_adapters_files_are_those_of_a_run_without_the_sae(arguments, tmp_path):
    command(training, *arguments, "--out", tmp_path / "both")
    alone = [word for i, word in enumerate(arguments) if word not in ("--train-sae", "--sae-lr") and arguments[i - 1] != "--sae-lr"]
    command(training, *alone, "--out", tmp_path / "alone")
    both, one = (tmp_path / name / "adapter" for name in ("both", "alone"))
    assert (both / "adapter_config.json").read_bytes() == (one / "adapter_config.json").read_bytes()
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (both, one))
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in expected.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("raw_config", ["llama"], indirect=True)
def test_an_interrupted_run_resumes_to_the_bit(arguments, tmp_path, optimizer):
    arguments += ["--checkpoint-every", 4, "--optimizer", optimizer]
    command(training, *arguments, "--out", tmp_path / "whole")
    with interrupted_after(6, finetune, "take_step"), pytest.raises(SystemExit):
        command(training, *arguments, "--out", tmp_path / "cut")
    with counted(finetune, "take_step") as steps:
        command(training, "--resume", tmp_path / "cut")
    assert len(steps) == read_config(tmp_path / "cut").steps - 4        # from the checkpoint, not from the beginning
    for file in ("adapter/adapter_model.safetensors", "sae/sae_weights.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
def test_what_cannot_be_trained_together_is_refused_in_one_line(arguments):
    assert "without --train-sae" in refusal(*arguments[1:])
    assert "one --rank and one --lr" in refusal(*arguments, "--rank", 2, 4)
    assert "one --rank and one --lr" in refusal(*arguments, "--lr", 1e-3, 1e-2)
    assert "--objective has no effect" in refusal(*arguments, "--objective", "mse")
    assert "--micro-batch 1" in refusal(*arguments, "--micro-batch", 1)
    assert "has none" in refusal(*arguments, "--thresholds", "frozen")
