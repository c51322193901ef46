"""Which tokens adapting helps (§6.1, Figure 8)."""
from lorasae.evals import tokens
from lorasae.evals.common import percent
from lorasae.paper.findings import Claim, Table, over_seeds, with_interval
from lorasae.paper.study import around_topk_of_seeds, opened

TITLE = "Change of loss by token"
FIGURES = ("fig8",)
ABOUT = (
    "The change in every held-out token's loss, CE with SAE - CE with SAE and adapters, around a "
    "TopK SAE with adapters on all blocks, on the text that the SAE's run holds out (the paper "
    "took the Pile). The picture is the first seed's.")

LARGER = ("the SAE of so small a model costs several times more nats per token than the paper's, "
          "and most of the improvement comes from changes of more than 1 nat")


trainings = around_topk_of_seeds


def cost(study):
    """{kind of work: tokens}: with the SAE and with adapters."""
    return {"forward": 2 * len(study.seeds) * study.held_out}


def measure(study):
    """{"seeds": [what evals/tokens.py finds]}"""
    found = [tokens.evaluate(opened(study, training), None) for training in trainings(study)]
    return {"seeds": found}


def tables(numbers):
    seeds = numbers["seeds"]
    worse = [found["share_worse"] for found in seeds]
    improvement = [found["improvement"] for found in seeds]
    middle = [in_the_middle(found) for found in seeds]

    rows = [
        ["tokens that become worse", with_interval(worse)],
        ["improvement (nats per token)", with_interval(improvement, ".4f")],
        ["of it, from changes of 0.01 to 1 nats", with_interval(middle)],
    ]
    return [Table("Change of the loss (± 90 % over seeds)", ["", "ours"], rows)]


def in_the_middle(found):
    """The part of the improvement from changes of 0.01 to 1 nats; None without an improvement."""
    if found["improvement"] <= 0:
        return None
    middle = 0.0
    for smallest, row in zip(tokens.SIZES, found["by_size"]):
        if 0.01 <= smallest < 1:
            middle += row["gained"] - row["lost"]
    return middle / found["improvement"]


def claims(numbers):
    worse, _ = over_seeds([found["share_worse"] for found in numbers["seeds"]])

    middle = [in_the_middle(found) for found in numbers["seeds"]]
    most = None
    if None not in middle:
        share, _ = over_seeds(middle)
        most = share > 0.5

    return [
        Claim("A substantial part of the tokens becomes worse, but less than half",
              "37 %",
              percent(worse),
              direction=0.1 < worse < 0.5,
              size=abs(worse - 0.37) < 0.05),
        Claim("Most of the improvement comes from changes of about 0.01 to 1 nats",
              "most",
              with_interval(middle),
              direction=most,
              why_in_miniature="" if most else LARGER),
    ]


def draw(numbers, figure):
    """Figure 8."""
    tokens.draw(numbers["seeds"][0], figure)
