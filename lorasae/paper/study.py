"""What the parts of the paper share: models, budgets, and the jobs that train and evaluate.

A part lists the jobs that it needs; several parts may need the same ones. Each training Job is
a run of train.py in its own folder, so train.py can resume it and eval.py can evaluate it.

    STUDY/saes/NAME, adapters/NAME, arms/NAME   runs
    STUDY/logs/                                 the output of their commands
    STUDY/numbers/PART.json                     the results of a part
    STUDY/study.json                            the arguments of the study
"""
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from lorasae.io.files import read_json
from lorasae.io.presets import PRESETS
from lorasae.runs.commands import Command
from lorasae.runs.config import SAE_TOKENS, Config

STUDIES = tomllib.loads(Path(__file__).with_name("studies.toml").read_text(encoding="utf-8"))
USUAL, QUICK = STUDIES.pop("usual"), STUDIES.pop("quick")
PLANS = {name: SimpleNamespace(**{**USUAL, **words}) for name, words in STUDIES.items()}


@dataclass(frozen=True)
class Study:
    """The arguments of `python -m lorasae.paper`. None: the value in the model's preset."""
    folder: Path
    model: str = "tiny-gemma-2"         # one of PLANS, or a folder with such a name
    sae_tokens: int | None = None       # to train an SAE on
    frontier_tokens: int | None = None  # to train the SAEs of Figures 1 and 5 on
    lora_tokens: int | None = None      # to train adapters on
    long_tokens: int | None = None      # to train the adapters that §5 and §6 evaluate
    eval_tokens: int | None = None      # held out
    seeds: list = (0,)                  # for adapters, in the parts that use several
    device: str = "cpu"
    data: str | None = None             # text to train on; part of it is held out
    other_data: str | None = None       # another kind of text, which is never trained on

    @property
    def name(self):
        """The model's name, without the path of its folder."""
        return Path(self.model).name

    @property
    def plan(self):
        return PLANS[self.name]

    @property
    def laptop(self):
        return self.plan.size == "laptop"

    @property
    def full(self):
        """Whether it uses the published SAEs of the paper's models."""
        return self.plan.size == "paper"


# ---- Jobs ----------------------------------------------------------------------------------------

class Job(NamedTuple):
    """A run of train.py, or an evaluation of a run by eval.py."""
    folder: Path                        # of the run
    options: dict                       # {option of the script: value}; None: left out
    needs: tuple = ()                   # the Jobs that must run first
    timed: bool = False                 # its seconds are a result, so it runs alone
    suite: str | None = None            # of eval.py; None for a run of train.py

    @property
    def command(self):
        folder = str(self.folder)
        if self.suite is None:
            return Command("train.py", (*in_words(self.options), "--out", folder), self.folder)
        words = folder, "--suite", self.suite, *in_words(self.options)
        return Command("eval.py", words, self.folder, f"eval-{self.suite}.json")

    @property
    def stage(self):
        """Lower stages run first: what others need, and at each depth the timed Jobs."""
        depth = 1 + max((job.stage[0] for job in self.needs), default=0)
        return depth, not self.timed

    def found(self, variant=""):
        """Its results; in a run with several ranks, those of a variant such as "rank-64"."""
        return read_json(self.folder / variant / self.command.result)


def in_words(options):
    """{"l0": 8, "rank": (1, 4), "seed": None} -> ["--l0", "8", "--rank", "1", "4"]"""
    words = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, (tuple, list)) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def evaluation(training, suite, **options):
    return Job(training.folder, options, (training,), suite=suite)


def preset_of(model):
    return PRESETS[Path(model).name]


def new_sae(study, method, model, *, tokens=None, timed=False, **chosen):
    """The Job that trains an SAE. chosen: its layer, width, and l0 or k, if not the defaults."""
    known = preset_of(model).sae_training
    chosen = {**study.plan.sae, **chosen}
    if "l0" in chosen:
        chosen.pop("k", None)
    chosen["tokens"] = tokens or study.sae_tokens or known.get("tokens", SAE_TOKENS)
    name = "-".join(f"{name}-{value}" for name, value in chosen.items())
    options = {"model": model, "method": method, **chosen, **of_text(study)}
    return Job(study.folder / "saes" / f"{Path(model).name}-{method}-{name}", options, timed=timed)


def of_text(study):
    return {"data": study.data, "eval_tokens": study.eval_tokens, "device": study.device}


def adapters(study, name, model, sources=None, needs=(), *, tokens=None, seed=Config.seed,
             timed=False, **options):
    """The Job that trains adapters, with the paper's optimiser unless the plan names another.

    sources: where their SAEs are; None for the preset's. needs: the Jobs that train these SAEs.
    options: further options of train.py.
    """
    known = preset_of(model).lora
    return Job(study.folder / "adapters" / name, {
        "model": model,
        "sae": sources,
        "tokens": tokens or study.lora_tokens or known.get("tokens", Config.tokens),
        "optimizer": "adamw",
        "seed": seed,
        **of_text(study),
        **study.plan.lora,
        **options,
    }, needs, timed)


def around(study, name, saes, **options):
    """The Job that adapts the SAEs' model to SAEs that other Jobs (saes) train."""
    return adapters(study, name, saes[0].options["model"], [sae.folder for sae in saes],
                    tuple(saes), **options)


# ---- The long TopK SAE, at points of its training ------------------------------------------------

def long_sae(study, model=None):
    """The Job of Figures 1 and 5's TopK SAE, which is saved after each tenth of its tokens."""
    return new_sae(study, "topk", model or study.model, tokens=study.frontier_tokens, timed=True)


def checkpoint(sae, percent):
    """The folder of an SAE as it was after `percent` % of its training."""
    return sae.folder / ("sae" if percent == 100 else f"sae-{percent}pct")


def around_long(study, seed, adapt, percent=None, model=None, tokens=None, rank=64):
    """Adapters around the long SAE after `percent` % of its training, or all of it (None).

    adapt: "after" for the blocks after the SAE, or "all".
    """
    sae, percent = long_sae(study, model), percent or study.plan.percents[-1]
    name = f"{sae.folder.name}-{percent}pct-{adapt}-rank-{rank}-seed-{seed}"
    return adapters(study, name, sae.options["model"], checkpoint(sae, percent), (sae,),
                    tokens=tokens or study.long_tokens, seed=seed, timed=True, rank=rank,
                    adapt=adapt)


# ---- Adapters that several parts evaluate --------------------------------------------------------

def around_topk(study, seed):
    """Adapters on all blocks, around a TopK SAE (Tables 3 and 6; Figures 8 and 11)."""
    if study.plan.size != "miniature":
        return around_long(study, seed, "all")
    source = Path(preset_of(study.model).sae).parent / "topk"
    return adapters(study, f"topk-seed-{seed}", study.model, source, tokens=study.long_tokens,
                    seed=seed, rank=64, adapt="all")


def around_jumprelu(study, seed):
    """Adapters on the blocks after the preset's JumpReLU SAE (Table 5; in miniature also Table 4).

    On a laptop, adapters around the long SAE instead.
    """
    if study.laptop:
        return around_long(study, seed, "after")
    return adapters(study, f"jumprelu-seed-{seed}", study.model, tokens=study.long_tokens,
                    seed=seed, rank=64)


def all_jobs(jobs):
    """{the file that a Job writes last: Job} for jobs and, before them, all that they need. If
    several write the same file, the first one counts.
    """
    found = {}

    def add(jobs):
        for job in jobs:
            add(job.needs)
            found.setdefault(job.command.done, job)

    add(jobs)
    return found


def budget(study, part):
    """How the SAEs and adapters of a part train: {what: a list of numbers, or a name}."""
    trained = [job.options for job in all_jobs(part.jobs(study)).values() if job.suite is None]
    saes = [options for options in trained if "sae" not in options]
    adapted = [options for options in trained if options.get("method", "lora") == "lora"]
    adapted = [options for options in adapted if options["tokens"] > 1]

    def each(name, some):
        return sorted({options[name] for options in some})

    return {
        "sae_tokens": each("tokens", saes),
        "adapter_tokens": each("tokens", adapted),
        "seeds": each("seed", adapted),
        "optimizer": adapted[-1].get("optimizer") if adapted else None,
        "recipe": preset_of(study.model).lora.get("recipe", "paper"),
    }
