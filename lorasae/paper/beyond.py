"""Two experiments beyond the paper. They run only if --only names them.

    MODEL_OR_SAE    adapt the model, finetune its SAE (arXiv 2503.17272) or both, on equal tokens
    RECIPE          the published recipe, and the tuned one on a twelfth of the tokens

    python -m lorasae.paper --only model_or_sae,recipe --seeds 6 --out runs/beyond

A case is a model with one SAE. Each of its arms trains once per seed, and arms are compared in
pairs. No rates are chosen here: they come from recipes, presets and studies.toml.
"""
from pathlib import Path

from lorasae.paper.gap import draw_grid, paired, read, row_of, tables
from lorasae.paper.results import Part, over_seeds
from lorasae.paper.study import Job, of_text, preset_of
from lorasae.runs.config import Config

FIRST_SEED = 100                        # no setting was ever chosen with this or later seeds
FEWER = 12                              # the tuned recipe gets 1 / FEWER of the tokens


def cases(study):
    """{name: (model, its SAE)}; None: the preset's SAE."""
    if study.plan.size != "miniature":
        return {study.name: (study.model, None)}
    found = {}
    for model in study.model, study.plan.second:
        for kind in "jumprelu", "topk":
            sae = Path(preset_of(model).sae).with_name(kind)
            found[f"{Path(model).name}, {kind}"] = model, sae
    return found


def part(name, arms, claims):
    """A Part that trains every arm in every case.

    arms: study -> {arm: options of train.py}. claims: {claim: (an arm, one that it should beat)}.
    """
    def training(study, case, arm, seed):
        model, sae = cases(study)[case]
        seed += FIRST_SEED
        folder = "-".join(f"{name} {case} {arm} seed {seed}".replace(",", "").split())
        options = {"model": model, "sae": sae, "seed": seed, **of_text(study), **arms(study)[arm]}
        return Job(study.folder / "arms" / folder, options)

    def jobs(study):
        return [training(study, case, arm, seed)
                for case in cases(study) for arm in arms(study) for seed in study.seeds]

    def measure(study):
        """Cases: the gap closed by the first arm of a claim - by the second."""
        rows, differences = [], {claim: {} for claim in claims}
        for case in cases(study):
            runs = {arm: [read(training(study, case, arm, seed)) for seed in study.seeds]
                    for arm in arms(study)}
            rows += [row_of(run, f"arm: {case}", arm) for arm, own in runs.items() for run in own]
            for claim, (better, other) in claims.items():
                differences[claim][case] = over_seeds([
                    paired(one.gap_closed - two.gap_closed, one, two)
                    for one, two in zip(runs[better], runs[other])])
        return {"rows": rows, "cases": differences}

    return Part(name, jobs, measure, draw_grid, tables)


def adapters_sae_both(study):
    tokens = {"tokens": study.lora_tokens or Config.tokens}
    adapters = {**tokens, **study.plan.lora}
    return {
        "adapters": adapters,
        "SAE": {**tokens, **study.plan.finetune, "method": "finetune"},
        "both": {**adapters, "train_sae": ()},
    }


def published_and_tuned(study):
    tokens = study.long_tokens or study.lora_tokens or Config.tokens
    tuned = {"tokens": tokens // FEWER, "recipe": "tuned"}
    return {
        "published": {"tokens": tokens, "recipe": "paper"},
        "tuned": tuned,
        "tuned, AdamW": {**tuned, "optimizer": "adamw"},
    }


MODEL_OR_SAE = part("model_or_sae", adapters_sae_both, {
    "adapters": ("adapters", "SAE"), "both": ("both", "adapters")})
RECIPE = part("recipe", published_and_tuned, {
    "tuned": ("tuned", "published"), "muon": ("tuned", "tuned, AdamW")})
