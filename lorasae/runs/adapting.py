"""A run of --method lora: train the adapters, save them, and measure what they win back.

    RUN_DIR/adapter/        the adapters, in PEFT's format; with several ranks or rates
                            RUN_DIR/rank-R/adapter/ or RUN_DIR/lr-X/adapter/, each in a folder that
                            is a run of its own
    RUN_DIR/results.json    what splicing the SAEs in costs, and how much of it the adapters win
                            back (evals/fidelity.py)

Several adapters of one model train side by side in one pass (--rank 1 4 16, --lr 5e-5 2e-4). Each
is trained exactly, to the bit, as if alone; they share the text, the frozen prefix, the base
model's part, and its logits in the loss (objectives.linear_kl).

Shapes: B batch, T tokens, D d_model, S adapted models.
"""
from contextlib import nullcontext

import torch

from lorasae import adapt
from lorasae.adapt import ALONE
from lorasae.evals import fidelity
from lorasae.io.adapters import save_adapter
from lorasae.io.console import progress_line
from lorasae.io.files import write_json
from lorasae.io.presets import preset
from lorasae.lora import add_lora, attach_lora, detach_lora, lora_parameters
from lorasae.runs import distributed, training
from lorasae.runs.folder import versions


def adapt_model(setting, run, optimizer=adapt.adamw):
    """Trains the adapters of a run from its last checkpoint on -> {folder: its results.json}."""
    model, saes, config = setting.model, setting.saes, setting.config
    blocks = adapt.blocks_to_adapt(config.adapt, saes, len(model.layers))
    adapters = new_adapters(model, blocks, config)
    if config.shard:
        distributed.shard(model, distributed.local(config.device))
    world = distributed.world()
    kind = Adapting(model, saes, adapters, config, optimizer, world)
    size = sum(parameter.numel() for parameter in kind.tensors)
    progress_line(
        f"recipe {config.recipe}: {config.optimizer} at {training_rates(config)}; adapting "
        f"{', '.join(config.targets)} of {listed(blocks)} of {config.model} "
        f"around the SAE at layer {', '.join(map(str, saes))}: {size:,} trainable parameters, "
        f"{config.steps:,} steps of {config.batch_size} x {config.context} tokens")

    training.look_before(setting)
    setting.text.first(config.batch_size)               # a text that is too short fails here
    run.begin()
    training.train(run, kind, setting.text, world)
    folders = save(model, run, adapters)

    # The base model and the SAEs did not change: measured once, for all adapters.
    results, unchanged = {}, training.evaluate(setting, saes, ("base", "sae"))
    for folder, own in zip(folders, adapters):
        attach_lora(model, own)
        adapted = training.evaluate(setting, saes, ("adapted",))
        results[folder] = {
            **fidelity.summary({**unchanged, **adapted}, setting.text.documents),
            **training.cost(run, setting),
            "trainable_parameters": sum(p.numel() for p in lora_parameters(own))}
    write_results(run, results)
    return results


def new_adapters(model, blocks, config):
    """Fresh adapters of every rank and rate, [{module name: LoRALinear}]; the first are attached.

    Each starts from the seed, as in a run of its own.
    """
    found = []
    for variant in config.variants:
        torch.manual_seed(config.seed)
        add_lora(model, blocks, variant.rank[0], config.alpha, config.dropout, config.targets)
        found.append(detach_lora(model))
    attach_lora(model, found[0])
    return found


class Adapting:
    """The kind of step that trains adapters: adapt.take_step, or `take_side_by_side` for several.

    adapters: [{module name: LoRALinear}], one for each of config.variants. optimizer: its class or
    maker, called with a list of parameter groups and the Config.
    """

    def __init__(self, model, saes, adapters, config, optimizer=adapt.adamw, world=ALONE):
        self.model, self.saes, self.adapters = model, saes, adapters
        self.config, self.world = config, world
        self.parameters = [lora_parameters(own) for own in adapters]
        self.tensors = sum(self.parameters, [])
        rates = [variant.lr for variant in config.variants]
        groups = [{"params": own, "rate": lr} for own, lr in zip(self.parameters, rates)]
        self.optimizer = optimizer(groups, config.variants[0])
        self.first = adapt.first_differing(model, saes)

    def frozen(self, tokens):
        if self.model.device.type == "cuda":
            tokens = tokens.pin_memory()
        tokens = tokens.to(self.model.device, non_blocking=True)
        return adapt.frozen_forward(self.model, self.saes, tokens, self.first)

    def step(self, part, step):
        for group in self.optimizer.param_groups:
            group["lr"] = adapt.learning_rate(group["rate"], step, self.config)
        if len(self.adapters) > 1:
            return self.take_side_by_side(part)
        return adapt.take_step(self.model, self.saes, part, self.first, self.optimizer,
                               self.config, self.world)

    def after(self, step):
        pass

    def take_side_by_side(self, part):
        """adapt.take_step for all adapters -> {kl_NAME, grad_norm_NAME: value}."""
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

        # A line for each adapter: nats per token, and the gradient's norm before clipping.
        named = {}
        for which, name in enumerate(adapter_names(config, "r", "lr")):
            for loss, values in totals.items():
                named[f"{loss}_{name}"] = values[which] / config.context
            named[f"grad_norm_{name}"] = norms[which]
        return named

    def losses(self, part):
        """adapt.adapted_loss for all adapters -> losses [S], {name: values [S]}.

        Each draws the dropout masks that it would draw alone. The last one stays attached.
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


def training_rates(config):
    """The learning rates, as the first line of a run names them."""
    rates = ", ".join(f"{rate:g}" for rate in config.rates)
    return f"{rates}, falling to 0" if config.lr_decay else rates


def listed(blocks):
    """blocks 13 to 25, or blocks 1, 3, 4"""
    consecutive = blocks == list(range(blocks[0], blocks[-1] + 1))
    if consecutive and len(blocks) > 2:
        return f"blocks {blocks[0]} to {blocks[-1]}"
    return f"blocks {', '.join(map(str, blocks))}"


def adapter_names(config, rank="rank-", lr="lr-"):
    """What tells adapters apart, as their folders do: rank-16, lr-5e-05; "" for a single one."""
    names = []
    for variant in config.variants:
        parts = []
        if len(config.rank) > 1:
            parts.append(f"{rank}{variant.rank[0]}")
        if len(config.rates) > 1:
            parts.append(f"{lr}{variant.lr}")
        names.append("-".join(parts))
    return names


# ---- Files ---------------------------------------------------------------------------------------

def save(model, run, adapters):
    """Writes the adapters -> the folder of each: the run's, or one inside it for each."""
    config, folders = run.config, []
    known = preset(config.model)
    for name, own in zip(adapter_names(config), adapters):
        folder = run.folder / name
        attach_lora(model, own)
        if run.writes:
            base_model = known.repo if known else config.model      # a name that PEFT can resolve
            save_adapter(model, folder / "adapter", base_model)
        folders.append(folder)
    return folders


def write_results(run, results):
    """results.json; for several adapters one in each folder, beside its own config.json."""
    config = run.config
    first, *others = results.values()
    if not others:
        run.finish(first)
        return
    if run.writes:
        for variant, folder in zip(config.variants, results):
            write_json(folder / "config.json", {**variant.to_json(), "versions": versions()})
            write_json(folder / "results.json", results[folder])

    shared = ("eval_tokens", "train_tokens", "tokens_per_second", "seconds")
    kinds = ["ranks"] * (len(config.rank) > 1) + ["rates"] * (len(config.rates) > 1)
    named = dict(zip(adapter_names(config, "", ""), results.values()))
    run.finish({" and ".join(kinds): named, **{name: first[name] for name in shared}})
