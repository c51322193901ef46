"""Table 5 offline: questions about held-out text in lm-eval's format, and the table itself."""
import random
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from helpers import refuses
from lorasae.evals import benchmarks, local_tasks
from lorasae.evals.benchmarks import SETTINGS
from lorasae.evals.local_tasks import passages, question, questions
from lorasae.io.presets import TINY
from lorasae.io.text import held_out, standard_library

CHOOSING = ["local_mmlu", "local_hellaswag", "local_truthfulqa_mc1"]
GENERATING = "local_truthfulqa_gen"


@pytest.fixture(scope="module")
def sources():
    """The text of the held-out files. Opening a training file would fail."""
    def watched(file):
        return SimpleNamespace(name=file.name, open=lambda: held_out(file.name) and file.open())

    files = [watched(file) for file in standard_library()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_tasks, "standard_library", lambda: files)
        return local_tasks.held_out_sources()


@pytest.fixture(scope="module")
def asked(sources):
    return questions(sources)


def right(row):
    return row["choices"][row["label"]]


def test_questions_are_reproducible_and_come_only_from_held_out_files(sources, asked):
    assert questions(sources) == asked and asked[GENERATING] == asked["local_truthfulqa_mc1"]
    assert [len(asked[task]) for task in CHOOSING] == [400, 200, 200]
    held = [file for file in standard_library() if held_out(file.name)]
    assert len(sources) == len(held) and 0 < len(held) < len(standard_library()) / 8
    text = "\0".join(sources)
    for row in sum(asked.values(), []):
        assert row["query"] + right(row) in text
        assert all(choice in text for choice in row["choices"])


@pytest.mark.parametrize("task", CHOOSING)
def test_position_length_and_frequency_do_not_give_the_answer_away(asked, task):
    rows = asked[task]
    assert all(len(set(row["choices"])) == 4 for row in rows)
    places = Counter(row["label"] for row in rows)
    assert all(0.15 < places[place] / len(rows) < 0.35 for place in range(4))
    frequency = Counter(choice for row in rows for choice in row["choices"])
    for guess in (len, lambda choice: -len(choice), frequency.get):
        score = sum(max(row["choices"], key=guess) == right(row) for row in rows) / len(rows)
        assert 0.12 < score < 0.4


def test_passages_are_whole_lines_and_a_question_needs_three_different_wrong_answers():
    rng = random.Random(0)
    assert question(rng, "q", "a", ["a", "b", "b", "c"]) is None
    assert sorted(question(rng, "q", "a", [*"abbcd"])["choices"]) == [*"abcd"]
    source = "".join(f"line {i}: {'x' * (i % 50)}\n" for i in range(200)) + "\n\nend"
    found = passages([source, source])
    one, other = ([passage[1:] for passage in found if passage.file == file] for file in (0, 1))
    assert source.startswith("".join(map("".join, one))) and other == one
    for context, following in one:
        assert len(context) >= 120 and len(following) >= 80
        assert context.endswith("\n") and following.endswith("\n")
    assert not passages(["short\n" * 10, "y" * 10_000 + "\n" + "x" * 90])


def test_included_models_default_to_local_tasks_and_others_to_the_papers(capsys, monkeypatch):
    for model in ("tiny-gemma-2", str(TINY / "llama-3")):
        assert benchmarks.default_tasks(model) == "local"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "tiny-gemma-2 is an included model: --tasks local" in said[0]
    for model in ("gemma-2-2b", "google/gemma-2-2b", "models/my-own"):
        assert benchmarks.default_tasks(model) == "mmlu,hellaswag,truthfulqa_gen,truthfulqa_mc1"
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refuses(r'pip install "lm-eval', benchmarks.evaluate, None, "local", 3)


def test_table_5_has_the_papers_rows_and_every_metric_of_other_tasks():
    accuracy = {"acc,none": 0.5, "acc_stderr,none": 0.01, "acc_norm,none": 0.7, "alias": "x"}
    bleu = {"bleu_max,none": 20.0, "bleu_acc,none": 0.25}
    found = {"mmlu": accuracy, "mmlu_stem": accuracy, "mmlu_anatomy": accuracy,
             "local_hellaswag": accuracy, "truthfulqa_gen": bleu, "own": {"f1,strict": 0.1},
             "group": {"alias": "g"}, "part": {"acc,none": 0.2}}
    groups = {"mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu_anatomy"], "group": ["part"]}
    assert benchmarks.rows_of(found, groups) == {
        "MMLU": ("mmlu", "acc,none"), "HellaSwag": ("local_hellaswag", "acc,none"),
        "BLEU": ("truthfulqa_gen", "bleu_acc,none"), "own f1,strict": ("own", "f1,strict"),
        "part acc": ("part", "acc,none")}

    pairs = {"with_sae": [0.02, 0.01, 400], "without_sae": [-0.03, None, 1]}
    row = {"task": "local_mmlu", **dict.fromkeys(SETTINGS, 0.5)}
    table, = benchmarks.tables({"rows": {"MMLU": row}, "paired": {"MMLU": pairs}})
    assert table.rows[0][0] == "MMLU (local)"


@pytest.fixture(scope="module")
def tasks():
    pytest.importorskip("lm_eval", reason="the tasks are in lm-eval's format")
    return benchmarks.load_tasks("local")


def test_a_model_that_knows_every_answer_scores_1(tasks):
    from lm_eval import evaluator
    from lm_eval.api.model import LM

    class Oracle(LM):
        def loglikelihood(self, requests):
            return [(float(each.args[1] == right(each.doc)), False) for each in requests]

        def generate_until(self, requests):
            return [right(each.doc) for each in requests]

        def loglikelihood_rolling(self, requests):
            raise AssertionError("no task asks for this")

    found = evaluator.evaluate(Oracle(), tasks, bootstrap_iters=0, log_samples=False)["results"]
    assert all(found[task][f"{metric},none"] == 1 for task in CHOOSING
               for metric in ("acc", "acc_norm"))
    ends = found.pop(GENERATING)
    assert ends["rouge1_acc,none"] > 0.95 and ends["bleu_acc,none"] > 0.9   # BLEU needs four words
    assert [*found] == CHOOSING


@pytest.mark.parametrize("answer", ["", " self.name, value in the file):", " by older versions"])
def test_endings_are_scored_as_truthfulqa_scores_answers(asked, answer):
    pytest.importorskip("lm_eval", reason="lm-eval computes TruthfulQA's scores")
    from lm_eval.tasks.truthfulqa.utils import process_results_gen
    row = asked[GENERATING][1]
    wrong = [choice for choice in row["choices"] if choice != right(row)]
    answers = {"correct_answers": [right(row)], "incorrect_answers": wrong}
    theirs = process_results_gen(answers, [answer])
    ours = local_tasks.compare(row, [answer])
    assert ours == {metric: theirs[metric] for metric in ("bleu_acc", "rouge1_acc", "rouge2_acc")}
