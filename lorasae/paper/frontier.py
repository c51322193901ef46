"""Cross-entropy against training time (§4.2; Figures 1 and 5, Tables 1 and 2).

    TopK, e2e       an SAE after each tenth of its training
    TopK + LoRA     the model adapted to that TopK SAE; its time is the SAE's plus the adapters'

    python -m lorasae.paper --only fig1,fig5

Times cover training only, not loading or evaluation, and one run at a time. Each method does only
the work it needs: TopK stops at the SAE's block, and e2e shares the base model's frozen prefix.
"""
from pathlib import Path

from lorasae.evals.common import Estimate
from lorasae.evals.report import Table
from lorasae.paper.gap import paired, read
from lorasae.paper.results import Part
from lorasae.paper.study import around_long, evaluation, long_sae, new_sae
from lorasae.runs.config import Config

CURVES = {"topk_lora": "TopK + LoRA", "topk": "TopK", "e2e": "e2e"}
LEAST_SPEEDUP = 3.05    # the least in the paper's Table 1; at e2e's final loss it is 20.01


def models(study):
    """{figure: model}"""
    second = {"fig5": study.plan.second} if study.plan.second else {}
    return {"fig1": study.model, **second}


def tenths(study, model):
    """{method: the Job that evaluates its SAE after each tenth of its training}"""
    tokens = fewer(study.plan.e2e_tokens, study.frontier_tokens)
    e2e = new_sae(study, "e2e", model, tokens=tokens, timed=True)
    return {"topk": evaluation(long_sae(study, model), "tenths"), "e2e": evaluation(e2e, "tenths")}


def adapters_of(study, model):
    """{percent: the Job of adapters around the TopK SAE after that part of its training}"""
    adapt, seed = ("after", 0) if study.laptop else ("all", Config.seed)
    tokens = fewer(study.plan.frontier_lora, study.long_tokens)
    return {percent: around_long(study, seed, adapt, percent, model, tokens)
            for percent in study.plan.percents}


def fewer(*tokens):
    """The smallest of the numbers; those that are 0 or None do not count."""
    return min(filter(None, tokens), default=None)


def jobs(study):
    return [job for model in models(study).values()
            for made in (tenths(study, model), adapters_of(study, model)) for job in made.values()]


# ---- Measuring -----------------------------------------------------------------------------------

def measure(study):
    """{figures: {figure: {model, ce_base, curves: {name: [{percent, seconds, ce}]}}}; cases}

    Cases: CE of e2e - CE of TopK + LoRA, both at their ends ("lower"), and with the best TopK +
    LoRA that is done within e2e's time / LEAST_SPEEDUP ("sooner").
    """
    figures, cases = {}, {}
    for figure, model in models(study).items():
        # The curves.
        made = tenths(study, model)
        curves = {name: job.found()["rows"] for name, job in made.items()}
        runs = {percent: read(job) for percent, job in adapters_of(study, model).items()}
        before = {point["percent"]: point["seconds"] for point in curves["topk"]}
        curves["topk_lora"] = [{
            "percent": percent,
            "seconds": before[percent] + run.found["seconds"],
            "ce": run.found["ce_adapted"],
        } for percent, run in runs.items()]
        *_, last = runs.values()
        name = Path(model).name
        figures[figure] = {"model": name, "ce_base": last.found["ce_base"], "curves": curves}

        # Compare TopK + LoRA with e2e, sequence by sequence.
        e2e = read(made["e2e"].needs[0])
        cases[f"lower_{figure}"] = {name: paired(e2e.sae - last.adapted, e2e, last)}
        if figure == "fig5":                            # there e2e's last losses are never reached
            continue
        limit = curves["e2e"][-1]["seconds"] / LEAST_SPEEDUP
        sooner = Estimate(None, None, "no TopK + LoRA was there so soon")
        in_time = [run for percent, run in runs.items()
                   if before[percent] + run.found["seconds"] <= limit]
        if in_time:
            best = min(in_time, key=lambda run: run.found["ce_adapted"])
            sooner = paired(e2e.sae - best.adapted, e2e, best)
        cases[f"sooner_{figure}"] = {name: sooner}
    return {"figures": figures, "cases": cases}


def reached(points, ce):
    """Seconds until the first trained point with at most this loss; None if there is none."""
    return min((point["seconds"] for point in points if point["ce"] <= ce), default=None)


# ---- Tables and pictures -------------------------------------------------------------------------

def table_of(own):
    """The paper's Tables 1 and 2: a row for e2e's loss after each tenth of its training."""
    rows = []
    for point in own["curves"]["e2e"]:
        times = [reached(own["curves"][name], point["ce"]) for name in CURVES]
        cells = ["-" if time is None else f"{time:,.1f}" for time in times]
        cells.append("-" if times[0] is None else f"{times[-1] / times[0]:.2f}x")
        rows.append([f"{point['ce']:.4f}", *cells])
    caption = f"{own['model']}: training seconds to reach a loss (without SAE {own['ce_base']:.4f})"
    headings = ["CE", *(f"{label} (s)" for label in CURVES.values()), "sooner than e2e"]
    return Table(caption, headings, rows)


def draw(numbers, figure):
    """Figures 1 and 5."""
    panels = figure.subplots(1, len(numbers["figures"]), squeeze=False)[0]
    for axes, own in zip(panels, numbers["figures"].values()):
        for name, label in CURVES.items():
            points = [(point["seconds"], point["ce"]) for point in own["curves"][name]]
            axes.plot(*zip(*points), marker="o", label=label)
        axes.axhline(own["ce_base"], color="grey", linestyle="--", label="without SAE")
        axes.set(xlabel="training time (s)", ylabel="cross-entropy (nats/token)",
                 title=own["model"])
        axes.legend()


FRONTIER = Part("frontier", jobs, measure, draw,
                lambda numbers: [table_of(own) for own in numbers["figures"].values()])
