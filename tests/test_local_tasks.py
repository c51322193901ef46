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
from lorasae.evals.local_tasks import CONTEXT, FOLLOWING, held_out_sources, passages, question, questions
from lorasae.io.models import parse_config
from lorasae.io.presets import TINY
from lorasae.io.streams import held_out, standard_library
from lorasae.model import Transformer

TASKS = ["local_mmlu", "local_hellaswag", "local_truthfulqa_mc1", "local_truthfulqa_gen"]
CHOOSING = TASKS[:3]


@pytest.fixture(scope="module")
def sources():
    return held_out_sources()


@pytest.fixture(scope="module")
def asked(sources):
    return questions(sources)


# ---- The questions ---------------------------------------------------------------------------------------------------

def test_questions_are_reproducible(sources, asked):
    assert questions(sources) == asked
    assert {task: len(rows) for task, rows in asked.items()} == dict(zip(TASKS, (400, 200, 200, 200)))


def test_they_come_from_held_out_files_alone(sources, asked):
    held = {file.name for file in standard_library() if held_out(file.name)}
    assert len(sources) == len(held) and 0 < len(held) < len(standard_library()) / 8
    text = "\0".join(sources)
    for rows in asked.values():
        for row in rows:
            assert row["query"] + row["choices"][row["label"]] in text
            assert all(choice in text for choice in row["choices"])


def test_a_file_of_the_training_side_is_never_opened(monkeypatch):
    def opened(name):
        assert held_out(name)
        return next(file for file in real if file.name == name).open()

    real = standard_library()
    watched = [SimpleNamespace(name=file.name, open=lambda name=file.name: opened(name)) for file in real]
    monkeypatch.setattr(local_tasks, "standard_library", lambda: watched)
    assert held_out_sources()


@pytest.mark.parametrize("task", CHOOSING)
def test_the_right_answer_is_anywhere_among_four_different_ones(asked, task):
    places = Counter(row["label"] for row in asked[task])
    assert set(places) == {0, 1, 2, 3} and all(0.15 < count / len(asked[task]) < 0.35 for count in places.values())
    assert all(len(set(row["choices"])) == 4 for row in asked[task])


@pytest.mark.parametrize("task", CHOOSING)
def test_neither_length_nor_frequency_gives_the_answer_away(asked, task):
    rows = asked[task]
    frequency = Counter(choice for row in rows for choice in row["choices"])
    for guess in (len, lambda choice: -len(choice), frequency.get):
        right = sum(max(row["choices"], key=guess) == row["choices"][row["label"]] for row in rows)
        assert 0.12 < right / len(rows) < 0.4


def test_passages_are_whole_lines_one_after_another():
    source = "".join(f"line {i}: {'x' * (i % 50)}\n" for i in range(200)) + "\n\nend"
    found = passages([source, source])
    one = [passage for passage in found if passage.file == 0]
    assert source.startswith("".join(context + following for _, context, following in one))
    assert [passage[1:] for passage in found if passage.file == 1] == [passage[1:] for passage in one]
    for _, context, following in found:
        assert len(context) >= CONTEXT and len(following) >= FOLLOWING
        assert context.endswith("\n") and following.endswith("\n")
    assert not passages(["short\n" * 10, "y" * 10_000 + "\n" + "x" * 90])


def test_a_question_needs_three_different_wrong_answers():
    rng = random.Random(0)
    assert question(rng, "q", "a", ["a", "b", "b", "c"]) is None
    assert sorted(question(rng, "q", "a", ["a", "b", "b", "c", "d"])["choices"]) == ["a", "b", "c", "d"]


def test_an_embedded_model_gets_them_by_default_and_others_the_papers(capsys):
    assert benchmarks.default_tasks("tiny-gemma-2") == benchmarks.default_tasks(str(TINY / "llama-3")) == "local"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "tiny-gemma-2 is an embedded model: --tasks local" in said[0]
    for model in ("gemma-2-2b", "google/gemma-2-2b", "models/my-own"):
        assert benchmarks.default_tasks(model) == "mmlu,hellaswag,truthfulqa_mc1,truthfulqa_gen"
    assert capsys.readouterr().err == ""


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r'need the lm-eval package: pip install "lm-eval'):
        benchmarks.evaluate(None, SimpleNamespace(tasks="local", limit=3))


def test_table_5_names_the_benchmark_whose_form_a_local_task_has(capsys):
    found = {"local_mmlu": {"acc": [0.5, 0.01], "acc_norm": [0.7, 0.02]},
             "local_truthfulqa_gen": {"bleu_max": [20.0, 1.0], "bleu_acc": [0.25, 0.03]}, "own": {"acc": [0.1, None]}}
    benchmarks.show({"tasks": list(found), "sae": found, "lora": found})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["SAE", "LoRA"] and lines[4] == ""
    labels = [" ".join(line.split()[:2]) for line in lines[1:4]]
    assert labels == ["MMLU (local)", "BLEU (local)", "own acc"]
    assert "0.5000 ± 0.0100" in lines[1] and "0.2500 ± 0.0300" in lines[2]


# ---- As lm-eval's tasks ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tasks():
    pytest.importorskip("lm_eval", reason="the tasks are in lm-eval's format")
    return benchmarks.load_tasks(["local"])


def results(lm, tasks, limit=None):
    from lm_eval import evaluator
    found = evaluator.evaluate(lm, tasks, limit=limit, bootstrap_iters=0, log_samples=False)["results"]
    return {task: benchmarks.measured(metrics) for task, metrics in found.items()}


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


def test_who_always_says_the_same_is_at_chance(tasks, asked):
    found = results(stub(lambda row, choice: 0.0, lambda row: ""), tasks)
    for task in CHOOSING:
        first = sum(row["label"] == 0 for row in asked[task]) / len(asked[task])
        assert found[task]["acc"][0] == pytest.approx(first) and abs(first - 0.25) < 0.1
    assert all(value == 0 for value, _ in found["local_truthfulqa_gen"].values())


@pytest.mark.parametrize("answer", ["", "x", " self.name, value in the file):", " by older implementations"])
def test_ends_are_compared_as_truthfulqa_compares_answers(asked, answer):
    pytest.importorskip("lm_eval", reason="TruthfulQA's scores are lm-eval's")
    from lm_eval.tasks.truthfulqa.utils import process_results_gen
    row = asked["local_truthfulqa_gen"][1]
    wrong = [choice for choice in row["choices"] if choice != right(row)]
    theirs = process_results_gen({"correct_answers": [right(row)], "incorrect_answers": wrong}, [answer])
    ours = local_tasks.compare(row, [answer])
    assert ours == pytest.approx({metric: theirs[metric] for metric in ours})
    assert set(ours) == {f"{score}_{kind}" for score in ("bleu", "rouge1", "rouge2") for kind in ("acc", "max")}


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
        assert all(0 <= value <= 1 for task in CHOOSING for value, _ in numbers[setting][task].values())
    assert len({str(numbers[setting]) for setting in SETTINGS}) == 4


def test_too_little_text_is_one_line(tasks):
    with pytest.raises(InputError, match="too little text for local_mmlu"):
        local_tasks.local_tasks(["x = 1\n"])
