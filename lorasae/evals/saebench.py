"""What the suites of SAEBench share: base against adapted model, seed by seed, as a table.

Karvonen et al. 2024; paper §5.1, Tables 3 and 6. Base and adapted model see the same texts, draws
and batches in each seed, so differences are paired. Intervals are 90 %, over seeds of evaluation.
"""
from itertools import product

import torch

from lorasae.errors import InputError
from lorasae.evals import firing, labelled_saebench, labelled_stdlib
from lorasae.evals.common import as_model, evaluating, interval, progress
from lorasae.evals.report import Table, lines, with_interval
from lorasae.evals.texts import read_means, tokenise

FIRST_SEED = 42                                         # SAEBench's only one
MODELS = {"base": "base", "lora": "LoRA"}               # and their names in tables and pictures
HEADINGS = ["", "base", "LoRA", "difference", "paper: base", "LoRA", "difference"]


def add_options(add):
    add("--labelled", default="stdlib", metavar="WHAT",
        help="texts of probing, scr, tpp: stdlib (packages of the standard library), saebench, or "
             "some of SAEBench's sets by name, comma-separated (default: %(default)s)")
    add("--seeds", type=int, default=3, metavar="N",
        help="how often probing, scr, tpp and absorption are measured; the paper measured once "
             "(default: %(default)s)")


def labelled_sets(labelled, suite):
    """{name: cut} of the data sets that --labelled names; cut(seed) -> Cut.

    suite: "probing", "tpp" or "scr".
    """
    if labelled == "stdlib":
        return labelled_stdlib.suite_sets(suite)
    sets = labelled_saebench.suite_sets(suite)
    names = list(sets) if labelled == "saebench" else labelled.split(",")
    for name in names:
        if name not in sets:
            raise InputError(f"--labelled {name}: expected stdlib, saebench or, for --suite "
                             f"{suite}, some of {','.join(sets)}")
    return {name: sets[name] for name in names}


# ---- Measuring ---------------------------------------------------------------------------------

def reading(setting, suite, seeds):
    """(layer, SAE) that a suite reads, and its seeds.

    InputError if all adapters lie after the SAE: adapting then changes nothing that it reads.
    """
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: expected 1 or more")
    firing.refuse_nothing_new(setting, suite)
    layer, sae = next(iter(setting.saes.items()))
    return layer, sae, range(FIRST_SEED, FIRST_SEED + seeds)


def compare(setting, suite, labelled, seeds, measure):
    """{data set: {"base" and "lora": [what `measure` found for each seed]}}.

    measure(SAE, Means of the training texts, of the test texts, their Cut, seed) -> {metric: value}
    """
    layer, sae, seeds = reading(setting, suite, seeds)
    sets = labelled_sets(labelled, suite)
    model = setting.model
    found = {name: {who: [] for who in MODELS} for name in sets}

    with evaluating(model):
        for name, seed in progress(list(product(sets, seeds)), suite):
            cut = sets[name](seed)
            rows = [tokenise(setting.text, side) for side in cut]
            for who in MODELS:
                with as_model(model, who):
                    train, test = [read_means(model, sae, layer, side) for side in rows]
                found[name][who].append(measure(sae, train, test, cut, seed))
    return found


def columns(scores):
    """[{metric: value} of each seed] -> {metric: values [seeds], fp64}."""
    return {metric: torch.tensor([score[metric] for score in scores], dtype=torch.float64)
            for metric in scores[0]}


def over_sets(found):
    """{model: {metric: values [seeds]}}: the mean over data sets, as SAEBench takes it."""
    sets = list(found.values())
    out = {}
    for who in sets[0]:
        of_sets = [columns(models[who]) for models in sets]
        out[who] = {metric: sum(each[metric] for each in of_sets) / len(sets)
                    for metric in of_sets[0]}
    return out


def paired_rows(values):
    """{model: {metric: values [seeds]}} -> {metric: means, difference, intervals}.

    The difference is "lora" less "base" or, if there is a "paired" beside them, that less "base".
    """
    adapted = values.get("paired", values["lora"])
    out = {}
    for metric, base in values["base"].items():
        row = {}
        for who in MODELS:
            row[who], row[f"{who}_ci90"] = interval(values[who][metric])
        row["difference"], row["ci90"] = interval(adapted[metric] - base)
        out[metric] = row
    return out


def summary(setting, labelled, seeds, found, values):
    """What an evaluation on labelled texts returns."""
    return {
        "layer": next(iter(setting.saes)),
        "seeds": seeds,
        "labelled": labelled,
        "sets": list(found),
        "by_set": found,
        "rows": paired_rows(values),
    }


# ---- Showing -----------------------------------------------------------------------------------

def table(numbers, caption, labels, paper, tolerance, notes=()):
    """The rows as in Table 6.

    labels: {metric: its name}. paper: {metric: (LoRA, base)}. tolerance: how far SAEBench lets its
    own reruns differ.
    """
    rows, beyond = [], []
    for metric, label in labels.items():
        row = numbers["rows"][metric]
        difference = with_interval(row["difference"], row["ci90"], "+.3f")
        cells = [label, f"{row['base']:.3f}", f"{row['lora']:.3f}", difference, "", "", ""]
        if metric in paper:
            lora, base = paper[metric]
            cells[4:] = [f"{base:.3f}", f"{lora:.3f}", f"{lora - base:+.3f}"]
            if round(abs(lora - base), 3) > tolerance:
                beyond.append(label)
        rows.append(cells)

    intervals = "One seed of evaluation has no interval"
    if numbers["seeds"] > 1:
        intervals = f"Intervals are 90 %, over {numbers['seeds']} seeds of evaluation"
    except_for = f", except for {', '.join(beyond)} (Table 6)" if beyond else ""
    notes = (
        f"SAE at layer {numbers['layer']}; {', '.join(numbers['sets'])}.",
        f"{intervals}; the adapters were trained once.",
        *notes,
        "The paper measured once, on another model, other texts and a wider SAE.",
        f"Its differences are within the {tolerance} by which SAEBench lets its own reruns differ"
        f"{except_for}.",
    )
    return Table(caption, HEADINGS, rows, notes)


def curves(numbers, figure, counts, features, **words):
    """Draws the metrics PREFIX_n of both models against n -> the axes.

    features: {PREFIX: its label}. words: the axes' title and labels.
    """
    series = {}
    for prefix, label in features.items():
        rows = [numbers["rows"][f"{prefix}_{n}"] for n in counts]
        for who, name in MODELS.items():
            series[f"{label}{name}"] = [(row[who], row[f"{who}_ci90"]) for row in rows]

    figure.set_size_inches(7, 3.8)
    axes = figure.subplots()
    lines(axes, counts, series)
    axes.set(xscale="log", **words)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.legend()
    return axes
