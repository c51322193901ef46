"""Speed and memory beside the alternatives, every ratio from one run on one machine.

    python -m lorasae.bench kl                      the loss against its naive formula (objectives.py)
    python -m lorasae.bench topk                    top-k, the encoder and the whole SAE step (topk.py)
    python -m lorasae.bench step                    the LoRA step (adapt.py) beside two peers (peers.py), five ranks in
                                                    one pass beside five runs, FLOPs beside the published recipe's
    python -m lorasae.bench sae                     SAE training (dictionary.py)
    python -m lorasae.bench data                    text to packed tokens (data.py)
    python -m lorasae.bench all --json bench.json   every section, and the rows as JSON

The contenders of a race take turns, so that a busy machine slows them all; times are medians with minimum and maximum.
Answers are compared before anything is timed: a wrong one ends the benchmark. Peak memory is what one call adds to its
inputs: on a CPU the resident memory of a fresh process (scratch space of the libraries included; Linux only), on a GPU
the allocator's. ours_faster is the contender's median time over ours, ours_memory and ours_flops ours over theirs.
s_15M is what the paper's 15M tokens would take; utilisation is FLOPs counted over those of a matrix product timed here.

Models and SAEs are random, as speed hardly depends on values: of real shapes on a GPU, of small ones on a CPU.
"""
import argparse
import itertools
import math
import platform
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from lorasae import dictionary, objectives, topk
from lorasae.io.presets import TINY as EMBEDDED
from lorasae.io.corpus import Corpus, mixed, pack, special_mask
from lorasae.errors import InputError
from lorasae.io.disk import write_json
from lorasae.linear import linear
from lorasae.io.adapters import adapter_state
from lorasae.lora import attach_lora
from lorasae.bench.race import differing_tensors, race, synchronise, timed
from lorasae.io.streams import standard_library
from lorasae.bench.workloads import REAL, SMALL, TINY, InTurn, Ours, flops_per_token, random_adapter, random_setting


# ------------------------------------------------------------------------------------------------------------- the loss

def bench_kl(device, quick):
    """KL(base ‖ adapted) and its gradient: the vocabulary of Gemma-2, a quarter of its width, one sequence."""
    N, D, V = (64, 32, 4096) if quick else (1024, 576, 256_000)
    return race(f"KL, N {N} D {D} V {V}", partial(kl_contenders, N, D, V), differing_tensors, 3, device, not quick)


def kl_contenders(N, D, V, device):
    g = torch.Generator(device).manual_seed(0)
    target = torch.randn(N, D, device=device, generator=g)
    hidden = (target + 0.5 * torch.randn(N, D, device=device, generator=g)).requires_grad_()
    head = torch.randn(V, D, device=device, generator=g) * 2 / D ** 0.5

    def run(loss):
        value = loss(target, hidden, head, softcap=30.0)
        return {"loss": value.detach(), "gradient": torch.autograd.grad(value, hidden)[0]}

    return {"naive": lambda: run(objectives.naive_kl),
            "lorasae": lambda: run(partial(objectives.linear_kl, compiled=device == "cuda"))}


# --------------------------------------------------------------------------------------------- top-k, encoder, SAE step

def bench_topk(device, quick):
    """Top-k alone, the encoder, the whole TopK SAE step: k 64, D 2304 (Gemma-2-2B), M from 8 to 57 times D."""
    rows = []
    for N, M in [(64, 4096)] if quick else [(2048, 16384), (2048, 131072)]:
        rows += race(f"top-k, N {N} M {M}", partial(topk_contenders, N, M, 64), differing_entries,
                     3 if quick else 15, device, not quick)
    for N, D, M in [(64, 32, 4096)] if quick else [(1024, 2304, 131072)]:
        rows += race(f"encoder, N {N} D {D} M {M}", partial(encode_contenders, N, D, M, 64), differing_tensors,
                     3, device, not quick)
    for N, D, M in [(64, 32, 4096)] if quick else [(2048, 2304, 16384), (1024, 2304, 65536)]:
        rows += race(f"SAE step, N {N} D {D} M {M}", partial(step_contenders, N, D, M, 64), differing_tensors,
                     3 if quick else 5, device, not quick)
    return rows


def topk_contenders(N, M, k, device):
    x = torch.randn(N, M, device=device, generator=torch.Generator(device).manual_seed(0))
    return {"torch.topk": lambda: (x, *torch.topk(x, k, sorted=False)), "lorasae": lambda: (x, *topk.topk(x, k))}


def differing_entries(answer, reference):
    """None where they are exactly the k largest, each at the place that its index names, no place twice."""
    (x, values, indices), (_, expected, _) = answer, reference
    if not torch.equal(values.sort(-1).values, expected.sort(-1).values):
        return "these are not the k largest"
    if not torch.equal(x.gather(-1, indices), values):
        return "an index points elsewhere"
    if (indices.sort(-1).values.diff(dim=-1) == 0).any():
        return "an index comes twice"
    return None


def problem(N, D, M, device):
    """x [N, D] and the tensors of an SAE at the start of its training: unit decoder rows, the encoder equal to them."""
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(N, D, device=device, generator=g)
    W_dec = F.normalize(torch.randn(M, D, device=device, generator=g))
    tensors = W_dec.clone(), torch.zeros(M, device=device), W_dec, torch.zeros(D, device=device)
    return [x, *(t.requires_grad_() for t in tensors)]


def encode_contenders(N, D, M, k, device):
    x, W_enc, b_enc, _, _ = (t.detach() for t in problem(N, D, M, device))
    return {"dense": lambda: {"values": topk.naive_encode(x, W_enc, b_enc, k)[0].sort(-1).values},
            "lorasae": lambda: {"values": topk.encode(x, W_enc, b_enc, k)[0].sort(-1).values}}


def step_contenders(N, D, M, k, device):
    tensors = problem(N, D, M, device)

    def run(step):
        reconstruction = step(*tensors, k)[0]
        loss = (reconstruction - tensors[0]).square().sum()
        gradients = torch.autograd.grad(loss, tensors[1:])
        return {"loss": loss.detach(), **dict(zip(["W_enc", "b_enc", "W_dec", "b_dec"], gradients))}

    return {"dense autograd": partial(run, topk.naive_step), "sparsify-style": partial(run, sparsify_step),
            "lorasae": partial(run, topk.sae_step)}


def sparsify_step(x, W_enc, b_enc, W_dec, b_dec, k):
    """The usual sparse way (EleutherAI/sparsify): dense pre-activations, torch.topk, embedding_bag with its backward,
    and an encoder gradient that adds up the rows of an [N, k, D] tensor."""
    values, indices = SparsifyEncoder.apply(x - b_dec, W_enc, b_enc, k)
    return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec, values, indices


class SparsifyEncoder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, k):
        values, indices = torch.topk(F.linear(x, W_enc, b_enc).relu(), k, sorted=False)
        ctx.save_for_backward(x, W_enc, b_enc, indices, values)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, grad, _):
        x, W_enc, b_enc, indices, values = ctx.saved_tensors
        grad = grad * (values > 0)
        grad_x = F.embedding_bag(indices, W_enc, per_sample_weights=grad, mode="sum")             # for b_dec
        pairs = (grad.unsqueeze(2) * x.unsqueeze(1)).flatten(0, 1)                      # [N * k, D]
        grad_W = torch.zeros_like(W_enc).index_add_(0, indices.flatten(), pairs)
        grad_b = torch.zeros_like(b_enc).index_add_(0, indices.flatten(), grad.flatten())
        return grad_x, grad_W, grad_b, None


# -------------------------------------------------------------------------------------------------------- the LoRA step

PAPER_TOKENS = 15_000_000


def bench_step(device, quick):
    """The step beside its peers, five ranks in one pass beside five runs, and FLOPs at the real models' shapes."""
    real = {name: REAL[name] for name in ("gemma-2-2b", "llama-3.2-1b", "gemma-2-9b")}
    cases = TINY if quick else SMALL if device == "cpu" else real
    ranks = (1, 2, 3, 4, 5) if quick else (1, 2, 4, 8, 32) if device == "cpu" else (1, 4, 16, 64, 256)
    if cases is real:
        cases["gemma-2-2b, 8 sequences a step"] = replace(REAL["gemma-2-2b"], batch=8)
    peers, rounds, rows = load_peers(), 3 if quick else 7, []
    measure = partial(race, rounds=rounds, device=device, memory=not quick, answer=lambda each: each.answer(), warm=2)
    for name, case in cases.items():
        peak = matmul_peak(device, case.dtype, 256 if quick else 1024 if device == "cpu" else 8192)
        build = partial(lora_contenders, case, peers)
        found = measure(f"LoRA step, {name}", build, partial(differing_steps, case))
        rows += [with_rates(row, case, peak) for row in found]
    name, case = next(iter(cases.items()))
    rows += measure(f"ranks {' '.join(map(str, ranks))}, {name}", partial(sweep_contenders, case, ranks),
                    partial(differing_steps, case))
    return rows + flops_rows(TINY if quick else REAL)


def with_rates(row, case, peak):
    """A race's row with tokens a second, seconds for the paper's 15M tokens, and its part of the `peak` FLOP/s."""
    flops = flops_per_token(case, recipe=not row["contender"].startswith("lorasae"))
    rate = case.ahead * case.context / (row["ms"] / 1e3)
    return {**row, "tokens_per_s": rate, "s_15M": PAPER_TOKENS / rate, "gflop_per_token": flops / 1e9,
            "utilisation": flops * rate / peak}


def flops_rows(cases):
    """A step's FLOPs a token by the published recipe and here. ours_flops: ours over the contender's."""
    rows = []
    for name, case in cases.items():
        flops = {"published recipe": flops_per_token(case, recipe=True), "lorasae": flops_per_token(case, recipe=False)}
        rows += [{"what": f"FLOPs, {name}", "contender": who, "gflop_per_token": count / 1e9,
                  "ours_flops": flops["lorasae"] / count} for who, count in flops.items()]
    return rows


def load_peers():
    """Whether the peers can run; says so where they cannot."""
    try:
        from lorasae.bench import peers                           # noqa: F401 - asks whether it can be imported
    except ModuleNotFoundError as missing:
        if missing.name not in ("peft", "transformers"):
            raise
        print(f"without the peers, as {missing.name} is not installed: pip install transformers peft", file=sys.stderr)
        return False
    return True


def lora_contenders(case, peers, device):
    """The same model, SAE, adapter and tokens for all. peers: whether transformers and peft are there."""
    model, sae, tokens = random_setting(case, device)
    weights = model.state_dict()                            # before there are adapters in it
    student = random_adapter(model, case.blocks, case.rank)
    contenders = {}
    if peers:
        from lorasae.bench.peers import Peer, attention_name
        adapter = adapter_state(attach_lora(model, student))
        keep = None if sae.on_special else special_mask(tokens, case.config.bos_token_id, case.config.eos_token_id)
        peer = partial(Peer, case, weights, adapter, sae, tokens, keep)
        contenders["official"] = peer(tuned=False)
        contenders[f"tuned, {attention_name(case.config, tokens.is_cuda)}"] = peer(tuned=True)
    contenders["lorasae, dropout 0.1"] = Ours(case, model, sae, tokens, [student], dropout=0.1)
    contenders["lorasae"] = Ours(case, model, sae, tokens, [student])
    return contenders


def sweep_contenders(case, ranks, device):
    model, sae, tokens = random_setting(case, device)
    students = [random_adapter(model, case.blocks, rank) for rank in ranks]
    return {f"{len(ranks)} runs": InTurn([Ours(case, model, sae, tokens, [student]) for student in students]),
            "lorasae": Ours(case, model, sae, tokens, students)}


def differing_steps(case, answer, reference):
    """In fp32 the loss and every gradient; in bf16 the loss alone, as bf16 logits give the peers other gradients."""
    if case.dtype == torch.float32:
        return differing_tensors(answer, reference, 1e-3)
    return differing_tensors(answer, {"loss": reference["loss"]}, 0.05)


def matmul_peak(device, dtype, size):
    """FLOP/s of a square matrix product, the best of ten."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    linear(a, b)
    return 2 * size ** 3 / min(timed(lambda: linear(a, b), device) for _ in range(10))


# --------------------------------------------------------------------------------------------------------- SAE training

class Watch:
    """Stands in for a run.Run: times a training loop in groups of `ahead` sequences, writes nothing, and ends it."""

    def __init__(self, case, groups, device):
        self.group, self.groups, self.device = case.ahead // case.batch, groups, device
        self.config, self.seconds, self.values = {"batch_size": case.batch}, [], {}

    def restore(self, parameters, optimizer):
        return 0

    def progress(self, start, steps):
        for group in range(1 + self.groups):                # the first is not counted
            synchronise(self.device)
            begun = time.perf_counter()
            yield from range(group * self.group, (group + 1) * self.group)
            synchronise(self.device)
            self.seconds.append(time.perf_counter() - begun)

    def log(self, step, **values):
        self.values = values

    def checkpoint_due(self, step):
        return False


def bench_sae(device, quick):
    """dictionary.train itself, frozen model included: a TopK, a JumpReLU and an end-to-end SAE."""
    real = replace(REAL["gemma-2-2b"], width=8 * 2304)
    case = TINY["tiny gemma"] if quick else real if device == "cuda" else SMALL["small gemma"]
    model, _, tokens = random_setting(case, device)
    D, rows = case.config.hidden_size, []
    for method in ("topk", "jumprelu", "e2e"):
        sae = dictionary.new_sae(method, D, case.width, k=64).to(device)
        watch = Watch(case, 3 if quick else 7, device)
        dictionary.train(model, sae, case.layer, lambda skip: turns(tokens, case.batch), watch, steps=10 ** 6, lr=1e-4,
                         clip=1.0, batch_size=case.batch, at_once=case.ahead, end_to_end=method == "e2e", l0=64)
        for name, value in watch.values.items():
            if not math.isfinite(value):
                raise RuntimeError(f"SAE training, {method}: {name} is {float(value)}")
        rows.append(speed(f"SAE training, {method}, D {D} M {case.width}", watch.seconds[1:], tokens.numel()))
    return rows


def turns(tokens, batch):
    """The batches of tokens, again and again."""
    while True:
        yield from tokens.split(batch)


def speed(what, seconds, tokens):
    """A row for something that has no contender: `tokens` in each of the measured `seconds`."""
    return {"what": what, "contender": "lorasae", "ms": 1e3 * statistics.median(seconds), "ms_min": 1e3 * min(seconds),
            "ms_max": 1e3 * max(seconds), "tokens_per_s": tokens / statistics.median(seconds)}


# ----------------------------------------------------------------------------------------------------------------- data

TOKENIZER, BOS, EOS = EMBEDDED / "gemma-2" / "tokenizer.json", 2, 1


def bench_data(device, quick):
    """The standard library's sources through the embedded tokenizer (4,096 tokens): packing, and a run's batches."""
    context, batch, count, some = (32, 2, 100, 5) if quick else (1024, 8, 100, 400)
    documents = list(itertools.islice(mixed(standard_library(), None, at_once=1), some))
    build = partial(pack_contenders, documents, context)
    tokens = context * len(build(device)["lorasae"]())
    rows = race(f"packing, {some} documents", build, differing_chunks, 3, device, memory=False)
    corpus = Corpus("stdlib", Tokenizer.from_file(str(TOKENIZER)), BOS, EOS, context=context, eval_tokens=50 * context)
    batches = corpus.batches(batch)
    seconds = [timed(lambda: [next(batches) for _ in range(count)], device) for _ in range(3)]
    batches.close()
    return [{**row, "tokens_per_s": tokens / (row["ms"] / 1e3)} for row in rows] + [
        speed(f"batches of {batch} x {context}, read, shuffled, packed", seconds, count * batch * context)]


def pack_contenders(documents, context, device):
    tokenizer = Tokenizer.from_file(str(TOKENIZER))

    def one_by_one():
        encodings = (tokenizer.encode(text, add_special_tokens=False) for text in documents)
        stream = [token for encoding in encodings for token in (EOS, *encoding.ids)]
        pieces = [stream[i:i + context - 1] for i in range(0, len(stream), context - 1)]
        return [[BOS, *piece] for piece in pieces[:-1]]

    return {"one document at a time": one_by_one,
            "lorasae": lambda: [chunk for chunk, _ in pack(documents, tokenizer, BOS, EOS, context)]}


def differing_chunks(answer, reference):
    return None if np.array_equal(answer, reference) else "other chunks"


# ---------------------------------------------------------------------------------------------------------- the command

SECTIONS = {"kl": bench_kl, "topk": bench_topk, "step": bench_step, "sae": bench_sae, "data": bench_data}


def table(rows):
    """Rows as aligned text, with a column for every key that one of them has."""
    def cell(value):
        if isinstance(value, float):
            return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        return "-" if value is None else str(value)

    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names] + [[cell(row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [[f"{text:{'<' if i < 2 else '>'}{widths[i]}}" for i, text in enumerate(line)] for line in lines]
    return "\n".join("  ".join(line) for line in aligned)


def about(device):
    """What a figure depends on beside the code."""
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        models = [line.partition(": ")[2] for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
        hardware = f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"
    installed = {found.metadata["Name"].lower(): found.version for found in metadata.distributions()}
    return {"device": device, "hardware": hardware, "torch": torch.__version__,
            **{name: installed.get(name) for name in ("transformers", "peft")}}


def read_lines(path):
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m lorasae.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("section", choices=[*SECTIONS, "all"], help="what to measure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"],
                        help="where (default: the GPU if there is one)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs, and no more")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device; pass --device cpu")
    setting = about(args.device)
    print(", ".join(f"{name} {value}" for name, value in setting.items() if value), flush=True)
    results = {}
    for section in SECTIONS if args.section == "all" else [args.section]:
        results[section] = SECTIONS[section](args.device, args.quick)
        print("\n" + table(results[section]), flush=True)
    if args.json:
        write_json(args.json, {**setting, "sections": results})


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
