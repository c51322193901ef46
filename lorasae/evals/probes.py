"""Linear probes by torch, several side by side: scikit-learn's logistic regression, and the probes trained by gradient.

    logistic        the minimum itself, by Newton's method: what sklearn.linear_model.LogisticRegression approaches
    train_probes    AdamW over minibatches, at the epoch that is best on held-out texts: SAEBench's own probes

Shapes: P probes, N texts each, K features of a probe, D features of a text.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Probe(NamedTuple):
    """A text x of class 1 where x · weight + bias > 0."""
    weight: torch.Tensor                                # [P, D]
    bias: torch.Tensor                                  # [P]


class Task(NamedTuple):
    """P binary tasks over one table of texts: which rows, and which of them are positive."""
    rows: torch.Tensor                                  # [P, N] int64
    labels: torch.Tensor                                # [P, N] 0 or 1


# ---- Logistic regression -------------------------------------------------------------------------

def objective(x, y, weights, theta):
    """Σ_i s_i · logloss_i + ½ ‖w‖² of P problems: x [P, N, K + 1], its last column ones, theta [P, K + 1] -> [P].

    scikit-learn's with penalty "l2", s_i being C times the class weight. The intercept is not penalised.
    """
    logits = apply(x, theta)
    losses = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    return (weights * losses).sum(-1) + 0.5 * theta[:, :-1].square().sum(-1)


def apply(x, theta):
    """x [P, N, K + 1], theta [P, K + 1] -> [P, N]."""
    return (x @ theta[..., None]).squeeze(-1)


def logistic(x, y, C=1.0, balanced=False, iterations=100):
    """L2-regularised logistic regression, P at once: x [P, N, K], y [P, N] of 0 and 1 -> Probe in fp64.

    balanced: class_weight="balanced", s_i = C · N / (2 · texts of its class).
    """
    x, y = x.double(), y.double()
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)

    weights = torch.full_like(y, C)
    if balanced:
        positives = y.mean(-1, keepdim=True)
        weights = C * torch.where(y > 0, 0.5 / positives, 0.5 / (1 - positives))

    penalty = torch.ones_like(x[0, 0])
    penalty[-1] = 0
    theta = torch.zeros_like(x[:, 0])
    value = objective(x, y, weights, theta)

    for _ in range(iterations):
        # Newton's step: H⁻¹ g
        p = apply(x, theta).sigmoid()
        error = weights * (p - y)
        gradient = apply(x.mT, error) + penalty * theta
        if gradient.abs().max() < 1e-9:
            break
        curvature = weights * p * (1 - p)
        hessian = x.mT @ (curvature[..., None] * x) + penalty.diag()
        hessian.diagonal(dim1=-2, dim2=-1).add_(1e-12)  # where every p is 0 or 1, the intercept's row is 0
        step = torch.linalg.solve(hessian, gradient)

        # Halved in those problems where a whole one does not lower the objective
        size = torch.ones_like(value)
        for _ in range(30):
            proposed = theta - size[:, None] * step
            new = objective(x, y, weights, proposed)
            worse = new > value + 1e-12 * value.abs()
            if not worse.any():
                break
            size = torch.where(worse, size / 2, size)
        theta, value = proposed, new

    return Probe(theta[:, :-1], theta[:, -1])


# ---- Probes trained by gradient ------------------------------------------------------------------

def train_probes(features, train, held, *, lr, batch, epochs, seed, l1=0.0, patience=None):
    """P probes side by side -> the Probe of each one's best epoch on `held`.

    features [n, D]; train, held: Task. The loss of each is the mean cross-entropy of a batch + l1 · ‖w‖₁, by AdamW with
    weight decay 0.01. The seed decides their start and the order of the batches, so that two models are compared like
    with like. patience: a probe that has not improved for so many epochs in a row is done.
    """
    features = features.float()

    # nn.Linear's own start
    generator = torch.Generator().manual_seed(seed)
    tasks, texts = train.rows.shape
    bound = features.shape[1] ** -0.5
    weight = torch.empty(tasks, features.shape[1]).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(tasks).uniform_(-bound, bound, generator=generator)
    weight, bias = (p.to(features.device).requires_grad_() for p in (weight, bias))
    optimizer = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=0.01, fused=True)

    best = Probe(weight.detach().clone(), bias.detach().clone())
    best_accuracy = torch.full((tasks,), -1.0, device=features.device)
    stale = torch.zeros_like(best_accuracy)

    for _ in range(epochs):
        # One pass over the texts
        order = torch.randperm(texts, generator=generator).to(features.device)
        for chosen in order.split(batch):
            x = features[train.rows[:, chosen]]
            y = train.labels[:, chosen].float()
            logits = torch.einsum("pnd,pd->pn", x, weight) + bias[:, None]
            losses = F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(1)
            losses = losses + l1 * weight.abs().sum(1)
            optimizer.zero_grad()
            losses.sum().backward()                     # each probe's gradient is its own
            optimizer.step()

        # Of equally good epochs the last: held-out texts are few, the first to get them right is near the random start
        now = Probe(weight.detach(), bias.detach())
        found = accuracy(now, features, held)
        running = stale < patience if patience else torch.ones_like(stale, dtype=torch.bool)
        kept = running & (found >= best_accuracy)
        best = Probe(torch.where(kept[:, None], now.weight, best.weight),
                     torch.where(kept, now.bias, best.bias))
        stale = torch.where(found > best_accuracy, 0, stale + 1)
        best_accuracy = torch.maximum(best_accuracy, found)

        if patience and (stale >= patience).all():
            break
    return best


def hold_out(task, seed, share=0.1):
    """Task -> (most of its texts, a tenth of them): the epoch is chosen on the second.

    SAEBench chooses it on the test texts (evals/sparse_probing/probe_training.py), whose accuracy then flatters.
    """
    texts = task.rows.shape[1]
    order = torch.randperm(texts, generator=torch.Generator().manual_seed(seed)).to(task.rows.device)
    count = max(1, round(share * texts))
    held, rest = order[:count], order[count:]
    return [Task(task.rows[:, part], task.labels[:, part]) for part in (rest, held)]


def accuracy(probe, features, task):
    """features [n, D] -> [P]: the share of each task's texts that its probe gets right."""
    logits = features.to(probe.weight.dtype) @ probe.weight.T + probe.bias          # [n, P], as tasks share texts
    of_task = logits.T.gather(1, task.rows)
    right = (of_task > 0) == (task.labels > 0)
    return right.double().mean(1)
