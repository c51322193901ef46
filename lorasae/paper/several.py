"""Several SAEs at once (§4.3, Figure 6): the compound cross-entropy, without adapters and with."""
from lorasae.paper.findings import Claim, Table, over_seeds, with_interval
from lorasae.paper.study import adapters, new_sae, results

TITLE = "Adapting to several SAEs at once"
FIGURES = ("fig6",)
ABOUT = ("Compound cross-entropy (Lai & Heimersheim 2024): that of the model with all SAEs inserted. TopK SAEs, adapters "
         "on all blocks, all SAEs inserted during training, blocks chosen far apart. The published code hooks the SAE of "
         "block i at block i + 1, which inflates the paper's losses without adapters; here it acts at block i.")

MINIATURE = ((2,), (1, 3), (0, 2, 4), (0, 1, 3, 4), (0, 1, 2, 3, 4))
REAL = ((16,), (10, 20, 30), (6, 12, 18, 24, 30), (4, 8, 12, 16, 20, 24, 28), tuple(range(3, 31, 3)), tuple(range(2, 31, 2)))


def layer_sets(study):
    return MINIATURE if study.miniature else REAL


def saes_of(study, layers):
    """Their Trainings, in miniature; Llama Scope has the others."""
    return [new_sae(study, "topk", study.models.several, layer) for layer in layers] if study.miniature else []


def adapters_of(study, layers, seed):
    name = f"several-{'-'.join(map(str, layers))}-seed-{seed}"
    return adapters(study, name, study.models.several, saes_of(study, layers), layer=layers, rank=(64,), adapt=("all",), seed=seed)


def trainings(study):
    needed = {}
    for layers in layer_sets(study):
        for training in [*saes_of(study, layers), *(adapters_of(study, layers, seed) for seed in study.seeds)]:
            needed[training.name] = training
    return list(needed.values())


def measure(study):
    """{"rows": [{layers, ce_base, ce_sae, ce_adapted: [a seed's], gap_closed: [a seed's]}]}, CE in nats a token."""
    rows = []
    for layers in layer_sets(study):
        found = [results(study, adapters_of(study, layers, seed)) for seed in study.seeds]
        rows.append({"layers": list(layers), "ce_base": found[0]["ce_base"], "ce_sae": found[0]["ce_sae"],
                     "ce_adapted": [each["ce_adapted"] for each in found], "gap_closed": [each["gap_closed"] for each in found]})
    return {"rows": rows}


def tables(numbers):
    rows = []
    for row in numbers["rows"]:
        layers = ", ".join(map(str, row["layers"]))
        rows.append([str(len(row["layers"])), layers, row["ce_base"], row["ce_sae"], with_interval(row["ce_adapted"], ".4f"),
                     with_interval(row["gap_closed"])])
    headings = ["SAEs", "at blocks", "CE base", "CE with SAEs", "CE with SAEs + LoRA", "gap closed"]
    return [Table("Compound cross-entropy (nats a token; ± 90 % over seeds)", headings, rows)]


def claims(numbers):
    rows = numbers["rows"]
    one, most = rows[0], rows[-1]
    cost = most["ce_sae"] - most["ce_base"]
    shares = [share for row in rows for share in row["gap_closed"] if share is not None]
    least_closed = min(shares, default=0.0)
    grows = cost > len(most["layers"]) * (one["ce_sae"] - one["ce_base"])
    return [
        Claim("The loss grows extremely rapidly with the number of SAEs", "10 nats with 5 SAEs, worse than a unigram",
              f"{cost:+.2f} nats with {len(most['layers'])}, against {one['ce_sae'] - one['ce_base']:+.2f} with one",
              grows, why="" if grows else "not faster than their number: with the SAEs at their own blocks the model does not collapse"),
        Claim("Adapting reduces the compound loss greatly, at every number of SAEs", "7 SAEs: 7.83 → 2.78; 3: 3.55 → 2.45 nats",
              f"closes at least {least_closed:.0%} of the gap", least_closed > 0.25),
        *three_against_one(rows),
    ]


def three_against_one(rows):
    one, three = rows[0], next((row for row in rows if len(row["layers"]) == 3), None)
    if three is None:
        return []
    adapted = over_seeds(three["ce_adapted"])[0]
    return [Claim("Three SAEs with adapters lose less than one without", "2.45 nats against one SAE's loss",
                  f"3 SAEs + LoRA {adapted:.3f}, one SAE {one['ce_sae']:.3f}", adapted < one["ce_sae"])]


def draw(numbers, figure):
    """Figure 6: the compound cross-entropy against the number of SAEs."""
    figure.set_size_inches(6, 3.8)
    axes, rows = figure.subplots(), numbers["rows"]
    count = [len(row["layers"]) for row in rows]
    adapted = [over_seeds(row["ce_adapted"]) for row in rows]
    axes.plot(count, [row["ce_sae"] for row in rows], marker="o", label="TopK")
    axes.errorbar(count, [mean for mean, _ in adapted], [half or 0 for _, half in adapted], marker="o", capsize=3,
                  label="TopK + LoRA")
    axes.axhline(rows[0]["ce_base"], color="grey", linestyle="--", label=f"original model ({rows[0]['ce_base']:.3f})")
    axes.set(xlabel="number of SAEs", ylabel="compound CE (nats/token)", xticks=count)
    axes.legend()
