"""Several adapters of one model, trained side by side in one pass: --rank 1 4 16 64 256, --lr 5e-5 2e-4 1e-3.

Each student takes the very steps of a run of its own, to the bit. What it shares with the others is all that does not
depend on it: the text, the frozen prefix, the teacher, and the teacher's logits in the loss (objectives.linear_kl).

    one step of S students  =  prefix + teacher + S · student        S runs  =  S · (prefix + teacher + student)

The same as adapt.py does for one. Shapes: B batch, T tokens, D d_model, S students.
"""
from contextlib import nullcontext

import torch

from lorasae.adapt import compiled_blocks, first_differing, learning_rate, objective, split, step_seed
from lorasae.lora import attach_lora, lora_parameters


def learn(model, saes, lesson, first, students, compiled=False):
    """adapt.learn for each of the students ({module name: LoRALinear}, lora.detach_lora) -> losses [S].

    Every student draws the dropout masks that it would draw alone. The last one stays attached.
    """
    depth = len(model.layers)
    hidden = []
    for student in students:
        attach_lora(model, student)
        drawing = nullcontext() if student is students[-1] else torch.random.fork_rng(devices_of(model))
        with drawing:
            x = model.run(lesson.x, first, depth, saes, lesson.special)
        hidden.append(model.norm(x))
    losses = objective(model, lesson, torch.stack(hidden), compiled)
    return losses.reshape(len(students))


def devices_of(model):
    """The GPUs whose random numbers the model draws."""
    return [model.device] if model.device.type == "cuda" else []


def take_step(model, saes, lesson, first, optimizer, students, config, all_reduce=None):
    """adapt.take_step for all students. Returns their losses [S] and the norms of their gradients before clipping [S]."""
    total = torch.zeros(len(students), device=model.device)
    for part in split(lesson, config.micro_batch):
        losses = learn(model, saes, part, first, students, config.compile) / config.batch_size
        losses.sum().backward()
        total += losses.detach()

    parameters = [lora_parameters(student) for student in students]
    if all_reduce is not None:
        gradients = [parameter.grad for own in parameters for parameter in own]
        all_reduce([total, *gradients])
    norms = [torch.nn.utils.clip_grad_norm_(own, config.clip) for own in parameters]
    optimizer.step()
    optimizer.zero_grad()
    return total, torch.stack(norms)


def train(model, saes, lessons, optimizer, students, config, start=0, all_reduce=None, process=0):
    """adapt.train for all students. optimizer: a group of parameters a student, in their order.

    Yields (steps done, losses [S], gradient norms [S]) after each step.
    """
    first = first_differing(model, saes)
    model.train()
    with compiled_blocks(model) if config.compile else nullcontext():
        for step, lesson in zip(range(start, config.steps), lessons):
            torch.manual_seed(step_seed(config.seed, step, process))
            for group, variant in zip(optimizer.param_groups, config.variants, strict=True):
                group["lr"] = learning_rate(variant.lr, step, config)
            losses, norms = take_step(model, saes, lesson, first, optimizer, students, config, all_reduce)
            yield step + 1, losses, norms
    model.eval()
