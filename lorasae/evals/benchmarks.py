"""Language-model benchmarks (paper §5.3, Table 5): our Transformer, with SAEs or without, as a model of lm-eval.

    python eval.py RUN_DIR --suite lm                                       the paper's four tasks, fetched from the Hub
    python eval.py RUN_DIR --suite lm --tasks my_task.yaml --limit 100      a task of one's own, in lm-eval's format

The lm-eval package makes the prompts and computes the scores (accuracy, BLEU, ROUGE). SplicedLM answers its three kinds
of request, just as lm-eval's own Hugging Face model would at fp32 with add_bos_token=True: both families get the BOS they
were trained with (the lm-eval of the paper's time gave Llama none).

Shapes: B batch, T tokens, D d_model, V vocabulary, N positions.
"""
from collections import defaultdict
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from lorasae.io.corpus import special_mask
from lorasae.errors import InputError
from lorasae.evals.common import evaluating, plus_minus, progress
from lorasae.attention import Cache
from lorasae.lora import base
from lorasae.objectives import capped, chunk_rows, matmul_fp32
from lorasae.runs.folder import print_table
from lorasae.io.streams import say

try:
    from lm_eval import evaluator
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    if not (error.name or "").startswith("lm_eval"):    # something that lm-eval itself lacks
        raise
    raise InputError('the language-model benchmarks need the lm-eval package: pip install "lm-eval>=0.4.12"') from None

SETTINGS = {                                            # the columns of Table 5: (SAEs spliced in, adapters on)
    "sae": ("SAE", True, False), "adapted": ("SAE + LoRA", True, True),
    "base": ("original", False, False), "lora": ("LoRA", False, True),
}
TABLE_5 = {                                             # its rows; lm-eval computes more than the paper shows
    ("mmlu", "acc"): "MMLU", ("hellaswag", "acc"): "HellaSwag", ("truthfulqa_gen", "bleu_acc"): "BLEU",
    ("truthfulqa_gen", "rouge1_acc"): "ROUGE-1", ("truthfulqa_gen", "rouge2_acc"): "ROUGE-2",
    ("truthfulqa_mc1", "acc"): "MC1",
}
TASKS = "mmlu,hellaswag,truthfulqa_mc1,truthfulqa_gen"
SEED = 1234                                             # lm-eval's own, of the examples that few-shot tasks draw


class Job(NamedTuple):
    """A prompt to be continued."""
    index: int                                          # of its request
    prompt: list                                        # token ids
    stops: list                                         # strings that end the answer and are cut off
    budget: int                                         # the most new tokens

    def size(self):
        return len(self.prompt) + self.budget


class SplicedLM(TemplateLM):
    """log p(continuation | context) and greedy text, with {layer: SAE} spliced in and the adapters on (lora) or off.

    keep_special: BOS and EOS keep their activation. sae_on_generated=False spares generated tokens the SAE, as the
    published code did by accident: its hook spared the first position of what it was given, and with a key-value cache a
    new token is just that. batch_tokens bounds B x T. Too long a context loses its beginning, BOS included, as in lm-eval.
    """

    def __init__(self, model, tokenizer, saes, *, lora, keep_special, sae_on_generated=True, batch_tokens=8192):
        super().__init__()
        self.model, self.tokenizer, self.saes, self.lora = model.eval(), tokenizer, saes, lora          # no dropout
        self.keep_special, self.sae_on_generated, self.batch_tokens = keep_special, sae_on_generated, batch_tokens
        self.max_length = model.config.max_position_embeddings

    @property
    def eot_token_id(self):
        return self.model.config.eos_token_id

    @property
    def prefix_token_id(self):
        """What stands for an empty context."""
        return self.model.config.bos_token_id

    def tok_encode(self, string, add_special_tokens=None):
        """Token ids, after one BOS unless add_special_tokens is False."""
        ids, bos = self.tokenizer.encode(string, add_special_tokens=False).ids, self.prefix_token_id
        return ids if add_special_tokens is False or ids[:1] == [bos] else [bos, *ids]

    # ---- The model ---------------------------------------------------------------------------------------------------

    def run(self, tokens, unspliced=False, cache=None):
        """tokens [B, T] -> the residual stream after the last block [B, T, D]; no SAE where unspliced [B, T] is True."""
        config = self.model.config
        keep = special_mask(tokens, config.bos_token_id, config.eos_token_id) & self.keep_special | unspliced
        with nullcontext() if self.lora else base(self.model):
            return self.model.run(self.model.embed(tokens), 0, len(self.model.layers), self.saes, keep, cache)

    def logits(self, x):
        """The residual stream [N, D] -> logits [N, V], fp32 also for bf16 weights: rounded there, choices would tie."""
        return capped(matmul_fp32(self.model.norm(x), self.model.head.T), self.model.softcap)

    def score(self, x, labels):
        """x [N, D], labels [N] -> log p(label), label is the likeliest token; [N] each. No [N, V] is ever whole."""
        log_p, top, rows = [], [], chunk_rows(self.model.head)
        for part, wanted in zip(x.split(rows), labels.split(rows)):
            logits = self.logits(part)
            log_p.append(logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0])
            top.append(logits.argmax(-1) == wanted)
        return torch.cat(log_p).cpu(), torch.cat(top).cpu()

    def pad(self, rows):
        """Lists of ids -> [B, T], filled up on the right, where causal attention never looks: no mask is needed."""
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self.model.device)

    def batches(self, items, size, label):
        """The items, the largest first, in lists of at most batch_tokens tokens when padded."""
        items, out = sorted(items, key=size, reverse=True), []
        while items:
            count = max(1, self.batch_tokens // size(items[0]))
            out.append(items[:count])
            items = items[count:]
        return progress(out, label)

    def warn_of_cuts(self, count):
        if count:
            say(f"warning: {count} requests exceed the model's {self.max_length} tokens and lose their beginning")

    # ---- What lm-eval asks -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        """[(strings, context ids, continuation ids)] -> [(Σ log p of the continuation, all of it was the likeliest)].

        The last token is only predicted, never read: choices of a single token, as MMLU's, share one row.
        """
        answers, sharing = [None] * len(requests), defaultdict(list)
        for i, (strings, context, continuation) in enumerate(requests):
            if not 1 <= len(continuation) <= self.max_length:
                raise InputError(f"cannot score {strings}: the continuation has {len(continuation)} tokens, but it must "
                                 f"have 1 to {self.max_length}")
            sharing[tuple(context + continuation)[-self.max_length - 1:-1]].append((i, continuation))
        self.warn_of_cuts(sum(len(context) + len(ids) > self.max_length + 1 for _, context, ids in requests))
        for batch in self.batches(sharing, len, "scoring"):
            x = self.run(self.pad(batch))
            asked = [(row, len(ids), *request) for row, ids in enumerate(batch) for request in sharing[ids]]
            where = [(row, end - len(continuation) + j, token)
                     for row, end, _, continuation in asked for j, token in enumerate(continuation)]
            rows, positions, labels = torch.tensor(where, device=x.device).T
            log_p, top = self.score(x[rows, positions], labels)
            lengths = [len(continuation) for *_, continuation in asked]
            for (_, _, i, _), p, likeliest in zip(asked, log_p.split(lengths), top.split(lengths)):
                answers[i] = p.sum().item(), likeliest.all().item()
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Σ log p of every token of a text, BOS before it, in windows of max_length; each token is predicted once."""
        windows, totals = [], [0.0] * len(requests)
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows += [(i, *make_disjoint_window(window)) for window in
                        get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)]
        for (i, *_), (log_p, _) in zip(windows, self._loglikelihood_tokens(windows)):
            totals[i] += log_p
        return totals

    @torch.no_grad()
    def generate_until(self, requests, disable_tqdm=False):
        """Greedy continuations, up to the first stop string, EOS, or max_gen_toks (256) new tokens."""
        jobs, texts, cuts = [], [None] * len(requests), 0
        for i, request in enumerate(requests):
            context, how = request.args[0], normalize_gen_kwargs(request.args[1], 256)
            room = self.max_length - how["max_gen_toks"]
            if how["do_sample"]:
                raise InputError(f"{request.task_name} samples its answers, but here they are greedy: set do_sample: "
                                 "false in its generation_kwargs")
            if room < 1:
                raise InputError(f"{request.task_name} asks for {how['max_gen_toks']} new tokens, but the model holds "
                                 f"{self.max_length}: set a smaller max_gen_toks in its generation_kwargs")
            prompt = self.tok_encode(context)
            cuts += len(prompt) > room
            jobs.append(Job(i, prompt[-room:], [stop for stop in how["until"] if stop], how["max_gen_toks"]))
        self.warn_of_cuts(cuts)
        for batch in self.batches(jobs, Job.size, "generating"):
            for job, text in zip(batch, self.generate(batch)):
                texts[job.index] = text
        return texts

    def generate(self, jobs):
        """The text of each Job, all of them a token at a time. Where a prompt is longer than the shortest one, its own
        tokens are read in place of the predicted ones, so no row needs padding on its left."""
        lengths = torch.tensor([len(job.prompt) for job in jobs], device=self.model.device)
        tokens = self.pad([job.prompt + [0] * job.budget for job in jobs])
        generated = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
        cache, written, texts = Cache(), [[] for _ in jobs], [None] * len(jobs)
        for position in range(int(lengths.min()), tokens.shape[1]):
            new = slice(cache.length, position)         # what every prompt has, at first; then one token
            x = self.run(tokens[:, new], False if self.sae_on_generated else generated[:, new], cache)
            best = self.logits(x[:, -1]).argmax(-1)
            tokens[:, position] = torch.where(generated[:, position], best, tokens[:, position])
            for row, (job, token) in enumerate(zip(jobs, best.tolist())):
                if texts[row] is None and position >= len(job.prompt):
                    written[row].append(token)
                    texts[row] = self.finished(written[row], job)
            if None not in texts:
                break
        return texts

    def finished(self, ids, job):
        """The answer these new tokens make, or None while it goes on. A stop string may be the name of a special token."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        if ids[-1] != self.eot_token_id and len(ids) < job.budget and not any(stop in text for stop in job.stops):
            return None
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        for stop in job.stops:
            text = text.split(stop)[0]
        return text


# ---- Table 5 ---------------------------------------------------------------------------------------------------------

def load_tasks(names):
    """lm-eval's tasks, with their data: names, or YAML files and folders of them (what has a / or ends in .yaml)."""
    paths = {name: Path(name).resolve() for name in names if "/" in name or name.endswith(".yaml")}
    manager = TaskManager(include_path=[path for path in paths.values() if path.is_dir()],
                          include_defaults=len(paths) < len(names))     # lm-eval's own files take seconds to read
    index, specs = manager.task_index, []
    for name in names:
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


def evaluate(model, saes, tokenizer, tasks, keep_special, settings=SETTINGS, limit=None, **how):
    """{setting: {task: {metric: [value, standard error or None]}}}; also "samples": {task: number of questions} and
    "tasks": those that are not part of another's score.

    tasks: what load_tasks returns; limit: only so many questions of each; how: more arguments of SplicedLM.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: expected at least 1 question")
    numbers = {"lm_eval": version("lm_eval"), "limit": limit}
    with evaluating(model):
        for setting in settings:
            label, spliced, lora = SETTINGS[setting]
            say(f"{label}:")
            for task in tasks["tasks"].values():
                task.set_fewshot_seed(SEED)             # else every setting would draw other examples
            lm = SplicedLM(model, tokenizer, saes if spliced else {}, lora=lora, keep_special=keep_special, **how)
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
    """Table 5: of the paper's tasks the metrics it shows, of others all."""
    settings = [name for name in SETTINGS if name in numbers]
    found, known = numbers[settings[0]], {task for task, _ in TABLE_5}
    keys = [key for key in TABLE_5 if key[1] in found.get(key[0], ())]
    keys += [(task, metric) for task in numbers["tasks"] if task not in known for metric in found[task]]
    rows = []
    for task, metric in keys:
        cells = (f"{value:.4f} {plus_minus(error)}" for value, error in (numbers[s][task][metric] for s in settings))
        rows.append([TABLE_5.get((task, metric), f"{task} {metric}"), *cells])
    print_table(rows, ["", *(SETTINGS[name][0] for name in settings)])
    print("\nin lm-eval's units (Table 5 prints percentages), ± one standard error")
