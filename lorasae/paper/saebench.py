"""SAEBench (§5.1, Tables 3 and 6): probing, SCR, TPP, absorption and autointerp on base and adapted model."""
from argparse import Namespace
from typing import NamedTuple

from lorasae.evals import absorption, autointerp, probing, scr, tpp
from lorasae.evals.common import error_bar
from lorasae.paper.findings import Claim, Table, written
from lorasae.paper.study import around_topk, opened

TITLE = "SAEBench"
FIGURES = ("table3", "table6")
ABOUT = (
    "The SAE reads base and adapted model (TopK, adapters on all blocks); nothing is spliced in. "
    "One seed of training; intervals are 90 % over seeds of evaluation, for autointerp over "
    "latents, and differences are paired. The judge of autointerp is lexical (eval.py --suite "
    "autointerp --judge asks a language model); in miniature the texts are packages of the "
    "standard library.")

WITHIN = "no difference beyond the interval; the paper's own are within SAEBench's tolerance"

SUITES = {"scr": scr, "tpp": tpp, "probing": probing, "absorption": absorption}


def trainings(study):
    return [around_topk(study, study.seeds[0])]


def pieces(study):
    return [*SUITES, "autointerp"]


def piece(study, name):
    """What the evaluation of that name finds."""
    training, = trainings(study)
    options = Namespace(
        labelled="stdlib" if study.miniature else "saebench",
        seeds=len(study.seeds),
        words=2000 if study.miniature else 8000,
        judge=None,
        judge_latents=300 if study.miniature else 1000,
        judge_seeds=len(study.seeds),
        latents=None,
        chat_model=None,
    )
    suite = autointerp if name == "autointerp" else SUITES[name]
    return suite.evaluate(opened(study, training), options)


def cost(study):
    """{kind of work: tokens} of a piece, about: in miniature mostly probes, whose time is given in
    tokens read meanwhile; for the real data sets mostly their texts.
    """
    return {"forward": 500_000 if study.miniature else 5_000_000}


def measure(study, found):
    """{piece's name: what its evaluation finds}"""
    return found


# ---- What it comes to ----------------------------------------------------------------------------

class Score(NamedTuple):
    """A metric of the adapted model and of the base: ours, and the paper's, of a single seed."""
    label: str
    lora: float
    base: float
    difference: float                                   # lora - base
    half: float | None                                  # of the difference's 90 % interval
    paper_lora: float
    paper_base: float

    @property
    def paper_difference(self):
        return self.paper_lora - self.paper_base


def score(numbers, name, metric):
    """The Score of a suite's metric."""
    suite, row = SUITES[name], numbers[name]["rows"][metric]
    paper_lora, paper_base = suite.PAPER[metric]
    return Score(suite.LABELS[metric], row["lora"], row["base"], row["difference"], row["ci90"],
                 paper_lora, paper_base)


def scores(numbers, name):
    """[Score] of the suite's metrics that both we and the paper have."""
    rows = numbers[name]["rows"]
    return [score(numbers, name, metric) for metric in SUITES[name].PAPER if metric in rows]


def tables(numbers):
    rows = []
    for name in SUITES:
        for each in scores(numbers, name):
            rows.append([
                name,
                each.label,
                f"{each.lora:.3f}",
                f"{each.base:.3f}",
                written(each.difference, each.half, "+.3f"),
                f"{each.paper_lora:.3f}",
                f"{each.paper_base:.3f}",
                f"{each.paper_difference:+.3f}",
            ])

    found = numbers["autointerp"]["score"]
    lora, base = found["lora"]["mean"], found["base"]["mean"]
    ours = written(found["delta"]["mean"], found["delta"]["ci90"], "+.3f")
    row = ["autointerp", "score", f"{lora:.3f}", f"{base:.3f}", ours, "0.830", "0.832", "-0.002"]
    rows.append(row)

    headings = ["suite", "metric", "LoRA", "base", "difference", "paper: LoRA", "base",
                "difference"]
    return [Table("Tables 3 and 6", headings, rows)]


def claims(numbers):
    """The first metric of each suite, and autointerp's."""
    made = []
    for name, suite in SUITES.items():
        first = score(numbers, name, next(iter(suite.PAPER)))
        made.append(claim(first.label, first.paper_difference, first.difference, first.half))

    ours = numbers["autointerp"]["score"]["delta"]
    made.append(claim("Autointerp", -0.002, ours["mean"], ours["ci90"]))
    return made


def claim(label, paper, ours, half):
    """The paper's difference, of a single seed, against ours with its interval."""
    direction, why = (ours > 0) == (paper > 0), ""
    if half is None:
        direction, why = None, "one seed has no interval"
    elif abs(ours) <= half:
        direction, why = None, WITHIN
    return Claim(f"{label}: adapted less base",
                 f"{paper:+.3f}, one seed",
                 written(ours, half, "+.3f"),
                 direction=direction,
                 why=why)


def draw(numbers, figure):
    """Ours and the paper's differences, a bar a metric."""
    found = []
    for name in SUITES:
        found += scores(numbers, name)
    places = range(len(found))

    figure.set_size_inches(8, 4)
    axes = figure.subplots()
    for place, each in zip(places, found):
        ours, paper = None, None
        if place == 0:                                  # in the legend once
            ours, paper = "ours", "paper (one seed)"
        axes.bar(place - 0.2, each.difference, 0.4, yerr=error_bar(each.half), capsize=2, color="C0",
                 label=ours)
        axes.bar(place + 0.2, each.paper_difference, 0.4, color="C1", label=paper)

    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xticks(places, [each.label for each in found], rotation=90, fontsize=7)
    axes.set_ylabel("adapted less base")
    axes.legend()
