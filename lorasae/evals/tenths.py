"""What an SAE costs after each tenth of its training: a curve of the paper's Figures 1 and 5.

    python eval.py RUN_DIR --suite tenths           a run of --method topk, jumprelu or e2e

CE and KL with the SAE spliced in, in nats per token of the held-out text, against the seconds and
tokens of training. Intervals are 90 %, over documents.
"""
from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.evals.common import batches, interval, progress, with_ci90
from lorasae.evals.report import Table, lines, plus_minus
from lorasae.io.files import read_json
from lorasae.io.saes import load_sae


def evaluate(setting):
    """{"layer", "rows": [{percent, step, tokens, seconds, ce, kl, ci90}]}, in training order."""
    folders = sorted(setting.folder.glob("sae-??pct")) + [setting.folder / "sae"]
    if len(folders) == 1 or not (folders[-1] / "training.json").exists():
        raise InputError(f"{setting.folder} did not keep its SAE tenth by tenth: --suite tenths is "
                         "for runs that train one from scratch")
    layer = setting.config.layer[0]

    rows = []
    for folder in progress(folders, "tenths"):
        sae = load_sae(folder, device=setting.model.device)
        found = fidelity.measure(setting.model, {layer: sae}, batches(setting), ("sae",))["sae"]
        losses = {loss: interval(found[loss], setting.text.documents) for loss in ("ce", "kl")}
        rows.append({**read_json(folder / "training.json"), **with_ci90(losses)})
    return {"layer": layer, "rows": rows}


def tables(numbers):
    rows = []
    for row in numbers["rows"]:
        cells = [f"{row['percent']} %", f"{row['tokens']:,}", f"{row['seconds']:,.1f}"]
        for loss in ("ce", "kl"):
            cells += [row[loss], plus_minus(row["ci90"][loss])]
        rows.append(cells)
    headings = ["training", "tokens", "seconds", "CE with SAE", "90 % CI", "KL", "90 % CI"]
    return [Table("The SAE after each tenth of its training (nats per token)", headings, rows)]


def draw(numbers, figure):
    figure.set_size_inches(5, 3.6)
    axes, rows = figure.subplots(), numbers["rows"]
    found = [(row["ce"], row["ci90"]["ce"]) for row in rows]
    lines(axes, [row["seconds"] for row in rows], {"": found})
    axes.set(xlabel="training time (s)", ylabel="CE with the SAE (nats per token)")
