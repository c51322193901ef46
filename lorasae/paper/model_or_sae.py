"""Adapt the model, the SAE, or both? Four arms on the embedded models, at equal tokens and at equal time (beyond the paper).

    python -m lorasae.paper.model_or_sae                two families, two kinds of SAE, three seeds
    python -m lorasae.paper.model_or_sae --quick        seconds: that it runs, not what it finds

    adapters    the paper: the SAE as it came, adapters trained on Eq. 7
    sae         the rival: no adapters, the SAE finetuned (Karvonen 2025, arXiv 2503.17272)
    both        adapters and SAE together, on Eq. 7
    then        half the tokens for the adapters, then half for the SAE around the adapted model

Each arm has its own best rates, chosen by KL on text that no arm trains or is measured on. The L0 of a JumpReLU is held
(finetune.py), that of a TopK is held by construction. At equal time every arm takes the seconds that the adapters took,
by the speeds measured at equal tokens (of each arm the quickest seed's, which other work on the machine disturbs least).
Intervals are 90 %, over seeds.

OUT/ gets a file for each arm, model_or_sae.json and, with matplotlib, model_or_sae.png. Interrupted, the same command
continues.
"""
from pathlib import Path

import torch

from lorasae.evals.common import interval, percent, plus_minus, print_table
from lorasae.evals.figures import save_figure
from lorasae.io.console import Parser, answering, count
from lorasae.io.disk import write_json
from lorasae.paper.arms import (KINDS, MODELS, adapted, asked, finetuned, load_case, measured, once, same_plan, untouched)
from lorasae.runs import adaptation
from lorasae.runs.config import OBJECTIVES

ARMS = {"adapters": "adapters", "sae": "SAE", "both": "both", "then": "adapters, then SAE"}
BUDGETS = {"tokens": "equal tokens", "time": "equal time"}
LORA_RATES = (1e-3, 3e-3, 9e-3)
SAE_RATES = (3e-4, 1e-3, 3e-3)
LARGEST = 3                                             # times the tokens, for the fastest arm at equal time


# ---- The arms ----------------------------------------------------------------------------------------------------------

def train_arm(case, arm, rates, tokens, seed, objective):
    """Trains an arm at its rates, {"lr", "sae_lr"} -> Trained."""
    lr, sae_lr = rates.get("lr"), rates.get("sae_lr")
    if arm == "adapters":
        trained, = adapted(case, asked(case, tokens, seed, lr=lr))
        return trained
    if arm == "sae":
        return finetuned(case, asked(case, tokens, seed, objective=objective), sae_lr)
    if arm == "both":
        config = asked(case, tokens, seed, lr=lr, objective="kl")
        return finetuned(case, config, sae_lr, new_student(case, config), train_adapters=True)

    before, = adapted(case, asked(case, tokens // 2, seed, lr=lr))
    after = finetuned(case, asked(case, tokens // 2, seed + 1000, objective=objective), sae_lr, before.student)
    return after._replace(seconds=before.seconds + after.seconds)


def new_student(case, config):
    """Fresh adapters, off the model."""
    student, = adaptation.new_students(case.model, case.blocks, config)
    adaptation.detach_lora(case.model)
    return student


def best_rates(case, folder, tokens, objective):
    """{arm: its best rates}, by KL on the tuning text after `tokens` of training; every trial is kept in a file."""
    def tried(arm, candidates, trainings):
        trials = once(folder / f"rates-{arm}.json", lambda: [
            {**rates, "kl": measured(case, trained, case.tuning, whole=False)["kl"]}
            for rates, trained in zip(candidates, trainings())])
        best = min(trials, key=lambda trial: trial["kl"])
        rates = {name: value for name, value in best.items() if name != "kl"}
        shown = ", ".join(f"{name} {value:g}" for name, value in rates.items())
        print(f"{case.name}, {ARMS[arm]}: best of {len(trials)} at {shown}", flush=True)
        return rates

    def one_by_one(arm, candidates):
        return lambda: [train_arm(case, arm, rates, tokens, 0, objective) for rates in candidates]

    alone = [{"lr": lr} for lr in LORA_RATES]
    lr = tried("adapters", alone, lambda: adapted(case, asked(case, tokens, 0, lr=LORA_RATES)))["lr"]      # in one pass
    alone = [{"sae_lr": rate} for rate in SAE_RATES]
    sae_lr = tried("sae", alone, one_by_one("sae", alone))["sae_lr"]

    pairs = [{"lr": one, "sae_lr": other} for one in (lr, lr / 3) for other in (sae_lr, sae_lr / 3)]
    both = tried("both", pairs, one_by_one("both", pairs))
    pairs = [{"lr": lr, "sae_lr": other} for other in (sae_lr, sae_lr / 3)]
    then = tried("then", pairs, one_by_one("then", pairs))
    return {"adapters": {"lr": lr}, "sae": {"sae_lr": sae_lr}, "both": both, "then": then}


def compare(case, folder, plan):
    """All arms of a case -> {"before", "rates", "arms": {budget: {arm: [a seed's numbers]}}}."""
    tokens, objective = plan["tokens"], plan["objective"]
    before = once(folder / "before.json", lambda: measured(case, untouched(case), case.held_out))
    rates = best_rates(case, folder, tokens // 2, objective)

    def result(arm, budget, seed, tokens):
        def work():
            trained = train_arm(case, arm, rates[arm], tokens, seed, objective)
            print(f"{case.name}, {ARMS[arm]}, {BUDGETS[budget]}, seed {seed}: {trained.seconds:.0f} s", flush=True)
            return {"tokens": tokens, "seconds": trained.seconds, **measured(case, trained, case.held_out)}
        return once(folder / f"{arm}-{budget}-{seed}.json", work)

    found = {budget: {} for budget in BUDGETS}
    for arm in ARMS:
        found["tokens"][arm] = [result(arm, "tokens", seed, tokens) for seed in plan["seeds"]]

    seconds = {arm: min(numbers["seconds"] for numbers in results) for arm, results in found["tokens"].items()}
    found["time"]["adapters"] = found["tokens"]["adapters"]
    for arm in list(ARMS)[1:]:
        affordable = once(folder / f"{arm}-affordable.json", lambda: round(tokens * min(LARGEST, seconds["adapters"] / seconds[arm])))
        found["time"][arm] = [result(arm, "time", seed, affordable) for seed in plan["seeds"]]
    return {"before": before, "rates": rates, "arms": found}


# ---- What comes out ----------------------------------------------------------------------------------------------------

def gaps(case, budget, arm):
    """The parts of the KL gap that an arm closes, one a seed [n]."""
    kl = torch.tensor([numbers["kl"] for numbers in case["arms"][budget][arm]], dtype=torch.float64)
    return 1 - kl / case["before"]["kl"]


def mean(case, budget, arm, name):
    values = [numbers[name] for numbers in case["arms"][budget][arm]]
    return sum(values) / len(values)


def table(case, budget):
    """Rows and headings for print_table."""
    before = case["before"]
    rows = [["as it came", before["ce"], before["kl"], "", "", 0.0, f"{before['l0']:.2f}", before["fvu"],
             percent(before["dead_latents"]), "", ""]]
    for arm, label in ARMS.items():
        closed, half = interval(gaps(case, budget, arm))
        ce, kl, without, l0, fvu, dead, tokens, seconds = (
            mean(case, budget, arm, name)
            for name in ("ce", "kl", "kl_without_sae", "l0", "fvu", "dead_latents", "tokens", "seconds"))
        rows.append([label, ce, kl, percent(closed), plus_minus(half, ".1%"), without, f"{l0:.2f}", fvu, percent(dead),
                     f"{tokens:,.0f}", f"{seconds:.0f}"])
    return rows, ["", "CE", "KL", "KL gap closed", "90 % CI", "KL without SAE", "L0", "FVU", "dead", "tokens", "seconds"]


def conclusions(numbers):
    """Sentences that follow from the figures, and from nothing else."""
    cases, seeds = numbers["cases"], len(numbers["plan"]["seeds"])
    sentences = []
    for budget, label in BUDGETS.items():
        average = {arm: sum(gaps(case, budget, arm).mean().item() for case in cases.values()) / len(cases) for arm in ARMS}
        best = max(average, key=average.get)
        second = max((arm for arm in ARMS if arm != best), key=average.get)
        first_of = sum(ahead(case, budget, best, second) for case in cases.values())
        shown = ", ".join(f"{ARMS[arm]} {value:.1%}" for arm, value in sorted(average.items(), key=lambda item: -item[1]))
        beyond = "by more than the interval over seeds" if seeds > 1 else "with one seed, so without an interval,"
        sentences.append(f"At {label} the KL gap closed is, in the mean of the {len(cases)} cases: {shown}; {ARMS[best]} is ahead of "
                         f"{ARMS[second]} {beyond} in {first_of} of {len(cases)}.")

    moved = {arm: max(abs(mean(case, "tokens", arm, "l0") / case["before"]["l0"] - 1) for case in cases.values()) for arm in ARMS}
    without = {arm: max(mean(case, "tokens", arm, "kl_without_sae") for case in cases.values()) for arm in ARMS}
    fvu = {arm: [mean(case, "tokens", arm, "fvu") - case["before"]["fvu"] for case in cases.values()] for arm in ARMS}
    price = "; ".join(f"{label}: {without[arm]:.3f} nats, {min(fvu[arm]):+.3f} to {max(fvu[arm]):+.3f}, {moved[arm]:.1%}"
                      for arm, label in ARMS.items())
    sentences.append(f"The price, as KL without the SAE (at most), change of the FVU, and change of L0 (at most): {price}.")
    return sentences


def ahead(case, budget, first, second):
    """Whether an arm closes more of the gap than another by more than the interval of their difference over seeds."""
    difference, half = interval(gaps(case, budget, first) - gaps(case, budget, second))
    return difference > (half or 0)


def show(numbers):
    for name, case in numbers["cases"].items():
        for budget, label in BUDGETS.items():
            print(f"\n{name}, {label}")
            print_table(*table(case, budget))
    print()
    for sentence in numbers["conclusions"]:
        print(sentence)


def draw(numbers, figure):
    """The KL gap closed by every arm, a panel a case."""
    cases = numbers["cases"]
    figure.set_size_inches(3.4 * len(cases), 3.4)
    panels = figure.subplots(1, len(cases), squeeze=False, sharey=True)[0]
    for axes, (name, case) in zip(panels, cases.items()):
        for place, (budget, label) in enumerate(BUDGETS.items()):
            closed = [interval(gaps(case, budget, arm)) for arm in ARMS]
            positions = [i + 0.38 * place for i in range(len(ARMS))]
            heights = [100 * value for value, _ in closed]
            halves = [100 * (half or 0) for _, half in closed]
            axes.bar(positions, heights, 0.36, yerr=halves, capsize=3, label=label)
        axes.set_xticks([i + 0.19 for i in range(len(ARMS))], ["adapters", "SAE", "both", "adapters,\nthen SAE"], fontsize=8)
        axes.set_title(name, fontsize=10)
    panels[0].set_ylabel("KL gap closed (%)")
    panels[0].legend(fontsize=8)


# ---- The command -------------------------------------------------------------------------------------------------------

def arguments(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: both)")
    add("--tokens", type=count, help="training tokens of every arm, at equal tokens (default: 100k; quick: 4k)")
    add("--seeds", type=int, help="number of seeds (default: 3; quick: 1)")
    add("--eval-tokens", type=count, help="held-out tokens (default: 20k; quick: 2k)")
    add("--objective", choices=OBJECTIVES, default="balanced", help="of the SAE's finetune (default: %(default)s)")
    add("--quick", action="store_true", help="the smallest that runs")
    add("--out", type=Path, help="folder (default: runs/model-or-sae, or runs/model-or-sae-quick)")
    args = parser.parse_args(argv)
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: pass at least 1")
    return args


def main(argv=None):
    args = arguments(argv)
    folder = args.out or Path("runs") / ("model-or-sae-quick" if args.quick else "model-or-sae")
    plan = {"tokens": args.tokens or (4_000 if args.quick else 100_000), "objective": args.objective,
            "eval_tokens": args.eval_tokens or (2_000 if args.quick else 20_000),
            "seeds": list(range(args.seeds or (1 if args.quick else 3)))}
    with answering("interrupted: the same command continues"):
        same_plan(folder, plan)
        cases = {}
        for model in args.models:
            for kind in KINDS:
                case = load_case(model, kind, LARGEST * plan["tokens"], plan["eval_tokens"])
                cases[case.name] = compare(case, folder / f"{model}-{kind}", plan)
        numbers = {"plan": plan, "cases": cases}
        numbers["conclusions"] = conclusions(numbers)
        write_json(folder / "model_or_sae.json", numbers)
        show(numbers)
        save_figure(draw, numbers, folder / "model_or_sae.png", f"python -m lorasae.paper.model_or_sae --out {folder}")


if __name__ == "__main__":
    main()
