"""A run that trains an existing SAE: --method finetune, or --method lora --train-sae.

    RUN_DIR/sae/            the SAE afterwards, in SAELens's format
    RUN_DIR/adapter/        with --train-sae: the adapters, in PEFT's format
    RUN_DIR/before.json     the base model and the SAE as it came, sequence by sequence
    RUN_DIR/results.json    what splicing the SAE in costs, before and after; FVU, L0, dead latents
"""
import torch

from lorasae import adapt, dictionary
from lorasae.adapt import ALONE
from lorasae.beyond import finetune
from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.io.console import progress_line
from lorasae.io.files import write_json
from lorasae.lora import lora_parameters
from lorasae.runs import adapting, distributed, sae_training, training
from lorasae.runs.setting import load_saes

SAMPLE = 16                                             # sequences that give the activations' scale


def finetune_sae(setting, run, optimizer=adapt.adamw):
    """Trains the SAE of a run, and with --train-sae adapters too -> the numbers of results.json.

    "before" in them is of the SAE as it came; the gap is always that SAE's. optimizer: of adapters.
    """
    model, config = setting.model, setting.config
    (layer, sae), = setting.saes.items()
    make_trainable(sae, config)
    adapters = {}
    if config.train_sae:
        blocks = adapt.blocks_to_adapt(config.adapt, setting.saes, len(model.layers))
        adapters, = adapting.new_adapters(model, blocks, config)
    progress_line(what_trains(config, layer, sae, adapters))

    world = distributed.world()
    training.look_before(setting)
    sample = setting.text.first(SAMPLE)
    kind = Finetuning(model, layer, sae, adapters, config, sample, optimizer, world)
    run.begin()
    training.train(run, kind, setting.text, world)
    if adapters:
        adapting.save(model, run, [adapters])
    sae_training.keep(run, sae, config.steps)

    # The SAE as it came and the SAE as it is now, on the same text.
    original = load_saes(config, model.config, model.device)
    before = training.evaluate(setting, original, ("base", "sae"))
    if run.writes:
        write_json(run.folder / "before.json", fidelity.as_json(before))
    settings = ("base", "sae", "adapted", "lora") if adapters else ("base", "sae")
    now = training.evaluate(setting, {layer: sae}, settings)

    numbers = sae_training.numbers_of(now, setting, sae)
    if adapters:
        del numbers["l0"]                               # the adapted model's is in the summary
    results = {
        **fidelity.summary(now, setting.text.documents, before), **numbers,
        "before": sae_training.numbers_of(before, setting, original[layer]),
        **training.cost(run, setting),
        "trainable_parameters": sum(p.numel() for p in finetune.trained_parameters(kind.optimizer))}
    run.finish(results)
    return results


class Finetuning:
    """The kind of step that trains an existing SAE: finetune.take_step.

    adapters: {module name: LoRALinear} that train too, or {}. sample: tokens [B, T] whose
    activations give the scale of the SAE's thresholds. optimizer: of the adapters.
    """

    def __init__(self, model, layer, sae, adapters, config, sample, optimizer=adapt.adamw,
                 world=ALONE):
        self.model, self.config, self.world = model, config, world
        activations = []
        for tokens in sample.split(config.micro_batch):
            seen = dictionary.observe(model, sae, layer, tokens, end_to_end=False)
            activations.append(seen.x[seen.used].float())
        reference = finetune.reference_of(sae, torch.cat(activations))
        self.trained = finetune.Trained(layer, sae, reference, lora_parameters(adapters))
        sae_lr = config.sae_lr if adapters else config.lr
        self.optimizer = finetune.optimizers(self.trained, config, sae_lr, optimizer)
        self.tensors = finetune.trained_parameters(self.optimizer)
        self.first = finetune.first_trained(model, layer)

    def frozen(self, tokens):
        tokens = tokens.to(self.model.device, non_blocking=True)
        return adapt.frozen_forward(self.model, {}, tokens, self.first)     # the SAE is not frozen

    def step(self, part, step):
        for group in self.optimizer.param_groups:
            group["lr"] = adapt.learning_rate(group["rate"], step, self.config)
        return finetune.take_step(self.model, self.trained, part, self.first, self.optimizer,
                                  self.config, self.world)

    def after(self, step):
        pass


def what_trains(config, layer, sae, adapters):
    """What a run trains, in words."""
    if sae.l0_is_bounded:
        l0 = "L0 bounded by its kind"
    elif config.thresholds == "frozen":
        l0 = "thresholds frozen, so that L0 is free"
    else:
        l0 = "thresholds trained, L0 held where it was"
    what = f"an SAE of {len(sae.W_enc):,} latents at layer {layer} of {config.model}, {l0}"
    how = f"{config.steps:,} steps of {config.batch_size} x {config.context} tokens"
    if not adapters:
        return f"finetuning {what}, on {config.objective} at {config.lr:g}: {how}"
    size = sum(parameter.numel() for parameter in lora_parameters(adapters))
    return (f"recipe {config.recipe}: {config.optimizer} at {adapting.training_rates(config)} for "
            f"{size:,} parameters of adapters, together with (at {config.sae_lr:g}) {what}: {how}")


def make_trainable(sae, config):
    """Lets the SAE train: all of it, or all but its thresholds."""
    parameters = dict(sae.named_parameters())
    if config.thresholds == "frozen" and "threshold" not in parameters:
        raise InputError("--thresholds frozen: this SAE has none; leave it out")
    for name, parameter in parameters.items():
        frozen = name == "threshold" and config.thresholds == "frozen"
        parameter.requires_grad_(not frozen)
