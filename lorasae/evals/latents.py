"""A page about an SAE's latents: where each fires, what it does to the next token, and what adapting changed of that.

    python eval.py RUN_DIR --suite latents                      twenty: the best explained, else the hardest firing
    python eval.py RUN_DIR --suite latents --latents 17 204     those

writes RUN_DIR/eval-latents.html, one file that needs nothing else. Explanations are those of --suite autointerp, where
that has been run before. What the page says of a latent i with the decoder row v = W_dec[i]:

    firing rate     share of the held-out tokens with z_i > 0, in the base and in the adapted model
    direct effect   head (g ⊙ v), g the final norm's gain: the logits that v writes when the blocks after the SAE
                    leave it alone, up to the norm's positive factor 1/rms. No adapter can change it.
    effect          mean over its top passages of  y(x̂) - y(x̂ - z_i v),  y the next token's logits (soft-capped where
                    the model is) after the passage's strongest token: what they owe to the latent, through all blocks
                    after the SAE. x̂ is the SAE's reconstruction, spliced in; the latent is taken out everywhere but
                    at BOS and EOS.
    use             mean of  KL(p(x̂) ‖ p(x̂ - z_i v))  there, p = softmax(y), in nats: how much the prediction depends
                    on the latent

The softmax does not see a constant: effects are given less their mean over the vocabulary. The passages are the base
model's strongest, one a row of 128 tokens; both models' effects are measured on them, so that they differ by the
adapters alone. Where adapters before the SAE change what it reads, passages that are among the strongest only in the
adapted model follow. Shapes: P passages, T tokens, D d_model, V vocabulary.
"""
from pathlib import Path

import torch

from lorasae.errors import InputError
from lorasae.evals import firing, latents_page
from lorasae.evals.common import evaluating, print_table, progress
from lorasae.evals.page import visible
from lorasae.io.files import read_json
from lorasae.linear import linear
from lorasae.lora import blocks_with_adapters
from lorasae.sae import splice

SHOWN = 20                                              # latents where none are named
PASSAGES = 10                                           # of each
BEFORE, AFTER = 30, 15                                  # tokens shown around a passage's strongest
TOKENS = 10                                             # most raised, and as many most lowered
RARE = 0.01             # the hardest firing are chosen among those no more frequent

page = latents_page.page                                # eval.py writes it as eval-latents.html


# ---- Effects on the next token -------------------------------------------------------------------

@torch.no_grad()
def direct_effect(model, v):
    """head (g ⊙ v) for a direction v [D] in the residual stream -> [V] fp32, mean 0: logits, up to a factor 1/rms."""
    gain = model.norm(torch.ones_like(v)[None])[0]    # the norm of ones is its gain: their rms is 1
    logits = linear((gain * v)[None], model.head)[0].float()
    return logits - logits.mean()


@torch.no_grad()
def effect(model, sae, layer, latent, tokens, at):
    """What a latent does to the next token, over passages -> (mean of y(x̂) - y(x̂ - z_i v) [V] fp32, mean 0; mean KL).

    tokens [P, T]; at [P]: the position in each after which the next token is predicted.
    """
    special = model.special(tokens)
    x = model.run(model.embed(tokens), 0, layer + 1)
    z = sae.encode(x)[..., latent].masked_fill(special, 0)

    reconstruction = splice(x, sae, special)
    written = (z[..., None] * sae.W_dec[latent]).to(x.dtype)
    both = torch.cat([reconstruction, reconstruction - written])

    x = model.run(both, layer + 1, len(model.layers))
    x = x[torch.arange(len(x), device=x.device), torch.cat([at, at])]
    present, absent = model.logits(x[:, None])[:, 0].float().chunk(2)

    change = (present - absent).mean(0)
    log_p, log_q = present.log_softmax(-1), absent.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return change - change.mean(), kl.item()


def extremes(values, tokenizer):
    """The most raised and most lowered tokens of values [V]: {"raised": [[text, value], ..], "lowered": ..}."""
    count, out = min(TOKENS, len(values)), {}
    for side, largest in (("raised", True), ("lowered", False)):
        best = values.topk(count, largest=largest)
        pairs = zip(best.indices.tolist(), best.values.tolist())
        out[side] = [[token_text(tokenizer, token), value] for token, value in pairs]
    return out


def token_text(tokenizer, token):
    """A token as text; its bytes as \\xe2\\x80 where they are a part of a character, its id where it has no text."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    if text and "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    name = tokenizer.id_to_token(token)
    if name is None:
        return f"(id {token})"
    alphabet = byte_alphabet()
    if name and all(character in alphabet for character in name):
        return "".join(f"\\x{alphabet[character]:02x}" for character in name)
    return name or f"(id {token})"


def byte_alphabet():
    """{character: byte} of byte-level BPE: printable Latin-1 stands for itself, U+0100 and on for the others."""
    printable = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(others):
        alphabet[chr(0x100 + i)] = byte
    return alphabet


# ---- The evaluation ------------------------------------------------------------------------------

def evaluate(setting, options):
    """All that the page shows of the first SAE's latents."""
    model, tokenizer = setting.model, setting.text.tokenizer
    layer, sae = next(iter(setting.saes.items()))
    rows = firing.rows_of(setting.text)
    explained = explanations(setting.folder, layer)
    names = ["base"] if firing.reads_nothing_new(setting) else ["base", "lora"]        # the readings that differ

    with evaluating(model):
        # What fires how often, and where.
        rates, found = {}, {}
        for name in names:
            with firing.as_model(model, name):
                rates[name] = firing.rates(model, sae, layer, rows, f"firing rates, {name}")
        latents, how = choose_latents(options.latents, sae, layer, rates["base"], explained)
        for name in names:
            with firing.as_model(model, name):
                found[name] = firing.firings(model, sae, layer, rows, latents, f"activations, {name}")

        # Each latent's passages, and its effects there.
        out = []
        for latent in progress(latents, "effects"):
            firings = {name: found[name][latent] for name in names}
            places = {name: strongest_passages(firings[name], rows) for name in names}
            direct = direct_effect(model, sae.W_dec[latent].to(model.head.dtype))
            out.append({
                "latent": latent,
                "explanation": explained.get(latent),
                "rate": {name: rates[name].fired[latent].item() / rates[name].tokens for name in names},
                "direct": extremes(direct, tokenizer),
                "effect": effects(setting, layer, sae, latent, rows, places["base"]),
                "passages": passages(firings, places, rows, tokenizer)})

    return {"run": Path(setting.folder).name, "layer": layer, "latents": len(sae.W_dec), "sae": type(sae).__name__,
            "tokens": rates["base"].tokens, "chosen": how, "adapted_blocks": blocks_with_adapters(model), "rows": out}


def strongest_passages(found, rows):
    """The places where a latent fires hardest, one a row of the text."""
    length = rows.shape[1]
    return firing.strongest(found, length, PASSAGES, apart=length)


def effects(setting, layer, sae, latent, rows, places):
    """{"base": extremes and "use", "lora": likewise, "agreement": the effects' correlation}; None if it never fires."""
    if not places:
        return None
    model, length = setting.model, rows.shape[1]
    tokens = rows[[place // length for place in places]].to(model.device)
    at = torch.tensor([place % length for place in places], device=model.device)

    values, out = {}, {}
    for name in ("base", "lora") if blocks_with_adapters(model) else ("base",):
        with firing.as_model(model, name):
            values[name], use = effect(model, sae, layer, latent, tokens, at)
        out[name] = {**extremes(values[name], setting.text.tokenizer), "use": use}
    if "lora" in values:
        out["agreement"] = torch.corrcoef(torch.stack([values["base"], values["lora"]]))[0, 1].nan_to_num().item()
    return out


def passages(found, places, rows, tokenizer):
    """The base model's strongest passages, then those that are among the strongest in the adapted model only."""
    length = rows.shape[1]
    activation = {name: dict(zip(where.tolist(), values.tolist())) for name, (where, values) in found.items()}

    out, listed = [], set()
    for name in found:
        new = [place for place in places[name] if place not in listed]
        listed |= set(new)
        for place in new:
            row, at = divmod(place, length)                             # column 0 is BOS
            first, last = max(1, at - BEFORE), min(length, at + AFTER + 1)
            here = range(row * length + first, row * length + last)
            out.append({
                "strongest_in": name, "at": at - first,
                "tokens": firing.pieces(tokenizer, rows[row, first:last].tolist()),
                "activations": [round(activation[name].get(i, 0.0), 4) for i in here],
                "peak": {other: round(activation[other].get(place, 0.0), 4) for other in found}})
    return out


def choose_latents(named, sae, layer, rates, explained):
    """(latents, how they were chosen, in words). rates: the base model's."""
    if named:
        firing.check_latents(named, sae, layer)
        return list(dict.fromkeys(named)), "named by --latents"

    # How hard a latent writes where it fires: mean z · |v|.
    norm = sae.W_dec.detach().float().norm(dim=1).double().cpu()
    strength = norm * rates.total / rates.fired.clamp(min=1)
    if explained:
        def rank(latent):
            return -explained[latent]["balanced"], -strength[latent].item()

        best = sorted(explained, key=rank)[:SHOWN]
        return best, "those that the judge predicts best (balanced accuracy, both models)"

    eligible = (rates.fired >= PASSAGES) & (rates.fired <= RARE * rates.tokens)
    strength = torch.where(eligible, strength, 0)
    best = strength.topk(min(SHOWN, len(strength)))
    if not best.values[0] > 0:
        raise InputError(f"no latent fires on {PASSAGES} or more of {rates.tokens:,} held-out tokens and at most "
                         f"{RARE:.0%}: name some with --latents, or evaluate a run with more --eval-tokens")
    how = f"those that write hardest where they fire (mean z · |v|), of those that fire on at most {RARE:.0%} of tokens"
    return best.indices[best.values > 0].tolist(), how


def explanations(folder, layer):
    """{latent: {"base", "lora", "judge", "balanced"}} of the run's eval-autointerp.json; {} where there is none."""
    path = Path(folder) / "eval-autointerp.json"
    if not path.exists():
        return {}
    numbers = read_json(path)
    try:
        if numbers["layer"] != layer:
            return {}
        out = {}
        for row in numbers["rows"]:
            scores = row["balanced"]["base"] + row["balanced"]["lora"]
            out[int(row["latent"])] = {**row["explanation"], "judge": numbers["judge"],
                                       "balanced": sum(scores) / len(scores)}
        return out
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path} was not written by --suite autointerp, or not by this version: run that again, or "
                         "move the file away") from None


def show(numbers):
    table = []
    for row in numbers["rows"]:
        cells = [str(row["latent"])]
        for name in ("base", "lora"):
            rate = row["rate"].get(name)
            cells.append("" if rate is None else f"{rate:.3%}")
        for name in ("base", "lora"):
            found = (row["effect"] or {}).get(name)
            cells += [f"{found['use']:.3f}", first_tokens(found["raised"])] if found else ["", ""]
        table.append(cells)

    print_table(table, [f"layer {numbers['layer']}", "fires, base", "adapted", "use, base", "raises", "use, adapted",
                        "raises"])
    print(f"\nlatents: {numbers['chosen']}")
    print("use: KL (nats) between predictions with the latent and without it, on its strongest passages; raises: the "
          "tokens whose logits it raises most")


def first_tokens(raised, count=3):
    return " ".join(visible(text) for text, _ in raised[:count])
