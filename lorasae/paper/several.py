"""Several SAEs at once (§4.3, Figure 6): the compound cross-entropy, without adapters and with."""
from lorasae.evals.common import error_bar
from lorasae.paper.findings import Claim, Table, over_seeds, with_interval
from lorasae.paper.study import adapters, new_sae, results

TITLE = "Adapting to several SAEs at once"
FIGURES = ("fig6",)
ABOUT = (
    "Compound cross-entropy (Lai & Heimersheim 2024): that of the model with all SAEs inserted. "
    "TopK SAEs (Llama Scope's were trained as such, and act by a threshold), adapters on all "
    "blocks, all SAEs inserted during training, blocks chosen far apart. The published code hooks "
    "the SAE of block i at block i + 1, which inflates the paper's losses without adapters; here "
    "it acts at block i.")

NO_COLLAPSE = ("not faster than their number: with the SAEs at their own blocks the model does not "
               "collapse")
FEWER_TOKENS = "so few tokens close a part of the gap that three SAEs make, not most of it"
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
    """{"rows": [{layers, and for every seed [n]: ce_base, ce_sae, ce_adapted, gap_closed}]}, CE in
    nats per token, all on the same held-out text.
    """
    rows = []
    for layers in layer_sets(study):
        found = [results(study, adapters_of(study, layers, seed)) for seed in study.seeds]
        names = ("ce_base", "ce_sae", "ce_adapted", "gap_closed")
        by_seed = {name: [each[name] for each in found] for name in names}
        rows.append({"layers": list(layers), **by_seed})
    return {"rows": rows}


# ---- What it comes to ----------------------------------------------------------------------------

def tables(numbers):
    rows = []
    for row in numbers["rows"]:
        rows.append([
            str(len(row["layers"])),
            ", ".join(map(str, row["layers"])),
            mean(row, "ce_base"),
            mean(row, "ce_sae"),
            mean(row, "ce_adapted"),
            with_interval(improvement(row), ".4f"),
            with_interval(row["gap_closed"]),
        ])
    headings = ["SAEs", "at blocks", "CE base", "CE with SAEs", "CE with SAEs + LoRA",
                "improvement", "gap closed"]
    caption = "Compound cross-entropy (nats per token; means and ± 90 % over seeds)"
    return [Table(caption, headings, rows)]


def mean(row, name):
    return sum(row[name]) / len(row[name])


def improvement(row):
    """CE with SAEs - CE with SAEs and adapters, in nats per token: a value per seed."""
    return [before - after for before, after in zip(row["ce_sae"], row["ce_adapted"])]


def claims(numbers):
    rows = numbers["rows"]
    return [grows(rows), is_reduced(rows), *three_against_one(rows)]


def cost_of(row):
    """The gap: what inserting the SAEs costs, without adapters, in nats per token."""
    return mean(row, "ce_sae") - mean(row, "ce_base")


def grows(rows):
    fewest, most = rows[0], rows[-1]
    count = len(most["layers"])
    faster = cost_of(most) > count * cost_of(fewest)
    return Claim("The loss grows extremely rapidly with the number of SAEs",
                 "10 nats with 5 SAEs, worse than a unigram",
                 f"{cost_of(most):+.2f} nats with {count}, against {cost_of(fewest):+.2f} with one",
                 direction=faster,
                 why="" if faster else NO_COLLAPSE)


def is_reduced(rows):
    shares = []
    for row in rows:
        shares += [share for share in row["gap_closed"] if share is not None]
    least = min(shares, default=0.0)
    ours = "not at every number"
    if least > 0:
        ours = f"improves it at every number, and closes at least {least:.0%} of the gap"
    return Claim("Adapting reduces the compound loss greatly, at every number of SAEs",
                 "7 SAEs: 7.83 → 2.78; 3: 3.55 → 2.45 nats",
                 ours,
                 direction=least > 0,
                 size=least > 0.5)


def three_against_one(rows):
    """[Claim], or [] where no set has three SAEs."""
    one, threes = rows[0], [row for row in rows if len(row["layers"]) == 3]
    if not threes:
        return []
    adapted, alone = mean(threes[0], "ce_adapted"), mean(one, "ce_sae")
    better = adapted < alone
    return [Claim("Three SAEs with adapters lose less than one without",
                  "2.45 nats against one SAE's loss",
                  f"3 SAEs + LoRA {adapted:.3f}, one SAE {alone:.3f}",
                  direction=better,
                  why_in_miniature="" if better else FEWER_TOKENS)]


def draw(numbers, figure):
    """Figure 6: the compound cross-entropy against the number of SAEs.

    Bars are the interval of the improvement, over seeds.
    """
    rows = numbers["rows"]
    count = [len(row["layers"]) for row in rows]
    adapted = [mean(row, "ce_adapted") for row in rows]
    halves = [error_bar(over_seeds(improvement(row))[1]) for row in rows]
    alone = mean(rows[0], "ce_base")

    figure.set_size_inches(6, 3.8)
    axes = figure.subplots()
    axes.plot(count, [mean(row, "ce_sae") for row in rows], marker="o", label="TopK")
    axes.errorbar(count, adapted, halves, marker="o", capsize=3, label="TopK + LoRA")
    axes.axhline(alone, color="grey", linestyle="--", label=f"original model ({alone:.3f})")
    axes.set(xlabel="number of SAEs", ylabel="compound CE (nats/token)", xticks=count)
    axes.legend()
