"""Our Transformer, with SAEs or without, as a model of the lm-eval package (evals/benchmarks.py).

SplicedLM answers lm-eval's three kinds of request, just as lm-eval's own Hugging Face model would at fp32 with
add_bos_token=True: both families get the BOS they were trained with (the lm-eval of the paper's time gave Llama none).

Shapes: B batch, T tokens, D d_model, V vocabulary, N positions.
"""
from collections import defaultdict
from contextlib import nullcontext
from typing import NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence

from lorasae.attention import Cache
from lorasae.errors import InputError
from lorasae.evals.common import progress
from lorasae.io.console import note
from lorasae.lora import base
from lorasae.objectives import capped, chunk_rows, to_logits


class Job(NamedTuple):
    """A prompt to be continued."""
    index: int                                          # of its request
    prompt: list                                        # token ids
    stops: list                                        # strings that end the answer and are cut off
    budget: int                                         # the most new tokens

    def size(self):
        return len(self.prompt) + self.budget


class SplicedLM(TemplateLM):
    """log p(continuation | context) and greedy text, with {layer: SAE} spliced in and the adapters on (lora) or off.

    Generated tokens get the SAE too. The published code spares them by accident: its hook leaves alone the first position
    of what it is given, and with a key-value cache a new token is just that (run_benchmarks.py:70). batch_tokens bounds
    B x T. Too long a context loses its beginning, BOS included, as in lm-eval.
    """

    def __init__(self, model, tokenizer, saes, *, lora, batch_tokens=8192):
        super().__init__()
        self.model, self.tokenizer, self.saes, self.lora = model.eval(), tokenizer, saes, lora          # no dropout
        self.batch_tokens = batch_tokens
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

    def run(self, tokens, cache=None):
        """tokens [B, T] -> the residual stream after the last block [B, T, D]."""
        model = self.model
        with nullcontext() if self.lora else base(model):
            return model.run(model.embed(tokens), 0, len(model.layers), self.saes, model.special(tokens), cache)

    def logits(self, x):
        """The residual stream [N, D] -> logits [N, V], fp32 also for bf16 weights: rounded there, choices would tie."""
        return capped(to_logits(self.model.norm(x), self.model.head), self.model.softcap)

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
            note(f"warning: {count} requests exceed the model's {self.max_length} tokens and lose their beginning")

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
            new = slice(cache.length, position)    # what every prompt has, at first; then one token
            x = self.run(tokens[:, new], cache)
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
