"""Makes the embedded models: a tokenizer and small language models, in exactly the format of the real ones.

    python -m lorasae.tiny.make --model gemma-2         (or another; with OMP_NUM_THREADS=1 several run at once)

gemma-2 and llama-3 are the defaults; gemma-2-medium and gemma-2-small, on the same text, are the other two sizes of Figure 4.

Text: the .py files of Python's standard library. The tokenizer learns from its training files alone; the models read
the library's tests too, three times as much text. Held out are the files that `text.held_out` names by their path,
tests included, so no file is on both sides. The losses are measured on the first 50,000 held-out tokens, the ones
train.py evaluates on. A learning rate that falls to zero ends each run, and the last weights are the ones kept:
held-out text chooses nothing.

Into the folder of each model go config.json, model.safetensors (bf16), tokenizer.json, and MADE.json: how it was made.
"""
import argparse
import math
import platform
import sys
import sysconfig
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
import torch.nn.functional as F
from tqdm import tqdm

from lorasae.io.models import load_model, parse_config, save_model
from lorasae.io.shards import Text
from lorasae.errors import InputError
from lorasae.io.files import write_bytes, write_json
from lorasae.model import Transformer
from lorasae.io.text import held_out, standard_library

HERE = Path(__file__).parent
PAD, EOS, BOS = range(3)                                # as Gemma numbers them
CONTEXT, BATCH, EVAL_TOKENS = 256, 16, 50_000           # tokens a sequence, sequences a step, held-out tokens
PROMPT = "import os\n\n\nclass"
TESTS = {"test", "tests", "idle_test"}                  # folders
MATRIX_LR, EMBEDDING_LR, WARM_UP, FLAT = 0.005, 0.004, 0.02, 0.25     # the last two: fractions of the training

SHARED = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
    "head_dim": 32, "hidden_size": 192, "initializer_range": 0.02, "intermediate_size": 352,
    "max_position_embeddings": CONTEXT, "num_attention_heads": 4, "num_hidden_layers": 6, "num_key_value_heads": 2,
    "use_cache": True, "vocab_size": 4096,
}
GEMMA_2 = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", **SHARED, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "sliding_window": 128}                              # half the context, so that it binds
CONFIGS = {
    "gemma-2": GEMMA_2,
    "gemma-2-medium": {
        **GEMMA_2, "hidden_size": 112, "intermediate_size": 208, "head_dim": 28, "query_pre_attn_scalar": 28,
        "num_hidden_layers": 4},
    "gemma-2-small": {
        **GEMMA_2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_hidden_layers": 4},
    "llama-3": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHARED, "hidden_act": "silu",
        "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": {
            "factor": 4.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64,
            "rope_type": "llama3"},                     # the real 8192 scaled down with the context
        "tie_word_embeddings": True},
}


# ---- Text ----------------------------------------------------------------------------------------

def texts(tests):
    """The standard library's training files and, if asked for, those of its tests; `held_out` of the path decides."""
    for file in standard_library():
        if not held_out(file.name):
            with file.open() as raw:
                yield raw.read().decode()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")) if tests else []:
        name = path.relative_to(root).as_posix()
        if TESTS & set(name.split("/")) and "site-packages" not in name and not held_out(name):
            yield path.read_bytes().decode(errors="replace")        # some are broken on purpose


def make_tokenizer(vocabulary):
    """A byte-level BPE tokenizer that puts a BOS first, as Gemma's and Llama's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts(tests=False), trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "<eos>", "<bos>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)])
    return tokenizer


def training_stream(tokenizer):
    """All training text as one [tokens] array: EOS before each document."""
    encodings = tokenizer.encode_batch(list(texts(tests=True)), add_special_tokens=False)
    return torch.from_numpy(np.concatenate([np.array([EOS, *encoding.ids]) for encoding in encodings]))


def batches(stream, generator):
    """[BATCH, CONTEXT] without end: BOS and CONTEXT - 1 tokens, cut at another offset in each pass over the text."""
    piece = CONTEXT - 1
    while True:
        cut = stream[int(torch.randint(piece, (), generator=generator)):]
        chunks = F.pad(cut[:len(cut) // piece * piece].view(-1, piece), (1, 0), value=BOS)
        order = torch.randperm(len(chunks), generator=generator)
        for i in range(0, len(order) - BATCH + 1, BATCH):
            yield chunks[order[i:i + BATCH]]


# ---- Losses, in nats a token ---------------------------------------------------------------------

def ngram_losses(stream, tokens, vocabulary):
    """(unigram, bigram) cross-entropy of tokens [n, CONTEXT], BOS excepted, fitted on stream.

    Unigram: add-one. Bigram: absolute discounting, max(c(ab) - d, 0) / c(a) + d · |{b: c(ab) > 0}| / c(a) · P(b) with
    Ney's d = n₁ / (n₁ + 2 n₂). After a BOS, which says nothing, the unigram stands in for the bigram.
    """
    unigram = (torch.bincount(stream, minlength=vocabulary) + 1.0) / (len(stream) + vocabulary)
    pairs = torch.bincount(stream[:-1] * vocabulary + stream[1:], minlength=vocabulary ** 2)
    pairs = pairs.view(vocabulary, vocabulary).double()
    once, twice = (pairs == 1).sum(), (pairs == 2).sum()
    discount = (once / (once + 2 * twice)).item()
    total, followers = pairs.sum(1).clamp(min=1), (pairs > 0).sum(1)
    a, b = tokens[:, :-1], tokens[:, 1:]
    seen = (pairs[a, b] - discount).clamp(min=0) / total[a]
    bigram = seen + torch.where(pairs.sum(1) > 0, discount * followers / total, 1.0)[a] * unigram[b]
    return -unigram[b].log().mean().item(), -bigram.log().mean().item()


@torch.no_grad()
def model_loss(model, tokens):
    """Mean cross-entropy of the model on tokens [n, CONTEXT], BOS excepted."""
    return sum(loss(model, chunk).item() * len(chunk) for chunk in tokens.split(BATCH)) / len(tokens)


def loss(model, tokens):
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


# ---- The model -----------------------------------------------------------------------------------

def new_model(raw):
    """Normal initialisation. Llama's residual branches start at zero; Gemma-2 normalises its own, which forbids it."""
    model = Transformer(parse_config(raw, "the tiny model"))
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            torch.nn.init.normal_(weight, std=raw["initializer_range"])
        elif raw["model_type"] == "llama" and ("o_proj" in name or "down_proj" in name):
            torch.nn.init.zeros_(weight)
        elif weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5)
    return model


def train(model, stream, seed, save, *, minutes=None, tokens=None):
    """Trains in place for so many minutes or tokens, whichever is given; returns (steps, seconds). save()s at times.

    Muon for the matrices of the blocks, AdamW for embedding and norms; bf16 autocast, compiled. SDPBackend.MATH lets
    the compiler fuse the formula of attention instead of calling PyTorch's CPU kernel.
    """
    @torch.compile
    def step_loss(chunk):
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            return loss(model, chunk)

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed_tokens" in name]
    muon = torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=EMBEDDING_LR, betas=(0.9, 0.95), weight_decay=0.0)
    text = batches(stream, torch.Generator().manual_seed(seed))
    step_loss(next(text)).backward()                    # compiles, outside the time that counts
    model.zero_grad()
    start, steps, smooth, saved = time.monotonic(), 0, None, 0
    with tqdm(total=100, unit="%", file=sys.stderr, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while True:
            seconds = time.monotonic() - start
            done = seconds / (60 * minutes) if minutes else steps * BATCH * CONTEXT / tokens
            if done >= 1:
                return steps, seconds
            factor = min(1, done / WARM_UP + 1e-3, (1 - done) / (1 - FLAT))
            value = step_loss(next(text))
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser, rate in (muon, MATRIX_LR), (adam, EMBEDDING_LR):
                optimiser.param_groups[0]["lr"] = factor * rate
                optimiser.step()
                optimiser.zero_grad()
            steps += 1
            smooth = value.item() if smooth is None else 0.98 * smooth + 0.02 * value.item()
            if not math.isfinite(smooth):
                raise InputError(f"the loss is not finite at step {steps}: lower the learning rates")
            speed = steps * BATCH * CONTEXT / (time.monotonic() - start)
            bar.set_postfix_str(f"loss {smooth:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update(100 * done - bar.n)
            if done - saved > 0.2:
                save()
                saved = done


@torch.no_grad()
def sample(model, tokenizer, prompt, length, seed, temperature=0.7):
    """Text of `length` tokens that the model writes after the prompt."""
    tokens, generator = torch.tensor([tokenizer.encode(prompt).ids]), torch.Generator().manual_seed(seed)
    while tokens.shape[1] < length:
        chances = (model(tokens)[0, -1].float() / temperature).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)[None]], dim=1)
    return tokenizer.decode(tokens[0].tolist())


def make_model(name, folder, seed, *, minutes=None, tokens=None):
    """Tokenizer, training, files and figures of one model -> what MADE.json holds."""
    torch.manual_seed(seed)
    raw = CONFIGS[name]
    tokenizer = make_tokenizer(raw["vocab_size"])
    write_bytes(folder / "tokenizer.json", tokenizer.to_str().encode())
    with Text("stdlib", tokenizer, BOS, EOS, context=CONTEXT, eval_tokens=EVAL_TOKENS) as text:
        held = text.held_out
    stream = training_stream(tokenizer)
    model = new_model(raw)

    def save():
        save_model(deepcopy(model).to(torch.bfloat16), folder, config=raw)

    steps, seconds = train(model, stream, seed, save, minutes=minutes, tokens=tokens)
    save()
    model = load_model(folder, dtype=torch.float32)     # what was saved, rounded to bf16
    unigram, bigram = ngram_losses(stream, held, raw["vocab_size"])
    made = {
        "command": f"python -m lorasae.tiny.make --model {name} --seed {seed} "
                   + (f"--minutes {minutes:g}" if minutes else f"--tokens {tokens}"),
        "parameters": sum(p.numel() for p in model.parameters()), "training_text_tokens": len(stream),
        "trained_tokens": steps * BATCH * CONTEXT, "steps": steps, "seconds": round(seconds),
        "tokens_per_second": round(steps * BATCH * CONTEXT / seconds), "threads": torch.get_num_threads(),
        "held_out_tokens": held.numel(), "unigram_loss": unigram, "bigram_loss": bigram,
        "model_loss": model_loss(model, held), "sample": sample(model, tokenizer, PROMPT, 200, seed),
        "python": platform.python_version(), "torch": torch.__version__, "tokenizers": tokenizers.__version__}
    write_json(folder / "MADE.json", made)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="gemma-2", help="which one to make (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=45, help="how long to train (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="train on so many tokens, however long it takes")
    parser.add_argument("--seed", type=int, default=0, help="of weights, text order and sample (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE, help="the model goes to OUT/MODEL (default: this package)")
    args = parser.parse_args()
    made = make_model(args.model, args.out / args.model, args.seed,
                      **({"tokens": args.tokens} if args.tokens else {"minutes": args.minutes}))
    print(f"{made['sample']}\n\nheld-out loss, nats a token ({made['held_out_tokens']:,} tokens)")
    for name in ("unigram", "bigram", "model"):
        print(f"    {name:<8} {made[name + '_loss']:8.3f}")
    print(f"{made['trained_tokens']:,} tokens at {made['tokens_per_second']:,} a second; in {args.out / args.model}")


if __name__ == "__main__":
    main()
