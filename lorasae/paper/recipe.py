"""How to train adapters: rate x schedule x batch x rank x optimiser, against the published recipe.

    python -m lorasae.paper.recipe                      the embedded models around both kinds of SAE
    python -m lorasae.paper.recipe --models gemma-2-2b --tokens 15M --rates 5e-4 1e-3
    python -m lorasae.paper.recipe --quick              seconds: that it runs, not what it finds

How many tokens does a recipe need to close as much of the KL gap as the published one does with
its whole budget? A rate that falls to 0 does so at the end of the budget, so every recipe is
trained again at every budget; all rates and ranks of a budget, a batch size, an optimiser and a
schedule train side by side in one pass. The gap is that of the SAE as it came. Everything is
measured on the tuning text of arms.py, never on what results are measured on, so what is chosen
here (beyond/recipe.py: --recipe tuned) may still be tested there.

OUT/ gets a file for each pass, recipe.json and, with matplotlib, recipe.png. Interrupted, the same
command continues.
"""
import math
from itertools import product
from pathlib import Path
from typing import NamedTuple

from lorasae.evals.common import percent
from lorasae.evals.figures import save_figure
from lorasae.io.console import Parser, one_line_errors, count
from lorasae.io.files import write_json
from lorasae.io.presets import PAPER
from lorasae.paper import arms
from lorasae.paper.arms import (OPTIMIZERS, TUNING, adapted, asked, case_config, finetuned,
                                fresh_adapters, load_case, on_tuning_text, once, same_plan,
                                untouched)
from lorasae.paper.findings import Claim, Table, show
from lorasae.paper.study import RECIPES

TOKENS = 300_000                                        # of the published recipe
BUDGETS = (24, 12, 6)                                   # parts of these tokens
RATES = (3e-3, 5e-3)
SCHEDULES = ("falling", "constant")                     # linearly to 0, or not at all
BATCHES = (1,)                                          # sequences a step
RANKS = (64,)
SAE_RATES = (4e-4,)


class Recipe(NamedTuple):
    """How adapters are trained."""
    optimizer: str
    lr: float | None               # None: by the rule of --recipe tuned, which depends on the model
    schedule: str                                       # of SCHEDULES
    batch: int                                          # sequences a step
    rank: int
    sae_lr: float | None = None                         # of the SAE that is trained too, or None

    def __str__(self):
        both = "" if self.sae_lr is None else f", SAE {self.sae_lr:g}"
        lr = "by the rule" if self.lr is None else f"{self.lr:g}"
        return f"{self.optimizer} {lr} {self.schedule}, batch {self.batch}, rank {self.rank}{both}"


# ---- Trying --------------------------------------------------------------------------------------

def closed(found, kl):
    """The part of the KL gap that is closed, on the tuning text; found: what `search` returns."""
    return 1 - kl / found["before"]


def search(case, folder, plan, seed):
    """Every recipe at every budget -> {"before", "l0", "paper", "tried": [a `trial`]}, KL in nats."""
    untrained = once(folder / "before.json", lambda: on_tuning_text(case, untouched(case)))
    paper = once(folder / f"paper-{seed}.json", lambda: published(case, plan["tokens"], seed))

    tried = []
    for part in plan["budgets"]:
        tokens = plan["tokens"] // part

        def trials(name, work):
            found = once(folder / f"{name}-{part}-{seed}.json", work)
            return [{**trial, "part": part} for trial in found]

        for optimizer, schedule, batch in product(plan["optimizers"], plan["schedules"], plan["batches"]):
            tried += trials(f"{optimizer}-{schedule}-{batch}",
                            lambda: side_by_side(case, plan, tokens, optimizer, schedule, batch, seed))
        for sae_lr in plan["sae_rates"]:
            tried += trials(f"both-{sae_lr}", lambda: together(case, plan, tokens, sae_lr, seed))
        print(f"{case.name}, seed {seed}: 1/{part} of the tokens done", flush=True)
    return {"before": untrained["kl"], "l0": untrained["l0"], "paper": paper, "tried": tried}


def published(case, tokens, seed):
    """KL after the published recipe."""
    trained, = adapted(case, asked(case, tokens, seed, rank=(64,), micro_batch=None, **PAPER))
    return on_tuning_text(case, trained)["kl"]


def side_by_side_of(plan):
    """(rates, ranks) of the adapters that train side by side: every rate at every rank."""
    return zip(*product(plan["rates"], plan["ranks"]))


def side_by_side(case, plan, tokens, optimizer, schedule, batch, seed):
    """A trial of every rate and rank, in one pass."""
    rates, ranks = side_by_side_of(plan)
    config = asked(case, tokens, seed, optimizer=optimizer, lr_decay=schedule == "falling", rank=ranks, lr=rates,
                   batch_size=batch, micro_batch=None)
    trials = []
    for lr, rank, trained in zip(rates, ranks, adapted(case, config)):
        recipe = Recipe(optimizer, lr, schedule, batch, rank)
        trials.append(trial(recipe, config, on_tuning_text(case, trained)))
    return trials


def together(case, plan, tokens, sae_lr, seed):
    """A trial with the SAE trained too, and the adapters by --recipe tuned, with the first rank."""
    how, rank = RECIPES["tuned"](case.config.model, "muon", True), plan["ranks"][0]
    config = asked(case, tokens, seed, rank=(rank,), objective="kl", micro_batch=None, **how)
    trained = finetuned(case, config, sae_lr, fresh_adapters(case, config), train_adapters=True)
    recipe = Recipe(config.optimizer, None, "falling", config.batch_size, rank, sae_lr)
    return [trial(recipe, config, on_tuning_text(case, trained))]


def trial(recipe, config, found):
    """What is kept of a training: its recipe, its tokens in whole steps, and {kl, l0} on the tuning text."""
    return {**recipe._asdict(), "tokens": config.trained_tokens, **found}


# ---- What comes out ------------------------------------------------------------------------------

def recipes(found):
    """{Recipe: [(tokens, KL)] by budget, without those that diverged}"""
    curves = {}
    for trial in found["tried"]:
        curve = curves.setdefault(recipe_of(trial), [])
        if trial["kl"] is not None:
            curve.append((trial["tokens"], trial["kl"]))
    return {recipe: sorted(curve) for recipe, curve in curves.items()}


def recipe_of(trial):
    return Recipe(*(trial[name] for name in Recipe._fields))


def change_of_l0(numbers, recipe):
    """By how much training moved L0 at most, as a part of it: 0 where the SAE stays as it came."""
    changes = []
    for seeds in numbers["cases"].values():
        for found in seeds:
            changes += [abs(trial["l0"] / found["l0"] - 1) for trial in found["tried"] if recipe_of(trial) == recipe]
    return max(changes)


def needed(curve, kl):
    """Tokens at which a curve [(tokens, KL)] is down to kl, or None if it never is.

    Between budgets it is the line over log tokens. Where the smallest budget is enough already, it is that one: fewer were
    not tried.
    """
    less, above = None, None                            # the budget before, and its KL
    for tokens, value in curve:
        if value <= kl:
            if less is None:
                return tokens
            part = (above - kl) / (above - value)
            return less * math.exp(part * math.log(tokens / less))
        less, above = tokens, value
    return None


def ratio(found, recipe, tokens):
    """How many times fewer tokens than the published recipe's a recipe needs; None where no budget was enough."""
    enough = needed(recipes(found)[recipe], found["paper"])
    return None if enough is None else tokens / enough


def rows(numbers):
    """[(Recipe, [[its ratio a seed, or None] a case], the least of all or None)], the best first."""
    tokens, cases = numbers["plan"]["tokens"], list(numbers["cases"].values())
    table = []
    for recipe in recipes(cases[0][0]):
        ratios = [[ratio(found, recipe, tokens) for found in seeds] for seeds in cases]
        of_all = sum(ratios, [])
        table.append((recipe, ratios, None if None in of_all else min(of_all)))

    def worst_case_then_all(row):
        _, ratios, least = row
        return least or 0, sum(ratio or 0 for ratio in sum(ratios, []))
    return sorted(table, key=worst_case_then_all, reverse=True)


def times(ratio):
    return "-" if ratio is None else f"{ratio:.1f}x"


def spread(ratios):
    """Those of several seeds, the least and the greatest."""
    ordered = sorted(ratios, key=lambda ratio: ratio or 0)
    least, greatest = ordered[0], ordered[-1]
    return times(least) if least == greatest else f"{times(least)} to {times(greatest)}"


def draw(numbers, figure):
    """KL gap closed against tokens, in the mean over seeds: a panel a case, the best recipes and the published one's level."""
    plan, cases = numbers["plan"], numbers["cases"]
    figure.set_size_inches(3.6 * len(cases), 3.6)
    best = [recipe for recipe, _, _ in rows(numbers)[:5]]
    for axes, (name, seeds) in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases.items()):
        for recipe in best:
            means = {plan["tokens"] / part: mean_closed(seeds, recipe, part) for part in plan["budgets"]}
            curve = sorted((tokens, 100 * mean) for tokens, mean in means.items() if mean is not None)
            axes.semilogx(*zip(*curve), marker="o", label=str(recipe))
        axes.axhline(100 * mean_published(seeds), color="grey", linestyle="--", label="published, all its tokens")
        axes.set(xlabel="tokens", ylabel="KL gap closed (%)")
        axes.set_title(name, fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)


# ---- As a part of the whole paper (findings.py) --------------------------------------------------

TITLE = "How to train adapters"
FIGURES = ()
ABOUT = (
    "How many times fewer tokens a recipe needs to close as much of the KL gap as the published "
    "one (5e-5 constant, dropout 0.1, one sequence per step) does with its whole budget; every "
    "recipe is trained again at every budget, all rates side by side. Measured on held-out "
    "documents that nothing trains on and no result is measured on. One seed.")

STEPS = ("a small budget leaves a tuned run too few steps; against 900k tokens (three seeds) a twelfth was enough in the mean in "
         "three of the four cases, and a twentieth with the SAE trained around both JumpReLU SAEs")


trainings, pieces = arms.trainings, arms.pieces


def cost(study):
    """{kind of work: tokens} of a piece.

    The published recipe, and at each budget all rates and ranks side by side, and adapters and SAE together.
    """
    # Adapters side by side share the base model's part, about two fifths of a step.
    pass_of_all = 0.4 + 0.6 * len(RATES) * len(RANKS)
    passes = len(OPTIMIZERS) * len(BATCHES) * pass_of_all + len(SAE_RATES)
    budgets = sum(1 / part for part in BUDGETS)
    return {"after": study.recipe_tokens * (1 + budgets * passes)}


def piece(study, name):
    """What `search` finds of a case, "model kind"."""
    plan = plan_of(study.recipe_tokens)
    folder = study.folder / "recipe"
    same_plan(folder, plan)

    case = load_case(name, case_config(*name.split()), plan["tokens"], 1000, plan["tuning_tokens"])
    return search(case, folder / case.folder, plan, seed=0)


def measure(study, found):
    """{"plan", "cases": {piece's name: [what `search` finds, a seed]}}"""
    cases = {name: [each] for name, each in found.items()}
    return {"plan": plan_of(study.recipe_tokens), "cases": cases}


def plan_of(tokens, budgets=BUDGETS, rates=RATES, optimizers=tuple(OPTIMIZERS),
            schedules=SCHEDULES[:1], batches=BATCHES, ranks=RANKS, sae_rates=SAE_RATES,
            tuning_tokens=TUNING):
    """tokens: of the published recipe; budgets: parts of them. The others are tried in every combination, but for
    sae_rates: with the adapters of --recipe tuned alone.
    """
    return {
        "tokens": tokens,
        "budgets": list(budgets),
        "rates": list(rates),
        "optimizers": list(optimizers),
        "schedules": list(schedules),
        "batches": list(batches),
        "ranks": list(ranks),
        "sae_rates": list(sae_rates),
        "tuning_tokens": tuning_tokens,
        "text": arms.TEXT,
        "l0": arms.L0,
    }


def by_budget(numbers):
    """[Table] of the part of the KL gap that every recipe closes, in the mean over seeds; one a budget, the best first."""
    plan, cases = numbers["plan"], numbers["cases"]
    first, *_ = cases.values()
    made = []
    for part in sorted(plan["budgets"]):
        shown = []
        for recipe in recipes(first[0]):
            means = [mean_closed(seeds, recipe, part) for seeds in cases.values()]
            cells = ["diverged" if mean is None else percent(mean) for mean in means]
            shown.append((sum(mean or 0 for mean in means), [str(recipe), *cells]))
        shown.sort(reverse=True)
        made.append(Table(f"KL gap closed with 1/{part} of these tokens, {over_seeds(numbers)}", ["recipe", *cases],
                          [row for _, row in shown]))
    return made


def over_seeds(numbers):
    """What a mean is of, in words."""
    first, *_ = numbers["cases"].values()
    return "one seed" if len(first) == 1 else f"mean of {len(first)} seeds"


def mean_closed(seeds, recipe, part):
    """The part of the KL gap that a recipe closes at a budget, in the mean over seeds; None if one diverged."""
    found = []
    for search in seeds:
        for trial in search["tried"]:
            if recipe_of(trial) == recipe and trial["part"] == part:
                found.append(None if trial["kl"] is None else closed(search, trial["kl"]))
    return None if None in found else sum(found) / len(found)


def mean_published(seeds):
    return sum(closed(found, found["paper"]) for found in seeds) / len(seeds)


def tables(numbers):
    cases, tokens = numbers["cases"], f"{numbers['plan']['tokens']:,}"
    of_published = Table(f"KL gap closed by the published recipe with {tokens} tokens, {over_seeds(numbers)}", ["", *cases],
                         [["published", *map(percent, map(mean_published, cases.values()))]])

    shown = []
    for recipe, ratios, least in rows(numbers):
        shown.append([str(recipe), *map(spread, ratios), times(least), percent(change_of_l0(numbers, recipe))])
    budgets = numbers["plan"]["budgets"]
    caption = (f"Times fewer tokens for the same gap (-: 1/{min(budgets)} of them was not enough; "
               f"at most {max(budgets)}x, as fewer were not tried)")
    return [of_published, Table(caption, ["recipe", *cases, "least", "L0 moved by"], shown), *by_budget(numbers)]


def claims(numbers):
    """Nobody's yet: how many times fewer tokens the best recipe needs, with adapters alone and with the SAE trained too."""
    alone, with_sae = [], []                 # (Recipe, its ratio in the worst case), the best first
    for recipe, _, least in rows(numbers):
        if least is None:
            continue
        found = alone if recipe.sae_lr is None else with_sae
        found.append((recipe, least))

    best = by_sae = "none in every case"
    if alone:
        recipe, least = alone[0]
        best = f"at least {times(least)} fewer in every case ({recipe})"
    if with_sae:
        _, least = with_sae[0]
        by_sae = f"at least {times(least)} fewer in every case"

    return [
        saving("Another recipe reaches the published one's gap with a twelfth of its tokens, adapters alone", best, alone, 12),
        saving("... and with a twentieth where the SAE is trained too", by_sae, with_sae, 20),
    ]


def saving(says, ours, found, goal):
    """The Claim that the best of some recipes, found: [(Recipe, ratio)], needs `goal` times fewer tokens."""
    reached = bool(found) and found[0][1] >= goal
    return Claim(says, "not measured", f"{ours}, one seed", direction=reached, why="" if reached else STEPS, of_paper=False)


# ---- The command ---------------------------------------------------------------------------------

def arguments(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    arms.add_cases(parser)
    add("--tokens", type=count, help="the published recipe's budget (default: 300k; quick: 12k)")
    add("--budgets", type=int, nargs="+", default=list(BUDGETS), help="what to divide these tokens by (default: %(default)s)")
    add("--rates", type=float, nargs="+", default=list(RATES), help="of the adapters (default: %(default)s)")
    add("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS),
        help="(default: both)")
    add("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES[:1]), help="of the rate (default: %(default)s)")
    add("--batches", type=int, nargs="+", default=list(BATCHES), help="sequences a step (default: %(default)s)")
    add("--ranks", type=int, nargs="+", default=list(RANKS), help="(default: %(default)s)")
    add("--sae-rates", type=float, nargs="*", default=list(SAE_RATES), help="of the SAE, trained together with adapters of "
        "the first rank by --recipe tuned; none: leave that out (default: %(default)s)")
    add("--seeds", type=int, default=1, help="number of seeds (default: %(default)s)")
    add("--quick", action="store_true", help="the smallest that runs")
    add("--out", type=Path, help="folder (default: runs/recipe, or runs/recipe-quick)")
    args = parser.parse_args(argv)
    for name, least in ("seeds", args.seeds), ("budgets", min(args.budgets)):
        if least < 1:
            parser.error(f"--{name} {least}: pass at least 1")
    arms.check_rates(parser, rates=args.rates, sae_rates=args.sae_rates)
    return args


def main(argv=None):
    args = arguments(argv)
    folder = args.out or Path("runs") / ("recipe-quick" if args.quick else "recipe")
    tokens, tuning_tokens = (12_000, 1_000) if args.quick else (TOKENS, TUNING)
    plan = plan_of(args.tokens or tokens, args.budgets, args.rates, args.optimizers, args.schedules, args.batches,
                   args.ranks, args.sae_rates, tuning_tokens)
    with one_line_errors("interrupted: the same command continues"):
        rates, ranks = side_by_side_of(plan)
        wanted = arms.wanted(args, rank=ranks, lr=rates, batch_size=max(args.batches), micro_batch=None)
        same_plan(folder, {**plan, "layer": args.layer})
        cases = {}
        for name, config in wanted.items():
            case = load_case(name, config, plan["tokens"], eval_tokens=1000, tuning_tokens=plan["tuning_tokens"])
            cases[name] = [search(case, folder / case.folder, plan, seed) for seed in range(args.seeds)]
        numbers = {"plan": plan, "cases": cases}
        write_json(folder / "recipe.json", numbers)
        show(tables(numbers))
        save_figure(draw, numbers, folder / "recipe.png", f"python -m lorasae.paper.recipe --out {folder}")


if __name__ == "__main__":
    main()
