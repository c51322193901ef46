"""Spurious correlation removal: can the SAE cure a biased probe? (§5.1 and A.2, Tables 3, 6)

    python eval.py RUN_DIR --suite scr                        packages, in code and documentation
    python eval.py RUN_DIR --suite scr --labelled saebench    professions/genders, products/ratings

Texts have a class (professor, nurse) and an attribute (male, female). A biased probe sees only male
professors and female nurses. Latents of one concept are ablated; the probe is tested on the other:

    S = (A_ablated - A_biased) / (A_clean - A_biased)

A_clean is the accuracy of a probe trained on that concept with balanced data. S is 1 if the biased
probe is cured, 0 if nothing changes. As in SAEBench, a model's score is S for the concept on which
its biased probe is less accurate: the mean over pairs, then the maximum and average over numbers of
latents. The difference between the two models compares S for the concept on which the base model's
biased probe is less accurate.
"""
import torch

from lorasae.evals import saebench
from lorasae.evals.concepts import THRESHOLDS, ablate, concept_probes, over_thresholds, strongest
from lorasae.evals.probes import Probe, accuracy, halves, mean_difference, rows_by_class

ATTRIBUTE, CLASS, BIASED = range(3)                     # the three probes


def evaluate(setting, labelled, seeds):
    """Table 6's SCR rows for the first SAE of a run."""
    return saebench.compare(setting, "scr", labelled, seeds, measure, report, over_thresholds)


def report(scores):
    """Each model's scores for its own concept, as in SAEBench; "paired": for the base model's."""
    base, lora = scores["base"], scores["lora"]
    return {"base": base[worse_known(base)], "lora": lora[worse_known(lora)],
            "paired": lora[worse_known(base)]}


def worse_known(scores):
    """The concept on which the biased probe is less accurate, of {concept: its scores}."""
    return min(scores, key=lambda concept: scores[concept]["biased"])


def measure(sae, train, test, cut, seed):
    """{concept: {metric: value}} of one model on one Cut of quadrants."""
    device = train.latents.device
    train_task = training_tasks(cut.train, device)
    test_task = test_tasks(cut.test, device)

    # The accuracy of the clean and the biased probes.
    probes = concept_probes(train.residual, train_task, seed)
    biased = choose(probes, [BIASED, BIASED])
    clean = accuracy(choose(probes, [ATTRIBUTE, CLASS]), test.residual, test_task)
    before = accuracy(biased, test.residual, test_task)

    # The accuracy of the biased probe for one concept without the other's n latents.
    effects = mean_difference(train.latents, train_task) * (probes.weight @ sae.W_dec.float().T)
    found = {}
    for asked, ablated in ((ATTRIBUTE, CLASS), (CLASS, ATTRIBUTE)):
        scores = {"clean": clean[asked].item(), "biased": before[asked].item()}
        for n in THRESHOLDS:
            x = ablate(sae, test, strongest(effects[ablated].abs(), n))
            after = accuracy(biased, x, test_task)[asked].item()
            scores[f"top_{n}"] = cured(scores["clean"], scores["biased"], after)
        found[asked] = scores
    return found


def choose(probes, which):
    return Probe(probes.weight[which], probes.bias[which])


def cured(clean, biased, ablated):
    """S from three accuracies; 0 if the biased probe is less than 0.001 worse than the clean one.

    (SAEBench does the same today; the version that the paper used always divides.)
    """
    lost = clean - biased
    return (ablated - biased) / lost if lost >= 0.001 else 0.0


# ---- The three tasks ---------------------------------------------------------------------------

def training_tasks(quadrants, device="cpu"):
    """n texts per quadrant for the clean probes, 2n from each of two for the biased one."""
    rows = pm, pf, nm, nf = rows_by_class(quadrants)
    n = min(len(pm) // 2, len(pf), len(nm), len(nf) // 2)
    return halves([*balanced(rows, n), torch.cat([pm[:2 * n], nf[:2 * n]])], device)


def test_tasks(quadrants, device="cpu"):
    """The same texts by attribute and by class, n per quadrant."""
    rows = rows_by_class(quadrants)
    return halves(balanced(rows, min(map(len, rows))), device)


def balanced(rows, n):
    """Rows of n texts per quadrant, by attribute and by class; the first half is positive."""
    pm, pf, nm, nf = [of_quadrant[:n] for of_quadrant in rows]
    return [torch.cat([pm, nm, pf, nf]), torch.cat([pm, pf, nm, nf])]


# ---- Showing -----------------------------------------------------------------------------------

def tables(numbers):
    notes = ["The difference compares S for one concept: the one on which the base model's biased "
             "probe is less accurate. S is noise if that probe is nearly as good as the clean one."]
    if numbers["labelled"] != "stdlib":
        notes.append("SAEBench's texts for SCR are the same for every seed, so the intervals cover "
                     "only the noise of the probes.")
    caption = ("Spurious correlation removal: 1 if ablating n latents cures the biased probe, "
               "0 if it changes nothing")
    return [saebench.table(numbers, "scr", caption, notes)]

