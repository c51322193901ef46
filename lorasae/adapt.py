"""THE METHOD (paper §3.4): adapt a model to its frozen SAEs with low-rank adapters, minimising KL(base ‖ adapted with SAE).

    naive_loss      Eq. 7 as it is written: two whole forward passes and all their logits
    teach, learn    the same loss without waste: the blocks before the SAE run once for both models, and no logits are kept
    take_step       one optimiser step on gradients clipped as the published code clips them
    train           the loop

Exercised by `python train.py`. What the words and symbols stand for:

    paper                       here
    M, the base model           the teacher: the model with its adapters switched off, `with base(model):`
    M adapted, with its SAE     the student: the same model, adapters on, SAEs spliced in
    A, B of every W (Eq. 1)     an adapter; all of them are `lora_parameters(model)`
    x_1 .. x_i before the SAE   the prefix: frozen blocks whose output teacher and student share
    y, ŷ (Eq. 7)                softmax(head(target)), softmax(head(hidden)); both exist a chunk of tokens at a time
    (none)                      a lesson: what one step needs of the frozen model, made by `teach` and read by `learn`

A layer is the number of a block, from 0. Shapes: B batch, T tokens, D d_model, S students.
"""
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch

from lorasae.errors import InputError
from lorasae.lora import blocks_with_adapters, base, lora_parameters
from lorasae.objectives import linear_kl
from lorasae.sae import JumpReLU, splice


def naive_loss(model, saes, tokens):
    """Σ_tokens KL(p_base ‖ p_adapted with SAE) in nats (Eq. 7), for tokens [B, T] and saes {layer: SAE}."""
    with torch.no_grad(), base(model):
        log_p = model(tokens).float().log_softmax(-1)
    log_q = model(tokens, saes).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


# ---- The same without waste --------------------------------------------------------------------------------------------

class Lesson(NamedTuple):
    """What a step needs of the frozen model."""
    x: torch.Tensor                     # [B, T, D] the student's input to the first block that differs
    target: torch.Tensor                # [B, T, D] the teacher's final hidden state
    special: torch.Tensor               # [B, T] bool: BOS and EOS positions


def first_differing(model, saes):
    """The first block that can differ between teacher and student: what comes before it is run once, for both."""
    after_saes = [layer + 1 for layer in saes]
    return min(blocks_with_adapters(model) + after_saes, default=len(model.layers))


@torch.no_grad()
def teach(model, saes, tokens, first):
    """The teacher's part: tokens [B, T] -> Lesson. `first` is first_differing(model, saes)."""
    depth = len(model.layers)
    special = model.special(tokens)
    with base(model):
        x = model.run(model.embed(tokens), 0, first)            # the prefix, shared by both
        target = model.norm(model.run(x, first, depth))         # the teacher goes on without SAE
    if first - 1 in saes:
        x = splice(x, saes[first - 1], special)                 # Eq. 5, where the prefix ends
    return Lesson(x, target, special)


def learn(model, saes, lesson, first, compiled=False):
    """The student's part: Lesson -> Σ_tokens KL(base ‖ adapted with SAE) in nats (Eq. 7), differentiable in the adapters."""
    x = model.run(lesson.x, first, len(model.layers), saes, lesson.special)
    return objective(model, lesson, model.norm(x), compiled)


def objective(model, lesson, hidden, compiled=False):
    """What is minimised (Eq. 7), of the student's final hidden state [B, T, D], or of several students' [S, B, T, D].

    All that trains on the paper's loss comes here: sweeps, end-to-end SAEs and what finetunes them included.
    """
    return linear_kl(lesson.target, hidden, model.head, model.softcap, compiled=compiled)


# ---- Training ----------------------------------------------------------------------------------------------------------

def adamw(parameters, config):
    """The optimiser of the paper's released recipe, over the adapters alone."""
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def take_step(model, saes, lesson, first, optimizer, config, all_reduce=None):
    """One step on a lesson. Returns the loss, averaged over its sequences, and the gradient's norm before clipping.

    The loss of a sequence is the *sum* of its tokens' KL, and that sum is what `clip` bounds, as in the published code
    (utils.py:521): with the paper's batch of one sequence the clip binds at almost every step, so a mean over tokens
    would be another algorithm. Sequences pass `micro_batch` at a time with their gradients added, which changes memory
    and not the step (but the masks of dropout, which are drawn in another order).
    """
    parameters = lora_parameters(model)
    total = torch.zeros((), device=model.device)
    for part in split(lesson, config.micro_batch):
        loss = learn(model, saes, part, first, config.compile) / config.batch_size
        loss.backward()
        total += loss.detach()

    if all_reduce is not None:                                  # of several processes each had a share of the batch
        all_reduce([total, *(parameter.grad for parameter in parameters)])
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
    optimizer.step()
    optimizer.zero_grad()
    return total, norm


def split(lesson, size):
    """The lesson's sequences, `size` at a time."""
    parts = [tensor.split(size) for tensor in lesson]
    return [Lesson(*tensors) for tensors in zip(*parts)]


def train(model, saes, lessons, optimizer, config, start=0, all_reduce=None, process=0):
    """The loop: a step a lesson, from step `start` on. Yields (steps done, loss, gradient norm) after each.

    config: steps, lr, lr_decay, clip, batch_size, micro_batch, seed, compile (runs.config.Config has all of these).
    all_reduce sums tensors over the processes, and process is the number of this one, where there are several. Dropout
    stays on to the end; in the published code the first evaluation switches it off for good (utils.py:418).
    """
    first = first_differing(model, saes)
    model.train()
    with compiled_blocks(model) if config.compile else nullcontext():
        for step, lesson in zip(range(start, config.steps), lessons):
            torch.manual_seed(step_seed(config.seed, step, process))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.lr, step, config)
            loss, norm = take_step(model, saes, lesson, first, optimizer, config, all_reduce)
            yield step + 1, loss, norm
    model.eval()


def learning_rate(lr, step, config):
    """The rate of step 0, 1, ...: constant, as published, or falling linearly to 0 after the last step."""
    return lr * (1 - step / config.steps) if config.lr_decay else lr


def step_seed(seed, step, process=0):
    """Of dropout's random numbers: a resumed step draws what the first one drew."""
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0])


# ---- Which blocks ------------------------------------------------------------------------------------------------------

def blocks_to_adapt(spec, saes, depth):
    """The blocks that get adapters: the words of --adapt -> sorted block numbers. saes: {layer: SAE}; depth: of the model.

    `after`: every block after the first SAE, so no SAE but later ones sees a changed input and L0 stays what it was.
    `all`: every block, for TopK SAEs, whose L0 cannot grow. `next`: only the block after each SAE (§6.3). Or numbers.
    No word: `after` where one of the SAEs is a JumpReLU, whose L0 would move otherwise, else `all`, as in the paper.
    """
    spec = list(spec)
    if not spec:
        moves = any(isinstance(sae, JumpReLU) for sae in saes.values())
        spec = ["after"] if moves else ["all"]

    if spec == ["after"]:
        blocks = list(range(min(saes) + 1, depth))
    elif spec == ["all"]:
        blocks = list(range(depth))
    elif spec == ["next"]:
        blocks = sorted({layer + 1 for layer in saes if layer + 1 < depth})
    elif all(word.isdecimal() for word in spec):
        blocks = sorted({int(word) for word in spec})
    else:
        raise InputError(f"--adapt {' '.join(spec)}: expected after, all, next, or block numbers")

    if not blocks:
        raise InputError(f"no block comes after the SAE at layer {max(saes)}: pass --adapt all, or another --layer")
    if blocks[-1] >= depth:
        raise InputError(f"--adapt {blocks[-1]} is out of range: the model has blocks 0 to {depth - 1}")
    return blocks


# ---- Compilation -------------------------------------------------------------------------------------------------------

@contextmanager
def compiled_blocks(model, backend="inductor"):
    """Runs the blocks through torch.compile inside the `with`. What cannot be compiled whole fails, rather than run slowly."""
    with torch._dynamo.config.patch(recompile_limit=64):        # a graph a kind of block, shape, and role
        for block in model.layers:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)
        try:
            yield
        finally:
            for block in model.layers:
                del block.forward                               # the class's own is back
