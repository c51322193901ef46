"""The tuned recipe: rates for adapters in a model of any size, from a search on small models.

The search compared rates, schedules, batch sizes, ranks and optimisers by KL on tuning text that is
neither trained on nor held out, for the included models and both kinds of SAE. Muon at a rate that
falls to 0 was best throughout; a constant rate or a rank of 16 closed 2 to 18 points less of the KL
gap. An SAE that trains with them needs a smaller rate, 2.5e-4 to 5e-4.
"""
from lorasae.io.models import load_config

TUNED = {"lr_decay": True, "dropout": 0.0}
TUNED_LR = {"muon": 5e-3, "adamw": 3e-3}
TUNED_SAE_LR = 4e-4                                     # of an SAE that trains too, by Adam
TUNED_WIDTH, TUNED_DEPTH = 192, 6                       # these rates are for this d_model and depth

# Assumed from the literature. Three sizes of the included Gemma-2 do not contradict them: Muon's
# best rate falls from 7.6e-3 (d_model 64, 4 blocks) through 5.9e-3 (112, 4) to 4.2e-3 (192, 6).
WIDTH_POWER, DEPTH_POWER = 0.5, 0.5


def tuned_recipe(model, optimizer=None, train_sae=False):
    """`tuned` for a model given by name; optimizer None means the best one."""
    config = load_config(model)
    return tuned(config.hidden_size, config.num_hidden_layers, optimizer or "muon", train_sae)


def tuned(d_model, depth, optimizer="muon", train_sae=False):
    """--recipe tuned: fields of Config for adapters, and for the SAE if it trains too.

        lr = TUNED_LR · (TUNED_WIDTH / d_model) ^ WIDTH_POWER · (TUNED_DEPTH / depth) ^ DEPTH_POWER

    For a large model this rule is only a starting point. It gives 6.9e-4 for gemma-2-2b; try half
    and twice that in the same pass: --recipe tuned --lr 3.5e-4 7e-4 1.4e-3.
    """
    slower = (TUNED_WIDTH / d_model) ** WIDTH_POWER * (TUNED_DEPTH / depth) ** DEPTH_POWER
    fields = {"optimizer": optimizer, "lr": rounded(TUNED_LR[optimizer] * slower), **TUNED}
    if train_sae:                                       # found with one sequence per step
        fields |= {"sae_lr": rounded(TUNED_SAE_LR * slower), "batch_size": 1}
    return fields


def rounded(rate):
    """Rounds to two significant digits."""
    return float(f"{rate:.2g}")
