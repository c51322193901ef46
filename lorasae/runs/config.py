"""The configuration of a run: one frozen dataclass, checked once, whose field defaults are the paper's.

    config = Config(model="gemma-2-2b", rank=(64,))         what is not given is the paper's (presets: defaults.configure)
    config = read_config(RUN_DIR)                           what that run was asked for
"""
import math
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from lorasae.errors import InputError
from lorasae.io.files import read_object

METHODS = ("lora", "topk", "jumprelu", "e2e", "finetune")
LLAMA_SCOPE = ("openmoss", "sae_lens", "sae_lens_legacy")
DTYPES = ("float32", "bfloat16")
OBJECTIVES = ("kl", "mse", "balanced")
THRESHOLDS = ("trained", "frozen")
RECIPES = ("paper", "tuned")
OPTIMIZERS = ("adamw", "muon")
DEAD_AFTER = 10_000_000                                 # Gao et al. (2024); at most a tenth of the run


@dataclass(frozen=True)
class Config:
    """Everything that is needed to repeat a run. The defaults are the paper's (§4 and its released code)."""

    # what
    model: str = "tiny-gemma-2"                 # a preset, a Hub repository OWNER/NAME, or a local folder
    method: str = "lora"                        # one of METHODS
    layer: tuple = (12,)                        # blocks whose output an SAE replaces, from 0
    sae: tuple = ()                             # where the SAEs are: one source for all layers, or one a layer
    width: int | str | None = None              # latents: of the SAE to choose, such as "16k"; to train, 8 d_model if None
    llama_scope: str = "openmoss"               # how to read Llama Scope's files, one of LLAMA_SCOPE
    l0: float | None = None                     # active latents: of the SAE to choose; that a jumprelu is to reach

    # training an SAE
    k: int = 64                                 # active latents of topk and e2e
    auxk: bool = False                          # revive dead latents by AuxK; the paper does without
    dead_after: int | None = None               # tokens after which a latent that never fired is dead; None: see DEAD_AFTER

    # adapters
    rank: tuple = (64,)                         # several train side by side in one pass
    alpha: float = 32                           # at every rank
    dropout: float = 0.1
    adapt: tuple = ()                           # words of --adapt; (): decided by the kind of the SAEs

    # an SAE that is there already, trained on
    objective: str | None = None                # one of OBJECTIVES; None: balanced for finetune, else Eq. 7's kl
    thresholds: str = "trained"                 # of a JumpReLU: with its L0 held, or frozen
    train_sae: bool = False                     # lora: the SAE is trained together with the adapters
    sae_lr: float | None = None                 # its learning rate then

    # text
    data: str = "pile"                          # a source of io/streams.py
    field: str | None = None                    # JSON field with the text
    tokens: int = 15_000_000                    # to train on
    eval_tokens: int = 1_000_000                # held out
    context: int = 1024                         # tokens a sequence, BOS included

    # optimisation
    optimizer: str = "adamw"                    # of adapters, one of OPTIMIZERS
    batch_size: int = 1                         # sequences a step
    micro_batch: int | None = None              # sequences that pass through the model at once; None: the batch
    lr: float | tuple | None = 5e-5             # several train side by side; None, for an SAE: 2e-4 / √(latents / 2^14)
    lr_decay: bool = False                      # falling linearly to 0
    weight_decay: float = 0.01
    clip: float = 1.0                           # bound on the gradient norm of the KL summed over a sequence
    seed: int = 42                              # of adapters, dropout and the order of the text

    # machine
    dtype: str = "bfloat16"                     # of the frozen model; what trains is float32
    sae_dtype: str = "float32"                  # of a frozen SAE's matrices
    device: str = "cpu"
    compile: bool | None = None                 # None: on a GPU
    ahead: int | None = None                    # sequences whose frozen part runs at once; None: 8 on a GPU, else 1
    shard: bool = False                         # the frozen blocks over the processes of torchrun
    checkpoint_every: int | None = None         # steps; None: every minute (runs/folder.py)

    def __post_init__(self):
        on_gpu = str(self.device).startswith("cuda")
        derived = {"micro_batch": self.batch_size, "compile": on_gpu, "ahead": 8 if on_gpu else 1,
                   "objective": "balanced" if self.method == "finetune" else "kl"}
        if is_whole(self.tokens):
            derived["dead_after"] = min(DEAD_AFTER, max(1, self.tokens // 10))
        if isinstance(self.lr, tuple) and len(self.lr) == 1:
            object.__setattr__(self, "lr", self.lr[0])
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)           # a frozen dataclass is set this way
        check(self)

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
        """Sequences that an evaluation takes at once: on a GPU a single one would wait for the launches of its kernels."""
        return max(self.micro_batch, self.ahead) if self.device.startswith("cuda") else self.micro_batch

    @property
    def variants(self):
        """A Config for each of the adapters that train side by side: one rank and one rate each."""
        rates = self.lr if isinstance(self.lr, tuple) else (self.lr,)
        count = max(len(self.rank), len(rates))
        ranks = self.rank * count if len(self.rank) == 1 else self.rank
        rates = rates * count if len(rates) == 1 else rates
        if len(self.rank) * len(rates) == 1:
            return [self]
        return [replace(self, rank=(rank,), lr=lr) for rank, lr in zip(ranks, rates)]

    def to_json(self):
        """The object that config.json holds."""
        return {**asdict(self), "steps": self.steps}


# ---- Checks ------------------------------------------------------------------------------------------------------------

TEXTS = ("model", "data", "device")
WHOLE = ("k", "tokens", "eval_tokens", "context", "batch_size", "micro_batch", "ahead", "dead_after")
POSITIVE = ("alpha", "clip", "l0", "sae_lr")
NOT_NEGATIVE = ("dropout", "weight_decay", "seed")
SWITCHES = ("auxk", "lr_decay", "compile", "shard", "train_sae")
CHOICES = {
    "method": METHODS,
    "objective": OBJECTIVES,
    "optimizer": OPTIMIZERS,
    "thresholds": THRESHOLDS,
    "llama_scope": LLAMA_SCOPE,
    "dtype": DTYPES,
    "sae_dtype": DTYPES,
}
LARGEST_SEED = 2 ** 63 - 1


def check(config):
    """Raises InputError for the first field that no run could use."""
    def refuse(name, expected):
        value = getattr(config, name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        raise InputError(f"{option(name)} is {shown!r}, but it must be {expected}")

    for name in TEXTS:
        if not isinstance(getattr(config, name), str) or not getattr(config, name).strip():
            refuse(name, "a text that is not empty")
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            refuse(name, f"one of {', '.join(choices)}")
    for name in SWITCHES:
        if not isinstance(getattr(config, name), bool):
            refuse(name, "true or false")

    for name in WHOLE:
        if not is_whole(getattr(config, name)) or getattr(config, name) < 1:
            refuse(name, "a positive whole number")
    for name in POSITIVE:
        value = getattr(config, name)
        if value is not None and (not is_number(value) or value <= 0):
            refuse(name, "a positive number")
    for name in NOT_NEGATIVE:
        value = getattr(config, name)
        if not is_number(value) or value < 0:
            refuse(name, "a number that is not negative")

    if config.checkpoint_every is not None and (not is_whole(config.checkpoint_every) or config.checkpoint_every < 1):
        refuse("checkpoint_every", "a positive whole number of steps")
    if config.dropout >= 1:
        refuse("dropout", "less than 1")
    if not is_whole(config.seed) or config.seed > LARGEST_SEED:
        refuse("seed", f"a whole number of at most {LARGEST_SEED}")
    if config.context < 2:
        refuse("context", "at least 2 tokens: BOS and one more")
    check_lists(config, refuse)
    check_students(config, refuse)
    check_trained_sae(config)


def check_lists(config, refuse):
    """The fields that hold several values."""
    for name, least in (("layer", 0), ("rank", 1)):
        values = getattr(config, name)
        if not isinstance(values, tuple) or not all(is_whole(value) and value >= least for value in values):
            refuse(name, f"whole numbers of at least {least}" if least == 0 else "positive whole numbers")
        if name == "layer" and len(set(values)) < len(values):
            raise InputError(f"--layer {' '.join(map(str, values))} names a layer twice")
    for name in ("sae", "adapt"):
        values = getattr(config, name)
        if not isinstance(values, tuple) or not all(isinstance(value, str) and value for value in values):
            refuse(name, "a list of texts")
    if not config.rank:
        refuse("rank", "at least one rank")


def check_students(config, refuse):
    """The ranks and rates that train side by side."""
    rates = config.lr if isinstance(config.lr, tuple) else (config.lr,)
    of_its_own = config.method not in ("lora", "finetune")     # SAEs from scratch, whose rate follows from their width
    for lr in rates:
        if lr is None and of_its_own and len(rates) == 1:
            continue
        if not is_number(lr) or lr <= 0:
            refuse("lr", "a positive number, or several")
    if not rates:
        refuse("lr", "at least one rate")

    several = [len(values) for values in (config.rank, rates) if len(values) > 1]
    if len(several) == 2 and several[0] != several[1]:
        raise InputError(f"--rank names {several[0]} ranks and --lr {several[1]} rates: pass several of one of them, or "
                         "equally many of both, which go together in pairs")
    if several:
        pairs = [(variant.rank, variant.lr) for variant in config.variants]
        if len(set(pairs)) < len(pairs):
            name, what, values = ("rank", "rank", config.rank) if len(config.rank) > 1 else ("lr", "rate", rates)
            raise InputError(f"{option(name)} {' '.join(map(str, values))} names a {what} twice")
        if config.method != "lora":
            raise InputError(f"--method {config.method} trains at one --lr: several are for adapters")
    if config.shard and (config.method != "lora" or several):
        raise InputError("--shard is for adapters of one rank and one rate: leave it out")


def check_trained_sae(config):
    """What a run needs that trains an SAE that is there already, alone or together with adapters."""
    if config.method != "finetune" and not config.train_sae:
        return
    asked = "--train-sae" if config.train_sae else "--method finetune"
    if config.train_sae and (len(config.variants) > 1 or config.shard):
        raise InputError("--train-sae trains one SAE with one adapter: pass one --rank and one --lr, without --shard")
    if config.train_sae and config.sae_lr is None:
        raise InputError("--train-sae: the SAE needs a rate; pass --sae-lr")
    if len(config.layer) > 1:
        raise InputError(f"--layer {' '.join(map(str, config.layer))}: {asked} trains the SAE of one layer")
    if config.micro_batch < config.batch_size:
        raise InputError(f"--micro-batch {config.micro_batch}: {asked} takes the {config.batch_size} sequences of a step at "
                         "once, as its losses are means over them; pass a smaller --batch-size instead")
    if config.sae_dtype != "float32":
        raise InputError(f"--sae-dtype {config.sae_dtype}: what {asked} trains is float32; leave it out")


def is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def option(name):
    """The command's spelling of a field."""
    return f"--{name.replace('_', '-')}"


# ---- Files -------------------------------------------------------------------------------------------------------------

def read_config(folder):
    """The Config in a run's folder. Raises InputError where it has none, or one that train.py did not write."""
    path = Path(folder) / "config.json"
    found = read_object(path)
    names = {known.name for known in fields(Config)}
    if not {"model", "method", "layer", "data"} <= found.keys():
        raise InputError(f"{path} was not written by train.py: pass the folder of a run")
    unknown = found.keys() - names - {"steps", "versions"}
    if unknown:
        raise InputError(f"{path} has {min(unknown)}, which this version does not know: it was written by another one")

    values = {name: value for name, value in found.items() if name in names and value is not None}
    if isinstance(values.get("rank"), int):             # written by an earlier version
        values["rank"] = [values["rank"]]
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    if found.get("lr") is None:
        values["lr"] = None
    try:
        return Config(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
