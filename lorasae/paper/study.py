"""What the parts of the paper share: the models, how long everything trains, and trainings that are made once.

A part (scaling.py, frontier.py, ...) lists the trainings that it needs; several may need the same one. Each is a run in a
folder of its own, as train.py writes it, so it is continued where it was interrupted and eval.py opens it.
"""
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from lorasae.beyond.recipe import tuned_recipe
from lorasae.errors import InputError
from lorasae.io.files import read_json
from lorasae.io.presets import PRESETS
from lorasae.runs.adapting import adapt_model
from lorasae.runs.config import Config, configure, read_config
from lorasae.runs.folder import Run
from lorasae.runs.sae_training import train_sae
from lorasae.runs.setting import load_setting, open_run

RECIPES = {"tuned": tuned_recipe}


class Models(NamedTuple):
    """The models of a study, by what the paper takes them for."""
    sizes: tuple                                        # of one family, small to large (Figure 4)
    main: str                            # Gemma-2-2B in the paper; of all parts that take one model
    second: str                                         # Llama-3.2-1B in the paper (Figure 5)
    several: str                   # Llama-3.1-8B in the paper, with several SAEs at once (Figure 6)


MODELS = {
    "tiny-gemma-2": Models(
        sizes=("tiny-gemma-2-small", "tiny-gemma-2-medium", "tiny-gemma-2"),
        main="tiny-gemma-2",
        second="tiny-llama-3",
        several="tiny-llama-3",
    ),
    "gemma-2-2b": Models(
        sizes=("gemma-2-2b", "gemma-2-9b", "gemma-2-27b"),
        main="gemma-2-2b",
        second="llama-3.2-1b",
        several="llama-3.1-8b",
    ),
}


@dataclass(frozen=True)
class Study:
    """What was asked of `python -m lorasae.paper`, in tokens where nothing else is said.

    None is the model's preset, which for the real models is the paper's.
    """
    folder: Path
    model: str = "tiny-gemma-2"                         # one of MODELS
    sae_tokens: int | None = None                       # to train an SAE on
    lora_tokens: int | None = None                      # to train adapters on
    frontier_tokens: int | None = None                  # to train the SAEs of Figures 1 and 5 on
    long_tokens: int | None = None          # the adapters that the evaluations of §5 and §6 look at
    eval_tokens: int | None = None                      # held out
    seeds: tuple = (0,)                                 # of adapters, where a part takes several
    recipe: str | None = None                           # of the adapters
    beyond_tokens: int = 0                              # of every arm of "the model, the SAE, or both"
    recipe_tokens: int = 0                        # of the published recipe, to be beaten with fewer
    device: str = "cpu"

    @property
    def models(self):
        return MODELS[self.model]

    @property
    def miniature(self):
        return self.model.startswith("tiny-")

    @property
    def held_out(self):
        """Tokens that an evaluation reads, about."""
        return self.eval_tokens or Config.eval_tokens


# ---- Trainings -----------------------------------------------------------------------------------

class Training(NamedTuple):
    """A run in study.folder / name."""
    name: str
    given: dict                                         # arguments of runs.config.configure
    needs: tuple = ()                                   # names of the trainings that make its SAEs


def train(study, training):
    """Makes a training, or what is missing of it."""
    folder = study.folder / training.name
    config = configure(training.given, RECIPES)
    check_same(config, folder)
    if (folder / "results.json").exists():
        return

    begun = (folder / "config.json").exists()
    run = Run.resume(folder) if begun else Run.create(folder, config)
    with closing(run):
        setting = load_setting(run.config, run.folder)
        with closing(setting.text):
            if run.config.method == "lora":
                adapt_model(setting, run)
            else:
                train_sae(setting, run)
    if config.compile:
        torch.compiler.reset()                          # the next training's blocks are others


def check_same(config, folder):
    """Refuses to continue in a folder that holds another training than the one asked for."""
    if not (folder / "config.json").exists():
        return
    before = read_config(folder)
    for name, asked in vars(config).items():
        found = getattr(before, name)
        if asked is not None and found != asked:
            raise InputError(f"{folder} was trained with {name} {found}, not {asked}: pass "
                             "another --out, or the same arguments to continue")


def new_sae(study, method, model, layer=None, *, width=None, l0=None, tokens=None):
    """The Training of an SAE: l0 latents are to be active, by the penalty of a jumprelu or as the k of the others.

    What is None is the preset's; a width is a number of latents.
    """
    known = PRESETS[model]
    layer = known.layer if layer is None else layer
    width = width or known.sae_training.get("width")
    active = l0 or known.sae_training.get("l0")
    tokens = tokens or study.sae_tokens

    parts = [model, method, f"layer-{layer}"]
    if width:
        parts.append(f"{width}-latents")
    if active:
        parts.append(f"l0-{active}")
    if tokens:
        parts.append(f"{tokens}-tokens")

    given = {
        "model": model,
        "method": method,
        "layer": (layer,),
        "width": width,
        "tokens": tokens,
        "l0" if method == "jumprelu" else "k": active,
        "eval_tokens": study.eval_tokens,
        "device": study.device,
    }
    return Training("saes/" + "-".join(parts), given)


def adapters(study, name, model, saes, *, tokens=None, seed=None, **how):
    """The Training of adapters around SAEs: Trainings of such, or sources that exist already; none, the preset's.

    how: further arguments of runs.config.configure. The optimiser is the paper's.
    """
    sources, needs = [], []
    for sae in saes:
        if isinstance(sae, Training):
            sources.append(str(study.folder / sae.name))
            needs.append(sae.name)
        else:
            sources.append(sae)

    given = {
        "model": model,
        "sae": tuple(sources) or None,
        "tokens": tokens or study.lora_tokens,
        "eval_tokens": study.eval_tokens,
        "recipe": study.recipe,
        "optimizer": "adamw",
        "seed": seed,
        "device": study.device,
        **how,
    }
    return Training(f"adapters/{name}", given, tuple(needs))


def results(study, training, variant=None):
    """What a finished training found; of several ranks or rates those of one, named as its folder is."""
    folder = study.folder / training.name
    if variant is not None:
        folder = folder / variant
    return read_json(folder / "results.json")


def opened(study, training):
    """The Setting of a finished training, as eval.py opens it: what an evaluation takes."""
    return open_run(study.folder / training.name)


# ---- The adapters that the evaluations of §5 and §6 look at --------------------------------------

TO_STEER = 12_000                                # held-out tokens, of which steering cuts its texts


def around_topk(study, seed):
    """Adapters on all blocks, around a TopK SAE (Tables 3 and 6; Figures 8 and 11)."""
    model = study.models.main
    if study.miniature:
        sae = str(Path(PRESETS[model].sae).parent / "topk")
    else:
        sae = new_sae(study, "topk", model)

    name = f"{model}-topk-seed-{seed}"
    return adapters(study, name, model, [sae], tokens=study.long_tokens, seed=seed, rank=(64,), adapt=("all",))


def around_topk_of_seeds(study):
    """The same, a Training a seed (Figures 8 and 11)."""
    return [around_topk(study, seed) for seed in study.seeds]


def around_jumprelu(study, seed):
    """Adapters on the blocks after a JumpReLU SAE, the preset's: Gemma Scope (Table 5; in miniature Table 4 too)."""
    model = study.models.main
    held_out = study.eval_tokens
    if held_out is not None:
        held_out = max(held_out, TO_STEER)
    name = f"{model}-jumprelu-seed-{seed}"
    return adapters(study, name, model, [], tokens=study.long_tokens, seed=seed, rank=(64,), eval_tokens=held_out)
