"""A run of --method lora: train the adapters, save them, and measure what they win back.

    RUN_DIR/adapter/        the adapters, in PEFT's format; with several ranks or rates, each is in
                            RUN_DIR/rank-R/, lr-X/ or rank-R-lr-X/, complete run folders
    RUN_DIR/results.json    what the SAEs cost, and what the adapters win back (evals/fidelity.py)
    RUN_DIR/sequences.json  the same for every held-out sequence, for paired comparisons of runs

Several adapters of one model can train side by side in one pass (--rank 1 4 16, --lr 5e-5 2e-4).
Each trains exactly as if alone, bit for bit. They share the text, the frozen prefix, the base
model's forward pass, and its logits in the loss (objectives.linear_kl).

Shapes: B batch, T tokens, D d_model, S adapted models.
"""
from contextlib import nullcontext

import torch

from lorasae import adapt
from lorasae.adapt import ALONE
from lorasae.errors import InputError
from lorasae.evals.fidelity import ADAPTED
from lorasae.io.adapters import save_adapter
from lorasae.io.hub import model_place
from lorasae.lora import add_lora, attach_lora, detach_lora, lora_parameters
from lorasae.runs import distributed, training
from lorasae.runs.folder import Run


def adapt_model(setting, run, optimizer):
    """Trains a run's adapters, starting at its last checkpoint -> {folder: its results.json}."""
    model, saes, config = setting.model, setting.saes, setting.config
    blocks = blocks_to_adapt(config.adapt, saes, len(model.layers))
    adapters = new_adapters(model, blocks, config)
    if config.shard:
        distributed.shard(model, distributed.local(config.device))
    kind = Adapting(model, saes, adapters, config, optimizer, distributed.world())
    sizes = [training.size_of(own) for own in kind.parameters]
    training.show(training.what_trains(config, model, saes, blocks, sum(sizes)))

    training.look_before(setting)
    training.train(run, kind, setting.text)
    folders = save(model, run, adapters)

    # The base model and the SAEs did not change: measure them once for all adapters.
    results, unchanged = {}, training.evaluate(setting, saes, ("base", "sae"))
    for folder, variant, own, size in zip(folders, config.variants, adapters, sizes):
        attach_lora(model, own)
        found = {**unchanged, **training.evaluate(setting, saes, ADAPTED)}
        results[folder] = {**training.results_of(found, setting, run, folder),
                           "trainable_parameters": size}
        own_run = Run(folder, variant)                  # the run itself, if there is one adapter
        own_run.begin()
        own_run.finish(results[folder])

    if len(adapters) > 1:
        kinds = ["ranks"] * (len(config.rank) > 1) + ["rates"] * (len(config.rates) > 1)
        named = dict(zip(adapter_names(config, "", ""), results.values()))
        run.finish({" and ".join(kinds): named, **training.cost(run, setting)})
    return results


def blocks_to_adapt(words, saes, depth):
    """The values of --adapt -> the sorted numbers of the blocks that get adapters.

    `after`: every block after the first SAE, so that this SAE's input and L0 do not change.
    `all`: every block, for SAEs whose L0 is bounded.
    `next`: only the block after each SAE (§6.3).
    Numbers: those blocks. No value: `all` if every SAE's L0 is bounded, else `after`, as published.

    saes: {layer: SAE}; depth: how many blocks the model has.
    """
    given = " ".join(words)
    if not given:
        bounded = all(sae.l0_is_bounded for sae in saes.values())
        given = "all" if bounded else "after"

    if given == "after":
        blocks = range(min(saes) + 1, depth)
    elif given == "all":
        blocks = range(depth)
    elif given == "next":
        blocks = [layer + 1 for layer in sorted(saes) if layer + 1 < depth]
    elif all(word.isdecimal() for word in words):
        blocks = sorted({int(word) for word in words})
    else:
        raise InputError(f"--adapt {given}: expected after, all, next, "
                         "or block numbers such as 3 4 5")

    if not blocks:
        raise InputError(f"no block comes after the SAE at layer {max(saes)}: "
                         "pass --adapt all, or another --layer")
    return list(blocks)


def new_adapters(model, blocks, config):
    """Fresh adapters per rank and rate, [{module name: LoRALinear}]; the first are attached."""
    found = []
    for variant in config.variants:
        torch.manual_seed(config.seed)                  # each starts as it would in a separate run
        add_lora(model, blocks, variant.rank[0], config.alpha, config.dropout, config.targets)
        found.append(detach_lora(model))
    attach_lora(model, found[0])
    return found


class Adapting:
    """The training step for adapters: adapt.take_step, or `take_side_by_side` for several.

    adapters: [{module name: LoRALinear}], one for each of config.variants. optimizer: a class or
    function, called with a list of parameter groups and the Config.
    """

    def __init__(self, model, saes, adapters, config, optimizer=adapt.adamw, world=ALONE):
        self.model, self.saes, self.adapters = model, saes, adapters
        self.config, self.world = config, world
        self.names = adapter_names(config, "r", "lr")
        self.parameters = [lora_parameters(own) for own in adapters]
        self.tensors = sum(self.parameters, [])
        groups = [{"params": own, "rate": variant.lr}
                  for own, variant in zip(self.parameters, config.variants)]
        self.optimizer = optimizer(groups, config.variants[0])
        self.first = adapt.first_differing(model, saes)

    def frozen(self, tokens):
        return adapt.frozen_forward(self.model, self.saes, tokens, self.first)

    def step(self, part, step):
        training.set_rates(self.optimizer, step, self.config)
        if len(self.adapters) > 1:
            return self.take_side_by_side(part)
        return adapt.take_step(self.model, self.saes, part, self.first, self.optimizer,
                               self.config, self.world)

    def take_side_by_side(self, part):
        """adapt.take_step for all adapters at once -> {kl_NAME, grad_norm_NAME: value}."""
        config, totals = self.config, {}
        for some in adapt.split(part, config.micro_batch):
            losses, values = self.losses(some)
            (losses.sum() / config.batch_size).backward()
            for name, value in values.items():
                totals[name] = totals.get(name, 0) + value / config.batch_size

        gradients = [parameter.grad for parameter in self.tensors]
        self.world.all_reduce([*totals.values(), *gradients])
        norms = [torch.nn.utils.clip_grad_norm_(own, config.clip) for own in self.parameters]
        self.optimizer.step()
        self.optimizer.zero_grad()

        # For each adapter: nats per token, and the gradient norm before clipping.
        named = {}
        for which, name in enumerate(self.names):
            for loss, values in totals.items():
                named[f"{loss}_{name}"] = values[which] / config.context
            named[f"grad_norm_{name}"] = norms[which]
        return named

    def losses(self, part):
        """adapt.adapted_loss for all adapters at once -> losses [S], {name: values [S]}.

        Each draws the dropout masks that it would draw alone. The last adapter stays attached.
        """
        model, hidden = self.model, []
        gpus = [model.device] if model.device.type == "cuda" else []
        for own in self.adapters:
            attach_lora(model, own)
            last = own is self.adapters[-1]
            with nullcontext() if last else torch.random.fork_rng(gpus):
                x = model.run(part.x, self.first, len(model.layers), self.saes, part.special)
            hidden.append(model.norm(x))
        return adapt.objective(model, part, torch.stack(hidden), self.config)


def adapter_names(config, rank="rank-", lr="lr-"):
    """Names for the adapters, as in their folders: rank-16, lr-5e-05; "" if there is only one."""
    names = []
    for variant in config.variants:
        parts = []
        if len(config.rank) > 1:
            parts.append(f"{rank}{variant.rank[0]}")
        if len(config.rates) > 1:
            parts.append(f"{lr}{variant.lr}")
        names.append("-".join(parts))
    return names


def save(model, run, adapters):
    """Writes the adapters -> their folders: the run's own, or one inside it for each adapter."""
    folders = [run.folder / name for name in adapter_names(run.config)]
    place = str(model_place(run.config.model))          # a name that PEFT can resolve
    for folder, own in zip(folders, adapters):
        attach_lora(model, own)
        if run.writes:
            save_adapter(model, folder / "adapter", place)
    return folders
