"""The training loop, around four kinds of step, and what is measured before and after it.

A kind of step has
    .model, .tensors, .optimizer        what trains: a checkpoint holds tensors and optimiser
    .frozen(tokens)                     the frozen model's part of a step, a NamedTuple of [B, ...]
    .step(part, step)                   one optimiser step -> {name: value} for metrics.jsonl
    .after(step)                        saves what it keeps after this step, if anything

adapting.Adapting trains one or several adapters, sae_training.SAETraining an SAE from scratch, and
beyond.finetuning.Finetuning an existing SAE, alone or together with adapters.
"""
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from lorasae.adapt import ALONE, compiled_blocks, step_seed
from lorasae.evals import fidelity
from lorasae.evals.common import percent
from lorasae.io.console import note, progress_line
from lorasae.io.presets import preset
from lorasae.runs import distributed

QUICK_TOKENS = 4096                                     # held-out, looked at before training


def train(run, kind, text, world=ALONE):
    """Takes a run's steps, from its last checkpoint on."""
    config, model = run.config, kind.model

    # Restore what trains. Text and random numbers follow from the number of the step.
    start = run.restore(kind.tensors, kind.optimizer)
    model.train()
    with compiled_blocks(model) if config.compile else nullcontext():
        parts = frozen_parts(kind, text.batch, config, start, world)
        for step in run.progress(start):

            # The next batch and the frozen model's part of it, computed ahead of its step.
            part = next(parts)

            # One step. Its dropout masks are drawn again if the step is repeated.
            torch.manual_seed(step_seed(config.seed, step, world.number))
            values = kind.step(part, step)

            # Log, and let the kind save what it keeps.
            run.log(step + 1, values)
            kind.after(step + 1)

            # Checkpoint. Text before the oldest one is no longer needed.
            if run.is_due(step + 1):
                run.save(step + 1, kind.tensors, kind.optimizer)
                needed = run.oldest_kept_step() - max(config.ahead, config.micro_batch)
                text.keep_from(max(0, needed))          # a resumed run computes from there on
    model.eval()


@torch.no_grad()
def frozen_parts(kind, batch, config, start, world=ALONE):
    """Yields kind.frozen of every step's batch, from step `start` on; batch: step -> tokens [B, T].

    The frozen part of a step depends on nothing that trains, so it may be computed for several
    steps together: `--ahead 8` gives a GPU eight sequences where a step, as published, has one.
    A resumed run forms the same groups, so its products are the same to the bit. Each of several
    processes computes its share of every batch.
    """
    at_once = max(config.ahead, config.micro_batch)
    share = config.batch_size // world.count            # this process's sequences per step
    group = max(1, at_once // share)                    # steps that are computed together
    for begin in range(start - start % group, config.steps, group):
        tokens = [distributed.share(batch(step), world) for step in range(begin, begin + group)]
        found = [kind.frozen(some) for some in torch.cat(tokens).split(at_once)]
        columns = [None if column[0] is None else torch.cat(column) for column in zip(*found)]
        for step in range(max(begin, start), begin + group):
            rows = slice((step - begin) * share, (step - begin + 1) * share)
            yield type(found[0])(*(None if column is None else column[rows] for column in columns))


# ---- Measuring -----------------------------------------------------------------------------------

def evaluate(setting, saes, settings):
    """fidelity.measure on the held-out text, each process on its portion of it."""
    model, held_out = setting.model, setting.text.held_out
    progress_line(f"measuring {', '.join(settings)} on {held_out.numel():,} held-out tokens")
    batches = held_out.split(setting.config.eval_batch)
    return fidelity.measure(model, saes, distributed.portion(batches, model), settings,
                            gather=lambda found: distributed.merge(found, model))


def look_before(setting):
    """Prints what splicing the SAEs in costs, on a small part of the held-out text.

    Warns about an SAE that explains less than nothing, or whose file names another model.
    """
    model, saes, text, config = setting.model, setting.saes, setting.text, setting.config
    count = min(len(text.held_out), max(4, QUICK_TOKENS // config.context))
    results = fidelity.measure(model, saes, text.held_out[:count].split(config.eval_batch),
                               ("base", "sae"))
    numbers = fidelity.summary(results, text.documents[:count])
    before, after = numbers["ce_base"], numbers["ce_sae"]
    l0 = ", ".join(f"{value:.1f}" for value in numbers["l0_sae"].values())
    explained = numbers["explained_variance_sae"]
    progress_line(f"before training, on {count} of {len(text.held_out)} held-out sequences: CE "
                  f"{before:.4f} -> {after:.4f} with the SAE ({after - before:+.4f}), L0 {l0}, "
                  f"explained variance {', '.join(map(percent, explained.values()))}")

    for layer, sae in saes.items():
        if explained[layer] < 0:
            note(f"warning: the SAE at layer {layer} explains less than its mean would: it may "
                 "be of another model or layer")
        if not same_model(sae.model_name, config.model):
            note(f"warning: the SAE at layer {layer} was trained on {sae.model_name}, as its file "
                 f"says, not on {config.model}")


def same_model(name, model):
    """Whether the name of a model in an SAE's file can mean this model; True without a name."""
    known = preset(model)
    names = [model, known.repo, known.mirror or ""] if known else [model]
    last_parts = {Path(other).name.lower() for other in names}
    return not name or Path(name).name.lower() in last_parts


def cost(run, setting):
    """What a run's results cost."""
    tokens = run.config.trained_tokens
    return {
        "eval_tokens": setting.text.held_out.numel(),
        "train_tokens": tokens,
        "tokens_per_second": tokens / run.seconds,
        "seconds": run.seconds,
        "peak_memory_bytes": peak_memory_bytes(run.config.device),
    }


def peak_memory_bytes(device):
    """The most memory that the run has held, on its GPU or in its process; None if unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(distributed.local(device))
    return resident("VmHWM") if sys.platform == "linux" else None


def resident(name):
    """VmRSS (now) or VmHWM (at most) of this process, in bytes; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return None
