"""Does the adapted model compute what the original did? (paper §6.2, Figure 11)

    python eval.py RUN_DIR --suite distances

Compares the output of every block, starting with the first SAE's block: a in the base model without
SAEs, b with the SAEs spliced in, first without and then with adapters. cos(a, b) and ‖a - b‖₂ are
means over the positions of a sequence. The change due to adapting is paired by sequence; its
interval is 90 %, over documents. At position 0 the residual stream can be hundreds of times longer
than elsewhere and swamp the mean, so all results are also given without it (unlike in the paper).
"""
import torch
import torch.nn.functional as F

from lorasae.evals.common import batches, interval, progress, without_interval
from lorasae.evals.report import Table, line, with_interval
from lorasae.lora import base

MEASURES = {"cosine": "cosine similarity", "l2": "L2 distance"}
POSITIONS = {"all": "all positions", "without_0": "without position 0"}


@torch.no_grad()
def evaluate(setting):
    """{"layers": [..], "documents", "all" and "without_0": {"cosine" and "l2": a `summary`}}"""
    model, saes, documents = setting.model, setting.saes, setting.text.documents
    first = min(saes)
    changes = []
    for tokens in progress(batches(setting), "distances"):
        tokens = tokens.to(model.device)
        with base(model):
            original = list(outputs(model, tokens, first))
            before = compare(original, outputs(model, tokens, first, saes))
        changes.append(compare(original, outputs(model, tokens, first, saes)) - before)
    changes = torch.cat(changes, 2)

    numbers = {"layers": list(range(first, len(model.layers))),
               "documents": len(documents.unique())}
    for positions, of_measures in zip(POSITIONS, changes):
        numbers[positions] = {name: summary(change, documents)
                              for name, change in zip(MEASURES, of_measures)}
    return numbers


def outputs(model, tokens, first, saes={}):
    """Yields the output [B, T, D] of each block from `first` on, after its SAE."""
    special = model.special(tokens)
    x = model.run(model.embed(tokens), 0, first)
    for layer in range(first, len(model.layers)):
        x = model.run(x, layer, layer + 1, saes, special)
        yield x


def compare(original, changed):
    """Outputs of blocks -> fp64 [positions, measures, B, layers], means over the positions."""
    layers = []
    for a, b in zip(original, changed):
        a, b = a.float(), b.float()
        apart = torch.stack([F.cosine_similarity(a, b, -1), (a - b).norm(dim=-1)]).double()
        layers.append(torch.stack([apart.mean(-1), apart[..., 1:].mean(-1)]))
    return torch.stack(layers, -1).cpu()


def summary(changes, documents):
    """The changes of one measure due to adapting [n, layers] -> {"change", "ci90"}, per layer.

    change_after and ci90_after are for the mean over the blocks after the first SAE's block; None
    if there are none. A block before all adapters does not change: 0, without an interval.
    """
    change, half = zip(*(interval(values, documents) for values in changes.T))
    after, half_after = None, None
    if changes.shape[1] > 1:
        after, half_after = interval(changes[:, 1:].mean(1), documents)
    return {"change": change, "ci90": half, "change_after": after, "ci90_after": half_after}


def tables(numbers):
    columns = {f"{label}, {title}": numbers[positions][name]
               for positions, title in POSITIONS.items() for name, label in MEASURES.items()}
    rows = []
    for i, layer in enumerate(numbers["layers"]):
        changes = [with_interval(found["change"][i], found["ci90"][i], "+.4f")
                   for found in columns.values()]
        rows.append([f"block {layer}", *changes])
    has_intervals = numbers["all"]["l2"]["ci90"][-1] is not None
    notes = [] if has_intervals else [without_interval(numbers["documents"])]
    caption = "Distance to the base model's activations: effect of adapting (the paper's Figure 11)"
    return [Table(caption, ["output of", *columns], rows, notes)]


def draw(numbers, figure):
    """Figure 11: the change due to adapting, block by block."""
    after = range(len(numbers["layers"]))
    for axes, (name, label) in zip(figure.subplots(1, 2), MEASURES.items()):
        for positions, title in POSITIONS.items():
            found = numbers[positions][name]
            line(axes, after, zip(found["change"], found["ci90"]), title)
        axes.axhline(0, color="grey", linewidth=1)
        axes.set(xlabel="blocks after the SAE", ylabel=f"change in {label}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.suptitle("Distance to the base model's activations, SAE + LoRA minus SAE (the paper's "
                    "Figure 11); error bars: 90 %, over documents")
