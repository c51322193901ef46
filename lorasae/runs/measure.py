"""What a run measures: fidelity by all processes together, speed, and the most memory it has held."""
import sys
from pathlib import Path

import torch

from lorasae.evals import fidelity
from lorasae.io.files import read_json, write_json
from lorasae.runs import distributed

try:
    import resource
except ImportError:                                     # Windows does not count a process's memory this way
    resource = None


def evaluate(model, saes, batches, settings):
    """fidelity.measure by all processes together, each of a portion of the batches."""
    portion = distributed.portion(batches, model)
    return fidelity.measure(model, saes, portion, settings, gather=lambda found: distributed.merge(found, model))


def evaluate_once(run, setting, settings):
    """`evaluate` on the held-out text. Results and text stay in the run's folder, where a resumed run finds them."""
    model, saes, corpus = setting.model, setting.saes, setting.text
    path = run.folder / "before.json"
    if distributed.agree(path.exists()):
        return read_results(path, saes)
    results = evaluate(model, saes, corpus.held_out.split(run.config.eval_batch), settings)
    run.begin()                                         # nothing is written before everything has been read
    if distributed.process() == 0:
        write_json(path, {name: plain(values) for name, values in results.items()})
    return results


def plain(values):
    """A setting's results as JSON; its numbers come back to the last bit."""
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def read_results(path, saes):
    """What `plain` wrote, for these SAEs."""
    results = {}
    for setting, values in read_json(path).items():
        losses = {name: torch.tensor(values[name], dtype=torch.float64) for name in ("ce", "kl")}
        by_layer = {name: {layer: values[name][str(layer)] for layer in saes} for name in ("l0", "ev") if name in values}
        results[setting] = {**losses, **by_layer}
    return results


def cost(run, corpus):
    """What a run's results cost."""
    tokens = run.config.trained_tokens
    return {"eval_tokens": corpus.held_out.numel(), "train_tokens": tokens, "tokens_per_second": tokens / run.seconds,
            "seconds": run.seconds}


def peak_memory_bytes(device):
    """The most memory the run has held: of the GPU where it ran on one, else of the whole process; None if unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform.startswith("linux"):                # getrusage would count what the parent held when it started this
        return resident("VmHWM")
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident(name):
    """VmRSS (now) or VmHWM (at most) of this process, in bytes; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return None
