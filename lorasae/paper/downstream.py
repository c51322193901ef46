"""Downstream improvements (§5): SAEBench, steering and language-model benchmarks.

    python -m lorasae.paper --only table3,table4,table5

Tables 3 to 6, Figures 7 and 10. eval.py's suites measure; here their numbers meet the paper's.
"""
from lorasae.evals import absorption, autointerp, benchmarks, probing, scr, steering, tpp
from lorasae.evals.common import Estimate
from lorasae.evals.report import Table, bars, zero_line
from lorasae.paper.results import Claim, Part
from lorasae.paper.study import (Evaluation, adapters, around_jumprelu, around_topk, budget, found,
                                 new_sae)

# ---- SAEBench: Tables 3 and 6 --------------------------------------------------------------------

SUITES = {"scr": scr, "tpp": tpp, "probing": probing, "absorption": absorption}


def about_saebench(study):
    texts = "files of the standard library" if study.miniature else "SAEBench's own data sets"
    return (
        "The SAE reads the base and the adapted model (TopK, adapters on all blocks); nothing is "
        f"spliced in. The labelled texts are {texts}. Differences are paired. Their intervals are "
        "over seeds of the evaluation, autointerp's over latents, of a single training: they do "
        "not show how trainings differ. Autointerp's judge is lexical here and was gpt-4o-mini in "
        "the paper, so its score is shown but not compared. "
        + budget(study, around_topk(study, study.seeds[0]), "15M", study.seeds[:1]))


def saebench_evaluations(study):
    training = around_topk(study, study.seeds[0])
    options = {
        "labelled": "stdlib" if study.miniature else "saebench",
        "words": 2000 if study.miniature else 8000,
        "seeds": len(study.seeds),
        "judge_latents": 300 if study.miniature else 1000,
        "judge_seeds": len(study.seeds),
    }
    return [Evaluation(training, suite, options) for suite in (*SUITES, "autointerp")]


def measure_saebench(study):
    """{suite: what it found}"""
    return {each.suite: found(study, each) for each in saebench_evaluations(study)}


def saebench_tables(numbers):
    made = []
    for name, suite in {**SUITES, "autointerp": autointerp}.items():
        made += suite.tables(numbers[name])
    return made


def differences(numbers, name):
    """[(label, the Estimate of adapted - base, the paper's)] of a suite's rows of Table 6."""
    suite, measured = SUITES[name], numbers[name]
    over = f"{measured['seeds']} seeds of the evaluation"
    made = []
    for metric, (lora, base) in suite.PAPER.items():
        row = measured["rows"][metric]
        ours = Estimate(row["difference"], row["ci90"], over)
        made.append((suite.LABELS[metric], ours, lora - base))
    return made


def saebench_claims(numbers):
    """One for each suite: that its first metric rises, as it does in Table 3."""
    made = []
    for name, suite in SUITES.items():
        (label, ours, paper), *_ = differences(numbers, name)
        says = f"Adapting raises the score in {name} ({label})"
        words = f"{paper:+.3f} in one seed; SAEBench's reruns differ by up to {suite.TOLERANCE}"
        made.append(Claim("Table 3", says, words, {name: ours}, paper_values=(paper,), unit=""))
    return made


def draw_saebench(numbers, figure):
    """The change of every metric of Table 6, ours and the paper's."""
    rows = [row for name in SUITES for row in differences(numbers, name)]
    labels, ours, paper = zip(*rows)
    figure.set_size_inches(8, 4)
    axes = figure.subplots()
    bars(axes, labels, {"ours": ours, "paper (one seed)": [(mean, None) for mean in paper]})
    zero_line(axes)
    axes.tick_params("x", rotation=90, labelsize=7)
    axes.set_ylabel("adapted minus base")
    axes.legend()


SAEBENCH = Part(
    name="saebench",
    title="SAEBench",
    figures=("table3", "table6"),
    about=about_saebench,
    trainings=lambda study: [around_topk(study, study.seeds[0])],
    evaluations=saebench_evaluations,
    measure=measure_saebench,
    tables=saebench_tables,
    claims=saebench_claims,
    draw=draw_saebench,
    caption="Adapted model minus base model. Error bars: 90 %, over seeds of the evaluation.",
)


# ---- Steering: Table 4, Figures 7 and 10 ---------------------------------------------------------

PAPERS_TABLE_4 = [
    ["machine learning", "+0.86 ± 0.82", "0.84 ± 0.43"],
    ["San Francisco", "+0.97 ± 0.76", "0.06 ± 0.20"],
    ["Donald Trump", "+2.50 ± 0.56", "0.20 ± 0.40"],
    ["Covid-19", "+0.44 ± 0.25", "0.01 ± 0.06"],
]


def about_steering(study):
    which = ("of rank 64 around a JumpReLU SAE" if study.miniature
             else "of rank 1 around a TopK SAE, as in the published code")
    return (
        "x ← x + α (x·v) v with a latent's decoder row v, in both models (Eq. 8, here with α ≥ 0). "
        "d is the change of a text's likelihood, in units in which the unsteered texts span 100. "
        "Each model's α is tuned on half of the texts; the results are about the other half. The "
        "texts are held-out passages in which a latent fires, and others; the paper's were written "
        "by a language model about four latents (eval.py --suite steering --positives takes such "
        "texts). The published code scores the current token in place of the next, so the paper's "
        f"levels cannot be compared. Adapters are on the blocks after the SAE, {which}. "
        + budget(study, steered(study), "15M", study.seeds[:1]))


def steered(study):
    """The Training of the adapted model."""
    seed, model = study.seeds[0], study.models.main
    if study.miniature:
        return around_jumprelu(study, seed)
    return adapters(study, f"{model}-steered-seed-{seed}", model, [new_sae(study, "topk", model)],
                    tokens=study.long_tokens, seed=seed, rank=1, adapt="after")


def steering_evaluations(study):
    texts = 100 if study.miniature else 500
    return [Evaluation(steered(study), "steering", {"examples": texts})]


def steering_tables(numbers):
    paper = Table("Table 4 of the paper: change of d by adapting (± 90 % over texts)",
                  ["latent", "positive texts", "negative texts, size only"], PAPERS_TABLE_4)
    return [*steering.tables(numbers), paper]


def changes(numbers, side):
    """{latent: the Estimate of d_LoRA - d_base on its positive or negative texts}"""
    made = {}
    for row in numbers["rows"]:
        texts = row[side]
        over = f"{len(texts['d']['base'])} texts"
        if row["alpha_base"] == row["alpha_lora"] == 0:
            texts, over = {"delta": 0.0, "ci90": None}, "no α helps either model"
        made[f"latent {row['latent']}"] = Estimate(texts["delta"], texts["ci90"], over)
    return made


def steering_claims(numbers):
    sizes = {}
    for name, change in changes(numbers, "negative").items():
        sizes[name] = change._replace(mean=abs(change.mean))
    return [
        Claim("Table 4", "Steering moves positive texts more in the adapted model",
              "+0.44 to +2.50, beyond the interval for all four latents",
              changes(numbers, "positive"), paper_values=(0.86, 0.97, 2.50, 0.44), form="+.2f",
              unit="of d"),
        Claim("Table 4", "Steering moves negative texts alike in both models, within 0.84 of d",
              "0.01 to 0.84 apart", sizes, threshold=0.84, larger=False,
              paper_values=(0.84, 0.06, 0.20, 0.01), form=".2f", unit="of d"),
    ]


STEERING = Part(
    name="steering",
    title="Steering with latents",
    figures=("table4", "fig7", "fig10"),
    about=about_steering,
    trainings=lambda study: [steered(study)],
    evaluations=steering_evaluations,
    measure=lambda study: found(study, *steering_evaluations(study)),
    tables=steering_tables,
    claims=steering_claims,
    draw=steering.draw,
    caption="Distributions over test texts, without error bars.",
)


# ---- Language-model benchmarks: Table 5 ----------------------------------------------------------

PAPERS_TABLE_5 = {                      # in percent: not adapted → adapted
    "2B, with SAE": ["44.2 → 45.8", "50.9 → 52.1", "29.9 → 30.6", "28.2 → 28.5", "24.8 → 26.6",
                     "23.1 → 23.4"],
    "2B, without": ["49.3 → 50.0", "55.0 → 56.0", "30.4 → 32.4", "26.9 → 30.2", "25.6 → 29.1",
                    "24.1 → 24.3"],
    "9B, with SAE": ["64.2 → 65.7", "58.3 → 59.6", "40.9 → 42.4", "39.0 → 40.6", "33.4 → 36.4",
                     "27.1 → 28.0"],
    "9B, without": ["70.0 → 68.8", "61.2 → 61.9", "43.8 → 43.6", "42.7 → 43.5", "38.3 → 38.8",
                    "30.5 → 31.0"],
    "27B, with SAE": ["70.9 → 71.3", "61.0 → 62.7", "40.9 → 38.9", "41.0 → 38.3", "37.1 → 35.3",
                      "30.2 → 31.5"],
    "27B, without": ["72.1 → 72.7", "65.3 → 65.5", "41.1 → 41.9", "40.9 → 41.7", "36.2 → 37.1",
                     "33.8 → 32.9"],
}


def about_benchmarks(study):
    tasks = ("The four tasks are made of held-out files of the standard library, in the forms of "
             "MMLU, HellaSwag and TruthfulQA, because a model of this size is at chance in those"
             if study.miniature else
             "The tasks are the paper's; the model is the smallest of its three")
    return (
        f"{tasks}. The lm-eval package makes the prompts and the scores. Adapters are on the "
        "blocks after a JumpReLU SAE. Generated tokens pass through the SAE too, which they do not "
        "in the published code. BLEU, ROUGE-1 and ROUGE-2 score the same answers, so they are not "
        "three independent cases. "
        + budget(study, around_jumprelu(study, study.seeds[0]), "15M", study.seeds[:1]))


def benchmark_evaluations(study):
    return [Evaluation(around_jumprelu(study, study.seeds[0]), "lm")]


def benchmark_tables(numbers):
    rows = [[setting, *scores] for setting, scores in PAPERS_TABLE_5.items()]
    paper = Table("Table 5 of the paper, Gemma-2: not adapted → adapted (%)",
                  ["", "MMLU", "HellaSwag", "BLEU", "ROUGE-1", "ROUGE-2", "MC1"], rows)
    return [*benchmarks.tables(numbers), paper]


def benchmark_claims(numbers):
    return [
        benchmark_claim(numbers, "with_sae", "2B, with SAE",
                        "With the SAE, adapting raises the scores of benchmarks"),
        benchmark_claim(numbers, "without_sae", "2B, without",
                        "Without the SAE, the adapted model scores higher than the base model"),
    ]


def benchmark_claim(numbers, setting, papers_setting, says):
    cases, papers = {}, []
    for label, pairs in numbers["paired"].items():
        mean, half, questions = pairs[setting]
        cases[label] = Estimate(mean, half, f"{questions:,} questions")
    for score in PAPERS_TABLE_5[papers_setting]:
        before, after = map(float, score.split(" → "))
        papers.append((after - before) / 100)
    return Claim("Table 5", says, "in 15 of 18 scores over three models, 6 of 6 on Gemma-2-2B",
                 cases, paper_values=tuple(papers), form="+.1%", unit="of the questions")


BENCHMARKS = Part(
    name="benchmarks",
    title="Language-model benchmarks",
    figures=("table5",),
    about=about_benchmarks,
    trainings=lambda study: [around_jumprelu(study, study.seeds[0])],
    evaluations=benchmark_evaluations,
    measure=lambda study: found(study, *benchmark_evaluations(study)),
    tables=benchmark_tables,
    claims=benchmark_claims,
    draw=benchmarks.draw,
    caption="Adapted model minus base model. Error bars: 90 %, over questions.",
)
