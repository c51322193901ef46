"""Steering with latents (§5.2, Table 4, Figures 7 and 10): does it work better on the adapted model?"""
from argparse import Namespace

from lorasae.evals import steering
from lorasae.paper.findings import Claim, Table, over_seeds, sign, written
from lorasae.paper.study import adapters, around_jumprelu, new_sae, opened

TITLE = "Steering with latents"
FIGURES = ("table4", "fig7", "fig10")
ABOUT = (
    "x ← x + α (x·v) v with a latent's decoder row v, in both models; d is the change in a text's "
    "likelihood, in units where the unsteered texts span 100. α is tuned for each model on half "
    "of the texts, and the table is about the other half. Latents and texts (held-out passages "
    "where the latent fires, and others) are found here, while the paper had texts about its four "
    "latents written by a language model (eval.py --suite steering --positives does that). "
    "Adapters on the blocks after the SAE: in miniature of rank 64 around a JumpReLU SAE, at real "
    "size of rank 1 around a TopK one, as in the published code. That code scores the current "
    "token instead of the next one, so the paper's levels cannot be compared. One seed; intervals "
    "are over texts.")


def trainings(study):
    seed = study.seeds[0]
    if study.miniature:
        return [around_jumprelu(study, seed)]
    model = study.models.main
    sae = new_sae(study, "topk", model)
    name = f"{model}-steered-seed-{seed}"
    return [adapters(study, name, model, [sae], tokens=study.long_tokens, seed=seed, rank=(1,),
                     adapt=("after",))]


def examples(study):
    """Texts of each kind, per latent."""
    return 100 if study.miniature else 500


def cost(study):
    """{kind of work: tokens}: texts at every alpha of the grid, in both models."""
    return {"forward": 4_000 * examples(study)}


def measure(study):
    """What evals/steering.py finds."""
    training, = trainings(study)
    options = Namespace(latents=None, examples=examples(study), positives=None, negatives=None,
                        chat_model=None)
    return steering.evaluate(opened(study, training), options)


def tables(numbers):
    rows = []
    for row in numbers["rows"]:
        cells = [f"latent {row['latent']}", f"{row['alpha_base']:g}", f"{row['alpha_lora']:g}"]
        for side in ("positive", "negative"):
            cells.append(written(row[side]["delta"], row[side]["ci90"], "+.2f"))
        example = repr(row["examples"][0])[:60]
        rows.append([*cells, example])

    headings = ["", "α base", "α LoRA", "positive texts", "negative texts", "fires in"]
    caption = "Table 4: change in d by adapting, d_LoRA - d_base (± 90 % over texts)"
    return [Table(caption, headings, rows)]


def claims(numbers):
    return [of_positive_texts(numbers), of_negative_texts(numbers)]


def of_positive_texts(numbers):
    changes = [row["positive"]["delta"] for row in numbers["rows"]]
    sure = 0
    for row in numbers["rows"]:
        half = row["positive"]["ci90"]
        sure += half is not None and row["positive"]["delta"] > half

    mean, half = over_seeds(changes)                    # here: over latents
    moved = sign(changes)
    return Claim("Steering moves positive texts more on the adapted model",
                 "+0.44 to +2.50, beyond the interval for all four latents",
                 f"{written(mean, half, '+.2f')}; beyond its interval for {sure} of "
                 f"{len(changes)} latents",
                 direction=moved,
                 why="" if moved is not None else "no difference beyond the interval over latents")


def of_negative_texts(numbers):
    changes = [row["negative"]["delta"] for row in numbers["rows"]]
    largest = max(abs(change) for change in changes)
    said = steers(numbers)
    return Claim("... and leaves negative texts alone",
                 "|Δ| at most 0.84",
                 f"{min(changes):+.2f} to {max(changes):+.2f}",
                 direction=largest <= 1 if said else None,
                 why="" if said else "no α of the grid helped")


def steers(numbers):
    """Whether any latent steers either model at all."""
    return any(row["alpha_base"] or row["alpha_lora"] for row in numbers["rows"])


draw = steering.draw
