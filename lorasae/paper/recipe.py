"""How to train adapters: rate x batch x rank x optimiser, against the published recipe (beyond the paper).

    python -m lorasae.paper.recipe                      the embedded models around both kinds of SAE
    python -m lorasae.paper.recipe --quick              seconds: that it runs, not what it finds

How many tokens does a recipe need to close as much of the KL gap as the published one does with its whole budget? Every
recipe's rate falls to 0, so it is trained anew at every budget; all rates and ranks of a budget, a batch size and an
optimiser train side by side in one pass. Everything is measured on a tuning split of the training text, never on the
held-out one, so what is chosen here (io/presets.py: --recipe tuned) may still be tested there.

OUT/ gets a file for each pass, recipe.json and, with matplotlib, recipe.png. Interrupted, the same command continues.
"""
import math
from itertools import product
from pathlib import Path

from lorasae.evals.common import percent
from lorasae.evals.figures import save_figure
from lorasae.io.console import Parser, answering, count
from lorasae.io.disk import write_json
from lorasae.io.presets import PAPER
from lorasae.paper import arms
from lorasae.paper.arms import (KINDS, MODELS, TUNING, adapted, asked, finetuned, load_case, once, same_plan, tuning_kl,
                                untouched)
from lorasae.paper.findings import Claim, Table, show
from lorasae.paper.model_or_sae import new_student
from lorasae.runs.config import OPTIMIZERS

TOKENS = 300_000                                        # of the published recipe
BUDGETS = (24, 12, 6)                                   # parts of these tokens
RATES = (3e-3, 5e-3)
BATCHES = (1,)                                          # sequences a step
RANKS = (64,)
SAE_RATES = (2.5e-4,)


# ---- Trying ------------------------------------------------------------------------------------------------------------

def closed(found, kl):
    """The part of the KL gap that is closed, on the tuning text; found: what `search` returns."""
    return 1 - kl / found["before"]


def search(case, folder, plan, seed):
    """Every recipe at every budget -> {"before", "paper", "tried": [a `trial`]}, KL in nats."""
    before = once(folder / "before.json", lambda: tuning_kl(case, untouched(case)))
    paper = once(folder / f"paper-{seed}.json", lambda: published(case, plan["tokens"], seed))

    tried = []
    for part in BUDGETS:
        tokens = plan["tokens"] // part
        for optimizer, batch in product(plan["optimizers"], plan["batches"]):
            path = folder / f"{optimizer}-{batch}-{part}-{seed}.json"
            tried += once(path, lambda: side_by_side(case, plan, tokens, optimizer, batch, seed))
        for sae_lr in plan["sae_rates"]:
            path = folder / f"both-{sae_lr}-{part}-{seed}.json"
            tried += once(path, lambda: together(case, plan, tokens, sae_lr, seed))
        print(f"{case.name}, seed {seed}: 1/{part} of the tokens done", flush=True)
    return {"before": before, "paper": paper, "tried": tried}


def published(case, tokens, seed):
    """KL after the published recipe."""
    trained, = adapted(case, asked(case, tokens, seed, rank=(64,), micro_batch=None, **PAPER))
    return tuning_kl(case, trained)


def side_by_side(case, plan, tokens, optimizer, batch, seed):
    """A trial of every rate and rank, in one pass."""
    pairs = [(lr, rank) for lr in plan["rates"] for rank in plan["ranks"]]
    rates, ranks = zip(*pairs)
    config = asked(case, tokens, seed, optimizer=optimizer, rank=ranks, lr=rates, batch_size=batch, micro_batch=None)
    students = adapted(case, config)
    trials = []
    for (lr, rank), trained in zip(pairs, students):
        trials.append(trial(optimizer, lr, batch, rank, None, tokens, tuning_kl(case, trained)))
    return trials


def together(case, plan, tokens, sae_lr, seed):
    """A trial with the SAE trained too, both by AdamW: the first rate, batch size and rank."""
    lr, batch, rank = plan["rates"][0], plan["batches"][0], plan["ranks"][0]
    config = asked(case, tokens, seed, rank=(rank,), lr=lr, objective="kl", batch_size=batch, micro_batch=None)
    trained = finetuned(case, config, sae_lr, new_student(case, config), train_adapters=True)
    return [trial("adamw", lr, batch, rank, sae_lr, tokens, tuning_kl(case, trained))]


def trial(optimizer, lr, batch, rank, sae_lr, tokens, kl):
    return {"optimizer": optimizer, "lr": lr, "batch": batch, "rank": rank, "sae_lr": sae_lr, "tokens": tokens, "kl": kl}


# ---- What comes out ----------------------------------------------------------------------------------------------------

def recipes(found):
    """{(optimizer, lr, batch, rank, sae_lr): [(tokens, KL)] by budget}"""
    curves = {}
    for trial in found["tried"]:
        key = tuple(trial[name] for name in ("optimizer", "lr", "batch", "rank", "sae_lr"))
        curves.setdefault(key, []).append((trial["tokens"], trial["kl"]))
    return {key: sorted(curve) for key, curve in curves.items()}


def needed(curve, kl):
    """Tokens at which a curve [(tokens, KL)] is down to kl, or None if it never is.

    Between budgets it is the line over log tokens. Where the smallest budget is enough already, that one: fewer were not tried.
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


def ratio(found, key, tokens):
    """How many times fewer tokens than the published recipe's a recipe needs; None where no budget was enough."""
    enough = needed(recipes(found)[key], found["paper"])
    return None if enough is None else tokens / enough


def named(key):
    optimizer, lr, batch, rank, sae_lr = key
    both = "" if sae_lr is None else f", SAE {sae_lr:g}"
    return f"{optimizer} {lr:g}, batch {batch}, rank {rank}{both}"


def rows(numbers):
    """[(recipe's key, [its ratio a case, or None], the least of them or None)], the best first."""
    searches = [found for seeds in numbers["cases"].values() for found in seeds]
    table = []
    for key in recipes(searches[0]):
        ratios = [ratio(found, key, numbers["plan"]["tokens"]) for found in searches]
        table.append((key, ratios, None if None in ratios else min(ratios)))
    return sorted(table, key=lambda row: -(row[2] or 0))


def times(ratio):
    return "-" if ratio is None else f"{ratio:.1f}x"


def draw(numbers, figure):
    """KL gap closed against tokens, a panel a case, the best recipes and the published one's level."""
    cases = numbers["cases"]
    figure.set_size_inches(3.6 * len(cases), 3.4)
    best = [key for key, _, _ in rows(numbers)[:4]]
    for axes, (name, seeds) in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases.items()):
        found = seeds[0]
        for key in best:
            tokens, kl = zip(*recipes(found)[key])
            axes.semilogx(tokens, [100 * closed(found, value) for value in kl], marker="o", label=named(key))
        axes.axhline(100 * closed(found, found["paper"]), color="grey", linestyle="--", label="published, all its tokens")
        axes.set(xlabel="tokens", ylabel="KL gap closed (%)")
        axes.set_title(name, fontsize=10)
        axes.legend(fontsize=7)


# ---- As a part of the whole paper (findings.py) --------------------------------------------------------------------------

TITLE = "How to train adapters"
FIGURES = ()
ABOUT = ("How many times fewer tokens a recipe needs to close as much of the KL gap as the published one (5e-5 constant, "
         "dropout 0.1, one sequence a step) does with its whole budget; every recipe trained anew at every budget, all "
         "rates side by side. Measured on a part of the training text that nothing trains on, not on the held-out text. "
         "One seed.")

STEPS = ("a small budget leaves a tuned run too few steps; against 900k tokens, on tiny-gemma-2 around its JumpReLU SAE, "
         "75k and 45k were enough (io/presets.py)")


trainings, pieces = arms.trainings, arms.pieces


def cost(study):
    """{kind of work: tokens} of a piece.

    The published recipe, and at each budget all rates and ranks side by side, and adapters and SAE together.
    """
    students = 0.4 + 0.6 * len(RATES) * len(RANKS)      # they share the teacher, about two fifths of a step
    passes = len(OPTIMIZERS) * len(BATCHES) * students + len(SAE_RATES)
    budgets = sum(1 / part for part in BUDGETS)
    return {"after": study.recipe_tokens * (1 + budgets * passes)}


def piece(study, name):
    """What `search` finds of a case, "model kind"."""
    plan = plan_of(study.recipe_tokens)
    folder = study.folder / "recipe"
    same_plan(folder, plan)

    model, kind = name.split()
    case = load_case(model, kind, plan["tokens"], eval_tokens=1000, tuning_tokens=plan["tuning_tokens"])
    return search(case, folder / f"{model}-{kind}", plan, seed=0)


def measure(study, found):
    """{"plan", "cases": {piece's name: [what `search` finds, a seed]}}"""
    cases = {name: [each] for name, each in found.items()}
    return {"plan": plan_of(study.recipe_tokens), "cases": cases}


def plan_of(tokens, rates=RATES, optimizers=OPTIMIZERS, batches=BATCHES, ranks=RANKS, sae_rates=SAE_RATES,
            tuning_tokens=TUNING):
    """tokens: of the published recipe; the others are tried in every combination, sae_rates with the first of each."""
    return {
        "tokens": tokens,
        "rates": list(rates),
        "optimizers": list(optimizers),
        "batches": list(batches),
        "ranks": list(ranks),
        "sae_rates": list(sae_rates),
        "tuning_tokens": tuning_tokens,
    }


def tables(numbers):
    names = list(numbers["cases"])

    shares = []
    for seeds in numbers["cases"].values():
        first = seeds[0]
        shares.append(percent(closed(first, first["paper"])))
    tokens = f"{numbers['plan']['tokens']:,}"
    of_published = Table(f"KL gap closed by the published recipe with {tokens} tokens", ["", *names],
                         [["published", *shares]])

    shown = []
    for key, ratios, least in rows(numbers):
        shown.append([named(key), *map(times, ratios), times(least)])
    caption = (f"Times fewer tokens for the same gap (-: 1/{BUDGETS[-1]} of them was not enough; "
               f"at most {BUDGETS[0]}x, as fewer were not tried)")
    return [of_published, Table(caption, ["recipe", *names, "least"], shown)]


def claims(numbers):
    """Nobody's yet: how many times fewer tokens the best recipe needs, with adapters alone and with the SAE trained too."""
    alone, with_sae = [], []                            # (recipe's key, its ratio in the worst case), the best first
    for key, _, least in rows(numbers):
        if least is None:
            continue
        *_, sae_lr = key
        found = alone if sae_lr is None else with_sae
        found.append((key, least))

    best = by_sae = "none in every case"
    if alone:
        key, least = alone[0]
        best = f"at least {times(least)} fewer in every case ({named(key)})"
    if with_sae:
        _, least = with_sae[0]
        by_sae = f"at least {times(least)} fewer in every case"

    return [
        saving("Another recipe reaches the published one's gap with a twelfth of its tokens, adapters alone", best, alone, 12),
        saving("... and with a twentieth where the SAE is trained too", by_sae, with_sae, 20),
    ]


def saving(says, ours, found, goal):
    """The Claim that the best of some recipes, found: [(key, ratio)], needs `goal` times fewer tokens."""
    reached = bool(found) and found[0][1] >= goal
    return Claim(says, "not measured", ours, direction=reached, why="" if reached else STEPS, of_paper=False)


# ---- The command -------------------------------------------------------------------------------------------------------

def arguments(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: both)")
    add("--tokens", type=count, help="the published recipe's budget (default: 300k; quick: 12k)")
    add("--rates", type=float, nargs="+", default=list(RATES), help="of the adapters (default: %(default)s)")
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="(default: both)")
    add("--batches", type=int, nargs="+", default=list(BATCHES), help="sequences a step (default: %(default)s)")
    add("--ranks", type=int, nargs="+", default=list(RANKS), help="(default: %(default)s)")
    add("--sae-rates", type=float, nargs="*", default=list(SAE_RATES), help="of the SAE, trained together with adapters of "
        "the first rate, batch size and rank; none: leave that out (default: %(default)s)")
    add("--seeds", type=int, default=1, help="number of seeds (default: %(default)s)")
    add("--quick", action="store_true", help="the smallest that runs")
    add("--out", type=Path, help="folder (default: runs/recipe, or runs/recipe-quick)")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: pass at least 1")
    return args


def main(argv=None):
    args = arguments(argv)
    folder = args.out or Path("runs") / ("recipe-quick" if args.quick else "recipe")
    tokens, tuning_tokens = (12_000, 1_000) if args.quick else (TOKENS, TUNING)
    plan = plan_of(args.tokens or tokens, args.rates, args.optimizers, args.batches, args.ranks, args.sae_rates, tuning_tokens)
    with answering("interrupted: the same command continues"):
        same_plan(folder, plan)
        cases = {}
        for model in args.models:
            for kind in KINDS:
                case = load_case(model, kind, plan["tokens"], eval_tokens=1000, tuning_tokens=plan["tuning_tokens"])
                place = folder / f"{model}-{kind}"
                cases[case.name] = [search(case, place, plan, seed) for seed in range(args.seeds)]
        numbers = {"plan": plan, "cases": cases}
        write_json(folder / "recipe.json", numbers)
        show(tables(numbers))
        save_figure(draw, numbers, folder / "recipe.png", f"python -m lorasae.paper.recipe --out {folder}")


if __name__ == "__main__":
    main()
