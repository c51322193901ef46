"""Table 5 without a network: four tasks for lm-eval, about text that no included model trained on.

    python eval.py RUN_DIR --suite lm --tasks local         the default for an included model

Each is named after the benchmark whose form and metrics it has. The included models (2.5M
parameters) were trained on the standard library, so the tasks ask how other files of it continue.

    local_mmlu              which of four names follows a dot? (MMLU's letters mean nothing to them)
    local_hellaswag         which of four passages comes next?
    local_truthfulqa_gen    how does this line end? The model's greedy completion is compared with
                            the true end and three wrong but plausible ones, from the same file
    local_truthfulqa_mc1    the same lines: which of four ends is the true one?

Every model and run gets the same questions (the library of another Python version may differ a
little). Their lengths, and so their difficulty, were chosen on training files.
"""
import random
import re
from collections import defaultdict
from itertools import islice
from typing import NamedTuple

from lorasae.io.text import held_out, standard_library, text_of

SEED = 42
# Whole lines: 120 characters or more and any blank ones, then 80 or more (about 40 and 30 tokens).
PASSAGE = re.compile(r"([\s\S]{119,}?\n(?:[^\S\n]*\n)*)([\s\S]{79,}?\n)")
LONGEST = 400                           # characters; a longer match is a table on one long line
LINE, BEGUN = 40, 12                    # characters: the shortest line; the least that is shown
NAME = re.compile(r"(?<=\w\.)[a-z][a-z_]{2,7}\b")       # most are a single token


class Passage(NamedTuple):
    """Consecutive whole lines of a file."""
    file: int
    context: str
    following: str                      # begins with a line that is not blank


def held_out_sources():
    """The held-out files of the standard library, as text."""
    return [text_of(file) for file in standard_library() if held_out(file.name)]


def passages(sources):
    """Texts -> [Passage], without overlaps."""
    return [Passage(number, *match.groups()) for number, source in enumerate(sources)
            for match in PASSAGE.finditer(source) if len(match[0]) <= LONGEST]


# ---- Questions ---------------------------------------------------------------------------------

def question(rng, query, right, others):
    """One row of a task: the right answer among three wrong ones. None if there are too few.

    Wrong answers are drawn as often as they occur, so frequent answers are not right more often.
    """
    drawn = rng.sample(others, len(others))
    wrong = [other for other in dict.fromkeys(drawn) if other != right][:3]
    if len(wrong) < 3:
        return None
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"query": query, "choices": choices, "label": choices.index(right)}


# Each turns a passage into (its kind, the query, the right answer), or None. The wrong answers are
# the right answers for other passages of the same kind.

def name(passage):
    """The first name after a dot."""
    if match := NAME.search(passage.following):
        return None, passage.context + passage.following[:match.start()], match[0]


def next_passage(passage):
    """The next passage; wrong ones have the same indent and about the same length."""
    right = passage.following
    return (indent(right), len(right) // 25), passage.context, right


def line_end(passage):
    """The end of the next line; wrong ones are from the same file."""
    line = passage.following.partition("\n")[0].rstrip()
    start = line.find(" ", indent(line) + BEGUN)
    if start > 0 and len(line) - indent(line) >= LINE:
        return passage.file, passage.context + line[:start], line[start:]


def indent(text):
    return len(text) - len(text.lstrip())


# ---- lm-eval's tasks ---------------------------------------------------------------------------

METRICS = ("bleu_acc", "rouge1_acc", "rouge2_acc")      # of the completed lines


def compare(row, results):
    """Whether a completion is more like the true end than like any wrong one, by each metric.

    As in truthfulqa_gen, whose own function resamples each ROUGE a thousand times (0.1 s).
    """
    from lm_eval.tasks.truthfulqa.utils import bleu
    from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(["rouge1", "rouge2"])
    scores = []                         # [choices, METRICS]
    for end in row["choices"]:
        rouge = scorer.score(end, results[0])
        scores.append((bleu([[end]], results), rouge["rouge1"].fmeasure, rouge["rouge2"].fmeasure))

    right = scores.pop(row["label"])
    best_wrong = map(max, zip(*scores))
    return {metric: int(ours > other) for metric, ours, other in zip(METRICS, right, best_wrong)}


COMMON = {"test_split": "test", "num_fewshot": 0, "doc_to_text": "query", "target_delimiter": ""}
# lm-eval scores multiple choice by acc and acc_norm.
CHOOSE = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
COMPLETE = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[label]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
    "process_results": compare,
    "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}
                    for metric in METRICS],
}
TASKS = {                               # {task: (question maker, number of rows, lm-eval's config)}
    "local_mmlu": (name, 400, CHOOSE),
    "local_hellaswag": (next_passage, 200, CHOOSE),
    "local_truthfulqa_gen": (line_end, 200, COMPLETE),
    "local_truthfulqa_mc1": (line_end, 200, CHOOSE),
}


def questions(sources):
    """Texts -> {task: [row]}."""
    asked = {}
    for task, (split, count, _) in TASKS.items():
        rng = random.Random(SEED)
        found = passages(sources)
        rng.shuffle(found)
        made, answers = list(filter(None, map(split, found))), defaultdict(list)
        for kind, _, right in made:
            answers[kind].append(right)
        rows = (question(rng, query, right, answers[kind]) for kind, query, right in made)
        asked[task] = list(islice(filter(None, rows), count))
    return asked


def local_tasks():
    """The local tasks, as lm-eval's Task objects."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    class LocalTask(ConfigurableTask):
        def download(self, *_, **__):
            self.dataset = {"test": Dataset.from_list(self.config.metadata["rows"])}

    return [LocalTask(config={"task": task, "metadata": {"rows": rows},
                              **COMMON, **TASKS[task][-1]})
            for task, rows in questions(held_out_sources()).items()]
