"""Muon (Jordan 2024; beyond the paper): every direction of a matrix moves at the same speed.

    M ← μ M + (1 - μ) ∂L/∂W                     momentum
    U = μ M + (1 - μ) ∂L/∂W                     Nesterov's: one step ahead of it
    W ← (1 - η λ) W - 0.2 η √max(out, in) · O   O = `orthogonal(U)`: singular values of about 1

√max(out, in) / 5 gives O the size of an AdamW step, so AdamW's rates fit Muon (arXiv 2502.16982).
Matrices of one shape are multiplied together, in a third of torch.optim.Muon's time on a CPU.

Shapes: N matrices, r their short side, c their long one.
"""
import torch

from lorasae.adapt import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)        # a, b, c of Newton-Schulz, Jordan's
SMALLEST = 1e-7                                 # least norm to divide by: A's first gradient is 0


def muon(groups, config):
    """Muon for matrices, AdamW for the rest. groups: parameter groups; each "params" a list."""
    matrices, others = [], []
    for group in groups:
        matrices.append({**group, "params": [p for p in group["params"] if p.dim() == 2]})
        rest = [p for p in group["params"] if p.dim() != 2]
        if rest:                                        # a LoRA adapter has none
            others.append({**group, "params": rest})
    parts = [Muon(matrices, config.lr, config.weight_decay)]
    if others:
        parts.append(adamw(others, config))
    return Optimizers(*parts)


class Optimizers:
    """Several optimisers as one."""

    def __init__(self, *parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


class Muon(torch.optim.Muon):
    """torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), state included, without its bf16."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            updates = [self.nesterov(weight, group["momentum"]) for weight in weights]
            directions = orthogonal(updates, group["ns_steps"])

            for weight, direction in zip(weights, directions):
                size = 0.2 * max(weight.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(direction, alpha=group["lr"] * size)

    def nesterov(self, weight, mu):
        """U of a weight, after its gradient has been added to its momentum."""
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - mu)
        return weight.grad.lerp(momentum, mu)


def naive_orthogonal(matrix, steps=5):
    """U = P S Qᵀ -> P S' Qᵀ, S' between 0.6 and 1.3 unless S is far below its largest.

    Newton-Schulz: each step maps singular values by s ← a s + b s³ + c s⁵; small ones grow fastest.
    """
    a, b, c = COEFFICIENTS
    x = matrix / matrix.norm().clamp(min=SMALLEST)      # no singular value is above 1
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def orthogonal(matrices, steps=5):
    """[naive_orthogonal(U)] for matrices of any shapes; those of one shape in one product."""
    # Lay each on its long side: U Uᵀ is then the smaller of its two Gram matrices.
    wide = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T for matrix in matrices]
    found = list(matrices)
    for shape in {matrix.shape for matrix in wide}:
        places = [place for place, matrix in enumerate(wide) if matrix.shape == shape]
        stacked = torch.stack([wide[place] for place in places])
        for place, result in zip(places, newton_schulz(stacked, steps)):
            found[place] = result if matrices[place].shape == shape else result.T
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
