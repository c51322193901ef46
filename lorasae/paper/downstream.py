"""Results of eval.py's suites for adapted models, next to the paper's (§5, §6.1, §6.2).

    python -m lorasae.paper --only table3,table4,table5,fig8,fig11

    SAEBENCH        Tables 3 and 6
    STEERING        Table 4, Figures 7 and 10
    BENCHMARKS      Table 5
    TOKENS          Figure 8: the loss by token
    DISTANCES       Figure 11: distance of activations from the base model's

The suites measure and draw; this file turns their numbers into cases of the paper's claims.
"""
from lorasae.evals import absorption, benchmarks, distances, probing, scr, steering, tokens, tpp
from lorasae.evals.common import Estimate
from lorasae.paper.results import Part, over_seeds
from lorasae.paper.study import around_jumprelu, around_long, around_topk, evaluation

TABLE_3 = {"scr": "max", "tpp": "max", "probing": "sae_top_1", "absorption": "absorption"}


def part(name, suites, jobs, cases):
    """A Part whose jobs are evaluations. Suites and jobs are paired in order, and each suite shows
    its job's results; a single suite shows the first job's. cases: [results of each job] -> {claim:
    its cases}.
    """
    def measure(study):
        found = [job.found() for job in jobs(study)]
        return {"found": found, "cases": cases(found)}

    def tables(numbers):
        return [table for suite, found in zip(suites, numbers["found"])
                for table in suite.tables(found)]

    def draw(numbers, figure):
        suites[0].draw(numbers["found"][0], figure)

    return Part(name, jobs, measure, draw if hasattr(suites[0], "draw") else None, tables)


# ---- SAEBench: Tables 3 and 6 --------------------------------------------------------------------

def saebench_jobs(study):
    training = around_topk(study, study.seeds[0])
    labelled, words = ("saebench", 8000) if study.full else ("stdlib", 2000)
    made = [evaluation(training, suite, labelled=labelled) for suite in ("scr", "tpp", "probing")]
    return [*made, evaluation(training, "absorption", words=words)]


def saebench_cases(found):
    """Adapted - base, for each suite's metric in Table 3."""
    cases = {}
    for (name, metric), own in zip(TABLE_3.items(), found):
        row, over = own["rows"][metric], f"{own['seeds']} seeds of the evaluation"
        cases[name] = {name: Estimate(row["difference"], row["ci90"], over)}
    return cases


SAEBENCH = part("saebench", [scr, tpp, probing, absorption], saebench_jobs, saebench_cases)


# ---- Steering: Table 4, Figures 7 and 10 ---------------------------------------------------------

def steering_jobs(study):
    seed = study.seeds[0]
    if study.full:
        return [evaluation(around_long(study, seed, "after", rank=1), "steering", examples=500)]
    return [evaluation(around_jumprelu(study, seed), "steering")]


def steering_cases(found):
    """d_LoRA - d_base for each latent: on positive texts, and its size on negative texts."""
    cases = {"positive": {}, "negative": {}}
    for row in found[0]["rows"]:
        for side, latents in cases.items():
            delta, over = row[side]["delta"], f"{len(row[side]['d']['base'])} texts"
            if side == "negative":
                delta = abs(delta)
            latents[f"latent {row['latent']}"] = Estimate(delta, row[side]["ci90"], over)
    return cases


STEERING = part("steering", [steering], steering_jobs, steering_cases)


# ---- Language-model benchmarks: Table 5 ----------------------------------------------------------

def benchmark_cases(found):
    """Adapted - base for each score, with and without the SAE."""
    cases = {"with_sae": {}, "without_sae": {}}
    for label, pairs in found[0]["paired"].items():
        for setting, scores in cases.items():
            mean, half, questions = pairs[setting]
            scores[label] = Estimate(mean, half, f"{questions:,} questions")
    return cases


BENCHMARKS = part(
    "benchmarks", [benchmarks],
    lambda study: [evaluation(around_jumprelu(study, study.seeds[0]), "lm",
                              tasks="local" if study.laptop else None)], benchmark_cases)


# ---- Loss by token, activations: Figures 8 and 11 ------------------------------------------------

def for_each_seed(suite):
    """study -> Jobs that run one suite on the adapters of each seed."""
    return lambda study: [evaluation(around_topk(study, seed), suite) for seed in study.seeds]


def estimate(runs, pick):
    """The Estimate over seeds, or over documents for a single seed. pick(run) -> (mean, half)"""
    return over_seeds([Estimate(*pick(run), f"{run['documents']} documents, one seed")
                       for run in runs])


def token_cases(runs):
    """Share of tokens that get worse; share of the improvement from changes of 0.01 to 1 nats."""
    found = {name: estimate(runs, lambda run: (run[name], run["ci90"][name]))
             for name in ("share_worse", "from_middle")}
    if min(run["improvement"] for run in runs) <= 0:
        found["from_middle"] = Estimate(None, None, "no improvement to divide by")
    return {name: {"share": own} for name, own in found.items()}


def distance_cases(runs):
    """The mean change of each measure over the blocks after the SAE."""
    cases = {}
    for measure in distances.MEASURES:
        found = estimate(runs, lambda run: (
            run["all"][measure]["change_after"], run["all"][measure]["ci90_after"]))
        cases[measure] = {"mean over blocks": found}
    return cases


TOKENS = part("tokens", [tokens], for_each_seed("tokens"), token_cases)
DISTANCES = part("distances", [distances], for_each_seed("distances"), distance_cases)
