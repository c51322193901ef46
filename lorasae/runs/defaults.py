"""Arguments -> Config: presets and defaults filled in.

    config = configure({"model": "gemma-2-2b", "layer": (12,), "rank": (64,)})

A value comes from the first of these that has one: what is given; the run that made the SAE (`--sae RUN_DIR`); the recipe
that is asked for; the model's preset (io/presets.py); the paper's, which are the defaults of Config's fields.
"""
from os.path import basename, dirname, isdir, isfile, join

from lorasae.errors import InputError
from lorasae.io.models import load_config
from lorasae.io.console import note
from lorasae.io.hub import sae_choice
from lorasae.io.presets import PAPER, preset, tuned
from lorasae.runs.config import RECIPES, Config, option, read_config

SAE_TOKENS = 2_000_000_000                              # the paper's training of an SAE (§3.1)
UNKNOWN = {"data": "stdlib"}                            # for models without a preset: what every user has

OF_ADAPTERS = ("rank", "alpha", "dropout", "adapt", "optimizer", "weight_decay", "train_sae", "sae_lr", "recipe")
OF_FINETUNING = ("objective", "thresholds")
FROM_SCRATCH = (*OF_ADAPTERS, *OF_FINETUNING, "lr_decay", "sae_dtype", "llama_scope")
WITHOUT_EFFECT = {                                      # options that change nothing of what a method does
    "lora": ("k", "auxk", "dead_after", "objective"),
    "topk": (*FROM_SCRATCH, "l0"),
    "jumprelu": (*FROM_SCRATCH, "k"),
    "e2e": (*FROM_SCRATCH, "l0"),
    "finetune": (*OF_ADAPTERS, "k", "auxk", "dead_after"),
}
FINETUNE = {"lr": 5e-5, "lr_decay": True}               # the published finetune's, falling to 0 (arXiv 2503.17272)


def configure(given):
    """Config of what is given, {field: value}; None is not given. Raises InputError for what has no effect or no sense."""
    given = {name: value for name, value in given.items() if value is not None}
    method = given.get("method", Config.method)
    for name in WITHOUT_EFFECT.get(method, ()):
        if name in given and given[name] is not False:
            raise InputError(f"{option(name)} has no effect with --method {method}: leave it out")
    if method == "lora" and not given.get("train_sae"):
        for name in ("thresholds", "sae_lr"):
            if name in given:
                raise InputError(f"{option(name)} has no effect without --train-sae: leave it out, or pass both")
    values = adapting(given) if method in ("lora", "finetune") else sae_training(given, method)
    return Config(**values)


def adapting(given):
    """The fields of a run that adapts the model to an SAE, or finetunes the SAE."""
    given = dict(given)
    recipe = given.pop("recipe", None)
    model, optimizer = given.get("model", Config.model), given.get("optimizer", "muon")
    known = preset(model)
    if known is None:
        load_config(model)                              # that there is no such model is said first
        defaults = dict(UNKNOWN)
    else:
        defaults = {"layer": (known.layer,), **known.common, **known.lora}
    usual = defaults.pop("recipe", None)                # of this model, where none is asked for
    of_sae = {**FINETUNE, **(known.finetune if known else {})}
    if given.get("method") == "finetune":
        defaults = {name: value for name, value in defaults.items() if name not in OF_ADAPTERS} | of_sae
    else:
        train_sae = given.get("train_sae", False)
        if usual is not None:
            decided = recipe_of(usual, model, optimizer, train_sae)
            if train_sae:                               # found with the recipe's batch size, which the preset's would replace
                defaults |= decided
            else:
                defaults = {**decided, **defaults}
        if recipe is not None:
            defaults |= recipe_of(recipe, model, optimizer, train_sae)

    if given.get("method") == "finetune" or given.get("train_sae"):
        defaults.pop("sae_dtype", None)                 # what trains is float32
    if given.get("train_sae"):
        defaults.setdefault("sae_lr", of_sae["lr"])
    else:
        defaults.pop("sae_lr", None)

    if "sae" in given:
        own = {name: value for name, value in defaults.items() if name != "adapt"}      # it depends on the SAE's kind
        made = made_by(given["sae"], with_tokens=known is None)
        return fitted({**own, **made, **given}, {**made, **given}, known)

    layers = given.get("layer", (known.layer,) if known else Config.layer)
    choices = [sae_choice(model, layer=layer, width=given.get("width"), l0=given.get("l0")) for layer in layers]
    source, chosen = choices[0]
    values = {**defaults, **given, "sae": (source,), "width": chosen["width"]}
    if len(choices) == 1:
        values["l0"] = chosen["l0"]
    return fitted(values, given, known)


def recipe_of(name, model, optimizer, train_sae):
    """The fields of Config that a recipe for adapters decides: the paper's, or what a search on small models supports.

    optimizer: whose rate the tuned recipe is to have.
    """
    if name not in RECIPES:
        raise InputError(f"--recipe is {name!r}, but it must be one of {', '.join(RECIPES)}")
    if name == "paper":
        return PAPER
    config = load_config(model)
    return tuned(config.hidden_size, config.num_hidden_layers, optimizer, train_sae)


def made_by(sources, with_tokens):
    """What an SAE of one's own says of the text it was made on: fields of the run in a source folder, {} of any other."""
    made = [read_config(run) for run in map(run_of, sources) if run is not None]
    if not made:
        return {}
    names = ["data", "field", "context", "dtype", "eval_tokens"] + ["tokens"] * with_tokens
    values = {name: getattr(made[0], name) for name in names if getattr(made[0], name) is not None}
    values["layer"] = tuple(run.layer[0] for run in made)
    note(f"note: {', '.join(names)} and layer as in the run that made the SAE, {sources[0]}, where no option says otherwise")
    return values


def run_of(source):
    """The folder of the run that made the SAE in `source`: itself, or the one around RUN_DIR/sae-50pct; None for others."""
    if isfile(join(source, "config.json")) and isdir(join(source, "sae")):
        return source
    if basename(source).startswith("sae") and isfile(join(dirname(source), "config.json")):
        return dirname(source)
    return None


def fitted(values, given, known):
    """The values for a model without a preset, its context at most what it holds; says what was not given, and why."""
    if known is not None:
        return values
    model = values["model"]
    context, holds = values.get("context", Config.context), load_config(model).max_position_embeddings
    if "context" not in given and context > holds:
        values["context"] = holds
        note(f"note: --context {holds}, as {model} holds no more")
    chosen = {name: values.get(name, getattr(Config, name)) for name in ("data", "tokens", "eval_tokens") if name not in given}
    if chosen:
        shown = " ".join(f"{option(name)} {value}" for name, value in chosen.items())
        note(f"note: {model} is no preset, so {shown}: text that every machine has, and the paper's numbers of tokens")
    return values


def sae_training(given, method):
    """The fields of a run that trains an SAE."""
    if "sae" in given:
        raise InputError(f"--method {method} trains an SAE from scratch: leave --sae out")
    known = preset(given.get("model", Config.model))
    values = {"tokens": SAE_TOKENS, "lr": None, "l0": 64}
    if known is None:
        values |= UNKNOWN
    else:
        values |= {"layer": (known.layer,), **known.common, **known.sae_training}
        values |= known.e2e if method == "e2e" else {}
    values |= given
    if method != "jumprelu":
        values["l0"] = None
    if values.get("width") is not None:
        values["width"] = latents(values["width"])
    return fitted(values, given, known)


def latents(width):
    """The number of latents to train, from 16384, "16384" or "16k" (which is 2^14, as Gemma Scope counts)."""
    text = str(width).lower()
    unit = {"k": 2 ** 10, "m": 2 ** 20}.get(text[-1:], 1)
    digits = text if unit == 1 else text[:-1]
    if not (digits.isascii() and digits.isdecimal()) or int(digits) < 1:
        raise InputError(f"--width {width}: training an SAE needs its number of latents, such as 16384 or 16k")
    return int(digits) * unit
