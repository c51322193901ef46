"""What the SAEBench suites share: base against adapted model, seed by seed, and the table.

Karvonen et al. 2024; §5.1, Tables 3 and 6. Differences are paired: same texts, draws and batches.
"""
from itertools import product

import torch

from lorasae.errors import InputError
from lorasae.evals import labelled_saebench, labelled_stdlib
from lorasae.evals.common import as_model, interval, progress
from lorasae.evals.report import Table, with_interval
from lorasae.evals.texts import read_means, tokenise
from lorasae.io.console import few
from lorasae.lora import blocks_with_adapters

FIRST_SEED = 42                                         # SAEBench's only one
MODELS = ("base", "lora")
LABELLED = {"stdlib": labelled_stdlib, "saebench": labelled_saebench}


def table_6(suite):
    """From Table 6: {metric: label}, {metric: (LoRA, base)}, SAEBench's tolerance for reruns."""
    part = labelled_saebench.FACTS["table 6"][suite]
    labels = {metric: label for metric, label, *_ in part["rows"]}
    paper = {metric: scores for metric, _, *scores in part["rows"] if scores}
    return labels, paper, part["tolerance"]


def add_options(add):
    add("--labelled", default="stdlib", choices=LABELLED,
        help="texts for probing, scr and tpp: packages of the standard library, or SAEBench's "
        "own (default: %(default)s)")
    add("--seeds", type=few, default=3, metavar="N",
        help="number of seeds for probing, scr, tpp, absorption and autointerp; the paper "
             "measured once (default: %(default)s)")


# ---- Measuring ---------------------------------------------------------------------------------

def reading(setting, suite, seeds):
    """(layer, SAE, seeds) for a suite; InputError if all adapters come after the SAE."""
    layer, sae = next(iter(setting.saes.items()))
    if all(block > layer for block in blocks_with_adapters(setting.model)):
        raise InputError(f"--suite {suite} would give the base and the adapted model exactly the "
                         f"same score: it only reads the SAE at layer {layer}, and all adapters of "
                         "this run come after it. Train a run with --adapt all")
    return layer, sae, range(FIRST_SEED, FIRST_SEED + seeds)


def compare(setting, suite, labelled, seeds, measure, report=dict, further=lambda metrics: {}):
    """Base against adapted model, seed by seed -> the summary of the means over data sets.

    measure(SAE, Means of training texts, Means of test texts, Cut, seed) -> {metric: value}
    report({"base" and "lora": what `measure` found}) -> the same as `summary` takes them
    further({metric: values [seeds]}) -> more metrics, computed from the means
    """
    layer, sae, chosen = reading(setting, suite, seeds)
    sets, model = LABELLED[labelled].suite_sets(suite), setting.model
    found = {name: [] for name in sets}
    for name, seed in progress(list(product(sets, chosen)), suite):
        cut, scores = sets[name](seed), {}
        rows = [tokenise(setting.text, side) for side in cut]
        for who in MODELS:
            with as_model(model, who):
                train, test = [read_means(model, sae, layer, side) for side in rows]
            scores[who] = measure(sae, train, test, cut, seed)
        found[name].append(report(scores))

    # Means over data sets, as in SAEBench.
    values = {}
    first, *_ = found.values()
    for who in first[0]:
        of_sets = [columns([scores[who] for scores in own]) for own in found.values()]
        means = {metric: sum(each[metric] for each in of_sets) / len(sets) for metric in of_sets[0]}
        values[who] = {**means, **further(means)}
    return summary(layer, values, seeds, labelled=labelled, sets=list(sets), by_set=found)


def columns(scores):
    """[{metric: value} of each seed] -> {metric: values [seeds], fp64}."""
    return {metric: torch.tensor([score[metric] for score in scores], dtype=torch.float64)
            for metric in scores[0]}


def summary(layer, values, seeds, over=None, **more):
    """What a suite returns: {"layer", "seeds", "over", "rows": {metric: its row}} and more.

    values: {model: {metric: values [n]}}. over: what these n are, if not seeds of evaluation. The
    difference is "lora" - "base" or, if values has a "paired", "paired" - "base".
    """
    adapted = values.get("paired", values["lora"])
    rows = {}
    for metric, base in values["base"].items():
        row = rows[metric] = {who: values[who][metric].mean().item() for who in MODELS}
        row["difference"], row["ci90"] = interval(adapted[metric] - base)
    over = over or f"seeds of evaluation ({seeds})"
    return {"layer": layer, "seeds": seeds, "over": over, "rows": rows, **more}


# ---- Showing -----------------------------------------------------------------------------------

def table(numbers, suite, caption, notes=()):
    """A suite's rows as in Table 6."""
    labels, paper, tolerance = table_6(suite)
    rows = []
    for metric, label in labels.items():
        row = numbers["rows"][metric]
        difference = with_interval(row["difference"], row["ci90"], "+.3f")
        papers = [""] * 3
        if metric in paper:
            lora, base = paper[metric]
            papers = [f"{base:.3f}", f"{lora:.3f}", f"{lora - base:+.3f}"]
        rows.append([label, f"{row['base']:.3f}", f"{row['lora']:.3f}", difference, *papers])
    notes = (
        f"SAE at layer {numbers['layer']}; {', '.join(numbers['sets'])}.",
        f"Intervals are 90 %, over {numbers['over']}; the adapters were trained once.",
        *notes,
        f"The paper measured once; SAEBench tolerates a difference of {tolerance} between reruns.",
    )
    headings = ["", "base", "LoRA", "difference", "paper: base", "LoRA", "difference"]
    return Table(caption, headings, rows, notes)
