"""Our Transformer, with or without SAEs, as a model for the lm-eval package (evals/benchmarks.py).

SplicedLM answers requests exactly as lm-eval's Hugging Face model would in fp32 with
add_bos_token=True: both families get the BOS they were trained with (the lm-eval of the paper's
time gave Llama none).

Shapes: B batch, T tokens, D d_model, V vocabulary, N positions.
"""
from collections import defaultdict
from typing import NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from torch.nn.utils.rnn import pad_sequence

from lorasae.errors import InputError
from lorasae.evals.common import progress
from lorasae.generation import fp32_logits, generate


class Prompt(NamedTuple):
    """A prompt to be continued."""
    index: int                                          # of its request
    ids: list
    stops: list                                         # strings that end the answer
    budget: int                                         # at most this many new tokens


class SplicedLM(TemplateLM):
    """log p(continuation | context) and greedy text, with {layer: SAE} spliced into the model.

    Generated tokens go through the SAE too. In the published code they do not, by accident: its
    hook skips the first position of its input, and with a key-value cache every new token is at
    that position (run_benchmarks.py:70). batch_tokens bounds B x T. A context that is too long
    loses its beginning, BOS included, as in lm-eval.
    """

    def __init__(self, model, tokenizer, saes, batch_tokens=8192):
        super().__init__()
        self.model, self.tokenizer, self.saes = model, tokenizer, saes
        self.batch_tokens = batch_tokens
        self.max_length = model.config.max_position_embeddings

    @property
    def eot_token_id(self):
        return self.model.config.eos_token_id

    @property
    def prefix_token_id(self):
        """The token used in place of an empty context."""
        return self.model.config.bos_token_id

    def tok_encode(self, string, add_special_tokens=None):
        """Token ids, after one BOS unless add_special_tokens is False."""
        ids = self.tokenizer.encode(string, add_special_tokens=False).ids
        bos = self.prefix_token_id
        return ids if add_special_tokens is False or ids[:1] == [bos] else [bos, *ids]

    # ---- The model -----------------------------------------------------------------------------

    def run(self, tokens):
        """tokens [B, T] -> the residual stream after the last block [B, T, D]."""
        return self.model.residual(tokens.to(self.model.device), self.saes)

    def score(self, x, labels):
        """x [N, D], N labels -> (the sum of log p(label), whether each is the likeliest token)."""
        logits, labels = fp32_logits(self.model, x), torch.tensor(labels, device=x.device)
        log_p = logits.log_softmax(-1).gather(-1, labels[:, None])
        return log_p.sum().item(), (logits.argmax(-1) == labels).all().item()

    def pad(self, rows):
        """Lists of ids -> [B, T], padded on the right, which causal attention never sees."""
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

    def batches(self, items, size, label):
        """The items, the largest first, in lists of at most batch_tokens tokens when padded."""
        items, out = sorted(items, key=size, reverse=True), []
        while items:
            count = max(1, self.batch_tokens // size(items[0]))
            out.append(items[:count])
            items = items[count:]
        return progress(out, label)

    # ---- lm-eval's requests --------------------------------------------------------------------

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        """[(strings, context ids, continuation ids)] -> what `score` says of each continuation."""
        # Rows leave out the last token, which is never read; MMLU's letters then share a row.
        by_row = defaultdict(list)                      # {row: [(index of the request, labels)]}
        for i, (strings, context, labels) in enumerate(requests):
            if len(labels) > self.max_length:
                raise InputError(f"cannot score {strings}: the continuation has {len(labels)} "
                                 f"tokens, more than the model's {self.max_length}")
            row = (*context, *labels)[:-1]
            by_row[row[-self.max_length:]].append((i, labels))

        answers = [None] * len(requests)
        for rows in self.batches(by_row, len, "scoring"):
            for x, row in zip(self.run(self.pad(rows)), rows):
                for i, labels in by_row[row]:
                    answers[i] = self.score(x[len(row) - len(labels):len(row)], labels)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise InputError("tasks that score whole texts (loglikelihood_rolling) are not supported")

    def generate_until(self, requests, disable_tqdm=False):
        """Greedy continuations, up to a stop string, EOS, or max_gen_toks (256) new tokens."""
        prompts = []
        for i, request in enumerate(requests):
            context, options = request.args
            options = normalize_gen_kwargs(options, 256)
            budget = options["max_gen_toks"]
            room = self.max_length - budget
            if options["do_sample"]:
                raise InputError(f"{request.task_name} samples its answers, but only greedy ones "
                                 "are supported: set do_sample: false in its generation_kwargs")
            if room < 1:
                raise InputError(f"{request.task_name} asks for {budget} new tokens; the model "
                                 f"allows {self.max_length} in all: set a smaller max_gen_toks in "
                                 "its generation_kwargs")
            ids = self.tok_encode(context)[-room:]
            stops = [stop for stop in options["until"] if stop]
            prompts.append(Prompt(i, ids, stops, budget))

        texts = [None] * len(requests)

        def stop(row, ids):
            prompt = batch[row]
            texts[prompt.index] = self.finished(ids, prompt)
            return texts[prompt.index] is not None

        def size(prompt):
            return len(prompt.ids) + prompt.budget

        for batch in self.batches(prompts, size, "generating"):
            rows = [prompt.ids for prompt in batch]
            budget = max(prompt.budget for prompt in batch)
            generate(self.model, self.pad(rows), budget, self.saes,
                     lengths=[len(ids) for ids in rows], stop=stop)
        return texts

    def finished(self, ids, prompt):
        """The answer in the new tokens, None if unfinished. Stop strings may be special tokens."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        stopped = any(stop in text for stop in prompt.stops)
        if not stopped and ids[-1] != self.eot_token_id and len(ids) < prompt.budget:
            return None
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return postprocess_generated_text(text, prompt.stops, think_end_token=None)
