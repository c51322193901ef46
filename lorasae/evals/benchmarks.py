"""Language-model benchmarks (paper §5.3, Table 5): the model with SAEs and without, adapted and not, by lm-eval.

    python eval.py RUN_DIR --suite lm                                       the paper's four tasks, fetched from the Hub
    python eval.py RUN_DIR --suite lm --tasks local                         the same four forms, without a network
    python eval.py RUN_DIR --suite lm --tasks my_task.yaml --limit 100      a task of one's own, in lm-eval's format

The lm-eval package makes the prompts and computes the scores (accuracy, BLEU, ROUGE); spliced_lm.py answers them. The
embedded models know nothing of the paper's tasks: theirs are the local ones (local_tasks.py).
"""
from importlib.metadata import version
from pathlib import Path

from lorasae.errors import InputError
from lorasae.evals.common import evaluating, plus_minus, print_table
from lorasae.evals.local_tasks import local_tasks
from lorasae.io.console import note
from lorasae.io.presets import TINY, preset

SETTINGS = {                                # the columns of Table 5: (SAEs spliced in, adapters on)
    "sae": ("SAE", True, False), "adapted": ("SAE + LoRA", True, True),
    "base": ("original", False, False), "lora": ("LoRA", False, True),
}
TABLE_5 = {                                   # its rows; lm-eval computes more than the paper shows
    ("mmlu", "acc"): "MMLU", ("hellaswag", "acc"): "HellaSwag", ("truthfulqa_gen", "bleu_acc"): "BLEU",
    ("truthfulqa_gen", "rouge1_acc"): "ROUGE-1", ("truthfulqa_gen", "rouge2_acc"): "ROUGE-2",
    ("truthfulqa_mc1", "acc"): "MC1",
}
TASKS = "mmlu,hellaswag,truthfulqa_mc1,truthfulqa_gen"
LOCAL = "local"                                         # for `local_` before each of these
SEED = 1234                                             # lm-eval's own, of the examples that few-shot tasks draw


# ---- Table 5 -------------------------------------------------------------------------------------

def load_tasks(names):
    """lm-eval's tasks, with their data: names, "local", or YAML files and folders of them (with a / or ending in .yaml)."""
    paths = {name: Path(name).resolve() for name in names if "/" in name or name.endswith(".yaml")}
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=[path for path in paths.values() if path.is_dir()],
                          include_defaults=not set(names) <= {*paths, LOCAL})       # lm-eval's own take seconds to read
    index, specs = manager.task_index, []
    for name in names:
        if name == LOCAL:
            specs += local_tasks()
            continue
        specs += [task for task in manager.all_subtasks if paths.get(name) in index[task].yaml_path.parents] or [name]
    try:
        return manager.load(specs)
    except ConnectionError as error:
        raise InputError(f"the data of --tasks {','.join(names)} come from the Hub, which is out of reach ({error}): run "
                         "once with a network, or pass a YAML file with local data") from error
    except Exception as error:                          # others' code on the user's words: these are what to mend
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"lm-eval cannot load --tasks {','.join(names)}: {type(error).__name__}: {reason} (`lm-eval ls "
                         "tasks` lists its tasks; the name of a YAML file ends in .yaml)") from error


def add_options(add):
    add("--tasks", help="tasks of lm-eval, YAML files of one's own, or local: four made from held-out text; "
        "comma-separated (default: local for an embedded model, else the paper's Table 5)")
    add("--limit", type=int, metavar="N", help="only the first N questions of each task (default: all)")


def evaluate(setting, options):
    require_lm_eval()
    names = options.tasks or default_tasks(setting.config.model)
    tasks = load_tasks(names.split(","))
    return measure(setting.model, setting.saes, setting.text.tokenizer, tasks, limit=options.limit)


def default_tasks(model):
    """--tasks for a model, by its name: an embedded one, which read little but code, gets its own, and a line says so."""
    known = preset(model)
    if known is None or not Path(known.repo).is_relative_to(TINY):
        return TASKS
    note(f"{model} is an embedded model: --tasks {LOCAL}, on held-out files of the standard library (the paper's: "
        f"--tasks {TASKS})")
    return LOCAL


def require_lm_eval():
    """Raises InputError where the optional package is missing."""
    try:
        import lm_eval                                # noqa: F401 - asks whether it can be imported
    except ImportError as error:
        if not (error.name or "").startswith("lm_eval"):       # something that lm-eval itself lacks
            raise
        raise InputError('the language-model benchmarks need the lm-eval package: pip install "lm-eval>=0.4.12"') from None


def measure(model, saes, tokenizer, tasks, limit=None):
    """{setting: {task: {metric: [value, standard error or None]}}}; also "samples": {task: number of questions} and
    "tasks": those that are not part of another's score.

    tasks: what load_tasks returns; limit: only so many questions of each.
    """
    from lm_eval import evaluator
    from lorasae.evals.spliced_lm import SplicedLM
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: expected at least 1 question")
    numbers = {"lm_eval": version("lm_eval"), "limit": limit}
    with evaluating(model):
        for setting, (label, spliced, lora) in SETTINGS.items():
            note(f"{label}:")
            for task in tasks["tasks"].values():
                task.set_fewshot_seed(SEED)           # else every setting would draw other examples
            lm = SplicedLM(model, tokenizer, saes if spliced else {}, lora=lora)
            results = evaluator.evaluate(lm, tasks, limit=limit, bootstrap_iters=1000, log_samples=False)
            numbers["samples"] = {task: count["effective"] for task, count in results["n-samples"].items()}
            found = numbers[setting] = {task: measured(metrics) for task, metrics in results["results"].items()}
            parts = {part for group, members in tasks["group_map"].items() if found.get(group) for part in members}
            numbers["tasks"] = [task for task in found if found[task] and task not in parts]
    return numbers


def measured(metrics):
    """lm-eval's {"acc,none": value, "acc_stderr,none": error or "N/A"} -> {"acc": [value, error or None]}."""
    out = {}
    for key, value in metrics.items():
        if "," in key and "_stderr," not in key:
            stderr = metrics.get(key.replace(",", "_stderr,", 1))
            out[key.removesuffix(",none")] = [value, stderr if isinstance(stderr, float) else None]
    return out


def show(numbers):
    """Table 5: of the paper's tasks and of the local ones the metrics it shows, of others all."""
    settings = [name for name in SETTINGS if name in numbers]
    found = numbers[settings[0]]
    labels = dict(TABLE_5)
    labels.update({(f"local_{task}", metric): f"{label} (local)" for (task, metric), label in TABLE_5.items()})

    known = {task for task, _ in labels}
    keys = [key for key in labels if key[1] in found.get(key[0], ())]
    keys += [(task, metric) for task in numbers["tasks"] if task not in known for metric in found[task]]
    rows = []
    for task, metric in keys:
        cells = (f"{value:.4f} {plus_minus(error)}" for value, error in (numbers[s][task][metric] for s in settings))
        rows.append([labels.get((task, metric), f"{task} {metric}"), *cells])
    print_table(rows, ["", *(SETTINGS[name][0] for name in settings)])
    print("\nin lm-eval's units (Table 5 prints percentages), ± one standard error")
