"""Linear probes by torch, several side by side: scikit-learn's logistic regression, and the probes trained by gradient.

    logistic        the minimum itself, by Newton's method: what sklearn.linear_model.LogisticRegression approaches
    train_probes    AdamW over minibatches, stopped at the epoch that is best on held-out texts (SAEBench's own probes)

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


# ---- Logistic regression ----------------------------------------------------------------------------------------------

def objective(x, y, weights, theta):
    """Σ_i s_i · logloss_i + ½ ‖w‖², of P problems: x [P, N, K + 1] with a column of ones, theta [P, K + 1] -> [P].

    scikit-learn's with penalty "l2", divided by nothing; s_i = C, times its class weight. The intercept goes unpenalised.
    """
    logits = (x @ theta[..., None]).squeeze(-1)
    losses = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    return (weights * losses).sum(-1) + 0.5 * theta[:, :-1].square().sum(-1)


def logistic(x, y, C=1.0, balanced=False, iterations=100):
    """L2-regularised logistic regression, P at once: x [P, N, K], y [P, N] of 0 and 1 -> Probe in fp64.

    Newton's method with halved steps where a full one does not lower the objective. balanced: class_weight="balanced",
    s_i = C · N / (2 · texts of its class).
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
        p = (x @ theta[..., None]).squeeze(-1).sigmoid()
        gradient = ((weights * (p - y))[:, None] @ x).squeeze(1) + penalty * theta
        if gradient.abs().max() < 1e-9:
            break
        curvature = (weights * p * (1 - p))[..., None] * x
        hessian = x.mT @ curvature + penalty.diag()
        hessian.diagonal(dim1=-2, dim2=-1).add_(1e-12)              # where every p is 0 or 1, the intercept's row is 0
        step = torch.linalg.solve(hessian, gradient)

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


# ---- Probes trained by gradient -----------------------------------------------------------------------------------------

def train_probes(features, train, held, *, lr, batch, epochs, seed, l1=0.0, patience=None):
    """P probes side by side -> the Probe of each one's best epoch on `held`.

    features [n, D]; train, held: Task. The loss of each is the mean cross-entropy of a batch + l1 · ‖w‖₁, by AdamW with
    weight decay 0.01. The P tasks share their order of batches and start from the same seed, so that two models are compared
    like with like. patience: a probe that has not improved for so many epochs in a row is done.
    """
    features = features.float()
    generator = torch.Generator().manual_seed(seed)
    tasks, texts = train.rows.shape
    bound = features.shape[1] ** -0.5                   # nn.Linear's own start

    weight = torch.empty(tasks, features.shape[1]).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(tasks).uniform_(-bound, bound, generator=generator)
    weight, bias = (p.to(features.device).requires_grad_() for p in (weight, bias))
    optimizer = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=0.01, fused=True)

    best = Probe(weight.detach().clone(), bias.detach().clone())
    best_accuracy = torch.full((tasks,), -1.0, device=features.device)
    stale = torch.zeros_like(best_accuracy)

    for _ in range(epochs):
        order = torch.randperm(texts, generator=generator).to(features.device)
        for chosen in order.split(batch):
            x = features[train.rows[:, chosen]]
            y = train.labels[:, chosen].float()
            logits = torch.einsum("pnd,pd->pn", x, weight) + bias[:, None]
            loss = F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(1) + l1 * weight.abs().sum(1)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()

        now = Probe(weight.detach(), bias.detach())
        found = accuracy(now, features, held)
        # Of equally good epochs the last: held-out texts are few, and the first to get them right is near the random start.
        running = stale < patience if patience else torch.ones_like(stale, dtype=torch.bool)
        kept = running & (found >= best_accuracy)
        best = Probe(torch.where(kept[:, None], now.weight, best.weight), torch.where(kept, now.bias, best.bias))
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
    held = max(1, round(share * texts))
    parts = order[held:], order[:held]
    return [Task(task.rows[:, part], task.labels[:, part]) for part in parts]


def decide(probe, x):
    """x [n, D], or [P, n, D] -> bool [P, n]: what each probe takes for positive."""
    return torch.einsum("...nd,...d->...n", x.to(probe.weight.dtype), probe.weight) + probe.bias[:, None] > 0


def accuracy(probe, features, task):
    """features [n, D] -> [P]: the share of each task's texts that its probe gets right."""
    logits = features.to(probe.weight.dtype) @ probe.weight.T + probe.bias          # [n, P]: texts are shared by tasks
    right = (logits.T.gather(1, task.rows) > 0) == (task.labels > 0)
    return right.double().mean(1)
