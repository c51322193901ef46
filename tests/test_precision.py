"""What TF32 does to an SAE whose thresholds are sharp: train.py and eval.py let a GPU multiply fp32 matrices by it.

TF32 keeps 10 bits of each factor's mantissa and adds in fp32. Activations of a bf16 model have 7, so of them nothing is
lost.
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


def sae_at_its_thresholds(x):
    """A JumpReLU that lets through a twentieth of each latent's pre-activations on x [N, D]: L0 is M / 20."""
    sae = JumpReLU(D, M).requires_grad_(False)
    sae.W_enc.normal_(generator=torch.Generator().manual_seed(1))
    pre = (x.double() @ sae.W_enc.double().T).sort(0, descending=True).values
    sae.threshold.copy_((pre[N // 20 - 1] + pre[N // 20]) / 2)
    return sae


def activations():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0)).bfloat16().float()


def test_rounding_is_that_of_tf32():
    x = torch.tensor([1.0, 1 + 2 ** -10, 1 + 2 ** -11, 1 + 3 * 2 ** -11, 1 + 2 ** -12, -3.1415927])
    assert tf32(x).tolist() == [1.0, 1 + 2 ** -10, 1.0, 1 + 2 ** -9, 1.0, -3.140625]
    assert torch.equal(tf32(activations()), activations())              # bf16 loses nothing


def test_tf32_moves_l0_by_less_than_a_thousandth_at_the_thresholds_and_flips_less_than_bf16():
    x = activations()
    sae = sae_at_its_thresholds(x)
    exact = (x.double() @ sae.W_enc.double().T) > sae.threshold
    by_tf32 = (tf32(x) @ tf32(sae.W_enc.data).T) > sae.threshold
    by_bf16 = (x @ sae.W_enc.bfloat16().float().T) > sae.threshold

    l0 = exact.sum()
    assert abs(by_tf32.sum() - l0) < 1e-3 * l0
    assert (by_tf32 != exact).sum() < 0.01 * l0
    assert 4 * (by_tf32 != exact).sum() < (by_bf16 != exact).sum()      # what SAEs in bf16, such as Llama Scope's, bear


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_l0_with_and_without_tf32_on_cuda():
    x, before, found = activations(), torch.get_float32_matmul_precision(), {}
    sae = sae_at_its_thresholds(x).cuda()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            found[precision] = (sae.encode(x.cuda()) > 0).sum().item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert abs(found["high"] - found["highest"]) < 1e-3 * found["highest"]
