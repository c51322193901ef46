"""Sparse autoencoders: the TopK and JumpReLU equations (paper §3.1 and §3.3), and the splice.

Both kinds store W_enc and W_dec as [M, D], one row per latent (a column of the paper's W_dec).
They read and replace the output of a block, or of its MLP. A kind defines its equation and its
training step, and inherits the rest. A new kind needs one class here and one entry in KINDS.
io/sae_readers.py converts other projects' files to these kinds; dictionary.py trains them.

Shapes: B batch, T tokens, D d_model, M latents, K active latents; N = B*T.
"""
import torch
from torch import nn

from lorasae import topk
from lorasae.errors import InputError
from lorasae.linear import linear

START_L0 = 4            # a fresh JumpReLU SAE has this many times its target L0


class SAE(nn.Module):
    """What all kinds share: x̂ = z W_dec + b_dec  (Eq. 5), with z = encode(x).

    A kind adds two methods (bandwidth: the ε of Jump), and overrides whatever else differs:

        encode(x)                       x [..., D] -> latents [..., M]
        training_step(x, bandwidth)     x [N, D] -> x̂ [N, D]; the number of tokens on which each
                                        latent fired [M]; their sum, differentiable if `gates_train`

    W_enc, W_dec [M, D]; b_enc [M]; b_dec [D]. k: the number of active latents, for the kinds that
    fix it. on_special: whether the SAE was trained on BOS and EOS (None: the default of its kind).
    max_norm: the largest activation norm that it was trained on; attention sinks exceed it (None:
    no limit). `splice` leaves activations that the SAE was not trained on unchanged.
    site: "resid", a block's output, or "mlp", what its MLP adds to the residual stream.
    """
    architecture = None                 # the kind it is saved as: topk, jumprelu or standard
    on_special = True
    max_norm = None
    site = "resid"
    after_norm = True                   # on Gemma, whether an "mlp" SAE reads after the last norm
    l0_is_bounded = False               # whether L0 stays below a bound, whatever the input
    centred = False                     # whether the encoder reads x - b_dec instead of x
    gates_train = False                 # whether the sum has a gradient, so the loss has `penalty`

    def __init__(self, d_model, latents, k=None, *, on_special=None):
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(latents, d_model))
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.W_dec = nn.Parameter(torch.zeros(latents, d_model))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.k = k
        if on_special is not None:
            self.on_special = on_special

    def decode(self, latents):
        """latents [..., M] -> reconstruction [..., D] (Eq. 5)."""
        return linear(latents, self.W_dec.T, self.b_dec)

    def forward(self, x):
        """x [..., D] -> reconstruction [..., D], in the SAE's own dtype."""
        return self.decode(self.encode(x))

    def start(self, x, l0):
        """Fits the biases of a fresh SAE to activations x [N, D]. l0: the target L0."""
        self.b_dec.copy_(geometric_median(x))

    def unit(self, x):
        """The unit of biases and thresholds for x [N, D], which scales their learning rates."""
        return 1.0

    def penalty(self, l0, target):
        """(L0 / target - 1)² instead of Eq. 6's λ L0: a target can be chosen, λ needs a search."""
        return (l0 / target - 1).square()

    def after_step(self):
        """Called after each optimiser step, to restore constraints."""

    def saved(self):
        """(tensors, entries of cfg.json) in SAELens's format."""
        tensors = {**self.state_dict(), "W_enc": self.W_enc.T}
        facts = {"architecture": self.architecture, "apply_b_dec_to_input": self.centred}
        return tensors, facts


class TopK(SAE):
    """z = TopK(ReLU(W_enc (x - b_dec) + b_enc))  (Eq. 4, Gao et al. 2024): the k largest survive.

    ReLU, which only the paper's code has, comes first, so fewer than k may be active. `forward`
    decodes only the active latents (topk.py); `encode` and `decode` together are the same function,
    computed densely (in bf16, `encode` selects among rounded pre-activations).
    """
    architecture = "topk"
    l0_is_bounded = True
    centred = True

    def encode(self, x):
        """At most k latents per row are positive."""
        x = x.to(self.W_enc.dtype)
        pre = linear(x - self.b_dec, self.W_enc, self.b_enc).relu()
        values, indices = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, indices, values)

    def forward(self, x):
        rows = x.to(self.W_enc.dtype).reshape(-1, x.shape[-1])
        values, indices = topk.encode(rows - self.b_dec, self.W_enc, self.b_enc, self.k)
        x_hat = topk.decode(values, indices, self.W_dec) + self.b_dec
        return x_hat.view(x.shape)

    def training_step(self, x, bandwidth):
        x_hat, values, latents = topk.sae_step(
            x, self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.k)

        firing = (values > 0).flatten().to(values)
        fired = firing.new_zeros(len(self.W_enc))
        fired.index_add_(0, latents.flatten(), firing)
        return x_hat, fired, firing.sum()

    def saved(self):
        tensors, facts = super().saved()
        return tensors, facts | {"k": self.k, "rescale_acts_by_decoder_norm": False}


class JumpReLU(SAE):
    """z = pre · H(pre - θ), pre = W_enc x + b_enc  (§3.3, Rajamanoharan et al. 2024).

    A latent is strictly above its threshold, or zero. θ [M] >= 0; θ = 0 is an ordinary ReLU SAE.
    load_sae keeps θ in fp32, whatever dtype the rest has: in bf16, thresholds that are close become
    equal, and L0 drifts. θ gets no gradient from `encode`, only from `training_step`.
    """
    architecture = "jumprelu"
    on_special = False

    def __init__(self, d_model, latents, k=None, *, on_special=None):
        super().__init__(d_model, latents, k, on_special=on_special)
        self.threshold = nn.Parameter(torch.zeros(latents))

    @property
    def gates_train(self):
        return self.threshold.requires_grad

    def encode(self, x):
        pre = linear(x.to(self.W_enc.dtype), self.W_enc, self.b_enc)
        return pre * (pre > self.threshold)

    def start(self, x, l0):
        super().start(x, l0)
        self.b_enc.copy_(-self.W_enc @ self.b_dec)      # so that pre = W_enc (x - b_dec)
        pre = x @ self.W_enc.T + self.b_enc
        self.threshold.copy_(first_thresholds(pre, l0).clamp(min=0))

    def unit(self, x):
        """The rms distance of the activations from b_dec."""
        return (x - self.b_dec).square().sum(1).mean().sqrt().item()

    def training_step(self, x, bandwidth):
        """bandwidth: ε of the straight-through gradient, see Jump."""
        pre = linear(x, self.W_enc, self.b_enc)
        z, gates = Jump.apply(pre, self.threshold, bandwidth)
        return self.decode(z), gates.detach().sum(0), gates.sum()

    def after_step(self):
        self.threshold.clamp_(min=0)


KINDS = {"topk": TopK, "jumprelu": JumpReLU}


# ---- In the model --------------------------------------------------------------------------------

def splice(x, sae, special=None):
    """Replaces activations x [B, T, D] by their reconstruction (§3.4).

    Positions that the SAE was not trained on do not change. special [B, T]: BOS and EOS. (The
    published training does the same, utils.py:606; the published benchmarks spare only position 0.)

    Any callable x -> x̂ may stand in for an SAE, here and in `model(tokens, saes)`. It replaces
    every position of its block's output, unless it is a StandIn.
    """
    x_hat = sae(x).to(x.dtype)
    used = used_positions(sae, x, special)
    return torch.where(used[..., None], x_hat, x)


class StandIn:
    """Takes an SAE's place in `saes`: spliced at the same site and the same positions.

    This one adds half of the SAE's error back:

        StandIn(sae, lambda x: sae(x) + 0.5 * (x - sae(x)))

    everywhere: its output replaces every position, so the function decides which ones change.
    """

    def __init__(self, sae, function=None, everywhere=False):
        self.sae = sae
        self.function = function
        if everywhere:
            self.on_special, self.max_norm = True, None

    def __call__(self, x):
        return self.function(x)

    def __getattr__(self, name):                        # site, on_special, W_dec, ...
        if name == "sae":                               # copy() asks before `sae` is set
            raise AttributeError(name)
        return getattr(self.sae, name)


def is_in_mlp(sae):
    """Whether an SAE, or its stand-in, replaces an MLP's output inside its block."""
    return getattr(sae, "site", SAE.site) == "mlp"


def used_positions(sae, x, special):
    """bool [B, T]: the positions of x [B, T, D] that an SAE is trained on, and replaces.

    Leaves out BOS and EOS (special [B, T]) unless sae.on_special, and norms above sae.max_norm.
    """
    max_norm = getattr(sae, "max_norm", None)
    if getattr(sae, "on_special", True):
        used = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    elif special is not None:
        used = ~special
    else:
        raise InputError("this SAE was trained without BOS and EOS and must leave them alone: "
                         "pass special=model.special(tokens)")
    return used if max_norm is None else used & ~(norms(x) > max_norm)


def norms(x):
    """The norm of each activation, fp32: x [..., D] -> [...]."""
    return x.float().norm(dim=-1)


# ---- Thresholds, the jump, and the median --------------------------------------------------------

def first_thresholds(pre, l0):
    """Thresholds [M] at which all latents fire equally often on pre [N, M]: L0 = START_L0 · l0.

    Each fires on at least one token, so L0 starts higher if M > N · START_L0 · l0. If L0 started at
    l0, a third of the latents would fall below their thresholds for good before they had trained.
    """
    # A latent's threshold is its highest pre-activation after the `firing` ones that should fire.
    N, M = pre.shape
    firing = max(1, round(N * START_L0 * l0 / M))
    return pre.topk(min(firing + 1, N), dim=0).values[-1]


class Jump(torch.autograd.Function):
    """pre [N, M], θ [M] -> latents pre · H(pre - θ) and gates H(pre - θ), both [N, M] (§3.3).

    A jump has no useful gradient for θ, so θ gets the straight-through gradient of Rajamanoharan et
    al. (2024), with rect(u) = 1 on (-½, ½), else 0, and ε the bandwidth:

        ∂z/∂θ = -(θ/ε) rect((pre - θ)/ε)     ∂H/∂θ = -(1/ε) rect((pre - θ)/ε)

    pre gets ∂z/∂pre = H, and nothing from the gates.
    """

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        gates = (pre > threshold).to(pre.dtype)
        return pre * gates, gates

    @staticmethod
    def backward(ctx, d_z, d_gates):
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        d_threshold = -((threshold * d_z + d_gates) * near).sum(0) / ctx.bandwidth
        return d_z * (pre > threshold), d_threshold, None


def geometric_median(x, steps=100, tolerance=1e-6):
    """The point [D] with the smallest total distance to the rows of x [N, D] (Weiszfeld).

    A few positions with far larger norms, such as BOS, hardly move it, unlike the mean.
    """
    guess = x.mean(0)
    for _ in range(steps):
        distances = (x - guess).norm(dim=1)
        weights = 1 / distances.clamp(min=1e-12)
        last, guess = guess, weights @ x / weights.sum()
        if (guess - last).norm() <= tolerance * last.norm():
            break
    return guess
