"""The configuration of a run: one table of options for the parser, the checks and --help.

    config = configure({"model": "gemma-2-2b", "rank": (64,)}, RECIPES)    the rest is filled in
    config = read_config(RUN_DIR)                                   what that run was asked for

A value comes from the first of these that has one: what is given; the run that made the SAE
(`--sae RUN_DIR`); the recipe; the model's preset (io/presets.py); the paper, whose values are the
defaults of Config's fields.
"""
import math
import os
import re
import sys
from argparse import BooleanOptionalAction
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

from lorasae.errors import InputError
from lorasae.io.console import count, note
from lorasae.io.files import read_object, shown
from lorasae.io.hub import sae_choice
from lorasae.io.models import load_config
from lorasae.io.presets import PAPER, PRESETS, latents, preset
from lorasae.io.text import NAMED
from lorasae.lora import TARGETS
from lorasae.sae import KINDS

SCRATCH = (*KINDS, "e2e")                               # train an SAE from scratch
BY_K = (*(name for name, kind in KINDS.items() if kind.l0_is_bounded), "e2e")
BY_L0 = tuple(name for name in SCRATCH if name not in BY_K)     # an L0 is asked for, not a k
METHODS = ("lora", *SCRATCH, "finetune")
BOTH = "lora --train-sae"                               # adapters and SAE together
EVERY = (*METHODS, BOTH)
ADAPTERS = ("lora", BOTH)
RETRAINED = ("finetune", BOTH)                          # train an existing SAE
AROUND_SAE = ("lora", *RETRAINED)                       # take an existing SAE
DEAD_AFTER = 10_000_000                                 # Gao et al. (2024)


class Kind(NamedTuple):
    """What an option's value may be."""
    type: type | tuple
    fits: Callable
    expected: str
    parse: Callable = str                               # of a word on the command line
    choices: tuple | None = None


def one_of(*choices):
    return Kind(str, choices.__contains__, f"one of {', '.join(choices)}", choices=choices)


HUGE = sys.float_info.max
TEXT = Kind(str, str.strip, "a text that is not empty")
WIDTH = Kind((str, int), lambda value: re.fullmatch(r"\d+[km]?", str(value).lower()),
             "a number, or a name such as 16k or 1m")
SWITCH = Kind(bool, lambda value: True, "true or false")
WHOLE = Kind(int, lambda value: 1 <= value < 2 ** 62, "a positive whole number", int)
TOKENS = WHOLE._replace(parse=count)
SEQUENCES = Kind(int, lambda value: 1 <= value <= 2 ** 20, "a whole number, 1 to 2^20", int)
LAYER = Kind(int, lambda value: value >= 0, "a whole number, at least 0", int)
SEED = Kind(int, lambda value: 0 <= value < 2 ** 63, "a whole number, 0 to 2^63 - 1", int)
CONTEXT = Kind(int, lambda value: 2 <= value < 2 ** 31, "at least 2: BOS and one more", int)
POSITIVE = Kind((int, float), lambda value: 0 < value <= HUGE, "a positive number", float)
NOT_NEGATIVE = Kind((int, float), lambda value: 0 <= value <= HUGE, "at least 0", float)
PROBABILITY = Kind((int, float), lambda value: 0 <= value < 1, "at least 0, less than 1", float)
DTYPE = one_of("float32", "bfloat16")


def opt(default, group, kind, help, read_by=EVERY, many=False):
    """A field of Config: its default (the paper's), and all that the parser and `check` need.

    read_by: the methods that use it; the others refuse it. many: a tuple of values.
    """
    facts = dict(group=group, kind=kind, help=help, read_by=read_by, many=many)
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class Config:
    """Everything that is needed to repeat a run. The defaults are the paper's (§4 and its code)."""

    model: str = opt(
        "tiny-gemma-2", "what", TEXT, f"a preset ({', '.join(PRESETS)}), a Hub repository "
        "OWNER/NAME, or a local folder")
    method: str = opt(
        "lora", "what", one_of(*METHODS), "lora adapts the model to its SAE; finetune trains that "
        "SAE instead; the others train an SAE from scratch")
    layer: tuple = opt(
        (12,), "what", LAYER, "block(s) whose output an SAE replaces, counted from 0", many=True)
    sae: tuple = opt(
        (), "what", TEXT, "file, folder, Hub path or run folder; one for all layers or one per "
        "layer (default: the preset's)", AROUND_SAE, many=True)
    width: str | int | None = opt(
        None, "what", WIDTH, "which SAE, by its number of latents, such as 16k; or how many to "
        "train, such as 16384 or 16k (default: 8 d_model)")
    l0: float | None = opt(
        None, "what", POSITIVE, "which SAE, by its active latents (default: the nearest to 70); or "
        "how many jumprelu is to reach (default: 64)", (*AROUND_SAE, *BY_L0))
    llama_scope: str = opt(
        "openmoss", "what", one_of("openmoss", "sae_lens"), "how to read Llama Scope's files: with "
        "their authors' arithmetic, or with SAELens's", AROUND_SAE)

    k: int = opt(
        64, "training an SAE", WHOLE, "active latents of topk and e2e", BY_K)
    auxk: bool = opt(
        False, "training an SAE", SWITCH, "revive dead latents with AuxK", BY_K)
    dead_after: int | None = opt(
        None, "training an SAE", TOKENS, "tokens after which a latent that never fired is dead "
        "(default: 10M, at most a tenth of the run)", SCRATCH)

    rank: tuple = opt(
        (64,), "adapters", WHOLE, "rank of every adapter; several, as in 1 4 16 64, train side by "
        "side", ADAPTERS, many=True)
    alpha: float = opt(
        32.0, "adapters", POSITIVE, "adapters are scaled by alpha / rank", ADAPTERS)
    dropout: float = opt(0.1, "adapters", PROBABILITY, "dropout on the adapters' input", ADAPTERS)
    adapt: tuple = opt(
        (), "adapters", TEXT, "blocks to adapt: after (the SAE), all, next, or block numbers "
        "(default: after for JumpReLU SAEs, whose L0 would move otherwise, and all for TopK)",
        ADAPTERS, many=True)
    targets: tuple = opt(
        TARGETS, "adapters", one_of(*TARGETS), "projections to adapt", ADAPTERS, many=True)
    recipe: str | None = opt(
        None, "adapters", one_of("paper", "tuned"), "how to train adapters: as published, or as a "
        "search on small models found (default: paper)", ADAPTERS)

    objective: str | None = opt(
        None, "training an existing SAE", one_of("kl", "mse", "balanced"), "finetune: the loss; "
        "balanced is ½ (MSE + KL · sg[MSE / KL]), where sg stops the gradient (default: balanced)",
        ("finetune",))
    train_sae: bool = opt(
        False, "training an existing SAE", SWITCH, "lora: train the SAE together with the adapters",
        ADAPTERS)
    sae_lr: float | None = opt(
        None, "training an existing SAE", POSITIVE, "--train-sae: the SAE's learning rate "
        "(default: 5e-5)", (BOTH,))
    thresholds: str = opt(
        "trained", "training an existing SAE", one_of("trained", "frozen"), "a JumpReLU's "
        "thresholds: trained, with its L0 held where it was, or frozen", RETRAINED)

    data: str = opt(
        "pile", "text", TEXT, f"stdlib, {', '.join(NAMED)}, a file, a folder, or "
        "hf://datasets/...")
    field: str | None = opt(
        None, "text", TEXT, "JSON field that holds the text (default: text, or raw_content)")
    tokens: int = opt(
        15_000_000, "text", TOKENS, "training tokens, such as 15M (an SAE from scratch: 2B)")
    eval_tokens: int = opt(1_000_000, "text", TOKENS, "held-out tokens")
    context: int = opt(1024, "text", CONTEXT, "tokens per sequence, BOS included")

    optimizer: str = opt("adamw", "optimisation", one_of("adamw", "muon"), "of adapters", ADAPTERS)
    batch_size: int = opt(1, "optimisation", SEQUENCES, "sequences per step")
    micro_batch: int | None = opt(
        None, "optimisation", SEQUENCES, "sequences that pass through the model at once: less "
        "memory, the same step except for dropout masks (default: the batch)", ("lora",))
    lr: float | tuple | None = opt(
        5e-5, "optimisation", POSITIVE, "learning rate; several, as in 5e-5 2e-4, train adapters "
        "side by side (an SAE from scratch: 2e-4 / √(latents / 2^14))", many=True)
    lr_decay: bool = opt(
        False, "optimisation", SWITCH, "let the rate fall linearly to 0", AROUND_SAE)
    weight_decay: float = opt(0.01, "optimisation", NOT_NEGATIVE, "of the adapters", ADAPTERS)
    clip: float = opt(
        1.0, "optimisation", POSITIVE, "bound on the gradient norm of the loss summed over a "
        "sequence")
    seed: int = opt(42, "optimisation", SEED, "of adapters, dropout and the order of the text")

    dtype: str = opt("bfloat16", "machine", DTYPE, "of the frozen model; what trains is float32")
    sae_dtype: str = opt("float32", "machine", DTYPE, "of a frozen SAE's matrices", ("lora",))
    device: str = opt(
        "cpu", "machine", TEXT, "cpu, cuda, cuda:1, or mps, which is untried; cuda if PyTorch "
        "sees a GPU")
    compile: bool | None = opt(
        None, "machine", SWITCH, "put blocks and loss through torch.compile (default: on a GPU)")
    ahead: int | None = opt(
        None, "machine", SEQUENCES, "sequences whose frozen part runs at once, before their steps "
        "(default: 8 on a GPU, else 1)")
    shard: bool = opt(
        False, "machine", SWITCH, "with torchrun: spread the frozen blocks over the processes, "
        "for models that do not fit", ("lora",))
    checkpoint_every: int | None = opt(
        None, "machine", WHOLE, "steps between checkpoints (default: one per minute)")

    def __post_init__(self):
        on_gpu = str(self.device).startswith("cuda")
        derived = {
            "micro_batch": self.batch_size,
            "compile": on_gpu,
            "ahead": 8 if on_gpu else 1,
            "objective": "balanced" if self.method == "finetune" else "kl",
        }
        if isinstance(self.tokens, int):
            derived["dead_after"] = min(DEAD_AFTER, max(1, self.tokens // 10))
        if isinstance(self.lr, tuple) and len(self.lr) == 1:
            object.__setattr__(self, "lr", self.lr[0])
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)           # how a frozen dataclass is set
        check(self)

    @property
    def mode(self):
        """The method; "lora --train-sae" if the SAE trains together with the adapters."""
        return BOTH if self.train_sae else self.method

    @property
    def trains_sae(self):
        return self.mode != "lora"

    @property
    def tokens_per_step(self):
        return self.batch_size * self.context

    @property
    def steps(self):
        """Steps that train on at least `tokens` tokens."""
        return math.ceil(self.tokens / self.tokens_per_step)

    @property
    def trained_tokens(self):
        """The tokens of those steps."""
        return self.steps * self.tokens_per_step

    @property
    def eval_batch(self):
        """Sequences per evaluation batch: on a GPU one alone would wait for kernel launches."""
        return max(self.micro_batch, self.ahead) if self.device.startswith("cuda") else (
            self.micro_batch)

    @property
    def rates(self):
        """The learning rates, as a tuple also if there is only one."""
        return self.lr if isinstance(self.lr, tuple) else (self.lr,)

    @property
    def variants(self):
        """A Config for each adapter that trains side by side: one rank and one rate each."""
        size = max(len(self.rank), len(self.rates))
        if size == 1:
            return [self]
        ranks = self.rank * size if len(self.rank) == 1 else self.rank
        rates = self.rates * size if len(self.rates) == 1 else self.rates
        return [replace(self, rank=(rank,), lr=lr) for rank, lr in zip(ranks, rates)]

    def to_json(self):
        """The object that config.json holds."""
        return {**asdict(self), "steps": self.steps}


OPTIONS = {known.name: known.metadata for known in fields(Config)}
DEFAULTS = {known.name: known.default for known in fields(Config)}


def option(name):
    """The command's spelling of a field."""
    return f"--{name.replace('_', '-')}"


# ---- Checks --------------------------------------------------------------------------------------

def check(config):
    """Raises InputError for the first field that no run could use."""
    for name, facts in OPTIONS.items():
        kind, value = facts["kind"], getattr(config, name)
        may_be_open = DEFAULTS[name] is None or (name == "lr" and config.method in SCRATCH)
        if value is None and may_be_open:
            continue
        values = value if facts["many"] and isinstance(value, tuple) else (value,)
        if facts["many"] and value is not values and name != "lr":
            raise InputError(f"{option(name)} is {shown(value)}, but it must be a list")
        for one in values:
            is_kind = isinstance(one, kind.type) and isinstance(one, bool) == (kind is SWITCH)
            if not is_kind or not kind.fits(one):
                raise InputError(f"{option(name)} is {shown(one)}, but it must be {kind.expected}")
        if not values and DEFAULTS[name]:
            raise InputError(f"{option(name)} names nothing: pass at least one value")

    if len(set(config.layer)) < len(config.layer):
        raise InputError(f"--layer {joined(config.layer)} names a layer twice")
    check_side_by_side(config)
    check_trained_sae(config)


def joined(values):
    return " ".join(map(str, values))


def check_side_by_side(config):
    """The ranks and rates that train side by side."""
    ranks, rates = config.rank, config.rates
    if len(ranks) > 1 and len(rates) > 1 and len(ranks) != len(rates):
        raise InputError(f"--rank names {len(ranks)} ranks and --lr {len(rates)} rates: pass "
                         "several of one, or equally many of both, which then go in pairs")
    several = [values for values in (ranks, rates) if len(values) > 1]
    if several and len(set(zip(*several))) < len(several[0]):
        raise InputError(f"--rank {joined(ranks)} --lr {joined(rates)} names an adapter twice")
    if several and config.mode != "lora":
        raise InputError(f"--method {config.mode} trains at one --rank and one --lr: several are "
                         "for adapters")
    if config.shard and (several or config.mode != "lora"):
        raise InputError("--shard is for adapters of one rank and one rate: leave it out")


def check_trained_sae(config):
    """What a run needs that trains an SAE, alone or together with adapters."""
    if not config.trains_sae:
        return
    if len(config.layer) > 1:
        raise InputError(f"--layer {joined(config.layer)}: --method {config.mode} trains the SAE "
                         "of one layer")
    if config.micro_batch < config.batch_size:
        raise InputError(f"--micro-batch has no effect with --method {config.mode}, whose losses "
                         "are means over a step: pass a smaller --batch-size instead")
    if config.sae_dtype != "float32":
        raise InputError(f"--sae-dtype {config.sae_dtype}: an SAE that trains is float32")
    if config.mode == BOTH and config.sae_lr is None:
        raise InputError("--train-sae: the SAE needs a learning rate; pass --sae-lr")
    if config.method in BY_L0 and config.l0 is None:
        raise InputError(f"--method {config.method}: pass --l0, the active latents to reach")


# ---- The parser ----------------------------------------------------------------------------------

def add_options(parser):
    """Adds every field as an option. What is not given stays out of the parsed arguments."""
    groups = {}
    for name, facts in OPTIONS.items():
        group = facts["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        text = facts["help"]
        if DEFAULTS[name] not in (None, (), False):
            text += f" (default: {shown_default(name)})"
        kind, how = facts["kind"], {"help": text}
        if kind is SWITCH:
            how["action"] = BooleanOptionalAction
        else:
            how |= {"type": kind.parse, "choices": kind.choices}
        if facts["many"]:
            how |= {"nargs": "+", "metavar": name.upper()}
        groups[group].add_argument(option(name), **how)


def shown_default(name):
    value = DEFAULTS[name]
    if name in ("tokens", "eval_tokens"):
        return f"{value // 10 ** 6}M"
    return joined(value) if isinstance(value, tuple) else value


# ---- Filling in ----------------------------------------------------------------------------------

SAE_TOKENS = 2_000_000_000                              # the paper's training of an SAE (§3.1)
BY_METHOD = {                                           # where the paper's values depend on it
    **dict.fromkeys(BY_K, {"tokens": SAE_TOKENS, "lr": None}),
    **dict.fromkeys(BY_L0, {"tokens": SAE_TOKENS, "lr": None, "l0": 64}),
    "finetune": {"lr": 5e-5, "lr_decay": True},         # Karvonen's (arXiv 2503.17272)
    BOTH: {"sae_lr": 5e-5},
}


def configure(given, recipes):
    """Config of what is given, {field: value}; None is not given.

    recipes: {name: recipe(model, optimizer, train_sae) -> fields of Config}, beside the paper's.
    Raises InputError for what has no effect or makes no sense.
    """
    given = {name: value for name, value in given.items() if value is not None}
    given = with_full_paths(given)
    model, method = given.get("model", Config.model), given.get("method", Config.method)
    mode = BOTH if method == "lora" and given.get("train_sae") else method
    check_effect(given, mode)
    known = preset(model)
    if known is None:
        load_config(model)                              # that there is no such model comes first

    # Each of these goes before the ones above it.
    layers = [BY_METHOD.get(mode, {}), of_preset(known, mode)]
    if mode in ADAPTERS:
        usual = known.lora.get("recipe", "paper") if known else "paper"
        layers += [of_recipe(given.get("recipe", usual), model, given, mode, recipes)]
    if "sae" in given:
        given = {**of_sae_run(given["sae"], with_tokens=known is None), **given}
        layers += [{"adapt": ()}]                       # it depends on the SAE's kind
    elif mode not in SCRATCH:
        layers += [of_preset_sae(model, known, given)]
    layers += [given]

    values = {}
    for layer in layers:
        values |= layer

    # What the method does not read keeps its default.
    read = {name: value for name, value in values.items()
            if name in OPTIONS and mode in OPTIONS[name]["read_by"]}
    if mode in SCRATCH and read.get("width") is not None:
        read["width"] = latents_to_train(read["width"])
    if known is None:
        fit_unknown_model(model, read, given)
    return Config(**read)


def with_full_paths(given):
    """The given values, with ~ expanded and with local paths absolute: a run opens anywhere."""
    found = dict(given)
    names = {"model": PRESETS, "data": ("stdlib", *NAMED)}
    for name in ("model", "data"):
        if name in found and found[name] not in names[name]:
            found[name] = full_path(found[name])
    if "sae" in found:
        found["sae"] = tuple(full_path(source) for source in found["sae"])
    return found


def full_path(text):
    """The absolute path of what exists here; any other text as it is, with ~ expanded."""
    path = os.path.expanduser(text)
    return os.path.abspath(path) if os.path.exists(path) else path


def check_effect(given, mode):
    """Raises InputError for an option that the method does not read."""
    if mode not in EVERY:
        return                                          # Config says which methods there are
    for name, value in given.items():
        read_by = OPTIONS[name]["read_by"] if name in OPTIONS else EVERY
        if mode in read_by or value is False:
            continue
        advice = ", or pass --train-sae" if mode == "lora" and BOTH in read_by else ""
        raise InputError(f"{option(name)} has no effect with --method {mode}: leave it out{advice}")


def of_preset(known, mode):
    """The fields that a model's preset decides; without one, text that is always there."""
    if known is None:
        return {"data": "stdlib"}
    own = {"layer": (known.layer,), **known.common}
    if mode in SCRATCH:
        own |= known.sae_training
        return own | known.e2e if mode == "e2e" else own
    own |= known.lora
    if mode == "finetune":
        own |= BY_METHOD[mode] | known.finetune
    if mode == BOTH and "lr" in known.finetune:
        own["sae_lr"] = known.finetune["lr"]
    return own


def of_recipe(name, model, given, mode, recipes):
    """The fields that a recipe for adapters decides."""
    if name == "paper":
        return {**PAPER, "recipe": name} if "recipe" in given else {"recipe": name}
    return {**recipes[name](model, given.get("optimizer"), mode == BOTH), "recipe": name}


def of_preset_sae(model, known, given):
    """The fields that say which of the preset's SAEs."""
    layers = given.get("layer", (known.layer,) if known else ())
    which = {name: given.get(name) for name in ("width", "l0")}
    for layer in layers or (None,):
        source, chosen = sae_choice(model, layer=layer, **which)
    if len(layers) > 1:
        chosen["l0"] = which["l0"]                      # each layer has its own nearest L0
    if os.path.isdir(source):                           # an embedded one: the checkout may move
        source = next(name for name in PRESETS if PRESETS[name] is known)
    return {"sae": (source,), "width": chosen["width"], "l0": chosen["l0"]}


def of_sae_run(sources, with_tokens):
    """Text settings recorded in the runs that made the SAEs; {} if the SAEs come from elsewhere."""
    folders = [run_of(source) for source in sources]
    if None in folders:
        return {}
    runs = [read_config(folder) for folder in folders]
    names = ["data", "field", "context", "dtype", "eval_tokens"] + ["tokens"] * with_tokens
    values = {name: getattr(runs[0], name) for name in names if getattr(runs[0], name) is not None}
    note(f"note: {', '.join(names)} and layer as in the run that made the SAE, {folders[0]}, "
         "unless an option says otherwise")
    return {**values, "layer": tuple(run.layer[0] for run in runs)}


def run_of(source):
    """The folder of the run that made an SAE in RUN_DIR or RUN_DIR/sae-50pct; None for others."""
    place = Path(source)
    candidates = [place, place.parent] if place.name.startswith("sae") else [place]
    for folder in candidates:
        if (folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file():
            return folder
    return None


def fit_unknown_model(model, values, given):
    """Says what a model without a preset trains on; limits the context to what it holds."""
    if "data" not in given:
        note(f"note: {model} is not a preset; using --data stdlib, which every machine has")
    holds = load_config(model).max_position_embeddings
    if "context" not in given and Config.context > holds:
        values["context"] = holds
        note(f"note: --context {holds}, as {model} holds no more")


def latents_to_train(width):
    """The number of latents to train, from 16384, "16384" or "131k", which is 2^17."""
    text = str(width).lower()
    unit = {"k": 10 ** 3, "m": 10 ** 6}.get(text[-1:], 1)
    digits = text[:-1] if unit > 1 else text
    if digits.isascii() and digits.isdecimal() and 0 < int(digits) < 10 ** 9:
        found = int(digits) if unit == 1 else latents(text)
        if abs(found - int(digits) * unit) < found / 20:
            return found
    raise InputError(f"--width {shown(width)}: training an SAE needs its number of latents, such "
                     "as 16384, or 16k and 131k for powers of two")


# ---- Files ---------------------------------------------------------------------------------------

def read_config(folder):
    """The Config in a run's folder. Raises InputError unless train.py of this version wrote it."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json: pass the folder of a run that train.py "
                         "wrote")
    found = dict(read_object(path))
    wrong = OPTIONS.keys() ^ (found.keys() - {"steps", "versions"})
    if wrong:
        name = min(wrong)
        what = "lacks" if name in OPTIONS else "has"
        raise InputError(f"{path} {what} {shown(name)}: it is not a run of this version of "
                         "train.py")
    values = {name: tuple(value) if isinstance(value, list) else value
              for name, value in found.items() if name in OPTIONS}
    try:
        return Config(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
