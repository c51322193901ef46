"""Sparse autoencoders: the TopK and JumpReLU equations (paper §3.1 and §3.3).

Both hold the same four tensors, a latent being a row of both matrices, and both read and write the residual stream at the
output of a transformer block. How the files of other projects map onto them is `sae_formats.py`; how they are trained is
`dictionary.py`.

Shapes: B batch, T tokens, D d_model, M latents, K active latents; N = B*T.
"""
import torch
from torch import nn

from lorasae import topk
from lorasae.errors import InputError
from lorasae.linear import linear


class SAE(nn.Module):
    """What the two kinds share: x̂ = z W_dec + b_dec  (Eq. 5), with z = encode(x).

    W_enc, W_dec [M, D]; b_enc [M]; b_dec [D]. `on_special` says whether the SAE was trained on BOS and EOS positions; where
    it was not (Gemma Scope, Llama Scope), those positions keep their original activation when the SAE is spliced in.
    """

    def __init__(self, d_model, latents, *, on_special):
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(latents, d_model))
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.W_dec = nn.Parameter(torch.zeros(latents, d_model))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.on_special = on_special

    def decode(self, latents):
        """latents [..., M] -> reconstruction [..., D] (Eq. 5)."""
        return linear(latents, self.W_dec.T, self.b_dec)

    def forward(self, x):
        """x [..., D] -> reconstruction [..., D], in the SAE's own dtype."""
        return self.decode(self.encode(x))


class TopK(SAE):
    """z = TopK(ReLU(W_enc (x - b_dec) + b_enc))  (Eq. 4, Gao et al. 2024): the k largest latents survive.

    ReLU comes first, so fewer than k may be active. `forward` computes only the active latents (topk.py); `encode` and
    `decode` are the same function written densely.
    """

    def __init__(self, d_model, latents, k, *, on_special=True):
        super().__init__(d_model, latents, on_special=on_special)
        if not 1 <= k <= latents:
            raise InputError(f"k is {k}, but a TopK SAE of {latents} latents needs 1 <= k <= {latents}")
        self.k = k

    def encode(self, x):
        """x [..., D] -> latents [..., M], at most k of them positive in each row."""
        pre = linear(x.to(self.W_enc.dtype) - self.b_dec, self.W_enc, self.b_enc).relu()
        values, indices = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, indices, values)

    def forward(self, x):
        flat = x.to(self.W_enc.dtype).reshape(-1, x.shape[-1])
        values, indices = topk.encode(flat - self.b_dec, self.W_enc, self.b_enc, self.k)
        return (topk.decode(values.to(self.W_dec.dtype), indices, self.W_dec) + self.b_dec).view(x.shape)


class JumpReLU(SAE):
    """z = pre · H(pre - θ), pre = W_enc x + b_enc  (§3.3, Rajamanoharan et al. 2024): strictly above its threshold, or zero.

    θ [M] > 0 (or = 0, which is an ordinary ReLU SAE) stays fp32, whatever dtype the rest is held in: at bf16 the thresholds
    of close latents collapse and L0 drifts. b_dec is not subtracted from the input here. θ gets no gradient from this
    formula: dictionary.jump is the one that trains it.
    """

    def __init__(self, d_model, latents, *, on_special=False):
        super().__init__(d_model, latents, on_special=on_special)
        self.threshold = nn.Parameter(torch.zeros(latents))

    def encode(self, x):
        """x [..., D] -> latents [..., M]; exactly zero where the pre-activation does not exceed its threshold."""
        pre = linear(x.to(self.W_enc.dtype), self.W_enc, self.b_enc)
        return pre * (pre > self.threshold)


def learned_positions(sae, special):
    """special [B, T] (BOS and EOS) -> bool [B, T]: the positions that this SAE learns from."""
    return ~special | sae.on_special


def splice(x, sae, special=None):
    """Replaces the residual stream x [B, T, D] by its reconstruction (Eq. 5).

    An SAE that was trained without BOS and EOS (`on_special` False) leaves those positions, special [B, T], as they are,
    as in the published training (utils.py:606); its benchmarks spare position 0 alone.
    """
    x_hat = sae(x).to(x.dtype)
    if getattr(sae, "on_special", True):                        # any function may stand in for an SAE
        return x_hat
    if special is None:
        raise InputError("this SAE was trained without BOS and EOS and must leave them alone: pass "
                         "special=model.special(tokens)")
    return torch.where(special[..., None], x, x_hat)
