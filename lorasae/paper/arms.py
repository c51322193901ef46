"""What the experiments beyond the paper share: models around SAEs, three splits of text, arms trained in memory.

    training    the training text, in an order of each seed's
    held out    what results are measured on; nothing is chosen by it
    tuning      what rates are chosen on: the text after it, that nothing trains on either

Shapes: n sequences, T tokens.
"""
import copy
import math
import re
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from lorasae import adapt, dictionary
from lorasae.beyond import finetune
from lorasae.beyond.muon import new_optimizer
from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.io.files import read_json, write_json
from lorasae.io.presets import TINY
from lorasae.lora import attach_lora, detach_lora, lora_parameters
from lorasae.model import Transformer
from lorasae.runs import adapting, distributed, sae_training, sweep
from lorasae.runs.config import Config
from lorasae.runs.defaults import configure
from lorasae.runs.preflight import check_memory
from lorasae.runs.setting import load_setting

MODELS = ("tiny-gemma-2", "tiny-llama-3")
KINDS = ("jumprelu", "topk")
HELD_OUT = 50_000                                       # tokens that results may be measured on
TUNING = 10_000                                         # tokens of the tuning text, after these
TEXT = "chunks mixed, tuning on held-out files"         # an experiment that was begun on another cannot go on,
L0 = "held at that of the same text"                    # nor one that was begun with another penalty


class Case(NamedTuple):
    """A model around one SAE, and text."""
    name: str
    model: Transformer
    sae: torch.nn.Module                                # as it came: arms train copies
    layer: int
    blocks: list                                        # to adapt: the paper's choice for the kind of SAE
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

    sae: of KINDS, an embedded model's; another source that holds one SAE, as `train.py --sae` takes it; None: the model's
    public one. layer: None: that of the run that made the SAE, or of the model's preset. Blocks are not compiled: every arm
    would be, anew.
    """
    given = {"model": model, "optimizer": "adamw", "batch_size": 1, "lr_decay": True, "dropout": 0.0, "device": device,
             "compile": False, "sae_dtype": "float32"}
    if model in MODELS and sae in KINDS:
        given["sae"] = (str(TINY / f"{model.removeprefix('tiny-')}-sae" / sae),)
    elif sae is not None:
        given["sae"] = (sae,)
    if layer is not None:
        given["layer"] = (layer,)
    return configure(given)


def load_case(name, config, tokens, eval_tokens, tuning_tokens=TUNING):
    """The Case of a `case_config`, with `tokens` to train on at hand; eval_tokens: up to HELD_OUT."""
    if eval_tokens > HELD_OUT:
        raise InputError(f"--eval-tokens {eval_tokens}: at most {HELD_OUT:,}, as the text after them is for choosing rates")

    def sequences(tokens):
        return -(-tokens // config.context)

    first_of_tuning = sequences(HELD_OUT)
    both = first_of_tuning + sequences(tuning_tokens)
    setting = load_setting(replace(config, eval_tokens=both * config.context))
    (layer, sae), = setting.saes.items()
    blocks = adapt.blocks_to_adapt(config.adapt, setting.saes, len(setting.model.layers))

    held_out = setting.text.held_out[:sequences(eval_tokens)]
    tuning = setting.text.held_out[first_of_tuning:]
    with setting.text.batches(sequences(tokens)) as batches:
        text, _ = next(batches)
    return Case(name, setting.model, sae, layer, blocks, config, tuning, text, held_out)


# ---- Training ----------------------------------------------------------------------------------------------------------

class Trained(NamedTuple):
    """An arm after its training."""
    student: dict | None                                # adapters, {module name: LoRALinear}
    sae: torch.nn.Module
    seconds: float                                      # of training alone


def asked(case, tokens, seed, **how):
    """The Config of an arm."""
    return replace(case.config, tokens=tokens, seed=seed, **how)


def new_student(case, config):
    """Fresh adapters, off the model."""
    student, = adapting.new_students(case.model, case.blocks, config)
    detach_lora(case.model)
    return student


def lessons(case, config, first, saes, start=0):
    """The frozen model's part of every step, over the training text in the seed's order, again and again if it must be.

    start: steps that an arm's training before this one took, of the same order.
    """
    order = np.random.default_rng(config.seed).permutation(len(case.text))
    for step in range(start, start + config.steps):
        places = np.arange(step * config.batch_size, (step + 1) * config.batch_size) % len(order)
        yield adapt.teach(case.model, saes, case.text[order[places]].to(case.model.device), first)


def adapted(case, config):
    """Adapters alone around the SAE as it came: [Trained] of every rank and rate of the configuration, trained in one pass.

    The seconds are those of the whole pass.
    """
    model, saes = case.model, {case.layer: case.sae}
    students = adapting.new_students(model, case.blocks, config)
    groups = [{"params": lora_parameters(student)} for student in students]
    optimizer = new_optimizer(groups, config.variants[0])
    first = adapt.first_differing(model, saes)
    source = lessons(case, config, first, saes)
    started = time.perf_counter()
    if len(students) == 1:
        updates = adapt.train(model, saes, source, optimizer, config)
    else:
        updates = sweep.train(model, saes, source, optimizer, students, config)
    finish(updates)
    seconds = time.perf_counter() - started
    detach_lora(model)
    return [Trained(student, case.sae, seconds) for student in students]


def finetuned(case, config, sae_lr, student=None, train_adapters=False, start=0):
    """A copy of the SAE, trained on config.objective -> Trained.

    student: adapters to be attached. With train_adapters they learn too, at config.lr; else they stay as they are, and
    start is the number of steps that made them.
    """
    model, sae = case.model, copy.deepcopy(case.sae).requires_grad_(True)
    seen = dictionary.observe(model, sae, case.layer, case.tuning[:16], end_to_end=False)       # for the scale alone
    held = finetune.hold(sae, seen.x[seen.learned])

    if student is not None:
        attach_lora(model, student)
    adapters = lora_parameters(student) if train_adapters else []
    for parameter in lora_parameters(student or {}):
        parameter.requires_grad_(train_adapters)

    learners = finetune.Learners(case.layer, sae, held, adapters)
    optimizer = finetune.optimizers(learners, config, sae_lr)
    source = lessons(case, config, finetune.first_trained(model, case.layer), {}, start)
    started = time.perf_counter()
    finish(finetune.train(model, learners, source, optimizer, config))
    seconds = time.perf_counter() - started
    detach_lora(model)
    return Trained(student, sae.requires_grad_(False), seconds)


def finish(updates):
    """Takes every step, and waits for the last one."""
    for _ in updates:
        pass
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- Measuring ---------------------------------------------------------------------------------------------------------

def measured(case, trained):
    """An arm on the held-out text: {ce_base, ce, kl, kl_without_sae in nats a token; l0, fvu, dead_latents}."""
    model, layer, batches = attached(case, trained), case.layer, case.held_out.split(8)
    numbers = fidelity.summary(fidelity.measure(model, {layer: trained.sae}, batches, ("base", "adapted", "lora")))
    dead = sae_training.dead_latents(model, trained.sae, layer, batches)
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


def on_tuning_text(case, trained):
    """An arm on the tuning text, {kl: nats a token, or None where it diverged; l0}: by this KL, and nothing else, rates are
    chosen.
    """
    model = attached(case, trained)
    found = fidelity.measure(model, {case.layer: trained.sae}, case.tuning.split(8), ("adapted",))["adapted"]
    detach_lora(model)
    kl = found["kl"].mean().item()
    return {"kl": kl if math.isfinite(kl) else None, "l0": found["l0"][case.layer]}


def attached(case, trained):
    """The model, with the arm's adapters on it, if it has any."""
    return attach_lora(case.model, trained.student or {})


def untouched(case):
    """The Trained of no training at all."""
    return Trained(None, case.sae, 0.0)


# ---- As parts of the whole paper (findings.py) -----------------------------------------------------------------------

def trainings(study):
    """Arms are trained in memory, so nothing before them."""
    return []


def pieces(study):
    """A case each."""
    return [f"{model} {kind}" for model in MODELS for kind in KINDS]


# ---- As commands -------------------------------------------------------------------------------------------------------

def add_cases(parser):
    """The options that say which cases."""
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), help="as of train.py --model (default: %(default)s)")
    add("--saes", nargs="+", help=f"{' or '.join(KINDS)} of these two models, or, as of train.py --sae, sources that hold one SAE "
        "(default: both kinds; of another model the public one)")
    add("--layer", type=int, help="the SAE replaces the output of this block, counted from 0 (default: as of train.py)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")


def wanted(args, **side_by_side):
    """{name: Config} of the cases that the options name. Raises InputError, before any work, for what is not there or does
    not fit: an SAE in training, or the adapters that train side by side, fields of Config.
    """
    distributed.local(args.device)
    found = {}
    for model in args.models:
        for sae in args.saes or (KINDS if model in MODELS else [None]):
            config = case_config(model, sae, args.layer, args.device)
            check_memory(replace(config, **side_by_side))
            check_memory(replace(config, train_sae=True, sae_lr=config.lr))
            found[f"{model} {sae or 'public SAE'}"] = config
    return found


def check_rates(parser, **options):
    """Ends the command where a rate is none."""
    for name, rates in options.items():
        for rate in rates:
            if not 0 < rate < math.inf:
                parser.error(f"--{name.replace('_', '-')} {rate:g}: pass rates above 0")


# ---- Files -------------------------------------------------------------------------------------------------------------

def once(path, work):
    """What the JSON file at `path` holds; where there is none, work() makes it. So an interrupted experiment continues."""
    if not path.exists():
        write_json(path, work())
    return read_json(path)


def same_plan(folder, plan, file="plan.json"):
    """Refuses to continue an experiment that was begun with other arguments; plan: plain values, kept in folder / file."""
    before = once(folder / file, lambda: plan)
    for name in plan:
        if before.get(name) != plan[name]:
            raise InputError(f"{folder} was begun with {name} {before.get(name)}, not {plan[name]}: pass another --out, or "
                             "the same arguments to continue")
