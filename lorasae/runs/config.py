"""A run's configuration: one table of options for the parser, the checks and --help.

    config = configure({"model": "gemma-2-2b", "rank": (64,)}, RECIPES)    fills in the rest
    config = read_config(RUN_DIR)                                   the Config of that run

A value comes from the first of these that has one: the options given; the run that made the SAE
(`--sae RUN_DIR`); the recipe; the model's preset (io/presets.py); the paper (Config's defaults).
"""
import math
import os
import re
from argparse import BooleanOptionalAction
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

from lorasae.errors import InputError
from lorasae.io.console import count, note
from lorasae.io.files import Fields, read_object, shown
from lorasae.io.hub import LEVELS, sae_choice
from lorasae.io.models import load_config
from lorasae.io.presets import PAPER, PRESETS, latents, preset
from lorasae.io.text import NAMED
from lorasae.lora import TARGETS
from lorasae.sae import KINDS

SCRATCH = (*KINDS, "e2e")                               # train an SAE from scratch
BY_K = (*(name for name, kind in KINDS.items() if kind.l0_is_bounded), "e2e")
BY_L0 = tuple(name for name in SCRATCH if name not in BY_K)     # these aim for an L0, not a k
METHODS = ("lora", *SCRATCH, "finetune")
BOTH = "lora --train-sae"                               # adapters and SAE together
EVERY = (*METHODS, BOTH)
ADAPTERS = ("lora", BOTH)
RETRAINED = ("finetune", BOTH)                          # train an existing SAE
AROUND_SAE = ("lora", *RETRAINED)                       # use an existing SAE
DEAD_AFTER = 10_000_000                                 # tokens; Gao et al. (2024)
MOST_AT_ONCE = 2 ** 24                                  # tokens; more must be a typo


# ---- The options ---------------------------------------------------------------------------------

def full_path(text):
    """An existing path made absolute, so that a run opens from anywhere; other text unchanged."""
    path = os.path.expanduser(text)
    is_name = text in (*PRESETS, "stdlib", *NAMED)
    return os.path.abspath(path) if os.path.exists(path) and not is_name else path


class Kind(NamedTuple):
    """Which values an option accepts, as in io.files.Fields.take, and how to parse them."""
    type: type
    bounds: dict = {}
    parse: Callable | None = None                       # default: `type`


def one_of(*choices):
    return Kind(str, {"one_of": choices})


TEXT = Kind(str)
PATH = Kind(str, parse=full_path)
SWITCH = Kind(bool)
FROM_0 = Kind(int, {"at_least": 0})
WHOLE = Kind(int, {"at_least": 1})
TOKENS = Kind(int, {"at_least": 1}, count)
SEVERAL = Kind(int, {"at_least": 1, "below": 2 ** 20})  # all of them must fit in memory
WIDTH = Kind(int, {"at_least": 1, "below": 2 ** 30}, latents)
CONTEXT = Kind(int, {"at_least": 2})                    # BOS and one other token
NOT_NEGATIVE = Kind(float, {"at_least": 0})
POSITIVE = Kind(float, {"above": 0})
L0 = Kind(float, {"above": 0}, lambda text: float(LEVELS.get(text, text)))
PROBABILITY = Kind(float, {"at_least": 0, "below": 1})
DTYPE = one_of("float32", "bfloat16")

GROUPS = {                                              # titles in --help, by the first option
    "model": "what",
    "k": "training an SAE",
    "rank": "adapters",
    "objective": "training an existing SAE",
    "data": "text",
    "optimizer": "optimisation",
    "dtype": "machine",
}


def opt(default, kind, help, read_by=EVERY):
    """A field of Config: its default (the paper's), and what the parser and `check` need.

    It accepts several values if its default is a tuple. Methods that are not in read_by refuse it.
    """
    return field(default=default, metadata=dict(kind=kind, help=help, read_by=read_by))


@dataclass(frozen=True)
class Config:
    """Everything needed to repeat a run. The defaults are the paper's (§4 and its code)."""

    model: str = opt(
        "tiny-gemma-2", PATH,
        f"a preset ({', '.join(PRESETS)}), a Hub repository OWNER/NAME, or a local folder")
    method: str = opt(
        "lora", one_of(*METHODS),
        "lora adapts the model to its SAE; finetune trains that SAE instead; the others train an "
        "SAE from scratch")
    layer: tuple = opt((12,), FROM_0, "block(s) whose output an SAE replaces, counted from 0")
    sae: tuple = opt(
        (), PATH,
        "the SAE: a file, folder, Hub path or run folder; one for all layers or one per layer "
        "(default: the preset's)", AROUND_SAE)
    width: int | None = opt(
        None, WIDTH,
        "latents of the existing SAE to use, such as 16k, or of the SAE to train, such as 16384 "
        "or 16k (default: 8 d_model)")
    l0: float | None = opt(
        None, L0,
        "average active latents of the existing SAE, or small, medium or big for Gemma Scope 2 "
        "(default: nearest to 70); or jumprelu's target L0 (default: 64)", (*AROUND_SAE, *BY_L0))

    site: str = opt(
        "resid", one_of("resid", "mlp"),
        "what all SAEs read and replace: a block's output, or its MLP's output", AROUND_SAE)

    k: int = opt(64, WHOLE, "active latents per token, for topk and e2e", BY_K)
    auxk: bool = opt(False, SWITCH, "revive dead latents with AuxK", BY_K)
    max_norm: float = opt(
        10.0, NOT_NEGATIVE,
        "leave out BOS, EOS and activations with norms above this many times the median: attention "
        "sinks, which make up most of the variance (0: only what this kind leaves out)", SCRATCH)

    rank: tuple = opt(
        (64,), SEVERAL,
        "rank of the adapters; several, as in 1 4 16 64, train side by side, each with every --lr",
        ADAPTERS)
    alpha: float = opt(32.0, POSITIVE, "adapters are scaled by alpha / rank", ADAPTERS)
    dropout: float = opt(0.1, PROBABILITY, "dropout on the adapters' input", ADAPTERS)
    adapt: tuple = opt(
        (), TEXT,
        "blocks to adapt: after (the SAE), all, next, or block numbers (default: after for "
        "JumpReLU SAEs, whose L0 would change otherwise, and all for TopK)", ADAPTERS)
    targets: tuple = opt(TARGETS, one_of(*TARGETS), "projections to adapt", ADAPTERS)
    recipe: str | None = opt(
        None, one_of("paper", "tuned"),
        "how to train adapters: as published, or as found by a search on small models (default: "
        "paper)", ADAPTERS)

    objective: str | None = opt(
        None, one_of("kl", "mse", "balanced"),
        "finetune: the loss; balanced is ½ (MSE + KL · sg[MSE / KL]), where sg stops the gradient "
        "(default: balanced)", ("finetune",))
    train_sae: bool = opt(False, SWITCH, "lora: train the SAE together with the adapters", ADAPTERS)
    sae_lr: float = opt(5e-5, POSITIVE, "--train-sae: the SAE's learning rate", (BOTH,))
    thresholds: str = opt(
        "trained", one_of("trained", "frozen"),
        "a JumpReLU's thresholds: trained, while keeping its L0 where it was, or frozen", RETRAINED)

    data: str = opt(
        "pile", PATH, f"text: stdlib, {', '.join(NAMED)}, a file, a folder, or hf://datasets/...")
    field: str | None = opt(None, TEXT, "JSON field with the text (default: text, or raw_content)")
    tokens: int = opt(
        15_000_000, TOKENS, "training tokens, such as 15M (for an SAE from scratch: 2B)")
    eval_tokens: int = opt(1_000_000, TOKENS, "held-out tokens")
    context: int = opt(1024, CONTEXT, "tokens per sequence, BOS included")

    optimizer: str = opt("adamw", one_of("adamw", "muon"), "the adapters' optimiser", ADAPTERS)
    batch_size: int = opt(1, SEVERAL, "sequences per step")
    micro_batch: int | None = opt(
        None, SEVERAL,
        "sequences per pass through the model: fewer need less memory; the step is the same except "
        "for dropout masks (default: the batch)", ("lora",))
    lr: float | tuple | None = opt(
        5e-5, POSITIVE,
        "learning rate; several, as in 5e-5 2e-4, train adapters side by side (for an SAE from "
        "scratch: 2e-4 / √(latents / 2^14))")
    lr_decay: bool = opt(False, SWITCH, "let the learning rate fall linearly to 0", AROUND_SAE)
    weight_decay: float = opt(0.01, NOT_NEGATIVE, "weight decay of the adapters", ADAPTERS)
    clip: float = opt(1.0, POSITIVE, "maximum gradient norm, for the loss summed over a sequence")
    seed: int = opt(42, FROM_0, "seed for adapters, dropout and the order of the text")

    dtype: str = opt("bfloat16", DTYPE, "dtype of the frozen model; trained parameters are float32")
    sae_dtype: str = opt("float32", DTYPE, "dtype of a frozen SAE's matrices", ("lora",))
    device: str = opt(
        "cpu", TEXT, "cpu, cuda or cuda:1 (default: cuda if PyTorch sees a GPU, else cpu)")
    threads: int | None = opt(
        None, WHOLE,
        "CPU threads (default: OMP_NUM_THREADS, or else the cores that are idle at the start)")
    products: str | None = opt(
        None, one_of("onednn", "mkl"),
        "library for fp32 matrix products on a CPU (default: onednn, unless mkl measures faster)")
    compile: bool | None = opt(
        None, SWITCH, "compile blocks and loss with torch.compile (default: only on a GPU)")
    ahead: int | None = opt(
        None, SEVERAL,
        "sequences whose frozen part is computed together, ahead of their steps (default: 8 on a "
        "GPU, else 1)")
    shard: bool = opt(
        False, SWITCH,
        "with torchrun: shard the frozen blocks over the processes, for models too large for one",
        ("lora",))
    checkpoint_every: int | None = opt(
        None, WHOLE, "steps between checkpoints (default: one per minute)")
    track: bool = opt(False, SWITCH, "also log to trackio (pip install trackio)")

    def __post_init__(self):
        if isinstance(self.lr, tuple) and len(self.lr) == 1:
            self.__dict__["lr"] = self.lr[0]            # frozen, except here
        check(self)

        # Derive what was left open from the rest.
        on_gpu = self.device.startswith("cuda")
        inside = self.trains_sae and self.site == "mlp"     # an SAE that trains inside its block
        derived = {
            "micro_batch": self.batch_size,
            "compile": on_gpu and not inside,
            "ahead": 8 if on_gpu else 1,
            "objective": "balanced" if self.method == "finetune" else "kl",
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                self.__dict__[name] = value

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
        """The number of steps needed to train on at least `tokens` tokens."""
        return math.ceil(self.tokens / self.tokens_per_step)

    @property
    def trained_tokens(self):
        """The number of tokens in those steps."""
        return self.steps * self.tokens_per_step

    @property
    def eval_batch(self):
        """Sequences per evaluation batch: on a GPU, a single one would wait for kernel launches."""
        on_gpu = self.device.startswith("cuda")
        return max(self.micro_batch, self.ahead) if on_gpu else self.micro_batch

    @property
    def dead_after(self):
        """A latent that has not fired for this many tokens is dead."""
        return min(DEAD_AFTER, max(1, self.tokens // 10))

    @property
    def rates(self):
        """The learning rates, as a tuple even if there is only one."""
        return self.lr if isinstance(self.lr, tuple) else (self.lr,)

    @property
    def variants(self):
        """A Config for each adapter that trains: every rank with every rate."""
        return [replace(self, rank=(rank,), lr=lr) for rank in self.rank for lr in self.rates]

    def which(self, layer):
        """The arguments that select a layer's SAE from its source."""
        return {"layer": layer, "width": self.width, "l0": self.l0, "site": self.site}

    def to_json(self):
        """The object written to config.json."""
        return {**asdict(self), "steps": self.steps}


OPTIONS = {known.name: known.metadata for known in fields(Config)}
DEFAULTS = {known.name: known.default for known in fields(Config)}


def option(name):
    """A field's name on the command line."""
    return f"--{name.replace('_', '-')}"


def takes_several(name):
    """Whether an option accepts several values."""
    return isinstance(DEFAULTS[name], tuple) or name == "lr"


def joined(values):
    return " ".join(map(str, values))


# ---- Checks --------------------------------------------------------------------------------------

def check(config):
    """Raises InputError for the first field whose value no run could use."""
    for name, facts in OPTIONS.items():
        kind, value, default = facts["kind"], getattr(config, name), DEFAULTS[name]
        may_be_open = default is None or (name == "lr" and config.method in SCRATCH)
        if value is None and may_be_open:
            continue
        if isinstance(default, tuple) and not isinstance(value, tuple):
            raise InputError(f"{option(name)} is {shown(value)}, but it must be a list")
        several = isinstance(value, tuple) and takes_several(name)
        values = value if several else (value,)
        if not values and default:
            values = (None,)                            # not a valid value
        for one in values:
            Fields({option(name): one}, "options").take(option(name), kind.type, **kind.bounds)
        if len(set(values)) < len(values) and kind is not PATH:
            raise InputError(f"{option(name)} {joined(values)} repeats a value")

    # Check what a single run can do.
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", config.device):
        raise InputError(f"--device {config.device} is not supported: pass cpu, cuda or cuda:1")
    if config.trains_sae and len(config.layer) > 1:
        raise InputError(f"--layer {joined(config.layer)}: --method {config.mode} trains the SAE "
                         "of one layer")
    if (config.trains_sae or config.shard) and len(config.rank) * len(config.rates) > 1:
        what = "--shard" if config.shard else f"--method {config.mode}"
        raise InputError(f"{what} needs one --rank and one --lr; several are for adapters that "
                         "train side by side")
    if config.method in BY_L0 and config.l0 is None:
        raise InputError(f"--method {config.method}: pass --l0, the active latents to aim for")
    at_once = max(config.batch_size, config.micro_batch or 1, config.ahead or 1)
    if at_once * config.context > MOST_AT_ONCE:
        raise InputError(f"{at_once:,} sequences of --context {config.context:,} at once are more "
                         f"than {MOST_AT_ONCE:,} tokens: lower --batch-size, --micro-batch, "
                         "--ahead or --context")


# ---- The parser ----------------------------------------------------------------------------------

def add_options(parser):
    """Adds every field as an option. Options not given are absent from the parsed arguments."""
    for name, facts in OPTIONS.items():
        if name in GROUPS:
            add = parser.add_argument_group(GROUPS[name]).add_argument
        kind, default = facts["kind"], DEFAULTS[name]
        how = {"help": facts["help"]}
        if default not in (None, (), False) and "(default: " not in facts["help"]:
            default = f"{default // 10 ** 6}M" if kind is TOKENS else default
            default = joined(default) if isinstance(default, tuple) else default
            how["help"] += f" (default: {default})"

        if kind is SWITCH:
            how["action"] = BooleanOptionalAction
        else:
            how |= {"type": kind.parse or kind.type, "choices": kind.bounds.get("one_of")}
        if takes_several(name):
            how |= {"nargs": "+", "metavar": name.upper()}
        add(option(name), **how)


# ---- Filling in ----------------------------------------------------------------------------------

SAE_TOKENS = 2_000_000_000                              # the paper's training of an SAE (§3.1)
BY_METHOD = {                                           # the paper's values, by method
    **dict.fromkeys(SCRATCH, {"tokens": SAE_TOKENS, "lr": None, "l0": 64}),
    "finetune": {"lr": 5e-5, "lr_decay": True},         # Karvonen's (arXiv 2503.17272)
}


def configure(given, recipes):
    """The Config for the given {field: value}.

    recipes: {name: recipe(model, optimizer, train_sae) -> fields of Config}, besides the paper's.
    Raises InputError for options that have no effect or make no sense.
    """
    model, method = given.get("model", Config.model), given.get("method", Config.method)
    mode = BOTH if method == "lora" and given.get("train_sae") else method
    check_effect(given, mode)

    # Later entries override earlier ones. Fields that the method does not read keep their default.
    known = preset(model)
    values = {
        **BY_METHOD.get(mode, {}),
        **of_preset(known, model, mode),
        **of_recipe(known, model, given, mode, recipes),
        **of_sae(known, model, given, mode),
        **given,
    }
    config = Config(**{name: value for name, value in values.items() if reads(mode, name)})
    if config.field and config.data == "stdlib":
        raise InputError("--field has no effect with --data stdlib: leave it out")
    if known is None and not given.keys() >= {"data", "context"}:
        note(f"note: {model} is not a preset; using --data {config.data} --context "
             f"{config.context}")
    return config


def reads(mode, name):
    return mode in OPTIONS[name]["read_by"]


def check_effect(given, mode):
    """Raises InputError for an option that the method does not read."""
    for name, value in given.items():
        if not reads(mode, name) and value is not False:
            advice = ", or pass --train-sae" if mode == "lora" and reads(BOTH, name) else ""
            raise InputError(f"{option(name)} has no effect with --method {mode}: leave it "
                             f"out{advice}")


def of_preset(known, model, mode):
    """The fields that a model's preset sets; without a preset, text that is always available."""
    if known is None:
        holds = load_config(model).max_position_embeddings
        return {"data": "stdlib", "eval_tokens": 50_000, "context": min(Config.context, holds)}
    own = {"layer": (known.layer,), **known.common}
    own |= known.sae_training if mode in SCRATCH else known.lora
    own |= {"e2e": known.e2e, "finetune": known.finetune}.get(mode, {})
    if mode == BOTH and "lr" in known.finetune:
        own["sae_lr"] = known.finetune["lr"]
    return own


def of_recipe(known, model, given, mode, recipes):
    """The fields that the recipe for adapters sets."""
    if mode not in ADAPTERS:
        return {}
    usual = known.lora.get("recipe") if known else None
    name = given.get("recipe") or usual or "paper"
    fields = PAPER
    if name in recipes:
        fields = recipes[name](model, given.get("optimizer"), mode == BOTH)
    return {**fields, "recipe": name}


def of_sae(known, model, given, mode):
    """The fields that choose the SAE, by default the preset's, and those that depend on the SAE."""
    if mode in SCRATCH:
        return {}
    if "sae" in given:                                  # --adapt depends on its kind
        return {"adapt": (), **of_sae_runs(given)}

    layers, l0 = given.get("layer", (None,)), given.get("l0")
    source, chosen = sae_choice(model, layer=layers[0], width=given.get("width"), l0=l0)
    if os.path.isdir(source):                           # included: the checkout may move
        source = next(name for name in PRESETS if PRESETS[name] is known)
    if len(layers) == 1:                                # with several, each has its own nearest L0
        l0 = chosen["l0"]
    return {"sae": (source,), "width": chosen["width"], "l0": l0}


def of_sae_runs(given):
    """Text settings recorded in the runs that made the SAEs; {} if the SAEs come from elsewhere."""
    folders = [run_of(source) for source in given["sae"]]
    if None in folders:
        return {}
    if "l0" in given:
        raise InputError(f"--l0 has no effect with the SAE of {folders[0]}: leave it out")
    runs = [read_config(folder) for folder in folders]
    names = ["data", "field"] * ("data" not in given)   # the field belongs to the data
    names += ["site", "context", "dtype", "eval_tokens"]
    note(f"note: taking {', '.join(names)} and layer from the run that made the SAE, {folders[0]}, "
         "unless given as options")
    values = {name: getattr(runs[0], name) for name in names}
    return {**values, "layer": tuple(run.layer[0] for run in runs)}


def run_of(source):
    """The run that made the SAE in RUN_DIR, RUN_DIR/sae-50pct or a file of these, or None."""
    source = Path("/", source)                          # a Hub name is not below this folder
    for folder in (source, *source.parents[:2]):
        if (folder / "config.json").is_file() and (folder / "metrics.jsonl").exists():
            return folder
    return None


# ---- Files ---------------------------------------------------------------------------------------

def as_fields(values):
    """Those of {name: value} that are fields of Config, with lists as tuples."""
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items() if name in OPTIONS}


def read_config(folder, device=None):
    """A run's Config, with `device` if given. Raises InputError if another version wrote it."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"there is no run in {folder}: pass the folder of a run, which has a "
                         "config.json that train.py wrote")
    found = read_object(path)
    wrong = {*OPTIONS, "steps"} ^ (found.keys() - {"versions"})
    if wrong:
        raise InputError(f"{path} was not written by this version of train.py: which differs in "
                         f"{shown(joined(sorted(wrong)))}")
    try:
        config = Config(**as_fields(found))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    device = device or config.device
    compile = config.compile and (device == config.device or device.startswith("cuda"))
    return replace(config, device=device, compile=compile)
