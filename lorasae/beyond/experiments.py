"""Two experiments beyond the paper, as runs of train.py on the embedded models.

    python -m lorasae.beyond.experiments model-or-sae       adapt the model, finetune its SAE, or
                                                            both, on equal tokens
    python -m lorasae.beyond.experiments recipe             the published recipe against the tuned
                                                            one, which gets a twelfth of the tokens
    ... --quick                                             on few tokens: only a check that it runs

A case is a model with one SAE. Every arm of a case is trained once per seed, and all runs of a case
are measured on the same held-out text, so that differences between arms are paired by seed. Their
intervals are 90 %, over seeds, separate for each case. No rates are chosen here: they come from the
recipes and presets. (Finetuning the SAE is Karvonen's idea, arXiv 2503.17272.)
"""
import sys

import torch

from lorasae.errors import InputError
from lorasae.evals.common import over
from lorasae.evals.report import Table, bars, print_tables, save_figure, with_interval
from lorasae.io.console import Parser, count, few, one_line_errors
from lorasae.io.files import local, read_object, write_json
from lorasae.io.presets import TINY
from lorasae.runs.commands import Command, run_all
from lorasae.runs.folder import RUNS, begin_with

MODELS = ("tiny-gemma-2", "tiny-llama-3")
KINDS = ("jumprelu", "topk")
FIRST_SEED = 100                        # no setting was ever chosen with this or later seeds
FACTS = {"train_tokens": int, "seconds": float, "kl_gap_closed": float}         # from results.json
FEWER = 12                              # the tuned recipe gets 1 / FEWER of the tokens


# An experiment: tokens -> {arm: words for train.py}; the others are compared with the first arm.

def model_or_sae(tokens):
    return {
        "adapters": ("--tokens", tokens),
        "SAE": ("--tokens", tokens, "--method", "finetune"),
        "both": ("--tokens", tokens, "--train-sae"),
    }


def recipe(tokens):
    return {
        "published": ("--tokens", tokens, "--recipe", "paper"),
        "tuned": ("--tokens", tokens // FEWER, "--recipe", "tuned"),
        "tuned, AdamW": ("--tokens", tokens // FEWER, "--recipe", "tuned", "--optimizer", "adamw"),
    }


EXPERIMENTS = {                         # the arms; tokens by default and with --quick
    "model-or-sae": (model_or_sae, 100_000, 4_000),
    "recipe": (recipe, 900_000, 12_000),
}


# ---- The runs ----------------------------------------------------------------------------------

def cases():
    """{name: words for train.py} for every model and SAE."""
    found = {}
    for model in MODELS:
        for kind in KINDS:
            sae = TINY / f"{model.removeprefix('tiny-')}-sae" / kind
            found[f"{model}-{kind}"] = ("--model", model, "--sae", sae)
    return found


def commands(arms, folder, seeds, eval_tokens):
    """{(case, arm, seed): Command}"""
    made = {}
    for case, of_case in cases().items():
        for arm, of_arm in arms.items():
            for seed in seeds:
                run = folder / case / f"{arm.replace(', ', '-')}-seed-{seed}"
                words = (*of_case, *of_arm, "--seed", seed, "--eval-tokens", eval_tokens,
                         "--out", run)
                made[case, arm, seed] = Command("train.py", tuple(map(str, words)), run)
    return made


# ---- Results -----------------------------------------------------------------------------------

def measure(made):
    """{case: {arm: {tokens, seconds, l0: means; kl_gap_closed, more: Estimates}}}

    more: the part of the KL gap that an arm closes beyond the first arm, paired by seed.
    """
    found = {}
    for (case, arm, _), command in made.items():
        results = read_object(command.done)
        facts = {name: results.take(name, kind) for name, kind in FACTS.items()}
        found.setdefault(case, {}).setdefault(arm, []).append({**facts, "l0": mean_l0(results)})

    numbers = {}
    for case, arms in found.items():
        first = next(iter(arms.values()))
        numbers[case] = {}
        for arm, runs in arms.items():
            closed = [run["kl_gap_closed"] for run in runs]
            more = [own - other["kl_gap_closed"] for own, other in zip(closed, first)]
            numbers[case][arm] = {
                "tokens": runs[0]["train_tokens"],
                "seconds": sum(run["seconds"] for run in runs) / len(runs),
                "l0": sum(run["l0"] for run in runs) / len(runs),
                "kl_gap_closed": over(closed, "seeds"),
                "more": over(more, "seeds"),
            }
    return numbers


def mean_l0(results):
    """The L0 of a run with one SAE."""
    adapted = isinstance(results.get("l0"), dict)       # a number if only the SAE trained
    of_layer = results.take("l0" if adapted else "l0_sae", dict)
    return of_layer.take(next(iter(of_layer), "a layer"), float)


def tables(numbers):
    made = []
    for case, arms in numbers.items():
        first = next(iter(arms))
        rows = []
        for arm, row in arms.items():
            closed, half, _ = row["kl_gap_closed"]
            more, more_half, what = row["more"]
            beyond = "" if arm == first else with_interval(more, more_half, "+.1%")
            rows.append([arm, f"{row['tokens']:,}", f"{row['seconds']:,.0f}", f"{row['l0']:.2f}",
                         with_interval(closed, half, ".1%"), beyond])
        headings = ["", "tokens", "seconds", "L0", "KL gap closed", f"more than {first}"]
        made.append(Table(f"{case} (± 90 % over {what})", headings, rows))
    return made


def draw(numbers, figure):
    """The part of the KL gap that each arm closes: a group of bars for each case."""
    figure.set_size_inches(8, 3.6)
    axes = figure.subplots()
    series = {}
    for arms in numbers.values():
        for arm, row in arms.items():
            series.setdefault(arm, []).append(row["kl_gap_closed"])
    bars(axes, list(numbers), series, scale=100)
    axes.set_ylabel("KL gap closed (%), ± 90 % over seeds")
    axes.legend()


# ---- The command -------------------------------------------------------------------------------

def arguments(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS)
    add("--tokens", type=count, help="training tokens of the first arm (default: 100k for "
        "model-or-sae, 900k for recipe)")
    add("--seeds", type=few, default=6, help="runs of each arm (default: %(default)s)")
    add("--eval-tokens", type=count, default=50_000, help="held-out tokens (default: %(default)s)")
    add("--quick", action="store_true", help="few tokens, two seeds")
    add("--jobs", type=few, default=min(4, torch.get_num_threads()),
        help="how many runs share the cores at a time (default: %(default)s)")
    add("--out", type=local,
        help=f"folder (default: {RUNS}/EXPERIMENT, or {RUNS}/EXPERIMENT-quick)")
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(sys.argv[1:] if argv is None else argv)
    arms_of, usual, quick = EXPERIMENTS[args.experiment]
    tokens = args.tokens or (quick if args.quick else usual)
    seeds = range(FIRST_SEED, FIRST_SEED + (2 if args.quick else args.seeds))
    eval_tokens = 4_000 if args.quick else args.eval_tokens
    folder = args.out or RUNS / (args.experiment + "-quick" * args.quick)

    with one_line_errors("interrupted: run the same command to continue"):
        made = commands(arms_of(tokens), folder, seeds, eval_tokens)
        begin_with(folder / "plan.json", {"tokens": tokens, "eval_tokens": eval_tokens})
        failed = run_all(list(made.values()), args.jobs, folder / "logs")
        if failed:
            path, reason = next(iter(failed.items()))
            raise InputError(f"{path.parent} failed: {reason}")
        numbers = measure(made)
        write_json(folder / "numbers.json", numbers)
        print_tables(tables(numbers))
        again = f"python -m lorasae.beyond.experiments {args.experiment} --out {folder}"
        save_figure(draw, numbers, folder / "picture.png", again)


if __name__ == "__main__":
    main()
