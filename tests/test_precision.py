"""What TF32 does to an SAE with sharp thresholds: train.py and eval.py let a GPU multiply by it.

TF32 keeps 10 bits of each factor's mantissa and adds in fp32. Activations of a bf16 model have 7,
so of them nothing is lost.
"""
import pytest
import torch

from lorasae.sae import JumpReLU

N, D, M = 512, 256, 2048


def tf32(x):
    """x rounded to the nearest number with 10 bits after the leading one, ties to even."""
    bits = x.view(torch.int32)
    half = ((bits >> 13) & 1) + 0xFFF
    return ((bits + half) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def case():
    """Activations x of a bf16 model, and a JumpReLU whose latents each fire on a twentieth of x."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    sae = JumpReLU(D, M).requires_grad_(False)
    sae.W_enc.normal_(generator=torch.Generator().manual_seed(1))
    pre = (x.double() @ sae.W_enc.double().T).sort(0, descending=True).values
    sae.threshold.copy_((pre[N // 20 - 1] + pre[N // 20]) / 2)
    return x, sae


def test_tf32_moves_l0_by_less_than_a_thousandth_and_flips_less_than_bf16(case):
    assert tf32(torch.tensor([1 + 2 ** -11, 1 + 3 * 2 ** -11])).tolist() == [1, 1 + 2 ** -9]
    x, sae = case
    W, exact = sae.W_enc.clone(), (x.double() @ sae.W_enc.double().T) > sae.threshold
    flips = {}
    for rounded in tf32, lambda weights: weights.bfloat16().float():
        sae.W_enc.copy_(rounded(W))
        flips[rounded] = ((sae.encode(x) > 0) != exact).sum()
        if rounded is tf32:
            assert torch.equal(rounded(x), x)
            assert abs((sae.encode(x) > 0).sum() - exact.sum()) < 1e-3 * exact.sum()
    by_tf32, by_bf16 = flips.values()
    assert by_tf32 < 0.01 * exact.sum() and 4 * by_tf32 < by_bf16       # SAEs in bf16 bear more


@pytest.mark.cuda
def test_l0_with_and_without_tf32_on_cuda(case):
    x, sae = (value.cuda() for value in case)
    before, found = torch.get_float32_matmul_precision(), {}
    for precision in ("highest", "high", before):
        torch.set_float32_matmul_precision(precision)
        found.setdefault(precision, (sae.encode(x) > 0).sum().item())
    assert abs(found["high"] - found["highest"]) < 1e-3 * found["highest"]
