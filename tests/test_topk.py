"""Top-k by groups, encode and decode, and the SAE step, each against its dense twin."""
import math

import pytest
import torch
import torch.nn.functional as F

from helpers import on_cuda, refuses
from lorasae import topk


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def problem(N=37, D=24, M=200, dtype=torch.float32, device="cpu", bias=0.0):
    """x, W_enc, b_enc, W_dec, b_dec as leaves; `bias` shifts all pre-activations."""
    g = torch.Generator().manual_seed(0)
    shapes = [(N, D), (M, D), (M,), (M, D), (D,)]
    scales = [1, 1 / math.sqrt(D), 1, 1 / math.sqrt(D), 1]
    tensors = [scale * torch.randn(shape, generator=g) for scale, shape in zip(scales, shapes)]
    tensors[2] += bias
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def composed(x, W_enc, b_enc, W_dec, b_dec, k):
    values, indices = topk.encode(x - b_dec, W_enc, b_enc, k)
    return topk.decode(values, indices, W_dec) + b_dec, values, indices


both = pytest.mark.parametrize("step", [topk.sae_step, composed])


def ramp(x):
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view_as(x)


def outcome(step, tensors, k=8):
    """x̂, the values in order, and every gradient of a loss that uses both."""
    recon, values, _ = step(*tensors, k)
    loss = (recon ** 2).sum() + (recon * ramp(recon)).sum() + (values ** 3).sum()
    return recon, values.sort(-1).values, *torch.autograd.grad(loss, tensors)


def close(a, b, tolerance=1e-5):
    """Equal up to `tolerance` of the largest entry; exactly equal if all are zero."""
    assert a.shape == b.shape
    scale = b.abs().max().item() if b.numel() else 0.0
    torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=tolerance * scale)


def all_close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        close(a, b, tolerance)


# ---- The k largest -------------------------------------------------------------------------------

def check_topk(x, k):
    values, indices = topk.topk(x, k)
    expected = torch.topk(x, k).values
    assert values.dtype == x.dtype and indices.dtype == torch.int64
    assert values.shape == indices.shape == expected.shape
    exactly = dict(rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values.sort(-1, descending=True).values, expected, **exactly)
    torch.testing.assert_close(x.gather(-1, indices), values, **exactly)
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()                   # k different entries


@pytest.mark.parametrize("M, k, dtype", [
    *((M, k, torch.float32) for M, k in [
        (1024, 1), (1024, 32), (16384, 64), (16384, 1), (40000, 7), (16385, 64), (17000, 64),
        (4095, 3), (16384, 511), (600, 1), (100, 100), (1, 1), (2048, 2048)]),
    (20000, 30, torch.float64), (20000, 30, torch.bfloat16)])
def test_topk_is_exact(M, k, dtype):
    check_topk(random(9, M, seed=M + k).to(dtype), k)


def test_topk_works_in_groups_if_that_helps(monkeypatch):
    widths, whole = [], torch.topk
    monkeypatch.setattr(
        torch, "topk", lambda x, *a, **how: widths.append(x.shape[-1]) or whole(x, *a, **how))
    topk.topk(torch.randn(2, 131072), 64)
    assert max(widths) <= 131072 // 64


def test_topk_handles_ties_infinities_and_a_lone_maximum_anywhere():
    g = torch.Generator().manual_seed(0)
    # thousands of ties at the threshold
    check_topk(torch.randint(0, 3, (8, 20000), generator=g).float(), 50)
    check_topk(torch.zeros(4, 5000), 20)
    x = torch.randn(6, 20000, generator=g)
    x[0] = -torch.inf
    x[1, :30], x[1, 30:] = torch.randn(30, generator=g), -torch.inf  # fewer finite entries than k
    x[2, ::1000] = torch.inf
    x[3] = -x[3].abs()
    check_topk(x, 50)
    where = [0, 5, 16383, 16384, 16999]                 # the last two are in no group
    check_topk(torch.eye(17000)[where], 4)


@pytest.mark.parametrize("nans", [1, 3, 40, 300])
def test_topk_ranks_nan_first_like_torch(nans):
    g = torch.Generator().manual_seed(nans)
    x = torch.randn(5, 20000, generator=g)
    for row in x[:4]:
        row[torch.randperm(20000, generator=g)[:nans]] = math.nan
    x[1, ::777] = torch.inf
    x[2] = torch.where(x[2].isnan(), -x[2], x[2])  # a negative NaN is still the largest
    check_topk(x, 40)


def test_topk_accepts_any_stride():
    x = random(20000, 6, seed=4).T
    for view in (x, x[::2, 10:], x[:0]):
        check_topk(view, 16)


# ---- The step ------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk", [topk.CHUNK, 64, 3])  # one chunk; several; latents per chunk < k
@pytest.mark.parametrize("bias, k", [
    # all are positive; about half; hardly any, so k exceeds the positives; none at all
    (3.0, 5), (0.0, 5), (0.0, 150), (-2.0, 60), (-50.0, 7), (0.0, 1), (0.0, 200)])
@both
def test_step_equals_dense_autograd(monkeypatch, step, bias, k, chunk):
    monkeypatch.setattr(topk, "CHUNK", chunk)
    for N in (37, 1, 0):
        tensors = problem(N=N, bias=bias)
        all_close(outcome(step, tensors, k), outcome(topk.naive_step, tensors, k))


@pytest.mark.parametrize("chunk", [topk.CHUNK, 6000])
def test_step_equals_dense_autograd_in_groups_and_without_onednn(monkeypatch, chunk):
    monkeypatch.setattr(topk, "CHUNK", chunk)
    tensors = problem(N=16, D=8, M=20011, dtype=torch.float64)
    all_close(outcome(topk.sae_step, tensors, 20), outcome(topk.naive_step, tensors, 20), 1e-12)
    tensors = problem()
    with_onednn = outcome(topk.sae_step, tensors)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    all_close(outcome(topk.sae_step, tensors), with_onednn)


def test_gradients_pass_gradcheck():
    tensors = problem(N=4, D=3, M=9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: topk.sae_step(*a, 4)[:2], tensors)
    assert torch.autograd.gradcheck(lambda *a: topk.encode(*a, 4)[0], tensors[:3])
    indices = torch.tensor([[0, 3], [8, 8], [2, 1], [0, 7]])  # a latent can occur twice in a token
    values = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, W: topk.decode(v, indices, W), (values, tensors[3]))


def test_ties_give_the_gradient_of_the_latents_that_were_kept():
    x, W_enc, b_enc, W_dec, b_dec = leaves = problem(M=40)
    with torch.no_grad():
        W_enc[20:], b_enc[20:] = W_enc[:20], b_enc[:20]  # every pre-activation occurs twice
    recon, values, indices = topk.sae_step(*leaves, 5)
    pre = F.linear(x - b_dec, W_enc, b_enc)  # dense, with the same latents
    kept = pre.gather(1, indices).relu()
    close(kept.sort(1).values, torch.topk(pre, 5).values.relu().sort(1).values)
    dense = topk.naive_decode(kept, indices, W_dec) + b_dec
    close(recon, dense)
    all_close(torch.autograd.grad((recon ** 2).sum(), leaves),
              torch.autograd.grad((dense ** 2).sum(), leaves))


def test_two_runs_agree_bit_for_bit():
    tensors = problem(N=200, M=20000)
    with torch.no_grad():
        # ties everywhere
        tensors[1][10000:], tensors[2][10000:] = tensors[1][:10000], tensors[2][:10000]
    runs = [(topk.sae_step(*tensors, 12)[2], *outcome(topk.sae_step, tensors, 12))
            for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("wanted", range(5))
@both
def test_each_gradient_can_be_asked_for_alone(step, wanted):
    tensors = problem()
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    recon, values, _ = step(*alone, 8)
    loss = (recon ** 2).sum() + (recon * ramp(recon)).sum() + (values ** 3).sum()
    found, = torch.autograd.grad(loss, alone[wanted])
    close(found, outcome(topk.naive_step, tensors)[2 + wanted])


@pytest.mark.parametrize("pick", [0, 1])
def test_gradients_are_right_if_only_one_output_is_used(pick):
    tensors = problem()
    fast, dense = (
        torch.autograd.grad((step(*tensors, 8)[pick] ** 2).sum(), tensors, materialize_grads=True)
        for step in (topk.sae_step, topk.naive_step))
    all_close(fast, dense)


@both
def test_x_and_gradients_can_have_any_stride(step):
    _, *rest = problem()
    strided = random(24, 74, seed=9).T[::2].requires_grad_()  # rows and columns have gaps
    results = []
    for function in (step, topk.naive_step):
        recon = function(strided, *rest, 8)[0]
        results.append(torch.autograd.grad(recon.sum(), [strided, *rest]))  # a gradient of stride 0
    all_close(*results)
    # stored column by column
    turned = [t.detach().T.contiguous().T if t.dim() == 2 else t for t in rest]
    close(step(strided, *turned, 8)[0], topk.naive_step(strided, *rest, 8)[0])


def test_nan_is_not_hidden(monkeypatch):
    x, W_enc, b_enc, W_dec, b_dec = problem(M=5000)
    with torch.no_grad():
        x[3, 2] = math.nan
    recon, values, _ = topk.sae_step(x, W_enc, b_enc, W_dec, b_dec, 8)
    assert recon[3].isnan().all() and values[3].isnan().all() and not recon[4].isnan().any()
    grads = torch.autograd.grad((recon ** 2).sum(), [x, W_enc, b_enc, W_dec, b_dec])
    assert all(g.isnan().any() for g in grads)
    monkeypatch.setattr(topk, "CHUNK", 1000)
    with torch.no_grad():
        b_enc[4321] = math.nan  # one broken latent reaches every token
    assert topk.encode(x, W_enc, b_enc, 8)[0].isnan().any(1).all()


@pytest.mark.parametrize("k", [0, -1, 201])
def test_an_impossible_k_is_refused(k):
    tensors = problem()
    for call in (lambda: topk.encode(*tensors[:3], k), lambda: topk.sae_step(*tensors, k)):
        refuses(rf"k is {k}.*200", call)


# ---- AuxK ----------------------------------------------------------------------------------------

def dense_aux(x, W_enc, b_enc, W_dec, dead, k):
    """AuxK on the full pre-activations: the k largest of the dead latents, all else at -∞."""
    pre = F.linear(x, W_enc, b_enc).masked_fill(~dead, -torch.inf)
    values, indices = torch.topk(pre, min(k, int(dead.sum())))
    return topk.naive_decode(values.relu(), indices, W_dec)


@pytest.mark.parametrize("dead, k", [(60, 20), (10, 64), (1, 1), (200, 30)])
def test_auxk_gradients_equal_dense_autograd(dead, k):
    x, W_enc, b_enc, W_dec, b_dec = tensors = problem()
    mask = torch.zeros(200, dtype=torch.bool)
    mask[torch.randperm(200, generator=torch.Generator().manual_seed(dead))[:dead]] = True
    results = []
    for step, aux in ((topk.sae_step, topk.aux_decode), (topk.naive_step, dense_aux)):
        recon, _, _ = step(*tensors, 8)
        missed = (x - recon).detach()                               # AuxK fits what the SAE missed
        aux_loss = ((aux(x - b_dec, W_enc, b_enc, W_dec, mask, k) - missed) ** 2).sum()
        alone = torch.autograd.grad(aux_loss, [W_enc, b_enc, W_dec], retain_graph=True)
        assert alone[0][mask].abs().sum() > 0
        assert not alone[0][~mask].any() and not alone[2][~mask].any()
        total = ((recon - x) ** 2).sum() + aux_loss / 32
        results.append([aux_loss, *alone, *torch.autograd.grad(total, tensors)])
    all_close(*results)
    none = torch.zeros_like(mask)                       # without dead latents it adds nothing
    assert not topk.aux_decode(x, W_enc, b_enc, W_dec, none, k).any()


# ---- What it costs, and where it runs ------------------------------------------------------------

def test_frozen_weights_cost_no_weight_gradient(monkeypatch):
    x, *frozen = problem()
    frozen = [t.detach() for t in frozen]

    def gradient_of_x(step):
        return torch.autograd.grad((step(x, *frozen, 8)[0] ** 2).sum(), x)[0]

    expected = gradient_of_x(topk.naive_step)
    monkeypatch.setattr(
        topk.ByLatent, "sum", lambda *a: pytest.fail("a weight gradient was computed"))
    close(gradient_of_x(composed), expected)
    saved = topk.encode(x, frozen[0], frozen[1], 5)[0].grad_fn.saved_tensors
    assert saved[0] is None  # and x is not saved


def test_no_tensor_of_tokens_times_latents_or_tokens_times_k_times_width_is_made(monkeypatch):
    N, D, M, k = 512, 64, 32768, 128
    tensors = problem(N=N, D=D, M=M)
    monkeypatch.setattr(topk, "CHUNK", 4096)
    with torch.profiler.profile(profile_memory=True) as profile:
        recon, _, _ = topk.sae_step(*tensors, k)
        torch.autograd.grad(recon.sum(), tensors[1:])
    events = profile.profiler.kineto_results.events()
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    assert largest <= 4 * max(N * 4096, M * D) < 4 * min(N * M, N * k * D)


def test_bf16_selects_latents_by_fp32_preactivations():
    tensors = problem(N=64, D=64, M=3000, dtype=torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in tensors]
    values, indices = topk.encode(*tensors[:3], 16)
    assert values.dtype == torch.float32
    # rounding them would be 1e-3 off
    close(values.sort(1).values, topk.naive_encode(*exact[:3], 16)[0].sort(1).values)
    recon = topk.decode(values, indices, tensors[3])
    assert recon.dtype == torch.bfloat16
    close(recon, topk.naive_decode(values, indices, exact[3]), 1e-2)
    with torch.no_grad():
        tensors[4].zero_(), exact[4].zero_()  # so that x - b_dec is not rounded
    fast, dense = outcome(topk.sae_step, tensors, 16), outcome(topk.naive_step, exact, 16)
    for a, b in zip(fast[2:], dense[2:]):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() < 0.01 * b.norm()


def test_the_step_works_under_no_grad_and_on_the_meta_device():
    with torch.no_grad():
        assert not topk.sae_step(*problem(), 8)[0].requires_grad
    meta = [torch.empty_like(t, device="meta", requires_grad=True) for t in problem(N=8, M=20000)]
    recon, values, indices = topk.sae_step(*meta, 8)
    recon.sum().backward()
    composed(*meta, 8)[0].sum().backward()
    assert recon.shape == (8, 24) and indices.shape == (8, 8) and meta[1].grad.shape == (20000, 24)


def test_bf16_on_cuda_selects_by_fp32_preactivations_and_widens_dot_products():
    """The product sums in fp32; dot products, for which bf16 has no kernel, are widened."""
    tensors = problem(N=30, M=3000, dtype=torch.bfloat16)
    x, W_enc, b_enc, W_dec, _ = map(on_cuda, tensors)
    values, indices = topk.encode(x, W_enc, b_enc, 16)
    exact = topk.naive_encode(*(t.detach().float() for t in tensors[:3]), 16)[0]
    close(values.as_subclass(torch.Tensor).sort(1).values, exact.sort(1).values)

    dots = topk.ByLatent(indices, 3000).dot(x, W_dec)
    assert dots.dtype == torch.bfloat16
    expected = (x.float() @ W_dec.float().T).gather(1, indices)
    torch.testing.assert_close(dots, expected.bfloat16())


@pytest.mark.cuda
@pytest.mark.parametrize("N", [0, 1, 64])
@both
def test_cuda_equals_the_cpu(step, N):
    check_topk(torch.randn(max(N, 1), 20000, device="cuda"), 40)
    on_cpu = problem(N=N, M=20000, dtype=torch.float64)
    on_gpu = [t.detach().cuda().requires_grad_() for t in on_cpu]
    gpu, again = (outcome(step, on_gpu, 12) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(gpu, again))
    all_close([t.cpu() for t in gpu], outcome(topk.naive_step, on_cpu, 12), 1e-10)


@pytest.mark.cuda
def test_cuda_bf16_keeps_fp32_preactivations():
    x, W_enc, b_enc, W_dec, _ = problem(N=64, D=64, M=3000, dtype=torch.bfloat16, device="cuda")
    values, indices = topk.encode(x, W_enc, b_enc, 16)
    exact = [t.detach().double() for t in (x, W_enc, b_enc)]
    close(values.double().sort(1).values, topk.naive_encode(*exact, 16)[0].sort(1).values)
    topk.decode(values, indices, W_dec).sum().backward()
    assert all(t.grad.dtype == torch.bfloat16 for t in (x, W_enc, b_enc, W_dec))
