"""Makes the included models: a tokenizer and small language models, in the format of real ones.

    python -m lorasae.tiny.make --model gemma-2         (or another; with OMP_NUM_THREADS=1,
                                                        several can run at once)

gemma-2 and llama-3 are the defaults; gemma-2-medium and gemma-2-small, trained on the same text,
are the other two sizes of Figure 4. A model's shape is in the config.json that ships with it:
Gemma-2's sliding window is half the context, so that it has an effect, and the original context of
Llama-3's rotary scaling is scaled down from the real 8192 to 64.

The text is the .py files of Python's standard library. The tokenizer is trained on the training
files only; the models also read the library's tests, three times as much text. `text.held_out`
decides by a file's path, tests included, whether it is held out, so no file is on both sides.
Losses are measured on 50,000 held-out tokens, the ones that train.py evaluates on. Each
run ends with a learning rate of zero and keeps the last weights: held-out text decides nothing.

The folder of each model gets config.json, model.safetensors (bf16), tokenizer.json, and MADE.json,
which says how the model was made. The shipped models come from an earlier version of this file,
which stopped the two largest by the clock, after 36 minutes.
"""
import math
import sys
import sysconfig
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorasae.evals import fidelity
from lorasae.io.console import Parser, note
from lorasae.io.files import read_json, write_bytes, write_json
from lorasae.io.models import load_model, parse_config, save_model
from lorasae.io.shards import Text
from lorasae.io.text import held_out, standard_library, text_of
from lorasae.model import Transformer
from lorasae.runs.folder import versions

HERE = Path(__file__).parent
NAMES = ("gemma-2", "gemma-2-medium", "gemma-2-small", "llama-3")
EOS, BOS = 1, 2                                         # as Gemma numbers them
CONTEXT, BATCH = 256, 16                                # tokens per sequence, sequences per step
EVAL_TOKENS = 50_000
TESTS = {"test", "tests", "idle_test"}                  # folders
MATRIX_LR, EMBEDDING_LR = 0.005, 0.004
WARM_UP, FLAT = 0.02, 0.25                              # shares of the training at which these end


# ---- Text ----------------------------------------------------------------------------------------

def texts(tests):
    """The standard library's training files; if `tests`, also those of its tests."""
    for file in standard_library():
        if not held_out(file.name):
            yield text_of(file)
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")) if tests else []:
        name = path.relative_to(root).as_posix()
        is_test = TESTS & set(name.split("/")) and "site-packages" not in name
        if is_test and not held_out(name):
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
        single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return tokenizer


def batches(stream, generator):
    """Yields [BATCH, CONTEXT] without end, a BOS in each row. Each pass cuts the text elsewhere."""
    piece = CONTEXT - 1
    while True:
        cut = stream[int(torch.randint(piece, (), generator=generator)):]
        pieces = cut[:len(cut) // piece * piece].view(-1, piece)
        chunks = F.pad(pieces, (1, 0), value=BOS)
        order = torch.randperm(len(chunks), generator=generator)
        for i in range(0, len(order) - BATCH + 1, BATCH):
            yield chunks[order[i:i + BATCH]]


# ---- The model -----------------------------------------------------------------------------------

def new_model(raw):
    """Normal initialisation. Llama's residual branches start at zero; Gemma-2's are normalised."""
    model = Transformer(parse_config(raw, "the tiny model"))
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            torch.nn.init.normal_(weight, std=raw["initializer_range"])
        elif raw["model_type"] == "llama" and ("o_proj" in name or "down_proj" in name):
            torch.nn.init.zeros_(weight)
        elif weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5)
    return model


def train(model, stream, steps):
    """Trains in place: Muon for the blocks' matrices, Adam for the rest; bf16 autocast, compiled.

    SDPBackend.MATH lets the compiler fuse attention's formula, in place of PyTorch's CPU kernel.
    """
    @torch.compile
    def step_loss(chunk):
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            logits = model(chunk)[:, :-1].flatten(0, 1)
            return F.cross_entropy(logits.float(), chunk[:, 1:].flatten())

    matrices, others = [], []
    for name, p in model.named_parameters():
        group = matrices if p.ndim == 2 and "embed_tokens" not in name else others
        group.append(p)
    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam(others, betas=(0.9, 0.95))

    text = batches(stream, torch.Generator().manual_seed(0))
    for step in range(steps):
        done = step / steps
        factor = min(1, done / WARM_UP + 1e-3, (1 - done) / (1 - FLAT))
        value = step_loss(next(text))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, rate in (muon, MATRIX_LR), (adam, EMBEDDING_LR):
            optimiser.param_groups[0]["lr"] = factor * rate
            optimiser.step()
            optimiser.zero_grad()
        if step % 100 == 0:
            note(f"{done:.0%}: loss {value.item():.3f}")


def make_model(name, tokens):
    """Makes one model: trains a tokenizer and weights, saves them, and measures the loss."""
    torch.manual_seed(0)
    folder = HERE / name
    raw = read_json(folder / "config.json")
    tokenizer = make_tokenizer(raw["vocab_size"])
    write_bytes(folder / "tokenizer.json", tokenizer.to_str().encode())
    with Text("stdlib", tokenizer, BOS, EOS, context=CONTEXT, eval_tokens=EVAL_TOKENS) as text:
        held = text.held_out

    # All training text is one stream of tokens, with an EOS before each document.
    encodings = tokenizer.encode_batch(list(texts(tests=True)), add_special_tokens=False)
    stream = torch.cat([torch.tensor([EOS, *encoding.ids]) for encoding in encodings])
    model = new_model(raw)
    steps = math.ceil(tokens / (BATCH * CONTEXT))
    train(model, stream, steps)
    save_model(model.to(torch.bfloat16), folder, config=raw)

    model = load_model(folder, dtype=torch.float32)     # as saved: rounded to bf16
    measured = fidelity.measure(model, {}, held.split(BATCH), ("base",))["base"]
    made = {
        "command": f"python -m lorasae.tiny.make {' '.join(sys.argv[1:])}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_text_tokens": len(stream), "trained_tokens": steps * BATCH * CONTEXT,
        "steps": steps, "threads": torch.get_num_threads(),
        "held_out_tokens": held.numel(), "model_loss": measured["ce"].mean().item(),
        **versions(), "tokenizers": tokenizers.__version__}
    write_json(folder / "MADE.json", made)
    print(made)


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", choices=NAMES, default="gemma-2", help="(default: %(default)s)")
    add("--tokens", type=int, default=15_000_000, help="(default: %(default)s)")
    args = parser.parse_args()
    make_model(args.model, args.tokens)


if __name__ == "__main__":
    main()
