"""Steering with latents (§5.2, Table 4, Figures 7 and 10): does it work better on the adapted model?"""
from argparse import Namespace

import torch

from lorasae.evals import steering
from lorasae.evals.common import interval
from lorasae.paper.findings import Claim, Table
from lorasae.paper.study import around_jumprelu
from lorasae.runs.opening import open_run

TITLE = "Steering with latents"
FIGURES = ("table4", "fig7", "fig10")
ABOUT = ("x ← x + α (x·v) v with a latent's decoder row v, in both models; d is the change of a text's likelihood, in "
         "units where the unsteered texts span 100. α is tuned for each model on half of the texts, the table is of the "
         "other half. Latents and texts (held-out passages where the latent fires, and others) are found here, where the "
         "paper had texts about its four latents written by a language model (eval.py --suite steering --positives does "
         "that). The published code scores the current token for the next one, and adapts at rank 1, so the paper's levels "
         "cannot be compared. One seed; intervals are over texts.")


def trainings(study):
    return [around_jumprelu(study, study.seeds[0])]


def cost(study):
    """{kind of work: tokens}: texts at every alpha of the grid, in both models."""
    return {"forward": 400_000}


def measure(study):
    """What evals/steering.py finds."""
    training, = trainings(study)
    options = Namespace(latents=None, examples=100, positives=None, negatives=None, chat_model=None)
    return steering.evaluate(open_run(study.folder / training.name), options)


def tables(numbers):
    rows = []
    for row in numbers["rows"]:
        cells = [f"latent {row['latent']}", f"{row['alpha_base']:g}", f"{row['alpha_lora']:g}"]
        for side in ("positive", "negative"):
            cells.append(f"{row[side]['delta']:+.2f} ± {row[side]['ci90'] or 0:.2f}")
        rows.append([*cells, repr(row["examples"][0])[:60]])
    return [Table("Table 4: change of d by adapting, d_LoRA - d_base (± 90 % over texts)",
                  ["", "α base", "α LoRA", "positive texts", "negative texts", "fires in"], rows)]


def claims(numbers):
    positive = [row["positive"]["delta"] for row in numbers["rows"]]
    negative = [row["negative"]["delta"] for row in numbers["rows"]]
    mean, half = interval(torch.tensor(positive, dtype=torch.float64))
    sure = sum(row["positive"]["delta"] > (row["positive"]["ci90"] or 0) for row in numbers["rows"])
    moved = half is not None and abs(mean) > half
    return [
        Claim("Steering moves positive texts more on the adapted model", "+0.44 to +2.50, beyond the interval for all four latents",
              f"{mean:+.2f} ± {half or 0:.2f}; beyond its interval for {sure} of {len(positive)} latents", mean > 0 if moved else None,
              why="" if moved else "no difference beyond the interval over latents"),
        Claim("... and leaves negative texts alone", "|Δ| at most 0.84", f"{min(negative):+.2f} to {max(negative):+.2f}",
              max(map(abs, negative)) <= 1 if steers(numbers) else None, why="" if steers(numbers) else "no α of the grid helped"),
    ]


def steers(numbers):
    """Whether any latent steers either model at all."""
    return any(row["alpha_base"] or row["alpha_lora"] for row in numbers["rows"])


draw = steering.draw
