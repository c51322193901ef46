"""A run of --method topk, jumprelu or e2e: train the SAE, save it after each tenth, measure it.

    RUN_DIR/sae-10pct ... RUN_DIR/sae   the SAE after each tenth of the steps, in SAELens's format,
                                        with a training.json: percent, step, tokens, seconds so far
    RUN_DIR/results.json                CE and KL with the SAE spliced in; FVU, L0, dead latents
    RUN_DIR/sequences.json              CE and KL of every held-out sequence
"""
from dataclasses import replace

import torch

from lorasae import dictionary
from lorasae.errors import InputError
from lorasae.evals.common import batches
from lorasae.io.files import write_json
from lorasae.io.saes import save_sae
from lorasae.lora import base
from lorasae.runs import distributed, training
from lorasae.runs.config import BY_K


def resolved(config, model_config):
    """The Config with width and lr filled in. Raises InputError if the SAE cannot be trained."""
    width = config.width or 8 * model_config.hidden_size
    by_k = config.method in BY_K
    active = config.k if by_k else config.l0
    if active >= width + by_k:                          # k may equal the width, an L0 may not
        raise InputError(f"{active:g} active latents are too many for {width:,} latents: pass "
                         "a smaller --k or --l0, or a larger --width")
    lr = config.lr or 2e-4 / (width / 2 ** 14) ** 0.5   # Gao et al. (2024)
    return replace(config, width=width, lr=lr)


def train_sae(setting, run):
    """Trains a run's SAE, starting at its last checkpoint -> the numbers of results.json."""
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

    kind = SAETraining(model, sae, layer, config, setting.text.batch(0), distributed.world())
    training.train(run, kind, setting.text, keep=lambda step: keep(run, sae, step))

    found = training.evaluate(setting, {layer: sae}, ("base", "sae"))
    results = {**training.results_of(found, setting, run, run.folder),
               **numbers_of(found, setting, sae)}
    run.finish(results)
    return results


class SAETraining:
    """dictionary.take_step for an SAE from scratch. tokens [B, T]: text to fit its biases to."""

    def __init__(self, model, sae, layer, config, tokens, world):
        self.model, self.sae, self.layer = model, sae, layer
        self.config, self.world = config, world
        seen = dictionary.observe(model, sae, layer, tokens, end_to_end=False)
        self.state = dictionary.begin(sae, seen, config)
        self.tensors, self.optimizer = self.state.tensors, self.state.optimizer

    def frozen(self, tokens):
        return dictionary.observe(self.model, self.sae, self.layer, tokens,
                                  end_to_end=self.config.method == "e2e")

    def step(self, part, step):
        return dictionary.take_step(self.model, self.sae, self.layer, part, step, self.state,
                                    self.config, self.world)


def keep(run, sae, step):
    """Saves the SAE in a folder named by how much it has trained, with a training.json.

    (In the published code, "50pct" is the end of training, trainer.py:460.)
    """
    run.flush()                                         # a loss that is not finite ends the run
    if not run.writes:
        return
    config = run.config
    percent = 10 * (10 * step // config.steps)
    folder = run.folder / ("sae" if step == config.steps else f"sae-{percent}pct")
    save_sae(sae, folder, model_name=config.model, layer=config.layer[0], context=config.context)
    write_json(folder / "training.json", {
        "percent": percent, "step": step, "tokens": step * config.tokens_per_step,
        "seconds": run.seconds})


@torch.no_grad()
def numbers_of(results, setting, sae):
    """{fvu, l0, dead_latents} of an SAE, from the results of fidelity.measure and its activations.

    dead_latents: the fraction of latents that fire on no held-out token, BOS and EOS included.
    """
    model, layer, found = setting.model, setting.config.layer[0], results["sae"]
    fired = torch.zeros_like(sae.b_enc, dtype=torch.bool)
    for tokens in batches(setting):
        with base(model):
            x = model.read(tokens.to(model.device), sae, layer)
        for rows in x.flatten(0, 1).split(1024):
            fired |= (sae.encode(rows) > 0).any(0)
    dead = 1 - fired.float().mean().item()
    return {"fvu": 1 - found["ev"][layer], "l0": found["l0"][layer], "dead_latents": dead}
