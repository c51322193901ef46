"""THE METHOD (paper §3.4): adapt a model to its frozen SAEs with low-rank adapters, minimising KL(base ‖ adapted with SAE).

    teach     the base model's part of a step: the shared frozen prefix and the teacher's hidden state, without gradients
    learn     the student's part: adapters on, SAEs spliced in, the KL of Eq. 7
    train     the loop: AdamW at a constant rate, gradients clipped, one sequence a step

Exercised by `python train.py`. Shapes: B batch, T tokens, D d_model.
"""
from contextlib import contextmanager, nullcontext
from itertools import islice

import numpy as np
import torch

from lorasae.runs import distributed
from lorasae.io.corpus import special_mask
from lorasae.errors import InputError
from lorasae.lora import adapters, base, lora_parameters
from lorasae.objectives import linear_kl
from lorasae.sae import JumpReLU, splice


def adapted_blocks(spec, saes, depth):
    """The blocks to adapt: --adapt words -> sorted block numbers. saes: {layer: SAE}.

    `after`: every block after the first SAE, so no SAE but later ones sees a changed input and L0 stays what it was.
    `all`: every block, for TopK SAEs, whose L0 cannot grow. `next`: only the block after each SAE (§6.3). Or numbers.
    """
    if spec == ["after"]:
        return list(range(min(saes) + 1, depth))
    if spec == ["all"]:
        return list(range(depth))
    if spec == ["next"]:
        return sorted({layer + 1 for layer in saes if layer + 1 < depth})
    if not all(word.isdigit() for word in spec):
        raise InputError(f"--adapt {' '.join(spec)}: expected after, all, next, or block numbers")
    return sorted({int(word) for word in spec})


def default_adapt(saes):
    """The paper's choice: all blocks around TopK SAEs, only those after a JumpReLU SAE, whose L0 would move otherwise."""
    return ["after"] if any(isinstance(sae, JumpReLU) for sae in saes.values()) else ["all"]


def first_differing(model, saes):
    """The first block that can differ between base and adapted model: what comes before is run once, for both."""
    adapted = [int(name.split(".")[2]) for name in adapters(model)]
    return min(adapted + [layer + 1 for layer in saes], default=len(model.layers))


@torch.no_grad()
def teach(model, saes, tokens, keep, first):
    """tokens [B, T] -> the student's input to block `first` and the teacher's final hidden state, both [B, T, D]."""
    with base(model):
        x = model.run(model.embed(tokens), 0, first)                    # frozen prefix, shared by both
        target = model.norm(model.run(x, first, len(model.layers)))     # teacher, no SAE
    if first - 1 in saes:
        x = splice(x, saes[first - 1], keep)                            # Eq. 5, once, on the shared x
    return x, target


def learn(model, saes, x, target, keep, first, students=1, compiled=False):
    """The student's loss: Σ_tokens KL(base ‖ adapted) in nats (Eq. 7), differentiable in the adapters.

    students: how many sets of adapters stand side by side (lora.Students); of several, the losses [students].
    """
    x, keep = x.repeat(students, 1, 1), keep if keep is None else keep.repeat(students, 1)
    hidden = model.norm(model.run(x, first, len(model.layers), saes, keep))
    return linear_kl(target, hidden.unflatten(0, (students, -1)), model.head, model.softcap, compiled=compiled)


def train(model, saes, batches, run, *, steps, lr, weight_decay, clip, micro_batch, keep_special, decay=False, students=None,
          ahead=1, compiled=False):
    """Trains the adapters for `steps` batches of tokens [B, T]; resumes where the run's last checkpoint stands.

    The loss is the KL summed over a sequence and averaged over the B sequences, and that sum is what `clip` bounds: with the
    paper's B = 1 the clip binds at almost every step, so a mean over tokens would be another algorithm. Sequences pass
    `micro_batch` at a time with their gradients added, which changes memory and not the step. batches(skip) yields batches
    from the skip-th on.

    decay: lr falls linearly to 0 instead of staying, for runs too short to average out the noise of their steps. The others
    change no step. students: sets of adapters that were attached side by side and train independently. ahead: sequences whose
    frozen part runs at once, before their steps. compiled: blocks and loss go through torch.compile.
    """
    students = students or [adapters(model)]
    own = [lora_parameters(student) for student in students]
    parameters = sum(own, [])
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    names = [f"_r{next(iter(student.values())).lora_A.out_features}" for student in students] if len(students) > 1 else [""]
    config, first = run.config, first_differing(model, saes)

    def frozen(tokens):
        tokens = (tokens.pin_memory() if model.device.type == "cuda" else tokens).to(model.device, non_blocking=True)
        keep = special_mask(tokens, model.config.bos_token_id, model.config.eos_token_id) & keep_special
        return *teach(model, saes, tokens, keep, first), keep

    start = run.restore(parameters, optimizer)
    lessons = in_advance(batches, start, config["batch_size"], max(ahead, micro_batch), frozen)
    model.train()
    with compiled_blocks(model) if compiled else nullcontext():
        for step, lesson in zip(run.progress(start, steps), lessons):
            torch.manual_seed(step_seed(config["seed"], step))          # dropout: a resumed step draws what the first one drew
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps) if decay else lr
            losses, norms = take_step(model, saes, lesson, first, optimizer, own, batch_size=config["batch_size"],
                                      micro_batch=micro_batch, clip=clip, compiled=compiled)
            kl = {f"kl{name}": loss for name, loss in zip(names, losses / config["context"])}       # in nats a token
            run.log(step + 1, **kl, **{f"grad_norm{name}": norm for name, norm in zip(names, norms)})
            if run.checkpoint_due(step + 1):
                run.save(step + 1, parameters, optimizer)
    model.eval()


def take_step(model, saes, lesson, first, optimizer, own, *, batch_size, micro_batch, clip, compiled=False):
    """One step on the lesson (x, target, keep) of a batch, or of this process's share of it. own: each student's parameters.

    Returns the students' losses [S] and the norms of their gradients before clipping.
    """
    total = torch.zeros(len(own), device=model.device)
    for x, target, keep in zip(*(tensor.split(micro_batch) for tensor in lesson)):
        losses = learn(model, saes, x, target, keep, first, len(own), compiled) / batch_size
        losses.sum().backward()
        total += losses.detach()
    distributed.all_reduce([total, *(parameter.grad for parameters in own for parameter in parameters)])
    norms = [torch.nn.utils.clip_grad_norm_(parameters, clip) for parameters in own]
    optimizer.step()
    optimizer.zero_grad()
    return total, norms


@torch.no_grad()
def in_advance(batches, start, batch_size, at_once, work):
    """Yields work(tokens) for every batch of tokens [B, T] from the start-th on, but calls it for `at_once` sequences together.

    work returns tensors [B, ...] that depend on nothing that is trained. The groups begin at the same batches in a resumed run,
    which so repeats the uninterrupted one to the bit. Of several processes each sees its share of every batch.
    """
    batch_size = len(distributed.share(range(batch_size)))
    group = max(1, at_once // batch_size)
    late = start % group
    source = map(distributed.share, batches(start - late))
    while tokens := list(islice(source, group)):
        done = [torch.cat(parts) for parts in zip(*map(work, torch.cat(tokens).split(at_once)))]
        yield from islice(zip(*(tensor.split(batch_size) for tensor in done)), late, None)
        late = 0


@contextmanager
def compiled_blocks(model, backend="inductor"):
    """Runs the blocks through torch.compile inside the `with`. What cannot be compiled whole fails, rather than run slowly."""
    with torch._dynamo.config.patch(recompile_limit=64):                # a graph a kind of block, shape, and role
        for block in model.layers:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)
        try:
            yield
        finally:
            for block in model.layers:
                del block.forward                                       # the class's own is back


def step_seed(seed, step):
    """Of the random numbers of a step, in this process."""
    return int(np.random.SeedSequence([seed, step, distributed.rank()]).generate_state(1, np.uint64)[0])
