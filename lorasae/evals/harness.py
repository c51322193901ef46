"""Language-model benchmarks (paper §5.3, Table 5): our Transformer, SAEs spliced in or not, as a model of lm-eval.

    python eval.py RUN_DIR --suite lm                                       the paper's four tasks, fetched from the Hub
    python eval.py RUN_DIR --suite lm --tasks my_task.yaml --limit 100      a local task in lm-eval's own YAML format

lm-eval makes the prompts and computes the scores (accuracy, BLEU, ROUGE); this file answers its three kinds of request. The
answers are those of lm-eval's own Hugging Face model at fp32 with add_bos_token=True. BOS comes first for both families: both
were trained with it. (lm-eval 0.4.7, which the paper probably ran, gave it to Gemma only.)

Shapes: B batch, T tokens, D d_model, V vocabulary, N scored tokens.
"""
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from lorasae.data import special_mask
from lorasae.errors import InputError
from lorasae.evals.common import evaluating, plus_minus, progress
from lorasae.layers import Cache
from lorasae.lora import base
from lorasae.objectives import capped, chunk_rows, matmul_fp32
from lorasae.run import print_table
from lorasae.streams import say

try:
    from lm_eval import evaluator
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    if not (error.name or "").startswith("lm_eval"):            # something that lm-eval itself lacks
        raise
    raise InputError('the language-model benchmarks need the lm-eval package: pip install "lm-eval>=0.4.12"') from None

SETTINGS = {                                            # the columns of Table 5: (SAEs spliced in, adapters on)
    "sae": ("SAE", True, False), "adapted": ("SAE + LoRA", True, True),
    "base": ("original", False, False), "lora": ("LoRA", False, True),
}
TABLE_5 = {                                             # its rows; of each task lm-eval computes more than the paper shows
    ("mmlu", "acc"): "MMLU", ("hellaswag", "acc"): "HellaSwag", ("truthfulqa_gen", "bleu_acc"): "BLEU",
    ("truthfulqa_gen", "rouge1_acc"): "ROUGE-1", ("truthfulqa_gen", "rouge2_acc"): "ROUGE-2", ("truthfulqa_mc1", "acc"): "MC1",
}
TASKS = "mmlu,hellaswag,truthfulqa_mc1,truthfulqa_gen"


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

    keep_special: BOS and EOS keep their activation. sae_on_generated=False gives generated tokens no SAE, as the published
    code did by accident: its hook spared position 0 of each tensor it saw, and with a key-value cache a new token is just
    that. batch_tokens bounds B x T. Contexts too long for the model lose their beginning, BOS included, as in lm-eval.
    """

    def __init__(self, model, tokenizer, saes, *, lora, keep_special, sae_on_generated=True, batch_tokens=8192):
        super().__init__()
        self.model, self.tokenizer, self.saes, self.lora = model.eval(), tokenizer, saes, lora      # eval: no dropout
        self.keep_special, self.sae_on_generated, self.batch_tokens = keep_special, sae_on_generated, batch_tokens
        self.max_length = model.config.max_position_embeddings

    @property
    def eot_token_id(self):
        return self.model.config.eos_token_id

    @property
    def prefix_token_id(self):
        """What stands before an empty context."""
        return self.model.config.bos_token_id

    def tok_encode(self, string, add_special_tokens=None):
        """Token ids, after one BOS unless add_special_tokens is False."""
        ids, bos = self.tokenizer.encode(string, add_special_tokens=False).ids, self.prefix_token_id
        return ids if add_special_tokens is False or ids[:1] == [bos] else [bos, *ids]

    # ---- The model ---------------------------------------------------------------------------------------------------

    def run(self, tokens, keep, cache=None):
        """tokens [B, T] -> the residual stream after the last block [B, T, D]."""
        with nullcontext() if self.lora else base(self.model):
            return self.model.run(self.model.embed(tokens), 0, len(self.model.layers), self.saes, keep, cache)

    def keep(self, tokens):
        """[B, T], True where no SAE applies."""
        config = self.model.config
        special = special_mask(tokens, config.bos_token_id, config.eos_token_id)
        return special if self.keep_special else torch.zeros_like(special)

    def logits(self, x):
        """The residual stream [N, D] -> logits [N, V], fp32 also for bf16 weights: rounded there, choices would tie."""
        return capped(matmul_fp32(self.model.norm(x), self.model.head.T), self.model.softcap)

    def score(self, x, labels):
        """x [N, D], labels [N] -> log p(label) and whether it is the likeliest token, [N] each, a few rows of V at a time."""
        log_p, greedy, rows = [], [], chunk_rows(self.model.head)
        for part, wanted in zip(x.split(rows), labels.split(rows)):
            logits = self.logits(part)
            log_p.append(logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0])
            greedy.append(logits.argmax(-1) == wanted)
        return torch.cat(log_p).cpu(), torch.cat(greedy).cpu()

    def pad(self, rows):
        """Lists of ids -> [B, T], filled up on the right: causal attention never sees it, so it needs no mask."""
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self.model.device)

    # ---- What lm-eval asks -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        """[(strings, context ids, continuation ids)] -> [(Σ log p over the continuation, every token was the likeliest)].

        The last token is only predicted, never read: choices of a single token, as MMLU's, share one row.
        """
        answers, sharing = [None] * len(requests), defaultdict(list)
        for i, (strings, context, continuation) in enumerate(requests):
            if not 1 <= len(continuation) <= self.max_length:
                raise InputError(f"cannot score {strings}: its continuation has {len(continuation)} tokens, but the model "
                                 f"can score 1 to {self.max_length}")
            sharing[tuple(context + continuation)[-self.max_length - 1:-1]].append((i, continuation))
        self.warn_of_truncation(sum(len(context + continuation) > self.max_length + 1 for _, context, continuation in requests))
        for batch in progress(self.batches(sharing, len), "scoring"):
            tokens = self.pad(batch)
            x = self.run(tokens, self.keep(tokens))
            spans = [(i, row, len(ids), continuation) for row, ids in enumerate(batch) for i, continuation in sharing[ids]]
            where = [(row, end - len(ids) + j, label) for _, row, end, ids in spans for j, label in enumerate(ids)]
            rows, positions, labels = torch.tensor(where, device=x.device).T
            log_p, greedy = self.score(x[rows, positions], labels)
            lengths = [len(continuation) for *_, continuation in spans]
            for (i, *_), p, top in zip(spans, log_p.split(lengths), greedy.split(lengths)):
                answers[i] = p.sum().item(), top.all().item()
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Σ log p of every token of a text, BOS before it, in windows of max_length; each token is predicted once."""
        windows, owners, totals = [], [], [0.0] * len(requests)
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((request.args[0][:60], *make_disjoint_window(window)))
                owners.append(i)
        for i, (log_p, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[i] += log_p
        return totals

    @torch.no_grad()
    def generate_until(self, requests, disable_tqdm=False):
        """Greedy continuations, up to the first stop string, EOS, or max_gen_toks (256) new tokens."""
        jobs, texts, cut = [], [None] * len(requests), 0
        for i, request in enumerate(requests):
            context, how = request.args
            how = normalize_gen_kwargs(how, 256)
            if how["do_sample"]:
                raise InputError(f"the task {request.task_name} samples its answers, but here they are greedy: set "
                                 "do_sample: false in its generation_kwargs")
            room = self.max_length - how["max_gen_toks"]
            if room < 1:
                raise InputError(f"the task {request.task_name} asks for {how['max_gen_toks']} new tokens, but the model holds "
                                 f"{self.max_length}: set a smaller max_gen_toks in its generation_kwargs")
            prompt = self.tok_encode(context)
            cut += len(prompt) > room
            jobs.append(Job(i, prompt[-room:], [stop for stop in how["until"] if stop], how["max_gen_toks"]))
        self.warn_of_truncation(cut)
        for batch in progress(self.batches(jobs, Job.size), "generating"):
            for job, text in zip(batch, self.generate(batch)):
                texts[job.index] = text
        return texts

    def generate(self, jobs):
        """The text of each Job, one token of all of them at a time. Where a prompt is longer than the shortest, its own
        tokens are read in place of the predicted ones, so no row needs padding on its left."""
        lengths = torch.tensor([len(job.prompt) for job in jobs], device=self.model.device)
        tokens = self.pad([job.prompt + [0] * job.budget for job in jobs])
        cache, written, texts = Cache(), [[] for _ in jobs], [None] * len(jobs)
        for position in range(int(lengths.min()), tokens.shape[1]):
            new = slice(cache.length, position)                         # first the shared prefix, then a token at a time
            keep = self.keep(tokens[:, new])
            if not self.sae_on_generated:
                keep |= torch.arange(position, device=keep.device)[new] >= lengths[:, None]
            best = self.logits(self.run(tokens[:, new], keep, cache)[:, -1]).argmax(-1)
            tokens[:, position] = torch.where(position < lengths, tokens[:, position], best)
            for row, (job, token) in enumerate(zip(jobs, best.tolist())):
                if texts[row] is None and position >= len(job.prompt):
                    written[row].append(token)
                    texts[row] = self.finished(written[row], job)
            if None not in texts:
                break
        return texts

    def finished(self, ids, job):
        """The answer that these new tokens make, or None while it goes on. A stop string may be a special token's name."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        if ids[-1] != self.eot_token_id and len(ids) < job.budget and not any(stop in text for stop in job.stops):
            return None
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        for stop in job.stops:
            text = text.split(stop)[0]
        return text

    def batches(self, items, size):
        """The items, the largest first, in lists of at most batch_tokens tokens when padded."""
        items, out = sorted(items, key=size, reverse=True), []
        while items:
            count = max(1, self.batch_tokens // size(items[0]))
            out.append(items[:count])
            items = items[count:]
        return out

    def warn_of_truncation(self, count):
        if count:
            say(f"warning: {count} requests are longer than the model's {self.max_length} tokens and lose their beginning")


def load_tasks(names):
    """lm-eval's tasks, with their data: names, or YAML files and folders of them (what has a / or ends in .yaml)."""
    paths = {name: Path(name).resolve() for name in names if "/" in name or name.endswith(".yaml")}
    folders = [path for path in paths.values() if path.is_dir()]
    manager = TaskManager(include_path=folders, include_defaults=len(paths) < len(names))
    inside = {folder: [task for task in manager.all_subtasks if folder in manager.task_index[task].yaml_path.parents]
              for folder in folders}
    for name in names:
        if name in paths and not paths[name].is_file() and not inside.get(paths[name]):
            raise InputError(f"--tasks {name}: expected a YAML file of lm-eval's format, or a folder that holds some")
        if name not in paths and name not in manager.all_tasks:
            raise InputError(f"--tasks {name}: lm-eval has no task of that name; `lm-eval ls tasks` lists them, and a file's "
                             "name ends in .yaml")
    try:
        loaded = manager.load([spec for name in names for spec in inside.get(paths.get(name), [name])])
    except ConnectionError as error:
        raise InputError(f"the data of --tasks {','.join(names)} come from the Hub, which is out of reach ({error}): run once "
                         "with a network, or pass a YAML file with local data") from error
    except Exception as error:                          # others' code on the user's file: the file is what has to be mended
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"lm-eval cannot load --tasks {','.join(names)}: {type(error).__name__}: {reason}") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)           # as the paper: no examples, but those that a prompt contains
        task.set_fewshot_seed(1234)
    return loaded


def evaluate(model, saes, tokenizer, tasks, keep_special, settings=SETTINGS, limit=None, **how):
    """{setting: {task: {metric: value, metric_stderr: its standard error, or None}}}, plus "samples": {task: documents} and
    "parts": {group of tasks: its members}.

    tasks: what load_tasks returns; limit: only so many documents of each; how: more arguments of SplicedLM.
    """
    numbers = {"limit": limit}
    with evaluating(model):
        for setting in settings:
            label, spliced, lora = SETTINGS[setting]
            say(f"{label}:")
            lm = SplicedLM(model, tokenizer, saes if spliced else {}, lora=lora, keep_special=keep_special, **how)
            results = evaluator.evaluate(lm, tasks, limit=limit, bootstrap_iters=1000, log_samples=False)
            numbers["samples"] = {task: count["effective"] for task, count in results["n-samples"].items()}
            numbers["parts"] = {group: parts for group, parts in results["group_subtasks"].items() if parts}
            numbers[setting] = {task: {key.removesuffix(",none"): value if isinstance(value, float | int) else None
                                       for key, value in metrics.items() if "," in key}
                                for task, metrics in results["results"].items()}
    return numbers


def show(numbers):
    """Table 5: the paper's metrics of its tasks, every metric of the others; members of a group are left to the file."""
    settings = [name for name in SETTINGS if name in numbers]
    found = numbers[settings[0]]
    hidden = {part for parts in numbers["parts"].values() for part in parts} | {task for task, _ in TABLE_5}
    keys = [(task, metric) for task, metric in TABLE_5 if metric in found.get(task, ())]
    keys += [(task, metric) for task in found if task not in hidden for metric in found[task] if "_stderr" not in metric]
    rows = []
    for task, metric in keys:
        name, _, kind = metric.partition(",")                   # exact_match,strict: a filter's name follows the metric's
        stderr = f"{name}_stderr" + (f",{kind}" if kind else "")
        cells = (f"{numbers[s][task][metric]:.4f} {plus_minus(numbers[s][task][stderr])}" for s in settings)
        rows.append([TABLE_5.get((task, metric), f"{task} {metric}"), *cells])
    print_table(rows, ["", *(SETTINGS[name][0] for name in settings)])
    print("\nin lm-eval's units (the paper's Table 5 has them times 100), ± one standard error")
