"""Cross-entropy against training time (§4.2; Figures 1 and 5, Tables 1 and 2): TopK, e2e, and TopK + LoRA.

Times are of training alone, on one machine: no loading and no evaluation. Each method does the
work that it needs and
no more: TopK stops the model at the SAE's block, e2e shares the frozen prefix with the base model.
The time of a TopK + LoRA point is that of its SAE so far plus that of its adapters.
"""
from typing import NamedTuple

from lorasae.evals import fidelity
from lorasae.io.files import read_json
from lorasae.io.saes import load_sae
from lorasae.paper.findings import Claim, Table
from lorasae.paper.study import adapters, new_sae, opened, results
from lorasae.runs.config import read_config

TITLE = "Loss against training time: TopK + LoRA, TopK, end to end"
FIGURES = ("fig1", "fig5", "table1", "table2")
ABOUT = ("A TopK and an e2e SAE with the same latents, k and tokens, and the model adapted (all blocks, rank 64) to the "
         "TopK SAE as it was after each tenth of its training; everything on the same held-out text. A table's row: the "
         "seconds of training to a loss, those of TopK and e2e on the line between two points, which favours them. In the "
         "published code the checkpoint named 50 % may be the end of the training, so the paper's times of TopK + LoRA may "
         "be half of the true ones. One seed; trainings that run at once, one a core, lengthen each other's times a "
         "little.")

TENTHS = range(10, 101, 10)
CURVES = {"topk": "TopK", "e2e": "e2e", "topk_lora": "TopK + LoRA"}
LEVELS = 5                                              # rows of the table of times


def models(study):
    """{figure: model}"""
    return {"fig1": study.models.main, "fig5": study.models.second}


def saes_of(study, model):
    """{method: the Training of its SAE}"""
    return {method: new_sae(study, method, model, tokens=study.frontier_tokens) for method in ("topk", "e2e")}


def tenth(study, sae, percent):
    """The folder of an SAE as it was after a part of its training."""
    return study.folder / sae.name / ("sae" if percent == 100 else f"sae-{percent}pct")


def adapters_of(study, model, percent):
    """The Training of adapters around the TopK SAE as it was then."""
    topk = saes_of(study, model)["topk"]
    source = str(tenth(study, topk, percent))
    training = adapters(study, f"frontier-{model}-{percent}pct", model, [source], rank=(64,), adapt=("all",))
    return training._replace(needs=(topk.name,))


def trainings(study):
    needed = []
    for model in models(study).values():
        needed += saes_of(study, model).values()
        needed += [adapters_of(study, model, percent) for percent in TENTHS]
    return needed


def cost(study):
    """{kind of work: tokens}: every SAE of every tenth is evaluated."""
    return {"forward": 40 * study.held_out}


def measure(study):
    """{figure: its curves}"""
    return {figure: curves(study, model) for figure, model in models(study).items()}


def curves(study, model):
    """What a figure shows, CE in nats a token.

    {model, layer, width, k, sae_tokens, lora_tokens, eval_tokens, ce_base; topk, e2e and topk_lora: [{percent, seconds,
    ce}] by tenths; levels: rows of the table of times}
    """
    saes = saes_of(study, model)
    config = read_config(study.folder / saes["topk"].name)
    setting = opened(study, saes["topk"])

    points = {method: sae_curve(study, setting, config, sae) for method, sae in saes.items()}
    points["topk_lora"] = lora_curve(study, model, points["topk"])
    last = results(study, adapters_of(study, model, TENTHS[-1]))

    return {
        "model": model,
        "layer": config.layer[0],
        "width": config.width,
        "k": config.k,
        "sae_tokens": config.trained_tokens,
        "lora_tokens": last["train_tokens"],
        "eval_tokens": setting.text.held_out.numel(),
        "ce_base": last["ce_base"],
        **points,
        "levels": levels(points),
    }


def sae_curve(study, setting, config, sae):
    """[{percent, seconds, ce}] of an SAE as it was after each tenth of its training."""
    held_out = setting.text.held_out.split(config.eval_batch)
    curve = []
    for percent in TENTHS:
        folder = tenth(study, sae, percent)
        spliced = {config.layer[0]: load_sae(folder, device=setting.model.device)}
        found = fidelity.measure(setting.model, spliced, held_out, ("sae",))
        seconds = read_json(folder / "training.json")["seconds"]
        curve.append({"percent": percent, "seconds": seconds, "ce": found["sae"]["ce"].mean().item()})
    return curve


def lora_curve(study, model, topk):
    """[{percent, seconds, lora_seconds, ce}]; seconds: those of the SAE so far, of its curve, and of the adapters."""
    curve = []
    for before, percent in zip(topk, TENTHS):
        found = results(study, adapters_of(study, model, percent))
        curve.append({
            "percent": percent,
            "seconds": before["seconds"] + found["seconds"],
            "lora_seconds": found["seconds"],
            "ce": found["ce_adapted"],
        })
    return curve


# ---- The time to a loss --------------------------------------------------------------------------

def reached(points, ce, between=True):
    """Seconds until the loss is down to ce, None if it never is; linear between points, or else the first one there.

    Before the first point nothing is known, so its time is an upper bound.
    """
    last = None
    for point in points:
        if point["ce"] <= ce:
            if last is None or not between:
                return point["seconds"]
            step, fall = point["seconds"] - last["seconds"], last["ce"] - point["ce"]
            return last["seconds"] + step * (last["ce"] - ce) / fall
        last = point
    return None


def levels(points):
    """The rows of Tables 1 and 2: losses from the first of TopK + LoRA down to the best of all, and the time to each.

    points: {curve: [{seconds, ce}]} -> [{ce; topk, e2e, topk_lora: seconds or None; speedup: how many times sooner
    topk_lora is there than e2e, or None}].

    Of a TopK + LoRA only the trained points count; between those of TopK and e2e the line does, which favours them.
    """
    first = points["topk_lora"][0]["ce"]
    best = min(point["ce"] for name in CURVES for point in points[name])
    e2e_begins = points["e2e"][0]["ce"]            # its time to a higher loss is but an upper bound

    rows = []
    for i in range(LEVELS):
        ce = first + (best - first) * i / (LEVELS - 1)
        seconds = {name: reached(points[name], ce, between=name != "topk_lora") for name in CURVES}
        e2e, lora = seconds["e2e"], seconds["topk_lora"]

        speedup = None
        if e2e is not None and lora is not None and ce < e2e_begins:
            speedup = e2e / lora
        rows.append({"ce": ce, **seconds, "speedup": speedup})
    return rows


# ---- What it comes to ----------------------------------------------------------------------------

def tables(numbers):
    made = []
    for found in numbers.values():
        made += [table_of_points(found), table_of_times(found)]
    return made


def table_of_points(found):
    headings = ["training"]
    for label in CURVES.values():
        headings += [f"{label} (s)", "CE"]

    rows = []
    for points in zip(*(found[name] for name in CURVES)):
        row = [f"{points[0]['percent']} %"]
        for point in points:
            row += [f"{point['seconds']:,.1f}", point["ce"]]
        rows.append(row)

    alone = f"the model alone: {found['ce_base']:.4f}"
    return Table(f"{found['model']}: seconds of training, and CE in nats ({alone})", headings, rows)


def table_of_times(found):
    order = list(reversed(CURVES))
    headings = ["CE", *(f"{CURVES[name]} (s)" for name in order), "faster than e2e"]

    rows = []
    for level in found["levels"]:
        times = ["-" if level[name] is None else f"{level[name]:,.1f}" for name in order]
        speedup = "-" if level["speedup"] is None else f"{level['speedup']:.2f}x"
        rows.append([f"{level['ce']:.4f}", *times, speedup])
    return Table(f"{found['model']}: seconds to a loss", headings, rows)


class Published(NamedTuple):
    """What the paper has of a figure."""
    table: int                                          # the table of its times
    least: float                                        # times faster than e2e
    most: float
    lower: str                                          # which ends lower


PAPER = {
    "fig1": Published(table=1, least=3.05, most=20.01, lower="TopK + LoRA"),
    "fig5": Published(table=2, least=2.23, most=10.38, lower="e2e"),
}


def claims(numbers):
    made = []
    for figure, found in numbers.items():
        made += [sooner(found, PAPER[figure]), ends_lower(figure, found, PAPER[figure])]
    return made


def sooner(found, paper):
    speedups = [level["speedup"] for level in found["levels"] if level["speedup"] is not None]
    ours, faster, as_much = "no loss that both reach", None, None
    if speedups:
        least, most = min(speedups), max(speedups)
        ours = f"{least:.2f}x to {most:.2f}x"
        faster = least > 1
        as_much = least >= paper.least and most <= 2 * paper.most
    return Claim(f"Table {paper.table} ({found['model']}): TopK + LoRA reaches e2e's losses sooner",
                 f"{paper.least:.2f}x to {paper.most:.2f}x",
                 ours,
                 direction=faster,
                 size=as_much)


def ends_lower(figure, found, paper):
    lora, e2e = found["topk_lora"][-1]["ce"], found["e2e"][-1]["ce"]
    lower = "e2e" if e2e < lora else "TopK + LoRA"
    why = ""
    before, last = (point["ce"] for point in found["e2e"][-2:])
    if lower != "e2e" and paper.lower == "e2e" and last < before and found["sae_tokens"] < 4e9:
        why = f"e2e was trained on {found['sae_tokens']:,} tokens, and its loss still falls; the paper's on 4B"
    return Claim(f"Figure {figure[3:]}: which ends lower",
                 paper.lower,
                 f"{lower}: {min(e2e, lora):.4f} against {max(e2e, lora):.4f} nats",
                 direction=lower == paper.lower,
                 why=why)


def draw(numbers, figure):
    """Figures 1 and 5."""
    figure.set_size_inches(5 * len(numbers), 3.8)
    panels = figure.subplots(1, len(numbers), squeeze=False)[0]
    for axes, found in zip(panels, numbers.values()):
        for name, label in CURVES.items():
            seconds = [point["seconds"] for point in found[name]]
            losses = [point["ce"] for point in found[name]]
            axes.plot(seconds, losses, marker="o", label=label)

        alone = found["ce_base"]
        axes.axhline(alone, color="grey", linestyle="--", label=f"original model ({alone:.3f})")
        axes.set(xlabel="training time (s)", ylabel="cross-entropy (nats/token)")
        axes.set_title(f"{found['model']}: {found['width']:,} latents, k {found['k']}", fontsize=10)
        axes.legend(fontsize=8)
