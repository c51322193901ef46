"""Does the adapted model compute what the original did? (paper §6.2, Figure 11)

    python eval.py RUN_DIR --suite distances

For the output of every block from the first SAE's on, a in the original model without SAE and b
with the SAEs spliced in, without and with adapters: cos(a, b) and ‖a - b‖₂, means over the
positions of a sequence. The change that adapting makes is paired by sequence, and its interval is
90 %, over documents. At position 0 the residual stream can be hundreds of times longer than
elsewhere and swamp the mean distance, so everything is given over all positions, as in the paper,
and again without position 0.
"""
import torch
import torch.nn.functional as F

from lorasae.evals.common import (count_documents, error_bar, evaluating, interval, plus_minus,
                                  print_table, progress, without_interval)
from lorasae.lora import base

MEASURES = {"cosine": "cosine similarity", "l2": "L2 distance"}
POSITIONS = {"all": "all positions", "without_0": "without position 0"}


def evaluate(setting, options):
    batches = setting.text.held_out.split(setting.config.eval_batch)
    return measure(setting.model, setting.saes, batches, setting.text.documents)


@torch.no_grad()
def measure(model, saes, batches, documents=None):
    """Over batches of tokens [B, T] -> {"layers": [..], "sequences": n, "documents", and for "all"
    and "without_0": {"cosine" and "l2": {"sae", "adapted", "change", "ci90": [one per layer]}}}.

    documents: [n] int, the document of each sequence; None: each sequence is one of its own.
    """
    first = min(saes)
    found = {"sae": [], "adapted": []}
    with evaluating(model):
        for tokens in progress(batches, "distances"):
            tokens = tokens.to(model.device)
            with base(model):
                original = list(outputs(model, tokens, first))
                found["sae"].append(compare(original, outputs(model, tokens, first, saes)))
            found["adapted"].append(compare(original, outputs(model, tokens, first, saes)))
    # [n sequences, layers, positions, measures]
    sae, adapted = torch.cat(found["sae"]), torch.cat(found["adapted"])

    numbers = {
        "layers": list(range(first, len(model.layers))),
        "sequences": len(sae),
        "documents": len(sae) if documents is None else count_documents(documents),
    }
    for i, positions in enumerate(POSITIONS):
        numbers[positions] = {}
        for j, measure in enumerate(MEASURES):
            a, b = sae[:, :, i, j], adapted[:, :, i, j]
            change, half = zip(*(interval(column, documents) for column in (b - a).T))
            numbers[positions][measure] = {
                "sae": a.mean(0).tolist(),
                "adapted": b.mean(0).tolist(),
                "change": list(change),
                "ci90": list(half),
            }
    return numbers


def outputs(model, tokens, first, saes={}):
    """Yields the output [B, T, D] of each block from `first` on, after its SAE."""
    special = model.special(tokens)
    x = model.run(model.embed(tokens), 0, first)
    for layer in range(first, len(model.layers)):
        x = model.run(x, layer, layer + 1, saes, special)
        yield x


def compare(original, changed):
    """-> [B, layers, 2, 2] fp64: mean cosine and distance, over all positions and after 0."""
    layers = []
    for a, b in zip(original, changed):
        a, b = a.float(), b.float()
        cosine = F.cosine_similarity(a, b, -1)
        distance = (a - b).norm(dim=-1)
        layers.append(torch.stack([cosine, distance], -1))                  # [B, T, 2]
    by_token = torch.stack(layers, 1).double()
    everywhere = by_token.mean(2)
    after_0 = by_token[:, :, 1:].mean(2)
    return torch.stack([everywhere, after_0], 2).cpu()


def show(numbers):
    for positions, title in POSITIONS.items():
        print(f"distance to the original activations, {title}")
        rows = [[f"block {layer}"] for layer in numbers["layers"]]
        for i, row in enumerate(rows):
            for side in (numbers[positions][measure] for measure in MEASURES):
                change = f"{side['change'][i]:+.4f}"
                row += [side["sae"][i], side["adapted"][i], change, plus_minus(side["ci90"][i])]
        headings = ["SAE + LoRA", "change", "90 % CI"]
        print_table(rows, ["", "cosine, SAE", *headings, "L2, SAE", *headings])
    if not has_intervals(numbers):
        print(f"\n{without_interval(numbers['documents'])}")


def has_intervals(numbers):
    return numbers["all"]["l2"]["ci90"][0] is not None


def draw(numbers, figure):
    """Figure 11: the change that adapting makes, block by block."""
    figure.set_size_inches(9, 3.4)
    after = [layer - numbers["layers"][0] for layer in numbers["layers"]]
    for axes, (measure, label) in zip(figure.subplots(1, 2), MEASURES.items()):
        for positions, name in POSITIONS.items():
            values = torch.tensor(numbers[positions][measure]["change"])
            half = torch.tensor([error_bar(half) for half in numbers[positions][measure]["ci90"]])
            axes.plot(after, values, marker="o", label=name)
            axes.fill_between(after, values - half, values + half, alpha=0.25)
        axes.axhline(0, color="grey", linewidth=1)
        axes.set(xlabel="blocks after the SAE", ylabel=f"change in {label}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    title = "Distance to the original activations, SAE + LoRA minus SAE (the paper's Figure 11)"
    if has_intervals(numbers):
        title += ", 90 % intervals over documents"
    figure.suptitle(title, fontsize=10)
