"""Steering with a latent (paper §5.2, Table 4, Figures 7 and 10): does adapting help?

    python eval.py RUN_DIR --suite steering                 latents and texts from held-out text
    python eval.py RUN_DIR --suite steering --latents 8421 2195

    x ← x + α (x·v) v                                                                       (Eq. 8)

x is the output of the SAE's block at every position, v the latent's decoder row at unit length; no
SAE is spliced in. Eq. 8 allows any real α; only α >= 0 are tried here.

A text's likelihood is the mean over its tokens of log p(token | earlier tokens), with BOS in front.
For each model and set of texts it is scaled so that the unsteered texts span 0 to 100; d is its
change due to steering. Each model gets the α that, on half of the texts, raises d on positives but
not on negatives. Table 4 is d_LoRA - d_base on the other half, paired by text: it should be above 0
on positives and about 0 on negatives. Its 90 % interval is over texts, as in the paper. Texts from
one document are alike, so the table also shows the number of documents.

Positives are the held-out texts in which the latent fires most; negatives are some in which it is
silent. The paper's texts were written by a chat model, using the prompt in its A.1.2.

Shapes: N texts, B of them at a time, T tokens with BOS in front, D d_model, M latents.
"""
import torch
import torch.nn.functional as F

from lorasae.errors import InputError
from lorasae.evals.common import as_model, check_latents, interval, progress
from lorasae.evals.report import Table, with_interval
from lorasae.evals.texts import latents_of
from lorasae.objectives import token_losses

ALPHAS = (0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 12, 20)     # 0: no steering
WINDOW = 24                     # tokens of a held-out text (the paper's have twelve words)
LEAST = 8                       # a comparison needs this many positives and negatives
COMMON = 0.1                    # a latent that fires in a larger share of texts stands for no topic
BATCH = 32                      # texts at a time
SIDES = ("positive", "negative")
MODELS = {"base": "base model", "lora": "LoRA model"}


# ---- Steering ------------------------------------------------------------------------------------

def steer(x, v, alpha):
    """Eq. 8 for x [.., D] and v [D] of unit length: adds α times what already lies along v."""
    return x + alpha * (x @ v)[..., None] * v


@torch.no_grad()
def log_likelihoods(model, texts, layer, v, alphas):
    """Mean log p(token | earlier tokens) of every text [N, T] at every α, fp64 [len(alphas), N].

    The published code reads p(token) from the row that predicts the next one (run_steering.py:66).
    """
    found = []
    for tokens in texts.to(model.device).split(BATCH):
        x, losses = model.run(model.embed(tokens), 0, layer + 1), []
        for alpha in alphas:
            hidden = model.norm(model.run(steer(x, v, alpha), layer + 1, len(model.layers)))
            loss, _ = token_losses(hidden[None, :, :-1], tokens[:, 1:], model.head, model.softcap)
            losses.append(-loss[0].double().mean(1).cpu())
        found.append(torch.stack(losses))
    return torch.cat(found, 1)


def change(steered, unsteered):
    """d: the change in likelihoods [.., N], in units in which the unsteered ones [N] span 100."""
    return 100 * (steered - unsteered) / (unsteered.max() - unsteered.min())


def tune(positive, negative, alphas=ALPHAS):
    """One model's best α: the highest mean d of positives, minus that of negatives if they rise.

    positive, negative [len(alphas), N]: likelihoods, unsteered in the first row.
    """
    gained = change(positive, positive[0]).mean(1)
    lost = change(negative, negative[0]).mean(1).clamp(min=0)
    return alphas[(gained - lost).argmax()]


def compare(model, layer, v, sets):
    """Steers base and adapted model along v -> each one's α and d, and Table 4's differences.

    sets: {"positive" and "negative": texts [N, T]}. Every other text tunes α, separately for each
    model; the rest test it. The published code tunes one α for both models, on the test texts, and
    sorts each model's values before it pairs them (run_steering.py:190).
    """
    row, found = {}, {side: {} for side in SIDES}
    for name in MODELS:
        with as_model(model, name):
            tried = [log_likelihoods(model, sets[side][::2], layer, v, ALPHAS) for side in SIDES]
            alpha = row[f"alpha_{name}"] = tune(*tried)
            for side, d in found.items():
                unsteered, steered = log_likelihoods(model, sets[side][1::2], layer, v, (0, alpha))
                d[name] = change(steered, unsteered)

    for side, d in found.items():
        delta, half = interval(d["lora"] - d["base"])
        d = {name: values.tolist() for name, values in d.items()}
        row[side] = {"d": d, "delta": delta, "ci90": half}
    return row


# ---- Latents and texts ---------------------------------------------------------------------------

def windows(text):
    """Distinct pieces of one document each: (tokens [N, 1 + WINDOW], BOS first; documents [N])."""
    found = {}                          # {tokens: their document}, in the order of the text
    for chunk, document in zip(text.held_out[:, 1:], text.documents.tolist()):
        for piece in chunk.split(WINDOW):
            ids = tuple(piece.tolist())
            if len(ids) == WINDOW and not {text.bos, text.eos} & set(ids):
                found.setdefault((text.bos, *ids), document)
    if not found:
        raise InputError(f"no document of the held-out text gives {WINDOW} tokens in one sequence: "
                         "evaluate a run with a longer --context, or with longer documents")
    return torch.tensor(list(found)), torch.tensor(list(found.values()))


def peaks(model, sae, layer, texts):
    """Each latent's peak in each text [N, T], leaving out BOS, in the base model: [N, M]"""
    with as_model(model, "base"):
        found = progress(latents_of(model, sae, layer, texts), "latents")
        return torch.cat([z.amax(1).float().cpu() for z in found])


def choose_latents(peak, count=4, least=4 * LEAST):
    """The `count` latents with the highest mean peak in the texts where they fire; peak [N, M].

    Only latents that fire in at least `least` texts, and in at most a share COMMON, are eligible.
    """
    fired = (peak > 0).sum(0)
    eligible = (fired >= least) & (fired <= COMMON * len(peak))
    if not eligible.any():
        raise InputError(f"of {len(peak):,} texts of {WINDOW} held-out tokens, no latent fires in "
                         f"{least} or more and at most {COMMON:.0%}: name some with --latents, or "
                         "evaluate a run with more --eval-tokens")
    strength = torch.where(eligible, peak.sum(0) / fired, 0)
    return strength.topk(min(count, int(eligible.sum()))).indices.tolist()


def examples_of(peak, count):
    """Indices of up to `count` texts each: "positive" (highest peak [N]), "negative" (silent)."""
    order = peak.argsort(descending=True, stable=True)
    fires, silent = order[peak[order] > 0], order[peak[order] <= 0]
    silent = silent[::max(1, len(silent) // count)]                     # spread over the text
    return {"positive": fires[:count], "negative": silent[:count]}


# ---- The evaluation ------------------------------------------------------------------------------

def add_options(add):
    add("--latents", type=int, nargs="+", metavar="ID",
        help="latents of the first SAE, also for autointerp (default for steering: four that fire "
        "strongly, but in few of the held-out texts)")
    add("--examples", type=int, default=100, metavar="N",
        help="texts in which a latent fires, and as many in which it does not; half of them tune "
        "alpha (default: %(default)s; paper: 500)")


def evaluate(setting, latents=None, examples=100):
    """Table 4 for a run's first SAE: {"layer", "rows": [{"latent", "example", and `compare`'s}]}"""
    model, text = setting.model, setting.text
    layer, sae = next(iter(setting.saes.items()))
    if examples < LEAST:
        raise InputError(f"--examples {examples}: expected {LEAST} or more")

    texts, documents = windows(text)
    peak = peaks(model, sae, layer, texts)
    latents = latents or choose_latents(peak)
    check_latents(latents, peak.shape[1])
    rows = []
    for latent in progress(latents, "steering"):
        chosen = examples_of(peak[:, latent], examples)
        for side, some in chosen.items():
            if len(some) < LEAST:
                raise InputError(f"latent {latent} has {len(some)} {side} texts, fewer than "
                                 f"{LEAST}: choose another latent, or evaluate a run with more "
                                 "--eval-tokens")
        v = F.normalize(sae.W_dec[latent].float(), dim=0).to(model.head.dtype)
        row = compare(model, layer, v, {side: texts[some] for side, some in chosen.items()})
        for side, some in chosen.items():
            row[side]["documents"] = len(documents[some[1::2]].unique())
        example = text.tokenizer.decode(texts[chosen["positive"][0], 1:].tolist())
        rows.append({"latent": latent, "example": example, **row})
    return {"layer": layer, "rows": rows}


def tables(numbers):
    headings = [f"layer {numbers['layer']}", "α base", "α LoRA"]
    for side in SIDES:
        headings += [f"{side}: d base", "d LoRA", "Δ", "texts", "documents"]
    rows = []
    for row in numbers["rows"]:
        cells = [f"latent {row['latent']}", f"{row['alpha_base']:g}", f"{row['alpha_lora']:g}"]
        for found in (row["positive"], row["negative"]):
            cells += [f"{sum(values) / len(values):+.2f}" for values in found["d"].values()]
            cells.append(with_interval(found["delta"], found["ci90"], "+.2f"))
            cells += [str(len(found["d"]["base"])), str(found["documents"])]
        rows.append(cells)
    notes = [
        "d: change due to steering (the unsteered texts span 100); α 0: none of the α tried helps",
        "Δ: d LoRA - d base, paired by text, ± 90 % over texts; texts from one document are alike",
    ]
    notes += [f"latent {row['latent']}: {row['example']!r}" for row in numbers["rows"]]
    return [Table("Steering with a latent (the paper's Table 4)", headings, rows, notes)]


def draw(numbers, figure):
    """Figures 7 and 10: d over the test texts in both models, a row of panels for each latent."""
    rows = numbers["rows"]
    figure.set_size_inches(8, 0.8 + 2 * len(rows))
    for panels, row in zip(figure.subplots(len(rows), 2, squeeze=False), rows):
        for axes, side in zip(panels, SIDES):
            d = row[side]["d"]
            labels = [f"{MODELS[name]}, α {row[f'alpha_{name}']:g}" for name in d]
            axes.hist(list(d.values()), 25, histtype="stepfilled", alpha=0.5, label=labels)
            axes.set(title=f"latent {row['latent']}, {side} texts", ylabel="texts",
                     xlabel="d (the unsteered texts span 100)")
            axes.legend()
    figure.suptitle("Effect of steering on likelihood (the paper's Figures 7 and 10)")
