"""Table 5 without a network: questions about held-out text, in lm-eval's format; its table."""
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
from lorasae.evals.benchmarks import SETTINGS, TABLE_5
from lorasae.evals.local_tasks import CONTEXT, FOLLOWING, passages, question, questions
from lorasae.evals.report import save_figure
from lorasae.io.models import parse_config
from lorasae.io.presets import TINY
from lorasae.io.text import held_out, standard_library
from lorasae.model import Transformer

CHOOSING = ["local_mmlu", "local_hellaswag", "local_truthfulqa_mc1"]
GENERATING = "local_truthfulqa_gen"


# ---- The questions -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def sources():
    """Their text; no file of the training side is opened."""
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
def test_neither_place_nor_length_nor_frequency_gives_the_answer_away(asked, task):
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
        assert len(context) >= CONTEXT and len(following) >= FOLLOWING
        assert context.endswith("\n") and following.endswith("\n")
    assert not passages(["short\n" * 10, "y" * 10_000 + "\n" + "x" * 90])


# ---- Table 5 -----------------------------------------------------------------------------------

def test_an_embedded_model_gets_them_by_default_and_others_the_papers(capsys):
    for model in ("tiny-gemma-2", str(TINY / "llama-3")):
        assert benchmarks.default_tasks(model) == "local"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "tiny-gemma-2 is an embedded model: --tasks local" in said[0]
    for model in ("gemma-2-2b", "google/gemma-2-2b", "models/my-own"):
        assert benchmarks.default_tasks(model) == "mmlu,hellaswag,truthfulqa_gen,truthfulqa_mc1"
    assert capsys.readouterr().err == ""


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r'need the lm-eval package: pip install "lm-eval'):
        benchmarks.evaluate(None, tasks="local", limit=3)


def test_table_5_has_the_papers_rows_and_other_tasks_all_their_metrics():
    accuracy = {"acc": [0.5, 0.01], "acc_norm": [0.7, 0.02]}
    bleu = {"bleu_max": [20.0, 1.0], "bleu_acc": [0.25, None]}
    found = {"mmlu": accuracy, "mmlu_stem": accuracy, "mmlu_anatomy": accuracy,
             "local_hellaswag": accuracy, "truthfulqa_gen": bleu, "own": {"f1": [0.1, None]},
             "group": {}, "part": {"acc": [0.2, None]}}
    groups = {"mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu_anatomy"], "group": ["part"]}
    rows = benchmarks.rows_of(found, groups)
    assert rows == {"MMLU": ["mmlu", "acc"], "HellaSwag": ["local_hellaswag", "acc"],
                    "BLEU": ["truthfulqa_gen", "bleu_acc"], "own f1": ["own", "f1"],
                    "part acc": ["part", "acc"]}

    pairs = {"with_sae": [0.02, 0.01, 400], "without_sae": [-0.03, None, 1]}
    numbers = {**dict.fromkeys(SETTINGS, found), "rows": rows, "paired": {"MMLU": pairs}}
    table, = benchmarks.tables(numbers)
    assert table.headings[1:4] == ["SAE", "SAE + LoRA", "difference"]
    level = "0.500 ± 0.016"
    assert table.rows[0] == ["MMLU", level, level, "+0.020 ± 0.010", level, level, "-0.030"]
    assert [row[0] for row in table.rows[1:3]] == ["HellaSwag (local)", "BLEU"]
    assert table.rows[2][1:4] == ["0.250", "0.250", ""]
    assert "same answers" in str(table.notes) and "over questions" in str(table.notes)


# ---- As lm-eval's tasks ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tasks():
    pytest.importorskip("lm_eval", reason="the tasks are in lm-eval's format")
    return benchmarks.load_tasks("local")


def test_who_knows_every_answer_scores_1(tasks):
    from lm_eval import evaluator
    from lm_eval.api.model import LM

    class Oracle(LM):
        def loglikelihood(self, requests):
            return [(float(each.args[1] == right(each.doc)), False) for each in requests]

        def generate_until(self, requests):
            return [right(each.doc) for each in requests]

        def loglikelihood_rolling(self, requests):
            raise AssertionError("no task asks this")

    results = evaluator.evaluate(Oracle(), tasks, bootstrap_iters=0, log_samples=False)["results"]
    found = {task: benchmarks.values_of(metrics) for task, metrics in results.items()}
    assert all(found[task][metric][0] == 1 for task in CHOOSING for metric in ("acc", "acc_norm"))
    ends = found.pop(GENERATING)
    assert ends["rouge1_acc"][0] > 0.95 and ends["bleu_acc"][0] > 0.9   # BLEU needs four words
    assert [*found] == CHOOSING


@pytest.mark.parametrize("answer", ["", " self.name, value in the file):", " by older versions"])
def test_ends_are_compared_as_truthfulqa_compares_answers(asked, answer):
    pytest.importorskip("lm_eval", reason="TruthfulQA's scores are lm-eval's")
    from lm_eval.tasks.truthfulqa.utils import process_results_gen
    row = asked[GENERATING][1]
    wrong = [choice for choice in row["choices"] if choice != right(row)]
    answers = {"correct_answers": [right(row)], "incorrect_answers": wrong}
    theirs = process_results_gen(answers, [answer])
    ours = local_tasks.compare(row, [answer])
    assert ours == {metric: theirs[metric] for metric in ("bleu_acc", "rouge1_acc", "rouge2_acc")}


def test_the_four_settings_run_end_to_end_and_differ(tasks, tmp_path):
    """On a random model of 256 positions with the embedded one's tokenizer."""
    raw = {**GEMMA, "vocab_size": 4096, "max_position_embeddings": 256}
    model = Transformer(parse_config(raw, "the test"))
    model.load_state_dict(random_weights(raw, scale=0.15))
    model = adapted(model.requires_grad_(False), range(4), rank=2)
    tokenizer = Tokenizer.from_file(str(TINY / "gemma-2" / "tokenizer.json"))
    numbers = benchmarks.measure(model, {1: random_sae("topk", model)}, tokenizer, tasks, limit=5)
    assert numbers["samples"] == dict.fromkeys(tasks["tasks"], 5)
    assert [*numbers["paired"]] == [*numbers["rows"]] == [*TABLE_5.values()]
    assert len({str(numbers[setting]) for setting in SETTINGS}) == 4
    save_figure(benchmarks.draw, numbers, tmp_path / "lm.png", "")


def test_too_little_text_is_one_line(tasks, monkeypatch):
    monkeypatch.setattr(local_tasks, "held_out_sources", lambda: ["x = 1\n"])
    with pytest.raises(InputError, match="too little text for local_mmlu"):
        benchmarks.load_tasks("local")
