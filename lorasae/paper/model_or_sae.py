"""Adapt the model, the SAE, or both? Four arms, at equal tokens and at equal time.

    python -m lorasae.paper.model_or_sae                two families, two kinds of SAE, three seeds
    python -m lorasae.paper.model_or_sae --models gemma-2-2b --tokens 1M --sae-rates 2e-5 5e-5
    python -m lorasae.paper.model_or_sae --quick        seconds: that it runs, not what it finds

    adapters    the paper: the SAE as it came, adapters trained on Eq. 7
    sae         the rival: no adapters, the SAE finetuned (Karvonen 2025, arXiv 2503.17272)
    both        adapters and SAE together, on Eq. 7
    then        half the tokens for the adapters, then half for the SAE around the adapted model

Each arm has the best of a few rates, tried on one seed with half the tokens, by KL on documents
that no arm trains or is measured on. A penalty keeps the L0 of a JumpReLU near that of the SAE as
it came (finetune.py; the tables say how near). The KL gap is that of the SAE as it came. At equal
time every arm takes the seconds that the adapters took, by the speeds measured at equal tokens (of
each arm the quickest seed's, which other work on the machine disturbs least). Intervals are 90 %,
over seeds.

OUT/ gets a file for each arm, model_or_sae.json and, with matplotlib, model_or_sae.png.
Interrupted, the same command continues.
"""
from pathlib import Path

import torch

from lorasae.errors import InputError
from lorasae.evals.common import error_bar, interval, percent, plus_minus
from lorasae.evals.figures import save_figure
from lorasae.io.console import Parser, one_line_errors, count
from lorasae.io.files import write_json
from lorasae.paper.findings import Claim, Table, opposite, show, sign, unless_said, with_interval
from lorasae.paper import arms
from lorasae.paper.arms import (adapted, asked, case_config, finetuned, fresh_adapters, load_case,
                                measured, on_tuning_text, once, same_plan, untouched)

ARMS = {"adapters": "adapters", "sae": "SAE", "both": "both", "then": "adapters, then SAE"}
BUDGETS = {"tokens": "equal tokens", "time": "equal time"}
LORA_RATES = (1.5e-3, 3e-3, 6e-3)
SAE_RATES = (2e-4, 6e-4, 2e-3)
LARGEST = 3                                    # times the tokens, for the fastest arm at equal time


# ---- The arms ------------------------------------------------------------------------------------

def train_arm(case, arm, rates, tokens, seed, objective):
    """Trains an arm at its rates, {"lr", "sae_lr"} -> arms.Result."""
    lr, sae_lr = rates.get("lr"), rates.get("sae_lr")
    if arm == "adapters":
        trained, = adapted(case, asked(case, tokens, seed, lr=lr))
        return trained
    if arm == "sae":
        return finetuned(case, asked(case, tokens, seed, objective=objective), sae_lr)
    if arm == "both":
        config = asked(case, tokens, seed, lr=lr, objective="kl")
        return finetuned(case, config, sae_lr, fresh_adapters(case, config), train_adapters=True)

    config = asked(case, tokens // 2, seed, lr=lr, objective=objective)
    before, = adapted(case, config)
    after = finetuned(case, config, sae_lr, before.adapters, start=config.steps)
    return after._replace(seconds=before.seconds + after.seconds)


def best_rates(case, folder, plan):
    """{arm: its best rates}, after half the tokens."""
    def best(arm, candidates):
        return best_of(case, folder, arm, candidates, plan["tokens"] // 2, plan["objective"])

    adapters = best("adapters", [{"lr": lr} for lr in plan["lora_rates"]])
    sae = best("sae", [{"sae_lr": sae_lr} for sae_lr in plan["sae_rates"]])

    # Where both learn, each may want to go slower than alone.
    lr, sae_lr = adapters["lr"], sae["sae_lr"]
    slower = [{"lr": lr, "sae_lr": sae_lr}, {"lr": lr, "sae_lr": sae_lr / 3}]
    both = best("both", [*slower, {"lr": lr / 3, "sae_lr": sae_lr}, {"lr": lr / 3, "sae_lr": sae_lr / 3}])
    then = best("then", slower)
    return {"adapters": adapters, "sae": sae, "both": both, "then": then}


def best_of(case, folder, arm, candidates, tokens, objective):
    """The rates of the candidates with the smallest KL on the tuning text; every trial is kept in a file."""
    def trials():
        if arm == "adapters":                           # side by side, in one pass
            rates = tuple(candidate["lr"] for candidate in candidates)
            trained = adapted(case, asked(case, tokens, 0, lr=rates))
        else:
            trained = [train_arm(case, arm, rates, tokens, 0, objective) for rates in candidates]
        return [on_tuning_text(case, one)["kl"] for one in trained]

    losses = once(folder / f"rates-{arm}.json", trials)
    best = candidates[smallest(losses)]
    shown = ", ".join(f"{name} {value:g}" for name, value in best.items())
    print(f"{case.name}, {ARMS[arm]}: best of {len(losses)} at {shown}", flush=True)
    return best


def smallest(losses):
    """Where the smallest of the losses is; None is that of a trial that diverged."""
    finite = [loss for loss in losses if loss is not None]
    if not finite:
        raise InputError("every rate that was tried diverged: there is none to go on with")
    return losses.index(min(finite))


def compare(case, folder, plan):
    """All arms of a case -> {"before", "rates", "arms": {budget: {arm: [a seed's numbers]}}}."""
    tokens, objective = plan["tokens"], plan["objective"]
    before = once(folder / "before.json", lambda: measured(case, untouched(case)))
    rates = best_rates(case, folder, plan)

    def results(arm, budget, tokens):
        found = []
        for seed in plan["seeds"]:
            path = folder / f"{arm}-{budget}-{seed}.json"
            found.append(once(path, lambda: result(case, arm, rates[arm], tokens, seed, objective)))
        return found

    # Equal tokens.
    at_equal_tokens = {arm: results(arm, "tokens", tokens) for arm in ARMS}
    seconds = {}
    for arm, found in at_equal_tokens.items():
        seconds[arm] = min(numbers["seconds"] for numbers in found)

    # Equal time.
    at_equal_time = {"adapters": at_equal_tokens["adapters"]}
    for arm in ("sae", "both", "then"):
        times_as_fast = min(LARGEST, seconds["adapters"] / seconds[arm])
        affordable = once(folder / f"{arm}-affordable.json", lambda: round(tokens * times_as_fast))
        at_equal_time[arm] = results(arm, "time", affordable)
    return {"before": before, "rates": rates, "arms": {"tokens": at_equal_tokens, "time": at_equal_time}}


def result(case, arm, rates, tokens, seed, objective):
    """Trains an arm and measures it on the held-out text."""
    trained = train_arm(case, arm, rates, tokens, seed, objective)
    print(f"{case.name}, {ARMS[arm]}, {tokens:,} tokens, seed {seed}: {trained.seconds:.0f} s", flush=True)
    return {"tokens": tokens, "seconds": trained.seconds, **measured(case, trained)}


# ---- What comes out ------------------------------------------------------------------------------

def gaps(case, budget, arm):
    """The parts of the KL gap that an arm closes, one per seed [n]: of the SAE as it came."""
    kl = torch.tensor([numbers["kl"] for numbers in case["arms"][budget][arm]], dtype=torch.float64)
    return 1 - kl / case["before"]["kl"]


def mean(case, budget, arm, name):
    values = [numbers[name] for numbers in case["arms"][budget][arm]]
    return sum(values) / len(values)


HEADINGS = ("", "CE", "KL", "KL gap closed", "90 % CI", "KL without SAE", "L0", "FVU", "dead", "tokens", "seconds")


def table(case, budget):
    """A row an arm, in the order of HEADINGS."""
    before = case["before"]
    rows = [row("as it came", before, 0.0, None) + ["", ""]]
    for arm, label in ARMS.items():
        closed, half = interval(gaps(case, budget, arm))
        means = {name: mean(case, budget, arm, name) for name in (*before, "tokens", "seconds")}
        rows.append(row(label, means, closed, half) + [f"{means['tokens']:,.0f}", f"{means['seconds']:.0f}"])
    return rows


def row(label, numbers, closed, half):
    return [label, numbers["ce"], numbers["kl"], percent(closed), plus_minus(half, ".1%"), numbers["kl_without_sae"],
            f"{numbers['l0']:.2f}", numbers["fvu"], percent(numbers["dead_latents"])]


def conclusions(numbers):
    """Sentences that follow from the figures, and from nothing else."""
    return [ranking(numbers, "tokens"), ranking(numbers, "time"), price(numbers)]


def ranking(numbers, budget):
    """Which arm closes most of the KL gap, and how surely."""
    cases, seeds = numbers["cases"].values(), len(numbers["plan"]["seeds"])
    average = {}
    for arm in ARMS:
        average[arm] = sum(gaps(case, budget, arm).mean().item() for case in cases) / len(cases)
    order = sorted(ARMS, key=average.get, reverse=True)
    best, second = order[:2]

    shown = ", ".join(f"{ARMS[arm]} {average[arm]:.1%}" for arm in order)
    found = (f"At {BUDGETS[budget]} the KL gap closed, averaged over the {len(cases)} cases, is: "
             f"{shown}")
    if seeds == 1:
        return f"{found}; one seed has no interval, so nothing is said about which is ahead."
    wins = sum(ahead(case, budget, best, second) for case in cases)
    return (f"{found}; {ARMS[best]} is ahead of {ARMS[second]} by more than the interval over "
            f"seeds in {wins} of {len(cases)}.")


def ahead(case, budget, first, second):
    """Whether an arm closes more of the KL gap than another, beyond the interval over seeds.

    A single seed has no interval, so it never shows this.
    """
    difference, half = interval(gaps(case, budget, first) - gaps(case, budget, second))
    return half is not None and difference > half


def price(numbers):
    """What each arm does to the model without its SAE, to the reconstruction, and to L0, at equal tokens."""
    parts = []
    for arm, label in ARMS.items():
        without, fvu, l0 = [], [], []
        for case in numbers["cases"].values():
            without.append(mean(case, "tokens", arm, "kl_without_sae"))
            fvu.append(mean(case, "tokens", arm, "fvu") - case["before"]["fvu"])
            l0.append(abs(mean(case, "tokens", arm, "l0") / case["before"]["l0"] - 1))
        parts.append(f"{label}: {max(without):.3f} nats, {min(fvu):+.3f} to {max(fvu):+.3f}, {max(l0):.1%}")
    return f"The price, as KL without the SAE (at most), change of the FVU, and change of L0 (at most): {'; '.join(parts)}."


def draw(numbers, figure):
    """The KL gap closed by every arm, a panel a case."""
    cases = numbers["cases"]
    figure.set_size_inches(3.4 * len(cases), 3.4)
    panels = figure.subplots(1, len(cases), squeeze=False, sharey=True)[0]
    for axes, (name, case) in zip(panels, cases.items()):
        for shift, (budget, label) in zip((-0.2, 0.2), BUDGETS.items()):
            for place, arm in enumerate(ARMS):
                closed, half = interval(gaps(case, budget, arm))
                color, name_once = ("C0" if shift < 0 else "C1"), (label if place == 0 else None)
                axes.bar(place + shift, 100 * closed, 0.38, yerr=error_bar(half, 100), capsize=3,
                         color=color, label=name_once)
        axes.set_xticks(range(len(ARMS)), [label.replace(", ", ",\n") for label in ARMS.values()], fontsize=8)
        axes.set_title(name, fontsize=10)
    panels[0].set_ylabel("KL gap closed (%)")
    panels[0].legend(fontsize=8)


# ---- As a part of the whole paper (findings.py) --------------------------------------------------

TITLE = "Adapt the model, the SAE, or both?"
FIGURES = ()
ABOUT = ("Four arms at equal tokens and at equal time, each at the best of a few rates, chosen by KL on text that no arm "
         "trains or is measured on: adapters (the paper), the SAE finetuned (Karvonen 2025), both together, and adapters first, "
         "then the SAE. A penalty keeps L0 near that of the SAE as it came. Intervals are 90 % over seeds.")


trainings, pieces = arms.trainings, arms.pieces


def cost(study):
    """{kind of work: tokens} of a piece.

    The search for rates at half the tokens, then four arms a seed, at equal tokens and at equal time.
    """
    return {"after": study.beyond_tokens * (6 + 9 * len(study.seeds))}


def plan_for(study):
    return plan_of(study.beyond_tokens, study.eval_tokens, len(study.seeds))


def piece(study, name):
    """What `compare` finds of a case, "model kind"."""
    plan = plan_for(study)
    folder = study.folder / "model-or-sae"
    same_plan(folder, plan)

    case = load_case(name, case_config(*name.split()), LARGEST * plan["tokens"], plan["eval_tokens"])
    return compare(case, folder / case.folder, plan)


def measure(study, cases):
    """{"plan", "cases": {piece's name: what `compare` finds}, "conclusions": [sentence]}"""
    return finished(plan_for(study), cases)


def plan_of(tokens, eval_tokens, seeds, objective="balanced", lora_rates=LORA_RATES, sae_rates=SAE_RATES):
    """tokens: of every arm, at equal tokens; seeds: how many."""
    return {
        "tokens": tokens,
        "objective": objective,
        "lora_rates": list(lora_rates),
        "sae_rates": list(sae_rates),
        "eval_tokens": eval_tokens,
        "text": arms.TEXT,
        "l0": arms.L0,
        "seeds": list(range(seeds)),
    }


def finished(plan, cases):
    numbers = {"plan": plan, "cases": cases}
    numbers["conclusions"] = conclusions(numbers)
    return numbers


def tables(numbers):
    made = []
    for name, case in numbers["cases"].items():
        for budget, label in BUDGETS.items():
            made.append(Table(f"{name}, {label}", list(HEADINGS), table(case, budget)))
    return made


def claims(numbers):
    """None of the paper: Karvonen's, that a short finetune of the SAE does about what adapters do, and nobody's yet.

    In his figures (15M tokens) the SAE is behind adapters on all blocks, as around TopK SAEs here, and ahead of adapters on
    the blocks after it, as around JumpReLU SAEs.
    """
    around_topk = {name: case for name, case in numbers["cases"].items() if name.endswith("topk")}
    around_jumprelu = {name: case for name, case in numbers["cases"].items() if name.endswith("jumprelu")}
    all_blocks, after = against(around_topk, "sae"), against(around_jumprelu, "sae")
    both = against(numbers["cases"], "both")
    return [
        claim("Karvonen 2025: a finetuned SAE is behind adapters on all blocks", "-0.0224 against -0.0243 nats",
              all_blocks, opposite(sign(all_blocks))),
        claim("... and ahead of adapters on the blocks after it", "-0.0224 against -0.0191 nats", after, sign(after)),
        claim("Both together close more than adapters alone", "not measured", both, sign(both)),
    ]


def claim(says, other, ours, direction):
    """A Claim of others, or of nobody yet; ours: parts of the KL gap that are closed more than by adapters alone."""
    shown = f"{with_interval(ours, '+.1%')} of the KL gap, over models and seeds"
    return Claim(says, other, shown, direction=direction, why=unless_said(direction), of_paper=False)


def against(cases, arm):
    """What an arm closes more than adapters do at equal tokens, in parts of the KL gap, a value a case and seed."""
    more = []
    for case in cases.values():
        more += (gaps(case, "tokens", arm) - gaps(case, "tokens", "adapters")).tolist()
    return more


# ---- The command ---------------------------------------------------------------------------------

def arguments(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    arms.add_cases(parser)
    add("--tokens", type=count, help="training tokens of every arm, at equal tokens (default: 100k; quick: 4k)")
    add("--seeds", type=int, help="number of seeds (default: 3; quick: 1)")
    add("--eval-tokens", type=count, help="held-out tokens (default: 20k; quick: 2k)")
    add("--objective", choices=("kl", "mse", "balanced"), default="balanced",
        help="of the SAE's finetune (default: %(default)s)")
    add("--lora-rates", type=float, nargs="+", default=list(LORA_RATES), help="to choose from (default: %(default)s)")
    add("--sae-rates", type=float, nargs="+", default=list(SAE_RATES), help="to choose from (default: %(default)s)")
    add("--quick", action="store_true", help="the smallest that runs")
    add("--out", type=Path, help="folder (default: runs/model-or-sae, or runs/model-or-sae-quick)")
    args = parser.parse_args(argv)
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: pass at least 1")
    arms.check_rates(parser, lora_rates=args.lora_rates, sae_rates=args.sae_rates)
    return args


def main(argv=None):
    args = arguments(argv)
    folder = args.out or Path("runs") / ("model-or-sae-quick" if args.quick else "model-or-sae")
    tokens, eval_tokens, seeds = (4_000, 2_000, 1) if args.quick else (100_000, 20_000, 3)
    plan = plan_of(args.tokens or tokens, args.eval_tokens or eval_tokens, args.seeds or seeds, args.objective,
                   args.lora_rates, args.sae_rates)
    with one_line_errors("interrupted: the same command continues"):
        wanted = arms.wanted(args, lr=tuple(args.lora_rates))
        same_plan(folder, {**plan, "layer": args.layer, "device": args.device})
        cases = {}
        for name, config in wanted.items():
            case = load_case(name, config, LARGEST * plan["tokens"], plan["eval_tokens"])
            cases[name] = compare(case, folder / case.folder, plan)
        numbers = finished(plan, cases)
        write_json(folder / "model_or_sae.json", numbers)
        show(tables(numbers))
        for sentence in numbers["conclusions"]:
            print(sentence)
        save_figure(draw, numbers, folder / "model_or_sae.png", f"python -m lorasae.paper.model_or_sae --out {folder}")


if __name__ == "__main__":
    main()
