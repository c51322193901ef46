"""Linear probes on a table of texts: scikit-learn's logistic regression, and SAEBench's own probes.

    logistic        L2-regularised logistic regression, for a few features
    train_probes    gradient descent on minibatches, several probes at once

Shapes: P tasks with a probe each, n texts in the table, N of them in each task, D features.
"""
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lorasae.errors import InputError


class Probe(NamedTuple):
    """A text x is positive if x · weight + bias > 0."""
    weight: torch.Tensor                                # [P, D]
    bias: torch.Tensor                                  # [P]


class Task(NamedTuple):
    """P binary tasks over one table of texts."""
    rows: torch.Tensor                  # [P, N] int64: which texts; [1, N] if all tasks share them
    labels: torch.Tensor                # [P, N] bool: which of them are positive


# ---- Tasks -------------------------------------------------------------------------------------

def rows_by_class(classes):
    """{class: texts} -> for each class, its rows in the table of all texts."""
    sizes = [len(texts) for texts in classes.values()]
    return torch.arange(sum(sizes)).split(sizes)


def halves(rows, device="cpu"):
    """Rows of texts, N for each task, the first half of them positive -> Task."""
    rows = torch.stack(rows).to(device)
    positive = torch.arange(rows.shape[1], device=device) < rows.shape[1] // 2
    return Task(rows, positive.expand_as(rows))


def one_against_rest(classes, seed, device="cpu"):
    """The task of each class: its texts against as many of the other classes.

    classes: {class: texts}, m of them; of each, only the first n texts are used, where n is the
    size of the smallest class. As in SAEBench, ceil(n / (m - 1)) texts are drawn from each other
    class, then n of these. SAEBench draws again for each accuracy; here they are drawn once.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffled(rows):
        return rows[torch.randperm(len(rows), generator=generator)]

    n = min(map(len, classes.values()))
    table = [of_class[:n] for of_class in rows_by_class(classes)]
    each = math.ceil(n / (len(table) - 1))
    rows = []
    for label, positive in enumerate(table):
        others = [shuffled(of_class)[:each] for i, of_class in enumerate(table) if i != label]
        rows.append(torch.cat([positive, shuffled(torch.cat(others))[:n]]))
    return halves(rows, device)


def hold_out(task, seed):
    """Task -> [nine tenths of its texts, one tenth]; the tenth is for choosing the epoch.

    SAEBench chooses on test texts (evals/sparse_probing/probe_training.py), so it scores too high.
    """
    texts = task.rows.shape[1]
    order = torch.randperm(texts, generator=torch.Generator().manual_seed(seed))
    count = max(1, round(texts / 10))
    held, rest = order[:count], order[count:]
    return [Task(task.rows[:, part], task.labels[:, part]) for part in (rest, held)]


def mean_difference(features, task):
    """features [n, D] -> [P, D]: the mean over a task's positive texts minus the negative ones'."""
    return torch.stack([features[rows[labels]].mean(0) - features[rows[~labels]].mean(0)
                        for rows, labels in zip(*task)])


def accuracy(probe, features, task):
    """features [n, D] -> [P]: the share of each task's texts that its probe gets right."""
    logits = features @ probe.weight.T + probe.bias                             # [n, P]
    found = logits.T.gather(1, task.rows) > 0
    return (found == task.labels).double().mean(1)


# ---- Logistic regression -----------------------------------------------------------------------

def scikit_learn():
    """sklearn.linear_model; InputError if scikit-learn is not installed."""
    try:
        from sklearn import linear_model
    except ImportError:
        raise InputError("probes on a few latents need scikit-learn: pip install "
                         "scikit-learn") from None
    return linear_model


def logistic(x, y, tests, class_weight=None):
    """Fits x [N, D] to y [N] bool, then classifies tests [n, D]. L2, C = 1, as in SAEBench."""
    x, y, tests = (tensor.double().cpu().numpy() for tensor in (x, y, tests))
    regression = scikit_learn().LogisticRegression(
        solver="newton-cholesky", tol=1e-6, class_weight=class_weight)
    return torch.from_numpy(regression.fit(x, y).predict(tests)) > 0


# ---- Gradient descent --------------------------------------------------------------------------

ADAMW = partial(torch.optim.AdamW, weight_decay=0.01, fused=True)


def train_probes(features, train, held=None, *, lr, optimizer=ADAMW, batch, epochs, seed, l1=0.0,
                 pos_weight=None, decay=1.0, patience=math.inf):
    """Trains P probes at once -> Probe: each from its best epoch on `held`, or from the last epoch.

    features [n, D]; train, held: Task. Each probe minimises the mean cross-entropy of a batch
    + l1 · ‖w‖₁. The seed sets the start and the batches, the same for both models.

    optimizer: (parameters, lr) -> optimiser. decay: the factor on its rate per epoch. pos_weight:
    the weights of positive texts [P, 1]. patience: how many epochs may pass without improvement.
    """
    features = features.float()
    tasks, texts = train.labels.shape
    device = features.device
    generator = torch.Generator().manual_seed(seed)

    def start(*shape):
        """Initial values, as in nn.Linear."""
        bound = features.shape[1] ** -0.5
        values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return values.to(device).requires_grad_()

    probe = Probe(start(tasks, features.shape[1]), start(tasks))
    optimizer = optimizer(probe, lr=lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
    best = Probe(*map(torch.zeros_like, probe))         # replaced in the first epoch
    best_accuracy = torch.full((tasks,), -1.0, dtype=torch.double, device=device)
    stale = torch.zeros_like(best_accuracy)
    better = stale == 0

    for _ in range(epochs):
        # One pass over the texts.
        order = torch.randperm(texts, generator=generator).to(device)
        for chosen in order.split(batch):
            x = features[train.rows[:, chosen]]                                 # [P or 1, B, D]
            y = train.labels[:, chosen].float()
            logits = torch.einsum("pbd,pd->pb", x, probe.weight) + probe.bias[:, None]
            losses = F.binary_cross_entropy_with_logits(logits, y, pos_weight=pos_weight,
                                                        reduction="none")
            optimizer.zero_grad()
            # Each probe's gradient comes from its own loss only.
            (losses.mean(1) + l1 * probe.weight.abs().sum(1)).sum().backward()
            optimizer.step()
        schedule.step()

        # The last of equally good epochs counts: with few texts the first is near the random start.
        if held is not None:
            found = accuracy(probe, features, held).where(stale < patience, -1)
            better = found >= best_accuracy
            stale = torch.where(found > best_accuracy, 0, stale + 1)
            best_accuracy = torch.maximum(best_accuracy, found)
        for kept, now in zip(best, probe):
            kept[better] = now.detach()[better]
        if (stale >= patience).all():
            break
    return best
