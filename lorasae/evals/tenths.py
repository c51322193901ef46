"""What an SAE costs after each tenth of its training: a curve of the paper's Figures 1 and 5.

    python eval.py RUN_DIR --suite tenths           a run of --method topk, jumprelu or e2e

CE and KL with the SAE, in nats per held-out token, by time and tokens; ± 90 % over documents.
"""
from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.evals.common import batches, interval, with_ci90
from lorasae.evals.report import Table, plus_minus
from lorasae.io.files import read_object
from lorasae.io.saes import load_sae

TRAINING = {"percent": int, "step": int, "tokens": int, "seconds": float}


def evaluate(setting):
    """{"rows": [{*TRAINING, ce, kl, ci90}]}, in training order. Writes tenths/sequences.json."""
    kept = kept_saes(setting)
    if not kept:
        raise InputError(f"{setting.folder} did not save its SAE after each tenth: --suite tenths "
                         "is for runs that train an SAE from scratch")
    saes, documents = {**kept, "sae": setting.saes}, setting.text.documents
    seen = fidelity.measure(setting.model, setting.saes, batches(setting), saes, others=saes)
    fidelity.write_sequences(setting.folder / "tenths", seen, documents)
    rows = []
    for folder, found in seen.items():
        losses = {loss: interval(found[loss], documents) for loss in ("ce", "kl")}
        file = read_object(setting.folder / folder / "training.json")
        training = {name: file.take(name, kind, at_least=0) for name, kind in TRAINING.items()}
        rows.append({**training, **with_ci90(losses)})
    return {"rows": rows}


def kept_saes(setting):
    """{"sae-10pct": {layer: the SAE at that point}, ...}, in order; {} if the run kept none."""
    layer, device = setting.config.layer[0], setting.model.device
    return {folder.name: {layer: load_sae(folder, device=device)}
            for folder in sorted(setting.folder.glob("sae-??pct"))}


def tables(numbers):
    rows = []
    for row in numbers["rows"]:
        cells = [f"{row['percent']} %", f"{row['tokens']:,}", f"{row['seconds']:,.1f}"]
        for loss in ("ce", "kl"):
            cells += [row[loss], plus_minus(row["ci90"][loss])]
        rows.append(cells)
    headings = ["training", "tokens", "seconds", "CE with SAE", "90 % CI", "KL", "90 % CI"]
    return [Table("The SAE after each tenth of its training (nats per token)", headings, rows)]
