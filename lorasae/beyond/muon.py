"""Muon (Jordan 2024; beyond the paper): the momentum of a matrix moves all of its directions at one speed.

    M ← μ M + (1 - μ) ∂L/∂W                             momentum, and U = μ M + (1 - μ) ∂L/∂W, a step ahead of it
    W ← (1 - η λ) W - 0.2 η √max(out, in) · O           O = `orthogonal(U)`, whose singular values are about 1

√max(out, in) / 5 gives O the size of a step of AdamW, and Muon AdamW's rates (arXiv 2502.16982). Adapters are many small
matrices of a few shapes: those of one shape are multiplied together, in a third of the time of torch.optim.Muon on a CPU.

Shapes: N matrices, r their short side, c their long one.
"""
import torch

from lorasae.adapt import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)                # a, b, c of Newton-Schulz, Jordan's
SMALLEST = 1e-7                                         # norm to divide by: the first gradient of A is 0, as B is


class Muon(torch.optim.Muon):
    """The steps of torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), and its state; products of fp32, where it takes bf16."""

    def __init__(self, parameters, lr, weight_decay=0.0):
        super().__init__(parameters, lr, weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            directions = orthogonal([self.ahead(weight, group["momentum"]) for weight in weights], group["ns_steps"])
            for weight, direction in zip(weights, directions):
                size = 0.2 * max(weight.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(direction, alpha=group["lr"] * size)

    def ahead(self, weight, mu):
        """U of a weight, whose momentum takes in its gradient."""
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - mu)
        return weight.grad.lerp(momentum, mu)


def naive_orthogonal(matrix, steps=5):
    """U = P S Qᵀ -> P S' Qᵀ, S' between 0.6 and 1.3 wherever S is not far below its largest: Newton-Schulz.

    Every step takes the singular values through s ← a s + b s³ + c s⁵, which lifts small ones the fastest.
    """
    a, b, c = COEFFICIENTS
    x = matrix / matrix.norm().clamp(min=SMALLEST)      # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def orthogonal(matrices, steps=5):
    """[naive_orthogonal(U)] of matrices of any shapes; those of one shape, standing or lying, in one product."""
    alike = {}                                          # {their shape: their places in the list}
    for place, matrix in enumerate(matrices):
        alike.setdefault(tuple(sorted(matrix.shape)), []).append(place)

    found = list(matrices)
    for places in alike.values():
        x = newton_schulz(torch.stack([lying(matrices[place]) for place in places]), steps)
        for place, each in zip(places, x):
            found[place] = each if is_lying(matrices[place]) else each.T
    return found


def newton_schulz(x, steps):
    """naive_orthogonal of N matrices [N, r, c]."""
    a, b, c = COEFFICIENTS
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)       # b G + c G²
        x = torch.baddbmm(x, polynomial, x, beta=a)                         # a X + (b G + c G²) X
    return x


def is_lying(matrix):
    """Whether it is as wide as it is high, or wider: the smaller of its two Gram matrices is then U Uᵀ."""
    return matrix.shape[0] <= matrix.shape[1]


def lying(matrix):
    return matrix if is_lying(matrix) else matrix.T


def new_optimizer(parameters, config):
    """The optimiser that config.optimizer names: AdamW, as published, or Muon (beyond the paper)."""
    if config.optimizer == "adamw":
        return adamw(parameters, config)
    return Muon(parameters, lr=config.lr, weight_decay=config.weight_decay)
