"""What the latents of an SAE do on held-out text: how often each fires, where, and how strongly.

Shared by autointerp.py and latents.py. The text is cut as SAEBench cuts it: rows of 128 tokens, BOS first. The SAE only
reads the residual stream, and nothing is spliced in. BOS and EOS positions never count as firing.

Shapes: N rows, B of them at a time, T tokens a row, D d_model, M latents. A place is a position in the flattened rows:
n T + t.
"""
import shlex
from contextlib import nullcontext
from typing import NamedTuple

import torch

from lorasae.errors import InputError
from lorasae.evals.common import progress
from lorasae.lora import blocks_with_adapters, base

ROW = 128                                               # tokens a row, BOS included: SAEBench's
BATCH = 16                                              # rows at a time


class Rates(NamedTuple):
    """How often latents fire."""
    fired: torch.Tensor                                 # [M] tokens on which each fires
    total: torch.Tensor                                 # [M] the sum of its activations
    tokens: int                                       # tokens looked at, BOS and EOS not among them


class Firing(NamedTuple):
    """Where one latent fires: `places` [n], in order, and its activations there, `values` [n]."""
    places: torch.Tensor
    values: torch.Tensor


def as_model(model, name):
    """A context in which the model is the one of that name: "base" or "lora"."""
    return base(model) if name == "base" else nullcontext()


def reads_nothing_new(setting):
    """Whether every adapter comes after the first SAE's block, which then reads what it reads in the base model."""
    layer = next(iter(setting.saes))
    return all(block > layer for block in blocks_with_adapters(setting.model))


def refuse_nothing_new(setting, suite):
    """InputError where base and adapted model are bound to score the same in a suite that only reads the SAE."""
    if reads_nothing_new(setting):
        layer = next(iter(setting.saes))
        raise InputError(f"--suite {suite} would score base and adapted model exactly the same: it asks only what the SAE at "
                         f"layer {layer} reads, and every adapter of this run lies after it. Train one that has them on all "
                         f"blocks: {adapt_all(setting.config)}")


def adapt_all(config):
    """The command that trains a run like this one, with adapters on all blocks."""
    words = ["python", "train.py", "--model", config.model, "--layer", *map(str, config.layer)]
    if config.sae:
        words += ["--sae", *config.sae]
    for option in ("width", "l0"):
        if getattr(config, option, None):
            words += [f"--{option}", str(getattr(config, option))]
    return shlex.join([*words, "--adapt", "all"])


def check_latents(latents, sae, layer):
    """InputError where --latents names one that the SAE does not have."""
    for latent in latents:
        if not 0 <= latent < len(sae.W_dec):
            raise InputError(f"--latents {latent}: the SAE at layer {layer} has latents 0 to {len(sae.W_dec) - 1}")


def rows_of(corpus):
    """The held-out chunks [n, context] -> rows [N, T], each BOS and the next T - 1 tokens; T is 128 or the context.

    SAEBench overwrites every 128th token by BOS; here BOS is put before, and no token is lost.
    """
    chunks = corpus.held_out[:, 1:]
    length = min(ROW - 1, chunks.shape[1])
    text = chunks[:, :chunks.shape[1] // length * length].reshape(-1, length)
    return torch.cat([torch.full((len(text), 1), corpus.bos), text], 1)


@torch.no_grad()
def activations(model, sae, layer, rows, label):
    """Yields (number of the first row, latents [B, T, M], special [B, T]) over all rows; 0 at BOS and EOS."""
    starts = range(0, len(rows), BATCH)
    for start in progress(starts, label):
        tokens = rows[start:start + BATCH].to(model.device)
        special = model.special(tokens)

        x = model.run(model.embed(tokens), 0, layer + 1)
        z = sae.encode(x).masked_fill(special[..., None], 0)
        yield start, z, special


def rates(model, sae, layer, rows, label="firing rates"):
    """Rates of all latents over the rows."""
    fired = torch.zeros(len(sae.W_dec), dtype=torch.int64)
    total = torch.zeros(len(sae.W_dec), dtype=torch.float64)
    tokens = 0
    for _, z, special in activations(model, sae, layer, rows, label):
        fired += (z > 0).sum((0, 1)).cpu()
        total += z.sum((0, 1)).double().cpu()
        tokens += (~special).sum().item()
    return Rates(fired, total, tokens)


def firings(model, sae, layer, rows, latents, label="activations"):
    """{latent: Firing} of a list of latents over the rows: only where they fire is kept, a few places in a thousand."""
    places, which, values = [], [], []
    chosen = torch.tensor(latents, device=model.device)
    for start, z, _ in activations(model, sae, layer, rows, label):
        z = z[..., chosen].flatten(0, 1)
        place, column = (z > 0).nonzero(as_tuple=True)
        places.append(place.cpu() + start * rows.shape[1])
        which.append(column.cpu())
        values.append(z[place, column].float().cpu())

    # All pairs by latent; within a latent the places stay in order.
    places, which, values = torch.cat(places), torch.cat(which), torch.cat(values)
    order = which.sort(stable=True).indices
    counts = which.bincount(minlength=len(latents)).tolist()
    by_latent = zip(places[order].split(counts), values[order].split(counts))
    return {latent: Firing(*pair) for latent, pair in zip(latents, by_latent)}


def strongest(firing, length, count, apart, margin=0):
    """The `count` places where a latent fires hardest, the hardest first; fewer where it has not so many.

    length: T. Two of them in one row are more than `apart` tokens from each other; none is within `margin` of its ends.
    """
    column = firing.places % length
    allowed = (column >= margin) & (column < length - margin)
    places, values = firing.places[allowed], firing.values[allowed]

    chosen = []
    for place in places[values.argsort(descending=True, stable=True)].tolist():
        near = any(place // length == other // length and abs(place - other) <= apart for other in chosen)
        if not near:
            chosen.append(place)
        if len(chosen) == count:
            break
    return chosen


def pieces(tokenizer, tokens):
    """The text of each of the tokens (a list of ids); together it is the text that the tokenizer decodes.

    A character that is spread over several tokens stands at the last of them.
    """
    texts, done = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], skip_special_tokens=False)
        unfinished = text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens)
        texts.append("" if unfinished else text[len(done):])
        done = done if unfinished else text
    return texts
