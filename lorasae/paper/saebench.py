"""SAEBench (§5.1, Tables 3 and 6): probing, SCR, TPP, absorption and autointerp on base and adapted model."""
from argparse import Namespace

from lorasae.evals import absorption, autointerp, probing, scr, tpp
from lorasae.paper.findings import Claim, Table
from lorasae.paper.study import around_topk
from lorasae.runs.opening import open_run

TITLE = "SAEBench"
FIGURES = ("table3", "table6")
ABOUT = ("The SAE reads base and adapted model (TopK, adapters on all blocks); nothing is spliced in. One seed of "
         "training; intervals are 90 % over three seeds of evaluation, of autointerp over latents, differences paired. The "
         "judge of autointerp is lexical (eval.py --suite autointerp --judge asks a language model); in miniature the "
         "texts are packages of the standard library.")

SUITES = {"scr": scr, "tpp": tpp, "probing": probing, "absorption": absorption}


def trainings(study):
    return [around_topk(study, study.seeds[0])]


def pieces(study):
    return [*SUITES, "autointerp"]


def piece(study, name):
    training, = trainings(study)
    setting = open_run(study.folder / training.name)
    labelled = "stdlib" if study.miniature else "saebench"
    options = Namespace(labelled=labelled, seeds=3, words=2000, judge=None, judge_latents=300, judge_seeds=3,
                        latents=None, chat_model=None)
    suite = autointerp if name == "autointerp" else SUITES[name]
    return suite.evaluate(setting, options)


def cost(study):
    """{kind of work: tokens} of a piece: mostly probes, whose time is given in tokens read meanwhile."""
    return {"forward": 500_000}


def measure(study, found):
    return found


def tables(numbers):
    rows = []
    for name, suite in SUITES.items():
        for metric, label in suite.LABELS.items():
            if metric not in numbers[name]["rows"] or metric not in suite.PAPER:
                continue
            row, (paper_lora, paper_base) = numbers[name]["rows"][metric], suite.PAPER[metric]
            rows.append([name, label, f"{row['lora']:.3f}", f"{row['base']:.3f}", difference(row["difference"], row["ci90"]),
                         f"{paper_lora:.3f}", f"{paper_base:.3f}", f"{paper_lora - paper_base:+.3f}"])
    score = numbers["autointerp"]["score"]
    rows.append(["autointerp", "score", f"{score['lora']['mean']:.3f}", f"{score['base']['mean']:.3f}",
                 difference(score["delta"]["mean"], score["delta"]["ci90"]), "0.830", "0.832", "-0.002"])
    return [Table("Tables 3 and 6", ["suite", "metric", "LoRA", "base", "difference", "paper: LoRA", "base", "difference"], rows)]


def difference(value, half):
    return f"{value:+.3f}" + ("" if half is None else f" ± {half:.3f}")


def claims(numbers):
    made = []
    for name, suite in SUITES.items():
        metric = next(iter(suite.PAPER))
        row, (paper_lora, paper_base) = numbers[name]["rows"][metric], suite.PAPER[metric]
        made.append(claim(suite.LABELS[metric], paper_lora - paper_base, row["difference"], row["ci90"]))
    score = numbers["autointerp"]["score"]["delta"]
    made.append(claim("Autointerp", -0.002, score["mean"], score["ci90"]))
    return made


def claim(label, paper, ours, half):
    """The paper's difference, of a single seed, against ours with its interval."""
    beyond = half is not None and abs(ours) > half
    return Claim(f"{label}: adapted less base", f"{paper:+.3f}, one seed", difference(ours, half), (ours > 0) == (paper > 0) if beyond else None,
                 why="" if beyond else "no difference beyond the interval; the paper's own are within SAEBench's tolerance")


def draw(numbers, figure):
    """Ours and the paper's differences, a bar a metric."""
    figure.set_size_inches(8, 4)
    axes, labels = figure.subplots(), []
    for name, suite in SUITES.items():
        for metric in suite.PAPER:
            if metric not in numbers[name]["rows"]:
                continue
            row, (paper_lora, paper_base) = numbers[name]["rows"][metric], suite.PAPER[metric]
            place, first = len(labels), not labels
            axes.bar(place - 0.2, row["difference"], 0.4, yerr=row["ci90"] or 0, capsize=2, color="C0", label="ours" if first else None)
            axes.bar(place + 0.2, paper_lora - paper_base, 0.4, color="C1", label="paper (one seed)" if first else None)
            labels.append(suite.LABELS[metric])
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.set_ylabel("adapted less base")
    axes.legend()
