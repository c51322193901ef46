"""Several adapters in one pass: each ends as if trained alone, and every command accepts it."""
import pytest
import torch

from helpers import command, metrics, moved, random_sae, read, without_costs, words
from lorasae import adapt
from lorasae.lora import add_lora, attach_lora, detach_lora, lora_parameters
from lorasae.runs.adapting import Adapting
from lorasae.runs.config import Config

RANKS = (1, 4, 16)
RATES = (1e-3, 2e-3)


@pytest.mark.parametrize("model, several, alone, more", [
    ("llama", ["--rank", *RANKS], {f"rank-{R}": ["--rank", R] for R in RANKS},
     ["--adapt", "after", "--micro-batch", 1, "--lr-decay"]),
    ("gemma2", ["--lr", *RATES], {f"lr-{lr}": ["--lr", lr] for lr in RATES}, ["--ahead", 8]),
    ("gemma2", ["--rank", 4, 1, "--lr", *RATES],
     {f"rank-{R}-lr-{lr}": ["--rank", R, "--lr", lr] for R in (4, 1) for lr in RATES},
     ["--optimizer", "muon"])],
    ids=["ranks, parts of a batch", "rates", "both"])
def test_each_adapter_equals_the_one_of_a_separate_run(site, tmp_path, model, several, alone, more):
    arguments = words(site, "lora", "--tokens", 256, *more, model=model)
    command("train", *arguments, *several, "--out", tmp_path / "sweep")
    shared, together = read(tmp_path / "sweep/results.json"), metrics(tmp_path / "sweep")
    for name, how in alone.items():
        own, of_sweep = tmp_path / name, tmp_path / "sweep" / name
        command("train", *arguments, *how, "--out", own)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            found, expected = (folder / "adapter" / file for folder in (of_sweep, own))
            assert found.read_bytes() == expected.read_bytes()
        assert read(of_sweep / "config.json") == read(own / "config.json")
        results = read(of_sweep / "results.json")
        assert without_costs(results) == without_costs(read(own / "results.json"))
        kind, = (key for key in shared if key in ("ranks", "rates", "ranks and rates"))
        assert shared[kind][name.replace("rank-", "").replace("lr-", "")] == results

        short = name.replace("rank-", "r").replace("lr-", "lr")
        for line, of_all in zip(metrics(own), together, strict=True):
            for value in ("step", "tokens"):
                assert line[value] == of_all[value]
            for value in ("kl", "grad_norm"):
                assert line[value] == of_all[f"{value}_{short}"]


def several(model, blocks, dropout=0.0):
    """Adapters of each rank, detached and not the identity."""
    found = []
    for rank in RANKS:
        torch.manual_seed(rank)
        fresh = detach_lora(add_lora(model, blocks, rank, dropout=dropout))
        found.append(moved(fresh, seed=rank))
    return found


def kind_of(model, saes, found):
    config = Config(rank=RANKS, batch_size=2, context=32)
    attach_lora(model, found[0])
    return Adapting(model, saes, found, config)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_losses_and_gradients_match_each_adapter_alone_bit_for_bit(model, tokens, dropout):
    tokens = tokens[:, :32]             # fills vector registers; a remainder rounds differently
    found, saes = several(model, [2, 3], dropout), {1: random_sae("jumprelu", model)}
    kind = kind_of(model.train(), saes, found)
    part = kind.frozen(tokens)
    torch.manual_seed(7)
    losses, _ = kind.losses(part)
    losses.sum().backward()
    drawn = torch.rand(1)               # all have drawn the numbers that one alone draws
    assert losses.shape == (len(RANKS),)
    for loss, own in zip(losses, found):
        parameters = lora_parameters(own)
        attach_lora(model, own)
        torch.manual_seed(7)
        alone, _ = adapt.adapted_loss(model, saes, part, kind.first, kind.config)
        assert torch.equal(drawn, torch.rand(1)) and loss.item() == alone.item()
        for parameter, expected in zip(parameters, torch.autograd.grad(alone, parameters)):
            assert torch.equal(parameter.grad, expected)
