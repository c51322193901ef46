"""A run of --method topk, jumprelu or e2e: train the SAE, keep it by tenths, measure it.

    RUN_DIR/sae-10pct ... sae-90pct, RUN_DIR/sae    the SAE after each tenth of its steps, in
                                                    SAELens's format, each with a training.json:
                                                    percent, step, tokens, and seconds of training
    RUN_DIR/results.json                            CE and KL with the SAE spliced in; FVU, L0,
                                                    dead latents
    RUN_DIR/sequences.json                          CE and KL of every held-out sequence
"""
from dataclasses import replace

import torch

from lorasae import dictionary
from lorasae.adapt import ALONE
from lorasae.errors import InputError
from lorasae.io.files import write_json
from lorasae.io.saes import save_sae
from lorasae.runs import distributed, training
from lorasae.runs.config import BY_K, latents_of
from lorasae.runs.folder import ends_a_tenth
from lorasae.runs.setting import sae_sources


def resolved(config, model_config):
    """The configuration with the width and rate that depend on the model.

    Raises InputError for an SAE that cannot be trained.
    """
    sae_sources(config, model_config.num_hidden_layers)         # checks the layer
    width = latents_of(config.width or 8 * model_config.hidden_size)
    by_k = config.method in BY_K
    active = config.k if by_k else config.l0
    if active >= width + by_k:                          # all of them are possible with k
        raise InputError(f"{active:g} active latents cannot be reached: there are {width:,}; pass "
                         "a smaller --k or --l0, or a larger --width")
    lr = config.lr or 2e-4 / (width / 2 ** 14) ** 0.5   # Gao et al. (2024)
    return replace(config, width=width, lr=lr)


def train_sae(setting, run):
    """Trains the SAE of a run from its last checkpoint on -> the numbers of results.json."""
    model = setting.model
    config = run.config = resolved(setting.config, model.config)
    setting = setting._replace(config=config)
    layer = config.layer[0]
    torch.manual_seed(config.seed)
    sae = dictionary.new_sae(
        config.method, model.config.hidden_size, config.width, config.k,
        on_special=False if config.max_norm else None).to(model.device)
    size = training.size_of(sae.parameters())
    training.show(training.what_trains(config, model, {layer: sae}, [], size))

    first = setting.text.first(config.batch_size)
    kind = SAETraining(model, sae, layer, config, run, first, distributed.world())
    run.begin()
    training.train(run, kind, setting.text)
    keep(run, sae, config.steps)

    found = training.evaluate(setting, {layer: sae}, ("base", "sae"))
    results = {**training.results_of(found, setting, run, run.folder),
               **numbers_of(found, setting, sae)}
    run.finish(results)
    return results


class SAETraining:
    """The kind of step that trains an SAE from scratch: dictionary.take_step.

    tokens [B, T]: text to which the biases of the fresh SAE are fitted. run: keeps the SAE after
    each tenth of its steps; may be None.
    """

    def __init__(self, model, sae, layer, config, run, tokens, world=ALONE):
        self.model, self.sae, self.layer = model, sae, layer
        self.config, self.run, self.world = config, run, world
        seen = dictionary.observe(model, sae, layer, tokens, end_to_end=False)
        self.state = dictionary.begin(sae, seen, config)
        self.tensors, self.optimizer = self.state.tensors, self.state.optimizer

    def frozen(self, tokens):
        return dictionary.observe(self.model, self.sae, self.layer, tokens,
                                  end_to_end=self.config.method == "e2e")

    def step(self, part, step):
        return dictionary.take_step(self.model, self.sae, self.layer, part, step, self.state,
                                    self.config, self.world)

    def after(self, step):
        steps = self.config.steps
        if self.run is not None and ends_a_tenth(step, steps) and step < steps:
            keep(self.run, self.sae, step)


def keep(run, sae, step):
    """Saves the SAE under the tenth of the training it has had, and what that took.

    (In the published code the "50pct" is the end of the training, trainer.py:460.)
    """
    run.flush()                                         # a loss that is not finite stops here
    if not run.writes:
        return
    config = run.config
    percent = 10 * (10 * step // config.steps)
    folder = run.folder / ("sae" if step == config.steps else f"sae-{percent}pct")
    save_sae(sae, folder, model_name=config.model, layer=config.layer[0], context=config.context)
    tokens = step * config.tokens_per_step
    write_json(folder / "training.json",
               {"percent": percent, "step": step, "tokens": tokens, "seconds": run.seconds})


def numbers_of(results, setting, sae):
    """{fvu, l0, dead_latents} of an SAE that fidelity.measure has measured."""
    layer, batches = setting.config.layer[0], setting.text.held_out.split(setting.config.eval_batch)
    found = results["sae"]
    return {"fvu": 1 - found["ev"][layer], "l0": found["l0"][layer],
            "dead_latents": dead_latents(setting.model, sae, layer, batches)}


@torch.no_grad()
def dead_latents(model, sae, layer, batches):
    """The part of the latents that no token of the batches fires, BOS and EOS included."""
    fired = torch.zeros(len(sae.W_enc), dtype=torch.bool, device=model.device)
    for tokens in batches:
        x = model.read(tokens.to(model.device), sae, layer).flatten(0, 1)
        for rows in x.split(1024):
            fired |= (sae.encode(rows) > 0).any(0)
    return 1 - fired.float().mean().item()
