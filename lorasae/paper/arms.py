"""What the experiments beyond the paper share: models around SAEs, three texts, arms in memory.

    training    the training text, in an order that depends on the seed
    held out    what results are measured on; nothing is chosen by it
    tuning      what rates are chosen on

No two of them share a document. An arm trains by the same loop and the same kinds of step as
train.py does.

Shapes: n sequences, T tokens.
"""
import copy
import math
import re
import time
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from lorasae import adapt
from lorasae.beyond.finetuning import SAMPLE, Finetuning
from lorasae.beyond.muon import muon
from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.io.files import read_json, write_json
from lorasae.io.hub import sae_plan
from lorasae.io.models import load_config, load_tokenizer
from lorasae.io.presets import TINY
from lorasae.io.shards import Text
from lorasae.lora import attach_lora, detach_lora, lora_parameters
from lorasae.model import Transformer
from lorasae.paper.study import RECIPES
from lorasae.runs import distributed, training
from lorasae.runs.adapting import Adapting, new_adapters
from lorasae.runs.config import Config, configure
from lorasae.runs.sae_training import dead_latents
from lorasae.runs.setting import load_model_and_saes, sae_sources

MODELS = ("tiny-gemma-2", "tiny-llama-3")
KINDS = ("jumprelu", "topk")
OPTIMIZERS = {"adamw": adapt.adamw, "muon": muon}
HELD_OUT = 50_000                                       # tokens that results may be measured on
TUNING = 10_000                                         # tokens of the tuning text
TEXT = "tuning on documents of its own"                 # an experiment begun with another text
L0 = "held at that of the same text"                    # or with another penalty cannot go on


class Case(NamedTuple):
    """A model around one SAE, and text."""
    name: str
    model: Transformer
    sae: torch.nn.Module                                # as it came: arms train copies
    layer: int
    blocks: list                                        # to adapt: the paper's choice for the kind
    config: Config
    tuning: torch.Tensor                                # [n, T]
    text: torch.Tensor                                  # [n, T] to train on
    held_out: torch.Tensor                              # [n, T]

    @property
    def folder(self):
        """The name as that of a folder."""
        return re.sub(r"[^\w.-]+", "-", self.name)


def case_config(model, sae, layer=None, device="cpu"):
    """The Config of a model around an SAE, from which every arm's follows.

    sae: of KINDS, an embedded model's; another source that holds one SAE, as `train.py --sae`
    takes it; None: the model's public one. layer: None: that of the run that made the SAE, or of
    the model's preset. Blocks are not compiled: each arm would compile them again.
    """
    given = {
        "model": model,
        "optimizer": "adamw",
        "batch_size": 1,
        "lr_decay": True,
        "dropout": 0.0,
        "device": device,
        "compile": False,
        "sae_dtype": "float32",
    }
    if model in MODELS and sae in KINDS:
        given["sae"] = (str(TINY / f"{model.removeprefix('tiny-')}-sae" / sae),)
    elif sae is not None:
        given["sae"] = (sae,)
    if layer is not None:
        given["layer"] = (layer,)
    return configure(given, RECIPES)


def load_case(name, config, tokens, eval_tokens, tuning_tokens=TUNING):
    """The Case of a `case_config`, with `tokens` to train on; eval_tokens: up to HELD_OUT."""
    if eval_tokens > HELD_OUT:
        raise InputError(f"--eval-tokens {eval_tokens}: at most {HELD_OUT:,}, as the rest of the "
                         "held-out text is for choosing rates")

    def sequences(tokens):
        return -(-tokens // config.context)

    model, saes = load_model_and_saes(config)
    (layer, sae), = saes.items()
    blocks = adapt.blocks_to_adapt(config.adapt, saes, len(model.layers))

    # All training text is one batch. Twice the tuning text is held out beside the other, since
    # whole documents are set apart.
    text = Text(config.data, load_tokenizer(config.model), model.config.bos_token_id,
                model.config.eos_token_id, context=config.context, seed=config.seed,
                eval_tokens=HELD_OUT + 2 * tuning_tokens, batch_size=sequences(tokens),
                field=config.field)
    with closing(text):
        chunks, training_text = text.held_out, text.batch(0)
        is_tuning = for_tuning(text.documents, sequences(tuning_tokens))
    tuning = chunks[is_tuning][:sequences(tuning_tokens)]
    held_out = chunks[~is_tuning][:sequences(eval_tokens)]
    return Case(name, model, sae, layer, blocks, config, tuning, training_text, held_out)


def for_tuning(documents, count):
    """documents [n] int, those of held-out chunks -> bool [n]: chunks of the tuning documents.

    They are whole documents, drawn in a fixed order until they have `count` chunks. None of them
    may have more than a quarter of these, so there are at least four. Raises InputError if there
    are too few such documents.
    """
    names, sizes = documents.unique(return_counts=True)
    chosen, found = [], 0
    for i in np.random.default_rng(0).permutation(len(names)):
        if found < count and sizes[i] <= max(1, count / 4):
            chosen.append(int(names[i]))
            found += int(sizes[i])
    if found < count:
        raise InputError(f"the held-out text has too few short documents for {count} sequences to "
                         "choose rates on: pass --data with more documents")
    return torch.isin(documents, torch.tensor(chosen))


# ---- Training ----------------------------------------------------------------------------------

class Result(NamedTuple):
    """An arm after its training."""
    adapters: dict | None                               # {module name: LoRALinear}
    sae: torch.nn.Module
    seconds: float                                      # of training alone


def asked(case, tokens, seed, **how):
    """The Config of an arm."""
    return replace(case.config, tokens=tokens, seed=seed, **how)


def fresh_adapters(case, config):
    """New adapters, off the model."""
    own, = new_adapters(case.model, case.blocks, config)
    detach_lora(case.model)
    return own


class Ordered:
    """The training text of a case in the order of a seed, again and again, from a step on."""

    def __init__(self, case, config, start=0):
        self.text, self.size, self.start = case.text, config.batch_size, start
        self.order = np.random.default_rng(config.seed).permutation(len(case.text))

    def batch(self, step):
        first = (self.start + step) * self.size
        places = np.arange(first, first + self.size) % len(self.order)
        return self.text[self.order[places]]


class InMemory:
    """Takes the place of a Run in training.train: an arm resumes from nothing and logs nothing."""

    def __init__(self, config):
        self.config = config

    def restore(self, tensors, optimizer):
        return 0

    def progress(self, start):
        return range(start, self.config.steps)

    def log(self, step, values):
        pass

    def is_due(self, step):
        return False


def timed_training(kind, config, text):
    """Takes all steps of a kind -> seconds."""
    started = time.perf_counter()
    training.train(InMemory(config), kind, text)
    if torch.cuda.is_available():
        torch.cuda.synchronize()                        # waits for the last step
    return time.perf_counter() - started


def adapted(case, config):
    """Adapters alone around the SAE as it came: [Result] of every rank and rate, in one pass.

    The seconds are those of the whole pass.
    """
    model, saes = case.model, {case.layer: case.sae}
    adapters = new_adapters(model, case.blocks, config)
    kind = Adapting(model, saes, adapters, config, OPTIMIZERS[config.optimizer])
    seconds = timed_training(kind, config, Ordered(case, config))
    detach_lora(model)
    return [Result(own, case.sae, seconds) for own in adapters]


def finetuned(case, config, sae_lr, adapters=None, train_adapters=False, start=0):
    """A copy of the SAE, trained on config.objective -> Result.

    adapters: to be attached. With train_adapters they train too, at config.lr; else they stay as
    they are, and start is the number of steps that trained them.
    """
    model, sae = case.model, copy.deepcopy(case.sae).requires_grad_(True)
    if adapters is not None:
        attach_lora(model, adapters)
    for parameter in lora_parameters(adapters or {}):
        parameter.requires_grad_(train_adapters)

    config = replace(config, **({"sae_lr": sae_lr} if train_adapters else {"lr": sae_lr}))
    trained = adapters if train_adapters else {}
    kind = Finetuning(model, case.layer, sae, trained, config, case.tuning[:SAMPLE],
                      OPTIMIZERS[config.optimizer])
    seconds = timed_training(kind, config, Ordered(case, config, start))
    detach_lora(model)
    return Result(adapters, sae.requires_grad_(False), seconds)


# ---- Measuring ---------------------------------------------------------------------------------

def measured(case, result):
    """An arm on the held-out text: {ce_base, ce, kl, kl_without_sae in nats per token; l0, fvu,
    dead_latents}."""
    model, layer, batches = attached(case, result), case.layer, case.held_out.split(8)
    found = fidelity.measure(model, {layer: result.sae}, batches, ("base", "adapted", "lora"))
    numbers = fidelity.summary(found)
    dead = dead_latents(model, result.sae, layer, batches)
    detach_lora(model)
    return {
        "ce_base": numbers["ce_base"],
        "ce": numbers["ce_adapted"],
        "kl": numbers["kl_adapted"],
        "kl_without_sae": numbers["kl_lora"],
        "l0": numbers["l0"][layer],
        "fvu": 1 - numbers["explained_variance"][layer],
        "dead_latents": dead,
    }


def on_tuning_text(case, result):
    """An arm on the tuning text: {kl: nats per token, or None if it diverged; l0}.

    Rates are chosen by this KL, and by nothing else.
    """
    model, batches = attached(case, result), case.tuning.split(8)
    found = fidelity.measure(model, {case.layer: result.sae}, batches, ("adapted",))["adapted"]
    detach_lora(model)
    kl = found["kl"].mean().item()
    return {"kl": kl if math.isfinite(kl) else None, "l0": found["l0"][case.layer]}


def attached(case, result):
    """The model, with the arm's adapters on it, if it has any."""
    return attach_lora(case.model, result.adapters or {})


def untouched(case):
    """The Result of no training at all."""
    return Result(None, case.sae, 0.0)


# ---- As parts of the whole paper (findings.py) -------------------------------------------------

def trainings(study):
    """Arms are trained in memory, so nothing before them."""
    return []


def pieces(study):
    """One per case."""
    return [f"{model} {kind}" for model in MODELS for kind in KINDS]


# ---- As commands -------------------------------------------------------------------------------

def add_cases(parser):
    """The options that say which cases."""
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS),
        help="as in train.py --model (default: %(default)s)")
    add("--saes", nargs="+", help=f"{' or '.join(KINDS)} of these two models, or, as in train.py "
        "--sae, sources that hold one SAE (default: both kinds; for another model its public one)")
    add("--layer", type=int, help="the SAE replaces the output of this block, counted from 0 "
        "(default: as in train.py)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: %(default)s)")


def wanted(args, **side_by_side):
    """{name: Config} of the cases that the options name.

    Raises InputError, before any work, if something is not there or does not fit: a model, an
    SAE, or the adapters that train side by side, fields of Config.
    """
    distributed.local(args.device)
    found = {}
    for model in args.models:
        for sae in args.saes or (KINDS if model in MODELS else [None]):
            config = case_config(model, sae, args.layer, args.device)
            replace(config, **side_by_side)
            for layer, source in sae_sources(config, load_config(model).num_hidden_layers):
                sae_plan(source, layer=layer, width=config.width, l0=config.l0)
            found[f"{model} {sae or 'public SAE'}"] = config
    return found


def check_rates(parser, **options):
    """Ends the command if a rate is not one."""
    for name, rates in options.items():
        for rate in rates:
            if not 0 < rate < math.inf:
                parser.error(f"--{name.replace('_', '-')} {rate:g}: pass rates above 0")


# ---- Files -------------------------------------------------------------------------------------

def once(path, work):
    """What the JSON file at `path` holds; if there is none, work() makes it.

    So an interrupted experiment continues.
    """
    if not path.exists():
        write_json(path, work())
    return read_json(path)


def same_plan(folder, plan, file="plan.json"):
    """Refuses to continue an experiment that was begun with other arguments.

    plan: plain values, kept in folder / file.
    """
    before = once(folder / file, lambda: plan)
    for name in plan:
        if before.get(name) != plan[name]:
            raise InputError(f"{folder} was begun with {name} {before.get(name)}, not "
                             f"{plan[name]}: pass another --out, or the same arguments to "
                             "continue")
