"""On which tokens of the held-out text an SAE's latents fire, for autointerp.py.

The text is cut as SAEBench cuts it: rows of 128 tokens, BOS first. The SAE only reads the residual
stream; nothing is spliced in. BOS and EOS positions never count as firing.

Shapes: N rows, B of them at a time, T tokens per row, D d_model, M latents.
"""
import torch

from lorasae.errors import InputError
from lorasae.evals.common import progress
from lorasae.lora import blocks_with_adapters

ROW = 128                               # tokens per row, with BOS: SAEBench's
BATCH = 16                              # rows at a time


def refuse_nothing_new(setting, suite):
    """InputError if a suite that only reads the SAE must find the same in both models.

    That is so if all adapters come after the first SAE's block: its input is then the base model's.
    """
    layer = next(iter(setting.saes))
    if all(block > layer for block in blocks_with_adapters(setting.model)):
        raise InputError(f"--suite {suite} would give the base and the adapted model exactly the "
                         f"same score: it only reads the SAE at layer {layer}, and all adapters of "
                         "this run come after it. Train a run with --adapt all")


def rows_of(text):
    """Held-out chunks [n, context] -> rows [N, T]: BOS and the next T - 1 tokens of a chunk.

    T is 128, or the context if that is shorter. SAEBench overwrites every 128th token with BOS;
    here BOS is inserted, and no token is lost.
    """
    chunks = text.held_out[:, 1:]
    length = min(ROW - 1, chunks.shape[1])
    rows = chunks.unfold(1, length, length).flatten(0, 1)
    return torch.cat([torch.full((len(rows), 1), text.bos), rows], 1)


@torch.no_grad()
def activations(model, sae, layer, rows, label):
    """Yields latents [B T, M] for each batch of rows; 0 at BOS and EOS."""
    for batch in progress(rows.split(BATCH), label):
        tokens = batch.to(model.device)
        x = model.read(tokens, sae, layer)
        z = sae.encode(x).masked_fill(model.special(tokens)[..., None], 0)
        yield z.flatten(0, 1)


def times_fired(model, sae, layer, rows, label):
    """On how many tokens of the rows each latent fires, [M] int64."""
    return sum((z > 0).sum(0).cpu() for z in activations(model, sae, layer, rows, label))


def firings(model, sae, layer, rows, label, latents):
    """The activations of some latents at every token, [len(latents), N T], sparse."""
    parts = []
    for z in activations(model, sae, layer, rows, label):
        parts.append(z[:, latents].T.float().cpu().to_sparse())
    return torch.cat(parts, 1).coalesce()
