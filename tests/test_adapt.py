"""The method: one step against the naive formula with every logit and no sharing, and what the paper's settings promise."""
from contextlib import nullcontext

import pytest
import torch

from lorasae.adapt import adapted_blocks, compiled_blocks, default_adapt, first_differing, learn, teach
from lorasae.io.corpus import special_mask
from lorasae.errors import InputError
from lorasae.lora import add_lora, adapters, base, lora_parameters
from lorasae.objectives import naive_kl
from lorasae.sae import JumpReLU, TopK


def random_sae(kind, model, seed=0):
    torch.manual_seed(seed)
    D = model.config.hidden_size
    sae = TopK(D, 4 * D, 8) if kind == "topk" else JumpReLU(D, 4 * D)
    torch.nn.init.normal_(sae.W_enc, std=D ** -0.5)
    sae.W_dec.data = sae.W_enc.data.clone()
    if kind == "jumprelu":
        sae.threshold.data.fill_(0.5)
    return sae.requires_grad_(False)


def adapted(model, blocks, rank=3):
    add_lora(model, blocks, rank, dropout=0.0)
    torch.manual_seed(9)
    for module in adapters(model).values():
        torch.nn.init.normal_(module.lora_B.weight, std=0.05)
    return model


@pytest.mark.parametrize("kind, layers, blocks", [
    ("jumprelu", [1], [2, 3]), ("topk", [1], [0, 1, 2, 3]), ("jumprelu", [1], [3]), ("topk", [0, 2], [1, 2, 3]),
    ("topk", [3], [0, 1, 2, 3]), ("topk", [2], [0])])
@pytest.mark.parametrize("keep_special", [False, True])
def test_a_step_is_the_naive_kl_of_two_whole_forward_passes(model, tokens, kind, layers, blocks, keep_special):
    saes = {layer: random_sae(kind, model, layer) for layer in layers}
    adapted(model, blocks)
    tokens[:, 0] = model.config.bos_token_id
    keep = special_mask(tokens, model.config.bos_token_id, model.config.eos_token_id) if keep_special else None

    with torch.no_grad(), base(model):
        target = model.norm(model.run(model.embed(tokens), 0, 4))
    hidden = model.norm(model.run(model.embed(tokens), 0, 4, saes, keep))
    naive = naive_kl(target, hidden, model.head, model.softcap)
    expected = torch.autograd.grad(naive, lora_parameters(model), allow_unused=True)

    first = first_differing(model, saes)
    loss = learn(model, saes, *teach(model, saes, tokens, keep, first), keep, first)
    found = torch.autograd.grad(loss, lora_parameters(model), allow_unused=True)
    assert naive > 1 and loss.item() == pytest.approx(naive.item(), rel=1e-4)
    for a, b in zip(found, expected):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6


@pytest.mark.parametrize("kind, blocks", [("jumprelu", [2, 3]), ("topk", [0, 1, 2, 3])])
def test_compiled_blocks_take_the_same_step(model, tokens, kind, blocks):
    """Every block is one graph, in each of its roles: prefix, teacher, student. aot_eager is all of torch.compile but its code."""
    saes, parameters = {1: random_sae(kind, model)}, lora_parameters(adapted(model, blocks))
    first = first_differing(model, saes)

    def step():
        loss = learn(model.train(), saes, *teach(model, saes, tokens, None, first), None, first)
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    expected, plain = step(), model.layers[0].forward
    with compiled_blocks(model, backend="aot_eager"):
        assert model.layers[0].forward != plain
        for found, right in zip(step(), expected):
            assert (found - right).norm() <= 1e-4 * right.norm() + 1e-6
    assert model.layers[0].forward == plain


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_compiled_step_of_a_gpu_is_the_plain_one(model, tokens):
    """Inductor, FlexAttention where there is a soft-cap, and the compiled loss, as train.py uses them there."""
    model, tokens, saes = model.cuda(), tokens.cuda(), {1: random_sae("jumprelu", model).cuda()}
    parameters = lora_parameters(adapted(model, [2, 3]))
    first, steps = first_differing(model, saes), []
    for compiled in (False, True):
        with compiled_blocks(model) if compiled else nullcontext():
            loss = learn(model.train(), saes, *teach(model, saes, tokens, None, first), None, first, compiled=compiled)
            steps.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    for plain, fast in zip(*steps):
        assert (plain - fast).norm() <= 1e-2 * plain.norm() + 1e-5


def test_parts_of_a_batch_add_up_to_its_gradient(model, tokens):
    saes = {1: random_sae("topk", model)}
    adapted(model, [0, 1, 2, 3])
    whole = torch.autograd.grad(learn(model, saes, *teach(model, saes, tokens, None, 0), None, 0), lora_parameters(model))
    parts = [torch.autograd.grad(learn(model, saes, *teach(model, saes, part, None, 0), None, 0), lora_parameters(model))
             for part in tokens.split(1)]
    for a, *b in zip(whole, *parts):
        torch.testing.assert_close(a, sum(b), rtol=1e-3, atol=1e-5)


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
    assert adapted_blocks(["after"], one, 4) == [2, 3]
    assert adapted_blocks(["after"], several, 4) == [1, 2, 3]
    assert adapted_blocks(["next"], several, 4) == [1, 3]
    assert adapted_blocks(["all"], one, 4) == [0, 1, 2, 3]
    assert adapted_blocks(["3", "1"], one, 4) == [1, 3]
    assert default_adapt(one) == ["after"] and default_adapt({1: random_sae("topk", model)}) == ["all"]
    with pytest.raises(InputError, match="after, all, next"):
        adapted_blocks(["before"], one, 4)
