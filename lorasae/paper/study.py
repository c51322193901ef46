"""What the parts of the paper share: models, budgets, and the commands that train and evaluate.

A part lists the trainings and evaluations that it needs; several may need the same ones. Each
training is a run of train.py in a folder of its own, so it can be resumed, and eval.py opens it.

    STUDY/saes/NAME, STUDY/adapters/NAME        runs
    STUDY/logs/                                 what their commands printed
    STUDY/numbers/PART.json                     what a part found
    STUDY/study.json                            the arguments of the study, and a hash of the code
"""
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from lorasae.evals import fidelity
from lorasae.io.files import read_json
from lorasae.io.presets import PRESETS
from lorasae.runs.commands import ROOT, Command
from lorasae.runs.config import SAE_TOKENS, Config


class Models(NamedTuple):
    """The models of a study, by what the paper takes them for."""
    main: str                           # of all parts with one model: Gemma-2-2B in the paper
    second: str                         # of Figure 5: Llama-3.2-1B in the paper
    several: str                        # of Figure 6, several SAEs: Llama-3.1-8B in the paper


MODELS = {
    "tiny-gemma-2": Models("tiny-gemma-2", "tiny-llama-3", "tiny-llama-3"),
    "gemma-2-2b": Models("gemma-2-2b", "llama-3.2-1b", "llama-3.1-8b"),
}


@dataclass(frozen=True)
class Study:
    """What `python -m lorasae.paper` was asked for. None: as in the models' presets."""
    folder: Path
    model: str = "tiny-gemma-2"         # one of MODELS
    sae_tokens: int | None = None       # to train an SAE on
    frontier_tokens: int | None = None  # to train the SAEs of Figures 1 and 5 on
    lora_tokens: int | None = None      # to train adapters on
    long_tokens: int | None = None      # the adapters that the evaluations of §5 and §6 look at
    eval_tokens: int | None = None      # held out
    seeds: tuple = (0,)                 # of adapters, in the parts that take several
    recipe: str | None = None           # of adapters
    device: str = "cpu"

    @property
    def models(self):
        return MODELS[self.model]

    @property
    def miniature(self):
        return self.model.startswith("tiny-")

    @property
    def arguments(self):
        """What study.json holds of them."""
        found = asdict(self)
        del found["folder"]
        return {**found, "seeds": list(self.seeds)}

    @cached_property
    def sources(self):
        """A hash of the code that computes."""
        found = blake2b(digest_size=8)
        for path in [*sorted(ROOT.glob("lorasae/**/*.py")), ROOT / "train.py", ROOT / "eval.py"]:
            found.update(path.read_bytes())
        return found.hexdigest()

    @property
    def other_code(self):
        """Whether the folder was begun with other code than this."""
        path = self.folder / "study.json"
        return path.exists() and read_json(path).get("sources") != self.sources


# ---- Trainings and evaluations -------------------------------------------------------------------

class Training(NamedTuple):
    """A run of train.py in study.folder / name."""
    name: str                           # "saes/..." or "adapters/..."
    options: dict                       # {option of train.py: value}; None: not given
    timed: bool = False                 # its seconds are a result: it runs by itself
    saes: tuple = ()                    # the Trainings of its SAEs

    @property
    def stage(self):
        """Lower ones run first: SAEs before adapters, and of each the timed ones."""
        return int(self.name.startswith("adapters/")), not self.timed


class Evaluation(NamedTuple):
    """A suite of eval.py on a finished run."""
    training: Training
    suite: str
    options: dict = {}                  # {option of eval.py: value}
    stage = 2, True                     # after all trainings; not timed


def new_sae(study, method, model, layer=None, *, width=None, l0=None, tokens=None, timed=False):
    """The Training of an SAE of `width` latents, l0 of them active: a jumprelu's aim, or a k.

    None is the preset's value.
    """
    known = PRESETS[model]
    chosen = {
        "layer": known.layer if layer is None else layer,
        "width": width or known.sae_training.get("width"),
        "l0" if method == "jumprelu" else "k": l0 or known.sae_training.get("l0"),
        "tokens": tokens or study.sae_tokens,
    }
    parts = [f"{name}-{value}" for name, value in chosen.items() if value is not None]
    common = {"model": model, "method": method}
    held_out = {"eval_tokens": study.eval_tokens, "device": study.device}
    return Training("-".join([f"saes/{model}-{method}", *parts]),
                    {**common, **chosen, **held_out}, timed)


def adapters(study, name, model, saes, *, tokens=None, seed=None, timed=False, **options):
    """The Training of adapters around SAEs.

    saes: Trainings of such, or sources that exist already; [] for the preset's. options: further
    ones of train.py. The optimiser is the paper's.
    """
    made_here = tuple(sae for sae in saes if isinstance(sae, Training))
    sources = [str(study.folder / sae.name) if sae in made_here else sae for sae in saes]
    common = {
        "model": model,
        "sae": sources or None,
        "tokens": tokens or study.lora_tokens,
        "eval_tokens": study.eval_tokens,
        "recipe": study.recipe,
        "optimizer": "adamw",
        "seed": seed,
        "device": study.device,
    }
    return Training(f"adapters/{name}", {**common, **options}, timed, made_here)


def around_topk(study, seed):
    """Adapters on all blocks, around a TopK SAE (Tables 3 and 6; Figures 8 and 11)."""
    model = study.models.main
    if study.miniature:
        sae = str(Path(PRESETS[model].sae).parent / "topk")
    else:
        sae = new_sae(study, "topk", model)
    return adapters(study, f"{model}-topk-seed-{seed}", model, [sae], tokens=study.long_tokens,
                    seed=seed, rank=64, adapt="all")


STEERED_TOKENS = 12_000                 # held-out tokens, of which steering cuts its texts


def around_jumprelu(study, seed):
    """Adapters on the blocks after the preset's JumpReLU SAE (Table 5; in miniature Table 4)."""
    model, held_out = study.models.main, study.eval_tokens
    if held_out is not None:
        held_out = max(held_out, STEERED_TOKENS)
    return adapters(study, f"{model}-jumprelu-seed-{seed}", model, [], tokens=study.long_tokens,
                    seed=seed, rank=64, eval_tokens=held_out)


def tokens_of(training):
    """How many tokens a training asks for."""
    options = training.options
    known, method = PRESETS[options["model"]], options.get("method", "lora")
    if method == "lora":
        return options["tokens"] or known.lora.get("tokens", Config.tokens)
    return options["tokens"] or known.sae_training.get("tokens", SAE_TOKENS)


def budget(study, training, papers, seeds=None):
    """How adapters train, in words.

    papers: the paper's tokens, such as "15M". seeds: None is the study's.
    """
    options = training.options
    recipe = study.recipe or PRESETS[options["model"]].lora.get("recipe", "paper")
    if options["seed"] is None:
        seeds = [Config.seed]
    seeds = ", ".join(map(str, seeds or study.seeds))
    return (f"Adapters train with AdamW and the {recipe} recipe, on {tokens_of(training):,} tokens "
            f"(the paper: {papers}). Seeds: {seeds}.")


# ---- Their commands ------------------------------------------------------------------------------

def command_of(study, needed):
    """The Command of a Training or an Evaluation."""
    if isinstance(needed, Training):
        folder = study.folder / needed.name
        words = (*in_words(needed.options), "--out", str(folder))
        return Command("train.py", words, folder)
    folder = study.folder / needed.training.name
    words = (str(folder), "--suite", needed.suite, *in_words(needed.options))
    return Command("eval.py", words, folder, f"eval-{needed.suite}.json")


def in_words(options):
    """{"l0": 8, "rank": (1, 4), "seed": None} -> ["--l0", "8", "--rank", "1", "4"]"""
    words = []
    for name, value in options.items():
        if value is None:
            continue
        values = value if isinstance(value, (tuple, list)) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


# ---- What finished runs found --------------------------------------------------------------------

def results(study, training, variant=None):
    """results.json of a run; of one with several ranks that of a variant, such as "rank-64"."""
    return read_json(study.folder / training.name / (variant or "") / "results.json")


def sequences(study, training, variant=None):
    """The losses of every held-out sequence (fidelity.read_sequences), to pair runs by them."""
    return fidelity.read_sequences(study.folder / training.name / (variant or ""))


def found(study, evaluation):
    """What an evaluation found."""
    return read_json(study.folder / evaluation.training.name / f"eval-{evaluation.suite}.json")
