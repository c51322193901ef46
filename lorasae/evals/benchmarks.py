"""Language-model benchmarks (paper §5.3, Table 5): with and without SAEs, base and adapted.

    python eval.py RUN_DIR --suite lm                       the paper's tasks, fetched from the Hub
    python eval.py RUN_DIR --suite lm --tasks local         the same four forms, offline
    python eval.py RUN_DIR --suite lm --tasks my_task.yaml --limit 100      your own lm-eval task

The lm-eval package makes the prompts and computes the scores (accuracy, BLEU, ROUGE); spliced_lm.py
answers them. The included models know nothing about the paper's tasks, so they get local ones.

All settings answer the same questions, so the effect of adapting (adapted - base) is paired.
"""
import math
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from lorasae.errors import InputError
from lorasae.evals.common import as_model, interval
from lorasae.evals.fidelity import WITH_SAE
from lorasae.evals.local_tasks import local_tasks
from lorasae.evals.report import Table, with_interval
from lorasae.io.console import note
from lorasae.io.files import first_line
from lorasae.io.presets import TINY, preset

# Table 5's columns, and its rows. lm-eval computes more than the paper shows.
SETTINGS = {"sae": "SAE", "adapted": "SAE + LoRA", "base": "original", "lora": "LoRA"}
PAIRS = {"with_sae": ("sae", "adapted"), "without_sae": ("base", "lora")}
TABLE_5 = {
    ("mmlu", "acc"): "MMLU",
    ("hellaswag", "acc"): "HellaSwag",
    ("truthfulqa_gen", "bleu_acc"): "BLEU",
    ("truthfulqa_gen", "rouge1_acc"): "ROUGE-1",
    ("truthfulqa_gen", "rouge2_acc"): "ROUGE-2",
    ("truthfulqa_mc1", "acc"): "MC1",
}
TASKS = "mmlu,hellaswag,truthfulqa_gen,truthfulqa_mc1"
LOCAL = "local"                                         # TABLE_5's tasks, prefixed with `local_`
SEED = 1234                                             # lm-eval's own, for few-shot examples


# ---- The evaluation ----------------------------------------------------------------------------

def add_options(add):
    add("--tasks", help="comma-separated lm-eval tasks or your own YAML files, or local: four "
        "tasks on held-out text (default: local for an included model, Table 5's otherwise)")
    add("--limit", type=int, metavar="N",
        help="only the first N questions of each task (default: all)")


def evaluate(setting, tasks, limit):
    """tasks: as in --tasks, or None. limit: questions per task; None: all."""
    if find_spec("lm_eval") is None:
        raise InputError("the language-model benchmarks need the lm-eval package: pip install "
                         '"lm-eval>=0.4.12"')
    loaded = load_tasks(tasks or default_tasks(setting.config.model))
    return measure(setting.model, setting.saes, setting.text.tokenizer, loaded, limit)


def default_tasks(model):
    """The default --tasks for a model's name. Included models get the local tasks, and a note."""
    known = preset(model)
    if known is None or not Path(known.repo).is_relative_to(TINY):
        return TASKS
    note(f"{model} is an included model: --tasks {LOCAL} asks about held-out files of the "
         f"standard library (the paper's tasks: --tasks {TASKS})")
    return LOCAL


def load_tasks(tasks):
    """Loads lm-eval's tasks and their data. tasks: as in --tasks."""
    from lm_eval.tasks import TaskManager
    names = tasks.split(",")
    own = tasks == LOCAL or all(name.endswith(".yaml") for name in names)
    manager = TaskManager(include_defaults=not own)     # reading lm-eval's own takes seconds
    wanted = local_tasks() if tasks == LOCAL else names
    try:
        return manager.load(wanted)
    except Exception as error:                          # any error: user input, others' code
        raise InputError(f"lm-eval cannot load --tasks {tasks}: {first_line(error)} "
                         "(`lm-eval ls tasks` lists its tasks, whose data come from the Hub; the "
                         "name of a YAML file ends in .yaml)") from error


def measure(model, saes, tokenizer, tasks, limit=None):
    """Scores in the four settings. tasks: what load_tasks returns; limit: questions per task.

    Returns {"rows": {row: {"task", and each setting's score}}, "paired": {row: {"with_sae" and
    "without_sae": [mean, half, questions]}}}. "paired" is adapted - base, for means over questions.
    """
    from lm_eval import evaluator
    from lorasae.evals.spliced_lm import SplicedLM
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: expected at least 1 question")
    found = {}
    for setting, heading in SETTINGS.items():
        note(f"{heading}:")
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(SEED)                 # the same examples in every setting
        lm = SplicedLM(model, tokenizer, saes if setting in WITH_SAE else {})
        with as_model(model, setting):
            found[setting] = evaluator.evaluate(lm, tasks, limit=limit, bootstrap_iters=0)

    rows, paired = {}, {}
    for row, (task, metric) in rows_of(found["base"]["results"], tasks["group_map"]).items():
        rows[row], scores = {"task": task}, {}
        for setting, each in found.items():
            rows[row][setting] = score = each["results"][task][metric]
            scores[setting] = by_question(tasks, each["samples"], task, metric, score)
        if all(map(len, scores.values())):
            paired[row] = {}
            for pair, (plain, adapted) in PAIRS.items():
                difference = scores[adapted] - scores[plain]
                paired[row][pair] = [*interval(difference), len(difference)]
    return {"lm_eval": version("lm_eval"), "limit": limit, "rows": rows, "paired": paired}


def rows_of(results, groups):
    """{row: (task, metric)}: Table 5's metrics for its tasks and the local ones, all for others.

    results: lm-eval's, {task: {"acc,none": 0.5, "acc_stderr,none": 0.01, "alias": ...}}. groups:
    {group: [its tasks and groups]}. If a group has a score, its parts get no rows.
    """
    def metrics(task):
        return [name for name in results.get(task, ()) if "," in name and "_stderr," not in name]

    parts = sum([groups[group] for group in groups if metrics(group)], [])
    known = {task for task, _ in TABLE_5}
    rows = {}
    for task in results:
        form = task.removeprefix("local_")
        for metric in metrics(task):
            short = metric.removesuffix(",none")
            row = TABLE_5.get((form, short), f"{task} {short}")
            if task not in parts and (form not in known or row in TABLE_5.values()):
                rows[row] = task, metric
    return rows


def by_question(tasks, samples, task, metric, score):
    """The score of each question, fp64 [n]; empty if the task's score is not their mean.

    samples: what lm-eval logs, by task. MMLU's score is the mean over the questions of all its
    tasks; corpus BLEU has no score per question.
    """
    group = tasks["groups"].get(task)
    members = [member.task_name for member in group.get_all_tasks()] if group else [task]
    name, _, filtered = metric.partition(",")
    values = [sample.get(name) for member in members for sample in samples.get(member, ())
              if sample["filter"] == filtered]
    if not all(isinstance(value, (int, float)) for value in values):
        values = []
    values = torch.tensor(values, dtype=torch.float64)
    return values if math.isclose(values.mean(), score, rel_tol=1e-6) else values[:0]


# ---- What it shows -----------------------------------------------------------------------------

def tables(numbers):
    """Table 5, with the effect of adapting after each pair of settings."""
    headings, rows = [""], []
    for pair in PAIRS.values():
        headings += [*map(SETTINGS.get, pair), "difference"]
    for row, found in numbers["rows"].items():
        cells = [f"{row} (local)" if found["task"].startswith("local_") else row]
        for pair, settings in PAIRS.items():
            mean, half, _ = numbers["paired"].get(row, {}).get(pair, [None] * 3)
            cells += [f"{found[setting]:.3f}" for setting in settings]
            cells.append(with_interval(mean, half, "+.3f"))
        rows.append(cells)

    notes = (
        "Scores are in lm-eval's units (the paper prints percentages). Differences are paired by "
        "question, ± 90 % over questions",
        "BLEU, ROUGE-1 and ROUGE-2 score the same answers, MC1 the same questions",
    )
    return [Table("Benchmarks (Table 5)", headings, rows, notes)]
