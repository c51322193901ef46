"""Does the adapted model compute what the original did? (paper §6.2, Figure 11)

    python eval.py RUN_DIR --suite distances

For the output of every block from the first SAE's on, a in the original model without SAE and b with the SAEs spliced
in, without and with adapters: cos(a, b) and ‖a - b‖₂, means over the positions of a sequence. The change that adapting
makes is paired by sequence, its interval 90 %. At position 0 the residual stream can be hundreds of times longer than
elsewhere and swamp the mean distance: so all is given over all positions, as in the paper, and without position 0.
"""
import torch
import torch.nn.functional as F

from lorasae.io.corpus import special_mask
from lorasae.evals.common import evaluating, interval, plus_minus, progress
from lorasae.lora import base
from lorasae.runs.folder import print_table

MEASURES = {"cosine": "cosine similarity", "l2": "L2 distance"}
POSITIONS = {"all": "all positions", "without_0": "without position 0"}


@torch.no_grad()
def evaluate(model, saes, batches, keep_special=False):
    """Over batches of tokens [B, T]: {"layers": [..], and for "all" and "without_0": {"cosine" and "l2": {"sae",
    "adapted", "change", "ci90": a value a layer}}}."""
    first, found = min(saes), {"sae": [], "adapted": []}
    with evaluating(model):
        for tokens in progress(batches, "distances"):
            tokens = tokens.to(model.device)
            special = special_mask(tokens, model.config.bos_token_id, model.config.eos_token_id)
            keep = special if keep_special else None
            with base(model):
                original = list(outputs(model, tokens, first))
                found["sae"].append(compare(original, outputs(model, tokens, first, saes, keep)))
            found["adapted"].append(compare(original, outputs(model, tokens, first, saes, keep)))
    sae, adapted = (torch.cat(found[name]) for name in found)               # [n sequences, layers, positions, measures]
    numbers = {"layers": list(range(first, len(model.layers))), "sequences": len(sae)}
    for i, positions in enumerate(POSITIONS):
        numbers[positions] = {}
        for j, measure in enumerate(MEASURES):
            a, b = sae[:, :, i, j], adapted[:, :, i, j]
            change, half = zip(*(interval(column) for column in (b - a).T))
            numbers[positions][measure] = {"sae": a.mean(0).tolist(), "adapted": b.mean(0).tolist(),
                                           "change": list(change), "ci90": list(half)}
    return numbers


def outputs(model, tokens, first, saes={}, keep=None):
    """Yields the output [B, T, D] of each block from `first` on, after its SAE."""
    x = model.run(model.embed(tokens), 0, first)
    for layer in range(first, len(model.layers)):
        x = model.run(x, layer, layer + 1, saes, keep)
        yield x


def compare(original, changed):
    """-> [B, layers, 2, 2] fp64: the mean cosine and distance, over all positions and over those after 0."""
    pairs = [(a.float(), b.float()) for a, b in zip(original, changed)]
    both = [torch.stack([F.cosine_similarity(a, b, -1), (a - b).norm(dim=-1)], -1) for a, b in pairs]   # [B, T, 2] each
    by_token = torch.stack(both, 1).double()
    return torch.stack([by_token.mean(2), by_token[:, :, 1:].mean(2)], 2).cpu()


def show(numbers):
    for positions, title in POSITIONS.items():
        print(f"distance to the original activations, {title}")
        rows = [[f"block {layer}"] for layer in numbers["layers"]]
        for i, row in enumerate(rows):
            for side in (numbers[positions][measure] for measure in MEASURES):
                row += [side["sae"][i], side["adapted"][i], f"{side['change'][i]:+.4f}", plus_minus(side["ci90"][i])]
        headings = ["SAE + LoRA", "change", "90 % CI"]
        print_table(rows, ["", "cosine, SAE", *headings, "L2, SAE", *headings])


def draw(numbers, figure):
    """Figure 11: the change that adapting makes, block by block."""
    figure.set_size_inches(9, 3.4)
    after = [layer - numbers["layers"][0] for layer in numbers["layers"]]
    for axes, (measure, label) in zip(figure.subplots(1, 2), MEASURES.items()):
        for positions, name in POSITIONS.items():
            values = torch.tensor(numbers[positions][measure]["change"])
            half = torch.tensor([width or 0 for width in numbers[positions][measure]["ci90"]])
            axes.plot(after, values, marker="o", label=name)
            axes.fill_between(after, values - half, values + half, alpha=0.25)
        axes.axhline(0, color="grey", linewidth=1)
        axes.set(xlabel="blocks after the SAE", ylabel=f"change in {label}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.suptitle("Distance to the original activations, SAE + LoRA minus SAE, 90 % intervals (the paper's Figure 11)",
                    fontsize=10)
