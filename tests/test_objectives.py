"""The chunked objectives against their naive twins in float64: values and every gradient."""
import os
import shutil

import pytest
import torch
import torch.nn.functional as F

from helpers import on_cuda
from lorasae import objectives
from lorasae.objectives import capped, linear_kl, naive_kl, token_losses


def problem(N=37, D=24, V=101, dtype=torch.float32, distance=0.3):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(N, D, generator=generator)
    hidden = target + distance * torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    return target.to(dtype), hidden.to(dtype).requires_grad_(), weight.to(dtype)


def float64_truth(target, hidden, weight, softcap):
    """Autograd through torch's own kl_div in float64."""
    wide = hidden.detach().double().requires_grad_()
    log_p, log_q = (capped(h @ weight.double().T, softcap).log_softmax(-1)
                    for h in (target.double(), wide))
    loss = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    loss.backward()
    return loss.item(), wide.grad


def in_chunks_of(rows, monkeypatch):
    monkeypatch.setattr(objectives, "chunk_rows", lambda V, on_cuda: rows)
    monkeypatch.setattr(objectives, "CACHED_ELEMENTS", 3 * 101)     # several pieces in each chunk


@pytest.mark.parametrize("softcap", [None, 30.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
def test_linear_kl_and_its_gradient_match_float64_autograd(monkeypatch, softcap, chunk):
    """F.kl_div fixes the direction: KL(base || adapted)."""
    in_chunks_of(chunk, monkeypatch)
    target, hidden, weight = problem()
    loss = linear_kl(target, hidden, weight, softcap)
    loss.backward()
    true_loss, true_gradient = float64_truth(target, hidden, weight, softcap)
    assert loss.item() == pytest.approx(true_loss, rel=1e-5) and true_loss > 1
    assert (hidden.grad - true_gradient).norm() <= 1e-5 * true_gradient.norm()
    assert abs(linear_kl(target, target.clone(), weight, softcap).item()) < 1e-4


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")),
                    reason="torch.compile needs a C++ compiler on a CPU")
def test_compiling_keeps_the_loss_and_its_gradient(monkeypatch):
    in_chunks_of(16, monkeypatch)
    target, hidden, weight = problem(N=32)  # two chunks of one shape share one graph
    losses, gradients = [], []
    for compiled in (False, True):
        losses.append(linear_kl(target, hidden, weight, 30.0, compiled=compiled))
        gradients += torch.autograd.grad(losses[-1], hidden)
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_linear_kl_matches_its_naive_twin_that_stores_all_logits():
    target, hidden, weight = problem(N=36)
    naive = naive_kl(target, hidden, weight, 5.0)
    expected, = torch.autograd.grad(naive, hidden)
    fast = linear_kl(target.view(4, 9, -1), hidden.view(4, 9, -1), weight, 5.0)
    found, = torch.autograd.grad(3 * fast, hidden)      # the upstream gradient is honoured
    assert fast.item() == pytest.approx(naive.item(), rel=1e-5)
    torch.testing.assert_close(found, 3 * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", [0.02, 0.3])
def test_bf16_weights_keep_the_gradient_within_half_a_percent(monkeypatch, distance):
    monkeypatch.setattr("lorasae.linear.WIDENED", 2 ** 15)          # several slices of the weight
    target, hidden, weight = problem(N=64, D=128, V=2000, dtype=torch.bfloat16, distance=distance)
    weight = weight / 11
    linear_kl(target, hidden, weight, 30.0).backward()
    _, true_gradient = float64_truth(target, hidden, weight, 30.0)
    assert (hidden.grad.double() - true_gradient).norm() <= 5e-3 * true_gradient.norm()


def test_token_losses_are_the_cross_entropy_and_kl_of_each_token(monkeypatch):
    in_chunks_of(5, monkeypatch)
    target, hidden, weight = problem(N=36)
    models = torch.stack([target, hidden.detach(), target + 1]).view(3, 4, 9, -1)
    labels = torch.randint(101, (4, 9))
    ce, kl = token_losses(models, labels, weight, 3.0)
    assert not kl[0].any()
    for s, model in enumerate(models):
        log_q = capped(model @ weight.T, 3.0).log_softmax(-1)
        torch.testing.assert_close(
            ce[s], F.cross_entropy(log_q.mT, labels, reduction="none"))
        for row in range(4):
            expected = naive_kl(models[0, row], model[row], weight, 3.0)
            assert kl[s, row].sum().item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("V, D", [(101, 24), (4096, 16)])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_models_match_each_alone_bit_for_bit_and_share_one_base_softmax(
        monkeypatch, V, D, softcap, dtype):
    target, hidden, weight = problem(N=1100 if V > 1000 else 37, D=D, V=V)
    models = torch.stack([target + distance * torch.randn_like(target)
                          for distance in (0.01, 0.3, 2.0)])
    target, weight = target.to(dtype), weight.to(dtype)
    models = models.to(dtype).requires_grad_()

    shared, exact = [], objectives.log_probabilities
    monkeypatch.setattr(
        objectives, "log_probabilities", lambda u, *cap: shared.append(len(u)) or exact(u, *cap))
    together = linear_kl(target, models, weight, softcap)
    assert sum(shared) == len(target)
    gradients, = torch.autograd.grad(together.sum(), models)
    assert together.shape == (3,)
    for s in range(3):
        alone = linear_kl(target, models[s], weight, softcap)
        gradient, = torch.autograd.grad(alone, models)
        assert torch.equal(alone, together[s])
        assert torch.equal(gradient[s], gradients[s]) and gradients[s].any()


# ---- The CUDA paths ------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_cuda_paths_give_the_same_losses_and_gradients(
        monkeypatch, dtype, tolerance, compiled):
    """compiled: the function that torch.compile would get, run without compiling it."""
    in_chunks_of(8, monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    objectives.compile_once.cache_clear()
    target, hidden, weight = problem(dtype=dtype)
    models = torch.stack([hidden, target]).detach()
    losses, gradients = [], []
    for place in (on_cuda, torch.clone):
        leaf = place(models).requires_grad_()
        losses.append(linear_kl(
            place(target), leaf, place(weight), 5.0, compiled=compiled and place is on_cuda))
        gradients += torch.autograd.grad(losses[-1].sum(), leaf)
    objectives.compile_once.cache_clear()
    for found, bound in ((losses, 1e-4), (gradients, tolerance)):
        plain = [tensor.as_subclass(torch.Tensor) for tensor in found]
        torch.testing.assert_close(*plain, rtol=bound, atol=bound)


@pytest.mark.cuda
def test_linear_kl_on_cuda_matches_float64():
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 5e-3)):
        target, hidden, weight = problem(N=128, D=64, V=1000, dtype=dtype)
        hidden = hidden.detach().cuda().requires_grad_()
        linear_kl(target.cuda(), hidden, weight.cuda(), 30.0).backward()
        _, true_gradient = float64_truth(target, hidden.cpu(), weight, 30.0)
        assert (hidden.grad.cpu().double() - true_gradient).norm() <= bound * true_gradient.norm()
