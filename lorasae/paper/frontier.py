"""Cross-entropy against training time (§4.2; Figures 1 and 5, Tables 1 and 2): TopK, e2e, and TopK + LoRA.

Times are of training alone, on one machine: no loading and no evaluation. Each method does the work that it needs and
no more: TopK stops the model at the SAE's block, e2e shares the frozen prefix with its teacher. The time of a TopK +
LoRA point is that of its SAE so far plus that of its adapters.
"""
from lorasae.evals import fidelity
from lorasae.io.disk import read_json
from lorasae.io.sae_formats import load_sae
from lorasae.paper.findings import Claim, Table
from lorasae.paper.study import adapters, new_sae, results
from lorasae.runs.config import read_config
from lorasae.runs.setting import load_setting

TITLE = "Loss against training time: TopK + LoRA, TopK, end to end"
FIGURES = ("fig1", "fig5", "table1", "table2")
ABOUT = ("A TopK and an e2e SAE with the same latents, k and tokens, and the model adapted (all blocks, rank 64) to the "
         "TopK SAE as it was after each tenth of its training; everything on the same held-out text. A table's row: the "
         "seconds of training to a loss, those of TopK and e2e on the line between two points, which favours them. In the "
         "published code the checkpoint named 50 % may be the end of the training, so the paper's times of TopK + LoRA may "
         "be half of the true ones. One seed; several trainings run at once, one a core, so times depend a little on each "
         "other.")

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
    topk = saes_of(study, model)["topk"]
    training = adapters(study, f"frontier-{model}-{percent}pct", model, [str(tenth(study, topk, percent))], rank=(64,),
                        adapt=("all",))
    return training._replace(needs=(topk.name,))


def trainings(study):
    needed = []
    for model in models(study).values():
        needed += saes_of(study, model).values()
        needed += [adapters_of(study, model, percent) for percent in TENTHS]
    return needed


def cost(study):
    """{kind of work: tokens}: every SAE of every tenth is evaluated."""
    return {"forward": 40 * study.eval_tokens} if study.eval_tokens else {}


def measure(study):
    """{figure: its curves}"""
    return {figure: curves(study, model) for figure, model in models(study).items()}


def curves(study, model):
    """{model, sae_tokens, ..., ce_base; of each method [{percent, seconds, ce}]; levels}, CE in nats a token."""
    saes = saes_of(study, model)
    config = read_config(study.folder / saes["topk"].name)
    setting = load_setting(config, study.folder / saes["topk"].name)
    layer, held_out = config.layer[0], setting.corpus.validation.split(config.eval_batch)

    points = {name: [] for name in CURVES}
    for method, sae in saes.items():
        for percent in TENTHS:
            folder = tenth(study, sae, percent)
            spliced = {layer: load_sae(folder, device=setting.model.device)}
            found = fidelity.measure(setting.model, spliced, held_out, ("sae",))
            points[method].append({"percent": percent, "seconds": read_json(folder / "training.json")["seconds"],
                                   "ce": found["sae"]["ce"].mean().item()})

    for before, percent in zip(points["topk"], TENTHS):
        found = results(study, adapters_of(study, model, percent))
        points["topk_lora"].append({"percent": percent, "seconds": before["seconds"] + found["seconds"],
                                    "lora_seconds": found["seconds"], "ce": found["ce_adapted"]})

    return {"model": model, "layer": layer, "width": config.width, "k": config.k, "sae_tokens": config.trained_tokens,
            "lora_tokens": found["train_tokens"], "eval_tokens": setting.corpus.validation.numel(), "ce_base": found["ce_base"],
            **points, "levels": levels(points)}


def reached(points, ce, between=True):
    """Seconds until the loss is down to ce, None if it never is; linear between points, or else the first one there.

    Before the first point nothing is known, so its time is an upper bound.
    """
    for i, point in enumerate(points):
        if point["ce"] <= ce:
            if i == 0 or not between:
                return point["seconds"]
            last = points[i - 1]
            return last["seconds"] + (point["seconds"] - last["seconds"]) * (last["ce"] - ce) / (last["ce"] - point["ce"])
    return None


def levels(points):
    """The rows of Tables 1 and 2: losses from the first of TopK + LoRA down to the best of all, and the time to each.

    Of a TopK + LoRA only the trained points count; between those of TopK and e2e the line does, which favours them.
    """
    first, best = points["topk_lora"][0]["ce"], min(point["ce"] for name in CURVES for point in points[name])
    rows = []
    for i in range(LEVELS):
        ce = first + (best - first) * i / (LEVELS - 1)
        seconds = {name: reached(points[name], ce, between=name != "topk_lora") for name in CURVES}
        known = seconds["e2e"] is not None and seconds["topk_lora"] is not None and ce < points["e2e"][0]["ce"]
        rows.append({"ce": ce, **seconds, "speedup": seconds["e2e"] / seconds["topk_lora"] if known else None})
    return rows


# ---- What it comes to --------------------------------------------------------------------------------------------------

def tables(numbers):
    made = []
    for found in numbers.values():
        rows = []
        for points in zip(*(found[name] for name in CURVES)):
            row = [f"{points[0]['percent']} %"]
            for point in points:
                row += [f"{point['seconds']:,.1f}", point["ce"]]
            rows.append(row)
        headings = ["training"]
        for label in CURVES.values():
            headings += [f"{label} (s)", "CE"]
        made.append(Table(f"{found['model']}: seconds of training, and CE in nats (the model alone: {found['ce_base']:.4f})",
                          headings, rows))

        rows = []
        for level in found["levels"]:
            times = ["-" if level[name] is None else f"{level[name]:,.1f}" for name in reversed(CURVES)]
            rows.append([f"{level['ce']:.4f}", *times, "-" if level["speedup"] is None else f"{level['speedup']:.2f}x"])
        headings = ["CE", *(f"{CURVES[name]} (s)" for name in reversed(CURVES)), "faster than e2e"]
        made.append(Table(f"{found['model']}: seconds to a loss", headings, rows))
    return made


PAPER = {"fig1": ("1", "3.05x to 20.01x", (3.05, 20.01), False), "fig5": ("2", "2.23x to 10.38x", (2.23, 10.38), True)}


def claims(numbers):
    made = []
    for figure, found in numbers.items():
        table, shown_there, (least, most), e2e_wins_there = PAPER[figure]
        speedups = [level["speedup"] for level in found["levels"] if level["speedup"] is not None]
        shown = f"{min(speedups):.2f}x to {max(speedups):.2f}x" if speedups else "no loss that both reach"
        made.append(Claim(f"Table {table} ({found['model']}): TopK + LoRA reaches e2e's losses sooner", shown_there, shown,
                          min(speedups) > 1 if speedups else None, bool(speedups) and min(speedups) >= least and max(speedups) <= 2 * most))

        lora, e2e = (found[name][-1]["ce"] for name in ("topk_lora", "e2e"))
        made.append(Claim(f"Figure {figure[3:]}: which ends lower", "e2e" if e2e_wins_there else "TopK + LoRA",
                          f"{'e2e' if e2e < lora else 'TopK + LoRA'}: {min(e2e, lora):.4f} against {max(e2e, lora):.4f} nats",
                          (e2e < lora) == e2e_wins_there))
    return made


def draw(numbers, figure):
    """Figures 1 and 5."""
    figure.set_size_inches(5 * len(numbers), 3.8)
    for axes, found in zip(figure.subplots(1, len(numbers), squeeze=False)[0], numbers.values()):
        for name, label in CURVES.items():
            seconds = [point["seconds"] for point in found[name]]
            axes.plot(seconds, [point["ce"] for point in found[name]], marker="o", label=label)
        axes.axhline(found["ce_base"], color="grey", linestyle="--", label=f"original model ({found['ce_base']:.3f})")
        axes.set(xlabel="training time (s)", ylabel="cross-entropy (nats/token)")
        axes.set_title(f"{found['model']}: {found['width']:,} latents, k {found['k']}", fontsize=10)
        axes.legend(fontsize=8)
