"""A page about an SAE's latents: where each fires, what it does to the next token, and what adapting changed of that.

    python eval.py RUN_DIR --suite latents                      twenty latents: the best explained, else the hardest firing
    python eval.py RUN_DIR --suite latents --latents 17 204     those

writes RUN_DIR/eval-latents.html, one file that needs nothing else. Explanations are those of --suite autointerp, where that has
been run before. What the page says of a latent i with the decoder row v = W_dec[i]:

    firing rate     share of the held-out tokens with z_i > 0, in the base and in the adapted model
    direct effect   head (g ⊙ v), g the final norm's gain: the logits that v writes when the blocks after the SAE leave it
                    alone, up to the norm's positive factor 1/rms. No adapter can change it.
    effect          mean over its top passages of  y(x̂) - y(x̂ - z_i v),  y the next token's logits (soft-capped where the model
                    is) after the passage's strongest token: what they owe to the latent, through all blocks after the SAE.
                    x̂ is the SAE's reconstruction, spliced in; the latent is taken out everywhere but at BOS and EOS.
    use             KL(p(x̂) ‖ p(x̂ - z_i v)) there, in nats, p = softmax(y): how much the prediction depends on the latent

The softmax does not see a constant: effects are given less their mean over the vocabulary. The passages are the base model's strongest, one a row of 128 tokens; both models' effects are measured on them, so that they
differ by the adapters alone. Where adapters before the SAE change what it reads, passages that are among the strongest only
in the adapted model follow. Shapes: P passages, T tokens, D d_model, V vocabulary.
"""
from pathlib import Path

import torch

from lorasae.errors import InputError
from lorasae.evals import firing, page as html
from lorasae.evals.common import evaluating, progress
from lorasae.io.disk import read_json
from lorasae.linear import linear
from lorasae.runs.folder import print_table
from lorasae.sae import splice

SHOWN = 20                                              # latents where none are named
PASSAGES = 10                                           # of each
BEFORE, AFTER = 30, 15                                  # tokens shown around a passage's strongest
TOKENS = 10                                             # most raised, and as many most lowered
RARE = 0.01                                             # the hardest firing are chosen among those at most this frequent
NAMES = {"base": "base model", "lora": "adapted model"}


# ---- Effects on the next token ---------------------------------------------------------------------------------------

@torch.no_grad()
def direct_effect(model, v):
    """head (g ⊙ v) for a direction v [D] in the residual stream -> [V] fp32, mean 0: logits, up to the final norm's 1/rms."""
    gain = model.norm(torch.ones_like(v)[None])[0]      # the norm of ones is its gain: their rms is 1
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
    x = x[torch.arange(len(x)), torch.cat([at, at])]
    present, absent = model.logits(x[:, None])[:, 0].float().chunk(2)

    change = (present - absent).mean(0)
    log_p, log_q = present.log_softmax(-1), absent.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return change - change.mean(), kl.item()


def extremes(values, tokenizer):
    """The most raised and most lowered tokens of values [V]: {"raised": [[text, value], ..], "lowered": ..}."""
    def listed(found):
        return [[token_text(tokenizer, i), value] for value, i in zip(found.values.tolist(), found.indices.tolist())]

    count = min(TOKENS, len(values))
    return {"raised": listed(values.topk(count)), "lowered": listed(values.topk(count, largest=False))}


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
    """{character: byte} of byte-level BPE: printable Latin-1 stands for itself, other bytes for U+0100 and on, in order."""
    printable = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(0x100 + i): byte for i, byte in enumerate(others)}}


# ---- The evaluation --------------------------------------------------------------------------------------------------

def evaluate(setting, options):
    """All that the page shows of the first SAE's latents."""
    model, (layer, sae) = setting.model, next(iter(setting.saes.items()))
    rows = firing.rows_of(setting.corpus)
    explained = explanations(setting.folder, layer)
    names = ["base"] if firing.reads_nothing_new(setting) else ["base", "lora"]        # readings that differ

    with evaluating(model):
        rates, found = {}, {}
        for name in names:
            with firing.as_model(model, name):
                rates[name] = firing.rates(model, sae, layer, rows, f"firing rates, {name}")
        latents, how = choose_latents(options.latents, sae, layer, rates, explained)
        for name in names:
            with firing.as_model(model, name):
                found[name] = firing.firings(model, sae, layer, rows, latents, f"activations, {name}")

        out = []
        for latent in progress(latents, "effects"):
            places = {name: firing.strongest(found[name][latent], rows.shape[1], PASSAGES, apart=rows.shape[1])
                      for name in names}
            out.append({
                "latent": latent, "explanation": explained.get(latent),
                "rate": {name: rates[name].fired[latent].item() / rates[name].tokens for name in names},
                "direct": extremes(direct_effect(model, sae.W_dec[latent].to(model.head.dtype)), setting.corpus.tokenizer),
                "effect": effects(setting, layer, sae, latent, rows, places["base"]),
                "passages": passages({name: found[name][latent] for name in names}, places, rows, setting.corpus.tokenizer)})

    return {"run": Path(setting.folder).name, "layer": layer, "latents": len(sae.W_dec), "sae": type(sae).__name__,
            "tokens": rates["base"].tokens, "chosen": how, "adapted_blocks": firing.adapted_blocks(model), "rows": out}


def effects(setting, layer, sae, latent, rows, places):
    """{"base": extremes and "use", "lora": likewise, "agreement": the two effects' correlation}; None where it never fires."""
    if not places:
        return None
    model, length = setting.model, rows.shape[1]
    tokens = rows[[place // length for place in places]].to(model.device)
    at = torch.tensor([place % length for place in places], device=model.device)

    values, out = {}, {}
    for name in ("base", "lora") if firing.adapted_blocks(model) else ("base",):
        with firing.as_model(model, name):
            values[name], use = effect(model, sae, layer, latent, tokens, at)
        out[name] = {**extremes(values[name], setting.corpus.tokenizer), "use": use}
    if "lora" in values:
        out["agreement"] = torch.corrcoef(torch.stack([values["base"], values["lora"]]))[0, 1].nan_to_num().item()
    return out


def passages(found, places, rows, tokenizer):
    """The base model's strongest passages, then those that are among the strongest in the adapted model only."""
    length = rows.shape[1]
    activation = {}
    for name, (where, values) in found.items():
        activation[name] = dict(zip(where.tolist(), values.tolist()))

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
    """(latents, how they were chosen, in words)"""
    if named:
        firing.check_latents(named, sae, layer)
        return list(dict.fromkeys(named)), "named by --latents"
    base = rates["base"]
    norm = sae.W_dec.detach().float().norm(dim=1).double().cpu()
    strength = norm * base.total / base.fired.clamp(min=1)
    if explained:
        def rank(latent):
            return -explained[latent]["balanced"], -strength[latent].item()
        return sorted(explained, key=rank)[:SHOWN], "those that the judge predicts best (balanced accuracy, both models)"

    eligible = (base.fired >= PASSAGES) & (base.fired <= RARE * base.tokens)
    strength = torch.where(eligible, strength, 0)
    best = strength.topk(min(SHOWN, len(strength)))
    if not best.values[0] > 0:
        raise InputError(f"no latent fires on {PASSAGES} or more of {base.tokens:,} held-out tokens and at most {RARE:.0%}: "
                         "name some with --latents, or evaluate a run with more --eval-tokens")
    how = f"those that write hardest where they fire (mean z · |v|), of those that fire on at most {RARE:.0%} of the tokens"
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
        raise InputError(f"{path} was not written by --suite autointerp, or not by this version: run that again, or move the "
                         "file away") from None


def show(numbers):
    table = []
    for row in numbers["rows"]:
        cells = [str(row["latent"])]
        cells += [f"{row['rate'][name]:.3%}" if name in row["rate"] else "" for name in NAMES]
        for name in NAMES:
            found = (row["effect"] or {}).get(name)
            cells += [f"{found['use']:.3f}", " ".join(html.visible(text) for text, _ in found["raised"][:3])] if found else ["", ""]
        table.append(cells)
    print_table(table, [f"layer {numbers['layer']}", "fires, base", "adapted", "use, base", "raises", "use, adapted", "raises"])
    print(f"\nlatents: {numbers['chosen']}")
    print("use: KL (nats) between predictions with the latent and without it, on its strongest passages; raises: tokens whose "
          "logits it raises most")


# ---- The page --------------------------------------------------------------------------------------------------------

def page(numbers):
    """The numbers as a page of HTML."""
    title = f"Latents of {numbers['run']}, layer {numbers['layer']}"
    blocks = numbers["adapted_blocks"]
    about = (f"{len(numbers['rows'])} of the {numbers['latents']:,} latents of the {numbers['sae']} SAE at layer "
             f"{numbers['layer']}: {numbers['chosen']}. Firing rates and passages come from {numbers['tokens']:,} held-out tokens.")
    if blocks:
        about += f" Adapted blocks: {', '.join(map(str, blocks))}."
    parts = [html.heading(title), html.paragraph(about), *legend(numbers), overview(numbers)]
    return html.document(title, parts + [latent_section(row) for row in numbers["rows"]])


def legend(numbers):
    """What the words on the page mean."""
    blocks = numbers["adapted_blocks"]
    lines = [
        "Direct effect: the decoder row through the final norm's gain and the head, in logits up to the norm's positive factor; "
        "adapters do not change it.",
        "Effect: the next token's logits with the latent less those without it, through all blocks after the SAE: the mean over "
        "the base model's passages below, after their outlined token. The SAE is spliced in. All effects are relative to their "
        "mean over the vocabulary.",
        "Use: how far the next-token distribution with the latent is from that without it (KL, in nats), over the same passages.",
        "Passages: tokens are shaded by activation, the strongest is outlined; ↵ ends a line. In lists of tokens ␣ is a space, "
        "␣×8 eight of them."]
    if blocks and min(blocks) > numbers["layer"]:
        lines.append("All adapters come after the SAE: rates and activations are the same before and after adapting.")
    return [html.paragraph(line, quiet=True) for line in lines]


def overview(numbers):
    """A line for each latent, with a link to its section."""
    explained = any(row["explanation"] for row in numbers["rows"])
    headings = ["latent", "fires on"] + (["explanation"] if explained else []) + ["raises most"]
    rows = []
    for row in numbers["rows"]:
        cells = [html.link(str(row["latent"]), f"latent-{row['latent']}"), rate_text(row)]
        if explained:
            cells.append(html.words((row["explanation"] or {}).get("base", "")))
        raised = row["effect"]["base"]["raised"][:5] if row["effect"] else []
        rows.append([*cells, " ".join(html.token(text) for text, _ in raised)])
    return html.table(headings, rows, numbers=(1,))


def rate_text(row):
    """The share of tokens, before and after adapting where the two can differ."""
    return " → ".join(f"{row['rate'][name]:.3%}" for name in ("base", "lora") if name in row["rate"])


def latent_section(row):
    latent, effect = row["latent"], row["effect"]
    parts = [html.heading(f"Latent {latent}", 2, f"latent-{latent}"), *explanation_lines(row["explanation"]),
             html.paragraph(f"Fires on {rate_text(row)} of the tokens" +
                            (" (base → adapted)." if "lora" in row["rate"] else "."))]
    if effect is None:
        return html.section([*parts, html.paragraph("It fires nowhere in the held-out text.")])

    # Effects, side by side.
    columns = [effect_column("Direct effect", row["direct"])]
    for name in ("base", "lora"):
        if name in effect:
            columns.append(effect_column(f"Effect, {NAMES[name]}", effect[name]))
    parts += [html.columns(columns), html.paragraph(use_text(effect), quiet=True)]

    # Passages: the base model's, then those that only the adapted model ranks so high.
    passages = row["passages"]
    hottest = max(max(passage["activations"]) for passage in passages)
    for name, words in (("base", "Where it fires most"), ("lora", "Among the strongest only after adapting")):
        items = [passage_item(passage, hottest) for passage in passages if passage["strongest_in"] == name]
        if items:
            parts += [html.heading(words, 3), "\n".join(['<ol class="passages">', *items, "</ol>"])]
    return html.section(parts)


def use_text(effect):
    text = f"Use: {effect['base']['use']:.3f} nats"
    if "lora" in effect:
        text += (f" in the base, {effect['lora']['use']:.3f} in the adapted model; over the vocabulary their effects correlate "
                 f"with r = {effect['agreement']:.3f}")
    return text + "."


def explanation_lines(explanation):
    if explanation is None:
        return []
    lines = [html.paragraph(f"Explanation: {explanation['base']}")]
    if explanation["lora"] != explanation["base"]:
        lines.append(html.paragraph(f"After adapting: {explanation['lora']}"))
    return lines + [html.paragraph(f"By: {explanation['judge']}. Balanced accuracy {explanation['balanced']:.2f}, where 0.50 is a "
                                   "constant answer's.", quiet=True)]


def effect_column(title, found):
    lists = [html.paragraph(verb, quiet=True) + html.tokens(found[side])
             for verb, side in (("raises", "raised"), ("lowers", "lowered"))]
    return html.heading(title, 3) + html.pair(lists)


def passage_item(passage, hottest):
    peaks = [passage["peak"][name] for name in ("base", "lora") if name in passage["peak"]]
    label = "activation " + " → ".join(f"{peak:.2f}" for peak in peaks)
    text = html.passage(passage["tokens"], passage["activations"], hottest, passage["at"])
    return f"<li>{html.paragraph(label, quiet=True)}{text}</li>"
