"""A run that trains an existing SAE: --method finetune, or --method lora --train-sae.

    RUN_DIR/sae/            the trained SAE, in SAELens's format
    RUN_DIR/adapter/        with --train-sae: the adapters, in PEFT's format
    RUN_DIR/sequences.json  all settings, including the original SAE, sequence by sequence
    RUN_DIR/results.json    what splicing the SAE in costs, before and after; FVU, L0, dead latents
"""
from lorasae import adapt, dictionary
from lorasae.adapt import ALONE
from lorasae.beyond import finetune
from lorasae.evals import fidelity
from lorasae.lora import lora_parameters
from lorasae.runs import adapting, distributed, sae_training, training
from lorasae.runs.setting import load_saes
from lorasae.sae import used_positions

SAMPLE = 16                                             # sequences that give the activations' scale


def finetune_sae(setting, run, optimizer):
    """Trains a run's SAE, and its adapters with --train-sae -> the numbers of results.json.

    "before" is the original SAE; the gap is always measured from it. optimizer: the adapters'.
    """
    model, config = setting.model, setting.config
    (layer, sae), = setting.saes.items()
    make_trainable(sae, config)
    adapters, blocks = {}, []
    if config.train_sae:
        blocks = adapting.blocks_to_adapt(config.adapt, setting.saes, len(model.layers))
        adapters, = adapting.new_adapters(model, blocks, config)

    sample = setting.text.sequences(0, SAMPLE)
    kind = Finetuning(model, layer, sae, adapters, config, sample, optimizer, distributed.world())
    size = training.size_of(kind.tensors)
    training.show({**training.what_trains(config, model, setting.saes, blocks, size),
                   "loss": config.objective + l0_in_words(sae)})
    training.look_before(setting)
    training.train(run, kind, setting.text)
    if adapters:
        adapting.save(model, run, [adapters])
    sae_training.keep(run, sae, config.steps)

    # Evaluate the original SAE and the trained one on the same text.
    original = load_saes(config, model.config, model.device)
    before = training.evaluate(setting, original, ("sae",))
    now = training.evaluate(setting, {layer: sae}, fidelity.settings_of(config))
    now["before"] = before["sae"]

    results = {
        **sae_training.numbers_of(now, setting, sae),   # an adapted model's L0 replaces this one
        **training.results_of(now, setting, run, run.folder),
        "before": sae_training.numbers_of(before, setting, original[layer]),
        "trainable_parameters": size}
    run.finish(results)
    return results


def l0_in_words(sae):
    """What happens to an SAE's L0 as it trains, as text."""
    if sae.l0_is_bounded:
        return ""
    return "; L0 kept where it was" if sae.gates_train else "; thresholds frozen, L0 free"


class Finetuning:
    """The kind of step that trains an existing SAE: finetune.take_step.

    adapters: {module name: LoRALinear} that train too, or {}. sample: tokens [B, T] whose
    activations give the scale of the SAE's thresholds. optimizer: for the adapters.
    """

    def __init__(self, model, layer, sae, adapters, config, sample, optimizer=adapt.adamw,
                 world=ALONE):
        self.model, self.config, self.world = model, config, world
        seen = dictionary.observe(model, sae, layer, sample, end_to_end=False)
        x = seen.x[used_positions(sae, seen.x, seen.special)].float()
        reference = finetune.reference_of(sae, x)
        self.trained = finetune.Trained(layer, sae, reference, lora_parameters(adapters))
        sae_lr = config.sae_lr if adapters else config.lr
        self.optimizer = finetune.optimizers(self.trained, config, sae_lr, optimizer)
        self.tensors = finetune.trained_parameters(self.optimizer)
        self.first = adapt.first_differing(model, {layer: sae})

    def frozen(self, tokens):
        return adapt.frozen_forward(self.model, {}, tokens, self.first)     # the SAE is not frozen

    def step(self, part, step):
        training.set_rates(self.optimizer, step, self.config)
        return finetune.take_step(self.model, self.trained, part, self.first, self.optimizer,
                                  self.config, self.world)


def make_trainable(sae, config):
    """Makes all of the SAE trainable, or all but its thresholds."""
    sae.requires_grad_()
    if config.thresholds == "frozen":
        sae.threshold.requires_grad_(False)
