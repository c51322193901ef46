"""Several ranks in one pass: each ends as its own run would, to the bit, and is a run for every other command."""
import pytest
import torch
from safetensors.torch import load_file

from helpers import command, metrics, moved, random_sae, read, refusal
from lorasae import adapt
from lorasae.adapt import first_differing, naive_loss, teach
from lorasae.lora import add_lora, adapters, attach_lora, base, detach_lora, lora_parameters
from lorasae.objectives import linear_kl
from lorasae.runs import sweep

RANKS = (1, 4, 16)
COSTS = ("tokens_per_second", "seconds", "peak_memory_bytes")          # of results.json: what differs from run to run


@pytest.fixture
def arguments(whole_model, sae_folder, text_folder):
    return ["--model", whole_model, "--sae", sae_folder, "--layer", 1, "--data", text_folder, "--context", 32, "--tokens", 1280,
            "--eval-tokens", 256, "--batch-size", 2, "--lr", 1e-3, "--dropout", 0.1, "--dtype", "float32", "--device", "cpu"]


@pytest.mark.parametrize("more", [["--adapt", "all", "--micro-batch", 2], ["--adapt", "after", "--micro-batch", 1, "--lr-decay"]],
                         ids=["all blocks", "parts of a batch"])
def test_each_rank_is_its_own_run_to_the_bit_dropout_included(arguments, tmp_path, more):
    arguments += more
    command("train", *arguments, "--rank", *RANKS, "--out", tmp_path / "sweep")
    shared, together = read(tmp_path / "sweep/results.json"), metrics(tmp_path / "sweep")
    assert list(shared["ranks"]) == [str(rank) for rank in RANKS]
    for rank in RANKS:
        own, of_sweep = tmp_path / f"own-{rank}", tmp_path / f"sweep/rank-{rank}"
        command("train", *arguments, "--rank", rank, "--out", own)
        found, expected = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (of_sweep, own))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert (of_sweep / "adapter/adapter_config.json").read_bytes() == (own / "adapter/adapter_config.json").read_bytes()
        assert read(of_sweep / "config.json") == read(own / "config.json")

        alone, results = read(own / "results.json"), read(of_sweep / "results.json")
        assert results == shared["ranks"][str(rank)] and results.keys() == alone.keys()
        for name in alone.keys() - set(COSTS):
            assert results[name] == alone[name], name
        lines = metrics(own)
        assert [line["step"] for line in lines] == [line["step"] for line in together] == [10, 20]
        for line, all_of_them in zip(lines, together):
            assert (line["kl"], line["grad_norm"]) == (all_of_them[f"kl_r{rank}"], all_of_them[f"grad_norm_r{rank}"])


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
def test_every_rank_is_a_run_that_eval_opens(arguments, tmp_path, capsys):
    command("train", *arguments, "--rank", *RANKS, "--out", tmp_path / "sweep")
    capsys.readouterr()
    command("eval", tmp_path / "sweep")
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith(".json")] == \
        [str(tmp_path / f"sweep/rank-{rank}/eval-fidelity.json") for rank in RANKS]
    for rank in RANKS:
        results, again = (read(tmp_path / f"sweep/rank-{rank}" / name) for name in ("results.json", "eval-fidelity.json"))
        assert again["kl_adapted"] == results["kl_adapted"]
    command("train", "--merge", tmp_path / "sweep/rank-4")
    assert (tmp_path / "sweep/rank-4/merged/model.safetensors").exists()
    assert f"merge one of them, such as {tmp_path / 'sweep'}/rank-1" in refusal("train", "--merge", tmp_path / "sweep")


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
def test_ranks_named_twice_are_refused(arguments, tmp_path):
    assert "twice" in refusal("train", *arguments, "--rank", 4, 4, "--out", tmp_path / "run")
    assert "positive" in refusal("train", *arguments, "--rank", 4, 0, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- One step --------------------------------------------------------------------------------------------------------

def students(model, blocks, dropout=0.0):
    found = []
    for rank in RANKS:
        torch.manual_seed(rank)
        found.append(moved(detach_lora(add_lora(model, blocks, rank, dropout=dropout)), seed=rank))
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_side_by_side_have_the_losses_and_gradients_that_each_has_alone_to_the_bit(model, tokens, dropout):
    tokens = tokens[:, :32]                             # whole vector registers: a last, partial one is rounded by other code
    found, saes = students(model, [2, 3], dropout), {1: random_sae("jumprelu", model)}
    first = first_differing(attach_lora(model.train(), found[0]), saes)
    lesson = teach(model, saes, tokens, first)
    torch.manual_seed(7)
    losses = sweep.learn(model, saes, lesson, first, found)
    losses.sum().backward()
    assert losses.shape == (len(RANKS),)
    drawn = torch.rand(1)                               # every student has drawn the same numbers, as one alone does
    for loss, student in zip(losses, found):
        parameters = lora_parameters(student)
        attach_lora(model, student)
        torch.manual_seed(7)
        alone = adapt.learn(model, saes, lesson, first)
        assert torch.equal(drawn, torch.rand(1))
        assert loss.item() == alone.item()
        for parameter, expected in zip(parameters, torch.autograd.grad(alone, parameters)):
            assert torch.equal(parameter.grad, expected)


def test_each_loss_is_the_naive_one(model, tokens):
    found, saes = students(model, [0, 3]), {1: random_sae("topk", model)}
    first = first_differing(attach_lora(model, found[0]), saes)
    losses = sweep.learn(model, saes, teach(model, saes, tokens, first), first, found)
    for loss, student in zip(losses, found):
        assert loss.item() == pytest.approx(naive_loss(attach_lora(model, student), saes, tokens).item(), rel=1e-4)


def test_the_base_model_is_untouched_under_any_of_several_adapters(model, tokens):
    plain = model(tokens)
    found = students(model, [1])
    assert torch.equal(model(tokens), plain)                            # detached again
    logits = []
    for student in found:
        attach_lora(model, student)
        with base(model):
            assert torch.equal(model(tokens), plain)
        logits.append(model(tokens))
        assert not torch.equal(logits[-1], plain)
    assert not torch.equal(logits[0], logits[1])
    attach_lora(model, found[0])
    assert torch.equal(model(tokens), logits[0]) and sorted(adapters(model)) == sorted(found[0])


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
