"""The benchmarks' adapter against lm-eval's own Hugging Face model, on the same checkpoint, adapter, SAE and local tasks."""
import json

import pytest
import torch

from conftest import GEMMA, LLAMA, TEXT, write_model, write_tokenizer
from helpers import adapted, command, random_sae, read, refusal
from lorasae.errors import InputError
from lorasae.io.adapters import load_adapter, save_adapter
from lorasae.io.models import load_model
from lorasae.io.files import write_json
from lorasae.io.saes import save_sae

pytest.importorskip("lm_eval", reason="the benchmarks are lm-eval's")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from lorasae.evals import benchmarks
from lorasae.evals.benchmarks import SETTINGS
from lorasae.evals.spliced_lm import Job, SplicedLM

LAYER, LENGTH, CORPUS = 1, 96, "".join(f"x{i * 37} = {i}\n{TEXT}Q: What is {i}?\nA: It is blue, red or green.\n\n" for i in range(20))
SHORT = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}


@pytest.fixture(scope="module", params=["gemma2", "llama"])
def bench(request, tmp_path_factory):
    """A random checkpoint of 96 positions with its tokenizer, an adapter on every block that is not the identity, an SAE."""
    folder = tmp_path_factory.mktemp(request.param)
    raw = {**{"gemma2": GEMMA, "llama": LLAMA}[request.param], "vocab_size": 150, "max_position_embeddings": LENGTH}
    write_model(folder / "model", raw, scale=0.15)
    write_tokenizer(folder / "model", raw, CORPUS)              # 150 tokens too: lm-eval would cut the model's vocabulary to fit
    write_json(folder / "model" / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>",
                                                            "eos_token": "<eos>", "pad_token": "<pad>"})
    save_adapter(adapted(load_model(folder / "model"), range(4), rank=2), folder / "adapter")
    kind = "jumprelu" if request.param == "gemma2" else "topk"
    return Bench(folder, {LAYER: random_sae(kind, raw["hidden_size"], 128, threshold=0, std=0.1, seed=3)})


class Bench:
    def __init__(self, folder, saes):
        from tokenizers import Tokenizer
        self.folder, self.saes = folder, saes
        self.model = load_adapter(load_model(folder / "model"), folder / "adapter")
        self.tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
        self.config = self.model.config

    def ours(self, setting="adapted", **how):
        _, spliced, lora = SETTINGS[setting]
        return SplicedLM(self.model, self.tokenizer, self.saes if spliced else {}, lora=lora, **how)

    def theirs(self, setting="adapted", **how):
        """lm-eval's HFLM; PEFT loads the adapter, and a hook on the block splices the SAE in."""
        pytest.importorskip("peft", reason="the oracle needs peft")
        from lm_eval.models.huggingface import HFLM
        _, spliced, lora = SETTINGS[setting]
        how = {"add_bos_token": True, "batch_size": 3, **how}
        lm = HFLM(str(self.folder / "model"), peft=str(self.folder / "adapter") if lora else None, device="cpu",
                  dtype="float32", attn_implementation="eager", **how)
        if spliced:
            named, seen = dict(lm.model.named_modules()), {}
            block, = (module for name, module in named.items() if name.endswith(f"layers.{LAYER}"))
            embedding, = (module for name, module in named.items() if name.endswith("embed_tokens"))

            def splice(block, inputs, x):
                x_hat = self.saes[LAYER](x)
                return x_hat if self.saes[LAYER].on_special else torch.where(self.special(seen["tokens"])[..., None], x, x_hat)

            embedding.register_forward_pre_hook(lambda module, inputs: seen.update(tokens=inputs[0]))
            block.register_forward_hook(splice)
        return lm

    def special(self, tokens):
        return (tokens == self.config.bos_token_id) | (tokens == self.config.eos_token_id)


def requests(kind, *arguments):
    return [Instance(kind, {}, pair, i, ("test", i, 1)) for i, pair in enumerate(arguments)]


PAIRS = [(f"Q: What is {i}?\nA:", f" {word}") for i in range(4) for word in ("blue", "red", "1", "2", "It is green, red or blue.")] + [
    ("class Shape:  ", "name"),          # spaces at the end of a context belong to the continuation
    ("", "def area(width, height):"), ("<bos>x1 = 1\n", "class"),
    (CORPUS[:400], " red"), (CORPUS[:400], CORPUS[400:560]),            # longer than the model
]
PROMPTS = [CORPUS[:n] for n in (1, 5, 30, 31, 60, 140, 500)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_log_likelihoods_are_those_of_lm_evals_own_model(bench, setting):
    expected = bench.theirs(setting).loglikelihood(requests("loglikelihood", *PAIRS))
    found = bench.ours(setting).loglikelihood(requests("loglikelihood", *PAIRS))
    assert [p for p, _ in found] == pytest.approx([p for p, _ in expected], abs=1e-4)
    assert [top for _, top in found] == [top for _, top in expected]
    assert len(bench.tokenizer.encode(PAIRS[-1][0]).ids) > LENGTH


def test_a_continuation_is_greedy_when_every_token_of_it_is_the_likeliest(bench):
    ours, theirs = bench.ours(), bench.theirs()
    context = ours.tok_encode("x1 = 2\n")
    best = naive_continuation(bench, context, 3)
    other = [*best[:2], (best[2] + 1) % 150]
    asked = [(("", ""), context, best), (("", ""), context, best[:1]), (("", ""), context, other)]
    assert [top for _, top in ours._loglikelihood_tokens(asked)] == [True, True, False]
    assert [top for _, top in theirs._loglikelihood_tokens(asked)] == [True, True, False]


def test_rolling_log_likelihoods_count_each_token_of_a_text_once_after_one_bos(bench):
    """lm-eval's model must be told to add no BOS of its own, or the first window has two."""
    texts = [(CORPUS[:n],) for n in (1, 50, 200, 1000)]
    expected = bench.theirs(add_bos_token=False).loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    found = bench.ours().loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-4)
    assert len(bench.tokenizer.encode(texts[-1][0]).ids) > 2 * LENGTH


def watch(lm):
    """A list that gets the shape of whatever passes through the model."""
    plain, shapes = lm.run, []
    lm.run = lambda tokens, *rest: shapes.append(tuple(tokens.shape)) or plain(tokens, *rest)
    return shapes


def test_neither_batches_nor_padding_nor_shared_rows_move_a_log_likelihood(bench):
    found, batches = [], []
    for batch_tokens in (1, 300, 10**6):
        ours = bench.ours(batch_tokens=batch_tokens)
        shapes = watch(ours)
        found.append([p for p, _ in ours.loglikelihood(requests("loglikelihood", *PAIRS))])
        assert all(rows == 1 or rows * length <= batch_tokens for rows, length in shapes)
        batches.append(len(shapes))
    assert batches[0] > batches[1] > batches[2] == 1
    assert found[0] == pytest.approx(found[2], abs=1e-4) and found[1] == pytest.approx(found[2], abs=1e-4)

    # One-token choices of a question share a row
    ours = bench.ours()
    shapes = watch(ours)
    choices = [("Q: Which?\nA:", letter) for letter in "xQA1"]
    shared = ours.loglikelihood(requests("loglikelihood", *choices))
    assert [rows for rows, _ in shapes] == [1]
    alone = [ours.loglikelihood(requests("loglikelihood", choice))[0] for choice in choices]
    assert [p for p, _ in shared] == pytest.approx([p for p, _ in alone], abs=1e-5) and len(set(shared)) == 4


def naive_continuation(bench, prompt, count, saes=None):
    """Greedy decoding without a cache: the whole sequence anew for every token, SAE and adapters on."""
    tokens = torch.tensor([prompt])
    for _ in range(count):
        with torch.no_grad():
            tokens = torch.cat([tokens, bench.model(tokens, bench.saes if saes is None else saes)[:, -1:].argmax(-1)], dim=1)
    return tokens[0, len(prompt):].tolist()


def sparing(bench, prompt):
    """The SAE as the published code ran it, by accident: generated tokens never met it."""
    sae = bench.saes[LAYER]

    def spare(x):
        keeps = bench.special(torch.tensor([prompt + [0] * (x.shape[1] - len(prompt))])) & (not sae.on_special)
        keeps[:, len(prompt):] = True
        return torch.where(keeps[..., None], x, sae(x))
    return {LAYER: spare}


def test_generation_with_the_cache_is_generation_without_it_and_generated_tokens_meet_the_sae(bench):
    """Prompts of seven lengths in one batch."""
    ours, published = bench.ours(), []
    found = ours.generate_until(requests("generate_until", *((prompt, {"max_gen_toks": 14}) for prompt in PROMPTS)))
    for prompt, text in zip(PROMPTS, found):
        prompt = ours.tok_encode(prompt)[-(LENGTH - 14):]
        for saes in (None, sparing(bench, prompt)):
            ids = naive_continuation(bench, prompt, 14, saes)
            ids = ids[:ids.index(bench.config.eos_token_id)] if bench.config.eos_token_id in ids else ids
            if saes is None:
                assert text == bench.tokenizer.decode(ids)
            else:
                published.append(bench.tokenizer.decode(ids))
    assert found != published


@pytest.mark.parametrize("setting", SETTINGS)
def test_generated_text_is_that_of_lm_evals_own_model(bench, setting):
    asked = requests("generate_until", *((prompt, SHORT) for prompt in PROMPTS))
    assert bench.ours(setting).generate_until(asked) == bench.theirs(setting).generate_until(asked)


def test_an_answer_ends_before_the_first_stop_string_of_its_own_request(bench):
    prompts = [(prompt, {"max_gen_toks": 24}) for prompt in PROMPTS]
    answers = bench.ours().generate_until(requests("generate_until", *prompts))
    whole, (prompt, how) = max(zip(answers, prompts), key=lambda pair: len(pair[0]))
    stop, sooner = whole[7:10], whole[4:6]
    asked = [(prompt, {**how, "until": until}) for until in ([stop], [], [sooner, stop], stop)]
    first = whole.split(stop)[0]
    for lm in (bench.ours(), bench.theirs()):
        found = lm.generate_until(requests("generate_until", *asked))
        assert found == [first, whole, first.split(sooner)[0], first]


def test_eos_and_the_names_of_special_tokens_end_an_answer_too(bench, monkeypatch):
    ours = bench.ours()
    ids = naive_continuation(bench, ours.tok_encode(PROMPTS[2]), 24)
    end = next(i for i in range(2, 24) if ids[i] not in ids[:i])
    monkeypatch.setattr(SplicedLM, "eot_token_id", ids[end])
    text, = ours.generate_until(requests("generate_until", (PROMPTS[2], {"max_gen_toks": 24})))
    assert text == bench.tokenizer.decode(ids[:end + 1])
    bos = ours.prefix_token_id
    assert ours.finished([*ids[:2], bos], Job(0, [], ["<bos>"], 9)) == bench.tokenizer.decode(ids[:2])
    assert ours.finished([*ids[:2], bos], Job(0, [], ["never"], 9)) is None


# ---- Whole tasks ---------------------------------------------------------------------------------

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
fewshot_split: test
num_fewshot: 1
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{choices[answer]}}"
metric_list: [{metric: exact_match}, {metric: bleu}]
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Two tasks over twelve questions, and a group of the first."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    words = "blue red green name x1 width class".split()
    data.write_text("".join(json.dumps({"question": f"What is {i}?", "choices": [words[i % 7], f"{words[i % 5]} or {words[i % 3]}",
                                                                                f"{i}"], "answer": i % 3}) + "\n" for i in range(12)))
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        text = text.replace("DATA", str(data)).replace("CACHE", str(folder / "cache"))
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_scores_of_whole_tasks_are_those_of_lm_evals_own_model_in_all_four_settings(bench, task_folder, monkeypatch, capsys):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)         # slow: it asks the machine for everything
    tasks = benchmarks.load_tasks([f"{task_folder}/"])
    numbers = benchmarks.measure(bench.model, bench.saes, bench.tokenizer, tasks, limit=10)
    answers, plain = set(), TaskManager(include_defaults=False)
    for setting in SETTINGS:
        expected = simple_evaluate(bench.theirs(setting), limit=10, bootstrap_iters=1000, task_manager=plain,
                                   tasks=[str(task_folder / "choice.yaml"), str(task_folder / "generate.yaml")])
        for task, metrics in (("tiny_choice", ["acc", "acc_norm"]), ("tiny_generate", ["exact_match", "bleu"])):
            for metric in metrics:
                wanted = [expected["results"][task][f"{key},none"] for key in (metric, f"{metric}_stderr")]
                assert numbers[setting][task][metric] == wanted, (setting, task, metric)
        answers.add(tuple(sample["resps"][0][0] for sample in expected["samples"]["tiny_generate"]))
    assert len(answers) == 4 and numbers["samples"] == {"tiny_choice": 10, "tiny_generate": 10}
    capsys.readouterr()
    benchmarks.show(numbers)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "SAE SAE + LoRA original LoRA".split()
    assert [line.split()[:2] for line in lines[1:5]] == [["tiny_choice", "acc"], ["tiny_choice", "acc_norm"],
                                                        ["tiny_generate", "exact_match"], ["tiny_generate", "bleu"]]
    assert all(f"{numbers[setting]['tiny_choice']['acc'][0]:.4f} ± " in lines[1] for setting in SETTINGS)


def test_a_groups_score_is_over_all_its_questions_and_stands_for_its_members(bench, task_folder, tmp_path, capsys):
    choice = (task_folder / "choice.yaml").read_text()
    (tmp_path / "choice.yaml").write_text(choice)
    (tmp_path / "five.jsonl").write_text("".join(open(task_folder / "data.jsonl").readlines()[:5]))
    choice = choice.replace(str(task_folder / "data.jsonl"), str(tmp_path / "five.jsonl"))
    (tmp_path / "second.yaml").write_text(choice.replace("tiny_choice", "tiny_second"))
    (tmp_path / "group.yaml").write_text("group: tiny\ntask: [tiny_choice, tiny_second]\n"
                                         "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n")
    tasks = TaskManager(include_path=tmp_path, include_defaults=False).load(["tiny"])
    numbers = benchmarks.measure(bench.model, bench.saes, bench.tokenizer, tasks)
    found = numbers["adapted"]
    assert numbers["tasks"] == ["tiny"] and (numbers["samples"]["tiny_choice"], numbers["samples"]["tiny_second"]) == (12, 5)
    whole = (12 * found["tiny_choice"]["acc"][0] + 5 * found["tiny_second"]["acc"][0]) / 17
    assert found["tiny"]["acc"][0] == pytest.approx(whole) and found["tiny_choice"]["acc"] != found["tiny_second"]["acc"]
    capsys.readouterr()
    benchmarks.show(numbers)
    assert [line.split()[:1] for line in capsys.readouterr().out.splitlines()[1:3]] == [["tiny"], []]


def test_the_command_writes_table_5_of_a_run(bench, task_folder, text_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_sae(bench.saes[LAYER], tmp_path / "sae", model_name="test", layer=LAYER, context=32)
    command("train", "--model", bench.folder / "model", "--sae", "sae", "--layer", 1, "--data", text_folder, "--context", 32,
            "--tokens", 64, "--eval-tokens", 64, "--rank", 2, "--dtype", "float32", "--device", "cpu", "--out", "run")
    command("eval", "run", "--suite", "lm", "--tasks", f"{task_folder}/choice.yaml,{task_folder}/generate.yaml", "--limit", 3)
    assert "tiny_choice acc" in capsys.readouterr().out
    numbers = read(tmp_path / "run" / "eval-lm.json")
    assert set(SETTINGS) < set(numbers) and numbers["samples"] == {"tiny_choice": 3, "tiny_generate": 3} and numbers["limit"] == 3
    assert "lm-eval cannot load --tasks ./none.yaml" in refusal("eval", "run", "--suite", "lm", "--tasks", "./none.yaml")


# ---- Mistakes ------------------------------------------------------------------------------------

def test_mistakes_in_tasks_are_one_line(task_folder, tmp_path, monkeypatch):
    (tmp_path / "broken.yaml").write_text("task: [")
    (tmp_path / "lost.yaml").write_text((task_folder / "choice.yaml").read_text().replace("data.jsonl", "nowhere.jsonl"))
    (tmp_path / "empty").mkdir()
    for name, reason in (("no.yaml", "no.yaml"), ("empty", "valid YAML path"), ("broken.yaml", "cannot load"),
                         ("lost.yaml", "nowhere.jsonl")):
        with pytest.raises(InputError, match=reason) as error:
            benchmarks.load_tasks([str(tmp_path / name)])
        assert "\n" not in str(error.value)

    def offline(*_):
        raise ConnectionError("Couldn't reach the Hub")
    monkeypatch.setattr(TaskManager, "load", offline)
    with pytest.raises(InputError, match="out of reach.*network"):
        benchmarks.load_tasks([str(task_folder / "choice.yaml")])


def test_requests_that_cannot_be_answered_are_refused(bench):
    ours = bench.ours()
    with pytest.raises(InputError, match="at least 1"):
        benchmarks.measure(bench.model, {}, bench.tokenizer, {}, limit=0)
    for how, reason in (({"do_sample": True, "temperature": 0.7}, "greedy"), ({}, "asks for 256 new tokens.*holds 96")):
        with pytest.raises(InputError, match=reason):
            ours.generate_until(requests("generate_until", ("Q", how)))
    for continuation in ([], [5] * (LENGTH + 1)):
        with pytest.raises(InputError, match="cannot score"):
            ours._loglikelihood_tokens([(("a", "b"), [5], continuation)])
