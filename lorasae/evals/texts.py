"""Texts as the SAE reads them: activations in batches, and means over each text.

The SAE only reads the residual stream x at the output of its block; nothing is spliced in.

Shapes: N texts, B of them at a time, T tokens, D d_model, M latents.
"""
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

LENGTH = 128                                            # tokens per text with BOS, as in SAEBench
BATCH = 16                                              # texts at a time


class Cut(NamedTuple):
    """Labelled texts, {class: [str]}, for training and testing; no file or row is on both.

    SCR has quadrants (class, attribute) instead, in this order: (P, m), (P, f), (N, m), (N, f).
    """
    train: dict
    test: dict


class Means(NamedTuple):
    """Each text's means over its tokens, fp32. BOS and EOS do not count."""
    residual: torch.Tensor                              # [N, D]
    latents: torch.Tensor                               # [N, M]


def tokenise(text, classes):
    """{class: [str]} -> each string's token ids, at most LENGTH with BOS. text: the run's Text."""
    strings = [string for of_class in classes.values() for string in of_class]
    encodings = text.tokenizer.encode_batch(strings, add_special_tokens=False)
    return [[text.bos, *encoding.ids[:LENGTH - 1]] for encoding in encodings]


@torch.no_grad()
def activations(model, sae, layer, rows):
    """Yields (indices of rows, tokens [B, T], x [B, T, D]) for all rows of token ids, in batches.

    Rows are sorted by length (stably) and padded with EOS on the right, unseen by a causal model.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), BATCH):
        chosen = order[start:start + BATCH]
        tensors = [torch.as_tensor(rows[i]) for i in chosen]
        tokens = pad_sequence(tensors, True, model.config.eos_token_id).to(model.device)
        yield chosen, tokens, model.read(tokens, sae, layer)


def latents_of(model, sae, layer, rows):
    """Yields latents [B, T, M] for each batch of rows of token ids; 0 at BOS and EOS."""
    for _, tokens, x in activations(model, sae, layer, rows):
        yield sae.encode(x).masked_fill(model.special(tokens)[..., None], 0)


def read_means(model, sae, layer, rows):
    """The Means of rows of token ids, on the model's device."""
    residual = torch.empty(len(rows), sae.W_dec.shape[1], device=model.device)
    latents = torch.empty(len(rows), len(sae.W_dec), device=model.device)
    for chosen, tokens, x in activations(model, sae, layer, rows):
        counted = ~model.special(tokens)
        weights = (counted / counted.sum(1, keepdim=True).clamp(min=1))[:, None]        # [B, 1, T]
        residual[chosen] = (weights @ x.float()).squeeze(1)
        latents[chosen] = (weights @ sae.encode(x).float()).squeeze(1)
    return Means(residual, latents)
