"""Several SAEs at once (§4.3, Figure 6): the compound cross-entropy, without adapters and with."""
from lorasae.paper.findings import Claim, Table, over_seeds, with_interval
from lorasae.paper.study import adapters, new_sae, results

TITLE = "Adapting to several SAEs at once"
FIGURES = ("fig6",)
ABOUT = ("Compound cross-entropy (Lai & Heimersheim 2024): that of the model with all SAEs inserted. TopK SAEs, adapters "
         "on all blocks, all SAEs inserted during training, blocks chosen far apart. The published code hooks the SAE of "
         "block i at block i + 1, which inflates the paper's losses without adapters; here it acts at block i.")

MINIATURE = (                                           # blocks that have an SAE, set by set
    (2,),
    (1, 3),
    (0, 2, 4),
    (0, 1, 3, 4),
    (0, 1, 2, 3, 4),
)
REAL = (
    (16,),
    (10, 20, 30),
    (6, 12, 18, 24, 30),
    (4, 8, 12, 16, 20, 24, 28),
    tuple(range(3, 31, 3)),
    tuple(range(2, 31, 2)),
)


def layer_sets(study):
    return MINIATURE if study.miniature else REAL


def saes_of(study, layers):
    """Their Trainings, in miniature; Llama Scope has the others."""
    if not study.miniature:
        return []
    return [new_sae(study, "topk", study.models.several, layer) for layer in layers]


def adapters_of(study, layers, seed):
    name = f"several-{'-'.join(map(str, layers))}-seed-{seed}"
    saes = saes_of(study, layers)
    return adapters(study, name, study.models.several, saes, layer=layers, rank=(64,), adapt=("all",), seed=seed)


def trainings(study):
    needed = {}                                         # by name: sets share SAEs
    for layers in layer_sets(study):
        around = [adapters_of(study, layers, seed) for seed in study.seeds]
        for training in (*saes_of(study, layers), *around):
            needed[training.name] = training
    return list(needed.values())


def measure(study):
    """{"rows": [{layers, ce_base, ce_sae, ce_adapted: [a seed's], gap_closed: [a seed's]}]}, CE in nats a token."""
    rows = []
    for layers in layer_sets(study):
        found = [results(study, adapters_of(study, layers, seed)) for seed in study.seeds]
        rows.append({
            "layers": list(layers),
            "ce_base": found[0]["ce_base"],
            "ce_sae": found[0]["ce_sae"],
            "ce_adapted": [each["ce_adapted"] for each in found],
            "gap_closed": [each["gap_closed"] for each in found],
        })
    return {"rows": rows}


# ---- What it comes to ------------------------------------------------------------------------------------------------

def tables(numbers):
    rows = []
    for row in numbers["rows"]:
        rows.append([
            str(len(row["layers"])),
            ", ".join(map(str, row["layers"])),
            row["ce_base"],
            row["ce_sae"],
            with_interval(row["ce_adapted"], ".4f"),
            with_interval(row["gap_closed"]),
        ])
    headings = ["SAEs", "at blocks", "CE base", "CE with SAEs", "CE with SAEs + LoRA", "gap closed"]
    return [Table("Compound cross-entropy (nats a token; ± 90 % over seeds)", headings, rows)]


def claims(numbers):
    rows = numbers["rows"]
    return [grows(rows), is_reduced(rows), *three_against_one(rows)]


def cost_of(row):
    """What inserting the SAEs costs, without adapters, in nats a token."""
    return row["ce_sae"] - row["ce_base"]


def grows(rows):
    fewest, most = rows[0], rows[-1]
    count = len(most["layers"])
    faster = cost_of(most) > count * cost_of(fewest)
    return Claim("The loss grows extremely rapidly with the number of SAEs",
                 "10 nats with 5 SAEs, worse than a unigram",
                 f"{cost_of(most):+.2f} nats with {count}, against {cost_of(fewest):+.2f} with one",
                 direction=faster,
                 why="" if faster else "not faster than their number: with the SAEs at their own blocks the model does "
                                       "not collapse")


def is_reduced(rows):
    shares = []
    for row in rows:
        shares += [share for share in row["gap_closed"] if share is not None]
    least = min(shares, default=0.0)
    return Claim("Adapting reduces the compound loss greatly, at every number of SAEs",
                 "7 SAEs: 7.83 → 2.78; 3: 3.55 → 2.45 nats",
                 f"closes at least {least:.0%} of the gap",
                 direction=least > 0.25)


def three_against_one(rows):
    """[Claim], or [] where no set has three SAEs."""
    one, threes = rows[0], [row for row in rows if len(row["layers"]) == 3]
    if not threes:
        return []
    adapted, _ = over_seeds(threes[0]["ce_adapted"])
    return [Claim("Three SAEs with adapters lose less than one without",
                  "2.45 nats against one SAE's loss",
                  f"3 SAEs + LoRA {adapted:.3f}, one SAE {one['ce_sae']:.3f}",
                  direction=adapted < one["ce_sae"])]


def draw(numbers, figure):
    """Figure 6: the compound cross-entropy against the number of SAEs."""
    rows = numbers["rows"]
    count = [len(row["layers"]) for row in rows]
    adapted = [over_seeds(row["ce_adapted"]) for row in rows]
    means = [mean for mean, _ in adapted]
    halves = [half or 0 for _, half in adapted]
    alone = rows[0]["ce_base"]

    figure.set_size_inches(6, 3.8)
    axes = figure.subplots()
    axes.plot(count, [row["ce_sae"] for row in rows], marker="o", label="TopK")
    axes.errorbar(count, means, halves, marker="o", capsize=3, label="TopK + LoRA")
    axes.axhline(alone, color="grey", linestyle="--", label=f"original model ({alone:.3f})")
    axes.set(xlabel="number of SAEs", ylabel="compound CE (nats/token)", xticks=count)
    axes.legend()
