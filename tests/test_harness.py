"""The benchmarks against lm-eval's own Hugging Face model: same checkpoint, adapter, SAE, tasks."""
import json
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer

from conftest import GEMMA, LLAMA, TEXT, write_model, write_tokenizer
from helpers import adapted, command, random_sae, read, refusal, refuses, without_cache
from lorasae import load_adapter, load_model, save_adapter, save_sae
from lorasae.evals.common import interval
from lorasae.io.files import write_json

pytest.importorskip("lm_eval", reason="the benchmarks need lm-eval")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from lorasae.evals import benchmarks
from lorasae.evals.benchmarks import SETTINGS
from lorasae.evals.fidelity import ADAPTED, WITH_SAE
from lorasae.evals.spliced_lm import Prompt, SplicedLM

LAYER, LENGTH = 1, 96
CORPUS = "".join(f"x{i * 37} = {i}\n{TEXT}Q: What is {i}?\nA: It is blue, red or green.\n\n"
                 for i in range(20))


@pytest.fixture(scope="module", params=["gemma2", "llama"])
def bench(request, tmp_path_factory):
    """A random checkpoint with 96 positions, its tokenizer, adapters on all blocks, and an SAE."""
    folder = tmp_path_factory.mktemp(request.param)
    raw = {"gemma2": GEMMA, "llama": LLAMA}[request.param]
    raw = {**raw, "vocab_size": 150, "max_position_embeddings": LENGTH}
    write_model(folder / "model", raw, scale=0.15)
    # As many tokens as the model has, or lm-eval would cut the model's vocabulary to fit
    write_tokenizer(folder / "model", raw, CORPUS)
    write_json(folder / "model" / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>",
        "pad_token": "<pad>"})
    save_adapter(adapted(load_model(folder / "model"), range(4), rank=2), folder / "adapter")
    kind = "jumprelu" if request.param == "gemma2" else "topk"
    sae = random_sae(kind, raw["hidden_size"], 128, threshold=0, std=0.1, seed=3)
    return Bench(folder, {LAYER: sae})


class Bench:
    def __init__(self, folder, saes):
        self.folder, self.saes = folder, saes
        self.model = load_adapter(load_model(folder / "model"), folder / "adapter").eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
        self.config = self.model.config

    def ours(self, **how):
        return SplicedLM(self.model, self.tokenizer, self.saes, **how)

    @cache
    def theirs(self, setting="adapted"):
        """lm-eval's HFLM; PEFT loads the adapter, and a hook on the block splices the SAE in."""
        pytest.importorskip("peft", reason="the oracle needs peft")
        from lm_eval.models.huggingface import HFLM
        adapter = str(self.folder / "adapter") if setting in ADAPTED else None
        lm = HFLM(str(self.folder / "model"), peft=adapter, device="cpu", dtype="float32",
                  attn_implementation="eager", add_bos_token=True, batch_size=3)
        if setting not in WITH_SAE:
            return lm

        sae, seen = self.saes[LAYER], {}
        named = list(lm.model.named_modules())
        block, = (module for name, module in named if name.endswith(f"layers.{LAYER}"))
        embedding, = (module for name, module in named if name.endswith("embed_tokens"))

        def splice(block, inputs, x):
            keep = self.special(seen["tokens"])[..., None] & (not sae.on_special)
            return torch.where(keep, x, sae(x))

        embedding.register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0]))
        block.register_forward_hook(splice)
        return lm

    def special(self, tokens):
        return (tokens == self.config.bos_token_id) | (tokens == self.config.eos_token_id)


def requests(kind, *arguments):
    return [Instance(kind, {}, pair, i, ("test", i, 1)) for i, pair in enumerate(arguments)]


ENDS = ("blue", "red", "1", "2", "It is green, red or blue.")
PAIRS = requests(
    "loglikelihood",
    *((f"Q: What is {i}?\nA:", f" {end}") for i in range(4) for end in ENDS),
    ("class Shape:  ", "name"),         # spaces at the end of a context belong to the continuation
    ("", "def area(width, height):"), ("<bos>x1 = 1\n", "class"),
    (CORPUS[:400], " red"), (CORPUS[:400], CORPUS[400:560]))            # longer than its context
PROMPTS = [CORPUS[:n] for n in (1, 5, 30, 31, 60, 140, 500)]


def generations(**how):
    return requests("generate_until", *((prompt, how) for prompt in PROMPTS))


def test_log_likelihoods_match_lm_evals_own_model(bench):
    expected, found = (lm.loglikelihood(PAIRS) for lm in (bench.theirs(), bench.ours()))
    assert [p for p, _ in found] == pytest.approx([p for p, _ in expected], abs=1e-4)
    assert [top for _, top in found] == [top for _, top in expected]
    assert len(bench.tokenizer.encode(CORPUS[:400]).ids) > LENGTH


def test_a_continuation_is_greedy_if_each_of_its_tokens_is_the_likeliest(bench):
    ours, theirs = bench.ours(), bench.theirs()
    context = ours.tok_encode("x1 = 2\n")
    best = naive_continuation(bench, context, 3)
    other = [*best[:2], (best[2] + 1) % 150]
    asked = [(("", ""), context, ids) for ids in (best, best[:1], other)]
    for lm in (ours, theirs):
        assert [top for _, top in lm._loglikelihood_tokens(asked)] == [True, True, False]


def watch(lm):
    """A list to which every run of the model adds the shape of its tokens."""
    plain, shapes = lm.run, []
    lm.run = lambda tokens, *rest: shapes.append(tuple(tokens.shape)) or plain(tokens, *rest)
    return shapes


def test_neither_batches_nor_padding_nor_shared_rows_change_a_log_likelihood(bench):
    found, batches = [], []
    for batch_tokens in (1, 300, 10**6):
        ours = bench.ours(batch_tokens=batch_tokens)
        shapes = watch(ours)
        found.append([p for p, _ in ours.loglikelihood(PAIRS)])
        assert all(rows == 1 or rows * length <= batch_tokens for rows, length in shapes)
        batches.append(len(shapes))
    assert batches[0] > batches[1] > batches[2] == 1
    assert found[0] == pytest.approx(found[2], abs=1e-4)
    assert found[1] == pytest.approx(found[2], abs=1e-4)

    ours = bench.ours()
    shapes = watch(ours)
    choices = [("Q: Which?\nA:", letter) for letter in "xQA1"]
    ours.loglikelihood(requests("loglikelihood", *choices))
    assert [rows for rows, _ in shapes] == [1]          # one-token choices share a row


def naive_continuation(bench, prompt, count):
    whole = without_cache(bench.model, torch.tensor([prompt]), count, bench.saes)
    return whole[0, len(prompt):].tolist()


def test_generated_text_matches_lm_evals_own_model(bench):
    """Prompts of seven lengths in one batch; generated tokens go through the SAE in both."""
    asked = generations(until=["\n\n"], max_gen_toks=12, do_sample=False)
    assert bench.ours().generate_until(asked) == bench.theirs().generate_until(asked)


def test_an_answer_ends_before_the_first_stop_string_of_its_request(bench):
    answers = bench.ours().generate_until(generations(max_gen_toks=24))
    whole, prompt = max(zip(answers, PROMPTS), key=lambda pair: len(pair[0]))
    stop, sooner = whole[7:10], whole[4]
    asked = requests("generate_until", *((prompt, {"max_gen_toks": 24, "until": until})
                                         for until in ([stop], [], [sooner, stop], stop)))
    first = whole.split(stop)[0]
    either = whole.split(sooner)[0].split(stop)[0]      # sooner may occur before stop, or in it
    for lm in (bench.ours(), bench.theirs()):
        assert lm.generate_until(asked) == [first, whole, either, first]


def test_eos_and_the_names_of_special_tokens_end_an_answer_too(bench, monkeypatch):
    ours = bench.ours()
    ids = naive_continuation(bench, ours.tok_encode(PROMPTS[2]), 24)
    end = next(i for i in range(2, 24) if ids[i] not in ids[:i])
    monkeypatch.setattr(SplicedLM, "eot_token_id", ids[end])
    texts = ours.generate_until(generations(max_gen_toks=24))
    assert texts[2] == bench.tokenizer.decode(ids[:end + 1])
    monkeypatch.undo()
    new = [*ours.tok_encode(" 12", False), ours.prefix_token_id]
    assert ours.finished(new, Prompt(0, [], ["<bos>"], 9)) == " 12"
    assert ours.finished(new, Prompt(0, [], ["never"], 9)) is None


COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
doc_to_text: "Q: {{question}}\\nA:"
"""
CHOICE = COMMON + """
task: tiny_choice
fewshot_split: test
num_fewshot: 1
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATE = COMMON + """
task: tiny_generate
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
doc_to_target: "{{choices[answer]}}"
metric_list: [{metric: exact_match}, {metric: bleu}]
"""
GROUP = """
group: mmlu
task: [tiny_choice, tiny_second]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two YAML tasks over twelve questions: (choice.yaml, generate.yaml, data.jsonl)"""
    folder = tmp_path_factory.mktemp("tasks")
    words = "blue red green name x1 width class".split()
    with (folder / "data.jsonl").open("w") as data:
        for i in range(12):
            choices = [words[i % 7], f"{words[i % 5]} or {words[i % 3]}", f"{i}"]
            row = {"question": f"What is {i}?", "choices": choices, "answer": i % 3}
            data.write(json.dumps(row) + "\n")
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        text = text.replace("DATA", str(folder / "data.jsonl"))
        (folder / f"{name}.yaml").write_text(text.replace("CACHE", str(folder / "cache")))
    return tuple(folder / name for name in ("choice.yaml", "generate.yaml", "data.jsonl"))


def load(*paths):
    return benchmarks.load_tasks(",".join(map(str, paths)))


def test_scores_of_all_four_settings_match_lm_evals_own(bench, tasks, monkeypatch):
    # lm-eval collects facts about the machine, which is slow
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    *paths, _ = map(str, tasks)
    numbers = benchmarks.measure(bench.model, bench.saes, bench.tokenizer, load(*paths), limit=10)
    answers, scores = set(), {}
    for setting in SETTINGS:
        expected = simple_evaluate(bench.theirs(setting), limit=10, bootstrap_iters=1000,
                                   task_manager=TaskManager(include_defaults=False), tasks=paths)
        for task, metric in (("tiny_choice", "acc"), ("tiny_choice", "acc_norm"),
                             ("tiny_generate", "exact_match"), ("tiny_generate", "bleu")):
            results = expected["results"][task]
            row = numbers["rows"][f"{task} {metric}"]
            assert row[setting] == results[f"{metric},none"], (setting, task, metric)
        scores[setting] = [sample["acc_norm"] for sample in expected["samples"]["tiny_choice"]]
        samples = expected["samples"]["tiny_generate"]
        answers.add(tuple(sample["resps"][0][0] for sample in samples))
    assert len(answers) == 4

    # The effect of adapting, paired by question; BLEU is of a corpus, not of questions
    paired = numbers["paired"]
    assert list(paired) == ["tiny_choice acc", "tiny_choice acc_norm", "tiny_generate exact_match"]
    for pair, after, before in (("with_sae", "adapted", "sae"), ("without_sae", "lora", "base")):
        difference = torch.tensor(scores[after]) - torch.tensor(scores[before])
        wanted = [*interval(difference.double()), 10]
        assert paired["tiny_choice acc_norm"][pair] == pytest.approx(wanted)

    table, = benchmarks.tables(numbers)
    assert [row[0] for row in table.rows] == [*paired, "tiny_generate bleu"]
    varies = paired["tiny_choice acc_norm"]["with_sae"][1] is not None  # ten may all agree
    assert ("±" in table.rows[1][3]) == varies and table.rows[-1][3] == ""


def test_a_groups_score_is_a_mean_over_all_its_questions(bench, tasks, tmp_path):
    choice, _, data = tasks
    (tmp_path / "choice.yaml").write_text(choice.read_text())
    (tmp_path / "five.jsonl").write_text("".join(data.read_text().splitlines(True)[:5]))
    second = choice.read_text().replace(str(data), str(tmp_path / "five.jsonl"))
    second = second.replace("tiny_choice", "tiny_second")
    (tmp_path / "second.yaml").write_text(second)
    (tmp_path / "group.yaml").write_text(GROUP)
    loaded = TaskManager(include_path=tmp_path, include_defaults=False).load(["mmlu"])
    numbers = benchmarks.measure(bench.model, bench.saes, bench.tokenizer, loaded)

    row, = numbers["rows"].values()
    parts = [benchmarks.measure(bench.model, bench.saes, bench.tokenizer, load(tmp_path / name))
             for name in ("choice.yaml", "second.yaml")]
    first, second = (next(iter(part["rows"].values()))["adapted"] for part in parts)
    assert row["adapted"] == pytest.approx((12 * first + 5 * second) / 17) and first != second
    assert numbers["rows"].keys() == {"MMLU"} and row["task"] == "mmlu"
    mean, _, questions = numbers["paired"]["MMLU"]["with_sae"]
    assert questions == 17 and mean == pytest.approx(row["adapted"] - row["sae"])


def test_the_command_writes_table_5(bench, tasks, text_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_sae(bench.saes[LAYER], tmp_path / "sae", model_name="test", layer=LAYER, context=32)
    command("train", "--model", bench.folder / "model", "--sae", "sae", "--layer", LAYER,
            "--data", text_folder, "--context", 32, "--tokens", 64, "--eval-tokens", 64,
            "--rank", 2, "--dtype", "float32", "--device", "cpu", "--out", "run")
    choice, generate, _ = tasks
    lm = ("eval", "run", "--suite", "lm", "--tasks")
    command(*lm, f"{choice},{generate}", "--limit", 3)
    numbers = read(tmp_path / "run" / "eval-lm.json")
    assert set(SETTINGS) < set(numbers["rows"]["tiny_choice acc"]) and numbers["limit"] == 3
    assert numbers["paired"]["tiny_choice acc"]["with_sae"][2] == 3
    assert "lm-eval cannot load --tasks ./none.yaml" in refusal(*lm, "./none.yaml")


def test_mistakes_in_tasks_are_reported_in_one_line(tasks, tmp_path, monkeypatch):
    choice, *_ = tasks
    (tmp_path / "broken.yaml").write_text("task: [")
    lost = choice.read_text().replace("data.jsonl", "nowhere.jsonl")
    (tmp_path / "lost.yaml").write_text(lost)
    for name, reason in (("no.yaml", "no.yaml"), ("broken.yaml", "cannot load"),
                         ("lost.yaml", "nowhere.jsonl")):
        refuses(reason, load, tmp_path / name)

    def offline(*_):
        raise ConnectionError("Couldn't reach the Hub")
    monkeypatch.setattr(TaskManager, "load", offline)
    refuses("reach the Hub.*whose data come from the Hub", load, choice)


def test_requests_that_cannot_be_answered_are_refused(bench):
    ours = bench.ours()
    refuses("at least 1", benchmarks.measure, bench.model, {}, bench.tokenizer, {}, limit=0)
    for how, reason in (({"do_sample": True, "temperature": 0.7}, "greedy"),
                        ({}, "asks for 256 new tokens.*allows 96")):
        refuses(reason, ours.generate_until, generations(**how))
    refuses("cannot score", ours._loglikelihood_tokens, [(("a", "b"), [5], [5] * (LENGTH + 1))])
    refuses("not supported", ours.loglikelihood_rolling, [])
