"""THE METHOD (paper §3.4): adapt a model to its frozen SAEs with low-rank adapters, minimising KL(base ‖ adapted with SAE).

    teach     the base model's part of a step: the shared frozen prefix and the teacher's hidden state, without gradients
    learn     the student's part: adapters on, SAEs spliced in, the KL of Eq. 7
    train     the loop: AdamW at a constant rate, gradients clipped, one sequence a step

Exercised by `python train.py`. Shapes: B batch, T tokens, D d_model.
"""
import torch

from lorasae.data import special_mask
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


def learn(model, saes, x, target, keep, first):
    """The student's loss: Σ_tokens KL(base ‖ adapted) in nats (Eq. 7), differentiable in the adapters."""
    hidden = model.norm(model.run(x, first, len(model.layers), saes, keep))
    return linear_kl(target, hidden, model.head, model.softcap)


def train(model, saes, batches, run, *, steps, lr, weight_decay, clip, micro_batch, keep_special):
    """Trains the adapters for `steps` batches of tokens [B, T]; resumes where the run's last checkpoint stands.

    The loss is the KL summed over a sequence and averaged over the B sequences, and that sum is what `clip` bounds: with the
    paper's B = 1 the clip binds at almost every step, so a mean over tokens would be another algorithm. Sequences pass
    `micro_batch` at a time with their gradients added, which changes memory and not the step. batches(skip) yields batches
    from the skip-th on.
    """
    parameters = lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=model.device.type == "cuda")
    first = first_differing(model, saes)
    start = run.restore(parameters, optimizer)
    model.train()
    for step, tokens in zip(run.progress(start, steps), batches(start)):
        total = 0.0
        for part in tokens.to(model.device, non_blocking=True).split(micro_batch):
            keep = special_mask(part, model.config.bos_token_id, model.config.eos_token_id) if keep_special else None
            x, target = teach(model, saes, part, keep, first)
            loss = learn(model, saes, x, target, keep, first) / len(tokens)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        run.log(step + 1, kl=total / tokens.shape[1], grad_norm=norm)   # kl in nats a token
        if run.checkpoint_due(step + 1):
            run.save(step + 1, parameters, optimizer)
    model.eval()
