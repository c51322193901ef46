"""What a run measures: fidelity by all processes together, speed, and the most memory it has held."""
import sys

import torch

from lorasae.evals import fidelity
from lorasae.runs import distributed

try:
    import resource
except ImportError:                                     # Windows does not count a process's memory this way
    resource = None


def evaluate(model, saes, batches, settings):
    """fidelity.measure by all processes together, each of a portion of the batches."""
    portion = distributed.portion(batches, model)
    return fidelity.measure(model, saes, portion, settings, gather=lambda found: distributed.merge(found, model))


def cost(run, corpus):
    """What a run's results cost."""
    tokens = run.config.trained_tokens
    return {"eval_tokens": corpus.validation.numel(), "train_tokens": tokens, "tokens_per_second": tokens / run.seconds,
            "seconds": run.seconds}


def peak_memory_bytes(device):
    """The most memory the run has held: of the GPU where it ran on one, else of the whole process; None if unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
