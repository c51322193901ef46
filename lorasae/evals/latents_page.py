"""The page that --suite latents writes, from the numbers of latents.py: an overview, then a section for each latent."""
from lorasae.evals import page as html

NAMES = {"base": "base model", "lora": "adapted model"}


def page(numbers):
    """The numbers as a page of HTML."""
    title = f"Latents of {numbers['run']}, layer {numbers['layer']}"
    blocks = numbers["adapted_blocks"]
    about = (f"{len(numbers['rows'])} of the {numbers['latents']:,} latents of the {numbers['sae']} SAE at layer "
             f"{numbers['layer']}: {numbers['chosen']}. Firing rates and passages come from {numbers['tokens']:,} "
             "held-out tokens.")
    if blocks:
        about += f" Adapted blocks: {', '.join(map(str, blocks))}."
    parts = [html.heading(title), html.paragraph(about), *legend(numbers), overview(numbers)]
    return html.document(title, parts + [latent_section(row) for row in numbers["rows"]])


def legend(numbers):
    """What the words on the page mean."""
    blocks = numbers["adapted_blocks"]
    lines = [
        "Direct effect: the decoder row through the final norm's gain and the head, in logits up to the norm's "
        "positive factor; adapters do not change it.",
        "Effect: the next token's logits with the latent less those without it, through all blocks after the SAE: the "
        "mean over the base model's passages below, after their outlined token. The SAE is spliced in. All effects are "
        "relative to their mean over the vocabulary.",
        "Use: how far the next-token distribution with the latent is from that without it (KL, in nats), over the same "
        "passages.",
        "Passages: tokens are shaded by activation, the strongest is outlined; ↵ ends a line. In lists of tokens ␣ is "
        "a space, ␣×8 eight of them."]
    if blocks and min(blocks) > numbers["layer"]:
        lines.append("All adapters come after the SAE: rates and activations are the same before and after adapting.")
    return [html.paragraph(line, quiet=True) for line in lines]


def overview(numbers):
    """A line for each latent, with a link to its section."""
    explained = any(row["explanation"] for row in numbers["rows"])
    rows = []
    for row in numbers["rows"]:
        cells = [html.link(str(row["latent"]), f"latent-{row['latent']}"), html.words(rate_text(row))]
        if explained:
            explanation = row["explanation"] or {}
            cells.append(html.words(explanation.get("base", "")))
        raised = row["effect"]["base"]["raised"][:5] if row["effect"] else []
        cells.append(" ".join(html.token(text) for text, _ in raised))
        rows.append(cells)

    headings = ["latent", "fires on", "explanation", "raises most"]
    if not explained:
        headings.remove("explanation")
    return html.table(headings, rows, numbers=(1,))


def rate_text(row):
    """The share of tokens, before and after adapting where the two can differ."""
    return " → ".join(f"{rate:.3%}" for rate in row["rate"].values())


def latent_section(row):
    """All about one latent."""
    latent = row["latent"]
    parts = [html.heading(f"Latent {latent}", 2, f"latent-{latent}")]
    parts += explanation_lines(row["explanation"])
    models = " (base → adapted)" if "lora" in row["rate"] else ""
    parts.append(html.paragraph(f"Fires on {rate_text(row)} of the tokens{models}."))
    if row["effect"]:
        parts += effect_lists(row["direct"], row["effect"])
    if row["passages"]:
        parts += passage_lists(row["passages"])
    else:
        parts.append(html.paragraph("It fires nowhere in the held-out text."))
    return html.section(parts)


def effect_lists(direct, effect):
    """The effects, side by side."""
    lists = [effect_column("Direct effect", direct)]
    for name in ("base", "lora"):
        if name in effect:
            lists.append(effect_column(f"Effect, {NAMES[name]}", effect[name]))
    return [html.columns(lists), html.paragraph(use_text(effect), quiet=True)]


def passage_lists(passages):
    """The base model's passages, then those that only the adapted model ranks so high."""
    hottest = max(max(passage["activations"]) for passage in passages)
    parts = []
    for name, words in (("base", "Where it fires most"), ("lora", "Among the strongest only after adapting")):
        items = [passage_item(passage, hottest) for passage in passages if passage["strongest_in"] == name]
        if items:
            parts += [html.heading(words, 3), html.listing("passages", "ol", items)]
    return parts


def use_text(effect):
    text = f"Use: {effect['base']['use']:.3f} nats"
    if "lora" in effect:
        text += (f" in the base, {effect['lora']['use']:.3f} in the adapted model; over the vocabulary their effects "
                 f"correlate with r = {effect['agreement']:.3f}")
    return text + "."


def explanation_lines(explanation):
    if explanation is None:
        return []
    lines = [html.paragraph(f"Explanation: {explanation['base']}")]
    if explanation["lora"] != explanation["base"]:
        lines.append(html.paragraph(f"After adapting: {explanation['lora']}"))
    source = (f"By: {explanation['judge']}. Balanced accuracy {explanation['balanced']:.2f}, where 0.50 is a constant "
              "answer's.")
    return lines + [html.paragraph(source, quiet=True)]


def effect_column(title, found):
    raised = html.paragraph("raises", quiet=True) + html.tokens(found["raised"])
    lowered = html.paragraph("lowers", quiet=True) + html.tokens(found["lowered"])
    return html.heading(title, 3) + html.pair([raised, lowered])


def passage_item(passage, hottest):
    peaks = " → ".join(f"{peak:.2f}" for peak in passage["peak"].values())
    text = html.passage(passage["tokens"], passage["activations"], hottest, passage["at"])
    return html.paragraph(f"activation {peaks}", quiet=True) + text
