"""Does adapting harm the language model? (§5.3, Table 5): benchmarks with the SAE and without, adapted and not."""
import math
from argparse import Namespace

from lorasae.evals import benchmarks
from lorasae.evals.common import error_bar
from lorasae.paper.findings import Claim, Table, written
from lorasae.paper.study import around_jumprelu, opened

TITLE = "Language-model benchmarks"
FIGURES = ("table5",)
ABOUT = ("Scored by the lm-eval package, in its units, ± one standard error. In miniature the four tasks are made from "
         "held-out files of the standard library, in the forms of MMLU, HellaSwag and TruthfulQA (evals/local_tasks.py), "
         "since a model of this size is at chance in the real ones. Adapters on the blocks after a JumpReLU SAE; generated "
         "tokens pass the SAE too, as they do not in the published code.")

PAPER = {                         # Table 5, Gemma-2-2B: SAE, SAE + LoRA, original, LoRA, in percent
    "MMLU": (44.2, 45.8, 49.3, 50.0),
    "HellaSwag": (50.9, 52.1, 55.0, 56.0),
    "BLEU": (29.9, 30.6, 30.4, 32.4),
    "ROUGE-1": (28.2, 28.5, 26.9, 30.2),
    "ROUGE-2": (24.8, 26.6, 25.6, 29.1),
    "MC1": (23.1, 23.4, 24.1, 24.3),
}


def trainings(study):
    return [around_jumprelu(study, study.seeds[0])]


def cost(study):
    """{kind of work: tokens}: every choice of every question, in four settings."""
    return {"forward": 800_000 if study.miniature else 40_000_000}


def measure(study):
    """What evals/benchmarks.py finds."""
    training, = trainings(study)
    options = Namespace(tasks=None, limit=None)
    return benchmarks.evaluate(opened(study, training), options)


# ---- What it comes to ----------------------------------------------------------------------------

def found_rows(numbers):
    """{label of Table 5: {setting: (value, standard error or None)}}, of the real tasks or of the local ones."""
    rows = {}
    for (task, metric), label in benchmarks.TABLE_5.items():
        for name in (task, f"local_{task}"):
            if metric in numbers["base"].get(name, {}):
                rows[label] = {setting: tuple(numbers[setting][name][metric]) for setting in benchmarks.SETTINGS}
    return rows


def tables(numbers):
    rows = []
    for label, found in found_rows(numbers).items():
        ours = [written(value, error, ".3f") for value, error in found.values()]
        paper = " / ".join(f"{value:.1f}" for value in PAPER[label])
        rows.append([label, *ours, paper])

    settings = [label for label, _, _ in benchmarks.SETTINGS.values()]
    headings = ["", *settings, "paper, Gemma-2-2B (%), in this order"]
    return [Table("Table 5 (± one standard error)", headings, rows)]


def claims(numbers):
    rows = found_rows(numbers).values()

    with_sae = [compared(row, "adapted", "sae") for row in rows]
    helps = with_sae.count("better") > with_sae.count("worse")
    differs = bool({"better", "worse"} & set(with_sae))

    without = [compared(row, "lora", "base") for row in rows]
    return [
        Claim("With the SAE, adapting helps in every benchmark",
              "6 of 6 on Gemma-2-2B",
              counted(with_sae),
              direction=helps if differs else None,
              size=with_sae.count("better") == len(with_sae),
              why="\"the same\" is within a standard error of the difference"),
        Claim("Without the SAE, the adapted model is not worse than the original",
              "better in 6 of 6 on Gemma-2-2B",
              counted(without),
              direction=None if "cannot be said" in without else "worse" not in without),
    ]


def compared(row, first, second):
    """better, worse, the same within the standard error of the difference, or cannot be said."""
    (a, a_error), (b, b_error) = row[first], row[second]
    if a_error is None or b_error is None:
        return "cannot be said"
    if abs(a - b) <= math.hypot(a_error, b_error):
        return "the same"
    return "better" if a > b else "worse"


def counted(verdicts):
    counts = [f"{verdicts.count(word)} {word}" for word in ("better", "the same", "worse")]
    unknown = verdicts.count("cannot be said")
    return ", ".join(counts + [f"{unknown} without a standard error"] * (unknown > 0))


def draw(numbers, figure):
    """The four settings, a group of bars a benchmark."""
    found = found_rows(numbers)
    figure.set_size_inches(8, 3.6)
    axes = figure.subplots()
    for i, (setting, (label, _, _)) in enumerate(benchmarks.SETTINGS.items()):
        values = [row[setting][0] for row in found.values()]
        errors = [error_bar(row[setting][1]) for row in found.values()]
        places = [place + 0.2 * (i - 1.5) for place in range(len(found))]
        axes.bar(places, values, 0.2, yerr=errors, capsize=2, label=label)

    axes.set_xticks(range(len(found)), found)
    axes.set_ylabel("score (± one standard error)")
    axes.legend(fontsize=8)
