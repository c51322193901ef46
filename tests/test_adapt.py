"""The method: one step against the formula with every logit and no sharing, and what the paper's settings promise."""
from contextlib import nullcontext

import pytest
import torch

from helpers import adapted, random_sae
from lorasae.adapt import (adamw, blocks_to_adapt, compiled_blocks, first_differing, learn, naive_loss, split, step_seed,
                           take_step, teach, train)
from lorasae.errors import InputError
from lorasae.lora import add_lora, base, lora_parameters
from lorasae.objectives import naive_kl
from lorasae.runs.config import Config


@pytest.fixture
def text(model, tokens):
    """[2, 40] with BOS in front and EOS in the middle of one."""
    tokens[:, 0] = model.config.bos_token_id
    tokens[1, 17] = model.config.eos_token_id
    return tokens


def loss_of(model, saes, tokens, compiled=False):
    """teach and learn, one after the other."""
    first = first_differing(model, saes)
    return learn(model, saes, teach(model, saes, tokens, first), first, compiled)


def same_gradients(found, expected, tolerance=1e-3):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= tolerance * b.norm() + 1e-6


# ---- The loss --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kinds, blocks", [
    ({1: "jumprelu"}, [2, 3]), ({1: "topk"}, [0, 1, 2, 3]), ({1: "jumprelu"}, [3]), ({0: "topk", 2: "topk"}, [1, 2, 3]),
    ({3: "topk"}, [0, 1, 2, 3]), ({2: "topk"}, [0]), ({0: "jumprelu", 2: "topk"}, [1, 3]), ({0: "topk", 1: "jumprelu"}, [2, 3]),
    ({0: "jumprelu", 3: "jumprelu"}, [1])], ids=str)
@pytest.mark.parametrize("on_special", [False, True, None], ids=["never saw BOS", "saw BOS", "by kind"])
def test_a_step_is_the_naive_loss_by_value_and_every_gradient(model, text, kinds, blocks, on_special):
    how = {} if on_special is None else {"on_special": on_special}
    saes = {layer: random_sae(kind, model, seed=layer, **how) for layer, kind in kinds.items()}
    parameters = lora_parameters(adapted(model, blocks))
    naive = naive_loss(model, saes, text)
    expected = torch.autograd.grad(naive, parameters, allow_unused=True)
    loss = loss_of(model, saes, text)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert naive > 1 and loss.item() == pytest.approx(naive.item(), rel=1e-4)
    same_gradients(found, expected)


def test_the_naive_loss_is_the_kl_of_the_objectives(model, text):
    """Eq. 7 written with logits, against the KL of two final hidden states."""
    saes = {1: random_sae("topk", model)}
    adapted(model, [0, 2])
    with torch.no_grad(), base(model):
        target = model.norm(model.run(model.embed(text), 0, 4))
    hidden = model.norm(model.run(model.embed(text), 0, 4, saes))
    assert naive_loss(model, saes, text).item() == pytest.approx(naive_kl(target, hidden, model.head, model.softcap).item(), rel=1e-4)


def test_without_an_sae_and_at_the_start_nothing_differs(model, text):
    add_lora(model, [1, 2], 3)
    assert naive_loss(model, {}, text).item() == pytest.approx(0, abs=1e-4) == pytest.approx(loss_of(model, {}, text).item(), abs=1e-4)


def test_the_lesson_depends_on_nothing_that_trains(model, text):
    saes = {1: random_sae("jumprelu", model)}
    first = first_differing(adapted(model, [2, 3]), saes)
    before = teach(model, saes, text, first)
    adapted_again = [parameter.data.add_(1) for parameter in lora_parameters(model)]
    assert adapted_again and all(torch.equal(a, b) for a, b in zip(before, teach(model, saes, text, first)))


@pytest.mark.parametrize("kind, blocks", [("jumprelu", [2, 3]), ("topk", [0, 1, 2, 3])])
def test_compiled_blocks_take_the_same_step(model, text, kind, blocks):
    """Every block is one graph, in each of its roles: prefix, teacher, student. aot_eager is all of torch.compile but its code."""
    saes, parameters = {1: random_sae(kind, model)}, lora_parameters(adapted(model, blocks))

    def step():
        loss = loss_of(model.train(), saes, text)
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    expected, plain = step(), model.layers[0].forward
    with compiled_blocks(model, backend="aot_eager"):
        assert model.layers[0].forward != plain
        same_gradients(step(), expected, 1e-4)
    assert model.layers[0].forward == plain


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_compiled_step_of_a_gpu_is_the_plain_one(model, text):
    """Inductor, FlexAttention where there is a soft-cap, and the compiled loss, as train.py uses them there."""
    model, text, saes = model.cuda(), text.cuda(), {1: random_sae("jumprelu", model).cuda()}
    parameters, steps = lora_parameters(adapted(model, [2, 3])), []
    for compiled in (False, True):
        with compiled_blocks(model) if compiled else nullcontext():
            loss = loss_of(model.train(), saes, text, compiled)
            steps.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    for plain, fast in zip(*steps):
        assert (plain - fast).norm() <= 1e-2 * plain.norm() + 1e-5


def test_parts_of_a_batch_add_up_to_its_gradient(model, text):
    saes, parameters = {1: random_sae("topk", model)}, lora_parameters(adapted(model, [0, 1, 2, 3]))
    whole = torch.autograd.grad(loss_of(model, saes, text), parameters)
    parts = [torch.autograd.grad(loss_of(model, saes, part), parameters) for part in text.split(1)]
    for a, *b in zip(whole, *parts):
        torch.testing.assert_close(a, sum(b), rtol=1e-3, atol=1e-5)


# ---- The step and the loop -------------------------------------------------------------------------------------------

def config(**how):
    values = dict(batch_size=2, context=40, tokens=5 * 80, lr=1e-2)
    return Config(**{**values, **how})


def lessons(model, saes, count):
    first = first_differing(model, saes)
    for i in range(count):
        tokens = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(i))
        yield teach(model, saes, tokens, first)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_step_is_clipped_adamw_on_the_loss_averaged_over_its_sequences(model, text, micro_batch):
    """By PyTorch's own AdamW, not fused, on the naive loss."""
    saes, how = {1: random_sae("topk", model)}, config(micro_batch=micro_batch)
    parameters = lora_parameters(adapted(model, [1, 2]))
    before = [parameter.detach().clone() for parameter in parameters]

    naive = naive_loss(model, saes, text) / 2
    naive.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()
    gradients = [parameter.grad / norm * how.clip for parameter in parameters]
    assert norm > how.clip                              # it binds, as with the paper's settings
    twins = [parameter.clone().requires_grad_() for parameter in before]
    plain = torch.optim.AdamW(twins, lr=how.lr, weight_decay=how.weight_decay)
    for twin, gradient in zip(twins, gradients):
        twin.grad = gradient
    plain.step()

    model.zero_grad()
    first = first_differing(model, saes)
    total, found = take_step(model, saes, teach(model, saes, text, first), first, adamw(parameters, how), how)
    assert total.item() == pytest.approx(naive.item(), rel=1e-4) and found.item() == pytest.approx(norm.item(), rel=1e-3)
    for parameter, twin, start in zip(parameters, twins, before):
        assert (parameter - twin).norm() <= 2e-2 * (twin - start).norm()       # Adam divides a gradient by its size
    assert all(parameter.grad is None for parameter in parameters)


def test_split_gives_every_sequence_once_and_in_order(model, text):
    lesson = teach(model, {}, text, 2)
    parts = split(lesson, 1)
    assert len(parts) == 2
    for whole, *pieces in zip(lesson, *parts):
        assert torch.equal(whole, torch.cat(pieces))


def weights_after(model, saes, how, start, state=None, stop=None):
    """Trains from step `start` on; the parameters, and what was yielded."""
    parameters = lora_parameters(model)
    optimizer = adamw(parameters, how)
    if state:
        optimizer.load_state_dict(state)
    source = list(lessons(model, saes, how.steps))[start:stop]
    seen = [(done, loss.item(), norm.item()) for done, loss, norm in train(model, saes, iter(source), optimizer, how, start)]
    return [parameter.detach().clone() for parameter in parameters], seen, optimizer.state_dict()


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
def test_the_loop_takes_a_step_a_lesson_and_continues_where_it_is_told(model):
    saes, how = {1: random_sae("jumprelu", model)}, config(lr_decay=True)
    add_lora(model, [2, 3], 3, dropout=0.3)
    start = [parameter.detach().clone() for parameter in lora_parameters(model)]
    whole, seen, _ = weights_after(model, saes, how, 0)
    assert [done for done, _, _ in seen] == [1, 2, 3, 4, 5] and not model.training
    for parameter, value in zip(lora_parameters(model), start):
        parameter.data.copy_(value)
    _, first, state = weights_after(model, saes, how, 0, stop=2)
    resumed, rest, _ = weights_after(model, saes, how, 2, state)
    assert first + rest == seen and all(torch.equal(a, b) for a, b in zip(resumed, whole))


def test_every_step_and_process_draws_its_own_random_numbers():
    seeds = {step_seed(seed, step, process) for seed in (0, 2 ** 62) for step in range(20) for process in range(3)}
    assert len(seeds) == 2 * 20 * 3 and step_seed(1, 2) == step_seed(1, 2, 0)


# ---- What the settings promise ---------------------------------------------------------------------------------------

def test_adapters_after_the_sae_leave_its_input_and_its_l0_exactly_alone(model, tokens):
    sae = random_sae("jumprelu", model)
    x = model.run(model.embed(tokens), 0, 2)
    adapted(model, [2, 3])
    after = model.run(model.embed(tokens), 0, 2)
    assert torch.equal(x, after) and torch.equal(sae.encode(x), sae.encode(after))


def test_adapters_before_the_sae_move_its_input_but_not_above_k(model, tokens):
    sae = random_sae("topk", model)
    x = model.run(model.embed(tokens), 0, 2)
    adapted(model, [0, 1, 2, 3])
    after = model.run(model.embed(tokens), 0, 2)
    assert not torch.equal(x, after) and (sae.encode(after) > 0).sum(-1).max() <= sae.k


def test_which_blocks_are_adapted(model):
    one, several = {1: random_sae("jumprelu", model)}, {0: None, 2: None, 3: None}
    assert blocks_to_adapt(("after",), one, 4) == [2, 3]
    assert blocks_to_adapt(("after",), several, 4) == [1, 2, 3]
    assert blocks_to_adapt(("next",), several, 4) == [1, 3]
    assert blocks_to_adapt(("all",), one, 4) == [0, 1, 2, 3]
    assert blocks_to_adapt(("3", "1"), one, 4) == [1, 3]
    assert blocks_to_adapt((), one, 4) == [2, 3] and blocks_to_adapt((), {1: random_sae("topk", model)}, 4) == [0, 1, 2, 3]
    assert blocks_to_adapt((), {1: random_sae("topk", model), 2: random_sae("jumprelu", model)}, 4) == [2, 3]
    for word in ("before", "²", "-1"):
        with pytest.raises(InputError, match="after, all, next"):
            blocks_to_adapt((word,), one, 4)


def test_the_blocks_that_differ_begin_at_the_first_adapter_or_after_the_first_sae(model):
    sae = random_sae("topk", model)
    assert first_differing(model, {}) == 4 and first_differing(model, {2: sae}) == 3 and first_differing(model, {3: sae, 0: sae}) == 1
    add_lora(model, [1, 3], 2)
    assert first_differing(model, {2: sae}) == 1 and first_differing(model, {0: sae}) == 1


# ---- BOS and EOS -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layer", [0, 1, 3])
def test_an_sae_that_never_saw_bos_leaves_it_alone_in_the_plain_model(model, text, layer):
    """As Gemma Scope's: model(tokens, saes) is right with no further argument."""
    sae, special = random_sae("jumprelu", model), model.special(text)
    assert special.sum() == 3 and special[1, 17]
    x = model.run(model.embed(text), 0, layer + 1)
    by_hand = torch.where(special[..., None], x, sae(x))
    expected = model.logits(model.run(by_hand, layer + 1, 4))
    found = model(text, {layer: sae})
    torch.testing.assert_close(found, expected)
    everywhere = model(text, {layer: lambda x: sae(x)})                 # of a function, what it says at BOS is heard
    assert (found - everywhere).abs().max() > 1e-3


def test_an_sae_that_saw_bos_reconstructs_it_too(model, text):
    sae = random_sae("topk", model)
    expected = model.logits(model.run(sae(model.run(model.embed(text), 0, 2)), 2, 4))
    torch.testing.assert_close(model(text, {1: sae}), expected)


@pytest.mark.parametrize("first, second", [("jumprelu", "topk"), ("topk", "jumprelu")])
def test_saes_of_both_kinds_are_spliced_together_each_by_its_own_rule(model, text, first, second):
    saes, special = {0: random_sae(first, model), 2: random_sae(second, model, seed=1)}, model.special(text)[..., None]
    x = model.embed(text)
    for layer in range(4):
        x = model.run(x, layer, layer + 1)
        if layer in saes:
            x_hat = saes[layer](x)
            x = x_hat if saes[layer].on_special else torch.where(special, x, x_hat)
    torch.testing.assert_close(model(text, saes), model.logits(x))


def test_a_run_of_blocks_that_is_not_told_where_bos_is_refuses_such_an_sae(model, text):
    x = model.embed(text)
    with pytest.raises(InputError, match="special=model.special"):
        model.run(x, 0, 2, {1: random_sae("jumprelu", model)})
    model.run(x, 0, 1, {1: random_sae("jumprelu", model)})              # its block is not among them
    model.run(x, 0, 2, {1: random_sae("topk", model)})
    model.run(x, 0, 2, {1: random_sae("jumprelu", model, on_special=True)})
