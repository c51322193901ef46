"""The method: its step against Eq. 7 with all logits, where adapters go, and special tokens."""
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from helpers import adapted, random_sae, refuses, same_tensors, some_tokens
from lorasae.adapt import (
    adamw, adapted_loss, first_differing, frozen_forward, naive_loss, naive_train, take_step)
from lorasae.lora import add_lora, lora_parameters
from lorasae.runs.adapting import blocks_to_adapt
from lorasae.runs.training import compiled_blocks, set_rates, step_seed
from lorasae.sae import StandIn, splice

CONFIG = SimpleNamespace(                               # the fields of a Config that a step reads
    batch_size=2, micro_batch=2, steps=5, lr=1e-2, lr_decay=False, weight_decay=0.01, clip=1.0,
    seed=42, compile=False)


def config(**how):
    return SimpleNamespace(**{**vars(CONFIG), **how})


@pytest.fixture
def text(model):
    """Tokens [2, 40] with BOS in front, and EOS in the middle of one row."""
    return some_tokens(model)


def loss_of(model, saes, tokens, compile=False):
    """Runs both parts of a step and returns its loss."""
    first = first_differing(model, saes)
    part = frozen_forward(model, saes, tokens, first)
    loss, values = adapted_loss(model, saes, part, first, config(compile=compile))
    assert not values["kl"].requires_grad
    return loss


# ---- The loss ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kinds, blocks", [
    ({1: "jumprelu"}, [2, 3]), ({1: "topk"}, [0, 1, 2, 3]), ({1: "jumprelu"}, [3]),
    ({0: "topk", 2: "topk"}, [1, 2, 3]), ({3: "topk"}, [0, 1, 2, 3]), ({2: "topk"}, [0]),
    ({0: "jumprelu", 2: "topk"}, [1, 3]), ({0: "topk", 1: "jumprelu"}, [2, 3]),
    ({0: "jumprelu", 3: "jumprelu"}, [1])], ids=str)
@pytest.mark.parametrize("on_special", [False, True, None])             # None: by kind
def test_a_step_has_the_value_and_every_gradient_of_the_naive_loss(
        model, text, kinds, blocks, on_special):
    saes = {layer: random_sae(kind, model, seed=layer, on_special=on_special)
            for layer, kind in kinds.items()}
    parameters = lora_parameters(adapted(model, blocks))
    naive = naive_loss(model, saes, text)
    expected = torch.autograd.grad(naive, parameters, allow_unused=True)
    loss = loss_of(model, saes, text)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert naive > 1 and loss.item() == pytest.approx(naive.item(), rel=1e-4)
    same_tensors(found, expected)


@pytest.mark.parametrize("site", ["resid", "mlp"])
def test_compiled_blocks_take_the_same_step(model, text, site):
    """Each block is one graph in each role. aot_eager is torch.compile without generated code."""
    del model.layers[:2]                                # two are enough, and quicker
    saes, parameters = {0: random_sae("topk", model)}, lora_parameters(adapted(model, [0]))
    saes[0].site = site

    def step():
        loss = loss_of(model.train(), saes, text)
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    expected, plain = step(), model.layers[0].forward
    with compiled_blocks(model, backend="aot_eager"):
        assert model.layers[0].forward != plain
        same_tensors(step(), expected, 1e-4)
    assert model.layers[0].forward == plain


@pytest.mark.cuda
def test_the_compiled_step_on_a_gpu_matches_the_plain_one(model, text):
    """Inductor, FlexAttention under a soft-cap, and the compiled loss, as train.py uses them."""
    model, text, saes = model.cuda(), text.cuda(), {1: random_sae("jumprelu", model).cuda()}
    parameters, steps = lora_parameters(adapted(model, [2, 3])), []
    for compiled in (False, True):
        with compiled_blocks(model) if compiled else nullcontext():
            loss = loss_of(model.train(), saes, text, compiled)
            steps.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    for plain, fast in zip(*steps):
        assert (plain - fast).norm() <= 1e-2 * plain.norm() + 1e-5


# ---- The step and the loop -----------------------------------------------------------------------

@pytest.mark.parametrize("kind, blocks", [("jumprelu", [2, 3]), ("topk", [0, 1, 2, 3])])
def test_fast_steps_train_the_same_adapters_as_the_naive_loop(model, kind, blocks, monkeypatch):
    saes, how = {1: random_sae(kind, model).double()}, config()
    g = torch.Generator().manual_seed(0)
    batches = [torch.randint(3, 97, (2, 40), generator=g) for _ in range(5)]
    # In fp64 throughout: AdamW magnifies rounding where a gradient is nearly 0.
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    parameters = lora_parameters(adapted(model, blocks).double())
    start = [parameter.detach().clone() for parameter in parameters]
    losses = list(naive_train(model, saes, batches, lr=how.lr))
    naive = [parameter.detach().clone() for parameter in parameters]
    assert not model.training

    for parameter, value in zip(parameters, start):
        parameter.data.copy_(value)
    optimizer, first = adamw(parameters, how), first_differing(model, saes)
    for tokens, loss in zip(batches, losses, strict=True):
        part = frozen_forward(model, saes, tokens, first)
        values = take_step(model, saes, part, first, optimizer, how)
        assert values["kl"].item() == pytest.approx(loss, rel=1e-4)
    for found, expected, before in zip(parameters, naive, start):
        assert (found - expected).norm() <= 1e-9 * (expected - before).norm()


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_step_is_clipped_adamw_on_the_loss_averaged_over_its_sequences(model, text, micro_batch):
    """Compares with PyTorch's own AdamW, not fused, on the naive loss."""
    saes, how = {1: random_sae("topk", model)}, config(micro_batch=micro_batch)
    parameters = lora_parameters(adapted(model, [1, 2]))
    before = [parameter.detach().clone() for parameter in parameters]

    naive = naive_loss(model, saes, text) / 2
    gradients = torch.autograd.grad(naive, parameters)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert norm > how.clip                              # clipped, as with the paper's settings
    twins = [parameter.clone().requires_grad_() for parameter in before]
    for twin, gradient in zip(twins, gradients):
        twin.grad = gradient / norm * how.clip
    torch.optim.AdamW(twins, lr=how.lr, weight_decay=how.weight_decay).step()

    first = first_differing(model, saes)
    part = frozen_forward(model, saes, text, first)
    values = take_step(model, saes, part, first, adamw(parameters, how), how)
    assert values["kl"].item() == pytest.approx(naive.item() / 40, rel=1e-4)
    assert values["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-3)
    for parameter, twin, start in zip(parameters, twins, before):
        change = (twin - start).norm()                  # Adam divides a gradient by its size
        assert (parameter - twin).norm() <= 2e-2 * change
    assert all(parameter.grad is None for parameter in parameters)


def test_the_learning_rate_falls_and_every_step_and_process_has_its_own_seed():
    group = {"rate": 0.5}
    for decay, expected in ((True, [0.5, 0.4, 0.3, 0.2, 0.1]), (False, 5 * [0.5])):
        for step in range(5):
            set_rates(SimpleNamespace(param_groups=[group]), step, config(lr_decay=decay))
            assert group["lr"] == pytest.approx(expected[step])
    seeds = {step_seed(seed, step, process)
             for seed in (0, 2 ** 62) for step in range(20) for process in range(3)}
    assert len(seeds) == 2 * 20 * 3 and step_seed(1, 2) == step_seed(1, 2, 0)


# ---- Where adapters go ---------------------------------------------------------------------------

def test_the_right_blocks_are_adapted_and_the_first_that_differs_is_found(model):
    topk, jumprelu = (random_sae(kind, model) for kind in ("topk", "jumprelu"))
    one, several = {1: jumprelu}, {0: None, 2: None, 3: None}
    assert blocks_to_adapt(("after",), one, 4) == [2, 3]
    assert blocks_to_adapt(("after",), several, 4) == [1, 2, 3]
    assert blocks_to_adapt(("next",), several, 4) == [1, 3]
    assert blocks_to_adapt(("all",), one, 4) == [0, 1, 2, 3]
    assert blocks_to_adapt(("3", "1"), one, 4) == [1, 3]
    assert blocks_to_adapt((), one, 4) == [2, 3]
    assert blocks_to_adapt((), {1: topk}, 4) == [0, 1, 2, 3]
    assert blocks_to_adapt((), {1: topk, 2: jumprelu}, 4) == [2, 3]
    for word in ("before", "²", "-1"):
        refuses("after, all, next", blocks_to_adapt, (word,), one, 4)

    assert first_differing(model, {}) == 4 and first_differing(model, {2: topk}) == 3
    assert first_differing(model, {3: topk, 0: topk}) == 1
    add_lora(model, [1, 3], 2)
    assert first_differing(model, {2: topk}) == 1 and first_differing(model, {0: topk}) == 1


# ---- BOS and EOS ---------------------------------------------------------------------------------

def test_a_wrapped_sae_adds_part_of_its_error_back(model, text):
    """The example in StandIn's docstring."""
    sae, special = random_sae("jumprelu", model), model.special(text)
    half = StandIn(sae, lambda x: sae(x) + 0.5 * (x - sae(x)))
    assert half.W_dec is sae.W_dec and StandIn(sae, sae, everywhere=True).on_special
    with pytest.raises(AttributeError):
        StandIn(lambda x: x).threshold
    assert not torch.equal(model(text, {1: sae.forward}), model(text, {1: sae}))

    x = model.run(model.embed(text), 0, 2)
    found = splice(x, half, special)
    torch.testing.assert_close(found, (x + splice(x, sae, special)) / 2)
    assert torch.equal(found[special], x[special])
    adapted(model, [2, 3])
    naive = naive_loss(model, {1: half}, text)
    assert naive < naive_loss(model, {1: sae}, text)
    assert loss_of(model, {1: half}, text).item() == pytest.approx(naive.item(), rel=1e-4)


@pytest.mark.parametrize("first, second", [("jumprelu", "topk"), ("topk", "jumprelu")])
def test_saes_of_both_kinds_are_spliced_together_each_by_its_own_rule(model, text, first, second):
    saes = {0: random_sae(first, model), 2: random_sae(second, model, seed=1)}
    x, special = model.embed(text), model.special(text)[..., None]
    for layer in range(4):
        x = model.run(x, layer, layer + 1)
        if layer in saes:
            x_hat = saes[layer](x)
            x = x_hat if saes[layer].on_special else torch.where(special, x, x_hat)
    torch.testing.assert_close(model(text, saes), model.logits(x))


def test_running_blocks_without_the_positions_of_bos_refuses_an_sae_that_skips_it(model, text):
    x = model.embed(text)
    refuses("special=model.special", model.run, x, 0, 2, {1: random_sae("jumprelu", model)})
    model.run(x, 0, 1, {1: random_sae("jumprelu", model)})  # does not run block 1
    model.run(x, 0, 2, {1: random_sae("topk", model)})
    model.run(x, 0, 2, {1: random_sae("jumprelu", model, on_special=True)})
