"""Does training the SAE longer do as well? Tested at several points of a long TopK training run.

    more SAE training       the SAE trains on for as long as the adapters take
    finetuned for KL        the SAE, on as many tokens as the adapters
    LoRA on later blocks    the model is adapted to it, with rank 64 on the blocks after it
    LoRA on all blocks      the same on all blocks, only for the last SAE

    python -m lorasae.paper --model DIR/smollm2-135m-instruct --only control \\
        --data FOLDER --other-data FOLDER

Each is compared, sequence by sequence, with the SAE as it was at that point of its training.
"""
from lorasae.evals.fidelity import read_sequences
from lorasae.evals.report import Table
from lorasae.paper.gap import curve, paired, row_of, run_of, tables
from lorasae.paper.results import Part, cell, group
from lorasae.paper.study import Job, around_long, checkpoint, evaluation, long_sae, of_text

LORA, MORE = "LoRA on later blocks", "more SAE training"


# ---- The runs ------------------------------------------------------------------------------------

def texts(study):
    """{text: (the suite that evaluates the arms on it, the one that evaluates the long SAE)}

    "": the training run itself evaluates it.
    """
    found = {"method, on held-out text": ("", "tenths")}
    if study.other_data:
        found["method, on other text"] = "elsewhere", "elsewhere"
    return found


def arms(study, percent):
    """{arm: its Job}, starting from the long SAE after `percent` % of its training."""
    sae, made = long_sae(study), {LORA: around_long(study, 0, "after", percent)}
    if percent == study.plan.percents[-1]:
        made[f"{LORA}, seed 1"] = around_long(study, 1, "after", percent)
        made["LoRA on all blocks"] = around_long(study, 0, "all", percent)
    made["finetuned for KL"] = Job(study.folder / "saes" / f"{sae.folder.name}-{percent}pct-kl", {
        "model": study.model,
        "method": "finetune",
        "objective": "kl",
        "sae": checkpoint(sae, percent),
        "tokens": made[LORA].options["tokens"],
        **of_text(study),
        **study.plan.finetune,
    }, (sae,), timed=True)
    return made


def jobs(study):
    trained = [job for percent in study.plan.percents for job in arms(study, percent).values()]
    made = [*trained, evaluation(long_sae(study), "tenths")]
    if study.other_data:
        other = {"data": study.other_data, "eval_tokens": study.eval_tokens // 2}
        made += [evaluation(job, "elsewhere", **other) for job in (*trained, long_sae(study))]
    return made


# ---- Results -------------------------------------------------------------------------------------

def measure(study):
    """A row for each text, SAE and arm, and the differences between LoRA and the other arms.

    Case: the share of the gap that LoRA closes for the first SAE - the share for the last SAE.
    """
    rows, beside, runs = [], [], {}
    sae, percents = long_sae(study), study.plan.percents
    tenths = evaluation(sae, "tenths").found()["rows"]
    for text, (suite, of_sae) in texts(study).items():
        trained = read_sequences(sae.folder / of_sae)
        for percent in percents:
            made = arms(study, percent)
            seen = {name: read_sequences(job.folder / suite) for name, job in made.items()}
            cost = {name: job.found() for name, job in made.items()}

            # More training of the SAE: the later tenth whose time is nearest.
            now, *later = [row for row in tenths if row["percent"] >= percent]
            until = now["seconds"] + cost[LORA]["seconds"]
            if later:
                then = min(later, key=lambda row: abs(row["seconds"] - until))
                seen[MORE] = {"documents": trained["documents"],
                              "sae": trained[checkpoint(sae, then["percent"]).name]}
                cost[MORE] = {"train_tokens": then["tokens"] - now["tokens"],
                              "seconds": then["seconds"] - now["seconds"]}

            # Compare every arm with the SAE it started from.
            base, before, here = seen[LORA]["base"], seen[LORA]["sae"], {}
            for name, own in seen.items():
                here[name] = run = run_of(cost[name], {**own, "base": base}, before)
                rows.append(row_of(run, text, f"{percent} %: {name}"))

            # Compare LoRA with the other arms, sequence by sequence.
            lora = here.pop(LORA)
            runs.setdefault(percent, lora)
            for name, run in here.items():
                difference = paired(lora.gap_closed - run.gap_closed, lora, run)
                beside.append([text, f"{percent} %: {name}", difference])
    first, last = runs[percents[0]], runs[percents[-1]]
    falls = paired(first.gap_closed - last.gap_closed, first, last)
    return {"rows": rows, "beside": beside, "cases": {"falls": {"first - last": falls}}}


def own_tables(numbers):
    rows = [[text, what, cell(difference, "+.1%")] for text, what, difference in numbers["beside"]]
    caption = "Gap closed by LoRA on later blocks, minus the gap closed by the other (± 90 %)"
    return [*tables(numbers), Table(caption, ["text", "alternative", "difference"], rows)]


def draw(numbers, figure):
    """The gap closed by each arm, against how much of its training the SAE has had."""
    by_text = group(numbers["rows"], "axis")
    panels = figure.subplots(1, len(by_text), sharey=True, squeeze=False)[0]
    for axes, (text, rows) in zip(panels, by_text.items()):
        series = {}
        for row in rows:
            percent, done = row["x"].split(": ")
            series.setdefault(done, {})[percent] = row["gap_closed"]
        for done, estimates in series.items():
            curve(axes, estimates, done, scale=100)
        axes.set(title=text, xlabel="share of the SAE's training", ylabel="gap closed (%)")
    panels[0].legend()


CONTROL = Part("control", jobs, measure, draw, own_tables)
