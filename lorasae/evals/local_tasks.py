"""Table 5 without a network: four tasks in lm-eval's format, about text that no embedded model was trained on.

    python eval.py RUN_DIR --suite lm --tasks local         the default for an embedded model

Each is named after the benchmark whose form and metrics it has. It asks what a model of 2.5M parameters, trained on
files of the Python standard library, may know: how other files of the library go on.

    local_mmlu              which of four names follows this dot? (MMLU's letters mean nothing to so small a model)
    local_hellaswag         which of four passages comes next?
    local_truthfulqa_mc1    which of four ends does this line have? The wrong ones are from the same file: plausible.
    local_truthfulqa_gen    the same lines, ended by greedy generation, against the true end and the wrong ones

The questions are the same for every model and run (on another Python the library may differ a little). Their lengths,
and so how hard they are, were chosen on files of the training side.
"""
import random
import re
from itertools import islice
from typing import NamedTuple

from lorasae.errors import InputError
from lorasae.io.text import held_out, standard_library

SEED = 42
CONTEXT, FOLLOWING = 120, 80        # characters, or the few more that fill a line: 40 and 30 tokens
LONGEST = 400                                # both together: a table in one long line is no passage
LINE, BEGUN = 40, 12                     # characters: of a line to be ended; of what is given of it
NAME = re.compile(r"(?<=\w\.)[a-z][a-z_]{2,7}\b")       # most are a single token
NAMES, PASSAGES, LINES = 400, 200, 200                  # questions


class Passage(NamedTuple):
    """Consecutive whole lines of a file."""
    file: int
    context: str
    following: str                                      # begins with a line that is not blank


def held_out_sources():
    """The held-out files of the standard library, as text."""
    sources = []
    for file in standard_library():
        if held_out(file.name):
            with file.open() as stream:
                sources.append(stream.read().decode())
    return sources


def passages(sources):
    """Texts -> [Passage]; none overlaps another."""
    found = []
    for number, source in enumerate(sources):
        context = following = ""
        for line in source.splitlines(keepends=True):
            blank = not line.strip()
            if len(context) < CONTEXT or (blank and not following):
                context += line
            else:
                following += line
            if len(following) < FOLLOWING:
                continue

            if len(context + following) <= LONGEST:
                found.append(Passage(number, context, following))
            context = following = ""
    return found


# ---- Questions -----------------------------------------------------------------------------------

def question(rng, query, right, others):
    """A row of a task: the right answer and three others, in any order. None where there are too few.

    The others are drawn as often as they occur, so that a frequent answer is not for that reason a right one.
    """
    drawn = rng.sample(others, len(others))
    wrong = [other for other in dict.fromkeys(drawn) if other != right][:3]
    if len(wrong) < 3:
        return None
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"query": query, "choices": choices, "label": choices.index(right)}


def names(found, rng):
    """The first name after a dot. Wrong: names after other dots."""
    matches = [(passage, NAME.search(passage.following)) for passage in found]
    matches = [(passage, match) for passage, match in matches if match]
    others = [match[0] for _, match in matches]
    for passage, match in matches:
        query = passage.context + passage.following[:match.start()]
        yield question(rng, query, match[0], others)


def next_passages(found, rng):
    """What follows. Wrong: what follows elsewhere, indented as deeply and about as long."""
    for passage in found:
        right = passage.following
        others = [other.following for other in found
                  if indent(other.following) == indent(right) and 0.8 < len(other.following) / len(right) < 1.25]
        yield question(rng, passage.context, right, others)


def line_ends(found, rng):
    """The end of the next line. Wrong: the ends of other lines of its file."""
    lines = []
    for passage in found:
        line = passage.following.splitlines()[0].rstrip()
        start = line.find(" ", indent(line) + BEGUN)
        if start > 0 and len(line) - indent(line) >= LINE:
            lines.append((passage, line[:start], line[start:]))

    for passage, begun, end in lines:
        others = [other_end for other, _, other_end in lines if other.file == passage.file]
        yield question(rng, passage.context + begun, end, others)


def indent(text):
    return len(text) - len(text.lstrip())


def questions(sources):
    """Texts -> {task: [row]}."""
    def rows(make, count):
        rng = random.Random(SEED)
        found = passages(sources)
        rng.shuffle(found)
        asked = (row for row in make(found, rng) if row is not None)
        return list(islice(asked, count))

    lines = rows(line_ends, LINES)
    return {"local_mmlu": rows(names, NAMES), "local_hellaswag": rows(next_passages, PASSAGES),
            "local_truthfulqa_mc1": lines, "local_truthfulqa_gen": lines}


# ---- lm-eval's tasks -----------------------------------------------------------------------------

CHOOSE = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label",
          "target_delimiter": ""}
COMPLETE = {"output_type": "generate_until", "doc_to_target": "{{choices[label]}}", "target_delimiter": "",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False}}
SCORES = ("bleu", "rouge1", "rouge2")


def local_tasks(sources=None):
    """[Task] of lm-eval, asking about texts: by default the held-out files. InputError where they are too short."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    class LocalTask(ConfigurableTask):
        """Its rows are in memory, where other tasks download theirs."""

        def __init__(self, rows, config):
            self.rows = rows
            super().__init__(config=config)

        def download(self, *_, **__):
            self.dataset = {"test": Dataset.from_list(self.rows)}

    tasks = []
    for name, rows in questions(held_out_sources() if sources is None else sources).items():
        if not rows:
            raise InputError(f"too little text for {name}: --tasks local asks about the standard library's own source "
                             "files, which this Python lacks")
        if name == "local_truthfulqa_gen":
            metrics = [f"{score}_{kind}" for score in SCORES for kind in ("acc", "max")]
            form = {**COMPLETE, "process_results": compare}
        else:
            metrics = ["acc", "acc_norm"]
            form = CHOOSE
        metric_list = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics]
        tasks.append(LocalTask(rows, {"task": name, "test_split": "test", "num_fewshot": 0, "doc_to_text": "query",
                                      "metric_list": metric_list, **form}))
    return tasks


def compare(row, results):
    """A generated end -> its BLEU and ROUGE (F1), of 100: "_max" with the true end; "_acc": is that more than
    with any wrong one?

    As truthfulqa_gen with one true answer; its own function resamples every pair's ROUGE a thousand times, for 0.1 s.
    """
    from lm_eval.tasks.truthfulqa.utils import bleu
    from rouge_score.rouge_scorer import RougeScorer
    answer, scorer = results[0], RougeScorer(["rouge1", "rouge2"])

    def scores(end):
        rouge = scorer.score(end, answer)
        return {"bleu": bleu([[end]], [answer]), **{name: 100 * rouge[name].fmeasure for name in ("rouge1", "rouge2")}}

    right = scores(row["choices"][row["label"]])
    wrong = [scores(end) for place, end in enumerate(row["choices"]) if place != row["label"]]

    out = {}
    for name in SCORES:
        out[f"{name}_max"] = right[name]
        out[f"{name}_acc"] = int(right[name] > max(other[name] for other in wrong))
    return out
