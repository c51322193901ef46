"""Generating text with SAEs spliced in, one token at a time: only new positions are computed.

    tokens = lorasae.encode("tiny-gemma-2", "def area(")
    lorasae.generate(model, tokens, 20, saes)

Shapes: B prompts, T tokens, V vocabulary.
"""
import torch

from lorasae.attention import Cache
from lorasae.linear import linear_fp32
from lorasae.objectives import capped


@torch.no_grad()
def generate(model, tokens, count, saes={}, temperature=0, generator=None, lengths=None, stop=None):
    """Continues prompts [B, T] by up to `count` tokens -> [B, T + count or less], padded with EOS.

    saes: {layer: SAE}; they act on the new positions too. temperature: 0 takes the likeliest token;
    any other value samples, using `generator` (a torch.Generator on the model's device) if given.

    lengths: the length of each prompt, if they differ. stop(row, ids): whether a row ends after
    these new ids; by default, it ends at EOS (config.json's first).
    """
    eos = model.config.eos_token_id
    stop = stop or (lambda row, ids: ids[-1] == eos)

    # All rows start where the shortest prompt ends. Longer prompts continue with their own tokens.
    B, T = tokens.shape
    lengths = lengths or [T] * B
    rows = [ids[:length] for ids, length in zip(tokens.tolist(), lengths)]
    cache, ended = Cache(), set()
    for position in range(min(lengths), T + count):
        # Run only the tokens that are not in the cache yet.
        unread = [ids[cache.length():position] for ids in rows]
        x = model.residual(torch.tensor(unread, device=model.device), saes, cache)
        logits = fp32_logits(model, x[:, -1])

        for row, token in enumerate(pick(logits, temperature, generator)):
            if row in ended:
                rows[row].append(eos)
            elif position >= lengths[row]:
                rows[row].append(token if count else eos)
                new = rows[row][lengths[row]:]
                if stop(row, new) or len(new) == count:
                    ended.add(row)
        if len(ended) == B:
            break
    return torch.tensor(rows, device=tokens.device)


def fp32_logits(model, x):
    """Residual stream after the last block [N, D] -> fp32 logits [N, V]; bf16 ones would tie."""
    return capped(linear_fp32(model.norm(x), model.head), model.softcap)


def pick(logits, temperature, generator):
    """logits [B, V] -> one token per row."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    p = (logits / temperature).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0].tolist()
