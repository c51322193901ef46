"""Why the method works (§6.1, §6.2): Figure 8, the loss by token, and Figure 11, activations.

    python -m lorasae.paper --only fig8,fig11

Both look at adapters on all blocks around a TopK SAE, one run per seed.
"""
from lorasae.evals import distances, tokens
from lorasae.evals.common import Estimate
from lorasae.evals.report import Table
from lorasae.paper.results import Claim, Part, cell, intervals, over_seeds
from lorasae.paper.study import Evaluation, around_topk, budget, found


def trainings(study):
    return [around_topk(study, seed) for seed in study.seeds]


def evaluated(study, suite):
    """A suite on the run of each seed."""
    return [Evaluation(training, suite) for training in trainings(study)]


def measured(study, suite):
    """[what the suite found, for each seed]"""
    return [found(study, each) for each in evaluated(study, suite)]


def about(study, what, papers):
    return (f"{what}, around a TopK SAE with adapters on all blocks. The paper looks at {papers} "
            "tokens of the Pile, this at the text that the run holds out. "
            + budget(study, around_topk(study, study.seeds[0]), "15M"))


def estimate(numbers, pick):
    """The Estimate over seeds; of a single seed over documents.

    numbers: [what the suite found, for each seed]. pick(found) -> (mean, half).
    """
    return over_seeds([Estimate(*pick(run), f"{run['documents']} documents, one seed")
                       for run in numbers])


# ---- Figure 8 ------------------------------------------------------------------------------------

def of_tokens(numbers, name):
    """The Estimate of a number of evals/tokens.py."""
    return estimate(numbers, lambda run: (run[name], run["ci90"][name]))


def from_middle(numbers):
    """The share of the improvement that comes from changes of 0.01 to 1 nats."""
    if min(run["improvement"] for run in numbers) <= 0:
        return Estimate(None, None, "no improvement to divide by")
    return of_tokens(numbers, "from_middle")


def tokens_tables(numbers):
    first, = tokens.tables(numbers[0])
    return [first._replace(caption=f"{first.caption}, first seed")]


def tokens_claims(numbers):
    return [
        Claim("Fig. 8", "Less than half of the tokens become worse", "37 %",
              {"share": of_tokens(numbers, "share_worse")}, 0.5, larger=False,
              paper_values=(0.37,), form=".1%", unit="of the tokens"),
        Claim("Fig. 8", "Most of the improvement comes from changes of 0.01 to 1 nats", "most",
              {"share": from_middle(numbers)}, 0.5, form=".1%", unit="of the improvement"),
    ]


TOKENS = Part(
    name="tokens",
    title="Change of the loss by token",
    figures=("fig8",),
    about=lambda study: about(study, "Each held-out token's cross-entropy with the SAE minus its "
                              "cross-entropy with SAE and adapters", "15M"),
    trainings=trainings,
    evaluations=lambda study: evaluated(study, "tokens"),
    measure=lambda study: measured(study, "tokens"),
    tables=tokens_tables,
    claims=tokens_claims,
    draw=lambda numbers, figure: tokens.draw(numbers[0], figure),
    caption="Numbers of tokens, of the first seed, without error bars.",
)


# ---- Figure 11 -----------------------------------------------------------------------------------

def at_block(numbers, i, measure, positions):
    """The Estimate of the change at a block, the SAE's being 0."""
    def change(run):
        return run[positions][measure]["change"][i], run[positions][measure]["ci90"][i]
    return estimate(numbers, change)


def after_sae(numbers, measure):
    """The Estimate of the mean change over the blocks after the SAE's."""
    def change(run):
        return run["all"][measure]["change_after"], run["all"][measure]["ci90_after"]
    return {"mean over blocks": estimate(numbers, change)}


def distances_tables(numbers):
    """The change at every block, a table for each measure."""
    made = []
    for measure, label in distances.MEASURES.items():
        rows = []
        for i, layer in enumerate(numbers[0]["layers"]):
            changes = [at_block(numbers, i, measure, where) for where in distances.POSITIONS]
            rows.append([f"block {layer}", *(cell(change, "+.4f") for change in changes)])
        caption = f"Change of {label} by adapting ({intervals(changes)})"
        made.append(Table(caption, ["output of", *distances.POSITIONS.values()], rows))
    return made


def distances_claims(numbers):
    return [
        Claim("Fig. 11", "Adapting brings activations closer to the base model's: cosine",
              "slightly higher", after_sae(numbers, "cosine"), form="+.4f", unit=""),
        Claim("Fig. 11", "Adapting brings activations closer to the base model's: L2 distance",
              "slightly smaller", after_sae(numbers, "l2"), larger=False, unit=""),
    ]


DISTANCES = Part(
    name="distances",
    title="Distance to the base model's activations",
    figures=("fig11",),
    about=lambda study: about(study, "Cosine similarity and L2 distance between each block's "
                              "output and the base model's without SAE, after adapting minus "
                              "before", "500k"),
    trainings=trainings,
    evaluations=lambda study: evaluated(study, "distances"),
    measure=lambda study: measured(study, "distances"),
    tables=distances_tables,
    claims=distances_claims,
    draw=lambda numbers, figure: distances.draw(numbers[0], figure),
    caption="The first seed. Error bars: 90 %, over documents.",
)
