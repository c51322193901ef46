"""The training loop for all kinds of step, and what is printed and measured around it.

A kind of step has
    .model, .config, .world             the frozen model, settings, and processes that share batches
    .tensors, .optimizer                what trains; both are saved in checkpoints
    .frozen(tokens)                     the frozen model's part of a step, a NamedTuple of [B, ...]
    .step(part, step)                   one optimiser step -> {name: value} for metrics.jsonl

adapting.Adapting trains one or several adapters; sae_training.SAETraining an SAE from scratch;
beyond.finetuning.Finetuning an existing SAE, alone or together with adapters.
"""
import sys
from contextlib import contextmanager, nullcontext
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

from lorasae.evals import fidelity
from lorasae.evals.report import percent
from lorasae.io.console import note, progress_line
from lorasae.io.presets import PRESETS, preset
from lorasae.runs import distributed
from lorasae.runs.config import BY_K, joined
from lorasae.runs.folder import ends_a_tenth

QUICK_TOKENS = 512                                      # held-out tokens measured before training


def train(run, kind, text, keep=None):
    """Begins or continues a run, and takes its steps; calls keep(step) after each tenth of them."""
    config, model = kind.config, kind.model
    text.batch(0)                                       # fails if the text is too short
    run.begin()

    # Restore what trains. Text and random numbers follow from the step number.
    start = run.restore(kind.tensors, kind.optimizer)
    model.train()
    with compiled_blocks(model) if config.compile else nullcontext():
        parts = frozen_parts(kind, text.batch, start)
        for step in run.progress(start):

            # The next batch and the frozen model's part of it, computed ahead of its step.
            part = next(parts)

            # One step. Its dropout masks are drawn again if the step is repeated.
            torch.manual_seed(step_seed(config.seed, step, kind.world.number))
            values = kind.step(part, step)

            # Log. After each tenth of the steps, keep what has trained so far.
            run.log(step + 1, values)
            if keep is not None and ends_a_tenth(step + 1, config.steps):
                keep(step + 1)

            # Checkpoint. Text before the oldest one is no longer needed.
            if run.is_due(step + 1):
                run.save(step + 1, kind.tensors, kind.optimizer)
                needed = run.oldest_kept_step() - max(config.ahead, config.micro_batch)
                text.keep_from(max(0, needed))          # a resumed run reads from there
    model.eval()


@torch.no_grad()
def frozen_parts(kind, batch, start):
    """Yields kind.frozen for each step's batch from step `start` on. batch: step -> tokens [B, T].

    The frozen part of a step depends on nothing that trains, so it may be computed for several
    steps together: `--ahead 8` gives a GPU eight sequences at once, where a published step has one.
    A resumed run forms the same groups, so its matrix products are bitwise the same. With several
    processes, each computes its share of every batch.
    """
    config, world, device = kind.config, kind.world, kind.model.device
    share = config.batch_size // world.count            # this process's sequences per step
    at_once = max(config.ahead, min(config.micro_batch, share))
    group = max(1, at_once // share)                    # steps that are computed together
    for begin in range(start - start % group, config.steps, group):
        steps = range(begin, min(begin + group, config.steps))
        batches = [distributed.share(batch(step), world) for step in steps]
        tokens = torch.cat(batches)
        if device.type == "cuda":
            tokens = tokens.pin_memory().to(device, non_blocking=True)
        found = [kind.frozen(some) for some in tokens.split(at_once)]
        columns = [repeat(None) if column[0] is None else torch.cat(column).split(share)
                   for column in zip(*found)]
        for step, part in enumerate(map(type(found[0]), *columns), begin):
            if step >= start:
                yield part


@contextmanager
def compiled_blocks(model, backend="inductor"):
    """Compiles the blocks inside the `with`; graph breaks raise, instead of running eagerly."""
    # Blocks share code, which needs a graph for each window, shape, rank and role (frozen, adapted,
    # first adapted). That is more than the default limit of 8.
    with torch._dynamo.config.patch(recompile_limit=1024):
        for block in model.layers:
            block.forward = torch.compile(
                block.forward, fullgraph=True, dynamic=False, backend=backend)
        try:
            yield
        finally:
            for block in model.layers:
                del block.forward                               # back to the class's method


def set_rates(optimizer, step, config):
    """Every group's learning rate at a step, from 0: its `rate`, as published, or falling to 0."""
    left = 1 - step / config.steps if config.lr_decay else 1
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * left


def step_seed(seed, step, number=0):
    """Seed for a step's dropout in process `number`, so that a resumed run draws the same masks."""
    sequence = np.random.SeedSequence([seed, step, number])
    return int(sequence.generate_state(1, np.uint64)[0])


# ---- What a run is about to do -------------------------------------------------------------------

def listed(blocks):
    """Block numbers as text: 13 to 25, or 1 3 4."""
    consecutive = blocks == list(range(blocks[0], blocks[-1] + 1))
    return f"{blocks[0]} to {blocks[-1]}" if consecutive and len(blocks) > 2 else joined(blocks)


def what_trains(config, model, saes, blocks, trained):
    """A summary of the run to print, {name: value}.

    saes: {layer: SAE}. blocks: the numbers of the adapted ones. trained: how many parameters train.
    """
    rows = {}
    if blocks:
        rates = joined(config.rates) + ", falling to 0" * config.lr_decay
        rows["recipe"] = (f"{config.recipe}: {config.optimizer} at {rates}, dropout "
                          f"{config.dropout:g}")
        rows["adapters"] = (f"rank {joined(config.rank)} on {joined(config.targets)} of blocks "
                            f"{listed(blocks)}")

    latents = ", ".join(f"{len(sae.W_enc):,}" for sae in saes.values())
    of_mlp = "the MLP of " * (config.site == "mlp")
    rows["SAE"] = f"{latents} latents at the output of {of_mlp}block {joined(saes)}"
    if config.method in BY_K:
        rows["SAE"] += f", k {config.k}"
    elif config.l0:
        rows["SAE"] += f", L0 {config.l0:g}"
    if config.trains_sae:
        rate = config.sae_lr if config.train_sae else config.lr
        rows["SAE"] += f", trained by {config.mode} at {rate:g}"

    size = size_of(frozen for frozen in model.parameters() if not frozen.requires_grad)
    rows["trainable"] = f"{trained:,} parameters, {trained / size:.2%} of {config.model}'s {size:,}"
    rows["steps"] = (f"{config.steps:,} of {config.batch_size} x {config.context} tokens, "
                     f"{config.trained_tokens:,} in all")
    return rows


def size_of(tensors):
    """The total number of elements."""
    return sum(tensor.numel() for tensor in tensors)


def show(rows):
    """Prints {name: value}, one per line."""
    progress_line("\n".join(f"{name:16}{value}" for name, value in rows.items()))


def look_before(setting):
    """Prints what splicing in the SAEs costs, on a small part of the held-out text.

    Warns if an SAE's explained variance is negative, or if its file names another model.
    """
    model, saes, text, config = setting.model, setting.saes, setting.text, setting.config
    count = min(len(text.held_out), max(1, QUICK_TOKENS // config.context))
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
            note(f"warning: the SAE at layer {layer} explains less than the mean activation "
                 "would: it may belong to another model or layer")
        if not same_model(sae.model_name, config.model):
            note(f"warning: the SAE at layer {layer} was trained on {sae.model_name}, as its file "
                 f"says, not on {config.model}")


def same_model(name, model):
    """Whether a model's name in an SAE's file can mean this model; True if there is no name."""
    known = preset(model)
    names = [model, known.repo, known.mirror or ""] if known else [model]
    names += [key for key, other in PRESETS.items() if other is known]
    last_parts = {Path(other).name.lower() for other in names}
    return not name or Path(name).name.lower() in last_parts


# ---- Measuring -----------------------------------------------------------------------------------

def evaluate(setting, saes, settings):
    """fidelity.measure on the held-out text; each process measures its portion."""
    config, held_out = setting.config, setting.text.held_out
    progress_line(f"measuring {', '.join(settings)} on {held_out.numel():,} held-out tokens")
    batches = held_out.split(max(config.ahead, config.eval_batch // distributed.count()))
    if config.shard:                                    # all processes run each block together
        return fidelity.measure(setting.model, saes, batches, settings)
    return fidelity.measure(setting.model, saes, distributed.portion(batches), settings,
                            distributed.merge)


def results_of(found, setting, run, folder):
    """A run's results from `evaluate` and what the run cost. Writes folder/sequences.json."""
    documents = setting.text.documents
    if run.writes:
        fidelity.write_sequences(folder, found, documents)
    return {**fidelity.summary(found, documents), **cost(run, setting)}


def cost(run, setting):
    """The tokens, time and memory that a run took."""
    tokens = run.config.trained_tokens
    return {
        "eval_tokens": setting.text.held_out.numel(),
        "train_tokens": tokens,
        "tokens_per_second": tokens / run.seconds,
        "seconds": run.seconds,
        "peak_memory_bytes": peak_memory_bytes(run.config.device),
    }


def peak_memory_bytes(device):
    """The run's peak memory, on its GPU or in its process; None if unknown."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(distributed.local(device))
    return resident("VmHWM") if sys.platform == "linux" else None


def resident(name):
    """This process's memory in bytes, now (VmRSS) or at its peak (VmHWM); Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return None
