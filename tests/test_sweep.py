"""Several ranks in one pass: each ends as its own run would, costs less than one, and is a run for every other command."""
import json

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import train
from lorasae.adapt import first_differing, learn, teach
from lorasae.lora import add_lora, adapters, attach_lora, base, detach_lora, lora_parameters
from lorasae.objectives import linear_kl

RANKS = (1, 4, 16)


@pytest.fixture
def arguments(whole_model, sae_folder, text_folder):
    return [str(word) for word in (
        "--model", whole_model, "--sae", sae_folder, "--layer", 1, "--data", text_folder, "--context", 32, "--tokens", 1280,
        "--eval-tokens", 256, "--batch-size", 2, "--lr", 1e-3, "--dropout", 0.1, "--dtype", "float32", "--device", "cpu")]


def command(script, *words):
    script.main([str(word) for word in words])


@pytest.mark.parametrize("adapt, micro_batch", [("all", 2), ("after", 1)])
def test_each_rank_ends_as_its_own_run(arguments, tmp_path, adapt, micro_batch):
    arguments += ["--adapt", adapt, "--micro-batch", str(micro_batch)]
    command(train, *arguments, "--rank", *RANKS, "--out", tmp_path / "sweep")
    together = json.loads((tmp_path / "sweep/results.json").read_text())["ranks"]
    lines = [json.loads(line) for line in (tmp_path / "sweep/metrics.jsonl").read_text().splitlines()]
    for rank in RANKS:
        command(train, *arguments, "--rank", rank, "--out", tmp_path / f"own-{rank}")
        found, expected = (load_file(folder / "adapter/adapter_model.safetensors")
                           for folder in (tmp_path / f"sweep/rank-{rank}", tmp_path / f"own-{rank}"))
        assert found.keys() == expected.keys()
        for name in expected:                           # Adam divides a gradient by its size: rounding shows where there is none
            assert (found[name] - expected[name]).norm() <= 1e-3 * expected[name].norm(), name
        alone = json.loads((tmp_path / f"own-{rank}/results.json").read_text())
        for key in ("ce_base", "ce_sae", "ce_adapted", "kl_adapted"):
            assert together[str(rank)][key] == pytest.approx(alone[key], rel=1e-5)
        last = json.loads((tmp_path / f"own-{rank}/metrics.jsonl").read_text().splitlines()[-1])
        assert lines[-1][f"kl_r{rank}"] == pytest.approx(last["kl"], rel=1e-4)
        assert lines[-1][f"grad_norm_r{rank}"] == pytest.approx(last["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
def test_every_rank_is_a_run_that_eval_opens(arguments, tmp_path, capsys):
    command(train, *arguments, "--rank", *RANKS, "--out", tmp_path / "sweep")
    capsys.readouterr()
    command(evaluation, tmp_path / "sweep")
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith(".json")] == \
        [str(tmp_path / f"sweep/rank-{rank}/eval-fidelity.json") for rank in RANKS]
    for rank in RANKS:
        results, again = (json.loads((tmp_path / f"sweep/rank-{rank}" / name).read_text())
                          for name in ("results.json", "eval-fidelity.json"))
        assert again["kl_adapted"] == pytest.approx(results["kl_adapted"], rel=1e-5)
    command(train, "--merge", tmp_path / "sweep/rank-4")
    assert (tmp_path / "sweep/rank-4/merged/model.safetensors").exists()


def test_ranks_named_twice_are_refused(arguments):
    with pytest.raises(SystemExit, match="twice"):
        command(train, *arguments, "--rank", 4, 4)
    with pytest.raises(SystemExit, match="positive"):
        command(train, *arguments, "--rank", 4, 0)


def students(model, blocks):
    found = []
    for rank in RANKS:
        torch.manual_seed(rank)
        found.append(detach_lora(add_lora(model, blocks, rank, dropout=0.0)))
        for module in found[-1].values():
            torch.nn.init.normal_(module.lora_B.weight, std=0.05)
    return found


def test_adapters_side_by_side_have_their_own_losses_and_gradients(model, tokens):
    found = students(model, [2, 3])
    first = first_differing(attach_lora(model, *found), {})
    losses = learn(model, {}, *teach(model, {}, tokens, None, first), None, first, len(RANKS))
    losses.sum().backward()
    for loss, student in zip(losses, found):
        parameters = lora_parameters(student)
        together = [parameter.grad for parameter in parameters]
        attach_lora(model, student)
        alone = learn(model, {}, *teach(model, {}, tokens, None, first), None, first)
        assert loss.item() == pytest.approx(alone.item(), rel=1e-4)
        for gradient, expected in zip(together, torch.autograd.grad(alone, parameters)):
            assert (gradient - expected).norm() <= 1e-3 * expected.norm() + 1e-6


def test_the_base_model_is_untouched_under_several_adapters(model, tokens):
    plain = model(tokens)
    found = students(model, [1])
    assert torch.equal(model(tokens), plain)                            # detached again
    attach_lora(model, *found)
    with base(model):
        assert torch.equal(model(tokens), plain)
    assert not torch.equal(model(tokens.repeat(len(RANKS), 1))[:2], plain)
    attach_lora(model, found[0])
    assert sorted(adapters(model)) == sorted(found[0])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_several_students_share_the_teachers_logits(softcap):
    generator = torch.Generator().manual_seed(0)
    target, weight = torch.randn(21, 8, generator=generator), torch.randn(50, 8, generator=generator)
    hidden = torch.randn(3, 21, 8, generator=generator, requires_grad=True)
    losses = linear_kl(target, hidden, weight, softcap, chunk=4)
    scale = torch.tensor([1.0, -2.0, 3.0])
    together, = torch.autograd.grad((losses * scale).sum(), hidden)
    for s in range(3):
        own = hidden[s].detach().requires_grad_()
        loss = linear_kl(target, own, weight, softcap)
        loss.backward()
        assert losses[s].item() == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(together[s], scale[s] * own.grad, rtol=1e-4, atol=1e-5)
