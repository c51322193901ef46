"""Table 5 without a network: questions about held-out text, in lm-eval's format."""
import random
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

from conftest import GEMMA, random_weights
from helpers import adapted, random_sae
from lorasae.errors import InputError
from lorasae.evals import benchmarks, local_tasks
from lorasae.evals.benchmarks import SETTINGS
from lorasae.evals.local_tasks import (CONTEXT, FOLLOWING, held_out_sources, passages, question,
                                       questions)
from lorasae.io.models import parse_config
from lorasae.io.presets import TINY
from lorasae.io.text import held_out, standard_library
from lorasae.model import Transformer

TASKS = ["local_mmlu", "local_hellaswag", "local_truthfulqa_mc1", "local_truthfulqa_gen"]
CHOOSING = TASKS[:3]


@pytest.fixture(scope="module")
def sources():
    """Their text; no file of the training side is opened."""
    def watched(file):
        return SimpleNamespace(name=file.name, open=lambda: held_out(file.name) and file.open())

    files = [watched(file) for file in standard_library()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_tasks, "standard_library", lambda: files)
        return held_out_sources()


@pytest.fixture(scope="module")
def asked(sources):
    return questions(sources)


# ---- The questions -------------------------------------------------------------------------------

def test_questions_are_reproducible(sources, asked):
    assert questions(sources) == asked
    assert list(asked) == TASKS
    assert [len(rows) for rows in asked.values()] == [400, 200, 200, 200]


def test_they_come_from_held_out_files_alone(sources, asked):
    held = {file.name for file in standard_library() if held_out(file.name)}
    assert len(sources) == len(held) and 0 < len(held) < len(standard_library()) / 8
    text = "\0".join(sources)
    for rows in asked.values():
        for row in rows:
            assert row["query"] + row["choices"][row["label"]] in text
            assert all(choice in text for choice in row["choices"])


@pytest.mark.parametrize("task", CHOOSING)
def test_the_right_answer_is_anywhere_among_four_different_ones(asked, task):
    places = Counter(row["label"] for row in asked[task])
    assert set(places) == {0, 1, 2, 3}
    assert all(0.15 < count / len(asked[task]) < 0.35 for count in places.values())
    assert all(len(set(row["choices"])) == 4 for row in asked[task])


@pytest.mark.parametrize("task", CHOOSING)
def test_neither_length_nor_frequency_gives_the_answer_away(asked, task):
    rows = asked[task]
    frequency = Counter(choice for row in rows for choice in row["choices"])
    for guess in (len, lambda choice: -len(choice), frequency.get):
        right = sum(max(row["choices"], key=guess) == row["choices"][row["label"]] for row in rows)
        assert 0.12 < right / len(rows) < 0.4


def test_passages_are_whole_lines_and_a_question_needs_three_different_wrong_answers():
    rng = random.Random(0)
    assert question(rng, "q", "a", ["a", "b", "b", "c"]) is None
    assert sorted(question(rng, "q", "a", [*"abbcd"])["choices"]) == [*"abcd"]
    source = "".join(f"line {i}: {'x' * (i % 50)}\n" for i in range(200)) + "\n\nend"
    found = passages([source, source])
    one, other = ([passage for passage in found if passage.file == file] for file in (0, 1))
    assert source.startswith("".join(context + following for _, context, following in one))
    assert [passage[1:] for passage in other] == [passage[1:] for passage in one]
    for _, context, following in found:
        assert len(context) >= CONTEXT and len(following) >= FOLLOWING
        assert context.endswith("\n") and following.endswith("\n")
    assert not passages(["short\n" * 10, "y" * 10_000 + "\n" + "x" * 90])


def test_an_embedded_model_gets_them_by_default_and_others_the_papers(capsys):
    for model in ("tiny-gemma-2", str(TINY / "llama-3")):
        assert benchmarks.default_tasks(model) == "local"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "tiny-gemma-2 is an embedded model: --tasks local" in said[0]
    for model in ("gemma-2-2b", "google/gemma-2-2b", "models/my-own"):
        assert benchmarks.default_tasks(model) == "mmlu,hellaswag,truthfulqa_mc1,truthfulqa_gen"
    assert capsys.readouterr().err == ""


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r'need the lm-eval package: pip install "lm-eval'):
        benchmarks.evaluate(None, SimpleNamespace(tasks="local", limit=3))


def test_table_5_shows_the_papers_metrics_by_the_names_of_its_benchmarks(capsys):
    accuracies = {"acc": [0.5, 0.01], "acc_norm": [0.7, 0.02]}
    bleu = {"bleu_max": [20.0, 1.0], "bleu_acc": [0.25, 0.03]}
    found = {"mmlu": accuracies, "mmlu_anatomy": accuracies, "hellaswag": accuracies,
             "truthfulqa_gen": bleu, "local_mmlu": accuracies, "local_truthfulqa_gen": bleu,
             "own": {"acc": [0.1, None]}}
    tasks = [task for task in found if task != "mmlu_anatomy"]          # of mmlu, a group
    benchmarks.show({"tasks": tasks, "sae": found, "lora": found})
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["SAE", "LoRA"] and lines[6] == ""
    for line, label, value in zip(
            lines, ["MMLU", "HellaSwag", "BLEU", "MMLU (local)", "BLEU (local)", "own acc"],
            ["0.5000 ± 0.0100", "0.5000", "0.2500 ± 0.0300", "0.5000", "0.2500", "0.1000"]):
        assert line.split("  ")[0] == label and value in line and "0.7" not in line


# ---- As lm-eval's tasks --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tasks():
    pytest.importorskip("lm_eval", reason="the tasks are in lm-eval's format")
    return benchmarks.load_tasks(["local"])


def results(lm, tasks, limit=None):
    from lm_eval import evaluator
    found = evaluator.evaluate(lm, tasks, limit=limit, bootstrap_iters=0, log_samples=False)
    return {task: benchmarks.measured(metrics) for task, metrics in found["results"].items()}


def stub(likelihood, end):
    """An lm-eval model of two functions: of a request's row and its choice; and of a row."""
    from lm_eval.api.model import LM

    class Stub(LM):
        def loglikelihood(self, requests):
            return [(likelihood(request.doc, request.args[1]), False) for request in requests]

        def generate_until(self, requests):
            return [end(request.doc) for request in requests]

        def loglikelihood_rolling(self, requests):
            raise AssertionError("no task asks this")

    return Stub()


def right(row):
    return row["choices"][row["label"]]


def test_who_knows_every_answer_scores_1(tasks):
    found = results(stub(lambda row, choice: float(choice == right(row)), right), tasks)
    assert list(found) == TASKS
    assert all(found[task][metric][0] == 1 for task in CHOOSING for metric in ("acc", "acc_norm"))
    ends = found["local_truthfulqa_gen"]
    assert ends["rouge1_acc"][0] > 0.95 and ends["bleu_acc"][0] > 0.9
    assert ends["bleu_max"][0] > 80                     # not 100: BLEU needs four words


@pytest.mark.parametrize("answer", ["", " self.name, value in the file):", " by older versions"])
def test_ends_are_compared_as_truthfulqa_compares_answers(asked, answer):
    pytest.importorskip("lm_eval", reason="TruthfulQA's scores are lm-eval's")
    from lm_eval.tasks.truthfulqa.utils import process_results_gen
    row = asked["local_truthfulqa_gen"][1]
    wrong = [choice for choice in row["choices"] if choice != right(row)]
    answers = {"correct_answers": [right(row)], "incorrect_answers": wrong}
    theirs = process_results_gen(answers, [answer])
    ours = local_tasks.compare(row, [answer])
    assert ours == pytest.approx({metric: theirs[metric] for metric in ours})
    assert set(ours) == {"bleu_acc", "bleu_max", "rouge1_acc", "rouge1_max", "rouge2_acc",
                         "rouge2_max"}


def test_the_four_settings_run_end_to_end_and_differ(tasks):
    """On a random model of 256 positions with the embedded one's tokenizer."""
    raw = {**GEMMA, "vocab_size": 4096, "max_position_embeddings": 256}
    model = Transformer(parse_config(raw, "the test"))
    model.load_state_dict(random_weights(raw, scale=0.15))
    model = adapted(model.requires_grad_(False), range(4), rank=2)
    tokenizer = Tokenizer.from_file(str(TINY / "gemma-2" / "tokenizer.json"))
    numbers = benchmarks.measure(model, {1: random_sae("topk", model)}, tokenizer, tasks, limit=5)
    assert numbers["tasks"] == TASKS and numbers["samples"] == dict.fromkeys(TASKS, 5)
    for setting in SETTINGS:
        assert set(numbers[setting]["local_mmlu"]) == {"acc", "acc_norm"}
        for task in CHOOSING:
            assert all(0 <= value <= 1 for value, _ in numbers[setting][task].values())
    assert len({str(numbers[setting]) for setting in SETTINGS}) == 4


def test_too_little_text_is_one_line(tasks):
    with pytest.raises(InputError, match="too little text for local_mmlu"):
        local_tasks.local_tasks(["x = 1\n"])
