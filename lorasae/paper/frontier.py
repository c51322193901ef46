"""Cross-entropy against training time (§4.2; Figures 1 and 5, Tables 1 and 2).

    TopK, e2e       an SAE after each tenth of its training
    TopK + LoRA     the model adapted to the TopK SAE as it was then; its time is the SAE's so far
                    plus the adapters'

    python -m lorasae.paper --only fig1,fig5

Times are of training only, without loading and evaluation, of one run at a time. Each method does
only the work that it needs: TopK stops the model at the SAE's block, and e2e shares the frozen
prefix with the base model.
"""
from lorasae.evals.common import Estimate
from lorasae.evals.report import Table
from lorasae.paper.gap import paired, read
from lorasae.paper.results import Claim, Part
from lorasae.paper.study import Evaluation, adapters, budget, found, new_sae, tokens_of

CURVES = {"topk_lora": "TopK + LoRA", "topk": "TopK", "e2e": "e2e"}
LEAST_TOKENS, SHARE = 20_000, 0.0075    # of adapters: the paper's share of the SAE's tokens
LEAST_SPEEDUP = {"fig1": 3.05, "fig5": 2.23}            # of the paper's Tables 1 and 2

PAPER = {                               # CE; hours of TopK + LoRA, TopK, e2e; times sooner than e2e
    "fig1": """
        2.60        12      59      37          3.05x
        2.59        12      -       79          6.53x
        2.58        12      -       148         12.18x
        2.57        12      -       243         20.01x
        2.55-2.57   12-107  -       -           -
    """,
    "fig5": """
        2.73        9       -       96          10.38x
        2.72        12      -       113         9.08x
        2.71        19      -       135         7.14x
        2.70        70      -       156         2.23x
        2.67-2.70   -       -       156-213     -
    """,
}


def saes(study, model):
    """{method: the Training of its SAE}"""
    return {method: new_sae(study, method, model, tokens=study.frontier_tokens, timed=True)
            for method in ("topk", "e2e")}


def adapters_of(study, model):
    """[the Training of adapters around the TopK SAE after each tenth of its training]"""
    topk, tokens = saes(study, model)["topk"], None
    if study.miniature:
        share = round(SHARE * study.frontier_tokens)
        tokens = min(study.lora_tokens, max(LEAST_TOKENS, share))
    made = []
    for percent in range(10, 101, 10):
        source = study.folder / topk.name / ("sae" if percent == 100 else f"sae-{percent}pct")
        training = adapters(study, f"frontier-{model}-{percent}pct", model, [str(source)],
                            tokens=tokens, timed=True, rank=64, adapt="all")
        made.append(training._replace(saes=(topk,)))
    return made


def models(study):
    """{figure: model}"""
    return {"fig1": study.models.main, "fig5": study.models.second}


def trainings(study):
    made = []
    for model in models(study).values():
        made += [*saes(study, model).values(), *adapters_of(study, model)]
    return made


def evaluations(study):
    return [Evaluation(sae, "tenths") for model in models(study).values()
            for sae in saes(study, model).values()]


def about(study):
    sae, *_, adapted = trainings(study)
    share = tokens_of(adapted) / tokens_of(adapted.saes[0])
    return (
        "A TopK and an e2e SAE with the same latents, k and tokens, and the model adapted (all "
        "blocks, rank 64) to the TopK SAE as it was after each tenth of its training; everything "
        f"on the same held-out text. SAEs train on {tokens_of(sae):,} tokens (the paper: 2B and "
        f"4B). {budget(study, adapted, '15M and 100M')} That is {share:.2%} of the SAE's (the "
        "paper: 0.75 % and 2.5 %). A curve's time to a loss is that of its first trained point "
        "that reaches it. Every training had the machine to itself. In the published code the "
        "checkpoint named 50 % may be the end of the training, so the paper's times of TopK + LoRA "
        "may be half of the true ones.")


# ---- Measuring -----------------------------------------------------------------------------------

def measure(study):
    """{figure: {model, ce_base, curves: {name: [{percent, seconds, ce}]}; sooner, lower}}

    lower: CE of e2e - CE of TopK + LoRA, both at their ends. sooner: the same with the best TopK +
    LoRA that was there in e2e's time divided by LEAST_SPEEDUP.
    """
    return {figure: measure_one(study, model, LEAST_SPEEDUP[figure])
            for figure, model in models(study).items()}


def measure_one(study, model, speedup):
    made = saes(study, model)
    curves = {name: found(study, Evaluation(sae, "tenths"))["rows"] for name, sae in made.items()}
    runs = [read(study, training) for training in adapters_of(study, model)]
    curves["topk_lora"] = []
    for before, run in zip(curves["topk"], runs):
        seconds = before["seconds"] + run.found["seconds"]
        curves["topk_lora"].append({**before, "seconds": seconds, "ce": run.found["ce_adapted"]})

    e2e, last = read(study, made["e2e"]), runs[-1]
    limit = curves["e2e"][-1]["seconds"] / speedup
    in_time = [run for point, run in zip(curves["topk_lora"], runs) if point["seconds"] <= limit]
    sooner = Estimate(None, None, "no TopK + LoRA was there so soon")
    if in_time:
        best = min(in_time, key=lambda run: run.found["ce_adapted"])
        sooner = paired(e2e.sae - best.adapted, e2e, best)
    return {
        "model": model,
        "ce_base": last.found["ce_base"],
        "curves": curves,
        "sooner": sooner,
        "lower": paired(e2e.sae - last.adapted, e2e, last),
    }


def reached(points, ce):
    """The seconds of the first trained point with at most this loss; None if there is none."""
    return min((point["seconds"] for point in points if point["ce"] <= ce), default=None)


# ---- What it comes to ----------------------------------------------------------------------------

def tables(numbers):
    made = []
    for number, (figure, own) in enumerate(numbers.items(), start=1):
        paper = [line.split() for line in PAPER[figure].strip().splitlines()]
        headings = [*(f"{label} (h)" for label in CURVES.values()), "sooner than e2e"]
        made += [table_of(own), Table(f"Table {number} of the paper: hours to a loss",
                                      ["CE", *headings], paper)]
    return made


def table_of(own):
    """A row for each tenth of the training, and the time to e2e's loss there."""
    rows = []
    for points in zip(*(own["curves"][name] for name in CURVES)):
        *_, e2e = points
        row = [f"{e2e['percent']} %"]
        for point in points:
            row += [f"{point['seconds']:,.1f}", point["ce"]]
        times = [reached(own["curves"][name], e2e["ce"]) for name in CURVES]
        row += ["-" if time is None else f"{time:,.1f}" for time in times[:2]]
        row.append("-" if times[0] is None else f"{times[2] / times[0]:.2f}x")
        rows.append(row)
    rows[-1][0] += " (e2e's last loss)"
    headings = ["training of the SAE"]
    for label in CURVES.values():
        headings += [f"{label} (s)", "CE"]
    caption = f"{own['model']}: seconds of training, CE in nats (without SAE {own['ce_base']:.4f})"
    headings += ["TopK + LoRA to e2e's CE (s)", "TopK to e2e's CE (s)", "sooner than e2e"]
    return Table(caption, headings, rows)


def claims(numbers):
    first, second = numbers["fig1"], numbers["fig5"]
    says = ("TopK + LoRA reaches e2e's last loss at least {}x sooner: CE of e2e - CE of TopK + "
            "LoRA in that part of its time")
    return [
        Claim("Fig. 1, Table 1", says.format(3.05), "3.05x to 20.01x sooner",
              {first["model"]: first["sooner"]}),
        Claim("Fig. 1", "TopK + LoRA ends lower: CE of e2e - CE of TopK + LoRA",
              "it reaches 2.55 nats, and e2e 2.57", {first["model"]: first["lower"]},
              paper_values=(0.02,)),
        Claim("Fig. 5, Table 2", says.format(2.23), "2.23x to 10.38x sooner",
              {second["model"]: second["sooner"]}),
        Claim("Fig. 5", "e2e ends lower: CE of e2e - CE of TopK + LoRA",
              "it reaches 2.67 nats, and TopK + LoRA 2.70", {second["model"]: second["lower"]},
              larger=False, paper_values=(-0.03,)),
    ]


def draw(numbers, figure):
    """Figures 1 and 5."""
    figure.set_size_inches(10, 3.8)
    for axes, own in zip(figure.subplots(1, 2), numbers.values()):
        for name, label in CURVES.items():
            points = own["curves"][name]
            axes.plot([point["seconds"] for point in points], [point["ce"] for point in points],
                      marker="o", label=label)
        alone = own["ce_base"]
        axes.axhline(alone, color="grey", linestyle="--", label=f"original model ({alone:.3f})")
        axes.set(xlabel="training time (s)", ylabel="cross-entropy (nats/token)",
                 title=own["model"])
        axes.legend(fontsize=8)


FRONTIER = Part(
    name="frontier",
    title="Loss against training time: TopK + LoRA, TopK, end to end",
    figures=("fig1", "fig5", "table1", "table2"),
    about=about,
    trainings=trainings,
    evaluations=evaluations,
    measure=measure,
    tables=tables,
    claims=claims,
    draw=draw,
    caption="One run per point, without error bars; the claims compare runs sequence by sequence.",
)
