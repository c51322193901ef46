"""What eval.py's suites find in adapted models, beside the paper (§5, §6.1, §6.2).

    python -m lorasae.paper --only table3,table4,table5,fig8,fig11

    SAEBENCH        Tables 3 and 6
    STEERING        Table 4, Figures 7 and 10
    BENCHMARKS      Table 5
    TOKENS          Figure 8: the loss by token
    DISTANCES       Figure 11: activations beside the base model's

The suites measure and draw; here their numbers become cases of the paper's claims.
"""
from lorasae.evals import (absorption, benchmarks, distances, probing, scr, steering, tokens, tpp)
from lorasae.evals.common import Estimate
from lorasae.evals.report import bars, zero_line
from lorasae.paper.results import Part, over_seeds
from lorasae.paper.study import around_jumprelu, around_long, around_topk, evaluation

SUITES = {"scr": scr, "tpp": tpp, "probing": probing, "absorption": absorption}


def part(name, jobs, cases, draw, tables):
    """A Part whose jobs are evaluations. cases, draw and tables take the list of what these found.
    """
    def measure(study):
        found = [job.found() for job in jobs(study)]
        return {"found": found, "cases": cases(found)}

    return Part(name, jobs, measure, lambda numbers, figure: draw(numbers["found"], figure),
                lambda numbers: tables(numbers["found"]))


def of_first(function):
    """A function of what one evaluation found, as one of the list: the first, or the only one."""
    return lambda found, *others: function(found[0], *others)


# ---- SAEBench: Tables 3 and 6 --------------------------------------------------------------------

def saebench_jobs(study):
    training, seeds = around_topk(study, study.seeds[0]), len(study.seeds)
    labelled, words = ("saebench", 8000) if study.full else ("stdlib", 2000)
    made = [evaluation(training, suite, labelled=labelled, seeds=seeds)
            for suite in ("scr", "tpp", "probing")]
    return [*made, evaluation(training, "absorption", words=words, seeds=seeds)]


def differences(found):
    """{suite: {metric of Table 6: the Estimate of adapted - base}}"""
    made = {}
    for (name, suite), own in zip(SUITES.items(), found):
        over, rows = f"{own['seeds']} seeds of the evaluation", own["rows"]
        made[name] = {metric: Estimate(rows[metric]["difference"], rows[metric]["ci90"], over)
                      for metric in suite.PAPER}
    return made


def saebench_cases(found):
    """Table 3 has each suite's first metric."""
    return {name: {name: next(iter(metrics.values()))}
            for name, metrics in differences(found).items()}


def draw_saebench(found, figure):
    """The change of every metric of Table 6, ours and the paper's."""
    labels, ours, paper = [], [], []
    for name, metrics in differences(found).items():
        suite = SUITES[name]
        labels += [suite.LABELS[metric] for metric in metrics]
        ours += metrics.values()
        paper += [(lora - base, None) for lora, base in suite.PAPER.values()]
    figure.set_size_inches(8, 4)
    axes = figure.subplots()
    bars(axes, labels, {"ours": ours, "paper (one seed)": paper})
    zero_line(axes)
    axes.tick_params("x", rotation=90, labelsize=7)
    axes.set_ylabel("adapted minus base")
    axes.legend()


def saebench_tables(found):
    return [table for suite, own in zip(SUITES.values(), found) for table in suite.tables(own)]


SAEBENCH = part("saebench", saebench_jobs, saebench_cases, draw_saebench, saebench_tables)


# ---- Steering: Table 4, Figures 7 and 10 ---------------------------------------------------------

def steering_jobs(study):
    seed = study.seeds[0]
    if not study.full:
        return [evaluation(around_jumprelu(study, seed), "steering", examples=100)]
    steered = around_long(study, seed, "after", rank=1)
    return [evaluation(steered, "steering", examples=500)]


def steering_cases(found):
    """d_LoRA - d_base of each latent's positive texts, and the size of that of negative ones."""
    cases = {"positive": {}, "negative": {}}
    for row in found["rows"]:
        for side, latents in cases.items():
            delta, half = row[side]["delta"], row[side]["ci90"]
            over = f"{len(row[side]['d']['base'])} texts"
            if row["alpha_base"] == row["alpha_lora"] == 0:
                delta, half, over = 0.0, None, "no α helps either model"
            if side == "negative":
                delta = abs(delta)
            latents[f"latent {row['latent']}"] = Estimate(delta, half, over)
    return cases


STEERING = part("steering", steering_jobs, of_first(steering_cases), of_first(steering.draw),
                of_first(steering.tables))


# ---- Language-model benchmarks: Table 5 ----------------------------------------------------------

def benchmark_cases(found):
    """Adapted - base of each score, with the SAE and without it."""
    cases = {"with_sae": {}, "without_sae": {}}
    for label, pairs in found["paired"].items():
        for setting, scores in cases.items():
            mean, half, questions = pairs[setting]
            scores[label] = Estimate(mean, half, f"{questions:,} questions")
    return cases


BENCHMARKS = part(
    "benchmarks",
    lambda study: [evaluation(around_jumprelu(study, study.seeds[0]), "lm",
                              tasks="local" if study.laptop else None)],
    of_first(benchmark_cases), of_first(benchmarks.draw), of_first(benchmarks.tables))


# ---- Loss by token, activations: Figures 8 and 11 ------------------------------------------------

def for_each_seed(suite):
    """Jobs of a part: a suite on the adapters of each seed."""
    return lambda study: [evaluation(around_topk(study, seed), suite) for seed in study.seeds]


def estimate(runs, pick):
    """The Estimate over seeds; of a single seed over documents. pick(found) -> (mean, half)"""
    return over_seeds([Estimate(*pick(run), f"{run['documents']} documents, one seed")
                       for run in runs])


def token_cases(runs):
    """The share of tokens that become worse, and that of the improvement by 0.01 to 1 nats."""
    found = {name: estimate(runs, lambda run: (run[name], run["ci90"][name]))
             for name in ("share_worse", "from_middle")}
    if min(run["improvement"] for run in runs) <= 0:
        found["from_middle"] = Estimate(None, None, "no improvement to divide by")
    return {name: {"share": own} for name, own in found.items()}


def distance_cases(runs):
    """The mean change of each measure over the blocks after the SAE's."""
    cases = {}
    for measure in distances.MEASURES:
        found = estimate(runs, lambda run: (
            run["all"][measure]["change_after"], run["all"][measure]["ci90_after"]))
        cases[measure] = {"mean over blocks": found}
    return cases


TOKENS = part("tokens", for_each_seed("tokens"), token_cases, of_first(tokens.draw),
              of_first(tokens.tables))
DISTANCES = part("distances", for_each_seed("distances"), distance_cases,
                 of_first(distances.draw), of_first(distances.tables))
